package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// TestJumbo: with jumbo frames at both ends TCP has segments of their size, in
// trains and super-frames too. The TAP follows the interface down and up again
// while everything runs, and nothing longer than the link takes leaves.
func TestJumbo(t *testing.T) {
	lab.NeedRoot(t)
	for _, udp := range []bool{true, false} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("UDP %v, IPv6 %v", udp, v6), func(t *testing.T) {
				a, b := newTunnel(t, v6, udp)
				for _, n := range []*lab.Node{a, b} {
					n.Sh("ethtool -K eth0 tx-udp-segmentation off >/dev/null") // so that the capture sees datagrams
				}
				overhead := 1500 - a.Status().TAP.MTU
				for _, mtu := range []int{9000, 1400, 9000} {
					for _, n := range []*lab.Node{a, b} {
						n.Sh(fmt.Sprintf("ip link set eth0 mtu %d", mtu))
						lab.Until(t, 10*time.Second, "the TAP to follow", func() (bool, string) {
							got := n.Status().TAP.MTU
							return got == mtu-overhead, fmt.Sprintf("%d under %d, want %d", got, mtu, mtu-overhead)
						})
					}
					before := a.Status().Counters
					c := b.Capture("eth0")
					for _, inner := range []bool{false, true} {
						rate := a.Transfer(b, tunnelEnds[inner][1], 16<<20)
						t.Logf("MTU %d, inner IPv6 %v: %.0f MB/s", mtu, inner, rate/1e6)
					}
					ps := c.Stop()
					lab.NoClear(t, ps)
					long := 0
					for _, p := range ps {
						switch {
						case p.Len > mtu+14:
							t.Fatalf("MTU %d: %v", mtu, p)
						case p.Len > mtu+14-24: // block sizes
							long++
						}
					}
					if want := 2 * (16 << 20) / mtu * 8 / 10; long < want {
						t.Errorf("MTU %d: %d full packets of %d, want %d", mtu, long, len(ps), want)
					}
					now := a.Status().Counters
					if d := now["udp_sent_trains"] - before["udp_sent_trains"]; udp != (d > 0) {
						t.Errorf("MTU %d: %d trains", mtu, d)
					}
					for _, k := range []string{"out_fragments", "udp_send_refused", "wire_send_refused"} {
						if d := now[k] - before[k]; d != 0 {
							t.Errorf("MTU %d: %d more %s", mtu, d, k)
						}
					}
					if got := a.Ping(3, "-s", "20000", tunnelEnds[v6][1].String()); got != 3 {
						t.Errorf("MTU %d: %d of 3 long pings", mtu, got)
					}
				}
				for _, n := range []*lab.Node{a, b} {
					s := n.Status()
					if s.Drops() != 0 || s.Counters["wire_truncated"]+s.Counters["udp_truncated"] != 0 {
						t.Errorf("%s: %v", n.Name, nonzero(n))
					}
				}
			})
		}
	}
}

