package aead

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// standard runs f with Ciphers of the standard library.
func standard(f func()) {
	defer standardOnly.Store(standardOnly.Load())
	standardOnly.Store(true)
	f()
}

// both makes a Cipher of su with own code, or skips the test, and the same with
// the standard library.
func both(t testing.TB, su suite) (own, std *Cipher) {
	t.Helper()
	gcm := false
	switch su.e {
	case alg.EncrAESGCM8, alg.EncrAESGCM12, alg.EncrAESGCM16:
		gcm = true
	}
	if gcm && !useGCM() || !gcm && !useCBC() {
		t.Skip("no own code for this CPU or mode: " + Implementation())
	}
	standard(func() { std = su.cipher(t, 1) })
	return su.cipher(t, 1), std
}

// ownSuites lists the suites that own code computes.
func ownSuites() []suite {
	var l []suite
	for _, su := range suites() {
		switch su.e {
		case alg.EncrAESGCM8, alg.EncrAESGCM12, alg.EncrAESGCM16,
			alg.EncrAESCCM8, alg.EncrAESCCM12, alg.EncrAESCCM16:
			l = append(l, su)
		case alg.EncrAESCBC, alg.EncrAESCTR:
			if su.a == alg.IntegHMACSHA1 {
				l = append(l, su)
			}
		}
	}
	return l
}

// Each implementation passes all tests of the package: those above run with
// what this CPU has, and here with the standard library.
func TestStandardLibrary(t *testing.T) {
	standard(func() {
		if got, want := Implementation(), "standard library"; got != want {
			t.Errorf("with the switch: got %q, want %q", got, want)
		}
		for name, f := range map[string]func(*testing.T){
			"RFC": TestRFC, "Wycheproof": TestWycheproof, "WycheproofCBC": TestWycheproofCBC, "WycheproofCCM": TestWycheproofCCM,
			"VectorsCCM": TestVectorsCCM, "WycheproofGMAC": TestWycheproofGMAC, "CapturedIKE": TestCapturedIKE,
			"GCMSpec": TestGCMSpec, "RoundTrip": TestRoundTrip, "StaysInBounds": TestStaysInBounds,
			"RefusesAltered": TestRefusesAltered, "LengthErrors": TestLengthErrors, "KeysNotKept": TestKeysNotKept,
			"NoAllocs": TestNoAllocs, "SealBatch": TestSealBatch,
		} {
			t.Run(name, f)
		}
	})
	if useCBC() && !strings.Contains(Implementation(), "AES-NI") {
		t.Errorf("without the switch: got %q, want AES-NI named", Implementation())
	}
}

// The algorithm's specification (McGrew and Viega, appendix B), test cases 4,
// 10 and 16, which RFC 4106, 9 refers to: 60 octets, 20 of additional data.
func TestGCMSpec(t *testing.T) {
	const (
		key = "feffe9928665731c6d6a8f9467308308"
		iv  = "cafebabefacedbaddecaf888"
		aad = "feedfacedeadbeeffeedfacedeadbeefabaddad2"
		msg = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72" +
			"1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
	)
	var s Scratch
	for _, tt := range []struct{ key, tag string }{
		{key, "5bc94fbc3221a5db94fae95ae7121a47"},
		{key + key[:16], "2519498e80f1478f37ba55bd6d27618c"},
		{key + key, "76fc6ece0f4e1768cddf8853bb2d551b"},
	} {
		nonce, plain := unhex(t, iv), unhex(t, msg)
		c, err := New(alg.EncrAESGCM16, ipsec.NewKey(append(unhex(t, tt.key), nonce[:4]...)), alg.IntegNone, ipsec.Key{})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(plain)+16)
		if err := c.Seal(&s, got, unhex(t, aad), nonce[4:], plain, nil); err != nil {
			t.Fatal(err)
		}
		if tag := got[len(plain):]; !bytes.Equal(tag, unhex(t, tt.tag)) {
			t.Errorf("key of %d bits: tag %x, want %s", len(tt.key)*4, tag, tt.tag)
		}
	}
}

