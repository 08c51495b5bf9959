package e2e

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// newAggfrag makes two hosts with a router between them and tunnels as
// newTunnels does; ofA and ofB are what their rules say of AGGFRAG.
func newAggfrag(t *testing.T, outer6, udp bool, ofA, ofB string) (a, b *lab.Node, r *lab.Host) {
	t.Helper()
	a, b, r = routed(t, outer6)
	own := map[*lab.Node][2]string{a: {"10.1.0.1", "fd0a::1"}, b: {"10.2.0.1", "fd0b::1"}}
	says := map[*lab.Node]string{a: ofA, b: ofB}
	nat := map[bool]string{true: "force", false: "auto"}[udp]
	for _, n := range []*lab.Node{a, b} {
		for _, addr := range own[n] {
			n.Must("ip", "addr", "add", addr, "dev", "lo")
		}
		n.StartMissiu()
		gatewayRoute(n)
	}
	for _, n := range []*lab.Node{a, b} {
		other := b
		if n == b {
			other = a
		}
		n.WriteFile("ike.conf", fmt.Sprintf("rule \"peer\" {\n  auth_method preshared\n  nat_traversal %s\n  childsa_aggfrag %s\n  remote_addr %v\n}\n", nat, says[n], n.Peer), 0o600)
		n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"peer\" key %q }\n", lab.PSK), 0o600)
		n.StartIKEWith("./ike -f ../ike.conf")
		loadTunnels(n, own[n], own[other])
	}
	for _, addr := range own[b] {
		if got := a.Ping(3, addr); got != 3 {
			t.Fatalf("ping %s: %d of 3", addr, got)
		}
	}
	return a, b, r
}

// espPackets is how many ESP packets a node has sent or received, by its counters.
func espPackets(n *lab.Node, dir string) int {
	c := n.Status().Counters
	return c[dir+"_protected"] - c[dir+"_aggregated"] + c[dir+"_aggregates"]
}

const floodReceiver = `
import socket, struct, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 8 << 20) # SO_RCVBUFFORCE
s.bind((sys.argv[1], 5005))
s.settimeout(20)
print("listening", flush=True)
got, last, wrong = 0, -1, 0
while True:
    try: b = s.recv(2000)
    except socket.timeout: break
    s.settimeout(0.2 if got + 1 >= int(sys.argv[2]) else 10)
    k, = struct.unpack_from("!I", b)
    if k <= last or len(b) != 64 or b[4:] != bytes([k & 255]) * 60: wrong += 1
    got, last = got + 1, k
print("got", got, wrong, flush=True)
`

const floodSender = `
import socket, struct, sys, time
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 5005))
s.setsockopt(17, 103, 64) # UDP_SEGMENT
for k in range(0, int(sys.argv[2]), 50):
    s.send(b"".join(struct.pack("!I", i) + bytes([i & 255]) * 60 for i in range(k, k + 50)))
    time.sleep(0.005)
`

// flood sends n datagrams of 64 octets and returns how many came. They have
// to come in order, each at most once.
func flood(t *testing.T, from, to *lab.Node, at string, n int) int {
	t.Helper()
	to.WriteFile("receiver.py", floodReceiver, 0o644)
	r := to.Start("/usr/bin/python3", "receiver.py", at, strconv.Itoa(n))
	r.Says("listening", 10*time.Second)
	from.Python(floodSender, at, strconv.Itoa(n))
	r.Says("got", 90*time.Second)
	var got, wrong int
	if _, err := fmt.Sscanf(strings.TrimPrefix(r.Output(), "listening\n"), "got %d %d", &got, &wrong); err != nil {
		t.Fatalf("receiver says %q: %v", r.Output(), err)
	}
	if wrong != 0 {
		t.Errorf("%d datagrams twice, out of order or damaged", wrong)
	}
	return got
}

