package sa

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// ts reads "10.0.0.0-10.0.0.9/6/80-90": addresses, protocol, ports.
func ts(t *testing.T, s string) ipsec.TrafficSelector {
	t.Helper()
	f := strings.Split(s, "/")
	lo, hi, ok := strings.Cut(f[0], "-")
	if !ok {
		hi = lo
	}
	x := ipsec.TrafficSelector{Start: netip.MustParseAddr(lo), End: netip.MustParseAddr(hi), PortHi: 65535}
	num := func(s string) (n uint16) {
		for _, c := range s {
			n = n*10 + uint16(c-'0')
		}
		return n
	}
	if len(f) > 1 {
		x.Proto = uint8(num(f[1]))
	}
	if len(f) > 2 {
		a, b, _ := strings.Cut(f[2], "-")
		x.PortLo, x.PortHi = num(a), num(b)
	}
	return x
}

func list(t *testing.T, l ...string) (o []ipsec.TrafficSelector) {
	t.Helper()
	for _, s := range l {
		o = append(o, ts(t, s))
	}
	return o
}

func TestNarrow(t *testing.T) {
	for _, c := range []struct {
		name                string
		offered, ours, want []string
	}{
		{"same", []string{"10.0.0.0-10.0.0.9"}, []string{"10.0.0.0-10.0.0.9"}, []string{"10.0.0.0-10.0.0.9"}},
		{"ours smaller", []string{"10.0.0.0-10.0.0.9"}, []string{"10.0.0.3-10.0.0.4"}, []string{"10.0.0.3-10.0.0.4"}},
		{"ours larger", []string{"10.0.0.3"}, []string{"10.0.0.0-10.0.0.9"}, []string{"10.0.0.3"}},
		{"overlap", []string{"10.0.0.0-10.0.0.9"}, []string{"10.0.0.5-10.0.0.20"}, []string{"10.0.0.5-10.0.0.9"}},
		{"disjoint", []string{"10.0.0.0-10.0.0.9"}, []string{"10.0.0.10"}, nil},
		{"families", []string{"10.0.0.1"}, []string{"::-ffff::"}, nil},
		{"IPv6", []string{"fd00::-fd00::9"}, []string{"fd00::5-fd01::"}, []string{"fd00::5-fd00::9"}},
		{"protocol narrows", []string{"10.0.0.1"}, []string{"10.0.0.1/6"}, []string{"10.0.0.1/6"}},
		{"other protocol", []string{"10.0.0.1/17"}, []string{"10.0.0.1/6"}, nil},
		{"ports", []string{"10.0.0.1/6/0-100"}, []string{"10.0.0.1/6/80-443"}, []string{"10.0.0.1/6/80-100"}},
		{"ports disjoint", []string{"10.0.0.1/6/0-79"}, []string{"10.0.0.1/6/80-80"}, nil},
		{"opaque and any", []string{"10.0.0.1/6/65535-0"}, []string{"10.0.0.1"}, []string{"10.0.0.1/6/65535-0"}},
		{"opaque and port", []string{"10.0.0.1/6/65535-0"}, []string{"10.0.0.1/6/1-65535"}, nil},
		{"packet first", []string{"10.0.0.7/6/1000-1000", "10.0.0.0-10.0.0.9"}, []string{"10.0.0.0-10.0.0.255"},
			[]string{"10.0.0.7/6/1000-1000", "10.0.0.0-10.0.0.9"}},
		{"what is held already", []string{"10.0.0.0-10.0.0.9", "10.0.0.7"}, []string{"10.0.0.0-10.0.0.255"}, []string{"10.0.0.0-10.0.0.9"}},
		{"several of ours", []string{"10.0.0.0-10.0.0.255"}, []string{"10.0.0.1", "10.0.0.3/6", "11.0.0.1"}, []string{"10.0.0.1", "10.0.0.3/6"}},
		{"nothing offered", nil, []string{"10.0.0.1"}, nil},
	} {
		got, want := narrow(list(t, c.offered...), list(t, c.ours...)), list(t, c.want...)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", c.name, got, want)
		}
		if len(got) > 0 && (!allWithin(got, list(t, c.offered...)) || !allWithin(got, list(t, c.ours...))) {
			t.Errorf("%s: %v is not within both", c.name, got)
		}
	}
}

