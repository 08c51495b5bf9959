package datapath

import (
	"time"

	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/wire"
)

// SAs with AGGFRAG_PAYLOAD (RFC 9347). Packets of one SA that are in a batch at
// the same time leave together, as many as the path MTU lets; nothing waits for
// more to come. Each is copied once, to where it will be sealed:
//
//	arena  | outer IP | ESP, IV | AGGFRAG | packet | packet | packet | trailer |
//
// Packets share an ESP packet only if they have the same DSCP and ECN, so that the
// outer header says the same of all of them (RFC 6040, RFC 4301, 5.1.2.1). They
// stay in order. A packet that does not fit alone goes the ordinary way, as the
// only one in its ESP packet, and is refused or cut there.

// packs are the ESP packets in the making, each of another SA.
type packs struct {
	open  [4]pack
	evict int // the one that makes room next
}

// pack is one of them; its AGGFRAG_PAYLOAD is arena[at:at+n].
type pack struct {
	sa     *sad.SA // nil: none
	p      plan
	tos    uint8
	gram   bool
	end    int // of what is reserved in the arena
	at, n  int
	room   int // octets that fit behind at
	count  int // packets
	octets int // of these
	now    time.Time
}

// pack makes room for a packet of n octets, whose traffic class is w.info's, in
// an ESP packet of sa; nil: it does not fit one.
func (w *outWorker) pack(sa *sad.SA, n int, now time.Time) []byte {
	var k *pack
	for i := range w.packs.open {
		if o := &w.packs.open[i]; o.sa == sa {
			k = o
		}
	}
	if k != nil && (k.tos != w.info.TOS || k.n+n > k.room) {
		w.closePack(k)
		k = nil
	}
	if k == nil {
		if k = w.openPack(sa, n, now); k == nil {
			return nil
		}
	}
	b := w.arena[k.at+k.n : k.at+k.n+n]
	k.n += n
	k.count++
	k.octets += n
	return b
}

// openPack begins an ESP packet of sa that has room for n octets; nil: the path
// MTU has not.
func (w *outWorker) openPack(sa *sad.SA, n int, now time.Time) *pack {
	k := pack{sa: sa, tos: w.info.TOS, now: now, n: aggfrag.HeaderLen}
	k.p = plan{hdr: packet.IPv4Len, next: aggfrag.Protocol, tunnel: true}
	if sa.P.Dst.Is6() {
		k.p.hdr = packet.IPv6Len
	}
	k.p.sizeESP(sa)
	mtu := min(w.e.c.Wire.PathMTU(sa.P.Dst), 65535)
	if k.room = sa.T.Overhead().MaxPayload(mtu - k.p.fixed + sa.T.HeaderLen()); k.n+n > k.room {
		return nil
	}
	if w.packs.open[w.packs.evict].sa != nil {
		w.closePack(&w.packs.open[w.packs.evict])
	}
	w.reserve(mtu)
	front := k.p.fixed
	if k.gram = w.bySocket(sa, &k.p, &w.info); k.gram {
		front = sa.T.HeaderLen()
	}
	k.at = w.used + front
	k.end = w.used + mtu
	w.used = k.end
	o := &w.packs.open[w.packs.evict]
	w.packs.evict = (w.packs.evict + 1) % len(w.packs.open)
	*o = k
	return o
}

// closePacks queues all for sealing.
func (w *outWorker) closePacks() {
	for i := range w.packs.open {
		// Oldest first.
		if k := &w.packs.open[(w.packs.evict+i)%len(w.packs.open)]; k.sa != nil {
			w.closePack(k)
		}
	}
}

