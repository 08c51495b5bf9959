package spd

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
)

var (
	// ErrExists: a policy with this direction and selector is there.
	ErrExists = errors.New("policy exists")
	// ErrNotFound: no such policy.
	ErrNotFound = errors.New("no such policy")
	// ErrInvalid: a direction or selector that cannot be.
	ErrInvalid = errors.New("invalid policy")
	// ErrConflict: the SPD has changed since the draft was made, or the Edit has ended.
	ErrConflict = errors.New("policy database changed meanwhile")
)

// selKey identifies a policy for PF_KEY: direction and selector, compared
// exactly, host bits below the prefix included.
type selKey struct {
	dir ipsec.Direction
	sel ipsec.Selector
}

// state is what the writer needs to know beyond the snapshot.
type state struct {
	byID    map[uint32]*Entry
	bySel   map[selKey]*Entry
	remotes map[netip.Prefix]int // how many policies divert this prefix
}

func newState() *state {
	return &state{map[uint32]*Entry{}, map[selKey]*Entry{}, map[netip.Prefix]int{}}
}

// Edit is a change of the SPD that readers do not see before Commit.
type Edit struct {
	db    *DB
	token *token
	base  *snapshot
	dirs  [ipsec.Fwd + 1]tree
	dirty [ipsec.Fwd + 1]bool
	state *state
	draft bool
	// of an Edit that is no draft, to undo what it did to the shared state
	done []undo
	// remotes that were touched, with their counts before
	touched map[netip.Prefix]int
}

type undo struct{ added, removed *Entry }

// Edit returns an Edit for a few changes that follow at once. It has to end,
// with Commit or Abort, before any other Edit of d is used.
func (d *DB) Edit() *Edit {
	s := d.snap.Load()
	return &Edit{db: d, token: new(token), base: s, dirs: s.dirs, state: d.state}
}

// Begin returns an Edit for a transaction: a copy, which may stay open while d
// is read. Committing another Edit makes it void. It costs a few milliseconds
// per 100,000 policies, and is fast for many changes.
func (d *DB) Begin() *Edit {
	e := d.Edit()
	e.draft = true
	e.state = &state{maps.Clone(d.state.byID), maps.Clone(d.state.bySel), maps.Clone(d.state.remotes)}
	return e
}

// Add adds a policy and returns it with its ID; what p refers to belongs to
// the Edit then. ErrExists, ErrInvalid.
func (e *Edit) Add(p *ipsec.Policy, now time.Time) (*Entry, error) {
	if err := check(p.Dir, p.Sel); err != nil {
		return nil, err
	}
	if e.state.bySel[selKey{p.Dir, p.Sel}] != nil {
		return nil, ErrExists
	}
	e.db.seq++
	n := e.entry(p, e.newID(p.Dir), e.db.seq, now)
	e.put(n)
	e.done = append(e.done, undo{added: n})
	return n, nil
}

// Update adds a policy or replaces the one with the same direction and
// selector, which gives its ID and its place among equal priorities. old is
// nil if there was none.
func (e *Edit) Update(p *ipsec.Policy, now time.Time) (n, old *Entry, err error) {
	if err := check(p.Dir, p.Sel); err != nil {
		return nil, nil, err
	}
	old = e.state.bySel[selKey{p.Dir, p.Sel}]
	if old == nil {
		n, err = e.Add(p, now)
		return n, nil, err
	}
	n = e.entry(p, old.P.ID, old.seq, now)
	e.drop(old)
	e.put(n)
	e.done = append(e.done, undo{added: n, removed: old})
	return n, old, nil
}

// Delete removes the policy of dir and sel and returns it.
func (e *Edit) Delete(dir ipsec.Direction, sel ipsec.Selector) (*Entry, error) {
	return e.remove(e.state.bySel[selKey{dir, sel}])
}

// DeleteID removes the policy with this ID and returns it.
func (e *Edit) DeleteID(id uint32) (*Entry, error) { return e.remove(e.state.byID[id]) }

// Flush removes all policies and returns them, in order.
func (e *Edit) Flush() []*Entry {
	all := e.All()
	for _, o := range all {
		e.touch(o)
		e.state.forget(o)
		e.done = append(e.done, undo{removed: o})
		e.dirs[o.P.Dir], e.dirty[o.P.Dir] = tree{}, true
	}
	return all
}

func (e *Edit) remove(o *Entry) (*Entry, error) {
	if o == nil {
		return nil, ErrNotFound
	}
	e.drop(o)
	e.done = append(e.done, undo{removed: o})
	return o, nil
}

// Get returns the policy with this ID, nil if there is none.
func (e *Edit) Get(id uint32) *Entry { return e.state.byID[id] }

// Find returns the policy of dir and sel, nil if there is none.
func (e *Edit) Find(dir ipsec.Direction, sel ipsec.Selector) *Entry {
	return e.state.bySel[selKey{dir, sel}]
}

