package sa

import (
	"errors"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// AGGFRAG_PAYLOAD in the child SA (RFC 9347, 5.1, 6.1.4): used if the initiator
// asks for it by USE_AGGFRAG and the responder answers with one of its own. The
// octet in it says what its sender requires: the lowest bit that it gets no
// fragments, which we never send; the next congestion information, which we
// cannot give.
const aggfragCongestion = 2

// mayAggregate: the child SAs of the policy are ESP alone, in tunnel mode.
func (p Policy) mayAggregate() bool {
	if p.Out == nil || len(p.Out.Requests) != 1 || p.Out.Requests[0].Proto != ipsec.ESP || p.Out.Requests[0].Mode != ipsec.Tunnel || p.Out.Requests[0].Comp != 0 {
		return false
	}
	for i := range p.Out.Proposals {
		if p.Out.Proposals[i].Shape != ipsec.ShapeESP {
			return false
		}
	}
	return true
}

// aggregates: we want it for the policy's child SAs. must: and nothing else.
func (s *SA) aggregates(p Policy) (wants, must bool) {
	if !p.mayAggregate() {
		return false, false
	}
	return s.rule.AggFrag != pad.AggFragNo, s.rule.AggFrag == pad.AggFragRequire
}

func useAggfrag() *ikev2.Notify { return notify(ikev2.USE_AGGFRAG, 0) }

var (
	errAggfragMissing    = errors.New("peer does without AGGFRAG, which the rule requires")
	errAggfragUnasked    = errors.New("peer answers with AGGFRAG, which was not asked for")
	errAggfragMalformed  = errors.New("USE_AGGFRAG is not one octet")
	errAggfragCongestion = errors.New("peer requires congestion information in AGGFRAG")
)

// peerAggfrag reports whether a peer's message has USE_AGGFRAG, with an error if
// it is one that we cannot follow.
func peerAggfrag(ps []ikev2.Payload) (bool, error) {
	n := ikev2.FindNotify(ps, ikev2.USE_AGGFRAG)
	switch {
	case n == nil:
		return false, nil
	case len(n.Data) != 1:
		return true, errAggfragMalformed
	case n.Data[0]&aggfragCongestion != 0:
		return true, errAggfragCongestion
	}
	return true, nil
}
