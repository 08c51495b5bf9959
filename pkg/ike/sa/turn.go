package sa

import (
	"errors"
	"slices"

	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/proto/ikev2"
)

// turn is what an answer to IKE_SA_INIT has made of the machine. A peer may take longer
// over IKE_AUTH than its turn lasts, when somebody has answered beside it: its turn is
// then parked, which means that its request is sent again along with those of others,
// and that a proof ends all other turns whenever it comes. The octets of a request
// stay the same, as do its keys.
type turn struct {
	ike  *ikeSA
	task task

	// Of the handshake.
	nr, response, intI, intR, got []byte
	added                         int
	plain                         *keymat.IKEKeys
	announced

	// Of the SA.
	path
	natt, natLocal, natRemote, ppk, fragments, childless, small bool
}

// turn returns the turn that is on.
func (s *SA) turn() *turn {
	i, h := s.cur, s.cur.hs
	return &turn{i, i.active, h.nr, h.response, h.intI, h.intR, h.got, h.added, h.plain, h.announced,
		s.path(), s.natt, s.natLocal, s.natRemote, s.ppk, s.fragments, s.childless, s.small}
}

// setTurn goes on with t instead of what is on.
func (s *SA) setTurn(t *turn) {
	h := s.cur.hs
	s.ikes[slices.Index(s.ikes, s.cur)] = t.ike
	s.cur.hs = nil
	s.cur, t.ike.hs = t.ike, h
	h.nr, h.response, h.intI, h.intR, h.got, h.added, h.plain, h.announced = t.nr, t.response, t.intI, t.intR, t.got, t.added, t.plain, t.announced
	s.local, s.remote = t.local, t.remote
	s.peer.Local, s.peer.Remote = s.local, s.remote
	s.natt, s.natLocal, s.natRemote, s.ppk, s.fragments, s.childless, s.small = t.natt, t.natLocal, t.natRemote, t.ppk, t.fragments, t.childless, t.small
}

// forgo ends a turn that is not on.
func (s *SA) forgo(t *turn) {
	if a, ok := t.task.(*authTask); ok && a.offer != nil {
		a.offer.wipe()
		s.release(a.offer.spi, a.offer.protos()...)
	} else if !ok && t.task != nil {
		t.task.cancel(s, ErrClosed)
	}
	if t.plain != nil {
		t.plain.Wipe()
	}
	i := t.ike
	i.active, i.req = nil, nil
	i.wipe()
	i.to(StateGone)
}

func (s *SA) forgoParked(h *handshake) {
	for _, t := range h.parked {
		s.forgo(t)
	}
	h.parked = nil
}

// remind sends the requests of parked turns again.
func (s *SA) remind(h *handshake) {
	for _, t := range h.parked {
		r := t.ike.req
		if r.sent > s.rule.Retransmit.Limit {
			continue
		}
		for _, b := range r.data {
			s.send(r.local, r.remote, b, true)
		}
		r.sent++
		s.resent++
	}
}

// comeBack has the first of the parked turns be on instead of i, which has come to
// nothing, as has all else; false if there is none.
func (s *SA) comeBack(i *ikeSA) bool {
	h := i.hs
	if len(h.parked) == 0 {
		return false
	}
	t, old := h.parked[0], s.turn()
	h.parked = h.parked[1:]
	s.setTurn(t)
	s.forgo(old)
	s.first, h.others, h.demands, h.heard, h.nothing = nil, nil, nil, nil, nil
	t.ike.req.due = s.now
	return true
}

// receiveParked takes an answer to the IKE_AUTH request of a parked turn; false if d is
// none. A proof ends the turn that is on, all else the parked one.
func (s *SA) receiveParked(d Datagram, hd ikev2.Header) bool {
	if s.cur == nil || s.cur.hs == nil || !hd.IsResponse() || hd.FromInitiator() || hd.Exchange != ikev2.IKE_AUTH {
		return false
	}
	h := s.cur.hs
	at := slices.IndexFunc(h.parked, func(t *turn) bool {
		return t.ike.local == hd.InitiatorSPI && t.ike.remote == hd.ResponderSPI && t.ike.req.id == hd.MessageID
	})
	if at < 0 {
		return false
	}
	t, on := h.parked[at], s.turn()
	s.setTurn(t)
	i := t.ike
	a := s.take(i, &i.inResponse, d, hd.MessageID)
	if a == nil || !a.whole {
		s.setTurn(on)
		return true
	}
	h.parked = slices.Delete(h.parked, at, at+1)
	if err := s.proven(i, t.task, a); err != nil {
		s.logMessage("received", hd, a.ps, a.octets)
		s.log(levelWarn, "one of several answers to IKE_SA_INIT comes to nothing", attrErr(err))
		s.farewell(i, notify(ikev2.AUTHENTICATION_FAILED))
		s.setTurn(on)
		s.forgo(t)
		return true
	}
	s.forgo(on)
	s.first = nil
	s.handleResponse(i, d, hd, a)
	return true
}

// proven reports why a response is no proof of who the peer is.
func (s *SA) proven(i *ikeSA, t task, a *arrived) error {
	if a.err != nil {
		return a.err
	}
	if critical(a.ps) != nil {
		return errors.New("unknown critical payload in a response")
	}
	ps, err := t.shape().check(a.ps)
	if err != nil {
		return err
	}
	idr, auth := ikev2.Find[*ikev2.IDr](ps), ikev2.Find[*ikev2.Auth](ps)
	if idr == nil || auth == nil {
		return &PeerError{ikev2.IKE_AUTH, refusal(ps).Type}
	}
	if err := s.ppkAnswered(i, ps); err != nil {
		return err
	}
	return s.verify(i, idr.ID, auth, ps)
}
