package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/test/e2e/lab"
)

// routeTo is what the kernel of h would do with a packet to dst: "tun0 10.1.0.1",
// the device and the source.
func routeTo(h *lab.Host, dst string) string {
	f := strings.Fields(h.Run("ip", "route", "get", dst).Out)
	var l []string
	for _, key := range []string{"dev", "src"} {
		if i := slices.Index(f, key); i >= 0 && i+1 < len(f) {
			l = append(l, f[i+1])
		}
	}
	return strings.Join(l, " ")
}

// startCertIKE starts ike on n with a certificate of its own, and returns what its
// peer needs.
func startCertIKE(n *lab.Node) *lab.SwanCert {
	ca := credtest.CA("CA", credtest.Key("p256", 0))
	own := ca.Issue("ours", credtest.Key("p256", 1), credtest.Names("a.example.com"))
	theirs := ca.Issue("theirs", credtest.Key("p256", 2), credtest.Names("b.example.com"))
	n.WriteFile("/etc/missiu/ca.pem", string(credtest.PEM(ca)), 0o644)
	n.WriteFile("/etc/missiu/own.pem", string(credtest.PEM(own)), 0o644)
	n.WriteFile("/etc/missiu/own.key", string(credtest.KeyPEM(own.Key)), 0o600)
	n.WriteFile("/etc/missiu/ike.conf", fmt.Sprintf(`rule "t" { auth_method cert remote_addr %v cert_file "own.pem" key_file "own.key" ca_file "ca.pem"
  local_id a.example.com remote_id b.example.com }
`, n.Peer), 0o644)
	n.StartIKEWith("./ike")
	return &lab.SwanCert{
		Own: string(credtest.PEM(theirs)), Key: string(credtest.KeyPEM(theirs.Key)), CA: string(credtest.PEM(ca)),
		Local: "b.example.com", Remote: "a.example.com",
	}
}

