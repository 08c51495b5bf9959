package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/replay"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

// packed runs f for SAs with AGGFRAG_PAYLOAD: families, natively, in UDP by
// the interface and by the socket.
func packed(t *testing.T, f func(t *testing.T, p pair, a, b *node)) {
	for name, p := range pairs() {
		if !p.aggfrag {
			continue
		}
		for _, s := range fastSuites {
			for _, socket := range []bool{false, true} {
				if socket && p.encap == nil {
					continue
				}
				t.Run(fmt.Sprintf("%s %v socket %v", name, s, socket), func(t *testing.T) {
					p := p
					p.suite = s
					a, b, _, _ := p.nodes(t)
					if socket {
						a.e.c.UDP = memUDP{n: a}
					}
					f(t, p, a, b)
				})
			}
		}
	}
}

// sameOrder: exactly these arrived.
func sameOrder(t *testing.T, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d packets arrived, want %d", len(got), len(want))
	}
	for k := range want {
		if !bytes.Equal(got[k], want[k]) {
			t.Fatalf("packet %d:\ngot  %x\nwant %x", k, got[k], want[k])
		}
	}
}

// TestPack: the small packets of a batch leave in as few ESP packets as the path
// MTU allows, in order, and arrive as they were.
func TestPack(t *testing.T) {
	packed(t, func(t *testing.T, p pair, a, b *node) {
		rnd := rand.New(rand.NewPCG(1, 2))
		var ips [][]byte
		var fs []*tap.Frame
		total := 0
		for k := range 60 {
			// One flow each, or coalescing would hide the order of flows.
			ip := udpPacket(p.in, p.out, uint16(1000+k), 7, 18+rnd.IntN(100))
			ips, fs = append(ips, ip), append(fs, frameOf(ip, tap.Offload{}))
			total += len(ip)
		}
		sent := a.sendFrames(fs...)
		for _, b := range sent {
			if len(b) > a.mtu {
				t.Errorf("%d octets left, MTU %d", len(b), a.mtu)
			}
		}
		if most := total/(a.mtu-300) + 1; len(sent) > most {
			t.Errorf("%d ESP packets for %d octets, want at most %d", len(sent), total, most)
		}
		a.wantCount(map[Counter]uint64{OutProtected: 60, OutAggregated: 60, OutAggregates: uint64(len(sent))})
		sameOrder(t, b.receiveBatch(&p, sent), ips)
		b.wantCount(map[Counter]uint64{InProtected: 60, InAggregated: 60, InAggregates: uint64(len(sent))})
	})
}

// TestPackSuper: so do the segments of super-frames, cut as they always are.
func TestPackSuper(t *testing.T) {
	packed(t, func(t *testing.T, p pair, a, b *node) {
		count := uint64(0)
		for _, spec := range superSpecs() {
			ip, o := spec.build(p.in, p.out)
			want := reference(t, ip, spec.size)
			sent := a.sendFrames(frameOf(ip, o))
			if len(sent) > len(want) || spec.size < 100 && len(want) > 10 && len(sent) > len(want)/8 {
				t.Fatalf("%s: %d ESP packets for %d segments", spec.name, len(sent), len(want))
			}
			for k, s := range sent {
				var i packet.Info
				if !packet.Decode(s, &i) || i.TOS != spec.tos || len(s) > a.mtu {
					t.Fatalf("%s: outer packet %d: %+v", spec.name, k, i)
				}
			}
			sameFlows(t, b.receiveBatch(&p, sent), want)
			count += uint64(len(want))
		}
		s := a.e.Stats()
		a.wantCount(map[Counter]uint64{OutProtected: count, OutAggregated: s[OutAggregated], OutAggregates: s[OutAggregates]})
	})
}

// TestPackMarks: packets of different DSCP or ECN do not share an outer header,
// and stay in order.
func TestPackMarks(t *testing.T) {
	p := gcm(pairs()["aggfrag 4 in 4"])
	a, b, _, _ := p.nodes(t)
	var ips [][]byte
	var fs []*tap.Frame
	for k, tos := range []byte{0, 0, 2, 2, 0xb8, 0, 0} {
		ip := udpPacket(p.in, p.out, uint16(1000+k), 7, 50)
		ip[1] = tos
		packet.FixIPv4Checksum(ip)
		ips, fs = append(ips, ip), append(fs, frameOf(ip, tap.Offload{}))
	}
	sent := a.sendFrames(fs...)
	var got []byte
	for _, s := range sent {
		got = append(got, s[1])
	}
	if !bytes.Equal(got, []byte{0, 2, 0xb8, 0}) {
		t.Fatalf("outer traffic classes %x", got)
	}
	sent[1][1] = 3 // congestion on the way reaches both packets in it
	packet.FixIPv4Checksum(sent[1])
	for _, k := range []int{2, 3} {
		packet.SetECN(ips[k], 3)
	}
	sameOrder(t, b.receive(sent...), ips)
}

