// Package packet reads and writes IP headers for the data path: it decodes an
// IPv4 or IPv6 packet once into an Info on the caller's stack (RFC 791, RFC
// 8200), writes the outer headers of tunnel mode (RFC 4301, 5.1.2; ECN by RFC
// 6040), changes headers for transport mode, computes checksums (RFC 1071)
// and builds the ICMP messages of path MTU discovery (RFC 1191, RFC 8201). It
// hides every offset of these headers. The engine, frag, sad and spd call it.
// Nothing here allocates, keeps a slice or changes state, so all of it is safe
// for concurrent use.
package packet

import (
	"encoding/binary"
	"net/netip"

	"github.com/missiu/missiu/pkg/ipsec"
)

// Upper-layer and extension header numbers that decoding depends on.
const (
	protoHopByHop = 0
	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoDCCP     = 33
	protoRouting  = 43
	protoFragment = 44
	protoICMPv6   = 58
	protoDstOpts  = 60
	protoSCTP     = 132
	protoUDPLite  = 136
)

// Header lengths in octets, without options and extensions.
const (
	IPv4Len = 20
	IPv6Len = 40
	UDPLen  = 8
)

// maxExtensions bounds the walk along IPv6 extension headers. RFC 8200, 4.1
// names six that may occur, one of them twice. Without a bound a packet of 64
// KiB with 8000 empty option headers would cost each receiver as many steps.
const maxExtensions = 8

// Info is what one look at a packet tells. Offsets count from the first octet
// of the IP header, lengths are in octets, numbers in host order.
type Info struct {
	Version  uint8 // 4 or 6; 0: not IP or malformed, then nothing else holds
	Proto    uint8 // upper protocol, behind IPv6 extension headers; see ProtoKnown
	TOS, TTL uint8 // traffic class, hop limit
	Len      int   // of the packet by its own header; what follows is padding of the link
	Src, Dst netip.Addr

	HdrLen   int // where the upper-layer header starts; of a later fragment, its data
	ProtoOff int // of the octet that names Proto

	// Where transport mode inserts ESP: behind hop-by-hop options, routing and
	// fragment header, in front of destination options that only the final
	// destination reads (RFC 4303, 3.1.1); and the octet that names what is there.
	TransOff, TransProtoOff int

	// Ports of TCP, UDP, SCTP, UDP-Lite, DCCP; type and code of ICMP and
	// ICMPv6. HasPorts is false for other protocols, for fragments behind the
	// first, and where the packet ends before them.
	SrcPort, DstPort uint16
	HasPorts         bool

	DF, MF  bool   // DF of IPv4 only
	FragOff int    // in octets
	ID      uint32 // identification; 16 bits of IPv4
	// FragHdr is the offset of the IPv6 fragment header, 0 if there is none;
	// FragProtoOff that of the octet that names it.
	FragHdr, FragProtoOff int
}

// IsFragment reports whether the packet is part of a datagram. An IPv6 "atomic
// fragment" is whole (RFC 6946).
func (i *Info) IsFragment() bool { return i.MF || i.FragOff != 0 }

// ProtoKnown reports whether Proto is the upper protocol. Of a later IPv6
// fragment whose first one carries destination options within the fragmented
// part, only these are known: it must not be judged as "protocol 60".
func (i *Info) ProtoKnown() bool {
	return i.Version != 6 || i.FragOff == 0 || !isExtension(i.Proto)
}

// Flow returns what policies look at.
func (i *Info) Flow() ipsec.Flow {
	f := ipsec.Flow{Src: i.Src, Dst: i.Dst, Proto: i.Proto}
	if i.HasPorts {
		f.SrcPort, f.DstPort = i.SrcPort, i.DstPort
	}
	return f
}

// DstIsLinkScope reports whether the packet is for this link or this host only.
func (i *Info) DstIsLinkScope() bool {
	return i.Dst.IsLinkLocalUnicast() || i.Dst.IsLinkLocalMulticast() || i.Dst.IsInterfaceLocalMulticast()
}

