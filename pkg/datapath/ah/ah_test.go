package ah

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/mac"
	"github.com/missiu/missiu/pkg/ipsec"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func params(a alg.Integ) *ipsec.SAParams {
	k := make([]byte, a.Info().KeyLen)
	for i := range k {
		k[i] = byte(i*3 + 1)
	}
	return &ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.AH, Dst: netip.IPv4Unspecified(), SPI: 0x1234}, Auth: a, AuthKey: ipsec.NewKey(k)}
}

func newT(t testing.TB, p *ipsec.SAParams) *Transform {
	t.Helper()
	tr, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// golden is a packet that another implementation made.
type golden struct {
	Name, Mode, Auth, Inner, Outer, Why string
	SPI                                 uint32
	ESNHigh                             *uint32 `json:"esn_high"`
	AuthKey                             string  `json:"auth_key"`
	Refuse                              bool
}

var goldenInteg = map[string]alg.Integ{
	"hmac-sha1-96": alg.IntegHMACSHA1, "hmac-sha256-128": alg.IntegHMACSHA256, "hmac-sha384-192": alg.IntegHMACSHA384,
	"hmac-sha512-256": alg.IntegHMACSHA512, "aes-cmac-96": alg.IntegAESCMAC, "hmac-md5-96": alg.IntegHMACMD5,
	"aes128-gmac": alg.IntegAESGMAC128, "aes192-gmac": alg.IntegAESGMAC192, "aes256-gmac": alg.IntegAESGMAC256,
	"keyed-md5": alg.IntegKeyedMD5,
}

// transforms lists all that AH has.
func transforms() []alg.Integ {
	return slices.Concat(alg.AllInteg(), alg.AHInteg(), alg.LegacyInteg())
}

// The packets of the vectors open; the same inner packet seals to the same octets.
func TestGolden(t *testing.T) {
	var all []golden
	for _, name := range []string{"ah", "scapy", "plain"} {
		b, err := os.ReadFile("testdata/" + name + "-golden.json")
		if err != nil {
			t.Fatal(err)
		}
		var v struct{ Tests []golden }
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		all = append(all, v.Tests...)
	}
	s := new(Scratch)
	used := 0
	for _, g := range all {
		t.Run(g.Name, func(t *testing.T) {
			used++
			p := params(goldenInteg[g.Auth])
			p.SPI, p.ESN, p.AuthKey = ipsec.SPI(g.SPI), g.ESNHigh != nil, ipsec.NewKey(unhex(t, g.AuthKey))
			tr := newT(t, p)
			ip, inner := unhex(t, g.Outer), unhex(t, g.Inner)
			off := 20
			if ip[0]>>4 == 6 {
				off = 40
			}
			seq := uint64(binary.BigEndian.Uint32(ip[off+8:]))
			if g.ESNHigh != nil {
				seq |= uint64(*g.ESNHigh) << 32
			}
			ps := []Packet{{IP: bytes.Clone(ip), Off: off, Seq: seq}}
			tr.Open(s, ps)
			if g.Refuse {
				if !errors.Is(ps[0].Err, ErrAuth) {
					t.Errorf("%s: got %v, want %v", g.Why, ps[0].Err, ErrAuth)
				}
				return
			}
			if ps[0].Err != nil || !bytes.Equal(ps[0].IP, ip) {
				t.Fatalf("got %v, and the packet changed: %v", ps[0].Err, !bytes.Equal(ps[0].IP, ip))
			}
			next, payload := uint8(4), inner
			if inner[0]>>4 == 6 {
				next = 41
			}
			if g.Mode == "transport" {
				next, payload = inner[9], inner[20:]
				if off == 40 {
					next, payload = inner[6], inner[40:]
				}
			}
			if got := ip[off+ps[0].N:]; ps[0].Next != next || !bytes.Equal(got, payload) {
				t.Fatalf("got next %d, %x; want %d, %x", ps[0].Next, got, next, payload)
			}
			mine := []Packet{{IP: bytes.Clone(ip), Off: off, Next: next, Seq: seq}}
			clear(mine[0].IP[off : off+ps[0].N])
			tr.Seal(s, mine)
			if mine[0].Err != nil || !bytes.Equal(mine[0].IP, ip) {
				t.Errorf("sealed %x, %v; want %x", mine[0].IP, mine[0].Err, ip)
			}
			for n := range ip {
				ps := []Packet{{IP: bytes.Clone(ip[:n]), Off: off, Seq: seq}}
				if tr.Open(s, ps); ps[0].Err == nil {
					t.Errorf("cut to %d octets: opened", n)
				}
			}
			if tr.esn {
				ps[0].Seq ^= 1 << 32
				if tr.Open(s, ps); !errors.Is(ps[0].Err, ErrAuth) {
					t.Errorf("wrong high half: %v", ps[0].Err)
				}
			}
		})
	}
	if used != 35+4+28 {
		t.Errorf("%d vectors, want 67", used)
	}
}

// place puts room for AH into a packet at off and fixes lengths.
func place(tr *Transform, head []byte, protoOff int, payload []byte) Packet {
	v6 := head[0]>>4 == 6
	ip := append(bytes.Clone(head), make([]byte, tr.HeaderLen(v6))...)
	ip = append(ip, payload...)
	ip[protoOff] = 51
	if v6 {
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-40))
	} else {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	}
	return Packet{IP: ip, Off: len(head), Next: 17, Seq: 7}
}

