package sad

import (
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// warrior is the SA of a template to the k-th peer, for the inner prefixes ts.
func warrior(t testing.TB, k int, reqid ipsec.ReqID, ts ...string) *SA {
	t.Helper()
	s := fake(flowLike(t), ipsec.SPI(0x1000+k), netip.AddrFrom4([4]byte{198, 51, byte(k >> 8), byte(k)}), reqid)
	for _, x := range ts {
		p := netip.MustParsePrefix(x)
		end := p.Addr()
		for p.Contains(end.Next()) {
			end = end.Next()
		}
		s.P.DstTS = append(s.P.DstTS, ipsec.TrafficSelector{Start: p.Addr(), End: end, PortHi: 65535})
	}
	return s
}

// A template takes the SA whose selectors hold the packet, the narrowest
// destination first, and no SA of another policy, without selectors, or from
// another address of ours.
func TestTemplates(t *testing.T) {
	d := NewDB()
	open := netip.IPv4Unspecified()
	k := OutKey{ipsec.ESP, ipsec.Tunnel, 7, src, open, 0}
	to := func(a string) *packet.Info {
		return &packet.Info{Version: 4, Proto: 6, Src: src, Dst: netip.MustParseAddr(a), SrcPort: 1, DstPort: 80, HasPorts: true}
	}
	want := func(what string, k OutKey, to *packet.Info, want *SA) {
		t.Helper()
		if got := d.Out(k, to); got != want {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	want("empty", k, to("10.9.0.1"), nil)
	one, two, net := warrior(t, 1, 7, "10.9.0.1/32"), warrior(t, 2, 7, "10.9.0.2/32"), warrior(t, 3, 7, "10.9.0.0/24")
	split := warrior(t, 4, 7, "10.8.0.1/32", "10.8.255.0/24")
	other, bare, byHand := warrior(t, 5, 8, "10.9.0.1/32"), warrior(t, 6, 7), warrior(t, 7, 0, "10.7.0.1/32")
	six := fake(flowLike(t), 0x2000, dst, 7)
	any6, last6 := netip.MustParseAddr("2001:db8::"), netip.MustParseAddr("2001:db8::ffff")
	six.P.DstTS = []ipsec.TrafficSelector{{Start: any6, End: last6, PortHi: 65535}}
	all := []*SA{one, two, net, split, other, bare, byHand, six}
	for _, s := range all {
		if !d.Insert(s) {
			t.Fatal("exists")
		}
	}
	want("first", k, to("10.9.0.1"), one)
	want("second", k, to("10.9.0.2"), two)
	want("a net", k, to("10.9.0.3"), net)
	want("two selectors", k, to("10.8.255.9"), split)
	want("between two selectors", k, to("10.8.7.9"), nil)
	want("nobody's", k, to("10.10.0.1"), nil)
	want("by hand, of no policy", k, to("10.7.0.1"), nil)
	want("IPv6", k, &packet.Info{Version: 6, Dst: any6.Next()}, six)
	if got := d.OutManual(k, to("10.7.0.1"), nil); got != byHand {
		t.Errorf("OutManual: got %v, want the SA without reqid", got)
	}
	k2 := k
	k2.Src = open
	want("both ends open", k2, to("10.9.0.1"), one)
	k2.Src, k2.Dst = dst, open
	want("another address of ours", k2, to("10.9.0.1"), nil)
	k2.Src, k2.Dst = open, one.P.Dst
	want("one peer", k2, to("10.9.0.1"), one)
	want("another peer's", k2, to("10.9.0.2"), nil)
	if d.Out(k, nil) != nil {
		t.Error("without a packet: got an SA, want none")
	}
	one.SetState(Dying)
	want("mature before dying", k, to("10.9.0.1"), net)
	d.Remove(net)
	want("dying before none", k, to("10.9.0.1"), one)
	newer := warrior(t, 8, 7, "10.9.0.2/32")
	d.Insert(newer)
	want("newest", k, to("10.9.0.2"), newer)
	all = append(all, newer)
	for _, s := range all {
		d.Remove(s)
	}
	want("all gone", k, to("10.9.0.1"), nil)
	if n := len(d.dests[0].list()) + len(d.dests[1].list()); n != 0 || d.out.n != 0 {
		t.Errorf("left: %d lengths, %d lists", n, d.out.n)
	}
}

func TestTemplateNoAlloc(t *testing.T) {
	d := NewDB()
	d.Insert(warrior(t, 1, 7, "10.9.0.1/32"))
	d.Insert(warrior(t, 2, 7, "10.9.0.0/24"))
	i := &packet.Info{Version: 4, Proto: 6, Src: src, Dst: netip.MustParseAddr("10.9.0.7")}
	k := OutKey{ipsec.ESP, ipsec.Tunnel, 7, src, netip.IPv4Unspecified(), 0}
	if n := testing.AllocsPerRun(100, func() {
		if d.Out(k, i) == nil {
			t.Fatal("no SA")
		}
	}); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}

// BenchmarkOutTemplate: the number of peers behind one template does not matter.
func BenchmarkOutTemplate(b *testing.B) {
	for _, n := range []int{1, 10000} {
		b.Run(map[int]string{1: "1", 10000: "10000"}[n], func(b *testing.B) {
			d := NewDB()
			for k := range n {
				d.Insert(warrior(b, k, 7, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(k >> 8), byte(k)}), 32).String()))
			}
			i := &packet.Info{Version: 4, Proto: 6, Src: src, Dst: netip.MustParseAddr("10.9.0.0")}
			k := OutKey{ipsec.ESP, ipsec.Tunnel, 7, src, netip.IPv4Unspecified(), 0}
			for b.Loop() {
				if d.Out(k, i) == nil {
					b.Fatal("no SA")
				}
			}
		})
	}
}
