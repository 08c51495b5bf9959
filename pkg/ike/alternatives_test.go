package ike

import (
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// withPolicy gives the policies of a node these alternatives and what they need.
func withPolicy(flags ipsec.PolicyFlags, alts ...ipsec.Proposal) option {
	return func(_ *Config, m *missiu) {
		var rs []ipsec.Request
		for k, proto := range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
			if len(ipsec.Parts(alts, proto)) > 0 {
				rs = append(rs, ipsec.Request{Proto: proto, Mode: ipsec.Transport, Level: ipsec.LevelUnique, ReqID: ipsec.ReqID(7 + k)})
			}
		}
		for i := range m.policies {
			m.policies[i].Requests, m.policies[i].Proposals, m.policies[i].Flags = rs, alts, flags
		}
	}
}

var (
	altGCM  = ipsec.Proposal{Encr: alg.EncrAESGCM16}
	altAH   = ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA256}
	altBoth = ipsec.Proposal{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1, AH: alg.IntegHMACSHA1}
)

// protos counts the SAs of a node by protocol.
func (x *node) protos() map[ipsec.Protocol]int {
	n := map[ipsec.Protocol]int{}
	for _, p := range x.m.list() {
		n[p.Proto]++
	}
	return n
}

func (x *node) wantSAs(t *testing.T, esp, ah int) {
	t.Helper()
	if n := x.protos(); n[ipsec.ESP] != esp || n[ipsec.AH] != ah {
		t.Errorf("%v: SAs %v, want %d of ESP, %d of AH", x.cfg.Local[0], n, esp, ah)
		x.dump(t)
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if len(x.m.larval) != 0 {
		t.Errorf("%v: larval SAs left: %v", x.cfg.Local[0], x.m.larval)
	}
}

func (x *node) ask(seq uint32, proto ipsec.Protocol, offer ...ipsec.Proposal) {
	x.m.event(keysock.Acquire{Seq: seq, Proto: proto, Src: addrA, Dst: addrB, PolicyID: 1, Mode: ipsec.Transport, Proposals: offer,
		Flow: &ipsec.Flow{Src: addrA, Dst: addrB, Proto: 1}})
	time.Sleep(time.Second)
	synctest.Wait()
}

// TestAcquireAlternatives: ACQUIREs for AH, for both SAs of ESP in AH, and for
// whatever the peer likes of a policy; SPIs that are not used are given back.
func TestAcquireAlternatives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t, withPolicy(0, altAH))
		a.ask(1, ipsec.AH)
		a.wantSAs(t, 0, 2)
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)

		_, a, b = pair(t, withPolicy(0, altBoth))
		espPart, _ := altBoth.Part(ipsec.ESP)
		ahPart, _ := altBoth.Part(ipsec.AH)
		a.ask(1, ipsec.ESP, espPart)
		a.ask(2, ipsec.AH, ahPart)
		a.wantSAs(t, 2, 2)
		wantPair(t, a, b, 2)
		// One that is lost is made again, the other stays.
		for _, p := range a.m.list() {
			if p.Proto == ipsec.AH && p.Dst == addrA {
				a.m.mu.Lock()
				delete(a.m.sas, p.SAID)
				a.m.mu.Unlock()
				a.m.event(keysock.SADeleted{SAID: p.SAID, Src: p.Src})
			}
		}
		time.Sleep(time.Second)
		a.wantSAs(t, 2, 0)
		b.wantSAs(t, 2, 0)
		a.ask(3, ipsec.AH, ahPart)
		a.wantSAs(t, 2, 2)
		wantPair(t, a, b, 2)
		// A flush of AH is none of ESP.
		a.m.mu.Lock()
		for id := range a.m.sas {
			if id.Proto == ipsec.AH {
				delete(a.m.sas, id)
			}
		}
		a.m.mu.Unlock()
		a.m.event(keysock.SAsFlushed{Proto: ipsec.AH})
		time.Sleep(time.Second)
		a.wantSAs(t, 2, 0)
		b.wantSAs(t, 2, 0)
		a.stop(t)
		b.stop(t)

		n := &network{}
		a = newNode(t, n, addrA, addrB, "k", withPolicy(0, altGCM, altAH))
		b = newNode(t, n, addrB, addrA, "k", withPolicy(0, altAH, altGCM))
		a.ask(1, ipsec.ESP, altGCM, altAH)
		a.wantSAs(t, 0, 2)
		wantPair(t, a, b, 1)
		b.stop(t)
		a.stop(t)

		n = &network{}
		a = newNode(t, n, addrA, addrB, "k", withPolicy(0, altGCM))
		b = newNode(t, n, addrB, addrA, "k", withPolicy(0, altAH))
		a.ask(1, ipsec.ESP, altGCM)
		if e, ok := a.m.failure(1); !ok || e != syscall.ECONNREFUSED {
			t.Errorf("ESP for AH: got %v, %v", e, ok)
		}
		a.wantSAs(t, 0, 0)
		b.stop(t)
		a.stop(t)
	})
}