// TestPackManySAs: flows of several SAs that take turns are packed all the same,
// each for its SA.
func TestPackManySAs(t *testing.T) {
	p := gcm(pairs()["aggfrag 4 in 4"])
	a, b := newNode(t, p.src), newNode(t, p.dst)
	for k := range uint32(6) {
		in, r := numbered(10, int(k)), p.request()
		r.ReqID = ipsec.ReqID(k + 1)
		sel := ipsec.Selector{Src: prefix(in), Dst: prefix(p.out)}
		q := p.params()
		q.ReqID, q.SPI = r.ReqID, ipsec.SPI(0x1000+k)
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{r}})
		b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{r}})
		a.sa(q)
		q = p.params()
		q.ReqID, q.SPI = r.ReqID, ipsec.SPI(0x1000+k)
		b.sa(q)
	}
	for _, n := range []int{4, 6} {
		var ips [][]byte
		var fs []*tap.Frame
		for k := range 60 {
			ip := udpPacket(numbered(10, k%n), p.out, uint16(1000+k), 7, 20)
			ips, fs = append(ips, ip), append(fs, frameOf(ip, tap.Offload{}))
		}
		sent := a.sendFrames(fs...)
		if n == 4 && len(sent) != 4 {
			t.Errorf("%d ESP packets for %d SAs", len(sent), n)
		}
		sameFlows(t, b.receive(sent...), ips)
	}
}

// TestPackFragments: what a peer cuts arrives, whatever the order; a
// part that is lost costs its packet and no other; and each packet is judged by
// itself.
func TestPackFragments(t *testing.T) {
	p := gcm(pairs()["aggfrag 4 in 4"])
	one, two, three := udpPacket(p.in, p.out, 1, 7, 100), udpPacket(p.in, p.out, 2, 7, 900), udpPacket(p.in, p.out, 3, 7, 100)
	alien := udpPacket(numbered(10, 99), p.out, 4, 7, 100)
	seal := func(a *node, sa *sad.SA, offset int, data ...[]byte) []byte {
		body := make([]byte, aggfrag.HeaderLen)
		binary.BigEndian.PutUint16(body[2:], uint16(offset))
		body = append(body, bytes.Join(data, nil)...)
		seq, _ := sa.NextSeq(1)
		n := sa.T.HeaderLen() + len(body) + sa.T.TrailerLen(len(body))
		out := make([]byte, packet.IPv4Len+n)
		packet.PutHeader(out, p.src, p.dst, protoESP, len(out), 64)
		packet.FixIPv4Checksum(out)
		one := []esp.Packet{espPacket(out[packet.IPv4Len:], append(make([]byte, 0, len(body)+64), body...), aggfrag.Protocol, seq)}
		sa.T.Seal(esp.NewScratch(), one)
		if one[0].Err != nil {
			t.Fatal(one[0].Err)
		}
		return out
	}
	parts := func(a *node, sa *sad.SA) [][]byte {
		return [][]byte{
			seal(a, sa, 0, one, two[:300]), seal(a, sa, 0, make([]byte, 40)),
			seal(a, sa, 628, two[300:600]), seal(a, sa, 328, two[600:], alien, three, make([]byte, 30)),
		}
	}
	for _, order := range [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}} {
		a, b, out, in := p.nodes(t)
		all := parts(a, out)
		var got [][]byte
		for _, k := range order {
			got = append(got, b.receive(all[k])...)
		}
		sameFlows(t, got, [][]byte{one, two, three})
		b.wantCount(map[Counter]uint64{InProtected: 3, InRejoined: 1, InAggregated: 2, InAggregates: 1, DropInSelector: 0, DropInPolicy: 1})
		if in.SelectorErrors.Load() != 1 {
			t.Errorf("%d selector errors", in.SelectorErrors.Load())
		}
	}
	a, b, out, _ := p.nodes(t)
	all := parts(a, out)
	var got [][]byte
	for _, k := range []int{0, 1, 3} {
		got = append(got, b.receive(all[k])...)
	}
	sameFlows(t, got, [][]byte{one, three})
}