// HasPortNumbers reports whether protocol p starts with two 16-bit ports.
func HasPortNumbers(p uint8) bool {
	switch p {
	case protoTCP, protoUDP, protoSCTP, protoUDPLite, protoDCCP:
		return true
	}
	return false
}

// IsICMP reports whether p is ICMP or ICMPv6, whose type and code stand in the
// place of ports.
func IsICMP(p uint8) bool { return p == protoICMP || p == protoICMPv6 }

func isExtension(p uint8) bool {
	switch p {
	case protoHopByHop, protoRouting, protoFragment, protoDstOpts:
		return true
	}
	return false
}

// Decode fills i from the packet b, which may be followed by padding, and
// reports whether it is one that may go on. It refuses what cannot be an IP
// packet, and what two receivers could read in two ways:
//
//   - a length in the header beyond b, or that does not cover the header;
//   - a fragment that would end beyond 65535 octets ("ping of death");
//   - more than 8 extension headers, hop-by-hop options not in front, two
//     fragment headers: a packet whose upper header the policy has not found
//     but some host would;
//   - a first fragment or whole packet whose chain of extension headers is cut
//     (RFC 7112): the upper header would come in a fragment not looked at;
//   - IPv6 routing header type 0 with segments left (RFC 5095): the policy
//     would judge the next hop, not the destination;
//   - IPv4-mapped IPv6 addresses: a socket of the host takes ::ffff:192.0.2.1
//     for the IPv4 peer that another policy protects;
//   - jumbograms (RFC 2675), which ESP cannot carry through these buffers.
//
// It does not verify checksums. A later fragment and a cut upper header are
// values (HasPorts false), no errors: tiny first fragments (RFC 1858) therefore
// show no ports, and lookups by port call them ambiguous.
func Decode(b []byte, i *Info) bool {
	*i = Info{}
	if len(b) < IPv4Len {
		return false
	}
	switch b[0] >> 4 {
	case 4:
		if !i.decode4(b) {
			*i = Info{}
			return false
		}
	case 6:
		if !i.decode6(b) {
			*i = Info{}
			return false
		}
	default:
		return false
	}
	i.ports(b[:i.Len])
	return true
}

// DecodeNext is Decode for a packet that probably follows the one in i: of the same
// flow, and as plain. It takes half the time then.
func DecodeNext(b []byte, i *Info) bool {
	if !i.next(b) {
		return Decode(b, i)
	}
	return true
}

// next makes i that of b if all but the length and a few fields stay as they are;
// else it leaves i alone.
func (i *Info) next(b []byte) bool {
	be := binary.BigEndian
	if !i.HasPorts || i.TransOff != i.HdrLen || i.FragOff != 0 || i.MF || i.FragHdr != 0 || i.Proto != protoTCP && i.Proto != protoUDP {
		return false
	}
	if i.Version == 6 {
		if i.HdrLen != IPv6Len || len(b) < IPv6Len+4 || b[0]>>4 != 6 || b[6] != i.Proto ||
			be.Uint16(b[IPv6Len:]) != i.SrcPort || be.Uint16(b[IPv6Len+2:]) != i.DstPort ||
			netip.AddrFrom16([16]byte(b[8:24])) != i.Src || netip.AddrFrom16([16]byte(b[24:40])) != i.Dst {
			return false
		}
		n := IPv6Len + int(be.Uint16(b[4:]))
		if n < IPv6Len+4 || n > len(b) || n > 65535 {
			return false
		}
		i.Len, i.TOS, i.TTL = n, b[0]<<4|b[1]>>4, b[7]
		return true
	}
	if i.HdrLen != IPv4Len || len(b) < IPv4Len+4 || b[0] != 0x45 || b[9] != i.Proto ||
		be.Uint16(b[IPv4Len:]) != i.SrcPort || be.Uint16(b[IPv4Len+2:]) != i.DstPort ||
		netip.AddrFrom4([4]byte(b[12:16])) != i.Src || netip.AddrFrom4([4]byte(b[16:20])) != i.Dst {
		return false
	}
	n, fo := int(be.Uint16(b[2:])), be.Uint16(b[6:])
	if n < IPv4Len+4 || n > len(b) || fo&0x3fff != 0 {
		return false
	}
	i.Len, i.TOS, i.TTL = n, b[1], b[8]
	i.ID, i.DF = uint32(be.Uint16(b[4:])), fo&0x4000 != 0
	return true
}

