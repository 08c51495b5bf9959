package datapath

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// Several queues of the TAP. The kernel sends a flow by the queue on which its
// last inbound frame was written, or, if none was lately, by one of its choice.
// A flow that changed queues while packets of it wait on one would be overtaken
// by itself, so inbound frames are written where the flow already is, as far as
// that is remembered, else on the queue that its hash says: then it will be
// there. Either way it does not matter by which SA or socket they came.

// homes remembers the queues of flows: by the low bits of their hash, the others
// beside the queue's index.
type homes [8192]atomic.Uint32

const homeQueue = tap.MaxQueues - 1 // mask of the index

// saw notes that a packet of the flow of hash h came by queue q, from 0.
func (t *homes) saw(h uint32, q int) {
	if e, v := &t[h%uint32(len(t))], h&^homeQueue|uint32(q); e.Load() != v {
		e.Store(v)
	}
}

// of is the queue for a frame of the flow of hash h, of n.
func (t *homes) of(h uint32, n int) int {
	if v := t[h%uint32(len(t))].Load(); (v^h)&^homeQueue == 0 && int(v&homeQueue) < n {
		return int(v & homeQueue)
	}
	return int((h >> 16) % uint32(n))
}

// writeTAP writes each frame on the queue of its flow.
func (w *inWorker) writeTAP(fs []tap.Frame) error {
	qs := w.e.queues
	if qs == nil {
		return w.e.writeTAP(nil, fs, &w.n)
	}
	w.of = w.of[:0]
	for k := range fs {
		f := &fs[k]
		w.of = append(w.of, uint8(w.e.homes.of(flowHash(f.Buf[f.Off+etherLen:f.Off+f.Len]), len(qs))))
	}
	var err error
	for q := range qs {
		w.part = w.part[:0]
		for k := range fs {
			if int(w.of[k]) == q {
				w.part = append(w.part, fs[k])
			}
		}
		if e := w.e.writeTAP(qs[q], w.part, &w.n); err == nil {
			err = e
		}
		clear(w.part)
	}
	return err
}

// flowHash is the same for all packets of a flow, of either direction; fragments
// and what hides its ports go by their addresses.
func flowHash(b []byte) uint32 {
	be := binary.BigEndian
	var h uint32
	var ports []byte
	switch {
	case len(b) >= packet.IPv4Len && b[0]>>4 == 4:
		h = be.Uint32(b[12:]) ^ be.Uint32(b[16:])
		if hl := int(b[0]&15) * 4; (b[9] == protoTCP || b[9] == protoUDP) && be.Uint16(b[6:])&0x3fff == 0 && len(b) >= hl+4 {
			ports = b[hl:]
		}
	case len(b) >= packet.IPv6Len && b[0]>>4 == 6:
		for k := 8; k < 40; k += 4 {
			h ^= be.Uint32(b[k:])
		}
		if (b[6] == protoTCP || b[6] == protoUDP) && len(b) >= packet.IPv6Len+4 {
			ports = b[packet.IPv6Len:]
		}
	}
	if ports != nil {
		h ^= uint32(be.Uint16(ports)^be.Uint16(ports[2:])) * 0x9e3779b1
	}
	h = (h ^ h>>16) * 0x85ebca6b
	h = (h ^ h>>13) * 0xc2b2ae35
	return h ^ h>>16
}
