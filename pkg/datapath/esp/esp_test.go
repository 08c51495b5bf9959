package esp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/aead"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/mac"
	"github.com/missiu/missiu/pkg/ipsec"
)

// suite is one allowed combination.
type suite struct {
	e    alg.Encr
	bits int
	a    alg.Integ
}

func (s suite) String() string {
	n := s.e.String()
	if s.bits != 0 {
		n += fmt.Sprint("-", s.bits)
	}
	if s.a != alg.IntegNone {
		n += "+" + s.a.String()
	}
	return n
}

// suites lists all that alg can name, so that none can be forgotten.
func suites() []suite {
	var l []suite
	for _, e := range append(alg.AllEncr(), alg.LegacyEncr()...) {
		bits := e.Info().KeyBits
		if bits == nil {
			bits = []int{0}
		}
		for _, n := range bits {
			if e.Info().AEAD {
				l = append(l, suite{e, n, alg.IntegNone})
				continue
			}
			if e.Info().Old {
				continue // see TestOld
			}
			for _, a := range append(alg.AllInteg(), alg.IntegHMACMD5) {
				l = append(l, suite{e, n, a})
			}
		}
	}
	return l
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)*11 + seed
	}
	return b
}

func (s suite) params(t testing.TB, seed byte, esn bool) *ipsec.SAParams {
	t.Helper()
	n, ok := s.e.KeyLen(s.bits)
	if !ok {
		t.Fatalf("%v has no key length", s)
	}
	return &ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: netip.MustParseAddr("192.0.2.1"), SPI: 0xc0ffee00},
		Mode: ipsec.Tunnel, ESN: esn,
		Encr: s.e, EncrKey: ipsec.NewKey(pattern(n, seed)),
		Auth: s.a, AuthKey: ipsec.NewKey(pattern(s.a.Info().KeyLen, seed+50)),
	}
}

func (s suite) transform(t testing.TB, seed byte, esn bool) *Transform {
	t.Helper()
	tr, err := New(s.params(t, seed, esn))
	if err != nil {
		t.Fatalf("%v: %v", s, err)
	}
	return tr
}

// sealOne protects payload out of place.
func sealOne(t testing.TB, tr *Transform, s *Scratch, payload []byte, next uint8, seq uint64) []byte {
	t.Helper()
	n := len(payload)
	src := append(make([]byte, 0, n+tr.TrailerLen(n)), payload...)
	ps := []Packet{{Dst: make([]byte, tr.HeaderLen()+n+tr.TrailerLen(n)), Src: src, Next: next, Seq: seq}}
	tr.Seal(s, ps)
	if ps[0].Err != nil {
		t.Fatalf("seal %d octets: %v", n, ps[0].Err)
	}
	return ps[0].Dst[:ps[0].N]
}

// openOne takes pkt apart out of place.
func openOne(tr *Transform, s *Scratch, pkt []byte, seq uint64) Packet {
	ps := []Packet{{Dst: bytes.Repeat([]byte{0xee}, len(pkt)), Src: bytes.Clone(pkt), Seq: seq}}
	tr.Open(s, ps)
	return ps[0]
}

const esnSeq = 7<<32 | 0x01020304

