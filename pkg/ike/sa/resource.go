package sa

import (
	"encoding/binary"
	"errors"
	"slices"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Child SAs for single queues (RFC 9611). The first of a group, by IKE_AUTH or
// CREATE_CHILD_SA, is for any queue: the fallback SA. If both sides have put
// SA_RESOURCE_INFO beside it, others with the same selectors, algorithms and
// mode may follow by CREATE_CHILD_SA, each with a SA_RESOURCE_INFO too, and
// each side takes one for a queue of its own:
//
//	HDR, SK {.., SA, TSi, TSr, N(SA_RESOURCE_INFO)}  -->
//	               <--  HDR, SK {.., SA, TSi, TSr, N(SA_RESOURCE_INFO)}
//	HDR, SK {N(SA_RESOURCE_INFO, queue), SA, Ni, TSi, TSr}  -->
//	               <--  HDR, SK {N(SA_RESOURCE_INFO), SA, Nr, TSi, TSr}
//	               or   HDR, SK {N(TS_MAX_QUEUE)}
//
// What is in the notify is for people who read captures; nothing depends on it.
// What replaces a child SA by rekeying is for the same queue.

// maxResources is how many a peer may make beside a fallback SA, or twice the
// number of our queues if that is more (RFC 9611, 5: at least double the number
// of CPUs).
const maxResources = 32

// mayQueue: the child SAs of the policy are of one protocol, and not one for
// each flow.
func (p Policy) mayQueue() bool {
	return p.Out != nil && len(p.Out.Requests) == 1 && !p.Out.Choice() && !p.perFlow()
}

// queues: we want SAs for single queues beside the policy's. must: and nothing else.
func (s *SA) queues(p Policy) (wants, must bool) {
	if !p.mayQueue() {
		return false, false
	}
	return s.rule.PerQueue != pad.PerQueueNo, s.rule.PerQueue == pad.PerQueueRequire
}

// asksQueues: a fallback SA is worth asking for. With one queue only who insists
// does.
func (s *SA) asksQueues(p Policy) bool {
	wants, must := s.queues(p)
	return must || wants && s.cfg.Queues > 1
}

var (
	errNoResources = errors.New("peer does without SAs for single queues, which the rule requires")
	errNoFallback  = errors.New("there is no SA for any queue beside which the peer takes others")
	errQueuesFull  = errors.New("peer takes no more SAs for single queues")
)

// resourceInfo tells which queue an SA is for; of the fallback SA, 0, nothing.
func resourceInfo(q ipsec.Queue) *ikev2.Notify {
	if q == 0 {
		return notify(ikev2.SA_RESOURCE_INFO)
	}
	return notify(ikev2.SA_RESOURCE_INFO, binary.BigEndian.AppendUint32(nil, uint32(q))...)
}

// inGroup: c is a child SA of the policy for the same selectors, of those that
// belong together.
func (c *child) inGroup(p Policy, local, remote []ipsec.TrafficSelector) bool {
	same := func(a, b []ipsec.TrafficSelector) bool { return allWithin(a, b) && allWithin(b, a) }
	return c.resource && !c.deleting && !c.removed && c.policy.Out.Sel == p.Out.Sel && c.policy.reqIDs(c.proto) == p.reqIDs(c.proto) &&
		same(c.local, local) && same(c.remote, remote)
}

// fallback is the child SA for any queue that a request for one of its queues
// goes beside: it carries the packet that wants it.
func (s *SA) fallback(r *ChildRequest) *child {
	for _, c := range s.children {
		if c.queue != 0 || c.replaced != nil || !c.inGroup(r.Policy, c.local, c.remote) {
			continue
		}
		if r.Flow == nil {
			return c
		}
		l, p := flowTS(*r.Flow)
		if allWithin([]ipsec.TrafficSelector{l}, c.local) && allWithin([]ipsec.TrafficSelector{p}, c.remote) {
			return c
		}
	}
	return nil
}

// beside makes o, for a queue, one for an SA like fb.
func (s *SA) beside(o *offer, i *ikeSA, fb *child) {
	o.fallback, o.resource, o.req.Flow = fb, true, nil
	o.proposals = proposal.WithAnyKE(s.like(i, fb))
	o.tsi, o.tsr = append(o.tsi, fb.local...), append(o.tsr, fb.remote...)
}

// like is what the policy of fb offers, as far as it makes an SA of the same
// algorithms. Which key exchanges of its own there are is left to the rule,
// since in IKE_AUTH there are none.
func (s *SA) like(i *ikeSA, fb *child) []proposal.Child {
	suite := fb.suite
	for _, c := range proposal.ForChild(fb.policy.alternatives(), s.rule.PFS, s.esn()) {
		if c.AH != suite.AH || !c.AH && !slices.Contains(c.Ciphers, suite.Cipher) ||
			len(c.Integ) > 0 && !slices.Contains(c.Integ, suite.Integ) || len(c.Integ) == 0 && suite.Integ != alg.IntegNone {
			continue
		}
		if !c.AH {
			c.Ciphers = []proposal.Cipher{suite.Cipher}
		}
		if len(c.Integ) > 0 {
			c.Integ = []alg.Integ{suite.Integ}
		}
		c.ESN = []bool{suite.ESN}
		return proposal.WithAddKE(proposal.WithKE([]proposal.Child{c}, i.suite.KE), s.rule.ChildAddKE)
	}
	return nil
}

// groupOf finds the fallback SA of what a peer asks for, and how many there are
// beside it.
func (s *SA) groupOf(p Policy, local, remote []ipsec.TrafficSelector) (fb *child, beside int) {
	for _, c := range s.children {
		switch {
		case c.replaced != nil || !c.inGroup(p, local, remote):
		case c.queue != 0:
			beside++
		case fb == nil:
			fb = c
		}
	}
	return fb, beside
}

// idlestQueue is the one of ours that has the fewest SAs of fb's group.
func (s *SA) idlestQueue(fb *child) ipsec.Queue {
	n := make([]int, max(1, s.cfg.Queues))
	for _, c := range s.children {
		if k := int(c.queue); k > 0 && k <= len(n) && c.inGroup(fb.policy, fb.local, fb.remote) {
			n[k-1]++
		}
	}
	best := 0
	for k := range n {
		if n[k] < n[best] {
			best = k
		}
	}
	return ipsec.Queue(best + 1)
}
