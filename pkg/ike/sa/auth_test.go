package sa

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

func key(s string) ipsec.Key { return ipsec.NewKey([]byte(s)) }

// The responder finds the initiator's AUTH wrong: it says so, under protection.
func TestWrongKey(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		l.b.rule.PSK = pad.Keys{Local: key("a very shared secret"), Remote: key("another secret")}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, reqA(5)))
		l.settle()
		var pe *PeerError
		if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.AUTHENTICATION_FAILED || pe.Exchange != ikev2.IKE_AUTH {
			t.Errorf("a: Failed %v, want the peer's AUTHENTICATION_FAILED", f)
		}
		if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 5 {
			t.Errorf("a: ChildFailed %v, want one", f)
		}
		var le *LocalError
		if f := told[Failed](l.b); len(f) != 1 || !errors.As(f[0].Err, &le) || le.Notify != ikev2.AUTHENTICATION_FAILED {
			t.Errorf("b: Failed %v, want our AUTHENTICATION_FAILED", f)
		}
		l.step(l.now.Add(linger + 1))
		if !l.a.sa.done || !l.b.sa.done || len(l.a.larval) != 0 {
			t.Errorf("left: a %s, b %s, larval %v", l.a.describe(), l.b.describe(), l.a.larval)
		}
	})
}

// The initiator finds the responder's AUTH wrong, which takes it for
// established: it is told.
func TestWrongKeyOfResponder(t *testing.T) {
	l := newLab(t)
	l.b.rule.PSK = pad.Keys{Local: key("another secret"), Remote: key("a very shared secret")}
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(5)))
	l.settle()
	var le *LocalError
	if f := told[Failed](l.a); len(f) != 1 || !errors.As(f[0].Err, &le) || le.Notify != ikev2.AUTHENTICATION_FAILED {
		t.Errorf("a: Failed %v, want our AUTHENTICATION_FAILED", f)
	}
	var pe *PeerError
	if f := told[Failed](l.b); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.AUTHENTICATION_FAILED {
		t.Errorf("b: Failed %v, want the peer's AUTHENTICATION_FAILED", f)
	}
	if len(l.a.sads)+len(l.b.sads)+len(l.a.larval) != 0 {
		t.Errorf("left: %v, %v, %v", l.a.sads, l.b.sads, l.a.larval)
	}
}

func TestIdentities(t *testing.T) {
	fqdn := func(s string) pad.ID { return pad.ID{Type: ikev2.IDFQDN, Data: s} }
	is := func(s string) pad.Patterns { return pad.Patterns{{ID: fqdn(s)}} }
	for _, c := range []struct {
		name   string
		set    func(a, b *pad.Rule)
		ok     bool
		asksID bool
	}{
		{"addresses", func(a, b *pad.Rule) {}, true, false},
		{"names", func(a, b *pad.Rule) {
			a.LocalID, b.LocalID = fqdn("a.example"), fqdn("b.example")
			a.RemoteIDs, b.RemoteIDs = is("b.example"), is("a.example")
		}, true, true},
		{"wildcard", func(a, b *pad.Rule) {
			a.LocalID, b.RemoteIDs = fqdn("x.example"), is("*.example")
		}, true, false},
		{"initiator not permitted", func(a, b *pad.Rule) { a.LocalID = fqdn("a.example") }, false, false},
		{"responder not permitted", func(a, b *pad.Rule) { b.LocalID = fqdn("b.example") }, false, false},
		{"asks for somebody else", func(a, b *pad.Rule) { a.RemoteIDs = is("c.example") }, false, true},
		{"key by identities", func(a, b *pad.Rule) {
			a.LocalID, b.RemoteIDs = fqdn("a.example"), is("a.example")
			a.PSK, b.PSK = pad.Keys{}, pad.Keys{}
			k := pad.Keys{Local: key("for a"), Remote: key("for a")}
			a.Pairs = []pad.PairKeys{{LocalID: pad.Pattern{ID: fqdn("a.example")}, Keys: k}}
			b.Pairs = []pad.PairKeys{{RemoteID: pad.Pattern{ID: fqdn("z.example")}, Keys: pad.Keys{Local: key("no"), Remote: key("no")}},
				{RemoteID: pad.Pattern{ID: fqdn("a.example")}, Keys: k}}
		}, true, false},
		{"no key", func(a, b *pad.Rule) {
			a.PSK = pad.Keys{}
			a.Pairs = []pad.PairKeys{{LocalID: pad.Pattern{ID: fqdn("other")}, Keys: b.PSK}}
		}, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			c.set(l.a.rule, l.b.rule)
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1)))
			l.settle()
			if !c.ok {
				if len(told[Failed](l.a)) != 1 || len(l.a.sads) != 0 || len(told[ChildFailed](l.a)) != 1 {
					t.Errorf("a: Failed %v, ChildFailed %v, %d SAs; want one, one, none", told[Failed](l.a), told[ChildFailed](l.a), len(l.a.sads))
				}
				return
			}
			l.want(1)
			p, q := told[Established](l.a)[0].Peer, told[Established](l.b)[0].Peer
			if p.LocalID != q.RemoteID || p.RemoteID != q.LocalID {
				t.Errorf("identities %v %v, and %v %v", p.LocalID, p.RemoteID, q.LocalID, q.RemoteID)
			}
		})
	}
}

