// Package aead makes one seal and one open of any encryption transform and the
// integrity transform that goes with it, for ESP (RFC 4303) and for the
// Encrypted payload of IKEv2 (RFC 7296, 3.14; RFC 5282). It hides whether the
// two are one algorithm, how nonces come from salts and IVs, and how IVs are
// made. pkg/datapath/esp and IKE call it. No call allocates once a Scratch has
// been used with packets of the same size.
//
//	ESP  | SPI, sequence |    IV    | ciphertext (payload, padding) | ICV |
//	IKE  | header ... SK |    IV    | ciphertext (payloads, padding)| ICV |
//	     '---- aad ------'--- iv ---'------------ dst ------------------'
//
// Of a combined mode cipher the ICV covers aad and ciphertext, and the IV as
// part of the nonce; else it covers aad, IV, ciphertext and tail, in this
// order. tail is for the high half of an extended sequence number, which ESP
// appends for the ICV without sending it (RFC 4303, 2.2.1); a combined mode
// cipher has it inside aad instead (RFC 4106, 5), so AEAD tells which to do.
package aead

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/mac"
	"github.com/missiu/missiu/pkg/ipsec"
)

// ErrAuth says that a packet's ICV is not the one of this key: it was altered,
// or sealed with another key.
var ErrAuth = errors.New("integrity check failed")

// ErrLength says that a buffer has a length that cannot be: of a packet to
// open, the packet is malformed; of anything to seal, the caller is wrong.
var ErrLength = errors.New("impossible length")

// UnsupportedError says why no Cipher is made of a pair of transforms.
type UnsupportedError struct {
	Encr   alg.Encr
	Integ  alg.Integ
	Reason string
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("%v with integrity %v: %s", e.Encr, e.Integ, e.Reason)
}

// KeyLengthError says that an encryption key, salt included, has a length
// that its transform does not have.
type KeyLengthError struct {
	Encr alg.Encr
	Got  int   // octets
	Want []int // octets, those allowed
}

func (e *KeyLengthError) Error() string {
	return fmt.Sprintf("%v key of %d octets: want one of %v", e.Encr, e.Got, e.Want)
}

// Scratch is the working memory of one goroutine, good for every Cipher. The
// zero value is ready; it must not be copied after use. Locals would escape
// through the interfaces of crypto/cipher and cost an allocation each.
type Scratch struct {
	mac    mac.Scratch
	nonce  [12]byte
	block  [aes.BlockSize]byte
	sum    [aes.BlockSize]byte     // of CCM
	stream [8 * aes.BlockSize]byte // of counter mode
	buf    []byte                  // of GCM with the short tag, and of GMAC
	own    ownScratch
}

// core is one way to seal and open; lengths are checked before.
type core interface {
	// seal writes ciphertext and ICV to dst, len(plain)+ICVLen octets.
	seal(s *Scratch, dst, aad, iv, plain, tail []byte)
	// open checks everything before it writes the plaintext to dst,
	// len(ct)-ICVLen octets, or writes zeros there.
	open(s *Scratch, dst, aad, iv, ct, tail []byte) bool
}

// Cipher is one key pair of one suite. It does not change, so goroutines share
// it, each with a Scratch of its own.
type Cipher struct {
	core     core
	ivLen    int  // of PutIV
	implicit bool // and not on the wire
	icvLen   int
	blockLen int
	combined bool
	counts   bool    // the IV is the message's number
	ivSalt   [8]byte // random, of the CBC IVs; see PutIV
}

// New prepares a suite: an AEAD with IntegNone, or another cipher with an
// integrity transform of ESP. Those of RFC 1827, which come without integrity,
// are NewUnauthenticated's. encrKey is the cipher key followed by the salt; both
// keys must have exactly the right length and are not kept. NULL with
// IntegNone does not exist (RFC 4301, 4.3), and encryption without integrity
// is refused too: it does not keep a secret from who can alter packets. The
// error is an *UnsupportedError, a *KeyLengthError, one of mac.New, or wraps
// one of alg.Encr.CheckKey.
func New(e alg.Encr, encrKey ipsec.Key, a alg.Integ, authKey ipsec.Key) (*Cipher, error) {
	return newCipher(e, encrKey, a, authKey, false)
}

// NewUnauthenticated prepares a CBC cipher without integrity, for manually keyed
// ESP SAs of operators who insist. Whoever can alter packets can learn what is
// in them (RFC 4303, 1); callers ask for a switch first.
func NewUnauthenticated(e alg.Encr, encrKey ipsec.Key) (*Cipher, error) {
	return newCipher(e, encrKey, alg.IntegNone, ipsec.Key{}, true)
}