func TestRoundTrip(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		for _, esn := range []bool{false, true} {
			tr := su.transform(t, 1, esn)
			seq := uint64(0xfffffffe)
			if esn {
				seq = esnSeq
			}
			for n := range 70 {
				payload := pattern(n, 3)
				if got, want := tr.ICVLen(), su.e.Info().ICVLen+su.a.Info().ICVLen; got != want {
					t.Fatalf("%v: ICVLen() = %d, want %d", su, got, want)
				}
				pkt := sealOne(t, tr, s, payload, 17, seq)
				if want := tr.HeaderLen() + n + tr.TrailerLen(n); len(pkt) != want {
					t.Fatalf("%v: %d octets make %d, want %d", su, n, len(pkt), want)
				}
				if k := tr.Overhead().MaxPayload(len(pkt)); k < n || tr.HeaderLen()+k+tr.TrailerLen(k) > len(pkt) || tr.HeaderLen()+k+1+tr.TrailerLen(k+1) <= len(pkt) {
					t.Errorf("%v: MaxPayload(%d) = %d, and %d octets fit", su, len(pkt), k, n)
				}
				if k := tr.Overhead().MaxPayload(len(pkt) - 1); k >= n {
					t.Errorf("%v: MaxPayload(%d) = %d, and %d octets make one more", su, len(pkt)-1, k, n)
				}
				if got := binary.BigEndian.Uint64(pkt); got != 0xc0ffee00<<32|seq&0xffffffff {
					t.Errorf("%v: header %016x", su, got)
				}
				if (len(pkt)-tr.icv)%4 != 0 {
					t.Errorf("%v: %d octets: the ICV does not stand on a boundary of 4", su, n)
				}
				p := openOne(tr, s, pkt, seq)
				if p.Err != nil || p.Next != 17 || !bytes.Equal(p.Dst[:p.N], payload) {
					t.Errorf("%v: %d octets: opened %x next %d, %v; want %x", su, n, p.Dst[:p.N], p.Next, p.Err, payload)
				}
			}
		}
	}
}

// In place both ways, in one buffer with room in front and behind, gives the
// same octets as out of place, and touches nothing outside.
func TestInPlace(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		tr := su.transform(t, 1, true)
		for _, n := range []int{0, 1, 13, 14, 15, 64, 1400} {
			payload := pattern(n, 3)
			total := tr.HeaderLen() + n + tr.TrailerLen(n)
			const guard = 16
			buf := bytes.Repeat([]byte{0xee}, guard+total+guard)
			dst := buf[guard : guard+total]
			copy(dst[tr.HeaderLen():], payload)
			ps := []Packet{{Dst: dst, Src: dst[tr.HeaderLen() : tr.HeaderLen()+n], Next: 4, Seq: esnSeq}}
			tr.Seal(s, ps)
			if ps[0].Err != nil || ps[0].N != total {
				t.Fatalf("%v %d octets: sealed %d, %v; want %d", su, n, ps[0].N, ps[0].Err, total)
			}
			// CBC's IVs come from a key of the transform, so the same one.
			if want := sealOne(t, tr, s, payload, 4, esnSeq); !bytes.Equal(dst, want) {
				t.Errorf("%v %d octets: in place %x, out of place %x", su, n, dst, want)
			}
			ps = []Packet{{Dst: dst[tr.HeaderLen():], Src: dst, Seq: esnSeq}}
			tr.Open(s, ps)
			p := ps[0]
			if p.Err != nil || p.Next != 4 || !bytes.Equal(p.Dst[:p.N], payload) {
				t.Errorf("%v %d octets: opened in place %x next %d, %v; want %x", su, n, p.Dst[:p.N], p.Next, p.Err, payload)
			}
			if edge := append(bytes.Clone(buf[:guard]), buf[guard+total:]...); !bytes.Equal(edge, bytes.Repeat([]byte{0xee}, 2*guard)) {
				t.Errorf("%v %d octets: wrote outside of the buffers", su, n)
			}
		}
	}
}

// A batch of many sizes, with errors in the midst.
func TestBatch(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		tr := su.transform(t, 1, false)
		var ps []Packet
		var want [][]byte
		for i := range 70 {
			n := i * 37 % 1500
			payload := pattern(n, byte(i))
			src := append(make([]byte, 0, n+tr.TrailerLen(n)), payload...)
			ps = append(ps, Packet{Dst: make([]byte, 2000), Src: src, Next: uint8(i), Seq: uint64(i + 1)})
			want = append(want, payload)
		}
		// Two that fail in the midst leave the others alone.
		ps[3].Seq = 0
		ps[5].Dst = ps[5].Dst[:10]
		tr.Seal(s, ps)
		in := make([]Packet, len(ps))
		for i := range ps {
			in[i] = Packet{Src: ps[i].Dst[:ps[i].N], Dst: make([]byte, 2000), Seq: uint64(i + 1)}
		}
		tr.Open(s, in)
		for i := range in {
			switch i {
			case 3:
				if !errors.Is(ps[i].Err, ErrSequence) || ps[i].N != 0 || !errors.Is(in[i].Err, ErrMalformed) {
					t.Errorf("%v packet %d: got %v, %v", su, i, ps[i].Err, in[i].Err)
				}
			case 5:
				if !errors.Is(ps[i].Err, ErrRoom) || ps[i].N != 0 || !errors.Is(in[i].Err, ErrMalformed) {
					t.Errorf("%v packet %d: got %v, %v", su, i, ps[i].Err, in[i].Err)
				}
			default:
				if in[i].Err != nil || in[i].Next != uint8(i) || !bytes.Equal(in[i].Dst[:in[i].N], want[i]) {
					t.Errorf("%v packet %d: opened %d octets, next %d, %v; want %d", su, i, in[i].N, in[i].Next, in[i].Err, len(want[i]))
				}
			}
		}
		// A batch that is used again forgets its old errors.
		ps[3].Seq = 4
		tr.Seal(s, ps[3:4])
		if ps[3].Err != nil {
			t.Errorf("%v: packet sealed again: %v", su, ps[3].Err)
		}
		tr.Seal(s, nil)
		tr.Open(s, nil)
	}
}

