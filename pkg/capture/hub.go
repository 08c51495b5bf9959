package capture

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/missiu/missiu/pkg/attach"
)

// Bounds of a Hub: readers at a time, and what waits for each of them.
const (
	maxReaders  = 16
	queueFrames = 8192
	queueOctets = 16 << 20
)

// requestTimeout is how long a client may take to say what it wants.
const requestTimeout = 10 * time.Second

// Hub gives copies of frames to readers. Methods may be called from any
// goroutine, Active and Publish also of a nil Hub.
type Hub struct {
	ifs     [2]Interface
	readers atomic.Int32
	srv     *attach.Server

	mu    sync.Mutex
	queue map[*queue]struct{}

	notifyMu sync.Mutex
	notify   func(active bool)
}

// NewHub makes a Hub that serves nobody yet.
func NewHub(low, high Interface) *Hub {
	return &Hub{ifs: [2]Interface{Low: low, High: high}, queue: map[*queue]struct{}{}}
}

// Listen serves readers at path until Close.
func (h *Hub) Listen(path string) (err error) {
	h.srv, err = attach.Listen(path, maxReaders, h.serve)
	return err
}

// Close ends Listen and all readers.
func (h *Hub) Close() error {
	if h.srv == nil {
		return nil
	}
	return h.srv.Close()
}

// Notify has f called when the first reader comes and when the last has gone,
// one after the other. It is called before Listen.
func (h *Hub) Notify(f func(active bool)) { h.notify = f }

// count notes that a reader came or went.
func (h *Hub) count(by int32) {
	h.notifyMu.Lock()
	defer h.notifyMu.Unlock()
	n := h.readers.Add(by)
	if h.notify != nil && (n == 0 || n == 1 && by > 0) {
		h.notify(n > 0)
	}
}

// Active reports whether there is a reader. It is one atomic load.
func (h *Hub) Active() bool { return h != nil && h.readers.Load() != 0 }

// Publish gives frames to the readers, together and in order. It keeps nothing
// of them and never waits.
func (h *Hub) Publish(fs []Frame) {
	if !h.Active() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for q := range h.queue {
		for k := range fs {
			q.put(&fs[k])
		}
	}
}

// queue is what waits for one reader. Hub.mu guards lost.
type queue struct {
	sides  Sides
	lost   [2]uint32
	octets atomic.Int64
	msgs   chan []byte
}

func (q *queue) put(f *Frame) {
	if !q.sides.Has(f.Side) {
		return
	}
	size := int64(frameHeader + len(f.Comment) + len(f.Data))
	if len(q.msgs) == cap(q.msgs) || q.octets.Load()+size > queueOctets {
		if q.lost[f.Side] != 1<<32-1 {
			q.lost[f.Side]++
		}
		return
	}
	one := *f
	one.Lost, q.lost[f.Side] = q.lost[f.Side], 0
	b := one.append(make([]byte, 0, size))
	q.octets.Add(int64(len(b)))
	q.msgs <- b // has room: nobody else puts
}

// serve is the life of one reader.
func (h *Hub) serve(c *net.UnixConn) {
	b := make([]byte, requestLen+1)
	c.SetReadDeadline(time.Now().Add(requestTimeout))
	n, err := c.Read(b)
	if err != nil {
		return
	}
	sides, err := parseRequest(b[:n])
	if err != nil {
		return
	}
	c.SetReadDeadline(time.Time{})
	q := &queue{sides: sides, msgs: make(chan []byte, queueFrames)}
	h.mu.Lock()
	h.queue[q] = struct{}{}
	h.mu.Unlock()
	h.count(1)
	gone := make(chan struct{})
	go func() { // it has no more to say; this ends with it
		c.Read(b)
		c.Close() // ends a write
		close(gone)
	}()
	h.write(c, q, gone)
	h.count(-1)
	h.mu.Lock()
	delete(h.queue, q)
	h.mu.Unlock()
	c.Close()
	<-gone
}

func (h *Hub) write(c *net.UnixConn, q *queue, gone <-chan struct{}) {
	for side := range h.ifs {
		if q.sides.Has(Side(side)) {
			if _, err := c.Write(appendInterface(nil, Side(side), &h.ifs[side])); err != nil {
				return
			}
		}
	}
	for {
		select {
		case <-gone:
			return
		case b := <-q.msgs:
			_, err := c.Write(b)
			q.octets.Add(-int64(len(b)))
			if err != nil {
				return
			}
		}
	}
}

// Tape collects what one worker sees of a packet and of what became of it, so
// that readers get both in this order. The zero value records nothing. It
// belongs to one goroutine.
type Tape struct {
	Hub    *Hub
	on     bool
	frames []Frame
}

// Start decides whether the tape records; it is called once a batch.
func (t *Tape) Start() bool {
	t.on = t.Hub.Active()
	return t.on
}

// On reports whether the tape records.
func (t *Tape) On() bool { return t.on }

// Record adds a frame, of the two parts head and data, which are copied.
func (t *Tape) Record(side Side, dir Direction, head, data []byte, comment string) {
	if !t.on {
		return
	}
	b := make([]byte, 0, len(head)+len(data))
	b = append(append(b, head...), data...)
	t.frames = append(t.frames, Frame{Side: side, Dir: dir, Time: time.Now(), Len: len(b), Comment: comment, Data: b[:min(len(b), MaxData)]})
}

// Explain sets the comment of the first frame, if it has none.
func (t *Tape) Explain(comment string) {
	if len(t.frames) > 0 && t.frames[0].Comment == "" {
		t.frames[0].Comment = comment
	}
}

// Publish gives the frames to the readers and forgets them.
func (t *Tape) Publish() {
	if len(t.frames) == 0 {
		return
	}
	t.Hub.Publish(t.frames)
	clear(t.frames)
	t.frames = t.frames[:0]
}
