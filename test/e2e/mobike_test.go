package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// spis of the SAs with keys, in order.
func spisOf(n *lab.Node) (l []string) {
	for _, s := range n.Mature() {
		l = append(l, fmt.Sprintf("%x", s.SPI))
	}
	slices.Sort(l)
	return l
}

// wantBetween checks that every SA of n is between two addresses.
func wantBetween(t *testing.T, n *lab.Node, x, y string) {
	t.Helper()
	a, b := netip.MustParseAddr(x), netip.MustParseAddr(y)
	for _, s := range n.Mature() {
		if (s.Src != a || s.Dst != b) && (s.Src != b || s.Dst != a) {
			t.Errorf("%s: SA %x from %v to %v, want between %v and %v", n.Name, s.SPI, s.Src, s.Dst, a, b)
		}
	}
}

// addresses is what the tests read of `ike status --json`.
type ikeAddresses struct {
	IKESAs []struct {
		Local  netip.AddrPort `json:"local"`
		Peer   netip.AddrPort `json:"peer"`
		MOBIKE bool           `json:"mobike"`
		Also   []netip.Addr   `json:"peer_addresses"`
	} `json:"ike_sas"`
}

func statusOf(t *testing.T, n *lab.Node) (s ikeAddresses) {
	t.Helper()
	out := n.Do("./ike status --json")
	if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.IKESAs) != 1 {
		t.Fatalf("%s: ike status: %v\n%s", n.Name, err, out)
	}
	return s
}

// A host loses its address under traffic: IKE and the SAs go on from another one as
// they are, though the policies of both sides name the first (RFC 4555); then the
// other side loses the one that it is reached at.
func TestMOBIKE(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, x := range []struct {
		*lab.Node
		second, inner string
	}{{a, "192.168.3.120/24", "10.1.0.1/24"}, {b, "192.168.3.121/24", "10.2.0.1/24"}} {
		x.Sh("echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries; ip addr add " + x.second + " dev eth0; ip addr add " + x.inner + " dev lo")
		x.StartMissiu()
		x.StartIKE()
	}
	a.LoadConfig("{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
	b.LoadConfig("{ laddr 10.2.0.0/24 raddr 10.1.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.119 traddr 192.168.3.118 }\n")
	a.RouteTo(prefixes("10.2.0.0/24")[0])
	b.RouteTo(prefixes("10.1.0.0/24")[0])
	lab.Until(t, 20*time.Second, "an SA", func() (bool, string) {
		return a.Ping(1, "-W", "1", "-I", "10.1.0.1", "10.2.0.1") == 1, a.IKE.Output()
	})
	was := spisOf(a)
	if len(was) != 2 {
		t.Fatalf("SAs %v, want 2", was)
	}
	s := statusOf(t, a)
	if i := s.IKESAs[0]; !i.MOBIKE || i.Peer.Port() != 4500 || !slices.Contains(i.Also, netip.MustParseAddr("192.168.3.121")) {
		t.Errorf("before: %+v", i)
	}

	lose := func(what string, n *lab.Node, addr, local, peer string) {
		t.Helper()
		p := a.Start("ping", "-n", "-i", "0.05", "-I", "10.1.0.1", "10.2.0.1")
		before := a.Status().Counters["out_protected"]
		lab.Until(t, 10*time.Second, "traffic", func() (bool, string) {
			return a.Status().Counters["out_protected"] >= before+20, fmt.Sprint(a.Status().Counters)
		})
		n.Sh("ip addr del " + addr + " dev eth0")
		answers := func() int { return strings.Count(p.Output(), " bytes from ") }
		mark := answers()
		lab.Until(t, 10*time.Second, what+": traffic to go on", func() (bool, string) {
			return answers() >= mark+20, p.Output() + a.IKE.Output()
		})
		p.Signal(syscall.SIGINT)
		p.Wait(10 * time.Second)
		t.Logf("%s: %s", what, statistics.FindString(p.Output()))
		for _, x := range []*lab.Node{a, b} {
			if now := spisOf(x); !slices.Equal(now, was) {
				t.Errorf("%s: %s has SAs %v, want %v", what, x.Name, now, was)
			}
			wantBetween(t, x, local, peer)
		}
		if i := statusOf(t, a).IKESAs[0]; i.Local.Addr().String() != local || i.Peer.Addr().String() != peer {
			t.Errorf("%s: IKE between %v and %v", what, i.Local, i.Peer)
		}
	}
	lose("initiator", a, "192.168.3.118/24", "192.168.3.120", "192.168.3.119")
	lose("responder", b, "192.168.3.119/24", "192.168.3.120", "192.168.3.121")

	// What is made now is made where the SAs are, for the policy that names others.
	b.Do("./ike rekey 'command line'")
	wantBetween(t, a, "192.168.3.120", "192.168.3.121")
	if slices.Equal(spisOf(a), was) {
		t.Error("not rekeyed")
	}
	if got := b.Ping(5, "-I", "10.2.0.1", "10.1.0.1"); got != 5 {
		t.Errorf("after rekeying %d of 5 pings answered", got)
	}
	if j := a.Must("cat", "/run/missiu/192.168.3.118.sas"); !strings.Contains(j, "192.168.3.120") {
		t.Errorf("journal:\n%s", j)
	}
	a.KillIKE(5 * time.Second)
	lab.Until(t, 10*time.Second, "no SA to be left", func() (bool, string) {
		return len(a.SAs()) == 0 && len(b.SAs()) == 0, fmt.Sprint(a.SAs(), b.SAs())
	})
}

// Where another program has port 4500 there is no NAT traversal, and the peer is told
// so: IKE stays on port 500, whoever begins.
func TestPort4500Taken(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	other := a.Start("python3", "-c", "import socket,time\ns=socket.socket(socket.AF_INET6,socket.SOCK_DGRAM)\ns.bind(('::',4500))\nprint('bound',flush=True)\ntime.sleep(600)")
	other.Says("bound", 20*time.Second)
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
		n.StartIKE()
		n.Route()
		n.LoadConfig(fmt.Sprintf("{ laddr %v raddr %v } ipsec { encr_algs gcm }\n", n.Addr, n.Peer))
	}
	for _, n := range []*lab.Node{a, b} {
		if got := n.Ping(3, n.Peer.String()); got != 3 {
			t.Errorf("from %s: %d of 3 pings answered\n%s", n.Name, got, n.IKE.Output())
		}
		if i := statusOf(t, n).IKESAs[0]; i.Peer.Port() != 500 {
			t.Errorf("%s: IKE with %v", n.Name, i.Peer)
		}
		n.KillIKE(5 * time.Second)
		n.StartIKE()
	}
}

