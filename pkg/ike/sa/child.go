package sa

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// child is a pair of SAs.
type child struct {
	proto         ipsec.Protocol
	in, outSPI    ipsec.SPI
	inDst, outDst netip.Addr // we, the peer, when it was installed
	mode          ipsec.Mode
	suite         proposal.ChildSuite
	policy        Policy
	local, remote []ipsec.TrafficSelector
	created       time.Time
	// By age, as missiu will tell; zero: never.
	rekeyAt, expireAt time.Time

	// Nonces of the exchange that made it, for RFC 7296, 2.8.1.
	ni, nr []byte

	// Of RFC 9611: beside it, or with it, there may be others for single queues;
	// it is for this one, 0: any; the peer takes no more.
	resource bool
	queue    ipsec.Queue
	full     bool

	cpi, peerCPI uint16 // by which we, the peer, receive what is compressed; 0: nothing is

	rekeying *createChild // our request to replace it is on its way
	replaced *child       // what the peer made in its place; the peer will delete it
	peerNew  *child       // the same while our own request is on its way too
	deleting bool         // our Delete is queued or on its way; the outbound SA is gone
	removed  bool

	// The outbound SA, until the peer has our answer and can receive on it: when
	// it closes old, which it is to replace, asks for anything else on ike, or has
	// not asked again until heldUntil (RFC 7296, 2.8).
	held      *ipsec.SAParams
	old       *child
	ike       *ikeSA // that it was made on
	heldUntil time.Time
	noOut     bool // the outbound SA is not installed: held, or never to be
}

func (c *child) String() string { return fmt.Sprintf("%v in %v, out %v", c.proto, c.in, c.outSPI) }

type reqIDs struct{ in, out ipsec.ReqID }

// reqIDs returns those of the policy's requests for a protocol.
func (p Policy) reqIDs(proto ipsec.Protocol) (r reqIDs) {
	if q := requestOf(p.Out, proto); q != nil {
		r.out, r.in = q.ReqID, q.ReqID
	}
	if q := requestOf(p.In, proto); q != nil {
		r.in = q.ReqID
	}
	return r
}

// alternatives are those of the policy; none stand for ESP with any algorithms.
func (p Policy) alternatives() []ipsec.Proposal {
	esp, ah := requestOf(p.Out, ipsec.ESP) != nil, requestOf(p.Out, ipsec.AH) != nil
	switch {
	case len(p.Out.Proposals) > 0 || !ah:
		return p.Out.Proposals
	case esp:
		return []ipsec.Proposal{{Shape: ipsec.ShapeAHESP}}
	}
	return []ipsec.Proposal{{Shape: ipsec.ShapeAH}}
}

// lacks is InstallChild's.
func (p Policy) lacks(suite proposal.ChildSuite) []ipsec.Proposal {
	var fit []ipsec.Proposal
	for _, a := range p.alternatives() {
		switch {
		case !proposal.Admits(a, suite):
		case a.Shape != ipsec.ShapeAHESP:
			return nil
		default:
			fit = append(fit, a)
		}
	}
	return ipsec.Parts(fit, ipsec.AH+ipsec.ESP-suite.Proto())
}

// successors are the alternatives for what is to replace c: of its protocol, and
// where only whole alternatives count those that c may be part of.
func (c *child) successors() []ipsec.Proposal {
	alts := c.policy.alternatives()
	if c.policy.Out.Choice() {
		alts = slices.DeleteFunc(slices.Clone(alts), func(a ipsec.Proposal) bool { return !proposal.Admits(a, c.suite) })
	}
	return ipsec.Parts(alts, c.proto)
}

// passing leaves out what a NAT between us and the peer does not let pass: AH,
// which covers the addresses.
func (s *SA) passing(alts []ipsec.Proposal) ([]ipsec.Proposal, error) {
	if !s.nat() || len(alts) == 0 {
		return alts, nil
	}
	l := slices.DeleteFunc(slices.Clone(alts), func(a ipsec.Proposal) bool { return a.Shape.Has(ipsec.AH) })
	if len(l) == 0 {
		return nil, errors.New("AH does not pass the NAT between us and the peer")
	}
	return l, nil
}

// template: the policy leaves the address of the peer, or ours, to the SAs.
func (p Policy) template() bool {
	q := anyRequest(p.Out)
	return q != nil && q.Template()
}

// mode returns that of the policy; false if it has no request.
func (p Policy) mode() (ipsec.Mode, bool) {
	q := anyRequest(p.Out)
	if q == nil {
		return 0, false
	}
	if q.Mode == ipsec.Tunnel {
		return ipsec.Tunnel, true
	}
	return ipsec.Transport, true
}

func requestOf(p *ipsec.Policy, proto ipsec.Protocol) *ipsec.Request {
	if p == nil {
		return nil
	}
	for i := range p.Requests {
		if p.Requests[i].Proto == proto {
			return &p.Requests[i]
		}
	}
	return nil
}

