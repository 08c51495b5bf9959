package e2e

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// What programs may expect of a PF_KEY socket, by a program that knows nothing
// of missiu. Each line it prints is a check that failed.
const preloadChecks = `
import errno, fcntl, os, select, socket, struct, subprocess, sys, threading

PF_KEY, V2 = 15, 2
FLAGS = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK

def check(what, got, want):
    if got != want:
        print("%s: got %r, want %r" % (what, got, want))

def failing(f, *a):
    try:
        f(*a)
    except OSError as e:
        return errno.errorcode[e.errno]
    return "success"

def msg(type, satype=0, seq=1, body=b"", err=0, pid=None, **kw):
    return struct.pack("=BBBBHHII", kw.get("version", 2), type, err, satype,
        kw.get("len", 2 + len(body) // 8), kw.get("reserved", 0), seq, os.getpid() if pid is None else pid) + body

def head(b):
    return struct.unpack("=BBBBHHII", b[:16])

GETSPI, ADD, ACQUIRE, REGISTER, FLUSH, DUMP = 1, 3, 6, 7, 9, 10
ESP = 3

def addr(ext, a):
    return struct.pack("=HHBBHHH4s8x", 3, ext, 0, 32, 0, 2, 0, socket.inet_aton(a))

def getspi(seq, dst="192.168.3.118"):
    return msg(GETSPI, ESP, seq, addr(5, "192.168.3.119") + addr(6, dst))

# The socket itself.
check("type DGRAM", failing(socket.socket, PF_KEY, socket.SOCK_DGRAM, V2), "ESOCKTNOSUPPORT")
check("protocol 1", failing(socket.socket, PF_KEY, socket.SOCK_RAW, 1), "EPROTONOSUPPORT")
libc = __import__("ctypes").CDLL(None, use_errno=True)
def raw(type):
    fd = libc.socket(PF_KEY, type, V2)
    if fd < 0:
        print("socket: ", os.strerror(__import__("ctypes").get_errno()))
        sys.exit()
    return fd
for type, cloexec, nonblock in ((0, 0, 0), (socket.SOCK_CLOEXEC, 1, 0), (socket.SOCK_NONBLOCK, 0, 1), (FLAGS, 1, 1)):
    fd = raw(socket.SOCK_RAW | type)
    check("FD_CLOEXEC", fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC, cloexec)
    check("O_NONBLOCK", bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK), bool(nonblock))
    os.close(fd)
for var, want in (("/run/missiu/none.pfkey", "EAFNOSUPPORT"), ("@nobody", "EAFNOSUPPORT"), ("/run/missiu/eth0.pfkey", "success")):
    os.environ["MISSIU_PFKEY"] = var
    check("MISSIU_PFKEY=" + var, failing(socket.socket, PF_KEY, socket.SOCK_RAW, V2), want)
del os.environ["MISSIU_PFKEY"]

# The answer is there when the call returns, though nothing blocks, with every
# call and behind messages that nobody has read.
s = socket.socket(PF_KEY, socket.SOCK_RAW | FLAGS, V2)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
other = socket.socket(PF_KEY, socket.SOCK_RAW | FLAGS, V2)
send = (s.send, lambda b: libc.sendto(s.fileno(), b, len(b), 0, None, 0), lambda b: s.sendmsg([b[:7], b[7:20], b[20:]]),
    lambda b: os.write(s.fileno(), b), lambda b: os.writev(s.fileno(), [b[:16], b[16:]]))
late = 0
for i in range(500):
    b = getspi(i + 1)
    check("octets sent", send[i % len(send)](b), len(b))
    try:
        got = s.recv(65536)
    except BlockingIOError: # missiu was kept from its processor for ANSWER_MS
        late += 1
        select.select([s], [], [], 20)
        got = s.recv(65536)
    check("answer", head(got)[1:3] + head(got)[6:], (GETSPI, 0, i + 1, os.getpid()))
check("nearly all answers are there at once", late < 5, True)
s.send(msg(REGISTER, ESP, 5))
check("REGISTER", head(s.recv(65536))[6], 5)
for i in range(50):
    other.send(msg(REGISTER, 2 if i % 2 else ESP, 1000 + i)) # s hears of two of them
    s.send(getspi(2000 + i))
seen = [head(s.recv(65536)) for _ in range(52)]
check("answers in order among copies", [h[6] for h in seen if h[1] == GETSPI], list(range(2000, 2050)))
check("nothing more", failing(s.recv, 65536), "EAGAIN")
# A seq that is used again is an answer of its own.
for i in range(3):
    s.send(msg(FLUSH, 9, 0))
check("FLUSH with seq 0 three times", [head(s.recv(65536))[1] for _ in range(3)], [FLUSH] * 3)
# The report of a failed ACQUIRE has none, and that takes no time.
start = __import__("time").monotonic()
for i in range(20):
    s.send(msg(ACQUIRE, ESP, 77 + i, err=110))
check("ACQUIRE reports are quick", __import__("time").monotonic() - start < 4, True) # 5 s by ANSWER_MS

# Peeking at a header and then reading what it says.
s.send(getspi(42))
h = head(s.recv(16, socket.MSG_PEEK))
check("peeked", h[1:3] + h[6:7], (GETSPI, 0, 42))
check("rest", len(s.recv(h[4] * 8)), h[4] * 8)
check("nothing behind it", failing(s.recv, 16), "EAGAIN")
# A dump is numbered by itself and paced.
s.send(msg(DUMP, 0, 9))
seqs = [head(s.recv(65536))[6]]
s.setblocking(True)
while seqs[-1] != 0:
    seqs.append(head(s.recv(65536))[6])
check("dump is numbered", (len(seqs), seqs[:-1] == list(range(1, 551)), seqs[-1]), (551, True, 0))
s.setblocking(False)

# Headers that Linux refuses at once.
for what, b, want in (("short", b"\2" * 15, "EMSGSIZE"), ("empty", b"", "EMSGSIZE"), ("version", msg(FLUSH, version=1), "EINVAL"),
        ("reserved", msg(FLUSH, reserved=1), "EINVAL"), ("type 0", msg(0), "EINVAL"), ("type 25", msg(25), "EINVAL"),
        ("private type", msg(227), "EINVAL"), ("length", msg(FLUSH, len=3), "EMSGSIZE")):
    check(what, failing(s.send, b), want)
check("no answer to those", failing(s.recv, 16), "EAGAIN")

# In another process, and passed to another one after chroot.
r, w = os.pipe()
if os.fork() == 0:
    os.chroot("/proc")
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    s.send(getspi(4711))
    os.write(w, b"%d" % head(s.recv(65536))[6])
    os._exit(0)
os.wait()
check("after fork, chroot and setuid", os.read(r, 100), b"4711")
x, y = socket.socketpair()
if os.fork() == 0:
    socket.send_fds(x, [b"x"], [raw(socket.SOCK_RAW | FLAGS)])
    os._exit(0)
os.wait()
fd = socket.recv_fds(y, 1, 1)[1][0]
os.write(fd, getspi(4712))
check("passed", head(os.read(fd, 65536))[6], 4712)

# Policies of sockets.
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
def policy(type):
    return struct.pack("=HHHBBII", 2, 18, type, 2, 0, 0, 0)
def xfrm(action, more=b""):
    b = bytearray(168)
    b[161] = action
    return bytes(b) + more
for sock, level, ipsec, xf in ((u, 0, 16, 17), (u6, 41, 34, 35)):
    check("bypass", failing(sock.setsockopt, level, ipsec, policy(4)), "success")
    check("none", failing(sock.setsockopt, level, ipsec, policy(1)), "success")
    check("require", failing(sock.setsockopt, level, ipsec, policy(2)), "ENOTSUP")
    check("discard", failing(sock.setsockopt, level, ipsec, policy(0)), "ENOTSUP")
    check("xfrm allow", failing(sock.setsockopt, level, xf, xfrm(0)), "success")
    check("xfrm block", failing(sock.setsockopt, level, xf, xfrm(1)), "ENOTSUP")
    check("xfrm template", failing(sock.setsockopt, level, xf, xfrm(0, bytes(64))), "ENOTSUP")
check("other option", failing(u.setsockopt, 0, socket.IP_TTL, 7), "success")
check("UDP_ENCAP", failing(u.setsockopt, 17, 100, 2), "ENOPROTOOPT")
check("port 4500", failing(u.bind, ("", 4500)), "EADDRINUSE")
check("port 500", failing(u.bind, ("", 500)), "success")

# Two threads on one descriptor: a send waits too long at most.
s.setblocking(True)
def reader():
    for i in range(20):
        s.recv(65536)
t = threading.Thread(target=reader)
t.start()
start = __import__("time").monotonic()
for i in range(20):
    s.send(getspi(9000 + i))
t.join(10)
check("reader has all", t.is_alive(), False)

# The end of missiu is the end of the file.
print("ready")
sys.stdout.flush()
sys.stdin.readline()
check("end of file", s.recv(100), b"")
check("send after it", failing(s.send, getspi(1)), "EPIPE")
check("socket without missiu", failing(socket.socket, PF_KEY, socket.SOCK_RAW, V2), "EAFNOSUPPORT")
print("done")
`

