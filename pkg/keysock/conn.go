package keysock

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/missiu/missiu/proto/pfkey"
)

// maxMessage is the longest datagram, in octets, that either end sends.
const maxMessage = 1 << 16

// usualMessage is room for most messages.
const usualMessage = 512

// maxPack is how many octets several messages that share a datagram have at most.
const maxPack = 1 << 15

// A request is one datagram on its way to the goroutine of Serve: one message,
// or several of a connection that may pack them.
type request struct {
	c    *conn
	b    []byte
	cut  bool // the datagram was longer than maxMessage
	done chan struct{}
}

// packet is a datagram that waits for its reader. Those for several clients
// share their octets.
type packet struct {
	b       []byte
	answers int  // to the client's own requests, which are never dropped
	secret  bool // has keys and one owner: wiped when sent
}

// conn is one PF_KEY socket.
type conn struct {
	id   uint64
	s    *Server
	nc   *net.UnixConn
	wake chan struct{} // the writer has something to do
	room chan struct{} // the reader may go on
	gone chan struct{} // closed by shut

	// Of the goroutine of Serve.
	tx     bool       // a policy transaction is open
	copies [][]byte   // of its answers, for sockets that know no transactions
	sas    []*message // of its answers, for everybody
	labels []func()   // of policies, to be set at its end

	mu         sync.Mutex
	shutDone   bool
	registered uint16 // bit per SA type
	promisc    bool
	optedIn    bool
	packed     bool // several messages may share a datagram
	pack       []byte
	queue      []packet
	answers    int // of them in queue
	lost       uint64
	dump       *dump
}

// dump is an unfinished DUMP or SPDDUMP; it belongs to the writer, except that
// fetch is called in the goroutine of Serve.
type dump struct {
	h pfkey.Header
	// fetch returns further entries, a few at a time since requests wait for it,
	// and tells when there are no more. It may return none before.
	fetch func() (l []entry, done bool)
	ready []entry
	done  bool
	sent  uint32
	held  []byte // an answer that did not fit the last datagram any more
	buf   []byte // of the last datagram
}

// dumpBatch is how many entries fetch looks at.
const dumpBatch = 64

// entry is what one answer of a dump shows.
type entry struct {
	put  func(m *pfkey.Message) error
	wipe func() // wipes its keys
}

func newConn(s *Server, id uint64, nc *net.UnixConn) *conn {
	return &conn{
		id: id, s: s, nc: nc,
		wake: make(chan struct{}, 1), room: make(chan struct{}, 1), gone: make(chan struct{}),
	}
}

// shut ends the connection; both goroutines return.
func (c *conn) shut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shutDone {
		return
	}
	c.shutDone = true
	close(c.gone)
	c.nc.Close()
	for _, p := range c.queue {
		p.wipe()
	}
	c.queue = nil
}

// read hands requests to the goroutine of Serve one by one. It stops reading
// while too many answers wait.
func (c *conn) read() {
	buf := make([]byte, maxMessage)
	for {
		n, _, flags, _, err := c.nc.ReadMsgUnix(buf, nil)
		if n == 0 && (err == nil || errors.Is(err, io.EOF)) && !hungUp(c.nc) {
			continue // an empty datagram
		}
		if err != nil || n == 0 {
			return
		}
		r := &request{c: c, b: buf[:n], cut: flags&syscall.MSG_TRUNC != 0, done: make(chan struct{})}
		select {
		case c.s.reqs <- r:
			<-r.done
		case <-c.s.quit:
			return
		}
		clear(buf[:n]) // it may have had keys
		for c.full() {
			select {
			case <-c.room:
			case <-c.gone:
				return
			}
		}
	}
}

func (c *conn) full() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.answers >= c.s.opt.Answers
}

// answer queues a datagram that must not be dropped.
func (c *conn) answer(b []byte, secret bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shutDone {
		return
	}
	if c.answers == 0 && c.dump == nil {
		// From now on the reader has to get on, even if what is being written is
		// an event that was let wait.
		_ = c.nc.SetWriteDeadline(time.Now().Add(c.s.opt.StallLimit))
	}
	c.answers++
	c.queue = append(c.queue, packet{b, 1, secret})
	c.poke()
}

// tell queues an event or a copy, or drops it.
func (c *conn) tell(b []byte, secret bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shutDone {
		return
	}
	if len(c.queue)-c.answers >= c.s.opt.QueueLen {
		c.lost++
		c.s.count(func(st *Stats) { st.Dropped++ })
		if secret {
			clear(b)
		}
		return
	}
	c.tellLost()
	c.queue = append(c.queue, packet{b, 0, secret})
	c.poke()
}

// tellLost queues the number of messages that were dropped before this point.
func (c *conn) tellLost() {
	if c.lost > 0 && c.optedIn {
		m := pfkey.Message{Header: pfkey.Header{Type: pfkey.XLost}, Count: &pfkey.Count{N: c.lost}}
		if b, err := m.Append(nil); err == nil {
			c.queue = append(c.queue, packet{b: b})
		}
	}
	c.lost = 0
}

// startDump has the writer send d, paced by its reader.
func (c *conn) startDump(d *dump) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dump != nil {
		return refuse(syscall.EBUSY, "a dump is unfinished")
	}
	if c.shutDone {
		return syscall.EPIPE
	}
	if c.answers == 0 {
		_ = c.nc.SetWriteDeadline(time.Now().Add(c.s.opt.StallLimit))
	}
	c.dump = d
	c.poke()
	return nil
}

func (c *conn) dumping() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dump != nil
}