// TestSPITaken: an SPI that is free for ESP and not for AH is given back, and
// another one taken.
func TestSPITaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", withPolicy(0, altGCM, altAH), func(_ *Config, m *missiu) {
			id := ipsec.SAID{Proto: ipsec.AH, Dst: addrA, SPI: m.spi + 1}
			m.sas[id] = &ipsec.SAParams{SAID: id, Src: addrB}
		})
		b := newNode(t, n, addrB, addrA, "k", withPolicy(0, altGCM, altAH))
		a.ask(1, ipsec.ESP, altGCM, altAH)
		a.wantSAs(t, 2, 1)
		b.wantSAs(t, 2, 0)
		a.stop(t)
		b.stop(t)
	})
}

// TestInitAlternatives: "sa init" negotiates both SAs of ESP in AH.
func TestInitAlternatives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		b := newNode(t, n, addrB, addrA, "k", withPolicy(0, altBoth))
		a := newNode(t, n, addrA, addrB, "k", withPolicy(ipsec.PolicyInit, altBoth))
		time.Sleep(time.Second)
		synctest.Wait()
		a.wantSAs(t, 2, 2)
		wantPair(t, a, b, 2)
		a.stop(t)
		b.stop(t)
	})
}

// TestNegotiable: which policies are ours.
func TestNegotiable(t *testing.T) {
	esp := ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Src: addrA, Dst: addrB}
	ah, comp, other := esp, esp, esp
	inside := ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Transport}
	ah.Proto, comp.Proto = ipsec.AH, ipsec.IPComp
	other.Proto, other.Mode = ipsec.AH, ipsec.Transport
	for name, tt := range map[string]struct {
		rs   []ipsec.Request
		want bool
	}{
		"ESP": {[]ipsec.Request{esp}, true}, "AH": {[]ipsec.Request{ah}, true}, "ESP in AH": {[]ipsec.Request{esp, ah}, true},
		"AH in ESP": {[]ipsec.Request{ah, esp}, true}, "ESP twice": {[]ipsec.Request{esp, esp}, false}, "IPComp": {[]ipsec.Request{comp, esp}, false},
		"IPComp in ESP": {[]ipsec.Request{{Proto: ipsec.IPComp, Mode: ipsec.Transport}, inside}, true}, "IPComp tunnel in ESP": {[]ipsec.Request{comp, inside}, true},
		"ESP in IPComp": {[]ipsec.Request{inside, comp}, false}, "IPComp alone": {[]ipsec.Request{comp}, false}, "IPComp tunnel in ESP in AH": {[]ipsec.Request{comp, inside, other}, false},
		"two modes": {[]ipsec.Request{esp, other}, false}, "none": {nil, false},
	} {
		if got := negotiable(&ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Protect, Requests: tt.rs}); got != tt.want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

