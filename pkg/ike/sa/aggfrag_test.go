package sa

import (
	"fmt"
	"testing"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// wantAggfrag asserts the mode of all installed SAs of both.
func (l *lab) wantAggfrag(want bool) {
	l.t.Helper()
	for _, n := range []*node{l.a, l.b} {
		for id, p := range n.sads {
			if p.AggFrag != want {
				l.t.Errorf("%s: SA %v: AGGFRAG %v, want %v", n.name, id, p.AggFrag, want)
			}
		}
	}
}

// TestAggfrag: the mode is used if both want it, by IKE_AUTH, by
// CREATE_CHILD_SA and when either side rekeys; who requires it has no child SA
// without.
func TestAggfrag(t *testing.T) {
	no, prefer, require := pad.AggFragNo, pad.AggFragPrefer, pad.AggFragRequire
	for _, c := range []struct {
		a, b      pad.AggFrag
		used, any bool
	}{
		{no, no, false, true}, {no, prefer, false, true}, {prefer, no, false, true},
		{prefer, prefer, true, true}, {prefer, require, true, true}, {require, prefer, true, true}, {require, require, true, true},
		{require, no, false, false}, {no, require, false, false},
	} {
		t.Run(fmt.Sprint(c.a, c.b), func(t *testing.T) {
			l := newLab(t)
			l.a.rule.AggFrag, l.b.rule.AggFrag = c.a, c.b
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1), reqA(2)))
			l.settle()
			if !c.any {
				l.want(0)
				if f := told[ChildFailed](l.a); len(f) != 2 {
					t.Errorf("%d failures, want 2", len(f))
				}
				return
			}
			l.want(2)
			l.wantAggfrag(c.used)
			for _, n := range []*node{l.a, l.b} {
				n.do(n.sa.ChildExpired(l.now, inSPI(t, n), false))
				l.settle()
				l.want(2)
				l.wantAggfrag(c.used)
			}
		})
	}
}

// TestAggfragOnlyTunnelsOfESP: other child SAs are not concerned, even where
// the rule requires it.
func TestAggfragOnlyTunnelsOfESP(t *testing.T) {
	for name, edit := range map[string]func(p *Policy){
		"transport": func(p *Policy) {
			*p = policy(ipsec.Selector{Src: p.Out.Sel.Src, Dst: p.Out.Sel.Dst}, ipsec.Transport, 5)
		},
		"AH":           func(p *Policy) { p.Out.Requests[0].Proto = ipsec.AH },
		"with IPComp":  func(p *Policy) { p.Out.Requests = append(p.Out.Requests, ipsec.Request{Proto: ipsec.IPComp}) },
		"alternatives": func(p *Policy) { p.Out.Proposals = []ipsec.Proposal{{}, {Shape: ipsec.ShapeAHESP}} },
		"no policy":    func(p *Policy) { p.Out = nil },
	} {
		p := tunnel("10.1.0.0/16", "10.2.0.0/16", 11)
		if !p.mayAggregate() {
			t.Fatal("ESP in tunnel mode does not")
		}
		if edit(&p); p.mayAggregate() {
			t.Errorf("%s: does", name)
		}
	}
}

// TestAggfragPeers: what other peers say.
func TestAggfragPeers(t *testing.T) {
	use := func(data ...byte) *ikev2.Notify { return notify(ikev2.USE_AGGFRAG, data...) }
	for _, c := range []struct {
		name     string
		n        *ikev2.Notify
		asks, ok bool
	}{
		{"plain", use(0), true, true},
		{"no fragments", use(1), true, true},
		{"unknown bits", use(0xfc), true, true},
		{"congestion information", use(2), true, false},
		{"no octet", use(), true, false},
		{"two octets", use(0, 0), true, false},
	} {
		asks, err := peerAggfrag([]ikev2.Payload{c.n})
		if asks != c.asks || (err == nil) != c.ok {
			t.Errorf("%s: got %v, %v", c.name, asks, err)
		}
		for _, ours := range []pad.AggFrag{pad.AggFragNo, pad.AggFragPrefer} {
			// As an answer.
			l := newLab(t)
			l.establish()
			l.clearEvents()
			l.a.rule.AggFrag = ours
			l.addAltered(func(ps []ikev2.Payload) []ikev2.Payload { return append(ps, c.n) })
			want := 0
			if !c.ok || ours == pad.AggFragNo {
				want = 1
			}
			if f := told[ChildFailed](l.a); len(f) != want {
				t.Errorf("%s as an answer, %v: %d failures, want %d", c.name, ours, len(f), want)
			}
		}

		// As a request: what we cannot follow is declined, and the child SA
		// is one of plain tunnel mode.
		l := newLab(t)
		l.b.rule.AggFrag = pad.AggFragPrefer
		l.establish()
		g, rf := l.b.sa.grant(l.b.sa.cur, requestOfChild(t, l, c.n), false, nil)
		if rf != nil || g.aggfrag != c.ok {
			t.Errorf("%s as a request: %+v, %v", c.name, g, rf)
		}
	}
}

// requestOfChild is a request of a for a child SA, with n.
func requestOfChild(t *testing.T, l *lab, n *ikev2.Notify) []ikev2.Payload {
	t.Helper()
	o, lerr := l.a.sa.newOffer(l.a.sa.cur, reqA(3), nil)
	if lerr != nil {
		t.Fatal(lerr)
	}
	o.spi = 0x12345
	return append(o.payloads(true), n)
}