// The scenarios of strongSwan's own tests of kernel-libipsec that a stock
// strongSwan can play, with it as the other gateway: ESP in UDP, a host behind
// each, a router between them with a smaller MTU, no route made by hand and none
// left. (Those with plain ESP, and triple DES, which ike does not negotiate, are
// in TestLinuxKernel; of the former, IPv6 in IPv6 is here in UDP, too. The others are the same
// here as those in UDP.)
func TestTunLibipsec(t *testing.T) {
	lab.NeedRoot(t)
	for _, tt := range []struct {
		name, properties, ulp, esp, encr, bits string
		inner6, outer6, theyStart, certs       bool
	}{
		{name: "net2net-cert", properties: "encr_algs aes-gcm(128)", esp: "aes128gcm16", encr: "AES_GCM_16", bits: "128", theyStart: true, certs: true},
		{name: "net2net-null", properties: "encr_algs null encr_auth_algs sha256", esp: "null-sha256", encr: "NULL", theyStart: true},
		{name: "net2net-trap", properties: "encr_algs aes-gcm(128)", esp: "aes128gcm16", encr: "AES_GCM_16", bits: "128"},
		{name: "net2net-cert-ip6-in-ip4", properties: "encr_algs aes-gcm(256)", ulp: "icmpv6", esp: "aes256gcm16", encr: "AES_GCM_16", bits: "256", inner6: true, theyStart: true, certs: true},
		{name: "net2net-cert-ip6-in-ip6", properties: "encr_algs aes-gcm(128)", esp: "aes128gcm16", encr: "AES_GCM_16", bits: "128", inner6: true, outer6: true, theyStart: true, certs: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGateways(t, tt.outer6)
			before := g.ga.Snapshot()
			us, them, here, there := "10.1.0.0/24", "10.2.0.0/24", "10.1.0.2", "10.2.0.2"
			if tt.inner6 {
				us, them, here, there = "fd0a::/64", "fd0b::/64", "fd0a::2", "fd0b::2"
			}
			c := lab.SwanConn{Local: g.gb.Addr.String(), Remote: g.ga.Addr.String(), LocalTS: them, RemoteTS: us, PSK: lab.PSK, ESP: tt.esp}
			selector := fmt.Sprintf("laddr %s raddr %s", us, them)
			if tt.ulp != "" {
				selector += " ulp " + tt.ulp
				c.LocalTS, c.RemoteTS = them+"[ipv6-icmp]", us+"[ipv6-icmp]"
			}
			g.ga.Do("./missiu -i eth0 -l missiu.log startTun")
			if tt.certs {
				c.Cert = startCertIKE(g.ga)
			} else {
				g.ga.StartIKE()
			}
			swan := lab.StartStrongSwan(g.gb.Host, c)
			g.ga.LoadConfig(fmt.Sprintf("{ %s } ipsec { %s tladdr %v traddr %v }\n", selector, tt.properties, g.ga.Addr, g.gb.Addr))
			gateway := map[bool]string{false: "10.1.0.1", true: "fd0a::1"}[tt.inner6]
			if got := routeTo(g.ga.Host, there); got != "tun0 "+gateway {
				t.Fatalf("route to %s: %s, want tun0 %s", there, got, gateway)
			}
			if got := routeTo(g.ga.Host, g.gb.Addr.String()); got != "eth0 "+g.ga.Addr.String() {
				t.Errorf("route to the peer: %s, want eth0", got)
			}
			w := g.r.Capture("eth0")
			if tt.theyStart {
				swan.Initiate()
			} else if n := len(g.ga.Mature()); n != 0 {
				t.Errorf("%d SAs before the first packet", n)
			}
			if got := g.ha.Ping(5, there); got != 5 {
				t.Errorf("%d of 5 pings answered; counters %v", got, nonzero(g.ga))
			}
			if got := g.hb.Ping(5, here); got != 5 {
				t.Errorf("%d of 5 pings of theirs answered; counters %v", got, nonzero(g.ga))
			}
			// 8 kB in fragments: the first ones teach each side the path.
			lab.Until(t, 30*time.Second, "pings of 8 kB to be answered", func() (bool, string) {
				r := g.ha.Run("ping", "-n", "-c", "3", "-i", "0.2", "-W", "2", "-s", "8184", "-M", "dont", there)
				return lab.Answered(r.Out, 3) == 3, fmt.Sprint(r, nonzero(g.ga))
			})
			ps := slices.DeleteFunc(w.Stop(), func(p lab.Packet) bool { return p.Src == routers[tt.outer6] })
			lab.NoClear(t, ps)
			if n := lab.Count(ps); n[lab.ESP] != 0 || n[lab.ESPinUDP] < 20 {
				t.Errorf("on the link: %v, want ESP in UDP alone", n)
			}
			for _, s := range g.ga.Mature() {
				if s.Mode != "tunnel" || s.Sport == 0 {
					t.Errorf("SA %+v, want a tunnel in UDP", s)
				}
			}
			theirs := swan.SAs()
			for _, want := range []string{"mode=TUNNEL", "encap=yes", "state=INSTALLED", "encr-alg=" + tt.encr, "encr-keysize=" + tt.bits} {
				if !strings.Contains(theirs, want) {
					t.Errorf("strongSwan's SAs lack %s: %s", want, theirs)
				}
			}
			g.ga.KillIKE(5 * time.Second)
			g.ga.StopMissiu()
			g.ga.Must("rm", "-f", "/run/missiu.log")
			delete(before, "etc")
			if d := before.Diff(g.ga.Snapshot()); d != "" {
				t.Errorf("not as before:\n%s", d)
			}
		})
	}
}