// anyRequest: mode and end points are the same in all.
func anyRequest(p *ipsec.Policy) *ipsec.Request {
	if q := requestOf(p, ipsec.ESP); q != nil {
		return q
	}
	return requestOf(p, ipsec.AH)
}

// childBy finds the child SA of an SA of either direction.
func (s *SA) childBy(id ipsec.SAID) *child {
	for _, c := range s.children {
		if id.Proto == c.proto && (id.SPI == c.in && id.Dst == c.inDst || id.SPI == c.outSPI && id.Dst == c.outDst) {
			return c
		}
	}
	return nil
}

// childOut finds a child SA by the SPI that the peer receives on.
func (s *SA) childOut(proto ipsec.Protocol, b ipsec.SPI) *child {
	for _, c := range s.children {
		if c.proto == proto && c.outSPI == b {
			return c
		}
	}
	return nil
}

// esn: without a window the receiver cannot tell the high half of a sequence
// number (RFC 4303, appendix A), so where we may we go without.
func (s *SA) esn() proposal.ESN {
	if s.rule.ReplayWindow == 0 && s.rule.ESN == proposal.ESNPrefer {
		return proposal.ESNNo
	}
	return s.rule.ESN
}

// install derives the keys, emits InstallChild and records the child SA; as
// responder it returns the payloads of the answer too, which is to be sent
// after.
func (s *SA) install(i *ikeSA, g *granted, spi ipsec.SPI, responder bool) (*child, []ikev2.Payload, error) {
	defer g.wipe()
	k, err := keymat.ChildSA(keymat.ChildSuite{Encr: g.suite.Encr, EncrBits: g.suite.Bits, Integ: g.suite.Integ},
		i.suite.PRF, i.keys.D, g.shared, g.ni, g.nr, g.more...)
	if err != nil {
		return nil, nil, err
	}
	// The initiator of the exchange sends under the first keys (RFC 7296, 2.17).
	outE, outA, inE, inA := k.EncrI, k.IntegI, k.EncrR, k.IntegR
	if responder {
		outE, outA, inE, inA = inE, inA, outE, outA
	}
	proto := g.suite.Proto()
	ids, e, at := g.policy.reqIDs(proto), s.encap(g.oa), s.placeOf(spi)
	here, there := at.addrs()
	hard, soft := s.childLife(g.suite)
	base := ipsec.SAParams{
		Mode: g.mode, Encr: g.suite.Encr, Auth: g.suite.Integ,
		ReplayWindow: s.rule.ReplayWindow, ESN: g.suite.ESN, AggFrag: g.aggfrag, Queue: g.queue, Hard: hard, Soft: soft,
	}
	in, out := base, base
	if g.mode == ipsec.Tunnel {
		in.Home, out.Home = s.homes(at)
	}
	in.SAID = ipsec.SAID{Proto: proto, Dst: here, SPI: spi}
	in.Src, in.ReqID, in.Encap, in.EncrKey, in.AuthKey = there, ids.in, e.in, inE, inA
	in.SrcTS, in.DstTS = g.remote, g.local
	in.CPI, out.CPI = g.cpi, g.peerCPI
	out.SAID = ipsec.SAID{Proto: proto, Dst: there, SPI: g.peerSPI}
	out.Src, out.ReqID, out.Encap, out.EncrKey, out.AuthKey = here, ids.out, e.out, outE, outA
	out.SrcTS, out.DstTS = slices.Clone(g.local), slices.Clone(g.remote)
	out.PerQueue = g.resource && g.queue == 0
	if proto == ipsec.ESP && g.mode == ipsec.Tunnel && !g.aggfrag && !g.noTFC && g.cpi == 0 {
		out.TFC = s.rule.TFC
	}
	c := &child{
		proto: proto, in: spi, outSPI: g.peerSPI, inDst: here, outDst: there, mode: g.mode, suite: g.suite, policy: g.policy,
		local: slices.Clone(g.local), remote: slices.Clone(g.remote), created: s.now, ni: g.ni, nr: g.nr,
		resource: g.resource, queue: g.queue, cpi: g.cpi, peerCPI: g.peerCPI,
	}
	if hard.AddTime > 0 {
		c.expireAt = s.now.Add(hard.AddTime)
	}
	if soft.AddTime > 0 {
		c.rekeyAt = s.now.Add(soft.AddTime)
	}
	s.children, s.putOff = append(s.children, c), time.Time{}
	ic := InstallChild{In: &in, Out: &out, Seq: g.seq, Policy: g.policy, Lacks: g.policy.lacks(g.suite)}
	if g.rekeys != nil {
		ic.Rekeys = g.rekeys.in
		if responder {
			ic.Out, c.held, c.old, c.noOut = nil, &out, g.rekeys, true
			c.ike, c.heldUntil = i, s.now.Add(heldFor)
		}
	}
	s.emit(ic)
	s.log(levelInfo, "child SA established", attrChild(c), slog.String("mode", c.mode.String()), slog.Bool("aggfrag", g.aggfrag), slog.Int("tfc", int(out.TFC)), slog.Bool("ipcomp", g.cpi != 0), slog.Int("queue", int(g.queue)), slog.String("suite", c.suite.String()),
		slog.Any("local", c.local), slog.Any("remote", c.remote))
	if at != s.path() { // we have moved since
		m := Moved{}
		if s.moveChild(&m, c); len(m.SAs) > 0 {
			s.emit(m)
		}
	}
	if !responder {
		return c, nil, nil
	}
	s.lostSPI(spi)
	return c, g.payloads(spi), nil
}

