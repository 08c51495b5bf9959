package sa

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// choice makes both sides' policies of alternatives; the requests are those that
// the alternatives need.
func choice(m ipsec.Mode, alts ...ipsec.Proposal) (a, b Policy) {
	a, b = tunnel("10.1.0.0/16", "10.2.0.0/16", 11), tunnel("10.2.0.0/16", "10.1.0.0/16", 21)
	if m == ipsec.Transport {
		all := netip.MustParsePrefix("192.0.2.0/24")
		sel := ipsec.Selector{Src: all, Dst: all}
		a, b = policy(sel, m, 11), policy(sel, m, 21)
	}
	for _, p := range []*Policy{&a, &b} {
		id := p.Out.Requests[0].ReqID
		var rs []ipsec.Request
		for _, proto := range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
			if len(ipsec.Parts(alts, proto)) > 0 {
				rs = append(rs, ipsec.Request{Proto: proto, Mode: m, Level: ipsec.LevelUnique, ReqID: id})
			}
			id++
		}
		for _, q := range []*ipsec.Policy{p.Out, p.In} {
			q.Requests, q.Proposals = rs, alts
		}
	}
	return a, b
}

var (
	altGCM  = ipsec.Proposal{Encr: alg.EncrAESGCM16, EncrMinBits: 128, EncrMaxBits: 128}
	altCBC  = ipsec.Proposal{Encr: alg.EncrAESCBC, EncrMinBits: 256, Auth: alg.IntegHMACSHA256}
	altAH   = ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA256}
	altAH1  = ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA1}
	altAny  = ipsec.Proposal{Shape: ipsec.ShapeAH}
	altBoth = ipsec.Proposal{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESGCM16, EncrMinBits: 256, AH: alg.IntegHMACSHA512}
)

// have lists the child SAs of n in order.
func (n *node) have() string {
	var l []string
	for _, c := range n.sa.children {
		l = append(l, c.suite.String())
	}
	slices.Sort(l)
	return strings.Join(l, " ")
}

// part makes a request for the SA of one protocol of an alternative.
func part(seq uint32, p Policy, alt ipsec.Proposal, proto ipsec.Protocol) ChildRequest {
	q, _ := alt.Part(proto)
	return ChildRequest{Seq: seq, Policy: p, Proposals: []ipsec.Proposal{q}}
}

// begin brings a and b up with policies p and q and asks for rs.
func (l *lab) begin(q Policy, rs ...ChildRequest) {
	l.b.policies = []Policy{q}
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, rs...))
	l.settle()
}

// TestAH: AH is negotiated, rekeyed and deleted by either side, in both modes.
func TestAH(t *testing.T) {
	for _, m := range []ipsec.Mode{ipsec.Transport, ipsec.Tunnel} {
		t.Run(m.String(), func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				p, q := choice(m, altAH)
				l.begin(q, ChildRequest{Seq: 5, Policy: p})
				l.want(1)
				for _, n := range []*node{l.a, l.b} {
					if n.have() != "ah/hmac-sha256/esn" {
						t.Fatalf("%s: got %s", n.name, n.have())
					}
					for id, sa := range n.sads {
						if id.Proto != ipsec.AH || sa.Mode != m || sa.Encr != alg.EncrNone || sa.AuthKey.Len() != 32 || sa.Encap != nil {
							t.Errorf("%s: SA %v: %+v", n.name, id, sa)
						}
					}
				}
				in := told[InstallChild](l.a)[0]
				if in.Seq != 5 || in.In.ReqID != 12 || in.Out.ReqID != 12 {
					t.Errorf("seq %d, reqids %d, %d; want 5, 12, 12", in.Seq, in.In.ReqID, in.Out.ReqID)
				}
				for _, n := range []*node{l.a, l.b} {
					old := inSPI(t, n)
					n.do(n.sa.ChildExpired(l.now, old, false))
					l.settle()
					l.want(1)
					if n.sads[old] != nil || n.have() != "ah/hmac-sha256/x25519/esn" {
						t.Errorf("%s: after rekeying: %s", n.name, n.have())
					}
				}
				l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), true))
				l.settle()
				l.want(0)
			})
		})
	}
}

