package ike

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/keysock"
	"go.uber.org/zap"
)

// leases are the addresses of pools that peers have (RFC 7296, 2.19). An identity
// has one address of a pool, however many IKE SAs it has, and gets the same one
// again as long as nobody else needed it. The zero value is ready; it is safe for
// concurrent use.
type leases struct {
	mu    sync.Mutex
	of    map[leaseKey]*lease
	at    map[netip.Addr]*lease
	next  map[familyOf]netip.Addr // where to look for a free one
	idle  []*lease                // without an IKE SA, longest ago first
	taken map[familyOf]int
}

type leaseKey struct {
	familyOf
	id pad.ID
}

// familyOf is the part of a pool of one family.
type familyOf struct {
	pool string
	bits int
}

type lease struct {
	key  leaseKey
	addr netip.Addr
	refs int
}

// maxIdle bounds the memory of who had what.
const maxIdle = 1 << 16

// errExhausted: the peer is told INTERNAL_ADDRESS_FAILURE.
var errExhausted = errors.New("no address is left")

// take leases an address of p to id: the one that it has or had, else the one
// that it wants, else the next free one, else the one that was idle for longest.
func (l *leases) take(p *pad.Pool, bits int, id pad.ID, wish netip.Addr) (*lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of == nil {
		l.of, l.at = map[leaseKey]*lease{}, map[netip.Addr]*lease{}
		l.next, l.taken = map[familyOf]netip.Addr{}, map[familyOf]int{}
	}
	k := leaseKey{familyOf{p.Name, bits}, id}
	if x := l.of[k]; x != nil {
		if p.Contains(x.addr) || x.refs > 0 {
			l.busy(x)
			return x, nil
		}
		l.forget(x) // the pool has other addresses now
	}
	a := wish
	if !p.Contains(a) || l.at[a] != nil {
		a = l.free(p, k.familyOf)
	}
	if !a.IsValid() {
		i := slices.IndexFunc(l.idle, func(x *lease) bool { return x.key.familyOf == k.familyOf && p.Contains(x.addr) })
		if i < 0 {
			return nil, fmt.Errorf("pool %q: %w", p.Name, errExhausted)
		}
		a = l.idle[i].addr
		l.forget(l.idle[i])
	}
	x := &lease{key: k, addr: a, refs: 1}
	l.of[k], l.at[a] = x, x
	l.taken[k.familyOf]++
	l.next[k.familyOf] = a.Next()
	return x, nil
}

// free finds an address of a pool that nobody has; invalid if there is none. Each
// that is taken costs one step at most.
func (l *leases) free(p *pad.Pool, f familyOf) netip.Addr {
	from := l.next[f]
	steps := l.taken[f] + 1
	for round := range 2 { // from where we were to the end, then all
		for _, r := range p.Addrs {
			if r.From.BitLen() != f.bits {
				continue
			}
			a := r.From
			if round == 0 {
				if !r.Contains(from) {
					continue
				}
				a = from
			}
			for n := 0; r.Contains(a) && n <= steps; n++ {
				if l.at[a] == nil {
					return a
				}
				a = a.Next()
			}
		}
	}
	return netip.Addr{}
}

func (l *leases) busy(x *lease) {
	if x.refs == 0 {
		l.idle = slices.DeleteFunc(l.idle, func(o *lease) bool { return o == x })
	}
	x.refs++
}

// give takes a lease back; it stays reserved.
func (l *leases) give(x *lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if x.refs--; x.refs > 0 {
		return
	}
	l.idle = append(l.idle, x)
	if len(l.idle) > maxIdle {
		l.forget(l.idle[0])
	}
}

func (l *leases) forget(x *lease) {
	l.idle = slices.DeleteFunc(l.idle, func(o *lease) bool { return o == x })
	delete(l.of, x.key)
	delete(l.at, x.addr)
	l.taken[x.key.familyOf]--
}

