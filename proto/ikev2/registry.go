package ikev2

// Registries of IKEv2: https://www.iana.org/assignments/ikev2-parameters.

import "fmt"

// PayloadType is the type of a payload.
type PayloadType uint8

// Payload types (RFC 7296, 3.2; SKF of RFC 7383).
const (
	PayloadNone     PayloadType = 0
	PayloadSA       PayloadType = 33
	PayloadKE       PayloadType = 34
	PayloadIDi      PayloadType = 35
	PayloadIDr      PayloadType = 36
	PayloadCERT     PayloadType = 37
	PayloadCERTREQ  PayloadType = 38
	PayloadAUTH     PayloadType = 39
	PayloadNonce    PayloadType = 40
	PayloadNotify   PayloadType = 41
	PayloadDelete   PayloadType = 42
	PayloadVendorID PayloadType = 43
	PayloadTSi      PayloadType = 44
	PayloadTSr      PayloadType = 45
	PayloadSK       PayloadType = 46
	PayloadCP       PayloadType = 47
	PayloadEAP      PayloadType = 48
	PayloadSKF      PayloadType = 53
)

var payloadTypeNames = map[PayloadType]string{
	PayloadNone:     "none",
	PayloadSA:       "SA",
	PayloadKE:       "KE",
	PayloadIDi:      "IDi",
	PayloadIDr:      "IDr",
	PayloadCERT:     "CERT",
	PayloadCERTREQ:  "CERTREQ",
	PayloadAUTH:     "AUTH",
	PayloadNonce:    "Nonce",
	PayloadNotify:   "N",
	PayloadDelete:   "D",
	PayloadVendorID: "V",
	PayloadTSi:      "TSi",
	PayloadTSr:      "TSr",
	PayloadSK:       "SK",
	PayloadCP:       "CP",
	PayloadEAP:      "EAP",
	PayloadSKF:      "SKF",
}

func (v PayloadType) String() string { return name(payloadTypeNames, v, "PayloadType") }

// ExchangeType is the exchange that a message belongs to.
type ExchangeType uint8

// Exchange types (RFC 7296, 3.1; RFC 5723; RFC 9242; RFC 9370).
const (
	IKE_SA_INIT        ExchangeType = 34
	IKE_AUTH           ExchangeType = 35
	CREATE_CHILD_SA    ExchangeType = 36
	INFORMATIONAL      ExchangeType = 37
	IKE_SESSION_RESUME ExchangeType = 38
	IKE_INTERMEDIATE   ExchangeType = 43
	IKE_FOLLOWUP_KE    ExchangeType = 44
)

var exchangeTypeNames = map[ExchangeType]string{
	IKE_SA_INIT:        "IKE_SA_INIT",
	IKE_AUTH:           "IKE_AUTH",
	CREATE_CHILD_SA:    "CREATE_CHILD_SA",
	INFORMATIONAL:      "INFORMATIONAL",
	IKE_SESSION_RESUME: "IKE_SESSION_RESUME",
	IKE_INTERMEDIATE:   "IKE_INTERMEDIATE",
	IKE_FOLLOWUP_KE:    "IKE_FOLLOWUP_KE",
}

func (v ExchangeType) String() string { return name(exchangeTypeNames, v, "ExchangeType") }

// ProtocolID names a security protocol in proposals, notifications and deletions.
type ProtocolID uint8

// Protocols (RFC 7296, 3.3.1).
const (
	ProtocolNone ProtocolID = 0
	ProtocolIKE  ProtocolID = 1
	ProtocolAH   ProtocolID = 2
	ProtocolESP  ProtocolID = 3
)

var protocolIDNames = map[ProtocolID]string{
	ProtocolNone: "none",
	ProtocolIKE:  "IKE",
	ProtocolAH:   "AH",
	ProtocolESP:  "ESP",
}

func (v ProtocolID) String() string { return name(protocolIDNames, v, "ProtocolID") }

// TransformType is the type of a transform.
type TransformType uint8

// Transform types (RFC 7296, 3.3.2; RFC 9370).
const (
	TransformENCR   TransformType = 1
	TransformPRF    TransformType = 2
	TransformINTEG  TransformType = 3
	TransformKE     TransformType = 4
	TransformESN    TransformType = 5
	TransformADDKE1 TransformType = 6
	TransformADDKE2 TransformType = 7
	TransformADDKE3 TransformType = 8
	TransformADDKE4 TransformType = 9
	TransformADDKE5 TransformType = 10
	TransformADDKE6 TransformType = 11
	TransformADDKE7 TransformType = 12
)

var transformTypeNames = map[TransformType]string{
	TransformENCR:   "ENCR",
	TransformPRF:    "PRF",
	TransformINTEG:  "INTEG",
	TransformKE:     "KE",
	TransformESN:    "ESN",
	TransformADDKE1: "ADDKE1",
	TransformADDKE2: "ADDKE2",
	TransformADDKE3: "ADDKE3",
	TransformADDKE4: "ADDKE4",
	TransformADDKE5: "ADDKE5",
	TransformADDKE6: "ADDKE6",
	TransformADDKE7: "ADDKE7",
}

func (v TransformType) String() string { return name(transformTypeNames, v, "TransformType") }

// EncrID is a transform ID of type ENCR.
type EncrID uint16

// Encryption transforms (IANA, IKEv2 transform type 1).
const (
	EncrDES_IV64              EncrID = 1
	EncrDES                   EncrID = 2
	Encr3DES                  EncrID = 3
	EncrRC5                   EncrID = 4
	EncrIDEA                  EncrID = 5
	EncrCAST                  EncrID = 6
	EncrBLOWFISH              EncrID = 7
	Encr3IDEA                 EncrID = 8
	EncrDES_IV32              EncrID = 9
	EncrNULL                  EncrID = 11
	EncrAES_CBC               EncrID = 12
	EncrAES_CTR               EncrID = 13
	EncrAES_CCM_8             EncrID = 14
	EncrAES_CCM_12            EncrID = 15
	EncrAES_CCM_16            EncrID = 16
	EncrAES_GCM_8             EncrID = 18
	EncrAES_GCM_12            EncrID = 19
	EncrAES_GCM_16            EncrID = 20
	EncrNULL_AUTH_AES_GMAC    EncrID = 21
	EncrCAMELLIA_CBC          EncrID = 23
	EncrCAMELLIA_CTR          EncrID = 24
	EncrCAMELLIA_CCM_8        EncrID = 25
	EncrCAMELLIA_CCM_12       EncrID = 26
	EncrCAMELLIA_CCM_16       EncrID = 27
	EncrCHACHA20_POLY1305     EncrID = 28
	EncrAES_CCM_8_IIV         EncrID = 29
	EncrAES_GCM_16_IIV        EncrID = 30
	EncrCHACHA20_POLY1305_IIV EncrID = 31
)

var encrIDNames = map[EncrID]string{
	EncrDES_IV64:              "DES_IV64",
	EncrDES:                   "DES",
	Encr3DES:                  "3DES",
	EncrRC5:                   "RC5",
	EncrIDEA:                  "IDEA",
	EncrCAST:                  "CAST",
	EncrBLOWFISH:              "BLOWFISH",
	Encr3IDEA:                 "3IDEA",
	EncrDES_IV32:              "DES_IV32",
	EncrNULL:                  "NULL",
	EncrAES_CBC:               "AES_CBC",
	EncrAES_CTR:               "AES_CTR",
	EncrAES_CCM_8:             "AES_CCM_8",
	EncrAES_CCM_12:            "AES_CCM_12",
	EncrAES_CCM_16:            "AES_CCM_16",
	EncrAES_GCM_8:             "AES_GCM_8",
	EncrAES_GCM_12:            "AES_GCM_12",
	EncrAES_GCM_16:            "AES_GCM_16",
	EncrNULL_AUTH_AES_GMAC:    "NULL_AUTH_AES_GMAC",
	EncrCAMELLIA_CBC:          "CAMELLIA_CBC",
	EncrCAMELLIA_CTR:          "CAMELLIA_CTR",
	EncrCAMELLIA_CCM_8:        "CAMELLIA_CCM_8",
	EncrCAMELLIA_CCM_12:       "CAMELLIA_CCM_12",
	EncrCAMELLIA_CCM_16:       "CAMELLIA_CCM_16",
	EncrCHACHA20_POLY1305:     "CHACHA20_POLY1305",
	EncrAES_CCM_8_IIV:         "AES_CCM_8_IIV",
	EncrAES_GCM_16_IIV:        "AES_GCM_16_IIV",
	EncrCHACHA20_POLY1305_IIV: "CHACHA20_POLY1305_IIV",
}

func (v EncrID) String() string { return name(encrIDNames, v, "EncrID") }

// PRFID is a transform ID of type PRF.
type PRFID uint16

// Pseudo-random functions (IANA, IKEv2 transform type 2).
const (
	PRFHMAC_MD5      PRFID = 1
	PRFHMAC_SHA1     PRFID = 2
	PRFHMAC_TIGER    PRFID = 3
	PRFAES128_XCBC   PRFID = 4
	PRFHMAC_SHA2_256 PRFID = 5
	PRFHMAC_SHA2_384 PRFID = 6
	PRFHMAC_SHA2_512 PRFID = 7
	PRFAES128_CMAC   PRFID = 8
)

var prfNames = map[PRFID]string{
	PRFHMAC_MD5:      "HMAC_MD5",
	PRFHMAC_SHA1:     "HMAC_SHA1",
	PRFHMAC_TIGER:    "HMAC_TIGER",
	PRFAES128_XCBC:   "AES128_XCBC",
	PRFHMAC_SHA2_256: "HMAC_SHA2_256",
	PRFHMAC_SHA2_384: "HMAC_SHA2_384",
	PRFHMAC_SHA2_512: "HMAC_SHA2_512",
	PRFAES128_CMAC:   "AES128_CMAC",
}

func (v PRFID) String() string { return name(prfNames, v, "PRFID") }

// IntegID is a transform ID of type INTEG.
type IntegID uint16

