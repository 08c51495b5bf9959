package ike

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
)

// What an operator asks for: Up, Down and Rekey of a rule. Each waits for the
// result; to give up waiting does not undo what was begun.

// ticket is somebody who waits for the outcome of several things. The zero of
// *ticket waits for nothing.
type ticket struct {
	mu   sync.Mutex
	left int
	err  error // the first
	done chan struct{}
	then func() // follows; it must not wait; may be nil
}

// newTicket waits for one thing: the end of asking.
func newTicket() *ticket { return &ticket{left: 1, done: make(chan struct{})} }

func (t *ticket) add() {
	if t != nil {
		t.mu.Lock()
		t.left++
		t.mu.Unlock()
	}
}

// end says how one of the things came out.
func (t *ticket) end(err error) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	if t.left--; t.left == 0 {
		close(t.done)
		if t.then != nil {
			t.then()
		}
	}
}

func (t *ticket) wait(ctx context.Context) error {
	t.end(nil)
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func endAll(ts []*ticket, err error) {
	for _, t := range ts {
		t.end(err)
	}
}

// rekeyKey is a child SA by its inbound SPI, or, with 0, the IKE SA.
type rekeyKey ipsec.SPI

// path is a pair of addresses to negotiate between.
type path struct{ local, remote netip.Addr }

// paths lists those of the single addresses of a rule, in its order.
func (d *Daemon) paths(r *pad.Rule) (l []path) {
	for _, rng := range r.Remote {
		if rng.From != rng.To {
			continue
		}
		for _, local := range d.ours() {
			if local.BitLen() == rng.From.BitLen() && r.Covers(local, rng.From) {
				l = append(l, path{local, rng.From})
				break
			}
		}
	}
	return l
}

func (d *Daemon) ruleNamed(label string) (*pad.Rule, error) {
	db := d.rules.Load()
	if r := db.Rule(label); r != nil {
		return r, nil
	}
	var have []string
	for i, r := range db.Rules() {
		if i == 20 {
			have = append(have, "…")
			break
		}
		have = append(have, fmt.Sprintf("%q", r.Label))
	}
	if have == nil {
		return nil, fmt.Errorf("no rule %q; there are none", label)
	}
	return nil, fmt.Errorf("no rule %q; there are %s", label, strings.Join(have, ", "))
}

// Up has the IKE SA of a rule and the child SAs that policy wants of its peers
// made, as far as they are not there, and waits for them. Of several addresses
// those that a policy names as the other end are all needed; of others any one
// will do, and they are tried in turn. Without a policy the IKE SA is made
// without child SAs, if the peer can (RFC 6023).
func (d *Daemon) Up(ctx context.Context, label string) error {
	if _, err := d.ruleNamed(label); err != nil {
		return err
	}
	d.resolve(ctx)
	rule, err := d.ruleNamed(label)
	if err != nil {
		return err
	}
	d.mu.Lock()
	delete(d.heldDown, label)
	d.mu.Unlock()
	if d.link.Load() == nil {
		return errDown
	}
	if truth := d.mirror.current(); truth != nil {
		select {
		case <-truth:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	all := d.paths(rule)
	if len(all) == 0 {
		return fmt.Errorf("rule %q names no single peer that an address of ours can reach: its peers begin", label)
	}
	named, t := false, newTicket()
	for _, p := range all {
		if reqs := d.wanted(p); len(reqs) > 0 {
			named = true
			d.ask(p.local, p.remote, rule, nil, t, d.missing(p, reqs)...)
		}
	}
	if named {
		return t.wait(ctx)
	}
	for _, p := range all {
		t := newTicket()
		d.ask(p.local, p.remote, rule, nil, t, d.missing(p, d.open(p))...)
		if err = t.wait(ctx); err == nil || ctx.Err() != nil {
			return err
		}
		err = fmt.Errorf("%v: %w", p.remote, err)
	}
	return err
}

// wanted is what to ask for between two addresses: what the policies that name
// both want. A policy with SAs for single flows is asked for by packets.
func (d *Daemon) wanted(p path) (reqs []sa.ChildRequest) {
	for _, q := range d.spd.towards(p.local, p.remote) {
		if q.Out.Flags&ipsec.PolicyPerFlow == 0 {
			reqs = append(reqs, requestsFor(q)...)
		}
	}
	return reqs
}

// open is what policies want that leave their peer open.
func (d *Daemon) open(p path) (reqs []sa.ChildRequest) {
	for _, q := range d.spd.open(p.local, p.remote) {
		if q.Out.Flags&ipsec.PolicyPerFlow == 0 {
			reqs = append(reqs, requestsFor(q)...)
		}
	}
	return reqs
}

// missing leaves of reqs those that the IKE SA between two addresses has no child
// SA for.
func (d *Daemon) missing(p path, reqs []sa.ChildRequest) []sa.ChildRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.serving(p.local, p.remote)
	if l == nil {
		return reqs
	}
	return slices.DeleteFunc(reqs, func(r sa.ChildRequest) bool {
		k := keyOf(r)
		return l.has[acquireKey{policy: k.policy, proto: k.proto}] > 0
	})
}

// ofRule lists the lineages of a rule that are not over; d.mu is held.
func (d *Daemon) ofRule(label string) (ls []*lineage) {
	for l := range d.lineages {
		if !l.over && l.label == label {
			ls = append(ls, l)
		}
	}
	return ls
}

// Down deletes the IKE SAs of a rule, with their child SAs, and waits until they
// are gone. What start_action start keeps up stays down until Up or Reload;
// packets and peers can still bring the rule up.
func (d *Daemon) Down(ctx context.Context, label string) error {
	if _, err := d.ruleNamed(label); err != nil {
		return err
	}
	t := newTicket()
	d.mu.Lock()
	d.heldDown[label] = true
	ls := d.ofRule(label)
	for _, l := range ls {
		t.add()
		l.ends = append(l.ends, t)
	}
	d.mu.Unlock()
	for _, l := range ls {
		l.log.Info("deleted by the operator")
		if l.post((*lineage).delete) != nil {
			l.kill()
		}
	}
	return t.wait(ctx)
}

func (d *Daemon) isHeldDown(label string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.heldDown[label]
}

// Rekey replaces the IKE SAs of a rule and their child SAs by new ones, and waits
// for that.
func (d *Daemon) Rekey(ctx context.Context, label string) error {
	if _, err := d.ruleNamed(label); err != nil {
		return err
	}
	d.mu.Lock()
	ls := slices.DeleteFunc(d.ofRule(label), func(l *lineage) bool { return l.peer == nil })
	d.mu.Unlock()
	if len(ls) == 0 {
		return fmt.Errorf("rule %q is not up", label)
	}
	t := newTicket()
	for _, l := range ls {
		t.add()
		if err := l.post(func(l *lineage, now time.Time) []sa.Output { return l.rekey(now, t) }); err != nil {
			t.end(err)
		}
	}
	return t.wait(ctx)
}

// rekey begins what Rekey asked for; t waits for it already, once.
func (l *lineage) rekey(now time.Time, t *ticket) []sa.Output {
	defer t.end(nil)
	want := func(k rekeyKey) {
		t.add()
		l.rekeys[k] = append(l.rekeys[k], t)
	}
	want(0)
	outs := l.sa.Rekey(now)
	spis, more := l.sa.RekeyChildren(now)
	for _, spi := range spis {
		want(rekeyKey(spi))
	}
	return append(outs, more...)
}

func (l *lineage) rekeyed(k rekeyKey, err error) {
	endAll(l.rekeys[k], err)
	delete(l.rekeys, k)
}

// failure is the last reason why a rule did not come up, or went down.
type failure struct {
	why string
	at  time.Time
}

// noteFailure keeps why something of a rule failed; d.mu is held.
func (d *Daemon) noteFailure(label string, err error) {
	if label == "" || errors.Is(err, sa.ErrClosed) || errors.Is(err, sa.ErrPeerDeleted) && d.stopping || d.rules.Load().Rule(label) == nil {
		return
	}
	d.failures[label] = failure{err.Error(), time.Now()}
}
