package datapath

import (
	"context"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/datapath/linger"
)

// reading is how a worker comes by its batches of T. The readers of the devices of
// package tap and wire wait together while little is to do (linger.Group): the
// thread that has written a packet to the TAP then finds what the kernel answers at
// once, such as the reply to a ping, and has the outbound worker do its batch there
// and then. Other devices wait in ReadBatch.
type reading[T any] struct {
	batch  func([]T) (int, error)
	device waiter // nil: batch waits
	failed error  // of a batch that was done by another worker's goroutine
}

// waiter is a device that reads and waits by two calls; see tap's and wire's.
type waiter interface {
	Await() error
	Join(g *linger.Group, serve func() bool) error
}

func (r *reading[T]) of(d interface{ ReadBatch([]T) (int, error) }) {
	r.batch = d.ReadBatch
	if s, ok := d.(interface {
		TryBatch([]T) (int, error)
		waiter
	}); ok {
		r.batch, r.device = s.TryBatch, s
	}
}

// loop has a worker do its batches until one fails or ctx ends.
func (r *reading[T]) loop(ctx context.Context, step func() (int, error)) error {
	for ctx.Err() == nil {
		n, err := step()
		if n == 0 && err == nil && r.device != nil {
			if err = r.device.Await(); err == nil {
				err = r.failed
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// joinGroup has the reader wait with others, who do its batches by step.
func (r *reading[T]) joinGroup(g *linger.Group, step func() (int, error)) error {
	if r.device == nil {
		return nil
	}
	return r.device.Join(g, func() bool {
		_, r.failed = step()
		return r.failed == nil
	})
}

// waitTogether makes the readers groups, one for each queue: the kernel allows one
// descriptor a hundred ways to wake somebody, and a leader is to have little to do
// for others. Those of a bump, whose devices come and go, and those that cannot join
// wait for themselves.
func (e *Engine) waitTogether() {
	if e.c.Low != nil {
		return
	}
	outs := append([]*outWorker{e.out}, e.more...)
	groups := make([]linger.Group, len(outs))
	join := func(err error) {
		if err != nil {
			e.c.Log.Warn("a reader waits for itself: pings take longer", zap.Error(err))
		}
	}
	for k, w := range outs {
		join(w.reads.joinGroup(&groups[k], w.step))
	}
	for _, w := range e.in {
		g := &groups[w.number%len(groups)]
		if w.grams.batch != nil {
			join(w.grams.joinGroup(g, w.stepUDP))
		} else {
			join(w.packets.joinGroup(g, w.step))
		}
	}
}
