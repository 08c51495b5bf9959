// Package apply brings the rules of a policy file into missiu's SPD, and shows
// what is in force. It keeps no state: the policies that loadConfig manages are
// those whose priority lies between ipsecconf.PriorityBase and PriorityLast.
//
// Loading replaces them, in one transaction. A policy that is there already
// stays as it is, with its ID and reqid, so its SAs live on; loading a file
// twice changes nothing. Appending, removing and deleting entries is loading
// what they leave. One that asks for other algorithms, mode or end points
// than before gets a new reqid, and SAs that served no policy but such a one, or
// one that is gone, are deleted. Policies of other programs are not touched.
//
// For loadConfig.
package apply

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"syscall"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/ipseckey"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// Socket is what Load uses of a keysock.Client.
type Socket interface {
	SASocket
	AddPolicies(ctx context.Context, ps []*ipsec.Policy) ([]*ipsec.Policy, error)
	UpdatePolicies(ctx context.Context, ps []*ipsec.Policy) ([]*ipsec.Policy, error)
	DeletePolicyIDs(ctx context.Context, ids []uint32) error
	DumpPolicies(ctx context.Context) ([]*keysock.PolicyInfo, error)
}

var _ Socket = (*keysock.Client)(nil)

// Result counts what a load did to policies, the SAs of them that it deleted,
// and what its commands did to SAs.
type Result struct {
	Added, Changed, Removed, Kept, SAs int
	Manual                             SAResult
	Notes                              []lexer.Message // what was passed over
}

// Mode is what Load does with the contents of a file.
type Mode uint8

// Modes: the entries take the place of those that loadConfig loaded before; go
// behind them, those with a selector that is there passed over; or are taken out
// from among them, where equal ones are.
const (
	Replace Mode = iota
	Append
	Remove
)

type key struct {
	dir ipsec.Direction
	sel ipsec.Selector
}

func keyOf(p *ipsec.Policy) key { return key{p.Dir, p.Sel} }

// managed reports whether loadConfig made p.
func managed(p *ipsec.Policy) bool {
	return ipsecconf.PriorityBase <= p.Priority && p.Priority <= ipsecconf.PriorityLast
}

// load is one transaction.
type load struct {
	s       Socket
	file    string
	current map[key]*ipsec.Policy
	foreign bool // policies of other programs go, too

	outs map[key][]*ipsec.Policy // outbound Protect policies as they will be, by the key of their mirror
	used map[ipsec.ReqID]bool    // reqids after the load
	res  Result
}

// Load brings the contents of a file into force, all or nothing. Errors about an
// entry are lexer.Messages with file and place. When only the removal of SAs
// failed, the Result holds and the error says so.
func Load(ctx context.Context, s Socket, file string, c *ipsecconf.Contents, mode Mode) (Result, error) {
	l := &load{s: s, file: file, foreign: c.FlushPolicies}
	rules := func(current []ipsecconf.Rule) ([]ipsecconf.Rule, error) {
		switch mode {
		case Append:
			return l.appended(current, c.Rules)
		case Remove:
			return l.without(current, c.Rules)
		}
		return c.Rules, nil
	}
	if mode == Remove && (c.FlushPolicies || c.FlushSAs || len(c.SAs) > 0) {
		return Result{}, lexer.Message{File: file, Text: "flush, spdflush and add are no entries that could be removed"}
	}
	return l.run(ctx, rules, ipseckey.FromPolicy(c))
}

// DeleteEntry takes the entry of this number out, which is its place in the file
// that was loaded, from 1, as the listings show it.
func DeleteEntry(ctx context.Context, s Socket, n int) (Result, error) {
	l := &load{s: s}
	return l.run(ctx, func(current []ipsecconf.Rule) ([]ipsecconf.Rule, error) {
		rest := slices.DeleteFunc(current, func(r ipsecconf.Rule) bool { return entryNumber(&r.Policy) == n })
		if len(rest) == len(current) {
			return nil, fmt.Errorf("there is no entry %d", n)
		}
		return rest, nil
	}, nil)
}