func (i *Info) decode4(b []byte) bool {
	hl := int(b[0]&15) * 4
	n := int(binary.BigEndian.Uint16(b[2:]))
	if hl < IPv4Len || n < hl || n > len(b) {
		return false
	}
	fo := binary.BigEndian.Uint16(b[6:])
	i.Version = 4
	i.Len = n
	i.TOS, i.TTL, i.Proto = b[1], b[8], b[9]
	i.ID = uint32(binary.BigEndian.Uint16(b[4:]))
	i.DF, i.MF = fo&0x4000 != 0, fo&0x2000 != 0
	i.FragOff = int(fo&0x1fff) * 8
	if i.FragOff+n > 65535 {
		return false
	}
	i.Src = netip.AddrFrom4([4]byte(b[12:16]))
	i.Dst = netip.AddrFrom4([4]byte(b[16:20]))
	i.HdrLen, i.ProtoOff = hl, 9
	i.TransOff, i.TransProtoOff = hl, 9
	return true
}

func (i *Info) decode6(b []byte) bool {
	if len(b) < IPv6Len {
		return false
	}
	n := IPv6Len + int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b) || n > 65535 {
		return false
	}
	i.Version = 6
	i.Len = n
	i.TOS, i.TTL = b[0]<<4|b[1]>>4, b[7]
	i.Src = netip.AddrFrom16([16]byte(b[8:24]))
	i.Dst = netip.AddrFrom16([16]byte(b[24:40]))
	if i.Src.Is4In6() || i.Dst.Is4In6() {
		return false
	}
	return i.walk(b[:n])
}

// walk follows the extension headers of an IPv6 packet.
func (i *Info) walk(b []byte) bool {
	off, protoOff, next := IPv6Len, 6, b[6]
	i.TransOff, i.TransProtoOff = off, protoOff
	for range maxExtensions + 1 {
		if !isExtension(next) {
			i.Proto, i.HdrLen, i.ProtoOff = next, off, protoOff
			return true
		}
		if len(b)-off < 8 {
			return false
		}
		h := b[off:]
		n := 8 + int(h[1])*8
		switch next {
		case protoHopByHop:
			if off != IPv6Len {
				return false
			}
		case protoRouting:
			if h[2] == 0 && h[3] != 0 {
				return false
			}
		case protoFragment:
			n = 8
			if i.FragHdr != 0 {
				return false
			}
			i.FragHdr, i.FragProtoOff = off, protoOff
			fo := binary.BigEndian.Uint16(h[2:])
			i.FragOff, i.MF = int(fo&^7), fo&1 != 0
			i.ID = binary.BigEndian.Uint32(h[4:])
			if i.FragOff+len(b)-off-n > 65535 {
				return false
			}
		}
		if n > len(b)-off {
			return false
		}
		if next != protoDstOpts {
			i.TransOff, i.TransProtoOff = off+n, off
		}
		next, protoOff = h[0], off
		off += n
		if i.FragOff != 0 {
			// Behind the header of a later fragment lies data.
			i.Proto, i.HdrLen, i.ProtoOff = next, off, protoOff
			return true
		}
	}
	return false
}

// ports reads what selectors compare. Of ICMP two octets suffice.
func (i *Info) ports(b []byte) {
	if i.FragOff != 0 {
		return
	}
	u := b[i.HdrLen:]
	switch {
	case HasPortNumbers(i.Proto) && len(u) >= 4:
		i.SrcPort = binary.BigEndian.Uint16(u)
		i.DstPort = binary.BigEndian.Uint16(u[2:])
		i.HasPorts = true
	case IsICMP(i.Proto) && len(u) >= 2:
		i.SrcPort, i.DstPort = uint16(u[0]), uint16(u[1])
		i.HasPorts = true
	}
}
