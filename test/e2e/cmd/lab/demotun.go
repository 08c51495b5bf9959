package main

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// demoTun joins two networks by their gateways, in the manner of strongSwan's
// kernel-libipsec: a TUN, routes by the daemon, ESP in UDP by the port of IKE.
func demoTun(t lab.TB) {
	prefixes := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	node := func(name, ifname, addr, peer string) *lab.Node {
		return lab.NewNode(lab.NewHost(t, name), ifname, netip.MustParseAddr(addr), netip.MustParseAddr(peer))
	}
	ha, hb := node("ha", "lan", "10.1.0.2", "10.2.0.2"), node("hb", "lan", "10.2.0.2", "10.1.0.2")
	ga, gb := node("ga", "eth0", "192.0.2.1", "192.0.2.2"), node("gb", "eth0", "192.0.2.2", "192.0.2.1")
	lab.Link(t, ha.Host, ga.Host, "lan", prefixes("10.1.0.2/24"), prefixes("10.1.0.1/24"))
	lab.Link(t, hb.Host, gb.Host, "lan", prefixes("10.2.0.2/24"), prefixes("10.2.0.1/24"))
	lab.Link(t, ga.Host, gb.Host, "eth0", prefixes("192.0.2.1/24"), prefixes("192.0.2.2/24"))
	gates := []*lab.Node{ga, gb}
	lan := map[*lab.Node]string{ga: "10.1.0", gb: "10.2.0"}
	for _, n := range gates {
		n.Sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
		n.Echo = func(n *lab.Node, line string) {
			fmt.Printf("  g%s# %s\n", map[*lab.Node]string{ga: "a", gb: "b"}[n], line)
		}
	}
	ha.Must("ip", "route", "add", "default", "via", "10.1.0.1")
	hb.Must("ip", "route", "add", "default", "via", "10.2.0.1")
	fmt.Print("Two gateways, ga 192.0.2.1 and gb 192.0.2.2, on one Ethernet; behind them 10.1.0.0/24 with ha and 10.2.0.0/24 with hb:\n\n")

	var rows table
	before := snapshots{ga: ga.Snapshot(), gb: gb.Snapshot()}
	for _, n := range gates {
		n.Do("./missiu -i eth0 -l missiu.log startTun")
	}
	rows.add(true, "missiu startTun", "ready on both gateways, %s", ga.TAP())
	for _, n := range gates {
		n.WriteFile("ike.conf", fmt.Sprintf("rule \"gw\" {\n  auth_method preshared\n  nat_traversal force\n  remote_addr %v\n}\n", n.Peer), 0o600)
		n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"gw\" key %q }\n", lab.PSK), 0o600)
		n.StartIKEWith("./ike -f ../ike.conf")
	}
	rows.add(true, "ike, ESP in UDP", "ready on both gateways")
	for i, n := range gates {
		n.LoadConfig(fmt.Sprintf("{ laddr %s.0/24 raddr %s.0/24 } ipsec { encr_algs gcm tladdr %v traddr %v }\n", lan[n], lan[gates[1-i]], n.Addr, n.Peer))
	}
	rows.add(true, "loadConfig -f ipsec.conf", "%d policies on each gateway", ga.Status().Policies)
	route := strings.Join(strings.Fields(ga.Do("ip route get 10.2.0.2 | head -1")), " ")
	rows.add(strings.Contains(route, "dev tun0") && strings.Contains(route, "src 10.1.0.1"), "routes, by missiu alone", "%s", route)

	link := ga.Capture("eth0")
	start := time.Now()
	fmt.Println("  ha# ping -c 20 10.2.0.2")
	got := ha.Ping(20, "10.2.0.2")
	rows.add(got == 20, "ping between the networks", "%d of 20 answered in %v", got, time.Since(start).Round(time.Millisecond))
	const octets = 64 << 20
	fmt.Println("  ha# (64 MiB of TCP to hb, and back)")
	there, back := ha.Transfer(hb, hb.Addr, octets), hb.Transfer(ha, ha.Addr, octets)
	rows.add(!t.Failed(), "64 MiB of TCP each way, SHA-256", "%s; %.2f and %.2f Gbit/s", map[bool]string{true: "differs", false: "the same at both ends"}[t.Failed()], there*8/1e9, back*8/1e9)
	n := lab.Count(link.Stop())
	rows.add(n[lab.ESPinUDP] > 0 && n[lab.ESP] == 0, "between the gateways", "%d of ESP in UDP", n[lab.ESPinUDP])
	rows.add(n[lab.Clear] == 0, "clear packets seen on the link", "%d", n[lab.Clear])

	for _, n := range gates {
		n.KillIKE(5 * time.Second)
	}
	ga.Do("./loadConfig -FP")
	route = strings.Join(strings.Fields(ga.Run("ip", "route", "get", "10.2.0.2").Err), " ")
	rows.add(strings.Contains(route, "unreachable"), "loadConfig -FP", "the route is gone: %s", strings.TrimPrefix(route, "RTNETLINK answers: "))
	before.stop(&rows, gates)
	rows.print(t)
}
