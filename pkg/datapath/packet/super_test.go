package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
)

// superFrame makes a super-frame: an IP header with opts (IPv4 options, or
// IPv6 extension headers that start with one of type ext), a transport header
// with topts, and n octets of payload.
func superFrame(v6, udp bool, ext uint8, opts, topts []byte, flags byte, n int) []byte {
	src, dst := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	ip := IPv4Len
	if v6 {
		src, dst = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
		ip = IPv6Len
	}
	proto, t := uint8(protoTCP), tcpLen+len(topts)
	if udp {
		proto, t = protoUDP, UDPLen
	}
	hl := ip + len(opts)
	b := make([]byte, hl+t+n)
	PutHeader(b, src, dst, proto, len(b), 64)
	copy(b[ip:], opts)
	if v6 && len(opts) > 0 {
		b[6], b[ip] = ext, proto
	}
	if !v6 {
		b[0] = 0x40 | byte(hl/4)
		binary.BigEndian.PutUint16(b[4:], 0xfffe) // wraps
		FixIPv4Checksum(b)
	}
	h := b[hl:]
	binary.BigEndian.PutUint16(h, 1234)
	binary.BigEndian.PutUint16(h[2:], 80)
	if udp {
		binary.BigEndian.PutUint16(h[4:], uint16(t+n))
	} else {
		binary.BigEndian.PutUint32(h[4:], 0xffff_fe00) // wraps
		binary.BigEndian.PutUint32(h[8:], 77)
		h[12], h[13] = byte(t/4)<<4, flags
		binary.BigEndian.PutUint16(h[14:], 500)
		copy(h[20:], topts)
	}
	for i := range h[t:] {
		h[t+i] = byte(i*7 + i>>8)
	}
	return b
}

func gsoOf(b []byte, size int) (Info, GSO) {
	var i Info
	Decode(b, &i)
	g := GSO{Version: i.Version, Proto: i.Proto, Size: size, CsumStart: i.HdrLen, CsumOffset: tcpCsum, NeedsCsum: true}
	if i.Proto == protoUDP {
		g.Version, g.CsumOffset = 0, udpCsum
	}
	return i, g
}

// TestSuper: segment by segment, every field as RFC 9293, RFC 768 and RFC 791
// want it, for lengths around the edges.
func TestSuper(t *testing.T) {
	stamp := []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	routerAlert := []byte{0x94, 4, 0, 0}
	dstOpts := []byte{0, 0, 1, 4, 0, 0, 0, 0}
	for _, tt := range []struct {
		name        string
		v6, udp     bool
		ext         uint8
		opts, topts []byte
	}{
		{"tcp4", false, false, 0, nil, nil}, {"tcp4 timestamps", false, false, 0, nil, stamp},
		{"tcp4 router alert", false, false, 0, routerAlert, stamp},
		{"tcp6", true, false, 0, nil, stamp}, {"tcp6 destination options", true, false, protoDstOpts, dstOpts, stamp},
		{"tcp6 hop-by-hop", true, false, protoHopByHop, dstOpts, nil},
		{"udp4", false, true, 0, nil, nil}, {"udp6", true, true, 0, nil, nil}, {"udp6 destination options", true, true, protoDstOpts, dstOpts, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, size := range []int{1, 8, 100, 1398, 1400} {
				for _, n := range []int{1, 2, size - 1, size, size + 1, 2 * size, 5*size + 1, 5*size + 3, 40 * size} {
					if n == 0 {
						continue
					}
					for _, flags := range []byte{0x10, 0x18, 0x11, 0x90, 0xd9, 0xff &^ (tcpSYN | tcpRST)} {
						checkSuper(t, superFrame(tt.v6, tt.udp, tt.ext, tt.opts, tt.topts, flags, n), size)
					}
				}
			}
		})
	}
}

