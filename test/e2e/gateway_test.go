package e2e

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Two gateways with a host behind each and a router between them that knows a
// smaller MTU (1300) than everybody else (1500):
//
//	ha --lan-- ga --eth0-- r --eth1-- gb --lan-- hb
type gateways struct {
	ha, hb, ga, gb *lab.Node
	r              *lab.Host
	// inline: the gateways have no TAP, whose MTU says no before they have to cut
	// what IPv6 forbids to refuse (1280 octets and less).
	inline bool
}

const pathMTU = 1300

var routers = map[bool]netip.Addr{false: netip.MustParseAddr("192.0.2.254"), true: netip.MustParseAddr("fd01::fe")}

// newGateways makes the hosts; outer6: the gateways talk by IPv6.
func newGateways(t *testing.T, outer6 bool) *gateways {
	t.Helper()
	g := &gateways{r: lab.NewHost(t, "r")}
	g.ha = lab.NewNode(lab.NewHost(t, "ha"), "lan", netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.2.0.2"))
	g.hb = lab.NewNode(lab.NewHost(t, "hb"), "lan", g.ha.Peer, g.ha.Addr)
	a, b := lab.NewHost(t, "ga"), lab.NewHost(t, "gb")
	lab.Link(t, g.ha.Host, a, "lan", prefixes("10.1.0.2/24", "fd0a::2/64"), prefixes("10.1.0.1/24", "fd0a::1/64"))
	lab.Link(t, g.hb.Host, b, "lan", prefixes("10.2.0.2/24", "fd0b::2/64"), prefixes("10.2.0.1/24", "fd0b::1/64"))
	lab.Link(t, a, g.r, "eth0", prefixes("192.0.2.1/24", "fd01::1/64"), prefixes("192.0.2.254/24", "fd01::fe/64"))
	lab.Link(t, b, g.r, "eth1", prefixes("198.51.100.1/24", "fd02::1/64"), prefixes("198.51.100.254/24", "fd02::fe/64"))
	for _, h := range []*lab.Host{a, b, g.r} {
		h.Sh("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	}
	g.ha.Sh("ip route add default via 10.1.0.1; ip -6 route add default via fd0a::1")
	g.hb.Sh("ip route add default via 10.2.0.1; ip -6 route add default via fd0b::1")
	a.Sh("ip route add 198.51.100.0/24 via 192.0.2.254; ip -6 route add fd02::/64 via fd01::fe")
	b.Sh("ip route add 192.0.2.0/24 via 198.51.100.254; ip -6 route add fd01::/64 via fd02::fe")
	g.r.Sh(fmt.Sprintf("ip route add 198.51.100.1 dev eth1 mtu lock %d; ip route add 192.0.2.1 dev eth0 mtu lock %[1]d", pathMTU))
	g.r.Sh(fmt.Sprintf("ip -6 route add fd02::1 dev eth1 mtu lock %d; ip -6 route add fd01::1 dev eth0 mtu lock %[1]d", pathMTU))
	wa, wb := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")
	if outer6 {
		wa, wb = netip.MustParseAddr("fd01::1"), netip.MustParseAddr("fd02::1")
	}
	g.ga, g.gb = lab.NewNode(a, "eth0", wa, wb), lab.NewNode(b, "eth1", wb, wa)
	return g
}

// up starts the product on both gateways, with tunnels for both inner families; options are missiu's.
func (g *gateways) up(udp bool, options ...string) {
	for _, n := range []*lab.Node{g.ga, g.gb} {
		n.StartMissiu(options...)
	}
	g.secure(udp, !slices.Contains(options, "--tun")) // which makes its routes
}

// secure starts ike and loads the policies of the tunnels; route: with routes to the TAP.
func (g *gateways) secure(udp, route bool) {
	lans := map[*lab.Node][2]string{g.ga: {"10.1.0.0/24", "fd0a::/64"}, g.gb: {"10.2.0.0/24", "fd0b::/64"}}
	for _, n := range []*lab.Node{g.ga, g.gb} {
		other := g.gb
		if n == other {
			other = g.ga
		}
		if udp {
			n.WriteFile("ike.conf", fmt.Sprintf("rule \"gw\" {\n  auth_method preshared\n  nat_traversal force\n  remote_addr %v\n}\n", n.Peer), 0o600)
			n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"gw\" key %q }\n", lab.PSK), 0o600)
			n.StartIKEWith("./ike -f ../ike.conf")
		} else {
			n.StartIKE()
		}
		n.LoadConfig(tunnels(n, lans[n], lans[other]))
		for i := range 2 {
			if route {
				n.RouteTo(netip.MustParsePrefix(lans[other][i]))
			}
		}
	}
}

func TestGateways(t *testing.T) {
	lab.NeedRoot(t)
	for _, outer6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			t.Run(fmt.Sprintf("outer IPv6 %v, UDP %v", outer6, udp), func(t *testing.T) {
				g := newGateways(t, outer6)
				g.up(udp)
				for _, inner := range []string{"10.2.0.2", "fd0b::2"} {
					g.traffic(t, inner, udp)
				}
			})
		}
	}
}

