package tap

import (
	"encoding/binary"
	"hash/crc32"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

// sctpCsum is the offset of the checksum field in SCTP, and in no other
// protocol whose checksums are left to devices (TCP 16, UDP 6, ICMPv6 2).
const sctpCsum = 8

// udpCsum is that of UDP and UDP-Lite.
const udpCsum = 6

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// FinishChecksum completes the upper-layer checksum of a frame with NeedsCsum
// and without segmentation, in place: the field holds the sum of the pseudo
// header, and the octets from CsumStart on are added to it (RFC 1071). false:
// the metadata do not fit the frame. Frames without NeedsCsum stay as they are.
func FinishChecksum(frame []byte, o Offload) bool {
	if !o.NeedsCsum {
		return true
	}
	at := int(o.CsumStart) + int(o.CsumOffset)
	if at+2 > len(frame) {
		return false
	}
	if o.CsumOffset == sctpCsum {
		// SCTP alone has a CRC (RFC 9260, 6.8), whose field is summed as zero.
		if at+4 > len(frame) {
			return false
		}
		clear(frame[at : at+4])
		binary.LittleEndian.PutUint32(frame[at:], crc32.Checksum(frame[o.CsumStart:], castagnoli))
		return true
	}
	binary.BigEndian.PutUint16(frame[at:], nonzero(packet.Checksum(frame[o.CsumStart:]), o.CsumOffset == udpCsum))
	return true
}

// nonzero: 0 means "no checksum" in UDP (RFC 768), where 0xffff stands for it.
// Elsewhere 0 is right, and analysers take 0xffff for wrong (RFC 1624, 3).
func nonzero(sum uint16, udp bool) uint16 {
	if sum == 0 && udp {
		return 0xffff
	}
	return sum
}

func add(s uint64, b []byte) uint64 {
	for len(b) >= 4 {
		s += uint64(binary.BigEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		s += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

func fold(s uint64) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// Segmenter cuts super-frames as the kernel would: for a plain TAP, and where the
// kernel does not, or must not. The zero value is ready; it belongs to one
// goroutine.
type Segmenter struct {
	buf [vnetHdrLen + maxLinkLen + 65536]byte
	f   Frame // what emit gets
}

const (
	etherLen   = 14
	tagLen     = 4
	maxLinkLen = etherLen + 4*tagLen
)

// IsTag reports whether an Ethernet type is that of a VLAN tag (IEEE 802.1Q).
func IsTag(etype uint16) bool { return etype == 0x8100 || etype == 0x88a8 || etype == 0x9100 }

// layout of a super-frame: where its parts begin.
type layout struct {
	v6        bool
	ip        int
	transport int
	payload   int
	udp       bool
}

func (o *Offload) layout(b []byte) (layout, bool) {
	l := layout{ip: etherLen, transport: int(o.CsumStart)}
	for l.ip < maxLinkLen && l.ip < len(b) && IsTag(binary.BigEndian.Uint16(b[l.ip-2:])) {
		l.ip += tagLen
	}
	if !o.NeedsCsum || o.GSOSize == 0 || l.transport < l.ip+20 || l.transport+8 > len(b) {
		return l, false
	}
	switch b[l.ip] >> 4 {
	case 4:
	case 6:
		l.v6 = true
		if l.transport < l.ip+40 {
			return l, false
		}
	default:
		return l, false
	}
	switch o.GSOType &^ GSOECN {
	case GSOTCPv4, GSOTCPv6:
		if l.transport+20 > len(b) {
			return l, false
		}
		n := int(b[l.transport+12]>>4) * 4
		if n < 20 || o.CsumOffset != 16 {
			return l, false
		}
		l.payload = l.transport + n
	case GSOUDPL4:
		if o.CsumOffset != 6 {
			return l, false
		}
		l.udp, l.payload = true, l.transport+8
	default:
		return l, false
	}
	return l, l.payload < len(b)
}

// Measure sets HdrLen by the headers of the super-frame b, since the kernel's is
// only a hint, and far too long for what it forwards. false: they do not fit the
// metadata.
func (o *Offload) Measure(b []byte) bool {
	l, ok := o.layout(b)
	if ok {
		o.HdrLen = uint16(l.payload)
	}
	return ok
}

// Each calls emit with every segment of the super-frame b in turn: a finished
// frame with HeadroomMin octets in front, which lasts until emit returns. It
// ends with the first error of emit, or EINVAL if b is no super-frame.
func (s *Segmenter) Each(b []byte, o Offload, emit func(*Frame) syscall.Errno) syscall.Errno {
	l, ok := o.layout(b)
	if !ok || l.payload+int(o.GSOSize) > len(s.buf)-vnetHdrLen {
		return unix.EINVAL
	}
	be := binary.BigEndian
	field := l.transport + int(o.CsumOffset)
	oldLen := len(b) - l.transport
	for i, off := 0, l.payload; off < len(b); i++ {
		n := min(int(o.GSOSize), len(b)-off)
		seg := s.buf[vnetHdrLen : vnetHdrLen+l.payload+n]
		copy(seg, b[:l.payload])
		copy(seg[l.payload:], b[off:off+n])
		last := off+n == len(b)
		ip, t := seg[l.ip:], seg[l.transport:]
		if l.v6 {
			be.PutUint16(ip[4:], uint16(len(ip)-40))
		} else {
			be.PutUint16(ip[2:], uint16(len(ip)))
			be.PutUint16(ip[4:], be.Uint16(ip[4:])+uint16(i))
			be.PutUint16(ip[10:], 0)
			be.PutUint16(ip[10:], ^fold(add(0, ip[:l.transport-l.ip])))
		}
		if l.udp {
			be.PutUint16(t[4:], uint16(len(t)))
		} else {
			be.PutUint32(t[4:], be.Uint32(t[4:])+uint32(off-l.payload))
			if !last {
				t[13] &^= 0x09 // FIN, PSH
			}
			if i > 0 {
				t[13] &^= 0x80 // CWR (RFC 3168, 6.1.2)
			}
		}
		// The pseudo header's sum counts the length of the whole.
		sum := uint64(be.Uint16(b[field:])) + uint64(^uint16(oldLen)) + uint64(len(t))
		be.PutUint16(seg[field:], fold(sum))
		be.PutUint16(seg[field:], nonzero(^fold(add(0, t)), l.udp))
		s.f = Frame{Buf: s.buf[:vnetHdrLen+len(seg)], Off: vnetHdrLen, Len: len(seg)}
		if errno := emit(&s.f); errno != 0 {
			return errno
		}
		off += n
	}
	return 0
}
