package wire

import (
	"encoding/binary"
	"net/netip"

	"github.com/gaissmai/bart"
	"golang.org/x/sys/unix"
)

const (
	protoHopByHop = 0
	protoICMP     = 1
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoESP      = 50
	protoAH       = 51
	protoICMPv6   = 58
	protoDstOpts  = 60
	protoIPComp   = 108

	portIKE  = 500
	portNATT = 4500

	ndFirst = 133 // router solicitation
	ndLast  = 137 // redirect
)

// sets is one generation of what decides whose packet it is. Readers take it
// from an atomic pointer; it never changes.
type sets struct {
	divert *bart.Lite
	// also, if not nil, must hold the source as well: while the chain in the
	// kernel is exchanged the reader takes only what both chains drop.
	also  *bart.Lite
	local map[netip.Addr]struct{}
}

func (s *sets) diverts(src netip.Addr) bool {
	return s.divert.Contains(src) && (s.also == nil || s.also.Contains(src))
}

func (s *sets) isLocal(a netip.Addr) bool {
	_, ok := s.local[a]
	return ok
}

// verdict of the test.
type verdict uint8

const (
	passes    verdict = iota // the stack's
	kept                     // ours
	malformed                // dropped by the chain, and no IP packet
)

// judge applies to the packet behind an Ethernet header of the given type the
// test that the chain applies (nft.go). The two must be changed together, and
// agree about malformed packets too: where a rule of the chain cannot read its
// field it does not match, so that what cannot be read is dropped.
func (s *sets) judge(etherType uint16, b []byte) verdict {
	v := passes
	switch etherType {
	case unix.ETH_P_IP:
		v = s.judge4(b)
		if v == kept && (len(b) < 20 || b[0]>>4 != 4) {
			v = malformed
		}
	case unix.ETH_P_IPV6:
		v = s.judge6(b)
		if v == kept && (len(b) < 40 || b[0]>>4 != 6) {
			v = malformed
		}
	}
	return v
}

func (s *sets) judge4(b []byte) verdict {
	toUs := len(b) >= 20 && s.isLocal(netip.AddrFrom4([4]byte(b[16:20])))
	if toUs && isIPsec(b[9]) {
		return kept
	}
	if len(b) < 16 {
		return kept
	}
	if !s.diverts(netip.AddrFrom4([4]byte(b[12:16]))) {
		return passes
	}
	if toUs && b[9] == protoUDP && binary.BigEndian.Uint16(b[6:])&0x3fff == 0 {
		hlen, n := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
		if b[0]>>4 == 4 && hlen >= 20 && n >= hlen && n <= len(b) && isIKE(b[hlen:]) {
			return passes
		}
	}
	return kept
}

// isIKE: the datagram goes to a port of the key daemon. Its source port is the
// sender's choice and decides nothing.
func isIKE(udp []byte) bool {
	if len(udp) < 8 {
		return false
	}
	p := binary.BigEndian.Uint16(udp[2:])
	return p == portIKE || p == portNATT
}

func (s *sets) judge6(b []byte) verdict {
	toUs := len(b) >= 40 && s.isLocal(netip.AddrFrom16([16]byte(b[24:40])))
	if toUs && isIPsec6(b) {
		return kept
	}
	if len(b) < 24 {
		return kept
	}
	if !s.diverts(netip.AddrFrom16([16]byte(b[8:24]))) {
		return passes
	}
	switch {
	case toUs && b[6] == protoUDP && isIKE(b[40:]):
		return passes
	case len(b) > 40 && b[6] == protoICMPv6 && b[7] == 255 && b[40] >= ndFirst && b[40] <= ndLast:
		return passes
	}
	return kept
}

// isIPsec: the protocol is the data path's, with nobody else to take it.
func isIPsec(proto byte) bool { return proto == protoESP || proto == protoAH || proto == protoIPComp }

// isIPsec6 walks the extension headers of a packet of at least 40 octets to
// ESP, AH or IPComp, as far as the kernel does. Of a later fragment the chain is cut at
// the fragment header, which still names what follows.
func isIPsec6(b []byte) bool {
	if isIPsec(b[6]) {
		return true // the chain does not need the walk for it either
	}
	whole := b[0]>>4 == 6 && 40+int(binary.BigEndian.Uint16(b[4:])) <= len(b)
	next, off := b[6], 40
	for {
		switch next {
		case protoESP, protoIPComp:
			return whole
		case protoAH:
			return off+2 <= len(b)
		case protoHopByHop, protoRouting, protoDstOpts:
			if off+2 > len(b) || next == protoRouting && off+4 > len(b) {
				return false
			}
			next, off = b[off], off+8*(1+int(b[off+1]))
		case protoFragment:
			if off+4 > len(b) {
				return false
			}
			if isIPsec(b[off]) {
				return true
			}
			if binary.BigEndian.Uint16(b[off+2:])&0xfff8 != 0 {
				return false
			}
			next, off = b[off], off+8
		default:
			return false
		}
	}
}

// table makes a look-up table of prefixes.
func table(ps ...[]netip.Prefix) *bart.Lite {
	t := new(bart.Lite)
	for _, l := range ps {
		for _, p := range l {
			t.Insert(p)
		}
	}
	return t
}
