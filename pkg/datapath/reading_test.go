package datapath

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/linger"
	"github.com/missiu/missiu/pkg/datapath/tap"
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
