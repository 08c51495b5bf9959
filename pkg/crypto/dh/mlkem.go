package dh

import (
	"bytes"
	"crypto/mlkem"
	"fmt"
	"io"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// ML-KEM (FIPS 203): KEi is the encapsulation key, KEr the ciphertext, and the
// shared secret has 32 octets for every parameter set. A key is made for one
// exchange, so that the two randomness seeds d and z are all that it needs.

type mlkem768 struct{}

func (mlkem768) generate(r io.Reader) (PrivateKey, error) {
	seed, err := mlkemSeed(alg.KEMLKEM768, r)
	if err != nil {
		return nil, err
	}
	defer clear(seed)
	k, err := mlkem.NewDecapsulationKey768(seed)
	if err != nil {
		return nil, fmt.Errorf("%v private value: %w", alg.KEMLKEM768, err)
	}
	return &mlkemKey{alg.KEMLKEM768, k, k.EncapsulationKey().Bytes(), mlkem.CiphertextSize768}, nil
}

func (mlkem768) respond(peer []byte) ([]byte, ipsec.Key, error) {
	if len(peer) != mlkem.EncapsulationKeySize768 {
		return nil, ipsec.Key{}, &LengthError{alg.KEMLKEM768, len(peer), mlkem.EncapsulationKeySize768}
	}
	k, err := mlkem.NewEncapsulationKey768(peer) // checks that all coefficients are reduced
	if err != nil {
		return nil, ipsec.Key{}, fmt.Errorf("%v: %w", alg.KEMLKEM768, ErrInvalidPublic)
	}
	shared, ciphertext := k.Encapsulate()
	return ciphertext, ipsec.NewKey(shared), nil
}

type mlkem1024 struct{}

func (mlkem1024) generate(r io.Reader) (PrivateKey, error) {
	seed, err := mlkemSeed(alg.KEMLKEM1024, r)
	if err != nil {
		return nil, err
	}
	defer clear(seed)
	k, err := mlkem.NewDecapsulationKey1024(seed)
	if err != nil {
		return nil, fmt.Errorf("%v private value: %w", alg.KEMLKEM1024, err)
	}
	return &mlkemKey{alg.KEMLKEM1024, k, k.EncapsulationKey().Bytes(), mlkem.CiphertextSize1024}, nil
}

func (mlkem1024) respond(peer []byte) ([]byte, ipsec.Key, error) {
	if len(peer) != mlkem.EncapsulationKeySize1024 {
		return nil, ipsec.Key{}, &LengthError{alg.KEMLKEM1024, len(peer), mlkem.EncapsulationKeySize1024}
	}
	k, err := mlkem.NewEncapsulationKey1024(peer)
	if err != nil {
		return nil, ipsec.Key{}, fmt.Errorf("%v: %w", alg.KEMLKEM1024, ErrInvalidPublic)
	}
	shared, ciphertext := k.Encapsulate()
	return ciphertext, ipsec.NewKey(shared), nil
}

func mlkemSeed(ke alg.KE, r io.Reader) ([]byte, error) {
	seed := make([]byte, mlkem.SeedSize)
	if _, err := io.ReadFull(r, seed); err != nil {
		clear(seed)
		return nil, fmt.Errorf("%v private value: %w", ke, err)
	}
	return seed, nil
}

// mlkemKey is the initiator's key of either parameter set.
type mlkemKey struct {
	ke   alg.KE
	key  interface{ Decapsulate([]byte) ([]byte, error) } // nil after Wipe
	pub  []byte
	size int // octets of a ciphertext
}

func (k *mlkemKey) KE() alg.KE     { return k.ke }
func (k *mlkemKey) Public() []byte { return bytes.Clone(k.pub) }

func (k *mlkemKey) Shared(peer []byte) (ipsec.Key, error) {
	if k.key == nil {
		return ipsec.Key{}, ErrWiped
	}
	if len(peer) != k.size {
		return ipsec.Key{}, &LengthError{k.ke, len(peer), k.size}
	}
	z, err := k.key.Decapsulate(peer)
	if err != nil {
		return ipsec.Key{}, fmt.Errorf("%v: %w", k.ke, ErrInvalidPublic)
	}
	return ipsec.NewKey(z), nil
}

func (k *mlkemKey) Wipe() { k.key = nil }
