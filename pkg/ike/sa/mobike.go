package sa

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// MOBIKE (RFC 4555): the IKE SA and its child SAs in tunnel mode go on between
// other addresses, with the same SPIs, keys, sequence numbers and windows.
//
//	HDR, SK {..., N(MOBIKE_SUPPORTED), [N(ADDITIONAL_IP4_ADDRESS)...]}  -->     (IKE_AUTH)
//	         <--  HDR, SK {..., N(MOBIKE_SUPPORTED), [N(ADDITIONAL_IP4_ADDRESS)...]}
//
//	the initiator has moved:
//	HDR, SK {N(UPDATE_SA_ADDRESSES), N(NAT_DETECTION_...), N(COOKIE2)}  -->
//	         <--  HDR, SK {N(NAT_DETECTION_...), N(COOKIE2)}
//	         <--  HDR, SK {N(COOKIE2)}              is the initiator really there?
//	HDR, SK {N(COOKIE2)}  -->                       then the responder's SAs follow
//
// Only the initiator (of the first IKE SA of the lineage) decides. It moves when its
// address is gone, and when a request without an answer gets one by another pair of
// addresses: after two transmissions in vain all pairs are tried. The responder's
// unanswered requests go to all addresses of the initiator likewise, which changes
// nothing by itself, but has the initiator look whether its path still works.
//
// Which addresses may be used is the rule's word, of ours and of the peer's, in
// both roles (pad.Rule.Covers).

// mobike is the state of a lineage whose peer has MOBIKE too.
type mobike struct {
	home   path               // where it began: policies name these addresses
	theirs []netip.Addr       // the peer's additional addresses
	told   []netip.Addr       // ours, as the peer knows them
	spis   map[ipsec.SPI]path // where the SPIs were got that are not in use yet
	via    path               // of the next request, at first; zero: the one in use

	// Of the initiator.
	pending bool             // the peer is to be told where we are
	bad     map[path]bool    // pairs that the peer does not accept
	seen    [natHashLen]byte // of our address, as the peer saw it last
	seenOn  SPI              // the IKE SA that the hash is of
	lost    bool             // no address of ours is left, and it was told
	nats    int              // UNEXPECTED_NAT_DETECTED in a row

	// Of the responder.
	updated time.Time // when the IKE SA was made by which it moved last
}

// path is between what IKE messages go.
type path struct{ local, remote netip.AddrPort }

func (p path) String() string { return fmt.Sprintf("%v to %v", p.local, p.remote) }

func (p path) addrs() (local, remote netip.Addr) { return p.local.Addr(), p.remote.Addr() }

func (s *SA) path() path { return path{s.local, s.remote} }

// Bounds.
const (
	maxTheirs  = 16 // additional addresses of a peer that count
	maxTold    = 8  // of ours that it is told
	maxWays    = 8  // pairs of addresses that are tried
	waysAfter  = 2  // transmissions in vain
	checkTries = 2  // transmissions to an address that only a packet's source has named
	natTries   = 3  // UNEXPECTED_NAT_DETECTED
	cookie2Len = 16
	natHashLen = 20
	minCookie2 = 8
	maxCookie2 = 64
)

var (
	errTransportStays = errors.New("SAs in transport mode cannot move (RFC 4555, 1.3)")
	errAHBehindNAT    = errors.New("AH does not pass the NAT between us and the peer")
	errCookie2        = errors.New("COOKIE2 is not what we sent")
)

// wantsMOBIKE reports whether we are ready for it. Where both can do NAT traversal
// it is on that port (RFC 4555, 3.3).
func (s *SA) wantsMOBIKE() bool {
	return s.rule.MOBIKE && (!s.natt || s.local.Port() == s.cfg.NATTPort)
}

// mayFloat reports whether an initiator that wants MOBIKE can go to that port. A peer
// at a port of its own is not known to have it.
func (s *SA) mayFloat() bool {
	return s.natt && s.remote.Port() == 500 && s.local.Addr().Zone() == "" && s.rule.MOBIKE && !s.noNATT()
}

