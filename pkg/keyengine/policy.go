package keyengine

import (
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// maxRequests of a policy (Linux: XFRM_MAX_DEPTH).
const maxRequests = 6

// freshReqID is the first reqid that the engine gives by itself; those below
// are for clients (Linux: IPSEC_MANUAL_REQID_MAX).
const freshReqID ipsec.ReqID = 0x4000

// expireRetry is when a policy whose life ends during a transaction is looked
// at again.
const expireRetry = time.Second

// transaction is the one that is open. While it is, changes by others are
// refused with EBUSY, since its commit would undo them.
type transaction struct {
	conn uint64
	edit *spd.Edit
	sas  staged
}

// AddPolicy implements keysock.Backend.
func (e *Engine) AddPolicy(conn uint64, p *ipsec.Policy) (*keysock.PolicyInfo, error) {
	return e.edit(conn, func(ed *spd.Edit) (*spd.Entry, error) {
		q, err := e.policy(p, nil)
		if err != nil {
			return nil, err
		}
		return ed.Add(q, e.o.Now())
	})
}

// UpdatePolicy implements keysock.Backend.
func (e *Engine) UpdatePolicy(conn uint64, p *ipsec.Policy) (*keysock.PolicyInfo, error) {
	return e.edit(conn, func(ed *spd.Edit) (*spd.Entry, error) {
		q, err := e.policy(p, ed.Find(p.Dir, p.Sel))
		if err != nil {
			return nil, err
		}
		n, _, err := ed.Update(q, e.o.Now())
		return n, err
	})
}

// DeletePolicy implements keysock.Backend.
func (e *Engine) DeletePolicy(conn uint64, dir ipsec.Direction, sel ipsec.Selector) (*keysock.PolicyInfo, error) {
	return e.edit(conn, func(ed *spd.Edit) (*spd.Entry, error) { return ed.Delete(dir, sel) })
}

// DeletePolicyID implements keysock.Backend.
func (e *Engine) DeletePolicyID(conn uint64, id uint32) (*keysock.PolicyInfo, error) {
	return e.edit(conn, func(ed *spd.Edit) (*spd.Entry, error) { return ed.DeleteID(id) })
}

// GetPolicy implements keysock.Backend.
func (e *Engine) GetPolicy(conn uint64, id uint32) (*keysock.PolicyInfo, error) {
	n := e.view(conn).Get(id)
	if n == nil {
		return nil, refuse(syscall.ENOENT, "no such policy")
	}
	return policyInfo(n), nil
}

// Policies implements keysock.Backend: by direction, then in order.
func (e *Engine) Policies(conn uint64) []*keysock.PolicyInfo {
	all := e.view(conn).All()
	l := make([]*keysock.PolicyInfo, len(all))
	for i, n := range all {
		l[i] = policyInfo(n)
	}
	return l
}

// Rules are the policies in force, by direction, then in order. They are not to
// be changed.
func (e *Engine) Rules() []*ipsec.Policy { return rules(e.o.SPD.Edit().All()) }

// RulesByAge are the policies in force in the order in which they were added. They
// are not to be changed.
func (e *Engine) RulesByAge() []*ipsec.Policy { return rules(e.o.SPD.Edit().ByAge()) }

func rules(es []*spd.Entry) []*ipsec.Policy {
	l := make([]*ipsec.Policy, len(es))
	for i, n := range es {
		l[i] = &n.P
	}
	return l
}

// FlushPolicies implements keysock.Backend. It is the one change that is not
// refused during another connection's transaction, which it makes void: it
// cannot say EBUSY, and who flushes means it.
func (e *Engine) FlushPolicies(conn uint64) (removed bool) {
	defer e.arm()
	if e.tx != nil && e.tx.conn == conn {
		return len(e.tx.edit.Flush()) > 0
	}
	ed := e.o.SPD.Edit()
	all := ed.Flush()
	if len(all) == 0 || e.commit(ed, true) != nil {
		ed.Abort()
		return false
	}
	e.watchAll()
	return true
}

// Begin implements keysock.Backend.
func (e *Engine) Begin(conn uint64) error {
	if e.tx != nil {
		return refuse(syscall.EBUSY, "a transaction is open")
	}
	e.tx = &transaction{conn: conn, edit: e.o.SPD.Begin()}
	return nil
}

// Commit implements keysock.Backend.
func (e *Engine) Commit(conn uint64) error {
	defer e.arm()
	if e.tx == nil || e.tx.conn != conn {
		return refuse(syscall.EINVAL, "no transaction is open")
	}
	ed, sas := e.tx.edit, &e.tx.sas
	e.tx = nil
	if err := e.stillFits(sas); err != nil {
		ed.Abort()
		sas.wipe()
		return err
	}
	if err := e.commit(ed, true); err != nil {
		sas.wipe()
		return err
	}
	e.commitSAs(sas)
	e.watchAll()
	return nil
}

// Abort implements keysock.Backend.
func (e *Engine) Abort(conn uint64) error {
	if e.tx == nil || e.tx.conn != conn {
		return refuse(syscall.EINVAL, "no transaction is open")
	}
	e.tx.edit.Abort()
	e.tx.sas.wipe()
	e.tx = nil
	return nil
}

// view is the SPD as conn sees it.
func (e *Engine) view(conn uint64) *spd.Edit {
	if e.tx != nil && e.tx.conn == conn {
		return e.tx.edit
	}
	return e.o.SPD.Edit()
}

// edit carries out one change, in conn's transaction or at once.
func (e *Engine) edit(conn uint64, f func(*spd.Edit) (*spd.Entry, error)) (*keysock.PolicyInfo, error) {
	defer e.arm()
	if e.tx != nil {
		if e.tx.conn != conn {
			return nil, refuse(syscall.EBUSY, "a transaction is open")
		}
		n, err := f(e.tx.edit)
		if err != nil {
			return nil, policyError(err)
		}
		return policyInfo(n), nil
	}
	ed := e.o.SPD.Edit()
	n, err := f(ed)
	if err != nil {
		ed.Abort()
		return nil, policyError(err)
	}
	if err := e.commit(ed, false); err != nil {
		return nil, err
	}
	e.watch(n)
	return policyInfo(n), nil
}

// commit puts ed in force between the two changes of the divert set, or
// aborts it. batch: it may be of many policies.
func (e *Engine) commit(ed *spd.Edit, batch bool) error {
	added, removed := ed.Divert()
	if len(added) > 0 && e.o.Divert != nil {
		c := DivertChange{Add: added, Set: func() []netip.Prefix { return union(ed.Remotes(), removed) }}
		if err := e.o.Divert(c); err != nil {
			ed.Abort()
			return wrap(syscall.EIO, "divert", err)
		}
	}
	if err := ed.Commit(); err != nil {
		return policyError(err)
	}
	if len(removed) > 0 && e.o.Divert != nil {
		// Too large a set is safe: the packets come here, find no policy and
		// go on.
		_ = e.o.Divert(DivertChange{Remove: removed, Set: ed.Remotes})
	}
	if e.o.Policies != nil {
		e.o.Policies(ed.Changes(), batch)
	}
	return nil
}

// union joins two sorted lists.
func union(a, b []netip.Prefix) []netip.Prefix {
	l := slices.Concat(a, b)
	slices.SortFunc(l, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	return slices.Compact(l)
}

func policyError(err error) error {
	switch {
	case errors.Is(err, spd.ErrExists):
		return wrap(syscall.EEXIST, "policy", err)
	case errors.Is(err, spd.ErrNotFound):
		return wrap(syscall.ENOENT, "policy", err)
	case errors.Is(err, spd.ErrInvalid):
		return wrap(syscall.EINVAL, "policy", err)
	case errors.Is(err, spd.ErrConflict):
		return wrap(syscall.EBUSY, "policy", err)
	}
	return err
}

func policyInfo(n *spd.Entry) *keysock.PolicyInfo {
	return &keysock.PolicyInfo{Policy: n.P, Added: n.Created, LastUsed: n.LastUsed(), Packets: n.Packets()}
}

// policy returns p checked and complete, in slices of the engine. old is the
// policy that it replaces, nil if there is none.
func (e *Engine) policy(p *ipsec.Policy, old *spd.Entry) (*ipsec.Policy, error) {
	q := *p
	q.Proposals = e.shared(p.Proposals)
	q.Requests = nil
	switch p.Action {
	case ipsec.Discard, ipsec.Bypass:
		if p.Flags != 0 {
			return nil, refuse(syscall.EINVAL, "flags of a policy that does not protect")
		}
		return &q, nil
	case ipsec.Protect:
	default:
		return nil, refuse(syscall.EINVAL, "policy type")
	}
	switch n := len(p.Requests); {
	case n == 0:
		// Linux takes it and passes clear text; nobody can mean that.
		return nil, refuse(syscall.EINVAL, "policy without a request")
	case n > maxRequests:
		return nil, refuse(syscall.ELOOP, "too many requests")
	}
	q.Requests = slices.Clone(p.Requests)
	for i := range q.Requests {
		if err := checkRequest(&q.Requests[i], p.Dir); err != nil {
			return nil, err
		}
	}
	if err := checkBundle(q.Requests); err != nil {
		return nil, err
	}
	if err := checkProposals(&q); err != nil {
		return nil, err
	}
	for i := range q.Requests {
		e.giveReqID(&q.Requests[i], old, i)
	}
	return &q, nil
}

// shared is a copy of l, or that of the policy before if it is the same: most
// policies of a file ask for the same algorithms.
func (e *Engine) shared(l []ipsec.Proposal) []ipsec.Proposal {
	if !slices.Equal(l, e.proposals) {
		e.proposals = slices.Clone(l)
	}
	return e.proposals
}

// checkBundle refuses combinations of transforms that the data path does not
// make. IPComp comes first, since what is encrypted does not compress (RFC
// 3173, 1); in tunnel mode it needs another transform around it, since what it
// does not compress is mere IP in IP, which the data path would have to claim
// from the kernel.
func checkBundle(rs []ipsec.Request) error {
	protect, comp := 0, 0
	for i := range rs {
		if rs[i].Proto != ipsec.IPComp {
			protect++
			continue
		}
		if comp++; i != 0 {
			return refuse(syscall.EPROTONOSUPPORT, "IPComp outside of another transform")
		}
	}
	switch {
	case protect > 2:
		return refuse(syscall.EPROTONOSUPPORT, "more than two transforms besides IPComp")
	case protect == 0 && rs[0].Mode == ipsec.Tunnel:
		return refuse(syscall.EPROTONOSUPPORT, "IPComp alone in tunnel mode")
	}
	return nil
}

// checkProposals makes sure that every alternative has the requests that it is
// about, and every ESP and AH request an alternative. Where alternatives differ
// in their transforms they need requests that can tell their SAs from others.
func checkProposals(p *ipsec.Policy) error {
	if len(p.Proposals) == 0 {
		return nil
	}
	count := map[ipsec.Protocol]int{}
	for i := range p.Requests {
		count[p.Requests[i].Proto]++
	}
	used := map[ipsec.Protocol]bool{}
	for i := range p.Proposals {
		s := p.Proposals[i].Shape
		for _, proto := range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
			if s > ipsec.ShapeAHESP || s.Has(proto) && count[proto] == 0 {
				return refuse(syscall.EINVAL, "an alternative of a shape that the requests do not have")
			}
			used[proto] = used[proto] || s.Has(proto)
		}
	}
	choice := p.Choice()
	for i := range p.Requests {
		r, first := &p.Requests[i], &p.Requests[0]
		switch {
		case r.Proto != ipsec.IPComp && !used[r.Proto]:
			return refuse(syscall.EINVAL, "a request that no alternative has")
		case !choice:
		case r.Proto == ipsec.IPComp || count[r.Proto] > 1 || r.Level != ipsec.LevelUnique:
			return refuse(syscall.EINVAL, "alternatives of several transforms: want one request for each of ESP and AH, of level unique")
		case r.Mode != first.Mode || r.Src != first.Src || r.Dst != first.Dst:
			return refuse(syscall.EINVAL, "alternatives of several transforms: want requests of one mode and the same end points")
		}
	}
	return nil
}

func checkRequest(r *ipsec.Request, dir ipsec.Direction) error {
	if err := supported(r.Proto); err != nil {
		return err
	}
	switch r.Level {
	case ipsec.LevelDefault:
		r.Level = ipsec.LevelRequire
	case ipsec.LevelUse, ipsec.LevelRequire, ipsec.LevelUnique:
	default:
		return refuse(syscall.EINVAL, "level")
	}
	switch r.Mode {
	case ipsec.Transport:
		r.Src, r.Dst = netip.Addr{}, netip.Addr{}
	case ipsec.Tunnel:
		if !r.Src.IsValid() || !r.Dst.IsValid() || r.Src.BitLen() != r.Dst.BitLen() || r.Src.Is4In6() || r.Dst.Is4In6() {
			return refuse(syscall.EINVAL, "tunnel addresses")
		}
		if r.Level == ipsec.LevelUse && dir == ipsec.Out {
			return refuse(syscall.EINVAL, "a tunnel at level use")
		}
	default:
		return refuse(syscall.EINVAL, "mode")
	}
	return nil
}

// giveReqID gives a request of level unique the reqid that it lacks: that of
// the policy it replaces, so that SAs keep serving it, else a fresh one.
func (e *Engine) giveReqID(r *ipsec.Request, old *spd.Entry, i int) {
	if r.ReqID != 0 {
		if r.ReqID >= freshReqID {
			e.explicit[r.ReqID] = true
		}
		return
	}
	if r.Level != ipsec.LevelUnique {
		return
	}
	if old != nil && i < len(old.P.Requests) {
		if o := &old.P.Requests[i]; o.Level == ipsec.LevelUnique && o.ReqID >= freshReqID && o.Proto == r.Proto && o.Mode == r.Mode {
			r.ReqID = o.ReqID
			return
		}
	}
	for e.explicit[e.reqid] || e.reqid < freshReqID {
		e.reqid++
	}
	r.ReqID = e.reqid
	e.reqid++
}

// Lifetimes of policies (Linux: hard limits since creation and since last use).

// watch sets or stops the timer of the policy of n's ID.
func (e *Engine) watch(n *spd.Entry) {
	id := n.P.ID
	if e.o.SPD.Edit().Get(id) != n {
		n = nil
	}
	t := e.polTimer[id]
	if n == nil || n.P.Hard.AddTime <= 0 && n.P.Hard.UseTime <= 0 {
		if t != nil {
			e.timers.stop(t)
			delete(e.polTimer, id)
		}
		return
	}
	if t == nil {
		t = &timer{fire: func(now time.Time) { e.expirePolicy(id, now) }}
		e.polTimer[id] = t
	}
	e.timers.set(t, policyEnd(n))
}

// watchAll is watch for all policies, after many have changed.
func (e *Engine) watchAll() {
	for id, t := range e.polTimer {
		e.timers.stop(t)
		delete(e.polTimer, id)
	}
	for _, n := range e.o.SPD.Edit().All() {
		e.watch(n)
	}
}

func policyEnd(n *spd.Entry) (t time.Time) {
	if n.P.Hard.AddTime > 0 {
		t = n.Created.Add(n.P.Hard.AddTime)
	}
	if n.P.Hard.UseTime > 0 {
		from := n.LastUsed()
		if from.IsZero() {
			from = n.Created
		}
		t = earlier(t, from.Add(n.P.Hard.UseTime))
	}
	return t
}

// expirePolicy removes a policy whose life has ended, and tells.
func (e *Engine) expirePolicy(id uint32, now time.Time) {
	ed := e.o.SPD.Edit()
	n := ed.Get(id)
	if n == nil {
		delete(e.polTimer, id)
		return
	}
	if end := policyEnd(n); end.After(now) {
		e.watch(n) // used meanwhile
		return
	}
	if e.tx != nil {
		e.timers.set(e.polTimer[id], now.Add(expireRetry))
		return
	}
	if _, err := ed.DeleteID(id); err == nil && e.commit(ed, false) == nil { // an Edit of this moment has no conflict, and takes nothing into the divert set
		e.srv.PolicyExpired(policyInfo(n))
	}
	e.watch(n)
}
