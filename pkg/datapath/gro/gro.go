// Package gro joins consecutive packets of a flow into super-frames for the
// TAP, as the kernel's generic receive offload does between a NIC and the
// stack: the stack then walks once for some 45 packets instead of for each, and
// there is one system call instead of 45. What it makes, segmentation turns
// into the same packets again; an observer behind a forwarding host sees no
// difference.
//
// The rules are the kernel's (net/ipv4/{af_inet,tcp_offload,udp_offload}.c). A
// packet continues the last of its flow if
//
//   - everything in both headers is the same, options and ECN marks included,
//     but for lengths, checksums and what follows;
//   - the IPv4 identification counts up by one, or stays with DF. In the latter
//     case segments will count up, which the kernel can avoid and a TAP cannot
//     say: nobody may look at it in a packet that nobody may cut (RFC 6864, 4.1);
//   - TCP: the sequence number continues, and of the flags there are only ACK
//     and, on the last packet, PSH;
//   - it is not longer than the first, and the one before not shorter;
//   - both checksums are right. One with a wrong checksum goes alone and as it
//     is, and the stack will drop it; a UDP checksum of zero stays zero.
//
// Fragments, IPv4 options and IPv6 extension headers go alone. Packets of a
// flow leave in the order in which they came; those of different flows may
// overtake each other within a batch.
//
// Payloads are copied to where the super-frame grows, in the pass that verifies
// their checksum: with writev, which takes them where they lie, a super-frame
// of 44 packets took the kernel no less time than copy and write together.
package gro

