// Package isakmp reads and writes what both versions of IKE share: the
// 28-octet header (RFC 7296, 3.1; RFC 2408, 3.1) and the generic payload header
// that chains payloads (RFC 7296, 3.2). It knows forms only: what the numbers
// mean is the business of proto/ikev2 and proto/ikev1. The non-ESP marker of
// UDP port 4500 (RFC 3948, 2.2) is missiu's, which owns that port.
//
// Slices that are returned alias the input.
package isakmp

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
)

// Sizes in octets.
const (
	HeaderLen        = 28
	PayloadHeaderLen = 4
	// MaxLen bounds a message: what fits into a UDP datagram.
	MaxLen = 65535
)

// Errors of form. Those that Parse and Next return wrap one of them.
var (
	ErrShort    = errors.New("isakmp: message shorter than its header")
	ErrLength   = errors.New("isakmp: length field does not match")
	ErrTrailing = errors.New("isakmp: octets after the last payload")
)

// SPI is the 64-bit SPI of IKE, the cookie of IKEv1. Zero is "not chosen yet".
type SPI uint64

func (s SPI) String() string { return fmt.Sprintf("%016x", uint64(s)) }

// Header is the fixed header of an IKE message. Length is left out: it is what
// the octets say, and Put computes it.
type Header struct {
	InitiatorSPI, ResponderSPI SPI
	NextPayload                uint8
	Major, Minor               uint8 // four bits each
	Exchange                   uint8
	Flags                      uint8
	MessageID                  uint32
}

// Parse takes the header off b, which is one whole message without non-ESP
// marker, and returns the payloads behind it. The length field must be that of
// b: a datagram holds exactly one message.
func Parse(b []byte) (h Header, payloads []byte, err error) {
	if len(b) < HeaderLen {
		return Header{}, nil, ErrShort
	}
	var version uint8
	var length uint32
	var ispi, rspi uint64
	s := cryptobyte.String(b)
	ok := s.ReadUint64(&ispi) && s.ReadUint64(&rspi) && s.ReadUint8(&h.NextPayload) &&
		s.ReadUint8(&version) && s.ReadUint8(&h.Exchange) && s.ReadUint8(&h.Flags) &&
		s.ReadUint32(&h.MessageID) && s.ReadUint32(&length)
	if !ok {
		return Header{}, nil, ErrShort
	}
	if uint64(length) != uint64(len(b)) {
		return Header{}, nil, fmt.Errorf("%w: header says %d octets, datagram has %d", ErrLength, length, len(b))
	}
	h.InitiatorSPI, h.ResponderSPI = SPI(ispi), SPI(rspi)
	h.Major, h.Minor = version>>4, version&15
	return h, s, nil
}

// Append writes the header with a length field of zero; Finish sets it.
func (h Header) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(h.InitiatorSPI))
	b = binary.BigEndian.AppendUint64(b, uint64(h.ResponderSPI))
	b = append(b, h.NextPayload, h.Major<<4|h.Minor&15, h.Exchange, h.Flags)
	b = binary.BigEndian.AppendUint32(b, h.MessageID)
	return append(b, 0, 0, 0, 0)
}

// Finish writes the length field of msg, a whole message that begins with its header.
func Finish(msg []byte) error {
	if len(msg) < HeaderLen {
		return ErrShort
	}
	if len(msg) > MaxLen {
		return fmt.Errorf("%w: %d octets do not fit into a datagram", ErrLength, len(msg))
	}
	binary.BigEndian.PutUint32(msg[24:], uint32(len(msg)))
	return nil
}

// Payload is one link of the payload chain: its type as named by what stood
// before it, the type of what follows, the octet of flags (critical bit,
// reserved bits), and the body behind the generic header.
type Payload struct {
	Type  uint8
	Next  uint8
	Flags uint8
	Body  []byte
}

// Critical is the only flag that IKEv2 defines (RFC 7296, 3.2).
const Critical = 0x80

// Next takes the payload of type typ off the front of b.
// This is the one place that knows that a payload's length counts its header.
func Next(typ uint8, b []byte) (p Payload, rest []byte, err error) {
	s := cryptobyte.String(b)
	var length uint16
	p.Type = typ
	if !s.ReadUint8(&p.Next) || !s.ReadUint8(&p.Flags) || !s.ReadUint16(&length) {
		return Payload{}, nil, fmt.Errorf("%w: payload %d: %d octets left", ErrLength, typ, len(b))
	}
	if length < PayloadHeaderLen || !s.ReadBytes(&p.Body, int(length)-PayloadHeaderLen) {
		return Payload{}, nil, fmt.Errorf("%w: payload %d: says %d octets, %d left", ErrLength, typ, length, len(b))
	}
	return p, s, nil
}

// Walk calls f for each payload of b, of which the first has the type first,
// until the chain ends with type 0, f returns false, or there is an error.
// Octets behind the last payload are an error; rest are the octets not walked.
func Walk(first uint8, b []byte, f func(Payload) bool) (rest []byte, err error) {
	for typ := first; typ != 0; {
		p, r, err := Next(typ, b)
		if err != nil {
			return b, err
		}
		b = r
		if !f(p) {
			return b, nil
		}
		typ = p.Next
	}
	if len(b) != 0 {
		return b, ErrTrailing
	}
	return nil, nil
}

// AppendPayload appends a generic payload header for a payload whose body put
// appends. next is the type of the payload that follows.
func AppendPayload(b []byte, next, flags uint8, put func([]byte) ([]byte, error)) ([]byte, error) {
	start := len(b)
	b = append(b, next, flags, 0, 0)
	b, err := put(b)
	if err != nil {
		return nil, err
	}
	n := len(b) - start
	if n > 0xffff {
		return nil, fmt.Errorf("%w: payload of %d octets", ErrLength, n)
	}
	binary.BigEndian.PutUint16(b[start+2:], uint16(n))
	return b, nil
}
