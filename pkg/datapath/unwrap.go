package datapath

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/datapath/ah"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/ipcomp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
)

// peeler is an inWorker's memory for what does not go through the batch: AH,
// IPComp, and whatever lies inside another transform.
type peeler struct {
	esp      [1]esp.Packet
	ah       [1]ah.Packet
	ahs      ah.Scratch
	comp     ipcomp.Scratch
	expanded []byte // 65535 octets, from the first IPComp packet on
	job      inJob
	larval   ipsec.SAID // the SA that find found without keys
}

// expand expands src to expanded[hdr:] and returns its length there.
func (p *peeler) expand(hdr int, src []byte) (int, error) {
	if p.expanded == nil {
		p.expanded = make([]byte, 65535)
	}
	return p.comp.Expand(p.expanded[hdr:], src)
}

// bigEnough is how much of a batch is expanded before the TAP gets it.
const bigEnough = 1 << 20

// relieve hands to the TAP what was delivered, if that has expanded to much: what
// comes as one batch may be many thousand packets, each of which may become 64 KiB.
// Between two packets only.
func (w *inWorker) relieve() {
	if w.big.Taken() > bigEnough {
		w.write()
		w.big.Reset()
	}
}

// layers are the SAs by which a packet came, outermost first.
type layers struct {
	sa [MaxBundle]*sad.SA
	n  int
}

func (l *layers) push(sa *sad.SA) bool {
	if l.n == len(l.sa) {
		return false
	}
	l.sa[l.n] = sa
	l.n++
	return true
}

// serve: the packet came with exactly the protection that the policy, or one of
// its alternatives, asks for, in the order that it asks for; transforms that a packet may come without may
// be missing.
func (l *layers) serve(e *spd.Entry) bool {
	if e.Packed != nil && l.n == 1 && l.sa[0].P.CPI != 0 && serves(l.sa[0], e, e.Packed) {
		return true
	}
	if e.Choices == nil {
		return l.are(e, e.P.Requests)
	}
	for i := range e.Choices {
		if c := &e.Choices[i]; l.are(e, c.Requests) && l.fit(c.Alg) {
			return true
		}
	}
	return false
}

// are: the layers are those that requests of e ask for.
func (l *layers) are(e *spd.Entry, requests []ipsec.Request) bool {
	k := l.n - 1 // innermost first, as requests are
	for i := range requests {
		r := &requests[i]
		switch {
		case k >= 0 && serves(l.sa[k], e, r):
			k--
		case !optional(r):
			return false
		}
	}
	return k < 0
}

// fit: the algorithms are those of one alternative.
func (l *layers) fit(alg []ipsec.Proposal) bool {
	for _, sa := range l.sa[:l.n] {
		if !sa.Fits(alg) {
			return false
		}
	}
	return true
}

// wrapped: the packet decoded in i, which came by l, has a further transform
// for us on it.
func (w *inWorker) wrapped(i *packet.Info, l *layers) bool {
	switch i.Proto {
	case protoESP, protoAH, protoIPComp:
		return !i.IsFragment() && w.e.c.Wire.IsLocal(i.Dst)
	case protoIPv4, protoIPv6:
		return w.plainTunnel(i, l) != nil
	}
	return false
}

// plainTunnel is the IPComp SA in tunnel mode by which an IP in IP packet came
// that compression did not help (RFC 3173, 2.2); nil if there is none. Such a
// packet counts only within another transform.
func (w *inWorker) plainTunnel(i *packet.Info, l *layers) *sad.SA {
	if l.n == 0 || i.IsFragment() || !w.e.c.Wire.IsLocal(i.Dst) {
		return nil
	}
	return w.e.c.SAD.Out(sad.OutKey{Proto: ipsec.IPComp, Mode: ipsec.Tunnel, Src: i.Src, Dst: i.Dst}, nil)
}

