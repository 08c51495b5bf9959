package sa

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// CREATE_CHILD_SA for the IKE SA itself (RFC 7296, 1.3.2 and 2.18):
//
//	HDR, SK {SA(new SPIi), Ni, KEi}  -->
//	                      <--  HDR, SK {SA(new SPIr), Nr, KEr}
//	HDR, SK {D(IKE)}  -->
//	                      <--  HDR, SK {}
//
// The new IKE SA inherits the child SAs; its message IDs start at 0.

// rekeyIKE is the initiator's side.
type rekeyIKE struct {
	spi   SPI
	ni    []byte
	key   dh.PrivateKey
	ke    alg.KE
	kes   int
	retry retry

	// Additional key exchanges: the IKE SA to be, and the secret of the first.
	series *series
	n      *ikeSA
	shared ipsec.Key
}

func (t *rekeyIKE) shape() shape {
	if t.series != nil {
		return shapeFollowResponse
	}
	return shapeRekeyResponse
}

func (t *rekeyIKE) cancel(*SA, error) {
	wipeKey(t.key)
	t.series.wipe()
	t.shared.Wipe()
	t.series, t.n, t.shared = nil, nil, ipsec.Key{}
}

// wantRekey queues a request to rekey the IKE SA, unless it is under way.
func (s *SA) wantRekey() {
	if s.failed || s.closing || s.cur == nil || s.cur.state != StateEstablished || s.cur.peerNew != nil {
		return
	}
	if isRekeyIKE(s.cur.active) || slices.ContainsFunc(s.queue, isRekeyIKE) ||
		slices.ContainsFunc(s.delayed, func(d delayed) bool { return isRekeyIKE(d.t) }) {
		return
	}
	s.queue = append(s.queue, &rekeyIKE{})
}

func isRekeyIKE(t task) bool {
	_, ok := t.(*rekeyIKE)
	return ok
}

func (t *rekeyIKE) start(s *SA, i *ikeSA) {
	t.spi = s.newSPI()
	t.send(s, i)
}

func (t *rekeyIKE) send(s *SA, i *ikeSA) {
	ke := t.ke
	if ke == alg.KENone {
		ke = s.rekeyGroup(i)
	}
	t.cancel(s, nil)
	var err error
	if t.key, err = dh.Generate(ke, s.rand); err != nil {
		s.notRekeyed(i, err)
		return
	}
	t.ni = s.newNonce()
	s.request(i, t, ikev2.CREATE_CHILD_SA,
		proposal.OfferIKE(s.rule.Proposals, binary.BigEndian.AppendUint64(nil, uint64(t.spi))),
		&ikev2.Nonce{Data: t.ni}, &ikev2.KE{Method: ikev2.KEID(ke), Data: t.key.Public()})
}

// rekeyGroup is the method in use if the rule still has it: the peer accepts it.
func (s *SA) rekeyGroup(i *ikeSA) alg.KE {
	if offers(s.rule.Proposals, i.suite.KE) {
		return i.suite.KE
	}
	return s.rule.Proposals[0].KE[0]
}

func (t *rekeyIKE) answer(s *SA, i *ikeSA, ps []ikev2.Payload) {
	defer func() {
		if i.active != t {
			t.cancel(s, nil)
		}
	}()
	if i != s.cur { // an old one, meanwhile replaced
		return
	}
	if n := refusal(ps); n != nil {
		t.refused(s, i, n)
		return
	}
	n, err := t.goOn(s, i, ps)
	if err == nil && n == nil {
		return // more key exchanges
	}
	if err != nil {
		// The peer has made an IKE SA that we cannot have.
		le := &LocalError{Exchange: ikev2.CREATE_CHILD_SA, Err: err}
		if i.peerNew != nil {
			s.log(levelWarn, "IKE SA not rekeyed", attrErr(err))
			s.settle(i, i.peerNew, nil)
			return
		}
		s.farewell(i)
		s.fail(le, false)
		return
	}
	s.ikes = append(s.ikes, n)
	s.emit(NewIKESA{Local: n.local, Remote: n.remote, Initiator: true, Rekeys: i.local})
	p := i.peerNew
	if p != nil && lowest(n.ni, n.nr, p.ni, p.nr) {
		// Both sides rekeyed, and ours is redundant (RFC 7296, 2.8.2). We close
		// it; the peer closes the old one.
		s.settle(i, p, n)
		(&deleteIKE{}).start(s, n)
		return
	}
	s.settle(i, n, p)
	(&deleteIKE{}).start(s, i)
}

