package aead

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
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

func load(t testing.TB, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// suite is one allowed combination.
type suite struct {
	e    alg.Encr
	bits int
	a    alg.Integ
}

func (s suite) String() string { return fmt.Sprintf("%v-%d+%v", s.e, s.bits, s.a) }

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
		b[i] = byte(i)*13 + seed
	}
	return b
}

func (s suite) keys(t testing.TB, seed byte) (encr, auth ipsec.Key) {
	t.Helper()
	n, ok := s.e.KeyLen(s.bits)
	if !ok {
		t.Fatalf("%v has no key length", s)
	}
	return ipsec.NewKey(pattern(n, seed)), ipsec.NewKey(pattern(s.a.Info().KeyLen, seed+100))
}

func (s suite) cipher(t testing.TB, seed byte) *Cipher {
	t.Helper()
	ek, ak := s.keys(t, seed)
	c, err := New(s.e, ek, s.a, ak)
	if err != nil {
		t.Fatalf("%v: %v", s, err)
	}
	return c
}

// sealed is a message with everything that a receiver needs.
type sealed struct {
	aad, iv, ct, tail, plain []byte
}

func seal(t testing.TB, c *Cipher, s *Scratch, n int, num uint64) sealed {
	t.Helper()
	m := sealed{aad: pattern(12, 3), iv: make([]byte, c.IVLen()), plain: pattern(n, 9), ct: make([]byte, n+c.ICVLen())}
	if !c.AEAD() {
		m.tail = []byte{0, 0, 0, 1}
	}
	c.PutIV(s, m.iv, num)
	if err := c.Seal(s, m.ct, m.aad, m.iv, m.plain, m.tail); err != nil {
		t.Fatalf("seal %d octets: %v", n, err)
	}
	return m
}

var lengths = []int{0, 16, 32, 48, 112, 128, 256, 1440, 9008}

// sizesOf adds lengths between to those of ciphers without blocks.
func sizesOf(c *Cipher) []int {
	if c.BlockLen() > 1 {
		return lengths
	}
	return append([]int{1, 2, 15, 17, 63, 129, 1439}, lengths...)
}

func TestRoundTrip(t *testing.T) {
	var s Scratch // one for all, as a goroutine has
	for _, su := range suites() {
		c := su.cipher(t, 1)
		info := su.e.Info()
		if c.ImplicitIV() != info.Implicit {
			t.Errorf("%v: implicit IV %v", su, c.ImplicitIV())
		}
		if info.Implicit {
			info.IVLen = 8
		}
		if icv := info.ICVLen + su.a.Info().ICVLen; c.IVLen() != info.IVLen || c.ICVLen() != icv || c.BlockLen() != info.BlockLen || c.AEAD() != info.AEAD {
			t.Errorf("%v: IV %d, ICV %d, block %d, AEAD %v; want %d, %d, %d, %v", su, c.IVLen(), c.ICVLen(), c.BlockLen(), c.AEAD(), info.IVLen, icv, info.BlockLen, info.AEAD)
		}
		for i, n := range sizesOf(c) {
			m := seal(t, c, &s, n, uint64(i+1))
			if n >= 16 && su.e != alg.EncrNULL && su.e != alg.EncrNULLAESGMAC && bytes.Contains(m.ct, m.plain[:16]) {
				t.Errorf("%v %d octets: plaintext shows in the ciphertext", su, n)
			}
			got := make([]byte, n)
			if err := c.Open(&s, got, m.aad, m.iv, m.ct, m.tail); err != nil || !bytes.Equal(got, m.plain) {
				t.Errorf("%v %d octets: opened %x, %v; want %x", su, n, got, err, m.plain)
			}
			// In place: the same octets on the wire, the same back.
			buf := append(pattern(n, 9), make([]byte, c.ICVLen())...)
			if err := c.Seal(&s, buf, m.aad, m.iv, buf[:n], m.tail); err != nil || !bytes.Equal(buf, m.ct) {
				t.Errorf("%v %d octets: sealed in place %x, %v; want %x", su, n, buf, err, m.ct)
			}
			if err := c.Open(&s, buf, m.aad, m.iv, buf, m.tail); err != nil || !bytes.Equal(buf[:n], m.plain) {
				t.Errorf("%v %d octets: opened in place %x, %v; want %x", su, n, buf[:n], err, m.plain)
			}
		}
	}
}