func (s *SA) noNATT() bool { return s.cfg.NoNATT != nil && s.cfg.NoNATT() }

// mobikeOffer is what IKE_AUTH says of it, in either direction.
func (s *SA) mobikeOffer() []ikev2.Payload {
	ps := []ikev2.Payload{notify(ikev2.MOBIKE_SUPPORTED)}
	return append(ps, additional(s.additional())...)
}

// beginMOBIKE is called once both have said MOBIKE_SUPPORTED; ps is the peer's
// message.
func (s *SA) beginMOBIKE(ps []ikev2.Payload) {
	s.mob = &mobike{home: s.path(), told: s.additional()}
	s.mob.theirs, _ = s.heardAddresses(ps)
}

// additional are our addresses besides the one in use, as far as the rule
// permits them.
func (s *SA) additional() (l []netip.Addr) {
	for _, a := range s.cfg.Addrs {
		if a != s.local.Addr() && len(l) < maxTold && s.rule.CoversLocal(a) {
			l = append(l, a)
		}
	}
	return l
}

// additional says which addresses there are besides the one in use.
func additional(l []netip.Addr) (ps []ikev2.Payload) {
	for _, a := range l {
		t := ikev2.ADDITIONAL_IP4_ADDRESS
		if a.Is6() {
			t = ikev2.ADDITIONAL_IP6_ADDRESS
		}
		ps = append(ps, notify(t, a.AsSlice()...))
	}
	return ps
}

// allAdditional is additional, that says none of none.
func allAdditional(l []netip.Addr) []ikev2.Payload {
	if len(l) == 0 {
		return []ikev2.Payload{notify(ikev2.NO_ADDITIONAL_ADDRESSES)}
	}
	return additional(l)
}

// heardAddresses reads the additional addresses of the peer; said is false if
// there is no word of any. Addresses that nobody can have fall out.
func (s *SA) heardAddresses(ps []ikev2.Payload) (l []netip.Addr, said bool) {
	for _, p := range ps {
		n, ok := p.(*ikev2.Notify)
		if !ok {
			continue
		}
		want := 0
		switch n.Type {
		case ikev2.NO_ADDITIONAL_ADDRESSES:
			said = true
			continue
		case ikev2.ADDITIONAL_IP4_ADDRESS:
			want = 4
		case ikev2.ADDITIONAL_IP6_ADDRESS:
			want = 16
		default:
			continue
		}
		said = true
		a, ok := netip.AddrFromSlice(n.Data)
		if !ok || len(n.Data) != want || a.Is4In6() || !a.IsGlobalUnicast() || slices.Contains(l, a) || len(l) == maxTheirs {
			continue
		}
		l = append(l, a)
	}
	return l, said
}

// ways are the other pairs of addresses that may work, those of the address in
// use first.
func (s *SA) ways() (l []path) {
	ours := s.cfg.Addrs
	if slices.Contains(ours, s.local.Addr()) {
		ours = append([]netip.Addr{s.local.Addr()}, ours...)
	}
	theirs := append([]netip.Addr{s.remote.Addr()}, s.mob.theirs...)
	for _, r := range theirs {
		for _, a := range ours {
			p := path{netip.AddrPortFrom(a, s.local.Port()), s.remote}
			if r != s.remote.Addr() {
				p.remote = netip.AddrPortFrom(r, s.theirPort())
			}
			if a.BitLen() == r.BitLen() && p != s.path() && s.rule.Covers(a, r) && !s.mob.bad[p] && !slices.Contains(l, p) && len(l) < maxWays {
				l = append(l, p)
			}
		}
	}
	return l
}

// theirPort is where a peer without NAT in front of it listens.
func (s *SA) theirPort() uint16 {
	if s.local.Port() == s.cfg.NATTPort {
		return nattPort
	}
	return s.rule.RemotePort
}

