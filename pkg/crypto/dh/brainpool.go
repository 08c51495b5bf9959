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

// brainpool is a curve y² = x³ + ax + b of RFC 5639 as RFC 6954 uses it: public
// values are x|y, the secret is x. Its order is prime, so that a point on it has
// that order, and the addition formulas hold for every pair of points, the point
// at infinity included; with bigmod for the arithmetic nothing that is done or
// read depends on the private value. A multiplication takes from some milliseconds
// to some tens of them.
type brainpool struct {
	ke    alg.KE
	n     int // octets of a coordinate and of a scalar
	curve func() *brainpoolCurve
}

type brainpoolCurve struct {
	p, q     *bigmod.Modulus // of the field, the order
	a, b, b3 *bigmod.Nat     // b3 = 3b
	inverse  []byte          // p-2, the exponent of an inverse
	g        point
}

// point has projective coordinates: x/z, y/z; z = 0 is the point at infinity.
type point struct{ x, y, z *bigmod.Nat }

// newBrainpool makes a group of the hexadecimal parameters of RFC 5639, 3.
func newBrainpool(ke alg.KE, params [6]string) *brainpool {
	p, a, b, gx, gy, q := params[0], params[1], params[2], params[3], params[4], params[5]
	octets := func(s string) []byte {
		o, err := hex.DecodeString(s)
		if err != nil {
			panic("dh: malformed curve constant")
		}
		return o
	}
	return &brainpool{ke: ke, n: len(p) / 2, curve: sync.OnceValue(func() *brainpoolCurve {
		c := &brainpoolCurve{inverse: octets(p)}
		c.inverse[len(c.inverse)-1] -= 2 // no borrow: p is odd, and not 1
		var err1, err2 error
		c.p, err1 = bigmod.NewModulus(octets(p))
		c.q, err2 = bigmod.NewModulus(octets(q))
		if err1 != nil || err2 != nil {
			panic("dh: a constant is no modulus")
		}
		element := func(s string) *bigmod.Nat {
			x, err := bigmod.NewNat().SetBytes(octets(s), c.p)
			if err != nil {
				panic("dh: a constant is out of the field")
			}
			return x
		}
		c.a, c.b = element(a), element(b)
		c.b3 = c.add(c.add(c.b, c.b), c.b)
		c.g = point{element(gx), element(gy), c.small(1)}
		return c
	})}
}

func (c *brainpoolCurve) zero() *bigmod.Nat              { return bigmod.NewNat().ExpandFor(c.p) }
func (c *brainpoolCurve) small(n uint) *bigmod.Nat       { return bigmod.NewNat().SetUint(n).ExpandFor(c.p) }
func (c *brainpoolCurve) copy(x *bigmod.Nat) *bigmod.Nat { return c.zero().Add(x, c.p) }

func (c *brainpoolCurve) add(x, y *bigmod.Nat) *bigmod.Nat { return c.copy(x).Add(y, c.p) }
func (c *brainpoolCurve) sub(x, y *bigmod.Nat) *bigmod.Nat { return c.copy(x).Sub(y, c.p) }
func (c *brainpoolCurve) mul(x, y *bigmod.Nat) *bigmod.Nat { return c.copy(x).Mul(y, c.p) }

// sum adds two points, equal ones and the point at infinity too: algorithm 1 of
// Renes, Costello and Batina, Complete addition formulas for prime order elliptic
// curves (EUROCRYPT 2016), in the form of its equations.
func (c *brainpoolCurve) sum(p, q point) point {
	xx, yy, zz := c.mul(p.x, q.x), c.mul(p.y, q.y), c.mul(p.z, q.z)
	// The sums of mixed products, such as x1*y2 + x2*y1.
	mixed := func(p1, p2, q1, q2, a, b *bigmod.Nat) *bigmod.Nat {
		m := c.mul(c.add(p1, p2), c.add(q1, q2))
		return m.Sub(a, c.p).Sub(b, c.p)
	}
	xy := mixed(p.x, p.y, q.x, q.y, xx, yy)
	xz := mixed(p.x, p.z, q.x, q.z, xx, zz)
	yz := mixed(p.y, p.z, q.y, q.z, yy, zz)

	azz := c.mul(c.a, zz)
	s := c.add(c.mul(c.a, xz), c.mul(c.b3, zz))               // a*xz + 3b*zz
	t := c.add(c.add(c.add(xx, xx), xx), azz)                 // 3xx + a*zz
	u := c.mul(c.b3, xz).Add(c.mul(c.a, c.sub(xx, azz)), c.p) // 3b*xz + a*(xx - a*zz)
	less, more := c.sub(yy, s), c.add(yy, s)
	return point{
		c.mul(xy, less).Sub(c.mul(yz, u), c.p),
		c.mul(less, more).Add(c.mul(t, u), c.p),
		c.mul(yz, more).Add(c.mul(xy, t), c.p),
	}
}

