package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Two hosts with a router between them, which captures: what it sees does not
// depend on the way that a host sends by.
//
//	a --eth0-- r --eth1-- b
func routed(t *testing.T, v6 bool) (a, b *lab.Node, r *lab.Host) {
	t.Helper()
	ha, hb, r := lab.NewHost(t, "a"), lab.NewHost(t, "b"), lab.NewHost(t, "r")
	at := []string{"192.0.2.1", "192.0.2.254", "198.51.100.1", "198.51.100.254", "/24"}
	if v6 {
		at = []string{"fd01::1", "fd01::fe", "fd02::1", "fd02::fe", "/64"}
	}
	lab.Link(t, ha, r, "eth0", prefixes(at[0]+at[4]), prefixes(at[1]+at[4]))
	lab.Link(t, hb, r, "eth1", prefixes(at[2]+at[4]), prefixes(at[3]+at[4]))
	r.Sh("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	a = lab.NewNode(ha, "eth0", netip.MustParseAddr(at[0]), netip.MustParseAddr(at[2]))
	b = lab.NewNode(hb, "eth1", a.Peer, a.Addr)
	gatewayRoute(a)
	gatewayRoute(b)
	return a, b, r
}

// gatewayRoute sets the way to the peer, and what the kernel has taken away
// with the link before that.
func gatewayRoute(n *lab.Node) {
	if n.Addr.Is6() {
		n.Sh(fmt.Sprintf("ip -6 addr replace %v/64 dev %s nodad", n.Addr, n.If))
		n.Sh(fmt.Sprintf("ip -6 route replace fd00::/8 via %vfe", strings.TrimSuffix(n.Addr.String(), "1")))
		return
	}
	n.Sh(fmt.Sprintf("ip route replace default via %v254", strings.TrimSuffix(n.Addr.String(), "1")))
}

// noOffload takes from an interface what virtual links can do and real ones
// cannot: checksums and segmentation left to the other side.
func noOffload(h *lab.Host, ifname string) {
	h.Python(`
import array, fcntl, socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for cmd in 0x15, 0x17, 0x19, 0x1f, 0x22, 0x24, 0x2c: # ETHTOOL_SRXCSUM, STXCSUM, SSG, STSO, SUFO, SGSO, SGRO
    v = array.array('B', struct.pack('II', cmd, 0))
    try:
        fcntl.ioctl(s, 0x8946, struct.pack('16sP', sys.argv[1].encode(), v.buffer_info()[0]))
    except OSError as e:
        if e.errno != 95: raise
`, ifname)
}

// Native ESP by each way out, through a gateway, while neighbours come and go
// and the link flaps: nothing leaks, and everything recovers by itself.
func TestNativeWays(t *testing.T) {
	lab.NeedRoot(t)
	const octets = 8 << 20
	for _, k := range []struct {
		native  string
		v6      bool
		offload bool
		in, out string
	}{
		{"auto", false, true, "packet ring", "AF_XDP"},
		{"xdp", true, false, "packet ring", "AF_XDP"},
		{"packet", false, false, "packet ring", "packet socket"},
		{"raw", true, true, "packet socket", "raw socket"},
	} {
		t.Run(fmt.Sprintf("%s v6=%v offload=%v", k.native, k.v6, k.offload), func(t *testing.T) {
			a, b, r := routed(t, k.v6)
			if !k.offload {
				noOffload(a.Host, "eth0")
				noOffload(b.Host, "eth1")
				noOffload(r, "eth0")
				noOffload(r, "eth1")
			}
			before := a.Snapshot()
			for _, n := range []*lab.Node{a, b} {
				n.StartMissiu("--native", k.native)
			}
			c := r.Capture("eth0")
			for _, n := range []*lab.Node{a, b} {
				n.StartIKE()
				n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
				n.Route()
			}
			lab.Until(t, 20*time.Second, "the SAs", func() (bool, string) {
				return a.Ping(1, "-W", "1", b.Addr.String()) == 1, "no ping"
			})
			pings(t, a, 50)
			pings(t, b, 50)
			want := "in: " + k.in + "; out: " + k.out
			if got := a.Status().Paths["native esp"]; got != want {
				t.Errorf("path %q, want %q", got, want)
			}
			a.Transfer(b, b.Addr, octets)
			b.Transfer(a, a.Addr, octets)
			if got := a.Ping(5, "-s", "4000", b.Addr.String()); got != 5 {
				t.Errorf("long datagrams: %d of 5", got)
			}
			n := a.Status().Counters
			ways := map[string]string{"AF_XDP": "wire_sent_xdp", "packet socket": "wire_sent_packet", "raw socket": "wire_sent_raw"}
			if mine := n[ways[k.out]]; mine < octets/1500 || n["wire_send_refused"] != 0 {
				t.Errorf("%s took %d packets, want at least %d; %v", k.out, mine, octets/1500, n)
			}

			// Neighbours are forgotten under traffic: the raw sockets take
			// over until the kernel knows them again.
			p := a.Start(lab.PingArgs(300, 5*time.Millisecond, 5*time.Second, b.Addr.String())...)
			for range 10 {
				a.Sh("ip neigh flush dev eth0; ip -6 neigh flush dev eth0")
				time.Sleep(50 * time.Millisecond)
			}
			p.Wait(30 * time.Second)
			if got := lab.Answered(p.Output(), 300); got != 300 {
				t.Errorf("neighbours flushed: %d of 300 pings answered", got)
			}

			// The link flaps under traffic; routes over it are the operator's to set again.
			p = a.Start("ping", "-n", "-q", "-i", "0.005", b.Addr.String())
			for range 3 {
				a.Sh("ip link set eth0 down")
				if got := a.Silence(2, b.Addr.String()); got != 0 {
					t.Errorf("%d pings answered over a link that is down", got)
				}
				a.Sh("ip link set eth0 up")
				gatewayRoute(a)
				lab.Until(t, 20*time.Second, "recovery", func() (bool, string) {
					return a.Ping(2, "-W", "1", b.Addr.String()) == 2, fmt.Sprint(a.Status().Paths, a.Status().Counters)
				})
			}
			p.Stop()
			sent := a.Status().Counters[ways[k.out]]
			lab.Until(t, 10*time.Second, "the way out to be as before", func() (bool, string) {
				a.Ping(2, b.Addr.String())
				s := a.Status()
				return s.Paths["native esp"] == want && s.Counters[ways[k.out]] > sent, s.Paths["native esp"]
			})
			a.Transfer(b, b.Addr, octets)
			lab.NoClear(t, c.Packets())

			// Killed in the middle of it, and taken over: the queue of the old
			// AF_XDP socket is free again.
			p = a.Start("ping", "-n", "-q", "-i", "0.005", b.Addr.String())
			a.KillMissiu()
			a.StartMissiu("--native", k.native)
			if got := a.Status().Paths["native esp"]; got != want {
				t.Errorf("after the kill: path %q, want %q", got, want)
			}
			a.KillMissiu()
			p.Stop()
			ps := c.Stop()
			lab.NoClear(t, ps)
			if n := len(lab.Of(ps, lab.ESP)); n < 3*octets/1500 {
				t.Errorf("%d ESP packets on the link, want at least %d", n, 3*octets/1500)
			}
			a.KillIKE(10 * time.Second)
			a.StopMissiu()
			a.Must("rm", "-rf", "/run/missiu.log")
			if k.v6 {
				return // the addresses were set again, and differ in their flags
			}
			if diff := before.Diff(a.Snapshot()); diff != "" {
				t.Errorf("not as before:\n%s", diff)
			}
		})
	}
}

// A capture on the host itself sees both directions, whatever the way out was before.
func TestCaptureSeesBoth(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	upAll(a, b)
	pings(t, a, 20)
	if n := a.Status().Counters["wire_sent_xdp"]; n == 0 {
		t.Errorf("nothing left by AF_XDP: %v", a.Status().Counters)
	}
	c := a.Capture("eth0")
	pings(t, a, 20)
	in, out := 0, 0
	for _, p := range lab.Of(c.Stop(), lab.ESP) {
		if p.Src == a.Addr {
			out++
		} else {
			in++
		}
	}
	if in != 20 || out != 20 {
		t.Errorf("captured %d in and %d out, want 20 and 20", in, out)
	}
	before := a.Status().Counters["wire_sent_xdp"]
	pings(t, a, 20)
	if n := a.Status().Counters["wire_sent_xdp"] - before; n < 18 {
		t.Errorf("after the capture: %d of 20 by AF_XDP", n)
	}
}
