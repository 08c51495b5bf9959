package sa

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Rules of RFC 7296 that no other test asks for by name.

// initRequest is a's first message, which has not arrived.
func (l *lab) initRequest() *ikev2.Message {
	l.t.Helper()
	l.stop = func(packet) bool { return true }
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	m, err := ikev2.Parse(l.kept[0].data)
	if err != nil {
		l.t.Fatal(err)
	}
	return m
}

func encode(t testing.TB, m *ikev2.Message) []byte {
	t.Helper()
	b, err := m.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// stranger hands octets to a new responder and returns what it answers.
func (l *lab) stranger(b []byte) (*SA, *ikev2.Message) {
	l.t.Helper()
	s := NewResponder(l.b.cfg, []*pad.Rule{l.b.rule})
	var m *ikev2.Message
	for _, o := range s.Receive(l.now, Datagram{addrB, addrA, b}) {
		if o, ok := o.(Send); ok {
			var err error
			if m, err = ikev2.Parse(o.Data); err != nil {
				l.t.Fatal(err)
			}
		}
	}
	return s, m
}

// RFC 7296, 2.5: an unknown payload is skipped, a critical one refused by its type;
// in the clear, inside the Encrypted payload, and in front of it.
func TestUnknownPayloads(t *testing.T) {
	for _, critical := range []bool{false, true} {
		alien := &ikev2.Unknown{Type: 201, Critical: critical, Body: []byte{1, 2, 3}}
		want := func(where string, ps []ikev2.Payload) {
			t.Helper()
			n := refusal(ps)
			switch {
			case !critical && n != nil:
				t.Errorf("%s: not critical, yet %v", where, n.Type)
			case critical && (n == nil || n.Type != ikev2.UNSUPPORTED_CRITICAL_PAYLOAD || string(n.Data) != "\xc9"):
				t.Errorf("%s: answer %v, want UNSUPPORTED_CRITICAL_PAYLOAD of 201", where, names(ps))
			}
		}
		l := newLab(t)
		m := l.initRequest()
		m.Payloads = append([]ikev2.Payload{alien}, m.Payloads...)
		s, answer := l.stranger(encode(t, m))
		if answer == nil || s.done != critical {
			t.Fatalf("IKE_SA_INIT: answer %v, done %v", answer, s.done)
		}
		want("IKE_SA_INIT", answer.Payloads)

		// In the answer to IKE_SA_INIT, which anybody can send, a critical one does
		// no more harm than other nonsense.
		l.stop, l.kept = func(packet) bool { return true }, l.kept[:1]
		l.let()
		l.stop = func(packet) bool { return true }
		l.run()
		b, err := ikev2.Parse(l.kept[0].data)
		if err != nil {
			t.Fatal(err)
		}
		b.Payloads = append(b.Payloads, alien)
		if critical {
			l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, encode(t, b)}))
		}
		l.let()
		l.settle()
		l.want(1)

		i := l.b.sa.cur
		want("inside", l.b.ask(i, ikev2.INFORMATIONAL, alien))
		for _, inner := range [][]ikev2.Payload{nil, {&ikev2.Delete{Protocol: ikev2.ProtocolESP, SPIs: []uint32{9}}}} {
			before := len(l.b.events)
			seal := &sk{c: i.seal.c}
			l.b.do(l.b.sa.Receive(l.now, l.b.behind(i, alien, inner...)))
			var ps []ikev2.Payload
			for _, o := range l.b.events[before:] {
				if o, ok := o.(Send); ok {
					m, err := ikev2.Open(o.Data, seal)
					if err != nil {
						t.Fatal(err)
					}
					ps = append([]ikev2.Payload{}, m.Payloads...)
				}
			}
			if ps == nil {
				t.Fatal("in front: no answer")
			}
			want("in front", ps)
		}
		if l.b.sa.failed {
			t.Error("the IKE SA has ended")
		}
	}
}

