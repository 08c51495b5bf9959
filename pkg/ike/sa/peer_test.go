package sa

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// answerTo lets b answer a's request in flight by ps.
func (l *lab) answerTo(ps ...ikev2.Payload) {
	l.t.Helper()
	r := l.a.sa.cur.req
	if r == nil {
		l.t.Fatal("no request in flight")
	}
	m := &ikev2.Message{Header: l.b.sa.cur.header(r.exchange, r.id, true), Payloads: ps}
	b, err := m.AppendSealed(nil, l.b.sa.cur.seal)
	if err != nil {
		l.t.Fatal(err)
	}
	l.kept, l.wire = nil, nil
	l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, b}))
}

// What follows each refusal by the peer.
func TestRefusals(t *testing.T) {
	child := func(l *lab) { l.a.do(l.a.sa.AddChild(l.now, reqA(2))) }
	rekey := func(l *lab) { l.a.do(l.a.sa.ChildExpired(l.now, inSPI(l.t, l.a), false)) }
	ike := func(l *lab) { l.a.do(l.a.sa.Rekey(l.now)) }
	del := func(l *lab) { l.a.do(l.a.sa.ChildExpired(l.now, inSPI(l.t, l.a), true)) }
	for _, c := range []struct {
		name     string
		ask      func(*lab)
		n        *ikev2.Notify
		ends     bool
		failed   int // ChildFailed
		children int
		again    bool // another request follows at once
		delayed  bool
	}{
		{"child, NO_ADDITIONAL_SAS", child, notify(ikev2.NO_ADDITIONAL_SAS), false, 1, 1, false, false},
		{"child, unknown error", child, notify(8000), false, 1, 1, false, false},
		{"child, INVALID_SYNTAX", child, notify(ikev2.INVALID_SYNTAX), true, 1, 0, false, false},
		{"child, TEMPORARY_FAILURE", child, notify(ikev2.TEMPORARY_FAILURE), false, 0, 1, false, true},
		{"child, group not offered", child, invalidKE(2), false, 1, 1, false, false},
		{"child, group cut", child, notify(ikev2.INVALID_KE_PAYLOAD, 0), false, 1, 1, false, false},
		{"child, same group", child, invalidKE(31), false, 1, 1, false, false},
		{"rekey, NO_PROPOSAL_CHOSEN", rekey, notify(ikev2.NO_PROPOSAL_CHOSEN), false, 0, 1, false, false},
		{"rekey, TEMPORARY_FAILURE", rekey, notify(ikev2.TEMPORARY_FAILURE), false, 0, 1, false, true},
		{"rekey, CHILD_SA_NOT_FOUND", rekey, notify(ikev2.CHILD_SA_NOT_FOUND), false, 0, 0, true, false},
		{"IKE, NO_PROPOSAL_CHOSEN", ike, notify(ikev2.NO_PROPOSAL_CHOSEN), false, 0, 1, false, false},
		{"IKE, TEMPORARY_FAILURE", ike, notify(ikev2.TEMPORARY_FAILURE), false, 0, 1, false, true},
		{"IKE, INVALID_SYNTAX", ike, notify(ikev2.INVALID_SYNTAX), true, 0, 0, false, false},
		{"IKE, group not offered", ike, invalidKE(2), false, 0, 1, false, false},
		{"IKE, another group", ike, invalidKE(19), false, 0, 1, true, false},
		{"delete, INVALID_SYNTAX", del, notify(ikev2.INVALID_SYNTAX), true, 0, 0, false, false},
		{"delete, unknown error", del, notify(8000), false, 0, 0, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.establish()
			l.stop = func(packet) bool { return true }
			c.ask(l)
			l.answerTo(c.n)
			s := l.a.sa
			if s.failed != c.ends || len(told[ChildFailed](l.a)) != c.failed || len(s.children) != c.children {
				t.Errorf("ends %v, %d ChildFailed, %d child SAs; want %v, %d, %d", s.failed, len(told[ChildFailed](l.a)), len(s.children), c.ends, c.failed, c.children)
			}
			if c.ends {
				var pe *PeerError
				if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != c.n.Type {
					t.Errorf("Failed %v, want %v", f, c.n.Type)
				}
				return
			}
			if again := s.cur.req != nil; again != c.again || (len(s.delayed) == 1) != c.delayed {
				t.Errorf("again %v, delayed %d; want %v, %v", again, len(s.delayed), c.again, c.delayed)
			}
			if !c.again && len(l.a.larval) != 0 {
				t.Errorf("larval SAs left: %v", l.a.larval)
			}
		})
	}
}

