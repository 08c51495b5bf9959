// Package datapath is the engine of missiu: packets in, verdict, transform,
// packets out (RFC 4301, section 5). It joins the TAP and the physical
// interface, the SPD and the SAD, and owns the goroutines between them. It
// speaks neither PF_KEY nor IKE; pkg/keyengine edits the databases, and
// cmd/missiu wires both together.
//
//	applications -> kernel routes -> TAP -> outbound worker -> interface -> peer
//	kernel's stack <- TAP <- inbound worker(s) <- interface, UDP 4500 <- peer
//
// Each worker runs its packets to completion in its own buffers: it reads a
// batch, decides, seals or opens in place in runs of one SA, and writes a
// batch. The databases are read through snapshots, behind a worker's memory of
// what they say of a flow (package flow); nothing is locked for all
// and nothing is allocated per packet. What cannot be finished at once leaves
// the fast path: packets without SA wait in the hold queue, fragments in a
// reassembler, both bounded.
//
// The way in: datagrams come in trains (UDP_GRO), whose segments are sorted one
// by one. The ESP packets of up to 64 jobs are opened in runs of one SA, in place
// where there is room for what is put in front of them, and each is judged by
// itself; that the last of its flow and SA passed a moment ago spares it the
// same questions. Package gro joins what passed into super-frames for the TAP. A
// packet that continues the super-frame of the last is compared with that alone
// (inWorker.follows): with datagrams of a train sorted by the SA of the one before and
// super-frames cut without a copy of their jobs, TCP took 2450 ns of the daemons' CPU
// for each packet instead of 2730, and went at 5.1 Gbit/s instead of 4.75 (test/bench,
// one stream, ESP in UDP, medians of 13 rounds in turn).
//
// What the kernel segments late (TSO, USO) comes over the TAP as super-frames,
// which super.go cuts while they are protected. The way out, by what the
// packet becomes:
//
//	ESP in UDP, one SA    by the socket of port 4500, as messages of datagrams
//	                      (UDP_SEGMENT); header fields as below, but that the
//	                      kernel chooses the identification and sums the UDP
//	native ESP, one SA    by the interface, each with its header
//	AGGFRAG, one SA       either of these, several packets in each ESP packet
//	                      (pack.go)
//	with a CPI, one SA    either of the first two; what compresses is an IPComp
//	                      header and DEFLATE inside ESP
//	everything else       cut into packets; by the interface
//
// With several queues of the TAP each has an outbound worker, and there are as
// many inbound workers for ESP in UDP and for native ESP, with a socket each,
// between which the kernel shares packets out by SPI; all else comes to the first. A flow stays on one queue (spread.go), and an inbound SA with one
// worker, so flows stay in order. An SA for one queue (RFC 9611) has that worker
// alone; of one for any queue the workers take turns, batch by batch (turn),
// because a receiver's window forgives no packets that overtake thousands.
//
// There is one queue unless more are asked for, since that measured best where
// processors are scarce: both gateways and both ends on two, which had other work
// too, AES-128-GCM, ESP in UDP, IPv4, medians of five rounds of test/bench with one
// queue and with two and an SA for each:
//
//	TCP, one stream                5.9   5.2   Gbit/s
//	TCP, four streams              5.9   5.1   Gbit/s
//	UDP, 1400 B, at most 1 % lost  169    99   1000 packets a second
//
// What workers gain that have a processor each tells BenchmarkQueues: two seal 90
// packets of a TCP super-frame each in 22 us on one processor, and on two in 12.8
// us with SAs of their own, but in 29 us if they take turns at one SA.
//
// "Everything else" is bundles, what is to be fragmented, and transport mode
// whose header a socket would not make: options, another TTL, no DF.
//
// Programs that own their packets use a Plane: the same workers, driven packet
// by packet.
package datapath

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Ports of IKE, exempt from every policy (RFC 4301, 4.4.1: IKE must pass).
const (
	portIKE  = 500
	portNATT = 4500
)

// fewFlows is what workers remember that packets seldom go through.
const fewFlows = 256