// Either side loses its address, and the SAs go on from another one; charon, which
// cannot move an SA of its own, rekeys what it has.
func TestInteropMOBIKE(t *testing.T) {
	d := newDuo(t, "")
	second := map[*lab.Host]string{d.a.Host: "192.168.3.120/24", d.b: "192.168.3.121/24"}
	for h, addr := range second {
		h.Sh("echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries; ip addr add " + addr + " dev eth0")
	}
	d.startIKE("rule \"t\" { auth_method preshared local_addr 192.168.3.0/24 remote_addr 192.168.3.0/24 }\n", lab.PSK)
	d.peer("mobike = yes\nlocal_addrs = 192.168.3.119, 192.168.3.121\nremote_addrs = 192.168.3.118", "")
	for _, we := range []bool{true, false} {
		t.Run(map[bool]string{true: "we move", false: "they move"}[we], func(t *testing.T) {
			d.t = t
			h, gone, local, peer := d.a.Host, "192.168.3.118/24", "192.168.3.120", "192.168.3.119"
			if !we {
				h, gone, local, peer = d.b, "192.168.3.119/24", "192.168.3.118", "192.168.3.121"
				d.a.Sh("ip addr del 192.168.3.120/24 dev eth0") // or charon may choose it
				d.up()
			}
			d.pings("at first")
			if s := statusOf(t, d.a); !s.IKESAs[0].MOBIKE || s.IKESAs[0].Peer.Port() != 4500 {
				t.Errorf("before: %+v", s)
			}
			mark := len(d.a.IKE.Output())
			h.Sh("ip addr del " + gone + " dev eth0")
			lab.Until(t, 20*time.Second, "the SAs to move", func() (bool, string) {
				return d.a.Ping(1, "-W", "1", "10.2.0.1") == 1, d.a.IKE.Output()[mark:] + d.charon.Output()
			})
			d.pings("moved")
			if out := d.a.IKE.Output()[mark:]; strings.Count(out, " moved ") != 1 || strings.Contains(out, "IKE_SA_INIT") {
				t.Errorf("not one move:\n%s", out)
			}
			wantBetween(t, d.a, local, peer)
			d.down()
			h.Sh("ip addr add " + gone + " dev eth0")
		})
	}
}