// unwrap takes further transforms off the packet buf[off:off+n], which is
// decoded in w.inner and came by l, one after the other (RFC 4301, 5.2), and
// gives what remains to accept. Every step takes one of MaxBundle places in l,
// so a sender cannot nest without end.
func (w *inWorker) unwrap(buf []byte, off, n int, l layers, now time.Time) {
	i := &w.inner
	for {
		var sa *sad.SA
		was := buf[off : off+n]
		switch i.Proto {
		case protoESP:
			sa, buf, off, n = w.openESP(buf, off, n, now)
		case protoAH:
			sa, buf, off, n = w.openAH(buf, off, n, now)
		case protoIPComp:
			sa, buf, off, n = w.expand(buf, off, n, now)
		default:
			if sa = w.plainTunnel(i, &l); sa == nil { // gone since wrapped saw it
				w.n.inc(DropInNoSA)
				return
			}
			if !w.account(sa, 1, n, now) || !w.fromTunnel(buf[off+i.HdrLen:off+n], i.Proto, i.TOS) {
				return
			}
			off, n = off+i.HdrLen, n-i.HdrLen
		}
		if id := w.peeler.larval; id.SPI != 0 {
			w.peeler.larval = ipsec.SAID{}
			w.kept(id, w.e.early.putPeel(id, was, l, now))
			return
		}
		if sa == nil {
			return // counted
		}
		if !l.push(sa) {
			w.n.inc(DropInProtocol)
			return
		}
		if !packet.Decode(buf[off:off+n], i) {
			w.n.inc(DropInMalformed)
			return
		}
		n = i.Len // beyond it lies TFC padding
		if !w.wrapped(i, &l) {
			w.accept(buf, off, n, &l, now)
			return
		}
	}
}

// find looks up the SA of the packet in w.inner whose transform's header has
// spi, and makes sure that a transport mode packet is from the SA's peer, see
// fromPeer. A larval one is told in larval.
func (w *inWorker) find(proto ipsec.Protocol, dst netip.Addr, spi uint32) *sad.SA {
	id := ipsec.SAID{Proto: proto, Dst: dst, SPI: ipsec.SPI(spi)}
	sa := w.e.c.SAD.Lookup(id)
	switch {
	case sa == nil:
		w.n.inc(DropInNoSA)
	case sa.State() == sad.Larval:
		w.peeler.larval = id
	case sa.P.Encap != nil:
		w.n.inc(DropInEncap)
	case sa.P.Mode != ipsec.Tunnel && w.inner.Src != sa.P.Src && !sa.AnySource():
		w.n.inc(DropInSelector)
		sa.SelectorErrors.Add(1)
	default:
		return sa
	}
	return nil
}

// openESP opens a packet within another transform. It returns where the packet
// that was in it stands, and in what; no SA: dropped.
func (w *inWorker) openESP(buf []byte, off, n int, now time.Time) (*sad.SA, []byte, int, int) {
	i, j := &w.inner, &w.peeler.job
	b := buf[off+i.HdrLen : off+n]
	if len(b) < 8 {
		w.n.inc(DropInMalformed)
		return nil, nil, 0, 0
	}
	sa := w.find(ipsec.ESP, i.Dst, binary.BigEndian.Uint32(b))
	if sa == nil {
		return nil, nil, 0, 0
	}
	seq, ok := w.window(sa, b[4:])
	if !ok {
		return nil, nil, 0, 0
	}
	h := sa.T.HeaderLen()
	if len(b) < h {
		w.n.inc(DropInMalformed)
		return nil, nil, 0, 0
	}
	one := w.peeler.esp[:]
	one[0] = esp.Packet{Dst: b[h:], Src: b, Seq: seq}
	sa.T.Open(w.scratch, one)
	p := one[0]
	one[0] = esp.Packet{}
	if !w.verified(sa, p.Err, seq, n, now) {
		return nil, nil, 0, 0
	}
	if p.Next == protoNone {
		w.n.inc(InDummy)
		return nil, nil, 0, 0
	}
	*j = nativeJob(buf, off, n, i)
	j.sa, j.out, j.at = sa, buf, j.espOff+h
	off, n, ok = w.decapsulate(j, &p)
	buf = j.out
	*j = inJob{}
	if !ok {
		return nil, nil, 0, 0
	}
	return sa, buf, off, n
}

