package ike

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
	"go.uber.org/zap"
)

// Reauthentication (RFC 7296, 2.8.3), where it is time for it, a certificate is about
// to expire, or the peer does not rekey: the initiator makes a new IKE SA from
// scratch with all child SAs, and when they are there deletes the old one
// (make before break); or the other way round. Which of the two is the rule's
// choice. A responder cannot begin; it has told the peer how long its proof counts
// (AUTH_LIFETIME, RFC 4478), and ends the IKE SA then.
//
//	old:  HDR, SK {...}  <-->                      traffic on the old child SAs
//	new:  IKE_SA_INIT, IKE_AUTH without INITIAL_CONTACT, CREATE_CHILD_SA ...
//	                                               traffic on the new ones
//	old:  HDR, SK {D(IKE)}  -->
//	                        <--  HDR, SK {}

const (
	reauthAgainMin = 10 * time.Second // after an attempt that failed
	reauthAgainMax = 5 * time.Minute
	// certMarginMax and certLeast are how long before a certificate expires the IKE
	// SA is made anew at most, and at least: whoever has no other by then is not
	// asked more and more often.
	certMarginMax = time.Hour
	certLeast     = time.Minute
)

var (
	errTooOld = errors.New("the peer's authentication is too old")
	errIdle   = errors.New("idle")
)

// upkeep are the timers of a lineage besides those of the machine. They belong to
// its goroutine.
type upkeep struct {
	reauthAt time.Time // begin reauthentication; zero: not, or under way
	tooOldAt time.Time // end without it
	idleAt   time.Time // look for idle child SAs
	used     map[ipsec.SAID]usage

	reauth *ticket  // waits for the successor; nil: none is under way
	next   *lineage // the successor
}

// usage is what a child SA had passed when it was last seen to be used.
type usage struct {
	packets uint64
	since   time.Time
}

// authenticated sets the timers when the IKE SA begins.
func (l *lineage) authenticated(now time.Time, r *pad.Rule, initiator bool) {
	if r.Reauth > 0 {
		if initiator {
			l.reauthBefore(now, r.Reauth, r.RekeyFuzz)
		} else {
			l.tooOldAt = now.Add(r.Reauth)
		}
	}
	// Perhaps there is a new certificate by then; without one the IKE SA ends with
	// the old.
	if end := l.sa.CertEnd(); initiator && !end.IsZero() {
		left := end.Sub(now)
		if margin := min(left/10, certMarginMax); margin >= certLeast {
			l.reauthBefore(now, left-margin, 0)
		}
	}
	l.setIdle(now, r)
}

func (l *lineage) setIdle(now time.Time, r *pad.Rule) {
	l.idleAt = time.Time{}
	if r.ChildIdle > 0 {
		l.idleAt = now.Add(max(r.ChildIdle/4, time.Second))
	}
}

// reauthBefore has reauthentication begin before d is over.
func (l *lineage) reauthBefore(now time.Time, d time.Duration, fuzz int) {
	early := time.Duration(0)
	if spread := d / 100 * time.Duration(fuzz); spread > 0 {
		early = rand.N(spread)
	}
	at := now.Add(d - early)
	if l.reauthAt.IsZero() || at.Before(l.reauthAt) {
		l.reauthAt = at
	}
}

// authLifetime is what the peer says of how long our proof counts.
func (l *lineage) authLifetime(now time.Time, d time.Duration) {
	fuzz := 0
	if r := l.sa.Rule(); r != nil {
		fuzz = r.RekeyFuzz
	}
	l.log.Info("peer wants to be shown our identity again", zap.Stringer("peer", l.remote), zap.String("rule", l.rule()), zap.Duration("within", d))
	l.reauthBefore(now, d/10*9, fuzz)
}

// notRekeyed is told that the peer has refused to have an SA replaced. Some can only
// have new SAs by a new IKE SA (RFC 7296, 1.3 and 4): without one traffic would end
// with the lifetime.
func (l *lineage) notRekeyed(now time.Time, err error) {
	var p *sa.PeerError
	if l.initiator && errors.As(err, &p) && p.Notify == ikev2.NO_ADDITIONAL_SAS {
		l.reauthBefore(now, 0, 0)
	}
}

// deadline is the earliest of the timers.
func (l *lineage) deadline() (t time.Time) {
	first := func(x time.Time) {
		if !x.IsZero() && (t.IsZero() || x.Before(t)) {
			t = x
		}
	}
	first(l.sa.Deadline())
	first(l.dropAt)
	first(l.reauthAt)
	first(l.tooOldAt)
	first(l.idleAt)
	if len(l.lone) > 0 {
		first(l.lone[0].at)
	}
	return t
}

func due(t, now time.Time) bool { return !t.IsZero() && !now.Before(t) }

// keepUp does what is due at now.
func (l *lineage) keepUp(now time.Time) (outs []sa.Output) {
	switch {
	case due(l.tooOldAt, now):
		l.tooOldAt = time.Time{}
		l.log.Warn("IKE SA ends", zap.Stringer("peer", l.remote), zap.String("rule", l.rule()), zap.Error(errTooOld))
		return l.sa.Delete(now)
	case due(l.reauthAt, now):
		l.reauthAt = time.Time{}
		outs = l.reauthenticate(now)
	}
	if due(l.idleAt, now) {
		outs = append(outs, l.dropIdle(now)...)
	}
	return outs
}

