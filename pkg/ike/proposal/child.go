package proposal

import (
	"slices"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// KESame stands for the key exchange method of the IKE SA in a list of methods
// for PFS. WithKE replaces it.
const KESame alg.KE = 0xffff

// ESN says whether extended sequence numbers are wanted.
type ESN uint8

// ESN choices, the zero value first.
const (
	ESNPrefer ESN = iota
	ESNNo
	ESNRequire
)

func (e ESN) list() []bool {
	switch e {
	case ESNNo:
		return []bool{false}
	case ESNRequire:
		return []bool{true}
	}
	return []bool{true, false}
}

// ForChild makes proposals of the alternatives of a policy, best first; without
// any, the defaults of ESP: AEAD, then AES-CBC with SHA-2. pfs is the list of
// methods for a key exchange of its own (Child.KE).
//
// An exchange makes SAs of one protocol. Of an alternative of ESP inside AH, ESP
// is what is proposed here, and AH is left to an exchange that follows: see
// Followers.
//
// An alternative without cipher (EncrNone) takes any cipher: the AEAD ones,
// unless it names an integrity algorithm, and AES-CBC. It never means NULL.
// Without integrity algorithm a cipher that is not an AEAD, and AH, are offered
// with all of SHA-2: never unauthenticated, and with SHA-1 only where the policy
// names it (RFC 8221, 6). Key lengths are the policy's range, longest first; a cipher without range is offered with all it has, so plain
// "aes" is 256, 192, 128.
//
// An alternative that nothing satisfies (a range without any key length of the
// cipher, a legacy algorithm) is left out; the list may then be empty.
func ForChild(alts []ipsec.Proposal, pfs []alg.KE, esn ESN) []Child {
	if len(alts) == 0 {
		return []Child{
			{Ciphers: slices.Clone(aesGCM16), KE: pfs, ESN: esn.list()},
			{Ciphers: slices.Clone(aesCBC), Integ: slices.Clone(sha2), KE: pfs, ESN: esn.list()},
		}
	}
	var out []Child
	for _, a := range alts {
		var cs []Child
		switch _, known := integIDs[a.AH]; {
		case !known: // legacy
		case a.Shape.Has(ipsec.ESP):
			cs = expand(a)
		default:
			cs = []Child{{AH: true, Integ: integs(a.AH)}}
		}
		for _, c := range cs {
			c.KE, c.ESN, c.Hard, c.Soft = pfs, esn.list(), a.Hard, a.Soft
			out = append(out, c)
		}
	}
	return out
}

// Followers are the parts about AH of those alternatives whose ESP is asked for
// first. A responder accepts them when nothing else fits; it cannot know that
// they belong to the ESP SA that came before, and need not: its policy wants both
// on a packet.
func Followers(alts []ipsec.Proposal) []ipsec.Proposal {
	var l []ipsec.Proposal
	for _, a := range alts {
		if a.Shape == ipsec.ShapeAHESP {
			l = append(l, ipsec.Parts([]ipsec.Proposal{a}, ipsec.AH)...)
		}
	}
	return l
}

// integs lists a, or if it is none what any means.
func integs(a alg.Integ) []alg.Integ {
	if a == alg.IntegNone {
		return slices.Clone(sha2)
	}
	return []alg.Integ{a}
}

// Admits reports whether an SA of suite may be one of alternative a.
func Admits(a ipsec.Proposal, suite ChildSuite) bool {
	a, ok := a.Part(suite.Proto())
	return ok && slices.ContainsFunc(ForChild([]ipsec.Proposal{a}, nil, ESNPrefer), func(c Child) bool {
		return (c.AH || slices.Contains(c.Ciphers, suite.Cipher)) && (len(c.Integ) == 0 && suite.Integ == alg.IntegNone || slices.Contains(c.Integ, suite.Integ))
	})
}

// expand gives the one or two proposals of an alternative: AEAD and other
// ciphers may not share one (RFC 7296, 3.3).
func expand(a ipsec.Proposal) []Child {
	if _, known := integIDs[a.Auth]; !known || a.Auth.Info().AHOnly {
		return nil // legacy, or of AH
	}
	encrs := []alg.Encr{a.Encr}
	if a.Encr == alg.EncrNone {
		encrs = []alg.Encr{alg.EncrAESGCM16, alg.EncrChaCha20Poly1305, alg.EncrAESCBC}
	}
	var aead, plain Child
	for _, e := range encrs {
		switch cs := sized(e, a.EncrMinBits, a.EncrMaxBits); {
		case !e.Info().AEAD:
			plain.Ciphers = append(plain.Ciphers, cs...)
		case a.Auth == alg.IntegNone:
			aead.Ciphers = append(aead.Ciphers, cs...)
		}
	}
	plain.Integ = integs(a.Auth)
	var out []Child
	for _, c := range []Child{aead, plain} {
		if len(c.Ciphers) > 0 {
			out = append(out, c)
		}
	}
	return out
}

// sized lists e with each of its key lengths in [lo, hi] bits, longest first; 0 is no bound.
func sized(e alg.Encr, lo, hi uint16) []Cipher {
	if _, ok := encrIDs[e]; !ok || e.Legacy() {
		return nil
	}
	bits := e.Info().KeyBits
	if bits == nil {
		return []Cipher{{e, 0}}
	}
	var cs []Cipher
	for _, b := range bits {
		if b >= int(lo) && (hi == 0 || b <= int(hi)) {
			cs = append(cs, Cipher{e, b})
		}
	}
	slices.SortFunc(cs, func(a, b Cipher) int { return b.Bits - a.Bits })
	return cs
}

// WithKE returns ps with KESame replaced by ike, and methods that then stand
// twice only once.
func WithKE(ps []Child, ike alg.KE) []Child {
	out := slices.Clone(ps)
	for i := range out {
		var ke []alg.KE
		for _, k := range out[i].KE {
			if k == KESame {
				k = ike
			}
			if !slices.Contains(ke, k) {
				ke = append(ke, k)
			}
		}
		out[i].KE = ke
	}
	return out
}

// WithAddKE returns ps with the additional key exchanges add, best first. Where
// each of these is optional, ps follow as they are: an additional key exchange
// needs one that it is additional to.
func WithAddKE(ps []Child, add [][]alg.KE) []Child {
	if len(add) == 0 {
		return ps
	}
	var with []Child
	for _, p := range ps {
		p.KE = slices.DeleteFunc(slices.Clone(p.KE), func(k alg.KE) bool { return k == alg.KENone })
		if p.AddKE = add; len(p.KE) > 0 {
			with = append(with, p)
		}
	}
	if slices.ContainsFunc(add, func(l []alg.KE) bool { return !slices.Contains(l, alg.KENone) }) {
		return with
	}
	return append(with, ps...)
}

// anyKE adds every method that we have if we can make do without any.
func (p Child) anyKE() Child {
	if !slices.Contains(p.KE, alg.KENone) {
		return p
	}
	ke := slices.Clone(p.KE)
	for _, k := range allKE {
		if !slices.Contains(ke, k) {
			ke = append(ke, k)
		}
	}
	p.KE = ke
	return p
}

// WithAnyKE returns ps for an offer to a peer that may insist on a method of its
// own: where PFS is wanted and we can make do without, any method that we have is
// welcome, after those listed.
func WithAnyKE(ps []Child) []Child {
	out := slices.Clone(ps)
	for i, p := range out {
		if len(p.KE) > 1 { // KENone alone: no PFS is wanted
			out[i] = p.anyKE()
		}
	}
	return out
}

// FirstKE returns the method to put into the KE payload of an offer; KENone if
// the best proposal makes do without.
func FirstKE(ps []Child) alg.KE {
	if len(ps) == 0 || len(ps[0].KE) == 0 {
		return alg.KENone
	}
	return ps[0].KE[0]
}

// OfferChild makes the SA payload that offers ps for an SA that we receive on
// spi, of whichever protocol is chosen. initial says that it goes into IKE_AUTH, where there is no key exchange.
func OfferChild(ps []Child, spi ipsec.SPI, initial bool) *ikev2.SA {
	sa := &ikev2.SA{}
	for i, p := range ps[:min(len(ps), maxProposals)] {
		sa.Proposals = append(sa.Proposals, offer(i+1, ProtocolID(p.Proto()), SPIBytes(spi), p.slots(initial)))
	}
	return sa
}

// ChooseChild is the responder's choice. answer is the proposal to send back,
// with our spi; peer the SPI that the initiator receives on. Where we can make
// do without PFS, any method that we have is welcome, after those listed.
// The error is a *Mismatch.
func ChooseChild(ours []Child, offered *ikev2.SA, spi ipsec.SPI, initial bool) (s ChildSuite, answer ikev2.Proposal, peer ipsec.SPI, err error) {
	for _, p := range ours {
		if len(p.KE) == 0 {
			p.KE = []alg.KE{alg.KENone}
		}
		slots := p.anyKE().slots(initial)
		for _, o := range offered.Proposals {
			peer, ok := SPIFromBytes(o.SPI)
			if o.Protocol != ProtocolID(p.Proto()) || !ok {
				continue
			}
			theirs := o.Transforms
			if initial {
				theirs = withoutKE(theirs)
			}
			ts, ok := choose(slots, theirs)
			if !ok {
				continue
			}
			if s, err := childSuite(ts, p); err == nil {
				return s, ikev2.Proposal{Number: o.Number, Protocol: o.Protocol, SPI: SPIBytes(spi), Transforms: ts}, peer, nil
			}
		}
	}
	return ChildSuite{}, ikev2.Proposal{}, 0, &Mismatch{Ours: OfferChild(ours, 0, initial).Proposals, Theirs: offered.Proposals}
}

// withoutKE leaves out key exchanges. In IKE_AUTH there is none, and no method must
// be offered (RFC 7296, 1.2); some peers offer there what they will rekey by.
func withoutKE(l []ikev2.Transform) []ikev2.Transform {
	return slices.DeleteFunc(slices.Clone(l), func(t ikev2.Transform) bool { return slot{typ: t.Type}.keyExchange() })
}

// CheckChild checks the responder's choice against what OfferChild(ours, …)
// offered, and returns the SPI that the responder receives on. The error wraps
// ErrChoice.
func CheckChild(ours []Child, answer *ikev2.SA, initial bool) (s ChildSuite, peer ipsec.SPI, err error) {
	proto := ikev2.ProtocolESP
	if len(answer.Proposals) > 0 {
		if n := int(answer.Proposals[0].Number); 0 < n && n <= len(ours) {
			proto = ProtocolID(ours[n-1].Proto())
		}
	}
	p, err := single(answer, len(ours), proto, 4)
	if err != nil {
		return ChildSuite{}, 0, err
	}
	peer, ok := SPIFromBytes(p.SPI)
	if !ok {
		return ChildSuite{}, 0, ErrChoice
	}
	if err := check(ours[p.Number-1].slots(initial), p.Transforms); err != nil {
		return ChildSuite{}, 0, err
	}
	s, err = childSuite(p.Transforms, ours[p.Number-1])
	return s, peer, err
}

// SPIBytes is the SPI as it stands in a proposal: 4 octets, big-endian.
func SPIBytes(s ipsec.SPI) []byte {
	return []byte{byte(s >> 24), byte(s >> 16), byte(s >> 8), byte(s)}
}

// SPIFromBytes reads the SPI of a proposal; false unless it has 4 octets and is
// one that an SA may have.
func SPIFromBytes(b []byte) (ipsec.SPI, bool) {
	if len(b) != 4 {
		return 0, false
	}
	s := ipsec.SPI(b[0])<<24 | ipsec.SPI(b[1])<<16 | ipsec.SPI(b[2])<<8 | ipsec.SPI(b[3])
	return s, s >= ipsec.MinSPI
}
