package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
)

// plainSum is RFC 1071 word by word.
func plainSum(b []byte, acc uint64) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		acc += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		acc += uint64(b[0]) << 8
	}
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}

// TestSum: every length up to several turns of the vectors, every alignment,
// and sums whose carries run through all words.
func TestSum(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 700)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	for name, src := range map[string][]byte{
		"noise": noise, "ones": bytes.Repeat([]byte{0xff}, 700), "zeros": make([]byte, 700),
	} {
		for n := range 600 {
			for _, off := range []int{0, 1, 7, 31} {
				b := src[off : off+n]
				for _, acc := range []uint64{0, 0x1_2345, 1<<32 - 1} {
					want := plainSum(b, acc)
					if got := fold(sum(b, acc)); got != want {
						t.Fatalf("%s: sum of %d octets at %d from %#x: got %#x, want %#x", name, n, off, acc, got, want)
					}
					dst := bytes.Repeat([]byte{0xaa}, n+40)
					if got := fold(copySum(dst, b, acc)); got != want || !bytes.Equal(dst[:n], b) {
						t.Fatalf("%s: copySum of %d octets at %d from %#x: got %#x, want %#x", name, n, off, acc, got, want)
					}
					if !bytes.Equal(dst[n:], bytes.Repeat([]byte{0xaa}, 40)) {
						t.Fatalf("%s: copySum of %d octets wrote behind them", name, n)
					}
				}
			}
		}
	}
}

func BenchmarkSum(b *testing.B) {
	dst, src := make([]byte, 65536), make([]byte, 65536)
	for _, n := range []int{20, 64, 1398, 65536} {
		b.Run(fmt.Sprintf("sum/%d", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				sum(src[:n], 0)
			}
		})
		b.Run(fmt.Sprintf("copySum/%d", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				copySum(dst, src[:n], 0)
			}
		})
	}
}
