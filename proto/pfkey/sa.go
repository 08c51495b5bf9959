package pfkey

import "encoding/binary"

// SA is the SA extension (RFC 2367, 2.3.1).
type SA struct {
	SPI     uint32 // network order on the wire; IPComp: the CPI
	Replay  uint8
	State   SAState
	Auth    AuthAlg
	Encrypt EncrAlg // IPComp: a CompAlg
	Flags   uint32
}

func (s *SA) decode(b []byte) error {
	*s = SA{
		SPI: binary.BigEndian.Uint32(b[4:]), Replay: b[8], State: SAState(b[9]),
		Auth: AuthAlg(b[10]), Encrypt: EncrAlg(b[11]), Flags: host.Uint32(b[12:]),
	}
	return nil
}

func (s *SA) append(b []byte) ([]byte, error) {
	b = binary.BigEndian.AppendUint32(b, s.SPI)
	b = append(b, s.Replay, byte(s.State), byte(s.Auth), byte(s.Encrypt))
	return host.AppendUint32(b, s.Flags), nil
}

// SA2 is the X_SA2 extension. Without it an SA has transport mode and reqid 0.
type SA2 struct {
	Mode     Mode
	Sequence uint32
	ReqID    uint32
}

func (s *SA2) decode(b []byte) error {
	*s = SA2{Mode: Mode(b[4]), Sequence: host.Uint32(b[8:]), ReqID: host.Uint32(b[12:])}
	return nil
}

func (s *SA2) append(b []byte) ([]byte, error) {
	b = append(b, byte(s.Mode), 0, 0, 0)
	b = host.AppendUint32(b, s.Sequence)
	return host.AppendUint32(b, s.ReqID), nil
}

// Lifetime is LIFETIME_CURRENT, HARD or SOFT (RFC 2367, 2.3.2). In HARD and SOFT
// the times are seconds after creation and after first use, 0 for no limit; in
// CURRENT they are seconds of Unix time.
type Lifetime struct {
	Allocations uint32 // packets
	Bytes       uint64
	AddTime     uint64
	UseTime     uint64
}

func (l *Lifetime) decode(b []byte) error {
	*l = Lifetime{host.Uint32(b[4:]), host.Uint64(b[8:]), host.Uint64(b[16:]), host.Uint64(b[24:])}
	return nil
}

func (l *Lifetime) append(b []byte) ([]byte, error) {
	b = host.AppendUint32(b, l.Allocations)
	b = host.AppendUint64(b, l.Bytes)
	b = host.AppendUint64(b, l.AddTime)
	return host.AppendUint64(b, l.UseTime), nil
}

// SPIRange is the range of SPIs that GETSPI may choose from, both ends included.
type SPIRange struct{ Min, Max uint32 }

func (r *SPIRange) decode(b []byte) error {
	*r = SPIRange{host.Uint32(b[4:]), host.Uint32(b[8:])}
	return nil
}

func (r *SPIRange) append(b []byte) ([]byte, error) {
	b = host.AppendUint32(b, r.Min)
	b = host.AppendUint32(b, r.Max)
	return append(b, 0, 0, 0, 0), nil
}

// NATT is the X_NAT_T_TYPE extension.
type NATT struct{ Type NATTType }

func (n *NATT) decode(b []byte) error {
	n.Type = NATTType(b[4])
	return nil
}

func (n *NATT) append(b []byte) ([]byte, error) { return append(b, byte(n.Type), 0, 0, 0), nil }

// NATTPort is X_NAT_T_SPORT or X_NAT_T_DPORT.
type NATTPort struct{ Port uint16 }

func (n *NATTPort) decode(b []byte) error {
	n.Port = binary.BigEndian.Uint16(b[4:])
	return nil
}

func (n *NATTPort) append(b []byte) ([]byte, error) {
	return append(binary.BigEndian.AppendUint16(b, n.Port), 0, 0), nil
}

// KMPrivate is the X_KMPRIVATE extension, which nobody uses.
type KMPrivate struct{}

func (*KMPrivate) decode([]byte) error             { return nil }
func (*KMPrivate) append(b []byte) ([]byte, error) { return append(b, 0, 0, 0, 0), nil }
