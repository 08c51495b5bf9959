package datapath

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/ipcomp"
	"github.com/missiu/missiu/pkg/datapath/neigh"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// outWorker takes packets from the TAP to the interface. One goroutine owns it, or
// the one that serves it while that waits: see reading.
type outWorker struct {
	e       *Engine
	queue   ipsec.Queue // that it serves; 0: none
	tap     tap.Queue   // nil: the first
	reads   reading[tap.Frame]
	udp     wire.UDPConn // to write to; nil: the first
	turns   []*sad.SA    // whose turn it has, see turn
	n       counters
	frames  []tap.Frame
	jobs    []outJob     // of the batch, in order
	seals   []esp.Packet // parallel to jobs; unused where a job has no SA
	tx      []wire.Packet
	grams   datagrams
	arena   []byte      // segments of super-frames, and datagrams
	used    int         // of arena
	sealed  uint        // packets since the batch began
	counted int         // jobs that have their sequence numbers
	decided *spd.Entry  // of the last packets, see hit
	hits    int         // of decided, not yet counted
	at      time.Time   // of the last packet
	replies []tap.Frame // ARP, ND and ICMP answers to the TAP
	scratch *esp.Scratch
	info    packet.Info
	about   packet.Info // what the packet that an ICMP error quotes would be answered with
	super   packet.Super
	cutting bool // its segments go one by one
	told    bool // and one of them was answered as too big
	frags   *frag.Reassembler
	ipid    uint16
	bundler bundler
	err     error // of a device, from a batch that had to leave early
	flows   *flow.Cache
	gen     flow.Generation // at which the packet at hand is judged
	known   *sad.SA         // of its flow, from the cache; may be nil
	packs   packs
	tape    capture.Tape

	// Of a bump.
	link     linkHeader  // of the frame at hand
	frameLen int         // octets behind it
	low      []tap.Frame // what leaves with its link header
}

// outJob is one packet on its way through the batch.
type outJob struct {
	sa       *sad.SA // nil: leaves as it is
	sealed   bool    // without sa: a bundle has protected it
	gram     bool    // pkt is the ESP packet alone, for the socket of port 4500
	udpSum   bool    // IPv6 UDP encapsulation: checksum to be completed after sealing
	tos      uint8   // of a gram
	fragment int     // path MTU to cut the result to; 0: fits
	size     int     // of the packet that waits for count; 0: has its number
	dropped  bool    // and counted
	more     int     // packets in it beside the first
	link     int     // octets of link header in front of pkt, by which it leaves; 0: none
	pkt      wire.Packet
}

// newOutWorker makes a worker that reads frames at a time, 0 for one that does
// not read, and remembers flows.
func newOutWorker(e *Engine, frames, flows int) *outWorker {
	w := &outWorker{
		e:       e,
		frames:  make([]tap.Frame, frames),
		jobs:    make([]outJob, 0, maxJobs+batch),
		seals:   make([]esp.Packet, 0, maxJobs+batch),
		tx:      make([]wire.Packet, 0, maxJobs+batch),
		grams:   newDatagrams(),
		arena:   make([]byte, arenaSize),
		replies: make([]tap.Frame, 0, batch),
		scratch: esp.NewScratch(),
		frags:   frag.New(frag.DefaultLimits),
		flows:   flow.New(flows),
		tape:    capture.Tape{Hub: e.c.Monitor},
	}
	for i := range w.frames {
		w.frames[i] = tap.Frame{Buf: make([]byte, bufSize), Off: headroom}
	}
	return w
}

func (w *outWorker) run(ctx context.Context) error { return w.reads.loop(ctx, w.step) }

// step does one batch; 0: there was none.
func (w *outWorker) step() (int, error) {
	n, err := w.reads.batch(w.frames)
	if n == 0 || err != nil {
		return n, err
	}
	w.flows.Sweep(w.e.generation())
	now := time.Now()
	watched := w.tape.Start()
	for i := range n {
		if watched {
			w.watch(&w.frames[i], now)
		} else {
			w.frame(&w.frames[i], now)
		}
	}
	err = w.flush()
	for i := range n {
		w.frames[i].Off = headroom
	}
	return n, err
}

