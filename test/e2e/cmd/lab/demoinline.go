package main

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// demoInline severs the interfaces of two hosts, in the manner of the x-kernel's
// bump in the stack: no device, no route, no address changed.
func demoInline(t lab.TB) {
	prefixes := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	ha, hb, r := lab.NewHost(t, "a"), lab.NewHost(t, "b"), lab.NewHost(t, "r")
	lab.Link(t, ha, r, "eth0", prefixes("192.0.2.1/24"), prefixes("192.0.2.254/24"))
	lab.Link(t, hb, r, "eth1", prefixes("198.51.100.1/24"), prefixes("198.51.100.254/24"))
	r.Sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
	ha.Must("ip", "route", "add", "default", "via", "192.0.2.254")
	hb.Must("ip", "route", "add", "default", "via", "198.51.100.254")
	a := lab.NewNode(ha, "eth0", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"))
	b := lab.NewNode(hb, "eth1", a.Peer, a.Addr)
	nodes := []*lab.Node{a, b}
	for _, n := range nodes {
		n.Echo = func(n *lab.Node, line string) { fmt.Printf("  %v# %s\n", n.Addr, line) }
	}
	fmt.Print("Two hosts with a router between them, which captures:\n\n")
	var rows table
	before := snapshots{a: a.Snapshot(), b: b.Snapshot()}
	unchanged := func() string {
		now := a.Snapshot()
		for _, s := range []string{"addresses", "routes", "rules"} {
			// The helper interfaces have neither.
			if d := (lab.Snapshot{s: before[a][s]}).Diff(lab.Snapshot{s: now[s]}); d != "" {
				return d
			}
		}
		return ""
	}
	for _, n := range nodes {
		n.Do("./missiu -i " + n.If + " -l missiu.log startInline")
	}
	d := unchanged()
	rows.add(d == "", "missiu startInline", "addresses and routes as before%s", d)
	got := a.Ping(20, b.Addr.String())
	rows.add(got == 20, "ping, no policy yet", "%d of 20 answered", got)
	for _, n := range nodes {
		n.StartIKE()
		n.LoadConfig(fmt.Sprintf("{ raddr %v } ipsec { encr_algs gcm }\n", n.Peer))
	}
	link := r.Capture("eth0")
	got = a.Ping(20, b.Addr.String())
	rows.add(got == 20, "ping, with a policy", "%d of 20 answered", got)
	const octets = 64 << 20
	fmt.Println("  (64 MiB of TCP to the other, and back)")
	there, back := a.Transfer(b, b.Addr, octets), b.Transfer(a, a.Addr, octets)
	rows.add(!t.Failed(), "64 MiB of TCP each way, SHA-256", "%s; %.2f and %.2f Gbit/s", map[bool]string{true: "differs", false: "the same at both ends"}[t.Failed()], there*8/1e9, back*8/1e9)
	n := lab.Count(link.Stop())
	rows.add(n[lab.ESP] > 0 && n[lab.Clear] == 0, "on the link", "%d of ESP, %d in clear", n[lab.ESP], n[lab.Clear])

	for _, n := range nodes {
		n.Do("./loadConfig -FP")
		n.KillIKE(5 * time.Second)
	}
	a.KillMissiu()
	got = a.Silence(3, b.Addr.String())
	rows.add(got == 0, "missiu killed", "cut off: %d of 3 pings answered", got)
	a.Do("./missiu -i eth0 -l missiu.log startInline")
	a.Do("./loadConfig -FP") // policies that the killed one had not noted as gone
	got = a.Ping(20, b.Addr.String())
	rows.add(got == 20, "missiu startInline", "took over: %d of 20", got)
	for _, n := range nodes {
		n.Do("./missiu -i " + n.If + " state closed")
	}
	got = a.Ping(20, b.Addr.String())
	rows.add(got == 20, "missiu state closed", "as if missiu were not there: %d of 20 pings", got)
	before.stop(&rows, nodes)
	rows.print(t)
}
