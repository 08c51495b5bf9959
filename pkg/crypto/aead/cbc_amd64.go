//go:build !purego

package aead

import (
	"crypto/aes"
	"crypto/subtle"
	"unsafe"

	"github.com/missiu/missiu/pkg/crypto/mac"
)

// cbcLane is one of eight chains that are encrypted side by side; the assembly
// knows the offsets.
type cbcLane struct{ src, dst, iv *byte }

// ownScratch is the part of Scratch that only own code needs.
type ownScratch struct {
	lanes [8]cbcLane
	one   [1]Message
}

// ownCBC is cbc with AES-NI: a chain waits for each block, so encryption takes
// eight packets at a time, and decryption, which does not wait, eight blocks.
type ownCBC struct {
	enc, dec schedule
	rounds   int
	m        *mac.MAC
}

// newOwnCBC takes what New has checked.
func newOwnCBC(key []byte, m *mac.MAC) core {
	c := &ownCBC{m: m}
	c.rounds = c.enc.expand(key)
	c.dec.invert(&c.enc, c.rounds)
	return c
}

func (c *ownCBC) seal(s *Scratch, dst, aad, iv, plain, tail []byte) {
	s.own.one[0] = Message{Dst: dst, AAD: aad, IV: iv, Plain: plain, Tail: tail}
	c.sealBatch(s, s.own.one[:])
	s.own.one[0] = Message{}
}

// sealBatch lets up to eight chains run as far as the shortest goes, and puts
// the next message where one has ended. The MAC follows at once, while the
// ciphertext is in the cache.
func (c *ownCBC) sealBatch(s *Scratch, ms []Message) {
	const bs = aes.BlockSize
	var which, done [8]int // the message of each lane in use, and its octets done
	used, next := 0, 0
	for {
		for used < len(which) && next < len(ms) {
			m := &ms[next]
			if len(m.Plain) == 0 {
				c.sum(s, m)
			} else {
				which[used], done[used] = next, 0
				s.own.lanes[used] = cbcLane{&m.Plain[0], &m.Dst[0], &m.IV[0]}
				used++
			}
			next++
		}
		if used == 0 {
			break
		}
		n := len(ms[which[0]].Plain) - done[0]
		for l := 1; l < used; l++ {
			n = min(n, len(ms[which[l]].Plain)-done[l])
		}
		for l := used; l < len(s.own.lanes); l++ {
			s.own.lanes[l] = s.own.lanes[0] // the same octets to the same place
		}
		cbcEncrypt8(&c.enc[0], c.rounds, (*byte)(unsafe.Pointer(&s.own.lanes)), n/bs)
		for l := 0; l < used; {
			m := &ms[which[l]]
			if done[l] += n; done[l] < len(m.Plain) {
				s.own.lanes[l] = cbcLane{&m.Plain[done[l]], &m.Dst[done[l]], &m.Dst[done[l]-bs]}
				l++
				continue
			}
			c.sum(s, m)
			used--
			which[l], done[l] = which[used], done[used]
			s.own.lanes[l] = s.own.lanes[used]
		}
	}
	s.own.lanes = [8]cbcLane{}
}

// sum appends the ICV to a message that is encrypted.
func (c *ownCBC) sum(s *Scratch, m *Message) {
	if n := len(m.Plain); c.m != nil {
		c.m.Sum(&s.mac, m.Dst[n:n+c.m.ICVLen()], m.AAD, m.IV, m.Dst[:n], m.Tail)
	}
}

func (c *ownCBC) open(s *Scratch, dst, aad, iv, ct, tail []byte) bool {
	n := len(dst)
	if c.m != nil && !c.m.Verify(&s.mac, ct[n:], aad, iv, ct[:n], tail) {
		return false
	}
	if n > 0 {
		cbcDecrypt(&c.dec[0], c.rounds, &dst[0], &ct[0], &iv[0], n/aes.BlockSize)
	}
	return true
}

// ownCounter is counter mode with the lanes of CBC, eight chains of one block
// from an IV of zeros.
type ownCounter struct {
	enc    schedule
	rounds int
}

func newOwnCounter(key []byte) counter {
	c := new(ownCounter)
	c.rounds = c.enc.expand(key)
	return c
}

var zeroBlock [aes.BlockSize]byte

func (c *ownCounter) xor(s *Scratch, dst, src []byte) {
	const bs = aes.BlockSize
	for i := range s.own.lanes {
		b := &s.stream[i*bs]
		s.own.lanes[i] = cbcLane{b, b, &zeroBlock[0]}
	}
	for len(src) > 0 {
		for i := 0; i < len(s.stream); i += bs {
			copy(s.stream[i:], s.block[:])
			s.count()
		}
		cbcEncrypt8(&c.enc[0], c.rounds, (*byte)(unsafe.Pointer(&s.own.lanes)), 1)
		n := subtle.XORBytes(dst, src, s.stream[:])
		dst, src = dst[n:], src[n:]
	}
	s.own.lanes = [8]cbcLane{}
}
