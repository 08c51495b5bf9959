package sa

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// snapshot is everything that a message without authentication must not change.
func (s *SA) snapshot() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%v %v nat %v %v queue %d delayed %v failed %v done %v heard %v\n", s.local, s.remote, s.natLocal, s.natRemote,
		len(s.queue), s.delayed, s.failed, s.done, s.heard)
	for _, i := range s.ikes {
		fmt.Fprintf(&b, "%v %v %v cur %v id %d expect %d busy %v active %v req %v suite %v keys %v\n", i.local, i.remote, i.state, i == s.cur,
			i.nextID, i.expect, i.busy, i.active != nil, i.req != nil, i.suite, i.hasKeys())
		if i.req != nil {
			fmt.Fprintf(&b, " request %d due %v sent %d\n", i.req.id, i.req.due, i.req.sent)
		}
	}
	for _, c := range s.children {
		fmt.Fprintf(&b, "child %v deleting %v replaced %v rekeying %v\n", c, c.deleting, c.replaced != nil, c.rekeying != nil)
	}
	return b.String()
}

// Every message that was ever sent comes again: nothing changes; at most the
// last response is sent once more.
func TestReplay(t *testing.T) {
	l := newLab(t)
	l.b.cookie = []byte("secret")
	l.groups()
	l.establish()
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.settle()
	l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
	l.settle()
	replay := func() {
		t.Helper()
		for _, p := range slices.Clone(l.all) {
			for _, n := range []*node{l.a, l.b} {
				before := n.sa.snapshot()
				for _, o := range n.sa.Receive(l.now, Datagram{p.dst, p.src, slices.Clone(p.data)}) {
					if s, ok := o.(Send); !ok || !s.Again {
						t.Errorf("%s: answers a replayed message by %T", n.name, o)
					}
				}
				if after := n.sa.snapshot(); after != before {
					t.Errorf("%s: changed by a replayed message\nbefore %s\nafter  %s", n.name, before, after)
				}
			}
		}
	}
	replay()
	l.a.do(l.a.sa.Rekey(l.now))
	l.settle()
	replay()
	l.step(l.now.Add(linger + 1))
	l.want(2)
	replay()
	l.a.do(l.a.sa.Delete(l.now))
	l.settle()
	replay()
}

// Messages that are almost right: any bit changed, any octet missing.
func TestDamaged(t *testing.T) {
	l := newLab(t)
	l.establish()
	l.stop = func(packet) bool { return true }
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	good := l.kept[0]
	before := l.b.sa.snapshot()
	try := func(what string, b []byte) {
		t.Helper()
		for _, o := range l.b.sa.Receive(l.now, Datagram{good.dst, good.src, b}) {
			t.Errorf("%s: output %T", what, o)
		}
		if after := l.b.sa.snapshot(); after != before {
			t.Fatalf("%s: changed\nbefore %s\nafter  %s", what, before, after)
		}
	}
	for i := range good.data {
		for bit := range 8 {
			b := slices.Clone(good.data)
			b[i] ^= 1 << bit
			try(fmt.Sprintf("octet %d, bit %d", i, bit), b)
		}
		try(fmt.Sprintf("first %d octets", i), slices.Clone(good.data[:i]))
		b := slices.Clone(good.data[:i])
		if len(b) >= 28 {
			b[24], b[25], b[26], b[27] = 0, 0, byte(i>>8), byte(i)
			try(fmt.Sprintf("cut to %d octets", i), b)
		}
	}
	c := l.b.sa.counters
	if c.Malformed == 0 || c.Integrity == 0 || c.MessageID == 0 || c.Unexpected == 0 {
		t.Errorf("counters %+v, want all to count", c)
	}
	l.let()
	l.settle()
	l.want(2)
}

// craft seals payloads as a would send them to b in its next request.
func (l *lab) craft(x ikev2.ExchangeType, ps ...ikev2.Payload) Datagram {
	l.t.Helper()
	i := l.a.sa.cur
	m := &ikev2.Message{Header: i.header(x, i.nextID, false), Payloads: ps}
	i.nextID++
	b, err := m.AppendSealed(nil, i.seal)
	if err != nil {
		l.t.Fatal(err)
	}
	return Datagram{l.a.sa.remote, l.a.sa.local, b}
}

