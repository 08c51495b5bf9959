package aead

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// RFC 7634, appendices A and B; RFC 3602, 4; RFC 3686, 6.
func TestRFC(t *testing.T) {
	var v struct {
		Tests []struct {
			RFC, Alg, Key, Salt, Nonce, IV, AAD, Plain, Out string
		}
	}
	load(t, "../testdata/rfc.json", &v)
	used := 0
	var s Scratch
	for _, tt := range v.Tests {
		su := suite{alg.EncrChaCha20Poly1305, 256, alg.IntegNone}
		switch tt.Alg {
		case "esp-chacha20-poly1305", "ikev2-chacha20-poly1305":
		case "aes-cbc":
			su = suite{alg.EncrAESCBC, 128, alg.IntegHMACSHA1}
		case "aes-ctr":
			su, tt.Salt = suite{alg.EncrAESCTR, len(tt.Key) * 4, alg.IntegHMACSHA1}, tt.Nonce
		default:
			continue
		}
		used++
		_, ak := su.keys(t, 1)
		c, err := New(su.e, ipsec.NewKey(unhex(t, tt.Key+tt.Salt)), su.a, ak)
		if err != nil {
			t.Fatal(err)
		}
		plain, want, iv, aad := unhex(t, tt.Plain), unhex(t, tt.Out), unhex(t, tt.IV), unhex(t, tt.AAD)
		got := make([]byte, len(plain)+c.ICVLen())
		if err := c.Seal(&s, got, aad, iv, plain, nil); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:len(want)], want) {
			t.Errorf("RFC %s %s: sealed %x, want %x", tt.RFC, tt.Alg, got[:len(want)], want)
		}
		back := make([]byte, len(plain))
		if err := c.Open(&s, back, aad, iv, got, nil); err != nil || !bytes.Equal(back, plain) {
			t.Errorf("RFC %s %s: opened %x, %v; want %x", tt.RFC, tt.Alg, back, err, plain)
		}
	}
	if used != 11 {
		t.Errorf("%d vectors used, want 11", used)
	}
}

type aeadVectors struct {
	TestGroups []struct {
		IVSize, KeySize, TagSize int
		Tests                    []struct {
			TcID                                        int
			Comment, Key, IV, AAD, Msg, Ct, Tag, Result string
		}
	}
}

// Wycheproof with nonces of 96 bits: the first four octets are the salt. A
// shorter tag of GCM is the longer one cut (NIST SP 800-38D, 7.1, step 6).
func TestWycheproof(t *testing.T) {
	var s Scratch
	for name, ciphers := range map[string][]alg.Encr{
		"aes_gcm":           {alg.EncrAESGCM16, alg.EncrAESGCM12, alg.EncrAESGCM8},
		"chacha20_poly1305": {alg.EncrChaCha20Poly1305},
	} {
		var v aeadVectors
		load(t, "../testdata/wycheproof/"+name+"_test.json", &v)
		used := 0
		for _, g := range v.TestGroups {
			if g.IVSize != 96 || g.TagSize != 128 {
				continue
			}
			for _, tt := range g.Tests {
				for _, e := range ciphers {
					used++
					nonce, tag := unhex(t, tt.IV), unhex(t, tt.Tag)
					c, err := New(e, ipsec.NewKey(append(unhex(t, tt.Key), nonce[:4]...)), alg.IntegNone, ipsec.Key{})
					if err != nil {
						t.Fatal(err)
					}
					plain, aad := unhex(t, tt.Msg), unhex(t, tt.AAD)
					whole := append(unhex(t, tt.Ct), tag[:c.ICVLen()]...)
					sealed := make([]byte, len(plain)+c.ICVLen())
					if err := c.Seal(&s, sealed, aad, nonce[4:], plain, nil); err != nil {
						t.Fatal(err)
					}
					valid := tt.Result == "valid"
					got := make([]byte, max(len(whole)-c.ICVLen(), 0))
					err = c.Open(&s, got, aad, nonce[4:], whole, nil)
					switch {
					case valid && (err != nil || !bytes.Equal(got, plain) || !bytes.Equal(sealed, whole)):
						t.Errorf("%v %d (%s): sealed %x, want %x; opened %x, %v; want %x", e, tt.TcID, tt.Comment, sealed, whole, got, err, plain)
					case !valid && bytes.Equal(sealed, whole):
						// The part of the tag that was altered is cut
						// off: with this tag length the message is valid.
						if e == alg.EncrAESGCM16 || e == alg.EncrChaCha20Poly1305 || err != nil {
							t.Errorf("%v %d (%s): sealed as a message that is invalid; opened: %v", e, tt.TcID, tt.Comment, err)
						}
					case !valid && err == nil:
						t.Errorf("%v %d (%s): opened, want it refused", e, tt.TcID, tt.Comment)
					}
				}
			}
		}
		if used < 300 {
			t.Errorf("%s: %d vectors used, want hundreds", name, used)
		}
	}
}

