package sa

import (
	"errors"
	"slices"

	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// INFORMATIONAL (RFC 7296, 1.4): liveness, deletion, errors.
//
//	HDR, SK {[D,] [N]}  -->
//	                      <--  HDR, SK {[D]}

// probe asks whether the peer lives (RFC 7296, 2.4).
type probe struct{}

func (*probe) shape() shape { return shapeInformational }

func (*probe) cancel(*SA, error) {}

func (t *probe) start(s *SA, i *ikeSA) { s.request(i, t, ikev2.INFORMATIONAL, s.probeNAT(i)...) }

func (t *probe) answer(s *SA, i *ikeSA, ps []ikev2.Payload) { s.probeAnswered(i, ps) }

// deleteChild deletes a child SA, or (c is nil) one that only the peer has,
// whose SPI would have been spi.
type deleteChild struct {
	c      *child
	proto  ipsec.Protocol
	spi    ipsec.SPI
	reason error
}

func (*deleteChild) shape() shape { return shapeInformational }

func (*deleteChild) cancel(*SA, error) {}

// deleteChild takes c out of use for sending and queues its Delete; it goes on
// receiving until the peer has answered.
func (s *SA) deleteChild(c *child, reason error) {
	if c.deleting || c.removed || s.failed {
		return
	}
	s.useHeld(c)
	c.dropHeld()
	r := c.remove(reason)
	r.In.SPI = 0
	c.deleting = true
	if !c.noOut {
		s.emit(r)
	}
	s.queue = append(s.queue, &deleteChild{c: c, proto: c.proto, spi: c.in, reason: reason})
}

func (t *deleteChild) start(s *SA, i *ikeSA) {
	if t.c != nil && t.c.removed {
		return // the peer was quicker
	}
	s.request(i, t, ikev2.INFORMATIONAL, &ikev2.Delete{Protocol: proposal.ProtocolID(t.proto), SPIs: []uint32{uint32(t.spi)}})
}

func (t *deleteChild) answer(s *SA, i *ikeSA, ps []ikev2.Payload) {
	// Whatever the peer says of it, it is gone (RFC 7296, 1.4.1).
	if t.c != nil {
		s.removeChild(t.c, t.reason)
	}
	s.fatalAnswer(ps)
}

// fatalAnswer ends the lineage if the peer could not read our request.
func (s *SA) fatalAnswer(ps []ikev2.Payload) {
	if ikev2.FindNotify(ps, ikev2.INVALID_SYNTAX) != nil {
		s.fail(&PeerError{ikev2.INFORMATIONAL, ikev2.INVALID_SYNTAX}, false)
	}
}

// deleteIKE deletes the IKE SA that it is started on: the one in use at the end
// of the lineage, or one that rekeying left over.
type deleteIKE struct{}

func (*deleteIKE) shape() shape { return shapeInformational }

func (*deleteIKE) cancel(*SA, error) {}

func (t *deleteIKE) start(s *SA, i *ikeSA) {
	if i.active != nil {
		i.then = t
		return
	}
	i.to(StateDeleting)
	if i != s.cur {
		i.dropAt = s.now.Add(staleAfter)
	}
	s.request(i, t, ikev2.INFORMATIONAL, &ikev2.Delete{Protocol: ikev2.ProtocolIKE})
}

func (t *deleteIKE) answer(s *SA, i *ikeSA, _ []ikev2.Payload) {
	if i == s.cur {
		s.fail(ErrClosed, false)
		return
	}
	s.gone(i)
}

// syntax answers what cannot be understood, under protection; that ends the IKE
// SA on both sides (RFC 7296, 2.21.3).
func (s *SA) syntax(i *ikeSA, x ikev2.ExchangeType, err error) {
	s.refuse(i, notify(ikev2.INVALID_SYNTAX), err)
	le := &LocalError{x, ikev2.INVALID_SYNTAX, err}
	if i != s.cur {
		s.bury(i, true)
		return
	}
	s.fail(le, true)
}

// handleRequest serves an authentic request whose contents are ps, or could
// not be read because of err.
func (s *SA) handleRequest(i *ikeSA, h ikev2.Header, ps []ikev2.Payload, err error) {
	if err != nil {
		s.syntax(i, h.Exchange, err)
		return
	}
	if n := critical(ps); n != nil {
		err := errors.New("unknown critical payload")
		s.refuse(i, n, err)
		if i.state == StateHalfOpen { // RFC 7296, 2.21.2
			s.fail(&LocalError{h.Exchange, n.Type, err}, true)
		}
		return
	}
	sh, f := s.handler(i, h.Exchange, ps)
	if f == nil {
		// An exchange that does not fit the state: INVALID_SYNTAX would kill
		// what may be fine, so the peer only hears that it is not for now.
		if i.state == StateHalfOpen {
			s.syntax(i, h.Exchange, errors.New("not the exchange that comes next"))
			return
		}
		s.counters.Unexpected++
		s.refuse(i, notify(ikev2.TEMPORARY_FAILURE), errors.New("exchange not expected"))
		return
	}
	kept, err := sh.check(ps)
	if err != nil {
		s.syntax(i, h.Exchange, err)
		return
	}
	f(i, kept)
}

// handler returns the shape and the handler of a request in i's state.
func (s *SA) handler(i *ikeSA, x ikev2.ExchangeType, ps []ikev2.Payload) (shape, func(*ikeSA, []ikev2.Payload)) {
	if i.state == StateHalfOpen {
		switch left := i.hs.added < len(i.suite.AddKE.Methods()); {
		case left && x == ikev2.IKE_INTERMEDIATE:
			return shapeIntermediateRequest, s.intermediateRequest
		case !left && x == ikev2.IKE_AUTH:
			return shapeAuthRequest, s.authRequest
		}
		return shape{}, nil
	}
	if i.state < StateEstablished {
		return shape{}, nil
	}
	switch x {
	case ikev2.INFORMATIONAL:
		return shapeInformational, s.informational
	case ikev2.IKE_FOLLOWUP_KE:
		return shapeFollowRequest, s.followRequest
	case ikev2.CREATE_CHILD_SA:
		if forIKE(ps) {
			return shapeRekeyRequest, s.rekeyRequest
		}
		return shapeChildRequest, s.childRequest
	}
	return shape{}, nil
}

// forIKE: CREATE_CHILD_SA is to replace the IKE SA. Beside the proposals that say so
// there may be some of protocols that we do not know.
func forIKE(ps []ikev2.Payload) bool {
	sa := ikev2.Find[*ikev2.SA](ps)
	return sa != nil && ikev2.Find[*ikev2.TSi](ps) == nil &&
		slices.ContainsFunc(sa.Proposals, func(p ikev2.Proposal) bool { return p.Protocol == ikev2.ProtocolIKE })
}

// informational answers a request of that exchange.
func (s *SA) informational(i *ikeSA, ps []ikev2.Payload) {
	var answer []ikev2.Payload
	for _, p := range ps {
		switch p := p.(type) {
		case *ikev2.Delete:
			if p.Protocol == ikev2.ProtocolIKE {
				s.deletedByPeer(i)
				return
			}
			if proto, ok := proposal.ProtocolOf(p.Protocol); ok {
				if spis := s.childrenDeleted(i, proto, p.SPIs); len(spis) > 0 {
					answer = append(answer, &ikev2.Delete{Protocol: p.Protocol, SPIs: spis})
				}
			}
		case *ikev2.Notify:
			if p.Type == ikev2.AUTH_LIFETIME {
				s.hearAuthLifetime(p)
			}
			if !p.Type.IsError() {
				continue
			}
			s.log(levelWarn, "peer reports an error", attrNotify(p.Type))
			if p.Type == ikev2.AUTHENTICATION_FAILED {
				// We took the initiator for authenticated, it does not
				// us (RFC 7296, 2.21.2).
				s.respond(i)
				s.fail(&PeerError{ikev2.INFORMATIONAL, p.Type}, true)
				return
			}
		}
	}
	s.respond(i, append(answer, s.mobikeRequest(i, ps)...)...)
}

// childrenDeleted removes child SAs that the peer deletes and returns the SPIs
// of the other direction. What we are deleting ourselves is not named again
// (RFC 7296, 1.4.1), nor what does not exist.
func (s *SA) childrenDeleted(i *ikeSA, proto ipsec.Protocol, in []uint32) (out []uint32) {
	for _, v := range in {
		c := s.childOut(proto, ipsec.SPI(v))
		if c == nil {
			if o := i.inFlight(); o != nil && len(o.deleted) < maxDeleted {
				o.deleted = append(o.deleted, peerSPI{proto, ipsec.SPI(v)})
			}
			continue
		}
		if v, _ := s.judge(i, askClose, c); v != unnamed {
			out = append(out, uint32(c.in))
		}
		reason := ErrPeerDeleted
		if c.replaced != nil || c.peerNew != nil {
			reason = ErrRekeyed
		}
		s.removeChild(c, reason)
	}
	return out
}

// deletedByPeer answers a Delete of the IKE SA that it came in.
func (s *SA) deletedByPeer(i *ikeSA) {
	s.respond(i)
	p := i.peerNew
	switch {
	case i != s.cur:
		s.bury(i, true)
	case p != nil:
		// Both sides rekeyed, and the peer has decided: its IKE SA stays, our
		// request is forgotten (RFC 7296, 2.25.2).
		if t := i.active; t != nil {
			i.active, i.req = nil, nil
			t.cancel(s, ErrRekeyed)
		}
		s.settle(i, p, nil)
		s.bury(i, true)
	case s.closing:
		s.fail(ErrClosed, true)
	default:
		s.fail(ErrPeerDeleted, true)
	}
}