// header4 is an IPv4 header with every kind of option.
func header4(t testing.TB) []byte {
	h := unhex(t, "4fa80000"+"12344000"+"4033abcd"+"c0000201"+"c0000202")
	opts := unhex(t, "01"+"94040000"+"82080102030405ff"+"0707040a0b0c0d"+"4408050100000000"+"860600000001"+"000000")
	h = append(h, opts...)
	for len(h) < 60 {
		h = append(h, 0)
	}
	if len(h) != 60 {
		t.Fatalf("header of %d octets", len(h))
	}
	return h
}

// TestIPv4Mutable: RFC 4302, 3.3.3.1.1 and appendix A1, bit by bit: what
// routers change may change, all else may not.
func TestIPv4Mutable(t *testing.T) {
	tr := newT(t, params(alg.IntegHMACSHA256))
	s := new(Scratch)
	mutable := map[int]bool{1: true, 6: true, 7: true, 8: true, 10: true, 11: true}
	h := header4(t)
	// 20 NOP, 21 router alert, 25 security, 33 record route, 40 timestamp, 48 CIPSO, 54 end, padding.
	for i := 33; i < 48; i++ {
		mutable[i] = true
	}
	p := place(tr, h, 9, []byte("payload of the packet"))
	checkBits(t, tr, s, p, func(i int) bool { return mutable[i] && i != 33 && i != 34 && i != 40 && i != 41 }, map[int]bool{33: true, 34: true, 40: true, 41: true})
}

// checkBits flips each bit of a sealed packet and wants it to open exactly
// where mutable says so; skip is where a flip changes how the header reads.
func checkBits(t *testing.T, tr *Transform, s *Scratch, p Packet, mutable func(int) bool, skip map[int]bool) {
	t.Helper()
	ps := []Packet{p}
	if tr.Seal(s, ps); ps[0].Err != nil {
		t.Fatal(ps[0].Err)
	}
	for i := range p.IP {
		for bit := range 8 {
			if skip[i] {
				continue
			}
			bad := Packet{IP: bytes.Clone(p.IP), Off: p.Off}
			bad.IP[i] ^= 1 << bit
			bad.Seq = uint64(binary.BigEndian.Uint32(bad.IP[p.Off+8:]))
			one := []Packet{bad}
			tr.Open(s, one)
			if ok := one[0].Err == nil; ok != mutable(i) {
				t.Errorf("octet %d bit %d changed: %v; mutable %v", i, bit, one[0].Err, mutable(i))
			}
		}
	}
}

// TestIPv6Mutable: RFC 4302, 3.3.3.1.2, likewise.
func TestIPv6Mutable(t *testing.T) {
	tr := newT(t, params(alg.IntegHMACSHA1))
	s := new(Scratch)
	h := unhex(t, "6ab12345"+"0000"+"00"+"40"+"20010db8000000000000000000000001"+"20010db8000000000000000000000002")
	h = append(h, unhex(t, "3c00"+"05020000"+"0000")...)                    // 40: hop-by-hop, router alert, Pad1
	h = append(h, unhex(t, "3301"+"3e040a0b0c0d"+"1e04aabbccdd"+"0100")...) // 48: destination options, 3e may change, 1e not
	p := place(tr, h, 48, []byte("payload"))
	checkBits(t, tr, s, p, func(i int) bool {
		return i >= 1 && i <= 3 || i == 7 || i >= 52 && i < 56
	}, map[int]bool{0: true})
	// Of the first octet the low half is traffic class.
	ps := []Packet{p}
	for bit := range 4 {
		ps[0].IP[0] ^= 1 << bit
		if tr.Open(s, ps); ps[0].Err != nil {
			t.Errorf("traffic class bit %d changed: %v", bit, ps[0].Err)
		}
		ps[0].IP[0] ^= 1 << bit
	}
}

