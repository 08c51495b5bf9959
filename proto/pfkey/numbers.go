package pfkey

import "strconv"

// Version is PF_KEY_V2.
const Version = 2

// MsgType is the type of a message.
type MsgType uint8

// Message types (RFC 2367, 3.1; from 13 on Linux and KAME).
const (
	Reserved         MsgType = 0
	GetSPI           MsgType = 1
	Update           MsgType = 2
	Add              MsgType = 3
	Delete           MsgType = 4
	Get              MsgType = 5
	Acquire          MsgType = 6
	Register         MsgType = 7
	Expire           MsgType = 8
	Flush            MsgType = 9
	Dump             MsgType = 10
	XPromisc         MsgType = 11
	XPChange         MsgType = 12
	XSPDUpdate       MsgType = 13
	XSPDAdd          MsgType = 14
	XSPDDelete       MsgType = 15
	XSPDGet          MsgType = 16
	XSPDAcquire      MsgType = 17
	XSPDDump         MsgType = 18
	XSPDFlush        MsgType = 19
	XSPDSetIdx       MsgType = 20
	XSPDExpire       MsgType = 21
	XSPDDelete2      MsgType = 22
	XNATTNewMapping  MsgType = 23
	XMigrate         MsgType = 24
	maxPublicMsgType         = XMigrate
)

// Private message types of missiu; see the package documentation.
const (
	XBegin        MsgType = 224
	XCommit       MsgType = 225
	XAbort        MsgType = 226
	XStatus       MsgType = 227
	XLost         MsgType = 228
	XAddrAdd      MsgType = 229
	XAddrDelete   MsgType = 230
	minPrivateMsg         = XBegin
	maxPrivateMsg         = XAddrDelete
)

var msgNames = map[MsgType]string{
	Reserved: "RESERVED", GetSPI: "GETSPI", Update: "UPDATE", Add: "ADD", Delete: "DELETE", Get: "GET",
	Acquire: "ACQUIRE", Register: "REGISTER", Expire: "EXPIRE", Flush: "FLUSH", Dump: "DUMP",
	XPromisc: "X_PROMISC", XPChange: "X_PCHANGE", XSPDUpdate: "X_SPDUPDATE", XSPDAdd: "X_SPDADD",
	XSPDDelete: "X_SPDDELETE", XSPDGet: "X_SPDGET", XSPDAcquire: "X_SPDACQUIRE", XSPDDump: "X_SPDDUMP",
	XSPDFlush: "X_SPDFLUSH", XSPDSetIdx: "X_SPDSETIDX", XSPDExpire: "X_SPDEXPIRE",
	XSPDDelete2: "X_SPDDELETE2", XNATTNewMapping: "X_NAT_T_NEW_MAPPING", XMigrate: "X_MIGRATE",
	XBegin: "X_BEGIN", XCommit: "X_COMMIT", XAbort: "X_ABORT", XStatus: "X_STATUS", XLost: "X_LOST",
	XAddrAdd: "X_ADDRADD", XAddrDelete: "X_ADDRDELETE",
}

func (t MsgType) String() string { return name(msgNames, t, "MsgType") }

// Valid reports whether t is a message type that exists, private ones included.
func (t MsgType) Valid() bool {
	return 0 < t && t <= maxPublicMsgType || minPrivateMsg <= t && t <= maxPrivateMsg
}

// Private reports whether t is a message of missiu's own.
func (t MsgType) Private() bool { return t >= minPrivateMsg }

// SAType is the type of SA that a message is about.
type SAType uint8

// SA types (RFC 2367, 3.3).
const (
	SATypeUnspec SAType = 0 // all
	SATypeAH     SAType = 2
	SATypeESP    SAType = 3
	SATypeRSVP   SAType = 5
	SATypeOSPFv2 SAType = 6
	SATypeRIPv2  SAType = 7
	SATypeMIP    SAType = 8
	SATypeIPComp SAType = 9
	MaxSAType           = SATypeIPComp
)

var saTypeNames = map[SAType]string{
	SATypeUnspec: "UNSPEC", SATypeAH: "AH", SATypeESP: "ESP", SATypeRSVP: "RSVP", SATypeOSPFv2: "OSPFV2",
	SATypeRIPv2: "RIPV2", SATypeMIP: "MIP", SATypeIPComp: "IPCOMP",
}

func (t SAType) String() string { return name(saTypeNames, t, "SAType") }

// ExtType is the type of an extension.
type ExtType uint16

