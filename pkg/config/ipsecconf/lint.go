package ipsecconf

import (
	"net/netip"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

// maxLooks bounds the looks that each lint takes at other rules: so many for
// each of n, a good many where there are few, and an end to it.
func maxLooks(n int) int { return min(1<<19+32*n, 1<<23) }

// linter looks at entries in match order.
type linter struct {
	l       *lexer.List
	order   Order
	seen    map[selKey]*Rule
	lengths map[prefixBits]bool   // of the prefixes in seen
	classes [maxClass + 1][]*Rule // seen by where Solaris tries them
	most    int
	looks   int // of cover
	peeks   int // of overtaken
}

// prefixBits are the prefix lengths of a selector and the length of its addresses.
type prefixBits struct{ src, dst, all int }

// selKey is what makes a rule unique in the SPD.
type selKey struct {
	dir ipsec.Direction
	sel ipsec.Selector
}

// lint joins the entries, and drops rules whose selector an earlier one has,
// which the SPD would refuse. It warns of them, of entries that no packet can
// reach because an earlier one covers them, and of entries that Solaris would
// try before earlier ones (DESIGN: file order and Solaris' differ).
func lint(l *lexer.List, order Order, entries [][]Rule) []Rule {
	x := &linter{l: l, order: order, seen: map[selKey]*Rule{}, lengths: map[prefixBits]bool{}}
	n := 0
	for _, rs := range entries {
		n += len(rs)
	}
	x.most = maxLooks(n)
	rules := make([]Rule, 0, n)
	for _, rs := range entries {
		rules = append(rules, x.entry(rs)...)
	}
	return rules
}

// entry looks at the rules of one entry and returns those to keep.
func (x *linter) entry(rs []Rule) []Rule {
	var total, hidden [ipsec.Fwd + 1]int
	var by [ipsec.Fwd + 1]*Rule
	var later *Rule
	kept := make([]Rule, 0, len(rs))
	for i := range rs {
		r := &rs[i]
		dir := r.Policy.Dir
		total[dir]++
		first := x.cover(r)
		if first != nil {
			hidden[dir]++
			if by[dir] == nil {
				by[dir] = first
			}
		}
		if later == nil {
			later = x.overtaken(r)
		}
		if x.seen[selKey{dir, r.Policy.Sel}] == nil {
			kept = append(kept, *r)
		}
	}
	// An entry's own rules do not hide each other, so they are learnt last.
	for i := range kept {
		k := selKey{kept[i].Policy.Dir, kept[i].Policy.Sel}
		x.seen[k] = &kept[i]
		x.lengths[prefixBits{k.sel.Src.Bits(), k.sel.Dst.Bits(), k.sel.Src.Addr().BitLen()}] = true
		c := solarisClass(&kept[i].Policy)
		x.classes[c] = append(x.classes[c], &kept[i])
	}
	solaris := ""
	if later != nil {
		solaris = "; Solaris would try this one first, as --order solaris does"
	}
	if !warnHidden(x.l, rs[0].Pos, total, hidden, by, solaris) && later != nil {
		x.l.Warnf(rs[0].Pos, "the entry at %v comes first for some packets%s", later.Pos, solaris)
	}
	return kept
}

// cover returns the first rule that takes every packet that r is for, if any.
func (x *linter) cover(r *Rule) (first *Rule) {
	sel := r.Policy.Sel
	for b := range x.lengths {
		if x.looks++; x.looks > x.most {
			break
		}
		if b.all != sel.Src.Addr().BitLen() || b.src > sel.Src.Bits() || b.dst > sel.Dst.Bits() {
			continue
		}
		s := sel
		s.Src, s.Dst = netip.PrefixFrom(sel.Src.Addr(), b.src).Masked(), netip.PrefixFrom(sel.Dst.Addr(), b.dst).Masked()
		for v := range 8 {
			if v&1 != 0 && s.Proto == 0 || v&2 != 0 && s.SrcPort == 0 || v&4 != 0 && s.DstPort == 0 {
				continue // any is any already
			}
			x.looks++
			k := s
			if v&1 != 0 {
				k.Proto = 0
			}
			if v&2 != 0 {
				k.SrcPort = 0
			}
			if v&4 != 0 {
				k.DstPort = 0
			}
			if k.Proto == 0 && isICMP(s.Proto) && (k.SrcPort != 0 || k.DstPort != 0) {
				continue // ports of any protocol are not ICMP's types
			}
			if o := x.seen[selKey{r.Policy.Dir, k}]; o != nil && (first == nil || o.Policy.Priority < first.Policy.Priority) {
				first = o
			}
		}
	}
	return first
}

// overtaken returns the first rule for packets that the later r is for as well,
// which Solaris would try behind r.
func (x *linter) overtaken(r *Rule) (first *Rule) {
	if x.order != OrderFile {
		return nil
	}
	for c := solarisClass(&r.Policy) + 1; c <= maxClass; c++ {
		for _, p := range x.classes[c] {
			if x.peeks++; x.peeks > x.most {
				return first
			}
			if p.Policy.Dir == r.Policy.Dir && overlap(&p.Policy.Sel, &r.Policy.Sel) {
				if first == nil || p.Policy.Priority < first.Policy.Priority {
					first = p
				}
				break
			}
		}
	}
	return first
}

// overlap reports whether a packet can match both.
func overlap(a, b *ipsec.Selector) bool {
	port := func(x, y uint16) bool { return x == 0 || y == 0 || x == y }
	if a.Proto != b.Proto {
		if a.Proto != 0 && b.Proto != 0 {
			return false
		}
		any, other := a, b
		if b.Proto == 0 {
			any, other = b, a
		}
		if (any.SrcPort != 0 || any.DstPort != 0) && !hasPorts(other.Proto) {
			return false
		}
	}
	return a.Src.Overlaps(b.Src) && a.Dst.Overlaps(b.Dst) && port(a.SrcPort, b.SrcPort) && port(a.DstPort, b.DstPort)
}

// warnHidden tells of an entry that is hidden in one direction or both.
func warnHidden(l *lexer.List, pos lexer.Pos, total, hidden [ipsec.Fwd + 1]int, by [ipsec.Fwd + 1]*Rule, suffix string) bool {
	whole := func(d ipsec.Direction) bool { return total[d] > 0 && hidden[d] == total[d] }
	out, in := whole(ipsec.Out), whole(ipsec.In)
	warn := func(what string, d ipsec.Direction) {
		l.Warnf(pos, "no %spacket reaches this entry, the one at %v comes first%s", what, by[d].Pos, suffix)
	}
	switch {
	case out && in && by[ipsec.Out].Pos == by[ipsec.In].Pos || out && total[ipsec.In] == 0:
		warn("", ipsec.Out)
	case in && total[ipsec.Out] == 0:
		warn("", ipsec.In)
	default:
		if out {
			warn("outgoing ", ipsec.Out)
		}
		if in {
			warn("incoming ", ipsec.In)
		}
	}
	return out || in
}