// Len returns the number of policies.
func (e *Edit) Len() int { return len(e.state.byID) }

// All returns the policies by direction, then in order.
func (e *Edit) All() []*Entry {
	all := slices.Collect(maps.Values(e.state.byID))
	slices.SortFunc(all, func(a, b *Entry) int {
		if a.P.Dir != b.P.Dir {
			return int(a.P.Dir) - int(b.P.Dir)
		}
		return byOrder(a, b)
	})
	return all
}

// Divert returns what the Edit adds to and takes from the divert set (see
// DB.Remotes), each sorted.
func (e *Edit) Divert() (added, removed []netip.Prefix) {
	a, r := map[netip.Prefix]bool{}, map[netip.Prefix]bool{}
	for p, was := range e.touched {
		switch is := e.state.remotes[p]; {
		case was == 0 && is > 0:
			a[p] = true
		case was > 0 && is == 0:
			r[p] = true
		}
	}
	return sorted(a), sorted(r)
}

// Remotes returns the divert set as it will be after Commit, sorted.
func (e *Edit) Remotes() []netip.Prefix {
	m := make(map[netip.Prefix]bool, len(e.state.remotes))
	for p := range e.state.remotes {
		m[p] = true
	}
	return sorted(m)
}

// Commit puts the changes in force and ends the Edit.
func (e *Edit) Commit() error {
	d := e.db
	if d == nil || d.snap.Load() != e.base {
		e.Abort()
		return ErrConflict
	}
	s := &snapshot{gen: e.base.gen + 1, dirs: e.dirs}
	for k := range s.dirs {
		if e.dirty[k] {
			s.dirs[k].seal()
		}
	}
	d.state = e.state
	d.snap.Store(s)
	e.db = nil
	return nil
}

// Abort ends the Edit without effect. After Commit it does nothing.
func (e *Edit) Abort() {
	if e.db == nil {
		return
	}
	e.db = nil
	if e.draft {
		return
	}
	for _, u := range slices.Backward(e.done) {
		if u.added != nil {
			e.state.forget(u.added)
		}
		if u.removed != nil {
			e.state.learn(u.removed)
		}
	}
}

func check(dir ipsec.Direction, s ipsec.Selector) error {
	if dir < ipsec.In || dir > ipsec.Fwd || !s.Src.IsValid() || !s.Dst.IsValid() ||
		s.Src.Addr().BitLen() != s.Dst.Addr().BitLen() || s.Src.Addr().Is4In6() || s.Dst.Addr().Is4In6() {
		return ErrInvalid
	}
	return nil
}

func (e *Edit) entry(p *ipsec.Policy, id uint32, seq uint64, now time.Time) *Entry {
	n := &Entry{P: *p, Created: now, seq: seq, src: p.Sel.Src.Masked(), dst: p.Sel.Dst.Masked()}
	n.P.ID = id
	n.Choices, n.Packed = choices(&n.P), ipsec.Packed(n.P.Requests)
	return n
}

// newID returns a nonzero number that no policy has, whose low three bits are
// the direction less one, as Linux makes them.
func (e *Edit) newID(dir ipsec.Direction) uint32 {
	for {
		e.db.count++
		id := e.db.count<<3 | uint32(dir-1)
		if id>>3 != 0 && e.state.byID[id] == nil && e.db.state.byID[id] == nil {
			return id
		}
	}
}

func (e *Edit) put(n *Entry) {
	e.touch(n)
	e.state.learn(n)
	e.dirty[n.P.Dir] = true
	e.dirs[n.P.Dir].put(e, n)
}

func (e *Edit) drop(o *Entry) {
	e.touch(o)
	e.state.forget(o)
	e.dirty[o.P.Dir] = true
	e.dirs[o.P.Dir].drop(e, o)
}

func (e *Edit) touch(n *Entry) {
	if !n.diverts() {
		return
	}
	if e.touched == nil {
		e.touched = map[netip.Prefix]int{}
	}
	if _, ok := e.touched[n.remote()]; !ok {
		e.touched[n.remote()] = e.state.remotes[n.remote()]
	}
}

func (s *state) learn(n *Entry) {
	s.byID[n.P.ID] = n
	s.bySel[selKey{n.P.Dir, n.P.Sel}] = n
	if n.diverts() {
		s.remotes[n.remote()]++
	}
}

func (s *state) forget(o *Entry) {
	delete(s.byID, o.P.ID)
	delete(s.bySel, selKey{o.P.Dir, o.P.Sel})
	if o.diverts() {
		if s.remotes[o.remote()]--; s.remotes[o.remote()] <= 0 {
			delete(s.remotes, o.remote())
		}
	}
}

func sorted(m map[netip.Prefix]bool) []netip.Prefix {
	l := slices.Collect(maps.Keys(m))
	slices.SortFunc(l, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	return l
}
