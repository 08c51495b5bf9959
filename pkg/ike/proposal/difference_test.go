package proposal

import (
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/proto/ikev2"
)

func TestDifference(t *testing.T) {
	gcm := []Cipher{{alg.EncrAESGCM16, 256}}
	prf := []alg.PRF{alg.PRFHMACSHA256}
	ke := []alg.KE{alg.KEX25519, alg.KEECP256}
	ours := []IKE{{Ciphers: gcm, PRF: prf, KE: ke}}
	cbc := []Cipher{{alg.EncrAESCBC, 128}}
	ike := func(p ...IKE) []ikev2.Proposal { return OfferIKE(p, nil).Proposals }
	for _, tt := range []struct {
		name         string
		ours, theirs []ikev2.Proposal
		want         string
	}{
		{"group", ike(ours...), ike(IKE{Ciphers: gcm, PRF: prf, KE: []alg.KE{2}}), `peer offers modp1024 only; rule "gate" wants x25519, ecp256`},
		{"cipher", ike(ours...), ike(IKE{Ciphers: []Cipher{{alg.EncrAESGCM16, 128}}, PRF: prf, KE: ke}), `peer offers aes-gcm-16-128 only; rule "gate" wants aes-gcm-16-256`},
		{"the nearest of several", ike(ours...), ike(IKE{Ciphers: cbc, Integ: sha2, PRF: prf, KE: []alg.KE{2}}, IKE{Ciphers: gcm, PRF: prf, KE: []alg.KE{2}}),
			`peer offers modp1024 only; rule "gate" wants x25519, ecp256`},
		{"PRF missing", ike(ours...), ike(IKE{Ciphers: gcm, KE: ke}), `peer offers no PRF; rule "gate" wants prf-hmac-sha2-256`},
		{"another type", ike(ours...), []ikev2.Proposal{{Number: 1, Protocol: ikev2.ProtocolIKE, Transforms: append(ike(ours...)[0].Transforms, ikev2.NewTransform(ikev2.TransformADDKE1, ikev2.KEML_KEM_768, 0))}},
			`peer offers only with addke1:ml-kem-768; rule "gate" has no ADDKE1`},
		{"protocol", ike(ours...), OfferChild([]Child{{AH: true, Integ: sha2, ESN: []bool{false}}}, 1, true).Proposals, `peer offers AH; rule "gate" wants IKE`},
		{"nothing", ike(ours...), nil, `peer offers nothing; rule "gate" wants IKE`},
	} {
		if got := Difference(`rule "gate"`, tt.ours, tt.theirs); got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

// What a stranger offers costs little time and room, however much it is.
func TestMismatchIsBounded(t *testing.T) {
	var theirs []ikev2.Proposal
	for range 255 {
		p := ikev2.Proposal{Number: 1, Protocol: ikev2.ProtocolIKE}
		for id := range uint16(255) {
			p.Transforms = append(p.Transforms, ikev2.NewTransform(ikev2.TransformKE, ikev2.KEID(1000+id), 0))
		}
		theirs = append(theirs, p)
	}
	s, took := "", time.Hour
	for range 5 { // a busy machine takes its time
		start := time.Now()
		s = (&Mismatch{Ours: OfferIKE(DefaultIKE(), nil).Proposals, Theirs: theirs}).Error()
		if took = min(took, time.Since(start)); took < 2*time.Second {
			break
		}
	}
	if len(s) > 8000 || took > 2*time.Second {
		t.Errorf("%d octets, %v", len(s), took)
	}
	if !strings.HasPrefix(s, "no proposal chosen: peer offers no cipher") {
		t.Errorf("got %.100s", s)
	}
}
