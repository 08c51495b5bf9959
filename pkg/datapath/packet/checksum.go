package packet

import (
	"encoding/binary"
	"math/bits"
)

// Checksum returns the Internet checksum of b (RFC 1071): the complement of
// the one's complement sum. Over data that contains its own correct checksum
// it is 0.
func Checksum(b []byte) uint16 { return ^fold(sum(b, 0)) }

// vectorMin is the number of octets from which vectors are worth their setup;
// they take multiples of vector.
const (
	vectorMin = 64
	vector    = 32
)

// sum adds b to acc as big-endian 64-bit words with end-around carry, which
// folds to the same 16 bits as the sum of 16-bit words (RFC 1071, 2).
func sum(b []byte, acc uint64) uint64 {
	if haveVectors && len(b) >= vectorMin {
		n := len(b) &^ (vector - 1)
		acc = addSwapped(acc, addAVX2(&b[0], n))
		b = b[n:]
	}
	var c uint64
	for len(b) >= 32 {
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b), c)
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b[8:]), c)
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b[16:]), c)
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b[24:]), c)
		b = b[32:]
	}
	for len(b) >= 8 {
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b), c)
		b = b[8:]
	}
	// What is left may stand in any 16-bit word of one more.
	var last uint64
	if len(b) >= 4 {
		last = uint64(binary.BigEndian.Uint32(b)) << 32
		b = b[4:]
	}
	if len(b) >= 2 {
		last |= uint64(binary.BigEndian.Uint16(b)) << 16
		b = b[2:]
	}
	if len(b) > 0 {
		last |= uint64(b[0]) << 8
	}
	acc, c = bits.Add64(acc, last, c)
	acc, c = bits.Add64(acc, 0, c)
	return acc + c
}

// copySum is sum of src, which it copies to dst on the way: one pass over
// memory instead of two. dst has room for src and does not overlap it.
func copySum(dst, src []byte, acc uint64) uint64 {
	if haveVectors && len(src) >= vectorMin {
		n := len(src) &^ (vector - 1)
		acc = addSwapped(acc, copyAddAVX2(&dst[:n][0], &src[0], n))
		dst, src = dst[n:], src[n:]
	}
	return sum(dst[:copy(dst[:len(src)], src)], acc)
}

// addSwapped adds to acc a sum of little-endian words, which is the sum of the
// big-endian ones with its octets exchanged (RFC 1071, 2 (B)).
func addSwapped(acc, little uint64) uint64 {
	acc, c := bits.Add64(acc, uint64(bits.ReverseBytes16(fold(little))), 0)
	return acc + c
}

func fold(acc uint64) uint16 {
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return uint16(acc)
}

// UpdateChecksum returns checksum c after a 16-bit word under it has changed
// from old to new (RFC 1624, eqn. 3).
func UpdateChecksum(c, old, new uint16) uint16 {
	s := uint32(^c) + uint32(^old) + uint32(new)
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return ^uint16(s)
}

// FixIPv4Checksum computes the header checksum of the IPv4 packet b anew. Other
// packets have none and stay as they are.
func FixIPv4Checksum(b []byte) {
	if len(b) < IPv4Len || b[0]>>4 != 4 {
		return
	}
	hl := int(b[0]&15) * 4
	if hl < IPv4Len || hl > len(b) {
		return
	}
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], Checksum(b[:hl]))
}

// pseudo returns the sum of the pseudo-header (RFC 768; RFC 8200, 8.1) of the
// IP packet b with an upper-layer packet of n octets.
func pseudo(b []byte, proto uint8, n int) uint64 {
	if b[0]>>4 == 4 {
		return sum(b[12:20], uint64(proto)+uint64(n))
	}
	return sum(b[8:40], uint64(proto)+uint64(n))
}

// upperChecksum is the checksum of upper-layer packet u of IP packet b.
func upperChecksum(b, u []byte, proto uint8) uint16 {
	return ^fold(sum(u, pseudo(b, proto, len(u))))
}

// FixTransportChecksum computes the checksum of the upper-layer packet of
// protocol proto at b[hdr:] anew, where that covers the IP addresses: TCP, UDP
// and ICMPv6. It serves transport mode behind a NAT (RFC 3948, 3.1.2), where
// addresses have changed under a checksum that ESP has vouched for. A UDP
// checksum of 0 over IPv4 stays: the sender has made none. Of UDP-Lite only
// full coverage is corrected; partial coverage is left to fail.
func FixTransportChecksum(b []byte, hdr int, proto uint8) {
	if !isIP(b) || hdr > len(b) {
		return
	}
	u := b[hdr:]
	var at int
	switch proto {
	case protoTCP:
		at = 16
	case protoUDP:
		at = 6
	case protoICMPv6:
		at = 2
	case protoUDPLite:
		at = 6
		if len(u) < UDPLen || u[4] != 0 || u[5] != 0 {
			return
		}
	default:
		return
	}
	if len(u) < at+2 {
		return
	}
	if proto == protoUDP && b[0]>>4 == 4 && u[at] == 0 && u[at+1] == 0 {
		return
	}
	putUpper(b, u, at, proto)
}

// PutUDPChecksum completes the UDP header of a packet that was just built:
// encapsulation over IPv6, where 0 is not allowed (RFC 8200, 8.1). What is
// not UDP stays as it is.
func PutUDPChecksum(b []byte) {
	var i Info
	if !Decode(b, &i) || i.Proto != protoUDP || i.IsFragment() || i.Len-i.HdrLen < UDPLen {
		return
	}
	putUpper(b, b[i.HdrLen:i.Len], 6, protoUDP)
}

func putUpper(b, u []byte, at int, proto uint8) {
	u[at], u[at+1] = 0, 0
	c := upperChecksum(b, u, proto)
	if c == 0 && (proto == protoUDP || proto == protoUDPLite) {
		c = 0xffff // 0 means "none" (RFC 768)
	}
	binary.BigEndian.PutUint16(u[at:], c)
}

func isIP(b []byte) bool {
	return len(b) >= IPv4Len && b[0]>>4 == 4 || len(b) >= IPv6Len && b[0]>>4 == 6
}
