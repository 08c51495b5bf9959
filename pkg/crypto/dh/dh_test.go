package dh

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"os"
	"strings"
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

func generate(t testing.TB, ke alg.KE, r io.Reader) PrivateKey {
	t.Helper()
	k, err := Generate(ke, r)
	if err != nil {
		t.Fatalf("Generate(%v): %v", ke, err)
	}
	return k
}

// counter is a reader that tests can foresee.
type counter byte

func (c *counter) Read(b []byte) (int, error) {
	for i := range b {
		*c++
		b[i] = byte(*c)
	}
	return len(b), nil
}

var publicLens = map[alg.KE]int{
	alg.KEMODP2048: 256, alg.KEMODP3072: 384, alg.KEMODP4096: 512,
	alg.KEECP256: 64, alg.KEECP384: 96, alg.KEECP521: 132, alg.KEX25519: 32,
}

var sharedLens = map[alg.KE]int{
	alg.KEMODP2048: 256, alg.KEMODP3072: 384, alg.KEMODP4096: 512,
	alg.KEECP256: 32, alg.KEECP384: 48, alg.KEECP521: 66, alg.KEX25519: 32,
}

// Both sides of every method get the same secret, of the right lengths.
func TestAgreement(t *testing.T) {
	for _, ke := range alg.AllKE() {
		t.Run(ke.String(), func(t *testing.T) {
			a, b := generate(t, ke, nil), generate(t, ke, nil)
			if a.KE() != ke {
				t.Errorf("KE() = %v, want %v", a.KE(), ke)
			}
			for _, k := range []PrivateKey{a, b} {
				if got, want := len(k.Public()), publicLens[ke]; got != want || PublicLen(ke) != want {
					t.Errorf("public value of %d octets, PublicLen %d, want %d", got, PublicLen(ke), want)
				}
			}
			if bytes.Equal(a.Public(), b.Public()) {
				t.Error("two keys have the same public value")
			}
			za, err := a.Shared(b.Public())
			if err != nil {
				t.Fatal(err)
			}
			zb, err := b.Shared(a.Public())
			if err != nil {
				t.Fatal(err)
			}
			if !za.Equal(zb) || za.Len() != sharedLens[ke] {
				t.Errorf("secrets equal %v, %d octets; want equal, %d octets", za.Equal(zb), za.Len(), sharedLens[ke])
			}
		})
	}
}

func TestGenerateFromReader(t *testing.T) {
	for _, ke := range alg.AllKE() {
		a, b := generate(t, ke, new(counter)), generate(t, ke, new(counter))
		if !bytes.Equal(a.Public(), b.Public()) {
			t.Errorf("%v: the same octets made different keys", ke)
		}
		if _, err := Generate(ke, strings.NewReader("short")); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v: short reader: got %v, want %v", ke, err, io.ErrUnexpectedEOF)
		}
	}
	zeros := bytes.NewReader(make([]byte, 1<<16))
	if _, err := Generate(alg.KEECP256, zeros); err == nil {
		t.Error("scalar 0 accepted")
	}
}

func TestWipe(t *testing.T) {
	for _, ke := range alg.AllKE() {
		k := generate(t, ke, nil)
		peer := generate(t, ke, nil).Public()
		k.Wipe()
		if _, err := k.Shared(peer); !errors.Is(err, ErrWiped) {
			t.Errorf("%v: Shared after Wipe: got %v, want %v", ke, err, ErrWiped)
		}
	}
}

func TestUnsupported(t *testing.T) {
	for _, ke := range []alg.KE{alg.KENone, 1, 2, 5, 32, 65535} {
		_, err := Generate(ke, nil)
		var e *UnsupportedError
		if !errors.As(err, &e) || e.KE != ke {
			t.Errorf("Generate(%v): got %v, want an UnsupportedError", ke, err)
		}
		if PublicLen(ke) != 0 {
			t.Errorf("PublicLen(%v) = %d, want 0", ke, PublicLen(ke))
		}
	}
}