// A batch of any size and mixture is, octet for octet, what one by one makes,
// in place and not.
func TestBatchEqualsSingles(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		for _, esn := range []bool{false, true} {
			tr := su.transform(t, 1, esn)
			for _, count := range []int{1, 2, 7, 8, 9, 31, 32, 33, 65} {
				ps, one := make([]Packet, count), make([]Packet, 1)
				for i := range ps {
					n := i * 211 % 1500
					seq := uint64(i + 1)
					if esn {
						seq += uint64(i) << 32
					}
					buf := make([]byte, 2000)
					src := buf[tr.HeaderLen() : tr.HeaderLen()+n]
					copy(src, pattern(n, byte(i)))
					ps[i] = Packet{Dst: buf, Src: src, Next: 4, Seq: seq}
					if i%3 == 0 {
						ps[i].Dst = make([]byte, 2000)
					}
				}
				tr.Seal(s, ps)
				for i := range ps {
					n := i * 211 % 1500
					one[0] = Packet{Dst: make([]byte, 2000), Src: append(make([]byte, 0, 1600), pattern(n, byte(i))...), Next: 4, Seq: ps[i].Seq}
					tr.Seal(s, one)
					if got, want := ps[i].Dst[:ps[i].N], one[0].Dst[:one[0].N]; ps[i].Err != nil || !bytes.Equal(got, want) {
						t.Fatalf("%v esn %v: %d of %d: got %x, %v; want %x", su, esn, i, count, got, ps[i].Err, want)
					}
				}
			}
		}
	}
}

// NULL shows what the trailer looks like (RFC 4303, 2.4).
func TestTrailer(t *testing.T) {
	tr := suite{alg.EncrNULL, 0, alg.IntegHMACSHA256}.transform(t, 1, false)
	for _, tt := range []struct {
		payload string
		want    string // as the wire has it before the ICV
	}{
		{"", "\x01\x02\x02\x3b"},
		{"a", "a\x01\x01\x3b"},
		{"ab", "ab\x00\x3b"},
		{"abc", "abc\x01\x02\x03\x03\x3b"},
		{"abcd", "abcd\x01\x02\x02\x3b"},
	} {
		pkt := sealOne(t, tr, NewScratch(), []byte(tt.payload), NextNone, 1)
		if got := string(pkt[8 : len(pkt)-16]); got != tt.want {
			t.Errorf("payload %q: got %q, want %q", tt.payload, got, tt.want)
		}
	}
}

func TestSequence(t *testing.T) {
	s := NewScratch()
	su := suite{alg.EncrAESGCM16, 128, alg.IntegNone}
	for _, tt := range []struct {
		seq  uint64
		esn  bool
		want error
	}{
		{0, false, ErrSequence}, {0, true, ErrSequence}, {1, false, nil}, {1, true, nil},
		{1<<32 - 1, false, nil}, {1 << 32, false, ErrSequence}, {1 << 32, true, nil}, {1<<64 - 1, true, nil},
	} {
		tr := su.transform(t, 1, tt.esn)
		ps := []Packet{{Dst: make([]byte, 100), Src: make([]byte, 10, 64), Seq: tt.seq}}
		tr.Seal(s, ps)
		if !errors.Is(ps[0].Err, tt.want) {
			t.Errorf("seq %#x, esn %v: got %v, want %v", tt.seq, tt.esn, ps[0].Err, tt.want)
		}
	}
}