// A peer that goes on saying TEMPORARY_FAILURE.
func TestTemporaryFailureForever(t *testing.T) {
	l := quietLab(t)
	l.b.sa.closing = true
	l.b.sa.cur.active = &probe{}
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.settle()
	if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 2 {
		t.Errorf("ChildFailed %v, want one in the end", f)
	}
}

// An IKE SA that cannot be had from the peer's answer ends the lineage.
func TestBadIKERekeyAnswer(t *testing.T) {
	l := newLab(t)
	l.establish()
	l.stop = func(packet) bool { return true }
	l.a.do(l.a.sa.Rekey(l.now))
	l.answerTo(&ikev2.SA{Proposals: []ikev2.Proposal{{Number: 1, Protocol: ikev2.ProtocolIKE, SPI: make([]byte, 8)}}},
		&ikev2.Nonce{Data: make([]byte, 32)}, &ikev2.KE{Method: 31, Data: make([]byte, 32)})
	var le *LocalError
	if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &le) {
		t.Errorf("Failed %v, want one of ours", f)
	}
	l.b.sa.cur.expect++ // the request, which it never saw
	l.let()
	l.run()
	l.b.wantEnd(ErrPeerDeleted)
}

// What cannot be asked for at all.
func TestUnusablePolicy(t *testing.T) {
	out := func(p ipsec.Policy) ChildRequest { return ChildRequest{Seq: 9, Policy: Policy{Out: &p}} }
	esp := []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport}}
	for name, r := range map[string]ChildRequest{
		"no policy":       {Seq: 9},
		"no ESP, no AH":   out(ipsec.Policy{Requests: []ipsec.Request{{Proto: ipsec.IPComp}}}),
		"other addresses": out(ipsec.Policy{Sel: ipsec.Selector{Src: pfx("10.0.0.0/8"), Dst: pfx("10.0.0.0/8")}, Requests: esp}),
		"no algorithms": out(ipsec.Policy{Sel: ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("0.0.0.0/0")}, Requests: esp,
			Proposals: []ipsec.Proposal{{Encr: alg.EncrAESGCM16, EncrMinBits: 1000}}}),
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.establish()
			l.a.do(l.a.sa.AddChild(l.now, r))
			l.settle()
			l.want(1)
			if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 9 {
				t.Errorf("ChildFailed %v, want one", f)
			}
			// In front of a good one, it does not keep the IKE SA from coming up.
			l = newLab(t)
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, r, reqA(1)))
			l.settle()
			l.want(1)
			// Alone, it does.
			l = newLab(t)
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, r))
			l.settle()
			if len(told[Failed](l.a)) != 1 || len(told[ChildFailed](l.a)) != 1 {
				t.Errorf("Failed %v, ChildFailed %v", told[Failed](l.a), told[ChildFailed](l.a))
			}
		})
	}
}

