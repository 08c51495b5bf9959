package keysock

import (
	"syscall"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// The numbers of SADB for our algorithms. A test walks the lists of alg.
var encrNumbers = map[alg.Encr]pfkey.EncrAlg{
	alg.EncrNone:                pfkey.EncrNone,
	alg.EncrNULL:                pfkey.EncrNULL,
	alg.EncrAESCBC:              pfkey.EncrAESCBC,
	alg.EncrAESGCM8:             pfkey.EncrAESGCM8,
	alg.EncrAESGCM12:            pfkey.EncrAESGCM12,
	alg.EncrAESGCM16:            pfkey.EncrAESGCM16,
	alg.EncrChaCha20Poly1305:    pfkey.EncrChaCha20Poly1305,
	alg.EncrAESCTR:              pfkey.EncrAESCTR,
	alg.EncrAESCCM8:             pfkey.EncrAESCCM8,
	alg.EncrAESCCM12:            pfkey.EncrAESCCM12,
	alg.EncrAESCCM16:            pfkey.EncrAESCCM16,
	alg.EncrNULLAESGMAC:         pfkey.EncrNULLAESGMAC,
	alg.EncrAESCCM8IIV:          pfkey.EncrAESCCMICV8IIV,
	alg.EncrAESGCM16IIV:         pfkey.EncrAESGCMICV16IIV,
	alg.EncrChaCha20Poly1305IIV: pfkey.EncrChaCha20Poly1305IIV,
	alg.EncrDESCBC:              pfkey.EncrDESCBC,
	alg.Encr3DESCBC:             pfkey.Encr3DESCBC,
	alg.EncrDESIV64:             pfkey.EncrDESIV64,
	alg.EncrDESIV32:             pfkey.EncrDESIV32,
	alg.Encr3DESIV64:            pfkey.Encr3DESIV64,
	alg.Encr3DESIV32:            pfkey.Encr3DESIV32,
}

var integNumbers = map[alg.Integ]pfkey.AuthAlg{
	alg.IntegNone:       pfkey.AuthNone,
	alg.IntegHMACSHA1:   pfkey.AuthHMACSHA1,
	alg.IntegHMACSHA256: pfkey.AuthHMACSHA256,
	alg.IntegHMACSHA384: pfkey.AuthHMACSHA384,
	alg.IntegHMACSHA512: pfkey.AuthHMACSHA512,
	alg.IntegAESXCBC:    pfkey.AuthAESXCBCMAC,
	alg.IntegAESCMAC:    pfkey.AuthAESCMAC,
	alg.IntegAESGMAC128: pfkey.AuthAES128GMAC,
	alg.IntegAESGMAC192: pfkey.AuthAES192GMAC,
	alg.IntegAESGMAC256: pfkey.AuthAES256GMAC,
	alg.IntegHMACMD5:    pfkey.AuthHMACMD5,
	alg.IntegKeyedMD5:   pfkey.AuthKeyedMD5,
}

var (
	encrByNumber  = invert(encrNumbers)
	integByNumber = func() map[pfkey.AuthAlg]alg.Integ {
		m := invert(integNumbers)
		m[pfkey.AuthNULL] = alg.IntegNone
		return m
	}()
)

func invert[K, V comparable](m map[K]V) map[V]K {
	r := make(map[V]K, len(m))
	for k, v := range m {
		r[v] = k
	}
	return r
}

// encrFromWire: EINVAL above the largest number there is, ENOSYS for one that
// we do not have.
func encrFromWire(n pfkey.EncrAlg) (alg.Encr, error) {
	if n > pfkey.MaxEncrAlg {
		return 0, refuse(syscall.EINVAL, "encryption algorithm %d", uint8(n))
	}
	e, ok := encrByNumber[n]
	if !ok {
		return 0, refuse(syscall.ENOSYS, "encryption algorithm %v", n)
	}
	return e, nil
}

// CPIs, the SPIs of IPComp (RFC 3173, 3.3): that of DEFLATE, and the largest.
const (
	wellKnownDeflate ipsec.SPI = 2
	maxCPI           ipsec.SPI = 65535
)

// compFromWire checks the compression algorithm of an IPComp SA, which stands
// in the place of the encryption algorithm; of a larval one it is none.
func compFromWire(n pfkey.CompAlg) error {
	switch {
	case n > pfkey.MaxCompAlg:
		return refuse(syscall.EINVAL, "compression algorithm %d", uint8(n))
	case n != pfkey.CompDeflate && n != pfkey.CompNone:
		return refuse(syscall.ENOSYS, "compression algorithm %v", n)
	}
	return nil
}

func integFromWire(n pfkey.AuthAlg) (alg.Integ, error) {
	if n > pfkey.MaxAuthAlg {
		return 0, refuse(syscall.EINVAL, "authentication algorithm %d", uint8(n))
	}
	a, ok := integByNumber[n]
	if !ok {
		return 0, refuse(syscall.ENOSYS, "authentication algorithm %v", n)
	}
	return a, nil
}

func encrToWire(e alg.Encr) (pfkey.EncrAlg, error) {
	n, ok := encrNumbers[e]
	if !ok {
		return 0, refuse(syscall.ENOSYS, "no PF_KEY number for %v", e)
	}
	return n, nil
}

func integToWire(a alg.Integ) (pfkey.AuthAlg, error) {
	n, ok := integNumbers[a]
	if !ok {
		return 0, refuse(syscall.ENOSYS, "no PF_KEY number for %v", a)
	}
	return n, nil
}

// supportedToWire lists algorithms as REGISTER's answer has them; NULL
// authentication is what ESP without integrity is called there.
func supportedToWire(s Supported) (auth, encr *pfkey.Supported) {
	auth = &pfkey.Supported{Algs: []pfkey.Alg{{ID: uint8(pfkey.AuthNULL)}}}
	for _, a := range s.Auth {
		if n, err := integToWire(a); err == nil {
			bits := uint16(a.Info().KeyLen * 8)
			auth.Algs = append(auth.Algs, pfkey.Alg{ID: uint8(n), MinBits: bits, MaxBits: bits})
		}
	}
	encr = &pfkey.Supported{}
	for _, e := range s.Encr {
		n, err := encrToWire(e)
		if err != nil {
			continue
		}
		i := e.Info()
		a := pfkey.Alg{ID: uint8(n), IVLen: uint8(i.IVLen)}
		for k, bits := range i.KeyBits {
			b := uint16(bits + 8*i.SaltLen)
			if k == 0 || b < a.MinBits {
				a.MinBits = b
			}
			a.MaxBits = max(a.MaxBits, b)
		}
		encr.Algs = append(encr.Algs, a)
	}
	return auth, encr
}

func supportedFromWire(auth, encr *pfkey.Supported) Supported {
	var s Supported
	if auth != nil {
		for _, a := range auth.Algs {
			if v, err := integFromWire(pfkey.AuthAlg(a.ID)); err == nil && v != alg.IntegNone {
				s.Auth = append(s.Auth, v)
			}
		}
	}
	if encr != nil {
		for _, a := range encr.Algs {
			if v, err := encrFromWire(pfkey.EncrAlg(a.ID)); err == nil && v != alg.EncrNone {
				s.Encr = append(s.Encr, v)
			}
		}
	}
	return s
}

// saTypeOf returns the SA type of a protocol; 0 is all of them.
func saTypeOf(p ipsec.Protocol) (pfkey.SAType, error) {
	switch p {
	case 0:
		return pfkey.SATypeUnspec, nil
	case ipsec.ESP:
		return pfkey.SATypeESP, nil
	case ipsec.AH:
		return pfkey.SATypeAH, nil
	case ipsec.IPComp:
		return pfkey.SATypeIPComp, nil
	}
	return 0, refuse(syscall.EINVAL, "%v", p)
}

// protoOf is the reverse of saTypeOf; EINVAL for types that no SA here has.
func protoOf(t pfkey.SAType) (ipsec.Protocol, error) {
	switch t {
	case pfkey.SATypeUnspec:
		return 0, nil
	case pfkey.SATypeESP:
		return ipsec.ESP, nil
	case pfkey.SATypeAH:
		return ipsec.AH, nil
	case pfkey.SATypeIPComp:
		return ipsec.IPComp, nil
	}
	return 0, refuse(syscall.EINVAL, "SA type %v", t)
}
