package aead

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"

	"github.com/missiu/missiu/pkg/crypto/mac"
)

// counter is AES in counter mode. The streams of crypto/cipher hold the counter,
// and so would cost an allocation per packet.
type counter interface {
	// xor writes src xor the key stream to dst of the same length, which is
	// src or disjoint. The first block of the stream is s.block, encrypted,
	// whose last four octets count; s.block is used up.
	xor(s *Scratch, dst, src []byte)
}

func newCounter(key []byte) (counter, error) {
	if useCBC() {
		return newOwnCounter(key), nil
	}
	b, err := aes.NewCipher(key)
	return &stdCounter{b}, err
}

type stdCounter struct{ b cipher.Block }

func (c *stdCounter) xor(s *Scratch, dst, src []byte) {
	for len(src) > 0 {
		c.b.Encrypt(s.stream[:aes.BlockSize], s.block[:])
		n := subtle.XORBytes(dst, src, s.stream[:aes.BlockSize])
		dst, src = dst[n:], src[n:]
		s.count()
	}
}

// count adds one to the counter in s.block.
func (s *Scratch) count() {
	b := s.block[aes.BlockSize-4:]
	binary.BigEndian.PutUint32(b, binary.BigEndian.Uint32(b)+1)
}

// ctr is AES-CTR (RFC 3686) with integrity over the ciphertext. Counter block:
// nonce of four octets, IV of eight, counter from one.
type ctr struct {
	c     counter
	nonce [4]byte
	m     *mac.MAC
}

func newCTR(key, nonce []byte, m *mac.MAC) (core, error) {
	c, err := newCounter(key)
	return &ctr{c, [4]byte(nonce), m}, err
}

func (c *ctr) xor(s *Scratch, dst, iv, src []byte) {
	copy(s.block[:4], c.nonce[:])
	copy(s.block[4:12], iv)
	binary.BigEndian.PutUint32(s.block[12:], 1)
	c.c.xor(s, dst, src)
}

func (c *ctr) seal(s *Scratch, dst, aad, iv, plain, tail []byte) {
	n := len(plain)
	c.xor(s, dst[:n], iv, plain)
	c.m.Sum(&s.mac, dst[n:], aad, iv, dst[:n], tail)
}

func (c *ctr) open(s *Scratch, dst, aad, iv, ct, tail []byte) bool {
	n := len(dst)
	if !c.m.Verify(&s.mac, ct[n:], aad, iv, ct[:n], tail) {
		return false
	}
	c.xor(s, dst, iv, ct[:n])
	return true
}

// ccm is AES-CCM (RFC 3610; RFC 4309). The nonce is the salt and the IV of
// eight octets; IPsec's salt of three leaves four for the counter, that is L = 4,
// and longer ones are for test vectors. Neither the standard library nor x/crypto
// has CCM.
type ccm struct {
	b      cipher.Block // of the CBC-MAC
	c      counter
	salt   []byte
	tagLen int
}

func newCCM(key, salt []byte, tagLen int) (core, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	c, err := newCounter(key)
	return &ccm{b, c, bytes.Clone(salt), tagLen}, err
}

// nonced sets s.block to flags, with L-1 added, nonce, and v.
func (c *ccm) nonced(s *Scratch, flags byte, iv []byte, v uint32) {
	binary.BigEndian.PutUint32(s.block[12:], v)
	n := 1 + copy(s.block[1:], c.salt)
	n += copy(s.block[n:], iv)
	s.block[0] = flags | byte(aes.BlockSize-n-1)
}

// mac leaves the uncut tag before its encryption in s.sum (RFC 3610, 2.2).
func (c *ccm) mac(s *Scratch, aad, iv, plain []byte) {
	x := s.sum[:]
	flags := byte((c.tagLen - 2) / 2 << 3)
	if len(aad) > 0 {
		flags |= 1 << 6
	}
	c.nonced(s, flags, iv, uint32(len(plain)))
	c.b.Encrypt(x, s.block[:])
	if n := len(aad); n > 0 {
		// The length stands in front of the octets, in the same blocks.
		l := s.stream[:0]
		if n < 0xff00 {
			l = binary.BigEndian.AppendUint16(l, uint16(n))
		} else {
			l = append(l, 0xff, 0xfe)
			l = binary.BigEndian.AppendUint32(l, uint32(n))
		}
		k := min(aes.BlockSize-len(l), n)
		c.chain(x, append(l, aad[:k]...))
		c.chain(x, aad[k:])
	}
	c.chain(x, plain)
}

// chain takes blocks into the CBC-MAC, the last one filled with zeros.
func (c *ccm) chain(x, data []byte) {
	for len(data) > 0 {
		data = data[subtle.XORBytes(x, x, data[:min(aes.BlockSize, len(data))]):]
		c.b.Encrypt(x, x)
	}
}

// tag turns what mac left into the tag (RFC 3610, 2.3: the stream's block zero).
func (c *ccm) tag(s *Scratch, iv []byte) []byte {
	c.nonced(s, 0, iv, 0)
	c.b.Encrypt(s.stream[:aes.BlockSize], s.block[:])
	subtle.XORBytes(s.sum[:], s.sum[:], s.stream[:aes.BlockSize])
	return s.sum[:c.tagLen]
}

func (c *ccm) seal(s *Scratch, dst, aad, iv, plain, _ []byte) {
	n := len(plain)
	c.mac(s, aad, iv, plain)
	c.nonced(s, 0, iv, 1)
	c.c.xor(s, dst[:n], plain)
	copy(dst[n:], c.tag(s, iv))
}

func (c *ccm) open(s *Scratch, dst, aad, iv, ct, _ []byte) bool {
	n := len(dst)
	c.nonced(s, 0, iv, 1)
	c.c.xor(s, dst, ct[:n])
	c.mac(s, aad, iv, dst)
	if subtle.ConstantTimeCompare(c.tag(s, iv), ct[n:]) != 1 {
		clear(dst)
		return false
	}
	return true
}
