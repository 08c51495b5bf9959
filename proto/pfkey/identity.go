package pfkey

import (
	"bytes"
	"strings"
)

// Identity is IDENTITY_SRC or IDENTITY_DST (RFC 2367, 2.3.5).
type Identity struct {
	Type IdentityType
	ID   uint64
	Name string // may be empty
}

func (i *Identity) decode(b []byte) error {
	name, _, _ := bytes.Cut(b[16:], []byte{0})
	*i = Identity{IdentityType(host.Uint16(b[4:])), host.Uint64(b[8:]), string(name)}
	return nil
}

func (i *Identity) append(b []byte) ([]byte, error) {
	if strings.IndexByte(i.Name, 0) >= 0 {
		return b, invalid("name with a zero octet")
	}
	b = append(host.AppendUint16(b, uint16(i.Type)), 0, 0)
	b = host.AppendUint64(b, i.ID)
	if i.Name == "" {
		return b, nil
	}
	return append(append(b, i.Name...), 0), nil
}

// Sensitivity is the SENSITIVITY extension (RFC 2367, 2.3.6).
type Sensitivity struct {
	Domain                  uint32
	SensLevel, IntegLevel   uint8
	SensBitmap, IntegBitmap []uint64
}

func (s *Sensitivity) decode(b []byte) error {
	n, m := int(b[9]), int(b[11])
	if 16+8*(n+m) > len(b) {
		return invalid("bitmaps of %d words in %d octets", n+m, len(b))
	}
	*s = Sensitivity{Domain: host.Uint32(b[4:]), SensLevel: b[8], IntegLevel: b[10]}
	s.SensBitmap = words(b[16:], n)
	s.IntegBitmap = words(b[16+8*n:], m)
	return nil
}

func (s *Sensitivity) append(b []byte) ([]byte, error) {
	if len(s.SensBitmap) > 255 || len(s.IntegBitmap) > 255 {
		return b, tooLong("bitmap")
	}
	b = host.AppendUint32(b, s.Domain)
	b = append(b, s.SensLevel, byte(len(s.SensBitmap)), s.IntegLevel, byte(len(s.IntegBitmap)), 0, 0, 0, 0)
	for _, w := range s.SensBitmap {
		b = host.AppendUint64(b, w)
	}
	for _, w := range s.IntegBitmap {
		b = host.AppendUint64(b, w)
	}
	return b, nil
}

func words(b []byte, n int) []uint64 {
	if n == 0 {
		return nil
	}
	w := make([]uint64, n)
	for i := range w {
		w[i] = host.Uint64(b[8*i:])
	}
	return w
}

// SecCtx is the X_SEC_CTX extension.
type SecCtx struct {
	Alg, DOI uint8
	Ctx      []byte // part of the buffer after Decode
}

func (s *SecCtx) decode(b []byte) error {
	n := int(host.Uint16(b[6:]))
	if n > MaxSecCtxLen || len(b) != (8+n+wordLen-1)/wordLen*wordLen {
		return invalid("context of %d octets in %d", n, len(b))
	}
	*s = SecCtx{b[4], b[5], b[8 : 8+n : 8+n]}
	return nil
}

func (s *SecCtx) append(b []byte) ([]byte, error) {
	if len(s.Ctx) > MaxSecCtxLen {
		return b, tooLong("context of %d octets", len(s.Ctx))
	}
	b = host.AppendUint16(append(b, s.Alg, s.DOI), uint16(len(s.Ctx)))
	return append(b, s.Ctx...), nil
}
