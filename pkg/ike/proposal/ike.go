package proposal

import (
	"fmt"
	"slices"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/proto/ikev2"
)

var (
	defaultKE = []alg.KE{alg.KEX25519, alg.KEECP256, alg.KEECP384, alg.KEMODP2048, alg.KEMODP3072, alg.KEMODP4096}
	// allKE are those that a peer may choose where we need none.
	allKE    = append(slices.Clone(defaultKE), alg.KEECP521)
	sha2     = []alg.Integ{alg.IntegHMACSHA256, alg.IntegHMACSHA384, alg.IntegHMACSHA512}
	sha2PRF  = []alg.PRF{alg.PRFHMACSHA256, alg.PRFHMACSHA384, alg.PRFHMACSHA512}
	aesGCM16 = []Cipher{{alg.EncrAESGCM16, 256}, {alg.EncrChaCha20Poly1305, 256}, {alg.EncrAESGCM16, 128}}
	aesCBC   = []Cipher{{alg.EncrAESCBC, 256}, {alg.EncrAESCBC, 192}, {alg.EncrAESCBC, 128}}
)

// DefaultIKE is what we offer for an IKE SA when the configuration has no
// proposals: AEAD with ML-KEM-768 as an additional key exchange, AEAD without,
// then AES-CBC with SHA-2. What RFC 8247 has below SHOULD, SHA-1 above all, is
// for rules that name it. A peer that knows no additional key exchanges passes
// over the first (RFC 7296, 3.3.6); the KE payload suits all of them.
func DefaultIKE() []IKE {
	return []IKE{
		{Ciphers: slices.Clone(aesGCM16), PRF: slices.Clone(sha2PRF), KE: slices.Clone(defaultKE), AddKE: [][]alg.KE{{alg.KEMLKEM768}}},
		{Ciphers: slices.Clone(aesGCM16), PRF: slices.Clone(sha2PRF), KE: slices.Clone(defaultKE)},
		{Ciphers: slices.Clone(aesCBC), Integ: slices.Clone(sha2), PRF: slices.Clone(sha2PRF), KE: slices.Clone(defaultKE)},
	}
}

// OfferIKE makes the SA payload that offers ps. spi is empty for the first IKE
// SA, and our 8 octets when it rekeys.
func OfferIKE(ps []IKE, spi []byte) *ikev2.SA {
	sa := &ikev2.SA{}
	for i, p := range ps[:min(len(ps), maxProposals)] {
		sa.Proposals = append(sa.Proposals, offer(i+1, ikev2.ProtocolIKE, spi, p.slots()))
	}
	return sa
}

// ChooseIKE is the responder's choice from an offer. answer is the proposal to
// send back, with the peer's number and an empty SPI that the caller replaces
// when rekeying. peer is the chosen proposal as it was offered, with the
// initiator's SPI. spiLen is 0 for the first IKE SA, 8 when rekeying; proposals
// with another SPI length are passed over. The error is a *Mismatch.
func ChooseIKE(ours []IKE, offered *ikev2.SA, spiLen int) (s IKESuite, answer, peer ikev2.Proposal, err error) {
	for _, p := range ours {
		slots := p.slots()
		for _, o := range offered.Proposals {
			if o.Protocol != ikev2.ProtocolIKE || len(o.SPI) != spiLen {
				continue
			}
			ts, ok := choose(slots, o.Transforms)
			if !ok {
				continue
			}
			if s, err := ikeSuite(ts); err == nil {
				return s, ikev2.Proposal{Number: o.Number, Protocol: o.Protocol, Transforms: ts}, o, nil
			}
		}
	}
	return IKESuite{}, ikev2.Proposal{}, ikev2.Proposal{}, &Mismatch{Ours: OfferIKE(ours, nil).Proposals, Theirs: offered.Proposals}
}

// CheckIKE checks the responder's choice against what OfferIKE(ours, …) offered.
// The error wraps ErrChoice.
func CheckIKE(ours []IKE, answer *ikev2.SA, spiLen int) (IKESuite, error) {
	p, err := single(answer, len(ours), ikev2.ProtocolIKE, spiLen)
	if err != nil {
		return IKESuite{}, err
	}
	if err := check(ours[p.Number-1].slots(), p.Transforms); err != nil {
		return IKESuite{}, err
	}
	return ikeSuite(p.Transforms)
}

// ContainsIKE reports whether one of ours would accept s: whether a rule whose
// proposals these are can be the rule of an IKE SA with that suite.
func ContainsIKE(ours []IKE, s IKESuite) bool {
	return slices.ContainsFunc(ours, func(p IKE) bool {
		integ := len(p.Integ) == 0 && s.Integ == alg.IntegNone || slices.Contains(p.Integ, s.Integ)
		for n, k := range s.AddKE {
			alts := []alg.KE{alg.KENone}
			if n < len(p.AddKE) {
				alts = p.AddKE[n]
			}
			if !slices.Contains(alts, k) {
				return false
			}
		}
		return integ && slices.Contains(p.Ciphers, s.Cipher) && slices.Contains(p.PRF, s.PRF) && slices.Contains(p.KE, s.KE)
	})
}

// WithoutAddKE returns what is left of ps for a peer that knows no
// IKE_INTERMEDIATE: those that can do without additional key exchanges.
func WithoutAddKE(ps []IKE) []IKE {
	var out []IKE
	for _, p := range ps {
		if !slices.ContainsFunc(p.AddKE, func(l []alg.KE) bool { return !slices.Contains(l, alg.KENone) }) {
			p.AddKE = nil
			out = append(out, p)
		}
	}
	return out
}

// single returns the one proposal of an answer, whose number is one of ours.
func single(answer *ikev2.SA, n int, proto ikev2.ProtocolID, spiLen int) (ikev2.Proposal, error) {
	if len(answer.Proposals) != 1 {
		return ikev2.Proposal{}, fmt.Errorf("%w: %d proposals", ErrChoice, len(answer.Proposals))
	}
	p := answer.Proposals[0]
	if p.Number == 0 || int(p.Number) > n || p.Protocol != proto || len(p.SPI) != spiLen {
		return ikev2.Proposal{}, fmt.Errorf("%w: number %d of %d, protocol %v, SPI of %d octets", ErrChoice, p.Number, n, p.Protocol, len(p.SPI))
	}
	return p, nil
}
