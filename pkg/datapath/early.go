package datapath

import (
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
)

// Bounds of the early queue: enough for the packets of some milliseconds, and
// little enough for anybody who guesses the SPI of a larval SA.
const (
	earlyLimit = 256
	earlyAge   = time.Second
)

// earlyQueue keeps ESP packets whose SA has its SPI and no keys yet. When an SA
// is rekeyed the responder has the new one before its answer has reached the
// initiator, and may use it at once (RFC 7296, 2.8): its packets overtake the
// keys. They wait for them here, or every rekeying would lose some.
type earlyQueue struct {
	mu sync.Mutex
	q  []earlyPacket
}

type earlyPacket struct {
	id ipsec.SAID
	j  inJob
	b  []byte // the ESP packet, within j.buf
	at time.Time
}

// put copies the packet b of j; false if there is no room.
func (e *earlyQueue) put(id ipsec.SAID, j inJob, b []byte, now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.q) > 0 && now.Sub(e.q[0].at) > earlyAge {
		e.q = e.q[1:]
	}
	if len(e.q) >= earlyLimit {
		return false
	}
	from := j.espOff
	if j.outer.Version != 0 {
		from = j.outOff
	}
	const room = headroom + etherLen
	buf := make([]byte, room+j.espOff-from+len(b)+tailroom)
	copy(buf[room:], j.buf[from:j.espOff+len(b)])
	j.outOff, j.espOff, j.buf = room, room+j.espOff-from, buf
	e.q = append(e.q, earlyPacket{id, j, buf[j.espOff : j.espOff+len(b)], now})
	return true
}

// take removes the packets for which ready says yes, in order, and forgets
// those that are too old, whose number it returns.
func (e *earlyQueue) take(ready func(ipsec.SAID) bool, now time.Time) (out []earlyPacket, old uint) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var rest []earlyPacket
	for _, p := range e.q {
		switch {
		case now.Sub(p.at) > earlyAge:
			old++
		case ready(p.id):
			out = append(out, p)
		default:
			rest = append(rest, p)
		}
	}
	e.q = rest
	return out, old
}

// receiveEarly opens what waited for keys that have come.
func (w *inWorker) receiveEarly(now time.Time) error {
	ps, old := w.e.early.take(func(id ipsec.SAID) bool {
		sa := w.e.c.SAD.Lookup(id)
		return sa == nil || sa.T != nil
	}, now)
	w.n.add(DropInNoSA, old)
	for k := range ps {
		w.esp(ps[k].j, ps[k].id.Dst, ps[k].b, now)
	}
	return w.flush(now)
}