// TestPredictable: source routes are sealed as they will arrive.
func TestPredictable(t *testing.T) {
	tr := newT(t, params(alg.IntegHMACSHA1))
	s := new(Scratch)
	t.Run("LSRR", func(t *testing.T) {
		h := unhex(t, "48000000123400004033"+"0000"+"c0000201"+"c0000263"+"830b04c0000264c0000202"+"00")
		p := place(tr, h, 9, []byte("payload"))
		ps := []Packet{p}
		if tr.Seal(s, ps); ps[0].Err != nil {
			t.Fatal(ps[0].Err)
		}
		// Two routers: each puts the next address into the destination and its own into the route.
		ip := bytes.Clone(p.IP)
		copy(ip[16:], unhex(t, "c0000264"))
		ip[22] = 8
		copy(ip[23:], unhex(t, "0a000001"))
		open := func(want error) {
			t.Helper()
			one := []Packet{{IP: ip, Off: p.Off, Seq: p.Seq}}
			if tr.Open(s, one); !errors.Is(one[0].Err, want) {
				t.Errorf("got %v, want %v", one[0].Err, want)
			}
		}
		open(nil) // on the way it is the same packet too
		copy(ip[16:], unhex(t, "c0000202"))
		ip[22] = 12
		copy(ip[27:], unhex(t, "0a000002"))
		open(nil)
		copy(ip[16:], unhex(t, "c0000203"))
		open(ErrAuth)
	})
	for _, kind := range []byte{0, 2} {
		t.Run(fmt.Sprintf("routing header type %d", kind), func(t *testing.T) {
			addr := func(n byte) []byte { return append(unhex(t, "20010db80000000000000000000000"), n) }
			h := unhex(t, "60000000"+"0000"+"2b"+"40")
			h = append(append(h, addr(1)...), addr(2)...)
			h = append(h, 51, 4, kind, 2, 0, 0, 0, 0)
			h = append(append(h, addr(3)...), addr(4)...)
			p := place(tr, h, 40, []byte("payload"))
			ps := []Packet{p}
			if tr.Seal(s, ps); ps[0].Err != nil {
				t.Fatal(ps[0].Err)
			}
			ip := bytes.Clone(p.IP)
			open := func(step string, want error) {
				t.Helper()
				one := []Packet{{IP: ip, Off: p.Off, Seq: p.Seq}}
				if tr.Open(s, one); !errors.Is(one[0].Err, want) {
					t.Errorf("%s: got %v, want %v", step, one[0].Err, want)
				}
			}
			open("as sent", nil)
			ip[43] = 1
			copy(ip[24:], addr(3))
			copy(ip[48:], addr(2))
			open("behind the first hop", nil)
			ip[43] = 0
			copy(ip[24:], addr(4))
			copy(ip[64:], addr(3))
			open("at the destination", nil)
			copy(ip[24:], addr(5))
			open("at another", ErrAuth)
			ip[43] = 3
			open("with more segments than addresses", ErrHeader)
			ip[42], ip[43] = 4, 1
			open("of an unpredictable type", ErrHeader)
		})
	}
}

// TestAlignment: RFC 4302, 2.6: 32 bits over IPv4, 64 over IPv6; over IPv4 what
// Linux makes without "flag align4" is read too.
func TestAlignment(t *testing.T) {
	s := new(Scratch)
	for a, want := range map[alg.Integ][2]int{
		alg.IntegHMACSHA1: {24, 24}, alg.IntegHMACSHA256: {28, 32}, alg.IntegHMACSHA384: {36, 40},
		alg.IntegHMACSHA512: {44, 48}, alg.IntegAESXCBC: {24, 24}, alg.IntegAESCMAC: {24, 24},
	} {
		tr := newT(t, params(a))
		if got := [2]int{tr.HeaderLen(false), tr.HeaderLen(true)}; got != want {
			t.Errorf("%v: got %v, want %v", a, got, want)
		}
		// By hand: padded to 8 octets over IPv4.
		h := unhex(t, "450000001234000040330000c0000201c0000202")
		ip := append(h, make([]byte, want[1])...)
		ip = append(ip, "payload"...)
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
		x := ip[20:]
		x[0], x[1], x[6], x[7], x[11] = 17, byte(want[1]/4-2), 0x12, 0x34, 1
		m, err := mac.New(a, params(a).AuthKey)
		if err != nil {
			t.Fatal(err)
		}
		cover := bytes.Clone(ip)
		cover[8] = 0
		m.Sum(new(mac.Scratch), x[12:], cover)
		ps := []Packet{{IP: ip, Off: 20, Seq: 1}}
		if tr.Open(s, ps); ps[0].Err != nil || ps[0].N != want[1] || ps[0].Next != 17 {
			t.Errorf("%v padded to 8: %d octets, next %d, %v", a, ps[0].N, ps[0].Next, ps[0].Err)
		}
	}
}

