package ike

import (
	"net/netip"
	"sync"
	"time"
)

// lines bounds how many lines of the log strangers can cause: so many of one
// source, and so many of all. What is left out is counted, and told with the
// next line that is not.
//
// Sources come and go; when there are too many, those that have caused nothing
// of late are forgotten, and if there are none everybody shares one allowance.
type lines struct {
	mu    sync.Mutex
	all   rate
	by    map[netip.Prefix]*rate
	out   uint64 // left out since it was last told
	total uint64
}

// rate is a bucket of tokens.
type rate struct {
	left float64
	last time.Time
}

// Lines a second, and at once.
const (
	sourceRate, sourceDepth = 10.0, 60.0
	allRate, allDepth       = 200.0, 2000.0
	peerRate, peerDepth     = 20.0, 400.0 // of an authenticated peer
	maxSources              = 4096
)

func (r *rate) allow(now time.Time, perSecond, depth float64) bool {
	if r.last.IsZero() {
		r.left = depth
	} else {
		r.left = min(depth, r.left+perSecond*now.Sub(r.last).Seconds())
	}
	r.last = now
	if r.left < 1 {
		return false
	}
	r.left--
	return true
}

// allow asks for a line about source. left is how many were left out before it.
func (l *lines) allow(source netip.Addr, now time.Time) (left uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.of(originOf(source, false).source, now)
	if !r.allow(now, sourceRate, sourceDepth) || !l.all.allow(now, allRate, allDepth) {
		l.out++
		l.total++
		return 0, false
	}
	left, l.out = l.out, 0
	return left, true
}

// of finds the bucket of a source.
func (l *lines) of(source netip.Prefix, now time.Time) *rate {
	if r := l.by[source]; r != nil {
		return r
	}
	if len(l.by) >= maxSources {
		for s, r := range l.by {
			if now.Sub(r.last).Seconds()*sourceRate >= sourceDepth {
				delete(l.by, s)
			}
		}
	}
	if len(l.by) >= maxSources {
		source = netip.Prefix{}
		if r := l.by[source]; r != nil {
			return r
		}
	}
	if l.by == nil {
		l.by = map[netip.Prefix]*rate{}
	}
	r := &rate{}
	l.by[source] = r
	return r
}

// leaveOut counts a line that an authenticated peer was too quick for.
func (l *lines) leaveOut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out++
	l.total++
}

func (l *lines) leftOut() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}
