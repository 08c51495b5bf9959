package sa

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// refused is why a child SA is not granted, and what the peer hears.
type refused struct {
	n     *ikev2.Notify
	err   error
	fatal bool // INVALID_SYNTAX: the IKE SA ends (RFC 7296, 2.21.3)
}

func refuseWith(t ikev2.NotifyType, format string, args ...any) *refused {
	return &refused{n: notify(t), err: fmt.Errorf(format, args...)}
}

// replacedChildren are those whose end is due.
func (s *SA) replacedChildren() (n int) {
	for _, c := range s.children {
		if c.replaced != nil {
			n++
		}
	}
	return n
}

// grant is the responder's judgement on a request for a child SA: policy,
// selectors, algorithms, key exchange. rekeys is the child SA to be replaced,
// whose policy then serves.
func (s *SA) grant(i *ikeSA, ps []ikev2.Payload, initial bool, rekeys *child) (*granted, *refused) {
	w := want{
		mode: ipsec.Tunnel,
		tsi:  fromWire(ikev2.Find[*ikev2.TSi](ps).Selectors),
		tsr:  fromWire(ikev2.Find[*ikev2.TSr](ps).Selectors),
		sa:   ikev2.Find[*ikev2.SA](ps),
	}
	if ikev2.FindNotify(ps, ikev2.USE_TRANSPORT_MODE) != nil {
		w.mode = ipsec.Transport
	}
	// What replaces one that is there is not one more.
	if n := s.rule.ChildLimit; rekeys == nil && n > 0 && len(s.children) >= n {
		s.counters.Surplus++
		return nil, refuseWith(ikev2.NO_ADDITIONAL_SAS, "%d child SAs are enough by rule %q", n, s.rule.Label)
	}
	if n := s.rule.ChildLimit; rekeys != nil && n > 0 && s.replacedChildren() >= n {
		s.counters.Surplus++
		return nil, refuseWith(ikev2.TEMPORARY_FAILURE, "%d child SAs that were replaced are not deleted yet", n)
	}
	asked, err := peerAggfrag(ps)
	w.aggfrag = asked && err == nil // else declined
	w.resource = ikev2.FindNotify(ps, ikev2.SA_RESOURCE_INFO) != nil
	w.noTFC = refusesTFC(ps)
	w.cpi = offeredCPI(ps)
	g, rf := s.choosePolicy(i, w, initial, rekeys)
	if rf != nil && w.mode == ipsec.Transport {
		// Transport mode is a wish; tunnel mode is the answer to whoever
		// asks in vain (RFC 7296, 1.3.1).
		w.mode = ipsec.Tunnel
		if t, trf := s.choosePolicy(i, w, initial, rekeys); trf == nil {
			g, rf = t, nil
		}
	}
	if rf != nil {
		return nil, rf
	}
	if g.suite.KE == alg.KENone {
		return g, nil
	}
	ke := ikev2.Find[*ikev2.KE](ps)
	if ke == nil || alg.KE(ke.Method) != g.suite.KE {
		return nil, &refused{n: invalidKE(uint16(g.suite.KE)), err: fmt.Errorf("want key exchange by %v", g.suite.KE)}
	}
	if g.public, g.shared, err = dh.Respond(g.suite.KE, s.rand, ke.Data); err != nil { // RFC 6989, 5
		return nil, &refused{n: notify(ikev2.INVALID_SYNTAX), err: err, fatal: true}
	}
	return g, nil
}

// want is what a peer asks for.
type want struct {
	mode     ipsec.Mode
	tsi, tsr []ipsec.TrafficSelector
	sa       *ikev2.SA
	aggfrag  bool
	noTFC    bool
	cpi      uint16 // of IPCOMP_SUPPORTED; 0: not offered, or not as we can
	resource bool   // SA_RESOURCE_INFO
}

