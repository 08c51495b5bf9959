package sa

import (
	"math/rand/v2"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/proto/ikev2"
)

// hybrid gives the child SAs of both sides an additional key exchange, or two.
func (l *lab) hybrid(add ...[]alg.KE) {
	if len(add) == 0 {
		add = [][]alg.KE{{alg.KEMLKEM768}}
	}
	for _, n := range []*node{l.a, l.b} {
		n.rule.PFS, n.rule.ChildAddKE = []alg.KE{alg.KEX25519}, add
	}
}

// count returns how many messages of an exchange there were, however often and in
// how many fragments they were sent.
func (l *lab) count(x ikev2.ExchangeType) int {
	seen := map[string]bool{}
	for _, p := range l.all {
		if p.data[18] == byte(x) {
			seen[string(p.data[:16])+string(p.data[19:24])] = true
		}
	}
	return len(seen)
}

// CREATE_CHILD_SA  SA, Ni, KE(x25519)   -->  <--  SA, Nr, KE, N(link)
// IKE_FOLLOWUP_KE  KE(ml-kem-768), N    -->  <--  KE, N(link)
// IKE_FOLLOWUP_KE  KE(ecp384), N        -->  <--  KE
func TestChildSeveralKeyExchanges(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.hybrid([]alg.KE{alg.KEMLKEM768}, []alg.KE{alg.KEECP384})
		l.establish()
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.settle()
		l.want(2)
		if n := l.count(ikev2.IKE_FOLLOWUP_KE); n != 4 {
			t.Errorf("%d messages of IKE_FOLLOWUP_KE, want 4", n)
		}
		c := l.b.sa.children[1]
		if m := c.suite.AddKE.Methods(); len(m) != 2 {
			t.Errorf("suite %v, want two additional key exchanges", c.suite)
		}
		l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
		l.settle()
		l.want(2)
	})
}

// An IKE SA with additional key exchanges is rekeyed with as many.
func TestRekeyIKESeveralKeyExchanges(t *testing.T) {
	for _, side := range []string{"initiator", "responder"} {
		withFaults(t, func(t *testing.T, l *lab) {
			l.establish()
			n := l.a
			if side == "responder" {
				n = l.b
			}
			n.do(n.sa.Rekey(l.now))
			l.settle()
			l.step(l.now.Add(linger + 1))
			l.want(1)
			if n := l.count(ikev2.IKE_FOLLOWUP_KE); n != 2 {
				t.Errorf("%d messages of IKE_FOLLOWUP_KE, want 2", n)
			}
			if n.sa.cur.suite.AddKE.Methods() == nil {
				t.Errorf("suite %v", n.sa.cur.suite)
			}
		})
	}
}

// An additional key exchange that either side can do without.
func TestChildAddKEOptional(t *testing.T) {
	for _, c := range []struct {
		a, b [][]alg.KE
		want int // messages of IKE_FOLLOWUP_KE
		ok   bool
	}{
		{[][]alg.KE{{alg.KEMLKEM768, alg.KENone}}, nil, 0, true},
		{nil, [][]alg.KE{{alg.KEMLKEM768, alg.KENone}}, 0, true},
		{[][]alg.KE{{alg.KEMLKEM768, alg.KENone}}, [][]alg.KE{{alg.KEMLKEM1024, alg.KEMLKEM768}}, 2, true},
		{[][]alg.KE{{alg.KEMLKEM768}}, nil, 0, false},
		{nil, [][]alg.KE{{alg.KEMLKEM768}}, 0, false},
	} {
		l := newLab(t)
		l.a.rule.ChildAddKE, l.b.rule.ChildAddKE = c.a, c.b
		l.establish()
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.settle()
		n := 1
		if c.ok {
			n = 2
		}
		l.want(n)
		if got := l.count(ikev2.IKE_FOLLOWUP_KE); got != c.want {
			t.Errorf("%v, %v: %d messages of IKE_FOLLOWUP_KE, want %d", c.a, c.b, got, c.want)
		}
	}
}

