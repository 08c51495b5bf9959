package route

import (
	"net/netip"
	"slices"

	"github.com/missiu/missiu/pkg/ipsec"
)

// Want is one destination and where its packets go.
type Want struct {
	Dst netip.Prefix
	// Pass: not into the device, but on as if there were no routes of ours.
	Pass bool
	// Local are source selectors: if this host owns an address in one, packets of
	// its own come from there. Prefer are such addresses that come first.
	Local  []netip.Prefix
	Prefer []netip.Addr
	// Except are sources whose packets go into the device although Pass is set.
	Except []netip.Prefix
	// Await: unreachable as long as this host owns no address in Local, since a peer
	// is to assign it one. From another address its packets would leave in clear.
	// Never where the peer itself is.
	Await bool
}

// PlanOptions of Plan.
type PlanOptions struct {
	// PerSA wants routes for protected destinations only while there is an SA.
	PerSA bool
	// DropRest: packets that no policy matches are dropped, which only the device can do.
	DropRest bool
	// Outer are the addresses of the interface, for tunnels that leave theirs open.
	Outer []netip.Addr
	// Assigned are addresses that peers have given us. SAs that are for one of them
	// tell which policy's traffic comes from it.
	Assigned []netip.Addr
	// Awaited are those that they had given us. Not with PerSA.
	Awaited []netip.Addr
}

// Plan says what the outbound policies ps, in order, want routed, given the
// outbound SAs with keys.
//
// What is protected or discarded goes into the device, whether there is an SA or
// not: the first packet has to ask for one, and what waits for one, or has lost
// it, must not leave in clear. What is bypassed for all sources and protocols
// stays out; other bypasses are the data path's, which passes packets on.
// Multicast, loopback and link-local addresses stay out.
//
// A peer within a destination of its own tunnel stays out (RFC 4301 has IKE and
// ESP to it leave as they are) but for the sources that policy means, unless the
// destination is the peer itself, or policy protects what our end of the tunnel
// sends to it: then it goes in, since what the device must not have never gets
// there (see the package's comment).
func Plan(ps []*ipsec.Policy, sas []*ipsec.SAParams, o PlanOptions) []Want {
	p := plan{wants: map[netip.Prefix]*Want{}}
	for _, q := range ps {
		s := &q.Sel
		if q.Dir != ipsec.Out || !routable(s.Dst) || s.Src.IsSingleIP() && !routable(s.Src) {
			continue
		}
		switch {
		case q.Action == ipsec.Bypass:
			if whole(q) && s.Src.Bits() == 0 {
				p.put(s.Dst, true, netip.Prefix{}, netip.Addr{})
			}
		case q.Action == ipsec.Discard:
			p.put(s.Dst, false, netip.Prefix{}, netip.Addr{})
		case o.PerSA:
			for _, sa := range sas {
				if !serves(q, sa) {
					continue
				}
				for _, d := range destinations(q, sa) {
					p.assigned(d, q, sa, o.Assigned)
					p.put(d, false, s.Src, sa.Src)
				}
			}
		default:
			if len(o.Assigned) > 0 {
				for _, sa := range sas {
					p.assigned(s.Dst, q, sa, o.Assigned)
				}
			}
			p.put(s.Dst, false, s.Src, outer(q).Src)
			if w := p.wants[s.Dst]; !w.Pass && s.Src.Bits() > 0 && known(outer(q)) && slices.ContainsFunc(o.Awaited, s.Src.Contains) {
				w.Await = true
			}
		}
	}
	if o.DropRest {
		for _, a := range []string{"0.0.0.0/0", "::/0"} {
			p.put(netip.MustParsePrefix(a), false, netip.Prefix{}, netip.Addr{})
		}
	}
	for _, d := range apart {
		p.keepOut(d)
	}
	for _, q := range ps {
		if q.Dir != ipsec.Out || q.Action != ipsec.Protect {
			continue
		}
		if r := outer(q); known(r) {
			p.peer(ps, r.Src, r.Dst, o.Outer)
		}
	}
	for _, sa := range sas {
		if sa.Mode == ipsec.Tunnel {
			p.peer(ps, sa.Src, sa.Dst, o.Outer)
		}
	}
	l := make([]Want, 0, len(p.wants))
	for _, w := range p.wants {
		l = append(l, *w)
	}
	slices.SortFunc(l, func(a, b Want) int { return compare(a.Dst, b.Dst) })
	return l
}