func TestSelectorTS(t *testing.T) {
	p := netip.MustParsePrefix
	for _, c := range []struct {
		name        string
		sel         ipsec.Selector
		local, peer string
	}{
		{"hosts", ipsec.Selector{Src: p("10.0.0.1/32"), Dst: p("10.0.0.2/32")}, "10.0.0.1", "10.0.0.2"},
		{"networks", ipsec.Selector{Src: p("10.1.0.0/16"), Dst: p("0.0.0.0/0")}, "10.1.0.0-10.1.255.255", "0.0.0.0-255.255.255.255"},
		{"odd prefix", ipsec.Selector{Src: p("10.0.0.5/30"), Dst: p("fd00::/127")}, "10.0.0.4-10.0.0.7", "fd00::-fd00::1"},
		{"ports", ipsec.Selector{Src: p("10.0.0.1/32"), Dst: p("10.0.0.2/32"), Proto: 6, DstPort: 80}, "10.0.0.1/6", "10.0.0.2/6/80-80"},
		{"ICMP", ipsec.Selector{Src: p("10.0.0.1/32"), Dst: p("10.0.0.2/32"), Proto: 1}, "10.0.0.1/1", "10.0.0.2/1"},
		{"ICMP type", ipsec.Selector{Src: p("10.0.0.1/32"), Dst: p("10.0.0.2/32"), Proto: 1, SrcPort: 9}, "10.0.0.1/1/2048-2303", "10.0.0.2/1/2048-2303"},
		{"ICMP type and code", ipsec.Selector{Src: p("10.0.0.1/32"), Dst: p("10.0.0.2/32"), Proto: 1, SrcPort: 4, DstPort: 5}, "10.0.0.1/1/772-772", "10.0.0.2/1/772-772"},
	} {
		l, r := selectorTS(c.sel)
		if l != ts(t, c.local) || r != ts(t, c.peer) {
			t.Errorf("%s: got %v, %v, want %s, %s", c.name, l, r, c.local, c.peer)
		}
	}
}

func TestFromWire(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	in := []ikev2.TrafficSelector{
		{Type: ikev2.TSIPv4Range, Start: a, End: b, EndPort: 65535},
		{Type: ikev2.TSIPv4Range, Start: b, End: a, EndPort: 65535},                         // backwards
		{Type: ikev2.TSIPv4Range, Start: a, End: b, Proto: 6, StartPort: 9, EndPort: 8},     // backwards
		{Type: ikev2.TSIPv4Range, Start: a, End: b, Proto: 6, StartPort: 65535, EndPort: 0}, // OPAQUE
		{Type: ikev2.TSSecLabel, Raw: []byte("label")},                                      // unknown
		{Type: ikev2.TSIPv6Range, Start: netip.MustParseAddr("fd00::1"), End: netip.MustParseAddr("fd00::1"), EndPort: 65535},
	}
	got := fromWire(in)
	if len(got) != 3 {
		t.Fatalf("got %v, want three", got)
	}
	back := toWire(got)
	if back[0].Type != ikev2.TSIPv4Range || back[2].Type != ikev2.TSIPv6Range || back[1].StartPort != 65535 {
		t.Errorf("got %v", back)
	}
}

// The packet's selectors go first, the responder narrows to its policy, and both
// install the same.
func TestNarrowing(t *testing.T) {
	l := newLab(t)
	l.b.policies = []Policy{
		policy(ipsec.Selector{Src: pfx("10.2.9.0/24"), Dst: pfx("10.1.0.0/16")}, ipsec.Tunnel, 7), // not for this packet
		policy(ipsec.Selector{Src: pfx("10.2.3.0/24"), Dst: pfx("10.1.0.0/16"), Proto: 6, SrcPort: 80}, ipsec.Tunnel, 8),
	}
	r := reqA(1)
	r.Flow = &ipsec.Flow{Src: netip.MustParseAddr("10.1.0.5"), Dst: netip.MustParseAddr("10.2.3.4"), Proto: 6, SrcPort: 1234, DstPort: 80}
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, r))
	l.settle()
	l.want(1)
	q := l.b.queries[0]
	if q.PeerTS[0] != ts(t, "10.1.0.5/6/1234-1234") || q.LocalTS[0] != ts(t, "10.2.3.4/6/80-80") || len(q.PeerTS) != 2 {
		t.Errorf("asked for %v, %v", q.LocalTS, q.PeerTS)
	}
	in := told[InstallChild](l.b)[0].In
	if in.ReqID != 8 {
		t.Errorf("reqid %d, want 8: the policy of the packet", in.ReqID)
	}
	want := list(t, "10.2.3.4/6/80-80", "10.2.3.0-10.2.3.255/6/80-80")
	if !slices.Equal(in.DstTS, want) || !slices.Equal(told[InstallChild](l.a)[0].Out.DstTS, want) {
		t.Errorf("b %v, a %v, want %v", in.DstTS, told[InstallChild](l.a)[0].Out.DstTS, want)
	}
	// Rekeying keeps what was narrowed.
	l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
	l.settle()
	l.want(1)
	if got := told[InstallChild](l.a)[1].Out.DstTS; !slices.Equal(got, want) {
		t.Errorf("rekeyed: %v, want %v", got, want)
	}
}

