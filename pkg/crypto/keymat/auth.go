package keymat

import (
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// keyPad is the 17 ASCII characters of RFC 7296, 2.15, without a null.
const keyPad = "Key Pad for IKEv2"

// SignedOctets returns what AUTH covers (RFC 7296, 2.15): the signer's own
// first message | the other side's nonce | prf(SK_p, ID'), where message is
// the whole IKE_SA_INIT message as sent, nonce is without payload header, skp
// is SK_pi for the initiator's AUTH and SK_pr for the responder's, and id is
// the body of the signer's ID payload after the generic header: type, three
// reserved octets, data. intAuth is empty, or what IKE_INTERMEDIATE exchanges add
// at the end (RFC 9242, 3.3.1). The error is an *UnsupportedError.
func SignedOctets(p alg.PRF, message, nonce []byte, skp ipsec.Key, id, intAuth []byte) ([]byte, error) {
	mac, err := PRF(p, skp.Bytes(), id)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, len(message)+len(nonce)+len(mac)+len(intAuth))
	b = append(b, message...)
	b = append(b, nonce...)
	b = append(b, mac...)
	return append(b, intAuth...), nil
}

// PSKAuth computes the AUTH data of a shared secret: prf(prf(psk, "Key Pad for
// IKEv2"), octets) (RFC 7296, 2.15), where octets come from SignedOctets. The
// same formula serves the key of an EAP method in place of psk (2.16). The
// receiver compares in constant time. The error is an *UnsupportedError.
func PSKAuth(p alg.PRF, psk ipsec.Key, octets []byte) ([]byte, error) {
	k, err := PRF(p, psk.Bytes(), []byte(keyPad))
	if err != nil {
		return nil, err
	}
	defer clear(k)
	return PRF(p, k, octets)
}
