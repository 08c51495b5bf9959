// Package ipcomp compresses and expands the payload of IP packets (RFC 3173)
// with DEFLATE (RFC 2394, RFC 1951). It hides how compressor and decompressor
// are kept for the next packet, and the bounds that keep a small packet from
// becoming a large one. The engine calls it, and knows what it leaves out:
// modes, IP headers, which SA has which CPI.
//
//	| IP header, extension headers | next 1 | flags 1 | CPI 2 | compressed payload |
//
// Compression protects nothing: what it makes of secrets and of an attacker's
// text in one packet has a length that tells about both, encrypted or not.
package ipcomp

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"io"
)

// HeaderLen is the length of the IPComp header in octets.
const HeaderLen = 4

// Compression Parameter Indices (RFC 3173, 3.3). Below MinNegotiated they name
// an algorithm or are reserved.
const (
	CPIDeflate    = 2
	MinNegotiated = 256
	MaxNegotiated = 61439
	MaxCPI        = 65535
)

// Threshold is the length in octets below which a payload is not worth trying
// (RFC 3173, 2.2; 90 is Linux's for DEFLATE).
const Threshold = 90

// ErrMalformed: not DEFLATE, cut, or longer than the room for it once expanded.
var ErrMalformed = errors.New("ipcomp: malformed payload")

// Scratch is the working memory of one goroutine. The zero value is ready, and
// grows to some 700 KiB with the first packet; it must not be copied after use.
type Scratch struct {
	w   *flate.Writer
	out sink
	r   io.ReadCloser
	in  bytes.Reader
	one [1]byte
}

// sink writes into a slice and refuses what does not fit.
type sink struct {
	b []byte
	n int
}

var errFull = errors.New("full")

func (s *sink) Write(p []byte) (int, error) {
	k := copy(s.b[s.n:], p)
	s.n += k
	if k < len(p) {
		return k, errFull
	}
	return k, nil
}

// Compress writes the compressed form of src to the front of dst, disjoint
// from src, and returns its length. It reports false if that form and an
// IPComp header are not shorter than src: src is then sent as it is, without
// header (RFC 3173, 2.2).
func (s *Scratch) Compress(dst, src []byte) (n int, ok bool) {
	if len(src) < Threshold {
		return 0, false
	}
	s.out = sink{b: dst[:min(len(dst), len(src)-HeaderLen-1)]}
	if s.w == nil {
		// The fastest level: the others clear their tables for each packet,
		// which costs more than compressing it.
		s.w, _ = flate.NewWriter(&s.out, flate.BestSpeed)
	} else {
		s.w.Reset(&s.out)
	}
	if _, err := s.w.Write(src); err != nil {
		return 0, false
	}
	if err := s.w.Close(); err != nil {
		return 0, false
	}
	n = s.out.n
	s.out.b = nil
	return n, true
}

// Expand writes the expanded form of src to the front of dst, disjoint from
// src, and returns its length. What does not fit into dst is ErrMalformed: dst
// bounds what a sender can make us write. Octets behind the end of the
// compressed data are ignored.
func (s *Scratch) Expand(dst, src []byte) (int, error) {
	s.in.Reset(src)
	defer s.in.Reset(nil)
	if s.r == nil {
		s.r = flate.NewReader(&s.in)
	} else if err := s.r.(flate.Resetter).Reset(&s.in, nil); err != nil {
		return 0, ErrMalformed
	}
	n := 0
	for {
		b := dst[n:]
		if len(b) == 0 {
			b = s.one[:] // the end may still be to come
		}
		k, err := s.r.Read(b)
		if k > 0 && n == len(dst) {
			return 0, ErrMalformed
		}
		n += k
		switch err {
		case nil:
		case io.EOF:
			return n, nil
		default:
			return 0, ErrMalformed
		}
	}
}

// Put writes an IPComp header to the front of b.
func Put(b []byte, next uint8, cpi uint16) {
	b[0], b[1] = next, 0
	binary.BigEndian.PutUint16(b[2:], cpi)
}

// Header reads the IPComp header at the front of b. The flags have no meaning
// and are ignored (RFC 3173, 3.3).
func Header(b []byte) (next uint8, cpi uint16, ok bool) {
	if len(b) < HeaderLen {
		return 0, 0, false
	}
	return b[0], binary.BigEndian.Uint16(b[2:]), true
}
