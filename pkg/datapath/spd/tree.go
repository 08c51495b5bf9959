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
// leaves are shared between copies and changed in place only by the Edit that
// owns them.
type tree struct {
	n     int
	few   []*Entry // all, in order, if they are few
	table *bart.Table[*leaf]
	owner *token // who may change table in place
}

// leaf holds the policies of one prefix: in order in list, or, by the local
// prefix, in near.
type leaf struct {
	list  []*Entry
	near  *bart.Table[*leaf]
	n     int
	owner *token
}

func (t *tree) lookup(i *packet.Info, remote, local netip.Addr) (*Entry, bool) {
	if t.few != nil {
		return first(t.few, i, nil, false)
	}
	var best *Entry
	var amb bool
	for _, l := range t.table.Supernets(netip.PrefixFrom(remote, remote.BitLen())) {
		if l.near == nil {
			best, amb = first(l.list, i, best, amb)
			continue
		}
		for _, l := range l.near.Supernets(netip.PrefixFrom(local, local.BitLen())) {
			best, amb = first(l.list, i, best, amb)
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

func (l *leaf) each(f func(*Entry)) {
	for _, e := range l.list {
		f(e)
	}
	if l.near != nil {
		for _, l := range l.near.All() {
			l.each(f)
		}
	}
}

// put adds e for ed.
func (t *tree) put(ed *Edit, e *Entry) {
	t.modify(ed, e.remote(), func(l *leaf) *leaf {
		l = l.own(ed)
		l.put(ed, e)
		return l
	})
	t.n++
}

// drop removes e, which is in t, for ed.
func (t *tree) drop(ed *Edit, e *Entry) {
	t.modify(ed, e.remote(), func(l *leaf) *leaf {
		l = l.own(ed)
		l.drop(ed, e)
		if l.n == 0 {
			return nil
		}
		return l
	})
	t.n--
}

// modify replaces the leaf of prefix p by f(leaf), either of which may be nil.
func (t *tree) modify(ed *Edit, p netip.Prefix, f func(*leaf) *leaf) {
	switch {
	case t.table == nil:
		t.table, t.owner = new(bart.Table[*leaf]), ed.token
	case ed.draft && t.owner != ed.token:
		t.table, t.owner = t.table.Clone(), ed.token
	}
	t.table = modify(t.table, t.owner == ed.token, p, f)
}

func modify(t *bart.Table[*leaf], own bool, p netip.Prefix, f func(*leaf) *leaf) *bart.Table[*leaf] {
	cb := func(l *leaf, _ bool) (*leaf, bool) {
		l = f(l)
		return l, l == nil
	}
	if own {
		t.Modify(p, cb)
		return t
	}
	return t.ModifyPersist(p, cb)
}

// own returns a leaf that ed may change: l itself, or a copy.
func (l *leaf) own(ed *Edit) *leaf {
	switch {
	case l == nil:
		return &leaf{owner: ed.token}
	case l.owner == ed.token:
		return l
	}
	c := &leaf{list: slices.Clone(l.list), near: l.near, n: l.n, owner: ed.token}
	if ed.draft && c.near != nil {
		c.near = c.near.Clone()
	}
	return c
}

func (l *leaf) put(ed *Edit, e *Entry) {
	l.n++
	if l.near == nil {
		if len(l.list) < splitAt {
			l.list = insert(l.list, e)
			return
		}
		l.near = new(bart.Table[*leaf])
		for _, o := range l.list {
			l.near = l.putNear(ed, o, true)
		}
		l.list = nil
		l.near = l.putNear(ed, e, true)
		return
	}
	l.near = l.putNear(ed, e, ed.draft)
}

func (l *leaf) putNear(ed *Edit, e *Entry, own bool) *bart.Table[*leaf] {
	return modify(l.near, own, e.local(), func(k *leaf) *leaf {
		k = k.own(ed)
		k.list = insert(k.list, e)
		k.n++
		return k
	})
}

func (l *leaf) drop(ed *Edit, e *Entry) {
	l.n--
	if l.near == nil {
		l.list = remove(l.list, e)
		return
	}
	l.near = modify(l.near, ed.draft, e.local(), func(k *leaf) *leaf {
		k = k.own(ed)
		k.list = remove(k.list, e)
		k.n--
		if k.n == 0 {
			return nil
		}
		return k
	})
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