// The high half is not sent, but without it nothing opens.
func TestESNCovered(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		tr := su.transform(t, 1, true)
		pkt := sealOne(t, tr, s, pattern(40, 1), 4, esnSeq)
		for _, seq := range []uint64{esnSeq & 0xffffffff, esnSeq + 1<<32, esnSeq - 1<<32} {
			if p := openOne(tr, s, pkt, seq); !errors.Is(p.Err, ErrAuth) {
				t.Errorf("%v: sealed as %#x, opened as %#x: got %v, want %v", su, uint64(esnSeq), seq, p.Err, ErrAuth)
			}
		}
		if p := openOne(su.transform(t, 1, false), s, pkt, esnSeq&0xffffffff); !errors.Is(p.Err, ErrAuth) {
			t.Errorf("%v: opened without ESN: got %v, want %v", su, p.Err, ErrAuth)
		}
		if p := openOne(tr, s, pkt, esnSeq+1); !errors.Is(p.Err, ErrMalformed) {
			t.Errorf("%v: another low half than the packet's: got %v, want %v", su, p.Err, ErrMalformed)
		}
	}
	tr := suite{alg.EncrAESGCM16, 128, alg.IntegNone}.transform(t, 1, false)
	pkt := sealOne(t, tr, s, pattern(40, 1), 4, 5)
	if p := openOne(tr, s, pkt, 1<<32|5); !errors.Is(p.Err, ErrMalformed) {
		t.Errorf("64 bits without ESN: got %v, want %v", p.Err, ErrMalformed)
	}
}

// refused wants an error, no payload, and no trace of the plaintext.
func refused(t *testing.T, what string, p Packet, plain []byte) {
	t.Helper()
	if !errors.Is(p.Err, ErrAuth) && !errors.Is(p.Err, ErrMalformed) {
		t.Errorf("%s: got %v, want %v or %v", what, p.Err, ErrAuth, ErrMalformed)
	}
	if p.N != 0 || p.Next != 0 {
		t.Errorf("%s: refused with N %d, next %d", what, p.N, p.Next)
	}
	if len(plain) >= 8 && bytes.Contains(p.Dst, plain[:8]) {
		t.Errorf("%s: refused, but Dst has the plaintext", what)
	}
}

func TestRefusesAltered(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		tr := su.transform(t, 1, false)
		payload := pattern(40, 1)
		pkt := sealOne(t, tr, s, payload, 4, 9)
		for n := range pkt {
			refused(t, fmt.Sprintf("%v cut to %d", su, n), openOne(tr, s, pkt[:n], 9), payload)
		}
		for i := range pkt {
			for bit := range 8 {
				bad := bytes.Clone(pkt)
				bad[i] ^= 1 << bit
				seq := uint64(binary.BigEndian.Uint32(bad[4:]))
				refused(t, fmt.Sprintf("%v octet %d bit %d", su, i, bit), openOne(tr, s, bad, seq), payload)
			}
		}
		for n := 1; n <= 40; n++ {
			refused(t, fmt.Sprintf("%v with %d more", su, n), openOne(tr, s, append(bytes.Clone(pkt), make([]byte, n)...), 9), payload)
		}
		refused(t, su.String()+" wrong key", openOne(su.transform(t, 2, false), s, pkt, 9), payload)
		ps := []Packet{{Dst: make([]byte, 41), Src: pkt, Seq: 9}}
		if tr.Open(s, ps); !errors.Is(ps[0].Err, ErrRoom) {
			t.Errorf("%v: no room: got %v, want %v", su, ps[0].Err, ErrRoom)
		}
	}
}

