package pfkey

import "fmt"

// Key is KEY_AUTH or KEY_ENCRYPT (RFC 2367, 2.3.4). However it is printed, only
// its length shows.
type Key struct {
	Bits uint16
	Key  []byte // ceil(Bits/8) octets; part of the buffer after Decode
}

// NewKey is the extension for a key of whole octets, which it does not copy.
func NewKey(k []byte) *Key { return &Key{Bits: uint16(len(k) * 8), Key: k} }

// Format makes every verb print the length alone.
func (k Key) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "Key(%d bits)", k.Bits) }

// MarshalText keeps keys out of JSON.
func (k Key) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%v", k), nil }

func (k *Key) decode(b []byte) error {
	bits := host.Uint16(b[4:])
	n := (int(bits) + 7) / 8
	if 8+n > len(b) {
		return invalid("key of %d bits in %d octets", bits, len(b))
	}
	*k = Key{bits, b[8 : 8+n : 8+n]}
	return nil
}

func (k *Key) append(b []byte) ([]byte, error) {
	if len(k.Key) != (int(k.Bits)+7)/8 {
		return b, invalid("key of %d octets as %d bits", len(k.Key), k.Bits)
	}
	return append(append(host.AppendUint16(b, k.Bits), 0, 0), k.Key...), nil
}
