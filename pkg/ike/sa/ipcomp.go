package sa

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// IPComp inside the ESP or AH of the child SA (RFC 7296, 2.22; RFC 3173): used if the
// initiator offers DEFLATE by IPCOMP_SUPPORTED and the responder answers with one
// of its own. Each names the CPI of what it receives. It lives and dies with the
// child SA, of which it is a property: the CPI means nothing outside of it.

// ipcompDeflate is the transform ID of DEFLATE (RFC 7296, 3.10.1).
const ipcompDeflate = 2

// CPIs that are negotiated (RFC 3173, 3.3).
const (
	minCPI = 256
	maxCPI = 61439
)

// cpiTries is how often newCPI looks for a free one.
const cpiTries = 64

// innermost: of several SAs around each other the policy has that of proto inside.
func (p Policy) innermost(proto ipsec.Protocol) bool {
	return p.Out.Requests[0].Proto == proto || !slices.ContainsFunc(p.alternatives(), func(a ipsec.Proposal) bool { return a.Shape == ipsec.ShapeAHESP })
}

// compresses: we want it for a child SA of proto, by the rule or by the policy.
// must: and nothing else; in tunnel mode the policy's ESP or AH is none without. By
// the rule what is padded to hide its length is not compressed, which would tell of
// its contents.
func (s *SA) compresses(p Policy, proto ipsec.Protocol) (wants, must bool) {
	r := &p.Out.Requests[0]
	switch {
	case r.Comp != 0:
		return true, r.Comp != ipsec.LevelUse || r.Mode == ipsec.Tunnel
	case proto == ipsec.ESP && r.Mode == ipsec.Tunnel && s.rule.TFC != 0:
		return false, false
	}
	return s.rule.IPComp && p.innermost(proto), false
}

// offerIPComp offers it for what is offered, of which the peer may choose any,
// unless that is in AGGFRAG mode.
func (s *SA) offerIPComp(o *offer) {
	all := !o.aggfrag
	for _, proto := range o.protos() {
		wants, must := s.compresses(o.req.Policy, proto)
		all, o.mustComp = all && wants, o.mustComp || must
	}
	if all {
		o.cpi = s.newCPI()
	}
}

// newCPI is one that no child SA of this peer has: the peer may tell its SAs of
// IPComp apart by it alone. 0: none was found, which is as if the rule wanted none.
func (s *SA) newCPI() uint16 {
	for range cpiTries {
		var n uint32
		if s.cfg.CPI != nil {
			n = s.cfg.CPI()
		} else {
			n = binary.BigEndian.Uint32(s.random(4))
		}
		cpi := uint16(minCPI + n%(maxCPI-minCPI+1))
		if !s.hasCPI(cpi) {
			return cpi
		}
	}
	return 0
}

// hasCPI: a child SA receives by it. There are far fewer of them than CPIs.
func (s *SA) hasCPI(cpi uint16) bool {
	for _, c := range s.children {
		if c.cpi == cpi {
			return true
		}
	}
	return false
}

func ipcompSupported(cpi uint16) *ikev2.Notify {
	return notify(ikev2.IPCOMP_SUPPORTED, byte(cpi>>8), byte(cpi), ipcompDeflate)
}

var (
	errIPCompUnasked = errors.New("peer answers with IPComp, which was not asked for")
	errIPCompTwice   = errors.New("peer answers with more than one IPCOMP_SUPPORTED")
	errIPCompMissing = errors.New("peer does without IPComp, which the policy requires")
)

// parseIPComp returns the CPI of an IPCOMP_SUPPORTED that we can follow.
func parseIPComp(n *ikev2.Notify) (uint16, error) {
	if len(n.Data) != 3 {
		return 0, fmt.Errorf("IPCOMP_SUPPORTED of %d octets, want 3", len(n.Data))
	}
	cpi := binary.BigEndian.Uint16(n.Data)
	switch {
	case n.Data[2] != ipcompDeflate:
		return 0, fmt.Errorf("IPCOMP_SUPPORTED with transform %d, want %d (DEFLATE)", n.Data[2], ipcompDeflate)
	case cpi < minCPI || cpi > maxCPI:
		return 0, fmt.Errorf("IPCOMP_SUPPORTED with CPI %d, want %d to %d", cpi, minCPI, maxCPI)
	}
	return cpi, nil
}

// supported are the IPCOMP_SUPPORTED of a message.
func supported(ps []ikev2.Payload) (l []*ikev2.Notify) {
	for _, p := range ps {
		if n, ok := p.(*ikev2.Notify); ok && n.Type == ikev2.IPCOMP_SUPPORTED {
			l = append(l, n)
		}
	}
	return l
}

// offeredCPI is the peer's in a request: that of the first IPCOMP_SUPPORTED, of
// which there is one for each transform, that we can follow; 0: there is none.
func offeredCPI(ps []ikev2.Payload) uint16 {
	for _, n := range supported(ps) {
		if cpi, err := parseIPComp(n); err == nil {
			return cpi
		}
	}
	return 0
}

// answeredCPI is the peer's in an answer to o; 0: it does without.
func (o *offer) answeredCPI(ps []ikev2.Payload) (uint16, error) {
	l := supported(ps)
	switch {
	case len(l) == 0 && o.mustComp:
		return 0, errIPCompMissing
	case len(l) == 0:
		return 0, nil
	case o.cpi == 0:
		return 0, errIPCompUnasked
	case len(l) > 1:
		return 0, errIPCompTwice
	}
	return parseIPComp(l[0])
}
