package packet

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var (
	a4 = netip.MustParseAddr("192.0.2.1")
	b4 = netip.MustParseAddr("198.51.100.2")
	a6 = netip.MustParseAddr("2001:db8::1")
	b6 = netip.MustParseAddr("2001:db8::2")
)

// ip4 makes an IPv4 packet with the flags-and-offset word fo.
func ip4(proto uint8, fo uint16, payload []byte) []byte {
	b := make([]byte, IPv4Len, IPv4Len+len(payload))
	PutHeader(b, a4, b4, proto, IPv4Len+len(payload), 64)
	binary.BigEndian.PutUint16(b[6:], fo)
	FixIPv4Checksum(b)
	return append(b, payload...)
}

// ip6 makes an IPv6 packet whose payload starts with what next names.
func ip6(next uint8, payload []byte) []byte {
	b := make([]byte, IPv6Len, IPv6Len+len(payload))
	PutHeader(b, a6, b6, next, IPv6Len+len(payload), 64)
	return append(b, payload...)
}

// ext is an IPv6 extension header of 8 octets.
func ext(next uint8, rest ...byte) []byte {
	h := make([]byte, 8)
	h[0] = next
	copy(h[1:], rest)
	return h
}

func cat(bs ...[]byte) []byte { return bytes.Join(bs, nil) }

var tcp = []byte{0x04, 0xd2, 0x00, 0x50, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0}

