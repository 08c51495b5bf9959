// Package esp is the ESP transform (RFC 4303): it builds and takes apart the
// ESP packet, from the SPI to the ICV, of an SA whose keys it holds. It hides
// layout, padding, IVs, what the ICV covers with and without extended sequence
// numbers, and the suites of crypto/aead. The engine calls it, and knows what
// it leaves out: IP headers, modes, UDP encapsulation, sequence numbers, the
// replay window, traffic flow confidentiality padding (RFC 4303, 2.7).
//
//	| SPI 4 | sequence 4 | IV | payload | padding 0-255 | pad length 1 | next header 1 | ICV |
//	'------ HeaderLen -------'         '----------------- TrailerLen ----------------------'
//
// The old transforms of RFC 1829 and RFC 1851 have the header of RFC 1827, no
// sequence number, no ICV, and padding of any content:
//
//	| SPI 4 | IV 4 or 8 | payload | padding 0-255 | pad length 1 | payload type 1 |
//
// Calls take batches. They do not allocate (with GCM-8 and GMAC once a Scratch
// has met the largest packet).
package esp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/missiu/missiu/pkg/crypto/aead"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// NextNone is the next header of a dummy packet (RFC 4303, 2.6): the receiver
// discards it without any notice, after it has verified.
const NextNone = 59

// Outcomes of a packet. None says whose fault it is beyond its text.
var (
	// ErrAuth: the ICV is wrong (RFC 4303, 3.4.4.1; an auditable event).
	ErrAuth = errors.New("esp: integrity check failed")
	// ErrMalformed: too short, not aligned, of another SPI or sequence
	// number than the caller says, or authentic with wrong padding.
	ErrMalformed = errors.New("esp: malformed packet")
	// ErrRoom: the caller's buffers are too small.
	ErrRoom = errors.New("esp: no room in the buffers")
	// ErrSequence: sequence number 0, or beyond 32 bits without ESN. A
	// sender never lets it cycle (RFC 4303, 3.3.3).
	ErrSequence = errors.New("esp: sequence number used up")
)

// ParamError says why SA parameters make no transform; Unwrap gives the
// error of crypto/aead or crypto/mac where there is one.
type ParamError struct {
	SAID ipsec.SAID
	Err  error
}

func (e *ParamError) Error() string { return fmt.Sprintf("SA %v: %v", e.SAID, e.Err) }
func (e *ParamError) Unwrap() error { return e.Err }

// ErrNotESP is inside a ParamError for parameters of another protocol.
var ErrNotESP = errors.New("not an ESP SA")

const (
	espHeader = 8 // SPI, sequence number
	oldHeader = 4 // SPI
	trailer   = 2 // pad length, next header
)

// Scratch is the working memory of one goroutine, good for every Transform.
// The zero value is ready; it must not be copied after use.
type Scratch struct {
	a    aead.Scratch
	aad  [12]byte // SPI, sequence number of 32 or 64 bits
	high [4]byte  // ESN high half, appended for the ICV
	iv   [8]byte  // implicit

	// Of a batch whose packets are encrypted side by side.
	ms    [batch]aead.Message
	which [batch]int     // the packet of each message
	highs [batch][4]byte // as high
}

// batch is how many packets are encrypted side by side at most: several times
// the eight that crypto/aead takes at once, so that long packets beside short
// ones find company, and few enough for the cache.
const batch = 32

// NewScratch returns a Scratch.
func NewScratch() *Scratch { return new(Scratch) }

// Transform is an SA's keys ready to use, for one direction or, in tests, both.
// It does not change, so goroutines share it, each with a Scratch of its own.
type Transform struct {
	c     aead.Cipher
	spi   uint32
	esn   bool
	old   bool // RFC 1827
	bare  bool // the IV is implicit: none in the packet
	head  int  // octets in front of the IV
	hdr   int  // HeaderLen
	align int  // of payload, padding, pad length, next header
	icv   int
}

// New makes the transform of p, whose keys it does not keep. Algorithms and
// exact key lengths are checked; the error is a *ParamError.
func New(p *ipsec.SAParams) (*Transform, error) {
	if p.Proto != ipsec.ESP {
		return nil, &ParamError{p.SAID, ErrNotESP}
	}
	var c *aead.Cipher
	var err error
	if p.Auth == alg.IntegNone && p.Unauthenticated {
		c, err = aead.NewUnauthenticated(p.Encr, p.EncrKey)
	} else {
		c, err = aead.New(p.Encr, p.EncrKey, p.Auth, p.AuthKey)
	}
	if err != nil {
		return nil, &ParamError{p.SAID, err}
	}
	t := &Transform{
		c: *c, spi: uint32(p.SPI), esn: p.ESN,
		old: p.Encr.Info().Old, head: espHeader,
		align: max(4, c.BlockLen()), // RFC 4303, 2.4
		icv:   c.ICVLen(),
	}
	if t.old {
		t.head = oldHeader
	}
	t.hdr = t.head
	if t.bare = c.ImplicitIV(); !t.bare {
		t.hdr += c.IVLen()
	}
	return t, nil
}