// frame sorts one Ethernet frame from the kernel.
func (w *outWorker) frame(f *tap.Frame, now time.Time) {
	if w.e.c.Low != nil {
		w.bumped(f, now)
		return
	}
	b := f.Buf[f.Off : f.Off+f.Len]
	switch neigh.Classify(b) {
	case neigh.Data:
		if w.e.homes != nil {
			w.e.homes.saw(flowHash(b[etherLen:]), int(w.queue)-1)
		}
		switch {
		case f.Offload.GSOType != tap.GSONone:
			w.superFrame(f, etherLen, now)
		case !tap.FinishChecksum(b, f.Offload):
			w.n.inc(DropOutMalformed)
		default:
			w.ip(f.Buf, f.Off+etherLen, f.Len-etherLen, now, false)
		}
	case neigh.Query:
		// The answer is built in a buffer of its own: the question's may be
		// too short for it.
		out := make([]byte, headroom+neigh.MaxAnswer)
		if n := neigh.Answer(b, out[headroom:], w.e.c.Wire.IsLocal); n > 0 {
			w.replies = append(w.replies, tap.Frame{Buf: out, Off: headroom, Len: n})
			w.n.inc(OutAnswered)
			return
		}
		w.n.inc(OutNoise)
	default:
		w.n.inc(OutNoise)
	}
}

// ip decides about the IP packet buf[off:off+n], which has headroom octets
// before and tailroom octets behind it. whole says that it was put together
// from fragments here.
func (w *outWorker) ip(buf []byte, off, n int, now time.Time, whole bool) {
	i := &w.info
	if !packet.Decode(buf[off:off+n], i) {
		w.n.inc(DropOutMalformed)
		return
	}
	n = i.Len // what lies behind is Ethernet padding
	if isND(i) && i.DstIsLinkScope() && !w.e.inPlace && w.link.n == 0 {
		w.n.inc(OutNoise)
		return
	}
	if w.e.exemptIKE(i, i.Src, i.SrcPort) || isND(i) {
		w.pass(buf, off, n, whole)
		return
	}
	if i.IsFragment() {
		// All fragments of a datagram are to meet one decision, so ports,
		// which only the first can show, are hidden from it.
		i.HasPorts = false
	}
	p, ambiguous := w.policy(i)
	if p == nil && !ambiguous && packet.IsICMP(i.Proto) && w.aboutProtected(buf, off, n, now, whole) {
		return
	}
	if i.IsFragment() && (ambiguous || p != nil && needsWhole(p)) {
		w.fragment(buf[off:off+n], now)
		return
	}
	switch {
	case p == nil && w.e.c.Default == ipsec.Discard:
		w.n.inc(DropOutNoPolicy)
	case p == nil:
		w.pass(buf, off, n, whole)
	default:
		w.hit(p, now)
		switch p.P.Action {
		case ipsec.Bypass:
			w.pass(buf, off, n, whole)
		case ipsec.Protect:
			w.protect(p, buf, off, n, now, whole)
		default:
			w.n.inc(DropOutDiscard)
		}
	}
}

// policy finds the policy of the packet at hand, and from the cache the SA too.
func (w *outWorker) policy(i *packet.Info) (p *spd.Entry, ambiguous bool) {
	w.gen = w.e.generation()
	if d, ok := w.flows.Get(i, 0, w.gen); ok {
		w.known = d.SA
		return d.Policy, false
	}
	w.known = nil
	if p, ambiguous = w.e.c.SPD.Lookup(ipsec.Out, i); !ambiguous {
		w.flows.Put(i, 0, w.gen, flow.Decision{Policy: p})
	}
	return p, ambiguous
}

// needsWhole: transport mode protects whole datagrams only (RFC 4303, 3.3.4).
func needsWhole(p *spd.Entry) bool {
	return p.P.Action == ipsec.Protect && p.P.Requests[0].Mode == ipsec.Transport
}

