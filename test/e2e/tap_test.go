package e2e

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// TestTap: with both sides active and a default that drops, everything that passes
// goes through the example that forwards htap to ltap: nothing before it, nothing while
// it stands still, nothing after it. A monitor sees the frames of passive sides too.
func TestTap(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	before := a.Snapshot()
	startInline(a, "--default", "drop")
	silent := func(when string) {
		t.Helper()
		if n := a.Silence(3, b.Addr.String()); n != 0 {
			t.Errorf("%s: %d of 3 pings answered", when, n)
		}
	}
	works := func(when string) {
		t.Helper()
		lab.Until(t, 20*time.Second, "a ping "+when, func() (bool, string) { return a.Ping(1, "-W", "1", b.Addr.String()) == 1, "" })
		if n := a.Ping(3, b.Addr.String()); n != 3 {
			t.Errorf("%s: %d of 3 pings answered", when, n)
		}
	}
	silent("without a program")
	start := func() *lab.Proc {
		p := a.Start("env", "MISSIU="+filepath.Join(a.Dir, "bin/missiu"), filepath.Join(root, "scripts/htap2ltap"), "eth0")
		p.Says("attached, high", 20*time.Second)
		p.Says("attached, low", 20*time.Second)
		return p
	}
	p := start()
	seen := a.Start("bin/missiu", "-i", "eth0", "monitor")
	seen.Says("monitoring", 20*time.Second)
	works("through the example")
	for _, want := range []string{ // what the program takes, and what it writes
		"high Out IP 192.168.3.118 > 192.168.3.119: ICMP echo request", "low  Out IP 192.168.3.118 > 192.168.3.119: ICMP echo request",
		"low  In  IP 192.168.3.119 > 192.168.3.118: ICMP echo reply", "high In  IP 192.168.3.119 > 192.168.3.118: ICMP echo reply",
	} {
		lab.Until(t, 20*time.Second, want, func() (bool, string) { return strings.Contains(seen.Output(), want), seen.Output() })
	}
	seen.Stop()
	if n := a.Ping(3, "-s", "4000", b.Addr.String()); n != 3 {
		t.Errorf("fragments through the example: %d of 3 pings answered", n)
	}
	if c := a.Status().Counters; c["tap_high_programs"] != 1 || c["tap_low_programs"] != 1 || c["tap_high_taken"] < 6 || c["tap_low_given"] < 6 || c["tap_low_lost"] != 0 {
		t.Errorf("counters %v", c)
	}
	p.Signal(syscall.SIGTERM)
	p.Wait(20 * time.Second)
	lab.Until(t, 20*time.Second, "the programs to be gone", func() (bool, string) { return a.Status().Counters["tap_high_programs"] == 0, "" })
	silent("after the example")

	lines := a.Start("bin/missiu", "-i", "eth0", "monitor")
	lines.Says("monitoring", 20*time.Second)
	silent("active, watched")
	lines.Says("[drop_out_no_policy]", 20*time.Second)
	a.Do("./missiu -i eth0 state passive")
	works("while passive")
	for _, want := range []string{
		"high Out IP 192.168.3.118 > 192.168.3.119: ICMP echo request",
		"low  In  IP 192.168.3.119 > 192.168.3.118: ICMP echo reply",
	} {
		lab.Until(t, 20*time.Second, want, func() (bool, string) { return strings.Contains(lines.Output(), want), lines.Output() })
	}
	lines.Stop()
	a.StopMissiu()
	works("after stop")
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}
