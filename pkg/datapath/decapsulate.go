package datapath

import (
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/ipcomp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

// decapsulate puts the IP packet together that an opened ESP packet carries:
// j.out[off:off+n]. What is none is counted.
func (w *inWorker) decapsulate(j *inJob, p *esp.Packet) (off, n int, ok bool) {
	if p.Next == protoIPComp && j.sa.P.CPI != 0 && !w.unshrink(j, p) {
		return 0, 0, false
	}
	off, n = j.at, p.N
	if j.sa.P.Mode == ipsec.Tunnel {
		return off, n, w.fromTunnel(j.out[off:off+n], p.Next, j.tos)
	}
	if j.udp {
		return w.fromUDP(j, p, off, n)
	}
	hdr := j.hdr
	start := off - hdr
	copy(j.out[start:off], j.buf[j.outOff:j.outOff+hdr])
	ip := j.out[start : off+n]
	ip[j.protoOff] = p.Next
	packet.SetLen(ip, len(ip))
	packet.FixIPv4Checksum(ip)
	return start, len(ip), true
}

// unshrink replaces the opened payload, which is IPComp, by what was compressed,
// in memory of its own. false: counted.
func (w *inWorker) unshrink(j *inJob, p *esp.Packet) bool {
	hdr := 0
	if j.sa.P.Mode != ipsec.Tunnel {
		hdr = max(j.hdr, j.newHeader())
	}
	out, at, next := w.expandFor(j.sa, hdr, j.out[j.at:j.at+p.N])
	if out == nil {
		return false
	}
	j.out, j.at, p.N, p.Next = out, at, len(out)-at, next
	return true
}

// expandFor expands b, IPComp inside sa (RFC 3173), to the end of memory of its
// own, from at on, which has room in front for an IP header of hdr octets too;
// both fit into a packet. The CPI has to be the one that was agreed for the SA.
// nil: counted.
func (w *inWorker) expandFor(sa *sad.SA, hdr int, b []byte) (out []byte, at int, next uint8) {
	next, cpi, ok := ipcomp.Header(b)
	if !ok || cpi != sa.P.CPI {
		w.n.inc(DropInIPComp)
		return nil, 0, 0
	}
	k, err := w.peeler.expand(hdr, b[ipcomp.HeaderLen:])
	if err != nil {
		w.n.inc(DropInIPComp)
		return nil, 0, 0
	}
	w.n.inc(InExpanded)
	at = headroom + etherLen + hdr
	out = w.big.Take(at + k)
	copy(out[at:], w.peeler.expanded[hdr:hdr+k])
	return out, at, next
}

// fromTunnel judges what an outer header with traffic class tos was around, the
// packet b if next says so, and combines the ECN fields. false: counted.
func (w *inWorker) fromTunnel(b []byte, next, tos uint8) bool {
	switch {
	case next != protoIPv4 && next != protoIPv6:
		w.n.inc(DropInMalformed)
	case !packet.DecapECN(b, tos):
		w.n.inc(DropInECN)
	default:
		return true
	}
	return false
}

// fromUDP gives a transport-mode payload from UDP a new IP header. A NAT has
// changed addresses under the upper-layer checksum; the ICV vouches for the
// payload, so the checksum is made anew (RFC 3948, 3.1.2).
func (w *inWorker) fromUDP(j *inJob, p *esp.Packet, off, n int) (int, int, bool) {
	hdr := packet.IPv4Len
	if j.dst.Is6() {
		hdr = packet.IPv6Len
	}
	start := off - hdr
	ip := j.out[start : off+n]
	packet.PutHeader(ip, j.src.Addr(), j.dst, p.Next, len(ip), 64)
	packet.FixIPv4Checksum(ip)
	packet.FixTransportChecksum(ip, hdr, p.Next)
	return start, len(ip), true
}

// deliver queues the IP packet at buf[off:], decoded in i, for the TAP.
func (w *inWorker) deliver(buf []byte, off int, i *packet.Info, o tap.Offload) {
	if w.take != nil {
		w.take(buf, off, i.Len)
		return
	}
	if w.byLink(buf, off, i) {
		return
	}
	if !w.gro.Add(buf, off, i, o) {
		w.write()
		w.gro.Add(buf, off, i, o)
	}
}
