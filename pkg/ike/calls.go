package ike

import (
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
)

// call is an input of the machine other than a datagram.
type call func(l *lineage, now time.Time) []sa.Output

// callQueue holds calls in their order. Unlike a channel of that length it takes
// no memory while it is empty, as those of most lineages are.
type callQueue struct {
	mu    sync.Mutex
	calls []call
	ready chan struct{} // holds one element while there are calls
}

// put adds c, if there is room.
func (q *callQueue) put(c call) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.calls) >= callsLen {
		return false
	}
	q.calls = append(q.calls, c)
	if len(q.calls) == 1 {
		q.ready <- struct{}{}
	}
	return true
}

// take returns the first call; the caller has taken the element out of ready.
func (q *callQueue) take() call {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := q.calls[0]
	q.calls[0] = nil
	if len(q.calls) == 1 {
		q.calls = nil
		return c
	}
	q.calls = q.calls[1:]
	q.ready <- struct{}{}
	return c
}
