package sa

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

var (
	ownNames     = [numOwn]string{"nothing", "create child", "rekey child", "child replaced", "close child", "rekey IKE SA", "IKE SA replaced", "close IKE SA"}
	askNames     = [numAsks]string{"create child", "rekey it", "rekey other", "rekey unknown", "close it", "close other", "close unknown", "rekey IKE SA", "close IKE SA"}
	verdictNames = [...]string{usual: "yes", both: "both", unnamed: "silent", notFound: "no SA", notNow: "later"}
)

// The table of the package doc is the one that the machine goes by.
func TestCollisionsDoc(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	for o, row := range collisions {
		line := fmt.Sprintf("//\t%-16s", ownNames[o])
		for _, v := range row {
			line += fmt.Sprintf("%-8s", verdictNames[v])
		}
		if line = strings.TrimRight(line, " ") + "\n"; !strings.Contains(string(doc), line) {
			t.Errorf("the package doc lacks %q", line)
		}
	}
}

// plain gives both sides one suite without additional key exchanges.
func (l *lab) plain() {
	for _, n := range []*node{l.a, l.b} {
		n.rule.Proposals = []proposal.IKE{{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 128}},
			PRF: []alg.PRF{alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEX25519}}}
	}
}

// trio is a lab with three child SAs, in which both sides can ask for more. x is
// the side that has something under way, y the other.
func trio(t testing.TB, swap bool) (l *lab, x, y *node) {
	l = newLab(t)
	l.plain()
	l.a.policies = []Policy{reqA(0).Policy}
	l.a.rule.DPD, l.b.rule.DPD = 0, 0
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1), reqA(2), reqA(3)))
	l.settle()
	l.want(3)
	l.clearEvents()
	l.sent, l.all = 0, nil
	if swap {
		return l, l.b, l.a
	}
	return l, l.a, l.b
}

func (n *node) said(c *child) ipsec.SAID {
	return ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}
}

// peerOf is n's end of a child SA of the other side.
func (n *node) peerOf(c *child) *child {
	n.t.Helper()
	o := n.sa.childOut(c.proto, c.in)
	if o == nil {
		n.t.Fatalf("%s does not have %v", n.name, c)
	}
	return o
}

// forget has n lose a child SA without a word.
func (n *node) forget(c *child) {
	n.sa.children = slices.DeleteFunc(n.sa.children, func(o *child) bool { return o == c })
	delete(n.sads, n.said(c))
	delete(n.sads, ipsec.SAID{Proto: c.proto, Dst: c.outDst, SPI: c.outSPI})
}

func (n *node) add() { n.do(n.sa.AddChild(n.now, ChildRequest{Seq: 9, Policy: n.policies[0]})) }

func (n *node) expire(c *child, hard bool) { n.do(n.sa.ChildExpired(n.now, n.said(c), hard)) }

// begin has n begin o, about c.
func (n *node) begin(o own, c *child) {
	switch o {
	case ownCreate:
		n.add()
	case ownRekey, ownClose:
		n.expire(c, o == ownClose)
	case ownRekeyIKE:
		n.do(n.sa.Rekey(n.now))
	case ownCloseIKE:
		n.do(n.sa.Delete(n.now))
	}
}

// forge seals a request as the other end of i, which is n's, would.
func (n *node) forge(i *ikeSA, x ikev2.ExchangeType, ps ...ikev2.Payload) Datagram {
	n.t.Helper()
	h := i.header(x, i.expect, false)
	h.Flags ^= ikev2.FlagInitiator
	b, err := (&ikev2.Message{Header: h, Payloads: ps}).AppendSealed(nil, &sk{c: i.open.c})
	if err != nil {
		n.t.Fatal(err)
	}
	return Datagram{n.sa.local, n.sa.remote, b}
}

