package route

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func adr(s string) netip.Addr   { return netip.MustParseAddr(s) }

// policy reads "protect|bypass|discard SRC DST [OUTERSRC OUTERDST]".
func policy(s string) *ipsec.Policy {
	f := strings.Fields(s)
	q := &ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: pfx(f[1]), Dst: pfx(f[2])}}
	switch f[0] {
	case "bypass":
		q.Action = ipsec.Bypass
	case "protect":
		q.Action = ipsec.Protect
		r := ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelUnique, ReqID: 7}
		if len(f) > 3 {
			r.Mode, r.Src, r.Dst = ipsec.Tunnel, adr(f[3]), adr(f[4])
		}
		q.Requests = []ipsec.Request{r}
	}
	return q
}

func show(ws []Want) string {
	var l []string
	for _, w := range ws {
		s := w.Dst.String()
		if w.Pass {
			s += " pass"
		}
		for _, p := range w.Local {
			s += " from " + p.String()
		}
		for _, a := range w.Prefer {
			s += " prefer " + a.String()
		}
		if w.Await {
			s += " awaited"
		}
		for _, p := range w.Except {
			s += " but " + p.String()
		}
		l = append(l, s)
	}
	return strings.Join(l, "; ")
}

func TestPlan(t *testing.T) {
	port := policy("bypass 0.0.0.0/0 10.2.0.8/32")
	port.Sel.Proto, port.Sel.DstPort = 6, 80
	in := policy("protect 10.2.0.0/24 10.1.0.0/24 192.0.2.2 192.0.2.1")
	in.Dir = ipsec.In
	for _, tt := range []struct {
		name string
		ps   []*ipsec.Policy
		o    PlanOptions
		want string
	}{
		{"net to net", []*ipsec.Policy{in, policy("protect 10.1.0.0/24 10.2.0.0/24 192.0.2.1 192.0.2.2")}, PlanOptions{}, "10.2.0.0/24 from 10.1.0.0/24 prefer 192.0.2.1"},
		{"two selectors", []*ipsec.Policy{policy("protect 10.1.0.0/24 10.2.0.0/24 192.0.2.1 192.0.2.2"), policy("protect 10.7.0.0/24 10.2.0.0/24 192.0.2.1 192.0.2.2")},
			PlanOptions{}, "10.2.0.0/24 from 10.1.0.0/24 from 10.7.0.0/24 prefer 192.0.2.1"},
		{"transport", []*ipsec.Policy{policy("protect 192.0.2.1/32 192.0.2.2/32")}, PlanOptions{}, "192.0.2.2/32 from 192.0.2.1/32"},
		{"the selector is the peer", []*ipsec.Policy{policy("protect 192.0.2.1/32 192.0.2.2/32 192.0.2.1 192.0.2.2")}, PlanOptions{}, "192.0.2.2/32 from 192.0.2.1/32 prefer 192.0.2.1"},
		{"the peer in the selector", []*ipsec.Policy{policy("protect 10.1.0.0/24 192.0.2.0/24 192.0.2.1 192.0.2.2")}, PlanOptions{}, "192.0.2.0/24 from 10.1.0.0/24 prefer 192.0.2.1; 192.0.2.2/32 pass but 10.1.0.0/24"},
		{"and protected itself", []*ipsec.Policy{policy("protect 192.0.2.0/24 192.0.2.0/24 192.0.2.1 192.0.2.2")}, PlanOptions{}, "192.0.2.0/24 from 192.0.2.0/24 prefer 192.0.2.1"},
		{"our end open", []*ipsec.Policy{policy("protect 10.1.0.0/24 192.0.2.0/24 0.0.0.0 192.0.2.2")}, PlanOptions{Outer: []netip.Addr{adr("192.0.2.1")}}, "192.0.2.0/24 from 10.1.0.0/24; 192.0.2.2/32 pass but 10.1.0.0/24"},
		{"our end open, protected", []*ipsec.Policy{policy("protect 192.0.2.1/32 192.0.2.0/24 0.0.0.0 192.0.2.2")}, PlanOptions{Outer: []netip.Addr{adr("192.0.2.1")}}, "192.0.2.0/24 from 192.0.2.1/32"},
		{"everything", []*ipsec.Policy{policy("protect 10.1.0.0/24 0.0.0.0/0 192.0.2.1 192.0.2.2")}, PlanOptions{},
			"0.0.0.0/0 from 10.1.0.0/24 prefer 192.0.2.1; 127.0.0.0/8 pass; 192.0.2.2/32 pass but 10.1.0.0/24; 224.0.0.0/4 pass; 255.255.255.255/32 pass"},
		{"everything, IPv6", []*ipsec.Policy{policy("protect fd01::/64 ::/0 2001:db8::1 2001:db8::2")}, PlanOptions{},
			"::/0 from fd01::/64 prefer 2001:db8::1; ::1/128 pass; 2001:db8::2/128 pass but fd01::/64; fe80::/10 pass; ff00::/8 pass"},
		{"other families' peers do not matter", []*ipsec.Policy{policy("protect fd01::/64 fd02::/64 192.0.2.1 192.0.2.2")}, PlanOptions{}, "fd02::/64 from fd01::/64 prefer 192.0.2.1"},
		{"multicast", []*ipsec.Policy{policy("protect 10.1.0.0/24 224.0.0.5/32 192.0.2.1 192.0.2.2"), policy("protect 239.0.0.1/32 10.2.0.0/24 192.0.2.1 192.0.2.2")}, PlanOptions{}, ""},
		{"bypass and discard", []*ipsec.Policy{policy("bypass 0.0.0.0/0 10.2.0.9/32"), policy("discard 0.0.0.0/0 10.3.0.0/24"), policy("protect 10.1.0.0/24 10.2.0.0/16 192.0.2.1 192.0.2.2"), policy("bypass 0.0.0.0/0 10.3.0.0/24")},
			PlanOptions{}, "10.2.0.0/16 from 10.1.0.0/24 prefer 192.0.2.1; 10.2.0.9/32 pass; 10.3.0.0/24"},
		{"bypass of some", []*ipsec.Policy{port, policy("bypass 10.1.0.1/32 10.2.0.9/32"), policy("protect 10.1.0.0/24 10.2.0.0/24 192.0.2.1 192.0.2.2")}, PlanOptions{}, "10.2.0.0/24 from 10.1.0.0/24 prefer 192.0.2.1"},
		{"an address that is awaited", []*ipsec.Policy{policy("protect 10.9.0.0/24 10.2.0.0/24 192.0.2.1 192.0.2.2"), policy("protect 0.0.0.0/0 10.3.0.0/24 192.0.2.1 192.0.2.2"), policy("protect 10.1.0.0/24 10.4.0.0/24 192.0.2.1 192.0.2.2")},
			PlanOptions{Awaited: []netip.Addr{adr("10.9.0.7")}}, "10.2.0.0/24 from 10.9.0.0/24 prefer 192.0.2.1 awaited; 10.3.0.0/24 from 0.0.0.0/0 prefer 192.0.2.1; 10.4.0.0/24 from 10.1.0.0/24 prefer 192.0.2.1"},
		{"an address that is awaited, from within", []*ipsec.Policy{policy("protect 10.9.0.0/24 192.0.2.2/32 192.0.2.1 192.0.2.2"), policy("protect 10.9.0.0/24 10.3.0.0/24 0.0.0.0 0.0.0.0")},
			PlanOptions{Awaited: []netip.Addr{adr("10.9.0.7")}}, "10.3.0.0/24 from 10.9.0.0/24; 192.0.2.2/32 from 10.9.0.0/24 prefer 192.0.2.1"},
		{"an address that is awaited, its peer covered", []*ipsec.Policy{policy("protect 192.0.2.1/32 192.0.0.0/16 192.0.2.1 192.0.2.2"), policy("protect 10.9.0.0/24 192.0.2.0/24 192.0.2.1 192.0.2.2")},
			PlanOptions{Awaited: []netip.Addr{adr("10.9.0.7")}}, "192.0.0.0/16 from 192.0.2.1/32 prefer 192.0.2.1; 192.0.2.0/24 from 10.9.0.0/24 prefer 192.0.2.1"},
		{"drop the rest", nil, PlanOptions{DropRest: true},
			"0.0.0.0/0; 127.0.0.0/8 pass; 224.0.0.0/4 pass; 255.255.255.255/32 pass; ::/0; ::1/128 pass; fe80::/10 pass; ff00::/8 pass"},
	} {
		if got := show(Plan(tt.ps, nil, tt.o)); got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

// With PerSA there is no route without an SA, and with it one for what the SA holds.
func TestPlanPerSA(t *testing.T) {
	o := PlanOptions{PerSA: true}
	ps := []*ipsec.Policy{policy("protect 10.1.0.0/24 10.2.0.0/16 192.0.2.1 0.0.0.0"), policy("discard 0.0.0.0/0 10.9.0.0/24")}
	sa := func(reqid ipsec.ReqID, from, to string) *ipsec.SAParams {
		return &ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: adr("192.0.2.2")}, Src: adr("192.0.2.1"), Mode: ipsec.Tunnel, ReqID: reqid,
			DstTS: []ipsec.TrafficSelector{{Start: adr(from), End: adr(to), PortHi: 65535}}}
	}
	for _, tt := range []struct {
		name string
		sas  []*ipsec.SAParams
		want string
	}{
		{"none", nil, "10.9.0.0/24"},
		{"another's", []*ipsec.SAParams{sa(8, "10.2.3.0", "10.2.3.255")}, "10.9.0.0/24"},
		{"narrower", []*ipsec.SAParams{sa(7, "10.2.3.0", "10.2.3.255")}, "10.2.3.0/24 from 10.1.0.0/24 prefer 192.0.2.1; 10.9.0.0/24"},
		{"wider", []*ipsec.SAParams{sa(7, "0.0.0.0", "255.255.255.255")}, "10.2.0.0/16 from 10.1.0.0/24 prefer 192.0.2.1; 10.9.0.0/24"},
		{"a range", []*ipsec.SAParams{sa(7, "10.2.0.1", "10.2.0.3")}, "10.2.0.1/32 from 10.1.0.0/24 prefer 192.0.2.1; 10.2.0.2/31 from 10.1.0.0/24 prefer 192.0.2.1; 10.9.0.0/24"},
	} {
		if got := show(Plan(ps, tt.sas, o)); got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
	tr := &ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: adr("192.0.2.2")}, Src: adr("192.0.2.1"), Mode: ipsec.Transport, ReqID: 7}
	if got := show(Plan([]*ipsec.Policy{policy("protect 0.0.0.0/0 192.0.2.0/24")}, []*ipsec.SAParams{tr}, o)); got != "192.0.2.2/32 from 0.0.0.0/0 prefer 192.0.2.1" {
		t.Errorf("transport: got %s", got)
	}
	// An SA for an address that its peer has assigned tells where packets come from,
	// whether routes are for SAs or for policies, and whatever our end of the tunnel is.
	all := []*ipsec.Policy{policy("protect 0.0.0.0/0 10.2.0.0/24 192.0.2.1 192.0.2.2"), policy("protect 0.0.0.0/0 10.3.0.0/24 192.0.2.1 192.0.2.3")}
	vip := sa(7, "10.2.0.0", "10.2.0.255")
	vip.SrcTS = []ipsec.TrafficSelector{{Start: adr("10.9.0.1"), End: adr("10.9.0.1"), PortHi: 65535}}
	given := PlanOptions{Assigned: []netip.Addr{adr("10.9.0.1")}}
	if got, want := show(Plan(all, []*ipsec.SAParams{vip}, given)), "10.2.0.0/24 from 10.9.0.1/32 from 0.0.0.0/0 prefer 192.0.2.1; 10.3.0.0/24 from 0.0.0.0/0 prefer 192.0.2.1"; got != want {
		t.Errorf("assigned:\n got %s\nwant %s", got, want)
	}
	given.PerSA = true
	if got, want := show(Plan(all, []*ipsec.SAParams{vip}, given)), "10.2.0.0/24 from 10.9.0.1/32 from 0.0.0.0/0 prefer 192.0.2.1"; got != want {
		t.Errorf("assigned, per SA:\n got %s\nwant %s", got, want)
	}
	// The peer that an SA tells of is excluded as one that a policy names.
	wide := []*ipsec.Policy{policy("protect 10.1.0.0/24 192.0.2.0/24 192.0.2.1 0.0.0.0")}
	if got := show(Plan(wide, []*ipsec.SAParams{sa(7, "192.0.2.0", "192.0.2.255")}, PlanOptions{})); !strings.Contains(got, "192.0.2.2/32 pass") {
		t.Errorf("peer of an SA: got %s", got)
	}
}

func TestPrefixes(t *testing.T) {
	for _, tt := range [][]string{
		{"0.0.0.0", "255.255.255.255", "0.0.0.0/0"},
		{"255.255.255.255", "255.255.255.255", "255.255.255.255/32"},
		{"10.0.0.1", "10.0.0.6", "10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6/32"},
		{"::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::/0"},
		{"fd00::", "fd00::ffff", "fd00::/112"},
		{"10.0.0.2", "10.0.0.1"},
		{"10.0.0.2", "fd00::1"},
	} {
		if got := prefixes(adr(tt[0]), adr(tt[1])); fmt.Sprint(got) != fmt.Sprint(tt[2:]) {
			t.Errorf("%v: got %v", tt, got)
		}
	}
	// A family of prefixes covers the range and nothing else.
	for _, p := range prefixes(adr("10.0.3.7"), adr("10.1.200.9")) {
		if p.Addr().Less(adr("10.0.3.7")) || adr("10.1.200.9").Less(last(p)) {
			t.Errorf("%v reaches out", p)
		}
	}
	if !slices.IsSortedFunc(prefixes(adr("1.2.3.4"), adr("9.8.7.6")), compare) {
		t.Error("not in order")
	}
}