// A TUN is nothing else to path MTU discovery, fragments and the sizes of TCP.
func TestTunGateways(t *testing.T) {
	lab.NeedRoot(t)
	for _, offload := range []string{"auto", "none"} {
		t.Run("offload "+offload, func(t *testing.T) {
			udp := offload == "auto"
			g := newGateways(t, !udp)
			g.up(udp, "--tun", "--offload", offload)
			for _, inner := range []string{"10.2.0.2", "fd0b::2"} {
				g.traffic(t, inner, udp)
			}
		})
	}
}

func (g *gateways) traffic(t *testing.T, b string, udp bool) {
	c := g.r.Capture("eth0")
	ping := func(n int, args ...string) {
		t.Helper()
		if got := g.ha.Ping(n, append(args, b)...); got != n {
			t.Errorf("ping %s %v: %d of %d answered; counters %v and %v", b, args, got, n, nonzero(g.ga), nonzero(g.gb))
		}
	}
	ping(3)
	// The first large ones teach the gateways the path.
	g.ha.Run("ping", "-n", "-q", "-c", "4", "-i", "0.3", "-W", "1", "-s", "1400", "-M", "want", b)
	for _, size := range []string{"1200", "1400", "2000", "4000", "9000"} {
		ping(3, "-s", size, "-M", "dont")
	}
	// What DF forbids is told, with a size that then works.
	r := g.ha.Run("ping", "-n", "-c", "2", "-W", "1", "-s", "1400", "-M", "do", b)
	if out := strings.ToLower(r.Out + r.Err); !strings.Contains(out, "frag needed") && !strings.Contains(out, "message too long") && !strings.Contains(out, "packet too big") && !(g.inline && strings.Contains(b, ":") && strings.Contains(out, " 2 received")) {
		t.Errorf("DF and too large: no word of it\n%v", r)
	}
	// The router's own word about the path is no secret.
	ps := slices.DeleteFunc(c.Stop(), func(p lab.Packet) bool { return p.Src == routers[p.Src.Is6()] })
	lab.NoClear(t, ps)
	n := lab.Count(ps)
	if udp && (n[lab.ESP] != 0 || n[lab.ESPinUDP] == 0) || !udp && (n[lab.ESP] == 0 || n[lab.ESPinUDP] != 0) {
		t.Errorf("on the link: %v, UDP %v", n, udp)
	}
	there, back := netip.MustParseAddr(b), netip.MustParseAddr("10.1.0.2")
	if there.Is6() {
		back = netip.MustParseAddr("fd0a::2")
	}
	t.Logf("TCP to and from %s: %.0f and %.0f MB/s", b, g.ha.Transfer(g.hb, there, 8<<20)/1e6, g.hb.Transfer(g.ha, back, 8<<20)/1e6)
	// UDP of 8 kB is fragmented by the hosts.
	family := "AF_INET"
	if there.Is6() {
		family = "AF_INET6"
	}
	sink := g.hb.Start("/usr/bin/python3", "-uc", fmt.Sprintf("import socket; s = socket.socket(socket.%s, socket.SOCK_DGRAM); s.bind((%q, 9)); print('bound'); [print(len(s.recv(65535)), 'octets') for i in range(3)]", family, b))
	sink.Says("bound", 10*time.Second)
	g.ha.Must("/usr/bin/python3", "-c", fmt.Sprintf("import socket; s = socket.socket(socket.%s, socket.SOCK_DGRAM); [s.sendto(bytes(8192), (%q, 9)) for i in range(3)]", family, b))
	sink.Wait(20 * time.Second)
	if n := strings.Count(sink.Output(), "8192 octets"); n != 3 {
		t.Errorf("%d of 3 datagrams of 8192 octets arrived", n)
	}
	for _, x := range []*lab.Node{g.ga, g.gb} {
		if s := x.Status(); s.Drops() != 0 {
			t.Errorf("%s dropped inbound packets: %+v", x.Name, s)
		}
	}
}

// nonzero returns the counters that tell something.
func nonzero(n *lab.Node) map[string]int {
	c := n.Status().Counters
	maps.DeleteFunc(c, func(_ string, v int) bool { return v == 0 })
	return c
}