// TestPathNarrows: a link in the middle becomes smaller for a TCP that sends trains
// and super-frames. Its router's word reaches the sender, and TCP goes on within
// seconds, without a packet longer than the link from then on.
func TestPathNarrows(t *testing.T) {
	lab.NeedRoot(t)
	for _, udp := range []bool{true, false} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("UDP %v, IPv6 %v", udp, v6), func(t *testing.T) {
				a, b, r := routed(t, v6)
				tunnel(a, b, a.Addr, b.Addr, udp)
				a.Sh("ethtool -K eth0 tx-udp-segmentation off >/dev/null") // so that the capture sees datagrams
				b.Sh("ethtool -K eth1 tx-udp-segmentation off >/dev/null")
				for _, inner := range []bool{v6, !v6} {
					to := tunnelEnds[inner][1]
					where := netip.AddrPortFrom(to, 5001).String()
					l := b.Start("bin/transfer", "listen", where)
					l.Says("listening", 10*time.Second)
					s := a.Start("bin/transfer", "send", where, fmt.Sprint(100<<20), fmt.Sprint(20<<20))
					s.Says("holding", 20*time.Second)
					lab.Until(t, 10*time.Second, "nothing to be on its way", func() (bool, string) {
						queues := a.Sh("ss -Htn state established dport = :5001 | awk '{ print $2 }'")
						return strings.TrimSpace(queues) == "0", queues
					})
					mtu := map[bool]int{v6: 1420, !v6: 1390}[inner] // the second time narrower; IPv6 keeps its 1280
					r.Sh(fmt.Sprintf("ip route replace %v dev eth1 mtu lock %d", netip.PrefixFrom(b.Addr, b.Addr.BitLen()), mtu))
					c := b.Capture("eth1")
					was, from := b.Status().Counters["in_protected"], time.Now()
					s.Signal(syscall.SIGUSR1)
					lab.Until(t, 5*time.Second, "traffic", func() (bool, string) {
						got := b.Status().Counters["in_protected"] - was
						return got >= 5000, fmt.Sprintf("%d packets since; %v", got, nonzero(a))
					})
					t.Logf("inner IPv6 %v: 5000 packets %v after the path had narrowed", inner, time.Since(from))
					ps := c.Stop()
					if code := s.Wait(30 * time.Second); code != 0 {
						t.Fatalf("the sender says %s", s.Output())
					}
					l.Wait(30 * time.Second)
					sent, got := strings.Fields(strings.TrimPrefix(s.Output(), "holding\n")), strings.Fields(strings.TrimPrefix(l.Output(), "listening\n"))
					if len(sent) < 2 || len(got) < 2 || sent[1] != got[1] {
						t.Errorf("sent %v, received %v", sent, got)
					}
					full := 0
					for _, p := range ps {
						if p.Len > mtu+14 {
							t.Fatalf("longer than the path: %v", p)
						}
						if p.Len > mtu+14-24 && !p.Fragment {
							full++
						}
					}
					if full < 1000 {
						t.Errorf("%d full packets behind the narrow link", full)
					}
				}
				if n := a.Status().Counters; n["out_too_big"] == 0 {
					t.Errorf("the sender was told nothing: %v", n)
				}
			})
		}
	}
}

// TestClampMSS: between hosts that hear no ICMP, behind gateways with a path
// narrower than their links, TCP works because SYNs are clamped, and only
// because of that.
func TestClampMSS(t *testing.T) {
	lab.NeedRoot(t)
	for _, mss := range []string{"clamp", "keep"} {
		for _, udp := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, UDP %v", mss, udp), func(t *testing.T) {
				g := newGateways(t, false)
				options := []string{"--mss", mss}
				if udp {
					options = append(options, "--tun") // which is no other than a TAP here
				}
				g.up(udp, options...)
				for _, h := range []*lab.Node{g.ha, g.hb} {
					h.Sh(`nft add table inet deaf; nft add chain inet deaf i '{ type filter hook input priority 0; }'
						nft add rule inet deaf i icmp type destination-unreachable drop; nft add rule inet deaf i icmpv6 type packet-too-big drop`)
				}
				for i, to := range []string{"10.2.0.2", "fd0b::2"} {
					back := []string{"10.1.0.2", "fd0a::2"}[i]
					// The gateways learn the path.
					g.ha.Ping(3, "-W", "1", "-s", "1350", "-M", "dont", to)
					g.hb.Ping(3, "-W", "1", "-s", "1350", "-M", "dont", back)
					if mss == "clamp" {
						g.ha.Transfer(g.hb, netip.MustParseAddr(to), 4<<20)
						g.hb.Transfer(g.ha, netip.MustParseAddr(back), 4<<20)
						continue
					}
					where := netip.AddrPortFrom(netip.MustParseAddr(to), 5001).String()
					l := g.hb.Start("bin/transfer", "listen", where)
					l.Says("listening", 10*time.Second)
					if r := g.ha.Run("timeout", "3", "bin/transfer", "send", where, fmt.Sprint(4<<20)); r.Code == 0 {
						t.Errorf("to %s: nothing clamped, and yet all arrived: the test proves nothing", to)
					}
					l.Stop()
				}
			})
		}
	}
}

