package dh

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"os"
	"strings"
	"testing"

	"github.com/cloudflare/circl/dh/x25519"

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
	alg.KEMODP2048: 256, alg.KEMODP3072: 384, alg.KEMODP4096: 512, alg.KEMODP6144: 768, alg.KEMODP8192: 1024,
	alg.KEECP256: 64, alg.KEECP384: 96, alg.KEECP521: 132, alg.KEX25519: 32, alg.KEX448: 56,
	alg.KEMLKEM768: 1184, alg.KEMLKEM1024: 1568,
	alg.KEBrainpoolP224R1: 56, alg.KEBrainpoolP256R1: 64, alg.KEBrainpoolP384R1: 96, alg.KEBrainpoolP512R1: 128,
}

var sharedLens = map[alg.KE]int{
	alg.KEMODP2048: 256, alg.KEMODP3072: 384, alg.KEMODP4096: 512, alg.KEMODP6144: 768, alg.KEMODP8192: 1024,
	alg.KEECP256: 32, alg.KEECP384: 48, alg.KEECP521: 66, alg.KEX25519: 32, alg.KEX448: 56,
	alg.KEMLKEM768: 32, alg.KEMLKEM1024: 32,
	alg.KEBrainpoolP224R1: 28, alg.KEBrainpoolP256R1: 32, alg.KEBrainpoolP384R1: 48, alg.KEBrainpoolP512R1: 64,
}

// Both sides of every method get the same secret, of the right lengths.
func TestAgreement(t *testing.T) {
	for _, ke := range alg.AllKE() {
		t.Run(ke.String(), func(t *testing.T) {
			a, other := generate(t, ke, nil), generate(t, ke, nil)
			if a.KE() != ke {
				t.Errorf("KE() = %v, want %v", a.KE(), ke)
			}
			if got, want := len(a.Public()), publicLens[ke]; got != want {
				t.Errorf("public value of %d octets, want %d", got, want)
			}
			if bytes.Equal(a.Public(), other.Public()) {
				t.Error("two keys have the same public value")
			}
			pub, zb, err := Respond(ke, nil, a.Public())
			if err != nil {
				t.Fatal(err)
			}
			if len(pub) != responseLens(ke) {
				t.Errorf("responder's value of %d octets, want %d", len(pub), responseLens(ke))
			}
			za, err := a.Shared(pub)
			if err != nil {
				t.Fatal(err)
			}
			if !za.Equal(zb) || za.Len() != sharedLens[ke] {
				t.Errorf("secrets equal %v, %d octets; want equal, %d octets", za.Equal(zb), za.Len(), sharedLens[ke])
			}
			if zo, err := other.Shared(pub); err == nil && zo.Equal(za) {
				t.Error("another key gives the same secret")
			}
		})
	}
}

// responseLens are the octets of a responder's value.
func responseLens(ke alg.KE) int {
	switch ke {
	case alg.KEMLKEM768:
		return 1088
	case alg.KEMLKEM1024:
		return 1568
	}
	return publicLens[ke]
}

// response makes a responder's value for k.
func response(t testing.TB, k PrivateKey) []byte {
	t.Helper()
	b, _, err := Respond(k.KE(), nil, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return b
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
		peer := response(t, k)
		k.Wipe()
		if _, err := k.Shared(peer); !errors.Is(err, ErrWiped) {
			t.Errorf("%v: Shared after Wipe: got %v, want %v", ke, err, ErrWiped)
		}
	}
}

func TestUnsupported(t *testing.T) {
	for _, ke := range []alg.KE{alg.KENone, 1, 2, 5, 26, 35, 65535} {
		_, err := Generate(ke, nil)
		var e *UnsupportedError
		if !errors.As(err, &e) || e.KE != ke {
			t.Errorf("Generate(%v): got %v, want an UnsupportedError", ke, err)
		}
		if _, _, err := Respond(ke, nil, nil); !errors.As(err, &e) {
			t.Errorf("Respond(%v): got %v, want an UnsupportedError", ke, err)
		}
	}
}