// fragment collects fragments that can only be judged or protected together.
func (w *outWorker) fragment(b []byte, now time.Time) {
	whole, err := w.frags.Add(now, b, &w.info)
	if err != nil {
		w.n.inc(DropOutFragment)
		return
	}
	if whole == nil {
		return
	}
	buf := make([]byte, headroom+len(whole)+tailroom)
	copy(buf[headroom:], whole)
	w.ip(buf, headroom, len(whole), now, true)
}

// pass sends a packet as it is; one that we reassembled is cut again.
func (w *outWorker) pass(buf []byte, off, n int, whole bool) {
	w.n.inc(OutBypassed)
	if !whole {
		n = max(n, w.frameLen) // with the padding of a frame
	}
	j := outJob{pkt: wire.Packet{Buf: buf, Off: off, Len: n}}
	w.keepLink(&j, false)
	if whole {
		if mtu := w.e.c.Wire.PathMTU(w.info.Dst); n > mtu {
			j.fragment = mtu
		}
	}
	w.push(j, esp.Packet{})
}

// protect prepares the packet for its SA, or holds it until there is one. More
// than one ESP transform is bundle's.
func (w *outWorker) protect(p *spd.Entry, buf []byte, off, n int, now time.Time, whole bool) {
	r := &p.P.Requests[0]
	if p.Choices != nil {
		w.choose(p, buf, off, n, now, whole)
		return
	}
	if sa := w.packed(p); sa != nil {
		w.alone(sa, buf, off, n, now, whole)
		return
	}
	if len(p.P.Requests) != 1 || r.Proto != ipsec.ESP {
		w.bundle(p, buf, off, n, now, whole)
		return
	}
	if sa := w.only(p); sa != nil {
		w.encapsulate(sa, buf, off, n, now, whole)
		return
	}
	key := outKey(r, w.info.Src, w.info.Dst)
	switch {
	case r.Level == ipsec.LevelUse || p.P.Flags&ipsec.PolicyClear != 0:
		if !r.AnyPeer() {
			w.e.c.NeedSA(p, key, w.info.Flow())
		}
		w.pass(buf, off, n, whole)
	case r.AnyPeer():
		w.n.inc(DropOutNoPeer)
	default:
		w.wait(p, []sad.OutKey{key}, buf[off:off+n], now, whole)
	}
}

// alone protects a packet by one SA, of ESP or AH.
func (w *outWorker) alone(sa *sad.SA, buf []byte, off, n int, now time.Time, whole bool) {
	if sa.P.Proto == ipsec.ESP {
		w.encapsulate(sa, buf, off, n, now, whole)
		return
	}
	b := bundle{n: 1}
	b.sas[0] = sa
	dst := w.info.Dst
	if sa.P.Mode == ipsec.Tunnel {
		dst = sa.P.Dst
	}
	w.transform(&b, dst, buf, off, n, now, whole)
}

// packed is the one SA that stands for the bundle of p (ipsec.Packed); nil: there
// is none.
func (w *outWorker) packed(p *spd.Entry) *sad.SA {
	if p.Packed == nil {
		return nil
	}
	if sa := w.find(p, outKey(p.Packed, w.info.Src, w.info.Dst)); sa != nil && sa.P.CPI != 0 {
		return sa
	}
	return nil
}

// only is the SA for the packet at hand of a policy that wants one transform;
// nil: there is none.
func (w *outWorker) only(p *spd.Entry) *sad.SA {
	if w.known != nil && w.known.State() == sad.Mature {
		return w.known
	}
	key := outKey(&p.P.Requests[0], w.info.Src, w.info.Dst)
	sa := w.find(p, key)
	if sa == nil || sa.State() != sad.Mature {
		return sa
	}
	w.flows.Put(&w.info, 0, w.gen, flow.Decision{Policy: p, SA: sa})
	if sa.P.PerQueue && len(w.e.more) > 0 && w.queue != 0 && !key.Open() {
		// It serves until the queue has its own.
		key.Queue = w.queue
		w.e.c.NeedSA(p, key, w.info.Flow())
	}
	return sa
}

