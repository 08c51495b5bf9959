package aead

import (
	"crypto/cipher"
	"crypto/des"

	"github.com/missiu/missiu/pkg/crypto/mac"
)

// desCBC is DES or triple DES in CBC mode for old peers: with integrity or bare
// (RFC 2405, RFC 2451), and as the ESP of RFC 1827 has it, where an IV of four
// octets stands for itself and its complement (RFC 1829, 2; RFC 1851, 2). Those
// with such an IV are bare, so that no MAC covers what it stands for.
type desCBC struct{ cbc }

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
	return &desCBC{cbc{b, m}}, err
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
	c.cbc.seal(s, dst, aad, c.first(s, iv), plain, tail)
}

func (c *desCBC) open(s *Scratch, dst, aad, iv, ct, tail []byte) bool {
	return c.cbc.open(s, dst, aad, c.first(s, iv), ct, tail)
}
