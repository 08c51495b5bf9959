package datapath

import (
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Bounds of the early queue: enough for the packets of some milliseconds, and
// little enough for anybody who guesses the SPI of a larval SA.
const (
	earlyLimit = 256
	earlyAge   = time.Second
)

// earlyQueue keeps packets of ESP, AH or IPComp whose SA has its SPI and no keys
// yet. When an SA
// is rekeyed the responder has the new one before its answer has reached the
// initiator, and may use it at once (RFC 7296, 2.8): its packets overtake the
// keys. They wait for them here, or every rekeying would lose some.
type earlyQueue struct {
	mu sync.Mutex
	q  []earlyPacket
}

// earlyPacket is an ESP packet that goes through the batch, or what unwrap had
// in hand: an IP packet and the SAs by which it came.
type earlyPacket struct {
	id   ipsec.SAID
	j    inJob
	b    []byte // the ESP packet, or the IP packet; within j.buf
	peel bool   // b is an IP packet
	l    layers
	at   time.Time
}

// put copies the packet b of j; false if there is no room.
func (e *earlyQueue) put(id ipsec.SAID, j inJob, b []byte, now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.room(now) {
		return false
	}
	from := j.espOff
	if !j.udp {
		from = j.outOff
	}
	const room = headroom + etherLen
	buf := make([]byte, room+j.espOff-from+len(b)+tailroom)
	copy(buf[room:], j.buf[from:j.espOff+len(b)])
	j.outOff, j.espOff, j.buf = room, room+j.espOff-from, buf
	e.q = append(e.q, earlyPacket{id: id, j: j, b: buf[j.espOff : j.espOff+len(b)], at: now})
	return true
}

// putPeel copies the IP packet b, which came by l, likewise.
func (e *earlyQueue) putPeel(id ipsec.SAID, b []byte, l layers, now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.room(now) {
		return false
	}
	const front = headroom + etherLen
	buf := make([]byte, front+len(b)+tailroom)
	copy(buf[front:], b)
	e.q = append(e.q, earlyPacket{id: id, j: inJob{buf: buf, outOff: front}, b: buf[front : front+len(b)], peel: true, l: l, at: now})
	return true
}

// room forgets what is too old, and tells whether one more may wait.
func (e *earlyQueue) room(now time.Time) bool {
	for len(e.q) > 0 && now.Sub(e.q[0].at) > earlyAge {
		e.q = e.q[1:]
	}
	return len(e.q) < earlyLimit
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
	ps := w.ready(now)
	for k := range ps {
		w.resume(&ps[k], now)
	}
	return w.flush(now)
}

// ready takes the packets out of the early queue whose keys have come.
func (w *inWorker) ready(now time.Time) []earlyPacket {
	ps, old := w.e.early.take(func(id ipsec.SAID) bool {
		sa := w.e.c.SAD.Lookup(id)
		return sa == nil || sa.State() != sad.Larval
	}, now)
	w.n.add(DropInNoSA, old)
	return ps
}

// resume carries on with a packet that waited.
func (w *inWorker) resume(p *earlyPacket, now time.Time) {
	switch {
	case !p.peel:
		w.esp(&p.j, p.b, now)
	case packet.Decode(p.b, &w.inner):
		w.unwrap(p.j.buf, p.j.outOff, len(p.b), p.l, now)
	}
}
