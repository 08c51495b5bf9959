package sa

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// offer is what we ask for, kept until the answer.
type offer struct {
	req       ChildRequest
	rekeys    *child
	mode      ipsec.Mode
	proposals []proposal.Child
	spi       ipsec.SPI
	tsi, tsr  []ipsec.TrafficSelector
	ni        []byte
	key       dh.PrivateKey // nil without PFS
	aggfrag   bool          // USE_AGGFRAG
	cpi       uint16        // of IPCOMP_SUPPORTED; 0: not offered
	mustComp  bool          // only with IPComp
	resource  bool          // SA_RESOURCE_INFO
	fallback  *child        // of a request for a queue
	deleted   []peerSPI     // deleted before we knew them
}

// peerSPI is an SPI that the peer receives on.
type peerSPI struct {
	proto ipsec.Protocol
	spi   ipsec.SPI
}

// protos are the protocols of what is offered.
func (o *offer) protos() (l []ipsec.Protocol) {
	for _, p := range o.proposals {
		if !slices.Contains(l, p.Proto()) {
			l = append(l, p.Proto())
		}
	}
	return l
}

// newOffer prepares the request for a child SA, without SPI, nonce and key.
func (s *SA) newOffer(i *ikeSA, r ChildRequest, rekeys *child) (*offer, *LocalError) {
	fail := func(err error) (*offer, *LocalError) {
		return nil, &LocalError{Exchange: ikev2.CREATE_CHILD_SA, Err: err}
	}
	o := &offer{req: r, rekeys: rekeys}
	if r.Policy.Out == nil {
		return fail(errors.New("no policy"))
	}
	var ok bool
	if o.mode, ok = r.Policy.mode(); !ok {
		return fail(errors.New("policy without ESP and AH"))
	}
	o.aggfrag, _ = s.aggregates(r.Policy)
	switch {
	case rekeys != nil:
		o.resource = rekeys.resource
	case r.Queue != 0:
		fb := s.fallback(&r)
		if fb == nil {
			return fail(errNoFallback)
		}
		if fb.full {
			return fail(errQueuesFull)
		}
		if s.beside(o, i, fb); len(o.proposals) == 0 {
			return fail(errors.New("policy has no usable algorithms"))
		}
		s.offerIPComp(o)
		return o, nil
	default:
		o.resource = s.asksQueues(r.Policy) && s.fallback(&r) == nil
	}
	alts := r.Proposals
	switch {
	case rekeys != nil:
		alts = rekeys.successors()
	case len(alts) == 0:
		alts = r.Policy.alternatives()
	}
	alts, err := s.passing(alts)
	if err != nil {
		return fail(err)
	}
	pfs := s.rule.PFS
	if rekeys != nil && rekeys.suite.KE != alg.KENone {
		// The group that both accepted before, though it may have been the
		// peer's choice.
		pfs = append([]alg.KE{rekeys.suite.KE}, pfs...)
	}
	ps := proposal.WithKE(proposal.ForChild(alts, pfs, s.esn()), i.suite.KE)
	if i.state >= StateEstablished { // in IKE_AUTH there are no key exchanges
		ps = proposal.WithAddKE(ps, s.rule.ChildAddKE)
	}
	o.proposals = proposal.WithAnyKE(ps)
	if len(o.proposals) == 0 {
		return fail(errors.New("policy has no usable algorithms"))
	}
	s.offerIPComp(o)
	l, p, ok := policyTS(r.Policy, o.mode, s.local.Addr(), s.remote.Addr())
	if !ok {
		return fail(errors.New("policy does not hold the addresses of the IKE SA"))
	}
	if r.Policy.perFlow() {
		// Only the packet's own: the SAs are for nothing else.
		switch {
		case rekeys != nil:
			o.tsi, o.tsr = rekeys.local, rekeys.remote
			return o, nil
		case r.Flow == nil:
			return fail(errors.New("policy has SAs for single flows, and no packet asks for one"))
		}
		fl, fp := flowTS(*r.Flow)
		if !within(fl, l) || !within(fp, p) {
			return fail(errors.New("packet is not the policy's"))
		}
		o.tsi, o.tsr = append(o.tsi, fl), append(o.tsr, fp)
		return o, nil
	}
	unknown := i.state < StateEstablished && s.rule.Request.Any() // our address inside
	ours := s.ours(l)
	if r.Flow != nil && !unknown {
		// The packet's own selectors first, so that a responder that has to
		// choose knows which matter (RFC 7296, 2.9).
		if fl, fp := flowTS(*r.Flow); allWithin([]ipsec.TrafficSelector{fl}, ours) && within(fp, p) {
			o.tsi, o.tsr = append(o.tsi, fl), append(o.tsr, fp)
		}
	}
	if rekeys != nil { // at least what it had (RFC 7296, 2.9.2)
		o.tsi, o.tsr = append(o.tsi, rekeys.local...), append(o.tsr, rekeys.remote...)
		if r.Policy.template() {
			return o, nil // the policy's own selectors are those of all its peers
		}
	}
	for _, t := range ours {
		o.tsi = appendTS(o.tsi, t)
	}
	o.tsr = appendTS(o.tsr, p)
	return o, nil
}

