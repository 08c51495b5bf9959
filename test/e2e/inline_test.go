package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// startInline severs the interface of a node.
func startInline(n *lab.Node, options ...string) {
	n.Do(strings.Join(append([]string{"./missiu -i", n.If, "-l missiu.log"}, append(options, "startInline")...), " "))
}

// A host whose interface is severed works as before, address by address and
// route by route, and what policy protects is ESP on the wire.
func TestInline(t *testing.T) {
	lab.NeedRoot(t)
	a, b, r := routed(t, false)
	before := a.Snapshot()
	for _, n := range []*lab.Node{a, b} {
		startInline(n)
	}
	for _, section := range []string{"addresses", "routes", "rules"} {
		if d := (lab.Snapshot{section: before[section]}).Diff(without(a.Snapshot(), section)); d != "" {
			t.Errorf("changed: %s", d)
		}
	}
	if out := a.Do("./missiu -i eth0 state"); out != "eth0: high active, low active\n" {
		t.Errorf("state says %q", out)
	}
	pings(t, a, 20)
	if got := a.Ping(5, "-s", "4000", b.Addr.String()); got != 5 {
		t.Errorf("long datagrams in clear: %d of 5", got)
	}
	a.Transfer(b, b.Addr, 16<<20)
	b.Transfer(a, a.Addr, 16<<20)

	c := r.Capture("eth0")
	for _, n := range []*lab.Node{a, b} {
		n.StartIKE()
		n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
	}
	lab.Until(t, 20*time.Second, "the SAs", func() (bool, string) {
		return a.Ping(1, "-W", "1", b.Addr.String()) == 1, "no ping"
	})
	pings(t, a, 50)
	pings(t, b, 50)
	a.Transfer(b, b.Addr, 16<<20)
	b.Transfer(a, a.Addr, 16<<20)
	if got := a.Ping(5, "-s", "4000", b.Addr.String()); got != 5 {
		t.Errorf("long datagrams: %d of 5", got)
	}
	s := a.Status()
	if s.Counters["out_protected"] < 5000 || s.Counters["in_protected"] < 5000 {
		t.Errorf("%d packets protected, %d opened, want at least 5000 each", s.Counters["out_protected"], s.Counters["in_protected"])
	}
	ps := c.Stop()
	lab.NoClear(t, ps)
	if n := len(lab.Of(ps, lab.ESP)); n < 10000 {
		t.Errorf("%d ESP packets, want at least 10000", n)
	}
	a.KillIKE(10 * time.Second)
	a.StopMissiu()
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}

func without(s lab.Snapshot, section string) lab.Snapshot { return lab.Snapshot{section: s[section]} }

// Two gateways that are bumps in the stack: hosts behind them, tunnels with and
// without UDP, a path with a smaller MTU.
func TestInlineGateways(t *testing.T) {
	lab.NeedRoot(t)
	for _, udp := range []bool{false, true} {
		t.Run(fmt.Sprintf("udp=%v", udp), func(t *testing.T) {
			g := newGateways(t, false)
			g.inline = true
			for _, n := range []*lab.Node{g.ga, g.gb} {
				startInline(n)
			}
			g.ga.Sh("ip route add 10.2.0.0/24 via 192.0.2.254; ip -6 route add fd0b::/64 via fd01::fe")
			g.gb.Sh("ip route add 10.1.0.0/24 via 198.51.100.254; ip -6 route add fd0a::/64 via fd02::fe")
			g.r.Sh("ip route add 10.1.0.0/24 via 192.0.2.1; ip route add 10.2.0.0/24 via 198.51.100.1; ip -6 route add fd0a::/64 via fd01::1; ip -6 route add fd0b::/64 via fd02::1")
			if n := g.ha.Ping(3, g.hb.Addr.String()); n != 3 {
				t.Errorf("forwarded in clear: %d of 3 pings", n)
			}
			g.secure(udp, false)
			for _, inner := range []string{"10.2.0.2", "fd0b::2"} {
				g.traffic(t, inner, udp)
			}
		})
	}
}

// Whatever shape clear text has that policy wants protected, no socket gets it,
// tagged frames included.
func TestInlineClearShapes(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	ears := b.Start("/usr/bin/python3", "-uc", ears)
	ears.Says("listening", 20*time.Second)
	startInline(b)
	heard := func(what string) int { return strings.Count(ears.Output(), what) }
	settle := func() {
		n := heard("witness")
		a.Python(shapes, macOf(b), "witness")
		lab.Until(t, 20*time.Second, "the witness", func() (bool, string) { return heard("witness") > n, ears.Output() })
	}
	a.Python(shapes, macOf(b))
	settle()
	for _, shape := range []string{"plain4", "plain6", "fragments4", "fragments6", "vlan0-4", "atomic6", "tcp", "broadcast4"} {
		if heard(shape+"\n") == 0 {
			t.Errorf("%q does not pass a severed interface\n%s", shape, ears.Output())
		}
	}
	b.LoadConfig("{ raddr 192.168.3.118 } ipsec { encr_algs gcm }\n{ raddr fd00:3::118 } ipsec { encr_algs gcm }\n")
	was := len(ears.Output())
	a.Python(shapes, macOf(b))
	settle()
	if got := strings.ReplaceAll(ears.Output()[was:], "witness\n", ""); got != "" {
		t.Errorf("clear text reached sockets:\n%s", got)
	}
}

