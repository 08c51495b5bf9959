# Sends PF_KEYv2 messages (RFC 2367, linux/pfkeyv2.h) to whatever socket(PF_KEY)
# is and prints what comes back, one JSON object a step: the errno of send(),
# what the sender hears, and what another socket hears that is registered. What
# differs from run to run (times, ids, the pid) is replaced by names.
import errno, json, os, select, socket, struct, sys, time

GETSPI, UPDATE, ADD, DELETE, GET, ACQUIRE, REGISTER, EXPIRE, FLUSH, DUMP, PROMISC, PCHANGE = range(1, 13)
SPDUPDATE, SPDADD, SPDDELETE, SPDGET, SPDACQUIRE, SPDDUMP, SPDFLUSH, SPDSETIDX, SPDEXPIRE, SPDDELETE2, MAPPING, MIGRATE = range(13, 25)
AH, ESP, IPCOMP = 2, 3, 9
AUTH_SHA1, ENCR_AES, ENCR_NULL = 3, 12, 11
IN, OUT, FWD = 1, 2, 3
DISCARD, NONE, IPSEC = 0, 1, 2
TRANSPORT, TUNNEL = 1, 2
USE, REQUIRE, UNIQUE = 1, 2, 3
US, PEER, OTHER = "192.0.2.1", "198.51.100.2", "203.0.113.7"
US6, PEER6 = "2001:db8::1", "2001:db8::2"

