package ikev2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
)

// Config is the Configuration payload (RFC 7296, 3.15).
type Config struct {
	Type       CFGType
	Attributes []ConfigAttribute
}

// ConfigAttribute is one attribute of a Configuration payload (RFC 7296, 3.15.1).
type ConfigAttribute struct {
	Type  ConfigType // 15 bits
	Value []byte
}

// PayloadType is PayloadCP.
func (*Config) PayloadType() PayloadType { return PayloadCP }

// Append appends type and attributes.
func (c *Config) Append(b []byte) ([]byte, error) {
	b = append(b, uint8(c.Type), 0, 0, 0)
	for _, a := range c.Attributes {
		if a.Type > 0x7fff || len(a.Value) > 0xffff {
			return nil, fmt.Errorf("%w: attribute %v of %d octets", ErrValue, a.Type, len(a.Value))
		}
		b = binary.BigEndian.AppendUint16(b, uint16(a.Type))
		b = binary.BigEndian.AppendUint16(b, uint16(len(a.Value)))
		b = append(b, a.Value...)
	}
	return b, nil
}

func parseConfig(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	var typ uint8
	if !s.ReadUint8(&typ) || !s.Skip(3) {
		return nil, errShort
	}
	c := &Config{Type: CFGType(typ)}
	for !s.Empty() {
		var t, n uint16
		var a ConfigAttribute
		if !s.ReadUint16(&t) || !s.ReadUint16(&n) || !s.ReadBytes(&a.Value, int(n)) {
			return nil, errShort
		}
		a.Type = ConfigType(t & 0x7fff) // the top bit is reserved
		c.Attributes = append(c.Attributes, a)
	}
	return c, nil
}
