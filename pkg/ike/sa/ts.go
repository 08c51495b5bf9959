package sa

import (
	"net/netip"
	"slices"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// IP protocols whose selectors have ports, or type and code in their place.
const (
	protoICMP, protoICMPv6                                 = 1, 58
	protoTCP, protoUDP, protoDCCP, protoSCTP, protoUDPLite = 6, 17, 33, 132, 136
)

// maxTS is how many selectors one payload can hold.
const maxTS = 255

func anyPort(t ipsec.TrafficSelector) bool { return t.PortLo == 0 && t.PortHi == 65535 }

// opaque is the range that only matches packets without a known port.
func opaque(t ipsec.TrafficSelector) bool { return t.PortLo == 65535 && t.PortHi == 0 }

// intersect returns what both selectors hold.
func intersect(a, b ipsec.TrafficSelector) (t ipsec.TrafficSelector, ok bool) {
	t = a
	switch {
	case a.Proto == 0:
		t.Proto = b.Proto
	case b.Proto != 0 && b.Proto != a.Proto:
		return t, false
	}
	if a.Start.BitLen() != b.Start.BitLen() {
		return t, false
	}
	if t.Start.Less(b.Start) {
		t.Start = b.Start
	}
	if b.End.Less(t.End) {
		t.End = b.End
	}
	if t.End.Less(t.Start) {
		return t, false
	}
	switch {
	case anyPort(a):
		t.PortLo, t.PortHi = b.PortLo, b.PortHi
	case anyPort(b):
	case opaque(a) || opaque(b):
		return t, opaque(a) && opaque(b)
	default:
		t.PortLo, t.PortHi = max(a.PortLo, b.PortLo), min(a.PortHi, b.PortHi)
		return t, t.PortLo <= t.PortHi
	}
	return t, true
}

// within reports whether everything that a holds, b holds.
func within(a, b ipsec.TrafficSelector) bool {
	t, ok := intersect(a, b)
	return ok && t == a
}

// appendTS appends t unless an element of l holds it already.
func appendTS(l []ipsec.TrafficSelector, t ipsec.TrafficSelector) []ipsec.TrafficSelector {
	if len(l) >= maxTS || slices.ContainsFunc(l, func(o ipsec.TrafficSelector) bool { return within(t, o) }) {
		return l
	}
	return append(l, t)
}

// narrow returns what of offered lies in ours, in the order of offered.
func narrow(offered, ours []ipsec.TrafficSelector) []ipsec.TrafficSelector {
	var l []ipsec.TrafficSelector
	for _, o := range offered {
		for _, u := range ours {
			if t, ok := intersect(o, u); ok {
				l = appendTS(l, t)
			}
		}
	}
	return l
}

// allWithin reports whether each element of l lies in one of offered.
func allWithin(l, offered []ipsec.TrafficSelector) bool {
	for _, t := range l {
		if !slices.ContainsFunc(offered, func(o ipsec.TrafficSelector) bool { return within(t, o) }) {
			return false
		}
	}
	return len(l) > 0
}

// addrTS is the selector of everything of an address.
func addrTS(a netip.Addr) ipsec.TrafficSelector {
	return ipsec.TrafficSelector{Start: a, End: a, PortHi: 65535}
}

// selectorTS turns the selector of an outbound policy into our side's and the
// peer's.
func selectorTS(s ipsec.Selector) (local, peer ipsec.TrafficSelector) {
	local, peer = prefixTS(s.Src), prefixTS(s.Dst)
	local.Proto, peer.Proto = s.Proto, s.Proto
	switch {
	case s.Proto == protoICMP || s.Proto == protoICMPv6:
		// Type and code are one number and no matter of sides (RFC 4301,
		// 4.4.1.1; RFC 7296, 3.13.1). Policy counts both from one.
		if s.SrcPort != 0 {
			lo, hi := (s.SrcPort-1)<<8, (s.SrcPort-1)<<8|255
			if s.DstPort != 0 {
				lo |= (s.DstPort - 1) & 255
				hi = lo
			}
			local.PortLo, local.PortHi = lo, hi
			peer.PortLo, peer.PortHi = lo, hi
		}
	default:
		if s.SrcPort != 0 {
			local.PortLo, local.PortHi = s.SrcPort, s.SrcPort
		}
		if s.DstPort != 0 {
			peer.PortLo, peer.PortHi = s.DstPort, s.DstPort
		}
	}
	return local, peer
}

func prefixTS(p netip.Prefix) ipsec.TrafficSelector {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	end, _ := netip.AddrFromSlice(b)
	return ipsec.TrafficSelector{Start: p.Masked().Addr(), End: end, PortHi: 65535}
}

// flowTS gives the selectors of the packet that wants a child SA.
func flowTS(f ipsec.Flow) (local, peer ipsec.TrafficSelector) {
	local, peer = addrTS(f.Src), addrTS(f.Dst)
	local.Proto, peer.Proto = f.Proto, f.Proto
	switch f.Proto {
	case protoICMP, protoICMPv6:
		v := f.SrcPort<<8 | f.DstPort&255
		local.PortLo, local.PortHi, peer.PortLo, peer.PortHi = v, v, v, v
	case protoTCP, protoUDP, protoDCCP, protoSCTP, protoUDPLite:
		if f.SrcPort != 0 || f.DstPort != 0 {
			local.PortLo, local.PortHi = f.SrcPort, f.SrcPort
			peer.PortLo, peer.PortHi = f.DstPort, f.DstPort
		}
	}
	return local, peer
}

// oneFlow reports whether t is what flowTS makes: one address and, of protocols
// that have ports, one port.
func oneFlow(t ipsec.TrafficSelector) bool {
	if t.Start != t.End || t.Proto == 0 {
		return false
	}
	switch t.Proto {
	case protoICMP, protoICMPv6, protoTCP, protoUDP, protoDCCP, protoSCTP, protoUDPLite:
		return t.PortLo == t.PortHi
	}
	return true
}

// policyTS gives both sides of a policy. In transport mode they are cut to the
// IKE SA's own addresses (RFC 7296, 2.23.1); ok is false if nothing is left.
func policyTS(p Policy, mode ipsec.Mode, local, peer netip.Addr) (l, r ipsec.TrafficSelector, ok bool) {
	l, r = selectorTS(p.Out.Sel)
	if mode != ipsec.Transport {
		return l, r, true
	}
	l, ok1 := intersect(l, addrTS(local))
	r, ok2 := intersect(r, addrTS(peer))
	return l, r, ok1 && ok2
}

// toWire and fromWire convert lists. Selectors of a type that we do not know,
// and ranges that run backwards, hold nothing and fall out.
func toWire(l []ipsec.TrafficSelector) []ikev2.TrafficSelector {
	var w []ikev2.TrafficSelector
	for _, t := range l {
		typ := ikev2.TSIPv4Range
		if t.Start.Is6() {
			typ = ikev2.TSIPv6Range
		}
		w = append(w, ikev2.TrafficSelector{Type: typ, Proto: t.Proto, StartPort: t.PortLo, EndPort: t.PortHi, Start: t.Start, End: t.End})
	}
	return w
}

func fromWire(w []ikev2.TrafficSelector) []ipsec.TrafficSelector {
	var l []ipsec.TrafficSelector
	for _, t := range w {
		s := ipsec.TrafficSelector{Proto: t.Proto, Start: t.Start, End: t.End, PortLo: t.StartPort, PortHi: t.EndPort}
		if !t.Start.IsValid() || !t.End.IsValid() || t.End.Less(t.Start) || s.PortHi < s.PortLo && !opaque(s) {
			continue
		}
		l = append(l, s)
	}
	return l
}

// replaceAddr puts to in place of the single address of each selector; ranges
// of more addresses cannot come from a host behind a NAT and fall out. orig is
// the address that stood there (RFC 7296, 2.23.1).
func replaceAddr(l []ipsec.TrafficSelector, to netip.Addr) (out []ipsec.TrafficSelector, orig netip.Addr) {
	for _, t := range l {
		if t.Start != t.End || t.Start.BitLen() != to.BitLen() || orig.IsValid() && t.Start != orig {
			continue
		}
		orig = t.Start
		t.Start, t.End = to, to
		out = append(out, t)
	}
	return out, orig
}