def ext(type, body):
    body += bytes(-(4 + len(body)) % 8)
    return struct.pack("=HH", (4 + len(body)) // 8, type) + body

def sockaddr(a, port=0):
    if ":" in a:
        return struct.pack("=H", 10) + struct.pack(">HI", port, 0) + socket.inet_pton(socket.AF_INET6, a) + bytes(4)
    return struct.pack("=H", 2) + struct.pack(">H", port) + socket.inet_aton(a) + bytes(8)

def addr(type, a, proto=0, prefix=None, port=0):
    if prefix is None:
        prefix = 128 if ":" in a else 32
    return ext(type, struct.pack("=BBH", proto, prefix, 0) + sockaddr(a, port))

def sa(spi, auth=AUTH_SHA1, encr=ENCR_AES, replay=32, state=1, flags=0):
    return ext(1, struct.pack(">I", spi) + struct.pack("=BBBBI", replay, state, auth, encr, flags))

def lifetime(type, alloc=0, octets=0, add=0, use=0):
    return ext(type, struct.pack("=IQQQ", alloc, octets, add, use))

def key(type, n, bits=None):
    return ext(type, struct.pack("=HH", n * 8 if bits is None else bits, 0) + bytes(range(n)))

def sa2(mode, reqid):
    return ext(19, struct.pack("=BBHII", mode, 0, 0, 0, reqid))

def natt(type=2, sport=4500, dport=4500):
    return ext(20, struct.pack("=B3x", type)) + ext(21, struct.pack(">HH", sport, 0)) + ext(22, struct.pack(">HH", dport, 0))

def spirange(lo, hi):
    return ext(16, struct.pack("=III", lo, hi, 0))

def request(proto=50, mode=TUNNEL, level=UNIQUE, reqid=7, src=US, dst=PEER, len=None):
    a = sockaddr(src) + sockaddr(dst) if src else b""
    n = 16 + globals()["__builtins__"].len(a) if len is None else len
    return struct.pack("=HHBBHII", n, proto, mode, level, 0, reqid, 0) + a

def policy(type=IPSEC, dir=OUT, id=0, prio=0, *reqs):
    return ext(18, struct.pack("=HBBII", type, dir, 0, id, prio) + b"".join(reqs))

def msg(type, satype=0, *exts, seq=None, err=0, version=2, len_=None, reserved=0):
    global seqno
    if seq is None:
        seqno += 1
        seq = seqno
    body = b"".join(exts)
    return struct.pack("=BBBBHHII", version, type, err, satype, 2 + len(body) // 8 if len_ is None else len_, reserved, seq, os.getpid()) + body

seqno = 100

# ---- what comes back ----

ids, count = {}, 0 # names of policies

def show_addr(b):
    proto, prefix = b[0], b[1]
    s = b[4:]
    family = struct.unpack("=H", s[:2])[0]
    port = struct.unpack(">H", s[2:4])[0]
    a = socket.inet_ntop(socket.AF_INET6, s[8:24]) if family == 10 else socket.inet_ntoa(s[4:8])
    return {"proto": proto, "prefix": prefix, "addr": a, "port": port}

def show_requests(b):
    l = []
    while len(b) >= 16:
        n, proto, mode, level, _, reqid = struct.unpack("=HHBBHI", b[:12])
        if n < 16:
            return l + ["length %d" % n]
        a, where = b[16:n], []
        while a:
            family = struct.unpack("=H", a[:2])[0]
            size = 28 if family == 10 else 16
            where.append(socket.inet_ntop(socket.AF_INET6, a[8:24]) if family == 10 else socket.inet_ntoa(a[4:8]))
            a = a[size:]
        l.append({"proto": proto, "mode": mode, "level": level, "reqid": reqid, "addrs": where})
        b = b[n:]
    return l

def show_ext(type, b):
    global count
    if type == 1:
        spi = struct.unpack(">I", b[:4])[0]
        replay, state, auth, encr, flags = struct.unpack("=BBBBI", b[4:12])
        return {"spi": spi, "replay": replay, "state": state, "auth": auth, "encr": encr, "flags": flags}
    if type in (2, 3, 4):
        alloc, octets, add, use = struct.unpack("=IQQQ", b[:28])
        if type == 2:
            add, use = "now" if add else 0, "now" if use else 0
        return {"alloc": alloc, "octets": octets, "add": add, "use": use}
    if type in (5, 6, 7, 23):
        return show_addr(b)
    if type in (8, 9):
        bits = struct.unpack("=H", b[:2])[0]
        return {"bits": bits, "key": b[4:4 + (bits + 7) // 8].hex()}
    if type == 18:
        kind, dir, _, id, prio = struct.unpack("=HBBII", b[:12])
        if id:
            if id not in ids:
                ids[id] = "P%d" % (count + 1)
                count += 1
            id = ids[id]
        return {"type": kind, "dir": dir, "id": id, "prio": prio, "requests": show_requests(b[12:])}
    if type == 19:
        return {"mode": b[0], "reqid": struct.unpack("=I", b[8:12])[0]}
    if type == 20:
        return {"type": b[0]}
    if type in (21, 22):
        return {"port": struct.unpack(">H", b[:2])[0]}
    if type in (14, 15):
        return "a list"
    return b.hex()

def show(b):
    version, type, err, satype, words, _, seq, pid = struct.unpack("=BBBBHHII", b[:16])
    m = {"version": version, "type": type, "errno": err, "satype": satype, "seq": seq, "pid": "ours" if pid == os.getpid() else pid}
    if type == ACQUIRE and pid == 0 and seq:
        m["seq"] = "fresh"
    if words * 8 != len(b):
        m["length"] = "%d words, %d octets" % (words, len(b))
    at = 16
    while at < len(b):
        n, t = struct.unpack("=HH", b[at:at + 4])
        if n == 0:
            m["length"] = "extension of length 0"
            break
        m["ext %d" % t] = show_ext(t, b[at + 4:at + n * 8])
        at += n * 8
    return m

def hear(s, first=0.1):
    l = []
    # With Linux all is there when send returns. missiu is a process of its own:
    # first is how long its first message may take on a loaded machine.
    while select.select([s], [], [], 0 if kernel else first)[0]:
        l.append(s.recv(65536))
        first = 0.05
    return l

kernel = "--kernel" in sys.argv

# A reader that stopped at the dump's last message is as good, but order is the
# engine's choice: sort what is not the last by SPI or id.
def sort_dump(l):
    if l and all(m["type"] in (DUMP, SPDDUMP) and not m["errno"] for m in l):
        if [m["seq"] for m in l] != list(range(1, len(l))) + [0]:
            return ["bad numbers %s" % [m["seq"] for m in l]]
        for m in l:
            m["seq"] = "dump"
        l.sort(key=lambda m: json.dumps([m.get("ext 1", {}).get("spi"), m.get("ext 18"), m.get("ext 5"), m.get("ext 6")]))
    return l

pf = lambda: socket.socket(15, socket.SOCK_RAW, 2)
me, other = pf(), pf()
other.send(msg(REGISTER, ESP))
hear(other)

# hide is a range of SPIs of which any will do; wait are seconds and how many
# events the other socket hears within them.
def step(name, *msgs, hide=None, wait=None):
    r = {"step": name, "send": []}
    for m in msgs:
        try:
            me.send(m)
            r["send"].append("ok")
        except OSError as e:
            r["send"].append(errno.errorcode[e.errno])
    if wait:
        # Linux keeps an SA of SPI 0 for each GETSPI that came to nothing.
        meant = lambda m: m["type"] != EXPIRE or m["ext 1"]["spi"] or m["ext 6"]["addr"] != US
        end, r["other"] = time.time() + wait[0], []
        while len(r["other"]) < wait[1] and time.time() < end:
            if select.select([other], [], [], 0.1)[0]:
                r["other"] += [m for m in [show(other.recv(65536))] if meant(m)]
        r["other"].sort(key=lambda m: json.dumps([m["type"], m.get("ext 1", {}).get("spi"), "ext 3" in m]))
        r["sender"] = sorted(m["type"] for m in [show(b) for b in hear(me, 1)] if meant(m))
    else:
        r["sender"] = sort_dump([show(m) for m in hear(me, 1)])
        r["other"] = sort_dump([show(m) for m in hear(other)])
    if hide:
        for m in r["sender"]:
            if "ext 1" in m:
                hidden.append(m["ext 1"]["spi"])
                m["ext 1"]["spi"] = "in range" if hide[0] <= hidden[-1] <= hide[1] else hidden[-1]
    print(json.dumps(r))
    return r

hidden = []

# clean removes what only one of the two may have; nothing is compared.
def clean(*msgs):
    global count
    for m in msgs:
        me.send(m)
        hear(me, 1), hear(other)
    count += -count % 100 # the next policy has the same name with both

# ---- the steps ----

pair = addr(5, PEER) + addr(6, US)
out = addr(5, US) + addr(6, PEER)
out6 = addr(5, US6) + addr(6, PEER6)
keys = key(9, 16) + key(8, 20)
lives = lifetime(3, 1000, 1 << 40, 3600, 7200) + lifetime(4, 900, 1 << 39, 3000, 7000)

# Headers and chains
step("short", b"\2" * 15)
step("version 1", msg(GET, ESP, version=1))
step("type 0", msg(0))
step("type 25", msg(25))
step("reserved", msg(FLUSH, reserved=1))
step("length 1", msg(FLUSH, len_=1))
step("length too long", msg(FLUSH, len_=3))
step("extension of length 0", msg(GET, ESP, struct.pack("=HHI", 0, 1, 0)))
step("extension past the end", msg(GET, ESP, struct.pack("=HHI", 2, 1, 0)))
step("extension of type 0", msg(GET, ESP, struct.pack("=HHI", 1, 0, 0)))
step("extension too short", msg(GET, ESP, struct.pack("=HHI", 1, 1, 0)))
step("extension twice", msg(GET, ESP, sa(0x1000), sa(0x1000), pair))
step("address of family 7", msg(GET, ESP, sa(0x1000), ext(5, struct.pack("=BBH", 0, 32, 0) + struct.pack("=H", 7) + bytes(14)), addr(6, US)))
step("address with prefix 33", msg(GET, ESP, sa(0x1000), addr(5, PEER, prefix=33), addr(6, US)))
step("addresses of two families", msg(GET, ESP, sa(0x1000), addr(5, PEER6), addr(6, US)))
step("address cut", msg(GET, ESP, sa(0x1000), ext(5, struct.pack("=BBH", 0, 32, 0) + struct.pack("=H", 2) + bytes(2)), addr(6, US)))

# REGISTER
step("REGISTER ESP", msg(REGISTER, ESP))
step("REGISTER ESP again", msg(REGISTER, ESP))
step("REGISTER 0", msg(REGISTER, 0))
step("REGISTER 9", msg(REGISTER, 9))
step("REGISTER 10", msg(REGISTER, 10))

# The life of an SA
step("DUMP of nothing", msg(DUMP, 0))
step("GETSPI", msg(GETSPI, ESP, pair, spirange(0x1000, 0x1000), sa2(TUNNEL, 7)))
step("GETSPI without X_SA2", msg(GETSPI, ESP, pair, spirange(0x1002, 0x1002)))
clean(msg(DELETE, ESP, sa(0x1002), pair)) # its 30 seconds would end between steps
step("GET of a larval SA", msg(GET, ESP, sa(0x1000), pair))
step("ADD over a larval SA", msg(ADD, ESP, sa(0x1000), pair, keys, sa2(TUNNEL, 7)))
step("UPDATE of a larval SA", msg(UPDATE, ESP, sa(0x1000, state=0), pair, keys, lives, sa2(TUNNEL, 7)))
step("GET", msg(GET, ESP, sa(0x1000), pair))
step("GET with another source", msg(GET, ESP, sa(0x1000), addr(5, OTHER), addr(6, US)))
step("GET with ports", msg(GET, ESP, sa(0x1000), addr(5, PEER, 17, 0, 500), addr(6, US, 17, 0, 4500)))
step("GET with another destination", msg(GET, ESP, sa(0x1000), addr(5, PEER), addr(6, OTHER)))
step("GET of another protocol", msg(GET, AH, sa(0x1000), pair))
step("GET of type 0", msg(GET, 0, sa(0x1000), pair))
step("GET of nothing", msg(GET, ESP, sa(0x9999), pair))
step("ADD", msg(ADD, ESP, keys, lives, sa(0x2000), out, sa2(TUNNEL, 7)))
step("ADD again", msg(ADD, ESP, keys, lives, sa(0x2000), out, sa2(TUNNEL, 7)))
step("ADD IPv6, NULL", msg(ADD, ESP, key(9, 0), key(8, 20), sa(0x2001, encr=ENCR_NULL, replay=0), out6, sa2(TRANSPORT, 0)))
step("GET IPv6, NULL", msg(GET, ESP, sa(0x2001), out6))
step("ADD without X_SA2", msg(ADD, ESP, keys, sa(0x2002), out))
step("GET without X_SA2", msg(GET, ESP, sa(0x2002), out))
step("ADD of state larval, KAME's flags", msg(ADD, ESP, keys, sa(0x2003, state=0, flags=0x40), out, sa2(0, 0)))
step("GET of state larval, KAME's flags", msg(GET, ESP, sa(0x2003), out))
step("ADD NAT-T", msg(ADD, ESP, keys, sa(0x2004), out, sa2(TUNNEL, 7), natt()))
step("GET NAT-T", msg(GET, ESP, sa(0x2004), out))
step("UPDATE of NAT-T ports", msg(UPDATE, ESP, keys, sa(0x2004), out, sa2(TUNNEL, 7), natt(2, 1024, 4500)))
step("GET of NAT-T ports", msg(GET, ESP, sa(0x2004), out))
step("UPDATE without NAT-T", msg(UPDATE, ESP, keys, sa(0x2004), out, sa2(TUNNEL, 7)))
step("ADD with an unknown extension", msg(ADD, ESP, keys, sa(0x2005), out, ext(99, b"abcd")))
step("ADD with IDENTITY", msg(ADD, ESP, keys, sa(0x2006), out, ext(10, struct.pack("=HHQ", 2, 0, 0) + b"gw.example\0")))
step("UPDATE of a mature SA", msg(UPDATE, ESP, keys, sa(0x2000), out, lifetime(3, 0, 0, 600, 0), lifetime(4, 0, 0, 500, 0), sa2(TUNNEL, 7)))
step("GET after it", msg(GET, ESP, sa(0x2000), out))
step("UPDATE of nothing", msg(UPDATE, ESP, keys, sa(0x9999), out))
step("UPDATE with another key", msg(UPDATE, ESP, key(9, 24) + key(8, 20), sa(0x2000), out, sa2(TUNNEL, 7)))
step("UPDATE in another mode", msg(UPDATE, ESP, keys, sa(0x2000), out, sa2(TRANSPORT, 7)))
step("GET after those", msg(GET, ESP, sa(0x2000), out))
step("ADD with HMAC-SHA2-256", msg(ADD, ESP, key(9, 32) + key(8, 32), sa(0x2010, auth=5), out, lives))
step("GET with HMAC-SHA2-256", msg(GET, ESP, sa(0x2010), out))
step("ADD with Linux's flags", msg(ADD, ESP, keys, sa(0x2011, flags=0xe0000000), out))
step("GET with Linux's flags", msg(GET, ESP, sa(0x2011), out))
step("ADD with a window of 255", msg(ADD, ESP, keys, sa(0x2012, replay=255), out))
step("GET with a window of 255", msg(GET, ESP, sa(0x2012), out))
step("ADD of a reserved SPI", msg(ADD, ESP, keys, sa(255), out))
step("ADD with AES-GCM", msg(ADD, ESP, key(9, 20), sa(0x2013, auth=0, encr=20), out))
step("ADD in mode BEET", msg(ADD, ESP, keys, sa(0x2014), out, sa2(3, 0)))
step("ADD with 1 bit more", msg(ADD, ESP, key(9, 17, 129) + key(8, 20), sa(0x2015), out))
step("ADD with old encapsulation", msg(ADD, ESP, keys, sa(0x2016), out, sa2(TUNNEL, 7), natt(1)))
step("ADD with mapped addresses", msg(ADD, ESP, keys, sa(0x2017), addr(5, "::ffff:1.2.3.4"), addr(6, "::ffff:1.2.3.5")))
clean(*[msg(DELETE, ESP, sa(spi), out) for spi in (0x2000, 255, 0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2016)])
clean(msg(DELETE, ESP, sa(0x2017), addr(5, "::ffff:1.2.3.4"), addr(6, "::ffff:1.2.3.5")))
step("ADD after those", msg(ADD, ESP, keys, lives, sa(0x2000), out, sa2(TUNNEL, 7)))

# Other protocols
step("ADD AH", msg(ADD, AH, sa(0x2100, encr=0), key(8, 20), out, lives, sa2(TUNNEL, 7)))
step("GET AH", msg(GET, AH, sa(0x2100), out))
step("GET AH as ESP", msg(GET, ESP, sa(0x2100), out))
step("ADD AH without a key", msg(ADD, AH, sa(0x2101, encr=0), out))
step("ADD AH with a key of encryption", msg(ADD, AH, sa(0x2101, encr=0), key(8, 20), key(9, 16), out))
step("ADD AH with encryption", msg(ADD, AH, sa(0x2103), keys, out))
step("ADD AH without an algorithm", msg(ADD, AH, sa(0x2103, auth=0, encr=0), key(8, 20), out))
step("GETSPI AH", msg(GETSPI, AH, pair, spirange(0x2102, 0x2102)))
step("UPDATE AH", msg(UPDATE, AH, sa(0x2102, encr=0), key(8, 20), pair, sa2(TRANSPORT, 3)))
step("DUMP of AH that is there", msg(DUMP, AH))
step("DELETE AH", msg(DELETE, AH, sa(0x2100), out))
clean(*[msg(DELETE, AH, sa(spi), out) for spi in (0x2101, 0x2103)])
step("FLUSH of AH that is there", msg(FLUSH, AH))
step("GETSPI IPComp", msg(GETSPI, IPCOMP, pair, spirange(0x1234, 0x1234), sa2(TRANSPORT, 0)))
step("GETSPI IPComp beyond 16 bits", msg(GETSPI, IPCOMP, pair, spirange(0x1000, 0x10000)))
step("UPDATE IPComp", msg(UPDATE, IPCOMP, sa(0x1234, auth=0, encr=2), pair, sa2(TRANSPORT, 0)))
step("GET IPComp", msg(GET, IPCOMP, sa(0x1234), pair))
step("ADD IPComp", msg(ADD, IPCOMP, sa(0x1235, auth=0, encr=2, replay=0), out, sa2(TUNNEL, 7)))
step("ADD IPComp, LZS", msg(ADD, IPCOMP, sa(0x1236, auth=0, encr=3), out))
step("ADD IPComp without an algorithm", msg(ADD, IPCOMP, sa(0x1236, auth=0, encr=0), out))
step("FLUSH of IPComp", msg(FLUSH, IPCOMP))

# SPIs
step("GETSPI in the default range", msg(GETSPI, ESP, pair, sa2(TUNNEL, 7)), hide=(0x100, 0x0fffffff))
step("GETSPI in a range", msg(GETSPI, ESP, pair, spirange(0xc0000000, 0xcfffffff)), hide=(0xc0000000, 0xcfffffff))
step("GETSPI IPv6", msg(GETSPI, ESP, addr(5, PEER6, 255, 0) + addr(6, US6, 255, 0), spirange(0x3000, 0x3000)))
step("GETSPI with ports, an SA and X_SA2 of any mode", msg(GETSPI, ESP, sa(0x7777), addr(5, PEER, 255, 32, 500), addr(6, US, 255, 32, 4500), sa2(0, 0), spirange(0x3001, 0x3001)))
step("GETSPI in mode 9", msg(GETSPI, ESP, pair, spirange(0x3002, 0x3002), sa2(9, 0)))
clean(*[msg(DELETE, ESP, sa(spi), pair) for spi in hidden + [0x3001, 0x3002]])
clean(msg(DELETE, ESP, sa(0x3000), addr(5, PEER6) + addr(6, US6)))

# Every extension, known or not, of one word in a request that is otherwise good
for t in list(range(1, 28)) + [0x7fff]:
    step("GET with one word of extension %d" % t, msg(GET, ESP, sa(0x2000), out, ext(t, bytes(4))))
step("GET with a security context", msg(GET, ESP, sa(0x2000), out, ext(24, struct.pack("=BBH", 1, 1, 4) + b"ctx\0")))
step("GET with a security context too long", msg(GET, ESP, sa(0x2000), out, ext(24, struct.pack("=BBH", 1, 1, 99) + b"ctx\0")))
step("GET with a security context too short", msg(GET, ESP, sa(0x2000), out, ext(24, struct.pack("=BBH", 1, 1, 0) + b"ctx\0")))
step("GET with PROXY", msg(GET, ESP, sa(0x2000), out, addr(7, OTHER)))
step("GET with SENSITIVITY", msg(GET, ESP, sa(0x2000), out, ext(12, bytes(12))))
step("GET with KMPRIVATE", msg(GET, ESP, sa(0x2000), out, ext(17, bytes(4))))
step("ADD NAT-T without ports", msg(ADD, ESP, keys, sa(0x2020), out, ext(20, struct.pack("=B3x", 2))))
step("ADD NAT-T with an original address", msg(ADD, ESP, keys, sa(0x2021), out, natt(), addr(23, OTHER)))
step("GET NAT-T with an original address", msg(GET, ESP, sa(0x2021), out))
step("ADD NAT-T of AH", msg(ADD, AH, sa(0x2022, encr=0), key(8, 20), out, natt()))
step("ADD NULL without integrity", msg(ADD, ESP, key(9, 0), sa(0x2023, auth=0, encr=ENCR_NULL), out))
step("ADD without integrity", msg(ADD, ESP, key(9, 16), sa(0x2024, auth=0), out))
step("ADD with authentication NULL", msg(ADD, ESP, key(9, 16), key(8, 0), sa(0x2025, auth=251), out))
clean(*[msg(DELETE, ESP, sa(spi), out) for spi in (0x2020, 0x2021, 0x2023, 0x2024, 0x2025)], msg(DELETE, AH, sa(0x2022), out))

# Lifetimes by time
def limits(soft, hard):
    return lifetime(3, 0, 0, hard, 0) + lifetime(4, 0, 0, soft, 0)
step("EXPIRE soft", msg(ADD, ESP, keys, limits(1, 60), sa(0x2200), out, sa2(TUNNEL, 7)), wait=(5, 2))
step("GET of a dying SA", msg(GET, ESP, sa(0x2200), out))
step("DUMP with a dying SA", msg(DUMP, ESP))
step("UPDATE of a dying SA", msg(UPDATE, ESP, keys, lives, sa(0x2200), out, sa2(TUNNEL, 7)))
step("GET of what was dying", msg(GET, ESP, sa(0x2200), out))
step("EXPIRE soft and hard", msg(ADD, ESP, keys, limits(1, 2), sa(0x2201), out, sa2(TUNNEL, 7), natt()), wait=(6, 3))
step("GET of what expired", msg(GET, ESP, sa(0x2201), out))
step("EXPIRE hard below soft", msg(ADD, ESP, keys, limits(9, 1), sa(0x2202), out6, sa2(TUNNEL, 7)), wait=(5, 2))
clean(msg(DELETE, ESP, sa(0x2200), out))

# What no SA is
for name, satype, parts in (
    ("without SA", ESP, keys + out), ("without source", ESP, keys + sa(0x3000) + addr(6, PEER)),
    ("without destination", ESP, keys + sa(0x3000) + addr(5, US)), ("without keys", ESP, sa(0x3000) + out),
    ("without encryption key", ESP, key(8, 20) + sa(0x3000) + out), ("with HARD alone", ESP, keys + sa(0x3000) + out + lifetime(3, 0, 0, 9, 0)),
    ("with SOFT alone", ESP, keys + sa(0x3000) + out + lifetime(4, 0, 0, 9, 0)), ("of type 0", 0, keys + sa(0x3000) + out),
    ("of type 5", 5, keys + sa(0x3000) + out), ("of type 200", 200, keys + sa(0x3000) + out),
    ("with encryption 254", ESP, keys + sa(0x3000, encr=254) + out), ("with encryption 200", ESP, keys + sa(0x3000, encr=200) + out),
    ("with authentication 252", ESP, keys + sa(0x3000, auth=252) + out), ("with authentication 200", ESP, keys + sa(0x3000, auth=200) + out),
    ("with a key of 15 octets", ESP, key(9, 15) + key(8, 20) + sa(0x3000) + out), ("with a key of no bits", ESP, key(9, 0) + key(8, 20) + sa(0x3000) + out),
    ("with a key longer than its extension", ESP, key(9, 16, 999) + key(8, 20) + sa(0x3000) + out),
    ("in mode 9", ESP, keys + sa(0x3000) + out + sa2(9, 0)),
):
    step("ADD " + name, msg(ADD, satype, parts))

# DUMP, DELETE, FLUSH
step("DUMP", msg(DUMP, ESP))
step("DUMP of all", msg(DUMP, 0))
step("DUMP of AH", msg(DUMP, AH))
step("DUMP of type 5", msg(DUMP, 5))
def filter(src, sp, dst, dp, family=2):
    pad = lambda a: (socket.inet_aton(a) if "." in a else socket.inet_pton(socket.AF_INET6, a)).ljust(16, b"\0")
    return ext(26, pad(src) + pad(dst) + struct.pack("=HBB", family, sp, dp))
step("DUMP filtered", msg(DUMP, ESP, filter("0.0.0.0", 0, "192.0.2.99", 24)))
step("DUMP filtered by both", msg(DUMP, ESP, filter(PEER, 32, US, 32)))
step("DUMP filtered IPv6", msg(DUMP, ESP, filter("2001:db8::", 32, "::", 0, 10)))
step("DUMP filtered to nothing", msg(DUMP, ESP, filter("1.2.3.4", 32, "1.2.3.4", 32)))
step("DUMP filtered with prefix 129", msg(DUMP, ESP, filter("1.2.3.4", 129, "1.2.3.4", 32)))
# Linux keeps an SA of SPI 0 for 30 s after each of these: behind the dumps.
step("GETSPI taken", msg(GETSPI, ESP, pair, spirange(0x1000, 0x1000), sa2(TUNNEL, 7)))
step("GETSPI backwards", msg(GETSPI, ESP, pair, spirange(0x1001, 0x1000)))
step("GETSPI without addresses", msg(GETSPI, ESP, spirange(0x1000, 0x1000)))
step("GETSPI of type 0", msg(GETSPI, 0, pair, spirange(0x1001, 0x1001)))
step("GETSPI of type 5", msg(GETSPI, 5, pair, spirange(0x1001, 0x1001)))
step("DELETE", msg(DELETE, ESP, sa(0x1000), pair))
step("DELETE again", msg(DELETE, ESP, sa(0x1000), pair))
step("DELETE without SA", msg(DELETE, ESP, pair))
clean(msg(GETSPI, ESP, pair, spirange(0x1003, 0x1003)))
step("DELETE of a larval SA", msg(DELETE, ESP, sa(0x1003), pair))
step("FLUSH of AH", msg(FLUSH, AH))
step("FLUSH of type 5", msg(FLUSH, 5))

# What is not for clients
step("ACQUIRE with addresses", msg(ACQUIRE, ESP, out))
step("ACQUIRE failure of nothing", msg(ACQUIRE, ESP, err=110))
step("EXPIRE", msg(EXPIRE, ESP))
step("X_PCHANGE", msg(PCHANGE, ESP))
step("X_SPDACQUIRE", msg(SPDACQUIRE))
step("X_SPDEXPIRE", msg(SPDEXPIRE))
step("X_NAT_T_NEW_MAPPING", msg(MAPPING, ESP))
step("X_PROMISC 3", msg(PROMISC, 3))
step("X_PROMISC on", msg(PROMISC, 1))
step("GET, promiscuous", msg(GET, ESP, sa(0x9999), out))
step("X_PROMISC with more, promiscuous", msg(PROMISC, ESP, sa2(0, 5)))
other.send(msg(PROMISC, ESP, sa2(0, 6)))
step("X_PROMISC with more of another socket, promiscuous")
step("X_PROMISC off", msg(PROMISC, 0))
step("X_PROMISC with more", msg(PROMISC, ESP, sa2(0, 5)))

# Policies
sel = addr(5, "10.1.0.0", 255, 16) + addr(6, "10.2.0.0", 255, 16)
back = addr(5, "10.2.0.0", 255, 16) + addr(6, "10.1.0.0", 255, 16)
rev = request(src=PEER, dst=US)
step("SPDDUMP of nothing", msg(SPDDUMP))
r = step("SPDADD", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 1000, request()), sel, lifetime(3, 0, 0, 9999, 0)))
pol = [id for id, name in ids.items()][0]
step("SPDADD again", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 1000, request()), sel))
step("SPDADD in", msg(SPDADD, 0, policy(IPSEC, IN, 0, 1000, rev), back))
step("SPDADD fwd", msg(SPDADD, 0, policy(IPSEC, FWD, 0, 1000, rev), back))
step("SPDADD with host bits", msg(SPDADD, 0, policy(NONE, OUT, 0, 7), addr(5, "10.1.2.3", 6, 16, 80), addr(6, "10.2.0.0", 6, 16)))
step("SPDADD IPv6", msg(SPDADD, 0, policy(DISCARD, OUT, 0, 0), addr(5, "2001:db8:1::", 58, 48, 128), addr(6, "2001:db8:2::", 58, 48)))
step("SPDADD transport, use", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(mode=TRANSPORT, level=USE, reqid=0, src=None)), addr(5, US, 17), addr(6, PEER, 17)))
step("SPDADD transport, require", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(mode=TRANSPORT, level=REQUIRE, reqid=0, src=None)), addr(5, US, 6), addr(6, PEER, 6)))
step("SPDADD tunnel over IPv6", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(src=US6, dst=PEER6, level=REQUIRE, reqid=0)), addr(5, US, 132), addr(6, PEER, 132)))
step("SPDADD with protocol 0", msg(SPDADD, 0, policy(DISCARD, IN, 0, 5), addr(5, "10.9.0.0", 0, 16), addr(6, "10.8.0.0", 0, 16)))
step("SPDADD, stray octets", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(), bytes(8)), addr(5, "10.7.0.0", 255, 16), addr(6, "10.6.0.0", 255, 16)))
step("SPDADD require with reqid", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(level=REQUIRE, reqid=5)), addr(5, "10.20.0.0", 255, 16), addr(6, "10.21.0.0", 255, 16)))
step("SPDADD unique with reqid 0x5000", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(reqid=0x5000)), addr(5, "10.22.0.0", 255, 16), addr(6, "10.21.0.0", 255, 16)))
step("SPDADD unique without reqid", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(reqid=0)), addr(5, "10.23.0.0", 255, 16), addr(6, "10.21.0.0", 255, 16)))
step("SPDADD level default", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(level=0, reqid=0)), addr(5, "10.26.0.0", 255, 16), addr(6, "10.21.0.0", 255, 16)))
step("SPDADD without a request", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5), addr(5, "10.24.0.0", 255, 16), addr(6, "10.21.0.0", 255, 16)))
step("SPDADD in mode BEET", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, request(mode=3)), addr(5, "10.25.0.0", 255, 16), addr(6, "10.21.0.0", 255, 16)))
clean(*[msg(SPDDELETE, 0, policy(0, OUT), addr(5, "10.%d.0.0" % net, 255, 16), addr(6, "10.21.0.0", 255, 16)) for net in range(20, 27)])
bundle = lambda net, *reqs: msg(SPDADD, 0, policy(IPSEC, OUT, 0, 5, *reqs), addr(5, "10.%d.0.0" % net, 255, 16), addr(6, "10.31.0.0", 255, 16))
step("SPDADD ESP in AH", bundle(32, request(50, TRANSPORT, REQUIRE, 0, None), request(51, TRANSPORT, REQUIRE, 0, None)))
step("SPDADD IPComp in ESP", bundle(33, request(108, TUNNEL, REQUIRE, 0), request(50, TRANSPORT, REQUIRE, 0, None)))
step("SPDADD IPComp at level use in ESP", bundle(34, request(108, TRANSPORT, USE, 0, None), request(50, TUNNEL, REQUIRE, 0)))
step("SPDADD with two protocols", msg(SPDADD, 0, policy(NONE, OUT, 0, 5), addr(5, "10.35.0.0", 17, 16), addr(6, "10.31.0.0", 6, 16, 80)))
step("SPDADD ICMP", msg(SPDADD, 0, policy(NONE, OUT, 0, 5), addr(5, "10.36.0.0", 1, 16, 8), addr(6, "10.31.0.0", 1, 16)))
step("SPDADD of everything", msg(SPDADD, 0, policy(DISCARD, FWD, 0, 0xffffffff), addr(5, "0.0.0.0", 255, 0), addr(6, "0.0.0.0", 255, 0)))
step("SPDADD with prefix 33", msg(SPDADD, 0, policy(NONE, OUT), addr(5, PEER, 255, 33), addr(6, US)))
step("SPDADD with a life", msg(SPDADD, 0, policy(NONE, OUT, 0, 5), addr(5, "10.37.0.0", 255, 16), addr(6, "10.31.0.0", 255, 16), lifetime(3, 0, 0, 1, 0), lifetime(4)))
short = [i for i in ids][-1]
time.sleep(2.5)
step("SPDGET of what had a life", msg(SPDGET, 0, policy(0, OUT, short)))
step("SPDGET of id 7", msg(SPDGET, 0, policy(0, OUT, 7)))
step("SPDGET of id 0", msg(SPDGET, 0, policy(0, OUT, 0)))
clean(*[msg(SPDDELETE, 0, policy(0, OUT), addr(5, "10.%d.0.0" % net, p, 16, port), addr(6, "10.31.0.0", p, 16, q))
        for net, p, port, q in ((32, 255, 0, 0), (33, 255, 0, 0), (34, 255, 0, 0), (35, 6, 0, 80), (36, 1, 8, 0), (37, 255, 0, 0))],
      msg(SPDDELETE, 0, policy(0, FWD), addr(5, "0.0.0.0", 255, 0), addr(6, "0.0.0.0", 255, 0)))
