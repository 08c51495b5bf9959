// Package replay is the anti-replay window of ESP and AH (RFC 4303, 3.4.3 and
// appendix A; RFC 4302, 3.4.3), with extended sequence numbers. A receiver
// calls Check before the cryptography, to throw out cheaply what cannot be new
// and to learn the full sequence number, and Mark after the packet verified:
// only then may it move the window. The engine calls it.
//
//	       top-size+1                     top
//	... too old  |  seen or not, one bit each  |  new: slides the window ...
//
// The bits lie in a ring of words, a word more than the size needs, so that
// sliding clears whole words and moves none (RFC 6479).
package replay

import "sync"

// MaxSize is the largest window, in packets.
const MaxSize = 65536

// Window is one SA's window. The zero value accepts everything and knows no
// extended numbers. It is safe for concurrent use: of several goroutines that
// Mark the same number, exactly one is told true.
type Window struct {
	mu   sync.Mutex
	size uint64 // in packets; 0: no check
	esn  bool
	top  uint64 // highest number that verified; 0: none yet
	ring []uint64
}

// New makes a window of size packets, 0 for no check; sizes beyond MaxSize
// are taken as MaxSize, negative ones as 0. With esn Check infers the
// high half of the sequence number, even where nothing is checked.
func New(size int, esn bool) *Window { return NewAt(size, esn, 0) }

// NewAt is New of a window that takes no number up to top, as if each had been
// marked.
func NewAt(size int, esn bool, top uint64) *Window {
	w := new(Window)
	w.Init(size, esn, top)
	return w
}

// Init makes of a Window that was not used yet what NewAt returns.
func (w *Window) Init(size int, esn bool, top uint64) {
	w.size, w.esn, w.top = uint64(min(max(size, 0), MaxSize)), esn, top
	if w.size == 0 {
		return
	}
	words := uint64(1) // a power of two, so that the ring index is a mask
	for words*64 < w.size+63 {
		words *= 2
	}
	w.ring = make([]uint64, words)
	if top == 0 {
		return
	}
	for i := range w.ring {
		w.ring[i] = ^uint64(0)
	}
	w.ring[top/64&uint64(len(w.ring)-1)] = ^uint64(0) >> (63 - top%64)
}

// Size returns the size in packets, 0 if nothing is checked.
func (w *Window) Size() int { return int(w.size) }

// Top returns the highest sequence number that was marked.
func (w *Window) Top() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.top
}

// Check returns the full sequence number of a packet that carries seqLow, and
// whether it may be new: neither left of the window nor marked. Number 0 is
// never sent under a check (RFC 4303, 3.3.3: the first is 1). The answer is no
// promise, Mark decides.
func (w *Window) Check(seqLow uint32) (seq uint64, ok bool) {
	if w.size == 0 && !w.esn {
		return uint64(seqLow), true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	seq, ok = w.infer(seqLow)
	if w.size == 0 || !ok {
		return seq, ok
	}
	return seq, seq != 0 && w.isNew(seq)
}

// CheckBatch is Check of several packets at one time.
func (w *Window) CheckBatch(low []uint32, seq []uint64, ok []bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, l := range low {
		seq[i], ok[i] = w.infer(l)
		if ok[i] && w.size != 0 {
			ok[i] = seq[i] != 0 && w.isNew(seq[i])
		}
	}
}

// MarkBatch is Mark of several packets, one after the other.
func (w *Window) MarkBatch(seq []uint64, ok []bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, s := range seq {
		ok[i] = w.mark(s)
	}
}

// Mark records that the packet of seq, as Check gave it, verified. It returns
// false, and the packet must be dropped, if seq meanwhile was marked or fell
// off the window.
func (w *Window) Mark(seq uint64) bool {
	if w.size == 0 && !w.esn {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mark(seq)
}

func (w *Window) mark(seq uint64) bool {
	if w.size == 0 {
		if w.esn {
			w.top = max(w.top, seq)
		}
		return true
	}
	if seq == 0 || !w.isNew(seq) {
		return false
	}
	mask := uint64(len(w.ring) - 1)
	if seq > w.top {
		// Clear the words between; at most the whole ring.
		from, n := w.top/64, min(seq/64-w.top/64, uint64(len(w.ring)))
		for i := range n {
			w.ring[(from+1+i)&mask] = 0
		}
		w.top = seq
	}
	w.ring[seq/64&mask] |= 1 << (seq % 64)
	return true
}

// isNew reports whether seq is right of the window, or in it and not marked.
func (w *Window) isNew(seq uint64) bool {
	if seq > w.top {
		return true
	}
	if w.top-seq >= w.size {
		return false
	}
	return w.ring[seq/64&uint64(len(w.ring)-1)]&(1<<(seq%64)) == 0
}

// infer finds the high half: the only one with which the number lies in the
// window or less than 2^32-size beyond it (RFC 4303, A2.2). It fails for a
// number that would have to come before the first.
func (w *Window) infer(low uint32) (uint64, bool) {
	if !w.esn {
		return uint64(low), true
	}
	size := w.size
	if size == 0 {
		// Nothing is too old: the nearest to top, either side.
		size = 1 << 31
	}
	topLow, topHigh := w.top&0xffffffff, w.top>>32
	bottom := uint32(topLow - size + 1) // modulo 2^32, as in the appendix
	switch {
	case topLow >= size-1: // case A: the window lies within one subspace
		if low < bottom {
			topHigh++
		}
	case low >= bottom: // case B: it begins in the one before
		if topHigh == 0 {
			if w.size == 0 {
				break
			}
			return uint64(low), false
		}
		topHigh--
	}
	// No number follows 2^64-1: what would is left of everything.
	if topHigh > 0xffffffff {
		return uint64(low), false
	}
	return topHigh<<32 | uint64(low), true
}
