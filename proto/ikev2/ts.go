package ikev2

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/crypto/cryptobyte"
)

// TSi is the Traffic Selector payload of the initiator (RFC 7296, 3.13).
type TSi struct{ Selectors []TrafficSelector }

// TSr is the Traffic Selector payload of the responder.
type TSr struct{ Selectors []TrafficSelector }

// TrafficSelector is one selector (RFC 7296, 3.13.1). Start and End are valid
// for the two address ranges; other types keep their octets in Raw.
type TrafficSelector struct {
	Type               TSType
	Proto              uint8 // IP protocol, 0 any
	StartPort, EndPort uint16
	Start, End         netip.Addr
	Raw                []byte // what follows the length field, for other types only
}

func (t TrafficSelector) String() string {
	if t.Raw != nil || !t.Start.IsValid() {
		return fmt.Sprintf("%v:%x", t.Type, t.Raw)
	}
	s := t.Start.String()
	if t.End != t.Start {
		s += "-" + t.End.String()
	}
	if t.Proto == 0 && t.StartPort == 0 && t.EndPort == 0xffff {
		return s
	}
	return fmt.Sprintf("%s[%d/%d-%d]", s, t.Proto, t.StartPort, t.EndPort)
}

// PayloadType is PayloadTSi.
func (*TSi) PayloadType() PayloadType { return PayloadTSi }

// PayloadType is PayloadTSr.
func (*TSr) PayloadType() PayloadType { return PayloadTSr }

// Append appends the selectors.
func (t *TSi) Append(b []byte) ([]byte, error) { return appendTS(b, t.Selectors) }

// Append appends the selectors.
func (t *TSr) Append(b []byte) ([]byte, error) { return appendTS(b, t.Selectors) }

func appendTS(b []byte, ts []TrafficSelector) ([]byte, error) {
	if len(ts) > 255 {
		return nil, fmt.Errorf("%w: %d traffic selectors", ErrValue, len(ts))
	}
	b = append(b, uint8(len(ts)), 0, 0, 0)
	for _, t := range ts {
		start := len(b)
		b = append(b, uint8(t.Type), t.Proto, 0, 0)
		n := t.Type.addrLen()
		if n == 0 {
			b = append(b, t.Raw...)
		} else {
			if t.Start.BitLen() != 8*n || t.End.BitLen() != 8*n {
				return nil, fmt.Errorf("%w: traffic selector %v: %v", ErrValue, t.Type, t)
			}
			b = binary.BigEndian.AppendUint16(b, t.StartPort)
			b = binary.BigEndian.AppendUint16(b, t.EndPort)
			b = append(b, t.Start.AsSlice()...)
			b = append(b, t.End.AsSlice()...)
		}
		if err := setLength(b, start); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// addrLen is the octets of an address of type t, 0 for types without.
func (v TSType) addrLen() int {
	switch v {
	case TSIPv4Range:
		return 4
	case TSIPv6Range:
		return 16
	}
	return 0
}

func parseTSi(b []byte) (Payload, error) {
	ts, err := parseTS(b)
	if err != nil {
		return nil, err
	}
	return &TSi{ts}, nil
}

func parseTSr(b []byte) (Payload, error) {
	ts, err := parseTS(b)
	if err != nil {
		return nil, err
	}
	return &TSr{ts}, nil
}

func parseTS(b []byte) ([]TrafficSelector, error) {
	s := cryptobyte.String(b)
	var n uint8
	if !s.ReadUint8(&n) || !s.Skip(3) {
		return nil, errShort
	}
	var ts []TrafficSelector
	for i := range int(n) {
		t, err := parseSelector(&s)
		if err != nil {
			return nil, fmt.Errorf("selector %d: %w", i+1, err)
		}
		ts = append(ts, t)
	}
	if !s.Empty() {
		return nil, errTrailing
	}
	return ts, nil
}

func parseSelector(s *cryptobyte.String) (t TrafficSelector, err error) {
	var typ uint8
	var length uint16
	var c []byte
	if !s.ReadUint8(&typ) || !s.ReadUint8(&t.Proto) || !s.ReadUint16(&length) || length < 4 || !s.ReadBytes(&c, int(length)-4) {
		return t, errShort
	}
	t.Type = TSType(typ)
	n := t.Type.addrLen()
	if n == 0 {
		t.Raw = c
		return t, nil
	}
	content := cryptobyte.String(c)
	var start, end []byte
	if !content.ReadUint16(&t.StartPort) || !content.ReadUint16(&t.EndPort) ||
		!content.ReadBytes(&start, n) || !content.ReadBytes(&end, n) {
		return t, errShort
	}
	if !content.Empty() {
		return t, errTrailing
	}
	// A range that runs backwards is form enough to read; whoever narrows refuses it.
	t.Start, _ = netip.AddrFromSlice(start)
	t.End, _ = netip.AddrFromSlice(end)
	return t, nil
}