// Nothing behind the ends of the buffers is read as room.
func TestStaysInBounds(t *testing.T) {
	var s Scratch
	for _, su := range suites() {
		c := su.cipher(t, 1)
		iv := make([]byte, c.IVLen())
		const n, guard = 48, 32
		buf := bytes.Repeat([]byte{0xee}, n+c.ICVLen()+guard)
		if err := c.Seal(&s, buf, nil, iv, pattern(n, 0), nil); err != nil {
			t.Fatal(err)
		}
		end := n + c.ICVLen()
		if !bytes.Equal(buf[end:], bytes.Repeat([]byte{0xee}, guard)) {
			t.Errorf("%v: Seal wrote beyond the ICV", su)
		}
		out := bytes.Repeat([]byte{0xee}, n+guard)
		if err := c.Open(&s, out, nil, iv, buf[:end], nil); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out[n:], bytes.Repeat([]byte{0xee}, guard)) {
			t.Errorf("%v: Open wrote beyond the plaintext", su)
		}
	}
}

// refuse wants Open to fail and dst to hold nothing of the plaintext.
func refuse(t *testing.T, what string, c *Cipher, s *Scratch, m sealed) {
	t.Helper()
	dst := bytes.Repeat([]byte{0xee}, len(m.ct))
	err := c.Open(s, dst, m.aad, m.iv, m.ct, m.tail)
	if !errors.Is(err, ErrAuth) && !errors.Is(err, ErrLength) {
		t.Errorf("%s: got %v, want %v or %v", what, err, ErrAuth, ErrLength)
	}
	for _, b := range dst {
		if b != 0 && b != 0xee {
			t.Errorf("%s: refused, but wrote %x", what, dst)
			break
		}
	}
}

func TestRefusesAltered(t *testing.T) {
	var s Scratch
	for _, su := range suites() {
		c := su.cipher(t, 1)
		m := seal(t, c, &s, 32, 5)
		for name, f := range map[string][]byte{"aad": m.aad, "iv": m.iv, "ciphertext or ICV": m.ct, "tail": m.tail} {
			for i := range f {
				for bit := range 8 {
					f[i] ^= 1 << bit
					refuse(t, fmt.Sprintf("%v: %s, octet %d, bit %d", su, name, i, bit), c, &s, m)
					f[i] ^= 1 << bit
				}
			}
		}
		for n := range m.ct {
			cut := m
			cut.ct = m.ct[:n]
			refuse(t, fmt.Sprintf("%v: cut to %d", su, n), c, &s, cut)
		}
		for n := range m.aad {
			cut := m
			cut.aad = m.aad[:n]
			refuse(t, fmt.Sprintf("%v: aad cut to %d", su, n), c, &s, cut)
		}
		for n := range m.iv {
			cut := m
			cut.iv = m.iv[:n]
			refuse(t, fmt.Sprintf("%v: iv cut to %d", su, n), c, &s, cut)
		}
		longer := m
		longer.ct = append(bytes.Clone(m.ct), make([]byte, 16)...)
		refuse(t, fmt.Sprintf("%v: longer", su), c, &s, longer)
		refuse(t, fmt.Sprintf("%v: other key", su), su.cipher(t, 2), &s, m)
		// The salt is part of the key too; of counter mode it only decides the key stream.
		if su.e.Info().SaltLen > 0 && c.AEAD() {
			ek, ak := su.keys(t, 1)
			ek.Bytes()[ek.Len()-1] ^= 1
			other, err := New(su.e, ek, su.a, ak)
			if err != nil {
				t.Fatal(err)
			}
			refuse(t, fmt.Sprintf("%v: other salt", su), other, &s, m)
		}
		dst := make([]byte, 32)
		if err := c.Open(&s, dst, m.aad, m.iv, m.ct, m.tail); err != nil {
			t.Errorf("%v: the unaltered message afterwards: %v", su, err)
		}
	}
}

