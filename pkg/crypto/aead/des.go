package aead

import (
	"crypto/cipher"
	"crypto/des"
	"crypto/subtle"

	"github.com/missiu/missiu/pkg/crypto/mac"
)

// desCBC is DES or triple DES in CBC mode for old peers: with integrity or bare
// (RFC 2405, RFC 2451), and as the ESP of RFC 1827 has it, where an IV of four
// octets stands for itself and its complement (RFC 1829, 2; RFC 1851, 2).
type desCBC struct {
	b cipher.Block
	m *mac.MAC // nil: bare
}

// newDES takes a key of one, two or three DES keys; of two the first is the
// third as well.
func newDES(key []byte, m *mac.MAC) (core, error) {
	const n = des.BlockSize
	var b cipher.Block
	var err error
	switch len(key) {
	case n:
		b, err = des.NewCipher(key)
	case 2 * n:
		k := append(append(make([]byte, 0, 3*n), key...), key[:n]...)
		defer clear(k)
		b, err = des.NewTripleDESCipher(k)
	default:
		b, err = des.NewTripleDESCipher(key)
	}
	return &desCBC{b, m}, err
}

// first puts the IV of the chain into s.block, whose second half stays free.
func (c *desCBC) first(s *Scratch, iv []byte) []byte {
	if copy(s.block[:], iv) == des.BlockSize/2 {
		for i, v := range iv {
			s.block[len(iv)+i] = ^v
		}
	}
	return s.block[:des.BlockSize]
}

func (c *desCBC) seal(s *Scratch, dst, aad, iv, plain, tail []byte) {
	const bs = des.BlockSize
	n := len(plain)
	prev := c.first(s, iv)
	for i := 0; i < n; i += bs {
		out := dst[i : i+bs : i+bs]
		subtle.XORBytes(out, plain[i:i+bs], prev)
		c.b.Encrypt(out, out)
		prev = out
	}
	if c.m != nil {
		c.m.Sum(&s.mac, dst[n:], aad, iv, dst[:n], tail)
	}
}

func (c *desCBC) open(s *Scratch, dst, aad, iv, ct, tail []byte) bool {
	const bs = des.BlockSize
	n := len(dst)
	if c.m != nil && !c.m.Verify(&s.mac, ct[n:], aad, iv, ct[:n], tail) {
		return false
	}
	first := c.first(s, iv)
	// From the end, so that in place a block's predecessor is still there.
	for i := n - bs; i >= 0; i -= bs {
		prev := first
		if i > 0 {
			prev = ct[i-bs : i]
		}
		out := s.block[bs:]
		c.b.Decrypt(out, ct[i:i+bs])
		subtle.XORBytes(dst[i:i+bs], out, prev)
	}
	return true
}
