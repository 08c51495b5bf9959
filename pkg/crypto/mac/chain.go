package mac

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"

	"github.com/missiu/missiu/pkg/crypto/alg"
)

// chain is a CBC-MAC over AES whose last block is masked by one subkey if it is
// whole and by another, after padding with 1 0 0 ..., if it is not: AES-XCBC
// (RFC 3566, 4) and AES-CMAC (RFC 4493, 2.4), which differ in how the subkeys
// come from the key.
type chain struct {
	b           cipher.Block
	whole, part [aes.BlockSize]byte
}

func isChain(a alg.Integ) bool { return a == alg.IntegAESXCBC || a == alg.IntegAESCMAC }

func newChain(a alg.Integ, key []byte) (*chain, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	c := &chain{b: b}
	if a == alg.IntegAESCMAC {
		b.Encrypt(c.whole[:], c.whole[:])
		c.whole = double(c.whole)
		c.part = double(c.whole)
		return c, nil
	}
	// RFC 3566, 4, step 1: K1, K2 and K3 are the key's encryptions of blocks
	// of 1, 2 and 3.
	var k1 [aes.BlockSize]byte
	defer clear(k1[:])
	for i, k := range []*[aes.BlockSize]byte{&k1, &c.whole, &c.part} {
		for j := range k {
			k[j] = byte(i + 1)
		}
		b.Encrypt(k[:], k[:])
	}
	c.b, err = aes.NewCipher(k1[:])
	return c, err
}

// double multiplies by x in GF(2^128) (RFC 4493, 2.3), in constant time.
func double(k [aes.BlockSize]byte) (d [aes.BlockSize]byte) {
	for i := range aes.BlockSize - 1 {
		d[i] = k[i]<<1 | k[i+1]>>7
	}
	d[aes.BlockSize-1] = k[aes.BlockSize-1]<<1 ^ 0x87&-(k[0]>>7)
	return d
}

// compute returns the MAC of 16 octets, in s.sum.
func (c *chain) compute(s *Scratch, parts [][]byte) []byte {
	const bs = aes.BlockSize
	x, last := s.sum[:bs], s.last[:]
	clear(x)
	n := 0 // octets in last; a full one waits, since it may be the last of all
	for _, p := range parts {
		for len(p) > 0 {
			if n == bs {
				subtle.XORBytes(x, x, last)
				c.b.Encrypt(x, x)
				n = 0
			}
			for n == 0 && len(p) > bs {
				subtle.XORBytes(x, x, p[:bs])
				c.b.Encrypt(x, x)
				p = p[bs:]
			}
			k := copy(last[n:], p)
			n, p = n+k, p[k:]
		}
	}
	mask := &c.whole
	if n < bs {
		mask = &c.part
		last[n] = 0x80
		clear(last[n+1:])
	}
	subtle.XORBytes(x, x, last)
	subtle.XORBytes(x, x, mask[:])
	c.b.Encrypt(x, x)
	clear(last)
	return x
}
