package wire

import (
	"encoding/binary"
	"net/netip"

	"github.com/gaissmai/bart"
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

// judge applies to an IP packet the test that the chain applies (nft.go); the
// two must be changed together.
func (s *sets) judge(b []byte) verdict {
	if len(b) == 0 {
		return passes
	}
	switch b[0] >> 4 {
	case 4:
		return s.judge4(b)
	case 6:
		return s.judge6(b)
	}
	return passes
}

func (s *sets) judge4(b []byte) verdict {
	if len(b) < 20 {
		return passes
	}
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	if (b[9] == protoESP || b[9] == protoAH) && s.isLocal(dst) {
		return kept
	}
	if !s.diverts(src) {
		return passes
	}
	hlen := int(b[0]&15) * 4
	if hlen < 20 || len(b) < hlen {
		return malformed
	}
	if binary.BigEndian.Uint16(b[6:])&0x3fff == 0 && b[9] == protoUDP && isIKE(b[hlen:]) && s.isLocal(dst) {
		return passes
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
	if len(b) < 40 {
		return passes
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	if isIPsec6(b) && s.isLocal(dst) {
		return kept
	}
	if !s.diverts(src) {
		return passes
	}
	switch b[6] {
	case protoUDP:
		if isIKE(b[40:]) && s.isLocal(dst) {
			return passes
		}
	case protoICMPv6:
		if len(b) > 40 && b[7] == 255 && b[40] >= ndFirst && b[40] <= ndLast {
			return passes
		}
	}
	return kept
}

// isIPsec6 walks the extension headers to ESP or AH. Of a later fragment the
// chain is cut at the fragment header, which still names what follows.
func isIPsec6(b []byte) bool {
	next, off := b[6], 40
	for {
		switch next {
		case protoESP, protoAH:
			return true
		case protoHopByHop, protoRouting, protoDstOpts:
			if off+8 > len(b) {
				return false
			}
			next, off = b[off], off+8*(1+int(b[off+1]))
		case protoFragment:
			if off+8 > len(b) {
				return false
			}
			if binary.BigEndian.Uint16(b[off+2:])&0xfff8 != 0 {
				return b[off] == protoESP || b[off] == protoAH
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
