// Package ah is the AH transform (RFC 4302): it makes and verifies the
// Authentication Header of an SA whose key it holds. It hides the layout of
// the header, its alignment, which parts of IPv4 and IPv6 headers change on
// the way and so count as zero (3.3.3.1), and where the upper half of an
// extended sequence number stands. The engine calls it, and knows what it
// leaves out: modes, moving headers, sequence numbers, the replay window.
//
//	| IP header, options, extension headers | next 1 | length 1 | 0 2 | SPI 4 | sequence 4 | ICV | payload |
//	'---------------- Off -----------------''------------------ HeaderLen ---------------------'
//
// Keyed MD5 (RFC 1828) has the old header of RFC 1826, without sequence number,
// and covers more of the IP header. GMAC (RFC 4543) has an IV, the sequence
// number, as the front of its ICV.
//
// The ICV covers the whole packet, itself and what is mutable as zero, then
// the upper half of an extended sequence number (3.3.3.2.2). Calls take
// batches. They do not allocate once a Scratch has met the longest headers.
package ah

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/missiu/missiu/pkg/crypto/aead"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/mac"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Outcomes of a packet.
var (
	// ErrAuth: the ICV is wrong (RFC 4302, 3.4.4; an auditable event).
	ErrAuth = errors.New("ah: integrity check failed")
	// ErrMalformed: cut, of another length than the SA's ICV makes it, or of
	// another SPI or sequence number than the caller says.
	ErrMalformed = errors.New("ah: malformed packet")
	// ErrHeader: IP options or extension headers that are malformed, or of
	// which nobody can say what they will be at the destination.
	ErrHeader = errors.New("ah: IP header that cannot be authenticated")
	// ErrSequence: sequence number 0, or beyond 32 bits without ESN. A
	// sender never lets it cycle (RFC 4302, 3.3.2).
	ErrSequence = errors.New("ah: sequence number used up")
)

// ParamError says why SA parameters make no transform; Unwrap gives the
// error of crypto/mac where there is one.
type ParamError struct {
	SAID ipsec.SAID
	Err  error
}

func (e *ParamError) Error() string { return fmt.Sprintf("SA %v: %v", e.SAID, e.Err) }
func (e *ParamError) Unwrap() error { return e.Err }

// Errors inside a ParamError.
var (
	ErrNotAH      = errors.New("not an AH SA")
	ErrEncryption = errors.New("AH does not encrypt")
)

const (
	header    = 12 // next header, length, reserved, SPI, sequence number
	oldHeader = 8  // without sequence number
)

// Scratch is the working memory of one goroutine, good for every Transform.
// The zero value is ready; it must not be copied after use.
type Scratch struct {
	mac  mac.Scratch
	aead aead.Scratch // of GMAC
	head []byte       // IP header as the ICV sees it, then AH without ICV
	high [4]byte
	icv  [maxICV]byte
}

const maxICV = 64

// zeros stands for the ICV in the computation.
var zeros [maxICV]byte

// Transform is an SA's key ready to use, for one direction or, in tests, both.
// It does not change, so goroutines share it, each with a Scratch of its own.
type Transform struct {
	m     *mac.MAC
	g     *aead.GMAC // instead of m
	spi   uint32
	esn   bool
	old   bool // RFC 1826
	fixed int  // octets in front of the ICV
	icv   int
}

// New makes the transform of p, whose key it does not keep. Algorithm and
// exact key length are checked; the error is a *ParamError.
func New(p *ipsec.SAParams) (*Transform, error) {
	switch {
	case p.Proto != ipsec.AH:
		return nil, &ParamError{p.SAID, ErrNotAH}
	case p.Encr != alg.EncrNone || p.EncrKey.Len() != 0:
		return nil, &ParamError{p.SAID, ErrEncryption}
	}
	i := p.Auth.Info()
	t := &Transform{spi: uint32(p.SPI), esn: p.ESN, old: i.Old, fixed: header, icv: i.ICVLen}
	if t.old {
		t.fixed = oldHeader
	}
	var err error
	if i.SaltLen > 0 {
		t.g, err = aead.NewGMAC(p.Auth, p.AuthKey)
	} else {
		t.m, err = mac.New(p.Auth, p.AuthKey)
	}
	if err != nil {
		return nil, &ParamError{p.SAID, err}
	}
	return t, nil
}

// HeaderLen is the length of AH in octets, padding included: a multiple of 4
// over IPv4 and of 8 over IPv6 (RFC 4302, 2.2 and 2.6).
func (t *Transform) HeaderLen(ipv6 bool) int {
	align := 4
	if ipv6 {
		align = 8
	}
	return (t.fixed + t.icv + align - 1) &^ (align - 1)
}

