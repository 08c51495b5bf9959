package ikev2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// Seal keeps to the size, whatever the length and the cipher's blocks; what comes
// out joins to what went in, and IKE_INTERMEDIATE's authentication does not see
// the difference (RFC 9242, 3.3.2).
func TestSeal(t *testing.T) {
	c, err := newCBC(make([]byte, 16), make([]byte, 32), "HMAC_SHA2_256_128 [RFC4868]")
	if err != nil {
		t.Fatal(err)
	}
	for n := range 700 {
		m := &Message{Header: Header{InitiatorSPI: 1, ResponderSPI: 2, Exchange: IKE_INTERMEDIATE, MessageID: 1, Flags: FlagInitiator},
			Payloads: []Payload{&VendorID{Data: bytes.Repeat([]byte{byte(n)}, n)}}}
		inner, err := AppendPayloads(nil, m.Payloads)
		if err != nil {
			t.Fatal(err)
		}
		const size = 150
		ps, err := m.Seal(inner, c, size)
		if err != nil {
			t.Fatal(err)
		}
		var plain, prefix []byte
		first := PayloadNone
		for i, b := range ps {
			if len(b) > size {
				t.Fatalf("%d octets: message of %d octets, want at most %d", n, len(b), size)
			}
			o, err := OpenOuter(b, c)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				first, prefix = o.First, o.Prefix
			} else if o.First != PayloadNone {
				t.Errorf("fragment %d says what comes first", i+1)
			}
			if len(ps) > 1 && (int(o.Number) != i+1 || int(o.Total) != len(ps)) || len(ps) == 1 && o.Total != 0 {
				t.Errorf("%d octets: fragment %d of %d, want %d of %d", n, o.Number, o.Total, i+1, len(ps))
			}
			plain = append(plain, o.Plain...)
		}
		if !bytes.Equal(plain, inner) {
			t.Fatalf("%d octets: got %x, want %x", n, plain, inner)
		}
		if got, err := ParseInner(first, plain); err != nil || len(got) != 1 {
			t.Fatalf("%v, %v", got, err)
		}
		whole, err := m.AppendSealed(nil, c)
		if err != nil {
			t.Fatal(err)
		}
		o, err := OpenOuter(whole, c)
		if err != nil {
			t.Fatal(err)
		}
		a, b := IntAuthOctets(prefix, plain), IntAuthOctets(o.Prefix, o.Plain)
		if !bytes.Equal(a, b) {
			t.Fatalf("%d octets: covered %x in %d fragments, %x in one message", n, a, len(ps), b)
		}
		// By hand: both lengths as if there were only header, generic header and inside.
		want := append(bytes.Clone(whole[:32]), inner...)
		binary.BigEndian.PutUint32(want[24:], uint32(32+len(inner)))
		binary.BigEndian.PutUint16(want[30:], uint16(4+len(inner)))
		if !bytes.Equal(b, want) {
			t.Fatalf("%d octets: covered %x, want %x", n, b, want)
		}
	}
	m := &Message{Payloads: []Payload{&VendorID{Data: make([]byte, 100)}}}
	if _, err := m.Seal(make([]byte, 104), c, 40); !errors.Is(err, ErrValue) {
		t.Errorf("into 40 octets: %v, want %v", err, ErrValue)
	}
}