// checkSuper compares all segments of b with what the RFCs say of each field.
func checkSuper(t *testing.T, b []byte, size int) {
	t.Helper()
	orig := bytes.Clone(b)
	i, g := gsoOf(b, size)
	var s Super
	if !s.Parse(b, &i, g) {
		t.Fatalf("refused: %x", b[:min(len(b), 100)])
	}
	be := binary.BigEndian
	h := i.HdrLen + UDPLen
	if i.Proto == protoTCP {
		h = i.HdrLen + int(b[i.HdrLen+12]>>4)*4
	}
	payload := b[h:]
	total := 0
	for k := range s.Segments() {
		part := payload[k*size : min(len(payload), (k+1)*size)]
		seg := make([]byte, s.Len(k)+1)
		seg[len(seg)-1] = 0x5a
		s.Put(seg, k, 0)
		if seg[len(seg)-1] != 0x5a {
			t.Fatalf("segment %d: written behind its end", k)
		}
		seg = seg[:len(seg)-1]
		total += len(seg)
		want := append(bytes.Clone(b[:h]), part...)
		u := want[i.HdrLen:]
		if i.Version == 4 {
			be.PutUint16(want[2:], uint16(len(want)))
			be.PutUint16(want[4:], be.Uint16(b[4:])+uint16(k))
			FixIPv4Checksum(want)
		} else {
			be.PutUint16(want[4:], uint16(len(want)-40))
		}
		if i.Proto == protoTCP {
			be.PutUint32(u[4:], be.Uint32(b[i.HdrLen+4:])+uint32(k*size))
			if k < s.Segments()-1 {
				u[13] &= 0xff &^ 9
			}
			if k > 0 {
				u[13] &= 0x7f
			}
		} else {
			be.PutUint16(u[4:], uint16(len(u)))
		}
		at := i.HdrLen + g.CsumOffset
		want[at], want[at+1] = seg[at], seg[at+1]
		if !bytes.Equal(seg, want) {
			t.Fatalf("segment %d of %d:\ngot  %x\nwant %x", k, s.Segments(), seg, want)
		}
		if got := plainSum(u, uint64(plainSum(pseudoHeader(want, i.Proto, len(u)), 0))); got != 0xffff || seg[at] == 0 && seg[at+1] == 0 {
			t.Fatalf("segment %d: checksum %x is wrong", k, seg[at:at+2])
		}
		rest := make([]byte, len(seg)-i.TransOff)
		s.Put(rest, k, i.TransOff)
		if !bytes.Equal(rest, seg[i.TransOff:]) {
			t.Fatalf("segment %d without its first %d octets:\ngot  %x\nwant %x", k, i.TransOff, rest, seg[i.TransOff:])
		}
	}
	if total != s.Total() {
		t.Errorf("Total %d, want %d", s.Total(), total)
	}
	if (len(payload)+size-1)/size != s.Segments() {
		t.Errorf("%d segments of %d octets in %d", s.Segments(), size, len(payload))
	}
	if !bytes.Equal(b, orig) {
		t.Error("the super-frame was changed")
	}
}

// pseudoHeader of RFC 9293, 3.1 and RFC 8200, 8.1.
func pseudoHeader(b []byte, proto uint8, n int) []byte {
	if b[0]>>4 == 4 {
		return append(bytes.Clone(b[12:20]), 0, proto, byte(n>>8), byte(n))
	}
	return append(bytes.Clone(b[8:40]), 0, 0, byte(n>>8), byte(n), 0, 0, 0, proto)
}

// TestSuperRefused: metadata that do not fit the packet, or do not fit themselves.
func TestSuperRefused(t *testing.T) {
	tcp := superFrame(false, false, 0, nil, nil, 0x10, 3000)
	udp := superFrame(true, true, 0, nil, nil, 0, 3000)
	for name, f := range map[string]func(b *[]byte, g *GSO){
		"size 0":              func(_ *[]byte, g *GSO) { g.Size = 0 },
		"size negative":       func(_ *[]byte, g *GSO) { g.Size = -1 },
		"other protocol":      func(_ *[]byte, g *GSO) { g.Proto ^= protoTCP ^ protoUDP },
		"no protocol":         func(_ *[]byte, g *GSO) { g.Proto = 0 },
		"other version":       func(b *[]byte, g *GSO) { g.Version = 10 - (*b)[0]>>4 },
		"no checksum":         func(_ *[]byte, g *GSO) { g.NeedsCsum = false },
		"csum start early":    func(_ *[]byte, g *GSO) { g.CsumStart-- },
		"csum start late":     func(_ *[]byte, g *GSO) { g.CsumStart += 8 },
		"csum start negative": func(_ *[]byte, g *GSO) { g.CsumStart = -14 },
		"csum offset":         func(_ *[]byte, g *GSO) { g.CsumOffset += 2 },
		"padding behind":      func(b *[]byte, _ *GSO) { *b = append(*b, 0) },
		"no payload": func(b *[]byte, g *GSO) {
			*b = (*b)[:len(*b)-3000]
			SetLen(*b, len(*b))
			if g.Proto == protoUDP {
				(*b)[g.CsumStart+4], (*b)[g.CsumStart+5] = 0, 8
			}
		},
	} {
		for _, b := range [][]byte{tcp, udp} {
			b := bytes.Clone(b)
			_, g := gsoOf(b, 1400)
			f(&b, &g)
			var i Info
			var s Super
			if !Decode(b, &i) {
				t.Fatalf("%s: not a packet", name)
			}
			if s.Parse(b, &i, g) {
				t.Errorf("%s: %s taken", name, map[uint8]string{protoTCP: "tcp", protoUDP: "udp"}[i.Proto])
			}
		}
	}
	for name, f := range map[string]func(h []byte){
		"data offset 4":            func(h []byte) { h[12] = 0x40 },
		"SYN":                      func(h []byte) { h[13] |= tcpSYN },
		"RST":                      func(h []byte) { h[13] |= tcpRST },
		"header is all":            func(h []byte) { h[12] = 0xf0 },
		"udp length short":         func(h []byte) { h[5]-- },
		"udp length 0":             func(h []byte) { h[4], h[5] = 0, 0 },
		"udp length beyond packet": func(h []byte) { h[4] = 0xff },
	} {
		b := bytes.Clone(tcp)
		if name[:3] == "udp" {
			b = bytes.Clone(udp)
		}
		if name == "header is all" {
			b = b[:IPv4Len+60]
			SetLen(b, len(b))
		}
		i, g := gsoOf(b, 1400)
		f(b[i.HdrLen:])
		var s Super
		if s.Parse(b, &i, g) {
			t.Errorf("%s: taken", name)
		}
	}
	b := bytes.Clone(tcp)
	b[6] = 0x20 // MF
	i, g := gsoOf(b, 1400)
	if new(Super).Parse(b, &i, g) {
		t.Error("fragment: taken")
	}
}

