package ike

import (
	"errors"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"go.uber.org/zap"
)

// host answers a machine's questions.
type host struct {
	d *Daemon
	l *lineage
}

// Policies waits while the mirror is known not to be true. Where nothing is
// found there may be something that we have not heard of yet.
func (h host) Policies(q sa.Query) []sa.Policy {
	h.awaitMirror()
	ps := h.d.spd.policies(q)
	if len(ps) == 0 && h.d.mirror.missed(time.Now()) {
		h.d.wake()
		h.awaitMirror()
		ps = h.d.spd.policies(q)
	}
	return ps
}

// awaitMirror waits until the mirror is true, but not for ever: the peer is
// answered by what there is then.
func (h host) awaitMirror() {
	current := h.d.mirror.current()
	if current == nil || current == h.l.gaveUp {
		return
	}
	h.l.log.Debug("request waits for the policies", zap.Stringer("peer", h.l.remote))
	limit := time.NewTimer(mirrorWait)
	defer limit.Stop()
	select {
	case <-current:
	case <-limit.C:
		h.l.gaveUp = current
		h.l.log.Warn("request answered by old policies", zap.Stringer("peer", h.l.remote))
	case <-h.l.killed:
	case <-h.d.ops.Done():
	}
}

// Near is sa.Explainer's. It looks through the whole mirror, so it is not to be
// had as often as a peer likes.
func (h host) Near(q sa.Query) (ps []sa.Policy, looked bool) {
	if !h.d.near.allow(time.Now()) {
		return nil, false
	}
	return h.d.spd.near(q.Peer.Local.Addr(), q.Peer.Remote.Addr()), true
}

func (h host) Admit(p sa.Peer) (first bool, err error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	same := h.d.sameIDs(h.l, p)
	alone := len(same) == 0
	if p.Rule.UniqueIDs == pad.UniqueKeep && len(older(h.l, same)) > 0 {
		return false, errors.New("an IKE SA with this identity exists (unique_ids keep)")
	}
	return alone && p.Rule.InitialContact, nil
}