// Authentic packets with padding that no peer should make (RFC 4303, 2.4).
func TestPadding(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		for _, tt := range []struct {
			name, plain string // 16 octets
			n           int    // -1: malformed
		}{
			{"well-formed", "payload!\x01\x02\x03\x04\x05\x06\x06\x04", 8},
			{"more than needed", "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0e\x04", 0},
			{"longer than the packet", "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x04", -1},
			{"255", "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\xff\x04", -1},
			{"zeros", "payload!\x00\x00\x00\x00\x00\x00\x06\x04", -1},
			{"one octet wrong", "payload!\x01\x02\x03\x04\x05\x07\x06\x04", -1},
			{"first wrong", "payload!\x02\x02\x03\x04\x05\x06\x06\x04", -1},
			{"none", "fourteen octet\x00\x04", 14},
		} {
			tr := su.transform(t, 1, false)
			pkt := make([]byte, tr.hdr+16+tr.icv)
			binary.BigEndian.PutUint32(pkt, tr.spi)
			binary.BigEndian.PutUint32(pkt[4:], 9)
			tr.c.PutIV(&s.a, tr.iv(s, pkt), 9)
			aad, tail := tr.cover(s, 9)
			if err := tr.c.Seal(&s.a, pkt[tr.hdr:], aad, tr.iv(s, pkt), []byte(tt.plain), tail); err != nil {
				t.Fatal(err)
			}
			p := openOne(tr, s, pkt, 9)
			if tt.n < 0 {
				if !errors.Is(p.Err, ErrMalformed) || bytes.Contains(p.Dst, []byte(tt.plain[:8])) {
					t.Errorf("%v, %s: got %v, Dst %x; want %v and nothing", su, tt.name, p.Err, p.Dst, ErrMalformed)
				}
			} else if p.Err != nil || p.N != tt.n || string(p.Dst[:p.N]) != tt.plain[:tt.n] {
				t.Errorf("%v, %s: got %d octets, %v; want %d", su, tt.name, p.N, p.Err, tt.n)
			}
		}
	}
}

func TestDummy(t *testing.T) {
	s := NewScratch()
	tr := suite{alg.EncrAESCBC, 256, alg.IntegHMACSHA256}.transform(t, 1, false)
	if p := openOne(tr, s, sealOne(t, tr, s, nil, NextNone, 2), 2); p.Err != nil || p.Next != NextNone || p.N != 0 {
		t.Errorf("dummy packet: N %d, next %d, %v; want 0, %d, nil", p.N, p.Next, p.Err, NextNone)
	}
}

func TestNewRefuses(t *testing.T) {
	good := suite{alg.EncrAESCBC, 128, alg.IntegHMACSHA256}
	for _, tt := range []struct {
		name   string
		change func(*ipsec.SAParams)
		as     any
	}{
		{"AH", func(p *ipsec.SAParams) { p.Proto = ipsec.AH }, nil},
		{"no cipher", func(p *ipsec.SAParams) { p.Encr = alg.EncrNone }, new(*aead.UnsupportedError)},
		{"no integrity", func(p *ipsec.SAParams) { p.Auth = alg.IntegNone; p.AuthKey = ipsec.Key{} }, new(*aead.UnsupportedError)},
		{"short key", func(p *ipsec.SAParams) { p.EncrKey = ipsec.NewKey(make([]byte, 15)) }, new(*aead.KeyLengthError)},
		{"short integrity key", func(p *ipsec.SAParams) { p.AuthKey = ipsec.NewKey(make([]byte, 20)) }, new(*mac.KeyLengthError)},
	} {
		p := good.params(t, 1, false)
		tt.change(p)
		_, err := New(p)
		var pe *ParamError
		if !errors.As(err, &pe) || tt.as != nil && !errors.As(err, tt.as) || tt.as == nil && !errors.Is(err, ErrNotESP) {
			t.Errorf("%s: got %v (%T)", tt.name, err, err)
		}
		if err != nil && !strings.Contains(err.Error(), "0xc0ffee00") {
			t.Errorf("%s: %q does not name the SPI", tt.name, err)
		}
	}
}