// SetAddresses says which addresses of ours may be used from now on, best first.
// The initiator leaves an address that is gone.
func (s *SA) SetAddresses(now time.Time, l []netip.Addr) []Output {
	return s.input(now, func() {
		s.cfg.Addrs = l
		m := s.mob
		if m == nil || s.failed || s.closing {
			return
		}
		m.bad = nil
		if !slices.Contains(l, s.local.Addr()) {
			s.leave()
		} else {
			m.lost = false
		}
		s.wantTell()
	})
}

// leave goes on from another address, since ours is gone.
func (s *SA) leave() {
	m := s.mob
	ways := s.ways()
	if len(ways) == 0 {
		if !m.lost {
			s.log(levelWarn, "our address is gone, and there is no other that the rule permits", slog.String("local", s.local.String()))
		}
		m.lost = true
		return
	}
	m.lost = false
	if err := s.mayMove(); err != nil {
		s.log(levelWarn, "our address is gone; not moved", slog.String("local", s.local.String()), attrErr(err))
		return
	}
	if s.initiator {
		s.relocate(ways[0])
		return
	}
	// The exception of RFC 4555, 3.5: what is sent from there is lost anyway. The
	// initiator hears of the new address, and decides.
	s.moveTo(ways[0])
	s.moveChildren()
}

// Disturbed says that routes have changed: the initiator looks whether its path
// still works, if it is not busy with that.
func (s *SA) Disturbed(now time.Time) []Output {
	return s.input(now, func() {
		if s.mob != nil && s.initiator {
			s.wantProbe()
		}
	})
}

// wantProbe has the peer asked whether it is there, by the present path and then
// by all others.
func (s *SA) wantProbe() {
	i := s.cur
	if s.failed || s.closing || i == nil || i.state != StateEstablished || i.active != nil || slices.ContainsFunc(s.queue, isProbe) {
		return
	}
	s.queue = append(s.queue, &probe{})
}

func isProbe(t task) bool {
	_, ok := t.(*probe)
	return ok
}

// mobikeRequest does what an INFORMATIONAL request says of addresses, and returns
// what the answer says of them.
func (s *SA) mobikeRequest(i *ikeSA, ps []ikev2.Payload) (answer []ikev2.Payload) {
	m := s.mob
	if m == nil {
		return nil
	}
	d := i.from
	at := path{d.Local, d.Remote}
	if n := ikev2.FindNotify(ps, ikev2.COOKIE2); n != nil && len(n.Data) >= minCookie2 && len(n.Data) <= maxCookie2 {
		answer = append(answer, notify(ikev2.COOKIE2, n.Data...))
	}
	theirs, said := s.heardAddresses(ps)
	moves := ikev2.FindNotify(ps, ikev2.UPDATE_SA_ADDRESSES) != nil && !s.initiator
	if said || moves {
		if err := checkNoNATs(ps, at); err != nil {
			s.log(levelWarn, "addresses are not the peer's", attrNotify(ikev2.UNEXPECTED_NAT_DETECTED), attrErr(err))
			return append(answer, notify(ikev2.UNEXPECTED_NAT_DETECTED))
		}
	}
	v := s.lookForNAT(i, ps, d.Local, d.Remote)
	if v.said {
		answer = append(answer, s.natPayloads(i, d.Local, d.Remote)...)
	}
	// What comes by an older IKE SA than the last update is older than that.
	late := i.created.Before(m.updated)
	if said && !late {
		m.updated = i.created
		if !slices.Equal(theirs, m.theirs) {
			m.theirs, m.bad = theirs, nil
			s.log(levelInfo, "additional addresses of the peer", slog.String("addresses", fmt.Sprint(theirs)))
		}
	}
	switch {
	case moves && !late:
		if err := s.mayComeTo(at); err != nil {
			s.log(levelWarn, "the peer may not move", slog.String("addresses", at.String()), attrNotify(ikev2.UNACCEPTABLE_ADDRESSES), attrErr(err))
			return append(answer[:0:0], append(cookieOnly(answer), notify(ikev2.UNACCEPTABLE_ADDRESSES))...)
		}
		m.updated = i.created
		s.peerMoved(at, v)
	case !s.initiator || at == s.path() || i != s.cur || at.local != s.local || !s.rule.Covers(at.addrs()):
	case said && !slices.Contains(theirs, s.remote.Addr()):
		s.wantCheck(at) // its address is gone
	default:
		s.wantProbe() // perhaps it does not reach us where we are
	}
	return answer
}

