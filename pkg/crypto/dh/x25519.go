package dh

import (
	"bytes"
	"fmt"
	"io"

	"github.com/cloudflare/circl/dh/x25519"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// x25519Method is Curve25519 as RFC 8031 uses it.
type x25519Method struct{}

func (x25519Method) generate(r io.Reader) (PrivateKey, error) {
	k := &x25519Key{}
	if _, err := io.ReadFull(r, k.x[:]); err != nil {
		return nil, fmt.Errorf("%v private value: %w", alg.KEX25519, err)
	}
	x25519.KeyGen(&k.pub, &k.x)
	return k, nil
}

// x25519Key has the private value as it was drawn; the multiplications clamp it.
type x25519Key struct {
	x, pub x25519.Key
	wiped  bool
}

func (k *x25519Key) KE() alg.KE     { return alg.KEX25519 }
func (k *x25519Key) Public() []byte { return bytes.Clone(k.pub[:]) }

func (k *x25519Key) Shared(peer []byte) (ipsec.Key, error) {
	if k.wiped {
		return ipsec.Key{}, ErrWiped
	}
	if len(peer) != x25519.Size {
		return ipsec.Key{}, &LengthError{alg.KEX25519, len(peer), x25519.Size}
	}
	z := make([]byte, x25519.Size)
	// False for a point of low order, which gives the all-zero secret.
	if !x25519.Shared((*x25519.Key)(z), &k.x, (*x25519.Key)(peer)) {
		return ipsec.Key{}, fmt.Errorf("%v: %w", alg.KEX25519, ErrInvalidPublic)
	}
	return ipsec.NewKey(z), nil
}

func (k *x25519Key) Wipe() {
	clear(k.x[:])
	k.wiped = true
}
