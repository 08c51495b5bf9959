package sa

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/proto/ikev2"
)

// Several answers to IKE_SA_INIT (RFC 7296, 2.4). Anybody who sees the request can
// answer before the responder does, and only IKE_AUTH shows who it was. So what else
// comes meanwhile is kept, and has its turn when nothing comes of the one before: no
// answer so far to what was built on it (see turn), or one without proof. If nothing
// else has come yet, it is waited for until the request would have been sent again:
// who answered may only have been quicker. So with nobody else there, a refusal by the
// responder is believed after one such wait, or two if there was a cookie.

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
	if len(h.tried)+len(h.others)+len(h.demands) > maxAnswers || slices.Contains(h.tried, hd.ResponderSPI) || slices.ContainsFunc(slices.Concat(h.others, h.demands), same) {
		return false
	}
	ps, err := initAnswer(d.Data)
	switch {
	case err != nil:
		return false
	case h.demanded(ps):
		h.demands = append(h.demands, d)
	case refusal(ps) != nil || ikev2.Find[*ikev2.SA](ps) == nil:
		return false
	default:
		h.others = append(h.others, d)
	}
	return true
}

// demanded reports whether ps ask for the request in another form than the last.
func (h *handshake) demanded(ps []ikev2.Payload) bool {
	if n := ikev2.FindNotify(ps, ikev2.COOKIE); n != nil && ikev2.Find[*ikev2.SA](ps) == nil {
		return !bytes.Equal(n.Data, h.cookie)
	}
	n := refusal(ps)
	return n != nil && n.Type == ikev2.INVALID_KE_PAYLOAD && len(n.Data) == 2 && alg.KE(binary.BigEndian.Uint16(n.Data)) != h.key.KE()
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
	if ikev2.FindNotify(m.Payloads, ikev2.COOKIE) != nil && ikev2.Find[*ikev2.SA](m.Payloads) == nil {
		return m.Payloads, nil
	}
	return shapeInitResponse.check(m.Payloads)
}

// another goes on with the next answer to IKE_SA_INIT, in place of the one that t
// rests on, which failed because of why, or waits for one; false if there is none and
// it is too late.
func (s *SA) another(i *ikeSA, t task, why error) bool {
	if i != s.cur || s.failed || s.closing || i.hs == nil || i.state != StateIntermediate && i.state != StateAuthSent {
		return false
	}
	h := i.hs
	silent := errors.Is(why, ErrTimeout)
	if len(h.others)+len(h.demands)+len(h.heard) == 0 && !s.now.Before(h.late) && !h.mayDoWithout(why) && (silent || len(h.parked) == 0) {
		return false
	}
	old := s.turn()
	park := silent && i.state == StateAuthSent
	if a, ok := t.(*authTask); ok && a.offer != nil {
		s.first = []ChildRequest{a.offer.req}
	}
	old.task = t
	for {
		h.intI, h.intR, h.got, h.added, h.plain = nil, nil, nil, 0, nil
		// With the same SPI of ours: for all others it is the same IKE SA.
		n := &ikeSA{initiator: true, local: i.local, hs: h, nextID: 1}
		n.to(StateInitSent)
		i.hs = nil
		s.ikes[slices.Index(s.ikes, i)] = n
		if park {
			h.parked = append(h.parked, old)
			park = false
		} else {
			s.forgo(old)
		}
		i, s.cur = n, n
		s.local, s.remote = h.at.local, h.at.remote
		s.peer.Local, s.peer.Remote = s.local, s.remote
		if len(h.others) > 0 {
			s.log(levelWarn, "another answer to IKE_SA_INIT is tried", attrErr(why))
			d := h.others[0]
			h.others = h.others[1:]
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
			old = s.turn()
			continue
		}
		// As if the request had not been answered but by what was kept.
		h.nothing = why
		i.req = &request{exchange: ikev2.IKE_SA_INIT, sealed: &sealed{data: [][]byte{h.request}}, local: s.local, remote: s.remote, sent: 1, due: h.late}
		s.awaitTurn(i)
		for r := i.req; i.req == r && len(h.demands) > 0; {
			d := h.demands[0]
			h.demands = h.demands[1:]
			if hd, _, err := ikev2.ParseHeader(d.Data); err == nil {
				s.receiveInitResponse(i, d, hd)
			}
		}
		if s.failed || h.nothing == nil || len(h.heard) > 0 || s.now.Before(h.late) || s.withoutCookie(i, why) {
			return true
		}
		if !s.comeBack(i) {
			s.fail(why, false)
		}
		return true
	}
}
