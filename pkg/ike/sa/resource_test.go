package sa

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// newQueues makes a lab whose nodes have so many queues.
func newQueues(t testing.TB, a, b int) *lab {
	l := newLab(t)
	l.a.cfg.Queues, l.b.cfg.Queues = a, b
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	return l
}

// queuesOf are the queues of the SAs that a node has installed, of each
// direction; more of them that say that there may be others.
func (n *node) queuesOf() (in, out []ipsec.Queue, more int) {
	for id, p := range n.sads {
		if p.PerQueue {
			more++
		}
		if id.Dst == n.cfg.Local.Addr() {
			in = append(in, p.Queue)
		} else {
			out = append(out, p.Queue)
		}
	}
	slices.Sort(in)
	slices.Sort(out)
	return in, out, more
}

// wantQueues asserts them, the same in both directions. of is how many outbound
// SAs lead to others.
func (n *node) wantQueues(step string, of int, want ...ipsec.Queue) {
	n.t.Helper()
	in, out, more := n.queuesOf()
	if !slices.Equal(in, want) || !slices.Equal(out, want) || more != of {
		n.t.Errorf("%s: %s has SAs in for queues %v, out %v, %d with others; want %v, %d", step, n.name, in, out, more, want, of)
	}
}

func forQueue(seq uint32, q ipsec.Queue) ChildRequest {
	r := reqA(seq)
	r.Queue = q
	return r
}

// TestPerQueue: one SA for any queue, then others by queue, asked for by both
// sides; each side puts them on its own queues, and rekeying leaves them there.
func TestPerQueue(t *testing.T) {
	l := newQueues(t, 3, 2)
	l.a.rule.PFS = []alg.KE{alg.KEX25519} // which the first cannot have
	l.b.rule.PFS = l.a.rule.PFS
	l.a.policies = []Policy{reqA(0).Policy}
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.settle()
	l.want(1)
	l.a.wantQueues("first", 1, 0)
	l.b.wantQueues("first", 1, 0)

	l.a.do(l.a.sa.AddChild(l.now, forQueue(2, 3)))
	l.settle()
	l.a.wantQueues("a's", 1, 0, 3)
	l.b.wantQueues("a's", 1, 0, 1)
	r := ChildRequest{Seq: 5, Policy: l.b.policies[0], Queue: 2}
	l.b.do(l.b.sa.AddChild(l.now, r))
	l.a.do(l.a.sa.AddChild(l.now, forQueue(3, 1)))
	l.settle()
	l.want(4)
	// Which goes first is no matter: a puts b's on 1 or 2, b a's on 1.
	if in, _, _ := l.b.queuesOf(); !slices.Equal(in, []ipsec.Queue{0, 1, 1, 2}) && !slices.Equal(in, []ipsec.Queue{0, 1, 2, 2}) {
		t.Errorf("b has %v", in)
	}
	if f := append(told[ChildFailed](l.a), told[ChildFailed](l.b)...); len(f) != 0 {
		t.Errorf("failures: %v", f)
	}
	first := l.a.sads[ipsec.SAID{Proto: ipsec.ESP, Dst: addrA.Addr(), SPI: inSPI(t, l.a).SPI}]
	for id, p := range l.a.sads {
		if p.Encr != first.Encr || p.ESN != first.ESN || p.Mode != first.Mode || len(p.SrcTS) != 1 {
			t.Errorf("SA %v has %v, mode %v, not what the first has", id, p.Encr, p.Mode)
		}
	}
	inA, _, _ := l.a.queuesOf()
	inB, _, _ := l.b.queuesOf()
	for _, n := range []*node{l.a, l.b} {
		for _, c := range slices.Clone(n.sa.children) {
			n.do(n.sa.ChildExpired(l.now, ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}, false))
			l.settle()
		}
		l.want(4)
		l.a.wantQueues(n.name+" rekeyed", 1, inA...)
		l.b.wantQueues(n.name+" rekeyed", 1, inB...)
	}
	// A new IKE SA has them too.
	l.a.do(l.a.sa.Rekey(l.now))
	l.settle()
	l.step(l.now.Add(linger))
	l.a.do(l.a.sa.AddChild(l.now, forQueue(7, 2)))
	l.settle()
	l.want(5)
	// One goes: the others stay, and it may come again.
	c := l.a.sa.children[1]
	l.a.do(l.a.sa.ChildLost(l.now, ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}, errors.New("idle")))
	l.settle()
	l.want(4)
	l.a.do(l.a.sa.AddChild(l.now, forQueue(8, c.queue)))
	l.settle()
	l.want(5)
}

