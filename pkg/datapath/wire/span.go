package wire

import (
	"net/netip"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// span is a range of addresses, both ends included.
type span struct{ first, last netip.Addr }

// spans turns prefixes of one family into ascending ranges that neither
// overlap nor touch, as interval sets want them.
func spans(ps []netip.Prefix) []span {
	var rs []span
	for _, p := range ps {
		p = p.Masked()
		last := p.Addr().AsSlice()
		for i := p.Bits(); i < len(last)*8; i++ {
			last[i/8] |= 0x80 >> (i % 8)
		}
		a, _ := netip.AddrFromSlice(last)
		rs = append(rs, span{p.Addr(), a})
	}
	slices.SortFunc(rs, func(a, b span) int { return a.first.Compare(b.first) })
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 {
			o := &out[n-1]
			if next := o.last.Next(); !next.IsValid() || r.first.Compare(next) <= 0 {
				if r.last.Compare(o.last) > 0 {
					o.last = r.last
				}
				continue
			}
		}
		out = append(out, r)
	}
	return out
}

// maxFilterSpans bounds the socket filter; beyond it the reader takes all IP.
const maxFilterSpans = 200

// socketFilter spares the reader most packets that are the stack's: it lets
// pass a superset of what judge keeps, and ICMP for path MTU discovery. Tags of
// VLANs, which the kernel keeps beside the packet, and frames for other hosts
// are refused as the chain does. Offsets count from the Ethernet header.
func socketFilter(v4, v6 []netip.Prefix) ([]unix.SockFilter, error) {
	const all = 0x40000
	drop, take := bpf.RetConstant{}, bpf.RetConstant{Val: all}
	program := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 4},
		bpf.LoadExtension{Num: bpf.ExtVLANTag},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0xfff},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, drop,
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: unix.PACKET_OTHERHOST, SkipTrue: 1}, drop,
		bpf.LoadExtension{Num: bpf.ExtProto},
	}
	// words ends a program with a test of the loaded word against ranges.
	words := func(ps []netip.Prefix) []bpf.Instruction {
		rs := spans(ps)
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
	four := protos(14+9, protoESP, protoAH, protoIPComp, protoICMP)
	four = append(four, bpf.LoadAbsolute{Off: 14 + 12, Size: 4})
	four = append(four, words(v4)...)
	six := protos(14+6, protoESP, protoAH, protoIPComp, protoICMPv6, protoHopByHop, protoRouting, protoFragment, protoDstOpts)
	six = append(six, bpf.LoadAbsolute{Off: 14 + 8, Size: 4})
	six = append(six, words(v6)...)

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
