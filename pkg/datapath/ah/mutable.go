package ah

import "encoding/binary"

// immutable4 turns an IPv4 header with options into what the ICV covers: what
// may change on the way is zero, what changes predictably is as it will be at
// the destination (RFC 4302, 3.3.3.1.1). Of the fixed part old AH takes only TTL
// and checksum for mutable (RFC 1826, 3). False if its length or an option's is
// not possible.
func immutable4(h []byte, old bool) bool {
	if len(h) < 20 || int(h[0]&15)*4 != len(h) {
		return false
	}
	if !old {
		h[1] = 0          // DSCP, ECN
		h[6], h[7] = 0, 0 // flags, fragment offset
	}
	h[8] = 0            // TTL
	h[10], h[11] = 0, 0 // checksum
	for o := h[20:]; ; {
		if len(o) == 0 || o[0] == optEnd {
			return true // what follows the end is padding, covered as it is
		}
		if o[0] == optNOP {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return false
		}
		n := int(o[1])
		switch o[0] {
		case optSecurity, optExtSecurity, optCIPSO, optRouterAlert, optSDMD:
			// RFC 4302, appendix A1: immutable.
		case optLSRR, optSSRR:
			// The destination is what it will be when the route is used up.
			if n < 3 {
				return false
			}
			if ptr := int(o[2]); ptr >= 4 && ptr+3 <= n {
				copy(h[16:20], o[n-4:n])
			}
			clear(o[:n])
		default:
			clear(o[:n])
		}
		o = o[n:]
	}
}

// IPv4 options that an ICV covers or that route (RFC 4302, appendix A1).
const (
	optEnd         = 0
	optNOP         = 1
	optSecurity    = 130 // RFC 1108
	optLSRR        = 131
	optExtSecurity = 133 // RFC 1108
	optCIPSO       = 134
	optSSRR        = 137
	optRouterAlert = 148 // RFC 2113
	optSDMD        = 149 // RFC 1770
)

// IPv6 extension headers in front of AH.
const (
	nextHopByHop = 0
	nextRouting  = 43
	nextDstOpts  = 60
)

// optPad1 is the only IPv6 option without a length.
const optPad1 = 0

// optChanges is the bit of an IPv6 option's type that says that its data may
// change en route (RFC 8200, 4.2).
const optChanges = 0x20

// immutable6 is immutable4 for an IPv6 header with extension headers (RFC
// 4302, 3.3.3.1.2). Other headers than it knows stay as they are: the fragment
// header of an atomic fragment (RFC 6946) does not change.
func immutable6(h []byte, old bool) bool {
	if len(h) < 40 {
		return false
	}
	next := h[6]
	if !old {
		h[0], h[1], h[2], h[3] = 0x60, 0, 0, 0 // traffic class, flow label
	}
	h[7] = 0 // hop limit
	for e := h[40:]; len(e) > 0; {
		if len(e) < 8 {
			return false
		}
		n := 8 + 8*int(e[1])
		if next == nextFragment {
			n = 8
		}
		if n > len(e) {
			return false
		}
		switch next {
		case nextHopByHop, nextDstOpts:
			if !zeroOptions(e[2:n]) {
				return false
			}
		case nextRouting:
			if !arrived(h[24:40], e[:n]) {
				return false
			}
		case nextFragment:
		default:
			return false
		}
		next, e = e[0], e[n:]
	}
	return true
}

const nextFragment = 44

// zeroOptions zeroes the data of options that may change; type and length are
// covered (RFC 4302, 3.3.3.1.2.2).
func zeroOptions(o []byte) bool {
	for len(o) > 0 {
		if o[0] == optPad1 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || 2+int(o[1]) > len(o) {
			return false
		}
		n := 2 + int(o[1])
		if o[0]&optChanges != 0 {
			clear(o[2:n])
		}
		o = o[n:]
	}
	return true
}

// arrived rearranges a routing header and the destination address as they will
// be when the packet arrives (RFC 4302, 3.3.3.1.2.1; RFC 2460, 4.4): no
// segments left, the addresses moved on by one each. Types 0 and 2 (RFC 6275,
// 6.4) are such; of others with segments left nobody can tell.
func arrived(dst, e []byte) bool {
	left := int(e[3])
	if left == 0 {
		return true
	}
	addrs := e[8:]
	n := len(addrs) / 16
	if e[2] != 0 && e[2] != 2 || len(addrs)%16 != 0 || left > n {
		return false
	}
	// Of the last `left` addresses and the destination, each hop exchanges
	// the destination with the next address.
	var final [16]byte
	copy(final[:], addrs[(n-1)*16:])
	part := addrs[(n-left)*16:]
	copy(part[16:], part[:len(part)-16])
	copy(part, dst)
	copy(dst, final[:])
	e[3] = 0
	return true
}

// Identify says whether AH needs the IPv4 header ip to get an identification
// of its own before it is sealed: one of 0 is replaced by kernels and by whoever
// cuts the packet, and the ICV covers it.
func Identify(ip []byte) bool {
	return len(ip) >= 20 && ip[0]>>4 == 4 && binary.BigEndian.Uint16(ip[4:]) == 0
}