// TestAHESP: ESP inside AH is two child SAs with the same selectors, each of which
// is rekeyed and deleted by itself.
func TestAHESP(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		p, q := choice(ipsec.Tunnel, altBoth)
		esp, ah := part(1, p, altBoth, ipsec.ESP), part(2, p, altBoth, ipsec.AH)
		l.begin(q, esp, ah)
		l.want(2)
		byProto := func(n *node, proto ipsec.Protocol) *child {
			t.Helper()
			i := slices.IndexFunc(n.sa.children, func(c *child) bool { return c.proto == proto })
			if i < 0 {
				t.Fatalf("%s has no %v: %s", n.name, proto, n.have())
			}
			return n.sa.children[i]
		}
		id := func(c *child) ipsec.SAID { return ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in} }
		for _, n := range []*node{l.a, l.b} {
			x, y := byProto(n, ipsec.ESP), byProto(n, ipsec.AH)
			if !slices.Equal(x.local, y.local) || !slices.Equal(x.remote, y.remote) {
				t.Errorf("%s: selectors %v %v, and %v %v", n.name, x.local, x.remote, y.local, y.remote)
			}
		}
		for _, proto := range []ipsec.Protocol{ipsec.AH, ipsec.ESP} {
			other := ipsec.ESP + ipsec.AH - proto
			kept, old := id(byProto(l.b, other)), id(byProto(l.b, proto))
			l.b.do(l.b.sa.ChildExpired(l.now, old, false))
			l.settle()
			l.want(2)
			if id(byProto(l.b, other)) != kept || id(byProto(l.b, proto)) == old {
				t.Errorf("after rekeying %v: %v", proto, l.b.sads)
			}
		}
		for _, r := range []ChildRequest{esp, ah} {
			proto := ipsec.ESP
			if r.Proposals[0].Shape == ipsec.ShapeAH {
				proto = ipsec.AH
			}
			l.a.do(l.a.sa.ChildLost(l.now, id(byProto(l.a, proto)), errors.New("gone")))
			l.settle()
			l.want(1)
			l.a.do(l.a.sa.AddChild(l.now, r))
			l.settle()
			l.want(2)
		}
	})
}

