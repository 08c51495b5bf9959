package sa

import (
	"bytes"
	"log/slog"
	"slices"

	"github.com/missiu/missiu/proto/ikev2"
)

// update tells the peer where we are.
type update struct {
	at     path
	cookie []byte
}

func isUpdate(t task) bool {
	_, ok := t.(*update)
	return ok
}

func (*update) shape() shape { return shapeInformational }

func (t *update) cancel(s *SA, _ error) { s.resume(t) }

// wantUpdate queues one, in front of all else.
func (s *SA) wantUpdate() {
	if s.failed || s.closing || slices.ContainsFunc(s.queue, isUpdate) {
		return
	}
	s.queue = slices.Insert(s.queue, 0, task(&update{}))
}

func (t *update) start(s *SA, i *ikeSA) {
	m := s.mob
	if !m.pending {
		return
	}
	m.pending = false
	t.at, t.cookie = s.path(), s.random(cookie2Len)
	ps := append([]ikev2.Payload{notify(ikev2.UPDATE_SA_ADDRESSES)}, s.natPayloads(i, s.local, s.remote)...)
	ps = append(ps, s.noNATs(s.path())...)
	ps = append(ps, notify(ikev2.COOKIE2, t.cookie...))
	if l := s.additional(); !slices.Equal(l, m.told) {
		m.told = l
		ps = append(ps, allAdditional(l)...)
	}
	s.request(i, t, ikev2.INFORMATIONAL, ps...)
}

func (t *update) answer(s *SA, i *ikeSA, ps []ikev2.Payload) {
	m := s.mob
	if s.fatalAnswer(ps); s.failed || !s.cookieFits(i, t.cookie, ps) {
		return
	}
	// Which address the peer has noted is not known of a request that was sent
	// from several (RFC 4555, 3.5).
	if t.at != s.path() || i.strayed {
		m.pending = true
		s.wantUpdate()
		return
	}
	switch n := refusal(ps); {
	case n == nil:
	case n.Type == ikev2.UNEXPECTED_NAT_DETECTED && m.nats < natTries:
		m.nats++
		m.pending = true
		s.delayed = append(s.delayed, delayed{s.now.Add(retryMin), &update{}})
		s.log(levelWarn, "the peer sees other addresses than we send from; once more", attrNotify(n.Type))
		return
	case n.Type == ikev2.UNACCEPTABLE_ADDRESSES || n.Type == ikev2.UNEXPECTED_NAT_DETECTED:
		m.nats = 0
		s.notThere(t.at, n)
		return
	default:
		s.log(levelWarn, "the peer did not follow", attrNotify(n.Type))
		return
	}
	m.nats = 0
	s.nextNAT(i, ps)
}

// notThere: the peer does not want us at p; the next pair is tried.
func (s *SA) notThere(p path, n *ikev2.Notify) {
	s.log(levelWarn, "the peer does not accept our addresses", slog.String("addresses", p.String()), attrNotify(n.Type))
	if s.mob.bad == nil {
		s.mob.bad = map[path]bool{}
	}
	s.mob.bad[p] = true
	if ways := s.ways(); len(ways) > 0 {
		s.relocate(ways[0])
	}
}

// nextNAT goes by what an answer of the peer says of NATs on the path in use.
func (s *SA) nextNAT(i *ikeSA, ps []ikev2.Payload) {
	v := s.lookForNAT(i, ps, s.local, s.remote)
	if !v.said {
		return
	}
	s.mob.seen, s.mob.seenOn = v.dst, i.local
	if s.setNAT(v) {
		s.log(levelInfo, "NAT on the path", slog.Bool("nat_local", s.natLocal), slog.Bool("nat_remote", s.natRemote))
		s.moveChildren()
	}
}

// probeNAT is what a liveness check asks besides: does the peer still see us
// where it did (RFC 4555, 3.8)?
func (s *SA) probeNAT(i *ikeSA) []ikev2.Payload {
	if s.mob == nil || !s.initiator || !s.natt {
		return nil
	}
	return s.natPayloads(i, s.local, s.remote)
}

