package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Two clients on one Ethernet behind one masquerading router, each with addresses
// that the gateway assigns; c1 has everything go through the tunnel, and a TUN for
// each address, c2 the gateway's network, and all IPv6 through a tunnel of IPv6,
// which the router does not translate.
//
//	c1 --eth1--+
//	           n --eth3-- g
//	c2 --eth2--+
//
// The router has two ways in, gw0 and gw1 on one bridge, with an address and a MAC
// address each: a client's default route moves from the one to the other.
func TestTunNAT(t *testing.T) {
	lab.NeedRoot(t)
	n, g := lab.NewHost(t, "n"), lab.NewHost(t, "g")
	lab.Link(t, g, n, "eth3", prefixes("192.0.2.1/24", "2001:db8:2::1/64"), prefixes("192.0.2.10/24", "2001:db8:2::10/64"))
	g.Sh("ip addr add 10.1.0.1/24 dev lo; ip addr add 203.0.113.9/32 dev lo; ip addr add fd0a::1/128 dev lo; ip -6 route add 2001:db8:3::/64 via 2001:db8:2::10")
	gw := lab.NewNode(g, "eth3", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.10"))
	var cs []*lab.Node
	for k := 1; k <= 2; k++ {
		h, dev := lab.NewHost(t, fmt.Sprintf("c%d", k)), fmt.Sprintf("eth%d", k)
		lab.Link(t, h, n, dev, prefixes(fmt.Sprintf("192.168.3.%d/24", k), fmt.Sprintf("2001:db8:3::%d/64", k)), nil)
		cs = append(cs, lab.NewNode(h, dev, netip.MustParseAddr(fmt.Sprintf("192.168.3.%d", k)), gw.Addr))
	}
	c1, c2 := cs[0], cs[1]
	// The bridge is to be one, not a first pass of what is routed through the NAT.
	n.Sh(`for f in /proc/sys/net/bridge/bridge-nf-call-*tables; do [ ! -e $f ] || echo 0 >$f; done
		ip link add br0 type bridge mcast_snooping 0; ip link set br0 up
		for k in 0 1; do
			ip link add gw$k type veth peer name p$k; ip link set p$k master br0 up; ip link set gw$k up
			ip addr add 192.168.3.25$k/24 dev gw$k; ip addr add 2001:db8:3::fe0$k/64 dev gw$k
			echo 1 >/proc/sys/net/ipv4/conf/gw$k/arp_ignore
			ip link set eth$((k+1)) master br0
		done
		echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		nft -f - <<X
table ip nat {
	chain post {
		type nat hook postrouting priority srcnat
		oifname eth3 masquerade
	}
}
X`)
	gate := func(c *lab.Node, k int) {
		c.Sh(fmt.Sprintf("ip route replace default via 192.168.3.25%d; ip -6 route replace default via 2001:db8:3::fe0%[1]d", k))
	}
	for _, c := range cs {
		gate(c, 0)
		lab.Until(t, 20*time.Second, c.Name+" to reach the gateway", func() (bool, string) {
			return c.Ping(1, "-W", "1", "192.0.2.1") == 1 && c.Ping(1, "-W", "1", "2001:db8:2::1") == 1, ""
		})
	}
	c2.Must("ip", "addr", "add", "fd09:2::5/128", "dev", "lo")
	before := c1.Snapshot()

	ike := func(x *lab.Node, conf, addrs string) {
		x.WriteFile("/etc/missiu/ike.conf", conf, 0o644)
		x.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"t\" key %q }\n{ label \"u\" key %[1]q }\n", lab.PSK), 0o600)
		x.StartIKEWith("./ike " + addrs)
	}
	gw.Do("./missiu -i eth3 -l missiu.log startTun")
	gw.LoadConfig(`{ laddr 0.0.0.0/0 raddr 10.9.0.0/24 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr any }
{ laddr ::/0 raddr fd09::/64 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr any }
{ laddr ::/0 raddr fd09:2::5 } ipsec { encr_algs gcm tladdr 2001:db8:2::1 traddr 2001:db8:3::2 }
`)
	ike(gw, `pool "p" { addr 10.9.0.0/24 addr fd09::1-fd09::9 }
rule "t" { auth_method preshared remote_addr 0.0.0.0/0 pool "p" }
rule "u" { auth_method preshared remote_addr ::/0 }
`, "2001:db8:2::1")
	const own = "./missiu -i eth1 -l missiu.log --vips own startTun"
	c1.Do(own)
	c1.LoadConfig(`{ laddr 10.9.0.0/24 raddr 0.0.0.0/0 } ipsec { encr_algs gcm tladdr any traddr 192.0.2.1 }
{ laddr fd09::/64 raddr ::/0 } ipsec { encr_algs gcm tladdr any traddr 192.0.2.1 }
`)
	c2.Do("./missiu -i eth2 -l missiu.log startTun")
	// Whatever the source: the assigned address is the one that the SA is for.
	c2.LoadConfig(`{ raddr 10.1.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.2 traddr 192.0.2.1 }
{ laddr fd09:2::5 raddr ::/0 } ipsec { encr_algs gcm tladdr 2001:db8:3::2 traddr 2001:db8:2::1 }
`)
	link := n.Capture("eth3")
	const asks = "rule \"t\" { auth_method preshared remote_addr 192.0.2.1 request_addr both start_action start }\n"
	ike(c1, asks, "")
	ike(c2, asks+"rule \"u\" { auth_method preshared remote_addr 2001:db8:2::1 }\n", "2001:db8:3::2")

	inside := map[*lab.Node][]string{c1: {"203.0.113.9", "10.1.0.1", "fd0a::1"}, c2: {"10.1.0.1", "fd0a::1"}}
	reach := func(what string, cs ...*lab.Node) {
		t.Helper()
		for _, c := range cs {
			for _, dst := range inside[c] {
				lab.Until(t, 20*time.Second, c.Name+" "+what+": an answer of "+dst, func() (bool, string) {
					r := c.Run("ping", "-n", "-c", "1", "-W", "1", dst) // there may be no route yet
					return r.Code == 0, c.IKE.Output() + c.Sh("ip rule; ip route show table all; ip -6 route show table all; bin/missiu status")
				})
				if got := c.Ping(5, dst); got != 5 {
					t.Errorf("%s %s: %d of 5 pings of %s answered; counters %v", c.Name, what, got, dst, nonzero(c))
				}
			}
		}
	}
	reach("at first", c1, c2)

	// Each address has a device, by which its packets come and go.
	vips := map[bool]string{}    // addresses, by IPv6
	devices := map[bool]string{} // likewise
	for _, v := range c1.Status().VIPs {
		vips[v.Address.Addr().Is6()], devices[v.Address.Addr().Is6()] = v.Address.Addr().String(), v.Name
		if out := c1.Must("ip", "-o", "addr", "show", "dev", v.Name); !strings.Contains(out, " "+v.Address.String()+" ") {
			t.Errorf("%s has not %v: %s", v.Name, v.Address, out)
		}
		if out := c1.Do("./missiu status"); !strings.Contains(out, fmt.Sprintf("%s, mtu ", v.Name)) || !strings.Contains(out, fmt.Sprintf("for %v\n", v.Address)) {
			t.Errorf("status tells nothing of %+v:\n%s", v, out)
		}
	}
	if len(vips) != 2 || devices[false] == devices[true] || slices.Contains([]string{devices[false], devices[true]}, c1.TAP()) {
		t.Fatalf("addresses %v on %v, want two, on a TUN each", vips, devices)
	}
	vip2 := strings.Fields(c2.Must("ip", "-4", "-o", "addr", "show", "dev", "tun0"))[3]
	vip2, _, _ = strings.Cut(vip2, "/")
	for _, r := range []struct {
		c         *lab.Node
		dst, want string
	}{
		{c1, "203.0.113.9", devices[false] + " " + vips[false]}, {c1, "fd0a::1", devices[true] + " " + vips[true]},
		{c1, "192.0.2.1", "eth1 192.168.3.1"}, // the peer, within 0.0.0.0/0
		{c2, "10.1.0.1", "tun0 " + vip2}, {c2, "fd0a::1", "tun0 fd09:2::5"},
		{c2, "2001:db8:2::1", "eth2 2001:db8:3::2"}, // the peer, within ::/0
	} {
		if got := routeTo(r.c.Host, r.dst); got != r.want {
			t.Errorf("%s: route to %s: %s, want %s", r.c.Name, r.dst, got, r.want)
		}
	}
	came := func(dev string) int {
		k, _ := strconv.Atoi(strings.TrimSpace(c1.Must("cat", "/sys/class/net/"+dev+"/statistics/rx_packets")))
		return k
	}
	for six, dst := range vips {
		was := came(devices[six])
		if got := gw.Ping(5, "-I", map[bool]string{false: "10.1.0.1", true: "fd0a::1"}[six], dst); got != 5 {
			t.Errorf("gateway to %s: %d of 5 pings answered", dst, got)
		}
		if got := came(devices[six]) - was; got < 5 {
			t.Errorf("%d packets came by %s, want 5", got, devices[six])
		}
	}
	was := c2.Status().Counters["in_protected"]
	if got := gw.Ping(5, "-I", "10.1.0.1", vip2); got != 5 {
		t.Errorf("gateway to %s: %d of 5 pings answered", vip2, got)
	}
	if got := c2.Status().Counters["in_protected"] - was; got < 5 {
		t.Errorf("c2 opened %d packets, want 5", got)
	}
	c1.Transfer(gw, netip.MustParseAddr("203.0.113.9"), 8<<20)
	c2.Transfer(gw, netip.MustParseAddr("10.1.0.1"), 8<<20)
	gw.Transfer(c1, netip.MustParseAddr(vips[true]), 8<<20)

	// The default gateway changes, and takes the tunnels' outsides along as they are.
	spis := func() (l []string) {
		for _, s := range gw.Mature() {
			l = append(l, fmt.Sprint(s.SPI))
		}
		slices.Sort(l)
		return l
	}
	same := spis()
	n.Must("ip", "link", "set", "gw0", "down")
	peers := map[*lab.Node]map[string]string{c1: {"192.0.2.1": "192.168.3.251"}, c2: {"192.0.2.1": "192.168.3.251", "2001:db8:2::1": "2001:db8:3::fe01"}}
	for _, c := range cs {
		c.Sh("ip route del default; ip -6 route del default")
		for peer := range peers[c] {
			if got := routeTo(c.Host, peer); strings.Contains(got, "tun") {
				t.Errorf("%s: without a default route %s is routed to %s", c.Name, peer, got)
			}
		}
		gate(c, 1)
		for peer, via := range peers[c] {
			if out := c.Must("ip", "route", "get", peer); !strings.Contains(out, " via "+via+" dev "+c.If+" ") {
				t.Errorf("%s: way to %s after the change: %s", c.Name, peer, out)
			}
		}
	}
	reach("by the other router", c1, c2)
	if got := spis(); !slices.Equal(got, same) {
		t.Errorf("SAs %v, were %v", got, same)
	}

	ps := link.Stop()
	lab.NoClear(t, ps)
	ports := map[string]bool{}
	for _, p := range lab.Of(ps, lab.ESPinUDP) {
		if p.Src == gw.Peer {
			ports[fmt.Sprintf("%x", p.Frame[p.L4:p.L4+2])] = true
		}
	}
	if count := lab.Count(ps); len(ports) < 2 || count[lab.ESPinUDP] < 100 || count[lab.ESP] < 10 {
		t.Errorf("on the link: %v, from %d ports; want ESP in UDP from two, and ESP of IPv6", count, len(ports))
	}

	// Dead, it keeps closed what it had; its successor adopts the devices.
	there := func(dev string) bool { return c1.Run("ip", "link", "show", "dev", dev).Code == 0 }
	link = n.Capture("eth3", "host 203.0.113.9")
	c1.KillMissiu()
	if got := c1.Silence(3, "203.0.113.9"); got != 0 || !there(devices[false]) || !there(devices[true]) {
		t.Errorf("dead: %d pings answered; %s and %s there: %v, %v", got, devices[false], devices[true], there(devices[false]), there(devices[true]))
	}
	c1.Do(own)
	reach("after a crash", c1)
	if s := c1.Status().VIPs; len(s) != 2 {
		t.Errorf("after a crash: %+v", s)
	}
	if ps := link.Stop(); len(ps) > 0 {
		t.Errorf("in clear while it was dead: %v", ps)
	}
	// With the IKE SA the addresses go, and with them the devices; until there are others
	// nothing leaves with the host's own, though the policy is for the pool alone.
	left := c1.Status().VIPs
	end := func() {
		c1.KillIKE(10 * time.Second)
		lab.Until(t, 10*time.Second, "the TUNs to go with the addresses", func() (bool, string) {
			return len(c1.Status().VIPs) == 0 && !there(left[0].Name) && !there(left[1].Name), fmt.Sprint(c1.Status().VIPs)
		})
	}
	link = c1.Capture("eth1", "host 203.0.113.9 or host fd0a::1")
	end()
	for _, dst := range []string{"203.0.113.9", "fd0a::1"} {
		c1.Run("ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", dst)
	}
	c1.IKE = nil
	ike(c1, asks, "")
	reach("with addresses again", c1)
	if ps := link.Stop(); len(ps) > 0 {
		t.Errorf("in clear without an address of the pool: %v", ps)
	}
	left = c1.Status().VIPs
	end()
	// What a killed instance left goes where its successor has one device for all.
	if got := strings.TrimSpace(c1.Must("bin/pfkey", "/run/missiu/eth1.pfkey", "raw", "02e50000"+"05000000"+"01000000"+"00000000"+"03000500"+"00200000"+"02000000"+"0a09004d"+"0000000000000000")); got != "0" {
		t.Fatalf("address given by PF_KEY: errno %s", got)
	}
	left = c1.Status().VIPs
	c1.KillMissiu()
	c1.Do("./missiu -i eth1 -l missiu.log startTun")
	if len(left) != 1 || left[0].Address.String() != "10.9.0.77/32" || there(left[0].Name) {
		t.Errorf("left of a killed instance: %+v", left)
	}
	c1.StopMissiu()
	c1.Must("rm", "-f", "/run/missiu.log")
	gate(c1, 0)
	delete(before, "etc")
	if d := before.Diff(c1.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}
