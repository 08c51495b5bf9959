package keymat

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
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

func wantKey(t *testing.T, what string, got ipsec.Key, want []byte) {
	t.Helper()
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%s: got %x, want %x", what, got.Bytes(), want)
	}
}

var prfByHash = map[string]alg.PRF{
	"SHA-1": alg.PRFHMACSHA1, "SHA-256": alg.PRFHMACSHA256, "SHA-384": alg.PRFHMACSHA384, "SHA-512": alg.PRFHMACSHA512,
}

// The vectors give prf+ of SKEYSEED as one string whose first octets are SK_d,
// and KEYMAT of children as strings; suites cut them into keys.
func TestVectors(t *testing.T) {
	var v struct {
		Tests []struct {
			In struct {
				HashAlg                                     string
				NInit, NResp, Gir, GirNew, SpiInit, SpiResp string
				DerivedKeyingMaterialLength                 string
			}
			Out struct {
				SKeySeed, DerivedKeyingMaterial, DerivedKeyingMaterialChild, DerivedKeyingMaterialDh, SKeySeedReKey string
			}
		}
	}
	b, err := os.ReadFile("testdata/ikev2-kdf.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Tests) != 20 {
		t.Fatalf("%d vectors, want 20", len(v.Tests))
	}
	for i, tt := range v.Tests {
		t.Run(fmt.Sprintf("%d %s", i, tt.In.HashAlg), func(t *testing.T) {
			p := prfByHash[tt.In.HashAlg]
			ni, nr := unhex(t, tt.In.NInit), unhex(t, tt.In.NResp)
			gir, girNew := ipsec.NewKey(unhex(t, tt.In.Gir)), ipsec.NewKey(unhex(t, tt.In.GirNew))
			spiI, err := strconv.ParseUint(tt.In.SpiInit, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			spiR, err := strconv.ParseUint(tt.In.SpiResp, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			bits, err := strconv.Atoi(tt.In.DerivedKeyingMaterialLength)
			if err != nil {
				t.Fatal(err)
			}

			seed, err := SKEYSEED(p, ni, nr, gir)
			if err != nil {
				t.Fatal(err)
			}
			wantKey(t, "SKEYSEED", seed, unhex(t, tt.Out.SKeySeed))

			all := unhex(t, tt.Out.DerivedKeyingMaterial)
			got, err := PRFPlus(p, seed.Bytes(), bits/8, ni, nr, unhex(t, tt.In.SpiInit+tt.In.SpiResp))
			if err != nil || !bytes.Equal(got, all) {
				t.Errorf("prf+: got %x, %v; want %x", got, err, all)
			}
			d := ipsec.NewKey(all[:p.Len()])

			for _, s := range []IKESuite{
				{p, alg.EncrAESCBC, 128, alg.IntegHMACSHA1},
				{p, alg.EncrAESGCM16, 128, alg.IntegNone},
			} {
				k, err := IKESA(s, seed, ni, nr, spiI, spiR)
				if err != nil {
					t.Fatal(err)
				}
				n, a := p.Len(), s.Integ.Info().KeyLen
				e, _ := s.Encr.KeyLen(s.EncrBits)
				rest := all
				for _, f := range []struct {
					name string
					key  ipsec.Key
					n    int
				}{{"SK_d", k.D, n}, {"SK_ai", k.AI, a}, {"SK_ar", k.AR, a}, {"SK_ei", k.EI, e}, {"SK_er", k.ER, e}, {"SK_pi", k.PI, n}, {"SK_pr", k.PR, n}} {
					n := min(f.n, len(rest))
					if f.key.Len() != f.n || n == 0 && f.n > 0 {
						t.Fatalf("%v %s: %d octets, want %d; %d of the vector left", s, f.name, f.key.Len(), f.n, len(rest))
					}
					wantKey(t, fmt.Sprint(s, " ", f.name), ipsec.NewKey(f.key.Bytes()[:n]), rest[:n])
					rest = rest[n:]
				}
			}

			for _, c := range []struct {
				what   string
				shared ipsec.Key
				want   string
			}{
				{"child SA", ipsec.Key{}, tt.Out.DerivedKeyingMaterialChild},
				{"child SA with key exchange", girNew, tt.Out.DerivedKeyingMaterialDh},
			} {
				want := unhex(t, c.want)
				for _, s := range []ChildSuite{
					{alg.EncrAESCBC, 128, alg.IntegHMACSHA1},
					{alg.EncrAESGCM16, 256, alg.IntegNone},
					{alg.EncrChaCha20Poly1305, 256, alg.IntegNone},
					{alg.EncrNULL, 0, alg.IntegHMACSHA256},
					{alg.EncrNone, 0, alg.IntegHMACSHA256},
				} {
					k, err := ChildSA(s, p, d, c.shared, ni, nr)
					if err != nil {
						t.Fatal(err)
					}
					e, _ := s.Encr.KeyLen(s.EncrBits)
					a := s.Integ.Info().KeyLen
					wantKey(t, c.what+" EncrI", k.EncrI, want[:e])
					wantKey(t, c.what+" IntegI", k.IntegI, want[e:e+a])
					wantKey(t, c.what+" EncrR", k.EncrR, want[e+a:2*e+a])
					wantKey(t, c.what+" IntegR", k.IntegR, want[2*e+a:2*e+2*a])
				}
			}

			re, err := RekeySKEYSEED(p, d, girNew, ni, nr)
			if err != nil {
				t.Fatal(err)
			}
			wantKey(t, "rekeyed SKEYSEED", re, unhex(t, tt.Out.SKeySeedReKey))
		})
	}
}

// Every key of the two structs is octets of its own: wiping them all, and
// wiping one, does what it says.
func TestWipe(t *testing.T) {
	one := ipsec.NewKey(bytes.Repeat([]byte{1}, 32))
	k, err := IKESA(IKESuite{alg.PRFHMACSHA256, alg.EncrAESCBC, 256, alg.IntegHMACSHA256}, one, []byte("Ni"), []byte("Nr"), 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	k.D.Wipe()
	keys := []ipsec.Key{k.AI, k.AR, k.EI, k.ER, k.PI, k.PR}
	for i, x := range keys {
		if bytes.Equal(x.Bytes(), make([]byte, x.Len())) {
			t.Errorf("key %d is zero after D.Wipe", i)
		}
	}
	k.Wipe()
	for i, x := range keys {
		if !bytes.Equal(x.Bytes(), make([]byte, x.Len())) {
			t.Errorf("key %d is not zero after Wipe", i)
		}
	}
	c, err := ChildSA(ChildSuite{alg.EncrAESCBC, 256, alg.IntegHMACSHA256}, alg.PRFHMACSHA256, one, ipsec.Key{}, []byte("Ni"), []byte("Nr"))
	if err != nil {
		t.Fatal(err)
	}
	c.EncrI.Wipe()
	for i, x := range []ipsec.Key{c.IntegI, c.EncrR, c.IntegR} {
		if bytes.Equal(x.Bytes(), make([]byte, x.Len())) {
			t.Errorf("child key %d is zero after EncrI.Wipe", i)
		}
	}
}

func TestRefused(t *testing.T) {
	k := ipsec.NewKey(make([]byte, 32))
	n := []byte("nonce")
	unsupported := func(what string, err error) {
		t.Helper()
		var e *UnsupportedError
		if !errors.As(err, &e) {
			t.Errorf("%s: got %v, want an UnsupportedError", what, err)
		}
	}
	const p = alg.PRFHMACSHA256
	for _, s := range []IKESuite{
		{alg.PRFNone, alg.EncrAESCBC, 128, alg.IntegHMACSHA1},
		{99, alg.EncrAESCBC, 128, alg.IntegHMACSHA1},
		{p, alg.EncrAESCBC, 127, alg.IntegHMACSHA1},
		{p, alg.EncrAESCBC, 0, alg.IntegHMACSHA1},
		{p, alg.EncrAESCBC, 128, alg.IntegNone},
		{p, alg.EncrAESCBC, 128, 99},
		{p, alg.EncrAESGCM16, 128, alg.IntegHMACSHA1},
		{p, 99, 128, alg.IntegHMACSHA1},
		{p, alg.EncrNULL, 0, alg.IntegNone},
		{p, alg.EncrAESGCM16IIV, 128, alg.IntegNone},
	} {
		_, err := IKESA(s, k, n, n, 1, 2)
		unsupported(fmt.Sprint("IKE SA ", s), err)
	}
	for _, s := range []ChildSuite{
		{alg.EncrAESCBC, 64, alg.IntegHMACSHA1},
		{alg.EncrNone, 0, alg.IntegNone},
		{alg.EncrNULL, 0, alg.IntegNone},
		{alg.EncrNULL, 128, alg.IntegHMACSHA1},
		{alg.EncrChaCha20Poly1305, 256, alg.IntegHMACSHA1},
	} {
		_, err := ChildSA(s, p, k, ipsec.Key{}, n, n)
		unsupported(fmt.Sprint("child SA ", s), err)
	}
	_, err := SKEYSEED(alg.PRFNone, n, n, k)
	unsupported("SKEYSEED", err)
	_, err = RekeySKEYSEED(alg.PRFNone, k, k, n, n)
	unsupported("RekeySKEYSEED", err)
	_, err = PSKAuth(alg.PRFNone, k, n)
	unsupported("PSKAuth", err)
	_, err = SignedOctets(alg.PRFNone, n, n, k, n, nil)
	unsupported("SignedOctets", err)
	_, err = PRFPlus(alg.PRFNone, n, 1)
	unsupported("PRFPlus", err)
}

func TestPRFPlusLength(t *testing.T) {
	key, seed := []byte("key"), []byte("seed")
	for _, p := range alg.AllPRF() {
		most := 255 * p.Len()
		long, err := PRFPlus(p, key, most, seed)
		if err != nil || len(long) != most {
			t.Fatalf("%v of %d octets: got %d octets, %v", p, most, len(long), err)
		}
		for _, n := range []int{0, 1, p.Len() - 1, p.Len(), p.Len() + 1, 3*p.Len() - 1} {
			b, err := PRFPlus(p, key, n, seed[:2], seed[2:])
			if err != nil || !bytes.Equal(b, long[:n]) {
				t.Errorf("%v of %d octets: got %x, %v; want %x", p, n, b, err, long[:n])
			}
		}
		for _, n := range []int{-1, most + 1} {
			if _, err := PRFPlus(p, key, n, seed); !errors.Is(err, ErrTooLong) {
				t.Errorf("%v of %d octets: got %v, want %v", p, n, err, ErrTooLong)
			}
		}
	}
}

// AUTH of a shared secret, step by step from the PRF.
func TestPSKAuth(t *testing.T) {
	for _, p := range alg.AllPRF() {
		skp := ipsec.NewKey(bytes.Repeat([]byte{7}, p.Len()))
		psk := ipsec.NewKey([]byte("correct horse"))
		msg, nonce, id := []byte("message"), []byte("nonce"), []byte("\x02\x00\x00\x00host")
		octets, err := SignedOctets(p, msg, nonce, skp, id, nil)
		if err != nil {
			t.Fatal(err)
		}
		mac, err := PRF(p, skp.Bytes(), id)
		if err != nil {
			t.Fatal(err)
		}
		if want := []byte("messagenonce" + string(mac)); !bytes.Equal(octets, want) {
			t.Errorf("%v: signed octets %x, want %x", p, octets, want)
		}
		got, err := PSKAuth(p, psk, octets)
		if err != nil {
			t.Fatal(err)
		}
		inner, err := PRF(p, psk.Bytes(), []byte("Key Pad "), []byte("for IKEv2"))
		if err != nil {
			t.Fatal(err)
		}
		want, err := PRF(p, inner, octets)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) || len(got) != p.Len() {
			t.Errorf("%v: AUTH %x, want %x", p, got, want)
		}
	}
}

// RFC 4434, 2.2, and RFC 4615, 4: keys of 16 octets, shorter and longer.
func TestBlockPRFVectors(t *testing.T) {
	const key = "000102030405060708090a0b0c0d0e0fedcb"
	msg := unhex(t, "000102030405060708090a0b0c0d0e0f10111213")
	for _, tt := range []struct {
		p   alg.PRF
		n   int // octets of key
		out string
	}{
		{alg.PRFAESXCBC, 16, "47f51b4564966215b8985c63055ed308"},
		{alg.PRFAESXCBC, 10, "0fa087af7d866e7653434e602fdde835"},
		{alg.PRFAESXCBC, 18, "8cd3c93ae598a9803006ffb67c40e9e4"},
		{alg.PRFAESCMAC, 18, "84a348a4a45d235babfffc0d2b4da09a"},
		{alg.PRFAESCMAC, 16, "980ae87b5f4c9c5214f5b6a8455e4c2d"},
		{alg.PRFAESCMAC, 10, "290d9e112edb09ee141fcf64c0b72f3d"},
	} {
		got, err := PRF(tt.p, unhex(t, key[:2*tt.n]), msg[:3], msg[3:])
		if err != nil || hex.EncodeToString(got) != tt.out {
			t.Errorf("%v, key of %d octets: got %x, %v; want %s", tt.p, tt.n, got, err, tt.out)
		}
	}
}

// RFC 7296, 2.14: with a PRF of AES the first 64 bits of each nonce are the key.
func TestBlockPRFSKEYSEED(t *testing.T) {
	ni, nr, z := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 20), ipsec.NewKey([]byte("g^ir"))
	for _, p := range []alg.PRF{alg.PRFAESXCBC, alg.PRFAESCMAC} {
		got, err := SKEYSEED(p, ni, nr, z)
		if err != nil {
			t.Fatal(err)
		}
		want, err := PRF(p, append(bytes.Repeat([]byte{1}, 8), bytes.Repeat([]byte{2}, 8)...), z.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		wantKey(t, p.String(), got, want)
	}
}

// Several key exchanges (RFC 9370, 2.2.4) and PPK (RFC 8784, 3), from the PRF.
func TestMoreSecrets(t *testing.T) {
	const p = alg.PRFHMACSHA256
	k := func(s string) ipsec.Key { return ipsec.NewKey([]byte(s)) }
	ni, nr := []byte("Ni"), []byte("Nr")
	seed, err := RekeySKEYSEED(p, k("SK_d"), k("SK0"), ni, nr, k("SK1"), k("SK2"))
	if err != nil {
		t.Fatal(err)
	}
	want, _ := PRF(p, []byte("SK_d"), []byte("SK0NiNrSK1SK2"))
	wantKey(t, "SKEYSEED", seed, want)
	c, err := ChildSA(ChildSuite{alg.EncrAESGCM16, 256, alg.IntegNone}, p, k("SK_d"), k("SK0"), ni, nr, k("SK1"))
	if err != nil {
		t.Fatal(err)
	}
	want, _ = PRFPlus(p, []byte("SK_d"), 72, []byte("SK0NiNrSK1"))
	wantKey(t, "KEYMAT, initiator", c.EncrI, want[:36])
	wantKey(t, "KEYMAT, responder", c.EncrR, want[36:])

	keys := &IKEKeys{D: k("dddddddddddddddddddddddddddddddd"), PI: k("iiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii"), PR: k("rrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrr"), EI: k("e")}
	if err := keys.MixPPK(p, k("the PPK")); err != nil {
		t.Fatal(err)
	}
	for what, x := range map[string]ipsec.Key{"d": keys.D, "i": keys.PI, "r": keys.PR} {
		want, _ := PRFPlus(p, []byte("the PPK"), 32, bytes.Repeat([]byte(what), 32))
		wantKey(t, "SK_"+what, x, want)
	}
	wantKey(t, "SK_ei", keys.EI, []byte("e"))
}
