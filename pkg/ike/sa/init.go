package sa

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// IKE_SA_INIT (RFC 7296, 1.2):
//
//	HDR(SPIi, 0), [N(COOKIE)], SAi1, KEi, Ni, N(NAT…)  -->
//	                   <--  HDR(SPIi, SPIr), SAr1, KEr, Nr, N(NAT…)
//	                   or   N(COOKIE), N(INVALID_KE_PAYLOAD), another error
//
// Nothing here is authenticated. AUTH will cover both messages, so a lie is
// found out later; until then it must cost us as little as possible. Whoever sees
// the request can answer it sooner than the responder does, so what such an answer
// asks for is done beside what was begun:
//
//	INVALID_KE_PAYLOAD   a request with the other method follows; the answer to one
//	                     that went before is as good, by its method
//	COOKIE               see cookie.go
//	other errors         the request is sent again after a moment; the error counts
//	                     if each of refusedTries has it, or at the end of all
//	                     retransmissions
//
// A whole answer, with a key exchange of its own, is believed until AUTH; what else
// comes is kept for when it comes to nothing (RFC 7296, 2.4; see another).

// handshake is what the first two exchanges need and nothing after them.
type handshake struct {
	ni, nr []byte
	initRequest
	before       []initRequest // by other methods, which may yet be answered
	response     []byte
	cookie       []byte   // in request
	heard        [][]byte // cookies demanded since, which have their turn
	spent        []byte   // a cookie that was in a request whose proof has failed
	cookies, kes int      // how many were brought back, and how often a method was demanded

	refused  error // what the peer, or somebody, answered
	refusals int   // how many transmissions were answered so
	again    bool  // so was the last one
	nothing  error // why nothing came of whole answers, while only others are waited for

	// IKE_INTERMEDIATE: the chains over the messages of either side so far, what
	// is covered of the message just received, and how many exchanges are done.
	intI, intR, got []byte
	added           int
	plain           *keymat.IKEKeys // SK_d, SK_pi, SK_pr without PPK, while the peer may do without
	at              path            // of IKE_SA_INIT
	others          []Datagram      // further answers to it
	demands         []Datagram      // what came beside them, COOKIE and INVALID_KE_PAYLOAD
	tried           []SPI           // the responder's in those that have had their turn
	late            time.Time       // when no other one is waited for any more
	parked          []*turn         // those that have had their turn in vain so far
	announced
}

// initRequest is an IKE_SA_INIT request of ours; of the peer's only its octets.
type initRequest struct {
	key     dh.PrivateKey
	request []byte // as sent, for AUTH
}

func (h *handshake) wipe() {
	if h == nil {
		return
	}
	for _, r := range append(h.before, h.initRequest) {
		if r.key != nil {
			r.key.Wipe()
		}
	}
	clear(h.got) // the inside of a protected message
	if h.plain != nil {
		h.plain.Wipe()
	}
}

// startInit makes the first IKE SA and sends its first request.
func (s *SA) startInit() {
	i := &ikeSA{initiator: true, local: s.newSPI(), hs: &handshake{ni: s.newNonce()}}
	s.ikes, s.cur = append(s.ikes, i), i
	s.emit(NewIKESA{Local: i.local, Initiator: true})
	if err := s.newKE(i, s.rule.Proposals[0].KE[0]); err != nil {
		s.fail(&LocalError{Exchange: ikev2.IKE_SA_INIT, Err: err}, false)
		return
	}
	i.to(StateInitSent)
	s.sendInit(i)
}

// newKE goes on with another method, and keeps what went before.
func (s *SA) newKE(i *ikeSA, ke alg.KE) (err error) {
	h := i.hs
	var r initRequest
	if n := slices.IndexFunc(h.before, func(r initRequest) bool { return r.key.KE() == ke }); n >= 0 {
		r = h.before[n]
		h.before = slices.Delete(h.before, n, n+1)
	} else if r.key, err = dh.Generate(ke, s.rand); err != nil {
		return err
	}
	if h.key != nil {
		h.before = append(h.before, h.initRequest)
	}
	h.initRequest = r
	return nil
}