// TestAlternatives: whose order decides, of which protocol the answer is, and what
// is refused. The responder's policy is what it would like best, first.
func TestAlternatives(t *testing.T) {
	ps := func(l ...ipsec.Proposal) []ipsec.Proposal { return l }
	ahPart, _ := altBoth.Part(ipsec.AH)
	for _, tt := range []struct {
		name             string
		offer, responder []ipsec.Proposal
		want             string // "": refused
	}{
		{"same order", ps(altGCM, altAH), ps(altGCM, altAH), "AES-GCM 128"},
		{"the responder's order", ps(altGCM, altCBC, altAH), ps(altAH, altCBC, altGCM), "ah/hmac-sha256"},
		{"the responder's order, ESP", ps(altAH, altGCM, altCBC), ps(altCBC, altGCM, altAH), "AES-CBC 256"},
		{"AH alone in common", ps(altGCM, altAH), ps(altCBC, altAH), "ah/hmac-sha256"},
		{"ESP alone in common", ps(altAH, altGCM), ps(altAH1, altGCM), "AES-GCM 128"},
		{"any AH", ps(altAny), ps(altAH1, altAH), "ah/hmac-sha256"},
		{"ESP of ESP in AH goes first", ps(altBoth, altAH), ps(altBoth, altAH), "AES-GCM 256"},
		{"the responder likes AH best", ps(altBoth, altAH), ps(altAH, altBoth), "ah/hmac-sha256"},
		{"what completes ESP in AH", ps(ahPart), ps(altGCM, altBoth), "ah/hmac-sha512"},
		{"what completes comes last", ps(ahPart, altGCM), ps(altBoth, altGCM), "AES-GCM 128"},
		{"another key length", ps(altGCM), ps(altBoth), ""},
		{"AH for ESP", ps(altAH), ps(altGCM, altCBC), ""},
		{"ESP for AH", ps(altGCM), ps(altAH), ""},
		{"another AH", ps(altAH1), ps(altAH), ""},
	} {
		for _, initial := range []bool{true, false} {
			for _, m := range []ipsec.Mode{ipsec.Transport, ipsec.Tunnel} {
				t.Run(fmt.Sprintf("%s/%v/initial %v", tt.name, m, initial), func(t *testing.T) {
					l := newLab(t)
					p, _ := choice(m, tt.offer...)
					_, q := choice(m, tt.responder...)
					if initial {
						l.begin(q, ChildRequest{Seq: 3, Policy: p})
					} else {
						l.establish()
						l.a.do(l.a.sa.ChildLost(l.now, inSPI(t, l.a), errors.New("gone")))
						l.settle()
						l.clearEvents()
						l.b.policies = []Policy{q}
						l.a.do(l.a.sa.AddChild(l.now, ChildRequest{Seq: 3, Policy: p}))
						l.settle()
					}
					if tt.want == "" {
						l.want(0)
						if f := told[ChildFailed](l.a); len(f) != 1 || f[0].Seq != 3 {
							t.Errorf("ChildFailed: %v", f)
						}
						return
					}
					l.want(1)
					got := l.a.sa.children[0].suite
					s := got.String()
					if !got.AH {
						s = map[alg.Encr]string{alg.EncrAESGCM16: "AES-GCM", alg.EncrAESCBC: "AES-CBC"}[got.Encr] + fmt.Sprintf(" %d", got.Bits)
					}
					if !strings.HasPrefix(s, tt.want) || l.b.have() != l.a.have() {
						t.Errorf("got %s and %s, want %s", l.a.have(), l.b.have(), tt.want)
					}
				})
			}
		}
	}
}

// TestAlternativeRekey: what replaces an SA serves the same alternative, whatever
// either side would like better by now.
func TestAlternativeRekey(t *testing.T) {
	l := newLab(t)
	p, q := choice(ipsec.Tunnel, altBoth, altCBC, altAH)
	l.begin(q, part(1, p, altCBC, ipsec.ESP), part(2, p, altBoth, ipsec.AH))
	l.want(2)
	for _, n := range []*node{l.a, l.b} {
		for _, c := range slices.Clone(n.sa.children) {
			n.do(n.sa.ChildExpired(l.now, ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}, false))
			l.settle()
			l.want(2)
		}
		if got, want := n.have(), "aes-cbc(256)/hmac-sha256/x25519/esn ah/hmac-sha512/x25519/esn"; got != want {
			t.Errorf("%s: got %s, want %s", n.name, got, want)
		}
	}
}

// TestAHAndNAT: AH covers addresses, so behind a NAT it is neither asked for nor
// granted; alternatives without it are.
func TestAHAndNAT(t *testing.T) {
	l := newLab(t)
	l.behind(true, false)
	p, _ := choice(ipsec.Tunnel, altAH)
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, ChildRequest{Seq: 3, Policy: p}))
	l.run()
	if f := told[ChildFailed](l.a); len(f) != 1 || !strings.Contains(f[0].Err.Error(), "AH does not pass the NAT") {
		t.Errorf("AH alone: %v", f)
	}
	l = newLab(t)
	l.behind(true, false)
	p, q := choice(ipsec.Tunnel, altBoth, altAH, altCBC)
	l.begin(q, ChildRequest{Seq: 3, Policy: p})
	l.want(1)
	if got := l.a.have(); got != "aes-cbc(256)/hmac-sha256/esn" {
		t.Errorf("with an alternative: got %s", got)
	}
}
