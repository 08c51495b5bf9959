package ikev2

// EAP is the EAP payload, an EAP message kept as octets (RFC 7296, 3.16).
type EAP struct {
	Message []byte
}

// PayloadType is PayloadEAP.
func (*EAP) PayloadType() PayloadType { return PayloadEAP }

// Append appends the message.
func (e *EAP) Append(b []byte) ([]byte, error) { return append(b, e.Message...), nil }

func parseEAP(b []byte) (Payload, error) { return &EAP{Message: b}, nil }
