package replay

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// step is what one packet meets, in the order of a receiver: Check, and if it
// says so Mark. at is what Check infers.
type step struct {
	low uint32
	at  uint64
	ok  bool
}

const (
	max32 = 1<<32 - 1
	sub   = 1 << 32 // one subspace of 32 bits
)

func ladder(t *testing.T, w *Window, steps []step) {
	t.Helper()
	for i, s := range steps {
		seq, ok := w.Check(s.low)
		if ok && !w.Mark(seq) {
			t.Fatalf("step %d: Mark(%#x) = false right after Check said true", i, seq)
		}
		if ok != s.ok || ok && seq != s.at {
			t.Fatalf("step %d: low %#x: got %#x, %v; want %#x, %v (top %#x)", i, s.low, seq, ok, s.at, s.ok, w.Top())
		}
	}
}

// yes and no are steps without ESN.
func yes(n uint32) step { return step{n, uint64(n), true} }
func no(n uint32) step  { return step{low: n} }

func TestLadder(t *testing.T) {
	for _, tt := range []struct {
		name  string
		size  int
		steps []step
	}{
		{"first packets, then the same again", 64, []step{no(0), yes(1), no(1), yes(2), no(2), no(1), yes(9), yes(8), no(9), no(8), no(0)}},
		{"the window's left edge", 64, []step{yes(64), yes(1), no(1), no(0), yes(65), no(1), yes(2), yes(66), no(2), yes(3), yes(130), no(66), yes(67), yes(68), no(68)}},
		{"size 1: only what is newer", 1, []step{yes(1), no(1), yes(5), no(4), no(5), yes(6), no(0)}},
		{"size 2", 2, []step{yes(5), yes(4), no(4), no(3), yes(7), yes(6), no(5), no(6), no(7)}},
		{"size 32, not a word", 32, []step{yes(100), yes(69), no(68), no(69), yes(101), no(69), yes(70), no(36)}},
		{"size 63", 63, []step{yes(127), yes(65), no(64), yes(128), no(65), yes(66)}},
		{"size 65", 65, []step{yes(127), yes(63), no(62), yes(128), no(63), yes(64), no(64)}},
		{"jump within a word", 128, []step{yes(130), yes(140), yes(135), no(130), no(140), yes(131)}},
		{"jump of exactly a word clears it", 64, []step{yes(10), yes(74), yes(73), no(10), yes(11), no(73)}},
		{"jump of the ring's length leaves no old bit", 64, []step{yes(7), yes(7 + 128), yes(7 + 127), yes(7 + 65), no(7 + 64)}},
		{"jump far beyond the ring", 64, []step{yes(3), yes(4), yes(1<<30 + 4), yes(1<<30 + 3), no(1<<30 + 3), no(4), no(3)}},
		{"jump to the end; no wrap without ESN", 64, []step{yes(1), yes(max32), yes(max32 - 1), yes(max32 - 63), no(max32 - 64), no(max32), no(0), no(1), no(2)}},
		{"largest size", MaxSize, []step{yes(MaxSize), yes(1), no(0), yes(MaxSize + 1), no(1), yes(2), yes(MaxSize - 1), no(2)}},
	} {
		t.Run(tt.name, func(t *testing.T) { ladder(t, New(tt.size, false), tt.steps) })
	}
}