// find is the SA that the policy wants for the packet at hand.
func (w *outWorker) find(p *spd.Entry, key sad.OutKey) *sad.SA {
	if len(w.e.more) > 0 {
		key.Queue = w.queue
	}
	sa := w.e.c.SAD.Out(key, &w.info)
	if sa == nil && key.ReqID != 0 && p.P.Flags&ipsec.PolicyManual != 0 {
		sa = w.e.c.SAD.OutManual(key, &w.info, p.P.Proposals)
	}
	return sa
}

// outKey is the SA that a request wants for a packet from src to dst.
func outKey(r *ipsec.Request, src, dst netip.Addr) sad.OutKey {
	key := sad.OutKey{Proto: r.Proto, Mode: r.Mode, Src: r.Src, Dst: r.Dst}
	if r.Level == ipsec.LevelUnique || r.Template() {
		key.ReqID = r.ReqID
	}
	if r.Mode == ipsec.Transport {
		key.Src, key.Dst = src, dst
	}
	return key
}

// wait holds the packet b and asks for the SAs that it lacks.
func (w *outWorker) wait(p *spd.Entry, keys []sad.OutKey, b []byte, now time.Time, whole bool) {
	ask, ok, full := w.e.hold.put(p.P.ID, keys, false, b, w.link.b[:w.link.n], whole, now)
	w.held(ok, full)
	if p.P.Flags&ipsec.PolicyPerFlow != 0 {
		ask = keys // one that was asked for may be another flow's
	}
	for _, key := range ask {
		w.e.c.NeedSA(p, key, w.info.Flow())
	}
	// An SA may have come between the look-up and the put; nobody would
	// release the packet then.
	packed := w.packed(p) != nil
	for _, key := range keys {
		if packed || w.find(p, key) != nil {
			w.e.Installed(key)
		}
	}
}

// held counts what became of a packet that was to wait.
func (w *outWorker) held(ok, full bool) {
	if full || !ok {
		w.n.inc(DropOutHold)
	}
	if ok {
		w.n.inc(OutHeld)
	}
}

// plan is where one transform puts the parts of a packet: headers move to the
// front, the payload stays.
type plan struct {
	hdr     int // length of the outer IP header, extension headers included
	payload int // in the buffer
	plen    int
	fixed   int   // of ESP: number of octets in front of the payload
	total   int   // of ESP: length of the result
	next    uint8 // what the payload is
	tunnel  bool
}

// planFor makes the plan of sa for the packet buf[off:off+n], decoded in i. An
// AGGFRAG header is written at once.
func planFor(sa *sad.SA, i *packet.Info, buf []byte, off, n int) plan {
	if sa.P.Mode != ipsec.Tunnel {
		return plan{hdr: i.TransOff, payload: off + i.TransOff, plen: n - i.TransOff, next: buf[off+i.TransProtoOff]}
	}
	p := plan{hdr: packet.IPv4Len, payload: off, plen: n, next: protoIPv4, tunnel: true}
	if sa.P.Dst.Is6() {
		p.hdr = packet.IPv6Len
	}
	if i.Version == 6 {
		p.next = protoIPv6
	}
	if sa.P.AggFrag {
		p.payload, p.plen, p.next = off-aggfrag.HeaderLen, n+aggfrag.HeaderLen, aggfrag.Protocol
		aggfrag.PutHeader(buf[p.payload:])
	}
	return p
}