// TestPerQueueChoices: what both rules say decides, and whether anybody has
// several queues.
func TestPerQueueChoices(t *testing.T) {
	no, prefer, require := pad.PerQueueNo, pad.PerQueuePrefer, pad.PerQueueRequire
	for _, c := range []struct {
		a, b            pad.PerQueue
		queuesA         int
		child, perQueue bool
	}{
		{prefer, prefer, 2, true, true}, {prefer, prefer, 1, true, false}, {prefer, no, 2, true, false}, {no, prefer, 2, true, false},
		{require, prefer, 1, true, true}, {prefer, require, 2, true, true}, {require, no, 2, false, false}, {no, require, 2, false, false},
		{prefer, require, 1, false, false},
	} {
		for n, by := range []string{"IKE_AUTH", "CREATE_CHILD_SA"} {
			t.Run(fmt.Sprint(c.a, c.b, c.queuesA, by), func(t *testing.T) {
				l := newQueues(t, c.queuesA, 0)
				l.a.rule.PerQueue, l.b.rule.PerQueue = c.a, c.b
				first := []ChildRequest{reqA(1)}
				l.a.do(l.a.sa.Start(l.now, first[n:]...))
				l.settle()
				if n == 1 {
					l.a.do(l.a.sa.AddChild(l.now, first[0]))
					l.settle()
				}
				if !c.child {
					l.want(0)
					if f := told[ChildFailed](l.a); len(f) != 1 {
						t.Errorf("%d failures, want 1", len(f))
					}
					return
				}
				l.want(1)
				if _, _, more := l.a.queuesOf(); (more == 1) != c.perQueue {
					t.Errorf("%d SAs with others beside them", more)
				}
				l.clearEvents()
				l.a.do(l.a.sa.AddChild(l.now, forQueue(3, 1)))
				l.settle()
				failed := told[ChildFailed](l.a)
				if (len(failed) == 0) != c.perQueue {
					t.Errorf("an SA for a queue: %v", failed)
				}
				if !c.perQueue && !errors.Is(failed[0].Err, errNoFallback) {
					t.Errorf("failed with %v", failed[0].Err)
				}
			})
		}
	}
}

// TestPerQueueLimit: a peer may make so many and no more; it is told so by
// TS_MAX_QUEUE, remembers it, and everything else goes on.
func TestPerQueueLimit(t *testing.T) {
	l := newQueues(t, 2, 2)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.settle()
	for n := range maxResources {
		l.a.do(l.a.sa.AddChild(l.now, forQueue(uint32(n+2), ipsec.Queue(n%2+1))))
		l.settle()
	}
	l.want(1 + maxResources)
	l.clearEvents()
	for n := range 2 {
		sent := l.sent
		l.a.do(l.a.sa.AddChild(l.now, forQueue(uint32(100+n), 1)))
		l.settle()
		f := told[ChildFailed](l.a)
		if len(f) != n+1 || f[n].Seq != uint32(100+n) {
			t.Fatalf("failures %v", f)
		}
		pe := (*PeerError)(nil)
		if n == 0 && (!errors.As(f[0].Err, &pe) || pe.Notify != ikev2.TS_MAX_QUEUE) || n == 1 && (!errors.Is(f[1].Err, errQueuesFull) || l.sent != sent) {
			t.Errorf("request %d: %v, %d messages", n, f[n].Err, l.sent-sent)
		}
	}
	l.want(1 + maxResources)
	// Rekeying is not one more, and one for any queue is another matter.
	c := l.a.sa.children[3]
	l.a.do(l.a.sa.ChildExpired(l.now, ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}, false))
	l.settle()
	l.want(1 + maxResources)
	l.a.do(l.a.sa.AddChild(l.now, reqA(200)))
	l.settle()
	l.want(2 + maxResources)
	// After the fallback SA was rekeyed, it may be tried again.
	fb := l.a.sa.children[slices.IndexFunc(l.a.sa.children, func(c *child) bool { return c.full })]
	l.a.do(l.a.sa.ChildExpired(l.now, ipsec.SAID{Proto: fb.proto, Dst: fb.inDst, SPI: fb.in}, false))
	l.settle()
	if slices.ContainsFunc(l.a.sa.children, func(c *child) bool { return c.full }) {
		t.Error("still full")
	}
}

