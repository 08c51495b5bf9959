package ikev2

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"hash"
)

// cbcHMAC is ENCR_AES_CBC with an HMAC, as the captures use it.
type cbcHMAC struct {
	block  cipher.Block
	hash   func() hash.Hash
	key    []byte
	icvLen int
}

func newCBC(sk, ski []byte, integ string) (*cbcHMAC, error) {
	b, err := aes.NewCipher(sk)
	if err != nil {
		return nil, err
	}
	switch integ {
	case "HMAC_SHA2_256_128 [RFC4868]":
		return &cbcHMAC{b, sha256.New, ski, 16}, nil
	case "HMAC_SHA2_384_192 [RFC4868]":
		return &cbcHMAC{b, sha512.New384, ski, 24}, nil
	}
	return nil, errors.New("unknown integrity transform " + integ)
}

func (c *cbcHMAC) BlockLen() int { return 16 }
func (c *cbcHMAC) IVLen() int    { return 16 }
func (c *cbcHMAC) ICVLen() int   { return c.icvLen }

func (c *cbcHMAC) icv(aad, b []byte) []byte {
	m := hmac.New(c.hash, c.key)
	m.Write(aad)
	m.Write(b)
	return m.Sum(nil)[:c.icvLen]
}

func (c *cbcHMAC) Seal(aad, body []byte) error {
	if _, err := rand.Read(body[:16]); err != nil {
		return err
	}
	end := len(body) - c.icvLen
	p := body[16:end]
	cipher.NewCBCEncrypter(c.block, body[:16]).CryptBlocks(p, p)
	copy(body[end:], c.icv(aad, body[:end]))
	return nil
}

func (c *cbcHMAC) Open(aad, body []byte) ([]byte, error) {
	end := len(body) - c.icvLen
	if (end-16)%16 != 0 || !hmac.Equal(c.icv(aad, body[:end]), body[end:]) {
		return nil, errors.New("ICV")
	}
	p := make([]byte, end-16)
	cipher.NewCBCDecrypter(c.block, body[:16]).CryptBlocks(p, body[16:end])
	return p, nil
}

// gcm is ENCR_AES_GCM_16 with the salt behind the key (RFC 5282).
type gcm struct {
	aead cipher.AEAD
	salt []byte
	n    byte
}

func newGCM(key []byte) (*gcm, error) {
	b, err := aes.NewCipher(key[:len(key)-4])
	if err != nil {
		return nil, err
	}
	a, err := cipher.NewGCM(b)
	return &gcm{aead: a, salt: key[len(key)-4:]}, err
}

func (c *gcm) BlockLen() int { return 1 }
func (c *gcm) IVLen() int    { return 8 }
func (c *gcm) ICVLen() int   { return 16 }

func (c *gcm) nonce(iv []byte) []byte { return append(append([]byte(nil), c.salt...), iv...) }

func (c *gcm) Seal(aad, body []byte) error {
	c.n++
	body[7] = c.n
	p := body[8 : len(body)-16]
	c.aead.Seal(p[:0], c.nonce(body[:8]), p, aad)
	return nil
}

func (c *gcm) Open(aad, body []byte) ([]byte, error) {
	return c.aead.Open(nil, c.nonce(body[:8]), body[8:], aad)
}