// Lease is sa.Leaser's.
func (h host) Lease(p sa.Peer, w sa.Wanted) (l sa.Lease, err error) {
	for _, q := range p.Rule.Pools {
		for _, f := range []struct {
			want bool
			bits int
			wish netip.Addr
			to   *netip.Addr
		}{{w.V4, 32, w.Had4, &l.V4}, {w.V6, 128, w.Had6, &l.V6}} {
			if !f.want || f.to.IsValid() || !q.Has(f.bits) {
				continue
			}
			x, lerr := h.d.leases.take(q, f.bits, p.RemoteID, f.wish)
			if lerr != nil {
				err = lerr
				continue
			}
			h.l.leased = append(h.l.leased, x)
			*f.to = x.addr
		}
		l.DNS, l.Domains, l.Subnets = append(l.DNS, q.DNS...), append(l.Domains, q.Domains...), append(l.Subnets, q.Subnets...)
	}
	switch {
	case len(l.Addrs()) > 0:
		h.l.given = l
		return l, nil
	case err == nil:
		err = errors.New("the rule's pools have no addresses of that family")
	}
	return sa.Lease{}, err
}

// assigned are addresses that peers have given us, by how many IKE SAs: one that
// is made anew before the old one ends has the same. mu is held while missiu is
// told, so that what one gives back is not what another has just been given.
type assigned struct {
	mu    sync.Mutex
	count map[netip.Addr]int
	last  map[string][]netip.Addr // by label of the rule, to be asked for again
}

// had are the addresses that a rule's peer has assigned last.
func (s *assigned) had(label string) []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.last[label])
}

// keep forgets rules that are gone.
func (s *assigned) keep(has func(label string) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.last, func(label string, _ []netip.Addr) bool { return !has(label) })
}

// add calls f, which gives missiu the address.
func (s *assigned) add(label string, a netip.Addr, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count == nil {
		s.count, s.last = map[netip.Addr]int{}, map[string][]netip.Addr{}
	}
	s.count[a]++
	s.last[label] = append(slices.DeleteFunc(s.last[label], func(o netip.Addr) bool { return o.BitLen() == a.BitLen() }), a)
	f()
}

// remove calls f, which takes it away, when nobody has it any more.
func (s *assigned) remove(a netip.Addr, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count[a]--; s.count[a] == 0 {
		delete(s.count, a)
		f()
	}
}

// configured gives missiu's device the addresses that the peer has assigned.
func (l *lineage) configured(c sa.Lease) {
	l.given = c
	l.log.Info("addresses assigned by the peer", zap.String("rule", l.rule()), zap.Stringers("addresses", c.Addrs()), zap.Stringers("dns", c.DNS),
		zap.Strings("domains", c.Domains), zap.Stringers("subnets", c.Subnets))
	for _, a := range c.Addrs() {
		l.inner = append(l.inner, a)
		l.d.assigned.add(l.rule(), a, func() {
			l.d.cfg.Journal.addAddr(a)
			err := l.d.keys(func(ctx context.Context, k KeySocket) error {
				return k.AddAddress(ctx, netip.PrefixFrom(a, a.BitLen()))
			})
			if err != nil {
				l.log.Error("address not given to missiu's interface", zap.Stringer("address", a), zap.Error(err))
			}
		})
	}
	l.dnsUp()
}

// unconfigure gives back what the lineage has of addresses: those that it leased,
// and those that it was assigned.
func (l *lineage) unconfigure() {
	for _, x := range l.leased {
		l.d.leases.give(x)
	}
	l.dnsDown()
	for _, a := range l.inner {
		l.d.assigned.remove(a, func() {
			err := l.d.keys(func(ctx context.Context, k KeySocket) error {
				return k.DeleteAddress(ctx, netip.PrefixFrom(a, a.BitLen()))
			})
			switch {
			case errors.Is(err, errDown), errors.Is(err, keysock.ErrClosed): // gone, if missiu is
				l.d.mu.Lock()
				l.d.staleIPs = append(l.d.staleIPs, a)
				l.d.mu.Unlock()
				return
			case err != nil && !errors.Is(err, syscall.ENOENT):
				l.log.Warn("address not taken from missiu's interface", zap.Stringer("address", a), zap.Error(err))
				return
			}
			l.d.cfg.Journal.removeAddr(a)
		})
	}
	l.leased, l.inner = nil, nil
}
