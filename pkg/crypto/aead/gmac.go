package aead

import (
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/mac"
	"github.com/missiu/missiu/pkg/ipsec"
)

// newTag makes AES-GCM with the long tag, here for its tag alone: the standard
// library's, which takes what it does not encrypt several blocks at a time, as
// own code does only with what it encrypts.
func newTag(key, salt []byte) (core, error) { return newGCM(key, salt, longTag) }

// nullGMAC is ENCR_NULL_AUTH_AES_GMAC (RFC 4543, 3): all that GCM covers
// without encrypting it is aad, IV and payload, in this order.
type nullGMAC struct{ g core }

func (c *nullGMAC) seal(s *Scratch, dst, aad, iv, plain, _ []byte) {
	n := copy(dst, plain)
	c.g.seal(s, dst[n:], s.join(aad, iv, dst[:n]), iv, nil, nil)
}

func (c *nullGMAC) open(s *Scratch, dst, aad, iv, ct, _ []byte) bool {
	n := len(dst)
	if !c.g.open(s, nil, s.join(aad, iv, ct[:n]), iv, ct[n:], nil) {
		return false
	}
	copy(dst, ct[:n])
	return true
}

// join puts parts side by side in working memory.
func (s *Scratch) join(parts ...[]byte) []byte {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	b := s.grow(n)
	n = 0
	for _, p := range parts {
		n += copy(b[n:], p)
	}
	return b
}

// GMAC is one key of AUTH_AES_GMAC (RFC 4543, 4), the integrity transform of AH
// whose ICV field begins with an IV:
//
//	| IV 8 | tag 16 |
//
// It does not change, so goroutines share it, each with a Scratch of its own.
type GMAC struct{ g core }

// GMACLen is the length in octets of the ICV field of GMAC.
const GMACLen = gmacIV + longTag

const gmacIV = 8

// NewGMAC prepares key, which ends with the salt and is not kept. The error is
// a *mac.UnsupportedError or a *mac.KeyLengthError.
func NewGMAC(a alg.Integ, key ipsec.Key) (*GMAC, error) {
	i := a.Info()
	switch {
	case i.SaltLen == 0:
		return nil, &mac.UnsupportedError{Integ: a}
	case key.Len() != i.KeyLen:
		return nil, &mac.KeyLengthError{Integ: a, Got: key.Len(), Want: i.KeyLen}
	}
	n := i.KeyLen - i.SaltLen
	g, err := newTag(key.Bytes()[:n], key.Bytes()[n:])
	return &GMAC{g}, err
}

// Sum writes the IV of message n, which no other message of this key has, and
// the tag over the concatenation of parts to icv[:GMACLen], last.
func (g *GMAC) Sum(s *Scratch, icv []byte, n uint64, parts ...[]byte) {
	aad := s.join(parts...)
	for i := range gmacIV {
		icv[i] = byte(n >> (8 * (gmacIV - 1 - i)))
	}
	g.g.seal(s, icv[gmacIV:GMACLen], aad, icv[:gmacIV], nil, nil)
}

// Verify reports in constant time whether icv, of exactly GMACLen octets, is
// what Sum writes over the concatenation of parts.
func (g *GMAC) Verify(s *Scratch, icv []byte, parts ...[]byte) bool {
	return len(icv) == GMACLen && g.g.open(s, nil, s.join(parts...), icv[:gmacIV], icv[gmacIV:], nil)
}
