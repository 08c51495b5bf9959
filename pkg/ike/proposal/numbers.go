package proposal

import (
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/proto/ikev2"
)

// The boundary between our algorithm identities and IKE's numbers. Key
// exchange methods need no table: alg.KE has the numbers of the registry. Legacy
// algorithms have no number here, since they are never negotiated, but for triple
// DES, which an IKE SA may have (RFC 8247, 2.1) and a child SA has not.

var encrIDs = map[alg.Encr]ikev2.EncrID{
	alg.EncrNULL:                ikev2.EncrNULL,
	alg.EncrAESCBC:              ikev2.EncrAES_CBC,
	alg.EncrAESGCM8:             ikev2.EncrAES_GCM_8,
	alg.EncrAESGCM12:            ikev2.EncrAES_GCM_12,
	alg.EncrAESGCM16:            ikev2.EncrAES_GCM_16,
	alg.EncrChaCha20Poly1305:    ikev2.EncrCHACHA20_POLY1305,
	alg.EncrAESCTR:              ikev2.EncrAES_CTR,
	alg.EncrAESCCM8:             ikev2.EncrAES_CCM_8,
	alg.EncrAESCCM12:            ikev2.EncrAES_CCM_12,
	alg.EncrAESCCM16:            ikev2.EncrAES_CCM_16,
	alg.EncrNULLAESGMAC:         ikev2.EncrNULL_AUTH_AES_GMAC,
	alg.EncrAESCCM8IIV:          ikev2.EncrAES_CCM_8_IIV,
	alg.EncrAESGCM16IIV:         ikev2.EncrAES_GCM_16_IIV,
	alg.EncrChaCha20Poly1305IIV: ikev2.EncrCHACHA20_POLY1305_IIV,
	alg.Encr3DESCBC:             ikev2.Encr3DES,
}

var integIDs = map[alg.Integ]ikev2.IntegID{
	alg.IntegNone:       ikev2.IntegNone,
	alg.IntegHMACSHA1:   ikev2.IntegHMAC_SHA1_96,
	alg.IntegHMACSHA256: ikev2.IntegHMAC_SHA2_256_128,
	alg.IntegHMACSHA384: ikev2.IntegHMAC_SHA2_384_192,
	alg.IntegHMACSHA512: ikev2.IntegHMAC_SHA2_512_256,
	alg.IntegAESXCBC:    ikev2.IntegAES_XCBC_96,
	alg.IntegAESCMAC:    ikev2.IntegAES_CMAC_96,
	alg.IntegAESGMAC128: ikev2.IntegAES_128_GMAC,
	alg.IntegAESGMAC192: ikev2.IntegAES_192_GMAC,
	alg.IntegAESGMAC256: ikev2.IntegAES_256_GMAC,
}

var prfIDs = map[alg.PRF]ikev2.PRFID{
	alg.PRFHMACSHA1:   ikev2.PRFHMAC_SHA1,
	alg.PRFHMACSHA256: ikev2.PRFHMAC_SHA2_256,
	alg.PRFHMACSHA384: ikev2.PRFHMAC_SHA2_384,
	alg.PRFHMACSHA512: ikev2.PRFHMAC_SHA2_512,
	alg.PRFAESXCBC:    ikev2.PRFAES128_XCBC,
	alg.PRFAESCMAC:    ikev2.PRFAES128_CMAC,
}

// sizedByAttribute lists the ciphers whose transform carries a key length
// attribute (RFC 7296, 3.3.5); for the others it must be absent.
var sizedByAttribute = map[alg.Encr]bool{
	alg.EncrAESCBC: true, alg.EncrAESGCM8: true, alg.EncrAESGCM12: true, alg.EncrAESGCM16: true,
	alg.EncrAESCTR: true, alg.EncrAESCCM8: true, alg.EncrAESCCM12: true, alg.EncrAESCCM16: true, alg.EncrNULLAESGMAC: true,
	alg.EncrAESCCM8IIV: true, alg.EncrAESGCM16IIV: true,
}

// EncrTransform makes the ENCR transform of a cipher with a key of bits.
func EncrTransform(c Cipher) ikev2.Transform {
	bits := c.Bits
	if !sizedByAttribute[c.Encr] {
		bits = 0
	}
	return ikev2.NewTransform(ikev2.TransformENCR, encrIDs[c.Encr], bits)
}

// IntegTransform makes the INTEG transform of a.
func IntegTransform(a alg.Integ) ikev2.Transform {
	return ikev2.NewTransform(ikev2.TransformINTEG, integIDs[a], 0)
}

// PRFTransform makes the PRF transform of p.
func PRFTransform(p alg.PRF) ikev2.Transform {
	return ikev2.NewTransform(ikev2.TransformPRF, prfIDs[p], 0)
}

// KETransform makes the KE transform of k.
func KETransform(k alg.KE) ikev2.Transform {
	return ikev2.NewTransform(ikev2.TransformKE, ikev2.KEID(k), 0)
}

// addKETransform makes the ADDKE transform n, from 0, of k.
func addKETransform(n int, k alg.KE) ikev2.Transform {
	return ikev2.NewTransform(ikev2.TransformADDKE1+ikev2.TransformType(n), ikev2.KEID(k), 0)
}

// addKEIndex is the reverse for the type.
func addKEIndex(t ikev2.TransformType) (n int, ok bool) {
	return int(t) - int(ikev2.TransformADDKE1), t >= ikev2.TransformADDKE1 && t <= ikev2.TransformADDKE7
}

// ESNTransform makes the ESN transform.
func ESNTransform(esn bool) ikev2.Transform {
	if esn {
		return ikev2.NewTransform(ikev2.TransformESN, ikev2.ESNYes, 0)
	}
	return ikev2.NewTransform(ikev2.TransformESN, ikev2.ESNNo, 0)
}

// cipherOf reads an ENCR transform; false if we do not know it, or its key
// length is missing, superfluous or not one of the cipher's.
func cipherOf(t ikev2.Transform) (Cipher, bool) {
	bits, ok := t.KeyBits()
	if !ok {
		return Cipher{}, false
	}
	for e, id := range encrIDs {
		if ikev2.EncrID(t.ID) != id {
			continue
		}
		if !sizedByAttribute[e] {
			if bits != 0 {
				return Cipher{}, false
			}
			if k := e.Info().KeyBits; len(k) > 0 {
				bits = k[0]
			}
			return Cipher{e, bits}, true
		}
		_, ok := e.KeyLen(bits)
		return Cipher{e, bits}, ok
	}
	return Cipher{}, false
}

func reverse[K comparable, V ~uint16](m map[K]V, id uint16) (K, bool) {
	for k, v := range m {
		if uint16(v) == id {
			return k, true
		}
	}
	var zero K
	return zero, false
}