// successors are the requests for what the child SAs of this IKE SA are for.
func (l *lineage) successors() (reqs []sa.ChildRequest) {
	seen := map[acquireKey]bool{}
	for _, c := range l.sa.Status().Children {
		if c.Deleting || c.Policy.Out == nil || !l.d.spd.has(c.Policy.Out.ID) {
			continue
		}
		rs := requestsFor(c.Policy)
		if c.Policy.Out.Flags&ipsec.PolicyPerFlow != 0 && len(c.LocalTS) > 0 && len(c.PeerTS) > 0 {
			ours, theirs := c.LocalTS[0], c.PeerTS[0]
			rs[0].Flow = &ipsec.Flow{Src: ours.Start, Dst: theirs.Start, Proto: ours.Proto, SrcPort: ours.PortLo, DstPort: theirs.PortLo}
		}
		for _, r := range rs {
			if k := keyOf(r); !seen[k] {
				seen[k] = true
				reqs = append(reqs, r)
			}
		}
	}
	return reqs
}

// from is between which addresses to begin anew: those of policies that name both,
// though the IKE SA may have moved away from them, else those in use.
func (l *lineage) from(peer sa.Peer, reqs []sa.ChildRequest) (local, remote netip.Addr) {
	for _, r := range reqs {
		if q := r.Policy.Out.Requests[0]; q.Mode == ipsec.Tunnel && !q.Template() {
			return q.Src, q.Dst
		}
	}
	return peer.Local.Addr(), peer.Remote.Addr()
}

// reauthenticate begins.
func (l *lineage) reauthenticate(now time.Time) []sa.Output {
	d, s := l.d, l.sa.Status()
	rule := d.rules.Load().Rule(l.rule())
	if rule == nil || s.State != sa.StateEstablished || l.reauth != nil {
		return nil
	}
	reqs := l.successors()
	local, remote := l.from(s.Peer, reqs)
	l.log.Info("reauthentication", zap.Stringer("peer", s.Peer.Remote), zap.String("rule", rule.Label), zap.Int("child_sas", len(s.Children)), zap.Bool("break_first", rule.ReauthBreak))
	if rule.ReauthBreak {
		d.mu.Lock()
		l.then = func() { d.ask(local, remote, rule, nil, nil, reqs...) }
		d.mu.Unlock()
		return l.sa.Delete(now)
	}
	t := newTicket()
	t.then = func() {
		l.put(func(b *inbox) bool { b.calls = append(b.calls, (*lineage).succeeded); return true })
	}
	d.mu.Lock()
	l.retiring = true
	n := d.newInitiator(local, remote, rule, nil, t, reqs)
	d.mu.Unlock()
	l.reauth, l.next = t, n
	t.end(nil)
	d.launch(n, false, rule, reqs)
	return nil
}

// succeeded is called when it is decided whether the successor and its child SAs
// came into being.
func (l *lineage) succeeded(now time.Time) []sa.Output {
	err, n := l.reauth.err, l.next
	l.reauth, l.next = nil, nil
	l.d.mu.Lock()
	l.retiring = err == nil
	if s := l.starter; s != nil && err == nil {
		s.lineage, n.starter, l.starter = n, s, nil
	}
	l.d.mu.Unlock()
	if err == nil {
		l.log.Info("reauthenticated; the old IKE SA goes", zap.Stringer("peer", l.remote), zap.String("rule", l.rule()))
		return l.sa.Delete(now)
	}
	again := reauthAgainMin
	if r := l.sa.Rule(); r != nil && r.Reauth > 0 {
		again = min(max(again, r.Reauth/10), reauthAgainMax)
	} else if !l.sa.CertEnd().IsZero() {
		again = certLeast
	}
	l.reauthAt = now.Add(again)
	l.log.Warn("not reauthenticated; the IKE SA stays for now", zap.Stringer("peer", l.remote), zap.String("rule", l.rule()), zap.Duration("again_in", again), zap.Error(err))
	n.end() // what there is of it would only double what stays
	return nil
}

// dropIdle deletes the child SAs that nothing has passed through for long enough,
// in neither direction. The IKE SA stays, and the next packet asks for another.
func (l *lineage) dropIdle(now time.Time) (outs []sa.Output) {
	r := l.sa.Rule()
	if r == nil || r.ChildIdle <= 0 {
		l.idleAt = time.Time{}
		return nil
	}
	l.setIdle(now, r)
	used := map[ipsec.SAID]usage{}
	for in, c := range l.children {
		packets, ok := l.d.packets(in, c.src)
		if !ok {
			continue
		}
		for out, src := range l.outOf(in) {
			n, _ := l.d.packets(out, src)
			packets += n
		}
		u, known := l.used[in]
		switch {
		case !known || u.packets != packets:
			used[in] = usage{packets, now}
		case now.Sub(u.since) >= r.ChildIdle:
			outs = append(outs, l.sa.ChildLost(now, in, errIdle)...)
		default:
			used[in] = u
		}
	}
	l.used = used
	return outs
}

// outOf finds the outbound SA that belongs to an inbound one.
func (l *lineage) outOf(in ipsec.SAID) map[ipsec.SAID]netip.Addr {
	for _, c := range l.sa.Status().Children {
		if c.In != in.SPI || c.Suite.Proto() != in.Proto {
			continue
		}
		l.d.mu.Lock()
		defer l.d.mu.Unlock()
		for id, src := range l.sas {
			if id.Proto == in.Proto && id.SPI == c.Out && id != in {
				return map[ipsec.SAID]netip.Addr{id: src}
			}
		}
	}
	return nil
}

// packets asks missiu what an SA has passed.
func (d *Daemon) packets(id ipsec.SAID, src netip.Addr) (n uint64, ok bool) {
	err := d.keys(func(ctx context.Context, k KeySocket) error {
		i, err := k.Get(ctx, id, src)
		if err == nil {
			n = i.Packets
			i.Wipe()
		}
		return err
	})
	return n, err == nil
}
