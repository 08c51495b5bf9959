package dh

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"sync"

	"filippo.io/bigmod"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// modp is a MODP group of RFC 3526: a safe prime p = 2q+1 and the generator 2
// of the subgroup of order q. In such a group the only elements of small
// order are 1 and p-1, so the range check of RFC 6989, 2.1 is all that a
// peer's value needs.
type modp struct {
	ke     alg.KE
	prime  []byte // big-endian
	last   []byte // p-1, big-endian
	expLen int    // octets of a private exponent
	// The modulus precomputes on first use, so that programs which never
	// meet the group do not pay for it.
	mod func() *bigmod.Modulus
}

// newMODP makes a group. Private exponents have expLen octets: RFC 3526, 8
// gives exponent sizes for two estimates of each group's strength; these are
// the larger, rounded up to octets. A short exponent is safe here because p
// is a safe prime.
func newMODP(ke alg.KE, prime string, expLen int) *modp {
	p, err := hex.DecodeString(prime)
	if err != nil {
		panic("dh: malformed prime constant")
	}
	last := bytes.Clone(p)
	last[len(last)-1]-- // p is odd
	return &modp{ke: ke, prime: p, last: last, expLen: expLen, mod: sync.OnceValue(func() *bigmod.Modulus {
		m, err := bigmod.NewModulus(p)
		if err != nil {
			panic("dh: a constant is no modulus")
		}
		return m
	})}
}

func (g *modp) generate(r io.Reader) (PrivateKey, error) {
	x := make([]byte, g.expLen)
	if _, err := io.ReadFull(r, x); err != nil {
		return nil, fmt.Errorf("%v private value: %w", g.ke, err)
	}
	return g.key(x)
}

// key makes the private key of exponent x, which it takes.
func (g *modp) key(x []byte) (*modpKey, error) {
	two, err := bigmod.NewNat().SetBytes([]byte{2}, g.mod())
	if err != nil {
		return nil, fmt.Errorf("%v generator: %w", g.ke, err)
	}
	return &modpKey{g: g, x: x, pub: bigmod.NewNat().Exp(two, x, g.mod()).Bytes(g.mod())}, nil
}

type modpKey struct {
	g   *modp
	x   []byte // private exponent, big-endian; nil after Wipe
	pub []byte
}

func (k *modpKey) KE() alg.KE     { return k.g.ke }
func (k *modpKey) Public() []byte { return bytes.Clone(k.pub) }

func (k *modpKey) Shared(peer []byte) (ipsec.Key, error) {
	g := k.g
	if k.x == nil {
		return ipsec.Key{}, ErrWiped
	}
	if len(peer) != len(g.prime) {
		return ipsec.Key{}, &LengthError{g.ke, len(peer), len(g.prime)}
	}
	// 1 < y < p-1. The peer's value is public: comparing it may take any time.
	one := make([]byte, len(peer))
	one[len(one)-1] = 1
	if bytes.Compare(peer, one) <= 0 || bytes.Compare(peer, g.last) >= 0 {
		return ipsec.Key{}, fmt.Errorf("%v: %w", g.ke, ErrInvalidPublic)
	}
	y, err := bigmod.NewNat().SetBytes(peer, g.mod())
	if err != nil {
		return ipsec.Key{}, fmt.Errorf("%v: %w", g.ke, ErrInvalidPublic)
	}
	z := bigmod.NewNat().Exp(y, k.x, g.mod())
	secret := ipsec.NewKey(z.Bytes(g.mod()))
	clear(z.Bits())
	return secret, nil
}

func (k *modpKey) Wipe() {
	clear(k.x)
	k.x = nil
}
