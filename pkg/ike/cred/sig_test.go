package cred

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/proto/ikev2"
	"golang.org/x/crypto/cryptobyte"
)

var all = []ikev2.HashID{ikev2.HashSHA256, ikev2.HashSHA384, ikev2.HashSHA512, ikev2.HashIdentity}

// The AlgorithmIdentifiers as RFC 7427, appendix A, and RFC 8420, appendix A,
// print them.
func TestIdentifiers(t *testing.T) {
	for _, tt := range []struct {
		s    scheme
		want string
	}{
		{scheme{key: RSA, hash: ikev2.HashSHA1}, "300d06092a864886f70d0101050500"},
		{scheme{key: RSA, hash: ikev2.HashSHA256}, "300d06092a864886f70d01010b0500"},
		{scheme{key: RSA, hash: ikev2.HashSHA384}, "300d06092a864886f70d01010c0500"},
		{scheme{key: RSA, hash: ikev2.HashSHA512}, "300d06092a864886f70d01010d0500"},
		{scheme{key: ECDSA, hash: ikev2.HashSHA1}, "300906072a8648ce3d0401"},
		{scheme{key: ECDSA, hash: ikev2.HashSHA256}, "300a06082a8648ce3d040302"},
		{scheme{key: ECDSA, hash: ikev2.HashSHA384}, "300a06082a8648ce3d040303"},
		{scheme{key: ECDSA, hash: ikev2.HashSHA512}, "300a06082a8648ce3d040304"},
		{scheme{key: RSA, hash: ikev2.HashSHA256, pss: true, salt: 32}, "304106092a864886f70d01010a3034" +
			"a00f300d06096086480165030402010500" + "a11c301a06092a864886f70d010108300d06096086480165030402010500" + "a203020120"},
		{scheme{key: EdDSA, hash: ikev2.HashIdentity}, "300506032b6570"},
	} {
		var b cryptobyte.Builder
		tt.s.appendIdentifier(&b)
		if got := hex.EncodeToString(b.BytesOrPanic()); got != tt.want {
			t.Errorf("%v\ngot  %s\nwant %s", tt.s, got, tt.want)
		}
		data := append([]byte{byte(len(tt.want) / 2)}, unhex(t, tt.want)...)
		s, sig, err := parseSignature(append(data, "sig"...))
		if err != nil || s != tt.s || string(sig) != "sig" {
			t.Errorf("parsed: got %+v %q %v, want %+v", s, sig, err, tt.s)
		}
		for i := range data {
			if s, sig, err := parseSignature(data[:i]); err == nil {
				t.Errorf("%v cut to %d octets: %v, %x", tt.s, i, s, sig)
			}
		}
	}
	// Defaults of RSASSA-PSS are SHA-1 and 20 octets; parameters of other forms
	// and what does not belong together is refused.
	for in, want := range map[string]string{
		"300d06092a864886f70d01010a3000":                                       "",
		"301206092a864886f70d01010a3005a203020114":                             "",
		"300b06092a864886f70d01010a":                                           "form",
		"301206092a864886f70d01010a3005a2030201ff":                             "form",
		"301206092a864886f70d01010a3005a303020102":                             "form",
		"302006092a864886f70d01010a3013a011300f060960864801650304020105000500": "form",
		"301e06092a864886f70d01010a3011a00f300d06096086480165030402010500":     "MGF1 with SHA1 is not supported",
		"300706052b0e03021a":                                                   "1.3.14.3.2.26 is not supported",
		"300706032b65700500":                                                   "form",
		"300c06082a8648ce3d0403020101":                                         "form",
	} {
		b := unhex(t, in)
		_, _, err := parseSignature(append([]byte{byte(len(b))}, b...))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", in, err, want)
		}
	}
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Every method and hash: made, verified, and refused when anything is changed or
// the other side's policy does not take it.
func TestSignatures(t *testing.T) {
	octets := []byte("octets of IKE_SA_INIT, nonce, prf(SK_p, ID)")
	one := func(h ikev2.HashID) []ikev2.HashID { return []ikev2.HashID{h} }
	for _, tt := range []struct {
		kind      string
		p         Policy
		announced []ikev2.HashID
		method    ikev2.AuthMethod
		scheme    string // of method 14
	}{
		{"rsa2048", Policy{Hashes: all}, all, 14, "RSASSA-PSS with SHA2_256"},
		{"rsa2048", Policy{Hashes: all, PSS: PSSNo}, all, 14, "RSASSA-PKCS1-v1_5 with SHA2_256"},
		{"rsa2048", Policy{Hashes: all, PSS: PSSRequire}, one(ikev2.HashSHA512), 14, "RSASSA-PSS with SHA2_512"},
		{"rsa2048", Policy{Hashes: one(ikev2.HashSHA384)}, all, 14, "RSASSA-PSS with SHA2_384"},
		{"rsa2048", Policy{Hashes: append(one(ikev2.HashSHA1), all...)}, nil, 1, ""},
		{"p256", Policy{Hashes: all}, all, 14, "ECDSA with SHA2_256"},
		{"p256", Policy{Hashes: all}, one(ikev2.HashSHA512), 14, "ECDSA with SHA2_512"},
		{"p384", Policy{Hashes: all}, all, 14, "ECDSA with SHA2_384"},
		{"p521", Policy{Hashes: all}, all, 14, "ECDSA with SHA2_512"},
		{"p256", Policy{Hashes: all}, nil, 9, ""},
		{"p384", Policy{Hashes: all}, nil, 10, ""},
		{"p521", Policy{Hashes: all}, nil, 11, ""},
		{"ed25519", Policy{Hashes: all}, all, 14, "Ed25519"},
	} {
		key := credtest.Key(tt.kind, 0)
		a, err := tt.p.sign(key, tt.announced, octets)
		if err != nil || a.Method != tt.method {
			t.Errorf("%s: got %+v, %v; want method %v", tt.kind, a, err, tt.method)
			continue
		}
		if tt.scheme != "" {
			if s, _, err := parseSignature(a.Data); err != nil || s.String() != tt.scheme {
				t.Errorf("%s: got %v, %v; want %s", tt.kind, s, err, tt.scheme)
			}
		}
		taker := Policy{Hashes: append(one(ikev2.HashSHA1), all...)}
		if err := taker.verify(key.Public(), a, octets); err != nil {
			t.Errorf("%s %s: %v", tt.kind, tt.scheme, err)
		}
		for name, x := range map[string]*ikev2.Auth{
			"signature": {Method: a.Method, Data: append(a.Data[:len(a.Data)-1:len(a.Data)-1], a.Data[len(a.Data)-1]^1)},
			"length":    {Method: a.Method, Data: append(slices.Clone(a.Data), 0)},
			"cut":       {Method: a.Method, Data: a.Data[:len(a.Data)-1]},
			"empty":     {Method: a.Method},
			"PSK":       {Method: ikev2.AuthPSK, Data: a.Data},
			"DSS":       {Method: ikev2.AuthDSS, Data: a.Data},
		} {
			if taker.verify(key.Public(), x, octets) == nil {
				t.Errorf("%s %s: verifies with another %s", tt.kind, tt.scheme, name)
			}
		}
		if taker.verify(key.Public(), a, append(octets, 0)) == nil || taker.verify(credtest.Key(tt.kind, 1).Public(), a, octets) == nil {
			t.Errorf("%s %s: verifies with other octets or key", tt.kind, tt.scheme)
		}
		if err := (Policy{}).verify(key.Public(), a, octets); err == nil || !strings.Contains(err.Error(), "sig_hash allows") {
			t.Errorf("%s %s: a hash that is not allowed: %v", tt.kind, tt.scheme, err)
		}
		if tt.kind == "rsa2048" && !strings.Contains(tt.scheme, "PSS") {
			if err := (Policy{Hashes: taker.Hashes, PSS: PSSRequire}).verify(key.Public(), a, octets); err == nil || !strings.Contains(err.Error(), "rsa_pss is require") {
				t.Errorf("PKCS #1 where PSS is required: %v", err)
			}
		}
	}
}

