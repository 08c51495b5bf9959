package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// tcp moves octets from a to b's address at and fails the test if it does not go.
func tcp(t *testing.T, from, to *lab.Node, at string, octets int) {
	t.Helper()
	l := to.Start("bin/transfer", "listen", at)
	l.Says("listening", 10*time.Second)
	if r := from.Run("bin/transfer", "send", at, fmt.Sprint(octets)); r.Code != 0 {
		t.Errorf("TCP to %s: %v", at, r)
	}
	l.Wait(30 * time.Second)
}

// Entries by port, in the order of the file: clear, discarded, protected by one
// SA or another; strict reverse path filters on both hosts.
func TestPolicyOrder(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, n := range []*lab.Node{a, b} {
		n.Sh("for f in all eth0; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done")
	}
	before := b.Snapshot()
	policy := func(n *lab.Node) string {
		return fmt.Sprintf(`{ lport 22 ulp tcp dir both } bypass {}
{ rport 22 ulp tcp dir both } bypass {}
{ raddr %[1]v rport 9 ulp udp dir out } drop {}
{ raddr %[1]v lport 9 ulp udp dir in } drop {}
{ raddr %[1]v rport 80 ulp tcp } ipsec { encr_algs gcm }
{ raddr %[1]v lport 80 ulp tcp } ipsec { encr_algs gcm }
{ raddr %[1]v } ipsec { encr_algs aes encr_auth_algs sha256 }
`, n.Peer)
	}
	up(a, b, policy)
	c := a.Capture("eth0")
	tcp(t, a, b, "192.168.3.119:22", 1<<20)
	tcp(t, b, a, "192.168.3.118:22", 1<<20)
	tcp(t, a, b, "192.168.3.119:80", 1<<20)
	tcp(t, b, a, "192.168.3.118:80", 1<<20)
	pings(t, a, 3)
	a.Sh("echo x >/dev/udp/192.168.3.119/9")
	ps := c.Stop()
	for _, p := range lab.Of(ps, lab.Clear) {
		if p.Proto != 6 || p.L4+4 > len(p.Frame) || (p.Frame[p.L4+1] != 22 && p.Frame[p.L4+3] != 22) {
			t.Errorf("in clear: %v", p)
		}
	}
	if n := len(lab.Of(ps, lab.Clear)); n < 1000 {
		t.Errorf("%d packets of bypassed TCP, want more", n)
	}
	if n := a.Status().Counters["drop_out_discard"]; n != 1 {
		t.Errorf("drop_out_discard is %d, want 1", n)
	}
	encr := map[string]int{}
	for _, s := range a.Mature() {
		encr[s.Encr]++
	}
	if encr["aes-gcm16"] != 4 || encr["aes-cbc"] != 2 {
		t.Errorf("SAs by cipher %v, want 4 of aes-gcm16 (one pair for each side's port 80) and 2 of aes-cbc", encr)
	}

	// A new file while traffic runs: what stays in it loses nothing.
	traffic := a.Start(lab.PingArgs(300, 10*time.Millisecond, 10*time.Second, b.Addr.String())...)
	stream := make(chan struct{})
	go func() {
		defer close(stream)
		tcp(t, a, b, "192.168.3.119:81", 32<<20)
	}()
	for i := range 6 {
		for _, n := range []*lab.Node{a, b} {
			n.LoadConfig(fmt.Sprintf("{ raddr 10.9.%d.0/24 } drop {}\n", i) + policy(n))
		}
	}
	<-stream
	traffic.Wait(60 * time.Second)
	if got := lab.Answered(traffic.Output(), 300); got != 300 {
		t.Errorf("reload lost packets of an entry that did not change: %d of 300 pings answered", got)
	}
	if d := a.Status().Drops() + b.Status().Drops(); d != 0 {
		t.Errorf("%d inbound packets dropped, want 0: %v %v", d, a.Status().Counters, b.Status().Counters)
	}
	for _, line := range []string{"./loadConfig -d", "./loadConfig -dP", "./loadConfig -F", "./loadConfig -FP"} {
		a.Do(line)
	}
	if s := a.Status(); s.SAs != 0 || s.Policies != 0 {
		t.Errorf("after -F and -FP: %d SAs, %d policies", s.SAs, s.Policies)
	}
	b.KillIKE(5 * time.Second)
	b.StopMissiu()
	b.Must("rm", "-f", "/run/missiu.log")
	now := b.Snapshot()
	delete(before, "etc")
	if d := before.Diff(now); d != "" {
		t.Errorf("b is not as before:\n%s", d)
	}
}

// Two interfaces, two instances, two key daemons; each protects its own.
func TestTwoInterfaces(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	lab.Link(t, a.Host, b.Host, "eth1", prefixes("192.168.4.118/24"), prefixes("192.168.4.119/24"))
	second := func(n *lab.Node) *lab.Node {
		m := *n
		m.If, m.Addr, m.Peer = "eth1", netip.MustParseAddr(strings.Replace(n.Addr.String(), ".3.", ".4.", 1)), netip.MustParseAddr(strings.Replace(n.Peer.String(), ".3.", ".4.", 1))
		return &m
	}
	a1, b1 := second(a), second(b)
	before := a.Snapshot()
	nodes := []*lab.Node{a, b, a1, b1}
	for _, n := range nodes {
		n.StartMissiu()
	}
	for i, n := range nodes {
		n.StartIKE()
		n.WriteFile("bin/ipsec.conf", policyFor(n, "", []string{"encr_algs aes", "encr_algs aes", "encr_algs gcm", "encr_algs gcm"}[i]), 0o644)
		n.Do("./loadConfig -i " + n.If + " -f ipsec.conf")
		// Without src the kernel would take an address of the first interface.
		n.Do(fmt.Sprintf("ip route add %v dev %s src %v", n.Peer, n.TAP(), n.Addr))
	}
	c0, c1 := a.Capture("eth0"), a.Capture("eth1")
	pings(t, a, 5)
	pings(t, b1, 5)
	for i, c := range []*lab.Capture{c0, c1} {
		ps := c.Stop()
		lab.NoClear(t, ps)
		if n := lab.Count(ps)[lab.ESP]; n != 10 {
			t.Errorf("eth%d: %d ESP packets, want 10", i, n)
		}
	}
	for n, encr := range map[*lab.Node]string{a: "aes-cbc", a1: "aes-gcm16"} {
		for _, s := range n.Mature() {
			if s.Encr != encr {
				t.Errorf("%s: an SA of %s, want %s", n.If, s.Encr, encr)
			}
		}
	}
	// The end of one is nothing to the other.
	a.StopMissiu()
	pings(t, a1, 5)
	if text := a.Do("./missiu status"); strings.Contains(text, "eth0") || !strings.Contains(text, "eth1") {
		t.Errorf("status: %s", text)
	}
	a1.StopMissiu()
	a.Sh("killall ike; rm -f /run/missiu.log")
	for _, n := range []*lab.Node{a, a1} {
		n.IKE.Wait(10 * time.Second)
	}
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}
