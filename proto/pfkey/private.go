package pfkey

import "net/netip"

// OptIn is the X_OPT_IN extension: the sender understands private messages.
type OptIn struct{ Features uint32 }

// Features of X_OPT_IN.
const (
	FeaturePrivate = 1 << iota
	FeaturePacks   // several messages may share a datagram
)

func (o *OptIn) decode(b []byte) error {
	o.Features = host.Uint32(b[4:])
	return nil
}

func (o *OptIn) append(b []byte) ([]byte, error) { return host.AppendUint32(b, o.Features), nil }

// SAMore is the X_SA_MORE extension: what SA and LIFETIME have no room for.
type SAMore struct {
	ESN                               bool
	AggFrag                           bool   // RFC 9347
	TFC                               uint16 // octets; 0 none, 65535 the path MTU
	Replay                            uint32 // packets
	AcquireSeq                        uint32
	Packets, HardPackets, SoftPackets uint64
}

func (s *SAMore) decode(b []byte) error {
	*s = SAMore{
		ESN: host.Uint32(b[4:])&1 != 0, AggFrag: host.Uint32(b[4:])&2 != 0, TFC: uint16(host.Uint32(b[4:]) >> 16), Replay: host.Uint32(b[8:]), AcquireSeq: host.Uint32(b[12:]),
		Packets: host.Uint64(b[16:]), HardPackets: host.Uint64(b[24:]), SoftPackets: host.Uint64(b[32:]),
	}
	return nil
}

func (s *SAMore) append(b []byte) ([]byte, error) {
	var flags uint32
	if s.ESN {
		flags |= 1
	}
	if s.AggFrag {
		flags |= 2
	}
	b = host.AppendUint32(b, flags|uint32(s.TFC)<<16)
	b = host.AppendUint32(b, s.Replay)
	b = host.AppendUint32(b, s.AcquireSeq)
	b = host.AppendUint64(b, s.Packets)
	b = host.AppendUint64(b, s.HardPackets)
	return host.AppendUint64(b, s.SoftPackets), nil
}

// TSList is X_TS_SRC or X_TS_DST: traffic selectors of one side of an SA.
type TSList struct{ TS []TS }

// TS is a traffic selector (RFC 7296, 3.13.1); Start and End are of one family.
type TS struct {
	Proto          uint8 // 0 any
	PortLo, PortHi uint16
	Start, End     netip.Addr
}

func (l *TSList) decode(b []byte) error {
	n := int(host.Uint16(b[4:]))
	b = b[8:]
	if len(b) != n*lenTSEntry {
		return invalid("%d selectors in %d octets", n, len(b))
	}
	for ; len(b) > 0; b = b[lenTSEntry:] {
		start, err := parseAddr(b[1], b[8:24])
		if err != nil {
			return err
		}
		end, _ := parseAddr(b[1], b[24:40])
		l.TS = append(l.TS, TS{b[0], host.Uint16(b[4:]), host.Uint16(b[6:]), start, end})
	}
	return nil
}

func (l *TSList) append(b []byte) ([]byte, error) {
	if len(l.TS) > 0xffff {
		return b, tooLong("%d selectors", len(l.TS))
	}
	b = append(host.AppendUint16(b, uint16(len(l.TS))), 0, 0)
	for _, t := range l.TS {
		if t.Start.BitLen() != t.End.BitLen() {
			return b, invalid("selector of two families")
		}
		b = append(b, t.Proto, version(t.Start), 0, 0)
		b = host.AppendUint16(b, t.PortLo)
		b = host.AppendUint16(b, t.PortHi)
		var err error
		if b, err = appendAddr(b, t.Start); err != nil {
			return b, err
		}
		b, _ = appendAddr(b, t.End)
	}
	return b, nil
}

// Flow is the X_FLOW extension: the packet that raised an ACQUIRE.
type Flow struct {
	Proto            uint8
	SrcPort, DstPort uint16
	Src, Dst         netip.Addr // of one family
}

func (f *Flow) decode(b []byte) error {
	src, err := parseAddr(b[5], b[16:32])
	if err != nil {
		return err
	}
	dst, _ := parseAddr(b[5], b[32:48])
	*f = Flow{b[4], host.Uint16(b[8:]), host.Uint16(b[10:]), src, dst}
	return nil
}

func (f *Flow) append(b []byte) ([]byte, error) {
	if f.Src.BitLen() != f.Dst.BitLen() {
		return b, invalid("flow of two families")
	}
	b = append(b, f.Proto, version(f.Src), 0, 0)
	b = host.AppendUint16(b, f.SrcPort)
	b = host.AppendUint16(b, f.DstPort)
	b = append(b, 0, 0, 0, 0)
	b, err := appendAddr(b, f.Src)
	if err != nil {
		return b, err
	}
	return appendAddr(b, f.Dst)
}

// Blob is the X_BLOB extension: one part of a document.
type Blob struct {
	Total, Offset uint32
	Data          []byte // part of the buffer after Decode
}

func (x *Blob) decode(b []byte) error {
	n := host.Uint32(b[12:])
	if uint64(n) > uint64(len(b)-16) {
		return invalid("%d octets in %d", n, len(b))
	}
	*x = Blob{host.Uint32(b[4:]), host.Uint32(b[8:]), b[16 : 16+n : 16+n]}
	if uint64(x.Offset)+uint64(n) > uint64(x.Total) {
		return invalid("octets %d+%d of %d", x.Offset, n, x.Total)
	}
	return nil
}