// What cannot be signed for a peer.
func TestNoMethod(t *testing.T) {
	for _, tt := range []struct {
		kind      string
		p         Policy
		announced []ikev2.HashID
		want      string
	}{
		{"rsa2048", Policy{Hashes: all}, []ikev2.HashID{ikev2.HashSHA1}, "peer can verify [SHA1] only; our RSA key may use [SHA2_256"},
		{"rsa2048", Policy{Hashes: all}, []ikev2.HashID{}, "peer can verify [] only"},
		{"ed25519", Policy{Hashes: all}, all[:3], "our Ed25519 key may use"},
		{"p256", Policy{Hashes: []ikev2.HashID{ikev2.HashIdentity}}, all, "our ECDSA key may use [IDENTITY]"},
		{"rsa1024", Policy{Hashes: all}, all, "RSA key of 1024 bits: want at least 2048"},
		{"p224", Policy{Hashes: all}, all, "ECDSA key on P-224"},
	} {
		if a, err := tt.p.sign(credtest.Key(tt.kind, 0), tt.announced, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, %v; want %q", tt.kind, a, err, tt.want)
		}
	}
	weak := Policy{Hashes: all, Weak: true}
	if _, err := weak.sign(credtest.Key("rsa1024", 0), all, nil); err != nil {
		t.Errorf("1024 bits where that is allowed: %v", err)
	}
	ec := credtest.Key("p256", 0).Public()
	for m, want := range map[ikev2.AuthMethod]string{ikev2.AuthRSA: "with an ECDSA key", ikev2.AuthECDSA384: "with another key"} {
		if err := weak.verify(ec, &ikev2.Auth{Method: m, Data: make([]byte, 64)}, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("method %v: %v", m, err)
		}
	}
	sig, err := weak.sign(credtest.Key("ed25519", 0), all, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := weak.verify(ec, sig, nil); err == nil || err.Error() != "signed by Ed25519, but the certificate has an ECDSA key" {
		t.Errorf("another kind of key: %v", err)
	}
}

func TestHashes(t *testing.T) {
	b := AppendHashes(nil, all)
	if !bytes.Equal(b, []byte{0, 2, 0, 3, 0, 4, 0, 5}) {
		t.Errorf("%x", b)
	}
	if hs, err := ParseHashes(append(b, 0, 99)); err != nil || len(hs) != 5 || hs[4] != 99 {
		t.Errorf("%v, %v", hs, err)
	}
	if hs, err := ParseHashes(nil); err != nil || hs == nil {
		t.Errorf("none: %v, %v", hs, err)
	}
	if _, err := ParseHashes(b[:3]); err == nil {
		t.Error("odd length passes")
	}
}

// Project Wycheproof's signatures through our forms of them.
func TestWycheproof(t *testing.T) {
	for _, f := range []struct {
		file string
		s    scheme
		used int
	}{
		{"ecdsa_secp256r1_sha256", scheme{key: ECDSA, hash: ikev2.HashSHA256}, 400},
		{"ed25519", scheme{key: EdDSA, hash: ikev2.HashIdentity}, 140},
		{"rsa_pss_2048_sha256_mgf1_32", scheme{key: RSA, hash: ikev2.HashSHA256, pss: true, salt: 32}, 100},
		{"rsa_signature_2048_sha256", scheme{key: RSA, hash: ikev2.HashSHA256}, 200},
	} {
		var v struct {
			TestGroups []struct {
				PublicKeyDer string
				Tests        []struct {
					TcID             int
					Msg, Sig, Result string
				}
			}
		}
		b, err := os.ReadFile("testdata/wycheproof/" + f.file + "_test.json")
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, g := range v.TestGroups {
			pub, err := x509.ParsePKIXPublicKey(unhex(t, g.PublicKeyDer))
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range g.Tests {
				if c.Result == "acceptable" {
					continue
				}
				n++
				err := verifyAs(pub, f.s, unhex(t, c.Msg), unhex(t, c.Sig))
				if (err == nil) != (c.Result == "valid") {
					t.Errorf("%s %d: %v, want %s", f.file, c.TcID, err, c.Result)
				}
			}
		}
		if n < f.used {
			t.Errorf("%s: %d vectors used, want at least %d", f.file, n, f.used)
		}
	}
}

// verifyAs puts a signature into method 14.
func verifyAs(pub crypto.PublicKey, s scheme, msg, sig []byte) error {
	var b cryptobyte.Builder
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { s.appendIdentifier(b) })
	b.AddBytes(sig)
	return Policy{Hashes: all}.verify(pub, &ikev2.Auth{Method: ikev2.AuthSignature, Data: b.BytesOrPanic()}, msg)
}