func TestWrongLength(t *testing.T) {
	for _, ke := range alg.AllKE() {
		k := generate(t, ke, nil)
		good := generate(t, ke, nil).Public()
		for _, peer := range [][]byte{nil, {}, good[1:], good[:len(good)-1], append([]byte{0}, good...), append([]byte{4}, good...)} {
			_, err := k.Shared(peer)
			var e *LengthError
			if !errors.As(err, &e) || e.Got != len(peer) || e.Want != len(good) {
				t.Errorf("%v: %d octets: got %v, want a LengthError", ke, len(peer), err)
			}
		}
	}
}

// RFC 6989, 2.1: only 1 < y < p-1.
func TestMODPRange(t *testing.T) {
	for _, ke := range []alg.KE{alg.KEMODP2048, alg.KEMODP3072, alg.KEMODP4096} {
		p := new(big.Int).SetBytes(methods[ke].(*modp).prime)
		n := PublicLen(ke)
		k := generate(t, ke, nil)
		at := func(d int64) []byte { return new(big.Int).Add(p, big.NewInt(d)).FillBytes(make([]byte, n)) }
		low := func(d byte) []byte { b := make([]byte, n); b[n-1] = d; return b }
		for name, y := range map[string][]byte{"0": low(0), "1": low(1), "p-1": at(-1), "p": at(0), "p+1": at(1), "p+2": at(2), "all ones": bytes.Repeat([]byte{0xff}, n)} {
			if _, err := k.Shared(y); !errors.Is(err, ErrInvalidPublic) {
				t.Errorf("%v: y = %s: got %v, want %v", ke, name, err, ErrInvalidPublic)
			}
		}
		for name, y := range map[string][]byte{"2": low(2), "p-2": at(-2)} {
			if _, err := k.Shared(y); err != nil {
				t.Errorf("%v: y = %s: %v", ke, name, err)
			}
		}
	}
}

// The results are those of math/big, with leading zeros kept: the exponent 10
// gives 2^10, nearly all zeros.
func TestMODPAgainstBig(t *testing.T) {
	for _, ke := range []alg.KE{alg.KEMODP2048, alg.KEMODP3072, alg.KEMODP4096} {
		g := methods[ke].(*modp)
		p := new(big.Int).SetBytes(g.prime)
		long := make([]byte, g.expLen)
		new(counter).Read(long)
		for _, x := range [][]byte{{10}, long} {
			k, err := g.key(bytes.Clone(x))
			if err != nil {
				t.Fatal(err)
			}
			e := new(big.Int).SetBytes(x)
			want := new(big.Int).Exp(big.NewInt(2), e, p).FillBytes(make([]byte, len(g.prime)))
			if !bytes.Equal(k.Public(), want) {
				t.Errorf("%v exponent %x: public %x, want %x", ke, x, k.Public(), want)
			}
			y := generate(t, ke, nil).Public()
			z, err := k.Shared(y)
			if err != nil {
				t.Fatal(err)
			}
			want = new(big.Int).Exp(new(big.Int).SetBytes(y), e, p).FillBytes(make([]byte, len(g.prime)))
			if !z.Equal(ipsec.NewKey(want)) {
				t.Errorf("%v exponent %x: the secret is not y^x mod p", ke, x)
			}
		}
	}
}

