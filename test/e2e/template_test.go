package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Two road warriors at addresses that the gateway's one entry does not name:
//
//	w1 --eth1--+
//	           r --eth0-- gw
//	w2 --eth2--+
func TestRoadWarriors(t *testing.T) {
	lab.NeedRoot(t)
	r, g := lab.NewHost(t, "r"), lab.NewHost(t, "gw")
	lab.Link(t, g, r, "eth0", prefixes("192.0.2.1/24"), prefixes("192.0.2.254/24"))
	g.Sh("ip route add 198.51.100.0/24 via 192.0.2.254; ip route add 203.0.113.0/24 via 192.0.2.254; ip addr add 10.1.0.1/24 dev lo")
	gw := lab.NewNode(g, "eth0", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"))
	r.Sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
	var ws []*lab.Node
	for k, at := range []string{"198.51.100", "203.0.113"} {
		h, dev := lab.NewHost(t, fmt.Sprintf("w%d", k+1)), fmt.Sprintf("eth%d", k+1)
		lab.Link(t, h, r, dev, prefixes(at+".1/24"), prefixes(at+".254/24"))
		h.Sh(fmt.Sprintf("ip route add 192.0.2.0/24 via %s.254; ip addr add 10.9.0.%d/32 dev lo", at, k+1))
		ws = append(ws, lab.NewNode(h, dev, netip.MustParseAddr(at+".1"), gw.Addr))
	}
	for _, n := range append(slices.Clone(ws), gw) {
		n.StartMissiu()
		n.StartIKE()
	}
	gw.LoadConfig("{ laddr 10.1.0.0/24 raddr 10.9.0.0/16 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr any }\n")
	gw.RouteTo(prefixes("10.9.0.0/16")[0])
	// The first does not say its own end either.
	for k, ends := range []string{"tladdr any", fmt.Sprintf("tladdr %v", ws[1].Addr)} {
		ws[k].LoadConfig(fmt.Sprintf("{ laddr 10.9.0.%d raddr 10.1.0.0/24 } ipsec { encr_algs gcm %s traddr 192.0.2.1 }\n", k+1, ends))
		ws[k].RouteTo(prefixes("10.1.0.0/24")[0])
	}
	c := r.Capture("eth0")
	// Without an SA the gateway has nobody to ask, and sends nothing.
	if got := gw.Silence(2, "-I", "10.1.0.1", "10.9.0.1"); got != 0 {
		t.Errorf("%d answers without any SA", got)
	}
	if n := gw.Status().Counters["drop_out_no_peer"]; n != 2 {
		t.Errorf("drop_out_no_peer is %d, want 2", n)
	}
	for k, w := range ws {
		inner := fmt.Sprintf("10.9.0.%d", k+1)
		lab.Until(t, 20*time.Second, "the first answer to "+w.Name, func() (bool, string) {
			return w.Ping(1, "-W", "1", "-I", inner, "10.1.0.1") == 1, w.IKE.Output()
		})
	}
	for k, w := range ws {
		inner := fmt.Sprintf("10.9.0.%d", k+1)
		if got := w.Ping(5, "-I", inner, "10.1.0.1"); got != 5 {
			t.Errorf("%s: %d of 5 pings answered", w.Name, got)
		}
		was := w.Status().Counters["in_protected"]
		if got := gw.Ping(5, "-I", "10.1.0.1", inner); got != 5 {
			t.Errorf("gateway to %s: %d of 5 pings answered", w.Name, got)
		}
		if n := w.Status().Counters["in_protected"] - was; n != 5 {
			t.Errorf("%s opened %d packets, want 5", w.Name, n)
		}
	}
	if n := len(gw.Mature()); n != 4 {
		t.Errorf("gateway has %d SAs, want 4", n)
	}
	// An address that nobody has negotiated stays here.
	if got := gw.Silence(1, "-I", "10.1.0.1", "10.9.0.3"); got != 0 {
		t.Error("an answer from nowhere")
	}
	if n := gw.Status().Counters["drop_out_no_peer"]; n != 3 {
		t.Errorf("drop_out_no_peer is %d, want 3", n)
	}
	ps := c.Stop()
	lab.NoClear(t, ps)
	if n := lab.Count(ps)[lab.ESP]; n < 40 {
		t.Errorf("%d ESP packets on the link, want 40 and more", n)
	}
}
