package ike

import (
	"context"
	"errors"
	"net/netip"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

func (d *Daemon) acquireFailed(seq uint32, errno syscall.Errno) {
	err := d.keys(func(ctx context.Context, k KeySocket) error { return k.AcquireFailed(ctx, seq, errno) })
	if err != nil && !errors.Is(err, errDown) {
		d.log.Debug("failure not reported", zap.Uint32("seq", seq), zap.Error(err))
	}
}

// acquire begins the negotiation that missiu asks for, or reports why not. One
// that comes while the mirror is not true, or for a policy that is not in it,
// waits until the mirror has been read anew, unless it has waited.
func (d *Daemon) acquire(a keysock.Acquire, waited bool) {
	fields := []zap.Field{zap.Uint32("seq", a.Seq), zap.Stringer("src", a.Src), zap.Stringer("peer", a.Dst), zap.Uint32("policy", a.PolicyID), zap.Stringer("proto", a.Proto), zap.Stringer("mode", a.Mode)}
	refuse := func(why string, errno syscall.Errno) {
		d.log.Warn("ACQUIRE: "+why, fields...)
		d.acquireFailed(a.Seq, errno)
	}
	if a.Proto != ipsec.ESP && a.Proto != ipsec.AH && a.Proto != ipsec.IPComp {
		refuse("only ESP and AH are negotiated", syscall.EPROTONOSUPPORT)
		return
	}
	if a.Mode == ipsec.Tunnel && ipsec.Open(a.Src) {
		if a.Src = d.localTowards(a.Dst); !a.Src.IsValid() {
			refuse("no rule for this peer", syscall.EACCES)
			return
		}
	}
	if !d.has(a.Src) {
		refuse("not an address that ike was given (if the route chose it: ip route replace PEER dev TAP src ADDRESS)", syscall.EADDRNOTAVAIL)
		return
	}
	p, ok := d.spd.outbound(a.PolicyID)
	if !waited && (!ok || d.mirror.outdated()) {
		if len(d.waiting) >= deferMax {
			refuse("too many wait for the policies", syscall.ENOBUFS)
			return
		}
		d.mirror.doubt()
		d.waiting = append(d.waiting, a)
		return
	}
	if !ok {
		refuse("no such policy", syscall.ENOENT)
		return
	}
	if a.Proto == ipsec.IPComp {
		if p.Out.Requests[0].Comp == 0 {
			refuse("only ESP and AH are negotiated", syscall.EPROTONOSUPPORT)
			return
		}
		d.log.Debug("ACQUIRE: left to that of ESP", fields...)
		return
	}
	rule := d.rules.Load().Outbound(a.Src, a.Dst)
	if rule == nil {
		d.resolveSoon() // perhaps its name has another address by now
		refuse("no rule for this peer", syscall.EACCES)
		return
	}
	if a.Queue != 0 {
		// It goes beside an SA for any queue, or not at all.
		d.mu.Lock()
		l := d.serving(a.Src, a.Dst)
		d.mu.Unlock()
		if fields = append(fields, zap.Uint16("queue", uint16(a.Queue))); l == nil {
			refuse("no IKE SA with the peer", syscall.ENOENT)
			return
		}
	}
	d.log.Info("ACQUIRE", fields...)
	d.ask(a.Src, a.Dst, rule, nil, nil, sa.ChildRequest{Seq: a.Seq, Policy: p, Proposals: wantedOf(a, p), Flow: a.Flow, Queue: a.Queue})
}

// wantedOf are the alternatives that an ACQUIRE is about: its own, else what the
// policy says of its protocol.
func wantedOf(a keysock.Acquire, p sa.Policy) []ipsec.Proposal {
	if len(a.Proposals) > 0 {
		return a.Proposals
	}
	return aboutProto(p, a.Proto)
}

func aboutProto(p sa.Policy, proto ipsec.Protocol) []ipsec.Proposal {
	l := ipsec.Parts(p.Out.Proposals, proto)
	if len(l) == 0 && proto == ipsec.AH {
		return []ipsec.Proposal{{Shape: ipsec.ShapeAH}}
	}
	return l // none: any algorithms of ESP
}

// requestsFor is what to ask for a policy that has no SA yet, and nobody said
// what it lacks. A packet that needs ESP inside AH needs both. Where it depends
// on the peer which alternative it will be, the rest is asked for when that is
// known: see lineage.rest.
func requestsFor(p sa.Policy) (rs []sa.ChildRequest) {
	if p.Out.Choice() {
		return []sa.ChildRequest{{Policy: p, Proposals: p.Out.Proposals}}
	}
	for _, r := range p.Out.Requests {
		rs = append(rs, sa.ChildRequest{Policy: p, Proposals: aboutProto(p, r.Proto)})
	}
	return rs
}

// keyOf tells what a request wants: a policy of level unique has an SA for each
// flow, one in transport mode an SA for each peer, which the lineage is.
func keyOf(r sa.ChildRequest) acquireKey {
	k := acquireKey{policy: r.Policy.Out.ID, proto: ipsec.ESP, queue: r.Queue}
	if len(r.Proposals) > 0 && !r.Proposals[0].Shape.Has(ipsec.ESP) {
		k.proto = ipsec.AH
	}
	if r.Flow != nil && r.Policy.Out.Requests[0].Level == ipsec.LevelUnique {
		k.flow = *r.Flow
	}
	return k
}

// ask asks for child SAs with a peer: of the IKE SA that is there, or of a new
// one, which is s's if s is not nil. t waits for them, and for the IKE SA.
func (d *Daemon) ask(local, remote netip.Addr, rule *pad.Rule, s *starter, t *ticket, reqs ...sa.ChildRequest) {
	d.mu.Lock()
	if l := d.serving(local, remote); l != nil && d.askOf(l, t, reqs) {
		if t != nil && l.peer == nil {
			t.add()
			l.ups = append(l.ups, t)
		}
		d.mu.Unlock()
		return
	}
	first := true
	for l := range d.lineages {
		first = first && (l.remote.Addr() != remote || l.over)
	}
	l := d.newInitiator(local, remote, rule, s, t, reqs)
	d.mu.Unlock()
	d.launch(l, first, rule, reqs)
}

// newInitiator makes a lineage that will speak first; d.mu is held.
func (d *Daemon) newInitiator(local, remote netip.Addr, rule *pad.Rule, s *starter, t *ticket, reqs []sa.ChildRequest) *lineage {
	l := d.newLineage(netip.AddrPortFrom(local, d.cfg.IKEPort), netip.AddrPortFrom(remote, rule.RemotePort), true)
	l.label = rule.Label
	if t != nil {
		t.add()
		l.ups = append(l.ups, t)
	}
	for _, r := range reqs {
		l.pending[keyOf(r)] = waitFor(r, t)
	}
	if s != nil {
		l.starter, s.lineage = s, l
	}
	return l
}

// launch runs it. first: there is no other IKE SA with the peer.
func (d *Daemon) launch(l *lineage, first bool, rule *pad.Rule, reqs []sa.ChildRequest) {
	l.sa = sa.NewInitiator(l.config(first && rule.InitialContact), rule)
	if !d.start(l, func(l *lineage, now time.Time) []sa.Output { return l.sa.Start(now, reqs...) }) {
		endAll(l.ups, errStopping)
		for _, p := range l.pending {
			p.fail(d, errStopping)
		}
	}
}

// waitFor makes the record of a request that t, if any, waits for.
func waitFor(r sa.ChildRequest, t *ticket) *pendingChild {
	p := &pendingChild{seq: r.Seq}
	if t != nil {
		t.add()
		p.tickets = []*ticket{t}
	}
	return p
}

// serving returns an IKE SA between these addresses that can take a child SA:
// the last that was established, or one that we are making; d.mu is held. Older
// ones may be known to us alone, if the peer has restarted.
func (d *Daemon) serving(local, remote netip.Addr) *lineage {
	var making, last *lineage
	for l := range d.lineages {
		switch {
		case l.local.Addr() != local || l.remote.Addr() != remote || l.over || l.retiring || l.halfOpen:
		case l.peer == nil:
			making = l
		case last == nil || l.proven > last.proven:
			last = l
		}
	}
	if last != nil {
		return last
	}
	return making
}

// askOf posts requests to l, except those that it already works on; d.mu is
// held. It returns false when l takes no more.
func (d *Daemon) askOf(l *lineage, t *ticket, reqs []sa.ChildRequest) bool {
	var fresh []sa.ChildRequest
	for _, r := range reqs {
		if p := l.pending[keyOf(r)]; p != nil {
			p.later = append(p.later, r.Seq)
			if t != nil {
				t.add()
				p.tickets = append(p.tickets, t)
			}
			l.log.Debug("already being negotiated", zap.Uint32("policy", r.Policy.Out.ID))
			continue
		}
		fresh = append(fresh, r)
	}
	if len(fresh) == 0 {
		return true
	}
	err := l.post(func(l *lineage, now time.Time) (outs []sa.Output) {
		for _, r := range fresh {
			outs = append(outs, l.sa.AddChild(now, r)...)
		}
		return outs
	})
	if err != nil {
		return false
	}
	for _, r := range fresh {
		l.pending[keyOf(r)] = waitFor(r, t)
	}
	return true
}
