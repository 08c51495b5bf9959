package packet

import (
	"encoding/binary"
	"net/netip"
)

// DefaultTTL is the hop limit of headers made here.
const DefaultTTL = 64

// PutHeader writes an IPv4 or IPv6 header, by the family of the addresses,
// without options to the front of b, which must have room for it. n is the
// length of the whole packet, at most 65535. DF is set, the identification 0
// (RFC 6864), the IPv4 checksum 0 until FixIPv4Checksum.
func PutHeader(b []byte, src, dst netip.Addr, proto uint8, n int, ttl uint8) {
	if dst.Is4() {
		h := b[:IPv4Len]
		h[0], h[1] = 0x45, 0
		binary.BigEndian.PutUint16(h[2:], uint16(n))
		h[4], h[5], h[6], h[7] = 0, 0, 0x40, 0
		h[8], h[9], h[10], h[11] = ttl, proto, 0, 0
		s, d := src.As4(), dst.As4()
		copy(h[12:], s[:])
		copy(h[16:], d[:])
		return
	}
	h := b[:IPv6Len]
	h[0], h[1], h[2], h[3] = 0x60, 0, 0, 0
	binary.BigEndian.PutUint16(h[4:], uint16(n-IPv6Len))
	h[6], h[7] = proto, ttl
	s, d := src.As16(), dst.As16()
	copy(h[8:], s[:])
	copy(h[24:], d[:])
}

// Outer describes the outer header of a tunnel.
type Outer struct {
	Src, Dst     netip.Addr
	Proto        uint8
	Len          int    // of the whole outer packet
	ID           uint16 // IPv4 identification, of use without DontFragment
	DontFragment bool   // IPv4 DF
	TTL          uint8  // 0: DefaultTTL
}

// PutOuter writes an outer header for the packet inner to the front of b
// (RFC 4301, 5.1.2.1). DSCP and ECN are the inner ones; copying ECN in full is
// RFC 6040's normal mode. The TTL is our own: the inner one counts the hops of
// the inner path. The flow label is 0, since the inner one would show flows.
// The IPv4 checksum is 0 until FixIPv4Checksum.
func PutOuter(b []byte, o Outer, inner *Info) {
	ttl := o.TTL
	if ttl == 0 {
		ttl = DefaultTTL
	}
	PutHeader(b, o.Src, o.Dst, o.Proto, o.Len, ttl)
	if o.Dst.Is4() {
		b[1] = inner.TOS
		binary.BigEndian.PutUint16(b[4:], o.ID)
		if !o.DontFragment {
			b[6] = 0
		}
		return
	}
	b[0] |= inner.TOS >> 4
	b[1] = inner.TOS << 4
}

// OuterProtoOff is the offset of the octet that names the protocol, in a header
// without options or extensions.
func OuterProtoOff(b []byte) int {
	if b[0]>>4 == 6 {
		return 6
	}
	return 9
}

// SetLen writes the length n of the whole packet, header included and at most
// 65535, into the IP header b. The checksum is then wrong until FixIPv4Checksum.
func SetLen(b []byte, n int) {
	if b[0]>>4 == 6 {
		binary.BigEndian.PutUint16(b[4:], uint16(n-IPv6Len))
		return
	}
	binary.BigEndian.PutUint16(b[2:], uint16(n))
}

// SetTransport makes an IP header fit a changed payload in transport mode:
// the octet at protoOff (Info.ProtoOff or TransProtoOff) becomes proto, the
// length n, and the IPv4 checksum right. Inbound and outbound differ only in
// what is written.
func SetTransport(b []byte, protoOff int, proto uint8, n int) {
	b[protoOff] = proto
	SetLen(b, n)
	FixIPv4Checksum(b)
}

// ClearDF lets routers cut the IPv4 packet b; others stay as they are. The
// checksum is then wrong until FixIPv4Checksum.
func ClearDF(b []byte) {
	if len(b) >= IPv4Len && b[0]>>4 == 4 {
		b[6] &^= 0x40
	}
}

// ECN codepoints (RFC 3168, 5).
const (
	notECT = 0
	ect1   = 1
	ect0   = 2
	ce     = 3
)

// DecapECN combines the ECN field of an outer header, by its TOS octet, with
// that of the decapsulated packet b, as RFC 6040, 4.2, and keeps the IPv4
// checksum right. DSCP stays that of the inner packet (RFC 4301, 5.1.2.1). It
// returns false if the packet must be dropped: congestion was marked on a
// packet whose transport would not understand.
//
//	inner \ outer  Not-ECT  ECT(0)   ECT(1)   CE
//	Not-ECT        Not-ECT  Not-ECT  Not-ECT  drop
//	ECT(0)         ECT(0)   ECT(0)   ECT(1)   CE
//	ECT(1)         ECT(1)   ECT(1)   ECT(1)   CE
//	CE             CE       CE       CE       CE
func DecapECN(b []byte, outerTOS uint8) bool {
	if !isIP(b) {
		return true // Decode will say what it is
	}
	six := b[0]>>4 == 6
	inner := b[1] & 3
	if six {
		inner = b[1] >> 4 & 3
	}
	to := inner
	switch outer := outerTOS & 3; {
	case outer == ce && inner == notECT:
		return false
	case outer == ce:
		to = ce
	case outer == ect1 && inner == ect0:
		to = ect1
	}
	if to != inner {
		SetECN(b, to)
	}
	return true
}

// SetECN writes the ECN field of the IP header b and keeps the IPv4 checksum right.
func SetECN(b []byte, ecn uint8) {
	if b[0]>>4 == 6 {
		b[1] = b[1]&^0x30 | ecn<<4
		return
	}
	old := binary.BigEndian.Uint16(b)
	b[1] = b[1]&^3 | ecn
	binary.BigEndian.PutUint16(b[10:], UpdateChecksum(binary.BigEndian.Uint16(b[10:]), old, binary.BigEndian.Uint16(b)))
}
