package ikev2

import (
	"fmt"
	"net/netip"

	"golang.org/x/crypto/cryptobyte"
)

// ID is an identity (RFC 7296, 3.5). Its Append gives the octets that the AUTH
// payload covers: the payload without generic header (RFC 7296, 2.15).
type ID struct {
	Type IDType
	Data []byte
	// Reserved is 0 in what we send. AUTH covers what a peer has put there.
	Reserved [3]byte
}

// IDi is the identity of the exchange's initiator.
type IDi struct{ ID }

// IDr is the identity of the responder.
type IDr struct{ ID }

// PayloadType is PayloadIDi.
func (*IDi) PayloadType() PayloadType { return PayloadIDi }

// PayloadType is PayloadIDr.
func (*IDr) PayloadType() PayloadType { return PayloadIDr }

// Append appends type and identity.
func (id *ID) Append(b []byte) ([]byte, error) {
	b = append(append(b, uint8(id.Type)), id.Reserved[:]...)
	return append(b, id.Data...), nil
}

// String gives the identity readably; octets that are not printable ASCII are escaped.
func (id ID) String() string {
	switch id.Type {
	case IDIPv4Addr, IDIPv6Addr:
		if a, ok := netip.AddrFromSlice(id.Data); ok {
			return a.String()
		}
	case IDFQDN, IDRFC822Addr:
		q := fmt.Sprintf("%+q", id.Data)
		return q[1 : len(q)-1]
	}
	return fmt.Sprintf("%v:%x", id.Type, id.Data)
}

func parseID(b []byte) (ID, error) {
	s := cryptobyte.String(b)
	var typ uint8
	var id ID
	if !s.ReadUint8(&typ) || !s.CopyBytes(id.Reserved[:]) {
		return ID{}, errShort
	}
	id.Type, id.Data = IDType(typ), s
	switch n := len(id.Data); {
	case id.Type == IDIPv4Addr && n != 4, id.Type == IDIPv6Addr && n != 16:
		return ID{}, fmt.Errorf("%v of %d octets", id.Type, n)
	}
	return id, nil
}

func parseIDi(b []byte) (Payload, error) {
	id, err := parseID(b)
	if err != nil {
		return nil, err
	}
	return &IDi{id}, nil
}

func parseIDr(b []byte) (Payload, error) {
	id, err := parseID(b)
	if err != nil {
		return nil, err
	}
	return &IDr{id}, nil
}