// encapsulate writes the headers of the result and queues the payload for
// sealing in place.
func (w *outWorker) encapsulate(sa *sad.SA, buf []byte, off, n int, now time.Time, whole bool) {
	w.turn(sa)
	i, t := &w.info, sa.T
	p := planFor(sa, i, buf, off, n)
	dst := i.Dst
	if p.tunnel {
		dst = sa.P.Dst
	}
	p.sizeESP(sa)
	if (p.tunnel || w.e.c.Low != nil) && packet.IsSYN(buf[off:off+n], i) {
		one := bundle{n: 1}
		one.sas[0] = sa
		w.e.clampSYN(&one, buf[off:off+n], i, dst)
	}
	if sa.P.AggFrag && !w.bound() {
		if b := w.pack(sa, n, now); b != nil {
			copy(b, buf[off:off+n])
			return
		}
	}
	fragment, seal, at := 0, buf, off
	if sa.P.CPI != 0 {
		seal, at = w.shrink(sa, &p, buf, off, n)
	}
	if mtu := w.e.c.Wire.PathMTU(dst); p.total > mtu {
		// What is told holds for packets that do not compress.
		inner := t.Overhead().MaxPayload(mtu-p.fixed+t.HeaderLen()) + p.payload - at
		if !whole && w.refuse(buf[off:off+n], inner, n) {
			return
		}
		fragment = mtu
	} else if sa.P.TFC != 0 && p.tunnel {
		seal, at = w.padTFC(sa, &p, buf, off, n, mtu)
	}
	if p.total > 65535 {
		w.n.inc(DropOutSeal)
		return
	}
	w.at = now
	if fragment == 0 && w.bySocket(sa, &p, i) {
		w.putGram(sa, &p, i.TOS, seal[p.payload:p.payload+p.plen:p.payload+p.total-p.fixed], 0)
		w.jobs[len(w.jobs)-1].size = n
		return
	}
	w.push(outJob{size: n}, esp.Packet{})
	k := len(w.jobs) - 1
	w.putESP(&w.jobs[k], &w.seals[k], sa, &p, i, seal, at, n, fragment)
	w.keepLink(&w.jobs[k], p.tunnel)
}

// shrink compresses the payload of p, of the packet buf[off:off+n], if that makes
// it shorter: it is then in the arena behind an IPComp header, and that behind the
// packet's own headers in transport mode. It returns where the packet begins.
func (w *outWorker) shrink(sa *sad.SA, p *plan, buf []byte, off, n int) ([]byte, int) {
	packed := w.bundler.pack(buf[p.payload : off+n])
	if packed == unpacked {
		return buf, off
	}
	head := p.payload - off
	slot := headroom + head + ipcomp.HeaderLen + packed + tailroom
	w.reserve(2 * slot) // the second is for the result, if that is a datagram
	w.turn(sa)          // which a batch that left early gave back
	at := w.used + headroom
	w.used += slot
	copy(w.arena[at:], buf[off:p.payload])
	p.payload = at + head
	p.putPacked(sa.P.CPI, w.arena, w.bundler.packed[:packed])
	p.sizeESP(sa)
	w.n.inc(OutCompressed)
	return w.arena, at
}

// padTFC copies the packet buf[off:off+n], the payload of p in tunnel mode, to the
// arena with zeros behind it, as many as sa is to have and the path takes, and
// makes that the payload. The receiver knows the length from the inner header.
func (w *outWorker) padTFC(sa *sad.SA, p *plan, buf []byte, off, n, mtu int) ([]byte, int) {
	to := sa.T.Overhead().MaxPayload(mtu - p.fixed + sa.T.HeaderLen())
	if sa.P.TFC != ipsec.TFCPathMTU {
		to = min(to, int(sa.P.TFC))
	}
	if n >= to {
		return buf, off
	}
	slot := headroom + to + tailroom
	w.reserve(2 * slot) // the second is for the result, if that is a datagram
	w.turn(sa)          // which a batch that left early gave back
	at := w.used + headroom
	w.used += slot
	copy(w.arena[at:], buf[off:off+n])
	clear(w.arena[at+n : at+to])
	p.payload, p.plen = at, to
	p.sizeESP(sa)
	w.n.inc(OutPadded)
	return w.arena, at
}

