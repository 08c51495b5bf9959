package keysock

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/missiu/missiu/proto/pfkey"
)

// eventQueue is how many events wait for the reader of Client.Events. When it is
// full further ones are dropped, and a Lost in their place says how many.
const eventQueue = 4096

// Client is a connection to a PF_KEY server, for use by any number of
// goroutines. Requests are sent in the order of the calls and do not wait for
// each other's answers.
//
// Every method but Close returns *Error for a refusal by the server, the cause
// of ctx's end when that comes first (the server may have done its work all the
// same), and ErrClosed when the connection has ended.
type Client struct {
	nc  *net.UnixConn
	pid uint32 // ours, and of no other client

	packs atomic.Bool // the server takes several messages in a datagram

	// Held while a request is queued in calls and sent, so that both orders agree.
	sendMu sync.Mutex

	mu    sync.Mutex
	seq   uint32
	calls []*call // unanswered, in the order sent
	err   error   // why the connection ended

	events *eventPump
	ended  chan struct{} // closed when the reader has returned
	wg     sync.WaitGroup
}

// A call is a request that waits for its answer.
type call struct {
	typ  pfkey.MsgType
	seq  uint32
	dump bool // several answers, numbered by the server, the last 0
	// on takes one answer, whose octets are only lent, and reports if it was the last.
	on   func(m *pfkey.Message) (last bool, err error)
	done chan error // capacity 1

	mu   sync.Mutex // held while on runs
	left bool       // nobody waits any more: on must not run
}

var clients atomic.Uint32

// newPID returns what a client puts into its messages as pid: the process id in
// the low 22 bits, which is all that Linux uses, and a number of its own above,
// so that two clients of a process, or of two containers, never take each
// other's answers.
func newPID() uint32 {
	if clients.Load() == 0 {
		var b [4]byte
		if _, err := rand.Read(b[:]); err == nil {
			clients.CompareAndSwap(0, binary.NativeEndian.Uint32(b[:])|1)
		}
	}
	return clients.Add(1)<<22 | uint32(os.Getpid())&(1<<22-1)
}

// Dial connects to the server at path, makes sure that it answers, and opts in to
// private messages. "@name" is one in the abstract namespace: EACCES if who
// listens there is neither root nor our own user.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, seqpacket, path)
	if err != nil {
		return nil, err
	}
	// Anybody may listen at an abstract name that is free; files lie in a directory
	// of root's.
	if strings.HasPrefix(path, "@") && !Entitled(nc.(*net.UnixConn)) {
		nc.Close()
		return nil, &os.PathError{Op: "connect", Path: path, Err: syscall.EACCES}
	}
	c := &Client{
		nc: nc.(*net.UnixConn), pid: newPID(),
		events: newEventPump(eventQueue), ended: make(chan struct{}),
	}
	c.wg.Add(2)
	go func() {
		defer c.wg.Done()
		c.read()
	}()
	go func() {
		defer c.wg.Done()
		c.events.run()
	}()
	if _, err := c.register(ctx, pfkey.SATypeUnspec); err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Close ends the connection; a transaction that is open is aborted. It returns
// when the client's goroutines have ended.
func (c *Client) Close() error {
	err := c.nc.Close()
	c.events.stop()
	c.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Events returns the channel of what this client is told without asking. It
// must be read by a client that cares; it never holds up answers. It is closed
// when the connection ends.
func (c *Client) Events() <-chan Event { return c.events.out }

// newSeq returns a sequence number for a request that needs none of its own.
func (c *Client) newSeq() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	return c.seq | ownSeq
}

// do sends a request and waits until on has taken the last answer. The keys in m
// stay the caller's; the octets that were sent are wiped.
func (c *Client) do(ctx context.Context, m *pfkey.Message, on func(*pfkey.Message) error) error {
	return c.exchange(ctx, m, &call{on: func(a *pfkey.Message) (bool, error) {
		if on == nil {
			return true, nil
		}
		return true, on(a)
	}})
}

// doDump is do for a request that has several answers. None at all is no error.
func (c *Client) doDump(ctx context.Context, m *pfkey.Message, on func(*pfkey.Message) error) error {
	err := c.exchange(ctx, m, &call{dump: true, on: func(a *pfkey.Message) (bool, error) {
		return a.Seq == 0, on(a)
	}})
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	return err
}

func (c *Client) exchange(ctx context.Context, m *pfkey.Message, k *call) error {
	if err := c.start(ctx, m, k); err != nil {
		return err
	}
	return c.wait(ctx, k)
}

