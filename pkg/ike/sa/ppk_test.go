package sa

import (
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/dh"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// ppk gives a side PPKs.
func (n *node) ppk(mode pad.PPK, own string, keys ...string) {
	n.rule.PPK, n.rule.PPKID, n.rule.PPKs = mode, own, map[string]ipsec.Key{}
	for i := 0; i < len(keys); i += 2 {
		n.rule.PPKs[keys[i]] = ipsec.NewKey([]byte(keys[i+1]))
	}
}

// Both modes on both sides, with and without a common PPK.
func TestPPK(t *testing.T) {
	const p, q = "a post-quantum pre-shared key!!!", "another one"
	no := func(*node) {}
	with := func(mode pad.PPK, own string, keys ...string) func(*node) {
		return func(n *node) { n.ppk(mode, own, keys...) }
	}
	for _, c := range []struct {
		name string
		a, b func(*node)
		used bool // else without
		ok   bool
	}{
		{"both have it", with(pad.PPKRequire, "p", "p", p), with(pad.PPKRequire, "p", "p", p), true, true},
		{"both prefer it", with(pad.PPKPrefer, "p", "p", p), with(pad.PPKPrefer, "", "p", p, "q", q), true, true},
		{"peer has none", with(pad.PPKPrefer, "p", "p", p), no, false, true},
		{"peer has another", with(pad.PPKPrefer, "p", "p", p), with(pad.PPKPrefer, "q", "q", q), false, true},
		{"peer knows it by another name only", with(pad.PPKPrefer, "p", "p", p), with(pad.PPKPrefer, "", "x", p), false, true},
		{"initiator has none", no, with(pad.PPKPrefer, "p", "p", p), false, true},
		{"peer has none, and must", with(pad.PPKRequire, "p", "p", p), no, false, false},
		{"peer has another, and must", with(pad.PPKRequire, "p", "p", p), with(pad.PPKPrefer, "q", "q", q), false, false},
		{"responder requires", no, with(pad.PPKRequire, "p", "p", p), false, false},
		{"responder requires another", with(pad.PPKPrefer, "p", "p", p), with(pad.PPKRequire, "q", "q", q), false, false},
		{"not the same octets", with(pad.PPKPrefer, "p", "p", p), with(pad.PPKPrefer, "p", "p", q), false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			c.a(l.a)
			c.b(l.b)
			l.establish()
			if !c.ok {
				if l.a.sa.failed != true || len(told[Established](l.a)) != 0 || len(told[Established](l.b)) != 0 {
					t.Errorf("a %s, b %s; want neither established", l.a.describe(), l.b.describe())
				}
				return
			}
			l.want(1)
			if l.a.sa.ppk != c.used || l.b.sa.ppk != c.used {
				t.Errorf("PPK used: a %v, b %v; want %v", l.a.sa.ppk, l.b.sa.ppk, c.used)
			}
			l.a.do(l.a.sa.Rekey(l.now))
			l.settle()
			l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
			l.settle()
			l.step(l.now.Add(linger + 1))
			l.want(2)
		})
	}
	withFaults(t, func(t *testing.T, l *lab) {
		l.a.ppk(pad.PPKPrefer, "p", "p", p)
		l.b.ppk(pad.PPKRequire, "", "p", p)
		l.establish()
		l.want(1)
	})
}

// IKE_SA_INIT     SA, KE(x25519), Ni  -->  <--  SA, KE, Nr
// IKE_INTERMEDIATE  KE(ml-kem-768)    -->  <--  KE
// IKE_INTERMEDIATE  KE(ml-kem-1024)   -->  <--  KE
// IKE_AUTH                            -->  <--
func TestSeveralKeyExchanges(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		add := [][]alg.KE{{alg.KEMLKEM768}, {alg.KEECP384, alg.KENone}, {alg.KEMLKEM1024, alg.KEMLKEM768}}
		l.a.rule.Proposals[0].AddKE = add
		l.b.rule.Proposals = []proposal.IKE{l.b.rule.Proposals[0]}
		l.b.rule.Proposals[0].AddKE = [][]alg.KE{{alg.KEMLKEM768}, {alg.KENone}, {alg.KEMLKEM768, alg.KEMLKEM1024}}
		l.establish()
		l.want(1)
		if want := (proposal.AddKEs{alg.KEMLKEM768, alg.KENone, alg.KEMLKEM1024}); l.a.sa.cur.suite.AddKE != want {
			t.Errorf("key exchanges %v, want %v", l.a.sa.cur.suite.AddKE, want)
		}
	})
}

// A peer that has never heard of additional key exchanges takes the second
// proposal, in one round (the KE payload suits it).
func TestFallThrough(t *testing.T) {
	l := newLab(t)
	l.b.rule.Proposals = proposal.WithoutAddKE(l.b.rule.Proposals)
	l.establish()
	l.want(1)
	if n := len(l.initRequests()); n != 1 || l.a.sa.cur.suite.AddKE.Methods() != nil {
		t.Errorf("%d IKE_SA_INIT requests, suite %v; want 1 without", n, l.a.sa.cur.suite)
	}
}

