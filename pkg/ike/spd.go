package ike

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"
	"sync"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
)

// spd mirrors the policies of missiu's SPD that concern us: for the side that
// answers a peer, and to know what to ask for. Policies in it do not change.
// What a request costs depends on how many policies meet it, not on how many
// there are.
type spd struct {
	mu sync.RWMutex
	tables
}

type tables struct {
	byID map[uint32]*entry                  // negotiable ones, of both directions
	in   map[ipsec.Selector][]*ipsec.Policy // inbound by selector; strongest first
	src  index                              // outbound by source
	dst  index                              // and by destination
	to   map[netip.Addr]int                 // how many tunnels lead there
	seq  uint64
}

// entry is a policy and its place among those of equal priority.
type entry struct {
	p   *ipsec.Policy
	seq uint64
}

func byStrength(a, b *entry) int {
	return cmp.Or(cmp.Compare(a.p.Priority, b.p.Priority), cmp.Compare(a.seq, b.seq))
}

// negotiable reports whether p is one whose SAs we make: a request of ESP, of AH
// or of each, in one mode and with the same end points, since the two exchanges
// have the same traffic selectors.
func negotiable(p *ipsec.Policy) bool {
	if p.Action != ipsec.Protect || len(p.Requests) == 0 || p.Dir != ipsec.In && p.Dir != ipsec.Out {
		return false
	}
	if ipsec.Packed(p.Requests) != nil {
		return true
	}
	var seen [256]bool
	for _, r := range p.Requests {
		f := p.Requests[0]
		if r.Proto != ipsec.ESP && r.Proto != ipsec.AH || seen[r.Proto] || r.Mode != f.Mode || r.Src != f.Src || r.Dst != f.Dst {
			return false
		}
		seen[r.Proto] = true
	}
	return true
}

// replace makes the mirror that of ps, which are strongest first.
func (s *spd) replace(ps []*ipsec.Policy) {
	var t tables
	var last []ipsec.Proposal
	for _, p := range ps {
		if !negotiable(p) {
			continue
		}
		// Neighbours mostly have the same: one copy is enough.
		if slices.Equal(last, p.Proposals) {
			p.Proposals = last
		}
		last = p.Proposals
		t.insert(p)
	}
	t.src.merge()
	t.dst.merge()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tables = t
}

func (s *spd) add(p *ipsec.Policy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(p.ID)
	if negotiable(p) {
		s.insert(p)
		s.src.settle()
		s.dst.settle()
	}
}

func (s *spd) delete(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(id)
}

func (s *tables) insert(p *ipsec.Policy) {
	if s.byID == nil {
		*s = tables{
			byID: map[uint32]*entry{}, in: map[ipsec.Selector][]*ipsec.Policy{}, to: map[netip.Addr]int{},
			src: index{of: func(p *ipsec.Policy) netip.Prefix { return p.Sel.Src }},
			dst: index{of: func(p *ipsec.Policy) netip.Prefix { return p.Sel.Dst }},
		}
	}
	if r := ipsec.Packed(p.Requests); r != nil { // what is negotiated
		q := *p
		q.Requests = []ipsec.Request{*r}
		p = &q
	}
	s.seq++
	e := &entry{p, s.seq}
	s.byID[p.ID] = e
	if p.Dir == ipsec.In {
		l := s.in[p.Sel]
		i := sort.Search(len(l), func(i int) bool { return l[i].Priority > p.Priority })
		s.in[p.Sel] = slices.Insert(l, i, p)
		return
	}
	s.src.insert(e)
	s.dst.insert(e)
	if r := p.Requests[0]; r.Mode == ipsec.Tunnel {
		s.to[r.Dst]++
	}
}

func (s *tables) remove(id uint32) {
	e := s.byID[id]
	if e == nil {
		return
	}
	delete(s.byID, id)
	p := e.p
	if p.Dir == ipsec.In {
		if l := slices.DeleteFunc(s.in[p.Sel], func(q *ipsec.Policy) bool { return q == p }); len(l) > 0 {
			s.in[p.Sel] = l
		} else {
			delete(s.in, p.Sel)
		}
		return
	}
	s.src.remove(e)
	s.dst.remove(e)
	if r := p.Requests[0]; r.Mode == ipsec.Tunnel {
		if s.to[r.Dst]--; s.to[r.Dst] == 0 {
			delete(s.to, r.Dst)
		}
	}
}

// pair finds the inbound policy that belongs to out: the reversed selector,
// the same protocols and mode, the end points exchanged.
func (s *tables) pair(out *ipsec.Policy) sa.Policy {
	same := func(o, i ipsec.Request) bool {
		return i.Proto == o.Proto && i.Mode == o.Mode && i.Src == o.Dst && i.Dst == o.Src && (i.Comp != 0) == (o.Comp != 0)
	}
	for _, in := range s.in[out.Sel.Reverse()] {
		if slices.EqualFunc(out.Requests, in.Requests, same) {
			return sa.Policy{Out: out, In: in}
		}
	}
	return sa.Policy{Out: out}
}