// equal seals plain with both, disjoint and in place, wants the same octets,
// and opens them with both, disjoint and in place. Buffers start at odd places
// between guards.
func equal(t *testing.T, own, std *Cipher, plain, aad, iv []byte, shift int) {
	t.Helper()
	const guard = 80 // more than a register
	var s Scratch
	n, sealed := len(plain), len(plain)+own.ICVLen()
	frame := func(fill []byte, n int) (whole, part []byte) {
		whole = bytes.Repeat([]byte{0xee}, shift+n+guard)
		part = whole[shift : shift+n]
		copy(part, fill)
		return whole, part
	}
	intact := func(what string, whole []byte, n int) {
		t.Helper()
		for i, b := range whole {
			if (i < shift || i >= shift+n) && b != 0xee {
				t.Fatalf("%s of %d octets wrote outside of its buffer", what, len(plain))
			}
		}
	}
	want := make([]byte, sealed)
	if err := std.Seal(&s, want, aad, iv, plain, nil); err != nil {
		t.Fatal(err)
	}
	whole, dst := frame(nil, sealed)
	if err := own.Seal(&s, dst, aad, iv, plain, nil); err != nil || !bytes.Equal(dst, want) {
		t.Fatalf("%d octets, aad %d, shift %d: sealed %x, %v; want %x", n, len(aad), shift, dst, err, want)
	}
	intact("seal", whole, sealed)
	whole, dst = frame(plain, sealed)
	if err := own.Seal(&s, dst, aad, iv, dst[:n], nil); err != nil || !bytes.Equal(dst, want) {
		t.Fatalf("%d octets, aad %d, shift %d: sealed in place %x, %v; want %x", n, len(aad), shift, dst, err, want)
	}
	intact("seal in place", whole, sealed)
	whole, dst = frame(nil, n)
	if err := own.Open(&s, dst, aad, iv, want, nil); err != nil || !bytes.Equal(dst, plain) {
		t.Fatalf("%d octets, aad %d, shift %d: opened %x, %v; want %x", n, len(aad), shift, dst, err, plain)
	}
	intact("open", whole, n)
	whole, dst = frame(want, sealed)
	if err := own.Open(&s, dst, aad, iv, dst, nil); err != nil || !bytes.Equal(dst[:n], plain) || !bytes.Equal(dst[n:], want[n:]) {
		t.Fatalf("%d octets, aad %d, shift %d: opened in place %x, %v; want %x", n, len(aad), shift, dst[:n], err, plain)
	}
	intact("open in place", whole, sealed)
}

// Every length to 2100 at every alignment to 63, and additional data of every
// length to 64, against the standard library.
func TestOwnEqualsStandard(t *testing.T) {
	for _, su := range ownSuites() {
		t.Run(su.String(), func(t *testing.T) {
			own, std := both(t, su)
			iv := pattern(own.IVLen(), 77)
			for n := 0; n <= 2100; n += own.BlockLen() {
				equal(t, own, std, pattern(n, byte(n)), pattern(8+n%2*4, 3), iv, n*7%64)
			}
			for shift := range 64 {
				equal(t, own, std, pattern(1440, 5), pattern(shift, 3), iv, shift)
			}
			for _, n := range []int{4096, 65520} {
				equal(t, own, std, pattern(n, 5), pattern(300, 3), iv, 1)
			}
		})
	}
}

// The tag is compared whole: each octet of a packet altered, at lengths on
// both sides of each code path.
func TestOwnRefusesAltered(t *testing.T) {
	for _, su := range ownSuites() {
		t.Run(su.String(), func(t *testing.T) {
			own, _ := both(t, su)
			var s Scratch
			for _, n := range []int{0, 16, 48, 64, 112, 128, 192, 240, 241, 255, 256, 272, 512, 1400, 1440} {
				if n%own.BlockLen() != 0 {
					continue
				}
				m := seal(t, own, &s, n, 5)
				m.tail = nil
				if !own.AEAD() {
					m.tail = []byte{0, 0, 0, 1}
				}
				for i := range m.ct {
					m.ct[i] ^= 1 << (i % 8)
					refuse(t, fmt.Sprintf("%d octets, octet %d", n, i), own, &s, m)
					m.ct[i] ^= 1 << (i % 8)
				}
			}
		})
	}
}

// A batch is what single calls make, whatever the lengths beside each other.
func TestSealBatch(t *testing.T) {
	var s Scratch
	r := rand.New(rand.NewPCG(1, 2))
	for _, su := range suites() {
		c := su.cipher(t, 1)
		for _, count := range []int{0, 1, 2, 7, 8, 9, 16, 33} {
			ms, want := make([]Message, count), make([][]byte, count)
			for i := range ms {
				n := r.IntN(20) * 16
				if count == 33 {
					n = 112
				}
				plain, iv := pattern(n, byte(i)), make([]byte, c.IVLen())
				c.PutIV(&s, iv, uint64(i))
				ms[i] = Message{Dst: make([]byte, n+c.ICVLen()), AAD: pattern(8, byte(i)), IV: iv, Plain: plain}
				if !c.AEAD() {
					ms[i].Tail = pattern(4, byte(i))
				}
				m := &ms[i]
				want[i] = make([]byte, n+c.ICVLen())
				switch {
				case i%5 == 3: // impossible: stays as it is
					m.Dst = m.Dst[:n+c.ICVLen()-1]
					clear(want[i])
					want[i] = want[i][:len(m.Dst)]
					continue
				case i%2 == 1: // in place
					copy(m.Dst, plain)
					m.Plain = m.Dst[:n]
				}
				if err := c.Seal(&s, want[i], m.AAD, m.IV, plain, m.Tail); err != nil {
					t.Fatal(err)
				}
			}
			c.SealBatch(&s, ms)
			for i, m := range ms {
				wantErr := error(nil)
				if i%5 == 3 {
					wantErr = ErrLength
				}
				if m.Err != wantErr || !bytes.Equal(m.Dst, want[i]) {
					t.Errorf("%v: %d of %d, %d octets: got %x, %v; want %x, %v", su, i, count, len(m.Plain), m.Dst, m.Err, want[i], wantErr)
				}
			}
		}
	}
}