// AUTH covers IKE_INTERMEDIATE: whoever changes what is in it, knowing the keys,
// is found out.
func TestIntAuth(t *testing.T) {
	for _, side := range []string{"initiator", "responder"} {
		l := newLab(t)
		l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_AUTH) }
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, reqA(1)))
		l.run()
		if l.b.sa.cur.hs.intI == nil || l.b.sa.cur.hs.intR == nil {
			t.Fatal("nothing covered")
		}
		if side == "initiator" {
			l.b.sa.cur.hs.intI[0] ^= 1
		} else {
			l.b.sa.cur.hs.intR[0] ^= 1
		}
		l.let()
		l.settle()
		if len(told[Established](l.a))+len(told[Established](l.b)) != 0 {
			t.Errorf("%s: established", side)
		}
	}
}

// What a peer may send wrong in IKE_INTERMEDIATE.
func TestMalformedIntermediate(t *testing.T) {
	good := func() []byte {
		k, err := dh.Generate(alg.KEMLKEM768, nil)
		if err != nil {
			t.Fatal(err)
		}
		return k.Public()
	}
	bad := good()
	for i := range bad {
		bad[i] = 0xff // coefficients that are not reduced
	}
	for _, c := range []struct {
		name string
		x    ikev2.ExchangeType
		ps   []ikev2.Payload
	}{
		{"IKE_AUTH too early", ikev2.IKE_AUTH, []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: good()}}},
		{"no KE", ikev2.IKE_INTERMEDIATE, nil},
		{"KE twice", ikev2.IKE_INTERMEDIATE, []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: good()}, &ikev2.KE{Method: ikev2.KEML_KEM_768, Data: good()}}},
		{"another method", ikev2.IKE_INTERMEDIATE, []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_1024, Data: good()}}},
		{"cut", ikev2.IKE_INTERMEDIATE, []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: good()[1:]}}},
		{"empty", ikev2.IKE_INTERMEDIATE, []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768}}},
		{"a ciphertext", ikev2.IKE_INTERMEDIATE, []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: make([]byte, 1088)}}},
		{"not reduced", ikev2.IKE_INTERMEDIATE, []ikev2.Payload{&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: bad}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_INTERMEDIATE) }
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1)))
			l.run()
			l.a.sa.cur.nextID--
			l.stop = nil
			ps := l.answer(l.craft(c.x, c.ps...))
			if n := refusal(ps); n == nil || n.Type != ikev2.INVALID_SYNTAX {
				t.Errorf("answer %v, want INVALID_SYNTAX", names(ps))
			}
			if f := told[Failed](l.b); len(f) != 1 {
				t.Errorf("Failed %v, want one", f)
			}
		})
	}
}

// A responder that answers IKE_INTERMEDIATE wrongly.
func TestMalformedIntermediateAnswer(t *testing.T) {
	for name, ps := range map[string][]ikev2.Payload{
		"error":          {notify(ikev2.NO_PROPOSAL_CHOSEN)},
		"no KE":          nil,
		"another method": {&ikev2.KE{Method: ikev2.KEML_KEM_1024, Data: make([]byte, 1568)}},
		"cut":            {&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: make([]byte, 1087)}},
		"a public key":   {&ikev2.KE{Method: ikev2.KEML_KEM_768, Data: make([]byte, 1184)}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_INTERMEDIATE) }
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1)))
			l.run()
			l.answerTo(ps...)
			l.settle()
			if f := told[Failed](l.a); len(f) != 1 {
				t.Errorf("Failed %v, want one", f)
			}
		})
	}
}

// With certificates AUTH and NO_PPK_AUTH are signatures.
func TestPPKCertificates(t *testing.T) {
	for _, peerHas := range []bool{true, false} {
		l, _ := certLab(t, "p256", "p256")
		l.narrow()
		l.a.ppk(pad.PPKPrefer, "p", "p", "a post-quantum pre-shared key!!!")
		if peerHas {
			l.b.ppk(pad.PPKPrefer, "", "p", "a post-quantum pre-shared key!!!")
		} else {
			l.b.ppk(pad.PPKPrefer, "", "q", "another")
		}
		l.establish()
		l.want(1)
		if l.a.sa.ppk != peerHas || l.b.sa.ppk != peerHas {
			t.Errorf("PPK used: a %v, b %v; want %v", l.a.sa.ppk, l.b.sa.ppk, peerHas)
		}
		if _, n := l.sizes(); n[ikev2.IKE_AUTH] == 0 {
			t.Error("no fragments in IKE_AUTH")
		}
	}
}