// ask hands a forged request to n and returns what n answers; nil: nothing.
func (n *node) ask(i *ikeSA, x ikev2.ExchangeType, ps ...ikev2.Payload) []ikev2.Payload {
	n.t.Helper()
	seal, before := &sk{c: i.seal.c}, len(n.events)
	n.do(n.sa.Receive(n.now, n.forge(i, x, ps...)))
	for _, o := range n.events[before:] {
		s, ok := o.(Send)
		if !ok || s.Data[19]&byte(ikev2.FlagResponse) == 0 {
			continue
		}
		m, err := ikev2.Open(s.Data, seal)
		if err != nil {
			n.t.Fatalf("answer: %v", err)
		}
		return append([]ikev2.Payload{}, m.Payloads...)
	}
	return nil
}

// childPayloads are those of a request of n for a child SA, without PFS.
func (n *node) childPayloads(rekeys *child) []ikev2.Payload {
	n.t.Helper()
	o, err := n.sa.newOffer(n.sa.cur, ChildRequest{Policy: n.policies[0]}, rekeys)
	if err != nil {
		n.t.Fatal(err)
	}
	o.spi, o.ni = 0x51000001, make([]byte, 32)
	for i := range o.proposals {
		o.proposals[i].KE = nil
	}
	return o.payloads(false)
}

func (n *node) rekeyPayloads() []ikev2.Payload {
	k, err := dh.Generate(alg.KEX25519, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return []ikev2.Payload{proposal.OfferIKE(n.rule.Proposals, []byte{1, 2, 3, 4, 5, 6, 7, 8}), &ikev2.Nonce{Data: make([]byte, 32)},
		&ikev2.KE{Method: 31, Data: k.Public()}}
}

// Every cell of the table, on both sides: what is answered at once.
func TestCollisionAnswers(t *testing.T) {
	for o := range numOwn {
		for k := range numAsks {
			for _, swap := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/%v", ownNames[o], askNames[k], swap), func(t *testing.T) {
					l, x, y := trio(t, swap)
					it, other := x.sa.children[0], x.sa.children[1]
					yIt, yOther := y.peerOf(it), y.peerOf(other)
					i := x.sa.cur
					switch o {
					case ownReplaced, ownReplacedIKE: // and the Delete is on its way
						l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.INFORMATIONAL) }
						if o == ownReplaced {
							y.begin(ownRekey, yIt)
						} else {
							y.begin(ownRekeyIKE, nil)
						}
						l.run()
					default:
						l.stop = func(packet) bool { return true }
						x.begin(o, it)
					}
					if o != ownNothing && len(l.kept) != 1 {
						t.Fatalf("%d messages held back, want one", len(l.kept))
					}
					l.stop = func(packet) bool { return true }
					children := len(x.sa.children)
					info, create := ikev2.INFORMATIONAL, ikev2.CREATE_CHILD_SA
					del := func(c ipsec.SPI) ikev2.Payload {
						return &ikev2.Delete{Protocol: ikev2.ProtocolESP, SPIs: []uint32{uint32(c)}}
					}
					var ps []ikev2.Payload
					named, gone := ipsec.SPI(0), 0 // what the answer deletes, and how many go
					switch k {
					case askCreate:
						ps = x.ask(i, create, y.childPayloads(nil)...)
					case askRekey:
						ps = x.ask(i, create, y.childPayloads(yIt)...)
					case askRekeyOther:
						ps = x.ask(i, create, y.childPayloads(yOther)...)
					case askRekeyUnknown:
						lost := *yOther
						lost.in = 0x66000001
						ps = x.ask(i, create, y.childPayloads(&lost)...)
					case askClose:
						ps, named, gone = x.ask(i, info, del(yIt.in)), it.in, 1
					case askCloseOther:
						ps, named, gone = x.ask(i, info, del(yOther.in)), other.in, 1
					case askCloseUnknown:
						ps = x.ask(i, info, del(0x66000001))
					case askRekeyIKE:
						ps = x.ask(i, create, y.rekeyPayloads()...)
					case askCloseIKE:
						ps = x.ask(i, info, &ikev2.Delete{Protocol: ikev2.ProtocolIKE})
					}
					if ps == nil {
						t.Fatal("no answer")
					}
					v := collisions[o][k]
					var refused ikev2.NotifyType
					if n := refusal(ps); n != nil {
						refused = n.Type
					}
					if want := map[verdict]ikev2.NotifyType{notNow: ikev2.TEMPORARY_FAILURE, notFound: ikev2.CHILD_SA_NOT_FOUND}[v]; refused != want {
						t.Errorf("answer %v, want %v", refused, want)
					}
					if n := refusal(ps); v == notFound && n != nil && (n.Protocol != ikev2.ProtocolESP || string(n.SPI) != "\x66\x00\x00\x01") {
						t.Errorf("CHILD_SA_NOT_FOUND for %v %x, want that of REKEY_SA", n.Protocol, n.SPI)
					}
					d := ikev2.Find[*ikev2.Delete](ps)
					switch named := named != 0 && v == usual; {
					case named != (d != nil):
						t.Errorf("Delete payload %v, want one: %v", d, named)
					}
					if d != nil && (len(d.SPIs) != 1 || d.SPIs[0] != uint32(named)) {
						t.Errorf("answer deletes %x, want %v", d.SPIs, named)
					}
					ends := k == askCloseIKE && o != ownReplacedIKE
					if x.sa.failed != ends || len(told[Failed](x)) > 1 {
						t.Errorf("ends %v, want %v", x.sa.failed, ends)
					}
					if grants := (k == askCreate || k == askRekey || k == askRekeyOther) && (v == usual || v == both); !ends {
						want := children - gone
						if grants {
							want++
						}
						if len(x.sa.children) != want {
							t.Errorf("%d child SAs, want %d", len(x.sa.children), want)
						}
					}
					if refused != 0 && len(x.larval) > 1 {
						t.Errorf("larval SAs left: %v", x.larval)
					}
				})
			}
		}
	}
}