// manualInline severs both hosts, and protects all between them by manual keys.
func manualInline(a, b *lab.Node) {
	for _, n := range []*lab.Node{a, b} {
		startInline(n)
		n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
		line := func(src, dst *lab.Node, spi string) string {
			return fmt.Sprintf("add esp spi %s src %v dst %v encr_alg gcm encrkey %s\n", spi, src.Addr, dst.Addr, key20)
		}
		loadPrivate(n, "-k", line(a, b, "0x1001")+line(b, a, "0x1002"))
	}
}

// A severed interface with SAs that gets another address, MTU or name, goes down and
// up, or is made anew, under traffic: all is protected again by itself, and nothing
// left in clear meanwhile.
func TestInlineMishaps(t *testing.T) {
	lab.NeedRoot(t)
	a, b, r := routed(t, false)
	manualInline(a, b)
	// The router counts, whatever becomes of its interface to a.
	r.Sh(fmt.Sprintf(`nft "add table ip c; add chain ip c i { type filter hook prerouting priority -300; }
add rule ip c i ip saddr %[1]v ip daddr %[2]v ip protocol esp counter; add rule ip c i ip saddr %[1]v ip daddr %[2]v ip protocol != esp counter"`, a.Addr, b.Addr))
	a.Start("ping", "-n", "-q", "-i", "0.002", b.Addr.String())
	esp := 0
	works := func(what string) {
		t.Helper()
		lab.Until(t, time.Minute, what, func() (bool, string) {
			return a.Ping(2, "-W", "1", b.Addr.String()) == 2 && a.Ping(1, "-W", "1", "-s", "1450", "-M", "dont", b.Addr.String()) == 1, fmt.Sprint(nonzero(a))
		})
		var n, clear int
		rules := r.Must("nft", "list", "table", "ip", "c")
		for _, line := range strings.Split(rules, "\n") {
			if _, rest, ok := strings.Cut(line, "counter packets "); ok {
				fmt.Sscan(rest, map[bool]*int{false: &n, true: &clear}[strings.Contains(line, "!=")])
			}
		}
		if path := a.Status().Paths["native esp"]; strings.Contains(path, "queueing") {
			t.Errorf("%s: our own filters count as shaping: %s", what, path)
		}
		if n <= esp || clear != 0 {
			t.Errorf("%s: %d packets protected since the last time, want some; %d in clear\n%s", what, n-esp, clear, rules)
		}
		esp = n
	}
	works("start")
	for _, k := range []struct{ what, line string }{
		{"another MAC", "ip link set eth0 address 02:00:00:00:77:77"},
		{"another MTU", "ip link set eth0 mtu 1300"},
		{"down and up", "ip link set eth0 down; ip link set eth0 up; ip route replace default via 192.0.2.254"},
		{"another name", "ip link set eth0 name eth9"},
		{"the name again", "ip link set eth9 name eth0"},
		{"flushed", "nft flush ruleset; tc qdisc del dev eth0 clsact"},
	} {
		if strings.Contains(k.line, "mtu") {
			r.Sh(k.line)
		}
		a.Sh(k.line)
		works(k.what)
	}
	if l := a.Must("cat", "/run/missiu.log"); strings.Contains(l, "another process holds the port") {
		t.Errorf("after a new name our own sockets are in the way:\n%s", l)
	}
	a.Sh("ip link del eth0")
	lab.Link(t, a.Host, r, "eth0", prefixes("192.0.2.1/24"), prefixes("192.0.2.254/24"))
	gatewayRoute(a)
	works("made anew")
}