func TestLengthErrors(t *testing.T) {
	var s Scratch
	for _, su := range suites() {
		c := su.cipher(t, 1)
		iv := make([]byte, c.IVLen())
		for _, tt := range []struct {
			what           string
			dst, iv, plain int
		}{
			{"no room for the ICV", 32 + c.ICVLen() - 1, c.IVLen(), 32},
			{"no room at all", 0, c.IVLen(), 32},
			{"IV too long", 100, c.IVLen() + 1, 32},
			{"not whole blocks", 100, c.IVLen(), 33},
		} {
			if tt.plain%c.BlockLen() == 0 && tt.what == "not whole blocks" {
				continue
			}
			if err := c.Seal(&s, make([]byte, tt.dst), nil, make([]byte, tt.iv), make([]byte, tt.plain), nil); !errors.Is(err, ErrLength) {
				t.Errorf("%v: seal, %s: got %v, want %v", su, tt.what, err, ErrLength)
			}
		}
		if err := c.Open(&s, make([]byte, 31), nil, iv, make([]byte, 32+c.ICVLen()), nil); !errors.Is(err, ErrLength) {
			t.Errorf("%v: open without room: got %v, want %v", su, err, ErrLength)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	k := func(n int) ipsec.Key { return ipsec.NewKey(make([]byte, n)) }
	for _, tt := range []struct {
		e      alg.Encr
		ek     int
		a      alg.Integ
		ak     int
		unsupp bool
	}{
		{alg.EncrNone, 0, alg.IntegHMACSHA256, 32, true},
		{99, 16, alg.IntegHMACSHA256, 32, true},
		{alg.EncrNULL, 0, alg.IntegNone, 0, true},
		{alg.EncrAESCBC, 16, alg.IntegNone, 0, true},
		{alg.EncrAESCTR, 20, alg.IntegNone, 0, true},
		{alg.EncrAESCCM16, 19, alg.IntegHMACSHA256, 32, true},
		{alg.EncrNULLAESGMAC, 20, alg.IntegHMACSHA256, 32, true},
		{alg.EncrAESCBC, 16, alg.IntegAESGMAC128, 20, true},
		{alg.EncrAESCBC, 16, alg.IntegKeyedMD5, 16, true},
		{alg.EncrDESCBC, 8, alg.IntegNone, 0, true},
		{alg.EncrDESIV64, 8, alg.IntegNone, 0, true},
		{alg.EncrDESIV32, 8, alg.IntegHMACMD5, 16, true},
		{alg.EncrAESCTR, 16, alg.IntegHMACSHA256, 32, false},
		{alg.EncrAESCCM8, 20, alg.IntegNone, 0, false},
		{alg.EncrNULLAESGMAC, 16, alg.IntegNone, 0, false},
		{alg.EncrDESCBC, 7, alg.IntegHMACMD5, 16, false},
		{alg.Encr3DESCBC, 16, alg.IntegHMACMD5, 16, false},
		{alg.EncrAESGCM16, 20, alg.IntegHMACSHA256, 32, true},
		{alg.EncrAESGCM16, 20, alg.IntegNone, 32, true},
		{alg.EncrNULL, 1, alg.IntegHMACSHA256, 32, false},
		{alg.EncrAESCBC, 0, alg.IntegHMACSHA256, 32, false},
		{alg.EncrAESCBC, 15, alg.IntegHMACSHA256, 32, false},
		{alg.EncrAESCBC, 20, alg.IntegHMACSHA256, 32, false},
		{alg.EncrAESGCM8, 16, alg.IntegNone, 0, false},
		{alg.EncrAESGCM12, 32, alg.IntegNone, 0, false},
		{alg.EncrAESGCM16, 35, alg.IntegNone, 0, false},
		{alg.EncrChaCha20Poly1305, 32, alg.IntegNone, 0, false},
		{alg.EncrChaCha20Poly1305, 20, alg.IntegNone, 0, false},
	} {
		_, err := New(tt.e, k(tt.ek), tt.a, k(tt.ak))
		var u *UnsupportedError
		var l *KeyLengthError
		if tt.unsupp && !errors.As(err, &u) || !tt.unsupp && !errors.As(err, &l) {
			t.Errorf("%v (%d octets), %v (%d octets): got %v", tt.e, tt.ek, tt.a, tt.ak, err)
		}
	}
	_, err := New(alg.EncrAESCBC, k(16), alg.IntegHMACSHA256, k(31))
	var l *mac.KeyLengthError
	if !errors.As(err, &l) {
		t.Errorf("integrity key of 31 octets: got %v, want a mac.KeyLengthError", err)
	}
}

// The ESP of RFC 1827 has no ICV: whatever is altered opens, to something else.
func TestOld(t *testing.T) {
	var s Scratch
	for _, e := range alg.LegacyEncr() {
		if !e.Info().Old {
			continue
		}
		for _, bits := range e.Info().KeyBits {
			su := suite{e, bits, alg.IntegNone}
			ek, _ := su.keys(t, 1)
			c, err := NewUnauthenticated(e, ek)
			if err != nil {
				t.Fatal(err)
			}
			if c.ICVLen() != 0 || c.BlockLen() != 8 || c.IVLen() != e.Info().IVLen {
				t.Errorf("%v: ICV %d, block %d, IV %d", su, c.ICVLen(), c.BlockLen(), c.IVLen())
			}
			plain, ct, iv := pattern(72, 9), make([]byte, 72), make([]byte, c.IVLen())
			c.PutIV(&s, iv, 1)
			if err := c.Seal(&s, ct, nil, iv, plain, nil); err != nil {
				t.Fatal(err)
			}
			if err := c.Open(&s, ct, nil, iv, ct, nil); err != nil || !bytes.Equal(ct, plain) {
				t.Errorf("%v: opened %x, %v; want %x", su, ct, err, plain)
			}
			if a := testing.AllocsPerRun(20, func() {
				c.PutIV(&s, iv, 2)
				c.Seal(&s, ct, nil, iv, ct, nil)
				c.Open(&s, ct, nil, iv, ct, nil)
			}); a != 0 {
				t.Errorf("%v: %v allocations, want 0", su, a)
			}
		}
	}
}

// Weak keys are refused with an error that names no key.
func TestWeakKeys(t *testing.T) {
	good := "133457799bbcdff1"
	for _, tt := range []struct {
		e    alg.Encr
		key  string
		want error
	}{
		{alg.EncrDESCBC, "0101010101010101", alg.ErrWeakKey},
		{alg.EncrDESIV64, "0000000000000000", alg.ErrWeakKey}, // parity does not matter
		{alg.EncrDESIV32, "e0fee0fef1fef1fe", alg.ErrWeakKey},
		{alg.Encr3DESCBC, good + "fefefefefefefefe" + "0123456789abcdef", alg.ErrWeakKey},
		{alg.Encr3DESCBC, good + "0123456789abcdef" + good, nil},
		{alg.Encr3DESCBC, good + "123556789abddef0" + "0123456789abcdef", alg.ErrSingleDES},
		{alg.Encr3DESCBC, "0123456789abcdef" + good + good, alg.ErrSingleDES},
		{alg.Encr3DESIV64, good + good, alg.ErrSingleDES},
		{alg.Encr3DESIV32, good + "0123456789abcdef", nil},
		{alg.EncrAESCBC, good + good, nil},
	} {
		k := ipsec.NewKey(unhex(t, tt.key))
		_, err := NewUnauthenticated(tt.e, k)
		if !errors.Is(err, tt.want) {
			t.Errorf("%v %s: got %v, want %v", tt.e, tt.key, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), tt.key[:8]) {
			t.Errorf("%v: the error shows the key: %v", tt.e, err)
		}
	}
}

// The keys are not kept: wiping them changes nothing.
func TestKeysNotKept(t *testing.T) {
	var s Scratch
	for _, su := range suites() {
		ek, ak := su.keys(t, 1)
		c, err := New(su.e, ek, su.a, ak)
		if err != nil {
			t.Fatal(err)
		}
		m := seal(t, c, &s, 64, 1)
		ek.Wipe()
		ak.Wipe()
		if err := c.Open(&s, make([]byte, 64), m.aad, m.iv, m.ct, m.tail); err != nil {
			t.Errorf("%v: after the keys were wiped: %v", su, err)
		}
	}
}

func TestPutIV(t *testing.T) {
	var s Scratch
	for _, su := range suites() {
		c, again := su.cipher(t, 1), su.cipher(t, 1)
		seen := map[string]bool{}
		for _, n := range []uint64{0, 1, 2, 3, 255, 256, 1 << 32, 1<<32 + 1, 1<<64 - 1} {
			iv := make([]byte, c.IVLen())
			c.PutIV(&s, iv, n)
			if c.IVLen() > 0 && seen[string(iv)] {
				t.Errorf("%v: IV %x of %d met before", su, iv, n)
			}
			seen[string(iv)] = true
			switch {
			case su.e.Info().Counter:
				if got := hex.EncodeToString(iv); got != fmt.Sprintf("%016x", n) {
					t.Errorf("%v: IV of %#x is %s, want the number", su, n, got)
				}
			case c.IVLen() > 0:
				other := make([]byte, c.IVLen())
				again.PutIV(&s, other, n)
				if bytes.Equal(iv, other) {
					t.Errorf("%v: two ciphers of one key make the same IV %x of %d: it can be foreseen", su, iv, n)
				}
			}
		}
	}
}

func TestConcurrent(t *testing.T) {
	for _, su := range suites() {
		c := su.cipher(t, 1)
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				var s Scratch
				for i := range 50 {
					m := seal(t, c, &s, 160, uint64(g*1000+i))
					if err := c.Open(&s, m.ct, m.aad, m.iv, m.ct, m.tail); err != nil || !bytes.Equal(m.ct[:160], m.plain) {
						t.Errorf("%v goroutine %d message %d: %v", su, g, i, err)
					}
				}
			})
		}
		wg.Wait()
	}
}

