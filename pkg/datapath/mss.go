package datapath

import (
	"net/netip"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// The maximum segment size of TCP connections through a tunnel. Local
// connections take theirs from the TAP's MTU. Those that are only passing by
// have the sizes of other links in their SYNs, which then rest upon path MTU
// discovery, and that upon ICMP, which many a network drops. So a SYN that goes
// through a tunnel is told what fits, in both directions.

// clampSYN lowers the maximum segment size of the packet b, decoded in i, if
// that is a SYN for which sas, innermost first, make a tunnel to peer.
func (e *Engine) clampSYN(sas *bundle, b []byte, i *packet.Info, peer netip.Addr) {
	if e.c.KeepMSS || !packet.IsSYN(b, i) || e.c.Low == nil && !sas.tunnels() {
		return
	}
	mtu := e.c.Wire.PathMTU(peer)
	packet.ClampMSS(b, i, min(sas.innerMTU(i, mtu, mtu), e.c.TAP.MTU()))
}

// tunnels: one of them is in tunnel mode.
func (b *bundle) tunnels() bool {
	for _, sa := range b.sas[:b.n] {
		if sa.P.Mode == ipsec.Tunnel {
			return true
		}
	}
	return false
}

// innerMTU is the length of the longest packet of up to n octets, with headers
// like i's, that the bundle makes no more than mtu octets of, compressed or not.
func (b *bundle) innerMTU(i *packet.Info, n, mtu int) int {
	for n > 0 && b.length(i, n, unpacked) > mtu {
		n--
	}
	return n
}

// clampSYN does the same for a packet that came by l.
func (w *inWorker) clampSYN(l *layers, b []byte) {
	if !packet.IsSYN(b, &w.inner) {
		return
	}
	var sas bundle
	var peer netip.Addr
	for k := l.n - 1; k >= 0; k-- {
		sa := l.sa[k]
		sas.sas[sas.n] = sa
		sas.n++
		if sa.P.Mode == ipsec.Tunnel || !peer.IsValid() {
			peer = sa.P.Src
		}
	}
	w.e.clampSYN(&sas, b, &w.inner, peer)
}
