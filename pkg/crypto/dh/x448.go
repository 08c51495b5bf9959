package dh

import (
	"bytes"
	"fmt"
	"io"

	"github.com/cloudflare/circl/dh/x448"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// x448Method is Curve448 as RFC 8031 uses it.
type x448Method struct{}

func (x448Method) generate(r io.Reader) (PrivateKey, error) {
	k := &x448Key{}
	if _, err := io.ReadFull(r, k.x[:]); err != nil {
		return nil, fmt.Errorf("%v private value: %w", alg.KEX448, err)
	}
	x448.KeyGen(&k.pub, &k.x)
	return k, nil
}

type x448Key struct {
	x, pub x448.Key
	wiped  bool
}

func (k *x448Key) KE() alg.KE     { return alg.KEX448 }
func (k *x448Key) Public() []byte { return bytes.Clone(k.pub[:]) }

func (k *x448Key) Shared(peer []byte) (ipsec.Key, error) {
	if k.wiped {
		return ipsec.Key{}, ErrWiped
	}
	if len(peer) != x448.Size {
		return ipsec.Key{}, &LengthError{alg.KEX448, len(peer), x448.Size}
	}
	var z x448.Key
	defer clear(z[:])
	// False for a point of low order, which gives the all-zero secret.
	if !x448.Shared(&z, &k.x, (*x448.Key)(peer)) {
		return ipsec.Key{}, fmt.Errorf("%v: %w", alg.KEX448, ErrInvalidPublic)
	}
	return ipsec.NewKey(bytes.Clone(z[:])), nil
}

func (k *x448Key) Wipe() {
	clear(k.x[:])
	k.wiped = true
}
