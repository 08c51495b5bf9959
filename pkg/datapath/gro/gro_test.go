package gro

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

var be = binary.BigEndian

// pkt describes a packet; the zero value of a field is its usual one.
type pkt struct {
	v6, udp    bool
	flow       int // chooses the ports
	seq        uint32
	ack        uint32
	id         uint16
	n          int // octets of payload
	flags      uint8
	window     uint16
	tos, ttl   uint8
	label      uint8
	noDF       bool
	evil       bool // the reserved bit
	mf         bool
	options    []byte // TCP
	ipOptions  int    // words of IPv4 options, or an IPv6 extension header
	urg        uint16
	reserved   uint8
	badCsum    bool
	badIPCsum  bool
	noCsum     bool // UDP
	udpLen     int  // added to the field
	proto      uint8
	noPortsLen int // the packet ends within the ports
}

const ack = flagACK

var (
	src4, dst4 = netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.2.0.1")
	src6, dst6 = netip.MustParseAddr("2001:db8:1::1"), netip.MustParseAddr("2001:db8:2::1")
)

// build makes the packet.
func (p pkt) build() []byte {
	proto := uint8(protoTCP)
	tl := 20 + len(p.options)
	if p.udp {
		proto, tl = protoUDP, 8
	}
	if p.proto != 0 {
		proto = p.proto
	}
	hl := 20 + 4*p.ipOptions
	src, dst := src4, dst4
	if p.v6 {
		hl, src, dst = 40, src6, dst6
		if p.ipOptions != 0 {
			hl = 48
		}
	}
	b := make([]byte, hl+tl+p.n)
	ttl := p.ttl
	if ttl == 0 {
		ttl = 64
	}
	packet.PutHeader(b, src, dst, proto, len(b), ttl)
	if p.v6 {
		b[0], b[1] = 0x60|p.tos>>4, p.tos<<4
		b[3] = p.label
		if p.ipOptions != 0 {
			b[6], b[40] = 60, proto
		}
	} else {
		b[0] |= byte(p.ipOptions)
		for k := 20; k < hl; k++ {
			b[k] = 1 // no operation
		}
		b[1] = p.tos
		be.PutUint16(b[4:], p.id)
		if p.noDF || p.mf {
			b[6] = 0
		}
		if p.evil {
			b[6] |= 0x80
		}
		if p.mf {
			b[6] |= 0x20
		}
		packet.FixIPv4Checksum(b)
		if p.badIPCsum {
			b[10] ^= 0x40
		}
	}
	t := b[hl:]
	be.PutUint16(t, uint16(1000+p.flow))
	be.PutUint16(t[2:], 5201)
	for k := range p.n {
		t[tl+k] = byte(int(p.seq) + k*7)
	}
	field := 16
	if p.udp {
		field = 6
		be.PutUint16(t[4:], uint16(len(t)+p.udpLen))
	} else {
		be.PutUint32(t[4:], p.seq)
		be.PutUint32(t[8:], p.ack)
		t[12] = byte(tl/4)<<4 | p.reserved
		t[13] = p.flags
		if p.flags == 0 {
			t[13] = ack
		}
		be.PutUint16(t[14:], p.window)
		be.PutUint16(t[18:], p.urg)
		copy(t[20:], p.options)
	}
	c := ^packet.Fold(packet.Sum(t, packet.PseudoSum(b, map[bool]uint8{true: protoUDP, false: protoTCP}[p.udp], len(t))))
	if c == 0 {
		c = 0xffff
	}
	be.PutUint16(t[field:], c)
	if p.noCsum {
		t[6], t[7] = 0, 0
	}
	if p.badCsum {
		t[field] ^= 0x10
	}
	if p.noPortsLen != 0 {
		b = b[:hl+p.noPortsLen]
		packet.SetLen(b, len(b))
		packet.FixIPv4Checksum(b)
	}
	return b
}

