package ike

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// A source has its lines, all together have theirs, and what is left out is told.
func TestLines(t *testing.T) {
	l := lines{allowance: ofStrangers}
	now := time.Unix(0, 0)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	count := func(from netip.Addr, n int) (ok int) {
		for range n {
			if _, yes := l.allow(from, now); yes {
				ok++
			}
		}
		return ok
	}
	if got := count(a, 1000); got != int(l.depth) {
		t.Errorf("%d lines at once, want %v", got, l.depth)
	}
	if left, ok := l.allow(b, now); !ok || left != 1000-uint64(l.depth) {
		t.Errorf("another source: %v, %d left out before; want %v", ok, left, 1000-l.depth)
	}
	now = now.Add(time.Second)
	if got := count(a, 1000); got != int(l.rate) {
		t.Errorf("%d lines a second later, want %v", got, l.rate)
	}
	// Sources without number: bounded in lines and in memory.
	from := netip.MustParseAddr("10.0.0.0")
	n := 0
	for range 100000 {
		from = from.Next()
		n += count(from, 1)
	}
	if n > int(l.allDepth) || len(l.by) > maxSources+1 {
		t.Errorf("%d lines, %d sources kept; want at most %v and %d", n, len(l.by), l.allDepth, maxSources+1)
	}
	if got := l.leftOut(); got < 97000 {
		t.Errorf("%d counted", got)
	}
	// Old sources make room.
	now = now.Add(time.Minute)
	count(netip.MustParseAddr("198.51.100.1"), 1)
	if len(l.by) > 10 {
		t.Errorf("%d sources kept after a minute", len(l.by))
	}
}

// A flood of requests that are refused, forged and repeated makes few lines, and
// the number of those that are left out is told.
func TestFloodOfLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t, func(c *Config, _ *missiu) { c.Limits.HalfOpenPerSource, c.Limits.CookieThreshold = 10000, 10000 })
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		request := n.packets()[0].data
		before := b.logs.Len()
		from := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), 500)
		for k := range uint64(3000) {
			m := slices.Clone(request)
			binary.BigEndian.PutUint64(m, 1+k) // another IKE SA
			if k%2 == 0 {
				m[len(m)-144]++ // a proposal, a key or a nonce
			}
			n.send(packet{from, netip.AddrPortFrom(addrB, 500), m})
			synctest.Wait()
		}
		got, debug := 0, 0
		for _, e := range b.logs.All()[before:] {
			if got++; e.Level < 0 {
				debug++
			}
		}
		if got-debug > 100 {
			t.Errorf("%d lines", got-debug)
		}
		if out := b.Report(t.Context()).Counters["lines_left_out"]; out < 2500 {
			t.Errorf("%d lines left out are told", out)
		}
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
}
