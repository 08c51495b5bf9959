package datapath

import (
	"errors"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// The fast way out. A super-frame of the kernel is judged once and takes one
// SA, sequence numbers and account for all its segments, each of which is cut
// straight to where it will be sealed:
//
//	super-frame  | IP | TCP | payload 0 | payload 1 | ...
//	                              |            '-------------.
//	                              v                          v
//	arena        | ESP, IV | IP | TCP | payload 0 | trailer | ESP, IV | IP | TCP | payload 1 | ...
//	             '-------- ESP packet 0 -------------------' '--------- ESP packet 1 ---------
//
// ESP in UDP leaves by the socket of port 4500. Its packets, those of single
// frames too, lie back to back, so that runs of one length leave as one
// message that the kernel or the device cuts (UDP_SEGMENT). Native ESP has its
// outer header in front of each and leaves by the interface. What is not one
// ESP transform within the path MTU, or has no SA yet, is cut into single
// packets, which go the ordinary way.

const (
	// arenaSize holds what super-frames of 64 KiB become, several at a time
	// but not more than a cache takes; when it is full the batch leaves early.
	arenaSize = 512 << 10
	// maxJobs bounds a batch of small segments likewise.
	maxJobs = 1024
)

// reserve makes room for n octets of arena, and a job. What was in the arena
// may be gone afterwards.
func (w *outWorker) reserve(n int) {
	if w.used+n > len(w.arena) || len(w.jobs) >= maxJobs {
		w.err = w.flush()
	}
}

// superFrame sorts a frame that the kernel leaves to us to cut, and that has link
// octets of link header.
func (w *outWorker) superFrame(f *tap.Frame, link int, now time.Time) {
	off, n := f.Off+link, f.Len-link
	b, i, s := f.Buf[off:off+n], &w.info, &w.super
	if !packet.Decode(b, i) || !s.Parse(b, i, gso(f.Offload, link)) {
		w.n.inc(DropOutMalformed)
		return
	}
	if w.e.exemptIKE(i, i.Src, i.SrcPort) {
		w.bypassSuper(f, now)
		return
	}
	p, _ := w.policy(i)
	switch {
	case p == nil && w.e.c.Default == ipsec.Discard:
		w.n.add(DropOutNoPolicy, uint(s.Segments()))
	case p != nil && p.P.Action == ipsec.Discard:
		p.Hit(now, s.Segments())
		w.n.add(DropOutDiscard, uint(s.Segments()))
	case p == nil:
		w.bypassSuper(f, now)
	case p.P.Action == ipsec.Bypass:
		if w.link.n > 0 { // else each segment hits
			p.Hit(now, s.Segments())
		}
		w.bypassSuper(f, now)
	case !w.protectSuper(p, b, now):
		w.segments(now)
	}
}

// bypassSuper sends the super-frame at hand without protection: whole, if it comes
// with a link header that can stay.
func (w *outWorker) bypassSuper(f *tap.Frame, now time.Time) {
	if w.link.n > 0 {
		w.passSuper(f)
		return
	}
	w.segments(now)
}

// gso translates the metadata of a frame that has link octets of link header.
func gso(o tap.Offload, link int) packet.GSO {
	g := packet.GSO{
		Size: int(o.GSOSize), NeedsCsum: o.NeedsCsum,
		CsumStart: int(o.CsumStart) - link, CsumOffset: int(o.CsumOffset),
	}
	switch o.GSOType &^ tap.GSOECN {
	case tap.GSOTCPv4:
		g.Version, g.Proto = 4, protoTCP
	case tap.GSOTCPv6:
		g.Version, g.Proto = 6, protoTCP
	case tap.GSOUDPL4:
		g.Proto = protoUDP
	}
	return g
}

// segments cuts the super-frame into packets that go the ordinary way.
func (w *outWorker) segments(now time.Time) {
	s := &w.super
	w.cutting, w.told = true, false
	defer func() { w.cutting = false }()
	for k := range s.Segments() {
		n := s.Len(k)
		slot := headroom + n + tailroom
		w.reserve(2 * slot) // the second is for the result, if that is a datagram
		off := w.used + headroom
		w.used += slot
		s.Put(w.arena[off:], k, 0)
		w.ip(w.arena, off, n, now, false)
	}
}

// protectSuper seals all segments of the super-frame b in one SA, and reports
// false with nothing done if they have to go one by one.
func (w *outWorker) protectSuper(p *spd.Entry, b []byte, now time.Time) bool {
	i, s := &w.info, &w.super
	sa := w.superSA(p)
	if sa == nil {
		return false
	}
	w.turn(sa)
	if sa.P.AggFrag {
		return !w.bound() && w.packSuper(p, sa, now)
	}
	if sa.P.TFC != 0 || sa.P.CPI != 0 {
		return false // each segment gets its padding, or is compressed
	}
	pl := planFor(sa, i, b, 0, s.Len(0))
	kept := pl.payload // octets of each segment in front of what is sealed
	pl.sizeESP(sa)
	dst := i.Dst
	if pl.tunnel {
		dst = sa.P.Dst
	}
	if pl.total > w.e.c.Wire.PathMTU(dst) {
		return false
	}
	n := s.Segments()
	w.count()
	seq, ok := sa.NextSeq(n)
	if !ok {
		return false // fewer may be left
	}
	p.Hit(now, n)
	soft, hard := sa.Account(n, s.Total(), now)
	if soft || hard && sa.FirstHard() {
		w.e.c.LimitReached(sa, hard)
	}
	if hard {
		w.n.add(DropOutLifetime, uint(n))
		return true
	}
	if w.bySocket(sa, &pl, i) {
		w.superGrams(sa, &pl, kept, seq)
		return true
	}
	for k := range n {
		pl.plen = s.Len(k) - kept
		pl.sizeESP(sa)
		front := w.linkRoom()
		w.reserve(front + pl.total)
		pl.payload = w.used + front + pl.fixed
		off := pl.payload - kept
		w.used += front + pl.total
		s.Put(w.arena[off:], k, 0)
		w.push(outJob{}, esp.Packet{})
		j := len(w.jobs) - 1
		w.putESP(&w.jobs[j], &w.seals[j], sa, &pl, i, w.arena, off, s.Len(k), 0)
		w.keepLink(&w.jobs[j], pl.tunnel)
		w.seals[j].Seq = seq + uint64(k)
	}
	return true
}

// superGrams queues the segments of the super-frame at hand to become datagrams by p,
// the plan of the first, with numbers from seq on.
func (w *outWorker) superGrams(sa *sad.SA, p *plan, kept int, seq uint64) {
	s, h, n := &w.super, sa.T.HeaderLen(), w.super.Segments()
	for k := range n {
		if k == n-1 { // may be shorter
			p.plen = s.Len(k) - kept
			p.sizeESP(sa)
		}
		room := h + p.total - p.fixed
		w.reserve(room)
		at := w.used
		w.used += room
		b := w.arena[at : at+room : at+room]
		s.Put(b[h:], k, kept)
		j := len(w.jobs)
		w.jobs, w.seals = w.jobs[:j+1], w.seals[:j+1] // zero; reserve has made room
		job, seal := &w.jobs[j], &w.seals[j]
		job.sa, job.gram, job.tos = sa, true, w.info.TOS
		job.pkt.Buf, job.pkt.Off, job.pkt.Len = w.arena, at, room
		seal.Dst, seal.Src, seal.Next, seal.Seq = b, b[h:h+p.plen], p.next, seq+uint64(k)
	}
}

// superSA is the SA for the super-frame at hand; nil if there is none or it is
// not the only one.
func (w *outWorker) superSA(p *spd.Entry) *sad.SA {
	if p.Choices != nil {
		var b bundle
		if k, _ := w.complete(p, &b); k >= 0 && b.n == 1 && b.sas[0].P.Proto == ipsec.ESP {
			return b.sas[0]
		}
		return nil
	}
	if len(p.P.Requests) != 1 || p.P.Requests[0].Proto != ipsec.ESP {
		return nil
	}
	return w.only(p)
}

// bySocket reports whether the result of a plan leaves by the socket of port
// 4500: its header must be what the kernel puts in front of a datagram, which
// in transport mode is not every packet's own.
func (w *outWorker) bySocket(sa *sad.SA, p *plan, i *packet.Info) bool {
	e := sa.P.Encap
	if w.bound() || e == nil || w.e.c.UDP == nil || e.SPort != portNATT {
		return false
	}
	if !p.tunnel && (i.TTL != packet.DefaultTTL || i.Version == 4 && (i.TransOff != packet.IPv4Len || !i.DF) || i.Version == 6 && i.TransOff != packet.IPv6Len) {
		return false
	}
	return w.e.c.Wire.IsLocal(sa.P.Src)
}

// putGram queues the payload src, which has room for the trailer behind it, to
// become a datagram of its own or part of a message. src may be where it is
// sealed to. seq 0 leaves the number to count.
func (w *outWorker) putGram(sa *sad.SA, p *plan, tos uint8, src []byte, seq uint64) {
	n := sa.T.HeaderLen() + p.total - p.fixed
	w.reserve(n)
	at := w.used
	w.used += n
	w.push(outJob{sa: sa, gram: true, tos: tos, pkt: wire.Packet{Buf: w.arena, Off: at, Len: n}},
		esp.Packet{Dst: w.arena[at : at+n], Src: src, Next: p.next, Seq: seq})
}

// datagrams are the messages of a batch. One that holds several datagrams is
// open as long as one more may be joined.
type datagrams struct {
	ds   []wire.Datagram
	sa   *sad.SA // of the last; nil: it is closed
	size int     // of its first datagram
}

func newDatagrams() datagrams { return datagrams{ds: make([]wire.Datagram, 0, maxJobs+batch)} }

// add appends an ESP packet: to the last message if that is for the same SA
// and traffic class, ends where the packet begins, and its datagrams are as long
// or longer; a shorter one closes it.
func (g *datagrams) add(j *outJob) {
	if k := len(g.ds) - 1; k >= 0 && g.sa == j.sa {
		if d := &g.ds[k]; d.TOS == j.tos && d.Off+d.Len == j.pkt.Off && j.pkt.Len <= g.size {
			d.Segment = g.size
			d.Len += j.pkt.Len
			if j.pkt.Len < g.size {
				g.sa = nil
			}
			return
		}
	}
	p := &j.sa.P
	g.sa, g.size = j.sa, j.pkt.Len
	g.ds = append(g.ds, wire.Datagram{
		Buf: j.pkt.Buf, Off: j.pkt.Off, Len: j.pkt.Len, TOS: j.tos, DontFragment: true,
		Local: netip.AddrPortFrom(p.Src, p.Encap.SPort), Remote: netip.AddrPortFrom(p.Dst, p.Encap.DPort),
	})
}

func (w *outWorker) writeUDP() error {
	g, to := &w.grams, w.udp
	if to == nil {
		to = w.e.c.UDP
	}
	for k := range g.ds {
		w.e.recordDatagrams(&w.tape, capture.Out, &g.ds[k])
	}
	for ds := g.ds; len(ds) > 0; {
		n, err := to.WriteBatch(ds)
		if err != nil {
			if fatal(err) {
				return err
			}
			lost := 1
			if e := (*wire.SendError)(nil); errors.As(err, &e) {
				lost = e.Lost
			}
			w.n.add(DropOutSend, uint(lost))
			n++
		}
		ds = ds[min(n, len(ds)):]
	}
	clear(g.ds)
	g.ds, g.sa = g.ds[:0], nil
	return nil
}