// The two forms of ECDSA signatures, with short r and s.
func TestECDSAForms(t *testing.T) {
	c := credtest.Key("p521", 0).Public().(*ecdsa.PublicKey).Curve
	for _, tt := range []string{"3006020101020102", "30080202008002020081"} {
		flat, err := concatenated(c, unhex(t, tt))
		if err != nil || len(flat) != 132 {
			t.Fatalf("%s: %x, %v", tt, flat, err)
		}
		if back, err := inDER(c, flat); err != nil || hex.EncodeToString(back) != tt {
			t.Errorf("%s: came back as %x, %v", tt, back, err)
		}
	}
	if _, err := inDER(c, make([]byte, 131)); err == nil {
		t.Error("131 octets for P-521 pass")
	}
	if _, err := concatenated(c, []byte{0x30}); err == nil {
		t.Error("no DER passes")
	}
}

// FuzzSignature: the data of AUTH payloads of every method. Nothing panics, nothing
// verifies, and what parses is written as it was, or in the form of the RFC.
func FuzzSignature(f *testing.F) {
	octets := []byte("octets")
	var pubs []crypto.PublicKey
	for _, k := range []string{"rsa2048", "p256", "p521", "ed25519"} {
		key := credtest.Key(k, 0)
		pubs = append(pubs, key.Public())
		for _, p := range []Policy{{Hashes: all}, {Hashes: all, PSS: PSSNo}} {
			a, err := p.sign(key, all, []byte("others"))
			if err != nil {
				f.Fatal(err)
			}
			f.Add(uint8(a.Method), a.Data)
		}
	}
	f.Add(uint8(ikev2.AuthECDSA256), make([]byte, 64))
	f.Add(uint8(ikev2.AuthRSA), make([]byte, 256))
	f.Fuzz(func(t *testing.T, m uint8, data []byte) {
		for _, pub := range pubs {
			if err := (Policy{Hashes: all}).verify(pub, &ikev2.Auth{Method: ikev2.AuthMethod(m), Data: data}, octets); err == nil {
				t.Fatalf("verifies")
			}
		}
		s, sig, err := parseSignature(data)
		if err != nil {
			return
		}
		var b cryptobyte.Builder
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { s.appendIdentifier(b) })
		b.AddBytes(sig)
		out, err := b.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		if s2, sig2, err := parseSignature(out); err != nil || s2 != s || !bytes.Equal(sig, sig2) {
			t.Errorf("%x: %v, again %v, %v", data, s, s2, err)
		}
	})
}