// RFC 3526, 3-5: p = 2^n - 2^(n-64) - 1 + 2^64 * ([2^(n-130) pi] + k), a safe
// prime in whose group 2 generates the subgroup of order (p-1)/2.
func TestMODPPrimes(t *testing.T) {
	const bits = 4200
	arctan := func(x int64) *big.Int { // of 1/x, times 2^bits
		term := new(big.Int).Div(new(big.Int).Lsh(big.NewInt(1), bits), big.NewInt(x))
		sum, x2 := new(big.Int).Set(term), big.NewInt(x*x)
		for n, add := int64(3), false; term.Sign() > 0; n, add = n+2, !add {
			term.Div(term, x2)
			q := new(big.Int).Div(term, big.NewInt(n))
			if add {
				sum.Add(sum, q)
			} else {
				sum.Sub(sum, q)
			}
		}
		return sum
	}
	pi := new(big.Int).Mul(big.NewInt(16), arctan(5)) // Machin's formula
	pi.Sub(pi, new(big.Int).Mul(big.NewInt(4), arctan(239)))
	pow := func(n uint) *big.Int { return new(big.Int).Lsh(big.NewInt(1), n) }
	for _, tt := range []struct {
		ke alg.KE
		n  uint
		k  int64
	}{{alg.KEMODP2048, 2048, 124476}, {alg.KEMODP3072, 3072, 1690314}, {alg.KEMODP4096, 4096, 240904}} {
		want := new(big.Int).Rsh(pi, bits-(tt.n-130))
		want.Add(want, big.NewInt(tt.k)).Lsh(want, 64)
		want.Add(want, pow(tt.n)).Sub(want, pow(tt.n-64)).Sub(want, big.NewInt(1))
		got := new(big.Int).SetBytes(methods[tt.ke].(*modp).prime)
		if got.Cmp(want) != 0 {
			t.Errorf("%v: prime %x, want %x", tt.ke, got, want)
		}
		q := new(big.Int).Rsh(got, 1)
		if !got.ProbablyPrime(1) || !q.ProbablyPrime(1) {
			t.Errorf("%v: not a safe prime", tt.ke)
		}
		if new(big.Int).Exp(big.NewInt(2), q, got).Cmp(big.NewInt(1)) != 0 {
			t.Errorf("%v: 2 does not have the order (p-1)/2", tt.ke)
		}
	}
}

// RFC 5903, 8.1 and 8.2.
func TestRFC5903(t *testing.T) {
	var v struct {
		Tests []struct {
			Alg, Private, Out string
			PrivateI          string `json:"private_i"`
			PrivateR          string `json:"private_r"`
		}
	}
	load(t, "rfc.json", &v)
	groups := map[string]*ecp{"secp256r1": newECP(alg.KEECP256), "secp384r1": newECP(alg.KEECP384)}
	n := 0
	for _, tt := range v.Tests {
		name, what, _ := strings.Cut(tt.Alg, " ")
		g := groups[name]
		if g == nil {
			continue
		}
		n++
		key := func(s string) *curveKey {
			k, err := g.key(unhex(t, s))
			if err != nil {
				t.Fatal(err)
			}
			return k
		}
		var got []byte
		if what == "shared" {
			i, r := key(tt.PrivateI), key(tt.PrivateR)
			z, err := i.Shared(r.Public())
			if err != nil {
				t.Fatal(err)
			}
			got = z.Bytes()
		} else {
			got = key(tt.Private).Public()
		}
		if hex.EncodeToString(got) != tt.Out {
			t.Errorf("%s: got %x, want %s", tt.Alg, got, tt.Out)
		}
	}
	if n != 6 {
		t.Errorf("%d vectors used, want 6", n)
	}
}

func TestWycheproofECP256(t *testing.T) {
	var v struct {
		TestGroups []struct {
			Tests []struct {
				TcID                                     int
				Comment, Public, Private, Shared, Result string
				Flags                                    []string
			}
		}
	}
	load(t, "wycheproof/ecdh_secp256r1_ecpoint_test.json", &v)
	g := newECP(alg.KEECP256)
	used := 0
	for _, grp := range v.TestGroups {
		for _, tt := range grp.Tests {
			pub := unhex(t, tt.Public)
			if len(pub) != 65 || pub[0] != 4 {
				// Compressed and other forms do not exist in IKE; what
				// stands behind the format octet must fail here.
				if len(pub) > 0 {
					k := generate(t, alg.KEECP256, nil)
					if _, err := k.Shared(pub[1:]); err == nil {
						t.Errorf("%d (%s): a point of %d octets accepted", tt.TcID, tt.Comment, len(pub)-1)
					}
				}
				continue
			}
			used++
			x := new(big.Int).SetBytes(unhex(t, tt.Private)).FillBytes(make([]byte, 32))
			k, err := g.key(x)
			if err != nil {
				t.Fatalf("%d: %v", tt.TcID, err)
			}
			z, err := k.Shared(pub[1:])
			switch {
			case tt.Result == "invalid":
				if !errors.Is(err, ErrInvalidPublic) {
					t.Errorf("%d (%s): got %v, want %v", tt.TcID, tt.Comment, err, ErrInvalidPublic)
				}
			case err != nil:
				t.Errorf("%d (%s): %v", tt.TcID, tt.Comment, err)
			case hex.EncodeToString(z.Bytes()) != tt.Shared:
				t.Errorf("%d (%s): got %x, want %s", tt.TcID, tt.Comment, z.Bytes(), tt.Shared)
			}
		}
	}
	if used < 100 {
		t.Errorf("%d vectors used, want hundreds", used)
	}
}