// batch is how many packets a worker handles between two writes.
const batch = 64

// headroom lies before each frame: what the largest bundle puts in front of a
// packet, which is three outer IPv6 headers with IPComp (4), ESP in UDP (32)
// and AH (48). tailroom takes padding and ICV, twice.
const (
	headroom = 256
	tailroom = 128
	bufSize  = headroom + etherLen + 65535 + tailroom
	etherLen = 14
)

// Wire is what the engine asks of the physical interface.
type Wire interface {
	wire.Conn
	// PathMTU is the largest IP packet that reaches dst as far as is known.
	PathMTU(dst netip.Addr) int
	// IsLocal tells whether a is an address of this host.
	IsLocal(a netip.Addr) bool
}

// Config is what an Engine works with. All but UDP and IKE are required.
type Config struct {
	TAP  tap.Device
	Wire Wire
	UDP  wire.UDPConn // nil: no ESP in UDP
	// MoreWire are readers beside Wire's, each with an inbound worker and the
	// native ESP of SPIs of its own.
	MoreWire []wire.PacketReader
	// MoreUDP are further sockets of UDP's port, which share its datagrams out
	// by SPI. Each has an inbound worker.
	MoreUDP []wire.UDPConn
	SAD     *sad.DB
	SPD     *spd.DB
	// Default is what happens to packets that no policy matches: Bypass or Discard.
	Default ipsec.Action
	// NeedSA asks the key engine for an SA. It must not block.
	NeedSA func(policy *spd.Entry, key sad.OutKey, flow ipsec.Flow)
	// LimitReached tells the key engine of a soft or hard packet or byte limit. It must not block.
	LimitReached func(sa *sad.SA, hard bool)
	// NewMapping tells the key engine that authenticated ESP in UDP came from
	// another address or port than the SA has. It must not block; nil: nobody cares.
	NewMapping func(sa *sad.SA, peer netip.AddrPort)
	// IKE hands over a message that came to port 4500 with the non-ESP marker
	// (already cut off); it reports whether somebody took it.
	IKE func(local, remote netip.AddrPort, msg []byte) bool
	// KeepMSS leaves the maximum segment size of TCP connections through
	// tunnels alone.
	KeepMSS bool
	// Low, if not nil, makes the engine a bump in the stack: all frames of the
	// kernel come and go by TAP, all those of the interface by Low; see
	// linkHeader. Wire only sends then.
	Low Frames
	// Bridged tells whether the interface has no addresses of its own, so that no
	// route leads over it. For a bump; nil: it has.
	Bridged func() bool
	// Heard is told of IP packets from the interface, for path MTU discovery. For a bump; may be nil.
	Heard func(packet []byte)
	// Flows is how many flows each worker remembers, a power of two; 0: flow.DefaultSize.
	Flows int
	// Monitor gets what workers read and write while it has readers; may be nil.
	Monitor *capture.Hub
	Log     *zap.Logger
}

// Engine moves packets. Create it with New.
type Engine struct {
	c       Config
	out     *outWorker   // of the TAP's first queue
	more    []*outWorker // of the others
	release *outWorker   // its own worker, so that held packets need no lock of out's
	in      []*inWorker  // interface, UDP, MoreUDP, MoreWire
	late    *inWorker    // of the same goroutine: packets that came before their keys
	queues  []tap.Queue  // of the TAP; nil: it has one
	homes   *homes       // if it has several
	hold    holdQueue
	early   earlyQueue
	failed  atomic.Uint64 // DropOutHold of no worker
	kick    chan struct{} // wakes the release worker
	super0  tap.Super     // what the TAP took at first
	relMu   sync.Mutex
	relKeys []sad.OutKey
	inPlace bool // see Plane

	superOnce sync.Once // the log's line about less
}

