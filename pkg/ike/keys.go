package ike

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

type event = keysock.Event

func (k *link) close() {
	k.keys.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.over = true
	close(k.ended)
	if k.natt != nil {
		k.natt.Close()
	}
}

// port returns the connection to UDP port 4500; nil if there is none.
func (k *link) port() Conn {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.natt
}

// setPort takes a new connection to UDP port 4500, or nil. It returns false, and
// closes c, when the link has ended.
func (k *link) setPort(c Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tried = true
	if k.over {
		if c != nil {
			c.Close()
		}
		return false
	}
	k.natt = c
	return true
}

// serveNATT keeps a connection to UDP port 4500 for as long as the link lives.
func (d *Daemon) serveNATT(k *link) {
	told := false
	for {
		ctx, cancel := context.WithTimeout(d.ops, opTimeout)
		c, err := d.cfg.DialNATT(ctx)
		cancel()
		if err == nil {
			told = false
			if !k.setPort(c) {
				return
			}
			err = d.read(c)
			c.Close()
			if !k.setPort(nil) {
				return
			}
		}
		k.setPort(nil)
		if !told {
			d.log.Warn("no UDP port 4500: no NAT traversal for now", zap.Error(err))
			told = true
		}
		select {
		case <-d.ops.Done():
			return
		case <-k.ended:
			return
		case <-time.After(redialWait):
		}
	}
}

// keys carries out a PF_KEY request.
func (d *Daemon) keys(f func(context.Context, KeySocket) error) error {
	k := d.link.Load()
	if k == nil {
		return errDown
	}
	ctx, cancel := context.WithTimeout(d.ops, opTimeout)
	defer cancel()
	return f(ctx, k.keys)
}

// firstConnect waits for missiu at start.
func (d *Daemon) firstConnect(ctx context.Context) (<-chan event, error) {
	wait, cancel := context.WithTimeout(ctx, d.cfg.Wait)
	defer cancel()
	for {
		events, err := d.connect(wait, ctx)
		if err == nil {
			return events, nil
		}
		d.log.Debug("waiting for missiu", zap.Error(err))
		select {
		case <-ctx.Done():
			return nil, nil
		case <-wait.Done():
			return nil, errors.Join(ErrNoMissiu, err)
		case <-time.After(min(redialWait, d.cfg.Wait/4)):
		}
	}
}

// connect connects to missiu, registers, and reads the SPD, which may be a large
// one and has a context of its own.
func (d *Daemon) connect(ctx, read context.Context) (<-chan event, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	keys, err := d.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	k := &link{keys: keys, ended: make(chan struct{})}
	has, err := keys.Register(ctx, ipsec.ESP, ipsec.AH)
	if err != nil {
		k.close()
		return nil, err
	}
	d.queues.Store(uint32(has.Queues))
	if err := d.readPolicies(read, keys); err != nil {
		k.close()
		return nil, err
	}
	cancel()
	ctx, cancel = context.WithTimeout(read, opTimeout)
	defer cancel()
	if d.cfg.DialNATT != nil {
		d.wg.Go(func() { d.serveNATT(k) })
	}
	d.removeStale(ctx, keys)
	d.link.Store(k)
	d.initiate()
	return keys.Events(), nil
}

// removeStale removes what could not be removed while missiu was away, if it is
// still there.
func (d *Daemon) removeStale(ctx context.Context, k KeySocket) {
	d.mu.Lock()
	stale, addrs := d.stale, d.staleIPs
	d.stale, d.staleIPs = nil, nil
	d.mu.Unlock()
	for _, i := range stale {
		if err := k.Delete(ctx, i.id, i.src); err != nil && !errors.Is(err, syscall.ESRCH) {
			d.log.Warn("SA not removed", zap.Stringer("sa", i.id), zap.Error(err))
			continue
		}
		d.cfg.Journal.remove(i.id)
	}
	for _, a := range addrs {
		if err := k.DeleteAddress(ctx, netip.PrefixFrom(a, a.BitLen())); err != nil && !errors.Is(err, syscall.ENOENT) {
			d.log.Warn("address not taken from missiu's interface", zap.Stringer("address", a), zap.Error(err))
			continue
		}
		d.cfg.Journal.removeAddr(a)
	}
}

// dropStale is removeStale at the end. If missiu is not there, its SAs are gone
// with it.
func (d *Daemon) dropStale() {
	d.mu.Lock()
	stale, addrs := d.stale, d.staleIPs
	d.mu.Unlock()
	if len(stale)+len(addrs) == 0 || d.ops.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(d.ops, dropGrace)
	defer cancel()
	if k, err := d.cfg.Dial(ctx); err == nil {
		d.removeStale(ctx, k)
		k.Close()
		return
	}
	for _, i := range stale {
		d.cfg.Journal.remove(i.id)
	}
	for _, a := range addrs {
		d.cfg.Journal.removeAddr(a)
	}
}