// settle ends the rekeying of old: kept goes on in its place, other, if any, is
// redundant and closed by whoever made it.
func (s *SA) settle(old, kept, other *ikeSA) {
	old.peerNew = nil
	s.dropFollow(old)
	old.to(StateRekeyed)
	old.dropAt = s.now.Add(staleAfter)
	if other != nil && other.state == StateEstablished {
		other.to(StateRekeyed)
		other.dropAt = s.now.Add(staleAfter)
	}
	s.cur, s.putOff = kept, time.Time{}
	// What has not been sent is sent in the new one; that needs no rekeying.
	if t := old.waiting(s); t != nil {
		s.queue = append([]task{t}, s.queue...)
	}
	s.queue = slices.DeleteFunc(s.queue, isRekeyIKE)
	s.delayed = slices.DeleteFunc(s.delayed, func(d delayed) bool { return isRekeyIKE(d.t) })
	s.emit(Rekeyed{OldIKE: old.local, NewIKE: kept.local})
	s.log(levelInfo, "IKE SA rekeyed", attrSuite(kept))
}

func (t *rekeyIKE) refused(s *SA, i *ikeSA, n *ikev2.Notify) {
	err := &PeerError{ikev2.CREATE_CHILD_SA, n.Type}
	if i.peerNew != nil { // the peer's own one stays
		s.settle(i, i.peerNew, nil)
		return
	}
	switch n.Type {
	case ikev2.INVALID_KE_PAYLOAD:
		if len(n.Data) == 2 && t.series == nil {
			ke := alg.KE(binary.BigEndian.Uint16(n.Data))
			if t.kes++; t.kes <= maxKETries && ke != t.key.KE() && offers(s.rule.Proposals, ke) {
				t.ke = ke
				t.send(s, i)
				return
			}
		}
	case ikev2.TEMPORARY_FAILURE, ikev2.STATE_NOT_FOUND:
		switch {
		case s.closing:
		case s.retryLater(&t.retry, t):
			return
		case s.outOfSync():
			s.farewell(i)
			s.fail(err, false)
			return
		}
	case ikev2.INVALID_SYNTAX:
		s.fail(err, false)
		return
	}
	s.notRekeyed(i, err)
}

// notRekeyed: i lives on until its hard limit.
func (s *SA) notRekeyed(i *ikeSA, err error) {
	s.log(levelWarn, "IKE SA not rekeyed", attrErr(err))
	s.emit(RekeyFailed{OldIKE: i.local, Err: err})
}

// goOn takes a good answer, and returns the new IKE SA once it is there.
func (t *rekeyIKE) goOn(s *SA, old *ikeSA, ps []ikev2.Payload) (*ikeSA, error) {
	over := false
	var err error
	if t.series == nil {
		if t.n, t.shared, err = t.agreed(s, ps); err == nil {
			t.series = &series{methods: t.n.suite.AddKE.Methods()}
			over = len(t.series.methods) == 0
		}
	} else {
		over, err = t.series.took(ps)
	}
	switch {
	case err != nil:
		return nil, err
	case !over:
		return nil, t.series.next(s, old, t, ps)
	}
	return t.n, s.inherit(old, t.n, t.shared, t.series.secrets...)
}

