package ikev2

import (
	"encoding/binary"

	"golang.org/x/crypto/cryptobyte"
)

// KE is the Key Exchange payload (RFC 7296, 3.4).
type KE struct {
	Method KEID
	Data   []byte // public value
}

// PayloadType is PayloadKE.
func (*KE) PayloadType() PayloadType { return PayloadKE }

// Append appends method and public value.
func (k *KE) Append(b []byte) ([]byte, error) {
	b = binary.BigEndian.AppendUint16(b, uint16(k.Method))
	b = append(b, 0, 0)
	return append(b, k.Data...), nil
}

func parseKE(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	var method, reserved uint16
	if !s.ReadUint16(&method) || !s.ReadUint16(&reserved) {
		return nil, errShort
	}
	return &KE{Method: KEID(method), Data: s}, nil
}