// TestPackMalformed: a peer's mistakes are counted, and cost no packet in front.
func TestPackMalformed(t *testing.T) {
	p := gcm(pairs()["aggfrag 4 in 4"])
	plain := p
	plain.aggfrag = false
	ip := udpPacket(p.in, p.out, 1, 7, 100)

	a, _, _, _ := plain.nodes(t)
	_, b, _, _ := p.nodes(t)
	if got := b.receive(a.send(ip)...); len(got) != 0 {
		t.Error("plain tunnel mode passed an AGGFRAG SA")
	}
	b.wantCount(map[Counter]uint64{DropInMalformed: 1})

	a, _, _, _ = p.nodes(t)
	_, b, _, _ = plain.nodes(t)
	if got := b.receive(a.send(ip)...); len(got) != 0 {
		t.Error("AGGFRAG passed an SA of plain tunnel mode")
	}
	b.wantCount(map[Counter]uint64{DropInMalformed: 1})
}

// TestPackLimits: what is packed when an SA ends is dropped and counted, packet
// by packet.
func TestPackLimits(t *testing.T) {
	p := gcm(pairs()["aggfrag 4 in 4"])
	a := newNode(t, p.src)
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	q := p.params()
	q.Hard.Packets = 1 // ESP packets
	a.sa(q)
	frames := func() (fs []*tap.Frame) {
		for range 5 {
			fs = append(fs, frameOf(udpPacket(p.in, p.out, 1, 2, 64), tap.Offload{}))
		}
		return fs
	}
	if sent := a.sendFrames(frames()...); len(sent) != 1 {
		t.Fatalf("%d left", len(sent))
	}
	if sent := a.sendFrames(frames()...); len(sent) != 0 {
		t.Fatalf("%d left beyond the limit", len(sent))
	}
	a.wantCount(map[Counter]uint64{OutProtected: 5, OutAggregated: 5, OutAggregates: 1, DropOutLifetime: 5})
}

// TestPackNoAlloc: packing, unpacking and fragments allocate nothing.
func TestPackNoAlloc(t *testing.T) {
	packed(t, func(t *testing.T, p pair, a, b *node) {
		if purego && p.suite.encr == alg.EncrChaCha20Poly1305 {
			t.Skip("the portable code of x/crypto allocates")
		}
		if p.esn {
			return // the window that replays need would not be one
		}
		ip := udpPacket(p.in, p.out, 1, 2, 64)
		var fs []*tap.Frame
		for range batch {
			fs = append(fs, frameOf(ip, tap.Offload{}))
		}
		a.quiet = true
		now := time.Now()
		out := func() {
			for _, f := range fs {
				a.e.out.frame(f, now)
			}
			if err := a.e.out.flush(); err != nil {
				t.Fatal(err)
			}
		}
		out()
		if n := testing.AllocsPerRun(20, out); n != 0 {
			t.Errorf("outbound: %v allocations a batch", n)
		}
		in := unpackPath(t, p, 60, 64)
		in()
		if n := testing.AllocsPerRun(20, in); n != 0 {
			t.Errorf("inbound: %v allocations a batch", n)
		}
	})
}

// unpackPath returns a function that receives n packets of a TCP stream as they
// were packed.
func unpackPath(t testing.TB, p pair, n, size int) func() {
	a, b, _, in := p.nodes(t)
	in.Window = replay.New(0, false)
	var fs []*tap.Frame
	for _, ip := range p.stream(1, n, size) {
		fs = append(fs, frameOf(ip, tap.Offload{}))
	}
	return replayPath(t, p, b, a.sendFrames(fs...))
}

// BenchmarkUnpack: ns per packet of a stream of small packets, from the
// datagrams as they are received to the super-frames as they are written.
func BenchmarkUnpack(b *testing.B) {
	const n = 960
	for _, name := range []string{"tunnel 4 in 4", "aggfrag 4 in 4", "udp tunnel 4 in 4", "udp aggfrag 4 in 4"} {
		p := gcm(pairs()[name])
		run := unpackPath(b, p, n, 64)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				run()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/packet")
		})
	}
}
