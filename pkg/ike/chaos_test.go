package ike

import (
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// TestRekeysCross: two daemons rekey the child SA and the IKE SA whenever they like,
// over a network that loses, repeats and delays. In the end both have one child SA,
// the same keys, and nothing is left over in either missiu.
func TestRekeysCross(t *testing.T) {
	for seed := range uint64(12) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 5))
			n, a, b := pair(t)
			a.acquire(1, addrA, addrB)
			time.Sleep(time.Second)
			synctest.Wait()
			wantPair(t, a, b, 1)
			was := spiSet(a.m)
			var later []*time.Timer
			n.setDrop(func(p packet) bool { // with n.mu held
				switch r.IntN(8) {
				case 0:
					return true
				case 1, 2: // late, and sometimes in time as well
					later = append(later, time.AfterFunc(time.Duration(r.IntN(2500))*time.Millisecond, func() {
						n.mu.Lock()
						defer n.mu.Unlock()
						if c := n.conns[p.to]; c != nil {
							select {
							case c.in <- packet{p.from, p.to, slices.Clone(p.data)}:
							default:
							}
						}
					}))
					return r.IntN(2) == 0
				}
				return false
			})
			for range 30 {
				for _, x := range []*node{a, b} {
					n.mu.Lock()
					k := r.IntN(5)
					n.mu.Unlock()
					switch {
					case k == 0:
						for _, l := range x.snapshot() {
							_ = l.post(func(l *lineage, now time.Time) []sa.Output { return l.sa.Rekey(now) })
						}
					case k < 4:
						for _, p := range x.m.list() {
							if p.Dst == x.cfg.Local[0] {
								x.m.event(keysock.Expire{SAID: p.SAID, Src: p.Src, Mode: ipsec.Transport})
							}
						}
					}
				}
				n.mu.Lock()
				d := time.Duration(r.IntN(3000)) * time.Millisecond
				n.mu.Unlock()
				time.Sleep(d)
			}
			n.setDrop(nil)
			for _, x := range later {
				x.Stop()
			}
			time.Sleep(5 * time.Minute)
			synctest.Wait()
			wantPair(t, a, b, 1)
			if slices.Equal(spiSet(a.m), was) {
				t.Error("nothing has been rekeyed")
			}
			for _, x := range []*node{a, b} {
				x.m.mu.Lock()
				if len(x.m.larval) != 0 {
					t.Errorf("larval SAs left: %v", x.m.larval)
				}
				x.m.mu.Unlock()
				x.mu.Lock()
				if len(x.bySPI) != 1 {
					t.Errorf("%d IKE SAs, want one", len(x.bySPI))
				}
				x.mu.Unlock()
			}
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
			a.stop(t)
			b.stop(t)
		})
		if t.Failed() {
			return
		}
	}
}