// New checks c and allocates all buffers.
func New(c Config) (*Engine, error) {
	if c.Default != ipsec.Bypass && c.Default != ipsec.Discard {
		return nil, fmt.Errorf("default action %v: want bypass or discard", c.Default)
	}
	e := &Engine{c: c, kick: make(chan struct{}, 1), super0: c.TAP.Super()}
	if c.Flows == 0 {
		c.Flows = flow.DefaultSize
	}
	qs := c.TAP.Queues()
	if len(qs) > 1 {
		e.queues, e.homes = qs, new(homes)
	}
	for k, q := range qs {
		w := newOutWorker(e, batch, c.Flows)
		w.queue = ipsec.Queue(k + 1)
		if k == 0 {
			w.reads.of(c.TAP)
			e.out = w
			continue
		}
		w.tap = q
		w.reads.of(q)
		if k <= len(c.MoreUDP) {
			w.udp = c.MoreUDP[k-1]
		}
		e.more = append(e.more, w)
	}
	e.release = newOutWorker(e, 0, fewFlows)
	e.late = newInWorker(e, fewFlows)
	ofWire := func(k int, r wire.PacketReader) {
		w := newInWorker(e, c.Flows)
		w.number = k
		w.packets.of(r)
		e.in = append(e.in, w)
	}
	ofUDP := func(k int, u wire.UDPConn) {
		w := newInWorker(e, c.Flows)
		w.number = k
		w.grams.of(u)
		e.in = append(e.in, w)
	}
	ofWire(0, c.Wire)
	if c.UDP != nil {
		ofUDP(0, c.UDP)
		for k, u := range c.MoreUDP {
			ofUDP(k+1, u)
		}
	}
	for k, r := range c.MoreWire {
		ofWire(k+1, r)
	}
	return e, nil
}

// Run moves packets until ctx ends or a device fails, and says so at once then.
// The caller closes the devices in either case, which is what ends the blocking
// reads of the other workers.
func (e *Engine) Run(parent context.Context) error {
	e.waitTogether()
	g, ctx := errgroup.WithContext(parent)
	g.Go(func() error { return ended(ctx, "tap", e.out.run(ctx)) })
	for _, w := range e.more {
		g.Go(func() error { return ended(ctx, "tap", w.run(ctx)) })
	}
	g.Go(func() error { return e.release.runRelease(ctx) })
	g.Go(func() error { return ended(ctx, "interface", e.in[0].run(ctx)) })
	for _, w := range e.in[len(e.in)-len(e.c.MoreWire):] {
		g.Go(func() error { return ended(ctx, "interface", w.run(ctx)) })
	}
	if e.c.UDP != nil {
		for _, w := range e.in[1 : 2+len(e.c.MoreUDP)] {
			g.Go(func() error { return ended(ctx, "udp 4500", w.runUDP(ctx)) })
		}
	}
	<-ctx.Done()
	if parent.Err() == nil {
		return context.Cause(ctx)
	}
	return g.Wait()
}