// payloads makes the part of a request that asks for the child SA.
func (o *offer) payloads(initial bool) []ikev2.Payload {
	var ps []ikev2.Payload
	if o.rekeys != nil {
		ps = append(ps, &ikev2.Notify{Protocol: proposal.ProtocolID(o.rekeys.proto), SPI: proposal.SPIBytes(o.rekeys.in), Type: ikev2.REKEY_SA})
	}
	if o.mode == ipsec.Transport {
		ps = append(ps, notify(ikev2.USE_TRANSPORT_MODE))
	}
	if slices.Contains(o.protos(), ipsec.ESP) && o.mode != ipsec.Tunnel {
		// Only an inner IP header tells where the data ends (RFC 4303, 2.7).
		ps = append(ps, notify(ikev2.ESP_TFC_PADDING_NOT_SUPPORTED))
	}
	if o.aggfrag {
		ps = append(ps, useAggfrag())
	}
	if o.cpi != 0 {
		ps = append(ps, ipcompSupported(o.cpi))
	}
	if o.resource {
		ps = append(ps, resourceInfo(o.req.Queue))
	}
	ps = append(ps, proposal.OfferChild(o.proposals, o.spi, initial))
	if !initial {
		ps = append(ps, &ikev2.Nonce{Data: o.ni})
		if o.key != nil {
			ps = append(ps, &ikev2.KE{Method: ikev2.KEID(o.key.KE()), Data: o.key.Public()})
		}
	}
	return append(ps, &ikev2.TSi{Selectors: toWire(o.tsi)}, &ikev2.TSr{Selectors: toWire(o.tsr)})
}

func (o *offer) wipe() {
	if o.key != nil {
		o.key.Wipe()
	}
}

// abandon gives an offer up that the peer has not accepted.
func (s *SA) abandon(o *offer, err error) {
	o.wipe()
	s.release(o.spi, o.protos()...)
	o.spi = 0
	if o.rekeys == nil {
		s.log(levelWarn, "child SA failed", attrErr(err), attrOffer(o))
		s.emit(ChildFailed{o.req.Seq, o.req.Policy, err})
	} else {
		s.log(levelWarn, "child SA not rekeyed", attrChild(o.rekeys), attrErr(err), attrOffer(o))
		s.emit(RekeyFailed{Old: o.rekeys.in, Err: err})
	}
}

// orphan gives an offer up that the peer has accepted: what it made of it is
// deleted.
func (s *SA) orphan(o *offer, err error) {
	for _, proto := range o.protos() {
		s.queue = append(s.queue, &deleteChild{proto: proto, spi: o.spi})
	}
	s.abandon(o, err)
}

