// Package neigh keeps the kernel's neighbour tables of the TAP filled: behind
// the TAP there is no link, so missiu answers ARP (RFC 826) and neighbour
// solicitations (RFC 4861) for every destination that a route sends there. It
// also sorts what else the kernel says on such a link. Pure functions over
// Ethernet frames; the outbound worker of pkg/datapath is the caller.
package neigh

import (
	"encoding/binary"
	"net/netip"
)

// MAC answers for every host behind the TAP: locally administered, the same
// always, so that neighbour entries survive a restart. It is not the TAP's own
// address, which is the real interface's.
var MAC = [6]byte{0x02, 'm', 'i', 's', 's', 'i'}

// MaxAnswer is the length of the longest frame that Answer writes, in octets:
// a neighbour advertisement with its target link-layer address option.
const MaxAnswer = etherLen + ipv6Len + 32

// Class says what a frame from the TAP is.
type Class uint8

// Classes.
const (
	Noise Class = iota // control traffic of the TAP's own link, other ethertypes, cut frames: to be dropped
	Query              // ARP request or neighbour solicitation: for Answer
	Data               // IPv4 or IPv6 packet for the data path
)

func (c Class) String() string {
	switch c {
	case Noise:
		return "noise"
	case Query:
		return "query"
	case Data:
		return "data"
	}
	return "Class(?)"
}

const (
	etherLen = 14
	arpLen   = 28
	ipv6Len  = 40

	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherIPv6 = 0x86dd

	protoHopByHop = 0
	protoIGMP     = 2
	protoICMPv6   = 58

	typeRS       = 133
	typeRA       = 134
	typeNS       = 135
	typeNA       = 136
	typeRedirect = 137
)

// Classify sorts an Ethernet frame that the kernel sent to the TAP.
//
// Data is IP, unicast and application multicast (mDNS is a packet like any
// other). Noise is what concerns only the TAP's link: router solicitations,
// multicast listener reports, IGMP, advertisements, and solicitations that are
// no questions to the neighbourhood at large.
func Classify(frame []byte) Class {
	if len(frame) < etherLen {
		return Noise
	}
	b := frame[etherLen:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherARP:
		if isARPRequest(b) {
			return Query
		}
	case etherIPv4:
		if len(b) < 20 || b[0]>>4 != 4 {
			return Noise
		}
		// 224.0.0.0/24 never leaves a link (RFC 5771, 4); of it only IGMP
		// speaks about the link itself.
		if b[9] == protoIGMP && b[16]&0xf0 == 0xe0 {
			return Noise
		}
		return Data
	case etherIPv6:
		return classifyIPv6(b)
	}
	return Noise
}

func classifyIPv6(b []byte) Class {
	if len(b) < ipv6Len || b[0]>>4 != 6 {
		return Noise
	}
	next, off := b[6], ipv6Len
	// MLD stands behind a hop-by-hop header with a router alert (RFC 3810, 5).
	if next == protoHopByHop && len(b) >= ipv6Len+8 {
		next, off = b[ipv6Len], ipv6Len+8*(1+int(b[ipv6Len+1]))
	}
	if next != protoICMPv6 || len(b) <= off {
		return Data
	}
	switch t := b[off]; {
	case t == typeNS && off == ipv6Len:
		if _, ok := solicited(b); ok {
			return Query
		}
		return Noise
	case t >= typeRS && t <= typeRedirect:
		return Noise
	case isMLD(t) && b[24] == 0xff:
		return Noise
	}
	return Data
}

// isMLD: RFC 2710, 3; RFC 3810, 5.2.
func isMLD(t byte) bool { return t >= 130 && t <= 132 || t == 143 }

func isARPRequest(b []byte) bool {
	return len(b) >= arpLen &&
		binary.BigEndian.Uint16(b[0:]) == 1 && binary.BigEndian.Uint16(b[2:]) == etherIPv4 &&
		b[4] == 6 && b[5] == 4 && binary.BigEndian.Uint16(b[6:]) == 1
}

