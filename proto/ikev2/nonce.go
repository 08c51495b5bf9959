package ikev2

import "fmt"

// Nonce is the Nonce payload, Ni or Nr (RFC 7296, 3.9).
type Nonce struct {
	Data []byte // 16 to 256 octets
}

// PayloadType is PayloadNonce.
func (*Nonce) PayloadType() PayloadType { return PayloadNonce }

// Append appends the nonce.
func (n *Nonce) Append(b []byte) ([]byte, error) {
	if err := checkNonce(n.Data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrValue, err)
	}
	return append(b, n.Data...), nil
}

func parseNonce(b []byte) (Payload, error) {
	if err := checkNonce(b); err != nil {
		return nil, err
	}
	return &Nonce{Data: b}, nil
}

func checkNonce(b []byte) error {
	if len(b) < 16 || len(b) > 256 {
		return fmt.Errorf("nonce of %d octets, want 16 to 256", len(b))
	}
	return nil
}