// by is our request with a method.
func (h *handshake) by(ke alg.KE) (initRequest, bool) {
	for _, r := range append([]initRequest{h.initRequest}, h.before...) {
		if r.key.KE() == ke {
			return r, true
		}
	}
	return initRequest{}, false
}

// choose has the request with a method be the one that was answered.
func (h *handshake) choose(ke alg.KE) {
	if n := slices.IndexFunc(h.before, func(r initRequest) bool { return r.key.KE() == ke }); n >= 0 {
		h.initRequest, h.before[n] = h.before[n], h.initRequest
	}
}

// hasten has the wait of i's request end after a moment.
func (s *SA) hasten(i *ikeSA, moment time.Duration) {
	i.req.due = earliest(i.req.due, s.now.Add(moment))
}

// refuseInit takes note of an answer that is of no use.
func (s *SA) refuseInit(i *ikeSA, err error) {
	h := i.hs
	if h.nothing != nil {
		return
	}
	if h.refused = err; !h.again {
		h.again = true
		h.refusals++
		s.hasten(i, s.rule.Retransmit.Init/4)
	}
}

// initDue is what the end of a wait means to IKE_SA_INIT; false if no more than to
// other requests.
func (s *SA) initDue(i *ikeSA) bool {
	h := i.hs
	switch {
	case len(h.heard) > 0 && (h.cookies < maxCookies || i.req.sent <= s.rule.Retransmit.Limit):
		s.nextCookie(i)
	case h.nothing != nil:
		if !s.withoutCookie(i, h.nothing) && !s.comeBack(i) {
			s.fail(h.nothing, false)
		}
	case h.refusals >= refusedTries, h.refused != nil && i.req.sent > s.rule.Retransmit.Limit:
		s.fail(h.refused, false)
	default:
		h.again = false
		return false
	}
	return true
}

// sendInit sends IKE_SA_INIT: SPI, nonce and offer stay the same whatever the
// responder demands (RFC 7296, 2.6 and 2.7); the message ID stays 0.
func (s *SA) sendInit(i *ikeSA) {
	h := i.hs
	var ps []ikev2.Payload
	if h.cookie != nil {
		ps = append(ps, &ikev2.Notify{Type: ikev2.COOKIE, Data: h.cookie})
	}
	ps = append(ps, proposal.OfferIKE(s.rule.Proposals, nil),
		&ikev2.KE{Method: ikev2.KEID(h.key.KE()), Data: h.key.Public()}, &ikev2.Nonce{Data: h.ni})
	ps = append(ps, s.natPayloads(i, s.local, s.remote)...)
	ps = append(ps, hashNotify(s.rule)...)
	if s.rule.FragmentSize > 0 {
		ps = append(ps, notify(ikev2.IKEV2_FRAGMENTATION_SUPPORTED))
	}
	if addKE(s.rule.Proposals) {
		ps = append(ps, notify(ikev2.INTERMEDIATE_EXCHANGE_SUPPORTED))
	}
	if s.initiatorPPK() {
		ps = append(ps, notify(ikev2.USE_PPK))
	}
	m := &ikev2.Message{Header: i.header(ikev2.IKE_SA_INIT, 0, false), Payloads: ps}
	data, err := m.Append(nil)
	if err != nil {
		s.fail(&LocalError{Exchange: ikev2.IKE_SA_INIT, Err: err}, false)
		return
	}
	i.nextID = 1
	h.request, h.refused, h.refusals, h.again, h.nothing = data, nil, 0, false, nil
	s.transmit(i, 0, ikev2.IKE_SA_INIT, &sealed{data: [][]byte{data}})
	s.logMessage("sent", m.Header, ps, len(data))
}

