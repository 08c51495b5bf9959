package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Policies are loaded, appended and removed while numbered packets pass in both
// directions: not one is lost, none is in clear, and the SAs of the entry that
// did not change are the same.
func TestReloadUnderTraffic(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	up(a, b, func(n *lab.Node) string { return policyFor(n, "", "encr_algs gcm") })
	pings(t, a, 1)
	spis := func(n *lab.Node) []uint32 {
		var l []uint32
		for _, s := range n.Mature() {
			l = append(l, s.SPI)
		}
		slices.Sort(l)
		return l
	}
	was := map[*lab.Node][]uint32{a: spis(a), b: spis(b)}
	for _, n := range []*lab.Node{a, b} {
		// Room for what comes while a slow machine keeps missiu from its processor.
		n.Must("ip", "link", "set", n.TAP(), "txqueuelen", "20000")
	}
	before := map[*lab.Node]map[string]int{a: a.Status().Counters, b: b.Status().Counters}
	c := a.CaptureWhole("eth0")

	const packets, rate = 20000, 1000 // a second
	sink := `import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 1 << 24) # SO_RCVBUFFORCE
s.bind(('0.0.0.0', 9)); s.settimeout(30); print('bound')
got = set()
while len(got) < int(sys.argv[1]):
    try: got.add(int.from_bytes(s.recv(2000)[:4], 'big'))
    except TimeoutError: break
print('got', len(got))`
	source := `import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
n, rate, t = int(sys.argv[2]), int(sys.argv[3]), time.monotonic()
for k in range(n):
    s.sendto(k.to_bytes(4, 'big') + bytes(500), (sys.argv[1], 9))
    time.sleep(max(0, t + k / rate - time.monotonic()))
print('sent')`
	var sinks, sources []*lab.Proc
	for _, n := range []*lab.Node{a, b} {
		p := n.Start("python3", "-uc", sink, fmt.Sprint(packets))
		p.Says("bound", 10*time.Second)
		sinks = append(sinks, p)
	}
	for _, n := range []*lab.Node{a, b} {
		sources = append(sources, n.Start("python3", "-uc", source, n.Peer.String(), fmt.Sprint(packets), fmt.Sprint(rate)))
	}
	loads := 0
	for k := 0; !sources[0].Ended() || !sources[1].Ended(); k++ {
		for _, n := range []*lab.Node{a, b} {
			same := policyFor(n, "", "encr_algs gcm")
			switch k % 4 {
			case 0: // another in front, another behind
				n.LoadConfig(fmt.Sprintf("{ raddr 10.%d.0.1 } drop {}\n", k%250) + same + "{ raddr 10.0.0.0/8 } ipsec { encr_algs aes }\n")
			case 1: // a thousand in front
				var s strings.Builder
				for i := range 1000 {
					fmt.Fprintf(&s, "{ raddr 10.%d.%d.1 ulp tcp } bypass {}\n", i>>8, i&255)
				}
				n.LoadConfig(s.String() + same)
			case 2: // behind it, and away again
				n.WriteFile("bin/more.conf", "{ raddr 172.16.0.0/12 } drop {}\n", 0o644)
				n.Do("./loadConfig -a more.conf && ./loadConfig -r more.conf")
			case 3:
				n.LoadConfig(same)
			}
			loads++
		}
	}
	for k, p := range sinks {
		p.Wait(60 * time.Second)
		if want := fmt.Sprintf("got %d\n", packets); !strings.HasSuffix(p.Output(), want) {
			t.Errorf("sink %d says %q, want %q: packets are lost", k, p.Output(), want)
		}
	}
	if loads < 20 {
		t.Errorf("%d loads while %d packets passed, want 20 and more", loads, packets)
	}
	t.Logf("%d loads", loads)
	lab.NoClear(t, c.Stop())
	for _, n := range []*lab.Node{a, b} {
		if got := spis(n); !slices.Equal(got, was[n]) {
			t.Errorf("%s: SAs %x, were %x", n.Name, got, was[n])
		}
		for name, v := range n.Status().Counters {
			if strings.HasPrefix(name, "drop_") && v != before[n][name] {
				t.Errorf("%s: %s is %d, was %d", n.Name, name, v, before[n][name])
			}
		}
	}
}