// HeaderLen is the number of octets before the payload: ESP header and IV.
func (t *Transform) HeaderLen() int { return t.hdr }

// TrailerLen is the number of octets behind a payload of n: padding, pad
// length, next header and ICV.
func (t *Transform) TrailerLen(n int) int { return t.padLen(n) + trailer + t.icv }

// Overhead is what makes an ESP packet longer than its payload, in octets. It
// is comparable: SAs of one suite have the same.
type Overhead struct {
	Header int // ESP header and IV
	Align  int // of payload, padding, pad length and next header together
	ICV    int
}

// MaxPayload is the length of the longest payload whose ESP packet has no more
// than room octets; below 0 not even an empty one fits.
func (o Overhead) MaxPayload(room int) int {
	room -= o.Header + o.ICV
	if room < 0 {
		return -trailer
	}
	return room/o.Align*o.Align - trailer
}

// Overhead returns what the transform adds.
func (t *Transform) Overhead() Overhead { return Overhead{t.hdr, t.align, t.icv} }

// ICVLen is the number of octets of the ICV.
func (t *Transform) ICVLen() int { return t.icv }

func (t *Transform) padLen(n int) int {
	return (t.align - (n+trailer)%t.align) % t.align
}

// Packet is one element of a batch.
//
// Seal reads Src, the payload; Next, its protocol; and Seq, its sequence
// number, which no other packet of this key ever has, sent or not. It overwrites the first
// TrailerLen(len(Src))-ICVLen octets behind Src, which cap(Src) must allow,
// and Dst, which needs HeaderLen+len(Src)+TrailerLen(len(Src)) octets.
// Dst[HeaderLen:] starts with Src, or Dst is disjoint from Src and these
// octets; any other overlap is a mistake that may panic. Nor do they overlap
// another packet's of the same call: packets are written side by side. N
// becomes the number of octets written to Dst.
//
// Open reads Src, the ESP packet from the SPI to the ICV, and Seq, the
// sequence number of 64 bits that the replay window inferred (without ESN: of
// 32 bits; an old packet has none, and Seq is not looked at). The payload goes to the front of Dst, which needs
// len(Src)-HeaderLen-ICVLen octets (len(Src) always suffices) and either is
// Src[HeaderLen:] or is disjoint from Src. N becomes the length of the
// payload, Next its protocol; NextNone is a dummy. Traffic flow
// confidentiality padding still stands behind the inner packet.
//
// A packet with an error has N = 0 and nothing usable in Dst; in place Src is
// spoilt too. Errors of one packet do not touch the others.
type Packet struct {
	Dst, Src []byte
	Next     uint8
	Seq      uint64
	N        int
	Err      error
}

// Seal protects each packet. Err becomes nil, ErrRoom or ErrSequence.
func (t *Transform) Seal(s *Scratch, ps []Packet) {
	if t.c.Batches() {
		t.sealBatches(s, ps)
		return
	}
	for i := range ps {
		p := &ps[i]
		p.N, p.Err = t.seal(s, p)
	}
}

func (t *Transform) seal(s *Scratch, p *Packet) (int, error) {
	out, plain, err := t.frame(s, p)
	if err != nil {
		return 0, err
	}
	aad, tail := t.cover(s, p.Seq)
	if err := t.c.Seal(&s.a, out[t.hdr:], aad, t.iv(s, out), plain, tail); err != nil {
		return 0, ErrRoom // every length was made by frame
	}
	return len(out), nil
}

// sealBatches is Seal for a cipher that takes several packets at once. None is
// a combined mode cipher, so SPI and sequence number are covered as they stand
// in the packet.
func (t *Transform) sealBatches(s *Scratch, ps []Packet) {
	n := 0
	flush := func() {
		t.c.SealBatch(&s.a, s.ms[:n])
		for j, m := range s.ms[:n] {
			if p := &ps[s.which[j]]; m.Err != nil {
				p.N, p.Err = 0, ErrRoom // every length was made by frame
			}
		}
		clear(s.ms[:n])
		n = 0
	}
	for i := range ps {
		p := &ps[i]
		out, plain, err := t.frame(s, p)
		p.N, p.Err = len(out), err
		if err != nil {
			continue
		}
		m := &s.ms[n]
		*m = aead.Message{Dst: out[t.hdr:], AAD: out[:t.head], IV: out[t.head:t.hdr], Plain: plain}
		if t.esn {
			binary.BigEndian.PutUint32(s.highs[n][:], uint32(p.Seq>>32))
			m.Tail = s.highs[n][:]
		}
		s.which[n] = i
		if n++; n == batch {
			flush()
		}
	}
	flush()
}

