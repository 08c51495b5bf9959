package sa

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// wantIPComp asserts that all SAs of both have a CPI, each of its own, by which
// both mean the same, or none.
func (l *lab) wantIPComp(want bool) {
	l.t.Helper()
	other := map[ipsec.SAID]uint16{}
	for id, p := range l.b.sads {
		other[id] = p.CPI
	}
	seen := map[uint16]bool{}
	for id, p := range l.a.sads {
		switch {
		case (p.CPI != 0) != want || want && (p.CPI < minCPI || p.CPI > maxCPI):
			l.t.Errorf("SA %v: CPI %d, want one: %v", id, p.CPI, want)
		case p.CPI != other[id]:
			l.t.Errorf("SA %v: CPI %d, the peer's %d", id, p.CPI, other[id])
		case want && seen[p.CPI]:
			l.t.Errorf("SA %v: CPI %d twice", id, p.CPI)
		}
		seen[p.CPI] = true
	}
}

// TestIPComp: used if both want it, by IKE_AUTH, by CREATE_CHILD_SA and when
// either side rekeys; each SA has a CPI of its own.
func TestIPComp(t *testing.T) {
	for _, alt := range []ipsec.Proposal{altGCM, altAH} {
		for _, mode := range []ipsec.Mode{ipsec.Tunnel, ipsec.Transport} {
			for _, c := range []struct{ a, b bool }{{false, false}, {false, true}, {true, false}, {true, true}} {
				t.Run(fmt.Sprint(alt.Shape, mode, c.a, c.b), func(t *testing.T) {
					l := newLab(t)
					l.a.rule.IPComp, l.b.rule.IPComp = c.a, c.b
					p, q := choice(mode, alt)
					req := ChildRequest{Seq: 1, Policy: p}
					l.begin(q, req, req)
					l.want(2)
					l.wantIPComp(c.a && c.b)
					for _, n := range []*node{l.a, l.b} {
						was := n.sads[inSPI(t, n)].CPI
						n.do(n.sa.ChildExpired(l.now, inSPI(t, n), false))
						l.settle()
						l.want(2)
						l.wantIPComp(c.a && c.b)
						for id, p := range n.sads {
							if was != 0 && p.CPI == was && id.Dst == n.cfg.Local.Addr() {
								t.Errorf("%s: CPI %d again, of %v", n.name, was, id)
							}
						}
						for _, c := range n.sa.Status().Children {
							here, there := n.cfg.Local.Addr(), n.cfg.Remote.Addr()
							in, out := n.sads[ipsec.SAID{Proto: c.Suite.Proto(), Dst: here, SPI: c.In}], n.sads[ipsec.SAID{Proto: c.Suite.Proto(), Dst: there, SPI: c.Out}]
							if in == nil || out == nil || c.CPIIn != in.CPI || c.CPIOut != out.CPI {
								t.Errorf("%s: status: CPIs %d, %d; SAs: %+v, %+v", n.name, c.CPIIn, c.CPIOut, in, out)
							}
						}
					}
				})
			}
		}
	}
}

// TestIPCompLasts: SAs that move keep their CPIs, and what replaces them there has
// new ones; what is narrowed has them too.
func TestIPCompLasts(t *testing.T) {
	l := newLab(t)
	mobikeLab(l)
	l.a.rule.IPComp, l.b.rule.IPComp = true, true
	l.b.policies[0].Out.Sel.Src = pfx("10.2.3.0/24") // a asks for more
	l.establish()
	l.want(1)
	l.wantIPComp(true)
	if got, want := l.a.sa.children[0].remote, list(t, "10.2.3.0-10.2.3.255"); !slices.Equal(got, want) {
		t.Errorf("selectors %v, want %v", got, want)
	}
	was := map[uint16]bool{}
	for _, p := range l.a.sads {
		was[p.CPI] = true
	}
	l.lost(a1)
	l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
	l.settle()
	l.want(1)
	l.wantAt(a2, b1)
	l.wantIPComp(true)
	for id, p := range l.a.sads {
		if !was[p.CPI] {
			t.Errorf("SA %v moved: CPI %d, had %v", id, p.CPI, was)
		}
	}
	l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
	l.settle()
	l.want(1)
	l.wantIPComp(true)
	for id, p := range l.a.sads {
		if was[p.CPI] {
			t.Errorf("SA %v is new: CPI %d, before %v", id, p.CPI, was)
		}
	}
}