// choosePolicy finds the first policy that leaves something of the selectors
// and has common algorithms. One that holds the first selectors, which may be
// those of the packet that raised the request, goes before others (RFC 7296, 2.9).
func (s *SA) choosePolicy(i *ikeSA, w want, initial bool, rekeys *child) (*granted, *refused) {
	g := &granted{initial: initial, mode: w.mode, noTFC: w.noTFC, rekeys: rekeys}
	local, remote := w.tsr, w.tsi
	if w.mode == ipsec.Transport {
		// RFC 7296, 2.23.1: addresses that a NAT has changed are replaced by
		// those that we see, and changed back in the answer.
		if s.natRemote {
			remote, g.oa = replaceAddr(remote, s.remote.Addr())
		}
		if s.natLocal {
			local, _ = replaceAddr(local, s.local.Addr())
		}
	}
	if len(local) == 0 || len(remote) == 0 {
		return nil, refuseWith(ikev2.TS_UNACCEPTABLE, "no usable traffic selectors")
	}
	var policies []Policy
	if rekeys != nil {
		policies = []Policy{rekeys.policy}
	} else {
		policies = s.wholeFirst(s.cfg.Host.Policies(Query{Peer: s.asPolicyKnows(w.mode), Mode: w.mode, LocalTS: local, PeerTS: remote}), w.mode, local, remote)
	}
	var rf *refused
	for pass := range 2 {
		for _, p := range policies {
			if m, ok := p.mode(); !ok || m != w.mode {
				continue
			}
			l, r, ok := policyTS(p, w.mode, s.local.Addr(), s.remote.Addr())
			if !ok {
				continue
			}
			_, firstL := intersect(local[0], l)
			_, firstR := intersect(remote[0], r)
			if (firstL && firstR) == (pass == 1) {
				continue // this pass is for the others
			}
			g.local = narrow(local, []ipsec.TrafficSelector{l})
			theirs := s.ofPeer(p, r)
			if len(theirs) == 0 && len(s.rule.Pools) > 0 && len(s.lease.Addrs()) == 0 {
				rf = refuseWith(ikev2.FAILED_CP_REQUIRED, "policy is for addresses that are leased, and the peer has none")
				continue
			}
			g.remote = narrow(remote, theirs)
			if p.perFlow() {
				// The packet that the peer has comes first (RFC 7296, 2.9).
				g.local = narrow(local[:1], []ipsec.TrafficSelector{l})
				g.remote = narrow(remote[:1], theirs)
				if len(g.local) == 0 || len(g.remote) == 0 || !oneFlow(g.local[0]) || !oneFlow(g.remote[0]) {
					rf = refuseWith(ikev2.SINGLE_PAIR_REQUIRED, "policy has SAs for single flows, the peer names none")
					continue
				}
			}
			if len(g.local) == 0 || len(g.remote) == 0 {
				continue
			}
			wants, must := s.aggregates(p)
			if must && !w.aggfrag {
				rf = &refused{n: notify(ikev2.NO_PROPOSAL_CHOSEN), err: errAggfragMissing}
				continue
			}
			perQueue, must := s.queues(p)
			if must && !w.resource && rekeys == nil {
				rf = &refused{n: notify(ikev2.NO_PROPOSAL_CHOSEN), err: errNoResources}
				continue
			}
			var fb *child
			if w.resource && perQueue && rekeys == nil {
				var n int
				if fb, n = s.groupOf(p, g.local, g.remote); fb != nil && n >= max(maxResources, 2*s.cfg.Queues) {
					// Not NO_ADDITIONAL_SAS, which is said of other selectors too.
					return nil, refuseWith(ikev2.TS_MAX_QUEUE, "%d SAs for single queues are enough", n)
				}
			}
			suite, answer, peer, err := s.choose(i, p, w.sa, initial, rekeys, fb)
			if err != nil {
				rf = &refused{n: notify(ikev2.NO_PROPOSAL_CHOSEN), err: ofPolicy(err)}
				continue
			}
			if s.childOut(suite.Proto(), peer) != nil {
				return nil, refuseWith(ikev2.NO_ADDITIONAL_SAS, "SPI %v is in use", peer)
			}
			comp, mustComp := s.compresses(p, suite.Proto())
			if mustComp && w.cpi == 0 {
				rf = &refused{n: notify(ikev2.NO_PROPOSAL_CHOSEN), err: errIPCompMissing}
				continue
			}
			g.policy, g.suite, g.answer, g.peerSPI = p, suite, answer, peer
			g.aggfrag = wants && w.aggfrag
			if g.cpi, g.peerCPI = 0, 0; comp && w.cpi != 0 && !g.aggfrag {
				if g.cpi = s.newCPI(); g.cpi != 0 {
					g.peerCPI = w.cpi
				}
			}
			if mustComp && g.cpi == 0 {
				return nil, refuseWith(ikev2.NO_ADDITIONAL_SAS, "no CPI is free")
			}
			switch {
			case rekeys != nil:
				g.resource, g.queue = rekeys.resource, rekeys.queue
			case fb != nil:
				g.local, g.remote = slices.Clone(fb.local), slices.Clone(fb.remote)
				g.resource, g.queue = true, s.idlestQueue(fb)
			default:
				g.resource = w.resource && perQueue
			}
			g.tellResource = g.resource && w.resource
			g.moreTS = s.moreTS(g, policies, local, remote)
			g.tsi, g.tsr = s.asAsked(g.remote, g.oa, s.natRemote), s.asAsked(g.local, single(w.tsr), s.natLocal)
			return g, nil
		}
	}
	if rf == nil {
		rf = &refused{n: notify(ikev2.TS_UNACCEPTABLE), err: s.noPolicy(Query{Peer: s.peer, Mode: w.mode, LocalTS: local, PeerTS: remote})}
	}
	return nil, rf
}