func TestSequence(t *testing.T) {
	s := new(Scratch)
	for _, tt := range []struct {
		seq uint64
		esn bool
		err error
	}{{0, false, ErrSequence}, {1 << 32, false, ErrSequence}, {1<<32 - 1, false, nil}, {0, true, ErrSequence}, {1 << 32, true, nil}} {
		p := params(alg.IntegHMACSHA1)
		p.ESN = tt.esn
		tr := newT(t, p)
		ps := []Packet{place(tr, unhex(t, "450000001234000040330000c0000201c0000202"), 9, nil)}
		ps[0].Seq = tt.seq
		if tr.Seal(s, ps); !errors.Is(ps[0].Err, tt.err) {
			t.Errorf("number %d, ESN %v: got %v, want %v", tt.seq, tt.esn, ps[0].Err, tt.err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, f := range map[string]func(*ipsec.SAParams){
		"ESP":            func(p *ipsec.SAParams) { p.Proto = ipsec.ESP },
		"encryption":     func(p *ipsec.SAParams) { p.Encr = alg.EncrNULL },
		"no integrity":   func(p *ipsec.SAParams) { p.Auth = alg.IntegNone },
		"short key":      func(p *ipsec.SAParams) { p.AuthKey = ipsec.NewKey(make([]byte, 19)) },
		"encryption key": func(p *ipsec.SAParams) { p.EncrKey = ipsec.NewKey(make([]byte, 16)) },
	} {
		p := params(alg.IntegHMACSHA1)
		f(p)
		var e *ParamError
		if _, err := New(p); !errors.As(err, &e) {
			t.Errorf("%s: got %v, want a ParamError", name, err)
		}
	}
}

func TestNoAllocs(t *testing.T) {
	for _, a := range transforms() {
		tr := newT(t, params(a))
		s := new(Scratch)
		ps := []Packet{place(tr, header4(t), 9, make([]byte, 1300))}
		if n := testing.AllocsPerRun(100, func() {
			if tr.Seal(s, ps); ps[0].Err != nil {
				t.Error(ps[0].Err)
			}
			if tr.Open(s, ps); ps[0].Err != nil {
				t.Error(ps[0].Err)
			}
		}); n != 0 {
			t.Errorf("%v: %v allocations, want 0", a, n)
		}
	}
}

// FuzzOpen: no header makes Open or Seal panic or change more than AH, and
// what Seal seals Open opens.
func FuzzOpen(f *testing.F) {
	var trs []*Transform
	for i, a := range transforms() {
		tr := newT(f, params(a))
		trs = append(trs, tr)
		f.Add(uint8(i), place(tr, header4(f), 9, []byte("x")).IP, 60)
		f.Add(uint8(i), place(tr, unhex(f, "60000000000000402001"+"0db8000000000000000000000001"+"20010db80000000000000000000000023300050200000000"), 40, nil).IP, 48)
		f.Add(uint8(i), unhex(f, "60000000000000402b0102"), 40)
	}
	s := new(Scratch)
	f.Fuzz(func(t *testing.T, i uint8, ip []byte, off int) {
		tr := trs[int(i)%len(trs)]
		ps := []Packet{{IP: bytes.Clone(ip), Off: off, Seq: 9}}
		if tr.Open(s, ps); ps[0].Err == nil {
			t.Error("opened")
		}
		if !bytes.Equal(ps[0].IP, ip) {
			t.Error("Open changed the packet")
		}
		if tr.Seal(s, ps); ps[0].Err != nil {
			return
		}
		if n := ps[0].N; !bytes.Equal(ps[0].IP[:off], ip[:off]) || !bytes.Equal(ps[0].IP[off+n:], ip[off+n:]) {
			t.Error("Seal changed more than AH")
		}
		if tr.Open(s, ps); ps[0].Err != nil {
			t.Errorf("own packet: %v", ps[0].Err)
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	for _, a := range transforms() {
		b.Run(a.String(), func(b *testing.B) {
			tr := newT(b, params(a))
			s := new(Scratch)
			ps := []Packet{place(tr, unhex(b, "450000001234000040330000c0000201c0000202"), 9, make([]byte, 1300))}
			b.ReportAllocs()
			b.SetBytes(1300)
			for b.Loop() {
				tr.Seal(s, ps)
			}
		})
	}
}
