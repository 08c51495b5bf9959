package ike

import (
	"crypto/rand"
	"io"
	"net/netip"
	"sync"
	"time"
)

// budget counts half-open IKE SAs: those that a stranger began and has not yet
// proven itself in (RFC 7296, 2.6). Whoever brought a cookie is at the address
// that it sends from and has a share of its own: messages in its name, which
// anybody can send, do not shut it out.
type budget struct {
	limits Limits
	mu     sync.Mutex
	total  int
	by     map[origin]int
}

// origin is who began a half-open IKE SA.
type origin struct {
	source netip.Prefix
	cookie bool // and is really there
}

// originOf says what counts as one: an IPv6 host has a whole /64 to itself.
func originOf(a netip.Addr, cookie bool) origin {
	bits := 32
	if !a.Is4() {
		bits = 64
	}
	p, _ := a.WithZone("").Prefix(bits)
	return origin{p, cookie}
}

// needCookie reports whether a cookie is demanded from a now.
func (b *budget) needCookie(a netip.Addr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limits.AlwaysCookie || b.total >= b.limits.CookieThreshold || b.by[originOf(a, false)] >= b.limits.HalfOpenPerSource
}

// take counts one more half-open SA from o, if there is room.
func (b *budget) take(o origin) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.total >= b.limits.HalfOpen || b.by[o] >= b.limits.HalfOpenPerSource {
		return false
	}
	if b.by == nil {
		b.by = map[origin]int{}
	}
	b.total++
	b.by[o]++
	return true
}

// give takes one back.
func (b *budget) give(o origin) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total--
	if b.by[o]--; b.by[o] == 0 {
		delete(b.by, o)
	}
}

func (b *budget) setLimits(l Limits) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limits = l
}

// expire is a half-open IKE SA's time.
func (b *budget) expire() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limits.Expire
}

func (b *budget) halfOpen() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total
}

// secrets are those of cookies: the present one, and the one before, whose
// cookies are still out there. Version tells them apart.
type secrets struct {
	mu      sync.Mutex
	rand    io.Reader
	now     [2]cookieSecret
	rotated time.Time
}

type cookieSecret struct {
	version byte
	key     []byte
}

// get returns the secrets in use at now, present one first. Only a secret that
// has been handed out ages; rotation needs no timer.
func (s *secrets) get(now time.Time) ([2]cookieSecret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now[0].key == nil || now.Sub(s.rotated) >= rotateEvery {
		r := s.rand
		if r == nil {
			r = rand.Reader
		}
		key := make([]byte, 32)
		if _, err := io.ReadFull(r, key); err != nil {
			return s.now, err
		}
		// After two periods without use the older one is too old as well.
		old := s.now[0]
		if now.Sub(s.rotated) >= 2*rotateEvery {
			old = cookieSecret{}
		}
		s.now = [2]cookieSecret{{s.now[0].version + 1, key}, old}
		s.rotated = now
	}
	return s.now, nil
}

// bucket limits the unauthenticated answers that strangers can make us send.
type bucket struct {
	mu sync.Mutex
	rate
}

const (
	bucketRate  = 20.0 // a second
	bucketDepth = 40.0
)

func (b *bucket) allow(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rate.allow(now, bucketRate, bucketDepth)
}
