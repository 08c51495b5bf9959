package datapath

import (
	"context"
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/gro"
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