// ended turns the error of a device that was closed on purpose into nil.
func ended(ctx context.Context, what string, err error) error {
	if err == nil || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Installed tells the engine that an SA for key exists now: packets that wait
// for it are sent, or opened. Callable from any goroutine.
func (e *Engine) Installed(key sad.OutKey) {
	e.relMu.Lock()
	e.relKeys = append(e.relKeys, key)
	e.relMu.Unlock()
	e.wake()
}

// wake has the release worker look.
func (e *Engine) wake() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

// Failed tells the engine that the negotiation for key came to nothing:
// packets that wait for it are dropped, so that none goes out much too late.
func (e *Engine) Failed(key sad.OutKey) {
	for _, p := range e.hold.failed(key) {
		clear(p.data)
		e.failed.Add(1)
	}
}

// Stats adds the workers' counters up.
func (e *Engine) Stats() Stats {
	var s Stats
	s.add(&e.out.n)
	for _, w := range e.more {
		s.add(&w.n)
	}
	s.add(&e.release.n)
	s.add(&e.late.n)
	for _, w := range e.in {
		s.add(&w.n)
	}
	s[DropOutHold] += e.failed.Load()
	return s
}

// QueueStats is what the workers of one queue of the TAP have done.
type QueueStats struct {
	Out uint64 // packets protected
	In  uint64 // packets accepted, of its socket of port 4500 and its reader
}

// Queues tells of the workers by queue.
func (e *Engine) Queues() []QueueStats {
	qs := make([]QueueStats, 1+len(e.more))
	qs[0].Out = e.out.n.v[OutProtected].Load()
	for k, w := range e.more {
		qs[k+1].Out = w.n.v[OutProtected].Load()
	}
	for _, w := range e.in {
		qs[w.number%len(qs)].In += w.n.v[InProtected].Load()
	}
	return qs
}

// FragmentDrops adds up why fragments were dropped, by the names of frag.Reason.
func (e *Engine) FragmentDrops() map[string]uint64 {
	rs := []*frag.Reassembler{e.out.frags, e.release.frags}
	for _, w := range e.more {
		rs = append(rs, w.frags)
	}
	for _, w := range e.in {
		rs = append(rs, w.frags)
	}
	return fragmentDrops(rs...)
}

func fragmentDrops(rs ...*frag.Reassembler) map[string]uint64 {
	m := map[string]uint64{}
	for _, r := range rs {
		for _, why := range frag.Reasons() {
			m[why.String()] += r.Count(why)
		}
	}
	return m
}

// generation is what decisions about flows are remembered for. It is read before
// the databases are.
func (e *Engine) generation() flow.Generation {
	return flow.Generation{SPD: e.c.SPD.Generation(), SAD: e.c.SAD.Generation()}
}

// Held returns how many packets wait for an SA.
func (e *Engine) Held() int { return e.hold.len() }

// exemptIKE reports whether a packet is IKE of this host, given the address and
// port of the local side: the remote port proves nothing, since any sender
// chooses his own. Only whole packets and first fragments show their ports;
// later fragments are not exempt.
func (e *Engine) exemptIKE(i *packet.Info, local netip.Addr, port uint16) bool {
	return i.Proto == protoUDP && i.HasPorts && (port == portIKE || port == portNATT) && e.c.Wire.IsLocal(local)
}

// isND recognises neighbour discovery that only a neighbour can have sent
// (RFC 4861, 6.1 and 7.1: hop limit 255). It always passes, or a broad IPv6
// policy would cut the link under the very SAs that are to protect it.
func isND(i *packet.Info) bool {
	return i.Version == 6 && i.Proto == protoICMPv6 && i.TTL == 255 && i.HasPorts && i.SrcPort >= 133 && i.SrcPort <= 137
}

const (
	protoIPv4   = 4
	protoTCP    = 6
	protoUDP    = 17
	protoIPv6   = 41
	protoESP    = 50
	protoAH     = 51
	protoICMPv6 = 58
	protoNone   = 59
	protoIPComp = 108
)

// runRelease carries on with what waited for SAs, whenever Installed says so.
func (w *outWorker) runRelease(ctx context.Context) error {
	buf := make([]byte, bufSize)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.e.kick:
			w.tape.Start()
			w.e.late.tape.Start()
			if err := w.e.late.receiveEarly(time.Now()); err != nil {
				return ended(ctx, "tap", err)
			}
			if err := w.sendHeld(buf); err != nil {
				return ended(ctx, "interface", err)
			}
			w.e.late.tape.Publish()
			w.tape.Publish()
		}
	}
}

// released takes the packets out of the hold queue whose SAs were installed
// since it was last called.
func (e *Engine) released() []heldPacket {
	e.relMu.Lock()
	keys := e.relKeys
	e.relKeys = nil
	e.relMu.Unlock()
	return e.hold.installed(keys)
}

// sendHeld sends the packets whose SAs were installed since it was last called.
func (w *outWorker) sendHeld(buf []byte) error {
	for _, p := range w.e.released() {
		w.n.inc(OutReleased)
		n := copy(buf[headroom:], p.data)
		w.link.set(p.link)
		w.ip(buf, headroom, n, time.Now(), p.whole)
		err := w.flush()
		clear(p.data)
		clear(buf[headroom : headroom+n])
		if err != nil {
			return err
		}
	}
	return nil
}
