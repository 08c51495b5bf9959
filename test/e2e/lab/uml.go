package lab

import (
	_ "embed"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

//go:embed uml-init.sh
var umlInit string

// Linux is a Linux kernel of its own, run as a process (user-mode Linux): an
// IPsec peer that owes us nothing, with XFRM, ESP and AH of both IP versions
// and the algorithms of RFC 8221. Its files are those of the machine, read only.
type Linux struct {
	h   *Host
	p   *Proc
	in  io.WriteCloser
	dir string
	n   int
}

// Ethernet of a Linux peer inside; outside it is the TAP it was booted with.
const umlIf = "vec0"

// BootLinux boots a Linux peer whose Ethernet is joined to the new TAP device
// tap of h, which is h's end of the cable and gets its addresses as any interface
// does. The peer's interface vec0 is up with addrs.
func BootLinux(h *Host, tap string, addrs ...string) *Linux {
	t := h.t
	t.Helper()
	dir := filepath.Join(h.Dir, "uml-"+tap)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatalf("%v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "init"), []byte(strings.ReplaceAll(umlInit, "@DIR@", dir)), 0o755); err != nil {
		t.Fatalf("%v", err)
	}
	h.Must("ip", "tuntap", "add", "dev", tap, "mode", "tap")
	h.Must("ip", "link", "set", tap, "up")

	// The console's input is a FIFO that we hold open, so that it has no end.
	fifo := filepath.Join(dir, "console")
	must(t, "mkfifo", fifo)
	in, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { in.Close() })
	l := &Linux{h: h, in: in, dir: dir}
	l.p = h.Start("sh", "-c", `exec /usr/bin/linux.uml mem=192M root=/dev/root rootfstype=hostfs ro quiet "$@" <"$0"`, fifo,
		"init="+filepath.Join(dir, "init"), "vec0:transport=tap,ifname="+tap+",depth=64", "con=null", "con0=fd:0,fd:1")
	l.boot(addrs)
	h.Start("/usr/bin/python3", "-c", stir, tap)
	return l
}

// stir sends an ARP request that concerns nobody every 20 ms. User-mode Linux now and
// then overlooks that a frame has come until the next one does, which for the last of a
// row of pings is never: of 1800 answers, each on the TAP within 7 ms of its request, 5
// were seen inside 40 ms later, with the following one.
const stir = `
import socket, sys, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind((sys.argv[1], 0))
mac = s.getsockname()[4]
arp = bytes.fromhex("0001080006040001") + mac + bytes(10) + bytes([192, 0, 2, 1])
while True:
    time.sleep(0.02)
    try:
        s.send(b"\xff" * 6 + mac + b"\x08\x06" + arp)
    except OSError:
        pass
`

func (l *Linux) boot(addrs []string) *Linux {
	t := l.h.t
	t.Helper()
	l.p.Says("lab: ready", 2*time.Minute)
	if out := l.p.Output(); strings.Contains(out, "lab: cannot") {
		t.Fatalf("%s", out)
	}
	for _, a := range addrs {
		l.Sh("ip addr add " + a + " dev " + umlIf)
	}
	l.Sh("ip link set " + umlIf + " up")
	return l
}

// Run has the peer run a shell script and returns how it went.
func (l *Linux) Run(script string) Result {
	t := l.h.t
	t.Helper()
	l.n++
	id := strconv.Itoa(l.n)
	if err := os.WriteFile(filepath.Join(l.dir, "cmd."+id), []byte(script+"\n"), 0o644); err != nil {
		t.Fatalf("%v", err)
	}
	if _, err := io.WriteString(l.in, id+"\n"); err != nil {
		t.Fatalf("console: %v", err)
	}
	var code string
	Until(t, timeLimit, "Linux peer to run "+script, func() (bool, string) {
		b, err := os.ReadFile(filepath.Join(l.dir, "rc."+id))
		code = strings.TrimSpace(string(b))
		if l.p.Ended() {
			t.Fatalf("the Linux peer died:\n%s", tail(l.p.Output(), 30))
		}
		return err == nil && code != "", tail(l.p.Output(), 10)
	})
	out, err := os.ReadFile(filepath.Join(l.dir, "out."+id))
	if err != nil {
		t.Fatalf("%v", err)
	}
	r := Result{Cmd: script, Out: string(out)}
	if r.Code, err = strconv.Atoi(code); err != nil {
		t.Fatalf("exit status %q of the Linux peer: %v", code, err)
	}
	return r
}

// Sh is Run for a script that must succeed; it ends at the first failure.
func (l *Linux) Sh(script string) string {
	l.h.t.Helper()
	r := l.Run("set -e\n" + script)
	if r.Code != 0 {
		l.h.t.Fatalf("Linux peer: %v", r)
	}
	return r.Out
}

// Stop powers the peer off.
func (l *Linux) Stop() {
	l.h.t.Helper()
	io.WriteString(l.in, "quit\n")
	l.p.Wait(30 * time.Second)
}

// XfrmStat returns a counter of /proc/net/xfrm_stat, such as XfrmInNoStates.
func (l *Linux) XfrmStat(name string) int {
	l.h.t.Helper()
	for _, line := range strings.Split(l.Sh("cat /proc/net/xfrm_stat"), "\n") {
		if f := strings.Fields(line); len(f) == 2 && f[0] == name {
			n, _ := strconv.Atoi(f[1])
			return n
		}
	}
	l.h.t.Fatalf("no counter %s", name)
	return 0
}

// XfrmSA is an SA for `ip xfrm state add`.
type XfrmSA struct {
	Src, Dst string
	SPI      uint32
	Mode     string // transport, tunnel
	Algo     string // "enc 'cbc(aes)' 0x… auth-trunc 'hmac(sha1)' 0x… 96"
	More     string // "replay-window 64 flag esn", "encap espinudp 4500 4500 0.0.0.0"
}

// AddSA installs an SA.
func (l *Linux) AddSA(s XfrmSA) {
	l.h.t.Helper()
	l.Sh(fmt.Sprintf("ip xfrm state add src %s dst %s proto esp spi 0x%x mode %s reqid 1 %s %s", s.Src, s.Dst, s.SPI, s.Mode, s.Algo, s.More))
}

// AddPolicy installs a policy: dir out or in, selectors, and the template's
// mode and end points.
func (l *Linux) AddPolicy(dir, selSrc, selDst, sel, mode, src, dst string) {
	l.h.t.Helper()
	l.Sh(fmt.Sprintf("ip xfrm policy add src %s dst %s %s dir %s priority 100 tmpl src %s dst %s proto esp reqid 1 mode %s", selSrc, selDst, sel, dir, src, dst, mode))
}

// HaveUML tells whether the package user-mode-linux is installed.
func HaveUML() bool {
	_, err := exec.LookPath("/usr/bin/linux.uml")
	return err == nil
}
