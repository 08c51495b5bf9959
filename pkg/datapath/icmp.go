package datapath

import (
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// aboutProtected sends an ICMP error for which there is no policy by the SA that
// the answer to the packet it is about would take (RFC 4301, 6.2): it comes from
// a router whose address no selector has, and quotes what is protected. It
// reports whether it has dealt with the packet, which was decoded in w.info.
//
// Nothing is negotiated for it: a packet that came by an SA has one for the way
// back. Without one it is dropped, also where the default is to pass.
func (w *outWorker) aboutProtected(buf []byte, off, n int, now time.Time, whole bool) bool {
	if !packet.Returning(buf[off:off+n], &w.info, &w.about) {
		return false
	}
	i := w.info
	w.info = w.about // for the look-ups
	p, ambiguous := w.policy(&w.info)
	if p == nil || p.P.Action != ipsec.Protect {
		w.info = i
		return false
	}
	sa := w.superSA(p)
	w.info = i
	if ambiguous || sa == nil || sa.P.Mode != ipsec.Tunnel {
		w.n.inc(DropOutNoPolicy)
		return true
	}
	p.Hit(now, 1)
	w.encapsulate(sa, buf, off, n, now, whole)
	return true
}