// frame writes padding and trailer behind the payload, and header and IV to
// the front of out, the whole packet to be; plain is what to encrypt.
func (t *Transform) frame(s *Scratch, p *Packet) (out, plain []byte, err error) {
	if p.Seq == 0 || !t.esn && !t.old && p.Seq > math.MaxUint32 {
		return nil, nil, ErrSequence
	}
	n := len(p.Src)
	pad := t.padLen(n)
	end := n + pad + trailer
	total := t.hdr + end + t.icv
	if cap(p.Src) < end || len(p.Dst) < total {
		return nil, nil, ErrRoom
	}
	plain = p.Src[:end]
	for i := range pad { // 1, 2, 3, ... (RFC 4303, 2.4)
		plain[n+i] = byte(i + 1)
	}
	plain[end-2] = byte(pad)
	plain[end-1] = p.Next
	out = p.Dst[:total]
	binary.BigEndian.PutUint32(out, t.spi)
	if !t.old {
		binary.BigEndian.PutUint32(out[4:], uint32(p.Seq))
	}
	t.c.PutIV(&s.a, t.iv(s, out), p.Seq)
	return out, plain, nil
}

// iv is where the IV of a packet stands: in it, or beside it.
func (t *Transform) iv(s *Scratch, b []byte) []byte {
	if t.bare {
		return s.iv[:]
	}
	return b[t.head:t.hdr]
}

// Open verifies each packet and takes it apart. Err becomes nil, ErrAuth,
// ErrMalformed or ErrRoom.
func (t *Transform) Open(s *Scratch, ps []Packet) {
	for i := range ps {
		p := &ps[i]
		p.N, p.Next, p.Err = t.open(s, p)
	}
}

func (t *Transform) open(s *Scratch, p *Packet) (n int, next uint8, err error) {
	n = len(p.Src) - t.hdr - t.icv
	// RFC 4303, 2.4: the ciphertext ends on a 4-octet boundary whatever the cipher.
	if n < t.align || n%t.align != 0 {
		return 0, 0, ErrMalformed
	}
	if binary.BigEndian.Uint32(p.Src) != t.spi || !t.old &&
		(binary.BigEndian.Uint32(p.Src[4:]) != uint32(p.Seq) || !t.esn && p.Seq > math.MaxUint32) {
		return 0, 0, ErrMalformed
	}
	if len(p.Dst) < n {
		return 0, 0, ErrRoom
	}
	dst := p.Dst[:n]
	aad, tail := t.cover(s, p.Seq)
	iv := t.iv(s, p.Src)
	if t.bare {
		t.c.PutIV(&s.a, iv, p.Seq)
	}
	if err := t.c.Open(&s.a, dst, aad, iv, p.Src[t.hdr:], tail); err != nil {
		return 0, 0, ErrAuth // every length was checked above
	}
	// From here on the packet is as authentic as it can be; wrong padding is the
	// peer's bug, or shows another key where there is no ICV.
	pad := int(dst[n-2])
	next = dst[n-1]
	n -= trailer + pad
	if n < 0 {
		clear(dst)
		return 0, 0, ErrMalformed
	}
	if t.old {
		return n, next, nil // "preferably random" padding (RFC 1829, 2)
	}
	for i, b := range dst[n : n+pad] {
		if b != byte(i+1) {
			clear(dst)
			return 0, 0, ErrMalformed
		}
	}
	return n, next, nil
}

// cover returns what the ICV covers beside the packet itself: SPI and sequence
// number in front of the IV, and the high half that is not sent. A combined
// mode cipher has all 64 bits in the AAD (RFC 4106, 5), the others append the
// high half behind the ciphertext (RFC 4303, 2.2.1).
func (t *Transform) cover(s *Scratch, seq uint64) (aad, tail []byte) {
	if t.old {
		return nil, nil
	}
	binary.BigEndian.PutUint32(s.aad[:], t.spi)
	switch {
	case !t.esn:
		binary.BigEndian.PutUint32(s.aad[4:], uint32(seq))
		return s.aad[:8], nil
	case t.c.AEAD():
		binary.BigEndian.PutUint64(s.aad[4:], seq)
		return s.aad[:12], nil
	}
	binary.BigEndian.PutUint32(s.aad[4:], uint32(seq))
	binary.BigEndian.PutUint32(s.high[:], uint32(seq>>32))
	return s.aad[:8], s.high[:]
}
