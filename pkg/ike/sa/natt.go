package sa

import (
	"crypto/sha1"
	"encoding/binary"
	"net/netip"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// nattPort is where a peer expects us after the change (RFC 7296, 2.23).
const nattPort = 4500

// natHash is the data of NAT_DETECTION_*_IP: SHA-1 over the SPIs as the header
// has them, address and port (RFC 7296, 2.23).
func natHash(initiator, responder SPI, ap netip.AddrPort) []byte {
	var b []byte
	b = binary.BigEndian.AppendUint64(b, uint64(initiator))
	b = binary.BigEndian.AppendUint64(b, uint64(responder))
	b = append(b, ap.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, ap.Port())
	h := sha1.Sum(b)
	return h[:]
}

// natPayloads tells the peer which addresses we believe to use. With
// nat_traversal force the source is a false one: the peer then sees a NAT. Without
// the port there is no NAT traversal, and the peer must not come there.
func (s *SA) natPayloads(i *ikeSA, local, remote netip.AddrPort) []ikev2.Payload {
	if s.rule.NATT == pad.NATTNo || s.mob != nil && !s.natt || s.cur.state < StateAuthWait && s.noNATT() {
		return nil
	}
	a, b := i.spis()
	src := natHash(a, b, local)
	if s.rule.NATT == pad.NATTForce {
		src = s.random(len(src))
	}
	return []ikev2.Payload{
		notify(ikev2.NAT_DETECTION_SOURCE_IP, src...),
		notify(ikev2.NAT_DETECTION_DESTINATION_IP, natHash(a, b, remote)...),
	}
}

// natView is what a message says of NATs on its way. said: it says something. dst
// is our address as the peer sees it, hashed.
type natView struct {
	said, local, remote bool
	dst                 [natHashLen]byte
}

// detectNAT looks for NATs in IKE_SA_INIT; a peer without these notifies cannot do
// NAT traversal.
func (s *SA) detectNAT(i *ikeSA, ps []ikev2.Payload, local, remote netip.AddrPort) {
	a, b := i.spis()
	if !i.initiator {
		b = 0 // the request was made before we had an SPI
	}
	v := s.viewOf(a, b, ps, local, remote)
	s.natt = v.said
	s.natLocal, s.natRemote = v.local, v.remote
}

// lookForNAT does so in a message of an IKE SA that stands.
func (s *SA) lookForNAT(i *ikeSA, ps []ikev2.Payload, local, remote netip.AddrPort) natView {
	a, b := i.spis()
	return s.viewOf(a, b, ps, local, remote)
}

// setNAT goes by v, and reports whether that is new.
func (s *SA) setNAT(v natView) bool {
	changed := s.natLocal != v.local || s.natRemote != v.remote
	s.natLocal, s.natRemote = v.local, v.remote
	return changed
}

// viewOf compares what the peer believes with what we see. A sender with several
// addresses puts several source hashes.
func (s *SA) viewOf(a, b SPI, ps []ikev2.Payload, local, remote netip.AddrPort) (v natView) {
	if s.rule.NATT == pad.NATTNo {
		return v
	}
	var src, srcOK, dst, dstOK bool
	for _, p := range ps {
		n, ok := p.(*ikev2.Notify)
		if !ok {
			continue
		}
		switch n.Type {
		case ikev2.NAT_DETECTION_SOURCE_IP:
			src = true
			srcOK = srcOK || string(n.Data) == string(natHash(a, b, remote))
		case ikev2.NAT_DETECTION_DESTINATION_IP:
			dst = true
			dstOK = dstOK || string(n.Data) == string(natHash(a, b, local))
			copy(v.dst[:], n.Data)
		}
	}
	if !src || !dst {
		return natView{}
	}
	v.said, v.remote = true, !srcOK
	// The peer sees the false hash of ours as our NAT, so we behave as if
	// there were one.
	v.local = !dstOK || s.rule.NATT == pad.NATTForce
	return v
}

func (s *SA) nat() bool { return s.natLocal || s.natRemote }

// float changes the initiator to the ports of NAT traversal: if there is a NAT, or
// may be one later (RFC 4555, 3.3).
func (s *SA) float() {
	if !s.nat() && !s.mayFloat() || s.local.Port() != s.cfg.IKEPort {
		return
	}
	s.local = netip.AddrPortFrom(s.local.Addr(), s.cfg.NATTPort)
	s.remote = netip.AddrPortFrom(s.remote.Addr(), nattPort)
	s.peer.Local, s.peer.Remote = s.local, s.remote
}

type encaps struct{ in, out *ipsec.Encap }

// encap says how ESP travels: in UDP between the ports that IKE uses, if there
// is a NAT. oa is the peer's original address, if known.
func (s *SA) encap(oa netip.Addr) encaps {
	if !s.nat() {
		return encaps{}
	}
	l, r := s.local.Port(), s.remote.Port()
	if l != s.cfg.NATTPort { // the peer did not change ports; ESP in UDP does not use IKE's
		l, r = s.cfg.NATTPort, nattPort
	}
	return encaps{
		in:  &ipsec.Encap{SPort: r, DPort: l, OA: oa},
		out: &ipsec.Encap{SPort: l, DPort: r, OA: oa},
	}
}