// TestVLAN: missiu on a VLAN sub-interface, by each way out, beside untagged
// traffic of the parent that is nobody's business.
func TestVLAN(t *testing.T) {
	lab.NeedRoot(t)
	for _, k := range []struct {
		native string
		udp    bool
	}{{"auto", false}, {"xdp", false}, {"packet", false}, {"raw", false}, {"auto", true}} {
		t.Run(fmt.Sprintf("%s UDP %v", k.native, k.udp), func(t *testing.T) {
			a, b := lab.Pair(t)
			at := []string{"198.51.100.1", "198.51.100.2"}
			tagged := a.Run("ip", "link", "add", "link", "eth0", "name", "eth0.100", "type", "vlan", "id", "100").Code == 0
			if tagged {
				b.Sh("ip link add link eth0 name eth0.100 type vlan id 100")
				for i, n := range []*lab.Node{a, b} {
					n.Sh(fmt.Sprintf("ip addr add %s/24 dev eth0.100; ip link set eth0.100 up", at[i]))
				}
			} else {
				t.Log("this kernel has no VLANs: another cable of such a name")
				lab.Link(t, a.Host, b.Host, "eth0.100", prefixes(at[0]+"/24"), prefixes(at[1]+"/24"))
			}
			for i, n := range []*lab.Node{a, b} {
				n.If, n.Addr, n.Peer = "eth0.100", netip.MustParseAddr(at[i]), netip.MustParseAddr(at[1-i])
				n.Sh("ethtool -K eth0.100 tx-udp-segmentation off >/dev/null")
			}
			before := a.Snapshot()
			tunnel(a, b, a.Addr, b.Addr, k.udp, "--native", k.native)
			t.Log(a.Status().Paths)
			c, parent := b.CaptureWhole("eth0.100"), b.Capture("eth0", "vlan 100")
			for _, v6 := range []bool{false, true} {
				a.Transfer(b, tunnelEnds[v6][1], 16<<20)
				b.Transfer(a, tunnelEnds[v6][0], 16<<20)
				if got := a.Ping(5, "-s", "4000", tunnelEnds[v6][1].String()); got != 5 {
					t.Errorf("long pings: %d of 5; %v, %v", got, nonzero(a), nonzero(b))
				}
			}
			if got := a.Ping(5, "192.168.3.119"); got != 5 {
				t.Errorf("untagged pings of the parent: %d of 5", got)
			}
			ps := c.Stop()
			lab.NoClear(t, ps)
			want := lab.ESP
			if k.udp {
				want = lab.ESPinUDP
			}
			if n := lab.Count(ps)[want]; n < 1000 {
				t.Errorf("%d packets of %v, want more: %v", n, want, lab.Count(ps))
			}
			for _, p := range ps {
				if p.Len > 1514 {
					t.Fatalf("longer than the link takes: %v", p)
				}
			}
			if len(parent.Stop()) == 0 && tagged {
				t.Error("no frame had the tag")
			}
			for _, n := range []*lab.Node{a, b} {
				s := n.Status()
				if s.Drops() != 0 || s.Counters["wire_send_refused"]+s.Counters["udp_send_refused"] != 0 {
					t.Errorf("%s: %v", n.Name, nonzero(n))
				}
			}
			// What claims to come from the tunnel is not believed without it, and
			// the kernel does not answer what it must not see.
			b.Sh("ip route del 10.1.0.1/32; ip route add 10.1.0.1/32 via 198.51.100.1 src 10.2.0.1")
			if got := b.Silence(3, "10.1.0.1"); got != 0 {
				t.Errorf("%d clear pings answered; %v", got, nonzero(a))
			}
			lab.Until(t, 10*time.Second, "the clear pings to be dropped", func() (bool, string) {
				return a.Status().Counters["drop_in_clear"] >= 3, fmt.Sprint(nonzero(a))
			})
			for _, n := range []*lab.Node{a, b} {
				n.StopMissiu()
			}
			a.Sh("ip addr del 10.1.0.1/32 dev lo; ip addr del fd0a::1/128 dev lo")
			a.Must("rm", "-rf", "/run/missiu.log")
			if diff := before.Diff(a.Snapshot()); diff != "" {
				t.Errorf("not as before:\n%s", diff)
			}
		})
	}
}