// TestPerQueueHostile: what peers may say in SA_RESOURCE_INFO changes nothing,
// and what they ask for is never less than what policy and the first SA have.
func TestPerQueueHostile(t *testing.T) {
	for _, data := range [][]byte{nil, {0}, make([]byte, 60000)} {
		l := newQueues(t, 2, 2)
		l.establish()
		fb := l.b.sa.children[0]
		if fb.resource != true || fb.queue != 0 {
			t.Fatalf("first child SA: resource %v, queue %d", fb.resource, fb.queue)
		}
		g, rf := l.b.sa.grant(l.b.sa.cur, requestOfChild(t, l, notify(ikev2.SA_RESOURCE_INFO, data...)), false, nil)
		if rf != nil || g.queue != 1 || !g.resource {
			t.Errorf("%d octets: %+v, %v", len(data), g, rf)
		}
		// With other algorithms than the first.
		fb.suite.Bits = 1
		if g, rf = l.b.sa.grant(l.b.sa.cur, requestOfChild(t, l, notify(ikev2.SA_RESOURCE_INFO)), false, nil); rf == nil || rf.n.Type != ikev2.NO_PROPOSAL_CHOSEN {
			t.Errorf("other algorithms: %+v, %v", g, rf)
		}
		// The first is about to go: then it is a first one.
		fb.deleting = true
		if g, rf = l.b.sa.grant(l.b.sa.cur, requestOfChild(t, l, notify(ikev2.SA_RESOURCE_INFO)), false, nil); rf != nil || g.queue != 0 || !g.resource {
			t.Errorf("without a first: %+v, %v", g, rf)
		}
	}
	for name, edit := range map[string]func(p *Policy){
		"of each flow": func(p *Policy) { p.Out.Flags |= ipsec.PolicyPerFlow },
		"bundle": func(p *Policy) {
			p.Out.Requests = append(p.Out.Requests, ipsec.Request{Proto: ipsec.AH, Mode: ipsec.Tunnel})
		},
		"no policy": func(p *Policy) { p.Out = nil },
	} {
		p := tunnel("10.1.0.0/16", "10.2.0.0/16", 11)
		if !p.mayQueue() {
			t.Fatal("ESP in tunnel mode has no SAs for queues")
		}
		if edit(&p); p.mayQueue() {
			t.Errorf("%s: has SAs for queues", name)
		}
	}
}

// A peer has no more child SAs than the rule's limit, and may replace those.
func TestChildLimit(t *testing.T) {
	l := newLab(t)
	l.b.rule.ChildLimit = 3
	l.establish()
	for n := range 4 {
		l.a.do(l.a.sa.AddChild(l.now, reqA(uint32(2+n))))
		l.settle()
	}
	l.want(3)
	var pe *PeerError
	if f := told[ChildFailed](l.a); len(f) != 2 || !errors.As(f[1].Err, &pe) || pe.Notify != ikev2.NO_ADDITIONAL_SAS {
		t.Errorf("a: ChildFailed %v, want NO_ADDITIONAL_SAS twice", f)
	}
	if n := l.b.sa.Status().Counters.Surplus; n != 2 {
		t.Errorf("%d counted, want 2", n)
	}
	_, outs := l.a.sa.RekeyChildren(l.now)
	l.a.do(outs)
	l.settle()
	l.want(3)
	l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), true))
	l.settle()
	l.clearEvents()
	l.a.do(l.a.sa.AddChild(l.now, reqA(9)))
	l.b.do(l.b.sa.AddChild(l.now, ChildRequest{Seq: 9, Policy: l.b.policies[0]})) // ours has no limit here
	l.settle()
	if f := told[ChildFailed](l.a); len(f) != 0 {
		t.Errorf("a: ChildFailed %v where there is room", f)
	}
}

// A peer that replaces and replaces, and deletes nothing, is stopped too.
func TestChildLimitOfReplaced(t *testing.T) {
	l := newLab(t)
	l.b.rule.ChildLimit = 3
	l.establish()
	for n := range 5 {
		o, failed := l.a.sa.newOffer(l.a.sa.cur, reqA(2), nil)
		if failed != nil {
			t.Fatal(failed)
		}
		o.spi, o.ni = ipsec.SPI(0x5000+n), make([]byte, 32)
		for i := range o.proposals {
			o.proposals[i].KE = nil
		}
		newest := l.b.sa.children[len(l.b.sa.children)-1]
		ps := l.answer(l.craft(ikev2.CREATE_CHILD_SA, append(o.payloads(false),
			&ikev2.Notify{Protocol: ikev2.ProtocolESP, SPI: proposal.SPIBytes(newest.outSPI), Type: ikev2.REKEY_SA})...))
		if f := refusal(ps); (f != nil) != (n >= 3) || f != nil && f.Type != ikev2.TEMPORARY_FAILURE {
			t.Errorf("request %d: refused by %v", n, f)
		}
	}
	if n := len(l.b.sa.children); n != 4 {
		t.Errorf("%d child SAs, want 4", n)
	}
}