// readPolicies makes the mirror true.
func (d *Daemon) readPolicies(ctx context.Context, k KeySocket) error {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	start := time.Now()
	d.mirror.reading()
	infos, err := k.DumpPolicies(ctx)
	if err != nil {
		return err
	}
	ps := make([]*ipsec.Policy, len(infos))
	for i, p := range infos {
		ps[i] = &p.Policy
	}
	d.spd.replace(ps)
	d.mu.Lock()
	before := d.initSeen
	d.initSeen = map[uint32]bool{}
	d.mu.Unlock()
	d.learnInit(before, ps...)
	d.mirror.read(time.Now())
	d.log.Debug("policies read", zap.Int("count", len(ps)), zap.Duration("took", time.Since(start)))
	return nil
}

// learnInit notes the policies that want SAs at once and were not known before.
func (d *Daemon) learnInit(before map[uint32]bool, ps ...*ipsec.Policy) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range ps {
		if p.Flags&ipsec.PolicyInit == 0 || p.Dir != ipsec.Out || !negotiable(p) {
			continue
		}
		if !before[p.ID] && !d.initSeen[p.ID] {
			d.toInit = append(d.toInit, p.ID)
		}
		d.initSeen[p.ID] = true
	}
}

// initiate asks for the SAs that policies want at once; a policy whose peer is
// not one address waits for a packet, as does one that fails now.
func (d *Daemon) initiate() {
	d.mu.Lock()
	ids := d.toInit
	d.toInit = nil
	d.mu.Unlock()
	type ends struct{ local, remote netip.Addr }
	reqs := map[ends][]sa.ChildRequest{}
	var order []ends
	for _, id := range ids {
		p, ok := d.spd.outbound(id)
		if !ok {
			continue
		}
		e := ends{}
		if r := p.Out.Requests[0]; r.Mode == ipsec.Tunnel {
			e = ends{r.Src, r.Dst}
			if ipsec.Open(r.Src) {
				e.local = d.localTowards(r.Dst)
			}
		} else if p.Out.Sel.Dst.IsSingleIP() {
			e.remote = p.Out.Sel.Dst.Addr()
			i := slices.IndexFunc(d.cfg.Local, func(a netip.Addr) bool { return a.BitLen() == e.remote.BitLen() && p.Out.Sel.Src.Contains(a) })
			if i >= 0 {
				e.local = d.cfg.Local[i]
			}
		}
		if !d.has(e.local) || !e.remote.IsValid() || e.remote.IsUnspecified() {
			d.log.Info("sa init: left to the first packet", zap.Uint32("policy", id))
			continue
		}
		if reqs[e] == nil {
			order = append(order, e)
		}
		reqs[e] = append(reqs[e], requestsFor(p)...)
	}
	for _, e := range order {
		rule := d.rules.Load().Outbound(e.local, e.remote)
		if rule == nil {
			d.log.Warn("sa init: no rule for this peer", zap.Stringer("src", e.local), zap.Stringer("peer", e.remote))
			continue
		}
		d.log.Info("negotiation at load", zap.Stringer("peer", e.remote), zap.Int("policies", len(reqs[e])))
		d.ask(e.local, e.remote, rule, nil, nil, reqs[e]...)
	}
}

// localTowards is the address of ours by which there is a rule for a peer, for
// a policy that leaves it open; invalid if there is none.
func (d *Daemon) localTowards(remote netip.Addr) netip.Addr {
	for _, a := range d.ours() {
		if a.BitLen() == remote.BitLen() && d.rules.Load().Outbound(a, remote) != nil {
			return a
		}
	}
	return netip.Addr{}
}

// refresh makes the mirror true again, and does what had to wait for that; after
// an error by what there is.
func (d *Daemon) refresh(ctx context.Context) error {
	k := d.link.Load()
	if k == nil {
		return errDown
	}
	err := d.readPolicies(ctx, k.keys)
	if err != nil && ctx.Err() == nil {
		d.log.Warn("policies not read", zap.Error(err))
	}
	if err == nil {
		d.dropUnwanted()
	}
	d.initiate()
	waiting := d.waiting
	d.waiting = nil
	for _, a := range waiting {
		d.acquire(a, true)
	}
	return err
}

// lostMissiu ends what depended on it: a new missiu has none of our SAs, and
// peers must know.
func (d *Daemon) lostMissiu() {
	d.log.Warn("missiu has gone; its SAs are negotiated anew when it is back")
	if k := d.link.Swap(nil); k != nil {
		k.close()
	}
	d.spd.replace(nil)
	d.mirror.reading()
	d.mirror.read(time.Time{}) // what a missiu that is gone had is no matter
	d.waiting = nil
	d.mu.Lock()
	clear(d.initSeen)
	d.mu.Unlock()
	for _, l := range d.snapshot() {
		if l.post((*lineage).delete) != nil {
			l.kill()
		}
	}
}