// accept makes a child SA of the responder's answer. It returns nil, having
// told everybody, if the answer is not acceptable.
func (s *SA) accept(i *ikeSA, o *offer, ps []ikev2.Payload, initial bool, ni, nr []byte) *child {
	x := ikev2.CREATE_CHILD_SA
	if initial {
		x = ikev2.IKE_AUTH
	}
	g, err := s.checkAnswer(o, ps, initial)
	if err != nil {
		s.orphan(o, &LocalError{Exchange: x, Err: err})
		return nil
	}
	g.ni, g.nr = ni, nr
	return s.acceptGranted(i, o, g, x)
}

// acceptGranted is accept once all key exchanges are over.
func (s *SA) acceptGranted(i *ikeSA, o *offer, g *granted, x ikev2.ExchangeType) *child {
	if slices.Contains(o.deleted, peerSPI{g.suite.Proto(), g.peerSPI}) {
		// The Delete has overtaken the answer.
		g.wipe()
		s.abandon(o, ErrPeerDeleted)
		return nil
	}
	if err := s.useless(o, g); err != nil {
		g.wipe()
		s.orphan(o, &LocalError{Exchange: x, Err: err})
		return nil
	}
	c, _, err := s.install(i, g, o.spi, false)
	if err != nil {
		s.orphan(o, &LocalError{Exchange: x, Err: err})
		return nil
	}
	o.wipe()
	s.release(o.spi, slices.DeleteFunc(o.protos(), func(p ipsec.Protocol) bool { return p == c.proto })...)
	s.lostSPI(o.spi)
	return c
}

// useless tells why a child SA that the peer grants is not worth having: it is
// not for the packet that wanted it, and there is already one for the rest.
// Else every such packet would bring one more.
func (s *SA) useless(o *offer, g *granted) error {
	if o.req.Flow == nil || o.rekeys != nil {
		return nil
	}
	l, r := flowTS(*o.req.Flow)
	if allWithin([]ipsec.TrafficSelector{l}, g.local) && allWithin([]ipsec.TrafficSelector{r}, g.remote) {
		return nil
	}
	for _, c := range s.children {
		same := c.proto == g.suite.Proto() && c.policy.Out.Sel == o.req.Policy.Out.Sel && c.policy.reqIDs(c.proto) == o.req.Policy.reqIDs(c.proto)
		if same && !c.deleting && allWithin(g.local, c.local) && allWithin(g.remote, c.remote) {
			return fmt.Errorf("peer narrows %v, %v to %v, %v, which is not for %v, %v and not new", o.tsi, o.tsr, g.local, g.remote, l, r)
		}
	}
	return nil
}

