package ike

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"go.uber.org/zap"
)

// Host names in rules are resolved at load, before an operator's Up, and again
// when a negotiation of ours finds no rule or is repeated; then not more often
// than resolveEvery, and without anybody waiting for it.

const (
	resolveWait  = 5 * time.Second // for all names of a configuration
	resolveEvery = 30 * time.Second
	resolvers    = 16 // at a time
)

// names are what is known of host names.
type names struct {
	mu      sync.Mutex // of one resolution at a time
	base    *pad.DB    // as configured
	inForce *pad.DB    // what the rules of the daemon were made from
	known   map[string][]netip.Addr

	next sync.Mutex
	at   time.Time // of the last one that nobody waited for
	busy bool
}

// hostsOf lists the names in a database.
func hostsOf(db *pad.DB) (l []string) {
	for _, r := range db.Rules() {
		for _, h := range r.RemoteHosts {
			if h = strings.ToLower(h); !slices.Contains(l, h) {
				l = append(l, h)
			}
		}
	}
	return l
}

// setRules puts a database in force, with the addresses of its names.
func (d *Daemon) setRules(ctx context.Context, db *pad.DB) {
	n := &d.names
	n.mu.Lock()
	defer n.mu.Unlock()
	n.base = db
	d.lookUp(ctx)
}

// resolve looks the names up again. Rules whose peers have other addresses now
// are for those from now on; IKE SAs that there are stay.
func (d *Daemon) resolve(ctx context.Context) {
	n := &d.names
	n.mu.Lock()
	changed := d.lookUp(ctx)
	n.mu.Unlock()
	if changed {
		d.startRules(d.rules.Load())
		d.wake()
	}
}

// lookUp is resolve with n.mu held. A name that cannot be resolved keeps the
// addresses that it had.
func (d *Daemon) lookUp(ctx context.Context) (changed bool) {
	n := &d.names
	hosts := hostsOf(n.base)
	known := map[string][]netip.Addr{}
	if len(hosts) > 0 && d.cfg.Resolve != nil {
		ctx, cancel := context.WithTimeout(ctx, resolveWait)
		defer cancel()
		var mu sync.Mutex
		var wg sync.WaitGroup
		slots := make(chan struct{}, resolvers)
		for _, h := range hosts {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				as, err := d.cfg.Resolve(ctx, h)
				for i, a := range as {
					as[i] = a.Unmap()
				}
				slices.SortFunc(as, netip.Addr.Compare) // servers give them in turn
				if err != nil {
					d.log.Warn("host name not resolved", zap.String("name", h), zap.Error(err))
					as = n.known[h]
				}
				mu.Lock()
				defer mu.Unlock()
				known[h] = as
			})
		}
		wg.Wait()
	}
	for _, h := range hosts {
		if !slices.Equal(known[h], n.known[h]) {
			changed = true
			d.log.Info("host name", zap.String("name", h), zap.Stringers("addresses", known[h]))
		}
	}
	n.known = known
	if changed || n.base != n.inForce {
		d.rules.Store(n.base.WithHosts(known))
		n.inForce = n.base
	}
	return changed
}

// resolveSoon is resolve without waiting for it.
func (d *Daemon) resolveSoon() {
	n := &d.names
	n.next.Lock()
	defer n.next.Unlock()
	if n.busy || time.Since(n.at) < resolveEvery || d.cfg.Resolve == nil {
		return
	}
	n.busy, n.at = true, time.Now()
	d.wg.Go(func() {
		d.resolve(d.ops)
		n.next.Lock()
		defer n.next.Unlock()
		n.busy = false
	})
}
