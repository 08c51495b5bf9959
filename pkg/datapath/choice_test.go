package datapath

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
)

// The alternatives of the tests below, and what they consist of.
var (
	altGCM  = ipsec.Proposal{Encr: alg.EncrAESGCM16}
	altCBC  = ipsec.Proposal{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA256}
	altNULL = ipsec.Proposal{Encr: alg.EncrNULL, Auth: alg.IntegHMACSHA1}
	altAH   = ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA256}
	altBoth = ipsec.Proposal{Shape: ipsec.ShapeAHESP, Encr: alg.EncrNULL, Auth: alg.IntegHMACSHA1, AH: alg.IntegHMACSHA512}
)

// chooser is two hosts with a policy of alternatives.
type chooser struct {
	a, b     *node
	src, dst netip.Addr
	mode     ipsec.Mode
	spi      ipsec.SPI
}

const (
	reqESP ipsec.ReqID = 7
	reqAH  ipsec.ReqID = 8
)

func newChooser(t *testing.T, mode ipsec.Mode, f ipsec.PolicyFlags, alts ...ipsec.Proposal) *chooser {
	c := &chooser{a: newNode(t, a4), b: newNode(t, b4), src: a4, dst: b4, mode: mode, spi: 0x1000}
	if mode == ipsec.Tunnel {
		c.src, c.dst = ia4, ib4
	}
	for n, dir := range map[*node]ipsec.Direction{c.a: ipsec.Out, c.b: ipsec.In} {
		p := ipsec.Policy{Dir: dir, Sel: ipsec.Selector{Src: prefix(c.src), Dst: prefix(c.dst)}, Action: ipsec.Protect, Flags: f, Proposals: alts}
		for _, proto := range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
			r := ipsec.Request{Proto: proto, Mode: mode, Level: ipsec.LevelUnique, ReqID: reqESP}
			if proto == ipsec.AH {
				r.ReqID = reqAH
			}
			if mode == ipsec.Tunnel {
				r.Src, r.Dst = a4, b4
			}
			p.Requests = append(p.Requests, r)
		}
		if e := n.policy(p); e.Choices == nil {
			t.Fatal("a policy without a choice")
		}
	}
	return c
}

// sas makes the SAs of an alternative at the nodes.
func (c *chooser) sas(alt ipsec.Proposal, reqid bool, at ...*node) (made []*sad.SA) {
	for _, proto := range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
		q, ok := alt.Part(proto)
		if !ok {
			continue
		}
		c.spi++
		for _, n := range at {
			p := &ipsec.SAParams{SAID: ipsec.SAID{Proto: proto, Dst: b4, SPI: c.spi}, Src: a4, Mode: c.mode, ReplayWindow: 64}
			p.Encr, p.Auth, p.ReqID = q.Encr, q.Auth, reqESP
			if proto == ipsec.AH {
				p.Auth, p.ReqID = q.AH, reqAH
			}
			if !reqid {
				p.ReqID = 0
			}
			if bits := p.Encr.Info().KeyBits; bits != nil {
				p.EncrKey = ipsec.NewKey(make([]byte, bits[0]/8+p.Encr.Info().SaltLen))
			}
			p.AuthKey = ipsec.NewKey(make([]byte, p.Auth.Info().KeyLen))
			made = append(made, n.sa(p))
		}
	}
	return made
}

// TestChoice: of several alternatives the first that has all its SAs is used; a
// receiver takes a packet that came by any of them, and by no less or other than
// one as a whole.
func TestChoice(t *testing.T) {
	for _, mode := range []ipsec.Mode{ipsec.Transport, ipsec.Tunnel} {
		for _, tt := range []struct {
			name  string
			alts  []ipsec.Proposal // of the policy of both
			have  []ipsec.Proposal // with SAs
			proto uint8            // that leaves; 0: held
			inner uint8            // within AH
		}{
			{"the first", []ipsec.Proposal{altGCM, altAH}, []ipsec.Proposal{altGCM, altAH}, protoESP, 0},
			{"order decides, not age", []ipsec.Proposal{altAH, altGCM}, []ipsec.Proposal{altGCM, altAH}, protoAH, protoUDP},
			{"the second", []ipsec.Proposal{altGCM, altAH}, []ipsec.Proposal{altAH}, protoAH, protoUDP},
			{"both in one", []ipsec.Proposal{altBoth, altGCM}, []ipsec.Proposal{altBoth}, protoAH, protoESP},
			{"the whole before a single one", []ipsec.Proposal{altBoth, altGCM, altAH}, []ipsec.Proposal{altAH, altBoth}, protoAH, protoESP},
			{"a half is none", []ipsec.Proposal{altBoth, altGCM}, []ipsec.Proposal{altNULL}, 0, 0},
			{"another half is none", []ipsec.Proposal{altBoth, altGCM}, []ipsec.Proposal{{Shape: ipsec.ShapeAH, AH: altBoth.AH}}, 0, 0},
			{"halves of two", []ipsec.Proposal{altBoth, {Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA256, AH: alg.IntegAESCMAC}},
				[]ipsec.Proposal{altCBC, {Shape: ipsec.ShapeAH, AH: altBoth.AH}}, 0, 0},
			{"any cipher is not none", []ipsec.Proposal{{}, altAH}, []ipsec.Proposal{altNULL}, 0, 0},
		} {
			t.Run(mode.String()+" "+tt.name, func(t *testing.T) {
				c := newChooser(t, mode, 0, tt.alts...)
				for _, h := range tt.have {
					c.sas(h, true, c.a, c.b)
				}
				ip := text(c.src, c.dst, 200, true)
				sent := c.a.send(ip)
				if tt.proto == 0 {
					if len(sent) != 0 || c.a.e.Held() != 1 || len(c.a.needs) != 1 {
						t.Fatalf("%d packets left, %d held, %d wanted SAs", len(sent), c.a.e.Held(), len(c.a.needs))
					}
					// A peer that sends by what there is is not believed.
					x := newNode(t, a4)
					p := ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(c.src), Dst: prefix(c.dst)}, Action: ipsec.Protect}
					for _, sa := range c.sas(tt.have[len(tt.have)-1], true, x, c.b)[:1] {
						r := ipsec.Request{Proto: sa.P.Proto, Mode: mode, Level: ipsec.LevelRequire}
						if mode == ipsec.Tunnel {
							r.Src, r.Dst = a4, b4
						}
						p.Requests = append(p.Requests, r)
					}
					x.policy(p)
					if sent = x.send(ip); len(sent) != 1 {
						t.Fatal("the peer sends nothing")
					}
					if got := c.b.receive(sent...); len(got) != 0 {
						t.Error("taken with less than an alternative")
					}
					c.b.wantCount(map[Counter]uint64{DropInPolicy: 1})
					return
				}
				if len(sent) != 1 {
					t.Fatalf("%d packets left: %v", len(sent), c.a.e.Stats().nonzero())
				}
				var i packet.Info
				packet.Decode(sent[0], &i)
				next := sent[0][i.HdrLen]
				if mode == ipsec.Tunnel && tt.inner != 0 {
					tt.inner = protoIPv4
				}
				if i.Proto != tt.proto || tt.inner != 0 && next != tt.inner {
					t.Errorf("left by protocol %d with %d within, want %d with %d", i.Proto, next, tt.proto, tt.inner)
				}
				if got := c.b.receive(sent...); len(got) != 1 || !bytes.Equal(got[0], ip) {
					t.Errorf("%d packets arrived: %v", len(got), c.b.e.Stats().nonzero())
				}
				c.b.wantCount(map[Counter]uint64{InProtected: 1})
			})
		}
	}
}

