// Package keymat derives keys as IKEv2 does: prf and prf+ (RFC 7296, 2.13),
// SKEYSEED and the seven keys of an IKE SA (2.14, 2.18), KEYMAT of child SAs
// (2.17) and the pre-shared key's AUTH (2.15). It hides the order in which the
// octets of prf+ become keys. Only IKE calls it.
//
// All functions are safe for concurrent use. Slices are read during the call
// only. Results that are secret are of type ipsec.Key; the caller wipes them.
package keymat

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"sync"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/mac"
	"github.com/missiu/missiu/pkg/ipsec"
)

// ErrTooLong says that more than 255 outputs of the PRF were asked of prf+
// (RFC 7296, 2.13).
var ErrTooLong = errors.New("prf+ cannot make that many octets")

// UnsupportedError says that no keys can be made for a choice of algorithms.
type UnsupportedError struct{ Reason string }

func (e *UnsupportedError) Error() string { return "key derivation: " + e.Reason }

// hmacs are the PRFs of each hash that are not in use.
var hmacs = map[alg.PRF]*sync.Pool{
	alg.PRFHMACSHA1:   {New: func() any { return &hmacPRF{h: sha1.New()} }},
	alg.PRFHMACSHA256: {New: func() any { return &hmacPRF{h: sha256.New()} }},
	alg.PRFHMACSHA384: {New: func() any { return &hmacPRF{h: sha512.New384()} }},
	alg.PRFHMACSHA512: {New: func() any { return &hmacPRF{h: sha512.New()} }},
}

// keyed is a PRF with its key. Sum appends the output for what was written since
// Reset, which goes before the first Write too; wipe forgets the key, and nothing
// follows it.
type keyed interface {
	Write(b []byte) (int, error)
	Sum(b []byte) []byte
	Reset()
	wipe()
}

func newPRF(p alg.PRF, key []byte) (keyed, error) {
	switch p {
	case alg.PRFAESXCBC:
		return newBlockPRF(alg.IntegAESXCBC, key)
	case alg.PRFAESCMAC:
		return newBlockPRF(alg.IntegAESCMAC, key)
	}
	pool, ok := hmacs[p]
	if !ok {
		return nil, &UnsupportedError{fmt.Sprintf("prf %v", p)}
	}
	m := pool.Get().(*hmacPRF)
	m.pool = pool
	m.setKey(key)
	return m, nil
}

// hmacPRF is HMAC (RFC 2104, 2) for keys that serve once or twice, as those of
// IKE do: crypto/hmac takes ten times the memory for each.
type hmacPRF struct {
	h    hash.Hash
	pad  [maxBlock]byte // the key, with ipad on it
	sum  [maxDigest]byte
	pool *sync.Pool
}

// Octets of the largest hash: SHA-512.
const maxBlock, maxDigest = 128, 64

func (m *hmacPRF) setKey(key []byte) {
	if len(key) > m.h.BlockSize() {
		m.h.Reset()
		m.h.Write(key)
		key = m.h.Sum(m.sum[:0])
	}
	clear(m.pad[copy(m.pad[:], key):])
	m.turn(0x36)
}

func (m *hmacPRF) turn(x byte) {
	for i := range m.pad {
		m.pad[i] ^= x
	}
}

func (m *hmacPRF) Reset() {
	m.h.Reset()
	m.h.Write(m.pad[:m.h.BlockSize()])
}

func (m *hmacPRF) Write(b []byte) (int, error) { return m.h.Write(b) }

func (m *hmacPRF) Sum(b []byte) []byte {
	inner := m.h.Sum(m.sum[:0])
	m.h.Reset()
	m.turn(0x36 ^ 0x5c)
	m.h.Write(m.pad[:m.h.BlockSize()])
	m.turn(0x36 ^ 0x5c)
	m.h.Write(inner)
	return m.h.Sum(b)
}