// segments cuts a frame as Linux does (net/ipv4/tcp_offload.c, udp_offload.c),
// written without a look at how the frame was made.
func segments(t testing.TB, f tap.Frame) [][]byte {
	t.Helper()
	if f.Off < tap.HeadroomMin {
		t.Fatalf("headroom of %d octets", f.Off)
	}
	e := f.Buf[f.Off : f.Off+f.Len]
	ip, o := e[14:], f.Offload
	if o.GSOType == tap.GSONone {
		if o != (tap.Offload{}) {
			t.Fatalf("metadata of a packet alone: %+v", o)
		}
		return [][]byte{bytes.Clone(ip)}
	}
	if !o.NeedsCsum || o.GSOSize == 0 {
		t.Fatalf("metadata: %+v", o)
	}
	if len(ip) > 65535 {
		t.Fatalf("super-frame of %d octets", len(ip))
	}
	hl := int(o.CsumStart) - 14
	v4 := ip[0]>>4 == 4
	var i packet.Info
	if !packet.Decode(ip, &i) || i.Len != len(ip) || i.HdrLen != hl || v4 && packet.Checksum(ip[:20]) != 0 {
		t.Fatalf("super-frame's IP header: % x", ip[:40])
	}
	th := ip[hl:]
	tl, proto := 8, byte(17)
	switch {
	case o.GSOType == tap.GSOUDPL4:
		if o.CsumOffset != 6 || int(be.Uint16(th[4:])) != len(th) || len(th)-8 > 64*int(o.GSOSize) {
			t.Fatalf("UDP: %+v, length %d of %d", o, be.Uint16(th[4:]), len(th))
		}
	case v4 && o.GSOType == tap.GSOTCPv4, !v4 && o.GSOType == tap.GSOTCPv6:
		tl, proto = int(th[12]>>4)*4, 6
		if o.CsumOffset != 16 {
			t.Fatalf("TCP: %+v", o)
		}
	default:
		t.Fatalf("type: %+v", o)
	}
	if int(o.HdrLen) != 14+hl+tl || i.Proto != proto || len(th)-tl <= int(o.GSOSize) {
		t.Fatalf("%+v of %d octets, headers %d and %d, protocol %d", o, len(ip), hl, tl, i.Proto)
	}
	if got, want := be.Uint16(th[o.CsumOffset:]), packet.Fold(packet.PseudoSum(ip, proto, len(th))); got != want {
		t.Fatalf("pseudo-header's sum: got %04x, want %04x", got, want)
	}
	var out [][]byte
	for k, p := 0, th[tl:]; len(p) > 0; k++ {
		n := min(len(p), int(o.GSOSize))
		s := append(bytes.Clone(ip[:hl+tl]), p[:n]...)
		p = p[n:]
		packet.SetLen(s, len(s))
		if v4 {
			be.PutUint16(s[4:], be.Uint16(ip[4:])+uint16(k))
			packet.FixIPv4Checksum(s)
		}
		h := s[hl:]
		if proto == 17 {
			be.PutUint16(h[4:], uint16(len(h)))
		} else {
			be.PutUint32(h[4:], be.Uint32(th[4:])+uint32(k)*uint32(o.GSOSize))
			if len(p) > 0 {
				h[13] &^= 0x09
			}
			if k > 0 {
				h[13] &^= 0x80
			}
		}
		h[o.CsumOffset], h[o.CsumOffset+1] = 0, 0
		c := ^packet.Fold(packet.Sum(h, packet.PseudoSum(s, proto, len(h))))
		if c == 0 {
			c = 0xffff
		}
		be.PutUint16(h[o.CsumOffset:], c)
		out = append(out, s)
	}
	return out
}

var all = tap.Super{TCP4: true, TCP6: true, UDP: true}

// follower makes of the same packets what others do, but those that follow one
// another it takes by Follow.
var follower = New()

