package sad

import (
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Templates. A policy may leave an end of its tunnel open (ipsec.Request): its
// SAs then go to as many peers as have negotiated, and the traffic selectors
// say which of them a packet is for. So every SA in tunnel mode that has
// selectors stands in a further place, of no addresses, by the prefix that its
// destinations are. A look-up goes through the lengths of prefixes that there
// are, the longest first, which with thousands of single hosts is one.

// Open reports whether an end of the tunnel is open.
func (k OutKey) Open() bool {
	return k.Mode == ipsec.Tunnel && (ipsec.Open(k.Src) || ipsec.Open(k.Dst))
}

// between reports whether e are the ends of k as far as it names them.
func (k *OutKey) between(e ipsec.Ends) bool {
	return (k.Src == e.Src || ipsec.Open(k.Src)) && (k.Dst == e.Dst || ipsec.Open(k.Dst))
}

// Takes reports whether an SA is one that k, which is open, describes.
func (k OutKey) Takes(p *ipsec.SAParams) bool {
	return p.Proto == k.Proto && p.Mode == k.Mode && p.ReqID == k.ReqID && p.Queue == k.Queue && k.between(p.Ends())
}

// open is newest for a template.
func (d *DB) open(k OutKey, i *packet.Info, byHand bool, alts []ipsec.Proposal) *SA {
	if i == nil {
		return nil
	}
	at := place{OutKey: OutKey{Proto: k.Proto, Mode: k.Mode, ReqID: k.ReqID, Queue: k.Queue}}
	if at.ReqID == 0 {
		at.ReqID, byHand = manual, true
	}
	var dying *SA
	for _, bits := range d.dests[family(i.Dst)].list() {
		p, err := i.Dst.Prefix(bits)
		if err != nil {
			continue
		}
		at.flow = prefixFlow(p)
		switch sa := d.newestAt(at, &k, i, byHand, alts); {
		case sa == nil:
		case sa.State() == Mature:
			return sa
		case dying == nil:
			dying = sa
		}
	}
	at.flow = ipsec.Flow{}
	if sa := d.newestAt(at, &k, i, byHand, alts); sa != nil && (dying == nil || sa.State() == Mature) {
		return sa
	}
	return dying
}

// prefixFlow is a prefix in the form of a place.
func prefixFlow(p netip.Prefix) ipsec.Flow {
	return ipsec.Flow{Dst: p.Addr(), DstPort: uint16(p.Bits()) + 1}
}

// templatePlace is where s stands for templates. Without a single prefix of
// destinations it is the place that is looked at last.
func (s *SA) templatePlace() (t place, ok bool) {
	if s.P.Mode != ipsec.Tunnel || len(s.P.DstTS) == 0 {
		return t, false
	}
	t.OutKey = OutKey{Proto: s.P.Proto, Mode: s.P.Mode, ReqID: s.P.ReqID, Queue: s.P.Queue}
	if t.ReqID == 0 {
		t.ReqID = manual
	}
	start, end := s.P.DstTS[0].Start, s.P.DstTS[0].End
	for _, ts := range s.P.DstTS[1:] {
		if ts.Start.BitLen() != start.BitLen() {
			return t, true
		}
		if ts.Start.Less(start) {
			start = ts.Start
		}
		if end.Less(ts.End) {
			end = ts.End
		}
	}
	if p, ok := spanning(start, end); ok {
		t.flow = prefixFlow(p)
	}
	return t, true
}

// spanning is the longest prefix that holds all from start to end, if it is
// longer than nothing.
func spanning(start, end netip.Addr) (netip.Prefix, bool) {
	if !start.IsValid() || start.BitLen() != end.BitLen() {
		return netip.Prefix{}, false
	}
	for bits := start.BitLen(); bits > 0; bits-- {
		if p, err := start.Prefix(bits); err == nil && p.Contains(end) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// lengths are the lengths of the prefixes in templates' places. One goroutine
// counts, any reads.
type lengths struct {
	n  [129]int
	in atomic.Pointer[[]int] // longest first
}

func (l *lengths) list() []int {
	if p := l.in.Load(); p != nil {
		return *p
	}
	return nil
}

func (l *lengths) count(f ipsec.Flow, by int) {
	if f.DstPort == 0 {
		return
	}
	bits := int(f.DstPort) - 1
	was := l.n[bits]
	l.n[bits] += by
	if was != 0 && l.n[bits] != 0 {
		return
	}
	var all []int
	for b, n := range slices.Backward(l.n[:]) {
		if n > 0 {
			all = append(all, b)
		}
	}
	l.in.Store(&all)
}
