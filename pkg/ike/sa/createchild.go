package sa

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// CREATE_CHILD_SA for a child SA (RFC 7296, 1.3.1 and 1.3.3):
//
//	HDR, SK {[N(REKEY_SA),] SA, Ni, [KEi,] TSi, TSr}  -->
//	                      <--  HDR, SK {SA, Nr, [KEr,] TSi, TSr}
//	                      or   HDR, SK {N(error)}
//
// and, after rekeying, by whoever initiated the SA that stays:
//
//	HDR, SK {D(old)}  -->
//	                      <--  HDR, SK {D(old)}

// createChild asks for a child SA, new or in place of rekeys.
type createChild struct {
	req    ChildRequest
	rekeys *child
	o      *offer
	ke     alg.KE // that the peer wants, KENone: our first
	kes    int    // INVALID_KE_PAYLOADs
	retry  retry
	token  uint32 // of NeedSPI

	// Additional key exchanges, and what was agreed on before them.
	series *series
	g      *granted
}

// wantRekeyChild queues a request to replace c, unless that is under way.
func (s *SA) wantRekeyChild(c *child) {
	is := func(t task) bool { r, ok := t.(*createChild); return ok && r.rekeys == c }
	if c.replaced != nil || c.deleting || s.closing || s.failed || s.cur != nil && is(s.cur.active) ||
		slices.ContainsFunc(s.queue, is) || slices.ContainsFunc(s.delayed, func(d delayed) bool { return is(d.t) }) {
		return
	}
	s.queue = append(s.queue, &createChild{req: ChildRequest{Policy: c.policy, Proposals: c.successors(), Queue: c.queue}, rekeys: c})
}

func (t *createChild) shape() shape {
	if t.series != nil {
		return shapeFollowResponse
	}
	return shapeChildResponse
}

// endSeries forgets the additional key exchanges.
func (t *createChild) endSeries() {
	t.series.wipe()
	if t.g != nil {
		t.g.wipe()
	}
	t.series, t.g = nil, nil
}

func (t *createChild) cancel(s *SA, err error) {
	t.endSeries()
	switch {
	case t.o != nil:
		s.abandon(t.o, err)
	case t.rekeys == nil:
		s.emit(ChildFailed{t.req.Seq, t.req.Policy, err})
	}
	if t.rekeys != nil {
		t.rekeys.rekeying = nil
	}
	t.o = nil
}

// drop gives the offer up; nothing has failed.
func (t *createChild) drop(s *SA) {
	t.endSeries()
	t.o.wipe()
	s.release(t.o.spi, t.o.protos()...)
	t.o = nil
}

// pointless reports whether what was to be rekeyed is gone or going.
func (t *createChild) pointless() bool {
	c := t.rekeys
	return c != nil && (c.removed || c.deleting || c.replaced != nil)
}

func (t *createChild) start(s *SA, i *ikeSA) {
	if t.pointless() {
		return
	}
	o, err := s.newOffer(i, t.req, t.rekeys)
	if err != nil {
		if t.rekeys == nil {
			s.emit(ChildFailed{t.req.Seq, t.req.Policy, err})
		}
		level := levelWarn
		if err.Err == errQueuesFull {
			level = levelDebug // told when the peer said so
		}
		s.log(level, "child SA failed", attrErr(err))
		return
	}
	t.o, i.active = o, t
	t.token = s.needSPI(o.req.Policy, o.mode, o.protos(), o.req.Queue, o.req.Seq, spiWait{ike: i, then: func(spi ipsec.SPI, err error) {
		i.active = nil
		switch {
		case err != nil:
			t.cancel(s, &LocalError{Exchange: ikev2.CREATE_CHILD_SA, Err: fmt.Errorf("no SPI: %w", err)})
		case t.pointless(): // the peer was quicker
			s.release(spi, o.protos()...)
			t.o = nil
		default:
			o.spi = spi
			t.send(s, i)
		}
	}})
}

// send sends the request with a fresh nonce and key.
func (t *createChild) send(s *SA, i *ikeSA) {
	o := t.o
	o.wipe()
	o.key = nil
	ke := t.ke
	if ke == alg.KENone {
		ke = proposal.FirstKE(o.proposals)
	}
	if ke != alg.KENone {
		var err error
		if o.key, err = dh.Generate(ke, s.rand); err != nil {
			t.cancel(s, &LocalError{Exchange: ikev2.CREATE_CHILD_SA, Err: err})
			return
		}
	}
	o.ni = s.newNonce()
	if t.rekeys != nil {
		t.rekeys.rekeying = t
	}
	s.request(i, t, ikev2.CREATE_CHILD_SA, o.payloads(false)...)
}

