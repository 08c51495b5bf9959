package sa

import (
	"errors"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// quietLab is established and without liveness checks.
func quietLab(t *testing.T) *lab {
	l := newLab(t)
	l.a.rule.DPD, l.b.rule.DPD = 0, 0
	l.establish()
	return l
}

// at checks that n sends nothing a nanosecond before when, and something at it.
func (n *node) at(when time.Time) {
	n.t.Helper()
	if d := n.sa.Deadline(); !d.Equal(when) {
		n.t.Errorf("%s: deadline %v, want %v", n.name, d, when)
	}
	before := len(n.events)
	n.do(n.sa.Tick(when.Add(-1)))
	if len(n.events) != before {
		n.t.Errorf("%s: acts a nanosecond early: %T", n.name, n.events[before])
	}
	n.now = when
	n.do(n.sa.Tick(when))
	if len(n.events) == before {
		n.t.Errorf("%s: does nothing at its deadline", n.name)
	}
}

func TestLiveness(t *testing.T) {
	l := newLab(t)
	l.b.rule.DPD = 0
	l.establish()
	start := l.now
	l.a.sa.Heard(l.now.Add(10 * time.Second)) // a child SA received something
	l.a.at(start.Add(70 * time.Second))
	l.run()
	if l.a.busy() {
		t.Fatalf("a: the check is not answered")
	}
	// No answer any more.
	l.stop = func(packet) bool { return true }
	l.a.at(start.Add(130 * time.Second))
	l.step(l.now.Add(152 * time.Second))
	l.a.wantEnd(ErrTimeout)
	if len(l.kept) != 9 {
		t.Errorf("%d transmissions, want 9", len(l.kept))
	}
}

func TestIKELifetime(t *testing.T) {
	l := newLab(t)
	l.a.rule.DPD, l.b.rule.DPD = 0, 0
	l.a.rule.IKE.Hard, l.a.rule.IKE.Soft = 100*time.Minute, 90*time.Minute
	l.establish()
	start := l.now
	soft := l.a.sa.cur.rekeyAt
	if d := soft.Sub(start); d > 90*time.Minute || d < 85*time.Minute {
		t.Fatalf("rekeys after %v, want 85 to 90 minutes", d)
	}
	old := l.a.sa.cur
	l.a.at(soft)
	l.settle()
	l.step(l.now.Add(linger + 1))
	l.want(1)
	if l.a.sa.cur == old {
		t.Errorf("not rekeyed")
	}
	// Without rekeying it ends at the hard limit, and the peer hears it.
	l = newLab(t)
	l.a.rule.DPD, l.b.rule.DPD = 0, 0
	l.a.rule.IKE.Hard, l.a.rule.IKE.Soft = time.Hour, time.Hour
	l.establish()
	l.a.at(l.now.Add(time.Hour))
	l.run()
	l.a.wantEnd(ErrExpired)
	l.b.wantEnd(ErrPeerDeleted)
}

func TestHalfOpen(t *testing.T) {
	l := newLab(t)
	l.stop = func(p packet) bool { return len(p.data) > 0 && p.data[18] == byte(ikev2.IKE_AUTH) }
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.run()
	if l.b.sa.cur.state != StateHalfOpen {
		t.Fatalf("b: %v", l.b.sa.cur.state)
	}
	l.b.at(l.now.Add(60 * time.Second))
	l.b.wantEnd(ErrExpired)
	if !l.b.sa.done {
		t.Errorf("b: not done")
	}
}

func TestTemporaryFailure(t *testing.T) {
	l := quietLab(t)
	l.b.sa.closing = true // refuses what is new
	l.b.sa.cur.active = &probe{}
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.run()
	if len(l.a.sa.delayed) != 1 || len(l.a.larval) != 0 {
		t.Fatalf("a: %d delayed, larval %v; want 1, none", len(l.a.sa.delayed), l.a.larval)
	}
	d := l.a.sa.Deadline()
	if w := d.Sub(l.now); w < retryMin || w > retryMin+retrySpread {
		t.Errorf("tries again after %v", w)
	}
	l.b.sa.closing, l.b.sa.cur.active = false, nil
	l.a.at(d)
	l.settle()
	l.want(2)
}

func TestChildLife(t *testing.T) {
	s := quietLab(t).a.sa
	life := func(packets, bytes uint64, add time.Duration) ipsec.Lifetime {
		return ipsec.Lifetime{Packets: packets, Bytes: bytes, AddTime: add}
	}
	s.rule.ChildHard, s.rule.ChildSoft, s.rule.RekeyFuzz = life(0, 0, time.Hour), life(0, 0, 54*time.Minute), 0
	for _, c := range []struct {
		name                     string
		hard, soft, wantH, wantS ipsec.Lifetime
	}{
		{"rule's", life(0, 0, 0), life(0, 0, 0), life(0, 0, time.Hour), life(0, 0, 54*time.Minute)},
		{"policy's", life(0, 0, 100*time.Second), life(0, 0, 50*time.Second), life(0, 0, 100*time.Second), life(0, 0, 50*time.Second)},
		{"policy's hard only", life(0, 0, 100*time.Second), life(0, 0, 0), life(0, 0, 100*time.Second), life(0, 0, 90*time.Second)},
		{"field by field", life(0, 1000, 0), life(0, 500, 0), life(0, 1000, time.Hour), life(0, 500, 54*time.Minute)},
		{"never by us", life(1000, 0, 0), life(1000, 0, 0), life(1000, 0, time.Hour), life(0, 0, 54*time.Minute)},
	} {
		h, w := s.childLife(proposal.ChildSuite{Hard: c.hard, Soft: c.soft})
		if h != c.wantH || w != c.wantS {
			t.Errorf("%s: %+v, %+v; want %+v, %+v", c.name, h, w, c.wantH, c.wantS)
		}
	}
	s.rule.RekeyFuzz = 5
	seen := map[time.Duration]bool{}
	for range 50 {
		_, w := s.childLife(proposal.ChildSuite{})
		if w.AddTime > 54*time.Minute || w.AddTime < 51*time.Minute || w.AddTime%time.Second != 0 {
			t.Fatalf("soft limit %v, want whole seconds from 51 to 54 minutes", w.AddTime)
		}
		seen[w.AddTime] = true
	}
	if len(seen) < 10 {
		t.Errorf("%d different soft limits of 50", len(seen))
	}
}

// The owner's Delete while the window is taken; and when nobody answers.
func TestDeleteWhileBusy(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.a.do(l.a.sa.AddChild(l.now, reqA(3)))
		l.a.do(l.a.sa.Delete(l.now))
		l.settle()
		l.a.wantEnd(ErrClosed)
		l.b.wantEnd(ErrPeerDeleted)
		if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 3 || !errors.Is(f[0].Err, ErrClosed) {
			t.Errorf("a: ChildFailed %v, want that of ACQUIRE 3", f)
		}
	})
}