// entryNumber of a managed policy.
func entryNumber(p *ipsec.Policy) int { return int(p.Priority-ipsecconf.PriorityBase) + 1 }

// run makes the policies that loadConfig manages those that rules chooses,
// and carries out the commands, in one.
func (l *load) run(ctx context.Context, rules func(current []ipsecconf.Rule) ([]ipsecconf.Rule, error), cs []ipseckey.Command) (Result, error) {
	l.current, l.outs, l.used = map[key]*ipsec.Policy{}, map[key][]*ipsec.Policy{}, map[ipsec.ReqID]bool{}
	if err := begin(ctx, l.s); err != nil {
		return Result{}, err
	}
	gone, err := l.edit(ctx, rules)
	var sas *saPlan
	if err == nil && len(cs) > 0 {
		if sas, err = planSAs(ctx, l.s, l.file, cs, io.Discard); err == nil {
			defer sas.wipe()
			err = sas.place(ctx)
		}
	}
	if err == nil {
		err = wrap("commit", l.s.Commit(ctx))
	} else {
		// The end of the connection would abort as well.
		err = also(err, wrap("abort", l.s.Abort(context.WithoutCancel(ctx))))
	}
	if err != nil {
		return Result{}, err
	}
	if sas != nil {
		l.res.Manual = sas.res
	}
	if l.res.SAs, err = deleteSAs(ctx, l.s, gone); err != nil {
		return l.res, fmt.Errorf("policies are in force, but old SAs could not be deleted: %w", err)
	}
	return l.res, nil
}