// agreed is what the answer to CREATE_CHILD_SA says: the new IKE SA without keys.
func (t *rekeyIKE) agreed(s *SA, ps []ikev2.Payload) (*ikeSA, ipsec.Key, error) {
	sa := ikev2.Find[*ikev2.SA](ps)
	suite, err := proposal.CheckIKE(s.rule.Proposals, sa, 8)
	if err != nil {
		return nil, ipsec.Key{}, err
	}
	ke := ikev2.Find[*ikev2.KE](ps)
	if alg.KE(ke.Method) != suite.KE || suite.KE != t.key.KE() {
		return nil, ipsec.Key{}, fmt.Errorf("key exchange by %v, suite has %v, sent %v", ke.Method, suite.KE, t.key.KE())
	}
	n := &ikeSA{initiator: true, local: t.spi, remote: SPI(binary.BigEndian.Uint64(sa.Proposals[0].SPI)), suite: suite,
		ni: t.ni, nr: ikev2.Find[*ikev2.Nonce](ps).Data}
	shared, err := t.key.Shared(ke.Data)
	if err != nil {
		return nil, ipsec.Key{}, err
	}
	return n, shared, nil
}

// inherit derives the keys of n from those of old (RFC 7296, 2.18).
func (s *SA) inherit(old, n *ikeSA, shared ipsec.Key, more ...ipsec.Key) error {
	if n.remote == 0 {
		return errors.New("SPI is 0")
	}
	seed, err := keymat.RekeySKEYSEED(old.suite.PRF, old.keys.D, shared, n.ni, n.nr, more...)
	if err != nil {
		return err
	}
	defer seed.Wipe()
	if err := s.derive(n, seed, n.ni, n.nr); err != nil {
		return err
	}
	n.keys.PI.Wipe()
	n.keys.PR.Wipe()
	n.to(StateEstablished)
	s.lifetimes(n)
	return nil
}

// rekeyRequest is the responder's side.
func (s *SA) rekeyRequest(i *ikeSA, ps []ikev2.Payload) {
	if err := s.tooLate(i, askRekeyIKE, nil); err != nil {
		s.refuse(i, notify(ikev2.TEMPORARY_FAILURE), err)
		return
	}
	suite, answer, offered, err := proposal.ChooseIKE(s.rule.Proposals, ikev2.Find[*ikev2.SA](ps), 8)
	if err != nil {
		s.refuse(i, notify(ikev2.NO_PROPOSAL_CHOSEN), ofRule(err, s.rule))
		return
	}
	ke := ikev2.Find[*ikev2.KE](ps)
	if alg.KE(ke.Method) != suite.KE {
		s.refuse(i, invalidKE(uint16(suite.KE)), fmt.Errorf("want key exchange by %v", suite.KE))
		return
	}
	remote := SPI(binary.BigEndian.Uint64(offered.SPI))
	if remote == 0 {
		s.syntax(i, ikev2.CREATE_CHILD_SA, errors.New("SPI is 0"))
		return
	}
	public, shared, err := dh.Respond(suite.KE, s.rand, ke.Data)
	if err != nil { // RFC 6989, 5
		s.syntax(i, ikev2.CREATE_CHILD_SA, err)
		return
	}
	n := &ikeSA{local: s.newSPI(), remote: remote, suite: suite,
		ni: ikev2.Find[*ikev2.Nonce](ps).Data, nr: s.newNonce()}
	answer.SPI = binary.BigEndian.AppendUint64(nil, uint64(n.local))
	out := []ikev2.Payload{&ikev2.SA{Proposals: []ikev2.Proposal{answer}}, &ikev2.Nonce{Data: n.nr}, &ikev2.KE{Method: ke.Method, Data: public}}
	if methods := suite.AddKE.Methods(); methods != nil {
		s.respond(i, append(out, s.expectFollow(i, &follow{methods: methods, n: n, shared: shared}))...)
		return
	}
	defer shared.Wipe()
	if err := s.inherit(i, n, shared); err != nil {
		s.syntax(i, ikev2.CREATE_CHILD_SA, err)
		return
	}
	s.peerRekeyed(i, n, out...)
}

// peerRekeyed answers by ps that n, which the peer wants in place of i, is there.
func (s *SA) peerRekeyed(i, n *ikeSA, ps ...ikev2.Payload) {
	s.ikes = append(s.ikes, n)
	s.emit(NewIKESA{Local: n.local, Remote: n.remote, Rekeys: i.local})
	s.respond(i, ps...)
	if s.failed {
		return
	}
	if isRekeyIKE(i.active) {
		i.peerNew = n // which of the two stays, the answer to ours decides
		return
	}
	s.settle(i, n, nil)
}
