package pad

import "net/netip"

// Range is an inclusive range of addresses of one family.
type Range struct {
	From, To netip.Addr
}

// Any returns the ranges that hold every address.
func Any() []Range {
	return []Range{Prefix(netip.PrefixFrom(netip.IPv4Unspecified(), 0)), Prefix(netip.PrefixFrom(netip.IPv6Unspecified(), 0))}
}

// One returns the range of a single address.
func One(a netip.Addr) Range { return Range{a, a} }

// Prefix returns the range of a prefix.
func Prefix(p netip.Prefix) Range {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return Range{p.Masked().Addr(), last}
}

// Contains reports whether a lies in r. A range that names no zone holds the
// addresses of every one.
func (r Range) Contains(a netip.Addr) bool {
	if r.From.Zone() == "" {
		a = a.WithZone("")
	}
	return r.From.BitLen() == a.BitLen() && !a.Less(r.From) && !r.To.Less(a)
}

func (r Range) valid() bool {
	return r.From.IsValid() && r.From.BitLen() == r.To.BitLen() && !r.To.Less(r.From)
}

func (r Range) String() string {
	if r.From == r.To {
		return r.From.String()
	}
	return r.From.String() + "-" + r.To.String()
}

func contains(rs []Range, a netip.Addr) bool {
	for _, r := range rs {
		if r.Contains(a) {
			return true
		}
	}
	return false
}