// receiveInitResponse is the initiator's side of the answer.
func (s *SA) receiveInitResponse(i *ikeSA, d Datagram, hd ikev2.Header) {
	m, err := ikev2.Parse(d.Data)
	if err != nil || i.state != StateInitSent || d.Remote != i.req.remote || critical(m.Payloads) != nil {
		s.counters.Malformed++
		return
	}
	h := i.hs
	if n := ikev2.FindNotify(m.Payloads, ikev2.COOKIE); n != nil && ikev2.Find[*ikev2.SA](m.Payloads) == nil {
		if h.ignores(n.Data) {
			s.counters.Unexpected++ // mostly a duplicate
			return
		}
		s.logMessage("received", hd, m.Payloads, len(d.Data))
		s.hearCookie(i, n.Data)
		return
	}
	ps, err := shapeInitResponse.check(m.Payloads)
	if err != nil {
		s.counters.Malformed++
		return
	}
	s.logMessage("received", hd, m.Payloads, len(d.Data))
	if n := refusal(ps); n != nil {
		if n.Type == ikev2.INVALID_KE_PAYLOAD && len(n.Data) == 2 {
			ke := alg.KE(binary.BigEndian.Uint16(n.Data))
			if ke == h.key.KE() { // a duplicate
				s.counters.Unexpected++
				return
			}
			if h.kes++; h.kes <= maxKETries && offers(s.rule.Proposals, ke) {
				if err := s.newKE(i, ke); err == nil {
					s.sendInit(i)
					return
				}
			}
		}
		if h.refused == nil {
			s.log(levelWarn, "refused by the peer, or somebody", attrNotify(n.Type),
				slog.String("offered", fmt.Sprint(proposal.OfferIKE(s.rule.Proposals, nil).Proposals)))
		}
		s.refuseInit(i, &PeerError{ikev2.IKE_SA_INIT, n.Type})
		return
	}
	if err := s.initDone(i, ps, hd.ResponderSPI, d.Data); err != nil {
		s.refuseInit(i, &LocalError{Exchange: ikev2.IKE_SA_INIT, Err: err})
	}
}

func offers(ps []proposal.IKE, ke alg.KE) bool {
	for _, p := range ps {
		for _, k := range p.KE {
			if k == ke {
				return true
			}
		}
	}
	return false
}

// initDone takes a good answer.
func (s *SA) initDone(i *ikeSA, ps []ikev2.Payload, spi SPI, data []byte) error {
	h := i.hs
	suite, err := proposal.CheckIKE(s.rule.Proposals, ikev2.Find[*ikev2.SA](ps), 0)
	if err != nil {
		return err
	}
	ke := ikev2.Find[*ikev2.KE](ps)
	req, sent := h.by(suite.KE)
	if alg.KE(ke.Method) != suite.KE || !sent {
		return fmt.Errorf("key exchange by %v, suite has %v, sent %v", ke.Method, suite.KE, h.key.KE())
	}
	if spi == 0 {
		return errors.New("responder's SPI is 0")
	}
	if suite.AddKE.Methods() != nil && ikev2.FindNotify(ps, ikev2.INTERMEDIATE_EXCHANGE_SUPPORTED) == nil {
		return errNoIntermediate
	}
	ppk := s.initiatorPPK() && ikev2.FindNotify(ps, ikev2.USE_PPK) != nil
	if !ppk && s.rule.PPK == pad.PPKRequire {
		return errPPKMissing
	}
	childless := ikev2.FindNotify(ps, ikev2.CHILDLESS_IKEV2_SUPPORTED) != nil
	if !childless && s.rule.Childless == pad.ChildlessForce {
		return errors.New("the rule wants no child SA in IKE_AUTH, and the peer one")
	}
	var said announced
	if err := said.hear(ps); err != nil {
		return err
	}
	if s.rule.LocalAuth == pad.Cert {
		if err := s.rule.Own.CanSign(said.hashes); err != nil {
			return err
		}
	}
	shared, err := req.key.Shared(ke.Data)
	if err != nil {
		return err
	}
	defer shared.Wipe()
	if slices.Contains(h.tried, spi) {
		// The same keys once more, with numbers from 0: what a counter mode protects
		// would be open to whoever has both messages.
		return errors.New("an answer with this SPI was tried already")
	}
	if len(h.tried) > maxAnswers {
		return errors.New("too many answers were tried")
	}
	if i.req != nil && h.nothing == nil { // the request is on its way
		h.late = s.lastSent.Add(s.rule.Retransmit.Init)
	}
	h.tried = append(h.tried, spi)
	h.announced, h.at = said, s.path()
	i.remote, i.suite, h.nr, h.response = spi, suite, ikev2.Find[*ikev2.Nonce](ps).Data, data
	if err := s.deriveFirst(i, shared); err != nil {
		i.remote = 0
		return err
	}
	h.choose(suite.KE)
	i.req, i.active = nil, nil
	s.emit(NewIKESA{Local: i.local, Remote: i.remote, Initiator: true})
	s.ppk = ppk
	s.fragments = s.rule.FragmentSize > 0 && ikev2.FindNotify(ps, ikev2.IKEV2_FRAGMENTATION_SUPPORTED) != nil
	s.childless = childless
	s.heard = s.now
	s.detectNAT(i, ps, s.local, s.remote)
	s.float()
	s.nextIntermediate(i, 0)
	return nil
}