func (t *createChild) answer(s *SA, i *ikeSA, ps []ikev2.Payload) {
	if n := refusal(ps); n != nil {
		t.refused(s, i, n)
		return
	}
	o, old := t.o, t.rekeys
	g, err := t.goOn(s, i, ps)
	if g == nil && err == nil {
		return // more key exchanges
	}
	var c *child
	if err != nil {
		s.orphan(o, &LocalError{Exchange: ikev2.CREATE_CHILD_SA, Err: err})
	} else {
		t.g = nil // its keys are the child SA's
		c = s.acceptGranted(i, o, g, ikev2.CREATE_CHILD_SA)
	}
	t.endSeries()
	t.o = nil
	if old == nil {
		return
	}
	p := old.peerNew
	old.rekeying, old.peerNew = nil, nil
	switch {
	case c == nil && p != nil:
		old.replaced = p
		s.emit(Rekeyed{Old: old.in, New: p.in})
	case c == nil:
	case p != nil && lowest(c.ni, c.nr, p.ni, p.nr):
		// Both sides rekeyed. Ours has the lowest of the four nonces: it is
		// redundant, and we close it; the peer closes the old one
		// (RFC 7296, 2.8.1).
		old.replaced = p
		s.emit(Rekeyed{Old: old.in, New: p.in})
		s.deleteChild(c, ErrRedundant)
	default:
		if p != nil {
			p.dropHeld() // the peer closes it
		}
		s.emit(Rekeyed{Old: old.in, New: c.in})
		s.deleteChild(old, ErrRekeyed)
	}
}

// goOn takes a good answer, and returns what was agreed on once all key
// exchanges are over.
func (t *createChild) goOn(s *SA, i *ikeSA, ps []ikev2.Payload) (*granted, error) {
	over := false
	var err error
	if t.series == nil {
		if t.g, err = s.checkAnswer(t.o, ps, false); err == nil {
			t.g.ni, t.g.nr = t.o.ni, ikev2.Find[*ikev2.Nonce](ps).Data
			t.series = &series{methods: t.g.suite.AddKE.Methods()}
			over = len(t.series.methods) == 0
		}
	} else {
		over, err = t.series.took(ps)
	}
	switch {
	case err != nil:
		return nil, err
	case !over:
		return nil, t.series.next(s, i, t, ps)
	}
	t.g.more, t.series.secrets = t.series.secrets, nil
	return t.g, nil
}

// refused is what follows an error notify.
func (t *createChild) refused(s *SA, i *ikeSA, n *ikev2.Notify) {
	err := &PeerError{ikev2.CREATE_CHILD_SA, n.Type}
	old := t.rekeys
	if old != nil {
		old.rekeying = nil
		if p := old.peerNew; p != nil { // the peer's own one stays
			old.peerNew, old.replaced = nil, p
			s.emit(Rekeyed{Old: old.in, New: p.in})
			t.drop(s)
			return
		}
	}
	switch n.Type {
	case ikev2.INVALID_KE_PAYLOAD:
		if len(n.Data) == 2 && t.series == nil {
			ke := alg.KE(binary.BigEndian.Uint16(n.Data))
			offered := slices.ContainsFunc(t.o.proposals, func(c proposal.Child) bool { return slices.Contains(c.KE, ke) })
			if t.kes++; t.kes <= maxKETries && offered && ke != alg.KENone && (t.o.key == nil || ke != t.o.key.KE()) {
				t.ke = ke
				t.send(s, i)
				return
			}
		}
	case ikev2.TEMPORARY_FAILURE, ikev2.STATE_NOT_FOUND:
		switch {
		case s.closing || t.pointless():
		case s.retryLater(&t.retry, t):
			t.drop(s)
			return
		case old != nil && s.outOfSync():
			t.cancel(s, err)
			s.farewell(i)
			s.fail(err, false)
			return
		}
	case ikev2.CHILD_SA_NOT_FOUND:
		// The peer has lost it: from scratch, without the old one (RFC 7296, 2.25).
		if old != nil && !old.removed {
			t.cancel(s, err)
			s.removeChild(old, err)
			if !s.closing {
				s.queue = append(s.queue, &createChild{req: t.req})
			}
			return
		}
	case ikev2.INVALID_SYNTAX: // fatal for both sides (RFC 7296, 2.21.3)
		t.cancel(s, err)
		s.fail(err, false)
		return
	}
	if t.o.fallback != nil { // whatever it has against it, it has against others
		t.o.fallback.full = true
	}
	t.cancel(s, err)
}

// lowest reports whether the lowest of four nonces, compared octet by octet, is
// one of the first two.
func lowest(a1, a2, b1, b2 []byte) bool {
	low := func(x, y []byte) []byte {
		if bytes.Compare(x, y) < 0 {
			return x
		}
		return y
	}
	return bytes.Compare(low(a1, a2), low(b1, b2)) < 0
}