// Host to host: the destination is the peer itself, so nothing of ours may come
// back into the device. strongSwan needs marks for that, we nothing; strict
// reverse path filters on our side.
func TestTunHostToHost(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	a.Sh("for f in all default eth0; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done")
	b.Sh("for f in all default eth0; do echo 2 >/proc/sys/net/ipv4/conf/$f/rp_filter; done")
	before := a.Snapshot()
	a.Do("./missiu -i eth0 -l missiu.log --tun=vpn startRaw")
	swan := lab.StartStrongSwan(b.Host, lab.SwanConn{
		Cert: startCertIKE(a), Local: "192.168.3.119", Remote: "192.168.3.118", LocalTS: "192.168.3.119/32", RemoteTS: "192.168.3.118/32", ESP: "aes128gcm16",
		Settings: `  plugins {
    kernel-libipsec {
      allow_peer_ts = yes
    }
    kernel-netlink {
      fwmark = !0x42
    }
    socket-default {
      fwmark = 0x42
    }
  }`,
	})
	a.LoadConfig("{ laddr 192.168.3.118 raddr 192.168.3.119 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
	if got := routeTo(a.Host, "192.168.3.119"); got != "vpn 192.168.3.118" {
		t.Errorf("route to the peer: %s, want vpn", got)
	}
	c := a.Capture("eth0")
	swan.Initiate()
	if got := a.Ping(5, "192.168.3.119"); got != 5 {
		t.Errorf("%d of 5 pings answered; counters %v\n%s", got, nonzero(a), swan.Log())
	}
	if got := b.Ping(5, "192.168.3.118"); got != 5 {
		t.Errorf("%d of 5 pings of theirs answered; counters %v", got, nonzero(a))
	}
	a.Transfer(b, b.Addr, 4<<20)
	swan.Rekey(false) // IKE has to find its way, too
	swan.Rekey(true)
	if got := a.Ping(5, "192.168.3.119"); got != 5 {
		t.Errorf("rekeyed: %d of 5 pings answered; counters %v", got, nonzero(a))
	}
	ps := c.Stop()
	lab.NoClear(t, ps)
	if n := lab.Count(ps); n[lab.ESP] != 0 || n[lab.ESPinUDP] < 100 {
		t.Errorf("on the link: %v, want ESP in UDP alone", n)
	}
	a.KillIKE(5 * time.Second)
	a.StopMissiu()
	a.Must("rm", "-f", "/run/missiu.log")
	delete(before, "etc")
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}

// The same over IPv6, and in transport mode: neighbours are still found.
func TestTunTransport6(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	a.Addr, a.Peer = netip.MustParseAddr("fd00:3::118"), netip.MustParseAddr("fd00:3::119")
	b.Addr, b.Peer = a.Peer, a.Addr
	nodes := []*lab.Node{a, b}
	for _, n := range nodes {
		n.Do("./missiu -i eth0 -l missiu.log startTun")
		n.StartIKE()
		n.LoadConfig(fmt.Sprintf("{ raddr %v } ipsec { encr_algs gcm }\n", n.Peer))
		if got := routeTo(n.Host, n.Peer.String()); got != "tun0 "+n.Addr.String() {
			t.Errorf("%s: route to the peer: %s, want tun0", n.Name, got)
		}
	}
	c := a.Capture("eth0")
	for _, n := range nodes {
		n.Must("ip", "-6", "neigh", "flush", "dev", "eth0")
		if got := n.Ping(5, n.Peer.String()); got != 5 {
			t.Errorf("%s: %d of 5 pings answered; counters %v", n.Name, got, nonzero(n))
		}
	}
	a.Transfer(b, b.Addr, 4<<20)
	ps := c.Stop()
	lab.NoClear(t, ps)
	if n := lab.Count(ps); n[lab.ESP] < 100 || n[lab.ESPinUDP] != 0 {
		t.Errorf("on the link: %v, want ESP alone", n)
	}
	for _, s := range a.Mature() {
		if s.Mode != "transport" {
			t.Errorf("SA %+v, want transport", s)
		}
	}
}

// Everything through a tunnel between two missius, with what does not belong
// into it; a crash, which must not open the host, and an end that leaves nothing.
func TestTunRoutes(t *testing.T) {
	lab.NeedRoot(t)
	g := newGateways(t, false)
	g.ga.Sh("for f in all default eth0 lan; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done; ip route add default via 192.0.2.254")
	before := g.ga.Snapshot()
	g.ga.Do("./missiu -i eth0 -l missiu.log startTun")
	g.gb.Do("./missiu -i eth1 -l missiu.log --routes auto startRaw") // a TAP, with the same routes
	for _, n := range []*lab.Node{g.ga, g.gb} {
		n.StartIKE()
	}
	g.ga.LoadConfig(`{ raddr 192.0.2.254 ulp icmp dir both } bypass {}
{ raddr 192.0.2.254 rport 9 ulp udp dir out } drop {}
{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr 198.51.100.1 }
{ laddr 10.1.0.0/24 raddr 0.0.0.0/0 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr 198.51.100.1 }
{ laddr fd0a::/64 raddr fd0b::/64 } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr 198.51.100.1 }
`)
	g.gb.LoadConfig(`{ laddr 10.2.0.0/24 raddr 10.1.0.0/24 } ipsec { encr_algs gcm tladdr 198.51.100.1 traddr 192.0.2.1 }
{ laddr 0.0.0.0/0 raddr 10.1.0.0/24 } ipsec { encr_algs gcm tladdr 198.51.100.1 traddr 192.0.2.1 }
{ laddr fd0b::/64 raddr fd0a::/64 } ipsec { encr_algs gcm tladdr 198.51.100.1 traddr 192.0.2.1 }
`)
	for dst, want := range map[string]string{
		"10.2.0.2": "tun0 10.1.0.1", "203.0.113.9": "tun0 10.1.0.1", "fd0b::2": "tun0 fd0a::1",
		"198.51.100.1": "eth0 192.0.2.1", // the peer, within 0.0.0.0/0
		"10.1.0.2":     "lan 10.1.0.1",   // what the tunnel brings goes on
		"224.0.0.251":  "eth0 192.0.2.1",
	} {
		if got := routeTo(g.ga.Host, dst); got != want {
			t.Errorf("route to %s: %s, want %s", dst, got, want)
		}
	}
	c := g.r.Capture("eth0")
	pinged := func(what string, h *lab.Host, args ...string) {
		t.Helper()
		if got := h.Ping(5, args...); got != 5 {
			t.Errorf("%s: %d of 5 pings %v answered; counters %v and %v", what, got, args, nonzero(g.ga), nonzero(g.gb))
		}
	}
	pinged("hosts", g.ha.Host, "10.2.0.2")
	pinged("hosts, IPv6", g.ha.Host, "fd0b::2")
	pinged("gateways", g.ga.Host, "10.2.0.1")
	g.ha.Transfer(g.hb, netip.MustParseAddr("10.2.0.2"), 16<<20)
	g.hb.Transfer(g.ha, netip.MustParseAddr("fd0a::2"), 16<<20)
	// The router's packets are no secret, nor is that nobody listens on port 500.
	notRouter := func(p lab.Packet) bool {
		return p.Src == routers[false] || p.Dst == routers[false] || p.Proto == 1 && p.Src == g.gb.Addr && p.Dst == g.ga.Addr
	}
	lab.NoClear(t, slices.DeleteFunc(c.Stop(), notRouter))
	// What policy bypasses leaves by the interface though it is routed into the
	// device, and what it drops does not.
	if got := routeTo(g.ga.Host, "192.0.2.254"); !strings.HasPrefix(got, "tun0") {
		t.Errorf("route to the router: %s, want tun0", got)
	}
	// The peer is excluded for this gateway, not for what policy protects.
	c = g.r.Capture("eth0")
	pinged("the peer, from behind", g.ha.Host, "198.51.100.1")
	lab.NoClear(t, slices.DeleteFunc(c.Stop(), notRouter))
	pinged("bypassed", g.ga.Host, "-I", "192.0.2.1", "192.0.2.254")
	was := g.ga.Status().Counters
	g.ga.Sh("echo x >/dev/udp/192.0.2.254/9")
	lab.Until(t, 10*time.Second, "the datagram to be dropped", func() (bool, string) {
		s := g.ga.Status().Counters
		return s["drop_out_discard"] == was["drop_out_discard"]+1 && s["out_bypassed"] >= 5, fmt.Sprint(s)
	})

	// Dead, it keeps closed what it had; its successor opens it again.
	g.ga.KillMissiu()
	c = g.r.Capture("eth0")
	if n := g.ha.Silence(5, "10.2.0.2"); n != 0 {
		t.Errorf("%d pings answered by a dead missiu's peer", n)
	}
	g.ga.Do("./missiu -i eth0 -l missiu.log startTun")
	if got := routeTo(g.ga.Host, "10.2.0.2"); got != "tun0 10.1.0.1" {
		t.Errorf("after a crash: route %s", got)
	}
	g.gb.IKE.Signal(syscall.SIGKILL) // it would hold on to SAs that the other side has lost
	g.gb.IKE.Wait(10 * time.Second)
	g.gb.Do("./loadConfig -F")
	g.ga.KillIKE(10 * time.Second)
	for _, n := range []*lab.Node{g.ga, g.gb} {
		n.Sh("rm -f /run/missiu/*.sas") // what they had negotiated; here the first packet is to do that
		n.StartIKE()
	}
	pinged("after a crash", g.ha.Host, "10.2.0.2")
	// A device that an operator takes down does not open the host either.
	g.ga.Must("ip", "link", "set", "tun0", "down")
	if n := g.ha.Silence(5, "10.2.0.2"); n != 0 {
		t.Errorf("%d pings answered with the device down", n)
	}
	g.ga.Must("ip", "link", "set", "tun0", "up")
	lab.Until(t, 10*time.Second, "the routes to be back", func() (bool, string) {
		r := routeTo(g.ga.Host, "10.2.0.2")
		return r == "tun0 10.1.0.1", r
	})
	pinged("after the device was down", g.ha.Host, "10.2.0.2")
	lab.NoClear(t, slices.DeleteFunc(c.Stop(), notRouter))
	g.ga.KillIKE(10 * time.Second)
	g.ga.KillMissiu()
	g.ga.StopMissiu()
	g.ga.Must("rm", "-f", "/run/missiu.log")
	delete(before, "etc")
	if d := before.Diff(g.ga.Snapshot()); d != "" {
		t.Errorf("not as before:\n%s", d)
	}
}

// With --routes sa the routes come with the SA and go with it.
func TestTunRoutesOfSA(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	a.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
	b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
	a.Do("./missiu -i eth0 -l missiu.log --routes sa startTun")
	b.Do("./missiu -i eth0 -l missiu.log startTun")
	for _, n := range []*lab.Node{a, b} {
		n.StartIKE()
	}
	a.LoadConfig("{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
	b.LoadConfig("{ laddr 10.2.0.0/24 raddr 10.1.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.119 traddr 192.168.3.118 }\n")
	if got := routeTo(a.Host, "10.2.0.1"); strings.Contains(got, "tun0") {
		t.Errorf("without an SA: route %s", got)
	}
	if got := b.Ping(5, "10.1.0.1"); got != 5 {
		t.Errorf("%d of 5 pings answered; counters %v", got, nonzero(b))
	}
	if got := routeTo(a.Host, "10.2.0.1"); got != "tun0 10.1.0.1" {
		t.Errorf("with an SA: route %s, want tun0 10.1.0.1", got)
	}
	// An address on the device, as a peer may assign one, is what it names then.
	const addrAdd, addrDelete = "e5", "e6"
	for _, tt := range []struct{ verb, want, route string }{
		{addrAdd, "0", "tun0 10.1.0.77"}, {addrAdd, "0", "tun0 10.1.0.77"}, {addrDelete, "0", "tun0 10.1.0.1"}, {addrDelete, fmt.Sprint(int(syscall.ENOENT)), "tun0 10.1.0.1"},
	} {
		m := "02" + tt.verb + "0000" + "05000000" + "01000000" + "00000000" + "03000500" + "00200000" + "02000000" + "0a01004d" + "0000000000000000"
		if got := strings.TrimSpace(a.Must("bin/pfkey", "/run/missiu/eth0.pfkey", "raw", m)); got != tt.want {
			t.Errorf("message %s: errno %s, want %s", tt.verb, got, tt.want)
		}
		if got := routeTo(a.Host, "10.2.0.1"); got != tt.route {
			t.Errorf("after message %s: route %s, want %s", tt.verb, got, tt.route)
		}
	}
	b.KillIKE(10 * time.Second)
	lab.Until(t, 10*time.Second, "the route to go with the SA", func() (bool, string) {
		r := routeTo(a.Host, "10.2.0.1")
		return !strings.Contains(r, "tun0"), r
	})
}
