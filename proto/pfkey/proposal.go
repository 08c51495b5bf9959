package pfkey

// Proposal is the PROPOSAL extension (RFC 2367, 2.3.7), best combination first.
type Proposal struct {
	Replay uint8
	Combs  []Comb
}

// Comb is one combination of algorithms; key bits include a salt.
type Comb struct {
	Auth                   AuthAlg
	Encrypt                EncrAlg
	Flags                  uint16
	AuthMin, AuthMax       uint16
	EncryptMin, EncryptMax uint16
	Soft, Hard             Lifetime
}

func (p *Proposal) decode(b []byte) error {
	p.Replay = b[4]
	b = b[8:]
	if len(b)%lenComb != 0 {
		return invalid("combinations of %d octets", len(b))
	}
	for ; len(b) > 0; b = b[lenComb:] {
		p.Combs = append(p.Combs, Comb{
			Auth: AuthAlg(b[0]), Encrypt: EncrAlg(b[1]), Flags: host.Uint16(b[2:]),
			AuthMin: host.Uint16(b[4:]), AuthMax: host.Uint16(b[6:]),
			EncryptMin: host.Uint16(b[8:]), EncryptMax: host.Uint16(b[10:]),
			Soft: Lifetime{host.Uint32(b[16:]), host.Uint64(b[24:]), host.Uint64(b[40:]), host.Uint64(b[56:])},
			Hard: Lifetime{host.Uint32(b[20:]), host.Uint64(b[32:]), host.Uint64(b[48:]), host.Uint64(b[64:])},
		})
	}
	return nil
}

func (p *Proposal) append(b []byte) ([]byte, error) {
	b = append(b, p.Replay, 0, 0, 0)
	for i := range p.Combs {
		c := &p.Combs[i]
		b = append(b, byte(c.Auth), byte(c.Encrypt))
		for _, v := range [...]uint16{c.Flags, c.AuthMin, c.AuthMax, c.EncryptMin, c.EncryptMax} {
			b = host.AppendUint16(b, v)
		}
		b = append(b, 0, 0, 0, 0)
		b = host.AppendUint32(b, c.Soft.Allocations)
		b = host.AppendUint32(b, c.Hard.Allocations)
		for _, v := range [...]uint64{
			c.Soft.Bytes, c.Hard.Bytes, c.Soft.AddTime, c.Hard.AddTime, c.Soft.UseTime, c.Hard.UseTime,
		} {
			b = host.AppendUint64(b, v)
		}
	}
	return b, nil
}

// Supported is SUPPORTED_AUTH or SUPPORTED_ENCRYPT (RFC 2367, 2.3.8).
type Supported struct{ Algs []Alg }

// Alg is an algorithm that the engine has; key bits include a salt.
type Alg struct {
	ID               uint8 // an AuthAlg or an EncrAlg
	IVLen            uint8 // octets
	MinBits, MaxBits uint16
}

func (s *Supported) decode(b []byte) error {
	for b = b[8:]; len(b) > 0; b = b[8:] {
		s.Algs = append(s.Algs, Alg{b[0], b[1], host.Uint16(b[2:]), host.Uint16(b[4:])})
	}
	return nil
}

func (s *Supported) append(b []byte) ([]byte, error) {
	b = append(b, 0, 0, 0, 0)
	for _, a := range s.Algs {
		b = append(b, a.ID, a.IVLen)
		b = host.AppendUint16(b, a.MinBits)
		b = host.AppendUint16(b, a.MaxBits)
		b = append(b, 0, 0)
	}
	return b, nil
}