// Both sides rekey the same child SA, or the IKE SA, with additional key
// exchanges, and their messages meet in every order.
func TestFollowupCollisions(t *testing.T) {
	for _, what := range []string{"child", "IKE"} {
		for seed := range 150 {
			l := newLab(t)
			l.hybrid()
			l.establish()
			r := rand.New(rand.NewPCG(uint64(seed), 7))
			l.a.nonces(byte(r.Uint32()), byte(r.Uint32()))
			l.b.nonces(byte(r.Uint32()), byte(r.Uint32()))
			for _, n := range []*node{l.a, l.b} {
				if what == "child" {
					n.do(n.sa.ChildExpired(l.now, inSPI(t, n), false))
				} else {
					n.do(n.sa.Rekey(l.now))
				}
			}
			// What is in flight arrives in any order, but nothing is lost.
			for len(l.wire) > 0 {
				k := r.IntN(len(l.wire))
				p := l.wire[k]
				l.wire = append(l.wire[:k], l.wire[k+1:]...)
				l.deliver(p)
			}
			l.settle()
			l.step(l.now.Add(staleAfter + linger + 1)) // a redundant one that its maker has never heard of
			l.want(1)
			l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
			l.settle()
			l.want(2)
			if t.Failed() {
				t.Fatalf("%s, seed %d", what, seed)
			}
		}
	}
}

// The same under loss, duplicates and delays, with all there is at once.
func TestFollowupChaos(t *testing.T) {
	for seed := range 60 {
		l := newLab(t)
		l.hybrid([]alg.KE{alg.KEMLKEM768}, []alg.KE{alg.KEX448, alg.KENone})
		for _, n := range []*node{l.a, l.b} {
			n.rule.DPD = 0
		}
		l.establish()
		l.a.policies = []Policy{reqA(0).Policy}
		r := rand.New(rand.NewPCG(uint64(seed), 9))
		l.chance = r
		for range 6 {
			n := l.a
			if r.IntN(2) == 0 {
				n = l.b
			}
			if len(n.sa.children) == 0 || n.sa.failed {
				break
			}
			switch r.IntN(3) {
			case 0:
				n.do(n.sa.Rekey(l.now))
			default:
				n.do(n.sa.ChildExpired(l.now, inSPI(t, n), false))
			}
			l.run()
		}
		l.settle()
		l.chance = nil
		l.settle()
		l.step(l.now.Add(staleAfter + linger + 1))
		l.settle()
		if l.a.sa.failed || l.b.sa.failed {
			t.Fatalf("seed %d: a %s, b %s", seed, l.a.describe(), l.b.describe())
		}
		l.want(1)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// What a responder says to key exchanges that it does not expect.
func TestFollowupRefused(t *testing.T) {
	key, err := dh.Generate(alg.KEMLKEM768, nil)
	if err != nil {
		t.Fatal(err)
	}
	ke := &ikev2.KE{Method: ikev2.KEML_KEM_768, Data: key.Public()}
	// begin lets b wait for the first exchange of a series, and returns its link.
	begin := func(t *testing.T) (*lab, *ikev2.Notify) {
		l := newLab(t)
		l.hybrid()
		l.establish()
		l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_FOLLOWUP_KE) }
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.run()
		if l.b.sa.cur.follow == nil {
			t.Fatal("no series")
		}
		l.stop, l.kept = nil, nil
		l.a.sa.cur.nextID--
		return l, notify(ikev2.ADDITIONAL_KEY_EXCHANGE, l.b.sa.cur.follow.link...)
	}
	for _, c := range []struct {
		name string
		ps   func(link *ikev2.Notify) []ikev2.Payload
		want ikev2.NotifyType
		ends bool
	}{
		{"no link", func(*ikev2.Notify) []ikev2.Payload { return []ikev2.Payload{ke} }, ikev2.STATE_NOT_FOUND, false},
		{"another link", func(*ikev2.Notify) []ikev2.Payload {
			return []ikev2.Payload{ke, notify(ikev2.ADDITIONAL_KEY_EXCHANGE, 1, 2, 3)}
		}, ikev2.STATE_NOT_FOUND, false},
		{"no KE", func(link *ikev2.Notify) []ikev2.Payload { return []ikev2.Payload{link} }, ikev2.INVALID_SYNTAX, true},
		{"another method", func(link *ikev2.Notify) []ikev2.Payload {
			return []ikev2.Payload{&ikev2.KE{Method: ikev2.KECURVE25519, Data: make([]byte, 32)}, link}
		}, ikev2.INVALID_SYNTAX, true},
		{"cut", func(link *ikev2.Notify) []ikev2.Payload {
			return []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: ke.Data[:1000]}, link}
		}, ikev2.INVALID_SYNTAX, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, link := begin(t)
			ps := l.answer(l.craft(ikev2.IKE_FOLLOWUP_KE, c.ps(link)...))
			if n := refusal(ps); n == nil || n.Type != c.want || l.b.sa.failed != c.ends {
				t.Errorf("answer %v, ends %v; want %v, %v", names(ps), l.b.sa.failed, c.want, c.ends)
			}
		})
	}
	t.Run("forgotten", func(t *testing.T) {
		l, link := begin(t)
		l.b.do(l.b.sa.Tick(l.now.Add(followWait)))
		if l.b.sa.cur.follow != nil || len(l.b.larval) != 0 {
			t.Errorf("series left, larval SAs %v", l.b.larval)
		}
		if n := refusal(l.answer(l.craft(ikev2.IKE_FOLLOWUP_KE, ke, link))); n == nil || n.Type != ikev2.STATE_NOT_FOUND {
			t.Errorf("answer %v, want STATE_NOT_FOUND", n)
		}
	})
	t.Run("deleted meanwhile", func(t *testing.T) {
		l, _ := begin(t)
		l.b.do(l.b.sa.Drop(l.now, ErrClosed))
		if len(l.b.larval) != 0 {
			t.Errorf("larval SAs left: %v", l.b.larval)
		}
	})
}

