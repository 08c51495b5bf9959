//go:build !purego

package aead

import (
	"encoding/binary"
	"unsafe"
)

// gcm is AES-GCM (NIST SP 800-38D; RFC 4106) in assembly, 16 blocks at a time.
// The assembly knows the offsets. Without pointers and of 512 octets it is
// allocated aligned to its size, which keeps the powers in whole cache lines.
type gcm struct {
	powers [16][16]byte // H^16 to H^1; see the generator for their form
	round  schedule     // behind powers: the assembly reads beyond them, times zero
	rounds uint64
	salt   [4]byte
	tagLen uint32
}

// newOwnGCM takes what New has checked.
func newOwnGCM(key, salt []byte, tagLen int) core {
	g := &gcm{salt: [4]byte(salt), tagLen: uint32(tagLen)}
	rounds := g.round.expand(key)
	g.rounds = uint64(rounds)

	// H is the zero block, encrypted; as a chain of one block of CBC.
	var h [16]byte
	lane := cbcLane{&h[0], &h[0], &h[0]}
	lanes := [8]cbcLane{lane, lane, lane, lane, lane, lane, lane, lane}
	cbcEncrypt8(&g.round[0], rounds, (*byte)(unsafe.Pointer(&lanes)), 1)

	// Times x: one bit up, and what falls out is the polynomial.
	hi, lo := binary.BigEndian.Uint64(h[:]), binary.BigEndian.Uint64(h[8:])
	out := -(hi >> 63)
	hi, lo = hi<<1|lo>>63, lo<<1
	hi ^= out & 0xc200000000000000
	lo ^= out & 1
	h1 := &g.powers[15]
	binary.LittleEndian.PutUint64(h1[:], lo)
	binary.LittleEndian.PutUint64(h1[8:], hi)
	for i := 14; i >= 0; i-- {
		gcmMul(&g.powers[i], &g.powers[i+1], h1)
	}
	clear(h[:])
	return g
}

func (g *gcm) seal(_ *Scratch, dst, aad, iv, plain, _ []byte) {
	_ = iv[7]
	gcmSeal((*byte)(unsafe.Pointer(g)), unsafe.SliceData(dst), unsafe.SliceData(plain), len(plain),
		unsafe.SliceData(iv), unsafe.SliceData(aad), len(aad))
}

func (g *gcm) open(_ *Scratch, dst, aad, iv, ct, _ []byte) bool {
	_ = iv[7]
	if gcmOpen((*byte)(unsafe.Pointer(g)), unsafe.SliceData(dst), unsafe.SliceData(ct), len(dst),
		unsafe.SliceData(iv), unsafe.SliceData(aad), len(aad)) != 0 {
		clear(dst)
		return false
	}
	return true
}
