package datapath

import (
	"context"
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/ah"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/gro"
	"github.com/missiu/missiu/pkg/datapath/ipcomp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// inWorker takes packets from the interface, or datagrams from UDP 4500, to
// the TAP. One goroutine owns it, or the one that serves it while that waits: see
// reading.
type inWorker struct {
	e       *Engine
	number  int // of several of its kind
	packets reading[wire.Packet]
	grams   reading[wire.Datagram] // instead, if it has a batch
	part    []tap.Frame            // of a batch, for one of several queues
	of      []uint8                // the queue of each frame
	n       counters
	pkts    []wire.Packet
	dgrams  []wire.Datagram
	buffers int // how many of either have one
	cur     inJob
	near    *sad.SA // of the last packet of the batch; nil: there was none
	jobs    []inJob
	opens   []esp.Packet // of a run of jobs, those that the window lets pass
	which   []int        // the job of each
	lows    []uint32     // arguments and results of the window
	seqs    []uint64
	news    []bool
	last    verdict
	hits    int                          // packets of last.policy that it does not know of
	gro     *gro.Coalescer               // what is to be written
	take    func(buf []byte, off, n int) // instead of gro, if not nil
	arena   gro.Arena                    // of the batch
	big     gro.Arena                    // of the batch too, for what is expanded
	err     error                        // of writing in its middle
	scratch *esp.Scratch
	info    packet.Info // outer packet
	inner   packet.Info
	about   packet.Info       // what the packet that an ICMP error quotes would be answered with
	frags   *frag.Reassembler // outer and clear fragments
	peeler  peeler
	flows   *flow.Cache
	tape    capture.Tape
	blocks  aggfrag.Unpacker
	link    []byte // header of the frame at hand, of a bump; nil: there is none
	whose   *tap.Frame
	frames  []tap.Frame
	raw     []tap.Frame // what goes to the TAP with its link header
	fragID  uint32
	whole   []byte // aggfrag.BufLen octets, from the first fragment on
}

// inJob is one ESP packet on its way through the batch.
type inJob struct {
	sa     *sad.SA
	buf    []byte
	espOff int
	out    []byte // where the payload goes: to out[at:], buf itself if that has room
	at     int
	udp    bool // came in a datagram
	size   int  // of the outer packet, for the SA's byte count
	tos    uint8
	src    netip.AddrPort // of the outer packet; not in a datagram, port 0
	dst    netip.Addr
	link   []byte // see inWorker
	// usual: it came in a datagram, in tunnel mode, from the address and port of the SA,
	// with an ECN field that changes nothing inside, and goes to gro.
	usual bool

	// Of the outer header, if not in a datagram: where it is in buf, its
	// length, and where in it the octet that names ESP is.
	outOff, hdr, protoOff int
}

// nativeJob is the job of an ESP packet in the IP packet buf[off:off+n], decoded in i.
func nativeJob(buf []byte, off, n int, i *packet.Info) inJob {
	return inJob{
		buf: buf, espOff: off + i.HdrLen, size: n, tos: i.TOS, src: netip.AddrPortFrom(i.Src, 0), dst: i.Dst,
		outOff: off, hdr: i.HdrLen, protoOff: i.ProtoOff,
	}
}

// verdict is what was decided of the last packet, and holds for the next if that
// is of the same flow and came by the same SA.
type verdict struct {
	sa     *sad.SA // nil: nothing
	policy *spd.Entry
	gen    flow.Generation
	flow   ipsec.Flow
	added  uint64 // gro.Added after the last packet; 0: that went elsewhere
}

// holds: i, which shows its ports, is of the verdict's flow.
func (v *verdict) holds(i *packet.Info) bool {
	f := &v.flow
	return f.SrcPort == i.SrcPort && f.DstPort == i.DstPort && f.Proto == i.Proto && f.Src == i.Src && f.Dst == i.Dst
}

func newInWorker(e *Engine, flows int) *inWorker {
	w := &inWorker{
		e:       e,
		pkts:    make([]wire.Packet, batch),
		dgrams:  make([]wire.Datagram, trains, batch),
		jobs:    make([]inJob, 0, batch),
		opens:   make([]esp.Packet, 0, batch),
		which:   make([]int, 0, batch),
		lows:    make([]uint32, batch),
		seqs:    make([]uint64, batch),
		news:    make([]bool, batch),
		gro:     gro.New(),
		scratch: esp.NewScratch(),
		frags:   frag.New(frag.DefaultLimits),
		flows:   flow.New(flows),
		tape:    capture.Tape{Hub: e.c.Monitor},
	}
	w.gro.Kinds = e.super0
	return w
}

func (w *inWorker) run(ctx context.Context) error {
	if w.e.c.Low != nil {
		return w.runLow(ctx)
	}
	return w.packets.loop(ctx, w.step)
}

// step does one batch of packets; 0: there was none.
func (w *inWorker) step() (int, error) {
	for ; w.buffers < len(w.pkts); w.buffers++ {
		w.pkts[w.buffers] = wire.Packet{Buf: make([]byte, bufSize), Off: headroom + etherLen}
	}
	n, err := w.packets.batch(w.pkts)
	if n == 0 || err != nil {
		return n, err
	}
	w.flows.Sweep(w.e.generation())
	now := time.Now()
	watched := w.tape.Start()
	for i := range n {
		p := &w.pkts[i]
		if watched {
			w.watch(p, now)
		} else {
			w.ip(p.Buf, p.Off, p.Len, p.Offload, now)
		}
	}
	err = w.flush(now)
	for i := range n {
		w.pkts[i].Off = headroom + etherLen
	}
	return n, err
}

// trains is how many datagrams are received at once while each is a long train
// (UDP_GRO): more of 64 KiB would not stay in the cache. Of shorter ones a batch is
// received, so that what they carry is joined for the TAP, unless that is more
// packets than share: nothing is written before all are opened.
//
// Measured beside floods of twice what fits (the overload of test/bench, two
// processors with both gateways and both ends, medians of three rounds in turn) with
// this and what package wire sheds, and without: of super-frames 122,000 packets a
// second passed instead of 74,000, the 99th percentile of a ping was 28 ms instead of
// 52, that of a modest flow 24 instead of 51; beside 1400 octets 41 instead of 25 and
// 29 instead of 75, beside 64 octets 38 instead of 67 and 48 instead of 20. Single
// rounds were two to four times that, either way: now and then a thread of real-time
// priority that did nothing but sleep for 1 ms, one on each processor, was 20 to 160
// ms late, too. At most 1 % lost, 1.1 times as many packets of 1400 octets passed; 64
// octets and TCP did not differ.
const (
	trains = 8
	share  = 512
)

// runUDP serves UDP 4500 (RFC 3948): ESP, IKE behind the non-ESP marker, and keepalives.
func (w *inWorker) runUDP(ctx context.Context) error { return w.grams.loop(ctx, w.stepUDP) }

// stepUDP does one batch of datagrams; 0: there was none.
func (w *inWorker) stepUDP() (int, error) {
	for ; w.buffers < len(w.dgrams); w.buffers++ {
		w.dgrams[w.buffers] = wire.Datagram{Buf: make([]byte, bufSize), Off: headroom + packet.IPv6Len}
	}
	n, err := w.grams.batch(w.dgrams)
	if n == 0 || err != nil {
		return n, err
	}
	w.flows.Sweep(w.e.generation())
	now := time.Now()
	w.tape.Start()
	packets := 0
	for i := range n {
		packets += w.train(&w.dgrams[i], now)
	}
	err = w.flush(now)
	for i := range n {
		w.dgrams[i].Off = headroom + packet.IPv6Len
	}
	switch {
	case packets > share || n < trains:
		w.dgrams = w.dgrams[:trains]
	case n == len(w.dgrams) && packets <= share*trains/batch:
		w.dgrams = w.dgrams[:cap(w.dgrams)]
	}
	return n, err
}

// train serves what came as one, a datagram or several in a row, and returns how
// many. They are sorted one by one, since the kernel joins by lengths alone: at the
// end of a train of ESP may stand a keepalive or a message of IKE. Each gets a
// buffer that ends where the next begins.
func (w *inWorker) train(d *wire.Datagram, now time.Time) (n int) {
	if d.Segment <= 0 || d.Segment >= d.Len {
		w.one(d, now)
		return 1
	}
	one := *d
	one.Segment = 0
	lo := 0
	for off, end := d.Off, d.Off+d.Len; off < end; off += d.Segment {
		one.Len = min(d.Segment, end-off)
		one.Off = off - lo
		one.Buf = d.Buf[lo : off+one.Len : off+one.Len]
		if w.tape.On() || !w.next(&one) {
			w.one(&one, now)
		}
		lo = off + one.Len
		n++
	}
	return n
}

// one serves a datagram of its own.
func (w *inWorker) one(d *wire.Datagram, now time.Time) {
	if w.tape.On() {
		w.watchDatagram(d, now)
		return
	}
	w.datagram(d, now)
}

func (w *inWorker) datagram(d *wire.Datagram, now time.Time) {
	b := d.Buf[d.Off : d.Off+d.Len]
	switch {
	case len(b) == 1 && b[0] == 0xff:
		w.n.inc(InKeepalive)
	case len(b) >= 4 && binary.BigEndian.Uint32(b) == 0:
		if w.e.c.IKE == nil || !w.e.c.IKE(d.Local, d.Remote, b[4:]) {
			w.n.inc(DropInIKE)
			return
		}
		w.n.inc(InIKE)
	default:
		w.cur = inJob{udp: true, buf: d.Buf, espOff: d.Off, src: d.Remote, dst: d.Local.Addr(), size: d.Len + packet.UDPLen, tos: d.TOS}
		w.esp(&w.cur, b, now)
	}
}

// ip sorts an IP packet that the kernel was kept from.
func (w *inWorker) ip(buf []byte, off, n int, o tap.Offload, now time.Time) {
	i := &w.info
	if !packet.Decode(buf[off:off+n], i) {
		w.n.inc(DropInMalformed)
		return
	}
	n = i.Len
	joined := i.IsFragment()
	if joined && w.whose != nil && w.passFragment(i, now) {
		return
	}
	if joined {
		whole := w.join(buf[off:off+n], now)
		if whole == nil {
			return
		}
		buf = make([]byte, headroom+etherLen+len(whole)+tailroom)
		off, n, o = headroom+etherLen, len(whole), tap.Offload{}
		copy(buf[off:], whole)
		if !packet.Decode(buf[off:off+n], i) {
			w.n.inc(DropInMalformed)
			return
		}
	}
	if i.DstPort == portNATT && w.e.exemptIKE(i, i.Dst, i.DstPort) && (joined && w.e.c.UDP != nil || w.e.inPlace && espInUDP(buf[off:off+n], i) || w.whose != nil && w.ours(buf[off:off+n], i)) {
		w.inUDP(buf, off, n, o, now)
		return
	}
	switch {
	case i.Proto == protoESP && w.e.c.Wire.IsLocal(i.Dst):
		w.cur = nativeJob(buf, off, n, i)
		w.esp(&w.cur, buf[off+i.HdrLen:off+n], now)
	case (i.Proto == protoAH || i.Proto == protoIPComp) && w.e.c.Wire.IsLocal(i.Dst):
		w.relieve()
		w.inner = *i
		w.unwrap(buf, off, n, layers{}, now)
	default:
		w.clear(buf, off, n, o, now)
	}
}

// join takes the fragment b, decoded in w.info, and returns the datagram that it
// completes, valid until the next call; nil: none.
func (w *inWorker) join(b []byte, now time.Time) []byte {
	w.n.inc(InFragments)
	whole, err := w.frags.Add(now, b, &w.info)
	if err != nil {
		w.n.inc(DropInFragment)
	}
	return whole
}

// espInUDP: the datagram b for port 4500 is ESP (RFC 3948, 2.1), neither IKE
// nor a keepalive.
func espInUDP(b []byte, i *packet.Info) bool {
	p := b[min(i.HdrLen+packet.UDPLen, len(b)):]
	return len(p) >= 8 && binary.BigEndian.Uint32(p) != 0
}

// inUDP serves a datagram for UDP 4500 that does not come by our socket: one in
// fragments, which the TAP would not lead to it, since it is bound to the
// interface, or one in the place of the packet at hand, or several, which come as
// a super-frame.
func (w *inWorker) inUDP(buf []byte, off, n int, o tap.Offload, now time.Time) {
	i := &w.info
	p := off + i.HdrLen + packet.UDPLen
	if p > off+n {
		w.n.inc(DropInMalformed)
		return
	}
	d := wire.Datagram{
		Buf: buf, Off: p, Len: off + n - p, TOS: i.TOS,
		Local: netip.AddrPortFrom(i.Dst, i.DstPort), Remote: netip.AddrPortFrom(i.Src, i.SrcPort),
	}
	if o.GSOType == tap.GSONone {
		w.datagram(&d, now)
		return
	}
	d.Segment = int(o.GSOSize)
	w.train(&d, now)
}

// clear judges a packet that came without protection.
func (w *inWorker) clear(buf []byte, off, n int, o tap.Offload, now time.Time) {
	i, many := &w.info, w.count()
	if !w.e.exemptIKE(i, i.Dst, i.DstPort) && !isND(i) {
		p, ambiguous := w.lookup(i)
		switch {
		case ambiguous:
			// The datagram was put together, so only an unreadable upper
			// header leaves the ports open: in doubt, dropped.
			w.n.add(DropInClear, many)
			return
		case p == nil && w.e.c.Default == ipsec.Discard:
			w.n.add(DropInNoPolicy, many)
			return
		case p == nil:
		default:
			p.Hit(now, int(many))
			switch {
			case p.P.Action == ipsec.Discard:
				w.n.add(DropInDiscard, many)
				return
			case p.P.Action == ipsec.Protect && p.P.Flags&ipsec.PolicyClear == 0 && !optionalAll(p):
				w.n.add(DropInClear, many)
				return
			}
		}
	}
	w.n.add(InBypassed, many)
	if w.whose != nil {
		w.forward(buf, off, i)
		return
	}
	w.deliver(buf, off, i, o)
}

// optionalAll: a packet may come without any of the policy's transforms.
func optionalAll(p *spd.Entry) bool {
	for k := range p.P.Requests {
		if !optional(&p.P.Requests[k]) {
			return false
		}
	}
	return true
}

// optional: the transform is level "use", or it is compression, which a packet
// comes without if it had not helped (RFC 3173, 2.2). In tunnel mode such a
// packet is IP in IP, and not without.
func optional(r *ipsec.Request) bool {
	return r.Level == ipsec.LevelUse || r.Proto == ipsec.IPComp && r.Mode != ipsec.Tunnel
}

// lookup finds the inbound policy of a packet; what is not for this host is
// judged by the forward policies where there are any.
func (w *inWorker) lookup(i *packet.Info) (p *spd.Entry, ambiguous bool) {
	dir := ipsec.Fwd
	if w.e.c.Wire.IsLocal(i.Dst) {
		dir = ipsec.In
	}
	g := w.e.generation()
	if d, ok := w.flows.Get(i, uint8(dir), g); ok {
		return d.Policy, false
	}
	if dir == ipsec.Fwd {
		p, ambiguous = w.e.c.SPD.Lookup(ipsec.Fwd, i)
	}
	if p == nil && !ambiguous {
		p, ambiguous = w.e.c.SPD.Lookup(ipsec.In, i)
	}
	if !ambiguous {
		w.flows.Put(i, uint8(dir), g, flow.Decision{Policy: p})
	}
	return p, ambiguous
}

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

// accept delivers the packet buf[off:off+n], decoded in w.inner, if it is one
// that the SAs which it came by may carry, and that policy expects from them
// (RFC 4301, 5.2, step 4). An ICMP error may come in the place of the answer to
// the packet that it is about (6.2), whoever sends it: some router behind the
// peer whose address no selector has.
func (w *inWorker) accept(buf []byte, off, n int, l *layers, now time.Time) {
	i := &w.inner
	gen := w.e.generation()
	whole := i.HasPorts && !i.IsFragment()
	if v := &w.last; !whole || l.n != 1 || v.sa != l.sa[0] || v.gen != gen || !v.holds(i) {
		e, bad, why := w.judge(i, l)
		if e == nil && packet.Returning(buf[off:off+n], i, &w.about) {
			e, _, _ = w.judge(&w.about, l)
			whole = false
		}
		if e == nil {
			w.n.inc(why)
			for _, sa := range l.sa[:l.n] {
				if bad == nil || bad == sa {
					sa.SelectorErrors.Add(1)
				}
			}
			return
		}
		w.settle(now)
		*v = verdict{policy: e}
		if whole && l.n == 1 {
			v.sa, v.gen, v.flow = l.sa[0], gen, i.Flow()
		}
	}
	w.hits++
	w.clampSYN(l, buf[off:off+n])
	added := w.gro.Added()
	w.deliver(buf, off, i, tap.Offload{})
	if w.last.added = w.gro.Added(); w.last.added == added {
		w.last.added = 0
	}
}

// follows is opened for most packets of a TCP stream: it accepts one that came by the
// SA of the last and continues the super-frame that that went to. What was found right
// of that is right of this one too, which has the same flow. false: nothing was done.
// gen is the present generation.
func (w *inWorker) follows(j *inJob, p *esp.Packet, gen flow.Generation) bool {
	v := &w.last
	if !j.usual || p.Next != protoIPv4 && p.Next != protoIPv6 || v.sa != j.sa || v.gen != gen || v.added == 0 || v.added != w.gro.Added() {
		return false
	}
	if !w.gro.Follow(j.out[j.at : j.at+p.N]) {
		return false
	}
	w.hits++
	return true
}

// judge finds the policy by which a packet like i may come by the SAs of l; nil:
// it may not, and why. bad is the SA whose selectors it is outside of.
func (w *inWorker) judge(i *packet.Info, l *layers) (e *spd.Entry, bad *sad.SA, why Counter) {
	for _, sa := range l.sa[:l.n] {
		if !sa.MatchInbound(i) {
			return nil, sa, DropInSelector
		}
	}
	e, ambiguous := w.lookup(i)
	if e == nil || ambiguous || e.P.Action != ipsec.Protect || !l.serve(e) {
		return nil, nil, DropInPolicy
	}
	return e, nil, 0
}

// settle forgets the last verdict and counts the packets that it was of.
func (w *inWorker) settle(now time.Time) {
	if w.hits > 0 {
		w.last.policy.Hit(now, w.hits)
		w.n.add(InProtected, uint(w.hits))
	}
	w.last, w.hits = verdict{}, 0
}

// fromPeer: in transport mode the outer addresses, which no ICV covers, become
// the packet's own. They must be the SA's, or whoever can send a recorded
// packet on with another source would choose the sender that we believe in.
// In UDP that is known only after an authentic packet has told of a new mapping.
func (w *inWorker) fromPeer(j *inJob) bool {
	if j.sa.P.Mode != ipsec.Transport {
		return true
	}
	return j.src.Addr() == j.sa.P.Src || j.sa.AnySource()
}

// serves: the SA is one that the request of policy e asks for.
func serves(sa *sad.SA, e *spd.Entry, r *ipsec.Request) bool {
	if r.Proto != sa.P.Proto || r.Mode != sa.P.Mode {
		return false
	}
	if r.Level == ipsec.LevelUnique && r.ReqID != sa.P.ReqID && !lent(sa, e, r) {
		return false
	}
	if r.Mode != ipsec.Tunnel {
		return true
	}
	ends := sa.P.Ends()
	return r.Ends(ends.Src, ends.Dst)
}

// lent: sa, which is not of the policy e, does for the request r of e. One with
// manual keys may be of none. One that was made for another policy with an
// overlapping selector carries what lies in its own traffic selectors, by which
// RFC 4301 judges (5.2, step 4): the peer, whose policies may stand in another
// order or be cut otherwise, cannot know which of ours comes first. It must
// protect no less than e asks for, and e neither leave open who its peer is nor
// want an SA for each flow.
func lent(sa *sad.SA, e *spd.Entry, r *ipsec.Request) bool {
	if sa.P.ReqID == 0 {
		return e.P.Flags&ipsec.PolicyManual != 0 && sa.Fits(e.P.Proposals)
	}
	return len(sa.P.SrcTS) > 0 && len(sa.P.DstTS) > 0 && !r.Template() && e.P.Flags&ipsec.PolicyPerFlow == 0 &&
		sa.Satisfies(e.P.Proposals)
}

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
