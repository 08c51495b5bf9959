package ikev2

import (
	"encoding/binary"
	"fmt"

	"github.com/missiu/missiu/proto/isakmp"
	"golang.org/x/crypto/cryptobyte"
)

// Encrypted is the Encrypted and Authenticated payload, SK, still sealed
// (RFC 7296, 3.14).
type Encrypted struct {
	First PayloadType // type of the first payload inside
	Body  []byte      // IV, ciphertext, ICV
}

// PayloadType is PayloadSK.
func (e *Encrypted) PayloadType() PayloadType { return PayloadSK }

// Append appends IV, ciphertext and ICV as they are.
func (e *Encrypted) Append(b []byte) ([]byte, error) { return append(b, e.Body...), nil }

func parseEncrypted(p isakmp.Payload) (Payload, error) {
	return &Encrypted{First: PayloadType(p.Next), Body: p.Body}, nil
}

// EncryptedFragment is the Encrypted Fragment payload, SKF (RFC 7383, 2.5).
// First is only set in the first fragment.
type EncryptedFragment struct {
	First         PayloadType
	Number, Total uint16
	Body          []byte // IV, ciphertext, ICV
}

// PayloadType is PayloadSKF.
func (e *EncryptedFragment) PayloadType() PayloadType { return PayloadSKF }

// Append appends the fragment numbers and the sealed octets.
func (e *EncryptedFragment) Append(b []byte) ([]byte, error) {
	b = binary.BigEndian.AppendUint16(b, e.Number)
	b = binary.BigEndian.AppendUint16(b, e.Total)
	return append(b, e.Body...), nil
}

func parseEncryptedFragment(p isakmp.Payload) (Payload, error) {
	e := &EncryptedFragment{First: PayloadType(p.Next)}
	s := cryptobyte.String(p.Body)
	if !s.ReadUint16(&e.Number) || !s.ReadUint16(&e.Total) {
		return nil, errShort
	}
	if e.Number == 0 || e.Number > e.Total {
		return nil, fmt.Errorf("fragment %d of %d", e.Number, e.Total)
	}
	e.Body = s
	return e, nil
}

// Cipher is the protection of one direction of an IKE SA (SK_e and SK_a, or
// one AEAD key), as this package needs it.
//
// An Encrypted payload's body is
//
//	| IV | plaintext, padding, pad length | ICV |
//	      \___ a multiple of BlockLen ___/
//
// aad is the whole message in front of it, from the IKE header to the payload's
// generic header: the associated data of an AEAD (RFC 5282, 5.1); integrity
// transforms cover aad, IV and ciphertext (RFC 7296, 3.14).
type Cipher interface {
	BlockLen() int // at least 1
	IVLen() int
	ICVLen() int
	// Seal fills in the IV, encrypts in place what stands between, and
	// fills in the ICV.
	Seal(aad, body []byte) error
	// Open verifies and returns the plaintext with its padding, in octets of
	// its own. len(body) is at least IVLen+BlockLen+ICVLen. aad and body stay
	// as they are: a message that does not verify may be read again.
	Open(aad, body []byte) ([]byte, error)
}

// AppendSealed appends the message with all its payloads inside one Encrypted
// payload. Without payloads (a liveness check) that is an empty one.
func (m *Message) AppendSealed(b []byte, c Cipher) ([]byte, error) {
	inner, err := AppendPayloads(nil, m.Payloads)
	if err != nil {
		return nil, err
	}
	return m.appendSealed(b, c, PayloadSK, firstType(m.Payloads), nil, inner)
}

// Seal is AppendSealed for a message whose size is limited to size octets: one
// message, or several with a fragment each (RFC 7383, 2.5). inner are the
// payloads as AppendPayloads writes them.
func (m *Message) Seal(inner []byte, c Cipher, size int) ([][]byte, error) {
	first, block := firstType(m.Payloads), max(c.BlockLen(), 1)
	over := isakmp.HeaderLen + 4 + c.IVLen() + c.ICVLen()
	if over+(len(inner)/block+1)*block <= size {
		b, err := m.appendSealed(nil, c, PayloadSK, first, nil, inner)
		return [][]byte{b}, err
	}
	chunk := (size-over-4)/block*block - 1 // the last octet is the pad length
	if chunk < 1 {
		return nil, fmt.Errorf("%w: no fragment fits into %d octets", ErrValue, size)
	}
	total := (len(inner) + chunk - 1) / chunk
	if total > 0xffff {
		return nil, fmt.Errorf("%w: %d fragments", ErrValue, total)
	}
	var out [][]byte
	for n := 1; n <= total; n++ {
		numbers := binary.BigEndian.AppendUint16(nil, uint16(n))
		numbers = binary.BigEndian.AppendUint16(numbers, uint16(total))
		b, err := m.appendSealed(nil, c, PayloadSKF, first, numbers, inner[(n-1)*chunk:min(n*chunk, len(inner))])
		if err != nil {
			return nil, err
		}
		out = append(out, b)
		first = PayloadNone // only the first says it
	}
	return out, nil
}

