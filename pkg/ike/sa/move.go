package sa

import (
	"log/slog"
	"net/netip"
	"slices"

	"github.com/missiu/missiu/pkg/ipsec"
)

// mayMove says why not: with nothing but SAs in transport mode there is nothing
// that could.
func (s *SA) mayMove() error {
	if len(s.children) > 0 && !slices.ContainsFunc(s.children, func(c *child) bool { return c.mode == ipsec.Tunnel }) {
		return errTransportStays
	}
	return nil
}

// moveTo goes on with IKE at p.
func (s *SA) moveTo(p path) {
	s.log(levelInfo, "moved", slog.String("old", s.path().String()), slog.String("new", p.String()), slog.Int("child_sas", len(s.children)))
	s.local, s.remote = p.local, p.remote
	s.peer.Local, s.peer.Remote = p.local, p.remote
}

// relocate is the initiator's decision to go on at p: IKE and child SAs at once,
// what is on its way is sent again from there, and the peer is told.
func (s *SA) relocate(p path) {
	s.moveTo(p)
	s.moveChildren()
	s.mob.pending = true
	s.wantUpdate()
	for _, i := range s.ikes {
		if r := i.req; r != nil {
			r.sent, r.wait, r.strayed = 1, s.rule.Retransmit.Init/2, true
			s.transmission(r)
		}
	}
}

// moveChildren has the child SAs follow s.local and s.remote, in UDP or not as
// there is a NAT.
func (s *SA) moveChildren() {
	m := Moved{}
	for _, c := range slices.Clone(s.children) {
		s.moveChild(&m, c)
	}
	if len(m.SAs) > 0 {
		s.emit(m)
	}
}

func (s *SA) moveChild(m *Moved, c *child) {
	var why error
	switch {
	case c.mode != ipsec.Tunnel:
		why = errTransportStays
	case c.proto == ipsec.AH && s.nat():
		why = errAHBehindNAT
	}
	if why != nil {
		if !c.deleting {
			s.log(levelWarn, "child SA does not move", attrChild(c), attrErr(why))
			s.deleteChild(c, why)
		}
		return
	}
	e := s.encap(netip.Addr{})
	in, out := s.homes(s.path())
	local, remote := s.path().addrs()
	m.SAs = append(m.SAs, Move{
		From: ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}, FromSrc: c.outDst,
		To: ipsec.SAID{Proto: c.proto, Dst: local, SPI: c.in}, Src: remote, Encap: e.in, Home: in,
	})
	if !c.deleting && !c.noOut {
		m.SAs = append(m.SAs, Move{
			From: ipsec.SAID{Proto: c.proto, Dst: c.outDst, SPI: c.outSPI}, FromSrc: c.inDst,
			To: ipsec.SAID{Proto: c.proto, Dst: remote, SPI: c.outSPI}, Src: local, Encap: e.out, Home: out,
		})
	}
	if h := c.held; h != nil {
		h.Src, h.Dst, h.Encap, h.Home = local, remote, e.out, out
	}
	c.inDst, c.outDst = local, remote
}

// home is by which addresses policy knows the outbound SAs in tunnel mode that are
// at p; nil: by those.
func (s *SA) home(p path) *ipsec.Ends {
	if s.mob == nil {
		return nil
	}
	a, b := p.addrs()
	if l, r := s.mob.home.addrs(); l != a || r != b {
		return &ipsec.Ends{Src: l, Dst: r}
	}
	return nil
}

// homes is home of SAs of both directions.
func (s *SA) homes(p path) (in, out *ipsec.Ends) {
	if out = s.home(p); out != nil {
		in = &ipsec.Ends{Src: out.Dst, Dst: out.Src}
	}
	return in, out
}

// asPolicyKnows is the peer, in tunnel mode at the addresses that policies name.
func (s *SA) asPolicyKnows(mode ipsec.Mode) Peer {
	p := s.peer
	if s.mob != nil && mode == ipsec.Tunnel {
		p.Local, p.Remote = s.mob.home.local, s.mob.home.remote
	}
	return p
}

// gotSPI notes where the larval SAs of an SPI are: the IKE SA may have moved when
// they are completed.
func (s *SA) gotSPI(spi ipsec.SPI, at path) {
	if s.mob == nil || spi == 0 {
		return
	}
	if s.mob.spis == nil {
		s.mob.spis = map[ipsec.SPI]path{}
	}
	s.mob.spis[spi] = at
}

func (s *SA) placeOf(spi ipsec.SPI) path {
	if s.mob != nil {
		if p, ok := s.mob.spis[spi]; ok {
			return p
		}
	}
	return s.path()
}

func (s *SA) lostSPI(spi ipsec.SPI) {
	if s.mob == nil || s.mob.spis == nil {
		return
	}
	if delete(s.mob.spis, spi); len(s.mob.spis) == 0 {
		s.mob.spis = nil
	}
}