// behind seals a request with one payload in front of the Encrypted one.
func (n *node) behind(i *ikeSA, front ikev2.Payload, ps ...ikev2.Payload) Datagram {
	n.t.Helper()
	k := &sk{c: i.open.c}
	inner, err := ikev2.AppendPayloads(nil, ps)
	if err != nil {
		n.t.Fatal(err)
	}
	pad := (k.BlockLen() - (len(inner)+1)%k.BlockLen()) % k.BlockLen()
	body := append(make([]byte, k.IVLen()), inner...)
	body = append(append(body, make([]byte, pad)...), byte(pad))
	body = append(body, make([]byte, k.ICVLen())...)
	e := &ikev2.Encrypted{Body: body}
	if len(ps) > 0 {
		e.First = ps[0].PayloadType()
	}
	h := i.header(ikev2.INFORMATIONAL, i.expect, false)
	h.Flags ^= ikev2.FlagInitiator
	b := encode(n.t, &ikev2.Message{Header: h, Payloads: []ikev2.Payload{front, e}})
	at := len(b) - len(body)
	if err := k.Seal(b[:at], b[at:]); err != nil {
		n.t.Fatal(err)
	}
	return Datagram{n.sa.local, n.sa.remote, b}
}

// RFC 7296, 2.5: a higher minor version is a reason for nothing.
func TestMinorVersion(t *testing.T) {
	l := newLab(t)
	m := l.initRequest()
	m.Minor = 7
	if _, answer := l.stranger(encode(t, m)); answer == nil || answer.Minor != 0 || ikev2.Find[*ikev2.SA](answer.Payloads) == nil {
		t.Errorf("answer %v, want a good one, of minor version 0", answer)
	}
	m.Payloads = append(m.Payloads, &ikev2.Unknown{Type: 201, Critical: true})
	if _, answer := l.stranger(encode(t, m)); answer == nil || answer.Minor != 0 {
		t.Errorf("refusal %v, want one of minor version 0", answer)
	}
	b0, err := CookieResponse(m, []byte("cookie"))
	if c, perr := ikev2.Parse(b0); err != nil || perr != nil || c.Minor != 0 {
		t.Errorf("demand for a cookie: %v, %v, %v, want one of minor version 0", c, err, perr)
	}
	l = newLab(t)
	l.establish()
	i := l.b.sa.cur
	h := i.header(ikev2.INFORMATIONAL, i.expect, false)
	h.Flags ^= ikev2.FlagInitiator
	h.Minor = 15
	b, err := (&ikev2.Message{Header: h}).AppendSealed(nil, &sk{c: i.open.c})
	if err != nil {
		t.Fatal(err)
	}
	if outs := l.b.sa.Receive(l.now, Datagram{addrB, addrA, b}); !slices.ContainsFunc(outs, func(o Output) bool { _, ok := o.(Send); return ok }) {
		t.Error("no answer to a protected request")
	}
}

// RFC 7296, 3.1: the length in the header is that of the datagram.
func TestHeaderLength(t *testing.T) {
	l := newLab(t)
	init := encode(t, l.initRequest())
	for _, b := range [][]byte{append(slices.Clone(init), 0), init[:len(init)-1], init[:27]} {
		if s, answer := l.stranger(b); answer != nil || !s.done || s.counters.Malformed != 1 {
			t.Errorf("IKE_SA_INIT of %d octets: answer %v, done %v, %+v", len(b), answer, s.done, s.counters)
		}
	}
	l = newLab(t)
	l.establish()
	d := l.b.forge(l.b.sa.cur, ikev2.INFORMATIONAL)
	before := l.b.sa.snapshot()
	for n, b := range [][]byte{append(slices.Clone(d.Data), 0, 0), d.Data[:len(d.Data)-1]} {
		outs := l.b.sa.Receive(l.now, Datagram{addrB, addrA, b})
		if len(outs) != 0 || l.b.sa.counters.Malformed != uint64(n+1) || l.b.sa.snapshot() != before {
			t.Errorf("protected, of %d octets: %d outputs, %+v", len(b), len(outs), l.b.sa.counters)
		}
	}
	// A length that is changed along with the datagram does not verify.
	b := append(slices.Clone(d.Data), 0, 0)
	binary.BigEndian.PutUint32(b[24:], uint32(len(b)))
	if outs := l.b.sa.Receive(l.now, Datagram{addrB, addrA, b}); len(outs) != 0 {
		t.Errorf("lengthened: %d outputs", len(outs))
	}
}