// turn waits until no other worker has packets of sa between their sequence
// numbers and the interface, and keeps the others waiting until the end of the
// batch. Numbers are reserved run by run, so without it those of one worker could
// be on the way while another, which lost its processor, still has thousands of
// lower ones: more than the window of a receiver forgives. An SA that only this
// worker uses needs none of it. Who holds the turn of one SA waits for no other:
// what it has leaves first.
func (w *outWorker) turn(sa *sad.SA) {
	if len(w.e.more) == 0 || sa.P.Queue != 0 && sa.P.Queue == w.queue || slices.Contains(w.turns, sa) {
		return
	}
	if !sa.Turn.TryLock() {
		if len(w.turns) > 0 {
			used := w.used // the packet at hand may lie in the arena
			w.failed(w.flush())
			w.used = used
		}
		sa.Turn.Lock()
	}
	w.turns = append(w.turns, sa)
}

// hit counts packets by policy, those of a run at once.
func (w *outWorker) hit(p *spd.Entry, now time.Time) {
	if p != w.decided {
		w.countHits()
		w.decided = p
	}
	w.hits++
	w.at = now
}

func (w *outWorker) countHits() {
	if w.hits > 0 {
		w.decided.Hit(w.at, w.hits)
	}
	w.decided, w.hits = nil, 0
}

// count gives the single packets that were queued since the last call their
// sequence numbers, and accounts for them, run by run of one SA. Whatever takes
// numbers by itself calls it first, so that numbers ascend in the order of
// sending.
func (w *outWorker) count() {
	for a := w.counted; a < len(w.jobs); {
		sa, octets, b := w.jobs[a].sa, 0, a
		for b < len(w.jobs) && w.jobs[b].sa == sa && w.jobs[b].size != 0 {
			octets += w.jobs[b].size
			b++
		}
		switch {
		case a == b: // has its number, or needs none
			b++
		case !w.countRun(sa, a, b, octets):
			for k := a; k < b; k++ {
				w.countOne(sa, k)
			}
		}
		a = b
	}
	w.counted = len(w.jobs)
}

// countRun does so for jobs a to b of sa at once, unless a limit is near.
func (w *outWorker) countRun(sa *sad.SA, a, b, octets int) bool {
	if b-a == 1 || !sa.Far(b-a) {
		return false
	}
	seq, ok := sa.NextSeq(b - a)
	if !ok {
		return false // fewer may be left
	}
	soft, hard := sa.Account(b-a, octets, w.at)
	if soft || hard && sa.FirstHard() {
		w.e.c.LimitReached(sa, hard)
	}
	if hard { // set lower since Far
		w.n.add(DropOutLifetime, uint(b-a))
	}
	for k := a; k < b; k++ {
		w.seals[k].Seq = seq + uint64(k-a)
		if hard {
			w.drop(k)
		}
	}
	return true
}

// countOne does so for one job.
func (w *outWorker) countOne(sa *sad.SA, k int) {
	seq, ok := sa.NextSeq(1)
	if !ok {
		w.n.inc(DropOutSequence)
	} else if ok = w.account(sa, w.jobs[k].size, w.at); ok {
		w.seals[k].Seq = seq
	}
	if !ok {
		w.drop(k)
	}
}

// drop takes a job that was counted as dropped out of the batch.
func (w *outWorker) drop(k int) {
	w.jobs[k] = outJob{dropped: true}
	w.seals[k] = esp.Packet{}
}

// sizeESP sets fixed and total.
func (p *plan) sizeESP(sa *sad.SA) {
	p.fixed = p.hdr + sa.T.HeaderLen()
	if sa.P.Encap != nil {
		p.fixed += packet.UDPLen
	}
	p.total = p.fixed + p.plen + sa.T.TrailerLen(p.plen)
}

