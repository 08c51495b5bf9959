package sa

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
)

// Each collision is two requests that cross:
//
//	a  --- request 1 ---.   .--- request 2 ---  b
//	                      X
//	a  <-- request 2 ---'   '--> request 1 ---  b
func (l *lab) cross(f func()) {
	l.t.Helper()
	l.stop = func(packet) bool { return true }
	f()
	if len(l.kept) != 2 {
		l.t.Fatalf("%d requests, want 2", len(l.kept))
	}
	l.let()
	l.settle()
	l.chance = nil
	l.fault.n = 0
	l.step(l.now.Add(linger + 1))
}

// Both sides rekey the same child SA. The lowest of the four nonces decides:
// what it helped to make goes, by the hand of its maker.
func TestCollideChildRekey(t *testing.T) {
	for _, c := range []struct {
		name string
		// nonces of a's request, a's answer, b's request, b's answer
		aReq, aRes, bReq, bRes byte
		redundant              string // whose SA goes
	}{
		{"a's request lowest", 0, 9, 9, 9, "a"},
		{"b's answer lowest", 9, 9, 9, 0, "a"},
		{"b's request lowest", 9, 9, 0, 9, "b"},
		{"a's answer lowest", 9, 0, 9, 9, "b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				l.establish()
				l.clearEvents()
				l.a.nonces(c.aReq, c.aRes)
				l.b.nonces(c.bReq, c.bRes)
				old := inSPI(t, l.a)
				faulty := l.fault.n > l.sent
				l.cross(func() {
					l.a.do(l.a.sa.ChildExpired(l.now, old, false))
					l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
				})
				l.want(1)
				if l.a.sads[old] != nil {
					t.Errorf("old SA %v is still there", old)
				}
				// With a fault, one side may not have noticed the collision.
				if faulty {
					return
				}
				// Which SA is left: a's own has a's inbound SPI from NeedSPI of
				// its request, the first that it got.
				left := inSPI(t, l.a).SPI
				want := ipsec.SPI(1<<28 + 2)
				if c.redundant == "a" {
					want++
				}
				if left != want {
					t.Errorf("left at a: %v, want %v", left, want)
				}
			})
		})
	}
}

func TestCollideIKERekey(t *testing.T) {
	for _, c := range []struct {
		name                   string
		aReq, aRes, bReq, bRes byte
		redundant              string
	}{
		{"a's request lowest", 0, 9, 9, 9, "a"},
		{"b's answer lowest", 9, 9, 9, 0, "a"},
		{"b's request lowest", 9, 9, 0, 9, "b"},
		{"a's answer lowest", 9, 0, 9, 9, "b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				l.establish()
				l.a.nonces(c.aReq, c.aRes)
				l.b.nonces(c.bReq, c.bRes)
				faulty := l.fault.n > l.sent
				l.cross(func() {
					l.a.do(l.a.sa.Rekey(l.now))
					l.b.do(l.b.sa.Rekey(l.now))
				})
				l.step(l.now.Add(staleAfter))
				l.want(1)
				if !faulty && l.a.sa.cur.initiator != (c.redundant == "b") {
					t.Errorf("left: made by a %v, redundant that of %s", l.a.sa.cur.initiator, c.redundant)
				}
				l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
				l.settle()
				l.want(2)
			})
		})
	}
}

// One side rekeys the IKE SA, the other the child SA: both hear
// TEMPORARY_FAILURE and try again (RFC 7296, 2.25.1).
func TestCollideIKEAndChildRekey(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		old, oldIKE := inSPI(t, l.b), l.a.sa.cur.local
		l.cross(func() {
			l.a.do(l.a.sa.Rekey(l.now))
			l.b.do(l.b.sa.ChildExpired(l.now, old, false))
		})
		l.want(1)
		if l.b.sads[old] != nil || l.a.sa.cur.local == oldIKE {
			t.Errorf("not rekeyed: child SA %v, IKE SA %v", l.b.sads[old] != nil, l.a.sa.cur.local == oldIKE)
		}
	})
}

func TestCollideChildRekeyAndDelete(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.cross(func() {
			l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
			l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), true))
		})
		if n := len(l.a.sads) / 2; n > 1 {
			t.Errorf("%d child SAs, want at most 1", n)
		}
		l.want(len(l.a.sads) / 2)
	})
}

func TestCollideChildDelete(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.cross(func() {
			l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), true))
			l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), true))
		})
		l.want(0)
	})
}

func TestCollideIKERekeyAndDelete(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.cross(func() {
			l.a.do(l.a.sa.Rekey(l.now))
			l.b.do(l.b.sa.Delete(l.now))
		})
		l.a.wantEnd(ErrPeerDeleted)
		l.b.wantEnd(ErrClosed)
	})
}

func TestCollideIKEDelete(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.cross(func() {
			l.a.do(l.a.sa.Delete(l.now))
			l.b.do(l.b.sa.Delete(l.now))
		})
		l.a.wantEnd(ErrClosed)
		l.b.wantEnd(ErrClosed)
	})
}

func TestCollideIKERekeyAndChildDelete(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.cross(func() {
			l.a.do(l.a.sa.Rekey(l.now))
			l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), true))
		})
		l.want(0)
	})
}

// Everything at random: what is asked for, by whom, when, and what the network
// does. In the end both sides agree.
func TestRandom(t *testing.T) {
	n := 400
	if testing.Short() {
		n = 50
	}
	if v, err := strconv.Atoi(os.Getenv("SA_SEEDS")); err == nil {
		n = v
	}
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			l := newLab(t)
			r := rand.New(rand.NewPCG(uint64(seed), 1))
			for _, n := range []*node{l.a, l.b} {
				n.rule.DPD = 0
			}
			l.establish()
			l.a.policies = []Policy{reqA(0).Policy}
			l.chance = r
			for range 12 {
				n := l.a
				if r.IntN(2) == 0 {
					n = l.b
				}
				n.holdSPI = r.IntN(4) == 0
				switch k := r.IntN(8); {
				case k < 2:
					n.do(n.sa.AddChild(l.now, ChildRequest{Seq: 9, Policy: n.policies[0]}))
				case k < 3:
					n.do(n.sa.Rekey(l.now))
				case k < 7 && len(n.sa.children) > 0:
					c := n.sa.children[r.IntN(len(n.sa.children))]
					n.do(n.sa.ChildExpired(l.now, ipsec.SAID{Proto: ipsec.ESP, Dst: c.inDst, SPI: c.in}, k == 6))
				}
				if r.IntN(2) == 0 {
					l.step(l.now.Add(time.Duration(r.IntN(800)) * time.Millisecond))
				}
			}
			for _, n := range []*node{l.a, l.b} {
				n.holdSPI = false
				n.giveSPIs()
			}
			end := r.IntN(4)
			if end == 0 { // in the middle of things
				l.a.do(l.a.sa.Delete(l.now))
			} else {
				l.settle()
			}
			l.chance = nil
			l.settle()
			l.step(l.now.Add(staleAfter + time.Minute))
			l.settle()
			if end == 0 {
				l.a.wantEnd(ErrClosed)
				l.b.wantEnd(ErrPeerDeleted)
				return
			}
			l.want(len(l.a.sa.children))
		})
	}
}