func newCipher(e alg.Encr, encrKey ipsec.Key, a alg.Integ, authKey ipsec.Key, bare bool) (*Cipher, error) {
	info := e.Info()
	if e == alg.EncrNone || info.Name == "" {
		return nil, &UnsupportedError{e, a, "no such cipher"}
	}
	switch {
	case info.AEAD && a != alg.IntegNone:
		return nil, &UnsupportedError{e, a, "a combined mode cipher brings its own integrity"}
	case info.AEAD && authKey.Len() != 0:
		return nil, &UnsupportedError{e, a, "an integrity key without use"}
	case bare && info.BlockLen == 1: // NULL, and key streams, of which an attacker turns single bits
		return nil, &UnsupportedError{e, a, "not without integrity"}
	case a.Info().AHOnly:
		return nil, &UnsupportedError{e, a, "an integrity transform of AH"}
	case info.Old && a != alg.IntegNone:
		return nil, &UnsupportedError{e, a, "a packet of RFC 1827 has no place for an ICV"}
	case !info.AEAD && a == alg.IntegNone && !bare:
		return nil, &UnsupportedError{e, a, "refused without integrity"}
	}
	if err := checkKey(e, encrKey); err != nil {
		return nil, err
	}
	if err := e.CheckKey(encrKey.Bytes()); err != nil {
		return nil, fmt.Errorf("%v: %w", e, err)
	}
	c := &Cipher{ivLen: info.IVLen, implicit: info.Implicit, icvLen: info.ICVLen, blockLen: info.BlockLen, combined: info.AEAD, counts: info.Counter}
	if c.implicit {
		c.ivLen = implicitLen
	}
	var m *mac.MAC
	if !info.AEAD && !bare {
		var err error
		if m, err = mac.New(a, authKey); err != nil {
			return nil, err
		}
		c.icvLen = m.ICVLen()
	}
	key := encrKey.Bytes()[:encrKey.Len()-info.SaltLen]
	salt := encrKey.Bytes()[len(key):]
	var err error
	switch e {
	case alg.EncrNULL:
		c.core = &null{m}
	case alg.EncrAESCBC:
		rand.Read(c.ivSalt[:]) // never fails (crypto/rand)
		if useCBC() {
			c.core = newOwnCBC(key, m)
		} else {
			c.core, err = newCBC(key, m)
		}
	case alg.EncrAESGCM8, alg.EncrAESGCM12, alg.EncrAESGCM16, alg.EncrAESGCM16IIV:
		switch {
		case useGCM():
			c.core = newOwnGCM(key, salt, info.ICVLen)
		case info.ICVLen == shortTag:
			c.core, err = newGCM8(key, salt)
		default:
			c.core, err = newGCM(key, salt, info.ICVLen)
		}
	case alg.EncrChaCha20Poly1305, alg.EncrChaCha20Poly1305IIV:
		var p cipher.AEAD
		p, err = chacha20poly1305.New(key)
		c.core = &std{p, [4]byte(salt)}
	case alg.EncrAESCTR:
		c.core, err = newCTR(key, salt, m)
	case alg.EncrAESCCM8, alg.EncrAESCCM12, alg.EncrAESCCM16, alg.EncrAESCCM8IIV:
		c.core, err = newCCM(key, salt, info.ICVLen)
	case alg.EncrNULLAESGMAC:
		var g core
		g, err = newTag(key, salt)
		c.core = &nullGMAC{g}
	case alg.EncrDESCBC, alg.Encr3DESCBC, alg.EncrDESIV64, alg.EncrDESIV32, alg.Encr3DESIV64, alg.Encr3DESIV32:
		rand.Read(c.ivSalt[:])
		c.core, err = newDES(key, m)
	default:
		return nil, &UnsupportedError{e, a, "no such cipher"}
	}
	if err != nil {
		return nil, fmt.Errorf("%v: %w", e, err)
	}
	return c, nil
}

func checkKey(e alg.Encr, k ipsec.Key) error {
	var want []int
	for _, bits := range e.Info().KeyBits {
		n, _ := e.KeyLen(bits)
		if n == k.Len() {
			return nil
		}
		want = append(want, n)
	}
	if want == nil {
		if k.Len() == 0 {
			return nil
		}
		want = []int{0}
	}
	return &KeyLengthError{e, k.Len(), want}
}

// IVLen is the length in octets of the IV that Seal and Open want.
func (c *Cipher) IVLen() int { return c.ivLen }

// implicitLen is that of an implicit IV (RFC 8750, 4).
const implicitLen = 8

// ImplicitIV reports whether the IV stands nowhere in the packet: both sides make
// it by PutIV of the packet's sequence number, of 64 bits or with 32 zero bits in
// front (RFC 8750, 4).
func (c *Cipher) ImplicitIV() bool { return c.implicit }

