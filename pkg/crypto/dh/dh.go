// Package dh computes the key exchange methods of IKE behind one interface:
// the MODP groups of RFC 3526, the ECP groups of RFC 5903, Curve25519 and
// Curve448 of RFC 8031, the Brainpool curves of RFC 6954, and ML-KEM of FIPS 203. It hides group parameters,
// encodings and the checks of the peer's public value that RFC 6989 asks for.
// IKE's state machines call it; the data path never does.
//
//	initiator                       responder
//	Generate, Public      --KEi-->  Respond
//	Shared                <--KEr--
//
// Private values are made for one exchange and used with one peer's public
// value. All arithmetic on them is constant time: crypto/ecdh for the ECP groups,
// crypto/mlkem, circl for Curve25519 (in half the time of crypto/ecdh) and
// Curve448, and filippo.io/bigmod for MODP and for the Brainpool curves, which no
// library has in constant time (math/big, whose running time and memory access
// depend on the exponent, takes part in nothing secret).
package dh

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// PrivateKey is our half of one key exchange. It is not safe for concurrent use.
type PrivateKey interface {
	// KE is the method that made the key.
	KE() alg.KE
	// Public returns our public value as the KE payload carries it, of one
	// length for each method: MODP big-endian with leading zeros up to the
	// length of the prime (RFC 7296, 3.4), ECP x|y without a point format octet
	// (RFC 5903, 7), Curve25519 the 32 octets of RFC 7748, ML-KEM the
	// encapsulation key. The caller owns it.
	Public() []byte
	// Shared computes g^ir from the peer's public value, in the form that
	// SKEYSEED takes: MODP g^ir with leading zeros up to the length of the
	// prime (RFC 7296, 2.14), ECP x only (RFC 5903, 7), Curve25519 32 octets.
	// For ML-KEM the peer's value is the ciphertext that Respond made; one
	// that was altered gives a secret that nobody else has, without an error.
	// The error is a *LengthError, or wraps ErrInvalidPublic: the peer's
	// fault both. The caller wipes the result.
	Shared(peer []byte) (ipsec.Key, error)
	// Wipe overwrites the private value where the implementation lets us;
	// crypto/ecdh keeps a copy that only the collector takes away. Shared
	// fails after it.
	Wipe()
}

// ErrInvalidPublic says that a public value of the right length is not one
// that the method allows: out of range (RFC 6989, 2.1), not on the curve
// (2.3), or leading to the all-zero shared secret (RFC 8031, 2).
var ErrInvalidPublic = errors.New("invalid public value")

// ErrWiped says that a private key was used after Wipe: our own mistake.
var ErrWiped = errors.New("private key was wiped")

// LengthError says that a public value has the wrong length for its method.
type LengthError struct {
	KE        alg.KE
	Got, Want int // octets
}

func (e *LengthError) Error() string {
	return fmt.Sprintf("%v public value of %d octets: want %d", e.KE, e.Got, e.Want)
}

// UnsupportedError says that this package does not compute the method.
type UnsupportedError struct{ KE alg.KE }

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("key exchange method %v is not supported", e.KE)
}

// method is what a group provides.
type method interface {
	generate(rand io.Reader) (PrivateKey, error)
}

// kem is a method whose responder has no key of its own.
type kem interface {
	respond(peer []byte) (public []byte, shared ipsec.Key, err error)
}

var methods = map[alg.KE]method{
	alg.KEMODP2048: newMODP(alg.KEMODP2048, prime2048, 40),
	alg.KEMODP3072: newMODP(alg.KEMODP3072, prime3072, 53),
	alg.KEMODP4096: newMODP(alg.KEMODP4096, prime4096, 60),
	alg.KEMODP6144: newMODP(alg.KEMODP6144, prime6144, 68),
	alg.KEMODP8192: newMODP(alg.KEMODP8192, prime8192, 78),
	alg.KEECP256:   newECP(alg.KEECP256),
	alg.KEECP384:   newECP(alg.KEECP384),
	alg.KEECP521:   newECP(alg.KEECP521),
	alg.KEX25519:   x25519Method{},
	alg.KEX448:     x448Method{},

	alg.KEBrainpoolP224R1: newBrainpool(alg.KEBrainpoolP224R1, brainpool224),
	alg.KEBrainpoolP256R1: newBrainpool(alg.KEBrainpoolP256R1, brainpool256),
	alg.KEBrainpoolP384R1: newBrainpool(alg.KEBrainpoolP384R1, brainpool384),
	alg.KEBrainpoolP512R1: newBrainpool(alg.KEBrainpoolP512R1, brainpool512),

	alg.KEMLKEM768:  mlkem768{},
	alg.KEMLKEM1024: mlkem1024{},
}

// Generate makes a private key of ke from r; nil means crypto/rand, and only
// tests pass anything else. The same octets from r make the same key. The
// error is an *UnsupportedError, or that of r.
func Generate(ke alg.KE, r io.Reader) (PrivateKey, error) {
	m, ok := methods[ke]
	if !ok {
		return nil, &UnsupportedError{ke}
	}
	if r == nil {
		r = rand.Reader
	}
	return m.generate(r)
}

// Respond is the responder's whole part: from the initiator's public value it
// makes ours, and the shared secret. r is as for Generate, but crypto/mlkem takes
// nothing from it. Errors are those of Generate and Shared. The caller wipes the
// secret.
func Respond(ke alg.KE, r io.Reader, peer []byte) (public []byte, shared ipsec.Key, err error) {
	if m, ok := methods[ke].(kem); ok {
		return m.respond(peer)
	}
	k, err := Generate(ke, r)
	if err != nil {
		return nil, ipsec.Key{}, err
	}
	defer k.Wipe()
	if shared, err = k.Shared(peer); err != nil {
		return nil, ipsec.Key{}, err
	}
	return k.Public(), shared, nil
}