// Integrity transforms (IANA, IKEv2 transform type 3).
const (
	IntegNone              IntegID = 0
	IntegHMAC_MD5_96       IntegID = 1
	IntegHMAC_SHA1_96      IntegID = 2
	IntegDES_MAC           IntegID = 3
	IntegKPDK_MD5          IntegID = 4
	IntegAES_XCBC_96       IntegID = 5
	IntegHMAC_MD5_128      IntegID = 6
	IntegHMAC_SHA1_160     IntegID = 7
	IntegAES_CMAC_96       IntegID = 8
	IntegAES_128_GMAC      IntegID = 9
	IntegAES_192_GMAC      IntegID = 10
	IntegAES_256_GMAC      IntegID = 11
	IntegHMAC_SHA2_256_128 IntegID = 12
	IntegHMAC_SHA2_384_192 IntegID = 13
	IntegHMAC_SHA2_512_256 IntegID = 14
)

var integIDNames = map[IntegID]string{
	IntegNone:              "NONE",
	IntegHMAC_MD5_96:       "HMAC_MD5_96",
	IntegHMAC_SHA1_96:      "HMAC_SHA1_96",
	IntegDES_MAC:           "DES_MAC",
	IntegKPDK_MD5:          "KPDK_MD5",
	IntegAES_XCBC_96:       "AES_XCBC_96",
	IntegHMAC_MD5_128:      "HMAC_MD5_128",
	IntegHMAC_SHA1_160:     "HMAC_SHA1_160",
	IntegAES_CMAC_96:       "AES_CMAC_96",
	IntegAES_128_GMAC:      "AES_128_GMAC",
	IntegAES_192_GMAC:      "AES_192_GMAC",
	IntegAES_256_GMAC:      "AES_256_GMAC",
	IntegHMAC_SHA2_256_128: "HMAC_SHA2_256_128",
	IntegHMAC_SHA2_384_192: "HMAC_SHA2_384_192",
	IntegHMAC_SHA2_512_256: "HMAC_SHA2_512_256",
}

func (v IntegID) String() string { return name(integIDNames, v, "IntegID") }

// KEID is a transform ID of type KE and of the additional key exchanges, and the method of a KE payload.
type KEID uint16

// Key exchange methods (IANA, IKEv2 transform type 4).
const (
	KENone              KEID = 0
	KEMODP768           KEID = 1
	KEMODP1024          KEID = 2
	KEMODP1536          KEID = 5
	KEMODP2048          KEID = 14
	KEMODP3072          KEID = 15
	KEMODP4096          KEID = 16
	KEMODP6144          KEID = 17
	KEMODP8192          KEID = 18
	KEECP256            KEID = 19
	KEECP384            KEID = 20
	KEECP521            KEID = 21
	KEMODP1024_160      KEID = 22
	KEMODP2048_224      KEID = 23
	KEMODP2048_256      KEID = 24
	KEECP192            KEID = 25
	KEECP224            KEID = 26
	KEBRAINPOOLP224R1   KEID = 27
	KEBRAINPOOLP256R1   KEID = 28
	KEBRAINPOOLP384R1   KEID = 29
	KEBRAINPOOLP512R1   KEID = 30
	KECURVE25519        KEID = 31
	KECURVE448          KEID = 32
	KEGOST3410_2012_256 KEID = 33
	KEGOST3410_2012_512 KEID = 34
	KEML_KEM_512        KEID = 35
	KEML_KEM_768        KEID = 36
	KEML_KEM_1024       KEID = 37
)

var keNames = map[KEID]string{
	KENone:              "NONE",
	KEMODP768:           "MODP768",
	KEMODP1024:          "MODP1024",
	KEMODP1536:          "MODP1536",
	KEMODP2048:          "MODP2048",
	KEMODP3072:          "MODP3072",
	KEMODP4096:          "MODP4096",
	KEMODP6144:          "MODP6144",
	KEMODP8192:          "MODP8192",
	KEECP256:            "ECP256",
	KEECP384:            "ECP384",
	KEECP521:            "ECP521",
	KEMODP1024_160:      "MODP1024_160",
	KEMODP2048_224:      "MODP2048_224",
	KEMODP2048_256:      "MODP2048_256",
	KEECP192:            "ECP192",
	KEECP224:            "ECP224",
	KEBRAINPOOLP224R1:   "BRAINPOOLP224R1",
	KEBRAINPOOLP256R1:   "BRAINPOOLP256R1",
	KEBRAINPOOLP384R1:   "BRAINPOOLP384R1",
	KEBRAINPOOLP512R1:   "BRAINPOOLP512R1",
	KECURVE25519:        "CURVE25519",
	KECURVE448:          "CURVE448",
	KEGOST3410_2012_256: "GOST3410_2012_256",
	KEGOST3410_2012_512: "GOST3410_2012_512",
	KEML_KEM_512:        "ML_KEM_512",
	KEML_KEM_768:        "ML_KEM_768",
	KEML_KEM_1024:       "ML_KEM_1024",
}

func (v KEID) String() string { return name(keNames, v, "KEID") }