func TestPreload(t *testing.T) {
	lab.NeedRoot(t)
	so := preload(t)
	a, _ := lab.Pair(t)
	a.StartMissiu()
	a.WriteFile("checks.py", preloadChecks, 0o644)
	a.Must("mkfifo", "go")
	p := a.Start("sh", "-c", "LD_PRELOAD="+so+" /usr/bin/python3 checks.py <>go")
	p.Says("ready", 60*time.Second)
	a.StopMissiu()
	a.Sh("echo >go")
	p.Says("done", 20*time.Second)
	p.Wait(10 * time.Second)
	for _, line := range strings.Split(strings.TrimSpace(p.Output()), "\n") {
		switch {
		case line == "ready", line == "done":
		case strings.HasPrefix(line, "pfkey-preload: missiu has no IPsec policies of single sockets"),
			strings.HasPrefix(line, "pfkey-preload: ESP in UDP is missiu's"),
			strings.HasPrefix(line, "pfkey-preload: UDP port 4500 is missiu's"):
		default:
			t.Error(line)
		}
	}
	if !strings.Contains(p.Output(), "port 4500") {
		t.Errorf("not a word about port 4500:\n%s", p.Output())
	}
}

// Two instances: the program has to choose.
func TestPreloadSeveralInstances(t *testing.T) {
	lab.NeedRoot(t)
	so := preload(t)
	a, b := lab.Pair(t)
	lab.Link(t, a.Host, b.Host, "eth1", prefixes("192.168.4.118/24"), prefixes("192.168.4.119/24"))
	a.StartMissiu()
	a.Do("./missiu -i eth1 startRaw")
	a.Must("install", "-m", "755", so, "/run/preload.so") // where every user can read it
	open := "LD_PRELOAD=/run/preload.so /usr/bin/python3 -c 'import socket; socket.socket(15, 3, 2)'"
	if r := a.Run("bash", "-c", open); !strings.Contains(r.Err, "several instances of missiu run") || !strings.Contains(r.Err, "Errno 97") {
		t.Errorf("%v", r)
	}
	for _, ifname := range []string{"eth0", "eth1"} {
		r := a.Run("bash", "-c", "MISSIU_PFKEY=/run/missiu/"+ifname+".pfkey setpriv --reuid 65534 --clear-groups env "+open)
		if !strings.Contains(r.Err, "Errno 13") {
			t.Errorf("socket() of a user without the right: got %v, want EACCES", r)
		}
		a.Must("bash", "-c", "MISSIU_PFKEY=/run/missiu/"+ifname+".pfkey "+open)
	}
}

