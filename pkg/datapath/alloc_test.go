package datapath

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// frugal are the suites of which a packet may not cost an allocation.
func frugal(t *testing.T) []suite {
	if !purego {
		return suites
	}
	t.Log("ChaCha20-Poly1305 is left out: the portable code of x/crypto allocates")
	return slices.DeleteFunc(slices.Clone(suites), func(s suite) bool { return s.encr == alg.EncrChaCha20Poly1305 })
}

// TestNoAlloc: the paths of ordinary packets allocate nothing.
func TestNoAlloc(t *testing.T) {
	suites := frugal(t)
	for name, p := range pairs() {
		for _, s := range suites {
			p.suite = s
			out, in := hotPath(t, p)
			if n := testing.AllocsPerRun(100, out); n != 0 {
				t.Errorf("%s %v outbound: %v allocations a packet", name, s, n)
			}
			if n := testing.AllocsPerRun(100, in); n != 0 {
				t.Errorf("%s %v inbound: %v allocations a packet", name, s, n)
			}
		}
	}
}

// hotPath returns functions that send one packet of 1300 octets, and receive one.
func hotPath(t testing.TB, p pair) (out, in func()) {
	a, b, _, _ := p.nodes(t)
	q := p.params()
	q.ReplayWindow, q.SPI = 0, 0x2000
	b.sa(q)
	c := newNode(t, p.src)
	c.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	c.sa(q)
	ip := udpPacket(p.in, p.out, 1, 2, 1300)
	sealed := c.send(ip)[0]
	a.quiet, b.quiet = true, true
	now := time.Now()
	out = a.sender(ip)
	buf := make([]byte, bufSize)
	var i packet.Info
	packet.Decode(sealed, &i)
	d := wire.Datagram{Buf: buf, Local: netip.AddrPortFrom(p.dst, 4500), Remote: netip.AddrPortFrom(p.src, 4500)}
	in = func() {
		if p.encap != nil {
			d.Off = headroom + packet.IPv6Len
			d.Len = copy(buf[d.Off:], sealed[i.HdrLen+8:])
			b.e.in[1].datagram(&d, now)
			b.e.in[1].flush(now)
			return
		}
		copy(buf[headroom+etherLen:], sealed)
		b.e.in[0].ip(buf, headroom+etherLen, len(sealed), tap.Offload{}, now)
		b.e.in[0].flush(now)
	}
	out()
	in()
	if s := a.e.Stats(); s[OutProtected] != 1 {
		t.Fatalf("not sent: %v", s.nonzero())
	}
	if s := b.e.Stats(); s[InProtected] != 1 {
		t.Fatalf("not received: %v", s.nonzero())
	}
	return out, in
}

func BenchmarkPacket(b *testing.B) {
	for _, name := range []string{"transport 4", "tunnel 4 in 4", "udp tunnel 6 in 4"} {
		for _, s := range []suite{suites[0], suites[4], suites[7]} {
			p := pairs()[name]
			p.suite = s
			out, in := hotPath(b, p)
			b.Run(name+"/"+s.String()+"/out", func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(1300)
				for b.Loop() {
					out()
				}
			})
			b.Run(name+"/"+s.String()+"/in", func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(1300)
				for b.Loop() {
					in()
				}
			})
		}
	}
}
