package ipsec

import (
	"crypto/subtle"
	"fmt"
)

// Key is secret keying material. However it is printed or marshalled, only its
// length shows. Copies of a Key share its octets, so one Wipe wipes them all.
type Key struct{ b []byte }

// NewKey takes ownership of b.
func NewKey(b []byte) Key { return Key{b} }

// Bytes returns the octets themselves, not a copy.
func (k Key) Bytes() []byte { return k.b }

// Len returns the length in octets.
func (k Key) Len() int { return len(k.b) }

// Clone returns a Key with octets of its own.
func (k Key) Clone() Key { return Key{append([]byte(nil), k.b...)} }

// Equal compares in constant time.
func (k Key) Equal(o Key) bool { return subtle.ConstantTimeCompare(k.b, o.b) == 1 }

// Wipe overwrites the octets.
func (k Key) Wipe() { clear(k.b) }

func (k Key) String() string { return fmt.Sprintf("Key(%d octets)", len(k.b)) }

// Format makes every verb, %x and %#v included, print String.
func (k Key) Format(f fmt.State, _ rune) { fmt.Fprint(f, k.String()) }

// MarshalText keeps keys out of JSON and of structured logs.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }
