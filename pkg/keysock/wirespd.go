package keysock

import (
	"math"
	"net/netip"
	"slices"
	"syscall"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// maxStrangersCombs bounds PROPOSAL for sockets that did not opt in: some read
// messages into 4096 octets, and none reads the combinations.
const maxStrangersCombs = 16

// putPolicy sets the extensions of a policy.
func putPolicy(m *pfkey.Message, i *PolicyInfo, what int) error {
	m.SAType = pfkey.SATypeUnspec
	w := &pfkey.Policy{
		Type: pfkey.PolicyType(i.Action), Dir: pfkey.Dir(i.Dir), ID: i.ID, Priority: i.Priority,
	}
	rs := i.Requests
	if what&withPrivate == 0 {
		rs = shownToStrangers(&i.Policy)
	}
	for _, r := range rs {
		q := pfkey.Request{
			Proto: uint16(r.Proto), Mode: pfkey.Mode(r.Mode), Level: pfkey.Level(r.Level), ReqID: uint32(r.ReqID),
		}
		if r.Mode == ipsec.Tunnel {
			q.Src, q.Dst = r.Src, r.Dst
		}
		if i.Flags&ipsec.PolicyClear != 0 && what&withPrivate == 0 && (r.Mode != ipsec.Tunnel || i.Dir != ipsec.Out) {
			q.Level = pfkey.LevelUse // what comes closest, for those who know no flags
		}
		w.Requests = append(w.Requests, q)
	}
	m.Policy = w
	if err := putSelector(m, i.Sel); err != nil {
		return err
	}
	if what&withCurrent != 0 {
		m.Current = &pfkey.Lifetime{
			Allocations: clip32(i.Packets), AddTime: unixTime(i.Added), UseTime: unixTime(i.LastUsed),
		}
	}
	if what&withCurrent != 0 || !i.Hard.IsZero() {
		m.Hard, m.Soft = lifetimeToWire(i.Hard), &pfkey.Lifetime{}
	}
	if what&withPrivate != 0 && (i.Flags != 0 || what&withCurrent != 0) {
		m.PolicyMore = &pfkey.PolicyMore{Flags: pfkey.PolicyFlags(i.Flags), Packets: i.Packets}
	}
	if what&withPrivate != 0 && len(i.Proposals) > 0 {
		return putProposals(m, i.Proposals)
	}
	return nil
}

// shownToStrangers are the requests of a policy for those who know no
// alternatives that differ in their transforms: of such those of the first.
func shownToStrangers(p *ipsec.Policy) []ipsec.Request {
	if !p.Choice() {
		return p.Requests
	}
	return slices.DeleteFunc(slices.Clone(p.Requests), func(r ipsec.Request) bool { return !p.Proposals[0].Shape.Has(r.Proto) })
}

// takePolicy reads a policy. It is strict: what SPDADD needs has to be there.
func takePolicy(m *pfkey.Message) (*PolicyInfo, error) {
	if m.Policy == nil {
		return nil, refuse(syscall.EINVAL, "no X_POLICY extension")
	}
	if err := m.Policy.Check(); err != nil {
		return nil, err
	}
	i := &PolicyInfo{}
	i.ID, i.Dir, i.Priority = m.Policy.ID, ipsec.Direction(m.Policy.Dir), m.Policy.Priority
	i.Action = ipsec.Action(m.Policy.Type)
	var err error
	if i.Sel, err = takeSelector(m); err != nil {
		return nil, err
	}
	for _, q := range m.Policy.Requests {
		r := ipsec.Request{Proto: ipsec.Protocol(q.Proto), Level: ipsec.Level(q.Level), ReqID: ipsec.ReqID(q.ReqID)}
		if r.Mode, err = modeFromWire(q.Mode); err != nil {
			return nil, err
		}
		if r.Mode == ipsec.Tunnel {
			if r.Src, r.Dst = q.Src, q.Dst; r.Src.Is4In6() || r.Dst.Is4In6() {
				return nil, refuse(syscall.EINVAL, "IPv4-mapped tunnel address")
			}
		}
		i.Requests = append(i.Requests, r)
	}
	// Linux takes such a policy and then passes clear text; nobody can mean that.
	if i.Action == ipsec.Protect && len(i.Requests) == 0 {
		return nil, refuse(syscall.EINVAL, "policy of type ipsec without a request")
	}
	i.Policy.Hard = lifetimeFromWire(m.Hard)
	if c := m.Current; c != nil {
		i.Packets, i.Added, i.LastUsed = uint64(c.Allocations), date(c.AddTime), date(c.UseTime)
	}
	if m.PolicyMore != nil {
		i.Flags, i.Packets = ipsec.PolicyFlags(m.PolicyMore.Flags), m.PolicyMore.Packets
	}
	i.Proposals, err = takeProposals(m)
	return i, err
}

// putSelector writes the upper protocol into both addresses, since libipsec
// refuses a difference.
func putSelector(m *pfkey.Message, s ipsec.Selector) error {
	sp, dp := s.SrcPort, s.DstPort
	if isICMP(s.Proto) {
		if sp > 256 || dp > 256 {
			return refuse(syscall.EINVAL, "ICMP type or code in %v", s)
		}
		sp, dp = icmpToWire(sp), icmpToWire(dp)
	}
	proto := s.Proto
	if proto == pfkey.AnyProto {
		return refuse(syscall.EINVAL, "upper protocol %d, which is any on PF_KEY", proto)
	}
	if proto == 0 {
		proto = pfkey.AnyProto
	}
	if !s.Src.IsValid() || !s.Dst.IsValid() {
		return refuse(syscall.EINVAL, "selector without prefixes")
	}
	m.Src = &pfkey.Address{Proto: proto, PrefixLen: uint8(s.Src.Bits()), Addr: netip.AddrPortFrom(s.Src.Addr(), sp)}
	m.Dst = &pfkey.Address{Proto: proto, PrefixLen: uint8(s.Dst.Bits()), Addr: netip.AddrPortFrom(s.Dst.Addr(), dp)}
	return nil
}

// takeSelector keeps host bits behind the prefixes, which are part of a policy's
// identity. The protocol is that of DST, as on Linux.
func takeSelector(m *pfkey.Message) (s ipsec.Selector, err error) {
	src, dst, err := takeAddrs(m)
	if err != nil {
		return s, err
	}
	s = ipsec.Selector{
		Src:     netip.PrefixFrom(src, int(m.Src.PrefixLen)),
		Dst:     netip.PrefixFrom(dst, int(m.Dst.PrefixLen)),
		Proto:   m.Dst.Proto,
		SrcPort: m.Src.Addr.Port(), DstPort: m.Dst.Addr.Port(),
	}
	if s.Proto == pfkey.AnyProto {
		s.Proto = 0
	}
	if isICMP(s.Proto) {
		if s.SrcPort > 256 || s.DstPort > 256 {
			return s, refuse(syscall.EINVAL, "ICMP type %d, code %d", s.SrcPort, s.DstPort)
		}
		s.SrcPort, s.DstPort = icmpFromWire(s.SrcPort), icmpFromWire(s.DstPort)
	}
	return s, nil
}

func isICMP(proto uint8) bool { return proto == 1 || proto == 58 }

// On the wire an ICMP type or code is itself, 0 is any, and 256 stands for the
// type or code 0; in a Selector it is one more than itself.
func icmpToWire(v uint16) uint16 {
	switch v {
	case 0:
		return 0
	case 1:
		return 256
	}
	return v - 1
}

func icmpFromWire(v uint16) uint16 {
	switch v {
	case 0:
		return 0
	case 256:
		return 1
	}
	return v + 1
}

// putProposals writes alternatives, the shapes too if not all are ESP.
func putProposals(m *pfkey.Message, l []ipsec.Proposal) error {
	w, x := &pfkey.Proposal{Replay: 32}, &pfkey.Shapes{}
	for _, p := range l {
		c, err := combToWire(p)
		if err != nil {
			return err
		}
		ah, err := integToWire(p.AH)
		if err != nil {
			return err
		}
		w.Combs = append(w.Combs, c)
		x.Shapes = append(x.Shapes, pfkey.Shape{Kind: pfkey.ShapeKind(p.Shape), AH: ah})
		if p.Shape != ipsec.ShapeESP {
			m.Shapes = x
		}
	}
	m.Proposal = w
	return nil
}

func combToWire(p ipsec.Proposal) (c pfkey.Comb, err error) {
	if p.Hard.Packets > math.MaxUint32 || p.Soft.Packets > math.MaxUint32 {
		return c, refuse(syscall.EINVAL, "packet limit of a proposal beyond 32 bits")
	}
	c = pfkey.Comb{Hard: *lifetimeToWire(p.Hard), Soft: *lifetimeToWire(p.Soft)}
	if c.Encrypt, err = encrToWire(p.Encr); err != nil {
		return c, err
	}
	if c.Auth, err = integToWire(p.Auth); err != nil {
		return c, err
	}
	salt := uint16(p.Encr.Info().SaltLen * 8)
	if max(p.EncrMinBits, p.EncrMaxBits) > math.MaxUint16-salt {
		return c, refuse(syscall.EINVAL, "key sizes %d to %d", p.EncrMinBits, p.EncrMaxBits)
	}
	c.EncryptMin, c.EncryptMax = plus(p.EncrMinBits, salt), plus(p.EncrMaxBits, salt)
	c.AuthMin = uint16(p.Auth.Info().KeyLen * 8)
	c.AuthMax = c.AuthMin
	return c, nil
}

// strangersProposal is PROPOSAL as RFC 2367 has it, for one protocol: of AH the
// integrity algorithm stands in auth.
func strangersProposal(l []ipsec.Proposal, proto ipsec.Protocol) (*pfkey.Proposal, error) {
	w := &pfkey.Proposal{Replay: 32}
	for _, p := range ipsec.Parts(l, proto) {
		if proto == ipsec.AH {
			p.Auth = p.AH
		}
		c, err := combToWire(p)
		if err != nil {
			return nil, err
		}
		w.Combs = append(w.Combs, c)
	}
	w.Combs = w.Combs[:min(len(w.Combs), maxStrangersCombs)]
	return w, nil
}

func takeProposals(m *pfkey.Message) ([]ipsec.Proposal, error) {
	if m.Proposal == nil {
		if m.Shapes != nil {
			return nil, refuse(syscall.EINVAL, "X_SHAPES without PROPOSAL")
		}
		return nil, nil
	}
	if m.Shapes != nil && len(m.Shapes.Shapes) != len(m.Proposal.Combs) {
		return nil, refuse(syscall.EINVAL, "%d shapes of %d combinations", len(m.Shapes.Shapes), len(m.Proposal.Combs))
	}
	var l []ipsec.Proposal
	for k, c := range m.Proposal.Combs {
		p := ipsec.Proposal{Hard: lifetimeFromWire(&c.Hard), Soft: lifetimeFromWire(&c.Soft)}
		var err error
		if p.Encr, err = encrFromWire(c.Encrypt); err != nil {
			return nil, err
		}
		if p.Auth, err = integFromWire(c.Auth); err != nil {
			return nil, err
		}
		salt := uint16(p.Encr.Info().SaltLen * 8)
		p.EncrMinBits, p.EncrMaxBits = minus(c.EncryptMin, salt), minus(c.EncryptMax, salt)
		if p.EncrMaxBits != 0 && p.EncrMinBits > p.EncrMaxBits {
			return nil, refuse(syscall.EINVAL, "key sizes %d to %d", p.EncrMinBits, p.EncrMaxBits)
		}
		if m.Shapes != nil {
			x := m.Shapes.Shapes[k]
			p.Shape = ipsec.Shape(x.Kind)
			if p.AH, err = integFromWire(x.AH); err != nil {
				return nil, err
			}
		}
		if p.Shape == ipsec.ShapeAH && (p.Encr != alg.EncrNone || p.Auth != alg.IntegNone || p.EncrMinBits|p.EncrMaxBits != 0) {
			return nil, refuse(syscall.EINVAL, "algorithms of ESP in an alternative of AH")
		}
		l = append(l, p)
	}
	return l, nil
}

// Key sizes of 0 are any, with or without salt.
func plus(bits, salt uint16) uint16 {
	if bits == 0 {
		return 0
	}
	return bits + salt
}

func minus(bits, salt uint16) uint16 {
	if bits <= salt {
		return 0
	}
	return bits - salt
}

// putAcquire makes the ACQUIRE of a.
func putAcquire(m *pfkey.Message, a *Acquire, what int) (err error) {
	m.Type, m.Seq = pfkey.Acquire, a.Seq
	if m.SAType, err = saTypeOf(a.Proto); err != nil {
		return err
	}
	putAddrs(m, a.Src, a.Dst)
	m.Policy = &pfkey.Policy{Type: pfkey.PolicyIPsec, Dir: pfkey.DirOut, ID: a.PolicyID, Priority: a.Priority}
	m.SA2 = &pfkey.SA2{Mode: pfkey.Mode(a.Mode), ReqID: uint32(a.ReqID)}
	if what&withPrivate == 0 {
		m.Proposal, err = strangersProposal(a.Proposals, a.Proto)
		return err
	}
	if err = putProposals(m, a.Proposals); err != nil {
		return err
	}
	if f := a.Flow; f != nil {
		m.Flow = &pfkey.Flow{Proto: f.Proto, SrcPort: f.SrcPort, DstPort: f.DstPort, Src: f.Src, Dst: f.Dst}
	}
	if a.Queue != 0 {
		m.Queue = &pfkey.Queue{N: uint16(a.Queue)}
	}
	return nil
}

func takeAcquire(m *pfkey.Message) (a Acquire, err error) {
	a.Seq = m.Seq
	if a.Proto, err = protoOf(m.SAType); err != nil {
		return a, err
	}
	if a.Src, a.Dst, err = takeAddrs(m); err != nil {
		return a, err
	}
	if m.Policy != nil {
		a.PolicyID, a.Priority = m.Policy.ID, m.Policy.Priority
	}
	if m.SA2 != nil {
		if a.Mode, err = modeFromWire(m.SA2.Mode); err != nil {
			return a, err
		}
		a.ReqID = ipsec.ReqID(m.SA2.ReqID)
	}
	if a.Proposals, err = takeProposals(m); err != nil {
		return a, err
	}
	if f := m.Flow; f != nil {
		a.Flow = &ipsec.Flow{Src: f.Src, Dst: f.Dst, Proto: f.Proto, SrcPort: f.SrcPort, DstPort: f.DstPort}
	}
	if m.Queue != nil {
		a.Queue = ipsec.Queue(m.Queue.N)
	}
	return a, nil
}

// putExpire makes the EXPIRE of an SA. It has the limits that were set, of the
// kind that was reached alone.
func putExpire(m *pfkey.Message, i *SAInfo, hard bool) error {
	if err := putSA(m, i, withCurrent); err != nil {
		return err
	}
	m.Type = pfkey.Expire
	m.NATTOA = nil
	if hard {
		m.Soft, m.SA.State = nil, pfkey.StateDead
	} else {
		m.Hard, m.SA.State = nil, pfkey.StateDying
	}
	return nil
}

// putNewMapping makes the X_NAT_T_NEW_MAPPING of n, in which SRC is the peer's
// old address and DST its new one.
func putNewMapping(m *pfkey.Message, n *NewMapping, what int) error {
	m.Type, m.SAType, m.Seq = pfkey.XNATTNewMapping, pfkey.SATypeESP, n.Seq
	m.SA = &pfkey.SA{SPI: uint32(n.SAID.SPI), State: pfkey.StateMature}
	m.SA2 = &pfkey.SA2{Mode: pfkey.Mode(n.Mode), ReqID: uint32(n.ReqID)}
	putAddrs(m, n.Old.Addr(), n.New.Addr())
	m.NATTSPort, m.NATTDPort = &pfkey.NATTPort{Port: n.Old.Port()}, &pfkey.NATTPort{Port: n.New.Port()}
	if what&withPrivate != 0 && n.SAID.Dst.IsValid() {
		m.SADst = hostAddr(n.SAID.Dst)
	}
	return nil
}

func takeNewMapping(m *pfkey.Message) (n NewMapping, err error) {
	if m.SA == nil || m.NATTSPort == nil || m.NATTDPort == nil {
		return n, refuse(syscall.EINVAL, "extensions missing")
	}
	n.Seq, n.SAID = m.Seq, ipsec.SAID{Proto: ipsec.ESP, SPI: ipsec.SPI(m.SA.SPI)}
	before, after, err := takeAddrs(m)
	if err != nil {
		return n, err
	}
	n.Old = netip.AddrPortFrom(before, m.NATTSPort.Port)
	n.New = netip.AddrPortFrom(after, m.NATTDPort.Port)
	if m.SADst != nil {
		n.SAID.Dst = m.SADst.Addr.Addr()
	}
	n.Mode, n.ReqID, err = takeSA2(m)
	return n, err
}