// What becomes of a severed interface and of SAs when missiu is killed, and when
// the interface is renamed.
func TestInlineFate(t *testing.T) {
	lab.NeedRoot(t)
	// A capture on a severed host would also show what missiu has opened.
	a, b, r := routed(t, false)
	before := a.Snapshot()
	manualInline(a, b)
	c := r.Capture("eth0")
	works := func(what string) {
		t.Helper()
		lab.Until(t, 20*time.Second, what, func() (bool, string) {
			return a.Ping(3, "-W", "1", b.Addr.String()) == 3, fmt.Sprint(nonzero(a))
		})
	}
	works("manual SAs")
	if r := a.Try("./missiu -i eth0 state sideways"); r.Code != 2 || !strings.Contains(r.Err, "want closed, passive or active") {
		t.Errorf("%v\nwant exit 2", r)
	}
	if out := a.Do("./missiu -i eth0 state low passive"); out != "eth0: high active, low passive\n" {
		t.Errorf("state says %q", out)
	}
	if out := a.Do("./missiu -i eth0 status"); !strings.Contains(out, "high active, low passive; when missiu dies: closed") {
		t.Errorf("status says\n%s", out)
	}
	a.Do("./missiu -i eth0 state active")
	works("active again")

	a.Sh("ip link set eth0 name eth9")
	works("renamed")
	a.Sh("ip link set eth9 name eth0")
	works("renamed back")
	if l := a.Must("cat", "/run/missiu.log"); !strings.Contains(l, "renamed") {
		t.Errorf("the log does not tell of the new name:\n%s", l)
	}

	a.KillMissiu()
	if n := a.Silence(3, b.Addr.String()); n != 0 {
		t.Errorf("%d of 3 pings answered after a kill", n)
	}
	a.Sh("nft flush ruleset")
	if n := a.Silence(2, b.Addr.String()); n != 0 {
		t.Errorf("%d of 2 pings answered after a kill and a flush", n)
	}
	if r := a.Try("./missiu -i eth0 state"); r.Code != 1 || !strings.Contains(r.Err, "the instance has died") {
		t.Errorf("%v\nwant a word about the dead instance", r)
	}
	if r := a.Try("./missiu -i eth0 startRaw"); r.Code != 1 || !strings.Contains(r.Err, "severed by a startInline that was killed") {
		t.Errorf("%v\nwant a refusal", r)
	}
	startInline(a)
	if n := a.Silence(2, b.Addr.String()); n != 0 {
		t.Errorf("%d of 2 pings answered without the SAs that were lost", n)
	}
	lab.NoClear(t, c.Stop())
	a.KillMissiu()
	a.StopMissiu()
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}

	b.StopMissiu()
	startInline(a, "--fail open")
	a.KillMissiu()
	if n := a.Ping(3, b.Addr.String()); n != 3 {
		t.Errorf("--fail open: %d of 3 pings answered", n)
	}
	a.StopMissiu()
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}

// A host whose interface is severed before it has any address gets them as
// always: by DHCP's broadcasts from 0.0.0.0 (RFC 2131), and by router
// advertisements (RFC 4862).
func TestInlineAddresses(t *testing.T) {
	lab.NeedRoot(t)
	for _, sever := range []string{"hook", "namespace"} {
		t.Run(sever, func(t *testing.T) { inlineAddresses(t, sever) })
	}
}

func inlineAddresses(t *testing.T, sever string) {
	a, b := lab.NewHost(t, "a"), lab.NewHost(t, "b")
	lab.Link(t, a, b, "eth0", nil, prefixes("192.168.3.119/24"))
	n := lab.NewNode(a, "eth0", netip.MustParseAddr("192.168.3.118"), netip.MustParseAddr("192.168.3.119"))
	startInline(n, "--sever", sever)
	server := b.Start("/usr/bin/python3", "-uc", `
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
s.bind(("", 67))
print("bound")
while True:
    d, peer = s.recvfrom(1500)
    print(d.decode(), "from", peer[0])
    s.sendto({b"discover": b"offer", b"request": b"ack 192.168.3.118/24"}[d], ("255.255.255.255", 68))`)
	server.Says("bound", 20*time.Second)
	out := a.Python(`
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
s.bind(("", 68)); s.settimeout(20)
for m in b"discover", b"request":
    s.sendto(m, ("255.255.255.255", 67))
    print(s.recv(1500).decode())`)
	if out != "offer\nack 192.168.3.118/24\n" || !strings.Contains(server.Output(), "request from 0.0.0.0") {
		t.Fatalf("the client got %q, the server\n%s", out, server.Output())
	}
	a.Must("ip", "addr", "add", "192.168.3.118/24", "dev", "eth0")
	if got := a.Ping(3, "192.168.3.119"); got != 3 {
		t.Errorf("%d of 3 pings answered", got)
	}
	link := strings.Fields(b.Must("ip", "-o", "-6", "addr", "show", "dev", "eth0", "scope", "link"))[3]
	b.Python(`
import sys
from scapy.all import *
sendp(Ether(dst="33:33:00:00:00:01")/IPv6(src=sys.argv[1], dst="ff02::1", hlim=255)/ICMPv6ND_RA()/ICMPv6NDOptPrefixInfo(prefixlen=64, prefix="fd55::"), iface="eth0", verbose=0)`,
		strings.TrimSuffix(link, "/64"))
	lab.Until(t, 20*time.Second, "the address of the router's prefix", func() (bool, string) {
		out := a.Must("ip", "-6", "addr", "show", "dev", "eth0")
		return strings.Contains(out, "fd55::"), out
	})
	if s := n.Status(); s.Counters["out_other"] == 0 || s.Counters["in_other"] == 0 {
		t.Errorf("ARP did not pass missiu: %v", s.Counters)
	}
}
