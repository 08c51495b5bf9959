package sa

import (
	"errors"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// initRequests returns a's IKE_SA_INIT requests, without repetitions.
func (l *lab) initRequests() []*ikev2.Message {
	var ms []*ikev2.Message
	seen := map[string]bool{}
	for _, s := range told[Send](l.a) {
		if m, err := ikev2.Parse(s.Data); err == nil && m.Exchange == ikev2.IKE_SA_INIT && !seen[string(s.Data)] {
			seen[string(s.Data)] = true
			ms = append(ms, m)
		}
	}
	return ms
}

// IKE_SA_INIT  SA, KE, Ni             -->
//
//	<--  N(COOKIE)
//
// IKE_SA_INIT  N(COOKIE), SA, KE, Ni  -->
func TestCookie(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.b.cookie = []byte("secret")
		l.establish()
		l.want(1)
		ms := l.initRequests()
		if len(ms) != 2 {
			t.Fatalf("%d requests, want 2", len(ms))
		}
		sameRest(t, ms)
		if n, ok := ms[1].Payloads[0].(*ikev2.Notify); !ok || n.Type != ikev2.COOKIE {
			t.Errorf("first payload %v, want the cookie", ms[1].Payloads[0].PayloadType())
		}
	})
}

// A cookie costs a round trip and nothing else; and a peer that demands it, and then
// does not believe us, is believed soon.
func TestCookieAtOnce(t *testing.T) {
	for _, secret := range []string{"a very shared secret", "another"} {
		l := newLab(t)
		l.b.cookie = []byte("secret")
		l.b.rule.PSK.Remote = ipsec.NewKey([]byte(secret))
		start := l.now
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, reqA(1)))
		l.run()
		if secret != "another" {
			l.want(1)
			continue
		}
		for !l.a.sa.failed && l.now.Sub(start) < time.Minute {
			l.step(l.a.sa.Deadline())
		}
		var pe *PeerError
		if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.AUTHENTICATION_FAILED || l.now.Sub(start) > 2*time.Second {
			t.Errorf("Failed %v after %v, want AUTHENTICATION_FAILED within 2 s", f, l.now.Sub(start))
		}
		if n := l.count(ikev2.IKE_AUTH); n != 2 {
			t.Errorf("%d messages of IKE_AUTH, want 2", n)
		}
	}
}

// sameRest checks that SPI, message ID, nonce and offer stay the same.
func sameRest(t *testing.T, ms []*ikev2.Message) {
	t.Helper()
	n := ikev2.Find[*ikev2.Nonce](ms[0].Payloads)
	for _, m := range ms[1:] {
		if m.Header != ms[0].Header || string(ikev2.Find[*ikev2.Nonce](m.Payloads).Data) != string(n.Data) {
			t.Errorf("header %+v or nonce changed from %+v", m.Header, ms[0].Header)
		}
	}
}

// groups lets a try ECP256 first, which b does not have.
func (l *lab) groups() {
	l.a.rule.Proposals = []proposal.IKE{{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 128}},
		PRF: []alg.PRF{alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEECP256, alg.KEX25519}}}
	l.b.rule.Proposals = []proposal.IKE{{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 128}},
		PRF: []alg.PRF{alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEX25519}}}
}

// IKE_SA_INIT  SA, KE(ecp256), Ni   -->
//
//	<--  N(INVALID_KE_PAYLOAD, x25519)
//
// IKE_SA_INIT  SA, KE(x25519), Ni   -->
func TestInvalidKE(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.groups()
		l.establish()
		l.want(1)
		ms := l.initRequests()
		if len(ms) != 2 {
			t.Fatalf("%d requests, want 2", len(ms))
		}
		sameRest(t, ms)
	})
}

func TestCookieAndInvalidKE(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.groups()
		l.b.cookie = []byte("secret")
		l.establish()
		l.want(1)
		sameRest(t, l.initRequests())
	})
}

