package ike

import (
	"net/netip"
	"sync"
	"time"
)

// lines bounds how many lines of the log peers can cause: so many of one source,
// and so many of all. What is left out is counted, and told with the next line
// that is not.
//
// Sources come and go; when there are too many, those that have caused nothing
// of late are forgotten, and if there are none everybody shares one allowance.
type lines struct {
	allowance
	mu    sync.Mutex
	all   rate
	by    map[netip.Prefix]*rate
	swept time.Time // when the old ones were last looked for
	out   uint64    // left out since it was last told
	total uint64
}

// rate is a bucket of tokens, full at first.
type rate struct {
	left float64
	last time.Time
}

// allowance is how many lines a second there may be, and how many at once.
type allowance struct{ rate, depth, allRate, allDepth float64 }

var (
	ofStrangers = allowance{10, 60, 200, 2000}
	ofPeers     = allowance{50, 1000, 2000, 20000} // authenticated; many may be behind one NAT
)

const (
	maxSources = 4096
	sweepEvery = time.Second
)

// allow takes a token out of the bucket, which holds depth and gets perSecond more; false:
// there is none.
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
	if !r.allow(now, l.rate, l.depth) || !l.all.allow(now, l.allRate, l.allDepth) {
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
	// A look at all of them for each line would be an attack of its own.
	if len(l.by) >= maxSources && now.Sub(l.swept) >= sweepEvery {
		l.swept = now
		for s, r := range l.by {
			if now.Sub(r.last).Seconds()*l.rate >= l.depth {
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

func (l *lines) leftOut() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}
