//go:build !purego

package aead

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/cpu"
)

var (
	haveCBC = cpu.X86.HasAES
	// cpu.X86 has an AVX-512 bit only if the operating system keeps the registers.
	haveGCM = cpu.X86.HasAES && cpu.X86.HasAVX2 && cpu.X86.HasBMI2 &&
		cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasAVX512VL &&
		cpu.X86.HasAVX512VAES && cpu.X86.HasAVX512VPCLMULQDQ
)

// schedule is the round keys of an AES key, in the order of their use. What
// follows them is zero.
type schedule [15 * 16]byte

// expand makes the schedule of key, of 16, 24 or 32 octets, and returns the
// number of rounds (FIPS 197, 5.2; words are little-endian here).
func (s *schedule) expand(key []byte) (rounds int) {
	nk := len(key) / 4
	rounds = nk + 6
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(s[4*i:]) }
	copy(s[:], key)
	rcon := uint32(1)
	for i := nk; i < 4*(rounds+1); i++ {
		t := word(i - 1)
		switch {
		case i%nk == 0:
			t = bits.RotateLeft32(aesSubWord(t), -8) ^ rcon
			rcon = rcon<<1 ^ rcon>>7*0x11b
		case nk > 6 && i%nk == 4:
			t = aesSubWord(t)
		}
		binary.LittleEndian.PutUint32(s[4*i:], word(i-nk)^t)
	}
	return rounds
}

// invert sets s to the schedule that decrypts what e encrypts (FIPS 197, 5.3.5).
func (s *schedule) invert(e *schedule, rounds int) {
	for i := range rounds + 1 {
		dst, src := (*[16]byte)(s[16*i:]), (*[16]byte)(e[16*(rounds-i):])
		if i == 0 || i == rounds {
			*dst = *src
			continue
		}
		aesInvMix(dst, src)
	}
}
