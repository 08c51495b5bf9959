package explain

import (
	"encoding/binary"
	"net/netip"
)

// datagram is a UDP datagram. cut: it was longer, or is a fragment of IP.
type datagram struct {
	src, dst netip.AddrPort
	data     []byte
	cut      bool
}

// Numbers of what may stand in a frame.
const (
	etherIPv4, etherIPv6       = 0x0800, 0x86dd
	etherVLAN, etherQinQ       = 0x8100, 0x88a8
	protoUDP                   = 17
	protoHopByHop, protoRoute  = 0, 43
	protoFragment, protoDstOpt = 44, 60
)

// known reports whether frames of a link type are looked into.
func known(link uint32) bool {
	switch link {
	case linkNull, linkEthernet, linkRaw, linkLoop, linkSLL, linkIPv4, linkIPv6, linkSLL2, 12, 14:
		return true
	}
	return false
}

// datagramOf finds the UDP datagram in a frame.
func datagramOf(link uint32, b []byte) (d datagram, ok bool) {
	skip := func(n int) bool {
		if len(b) < n {
			return false
		}
		b = b[n:]
		return true
	}
	ether := -1 // the IP header says which it is
	switch link {
	case linkEthernet:
		if len(b) < 14 {
			return d, false
		}
		ether = int(binary.BigEndian.Uint16(b[12:]))
		b = b[14:]
	case linkSLL:
		if len(b) < 16 {
			return d, false
		}
		ether = int(binary.BigEndian.Uint16(b[14:]))
		b = b[16:]
	case linkSLL2:
		if len(b) < 20 {
			return d, false
		}
		ether = int(binary.BigEndian.Uint16(b))
		b = b[20:]
	case linkNull, linkLoop: // a family, in an order and of numbers that differ
		if !skip(4) {
			return d, false
		}
	case linkRaw, linkIPv4, linkIPv6, 12, 14: // the last two: what some systems call raw
	default:
		return d, false
	}
	for (ether == etherVLAN || ether == etherQinQ) && len(b) >= 4 {
		ether = int(binary.BigEndian.Uint16(b[2:]))
		b = b[4:]
	}
	if len(b) == 0 || ether >= 0 && ether != etherIPv4 && ether != etherIPv6 {
		return d, false
	}
	switch b[0] >> 4 {
	case 4:
		return udpIn4(b)
	case 6:
		return udpIn6(b)
	}
	return d, false
}

func udpIn4(b []byte) (d datagram, ok bool) {
	if len(b) < 20 || b[9] != protoUDP {
		return d, false
	}
	head, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	frag := binary.BigEndian.Uint16(b[6:])
	if head < 20 || len(b) < head || frag&0x1fff != 0 {
		return d, false
	}
	src, dst := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	if total >= head && total < len(b) {
		b = b[:total] // padding of Ethernet
	}
	return udp(b[head:], src, dst, frag&0x2000 != 0)
}

func udpIn6(b []byte) (d datagram, ok bool) {
	if len(b) < 40 {
		return d, false
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	next, n := b[6], int(binary.BigEndian.Uint16(b[4:]))
	b = b[40:]
	if n > 0 && n < len(b) {
		b = b[:n]
	}
	more := false
	for {
		switch next {
		case protoUDP:
			return udp(b, src, dst, more)
		case protoHopByHop, protoRoute, protoDstOpt:
			if len(b) < 8 || len(b) < 8*(int(b[1])+1) {
				return d, false
			}
			next, b = b[0], b[8*(int(b[1])+1):]
		case protoFragment:
			if len(b) < 8 || binary.BigEndian.Uint16(b[2:])&0xfff8 != 0 {
				return d, false
			}
			more = more || b[3]&1 != 0
			next, b = b[0], b[8:]
		default:
			return d, false
		}
	}
}

func udp(b []byte, src, dst netip.Addr, more bool) (d datagram, ok bool) {
	if len(b) < 8 {
		return d, false
	}
	n := int(binary.BigEndian.Uint16(b[4:]))
	if n < 8 {
		return d, false
	}
	d = datagram{
		src: netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)), dst: netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
		cut: more || n > len(b),
	}
	d.data = b[8:min(n, len(b))]
	return d, true
}