func TestAdmit(t *testing.T) {
	l := newLab(t)
	l.b.admit = errors.New("one is enough")
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.settle()
	if f := told[Failed](l.b); len(f) != 1 || !errors.Is(f[0].Err, l.b.admit) {
		t.Errorf("b: Failed %v, want %v", f, l.b.admit)
	}
}

func TestInitialContact(t *testing.T) {
	for _, want := range []bool{false, true} {
		l := newLab(t)
		l.a.cfg.InitialContact, l.b.first = want, want
		l.establish()
		if a, b := told[Established](l.a)[0].OnlyOne, told[Established](l.b)[0].OnlyOne; a != want || b != want {
			t.Errorf("OnlyOne %v, %v; want %v", a, b, want)
		}
	}
}

// The child SA is refused, the IKE SA stays.
func TestChildRefused(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(l *lab)
		want ikev2.NotifyType
	}{
		{"selectors", func(l *lab) { l.b.policies = []Policy{tunnel("10.3.0.0/16", "10.4.0.0/16", 1)} }, ikev2.TS_UNACCEPTABLE},
		{"no policy", func(l *lab) { l.b.policies = nil }, ikev2.TS_UNACCEPTABLE},
		{"mode", func(l *lab) {
			l.b.policies = []Policy{policy(ipsec.Selector{Src: pfx("10.2.0.0/16"), Dst: pfx("10.1.0.0/16")}, ipsec.Transport, 1)}
		}, ikev2.TS_UNACCEPTABLE},
		{"algorithms", func(l *lab) {
			l.b.policies[0].Out.Proposals = []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1, EncrMinBits: 192, EncrMaxBits: 192}}
		}, ikev2.NO_PROPOSAL_CHOSEN},
		{"no SPI", func(l *lab) { l.b.spiErr = errors.New("none left") }, ikev2.TEMPORARY_FAILURE},
	} {
		t.Run(c.name, func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				c.set(l)
				l.establish()
				l.want(0)
				var pe *PeerError
				if f := told[ChildFailed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != c.want || f[0].Seq != 1 {
					t.Errorf("a: ChildFailed %v, want %v", f, c.want)
				}
				// And by CREATE_CHILD_SA.
				l.b.rule.PFS, l.a.rule.PFS = nil, nil
				l.clearEvents()
				l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
				l.settle()
				l.want(0)
				if f := told[ChildFailed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != c.want || f[0].Seq != 2 {
					t.Errorf("a: ChildFailed %v, want %v", f, c.want)
				}
			})
		})
	}
}

// No SPI on the initiator's side.
func TestNoSPI(t *testing.T) {
	l := newLab(t)
	l.establish()
	l.a.spiErr = errors.New("none left")
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.settle()
	l.want(1)
	if f := told[ChildFailed](l.a); len(f) != 1 || !errors.Is(f[0].Err, l.a.spiErr) {
		t.Errorf("a: ChildFailed %v, want %v", f, l.a.spiErr)
	}
	m := newLab(t)
	m.a.spiErr = errors.New("none left")
	m.a.sa = NewInitiator(m.a.cfg, m.a.rule)
	m.a.do(m.a.sa.Start(m.now, reqA(1)))
	m.settle()
	m.a.wantEnd(m.a.spiErr)
}

