// Package proposal negotiates algorithms for IKEv2: it builds the SA payloads
// that we offer, chooses from the peer's as responder, and checks the peer's
// choice as initiator (RFC 7296, 2.7 and 3.3). It is where our algorithm
// identities and IKE's transform numbers meet.
//
// As responder our order decides: our proposals in order, in each the first of
// our alternatives that the peer offers too. For pkg/ike and what lies in it.
package proposal

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Cipher is a cipher with the size of its key, without salt, in bits.
type Cipher struct {
	Encr alg.Encr
	Bits int // 0 for a cipher without key
}

func (c Cipher) String() string {
	if c.Bits == 0 {
		return c.Encr.String()
	}
	return fmt.Sprintf("%v(%d)", c.Encr, c.Bits)
}

// IKE is one proposal for an IKE SA: alternatives per transform type, best
// first. Ciphers are all AEAD, then Integ is empty, or all not (RFC 7296, 3.3).
type IKE struct {
	Ciphers []Cipher
	Integ   []alg.Integ
	PRF     []alg.PRF
	KE      []alg.KE
	// AddKE are the additional key exchanges in their order, up to MaxAddKE,
	// each with its alternatives; KENone among these makes it optional.
	AddKE [][]alg.KE
}

// MaxAddKE is how many additional key exchanges there can be (RFC 9370, 2.2.1).
const MaxAddKE = 7

// AddKEs are the methods agreed on for the additional key exchanges; KENone: that
// one does not take place.
type AddKEs [MaxAddKE]alg.KE

// Methods lists those that take place, in their order.
func (a AddKEs) Methods() (l []alg.KE) {
	for _, k := range a {
		if k != alg.KENone {
			l = append(l, k)
		}
	}
	return l
}

func (a AddKEs) String() string {
	var b strings.Builder
	for _, k := range a.Methods() {
		b.WriteString("/" + k.String())
	}
	return b.String()
}

// IKESuite is what was agreed for an IKE SA.
type IKESuite struct {
	Cipher
	Integ alg.Integ // IntegNone with an AEAD cipher
	PRF   alg.PRF
	KE    alg.KE
	AddKE AddKEs
}

func (s IKESuite) String() string {
	if s.Integ == alg.IntegNone {
		return fmt.Sprintf("%v/prf-%v/%v%v", s.Cipher, s.PRF, s.KE, s.AddKE)
	}
	return fmt.Sprintf("%v/%v/prf-%v/%v%v", s.Cipher, s.Integ, s.PRF, s.KE, s.AddKE)
}

// Child is one proposal for a child SA of ESP or AH.
type Child struct {
	AH      bool // which has no ciphers
	Ciphers []Cipher
	Integ   []alg.Integ
	// KE are the methods for a key exchange of its own (PFS), best first.
	// KENone among them makes do without; an empty list is KENone alone.
	// KESame is resolved by WithKE.
	KE    []alg.KE
	AddKE [][]alg.KE // additional key exchanges, as of IKE; none without one in KE
	ESN   []bool     // acceptable, best first
	// Hard and Soft are what the policy wants of an SA made from this; zero
	// where it says nothing.
	Hard, Soft ipsec.Lifetime
}

// Proto is the protocol of the SAs.
func (p Child) Proto() ipsec.Protocol { return protoOf(p.AH) }

func protoOf(ah bool) ipsec.Protocol {
	if ah {
		return ipsec.AH
	}
	return ipsec.ESP
}

// ProtocolID is the number that IKE has for ESP or AH (RFC 7296, 3.3.1).
func ProtocolID(p ipsec.Protocol) ikev2.ProtocolID {
	if p == ipsec.AH {
		return ikev2.ProtocolAH
	}
	return ikev2.ProtocolESP
}

// ProtocolOf is the reverse of ProtocolID; false for other protocols.
func ProtocolOf(id ikev2.ProtocolID) (ipsec.Protocol, bool) {
	return protoOf(id == ikev2.ProtocolAH), id == ikev2.ProtocolESP || id == ikev2.ProtocolAH
}

// ChildSuite is what was agreed for a child SA.
type ChildSuite struct {
	AH bool // without cipher
	Cipher
	Integ      alg.Integ
	KE         alg.KE // KENone: keys come from the IKE SA's SK_d alone
	AddKE      AddKEs
	ESN        bool
	Hard, Soft ipsec.Lifetime // of the proposal of ours that it came from
}

// Proto is the protocol of the SAs.
func (s ChildSuite) Proto() ipsec.Protocol { return protoOf(s.AH) }

func (s ChildSuite) String() string {
	parts := []string{s.Cipher.String()}
	if s.AH {
		parts[0] = "ah"
	}
	if s.Integ != alg.IntegNone {
		parts = append(parts, s.Integ.String())
	}
	if s.KE != alg.KENone {
		parts = append(parts, s.KE.String()+s.AddKE.String())
	}
	if s.ESN {
		parts = append(parts, "esn")
	}
	return strings.Join(parts, "/")
}

