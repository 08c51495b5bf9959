package packet

import (
	"encoding/binary"
	"net/netip"
)

// MinIPv6MTU is the smallest MTU of an IPv6 link (RFC 8200, 5).
const MinIPv6MTU = 1280

// MinIPv4MTU is the smallest MTU of an IPv4 link (RFC 791, 3.2).
const MinIPv4MTU = 68

// MaxTooBig is the largest packet that AppendTooBig makes.
const MaxTooBig = MinIPv6MTU

// maxICMPv4 is how long an IPv4 ICMP error may be at most (RFC 1812, 4.3.2.3).
const maxICMPv4 = 576

const (
	icmpUnreachable  = 3
	icmpFragNeeded   = 4 // code
	icmpQuench       = 4
	icmpRedirect     = 5
	icmpTimeExceeded = 11
	icmpParamProblem = 12
	icmpEcho         = 8
	icmp6TooBig      = 2
	icmp6Echo        = 128
)

// MayTooBig reports whether the sender of a packet may be told that it is too
// big: not for later fragments, errors of ICMP itself, IPv4 multicast and
// broadcast, nor sources that are no single host (RFC 1122, 3.2.2; RFC 4443,
// 2.4 e, which allows Packet Too Big for multicast).
func MayTooBig(b []byte, i *Info) bool {
	if i.FragOff != 0 || !i.Src.IsValid() || i.Src.IsUnspecified() || i.Src.IsMulticast() {
		return false
	}
	if i.Version == 4 {
		if i.Dst.IsMulticast() || i.Dst == broadcast || i.Src == broadcast {
			return false
		}
		if i.Proto == protoICMP {
			switch {
			case i.HdrLen >= i.Len:
				return false
			case b[i.HdrLen] == icmpUnreachable, b[i.HdrLen] == icmpQuench, b[i.HdrLen] == icmpRedirect,
				b[i.HdrLen] == icmpTimeExceeded, b[i.HdrLen] == icmpParamProblem:
				return false
			}
		}
		return true
	}
	// RFC 4443, 2.1: error messages have types below 128. 137 is Redirect.
	return i.Proto != protoICMPv6 || i.HdrLen < i.Len && b[i.HdrLen] >= 128 && b[i.HdrLen] != 137
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// AppendTooBig appends a complete IP packet from src to the sender of orig,
// which is decoded in i, that says it is too big for mtu: ICMP type 3 code 4
// (RFC 1191, 4) or ICMPv6 type 2 (RFC 4443, 3.2). It has as much of orig as
// the RFCs allow, at most MaxTooBig octets in all. If MayTooBig says no, or
// src is of another family, b is returned as it is.
func AppendTooBig(b, orig []byte, i *Info, mtu int, src netip.Addr) []byte {
	if i.Version == 0 || src.Is4() != (i.Version == 4) || !MayTooBig(orig, i) {
		return b
	}
	mtu = min(max(mtu, 0), 65535)
	hdr, limit, proto := IPv4Len, maxICMPv4, uint8(protoICMP)
	if i.Version == 6 {
		hdr, limit, proto = IPv6Len, MinIPv6MTU, protoICMPv6
	}
	quote := orig[:min(i.Len, limit-hdr-8)]
	n := hdr + 8 + len(quote)
	start := len(b)
	for range (hdr + 8) / 4 {
		b = append(b, 0, 0, 0, 0)
	}
	b = append(b, quote...)
	p := b[start:]
	PutHeader(p, src, i.Src, proto, n, DefaultTTL)
	m := p[hdr:]
	if i.Version == 6 {
		m[0] = icmp6TooBig
		binary.BigEndian.PutUint32(m[4:], uint32(mtu))
		putUpper(p, m, 2, protoICMPv6)
		return b
	}
	m[0], m[1] = icmpUnreachable, icmpFragNeeded
	binary.BigEndian.PutUint16(m[6:], uint16(mtu))
	binary.BigEndian.PutUint16(m[2:], Checksum(m))
	FixIPv4Checksum(p)
	return b
}

// Returning fills q with what the answer to the packet would look like that the
// ICMP error b, decoded in i, quotes: addresses and ports the other way round
// (RFC 4301, 6.2). Selectors compare it; its lengths and offsets mean nothing.
// It is false if b is no error (RFC 1122, 3.2.2; RFC 4443, 2.1), or the quote
// shows no packet that the one to whom the error goes has sent.
func Returning(b []byte, i, q *Info) bool {
	*q = Info{}
	if !IsICMP(i.Proto) || i.IsFragment() || i.HdrLen+8 > i.Len {
		return false
	}
	m := b[i.HdrLen:i.Len]
	p := m[8:]
	ok := false
	if i.Version == 4 {
		switch m[0] {
		case icmpUnreachable, icmpTimeExceeded, icmpParamProblem:
			ok = i.Proto == protoICMP && q.quoted4(p)
		}
	} else {
		ok = i.Proto == protoICMPv6 && m[0] < 128 && q.quoted6(p)
	}
	if !ok || q.Src != i.Dst {
		*q = Info{}
		return false
	}
	q.ports(p)
	q.Src, q.Dst = q.Dst, q.Src
	switch {
	case !q.HasPorts:
	case !IsICMP(q.Proto):
		q.SrcPort, q.DstPort = q.DstPort, q.SrcPort
	case q.Proto == protoICMP && q.SrcPort == icmpEcho, q.Proto == protoICMPv6 && q.SrcPort == icmp6Echo:
		q.SrcPort = echoReply(q.SrcPort)
	}
	return true
}

func echoReply(request uint16) uint16 {
	if request == icmpEcho {
		return 0
	}
	return request + 1
}

// quoted4 decodes the front of an IPv4 packet.
func (i *Info) quoted4(b []byte) bool {
	if len(b) < IPv4Len || b[0]>>4 != 4 {
		return false
	}
	hl := int(b[0]&15) * 4
	if hl < IPv4Len || hl > len(b) {
		return false
	}
	i.Version, i.Proto, i.HdrLen, i.ProtoOff = 4, b[9], hl, 9
	fo := binary.BigEndian.Uint16(b[6:])
	i.MF, i.FragOff = fo&0x2000 != 0, int(fo&0x1fff)*8
	i.Src, i.Dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	return true
}

// quoted6 decodes the front of an IPv6 packet.
func (i *Info) quoted6(b []byte) bool {
	if len(b) < IPv6Len || b[0]>>4 != 6 {
		return false
	}
	i.Version = 6
	i.Src, i.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	return !i.Src.Is4In6() && !i.Dst.Is4In6() && i.walk(b)
}
