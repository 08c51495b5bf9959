package datapath

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Room that the Apply of a Plane wants around a packet, in octets: in front for
// headers, behind for padding and ICV.
const (
	Headroom = headroom
	Tailroom = tailroom
)

// Plane is the engine for programs that own their packets, such as forwarding
// planes: the same workers between memory instead of devices. It has no
// goroutine, no socket and no clock.
//
//	              Apply                       Permit
//	IP packet  ------------>  ESP, AH  ...  ------------>  IP packet
//	           SPD, SAD                      SAD, SPD
//
// A packet is Buf[Off:Off+Len], from the IP header on; link headers in front of
// it are left alone if the packet is bypassed, and lie under new headers
// otherwise. Packets are processed in place, and whatever of Buf lies around
// them is the Plane's to write until it returns. Apply copies a packet that has
// less than Headroom octets in front or Tailroom behind it, unless it is bypassed.
//
// One goroutine at a time may use a Plane, but for Installed, Failed, Held,
// Stats, FragmentDrops and Wake, which are for all. A program with several
// goroutines has a Plane for each, over the same SAD and SPD: sequence numbers,
// replay windows and lifetimes are of the SA. All fragments of a datagram go to
// one Plane. A Plane takes some 14 MB, most of it to remember flows by (Flows),
// and what waits in it.
//
// Packets that go the ordinary way cost no allocation. Those that wait, are cut
// or joined, and ICMP errors do.
type Plane struct {
	e       Engine
	in      *inWorker
	packets []Packet // of the result
	reply   []byte
	copied  []byte // a packet without room, or one that waited
}

// PlaneConfig is what a Plane works with. SAD, SPD, Default and IsLocal are
// required; functions that are nil do nothing, and none may call the Plane.
type PlaneConfig struct {
	SAD *sad.DB
	SPD *spd.DB
	// Default is what happens to packets that no policy matches: Bypass or Discard.
	Default ipsec.Action
	// IsLocal tells whether SAs to an address end here.
	IsLocal func(netip.Addr) bool
	// PathMTU is the largest IP packet that reaches an address as far as is
	// known; nil: 65535 to all of them.
	PathMTU func(netip.Addr) int
	// NeedSA, LimitReached, NewMapping and KeepMSS are those of Config.
	NeedSA       func(policy *spd.Entry, key sad.OutKey, flow ipsec.Flow)
	LimitReached func(sa *sad.SA, hard bool)
	NewMapping   func(sa *sad.SA, peer netip.AddrPort)
	KeepMSS      bool
	// Flows is how many flows are remembered, a power of two of at least 64; 0: flow.DefaultSize.
	Flows int
}

// Packet is an IP packet in memory: Buf[Off:Off+Len].
type Packet struct {
	Buf []byte
	Off int
	Len int
}

// Bytes is the packet alone.
func (p *Packet) Bytes() []byte { return p.Buf[p.Off : p.Off+p.Len] }

// Verdict is what became of a packet.
type Verdict uint8

// Verdicts. The zero value is the safe one.
const (
	Dropped    Verdict = iota // counted under Result.Reason
	Bypassed                  // Packets holds it as it was
	Protected                 // Packets holds the results: sealed, or opened and allowed
	Held                      // waits here for an SA or its keys, see Released
	Incomplete                // a fragment that waits here for others
	TooBig                    // the result is too long for the path: Reply
	Consumed                  // a dummy packet (RFC 4303, 2.6); nothing is to be done
)

var verdictNames = [...]string{"dropped", "bypassed", "protected", "held", "incomplete", "too big", "consumed"}

func (v Verdict) String() string {
	if int(v) >= len(verdictNames) {
		return "Verdict(?)"
	}
	return verdictNames[v]
}

// Result is the answer to one packet. What it refers to, the buffer that was
// given included, is valid until the next call.
type Result struct {
	Verdict Verdict
	// Reason is the counter of a packet that was Dropped. Of a packet that
	// carries several (RFC 9347) some may be dropped while others pass, which
	// only Stats shows.
	Reason Counter
	// Packets are to be passed on in the place of the one given, in order: more
	// than one if the result had to be cut for the path, or if several came in one.
	Packets []Packet
	// Reply is an ICMP error for the sender of a packet that was TooBig, from
	// the IP header on; nil if none may be sent.
	Reply []byte
}

