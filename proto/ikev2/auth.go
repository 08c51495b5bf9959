package ikev2

import "golang.org/x/crypto/cryptobyte"

// Auth is the Authentication payload (RFC 7296, 3.8).
type Auth struct {
	Method AuthMethod
	Data   []byte
}

// PayloadType is PayloadAUTH.
func (*Auth) PayloadType() PayloadType { return PayloadAUTH }

// Append appends method and data.
func (a *Auth) Append(b []byte) ([]byte, error) {
	return append(append(b, uint8(a.Method), 0, 0, 0), a.Data...), nil
}

func parseAuth(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	var method uint8
	if !s.ReadUint8(&method) || !s.Skip(3) {
		return nil, errShort
	}
	return &Auth{Method: AuthMethod(method), Data: s}, nil
}
