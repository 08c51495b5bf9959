package wire

import (
	"iter"
	"net/netip"
	"slices"
	"sort"

	"github.com/gaissmai/bart"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// span is a range of addresses, both ends included.
type span struct{ first, last netip.Addr }

// spanOf is the range of a prefix.
func spanOf(p netip.Prefix) span {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(last)
	return span{p.Addr(), a}
}

// cover is the addresses that prefixes of one family hold: ascending ranges that
// neither overlap nor touch, as interval sets want them.
type cover []span

// coverOf makes the cover of prefixes in any order.
func coverOf(ps iter.Seq[netip.Prefix]) cover {
	var c cover
	for p := range ps {
		c = append(c, spanOf(p))
	}
	slices.SortFunc(c, func(a, b span) int { return a.first.Compare(b.first) })
	return join(c)
}

// roughBits is how much of an address socketFilter looks at.
const roughBits = 32

// roughly makes a cover of no more than most ranges that holds all prefixes of t
// that are within p, and little else: p is cut in halves, and those that hold
// something again, until they are too many. What it costs does not depend on how
// many prefixes there are. With a hundred thousand policies the packets of peers,
// whom none of them may concern, would else all be copied for us to look at.
func roughly(t *bart.Lite, p netip.Prefix, most int) cover {
	parts := []netip.Prefix{p}
	for bits := p.Bits(); bits < roughBits; bits++ {
		var next []netip.Prefix
		for _, p := range parts {
			if p.Bits() < bits || t.LookupPrefix(p) { // all of it is wanted
				next = append(next, p)
				continue
			}
			high := p.Addr().AsSlice()
			high[bits/8] |= 0x80 >> (bits % 8)
			a, _ := netip.AddrFromSlice(high)
			for _, half := range []netip.Prefix{netip.PrefixFrom(p.Addr(), bits+1), netip.PrefixFrom(a, bits+1)} {
				if t.OverlapsPrefix(half) {
					next = append(next, half)
				}
			}
		}
		if len(next) > most {
			break
		}
		parts = next
	}
	return coverOf(slices.Values(parts))
}

// join merges in place what overlaps or touches in a list in order of first.
func join(c []span) []span {
	out := c[:0]
	for _, r := range c {
		if n := len(out); n > 0 && reaches(out[n-1].last, r.first) {
			if o := &out[n-1]; r.last.Compare(o.last) > 0 {
				o.last = r.last
			}
			continue
		}
		out = append(out, r)
	}
	return out
}

// reaches: nothing is between the end of a range and the beginning of another.
func reaches(last, first netip.Addr) bool {
	next := last.Next()
	return !next.IsValid() || first.Compare(next) <= 0
}

// splice is a change of a cover: at an index, old gave way to n ranges.
type splice struct {
	at  int
	old []span
	n   int
}

// set makes inner, ascending ranges within r, what c covers of r; outside of r
// nothing changes.
func (c *cover) set(r span, inner []span) splice {
	l := *c
	i := sort.Search(len(l), func(k int) bool { return reaches(l[k].last, r.first) })
	j := i + sort.Search(len(l)-i, func(k int) bool { return !reaches(r.last, l[i+k].first) })
	s := splice{at: i, old: slices.Clone(l[i:j])}
	var now []span
	if i < j && l[i].first.Less(r.first) {
		now = append(now, span{l[i].first, least(l[i].last, r.first.Prev())})
	}
	now = append(now, inner...)
	if i < j && r.last.Less(l[j-1].last) {
		now = append(now, span{most(l[j-1].first, r.last.Next()), l[j-1].last})
	}
	now = join(now)
	s.n = len(now)
	*c = slices.Replace(l, i, j, now...)
	return s
}

// undo takes the newest splice back.
func (c *cover) undo(s splice) { *c = slices.Replace(*c, s.at, s.at+s.n, s.old...) }

func least(a, b netip.Addr) netip.Addr {
	if b.Less(a) {
		return b
	}
	return a
}

func most(a, b netip.Addr) netip.Addr {
	if a.Less(b) {
		return b
	}
	return a
}

// maxFilterSpans bounds the socket filter; of more ranges the reader takes all IP.
const maxFilterSpans = 200

// socketFilter spares the reader most packets that are the stack's: it lets
// pass a superset of what judge keeps, and ICMP for path MTU discovery. Tags of
// VLANs, which the kernel keeps beside the packet, and frames for other hosts
// are refused as the chain does. Offsets count from the Ethernet header.
//
// Of several readers it is the first's, which leaves the others their ESP.
func socketFilter(v4, v6 cover, readers int) ([]unix.SockFilter, error) {
	const all = 0x40000
	drop, take := bpf.RetConstant{}, bpf.RetConstant{Val: all}
	program := forUs()
	// words ends a program with a test of the loaded word against ranges.
	words := func(rs cover) []bpf.Instruction {
		if len(rs) > maxFilterSpans {
			return []bpf.Instruction{take}
		}
		var p []bpf.Instruction
		for _, r := range rs {
			p = append(p,
				bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: word(r.first), SkipTrue: 1}, drop,
				bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: word(r.last), SkipTrue: 1}, take)
		}
		return append(p, drop)
	}
	protos := func(off uint32, ps ...uint32) []bpf.Instruction {
		p := []bpf.Instruction{bpf.LoadAbsolute{Off: off, Size: 1}}
		for _, v := range ps {
			p = append(p, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: 1}, take)
		}
		return p
	}
	four := espOf(true, 0, readers, nil)
	four = append(four, protos(14+9, protoESP, protoAH, protoIPComp, protoICMP)...)
	four = append(four, bpf.LoadAbsolute{Off: 14 + 12, Size: 4})
	four = append(four, words(v4)...)
	six := espOf(false, 0, readers, nil)
	six = append(six, protos(14+6, protoESP, protoAH, protoIPComp, protoICMPv6, protoHopByHop, protoRouting, protoFragment, protoDstOpts)...)
	six = append(six, bpf.LoadAbsolute{Off: 14 + 8, Size: 4})
	six = append(six, words(v6)...)

	return dispatch(program, four, six)
}