// The machine stands still for an SPI; what the peer repeats is not served
// twice, and a late answer is released.
func TestHoldSPI(t *testing.T) {
	l := newLab(t)
	l.b.holdSPI = true
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.run()
	if st := l.b.sa.cur.state; st != StateAuthWork || len(l.b.waiting) != 1 {
		t.Fatalf("b: %v, %d waiting; want %v, 1", st, len(l.b.waiting), StateAuthWork)
	}
	tok := l.b.waiting[0].Token
	l.step(l.now.Add(1e9))
	if n := l.b.sa.counters.Retransmits; n != 1 || len(l.b.waiting) != 1 {
		t.Errorf("b: %d repeated requests, %d waiting; want 1, 1", n, len(l.b.waiting))
	}
	l.b.larval[ipsec.SAID{Proto: ipsec.ESP, Dst: addrB.Addr(), SPI: 0x1234}] = true
	delete(l.b.sa.spiWaits, tok) // the wait is taken back
	l.b.do(l.b.sa.ChildSPI(l.now, tok, 0x1234, nil))
	if r := told[ReleaseSPI](l.b); len(r) != 1 || r[0].SPI != 0x1234 || !slices.Equal(r[0].Protos, []ipsec.Protocol{ipsec.ESP}) {
		t.Errorf("b: ReleaseSPI %v, want 0x1234 of ESP", r)
	}
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// RFC 7296, 2.15 and 3: reserved octets are ignored, whatever is in them, and the
// peer's AUTH covers them as it has sent them.
func TestReservedOctetsOfID(t *testing.T) {
	for _, of := range []string{"initiator", "responder"} {
		t.Run(of, func(t *testing.T) {
			l := newLab(t)
			n := l.a
			if of == "responder" {
				n = l.b
			}
			l.stop = func(p packet) bool { return p.from == n && p.data[18] == byte(ikev2.IKE_AUTH) }
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1)))
			l.run()
			i := l.a.sa.cur // has the keys of both
			seal := i.seal
			if n == l.b {
				seal = l.b.sa.cur.seal
			}
			m, err := ikev2.Open(l.kept[0].data, &sk{c: seal.c})
			if err != nil {
				t.Fatal(err)
			}
			var id *ikev2.ID
			if n == l.a {
				id = &ikev2.Find[*ikev2.IDi](m.Payloads).ID
			} else {
				id = &ikev2.Find[*ikev2.IDr](m.Payloads).ID
			}
			id.Reserved = [3]byte{1, 2, 3}
			auth := ikev2.Find[*ikev2.Auth](m.Payloads)
			if auth.Data, err = l.a.sa.authData(i, l.a.rule.PSK.Local, n == l.a, idBody(*id)); err != nil {
				t.Fatal(err)
			}
			if l.kept[0].data, err = m.AppendSealed(nil, seal); err != nil {
				t.Fatal(err)
			}
			l.let(0)
			l.settle()
			l.want(1)
		})
	}
}

// An IKE_AUTH response that grants the child SA and refuses it: what the peer may
// have made of it is deleted.
func TestGrantedAndRefused(t *testing.T) {
	l := newLab(t)
	l.stop = func(p packet) bool { return p.from == l.b && p.data[18] == byte(ikev2.IKE_AUTH) }
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.run()
	seal := l.b.sa.cur.seal
	m, err := ikev2.Open(l.kept[0].data, &sk{c: seal.c})
	if err != nil {
		t.Fatal(err)
	}
	m.Payloads = append(m.Payloads, notify(8000))
	if l.kept[0].data, err = m.AppendSealed(nil, seal); err != nil {
		t.Fatal(err)
	}
	l.let(0)
	l.settle()
	l.want(0)
	var pe *PeerError
	if f := told[ChildFailed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != 8000 {
		t.Errorf("a: ChildFailed %v, want the peer's refusal", f)
	}
}