// TestIPCompInBoth: of ESP inside AH the ESP alone has it, whoever asks for it and
// rekeys; of ESP or AH what is chosen.
func TestIPCompInBoth(t *testing.T) {
	l := newLab(t)
	l.a.rule.IPComp, l.b.rule.IPComp = true, true
	p, q := choice(ipsec.Tunnel, altBoth)
	l.begin(q, part(1, p, altBoth, ipsec.ESP), part(2, p, altBoth, ipsec.AH))
	for _, n := range []*node{nil, l.a, l.b} {
		if n != nil {
			_, outs := n.sa.RekeyChildren(l.now)
			n.do(outs)
			l.settle()
		}
		l.want(2)
		for id, p := range l.a.sads {
			if (p.CPI != 0) != (id.Proto == ipsec.ESP) {
				t.Errorf("SA %v: CPI %d", id, p.CPI)
			}
		}
	}

	l = newLab(t)
	l.a.rule.IPComp, l.b.rule.IPComp = true, true
	p, _ = choice(ipsec.Tunnel, altGCM, altAH)
	_, q = choice(ipsec.Tunnel, altAH)
	l.begin(q, ChildRequest{Seq: 1, Policy: p})
	l.want(1)
	l.wantIPComp(true)

	// The padding that ESP would have keeps it from all, since the peer may take ESP.
	l = newLab(t)
	l.a.rule.IPComp, l.b.rule.IPComp, l.a.rule.TFC = true, true, 1000
	l.begin(q, ChildRequest{Seq: 1, Policy: p})
	l.want(1)
	l.wantIPComp(false)
}

// TestIPCompLeftOut: what the child SA has instead, or is.
func TestIPCompLeftOut(t *testing.T) {
	for name, edit := range map[string]func(*pad.Rule, *Policy){
		"AGGFRAG":     func(r *pad.Rule, _ *Policy) { r.AggFrag = pad.AggFragPrefer },
		"TFC padding": func(r *pad.Rule, _ *Policy) { r.TFC = ipsec.TFCPathMTU },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			req := reqA(1)
			for _, n := range []*node{l.a, l.b} {
				n.rule.IPComp = true
			}
			edit(l.a.rule, &req.Policy)
			edit(l.b.rule, &l.b.policies[0])
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, req))
			l.settle()
			l.want(1)
			l.wantIPComp(false)
		})
	}
}

// TestIPCompPeers: what other peers say. In a request what we cannot follow is
// passed over, in an answer it ends the child SA: the peer would send what we
// cannot read.
func TestIPCompPeers(t *testing.T) {
	say := func(data ...byte) *ikev2.Notify { return notify(ikev2.IPCOMP_SUPPORTED, data...) }
	for _, c := range []struct {
		name string
		n    *ikev2.Notify
		cpi  uint16
	}{
		{"lowest CPI", say(1, 0, 2), 256},
		{"highest CPI", say(0xef, 0xff, 2), 61439},
		{"OUI", say(1, 0, 1), 0},
		{"LZS", say(1, 0, 3), 0},
		{"LZJH", say(1, 0, 4), 0},
		{"well-known CPI", say(0, 2, 2), 0},
		{"reserved CPI", say(0, 255, 2), 0},
		{"private CPI", say(0xf0, 0, 2), 0},
		{"no data", say(), 0},
		{"CPI alone", say(1, 0), 0},
		{"four octets", say(1, 0, 2, 0), 0},
	} {
		for _, ours := range []bool{false, true} {
			l := newLab(t)
			l.establish()
			l.clearEvents()
			l.a.rule.IPComp = ours
			l.addAltered(func(ps []ikev2.Payload) []ikev2.Payload { return append(ps, c.n) })
			good := ours && c.cpi != 0
			if f := told[ChildFailed](l.a); len(f) == 0 != good {
				t.Errorf("%s as an answer, %v: %d failures", c.name, ours, len(f))
			}
			if is := told[InstallChild](l.a); good && (len(is) != 1 || is[0].Out.CPI != c.cpi || is[0].In.CPI == 0) {
				t.Errorf("%s as an answer: installed %+v", c.name, is)
			}
		}
		l := newLab(t)
		l.b.rule.IPComp = true
		l.establish()
		for _, ps := range [][]ikev2.Payload{requestOfChild(t, l, c.n), append(requestOfChild(t, l, say(1, 0, 3)), c.n)} {
			g, rf := l.b.sa.grant(l.b.sa.cur, ps, false, nil)
			if rf != nil || g.peerCPI != c.cpi || (g.cpi != 0) != (c.cpi != 0) {
				t.Errorf("%s as a request: %+v, %v; want CPI %d", c.name, g, rf, c.cpi)
			}
		}
	}
}