// TestIPCompPolicy: a policy of IPComp in ESP, or AH, is negotiated as one SA of that
// each way with a CPI, when it is loaded, and by the ACQUIRE of ESP or AH; that of
// IPComp waits for it.
func TestIPCompPolicy(t *testing.T) {
	for _, c := range []struct {
		proto ipsec.Protocol
		flags ipsec.PolicyFlags
	}{{ipsec.ESP, ipsec.PolicyInit}, {ipsec.ESP, 0}, {ipsec.AH, ipsec.PolicyInit}, {ipsec.AH, 0}} {
		synctest.Test(t, func(t *testing.T) {
			with := func(_ *Config, m *missiu) {
				for i := range m.policies {
					m.policies[i].Flags = c.flags
					m.policies[i].Requests = []ipsec.Request{
						{Proto: ipsec.IPComp, Mode: ipsec.Transport, Level: ipsec.LevelRequire},
						{Proto: c.proto, Mode: ipsec.Transport, Level: ipsec.LevelRequire},
					}
					m.policies[i].Proposals = nil // of PF_KEY clients
				}
			}
			n := &network{}
			b := newNode(t, n, addrB, addrA, "k", func(c *Config, m *missiu) {
				with(c, m)
				for i := range m.policies {
					m.policies[i].Flags = 0
				}
			})
			a := newNode(t, n, addrA, addrB, "k", with)
			if c.flags == 0 {
				for seq, proto := range []ipsec.Protocol{ipsec.IPComp, c.proto} {
					a.m.event(keysock.Acquire{Seq: uint32(3 + seq), Proto: proto, Mode: ipsec.Transport, Src: addrA, Dst: addrB, PolicyID: 1})
				}
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if c.proto == ipsec.ESP {
				a.wantSAs(t, 2, 0)
			} else {
				a.wantSAs(t, 0, 2)
			}
			wantPair(t, a, b, 1)
			for _, p := range a.m.list() {
				b.m.mu.Lock()
				q := b.m.sas[p.SAID]
				b.m.mu.Unlock()
				if p.CPI == 0 || q == nil || q.CPI != p.CPI || p.Mode != ipsec.Transport || p.Proto != c.proto {
					t.Errorf("%v: %v, CPI %d", p.SAID, p.Mode, p.CPI)
				}
			}
			if errno, ok := a.m.failure(3); ok {
				t.Errorf("ACQUIRE of IPComp: %v", errno)
			}
			a.stop(t)
			b.stop(t)
		})
	}
}

// TestInitChoice: "sa init" of alternatives that differ in their transforms
// negotiates all that the peer's choice needs, without a packet.
func TestInitChoice(t *testing.T) {
	for _, tt := range []struct {
		of, by  []ipsec.Proposal
		esp, ah int
	}{
		{[]ipsec.Proposal{altBoth, altGCM}, []ipsec.Proposal{altBoth}, 2, 2},
		{[]ipsec.Proposal{altGCM, altBoth}, []ipsec.Proposal{altBoth, altGCM}, 2, 2},
		{[]ipsec.Proposal{altBoth, altGCM}, []ipsec.Proposal{altGCM, altBoth}, 2, 0},
		{[]ipsec.Proposal{altBoth, altAH}, []ipsec.Proposal{altAH}, 0, 2},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			b := newNode(t, n, addrB, addrA, "k", withPolicy(0, tt.by...))
			a := newNode(t, n, addrA, addrB, "k", withPolicy(ipsec.PolicyInit, tt.of...))
			time.Sleep(time.Minute)
			synctest.Wait()
			a.wantSAs(t, tt.esp, tt.ah)
			wantPair(t, a, b, (tt.esp+tt.ah)/2)
			for _, x := range []*node{a, b} {
				if x.logs.FilterMessageSnippet("nothing passes").Len() != 0 {
					t.Error("something is missed")
					x.dump(t)
				}
				x.stop(t)
			}
		})
	}
}

// TestLoneSA: a peer whose policy is ESP alone makes an SA that ours, ESP inside
// AH, cannot be served by: one line says so, and what is missing.
func TestLoneSA(t *testing.T) {
	esp, _ := altBoth.Part(ipsec.ESP)
	for _, ours := range [][]ipsec.Proposal{{altBoth}, {altBoth, altGCM}} {
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			a := newNode(t, n, addrA, addrB, "k", withPolicy(0, esp))
			b := newNode(t, n, addrB, addrA, "k", withPolicy(0, ours...))
			a.ask(1, ipsec.ESP, esp)
			wantPair(t, a, b, 1)
			time.Sleep(time.Minute)
			synctest.Wait()
			ls := b.logs.FilterMessageSnippet("nothing passes").All()
			if len(ls) != 1 {
				b.dump(t)
				t.Fatalf("%d lines, want 1", len(ls))
			}
			m := ls[0].ContextMap()
			if m["rule"] != "any" || m["policy"] != uint32(1) || m["lacks"] != "ah" {
				t.Errorf("got %v", m)
			}
			if a.logs.FilterMessageSnippet("nothing passes").Len() != 0 {
				t.Error("and by the peer, for whom it is enough")
			}
			a.stop(t)
			b.stop(t)
		})
	}
}
