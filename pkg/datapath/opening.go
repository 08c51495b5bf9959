package datapath

import (
	"encoding/binary"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/ah"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// esp finds the SA of the ESP packet b of j, and queues a copy of j for opening.
func (w *inWorker) esp(j *inJob, b []byte, now time.Time) {
	if len(b) < 8 {
		w.n.inc(DropInMalformed)
		return
	}
	sa, spi := w.near, ipsec.SPI(binary.BigEndian.Uint32(b))
	if sa == nil || sa.P.SPI != spi || sa.P.Dst != j.dst {
		id := ipsec.SAID{Proto: ipsec.ESP, Dst: j.dst, SPI: spi}
		if sa = w.e.c.SAD.Lookup(id); sa == nil {
			w.n.inc(DropInNoSA)
			return
		}
		if sa.T == nil {
			w.tooEarly(id, j, b, now)
			return
		}
		w.near = sa
	}
	if (sa.P.Encap != nil) != j.udp {
		w.n.inc(DropInEncap)
		return
	}
	j.sa, j.link = sa, w.link
	if !j.udp && !w.fromPeer(j) {
		w.n.inc(DropInSelector)
		sa.SelectorErrors.Add(1)
		return
	}
	h := sa.T.HeaderLen()
	if len(b) < h {
		w.n.inc(DropInMalformed)
		return
	}
	j.buf = j.buf[:j.espOff+len(b)]
	j.out, j.at = j.buf, j.espOff+h
	if need := j.newHeader(); j.at < need {
		j.out, j.at = w.arena.Take(need+len(b)-h), need
	}
	if len(w.jobs) == cap(w.jobs) {
		w.open(now)
	}
	w.jobs = append(w.jobs, *j)
}

// next is datagram, but only for ESP in UDP of the SA that the last packet came by, in
// tunnel mode; else it does nothing and returns false. Trains hold little else, and it
// takes a fraction of the time.
func (w *inWorker) next(d *wire.Datagram) bool {
	sa, k := w.near, len(w.jobs)
	if sa == nil || k == cap(w.jobs) || sa.P.Mode != ipsec.Tunnel || sa.P.Encap == nil {
		return false
	}
	h := sa.T.HeaderLen()
	if d.Len < h || ipsec.SPI(binary.BigEndian.Uint32(d.Buf[d.Off:])) != sa.P.SPI || d.Local.Addr() != sa.P.Dst {
		return false
	}
	w.jobs = w.jobs[:k+1]
	j := &w.jobs[k] // zero
	j.sa, j.udp, j.size, j.tos, j.link = sa, true, d.Len+packet.UDPLen, d.TOS, w.link
	j.buf, j.espOff = d.Buf[:d.Off+d.Len], d.Off
	j.out, j.at = j.buf, d.Off+h
	j.src, j.dst = d.Remote, sa.P.Dst
	j.usual = d.TOS&3 == 0 && !sa.P.AggFrag && d.Remote.Port() == sa.P.Encap.SPort && d.Remote.Addr() == sa.P.Src && w.link == nil && w.take == nil
	return true
}

// newHeader is how many octets decapsulate writes in front of a payload that
// has none there.
func (j *inJob) newHeader() int {
	switch {
	case j.sa.P.Mode == ipsec.Tunnel || !j.udp:
		return 0
	case j.dst.Is6():
		return packet.IPv6Len
	}
	return packet.IPv4Len
}

// tooEarly keeps a packet until the SA has its keys.
func (w *inWorker) tooEarly(id ipsec.SAID, j *inJob, b []byte, now time.Time) {
	w.kept(id, w.e.early.put(id, *j, b, now))
}

// kept counts a packet that was to wait for the keys of id.
func (w *inWorker) kept(id ipsec.SAID, ok bool) {
	if !ok {
		w.n.inc(DropInNoSA)
		return
	}
	w.n.inc(InEarly)
	// The keys may have come between the look-up and the put.
	if sa := w.e.c.SAD.Lookup(id); sa != nil && sa.State() != sad.Larval {
		w.e.wake()
	}
}

// flush ends a batch: it opens what is left and writes what may pass to the
// TAP. Nothing waits for the next batch.
func (w *inWorker) flush(now time.Time) error {
	w.open(now)
	w.settle(now)
	w.write()
	w.arena.Reset()
	w.big.Reset()
	w.near = nil
	err := w.err
	w.err = nil
	return err
}

// open opens the jobs in runs of one SA, and judges them in order.
func (w *inWorker) open(now time.Time) {
	for a := 0; a < len(w.jobs); {
		sa := w.jobs[a].sa
		b := a + 1
		for b < len(w.jobs) && w.jobs[b].sa == sa {
			b++
		}
		w.openRun(sa, w.jobs[a:b], now)
		a = b
	}
	clear(w.jobs)
	w.jobs = w.jobs[:0]
}

// openRun opens the packets of one SA. The window is asked before the
// cryptography, to throw out cheaply what cannot be new, and marked after it,
// each for all at once; lifetimes are counted at once as well unless one is near.
func (w *inWorker) openRun(sa *sad.SA, jobs []inJob, now time.Time) {
	for k := range jobs {
		j := &jobs[k]
		w.lows[k] = binary.BigEndian.Uint32(j.buf[j.espOff+4:])
	}
	sa.Window.CheckBatch(w.lows[:len(jobs)], w.seqs, w.news)
	for k := range jobs {
		if !w.news[k] {
			w.n.inc(DropInReplay)
			sa.ReplayErrors.Add(1)
			continue
		}
		j := &jobs[k]
		w.opens = append(w.opens, esp.Packet{Dst: j.out[j.at:], Src: j.buf[j.espOff:], Seq: w.seqs[k]})
		w.which = append(w.which, k)
	}
	sa.T.Open(w.scratch, w.opens)

	n := 0
	for k := range w.opens {
		p := &w.opens[k]
		if !w.authentic(sa, p.Err) {
			continue
		}
		if n != k {
			w.opens[n], w.which[n] = *p, w.which[k]
		}
		w.seqs[n] = p.Seq
		n++
	}
	sa.Window.MarkBatch(w.seqs[:n], w.news)
	far, packets, octets, gen := sa.Far(n), 0, 0, w.e.generation()
	for k := range w.opens[:n] {
		j := &jobs[w.which[k]]
		switch {
		case !w.news[k]:
			w.n.inc(DropInReplay)
			sa.ReplayErrors.Add(1)
			continue
		case far:
			packets++
			octets += j.size
		case !w.account(sa, 1, j.size, now):
			continue
		}
		if !w.follows(j, &w.opens[k], gen) {
			w.opened(j, &w.opens[k], now)
		}
	}
	if packets > 0 {
		w.account(sa, packets, octets, now)
	}
	clear(w.opens)
	w.opens, w.which = w.opens[:0], w.which[:0]
}

// write hands to the TAP what was delivered.
func (w *inWorker) write() {
	super := w.e.super()
	if !w.gro.Empty() {
		fs, joined, made := w.gro.Frames()
		w.n.add(InCoalesced, joined)
		w.n.add(InSuper, made)
		for k := range fs {
			f := &fs[k]
			putEther(f.Buf[f.Off:], w.e.c.TAP.MAC(), f.Buf[f.Off+etherLen]>>4)
		}
		recordFrames(&w.tape, capture.High, capture.In, fs)
		if err := w.writeTAP(fs); err != nil && w.err == nil {
			w.err = err
		}
		w.gro.Reset()
	}
	w.gro.Kinds = super
	if len(w.raw) > 0 {
		recordFrames(&w.tape, capture.High, capture.In, w.raw)
		if err := w.e.writeTAP(nil, w.raw, &w.n); err != nil && w.err == nil {
			w.err = err
		}
		clear(w.raw)
		w.raw = w.raw[:0]
	}
}

// opened judges what came out of an ESP packet that is authentic and new
// (RFC 4301, 5.2, steps 3c to 4).
func (w *inWorker) opened(j *inJob, p *esp.Packet, now time.Time) {
	sa := j.sa
	w.link = j.link
	w.relieve()
	if j.udp && w.e.c.NewMapping != nil && (j.src.Port() != sa.P.Encap.SPort || j.src.Addr() != sa.P.Src) {
		w.e.c.NewMapping(sa, j.src)
	}
	if p.Next == protoNone {
		w.n.inc(InDummy)
		return
	}
	if sa.P.AggFrag {
		w.unpack(j, p, now)
		return
	}
	off, n, ok := w.decapsulate(j, p)
	if !ok {
		return // counted
	}
	if !packet.DecodeNext(j.out[off:off+n], &w.inner) {
		w.n.inc(DropInMalformed)
		return
	}
	n = w.inner.Len // beyond it lies TFC padding
	if j.udp && !w.fromPeer(j) {
		w.n.inc(DropInSelector)
		sa.SelectorErrors.Add(1)
		return
	}
	l := layers{n: 1}
	l.sa[0] = sa
	if w.wrapped(&w.inner, &l) {
		w.unwrap(j.out, off, n, l, now)
		return
	}
	w.accept(j.out, off, n, &l, now)
}

// verified judges the outcome of opening a packet of sa, marks the window and
// counts the packet; false: dropped.
func (w *inWorker) verified(sa *sad.SA, err error, seq uint64, size int, now time.Time) bool {
	if !w.authentic(sa, err) {
		return false
	}
	if !sa.Window.Mark(seq) {
		w.n.inc(DropInReplay)
		sa.ReplayErrors.Add(1)
		return false
	}
	return w.account(sa, 1, size, now)
}

// authentic counts why a packet could not be opened.
func (w *inWorker) authentic(sa *sad.SA, err error) bool {
	switch err {
	case nil:
		return true
	case esp.ErrAuth, ah.ErrAuth:
		w.n.inc(DropInAuth)
		sa.AuthErrors.Add(1)
	default:
		w.n.inc(DropInMalformed)
	}
	return false
}

// account counts packets of size octets together; false: beyond a hard limit.
func (w *inWorker) account(sa *sad.SA, packets, size int, now time.Time) bool {
	soft, hard := sa.Account(packets, size, now)
	if soft || hard && sa.FirstHard() {
		w.e.c.LimitReached(sa, hard)
	}
	if hard {
		w.n.add(DropInLifetime, uint(packets))
	}
	return !hard
}
