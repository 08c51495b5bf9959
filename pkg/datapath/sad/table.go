package sad

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"sync/atomic"
)

// table is a hash table of pointers with open addressing and linear probing.
// Each slot is one atomic pointer, so a reader sees an element wholly or not at
// all; keys are in the elements, which never change. The one writer edits in
// place and, when half of the slots were ever used, copies what is left to a
// new array and swaps that in. A reader that runs on the old array meanwhile
// sees the state of the moment before.
//
// An element that is replaced stays in its slot; one that is removed leaves a
// grave, which a probe passes over.
type table[V any] struct {
	slots atomic.Pointer[[]atomic.Pointer[V]] // length is a power of two
	grave *V
	hash  func(*V) uint64
	n     int // elements
	used  int // elements and graves
}

const minSlots = 16

func newTable[V any](hash func(*V) uint64) *table[V] {
	t := &table[V]{grave: new(V), hash: hash}
	s := make([]atomic.Pointer[V], minSlots)
	t.slots.Store(&s)
	return t
}

// insert adds v, whose key the caller knows to be absent.
func (t *table[V]) insert(v *V) {
	if s := *t.slots.Load(); (t.used+1)*2 > len(s) {
		t.rebuild()
	}
	if t.put(*t.slots.Load(), v) {
		t.used++
	}
	t.n++
}

// put stores v in the first free slot or grave of its chain; it reports
// whether the slot was free.
func (t *table[V]) put(s []atomic.Pointer[V], v *V) bool {
	mask := uint64(len(s) - 1)
	for h := t.hash(v); ; h++ {
		switch s[h&mask].Load() {
		case nil:
			s[h&mask].Store(v)
			return true
		case t.grave:
			s[h&mask].Store(v)
			return false
		}
	}
}

// rebuild makes an array four times as long as the elements need, without graves.
func (t *table[V]) rebuild() {
	size := minSlots
	for size < (t.n+1)*4 {
		size *= 2
	}
	s := make([]atomic.Pointer[V], size)
	for i := range *t.slots.Load() {
		if v := (*t.slots.Load())[i].Load(); v != nil && v != t.grave {
			t.put(s, v)
		}
	}
	t.used = t.n
	t.slots.Store(&s)
}

// replace puts v, with the same key, in the place of old, or a grave if v is
// nil; it reports whether old was there.
func (t *table[V]) replace(old, v *V) bool {
	s := *t.slots.Load()
	mask := uint64(len(s) - 1)
	for h := t.hash(old); ; h++ {
		switch s[h&mask].Load() {
		case nil:
			return false
		case old:
			if v != nil {
				s[h&mask].Store(v)
				return true
			}
			s[h&mask].Store(t.grave)
			t.n--
			if t.n*8 < len(s) && len(s) > minSlots {
				t.rebuild()
			}
			return true
		}
	}
}

// each calls f for every element until it returns false. Any goroutine may call it.
func (t *table[V]) each(f func(*V) bool) {
	s := *t.slots.Load()
	for i := range s {
		if v := s[i].Load(); v != nil && v != t.grave && !f(v) {
			return
		}
	}
}

// seed keys the hash: peers choose the SPIs of our outbound SAs, and could
// otherwise choose them so that all of them meet in one chain.
type seed [3]uint64

func (s *seed) mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^s[0], b^s[1])
	return hi ^ lo
}

func (s *seed) addr(a netip.Addr) uint64 {
	if a.Is4() {
		b := a.As4()
		return s.mix(uint64(binary.LittleEndian.Uint32(b[:])), s[2])
	}
	b := a.As16()
	return s.mix(binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])^s[2])
}
