package bump

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/missiu/missiu/internal/nstest"
)

// TestMain runs the tests in a network namespace of their own when it may.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m, "bump")) }

var sh = nstest.Sh

// labs numbers the peers' namespaces: one that is being deleted keeps its name for a while.
var labs int

// lab is a veth pair: e0 here, e1 in the peer's namespace.
//
//	10.9.0.1/24  fd09::1/64  e0 ---- e1  10.9.0.2/24  fd09::2/64
type lab struct {
	t    testing.TB
	peer string
}

func newLab(t testing.TB) *lab {
	t.Helper()
	if nstest.Name() == "" {
		t.Skip("needs root and ip(8): makes interfaces in a network namespace")
	}
	for _, tool := range []string{"nft", "tc", "ping", "sysctl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	labs++
	l := &lab{t, fmt.Sprintf("%s-%d", nstest.Name(), labs)}
	Dir = t.TempDir()
	sh(t, "ip netns add "+l.peer)
	t.Cleanup(func() {
		exec.Command("ip", "link", "del", "e0").Run()
		exec.Command("ip", "netns", "del", l.peer).Run()
	})
	sh(t, `sysctl -qw net.ipv6.conf.default.accept_dad=0; ip netns exec `+l.peer+` sysctl -qw net.ipv6.conf.default.accept_dad=0; ip link set lo up`)
	l.cable()
	return l
}

// cable makes e0 and e1.
func (l *lab) cable() {
	l.t.Helper()
	sh(l.t, `ip link add e0 type veth peer name e1 netns `+l.peer)
	l.sh("ip link set lo up; ip addr add 10.9.0.2/24 dev e1; ip -6 addr add fd09::2/64 dev e1 nodad; ip link set e1 up")
	l.address("e0")
	nstest.Ready(l.t, "", "e0")
	nstest.Ready(l.t, l.peer, "e1")
	// The neighbours know each other.
	for _, a := range []string{"10.9.0.2", "fd09::2"} {
		until(l.t, "an answer of "+a, func() bool { return answered(l.t, 1, a) == 1 })
	}
}

func (l *lab) address(name string) {
	l.t.Helper()
	sh(l.t, "ip addr add 10.9.0.1/24 dev "+name+"; ip -6 addr add fd09::1/64 dev "+name+" nodad; ip link set "+name+" up")
}

// sh runs a command line at the peer.
func (l *lab) sh(line string) string {
	l.t.Helper()
	return sh(l.t, "ip netns exec "+l.peer+" sh -ec '"+line+"'")
}

// answered is how many of n pings were answered. It lasts until n are, or 30 s; what
// is sent meanwhile, because answers are late, does not count.
func answered(t testing.TB, n int, args string) int {
	t.Helper()
	return ping(t, n, fmt.Sprintf("-w 30 -i 0.3 -l %d %s", n, args))
}

// silence is how many of n pings were answered within a second; none is expected.
func silence(t testing.TB, n int, args string) int {
	t.Helper()
	return ping(t, n, "-W 1 -i 0.01 "+args)
}

func ping(t testing.TB, n int, args string) int {
	t.Helper()
	out, _ := exec.Command("sh", "-c", fmt.Sprintf("ping -n -c %d %s", n, args)).CombinedOutput()
	seen := map[string]bool{}
	for _, m := range answer.FindAllStringSubmatch(string(out), -1) {
		if seq, _ := strconv.Atoi(m[1]); seq <= n {
			seen[m[1]] = true
		}
	}
	if !strings.Contains(string(out), " packets transmitted, ") {
		t.Fatalf("ping %s: %s", args, out)
	}
	if strings.Contains(string(out), "DUP!") {
		t.Errorf("ping %s: duplicates\n%s", args, out)
	}
	return len(seen)
}

var answer = regexp.MustCompile(`(?m)^\d+ bytes from .* icmp_seq=(\d+) `)