func TestWycheproofX25519(t *testing.T) {
	var v struct {
		TestGroups []struct {
			Tests []struct {
				TcID                                     int
				Comment, Public, Private, Shared, Result string
			}
		}
	}
	load(t, "wycheproof/x25519_test.json", &v)
	zeros := 0
	for _, grp := range v.TestGroups {
		for _, tt := range grp.Tests {
			k, err := x25519{}.key(unhex(t, tt.Private))
			if err != nil {
				t.Fatalf("%d: %v", tt.TcID, err)
			}
			z, err := k.Shared(unhex(t, tt.Public))
			// RFC 8031, 2: an all-zero secret must be refused.
			if tt.Shared == strings.Repeat("0", 64) {
				zeros++
				if !errors.Is(err, ErrInvalidPublic) {
					t.Errorf("%d (%s): got %v, want %v", tt.TcID, tt.Comment, err, ErrInvalidPublic)
				}
				continue
			}
			if err != nil {
				t.Errorf("%d (%s): %v", tt.TcID, tt.Comment, err)
			} else if got := hex.EncodeToString(z.Bytes()); got != tt.Shared {
				t.Errorf("%d (%s): got %s, want %s", tt.TcID, tt.Comment, got, tt.Shared)
			}
		}
	}
	if zeros == 0 {
		t.Error("no vector with an all-zero secret met")
	}
}

// Points that are not on the curve, and the zero point, on every curve.
func TestECPInvalidPoints(t *testing.T) {
	for _, ke := range []alg.KE{alg.KEECP256, alg.KEECP384, alg.KEECP521} {
		k := generate(t, ke, nil)
		good := generate(t, ke, nil).Public()
		for i := range good {
			bad := bytes.Clone(good)
			bad[i] ^= 1
			if _, err := k.Shared(bad); !errors.Is(err, ErrInvalidPublic) {
				t.Errorf("%v: octet %d altered: got %v, want %v", ke, i, err, ErrInvalidPublic)
			}
		}
		for _, fill := range []byte{0, 0xff} {
			if _, err := k.Shared(bytes.Repeat([]byte{fill}, len(good))); !errors.Is(err, ErrInvalidPublic) {
				t.Errorf("%v: all %#x: got %v, want %v", ke, fill, err, ErrInvalidPublic)
			}
		}
	}
}

func FuzzShared(f *testing.F) {
	keys := map[alg.KE]PrivateKey{}
	for _, ke := range alg.AllKE() {
		keys[ke] = generate(f, ke, new(counter))
		f.Add(uint16(ke), keys[ke].Public())
		f.Add(uint16(ke), make([]byte, PublicLen(ke)))
	}
	f.Fuzz(func(t *testing.T, ke uint16, peer []byte) {
		k := keys[alg.KE(ke)]
		if k == nil {
			return
		}
		z, err := k.Shared(peer)
		if (err == nil) != (z.Len() == sharedLens[alg.KE(ke)]) {
			t.Errorf("secret of %d octets with error %v", z.Len(), err)
		}
	})
}

func BenchmarkExchange(b *testing.B) {
	for _, ke := range alg.AllKE() {
		b.Run(ke.String(), func(b *testing.B) {
			peer := generate(b, ke, nil).Public()
			for b.Loop() {
				if _, err := generate(b, ke, nil).Shared(peer); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
