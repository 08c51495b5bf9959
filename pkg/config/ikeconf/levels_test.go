package ikeconf

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/ike/proposal"
)

// TestLevels: what RFC 8247 says of an algorithm of the IKE SA is what the default
// offer, allow_weak and warnings make of it. Who adds an algorithm has to say which.
func TestLevels(t *testing.T) {
	type level uint8
	const (
		byDefault level = iota // MUST, SHOULD: in the default offer
		named                  // SHOULD, MAY: for xforms that name it
		warned                 // MUST-, MAY with a doubt: likewise, with a warning
		weak                   // SHOULD NOT, MUST NOT: only with allow_weak
	)
	offer := fmt.Sprint(proposal.OfferIKE(proposal.DefaultIKE(), nil).Proposals)
	of := map[string]bool{}
	for _, c := range []struct {
		key   string // of the xform
		words string
		wire  string // in the default offer, "" where it cannot be
		level level
	}{
		{"encr_alg", "aes", "AES_CBC-128 AES_CBC-256", byDefault}, // MUST
		{"encr_alg", "aes-gcm-16", "AES_GCM_16-128 AES_GCM_16-256", byDefault},
		{"encr_alg", "chacha20-poly1305", "CHACHA20_POLY1305", byDefault},
		{"encr_alg", "aes-ccm-8", "", named}, // SHOULD, for small devices
		{"encr_alg", "aes-ctr aes-gcm-8 aes-gcm-12 aes-ccm-12 aes-ccm-16", "", named},
		{"encr_alg", "3des", "", warned},                       // MAY
		{"encr_alg", "des blowfish", "", weak},                 // MUST NOT; not listed
		{"auth_alg", "sha256", "HMAC_SHA2_256_128", byDefault}, // MUST
		{"auth_alg", "sha384", "HMAC_SHA2_384_192", byDefault},
		{"auth_alg", "sha512", "HMAC_SHA2_512_256", byDefault}, // SHOULD
		{"auth_alg", "aes-xcbc aes-cmac", "", named},
		{"auth_alg", "sha1", "", warned},                  // MUST-
		{"auth_alg", "md5", "", weak},                     // MUST NOT
		{"prf", "sha256", "PRF_HMAC_SHA2_256", byDefault}, // MUST
		{"prf", "sha384", "PRF_HMAC_SHA2_384", byDefault},
		{"prf", "sha512", "PRF_HMAC_SHA2_512", byDefault}, // SHOULD+
		{"prf", "aes-xcbc aes-cmac", "", named},           // SHOULD, for small devices
		{"prf", "sha1", "", warned},                       // MUST-
		{"prf", "md5", "", weak},                          // MUST NOT
		{"dh_group", "modp2048", "MODP2048", byDefault},   // MUST
		{"dh_group", "ecp256", "ECP256", byDefault},       // SHOULD
		{"dh_group", "modp3072", "MODP3072", byDefault},
		{"dh_group", "modp4096", "MODP4096", byDefault},
		{"dh_group", "ecp384", "ECP384", byDefault},
		{"dh_group", "x25519", "CURVE25519", byDefault},
		{"dh_group", "ml-kem-768", "ML_KEM_768", byDefault},
		{"dh_group", "modp6144 modp8192 ecp521 x448 brainpoolp224r1 brainpoolp256r1 brainpoolp384r1 brainpoolp512r1 ml-kem-512 ml-kem-1024", "", named},
		{"dh_group", "ecp192 ecp224", "", warned},
		{"dh_group", "modp768 modp1024 modp1536 modp1024s160 modp2048s224 modp2048s256", "", weak}, // MUST NOT and SHOULD NOT
	} {
		for _, w := range strings.Fields(c.wire) {
			if !strings.Contains(offer, w) {
				t.Errorf("%s %s: the default offer lacks %s: %s", c.key, c.words, w, offer)
			}
		}
		if (c.wire != "") != (c.level == byDefault) {
			t.Errorf("%s %s: in the default offer as %q, level %d", c.key, c.words, c.wire, c.level)
		}
		for _, w := range strings.Fields(c.words) {
			of[c.key+" "+w] = true
			parts := map[string]string{"encr_alg": "aes", "auth_alg": "sha256", "prf": "sha256", "dh_group": "14"}
			parts[c.key] = w
			if cipherTable[parts["encr_alg"]].aead {
				delete(parts, "auth_alg")
			}
			x := ""
			for k, v := range parts {
				x += k + " " + v + " "
			}
			for _, allow := range []bool{false, true} {
				conf := `{ label "a" auth_method preshared remote_addr 10.0.0.2 ikesa_xform { ` + x + "} }"
				if allow {
					conf = "allow_weak yes " + conf
				}
				_, ds := Parse(files(conf, someKey), "ike.conf", "ike.secrets", "")
				want := fmt.Sprintf("%s %q: weak; needs allow_weak yes", c.key, w)
				if got := Failed(ds); got != (c.level == weak && !allow) || got && !strings.Contains(fmt.Sprint(ds), want) {
					t.Errorf("%s\n%v", conf, ds)
				}
				if got := strings.Contains(fmt.Sprint(ds), "is legacy"); got != (c.level == warned) {
					t.Errorf("%s\n%v; want a warning: %v", conf, ds, c.level == warned)
				}
			}
		}
	}
	all := []string{}
	for a := range cipherTable {
		all = append(all, "encr_alg "+a)
	}
	for a := range hashTable {
		all = append(all, "auth_alg "+a, "prf "+a)
	}
	for _, names := range groupNames {
		all = append(all, "dh_group "+names[0])
	}
	for _, a := range all {
		if !of[a] {
			t.Errorf("%s: no level", a)
		}
	}
	for _, in := range []string{"childsa_pfs 2", "childsa_pfs ike, modp1536", "childsa_additional_ke 24, none"} {
		_, ds := Parse(files(in+` { label "a" auth_method preshared remote_addr 10.0.0.2 }`, someKey), "ike.conf", "ike.secrets", "")
		if !Failed(ds) || !strings.Contains(fmt.Sprint(ds), "weak; needs allow_weak yes") {
			t.Errorf("%s: %v", in, ds)
		}
	}
}

// TestManPage: ike.conf(5) has every word of the language.
func TestManPage(t *testing.T) {
	b, err := os.ReadFile("../../../cmd/ike/ike.conf.5")
	if err != nil {
		t.Fatal(err)
	}
	words := strings.FieldsFunc(strings.ReplaceAll(string(b), `\-`, "-"), func(r rune) bool {
		return !(r == '_' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9')
	})
	for _, w := range known {
		if p2, ok := strings.CutPrefix(w, "p2_"); ok && slices.Contains(words, "childsa_"+p2) {
			continue // told of all of them
		}
		if !slices.Contains(words, w) {
			t.Errorf("%s: not in ike.conf(5)", w)
		}
	}
}
