package spd

import (
	"cmp"
	"errors"
	"hash/maphash"
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
	byID  map[uint32]*Entry
	bySel selectors
}

func newState() *state {
	return &state{map[uint32]*Entry{}, selectors{map[uint64]uint32{}, nil}}
}

func (s *state) clone() *state {
	return &state{maps.Clone(s.byID), selectors{maps.Clone(s.bySel.hashed), maps.Clone(s.bySel.rest)}}
}

// find returns the policy of k, nil if there is none.
func (s *state) find(k selKey) *Entry {
	if id, ok := s.bySel.hashed[k.hash()]; ok {
		if e := s.byID[id]; e.P.Dir == k.dir && e.P.Sel == k.sel {
			return e
		}
	}
	return s.byID[s.bySel.rest[k]] // ID 0 has none
}

// selectors finds the IDs of policies by their keys. Of a hundred thousand keys
// the collector would have a lot to look at, of hashes nothing.
type selectors struct {
	hashed map[uint64]uint32
	rest   map[selKey]uint32 // whose hash another has; hardly ever any
}

func (s *selectors) learn(k selKey, id uint32) {
	h := k.hash()
	if _, taken := s.hashed[h]; !taken {
		s.hashed[h] = id
		return
	}
	if s.rest == nil {
		s.rest = map[selKey]uint32{}
	}
	s.rest[k] = id
}

func (s *selectors) forget(k selKey, id uint32) {
	if h := k.hash(); s.hashed[h] == id {
		delete(s.hashed, h)
	} else {
		delete(s.rest, k)
	}
}

var selSeed = maphash.MakeSeed()

func (k selKey) hash() uint64 { return maphash.Comparable(selSeed, k) }

// Edit is a change of the SPD that readers do not see before Commit.
type Edit struct {
	db    *DB
	token *token
	base  *snapshot
	dirs  [ipsec.Fwd + 1]tree
	dirty [ipsec.Fwd + 1]bool
	state *state
	draft bool
	// by an Edit that is no draft to the shared state, too
	done []Change
	// remotes that were touched; true: they were in the divert set before
	touched map[netip.Prefix]bool
}

// Change is a policy that was added or removed, or, with both, replaced by one
// with its direction and selector, which takes its place among equal priorities.
type Change struct{ Added, Removed *Entry }

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
	e.state = d.state.clone()
	return e
}

// Add adds a policy and returns it with its ID; what p refers to belongs to
// the Edit then. ErrExists, ErrInvalid.
func (e *Edit) Add(p *ipsec.Policy, now time.Time) (*Entry, error) {
	if err := check(p.Dir, p.Sel); err != nil {
		return nil, err
	}
	if e.Find(p.Dir, p.Sel) != nil {
		return nil, ErrExists
	}
	e.db.seq++
	n := e.entry(p, e.newID(p.Dir), e.db.seq, now)
	e.put(n)
	e.done = append(e.done, Change{Added: n})
	return n, nil
}

// Update adds a policy or replaces the one with the same direction and
// selector, which gives its ID and its place among equal priorities. old is
// nil if there was none.
func (e *Edit) Update(p *ipsec.Policy, now time.Time) (n, old *Entry, err error) {
	if err := check(p.Dir, p.Sel); err != nil {
		return nil, nil, err
	}
	old = e.Find(p.Dir, p.Sel)
	if old == nil {
		n, err = e.Add(p, now)
		return n, nil, err
	}
	n = e.entry(p, old.P.ID, old.seq, now)
	e.drop(old)
	e.put(n)
	e.done = append(e.done, Change{Added: n, Removed: old})
	return n, old, nil
}

// Delete removes the policy of dir and sel and returns it.
func (e *Edit) Delete(dir ipsec.Direction, sel ipsec.Selector) (*Entry, error) {
	return e.remove(e.Find(dir, sel))
}

// DeleteID removes the policy with this ID and returns it.
func (e *Edit) DeleteID(id uint32) (*Entry, error) { return e.remove(e.state.byID[id]) }

// Flush removes all policies and returns them, in order.
func (e *Edit) Flush() []*Entry {
	all := e.All()
	for _, o := range all {
		e.touch(o)
	}
	for _, o := range all {
		e.state.forget(o)
		e.done = append(e.done, Change{Removed: o})
		e.dirs[o.P.Dir], e.dirty[o.P.Dir] = tree{}, true
	}
	return all
}

func (e *Edit) remove(o *Entry) (*Entry, error) {
	if o == nil {
		return nil, ErrNotFound
	}
	e.drop(o)
	e.done = append(e.done, Change{Removed: o})
	return o, nil
}

// Get returns the policy with this ID, nil if there is none.
func (e *Edit) Get(id uint32) *Entry { return e.state.byID[id] }

// Find returns the policy of dir and sel, nil if there is none.
func (e *Edit) Find(dir ipsec.Direction, sel ipsec.Selector) *Entry {
	return e.state.find(selKey{dir, sel})
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

// ByAge returns the policies in the order in which they were added, which is that
// among equal priorities.
func (e *Edit) ByAge() []*Entry {
	return slices.SortedFunc(maps.Values(e.state.byID), func(a, b *Entry) int { return cmp.Compare(a.seq, b.seq) })
}

// Changes are those of the Edit, in order.
func (e *Edit) Changes() []Change { return e.done }

// Divert returns what the Edit adds to and takes from the divert set (see
// DB.Remotes), each sorted.
func (e *Edit) Divert() (added, removed []netip.Prefix) {
	a, r := map[netip.Prefix]bool{}, map[netip.Prefix]bool{}
	for p, was := range e.touched {
		switch is := e.diverts(p); {
		case !was && is:
			a[p] = true
		case was && !is:
			r[p] = true
		}
	}
	return sorted(a), sorted(r)
}

// Remotes returns the divert set as it will be after Commit, sorted.
func (e *Edit) Remotes() []netip.Prefix {
	return remotes(&e.dirs)
}

// diverts reports whether p is in the divert set as it will be.
func (e *Edit) diverts(p netip.Prefix) bool {
	return e.dirs[ipsec.In].diverts(p) || e.dirs[ipsec.Fwd].diverts(p)
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
		if u.Added != nil {
			e.state.forget(u.Added)
		}
		if u.Removed != nil {
			e.state.learn(u.Removed)
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
	// There may be hundreds of thousands, most with one request: it is in one
	// piece with them.
	x := new(struct {
		e Entry
		r [1]ipsec.Request
	})
	n := &x.e
	n.P, n.Created, n.seq = *p, now, seq
	n.P.ID = id
	if len(p.Requests) == 1 {
		x.r[0], n.P.Requests = p.Requests[0], x.r[:]
	}
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
		e.touched = map[netip.Prefix]bool{}
	}
	p := n.remote()
	if _, ok := e.touched[p]; !ok {
		e.touched[p] = e.diverts(p)
	}
}

func (s *state) learn(n *Entry) {
	s.byID[n.P.ID] = n
	s.bySel.learn(selKey{n.P.Dir, n.P.Sel}, n.P.ID)
}

func (s *state) forget(o *Entry) {
	delete(s.byID, o.P.ID)
	s.bySel.forget(selKey{o.P.Dir, o.P.Sel}, o.P.ID)
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
