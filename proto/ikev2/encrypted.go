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
	start := len(b)
	b = m.appendHeader(b, PayloadSK)
	payload := len(b)
	b = append(b, uint8(firstType(m.Payloads)), 0, 0, 0)
	body := len(b)
	b = append(b, make([]byte, c.IVLen())...)
	plain := len(b)
	b, err := AppendPayloads(b, m.Payloads)
	if err != nil {
		return nil, err
	}
	// Pad so that pad length, the last octet, ends a block. Contents are
	// arbitrary (RFC 7296, 3.14); the minimum is used.
	block := max(c.BlockLen(), 1)
	pad := (block - (len(b)-plain+1)%block) % block
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

// Open reads a protected message: it verifies the Encrypted payload, which
// must be the last one, and returns the payloads that were inside. Payloads in
// front of it are left out: no exchange defines any. A message that does not
// verify gives an error that wraps ErrIntegrity; other errors about its
// contents come from a peer that holds the keys.
func Open(b []byte, c Cipher) (*Message, error) {
	m, err := Parse(b)
	if err != nil {
		return nil, err
	}
	if len(m.Payloads) == 0 {
		return nil, fmt.Errorf("%w: none", ErrEncrypted)
	}
	e, ok := m.Payloads[len(m.Payloads)-1].(*Encrypted)
	if !ok {
		return nil, fmt.Errorf("%w: none", ErrEncrypted)
	}
	if len(e.Body) < c.IVLen()+max(c.BlockLen(), 1)+c.ICVLen() {
		return nil, fmt.Errorf("%w: %w: %d octets", ErrIntegrity, ErrEncrypted, len(e.Body))
	}
	plain, err := c.Open(b[:len(b)-len(e.Body)], e.Body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	plain, err = unpad(plain)
	if err != nil {
		return nil, err
	}
	m.Payloads, err = ParsePayloads(e.First, plain)
	if err != nil {
		return nil, err
	}
	for _, p := range m.Payloads {
		if t := p.PayloadType(); t == PayloadSK || t == PayloadSKF {
			return nil, fmt.Errorf("%w: inside another", ErrEncrypted)
		}
	}
	return m, nil
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
