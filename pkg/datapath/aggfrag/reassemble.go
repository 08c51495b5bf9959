package aggfrag

import "sync"

// Window is how many ESP packets in a row a Reassembler looks at: the
// fragments of one packet, and how far they may be out of order. The longest
// inner packet takes 47 of 1400 octets.
const Window = 64

const (
	// maxHeld bounds the octets that wait in one Reassembler.
	maxHeld = 2 * maxBlock
	// keep is the size of buffers that are kept for the next fragment.
	keep = 2048
)

// Reassembler puts the fragmented packets of one SA together. Fragments of a
// packet have consecutive sequence numbers, except that ESP packets with
// nothing but padding may stand between (RFC 9347, 2.2.3); they may come in any
// order. It holds no more than Window fragments of two inner
// packets' octets in all; new ones push out old ones. It has memory from its first fragment on,
// and no timers: an old fragment is never completed by a new one, since the
// numbers say what belongs together. The zero value works. Safe for
// concurrent use.
type Reassembler struct {
	mu   sync.Mutex
	ring []piece // by sequence number modulo Window
	held int
}

// piece is what one ESP packet had of fragments.
type piece struct {
	seq  uint64 // 0: free
	buf  []byte
	head int  // octets of buf that continue a block
	more bool // and do not end it
	cut  bool // the octets behind begin a block that goes on
	pad  bool // nothing
}

// Result is what a fragment has led to.
type Result struct {
	// First and Second are the packets that are now whole, if any: that which
	// ended with this fragment, and that which began with it.
	First, Second []byte
	// Lost is how many fragments were given up.
	Lost int
}

// Add takes what u has left of the ESP packet seq, and puts packets
// together in buf, which has room for BufLen octets; they are valid as long as
// that is.
func (r *Reassembler) Add(seq uint64, u *Unpacker, buf []byte) Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	var res Result
	if r.ring == nil {
		r.ring = make([]piece, Window)
	}
	p := &r.ring[seq%Window]
	if seq == 0 || p.seq >= seq { // too late, or a second time
		if !u.empty() {
			res.Lost++
		}
		return res
	}
	r.free(p, &res)
	n := len(u.head) + len(u.tail)
	if n > maxHeld {
		res.Lost++
		return res
	}
	for r.held+n > maxHeld {
		r.free(r.oldest(), &res)
	}
	p.seq, p.head, p.more, p.cut, p.pad = seq, len(u.head), u.more, len(u.tail) > 0, u.empty()
	p.buf = append(append(p.buf[:0], u.head...), u.tail...)
	r.held += n

	if first, ok := r.start(seq); ok {
		res.First = r.complete(first, buf, &res)
	}
	if p.seq == seq && p.cut {
		res.Second = r.complete(seq, buf[len(res.First):], &res)
	}
	return res
}

// BufLen is the room that Add needs: two packets.
const BufLen = 2 * maxBlock

// at is the piece of seq, nil if there is none.
func (r *Reassembler) at(seq uint64) *piece {
	if p := &r.ring[seq%Window]; p.seq == seq && seq != 0 {
		return p
	}
	return nil
}

// start is where the block begins that seq continues.
func (r *Reassembler) start(seq uint64) (uint64, bool) {
	for s := seq - 1; seq-s < Window; s-- {
		p := r.at(s)
		switch {
		case p == nil:
			return 0, false
		case p.cut:
			return s, true
		case !p.pad && !p.more:
			return 0, false
		}
	}
	return 0, false
}

// complete puts the block together that begins in first, if all of it is there.
func (r *Reassembler) complete(first uint64, buf []byte, res *Result) []byte {
	p := r.at(first)
	n, last := len(p.buf)-p.head, first
	for s := first + 1; ; s++ {
		if s-first == Window {
			return nil
		}
		q := r.at(s)
		if q == nil {
			return nil
		}
		if q.pad {
			continue
		}
		if n += q.head; n > maxBlock || q.head == 0 && !q.more {
			r.cutOff(p, res) // it does not go on
			return nil
		}
		if !q.more {
			last = s
			break
		}
	}
	b := append(buf[:0], p.buf[p.head:]...)
	r.cutOff(p, nil)
	for s := first + 1; s <= last; s++ {
		q := r.at(s)
		b = append(b, q.buf[:q.head]...)
		r.behead(q)
	}
	if k, known := blockLen(b); !known || k != n {
		res.Lost++
		return nil
	}
	return b
}

// cutOff forgets the block that begins in p.
func (r *Reassembler) cutOff(p *piece, res *Result) {
	r.held -= len(p.buf) - p.head
	p.buf, p.cut = p.buf[:p.head], false
	if res != nil {
		res.Lost++
	}
	r.spent(p)
}

// behead forgets the block that p continues.
func (r *Reassembler) behead(p *piece) {
	r.held -= p.head
	p.buf = p.buf[:copy(p.buf, p.buf[p.head:])]
	p.head, p.more, p.pad = 0, false, false
	r.spent(p)
}

// spent frees p if nothing is left of it.
func (r *Reassembler) spent(p *piece) {
	if p.head == 0 && !p.more && !p.cut {
		r.free(p, nil)
	}
}

// free forgets p, and counts it in res if it waited for others. Its number
// stays: what came once does not come again.
func (r *Reassembler) free(p *piece, res *Result) {
	if res != nil && (p.head > 0 || p.more || p.cut) {
		res.Lost++
	}
	r.held -= len(p.buf)
	buf := p.buf[:0]
	if cap(buf) > keep {
		buf = nil
	}
	*p = piece{seq: p.seq, buf: buf}
}

// oldest is the piece of the smallest number that holds octets; there is one.
func (r *Reassembler) oldest() *piece {
	var o *piece
	for k := range r.ring {
		if p := &r.ring[k]; len(p.buf) > 0 && (o == nil || p.seq < o.seq) {
			o = p
		}
	}
	return o
}
