package ike

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
)

// SAs that follow the peer are known by their new names, and leave nothing behind.
func TestMoveSAs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		far := netip.MustParseAddrPort("203.0.113.9:20000")
		ls := b.snapshot()
		if len(ls) != 1 {
			t.Fatalf("%d IKE SAs", len(ls))
		}
		m := sa.PeerMoved{Old: netip.AddrPortFrom(addrA, 500), New: far}
		for _, s := range b.m.list() {
			m.Moved = append(m.Moved, s.SAID)
		}
		if err := ls[0].post(func(*lineage, time.Time) []sa.Output { return []sa.Output{m} }); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		known := map[ipsec.SAID]bool{}
		for _, s := range b.m.list() {
			known[s.SAID] = true
			if there := s.Src == far.Addr() && s.Dst == addrB || s.Dst == far.Addr() && s.Src == addrB; !there {
				t.Errorf("SA %v from %v has not moved", s.SAID, s.Src)
			}
		}
		b.mu.Lock()
		for id := range b.bySA {
			if !known[id] {
				t.Errorf("known: %v, which is not there", id)
			}
		}
		if len(b.bySA) != 2 || len(ls[0].sas) != 2 {
			t.Errorf("%d SAs known, %d of the IKE SA", len(b.bySA), len(ls[0].sas))
		}
		b.mu.Unlock()
		b.stop(t)
		a.stop(t)
		if l := b.m.list(); len(l) != 0 {
			t.Errorf("left behind: %v", ids(l))
		}
	})
}