func compare(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// apart is what does not belong into a device without a link.
var apart = []netip.Prefix{
	netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("ff00::/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("::1/128"),
}

func routable(p netip.Prefix) bool {
	return !slices.ContainsFunc(apart, func(q netip.Prefix) bool { return within(p, q) })
}

// within reports whether all of p lies in q.
func within(p, q netip.Prefix) bool { return p.Bits() >= q.Bits() && q.Contains(p.Addr()) }

// whole: whatever the protocol and the ports.
func whole(q *ipsec.Policy) bool { return q.Sel.Proto == 0 && q.Sel.SrcPort == 0 && q.Sel.DstPort == 0 }

// outer is the last request in tunnel mode, whose addresses the packets on the
// wire have, else the last one.
func outer(q *ipsec.Policy) *ipsec.Request {
	for k := len(q.Requests) - 1; k >= 0; k-- {
		if q.Requests[k].Mode == ipsec.Tunnel {
			return &q.Requests[k]
		}
	}
	return &q.Requests[len(q.Requests)-1]
}

type plan struct{ wants map[netip.Prefix]*Want }

// put adds a want; of those for one destination the first says where it goes,
// and all say where from.
func (p *plan) put(dst netip.Prefix, pass bool, local netip.Prefix, prefer netip.Addr) {
	w := p.wants[dst]
	if w == nil {
		w = &Want{Dst: dst, Pass: pass}
		p.wants[dst] = w
	}
	if w.Pass {
		return
	}
	if local.IsValid() && !slices.Contains(w.Local, local) {
		w.Local = append(w.Local, local)
	}
	if prefer.IsValid() && !ipsec.Open(prefer) && !slices.Contains(w.Prefer, prefer) {
		w.Prefer = append(w.Prefer, prefer)
	}
}

// known: r tells where the peer is that may assign an address.
func known(r *ipsec.Request) bool { return r.Mode == ipsec.Tunnel && !ipsec.Open(r.Dst) }

// assigned has packets to dst come from the address of given that sa is for, before
// all that q allows: no other fits the SA (RFC 7296, 2.19).
func (p *plan) assigned(dst netip.Prefix, q *ipsec.Policy, sa *ipsec.SAParams, given []netip.Addr) {
	for _, a := range given {
		if len(sa.SrcTS) == 1 && sa.SrcTS[0].Start == a && sa.SrcTS[0].End == a && a.BitLen() == dst.Addr().BitLen() && q.Sel.Src.Contains(a) && serves(q, sa) {
			p.put(dst, false, netip.PrefixFrom(a, a.BitLen()), netip.Addr{})
		}
	}
}

// keepOut excludes dst from what is wanted around it.
func (p *plan) keepOut(dst netip.Prefix) {
	if p.swallowed(dst) {
		p.put(dst, true, netip.Prefix{}, netip.Addr{})
	}
}

// swallowed: dst goes into the device because of what is wanted around it.
func (p *plan) swallowed(dst netip.Prefix) bool {
	if p.wants[dst] != nil {
		return false
	}
	for n := dst.Bits() - 1; n >= 0; n-- {
		around, _ := dst.Addr().Prefix(n)
		if w := p.wants[around]; w != nil {
			return !w.Pass
		}
	}
	return false
}

// peer excludes the far end of a tunnel from local, unless policy protects what
// goes between the two ends.
func (p *plan) peer(ps []*ipsec.Policy, local, peer netip.Addr, outer []netip.Addr) {
	host := netip.PrefixFrom(peer, peer.BitLen())
	if !p.swallowed(host) {
		p.reach(peer)
		return
	}
	ends := []netip.Addr{local}
	if !local.IsValid() || ipsec.Open(local) {
		ends = outer
	}
	for _, a := range ends {
		if a.BitLen() == peer.BitLen() && covered(ps, a, peer) {
			p.reach(peer)
			return
		}
	}
	p.keepOut(host)
	w := p.wants[host]
	for _, q := range ps {
		if q.Dir == ipsec.Out && q.Action != ipsec.Bypass && q.Sel.Dst.Contains(peer) && !slices.Contains(w.Except, q.Sel.Src) {
			w.Except = append(w.Except, q.Sel.Src)
		}
	}
}

// reach has what holds peer not be unreachable: it takes IKE to have an address.
func (p *plan) reach(peer netip.Addr) {
	for n := peer.BitLen(); n >= 0; n-- {
		around, _ := peer.Prefix(n)
		if w := p.wants[around]; w != nil {
			w.Await = false
			return
		}
	}
}

// covered reports whether policy protects or discards anything from src to dst.
func covered(ps []*ipsec.Policy, src, dst netip.Addr) bool {
	for _, q := range ps {
		if q.Dir != ipsec.Out || !q.Sel.Src.Contains(src) || !q.Sel.Dst.Contains(dst) {
			continue
		}
		if q.Action != ipsec.Bypass {
			return true
		}
		if whole(q) {
			return false
		}
	}
	return false
}

// serves reports whether sa is one that a request of q takes.
func serves(q *ipsec.Policy, sa *ipsec.SAParams) bool {
	return slices.ContainsFunc(q.Requests, func(r ipsec.Request) bool {
		switch {
		case r.Proto != sa.Proto || r.Mode != sa.Mode:
			return false
		case (r.Level == ipsec.LevelUnique || r.Template()) && r.ReqID != sa.ReqID && (sa.ReqID != 0 || q.Flags&ipsec.PolicyManual == 0):
			return false
		case r.Mode == ipsec.Tunnel:
			return r.Ends(sa.Src, sa.Dst)
		}
		return q.Sel.Dst.Contains(sa.Dst) && (q.Sel.Src.Contains(sa.Src) || ipsec.Open(sa.Src))
	})
}

// destinations is what the SA takes of the policy's.
func destinations(q *ipsec.Policy, sa *ipsec.SAParams) []netip.Prefix {
	if sa.Mode == ipsec.Transport {
		return []netip.Prefix{netip.PrefixFrom(sa.Dst, sa.Dst.BitLen())}
	}
	if len(sa.DstTS) == 0 {
		return []netip.Prefix{q.Sel.Dst}
	}
	var l []netip.Prefix
	for i := range sa.DstTS {
		for _, d := range prefixes(sa.DstTS[i].Start, sa.DstTS[i].End) {
			switch {
			case within(d, q.Sel.Dst):
				l = append(l, d)
			case within(q.Sel.Dst, d):
				l = append(l, q.Sel.Dst)
			}
		}
	}
	return slices.Compact(l)
}

// prefixes cuts the range from start to end, both in it, into prefixes.
func prefixes(start, end netip.Addr) (l []netip.Prefix) {
	for start.IsValid() && start.BitLen() == end.BitLen() && !end.Less(start) {
		n := start.BitLen()
		for n > 0 {
			p, _ := start.Prefix(n - 1)
			if p.Addr() != start || end.Less(last(p)) {
				break
			}
			n--
		}
		p := netip.PrefixFrom(start, n)
		l = append(l, p)
		start = last(p).Next() // the zero Addr after the highest
	}
	return l
}

// last is the highest address in p.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
