package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// TestMonitor: `missiu monitor` prints and writes what passes on both sides, in
// clear at high and as ESP at low, and why a packet does not pass; without it
// nothing is served.
func TestMonitor(t *testing.T) {
	lab.NeedRoot(t)
	a, b := newTunnel(t, false, true)
	inner := tunnelEnds[false]
	start := func(args ...string) *lab.Proc {
		p := b.Start(append([]string{"bin/missiu", "-i", "eth0", "monitor"}, args...)...)
		p.Says("monitoring", 20*time.Second)
		return p
	}
	lines := start()
	high := start("high", "-c", "6")
	file := filepath.Join(b.Dir, "frames.pcapng")
	written := start("-w", file)
	if n := a.Ping(3, inner[1].String()); n != 3 {
		t.Fatalf("%d of 3 pings answered", n)
	}
	// What policy wants protected comes in clear.
	a.Python(`
import sys
from scapy.all import *
sendp(Ether(src=get_if_hwaddr("eth0"), dst=sys.argv[1])/IP(src=sys.argv[2], dst=sys.argv[3])/UDP(sport=9, dport=9), iface="eth0", verbose=0)
`, macOf(b), inner[0].String(), inner[1].String())
	lines.Says("[drop_in_clear]", 20*time.Second)
	for what, want := range map[string]int{
		fmt.Sprintf("low  In  IP %v.4500 > %v.4500: UDP ESP(spi=0x00001001,seq=", a.Addr, b.Addr): 3,
		fmt.Sprintf("high In  IP %v > %v: ICMP echo request", inner[0], inner[1]):                 3,
		fmt.Sprintf("high Out IP %v > %v: ICMP echo reply", inner[1], inner[0]):                   3,
		fmt.Sprintf("low  Out IP %v.4500 > %v.4500: UDP ESP(spi=0x00001002,seq=", b.Addr, a.Addr): 3,
		fmt.Sprintf("low  In  IP %v.9 > %v.9: UDP, length 8 [drop_in_clear]", inner[0], inner[1]): 1,
	} {
		if n := strings.Count(lines.Output(), what); n != want {
			t.Errorf("%d lines %q, want %d, in\n%s", n, what, want, lines.Output())
		}
	}
	if code := high.Wait(20 * time.Second); code != 0 || strings.Count(high.Output(), "\n") != 8 || strings.Contains(high.Output(), "low") || !strings.Contains(high.Output(), "6 frames, 0 lost") {
		t.Errorf("high -c 6 ended with %d: %s", code, high.Output())
	}
	written.Signal(syscall.SIGTERM)
	if code := written.Wait(20 * time.Second); code != 0 {
		t.Errorf("-w ended with %d: %s", code, written.Output())
	}
	if m := strings.TrimSpace(b.Must("stat", "-c", "%a", file)); m != "600" {
		t.Errorf("mode of the file %s, want 600", m)
	}
	got := b.Must("tshark", "-n", "-r", file, "-Y", "icmp || udp", "-T", "fields", "-e", "frame.interface_description", "-e", "frame.packet_flags_direction", "-e", "_ws.col.Protocol", "-e", "frame.comment")
	for line, want := range map[string]int{
		"low\t0x00000001\tESP\t\n": 3, "high\t0x00000001\tICMP\t\n": 3, "high\t0x00000002\tICMP\t\n": 3, "low\t0x00000002\tESP\t\n": 3, "low\t0x00000001\tUDP\tdrop_in_clear\n": 1,
	} {
		if n := strings.Count(got, line); n != want {
			t.Errorf("%d packets %q, want %d, in\n%s", n, line, want, got)
		}
	}
	b.StopMissiu()
	if code := lines.Wait(20 * time.Second); code != 1 || !strings.Contains(lines.Output(), "missiu has ended") {
		t.Errorf("a monitor whose missiu stops ends with %d: %s", code, lines.Output())
	}
}