// ESNID is a transform ID of type ESN.
type ESNID uint16

// Sequence numbers (RFC 7296, 3.3.2).
const (
	ESNNo  ESNID = 0
	ESNYes ESNID = 1
)

var esnNames = map[ESNID]string{
	ESNNo:  "NO_ESN",
	ESNYes: "ESN",
}

func (v ESNID) String() string { return name(esnNames, v, "ESNID") }

// AttributeType is the type of a transform attribute, without the format bit.
type AttributeType uint16

// Transform attributes (RFC 7296, 3.3.5).
const (
	AttributeKeyLength AttributeType = 14
)

var attributeTypeNames = map[AttributeType]string{
	AttributeKeyLength: "KEY_LENGTH",
}

func (v AttributeType) String() string { return name(attributeTypeNames, v, "AttributeType") }

// IDType is the type of an identity.
type IDType uint8

// Identity types (RFC 7296, 3.5; RFC 4595; RFC 7619).
const (
	IDIPv4Addr   IDType = 1
	IDFQDN       IDType = 2
	IDRFC822Addr IDType = 3
	IDIPv6Addr   IDType = 5
	IDDERASN1DN  IDType = 9
	IDDERASN1GN  IDType = 10
	IDKeyID      IDType = 11
	IDFCName     IDType = 12
	IDNull       IDType = 13
)

var idTypeNames = map[IDType]string{
	IDIPv4Addr:   "ID_IPV4_ADDR",
	IDFQDN:       "ID_FQDN",
	IDRFC822Addr: "ID_RFC822_ADDR",
	IDIPv6Addr:   "ID_IPV6_ADDR",
	IDDERASN1DN:  "ID_DER_ASN1_DN",
	IDDERASN1GN:  "ID_DER_ASN1_GN",
	IDKeyID:      "ID_KEY_ID",
	IDFCName:     "ID_FC_NAME",
	IDNull:       "ID_NULL",
}

func (v IDType) String() string { return name(idTypeNames, v, "IDType") }

// CertEncoding is the encoding of a certificate.
type CertEncoding uint8

// Certificate encodings (RFC 7296, 3.6; RFC 4806; RFC 7670).
const (
	CertPKCS7         CertEncoding = 1
	CertPGP           CertEncoding = 2
	CertDNSKey        CertEncoding = 3
	CertX509Signature CertEncoding = 4
	CertKerberos      CertEncoding = 6
	CertCRL           CertEncoding = 7
	CertARL           CertEncoding = 8
	CertSPKI          CertEncoding = 9
	CertX509Attribute CertEncoding = 10
	CertRawRSA        CertEncoding = 11
	CertHashURLX509   CertEncoding = 12
	CertHashURLBundle CertEncoding = 13
	CertOCSP          CertEncoding = 14
	CertRawPublicKey  CertEncoding = 15
)

var certEncodingNames = map[CertEncoding]string{
	CertPKCS7:         "PKCS7",
	CertPGP:           "PGP",
	CertDNSKey:        "DNS_KEY",
	CertX509Signature: "X509_SIGNATURE",
	CertKerberos:      "KERBEROS",
	CertCRL:           "CRL",
	CertARL:           "ARL",
	CertSPKI:          "SPKI",
	CertX509Attribute: "X509_ATTRIBUTE",
	CertRawRSA:        "RAW_RSA",
	CertHashURLX509:   "HASH_URL_X509",
	CertHashURLBundle: "HASH_URL_BUNDLE",
	CertOCSP:          "OCSP",
	CertRawPublicKey:  "RAW_PUBLIC_KEY",
}

func (v CertEncoding) String() string { return name(certEncodingNames, v, "CertEncoding") }

// AuthMethod is how the AUTH payload proves an identity.
type AuthMethod uint8

// Authentication methods (RFC 7296, 3.8; RFC 4754; RFC 7427; RFC 7619).
const (
	AuthRSA       AuthMethod = 1
	AuthPSK       AuthMethod = 2
	AuthDSS       AuthMethod = 3
	AuthECDSA256  AuthMethod = 9
	AuthECDSA384  AuthMethod = 10
	AuthECDSA521  AuthMethod = 11
	AuthGSPM      AuthMethod = 12
	AuthNull      AuthMethod = 13
	AuthSignature AuthMethod = 14
)

var authMethodNames = map[AuthMethod]string{
	AuthRSA:       "RSA",
	AuthPSK:       "PSK",
	AuthDSS:       "DSS",
	AuthECDSA256:  "ECDSA_SHA256_P256",
	AuthECDSA384:  "ECDSA_SHA384_P384",
	AuthECDSA521:  "ECDSA_SHA512_P521",
	AuthGSPM:      "GSPM",
	AuthNull:      "NULL",
	AuthSignature: "DIGITAL_SIGNATURE",
}

func (v AuthMethod) String() string { return name(authMethodNames, v, "AuthMethod") }

// HashID is a hash algorithm of digital signatures, as SIGNATURE_HASH_ALGORITHMS
// announces it: two octets each.
type HashID uint16

