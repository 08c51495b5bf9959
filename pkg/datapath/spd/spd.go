// Package spd is the Security Policy Database (RFC 4301, 4.4.1) as the data
// path uses it: for a packet and a direction, the policy that comes first in
// order among all whose selectors hold the packet. Order is priority, smaller
// first, then insertion; there is no longest-prefix rule (PF_KEY).
//
// Readers look at an immutable snapshot behind an atomic pointer. The one
// writer, pkg/keyengine, works on an Edit and commits it: a single change
// shares all it does not touch with the snapshot before, a transaction works on
// a copy.
//
// A snapshot keeps the policies of a direction in a trie by remote prefix (the
// peers' side: destination outbound, source inbound), since that is what
// policies differ in most. A lookup visits every prefix that covers the
// address, not the longest alone, because a shorter one may come first in
// order. Where many policies share a remote prefix a second trie by local
// prefix stands below it.
package spd

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Entry is one policy in force. P never changes; use is counted.
type Entry struct {
	P       ipsec.Policy // not to be written, slices included
	Created time.Time
	// Choices are the alternatives of P if they differ in more than the
	// algorithms of one transform (ipsec.Policy.Choice), in order, else nil.
	Choices []Choice
	// Packed is ipsec.Packed of P's requests.
	Packed *ipsec.Request

	seq     uint64       // insertion order among equal priorities
	last    atomic.Int64 // ns since Created, plus 1; 0: never
	packets atomic.Uint64
}

// Choice is one alternative of a policy: the transforms of a packet, innermost
// first, and their algorithms.
type Choice struct {
	Requests []ipsec.Request
	Alg      []ipsec.Proposal // one
}

// choices are those of p.
func choices(p *ipsec.Policy) []Choice {
	if !p.Choice() {
		return nil
	}
	l := make([]Choice, len(p.Proposals))
	for k := range l {
		l[k].Alg = p.Proposals[k : k+1]
		for _, r := range p.Requests {
			if p.Proposals[k].Shape.Has(r.Proto) {
				l[k].Requests = append(l[k].Requests, r)
			}
		}
	}
	return l
}

// Hit counts n packets that the policy decided about at now.
func (e *Entry) Hit(now time.Time, n int) {
	e.packets.Add(uint64(n))
	e.last.Store(max(int64(now.Sub(e.Created)), 0) + 1)
}

// Packets returns how many packets were counted.
func (e *Entry) Packets() uint64 { return e.packets.Load() }

// LastUsed returns when a packet was last counted, zero if none was.
func (e *Entry) LastUsed() time.Time {
	t := e.last.Load()
	if t == 0 {
		return time.Time{}
	}
	return e.Created.Add(time.Duration(t - 1))
}

// before reports whether e comes before o in order.
func (e *Entry) before(o *Entry) bool {
	return e.P.Priority < o.P.Priority || e.P.Priority == o.P.Priority && e.seq < o.seq
}

// remote is the prefix of the peers' side, masked.
func (e *Entry) remote() netip.Prefix {
	if e.P.Dir == ipsec.Out {
		return e.P.Sel.Dst.Masked()
	}
	return e.P.Sel.Src.Masked()
}

// local is the prefix of our side, masked.
func (e *Entry) local() netip.Prefix {
	if e.P.Dir == ipsec.Out {
		return e.P.Sel.Src.Masked()
	}
	return e.P.Sel.Dst.Masked()
}

// diverts reports whether clear packets from the remote prefix must not reach
// the kernel unseen.
func (e *Entry) diverts() bool { return e.P.Dir != ipsec.Out && e.P.Action != ipsec.Bypass }

// verdict is the relation of a packet and a selector.
type verdict uint8

const (
	no verdict = iota
	maybe
	yes
)

// match compares a packet with e's selector. maybe: the packet does not show
// what the selector asks for. A later fragment has no ports and, over IPv6,
// perhaps no upper protocol; a tiny or truncated packet hides them. Taking it
// for "no" would let an attacker pass a rule by cutting, taking it for "yes"
// would protect or pass what the rule does not mean (RFC 4301, 7.4).
func (e *Entry) match(i *packet.Info) verdict {
	s := &e.P.Sel
	if !s.Src.Contains(i.Src) || !s.Dst.Contains(i.Dst) { // host bits do not matter
		return no
	}
	if s.Proto != 0 && s.Proto != i.Proto {
		if i.ProtoKnown() {
			return no
		}
		return maybe
	}
	if s.SrcPort == 0 && s.DstPort == 0 {
		return yes
	}
	if !i.ProtoKnown() {
		return maybe
	}
	icmp := packet.IsICMP(i.Proto)
	if icmp && s.Proto == 0 || !icmp && !packet.HasPortNumbers(i.Proto) {
		// Ports of "any protocol" are ports, not ICMP types; a protocol
		// without ports is never meant.
		return no
	}
	if !i.HasPorts {
		return maybe
	}
	one := uint32(0)
	if icmp {
		one = 1 // ipsec.Selector: type and code plus one
	}
	if s.SrcPort != 0 && uint32(s.SrcPort) != uint32(i.SrcPort)+one ||
		s.DstPort != 0 && uint32(s.DstPort) != uint32(i.DstPort)+one {
		return no
	}
	return yes
}

// DB is the SPD. Lookup, Remotes, Generation and Len are for any goroutine, all
// else is for the writer's.
type DB struct {
	snap  atomic.Pointer[snapshot]
	state *state
	count uint32 // of policy ids
	seq   uint64
}

// snapshot is what readers see.
type snapshot struct {
	gen  uint64
	dirs [ipsec.Fwd + 1]tree
}

// NewDB returns an empty DB.
func NewDB() *DB {
	d := &DB{state: newState()}
	d.snap.Store(new(snapshot))
	return d
}

// Lookup finds the policy for a packet; nil if none matches. ambiguous says
// that the packet does not show enough to tell whether the policy returned,
// the first that could match, does: reassemble it and ask again, or drop it.
func (d *DB) Lookup(dir ipsec.Direction, i *packet.Info) (e *Entry, ambiguous bool) {
	if dir < ipsec.In || dir > ipsec.Fwd || i.Version == 0 {
		return nil, false
	}
	t := &d.snap.Load().dirs[dir]
	if t.n == 0 {
		return nil, false
	}
	remote, local := i.Src, i.Dst
	if dir == ipsec.Out {
		remote, local = local, remote
	}
	return t.lookup(i, remote, local)
}

// Generation changes with every commit; a decision remembered from another
// generation is void.
func (d *DB) Generation() uint64 { return d.snap.Load().gen }

// Len returns the number of policies.
func (d *DB) Len() int {
	n := 0
	for _, t := range &d.snap.Load().dirs {
		n += t.n
	}
	return n
}

// Remotes returns the divert set: the remote prefixes, masked, of inbound and
// forward policies that protect or discard. It walks all policies.
func (d *DB) Remotes() []netip.Prefix { return remotes(&d.snap.Load().dirs) }

func remotes(dirs *[ipsec.Fwd + 1]tree) []netip.Prefix {
	seen := map[netip.Prefix]bool{}
	for _, dir := range []ipsec.Direction{ipsec.In, ipsec.Fwd} {
		dirs[dir].each(func(e *Entry) {
			if e.diverts() {
				seen[e.remote()] = true
			}
		})
	}
	return sorted(seen)
}
