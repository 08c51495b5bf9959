// Package frag joins and cuts IP fragments (RFC 791, 3.2; RFC 8200, 4.5). A
// Reassembler is bounded in memory, datagrams and time, since whoever can send
// fragments decides what it holds; overlaps void a datagram (RFC 5722, here
// for IPv4 as well). The engine calls it for packets that can only be judged
// or protected whole: fragments of ESP, and fragments that meet a policy with
// ports. Nothing here reads a clock; the caller passes the time.
package frag

import (
	"bytes"
	"container/list"
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

// Limits bound a Reassembler. Fields that are 0 take those of DefaultLimits.
type Limits struct {
	Memory    int           // octets of all fragments held, bookkeeping included
	Datagrams int           // incomplete datagrams
	PerSource int           // of them with one source address
	Fragments int           // of one datagram
	Age       time.Duration // of an incomplete datagram
}

// DefaultLimits: 64 KiB datagrams of 576-octet fragments need 119 fragments.
// RFC 8200 gives a datagram 60 s, RFC 791 starts at 15; a path that takes half
// a minute between two fragments has lost one, and IPv4's identifications wrap
// in seconds (RFC 4963), which would join fragments of different datagrams.
var DefaultLimits = Limits{Memory: 4 << 20, Datagrams: 1024, PerSource: 64, Fragments: 256, Age: 15 * time.Second}

// Reason why fragments were dropped.
type Reason uint8

// Reasons. The first ones are of datagrams, those from Malformed on of single
// fragments, of which the datagram lives on.
const (
	Expired   Reason = iota // not complete in time
	Evicted                 // oldest of too many datagrams, or of too much memory
	Crowded                 // oldest of too many datagrams of one source
	Overlap                 // fragments overlap or differ about the length
	TooMany                 // too many fragments
	TooLong                 // more than 65535 octets with its header
	ECN                     // congestion marked beside Not-ECT (RFC 3168, 5.3)
	Late                    // more fragments of a datagram that was dropped
	Malformed               // empty, or not last and no multiple of 8 octets
	Duplicate               // equal to one that is there
	numReasons
)

var reasonNames = [numReasons]string{"expired", "evicted", "crowded", "overlap", "too_many", "too_long", "ecn", "late", "malformed", "duplicate"}

func (r Reason) String() string {
	if r >= numReasons {
		return "Reason(?)"
	}
	return reasonNames[r]
}

// Reasons lists them all.
func Reasons() []Reason {
	l := make([]Reason, numReasons)
	for i := range l {
		l[i] = Reason(i)
	}
	return l
}

// DropError is a fragment that was not taken; its datagram is lost too, or was
// before, except with Malformed and Duplicate.
type DropError struct{ Reason Reason }

func (e *DropError) Error() string { return "fragment dropped: " + e.Reason.String() }

// One error per reason, so that hostile packets cost no allocation.
var dropErrors = func() (e [numReasons]*DropError) {
	for r := range e {
		e[r] = &DropError{Reason(r)}
	}
	return e
}()

// ErrNotFragment: Add was given a whole packet.
var ErrNotFragment = errors.New("not a fragment")

// key identifies a datagram: RFC 791 has the protocol in it, RFC 8200 not.
type key struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8
}

// datagram collects fragments. bad: voided, kept without data until it ages so
// that what still comes of it is not taken for a new datagram (RFC 5722, 3).
type datagram struct {
	key    key
	born   time.Time
	pieces []piece // by offset, disjoint
	have   int     // octets in pieces
	total  int     // octets in all, -1 until the last fragment is there
	header []byte  // of the first fragment: the header of the result
	proto  int     // offset of the octet that names the upper protocol
	next   uint8   // what it will be
	ecn    uint8   // bit per codepoint seen
	cost   int
	bad    bool
	el     *list.Element
}

type piece struct {
	off  int
	data []byte
}

// What a datagram and a piece cost beside their octets, roughly.
const (
	datagramCost = 512
	pieceCost    = 64
)

// Reassembler joins fragments. Add and Expire are for one goroutine; Count is
// for any.
type Reassembler struct {
	lim     Limits
	all     map[key]*datagram
	sources map[netip.Addr]int
	age     *list.List // oldest first
	mem     int
	out     []byte
	counts  [numReasons]atomic.Uint64
}

// New makes a Reassembler.
func New(l Limits) *Reassembler {
	d := DefaultLimits
	set := func(v *int, def int) {
		if *v <= 0 {
			*v = def
		}
	}
	set(&l.Memory, d.Memory)
	set(&l.Datagrams, d.Datagrams)
	set(&l.PerSource, d.PerSource)
	set(&l.Fragments, d.Fragments)
	if l.Age <= 0 {
		l.Age = d.Age
	}
	return &Reassembler{lim: l, all: map[key]*datagram{}, sources: map[netip.Addr]int{}, age: list.New()}
}

// Count returns how often r happened.
func (r *Reassembler) Count(why Reason) uint64 { return r.counts[why].Load() }

// Add takes the fragment b, decoded in i, and keeps a copy of what it needs.
// When the datagram is complete it returns it as one packet, in a buffer that
// is the caller's until the next Add; otherwise nil and nil, or a *DropError.
func (r *Reassembler) Add(now time.Time, b []byte, i *packet.Info) (whole []byte, err error) {
	if !i.IsFragment() {
		return nil, ErrNotFragment
	}
	r.Expire(now)
	data := b[i.HdrLen:i.Len]
	if i.Version == 6 {
		data = b[i.FragHdr+8 : i.Len]
	}
	if len(data) == 0 || i.MF && len(data)%8 != 0 {
		return nil, r.count(Malformed)
	}
	d := r.datagram(now, i)
	if d.bad {
		return nil, r.count(Late)
	}
	if why, ok := d.check(data, i); !ok {
		if why != Duplicate {
			r.void(d)
		}
		return nil, r.count(why)
	}
	if len(d.pieces) >= r.lim.Fragments {
		r.void(d)
		return nil, r.count(TooMany)
	}
	r.take(d, b, data, i)
	if d.header != nil && len(d.header)+max(d.total, d.have) > 65535 {
		r.void(d)
		return nil, r.count(TooLong)
	}
	if d.total != d.have || d.header == nil {
		r.shrink(d)
		return nil, nil
	}
	r.remove(d)
	if d.ecn&(1<<3) != 0 && d.ecn&1 != 0 {
		return nil, r.count(ECN)
	}
	return r.join(d), nil
}