// Hash algorithms (RFC 7427; RFC 8420).
const (
	HashSHA1     HashID = 1
	HashSHA256   HashID = 2
	HashSHA384   HashID = 3
	HashSHA512   HashID = 4
	HashIdentity HashID = 5
)

var hashNames = map[HashID]string{
	HashSHA1:     "SHA1",
	HashSHA256:   "SHA2_256",
	HashSHA384:   "SHA2_384",
	HashSHA512:   "SHA2_512",
	HashIdentity: "IDENTITY",
}

func (v HashID) String() string { return name(hashNames, v, "HashID") }

// TSType is the type of a traffic selector.
type TSType uint8

// Traffic selector types (RFC 7296, 3.13.1; RFC 4595; RFC 9478).
const (
	TSIPv4Range   TSType = 7
	TSIPv6Range   TSType = 8
	TSFCAddrRange TSType = 9
	TSSecLabel    TSType = 10
)

var tsTypeNames = map[TSType]string{
	TSIPv4Range:   "TS_IPV4_ADDR_RANGE",
	TSIPv6Range:   "TS_IPV6_ADDR_RANGE",
	TSFCAddrRange: "TS_FC_ADDR_RANGE",
	TSSecLabel:    "TS_SECLABEL",
}

func (v TSType) String() string { return name(tsTypeNames, v, "TSType") }

// CFGType is the type of a Configuration payload.
type CFGType uint8

// Configuration types (RFC 7296, 3.15).
const (
	CFGRequest CFGType = 1
	CFGReply   CFGType = 2
	CFGSet     CFGType = 3
	CFGAck     CFGType = 4
)

var cfgTypeNames = map[CFGType]string{
	CFGRequest: "CFG_REQUEST",
	CFGReply:   "CFG_REPLY",
	CFGSet:     "CFG_SET",
	CFGAck:     "CFG_ACK",
}

func (v CFGType) String() string { return name(cfgTypeNames, v, "CFGType") }

// ConfigType is the type of a configuration attribute.
type ConfigType uint16

// Configuration attributes (RFC 7296, 3.15.1; IANA).
const (
	ConfigIP4Address                    ConfigType = 1
	ConfigIP4Netmask                    ConfigType = 2
	ConfigIP4DNS                        ConfigType = 3
	ConfigIP4NBNS                       ConfigType = 4
	ConfigIP4DHCP                       ConfigType = 6
	ConfigApplicationVersion            ConfigType = 7
	ConfigIP6Address                    ConfigType = 8
	ConfigIP6DNS                        ConfigType = 10
	ConfigIP6DHCP                       ConfigType = 12
	ConfigIP4Subnet                     ConfigType = 13
	ConfigSupportedAttributes           ConfigType = 14
	ConfigIP6Subnet                     ConfigType = 15
	ConfigMIP6HomePrefix                ConfigType = 16
	ConfigIP6Link                       ConfigType = 17
	ConfigIP6Prefix                     ConfigType = 18
	ConfigHomeAgentAddress              ConfigType = 19
	ConfigPCSCFIP4Address               ConfigType = 20
	ConfigPCSCFIP6Address               ConfigType = 21
	ConfigFTTKat                        ConfigType = 22
	ConfigExternalSourceIP4NAT          ConfigType = 23
	ConfigTimeoutPeriodForLivenessCheck ConfigType = 24
	ConfigDNSDomain                     ConfigType = 25
	ConfigDNSSECTA                      ConfigType = 26
	ConfigENCDNSIP4                     ConfigType = 27
	ConfigENCDNSIP6                     ConfigType = 28
	ConfigENCDNSDigestInfo              ConfigType = 29
)

var configTypeNames = map[ConfigType]string{
	ConfigIP4Address:                    "INTERNAL_IP4_ADDRESS",
	ConfigIP4Netmask:                    "INTERNAL_IP4_NETMASK",
	ConfigIP4DNS:                        "INTERNAL_IP4_DNS",
	ConfigIP4NBNS:                       "INTERNAL_IP4_NBNS",
	ConfigIP4DHCP:                       "INTERNAL_IP4_DHCP",
	ConfigApplicationVersion:            "APPLICATION_VERSION",
	ConfigIP6Address:                    "INTERNAL_IP6_ADDRESS",
	ConfigIP6DNS:                        "INTERNAL_IP6_DNS",
	ConfigIP6DHCP:                       "INTERNAL_IP6_DHCP",
	ConfigIP4Subnet:                     "INTERNAL_IP4_SUBNET",
	ConfigSupportedAttributes:           "SUPPORTED_ATTRIBUTES",
	ConfigIP6Subnet:                     "INTERNAL_IP6_SUBNET",
	ConfigMIP6HomePrefix:                "MIP6_HOME_PREFIX",
	ConfigIP6Link:                       "INTERNAL_IP6_LINK",
	ConfigIP6Prefix:                     "INTERNAL_IP6_PREFIX",
	ConfigHomeAgentAddress:              "HOME_AGENT_ADDRESS",
	ConfigPCSCFIP4Address:               "P_CSCF_IP4_ADDRESS",
	ConfigPCSCFIP6Address:               "P_CSCF_IP6_ADDRESS",
	ConfigFTTKat:                        "FTT_KAT",
	ConfigExternalSourceIP4NAT:          "EXTERNAL_SOURCE_IP4_NAT_INFO",
	ConfigTimeoutPeriodForLivenessCheck: "TIMEOUT_PERIOD_FOR_LIVENESS_CHECK",
	ConfigDNSDomain:                     "INTERNAL_DNS_DOMAIN",
	ConfigDNSSECTA:                      "INTERNAL_DNSSEC_TA",
	ConfigENCDNSIP4:                     "ENCDNS_IP4",
	ConfigENCDNSIP6:                     "ENCDNS_IP6",
	ConfigENCDNSDigestInfo:              "ENCDNS_DIGEST_INFO",
}

