package datapath

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
)

// splitTAP reads and waits by two calls.
type splitTAP struct {
	memTAP
	frame   []byte // that is there; nil: none
	err     error  // of TryBatch
	serve   func() bool
	waiting chan bool // its reader is in Await
	wake    chan error
}

func (d *splitTAP) Queues() []tap.Queue { return []tap.Queue{d} }

func (d *splitTAP) Join(_ *linger.Group, serve func() bool) error {
	d.serve = serve
	return nil
}

func (d *splitTAP) TryBatch(fs []tap.Frame) (int, error) {
	if d.frame == nil || d.err != nil {
		return 0, d.err
	}
	fs[0].Len = copy(fs[0].Buf[fs[0].Off:], d.frame)
	fs[0].Offload = tap.Offload{}
	d.frame = nil
	return 1, nil
}

func (d *splitTAP) Await() error {
	d.waiting <- true
	return <-d.wake
}

// While the TAP's reader waits in a group another's goroutine has its worker do a
// batch; what fails there ends the reader's goroutine.
func TestServed(t *testing.T) {
	n := newNode(t)
	w := idleWire{n, make(chan struct{})}
	defer close(w.closed)
	d := &splitTAP{memTAP: memTAP{n}, waiting: make(chan bool), wake: make(chan error)}
	c := n.e.c
	c.TAP, c.Wire, c.UDP = d, w, nil
	e, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- e.Run(t.Context()) }()
	wait := func() {
		t.Helper()
		select {
		case <-d.waiting:
		case err := <-ended:
			t.Fatalf("Run: %v", err)
		case <-time.After(time.Minute):
			t.Fatal("the reader does not wait")
		}
	}
	ip := udpPacket(a4, b4, 9, 9, 100)
	frame := append(bytes.Clone(testMAC), testMAC...)
	frame = append(append(frame, 0x08, 0), ip...)
	sent := func(how string) {
		t.Helper()
		if len(n.wire) != 1 || !bytes.Equal(n.wire[0], ip) {
			t.Fatalf("%s: sent %x, want %x", how, n.wire, ip)
		}
		n.wire = nil
	}

	wait()
	d.frame = frame
	if !d.serve() {
		t.Fatal("the batch failed")
	}
	sent("served")
	if !d.serve() {
		t.Fatal("an empty batch failed")
	}

	d.frame = frame
	d.wake <- nil
	wait()
	sent("by its goroutine")

	d.err = errGone
	if d.serve() {
		t.Fatal("a batch of a device that is gone succeeded")
	}
	d.err = nil
	d.wake <- nil
	select {
	case err := <-ended:
		if !errors.Is(err, errGone) {
			t.Errorf("Run: %v, want %v", err, errGone)
		}
	case <-time.After(time.Minute):
		t.Fatal("Run goes on")
	}
}

// A device that waits by itself ends as before.
func TestAwaitEnds(t *testing.T) {
	d := &splitTAP{waiting: make(chan bool, 1), wake: make(chan error, 1)}
	var r reading[tap.Frame]
	r.of(d)
	d.wake <- os.ErrClosed
	if err := r.loop(t.Context(), func() (int, error) { return r.batch(nil) }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v, want %v", err, os.ErrClosed)
	}
}

// pipe is a device of which only the waiting is real: its frames are octets, which it
// swallows.
type pipe struct {
	wait        *linger.Wait
	fds         [2]int
	awaits, got atomic.Int64
}

func (p *pipe) Await() error {
	p.awaits.Add(1)
	return p.wait.Block()
}

func (p *pipe) Join(g *linger.Group, serve func() bool) error { return p.wait.Join(g, serve) }

// pipeOf is a pipe as a device of Ts.
type pipeOf[T any] struct{ *pipe }

func (pipeOf[T]) ReadBatch([]T) (int, error) { return 0, errors.ErrUnsupported }

func (p pipeOf[T]) TryBatch([]T) (int, error) {
	var b [8]byte
	if n, _ := unix.Read(p.fds[0], b[:]); n > 0 {
		p.wait.Got()
		p.got.Add(int64(n))
	}
	return 0, nil
}

func newPipe(t *testing.T) *pipe {
	t.Helper()
	p := new(pipe)
	err := unix.Pipe2(p.fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK)
	if err == nil {
		p.wait, err = linger.New(linger.Adaptive, p.fds[0])
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The readers of many queues wait, and hear what comes: a group of them all would
// have more than the hundred ways to wake somebody that the kernel allows.
func TestWaitTogetherMany(t *testing.T) {
	const queues = 40
	e := &Engine{c: Config{Log: zap.NewNop()}}
	var pipes []*pipe
	var runs []func(context.Context) error
	add := func(run func(context.Context) error) *pipe {
		pipes, runs = append(pipes, newPipe(t)), append(runs, run)
		return pipes[len(pipes)-1]
	}
	for k := range queues {
		out, native, udp := &outWorker{e: e}, &inWorker{e: e, number: k}, &inWorker{e: e, number: k}
		out.reads.of(pipeOf[tap.Frame]{add(out.run)})
		native.packets.of(pipeOf[wire.Packet]{add(native.run)})
		udp.grams.of(pipeOf[wire.Datagram]{add(udp.runUDP)})
		if k == 0 {
			e.out = out
		} else {
			e.more = append(e.more, out)
		}
		e.in = append(e.in, native, udp)
	}
	e.waitTogether()
	ended := make(chan error, len(runs))
	for _, run := range runs {
		go func() { ended <- run(t.Context()) }()
	}
	until := func(what string, done func(*pipe) bool) {
		t.Helper()
		for k, p := range pipes {
			for end := time.Now().Add(time.Minute); !done(p); time.Sleep(time.Millisecond) {
				select {
				case err := <-ended:
					t.Fatalf("a reader ended: %v", err)
				default:
				}
				if time.Now().After(end) {
					t.Fatalf("reader %d does not %s", k, what)
				}
			}
		}
	}
	until("wait", func(p *pipe) bool { return p.awaits.Load() > 0 })
	for _, p := range pipes {
		unix.Write(p.fds[1], []byte{0})
	}
	until("read", func(p *pipe) bool { return p.got.Load() == 1 })
	for _, p := range pipes {
		p.wait.Close()
	}
	for range runs {
		if err := <-ended; !errors.Is(err, os.ErrClosed) {
			t.Errorf("a reader ended: %v, want %v", err, os.ErrClosed)
		}
	}
	for _, p := range pipes {
		unix.Close(p.fds[0])
		unix.Close(p.fds[1])
	}
}
