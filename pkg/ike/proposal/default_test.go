package proposal

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/proto/ikev2"
)

// What goes over the wire when nothing is configured, octet by octet: a change of
// it is one of what we agree on with everybody.
func TestDefaultOffers(t *testing.T) {
	const (
		gcm = "0300000c 01000014 800e0100" + "03000008 0100001c" + "0300000c 01000014 800e0080" // AES-GCM-16-256, ChaCha20-Poly1305, AES-GCM-16-128
		cbc = "0300000c 0100000c 800e0100" + "0300000c 0100000c 800e00c0" + "0300000c 0100000c 800e0080"
		mac = "03000008 0300000c" + "03000008 0300000d" + "03000008 0300000e" // HMAC-SHA-256-128, 384-192, 512-256
		prf = "03000008 02000005" + "03000008 02000006" + "03000008 02000007"
		ke  = "03000008 0400001f" + "03000008 04000013" + "03000008 04000014" + // x25519, ecp256, ecp384
			"03000008 0400000e" + "03000008 0400000f" // modp2048, modp3072
		modp4096 = "04000010"
		esn      = "03000008 05000001" + "00000008 05000000"
	)
	for _, tt := range []struct {
		name string
		sa   *ikev2.SA
		want string
	}{
		{"IKE SA", OfferIKE(DefaultIKE(), nil), "00000178" +
			"02000078 0101000d" + gcm + prf + ke + "03000008" + modp4096 + "00000008 06000024" + // ADDKE1: ML-KEM-768
			"02000070 0201000c" + gcm + prf + ke + "00000008" + modp4096 +
			"0000008c 0301000f" + cbc + mac + prf + ke + "00000008" + modp4096},
		{"child SA", OfferChild(WithKE(ForChild(nil, []alg.KE{KESame, alg.KENone}, ESNPrefer), alg.KEX25519), 0xc0ffee11, true), "00000098" +
			"0200003c 01030405 c0ffee11" + gcm + esn +
			"00000058 02030408 c0ffee11" + cbc + mac + esn},
	} {
		b, err := (&ikev2.Message{Payloads: []ikev2.Payload{tt.sa}}).Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		want, err := hex.DecodeString(strings.ReplaceAll(tt.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if got := b[ikev2HeaderLen:]; !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%x, want\n%x", tt.name, got, want)
		}
	}
}

const ikev2HeaderLen = 28