// putESP writes all headers but that of ESP, and says what is to be sealed, all
// but the sequence number, and sent.
func (w *outWorker) putESP(j *outJob, s *esp.Packet, sa *sad.SA, p *plan, i *packet.Info, buf []byte, off, n, fragment int) {
	total := p.total
	start := p.payload - p.fixed
	out := buf[start : start+total]
	w.putIP(out, sa, p, i, buf[off:max(off, p.payload)], protoESP, fragment)
	j.sa, j.fragment = sa, fragment
	if sa.P.Encap != nil {
		protoOff := i.TransProtoOff
		if p.tunnel {
			protoOff = packet.OuterProtoOff(out)
		}
		out[protoOff] = protoUDP
		h := out[p.hdr:]
		binary.BigEndian.PutUint16(h[0:], sa.P.Encap.SPort)
		binary.BigEndian.PutUint16(h[2:], sa.P.Encap.DPort)
		binary.BigEndian.PutUint16(h[4:], uint16(total-p.hdr))
		binary.BigEndian.PutUint16(h[6:], 0) // RFC 3948, 2.1: zero over IPv4
		j.udpSum = out[0]>>4 == 6            // RFC 8200, 8.1: not over IPv6
	}
	packet.FixIPv4Checksum(out)
	j.pkt = wire.Packet{Buf: buf, Off: start, Len: total}
	s.Dst, s.Src, s.Next = buf[p.payload-sa.T.HeaderLen():start+total], buf[p.payload:p.payload+p.plen:start+total], p.next
}

// putIP writes the IP header of the result out: a new one in tunnel mode, else
// the packet's own, head, for another protocol and length. The checksum is
// wrong until FixIPv4Checksum.
func (w *outWorker) putIP(out []byte, sa *sad.SA, p *plan, i *packet.Info, head []byte, proto uint8, fragment int) {
	if p.tunnel {
		w.ipid++
		packet.PutOuter(out, packet.Outer{Src: sa.P.Src, Dst: sa.P.Dst, Proto: proto, Len: len(out), ID: w.ipid, DontFragment: fragment == 0}, i)
	} else {
		copy(out, head)
		out[i.TransProtoOff] = proto
		packet.SetLen(out, len(out))
	}
	if fragment != 0 {
		packet.ClearDF(out)
	}
}

// refuse answers a packet that is too long for the path once it is protected,
// if its sender can do something about it; false: cut the result instead.
func (w *outWorker) refuse(b []byte, mtu, n int) bool {
	i := &w.info
	if i.Version == 4 && !i.DF || i.Version == 6 && mtu < packet.MinIPv6MTU {
		return false
	}
	if mtu >= n { // only alignment of the cipher is in the way
		mtu = n - 1
	}
	w.n.inc(OutTooBig)
	if w.cutting && w.told {
		return true // one answer tells the sender of a super-frame
	}
	w.told = true
	// The answer comes in the name of the destination: an address of ours
	// would be a martian on the TAP.
	out := make([]byte, headroom, headroom+packet.MaxTooBig)
	out = packet.AppendTooBig(out, b, i, mtu, i.Dst)
	if len(out) > headroom { // there are packets that no error may answer
		w.reply(out, i.Version)
	}
	return true
}

// reply sends the IP packet out[headroom:] to the kernel.
func (w *outWorker) reply(out []byte, version uint8) {
	off := headroom - etherLen
	if w.link.n > 0 {
		off = w.link.putReply(out, headroom, version)
	} else {
		putEther(out[off:], w.e.c.TAP.MAC(), version)
	}
	w.replies = append(w.replies, tap.Frame{Buf: out, Off: off, Len: len(out) - off})
}

func (w *outWorker) account(sa *sad.SA, n int, now time.Time) bool {
	soft, hard := sa.Account(1, n, now)
	if soft || hard && sa.FirstHard() {
		w.e.c.LimitReached(sa, hard)
	}
	if hard {
		w.n.inc(DropOutLifetime)
	}
	return !hard
}

func (w *outWorker) push(j outJob, s esp.Packet) {
	w.jobs = append(w.jobs, j)
	w.seals = append(w.seals, s)
}

