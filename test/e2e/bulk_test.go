package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/missiu/missiu/test/e2e/lab"
)

// tunnels is a policy with a tunnel to n's peer for IPv4 and one for IPv6, between what
// is here and there.
func tunnels(n *lab.Node, here, there [2]string) string {
	var b strings.Builder
	for i := range here {
		fmt.Fprintf(&b, "{ laddr %s raddr %s } ipsec { encr_algs gcm tladdr %v traddr %v }\n", here[i], there[i], n.Addr, n.Peer)
	}
	return b.String()
}

// loadTunnels loads the policy of tunnels between addresses, and makes the routes.
func loadTunnels(n *lab.Node, here, there [2]string) {
	n.LoadConfig(tunnels(n, here, there))
	n.Must("ip", "route", "add", there[0], "dev", n.TAP(), "src", here[0])
	n.Must("ip", "-6", "route", "add", there[1], "dev", n.TAP(), "src", here[1])
}

// newTunnels makes two hosts with tunnels between 10.1.0.1 and 10.2.0.1, and
// fd0a::1 and fd0b::1; options are of either missiu. In UDP if udp says so.
func newTunnels(t *testing.T, udp bool, optionsA, optionsB string) (a, b *lab.Node) {
	t.Helper()
	a, b = lab.Pair(t)
	own := map[*lab.Node][2]string{a: {"10.1.0.1", "fd0a::1"}, b: {"10.2.0.1", "fd0b::1"}}
	for n, options := range map[*lab.Node]string{a: optionsA, b: optionsB} {
		for _, addr := range own[n] {
			n.Must("ip", "addr", "add", addr, "dev", "lo")
		}
		n.StartMissiu(strings.Fields(options)...)
	}
	for _, n := range []*lab.Node{a, b} {
		other := b
		if n == b {
			other = a
		}
		if udp {
			n.WriteFile("ike.conf", fmt.Sprintf("rule \"peer\" {\n  auth_method preshared\n  nat_traversal force\n  remote_addr %v\n}\n", n.Peer), 0o600)
			n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"peer\" key %q }\n", lab.PSK), 0o600)
			n.StartIKEWith("./ike -f ../ike.conf")
		} else {
			n.StartIKE()
		}
		loadTunnels(n, own[n], own[other])
	}
	for _, addr := range own[b] {
		if got := a.Ping(3, addr); got != 3 {
			t.Fatalf("ping %s: %d of 3", addr, got)
		}
	}
	return a, b
}

// TestBulk: 300 MB of TCP each way arrive as they were sent, over IPv4 and
// IPv6, in ESP and in ESP in UDP, in super-frames where both ends have them and
// in single packets where one has none.
func TestBulk(t *testing.T) {
	lab.NeedRoot(t)
	for _, c := range []struct {
		name    string
		udp     bool
		options string // of b
		super   bool   // b receives them
		octets  int
	}{
		{"native", false, "", true, 300e6},
		{"UDP", true, "", true, 300e6},
		{"native, b without offload", false, "--offload none", false, 50e6},
		{"UDP, b without offload", true, "--offload none", false, 50e6},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := newTunnels(t, c.udp, "", c.options)
			for _, to := range [][2]string{{"10.2.0.1", "10.1.0.1"}, {"fd0b::1", "fd0a::1"}} {
				there := a.Transfer(b, netip.MustParseAddr(to[0]), c.octets)
				back := b.Transfer(a, netip.MustParseAddr(to[1]), c.octets)
				t.Logf("%s: %.0f MB/s there, %.0f back", to[0], there/1e6, back/1e6)
			}
			for _, n := range []*lab.Node{a, b} {
				s := n.Status()
				if s.Drops() != 0 {
					t.Errorf("%s dropped inbound packets: %v", n.Name, nonzero(n))
				}
				super := c.super || n == a
				if got := s.Counters["in_super_frames"]; (got > 0) != super {
					t.Errorf("%s wrote %d super-frames, want some: %v", n.Name, got, super)
				}
				if all, in := s.Counters["in_protected"], s.Counters["in_coalesced"]; super && in < all/4 {
					t.Errorf("%s: %d of %d packets in super-frames", n.Name, in, all)
				}
			}
		})
	}
}
