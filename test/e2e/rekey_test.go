package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Under thousands of packets a second in both directions rekeying of child and
// IKE SAs loses none: what one side seals, the other opens.
func TestRekeyUnderLoad(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
	}
	for _, n := range []*lab.Node{a, b} {
		n.StartIKE("-l 15", "-L 10")
		n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
		n.Route()
	}
	pings(t, a, 1)
	b.Start("iperf3", "-s", "-1", "--forceflush").Says("listening", 10*time.Second)
	a.Must("iperf3", "-c", a.Peer.String(), "-u", "--bidir", "-b", "20M", "-l", "1000", "-t", "25")
	for _, d := range []struct{ from, to *lab.Node }{{a, b}, {b, a}} {
		// The last packets may still be on their way.
		lab.Until(t, 5*time.Second, "all packets of "+d.from.Name, func() (bool, string) {
			sent, got := d.from.Status().Counters, d.to.Status().Counters
			return sent["out_protected"] == got["in_protected"] && sent["out_protected"] > 50000,
				fmt.Sprintf("%d sealed, %d opened, drops %v, kernel %d", sent["out_protected"], got["in_protected"], d.to.Status().Drops(), got["wire_kernel_drops"])
		})
	}
	if n := a.Status().Counters["pfkey_requests"]; n < 30 {
		t.Errorf("%d PF_KEY requests: hardly anything was rekeyed", n)
	}
}
