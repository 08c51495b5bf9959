package keysock

import (
	"sync"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// eventOf translates what the engine or another client said; nil for messages
// that are no events to us.
func eventOf(m *pfkey.Message) Event {
	if m.Errno != 0 {
		return nil
	}
	switch m.Type {
	case pfkey.Acquire:
		if a, err := takeAcquire(m); err == nil && a.Seq != 0 {
			return a
		}
	case pfkey.Expire:
		return expireOf(m)
	case pfkey.XNATTNewMapping:
		if n, err := takeNewMapping(m); err == nil {
			return n
		}
	case pfkey.Add, pfkey.Update:
		if id, src, err := takeSAID(m); err == nil {
			mode, reqid, err := takeSA2(m)
			if err == nil {
				return SAAdded{id, src, mode, reqid}
			}
		}
	case pfkey.Delete:
		if id, src, err := takeSAID(m); err == nil {
			return SADeleted{id, src}
		}
	case pfkey.Flush:
		if proto, err := protoOf(m.SAType); err == nil {
			return SAsFlushed{proto}
		}
	case pfkey.XSPDAdd, pfkey.XSPDUpdate:
		if p, err := takePolicy(m); err == nil {
			return PolicyAdded{p.Policy}
		}
	case pfkey.XSPDDelete, pfkey.XSPDDelete2, pfkey.XSPDExpire:
		if p, err := takePolicy(m); err == nil {
			return PolicyDeleted{p.Policy}
		}
	case pfkey.XSPDFlush:
		return PoliciesFlushed{}
	case pfkey.XCommit, pfkey.XMigrate:
		return PoliciesChanged{}
	case pfkey.XLost:
		if m.Count != nil {
			return Lost{m.Count.N}
		}
	}
	return nil
}

func expireOf(m *pfkey.Message) Event {
	id, src, err := takeSAID(m)
	if err != nil {
		return nil
	}
	e := Expire{SAID: id, Src: src, Hard: m.Hard != nil}
	if e.Mode, e.ReqID, err = takeSA2(m); err != nil || e.Hard == (m.Soft != nil) {
		return nil
	}
	return e
}

// eventPump carries events to a channel without ever holding up who puts them.
type eventPump struct {
	out chan Event
	max int

	mu     sync.Mutex
	queue  []Event
	lost   uint64
	ending bool
	wake   chan struct{}
	quit   chan struct{}
	once   sync.Once
}

func newEventPump(max int) *eventPump {
	return &eventPump{out: make(chan Event), max: max, wake: make(chan struct{}, 1), quit: make(chan struct{})}
}

// put queues e, or drops and counts it when max events wait.
func (p *eventPump) put(e Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l, ok := e.(Lost); ok && p.lost > 0 {
		p.lost += l.N // one gap
		return
	}
	if len(p.queue) >= p.max {
		p.lost++
		return
	}
	p.tellLost()
	p.queue = append(p.queue, e)
	p.poke()
}

func (p *eventPump) tellLost() {
	if p.lost > 0 {
		p.queue = append(p.queue, Lost{p.lost})
		p.lost = 0
	}
}

func (p *eventPump) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// end lets run return when what is queued has been read.
func (p *eventPump) end() {
	p.mu.Lock()
	p.ending = true
	p.mu.Unlock()
	p.poke()
}

// stop lets run return at once.
func (p *eventPump) stop() { p.once.Do(func() { close(p.quit) }) }

func (p *eventPump) next() (e Event, ending bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		p.tellLost()
	}
	if len(p.queue) == 0 {
		return nil, p.ending
	}
	e = p.queue[0]
	p.queue[0] = nil
	if p.queue = p.queue[1:]; len(p.queue) == 0 {
		p.queue = nil
	}
	return e, false
}

func (p *eventPump) run() {
	defer close(p.out)
	for {
		e, ending := p.next()
		switch {
		case ending:
			return
		case e == nil:
			select {
			case <-p.wake:
			case <-p.quit:
				return
			}
		default:
			select {
			case p.out <- e:
			case <-p.quit:
				return
			}
		}
	}
}

// protocols of a Register call without any.
var allProtocols = []ipsec.Protocol{ipsec.ESP, ipsec.AH}