// effect is how many child SAs more or less there are afterwards.
func effect(o own, k ask) int {
	n := 0
	switch o {
	case ownCreate:
		n++
	case ownClose:
		n--
	}
	switch k {
	case askCreate:
		n++
	case askClose:
		if o != ownClose { // the same
			n--
		}
	case askCloseOther, askCloseUnknown:
		n--
	}
	return n
}

// Every cell that two honest sides can come to, in both directions: their requests
// cross, and each single message is lost, comes twice, or late. In the end both have
// the same, and the right number of it.
//
//	x  --- own ---.   .--- ask ---  y
//	                X
//	x  <-- ask ---'   '--> own ---  y
func TestCollisions(t *testing.T) {
	for _, o := range []own{ownNothing, ownCreate, ownRekey, ownClose, ownRekeyIKE, ownCloseIKE} {
		for k := range numAsks {
			t.Run(ownNames[o]+"/"+askNames[k], func(t *testing.T) {
				for _, swap := range []bool{false, true} {
					n := crossing(t, o, k, swap, 0, "")
					for m := 1; m <= n; m++ {
						for _, f := range []fault{lose, duplicate, delay} {
							if t.Failed() {
								return
							}
							crossing(t, o, k, swap, m, f)
							if t.Failed() {
								t.Fatalf("swapped %v, message %d %s", swap, m, f)
							}
						}
					}
				}
			})
		}
	}
}

