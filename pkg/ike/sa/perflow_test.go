package sa

import (
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
)

// perFlow is reqA for a flow of a policy with SAs for each; port 0: no packet.
func perFlow(seq uint32, port uint16) ChildRequest {
	r := reqA(seq)
	r.Policy.Out.Flags = ipsec.PolicyPerFlow
	if port != 0 {
		r.Flow = &ipsec.Flow{
			Src: netip.MustParseAddr("10.1.0.1"), Dst: netip.MustParseAddr("10.2.0.1"), Proto: 6, SrcPort: port, DstPort: 80,
		}
	}
	return r
}

// TestPerFlow: where a policy has SAs for single flows, child SAs hold the
// packet that wants them and nothing else, also when the peer's policy is wider,
// and stay so when they are rekeyed.
func TestPerFlow(t *testing.T) {
	for _, both := range []bool{false, true} {
		l := newLab(t)
		if both {
			l.b.policies[0].Out.Flags = ipsec.PolicyPerFlow
		}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, perFlow(1, 1000), perFlow(2, 2000)))
		l.settle()
		l.want(2)
		check := func() {
			t.Helper()
			for id, p := range l.a.sads {
				for _, side := range [][]ipsec.TrafficSelector{p.SrcTS, p.DstTS} {
					if len(side) != 1 || !oneFlow(side[0]) {
						t.Errorf("SA %v has selectors %v, want one flow", id, side)
					}
				}
			}
		}
		check()
		l.a.do(l.a.sa.ChildExpired(l.now, inSPI(t, l.a), false))
		l.settle()
		l.want(2)
		check()
	}
}

// TestPerFlowOnly: without a packet such a policy gives nothing, neither asked
// for by us nor by a peer.
func TestPerFlowOnly(t *testing.T) {
	l := newLab(t)
	l.establish()
	l.clearEvents()
	l.a.do(l.a.sa.AddChild(l.now, perFlow(2, 0)))
	l.settle()
	if f := told[ChildFailed](l.a); len(f) != 1 {
		t.Errorf("%d failures, want one", len(f))
	}
	l.want(1)

	l = newLab(t)
	l.b.policies[0].Out.Flags = ipsec.PolicyPerFlow
	l.establish() // reqA has no packet
	if f := told[ChildFailed](l.a); len(f) != 1 {
		t.Errorf("%d failures, want one", len(f))
	}
	l.want(0)
}

func TestOneFlow(t *testing.T) {
	for s, want := range map[string]bool{
		"10.0.0.1/6/80-80": true, "10.0.0.1/6/80-81": false, "10.0.0.1/6": false, "10.0.0.1": false, "10.0.0.1/50": true,
		"10.0.0.1-10.0.0.2/6/80-80": false, "10.0.0.1/1/2048-2048": true,
	} {
		if got := oneFlow(ts(t, s)); got != want {
			t.Errorf("oneFlow(%s) = %v, want %v", s, got, want)
		}
	}
}
