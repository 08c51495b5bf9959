package ikev2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
)

// Notify is the Notify payload (RFC 7296, 3.10).
type Notify struct {
	Protocol ProtocolID // ProtocolNone unless it concerns a child SA by SPI
	SPI      []byte
	Type     NotifyType
	Data     []byte
}

// PayloadType is PayloadNotify.
func (*Notify) PayloadType() PayloadType { return PayloadNotify }

// Append appends protocol, type, SPI and data.
func (n *Notify) Append(b []byte) ([]byte, error) {
	if len(n.SPI) > 255 {
		return nil, fmt.Errorf("%w: SPI of %d octets", ErrValue, len(n.SPI))
	}
	b = append(b, uint8(n.Protocol), uint8(len(n.SPI)))
	b = binary.BigEndian.AppendUint16(b, uint16(n.Type))
	b = append(b, n.SPI...)
	return append(b, n.Data...), nil
}

func parseNotify(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	n := &Notify{}
	var proto, spiLen uint8
	var typ uint16
	if !s.ReadUint8(&proto) || !s.ReadUint8(&spiLen) || !s.ReadUint16(&typ) || !s.ReadBytes(&n.SPI, int(spiLen)) {
		return nil, errShort
	}
	n.Protocol, n.Type, n.Data = ProtocolID(proto), NotifyType(typ), s
	return n, nil
}