// batch sends packets through c, which is full now and then, and returns what
// the kernel would have, and how many frames it came in.
func batch(t testing.TB, c *Coalescer, in [][]byte) (out [][]byte, frames int) {
	t.Helper()
	follower.Kinds = c.Kinds
	write := func() {
		fs, joined, made := c.Frames()
		again, _, _ := follower.Frames()
		if len(fs) != len(again) {
			t.Fatalf("%d frames, and with Follow %d", len(fs), len(again))
		}
		for k, f := range again {
			if f.Offload != fs[k].Offload || !bytes.Equal(f.Buf[f.Off+14:f.Off+f.Len], fs[k].Buf[fs[k].Off+14:fs[k].Off+fs[k].Len]) {
				t.Fatalf("frame %d differs with Follow", k)
			}
		}
		follower.Reset()
		n, supers := 0, 0
		for _, f := range fs {
			s := segments(t, f)
			out = append(out, s...)
			if len(s) > 1 {
				n, supers = n+len(s), supers+1
			}
		}
		if int(joined) != n || int(made) != supers {
			t.Fatalf("counted %d packets in %d super-frames, want %d in %d", joined, made, n, supers)
		}
		frames += len(fs)
		c.Reset()
	}
	for k, b := range in {
		var i packet.Info
		if !packet.Decode(b, &i) {
			t.Fatalf("packet %d: % x", k, b)
		}
		off := []int{40, 24, 23, 16, 0}[k%5]
		buf := append(make([]byte, off), b...)
		follows := follower.Follow(append(bytes.Clone(b), make([]byte, k%3)...))
		ok := follows || follower.Add(bytes.Clone(buf), off, &i, tap.Offload{})
		if c.Add(buf, off, &i, tap.Offload{}) != ok {
			t.Fatalf("packet %d: taken by Follow %v, in all %v, but not so without", k, follows, ok)
		}
		if !ok {
			write()
			if !c.Add(buf, off, &i, tap.Offload{}) || !follower.Add(bytes.Clone(buf), off, &i, tap.Offload{}) {
				t.Fatal("an empty batch is full")
			}
		}
	}
	write()
	if !c.Empty() {
		t.Fatal("not empty after Reset")
	}
	return out, frames
}

// key is the flow of a packet; fragments and what does not show its ports are
// in everybody's way: "".
func key(t testing.TB, b []byte) string {
	var i packet.Info
	if !packet.Decode(b, &i) {
		t.Fatalf("% x", b)
	}
	if i.IsFragment() {
		return ""
	}
	if !i.HasPorts {
		return fmt.Sprint(i.Src, i.Dst, i.Proto)
	}
	return fmt.Sprint(i.Src, i.Dst, i.Proto, i.SrcPort, i.DstPort)
}

// same compares per flow and in order, octet by octet; but where DF is set and
// the sender leaves the identification as it is, it may count up.
func same(t testing.TB, in, out [][]byte) {
	t.Helper()
	if len(in) != len(out) {
		t.Fatalf("%d packets became %d", len(in), len(out))
	}
	flows := func(bs [][]byte) map[string][][]byte {
		m := map[string][][]byte{}
		for _, b := range bs {
			m[key(t, b)] = nil
		}
		for _, b := range bs {
			k := key(t, b)
			for f := range m {
				if f == k || k == "" {
					m[f] = append(m[f], b)
				}
			}
		}
		return m
	}
	got := flows(out)
	for f, want := range flows(in) {
		if len(got[f]) != len(want) {
			t.Fatalf("flow %s: %d packets became %d", f, len(want), len(got[f]))
		}
		for k, w := range want {
			g := got[f][k]
			if bytes.Equal(g, w) {
				continue
			}
			if k > 0 && w[0]>>4 == 4 && w[6] == 0x40 && bytes.Equal(w[4:6], want[k-1][4:6]) && len(g) == len(w) {
				g = bytes.Clone(g)
				copy(g[4:6], w[4:6])
				packet.FixIPv4Checksum(g)
				if bytes.Equal(g, w) {
					continue
				}
			}
			t.Fatalf("flow %s, packet %d:\ngot  % x\nwant % x", f, k, g[:min(len(g), 80)], w[:min(len(w), 80)])
		}
	}
}

// train is n packets that belong together.
func train(p pkt, n, size int) (ps []pkt) {
	p.n = size
	for range n {
		ps = append(ps, p)
		p.seq += uint32(size)
		p.id++
	}
	return ps
}

func build(ps []pkt) (bs [][]byte) {
	for _, p := range ps {
		bs = append(bs, p.build())
	}
	return bs
}

