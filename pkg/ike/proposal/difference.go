package proposal

import (
	"fmt"
	"slices"
	"strings"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/proto/ikev2"
)

// What a peer sends may be long: a line of the log names so many alternatives,
// and so many proposals and transforms are looked at.
const (
	maxWords  = 12
	maxOffers = 16
	maxLooked = 64
)

// Difference says in a few words where two offers part: of the two proposals
// that have most in common, the first transform type without a common
// alternative. who is whose the first offer is, "we" or a rule.
//
//	peer offers modp1024 only; rule "gate" wants x25519, ecp256
func Difference(who string, ours, theirs []ikev2.Proposal) string {
	type pair struct{ o, t ikev2.Proposal }
	theirs = slices.Clone(theirs[:min(len(theirs), maxOffers)])
	for i, t := range theirs {
		theirs[i].Transforms = t.Transforms[:min(len(t.Transforms), maxLooked)]
	}
	var best pair
	most := -1
	for _, o := range ours {
		for _, t := range theirs {
			if o.Protocol != t.Protocol || len(o.SPI) != 0 && len(t.SPI) != 0 && len(o.SPI) != len(t.SPI) {
				continue
			}
			n := 0
			for _, typ := range typesOf(o, t) {
				if agree(o, t, typ) {
					n++
				}
			}
			if n > most {
				best, most = pair{o, t}, n
			}
		}
	}
	if most < 0 {
		return fmt.Sprintf("peer offers %s; %s wants %s", protocols(theirs), who, protocols(ours))
	}
	for _, typ := range typesOf(best.o, best.t) {
		if agree(best.o, best.t, typ) {
			continue
		}
		// All that either says of this type, unless the lists only meet in other
		// combinations.
		o, t := words(ours, typ), words(theirs, typ)
		if slices.ContainsFunc(o, func(w string) bool { return slices.Contains(t, w) }) || len(o) == 0 || len(t) == 0 {
			o, t = words([]ikev2.Proposal{best.o}, typ), words([]ikev2.Proposal{best.t}, typ)
		}
		switch {
		case len(t) == 0:
			return fmt.Sprintf("peer offers no %s; %s wants %s", kind(typ), who, listed(o))
		case len(o) == 0:
			return fmt.Sprintf("peer offers only with %s; %s has no %s", listed(t), who, kind(typ))
		}
		return fmt.Sprintf("peer offers %s only; %s wants %s", listed(t), who, listed(o))
	}
	return "each algorithm is in both offers, but with an attribute or in a number that does not fit"
}

// order is that in which the types are looked at, and named.
var order = []ikev2.TransformType{ikev2.TransformENCR, ikev2.TransformINTEG, ikev2.TransformPRF, ikev2.TransformKE, ikev2.TransformESN}

// typesOf lists the types of either, those of order first.
func typesOf(a, b ikev2.Proposal) []ikev2.TransformType {
	l := slices.Clone(order)
	for _, p := range []ikev2.Proposal{a, b} {
		for _, t := range p.Transforms {
			if !slices.Contains(l, t.Type) {
				l = append(l, t.Type)
			}
		}
	}
	return l
}

// agree reports whether two proposals have a common alternative of a type. None
// is one that both have when they do not speak of it, or say so.
func agree(a, b ikev2.Proposal, typ ikev2.TransformType) bool {
	of := func(p ikev2.Proposal) (l []ikev2.Transform, none bool) {
		none = true
		for _, t := range p.Transforms {
			if t.Type == typ {
				l, none = append(l, t), false
			}
		}
		mayLack := typ == ikev2.TransformINTEG || typ == ikev2.TransformKE || typ >= ikev2.TransformADDKE1 && typ <= ikev2.TransformADDKE7
		return l, none || mayLack && slices.ContainsFunc(l, func(t ikev2.Transform) bool { return t.ID == 0 })
	}
	la, na := of(a)
	lb, nb := of(b)
	return na && nb || slices.ContainsFunc(la, func(t ikev2.Transform) bool { return slices.ContainsFunc(lb, t.Equal) })
}

func words(ps []ikev2.Proposal, typ ikev2.TransformType) (l []string) {
	for _, p := range ps {
		for _, t := range p.Transforms {
			if w := word(t); t.Type == typ && !slices.Contains(l, w) {
				l = append(l, w)
			}
		}
	}
	return l
}

// word names a transform as ike.conf does, as far as it has a name there.
func word(t ikev2.Transform) string {
	if t.Type == ikev2.TransformKE && len(t.Attributes) == 0 {
		if ke := alg.KE(t.ID); slices.Contains(alg.AllKE(), ke) {
			return ke.String()
		}
	}
	return strings.ReplaceAll(strings.ToLower(t.String()), "_", "-")
}

func kind(typ ikev2.TransformType) string {
	switch typ {
	case ikev2.TransformENCR:
		return "cipher"
	case ikev2.TransformINTEG:
		return "integrity algorithm"
	case ikev2.TransformPRF:
		return "PRF"
	case ikev2.TransformKE:
		return "key exchange"
	case ikev2.TransformESN:
		return "choice of sequence numbers"
	}
	return typ.String()
}

func listed(l []string) string {
	if len(l) > maxWords {
		l = append(slices.Clone(l[:maxWords]), "…")
	}
	return strings.Join(l, ", ")
}

func protocols(ps []ikev2.Proposal) string {
	var l []string
	for _, p := range ps {
		if w := p.Protocol.String(); !slices.Contains(l, w) {
			l = append(l, w)
		}
	}
	if len(l) == 0 {
		return "nothing"
	}
	return listed(l)
}