// Extension types (RFC 2367, 3.1; from 17 on Linux).
const (
	ExtReserved         ExtType = 0
	ExtSA               ExtType = 1
	ExtLifetimeCurrent  ExtType = 2
	ExtLifetimeHard     ExtType = 3
	ExtLifetimeSoft     ExtType = 4
	ExtAddressSrc       ExtType = 5
	ExtAddressDst       ExtType = 6
	ExtAddressProxy     ExtType = 7
	ExtKeyAuth          ExtType = 8
	ExtKeyEncrypt       ExtType = 9
	ExtIdentitySrc      ExtType = 10
	ExtIdentityDst      ExtType = 11
	ExtSensitivity      ExtType = 12
	ExtProposal         ExtType = 13
	ExtSupportedAuth    ExtType = 14
	ExtSupportedEncrypt ExtType = 15
	ExtSPIRange         ExtType = 16
	ExtXKMPrivate       ExtType = 17
	ExtXPolicy          ExtType = 18
	ExtXSA2             ExtType = 19
	ExtXNATTType        ExtType = 20
	ExtXNATTSPort       ExtType = 21
	ExtXNATTDPort       ExtType = 22
	ExtXNATTOA          ExtType = 23
	ExtXSecCtx          ExtType = 24
	ExtXKMAddress       ExtType = 25
	ExtXFilter          ExtType = 26
	maxPublicExt                = ExtXFilter
)

// Private extension types of missiu; see the package documentation.
const (
	ExtXOptIn  ExtType = 0x8001
	ExtXSAMore ExtType = 0x8002
	ExtXTSSrc  ExtType = 0x8003
	ExtXTSDst  ExtType = 0x8004
	ExtXFlow   ExtType = 0x8005
	ExtXSADst  ExtType = 0x8006
	ExtXBlob   ExtType = 0x8007
	ExtXCount  ExtType = 0x8008

	ExtXPolicyMore ExtType = 0x8009
	ExtXShapes     ExtType = 0x800a
	ExtXSASeq      ExtType = 0x800b
	ExtXIdle       ExtType = 0x800c
	ExtXQueue      ExtType = 0x800d
	ExtXHomeSrc    ExtType = 0x800e
	ExtXHomeDst    ExtType = 0x800f
	ExtXSACPI      ExtType = 0x8010
)

var extNames = map[ExtType]string{
	ExtReserved: "RESERVED", ExtSA: "SA", ExtLifetimeCurrent: "LIFETIME_CURRENT",
	ExtLifetimeHard: "LIFETIME_HARD", ExtLifetimeSoft: "LIFETIME_SOFT", ExtAddressSrc: "ADDRESS_SRC",
	ExtAddressDst: "ADDRESS_DST", ExtAddressProxy: "ADDRESS_PROXY", ExtKeyAuth: "KEY_AUTH",
	ExtKeyEncrypt: "KEY_ENCRYPT", ExtIdentitySrc: "IDENTITY_SRC", ExtIdentityDst: "IDENTITY_DST",
	ExtSensitivity: "SENSITIVITY", ExtProposal: "PROPOSAL", ExtSupportedAuth: "SUPPORTED_AUTH",
	ExtSupportedEncrypt: "SUPPORTED_ENCRYPT", ExtSPIRange: "SPIRANGE", ExtXKMPrivate: "X_KMPRIVATE",
	ExtXPolicy: "X_POLICY", ExtXSA2: "X_SA2", ExtXNATTType: "X_NAT_T_TYPE", ExtXNATTSPort: "X_NAT_T_SPORT",
	ExtXNATTDPort: "X_NAT_T_DPORT", ExtXNATTOA: "X_NAT_T_OA", ExtXSecCtx: "X_SEC_CTX",
	ExtXKMAddress: "X_KMADDRESS", ExtXFilter: "X_FILTER",
	ExtXOptIn: "X_OPT_IN", ExtXSAMore: "X_SA_MORE", ExtXTSSrc: "X_TS_SRC", ExtXTSDst: "X_TS_DST",
	ExtXFlow: "X_FLOW", ExtXSADst: "X_SA_DST", ExtXBlob: "X_BLOB", ExtXCount: "X_COUNT",
	ExtXPolicyMore: "X_POLICY_MORE",
	ExtXShapes:     "X_SHAPES",
	ExtXSASeq:      "X_SA_SEQ",
	ExtXIdle:       "X_LIFETIME_IDLE",
	ExtXQueue:      "X_QUEUE",
	ExtXHomeSrc:    "X_HOME_SRC",
	ExtXHomeDst:    "X_HOME_DST",
	ExtXSACPI:      "X_SA_CPI",
}

func (t ExtType) String() string { return name(extNames, t, "ExtType") }

// Private reports whether t is an extension of missiu's own.
func (t ExtType) Private() bool { return t >= ExtXOptIn }

// SAState is the state of an SA.
type SAState uint8

// SA states (RFC 2367, 2.3.1).
const (
	StateLarval SAState = 0
	StateMature SAState = 1
	StateDying  SAState = 2
	StateDead   SAState = 3
)