// TestRules: what joins and what does not, by the number of frames.
func TestRules(t *testing.T) {
	stamps := []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	edit := func(ps []pkt, k int, f func(*pkt)) []pkt {
		f(&ps[k])
		return ps
	}
	four := func() []pkt { return train(pkt{id: 7, seq: 0xfffffff0, options: stamps, window: 9}, 4, 100) }
	six := func() []pkt { return train(pkt{v6: true, seq: 5}, 4, 100) }
	udp := func() []pkt { return train(pkt{udp: true, id: 65534}, 4, 100) }
	two := func(a, b []pkt) (ps []pkt) {
		for k := range a {
			ps = append(ps, a[k], b[k])
		}
		return ps
	}
	many := func(n int) (ps []pkt) { // n flows in turn
		for k := range 4 {
			for f := range n {
				ps = append(ps, pkt{flow: f, seq: uint32(100 * k), n: 100, id: uint16(k)})
			}
		}
		return ps
	}
	for _, c := range []struct {
		name string
		ps   []pkt
		want int
	}{
		{"TCP", four(), 1},
		{"TCP over IPv6", six(), 1},
		{"UDP", udp(), 1},
		{"UDP over IPv6", train(pkt{udp: true, v6: true}, 4, 100), 1},
		{"one", four()[:1], 1},
		{"the last is shorter", edit(four(), 3, func(p *pkt) { p.n = 1 }), 1},
		{"shorter in the middle closes", edit(edit(four(), 1, func(p *pkt) { p.n = 99 }), 2, func(p *pkt) { p.seq-- })[:3], 2},
		{"the second is longer", edit(four(), 1, func(p *pkt) { p.n = 101 })[:2], 2},
		{"a gap", edit(four(), 2, func(p *pkt) { p.seq++ }), 3},
		{"reordered", []pkt{four()[0], four()[2], four()[1], four()[3]}, 4},
		{"a retransmission", []pkt{four()[0], four()[1], four()[1], four()[2]}, 2},
		{"PSH closes", edit(four(), 1, func(p *pkt) { p.flags = ack | 8 }), 2},
		{"PSH on the first", edit(four(), 0, func(p *pkt) { p.flags = ack | 8 }), 2},
		{"FIN", edit(four(), 3, func(p *pkt) { p.flags = ack | 1 }), 2},
		{"SYN", edit(four(), 1, func(p *pkt) { p.flags = ack | 2 }), 3},
		{"RST", edit(four(), 1, func(p *pkt) { p.flags = ack | 4 }), 3},
		{"URG", edit(four(), 1, func(p *pkt) { p.flags = ack | 0x20 }), 3},
		{"ECE", edit(four(), 1, func(p *pkt) { p.flags = ack | 0x40 }), 3},
		{"CWR", edit(four(), 1, func(p *pkt) { p.flags = ack | 0x80 }), 3},
		{"no ACK", edit(four(), 1, func(p *pkt) { p.flags = 8 }), 3},
		{"a reserved bit", edit(four(), 1, func(p *pkt) { p.reserved = 1 }), 3},
		{"urgent pointer without URG", edit(four(), 1, func(p *pkt) { p.urg = 1 }), 3},
		{"pure ACK between", []pkt{four()[0], {options: stamps, window: 9, seq: four()[1].seq}, four()[1]}, 3},
		{"ack moves", edit(four(), 2, func(p *pkt) { p.ack = 1 }), 3},
		{"window moves", edit(four(), 2, func(p *pkt) { p.window = 10 }), 3},
		{"options change", edit(four(), 2, func(p *pkt) { p.options = append(bytes.Clone(stamps[:11]), 3) }), 3},
		{"options vanish", edit(four(), 2, func(p *pkt) { p.options = nil }), 3},
		{"CE", edit(four(), 2, func(p *pkt) { p.tos = 3 }), 3},
		{"CE over IPv6", edit(six(), 2, func(p *pkt) { p.tos = 3 }), 3},
		{"flow label", edit(six(), 2, func(p *pkt) { p.label = 1 }), 3},
		{"TTL", edit(four(), 2, func(p *pkt) { p.ttl = 63 }), 3},
		{"hop limit", edit(six(), 2, func(p *pkt) { p.ttl = 63 }), 3},
		{"DF changes", edit(four(), 2, func(p *pkt) { p.noDF = true }), 3},
		{"reserved bit of IPv4", edit(four(), 2, func(p *pkt) { p.evil = true }), 3},
		{"a fragment", edit(four(), 2, func(p *pkt) { p.mf = true }), 3},
		{"a fragment of UDP between", []pkt{four()[0], four()[1], {udp: true, flow: 9, mf: true, n: 8}, four()[2], four()[3]}, 3},
		{"IPv4 options", edit(four(), 2, func(p *pkt) { p.ipOptions = 1 }), 3},
		{"IPv6 extension header", edit(six(), 2, func(p *pkt) { p.ipOptions = 1 }), 3},
		{"identification jumps", edit(four(), 2, func(p *pkt) { p.id += 5 }), 3},
		{"identification goes back", edit(four()[:2], 1, func(p *pkt) { p.id -= 2 }), 2},
		{"identification stays under DF", []pkt{{n: 9}, {n: 9, seq: 9}, {n: 9, seq: 18}}, 1},
		{"identification stays without DF", []pkt{{n: 9, noDF: true}, {n: 9, seq: 9, noDF: true}}, 2},
		{"identification counts, without DF", []pkt{{n: 9, noDF: true}, {n: 9, seq: 9, id: 1, noDF: true}}, 1},
		{"identification stays, then counts", []pkt{{n: 9}, {n: 9, seq: 9}, {n: 9, seq: 18, id: 1}}, 2},
		{"identification counts, then stays", []pkt{{n: 9}, {n: 9, seq: 9, id: 1}, {n: 9, seq: 18, id: 1}}, 2},
		{"wrong checksum in the middle", edit(four(), 1, func(p *pkt) { p.badCsum = true }), 3},
		{"wrong checksum at first", edit(four(), 0, func(p *pkt) { p.badCsum = true }), 2},
		{"wrong checksum at last", edit(four(), 3, func(p *pkt) { p.badCsum = true }), 2},
		{"wrong IP checksum", edit(four(), 1, func(p *pkt) { p.badIPCsum = true }), 3},
		{"wrong IP checksum at first", edit(four(), 0, func(p *pkt) { p.badIPCsum = true }), 2},
		{"UDP without checksum", edit(udp(), 1, func(p *pkt) { p.noCsum = true }), 3},
		{"UDP, wrong checksum", edit(udp(), 1, func(p *pkt) { p.badCsum = true }), 3},
		{"UDP, shorter closes", edit(udp(), 1, func(p *pkt) { p.n = 99 }), 2},
		{"UDP, longer", edit(udp(), 1, func(p *pkt) { p.n = 101 }), 3},
		{"UDP, empty", edit(udp(), 1, func(p *pkt) { p.n = 0 }), 3},
		{"UDP, length odd", edit(udp(), 1, func(p *pkt) { p.udpLen = -1 }), 3},
		{"UDP, 64 at most", train(pkt{udp: true}, 130, 10), 3},
		{"TCP, 65535 octets at most", train(pkt{}, 100, 1400), 3},
		{"TCP over IPv6, likewise", train(pkt{v6: true}, 100, 1400), 3},
		{"ports cut", []pkt{four()[0], {noPortsLen: 3}, four()[1]}, 3},
		{"two flows in turn", two(four(), train(pkt{flow: 1}, 4, 50)), 2},
		{"TCP and UDP of the same ports", two(four(), udp()), 2},
		{"IPv4 and IPv6 of the same ports", two(four(), six()), 2},
		{"ICMP between", []pkt{four()[0], {proto: 1, n: 20}, four()[1], four()[2]}, 2},
		{"16 flows in turn", many(16), 16},
		{"17 flows in turn", many(17), 4 * 17},
		{"nothing", nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := New()
			g.Kinds = all
			in := build(c.ps)
			out, frames := batch(t, g, in)
			same(t, in, out)
			if frames != c.want {
				t.Errorf("%d packets in %d frames, want %d", len(in), frames, c.want)
			}
		})
	}
}

