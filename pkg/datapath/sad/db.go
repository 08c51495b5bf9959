package sad

import (
	"crypto/rand"
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// OutKey says which SA an outbound policy wants. ReqID is 0 where any SA of the
// right addresses, protocol and mode serves (levels use and require), and that
// of the request at level unique. Src and Dst are the SA's Ends: tunnel end points,
// of which unspecified ones are open (see templates), or the packet's own
// addresses in transport mode.
type OutKey struct {
	Proto    ipsec.Protocol
	Mode     ipsec.Mode
	ReqID    ipsec.ReqID
	Src, Dst netip.Addr
	// Queue, if not 0, is the one that the packet came from: its own SA goes
	// before one for any queue. Those of other queues do not serve.
	Queue ipsec.Queue
}

// DB is the SAD. Insert, Replace, Remove and SetState are for one goroutine, all else
// for any.
type DB struct {
	seed  seed
	bySPI *table[SA]
	out   *table[link] // the first of each place
	flows atomic.Int64 // SAs for single flows
	owned atomic.Int64 // SAs for single queues
	wild  atomic.Int64 // SAs in transport mode for any source
	dests [2]lengths   // of IPv4, IPv6: see templates
	gen   atomic.Uint64
	n     atomic.Int64
	edit  sync.Mutex // held by the writer for each change
}

// place is where Out looks: SAs that hold a single flow have one of their own, so
// that thousands of flows between two hosts cost a packet no more than one.
type place struct {
	OutKey
	flow ipsec.Flow // zero: any
}

// link is an element of the list of one place, newest first, and part of its SA,
// which says what place that is. Readers follow next; an element that was taken
// out keeps its next, so that a reader on it gets on.
type link struct {
	sa   *SA
	next atomic.Pointer[link]
	prev *link // of the writer
	kind kind
	in   bool // of the writer: it is in a list
}

// kind is which of its places an SA is in by a link.
type kind uint8

// Kinds: for policies that take any reqid, for those that want the SA's, and for
// templates.
const (
	anyReqID kind = iota
	ownReqID
	template
)

// place is where l is.
func (l *link) place() place {
	p := &l.sa.P
	if l.kind == template {
		k, _ := l.sa.templatePlace()
		return k
	}
	ends := p.Ends()
	k := place{OutKey: OutKey{p.Proto, p.Mode, 0, ends.Src, ends.Dst, p.Queue}}
	k.flow, _ = l.sa.flow()
	if l.kind == ownReqID {
		if k.ReqID = p.ReqID; k.ReqID == 0 {
			k.ReqID = manual
		}
	}
	return k
}

func (l *link) is(k *place) bool {
	p := &l.sa.P
	return p.Proto == k.Proto && p.Mode == k.Mode && p.Queue == k.Queue && l.place() == *k
}

// NewDB returns an empty DB.
func NewDB() *DB {
	d := new(DB)
	var b [24]byte
	rand.Read(b[:])
	for i := range d.seed {
		d.seed[i] = binary.LittleEndian.Uint64(b[i*8:]) | 1
	}
	d.bySPI = newTable(func(s *SA) uint64 { return d.hashID(s.P.SAID) })
	d.out = newTable(func(l *link) uint64 { return d.hashOut(l.place()) })
	return d
}

func (d *DB) hashID(id ipsec.SAID) uint64 {
	return d.seed.mix(d.seed.addr(id.Dst), uint64(id.SPI)<<8|uint64(id.Proto))
}

func (d *DB) hashOut(k place) uint64 {
	h := d.hashKey(k.OutKey)
	if f := k.flow; f.Dst.IsValid() {
		h = d.seed.mix(d.seed.mix(d.seed.addr(f.Src), d.seed.addr(f.Dst))^h, uint64(f.Proto)<<32|uint64(f.SrcPort)<<16|uint64(f.DstPort))
	}
	return h
}

func (d *DB) hashKey(k OutKey) uint64 {
	return d.seed.mix(d.seed.mix(d.seed.addr(k.Src), d.seed.addr(k.Dst)), uint64(k.Queue)<<48|uint64(k.ReqID)<<16|uint64(k.Mode)<<8|uint64(k.Proto))
}

// Lookup finds an SA by protocol, destination and SPI, larval ones
// included. It is nil if there is none.
func (d *DB) Lookup(id ipsec.SAID) *SA {
	s := *d.bySPI.slots.Load()
	mask := uint64(len(s) - 1)
	for h := d.hashID(id); ; h++ {
		v := s[h&mask].Load()
		if v == nil {
			return nil
		}
		if v.P.SPI == id.SPI && v.P.Dst == id.Dst && v.P.Proto == id.Proto {
			return v
		}
	}
}

// LookupSPI is Lookup by parts.
func (d *DB) LookupSPI(proto ipsec.Protocol, spi ipsec.SPI, dst netip.Addr) *SA {
	return d.Lookup(ipsec.SAID{Proto: proto, Dst: dst, SPI: spi})
}

// Out finds the SA for an outbound packet: of those that k describes and whose
// traffic selectors hold the packet, the newest mature one, else the newest
// dying one, else nil. SAs for any source come after those for the packet's own. i may be nil to ask for any
// but those for single flows.
func (d *DB) Out(k OutKey, i *packet.Info) *SA { return d.newest(k, i, false, nil) }

// manual stands for "none" in the reqid of an OutKey.
const manual ipsec.ReqID = 1<<32 - 1

// OutManual is Out among the SAs that have no reqid, whatever that of k is, and
// algorithms that fit one of alts.
func (d *DB) OutManual(k OutKey, i *packet.Info, alts []ipsec.Proposal) *SA {
	k.ReqID = manual
	return d.newest(k, i, true, alts)
}

// newest is Out, or if byHand OutManual. It looks at several places, one after the
// other: of an SA that came to one just after the look at it, and its predecessor,
// which went from another just before, it would find neither. Between the two the
// generation has changed.
func (d *DB) newest(k OutKey, i *packet.Info, byHand bool, alts []ipsec.Proposal) *SA {
	for range lookAgain {
		g := d.gen.Load()
		sa := d.newestNow(k, i, byHand, alts)
		if sa != nil && sa.State() == Mature || d.gen.Load() == g {
			return sa
		}
	}
	d.edit.Lock()
	defer d.edit.Unlock()
	return d.newestNow(k, i, byHand, alts)
}

// lookAgain is how often newest is overtaken until it has changes wait.
const lookAgain = 8

// newestNow is newest while nothing changes.
func (d *DB) newestNow(k OutKey, i *packet.Info, byHand bool, alts []ipsec.Proposal) *SA {
	if k.Queue != 0 && d.owned.Load() > 0 {
		if sa := d.newestFor(k, i, byHand, alts); sa != nil {
			return sa
		}
	}
	k.Queue = 0
	return d.newestFor(k, i, byHand, alts)
}

// newestFor is newest of one queue, or of those for any.
func (d *DB) newestFor(k OutKey, i *packet.Info, byHand bool, alts []ipsec.Proposal) *SA {
	if k.Open() {
		return d.open(k, i, byHand, alts)
	}
	sa := d.newestOf(k, i, byHand, alts)
	if k.Mode == ipsec.Transport && d.wild.Load() > 0 && (sa == nil || sa.State() != Mature) {
		k.Src = anyAddr[family(k.Dst)]
		if s := d.newestOf(k, i, byHand, alts); s != nil && (sa == nil || s.State() == Mature) {
			return s
		}
	}
	return sa
}

// anyAddr are the unspecified addresses of IPv4 and IPv6.
var anyAddr = [2]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}