// Of policies of which one lies in the other's range, each gets its own SA when
// the peer begins without a packet; a packet that the peer names decides.
func TestOverlapping(t *testing.T) {
	inner, outer := tunnel("10.2.3.0/24", "10.1.3.0/24", 7), tunnel("10.2.0.0/16", "10.1.0.0/16", 8)
	flow := &ipsec.Flow{Src: netip.MustParseAddr("10.1.3.1"), Dst: netip.MustParseAddr("10.2.3.1"), Proto: 17, SrcPort: 1000, DstPort: 53}
	for _, tt := range []struct {
		name string
		ask  Policy
		flow *ipsec.Flow
		want ipsec.ReqID
		dst  string
	}{
		{"the outer", tunnel("10.1.0.0/16", "10.2.0.0/16", 11), nil, 8, "10.2.0.0-10.2.255.255"},
		{"the inner", tunnel("10.1.3.0/24", "10.2.3.0/24", 11), nil, 7, "10.2.3.0-10.2.3.255"},
		{"a packet of the inner", tunnel("10.1.0.0/16", "10.2.0.0/16", 11), flow, 7, "10.2.3.0-10.2.3.255"},
		{"part of both", tunnel("10.1.0.0/16", "10.2.3.0/24", 11), nil, 8, "10.2.3.0-10.2.3.255"},
		{"more than both", tunnel("10.0.0.0/8", "10.2.0.0/15", 11), nil, 7, "10.2.3.0-10.2.3.255"},
	} {
		l := newLab(t)
		l.b.policies = []Policy{inner, outer}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, ChildRequest{Seq: 1, Policy: tt.ask, Flow: tt.flow}))
		l.settle()
		l.want(1)
		in := told[InstallChild](l.b)[0].In
		if last := in.DstTS[len(in.DstTS)-1]; in.ReqID != tt.want || last != ts(t, tt.dst) {
			t.Errorf("%s: reqid %d for %v, want %d for %s", tt.name, in.ReqID, in.DstTS, tt.want, tt.dst)
		}
	}
}

// RFC 7296, 2.9: whoever is granted less than it asks for hears whether the rest may
// be had by another child SA.
func TestAdditionalTSPossible(t *testing.T) {
	one, other := tunnel("10.2.1.0/24", "10.1.0.0/16", 7), tunnel("10.2.2.0/24", "10.1.0.0/16", 8)
	flows := tunnel("10.2.0.0/16", "10.1.0.0/16", 9)
	flows.Out.Flags = ipsec.PolicyPerFlow
	flow := &ipsec.Flow{Src: netip.MustParseAddr("10.1.3.1"), Dst: netip.MustParseAddr("10.2.3.1"), Proto: 17, SrcPort: 1000, DstPort: 53}
	for _, tt := range []struct {
		name     string
		policies []Policy
		flow     *ipsec.Flow
		want     bool
	}{
		{"all", []Policy{tunnel("10.2.0.0/16", "10.1.0.0/16", 7), one}, nil, false},
		{"a part", []Policy{one}, nil, false},
		{"a part of two", []Policy{one, other}, nil, true},
		{"the other is elsewhere", []Policy{one, tunnel("10.3.0.0/16", "10.1.0.0/16", 8)}, nil, false},
		{"the other is in another mode", []Policy{one, policy(ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("0.0.0.0/0")}, ipsec.Transport, 8)}, nil, false},
		{"one flow", []Policy{flows}, flow, true},
	} {
		l := newLab(t)
		l.b.policies = tt.policies
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		said := func() bool {
			m := told[Message](l.b)
			return strings.Contains(m[len(m)-1].Names(), "ADDITIONAL_TS_POSSIBLE")
		}
		l.a.do(l.a.sa.Start(l.now, ChildRequest{Seq: 1, Policy: reqA(1).Policy, Flow: tt.flow}))
		l.settle()
		l.want(1)
		if got := said(); got != tt.want {
			t.Errorf("%s: said %v, want %v", tt.name, got, tt.want)
		}
		// What replaces it is for the same.
		l.stop = func(p packet) bool { return p.from == l.b }
		l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
		l.run()
		if said() {
			t.Errorf("%s: said when rekeying", tt.name)
		}
	}
}