// Only what the device takes is made.
func TestKinds(t *testing.T) {
	for _, c := range []struct {
		kinds tap.Super
		want  [3]int
	}{{tap.Super{}, [3]int{3, 3, 3}}, {tap.Super{TCP4: true}, [3]int{1, 3, 3}}, {tap.Super{TCP6: true}, [3]int{3, 1, 3}}, {tap.Super{UDP: true}, [3]int{3, 3, 1}}} {
		for k, p := range []pkt{{}, {v6: true}, {udp: true}} {
			g := New()
			g.Kinds = c.kinds
			in := build(train(p, 3, 10))
			out, frames := batch(t, g, in)
			same(t, in, out)
			if frames != c.want[k] {
				t.Errorf("%+v, %+v: %d frames, want %d", c.kinds, p, frames, c.want[k])
			}
		}
	}
}

// A packet on which the sending kernel left something undone goes as it is,
// and nothing of its flow overtakes it.
func TestOffloaded(t *testing.T) {
	g := New()
	g.Kinds = all
	o := tap.Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: 16}
	for k, p := range train(pkt{}, 3, 10) {
		var i packet.Info
		buf := append(make([]byte, 24), p.build()...)
		packet.Decode(buf[24:], &i)
		g.Add(buf, 24, &i, map[bool]tap.Offload{true: o}[k == 1])
	}
	fs, _, _ := g.Frames()
	if len(fs) != 3 || fs[1].Offload != o || fs[0].Offload != (tap.Offload{}) {
		t.Errorf("got %+v", fs)
	}
}