func crossing(t *testing.T, o own, k ask, swap bool, message int, f fault) (sent int) {
	t.Helper()
	l, x, y := trio(t, swap)
	it, other, third := x.sa.children[0], x.sa.children[1], x.sa.children[2]
	yIt, yOther, yThird := y.peerOf(it), y.peerOf(other), y.peerOf(third)
	if k == askRekeyUnknown || k == askCloseUnknown {
		x.forget(third)
	}
	l.fault.n, l.fault.kind = message, f
	l.stop = func(packet) bool { return true }
	x.begin(o, it)
	switch k {
	case askCreate:
		y.begin(ownCreate, nil)
	case askRekey:
		y.begin(ownRekey, yIt)
	case askRekeyOther:
		y.begin(ownRekey, yOther)
	case askRekeyUnknown:
		y.begin(ownRekey, yThird)
	case askClose:
		y.begin(ownClose, yIt)
	case askCloseOther:
		y.begin(ownClose, yOther)
	case askCloseUnknown:
		y.begin(ownClose, yThird)
	case askRekeyIKE:
		y.begin(ownRekeyIKE, nil)
	case askCloseIKE:
		y.begin(ownCloseIKE, nil)
	}
	want := 2
	if o == ownNothing {
		want = 1
	}
	if len(l.kept) != want {
		t.Fatalf("%d requests, want %d", len(l.kept), want)
	}
	l.let()
	l.settle()
	sent = l.sent
	l.fault.n = 0
	deletes := func(n *node) (c int) {
		for _, p := range l.all {
			if p.from == n && p.data[18] == byte(ikev2.INFORMATIONAL) && p.data[19]&byte(ikev2.FlagResponse) == 0 {
				c++
			}
		}
		return c
	}
	if collisions[o][k] == both && message == 0 && (deletes(x) != 1 || deletes(y) != 1) {
		t.Errorf("Deletes: %d and %d; each side closes one", deletes(x), deletes(y))
	}
	l.step(l.now.Add(staleAfter + linger + 1))
	if o == ownCloseIKE || k == askCloseIKE {
		for _, n := range []*node{x, y} {
			if f := told[Failed](n); len(f) != 1 || len(n.sads)+len(n.larval)+len(n.spis) != 0 || !n.sa.done {
				t.Errorf("%s: Failed %v, left %d SAs, %d larval, %d IKE SPIs, done %v", n.name, f, len(n.sads), len(n.larval), len(n.spis), n.sa.done)
			}
		}
		return sent
	}
	l.want(3 + effect(o, k))
	// What was rekeyed is not there any more, on either side.
	if o == ownRekey && x.sads[x.said(it)] != nil || o == ownRekey && y.sads[y.said(yIt)] != nil {
		t.Errorf("%v is still there", it)
	}
	return sent
}

// b makes the child SA that a asks for, the answer is lost, and at once b rekeys or
// closes it, which a has not heard of.
//
//	a  --- create -------------->  b
//	a       x--- response -------  b
//	a  <-- rekey or close it ----  b
func TestCollideNewborn(t *testing.T) {
	for _, hard := range []bool{false, true} {
		withFaults(t, func(t *testing.T, l *lab) {
			l.plain()
			l.a.policies = []Policy{reqA(0).Policy}
			l.establish()
			l.stop = func(p packet) bool { return p.from == l.b && p.data[19]&byte(ikev2.FlagResponse) != 0 }
			l.a.add()
			l.settleWith(func() bool { return len(l.b.sa.children) == 2 })
			l.b.expire(l.b.sa.children[1], hard)
			l.run()
			l.stop, l.kept = nil, nil
			l.settle()
			l.fault.n = 0
			l.step(l.now.Add(linger + 1))
			want := 2
			if hard {
				want = 1
			}
			l.want(want)
			if f := told[ChildFailed](l.a); (len(f) == 1) != hard {
				t.Errorf("ChildFailed %v; deleted %v", f, hard)
			}
		})
	}
}

// settleWith goes on until there is what is waited for.
func (l *lab) settleWith(done func() bool) {
	l.t.Helper()
	for range 100 {
		l.run()
		if done() {
			return
		}
		l.step(l.now.Add(250 * time.Millisecond))
	}
	l.t.Fatalf("does not come: a %s, b %s", l.a.describe(), l.b.describe())
}

// What a wants still waits for an SPI when b rekeys the IKE SA: it is asked for in
// the new one.
func TestCollideWaiting(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.plain()
		l.a.policies = []Policy{reqA(0).Policy}
		l.establish()
		l.a.holdSPI = true
		l.a.add()
		l.a.expire(l.a.sa.children[0], false)
		l.b.do(l.b.sa.Rekey(l.now))
		l.settleWith(func() bool { return l.b.sa.cur.initiator })
		l.a.holdSPI = false
		l.a.giveSPIs()
		l.settle()
		l.fault.n = 0
		l.step(l.now.Add(linger + 1))
		l.want(2)
		if r := told[Rekeyed](l.a); len(r) != 2 {
			t.Errorf("a: Rekeyed %v, want the IKE SA and the child SA", r)
		}
	})
}