// ICVLen is the length in octets of the ICV.
func (c *Cipher) ICVLen() int { return c.icvLen }

// BlockLen is what the plaintext's length must be a multiple of, 1, 8 or 16.
func (c *Cipher) BlockLen() int { return c.blockLen }

// AEAD reports whether cipher and integrity are one algorithm.
func (c *Cipher) AEAD() bool { return c.combined }

// PutIV writes the IV of message n to iv[:IVLen]. Every n may be used once in
// the life of a key: an ESP sequence number, or a counter that IKE keeps per
// key. A combined mode cipher's IV, and that of counter mode, is n itself,
// big-endian (RFC 4106, 3.1: what matters is that it never repeats; RFC 7634, 2;
// RFC 3686, 4; RFC 4309, 3.1). CBC's is a random number of
// this Cipher and n, encrypted under a random key that never leaves the process
// and encrypts nothing else, so that nobody can predict it (NIST SP 800-38A,
// appendix C); DES takes what it needs from its front.
func (c *Cipher) PutIV(s *Scratch, iv []byte, n uint64) {
	switch {
	case c.counts:
		binary.BigEndian.PutUint64(iv, n)
	case c.ivLen > 0:
		copy(s.block[:], c.ivSalt[:])
		binary.BigEndian.PutUint64(s.block[8:], n)
		ivKey().Encrypt(s.block[:], s.block[:])
		copy(iv, s.block[:c.ivLen])
	}
}

// Seal encrypts plain and writes ciphertext and ICV, len(plain)+ICVLen octets,
// to dst, which has at least that length and is either disjoint from plain or
// starts with it. iv comes from PutIV. The error is ErrLength; dst is then
// untouched.
func (c *Cipher) Seal(s *Scratch, dst, aad, iv, plain, tail []byte) error {
	n := len(plain)
	if len(iv) != c.ivLen || n%c.blockLen != 0 || len(dst) < n+c.icvLen {
		return ErrLength
	}
	c.core.seal(s, dst[:n+c.icvLen:n+c.icvLen], aad, iv, plain, tail)
	return nil
}

// Message is one element of a batch; see Seal for its fields.
type Message struct {
	Dst, AAD, IV, Plain, Tail []byte
	Err                       error
}

// batcher is a core that takes several messages in less time than one by one.
type batcher interface {
	sealBatch(s *Scratch, ms []Message) // of checked lengths
}

// Batches reports whether SealBatch takes less time than calls of Seal.
func (c *Cipher) Batches() bool {
	_, ok := c.core.(batcher)
	return ok
}

// SealBatch does as Seal with each message, and Err becomes nil or ErrLength.
// No message's buffers overlap another's.
func (c *Cipher) SealBatch(s *Scratch, ms []Message) {
	b, ok := c.core.(batcher)
	if !ok {
		for i := range ms {
			m := &ms[i]
			m.Err = c.Seal(s, m.Dst, m.AAD, m.IV, m.Plain, m.Tail)
		}
		return
	}
	// Runs of messages of possible lengths, nearly always all of them.
	from := 0
	for i := range ms {
		m := &ms[i]
		n := len(m.Plain)
		m.Err = nil
		if len(m.IV) != c.ivLen || n%c.blockLen != 0 || len(m.Dst) < n+c.icvLen {
			m.Err = ErrLength
			b.sealBatch(s, ms[from:i])
			from = i + 1
		}
	}
	b.sealBatch(s, ms[from:])
}

// Open checks ct, ciphertext and ICV, and writes the plaintext,
// len(ct)-ICVLen octets, to dst, which has at least that length and is either
// disjoint from ct or starts with it. The error is ErrLength or ErrAuth; dst
// then holds what it held or zeros, never plaintext, and in place the packet
// is lost.
func (c *Cipher) Open(s *Scratch, dst, aad, iv, ct, tail []byte) error {
	n := len(ct) - c.icvLen
	if len(iv) != c.ivLen || n < 0 || n%c.blockLen != 0 || len(dst) < n {
		return ErrLength
	}
	if !c.core.open(s, dst[:n:n], aad, iv, ct, tail) {
		return ErrAuth
	}
	return nil
}

// ivKey makes the IVs of all Ciphers. One for the process, since a key schedule
// per SA would double the memory of an SA; ivSalt keeps their inputs apart.
var ivKey = sync.OnceValue(func() cipher.Block {
	var k [16]byte
	rand.Read(k[:])
	defer clear(k[:])
	b, err := aes.NewCipher(k[:])
	if err != nil {
		panic("aead: " + err.Error()) // only for a key of another length
	}
	return b
})