// random makes a sequence in which most packets continue their flow, and the
// others do what a network or an adversary does.
func random(r *rand.Rand, n int) (ps []pkt) {
	const nflows = 24
	var flows [nflows]pkt
	for k := range flows {
		flows[k] = pkt{
			flow: k / 4, v6: k%4 == 1 || k%4 == 3, udp: k%4 >= 2, n: 1 + r.IntN(60), seq: r.Uint32(), id: uint16(r.Uint32()),
			noDF: r.IntN(2) == 0, tos: uint8(r.IntN(4)), ttl: uint8(1 + r.IntN(255)),
		}
		if r.IntN(2) == 0 {
			flows[k].options = []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, byte(r.IntN(256))}
		}
		if r.IntN(6) == 0 {
			flows[k].n = 1300 + r.IntN(100)
		}
	}
	active := 1 + r.IntN(nflows)
	fixed := r.IntN(3) == 0
	odd := []int{3, 10, 40, 1 << 30}[r.IntN(4)]
	k := 0
	for range n {
		if r.IntN(3) == 0 {
			k = r.IntN(active)
		}
		f := &flows[k]
		p := *f
		if r.IntN(odd) == 0 {
			switch r.IntN(28) {
			case 0:
				p.badCsum = true
			case 1:
				p.badIPCsum = !p.v6
			case 2:
				p.noCsum = p.udp
			case 3:
				p.tos ^= 3
			case 4:
				p.ttl++
			case 5:
				p.noDF = !p.noDF
			case 6:
				p.id += uint16(r.IntN(5))
			case 7:
				p.flags = ack | 8
			case 8:
				p.flags = uint8(r.Uint32())
			case 9:
				p.n = r.IntN(p.n + 1)
			case 10:
				p.n += r.IntN(40)
			case 11:
				p.seq += uint32(r.IntN(200)) - 100
			case 12:
				p.ack++
			case 13:
				p.window++
			case 14:
				p.options = nil
			case 15:
				p.options = []byte{1, 1, 1, 0}
			case 16:
				p.urg = uint16(r.IntN(2))
			case 17:
				p.reserved = uint8(r.IntN(16))
			case 18:
				p.mf = !p.v6
			case 19:
				p.ipOptions = 1
			case 20:
				p.proto = uint8([]int{1, 50, 58, 132}[r.IntN(4)])
			case 21:
				p.udpLen = r.IntN(5) - 2
			case 22:
				p.n = 0
			case 23:
				p.evil = true
			case 24:
				p.label++
			case 25: // a retransmission
				if len(ps) > 0 {
					p = ps[r.IntN(len(ps))]
				}
			case 26: // reordered
				if len(ps) > 0 {
					j := len(ps) - 1
					ps = append(ps, ps[j])
					ps[j] = p
					f.seq += uint32(p.n)
					f.id++
					continue
				}
			case 27: // lost
				f.seq += uint32(p.n)
				f.id++
				continue
			}
		}
		ps = append(ps, p)
		f.seq += uint32(p.n)
		if !fixed {
			f.id++
		}
	}
	return ps
}

// TestEquivalence: whatever goes in comes out of segmentation again, octet by
// octet and in the order of each flow, through one Coalescer for all.
func TestEquivalence(t *testing.T) {
	g := New()
	packets, frames, before := 0, 0, follower.Added()
	for seed := range uint64(600) {
		r := rand.New(rand.NewPCG(seed, 4))
		g.Kinds = tap.Super{TCP4: r.IntN(8) > 0, TCP6: r.IntN(8) > 0, UDP: r.IntN(4) > 0}
		in := build(random(r, 1+r.IntN(300)))
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			out, n := batch(t, g, in)
			same(t, in, out)
			packets, frames = packets+len(in), frames+n
		})
	}
	if frames > packets*2/3 {
		t.Errorf("%d packets in %d frames: hardly anything was joined", packets, frames)
	}
	if added := follower.Added() - before; int(added) > packets*9/10 {
		t.Errorf("%d of %d packets did not follow", added, packets)
	}
}