func raw(t ikev2.PayloadType, body ...byte) ikev2.Payload { return &ikev2.Unknown{Type: t, Body: body} }

// answer hands d to b and returns what b answers to a.
func (l *lab) answer(d Datagram) []ikev2.Payload {
	l.t.Helper()
	var ps []ikev2.Payload
	l.b.events = nil
	l.b.do(l.b.sa.Receive(l.now, d))
	for _, s := range told[Send](l.b) {
		if m, err := ikev2.Open(s.Data, l.a.sa.cur.open); err == nil && m.IsResponse() {
			ps = m.Payloads
			if ps == nil {
				ps = []ikev2.Payload{}
			}
		}
	}
	l.wire = nil
	return ps
}

// Authentic requests with wrong contents.
func TestMalformedRequests(t *testing.T) {
	l := newLab(t)
	l.establish()
	o, lerr := l.a.sa.newOffer(l.a.sa.cur, reqA(2), nil)
	if lerr != nil {
		t.Fatal(lerr)
	}
	o.spi, o.ni = 0x5000, make([]byte, 32)
	noPFS := func(ps []proposal.Child) {
		for i := range ps {
			ps[i].KE = nil
		}
	}
	noPFS(o.proposals)
	good := o.payloads(false)
	without := func(typ ikev2.PayloadType) []ikev2.Payload {
		return slices.DeleteFunc(slices.Clone(good), func(p ikev2.Payload) bool { return p.PayloadType() == typ })
	}
	with := func(typ ikev2.PayloadType, ps ...ikev2.Payload) []ikev2.Payload { return append(without(typ), ps...) }
	sa := proposal.OfferChild(o.proposals, 0x5000, true)
	spi3 := &ikev2.SA{Proposals: []ikev2.Proposal{sa.Proposals[0]}}
	spi3.Proposals[0].SPI = []byte{1, 2, 3}
	spi0 := &ikev2.SA{Proposals: []ikev2.Proposal{sa.Proposals[0]}}
	spi0.Proposals[0].SPI = []byte{0, 0, 0, 9}
	ah := &ikev2.SA{Proposals: []ikev2.Proposal{sa.Proposals[0]}}
	ah.Proposals[0].Protocol = ikev2.ProtocolAH
	ikeSPI := proposal.OfferIKE(l.a.rule.Proposals, []byte{1, 2, 3, 4})
	rekeySPI := proposal.OfferIKE(l.a.rule.Proposals, []byte{1, 2, 3, 4, 5, 6, 7, 8})
	zeroSPI := proposal.OfferIKE(l.a.rule.Proposals, make([]byte, 8))
	nonce := &ikev2.Nonce{Data: make([]byte, 32)}
	pub := &ikev2.KE{Method: ikev2.KECURVE25519, Data: append([]byte{9}, make([]byte, 31)...)}
	rekey := func(spi ...byte) ikev2.Payload {
		return &ikev2.Notify{Protocol: ikev2.ProtocolESP, SPI: spi, Type: ikev2.REKEY_SA}
	}
	const none = ikev2.NotifyType(0)
	for _, c := range []struct {
		name string
		x    ikev2.ExchangeType
		ps   []ikev2.Payload
		want ikev2.NotifyType // none: no error
		dies bool
	}{
		{"good", ikev2.CREATE_CHILD_SA, good, none, false},
		{"no SA", ikev2.CREATE_CHILD_SA, without(pSA), ikev2.INVALID_SYNTAX, true},
		{"no nonce", ikev2.CREATE_CHILD_SA, without(pNonce), ikev2.INVALID_SYNTAX, true},
		{"no TSi", ikev2.CREATE_CHILD_SA, without(pTSi), ikev2.INVALID_SYNTAX, true},
		{"no TSr", ikev2.CREATE_CHILD_SA, without(pTSr), ikev2.INVALID_SYNTAX, true},
		{"SA twice", ikev2.CREATE_CHILD_SA, with(pSA, sa, sa), ikev2.INVALID_SYNTAX, true},
		{"nothing", ikev2.CREATE_CHILD_SA, nil, ikev2.INVALID_SYNTAX, true},
		{"SA of garbage", ikev2.CREATE_CHILD_SA, with(pSA, raw(pSA, 1, 2, 3)), ikev2.INVALID_SYNTAX, true},
		{"empty SA", ikev2.CREATE_CHILD_SA, with(pSA, raw(pSA)), ikev2.INVALID_SYNTAX, true},
		{"nonce of 15 octets", ikev2.CREATE_CHILD_SA, with(pNonce, raw(pNonce, make([]byte, 15)...)), ikev2.INVALID_SYNTAX, true},
		{"nonce of 257 octets", ikev2.CREATE_CHILD_SA, with(pNonce, raw(pNonce, make([]byte, 257)...)), ikev2.INVALID_SYNTAX, true},
		{"TSi cut", ikev2.CREATE_CHILD_SA, with(pTSi, raw(pTSi, 1, 0, 0, 0, 7, 0, 0, 16, 0, 0)), ikev2.INVALID_SYNTAX, true},
		{"no selectors", ikev2.CREATE_CHILD_SA, with(pTSi, &ikev2.TSi{}), ikev2.TS_UNACCEPTABLE, false},
		{"unknown selectors", ikev2.CREATE_CHILD_SA, with(pTSi, &ikev2.TSi{Selectors: []ikev2.TrafficSelector{{Type: 10, Raw: []byte("x")}}}), ikev2.TS_UNACCEPTABLE, false},
		{"SPI of 3 octets", ikev2.CREATE_CHILD_SA, with(pSA, spi3), ikev2.NO_PROPOSAL_CHOSEN, false},
		{"reserved SPI", ikev2.CREATE_CHILD_SA, with(pSA, spi0), ikev2.NO_PROPOSAL_CHOSEN, false},
		{"AH", ikev2.CREATE_CHILD_SA, with(pSA, ah), ikev2.NO_PROPOSAL_CHOSEN, false},
		{"unknown payload", ikev2.CREATE_CHILD_SA, append(slices.Clone(good), raw(200, 1)), none, false},
		{"unexpected payload", ikev2.CREATE_CHILD_SA, append(slices.Clone(good), &ikev2.EAP{Message: []byte{1}}), none, false},
		{"critical payload", ikev2.CREATE_CHILD_SA, append(slices.Clone(good), &ikev2.Unknown{Type: 200, Critical: true}), ikev2.UNSUPPORTED_CRITICAL_PAYLOAD, false},
		{"rekey of nothing", ikev2.CREATE_CHILD_SA, append(slices.Clone(good), rekey(1, 2, 3, 4)), ikev2.CHILD_SA_NOT_FOUND, false},
		{"rekey of an SPI of 3 octets", ikev2.CREATE_CHILD_SA, append(slices.Clone(good), rekey(1, 2, 3)), ikev2.CHILD_SA_NOT_FOUND, false},
		{"IKE SPI of 4 octets", ikev2.CREATE_CHILD_SA, []ikev2.Payload{ikeSPI, nonce, pub}, ikev2.NO_PROPOSAL_CHOSEN, false},
		{"IKE SPI 0", ikev2.CREATE_CHILD_SA, []ikev2.Payload{zeroSPI, nonce, pub}, ikev2.INVALID_SYNTAX, true},
		{"IKE SA without KE", ikev2.CREATE_CHILD_SA, []ikev2.Payload{rekeySPI, nonce}, ikev2.INVALID_SYNTAX, true},
		{"IKE SA, other group", ikev2.CREATE_CHILD_SA, []ikev2.Payload{rekeySPI, nonce, &ikev2.KE{Method: 19, Data: make([]byte, 64)}}, ikev2.INVALID_KE_PAYLOAD, false},
		{"IKE SA, short KE", ikev2.CREATE_CHILD_SA, []ikev2.Payload{rekeySPI, nonce, &ikev2.KE{Method: 31, Data: make([]byte, 31)}}, ikev2.INVALID_SYNTAX, true},
		{"IKE SA, KE of low order", ikev2.CREATE_CHILD_SA, []ikev2.Payload{rekeySPI, nonce, &ikev2.KE{Method: 31, Data: make([]byte, 32)}}, ikev2.INVALID_SYNTAX, true},
		{"liveness", ikev2.INFORMATIONAL, nil, none, false},
		{"delete of nothing", ikev2.INFORMATIONAL, []ikev2.Payload{&ikev2.Delete{Protocol: ikev2.ProtocolESP, SPIs: []uint32{1, 0xffffffff}}}, none, false},
		{"delete of AH", ikev2.INFORMATIONAL, []ikev2.Payload{&ikev2.Delete{Protocol: ikev2.ProtocolAH, SPIs: []uint32{0x10000001}}}, none, false},
		{"delete cut", ikev2.INFORMATIONAL, []ikev2.Payload{raw(pD, 3, 4, 0, 9)}, ikev2.INVALID_SYNTAX, true},
		{"notify cut", ikev2.INFORMATIONAL, []ikev2.Payload{raw(ikev2.PayloadNotify, 1)}, ikev2.INVALID_SYNTAX, true},
		{"unknown error", ikev2.INFORMATIONAL, []ikev2.Payload{notify(8191)}, none, false},
		{"IKE_AUTH once more", ikev2.IKE_AUTH, good, ikev2.TEMPORARY_FAILURE, false},
		{"unknown exchange", 99, nil, ikev2.TEMPORARY_FAILURE, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.establish()
			ps := l.answer(l.craft(c.x, c.ps...))
			if ps == nil {
				t.Fatalf("no answer")
			}
			got := none
			if n := refusal(ps); n != nil {
				got = n.Type
			}
			if got != c.want || l.b.sa.failed != c.dies {
				t.Fatalf("answer %v, ends %v; want %v, %v", got, l.b.sa.failed, c.want, c.dies)
			}
			if c.dies {
				if f := told[Failed](l.b); len(f) != 1 || len(l.b.sads) != 0 {
					t.Errorf("Failed %v, %d SAs left", f, len(l.b.sads))
				}
				return
			}
			// It takes the next request.
			if ps := l.answer(l.craft(ikev2.INFORMATIONAL)); ps == nil || len(ps) != 0 {
				t.Errorf("liveness after it: %v", ps)
			}
		})
	}
}

