package pfkey

import "syscall"

const (
	einval   = syscall.EINVAL
	emsgsize = syscall.EMSGSIZE
)

// order is the one in which extensions are written: each known type once.
var order = []ExtType{
	ExtSA, ExtXSA2, ExtLifetimeCurrent, ExtLifetimeSoft, ExtLifetimeHard, ExtXPolicy,
	ExtAddressSrc, ExtAddressDst, ExtAddressProxy, ExtKeyEncrypt, ExtKeyAuth,
	ExtIdentitySrc, ExtIdentityDst, ExtSensitivity, ExtProposal, ExtSupportedAuth, ExtSupportedEncrypt,
	ExtSPIRange, ExtXKMPrivate, ExtXNATTType, ExtXNATTSPort, ExtXNATTDPort, ExtXNATTOA,
	ExtXSecCtx, ExtXKMAddress, ExtXFilter,
	ExtXOptIn, ExtXSAMore, ExtXTSSrc, ExtXTSDst, ExtXFlow, ExtXSADst, ExtXBlob, ExtXCount, ExtXPolicyMore, ExtXShapes,
	ExtXSASeq, ExtXIdle, ExtXQueue, ExtXHomeSrc, ExtXHomeDst, ExtXSACPI,
}

// A body is what one extension does with its octets. decode gets the whole
// extension; append adds what follows the four octets of its header, padding
// excepted.
type body[T any] interface {
	*T
	decode(b []byte) error
	append(b []byte) ([]byte, error)
}

// A slot is the place of an extension in a Message.
type slot interface {
	decode(b []byte) error
	append(b []byte) ([]byte, error)
}

type field[T any, P body[T]] struct {
	p   **T
	min int // octets of the fixed part
}

func at[T any, P body[T]](p **T, min int, has bool) slot {
	if has && *p == nil {
		return nil
	}
	return field[T, P]{p, min}
}

func (f field[T, P]) decode(b []byte) error {
	if len(b) < f.min {
		return invalid("%d octets, want at least %d", len(b), f.min)
	}
	v := new(T)
	if err := P(v).decode(b); err != nil {
		return err
	}
	*f.p = v
	return nil
}

func (f field[T, P]) append(b []byte) ([]byte, error) { return P(*f.p).append(b) }

// slot returns the place of the extension t in m, nil if t is unknown or, with
// has, if m has none.
func (m *Message) slot(t ExtType, has bool) slot {
	switch t {
	case ExtSA:
		return at(&m.SA, 16, has)
	case ExtLifetimeCurrent:
		return at(&m.Current, 32, has)
	case ExtLifetimeHard:
		return at(&m.Hard, 32, has)
	case ExtLifetimeSoft:
		return at(&m.Soft, 32, has)
	case ExtAddressSrc:
		return at(&m.Src, 8, has)
	case ExtAddressDst:
		return at(&m.Dst, 8, has)
	case ExtAddressProxy:
		return at(&m.Proxy, 8, has)
	case ExtKeyAuth:
		return at(&m.AuthKey, 8, has)
	case ExtKeyEncrypt:
		return at(&m.EncrKey, 8, has)
	case ExtIdentitySrc:
		return at(&m.IdentSrc, 16, has)
	case ExtIdentityDst:
		return at(&m.IdentDst, 16, has)
	case ExtSensitivity:
		return at(&m.Sensitivity, 16, has)
	case ExtProposal:
		return at(&m.Proposal, 8, has)
	case ExtSupportedAuth:
		return at(&m.SupportedAuth, 8, has)
	case ExtSupportedEncrypt:
		return at(&m.SupportedEncr, 8, has)
	case ExtSPIRange:
		return at(&m.SPIRange, 16, has)
	case ExtXKMPrivate:
		return at(&m.KMPrivate, 8, has)
	case ExtXPolicy:
		return at(&m.Policy, 16, has)
	case ExtXSA2:
		return at(&m.SA2, 16, has)
	case ExtXNATTType:
		return at(&m.NATT, 8, has)
	case ExtXNATTSPort:
		return at(&m.NATTSPort, 8, has)
	case ExtXNATTDPort:
		return at(&m.NATTDPort, 8, has)
	case ExtXNATTOA:
		return at(&m.NATTOA, 8, has)
	case ExtXSecCtx:
		return at(&m.SecCtx, 8, has)
	case ExtXKMAddress:
		return at(&m.KMAddress, 8, has)
	case ExtXFilter:
		return at(&m.Filter, 40, has)
	case ExtXOptIn:
		return at(&m.OptIn, 8, has)
	case ExtXSAMore:
		return at(&m.SAMore, 40, has)
	case ExtXTSSrc:
		return at(&m.TSSrc, 8, has)
	case ExtXTSDst:
		return at(&m.TSDst, 8, has)
	case ExtXFlow:
		return at(&m.Flow, 48, has)
	case ExtXSADst:
		return at(&m.SADst, 8, has)
	case ExtXBlob:
		return at(&m.Blob, 16, has)
	case ExtXCount:
		return at(&m.Count, 16, has)
	case ExtXPolicyMore:
		return at(&m.PolicyMore, 16, has)
	case ExtXShapes:
		return at(&m.Shapes, 8, has)
	case ExtXSASeq:
		return at(&m.SASeq, 16, has)
	case ExtXIdle:
		return at(&m.Idle, 32, has)
	case ExtXQueue:
		return at(&m.Queue, 8, has)
	case ExtXHomeSrc:
		return at(&m.HomeSrc, 8, has)
	case ExtXHomeDst:
		return at(&m.HomeDst, 8, has)
	case ExtXSACPI:
		return at(&m.SACPI, 16, has)
	}
	return nil
}
