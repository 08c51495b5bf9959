package sa

import (
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// IKE_AUTH (RFC 7296, 1.2):
//
//	HDR, SK {IDi, [CERT,] N(INITIAL_CONTACT), [CERTREQ,] [IDr,] AUTH, SAi2, TSi, TSr}  -->
//	                          <--  HDR, SK {IDr, [CERT,] AUTH, SAr2, TSi, TSr}
//	                          or   HDR, SK {IDr, [CERT,] AUTH, N(child refused)}
//	                          or   HDR, SK {N(AUTHENTICATION_FAILED)}

// authTask is the initiator's side. Its offer is nil for a childless IKE SA.
type authTask struct {
	offer *offer
}

func (t *authTask) shape() shape { return shapeAuthResponse }

func (t *authTask) start(*SA, *ikeSA) {}

func (t *authTask) cancel(s *SA, err error) {
	if t.offer != nil {
		s.abandon(t.offer, err)
	}
}

// startAuth goes on after IKE_SA_INIT: first the SPI, then the request.
func (s *SA) startAuth(i *ikeSA) {
	t := &authTask{}
	i.active = t
	if s.rule.Childless == pad.ChildlessForce || len(s.first) == 0 {
		if !s.childless || s.rule.Childless == pad.ChildlessNo {
			s.fail(&LocalError{Exchange: ikev2.IKE_AUTH, Err: errors.New("no child SA to ask for, and the peer or the rule wants one")}, false)
			return
		}
		for _, r := range s.first {
			s.queue = append(s.queue, &createChild{req: r})
		}
		s.first = nil
		s.sendAuth(i, t)
		return
	}
	r := s.first[0]
	s.first = s.first[1:]
	o, lerr := s.newOffer(i, r, nil)
	if lerr != nil {
		s.log(levelWarn, "child SA failed", attrErr(lerr))
		s.emit(ChildFailed{r.Seq, r.Policy, lerr})
		if len(s.first) > 0 {
			s.startAuth(i)
			return
		}
		// The IKE SA is no use without anything to ask for.
		i.active = nil
		s.fail(lerr, false)
		return
	}
	for _, more := range s.first {
		s.queue = append(s.queue, &createChild{req: more})
	}
	s.first = nil
	t.offer = o
	s.needSPI(o.req.Policy, o.mode, o.protos(), 0, o.req.Seq, spiWait{ike: i, then: func(spi ipsec.SPI, err error) {
		if err != nil {
			s.fail(&LocalError{Exchange: ikev2.IKE_AUTH, Err: fmt.Errorf("no SPI: %w", err)}, false)
			return
		}
		o.spi = spi
		s.sendAuth(i, t)
	}})
}

// idBody is the part of an ID payload that AUTH covers, as it is on the wire:
// reserved octets that are not 0 too (RFC 7296, 2.15).
func idBody(id ikev2.ID) []byte {
	b, _ := id.Append(nil) // never fails
	return b
}

// authOctets is what AUTH of the initiator or the responder covers.
func (s *SA) authOctets(i *ikeSA, ofInitiator bool, id []byte) ([]byte, error) {
	h := i.hs
	msg, nonce, skp := h.request, h.nr, i.keys.PI
	if !ofInitiator {
		msg, nonce, skp = h.response, h.ni, i.keys.PR
	}
	return keymat.SignedOctets(i.suite.PRF, msg, nonce, skp, id, i.intAuth())
}

// authData computes the AUTH data of the initiator or the responder by a
// pre-shared key.
func (s *SA) authData(i *ikeSA, psk ipsec.Key, ofInitiator bool, id []byte) ([]byte, error) {
	octets, err := s.authOctets(i, ofInitiator, id)
	if err != nil {
		return nil, err
	}
	return keymat.PSKAuth(i.suite.PRF, psk, octets)
}

var errNoKey = errors.New("no pre-shared key for these identities")

// sendAuth sends the request.
func (s *SA) sendAuth(i *ikeSA, t *authTask) {
	local := s.peer.LocalID
	expected, exact := s.rule.ExpectedID()
	if !exact {
		expected = pad.AddrID(s.cfg.Remote.Addr()) // a guess, to find a key by
	}
	certs, auth, err := s.prove(i, expected)
	if err != nil {
		s.fail(&LocalError{Exchange: ikev2.IKE_AUTH, Err: err}, false)
		return
	}
	var ppk []ikev2.Payload
	if s.ppk {
		ppk = append(ppk, ppkIdentity(s.rule.PPKID))
		without := s.rule.PPK != pad.PPKRequire
		if without {
			ppk = append(ppk, notify(ikev2.NO_PPK_AUTH, auth.Data...))
		}
		err := s.mix(i, s.rule.PPKs[s.rule.PPKID], without)
		if err == nil {
			certs, auth, err = s.prove(i, expected)
		}
		if err != nil {
			s.fail(&LocalError{Exchange: ikev2.IKE_AUTH, Err: err}, false)
			return
		}
	}
	ps := append([]ikev2.Payload{&ikev2.IDi{ID: local.Wire()}}, certs...)
	if s.cfg.InitialContact {
		ps = append(ps, notify(ikev2.INITIAL_CONTACT))
	}
	ps = append(ps, certRequest(s.rule)...)
	if exact {
		ps = append(ps, &ikev2.IDr{ID: expected.Wire()})
	}
	ps = append(ps, auth)
	ps = append(ps, s.configRequest()...)
	if s.wantsMOBIKE() {
		ps = append(ps, s.mobikeOffer()...)
		ps = append(ps, s.noNATs(s.path())...)
	}
	if t.offer != nil {
		ps = append(ps, t.offer.payloads(true)...)
	}
	ps = append(ps, ppk...)
	i.to(StateAuthSent)
	s.request(i, t, ikev2.IKE_AUTH, ps...)
}

// answer is the initiator's judgement on the responder.
func (t *authTask) answer(s *SA, i *ikeSA, ps []ikev2.Payload) {
	idr, auth := ikev2.Find[*ikev2.IDr](ps), ikev2.Find[*ikev2.Auth](ps)
	if idr == nil || auth == nil {
		err := &PeerError{ikev2.IKE_AUTH, refusal(ps).Type} // the shape wants one or the other
		attrs := []slog.Attr{attrNotify(err.Notify), slog.String("local_id", s.peer.LocalID.String()), slog.String("auth", s.rule.LocalAuth.String())}
		if id, exact := s.rule.ExpectedID(); exact {
			attrs = append(attrs, slog.String("asked_for", id.String()))
		}
		s.log(levelWarn, "refused by the peer", attrs...)
		if s.another(i, t, err) {
			return
		}
		t.cancel(s, err)
		s.fail(err, false)
		return
	}
	id := pad.FromWire(idr.ID)
	err := s.ppkAnswered(i, ps)
	if err == nil {
		err = s.verify(i, idr.ID, auth, ps)
	}
	if err != nil {
		// The responder takes us for established: it must hear of it
		// (RFC 7296, 2.21.2).
		le := &LocalError{ikev2.IKE_AUTH, ikev2.AUTHENTICATION_FAILED, err}
		s.farewell(i, notify(ikev2.AUTHENTICATION_FAILED))
		if s.another(i, t, le) {
			return
		}
		t.cancel(s, le)
		s.fail(le, false)
		return
	}
	s.peer.RemoteID = id
	if s.wantsMOBIKE() && ikev2.FindNotify(ps, ikev2.MOBIKE_SUPPORTED) != nil {
		s.beginMOBIKE(ps)
	}
	s.established(i, ikev2.FindNotify(ps, ikev2.INITIAL_CONTACT) != nil)
	s.hearAuthLifetime(ikev2.FindNotify(ps, ikev2.AUTH_LIFETIME))
	has, err := childTriple(ps)
	if cerr := s.configured(ps); err == nil {
		err = cerr
	}
	switch n := refusal(ps); {
	case t.offer == nil:
	case has && err == nil && n == nil:
		s.accept(i, t.offer, ps, true, i.hs.ni, i.hs.nr)
	case has && n != nil: // refused, and granted: as far as we know it is there
		s.orphan(t.offer, &PeerError{ikev2.IKE_AUTH, n.Type})
	case n != nil:
		s.abandon(t.offer, &PeerError{ikev2.IKE_AUTH, n.Type})
	default:
		if err == nil {
			err = errors.New("no child SA in the answer")
		}
		// Perhaps the peer made one: our Delete removes it.
		s.orphan(t.offer, &LocalError{Exchange: ikev2.IKE_AUTH, Err: err})
	}
	s.endHandshake(i)
}

// verify checks who the peer says it is, and its proof.
func (s *SA) verify(i *ikeSA, wire ikev2.ID, auth *ikev2.Auth, ps []ikev2.Payload) error {
	id := pad.FromWire(wire)
	if !s.rule.PermitsPeer(id) {
		return fmt.Errorf("identity %v is not permitted by rule %q", id, s.rule.Label)
	}
	if s.rule.RemoteAuth == pad.Cert {
		return s.verifyCert(i, wire, auth, ps)
	}
	if auth.Method != ikev2.AuthPSK {
		return fmt.Errorf("authentication method %v: want %v", auth.Method, ikev2.AuthPSK)
	}
	keys, ok := s.rule.Keys(s.peer.LocalID, id)
	if !ok {
		return errNoKey
	}
	want, err := s.authData(i, keys.Remote, !i.initiator, idBody(wire))
	if err != nil {
		return err
	}
	if !hmac.Equal(want, auth.Data) {
		return fmt.Errorf("identity %v: AUTH does not verify: not the same pre-shared key", id)
	}
	return nil
}

// established begins the life of the first IKE SA.
func (s *SA) established(i *ikeSA, onlyOne bool) {
	i.to(StateEstablished)
	i.dropAt = time.Time{} // no longer half open
	s.certEnd = s.certsEnd()
	s.lifetimes(i)
	s.heard = s.now
	s.emit(Established{
		Peer: s.peer, Local: i.local, Remote: i.remote, Initiator: i.initiator, Suite: i.suite,
		NATLocal: s.natLocal, NATRemote: s.natRemote, OnlyOne: onlyOne,
	})
	attrs := []slog.Attr{slog.String("id", s.peer.RemoteID.String()), slog.String("suite", i.suite.String()), slog.Bool("ppk", s.ppk), slog.Bool("mobike", s.mob != nil)}
	if s.peer.Cert != nil {
		attrs = append(attrs, slog.String("cert", s.peer.Cert.Subject()))
	}
	s.log(levelInfo, "IKE SA established", attrs...)
}

// From certSoon on the initiator is told that the IKE SA ends with a certificate, but
// not over and over when there is no other: strongSwan makes a new one at once if less
// is left than its over_time, a tenth of the time after which it rekeys.
const (
	certSoon = 7 * 24 * time.Hour
	certLate = 3 * time.Hour
)

// authLifetime is how long its proof counts, as far as the initiator is to be told.
func (s *SA) authLifetime() time.Duration {
	d := s.rule.Reauth
	if end := s.certsEnd(); !end.IsZero() {
		if left := end.Sub(s.now); left < certSoon && left >= certLate && (d == 0 || left < d) {
			return left
		}
	}
	return d
}

// hearAuthLifetime tells what the responder says of how long our proof counts
// (RFC 4478, 3). A malformed one counts for nothing, as does one to a responder.
func (s *SA) hearAuthLifetime(n *ikev2.Notify) {
	if n == nil || !s.initiator || len(n.Data) != 4 {
		return
	}
	if secs := binary.BigEndian.Uint32(n.Data); secs > 0 {
		s.emit(AuthLifetime{time.Duration(secs) * time.Second})
	}
}

// endHandshake forgets what only AUTH needed.
func (s *SA) endHandshake(i *ikeSA) {
	s.forgoParked(i.hs)
	i.hs.wipe()
	i.hs, i.asked = nil, nil
	i.lastResp.settle()
	if i.keys != nil {
		i.keys.PI.Wipe()
		i.keys.PR.Wipe()
		i.keys = &keymat.IKEKeys{D: i.keys.D}
	}
}

// authRequest is the responder's side: who is it, may it, can it prove it; then
// the child SA.
func (s *SA) authRequest(i *ikeSA, ps []ikev2.Payload) {
	deny := func(err error) {
		le := &LocalError{ikev2.IKE_AUTH, ikev2.AUTHENTICATION_FAILED, err}
		s.refuse(i, notify(ikev2.AUTHENTICATION_FAILED), err)
		s.fail(le, true)
	}
	has, err := childTriple(ps)
	if err != nil {
		s.syntax(i, ikev2.IKE_AUTH, err)
		return
	}
	auth := ikev2.Find[*ikev2.Auth](ps)
	if auth == nil {
		deny(errors.New("no AUTH payload: EAP is not supported"))
		return
	}
	idi := ikev2.Find[*ikev2.IDi](ps)
	claim := pad.Claim{IDi: pad.FromWire(idi.ID), Suite: i.suite}
	claim.Method, claim.Key = claimed(auth, ps)
	if idr := ikev2.Find[*ikev2.IDr](ps); idr != nil {
		claim.IDr = pad.FromWire(idr.ID)
	}
	r := pad.Authorize(s.candidate, claim)
	if r == nil {
		deny(fmt.Errorf("no rule for identity %v by %v, asking for %v: %s", claim.IDi, auth.Method, claim.IDr, pad.WhyNot(s.candidate, claim)))
		return
	}
	s.rule, s.peer.Rule, s.peer.LocalID = r, r, r.IdentityFor(s.local.Addr(), claim.IDr)
	if !has && r.Childless == pad.ChildlessNo {
		s.syntax(i, ikev2.IKE_AUTH, errors.New("no child SA asked for")) // RFC 6023, 3
		return
	}
	ppk, err := s.ppkAsked(i, r, ps, auth)
	if err == nil {
		err = s.verify(i, idi.ID, auth, ps)
	}
	if err != nil {
		deny(err)
		return
	}
	if err := i.hs.hear(ps); err != nil {
		deny(err)
		return
	}
	s.peer.RemoteID = claim.IDi
	first, err := s.cfg.Host.Admit(s.peer)
	if err != nil {
		deny(err)
		return
	}
	certs, mine, err := s.prove(i, s.peer.RemoteID)
	if err != nil {
		deny(err)
		return
	}
	out := append([]ikev2.Payload{&ikev2.IDr{ID: s.peer.LocalID.Wire()}}, certs...)
	out = append(out, mine)
	if first && r.InitialContact {
		out = append(out, notify(ikev2.INITIAL_CONTACT))
	}
	if ppk != nil {
		out = append(out, ppk)
	}
	if secs := s.authLifetime() / time.Second; secs > 0 {
		out = append(out, notify(ikev2.AUTH_LIFETIME, binary.BigEndian.AppendUint32(nil, uint32(secs))...))
	}
	s.onlyOne = ikev2.FindNotify(ps, ikev2.INITIAL_CONTACT) != nil
	s.candidate = nil
	if s.wantsMOBIKE() && ikev2.FindNotify(ps, ikev2.MOBIKE_SUPPORTED) != nil {
		if err := checkNoNATs(ps, s.path()); err != nil {
			s.refuse(i, notify(ikev2.UNEXPECTED_NAT_DETECTED), err)
			s.fail(&LocalError{ikev2.IKE_AUTH, ikev2.UNEXPECTED_NAT_DETECTED, err}, true)
			return
		}
		s.beginMOBIKE(ps)
		out = append(out, s.mobikeOffer()...)
	}
	finish := func(more ...ikev2.Payload) {
		s.respond(i, append(out, more...)...)
		s.established(i, s.onlyOne)
		s.endHandshake(i)
	}
	cp, err := s.give(ps)
	if err != nil {
		// The IKE SA stays (RFC 7296, 3.10.1).
		s.log(levelWarn, "no address for the peer", attrNotify(ikev2.INTERNAL_ADDRESS_FAILURE), attrErr(err))
		finish(notify(ikev2.INTERNAL_ADDRESS_FAILURE))
		return
	}
	out = append(out, cp...)
	if !has { // RFC 6023
		finish()
		return
	}
	if r.Childless == pad.ChildlessForce {
		s.log(levelWarn, "child SA refused", attrNotify(ikev2.NO_ADDITIONAL_SAS), attrErr(errors.New("the rule wants none in IKE_AUTH")))
		finish(notify(ikev2.NO_ADDITIONAL_SAS))
		return
	}
	g, rf := s.grant(i, ps, true, nil)
	if rf != nil {
		s.log(levelWarn, "child SA refused", attrNotify(rf.n.Type), attrErr(rf.err))
		finish(rf.n)
		return
	}
	g.ni, g.nr = i.hs.ni, i.hs.nr
	i.to(StateAuthWork)
	s.needSPI(g.policy, g.mode, []ipsec.Protocol{g.suite.Proto()}, 0, 0, spiWait{ike: i, drop: g.wipe, then: func(spi ipsec.SPI, err error) {
		if err != nil {
			s.log(levelWarn, "child SA refused", attrErr(err))
			g.wipe()
			finish(notify(ikev2.TEMPORARY_FAILURE))
			return
		}
		_, more, err := s.install(i, g, spi, true)
		if err != nil {
			s.release(spi, g.suite.Proto())
			finish(notify(ikev2.NO_PROPOSAL_CHOSEN))
			return
		}
		finish(more...)
	}})
}
