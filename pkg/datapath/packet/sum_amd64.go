//go:build !purego

package packet

import "golang.org/x/sys/cpu"

// A variable, so that tests compare both ways.
var haveVectors = cpu.X86.HasAVX2

// addAVX2 returns the sum of the n octets at src as little-endian words of 32
// bits. n is a multiple of 32, below 2^32.
//
//go:noescape
func addAVX2(src *byte, n int) uint64

// copyAddAVX2 is addAVX2 that copies the octets to dst as it goes.
//
//go:noescape
func copyAddAVX2(dst, src *byte, n int) uint64