// The chaining alone; the padding of these vectors is PKCS #7, so only the
// valid ones have a plaintext to compare with.
func TestWycheproofCBC(t *testing.T) {
	var v aeadVectors
	load(t, "../testdata/wycheproof/aes_cbc_pkcs5_test.json", &v)
	var s Scratch
	used := 0
	for _, g := range v.TestGroups {
		for _, tt := range g.Tests {
			if tt.Result != "valid" {
				continue
			}
			used++
			_, ak := suite{alg.EncrAESCBC, g.KeySize, alg.IntegHMACSHA1}.keys(t, 1)
			c, err := New(alg.EncrAESCBC, ipsec.NewKey(unhex(t, tt.Key)), alg.IntegHMACSHA1, ak)
			if err != nil {
				t.Fatal(err)
			}
			plain, want := unhex(t, tt.Msg), unhex(t, tt.Ct)
			pad := len(want) - len(plain)
			plain = append(plain, bytes.Repeat([]byte{byte(pad)}, pad)...)
			got := make([]byte, len(plain)+c.ICVLen())
			if err := c.Seal(&s, got, nil, unhex(t, tt.IV), plain, nil); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got[:len(want)], want) {
				t.Errorf("%d: sealed %x, want %x", tt.TcID, got[:len(want)], want)
			}
			back := make([]byte, len(plain))
			if err := c.Open(&s, back, nil, unhex(t, tt.IV), got, nil); err != nil || !bytes.Equal(back, plain) {
				t.Errorf("%d: opened %x, %v; want %x", tt.TcID, back, err, plain)
			}
		}
	}
	if used < 50 {
		t.Errorf("%d vectors used, want 50", used)
	}
}

// IKE messages of another implementation: the aad is everything before the IV,
// and what opens ends with the pad length (RFC 7296, 3.14).
func TestCapturedIKE(t *testing.T) {
	var v struct {
		Tests []struct {
			Name, Integ, Message string
			EncrKey              string `json:"encr_key"`
			IntegKey             string `json:"integ_key"`
		}
	}
	load(t, "testdata/ike-captured.json", &v)
	var s Scratch
	for _, tt := range v.Tests {
		a := alg.IntegHMACSHA256
		if tt.Integ == "HMAC_SHA2_384_192" {
			a = alg.IntegHMACSHA384
		}
		c, err := New(alg.EncrAESCBC, ipsec.NewKey(unhex(t, tt.EncrKey)), a, ipsec.NewKey(unhex(t, tt.IntegKey)))
		if err != nil {
			t.Fatalf("%s: %v", tt.Name, err)
		}
		const header = 28 + 4 // IKE header, generic header of SK
		msg := unhex(t, tt.Message)
		aad, iv, ct := msg[:header], msg[header:header+16], msg[header+16:]
		plain := make([]byte, len(ct)-c.ICVLen())
		if err := c.Open(&s, plain, aad, iv, ct, nil); err != nil {
			t.Errorf("%s: %v", tt.Name, err)
			continue
		}
		if pad := int(plain[len(plain)-1]); pad >= len(plain) {
			t.Errorf("%s: pad length %d of %d octets", tt.Name, pad, len(plain))
		}
		again := make([]byte, len(ct))
		if err := c.Seal(&s, again, aad, iv, plain, nil); err != nil || !bytes.Equal(again, ct) {
			t.Errorf("%s: sealed again %x, %v; want %x", tt.Name, again, err, ct)
		}
	}
}

// ccmOf makes CCM of a key and nonce as the vectors have them: what is in front
// of the last eight octets of the nonce is the salt.
func ccmOf(t *testing.T, key, nonce []byte, tagLen int) *Cipher {
	t.Helper()
	k, err := newCCM(key, nonce[:len(nonce)-8], tagLen)
	if err != nil {
		t.Fatal(err)
	}
	return &Cipher{core: k, ivLen: 8, icvLen: tagLen, blockLen: 1, combined: true, counts: true}
}

// Wycheproof's CCM with nonces of 88 bits, which is RFC 4309's, and of 96 and 104.
func TestWycheproofCCM(t *testing.T) {
	var v aeadVectors
	load(t, "../testdata/wycheproof/aes_ccm_test.json", &v)
	var s Scratch
	used := map[int]int{}
	for _, g := range v.TestGroups {
		if g.IVSize != 88 && g.IVSize != 96 && g.IVSize != 104 || g.TagSize < 32 || g.TagSize%16 != 0 {
			continue // of other tags that they are invalid is all they say
		}
		for _, tt := range g.Tests {
			used[g.TagSize]++
			nonce := unhex(t, tt.IV)
			c := ccmOf(t, unhex(t, tt.Key), nonce, g.TagSize/8)
			plain, aad, whole := unhex(t, tt.Msg), unhex(t, tt.AAD), unhex(t, tt.Ct+tt.Tag)
			iv := nonce[len(nonce)-8:]
			if g.IVSize == 88 { // by the front door
				var err error
				if c, err = New(alg.EncrAESCCM16, ipsec.NewKey(append(unhex(t, tt.Key), nonce[:3]...)), alg.IntegNone, ipsec.Key{}); err != nil {
					t.Fatal(err)
				}
			}
			got := make([]byte, len(plain)+c.ICVLen())
			if err := c.Seal(&s, got, aad, iv, plain, nil); err != nil {
				t.Fatal(err)
			}
			back := make([]byte, max(len(whole)-c.ICVLen(), 0))
			err := c.Open(&s, back, aad, iv, whole, nil)
			if valid := tt.Result != "invalid"; valid && (err != nil || !bytes.Equal(back, plain) || !bytes.Equal(got, whole)) {
				t.Errorf("%d (%s): sealed %x, want %x; opened %x, %v; want %x", tt.TcID, tt.Comment, got, whole, back, err, plain)
			} else if !valid && err == nil {
				t.Errorf("%d (%s): opened, want it refused", tt.TcID, tt.Comment)
			}
		}
	}
	if used[64] == 0 || used[96] == 0 || used[128] < 200 {
		t.Errorf("vectors used, by bits of the tag: %v", used)
	}
}