// Wrong contents of IKE_AUTH requests.
func TestMalformedAuth(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(ps []ikev2.Payload) []ikev2.Payload
		want ikev2.NotifyType
	}{
		{"no AUTH (EAP)", drop(pAUTH), ikev2.AUTHENTICATION_FAILED},
		{"no IDi", drop(pIDi), ikev2.INVALID_SYNTAX},
		{"no TSi", drop(pTSi), ikev2.INVALID_SYNTAX},
		{"no SA", drop(pSA), ikev2.INVALID_SYNTAX},
		{"critical payload", func(ps []ikev2.Payload) []ikev2.Payload {
			return append(ps, &ikev2.Unknown{Type: 99, Critical: true})
		}, ikev2.UNSUPPORTED_CRITICAL_PAYLOAD},
		{"other method", func(ps []ikev2.Payload) []ikev2.Payload {
			ikev2.Find[*ikev2.Auth](ps).Method = ikev2.AuthRSA
			return ps
		}, ikev2.AUTHENTICATION_FAILED},
		{"AUTH cut", func(ps []ikev2.Payload) []ikev2.Payload {
			a := ikev2.Find[*ikev2.Auth](ps)
			a.Data = a.Data[:len(a.Data)-1]
			return ps
		}, ikev2.AUTHENTICATION_FAILED},
		{"AUTH empty", func(ps []ikev2.Payload) []ikev2.Payload {
			ikev2.Find[*ikev2.Auth](ps).Data = nil
			return ps
		}, ikev2.AUTHENTICATION_FAILED},
		{"other identity", func(ps []ikev2.Payload) []ikev2.Payload {
			ikev2.Find[*ikev2.IDi](ps).Data = []byte{1, 2, 3, 4}
			return ps
		}, ikev2.AUTHENTICATION_FAILED},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_AUTH) }
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1)))
			l.run()
			m, err := ikev2.Open(l.kept[0].data, &sk{c: l.a.sa.cur.seal.c})
			if err != nil {
				t.Fatal(err)
			}
			l.a.sa.cur.nextID--
			l.stop = nil
			ps := l.answer(l.craft(ikev2.IKE_AUTH, c.edit(m.Payloads)...))
			if n := refusal(ps); n == nil || n.Type != c.want {
				t.Errorf("answer %v, want %v", names(ps), c.want)
			}
			if f := told[Failed](l.b); len(f) != 1 || len(told[Established](l.b)) != 0 || len(l.b.sads) != 0 {
				t.Errorf("Failed %v, %d Established", f, len(told[Established](l.b)))
			}
			l.step(l.now.Add(time.Second))
		})
	}
}

