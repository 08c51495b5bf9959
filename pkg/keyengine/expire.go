package keyengine

import (
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// SA lifetimes by time (PF_KEY: addtime since creation, usetime since first
// use). An SA has one timer, for the earliest moment at which something may be
// due. The data path does not report the first use: while there was none, none
// of the use limits can be reached before one such time from now. Nor does it
// report any other use: an SA that was used meanwhile is idle later than its
// timer said, and one that is idle is looked at, whether it is used again.

// schedule sets the timer of r.
func (e *Engine) schedule(r *record, now time.Time) {
	next := r.limit(r.life.Hard, now)
	if mature := r.sa.State() == sad.Mature; mature || r.idle {
		next = earlier(next, r.limit(r.life.Soft, now))
		if mature {
			next = earlier(next, r.idleAt(now))
		} else {
			every := r.life.Idle.UseTime // what is used is seen before it is idle again
			if every == 0 {
				every = r.life.Idle.AddTime
			}
			next = earlier(next, now.Add(max(time.Second, every/8)))
		}
	}
	switch {
	case r.timer != nil:
		e.timers.set(r.timer, next)
	case !next.IsZero():
		r.timer = &timer{fire: func(now time.Time) { e.expire(r, now) }}
		e.timers.set(r.timer, next)
	}
}

// limit returns when l is reached by time, or may be; zero: never.
func (r *record) limit(l ipsec.Lifetime, now time.Time) (t time.Time) {
	if l.AddTime > 0 {
		t = r.sa.Created().Add(l.AddTime)
	}
	if l.UseTime > 0 {
		from := r.sa.FirstUsed()
		if from.IsZero() {
			from = now
		}
		t = earlier(t, from.Add(l.UseTime))
	}
	return t
}

// idleAt returns when r has not been used for too long, or may have; zero: never.
func (r *record) idleAt(now time.Time) (t time.Time) {
	used, l := r.sa.LastUsed(), r.life.Idle
	if used.IsZero() {
		if l.AddTime > 0 {
			t = r.sa.Created().Add(l.AddTime)
		}
		used = now
	}
	if l.UseTime > 0 {
		t = earlier(t, used.Add(l.UseTime))
	}
	return t
}

// expire looks at the limits of r.
func (e *Engine) expire(r *record, now time.Time) {
	reached := func(l ipsec.Lifetime) bool {
		t := r.limit(l, now)
		return !t.IsZero() && !t.After(now)
	}
	switch {
	case reached(r.life.Hard):
		e.hard(r)
		return
	case reached(r.life.Soft):
		e.soft(r)
	case r.sa.State() == sad.Mature:
		if t := r.idleAt(now); !t.IsZero() && !t.After(now) {
			e.soft(r)
			r.idle = true
		}
	case r.idle:
		if t := r.idleAt(now); t.IsZero() || t.After(now) {
			r.idle = false
			e.o.SAD.SetState(r.sa, sad.Mature)
		}
	}
	e.schedule(r, now)
}

// soft: the SA becomes dying, works on, and a key daemon is told once. One that is
// dying since it was idle gets here once more.
func (e *Engine) soft(r *record) {
	if r.sa.State() != sad.Mature && !r.idle {
		return
	}
	r.idle = false
	e.o.SAD.SetState(r.sa, sad.Dying)
	e.srv.Expire(r.info(), false)
}

// hard: the SA goes. A larval one that nobody completed goes the same way.
func (e *Engine) hard(r *record) {
	e.remove(r)
	e.srv.Expire(r.info(), true)
}

// LimitReached is called by the data path when an SA has reached a soft or is
// beyond a hard limit of packets or octets (sad.SA.Account). Any goroutine.
func (e *Engine) LimitReached(sa *sad.SA, hard bool) {
	if hard && !sa.FirstHard() {
		return
	}
	e.srv.Do(func() {
		r := e.recs[sa.P.SAID]
		if r == nil || r.sa.Counters != sa.Counters {
			return // gone meanwhile
		}
		if hard {
			e.hard(r)
		} else {
			e.soft(r)
			e.schedule(r, e.o.Now())
		}
		e.arm()
	})
}

// NewMapping is called by the data path when an authentic packet of sa, which
// is encapsulated in UDP, came from another address or port of the peer than
// the SA has. The SA does not change; the key daemons are told, once per
// address. Any goroutine.
func (e *Engine) NewMapping(sa *sad.SA, peer netip.AddrPort) {
	if sa.P.Encap == nil {
		return
	}
	e.mu.Lock()
	known := e.recs[sa.P.SAID] == nil || e.mapped[sa.P.SAID] == peer
	if !known {
		e.mapped[sa.P.SAID] = peer
	}
	e.mu.Unlock()
	if known {
		return
	}
	e.srv.Do(func() {
		r := e.recs[sa.P.SAID]
		if r == nil || r.sa.Counters != sa.Counters {
			return
		}
		p := &r.sa.P
		if p.Encap == nil { // it was moved meanwhile
			return
		}
		e.srv.NewMapping(keysock.NewMapping{
			SAID: p.SAID, Seq: r.seq, Mode: p.Mode, ReqID: p.ReqID,
			Old: netip.AddrPortFrom(p.Src, p.Encap.SPort), New: peer,
		})
	})
}