// Own code and the standard library agree on anything.
func FuzzOwnEqualsStandard(f *testing.F) {
	for i, n := range []int{0, 1, 15, 64, 240, 241, 255, 256, 257, 1400, 1472} {
		f.Add(uint8(i), pattern(n, 1), pattern(i*4, 2), uint64(n)<<32, uint8(i), uint16(n))
	}
	all := ownSuites()
	f.Fuzz(func(t *testing.T, which uint8, plain, aad []byte, num uint64, shift uint8, flip uint16) {
		su := all[int(which)%len(all)]
		own, std := both(t, su)
		plain = plain[:len(plain)/own.BlockLen()*own.BlockLen()]
		iv := make([]byte, own.IVLen())
		own.PutIV(new(Scratch), iv, num)
		equal(t, own, std, plain, aad, iv, int(shift))
		var s Scratch
		ct := make([]byte, len(plain)+own.ICVLen())
		if err := own.Seal(&s, ct, aad, iv, plain, nil); err != nil {
			t.Fatal(err)
		}
		ct[int(flip)%len(ct)] ^= 1 << (flip >> 13)
		refuse(t, "altered", own, &s, sealed{aad: aad, iv: iv, ct: ct})
	})
}

// GHASH and the key schedule against crypto/aes at random keys: a fault in a
// carry would hide behind one fixed key.
func TestOwnRandomKeys(t *testing.T) {
	r := rand.NewChaCha8([32]byte{1})
	var s Scratch
	if !useGCM() {
		t.Skip("no own code for this CPU or mode: " + Implementation())
	}
	for i := range 3000 {
		key, nonce := make([]byte, 16+i%3*8), make([]byte, 12)
		plain, aad := make([]byte, i%700), make([]byte, i%29)
		for _, b := range [][]byte{key, nonce, plain, aad} {
			r.Read(b)
		}
		b, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		g, err := cipher.NewGCM(b)
		if err != nil {
			t.Fatal(err)
		}
		want := g.Seal(nil, nonce, plain, aad)
		c, err := New(alg.EncrAESGCM16, ipsec.NewKey(append(key, nonce[:4]...)), alg.IntegNone, ipsec.Key{})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if err := c.Seal(&s, got, aad, nonce[4:], plain, nil); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("key %x, nonce %x, %d octets, aad %d: got %x, %v; want %x", key, nonce, len(plain), len(aad), got, err, want)
		}
	}
}

// Own code beside the standard library, in octets of plaintext.
func BenchmarkImplementations(b *testing.B) {
	type sub struct {
		name string
		c    *Cipher
	}
	for _, su := range []suite{
		{alg.EncrAESGCM16, 128, alg.IntegNone}, {alg.EncrAESGCM16, 256, alg.IntegNone}, {alg.EncrAESGCM8, 128, alg.IntegNone},
		{alg.EncrAESCBC, 128, alg.IntegHMACSHA1}, {alg.EncrAESCBC, 128, alg.IntegHMACSHA256}, {alg.EncrAESCBC, 256, alg.IntegHMACSHA256},
		{alg.EncrAESCTR, 128, alg.IntegHMACSHA256}, {alg.EncrAESCCM16, 128, alg.IntegNone}, {alg.EncrNULLAESGMAC, 128, alg.IntegNone},
	} {
		var subs []sub
		standard(func() { subs = append(subs, sub{"std", su.cipher(b, 1)}) })
		if own := su.cipher(b, 1); fmt.Sprintf("%T", own.core) != fmt.Sprintf("%T", subs[0].c.core) {
			subs = append(subs, sub{"own", own})
		}
		for _, n := range []int{64, 512, 1400} {
			for _, x := range subs {
				c := x.c
				n := n / c.BlockLen() * c.BlockLen()
				var s Scratch
				ms := make([]Message, 32)
				for i := range ms {
					m := seal(b, c, &s, n, uint64(i))
					ms[i] = Message{Dst: m.ct, AAD: m.aad[:8], IV: m.iv, Plain: m.plain}
				}
				c.SealBatch(&s, ms)
				run := func(what string, f func(*Message)) {
					b.Run(fmt.Sprintf("%v/%s/%d/%s", su, what, n, x.name), func(b *testing.B) {
						b.ReportAllocs()
						b.SetBytes(int64(n))
						for i := range b.N {
							f(&ms[i%len(ms)])
						}
					})
				}
				run("seal", func(m *Message) { _ = c.Seal(&s, m.Dst, m.AAD, m.IV, m.Plain, nil) })
				run("open", func(m *Message) {
					if err := c.Open(&s, m.Plain, m.AAD, m.IV, m.Dst, nil); err != nil {
						b.Fatal(err)
					}
				})
				if c.AEAD() {
					continue
				}
				b.Run(fmt.Sprintf("%v/batch/%d/%s", su, n, x.name), func(b *testing.B) {
					b.ReportAllocs()
					b.SetBytes(int64(n))
					for i := 0; i < b.N; i += len(ms) {
						c.SealBatch(&s, ms)
					}
				})
			}
		}
	}
}