func TestDecode(t *testing.T) {
	icmp := []byte{8, 3, 0, 0, 0, 1, 0, 1}
	for _, c := range []struct {
		name string
		b    []byte
		want Info
	}{
		{"v4 tcp", ip4(6, 0x4000, tcp), Info{Version: 4, Proto: 6, TTL: 64, Len: 40, Src: a4, Dst: b4, HdrLen: 20, ProtoOff: 9,
			TransOff: 20, TransProtoOff: 9, SrcPort: 1234, DstPort: 80, HasPorts: true, DF: true}},
		{"v4 padding of the link", append(ip4(17, 0, tcp[:8]), 0, 0, 0), Info{Version: 4, Proto: 17, TTL: 64, Len: 28, Src: a4, Dst: b4,
			HdrLen: 20, ProtoOff: 9, TransOff: 20, TransProtoOff: 9, SrcPort: 1234, DstPort: 80, HasPorts: true}},
		{"v4 icmp", ip4(1, 0, icmp), Info{Version: 4, Proto: 1, TTL: 64, Len: 28, Src: a4, Dst: b4,
			HdrLen: 20, ProtoOff: 9, TransOff: 20, TransProtoOff: 9, SrcPort: 8, DstPort: 3, HasPorts: true}},
		{"v4 cut tcp", ip4(6, 0, tcp[:3]), Info{Version: 4, Proto: 6, TTL: 64, Len: 23, Src: a4, Dst: b4,
			HdrLen: 20, ProtoOff: 9, TransOff: 20, TransProtoOff: 9}},
		{"v4 esp has no ports", ip4(50, 0, tcp), Info{Version: 4, Proto: 50, TTL: 64, Len: 40, Src: a4, Dst: b4,
			HdrLen: 20, ProtoOff: 9, TransOff: 20, TransProtoOff: 9}},
		{"v4 first fragment", ip4(6, 0x2000, tcp[:8]), Info{Version: 4, Proto: 6, TTL: 64, Len: 28, Src: a4, Dst: b4, MF: true,
			HdrLen: 20, ProtoOff: 9, TransOff: 20, TransProtoOff: 9, SrcPort: 1234, DstPort: 80, HasPorts: true}},
		{"v4 later fragment", ip4(6, 0x0001, tcp), Info{Version: 4, Proto: 6, TTL: 64, Len: 40, Src: a4, Dst: b4, FragOff: 8,
			HdrLen: 20, ProtoOff: 9, TransOff: 20, TransProtoOff: 9}},
		{"v6 tcp", ip6(6, tcp), Info{Version: 6, Proto: 6, TTL: 64, Len: 60, Src: a6, Dst: b6, HdrLen: 40, ProtoOff: 6,
			TransOff: 40, TransProtoOff: 6, SrcPort: 1234, DstPort: 80, HasPorts: true}},
		{"v6 hop-by-hop, routing, destination options", ip6(0, cat(ext(43), ext(60, 0, 4), ext(6), tcp)), Info{Version: 6, Proto: 6, TTL: 64, Len: 84,
			Src: a6, Dst: b6, HdrLen: 64, ProtoOff: 56, TransOff: 56, TransProtoOff: 48, SrcPort: 1234, DstPort: 80, HasPorts: true}},
		{"v6 destination options before routing", ip6(60, cat(ext(43), ext(6, 0, 4), tcp)), Info{Version: 6, Proto: 6, TTL: 64, Len: 76,
			Src: a6, Dst: b6, HdrLen: 56, ProtoOff: 48, TransOff: 56, TransProtoOff: 48, SrcPort: 1234, DstPort: 80, HasPorts: true}},
		{"v6 first fragment", ip6(44, cat(ext(6, 0, 0, 1, 0, 0, 0, 7), tcp)), Info{Version: 6, Proto: 6, TTL: 64, Len: 68, Src: a6, Dst: b6, MF: true, ID: 7,
			HdrLen: 48, ProtoOff: 40, TransOff: 48, TransProtoOff: 40, SrcPort: 1234, DstPort: 80, HasPorts: true, FragHdr: 40, FragProtoOff: 6}},
		{"v6 later fragment of destination options", ip6(44, cat(ext(60, 0, 0, 8, 0, 0, 0, 7), tcp)), Info{Version: 6, Proto: 60, TTL: 64, Len: 68,
			Src: a6, Dst: b6, FragOff: 8, ID: 7, HdrLen: 48, ProtoOff: 40, TransOff: 48, TransProtoOff: 40, FragHdr: 40, FragProtoOff: 6}},
		{"v6 atomic fragment", ip6(44, cat(ext(17, 0, 0, 0, 0, 0, 0, 7), tcp[:8])), Info{Version: 6, Proto: 17, TTL: 64, Len: 56, Src: a6, Dst: b6, ID: 7,
			HdrLen: 48, ProtoOff: 40, TransOff: 48, TransProtoOff: 40, SrcPort: 1234, DstPort: 80, HasPorts: true, FragHdr: 40, FragProtoOff: 6}},
		{"v6 no next header", ip6(59, nil), Info{Version: 6, Proto: 59, TTL: 64, Len: 40, Src: a6, Dst: b6, HdrLen: 40, ProtoOff: 6, TransOff: 40, TransProtoOff: 6}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got Info
			if !Decode(c.b, &got) {
				t.Fatal("refused")
			}
			if got != c.want {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
			for n := range c.b[:min(got.Len, len(c.b))] {
				if i := (Info{Version: 9}); Decode(c.b[:n], &i) || i != (Info{}) {
					t.Fatalf("cut to %d octets: got %+v, want refusal", n, i)
				}
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	mapped := ip6(6, tcp)
	copy(mapped[8:24], netip.MustParseAddr("::ffff:192.0.2.1").AsSlice())
	short := ip4(6, 0, tcp)
	short[3] = 19
	ihl := ip4(6, 0, tcp)
	ihl[0] = 0x44
	long := ip4(6, 0, tcp)
	long[3]++
	v5 := ip4(6, 0, tcp)
	v5[0] = 0x55
	many := cat(ext(60), ext(60), ext(60), ext(60), ext(60), ext(60), ext(60), ext(60), ext(6), tcp)
	for name, b := range map[string][]byte{
		"empty":                                   nil,
		"version 5":                               v5,
		"v4 total length below header":            short,
		"v4 header length below 20":               ihl,
		"v4 total length beyond the packet":       long,
		"v4 fragment beyond 65535 octets":         ip4(6, 0x1fff, tcp),
		"v6 mapped source":                        mapped,
		"v6 hop-by-hop not in front":              ip6(60, cat(ext(0), ext(6), tcp)),
		"v6 two fragment headers":                 ip6(44, cat(ext(44), ext(6), tcp)),
		"v6 nine extension headers":               ip6(60, many),
		"v6 routing header 0 with a segment left": ip6(43, cat(ext(6, 0, 0, 1), tcp)),
		"v6 chain cut":                            ip6(60, ext(6, 1)),
		"v6 chain cut in a first fragment":        ip6(44, cat(ext(60, 0, 0, 1), ext(6, 3))),
		"v6 jumbogram":                            append(ip6(0, nil), cat(ext(6, 0, 0xc2, 4, 0, 1, 0, 0), make([]byte, 65536))...),
	} {
		var i Info
		if Decode(b, &i) {
			t.Errorf("%s: got %+v, want refusal", name, i)
		}
		if i != (Info{}) {
			t.Errorf("%s: got %+v behind a refusal, want nothing", name, i)
		}
	}
	if i := (Info{}); !Decode(ip6(60, many[8:]), &i) {
		t.Error("v6 eight extension headers: refused")
	}
}

func TestProtoKnown(t *testing.T) {
	var i Info
	Decode(ip6(44, cat(ext(60, 0, 0, 8), tcp)), &i)
	if i.ProtoKnown() {
		t.Error("later fragment of destination options: protocol known")
	}
	Decode(ip6(44, cat(ext(6, 0, 0, 8), tcp)), &i)
	if !i.ProtoKnown() {
		t.Error("later fragment of TCP: protocol unknown")
	}
}

// RFC 1071, 3: the numerical example; and the classic IPv4 header.
func TestChecksum(t *testing.T) {
	if got, want := Checksum(unhex(t, "0001 f203 f4f5 f6f7")), ^uint16(0xddf2); got != want {
		t.Errorf("got %04x, want %04x", got, want)
	}
	h := unhex(t, "4500 0073 0000 4000 4011 0000 c0a8 0001 c0a8 00c7")
	FixIPv4Checksum(h)
	if got := binary.BigEndian.Uint16(h[10:]); got != 0xb861 {
		t.Errorf("got %04x, want b861", got)
	}
	for n := range 80 { // against the definition
		b := make([]byte, n)
		for k := range b {
			b[k] = byte(k*37 + n*251)
		}
		var s uint32
		for k := 0; k < n; k += 2 {
			s += uint32(b[k]) << 8
			if k+1 < n {
				s += uint32(b[k+1])
			}
		}
		for s>>16 != 0 {
			s = s>>16 + s&0xffff
		}
		if got, want := Checksum(b), ^uint16(s); got != want {
			t.Errorf("%d octets: got %04x, want %04x", n, got, want)
		}
	}
}

// RFC 1624, 4: the example for which other formulas give 0xffff.
func TestUpdateChecksum(t *testing.T) {
	if got := UpdateChecksum(0xdd2f, 0x5555, 0x3285); got != 0 {
		t.Errorf("got %04x, want 0000", got)
	}
}

// RFC 6040, 4.2, figure 4.
func TestDecapECN(t *testing.T) {
	const drop = 9
	want := [4][4]uint8{ // inner, outer in the order of codepoints Not-ECT, ECT(1), ECT(0), CE
		notECT: {notECT, notECT, notECT, drop},
		ect1:   {ect1, ect1, ect1, ce},
		ect0:   {ect0, ect1, ect0, ce},
		ce:     {ce, ce, ce, ce},
	}
	for inner := range uint8(4) {
		for outer := range uint8(4) {
			for _, v := range []int{4, 6} {
				b := ip4(6, 0, tcp)
				if v == 6 {
					b = ip6(6, tcp)
				}
				SetECN(b, inner)
				ok := DecapECN(b, 0xb8|outer)
				if w := want[inner][outer]; ok != (w != drop) {
					t.Errorf("v%d inner %d outer %d: got %v", v, inner, outer, ok)
				} else if ok {
					var i Info
					if !Decode(b, &i) || i.TOS != w {
						t.Errorf("v%d inner %d outer %d: got TOS %#x, want %#x", v, inner, outer, i.TOS, w)
					}
					if v == 4 && Checksum(b[:20]) != 0 {
						t.Errorf("inner %d outer %d: wrong header checksum", inner, outer)
					}
				}
			}
		}
	}
	if !DecapECN([]byte{0x45}, 3) {
		t.Error("one octet: refused")
	}
}

func TestPutOuter(t *testing.T) {
	inner := Info{TOS: 0xba}
	b := make([]byte, 100)
	PutOuter(b, Outer{Src: a4, Dst: b4, Proto: 50, Len: 100, ID: 0x1234}, &inner)
	FixIPv4Checksum(b)
	var i Info
	if !Decode(b, &i) || i.TOS != 0xba || i.DF || i.ID != 0x1234 || i.Proto != 50 || i.TTL != DefaultTTL || Checksum(b[:20]) != 0 {
		t.Errorf("v4: got %+v", i)
	}
	PutOuter(b, Outer{Src: a4, Dst: b4, Proto: 50, Len: 100, DontFragment: true, TTL: 9}, &inner)
	if !Decode(b, &i) || !i.DF || i.TTL != 9 {
		t.Errorf("v4 with DF: got %+v", i)
	}
	ClearDF(b)
	if !Decode(b, &i) || i.DF {
		t.Errorf("v4 with DF cleared: got %+v", i)
	}
	PutOuter(b, Outer{Src: a6, Dst: b6, Proto: 50, Len: 100}, &inner)
	if !Decode(b, &i) || i.TOS != 0xba || i.Len != 100 || i.Proto != 50 || OuterProtoOff(b) != i.ProtoOff {
		t.Errorf("v6: got %+v", i)
	}
}

func TestSetTransport(t *testing.T) {
	for _, b := range [][]byte{ip4(50, 0x4000, tcp), ip6(50, tcp)} {
		var i Info
		Decode(b, &i)
		n := i.Len - 4
		SetTransport(b[:n], i.ProtoOff, 17, n)
		var got Info
		if !Decode(b[:n], &got) || got.Proto != 17 || got.Len != n || i.Version == 4 && Checksum(b[:20]) != 0 {
			t.Errorf("v%d: got %+v", i.Version, got)
		}
	}
}

// verifyUpper checks a transport checksum independently of putUpper.
func verifyUpper(b []byte, hdr int, proto uint8) bool {
	p := append([]byte(nil), b[12:20]...)
	if b[0]>>4 == 6 {
		p = append([]byte(nil), b[8:40]...)
	}
	p = append(p, 0, proto, byte((len(b)-hdr)>>8), byte(len(b)-hdr))
	return Checksum(append(p, b[hdr:]...)) == 0
}

func TestTransportChecksum(t *testing.T) {
	udp := []byte{0x04, 0xd2, 0x11, 0x94, 0, 13, 1, 1, 'h', 'e', 'l', 'l', 'o'}
	for _, c := range []struct {
		proto   uint8
		payload []byte
	}{{6, tcp}, {17, udp}, {58, []byte{128, 0, 9, 9, 0, 1, 0, 1, 7}}} {
		for _, b := range [][]byte{ip4(c.proto, 0, c.payload), ip6(c.proto, c.payload)} {
			hdr := len(b) - len(c.payload)
			FixTransportChecksum(b, hdr, c.proto)
			if !verifyUpper(b, hdr, c.proto) {
				t.Errorf("protocol %d in IPv%d: wrong checksum", c.proto, b[0]>>4)
			}
		}
	}
	none := ip4(17, 0, append([]byte(nil), udp...))
	none[26], none[27] = 0, 0
	if FixTransportChecksum(none, 20, 17); none[26] != 0 || none[27] != 0 {
		t.Error("UDP without checksum got one")
	}
	six := ip6(17, append([]byte(nil), udp...))
	PutUDPChecksum(six)
	if !verifyUpper(six, 40, 17) {
		t.Error("PutUDPChecksum: wrong checksum")
	}
	for n := range len(six) { // nothing to write to
		FixTransportChecksum(ip6(6, tcp)[:n], min(40, n), 6)
		PutUDPChecksum(six[:n])
	}
}

func TestAppendTooBig(t *testing.T) {
	big := append(append([]byte(nil), tcp...), make([]byte, 2000)...)
	for _, c := range []struct {
		b     []byte
		src   netip.Addr
		mtu   int
		limit int
	}{{ip4(6, 0x4000, big), b4, 1400, 576}, {ip6(6, big), b6, 1400, 1280}} {
		var i, got Info
		Decode(c.b, &i)
		out := AppendTooBig([]byte("front"), c.b, &i, c.mtu, c.src)
		if string(out[:5]) != "front" {
			t.Fatal("prefix changed")
		}
		out = out[5:]
		if !Decode(out, &got) || got.Len != len(out) || len(out) != c.limit || got.Src != c.src || got.Dst != i.Src {
			t.Fatalf("v%d: got %+v of %d octets", i.Version, got, len(out))
		}
		m := out[got.HdrLen:]
		if i.Version == 4 {
			if m[0] != 3 || m[1] != 4 || binary.BigEndian.Uint16(m[6:]) != 1400 || Checksum(m) != 0 || Checksum(out[:20]) != 0 {
				t.Errorf("v4: got % x", m[:8])
			}
		} else if m[0] != 2 || m[1] != 0 || binary.BigEndian.Uint32(m[4:]) != 1400 || !verifyUpper(out, 40, 58) {
			t.Errorf("v6: got % x", m[:8])
		}
		if !bytes.HasPrefix(c.b, m[8:]) {
			t.Errorf("v%d: the quote is not the packet", i.Version)
		}
		if AppendTooBig(nil, c.b, &i, 1400, a6) != nil && i.Version == 4 {
			t.Error("answer from an address of another family")
		}
	}
}

func TestMayTooBig(t *testing.T) {
	multi := ip4(17, 0x4000, tcp)
	copy(multi[16:], []byte{224, 0, 0, 9})
	for _, c := range []struct {
		name string
		b    []byte
		want bool
	}{
		{"tcp", ip4(6, 0x4000, tcp), true},
		{"echo", ip4(1, 0x4000, []byte{8, 0, 0, 0}), true},
		{"unreachable", ip4(1, 0x4000, []byte{3, 4, 0, 0}), false},
		{"later fragment", ip4(6, 1, tcp), false},
		{"multicast", multi, false},
		{"echo v6", ip6(58, []byte{128, 0, 0, 0}), true},
		{"too big v6", ip6(58, []byte{2, 0, 0, 0}), false},
		{"redirect v6", ip6(58, []byte{137, 0, 0, 0}), false},
		{"empty icmp v6", ip6(58, nil), false},
	} {
		var i Info
		Decode(c.b, &i)
		if got := MayTooBig(c.b, &i); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(ip4(6, 0x4000, tcp))
	f.Add(ip4(1, 0x2001, tcp))
	f.Add(ip6(0, cat(ext(43), ext(44), ext(60), ext(6), tcp)))
	f.Add(ip6(58, []byte{128, 0, 0, 0}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var i, again Info
		if !Decode(b, &i) {
			if i != (Info{}) {
				t.Fatalf("refused with %+v", i)
			}
			return
		}
		if i.Len > len(b) || i.HdrLen > i.Len || i.TransOff > i.HdrLen || i.ProtoOff >= i.HdrLen || i.TransProtoOff >= i.TransOff ||
			b[i.ProtoOff] != i.Proto || i.FragHdr+8 > i.HdrLen && i.FragHdr != 0 || i.HasPorts && i.FragOff != 0 {
			t.Fatalf("inconsistent: %+v", i)
		}
		if !Decode(b[:i.Len], &again) || again != i {
			t.Fatalf("without what follows: got %+v, want %+v", again, i)
		}
		for k := range b[:min(len(b), 80)] {
			// What follows differs in one octet, and in length.
			next := bytes.Clone(b)
			next[k] ^= 1 << (k % 8)
			for _, next := range [][]byte{next, b, b[:len(b)-1]} {
				var want Info
				got, ok := i, Decode(next, &want)
				if DecodeNext(next, &got) != ok || got != want {
					t.Fatalf("after %x\n%x: got %+v, want %+v", b, next, got, want)
				}
			}
		}
		out := AppendTooBig(nil, b, &i, 1280, i.Dst)
		if out != nil && (!Decode(out, &again) || again.Len > MaxTooBig) {
			t.Fatalf("too big: %+v", again)
		}
		c := bytes.Clone(b)
		DecapECN(c, 3)
		FixTransportChecksum(c, i.HdrLen, i.Proto)
		PutUDPChecksum(c)
	})
}

func TestNoAllocs(t *testing.T) {
	p4, p6 := ip4(6, 0x4000, tcp), ip6(0, cat(ext(43), ext(60, 0, 4), ext(6), tcp))
	out := make([]byte, 0, MaxTooBig)
	if n := testing.AllocsPerRun(100, func() {
		var i Info
		Decode(p4, &i)
		_ = i.Flow()
		Decode(p6, &i)
		DecapECN(p6, 3)
		PutOuter(out[:40], Outer{Src: a6, Dst: b6, Proto: 50, Len: 40}, &i)
		FixTransportChecksum(p6, i.HdrLen, i.Proto)
		_ = AppendTooBig(out, p6, &i, 1280, b6)
	}); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, p := range map[string][]byte{"v4 tcp": ip4(6, 0x4000, tcp), "v6 tcp": ip6(6, tcp), "v6 chain": ip6(0, cat(ext(43), ext(60, 0, 4), ext(6), tcp))} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var i Info
			for b.Loop() {
				Decode(p, &i)
			}
		})
	}
}

func BenchmarkChecksum(b *testing.B) {
	p := make([]byte, 1400)
	b.SetBytes(1400)
	for b.Loop() {
		Checksum(p)
	}
}

// TestReturning: an ICMP error stands for the answer to what it quotes.
func TestReturning(t *testing.T) {
	icmp := func(kind byte, quote []byte) []byte { return append([]byte{kind, 1, 0, 0, 0, 0, 0, 0}, quote...) }
	from := func(b []byte) []byte { // to the sender of what ip4 and ip6 make
		if b[0]>>4 == 4 {
			copy(b[16:20], b[12:16])
			copy(b[12:16], []byte{203, 0, 113, 9})
		} else {
			copy(b[24:40], b[8:24])
			b[8+15] = 99
		}
		return b
	}
	q4, q6 := ip4(6, 0, tcp), ip6(6, tcp)
	later := ip4(6, 0x10, tcp)
	echo4, echo6 := ip4(1, 0, []byte{8, 0, 0, 0, 0, 1, 0, 1}), ip6(58, []byte{128, 0, 0, 0, 0, 1, 0, 1})
	long := bytes.Clone(q4)
	binary.BigEndian.PutUint16(long[2:], 9000)
	opts6 := ip6(60, append([]byte{6, 0, 1, 4, 0, 0, 0, 0}, tcp...))
	sp, dp := binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:])
	for _, tt := range []struct {
		name     string
		b        []byte
		ok       bool
		proto    uint8
		src, dst uint16
		ports    bool
	}{
		{"unreachable", from(ip4(1, 0, icmp(3, q4))), true, 6, dp, sp, true},
		{"time exceeded", from(ip4(1, 0, icmp(11, q4[:28]))), true, 6, dp, sp, true},
		{"of a longer packet", from(ip4(1, 0, icmp(3, long))), true, 6, dp, sp, true},
		{"header alone", from(ip4(1, 0, icmp(12, q4[:20]))), true, 6, 0, 0, false},
		{"later fragment", from(ip4(1, 0, icmp(3, later))), true, 6, 0, 0, false},
		{"of an echo request", from(ip4(1, 0, icmp(3, echo4))), true, 1, 0, 0, true},
		{"header cut", from(ip4(1, 0, icmp(3, q4[:19]))), false, 0, 0, 0, false},
		{"no error", from(ip4(1, 0, icmp(8, q4))), false, 0, 0, 0, false},
		{"redirect", from(ip4(1, 0, icmp(5, q4))), false, 0, 0, 0, false},
		{"to somebody else", ip4(1, 0, icmp(3, q4)), false, 0, 0, 0, false},
		{"UDP", from(ip4(17, 0, icmp(3, q4))), false, 0, 0, 0, false},
		{"a fragment", from(ip4(1, 0x2000, icmp(3, q4))), false, 0, 0, 0, false},
		{"IPv6 too big", from(ip6(58, icmp(2, q6))), true, 6, dp, sp, true},
		{"IPv6 with options", from(ip6(58, icmp(1, opts6))), true, 6, dp, sp, true},
		{"of an IPv6 echo request", from(ip6(58, icmp(3, echo6))), true, 58, 129, 0, true},
		{"IPv6 header cut", from(ip6(58, icmp(1, q6[:39]))), false, 0, 0, 0, false},
		{"IPv6 no error", from(ip6(58, icmp(128, q6))), false, 0, 0, 0, false},
		{"IPv4 in IPv6", from(ip6(58, icmp(1, q4))), false, 0, 0, 0, false},
	} {
		var i, q Info
		if !Decode(tt.b, &i) {
			t.Fatalf("%s: not a packet", tt.name)
		}
		if ok := Returning(tt.b, &i, &q); ok != tt.ok {
			t.Errorf("%s: %v", tt.name, ok)
		}
		if q.Proto != tt.proto || q.SrcPort != tt.src || q.DstPort != tt.dst || q.HasPorts != tt.ports {
			t.Errorf("%s: got %+v", tt.name, q)
		}
		if tt.ok && q.Dst != i.Dst {
			t.Errorf("%s: the answer goes to %v, want %v", tt.name, q.Dst, i.Dst)
		}
	}
}
