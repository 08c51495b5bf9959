package sa

import (
	"bytes"
	"errors"
	"slices"

	"github.com/missiu/missiu/proto/ikev2"
)

// Several answers to IKE_SA_INIT (RFC 7296, 2.4). Anybody who sees the request can
// answer before the responder does, and only IKE_AUTH shows who it was. So what else
// comes meanwhile is kept, and has its turn when nothing comes of the one before: no
// answer to what was built on it, or one without proof.

const (
	maxAnswers = 8 // besides the first, in an attempt
	// answerTries is how often a request is sent before another answer has its turn.
	answerTries = 3
)

// keepAnswer keeps one more answer to IKE_SA_INIT; false if d is none.
func (s *SA) keepAnswer(d Datagram, hd ikev2.Header) bool {
	i := s.cur
	if !s.initiator || i == nil || i.hs == nil || i.state == StateInitSent || hd.Exchange != ikev2.IKE_SA_INIT || !hd.IsResponse() ||
		hd.FromInitiator() || hd.MessageID != 0 || hd.InitiatorSPI != i.local || d.Remote != i.hs.at.remote {
		return false
	}
	h := i.hs
	same := func(o Datagram) bool { return bytes.Equal(o.Data, d.Data) }
	if len(h.tried)+len(h.others) > maxAnswers || slices.Contains(h.tried, hd.ResponderSPI) || slices.ContainsFunc(h.others, same) {
		return false
	}
	if ps, err := initAnswer(d.Data); err != nil || refusal(ps) != nil {
		return false
	}
	h.others = append(h.others, d)
	return true
}

// initAnswer reads an answer to IKE_SA_INIT.
func initAnswer(b []byte) ([]ikev2.Payload, error) {
	m, err := ikev2.Parse(b)
	if err != nil {
		return nil, err
	}
	if critical(m.Payloads) != nil {
		return nil, errors.New("unknown critical payload")
	}
	return shapeInitResponse.check(m.Payloads)
}

// another goes on with the next answer to IKE_SA_INIT, in place of the one that t
// rests on, which failed because of why; false if there is none.
func (s *SA) another(i *ikeSA, t task, why error) bool {
	if i != s.cur || s.failed || s.closing || i.hs == nil || len(i.hs.others) == 0 || i.state != StateIntermediate && i.state != StateAuthSent {
		return false
	}
	if a, ok := t.(*authTask); ok && a.offer != nil {
		a.offer.wipe()
		s.release(a.offer.spi, a.offer.protos()...)
		s.first = []ChildRequest{a.offer.req}
	} else if !ok {
		t.cancel(s, why)
	}
	s.log(levelWarn, "another answer to IKE_SA_INIT is tried", attrErr(why))
	h := i.hs
	for len(h.others) > 0 {
		d := h.others[0]
		h.others = h.others[1:]
		h.intI, h.intR, h.got, h.added = nil, nil, nil, 0
		if h.plain != nil {
			h.plain.Wipe()
			h.plain = nil
		}
		// With the same SPI of ours: for all others it is the same IKE SA.
		n := &ikeSA{initiator: true, local: i.local, hs: h, nextID: 1}
		n.to(StateInitSent)
		i.hs, i.active, i.req = nil, nil, nil
		i.wipe()
		i.to(StateGone)
		s.ikes[slices.Index(s.ikes, i)] = n
		i, s.cur = n, n
		s.local, s.remote = h.at.local, h.at.remote
		s.peer.Local, s.peer.Remote = s.local, s.remote
		hd, _, err := ikev2.ParseHeader(d.Data)
		var ps []ikev2.Payload
		if err == nil {
			ps, err = initAnswer(d.Data)
		}
		if err == nil {
			err = s.initDone(i, ps, hd.ResponderSPI, d.Data)
		}
		if err == nil {
			return true
		}
	}
	s.fail(why, false)
	return true
}