// also joins what went wrong while going back to why.
func also(err, more error) error {
	if more == nil {
		return err
	}
	return errors.Join(err, more)
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// edit changes the draft. It returns the reqids that no policy has any more.
func (l *load) edit(ctx context.Context, choose func([]ipsecconf.Rule) ([]ipsecconf.Rule, error)) (gone map[ipsec.ReqID]bool, err error) {
	dump, err := l.s.DumpPolicies(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the policies: %w", err)
	}
	gone = map[ipsec.ReqID]bool{}
	var ours []ipsecconf.Rule
	var away []uint32
	for _, i := range dump {
		p := &i.Policy
		mine := managed(p)
		switch {
		case mine:
			ours = append(ours, ipsecconf.Rule{Policy: *p})
		case l.foreign:
			away = append(away, p.ID)
			continue
		}
		l.current[keyOf(p)] = p
		for _, r := range p.Requests {
			if mine {
				gone[r.ReqID] = true
			} else {
				l.used[r.ReqID] = true
			}
		}
	}
	if err := l.s.DeletePolicyIDs(ctx, away); err != nil {
		return nil, fmt.Errorf("removing policies of other programs: %w", err)
	}
	l.res.Removed += len(away)
	slices.SortStableFunc(ours, func(a, b ipsecconf.Rule) int { return cmp.Compare(a.Policy.Priority, b.Policy.Priority) })
	rules, err := choose(ours)
	if err != nil {
		return nil, err
	}
	// Outbound policies first: their mirrors take over the reqids.
	for _, out := range []bool{true, false} {
		if err := l.putAll(ctx, rules, out); err != nil {
			return nil, err
		}
	}
	away = nil
	for _, i := range dump {
		if p := &i.Policy; l.current[keyOf(p)] == p && managed(p) {
			away = append(away, p.ID)
		}
	}
	if err := l.s.DeletePolicyIDs(ctx, away); err != nil {
		return nil, fmt.Errorf("removing policies: %w", err)
	}
	l.res.Removed += len(away)
	for id := range l.used {
		delete(gone, id)
	}
	delete(gone, 0)
	return gone, nil
}

// appended puts rules behind those that are there.
func (l *load) appended(current, rules []ipsecconf.Rule) ([]ipsecconf.Rule, error) {
	all := ipsecconf.WithoutForward(current)
	have := make(map[key]bool, len(all))
	next := uint32(ipsecconf.PriorityBase)
	for i := range all {
		p := &all[i].Policy
		have[keyOf(p)], next = true, max(next, p.Priority+1)
	}
	for _, r := range ipsecconf.WithoutForward(rules) {
		switch {
		case have[keyOf(&r.Policy)] && r.Closes: // the tunnel has it from entries before
			continue
		case have[keyOf(&r.Policy)]:
			l.note(&r, "%v packets of this entry have one already; passed over", r.Policy.Dir)
			continue
		case uint64(r.Policy.Priority-ipsecconf.PriorityBase)+uint64(next) > ipsecconf.PriorityLast:
			return nil, l.message(&r, "no numbers are left for entries; load them all anew with -f")
		}
		r.Policy.Priority += next - ipsecconf.PriorityBase
		all = append(all, r)
	}
	return ipsecconf.WithForward(all), nil
}

// without takes rules out of those that are there.
func (l *load) without(current, rules []ipsecconf.Rule) ([]ipsecconf.Rule, error) {
	all := ipsecconf.WithoutForward(current)
	place := make(map[key]int, len(all))
	for i := range all {
		place[keyOf(&all[i].Policy)] = i
	}
	gone := make([]bool, len(all))
	var closing []int
	for _, r := range ipsecconf.WithoutForward(rules) {
		i, ok := place[keyOf(&r.Policy)]
		if r.Closes {
			if ok && sameTransform(&all[i].Policy, &r.Policy) {
				closing = append(closing, i)
			}
			continue
		}
		if !ok || !sameTransform(&all[i].Policy, &r.Policy) {
			return nil, l.message(&r, "no entry in force is equal to this one, %v", r.Policy.Dir)
		}
		gone[i] = true
	}
	// What closes a tunnel goes with its last entry.
	tunnels := map[[2]netip.Prefix]bool{}
	for i := range all {
		for _, r := range all[i].Policy.Requests {
			if !gone[i] && r.Mode == ipsec.Tunnel {
				tunnels[[2]netip.Prefix{netip.PrefixFrom(r.Src, r.Src.BitLen()), netip.PrefixFrom(r.Dst, r.Dst.BitLen())}] = true
			}
		}
	}
	for _, i := range closing {
		s := all[i].Policy.Sel
		gone[i] = !tunnels[[2]netip.Prefix{s.Src, s.Dst}] && !tunnels[[2]netip.Prefix{s.Dst, s.Src}]
	}
	var rest []ipsecconf.Rule
	for i := range all {
		if !gone[i] {
			rest = append(rest, all[i])
		}
	}
	return ipsecconf.WithForward(rest), nil
}

// note tells of an entry once.
func (l *load) note(r *ipsecconf.Rule, format string, a ...any) {
	m := lexer.Message{File: l.file, Pos: r.Pos, Warning: true, Text: fmt.Sprintf(format, a...)}
	if len(l.res.Notes) < maxNotes && !slices.Contains(l.res.Notes, m) {
		l.res.Notes = append(l.res.Notes, m)
	}
}

const maxNotes = 100

// putAll puts the outbound rules, or the others. What is there already costs no
// request.
func (l *load) putAll(ctx context.Context, rules []ipsecconf.Rule, out bool) error {
	var b batch
	for i := range rules {
		if r := &rules[i]; (r.Policy.Dir == ipsec.Out) == out {
			if err := l.put(&b, r); err != nil {
				return err
			}
		}
	}
	if err := l.s.DeletePolicyIDs(ctx, b.delete); err != nil {
		return fmt.Errorf("removing policies: %w", err)
	}
	for _, x := range []struct {
		rules []*ipsecconf.Rule
		ps    []*ipsec.Policy
		f     func(context.Context, []*ipsec.Policy) ([]*ipsec.Policy, error)
	}{{b.addRules, b.add, l.s.AddPolicies}, {b.updateRules, b.update, l.s.UpdatePolicies}} {
		got, err := x.f(ctx, x.ps)
		if be, ok := errors.AsType[*keysock.BatchError](err); ok && ctx.Err() == nil {
			return l.message(x.rules[be.Index], "missiu refused it: %v", be.Err)
		}
		if err != nil {
			return err
		}
		for _, p := range got {
			l.learn(p)
		}
	}
	return nil
}

// batch is what has to be done, in this order.
type batch struct {
	delete                []uint32
	add, update           []*ipsec.Policy
	addRules, updateRules []*ipsecconf.Rule
}

// put says what has to be done about one policy. It takes it out of l.current.
func (l *load) put(b *batch, r *ipsecconf.Rule) error {
	want := r.Policy
	want.Requests = slices.Clone(want.Requests)
	cur := l.current[keyOf(&want)]
	if cur != nil && !managed(cur) {
		return l.message(r, "policy %d of another program (priority %d) has the same selector", cur.ID, cur.Priority)
	}
	delete(l.current, keyOf(&want))
	for i := range want.Requests {
		want.Requests[i].ReqID = 0
	}
	if len(want.Requests) > 0 {
		switch mirror := l.mirror(&want); {
		case mirror != nil:
			setReqID(&want, mirror)
		case cur != nil && sameTransform(cur, &want):
			setReqID(&want, cur)
		}
	}
	switch {
	case cur == nil:
		l.res.Added++
	case cur.Priority == want.Priority && sameTransform(cur, &want) && sameReqIDs(cur, &want):
		l.res.Kept++
		l.learn(cur)
		return nil
	case sameTransform(cur, &want):
		l.res.Changed++
		b.update, b.updateRules = append(b.update, &want), append(b.updateRules, r)
		return nil
	default:
		// A replaced policy would keep its reqid, and thereby SAs of another kind.
		l.res.Changed++
		b.delete = append(b.delete, cur.ID)
	}
	b.add, b.addRules = append(b.add, &want), append(b.addRules, r)
	return nil
}

// learn notes the reqids of a policy that is in the draft.
func (l *load) learn(p *ipsec.Policy) {
	for _, q := range p.Requests {
		l.used[q.ReqID] = true
	}
	if p.Dir == ipsec.Out && len(p.Requests) > 0 {
		k := key{ipsec.In, p.Sel.Reverse()}
		l.outs[k] = append(l.outs[k], p)
	}
}

func (l *load) message(r *ipsecconf.Rule, format string, a ...any) error {
	return lexer.Message{File: l.file, Pos: r.Pos, Text: fmt.Sprintf(format, a...)}
}

// mirror finds the outbound policy whose other side p is.
func (l *load) mirror(p *ipsec.Policy) *ipsec.Policy {
	if p.Dir == ipsec.Out {
		return nil
	}
	for _, o := range l.outs[key{ipsec.In, p.Sel}] {
		if ipsecconf.Mirrors(p, o) {
			return o
		}
	}
	return nil
}

func setReqID(p, from *ipsec.Policy) {
	for i := range p.Requests {
		p.Requests[i].ReqID = from.Requests[i].ReqID
	}
}

// sameTransform reports whether SAs of one policy serve the other.
func sameTransform(a, b *ipsec.Policy) bool {
	return a.Action == b.Action && a.Flags == b.Flags && a.Hard == b.Hard && slices.Equal(a.Proposals, b.Proposals) &&
		slices.EqualFunc(a.Requests, b.Requests, func(x, y ipsec.Request) bool {
			x.ReqID, y.ReqID = 0, 0
			return x == y
		})
}

func sameReqIDs(a, b *ipsec.Policy) bool {
	return slices.EqualFunc(a.Requests, b.Requests, func(x, y ipsec.Request) bool { return x.ReqID == y.ReqID })
}

// deleteSAs deletes the SAs with one of these reqids.
func deleteSAs(ctx context.Context, s Socket, gone map[ipsec.ReqID]bool) (n int, err error) {
	if len(gone) == 0 {
		return 0, nil
	}
	sas, err := s.Dump(ctx, 0)
	for _, i := range sas {
		i.Wipe()
	}
	if err != nil {
		return 0, err
	}
	for _, i := range sas {
		if !gone[i.ReqID] {
			continue
		}
		switch err := s.Delete(ctx, i.SAID, i.Src); {
		case errors.Is(err, syscall.ESRCH): // gone meanwhile
		case err != nil:
			return n, err
		default:
			n++
		}
	}
	return n, nil
}