// RFC 7296, 2.6.1: cookies and INVALID_KE_PAYLOAD in each order. Whatever has been
// demanded goes into each request that follows, and nothing else changes.
func TestCookieOrders(t *testing.T) {
	cookie := func(s string) *ikev2.Notify { return notify(ikev2.COOKIE, []byte(s)...) }
	for _, c := range []struct {
		name    string
		answers []*ikev2.Notify
		cookie  string
	}{
		{"cookie, group", []*ikev2.Notify{cookie("one"), invalidKE(31)}, "one"},
		{"group, cookie", []*ikev2.Notify{invalidKE(31), cookie("one")}, "one"},
		{"cookie, group, cookie", []*ikev2.Notify{cookie("one"), invalidKE(31), cookie("two")}, "two"},
		{"cookie, cookie, group", []*ikev2.Notify{cookie("one"), cookie("two"), invalidKE(31)}, "two"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.groups()
			m := l.initRequest()
			first := m
			cookies := 0
			for _, n := range c.answers {
				l.kept = nil
				r := &ikev2.Message{Header: m.Header, Payloads: []ikev2.Payload{n}}
				r.Flags = ikev2.FlagResponse
				l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, encode(t, r)}))
				if n.Type == ikev2.COOKIE {
					if cookies++; cookies > 1 {
						l.step(l.a.sa.Deadline())
					}
				}
				if len(l.kept) != 1 {
					t.Fatalf("%v: %d messages follow, want one", n.Type, len(l.kept))
				}
				var err error
				if m, err = ikev2.Parse(l.kept[0].data); err != nil {
					t.Fatal(err)
				}
			}
			sameRest(t, []*ikev2.Message{first, m})
			if n, ok := m.Payloads[0].(*ikev2.Notify); !ok || n.Type != ikev2.COOKIE || string(n.Data) != c.cookie {
				t.Errorf("first payload %v, want cookie %q", m.Payloads[0], c.cookie)
			}
			if ke := ikev2.Find[*ikev2.KE](m.Payloads); ke.Method != 31 {
				t.Errorf("key exchange by %v, want x25519", ke.Method)
			}
			l.let()
			l.settle()
			l.want(1)
		})
	}
	// Nobody can make us go on for ever.
	l := newLab(t)
	m := l.initRequest()
	for n := range 100 {
		r := &ikev2.Message{Header: m.Header, Payloads: []ikev2.Payload{cookie(fmt.Sprint("cookie ", n))}}
		r.Flags = ikev2.FlagResponse
		l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, encode(t, r)}))
		if !l.a.sa.done {
			l.step(l.a.sa.Deadline())
		}
	}
	if n, want := len(l.initRequests()), 1+maxCookies+l.a.rule.Retransmit.Limit; n != want || !l.a.sa.failed {
		t.Errorf("%d requests for 100 cookies, want %d", n, want)
	}
}

