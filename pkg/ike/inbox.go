package ike

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
)

// call is an input of the machine other than a datagram.
type call func(l *lineage, now time.Time) []sa.Output

// inputs are what has come for a lineage, of each kind in its order.
type inputs struct {
	packets []sa.Datagram
	octets  int // of these
	calls   []call
	expired bool // the timer went off
	killed  bool
}

// inbox holds the inputs of a lineage. A goroutine serves it, one, for as long as
// they last: most lineages have nothing to do most of the time, and a goroutine
// that waits keeps the stack that it once needed, which is more than all the rest.
type inbox struct {
	mu sync.Mutex
	inputs
	busy bool // the goroutine is there
	over bool // nothing is taken any more
}

// put has f add an input, and starts the goroutine if there is none; f returns
// false when there is no room.
func (l *lineage) put(f func(*inbox) bool) bool {
	b := &l.inbox
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over || !f(b) {
		return false
	}
	if !b.busy {
		b.busy = true
		l.d.workers.serve(&l.d.wg, l)
	}
	return true
}

// workers are the goroutines that serve lineages. There are as many as there is
// to do, since they wait for missiu; a few stay for what comes next, with stacks
// that have grown already.
type workers struct {
	work  chan *lineage // that one who waits takes
	rest  atomic.Int32  // who wait
	ended chan struct{}
}

// maxRest is how many stay.
const maxRest = 8

func (w *workers) serve(wg *sync.WaitGroup, l *lineage) {
	select {
	case w.work <- l:
	default:
		wg.Go(func() { w.run(l) })
	}
}

func (w *workers) run(l *lineage) {
	for {
		l.serve()
		if w.rest.Add(1) > maxRest {
			w.rest.Add(-1)
			return
		}
		select {
		case l = <-w.work:
			w.rest.Add(-1)
		case <-w.ended:
			return
		}
	}
}

// take empties the inbox; false: there was nothing in it, and the goroutine ends.
func (b *inbox) take() (in inputs, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	in, b.inputs = b.inputs, inputs{}
	ok = in.packets != nil || in.calls != nil || in.expired || in.killed
	b.busy = ok
	return in, ok
}

// close has the inbox take nothing more.
func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over, b.inputs = true, inputs{}
}

// deliver puts a datagram into the inbox, if there is room: for all fragments of a
// message, which come at once, or else those behind would be lost each time.
func (l *lineage) deliver(dg sa.Datagram) bool {
	return l.put(func(b *inbox) bool {
		n, octets := len(b.packets), b.octets+len(dg.Data)
		if n >= inboxMost || n >= inboxLen && octets > inboxOctets {
			return false
		}
		b.packets, b.octets = append(b.packets, dg), octets
		return true
	})
}

// post puts a call into the inbox. It fails, without waiting, when the inbox is
// full or the lineage has ended.
func (l *lineage) post(c call) error {
	err := sa.ErrClosed
	l.put(func(b *inbox) bool {
		if len(b.calls) >= callsLen {
			err = errFull
			return false
		}
		b.calls, err = append(b.calls, c), nil
		return true
	})
	return err
}

// kill ends the lineage without waiting for the peer.
func (l *lineage) kill() {
	l.killOnce.Do(func() {
		close(l.killed)
		l.put(func(b *inbox) bool { b.killed = true; return true })
	})
}
