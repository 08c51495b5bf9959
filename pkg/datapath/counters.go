package datapath

import "sync/atomic"

// Counter names one thing that can happen to a packet. Every packet that is
// not passed on is counted under exactly one of the Drop counters.
type Counter uint8

// Counters, outbound then inbound.
const (
	OutProtected     Counter = iota // sealed and sent
	OutBypassed                     // sent as it was
	OutHeld                         // waits for an SA
	OutReleased                     // left the hold queue with an SA
	OutAggregated                   // of the protected, those that share an ESP packet with others (RFC 9347)
	OutAggregates                   // ESP packets that hold several packets
	OutPadded                       // packets padded against traffic analysis (RFC 4303, 2.7)
	OutCompressed                   // packets compressed by IPComp inside their SA of ESP or AH (RFC 3173)
	OutFragments                    // fragments made of results above the path MTU
	OutTooBig                       // answered with ICMP "fragmentation needed" or "packet too big", once for those of a super-frame
	OutAnswered                     // ARP requests and neighbour solicitations answered
	OutOther                        // frames of a bump that are not IP
	OutNoise                        // link-local control traffic of the TAP's own link
	DropOutDiscard                  // policy: discard
	DropOutNoPolicy                 // no policy matches and the default is drop
	DropOutMalformed                // not a valid IP packet
	DropOutFragment                 // fragment that could not be reassembled
	DropOutHold                     // fell out of a full hold queue, or its negotiation failed
	DropOutNoPeer                   // a policy for any peer, and none has an SA for the packet
	DropOutSequence                 // sequence numbers of the SA used up
	DropOutLifetime                 // hard limit of the SA reached
	DropOutSeal                     // transform refused the packet
	DropOutSend                     // the interface refused the packet
	InProtected                     // opened, allowed and delivered
	InOther                         // frames of a bump that are not IP
	InBypassed                      // clear packets that policy allows
	InFragments                     // outer fragments taken for reassembly
	InDummy                         // RFC 4303, 2.6: next header 59
	InKeepalive                     // NAT keepalives
	InEarly                         // came before the keys of their SA, and wait for them
	InIKE                           // IKE messages handed to the key daemon
	InCoalesced                     // packets delivered within super-frames
	InSuper                         // super-frames written to the TAP
	InAggregated                    // packets that shared an ESP packet with others (RFC 9347)
	InAggregates                    // ESP packets that held several packets
	InRejoined                      // packets put together from the fragments of several ESP packets (RFC 9347)
	InExpanded                      // packets expanded that were compressed inside their SA of ESP or AH
	DropInNoSA                      // no SA for destination, protocol and SPI
	DropInReplay                    // sequence number seen or left of the window
	DropInAuth                      // ICV wrong
	DropInMalformed                 // too short, bad padding, bad inner packet
	DropInIPComp                    // no DEFLATE, more than a packet once expanded, or a CPI that is not the SA's
	DropInECN                       // congestion marked on a packet whose transport does not know of it (RFC 6040, 4.2)
	DropInEncap                     // UDP encapsulation where the SA has none, or the reverse
	DropInSelector                  // inner packet outside the SA's selectors
	DropInPolicy                    // inner packet that policy does not expect from this SA
	DropInClear                     // clear packet that policy says must be protected
	DropInDiscard                   // policy: discard
	DropInNoPolicy                  // no policy matches and the default is drop
	DropInFragment                  // fragment that could not be reassembled
	DropInLifetime                  // hard limit of the SA reached
	DropInProtocol                  // transforms nested deeper than any policy can want, or of a known protocol with an unknown algorithm
	DropInIKE                       // IKE message that the key daemon did not take
	DropInTAP                       // the TAP refused the packet
	numCounters
)

var counterNames = [numCounters]string{
	"out_protected", "out_bypassed", "out_held", "out_released", "out_aggregated", "out_aggregates", "out_padded", "out_compressed", "out_fragments", "out_too_big", "out_answered", "out_other", "out_noise",
	"drop_out_discard", "drop_out_no_policy", "drop_out_malformed", "drop_out_fragment", "drop_out_hold", "drop_out_no_peer", "drop_out_sequence",
	"drop_out_lifetime", "drop_out_seal", "drop_out_send",
	"in_protected", "in_other", "in_bypassed", "in_fragments", "in_dummy", "in_keepalive", "in_early", "in_ike",
	"in_coalesced", "in_super_frames", "in_aggregated", "in_aggregates", "in_rejoined", "in_expanded",
	"drop_in_no_sa", "drop_in_replay", "drop_in_auth", "drop_in_malformed", "drop_in_ipcomp", "drop_in_ecn", "drop_in_encap", "drop_in_selector", "drop_in_policy",
	"drop_in_clear", "drop_in_discard", "drop_in_no_policy", "drop_in_fragment", "drop_in_lifetime", "drop_in_protocol",
	"drop_in_ike", "drop_in_tap",
}

func (c Counter) String() string {
	if c >= numCounters {
		return "Counter(?)"
	}
	return counterNames[c]
}

// counters belong to one worker, so that no cache line is shared by two
// writers; readers add the workers up.
type counters struct {
	v    [numCounters]atomic.Uint64
	last Counter // the writer's own: what it counted last
	_    [64]byte
}

func (c *counters) inc(k Counter) {
	c.v[k].Add(1)
	c.last = k
}

func (c *counters) add(k Counter, n uint) {
	if n != 0 {
		c.v[k].Add(uint64(n))
		c.last = k
	}
}

// drop reports whether packets counted under c end here.
func (c Counter) drop() bool {
	return c >= DropOutDiscard && c <= DropOutSend || c >= DropInNoSA && c < numCounters
}

// Stats is a sum of counters over all workers, by Counter.
type Stats [numCounters]uint64

func (s *Stats) add(c *counters) {
	for i := range c.v {
		s[i] += c.v[i].Load()
	}
}

// Map gives the counters their names.
func (s *Stats) Map() map[string]uint64 {
	m := make(map[string]uint64, numCounters)
	for i, v := range s {
		m[Counter(i).String()] = v
	}
	return m
}