// RFC 7296, 2.3: the request answered last gets the same octets again; every other
// message ID but the next is dropped.
func TestWindow(t *testing.T) {
	l := newLab(t)
	l.establish()
	i := l.b.sa.cur
	sends := func(b []byte) (l2 []Send) {
		for _, o := range l.b.sa.Receive(l.now, Datagram{addrB, addrA, slices.Clone(b)}) {
			if s, ok := o.(Send); ok {
				l2 = append(l2, s)
			}
		}
		return l2
	}
	req := l.b.forge(i, ikev2.INFORMATIONAL).Data
	first := sends(req)
	if len(first) != 1 || first[0].Again {
		t.Fatalf("answers %v", first)
	}
	for range 3 {
		if again := sends(req); len(again) != 1 || !again[0].Again || string(again[0].Data) != string(first[0].Data) {
			t.Errorf("again: %v, want the same octets", again)
		}
	}
	next := i.expect
	for _, id := range []uint32{next + 1, next + 2, next - 2, 0, 1 << 31, ^uint32(0)} {
		i.expect = id
		b := l.b.forge(i, ikev2.INFORMATIONAL).Data
		i.expect = next
		dropped := l.b.sa.counters.MessageID
		if got := sends(b); len(got) != 0 || i.expect != next || l.b.sa.counters.MessageID != dropped+1 {
			t.Errorf("message ID %d: answers %v, next %d, %+v", id, got, i.expect, l.b.sa.counters)
		}
	}
	if got := sends(l.b.forge(i, ikev2.INFORMATIONAL).Data); len(got) != 1 || got[0].Again {
		t.Errorf("the next: answers %v", got)
	}
}

// RFC 7296, 2.3: SET_WINDOW_SIZE is what the peer can take. We go on with one request
// at a time, and take one at a time.
func TestSetWindowSize(t *testing.T) {
	l := newLab(t)
	l.a.policies = []Policy{reqA(0).Policy}
	l.establish()
	for _, n := range []*node{l.a, l.b} {
		if ps := n.ask(n.sa.cur, ikev2.INFORMATIONAL, notify(ikev2.SET_WINDOW_SIZE, 0, 0, 0, 9)); ps == nil || len(ps) != 0 {
			t.Fatalf("%s: answer %v", n.name, names(ps))
		}
		l.wire = nil
		l.kept, l.stop = nil, func(packet) bool { return true }
		n.add()
		n.add()
		n.do(n.sa.Rekey(l.now))
		if len(l.kept) != 1 {
			t.Errorf("%s: %d requests on their way, want one", n.name, len(l.kept))
		}
	}
}

// The owner's Delete in every state, and in every state that has keys the peer's:
// nothing is left on either side.
func TestDeleteInEveryState(t *testing.T) {
	for _, st := range fuzzStates {
		for _, who := range []string{"owner", "peer"} {
			t.Run(fmt.Sprintf("%v/%s", st, who), func(t *testing.T) {
				l, n := inState(t, st, 1)
				i := n.sa.ikes[0]
				if who == "peer" {
					if !i.hasKeys() {
						t.Skip("no keys")
					}
					seen := i.state
					answer := n.ask(i, ikev2.INFORMATIONAL, &ikev2.Delete{Protocol: ikev2.ProtocolIKE})
					switch seen {
					case StateAuthWait, StateAuthSent, StateAuthWork:
						// The responder is not proven yet, or the initiator is being
						// served: it will ask again.
						if answer != nil || n.sa.failed {
							t.Errorf("answer %v, failed %v", names(answer), n.sa.failed)
						}
						return
					case StateHalfOpen: // not the exchange that comes next
						if r := refusal(answer); r == nil || r.Type != ikev2.INVALID_SYNTAX {
							t.Errorf("answer %v, want INVALID_SYNTAX", names(answer))
						}
					default:
						if answer == nil || len(answer) != 0 {
							t.Errorf("answer %v, want an empty one", answer)
						}
					}
					if seen == StateRekeyed {
						if n.sa.failed || i.hasKeys() {
							t.Errorf("failed %v, still has keys %v", n.sa.failed, i.hasKeys())
						}
						return
					}
				} else {
					n.do(n.sa.Delete(l.now))
					n.holdSPI = false
					n.giveSPIs()
					l.let()
					l.settle()
				}
				l.step(l.now.Add(staleAfter + linger + defaultHalfOpen))
				if !n.sa.done || len(told[Failed](n)) != 1 || len(n.sads)+len(n.larval)+len(n.spis) != 0 {
					t.Errorf("done %v, Failed %v, %d SAs, %d larval, %d IKE SPIs", n.sa.done, told[Failed](n), len(n.sads), len(n.larval), len(n.spis))
				}
			})
		}
	}
}