// Errors. They wrap one of these.
var (
	// ErrNone: nothing that both sides accept (NO_PROPOSAL_CHOSEN).
	ErrNone = errors.New("no proposal chosen")
	// ErrChoice: the responder chose what we did not offer; the exchange fails.
	ErrChoice = errors.New("peer chose what was not offered")
)

// Mismatch is the error when nothing fits; it tells both sides' offers for the
// log, and first where they part.
type Mismatch struct {
	Who          string // whose ours are, "" for "we": a rule
	Ours, Theirs []ikev2.Proposal
}

func (e *Mismatch) Error() string {
	who := e.Who
	if who == "" {
		who = "our side"
	}
	return fmt.Sprintf("%v: %s; ours %v, theirs %v", ErrNone, Difference(who, e.Ours, e.Theirs), list(e.Ours), list(e.Theirs))
}

// Unwrap gives ErrNone.
func (e *Mismatch) Unwrap() error { return ErrNone }

// maxListed bounds what a peer can put into a line of the log, in octets.
const maxListed = 2000

func list(ps []ikev2.Proposal) string {
	var s []string
	n := 0
	for _, p := range ps {
		if n > maxListed {
			s = append(s, "…")
			break
		}
		p.Transforms = p.Transforms[:min(len(p.Transforms), maxLooked)]
		s = append(s, p.String())
		n += len(s[len(s)-1])
	}
	return "[" + strings.Join(s, ", ") + "]"
}

// slot is one transform type of a proposal of ours: its alternatives in our
// order. An alternative with ID 0 of type INTEG, KE or ADDKE is NONE, which stands
// for absence as well.
type slot struct {
	typ  ikev2.TransformType
	alts []ikev2.Transform
}

func (s slot) hasNone() bool {
	return (s.typ == ikev2.TransformINTEG || s.keyExchange()) &&
		slices.ContainsFunc(s.alts, func(t ikev2.Transform) bool { return t.ID == 0 })
}

// keyExchange: a method stands for at most one of these types in what is chosen.
func (s slot) keyExchange() bool {
	_, add := addKEIndex(s.typ)
	return add || s.typ == ikev2.TransformKE
}

func (p IKE) slots() []slot {
	return append([]slot{
		{ikev2.TransformENCR, each(p.Ciphers, EncrTransform)},
		{ikev2.TransformINTEG, integAlts(p.Integ)},
		{ikev2.TransformPRF, each(p.PRF, PRFTransform)},
		{ikev2.TransformKE, each(p.KE, KETransform)},
	}, addKESlots(p.AddKE)...)
}

func addKESlots(add [][]alg.KE) (l []slot) {
	for n, kes := range add[:min(len(add), MaxAddKE)] {
		l = append(l, slot{ikev2.TransformADDKE1 + ikev2.TransformType(n), each(kes, func(k alg.KE) ikev2.Transform { return addKETransform(n, k) })})
	}
	return l
}

// slots of a child; initial ones, those of IKE_AUTH, have no key exchange
// (RFC 7296, 1.2).
func (p Child) slots(initial bool) []slot {
	ke := p.KE
	if initial || len(ke) == 0 {
		ke = []alg.KE{alg.KENone}
	}
	l := []slot{
		{ikev2.TransformENCR, each(p.Ciphers, EncrTransform)},
		{ikev2.TransformINTEG, integAlts(p.Integ)},
		{ikev2.TransformKE, each(ke, KETransform)},
		{ikev2.TransformESN, each(p.ESN, ESNTransform)},
	}
	if !initial {
		l = append(l, addKESlots(p.AddKE)...)
	}
	if p.AH {
		return l[1:]
	}
	return l
}

func integAlts(a []alg.Integ) []ikev2.Transform {
	if len(a) == 0 { // AEAD
		a = []alg.Integ{alg.IntegNone}
	}
	return each(a, IntegTransform)
}

func each[T any](l []T, f func(T) ikev2.Transform) []ikev2.Transform {
	ts := make([]ikev2.Transform, len(l))
	for i, v := range l {
		ts[i] = f(v)
	}
	return ts
}

// maxProposals is what the octet that numbers proposals can count; an offer
// leaves out what comes after.
const maxProposals = 255

// offer makes the wire form. A type whose only alternative is NONE is left out.
func offer(number int, proto ikev2.ProtocolID, spi []byte, slots []slot) ikev2.Proposal {
	p := ikev2.Proposal{Number: uint8(number), Protocol: proto, SPI: spi}
	for _, s := range slots {
		if !(len(s.alts) == 1 && s.hasNone()) {
			p.Transforms = append(p.Transforms, s.alts...)
		}
	}
	return p
}

