package ike

import (
	"net/netip"
	"slices"
	"sort"
	"sync"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
)

// spd mirrors the policies of missiu's SPD that concern us: for the side that
// answers a peer, and to know what to ask for. Policies in it do not change.
type spd struct {
	mu   sync.RWMutex
	out  []*ipsec.Policy                    // outbound, negotiable; strongest first
	in   map[ipsec.Selector][]*ipsec.Policy // the same, inbound, by selector; strongest first
	byID map[uint32]*ipsec.Policy           // both
}

// negotiable reports whether p is one whose SAs we make: a request of ESP, of AH
// or of each, in one mode and with the same end points, since the two exchanges
// have the same traffic selectors.
func negotiable(p *ipsec.Policy) bool {
	if p.Action != ipsec.Protect || len(p.Requests) == 0 || p.Dir != ipsec.In && p.Dir != ipsec.Out {
		return false
	}
	seen := map[ipsec.Protocol]bool{}
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
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out, s.in, s.byID = nil, map[ipsec.Selector][]*ipsec.Policy{}, map[uint32]*ipsec.Policy{}
	for _, p := range ps {
		s.insert(p)
	}
}

func (s *spd) add(p *ipsec.Policy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(p.ID)
	s.insert(p)
}

func (s *spd) delete(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(id)
}

func (s *spd) insert(p *ipsec.Policy) {
	if !negotiable(p) {
		return
	}
	if s.byID == nil {
		s.byID, s.in = map[uint32]*ipsec.Policy{}, map[ipsec.Selector][]*ipsec.Policy{}
	}
	s.byID[p.ID] = p
	if p.Dir == ipsec.Out {
		s.out = insertByPriority(s.out, p)
	} else {
		s.in[p.Sel] = insertByPriority(s.in[p.Sel], p)
	}
}

func insertByPriority(l []*ipsec.Policy, p *ipsec.Policy) []*ipsec.Policy {
	i := sort.Search(len(l), func(i int) bool { return l[i].Priority > p.Priority })
	return slices.Insert(l, i, p)
}

func (s *spd) remove(id uint32) {
	p := s.byID[id]
	if p == nil {
		return
	}
	delete(s.byID, id)
	same := func(q *ipsec.Policy) bool { return q == p }
	if p.Dir == ipsec.Out {
		s.out = slices.DeleteFunc(s.out, same)
		return
	}
	if l := slices.DeleteFunc(s.in[p.Sel], same); len(l) > 0 {
		s.in[p.Sel] = l
	} else {
		delete(s.in, p.Sel)
	}
}

// pair finds the inbound policy that belongs to out: the reversed selector,
// the same protocols and mode, the end points exchanged.
func (s *spd) pair(out *ipsec.Policy) sa.Policy {
	same := func(o, i ipsec.Request) bool {
		return i.Proto == o.Proto && i.Mode == o.Mode && i.Src == o.Dst && i.Dst == o.Src
	}
	for _, in := range s.in[out.Sel.Reverse()] {
		if slices.EqualFunc(out.Requests, in.Requests, same) {
			return sa.Policy{Out: out, In: in}
		}
	}
	return sa.Policy{Out: out}
}

// outbound returns the policy of an ACQUIRE.
func (s *spd) outbound(id uint32) (sa.Policy, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	p := s.byID[id]
	if p == nil || p.Dir != ipsec.Out {
		return sa.Policy{}, false
	}
	return s.pair(p), true
}

// Policies is sa.Host's: the policies by which a peer may have what it asks
// for (RFC 4301, 4.4.3.4): their end points are the IKE SA's addresses, or open,
// and their selectors meet the peer's.
func (s *spd) policies(q sa.Query) []sa.Policy {
	s.mu.RLock()
	defer s.mu.RUnlock()
	local, remote := q.Peer.Local.Addr(), q.Peer.Remote.Addr()
	var ps []sa.Policy
	for _, p := range s.out {
		if serves(p, q.Mode, local, remote) && meets(p.Sel.Src, p.Sel.Proto, q.LocalTS) && meets(p.Sel.Dst, p.Sel.Proto, q.PeerTS) {
			ps = append(ps, s.pair(p))
		}
	}
	return ps
}

// towards returns the policies that name this peer: tunnels to it, and
// transport mode with its very address. They are what negotiation at start
// asks for.
func (s *spd) towards(local, remote netip.Addr) []sa.Policy {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var ps []sa.Policy
	for _, p := range s.out {
		r := p.Requests[0]
		exact := r.Mode == ipsec.Tunnel && !r.AnyPeer() || r.Mode != ipsec.Tunnel && p.Sel.Dst.IsSingleIP()
		if exact && serves(p, r.Mode, local, remote) {
			ps = append(ps, s.pair(p))
		}
	}
	return ps
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
