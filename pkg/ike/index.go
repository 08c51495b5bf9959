package ike

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"

	"github.com/missiu/missiu/pkg/ipsec"
)

// index finds policies by the prefix of one side. Those that meet a range of
// addresses are those that begin in it, which lie next to each other in order of
// addresses, and those that hold its start, of which there is one prefix at most
// for each length.
type index struct {
	of      func(*ipsec.Policy) netip.Prefix
	sorted  []*entry
	recent  []*entry // not sorted in yet
	lengths [129]int // entries of sorted by length of prefix, of both families
}

func (x *index) compare(a, b netip.Prefix) int {
	return cmp.Or(a.Masked().Addr().Compare(b.Masked().Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func (x *index) insert(e *entry) { x.recent = append(x.recent, e) }

// settle bounds what is looked at one by one, so that sorting in costs little
// for each entry.
func (x *index) settle() {
	if len(x.recent) > 256+len(x.sorted)/64 {
		x.merge()
	}
}

// merge sorts in what is recent.
func (x *index) merge() {
	for _, e := range x.recent {
		x.lengths[max(x.of(e.p).Bits(), 0)]++
	}
	order := func(a, b *entry) int { return x.compare(x.of(a.p), x.of(b.p)) }
	slices.SortStableFunc(x.recent, order)
	all := make([]*entry, 0, len(x.sorted)+len(x.recent))
	a, b := x.sorted, x.recent
	for len(a) > 0 && len(b) > 0 {
		if order(a[0], b[0]) <= 0 {
			all, a = append(all, a[0]), a[1:]
		} else {
			all, b = append(all, b[0]), b[1:]
		}
	}
	x.sorted, x.recent = append(append(all, a...), b...), nil
}

func (x *index) remove(e *entry) {
	if i := slices.Index(x.recent, e); i >= 0 {
		x.recent = slices.Delete(x.recent, i, i+1)
		return
	}
	pfx := x.of(e.p)
	for i := x.first(pfx); i < len(x.sorted) && x.compare(x.of(x.sorted[i].p), pfx) == 0; i++ {
		if x.sorted[i] == e {
			x.sorted = slices.Delete(x.sorted, i, i+1)
			x.lengths[max(pfx.Bits(), 0)]--
			return
		}
	}
}

// first is where pfx is, or would be, in sorted.
func (x *index) first(pfx netip.Prefix) int {
	return sort.Search(len(x.sorted), func(i int) bool { return x.compare(x.of(x.sorted[i].p), pfx) >= 0 })
}

// candidates are entries of an index, some perhaps more than once.
type candidates struct {
	runs [][]*entry
	n    int
}

func (c *candidates) add(run []*entry) {
	if len(run) > 0 {
		c.runs = append(c.runs, run)
		c.n += len(run)
	}
}

func (c candidates) each(f func(*entry)) {
	for _, run := range c.runs {
		for _, e := range run {
			f(e)
		}
	}
}

// meeting returns what may meet one of ts: every policy that does, and few
// others.
func (x *index) meeting(ts []ipsec.TrafficSelector) (c candidates) {
	c.add(x.recent)
	at := func(i int) netip.Prefix { return x.of(x.sorted[i].p).Masked() }
	for _, t := range ts {
		from := sort.Search(len(x.sorted), func(i int) bool { return !at(i).Addr().Less(t.Start) })
		to := sort.Search(len(x.sorted), func(i int) bool { return t.End.Less(at(i).Addr()) })
		c.add(x.sorted[from:max(from, to)])
		for bits := range t.Start.BitLen() {
			if x.lengths[bits] == 0 {
				continue
			}
			pfx := netip.PrefixFrom(t.Start, bits).Masked()
			if pfx.Addr() == t.Start {
				continue // begins in the range
			}
			i := x.first(pfx)
			j := i
			for j < len(x.sorted) && at(j) == pfx {
				j++
			}
			c.add(x.sorted[i:j])
		}
	}
	return c
}
