package datapath

import (
	"time"

	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

// optionalAll: a packet may come without any of the policy's transforms.
func optionalAll(p *spd.Entry) bool {
	for k := range p.P.Requests {
		if !optional(&p.P.Requests[k]) {
			return false
		}
	}
	return true
}

// optional: the transform is level "use", or it is compression, which a packet
// comes without if it had not helped (RFC 3173, 2.2). In tunnel mode such a
// packet is IP in IP, and not without.
func optional(r *ipsec.Request) bool {
	return r.Level == ipsec.LevelUse || r.Proto == ipsec.IPComp && r.Mode != ipsec.Tunnel
}

// lookup finds the inbound policy of a packet; what is not for this host is
// judged by the forward policies where there are any.
func (w *inWorker) lookup(i *packet.Info) (p *spd.Entry, ambiguous bool) {
	dir := ipsec.Fwd
	if w.e.c.Wire.IsLocal(i.Dst) {
		dir = ipsec.In
	}
	g := w.e.generation()
	if d, ok := w.flows.Get(i, uint8(dir), g); ok {
		return d.Policy, false
	}
	if dir == ipsec.Fwd {
		p, ambiguous = w.e.c.SPD.Lookup(ipsec.Fwd, i)
	}
	if p == nil && !ambiguous {
		p, ambiguous = w.e.c.SPD.Lookup(ipsec.In, i)
	}
	if !ambiguous {
		w.flows.Put(i, uint8(dir), g, flow.Decision{Policy: p})
	}
	return p, ambiguous
}

// accept delivers the packet buf[off:off+n], decoded in w.inner, if it is one
// that the SAs which it came by may carry, and that policy expects from them
// (RFC 4301, 5.2, step 4). An ICMP error may come in the place of the answer to
// the packet that it is about (6.2), whoever sends it: some router behind the
// peer whose address no selector has.
func (w *inWorker) accept(buf []byte, off, n int, l *layers, now time.Time) {
	i := &w.inner
	gen := w.e.generation()
	whole := i.HasPorts && !i.IsFragment()
	if v := &w.last; !whole || l.n != 1 || v.sa != l.sa[0] || v.gen != gen || !v.holds(i) {
		e, bad, why := w.judge(i, l)
		if e == nil && packet.Returning(buf[off:off+n], i, &w.about) {
			e, _, _ = w.judge(&w.about, l)
			whole = false
		}
		if e == nil {
			w.n.inc(why)
			for _, sa := range l.sa[:l.n] {
				if bad == nil || bad == sa {
					sa.SelectorErrors.Add(1)
				}
			}
			return
		}
		w.settle(now)
		*v = verdict{policy: e}
		if whole && l.n == 1 {
			v.sa, v.gen, v.flow = l.sa[0], gen, i.Flow()
		}
	}
	w.hits++
	w.clampSYN(l, buf[off:off+n])
	added := w.gro.Added()
	w.deliver(buf, off, i, tap.Offload{})
	if w.last.added = w.gro.Added(); w.last.added == added {
		w.last.added = 0
	}
}

// follows is opened for most packets of a TCP stream: it accepts one that came by the
// SA of the last and continues the super-frame that that went to. What was found right
// of that is right of this one too, which has the same flow. false: nothing was done.
// gen is the present generation.
func (w *inWorker) follows(j *inJob, p *esp.Packet, gen flow.Generation) bool {
	v := &w.last
	if !j.usual || p.Next != protoIPv4 && p.Next != protoIPv6 || v.sa != j.sa || v.gen != gen || v.added == 0 || v.added != w.gro.Added() {
		return false
	}
	if !w.gro.Follow(j.out[j.at : j.at+p.N]) {
		return false
	}
	w.hits++
	return true
}

// judge finds the policy by which a packet like i may come by the SAs of l; nil:
// it may not, and why. bad is the SA whose selectors it is outside of.
func (w *inWorker) judge(i *packet.Info, l *layers) (e *spd.Entry, bad *sad.SA, why Counter) {
	for _, sa := range l.sa[:l.n] {
		if !sa.MatchInbound(i) {
			return nil, sa, DropInSelector
		}
	}
	e, ambiguous := w.lookup(i)
	if e == nil || ambiguous || e.P.Action != ipsec.Protect || !l.serve(e) {
		return nil, nil, DropInPolicy
	}
	return e, nil, 0
}

// settle forgets the last verdict and counts the packets that it was of.
func (w *inWorker) settle(now time.Time) {
	if w.hits > 0 {
		w.last.policy.Hit(now, w.hits)
		w.n.add(InProtected, uint(w.hits))
	}
	w.last, w.hits = verdict{}, 0
}

// fromPeer: in transport mode the outer addresses, which no ICV covers, become
// the packet's own. They must be the SA's, or whoever can send a recorded
// packet on with another source would choose the sender that we believe in.
// In UDP that is known only after an authentic packet has told of a new mapping.
func (w *inWorker) fromPeer(j *inJob) bool {
	if j.sa.P.Mode != ipsec.Transport {
		return true
	}
	return j.src.Addr() == j.sa.P.Src || j.sa.AnySource()
}

// serves: the SA is one that the request of policy e asks for.
func serves(sa *sad.SA, e *spd.Entry, r *ipsec.Request) bool {
	if r.Proto != sa.P.Proto || r.Mode != sa.P.Mode {
		return false
	}
	if r.Level == ipsec.LevelUnique && r.ReqID != sa.P.ReqID && !lent(sa, e, r) {
		return false
	}
	if r.Mode != ipsec.Tunnel {
		return true
	}
	ends := sa.P.Ends()
	return r.Ends(ends.Src, ends.Dst)
}

// lent: sa, which is not of the policy e, does for the request r of e. One with
// manual keys may be of none. One that was made for another policy with an
// overlapping selector carries what lies in its own traffic selectors, by which
// RFC 4301 judges (5.2, step 4): the peer, whose policies may stand in another
// order or be cut otherwise, cannot know which of ours comes first. It must
// protect no less than e asks for, and e neither leave open who its peer is nor
// want an SA for each flow.
func lent(sa *sad.SA, e *spd.Entry, r *ipsec.Request) bool {
	if sa.P.ReqID == 0 {
		return e.P.Flags&ipsec.PolicyManual != 0 && sa.Fits(e.P.Proposals)
	}
	return len(sa.P.SrcTS) > 0 && len(sa.P.DstTS) > 0 && !r.Template() && e.P.Flags&ipsec.PolicyPerFlow == 0 &&
		sa.Satisfies(e.P.Proposals)
}