step("SPDUPDATE", msg(SPDUPDATE, 0, sa2(TUNNEL, 9), policy(IPSEC, OUT, 0, 2000, request(reqid=9)), sel))
step("SPDUPDATE of nothing", msg(SPDUPDATE, 0, policy(NONE, OUT, 0, 1), addr(5, "10.5.0.0", 255, 16), addr(6, "10.4.0.0", 255, 16)))
step("SPDSETIDX", msg(SPDSETIDX, 0, policy(NONE, OUT, 0, 1), addr(5, "10.3.0.0", 255, 16), addr(6, "10.4.0.0", 255, 16)))
step("SPDGET", msg(SPDGET, 0, policy(0, OUT, pol)))
step("SPDGET in another direction", msg(SPDGET, 0, policy(0, IN, pol), back))
step("SPDGET of nothing", msg(SPDGET, 0, policy(0, OUT, 0x7ffffff1)))
step("SPDGET without policy", msg(SPDGET))
step("SPDDUMP", msg(SPDDUMP))
step("SPDDELETE", msg(SPDDELETE, 0, policy(0, OUT), sel))
step("SPDDELETE again", msg(SPDDELETE, 0, policy(0, OUT), sel))
step("SPDDELETE without addresses", msg(SPDDELETE, 0, policy(0, OUT)))
step("SPDDELETE without direction", msg(SPDDELETE, 0, policy(0, 0), back))
pol = list(ids)[1]
step("SPDDELETE2", msg(SPDDELETE2, 0, policy(0, IN, pol)))
step("SPDDELETE2 again", msg(SPDDELETE2, 0, policy(0, IN, pol)))
for name, p in (
    ("type 3", policy(3, OUT)), ("type 4", policy(4, OUT)), ("direction 0", policy(NONE, 0)), ("direction 4", policy(NONE, 4)),
    ("mode 0", policy(IPSEC, OUT, 0, 0, request(mode=0))), ("mode 9", policy(IPSEC, OUT, 0, 0, request(mode=9))),
    ("protocol 6", policy(IPSEC, OUT, 0, 0, request(proto=6))), ("a request of length 0", policy(IPSEC, OUT, 0, 0, request(len=0))),
    ("a request of 8 octets", policy(IPSEC, OUT, 0, 0, request(len=8))), ("a request past the end", policy(IPSEC, OUT, 0, 0, request(len=64))),
    ("a tunnel to nowhere", policy(IPSEC, OUT, 0, 0, request(src=None))), ("a tunnel at level use", policy(IPSEC, OUT, 0, 0, request(level=USE))),
    ("seven requests", policy(IPSEC, OUT, 0, 0, *[request(mode=TRANSPORT, src=None)] * 7)),
):
    step("SPDADD with " + name, msg(SPDADD, 0, p, addr(5, "10.11.0.0", 255, 16), addr(6, "10.12.0.0", 255, 16)))