func TestCheckCookie(t *testing.T) {
	l := newLab(t)
	l.b.cookie = []byte("secret")
	l.establish()
	m := l.initRequests()[1]
	if !CheckCookie([]byte("secret"), 1, addrA, m) {
		t.Errorf("good cookie refused")
	}
	for name, ok := range map[string]bool{
		"other secret":  CheckCookie([]byte("Secret"), 1, addrA, m),
		"other version": CheckCookie([]byte("secret"), 2, addrA, m),
		"other address": CheckCookie([]byte("secret"), 1, addrB, m),
		"no cookie":     CheckCookie([]byte("secret"), 1, addrA, l.initRequests()[0]),
		"empty":         CheckCookie([]byte("secret"), 1, addrA, &ikev2.Message{Header: m.Header}),
	} {
		if ok {
			t.Errorf("%s: accepted", name)
		}
	}
}

// An error in IKE_SA_INIT is not authentic: it counts when the request was repeated
// and refused each time, and the wait for a better answer is over.
func TestNoProposal(t *testing.T) {
	l := newLab(t)
	l.b.rule.Proposals = []proposal.IKE{{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESCBC, Bits: 128}},
		Integ: []alg.Integ{alg.IntegHMACSHA384}, PRF: []alg.PRF{alg.PRFHMACSHA1}, KE: []alg.KE{alg.KEMODP2048}}}
	l.a.rule.Proposals = l.a.rule.Proposals[:1]
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(7)))
	l.run()
	var le *LocalError
	if f := told[Failed](l.b); len(f) != 1 || !errors.As(f[0].Err, &le) || le.Notify != ikev2.NO_PROPOSAL_CHOSEN || !l.b.sa.done {
		t.Fatalf("b: Failed %v, done %v; want NO_PROPOSAL_CHOSEN, true", f, l.b.sa.done)
	}
	start := l.now
	for n := 1; n <= refusedTries; n++ {
		if got := len(l.all); got != 2*n || len(told[Failed](l.a)) != 0 {
			t.Fatalf("%d messages, Failed %v; want %d, none", got, told[Failed](l.a), 2*n)
		}
		l.b.sa = nil
		l.step(l.a.sa.Deadline())
	}
	if d := l.now.Sub(start); d > 750*time.Millisecond {
		t.Errorf("a gave up after %v", d)
	}
	var pe *PeerError
	if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.NO_PROPOSAL_CHOSEN {
		t.Errorf("a: Failed %v, want PeerError NO_PROPOSAL_CHOSEN", f)
	}
	if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 7 {
		t.Errorf("a: ChildFailed %v, want that of ACQUIRE 7", f)
	}
	if !l.a.sa.done {
		t.Errorf("a: not done")
	}
}

// A forged refusal does not stop the true answer.
func TestForgedRefusal(t *testing.T) {
	l := newLab(t)
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.stop = func(packet) bool { return true }
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	req, err := ikev2.Parse(l.kept[0].data)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*ikev2.Notify{notify(ikev2.NO_PROPOSAL_CHOSEN), notify(ikev2.INVALID_SYNTAX), notify(ikev2.AUTHENTICATION_FAILED),
		notify(ikev2.INVALID_KE_PAYLOAD, 0, 2), notify(ikev2.INVALID_KE_PAYLOAD, 0), notify(ikev2.COOKIE)} {
		m := &ikev2.Message{Header: req.Header, Payloads: []ikev2.Payload{n}}
		m.Flags = ikev2.FlagResponse
		b, _ := m.Append(nil)
		l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, b}))
	}
	l.let()
	l.settle()
	l.want(1)
}

// forger answers each IKE_SA_INIT request before b can; lost are how many of b's
// answers get lost.
func (l *lab) forger(lost int, ns ...*ikev2.Notify) {
	l.stop = func(p packet) bool {
		m, err := ikev2.Parse(p.data)
		if err != nil || m.Exchange != ikev2.IKE_SA_INIT {
			return false
		}
		if m.IsResponse() {
			lost--
			return lost >= 0
		}
		for _, n := range ns {
			r := &ikev2.Message{Header: m.Header, Payloads: []ikev2.Payload{n}}
			r.Flags = ikev2.FlagResponse
			l.wire = append(l.wire, packet{src: p.dst, dst: p.src, data: encode(l.t, r), from: l.b})
		}
		return false
	}
}

