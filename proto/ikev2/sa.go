package ikev2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/cryptobyte"
)

var (
	errShort    = errors.New("too short")
	errTrailing = errors.New("octets left over")
)

// SA is the Security Association payload: what is offered, best first, or the
// one chosen proposal (RFC 7296, 3.3).
type SA struct {
	Proposals []Proposal
}

// Proposal is one proposal of an SA payload (RFC 7296, 3.3.1). Transforms of
// one type are alternatives.
type Proposal struct {
	Number     uint8 // from 1
	Protocol   ProtocolID
	SPI        []byte // empty (first IKE SA), 8 octets (IKE), 4 (ESP, AH)
	Transforms []Transform
}

// Transform is one transform of a proposal (RFC 7296, 3.3.2). Which registry
// ID is of, depends on Type.
type Transform struct {
	Type       TransformType
	ID         uint16
	Attributes []Attribute
}

// Attribute is a transform attribute (RFC 7296, 3.3.5). Short ones have two
// octets of value and no length field.
type Attribute struct {
	Type  AttributeType
	Short bool
	Value []byte
}

// NewTransform makes a transform, with a key length attribute if keyBits is not 0.
func NewTransform[T ~uint16](typ TransformType, id T, keyBits int) Transform {
	t := Transform{Type: typ, ID: uint16(id)}
	if keyBits != 0 {
		t.Attributes = []Attribute{{Type: AttributeKeyLength, Short: true,
			Value: binary.BigEndian.AppendUint16(nil, uint16(keyBits))}}
	}
	return t
}

// KeyBits returns the key length attribute in bits, 0 without it. ok is false
// when there is any other attribute or a second one: such a transform must not
// be chosen (RFC 7296, 3.3.6).
func (t Transform) KeyBits() (bits int, ok bool) {
	switch {
	case len(t.Attributes) == 0:
		return 0, true
	case len(t.Attributes) > 1:
		return 0, false
	}
	a := t.Attributes[0]
	if a.Type != AttributeKeyLength || !a.Short || len(a.Value) != 2 {
		return 0, false
	}
	return int(binary.BigEndian.Uint16(a.Value)), true
}

// Equal reports whether type, ID and attributes are the same.
func (t Transform) Equal(o Transform) bool {
	return t.Type == o.Type && t.ID == o.ID && slices.EqualFunc(t.Attributes, o.Attributes, func(a, b Attribute) bool {
		return a.Type == b.Type && a.Short == b.Short && slices.Equal(a.Value, b.Value)
	})
}

func (t Transform) String() string {
	var s string
	switch t.Type {
	case TransformENCR:
		s = EncrID(t.ID).String()
	case TransformPRF:
		s = "PRF_" + PRFID(t.ID).String()
	case TransformINTEG:
		s = IntegID(t.ID).String()
	case TransformESN:
		s = ESNID(t.ID).String()
	case TransformKE:
		s = KEID(t.ID).String()
	default:
		s = fmt.Sprintf("%v:%d", t.Type, t.ID)
		if t.Type >= TransformADDKE1 && t.Type <= TransformADDKE7 {
			s = fmt.Sprintf("%v:%v", t.Type, KEID(t.ID))
		}
	}
	for _, a := range t.Attributes {
		if a.Type == AttributeKeyLength && len(a.Value) == 2 {
			s += fmt.Sprintf("-%d", binary.BigEndian.Uint16(a.Value))
		} else {
			s += fmt.Sprintf("[%v]", a.Type)
		}
	}
	return s
}

// String gives the proposal on one line: protocol, then the transforms in their order.
func (p Proposal) String() string {
	s := p.Protocol.String() + ":"
	for i, t := range p.Transforms {
		if i > 0 {
			s += "/"
		}
		s += t.String()
	}
	return s
}

// PayloadType is PayloadSA.
func (*SA) PayloadType() PayloadType { return PayloadSA }

// Substructure markers (RFC 7296, 3.3.1, 3.3.2): whether another follows.
const (
	moreProposals  = 2
	moreTransforms = 3
)