// newestOf is newest between two addresses.
func (d *DB) newestOf(k OutKey, i *packet.Info, byHand bool, alts []ipsec.Proposal) *SA {
	var dying *SA
	if d.flows.Load() > 0 {
		if f, ok := flowOf(i); ok {
			if dying = d.newestAt(place{k, f}, nil, i, byHand, alts); dying != nil && dying.State() == Mature {
				return dying
			}
		}
	}
	if sa := d.newestAt(place{OutKey: k}, nil, i, byHand, alts); sa != nil && (dying == nil || sa.State() == Mature) {
		return sa
	}
	return dying
}

// newestAt is newest in one place; of a template ends says between which
// addresses the SA is to be, else it is nil.
func (d *DB) newestAt(k place, ends *OutKey, i *packet.Info, byHand bool, alts []ipsec.Proposal) *SA {
	var dying *SA
	for l := d.first(k); l != nil; l = l.next.Load() {
		sa := l.sa
		if byHand && !sa.Fits(alts) || k.ReqID == manual && (sa.P.ReqID == 0) != byHand || ends != nil && !ends.between(sa.P.Ends()) {
			continue
		}
		switch sa.State() {
		case Mature:
			if i == nil || sa.match(i) {
				return sa
			}
		case Dying:
			if dying == nil && (i == nil || sa.match(i)) {
				dying = sa
			}
		}
	}
	return dying
}

// flowOf is the flow of a packet as places have it: of ICMP both ports are type
// and code; false if the packet does not show it.
func flowOf(i *packet.Info) (f ipsec.Flow, ok bool) {
	if i == nil || !i.HasPorts || i.Proto == 0 {
		return f, false
	}
	f = ipsec.Flow{Src: i.Src, Dst: i.Dst, Proto: i.Proto, SrcPort: i.SrcPort, DstPort: i.DstPort}
	if packet.IsICMP(i.Proto) {
		f.SrcPort = i.SrcPort<<8 | i.DstPort
		f.DstPort = f.SrcPort
	}
	return f, true
}

// flow is the one that an SA holds, if it is a single one.
func (s *SA) flow() (f ipsec.Flow, ok bool) {
	if len(s.P.SrcTS) != 1 || len(s.P.DstTS) != 1 {
		return f, false
	}
	a, b := &s.P.SrcTS[0], &s.P.DstTS[0]
	if a.Proto == 0 || a.Proto != b.Proto || a.Start != a.End || b.Start != b.End || a.PortLo != a.PortHi || b.PortLo != b.PortHi ||
		!packet.IsICMP(a.Proto) && !packet.HasPortNumbers(a.Proto) || packet.IsICMP(a.Proto) && a.PortLo != b.PortLo {
		return f, false
	}
	return ipsec.Flow{Src: a.Start, Dst: b.Start, Proto: a.Proto, SrcPort: a.PortLo, DstPort: b.PortLo}, true
}