func TestTransport(t *testing.T) {
	any := pfx("0.0.0.0/0")
	sel := ipsec.Selector{Src: any, Dst: any, Proto: 6, DstPort: 23}
	withFaults(t, func(t *testing.T, l *lab) {
		l.b.policies = []Policy{policy(sel.Reverse(), ipsec.Transport, 2)}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		f := &ipsec.Flow{Src: addrA.Addr(), Dst: addrB.Addr(), Proto: 6, SrcPort: 999, DstPort: 23}
		l.a.do(l.a.sa.Start(l.now, ChildRequest{Policy: policy(sel, ipsec.Transport, 1), Flow: f}))
		l.settle()
		l.want(1)
		for _, p := range l.a.sads {
			if p.Mode != ipsec.Transport || p.Encap != nil {
				t.Errorf("%v mode, %+v", p.Mode, p.Encap)
			}
		}
		if q := l.b.queries[0]; q.Mode != ipsec.Transport {
			t.Errorf("asked for %v mode", q.Mode)
		}
		l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
		l.settle()
		l.want(1)
	})
	// Tunnel mode is no answer for a policy that wants transport.
	l := newLab(t)
	l.b.policies = []Policy{policy(sel.Reverse(), ipsec.Tunnel, 2)}
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, ChildRequest{Seq: 3, Policy: policy(sel, ipsec.Transport, 1)}))
	l.settle()
	l.want(0)
	var le *LocalError
	if f := told[ChildFailed](l.a); len(f) != 1 || !errors.As(f[0].Err, &le) {
		t.Errorf("ChildFailed %v, want one of ours", f)
	}
}

// The NAT in front of a gives it another address: the child SAs are replaced.
func TestPeerMovesAddress(t *testing.T) {
	l := newLab(t)
	l.behind(true, false)
	l.establish()
	l.nat = &nat{}
	l.nat.add(ap("10.0.0.1:4500"), ap("203.0.113.9:20000"))
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.settle()
	l.a.do(l.a.sa.Delete(l.now)) // nothing of the old address is left behind
	if len(l.b.sads) != 4 || len(told[Rekeyed](l.b)) != 1 {
		t.Errorf("%d SAs, Rekeyed %v; want 4, one", len(l.b.sads), told[Rekeyed](l.b))
	}
	for id, p := range l.b.sads {
		if id.Dst != netip.MustParseAddr("203.0.113.9") && p.Src != netip.MustParseAddr("203.0.113.9") {
			t.Errorf("SA %v from %v is not with the new address", id, p.Src)
		}
	}
	l.settle()
	l.b.wantEnd(ErrPeerDeleted)
}

// No secret shows in anything but the keys of InstallChild.
func TestNoSecretInOutputs(t *testing.T) {
	l := newLab(t)
	l.establish()
	secrets := []string{"a very shared secret", hex.EncodeToString(l.a.sa.cur.keys.D.Bytes())}
	for _, p := range l.a.sads {
		secrets = append(secrets, hex.EncodeToString(p.EncrKey.Bytes()))
	}
	l.a.do(l.a.sa.Rekey(l.now))
	l.settle()
	l.a.do(l.a.sa.Delete(l.now))
	l.settle()
	for _, n := range []*node{l.a, l.b} {
		for _, o := range n.events {
			if _, ok := o.(Send); ok {
				continue
			}
			text := fmt.Sprintf("%+v %#v %x", o, o, o)
			for _, s := range secrets {
				if strings.Contains(text, s) || strings.Contains(text, fmt.Sprint([]byte(s))) {
					t.Errorf("%s: %T shows a secret", n.name, o)
				}
			}
		}
	}
}

func TestTransitions(t *testing.T) {
	for from := range numStates {
		for to := range numStates {
			i := &ikeSA{state: from}
			func() {
				defer func() {
					if (recover() == nil) != allowed(from, to) {
						t.Errorf("from %v to %v: allowed %v", from, to, allowed(from, to))
					}
				}()
				i.to(to)
				if i.state != to {
					t.Errorf("state %v, want %v", i.state, to)
				}
			}()
		}
		if from < StateDead && !allowed(from, StateDead) {
			t.Errorf("%v cannot end", from)
		}
		if allowed(StateGone, from) {
			t.Errorf("%v follows gone", from)
		}
	}
}
