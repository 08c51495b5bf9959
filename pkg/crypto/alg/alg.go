// Package alg names the algorithms that both daemons compute with, apart from
// any wire format: what they are called and how long their keys, IVs and ICVs
// are. Wire packages keep their own numbers; small tables at the boundaries
// (PF_KEY in keysock, IKE in ike/proposal, words in ipsecconf and ikeconf)
// translate, and tests walk All*, Legacy* and AHInteg here so that none can be
// forgotten.
//
// Legacy transforms serve old peers by manual key alone, where the operator of
// the data path allows them; IKE negotiates none, but triple DES for itself. Of these the old ones
// have the headers of RFC 1826 and 1827, without sequence number.
package alg

import "fmt"

// Encr is an encryption transform, combined-mode ciphers included.
type Encr uint8

// Encryption transforms. The zero value means "no ESP encryption chosen";
// NULL encryption (RFC 2410) is a value of its own.
const (
	EncrNone                Encr = iota
	EncrNULL                     // RFC 2410
	EncrAESCBC                   // RFC 3602
	EncrAESGCM8                  // RFC 4106
	EncrAESGCM12                 // RFC 4106
	EncrAESGCM16                 // RFC 4106
	EncrChaCha20Poly1305         // RFC 7634
	EncrAESCTR                   // RFC 3686
	EncrAESCCM8                  // RFC 4309
	EncrAESCCM12                 // RFC 4309
	EncrAESCCM16                 // RFC 4309
	EncrNULLAESGMAC              // ENCR_NULL_AUTH_AES_GMAC, RFC 4543
	EncrAESGCM16IIV              // RFC 8750; of ESP alone, as are the next two
	EncrAESCCM8IIV               // RFC 8750
	EncrChaCha20Poly1305IIV      // RFC 8750
	EncrDESCBC                   // legacy, RFC 2405
	Encr3DESCBC                  // legacy, RFC 2451
	EncrDESIV64                  // legacy and old, RFC 1829
	EncrDESIV32                  // legacy and old, RFC 1829
	Encr3DESIV64                 // legacy and old, RFC 1851
	Encr3DESIV32                 // legacy and old, RFC 1851
	numEncr

	firstLegacyEncr = EncrDESCBC
)

// EncrInfo holds the sizes of an encryption transform, in octets unless named bits.
type EncrInfo struct {
	Name     string // as ipsecconf and logs spell it, e.g. "aes-gcm-16"
	KeyBits  []int  // cipher key sizes allowed, without salt; nil: no key
	SaltLen  int    // octets of salt or nonce that follow the key in KEYMAT (RFC 4106, 8.1; RFC 3686, 5.1)
	IVLen    int    // octets of explicit IV on the wire
	ICVLen   int    // octets of ICV that the cipher itself makes; 0 unless AEAD
	BlockLen int    // plaintext is padded to a multiple of this before ESP's own 4
	AEAD     bool
	Counter  bool // the IV is a counter; a key whose counter began anew gives away what it protects
	Implicit bool // the IV is the sequence number and not on the wire (RFC 8750)
	Old      bool // RFC 1827: neither sequence number nor ICV
}