func (x *Blob) append(b []byte) ([]byte, error) {
	b = host.AppendUint32(b, x.Total)
	b = host.AppendUint32(b, x.Offset)
	b = host.AppendUint32(b, uint32(len(x.Data)))
	return append(b, x.Data...), nil
}

// Count is the X_COUNT extension.
type Count struct{ N uint64 }

func (c *Count) decode(b []byte) error {
	c.N = host.Uint64(b[8:])
	return nil
}

func (c *Count) append(b []byte) ([]byte, error) {
	return host.AppendUint64(append(b, 0, 0, 0, 0), c.N), nil
}

// Queue is the X_QUEUE extension: a queue of the TAP, with SAs of its own.
type Queue struct {
	N    uint16 // from 1, 0 any; in an answer to REGISTER how many there are
	More bool   // of an SA for any queue: there may be others for single ones
}

func (q *Queue) decode(b []byte) error {
	*q = Queue{host.Uint16(b[4:]), host.Uint16(b[6:])&1 != 0}
	return nil
}

func (q *Queue) append(b []byte) ([]byte, error) {
	var flags uint16
	if q.More {
		flags = 1
	}
	return host.AppendUint16(host.AppendUint16(b, q.N), flags), nil
}

// PolicyMore is the X_POLICY_MORE extension: what X_POLICY has no room for.
type PolicyMore struct {
	Flags   PolicyFlags
	Packets uint64 // that the policy decided about; 0 in requests
}

// PolicyFlags are the flags of X_POLICY_MORE. Unknown ones are refused, since
// each changes what is protected.
type PolicyFlags uint32

// Flags of policies.
const (
	PolicyFlagClear   PolicyFlags = 1 << iota // clear packets are welcome, too
	PolicyFlagPerFlow                         // an SA pair for every flow
	PolicyFlagManual                          // manual SAs without reqid serve
	PolicyFlagInit                            // SAs are wanted at once

	allPolicyFlags = PolicyFlagClear | PolicyFlagPerFlow | PolicyFlagManual | PolicyFlagInit
)

func (p *PolicyMore) decode(b []byte) error {
	*p = PolicyMore{PolicyFlags(host.Uint32(b[4:])), host.Uint64(b[8:])}
	if p.Flags&^allPolicyFlags != 0 {
		return invalid("policy flags %#x", uint32(p.Flags))
	}
	return nil
}

func (p *PolicyMore) append(b []byte) ([]byte, error) {
	if p.Flags&^allPolicyFlags != 0 {
		return b, invalid("policy flags %#x", uint32(p.Flags))
	}
	return host.AppendUint64(host.AppendUint32(b, uint32(p.Flags)), p.Packets), nil
}

// Shapes is the X_SHAPES extension: what the combinations of PROPOSAL consist
// of, one for one.
type Shapes struct{ Shapes []Shape }

// Shape is that of one combination.
type Shape struct {
	Kind ShapeKind
	AH   AuthAlg // of AH; 0 any
}

// ShapeKind says which transforms a combination consists of. Unknown ones are
// refused, since each changes what is protected.
type ShapeKind uint8

// Kinds of shapes.
const (
	KindESP   ShapeKind = 0
	KindAH    ShapeKind = 1
	KindAHESP ShapeKind = 2 // ESP inside AH
)

func (s *Shapes) decode(b []byte) error {
	n := int(host.Uint16(b[4:]))
	b = b[8:]
	if len(b) != n*lenShape {
		return invalid("%d shapes in %d octets", n, len(b))
	}
	for ; len(b) > 0; b = b[lenShape:] {
		x := Shape{ShapeKind(b[0]), AuthAlg(b[1])}
		if x.Kind > KindAHESP || x.Kind == KindESP && x.AH != 0 {
			return invalid("shape %d with AH algorithm %d", b[0], b[1])
		}
		s.Shapes = append(s.Shapes, x)
	}
	return nil
}

func (s *Shapes) append(b []byte) ([]byte, error) {
	if len(s.Shapes) > 0xffff {
		return b, tooLong("%d shapes", len(s.Shapes))
	}
	b = append(host.AppendUint16(b, uint16(len(s.Shapes))), 0, 0)
	for _, x := range s.Shapes {
		if x.Kind > KindAHESP || x.Kind == KindESP && x.AH != 0 {
			return b, invalid("shape %d with AH algorithm %d", uint8(x.Kind), uint8(x.AH))
		}
		b = append(b, byte(x.Kind), byte(x.AH), 0, 0, 0, 0, 0, 0)
	}
	return b, nil
}

func version(a netip.Addr) byte {
	if a.Is4() {
		return 4
	}
	return 6
}

func parseAddr(version byte, b []byte) (netip.Addr, error) {
	switch version {
	case 4:
		return netip.AddrFrom4([4]byte(b)), nil
	case 6:
		return netip.AddrFrom16([16]byte(b)), nil
	}
	return netip.Addr{}, invalid("IP version %d", version)
}

func appendAddr(b []byte, a netip.Addr) ([]byte, error) {
	if !a.IsValid() {
		return b, invalid("no address")
	}
	var x [16]byte
	copy(x[:], a.AsSlice())
	return append(b, x[:]...), nil
}