// closePack queues an ESP packet for sealing, with a sequence number.
func (w *outWorker) closePack(k *pack) {
	sa, p := k.sa, &k.p
	defer func() { *k = pack{} }()
	p.payload, p.plen = k.at, k.n
	p.sizeESP(sa)
	if k.end == w.used {
		w.used = k.at + p.total - p.fixed // so that messages lie back to back
	}
	w.count()
	seq, ok := sa.NextSeq(1)
	if !ok {
		w.n.add(DropOutSequence, uint(k.count))
		return
	}
	soft, hard := sa.Account(1, k.octets, k.now)
	if soft || hard && sa.FirstHard() {
		w.e.c.LimitReached(sa, hard)
	}
	if hard {
		w.n.add(DropOutLifetime, uint(k.count))
		return
	}
	aggfrag.PutHeader(w.arena[k.at:])
	if k.count > 1 {
		w.n.inc(OutAggregates)
		w.n.add(OutAggregated, uint(k.count))
	}
	if k.gram {
		h := sa.T.HeaderLen()
		start, end := k.at-h, k.at+p.total-p.fixed
		w.push(outJob{sa: sa, gram: true, tos: k.tos, more: k.count - 1, pkt: wire.Packet{Buf: w.arena, Off: start, Len: end - start}},
			esp.Packet{Dst: w.arena[start:end], Src: w.arena[k.at : k.at+k.n : end], Next: p.next, Seq: seq})
		return
	}
	w.push(outJob{more: k.count - 1}, esp.Packet{})
	j := len(w.jobs) - 1
	i := packet.Info{TOS: k.tos}
	w.putESP(&w.jobs[j], &w.seals[j], sa, p, &i, w.arena, k.at, k.n, 0)
	w.seals[j].Seq = seq
}

// packSuper packs all segments of the super-frame at hand, and reports false
// with nothing done if they have to go one by one.
func (w *outWorker) packSuper(e *spd.Entry, sa *sad.SA, now time.Time) bool {
	s := &w.super
	n := s.Segments()
	for k := range n {
		b := w.pack(sa, s.Len(k), now)
		switch {
		case b != nil:
			s.Put(b, k, 0)
		case k == 0: // the longest
			return false
		default: // the path MTU has changed since the first
			w.n.inc(DropOutSend)
		}
	}
	e.Hit(now, n)
	return true
}

// unpack judges what came in an ESP packet of an SA with AGGFRAG_PAYLOAD, which
// is authentic and new: each packet by itself.
func (w *inWorker) unpack(j *inJob, p *esp.Packet, now time.Time) {
	u := &w.blocks
	if p.Next != aggfrag.Protocol {
		w.n.inc(DropInMalformed)
		return
	}
	if u.Reset(j.out[j.at:j.at+p.N]) != nil {
		w.n.inc(DropInMalformed)
	}
	if u.Len() > 1 {
		w.n.inc(InAggregates)
		w.n.add(InAggregated, uint(u.Len()))
	}
	var whole aggfrag.Result
	if u.Fragments() {
		if w.whole == nil {
			w.whole = make([]byte, aggfrag.BufLen)
		}
		whole = j.sa.Fragments.Add(p.Seq, u, w.whole)
		w.n.add(DropInFragment, uint(whole.Lost))
	}
	w.rejoined(j, whole.First, now)
	for b := u.Next(); b != nil; b = u.Next() {
		w.block(j, b, now)
	}
	w.rejoined(j, whole.Second, now)
}

// rejoined is block for a packet that came in fragments, nil if there is none.
func (w *inWorker) rejoined(j *inJob, b []byte, now time.Time) {
	if b == nil {
		return
	}
	w.n.inc(InRejoined)
	w.block(j, append(w.arena.Take(len(b))[:0], b...), now)
}

// block judges one packet (RFC 4301, 5.2, step 4).
func (w *inWorker) block(j *inJob, b []byte, now time.Time) {
	if !w.fromTunnel(b, protoIPv4, j.tos) {
		return // counted
	}
	if !packet.Decode(b, &w.inner) {
		w.n.inc(DropInMalformed)
		return
	}
	l := layers{n: 1}
	l.sa[0] = j.sa
	if w.wrapped(&w.inner, &l) {
		w.unwrap(b, 0, w.inner.Len, l, now)
		return
	}
	w.accept(b, 0, w.inner.Len, &l, now)
}
