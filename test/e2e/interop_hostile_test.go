package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// hostile sends what argv[2] says, argv[3] times, to argv[1]: "odd", all kinds of
// malformed messages in the name of the peer; "peer" and "far", good IKE_SA_INIT
// in its name and in those of hosts without number; "none", ones that no rule accepts.
const hostile = `
import os, random, socket, struct, sys
random.seed(7)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
DST = sys.argv[1]
def udp(src, sport, dport, data):
    u = struct.pack(">HHHH", sport, dport, 8 + len(data), 0) + data
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(u), random.getrandbits(16), 0, 64, 17, 0, socket.inet_aton(src), socket.inet_aton(DST))
    if len(ip + u) > 65535: return
    for i in range(20):
        try:
            raw.sendto(ip + u, (DST, 0)); return
        except OSError: pass
def hdr(ispi, rspi, nxt, ver, exch, flags, mid, length):
    return struct.pack(">QQBBBBII", ispi, rspi, nxt, ver, exch, flags, mid, length)
def pl(nxt, body): return struct.pack(">BBH", nxt, 0, 4 + len(body)) + body
def tr(last, typ, tid, key=0):
    a = struct.pack(">HH", 0x800e, key) if key else b""
    return struct.pack(">BBHBBH", 0 if last else 3, 0, 8 + len(a), typ, 0, tid) + a
def init(ispi, ke=31, rspi=0, ver=0x20, flags=8, mid=0, exch=34, extra=b"", trs=None):
    t = trs or [tr(0, 1, 20, 256), tr(0, 2, 5), tr(1, 4, ke)]
    prop = struct.pack(">BBHBBBB", 0, 0, 8 + sum(map(len, t)), 1, 1, 0, len(t)) + b"".join(t)
    body = pl(34, prop) + pl(40, struct.pack(">HH", ke, 0) + os.urandom(32)) + pl(0, os.urandom(32)) + extra
    return hdr(ispi, rspi, 33, ver, exch, flags, mid, 28 + len(body)) + body
def spi(): return random.getrandbits(64) | 1
what = sys.argv[2]
n = int(sys.argv[3])
def src(i):
    if what == "peer": return "192.168.3.119"
    return "172.%d.%d.%d" % (16 + i % 16, i // 16 % 256, i // 4096 % 256 + 1)
if what in ("peer", "far"):
    for i in range(n): udp(src(i), 500 + i // 100, 500, init(spi()))
elif what == "none":
    for i in range(n): udp("192.168.3.119", 500, 500, init(spi(), trs=[tr(0, 1, 3), tr(0, 2, 1), tr(0, 3, 1), tr(1, 4, 1)]))
else:
    m = init(spi())
    ms = []
    for cut in range(len(m)): ms.append(m[:cut])
    for l in (0, 1, 27, 28, 29, len(m) - 1, len(m) + 1, 0xffff, 0xffffffff, 0x80000000): ms.append(m[:24] + struct.pack(">I", l) + m[28:])
    for v in (0x00, 0x10, 0x11, 0x21, 0x2f, 0x30, 0x40, 0xff): ms.append(m[:17] + bytes([v]) + m[18:])
    ms += [init(0), init(0, rspi=0, flags=0x28), init(spi(), rspi=spi()), init(spi(), flags=0x20), init(spi(), flags=0x28, rspi=spi()), init(spi(), flags=0), init(spi(), mid=7), init(spi(), mid=0xffffffff)]
    for x in range(256): ms.append(init(spi(), exch=x)); ms.append(init(spi(), rspi=spi(), exch=x))
    # lies in each length field, each octet
    for i in range(16, len(m)):
        for b in (0, 1, 0x7f, 0x80, 0xff): ms.append(m[:i] + bytes([b]) + m[i+1:])
    # critical unknown payload, additional key exchanges, unknown transform types, no transforms, 255 transforms
    ms.append(hdr(spi(), 0, 200, 0x20, 34, 8, 0, 36) + struct.pack(">BBH", 0, 0x80, 8) + b"abcd")
    for t in (6, 7, 12, 13, 99, 255): ms.append(init(spi(), trs=[tr(0, 1, 20, 256), tr(0, 2, 5), tr(0, t, 36), tr(1, 4, 31)]))
    ms.append(init(spi(), trs=[tr(0, 1, 20, 256)] * 254 + [tr(1, 4, 31)]))
    for g in (0, 1, 2, 99, 36, 65535): ms.append(init(spi(), ke=g))
    sk = lambda ln, a, b: hdr(a, b, 46, 0x20, 37, 8, 0, 28 + 4 + ln) + pl(0, os.urandom(ln))
    for ln in list(range(0, 80)) + [1000, 30000]: ms.append(sk(ln, spi(), spi()))
    for k in range(n):
        for x in ms:
            udp("192.168.3.119", random.choice((500, 4500, 1234)), 500, x)
            udp("192.168.3.119", random.choice((500, 4500, 1234)), 4500, b"\0\0\0\0" + x)
            if k == 0: udp("192.168.3.%d" % random.randint(1, 110), 500, 500, x)
        for ln in range(0, 60): udp("192.168.3.119", 500, 500, os.urandom(ln)); udp("192.168.3.119", 4500, 4500, b"\0\0\0\0" + os.urandom(ln)); udp("192.168.3.119", 4500, 4500, os.urandom(ln))
`

