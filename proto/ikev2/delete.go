package ikev2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
)

// Delete is the Delete payload (RFC 7296, 3.11). For ProtocolIKE it has no
// SPIs: it deletes the IKE SA it came in. For ESP and AH the SPIs are those
// that the sender receives on.
type Delete struct {
	Protocol ProtocolID
	SPIs     []uint32
}

// PayloadType is PayloadDelete.
func (*Delete) PayloadType() PayloadType { return PayloadDelete }

// Append appends protocol and SPIs.
func (d *Delete) Append(b []byte) ([]byte, error) {
	if len(d.SPIs) > 0xffff || d.Protocol == ProtocolIKE && len(d.SPIs) != 0 {
		return nil, fmt.Errorf("%w: %v with %d SPIs", ErrValue, d.Protocol, len(d.SPIs))
	}
	b = append(b, uint8(d.Protocol), d.spiLen())
	b = binary.BigEndian.AppendUint16(b, uint16(len(d.SPIs)))
	for _, s := range d.SPIs {
		b = binary.BigEndian.AppendUint32(b, s)
	}
	return b, nil
}

func (d *Delete) spiLen() uint8 {
	if d.Protocol == ProtocolIKE {
		return 0
	}
	return 4
}

func parseDelete(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	var proto, spiLen uint8
	var n uint16
	if !s.ReadUint8(&proto) || !s.ReadUint8(&spiLen) || !s.ReadUint16(&n) {
		return nil, errShort
	}
	d := &Delete{Protocol: ProtocolID(proto)}
	if spiLen != d.spiLen() || d.Protocol == ProtocolIKE && n != 0 {
		return nil, fmt.Errorf("%v: %d SPIs of %d octets", d.Protocol, n, spiLen)
	}
	for range int(n) {
		var v uint32
		if !s.ReadUint32(&v) {
			return nil, errShort
		}
		d.SPIs = append(d.SPIs, v)
	}
	if !s.Empty() {
		return nil, errTrailing
	}
	return d, nil
}