// childLife merges lifetimes field by field: the policy's, else the rule's.
// Our soft limits vary, so that both sides seldom rekey at the same time.
func (s *SA) childLife(suite proposal.ChildSuite) (hard, soft ipsec.Lifetime) {
	r := s.rule
	pick := func(ph, ps, rh, rs uint64) (h, w uint64) {
		h, w = rh, rs
		if ph != 0 || ps != 0 {
			h, w = ph, ps
			if w == 0 {
				w = h / 10 * 9
			}
		}
		if h != 0 && w >= h {
			return h, 0 // never rekeyed by us
		}
		if fuzz := h / 100 * uint64(max(r.RekeyFuzz, 0)); w != 0 && fuzz != 0 {
			w -= min(w-1, uint64(s.jitter(time.Duration(fuzz))))
		}
		return h, w
	}
	var a, b uint64
	hard.Packets, soft.Packets = pick(suite.Hard.Packets, suite.Soft.Packets, r.ChildHard.Packets, r.ChildSoft.Packets)
	hard.Bytes, soft.Bytes = pick(suite.Hard.Bytes, suite.Soft.Bytes, r.ChildHard.Bytes, r.ChildSoft.Bytes)
	a, b = pick(uint64(suite.Hard.AddTime), uint64(suite.Soft.AddTime), uint64(r.ChildHard.AddTime), uint64(r.ChildSoft.AddTime))
	hard.AddTime, soft.AddTime = time.Duration(a), wholeSeconds(b)
	a, b = pick(uint64(suite.Hard.UseTime), uint64(suite.Soft.UseTime), uint64(r.ChildHard.UseTime), uint64(r.ChildSoft.UseTime))
	hard.UseTime, soft.UseTime = time.Duration(a), wholeSeconds(b)
	return hard, soft
}

// wholeSeconds is what PF_KEY can say; a limit does not become none.
func wholeSeconds(ns uint64) time.Duration {
	d := time.Duration(ns)
	if d > time.Second {
		return d.Truncate(time.Second)
	}
	return d
}

// heldFor is how long an SA is held for a peer that says nothing more: longer than
// it waits for an answer before it asks again.
const heldFor = 10 * time.Second

// useHeld begins to send on the SA that replaces c, which the peer closes, or
// which we cannot use any longer.
func (s *SA) useHeld(c *child) {
	for _, o := range s.children {
		if o.held != nil && o.old == c {
			s.use(o)
		}
	}
}

// use begins to send on c.
func (s *SA) use(c *child) {
	if !s.failed {
		s.emit(InstallOut{ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}, c.held})
		c.held, c.old, c.ike, c.noOut = nil, nil, nil, false
	}
}

// waits: c is held until the peer has our answer, and not for us to decide between
// it and one of ours.
func (c *child) waits() bool { return c.held != nil && c.old.replaced == c }

// answered says that the peer has our answers on i, since it asks for something
// else, or (again) has not the last one.
func (s *SA) answered(i *ikeSA, again bool) {
	for _, c := range s.children {
		switch {
		case c.held == nil || c.ike != i:
		case again:
			c.heldUntil = s.now.Add(heldFor)
		case c.waits():
			s.use(c)
		}
	}
}

// dropHeld says that c, which is about to go, will never be sent on.
func (c *child) dropHeld() {
	if c.held != nil {
		c.held.Wipe()
		c.held, c.old, c.ike = nil, nil, nil
	}
}

// removeChild ends a child SA: both its SAs go, except the outbound one if it
// has gone before.
func (s *SA) removeChild(c *child, reason error) {
	if c.removed {
		return
	}
	s.useHeld(c)
	c.dropHeld()
	c.removed = true
	s.children = slices.DeleteFunc(s.children, func(o *child) bool { return o == c })
	for _, o := range s.children { // so the peer thought better of it
		if o.replaced == c {
			o.replaced = nil
		}
		if o.peerNew == c {
			o.peerNew = nil
		}
	}
	r := c.remove(reason)
	if c.deleting || c.noOut {
		r.Out, r.OutSrc = ipsec.SAID{}, netip.Addr{}
	}
	s.emit(r)
	s.log(levelInfo, "child SA removed", attrChild(c), attrErr(reason))
}

func (c *child) remove(reason error) RemoveChild {
	return RemoveChild{
		In: ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}, Out: ipsec.SAID{Proto: c.proto, Dst: c.outDst, SPI: c.outSPI},
		InSrc: c.outDst, OutSrc: c.inDst, Reason: reason,
	}
}