// RFC 7296, 2.4 and 2.21: what is said without protection about an IKE SA changes
// nothing, whatever it says, whether it looks like an answer or not.
func TestUnprotectedErrors(t *testing.T) {
	for _, typ := range []ikev2.NotifyType{ikev2.INVALID_IKE_SPI, ikev2.INVALID_SPI, ikev2.AUTHENTICATION_FAILED, ikev2.INVALID_SYNTAX,
		ikev2.INVALID_MAJOR_VERSION, ikev2.INVALID_MESSAGE_ID, ikev2.TEMPORARY_FAILURE, ikev2.UNSUPPORTED_CRITICAL_PAYLOAD} {
		for _, st := range []State{StateAuthSent, StateHalfOpen, StateEstablished, StateDeleting} {
			l, n := inState(t, st, 1)
			if st == StateEstablished {
				l.stop = func(packet) bool { return true }
				n.add2(l)
			}
			i := n.sa.ikes[0]
			before := n.sa.snapshot()
			for _, response := range []bool{false, true} {
				h := i.header(ikev2.INFORMATIONAL, i.expect, response)
				if response && i.req != nil {
					h.Exchange, h.MessageID = i.req.exchange, i.req.id
				}
				h.Flags ^= ikev2.FlagInitiator
				for _, ps := range [][]ikev2.Payload{{notify(typ)}, {notify(typ), &ikev2.Encrypted{Body: make([]byte, 64)}},
					{&ikev2.Delete{Protocol: ikev2.ProtocolIKE}, &ikev2.Encrypted{Body: make([]byte, 64)}}} {
					b := encode(t, &ikev2.Message{Header: h, Payloads: ps})
					if outs := n.sa.Receive(l.now, Datagram{n.sa.local, n.sa.remote, b}); len(outs) != 0 {
						t.Errorf("%v, %v: %d outputs", st, typ, len(outs))
					}
				}
			}
			if after := n.sa.snapshot(); after != before {
				t.Errorf("%v, %v: changed\nbefore %s\nafter  %s", st, typ, before, after)
			}
		}
	}
}

func (n *node) add2(l *lab) { n.do(n.sa.AddChild(l.now, reqA(2))) }

// RFC 7296, 2.4: INITIAL_CONTACT counts in IKE_AUTH alone, and only from who has
// proven itself.
func TestInitialContactNeedsProof(t *testing.T) {
	// In IKE_SA_INIT.
	l := newLab(t)
	m := l.initRequest()
	m.Payloads = append(m.Payloads, notify(ikev2.INITIAL_CONTACT))
	s, answer := l.stranger(encode(t, m))
	if answer == nil || s.onlyOne || ikev2.FindNotify(answer.Payloads, ikev2.INITIAL_CONTACT) != nil {
		t.Errorf("in IKE_SA_INIT: answer %v, taken for true %v", answer, s.onlyOne)
	}
	// From who has another key.
	l = newLab(t)
	l.a.cfg.InitialContact = true
	l.a.rule.PSK = pad.Keys{Local: ipsec.NewKey([]byte("guessed")), Remote: ipsec.NewKey([]byte("guessed"))}
	l.establish()
	if len(told[Established](l.b)) != 0 || l.b.sa.onlyOne {
		t.Error("by the wrong key: taken for true")
	}
	// Later.
	l = newLab(t)
	l.establish()
	l.b.ask(l.b.sa.cur, ikev2.INFORMATIONAL, notify(ikev2.INITIAL_CONTACT))
	if e := told[Established](l.b); len(e) != 1 || e[0].OnlyOne || l.b.sa.onlyOne {
		t.Errorf("in INFORMATIONAL: Established %v", e)
	}
	// And where it counts.
	l = newLab(t)
	l.a.cfg.InitialContact = true
	l.establish()
	if e := told[Established](l.b); len(e) != 1 || !e[0].OnlyOne {
		t.Errorf("in IKE_AUTH: Established %v", e)
	}
}

