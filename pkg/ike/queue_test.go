package ike

import (
	"slices"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// ACQUIREs of queues bring SAs for them, side by side with each other, but none
// where there is nothing to put them beside.
func TestAcquireQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t, func(_ *Config, m *missiu) { m.queues = 2 })
		ask := func(seq uint32, q ipsec.Queue) {
			a.m.event(keysock.Acquire{Seq: seq, Proto: ipsec.ESP, Src: addrA, Dst: addrB, PolicyID: 1, Mode: ipsec.Transport, ReqID: 7, Queue: q,
				Flow: &ipsec.Flow{Src: addrA, Dst: addrB, Proto: 17, SrcPort: 1, DstPort: 2}})
		}
		ask(1, 2)
		synctest.Wait()
		if got, ok := a.m.failure(1); !ok || got != syscall.ENOENT {
			t.Errorf("without an IKE SA: got %v, %v; want ENOENT", got, ok)
		}
		wantPair(t, a, b, 0)
		a.acquire(2, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		ask(3, 2)
		ask(4, 2) // the same again: one SA answers both
		ask(5, 1)
		synctest.Wait()
		wantPair(t, a, b, 3)
		for _, x := range []*node{a, b} {
			var out, in []ipsec.Queue
			more := 0
			for _, p := range x.m.list() {
				if p.Src == x.cfg.Local[0] {
					out = append(out, p.Queue)
				} else {
					in = append(in, p.Queue)
				}
				if p.PerQueue {
					more++
				}
			}
			slices.Sort(out)
			slices.Sort(in)
			if want := []ipsec.Queue{0, 1, 2}; !slices.Equal(out, want) || !slices.Equal(in, want) || more != 1 {
				t.Errorf("%v: SAs out for %v, in for %v, %d with others; want %v, 1", x.cfg.Local[0], out, in, more, want)
			}
			slices.Sort(x.m.forQueues)
			if want := []ipsec.Queue{0, 1, 2}; !slices.Equal(x.m.forQueues, want) {
				t.Errorf("%v: SPIs for %v, want %v", x.cfg.Local[0], x.m.forQueues, want)
			}
		}
		a.stop(t)
		b.stop(t)
	})
}