func TestESNLadder(t *testing.T) {
	for _, tt := range []struct {
		name  string
		size  int
		top   uint64 // marked first, if not 0
		steps []step
	}{
		{"begins like any other", 64, 0, []step{{0, 0, false}, {1, 1, true}, {1, 1, false}, {2, 2, true}}},
		{"before the first subspace there is nothing", 64, 0, []step{{max32, 0, false}, {max32 - 62, 0, false}, {5, 5, true}, {max32, 0, false}}},
		{"case A in the first subspace: far left means the next subspace", 64, 1000, []step{{937, 937, true}, {936, sub + 936, true}}},
		{"up to the wrap and over it, in order", 64, max32 - 1, []step{
			{max32, max32, true}, {0, sub, true}, {1, sub + 1, true}, {max32, max32, false}, {max32 - 1, 0, false}, {max32 - 2, max32 - 2, true}, {0, sub, false}}},
		{"over the wrap by a jump, then what was late", 64, max32 - 10, []step{
			{20, sub + 20, true}, {max32, max32, true}, {max32 - 10, max32 - 10, false}, {max32 - 42, max32 - 42, true},
			{max32 - 43, 2*sub - 44, true}}}, // one further left can only be nearly a subspace ahead
		{"window ends exactly at the wrap", 64, sub + 63, []step{{0, sub, true}, {max32, 2*sub - 1, true}}},
		{"window reaches one over the wrap", 64, sub + 62, []step{{0, sub, true}, {max32, sub - 1, true}, {max32 - 1, 2*sub - 2, true}}},
		{"top at the start of a subspace", 64, 5 * sub, []step{{0, 5 * sub, false}, {max32, 5*sub - 1, true}, {max32 - 62, 5*sub - 63, true}, {1, 5*sub + 1, true}}},
		{"end of all numbers", 64, 1<<64 - 2, []step{{max32, 1<<64 - 1, true}, {max32, 0, false}, {0, 0, false}, {1, 0, false}, {max32 - 2, 1<<64 - 3, true}}},
		{"size 1 at the wrap", 1, max32, []step{{max32, 0, false}, {0, sub, true}, {1, sub + 1, true}, {0, 2 * sub, true}}},
		{"largest size at the wrap", MaxSize, sub, []step{{max32 - MaxSize + 2, sub - MaxSize + 1, true}, {max32 - MaxSize + 1, 2*sub - MaxSize, true}}},
		{"no check: nearest, older than the first is not", 0, 0, []step{{0, 0, true}, {max32, max32, true}, {1, sub + 1, true}, {max32, max32, true}, {1, sub + 1, true}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := New(tt.size, true)
			if tt.top != 0 && !w.Mark(tt.top) {
				t.Fatalf("Mark(%#x) = false on a new window", tt.top)
			}
			ladder(t, w, tt.steps)
		})
	}
}

func TestNoCheck(t *testing.T) {
	var zero Window
	for _, w := range []*Window{&zero, New(0, false), New(-1, false)} {
		ladder(t, w, []step{yes(5), yes(5), yes(0), yes(max32), yes(1)})
		if w.Size() != 0 {
			t.Errorf("Size() = %d, want 0", w.Size())
		}
	}
	if got := New(MaxSize+1, false).Size(); got != MaxSize {
		t.Errorf("Size() of one too large = %d, want %d", got, MaxSize)
	}
}

// Check alone moves nothing, whatever forged numbers it sees.
func TestCheckMovesNothing(t *testing.T) {
	for _, esn := range []bool{false, true} {
		w := New(64, esn)
		w.Mark(100)
		for _, n := range []uint32{101, 5000, max32, 99, 36, 0} {
			w.Check(n)
		}
		if w.Top() != 100 {
			t.Errorf("esn %v: top %d after Check only, want 100", esn, w.Top())
		}
		if _, ok := w.Check(99); !ok {
			t.Errorf("esn %v: 99 refused though nobody marked it", esn)
		}
	}
}

// Mark is the one that decides: the window may have moved since Check.
func TestMarkAfterMove(t *testing.T) {
	w := New(64, true)
	w.Mark(100)
	seq, ok := w.Check(90)
	if !ok {
		t.Fatal("Check(90) = false, want true")
	}
	w.Mark(90 + 64)
	if w.Mark(seq) {
		t.Error("Mark(90) = true though it fell off the window meanwhile")
	}
	if w.Mark(0) {
		t.Error("Mark(0) = true, want false")
	}
}

// model is the window as RFC 4303, 3.4.3 words it, without any cleverness.
type model struct {
	size, top uint64
	seen      map[uint64]bool
}

func (m *model) accept(seq uint64) bool {
	if seq == 0 || seq+m.size <= m.top || m.seen[seq] {
		return false
	}
	m.seen[seq] = true
	m.top = max(m.top, seq)
	return true
}

func TestAgainstModel(t *testing.T) {
	for _, size := range []int{1, 2, 31, 32, 63, 64, 65, 127, 128, 129, 1000, 4096, 65535, MaxSize} {
		for _, esn := range []bool{false, true} {
			t.Run(fmt.Sprintf("size %d esn %v", size, esn), func(t *testing.T) {
				r := rand.New(rand.NewPCG(uint64(size), 7))
				w := New(size, esn)
				m := model{size: uint64(size), seen: map[uint64]bool{}}
				next := uint64(1)
				if esn {
					next = sub - 2000 // the walk crosses the wrap
					w.Mark(next)
					m.accept(next)
				}
				for i := range 20000 {
					seq := next
					switch r.IntN(8) {
					case 0: // late or repeated, or just off the window
						seq = next - min(next, uint64(r.IntN(size+size/4+3)))
					case 1: // a gap
						next += uint64(r.IntN(2*size + 130))
						seq = next
					}
					next = max(next, seq+1)
					if esn && seq+uint64(size) <= m.top {
						// What is left of the window cannot be told
						// from the next subspace; Mark still can.
						if w.Mark(seq) {
							t.Fatalf("packet %d: Mark(%#x) = true left of the window, top %#x", i, seq, m.top)
						}
						continue
					}
					got, ok := w.Check(uint32(seq))
					if got != seq {
						t.Fatalf("packet %d: Check infers %#x, want %#x", i, got, seq)
					}
					ok = ok && w.Mark(got)
					if want := m.accept(seq); ok != want {
						t.Fatalf("packet %d: accepted(%#x) = %v, want %v, top %#x", i, seq, ok, want, m.top)
					}
				}
			})
		}
	}
}

