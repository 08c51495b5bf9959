package bump

import (
	"bytes"
	"fmt"
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// Monitor shows h, while it has readers, the frames that come from passive sides,
// those of active ones that programs take, and what programs write. The others are
// shown by who reads them here, with what becomes of them. It is called
// before h listens; failed gets the error of a side that cannot be watched.
func (b *Bump) Monitor(h *capture.Hub, failed func(error)) {
	m := &watcher{b: b, h: h}
	b.hub.Store(h)
	h.Notify(func(active bool) {
		if err := m.attach(active); err != nil {
			failed(err)
		}
	})
}

type watcher struct {
	b *Bump
	h *capture.Hub

	mu     sync.Mutex
	detach []func()
}

func (m *watcher) attach(active bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.detach {
		f()
	}
	m.detach = nil
	if !active {
		return nil
	}
	for _, which := range []Side{High, Low} {
		detach, err := m.b.Attach(which, false, func(fs []tap.Frame) { m.show(which, fs) })
		if err != nil {
			return err
		}
		m.detach = append(m.detach, detach)
	}
	return nil
}

func (m *watcher) show(which Side, fs []tap.Frame) {
	if m.b.State(which) != Passive && !m.b.sides[which].taken() {
		return
	}
	publish(m.h, which, false, fs, "")
}

// showWritten shows what a program wrote to a side, which refused it if err is
// not nil. To a side that is not active it has written nothing.
func (b *Bump) showWritten(which Side, fs []tap.Frame, err error) {
	h := b.hub.Load()
	if !h.Active() || !b.sides[which].writes() {
		return
	}
	comment := ""
	if err != nil {
		comment = fmt.Sprintf("bump_%v_refused", which)
	}
	publish(h, which, true, fs, comment)
}

// publish shows frames that came from a side, or went to it.
func publish(h *capture.Hub, which Side, written bool, fs []tap.Frame, comment string) {
	side, dir := capture.High, capture.Out
	if which == Low {
		side, dir = capture.Low, capture.In
	}
	if written {
		dir ^= capture.In | capture.Out
	}
	now := time.Now()
	out := make([]capture.Frame, len(fs))
	for k := range fs {
		f := &fs[k]
		data := bytes.Clone(f.Buf[f.Off : f.Off+f.Len])
		if f.Offload.GSOType == tap.GSONone {
			tap.FinishChecksum(data, f.Offload)
		}
		out[k] = capture.Frame{Side: side, Dir: dir, Time: now, Len: len(data), Comment: comment, Data: data}
	}
	h.Publish(out)
}