// TestAggfrag: where both ends want it, small packets share ESP packets, and
// everything passes as it does without; where one does not, there is ordinary
// ESP.
func TestAggfrag(t *testing.T) {
	lab.NeedRoot(t)
	for _, c := range []struct {
		name        string
		outer6, udp bool
		ofA, ofB    string
		used        bool
	}{
		{"native", false, false, "prefer", "require", true},
		{"native over IPv6", true, false, "prefer", "prefer", true},
		{"UDP", false, true, "require", "prefer", true},
		{"only a wants it", false, false, "prefer", "no", false},
		{"only b wants it", false, true, "no", "prefer", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b, _ := newAggfrag(t, c.outer6, c.udp, c.ofA, c.ofB)
			const n = 5000
			for _, to := range []string{"10.2.0.1", "fd0b::1"} {
				sent, came := espPackets(a, "out"), espPackets(b, "in")
				if got := flood(t, a, b, to, n); got != n {
					t.Errorf("%d datagrams of %d came", got, n)
				}
				sent, came = espPackets(a, "out")-sent, espPackets(b, "in")-came
				t.Logf("%s: %d datagrams in %d ESP packets", to, n, sent)
				if c.used && (sent > n/8 || came != sent) || !c.used && (sent < n || came != sent) {
					t.Errorf("%s: %d datagrams in %d ESP packets, %d came; %v, %v", to, n, sent, came, nonzero(a), nonzero(b))
				}
			}
			for _, to := range [][2]string{{"10.2.0.1", "10.1.0.1"}, {"fd0b::1", "fd0a::1"}} {
				a.Transfer(b, netip.MustParseAddr(to[0]), 30e6)
				b.Transfer(a, netip.MustParseAddr(to[1]), 30e6)
				if got := a.Ping(5, "-s", "3000", to[0]); got != 5 {
					t.Errorf("%d of 5 large pings; %v, %v", got, nonzero(a), nonzero(b))
				}
			}
			for _, n := range []*lab.Node{a, b} {
				s := n.Status()
				if s.Drops() != 0 {
					t.Errorf("%s dropped inbound packets: %v", n.Name, nonzero(n))
				}
				if !c.used && s.Counters["out_aggregates"]+s.Counters["in_aggregates"] != 0 {
					t.Errorf("%s: AGGFRAG where one end does not want it: %v", n.Name, nonzero(n))
				}
				if got := strings.Contains(n.Do("./loadConfig -d"), "AGGFRAG"); got != c.used {
					t.Errorf("%s: SAs show AGGFRAG: %v, want %v", n.Name, got, c.used)
				}
			}
		})
	}
}

// TestAggfragLoss: of what is lost on the way nothing else is.
func TestAggfragLoss(t *testing.T) {
	lab.NeedRoot(t)
	a, b, r := newAggfrag(t, false, false, "require", "require")
	r.Sh(`nft add table ip loss
nft add chain ip loss loss '{ type filter hook forward priority 0; }'
nft add rule ip loss loss ip saddr 192.0.2.1 ip protocol esp numgen random mod 8 == 0 counter drop`)
	const n = 5000
	sent, came, inner := espPackets(a, "out"), espPackets(b, "in"), b.Status().Counters["in_protected"]
	got := flood(t, a, b, "10.2.0.1", n)
	sent, came, inner = espPackets(a, "out")-sent, espPackets(b, "in")-came, b.Status().Counters["in_protected"]-inner
	var lost int
	out := r.Sh("nft list table ip loss")
	_, rest, _ := strings.Cut(out, "counter packets ")
	if _, err := fmt.Sscan(rest, &lost); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	t.Logf("%d datagrams in %d ESP packets, of which %d were lost: %d datagrams came", n, sent, lost, got)
	if lost == 0 || came+lost != sent {
		t.Errorf("%d ESP packets sent, %d lost, %d came", sent, lost, came)
	}
	// 16 of 92 octets fit an ESP packet of 1500.
	if got != inner || got >= n || n-got > 16*lost {
		t.Errorf("%d of %d datagrams came, %d by missiu's count, with %d ESP packets lost", got, n, inner, lost)
	}
	if s := b.Status(); s.Drops() != 0 {
		t.Errorf("dropped inbound: %v", nonzero(b))
	}
	r.Sh("nft flush chain ip loss loss; nft add rule ip loss loss ip protocol esp numgen random mod 200 == 0 drop")
	a.Transfer(b, netip.MustParseAddr("10.2.0.1"), 5e6)
}
