package ike

import (
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"go.uber.org/zap"
)

// starter keeps an IKE SA with a peer up that nobody's packet asked for.
type starter struct {
	local, remote netip.Addr
	turns         []path        // of a rule whose peers no policy names: they are tried in turn
	turn          int           // where it is, without end
	keep          bool          // again whenever it is lost (start_action start)
	wait          time.Duration // before the next attempt; 0: the first
	next          time.Time
	lineage       *lineage
}

// connectPeers makes starters for -c.
func (d *Daemon) connectPeers() {
	for _, p := range d.cfg.Connect {
		if local, ok := d.localFor(p); ok {
			d.addStarter(local, p, false)
		} else {
			d.log.Warn("no local address of this family", zap.Stringer("peer", p))
		}
	}
}

// startRules makes starters for the rules with start_action start, in place of
// those of the rules before.
func (d *Daemon) startRules(db *pad.DB) {
	d.mu.Lock()
	d.starters = slices.DeleteFunc(d.starters, func(s *starter) bool { return s.keep })
	d.mu.Unlock()
	for _, r := range db.Rules() {
		if r.StartAction != pad.StartNow {
			continue
		}
		turns := slices.DeleteFunc(d.paths(r), func(p path) bool { return db.Outbound(p.local, p.remote) != r })
		for _, p := range turns {
			d.addStarter(p.local, p.remote, true)
		}
		if len(turns) > 0 {
			d.mu.Lock()
			d.starters = append(d.starters, &starter{local: turns[0].local, remote: turns[0].remote, turns: turns, keep: true})
			d.mu.Unlock()
		}
	}
	d.wake()
}

func (d *Daemon) localFor(peer netip.Addr) (netip.Addr, bool) {
	l := d.ours()
	i := slices.IndexFunc(l, func(a netip.Addr) bool { return a.BitLen() == peer.BitLen() })
	if i < 0 {
		return netip.Addr{}, false
	}
	return l[i], true
}

func (d *Daemon) addStarter(local, remote netip.Addr, keep bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.ContainsFunc(d.starters, func(s *starter) bool { return s.turns == nil && s.local == local && s.remote == remote }) {
		d.starters = append(d.starters, &starter{local: local, remote: remote, keep: keep})
	}
	d.wake()
}

// starterEnded is told that a lineage has failed or ended; d.mu is held.
func (d *Daemon) starterEnded(l *lineage) {
	s := l.starter
	if s == nil {
		return
	}
	s.lineage, l.starter = nil, nil
	if !s.keep {
		d.starters = slices.DeleteFunc(d.starters, func(x *starter) bool { return x == s })
		return
	}
	if s.turns != nil {
		s.turn++
		p := s.turns[s.turn%len(s.turns)]
		s.local, s.remote = p.local, p.remote
		if s.turn%len(s.turns) != 0 {
			s.next = time.Now()
			return
		}
	}
	s.later(time.Now())
}

// later puts off the next attempt, twice as long as the one before.
func (s *starter) later(now time.Time) {
	s.wait = min(max(startWait, 2*s.wait), startMax)
	s.next = now.Add(s.wait)
}

// allServing is serving for every pair of addresses; d.mu is held.
func (d *Daemon) allServing() map[path]*lineage {
	m := map[path]*lineage{}
	for l := range d.lineages {
		if l.over || l.retiring || l.halfOpen {
			continue
		}
		p := path{l.local.Addr(), l.remote.Addr()}
		if o := m[p]; o == nil || l.peer != nil && (o.peer == nil || l.proven > o.proven) {
			m[p] = l
		}
	}
	return m
}

// bare: the IKE SA stands, without any child SA, and none is in work; d.mu is
// held.
func (l *lineage) bare() bool {
	for _, n := range l.has {
		if n > 0 {
			return false
		}
	}
	return l.peer != nil && len(l.pending) == 0
}

// runStarters starts what is due, and returns how long until the next. A peer
// for which no policy is loaded waits for one, but for the peers of a rule that
// no policy names.
func (d *Daemon) runStarters(now time.Time) (wait time.Duration, ok bool) {
	if d.link.Load() == nil || d.mirror.outdated() {
		return 0, false
	}
	d.mu.Lock()
	if len(d.starters) == 0 { // a look at all lineages, for each of them that ends
		d.mu.Unlock()
		return 0, false
	}
	serving := d.allServing()
	idle := func(s *starter) bool {
		if s.turns != nil {
			return s.lineage == nil && !slices.ContainsFunc(s.turns, func(p path) bool { return serving[p] != nil })
		}
		l := serving[path{s.local, s.remote}]
		return s.lineage == nil && l == nil || l != nil && s.keep && l.bare()
	}
	var due []*starter
	for _, s := range d.starters {
		switch {
		case !idle(s):
		case s.next.After(now):
			if w := s.next.Sub(now); !ok || w < wait {
				wait, ok = w, true
			}
		default:
			due = append(due, s)
		}
	}
	d.mu.Unlock()
	for _, s := range due {
		local := d.present(s.local, s.remote)
		d.mu.Lock()
		s.local = local
		d.mu.Unlock()
		p := path{s.local, s.remote}
		rule := d.rules.Load().Outbound(p.local, p.remote)
		if rule == nil || d.isHeldDown(rule.Label) {
			continue
		}
		if len(rule.RemoteHosts) > 0 {
			d.resolveSoon()
		}
		reqs := d.wanted(p)
		if s.turns != nil {
			if slices.ContainsFunc(s.turns, func(p path) bool { return len(d.wanted(p)) > 0 }) {
				continue // those are asked for one by one
			}
			if reqs = d.open(p); len(reqs) == 0 && rule.Childless == pad.ChildlessNo {
				continue
			}
		}
		if len(reqs) == 0 && s.turns == nil {
			continue
		}
		d.log.Info("negotiation at start", zap.Stringer("peer", s.remote), zap.String("rule", rule.Label), zap.Int("child_sas", len(reqs)))
		d.mu.Lock()
		if serving[p] != nil { // and has none: not without end, if the peer grants none
			s.later(now)
			if w := s.wait; !ok || w < wait {
				wait, ok = w, true
			}
		}
		d.mu.Unlock()
		d.ask(s.local, s.remote, rule, s, nil, reqs...)
	}
	return wait, ok
}