// TestChoiceAsks: the innermost SA of the first alternative is asked for, then
// what the one that was begun lacks; the packet leaves when it is complete.
func TestChoiceAsks(t *testing.T) {
	c := newChooser(t, ipsec.Transport, 0, altBoth, altGCM, altAH)
	ip := text(c.src, c.dst, 200, true)
	wantAsked := func(n int, proto ipsec.Protocol) {
		t.Helper()
		if len(c.a.needs) != n || c.a.needs[n-1].Proto != proto {
			t.Fatalf("asked for %v, want %d, the last %v", c.a.needs, n, proto)
		}
	}
	c.a.send(ip)
	wantAsked(1, ipsec.ESP)
	release := func() [][]byte {
		c.a.wire = nil
		if err := c.a.e.release.sendHeld(make([]byte, bufSize)); err != nil {
			t.Fatal(err)
		}
		return c.a.wire
	}
	esp := c.sas(altNULL, true, c.a)[0]
	c.a.e.Installed(sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Transport, ReqID: reqESP, Src: a4, Dst: b4})
	if got := release(); len(got) != 0 || c.a.e.Held() != 1 {
		t.Fatalf("%d packets with half an alternative, %d held", len(got), c.a.e.Held())
	}
	wantAsked(2, ipsec.AH)
	c.a.e.Failed(sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Transport, ReqID: reqESP, Src: a4, Dst: b4})
	if c.a.e.Held() != 1 {
		t.Fatal("dropped because of an SA that it does not wait for")
	}
	c.sas(ipsec.Proposal{Shape: ipsec.ShapeAH, AH: altBoth.AH}, true, c.a)
	c.a.e.Installed(sad.OutKey{Proto: ipsec.AH, Mode: ipsec.Transport, ReqID: reqAH, Src: a4, Dst: b4})
	if got := release(); len(got) != 1 {
		t.Fatalf("%d packets left, want the one held", len(got))
	}
	// Without its ESP SA the first alternative is void, and ESP is asked for.
	c.a.e.c.SAD.Remove(esp)
	if got := c.a.send(ip); len(got) != 0 {
		t.Fatal("sent by half an alternative")
	}
	wantAsked(3, ipsec.ESP)
	c.a.e.Failed(c.a.needs[2])
	if c.a.e.Held() != 0 {
		t.Error("held though the negotiation failed")
	}
}

// TestChoiceFlags: "or pass" sends in clear while there is no alternative
// complete; SAs by hand serve the one that they fit.
func TestChoiceFlags(t *testing.T) {
	c := newChooser(t, ipsec.Transport, ipsec.PolicyClear, altBoth, altGCM)
	ip := text(c.src, c.dst, 200, true)
	c.sas(altNULL, true, c.a, c.b)
	if sent := c.a.send(ip); len(sent) != 1 || !bytes.Equal(sent[0], ip) || len(c.a.needs) != 1 || c.a.needs[0].Proto != ipsec.AH {
		t.Errorf("%d packets, asked for %v", len(sent), c.a.needs)
	}
	c = newChooser(t, ipsec.Transport, ipsec.PolicyManual, altCBC, altAH)
	c.sas(altGCM, false, c.a, c.b) // fits none
	if sent := c.a.send(ip); len(sent) != 0 {
		t.Error("sent by an SA of no alternative")
	}
	c.sas(altAH, false, c.a, c.b)
	sent := c.a.send(ip)
	if len(sent) != 1 || sent[0][9] != protoAH {
		t.Fatalf("%d packets by SAs by hand", len(sent))
	}
	if got := c.b.receive(sent...); len(got) != 1 {
		t.Errorf("%d packets arrived: %v", len(got), c.b.e.Stats().nonzero())
	}
}