// Append appends the proposals.
func (sa *SA) Append(b []byte) ([]byte, error) {
	for i, p := range sa.Proposals {
		var err error
		if b, err = p.append(b, i+1 < len(sa.Proposals)); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (p *Proposal) append(b []byte, more bool) ([]byte, error) {
	if len(p.SPI) > 255 || len(p.Transforms) > 255 {
		return nil, fmt.Errorf("%w: proposal %d: %d octets of SPI, %d transforms", ErrValue, p.Number, len(p.SPI), len(p.Transforms))
	}
	start := len(b)
	b = append(b, marker(more, moreProposals), 0, 0, 0, p.Number, uint8(p.Protocol), uint8(len(p.SPI)), uint8(len(p.Transforms)))
	b = append(b, p.SPI...)
	for i, t := range p.Transforms {
		tstart := len(b)
		b = append(b, marker(i+1 < len(p.Transforms), moreTransforms), 0, 0, 0, uint8(t.Type), 0)
		b = binary.BigEndian.AppendUint16(b, t.ID)
		for _, a := range t.Attributes {
			var err error
			if b, err = a.append(b); err != nil {
				return nil, err
			}
		}
		if err := setLength(b, tstart); err != nil {
			return nil, err
		}
	}
	return b, setLength(b, start)
}

func (a Attribute) append(b []byte) ([]byte, error) {
	if a.Type > 0x7fff || len(a.Value) > 0xffff || a.Short && len(a.Value) != 2 {
		return nil, fmt.Errorf("%w: attribute %v of %d octets", ErrValue, a.Type, len(a.Value))
	}
	if a.Short {
		b = binary.BigEndian.AppendUint16(b, 0x8000|uint16(a.Type))
		return append(b, a.Value...), nil
	}
	b = binary.BigEndian.AppendUint16(b, uint16(a.Type))
	b = binary.BigEndian.AppendUint16(b, uint16(len(a.Value)))
	return append(b, a.Value...), nil
}

func marker(more bool, v uint8) uint8 {
	if more {
		return v
	}
	return 0
}

// setLength writes the length of the substructure b[start:] into its octets 2 and 3.
func setLength(b []byte, start int) error {
	if len(b)-start > 0xffff {
		return fmt.Errorf("%w: substructure of %d octets", ErrValue, len(b)-start)
	}
	binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start))
	return nil
}

// substructure takes a proposal or transform off s: its marker, and a reader
// that sees its content and no more. The length counts its own four octets.
func substructure(s *cryptobyte.String) (last uint8, content cryptobyte.String, ok bool) {
	var reserved uint8
	var length uint16
	var b []byte
	if !s.ReadUint8(&last) || !s.ReadUint8(&reserved) || !s.ReadUint16(&length) ||
		length < 4 || !s.ReadBytes(&b, int(length)-4) {
		return 0, nil, false
	}
	return last, b, true
}

func parseSA(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	sa := &SA{}
	for more := true; more; {
		last, c, ok := substructure(&s)
		if !ok || last != 0 && last != moreProposals {
			return nil, fmt.Errorf("proposal %d: bad length or marker", len(sa.Proposals)+1)
		}
		p, err := parseProposal(c)
		if err != nil {
			return nil, fmt.Errorf("proposal %d: %w", len(sa.Proposals)+1, err)
		}
		sa.Proposals = append(sa.Proposals, p)
		more = last == moreProposals
	}
	if !s.Empty() {
		return nil, errTrailing
	}
	return sa, nil
}

func parseProposal(s cryptobyte.String) (p Proposal, err error) {
	var spiLen, n uint8
	var proto uint8
	if !s.ReadUint8(&p.Number) || !s.ReadUint8(&proto) || !s.ReadUint8(&spiLen) || !s.ReadUint8(&n) {
		return p, errShort
	}
	p.Protocol = ProtocolID(proto)
	if !s.ReadBytes(&p.SPI, int(spiLen)) {
		return p, fmt.Errorf("SPI of %d octets: %w", spiLen, errShort)
	}
	for i := range int(n) {
		last, c, ok := substructure(&s)
		if !ok {
			return p, fmt.Errorf("transform %d: bad length", i+1)
		}
		if want := marker(i+1 < int(n), moreTransforms); last != want {
			return p, fmt.Errorf("transform %d of %d: marker %d, want %d", i+1, n, last, want)
		}
		t, err := parseTransform(c)
		if err != nil {
			return p, fmt.Errorf("transform %d: %w", i+1, err)
		}
		p.Transforms = append(p.Transforms, t)
	}
	if !s.Empty() {
		return p, errTrailing
	}
	return p, nil
}

func parseTransform(s cryptobyte.String) (t Transform, err error) {
	var typ, reserved uint8
	if !s.ReadUint8(&typ) || !s.ReadUint8(&reserved) || !s.ReadUint16(&t.ID) {
		return t, errShort
	}
	t.Type = TransformType(typ)
	for !s.Empty() {
		var at uint16
		var a Attribute
		n := uint16(2)
		if !s.ReadUint16(&at) {
			return t, errShort
		}
		a.Type, a.Short = AttributeType(at&0x7fff), at&0x8000 != 0
		if !a.Short && !s.ReadUint16(&n) || !s.ReadBytes(&a.Value, int(n)) {
			return t, fmt.Errorf("attribute %v: %w", a.Type, errShort)
		}
		t.Attributes = append(t.Attributes, a)
	}
	return t, nil
}