// choose picks one alternative per slot from what the peer offers. A transform
// type that we have no slot for, or none of whose transforms we know, makes the
// whole proposal unacceptable (RFC 7296, 3.3.6), unless it is an additional key
// exchange that the peer can do without.
func choose(slots []slot, peer []ikev2.Transform) (chosen []ikev2.Transform, ok bool) {
	has := func(t ikev2.Transform) bool { return slices.ContainsFunc(peer, t.Equal) }
	for _, t := range peer {
		if slices.ContainsFunc(slots, func(s slot) bool { return s.typ == t.Type }) {
			continue
		}
		n, add := addKEIndex(t.Type)
		if !add || !has(addKETransform(n, alg.KENone)) {
			return nil, false
		}
		slots = append(slices.Clone(slots), slot{t.Type, []ikev2.Transform{addKETransform(n, alg.KENone)}})
	}
	var kes []slot // key exchanges, reduced to what both have
	for _, s := range slots {
		if !slices.ContainsFunc(peer, func(t ikev2.Transform) bool { return t.Type == s.typ }) {
			if !s.hasNone() {
				return nil, false
			}
			continue
		}
		common := slices.DeleteFunc(slices.Clone(s.alts), func(a ikev2.Transform) bool { return !has(a) })
		switch {
		case len(common) == 0:
			return nil, false
		case s.keyExchange():
			kes = append(kes, slot{s.typ, common})
		default:
			chosen = append(chosen, common[0])
		}
	}
	ts, ok := distinct(kes)
	return append(chosen, ts...), ok
}

// distinct picks an alternative for each key exchange, the first that leaves
// one for all, so that no method stands twice (RFC 9370, 2.2.1); NONE may.
func distinct(kes []slot) (chosen []ikev2.Transform, ok bool) {
	for i, s := range kes {
		rest := kes[i+1:]
		found := false
		for _, a := range s.alts {
			if a.ID != 0 && slices.ContainsFunc(chosen, func(t ikev2.Transform) bool { return t.ID == a.ID }) {
				continue
			}
			if found = placeable(rest, append(slices.Clone(chosen), a)); found {
				chosen = append(chosen, a)
				break
			}
		}
		if !found {
			return nil, false
		}
	}
	return chosen, true
}

// placeable reports whether each of kes can have a method of its own besides
// those taken: a matching, by augmenting paths.
func placeable(kes []slot, taken []ikev2.Transform) bool {
	owner := map[uint16]int{}
	for _, t := range taken {
		owner[t.ID] = -1
	}
	var place func(i int, seen map[uint16]bool) bool
	place = func(i int, seen map[uint16]bool) bool {
		for _, a := range kes[i].alts {
			if a.ID == 0 {
				return true
			}
			if seen[a.ID] {
				continue
			}
			seen[a.ID] = true
			if o, has := owner[a.ID]; !has || o >= 0 && place(o, seen) {
				owner[a.ID] = i
				return true
			}
		}
		return false
	}
	for i := range kes {
		if !place(i, map[uint16]bool{}) {
			return false
		}
	}
	return true
}

// check verifies a responder's answer against one proposal of ours: exactly one
// transform per type, each of them offered.
func check(slots []slot, answer []ikev2.Transform) error {
	seen := map[ikev2.TransformType]bool{}
	for _, t := range answer {
		if seen[t.Type] {
			return fmt.Errorf("%w: two transforms of type %v", ErrChoice, t.Type)
		}
		seen[t.Type] = true
	}
	if _, ok := choose(slots, answer); !ok {
		return fmt.Errorf("%w: %v", ErrChoice, ikev2.Proposal{Transforms: answer})
	}
	return nil
}

// set notes what was agreed on for one additional key exchange; false for a
// transform of another type.
func (a *AddKEs) set(t ikev2.Transform) bool {
	n, ok := addKEIndex(t.Type)
	if ok {
		a[n] = alg.KE(t.ID)
	}
	return ok
}

func ikeSuite(ts []ikev2.Transform) (s IKESuite, err error) {
	ok := true
	for _, t := range ts {
		var known bool
		switch t.Type {
		case ikev2.TransformENCR:
			s.Cipher, known = cipherOf(t)
		case ikev2.TransformINTEG:
			s.Integ, known = reverse(integIDs, t.ID)
		case ikev2.TransformPRF:
			s.PRF, known = reverse(prfIDs, t.ID)
		case ikev2.TransformKE:
			s.KE, known = alg.KE(t.ID), true
		default:
			known = s.AddKE.set(t)
		}
		ok = ok && known
	}
	if !ok {
		return IKESuite{}, fmt.Errorf("%w: %v", ErrChoice, ikev2.Proposal{Protocol: ikev2.ProtocolIKE, Transforms: ts})
	}
	return s, nil
}

func childSuite(ts []ikev2.Transform, from Child) (s ChildSuite, err error) {
	ok := true
	for _, t := range ts {
		var known bool
		switch t.Type {
		case ikev2.TransformENCR:
			s.Cipher, known = cipherOf(t)
		case ikev2.TransformINTEG:
			s.Integ, known = reverse(integIDs, t.ID)
		case ikev2.TransformKE:
			s.KE, known = alg.KE(t.ID), true
		case ikev2.TransformESN:
			s.ESN, known = t.ID == uint16(ikev2.ESNYes), true
		default:
			known = s.AddKE.set(t)
		}
		ok = ok && known
	}
	if !ok {
		return ChildSuite{}, fmt.Errorf("%w: %v", ErrChoice, ikev2.Proposal{Protocol: ProtocolID(from.Proto()), Transforms: ts})
	}
	s.AH = from.AH
	s.Hard, s.Soft = from.Hard, from.Soft
	return s, nil
}
