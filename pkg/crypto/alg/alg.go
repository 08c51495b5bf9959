// Package alg names the algorithms that both daemons compute with, apart from
// any wire format: what they are called and how long their keys, IVs and ICVs
// are. Wire packages keep their own numbers; small tables at the boundaries
// (PF_KEY in keysock, IKE in ike/proposal, words in ipsecconf and ikeconf)
// translate, and tests walk All* here so that none can be forgotten.
package alg

import "fmt"

// Encr is an encryption transform, combined-mode ciphers included.
type Encr uint8

// Encryption transforms. The zero value means "no ESP encryption chosen";
// NULL encryption (RFC 2410) is a value of its own.
const (
	EncrNone             Encr = iota
	EncrNULL                  // RFC 2410
	EncrAESCBC                // RFC 3602
	EncrAESGCM8               // RFC 4106
	EncrAESGCM12              // RFC 4106
	EncrAESGCM16              // RFC 4106
	EncrChaCha20Poly1305      // RFC 7634
	numEncr
)

// EncrInfo holds the sizes of an encryption transform, in octets unless named bits.
type EncrInfo struct {
	Name     string // as ipsecconf and logs spell it, e.g. "aes-gcm-16"
	KeyBits  []int  // cipher key sizes allowed, without salt; nil: no key
	SaltLen  int    // octets of salt that follow the key in KEYMAT (RFC 4106, 8.1)
	IVLen    int    // octets of explicit IV on the wire
	ICVLen   int    // octets of ICV that the cipher itself makes; 0 unless AEAD
	BlockLen int    // plaintext is padded to a multiple of this before ESP's own 4
	AEAD     bool
}

var encrs = [numEncr]EncrInfo{
	EncrNone:             {Name: "none"},
	EncrNULL:             {Name: "null", BlockLen: 1},
	EncrAESCBC:           {Name: "aes-cbc", KeyBits: []int{128, 192, 256}, IVLen: 16, BlockLen: 16},
	EncrAESGCM8:          {Name: "aes-gcm-8", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, ICVLen: 8, BlockLen: 1, AEAD: true},
	EncrAESGCM12:         {Name: "aes-gcm-12", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, ICVLen: 12, BlockLen: 1, AEAD: true},
	EncrAESGCM16:         {Name: "aes-gcm-16", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, ICVLen: 16, BlockLen: 1, AEAD: true},
	EncrChaCha20Poly1305: {Name: "chacha20-poly1305", KeyBits: []int{256}, SaltLen: 4, IVLen: 8, ICVLen: 16, BlockLen: 1, AEAD: true},
}

// Info returns the sizes of e; the zero EncrInfo for a value that does not exist.
func (e Encr) Info() EncrInfo {
	if e >= numEncr {
		return EncrInfo{}
	}
	return encrs[e]
}

func (e Encr) String() string {
	if e >= numEncr {
		return fmt.Sprintf("Encr(%d)", uint8(e))
	}
	return encrs[e].Name
}

// KeyLen returns the octets of keying material, salt included, for a cipher
// key of bits; false if the cipher has no such key size. For a cipher without
// key, bits must be 0.
func (e Encr) KeyLen(bits int) (int, bool) {
	i := e.Info()
	if i.KeyBits == nil {
		return 0, bits == 0
	}
	for _, b := range i.KeyBits {
		if b == bits {
			return bits/8 + i.SaltLen, true
		}
	}
	return 0, false
}

// AllEncr lists every encryption transform except EncrNone.
func AllEncr() []Encr { return all[Encr](1, numEncr) }

// Integ is an integrity transform.
type Integ uint8

// Integrity transforms.
const (
	IntegNone       Integ = iota
	IntegHMACSHA1         // HMAC-SHA1-96, RFC 2404
	IntegHMACSHA256       // HMAC-SHA-256-128, RFC 4868
	IntegHMACSHA384       // HMAC-SHA-384-192, RFC 4868
	IntegHMACSHA512       // HMAC-SHA-512-256, RFC 4868
	IntegAESXCBC          // AES-XCBC-MAC-96, RFC 3566
	IntegAESCMAC          // AES-CMAC-96, RFC 4494
	numInteg
)