// maxMore is how many policies are looked at for the sake of a hint.
const maxMore = 64

// moreTS reports whether g leaves something of what the peer asks for that it may
// have by another child SA (RFC 7296, 2.9).
func (s *SA) moreTS(g *granted, policies []Policy, local, remote []ipsec.TrafficSelector) bool {
	if g.rekeys != nil || allWithin(local, g.local) && allWithin(remote, g.remote) {
		return false
	}
	return slices.ContainsFunc(policies[:min(len(policies), maxMore)], func(p Policy) bool {
		if m, ok := p.mode(); !ok || m != g.mode {
			return false
		}
		l, r, ok := policyTS(p, g.mode, s.local.Addr(), s.remote.Addr())
		if !ok {
			return false
		}
		ours, theirs := narrow(local, []ipsec.TrafficSelector{l}), narrow(remote, s.ofPeer(p, r))
		return len(ours) > 0 && len(theirs) > 0 && !(allWithin(ours, g.local) && allWithin(theirs, g.remote))
	})
}

// wholeFirst puts the first policy that holds all that a peer asks for before
// those that hold a part, unless the peer names a packet, which decides: nothing
// need be narrowed then (RFC 7296, 2.9), and of two policies of which one lies in
// the other's range each gets an SA when the peer asks for both.
func (s *SA) wholeFirst(ps []Policy, m ipsec.Mode, local, remote []ipsec.TrafficSelector) []Policy {
	if oneFlow(local[0]) && oneFlow(remote[0]) {
		return ps
	}
	for k, p := range ps {
		if pm, ok := p.mode(); !ok || pm != m {
			continue
		}
		l, r, ok := policyTS(p, m, s.local.Addr(), s.remote.Addr())
		if ok && allWithin(local, []ipsec.TrafficSelector{l}) && allWithin(remote, s.ofPeer(p, r)) {
			return slices.Concat(ps[k:k+1], ps[:k], ps[k+1:])
		}
	}
	return ps
}