// probeAnswered compares.
func (s *SA) probeAnswered(i *ikeSA, ps []ikev2.Payload) {
	m := s.mob
	if m == nil || !s.initiator || i.strayed || i != s.cur {
		return
	}
	v := s.lookForNAT(i, ps, s.local, s.remote)
	if !v.said {
		return
	}
	changed := v.local != s.natLocal || v.remote != s.natRemote || v.local && (m.seenOn != i.local || m.seen != v.dst)
	m.seen, m.seenOn = v.dst, i.local
	if changed {
		s.log(levelInfo, "the peer sees us elsewhere: a NAT has changed")
		m.pending = true
		s.wantUpdate()
	}
}

// tell tells the peer our additional addresses.
type tell struct{}

func isTell(t task) bool {
	_, ok := t.(*tell)
	return ok
}

func (*tell) shape() shape { return shapeInformational }

func (t *tell) cancel(s *SA, _ error) { s.resume(t) }

func (s *SA) wantTell() {
	if s.failed || s.closing || slices.Equal(s.additional(), s.mob.told) || slices.ContainsFunc(s.queue, isTell) {
		return
	}
	s.queue = append(s.queue, &tell{})
}

func (t *tell) start(s *SA, i *ikeSA) {
	l := s.additional()
	if slices.Equal(l, s.mob.told) {
		return // an update has said it
	}
	s.mob.told = l
	s.request(i, t, ikev2.INFORMATIONAL, append(allAdditional(l), s.noNATs(s.path())...)...)
}

func (t *tell) answer(s *SA, _ *ikeSA, ps []ikev2.Payload) { s.fatalAnswer(ps) }

// check asks whether the peer is where it seems to be, before SAs go there
// (RFC 4555, 3.7).
type check struct {
	at     path
	cookie []byte
}

func (*check) shape() shape { return shapeInformational }

func (t *check) cancel(s *SA, _ error) { s.resume(t) }

func isCheck(t task) bool {
	_, ok := t.(*check)
	return ok
}

func (s *SA) wantCheck(p path) {
	s.queue = slices.DeleteFunc(s.queue, isCheck) // the latest counts
	s.queue = slices.Insert(s.queue, 0, task(&check{at: p}))
}

func (t *check) start(s *SA, i *ikeSA) {
	t.cookie = s.random(cookie2Len)
	if t.at != s.path() { // nobody but a packet's source has said so: to there alone at first
		s.mob.via = t.at
	}
	s.request(i, t, ikev2.INFORMATIONAL, notify(ikev2.COOKIE2, t.cookie...))
}

func (t *check) answer(s *SA, i *ikeSA, ps []ikev2.Payload) {
	if s.fatalAnswer(ps); s.failed || !s.cookieFits(i, t.cookie, ps) {
		return
	}
	switch {
	case i.strayed && t.at == s.path():
		s.wantCheck(t.at)
	case i.strayed:
		s.log(levelInfo, "the peer does not answer from where it seems to be; SAs stay", slog.String("addresses", t.at.String()))
	case t.at == s.path():
		s.moveChildren()
	case s.initiator:
		s.relocate(t.at)
	default:
		s.moveTo(t.at)
		s.moveChildren()
	}
}

// cookieFits checks the COOKIE2 of an answer. Another one ends the IKE SA
// (RFC 4555, 3.7): nobody who has the keys makes such an answer.
func (s *SA) cookieFits(i *ikeSA, want []byte, ps []ikev2.Payload) bool {
	if n := ikev2.FindNotify(ps, ikev2.COOKIE2); n != nil && bytes.Equal(n.Data, want) || refusal(ps) != nil && ikev2.FindNotify(ps, ikev2.COOKIE2) == nil {
		return true
	}
	if i == s.cur {
		s.farewell(i)
		s.fail(&LocalError{Exchange: ikev2.INFORMATIONAL, Err: errCookie2}, false)
	}
	return false
}

// resume begins once more, on the IKE SA in use, what ended with the one that it
// was on.
func (s *SA) resume(t task) {
	if s.failed || s.closing || s.mob == nil {
		return
	}
	switch t := t.(type) {
	case *update:
		s.mob.pending = true
		s.wantUpdate()
	case *tell:
		s.mob.told = nil
		s.wantTell()
	case *check:
		if !slices.ContainsFunc(s.queue, isCheck) {
			s.wantCheck(t.at)
		}
	}
}

// harmless reports whether t neither makes nor ends an SA, so that it may be
// answered before or after anything else.
func harmless(t task) bool {
	switch t.(type) {
	case *probe, *update, *tell, *check:
		return true
	}
	return false
}