func (c *conn) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// write sends what is queued, and between any two datagrams one of a dump.
func (c *conn) write() {
	defer func() {
		c.shut()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.dump != nil {
			wipeAll(c.dump.ready)
			clear(c.dump.held)
			c.dump = nil
		}
	}()
	dumpTurn := false
	for {
		p, d, ok := c.take(dumpTurn)
		if !ok {
			select {
			case <-c.wake:
				continue
			case <-c.gone:
				return
			}
		}
		if d != nil {
			if p, ok = c.nextOfDump(d); !ok {
				return
			}
		}
		dumpTurn = d == nil
		_, err := c.nc.Write(p.b)
		p.wipe()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.s.count(func(st *Stats) { st.Stalled++ })
			return
		}
		// A datagram that does not fit the socket buffer is lost, no more.
		if err != nil && !errors.Is(err, syscall.EMSGSIZE) {
			return
		}
		if p.answers > 0 {
			c.answered(p.answers)
		}
	}
}

// take returns what is to be sent next, or the dump whose turn it is, and sets
// the deadline that goes with it.
func (c *conn) take(dumpTurn bool) (p packet, d *dump, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) == 0 {
		c.tellLost()
	}
	if c.dump != nil && (dumpTurn || len(c.queue) == 0) {
		d = c.dump
	} else if len(c.queue) > 0 {
		p = c.next()
	} else {
		return p, nil, false
	}
	var deadline time.Time
	if c.answers > 0 || c.dump != nil {
		deadline = time.Now().Add(c.s.opt.StallLimit)
	}
	_ = c.nc.SetWriteDeadline(deadline)
	return p, d, true
}

// next takes one packet off the queue, or as many as may share a datagram. c.mu
// is held.
func (c *conn) next() packet {
	take := func() packet {
		p := c.queue[0]
		c.queue[0] = packet{}
		if c.queue = c.queue[1:]; len(c.queue) == 0 {
			c.queue = nil // let the array go
		}
		return p
	}
	p := take()
	if !c.packed || len(c.queue) == 0 || len(p.b)+len(c.queue[0].b) > maxPack {
		return p
	}
	all := packet{b: append(c.pack[:0], p.b...), answers: p.answers, secret: p.secret}
	p.wipe()
	for len(c.queue) > 0 && len(all.b)+len(c.queue[0].b) <= maxPack {
		p := take()
		all.b = append(all.b, p.b...)
		all.answers += p.answers
		all.secret = all.secret || p.secret
		p.wipe()
	}
	c.pack = all.b
	return all
}

// answered accounts for n answers after they were written, so that those in the
// hands of the writer still count.
func (c *conn) answered(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers -= n
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// nextOfDump makes the next datagram of a dump, with as many answers as may share
// one; false: the connection has ended.
func (c *conn) nextOfDump(d *dump) (packet, bool) {
	p := packet{b: append(d.buf[:0], d.held...), secret: true}
	clear(d.held)
	d.held = nil
	packs := c.isPacked()
	for !d.over() && (packs || len(p.b) == 0) {
		b, ok := c.answerOfDump(d)
		if !ok {
			p.wipe()
			return packet{}, false
		}
		if len(p.b) > 0 && len(p.b)+len(b) > maxPack {
			d.held = b
			break
		}
		p.b = append(p.b, b...)
		clear(b)
	}
	d.buf = p.b
	if d.over() && d.held == nil {
		// The dump ends before its last answer is out, since who reads that may ask
		// for another one at once. The answer counts like any other.
		c.mu.Lock()
		c.dump = nil
		c.answers++
		c.mu.Unlock()
		p.answers = 1
	}
	return p, true
}

// over reports whether every answer of d was made.
func (d *dump) over() bool { return d.done && len(d.ready) == 0 && d.sent > 0 }

// answerOfDump makes one answer. seq counts 1, 2, ... and the last is 0, so an
// entry waits until there is another one or no more.
func (c *conn) answerOfDump(d *dump) (b []byte, ok bool) {
	for !d.done && len(d.ready) < 2 {
		if !c.fetch(d) {
			return nil, false
		}
	}
	m := &pfkey.Message{Header: d.h}
	err := refuse(syscall.ENOENT, "nothing there")
	d.sent++
	if len(d.ready) > 0 {
		e := d.ready[0]
		defer e.wipe()
		d.ready[0] = entry{}
		d.ready = d.ready[1:]
		err = e.put(m)
		m.Header = pfkey.Header{Type: d.h.Type, SAType: m.SAType, Seq: d.sent, Pid: d.h.Pid}
		if d.over() {
			m.Seq = 0
		}
		if err == nil {
			b, err = encode(m)
		}
	}
	if err != nil {
		m.Errno = errnoOf(err)
		b = m.Header.Append(nil)
	}
	c.s.promiscuous(b)
	return b, true
}

// fetch has the goroutine of Serve look for more.
func (c *conn) fetch(d *dump) bool {
	type batch struct {
		l    []entry
		done bool
	}
	got := make(chan batch)
	c.s.Do(func() {
		l, done := d.fetch()
		select {
		case got <- batch{l, done}:
		case <-c.gone:
			wipeAll(l)
		}
	})
	select {
	case b := <-got:
		d.ready, d.done = append(d.ready, b.l...), b.done
		return true
	case <-c.gone:
		return false
	}
}

func wipeAll(l []entry) {
	for _, e := range l {
		e.wipe()
	}
}

func (p packet) wipe() {
	if p.secret {
		clear(p.b)
	}
}

// encode is Append with our limit on length.
func encode(m *pfkey.Message) ([]byte, error) {
	b, err := m.Append(make([]byte, 0, usualMessage))
	if err == nil && len(b) > maxMessage {
		clear(b)
		return nil, refuse(syscall.EMSGSIZE, "message of %d octets", len(b))
	}
	return b, err
}