// Whoever sees the request answers it sooner than the responder, with whatever is
// not authenticated, and to each that follows; the answer to what was begun counts.
func TestForger(t *testing.T) {
	cookie, group := notify(ikev2.COOKIE, []byte("forged")...), invalidKE(uint16(alg.KEECP256))
	no, later := notify(ikev2.NO_PROPOSAL_CHOSEN), invalidKE(uint16(alg.KEX25519))
	for _, c := range []struct {
		name     string
		notifies []*ikev2.Notify
		lost     int
		cookie   string // b's
		groups   bool   // a begins with a method that b has not
		requests int    // different ones
	}{
		{"cookie", []*ikev2.Notify{cookie}, 0, "", false, 2},
		{"group", []*ikev2.Notify{group}, 0, "", false, 2},
		{"group, lost", []*ikev2.Notify{group, later, group}, 1, "", false, 2},
		{"refusal", []*ikev2.Notify{no, no}, 0, "", false, 1},
		{"refusals, lost", []*ikev2.Notify{no, notify(ikev2.INVALID_SYNTAX)}, refusedTries - 1, "", false, 1},
		{"all", []*ikev2.Notify{no, cookie, group}, 0, "", false, 4},
		{"cookie, and a genuine one", []*ikev2.Notify{cookie}, 0, "secret", false, 3},
		{"refusal, and a genuine cookie", []*ikev2.Notify{no}, 0, "secret", false, 2},
		{"refusal, and a genuine group", []*ikev2.Notify{no}, 1, "", true, 2},
		{"cookie, and a genuine group", []*ikev2.Notify{cookie}, 0, "", true, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			for _, n := range []*node{l.a, l.b} {
				p := n.rule.Proposals[0]
				n.rule.Proposals = []proposal.IKE{{Ciphers: p.Ciphers, PRF: p.PRF, KE: []alg.KE{alg.KEX25519, alg.KEECP256}}}
			}
			if c.groups {
				l.groups()
			}
			if c.cookie != "" {
				l.b.cookie = []byte(c.cookie)
			}
			l.anew = true
			l.forger(c.lost, c.notifies...)
			l.establish()
			l.want(1)
			if ms := l.initRequests(); len(ms) != c.requests {
				t.Errorf("%d different requests, want %d", len(ms), c.requests)
			}
		})
	}
}

// Somebody refuses one request and no other: it is sent again to the end, and what
// was said is told then.
func TestRefusedOnce(t *testing.T) {
	for _, answers := range []bool{false, true} {
		l := newLab(t)
		m := l.initRequest()
		r := &ikev2.Message{Header: m.Header, Payloads: []ikev2.Payload{notify(ikev2.NO_PROPOSAL_CHOSEN)}}
		r.Flags = ikev2.FlagResponse
		l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, encode(t, r)}))
		l.step(l.now.Add(3 * time.Second))
		if answers {
			l.let()
			l.settle()
			l.want(1)
			continue
		}
		l.step(l.now.Add(time.Hour))
		var pe *PeerError
		if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.NO_PROPOSAL_CHOSEN {
			t.Errorf("Failed %v, want PeerError NO_PROPOSAL_CHOSEN", f)
		}
		if n := len(l.kept); n != 1+l.a.rule.Retransmit.Limit {
			t.Errorf("%d transmissions, want %d", n, 1+l.a.rule.Retransmit.Limit)
		}
	}
}

func TestStartTimeout(t *testing.T) {
	l := newLab(t)
	l.a.rule.Retransmit.Limit = 8
	l.stop = func(packet) bool { return true }
	start := l.now
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	var at []time.Duration
	for !l.a.sa.done {
		d := l.a.sa.Deadline()
		before := len(l.kept)
		l.step(d.Add(-1))
		if len(l.kept) != before {
			t.Fatalf("sent before the deadline")
		}
		l.step(d)
		if len(l.kept) > before {
			at = append(at, l.now.Sub(start))
		}
	}
	l.a.wantEnd(ErrTimeout)
	if len(l.kept) != 9 {
		t.Errorf("%d transmissions, want 9", len(l.kept))
	}
	for i, p := range l.kept {
		if string(p.data) != string(l.kept[0].data) {
			t.Errorf("transmission %d differs", i)
		}
	}
	// Waits are 1, 2, 4, 8, 16, 30, 30, 30, 30 s, each up to a tenth shorter.
	sum := time.Duration(0)
	for i, w := range []time.Duration{1, 2, 4, 8, 16, 30, 30, 30} {
		sum += w * time.Second
		if at[i] > sum || at[i] < sum*9/10 {
			t.Errorf("transmission %d after %v, want up to a tenth before %v", i+2, at[i], sum)
		}
	}
	if d := l.now.Sub(start); d > 151*time.Second || d < 136*time.Second {
		t.Errorf("gave up after %v, want 136 to 151 s", d)
	}
}