// appendSealed appends a message with one payload of type t, SK or SKF, whose
// header ends with fixed and which protects inner.
func (m *Message) appendSealed(b []byte, c Cipher, t, first PayloadType, fixed, inner []byte) ([]byte, error) {
	start := len(b)
	b = m.appendHeader(b, t)
	payload := len(b)
	b = append(b, uint8(first), 0, 0, 0)
	b = append(b, fixed...)
	body := len(b)
	b = append(b, make([]byte, c.IVLen())...)
	b = append(b, inner...)
	// Pad so that pad length, the last octet, ends a block. Contents are
	// arbitrary (RFC 7296, 3.14); the minimum is used.
	block := max(c.BlockLen(), 1)
	pad := (block - (len(inner)+1)%block) % block
	b = append(b, make([]byte, pad)...)
	b = append(b, uint8(pad))
	b = append(b, make([]byte, c.ICVLen())...)
	if len(b)-payload > 0xffff {
		return nil, fmt.Errorf("%w: encrypted payload of %d octets", ErrValue, len(b)-payload)
	}
	binary.BigEndian.PutUint16(b[payload+2:], uint16(len(b)-payload))
	if err := isakmp.Finish(b[start:]); err != nil {
		return nil, err
	}
	if err := c.Seal(b[start:body], b[body:]); err != nil {
		return nil, err
	}
	return b, nil
}

// Opened is the inside of an Encrypted payload, or of a fragment of one. Number
// and Total are 0 for what is no fragment.
type Opened struct {
	Header
	First         PayloadType // of the payloads inside; of a fragment only in the first
	Number, Total uint16
	Front         []Payload // in front of it: authentic, and not secret
	Prefix        []byte    // all in front of it, its generic header included
	Plain         []byte    // without padding
}

// OpenOuter verifies the Encrypted or Encrypted Fragment payload of a message,
// which must be the last one, and returns what is in it. No exchange defines
// payloads in front of an Encrypted one, but a critical one must not be ignored;
// those in front of a fragment are refused. A message that does not verify gives an error that wraps
// ErrIntegrity.
func OpenOuter(b []byte, c Cipher) (*Opened, error) {
	m, err := Parse(b)
	if err != nil {
		return nil, err
	}
	if len(m.Payloads) == 0 {
		return nil, fmt.Errorf("%w: none", ErrEncrypted)
	}
	o := &Opened{Header: m.Header}
	var body []byte
	switch e := m.Payloads[len(m.Payloads)-1].(type) {
	case *Encrypted:
		o.First, body = e.First, e.Body
		o.Front = m.Payloads[:len(m.Payloads)-1]
		o.Prefix = b[:len(b)-len(body)]
	case *EncryptedFragment:
		if len(m.Payloads) > 1 {
			return nil, fmt.Errorf("%w: payloads in front of a fragment", ErrEncrypted)
		}
		o.First, o.Number, o.Total, body = e.First, e.Number, e.Total, e.Body
		o.Prefix = b[:len(b)-len(body)-4]
	default:
		return nil, fmt.Errorf("%w: none", ErrEncrypted)
	}
	if len(body) < c.IVLen()+max(c.BlockLen(), 1)+c.ICVLen() {
		return nil, fmt.Errorf("%w: %w: %d octets", ErrIntegrity, ErrEncrypted, len(body))
	}
	plain, err := c.Open(b[:len(b)-len(body)], body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	o.Plain, err = unpad(plain)
	return o, err
}

// ParseInner reads the payloads that were inside an Encrypted payload.
func ParseInner(first PayloadType, plain []byte) ([]Payload, error) {
	ps, err := ParsePayloads(first, plain)
	if err != nil {
		return nil, err
	}
	for _, p := range ps {
		if t := p.PayloadType(); t == PayloadSK || t == PayloadSKF {
			return nil, fmt.Errorf("%w: inside another", ErrEncrypted)
		}
	}
	return ps, nil
}

// Open reads a protected message that is not a fragment: OpenOuter and
// ParseInner. Errors that do not wrap ErrIntegrity, about its contents, come from
// a peer that holds the keys.
func Open(b []byte, c Cipher) (*Message, error) {
	o, err := OpenOuter(b, c)
	if err != nil {
		return nil, err
	}
	if o.Total != 0 {
		return nil, fmt.Errorf("%w: a fragment", ErrEncrypted)
	}
	ps, err := ParseInner(o.First, o.Plain)
	if err != nil {
		return nil, err
	}
	return &Message{o.Header, ps}, nil
}

// IntAuthOctets is what the authentication of IKE_INTERMEDIATE covers of a
// message (RFC 9242, 3.3.2): all from the IKE header to the generic header of the
// Encrypted payload, then plain; with lengths, and for fragments the type of the
// payload, as if nothing but that were in one message. prefix is that of the
// message or of its first fragment.
func IntAuthOctets(prefix, plain []byte) []byte {
	b := append(append(make([]byte, 0, len(prefix)+len(plain)), prefix...), plain...)
	binary.BigEndian.PutUint32(b[24:], uint32(len(b)))
	binary.BigEndian.PutUint16(b[len(prefix)-2:], uint16(4+len(plain)))
	if PayloadType(b[16]) == PayloadSKF {
		b[16] = uint8(PayloadSK)
	}
	return b
}

func unpad(b []byte) ([]byte, error) {
	if len(b) == 0 {
		return nil, fmt.Errorf("%w: empty", ErrEncrypted)
	}
	pad := int(b[len(b)-1])
	if pad+1 > len(b) {
		return nil, fmt.Errorf("%w: pad length %d of %d octets", ErrSyntax, pad, len(b))
	}
	return b[:len(b)-1-pad], nil
}
