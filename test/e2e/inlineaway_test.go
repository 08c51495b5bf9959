package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// TestInline by a private namespace, the way of kernels without the egress hook, and what
// becomes of it when missiu is killed. The other end is severed by the hook.
func TestInlineAway(t *testing.T) {
	lab.NeedRoot(t)
	a, b, r := routed(t, false)
	before := a.Snapshot()
	a.Sh("ip neigh flush dev eth0")
	startInline(a, "--sever namespace")
	startInline(b)
	if out := a.Do("./missiu -i eth0 status"); !strings.Contains(out, "high active, low active; when missiu dies: closed; by namespace") {
		t.Errorf("status says\n%s", out)
	}
	for _, section := range []string{"addresses", "routes", "rules"} {
		if d := (lab.Snapshot{section: before[section]}).Diff(without(a.Snapshot(), section)); d != "" {
			t.Errorf("changed: %s", d)
		}
	}
	pings(t, a, 5)
	a.Transfer(b, b.Addr, 4<<20)
	b.Transfer(a, a.Addr, 4<<20)

	c := r.Capture("eth0")
	for _, n := range []*lab.Node{a, b} {
		n.StartIKE()
		n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
	}
	works := func(what string) {
		t.Helper()
		lab.Until(t, 20*time.Second, what, func() (bool, string) { return a.Ping(1, "-W", "1", b.Addr.String()) == 1, "no ping" })
	}
	works("the SAs")
	pings(t, a, 10)
	pings(t, b, 10)
	a.Transfer(b, b.Addr, 16<<20)
	b.Transfer(a, a.Addr, 16<<20)
	if got := a.Ping(5, "-s", "4000", b.Addr.String()); got != 5 {
		t.Errorf("long datagrams: %d of 5", got)
	}
	if got := b.Ping(5, "-s", "4000", a.Addr.String()); got != 5 {
		t.Errorf("long datagrams to the one that is away: %d of 5", got)
	}
	s := a.Status()
	if s.Counters["out_protected"] < 5000 || s.Counters["in_protected"] < 5000 {
		t.Errorf("%d packets protected, %d opened, want at least 5000 each", s.Counters["out_protected"], s.Counters["in_protected"])
	}
	a.KillIKE(10 * time.Second)
	a.KillMissiu()
	if n := a.Silence(3, b.Addr.String()); n != 0 {
		t.Errorf("%d of 3 pings answered after a kill", n)
	}
	if r := a.Try("./missiu -i eth0 startRaw"); r.Code != 1 || !strings.Contains(r.Err, "severed by a startInline that was killed") {
		t.Errorf("%v\nwant a refusal", r)
	}
	startInline(a)
	if out := a.Do("./missiu -i eth0 status"); !strings.Contains(out, "by namespace") {
		t.Errorf("not adopted:\n%s", out)
	}
	a.StartIKE()
	works("adopted")
	lab.NoClear(t, c.Stop())
	a.KillIKE(10 * time.Second)
	a.KillMissiu()
	a.StopMissiu()
	restored := func(what string) {
		t.Helper()
		lab.Until(t, 20*time.Second, "the host as before, "+what, func() (bool, string) { // the carrier takes a moment
			d := before.Diff(a.Snapshot())
			return d == "", d
		})
	}
	restored("killed and stopped")

	b.KillIKE(10 * time.Second)
	b.StopMissiu()
	startInline(a, "--sever namespace --fail open")
	a.KillMissiu()
	lab.Until(t, 10*time.Second, "the interface to come back", func() (bool, string) {
		r := a.Run("ping", "-n", "-c", "1", "-W", "1", b.Addr.String()) // without a route it fails
		return r.Code == 0, r.Out + r.Err
	})
	a.StopMissiu()
	restored("killed with --fail open")
}
