package sa

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// IKE_INTERMEDIATE (RFC 9242) for each additional key exchange that
// IKE_SA_INIT agreed on (RFC 9370, 2.2.2):
//
//	HDR, SK(n-1) {KEi(n)}  -->
//	                <--  HDR, SK(n-1) {KEr(n)}
//
// Each is protected by the keys of the one before, and gives new ones. AUTH
// covers them all (RFC 9242, 3.3).

// intermediate is the initiator's side: exchange n of the methods.
type intermediate struct {
	n   int
	key dh.PrivateKey
}

func (t *intermediate) shape() shape { return shapeIntermediateResponse }

func (t *intermediate) start(*SA, *ikeSA) {}

func (t *intermediate) cancel(*SA, error) { wipeKey(t.key) }

func wipeKey(k dh.PrivateKey) {
	if k != nil {
		k.Wipe()
	}
}

var errNoIntermediate = errors.New("additional key exchanges without IKE_INTERMEDIATE")

// nextIntermediate sends the request of exchange n, or goes on to IKE_AUTH.
func (s *SA) nextIntermediate(i *ikeSA, n int) {
	methods := i.suite.AddKE.Methods()
	if n == len(methods) {
		i.to(StateAuthWait)
		s.startAuth(i)
		return
	}
	t := &intermediate{n: n}
	var err error
	if t.key, err = dh.Generate(methods[n], s.rand); err != nil {
		s.fail(&LocalError{Exchange: ikev2.IKE_INTERMEDIATE, Err: err}, false)
		return
	}
	if n == 0 {
		i.to(StateIntermediate)
	}
	s.request(i, t, ikev2.IKE_INTERMEDIATE, &ikev2.KE{Method: ikev2.KEID(methods[n]), Data: t.key.Public()})
}

func (t *intermediate) answer(s *SA, i *ikeSA, ps []ikev2.Payload) {
	defer t.key.Wipe()
	end := func(err error) {
		if !s.another(i, t, err) {
			s.fail(err, false)
		}
	}
	fail := func(err error) { end(&LocalError{Exchange: ikev2.IKE_INTERMEDIATE, Err: err}) }
	ke := ikev2.Find[*ikev2.KE](ps)
	if ke == nil {
		end(&PeerError{ikev2.IKE_INTERMEDIATE, refusal(ps).Type})
		return
	}
	if alg.KE(ke.Method) != t.key.KE() {
		fail(fmt.Errorf("key exchange by %v, sent %v", ke.Method, t.key.KE()))
		return
	}
	shared, err := t.key.Shared(ke.Data)
	if err != nil {
		fail(err)
		return
	}
	defer shared.Wipe()
	h := i.hs
	if err := i.chain(&h.intI, i.keys.PI, i.asked.intAuth()); err != nil {
		fail(err)
		return
	}
	if err := i.chain(&h.intR, i.keys.PR, h.got); err != nil {
		fail(err)
		return
	}
	if err := s.stir(i, shared); err != nil {
		fail(err)
		return
	}
	s.nextIntermediate(i, t.n+1)
}

// intermediateRequest is the responder's side.
func (s *SA) intermediateRequest(i *ikeSA, ps []ikev2.Payload) {
	h := i.hs
	method := i.suite.AddKE.Methods()[h.added]
	ke := ikev2.Find[*ikev2.KE](ps)
	if alg.KE(ke.Method) != method {
		s.syntax(i, ikev2.IKE_INTERMEDIATE, fmt.Errorf("key exchange by %v: want %v", ke.Method, method))
		return
	}
	public, shared, err := dh.Respond(method, s.rand, ke.Data)
	if err != nil {
		s.syntax(i, ikev2.IKE_INTERMEDIATE, err)
		return
	}
	defer shared.Wipe()
	if err := i.chain(&h.intI, i.keys.PI, h.got); err != nil {
		s.syntax(i, ikev2.IKE_INTERMEDIATE, err)
		return
	}
	s.respond(i, &ikev2.KE{Method: ke.Method, Data: public})
	if s.failed {
		return
	}
	err = i.chain(&h.intR, i.keys.PR, i.lastResp.intAuth())
	if err == nil {
		err = s.stir(i, shared)
	}
	if err != nil {
		s.fail(&LocalError{Exchange: ikev2.IKE_INTERMEDIATE, Err: err}, false)
		return
	}
	h.added++
}

// chain makes the next IntAuth value of one direction: prf(SK_p, the one before |
// what it covers of the message) (RFC 9242, 3.3.1).
func (i *ikeSA) chain(v *[]byte, skp ipsec.Key, octets []byte) (err error) {
	*v, err = keymat.PRF(i.suite.PRF, skp.Bytes(), *v, octets)
	return err
}

// stir puts the secret of an additional key exchange into the keys (RFC 9370, 2.2.2).
func (s *SA) stir(i *ikeSA, shared ipsec.Key) error {
	h := i.hs
	seed, err := keymat.RekeySKEYSEED(i.suite.PRF, i.keys.D, shared, h.ni, h.nr)
	if err != nil {
		return err
	}
	defer seed.Wipe()
	old := i.keys
	if err := s.derive(i, seed, h.ni, h.nr); err != nil {
		return err
	}
	old.Wipe()
	return nil
}

// note keeps of an authentic message of the handshake what AUTH will cover.
func (i *ikeSA) note(a *arrived) {
	if i.hs != nil {
		i.hs.got = nil
		if h := i.hs; i.suite.AddKE.Methods() != nil && a.err == nil && len(a.prefix) > 0 {
			h.got = ikev2.IntAuthOctets(a.prefix, a.plain)
		}
	}
}

// intAuth is what the exchanges add to the octets that AUTH covers: both chains
// and the message ID of IKE_AUTH, which follows them (RFC 9242, 3.3.1).
func (i *ikeSA) intAuth() []byte {
	h := i.hs
	if h.intI == nil {
		return nil
	}
	b := append(append([]byte{}, h.intI...), h.intR...)
	return binary.BigEndian.AppendUint32(b, uint32(1+len(i.suite.AddKE.Methods())))
}