// Each number is accepted by exactly one of many goroutines.
func TestConcurrent(t *testing.T) {
	const workers, n = 8, 20000
	w := New(MaxSize, false)
	accepted := make([]atomic.Int32, n+1)
	var wg sync.WaitGroup
	for g := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for i := uint32(1); i <= n; i++ {
				low := i
				if r.IntN(4) == 0 {
					low = 1 + uint32(r.IntN(int(i)))
				}
				if seq, ok := w.Check(low); ok && w.Mark(seq) {
					accepted[seq].Add(1)
				}
			}
		})
	}
	wg.Wait()
	for i := 1; i <= n; i++ {
		if got := accepted[i].Load(); got != 1 {
			t.Fatalf("number %d accepted %d times, want once", i, got)
		}
	}
}

func TestNoAllocs(t *testing.T) {
	w := New(1024, true)
	n := uint32(0)
	if a := testing.AllocsPerRun(100, func() {
		n++
		if seq, ok := w.Check(n); ok {
			w.Mark(seq)
		}
	}); a != 0 {
		t.Errorf("%v allocations per packet, want 0", a)
	}
}

func BenchmarkCheckMark(b *testing.B) {
	b.ReportAllocs()
	w := New(1024, true)
	n := uint32(0)
	for b.Loop() {
		n++
		if seq, ok := w.Check(n); ok {
			w.Mark(seq)
		}
	}
}

// Batches decide as packets one by one do.
func TestBatch(t *testing.T) {
	for _, size := range []int{0, 1, 64, 1000} {
		for _, esn := range []bool{false, true} {
			one, many := New(size, esn), New(size, esn)
			r := rand.New(rand.NewPCG(uint64(size), 3))
			at := uint32(0xffffff00)
			if !esn {
				at = 1
			}
			for range 300 {
				n := r.IntN(20)
				low, seq, ok := make([]uint32, n), make([]uint64, n), make([]bool, n)
				for i := range low {
					low[i] = at + uint32(r.IntN(100)) - 40
					at += uint32(r.IntN(3))
				}
				many.CheckBatch(low, seq, ok)
				for i := range low {
					if s, o := one.Check(low[i]); s != seq[i] || o != ok[i] {
						t.Fatalf("size %d, ESN %v: check of %#x: got %#x, %v, want %#x, %v", size, esn, low[i], seq[i], ok[i], s, o)
					}
				}
				many.MarkBatch(seq, ok)
				for i := range seq {
					if o := one.Mark(seq[i]); o != ok[i] {
						t.Fatalf("size %d, ESN %v: mark of %#x: got %v, want %v", size, esn, seq[i], ok[i], o)
					}
				}
				if one.Top() != many.Top() {
					t.Fatalf("size %d, ESN %v: top %#x, want %#x", size, esn, many.Top(), one.Top())
				}
			}
		}
	}
}

// TestNewAt: a window that begins at a number is as one in which that and all
// before it were marked, whatever comes then.
func TestNewAt(t *testing.T) {
	for _, size := range []int{0, 1, 32, 64, 100, 1024} {
		for _, top := range []uint64{0, 1, 63, 64, 65, 127, 128, 1000, 1<<32 - 2, 1<<32 + 63, 1 << 40} {
			esn := top >= 1<<32
			w := NewAt(size, esn, top)
			if w.Top() != top {
				t.Fatalf("size %d, top %d: top %d", size, top, w.Top())
			}
			if size == 0 {
				continue
			}
			for back := range min(top, 3000) {
				if w.Mark(top - back) {
					t.Errorf("size %d, top %d: %d is taken", size, top, top-back)
				}
			}
			// Every other one ahead, then the ones between that the window still has.
			for ahead := uint64(2); ahead < 3000; ahead += 2 {
				if !w.Mark(top+ahead) || w.Mark(top+ahead) {
					t.Fatalf("size %d, top %d: %d ahead is not taken once", size, top, ahead)
				}
				if size > 1 && (!w.Mark(top+ahead-1) || w.Mark(top+ahead-1)) {
					t.Fatalf("size %d, top %d: %d ahead, behind the next, is not taken once", size, top, ahead-1)
				}
			}
		}
	}
}