func drop(t ikev2.PayloadType) func([]ikev2.Payload) []ikev2.Payload {
	return func(ps []ikev2.Payload) []ikev2.Payload {
		return slices.DeleteFunc(ps, func(p ikev2.Payload) bool { return p.PayloadType() == t })
	}
}

// Answers of a peer that holds the keys but does not keep to what was asked.
func TestBadAnswers(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(ps []ikev2.Payload) []ikev2.Payload
		ends bool
	}{
		{"wider selectors", func(ps []ikev2.Payload) []ikev2.Payload {
			ts := ikev2.Find[*ikev2.TSr](ps)
			ts.Selectors[0].End = ts.Selectors[0].End.Next()
			return ps
		}, false},
		{"no selectors", func(ps []ikev2.Payload) []ikev2.Payload {
			ikev2.Find[*ikev2.TSi](ps).Selectors = nil
			return ps
		}, false},
		{"transport mode", func(ps []ikev2.Payload) []ikev2.Payload { return append(ps, notify(ikev2.USE_TRANSPORT_MODE)) }, false},
		{"not offered", func(ps []ikev2.Payload) []ikev2.Payload {
			p := &ikev2.Find[*ikev2.SA](ps).Proposals[0]
			p.Transforms[0].ID = uint16(ikev2.EncrNULL)
			return ps
		}, false},
		{"two proposals", func(ps []ikev2.Payload) []ikev2.Payload {
			sa := ikev2.Find[*ikev2.SA](ps)
			sa.Proposals = append(sa.Proposals, sa.Proposals[0])
			return ps
		}, false},
		{"no KE", drop(pKE), false},
		{"no nonce", drop(pNonce), true},
		{"critical payload", func(ps []ikev2.Payload) []ikev2.Payload {
			return append(ps, &ikev2.Unknown{Type: 99, Critical: true})
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.establish()
			l.addAltered(c.edit)
			if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 2 {
				t.Errorf("a: ChildFailed %v, want that of ACQUIRE 2", f)
			}
			var le *LocalError
			if c.ends {
				if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &le) {
					t.Errorf("a: Failed %v, want one of ours", f)
				}
				l.b.wantEnd(ErrPeerDeleted)
				return
			}
			l.want(1) // and what b made is deleted
		})
	}
}

// A peer that deletes a child SA, and what is still to be done with it.
func TestChildLost(t *testing.T) {
	l := newLab(t)
	l.establish()
	c := inSPI(t, l.a)
	l.a.do(l.a.sa.ChildLost(l.now, c, errors.New("flushed")))
	l.a.do(l.a.sa.ChildLost(l.now, ipsec.SAID{Proto: ipsec.ESP, Dst: addrB.Addr(), SPI: l.b.sa.children[0].in}, errors.New("flushed")))
	l.settle()
	l.want(0)
}
