package mac

import (
	"bytes"
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
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
	b, err := os.ReadFile("../testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

var stdHash = map[alg.Integ]func() hash.Hash{
	alg.IntegHMACSHA1:   sha1.New,
	alg.IntegHMACSHA256: sha256.New,
	alg.IntegHMACSHA384: sha512.New384,
	alg.IntegHMACSHA512: sha512.New,
	alg.IntegHMACMD5:    md5.New,
}

// whole computes the HMAC uncut, with a key of any length (RFC 2104, 2).
func whole(t *testing.T, a alg.Integ, key []byte, parts ...[]byte) []byte {
	t.Helper()
	if h := newHash(a); h != nil && len(key) > h.BlockSize() {
		h.Write(key)
		key = h.Sum(nil)
	}
	m, err := newMAC(a, key)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(m.compute(new(Scratch), parts))
}

// transforms lists all that this package computes.
func transforms() []alg.Integ { return append(alg.AllInteg(), alg.LegacyInteg()...) }

// RFC 2202, 2 and 3, RFC 4231, 4, RFC 3566, 4.6, RFC 4493, 4, RFC 4494, 4.
func TestRFC(t *testing.T) {
	var v struct {
		Tests []struct {
			RFC           string
			Case          any
			Alg           string
			Key, Msg, Out string
		}
	}
	load(t, "rfc.json", &v)
	n := 0
	for _, tt := range v.Tests {
		for _, a := range transforms() {
			name, cut := strings.CutSuffix(tt.Alg, "-96")
			if strings.TrimSuffix(name, "-mac") != a.String() {
				continue
			}
			n++
			got := hex.EncodeToString(whole(t, a, unhex(t, tt.Key), unhex(t, tt.Msg)))
			if cut {
				got = got[:24]
			}
			if got != tt.Out {
				t.Errorf("RFC %s case %v %s: got %s, want %s", tt.RFC, tt.Case, tt.Alg, got, tt.Out)
			}
		}
	}
	if n < 40 {
		t.Errorf("%d vectors used, want 40", n)
	}
}

func TestWycheproof(t *testing.T) {
	for name, a := range map[string]alg.Integ{"hmac_sha1": alg.IntegHMACSHA1, "hmac_sha256": alg.IntegHMACSHA256, "aes_cmac": alg.IntegAESCMAC} {
		var v struct {
			TestGroups []struct {
				TagSize int
				Tests   []struct {
					TcID                           int
					Comment, Key, Msg, Tag, Result string
				}
			}
		}
		load(t, "wycheproof/"+name+"_test.json", &v)
		for _, g := range v.TestGroups {
			for _, tt := range g.Tests {
				key, tag := unhex(t, tt.Key), unhex(t, tt.Tag)
				if a == alg.IntegAESCMAC && len(key) != a.Info().KeyLen {
					if _, err := New(a, ipsec.NewKey(key)); err == nil {
						t.Errorf("%s %d: key of %d octets accepted", name, tt.TcID, len(key))
					}
					continue
				}
				got := whole(t, a, key, unhex(t, tt.Msg))[:g.TagSize/8]
				if ok := bytes.Equal(got, tag); ok != (tt.Result == "valid") {
					t.Errorf("%s %d (%s): match %v, want %s", name, tt.TcID, tt.Comment, ok, tt.Result)
				}
			}
		}
	}
}

func key(a alg.Integ) ipsec.Key {
	b := make([]byte, a.Info().KeyLen)
	for i := range b {
		b[i] = byte(i*7 + int(a))
	}
	return ipsec.NewKey(b)
}

// Every HMAC agrees with crypto/hmac, cut to its ICV, however the message
// is parted, and with one Scratch used for all in turn.
func TestAgainstStandardLibrary(t *testing.T) {
	var s Scratch
	for range 2 {
		for a := range stdHash {
			m, err := New(a, key(a))
			if err != nil {
				t.Fatalf("%v: %v", a, err)
			}
			msg := make([]byte, 300)
			for i := range msg {
				msg[i] = byte(i)
			}
			for _, n := range []int{0, 1, 55, 56, 63, 64, 65, 111, 112, 127, 128, 129, 300} {
				h := hmac.New(stdHash[a], key(a).Bytes())
				h.Write(msg[:n])
				want := h.Sum(nil)[:m.ICVLen()]
				got := make([]byte, m.ICVLen()+1)
				got[m.ICVLen()] = 0xee
				m.Sum(&s, got, msg[:n/3], nil, msg[n/3:n/2], msg[n/2:n])
				if !bytes.Equal(got[:m.ICVLen()], want) || got[m.ICVLen()] != 0xee {
					t.Errorf("%v of %d octets: got %x, want %x and ee", a, n, got, want)
				}
				if !m.Verify(&s, want, msg[:n]) {
					t.Errorf("%v of %d octets: right ICV refused", a, n)
				}
			}
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	var s Scratch
	for _, a := range transforms() {
		m, err := New(a, key(a))
		if err != nil {
			t.Fatal(err)
		}
		msg := []byte("a message")
		icv := make([]byte, m.ICVLen())
		m.Sum(&s, icv, msg)
		for i := range icv {
			if m.Verify(&s, icv[:i], msg) {
				t.Errorf("%v: ICV cut to %d octets accepted", a, i)
			}
			for bit := range 8 {
				icv[i] ^= 1 << bit
				if m.Verify(&s, icv, msg) {
					t.Errorf("%v: ICV with bit %d of octet %d flipped accepted", a, bit, i)
				}
				icv[i] ^= 1 << bit
			}
		}
		if m.Verify(&s, append(bytes.Clone(icv), 0), msg) {
			t.Errorf("%v: ICV with an octet more accepted", a)
		}
		if m.Verify(&s, icv, msg[1:]) {
			t.Errorf("%v: another message accepted", a)
		}
		k := key(a)
		k.Bytes()[0] ^= 1
		other, err := New(a, k)
		if err != nil {
			t.Fatal(err)
		}
		if other.Verify(&s, icv, msg) {
			t.Errorf("%v: another key accepted", a)
		}
		m.Wipe()
		if m.chain != nil && *m.chain != (chain{}) {
			t.Errorf("%v: subkeys left after Wipe", a)
		}
		if bytes.ContainsFunc(slices.Concat(m.inner, m.outer, m.suffix), func(r rune) bool { return r != 0 }) {
			t.Errorf("%v: states not zero after Wipe", a)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, a := range transforms() {
		for _, n := range []int{0, a.Info().KeyLen - 1, a.Info().KeyLen + 1, 128} {
			_, err := New(a, ipsec.NewKey(make([]byte, n)))
			var e *KeyLengthError
			if !errors.As(err, &e) || e.Got != n || e.Want != a.Info().KeyLen {
				t.Errorf("%v with a key of %d octets: got %v, want a KeyLengthError", a, n, err)
			}
		}
	}
	for _, a := range append(alg.AHInteg(), alg.IntegNone, 200) { // GMAC is crypto/aead's
		_, err := New(a, ipsec.Key{})
		var e *UnsupportedError
		if !errors.As(err, &e) {
			t.Errorf("%v: got %v, want an UnsupportedError", a, err)
		}
	}
}

// RFC 1828, 2, of the octets 0, 1, 2 ... under a key of the same, computed with
// another MD5: key, 80 00 ... and the key's length in bits, message, key.
func TestKeyedMD5(t *testing.T) {
	msg := make([]byte, 300)
	for i := range msg {
		msg[i] = byte(i)
	}
	m, err := New(alg.IntegKeyedMD5, ipsec.NewKey(msg[:16]))
	if err != nil {
		t.Fatal(err)
	}
	var s Scratch
	for _, tt := range []struct {
		n    int
		want string
	}{
		{0, "1f287d7b7704a45f27c2731a3d0e143f"},
		{1, "d758312bfdf9307db12418b3513a7fde"},
		{39, "822601cc79af7fd32fc4ff032aed5df5"},
		{40, "45cf5b9c132e7c7fa62b0be9d7acd0a4"},
		{41, "eacf3d6c579cb5fc168d2b553fac7bec"},
		{63, "7bbebbe9adafc91cf5e65955a06b48b4"},
		{64, "4f4d2229e019572882227376086208a1"},
		{100, "61865bde7f2e92aa94845b9575bdf2d6"},
		{300, "c4c895296e801ad27235bee7adaf8394"},
	} {
		got := make([]byte, m.ICVLen())
		m.Sum(&s, got, msg[:tt.n/2], msg[tt.n/2:tt.n])
		if hex.EncodeToString(got) != tt.want {
			t.Errorf("%d octets: got %x, want %s", tt.n, got, tt.want)
		}
	}
}

// One MAC serves many goroutines, each with its Scratch.
func TestConcurrent(t *testing.T) {
	m, err := New(alg.IntegHMACSHA256, key(alg.IntegHMACSHA256))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			var s Scratch
			icv := make([]byte, m.ICVLen())
			for i := range 500 {
				msg := fmt.Appendf(nil, "%d %d", g, i)
				m.Sum(&s, icv, msg)
				if !m.Verify(&s, icv, msg) {
					t.Errorf("goroutine %d message %d: own ICV refused", g, i)
				}
			}
		})
	}
	wg.Wait()
}

func TestNoAllocs(t *testing.T) {
	var s Scratch
	for _, a := range transforms() {
		m, err := New(a, key(a))
		if err != nil {
			t.Fatal(err)
		}
		msg, icv := make([]byte, 1400), make([]byte, m.ICVLen())
		if n := testing.AllocsPerRun(100, func() {
			m.Sum(&s, icv, msg[:8], msg[8:24], msg[24:])
			if !m.Verify(&s, icv, msg[:8], msg[8:]) {
				t.Error("refused")
			}
		}); n != 0 {
			t.Errorf("%v: %v allocations, want 0", a, n)
		}
	}
}

func BenchmarkSum(b *testing.B) {
	for _, a := range transforms() {
		for _, n := range []int{64, 1400} {
			b.Run(fmt.Sprintf("%v/%d", a, n), func(b *testing.B) {
				var s Scratch
				m, err := New(a, key(a))
				if err != nil {
					b.Fatal(err)
				}
				msg, icv := make([]byte, n), make([]byte, m.ICVLen())
				b.ReportAllocs()
				b.SetBytes(int64(n))
				for b.Loop() {
					m.Sum(&s, icv, msg)
				}
			})
		}
	}
}

// However a message is parted, a block cipher MAC is that of the whole.
func TestChainParts(t *testing.T) {
	var s Scratch
	msg := make([]byte, 70)
	for i := range msg {
		msg[i] = byte(i * 3)
	}
	for _, a := range []alg.Integ{alg.IntegAESXCBC, alg.IntegAESCMAC} {
		m, err := New(a, key(a))
		if err != nil {
			t.Fatal(err)
		}
		for n := range len(msg) + 1 {
			want := bytes.Clone(m.compute(&s, [][]byte{msg[:n]}))
			for i := range n + 1 {
				for _, j := range []int{i, (i + n) / 2, n} {
					if got := m.compute(&s, [][]byte{msg[:i], msg[i:j], nil, msg[j:n]}); !bytes.Equal(got, want) {
						t.Fatalf("%v of %d octets parted at %d and %d: got %x, want %x", a, n, i, j, got, want)
					}
				}
			}
		}
	}
}