// FuzzCoalesce: the same for packets that are not made by random. Each octet
// pair of the input says how long a packet is; the rest of it is the packet.
func FuzzCoalesce(f *testing.F) {
	pack := func(bs [][]byte) (b []byte) {
		for _, p := range bs {
			b = be.AppendUint16(b, uint16(len(p)))
			b = append(b, p...)
		}
		return b
	}
	f.Add(pack(build(train(pkt{id: 3}, 3, 20))))
	f.Add(pack(build(train(pkt{v6: true, options: []byte{1, 1, 1, 0}}, 3, 20))))
	f.Add(pack(build(train(pkt{udp: true, noDF: true}, 3, 20))))
	f.Add(pack(build(train(pkt{udp: true, v6: true}, 3, 20))))
	f.Add(pack(build([]pkt{{n: 5}, {n: 5, seq: 5, flags: ack | 8}, {mf: true, n: 3}, {proto: 1, n: 4}, {n: 5, seq: 10, badCsum: true}})))
	g := New()
	g.Kinds = all
	f.Fuzz(func(t *testing.T, b []byte) {
		var in [][]byte
		for len(b) >= 2 {
			n := min(int(be.Uint16(b)), len(b)-2)
			p := b[2 : 2+n]
			b = b[2+n:]
			var i packet.Info
			if !packet.Decode(p, &i) {
				continue
			}
			// Checksums that fit, or nothing would ever join.
			p = bytes.Clone(p[:i.Len])
			if len(in)%7 != 6 {
				packet.FixIPv4Checksum(p)
				packet.FixTransportChecksum(p, i.HdrLen, i.Proto)
			}
			in = append(in, p)
		}
		out, _ := batch(t, g, in)
		same(t, in, out)
	})
}

func TestArena(t *testing.T) {
	var g Arena
	seen := map[*byte]bool{}
	for _, n := range []int{1, 65535 + 100, block - 1, 70000, 70000, 70000, 70000, 9} {
		b := g.Take(n)
		if len(b) != n || cap(b) != n || seen[&b[0]] {
			t.Errorf("%d octets: got %d of %d, seen %v", n, len(b), cap(b), seen[&b[0]])
		}
		seen[&b[0]] = true
	}
	g.Reset()
	if b := g.Take(1); !seen[&b[0]] {
		t.Error("not reused after Reset")
	}
}

func TestNoAllocs(t *testing.T) {
	var bs [][]byte
	r := rand.New(rand.NewPCG(1, 1))
	for _, b := range append(build(random(r, 300)), build(train(pkt{flow: 30}, 60, 1398))...) {
		bs = append(bs, append(make([]byte, 16), b...))
	}
	g := New()
	g.Kinds = all
	var i packet.Info
	if n := testing.AllocsPerRun(50, func() {
		for _, b := range bs {
			packet.Decode(b[16:], &i)
			if !g.Add(b, 16, &i, tap.Offload{}) {
				g.Frames()
				g.Reset()
			}
		}
		g.Frames()
		g.Reset()
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// BenchmarkAdd: ns per packet of 1438 octets with time stamps, 45 to a
// super-frame, headers and checksums included; and what cannot be joined.
func BenchmarkAdd(b *testing.B) {
	stamps := []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	var mixed []pkt
	for k := range 45 {
		mixed = append(mixed, pkt{flow: k, n: 1386})
	}
	for _, c := range []struct {
		name string
		ps   []pkt
	}{
		{"tcp4", train(pkt{options: stamps}, 45, 1386)}, {"tcp6", train(pkt{v6: true, options: stamps}, 45, 1366)},
		{"udp4", train(pkt{udp: true}, 45, 1410)}, {"udp4-64", train(pkt{udp: true}, 64, 64)}, {"flows", mixed},
	} {
		b.Run(c.name, func(b *testing.B) {
			g := New()
			g.Kinds = all
			var bs [][]byte
			for _, p := range build(c.ps) {
				bs = append(bs, append(make([]byte, 24), p...))
			}
			b.ReportAllocs()
			b.SetBytes(int64(len(bs[0]) - 24))
			var i packet.Info
			for n := 0; n < b.N; n += len(bs) {
				for _, p := range bs {
					packet.Decode(p[24:], &i)
					g.Add(p, 24, &i, tap.Offload{})
				}
				g.Frames()
				g.Reset()
			}
		})
	}
}