func (m *hmacPRF) wipe() {
	clear(m.pad[:])
	clear(m.sum[:])
	m.h.Reset()
	m.pool.Put(m)
}

// blockPRF is a PRF made of a block cipher MAC.
type blockPRF struct {
	m   *mac.MAC
	s   mac.Scratch
	msg []byte
}

// newBlockPRF takes keys of any length, as RFC 4434, 2, and RFC 4615, 3, tell: a
// long key's MAC under the zero key stands for it; a short one is filled with
// zeros for XCBC, and for CMAC treated as a long one.
func newBlockPRF(a alg.Integ, key []byte) (*blockPRF, error) {
	k := make([]byte, 16)
	defer clear(k)
	switch {
	case len(key) > 16 || len(key) < 16 && a == alg.IntegAESCMAC:
		z, err := mac.New(a, ipsec.NewKey(make([]byte, 16)))
		if err != nil {
			return nil, err
		}
		var s mac.Scratch
		z.SumFull(&s, k, key)
	default:
		copy(k, key)
	}
	m, err := mac.New(a, ipsec.NewKey(k))
	if err != nil {
		return nil, err
	}
	return &blockPRF{m: m}, nil
}

func (p *blockPRF) Write(b []byte) (int, error) {
	p.msg = append(p.msg, b...)
	return len(b), nil
}

func (p *blockPRF) Sum(b []byte) []byte {
	var out [16]byte
	p.m.SumFull(&p.s, out[:], p.msg)
	return append(b, out[:]...)
}

func (p *blockPRF) Reset() {
	clear(p.msg)
	p.msg = p.msg[:0]
}

func (p *blockPRF) wipe() { p.Reset() }

// PRF computes prf(key, data[0] | data[1] | ...), p.Len octets. The error is
// an *UnsupportedError.
func PRF(p alg.PRF, key []byte, data ...[]byte) ([]byte, error) {
	m, err := newPRF(p, key)
	if err != nil {
		return nil, err
	}
	defer m.wipe()
	m.Reset()
	for _, d := range data {
		m.Write(d)
	}
	return m.Sum(make([]byte, 0, p.Len())), nil
}

// PRFPlus computes the first n octets of prf+(key, seed), where the seed is
// the concatenation of its parts. The error is ErrTooLong or an
// *UnsupportedError.
func PRFPlus(p alg.PRF, key []byte, n int, seed ...[]byte) ([]byte, error) {
	m, err := newPRF(p, key)
	if err != nil {
		return nil, err
	}
	defer m.wipe()
	if n < 0 || n > 255*p.Len() {
		return nil, ErrTooLong
	}
	// One allocation for all, so that no half of a key stays behind when
	// the slice grows. T1 = prf(K, S | 1), Ti = prf(K, Ti-1 | S | i).
	out := make([]byte, 0, n+p.Len())
	for i := []byte{1}; len(out) < n; i[0]++ {
		m.Reset()
		if i[0] > 1 {
			m.Write(out[len(out)-p.Len():])
		}
		for _, s := range seed {
			m.Write(s)
		}
		m.Write(i)
		out = m.Sum(out)
	}
	clear(out[n:])
	return out[:n:n], nil
}

// IKESuite is what decides the keys of an IKE SA.
type IKESuite struct {
	PRF      alg.PRF
	Encr     alg.Encr
	EncrBits int       // cipher key without salt
	Integ    alg.Integ // IntegNone with an AEAD, and only then
}

// IKEKeys are the keys of one IKE SA (RFC 7296, 2.14). D makes the keys of
// child SAs and of the next IKE SA; AI, AR, EI, ER protect messages of the
// original initiator and responder (the salt of an AEAD ends EI and ER,
// RFC 5282, 7.1; AI and AR are then empty); PI and PR go into AUTH.
type IKEKeys struct {
	D, AI, AR, EI, ER, PI, PR ipsec.Key
}

