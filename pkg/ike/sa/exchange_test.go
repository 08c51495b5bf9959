package sa

import (
	"testing"
	"time"

	"github.com/missiu/missiu/proto/ikev2"
)

// a                                          b
// IKE_SA_INIT  SA, KE, Ni              -->
//
//	<--   SA, KE, Nr
//
// IKE_AUTH     IDi, AUTH, SA, TSi, TSr -->
//
//	<--   IDr, AUTH, SA, TSi, TSr
func TestEstablish(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.want(1)
		for _, n := range []*node{l.a, l.b} {
			if e := told[Established](n); len(e) != 1 || len(told[InstallChild](n)) != 1 {
				t.Errorf("%s: %d Established, %d InstallChild; want one each", n.name, len(e), len(told[InstallChild](n)))
			}
		}
		// The answer comes after the SAs are there.
		installed := false
		for _, o := range l.b.events {
			switch o := o.(type) {
			case InstallChild:
				installed = true
			case Send:
				if o.Data[18] == 35 && !installed {
					t.Errorf("IKE_AUTH response before InstallChild")
				}
			}
		}
	})
}

func TestAddChild(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.settle()
		l.want(2)
		if g := told[InstallChild](l.a); g[1].Seq != 2 {
			t.Errorf("ACQUIRE %d installed, want 2", g[1].Seq)
		}
	})
}

// Either side rekeys the child SA and deletes the old one.
func TestRekeyChild(t *testing.T) {
	for _, side := range []string{"initiator", "responder"} {
		t.Run(side, func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				l.establish()
				n := l.a
				if side == "responder" {
					n = l.b
				}
				old := inSPI(t, n)
				n.do(n.sa.ChildExpired(l.now, old, false))
				l.settle()
				l.want(1)
				for _, n := range []*node{l.a, l.b} {
					if r := told[Rekeyed](n); len(r) != 1 {
						t.Errorf("%s: Rekeyed %v, want one", n.name, r)
					}
				}
				if n.sads[old] != nil {
					t.Errorf("old SA %v is still there", old)
				}
			})
		})
	}
}

// A rekeys, b answers. What b sends meanwhile must be on the old SA, until a has
// the answer for certain; and b is never without an SA to send on (RFC 7296, 2.8).
func TestRekeyChildSendsOnOld(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.clearEvents()
		old := inSPI(t, l.a)
		l.a.do(l.a.sa.ChildExpired(l.now, old, false))
		l.settle()
		l.want(1)
		can, steps := 1, "" // outbound SAs of b
		for _, o := range l.b.events {
			switch o := o.(type) {
			case InstallChild:
				if o.Out != nil {
					t.Errorf("outbound SA at once")
				}
				steps += "in "
			case InstallOut:
				can++
				steps += "out "
			case RemoveChild:
				if o.Out.SPI != 0 {
					can--
					steps += "old gone "
				}
			case Send:
				if !o.Again {
					steps += "answer "
				}
			}
			if can == 0 {
				t.Errorf("no outbound SA")
			}
		}
		if want := "in answer out old gone answer "; steps != want {
			t.Errorf("b: %q, want %q", steps, want)
		}
	})
}

// A peer that keeps the old SA is sent to on the new one all the same: once it has
// asked for something else, or, if it says nothing, after a while.
func TestRekeyChildByPeerThatKeepsOld(t *testing.T) {
	rekey := func(t *testing.T) *lab {
		l := newLab(t)
		l.establish()
		l.clearEvents()
		l.stop = func(p packet) bool { return p.from == l.b }
		l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
		l.run() // a never sees the answer: it does not close the old one
		l.a.sa.cur.req.due = l.now.Add(time.Hour)
		return l
	}
	out := func(l *lab, want int) {
		t.Helper()
		if got := len(told[InstallOut](l.b)); got != want || len(l.b.sads) != 3+want {
			t.Errorf("%d outbound SAs installed, %d SAs in all; want %d, %d", got, len(l.b.sads), want, 3+want)
		}
	}
	l := rekey(t)
	out(l, 0)
	l.b.do(l.b.sa.Receive(l.now, l.b.forge(l.b.sa.cur, ikev2.INFORMATIONAL)))
	out(l, 1)

	l = rekey(t)
	l.now = l.now.Add(heldFor - 1)
	l.b.do(l.b.sa.Tick(l.now))
	out(l, 0)
	l.b.do(l.b.sa.Receive(l.now, Datagram{addrB, addrA, l.all[len(l.all)-1].data})) // not yet, then
	l.now = l.now.Add(1)
	l.b.do(l.b.sa.Tick(l.now))
	out(l, 0)
	l.now = l.now.Add(heldFor - 1)
	if d := l.b.sa.Deadline(); d.After(l.now) {
		t.Errorf("deadline %v, want %v", d, l.now)
	}
	l.b.do(l.b.sa.Tick(l.now))
	out(l, 1)
}

func TestRekeyIKE(t *testing.T) {
	for _, side := range []string{"initiator", "responder"} {
		t.Run(side, func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				l.establish()
				n := l.a
				if side == "responder" {
					n = l.b
				}
				old := n.sa.cur.local
				n.do(n.sa.Rekey(l.now))
				l.settle()
				l.step(l.now.Add(linger + 1)) // the old one's last response
				l.want(1)
				if n.sa.cur.local == old || n.sa.cur.initiator != true {
					t.Errorf("%s: not rekeyed", n.name)
				}
				// The new IKE SA works both ways.
				l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
				l.settle()
				l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
				l.settle()
				l.want(2)
			})
		})
	}
}

func TestDelete(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.a.do(l.a.sa.Delete(l.now))
		l.settle()
		l.a.wantEnd(ErrClosed)
		l.b.wantEnd(ErrPeerDeleted)
		l.step(l.now.Add(linger + 1))
		if !l.a.sa.done || !l.b.sa.done || len(l.a.spis)+len(l.b.spis) != 0 {
			t.Errorf("not done: a %s, b %s", l.a.describe(), l.b.describe())
		}
	})
}

func TestDeleteChild(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), true))
		l.settle()
		l.want(0)
	})
}
