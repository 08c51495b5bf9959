package sa

import (
	"errors"
	"fmt"

	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Post-quantum pre-shared keys (RFC 8784). Both say USE_PPK in IKE_SA_INIT; in
// IKE_AUTH the initiator names one, and, if it can do without, adds the AUTH that
// it would send without:
//
//	HDR, SK {IDi, AUTH, SAi2, TSi, TSr, N(PPK_IDENTITY), [N(NO_PPK_AUTH)]}  -->
//	                    <--  HDR, SK {IDr, AUTH, SAr2, TSi, TSr, [N(PPK_IDENTITY)]}

// Types of PPK_ID (RFC 8784, 5.1). We send the second: what the configuration
// says is an identity as it is.
const (
	ppkOpaque = 1
	ppkFixed  = 2
)

var (
	errPPKMissing = errors.New("the rule requires a PPK, the peer uses none")
	errPPKUnasked = errors.New("the peer uses a PPK that was not offered")
)

// wantsPPK reports whether a rule may use PPKs at all.
func wantsPPK(r *pad.Rule) bool { return r.PPK != pad.PPKNo && len(r.PPKs) > 0 }

// ppkIdentity makes PPK_IDENTITY of a request.
func ppkIdentity(id string) *ikev2.Notify {
	return notify(ikev2.PPK_IDENTITY, append([]byte{ppkFixed}, id...)...)
}

// ppkOf finds the PPK that a peer names; false if we have it not, or may not use it.
func ppkOf(r *pad.Rule, n *ikev2.Notify) (ipsec.Key, bool) {
	if len(n.Data) < 2 || n.Data[0] != ppkFixed && n.Data[0] != ppkOpaque || r.PPK == pad.PPKNo {
		return ipsec.Key{}, false
	}
	id := string(n.Data[1:])
	if r.PPKID != "" && id != r.PPKID {
		return ipsec.Key{}, false
	}
	k, ok := r.PPKs[id]
	return k, ok
}

// mix puts a PPK into the keys of i. The ones without are kept if the peer may
// decide to do without.
func (s *SA) mix(i *ikeSA, ppk ipsec.Key, keep bool) error {
	if keep {
		i.hs.plain = &keymat.IKEKeys{D: i.keys.D.Clone(), PI: i.keys.PI.Clone(), PR: i.keys.PR.Clone()}
	}
	return i.keys.MixPPK(i.suite.PRF, ppk)
}

// unmix goes back to the keys without PPK.
func (i *ikeSA) unmix() {
	p := i.hs.plain
	i.hs.plain = nil
	i.keys.D.Wipe()
	i.keys.PI.Wipe()
	i.keys.PR.Wipe()
	i.keys.D, i.keys.PI, i.keys.PR = p.D, p.PI, p.PR
}

// ppkAnswered is the initiator's reading of a response: whether the peer used
// the PPK.
func (s *SA) ppkAnswered(i *ikeSA, ps []ikev2.Payload) error {
	used := ikev2.FindNotify(ps, ikev2.PPK_IDENTITY) != nil
	switch {
	case !s.ppk && used:
		return errPPKUnasked
	case !s.ppk || used:
		return nil
	case i.hs.plain == nil:
		return errPPKMissing
	}
	i.unmix()
	s.ppk = false
	return nil
}

// ppkAsked is the responder's: it mixes the PPK in, or takes the AUTH without
// one in place of auth. answer is what the response is to say.
func (s *SA) ppkAsked(i *ikeSA, r *pad.Rule, ps []ikev2.Payload, auth *ikev2.Auth) (answer *ikev2.Notify, err error) {
	n, without := ikev2.FindNotify(ps, ikev2.PPK_IDENTITY), ikev2.FindNotify(ps, ikev2.NO_PPK_AUTH)
	var k ipsec.Key
	known := false
	if s.ppk && n != nil {
		k, known = ppkOf(r, n)
	}
	switch {
	case known:
		return notify(ikev2.PPK_IDENTITY), s.mix(i, k, false)
	case r.PPK == pad.PPKRequire && n != nil:
		return nil, fmt.Errorf("PPK %q is not one of rule %q, which requires one", ppkName(n), r.Label)
	case r.PPK == pad.PPKRequire:
		return nil, errPPKMissing
	case n != nil && without == nil:
		return nil, fmt.Errorf("the peer requires PPK %q, which rule %q has not", ppkName(n), r.Label)
	case without != nil && n != nil:
		auth.Data = without.Data
	}
	s.ppk = false
	return nil, nil
}

// ppkName is the identity in a notify, which is no secret, for the log.
func ppkName(n *ikev2.Notify) string {
	if len(n.Data) < 2 {
		return ""
	}
	return string(n.Data[1:min(len(n.Data), 64)])
}