// Packet is one element of a batch. IP is a whole packet, from the IP header to
// the end that this header gives, and AH stands, or is to stand, at Off:
// directly behind the IP header or an extension header that names it.
//
// Seal writes AH: Next, the protocol behind it, and Seq, a sequence number that
// no other packet of this key ever has, sent or not. All else of IP is complete before,
// lengths and an IPv4 identification that stays included; the IPv4 checksum
// may come later.
//
// Open verifies IP, whose AH has the lower half of Seq, the sequence number
// that the replay window inferred; an old AH has none. Next becomes the protocol behind AH, N the
// length of AH: HeaderLen, or over IPv4 also what that would be over IPv6, since
// Linux pads so unless told otherwise.
//
// IP is otherwise left as it is. Errors of one packet do not touch the others.
type Packet struct {
	IP   []byte
	Off  int
	Next uint8
	Seq  uint64
	N    int
	Err  error
}

// Seal protects each packet. Err becomes nil, ErrMalformed, ErrHeader or
// ErrSequence.
func (t *Transform) Seal(s *Scratch, ps []Packet) {
	for i := range ps {
		ps[i].N, ps[i].Err = t.seal(s, &ps[i])
	}
}

func (t *Transform) seal(s *Scratch, p *Packet) (int, error) {
	if p.Seq == 0 || !t.esn && !t.old && p.Seq > math.MaxUint32 {
		return 0, ErrSequence
	}
	n, err := t.length(p)
	if err != nil {
		return 0, err
	}
	h := p.IP[p.Off : p.Off+n]
	h[0], h[1], h[2], h[3] = p.Next, uint8(n/4-2), 0, 0
	binary.BigEndian.PutUint32(h[4:], t.spi)
	if !t.old {
		binary.BigEndian.PutUint32(h[8:], uint32(p.Seq))
	}
	clear(h[t.fixed:])
	if err := t.cover(s, p, h); err != nil {
		return 0, err
	}
	icv, rest := h[t.fixed:t.fixed+t.icv], p.IP[p.Off+t.fixed+t.icv:]
	if t.g != nil {
		t.g.Sum(&s.aead, icv, p.Seq, s.head, zeros[:t.icv], rest, t.tail(s, p.Seq))
	} else {
		t.m.Sum(&s.mac, icv, s.head, zeros[:t.icv], rest, t.tail(s, p.Seq))
	}
	return n, nil
}

// Open verifies each packet. Err becomes nil, ErrAuth, ErrMalformed or ErrHeader.
func (t *Transform) Open(s *Scratch, ps []Packet) {
	for i := range ps {
		p := &ps[i]
		p.Next, p.N, p.Err = t.open(s, p)
	}
}

func (t *Transform) open(s *Scratch, p *Packet) (next uint8, n int, err error) {
	if n, err = t.length(p); err != nil {
		return 0, 0, err
	}
	h := p.IP[p.Off : p.Off+n]
	if got := (int(h[1]) + 2) * 4; got != n {
		if got != t.HeaderLen(true) || got > len(p.IP)-p.Off || p.IP[0]>>4 != 4 {
			return 0, 0, ErrMalformed
		}
		n = got
	}
	if binary.BigEndian.Uint32(h[4:]) != t.spi || !t.old &&
		(binary.BigEndian.Uint32(h[8:]) != uint32(p.Seq) || !t.esn && p.Seq > math.MaxUint32) {
		return 0, 0, ErrMalformed
	}
	if err := t.cover(s, p, h); err != nil {
		return 0, 0, err
	}
	icv := s.icv[:t.icv]
	copy(icv, h[t.fixed:])
	rest := p.IP[p.Off+t.fixed+t.icv:]
	ok := false
	if t.g != nil {
		ok = t.g.Verify(&s.aead, icv, s.head, zeros[:t.icv], rest, t.tail(s, p.Seq))
	} else {
		ok = t.m.Verify(&s.mac, icv, s.head, zeros[:t.icv], rest, t.tail(s, p.Seq))
	}
	if !ok {
		return 0, 0, ErrAuth
	}
	return h[0], n, nil
}

// length checks that the packet holds its IP header and AH; it returns the
// length of the latter.
func (t *Transform) length(p *Packet) (int, error) {
	if len(p.IP) < 20 {
		return 0, ErrMalformed
	}
	v6 := p.IP[0]>>4 == 6
	least := 20
	if v6 {
		least = 40
	}
	n := t.HeaderLen(v6)
	if p.Off < least || p.Off > len(p.IP) || n > len(p.IP)-p.Off {
		return 0, ErrMalformed
	}
	return n, nil
}

// cover puts into s.head what the ICV covers up to the ICV itself.
func (t *Transform) cover(s *Scratch, p *Packet, h []byte) error {
	s.head = append(s.head[:0], p.IP[:p.Off]...)
	ok := false
	switch p.IP[0] >> 4 {
	case 4:
		ok = immutable4(s.head, t.old)
	case 6:
		ok = immutable6(s.head, t.old)
	}
	if !ok {
		return ErrHeader
	}
	s.head = append(s.head, h[:t.fixed]...)
	return nil
}

// tail is the part of the sequence number that is not sent.
func (t *Transform) tail(s *Scratch, seq uint64) []byte {
	if !t.esn {
		return nil
	}
	binary.BigEndian.PutUint32(s.high[:], uint32(seq>>32))
	return s.high[:]
}
