package sa

import (
	"fmt"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
)

// Every concern has a deadline; Deadline is the earliest of them and Tick does
// all that are due. The zero time is never.

func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func (s *SA) due(t time.Time) bool { return !t.IsZero() && !s.now.Before(t) }

// Deadline returns when Tick is wanted; the zero time for never.
func (s *SA) Deadline() time.Time {
	var d time.Time
	if s.done {
		return d
	}
	for _, i := range s.ikes {
		d = earliest(d, i.dropAt)
		d = earliest(d, i.inRequest.until)
		d = earliest(d, i.inResponse.until)
		if i.follow != nil {
			d = earliest(d, i.follow.until)
		}
		if i.req != nil {
			d = earliest(d, i.req.due)
		}
	}
	if s.failed {
		return d
	}
	if s.cur != nil {
		d = earliest(d, s.cur.rekeyAt)
		d = earliest(d, s.cur.expireAt)
	}
	for _, p := range s.delayed {
		d = earliest(d, p.at)
	}
	for _, c := range s.children {
		if c.waits() {
			d = earliest(d, c.heldUntil)
		}
	}
	d = earliest(d, s.keepaliveAt())
	return earliest(d, s.probeAt())
}

// Tick does what is due at now.
func (s *SA) Tick(now time.Time) []Output {
	return s.input(now, func() {
		for _, i := range slices.Clone(s.ikes) {
			s.tickIKE(i)
		}
		if s.failed || s.cur == nil {
			return
		}
		switch i := s.cur; {
		case s.due(i.expireAt):
			s.expire(i)
		case s.due(i.rekeyAt):
			i.rekeyAt = time.Time{}
			s.wantRekey()
		}
		var wait []delayed
		for _, p := range s.delayed {
			if s.due(p.at) {
				s.queue = append(s.queue, p.t)
			} else {
				wait = append(wait, p)
			}
		}
		s.delayed = wait
		for _, c := range s.children {
			if c.waits() && s.due(c.heldUntil) {
				s.use(c)
			}
		}
		if s.due(s.keepaliveAt()) {
			s.lastSent = s.now
			s.emit(Keepalive{s.local, s.remote})
		}
		if s.due(s.probeAt()) {
			(&probe{}).start(s, s.cur)
		}
	})
}

func (s *SA) tickIKE(i *ikeSA) {
	for _, r := range []*reassembly{&i.inRequest, &i.inResponse} {
		if s.due(r.until) {
			r.reset()
		}
	}
	if i.follow != nil && s.due(i.follow.until) {
		s.dropFollow(i)
	}
	switch {
	case s.due(i.dropAt) && i.state < StateEstablished:
		s.fail(ErrExpired, false)
	case s.due(i.dropAt):
		s.gone(i)
	case i.req != nil && s.due(i.req.due):
		s.retransmit(i)
	}
}

// expire ends the lineage at its hard limit; the peer is told if the window
// allows it, without waiting for an answer.
func (s *SA) expire(i *ikeSA) {
	if i.state == StateEstablished && i.req == nil {
		s.farewell(i)
	}
	if s.due(s.certEnd) {
		s.fail(fmt.Errorf("%w: so is that of a certificate", ErrExpired), false)
		return
	}
	s.fail(ErrExpired, false)
}

// keepaliveAt is for whoever is behind a NAT (RFC 7296, 2.23).
func (s *SA) keepaliveAt() time.Time {
	if !s.natLocal || s.rule == nil || s.rule.Keepalive <= 0 || s.local.Port() != s.cfg.NATTPort || s.cur == nil || s.cur.state != StateEstablished {
		return time.Time{}
	}
	return s.lastSent.Add(s.rule.Keepalive)
}

// probeAt is when a silent peer is asked whether it lives (RFC 7296, 2.4). A
// request on its way asks the same.
func (s *SA) probeAt() time.Time {
	i := s.cur
	if i == nil || i.state != StateEstablished || i.active != nil || s.rule.DPD <= 0 {
		return time.Time{}
	}
	return s.heard.Add(s.rule.DPD)
}

// lifetimes sets when i is rekeyed and when it ends.
func (s *SA) lifetimes(i *ikeSA) {
	i.created = s.now
	i.rekeyAt, i.expireAt = time.Time{}, time.Time{}
	if l := s.rule.IKE; l.Hard > 0 {
		i.expireAt = s.now.Add(l.Hard)
		if l.Soft > 0 && l.Soft < l.Hard {
			fuzz := s.jitter(l.Hard / 100 * time.Duration(s.rule.RekeyFuzz))
			i.rekeyAt = s.now.Add(max(l.Soft-fuzz, 0))
		}
	}
	i.expireAt = earliest(i.expireAt, s.certEnd)
}

// CertEnd is when the IKE SA ends since a certificate expires that it rests on; zero:
// none does.
func (s *SA) CertEnd() time.Time { return s.certEnd }

// certsEnd is when the first certificate expires that either side has proven
// itself by: rekeying proves nothing anew (RFC 4301, 4.4.2.1). A peer that takes one
// of ours that is over does not mind.
func (s *SA) certsEnd() (t time.Time) {
	if s.peer.Cert != nil {
		t = s.peer.Cert.Until
	}
	if s.rule.LocalAuth == pad.Cert && s.rule.Own.Valid(s.now) == nil {
		t = earliest(t, s.rule.Own.Until())
	}
	return t
}
