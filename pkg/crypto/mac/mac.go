// Package mac computes the integrity transforms of ESP, AH and IKE: HMAC
// (RFC 2104) and the block cipher MACs AES-XCBC (RFC 3566) and AES-CMAC (RFC
// 4493), cut to the length of the ICV (RFC 2404, RFC 4868, RFC 4494), and for
// old peers HMAC-MD5 (RFC 2403) and the keyed MD5 of RFC 1828. GMAC, which needs
// an IV, is crypto/aead's. It hides
// how a key is kept so that an ICV costs neither an allocation nor a lock: a
// MAC holds, per key, the two hash states that follow the inner and outer pad,
// or the key schedule and subkeys, and a Scratch, per goroutine, the hash
// objects that take up these states, or the chaining value.
// crypto/aead and the AH transform call it.
package mac

import (
	"crypto/aes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding"
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// UnsupportedError says that this package does not compute the transform.
type UnsupportedError struct{ Integ alg.Integ }

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("integrity transform %v is not supported", e.Integ)
}

// KeyLengthError says that a key does not have its transform's length.
type KeyLengthError struct {
	Integ     alg.Integ
	Got, Want int // octets
}

func (e *KeyLengthError) Error() string {
	return fmt.Sprintf("%v key of %d octets: want %d", e.Integ, e.Got, e.Want)
}

// state is a hash whose state can be loaded; all of ours are.
type state interface {
	hash.Hash
	encoding.BinaryMarshaler
	encoding.BinaryUnmarshaler
}

const maxDigest = sha512.Size

// newHash makes the hash under a's HMAC, nil if there is none.
func newHash(a alg.Integ) state {
	var h hash.Hash
	switch a {
	case alg.IntegHMACSHA1:
		h = sha1.New()
	case alg.IntegHMACSHA256:
		h = sha256.New()
	case alg.IntegHMACSHA384:
		h = sha512.New384()
	case alg.IntegHMACSHA512:
		h = sha512.New()
	case alg.IntegHMACMD5, alg.IntegKeyedMD5:
		h = md5.New()
	default:
		return nil
	}
	return h.(state)
}

// Scratch is the working memory of one goroutine, good for keys of every
// transform. The zero value is ready; it must not be copied after use.
type Scratch struct {
	hashes [16]state // by alg.Integ, made on first use
	sum    [maxDigest]byte
	last   [aes.BlockSize]byte // of a block cipher MAC: what waits for its block to fill
}

func (s *Scratch) hash(a alg.Integ) state {
	if s.hashes[a] == nil {
		s.hashes[a] = newHash(a)
	}
	return s.hashes[a]
}

// MAC is one key of one transform. It does not change, so goroutines share it,
// each with a Scratch of its own.
type MAC struct {
	integ        alg.Integ
	icvLen       int
	inner, outer []byte // states after one block of key xor pad, as secret as the key
	suffix       []byte // of keyed MD5 the key, which ends the message; no outer state
	chain        *chain // AES-XCBC and AES-CMAC instead of these
}

// New prepares key, which must have exactly the length that RFC 4868 and its
// kin fix (alg.IntegInfo.KeyLen) and is not kept. The error is an
// *UnsupportedError or a *KeyLengthError.
func New(a alg.Integ, key ipsec.Key) (*MAC, error) {
	if newHash(a) == nil && !isChain(a) {
		return nil, &UnsupportedError{a}
	}
	if want := a.Info().KeyLen; key.Len() != want {
		return nil, &KeyLengthError{a, key.Len(), want}
	}
	return newMAC(a, key.Bytes())
}

// newMAC takes keys of up to one block, which all of ours are (RFC 2104, 2).
func newMAC(a alg.Integ, key []byte) (*MAC, error) {
	m := &MAC{integ: a, icvLen: a.Info().ICVLen}
	var err error
	if isChain(a) {
		m.chain, err = newChain(a, key)
		return m, err
	}
	if a == alg.IntegKeyedMD5 {
		m.inner, err = filled(key)
		m.suffix = append([]byte(nil), key...)
		return m, err
	}
	if m.inner, err = padded(a, key, 0x36); err != nil {
		return nil, err
	}
	if m.outer, err = padded(a, key, 0x5c); err != nil {
		return nil, err
	}
	return m, nil
}

// padded returns the state of a's hash after key xor pad.
func padded(a alg.Integ, key []byte, pad byte) ([]byte, error) {
	h := newHash(a)
	block := make([]byte, h.BlockSize())
	defer clear(block)
	copy(block, key)
	for i := range block {
		block[i] ^= pad
	}
	h.Write(block)
	return marshal(a, h)
}

// filled returns the state of MD5 after key and keyfill (RFC 1828, 2): the
// padding that MD5 would end with, were the key all of the message.
func filled(key []byte) ([]byte, error) {
	var block [md5.BlockSize]byte
	defer clear(block[:])
	block[copy(block[:], key)] = 0x80
	binary.LittleEndian.PutUint64(block[md5.BlockSize-8:], uint64(len(key))*8)
	h := newHash(alg.IntegKeyedMD5)
	h.Write(block[:])
	return marshal(alg.IntegKeyedMD5, h)
}

// marshal takes the state out of h, and wipes h.
func marshal(a alg.Integ, h state) ([]byte, error) {
	b, err := h.MarshalBinary()
	h.Reset()
	if err != nil {
		return nil, fmt.Errorf("%v state: %w", a, err)
	}
	return b, nil
}

// ICVLen is the length of the ICV in octets.
func (m *MAC) ICVLen() int { return m.icvLen }

// Sum writes the ICV over the concatenation of parts to icv[:ICVLen]. icv may
// follow or overlap the parts: it is written last. It panics if icv is short.
func (m *MAC) Sum(s *Scratch, icv []byte, parts ...[]byte) {
	copy(icv[:m.icvLen], m.compute(s, parts))
}

// SumFull writes the MAC uncut, as a PRF gives it, to out, which has the length
// of that.
func (m *MAC) SumFull(s *Scratch, out []byte, parts ...[]byte) {
	copy(out, m.compute(s, parts))
}

// Verify reports in constant time whether icv, of exactly ICVLen octets, is
// the ICV over the concatenation of parts.
func (m *MAC) Verify(s *Scratch, icv []byte, parts ...[]byte) bool {
	return subtle.ConstantTimeCompare(m.compute(s, parts)[:m.icvLen], icv) == 1
}

// compute returns the MAC uncut, in s.sum.
func (m *MAC) compute(s *Scratch, parts [][]byte) []byte {
	if m.chain != nil {
		return m.chain.compute(s, parts)
	}
	h := s.hash(m.integ)
	// Loading fails only for octets that are no state of this hash, which
	// New excludes.
	if err := h.UnmarshalBinary(m.inner); err != nil {
		panic("mac: " + err.Error())
	}
	for _, p := range parts {
		h.Write(p)
	}
	if m.outer == nil {
		h.Write(m.suffix)
		return h.Sum(s.sum[:0])
	}
	inner := h.Sum(s.sum[:0])
	if err := h.UnmarshalBinary(m.outer); err != nil {
		panic("mac: " + err.Error())
	}
	h.Write(inner)
	return h.Sum(s.sum[:0])
}

// Wipe overwrites what the MAC knows of its key; it must not be used again.
// The AES key schedule is crypto/aes's own and is only let go.
func (m *MAC) Wipe() {
	clear(m.inner)
	clear(m.outer)
	clear(m.suffix)
	if m.chain != nil {
		*m.chain = chain{}
	}
}
