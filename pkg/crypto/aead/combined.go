package aead

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
)

// std is a combined mode cipher of crypto/cipher's kind. Nonce: salt of four
// octets, then the IV of eight (RFC 4106, 4; RFC 7634, 2).
type std struct {
	a    cipher.AEAD
	salt [4]byte
}

func newGCM(key, salt []byte, tagLen int) (core, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	a, err := cipher.NewGCMWithTagSize(b, tagLen)
	if err != nil {
		return nil, err
	}
	return &std{a, [4]byte(salt)}, nil
}

func (c *std) nonce(s *Scratch, iv []byte) []byte {
	copy(s.nonce[:4], c.salt[:])
	copy(s.nonce[4:], iv)
	return s.nonce[:]
}

func (c *std) seal(s *Scratch, dst, aad, iv, plain, _ []byte) {
	c.a.Seal(dst[:0], c.nonce(s, iv), plain, aad)
}

func (c *std) open(s *Scratch, dst, aad, iv, ct, _ []byte) bool {
	_, err := c.a.Open(dst[:0], c.nonce(s, iv), ct, aad)
	return err == nil
}

// gcm8 is GCM with a tag of eight octets, which crypto/cipher does not make
// (it is discouraged: a forger succeeds with 2^-64 and learns from it). The
// short tag is the first half of the long one (NIST SP 800-38D, 7.1), so
// sealing is cutting. To open, the long tag has to be made anew, and
// crypto/cipher makes tags only of plaintext: so decrypt into private memory
// (GCM encrypts by xor with a key stream, encrypting the ciphertext again
// decrypts it), seal that, compare the tags, and only then hand it out. Twice
// the work, on a suite that hardly anyone should use, without own GHASH code.
type gcm8 struct{ std }

const (
	longTag  = 16
	shortTag = 8
)

func newGCM8(key, salt []byte) (core, error) {
	c, err := newGCM(key, salt, longTag)
	if err != nil {
		return nil, err
	}
	return &gcm8{*c.(*std)}, nil
}

func (c *gcm8) seal(s *Scratch, dst, aad, iv, plain, _ []byte) {
	b := s.grow(len(plain) + longTag)
	c.a.Seal(b[:0], c.nonce(s, iv), plain, aad)
	copy(dst, b[:len(dst)])
}

func (c *gcm8) open(s *Scratch, dst, aad, iv, ct, _ []byte) bool {
	n := len(ct) - shortTag
	b := s.grow(2 * (n + longTag))
	plain, again := b[:n+longTag], b[n+longTag:]
	nonce := c.nonce(s, iv)
	c.a.Seal(plain[:0], nonce, ct[:n], nil) // the tag of this one means nothing
	plain = plain[:n]
	c.a.Seal(again[:0], nonce, plain, aad)
	ok := subtle.ConstantTimeCompare(again[n:n+shortTag], ct[n:]) == 1
	if ok {
		copy(dst, plain)
	}
	clear(plain)
	return ok
}

// grow returns n octets of working memory.
func (s *Scratch) grow(n int) []byte {
	if cap(s.buf) < n {
		s.buf = make([]byte, max(n, 4096))
	}
	return s.buf[:n]
}
