package esp

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/aead"
	"github.com/missiu/missiu/pkg/crypto/alg"
)

func BenchmarkSeal(b *testing.B) {
	bench(b, func(tr *Transform, s *Scratch, out, _ []Packet) { tr.Seal(s, out) })
}
func BenchmarkOpen(b *testing.B) {
	bench(b, func(tr *Transform, s *Scratch, _, in []Packet) { tr.Open(s, in) })
}

// benched is a transform to measure.
type benched struct {
	name string
	tr   *Transform
}

// benchmarks returns the transforms of all suites, with own code where there is any beside
// the standard library. The switch stays on afterwards, so they are made once.
func benchmarks(b *testing.B) []benched {
	benchOnce.Do(func() { benchList = makeBenchmarks(b) })
	return benchList
}

var (
	benchOnce sync.Once
	benchList []benched
)

func makeBenchmarks(b *testing.B) (l []benched) {
	own := aead.Implementation()
	for _, name := range []string{"own", "std"} {
		for _, su := range suites() {
			aes := su.e != alg.EncrNULL && su.e != alg.EncrChaCha20Poly1305
			if name == "std" || aes && own != "standard library" {
				l = append(l, benched{su.String() + "/" + name, su.transform(b, 1, false)})
			}
		}
		aead.UseStandardLibrary()
	}
	slices.SortStableFunc(l, func(a, b benched) int { return strings.Compare(a.name, b.name) })
	return l
}

// bench reports per packet; the batch is what a super-frame holds.
func bench(b *testing.B, f func(tr *Transform, s *Scratch, out, in []Packet)) {
	const batch = 44
	for _, x := range benchmarks(b) {
		for _, n := range []int{64, 512, 1400} {
			b.Run(fmt.Sprintf("%s/%d", x.name, n), func(b *testing.B) {
				tr := x.tr
				s := NewScratch()
				out, in := make([]Packet, batch), make([]Packet, batch)
				for i := range out {
					out[i] = Packet{Dst: make([]byte, 1600), Src: make([]byte, n, 1550), Next: 4, Seq: uint64(i + 1)}
				}
				tr.Seal(s, out)
				for i := range in {
					in[i] = Packet{Dst: make([]byte, 1600), Src: bytes.Clone(out[i].Dst[:out[i].N]), Seq: uint64(i + 1)}
				}
				b.ReportAllocs()
				b.SetBytes(int64(n))
				for i := 0; i < b.N; i += batch {
					f(tr, s, out, in)
				}
				if out[0].Err != nil || in[0].Err != nil {
					b.Fatal(out[0].Err, in[0].Err)
				}
			})
		}
	}
}