// addKE reports whether any of ps has additional key exchanges.
func addKE(ps []proposal.IKE) bool {
	return slices.ContainsFunc(ps, func(p proposal.IKE) bool { return len(p.AddKE) > 0 })
}

// initiatorPPK reports whether we have a PPK to name.
func (s *SA) initiatorPPK() bool {
	_, ok := s.rule.PPKs[s.rule.PPKID]
	return ok && s.rule.PPK != pad.PPKNo
}

// deriveFirst makes the keys of the first IKE SA (RFC 7296, 2.14).
func (s *SA) deriveFirst(i *ikeSA, shared ipsec.Key) error {
	h := i.hs
	seed, err := keymat.SKEYSEED(i.suite.PRF, h.ni, h.nr, shared)
	if err != nil {
		return err
	}
	defer seed.Wipe()
	return s.derive(i, seed, h.ni, h.nr)
}

func (s *SA) derive(i *ikeSA, seed ipsec.Key, ni, nr []byte) error {
	a, b := i.spis()
	k, err := keymat.IKESA(i.suiteKeys(), seed, ni, nr, uint64(a), uint64(b))
	if err != nil {
		return err
	}
	var told *IKEKeys
	if s.cfg.TellKeys { // setKeys wipes them
		told = &IKEKeys{a, b, i.suite, k.EI.Clone(), k.ER.Clone(), k.AI.Clone(), k.AR.Clone()}
	}
	if err := i.setKeys(k); err != nil {
		k.Wipe()
		return err
	}
	if told != nil {
		s.emit(*told)
	}
	return nil
}

// receiveInitRequest is the responder's side. Whatever is refused here leaves
// no state.
func (s *SA) receiveInitRequest(d Datagram, hd ikev2.Header) {
	fail := func(n *ikev2.Notify, err error) {
		le := &LocalError{Exchange: ikev2.IKE_SA_INIT, Err: err}
		if n != nil {
			le.Notify = n.Type
			m := &ikev2.Message{Header: hd, Payloads: []ikev2.Payload{n}}
			m.Flags, m.Minor = ikev2.FlagResponse, 0 // our version, not the peer's
			if data, err := m.Append(nil); err == nil {
				s.send(d.Local, d.Remote, data, false)
				s.logMessage("sent", m.Header, m.Payloads, len(data))
			}
		}
		s.fail(le, false)
	}
	m, err := ikev2.Parse(d.Data)
	if err == nil {
		s.logMessage("received", hd, m.Payloads, len(d.Data))
	}
	switch {
	case err != nil:
		s.counters.Malformed++
		fail(nil, err)
		return
	case hd.Exchange != ikev2.IKE_SA_INIT || hd.IsResponse() || !hd.FromInitiator() || hd.MessageID != 0 || hd.InitiatorSPI == 0 || hd.ResponderSPI != 0:
		s.counters.Unexpected++
		fail(nil, errors.New("not an IKE_SA_INIT request"))
		return
	}
	if n := critical(m.Payloads); n != nil {
		fail(n, errors.New("unknown critical payload"))
		return
	}
	ps, err := shapeInitRequest.check(m.Payloads)
	if err != nil {
		s.counters.Malformed++
		fail(nil, err)
		return
	}
	// The first rule that accepts an offer fixes the suite; which rule it is
	// in the end, IKE_AUTH tells.
	var first error // the one of the rule that stands first
	inter := ikev2.FindNotify(ps, ikev2.INTERMEDIATE_EXCHANGE_SUPPORTED) != nil
	for _, r := range s.candidate {
		ours := r.Proposals
		if !inter {
			ours = proposal.WithoutAddKE(ours)
		}
		suite, answer, _, cerr := proposal.ChooseIKE(ours, ikev2.Find[*ikev2.SA](ps), 0)
		if cerr != nil {
			if first == nil {
				first = ofRule(cerr, r)
			}
			continue
		}
		s.rule = r
		if n, rerr := s.acceptInit(d, hd, ps, suite, answer); rerr != nil {
			fail(n, rerr)
		}
		return
	}
	switch n := len(s.candidate); n {
	case 0:
		first = errors.New("no rule")
	case 1:
	default:
		first = fmt.Errorf("none of %d rules fits; %w", n, first)
	}
	fail(notify(ikev2.NO_PROPOSAL_CHOSEN), first)
}