// removeSA deletes an SA that we made. One that is already gone is no matter.
func (d *Daemon) removeSA(i installed) {
	err := d.keys(func(ctx context.Context, k KeySocket) error { return k.Delete(ctx, i.id, i.src) })
	switch {
	case err == nil, errors.Is(err, syscall.ESRCH):
		d.cfg.Journal.remove(i.id)
	case errors.Is(err, errDown), errors.Is(err, keysock.ErrClosed):
		d.mu.Lock()
		d.stale = append(d.stale, i)
		d.mu.Unlock()
	default:
		d.log.Warn("SA not removed", zap.Stringer("sa", i.id), zap.Error(err))
	}
}

func (d *Daemon) handleEvent(e event) {
	switch e := e.(type) {
	case keysock.Acquire:
		d.acquire(e, false)
	case keysock.Expire:
		d.expired(e)
	case keysock.NewMapping:
		d.toOwner(e.SAID, func(l *lineage, now time.Time) []sa.Output { return l.sa.PeerAt(now, e.New) })
	case keysock.SADeleted:
		d.toOwner(e.SAID, func(l *lineage, now time.Time) []sa.Output { return l.sa.ChildLost(now, e.SAID, errDeleted) })
	case keysock.SAsFlushed:
		d.flushed(e.Proto)
	case keysock.PolicyAdded:
		d.spd.add(&e.Policy)
		d.learnInit(nil, &e.Policy)
		d.initiate()
	case keysock.PolicyDeleted:
		d.spd.delete(e.Policy.ID)
		d.dropUnwanted()
		d.mu.Lock()
		delete(d.initSeen, e.Policy.ID)
		d.mu.Unlock()
	case keysock.PoliciesFlushed:
		d.spd.replace(nil)
		d.dropUnwanted()
	case keysock.PoliciesChanged:
		d.mirror.doubt()
	case keysock.Lost:
		d.log.Warn("events lost", zap.Uint64("count", e.N))
		d.mirror.doubt()
		d.audit()
	}
}

var (
	errDeleted  = errors.New("deleted in missiu")
	errUnwanted = errors.New("its policy is gone")
)

// dropUnwanted deletes the child SAs whose policy is gone: nothing will be sent
// on them, and nobody would ask for what comes in.
func (d *Daemon) dropUnwanted() {
	for _, l := range d.snapshot() {
		d.mu.Lock()
		unwanted := false
		for k, n := range l.has {
			unwanted = unwanted || n > 0 && !d.spd.has(k.policy)
		}
		d.mu.Unlock()
		if !unwanted {
			continue
		}
		err := l.post(func(l *lineage, now time.Time) (outs []sa.Output) {
			for id, c := range l.children {
				if !l.d.spd.has(c.policy) { // still
					outs = append(outs, l.sa.ChildLost(now, id, errUnwanted)...)
				}
			}
			return outs
		})
		if err != nil {
			l.log.Warn("event dropped", zap.Error(err))
		}
	}
}

// expired tells the lineage that made an SA. The SA may move before it is told, or
// have done so before we were.
func (d *Daemon) expired(e keysock.Expire) {
	owner, _ := d.whereabouts(e.SAID)
	if owner == nil {
		return // a manual one, or another daemon's
	}
	err := owner.post(func(l *lineage, now time.Time) []sa.Output {
		if x, id := d.whereabouts(e.SAID); x == l {
			return l.sa.ChildExpired(now, id, e.Hard)
		}
		return nil
	})
	if err != nil {
		owner.log.Warn("event dropped", zap.Stringer("sa", e.SAID), zap.Error(err))
	}
}

// toOwner posts a call to the lineage that made an SA.
func (d *Daemon) toOwner(id ipsec.SAID, c call) {
	d.mu.Lock()
	l := d.bySA[id]
	d.mu.Unlock()
	if l == nil {
		return // a manual one, or another daemon's
	}
	if err := l.post(c); err != nil {
		l.log.Warn("event dropped", zap.Stringer("sa", id), zap.Error(err))
	}
}

// flushed tells every lineage that its SAs of a protocol (0: all) are gone.
func (d *Daemon) flushed(proto ipsec.Protocol) {
	for _, l := range d.snapshot() {
		err := l.post(func(l *lineage, now time.Time) (outs []sa.Output) {
			for id := range l.children {
				if proto == 0 || id.Proto == proto {
					outs = append(outs, l.sa.ChildLost(now, id, errDeleted)...)
				}
			}
			return outs
		})
		if err != nil {
			l.log.Warn("event dropped", zap.Error(err))
		}
	}
}

// audit finds SAs whose end we were not told.
func (d *Daemon) audit() {
	for _, l := range d.snapshot() {
		err := l.post(func(l *lineage, now time.Time) (outs []sa.Output) {
			for id, c := range l.children {
				err := d.keys(func(ctx context.Context, k KeySocket) error {
					i, err := k.Get(ctx, id, c.src)
					if err == nil {
						i.Wipe()
					}
					return err
				})
				if errors.Is(err, syscall.ESRCH) {
					outs = append(outs, l.sa.ChildLost(now, id, errDeleted)...)
				}
			}
			return outs
		})
		if err != nil {
			l.log.Warn("event dropped", zap.Error(err))
		}
	}
}