// The second name of the socket serves a program that does not see /run/missiu,
// lets in whom the file lets in, and is not taken for missiu's when it is not.
func TestPreloadAbstract(t *testing.T) {
	lab.NeedRoot(t)
	so := preload(t)
	a, _ := lab.Pair(t)
	a.StartMissiu("--abstract @missiu-eth0")
	a.Must("install", "-m", "755", so, "/run/preload.so")
	register := "LD_PRELOAD=/run/preload.so MISSIU_PFKEY=@missiu-eth0 /usr/bin/python3 -c '" + `import os, socket, struct
s = socket.socket(15, 3, 2)
s.send(struct.pack("=BBBBHHII", 2, 7, 0, 3, 2, 0, 9, os.getpid()))
print(s.recv(9999)[:4])'`
	hidden := "unshare -m sh -c 'mount -t tmpfs none /run/missiu && exec sh reg.sh'"
	a.WriteFile("reg.sh", register+"\n", 0o755)
	const answer = `b'\x02\x07\x00\x03'`
	if got := a.Sh(hidden); !strings.Contains(got, answer) {
		t.Errorf("without /run/missiu: %s, want %s", got, answer)
	}
	// Another user is not let in: the connection is closed unread.
	nobody := "setpriv --reuid 65534 --clear-groups env "
	if r := a.Run("bash", "-c", nobody+"sh reg.sh"); r.Err == "" || strings.Contains(r.Out, answer) {
		t.Errorf("another user: %v", r)
	}
	if n := a.Status().Counters["pfkey_refused"]; n == 0 {
		t.Error("status does not count who was refused")
	}
	a.Sh("ip link add name veth9 type veth peer name veth8 && ip link set veth9 up")
	if r := a.Try("./missiu -i veth9 --abstract @missiu-eth0 startRaw"); !strings.Contains(r.Err, "address already in use") {
		t.Errorf("a second instance of the name: %v", r)
	}
	a.StopMissiu()
	// Now the name is free for anybody.
	p := a.Start("setpriv", "--reuid", "65534", "--clear-groups", "/usr/bin/python3", "-u", "-c", `import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.bind("\0missiu-eth0"); s.listen(); print("ready")
while True: print("heard", s.accept()[0].recv(999))`)
	p.Says("ready", 20*time.Second)
	if r := a.Run("bash", "-c", "sh reg.sh"); !strings.Contains(r.Err, "Errno 13") {
		t.Errorf("a name that another user took: %v, want EACCES", r)
	}
	p.Says("heard b''", 10*time.Second)
}

// haveProgram skips a test without a program of others.
func haveProgram(t *testing.T, path, pkg string) {
	t.Helper()
	if _, err := exec.LookPath(path); err != nil {
		t.Skip("package " + pkg + " is not installed")
	}
}
