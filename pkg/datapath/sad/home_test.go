package sad

import (
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// An SA that has moved is found by the ends that policy names, and only by them.
func TestHome(t *testing.T) {
	d := NewDB()
	p := params(256, 7)
	p.Src, p.Dst = netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
	p.Home = &ipsec.Ends{Src: src, Dst: dst}
	p.DstTS = []ipsec.TrafficSelector{{Start: dst, End: dst, PortHi: 65535}}
	s := mustNew(t, p)
	d.Insert(s)
	i := &packet.Info{Version: 4, Proto: 6, Src: src, Dst: dst, SrcPort: 1, DstPort: 80, HasPorts: true}
	open := netip.IPv4Unspecified()
	for _, c := range []struct {
		src, dst netip.Addr
		want     *SA
	}{{src, dst, s}, {p.Src, p.Dst, nil}, {src, p.Dst, nil}, {open, dst, s}, {src, open, s}, {p.Src, open, nil}} {
		if got := d.Out(OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, Src: c.src, Dst: c.dst}, i); got != c.want {
			t.Errorf("from %v to %v: got %v, want %v", c.src, c.dst, got, c.want)
		}
	}
	if d.Lookup(p.SAID) != s {
		t.Error("not found by its own destination")
	}
	d.Remove(s)
	if d.Out(OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, Src: src, Dst: dst}, i) != nil {
		t.Error("found after it was removed")
	}
}