// IntegInfo holds the sizes of an integrity transform in octets.
type IntegInfo struct {
	Name   string
	KeyLen int
	ICVLen int
}

var integs = [numInteg]IntegInfo{
	IntegNone:       {Name: "none"},
	IntegHMACSHA1:   {Name: "hmac-sha1", KeyLen: 20, ICVLen: 12},
	IntegHMACSHA256: {Name: "hmac-sha256", KeyLen: 32, ICVLen: 16},
	IntegHMACSHA384: {Name: "hmac-sha384", KeyLen: 48, ICVLen: 24},
	IntegHMACSHA512: {Name: "hmac-sha512", KeyLen: 64, ICVLen: 32},
	IntegAESXCBC:    {Name: "aes-xcbc", KeyLen: 16, ICVLen: 12},
	IntegAESCMAC:    {Name: "aes-cmac", KeyLen: 16, ICVLen: 12},
}

// Info returns the sizes of a; the zero IntegInfo for a value that does not exist.
func (a Integ) Info() IntegInfo {
	if a >= numInteg {
		return IntegInfo{}
	}
	return integs[a]
}

func (a Integ) String() string {
	if a >= numInteg {
		return fmt.Sprintf("Integ(%d)", uint8(a))
	}
	return integs[a].Name
}

// AllInteg lists every integrity transform except IntegNone.
func AllInteg() []Integ { return all[Integ](1, numInteg) }

// PRF is a pseudo-random function of IKE.
type PRF uint8

// Pseudo-random functions.
const (
	PRFNone       PRF = iota
	PRFHMACSHA1       // RFC 2104
	PRFHMACSHA256     // RFC 4868
	PRFHMACSHA384     // RFC 4868
	PRFHMACSHA512     // RFC 4868
	numPRF
)

var prfs = [numPRF]struct {
	name string
	n    int
}{{"none", 0}, {"hmac-sha1", 20}, {"hmac-sha256", 32}, {"hmac-sha384", 48}, {"hmac-sha512", 64}}

func (p PRF) String() string {
	if p >= numPRF {
		return fmt.Sprintf("PRF(%d)", uint8(p))
	}
	return prfs[p].name
}

// Len is both the preferred key length and the output length in octets.
func (p PRF) Len() int {
	if p >= numPRF {
		return 0
	}
	return prfs[p].n
}

// AllPRF lists every PRF except PRFNone.
func AllPRF() []PRF { return all[PRF](1, numPRF) }

// KE is a key exchange method; its values are the numbers of the IKEv2
// registry (RFC 7296, 3.3.2, transform type 4), which IKEv1 shares.
type KE uint16

// Key exchange methods.
const (
	KENone     KE = 0
	KEMODP2048 KE = 14 // RFC 3526
	KEMODP3072 KE = 15 // RFC 3526
	KEMODP4096 KE = 16 // RFC 3526
	KEECP256   KE = 19 // RFC 5903
	KEECP384   KE = 20 // RFC 5903
	KEECP521   KE = 21 // RFC 5903
	KEX25519   KE = 31 // RFC 8031
)

var kes = []struct {
	ke   KE
	name string
}{
	{KEX25519, "x25519"}, {KEECP256, "ecp256"}, {KEECP384, "ecp384"}, {KEECP521, "ecp521"},
	{KEMODP2048, "modp2048"}, {KEMODP3072, "modp3072"}, {KEMODP4096, "modp4096"},
}

func (k KE) String() string {
	if k == KENone {
		return "none"
	}
	for _, e := range kes {
		if e.ke == k {
			return e.name
		}
	}
	return fmt.Sprintf("KE(%d)", uint16(k))
}

// AllKE lists every key exchange method that crypto/dh can compute, preferred first.
func AllKE() []KE {
	l := make([]KE, len(kes))
	for i, e := range kes {
		l[i] = e.ke
	}
	return l
}

func all[T ~uint8](from, to T) []T {
	var l []T
	for v := from; v < to; v++ {
		l = append(l, v)
	}
	return l
}