// FuzzSuper: whatever the metadata say, Parse refuses it or the segments are
// packets whose payload is that of the super-frame and whose checksums hold.
func FuzzSuper(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			b := superFrame(v6, udp, 0, nil, nil, 0x18, 50)
			_, g := gsoOf(b, 20)
			f.Add(b, g.Version, g.Proto, g.Size, g.CsumStart, g.CsumOffset, true)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, version, proto uint8, size, start, offset int, needs bool) {
		var i Info
		if len(b) > 65535 || !Decode(b, &i) {
			return
		}
		var s Super
		if !s.Parse(b, &i, GSO{version, proto, size, start, offset, needs}) {
			return
		}
		at := s.hdr
		for k := range s.Segments() {
			seg := make([]byte, s.Len(k))
			s.Put(seg, k, 0)
			var j Info
			if !Decode(seg, &j) || j.Len != len(seg) || j.HdrLen != i.HdrLen || j.Flow() != i.Flow() {
				t.Fatalf("segment %d is %+v, of %+v", k, j, i)
			}
			if upperChecksum(seg, seg[j.HdrLen:], j.Proto) != 0 {
				t.Fatalf("segment %d: wrong checksum", k)
			}
			n := len(seg) - s.hdr
			if !bytes.Equal(seg[s.hdr:], b[at:at+n]) {
				t.Fatalf("segment %d: other payload", k)
			}
			at += n
		}
		if at != len(b) {
			t.Fatalf("%d octets of %d in segments", at, len(b))
		}
	})
}

// A checksum of 0 is 0 in TCP, and 0xffff in UDP.
func TestSuperZeroChecksum(t *testing.T) {
	for _, udp := range []bool{false, true} {
		b := superFrame(false, udp, 0, nil, nil, 0x10, 300)
		i, g := gsoOf(b, 100)
		at := i.HdrLen + g.CsumOffset
		cut := func() uint16 {
			var s Super
			if !s.Parse(b, &i, g) {
				t.Fatal("refused")
			}
			seg := make([]byte, s.Len(1))
			s.Put(seg, 1, 0)
			return binary.BigEndian.Uint16(seg[at:])
		}
		// What a word of zeros lacks to a sum of all ones is the checksum.
		word := b[len(b)-102:]
		clear(word[:2])
		binary.BigEndian.PutUint16(word, cut())
		if got, want := cut(), map[bool]uint16{true: 0xffff}[udp]; got != want {
			t.Errorf("udp %v: checksum %#x, want %#x", udp, got, want)
		}
	}
}

func BenchmarkSuperPut(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		p := superFrame(v6, false, 0, nil, make([]byte, 12), 0x10, 45*1386)
		i, g := gsoOf(p, 1386)
		var s Super
		if !s.Parse(p, &i, g) {
			b.Fatal("refused")
		}
		dst := make([]byte, 45*1500)
		b.Run(fmt.Sprintf("ipv%d", i.Version), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for k := range s.Segments() {
					s.Put(dst[k*1480:], k, 0)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*s.Segments()), "ns/packet")
		})
	}
}
