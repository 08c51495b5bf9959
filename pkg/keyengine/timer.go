package keyengine

import (
	"container/heap"
	"time"
)

// timer is a deadline and what to do then.
type timer struct {
	when time.Time
	fire func(now time.Time)
	at   int // place in the heap plus 1; 0: not set
}

// timers is a heap, earliest first.
type timers []*timer

func (h timers) Len() int           { return len(h) }
func (h timers) Less(i, j int) bool { return h[i].when.Before(h[j].when) }

func (h timers) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i+1, j+1
}

// Push is for package heap.
func (h *timers) Push(x any) {
	t := x.(*timer)
	*h = append(*h, t)
	t.at = len(*h)
}

// Pop is for package heap.
func (h *timers) Pop() any {
	n := len(*h) - 1
	t := (*h)[n]
	(*h)[n] = nil
	*h = (*h)[:n]
	t.at = 0
	return t
}

// set (re)schedules t; the zero time stops it.
func (h *timers) set(t *timer, when time.Time) {
	if when.IsZero() {
		h.stop(t)
		return
	}
	t.when = when
	if t.at != 0 {
		heap.Fix(h, t.at-1)
		return
	}
	heap.Push(h, t)
}

func (h *timers) stop(t *timer) {
	if t.at != 0 {
		heap.Remove(h, t.at-1)
	}
}

// due takes the first timer off that is due at now, nil if none is.
func (h *timers) due(now time.Time) *timer {
	if len(*h) == 0 || (*h)[0].when.After(now) {
		return nil
	}
	return heap.Pop(h).(*timer)
}

// earliest returns the first deadline, zero if there is none.
func (h timers) earliest() time.Time {
	if len(h) == 0 {
		return time.Time{}
	}
	return h[0].when
}

// earlier returns the earlier of two times of which zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
