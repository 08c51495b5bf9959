package datapath

import (
	"bytes"
	"slices"
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/datapath/sad"
)

// HoldLimit is how many packets of one policy wait for an SA; the oldest falls out.
const HoldLimit = 64

// maxHoldPolicies bounds the memory that packets to many silent peers can take:
// beyond it packets of further policies are dropped rather than held.
const maxHoldPolicies = 1024

// reacquire is how long after asking for an SA the hold queue asks again when
// packets keep coming. The key engine ignores what it already knows.
const reacquire = time.Second

// holdQueue keeps copies of packets that met a Protect policy without an SA.
type holdQueue struct {
	mu       sync.Mutex
	policies map[uint32]*held
}

type held struct {
	packets []heldPacket
	asked   map[sad.OutKey]time.Time
}

type heldPacket struct {
	keys  []sad.OutKey // the SAs that are missing
	any   bool         // keys[0] is, and one of them all lets the packet be looked at again
	data  []byte
	link  []byte // header of its frame
	whole bool   // reassembled here; the sender never asked for one packet of this size
}

// put copies data into the queue of the policy, to wait until there is an SA
// for each of keys, or if any is set for one; then keys[0] is asked for. It returns the SAs that the key engine is to be asked for,
// whether data is held, and whether an older packet was dropped for it.
func (h *holdQueue) put(policy uint32, keys []sad.OutKey, any bool, data, link []byte, whole bool, now time.Time) (ask []sad.OutKey, ok, full bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	q := h.policies[policy]
	if q == nil {
		if len(h.policies) >= maxHoldPolicies {
			return keys, false, false
		}
		q = &held{asked: map[sad.OutKey]time.Time{}}
		if h.policies == nil {
			h.policies = map[uint32]*held{}
		}
		h.policies[policy] = q
	}
	if len(q.packets) >= HoldLimit {
		clear(q.packets[0].data)
		copy(q.packets, q.packets[1:])
		q.packets = q.packets[:HoldLimit-1]
		full = true
	}
	q.packets = append(q.packets, heldPacket{slices.Clone(keys), any, bytes.Clone(data), bytes.Clone(link), whole})
	if any {
		keys = keys[:1]
	}
	for _, k := range keys {
		if last, ok := q.asked[k]; ok && now.Sub(last) < reacquire {
			continue
		}
		if len(q.asked) >= HoldLimit {
			clear(q.asked)
		}
		q.asked[k] = now
		ask = append(ask, k)
	}
	return ask, true, full
}

// installed removes and returns the packets that wait for nothing any more
// now that there are SAs for keys, oldest first within a policy.
func (h *holdQueue) installed(keys []sad.OutKey) []heldPacket {
	return h.take(keys, func(p *heldPacket) bool {
		if p.any {
			return slices.ContainsFunc(p.keys, func(k sad.OutKey) bool { return slices.Contains(keys, k) })
		}
		p.keys = slices.DeleteFunc(p.keys, func(k sad.OutKey) bool { return slices.Contains(keys, k) })
		return len(p.keys) == 0
	})
}

// failed removes and returns the packets that wait for an SA for key.
func (h *holdQueue) failed(key sad.OutKey) []heldPacket {
	return h.take([]sad.OutKey{key}, func(p *heldPacket) bool {
		return slices.Contains(p.keys, key) && (!p.any || p.keys[0] == key)
	})
}

// take removes and returns the packets for which want says yes; the fate of
// keys is known, and they may be asked for anew.
func (h *holdQueue) take(keys []sad.OutKey, want func(*heldPacket) bool) []heldPacket {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []heldPacket
	for id, q := range h.policies {
		for _, k := range keys {
			delete(q.asked, k)
		}
		rest := q.packets[:0]
		for _, p := range q.packets {
			if want(&p) {
				out = append(out, p)
			} else {
				rest = append(rest, p)
			}
		}
		clear(q.packets[len(rest):])
		q.packets = rest
		if len(rest) == 0 {
			delete(h.policies, id)
		}
	}
	return out
}

// len returns how many packets wait.
func (h *holdQueue) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, q := range h.policies {
		n += len(q.packets)
	}
	return n
}