// RFC 7296, 2.4: answers to IKE_SA_INIT that anybody can send, before the true one
// and after it.
func TestForgedInitAnswers(t *testing.T) {
	for name, edit := range map[string]func(m *ikev2.Message){
		"low order":      func(m *ikev2.Message) { ikev2.Find[*ikev2.KE](m.Payloads).Data = make([]byte, 32) },
		"short":          func(m *ikev2.Message) { ikev2.Find[*ikev2.KE](m.Payloads).Data = make([]byte, 31) },
		"another method": func(m *ikev2.Message) { ikev2.Find[*ikev2.KE](m.Payloads).Method = 19 },
		"SPI 0":          func(m *ikev2.Message) { m.ResponderSPI = 0 },
		"no SA":          func(m *ikev2.Message) { m.Payloads = drop(pSA)(m.Payloads) },
		"no nonce":       func(m *ikev2.Message) { m.Payloads = drop(pNonce)(m.Payloads) },
		"two nonces":     func(m *ikev2.Message) { m.Payloads = append(m.Payloads, &ikev2.Nonce{Data: make([]byte, 32)}) },
		"not offered": func(m *ikev2.Message) {
			ikev2.Find[*ikev2.SA](m.Payloads).Proposals[0].Transforms[0].ID = uint16(ikev2.Encr3DES)
		},
		"error beside it": func(m *ikev2.Message) { m.Payloads = append(m.Payloads, notify(ikev2.NO_PROPOSAL_CHOSEN)) },
		"message ID 1":    func(m *ikev2.Message) { m.MessageID = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.plain()
			l.initRequest()
			l.let()
			l.stop = func(packet) bool { return true }
			l.run()
			if len(l.kept) != 1 {
				t.Fatalf("%d answers", len(l.kept))
			}
			forge := func() Datagram {
				m, err := ikev2.Parse(slices.Clone(l.kept[0].data))
				if err != nil {
					t.Fatal(err)
				}
				m.ResponderSPI ^= 0x55 // another's
				edit(m)
				return Datagram{addrA, addrB, encode(t, m)}
			}
			for range 20 {
				l.a.do(l.a.sa.Receive(l.now, forge()))
			}
			if l.a.sa.failed || l.a.sa.cur.state != StateInitSent || len(l.kept) != 1 {
				t.Fatalf("a %s, %d messages", l.a.describe(), len(l.kept))
			}
			late := forge()
			true1 := l.kept[0]
			l.kept = nil
			l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, true1.data}))
			before := l.a.sa.snapshot()
			l.a.do(l.a.sa.Receive(l.now, late))
			if after := l.a.sa.snapshot(); after != before {
				t.Errorf("changed by a second answer\nbefore %s\nafter  %s", before, after)
			}
			l.let()
			l.settle()
			l.want(1)
		})
	}
}

