package datapath

import (
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
)

// TestAnyPeer: one policy serves peers of any address. A packet goes by the SA
// that holds it, to that peer; without one it is dropped and nobody is asked.
// What comes in is taken from the peer that may send it.
func TestAnyPeer(t *testing.T) {
	for _, open := range []string{"far end", "both ends"} {
		p := gcm(pairs()["tunnel 4 in 4"])
		r := p.request()
		r.Dst = netip.IPv4Unspecified()
		if open == "both ends" {
			r.Src = r.Dst
		}
		in := r
		in.Src, in.Dst = r.Dst, r.Src
		gw := newNode(t, p.src)
		inner := netip.PrefixFrom(p.out, 16).Masked()
		sel := ipsec.Selector{Src: prefix(p.in), Dst: inner}
		gw.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{r}})
		gw.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel.Reverse(), Action: ipsec.Protect, Requests: []ipsec.Request{in}})
		only := func(a netip.Addr) []ipsec.TrafficSelector {
			return []ipsec.TrafficSelector{{Start: a, End: a, PortHi: 65535}}
		}
		second := p
		second.dst, second.out = p.dst.Next(), p.out.Next()
		if out := gw.send(udpPacket(p.in, p.out, 1, 2, 64)); len(out) != 0 || len(gw.needs) != 0 {
			t.Fatalf("%s: without SA %d packets, %d asked for, want none", open, len(out), len(gw.needs))
		}
		gw.wantCount(map[Counter]uint64{DropOutNoPeer: 1})
		for k, w := range []*pair{&p, &second} {
			sa := w.params()
			sa.SPI = ipsec.SPI(0x1000 + k)
			sa.DstTS, sa.SrcTS = only(w.out), only(w.in)
			gw.sa(sa)
			peer := newNode(t, w.dst)
			peer.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(w.in), Dst: prefix(w.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{w.request()}})
			peer.sa(sa)
			ip := udpPacket(w.in, w.out, 1, 2, 64)
			out := gw.send(ip)
			if len(out) != 1 || netip.AddrFrom4([4]byte(out[0][16:20])) != w.dst {
				t.Fatalf("%s: peer %d: %d packets, want one to %v", open, k, len(out), w.dst)
			}
			if got := peer.receive(out[0]); len(got) != 1 || string(got[0]) != string(ip) {
				t.Errorf("%s: peer %d did not get the packet", open, k)
			}
			// The way back, also with the other's inner address.
			back := *w
			back.src, back.dst, back.in, back.out = w.dst, w.src, w.out, w.in
			sa = back.params()
			sa.SPI = ipsec.SPI(0x2000 + k)
			sa.SrcTS, sa.DstTS = only(back.in), only(back.out)
			gw.sa(sa)
			wide := back.params()
			wide.SPI = sa.SPI
			peer.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: inner, Dst: prefix(w.in)}, Action: ipsec.Protect, Requests: []ipsec.Request{back.request()}})
			peer.sa(wide)
			for from, want := range map[netip.Addr]int{w.out: 1, w.out.Next(): 0} {
				sent := peer.send(udpPacket(from, w.in, 2, 1, 64))
				if len(sent) != 1 {
					t.Fatalf("%s: peer %d sends %d packets", open, k, len(sent))
				}
				if got := gw.receive(sent[0]); len(got) != want {
					t.Errorf("%s: peer %d from %v: %d packets taken, want %d", open, k, from, len(got), want)
				}
			}
		}
		if out := gw.send(udpPacket(p.in, second.out.Next(), 1, 2, 64)); len(out) != 0 || len(gw.needs) != 0 {
			t.Errorf("%s: a packet for nobody: %d sent, %d asked for", open, len(out), len(gw.needs))
		}
		gw.wantCount(map[Counter]uint64{DropOutNoPeer: 2, OutProtected: 2, InProtected: 2, DropInSelector: 2})
	}
}
