package datapath

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
)

var errGone = errors.New("device is gone")

type brokenTAP struct{ memTAP }

func (brokenTAP) ReadBatch([]tap.Frame) (int, error) { return 0, errGone }

type idleWire struct {
	*node
	closed chan struct{}
}

func (w idleWire) ReadBatch([]wire.Packet) (int, error) {
	<-w.closed
	return 0, os.ErrClosed
}

// A device that fails is told of at once, also while another one blocks.
func TestRunEndsWithADevice(t *testing.T) {
	n := newNode(t)
	w := idleWire{n, make(chan struct{})}
	defer close(w.closed)
	c := n.e.c
	c.TAP, c.Wire, c.UDP = brokenTAP{memTAP{n}}, w, nil
	e, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- e.Run(t.Context()) }()
	select {
	case err := <-ended:
		if !errors.Is(err, errGone) {
			t.Errorf("Run: %v, want %v", err, errGone)
		}
	case <-time.After(time.Minute):
		t.Fatal("Run waits for the other device")
	}
}