func cookieOnly(ps []ikev2.Payload) []ikev2.Payload {
	if n := ikev2.FindNotify(ps, ikev2.COOKIE2); n != nil {
		return []ikev2.Payload{n}
	}
	return nil
}

// mayComeTo says why the initiator may not be at p.
func (s *SA) mayComeTo(p path) error {
	if !s.rule.Covers(p.addrs()) {
		return errors.New("the rule's local_addr and remote_addr do not hold them")
	}
	return s.mayMove()
}

// peerMoved follows the initiator to p: IKE at once, SAs when the answer to a
// question has come from there.
func (s *SA) peerMoved(p path, v natView) {
	moved := p != s.path()
	if moved {
		s.moveTo(p)
	}
	natted := v.said && s.setNAT(v)
	switch {
	case moved && s.rule.MOBIKECheck:
		s.wantCheck(p)
	case moved || natted:
		s.moveChildren()
	}
}

// noNATs protects the addresses where NAT traversal does not allow for their
// change (RFC 4555, 3.9).
func (s *SA) noNATs(p path) []ikev2.Payload {
	if s.natt {
		return nil
	}
	return []ikev2.Payload{notify(ikev2.NO_NATS_ALLOWED, noNATsData(p.local, p.remote)...)}
}

func noNATsData(src, dst netip.AddrPort) []byte {
	b := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	return append(b, byte(src.Port()>>8), byte(src.Port()), byte(dst.Port()>>8), byte(dst.Port()))
}

// checkNoNATs holds NO_NATS_ALLOWED, if there is one, against the addresses that
// a request came with.
func checkNoNATs(ps []ikev2.Payload, at path) error {
	n := ikev2.FindNotify(ps, ikev2.NO_NATS_ALLOWED)
	if n == nil || bytes.Equal(n.Data, noNATsData(at.remote, at.local)) {
		return nil
	}
	return fmt.Errorf("came from %v to %v, sent otherwise", at.remote, at.local)
}

// mobikeAt is PeerAt where the peer has MOBIKE: SAs follow only if it answers from
// there.
func (s *SA) mobikeAt(remote netip.AddrPort) {
	p := path{s.local, remote}
	if !s.natRemote || s.natLocal || !s.rule.Covers(p.addrs()) || slices.ContainsFunc(s.queue, isCheck) || isCheck(s.cur.active) {
		return
	}
	s.wantCheck(p)
}

// elsewhere sends a request without an answer by other ways too.
func (s *SA) elsewhere(i *ikeSA, r *request) {
	if s.mob == nil || i.state < StateEstablished || r.sent <= waysAfter {
		return
	}
	for _, p := range s.ways() {
		r.strayed = true
		for _, b := range r.data {
			s.send(p.local, p.remote, b, true)
		}
	}
}

// found is told by which way the answer to a request came.
func (s *SA) found(i *ikeSA, d Datagram) {
	p := path{d.Local, d.Remote}
	if s.mob == nil || !s.initiator || i != s.cur || p == s.path() || !i.strayed || !slices.Contains(s.ways(), p) {
		return
	}
	if err := s.mayMove(); err != nil {
		s.log(levelWarn, "the peer answers by another way; not moved", slog.String("addresses", p.String()), attrErr(err))
		return
	}
	s.relocate(p)
}