// choose picks one of the proposals of a peer by our order: the first of the
// policy's alternatives that it offers, else what completes one; beside fb only
// what that has.
func (s *SA) choose(i *ikeSA, p Policy, offered *ikev2.SA, initial bool, rekeys, fb *child) (proposal.ChildSuite, ikev2.Proposal, ipsec.SPI, error) {
	if fb != nil {
		return proposal.ChooseChild(s.like(i, fb), offered, 0, initial)
	}
	alts := p.alternatives()
	if rekeys != nil {
		alts = rekeys.successors()
	}
	alts, err := s.passing(alts)
	if err != nil {
		return proposal.ChildSuite{}, ikev2.Proposal{}, 0, err
	}
	from := func(alts []ipsec.Proposal) (proposal.ChildSuite, ikev2.Proposal, ipsec.SPI, error) {
		ours := proposal.WithKE(proposal.ForChild(alts, s.rule.PFS, s.esn()), i.suite.KE)
		if !initial {
			ours = proposal.WithAddKE(ours, s.rule.ChildAddKE)
		}
		return proposal.ChooseChild(ours, offered, 0, initial)
	}
	suite, answer, peer, err := from(alts)
	if f := proposal.Followers(alts); err != nil && len(f) > 0 {
		if suite, answer, peer, err := from(f); err == nil {
			return suite, answer, peer, nil
		}
	}
	return suite, answer, peer, err
}

// asAsked undoes replaceAddr for the answer.
func (s *SA) asAsked(l []ipsec.TrafficSelector, orig netip.Addr, nat bool) []ipsec.TrafficSelector {
	if nat && orig.IsValid() {
		if back, _ := replaceAddr(l, orig); len(back) == len(l) {
			return back
		}
	}
	return l
}

// single returns the address of the first selector if it is just one.
func single(l []ipsec.TrafficSelector) netip.Addr {
	if len(l) > 0 && l[0].Start == l[0].End {
		return l[0].Start
	}
	return netip.Addr{}
}

// childRequest answers CREATE_CHILD_SA for a new child SA or to rekey one.
func (s *SA) childRequest(i *ikeSA, ps []ikev2.Payload) {
	a, old := askCreate, (*child)(nil)
	n := ikev2.FindNotify(ps, ikev2.REKEY_SA)
	if n != nil {
		a = askRekeyUnknown
		spi, ok := proposal.SPIFromBytes(n.SPI)
		if proto, known := proposal.ProtocolOf(n.Protocol); known && ok {
			if old = s.childOut(proto, spi); old != nil {
				a = askRekey
			}
		}
	}
	switch v, err := s.judge(i, a, old); v {
	case notNow:
		s.refuse(i, notify(ikev2.TEMPORARY_FAILURE), err)
		return
	case notFound:
		s.refuse(i, &ikev2.Notify{Protocol: n.Protocol, SPI: n.SPI, Type: ikev2.CHILD_SA_NOT_FOUND}, err)
		return
	}
	g, rf := s.grant(i, ps, false, old)
	if rf != nil {
		s.refuse(i, rf.n, rf.err)
		if rf.fatal {
			s.fail(&LocalError{ikev2.CREATE_CHILD_SA, rf.n.Type, rf.err}, true)
		}
		return
	}
	g.ni = ikev2.Find[*ikev2.Nonce](ps).Data
	s.needSPI(g.policy, g.mode, []ipsec.Protocol{g.suite.Proto()}, g.queue, 0, spiWait{ike: i, drop: g.wipe, then: func(spi ipsec.SPI, err error) {
		if err == nil {
			// Perhaps something of ours has begun while we waited.
			if err = s.tooLate(i, a, old); err != nil {
				s.release(spi, g.suite.Proto())
			}
		}
		if err != nil {
			g.wipe()
			s.refuse(i, notify(ikev2.TEMPORARY_FAILURE), err)
			return
		}
		g.nr = s.newNonce()
		if methods := g.suite.AddKE.Methods(); methods != nil {
			s.respond(i, append(g.payloads(spi), s.expectFollow(i, &follow{methods: methods, g: g, spi: spi, old: old}))...)
			return
		}
		c, out, err := s.install(i, g, spi, true)
		if err != nil {
			s.release(spi, g.suite.Proto())
			s.refuse(i, notify(ikev2.NO_PROPOSAL_CHOSEN), err)
			return
		}
		s.respond(i, out...)
		if old != nil {
			s.replacedByPeer(old, c)
		}
	}})
}

// replacedByPeer notes that the peer made c in place of old. If our own request
// to do so is on its way, its answer decides.
func (s *SA) replacedByPeer(old, c *child) {
	if old.rekeying != nil {
		old.peerNew = c
		return
	}
	old.replaced = c
	s.emit(Rekeyed{Old: old.in, New: c.in})
}
