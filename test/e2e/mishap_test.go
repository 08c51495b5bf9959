package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Starts and stops that cross each other: one instance at most, a clear word to
// the others, and nothing left in the end.
func TestCrossingStarts(t *testing.T) {
	lab.NeedRoot(t)
	a, _ := lab.Pair(t)
	before := a.Snapshot()
	for range 5 {
		r := a.Try("{ ./missiu -i eth0 startRaw & ./missiu -i eth0 startRaw & ./missiu -i eth0 start & wait; } 2>&1")
		if n, m := strings.Count(r.Out, "ready, pid"), strings.Count(r.Out, "already running with pid"); n != 1 || m != 2 {
			t.Errorf("%v\nwant one ready and two refused", r)
		}
		a.StopMissiu()
	}
	for i := range 6 {
		r := a.Try(fmt.Sprintf("{ ./missiu -i eth0 startRaw & sleep 0.0%02d; ./missiu -i eth0 stop; wait; ./missiu -i eth0 stop; } 2>&1", 3+5*i))
		if !strings.Contains(r.Out, "no missiu is running") {
			t.Errorf("%v\nwant the second stop to find nothing", r)
		}
	}
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}

// In the foreground, as a service manager starts it: no environment, no
// standard input, told when ready and not before.
func TestForeground(t *testing.T) {
	lab.NeedRoot(t)
	a, _ := lab.Pair(t)
	before := a.Snapshot()
	note := a.Start("/usr/bin/python3", "-uc", `
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind("note")
print("bound")
while True: print(s.recv(100).decode())`)
	note.Says("bound", 10*time.Second)
	env := "exec env -i NOTIFY_SOCKET=" + a.Dir + "/note " + a.Dir + "/bin/missiu --foreground -i "
	if r := a.Run("sh", "-c", env+"eth7 startRaw <&-"); r.Code != 1 || !strings.Contains(r.Err, "eth7: no such") && !strings.Contains(r.Err, "eth7: Link not found") {
		t.Errorf("%v\nwant exit 1", r)
	}
	p := a.Start("sh", "-c", env+"eth0 startRaw <&-")
	note.Says("READY=1", 20*time.Second)
	if n := strings.Count(note.Output(), "READY=1"); n != 1 {
		t.Errorf("%d times ready, want 1:\n%s", n, note.Output())
	}
	a.Status()
	p.Signal(syscall.SIGHUP)
	p.Signal(syscall.SIGTERM)
	if code := p.Wait(10 * time.Second); code != 0 || !strings.Contains(p.Output(), "stopped") {
		t.Errorf("exit %d, want 0 and a log on standard error:\n%s", code, p.Output())
	}
	note.Says("STOPPING=1", 5*time.Second)
	note.Signal(syscall.SIGKILL)
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}

// What other administrators do to the host while missiu runs.
func TestMishaps(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	a.Sh("nft add table inet other")
	before := a.Snapshot()
	log := func(want string) {
		t.Helper()
		lab.Until(t, 10*time.Second, want, func() (bool, string) {
			l := a.Must("cat", "/run/missiu.log")
			return strings.Contains(l, want), l
		})
	}
	done := func(what string) {
		t.Helper()
		a.Do("./missiu -i eth0 stop")
		a.Must("rm", "-f", "/run/missiu.log")
		if d := before.Diff(a.Snapshot()); d != "" {
			t.Errorf("%s: not as before:\n%s", what, d)
		}
	}
	a.StartMissiu()
	a.LoadConfig(policyFor(a, "", aesSHA1))
	a.Sh("nft flush ruleset; nft add table inet other")
	log("they are back")
	if n := b.Silence(3, "192.168.3.118"); n != 0 {
		t.Errorf("%d of 3 pings in clear answered after a flush of the packet filter", n)
	}
	a.Do("./missiu -i eth0 stop")
	a.Sh("rm -f /run/missiu.log; nft flush ruleset; nft add table inet other")
	before = a.Snapshot()

	a.StartMissiu()
	a.LoadConfig(policyFor(a, "", aesSHA1))
	a.Sh("ip link del tap0")
	log("tap0: deleted")
	if r := a.Try("./missiu status"); r.Code != 1 || !strings.Contains(r.Err, "eth0: the instance has died") {
		t.Errorf("%v\nwant a word about the dead instance", r)
	}
	if n := b.Silence(3, "192.168.3.118"); n != 0 {
		t.Errorf("%d of 3 pings in clear answered without TAP", n)
	}
	done("TAP deleted")

	a.StartMissiu("--default drop")
	if n := b.Silence(2, "192.168.3.118") + b.Silence(2, "fd00:3::118"); n != 0 {
		t.Errorf("%d of 4 pings answered that no policy allows, with --default drop", n)
	}
	a.LoadConfig("{ raddr 192.168.3.119 ulp icmp dir both } bypass {}\n")
	if n := b.Ping(3, "192.168.3.118"); n != 3 {
		t.Errorf("%d of 3 pings answered that a policy allows, with --default drop", n)
	}
	done("--default drop")
	if n := b.Ping(3, "192.168.3.118"); n != 3 {
		t.Errorf("%d of 3 pings answered after stop", n)
	}
}