// choose returns p if bit is 1, q if it is 0.
func (c *brainpoolCurve) choose(bit uint, p, q point) point {
	b := c.small(bit)
	of := func(x, y *bigmod.Nat) *bigmod.Nat { return c.sub(x, y).Mul(b, c.p).Add(y, c.p) }
	return point{of(p.x, q.x), of(p.y, q.y), of(p.z, q.z)}
}

// times multiplies a point by k, big-endian, and returns its coordinates; k is
// not a multiple of the order.
func (c *brainpoolCurve) times(k []byte, p point) (x, y *bigmod.Nat) {
	r := point{c.zero(), c.small(1), c.zero()}
	for _, octet := range k {
		for i := 7; i >= 0; i-- {
			r = c.sum(r, r)
			r = c.choose(uint(octet>>i)&1, c.sum(r, p), r)
		}
	}
	inv := bigmod.NewNat().Exp(r.z, c.inverse, c.p)
	return c.mul(r.x, inv), c.mul(r.y, inv)
}

// point reads x|y; false if that is not on the curve (RFC 6989, 2.3).
func (c *brainpoolCurve) point(b []byte) (p point, ok bool) {
	x, err1 := bigmod.NewNat().SetBytes(b[:len(b)/2], c.p)
	y, err2 := bigmod.NewNat().SetBytes(b[len(b)/2:], c.p)
	if err1 != nil || err2 != nil {
		return p, false
	}
	right := c.add(c.mul(c.mul(x, x), x), c.mul(c.a, x)).Add(c.b, c.p)
	return point{x, y, c.small(1)}, c.mul(y, y).Equal(right) == 1
}

// generate draws scalars until one lies in [1, order-1].
func (g *brainpool) generate(r io.Reader) (PrivateKey, error) {
	x := make([]byte, g.n)
	defer clear(x)
	// A draw fails with a probability below one half.
	for range 128 {
		if _, err := io.ReadFull(r, x); err != nil {
			return nil, fmt.Errorf("%v private value: %w", g.ke, err)
		}
		if k, ok := g.key(x); ok {
			return k, nil
		}
	}
	return nil, fmt.Errorf("%v private value: random source never gives a number in range", g.ke)
}

// key makes the private key of scalar x, big-endian; false if it is not in range.
func (g *brainpool) key(x []byte) (*brainpoolKey, bool) {
	c := g.curve()
	s, err := bigmod.NewNat().SetBytes(x, c.q)
	if err != nil || s.IsZero() == 1 {
		return nil, false
	}
	clear(s.Bits())
	px, py := c.times(x, c.g)
	return &brainpoolKey{g, bytes.Clone(x), append(px.Bytes(c.p), py.Bytes(c.p)...)}, true
}

type brainpoolKey struct {
	g   *brainpool
	x   []byte // private scalar, big-endian; nil after Wipe
	pub []byte
}

func (k *brainpoolKey) KE() alg.KE     { return k.g.ke }
func (k *brainpoolKey) Public() []byte { return bytes.Clone(k.pub) }

func (k *brainpoolKey) Shared(peer []byte) (ipsec.Key, error) {
	if k.x == nil {
		return ipsec.Key{}, ErrWiped
	}
	if len(peer) != len(k.pub) {
		return ipsec.Key{}, &LengthError{k.g.ke, len(peer), len(k.pub)}
	}
	c := k.g.curve()
	p, ok := c.point(peer)
	if !ok {
		return ipsec.Key{}, fmt.Errorf("%v: %w", k.g.ke, ErrInvalidPublic)
	}
	z, y := c.times(k.x, p)
	secret := ipsec.NewKey(z.Bytes(c.p))
	clear(z.Bits())
	clear(y.Bits())
	return secret, nil
}

func (k *brainpoolKey) Wipe() {
	clear(k.x)
	k.x = nil
}
