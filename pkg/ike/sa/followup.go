package sa

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// IKE_FOLLOWUP_KE (RFC 9370, 2.2.4): the additional key exchanges of a
// CREATE_CHILD_SA exchange, of a child SA or to rekey the IKE SA. The SA is made
// when the last of them is over.
//
//	HDR, SK {SA, Ni, [KEi(0), TSi, TSr]}  -->
//	             <--  HDR, SK {SA, Nr, [KEr(0), TSi, TSr], N(ADDITIONAL_KEY_EXCHANGE)(link1)}
//	HDR, SK {KEi(1), N(ADDITIONAL_KEY_EXCHANGE)(link1)}  -->
//	             <--  HDR, SK {KEr(1), N(ADDITIONAL_KEY_EXCHANGE)(link2)}
//	HDR, SK {KEi(2), N(ADDITIONAL_KEY_EXCHANGE)(link2)}  -->
//	             <--  HDR, SK {KEr(2)}
//
// Whoever initiated has the window for the whole series. If both sides rekey the
// same SA, whichever series is over first makes its SA; the nonces of
// CREATE_CHILD_SA decide when both are over on both sides (RFC 7296, 2.8.1), and
// a series that comes too late for the SA it is to replace is refused with
// TEMPORARY_FAILURE, on which its initiator goes on with the peer's.
const (
	linkLen = 8 // octets
	// followWait is how long a responder remembers what an initiator has not
	// finished.
	followWait = time.Minute
)

// series is the initiator's additional key exchanges.
type series struct {
	methods []alg.KE
	key     dh.PrivateKey // of the one under way
	secrets []ipsec.Key
}

func (f *series) wipe() {
	if f == nil {
		return
	}
	wipeKey(f.key)
	wipeAll(f.secrets)
}

func wipeAll(ks []ipsec.Key) {
	for _, k := range ks {
		k.Wipe()
	}
}

var errNoLink = errors.New("additional key exchanges without ADDITIONAL_KEY_EXCHANGE")

// next sends the next request of the series, as the answer ps wants it linked.
func (f *series) next(s *SA, i *ikeSA, t task, ps []ikev2.Payload) error {
	link := ikev2.FindNotify(ps, ikev2.ADDITIONAL_KEY_EXCHANGE)
	if link == nil || len(link.Data) == 0 {
		return errNoLink
	}
	wipeKey(f.key)
	var err error
	m := f.methods[len(f.secrets)]
	if f.key, err = dh.Generate(m, s.rand); err != nil {
		return err
	}
	s.request(i, t, ikev2.IKE_FOLLOWUP_KE, &ikev2.KE{Method: ikev2.KEID(m), Data: f.key.Public()}, notify(ikev2.ADDITIONAL_KEY_EXCHANGE, link.Data...))
	return nil
}

// took takes the answer to one exchange; over: that was the last.
func (f *series) took(ps []ikev2.Payload) (over bool, err error) {
	ke := ikev2.Find[*ikev2.KE](ps)
	if alg.KE(ke.Method) != f.key.KE() {
		return false, fmt.Errorf("key exchange by %v, sent %v", ke.Method, f.key.KE())
	}
	shared, err := f.key.Shared(ke.Data)
	if err != nil {
		return false, err
	}
	f.secrets = append(f.secrets, shared)
	return len(f.secrets) == len(f.methods), nil
}

// follow is what a responder remembers between the exchanges of a series. One
// at a time: a new CREATE_CHILD_SA exchange takes its place.
type follow struct {
	link    []byte
	methods []alg.KE
	secrets []ipsec.Key
	until   time.Time

	// What is to be made: a child SA, or n in place of the IKE SA.
	g      *granted
	spi    ipsec.SPI
	old    *child
	n      *ikeSA
	shared ipsec.Key
}

// expectFollow begins a series and returns the notify that links its first
// exchange.
func (s *SA) expectFollow(i *ikeSA, f *follow) *ikev2.Notify {
	s.dropFollow(i)
	f.until = s.now.Add(followWait)
	i.follow = f
	return s.link(f)
}

func (s *SA) link(f *follow) *ikev2.Notify {
	f.link = s.random(linkLen)
	return notify(ikev2.ADDITIONAL_KEY_EXCHANGE, f.link...)
}

// dropFollow forgets a series that will not be finished.
func (s *SA) dropFollow(i *ikeSA) {
	f := i.follow
	if f == nil {
		return
	}
	i.follow = nil
	wipeAll(f.secrets)
	f.shared.Wipe()
	if f.g != nil {
		f.g.wipe()
		s.release(f.spi, f.g.suite.Proto())
	}
}

// rekeyedByPeer reports whether the peer is in the midst of rekeying i.
func (i *ikeSA) rekeyedByPeer() bool { return i.follow != nil && i.follow.n != nil }

// followRequest is the responder's side of one exchange.
func (s *SA) followRequest(i *ikeSA, ps []ikev2.Payload) {
	f := i.follow
	link := ikev2.FindNotify(ps, ikev2.ADDITIONAL_KEY_EXCHANGE)
	if f == nil || link == nil || !bytes.Equal(link.Data, f.link) {
		s.refuse(i, notify(ikev2.STATE_NOT_FOUND), errors.New("no such key exchange under way"))
		return
	}
	a := askCreate
	switch {
	case f.n != nil:
		a = askRekeyIKE
	case f.old != nil:
		a = askRekey
	}
	if err := s.tooLate(i, a, f.old); err != nil {
		s.dropFollow(i)
		s.refuse(i, notify(ikev2.TEMPORARY_FAILURE), err)
		return
	}
	method := f.methods[len(f.secrets)]
	ke := ikev2.Find[*ikev2.KE](ps)
	if alg.KE(ke.Method) != method {
		s.dropFollow(i)
		s.syntax(i, ikev2.IKE_FOLLOWUP_KE, fmt.Errorf("key exchange by %v: want %v", ke.Method, method))
		return
	}
	public, shared, err := dh.Respond(method, s.rand, ke.Data)
	if err != nil {
		s.dropFollow(i)
		s.syntax(i, ikev2.IKE_FOLLOWUP_KE, err)
		return
	}
	f.secrets = append(f.secrets, shared)
	f.until = s.now.Add(followWait)
	answer := &ikev2.KE{Method: ke.Method, Data: public}
	switch {
	case len(f.secrets) < len(f.methods):
		s.respond(i, answer, s.link(f))
	case f.n != nil:
		s.finishRekey(i, f, answer)
	default:
		s.finishChild(i, f, answer)
	}
}

func (s *SA) finishChild(i *ikeSA, f *follow, answer *ikev2.KE) {
	i.follow = nil
	f.g.more = f.secrets
	c, _, err := s.install(i, f.g, f.spi, true)
	if err != nil {
		s.release(f.spi, f.g.suite.Proto())
		s.refuse(i, notify(ikev2.NO_PROPOSAL_CHOSEN), err)
		return
	}
	s.respond(i, answer)
	if f.old != nil {
		s.replacedByPeer(f.old, c)
	}
}

func (s *SA) finishRekey(i *ikeSA, f *follow, answer *ikev2.KE) {
	i.follow = nil
	defer f.shared.Wipe()
	defer wipeAll(f.secrets)
	if err := s.inherit(i, f.n, f.shared, f.secrets...); err != nil {
		s.syntax(i, ikev2.IKE_FOLLOWUP_KE, err)
		return
	}
	s.peerRekeyed(i, f.n, answer)
}