// spiFilter is the filter of reader number k, from 1, of n.
func spiFilter(k, n int) ([]unix.SockFilter, error) {
	drop := []bpf.Instruction{bpf.RetConstant{}}
	return dispatch(forUs(), espOf(true, k, n, drop), espOf(false, k, n, drop))
}

// forUs begins a program: what is not for this host or in a VLAN is dropped. The
// type of what goes on is loaded.
func forUs() []bpf.Instruction {
	drop := bpf.RetConstant{}
	return []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 4},
		bpf.LoadExtension{Num: bpf.ExtVLANTag},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0xfff},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, drop,
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: unix.PACKET_OTHERHOST, SkipTrue: 1}, drop,
		bpf.LoadExtension{Num: bpf.ExtProto},
	}
}

// espOf takes whole ESP packets of the SPIs of reader k of n, drops those of
// others, and goes on with rest, or behind it, for all else.
func espOf(v4 bool, k, n int, rest []bpf.Instruction) []bpf.Instruction {
	if n < 2 {
		return rest
	}
	protoAt, spiAt := uint32(14+6), []bpf.Instruction{bpf.LoadAbsolute{Off: 14 + 40, Size: 4}}
	if v4 {
		protoAt = 14 + 9
		spiAt = []bpf.Instruction{bpf.LoadMemShift{Off: 14}, bpf.LoadIndirect{Off: 14, Size: 4}}
	}
	p := append(spiAt,
		bpf.ALUOpConstant{Op: bpf.ALUOpMod, Val: uint32(n)},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(k), SkipFalse: 1},
		bpf.RetConstant{Val: 0x40000}, bpf.RetConstant{})
	if v4 { // fragments are put together by the first
		p = append([]bpf.Instruction{bpf.LoadAbsolute{Off: 14 + 6, Size: 2},
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x3fff, SkipTrue: uint8(len(p))}}, p...)
	}
	p = append([]bpf.Instruction{bpf.LoadAbsolute{Off: protoAt, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: protoESP, SkipFalse: uint8(len(p))}}, p...)
	return append(p, rest...)
}

// dispatch ends a program by IP version, and translates it.
func dispatch(program, four, six []bpf.Instruction) ([]unix.SockFilter, error) {
	drop := bpf.RetConstant{}
	program = append(program, bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipFalse: 1}, bpf.Jump{Skip: uint32(len(six) + 2)})
	program = append(program, bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IPV6, SkipTrue: 1}, drop)
	program = append(program, six...)
	program = append(program, four...)
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, err
	}
	out := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		out[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return out, nil
}

// word is the first 32 bits of an address.
func word(a netip.Addr) uint32 {
	b := a.AsSlice()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}