// ike under floods and under all kinds of malformed messages: what is there goes
// on, the peer in whose name they come still gets through, and neither memory nor
// log grow with them.
func TestInteropHostile(t *testing.T) {
	d := newDuo(t, "")
	d.startIKE("rule \"t\" { auth_method preshared remote_addr any remote_id IP=0.0.0.0/0 }\n", lab.PSK)
	d.peer("", "")
	d.up()
	d.pings("before")
	memory := func() (kib int) {
		t.Helper()
		if _, err := fmt.Sscan(d.a.Sh("awk '/VmRSS/ { print $2 }' /proc/$(pidof ike)/status"), &kib); err != nil {
			t.Fatalf("%v", err)
		}
		return kib
	}
	was, mark := memory(), len(d.a.IKE.Output())
	for _, flood := range []string{"odd 2", "none 10000", "peer 10000", "far 10000"} {
		p := d.a.Start(lab.PingArgs(100, 10*time.Millisecond, 5*time.Second, "10.2.0.1")...)
		d.b.Python(hostile, append([]string{"192.168.3.118"}, strings.Fields(flood)...)...)
		p.Wait(30 * time.Second)
		// A socket's buffer may overflow while missiu is kept from its processor.
		if got := lab.Answered(p.Output(), 100); got < 95 {
			t.Errorf("%s: SA under flood: %d of 100 pings answered", flood, got)
		}
		d.down()
		d.up() // from nothing, at once, with the half-open ones still there
		d.pings(flood)
	}
	if now := memory(); now > was+16<<10 {
		t.Errorf("ike grew from %d to %d KiB", was, now)
	}
	if n := strings.Count(d.a.IKE.Output()[mark:], "\n"); n > 2000 {
		t.Errorf("%d lines of log", n)
	}
}

// ike-scan gets an answer to IKEv2 and none to IKEv1. It offers SHA-1 and MD5 alone, which
// we take only where a rule names them.
func TestInteropScan(t *testing.T) {
	d := newDuo(t, "")
	const rule, old = "rule \"t\" { auth_method preshared remote_addr any remote_id IP=0.0.0.0/0 %s }\n", "ikesa_xform { encr_alg aes auth_alg sha1 dh_group 14 }"
	xform := "none"
	const none = "0 returned handshake; 0 returned notify"
	for _, tt := range []struct{ xform, options, want string }{
		{"", "--ikev2", "NO_PROPOSAL_CHOSEN"},
		{old, "--ikev2", "INVALID_KE_PAYLOAD"},
		{old, "--ikev2 --dhgroup=14", "1 returned handshake"},
		{old, "", none},
		{old, "--aggressive --id=x", none},
	} {
		if tt.xform != xform {
			xform = tt.xform
			d.startIKE(fmt.Sprintf(rule, xform), lab.PSK)
		}
		wait := "--timeout=30000" // until the answer
		if tt.want == none {
			wait = "--timeout=300"
		}
		out := d.b.Must(append(append([]string{"ike-scan", "--sport=0", "--retry=1", wait}, strings.Fields(tt.options)...), "192.168.3.118")...)
		if !strings.Contains(out, tt.want) {
			t.Errorf("ike-scan %s: got %s, want %s", tt.options, out, tt.want)
		}
	}
}
