package wire

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/missiu/missiu/internal/nstest"
)

// TestMain runs the tests in a network namespace of their own when it may.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m, "wire")) }

func needRoot(t testing.TB) {
	t.Helper()
	if nstest.Name() == "" {
		t.Skip("needs root and ip(8): makes interfaces in a network namespace")
	}
	for _, tool := range []string{"nft", "ping", "sysctl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
}

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
	needRoot(t)
	if t, ok := t.(*testing.T); ok {
		nstest.OneCPU(t)
	}
	labs++
	l := &lab{t, fmt.Sprintf("%sp%d", nstest.Name(), labs)}
	Dir = t.TempDir()
	sh(t, "ip netns add "+l.peer)
	t.Cleanup(func() {
		exec.Command("ip", "link", "del", "e0").Run()
		exec.Command("ip", "link", "del", "e9").Run()
		exec.Command("ip", "netns", "del", l.peer).Run()
	})
	sh(t, `set -e; sysctl -qw net.ipv6.conf.default.accept_dad=0; ip netns exec `+l.peer+` sysctl -qw net.ipv6.conf.default.accept_dad=0
		ip link set lo up
		ip link add e0 type veth peer name e1 netns `+l.peer+`
		ip addr add 10.9.0.1/24 dev e0; ip -6 addr add fd09::1/64 dev e0 nodad; ip link set e0 up`)
	l.sh("ip link set lo up; ip addr add 10.9.0.2/24 dev e1; ip -6 addr add fd09::2/64 dev e1 nodad; ip addr add 10.9.0.3/24 dev e1; ip -6 addr add fd09::3/64 dev e1 nodad; ip link set e1 up")
	nstest.Ready(t, "", "e0")
	nstest.Ready(t, l.peer, "e1")
	// The neighbours know each other: few packets wait for an answer to ARP.
	l.sh("ping -c1 -W20 10.9.0.1 >/dev/null; ping -c1 -W20 fd09::1 >/dev/null")
	return l
}

// sh runs a command line at the peer.
func (l *lab) sh(line string) string {
	l.t.Helper()
	return sh(l.t, "ip netns exec "+l.peer+" sh -ec '"+line+"'")
}

// at runs f in the peer's namespace; sockets that f makes stay there.
func (l *lab) at(f func()) { nstest.At(l.t, l.peer, f) }
