package ike

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

func named(s string) pad.ID { return pad.ID{Type: ikev2.IDFQDN, Data: s} }

// A ladder: who takes and gives back what, and what is had.
func TestLeases(t *testing.T) {
	p := &pad.Pool{Name: "p", Addrs: []pad.Range{
		{From: netip.MustParseAddr("10.0.0.1"), To: netip.MustParseAddr("10.0.0.2")}, {From: netip.MustParseAddr("10.0.1.1"), To: netip.MustParseAddr("10.0.1.1")},
		pad.Prefix(netip.MustParsePrefix("2001:db8::/64")),
	}}
	var l leases
	had := map[string][]*lease{}
	for i, s := range []struct {
		who, wish, want string // want "": none is left; "-": who gives one back
		bits            int
	}{
		{"a", "", "10.0.0.1", 32},
		{"a", "", "10.0.0.1", 32}, // its second IKE SA
		{"b", "10.0.1.1", "10.0.1.1", 32},
		{"c", "10.0.1.1", "10.0.0.2", 32}, // taken
		{"d", "", "", 32},
		{"d", "", "2001:db8::", 128}, // the other family
		{"a", "", "-", 32},
		{"d", "", "", 32}, // a has one more
		{"a", "", "-", 32},
		{"c", "", "-", 32},
		{"a", "", "10.0.0.1", 32}, // reserved for it
		{"d", "10.0.0.2", "10.0.0.2", 32},
		{"c", "", "", 32}, // its address went to d
		{"e", "192.0.2.1", "2001:db8::1", 128},
	} {
		if s.want == "-" {
			l.give(had[s.who][0])
			had[s.who] = had[s.who][1:]
			continue
		}
		wish, _ := netip.ParseAddr(s.wish)
		x, err := l.take(p, s.bits, named(s.who), wish)
		got := ""
		if err == nil {
			got = x.addr.String()
			had[s.who] = append(had[s.who], x)
		} else if !errors.Is(err, errExhausted) {
			t.Errorf("step %d: %v", i, err)
		}
		if got != s.want {
			t.Errorf("step %d: %s has %q, want %q", i, s.who, got, s.want)
		}
	}
}

// A full pool costs no more than a look at each address, and all can be had.
func TestLeasesAll(t *testing.T) {
	p := &pad.Pool{Name: "p", Addrs: []pad.Range{pad.Prefix(netip.MustParsePrefix("10.0.0.0/20"))}}
	var l leases
	seen := map[netip.Addr]bool{}
	for i := range 1 << 12 {
		x, err := l.take(p, 32, named(fmt.Sprint(i)), netip.Addr{})
		if err != nil || seen[x.addr] {
			t.Fatalf("%d: %v, %v", i, x, err)
		}
		seen[x.addr] = true
	}
	if _, err := l.take(p, 32, named("one more"), netip.Addr{}); !errors.Is(err, errExhausted) {
		t.Errorf("got %v", err)
	}
}

// An address inside is given to missiu with the child SA, stays while the IKE SA
// is made anew, which gets the same, and goes with the last.
func TestInnerAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inside := netip.MustParsePrefix("10.9.0.1/32")
		tunnel := func(local, remote string, src, dst netip.Addr) func(*Config, *missiu) {
			return func(_ *Config, m *missiu) {
				sel := ipsec.Selector{Src: netip.MustParsePrefix(local), Dst: netip.MustParsePrefix(remote)}
				q := ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: ipsec.LevelRequire, ReqID: 7, Src: src, Dst: dst}
				r := q
				r.Src, r.Dst = dst, src
				m.policies = []ipsec.Policy{
					{ID: 1, Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{q}},
					{ID: 2, Dir: ipsec.In, Sel: sel.Reverse(), Action: ipsec.Protect, Requests: []ipsec.Request{r}},
				}
			}
		}
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", ruleTo("k", func(r *pad.Rule) { r.Request.V4, r.Reauth = true, 10*time.Minute }, addrB), tunnel("0.0.0.0/0", "10.2.0.0/16", addrA, addrB))
		pool := &pad.Pool{Name: "p", Addrs: []pad.Range{{From: inside.Addr(), To: netip.MustParseAddr("10.9.0.9")}}}
		b := newNode(t, n, addrB, addrA, "k", ruleTo("k", func(r *pad.Rule) { r.Pools = []*pad.Pool{pool} }, addrA), tunnel("10.2.0.0/16", "0.0.0.0/0", addrB, netip.IPv4Unspecified()))
		defer b.stop(t)
		addrs := func() []netip.Prefix {
			synctest.Wait()
			a.m.mu.Lock()
			defer a.m.mu.Unlock()
			return slices.Clone(a.m.addrs)
		}
		if err := a.Up(t.Context(), "gate"); err != nil {
			t.Fatal(err)
		}
		if got := addrs(); len(got) != 1 || got[0] != inside {
			t.Errorf("addresses %v, want %v", got, inside)
		}
		if got := a.Report(t.Context()).IKESAs[0].Assigned; len(got) != 1 || got[0] != inside.Addr() {
			t.Errorf("reported: %v", got)
		}
		was := spiSet(a.m)
		time.Sleep(12 * time.Minute)
		wantPair(t, a, b, 1)
		if got := addrs(); len(got) < 1 || got[len(got)-1] != inside || slices.Equal(spiSet(a.m), was) {
			t.Errorf("addresses %v after reauthentication, want %v; SAs %v, were %v", got, inside, spiSet(a.m), was)
		}
		for _, s := range a.m.list() {
			if ts := append(slices.Clone(s.SrcTS), s.DstTS...); !slices.ContainsFunc(ts, func(x ipsec.TrafficSelector) bool { return x.Start == inside.Addr() && x.End == x.Start }) {
				t.Errorf("SA %v is for %v, %v", s.SAID, s.SrcTS, s.DstTS)
			}
		}
		a.stop(t)
		if got := addrs(); len(got) != 0 {
			t.Errorf("left behind: %v", got)
		}
	})
}
