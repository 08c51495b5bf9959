package datapath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

// crowd is a gateway with n peers: a tunnel, a policy and an SA for each, one
// direction. Peer k has the network of the one address 11.0.0.0+k.
type crowd struct {
	*node
	frames [][]byte // what the kernel sends, or the interface receives, for peer k
}

func numbered(first byte, k int) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(first)<<24+uint32(k))
	return netip.AddrFrom4(b)
}

// newCrowd makes the gateway that sends (Out) or receives (In) packets with size
// octets of payload. Packets for the peers of which are made.
func newCrowd(t testing.TB, dir ipsec.Direction, n, size int, of []int) *crowd {
	c := &crowd{node: newNode(t, a4, ia4)}
	c.e.out.flows, c.e.in[0].flows = flow.New(flow.DefaultSize), flow.New(flow.DefaultSize)
	key := ipsec.NewKey(make([]byte, 20))
	params := func(k int) *ipsec.SAParams {
		p := &ipsec.SAParams{
			SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: numbered(12, k), SPI: ipsec.SPI(0x1000 + k)}, Src: a4,
			Mode: ipsec.Tunnel, ReqID: ipsec.ReqID(k + 1), Encr: alg.EncrAESGCM16, EncrKey: key,
		}
		if dir == ipsec.In {
			p.Dst, p.Src = a4, numbered(12, k)
		}
		return p
	}
	ed := c.e.c.SPD.Begin()
	for k := range n {
		p := params(k)
		pol := ipsec.Policy{
			Dir: dir, Sel: ipsec.Selector{Src: prefix(ia4), Dst: prefix(numbered(11, k))}, Action: ipsec.Protect,
			Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: ipsec.LevelUnique, ReqID: p.ReqID, Src: p.Src, Dst: p.Dst}},
		}
		if dir == ipsec.In {
			pol.Sel.Src, pol.Sel.Dst = pol.Sel.Dst, pol.Sel.Src
		}
		if _, err := ed.Add(&pol, time.Now()); err != nil {
			t.Fatal(err)
		}
		c.sa(p)
	}
	if err := ed.Commit(); err != nil {
		t.Fatal(err)
	}
	for _, k := range of {
		b := udpPacket(ia4, numbered(11, k), 1, 2, size)
		if dir == ipsec.In {
			// The peer's half, which nothing of c is used for.
			x := newNode(t, numbered(12, k))
			p := params(k)
			x.policy(ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Protect,
				Sel:      ipsec.Selector{Src: prefix(numbered(11, k)), Dst: prefix(ia4)},
				Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: ipsec.LevelUnique, ReqID: p.ReqID, Src: p.Src, Dst: p.Dst}}})
			x.sa(p)
			b = x.send(udpPacket(numbered(11, k), ia4, 1, 2, size))[0]
		}
		c.frames = append(c.frames, b)
	}
	c.quiet = true
	return c
}

// out and in carry a batch of n packets through the engine, for one peer after
// the other from at on.
func (c *crowd) out(at, n int, now time.Time) {
	w := c.e.out
	for j := range n {
		ip := c.frames[(at+j)%len(c.frames)]
		f := &w.frames[j]
		f.Off, f.Len = headroom, etherLen+len(ip)
		f.Buf[headroom+12], f.Buf[headroom+13] = 0x08, 0
		copy(f.Buf[headroom+etherLen:], ip)
		w.frame(f, now)
	}
	if err := w.flush(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *crowd) in(at, n int, now time.Time) {
	w := c.e.in[0]
	for j := range n {
		ip := c.frames[(at+j)%len(c.frames)]
		if w.pkts[j].Buf == nil {
			w.pkts[j].Buf = make([]byte, bufSize)
		}
		copy(w.pkts[j].Buf[headroom+etherLen:], ip)
		w.ip(w.pkts[j].Buf, headroom+etherLen, len(ip), tap.Offload{}, now)
	}
	if err := w.flush(now); err != nil {
		c.t.Fatal(err)
	}
}

// BenchmarkScale is the cost of a packet with 100,000 policies and SAs beside
// that with as many as there is traffic for: one of each, 100, all. Both carry
// batches of the same packets in turns; what is reported is the median of either
// and their ratio. With one active peer it must not be more than 1.1; with all
// the same work is compared to that with one, and shows what memory costs when
// every packet is another peer's.
func BenchmarkScale(b *testing.B) {
	const many, batch = 100_000, 32
	for _, dir := range []ipsec.Direction{ipsec.Out, ipsec.In} {
		for _, size := range []int{64, 1300} {
			for _, active := range []int{1, 100, many} {
				b.Run(fmt.Sprintf("%v/%d octets/%d active", dir, size, active), func(b *testing.B) {
					if dir == ipsec.In && active == many {
						b.Skip("as outbound, and takes minutes to set up")
					}
					of := make([]int, active)
					for j := range of {
						of[j] = j * (many / active)
					}
					few, first := active, make([]int, active)
					for j := range first {
						first[j] = j
					}
					if active == many {
						few, first = 1, first[:1]
					}
					x, y := newCrowd(b, dir, few, size, first), newCrowd(b, dir, many, size, of)
					run := (*crowd).out
					if dir == ipsec.In {
						run = (*crowd).in
					}
					now := time.Now()
					for at := 0; at < active; at += batch {
						run(y, at, batch, now)
						run(x, at, batch, now)
					}
					var ones, manys []time.Duration
					at := 0
					for b.Loop() {
						t0 := time.Now()
						run(x, at, batch, now)
						t1 := time.Now()
						run(y, at, batch, now)
						ones, manys = append(ones, t1.Sub(t0)), append(manys, time.Since(t1))
						at = (at + batch) % active
					}
					one, more := median(ones), median(manys)
					b.ReportMetric(0, "ns/op")
					b.ReportMetric(float64(one)/batch, "ns/packet-with-few")
					b.ReportMetric(float64(more)/batch, "ns/packet-with-100000")
					b.ReportMetric(float64(more)/float64(one), "ratio")
					if s := y.e.Stats(); s[OutProtected]+s[InProtected] < uint64(len(manys)*batch) {
						b.Fatal(s.nonzero())
					}
					if active == 1 && len(ones) > 1000 && float64(more) > 1.1*float64(one) {
						b.Errorf("%.2f times the cost of one policy and one SA, want at most 1.1", float64(more)/float64(one))
					}
				})
			}
		}
	}
}

func median(l []time.Duration) time.Duration {
	slices.Sort(l)
	return l[len(l)/2]
}
