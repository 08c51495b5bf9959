// Package ikev2 reads and writes the messages of IKEv2: RFC 7296, section 3,
// and the payload and notify numbers of its extensions. Every payload is one
// type in one file; registries are typed numbers whose String never fails.
//
// Parse checks form: every length, and that nothing is left over. Meaning
// (which payloads an exchange needs, which proposal is good) is the caller's.
// Payloads and attributes of unknown type are kept as octets with their
// critical bit. Slices in what Parse returns alias its input.
//
// The package computes nothing: whoever holds keys hands in a Cipher for the
// Encrypted payload.
package ikev2

import (
	"errors"
	"fmt"

	"github.com/missiu/missiu/proto/isakmp"
)

// SPI is the SPI of an IKE SA.
type SPI = isakmp.SPI

// Errors for callers to branch on; what Parse returns wraps one of them, or,
// where the header is wrong, an error of package isakmp.
var (
	// ErrVersion: the major version is not 2 (RFC 7296, 2.5: INVALID_MAJOR_VERSION).
	ErrVersion = errors.New("ikev2: not version 2")
	// ErrSyntax: the octets of a payload, or of the chain, do not have their
	// form (INVALID_SYNTAX).
	ErrSyntax = errors.New("ikev2: invalid syntax")
	// ErrEncrypted: an Encrypted payload is missing, not last, or not alone.
	ErrEncrypted = errors.New("ikev2: encrypted payload")
	// ErrIntegrity: the Encrypted payload did not verify. Such a message is
	// dropped; it never harms an SA.
	ErrIntegrity = errors.New("ikev2: integrity check failed")
	// ErrValue: a value handed to Append cannot be written.
	ErrValue = errors.New("ikev2: value cannot be encoded")
)

// Header is the IKE header in the terms of version 2.
type Header struct {
	InitiatorSPI, ResponderSPI SPI
	Exchange                   ExchangeType
	Flags                      Flags // FlagInitiator, FlagResponse
	MessageID                  uint32
	Minor                      uint8 // 0; a larger one is ignored (RFC 7296, 2.5)
}

// IsResponse reports the Response flag.
func (h Header) IsResponse() bool { return h.Flags&FlagResponse != 0 }

// FromInitiator reports the Initiator flag: sent by the original initiator of the IKE SA.
func (h Header) FromInitiator() bool { return h.Flags&FlagInitiator != 0 }

// Flags of the IKE header.
type Flags uint8

// Flags (RFC 7296, 3.1).
const (
	FlagInitiator Flags = 0x08
	FlagVersion   Flags = 0x10 // the sender can speak a higher version
	FlagResponse  Flags = 0x20
)

// Payload is one payload of a message.
type Payload interface {
	PayloadType() PayloadType
	// Append appends the payload's body, without generic header. It fails,
	// wrapping ErrValue, when a field does not fit its place on the wire.
	Append(b []byte) ([]byte, error)
}

// Message is a message with its payloads in order. Read from the wire by
// Parse, the last of them is an *Encrypted or *EncryptedFragment when the
// message is protected; Open replaces it by what was in it.
type Message struct {
	Header
	Payloads []Payload
}

// ParseHeader reads the header alone, and the type of the first payload.
// It checks version and length, and is all that a demultiplexer needs.
func ParseHeader(b []byte) (Header, PayloadType, error) {
	h, _, err := isakmp.Parse(b)
	if err != nil {
		return Header{}, 0, err
	}
	if h.Major != 2 {
		return fromISAKMP(h), 0, fmt.Errorf("%w but %d", ErrVersion, h.Major)
	}
	return fromISAKMP(h), PayloadType(h.NextPayload), nil
}

func fromISAKMP(h isakmp.Header) Header {
	return Header{
		InitiatorSPI: h.InitiatorSPI, ResponderSPI: h.ResponderSPI,
		Exchange: ExchangeType(h.Exchange), Flags: Flags(h.Flags),
		MessageID: h.MessageID, Minor: h.Minor,
	}
}

// Parse reads a whole message without non-ESP marker. An Encrypted payload
// stays sealed.
func Parse(b []byte) (*Message, error) {
	ih, body, err := isakmp.Parse(b)
	if err != nil {
		return nil, err
	}
	if ih.Major != 2 {
		return nil, fmt.Errorf("%w but %d", ErrVersion, ih.Major)
	}
	m := &Message{Header: fromISAKMP(ih)}
	m.Payloads, err = ParsePayloads(PayloadType(ih.NextPayload), body)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// ParsePayloads reads a chain of payloads that fills b and begins with the
// type first. An Encrypted payload ends the chain.
func ParsePayloads(first PayloadType, b []byte) ([]Payload, error) {
	var ps []Payload
	var perr error
	rest, err := isakmp.Walk(uint8(first), b, func(p isakmp.Payload) bool {
		var pl Payload
		pl, perr = parsePayload(p)
		if perr != nil {
			return false
		}
		ps = append(ps, pl)
		// The next payload of SK is the first inside it (RFC 7296, 3.14).
		return p.Type != uint8(PayloadSK) && p.Type != uint8(PayloadSKF)
	})
	if perr != nil {
		return nil, perr
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSyntax, err)
	}
	if len(rest) != 0 {
		return nil, fmt.Errorf("%w: not the last payload", ErrEncrypted)
	}
	return ps, nil
}

