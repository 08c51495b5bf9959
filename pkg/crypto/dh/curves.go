package dh

import (
	"bytes"
	"crypto/ecdh"
	"fmt"
	"io"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// ecp is a random ECP group of RFC 5903. Public values are x|y; crypto/ecdh
// checks that a point lies on the curve (the curves have cofactor 1, so such
// a point has the right order) and never sees the point at infinity, which
// has no encoding here.
type ecp struct {
	ke    alg.KE
	curve ecdh.Curve
	n     int  // octets of a coordinate and of a scalar
	mask  byte // of the scalar's first octet: the bits that the order has
}

func newECP(ke alg.KE) *ecp {
	switch ke {
	case alg.KEECP256:
		return &ecp{ke, ecdh.P256(), 32, 0xff}
	case alg.KEECP384:
		return &ecp{ke, ecdh.P384(), 48, 0xff}
	case alg.KEECP521:
		return &ecp{ke, ecdh.P521(), 66, 0x01}
	}
	panic("dh: no such ECP group")
}

// generate draws scalars until one lies in [1, order-1] (FIPS 186-5, A.2.2).
// Not ecdh's own GenerateKey: since Go 1.26 it ignores the reader.
func (g *ecp) generate(r io.Reader) (PrivateKey, error) {
	x := make([]byte, g.n)
	defer clear(x)
	// A draw fails with a probability below one half for P-521 and
	// negligible for the others; 128 failures mean a broken reader.
	for range 128 {
		if _, err := io.ReadFull(r, x); err != nil {
			return nil, fmt.Errorf("%v private value: %w", g.ke, err)
		}
		x[0] &= g.mask
		if k, err := g.key(x); err == nil {
			return k, nil
		}
	}
	return nil, fmt.Errorf("%v private value: random source never gives a number in range", g.ke)
}

// key makes the private key of scalar x, big-endian.
func (g *ecp) key(x []byte) (*curveKey, error) {
	k, err := g.curve.NewPrivateKey(x)
	if err != nil {
		return nil, err
	}
	// Drop the point format octet: 4, uncompressed.
	return &curveKey{ke: g.ke, key: k, pub: k.PublicKey().Bytes()[1:], curve: g.curve}, nil
}

// curveKey is a private key of a curve of crypto/ecdh.
type curveKey struct {
	ke    alg.KE
	key   *ecdh.PrivateKey // nil after Wipe
	pub   []byte
	curve ecdh.Curve
}

func (k *curveKey) KE() alg.KE     { return k.ke }
func (k *curveKey) Public() []byte { return bytes.Clone(k.pub) }

func (k *curveKey) Shared(peer []byte) (ipsec.Key, error) {
	if k.key == nil {
		return ipsec.Key{}, ErrWiped
	}
	if len(peer) != len(k.pub) {
		return ipsec.Key{}, &LengthError{k.ke, len(peer), len(k.pub)}
	}
	p, err := k.curve.NewPublicKey(append([]byte{4}, peer...))
	if err != nil {
		return ipsec.Key{}, fmt.Errorf("%v: %w", k.ke, ErrInvalidPublic)
	}
	// ECDH returns x alone.
	z, err := k.key.ECDH(p)
	if err != nil {
		return ipsec.Key{}, fmt.Errorf("%v: %w", k.ke, ErrInvalidPublic)
	}
	return ipsec.NewKey(z), nil
}

func (k *curveKey) Wipe() { k.key = nil }