// RFC 7296, 2.25: a peer that puts off all that we ask for, for several minutes, has
// another state than we, and the IKE SA is closed; not while other requests succeed.
func TestOutOfSync(t *testing.T) {
	for _, what := range []string{"child", "rekey child", "IKE SA"} {
		l := quietLab(t)
		start := l.now
		l.stop = func(p packet) bool { return p.from == l.a }
		switch what {
		case "child":
			l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		case "rekey child":
			l.a.expire(l.a.sa.children[0], false)
		default:
			l.a.do(l.a.sa.Rekey(l.now))
		}
		n := 0
		for !l.a.sa.failed && len(told[ChildFailed](l.a)) == 0 && n < 1000 {
			if l.a.sa.cur.req != nil {
				n++
				l.answerTo(notify(ikev2.TEMPORARY_FAILURE))
				l.stop = func(p packet) bool { return p.from == l.a }
			} else {
				l.a.at(l.a.sa.Deadline())
			}
		}
		var pe *PeerError
		if what == "child" {
			if f := told[ChildFailed](l.a); l.a.sa.failed || len(l.a.sads) != 2 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.TEMPORARY_FAILURE {
				t.Errorf("ChildFailed %v, ends %v; want it alone", f, l.a.sa.failed)
			}
		} else if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.TEMPORARY_FAILURE {
			t.Errorf("%s: Failed %v, want TEMPORARY_FAILURE of the peer", what, f)
		}
		if d := l.now.Sub(start); d < retryFor || d > retryFor+30*time.Second || n < 8 || n > 40 {
			t.Errorf("%s: after %v and %d requests", what, d, n)
		}
	}
}

// What a peer says besides, of which nothing follows here: it is told by name, in
// requests and in answers, and changes nothing.
func TestNotifiesWithoutConsequence(t *testing.T) {
	esp := func(typ ikev2.NotifyType, data ...byte) *ikev2.Notify {
		return &ikev2.Notify{Protocol: ikev2.ProtocolESP, SPI: []byte{1, 2, 3, 4}, Type: typ, Data: data}
	}
	for _, n := range []*ikev2.Notify{
		notify(ikev2.INVALID_SPI, 1, 2, 3, 4), notify(ikev2.INVALID_SPI), esp(ikev2.INVALID_SELECTORS, make([]byte, 64)...),
		notify(ikev2.INVALID_MESSAGE_ID, 0, 0, 0, 99), notify(ikev2.INVALID_IKE_SPI), notify(ikev2.INVALID_MAJOR_VERSION),
		notify(ikev2.SET_WINDOW_SIZE, 0, 0, 0, 5), notify(ikev2.SET_WINDOW_SIZE), notify(ikev2.ADDITIONAL_TS_POSSIBLE),
		notify(ikev2.NON_FIRST_FRAGMENTS_ALSO), esp(ikev2.NON_FIRST_FRAGMENTS_ALSO, 1), notify(8191, 1), notify(40000, 1),
	} {
		l := newLab(t)
		l.establish()
		l.clearEvents()
		if ps := l.answer(l.craft(ikev2.INFORMATIONAL, n)); ps == nil || len(ps) != 0 {
			t.Errorf("%v: answer %v, want an empty one", n.Type, names(ps))
		}
		lines := 0
		for _, o := range told[Log](l.b) {
			lines++
			if !strings.Contains(fmt.Sprint(o.Attrs), n.Type.String()) {
				t.Errorf("%v: line %q %v", n.Type, o.Msg, o.Attrs)
			}
		}
		if n.Type.IsError() != (lines == 1) {
			t.Errorf("%v: %d lines besides that of the message", n.Type, lines)
		}
		if m := told[Message](l.b); len(m) == 0 || !strings.Contains(m[0].Names(), n.Type.String()) {
			t.Errorf("%v: not named in the line of its message", n.Type)
		}
		l.want(1)
		// Beside a child SA that is asked for, and in the answer.
		for _, from := range []*node{l.a, l.b} {
			if from == l.b && n.Type.IsError() {
				continue // a refusal
			}
			l.stop = func(p packet) bool { return p.from == from && p.data[18] == byte(ikev2.CREATE_CHILD_SA) }
			l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
			l.run()
			seal := from.sa.cur.seal
			m, err := ikev2.Open(l.kept[0].data, &sk{c: seal.c})
			if err != nil {
				t.Fatal(err)
			}
			m.Payloads = append([]ikev2.Payload{n}, m.Payloads...)
			if l.kept[0].data, err = m.AppendSealed(nil, seal); err != nil {
				t.Fatal(err)
			}
			had := len(l.a.sa.children)
			l.let(0)
			l.settle()
			l.want(had + 1)
		}
	}
}