// An initiator that is told STATE_NOT_FOUND begins anew; one that gets nonsense
// gives up.
func TestFollowupAnswers(t *testing.T) {
	for _, c := range []struct {
		name   string
		ps     []ikev2.Payload
		failed int
		again  bool
	}{
		{"STATE_NOT_FOUND", []ikev2.Payload{notify(ikev2.STATE_NOT_FOUND)}, 0, true},
		{"TEMPORARY_FAILURE", []ikev2.Payload{notify(ikev2.TEMPORARY_FAILURE)}, 0, true},
		{"INVALID_KE_PAYLOAD", []ikev2.Payload{invalidKE(19)}, 1, false},
		{"another method", []ikev2.Payload{&ikev2.KE{Method: ikev2.KECURVE25519, Data: make([]byte, 32)}}, 1, false},
		{"cut", []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: make([]byte, 1087)}}, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.hybrid()
			l.establish()
			l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_FOLLOWUP_KE) }
			l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
			l.run()
			l.answerTo(c.ps...)
			if f := told[ChildFailed](l.a); len(f) != c.failed || (len(l.a.sa.delayed) == 1) != c.again {
				t.Errorf("%d ChildFailed, %d tries to come; want %d, again %v", len(f), len(l.a.sa.delayed), c.failed, c.again)
			}
			if len(l.a.larval) != 0 || l.a.sa.failed {
				t.Errorf("larval SAs left: %v; failed %v", l.a.larval, l.a.sa.failed)
			}
		})
	}
}

// FuzzKE: KE payloads of any length and method, where one is expected: in
// IKE_SA_INIT, IKE_INTERMEDIATE and IKE_FOLLOWUP_KE.
func FuzzKE(f *testing.F) {
	for _, ke := range alg.AllKE() {
		k, err := dh.Generate(ke, nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint16(ke), make([]byte, len(k.Public())))
		f.Add(uint16(ke), []byte{})
	}
	f.Fuzz(func(t *testing.T, method uint16, data []byte) {
		if len(data) > 60000 {
			return
		}
		ke := &ikev2.KE{Method: ikev2.KEID(method), Data: data}
		l := newLab(t)
		l.a.rule.Proposals[0].KE = append(l.a.rule.Proposals[0].KE, alg.KEMLKEM1024)
		m := &ikev2.Message{Header: ikev2.Header{InitiatorSPI: 5, Exchange: ikev2.IKE_SA_INIT, Flags: ikev2.FlagInitiator},
			Payloads: []ikev2.Payload{proposal.OfferIKE(l.a.rule.Proposals, nil), ke, &ikev2.Nonce{Data: make([]byte, 32)}}}
		b, err := m.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		r := NewResponder(l.b.cfg, []*pad.Rule{l.a.rule})
		r.Receive(l.now, Datagram{addrB, addrA, b})

		l.hybrid()
		l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_INTERMEDIATE) }
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, reqA(1)))
		l.run()
		if l.b.sa != nil && l.b.sa.cur != nil && l.a.sa.cur != nil && l.a.sa.cur.state == StateIntermediate {
			l.a.sa.cur.nextID--
			l.stop = nil
			l.answer(l.craft(ikev2.IKE_INTERMEDIATE, ke))
		}

		l = newLab(t)
		l.hybrid()
		l.establish()
		l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_FOLLOWUP_KE) }
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.run()
		l.stop = nil
		l.a.sa.cur.nextID--
		l.answer(l.craft(ikev2.IKE_FOLLOWUP_KE, ke, notify(ikev2.ADDITIONAL_KEY_EXCHANGE, l.b.sa.cur.follow.link...)))
		if l.b.sa.failed && len(l.b.sads) != 0 {
			t.Errorf("ended, but %d SAs", len(l.b.sads))
		}
	})
}