// flush seals the batch in runs of one SA and writes it.
func (w *outWorker) flush() error {
	w.closePacks()
	w.count()
	w.countHits()
	for a := 0; a < len(w.jobs); {
		sa := w.jobs[a].sa
		b := a + 1
		for b < len(w.jobs) && w.jobs[b].sa == sa {
			b++
		}
		if sa != nil {
			sa.T.Seal(w.scratch, w.seals[a:b])
		}
		a = b
	}
	for k := range w.jobs {
		w.emit(&w.jobs[k], w.seals[k].Err)
	}
	w.n.add(OutProtected, w.sealed)
	w.sealed = 0
	w.failed(w.write())
	for k, sa := range w.turns {
		sa.Turn.Unlock()
		w.turns[k] = nil
	}
	w.turns = w.turns[:0]
	clear(w.jobs)
	clear(w.seals)
	w.jobs, w.seals, w.used, w.counted = w.jobs[:0], w.seals[:0], 0, 0
	err := w.err
	w.err = nil
	return err
}

// emit puts a finished job where it leaves from.
func (w *outWorker) emit(j *outJob, err error) {
	switch {
	case j.dropped:
		return
	case err != nil:
		w.n.add(DropOutSeal, 1+uint(j.more))
		return
	case j.sa != nil || j.sealed:
		w.sealed += 1 + uint(j.more)
	}
	if j.udpSum {
		packet.PutUDPChecksum(j.pkt.Buf[j.pkt.Off : j.pkt.Off+j.pkt.Len])
	}
	switch {
	case j.gram:
		w.grams.add(j)
	case j.fragment != 0:
		// Datagrams of the same flow stay in front.
		w.failed(w.writeUDP())
		w.split(j)
		w.failed(w.writeWire())
		w.failed(w.writeLow())
	case j.link > 0:
		w.low = append(w.low, j.frame())
	default:
		w.tx = append(w.tx, j.pkt)
	}
}

// failed keeps the error of a device for the end of flush.
func (w *outWorker) failed(err error) {
	if w.err == nil {
		w.err = err
	}
}

// split cuts a result into fragments in buffers of their own: the path for
// what the sender was not told to make smaller.
func (w *outWorker) split(j *outJob) {
	b := j.pkt.Buf[j.pkt.Off : j.pkt.Off+j.pkt.Len]
	var i packet.Info
	if !packet.Decode(b, &i) {
		w.n.inc(DropOutSeal)
		return
	}
	w.ipid++
	err := frag.Split(b, &i, j.fragment, uint32(w.ipid), func(f []byte) error {
		buf := make([]byte, headroom+len(f))
		copy(buf[headroom:], f)
		part := outJob{pkt: wire.Packet{Buf: buf, Off: headroom, Len: len(f)}, link: j.link}
		if j.link > 0 {
			copy(buf[headroom-j.link:], j.pkt.Buf[j.pkt.Off-j.link:j.pkt.Off])
			w.low = append(w.low, part.frame())
		} else {
			w.tx = append(w.tx, part.pkt)
		}
		w.n.inc(OutFragments)
		return nil
	})
	if err != nil {
		w.n.inc(DropOutSend)
	}
}

// write sends packets to the interface and answers to the TAP. Only a device
// that is gone is an error; a packet that it refuses is counted.
func (w *outWorker) write() error {
	w.failed(w.writeUDP())
	w.failed(w.writeWire())
	w.failed(w.writeLow())
	recordFrames(&w.tape, capture.High, capture.In, w.replies)
	err := w.e.writeTAP(w.tap, w.replies, &w.n)
	clear(w.replies)
	w.replies = w.replies[:0]
	return err
}

func (w *outWorker) writeWire() error {
	w.e.recordPackets(&w.tape, w.tx)
	for tx := w.tx; len(tx) > 0; {
		n, err := w.e.c.Wire.WriteBatch(tx)
		if err != nil {
			if fatal(err) {
				return err
			}
			w.n.inc(DropOutSend)
			n++
		}
		tx = tx[min(n, len(tx)):]
	}
	clear(w.tx)
	w.tx = w.tx[:0]
	return nil
}
