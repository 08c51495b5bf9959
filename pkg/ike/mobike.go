package ike

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"go.uber.org/zap"
)

// MOBIKE (RFC 4555): addresses of this host come and go, and SAs move. Which of
// them an IKE SA may use its rule says; what it does with them the machine.

// Waits.
const (
	addrSettle  = 50 * time.Millisecond // changes come in bursts
	disturbWait = 10 * time.Second      // between looks at paths because of routes
)

// ours are the addresses that may be used now, best first.
func (d *Daemon) ours() []netip.Addr {
	if l := d.addrs.Load(); l != nil {
		return *l
	}
	return d.cfg.Local
}

// conn is the IKE port of an address, nil if it is not open.
func (d *Daemon) conn(a netip.Addr) Conn {
	d.connMu.RLock()
	defer d.connMu.RUnlock()
	return d.conns[a]
}

// noNATT reports that there is no NAT traversal port, and not just not yet.
func (d *Daemon) noNATT() bool {
	k := d.link.Load()
	if k == nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.natt == nil && (k.tried || d.cfg.DialNATT == nil)
}

// has reports whether IKE can be spoken from a.
func (d *Daemon) has(a netip.Addr) bool { return d.conn(a) != nil || slices.Contains(d.ours(), a) }

// ikePort is conn, which opens the port of an address that has come when something is
// to be sent from there. Before that it is anybody's.
func (d *Daemon) ikePort(a netip.Addr) (Conn, error) {
	if c := d.conn(a); c != nil {
		return c, nil
	}
	d.connMu.Lock()
	defer d.connMu.Unlock()
	if c := d.conns[a]; c != nil {
		return c, nil
	}
	if d.connsClosed || !slices.Contains(d.ours(), a) {
		return nil, fmt.Errorf("%v is not an address of ours", a)
	}
	c, err := d.cfg.Listen(netip.AddrPortFrom(a, d.cfg.IKEPort))
	if err != nil {
		return nil, err
	}
	d.conns[a] = c
	d.wg.Go(func() {
		if err := d.read(c); err != nil {
			d.log.Warn("address without IKE port", zap.Stringer("local", a), zap.Error(err))
		}
	})
	return c, nil
}

// readAddresses learns which addresses there are, and tells every IKE SA if that is
// news.
func (d *Daemon) readAddresses() {
	if d.cfg.Addrs == nil {
		return
	}
	now := d.cfg.Addrs()
	if len(now) == 0 && d.addrs.Load() == nil {
		return
	}
	was := d.ours()
	d.addrs.Store(&now)
	d.forsake(now)
	if slices.Equal(was, now) {
		return
	}
	d.log.Info("our addresses", zap.Stringers("addresses", now))
	for _, l := range d.snapshot() {
		if err := l.post(func(l *lineage, t time.Time) []sa.Output { return l.sa.SetAddresses(t, now) }); err != nil {
			l.log.Warn("addresses as before", zap.Error(err))
		}
	}
	d.wake()
}

// forsake closes the IKE ports of addresses that are gone, but for the configured ones.
func (d *Daemon) forsake(now []netip.Addr) {
	d.connMu.Lock()
	defer d.connMu.Unlock()
	for a, c := range d.conns {
		if !slices.Contains(now, a) && !d.isLocal(a) {
			delete(d.conns, a)
			c.Close()
		}
	}
}

// disturbed has initiators look whether their paths still work.
func (d *Daemon) disturbed() {
	for _, l := range d.snapshot() {
		l.post(func(l *lineage, t time.Time) []sa.Output { return l.sa.Disturbed(t) }) // if busy, it is looking already
	}
}

// present is local, or, if that is gone, another address of ours by which the
// peer can be asked.
func (d *Daemon) present(local, remote netip.Addr) netip.Addr {
	if slices.Contains(d.ours(), local) {
		return local
	}
	if a := d.localTowards(remote); a.IsValid() {
		return a
	}
	return local
}

// move has SAs go to other places.
func (l *lineage) move(o sa.Moved) (outs []sa.Output) {
	for _, m := range o.SAs {
		err := l.relocate(installed{m.From, m.FromSrc}, m.To, m.Src, func(ctx context.Context, k KeySocket, p *ipsec.SAParams) error {
			p.SAID, p.Src, p.Encap, p.Home = m.To, m.Src, m.Encap, m.Home
			return k.Move(ctx, m.From, p)
		})
		if err != nil {
			l.log.Warn("SA did not move", zap.Stringer("sa", m.From), zap.Stringer("to", m.To), zap.Error(err))
			outs = append(outs, l.sa.ChildLost(time.Now(), m.To, err)...)
		}
	}
	return outs
}

// relocate does with SA i by f what gives it the name to and the source src.
func (l *lineage) relocate(i installed, to ipsec.SAID, src netip.Addr, f func(context.Context, KeySocket, *ipsec.SAParams) error) error {
	if to != i.id || src != i.src {
		l.register(installed{to, src}) // before it is there: an EXPIRE may follow at once
	}
	err := l.d.keys(func(ctx context.Context, k KeySocket) error {
		info, err := k.Get(ctx, i.id, i.src)
		if err != nil {
			return err
		}
		defer info.Wipe()
		return f(ctx, k, &info.SAParams)
	})
	if to != i.id && err != nil {
		l.drop(i) // nobody would find it any more
		return err
	}
	if c, ok := l.children[i.id]; ok {
		delete(l.children, i.id)
		c.src = src
		l.children[to] = c
	}
	if to == i.id {
		return err
	}
	for k := range l.lone {
		if l.lone[k].in == i.id {
			l.lone[k].in = to
		}
	}
	l.d.mu.Lock()
	if l.d.bySA[i.id] == l {
		delete(l.d.bySA, i.id)
	}
	delete(l.sas, i.id)
	l.forgetMove(i.id)
	if l.was == nil {
		l.was = map[ipsec.SAID]ipsec.SAID{}
	}
	l.was[to], l.d.moved[i.id] = i.id, moved{l, to}
	l.d.mu.Unlock()
	l.d.cfg.Journal.remove(i.id)
	return nil
}

// forgetMove forgets where SA id was before it moved; d.mu is held.
func (l *lineage) forgetMove(id ipsec.SAID) {
	if from, ok := l.was[id]; ok {
		delete(l.was, id)
		if l.d.moved[from].l == l {
			delete(l.d.moved, from)
		}
	}
}

// whereabouts is where SA id is now, and the lineage that made it; nil: not one of
// ours.
func (d *Daemon) whereabouts(id ipsec.SAID) (*lineage, ipsec.SAID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.bySA[id]; l != nil {
		return l, id
	}
	m := d.moved[id]
	return m.l, m.to
}
