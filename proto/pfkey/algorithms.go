package pfkey

// AuthAlg is an authentication algorithm in the SA extension. Its numbers have
// a space of their own, apart from IKE's.
type AuthAlg uint8

// Authentication algorithms (RFC 2367, 3.5, Linux and KAME).
const (
	AuthNone          AuthAlg = 0
	AuthHMACMD5       AuthAlg = 2
	AuthHMACSHA1      AuthAlg = 3
	AuthHMACSHA256    AuthAlg = 5 // 128 bits of ICV (RFC 4868), not Linux's 96
	AuthHMACSHA384    AuthAlg = 6
	AuthHMACSHA512    AuthAlg = 7
	AuthHMACRIPEMD160 AuthAlg = 8
	AuthAESXCBCMAC    AuthAlg = 9
	AuthHMACSM3       AuthAlg = 10
	AuthAES128GMAC    AuthAlg = 11 // FreeBSD's, free on Linux, as the next two; AH alone, the key ends with 4 octets of salt
	AuthAES192GMAC    AuthAlg = 12
	AuthAES256GMAC    AuthAlg = 13
	AuthAESCMAC       AuthAlg = 248 // our own choice: neither Linux nor KAME has a number for AES-CMAC-96
	AuthKeyedMD5      AuthAlg = 249 // KAME's; here always RFC 1828 in the AH of RFC 1826
	AuthKeyedSHA      AuthAlg = 250
	AuthNULL          AuthAlg = 251
	MaxAuthAlg                = AuthNULL
)

var authNames = map[AuthAlg]string{
	AuthNone: "none", AuthHMACMD5: "hmac-md5", AuthHMACSHA1: "hmac-sha1", AuthHMACSHA256: "hmac-sha2-256",
	AuthHMACSHA384: "hmac-sha2-384", AuthHMACSHA512: "hmac-sha2-512", AuthHMACRIPEMD160: "hmac-ripemd160",
	AuthAESXCBCMAC: "aes-xcbc-mac", AuthAESCMAC: "aes-cmac", AuthHMACSM3: "hmac-sm3", AuthKeyedMD5: "keyed-md5",
	AuthAES128GMAC: "aes-gmac-128", AuthAES192GMAC: "aes-gmac-192", AuthAES256GMAC: "aes-gmac-256",
	AuthKeyedSHA: "keyed-sha1", AuthNULL: "null",
}

func (a AuthAlg) String() string { return name(authNames, a, "AuthAlg") }

// EncrAlg is an encryption algorithm in the SA extension.
type EncrAlg uint8

// Encryption algorithms (RFC 2367, 3.5, Linux and KAME). The keys of AES-CTR,
// CCM, GCM, GMAC and ChaCha20-Poly1305 end with their nonce or salt.
const (
	EncrNone                EncrAlg = 0
	EncrDESIV64             EncrAlg = 1 // RFC 1829 in the ESP of RFC 1827; the number of the IPsec DOI (RFC 2407, 4.4.4)
	EncrDESCBC              EncrAlg = 2
	Encr3DESCBC             EncrAlg = 3
	EncrCAST128CBC          EncrAlg = 6
	EncrBlowfishCBC         EncrAlg = 7
	EncrDESIV32             EncrAlg = 9 // as EncrDESIV64
	EncrNULL                EncrAlg = 11
	EncrAESCBC              EncrAlg = 12
	EncrAESCTR              EncrAlg = 13
	EncrAESCCM8             EncrAlg = 14
	EncrAESCCM12            EncrAlg = 15
	EncrAESCCM16            EncrAlg = 16
	EncrAESGCM8             EncrAlg = 18
	EncrAESGCM12            EncrAlg = 19
	EncrAESGCM16            EncrAlg = 20
	EncrCamelliaCBC         EncrAlg = 22
	EncrNULLAESGMAC         EncrAlg = 23
	EncrSM4CBC              EncrAlg = 24
	EncrChaCha20Poly1305    EncrAlg = 28  // private: its IKEv2 number, free here
	EncrAESCCMICV8IIV       EncrAlg = 29  // private, likewise; RFC 8750
	EncrAESGCMICV16IIV      EncrAlg = 30  // private, likewise; RFC 8750
	EncrChaCha20Poly1305IIV EncrAlg = 31  // private, likewise; RFC 8750
	Encr3DESIV64            EncrAlg = 240 // private: RFC 1851 in the ESP of RFC 1827, with two keys or three
	Encr3DESIV32            EncrAlg = 241 // private: likewise
	EncrSerpentCBC          EncrAlg = 252
	EncrTwofishCBC          EncrAlg = 253
	MaxEncrAlg                      = EncrTwofishCBC
)

var encrNames = map[EncrAlg]string{
	EncrNone: "none", EncrDESIV64: "des-iv64", EncrDESIV32: "des-iv32", Encr3DESIV64: "3des-iv64",
	Encr3DESIV32: "3des-iv32", EncrDESCBC: "des-cbc", Encr3DESCBC: "3des-cbc", EncrCAST128CBC: "cast128-cbc",
	EncrBlowfishCBC: "blowfish-cbc", EncrNULL: "null", EncrAESCBC: "aes-cbc", EncrAESCTR: "aes-ctr",
	EncrAESCCM8: "aes-ccm-8", EncrAESCCM12: "aes-ccm-12", EncrAESCCM16: "aes-ccm-16",
	EncrAESGCM8: "aes-gcm-8", EncrAESGCM12: "aes-gcm-12", EncrAESGCM16: "aes-gcm-16",
	EncrCamelliaCBC: "camellia-cbc", EncrNULLAESGMAC: "null-aes-gmac", EncrSM4CBC: "sm4-cbc",
	EncrChaCha20Poly1305: "chacha20-poly1305", EncrAESCCMICV8IIV: "aes-ccm-8-iiv", EncrAESGCMICV16IIV: "aes-gcm-16-iiv", EncrChaCha20Poly1305IIV: "chacha20-poly1305-iiv",
	EncrSerpentCBC: "serpent-cbc", EncrTwofishCBC: "twofish-cbc",
}

func (e EncrAlg) String() string { return name(encrNames, e, "EncrAlg") }

// CompAlg is a compression algorithm, in the encryption field of an IPComp SA.
type CompAlg uint8

// Compression algorithms.
const (
	CompNone    CompAlg = 0
	CompOUI     CompAlg = 1
	CompDeflate CompAlg = 2
	CompLZS     CompAlg = 3
	CompLZJH    CompAlg = 4
	MaxCompAlg          = CompLZJH
)

var compNames = map[CompAlg]string{
	CompNone: "none", CompOUI: "oui", CompDeflate: "deflate", CompLZS: "lzs", CompLZJH: "lzjh",
}

func (c CompAlg) String() string { return name(compNames, c, "CompAlg") }