// start sends a request; wait has to follow.
func (c *Client) start(ctx context.Context, m *pfkey.Message, k *call) error {
	if m.Seq == 0 {
		m.Seq = c.newSeq()
	}
	m.Pid = c.pid
	k.ready(m)
	b, err := encode(m)
	if err != nil {
		return err
	}
	defer clear(b)
	return c.send(ctx, b, k)
}

// ready makes k wait for the answer to m.
func (k *call) ready(m *pfkey.Message) {
	k.typ, k.seq, k.done = m.Type, m.Seq, make(chan error, 1)
}

func (c *Client) wait(ctx context.Context, k *call) error {
	select {
	case err := <-k.done:
		return err
	case <-ctx.Done():
		// The answer will come and has to be recognised then.
		k.leave()
		return context.Cause(ctx)
	case <-c.ended:
		select {
		case err := <-k.done:
			return err
		default:
			return c.endErr()
		}
	}
}

// send writes a datagram of requests that have the answers ks, none for one
// without an answer.
func (c *Client) send(ctx context.Context, b []byte, ks ...*call) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	c.calls = append(c.calls, ks...)
	c.mu.Unlock()
	set := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.nc.SetWriteDeadline(time.Unix(1, 0))
		close(set)
	})
	_, err := c.nc.Write(b)
	if !stop() {
		<-set
		_ = c.nc.SetWriteDeadline(time.Time{}) // the next request has its own
	}
	if err == nil {
		return nil
	}
	for _, k := range ks {
		c.drop(k)
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return ErrClosed
	}
	return err
}

func (c *Client) drop(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, o := range c.calls {
		if o == k {
			c.calls = append(c.calls[:i], c.calls[i+1:]...)
			return
		}
	}
}

func (c *Client) endErr() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// read takes datagrams until the connection ends.
func (c *Client) read() {
	buf := make([]byte, maxMessage)
	for {
		n, _, flags, _, err := c.nc.ReadMsgUnix(buf, nil)
		if err != nil || n == 0 {
			break
		}
		b, cut := buf[:n], flags&syscall.MSG_TRUNC != 0
		if !cut { // asked for, so that it may come at any time
			for first, rest := pfkey.Split(b); rest != nil; first, rest = pfkey.Split(b) {
				c.receive(first, false)
				b = rest
			}
		}
		c.receive(b, cut)
		clear(buf[:n]) // it may have had keys
	}
	c.mu.Lock()
	c.err, c.calls = ErrClosed, nil
	c.mu.Unlock()
	c.nc.Close()
	close(c.ended)
	c.events.end()
}

// receive sorts a datagram: an answer to us, an event, or neither.
func (c *Client) receive(b []byte, cut bool) {
	h, herr := pfkey.ParseHeader(b)
	if len(b) < pfkey.HeaderLen {
		return
	}
	k := c.callOf(h)
	if k == nil {
		if m, err := pfkey.Decode(b); err == nil && h.Pid != c.pid {
			if e := eventOf(m); e != nil {
				c.events.put(e)
			}
		}
		return
	}
	last, err := true, error(nil)
	switch {
	case h.Errno != 0:
		err = &Error{Type: h.Type, Errno: syscall.Errno(h.Errno)}
	case cut:
		err = refuse(syscall.EMSGSIZE, "answer to %v", h.Type)
	case herr != nil:
		err = herr
	default:
		var m *pfkey.Message
		if m, err = pfkey.Decode(b); err == nil {
			last, err = k.give(m)
		}
	}
	if err != nil && k.dump && h.Errno == 0 {
		// The rest of the dump is still to come: keep the call for it.
		k.leave()
		k.finish(err)
		last = h.Seq == 0
	}
	if last {
		c.drop(k)
		k.finish(err)
	}
}

// give has a call take an answer, unless nobody waits for it any more.
func (k *call) give(m *pfkey.Message) (last bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.left {
		return !k.dump && (m.Blob == nil || blobEnds(m.Blob)) || k.dump && m.Seq == 0, nil
	}
	return k.on(m)
}

// leave makes sure that on is not running and will not run.
func (k *call) leave() {
	k.mu.Lock()
	k.left = true
	k.mu.Unlock()
}

func (k *call) finish(err error) {
	select {
	case k.done <- err:
	default:
	}
}

// callOf returns the oldest call that a message may be the answer to.
func (c *Client) callOf(h pfkey.Header) *call {
	if h.Pid != c.pid {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.calls {
		if k.typ == h.Type && (k.dump || k.seq == h.Seq) {
			return k
		}
	}
	return nil
}