step("SPDADD without policy", msg(SPDADD, 0, sel))
step("SPDADD without source", msg(SPDADD, 0, policy(NONE, OUT), addr(6, PEER)))
step("SPDADD of two families", msg(SPDADD, 0, policy(NONE, OUT), addr(5, US6), addr(6, PEER)))

# MIGRATE
clean(*[msg(DELETE, ESP, sa(spi), out) for spi in (0x2004, 0x2005)])
step("SPDADD to migrate", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 1000, request()), sel))
step("MIGRATE of nothing", msg(MIGRATE, 0, policy(IPSEC, IN, 0, 0, request(), request(dst=OTHER)), sel))
step("MIGRATE of another reqid", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request(reqid=8), request(reqid=8, dst=OTHER)), sel))
step("MIGRATE of another place", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request(src=OTHER), request(dst=OTHER)), sel))
step("MIGRATE of half a pair", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request()), sel))
step("MIGRATE of a false pair", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request(), request(dst=OTHER, reqid=8)), sel))
step("MIGRATE to 0.0.0.0", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request(), request(dst="0.0.0.0")), sel))
step("MIGRATE without policy", msg(MIGRATE, 0, sel))
step("MIGRATE without addresses", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request(), request(dst=OTHER))))
step("MIGRATE", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request(), request(dst=OTHER)), sel))
km = ext(25, bytes(4) + sockaddr(US) + sockaddr(OTHER))
step("MIGRATE with KMADDRESS", msg(MIGRATE, 0, km, policy(IPSEC, OUT, 0, 0, request(dst=OTHER), request(dst=PEER)), sel))
step("MIGRATE back", msg(MIGRATE, 0, policy(IPSEC, OUT, 0, 0, request(), request(dst=OTHER)), sel))
step("SPDGET of what migrated", msg(SPDGET, 0, policy(0, OUT, [id for id in ids][-1])))
step("GET of what migrated", msg(GET, ESP, sa(0x2000), addr(5, US), addr(6, OTHER)))
step("GET at the old place", msg(GET, ESP, sa(0x2000), out))