// solicited returns the target of a valid neighbour solicitation (RFC 4861,
// 7.1.1) that wants an answer: one for duplicate address detection comes from
// the unspecified address and gets none, or the kernel would give up its own
// address.
func solicited(b []byte) (netip.Addr, bool) {
	if len(b) < ipv6Len+24 || b[7] != 255 || b[41] != 0 {
		return netip.Addr{}, false
	}
	src := netip.AddrFrom16([16]byte(b[8:24]))
	target := netip.AddrFrom16([16]byte(b[48:64]))
	if src.IsUnspecified() || src.IsMulticast() || target.IsUnspecified() || target.IsMulticast() {
		return netip.Addr{}, false
	}
	return target, true
}

// Answer writes the answer to a frame of class Query into out, which must hold
// MaxAnswer octets and not overlap frame, and returns its length. 0 means that
// none is due: the target is this host's own (own says so; nil: no address
// is), or the question was a probe for duplicates (RFC 5227, 1.1; RFC 4862, 5.4).
func Answer(frame, out []byte, own func(netip.Addr) bool) int {
	if len(frame) < etherLen || len(out) < MaxAnswer {
		return 0
	}
	b := frame[etherLen:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherARP:
		return answerARP(b, out, own)
	case etherIPv6:
		if len(b) < ipv6Len || b[0]>>4 != 6 || b[6] != protoICMPv6 || len(b) <= ipv6Len || b[ipv6Len] != typeNS {
			return 0
		}
		return answerNS(frame, out, own)
	}
	return 0
}

func answerARP(b, out []byte, own func(netip.Addr) bool) int {
	if !isARPRequest(b) {
		return 0
	}
	sender := netip.AddrFrom4([4]byte(b[14:18]))
	target := netip.AddrFrom4([4]byte(b[24:28]))
	// sender 0: probe; sender = target: announcement.
	if sender.IsUnspecified() || sender == target || target.IsUnspecified() || target.IsMulticast() {
		return 0
	}
	if own != nil && own(target) {
		return 0
	}
	copy(out[0:6], b[8:14])
	copy(out[6:12], MAC[:])
	binary.BigEndian.PutUint16(out[12:], etherARP)
	a := out[etherLen : etherLen+arpLen]
	copy(a, b[:6])
	binary.BigEndian.PutUint16(a[6:], 2)
	copy(a[8:], MAC[:])
	copy(a[14:], b[24:28])
	copy(a[18:], b[8:18])
	return etherLen + arpLen
}

func answerNS(frame, out []byte, own func(netip.Addr) bool) int {
	b := frame[etherLen:]
	target, ok := solicited(b)
	if !ok || own != nil && own(target) {
		return 0
	}
	copy(out[0:6], frame[6:12])
	copy(out[6:12], MAC[:])
	binary.BigEndian.PutUint16(out[12:], etherIPv6)
	p := out[etherLen:MaxAnswer]
	clear(p)
	p[0] = 0x60
	binary.BigEndian.PutUint16(p[4:], 32)
	p[6], p[7] = protoICMPv6, 255
	copy(p[8:], b[48:64])
	copy(p[24:], b[8:24])
	m := p[ipv6Len:]
	m[0] = typeNA
	m[4] = 0x60 // solicited, override
	copy(m[8:], b[48:64])
	m[24], m[25] = 2, 1 // target link-layer address, in units of 8 octets
	copy(m[26:], MAC[:])
	binary.BigEndian.PutUint16(m[2:], checksum(p))
	return MaxAnswer
}

// checksum of an ICMPv6 message whose checksum field is zero, in the IPv6
// packet p without extension headers (RFC 4443, 2.3).
func checksum(p []byte) uint16 {
	s := uint32(len(p)-ipv6Len) + protoICMPv6
	for i := 8; i < len(p); i += 2 {
		s += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}