// Without integrity only where the operator has said so, and only AES-CBC.
func TestUnauthenticated(t *testing.T) {
	p := suite{alg.EncrAESCBC, 256, alg.IntegHMACSHA256}.params(t, 1, false)
	p.Auth, p.AuthKey, p.Unauthenticated = alg.IntegNone, ipsec.Key{}, true
	tr, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	s := NewScratch()
	want := []byte("nothing vouches for this")
	b := sealOne(t, tr, s, want, 17, 1)
	if got := openOne(tr, s, b, 1); got.Err != nil || string(got.Dst[:got.N]) != string(want) || got.Next != 17 {
		t.Errorf("got %q, next %d, %v", got.Dst[:got.N], got.Next, got.Err)
	}
	if len(b)%16 != 8 || tr.ICVLen() != 0 {
		t.Errorf("%d octets with an ICV of %d", len(b), tr.ICVLen())
	}
	p.Encr, p.EncrKey = alg.EncrNULL, ipsec.Key{}
	if _, err := New(p); err == nil {
		t.Error("NULL without integrity was accepted (RFC 4301, 4.3)")
	}
}

// The keys may be wiped as soon as the transform is made.
func TestKeysNotKept(t *testing.T) {
	s := NewScratch()
	for _, su := range suites() {
		p := su.params(t, 1, false)
		tr, err := New(p)
		if err != nil {
			t.Fatal(err)
		}
		p.Wipe()
		pkt := sealOne(t, tr, s, pattern(40, 1), 4, 9)
		if o := openOne(su.transform(t, 1, false), s, pkt, 9); o.Err != nil {
			t.Errorf("%v: sealed after the keys were wiped: %v", su, o.Err)
		}
	}
}

func TestConcurrent(t *testing.T) {
	for _, su := range suites() {
		tr := su.transform(t, 1, false)
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				s := NewScratch()
				for i := range 30 {
					seq := uint64(g*1000 + i + 1)
					payload := pattern(100+i, byte(g))
					if p := openOne(tr, s, sealOne(t, tr, s, payload, 4, seq), seq); p.Err != nil || !bytes.Equal(p.Dst[:p.N], payload) {
						t.Errorf("%v goroutine %d packet %d: %v", su, g, i, p.Err)
					}
				}
			})
		}
		wg.Wait()
	}
}

func TestNoAllocs(t *testing.T) {
	const n, batch = 1400, 16
	for _, su := range suites() {
		if purego && su.e == alg.EncrChaCha20Poly1305 {
			t.Logf("%v is left out: the portable code of x/crypto allocates", su)
			continue
		}
		for _, esn := range []bool{false, true} {
			tr := su.transform(t, 1, esn)
			s := NewScratch()
			out := make([]Packet, batch)
			in := make([]Packet, batch)
			for i := range out {
				out[i] = Packet{Dst: make([]byte, 1600), Src: make([]byte, n, 1500), Next: 4}
				in[i].Dst = make([]byte, 1600)
			}
			place := make([]byte, 1600)
			one := make([]Packet, 1)
			seq := uint64(0)
			if a := testing.AllocsPerRun(20, func() {
				for i := range out {
					seq++
					out[i].Seq, in[i].Seq = seq, seq
				}
				tr.Seal(s, out)
				for i := range out {
					in[i].Src = out[i].Dst[:out[i].N]
				}
				tr.Open(s, in)
				seq++
				one[0] = Packet{Dst: place, Src: place[tr.HeaderLen() : tr.HeaderLen()+n], Next: 4, Seq: seq}
				tr.Seal(s, one)
				one[0] = Packet{Dst: place[tr.HeaderLen():], Src: place[:one[0].N], Seq: seq}
				tr.Open(s, one)
				if out[batch-1].Err != nil || in[batch-1].Err != nil || one[0].Err != nil {
					t.Error(out[batch-1].Err, in[batch-1].Err, one[0].Err)
				}
			}); a != 0 {
				t.Errorf("%v esn %v: %v allocations, want 0", su, esn, a)
			}
		}
	}
}

