package aead

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"

	"github.com/missiu/missiu/pkg/crypto/mac"
)

// null is no encryption (RFC 2410) with integrity.
type null struct{ m *mac.MAC }

func (c *null) seal(s *Scratch, dst, aad, iv, plain, tail []byte) {
	n := copy(dst, plain)
	c.m.Sum(&s.mac, dst[n:], aad, iv, dst[:n], tail)
}

func (c *null) open(s *Scratch, dst, aad, iv, ct, tail []byte) bool {
	n := len(dst)
	if !c.m.Verify(&s.mac, ct[n:], aad, iv, ct[:n], tail) {
		return false
	}
	copy(dst, ct)
	return true
}

// cbc is AES-CBC (RFC 3602) with integrity over the ciphertext. The chaining
// is done here, because an object of crypto/cipher that chains holds the IV,
// and so would serve one goroutine only, or cost an allocation per packet.
type cbc struct {
	b cipher.Block
	m *mac.MAC
}

func newCBC(key []byte, m *mac.MAC) (core, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return &cbc{b, m}, nil
}

func (c *cbc) seal(s *Scratch, dst, aad, iv, plain, tail []byte) {
	bs, n := c.b.BlockSize(), len(plain)
	prev := iv
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

func (c *cbc) open(s *Scratch, dst, aad, iv, ct, tail []byte) bool {
	bs, n := c.b.BlockSize(), len(dst)
	if c.m != nil && !c.m.Verify(&s.mac, ct[n:], aad, iv, ct[:n], tail) {
		return false
	}
	out := s.block[len(s.block)-bs:]
	// From the end, so that in place a block's predecessor is still there.
	for i := n - bs; i >= 0; i -= bs {
		prev := iv
		if i > 0 {
			prev = ct[i-bs : i]
		}
		c.b.Decrypt(out, ct[i:i+bs])
		subtle.XORBytes(dst[i:i+bs], out, prev)
	}
	return true
}