var stateNames = map[SAState]string{
	StateLarval: "LARVAL", StateMature: "MATURE", StateDying: "DYING", StateDead: "DEAD",
}

func (s SAState) String() string { return name(stateNames, s, "SAState") }

// SA flags. Unknown ones are to be ignored.
const (
	FlagPFS        = 0x1        // RFC 2367; KAME: old format
	FlagXCyclicSeq = 0x40       // KAME
	FlagXESN       = 0x400      // FreeBSD
	FlagNoPMTUDisc = 0x20000000 // Linux
	FlagDecapDSCP  = 0x40000000 // Linux
	FlagNoECN      = 0x80000000 // Linux
)

// AnyProto is the upper protocol "any" in an ADDRESS extension, as is 0.
const AnyProto = 255

// MaxSecCtxLen is the longest context of X_SEC_CTX in octets.
const MaxSecCtxLen = 4096

// IP protocols of requests in X_POLICY, and how many of those there may be.
const (
	protoESP    = 50
	protoAH     = 51
	protoIPComp = 108
	maxRequests = 6
)

// Families and lengths in octets of Linux's sockaddrs.
const (
	familyIPv4     = 2
	familyIPv6     = 10
	lenSockaddrIn  = 16
	lenSockaddrIn6 = 28
)

// Lengths in octets.
const (
	wordLen         = 8 // the unit of length fields
	lenHeader       = 16
	lenReqHeader    = 16
	lenComb         = 72
	lenTSEntry      = 40
	lenShape        = 8
	maxMessageWords = 0xffff
)

// Mode is the mode of an SA in X_SA2 and in requests of X_POLICY.
type Mode uint8

// Modes.
const (
	ModeAny       Mode = 0
	ModeTransport Mode = 1
	ModeTunnel    Mode = 2
	ModeBEET      Mode = 3
)

var modeNames = map[Mode]string{
	ModeAny: "any", ModeTransport: "transport", ModeTunnel: "tunnel", ModeBEET: "beet",
}

func (m Mode) String() string { return name(modeNames, m, "Mode") }

// Dir is the direction of a policy.
type Dir uint8

// Directions.
const (
	DirIn  Dir = 1
	DirOut Dir = 2
	DirFwd Dir = 3
)

var dirNames = map[Dir]string{DirIn: "in", DirOut: "out", DirFwd: "fwd"}

func (d Dir) String() string { return name(dirNames, d, "Dir") }

// PolicyType is what a policy does.
type PolicyType uint16

// Policy types; Entrust and Bypass exist only for policies of sockets.
const (
	PolicyDiscard PolicyType = 0
	PolicyNone    PolicyType = 1
	PolicyIPsec   PolicyType = 2
	PolicyEntrust PolicyType = 3
	PolicyBypass  PolicyType = 4
)

var policyNames = map[PolicyType]string{
	PolicyDiscard: "discard", PolicyNone: "none", PolicyIPsec: "ipsec", PolicyEntrust: "entrust", PolicyBypass: "bypass",
}

func (t PolicyType) String() string { return name(policyNames, t, "PolicyType") }

// Level says how much a request of a policy is wanted.
type Level uint8

// Levels.
const (
	LevelDefault Level = 0
	LevelUse     Level = 1
	LevelRequire Level = 2
	LevelUnique  Level = 3
)

var levelNames = map[Level]string{
	LevelDefault: "default", LevelUse: "use", LevelRequire: "require", LevelUnique: "unique",
}

func (l Level) String() string { return name(levelNames, l, "Level") }

// IdentityType is the type of an identity.
type IdentityType uint16

// Identity types (RFC 2367, 3.5).
const (
	IdentReserved IdentityType = 0
	IdentPrefix   IdentityType = 1
	IdentFQDN     IdentityType = 2
	IdentUserFQDN IdentityType = 3
)

var identNames = map[IdentityType]string{
	IdentReserved: "RESERVED", IdentPrefix: "PREFIX", IdentFQDN: "FQDN", IdentUserFQDN: "USERFQDN",
}

func (t IdentityType) String() string { return name(identNames, t, "IdentityType") }

// NATTType is the type of UDP encapsulation.
type NATTType uint8

// UDP encapsulations; NonIKE is that of an obsolete draft.
const (
	NATTNone   NATTType = 0
	NATTNonIKE NATTType = 1
	NATTESP    NATTType = 2 // RFC 3948
)

var nattNames = map[NATTType]string{
	NATTNone: "none", NATTNonIKE: "espinudp-nonike", NATTESP: "espinudp",
}

func (t NATTType) String() string { return name(nattNames, t, "NATTType") }

func name[T ~uint8 | ~uint16](names map[T]string, v T, kind string) string {
	if s, ok := names[v]; ok {
		return s
	}
	return kind + "(" + strconv.Itoa(int(v)) + ")"
}