func TestNoAllocs(t *testing.T) {
	for _, su := range suites() {
		if purego && su.e == alg.EncrChaCha20Poly1305 {
			t.Logf("%v is left out: the portable code of x/crypto allocates", su)
			continue
		}
		c := su.cipher(t, 1)
		var s Scratch
		buf, iv, aad := make([]byte, 1440+c.ICVLen()), make([]byte, c.IVLen()), make([]byte, 8)
		n := uint64(0)
		if a := testing.AllocsPerRun(50, func() {
			n++
			c.PutIV(&s, iv, n)
			if err := c.Seal(&s, buf, aad, iv, buf[:1440], nil); err != nil {
				t.Error(err)
			}
			if err := c.Open(&s, buf, aad, iv, buf, nil); err != nil {
				t.Error(err)
			}
		}); a != 0 {
			t.Errorf("%v: %v allocations, want 0", su, a)
		}
	}
}

// What is not a message never opens, and never panics.
func FuzzOpen(f *testing.F) {
	all := suites()
	ciphers := make([]*Cipher, len(all))
	var s Scratch
	for i, su := range all {
		ciphers[i] = su.cipher(f, 1)
		m := seal(f, ciphers[i], &s, 32, 1)
		m.ct[0] ^= 1
		f.Add(uint8(i), m.aad, m.iv, m.ct)
		f.Add(uint8(i), []byte{}, m.iv, []byte{})
	}
	f.Fuzz(func(t *testing.T, i uint8, aad, iv, ct []byte) {
		c := ciphers[int(i)%len(ciphers)]
		if err := c.Open(&s, make([]byte, len(ct)), aad, iv, ct, nil); err == nil {
			t.Errorf("%v opened", all[int(i)%len(all)])
		}
	})
}

func BenchmarkSealOpen(b *testing.B) {
	for _, su := range suites() {
		c := su.cipher(b, 1)
		var s Scratch
		m := seal(b, c, &s, 1440, 1)
		dst := make([]byte, len(m.ct))
		b.Run(su.String()+"/seal", func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(1440)
			for b.Loop() {
				if err := c.Seal(&s, m.ct, m.aad, m.iv, m.plain, m.tail); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(su.String()+"/open", func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(1440)
			for b.Loop() {
				if err := c.Open(&s, dst, m.aad, m.iv, m.ct, m.tail); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