// Hostile packets never panic and never open; nor do the hostile lengths.
func FuzzOpen(f *testing.F) {
	all := suites()
	trs := make([]*Transform, len(all))
	s := NewScratch()
	for i, su := range all {
		trs[i] = su.transform(f, 1, i%2 == 0)
		pkt := sealOne(f, trs[i], s, pattern(20, 1), 4, 9)
		f.Add(uint8(i), uint64(9), pkt[:len(pkt)-1])
		f.Add(uint8(i), uint64(8), pkt)
		f.Add(uint8(i), uint64(0), []byte{})
	}
	f.Fuzz(func(t *testing.T, i uint8, seq uint64, pkt []byte) {
		tr := trs[int(i)%len(trs)]
		if len(pkt) >= 8 {
			// Past the comparison of the header, where it is interesting.
			binary.BigEndian.PutUint32(pkt, tr.spi)
			binary.BigEndian.PutUint32(pkt[4:], uint32(seq))
		}
		p := openOne(tr, s, pkt, seq)
		// Only what was sealed here opens: the packet of the seeds.
		if p.Err == nil && (p.Next != 4 || !bytes.Equal(p.Dst[:p.N], pattern(20, 1))) {
			t.Errorf("%v opened %x", all[int(i)%len(all)], pkt)
		}
		if p.Err != nil && p.N != 0 {
			t.Errorf("N %d with error %v", p.N, p.Err)
		}
	})
}

// Without an ICV anything may open, but never to more than there is, and never
// another SPI's.
func FuzzOpenOld(f *testing.F) {
	var trs []*Transform
	s := NewScratch()
	for _, e := range alg.LegacyEncr() {
		if !e.Info().Old {
			continue
		}
		p := suite{e, e.Info().KeyBits[0], alg.IntegNone}.params(f, 3, false)
		p.Unauthenticated = true
		tr, err := New(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(len(trs)), sealOne(f, tr, s, pattern(20, 1), 4, 9))
		f.Add(uint8(len(trs)), []byte("x"))
		trs = append(trs, tr)
	}
	f.Fuzz(func(t *testing.T, i uint8, pkt []byte) {
		tr := trs[int(i)%len(trs)]
		p := openOne(tr, s, pkt, 0)
		if p.Err == nil && (p.N < 0 || p.N > len(pkt)-tr.HeaderLen()-2 || binary.BigEndian.Uint32(pkt) != tr.spi) {
			t.Errorf("%d octets out of %x", p.N, pkt)
		}
		if p.Err != nil && p.N != 0 {
			t.Errorf("N %d with error %v", p.N, p.Err)
		}
	})
}