var encrs = [numEncr]EncrInfo{
	EncrNone:                {Name: "none"},
	EncrNULL:                {Name: "null", BlockLen: 1},
	EncrAESCBC:              {Name: "aes-cbc", KeyBits: []int{128, 192, 256}, IVLen: 16, BlockLen: 16},
	EncrAESGCM8:             {Name: "aes-gcm-8", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, ICVLen: 8, BlockLen: 1, AEAD: true, Counter: true},
	EncrAESGCM12:            {Name: "aes-gcm-12", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, ICVLen: 12, BlockLen: 1, AEAD: true, Counter: true},
	EncrAESGCM16:            {Name: "aes-gcm-16", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, ICVLen: 16, BlockLen: 1, AEAD: true, Counter: true},
	EncrChaCha20Poly1305:    {Name: "chacha20-poly1305", KeyBits: []int{256}, SaltLen: 4, IVLen: 8, ICVLen: 16, BlockLen: 1, AEAD: true, Counter: true},
	EncrAESCTR:              {Name: "aes-ctr", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, BlockLen: 1, Counter: true},
	EncrAESCCM8:             {Name: "aes-ccm-8", KeyBits: []int{128, 192, 256}, SaltLen: 3, IVLen: 8, ICVLen: 8, BlockLen: 1, AEAD: true, Counter: true},
	EncrAESCCM12:            {Name: "aes-ccm-12", KeyBits: []int{128, 192, 256}, SaltLen: 3, IVLen: 8, ICVLen: 12, BlockLen: 1, AEAD: true, Counter: true},
	EncrAESCCM16:            {Name: "aes-ccm-16", KeyBits: []int{128, 192, 256}, SaltLen: 3, IVLen: 8, ICVLen: 16, BlockLen: 1, AEAD: true, Counter: true},
	EncrNULLAESGMAC:         {Name: "null-aes-gmac", KeyBits: []int{128, 192, 256}, SaltLen: 4, IVLen: 8, ICVLen: 16, BlockLen: 1, AEAD: true, Counter: true},
	EncrAESGCM16IIV:         {Name: "aes-gcm-16-iiv", KeyBits: []int{128, 192, 256}, SaltLen: 4, ICVLen: 16, BlockLen: 1, AEAD: true, Counter: true, Implicit: true},
	EncrAESCCM8IIV:          {Name: "aes-ccm-8-iiv", KeyBits: []int{128, 192, 256}, SaltLen: 3, ICVLen: 8, BlockLen: 1, AEAD: true, Counter: true, Implicit: true},
	EncrChaCha20Poly1305IIV: {Name: "chacha20-poly1305-iiv", KeyBits: []int{256}, SaltLen: 4, ICVLen: 16, BlockLen: 1, AEAD: true, Counter: true, Implicit: true},
	EncrDESCBC:              {Name: "des-cbc", KeyBits: []int{64}, IVLen: 8, BlockLen: 8},
	Encr3DESCBC:             {Name: "3des-cbc", KeyBits: []int{192}, IVLen: 8, BlockLen: 8},
	EncrDESIV64:             {Name: "des-iv64", KeyBits: []int{64}, IVLen: 8, BlockLen: 8, Old: true},
	EncrDESIV32:             {Name: "des-iv32", KeyBits: []int{64}, IVLen: 4, BlockLen: 8, Old: true},
	Encr3DESIV64:            {Name: "3des-iv64", KeyBits: []int{128, 192}, IVLen: 8, BlockLen: 8, Old: true},
	Encr3DESIV32:            {Name: "3des-iv32", KeyBits: []int{128, 192}, IVLen: 4, BlockLen: 8, Old: true},
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

// Legacy reports whether in ESP e serves only old peers by manual key.
func (e Encr) Legacy() bool { return e >= firstLegacyEncr && e < numEncr }

// AllEncr lists every encryption transform except EncrNone and legacy ones.
func AllEncr() []Encr { return all[Encr](1, firstLegacyEncr) }

// LegacyEncr lists the legacy encryption transforms.
func LegacyEncr() []Encr { return all(firstLegacyEncr, numEncr) }

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
	IntegAESGMAC128       // AUTH_AES_GMAC, RFC 4543; of AH alone, as are the next two
	IntegAESGMAC192
	IntegAESGMAC256
	IntegHMACMD5  // HMAC-MD5-96, legacy, RFC 2403
	IntegKeyedMD5 // legacy and old, of AH alone, RFC 1828
	numInteg

	firstAHInteg     = IntegAESGMAC128
	firstLegacyInteg = IntegHMACMD5
)

// IntegInfo holds the sizes of an integrity transform in octets.
type IntegInfo struct {
	Name    string
	KeyLen  int  // salt included
	SaltLen int  // of GMAC: octets at the end of the key
	ICVLen  int  // of GMAC with the IV that begins the ICV field (RFC 4543, 4)
	AHOnly  bool // no ESP has it
	Old     bool // RFC 1826: no sequence number
}

