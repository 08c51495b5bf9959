package packet

import "encoding/binary"

// GSO says how a super-frame is to be cut: the metadata that came with it,
// which is believed only where the packet says the same.
type GSO struct {
	Version    uint8 // of IP; 0: either
	Proto      uint8 // TCP or UDP
	Size       int   // octets of payload of each segment but the last
	CsumStart  int   // where the transport header begins, from the IP header
	CsumOffset int   // of its checksum field
	NeedsCsum  bool  // the checksum is ours to make
}

// Super is a super-frame: one packet with the headers of the first segment and
// the payload of all (TCP segmentation offload, UDP_SEGMENT). Put cuts it:
//
//	| IP, transport header | payload 0 | payload 1 | ... | last |
//
// The segments are those that Linux would make: IPv4 identification counts up
// from one to the next, options and extension headers stand on each; PSH and
// FIN only on the last, CWR only on the first (RFC 3168, 6.1.2); the urgent
// pointer stays. The zero value holds nothing; Parse fills it.
type Super struct {
	pkt   []byte
	trans int // offset of the transport header
	hdr   int // octets of all headers
	size  int
	n     int
	v6    bool
	udp   bool
	flags uint8  // of TCP
	id    uint16 // of IPv4
	seq   uint32 // of TCP
	ipSum uint64 // of the IPv4 header but for what Put changes
	sum   uint64 // of pseudo-header and transport header likewise
}

const (
	tcpLen      = 20
	tcpCsum     = 16
	udpCsum     = 6
	tcpFIN      = 0x01
	tcpSYN      = 0x02
	tcpRST      = 0x04
	tcpPSH      = 0x08
	tcpCWR      = 0x80
	tcpSeqOff   = 4
	tcpLenOff   = 12
	tcpFlagsOff = 13
	udpLenOff   = 4
)

// Parse takes the super-frame b, which i was decoded from, and reports whether
// it is one: that every field of g and of the headers fits the others. Nothing
// is taken from b then or later but by Put.
func (s *Super) Parse(b []byte, i *Info, g GSO) bool {
	*s = Super{}
	if i.Len != len(b) || i.IsFragment() || i.FragHdr != 0 ||
		g.Version != 0 && g.Version != i.Version || g.Proto != i.Proto ||
		!g.NeedsCsum || g.CsumStart != i.HdrLen || g.Size <= 0 {
		return false
	}
	t := b[i.HdrLen:]
	var hdr int
	switch i.Proto {
	case protoTCP:
		if len(t) < tcpLen || g.CsumOffset != tcpCsum {
			return false
		}
		hdr = int(t[tcpLenOff]>>4) * 4
		if hdr < tcpLen || t[tcpFlagsOff]&(tcpSYN|tcpRST) != 0 {
			return false // neither comes with payload for several
		}
	case protoUDP:
		if len(t) < UDPLen || g.CsumOffset != udpCsum || int(binary.BigEndian.Uint16(t[udpLenOff:])) != len(t) {
			return false
		}
		hdr = UDPLen
	default:
		return false
	}
	payload := len(t) - hdr
	if payload <= 0 {
		return false
	}
	*s = Super{
		pkt: b, trans: i.HdrLen, hdr: i.HdrLen + hdr, size: g.Size, n: (payload + g.Size - 1) / g.Size,
		v6: i.Version == 6, udp: i.Proto == protoUDP, id: uint16(i.ID), sum: pseudo(b, i.Proto, 0),
	}
	// Taken off a sum is what is added in complement (RFC 1624).
	if !s.v6 {
		s.ipSum = without(sum(b[:i.HdrLen], 0), b[2:6]) + without(0, b[10:12])
	}
	h := t[:hdr]
	s.sum = sum(h, s.sum)
	if s.udp {
		s.sum = without(s.sum, h[udpLenOff:UDPLen]) // and the checksum
		return true
	}
	s.seq, s.flags = binary.BigEndian.Uint32(h[tcpSeqOff:]), h[tcpFlagsOff]
	s.sum = without(s.sum, h[tcpSeqOff:tcpSeqOff+4])
	s.sum = without(s.sum, h[tcpLenOff:tcpLenOff+2])
	s.sum = without(s.sum, h[tcpCsum:tcpCsum+2])
	return true
}

// without takes the words of b off the sum acc.
func without(acc uint64, b []byte) uint64 {
	acc = uint64(fold(acc))
	for ; len(b) > 0; b = b[2:] {
		acc += uint64(^binary.BigEndian.Uint16(b))
	}
	return acc
}

// Segments is the number of segments, at least 1.
func (s *Super) Segments() int { return s.n }

// Len is the number of octets of segment k, headers included. All but the last
// are equal.
func (s *Super) Len(k int) int {
	return s.hdr + min(s.size, len(s.pkt)-s.hdr-k*s.size)
}

// Total is the sum of Len over all segments.
func (s *Super) Total() int { return len(s.pkt) + (s.n-1)*s.hdr }

// Put writes segment k, complete with its checksums, to dst, but for its first
// from octets. from is 0, or leaves all of the transport header and none of
// the IP header proper (Info.TransOff, for whoever writes another header).
// dst has room for Len(k)-from octets and does not overlap the super-frame.
func (s *Super) Put(dst []byte, k, from int) {
	at := s.hdr + k*s.size
	data := s.pkt[at:min(at+s.size, len(s.pkt))]
	n := s.hdr + len(data)
	dst = dst[:n-from]
	copy(dst, s.pkt[from:s.hdr])
	if from == 0 {
		SetLen(dst, n)
		if !s.v6 {
			id := s.id + uint16(k)
			binary.BigEndian.PutUint16(dst[4:], id)
			binary.BigEndian.PutUint16(dst[10:], ^fold(s.ipSum+uint64(n)+uint64(id)))
		}
	}
	t := dst[s.trans-from:]
	h := t[:s.hdr-s.trans]
	acc := s.sum + uint64(len(t))
	csum := tcpCsum
	if s.udp {
		csum = udpCsum
		binary.BigEndian.PutUint16(h[udpLenOff:], uint16(len(t)))
		acc += uint64(len(t))
	} else {
		seq, flags := s.seq+uint32(k*s.size), s.flags
		if k != s.n-1 {
			flags &^= tcpFIN | tcpPSH
		}
		if k != 0 {
			flags &^= tcpCWR
		}
		binary.BigEndian.PutUint32(h[tcpSeqOff:], seq)
		h[tcpFlagsOff] = flags
		acc += uint64(seq) + uint64(h[tcpLenOff])<<8 + uint64(flags)
	}
	c := ^fold(copySum(t[len(h):], data, acc))
	if c == 0 && s.udp {
		c = 0xffff // 0 means "none" (RFC 768); in TCP it is the sum (RFC 1624, 3)
	}
	binary.BigEndian.PutUint16(h[csum:], c)
}