// The header of RFC 1827: an SPI and an IV, nothing that counts or authenticates.
func TestOld(t *testing.T) {
	s := NewScratch()
	for _, e := range alg.LegacyEncr() {
		if !e.Info().Old {
			continue
		}
		for _, bits := range e.Info().KeyBits {
			su := suite{e, bits, alg.IntegNone}
			p := su.params(t, 3, false)
			if _, err := New(p); err == nil {
				t.Errorf("%v: made without the operator's word", su)
			}
			p.Unauthenticated = true
			tr, err := New(p)
			if err != nil {
				t.Fatal(err)
			}
			if tr.HeaderLen() != 4+e.Info().IVLen || tr.ICVLen() != 0 {
				t.Errorf("%v: header of %d octets, ICV of %d", su, tr.HeaderLen(), tr.ICVLen())
			}
			for n := range 40 {
				payload := pattern(n, 7)
				seq := uint64(1)<<32 + uint64(n) // beyond what a header could count
				pkt := sealOne(t, tr, s, payload, 17, seq)
				if over := len(pkt) - n; over != tr.HeaderLen()+tr.TrailerLen(n) || tr.Overhead().MaxPayload(len(pkt)) < n || tr.Overhead().MaxPayload(len(pkt)-1) >= n {
					t.Errorf("%v: %d octets more on %d, MaxPayload %d", su, over, n, tr.Overhead().MaxPayload(len(pkt)))
				}
				if (len(pkt)-tr.HeaderLen())%8 != 0 || binary.BigEndian.Uint32(pkt) != uint32(p.SPI) {
					t.Errorf("%v: %x", su, pkt)
				}
				if again := sealOne(t, tr, s, payload, 17, seq+1); bytes.Equal(again[4:], pkt[4:]) {
					t.Errorf("%v: two packets of one IV", su)
				}
				got := openOne(tr, s, pkt, 99) // no number in it that could be wrong
				if got.Err != nil || got.Next != 17 || !bytes.Equal(got.Dst[:got.N], payload) {
					t.Errorf("%v: opened %x, next %d, %v; want %x", su, got.Dst[:got.N], got.Next, got.Err, payload)
				}
				for cut := 1; cut < 8; cut++ {
					if p := openOne(tr, s, pkt[:len(pkt)-cut], 1); !errors.Is(p.Err, ErrMalformed) {
						t.Errorf("%v: cut by %d: %v", su, cut, p.Err)
					}
				}
			}
			// A pad length beyond the packet; another SPI.
			pkt := sealOne(t, tr, s, nil, 17, 1)
			refusals := 0
			for v := range 256 {
				bad := bytes.Clone(pkt)
				bad[len(bad)-1] ^= byte(v)
				if p := openOne(tr, s, bad, 1); p.Err != nil {
					refusals++
				} else if p.N > 6 {
					t.Errorf("%v: %d octets out of a block", su, p.N)
				}
			}
			if refusals < 200 {
				t.Errorf("%v: %d of 256 altered blocks refused for their pad length, want nearly all", su, refusals)
			}
			pkt[0] ^= 1
			if p := openOne(tr, s, pkt, 1); !errors.Is(p.Err, ErrMalformed) {
				t.Errorf("%v: another SPI: %v", su, p.Err)
			}
			one := []Packet{{Dst: make([]byte, 1500), Src: make([]byte, 1300, 1400), Seq: 5}}
			back := []Packet{{Dst: make([]byte, 1500)}}
			if a := testing.AllocsPerRun(20, func() {
				tr.Seal(s, one)
				back[0].Src = one[0].Dst[:one[0].N]
				tr.Open(s, back)
			}); a != 0 || one[0].Err != nil || back[0].Err != nil || back[0].N != 1300 {
				t.Errorf("%v: %v allocations, %v, %v, %d octets", su, a, one[0].Err, back[0].Err, back[0].N)
			}
		}
	}
}

// RFC 8750: the packet is that of the cipher with its IV in the packet, less the
// IV, if that is the sequence number; and another sequence number does not open
// it. So it is with ESN, where the high half is nowhere in the packet.
func TestImplicitIV(t *testing.T) {
	s := NewScratch()
	for iiv, with := range map[alg.Encr]alg.Encr{
		alg.EncrAESGCM16IIV: alg.EncrAESGCM16, alg.EncrAESCCM8IIV: alg.EncrAESCCM8, alg.EncrChaCha20Poly1305IIV: alg.EncrChaCha20Poly1305,
	} {
		for _, esn := range []bool{false, true} {
			n, _ := iiv.KeyLen(256)
			p := &ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP, SPI: 0x1234}, Encr: iiv, ESN: esn, EncrKey: ipsec.NewKey(bytes.Repeat([]byte{7}, n))}
			bare, err := New(p)
			if err != nil {
				t.Fatal(err)
			}
			p.Encr = with
			full, err := New(p)
			if err != nil {
				t.Fatal(err)
			}
			seq := uint64(77)
			if esn {
				seq |= 5 << 32
			}
			payload := []byte("an inner packet")
			pkt := sealOne(t, bare, s, payload, 4, seq)
			long := sealOne(t, full, s, payload, 4, seq)
			if want := append(bytes.Clone(long[:8]), long[16:]...); !bytes.Equal(pkt, want) {
				t.Errorf("%v, ESN %v: got %x, want %x", iiv, esn, pkt, want)
			}
			if bare.HeaderLen() != 8 || full.HeaderLen() != 16 {
				t.Errorf("%v: headers of %d and %d octets, want 8 and 16", iiv, bare.HeaderLen(), full.HeaderLen())
			}
			if p := openOne(bare, s, bytes.Clone(pkt), seq); p.Err != nil || !bytes.Equal(p.Dst[:p.N], payload) {
				t.Errorf("%v: %v, %x", iiv, p.Err, p.Dst[:p.N])
			}
			if esn {
				if p := openOne(bare, s, bytes.Clone(pkt), seq+1<<32); p.Err == nil {
					t.Errorf("%v: opened with another high half", iiv)
				}
			}
		}
	}
}