// The peer allows less than our policy, and a packet wants the rest: one child
// SA for what is allowed, and no more however many packets come.
func TestNarrowedAway(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.b.policies = []Policy{tunnel("10.2.0.64/28", "10.1.0.0/16", 22)}
		req := reqA(1)
		req.Flow = &ipsec.Flow{Src: netip.MustParseAddr("10.1.0.1"), Dst: netip.MustParseAddr("10.2.0.1"), Proto: 17, SrcPort: 1000, DstPort: 53}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, req))
		l.settle()
		l.want(1)
		l.a.do(l.a.sa.AddChild(l.now, ChildRequest{Seq: 2, Policy: req.Policy, Flow: req.Flow}))
		l.settle()
		l.want(1)
		if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 2 {
			t.Errorf("ChildFailed %v, want one for ACQUIRE 2", f)
		}
	})
}

// What a rule wants of TFC padding becomes the outbound SA's, unless the peer says
// that it wants none.
func TestTFCSending(t *testing.T) {
	for _, tt := range []struct {
		name         string
		mode         ipsec.Mode
		aggfrag      pad.AggFrag
		refuse       bool
		wantA, wantB uint16
	}{
		{"both", ipsec.Tunnel, pad.AggFragNo, false, 1000, ipsec.TFCPathMTU},
		{"refused", ipsec.Tunnel, pad.AggFragNo, true, 0, 0},
		{"transport mode", ipsec.Transport, pad.AggFragNo, false, 0, 0},
		{"AGGFRAG", ipsec.Tunnel, pad.AggFragPrefer, false, 0, 0},
	} {
		sel := ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("0.0.0.0/0")}
		l := newLab(t)
		l.establish()
		l.a.rule.TFC, l.b.rule.TFC = 1000, ipsec.TFCPathMTU
		l.a.rule.AggFrag, l.b.rule.AggFrag = tt.aggfrag, tt.aggfrag
		l.b.policies = []Policy{policy(sel, tt.mode, 2)}
		l.clearEvents()
		if tt.refuse {
			l.stop = func(packet) bool { return true }
		}
		l.a.do(l.a.sa.AddChild(l.now, ChildRequest{Seq: 2, Policy: policy(sel, tt.mode, 1)}))
		for range 2 * len(l.kept) { // the request, then the answer
			p := l.kept[0]
			l.kept = nil
			to := l.b
			if p.from == l.b {
				to = l.a
			}
			m, err := ikev2.Open(p.data, to.sa.cur.open)
			if err != nil {
				t.Fatal(err)
			}
			m.Payloads = append([]ikev2.Payload{notify(ikev2.ESP_TFC_PADDING_NOT_SUPPORTED)}, m.Payloads...)
			if p.data, err = m.AppendSealed(nil, p.from.sa.cur.seal); err != nil {
				t.Fatal(err)
			}
			l.deliver(p)
		}
		l.settle()
		l.want(2)
		for _, n := range []struct {
			*node
			want uint16
		}{{l.a, tt.wantA}, {l.b, tt.wantB}} {
			i := told[InstallChild](n.node)[0]
			if i.Out.TFC != n.want || i.In.TFC != 0 {
				t.Errorf("%s, %s: TFC out %d, in %d; want %d, 0", tt.name, n.name, i.Out.TFC, i.In.TFC, n.want)
			}
		}
	}
}

// Behind an inner IP header TFC padding is known for what it is; elsewhere we say
// that we want none (RFC 4303, 2.7).
func TestTFCPadding(t *testing.T) {
	sel := ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("0.0.0.0/0")}
	for _, m := range []ipsec.Mode{ipsec.Tunnel, ipsec.Transport} {
		l := newLab(t)
		l.b.policies = []Policy{policy(sel, m, 2)}
		l.establish()
		l.clearEvents()
		l.a.do(l.a.sa.AddChild(l.now, ChildRequest{Seq: 2, Policy: policy(sel, m, 1)}))
		l.settle()
		for _, n := range []*node{l.a, l.b} {
			said := false
			for _, o := range told[Message](n) {
				said = said || o.Dir == "sent" && o.Exchange == ikev2.CREATE_CHILD_SA && strings.Contains(o.Names(), "TFC_PADDING_NOT_SUPPORTED")
			}
			if said != (m == ipsec.Transport) {
				t.Errorf("%v mode, %s: ESP_TFC_PADDING_NOT_SUPPORTED said: %v", m, n.name, said)
			}
		}
	}
}