import (
	"bytes"
	"encoding/binary"
	"math/bits"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

const (
	etherLen = 14
	// room is what a frame has in front of its IP header, at least.
	room = tap.HeadroomMin + etherLen

	// maxLen is the length of the longest super-frame, from the IP header on.
	maxLen = 65535
	// maxUDP is how many datagrams every kernel takes in one (UDP_MAX_SEGMENTS).
	maxUDP = 64

	// flows is how many flows may interleave before the first is closed.
	flows = 16
	// supers is how many super-frames one batch may have.
	supers = 16
)

const (
	protoTCP = 6
	protoUDP = 17

	flagPSH = 0x08
	flagACK = 0x10
)

// Coalescer collects the packets of one batch. It belongs to one goroutine.
//
//	Add ... Add -> Frames -> write -> Reset
type Coalescer struct {
	// Kinds of super-frames to make; the others' packets go alone.
	Kinds tap.Super

	frames []frame // in the order of their first packets
	open   [flows]slot
	last   int   // the slot found last
	evict  int   // the slot to be reused next
	cur    *slot // that took the packet added last; nil: none did
	added  uint64
	out    []tap.Frame
	free   [][]byte // buffers for super-frames
	taken  [][]byte
	copies Arena
	joined uint // packets in super-frames
	made   uint // super-frames
}

// slot is a frame that its flow's next packet may continue.
type slot struct {
	tag   uint32 // of the flow; 0: none
	frame int
}

// frame is one packet, or a super-frame that grows.
type frame struct {
	buf     []byte
	off, n  int // of the IP packet in buf
	hl, tl  int // octets of IP and transport header
	count   int // packets in it
	size    int // octets of payload of each packet but the last
	seq     uint32
	id      uint16 // of the last packet
	step    uint16 // from one identification to the next
	v6, udp bool
	moved   bool // to where it can grow
	offload tap.Offload
}

// New returns an empty Coalescer.
func New() *Coalescer { return &Coalescer{} }

// Add takes the IP packet buf[off:off+i.Len], which i was decoded from; o is
// what is left undone on it. buf stays the Coalescer's until Reset, octets in
// front of the packet included. It returns false, and takes nothing, if the
// batch is full: write what there is, Reset, and add it again.
func (c *Coalescer) Add(buf []byte, off int, i *packet.Info, o tap.Offload) bool {
	c.cur = nil
	c.added++
	if i.IsFragment() || i.Proto == protoTCP && !plain(i) || i.Proto == protoUDP && !plain(i) {
		// Which flow it belongs to is not known, or not worth knowing: nothing
		// that comes later may overtake it.
		c.closeAll()
		c.alone(buf, off, i.Len, o)
		return true
	}
	if i.Proto != protoTCP && i.Proto != protoUDP {
		c.alone(buf, off, i.Len, o)
		return true
	}
	b := buf[off : off+i.Len]
	tag := flowTag(b, i)
	s := c.find(b, i, tag)
	p, ok := c.parse(b, i.HdrLen, i.Version == 4, i.Proto)
	if !ok || o != (tap.Offload{}) {
		c.close(s)
		c.alone(buf, off, i.Len, o)
		return true
	}
	if s != nil {
		switch c.join(&c.frames[s.frame], b, &p) {
		case joined:
			c.cur = s
			return true
		case last:
			c.close(s)
			return true
		case full:
			return false
		case corrupt:
			c.close(s)
			c.alone(buf, off, i.Len, o)
			return true
		}
		c.close(s)
	}
	if !p.push {
		if s == nil {
			c.last = c.evict
			s = &c.open[c.evict]
			c.evict = (c.evict + 1) % flows
		}
		*s = slot{tag, len(c.frames)}
		c.cur = s
	}
	c.frames = append(c.frames, frame{
		buf: buf, off: off, n: i.Len, hl: p.hl, tl: p.tl, count: 1, size: len(b) - p.hl - p.tl,
		seq: p.seq + uint32(len(b)-p.hl-p.tl), id: p.id, v6: i.Version == 6, udp: i.Proto == protoUDP,
	})
	return true
}

// Frames ends the batch: it returns what to write, in order. The first 14
// octets of each frame, the Ethernet header, are the caller's to fill in.
// joined packets of those added stand in made super-frames.
func (c *Coalescer) Frames() (fs []tap.Frame, joined, made uint) {
	c.closeAll()
	for k := range c.frames {
		f := &c.frames[k]
		if f.count > 1 {
			f.finish()
			c.joined += uint(f.count)
			c.made++
		} else if f.off < room {
			b := c.copies.Take(room + f.n)
			copy(b[room:], f.buf[f.off:f.off+f.n])
			f.buf, f.off = b, room
		}
		c.out = append(c.out, tap.Frame{Buf: f.buf, Off: f.off - etherLen, Len: f.n + etherLen, Offload: f.offload})
	}
	return c.out, c.joined, c.made
}

// Reset forgets all packets, and what Frames returned.
func (c *Coalescer) Reset() {
	c.closeAll()
	clear(c.frames)
	clear(c.out)
	c.frames, c.out = c.frames[:0], c.out[:0]
	c.free = append(c.free, c.taken...)
	clear(c.taken)
	c.taken = c.taken[:0]
	c.copies.Reset()
	c.joined, c.made = 0, 0
}

// Empty reports whether there is nothing to write.
func (c *Coalescer) Empty() bool { return len(c.frames) == 0 }

func (c *Coalescer) alone(buf []byte, off, n int, o tap.Offload) {
	c.frames = append(c.frames, frame{buf: buf, off: off, n: n, count: 1, offload: o})
}

func (c *Coalescer) close(s *slot) {
	if s != nil {
		*s = slot{}
	}
}

func (c *Coalescer) closeAll() { c.open = [flows]slot{} }

// plain: the transport header follows an IP header without options or
// extension headers, and shows its ports.
func plain(i *packet.Info) bool {
	if !i.HasPorts {
		return false
	}
	if i.Version == 6 {
		return i.HdrLen == packet.IPv6Len
	}
	return i.HdrLen == packet.IPv4Len
}

// flowTag is a hash of what find compares, never 0.
func flowTag(b []byte, i *packet.Info) uint32 {
	le := binary.LittleEndian
	h := uint64(le.Uint32(b[i.HdrLen:])) ^ uint64(i.Proto)<<32
	if i.Version == 6 {
		h ^= le.Uint64(b[8:])*3 ^ le.Uint64(b[16:])*5 ^ le.Uint64(b[24:])*7 ^ le.Uint64(b[32:])*11
	} else {
		h ^= le.Uint64(b[12:]) * 3
	}
	h *= 0x9e3779b97f4a7c15
	return uint32(h>>32) | 1
}

// find is the slot of the flow of b, nil if it has none.
func (c *Coalescer) find(b []byte, i *packet.Info, tag uint32) *slot {
	if c.same(c.last, b, i, tag) {
		return &c.open[c.last]
	}
	for k := range c.open {
		if c.same(k, b, i, tag) {
			c.last = k
			return &c.open[k]
		}
	}
	return nil
}

// same: slot k is of the flow of b.
func (c *Coalescer) same(k int, b []byte, i *packet.Info, tag uint32) bool {
	if c.open[k].tag != tag {
		return false
	}
	f := &c.frames[c.open[k].frame]
	if f.v6 != (i.Version == 6) || f.udp != (i.Proto == protoUDP) {
		return false
	}
	h, le := f.buf[f.off:f.off+f.hl+4], binary.LittleEndian
	if f.v6 {
		return bytes.Equal(h[8:44], b[8:44])
	}
	return le.Uint64(h[12:]) == le.Uint64(b[12:]) && le.Uint32(h[20:]) == le.Uint32(b[20:])
}

// parsed is what join needs of a packet that may stand in a super-frame.
type parsed struct {
	hl, tl int
	seq    uint32
	id     uint16
	push   bool
}

// parse looks at the packet b with an IP header of hl octets and with ports, and no
// fragment; false: it always goes alone.
func (c *Coalescer) parse(b []byte, hl int, v4 bool, proto uint8) (p parsed, ok bool) {
	p.hl = hl
	if v4 {
		if b[6]&^0x40 != 0 { // the bit that is reserved
			return p, false
		}
		p.id = binary.BigEndian.Uint16(b[4:])
	}
	t := b[hl:]
	if proto == protoUDP {
		p.tl = packet.UDPLen
		return p, c.Kinds.UDP && len(t) > packet.UDPLen && int(binary.BigEndian.Uint16(t[4:])) == len(t) && (t[6] != 0 || t[7] != 0)
	}
	if v4 && !c.Kinds.TCP4 || !v4 && !c.Kinds.TCP6 || len(t) < 20 {
		return p, false
	}
	p.tl = int(t[12]>>4) * 4
	p.seq = binary.BigEndian.Uint32(t[4:])
	p.push = t[13]&flagPSH != 0
	return p, p.tl >= 20 && len(t) > p.tl && t[12]&15 == 0 && t[13]&^flagPSH == flagACK
}

// Added is how many packets Add was asked to take.
func (c *Coalescer) Added() uint64 { return c.added }

// Follow takes the IP packet b, which may have padding behind it, if it is of the
// flow of the packet that Add was given last and continues its super-frame; else it
// does nothing and returns false. Of b nothing is known or kept.
func (c *Coalescer) Follow(b []byte) bool {
	s := c.cur
	if s == nil || s.tag == 0 || len(b) < 40 {
		return false
	}
	f := &c.frames[s.frame]
	h, le := f.buf[f.off:f.off+f.n], binary.LittleEndian
	var n, hl int
	proto := h[9]
	if f.v6 {
		// Version, class and flow label are join's to compare.
		n, hl, proto = packet.IPv6Len+int(binary.BigEndian.Uint16(b[4:])), packet.IPv6Len, h[6]
		if len(b) < packet.IPv6Len+4 || b[0]>>4 != 6 || b[6] != proto || !bytes.Equal(b[8:44], h[8:44]) {
			return false
		}
	} else {
		n, hl = int(binary.BigEndian.Uint16(b[2:])), packet.IPv4Len
		// Version and lengths, type of service; fragmentation; TTL, protocol; addresses
		// and ports.
		if le.Uint16(b) != le.Uint16(h) || le.Uint16(b[6:]) != le.Uint16(h[6:]) || le.Uint16(b[8:]) != le.Uint16(h[8:]) ||
			le.Uint64(b[12:]) != le.Uint64(h[12:]) || le.Uint32(b[20:]) != le.Uint32(h[20:]) {
			return false
		}
	}
	if n < hl+packet.UDPLen || n > len(b) {
		return false
	}
	b = b[:n]
	p, ok := c.parse(b, hl, !f.v6, proto)
	if !ok {
		return false
	}
	switch c.join(f, b, &p) {
	case joined:
		return true
	case last:
		c.close(s)
		return true
	}
	return false
}

// Outcomes of join.
type outcome uint8

const (
	other   outcome = iota // b begins another frame
	joined                 // b is in f
	last                   // and nothing can follow
	corrupt                // b has a wrong checksum
	full                   // no buffer
)

// join appends b to the frame of its flow.
func (c *Coalescer) join(f *frame, b []byte, p *parsed) outcome {
	if !f.continues(b, p) {
		return other
	}
	if !f.moved {
		if len(c.free) == 0 {
			if len(c.taken) == supers {
				return full
			}
			c.free = append(c.free, make([]byte, room+maxLen))
		}
		if !c.move(f) {
			return other
		}
	}
	end := f.off + f.n
	payload := b[p.hl+p.tl:]
	if !verifyCopy(f.buf[end:], b, p.hl, p.tl, f.v6) {
		return corrupt
	}
	f.n += len(payload)
	f.count++
	f.seq += uint32(len(payload))
	f.step, f.id = p.id-f.id, p.id
	if p.push {
		f.buf[f.off+f.hl+13] |= flagPSH
	}
	if p.push || len(payload) < f.size || f.udp && f.count == maxUDP {
		return last
	}
	return joined
}

// continues: b, of the flow of f, differs from what f holds only as segments of
// one super-frame differ.
func (f *frame) continues(b []byte, p *parsed) bool {
	payload := len(b) - p.hl - p.tl
	if p.tl != f.tl || p.seq != f.seq && !f.udp || payload > f.size || f.n+payload > maxLen {
		return false
	}
	h := f.buf[f.off : f.off+f.hl+f.tl]
	if f.v6 {
		if !bytes.Equal(b[:4], h[:4]) || b[7] != h[7] {
			return false
		}
	} else {
		if b[1] != h[1] || b[6] != h[6] || b[8] != h[8] {
			return false
		}
		switch step := p.id - f.id; {
		case f.count > 1 && step != f.step, step > 1, step == 0 && b[6] == 0:
			return false
		}
	}
	if f.udp {
		return true
	}
	t, g := b[p.hl:p.hl+p.tl], h[f.hl:]
	// Acknowledgement number; window; urgent pointer and options.
	le := binary.LittleEndian
	if le.Uint32(t[8:]) != le.Uint32(g[8:]) || le.Uint16(t[14:]) != le.Uint16(g[14:]) {
		return false
	}
	if p.tl == 32 { // with timestamps
		return le.Uint64(t[18:]) == le.Uint64(g[18:]) && le.Uint64(t[24:]) == le.Uint64(g[24:])
	}
	return bytes.Equal(t[18:], g[18:])
}

// move takes a frame of one packet to where it can grow; false: its checksum is
// wrong, and it stays.
func (c *Coalescer) move(f *frame) bool {
	to := c.free[len(c.free)-1]
	b := f.buf[f.off : f.off+f.n]
	if !verifyCopy(to[room+f.hl+f.tl:], b, f.hl, f.tl, f.v6) {
		return false
	}
	copy(to[room:], b[:f.hl+f.tl])
	c.free = c.free[:len(c.free)-1]
	c.taken = append(c.taken, to)
	f.buf, f.off, f.moved = to, room, true
	return true
}

// verifyCopy copies the payload of the IP packet b to dst, and reports whether
// its checksums are right.
func verifyCopy(dst, b []byte, hl, tl int, v6 bool) bool {
	be := binary.BigEndian
	var acc, c uint64 // the pseudo-header
	if v6 {
		h := b[8:40]
		acc, c = bits.Add64(be.Uint64(h), be.Uint64(h[8:]), 0)
		acc, c = bits.Add64(acc, be.Uint64(h[16:]), c)
		acc, c = bits.Add64(acc, be.Uint64(h[24:]), c)
		acc, c = bits.Add64(acc, uint64(b[6])+uint64(len(b)-hl), c)
		acc += c
	} else {
		h := b[:20]
		front, ttl, dst := be.Uint64(h), be.Uint64(h[8:]), uint64(be.Uint32(h[16:]))
		acc, c = bits.Add64(front, ttl, 0)
		acc, c = bits.Add64(acc, dst, c)
		if packet.Fold(acc+c) != 0xffff {
			return false
		}
		acc = ttl&0xffffffff + dst + uint64(h[9]) + uint64(len(b)-hl)
	}
	acc = packet.Sum(b[hl:hl+tl], acc)
	return packet.Fold(packet.CopySum(dst, b[hl+tl:], acc)) == 0xffff
}

// finish makes the headers those of a super-frame.
func (f *frame) finish() {
	b := f.buf[f.off : f.off+f.n]
	packet.SetLen(b, f.n)
	packet.FixIPv4Checksum(b)
	t := b[f.hl:]
	o := tap.Offload{
		NeedsCsum: true, GSOSize: uint16(f.size), HdrLen: uint16(etherLen + f.hl + f.tl),
		CsumStart: uint16(etherLen + f.hl), CsumOffset: 16, GSOType: tap.GSOTCPv4,
	}
	proto := uint8(protoTCP)
	switch {
	case f.udp:
		proto, o.GSOType, o.CsumOffset = protoUDP, tap.GSOUDPL4, 6
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	case f.v6:
		o.GSOType = tap.GSOTCPv6
	}
	binary.BigEndian.PutUint16(t[o.CsumOffset:], packet.Fold(packet.PseudoSum(b, proto, len(t))))
	f.offload = o
}