// Expire forgets datagrams that are too old at now. Add does it as well.
func (r *Reassembler) Expire(now time.Time) {
	for el := r.age.Front(); el != nil; el = r.age.Front() {
		d := el.Value.(*datagram)
		if now.Sub(d.born) < r.lim.Age {
			return
		}
		r.discard(d, Expired)
	}
}

func (r *Reassembler) count(why Reason) error {
	r.counts[why].Add(1)
	return dropErrors[why]
}

// datagram finds the datagram of a fragment or makes it. When there are too
// many the oldest goes, of the same source if that has too many: refusing new
// ones instead would let a flood shut everybody out for Age.
func (r *Reassembler) datagram(now time.Time, i *packet.Info) *datagram {
	k := key{i.Src, i.Dst, i.ID, i.Proto}
	if i.Version == 6 {
		k.proto = 0
	}
	if d := r.all[k]; d != nil {
		return d
	}
	if r.sources[k.src] >= r.lim.PerSource {
		for el := r.age.Front(); el != nil; el = el.Next() {
			if d := el.Value.(*datagram); d.key.src == k.src {
				r.discard(d, Crowded)
				break
			}
		}
	}
	if len(r.all) >= r.lim.Datagrams {
		r.discard(r.age.Front().Value.(*datagram), Evicted)
	}
	d := &datagram{key: k, born: now, total: -1}
	r.charge(d, datagramCost)
	r.all[k] = d
	r.sources[k.src]++
	d.el = r.age.PushBack(d)
	return d
}

// check compares a fragment with what is there.
func (d *datagram) check(data []byte, i *packet.Info) (Reason, bool) {
	off, end := i.FragOff, i.FragOff+len(data)
	for _, p := range d.pieces {
		if end <= p.off || off >= p.off+len(p.data) {
			continue
		}
		if off == p.off && bytes.Equal(data, p.data) && i.MF != (d.total == end) {
			return Duplicate, false // RFC 8200, 4.5 allows to ignore it
		}
		return Overlap, false
	}
	if d.total >= 0 && (end > d.total || !i.MF) {
		return Overlap, false
	}
	if !i.MF && len(d.pieces) > 0 {
		if l := d.pieces[len(d.pieces)-1]; l.off+len(l.data) > end {
			return Overlap, false
		}
	}
	return 0, true
}

// take stores a fragment that fits.
func (r *Reassembler) take(d *datagram, b, data []byte, i *packet.Info) {
	at, _ := slices.BinarySearchFunc(d.pieces, i.FragOff, func(p piece, off int) int { return p.off - off })
	d.pieces = slices.Insert(d.pieces, at, piece{i.FragOff, bytes.Clone(data)})
	d.have += len(data)
	r.charge(d, len(data)+pieceCost)
	d.ecn |= 1 << (i.TOS & 3)
	if !i.MF {
		d.total = i.FragOff + len(data)
	}
	if i.FragOff == 0 {
		n := i.HdrLen
		d.proto, d.next = i.ProtoOff, i.Proto
		if i.Version == 6 {
			// The header of the result is all in front of the fragment
			// header, which what names it names no longer.
			n = i.FragHdr
			d.proto, d.next = i.FragProtoOff, b[i.FragHdr]
		}
		d.header = bytes.Clone(b[:n])
		r.charge(d, n)
	}
}

// join builds the packet from a complete datagram.
func (r *Reassembler) join(d *datagram) []byte {
	out := append(r.out[:0], d.header...)
	for _, p := range d.pieces {
		out = append(out, p.data...)
	}
	r.out = out
	out[d.proto] = d.next
	packet.SetLen(out, len(out))
	if out[0]>>4 == 4 {
		out[6] &= 0x40 // DF stays; offset and MF go
		out[7] = 0
		packet.FixIPv4Checksum(out)
	}
	if d.ecn&(1<<3) != 0 {
		packet.SetECN(out, 3)
	}
	return out
}

func (r *Reassembler) charge(d *datagram, n int) {
	d.cost += n
	r.mem += n
}

// shrink drops the oldest datagrams while there is too much memory in use.
func (r *Reassembler) shrink(d *datagram) {
	for r.mem > r.lim.Memory {
		old := r.age.Front().Value.(*datagram)
		r.discard(old, Evicted)
		if old == d {
			return
		}
	}
}

// void drops what d holds and remembers that it is not to be joined.
func (r *Reassembler) void(d *datagram) {
	r.charge(d, datagramCost-d.cost)
	d.bad, d.pieces, d.header = true, nil, nil
}

func (r *Reassembler) discard(d *datagram, why Reason) {
	if !d.bad { // a voided one was counted
		r.counts[why].Add(1)
	}
	r.remove(d)
}

func (r *Reassembler) remove(d *datagram) {
	r.charge(d, -d.cost)
	r.age.Remove(d.el)
	delete(r.all, d.key)
	if r.sources[d.key.src]--; r.sources[d.key.src] == 0 {
		delete(r.sources, d.key.src)
	}
}
