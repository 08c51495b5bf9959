package ike

import (
	"sync"
	"time"
)

// mirror says whether the mirror of the SPD is true, as far as we know. missiu
// tells of single changes by events, each in full, and of many at once by one
// event that says no more; and events may be lost, which it tells. Then the
// whole SPD is read anew, by Run, and until that is done nothing is answered
// from what we have.
//
// Events that come while it is read are dealt with afterwards, in order, so that
// none is undone by what was read.
type mirror struct {
	mu     sync.Mutex
	truth  chan struct{} // nil: it is true; else closed when it is again
	fresh  bool          // no doubt has come up since the reading under way began
	at     time.Time     // the last reading
	ending bool
}

// doubt says that the mirror is not true.
func (m *mirror) doubt() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.doubted()
}

func (m *mirror) doubted() {
	m.fresh = false
	if m.truth == nil && !m.ending {
		m.truth = make(chan struct{})
	}
}

// missed is told that a request has found nothing. It doubts the mirror and
// returns true if it is worth another look: not when the mirror was in doubt
// anyway, nor when it was read of late, since a peer that asks for what nobody has
// must not have us read all the time.
func (m *mirror) missed(now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.truth != nil || m.at.IsZero() || now.Sub(m.at) < missEvery {
		return false
	}
	m.doubted()
	return true
}

// reading says that what is read from now on is true.
func (m *mirror) reading() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fresh = true
}

// read says that it has been read.
func (m *mirror) read(at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at = at
	if m.fresh {
		m.release()
	}
}

func (m *mirror) release() {
	if m.truth != nil {
		close(m.truth)
		m.truth = nil
	}
}

// current returns nil, or a channel that is closed when the mirror is true.
func (m *mirror) current() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.truth
}

func (m *mirror) outdated() bool { return m.current() != nil }

// end lets go whoever waits: the mirror is not read any more.
func (m *mirror) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ending = true
	m.release()
}