func (v ConfigType) String() string { return name(configTypeNames, v, "ConfigType") }

// NotifyType is the type of a notification: an error below 16384, else a status.
type NotifyType uint16

// Notify message types (RFC 7296, 3.10.1; IANA).
const (
	UNSUPPORTED_CRITICAL_PAYLOAD NotifyType = 1
	INVALID_IKE_SPI              NotifyType = 4
	INVALID_MAJOR_VERSION        NotifyType = 5
	INVALID_SYNTAX               NotifyType = 7
	INVALID_MESSAGE_ID           NotifyType = 9
	INVALID_SPI                  NotifyType = 11
	NO_PROPOSAL_CHOSEN           NotifyType = 14
	INVALID_KE_PAYLOAD           NotifyType = 17
	AUTHENTICATION_FAILED        NotifyType = 24
	SINGLE_PAIR_REQUIRED         NotifyType = 34
	NO_ADDITIONAL_SAS            NotifyType = 35
	INTERNAL_ADDRESS_FAILURE     NotifyType = 36
	FAILED_CP_REQUIRED           NotifyType = 37
	TS_UNACCEPTABLE              NotifyType = 38
	INVALID_SELECTORS            NotifyType = 39
	UNACCEPTABLE_ADDRESSES       NotifyType = 40
	UNEXPECTED_NAT_DETECTED      NotifyType = 41
	USE_ASSIGNED_HoA             NotifyType = 42
	TEMPORARY_FAILURE            NotifyType = 43
	CHILD_SA_NOT_FOUND           NotifyType = 44
	INVALID_GROUP_ID             NotifyType = 45
	AUTHORIZATION_FAILED         NotifyType = 46
	STATE_NOT_FOUND              NotifyType = 47
	TS_MAX_QUEUE                 NotifyType = 48

	INITIAL_CONTACT                     NotifyType = 16384
	SET_WINDOW_SIZE                     NotifyType = 16385
	ADDITIONAL_TS_POSSIBLE              NotifyType = 16386
	IPCOMP_SUPPORTED                    NotifyType = 16387
	NAT_DETECTION_SOURCE_IP             NotifyType = 16388
	NAT_DETECTION_DESTINATION_IP        NotifyType = 16389
	COOKIE                              NotifyType = 16390
	USE_TRANSPORT_MODE                  NotifyType = 16391
	HTTP_CERT_LOOKUP_SUPPORTED          NotifyType = 16392
	REKEY_SA                            NotifyType = 16393
	ESP_TFC_PADDING_NOT_SUPPORTED       NotifyType = 16394
	NON_FIRST_FRAGMENTS_ALSO            NotifyType = 16395
	MOBIKE_SUPPORTED                    NotifyType = 16396
	ADDITIONAL_IP4_ADDRESS              NotifyType = 16397
	ADDITIONAL_IP6_ADDRESS              NotifyType = 16398
	NO_ADDITIONAL_ADDRESSES             NotifyType = 16399
	UPDATE_SA_ADDRESSES                 NotifyType = 16400
	COOKIE2                             NotifyType = 16401
	NO_NATS_ALLOWED                     NotifyType = 16402
	AUTH_LIFETIME                       NotifyType = 16403
	MULTIPLE_AUTH_SUPPORTED             NotifyType = 16404
	ANOTHER_AUTH_FOLLOWS                NotifyType = 16405
	REDIRECT_SUPPORTED                  NotifyType = 16406
	REDIRECT                            NotifyType = 16407
	REDIRECTED_FROM                     NotifyType = 16408
	TICKET_LT_OPAQUE                    NotifyType = 16409
	TICKET_REQUEST                      NotifyType = 16410
	TICKET_ACK                          NotifyType = 16411
	TICKET_NACK                         NotifyType = 16412
	TICKET_OPAQUE                       NotifyType = 16413
	LINK_ID                             NotifyType = 16414
	USE_WESP_MODE                       NotifyType = 16415
	ROHC_SUPPORTED                      NotifyType = 16416
	EAP_ONLY_AUTHENTICATION             NotifyType = 16417
	CHILDLESS_IKEV2_SUPPORTED           NotifyType = 16418
	QUICK_CRASH_DETECTION               NotifyType = 16419
	IKEV2_MESSAGE_ID_SYNC_SUPPORTED     NotifyType = 16420
	IPSEC_REPLAY_COUNTER_SYNC_SUPPORTED NotifyType = 16421
	IKEV2_MESSAGE_ID_SYNC               NotifyType = 16422
	IPSEC_REPLAY_COUNTER_SYNC           NotifyType = 16423
	SECURE_PASSWORD_METHODS             NotifyType = 16424
	PSK_PERSIST                         NotifyType = 16425
	PSK_CONFIRM                         NotifyType = 16426
	ERX_SUPPORTED                       NotifyType = 16427
	IFOM_CAPABILITY                     NotifyType = 16428
	SENDER_REQUEST_ID                   NotifyType = 16429
	IKEV2_FRAGMENTATION_SUPPORTED       NotifyType = 16430
	SIGNATURE_HASH_ALGORITHMS           NotifyType = 16431
	CLONE_IKE_SA_SUPPORTED              NotifyType = 16432
	CLONE_IKE_SA                        NotifyType = 16433
	PUZZLE                              NotifyType = 16434
	USE_PPK                             NotifyType = 16435
	PPK_IDENTITY                        NotifyType = 16436
	NO_PPK_AUTH                         NotifyType = 16437
	INTERMEDIATE_EXCHANGE_SUPPORTED     NotifyType = 16438
	IP4_ALLOWED                         NotifyType = 16439
	IP6_ALLOWED                         NotifyType = 16440
	ADDITIONAL_KEY_EXCHANGE             NotifyType = 16441
	USE_AGGFRAG                         NotifyType = 16442
	SUPPORTED_AUTH_METHODS              NotifyType = 16443
	SA_RESOURCE_INFO                    NotifyType = 16444
	USE_PPK_INT                         NotifyType = 16445
	PPK_IDENTITY_KEY                    NotifyType = 16446
)

