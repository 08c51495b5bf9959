package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Two clients behind one NAT, which gets another address and forgets its mappings:
// the SAs of each go with it as they are (RFC 7296, 2.23).
//
//	w1 --eth2--+
//	           n --eth1-- gw
//	w2 --eth3--+
func TestNATAddressChange(t *testing.T) {
	lab.NeedRoot(t)
	n, g := lab.NewHost(t, "n"), lab.NewHost(t, "gw")
	lab.Link(t, g, n, "eth1", prefixes("192.0.2.1/24"), prefixes("192.0.2.10/24", "192.0.2.20/24"))
	g.Sh("ip addr add 10.1.0.1/24 dev lo")
	n.Sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
	nat := func(to string) {
		n.Sh(fmt.Sprintf("nft -f - <<X\ntable ip nat {\n}\ndelete table ip nat\ntable ip nat {\n chain post {\n  type nat hook postrouting priority srcnat\n"+
			"  oifname eth1 ip protocol udp snat to %s\n }\n}\nX\nconntrack -F 2>&1", to))
	}
	nat("192.0.2.10:20000-20009")
	gw := lab.NewNode(g, "eth1", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.10"))
	var ws []*lab.Node
	for k := 1; k <= 2; k++ {
		h, dev := lab.NewHost(t, fmt.Sprintf("w%d", k)), fmt.Sprintf("eth%d", k+1)
		lab.Link(t, h, n, dev, prefixes(fmt.Sprintf("192.168.%d.1/24", k)), prefixes(fmt.Sprintf("192.168.%d.254/24", k)))
		h.Sh(fmt.Sprintf("ip route add 192.0.2.0/24 via 192.168.%d.254; ip addr add 10.9.0.%d/32 dev lo", k, k))
		ws = append(ws, lab.NewNode(h, dev, netip.MustParseAddr(fmt.Sprintf("192.168.%d.1", k)), gw.Addr))
	}
	for _, x := range append(slices.Clone(ws), gw) {
		x.StartMissiu()
		x.StartIKE()
	}
	gw.LoadConfig("{ laddr 10.1.0.0/24 raddr 10.9.0.0/16 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr any }\n")
	gw.RouteTo(prefixes("10.9.0.0/16")[0])
	for k, w := range ws {
		w.LoadConfig(fmt.Sprintf("{ laddr 10.9.0.%d raddr 10.1.0.0/24 } ipsec { encr_algs gcm tladdr any traddr 192.0.2.1 }\n", k+1))
		w.RouteTo(prefixes("10.1.0.0/24")[0])
	}
	inner := func(k int) string { return fmt.Sprintf("10.9.0.%d", k+1) }
	reach := func(what string) {
		t.Helper()
		for k, w := range ws {
			lab.Until(t, 20*time.Second, w.Name+" "+what, func() (bool, string) {
				return w.Ping(1, "-W", "1", "-I", inner(k), "10.1.0.1") == 1, gw.IKE.Output()
			})
		}
		for k, w := range ws {
			if got := w.Ping(5, "-I", inner(k), "10.1.0.1"); got != 5 {
				t.Errorf("%s %s: %d of 5 pings answered", w.Name, what, got)
			}
			if got := gw.Ping(5, "-I", "10.1.0.1", inner(k)); got != 5 {
				t.Errorf("gateway to %s %s: %d of 5 pings answered", w.Name, what, got)
			}
		}
	}
	spis := func() (l []string) {
		for _, s := range gw.Mature() {
			l = append(l, fmt.Sprint(s.SPI))
		}
		slices.Sort(l)
		return l
	}
	reach("at first")
	was := spis()
	if len(was) != 4 {
		t.Fatalf("gateway has SAs %v, want 4", was)
	}
	nat("192.0.2.20:30000-30009")
	reach("behind another address")
	if got := spis(); !slices.Equal(got, was) {
		t.Errorf("SAs %v, were %v", got, was)
	}
	for _, s := range gw.Mature() {
		if there := netip.MustParseAddr("192.0.2.20"); fmt.Sprint(s.Dst) != there.String() && fmt.Sprint(s.Src) != there.String() {
			t.Errorf("SA %+v has not moved", s)
		}
	}
}