// checkAnswer holds the answer against what was offered.
func (s *SA) checkAnswer(o *offer, ps []ikev2.Payload, initial bool) (*granted, error) {
	suite, peer, err := proposal.CheckChild(o.proposals, ikev2.Find[*ikev2.SA](ps), initial)
	if err != nil {
		return nil, err
	}
	g := &granted{policy: o.req.Policy, mode: ipsec.Tunnel, suite: suite, peerSPI: peer, seq: o.req.Seq, rekeys: o.rekeys}
	if ikev2.FindNotify(ps, ikev2.USE_TRANSPORT_MODE) != nil {
		g.mode = ipsec.Transport
	}
	if g.mode != o.mode {
		return nil, fmt.Errorf("peer answers in %v mode, policy wants %v", g.mode, o.mode)
	}
	if g.aggfrag, err = peerAggfrag(ps); err != nil {
		return nil, err
	}
	g.noTFC = refusesTFC(ps)
	if _, must := s.aggregates(o.req.Policy); must && !g.aggfrag {
		return nil, errAggfragMissing
	}
	if g.aggfrag && !o.aggfrag {
		return nil, errAggfragUnasked
	}
	if g.peerCPI, err = o.answeredCPI(ps); err != nil {
		return nil, err
	}
	if g.peerCPI != 0 {
		g.cpi = o.cpi
	}
	switch tells := ikev2.FindNotify(ps, ikev2.SA_RESOURCE_INFO) != nil; {
	case o.rekeys != nil:
		g.resource, g.queue = o.rekeys.resource, o.rekeys.queue
	case o.fallback != nil:
		g.resource, g.queue = true, o.req.Queue
	default:
		g.resource = tells && o.resource
		if _, must := s.queues(o.req.Policy); must && !g.resource {
			return nil, errNoResources
		}
	}
	g.local = fromWire(ikev2.Find[*ikev2.TSi](ps).Selectors)
	g.remote = fromWire(ikev2.Find[*ikev2.TSr](ps).Selectors)
	if !allWithin(g.local, o.tsi) || !allWithin(g.remote, o.tsr) {
		return nil, fmt.Errorf("selectors %v, %v are not within %v, %v", g.local, g.remote, o.tsi, o.tsr)
	}
	if suite.KE != alg.KENone {
		ke := ikev2.Find[*ikev2.KE](ps)
		if ke == nil || o.key == nil || o.key.KE() != suite.KE || alg.KE(ke.Method) != suite.KE {
			return nil, fmt.Errorf("suite has %v, KE payload not", suite.KE)
		}
		if g.shared, err = o.key.Shared(ke.Data); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// granted is an agreed child SA before it has an SPI of ours.
type granted struct {
	initial       bool // by IKE_AUTH
	policy        Policy
	mode          ipsec.Mode
	aggfrag       bool
	noTFC         bool        // the peer wants no TFC padding
	cpi, peerCPI  uint16      // by which we, the peer, receive what is compressed; 0: nothing is
	resource      bool        // as child has them
	queue         ipsec.Queue //
	tellResource  bool        // responder: SA_RESOURCE_INFO in the answer
	moreTS        bool        // responder: what is left of what was asked for may be had by another child SA
	suite         proposal.ChildSuite
	answer        ikev2.Proposal // responder
	public        []byte         // responder's KE
	shared        ipsec.Key
	more          []ipsec.Key // of additional key exchanges
	peerSPI       ipsec.SPI
	local, remote []ipsec.TrafficSelector
	tsi, tsr      []ipsec.TrafficSelector // responder: as they go into the answer
	oa            netip.Addr
	ni, nr        []byte
	seq           uint32
	rekeys        *child
}

// refusesTFC: the peer of these payloads is not to be sent TFC padding (RFC 7296,
// 1.3.1).
func refusesTFC(ps []ikev2.Payload) bool {
	return ikev2.FindNotify(ps, ikev2.ESP_TFC_PADDING_NOT_SUPPORTED) != nil
}

func (g *granted) wipe() {
	g.shared.Wipe()
	wipeAll(g.more)
}

// payloads are the responder's, with our SPI.
func (g *granted) payloads(spi ipsec.SPI) []ikev2.Payload {
	g.answer.SPI = proposal.SPIBytes(spi)
	var ps []ikev2.Payload
	if g.mode == ipsec.Transport {
		ps = append(ps, notify(ikev2.USE_TRANSPORT_MODE))
	}
	if g.suite.Proto() == ipsec.ESP && g.mode != ipsec.Tunnel {
		ps = append(ps, notify(ikev2.ESP_TFC_PADDING_NOT_SUPPORTED))
	}
	if g.aggfrag {
		ps = append(ps, useAggfrag())
	}
	if g.cpi != 0 {
		ps = append(ps, ipcompSupported(g.cpi))
	}
	if g.tellResource {
		ps = append(ps, resourceInfo(g.queue))
	}
	if g.moreTS {
		ps = append(ps, notify(ikev2.ADDITIONAL_TS_POSSIBLE))
	}
	ps = append(ps, &ikev2.SA{Proposals: []ikev2.Proposal{g.answer}})
	if !g.initial {
		ps = append(ps, &ikev2.Nonce{Data: g.nr})
	}
	if g.public != nil {
		ps = append(ps, &ikev2.KE{Method: ikev2.KEID(g.suite.KE), Data: g.public})
	}
	return append(ps, &ikev2.TSi{Selectors: toWire(g.tsi)}, &ikev2.TSr{Selectors: toWire(g.tsr)})
}