// openAH verifies a packet and takes AH out of it, in tunnel mode with the
// outer header; it returns what openESP does.
func (w *inWorker) openAH(buf []byte, off, n int, now time.Time) (*sad.SA, []byte, int, int) {
	i := &w.inner
	b := buf[off+i.HdrLen : off+n]
	if len(b) < 12 {
		w.n.inc(DropInMalformed)
		return nil, nil, 0, 0
	}
	sa := w.find(ipsec.AH, i.Dst, binary.BigEndian.Uint32(b[4:]))
	if sa == nil {
		return nil, nil, 0, 0
	}
	seq, ok := w.window(sa, b[8:])
	if !ok {
		return nil, nil, 0, 0
	}
	one := w.peeler.ah[:]
	one[0] = ah.Packet{IP: buf[off : off+n], Off: i.HdrLen, Seq: seq}
	sa.AH.Open(&w.peeler.ahs, one)
	p := one[0]
	one[0] = ah.Packet{}
	if !w.verified(sa, p.Err, seq, n, now) {
		return nil, nil, 0, 0
	}
	// Headers and payload, which AH was between.
	hdr, out, at, end := buf[off:off+i.HdrLen], buf, off+i.HdrLen+p.N, off+n
	tunnel := sa.P.Mode == ipsec.Tunnel
	if tunnel {
		hdr = nil
	}
	if p.Next == protoIPComp && sa.P.CPI != 0 {
		if out, at, p.Next = w.expandFor(sa, len(hdr), buf[at:end]); out == nil {
			return nil, nil, 0, 0
		}
		end = len(out)
	}
	if tunnel {
		if !w.fromTunnel(out[at:end], p.Next, i.TOS) {
			return nil, nil, 0, 0
		}
		return sa, out, at, end - at
	}
	if p.Next == protoNone {
		w.n.inc(InDummy)
		return nil, nil, 0, 0
	}
	at -= copy(out[at-len(hdr):], hdr)
	packet.SetTransport(out[at:end], i.ProtoOff, p.Next, end-at)
	return sa, out, at, end - at
}

// window infers a sequence number from its lower half at the front of b.
func (w *inWorker) window(sa *sad.SA, b []byte) (uint64, bool) {
	seq, ok := sa.Window.Check(binary.BigEndian.Uint32(b))
	if !ok {
		w.n.inc(DropInReplay)
		sa.ReplayErrors.Add(1)
	}
	return seq, ok
}

// expand puts the packet together that an IPComp packet carries, in buf or, if
// it has no room, in the batch's memory.
func (w *inWorker) expand(buf []byte, off, n int, now time.Time) (*sad.SA, []byte, int, int) {
	i := &w.inner
	b := buf[off+i.HdrLen : off+n]
	next, cpi, ok := ipcomp.Header(b)
	if !ok {
		w.n.inc(DropInMalformed)
		return nil, nil, 0, 0
	}
	sa := w.find(ipsec.IPComp, i.Dst, uint32(cpi))
	if sa == nil {
		return nil, nil, 0, 0
	}
	tunnel := sa.P.Mode == ipsec.Tunnel
	if tunnel && next != protoIPv4 && next != protoIPv6 {
		w.n.inc(DropInMalformed)
		return nil, nil, 0, 0
	}
	// The whole packet is built beside buf, which its payload comes from.
	hdr := 0
	if !tunnel {
		hdr = i.HdrLen
	}
	k, err := w.peeler.expand(hdr, b[ipcomp.HeaderLen:])
	x := w.peeler.expanded
	copy(x[:hdr], buf[off:])
	if err != nil {
		w.n.inc(DropInIPComp)
		return nil, nil, 0, 0
	}
	if !w.account(sa, 1, n, now) {
		return nil, nil, 0, 0
	}
	x = x[:hdr+k]
	if tunnel {
		if !w.fromTunnel(x, next, i.TOS) {
			return nil, nil, 0, 0
		}
	} else {
		packet.SetTransport(x, i.ProtoOff, next, len(x))
	}
	const front = headroom + etherLen
	if len(buf) < front+len(x) {
		buf = w.big.Take(front + len(x))
	}
	copy(buf[front:], x)
	return sa, buf, front, len(x)
}