// RFC 3610, 8, packet vectors 1 and 2, with a nonce of 13 octets, both
// computed again with an independent library before they were kept; and vectors
// of RFC 4309's nonce by that library, with every tag length and key length.
func TestVectorsCCM(t *testing.T) {
	var v struct {
		Tests []struct{ Name, Key, Nonce, AAD, Plain, Out string }
	}
	load(t, "testdata/ccm.json", &v)
	var s Scratch
	for _, tt := range v.Tests {
		plain, want, nonce, aad := unhex(t, tt.Plain), unhex(t, tt.Out), unhex(t, tt.Nonce), unhex(t, tt.AAD)
		tag := len(want) - len(plain)
		c := ccmOf(t, unhex(t, tt.Key), nonce, tag)
		if len(nonce) == 11 {
			e := map[int]alg.Encr{8: alg.EncrAESCCM8, 12: alg.EncrAESCCM12, 16: alg.EncrAESCCM16}[tag]
			var err error
			if c, err = New(e, ipsec.NewKey(append(unhex(t, tt.Key), nonce[:3]...)), alg.IntegNone, ipsec.Key{}); err != nil {
				t.Fatal(err)
			}
		}
		iv := nonce[len(nonce)-8:]
		got := make([]byte, len(want))
		if err := c.Seal(&s, got, aad, iv, plain, nil); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: sealed %x, %v; want %x", tt.Name, got, err, want)
		}
		back := make([]byte, len(plain))
		if err := c.Open(&s, back, aad, iv, want, nil); err != nil || !bytes.Equal(back, plain) {
			t.Errorf("%s: opened %x, %v; want %x", tt.Name, back, err, plain)
		}
	}
	if len(v.Tests) < 50 {
		t.Errorf("%d vectors", len(v.Tests))
	}
	// The longer form of the AAD's length (RFC 3610, 2.2).
	c := ccmOf(t, pattern(16, 0), make([]byte, 11), 16)
	got := make([]byte, 16)
	want := unhex(t, "f896ed0a471f7a9f8b60e13b0ee73777")
	if err := c.Seal(&s, got, bytes.Repeat([]byte{0x5a}, 70000), make([]byte, 8), nil, nil); err != nil || !bytes.Equal(got, want) {
		t.Errorf("AAD of 70000 octets: sealed %x, %v; want %x", got, err, want)
	}
}

// Wycheproof's GMAC: the tag over the parts of an AH packet; and NULL with GMAC,
// which covers the IV too, so only its valid vectors can be made.
func TestWycheproofGMAC(t *testing.T) {
	var v aeadVectors
	load(t, "../testdata/wycheproof/aes_gmac_test.json", &v)
	var s Scratch
	used := 0
	for _, g := range v.TestGroups {
		a, ok := map[int]alg.Integ{128: alg.IntegAESGMAC128, 192: alg.IntegAESGMAC192, 256: alg.IntegAESGMAC256}[g.KeySize]
		if g.IVSize != 96 || g.TagSize != 128 || !ok {
			continue
		}
		for _, tt := range g.Tests {
			used++
			nonce, msg := unhex(t, tt.IV), unhex(t, tt.Msg)
			m, err := NewGMAC(a, ipsec.NewKey(append(unhex(t, tt.Key), nonce[:4]...)))
			if err != nil {
				t.Fatal(err)
			}
			icv := unhex(t, tt.IV[8:]+tt.Tag)
			half := len(msg) / 2
			valid := tt.Result == "valid"
			if got := m.Verify(&s, icv, msg[:half], msg[half:]); got != valid {
				t.Errorf("%d (%s): verified %v, want %v", tt.TcID, tt.Comment, got, valid)
			}
			got := make([]byte, GMACLen)
			m.Sum(&s, got, binary.BigEndian.Uint64(nonce[4:]), msg[:half], msg[half:])
			if bytes.Equal(got, icv) != valid {
				t.Errorf("%d (%s): %x, want %x", tt.TcID, tt.Comment, got, icv)
			}
		}
	}
	if used < 50 {
		t.Errorf("%d vectors used, want more", used)
	}
}