// NewPlane checks c and allocates all buffers.
func NewPlane(c PlaneConfig) (*Plane, error) {
	switch {
	case c.Default != ipsec.Bypass && c.Default != ipsec.Discard:
		return nil, errors.New("plane: Default: want bypass or discard")
	case c.SAD == nil || c.SPD == nil || c.IsLocal == nil:
		return nil, errors.New("plane: SAD, SPD and IsLocal are required")
	case c.Flows < 0 || c.Flows&(c.Flows-1) != 0 || c.Flows > 0 && c.Flows < 64:
		return nil, errors.New("plane: Flows: want a power of two of at least 64")
	}
	if c.PathMTU == nil {
		c.PathMTU = func(netip.Addr) int { return 65535 }
	}
	if c.NeedSA == nil {
		c.NeedSA = func(*spd.Entry, sad.OutKey, ipsec.Flow) {}
	}
	if c.LimitReached == nil {
		c.LimitReached = func(*sad.SA, bool) {}
	}
	if c.Flows == 0 {
		c.Flows = flow.DefaultSize
	}
	p := &Plane{packets: make([]Packet, 0, batch)}
	e := &p.e
	e.c = Config{
		TAP: planeTAP{plane: p}, Wire: planeWire{p, c.IsLocal, c.PathMTU}, SAD: c.SAD, SPD: c.SPD, Default: c.Default,
		NeedSA: c.NeedSA, LimitReached: c.LimitReached, NewMapping: c.NewMapping, KeepMSS: c.KeepMSS, Log: zap.NewNop(),
	}
	e.inPlace = true
	e.kick = make(chan struct{}, 1)
	e.out = newOutWorker(e, 0, c.Flows)
	p.in = newInWorker(e, c.Flows)
	p.in.take = p.take
	return p, nil
}

// Apply does with an outbound packet what policy says (RFC 4301, 5.1).
// Protected: Packets are complete IP packets to be sent. IKE of this host (UDP 500
// and 4500 from a local address) and neighbour discovery are bypassed. Fragments
// that can only be protected or judged as a datagram are Incomplete until the
// last is there.
func (p *Plane) Apply(pk Packet, now time.Time) Result {
	p.reset()
	w := p.e.out
	if !pk.valid() {
		w.n.inc(DropOutMalformed)
		return Result{Verdict: Dropped, Reason: DropOutMalformed}
	}
	w.flows.Sweep(p.e.generation())
	if pk.Off >= Headroom && len(pk.Buf)-pk.Off-pk.Len >= Tailroom {
		return p.apply(pk, now, false)
	}
	c := p.copy(pk.Bytes())
	r := p.apply(c, now, false)
	if r.Verdict == Bypassed && len(r.Packets) == 1 && r.Packets[0].Off == c.Off && &r.Packets[0].Buf[0] == &c.Buf[0] {
		r.Packets[0].Buf, r.Packets[0].Off = pk.Buf, pk.Off // it was not needed
	}
	return r
}

func (p *Plane) apply(pk Packet, now time.Time, whole bool) Result {
	w := p.e.out
	w.n.last = numCounters
	w.ip(pk.Buf, pk.Off, pk.Len, now, whole)
	w.flush() // devices of memory do not fail
	return p.result(w.n.last)
}

// Permit takes off an inbound packet what protects it, and passes what policy
// allows (RFC 4301, 5.2). Protected: it came by an SA, and Packets are what was in it.
// Bypassed: it came in clear, and may, or is protected for somebody else. ESP in
// UDP to port 4500 is taken as well; IKE and keepalives to that port are
// Bypassed. Fragments are Incomplete until the last is there, as with
// FragReceive; the result of the last is that of the datagram.
func (p *Plane) Permit(pk Packet, now time.Time) Result {
	p.reset()
	w := p.in
	if !pk.valid() {
		w.n.inc(DropInMalformed)
		return Result{Verdict: Dropped, Reason: DropInMalformed}
	}
	w.flows.Sweep(p.e.generation())
	w.n.last = numCounters
	w.ip(pk.Buf, pk.Off, pk.Len, tap.Offload{}, now)
	w.flush(now)
	return p.result(w.n.last)
}

// FragReceive is the part of Permit that joins fragments, for programs that
// forward by the whole datagram or look at it before. Bypassed: Packets holds a
// whole datagram for Permit, the packet given if it was one. It takes the place
// of the fragments, which are not given to Permit any more.
func (p *Plane) FragReceive(pk Packet, now time.Time) Result {
	p.reset()
	w := p.in
	if !pk.valid() || !packet.Decode(pk.Bytes(), &w.info) {
		w.n.inc(DropInMalformed)
		return Result{Verdict: Dropped, Reason: DropInMalformed}
	}
	if !w.info.IsFragment() {
		p.add(pk.Buf, pk.Off, pk.Len)
		return Result{Verdict: Bypassed, Packets: p.packets}
	}
	w.n.last = numCounters
	if whole := w.join(pk.Buf[pk.Off:pk.Off+w.info.Len], now); whole != nil {
		p.add(whole, 0, len(whole))
	}
	return p.result(w.n.last)
}

