package datapath

import (
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
)

// flagged makes two nodes whose policies have flags, without SAs.
func flagged(t *testing.T, p *pair, f ipsec.PolicyFlags, alts ...ipsec.Proposal) (a, b *node) {
	a, b = newNode(t, p.src), newNode(t, p.dst)
	sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
	for n, d := range map[*node]ipsec.Direction{a: ipsec.Out, b: ipsec.In} {
		n.policy(ipsec.Policy{Dir: d, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}, Flags: f, Proposals: alts})
	}
	return a, b
}

// TestClearWelcome: "or pass" takes clear and protected packets; what goes out
// is protected as soon as there is an SA, and wants one until then.
func TestClearWelcome(t *testing.T) {
	for _, name := range []string{"transport 4", "tunnel 6 in 4"} {
		p := gcm(pairs()[name])
		a, b := flagged(t, &p, ipsec.PolicyClear)
		ip := udpPacket(p.in, p.out, 1, 2, 64)
		out := a.send(ip)
		if len(out) != 1 || string(out[0]) != string(ip) || len(a.needs) != 1 {
			t.Fatalf("%s: without an SA %d packets, %d wanted SAs, want the packet itself and 1", name, len(out), len(a.needs))
		}
		if got := b.receive(out[0]); len(got) != 1 {
			t.Errorf("%s: clear packet dropped", name)
		}
		a.sa(p.params())
		b.sa(p.params())
		if out = a.send(ip); len(out) != 1 || string(out[0]) == string(ip) {
			t.Fatalf("%s: with an SA the packet is not protected", name)
		}
		if got := b.receive(out[0]); len(got) != 1 || string(got[0]) != string(ip) {
			t.Errorf("%s: protected packet dropped", name)
		}
		b.wantCount(map[Counter]uint64{InProtected: 1, InBypassed: 1})
	}
}

// TestManualSA: SAs without reqid serve a policy that says so, if their
// algorithms are among its own, in both directions; SAs of other reqids never.
func TestManualSA(t *testing.T) {
	p := gcm(pairs()["transport 4"]) // AES-GCM of 128 bits
	fits, other := ipsec.Proposal{Encr: alg.EncrAESGCM16}, ipsec.Proposal{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA256}
	for _, tt := range []struct {
		name  string
		flags ipsec.PolicyFlags
		alts  []ipsec.Proposal
		reqid ipsec.ReqID
		want  bool
	}{
		{"manual", ipsec.PolicyManual, []ipsec.Proposal{other, fits}, 0, true},
		{"of no policy that says so", 0, []ipsec.Proposal{fits}, 0, false},
		{"another algorithm", ipsec.PolicyManual, []ipsec.Proposal{other}, 0, false},
		{"another key length", ipsec.PolicyManual, []ipsec.Proposal{{Encr: alg.EncrAESGCM16, EncrMinBits: 256, EncrMaxBits: 256}}, 0, false},
		{"any algorithm", ipsec.PolicyManual, []ipsec.Proposal{{}}, 0, true},
		{"another reqid", ipsec.PolicyManual, []ipsec.Proposal{fits}, 8, false},
	} {
		a, b := flagged(t, &p, tt.flags, tt.alts...)
		sa := func(n *node) *sad.SA {
			q := p.params()
			q.ReqID = tt.reqid
			return n.sa(q)
		}
		sa(a)
		sa(b)
		ip := udpPacket(p.in, p.out, 1, 2, 64)
		if out := a.send(ip); (len(out) == 1) != tt.want {
			t.Errorf("%s: sent %d packets, want sent %v", tt.name, len(out), tt.want)
		}
		// What a sender with the policy's own reqid makes.
		c, _ := flagged(t, &p, 0)
		c.sa(p.params())
		if got := b.receive(c.send(ip)[0]); (len(got) == 1) != tt.want {
			t.Errorf("%s: %d packets accepted, want accepted %v", tt.name, len(got), tt.want)
		}
	}
}

// TestPerFlow: every flow wants SAs of its own, even while another waits.
func TestPerFlow(t *testing.T) {
	p := gcm(pairs()["transport 4"])
	a, _ := flagged(t, &p, ipsec.PolicyPerFlow)
	flow := func(sport uint16, want int) {
		t.Helper()
		a.send(udpPacket(p.in, p.out, sport, 2, 64))
		if len(a.needs) != want {
			t.Errorf("port %d: %d wanted SAs, want %d", sport, len(a.needs), want)
		}
	}
	flow(1, 1)
	flow(3, 2)
	q := p.params()
	ts := func(port uint16) []ipsec.TrafficSelector {
		return []ipsec.TrafficSelector{{Proto: protoUDP, Start: p.in, End: p.in, PortLo: port, PortHi: port}}
	}
	q.SrcTS = ts(1)
	a.sa(q)
	if out := a.send(udpPacket(p.in, p.out, 1, 2, 64)); len(out) != 1 {
		t.Errorf("the first flow sends %d packets, want 1", len(out))
	}
	flow(3, 3)
}
