package sa

import (
	"errors"
	"log/slog"
	"math"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// send emits a datagram.
func (s *SA) send(local, remote netip.AddrPort, data []byte, again bool) {
	s.lastSent = s.now
	s.emit(Send{local, remote, data, again})
}

// request sends a protected request of t, which takes the window of i.
func (s *SA) request(i *ikeSA, t task, x ikev2.ExchangeType, ps ...ikev2.Payload) {
	id := i.nextID
	p, err := s.protect(i, i.header(x, id, false), ps, 0)
	if err != nil || id == math.MaxUint32 {
		// Neither happens in practice: our payloads fit, and rekeying comes
		// before the 2^32nd message (RFC 7296, 2.2).
		s.fail(&LocalError{Exchange: x, Err: errors.Join(err, errors.New("no further request possible"))}, false)
		return
	}
	i.nextID++
	i.active = t
	s.transmit(i, id, x, p)
	s.logMessage("sent", p.m.Header, ps, p.octets())
}

// transmit puts a new request on its way.
func (s *SA) transmit(i *ikeSA, id uint32, x ikev2.ExchangeType, p *sealed) {
	i.req = &request{id: id, exchange: x, sealed: p}
	if s.mob != nil {
		i.req.via, s.mob.via = s.mob.via, path{}
	}
	s.transmission(i.req)
}

// transmission sends r once more and sets the wait that follows, shortened by
// up to a tenth so that two sides do not keep step.
func (s *SA) transmission(r *request) {
	rt := s.rule.Retransmit
	if r.wait *= 2; r.sent == 0 {
		r.wait = rt.Init
	}
	r.wait = max(min(r.wait, rt.Max), time.Millisecond)
	r.due = s.now.Add(r.wait - s.jitter(r.wait/10))
	r.local, r.remote = s.local, s.remote // where the peer is now
	switch {
	case !r.via.local.IsValid():
	case r.sent < checkTries:
		r.local, r.remote = r.via.local, r.via.remote
	default:
		r.strayed = true
	}
	for _, b := range r.data {
		s.send(r.local, r.remote, b, r.sent > 0)
	}
	if r.sent++; r.sent > 1 {
		s.resent++
	}
}

// retransmit sends i's request again, or gives up.
func (s *SA) retransmit(i *ikeSA) {
	r := i.req
	if i.state == StateInitSent && s.initDue(i) {
		return
	}
	if r.sent >= min(answerTries, s.rule.Retransmit.Limit+1) && i.active != nil && s.another(i, i.active, ErrTimeout) {
		return
	}
	if r.sent <= s.rule.Retransmit.Limit {
		if r.sent >= smallAfter && r.m != nil && !s.small {
			s.small = true
			if s.small = s.cut(r.sealed, 0); s.small {
				s.log(levelInfo, "no answer: smaller fragments", slog.Int("fragments", len(r.data)))
			}
		}
		s.transmission(r)
		s.elsewhere(i, r)
		if i.hs != nil {
			s.remind(i.hs)
		}
		return
	}
	if t := i.active; t != nil {
		i.active = nil
		t.cancel(s, ErrTimeout)
	}
	i.req = nil
	switch {
	case i != s.cur: // replaced or redundant: nothing hangs on it
		s.gone(i)
	case i.state == StateDeleting:
		s.fail(ErrClosed, false)
	default:
		s.fail(ErrTimeout, false)
	}
}

// respond answers the request in work. The answer is kept for retransmissions.
func (s *SA) respond(i *ikeSA, ps ...ikev2.Payload) {
	h, _, err := ikev2.ParseHeader(i.from.Data)
	if err != nil {
		return
	}
	p, err := s.protect(i, i.header(h.Exchange, h.MessageID, true), ps, i.limit)
	if err != nil {
		s.fail(&LocalError{Exchange: h.Exchange, Err: err}, false)
		return
	}
	i.lastResp, i.busy = p, false
	for _, b := range p.data {
		s.send(i.from.Local, i.from.Remote, b, false)
	}
	s.logMessage("sent", p.m.Header, ps, p.octets())
	i.from.Data = nil
	if i.hs == nil {
		p.settle()
	}
}

// refuse answers the request in work with one error notify.
func (s *SA) refuse(i *ikeSA, n *ikev2.Notify, why error) {
	s.log(levelWarn, "refused", attrNotify(n.Type), attrErr(why))
	s.respond(i, n)
}

// farewell tells the peer in one message, without waiting for an answer, that
// i ends.
func (s *SA) farewell(i *ikeSA, ps ...ikev2.Payload) {
	if len(ps) == 0 {
		ps = []ikev2.Payload{&ikev2.Delete{Protocol: ikev2.ProtocolIKE}}
	}
	m := &ikev2.Message{Header: i.header(ikev2.INFORMATIONAL, i.nextID, false), Payloads: ps}
	if data, err := m.AppendSealed(nil, i.seal); err == nil {
		i.nextID++
		s.send(s.local, s.remote, data, false)
		s.logMessage("sent", m.Header, ps, len(data))
	}
}

// Receive takes an IKE message.
func (s *SA) Receive(now time.Time, d Datagram) []Output {
	return s.input(now, func() { s.receive(d) })
}

func (s *SA) receive(d Datagram) {
	// As a socket of both families gives IPv4 addresses, nothing would match.
	d.Local, d.Remote = unmap(d.Local), unmap(d.Remote)
	h, _, err := ikev2.ParseHeader(d.Data)
	if err != nil {
		s.counters.Malformed++
		s.noRequest()
		return
	}
	if s.cur == nil && !s.initiator {
		s.receiveInitRequest(d, h)
		s.noRequest()
		return
	}
	if s.receiveParked(d, h) {
		return
	}
	i := s.find(h)
	if i == nil {
		if !s.keepAnswer(d, h) {
			s.counters.Unexpected++
		}
		return
	}
	if h.IsResponse() {
		s.receiveResponse(i, d, h)
	} else {
		s.receiveRequest(i, d, h)
	}
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// noRequest ends a responder whose first datagram was no request to begin with.
func (s *SA) noRequest() {
	if s.cur == nil && !s.initiator {
		s.fail(&LocalError{Exchange: ikev2.IKE_SA_INIT, Err: errors.New("malformed request")}, false)
	}
}

// find returns the IKE SA that a header belongs to. Its Initiator flag says
// which of the SPIs is ours.
func (s *SA) find(h ikev2.Header) *ikeSA {
	local, remote := h.InitiatorSPI, h.ResponderSPI
	if h.FromInitiator() {
		local, remote = remote, local
	}
	for _, i := range s.ikes {
		if i.initiator == h.FromInitiator() {
			continue
		}
		switch {
		case i.local == local && i.remote == remote:
			return i
		case i.state == StateInitSent && i.local == local: // the peer's is not known yet
			return i
		case i.state == StateHalfOpen && local == 0 && i.remote == remote && h.Exchange == ikev2.IKE_SA_INIT:
			return i // its first request, again
		}
	}
	return nil
}

// receiveRequest checks the window and the protection of a request.
func (s *SA) receiveRequest(i *ikeSA, d Datagram, h ikev2.Header) {
	switch {
	case i.expect > 0 && h.MessageID == i.expect-1 && s.again(i, d):
		return
	case h.MessageID != i.expect || i.busy:
		s.counters.MessageID++
		return
	case !i.hasKeys() || h.Exchange == ikev2.IKE_SA_INIT || i.initiator && i.state < StateEstablished:
		// The last: the responder may be ready before its IKE_AUTH response is
		// here; it will ask again.
		s.counters.Unexpected++
		return
	}
	a := s.take(i, &i.inRequest, d, h.MessageID)
	if a == nil || !a.whole {
		return
	}
	i.expect++
	i.setLast(a.head)
	i.busy, i.lastResp, i.from, i.limit = true, nil, d, a.limit
	s.alive(i, d)
	s.logMessage("received", h, a.ps, a.octets)
	i.note(a)
	s.answered(i, false)
	s.handleRequest(i, h, a.ps, a.err)
}

// receiveResponse does so for a response.
func (s *SA) receiveResponse(i *ikeSA, d Datagram, h ikev2.Header) {
	r := i.req
	if r == nil || h.MessageID != r.id {
		s.counters.MessageID++
		return
	}
	if h.Exchange != r.exchange {
		s.counters.Unexpected++
		return
	}
	if h.Exchange == ikev2.IKE_SA_INIT {
		s.receiveInitResponse(i, d, h)
		return
	}
	a := s.take(i, &i.inResponse, d, h.MessageID)
	if a != nil && a.whole {
		s.handleResponse(i, d, h, a)
	}
}

// handleResponse is the rest, for a whole response to i's request.
func (s *SA) handleResponse(i *ikeSA, d Datagram, h ikev2.Header, a *arrived) {
	r := i.req
	ps, err := a.ps, a.err
	s.alive(i, d)
	s.logMessage("received", h, ps, a.octets)
	i.note(a)
	t := i.active
	if i.hs != nil {
		i.asked = r.sealed
	}
	i.req, i.active, i.strayed = nil, nil, r.strayed
	s.found(i, d)
	if n := critical(ps); err == nil && n != nil {
		err = errors.New("unknown critical payload in a response")
	}
	if err == nil {
		ps, err = t.shape().check(ps)
	}
	if err != nil {
		// Both sides no longer agree on what happened (RFC 7296, 2.21.3).
		why := &LocalError{Exchange: h.Exchange, Err: err}
		if i == s.cur {
			s.farewell(i)
			if s.another(i, t, why) {
				return
			}
		}
		t.cancel(s, err)
		if i != s.cur {
			s.gone(i)
			return
		}
		s.fail(why, false)
		return
	}
	t.answer(s, i, ps)
}

func isIntegrity(err error) bool { return errors.Is(err, ikev2.ErrIntegrity) }

// alive notes that something authentic came from the peer, and follows it to a
// new address behind its NAT (RFC 7296, 2.23); whoever is behind a NAT itself
// does not.
func (s *SA) alive(i *ikeSA, d Datagram) {
	s.heard = s.now
	if s.remote == d.Remote && s.local == d.Local {
		return
	}
	// The initiator chooses the port by its IKE_AUTH request.
	if first := i.state == StateHalfOpen; first || s.mob == nil && s.follows() && i == s.cur {
		s.move(d.Local, d.Remote, first)
	}
}

// follows reports whether the peer's address may change: it is behind a NAT, and
// we are not.
func (s *SA) follows() bool { return s.natRemote && !s.natLocal }

// PeerAt says that authentic ESP in UDP of a child SA came from another address
// or port of the peer than the SA has. It counts as an IKE message would
// (RFC 7296, 2.23).
func (s *SA) PeerAt(now time.Time, remote netip.AddrPort) []Output {
	return s.input(now, func() {
		switch {
		case s.cur == nil || s.cur.state != StateEstablished || remote == s.remote || s.local.Port() != s.cfg.NATTPort:
		case s.mob != nil:
			s.mobikeAt(remote)
		case s.follows():
			s.heard = s.now
			s.move(s.local, remote, false)
		}
	})
}

// move goes on with the peer at remote. first: it was never anywhere else.
func (s *SA) move(local, remote netip.AddrPort, first bool) {
	old := s.remote
	s.local, s.remote = local, remote
	s.peer.Local, s.peer.Remote = local, remote
	if first || old == remote {
		return
	}
	m := PeerMoved{Old: old, New: remote}
	for _, c := range s.children {
		if old.Addr() != remote.Addr() {
			if !c.follows(old.Addr()) {
				continue
			}
			m.Moved = append(m.Moved, ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in})
			if !c.deleting && !c.noOut {
				m.Moved = append(m.Moved, ipsec.SAID{Proto: c.proto, Dst: c.outDst, SPI: c.outSPI})
			}
			c.outDst = remote.Addr()
		}
		if c.held != nil && c.held.Encap != nil {
			c.held.Dst, c.held.Encap.DPort = remote.Addr(), remote.Port()
		}
	}
	s.emit(m)
	for _, c := range s.children {
		if old.Addr() != remote.Addr() && c.outDst != remote.Addr() {
			s.wantRekeyChild(c) // its policy names the old address
		}
	}
}

// follows reports whether the SAs of c go to another address of the peer as they
// are: in tunnels whose policy leaves the peer open.
func (c *child) follows(old netip.Addr) bool {
	q := anyRequest(c.policy.Out)
	return c.outDst == old && q != nil && q.AnyPeer()
}