func parsePayload(p isakmp.Payload) (Payload, error) {
	t := PayloadType(p.Type)
	f, ok := parsers[t]
	if !ok {
		return &Unknown{Type: t, Critical: p.Flags&isakmp.Critical != 0, Body: p.Body}, nil
	}
	pl, err := f(p)
	if err != nil {
		return nil, fmt.Errorf("%w: payload %v: %w", ErrSyntax, t, err)
	}
	return pl, nil
}

// parsers has a row per payload that this package knows.
var parsers map[PayloadType]func(isakmp.Payload) (Payload, error)

func init() {
	body := func(f func([]byte) (Payload, error)) func(isakmp.Payload) (Payload, error) {
		return func(p isakmp.Payload) (Payload, error) { return f(p.Body) }
	}
	parsers = map[PayloadType]func(isakmp.Payload) (Payload, error){
		PayloadSA: body(parseSA), PayloadKE: body(parseKE),
		PayloadIDi: body(parseIDi), PayloadIDr: body(parseIDr),
		PayloadCERT: body(parseCert), PayloadCERTREQ: body(parseCertReq),
		PayloadAUTH: body(parseAuth), PayloadNonce: body(parseNonce),
		PayloadNotify: body(parseNotify), PayloadDelete: body(parseDelete),
		PayloadVendorID: body(parseVendorID),
		PayloadTSi:      body(parseTSi), PayloadTSr: body(parseTSr),
		PayloadSK: parseEncrypted, PayloadSKF: parseEncryptedFragment,
		PayloadCP: body(parseConfig), PayloadEAP: body(parseEAP),
	}
}

// Append appends the message in clear: an *Encrypted among its payloads is
// written as the octets that it holds. AppendSealed protects.
func (m *Message) Append(b []byte) ([]byte, error) {
	start := len(b)
	b = m.appendHeader(b, firstType(m.Payloads))
	b, err := AppendPayloads(b, m.Payloads)
	if err != nil {
		return nil, err
	}
	if err := isakmp.Finish(b[start:]); err != nil {
		return nil, err
	}
	return b, nil
}

func (m *Message) appendHeader(b []byte, first PayloadType) []byte {
	return isakmp.Header{
		InitiatorSPI: m.InitiatorSPI, ResponderSPI: m.ResponderSPI,
		NextPayload: uint8(first), Major: 2, Minor: m.Minor,
		Exchange: uint8(m.Exchange), Flags: uint8(m.Flags), MessageID: m.MessageID,
	}.Append(b)
}

// AppendPayloads appends a chain of payloads with their generic headers.
func AppendPayloads(b []byte, ps []Payload) ([]byte, error) {
	for i, p := range ps {
		next := firstType(ps[i+1:])
		var flags uint8
		switch p := p.(type) {
		case *Unknown:
			if p.Critical {
				flags = isakmp.Critical
			}
		case *Encrypted:
			next = p.First
		case *EncryptedFragment:
			next = p.First
		}
		var err error
		if b, err = isakmp.AppendPayload(b, uint8(next), flags, p.Append); err != nil {
			return nil, fmt.Errorf("payload %v: %w", p.PayloadType(), err)
		}
	}
	return b, nil
}

func firstType(ps []Payload) PayloadType {
	if len(ps) == 0 {
		return PayloadNone
	}
	return ps[0].PayloadType()
}

// Find returns the first payload of type T; the zero T (nil) if there is none.
func Find[T Payload](ps []Payload) T {
	for _, p := range ps {
		if t, ok := p.(T); ok {
			return t
		}
	}
	var zero T
	return zero
}

// FindNotify returns the first Notify payload of type t, or nil.
func FindNotify(ps []Payload, t NotifyType) *Notify {
	for _, p := range ps {
		if n, ok := p.(*Notify); ok && n.Type == t {
			return n
		}
	}
	return nil
}

// UnsupportedCritical returns the type of the first payload that is unknown
// and critical (RFC 7296, 2.5: UNSUPPORTED_CRITICAL_PAYLOAD).
func UnsupportedCritical(ps []Payload) (PayloadType, bool) {
	for _, p := range ps {
		if u, ok := p.(*Unknown); ok && u.Critical {
			return u.Type, true
		}
	}
	return 0, false
}

// Unknown is a payload of a type this package does not know.
type Unknown struct {
	Type     PayloadType
	Critical bool
	Body     []byte
}

// PayloadType is the type as it came.
func (u *Unknown) PayloadType() PayloadType { return u.Type }

// Append appends the body as it came.
func (u *Unknown) Append(b []byte) ([]byte, error) { return append(b, u.Body...), nil }