# Traffic that wants an SA: the route of 10.99.0.0/16 leads to the policies.
step("SPDADD for traffic", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 10, request(level=REQUIRE, reqid=0)), addr(5, "0.0.0.0", 255, 0), addr(6, "10.99.0.0", 255, 16)))
step("SPDADD for traffic, unique", msg(SPDADD, 0, policy(IPSEC, OUT, 0, 9, request(reqid=77, dst=OTHER)), addr(5, "0.0.0.0", 17, 0), addr(6, "10.99.1.0", 17, 24, 9)))
traffic = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def packet(dst):
    try:
        traffic.sendto(b"x", (dst, 9))
    except OSError:
        pass # what there is no SA for yet
packet("10.99.0.1")
step("ACQUIRE", wait=(5, 1))
packet("10.99.0.2")
step("ACQUIRE of the same SA", wait=(1, 1))
packet("10.99.1.1")
step("ACQUIRE, unique", wait=(5, 1))
step("GETSPI to be forgotten", msg(GETSPI, ESP, pair, spirange(0x5000, 0x5000), sa2(TUNNEL, 7)))
step("EXPIRE of a larval SA and of two ACQUIREs", wait=(40, 3))
step("GET of what was forgotten", msg(GET, ESP, sa(0x5000), pair))

# The end
step("SPDFLUSH", msg(SPDFLUSH))
step("SPDFLUSH of nothing", msg(SPDFLUSH))
step("FLUSH", msg(FLUSH))
step("FLUSH of nothing", msg(FLUSH))