func TestDeleteUnanswered(t *testing.T) {
	l := quietLab(t)
	l.stop = func(packet) bool { return true }
	l.a.do(l.a.sa.Delete(l.now))
	l.step(l.now.Add(152 * time.Second))
	l.a.wantEnd(ErrClosed)
	if !l.a.sa.done {
		t.Errorf("a: not done")
	}
}

func TestDrop(t *testing.T) {
	l := quietLab(t)
	n := l.sent
	l.a.do(l.a.sa.Drop(l.now, ErrClosed))
	l.a.wantEnd(ErrClosed)
	if l.sent != n || !l.a.sa.done || len(l.a.spis) != 0 {
		t.Errorf("a: %d messages, done %v, SPIs %v", l.sent-n, l.a.sa.done, l.a.spis)
	}
	if o := l.a.sa.Tick(l.now.Add(time.Hour)); o != nil {
		t.Errorf("outputs after Done: %v", o)
	}
}

// Delete before anything is established ends at once.
func TestDeleteEarly(t *testing.T) {
	l := newLab(t)
	l.stop = func(packet) bool { return true }
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(4)))
	l.a.do(l.a.sa.Delete(l.now))
	l.a.wantEnd(ErrClosed)
	if f := told[ChildFailed](l.a); !l.a.sa.done || len(f) != 1 || f[0].Seq != 4 {
		t.Errorf("a: done %v, ChildFailed %v", l.a.sa.done, f)
	}
}

func TestStatus(t *testing.T) {
	l := quietLab(t)
	st := l.a.sa.Status()
	if st.State != StateEstablished || len(st.Children) != 1 || !st.Initiator || st.Children[0].ReqID != 11 || st.Local == 0 {
		t.Errorf("got %+v", st)
	}
	for s := range numStates {
		if s.String() == "" {
			t.Errorf("state %d without a name", s)
		}
	}
	if State(99).String() != "State(99)" {
		t.Errorf("got %v", State(99))
	}
}

func TestKeepaliveDeadline(t *testing.T) {
	l := newLab(t)
	l.a.rule.DPD, l.b.rule.DPD = 0, 0
	l.behind(true, false)
	l.establish()
	start := l.now
	l.a.at(start.Add(20 * time.Second))
	l.a.at(start.Add(40 * time.Second))
	if k := told[Keepalive](l.a); len(k) != 2 || k[0].Remote.Port() != 4500 {
		t.Errorf("keepalives %v, want two to port 4500", k)
	}
	// Any other message serves as well.
	l.now = start.Add(50 * time.Second)
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.run()
	l.a.at(start.Add(70 * time.Second))
	l.a.rule.Keepalive = 0
	if d := l.a.sa.keepaliveAt(); !d.IsZero() {
		t.Errorf("keepalive at %v although turned off", d)
	}
}

// A last response is repeated for a while; a replaced IKE SA that the peer does
// not delete is forgotten.
func TestLeftOverIKESAs(t *testing.T) {
	l := quietLab(t)
	l.b.do(l.b.sa.Delete(l.now))
	l.run()
	if l.a.sa.done || !l.a.sa.failed {
		t.Fatalf("a: done %v, failed %v; want false, true", l.a.sa.done, l.a.sa.failed)
	}
	l.a.at(l.now.Add(linger))
	if !l.a.sa.done {
		t.Errorf("a: not done")
	}

	l = quietLab(t)
	l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.INFORMATIONAL) }
	l.a.do(l.a.sa.Rekey(l.now))
	l.run()
	old := l.b.sa.ikes[0]
	if old.state != StateRekeyed {
		t.Fatalf("b: %v, want %v", old.state, StateRekeyed)
	}
	l.b.at(l.now.Add(staleAfter))
	if old.state != StateGone || l.b.spis[old.local] {
		t.Errorf("b: %v, want %v", old.state, StateGone)
	}
}
