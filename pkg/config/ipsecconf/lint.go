package ipsecconf

import (
	"net/netip"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

// maxLint bounds the looks that lint takes at other rules.
const maxLint = 1 << 26

// selKey is what makes a rule unique in the SPD.
type selKey struct {
	dir ipsec.Direction
	sel ipsec.Selector
}

// lint joins the entries, drops rules whose selector an earlier one has, which
// the SPD would refuse, and warns of them and of entries that no packet can
// reach because earlier ones cover them.
func lint(l *lexer.List, entries [][]Rule) []Rule {
	type bits struct{ src, dst, all int }
	seen := map[selKey]*Rule{}
	lengths := map[bits]bool{}
	looks := 0
	var rules []Rule
	for _, rs := range entries {
		total, hidden := [ipsec.Fwd + 1]int{}, [ipsec.Fwd + 1]int{}
		by := [ipsec.Fwd + 1]*Rule{}
		kept := rs[:0:0]
		for i := range rs {
			r := &rs[i]
			dir, sel := r.Policy.Dir, r.Policy.Sel
			total[dir]++
			same := seen[selKey{dir, sel}]
			first := same
			for b := range lengths {
				if b.all != sel.Src.Addr().BitLen() || b.src > sel.Src.Bits() || b.dst > sel.Dst.Bits() || looks > maxLint {
					continue
				}
				s := sel
				s.Src, s.Dst = netip.PrefixFrom(sel.Src.Addr(), b.src).Masked(), netip.PrefixFrom(sel.Dst.Addr(), b.dst).Masked()
				for v := range 8 {
					looks++
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
					if o := seen[selKey{dir, k}]; o != nil && (first == nil || o.Policy.Priority < first.Policy.Priority) {
						first = o
					}
				}
			}
			if first != nil && (first.Pos != r.Pos || same != nil) {
				hidden[dir]++
				if by[dir] == nil {
					by[dir] = first
				}
			}
			if same != nil {
				continue
			}
			kept = append(kept, *r)
		}
		// An entry's own rules do not hide each other, so they are learnt last.
		for i := range kept {
			k := selKey{kept[i].Policy.Dir, kept[i].Policy.Sel}
			seen[k] = &kept[i]
			lengths[bits{k.sel.Src.Bits(), k.sel.Dst.Bits(), k.sel.Src.Addr().BitLen()}] = true
		}
		warnHidden(l, rs[0].Pos, total, hidden, by)
		rules = append(rules, kept...)
	}
	return rules
}

func warnHidden(l *lexer.List, pos lexer.Pos, total, hidden [ipsec.Fwd + 1]int, by [ipsec.Fwd + 1]*Rule) {
	whole := func(d ipsec.Direction) bool { return total[d] > 0 && hidden[d] == total[d] }
	out, in := whole(ipsec.Out), whole(ipsec.In)
	switch {
	case out && in && by[ipsec.Out].Pos == by[ipsec.In].Pos || out && total[ipsec.In] == 0:
		l.Warnf(pos, "no packet reaches this entry, the one at %v comes first", by[ipsec.Out].Pos)
	case in && total[ipsec.Out] == 0:
		l.Warnf(pos, "no packet reaches this entry, the one at %v comes first", by[ipsec.In].Pos)
	default:
		if out {
			l.Warnf(pos, "no outgoing packet reaches this entry, the one at %v comes first", by[ipsec.Out].Pos)
		}
		if in {
			l.Warnf(pos, "no incoming packet reaches this entry, the one at %v comes first", by[ipsec.In].Pos)
		}
	}
}
