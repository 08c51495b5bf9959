package sa

import (
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
)

// TestTemplate: of a policy for any peer each gets what it asks for, and when we
// rekey, no more: the rest is other peers'.
func TestTemplate(t *testing.T) {
	l := newLab(t)
	p := tunnel("10.2.0.0/16", "0.0.0.0/0", 22)
	p.Out.Requests = []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 22, Src: addrB.Addr(), Dst: netip.IPv4Unspecified()}}
	l.b.policies = []Policy{p}
	r := reqA(1)
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, r))
	l.settle()
	check := func() {
		t.Helper()
		l.want(1)
		for id, p := range l.b.sads {
			side := p.DstTS
			if id.Dst == addrB.Addr() {
				side = p.SrcTS
			}
			if want := prefixTS(netip.MustParsePrefix("10.1.0.0/16")); len(side) != 1 || side[0] != want {
				t.Errorf("SA %v is for %v, want %v", id, side, want)
			}
		}
	}
	check()
	r.Policy.Out.Sel.Src = netip.MustParsePrefix("0.0.0.0/0") // the peer would take more now
	l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
	l.settle()
	check()
}