// Wipe overwrites all keys.
func (k *IKEKeys) Wipe() {
	for _, x := range []ipsec.Key{k.D, k.AI, k.AR, k.EI, k.ER, k.PI, k.PR} {
		x.Wipe()
	}
}

// SKEYSEED of a first IKE SA: prf(Ni | Nr, g^ir) (RFC 7296, 2.14). ni and nr
// are the nonces without payload headers. They enter whole, but for the PRFs made
// of AES, which take the first 64 bits of each (2.14).
func SKEYSEED(p alg.PRF, ni, nr []byte, shared ipsec.Key) (ipsec.Key, error) {
	if p == alg.PRFAESXCBC || p == alg.PRFAESCMAC {
		ni, nr = ni[:min(len(ni), 8)], nr[:min(len(nr), 8)]
	}
	key := make([]byte, 0, len(ni)+len(nr))
	key = append(append(key, ni...), nr...)
	s, err := PRF(p, key, shared.Bytes())
	return ipsec.NewKey(s), err
}

// RekeySKEYSEED is that of an IKE SA made by rekeying: prf(SK_d (old),
// g^ir (new) | Ni | Nr) (RFC 7296, 2.18). p is the PRF of the old IKE SA, oldD
// its SK_d; nonces and shared are those of the CREATE_CHILD_SA exchange, more
// those of the additional key exchanges after it, in their order: SK(0) | Ni |
// Nr | SK(1) | ... (RFC 9370, 2.2.4).
//
// The same formula gives the SKEYSEED after each additional key exchange of a
// first IKE SA, from its present SK_d and the secret of that exchange:
// prf(SK_d(n-1), SK(n) | Ni | Nr) (RFC 9370, 2.2.2).
func RekeySKEYSEED(p alg.PRF, oldD, shared ipsec.Key, ni, nr []byte, more ...ipsec.Key) (ipsec.Key, error) {
	data := [][]byte{shared.Bytes(), ni, nr}
	for _, k := range more {
		data = append(data, k.Bytes())
	}
	s, err := PRF(p, oldD.Bytes(), data...)
	return ipsec.NewKey(s), err
}

// MixPPK puts a post-quantum pre-shared key into SK_d, SK_pi and SK_pr: each
// becomes prf+(PPK, itself) (RFC 8784, 3). The old ones are wiped.
func (k *IKEKeys) MixPPK(p alg.PRF, ppk ipsec.Key) error {
	var mixed [3]ipsec.Key
	old := []*ipsec.Key{&k.D, &k.PI, &k.PR}
	for i, x := range old {
		b, err := PRFPlus(p, ppk.Bytes(), x.Len(), x.Bytes())
		if err != nil {
			return err
		}
		mixed[i] = ipsec.NewKey(b)
	}
	for i, x := range old {
		x.Wipe()
		*x = mixed[i]
	}
	return nil
}

// IKESA derives the seven keys of an IKE SA from its SKEYSEED:
// prf+(SKEYSEED, Ni | Nr | SPIi | SPIr). s holds the algorithms of the new SA,
// its PRF included; spiI and spiR are the IKE SPIs as numbers. The error is an
// *UnsupportedError: an unknown algorithm, a key size the cipher does not
// have, a cipher without integrity or an AEAD with it.
func IKESA(s IKESuite, skeyseed ipsec.Key, ni, nr []byte, spiI, spiR uint64) (*IKEKeys, error) {
	e, a, err := keyLens(s.Encr, s.EncrBits, s.Integ)
	if err != nil {
		return nil, err
	}
	if s.Encr.Info().Implicit {
		return nil, &UnsupportedError{fmt.Sprintf("%v in an IKE SA", s.Encr)} // RFC 8750, 5
	}
	if a == 0 && !s.Encr.Info().AEAD {
		return nil, &UnsupportedError{fmt.Sprintf("%v without integrity in an IKE SA", s.Encr)}
	}
	var spis [16]byte
	binary.BigEndian.PutUint64(spis[:8], spiI)
	binary.BigEndian.PutUint64(spis[8:], spiR)
	n := s.PRF.Len()
	b, err := PRFPlus(s.PRF, skeyseed.Bytes(), 3*n+2*a+2*e, ni, nr, spis[:])
	if err != nil {
		return nil, err
	}
	c := cutter{b}
	defer c.done()
	k := &IKEKeys{D: c.cut(n)}
	k.AI, k.AR = c.cut(a), c.cut(a)
	k.EI, k.ER = c.cut(e), c.cut(e)
	k.PI, k.PR = c.cut(n), c.cut(n)
	return k, nil
}