func TestChildless(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now))
		l.settle()
		l.want(0)
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.settle()
		l.want(1)
	})
}

func TestSeveralChildren(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, reqA(1), reqA(2), reqA(3)))
		l.settle()
		l.want(3)
	})
}

// Every suite of ours, of the IKE SA and of the child SA, between two machines.
func TestSuites(t *testing.T) {
	for _, e := range alg.AllEncr() {
		if e == alg.EncrNULLAESGMAC {
			continue // no cipher of an IKE SA
		}
		for _, bits := range e.Info().KeyBits {
			own := e
			if e.Info().Implicit {
				own = alg.EncrAESGCM16 // IKE messages have no sequence number
				bits = 256
			}
			p := proposal.IKE{Ciphers: []proposal.Cipher{{Encr: own, Bits: bits}}, PRF: []alg.PRF{alg.PRFHMACSHA384}, KE: []alg.KE{alg.KEX25519}}
			integ := []alg.Integ{alg.IntegNone}
			if !e.Info().AEAD {
				integ = alg.AllInteg()
			}
			for _, a := range integ {
				if a != alg.IntegNone {
					p.Integ = []alg.Integ{a}
				}
				for _, esn := range []proposal.ESN{proposal.ESNNo, proposal.ESNRequire} {
					l := newLab(t)
					for _, n := range []*node{l.a, l.b} {
						n.rule.Proposals, n.rule.ESN = []proposal.IKE{p}, esn
					}
					r := reqA(1)
					r.Policy.Out.Proposals = []ipsec.Proposal{{Encr: e, EncrMinBits: uint16(bits), EncrMaxBits: uint16(bits), Auth: a}}
					l.b.policies[0].Out.Proposals = r.Policy.Out.Proposals
					l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
					l.a.do(l.a.sa.Start(l.now, r))
					l.settle()
					l.want(1)
					l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
					l.settle()
					l.b.do(l.b.sa.Rekey(l.now))
					l.settle()
					l.step(l.now.Add(linger + 1))
					l.want(1)
					for _, x := range l.a.sads {
						if x.Encr != e || x.Auth != a || x.ESN != (esn == proposal.ESNRequire) {
							t.Errorf("%v(%d) %v: SA has %v %v ESN %v", e, bits, a, x.Encr, x.Auth, x.ESN)
						}
					}
				}
			}
		}
	}
}

// PFS with a group that the responder does not want first.
func TestChildInvalidKE(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.a.rule.PFS = []alg.KE{alg.KEECP256, alg.KEX25519}
		l.b.rule.PFS = []alg.KE{alg.KEX25519}
		l.establish()
		l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
		l.settle()
		l.want(1)
		if c := l.a.sa.children[0]; c.suite.KE != alg.KEX25519 {
			t.Errorf("PFS by %v, want x25519", c.suite.KE)
		}
	})
}

// The group that the peer chose for a child SA is ours too when we rekey it.
func TestKeepGroup(t *testing.T) {
	l := newLab(t)
	l.b.rule.PFS = []alg.KE{alg.KEECP256}
	l.establish()
	l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
	l.settle()
	l.want(1)
	l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
	l.settle()
	l.want(1)
	if c := l.a.sa.children[0]; c.suite.KE != alg.KEECP256 || len(told[Rekeyed](l.a)) != 2 {
		t.Errorf("group %v, Rekeyed %v; want ecp256, twice", c.suite.KE, told[Rekeyed](l.a))
	}
}