var notifyTypeNames = map[NotifyType]string{
	UNSUPPORTED_CRITICAL_PAYLOAD:        "UNSUPPORTED_CRITICAL_PAYLOAD",
	INVALID_IKE_SPI:                     "INVALID_IKE_SPI",
	INVALID_MAJOR_VERSION:               "INVALID_MAJOR_VERSION",
	INVALID_SYNTAX:                      "INVALID_SYNTAX",
	INVALID_MESSAGE_ID:                  "INVALID_MESSAGE_ID",
	INVALID_SPI:                         "INVALID_SPI",
	NO_PROPOSAL_CHOSEN:                  "NO_PROPOSAL_CHOSEN",
	INVALID_KE_PAYLOAD:                  "INVALID_KE_PAYLOAD",
	AUTHENTICATION_FAILED:               "AUTHENTICATION_FAILED",
	SINGLE_PAIR_REQUIRED:                "SINGLE_PAIR_REQUIRED",
	NO_ADDITIONAL_SAS:                   "NO_ADDITIONAL_SAS",
	INTERNAL_ADDRESS_FAILURE:            "INTERNAL_ADDRESS_FAILURE",
	FAILED_CP_REQUIRED:                  "FAILED_CP_REQUIRED",
	TS_UNACCEPTABLE:                     "TS_UNACCEPTABLE",
	INVALID_SELECTORS:                   "INVALID_SELECTORS",
	UNACCEPTABLE_ADDRESSES:              "UNACCEPTABLE_ADDRESSES",
	UNEXPECTED_NAT_DETECTED:             "UNEXPECTED_NAT_DETECTED",
	USE_ASSIGNED_HoA:                    "USE_ASSIGNED_HoA",
	TEMPORARY_FAILURE:                   "TEMPORARY_FAILURE",
	CHILD_SA_NOT_FOUND:                  "CHILD_SA_NOT_FOUND",
	INVALID_GROUP_ID:                    "INVALID_GROUP_ID",
	AUTHORIZATION_FAILED:                "AUTHORIZATION_FAILED",
	STATE_NOT_FOUND:                     "STATE_NOT_FOUND",
	TS_MAX_QUEUE:                        "TS_MAX_QUEUE",
	INITIAL_CONTACT:                     "INITIAL_CONTACT",
	SET_WINDOW_SIZE:                     "SET_WINDOW_SIZE",
	ADDITIONAL_TS_POSSIBLE:              "ADDITIONAL_TS_POSSIBLE",
	IPCOMP_SUPPORTED:                    "IPCOMP_SUPPORTED",
	NAT_DETECTION_SOURCE_IP:             "NAT_DETECTION_SOURCE_IP",
	NAT_DETECTION_DESTINATION_IP:        "NAT_DETECTION_DESTINATION_IP",
	COOKIE:                              "COOKIE",
	USE_TRANSPORT_MODE:                  "USE_TRANSPORT_MODE",
	HTTP_CERT_LOOKUP_SUPPORTED:          "HTTP_CERT_LOOKUP_SUPPORTED",
	REKEY_SA:                            "REKEY_SA",
	ESP_TFC_PADDING_NOT_SUPPORTED:       "ESP_TFC_PADDING_NOT_SUPPORTED",
	NON_FIRST_FRAGMENTS_ALSO:            "NON_FIRST_FRAGMENTS_ALSO",
	MOBIKE_SUPPORTED:                    "MOBIKE_SUPPORTED",
	ADDITIONAL_IP4_ADDRESS:              "ADDITIONAL_IP4_ADDRESS",
	ADDITIONAL_IP6_ADDRESS:              "ADDITIONAL_IP6_ADDRESS",
	NO_ADDITIONAL_ADDRESSES:             "NO_ADDITIONAL_ADDRESSES",
	UPDATE_SA_ADDRESSES:                 "UPDATE_SA_ADDRESSES",
	COOKIE2:                             "COOKIE2",
	NO_NATS_ALLOWED:                     "NO_NATS_ALLOWED",
	AUTH_LIFETIME:                       "AUTH_LIFETIME",
	MULTIPLE_AUTH_SUPPORTED:             "MULTIPLE_AUTH_SUPPORTED",
	ANOTHER_AUTH_FOLLOWS:                "ANOTHER_AUTH_FOLLOWS",
	REDIRECT_SUPPORTED:                  "REDIRECT_SUPPORTED",
	REDIRECT:                            "REDIRECT",
	REDIRECTED_FROM:                     "REDIRECTED_FROM",
	TICKET_LT_OPAQUE:                    "TICKET_LT_OPAQUE",
	TICKET_REQUEST:                      "TICKET_REQUEST",
	TICKET_ACK:                          "TICKET_ACK",
	TICKET_NACK:                         "TICKET_NACK",
	TICKET_OPAQUE:                       "TICKET_OPAQUE",
	LINK_ID:                             "LINK_ID",
	USE_WESP_MODE:                       "USE_WESP_MODE",
	ROHC_SUPPORTED:                      "ROHC_SUPPORTED",
	EAP_ONLY_AUTHENTICATION:             "EAP_ONLY_AUTHENTICATION",
	CHILDLESS_IKEV2_SUPPORTED:           "CHILDLESS_IKEV2_SUPPORTED",
	QUICK_CRASH_DETECTION:               "QUICK_CRASH_DETECTION",
	IKEV2_MESSAGE_ID_SYNC_SUPPORTED:     "IKEV2_MESSAGE_ID_SYNC_SUPPORTED",
	IPSEC_REPLAY_COUNTER_SYNC_SUPPORTED: "IPSEC_REPLAY_COUNTER_SYNC_SUPPORTED",
	IKEV2_MESSAGE_ID_SYNC:               "IKEV2_MESSAGE_ID_SYNC",
	IPSEC_REPLAY_COUNTER_SYNC:           "IPSEC_REPLAY_COUNTER_SYNC",
	SECURE_PASSWORD_METHODS:             "SECURE_PASSWORD_METHODS",
	PSK_PERSIST:                         "PSK_PERSIST",
	PSK_CONFIRM:                         "PSK_CONFIRM",
	ERX_SUPPORTED:                       "ERX_SUPPORTED",
	IFOM_CAPABILITY:                     "IFOM_CAPABILITY",
	SENDER_REQUEST_ID:                   "SENDER_REQUEST_ID",
	IKEV2_FRAGMENTATION_SUPPORTED:       "IKEV2_FRAGMENTATION_SUPPORTED",
	SIGNATURE_HASH_ALGORITHMS:           "SIGNATURE_HASH_ALGORITHMS",
	CLONE_IKE_SA_SUPPORTED:              "CLONE_IKE_SA_SUPPORTED",
	CLONE_IKE_SA:                        "CLONE_IKE_SA",
	PUZZLE:                              "PUZZLE",
	USE_PPK:                             "USE_PPK",
	PPK_IDENTITY:                        "PPK_IDENTITY",
	NO_PPK_AUTH:                         "NO_PPK_AUTH",
	INTERMEDIATE_EXCHANGE_SUPPORTED:     "INTERMEDIATE_EXCHANGE_SUPPORTED",
	IP4_ALLOWED:                         "IP4_ALLOWED",
	IP6_ALLOWED:                         "IP6_ALLOWED",
	ADDITIONAL_KEY_EXCHANGE:             "ADDITIONAL_KEY_EXCHANGE",
	USE_AGGFRAG:                         "USE_AGGFRAG",
	SUPPORTED_AUTH_METHODS:              "SUPPORTED_AUTH_METHODS",
	SA_RESOURCE_INFO:                    "SA_RESOURCE_INFO",
	USE_PPK_INT:                         "USE_PPK_INT",
	PPK_IDENTITY_KEY:                    "PPK_IDENTITY_KEY",
}

func (v NotifyType) String() string { return name(notifyTypeNames, v, "NotifyType") }

func name[T ~uint8 | ~uint16](names map[T]string, v T, typ string) string {
	if s, ok := names[v]; ok {
		return s
	}
	return fmt.Sprintf("%s(%d)", typ, uint16(v))
}

// IsError reports whether t reports an error; unknown ones count (RFC 7296, 3.10.1).
func (t NotifyType) IsError() bool { return t < INITIAL_CONTACT }