// TestIPCompTwice: of several in a request the first counts that we can follow; an
// answer says one thing.
func TestIPCompTwice(t *testing.T) {
	say := func(cpi uint16) *ikev2.Notify { return ipcompSupported(cpi) }
	if got := offeredCPI([]ikev2.Payload{say(2), say(300), say(301)}); got != 300 {
		t.Errorf("offered: CPI %d, want 300", got)
	}
	o := &offer{cpi: 400}
	if cpi, err := o.answeredCPI([]ikev2.Payload{say(300), say(300)}); err != errIPCompTwice {
		t.Errorf("answered twice: CPI %d, %v", cpi, err)
	}
}

// TestCPIsOfOthers: one that a child SA of the peer has is passed over, and when
// all that are tried are taken there is no IPComp.
func TestCPIsOfOthers(t *testing.T) {
	l := newLab(t)
	next := uint32(0)
	l.a.cfg.CPI = func() uint32 { next++; return next / 2 }
	l.a.rule.IPComp, l.b.rule.IPComp = true, true
	l.establish()
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.settle()
	l.want(2)
	l.wantIPComp(true)
	l.a.cfg.CPI = func() uint32 { return 7 }
	l.a.sa.cfg.CPI = l.a.cfg.CPI
	for range 2 {
		l.a.do(l.a.sa.AddChild(l.now, reqA(3)))
		l.settle()
	}
	l.want(4)
	none := 0
	for _, p := range l.a.sads {
		if p.CPI == 0 {
			none++
		}
	}
	if none != 2 {
		t.Errorf("%d SAs without CPI, want one pair", none)
	}
}

// TestIPCompByPolicy: a policy that wants it has it whatever the rules say; but for
// transport mode and level use it has nothing else.
func TestIPCompByPolicy(t *testing.T) {
	sel := ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("0.0.0.0/0")}
	make := func(mode ipsec.Mode, comp ipsec.Level, id ipsec.ReqID) Policy {
		p := policy(sel, mode, id)
		p.Out.Requests[0].Comp = comp // In has the same
		return p
	}
	for _, mode := range []ipsec.Mode{ipsec.Tunnel, ipsec.Transport} {
		for _, c := range []struct {
			a, b      ipsec.Level
			used, any bool
		}{
			{ipsec.LevelRequire, ipsec.LevelRequire, true, true},
			{ipsec.LevelUse, ipsec.LevelUnique, true, true},
			{ipsec.LevelRequire, 0, false, false},
			{0, ipsec.LevelRequire, false, false},
			{ipsec.LevelUse, 0, false, mode == ipsec.Transport},
			{0, ipsec.LevelUse, false, mode == ipsec.Transport},
		} {
			t.Run(fmt.Sprint(mode, c.a, c.b), func(t *testing.T) {
				l := newLab(t)
				l.a.rule.TFC = 1000 // is for tunnels without
				l.b.policies = []Policy{make(mode, c.b, 2)}
				l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
				l.a.do(l.a.sa.Start(l.now, ChildRequest{Seq: 1, Policy: make(mode, c.a, 1)}))
				l.settle()
				if !c.any {
					l.want(0)
					if f := told[ChildFailed](l.a); len(f) != 1 {
						t.Errorf("%d failures, want 1", len(f))
					}
					return
				}
				l.want(1)
				l.wantIPComp(c.used)
				for id, p := range l.a.sads {
					if p.CPI != 0 && p.TFC != 0 {
						t.Errorf("%v: compressed and padded", id)
					}
				}
			})
		}
	}
}