// first is the newest of a place, nil if there is none.
func (d *DB) first(k place) *link {
	s := *d.out.slots.Load()
	mask := uint64(len(s) - 1)
	for h := d.hashOut(k); ; h++ {
		l := s[h&mask].Load()
		if l == nil || l != d.out.grave && l.is(&k) {
			return l
		}
	}
}

// Insert adds s; false if there is one with its SAID.
func (d *DB) Insert(s *SA) bool {
	d.edit.Lock()
	defer d.edit.Unlock()
	if d.Lookup(s.P.SAID) != nil {
		return false
	}
	d.bySPI.insert(s)
	d.link(s)
	d.n.Add(1)
	d.gen.Add(1)
	return true
}

// Replace puts s in the place of old, which has the same SAID; false if old is
// not there. If old is larval, s becomes the newest SA; else s is one that
// WithEncap made and keeps old's place.
func (d *DB) Replace(old, s *SA) bool {
	d.edit.Lock()
	defer d.edit.Unlock()
	if old.P.SAID != s.P.SAID || !d.bySPI.replace(old, s) {
		return false
	}
	if s.Counters == old.Counters {
		for i := range old.links {
			if l := &old.links[i]; l.in {
				d.exchange(l, s)
			}
		}
	} else {
		d.link(s)
		d.unlink(old)
	}
	d.gen.Add(1)
	return true
}

// Remove takes s out and marks it dead; false if it is not there.
func (d *DB) Remove(s *SA) bool {
	d.edit.Lock()
	defer d.edit.Unlock()
	if !d.bySPI.replace(s, nil) {
		return false
	}
	d.unlink(s)
	s.SetState(Dead)
	d.n.Add(-1)
	d.gen.Add(1)
	return true
}

// SetState changes the state of s to Mature or Dying, between which Out chooses.
func (d *DB) SetState(s *SA, st State) {
	d.edit.Lock()
	defer d.edit.Unlock()
	s.SetState(st)
	d.gen.Add(1)
}

// Len returns the number of SAs, larval ones included.
func (d *DB) Len() int { return int(d.n.Load()) }

// Generation changes with every change of the DB: what was looked up at an
// older one has to be looked up again.
func (d *DB) Generation() uint64 { return d.gen.Load() }

// Each calls f for every SA, in no order, until it returns false. SAs that come
// or go meanwhile may be missed.
func (d *DB) Each(f func(*SA) bool) { d.bySPI.each(f) }

// link puts s in front of the lists in which Out looks for it.
func (d *DB) link(s *SA) {
	if s.State() == Larval {
		return
	}
	if s.AnySource() {
		d.wild.Add(1)
	}
	if s.P.Queue != 0 {
		d.owned.Add(1)
	}
	if _, ok := s.flow(); ok {
		d.flows.Add(1)
	}
	d.push(s, anyReqID)
	d.push(s, ownReqID)
	if t, ok := s.templatePlace(); ok {
		d.dests[family(t.flow.Dst)].count(t.flow, 1)
		d.push(s, template)
	}
}

// push puts s in front of the list of one of its places.
func (d *DB) push(s *SA, k kind) {
	l := s.linkOf(k)
	first := d.first(l.place())
	l.next.Store(first)
	if first == nil {
		d.out.insert(l)
		return
	}
	first.prev = l
	d.out.replace(first, l)
}

// linkOf is the link of s for one of its places, which it is about to be in.
// Readers may still be on one that was in a list before.
func (s *SA) linkOf(k kind) *link {
	l := &s.links[k]
	if l.sa == nil {
		l.sa, l.kind = s, k
	}
	l.in, l.prev = true, nil
	return l
}

// exchange puts s, which has the same places, where l is.
func (d *DB) exchange(l *link, s *SA) {
	n, next := s.linkOf(l.kind), l.next.Load()
	n.prev = l.prev
	n.next.Store(next)
	if next != nil {
		next.prev = n
	}
	if l.prev != nil {
		l.prev.next.Store(n)
	} else {
		d.out.replace(l, n)
	}
	l.in, l.prev = false, nil
}

func (d *DB) unlink(s *SA) {
	if !s.links[anyReqID].in {
		return
	}
	if _, ok := s.flow(); ok {
		d.flows.Add(-1)
	}
	if s.AnySource() {
		d.wild.Add(-1)
	}
	if s.P.Queue != 0 {
		d.owned.Add(-1)
	}
	for i := range s.links {
		l := &s.links[i]
		if !l.in {
			continue
		}
		if l.kind == template {
			f := l.place().flow
			d.dests[family(f.Dst)].count(f, -1)
		}
		next := l.next.Load()
		if next != nil {
			next.prev = l.prev
		}
		if l.prev != nil {
			l.prev.next.Store(next)
		} else {
			d.out.replace(l, next)
		}
		l.in, l.prev = false, nil
	}
}