func TestRekeyIKEInvalidKE(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.establish()
		p := l.a.rule.Proposals[0]
		l.a.rule.Proposals = []proposal.IKE{{Ciphers: p.Ciphers, PRF: p.PRF, KE: []alg.KE{alg.KEECP256, alg.KEECP384}}}
		l.b.rule.Proposals = []proposal.IKE{{Ciphers: p.Ciphers, PRF: p.PRF, KE: []alg.KE{alg.KEECP384}}}
		l.a.do(l.a.sa.Rekey(l.now))
		l.settle()
		l.step(l.now.Add(linger + 1))
		l.want(1)
		if k := l.a.sa.cur.suite.KE; k != alg.KEECP384 {
			t.Errorf("group %v, want ecp384", k)
		}
	})
}

func TestNoRule(t *testing.T) {
	l := newLab(t)
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.stop = func(packet) bool { return true }
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	b := NewResponder(l.b.cfg, []*pad.Rule(nil))
	outs := b.Receive(l.now, Datagram{addrB, addrA, l.kept[0].data})
	if _, ok := outs[len(outs)-1].(Done); !ok || !b.done {
		t.Errorf("outputs %v, want Done last", outs)
	}
}

// A peer that insists on PFS by a group which is not that of the IKE SA gets it,
// whoever asks, if we do not say otherwise.
func TestPeerInsistsOnGroup(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.b.rule.PFS = []alg.KE{alg.KEMODP2048}
		l.establish()
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.settle()
		l.want(2)
		if ke := l.a.sa.children[1].suite.KE; ke != alg.KEMODP2048 {
			t.Errorf("key exchange by %v, want %v", ke, alg.KEMODP2048)
		}
	})
}

// childless force: the child SAs come by CREATE_CHILD_SA; no: none does not do.
func TestChildlessWords(t *testing.T) {
	for _, c := range []struct {
		name    string
		a, b    pad.Childless
		reqs    int
		want    int  // child SAs
		ok      bool // IKE SA
		creates int  // messages of CREATE_CHILD_SA
	}{
		{"both force", pad.ChildlessForce, pad.ChildlessForce, 2, 2, true, 4},
		{"we force", pad.ChildlessForce, pad.ChildlessAllow, 1, 1, true, 2},
		{"peer forces", pad.ChildlessAllow, pad.ChildlessForce, 2, 1, true, 2},
		{"nothing to ask for", pad.ChildlessAllow, pad.ChildlessAllow, 0, 0, true, 0},
		{"we force, peer not", pad.ChildlessForce, pad.ChildlessNo, 1, 0, false, 0},
		{"nothing to ask for, peer not", pad.ChildlessAllow, pad.ChildlessNo, 0, 0, false, 0},
		{"nothing to ask for, we not", pad.ChildlessNo, pad.ChildlessAllow, 0, 0, false, 0},
		{"neither", pad.ChildlessNo, pad.ChildlessNo, 1, 1, true, 0},
	} {
		l := newLab(t)
		l.a.rule.Childless, l.b.rule.Childless = c.a, c.b
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		var reqs []ChildRequest
		for n := range c.reqs {
			reqs = append(reqs, reqA(uint32(n+1)))
		}
		l.a.do(l.a.sa.Start(l.now, reqs...))
		for !l.a.sa.failed && len(l.wire) > 0 {
			l.run()
		}
		if !c.ok {
			l.settle() // what comes without proof is not believed at once
			if !l.a.sa.failed || len(told[Established](l.a)) != 0 {
				t.Errorf("%s: %s; want a failure", c.name, l.a.describe())
			}
			continue
		}
		l.settle()
		l.want(c.want)
		if n := l.count(ikev2.CREATE_CHILD_SA); n != c.creates {
			t.Errorf("%s: %d messages of CREATE_CHILD_SA, want %d", c.name, n, c.creates)
		}
	}
	// A request without child SA that should not have come.
	l := newLab(t)
	l.b.rule.Childless = pad.ChildlessNo
	l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_AUTH) }
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.run()
	m, err := ikev2.Open(l.kept[0].data, &sk{c: l.a.sa.cur.seal.c})
	if err != nil {
		t.Fatal(err)
	}
	l.stop = nil
	l.a.sa.cur.nextID--
	ps := drop(pSA)(drop(pTSi)(drop(pTSr)(m.Payloads)))
	if n := refusal(l.answer(l.craft(ikev2.IKE_AUTH, ps...))); n == nil || n.Type != ikev2.INVALID_SYNTAX {
		t.Errorf("answer %v, want INVALID_SYNTAX", n)
	}
}