var integs = [numInteg]IntegInfo{
	IntegNone:       {Name: "none"},
	IntegHMACSHA1:   {Name: "hmac-sha1", KeyLen: 20, ICVLen: 12},
	IntegHMACSHA256: {Name: "hmac-sha256", KeyLen: 32, ICVLen: 16},
	IntegHMACSHA384: {Name: "hmac-sha384", KeyLen: 48, ICVLen: 24},
	IntegHMACSHA512: {Name: "hmac-sha512", KeyLen: 64, ICVLen: 32},
	IntegAESXCBC:    {Name: "aes-xcbc", KeyLen: 16, ICVLen: 12},
	IntegAESCMAC:    {Name: "aes-cmac", KeyLen: 16, ICVLen: 12},
	IntegAESGMAC128: {Name: "aes-gmac-128", KeyLen: 20, SaltLen: 4, ICVLen: 24, AHOnly: true},
	IntegAESGMAC192: {Name: "aes-gmac-192", KeyLen: 28, SaltLen: 4, ICVLen: 24, AHOnly: true},
	IntegAESGMAC256: {Name: "aes-gmac-256", KeyLen: 36, SaltLen: 4, ICVLen: 24, AHOnly: true},
	IntegHMACMD5:    {Name: "hmac-md5", KeyLen: 16, ICVLen: 12},
	IntegKeyedMD5:   {Name: "keyed-md5", KeyLen: 16, ICVLen: 16, AHOnly: true, Old: true},
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

// Legacy reports whether a serves only old peers by manual key.
func (a Integ) Legacy() bool { return a >= firstLegacyInteg && a < numInteg }

// AllInteg lists every integrity transform that ESP and AH share, except
// IntegNone and legacy ones.
func AllInteg() []Integ { return all[Integ](1, firstAHInteg) }

// AHInteg lists the integrity transforms of AH alone, except legacy ones.
func AHInteg() []Integ { return all(firstAHInteg, firstLegacyInteg) }

// LegacyInteg lists the legacy integrity transforms.
func LegacyInteg() []Integ { return all(firstLegacyInteg, numInteg) }

// PRF is a pseudo-random function of IKE.
type PRF uint8

// Pseudo-random functions.
const (
	PRFNone       PRF = iota
	PRFHMACSHA1       // RFC 2104
	PRFHMACSHA256     // RFC 4868
	PRFHMACSHA384     // RFC 4868
	PRFHMACSHA512     // RFC 4868
	PRFAESXCBC        // AES-XCBC-PRF-128, RFC 4434
	PRFAESCMAC        // AES-CMAC-PRF-128, RFC 4615
	numPRF
)

var prfs = [numPRF]struct {
	name string
	n    int
}{{"none", 0}, {"hmac-sha1", 20}, {"hmac-sha256", 32}, {"hmac-sha384", 48}, {"hmac-sha512", 64},
	{"aes-xcbc", 16}, {"aes-cmac", 16}}

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
	KENone      KE = 0
	KEMODP2048  KE = 14 // RFC 3526
	KEMODP3072  KE = 15 // RFC 3526
	KEMODP4096  KE = 16 // RFC 3526
	KEMODP6144  KE = 17 // RFC 3526
	KEMODP8192  KE = 18 // RFC 3526
	KEECP256    KE = 19 // RFC 5903
	KEECP384    KE = 20 // RFC 5903
	KEECP521    KE = 21 // RFC 5903
	KEX25519    KE = 31 // RFC 8031
	KEX448      KE = 32 // RFC 8031
	KEMLKEM768  KE = 36 // FIPS 203
	KEMLKEM1024 KE = 37 // FIPS 203

	KEBrainpoolP224R1 KE = 27 // RFC 6954, as the next three
	KEBrainpoolP256R1 KE = 28
	KEBrainpoolP384R1 KE = 29
	KEBrainpoolP512R1 KE = 30
)

// KEM reports whether k is a key encapsulation mechanism: the responder's answer
// is made for the initiator's public key, and neither side's value is of use
// with another.
func (k KE) KEM() bool { return k == KEMLKEM768 || k == KEMLKEM1024 }

var kes = []struct {
	ke   KE
	name string
}{
	{KEX25519, "x25519"}, {KEECP256, "ecp256"}, {KEECP384, "ecp384"}, {KEECP521, "ecp521"},
	{KEX448, "x448"}, {KEMODP2048, "modp2048"}, {KEMODP3072, "modp3072"}, {KEMODP4096, "modp4096"},
	{KEMODP6144, "modp6144"}, {KEMODP8192, "modp8192"}, {KEMLKEM768, "ml-kem-768"}, {KEMLKEM1024, "ml-kem-1024"},
	{KEBrainpoolP256R1, "brainpoolp256r1"}, {KEBrainpoolP384R1, "brainpoolp384r1"}, {KEBrainpoolP512R1, "brainpoolp512r1"},
	{KEBrainpoolP224R1, "brainpoolp224r1"},
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