// Released carries on with packets that were Held and need to wait no longer,
// and calls f for each with its direction and result, which is valid until f
// returns. It is to be called when Wake says so.
func (p *Plane) Released(now time.Time, f func(ipsec.Direction, Result)) {
	for _, h := range p.e.released() {
		p.reset()
		p.e.out.n.inc(OutReleased)
		pk := p.copy(h.data)
		f(ipsec.Out, p.apply(pk, now, h.whole))
		clear(h.data)
		clear(pk.Bytes())
	}
	w := p.in
	ps := w.ready(now)
	for k := range ps {
		p.reset()
		w.n.last = numCounters
		w.resume(&ps[k], now)
		w.flush(now)
		f(ipsec.In, p.result(w.n.last))
	}
}

// Wake has a value when packets may be Released.
func (p *Plane) Wake() <-chan struct{} { return p.e.kick }

// Installed tells the Plane that an SA for key exists now, Failed that there
// will be none: packets that wait for it are released, or dropped.
func (p *Plane) Installed(key sad.OutKey) { p.e.Installed(key) }

// Failed: see Installed.
func (p *Plane) Failed(key sad.OutKey) { p.e.Failed(key) }

// Held returns how many packets wait for an SA.
func (p *Plane) Held() int { return p.e.Held() }

// Stats returns what was counted.
func (p *Plane) Stats() Stats {
	var s Stats
	s.add(&p.e.out.n)
	s.add(&p.in.n)
	s[DropOutHold] += p.e.failed.Load()
	return s
}

// FragmentDrops tells why fragments were dropped, by the names of frag.Reason.
func (p *Plane) FragmentDrops() map[string]uint64 {
	return fragmentDrops(p.e.out.frags, p.in.frags)
}

func (p *Packet) valid() bool {
	return p.Off >= 0 && p.Len >= 0 && p.Off <= len(p.Buf) && p.Len <= min(len(p.Buf)-p.Off, 65535)
}

// copy puts a packet where it has room.
func (p *Plane) copy(b []byte) Packet {
	if p.copied == nil {
		p.copied = make([]byte, bufSize)
	}
	return Packet{p.copied, Headroom, copy(p.copied[Headroom:], b)}
}

func (p *Plane) reset() {
	clear(p.packets)
	p.packets, p.reply = p.packets[:0], nil
}

func (p *Plane) add(buf []byte, off, n int) { p.packets = append(p.packets, Packet{buf, off, n}) }

// take is what the inbound worker delivers by.
func (p *Plane) take(buf []byte, off, n int) { p.add(buf, off, n) }

// result tells what became of a packet after which last was counted last.
func (p *Plane) result(last Counter) Result {
	r := Result{Reason: last, Packets: p.packets, Reply: p.reply}
	switch {
	case len(p.packets) > 0 && (last == OutProtected || last == InProtected):
		r.Verdict = Protected
	case len(p.packets) > 0:
		r.Verdict = Bypassed
	case last == OutTooBig:
		r.Verdict = TooBig
	case last == OutHeld || last == InEarly:
		r.Verdict = Held
	case last == InDummy:
		r.Verdict = Consumed
	case last.drop():
		r.Verdict = Dropped
	default:
		r.Verdict = Incomplete
	}
	return r
}

// planeWire is the interface of a Plane: what is sent is its result.
type planeWire struct {
	plane   *Plane
	isLocal func(netip.Addr) bool
	mtu     func(netip.Addr) int
}

func (planeWire) ReadBatch([]wire.Packet) (int, error) { return 0, errors.ErrUnsupported }

func (w planeWire) WriteBatch(ps []wire.Packet) (int, error) {
	for k := range ps {
		w.plane.add(ps[k].Buf, ps[k].Off, ps[k].Len)
	}
	return len(ps), nil
}

func (w planeWire) PathMTU(dst netip.Addr) int { return w.mtu(dst) }
func (w planeWire) IsLocal(a netip.Addr) bool  { return w.isLocal(a) }

// planeTAP is the TAP of a Plane: ICMP errors of the outbound worker come to it.
type planeTAP struct {
	tap.Device // the rest is never called
	plane      *Plane
}

func (planeTAP) MAC() net.HardwareAddr { return nil }
func (planeTAP) MTU() int              { return 65535 }
func (planeTAP) Super() tap.Super      { return tap.Super{} }

func (t planeTAP) WriteBatch(fs []tap.Frame) (int, error) {
	for k := range fs {
		t.plane.reply = fs[k].Buf[fs[k].Off+etherLen : fs[k].Off+fs[k].Len]
	}
	return len(fs), nil
}
