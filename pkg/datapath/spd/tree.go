package spd

import (
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

const (
	// fewMax is up to how many policies of a direction are tried one by one.
	fewMax = 8
	// splitAt is how many policies of one remote prefix make a trie by local
	// prefix worth its cost.
	splitAt = 16
)

// token marks what an Edit has made and may change in place. It is not the Edit
// itself, which would keep all former snapshots alive.
type token struct{ _ byte }

// tree holds the policies of one direction. It is copied by value; tables and
// groups are shared between copies and changed in place only by the Edit that
// owns them.
type tree struct {
	n     int
	few   []*Entry // all, in order, if they are few
	table *bart.Table[leaf]
	owner *token // who may change table in place
}

// leaf holds the policies of one prefix: one, as most have, or several. It is
// empty if both are nil.
type leaf struct {
	one  *Entry
	many *group
}

// group is the policies of one prefix: in order in list, or, by the local
// prefix, in near.
type group struct {
	list    []*Entry
	near    *bart.Table[leaf]
	n       int
	diverts int // how many of them do
	owner   *token
}

func (t *tree) lookup(i *packet.Info, remote, local netip.Addr) (*Entry, bool) {
	if t.few != nil {
		return first(t.few, i, nil, false)
	}
	var best *Entry
	var amb bool
	for _, l := range t.table.Supernets(netip.PrefixFrom(remote, remote.BitLen())) {
		if l.many == nil || l.many.near == nil {
			best, amb = l.first(i, best, amb)
			continue
		}
		for _, l := range l.many.near.Supernets(netip.PrefixFrom(local, local.BitLen())) {
			best, amb = l.first(i, best, amb)
		}
	}
	return best, amb
}

// first is first of the policies of l, which has no near.
func (l leaf) first(i *packet.Info, best *Entry, amb bool) (*Entry, bool) {
	if l.many != nil {
		return first(l.many.list, i, best, amb)
	}
	if best == nil || !best.before(l.one) {
		if v := l.one.match(i); v != no {
			return l.one, v == maybe
		}
	}
	return best, amb
}

// first returns the first entry of list that matches or may, unless best comes
// before it.
func first(list []*Entry, i *packet.Info, best *Entry, amb bool) (*Entry, bool) {
	for _, e := range list {
		if best != nil && best.before(e) {
			break
		}
		if v := e.match(i); v != no {
			return e, v == maybe
		}
	}
	return best, amb
}

// each calls f for all entries, in no order.
func (t *tree) each(f func(*Entry)) {
	if t.table == nil {
		return
	}
	for _, l := range t.table.All() {
		l.each(f)
	}
}

func (l leaf) each(f func(*Entry)) {
	if l.one != nil {
		f(l.one)
		return
	}
	for _, e := range l.many.list {
		f(e)
	}
	if l.many.near != nil {
		for _, l := range l.many.near.All() {
			l.each(f)
		}
	}
}

// diverts reports whether a policy of the remote prefix p does.
func (t *tree) diverts(p netip.Prefix) bool {
	if t.table == nil {
		return false
	}
	switch l, _ := t.table.Get(p); {
	case l.one != nil:
		return l.one.diverts()
	case l.many != nil:
		return l.many.diverts > 0
	}
	return false
}

// put adds e for ed.
func (t *tree) put(ed *Edit, e *Entry) {
	t.modify(ed, e.remote(), func(l leaf) leaf { return l.put(ed, e, true) })
	t.n++
}

// drop removes e, which is in t, for ed.
func (t *tree) drop(ed *Edit, e *Entry) {
	t.modify(ed, e.remote(), func(l leaf) leaf { return l.drop(ed, e) })
	t.n--
}

// modify replaces the leaf of prefix p by f(leaf), either of which may be empty.
func (t *tree) modify(ed *Edit, p netip.Prefix, f func(leaf) leaf) {
	switch {
	case t.table == nil:
		t.table, t.owner = new(bart.Table[leaf]), ed.token
	case ed.draft && t.owner != ed.token:
		t.table, t.owner = t.table.Clone(), ed.token
	}
	t.table = modify(t.table, t.owner == ed.token, p, f)
}

func modify(t *bart.Table[leaf], own bool, p netip.Prefix, f func(leaf) leaf) *bart.Table[leaf] {
	cb := func(l leaf, _ bool) (leaf, bool) {
		l = f(l)
		return l, l == leaf{}
	}
	if own {
		t.Modify(p, cb)
		return t
	}
	return t.ModifyPersist(p, cb)
}

// put is l with e. split: where there are many it has a trie by local prefix.
func (l leaf) put(ed *Edit, e *Entry, split bool) leaf {
	if l == (leaf{}) {
		return leaf{one: e}
	}
	g := l.many
	if g == nil {
		g = &group{list: []*Entry{l.one}, owner: ed.token}
		g.count(l.one, 1)
	}
	g = g.own(ed)
	g.count(e, 1)
	switch {
	case g.near != nil:
		g.near = putNear(g.near, ed, e, ed.draft)
	case !split || len(g.list) < splitAt:
		g.list = insert(g.list, e)
	default:
		g.near = new(bart.Table[leaf])
		for _, o := range append(g.list, e) {
			g.near = putNear(g.near, ed, o, true)
		}
		g.list = nil
	}
	return leaf{many: g}
}

func putNear(t *bart.Table[leaf], ed *Edit, e *Entry, own bool) *bart.Table[leaf] {
	return modify(t, own, e.local(), func(l leaf) leaf { return l.put(ed, e, false) })
}

// drop is l without e, which is in it.
func (l leaf) drop(ed *Edit, e *Entry) leaf {
	if l.many == nil || l.many.n == 1 {
		return leaf{}
	}
	g := l.many.own(ed)
	g.count(e, -1)
	if g.near != nil {
		g.near = modify(g.near, ed.draft, e.local(), func(l leaf) leaf { return l.drop(ed, e) })
	} else {
		g.list = remove(g.list, e)
	}
	return leaf{many: g}
}

// count notes that n more policies like e are in g.
func (g *group) count(e *Entry, n int) {
	g.n += n
	if e.diverts() {
		g.diverts += n
	}
}

// own returns a group that ed may change: g itself, or a copy.
func (g *group) own(ed *Edit) *group {
	if g.owner == ed.token {
		return g
	}
	c := *g
	c.list, c.owner = slices.Clone(g.list), ed.token
	if ed.draft && c.near != nil {
		c.near = c.near.Clone()
	}
	return &c
}

func byOrder(a, b *Entry) int {
	switch {
	case a == b:
		return 0
	case a.before(b):
		return -1
	}
	return 1
}

// insert and remove change list, which is in order, in place.
func insert(list []*Entry, e *Entry) []*Entry {
	at, _ := slices.BinarySearchFunc(list, e, byOrder)
	return slices.Insert(list, at, e)
}

func remove(list []*Entry, e *Entry) []*Entry {
	if at, ok := slices.BinarySearchFunc(list, e, byOrder); ok && list[at] == e {
		return slices.Delete(list, at, at+1)
	}
	return list
}

// seal makes t ready for readers.
func (t *tree) seal() {
	t.owner, t.few = nil, nil
	if t.n == 0 {
		t.table = nil
	}
	if t.n > 0 && t.n <= fewMax {
		t.each(func(e *Entry) { t.few = append(t.few, e) })
		slices.SortFunc(t.few, byOrder)
	}
}