func TestWrongLength(t *testing.T) {
	for _, ke := range alg.AllKE() {
		k := generate(t, ke, nil)
		shared := func(b []byte) error { _, err := k.Shared(b); return err }
		respond := func(b []byte) error { _, _, err := Respond(ke, nil, b); return err }
		for _, x := range []struct {
			good []byte
			f    func([]byte) error
		}{{response(t, k), shared}, {k.Public(), respond}} {
			for _, peer := range [][]byte{nil, {}, x.good[1:], x.good[:len(x.good)-1], append([]byte{0}, x.good...), append([]byte{4}, x.good...)} {
				err := x.f(peer)
				var e *LengthError
				if !errors.As(err, &e) || e.Got != len(peer) || e.Want != len(x.good) {
					t.Errorf("%v: %d octets: got %v, want a LengthError", ke, len(peer), err)
				}
			}
		}
	}
}

// RFC 6989, 2.1: only 1 < y < p-1.
func TestMODPRange(t *testing.T) {
	for _, ke := range []alg.KE{alg.KEMODP2048, alg.KEMODP3072, alg.KEMODP4096, alg.KEMODP6144, alg.KEMODP8192} {
		p := new(big.Int).SetBytes(methods[ke].(*modp).prime)
		n := publicLens[ke]
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
	for _, ke := range []alg.KE{alg.KEMODP2048, alg.KEMODP3072, alg.KEMODP4096, alg.KEMODP6144, alg.KEMODP8192} {
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

// RFC 3526, 3-7: p = 2^n - 2^(n-64) - 1 + 2^64 * ([2^(n-130) pi] + k), a safe
// prime in whose group 2 generates the subgroup of order (p-1)/2.
func TestMODPPrimes(t *testing.T) {
	const bits = 8300
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
	}{{alg.KEMODP2048, 2048, 124476}, {alg.KEMODP3072, 3072, 1690314}, {alg.KEMODP4096, 4096, 240904},
		{alg.KEMODP6144, 6144, 929484}, {alg.KEMODP8192, 8192, 4743158}} {
		want := new(big.Int).Rsh(pi, bits-(tt.n-130))
		want.Add(want, big.NewInt(tt.k)).Lsh(want, 64)
		want.Add(want, pow(tt.n)).Sub(want, pow(tt.n-64)).Sub(want, big.NewInt(1))
		got := new(big.Int).SetBytes(methods[tt.ke].(*modp).prime)
		if got.Cmp(want) != 0 {
			t.Errorf("%v: prime %x, want %x", tt.ke, got, want)
		}
		q := new(big.Int).Rsh(got, 1)
		// One round of Fermat's test to base 3 each; the formula has fixed the rest.
		fermat := func(n *big.Int) bool {
			return new(big.Int).Exp(big.NewInt(3), new(big.Int).Sub(n, big.NewInt(1)), n).Cmp(big.NewInt(1)) == 0
		}
		if !fermat(got) || !fermat(q) {
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
			k := &x25519Key{x: x25519.Key(unhex(t, tt.Private))}
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

// The standard library's keys, public values and secrets are the same.
func TestX25519EqualsStandard(t *testing.T) {
	for range 200 {
		x := make([]byte, 32)
		rand.Read(x)
		k, err := Generate(alg.KEX25519, bytes.NewReader(x))
		if err != nil {
			t.Fatal(err)
		}
		s, err := ecdh.X25519().NewPrivateKey(x)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := k.Public(), s.PublicKey().Bytes(); !bytes.Equal(got, want) {
			t.Fatalf("key %x: public value %x, want %x", x, got, want)
		}
		o, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		want, err := s.ECDH(o.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		if z, err := k.Shared(o.PublicKey().Bytes()); err != nil || !bytes.Equal(z.Bytes(), want) {
			t.Fatalf("key %x with %x: secret differs (%v)", x, o.PublicKey().Bytes(), err)
		}
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
		f.Add(uint16(ke), make([]byte, publicLens[ke]))
		f.Add(uint16(ke), response(f, keys[ke]))
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
		pub, z, err := Respond(alg.KE(ke), nil, peer)
		if (err == nil) != (z.Len() == sharedLens[alg.KE(ke)]) || (err == nil) != (len(pub) == responseLens(alg.KE(ke))) {
			t.Errorf("responder: secret of %d octets, value of %d, with error %v", z.Len(), len(pub), err)
		}
	})
}

func BenchmarkExchange(b *testing.B) {
	for _, ke := range alg.AllKE() {
		b.Run(ke.String(), func(b *testing.B) {
			for b.Loop() {
				k := generate(b, ke, nil)
				if _, err := k.Shared(response(b, k)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// RFC 7748, 6.2.
func TestX448Vector(t *testing.T) {
	alice := unhex(t, "9a8f4925d1519f5775cf46b04b5800d4ee9ee8bae8bc5565d498c28dd9c9baf574a9419744897391006382a6f127ab1d9ac2d8c0a598726b")
	bob := unhex(t, "3eb7a829b0cd20f5bcfc0b599b6feccf6da4627107bdb0d4f345b43027d8b972fc3e34fb4232a13ca706dcb57aec3dae07bdc1c67bf33609")
	k := generate(t, alg.KEX448, bytes.NewReader(alice))
	z, err := k.Shared(bob)
	if want := "07fff4181ac6cc95ec1c16a94a0f74d12da232ce40a77552281d282bb60c0b56fd2464c335543936521c24403085d59a449a5037514a879d"; err != nil || hex.EncodeToString(z.Bytes()) != want {
		t.Errorf("got %x, %v; want %s", z.Bytes(), err, want)
	}
	for _, low := range []byte{0, 1} {
		b := make([]byte, 56)
		b[0] = low
		if _, err := k.Shared(b); !errors.Is(err, ErrInvalidPublic) {
			t.Errorf("point %d of low order: got %v, want %v", low, err, ErrInvalidPublic)
		}
	}
}

// Keys from seeds, and ciphertexts under them, good and bad.
func TestWycheproofMLKEM768(t *testing.T) {
	for _, name := range []string{"mlkem_768_test.json"} {
		var v struct {
			TestGroups []struct {
				Type  string
				Tests []struct {
					TcID                            int
					Comment, Seed, Ek, C, K, Result string
				}
			}
		}
		load(t, "wycheproof/"+name, &v)
		used := 0
		for _, grp := range v.TestGroups {
			for _, tt := range grp.Tests {
				if tt.Seed == "" { // encapsulation with randomness of the test
					if _, _, err := Respond(alg.KEMLKEM768, nil, unhex(t, tt.Ek)); tt.Ek != "" && (err == nil) != (tt.Result == "valid") {
						t.Errorf("%d (%s): got %v, want %s", tt.TcID, tt.Comment, err, tt.Result)
					}
					continue
				}
				if len(tt.Seed) != 128 {
					continue // Generate takes as much as it needs
				}
				k, err := Generate(alg.KEMLKEM768, bytes.NewReader(unhex(t, tt.Seed)))
				if err != nil {
					if tt.Result == "valid" {
						t.Errorf("%d (%s): %v", tt.TcID, tt.Comment, err)
					}
					continue
				}
				used++
				if tt.Ek != "" && hex.EncodeToString(k.Public()) != tt.Ek {
					t.Errorf("%d (%s): another public key", tt.TcID, tt.Comment)
				}
				if tt.C == "" {
					continue
				}
				z, err := k.Shared(unhex(t, tt.C))
				switch {
				case (err == nil) != (tt.Result == "valid"):
					t.Errorf("%d (%s): got %v, want %s", tt.TcID, tt.Comment, err, tt.Result)
				case err == nil && hex.EncodeToString(z.Bytes()) != tt.K:
					t.Errorf("%d (%s): got %x, want %s", tt.TcID, tt.Comment, z.Bytes(), tt.K)
				}
			}
		}
		if used < 10 {
			t.Errorf("%s: %d vectors used", name, used)
		}
	}
}