// has reports whether there is such a policy; 0 stands for none in particular.
func (s *spd) has(id uint32) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return id == 0 || s.byID[id] != nil
}

// outbound returns the policy of an ACQUIRE.
func (s *spd) outbound(id uint32) (sa.Policy, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	e := s.byID[id]
	if e == nil || e.p.Dir != ipsec.Out {
		return sa.Policy{}, false
	}
	return s.pair(e.p), true
}

// Policies is sa.Host's: the policies by which a peer may have what it asks
// for (RFC 4301, 4.4.3.4): their end points are the IKE SA's addresses, or open,
// and their selectors meet the peer's.
func (s *spd) policies(q sa.Query) []sa.Policy {
	s.mu.RLock()
	defer s.mu.RUnlock()
	local, remote := q.Peer.Local.Addr(), q.Peer.Remote.Addr()
	near := s.src.meeting(q.LocalTS)
	if far := s.dst.meeting(q.PeerTS); far.n < near.n {
		near = far
	}
	var es []*entry
	near.each(func(e *entry) {
		p := e.p
		if serves(p, q.Mode, local, remote) && meets(p.Sel.Src, p.Sel.Proto, q.LocalTS) && meets(p.Sel.Dst, p.Sel.Proto, q.PeerTS) {
			es = append(es, e)
		}
	})
	return s.inOrder(es)
}

// inOrder pairs policies, strongest first; es may have some more than once.
func (s *tables) inOrder(es []*entry) []sa.Policy {
	slices.SortFunc(es, byStrength)
	es = slices.Compact(es)
	ps := make([]sa.Policy, len(es))
	for i, e := range es {
		ps[i] = s.pair(e.p)
	}
	return ps
}

// towards returns the policies that name this peer: tunnels to it, and
// transport mode with its very address. They are what negotiation at start
// asks for.
func (s *spd) towards(local, remote netip.Addr) []sa.Policy {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var es []*entry
	take := func(e *entry) {
		r := e.p.Requests[0]
		exact := r.Mode == ipsec.Tunnel && !r.AnyPeer() || r.Mode != ipsec.Tunnel && e.p.Sel.Dst.IsSingleIP()
		if e.p.Dir == ipsec.Out && exact && serves(e.p, r.Mode, local, remote) {
			es = append(es, e)
		}
	}
	if s.to[remote] > 0 {
		for _, e := range s.byID {
			take(e)
		}
	} else {
		s.dst.meeting([]ipsec.TrafficSelector{{Start: remote, End: remote}}).each(take)
	}
	return s.inOrder(es)
}

// open returns the tunnels that leave their peer open and may be this one's.
func (s *spd) open(local, remote netip.Addr) []sa.Policy {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var es []*entry
	for _, e := range s.byID {
		if e.p.Dir == ipsec.Out && e.p.Requests[0].AnyPeer() && serves(e.p, ipsec.Tunnel, local, remote) {
			es = append(es, e)
		}
	}
	return s.inOrder(es)
}

// maxNear bounds what near returns.
const maxNear = 16

// near returns outbound policies whose end points are these, whatever they are
// for, the strongest of them.
func (s *spd) near(local, remote netip.Addr) []sa.Policy {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var es []*entry
	for _, e := range s.byID {
		if e.p.Dir == ipsec.Out && serves(e.p, e.p.Requests[0].Mode, local, remote) {
			es = append(es, e)
		}
	}
	slices.SortFunc(es, byStrength)
	return s.inOrder(es[:min(len(es), maxNear)])
}

func serves(p *ipsec.Policy, mode ipsec.Mode, local, remote netip.Addr) bool {
	r := p.Requests[0]
	if r.Mode != mode && r.Mode != ipsec.ModeAny {
		return false
	}
	if mode == ipsec.Transport {
		return p.Sel.Src.Contains(local) && p.Sel.Dst.Contains(remote)
	}
	return (r.Dst == remote || ipsec.Open(r.Dst)) && (r.Src == local || !r.Src.IsValid() || ipsec.Open(r.Src))
}

// meets reports whether a selector of one side has anything in common with ts.
// Ports are left to the machine.
func meets(pfx netip.Prefix, proto uint8, ts []ipsec.TrafficSelector) bool {
	for _, t := range ts {
		if t.Start.BitLen() != pfx.Addr().BitLen() || proto != 0 && t.Proto != 0 && proto != t.Proto {
			continue
		}
		// They meet if either's start lies in the other.
		if pfx.Contains(t.Start) || !pfx.Masked().Addr().Less(t.Start) && !t.End.Less(pfx.Masked().Addr()) {
			return true
		}
	}
	return false
}
