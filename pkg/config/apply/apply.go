// Package apply brings the rules of a policy file into missiu's SPD, and shows
// what is in force. It keeps no state: the policies that loadConfig manages are
// those whose priority lies between ipsecconf.PriorityBase and PriorityLast.
//
// Loading replaces them, in one transaction. A policy that is there already
// stays as it is, with its ID and reqid, so its SAs live on; loading a file
// twice changes nothing. One that asks for other algorithms, mode or end points
// than before gets a new reqid, and SAs that served no policy but such a one, or
// one that is gone, are deleted. Policies of other programs are not touched.
//
// For loadConfig.
package apply

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// Socket is what Policies uses of a keysock.Client.
type Socket interface {
	Begin(ctx context.Context) error
	Commit(ctx context.Context) error
	Abort(ctx context.Context) error
	AddPolicy(ctx context.Context, p *ipsec.Policy) (*ipsec.Policy, error)
	UpdatePolicy(ctx context.Context, p *ipsec.Policy) (*ipsec.Policy, error)
	DeletePolicyID(ctx context.Context, id uint32) error
	DumpPolicies(ctx context.Context) ([]*keysock.PolicyInfo, error)
	Dump(ctx context.Context, proto ipsec.Protocol) ([]*keysock.SAInfo, error)
	Delete(ctx context.Context, id ipsec.SAID, src netip.Addr) error
}

var _ Socket = (*keysock.Client)(nil)

// Result counts what a load did to policies, and the SAs it deleted.
type Result struct{ Added, Changed, Removed, Kept, SAs int }

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
	outs    map[key][]*ipsec.Policy // outbound Protect policies as they will be, by the key of their mirror
	used    map[ipsec.ReqID]bool    // reqids after the load
	res     Result
}

// Policies makes the policies that loadConfig manages those of rules, all or
// nothing. Errors about a rule are lexer.Messages with file and place. When only
// the removal of SAs failed, the Result holds and the error says so.
func Policies(ctx context.Context, s Socket, file string, rules []ipsecconf.Rule) (Result, error) {
	if err := s.Begin(ctx); err != nil {
		if errors.Is(err, syscall.EBUSY) {
			return Result{}, errors.New("another program is changing the policies; try again")
		}
		return Result{}, fmt.Errorf("begin: %w", err)
	}
	l := &load{
		s: s, file: file,
		current: map[key]*ipsec.Policy{}, outs: map[key][]*ipsec.Policy{}, used: map[ipsec.ReqID]bool{},
	}
	gone, err := l.edit(ctx, rules)
	if err != nil {
		// The end of the connection would abort as well.
		return Result{}, errors.Join(err, wrap("abort", s.Abort(context.WithoutCancel(ctx))))
	}
	if err := s.Commit(ctx); err != nil {
		return Result{}, fmt.Errorf("commit: %w", err)
	}
	if l.res.SAs, err = deleteSAs(ctx, s, gone); err != nil {
		return l.res, fmt.Errorf("policies are in force, but old SAs could not be deleted: %w", err)
	}
	return l.res, nil
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// edit changes the draft. It returns the reqids that no policy has any more.
func (l *load) edit(ctx context.Context, rules []ipsecconf.Rule) (gone map[ipsec.ReqID]bool, err error) {
	dump, err := l.s.DumpPolicies(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the policies: %w", err)
	}
	gone = map[ipsec.ReqID]bool{}
	for _, i := range dump {
		p := &i.Policy
		l.current[keyOf(p)] = p
		for _, r := range p.Requests {
			if managed(p) {
				gone[r.ReqID] = true
			} else {
				l.used[r.ReqID] = true
			}
		}
	}
	// Outbound policies first: their mirrors take over the reqids.
	for _, out := range []bool{true, false} {
		for i := range rules {
			if r := &rules[i]; (r.Policy.Dir == ipsec.Out) == out {
				if err := l.put(ctx, r); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, i := range dump {
		p := &i.Policy
		if l.current[keyOf(p)] == p && managed(p) {
			if err := l.s.DeletePolicyID(ctx, p.ID); err != nil {
				return nil, fmt.Errorf("removing policy %d: %w", p.ID, err)
			}
			l.res.Removed++
		}
	}
	for id := range l.used {
		delete(gone, id)
	}
	delete(gone, 0)
	return gone, nil
}

// put adds or changes one policy, or leaves it. What it took care of is no
// longer in l.current.
func (l *load) put(ctx context.Context, r *ipsecconf.Rule) error {
	want := r.Policy
	want.Requests = slices.Clone(want.Requests)
	cur := l.current[keyOf(&want)]
	if cur != nil && !managed(cur) {
		return l.message(r, "policy %d of another program (priority %d) has the same selector", cur.ID, cur.Priority)
	}
	delete(l.current, keyOf(&want))
	if len(want.Requests) > 0 {
		switch mirror := l.mirror(&want); {
		case mirror != nil:
			setReqID(&want, mirror)
		case cur != nil && sameTransform(cur, &want):
			setReqID(&want, cur)
		}
	}
	var got *ipsec.Policy
	var err error
	switch {
	case cur == nil:
		l.res.Added++
		got, err = l.s.AddPolicy(ctx, &want)
	case cur.Priority == want.Priority && sameTransform(cur, &want) && sameReqIDs(cur, &want):
		l.res.Kept++
		got = cur
	case sameTransform(cur, &want):
		l.res.Changed++
		got, err = l.s.UpdatePolicy(ctx, &want)
	default:
		// A replaced policy would keep its reqid, and thereby SAs of another kind.
		l.res.Changed++
		if err = l.s.DeletePolicyID(ctx, cur.ID); err == nil {
			got, err = l.s.AddPolicy(ctx, &want)
		}
	}
	if err != nil {
		return l.message(r, "missiu refused it: %v", err)
	}
	for _, q := range got.Requests {
		l.used[q.ReqID] = true
	}
	if got.Dir == ipsec.Out && len(got.Requests) > 0 {
		k := key{ipsec.In, got.Sel.Reverse()}
		l.outs[k] = append(l.outs[k], got)
	}
	return nil
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
	return a.Action == b.Action && a.Hard == b.Hard && slices.Equal(a.Proposals, b.Proposals) &&
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