// ChildSuite is what decides the keys of a pair of child SAs.
type ChildSuite struct {
	Encr     alg.Encr
	EncrBits int // cipher key without salt; 0 for NULL and for AH
	Integ    alg.Integ
}

// ChildKeys are the keys of a pair of child SAs. I protects what the
// initiator of the exchange that made the pair sends, R what its responder
// sends. Encr ends with the salt where the cipher has one (RFC 4106, 8.1), as
// ipsec.SAParams wants it; a key that the suite does not need is empty.
type ChildKeys struct {
	EncrI, IntegI, EncrR, IntegR ipsec.Key
}

// ChildSA derives KEYMAT = prf+(SK_d, [g^ir (new) |] Ni | Nr | ...) and cuts it into
// keys: initiator to responder first, encryption before integrity (RFC 7296,
// 2.17). p and d belong to the IKE SA. shared is that of a new key exchange in
// CREATE_CHILD_SA and the zero Key without one, more are those of the additional
// key exchanges after it (RFC 9370, 2.2.4); nonces are those of the same
// exchange, of IKE_SA_INIT for the first child. The error is an
// *UnsupportedError, as for IKESA; integrity alone (AH, NULL) is allowed.
func ChildSA(s ChildSuite, p alg.PRF, d, shared ipsec.Key, ni, nr []byte, more ...ipsec.Key) (*ChildKeys, error) {
	e, a, err := keyLens(s.Encr, s.EncrBits, s.Integ)
	if err != nil {
		return nil, err
	}
	if e+a == 0 {
		return nil, &UnsupportedError{"neither encryption nor integrity in a child SA"}
	}
	seed := [][]byte{shared.Bytes(), ni, nr}
	for _, k := range more {
		seed = append(seed, k.Bytes())
	}
	b, err := PRFPlus(p, d.Bytes(), 2*(e+a), seed...)
	if err != nil {
		return nil, err
	}
	c := cutter{b}
	defer c.done()
	k := &ChildKeys{}
	k.EncrI, k.IntegI = c.cut(e), c.cut(a)
	k.EncrR, k.IntegR = c.cut(e), c.cut(a)
	return k, nil
}

// keyLens returns the octets of keying material for one direction.
func keyLens(e alg.Encr, bits int, a alg.Integ) (encr, integ int, err error) {
	encr, ok := e.KeyLen(bits)
	if !ok {
		return 0, 0, &UnsupportedError{fmt.Sprintf("%v with a key of %d bits", e, bits)}
	}
	if a != alg.IntegNone && a.Info().KeyLen == 0 {
		return 0, 0, &UnsupportedError{a.String()}
	}
	if e.Info().AEAD && a != alg.IntegNone {
		return 0, 0, &UnsupportedError{fmt.Sprintf("%v with %v: a combined mode cipher brings its own integrity", e, a)}
	}
	return encr, a.Info().KeyLen, nil
}

// cutter cuts keys from the front of b, each into octets of its own, so that
// wiping one leaves the others.
type cutter struct{ b []byte }

func (c *cutter) cut(n int) ipsec.Key {
	k := ipsec.NewKey(append([]byte(nil), c.b[:n]...))
	clear(c.b[:n])
	c.b = c.b[n:]
	return k
}

func (c *cutter) done() { clear(c.b) }