// acceptInit makes the half-open IKE SA and answers.
func (s *SA) acceptInit(d Datagram, hd ikev2.Header, ps []ikev2.Payload, suite proposal.IKESuite, answer ikev2.Proposal) (*ikev2.Notify, error) {
	ke := ikev2.Find[*ikev2.KE](ps)
	if alg.KE(ke.Method) != suite.KE {
		return invalidKE(uint16(suite.KE)), fmt.Errorf("key exchange by %v: want %v", ke.Method, suite.KE)
	}
	var said announced
	if err := said.hear(ps); err != nil {
		return nil, err
	}
	public, shared, err := dh.Respond(suite.KE, s.rand, ke.Data)
	if err != nil {
		return nil, err
	}
	defer shared.Wipe()
	i := &ikeSA{local: s.newSPI(), remote: hd.InitiatorSPI, suite: suite}
	i.hs = &handshake{ni: ikev2.Find[*ikev2.Nonce](ps).Data, nr: s.newNonce(), initRequest: initRequest{request: d.Data}, announced: said}
	if err := s.deriveFirst(i, shared); err != nil {
		return nil, err
	}
	s.local, s.remote = d.Local, d.Remote
	s.peer.Local, s.peer.Remote = d.Local, d.Remote
	s.ikes, s.cur = append(s.ikes, i), i
	s.emit(NewIKESA{Local: i.local, Remote: i.remote})
	s.detectNAT(i, ps, d.Local, d.Remote)

	out := []ikev2.Payload{&ikev2.SA{Proposals: []ikev2.Proposal{answer}},
		&ikev2.KE{Method: ke.Method, Data: public}, &ikev2.Nonce{Data: i.hs.nr}}
	out = append(out, s.natPayloads(i, s.local, s.remote)...)
	if s.fragments = s.rule.FragmentSize > 0 && ikev2.FindNotify(ps, ikev2.IKEV2_FRAGMENTATION_SUPPORTED) != nil; s.fragments {
		out = append(out, notify(ikev2.IKEV2_FRAGMENTATION_SUPPORTED))
	}
	if suite.AddKE.Methods() != nil {
		out = append(out, notify(ikev2.INTERMEDIATE_EXCHANGE_SUPPORTED))
	}
	if s.ppk = ikev2.FindNotify(ps, ikev2.USE_PPK) != nil && slices.ContainsFunc(s.candidate, wantsPPK); s.ppk {
		out = append(out, notify(ikev2.USE_PPK))
	}
	out = append(out, certRequest(s.candidate...)...)
	if said.hashes != nil {
		out = append(out, hashNotify(s.candidate...)...)
	}
	if s.rule.Childless != pad.ChildlessNo {
		out = append(out, notify(ikev2.CHILDLESS_IKEV2_SUPPORTED))
	}
	m := &ikev2.Message{Header: i.header(ikev2.IKE_SA_INIT, 0, true), Payloads: out}
	data, err := m.Append(nil)
	if err != nil {
		return nil, err
	}
	i.hs.response, i.lastResp, i.expect = data, &sealed{data: [][]byte{data}}, 1
	i.setLast(d.Data)
	i.dropAt = s.now.Add(s.cfg.HalfOpen)
	i.to(StateHalfOpen)
	s.send(d.Local, d.Remote, data, false)
	s.logMessage("sent", m.Header, out, len(data))
	return nil, nil
}
