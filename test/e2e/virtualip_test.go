package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Virtual IPs between us and charon, in both roles and both families: the client
// has an address of the gateway's pool while the IKE SA lasts, and traffic with it.
func TestInteropVirtualIP(t *testing.T) {
	const inside4, inside6 = "10.9.0.1", "2001:db8:9::1"
	t.Run("we are the client", func(t *testing.T) {
		d := newDuo(t, "")
		d.b.Sh("ip addr add 2001:db8:2::1/64 dev lo nodad")
		d.a.Do("ip route del 10.2.0.0/24 dev tap0; ip route add 10.2.0.0/24 dev tap0; ip route add 2001:db8:2::/64 dev tap0")
		d.policies("{ laddr 10.9.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 sa init }\n" +
			"{ laddr 2001:db8:9::/64 raddr 2001:db8:2::/64 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
		d.secrets = "}\npools {\n p4 {\n addrs = 10.9.0.1-10.9.0.9\n dns = 10.2.0.53\n }\n p6 {\n addrs = 2001:db8:9::1-2001:db8:9::9\n }\n"
		d.peer("pools = p4, p6", "local_ts = 10.2.0.0/24, 2001:db8:2::/64\nremote_ts = dynamic")
		d.rule("request_addr both start_action start dns_file /run/missiu/dns")
		addrs := func() string { return d.a.Must("ip", "-o", "addr", "show", "dev", "tap0") }
		lab.Until(t, 20*time.Second, "traffic of the inner addresses", func() (bool, string) {
			return d.a.Ping(1, "-W", "1", "10.2.0.1") == 1 && d.a.Ping(1, "-W", "1", "2001:db8:2::1") == 1, d.a.IKE.Output() + addrs()
		})
		for _, a := range []string{inside4 + "/32", inside6 + "/128"} {
			if got := addrs(); !strings.Contains(got, a) {
				t.Errorf("the interface has not %s:\n%s", a, got)
			}
		}
		if got := d.b.Ping(3, "-I", "10.2.0.1", inside4); got != 3 {
			t.Errorf("%d of 3 pings of charon answered", got)
		}
		if out := d.a.IKE.Output(); !strings.Contains(out, "10.2.0.53") {
			t.Errorf("no word of the name server:\n%s", out)
		}
		if got := d.a.Must("cat", "/run/missiu/dns"); !strings.Contains(got, "\nnameserver 10.2.0.53\n") {
			t.Errorf("dns_file:\n%s", got)
		}
		d.a.KillIKE(10 * time.Second)
		if got := addrs(); strings.Contains(got, inside4) || strings.Contains(got, inside6) {
			t.Errorf("the addresses stay behind:\n%s", got)
		}
		if r := d.a.Run("test", "-e", "/run/missiu/dns"); r.Code == 0 {
			t.Errorf("dns_file stays behind")
		}
		// What a killed ike leaves the next one takes away.
		d.a.IKE = nil
		d.rule("request_addr both start_action start dns_file /run/missiu/dns")
		lab.Until(t, 20*time.Second, "the inner addresses", func() (bool, string) {
			got := addrs()
			return strings.Contains(got, inside4) && strings.Contains(got, inside6) && d.a.Run("test", "-e", "/run/missiu/dns").Code == 0, d.a.IKE.Output() + got
		})
		d.a.IKE.Signal(syscall.SIGKILL)
		d.a.IKE.Wait(10 * time.Second)
		d.a.IKE = nil
		d.rule("start_action none dns_file /run/missiu/dns")
		if got := addrs(); strings.Contains(got, inside4) || strings.Contains(got, inside6) || d.a.Run("test", "-e", "/run/missiu/dns").Code == 0 {
			t.Errorf("left of a killed ike, and dns_file perhaps:\n%s", got)
		}
	})
	t.Run("we are the gateway", func(t *testing.T) {
		d := newDuo(t, "install_virtual_ip = no")
		d.a.Do("ip addr add 2001:db8:1::1/64 dev lo nodad; ip route add 10.9.0.0/24 dev tap0 src 10.1.0.1; ip route add 2001:db8:9::/64 dev tap0 src 2001:db8:1::1")
		d.policies("{ laddr 10.1.0.0/24 raddr 0.0.0.0/0 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr any }\n" +
			"{ laddr 2001:db8:1::/64 raddr ::/0 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr any }\n")
		d.startIKE("pool \"p\" { addr 10.9.0.0/30 addr 2001:db8:9::1-2001:db8:9::9 dns 10.1.0.53 }\n"+
			"rule \"t\" { auth_method preshared remote_addr 192.168.3.119 pool \"p\" }\n", lab.PSK)
		d.b.Sh("ip addr add 10.9.0.1/32 dev lo; ip addr add 2001:db8:9::1/128 dev lo nodad")
		d.peer("vips = 0.0.0.0, ::", "local_ts = dynamic\nremote_ts = 10.1.0.0/24, 2001:db8:1::/64")
		d.up()
		if out := d.b.Must("swanctl", "--list-sas"); !strings.Contains(out, inside4) || !strings.Contains(out, inside6) {
			t.Errorf("charon has not %s and %s:\n%s", inside4, inside6, out)
		}
		lab.Until(t, 10*time.Second, "traffic of the leased address", func() (bool, string) {
			return d.b.Ping(2, "-I", inside4, "10.1.0.1") == 2 && d.a.Ping(2, "-I", "10.1.0.1", inside4) == 2, fmt.Sprint(d.a.SAs())
		})
		d.down()
		// The same identity, the same address.
		d.up()
		if out := d.b.Must("swanctl", "--list-sas"); !strings.Contains(out, inside4) {
			t.Errorf("charon has not %s again:\n%s", inside4, out)
		}
	})
}

// A client with a TUN, who is told by the gateway all that there is: addresses, which
// routes then name, name servers and the domains that they are for (RFC 8598), and
// networks. It comes by itself, reaches the hook and dns_file, and goes by itself.
func TestTunVirtualIP(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	b.Sh("ip addr add 10.2.0.1/24 dev lo; ip addr add 2001:db8:2::1/64 dev lo nodad")
	a.Do("./missiu -i eth0 -l missiu.log startTun")
	b.StartMissiu()
	b.Do("ip route add 10.9.0.0/24 dev tap0 src 10.2.0.1; ip route add 2001:db8:9::/64 dev tap0 src 2001:db8:2::1")
	a.LoadConfig("{ laddr 0.0.0.0/0 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 sa init }\n" +
		"{ laddr ::/0 raddr 2001:db8:2::/64 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 sa init }\n")
	b.LoadConfig("{ laddr 10.2.0.0/24 raddr 0.0.0.0/0 } ipsec { encr_algs gcm tladdr 192.168.3.119 traddr any }\n" +
		"{ laddr 2001:db8:2::/64 raddr ::/0 } ipsec { encr_algs gcm tladdr 192.168.3.119 traddr any }\n")
	b.WriteFile("/etc/missiu/ike.conf", `pool "v4" { addr 10.9.0.7-10.9.0.9 dns 10.2.0.53 domain corp.example.com domain lab.example.com subnet 10.2.0.0/24 }
pool "v6" { addr 2001:db8:9::7-2001:db8:9::9 dns 2001:db8:2::53 subnet 2001:db8:2::/64 }
rule "gate" { auth_method preshared remote_addr any pool "v4" pool "v6" }
`, 0o644)
	b.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"gate\" key %q }\n", lab.PSK), 0o600)
	b.StartIKEWith("./ike")
	a.WriteFile("/run/hook", "#!/bin/sh\nenv | grep ^IKE_ >/run/hook.$1.new; mv /run/hook.$1.new /run/hook.$1\n", 0o755)
	ruleIKE(a, "", "request_addr both dns_file \"/run/missiu/dns\" hook \"/run/hook\"", lab.PSK)

	for _, to := range []string{"10.2.0.1", "2001:db8:2::1"} {
		lab.Until(t, 20*time.Second, "traffic to "+to, func() (bool, string) {
			return a.Ping(1, "-W", "1", to) == 1, a.IKE.Output() + a.Run("ip", "addr").Out
		})
	}
	for _, tt := range []struct{ to, route, back string }{{"10.2.0.1", "tun0 10.9.0.7", "10.9.0.7"}, {"2001:db8:2::1", "tun0 2001:db8:9::7", "2001:db8:9::7"}} {
		if got := routeTo(a.Host, tt.to); got != tt.route {
			t.Errorf("route to %s: %s, want %s", tt.to, got, tt.route)
		}
		if got := b.Ping(3, tt.back); got != 3 {
			t.Errorf("%d of 3 pings to %s answered", got, tt.back)
		}
	}
	has := func(what, text string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s: want %q\n%s", what, w, text)
			}
		}
	}
	has("dns_file", a.Must("cat", "/run/missiu/dns"), "\nnameserver 10.2.0.53\n", "\nnameserver 2001:db8:2::53\n", "\nsearch corp.example.com lab.example.com\n")
	ran := func(verb string) string {
		lab.Until(t, 10*time.Second, "the hook", func() (bool, string) {
			r := a.Run("test", "-e", "/run/hook."+verb)
			return r.Code == 0, a.IKE.Output()
		})
		return a.Must("cat", "/run/hook."+verb)
	}
	told := []string{"IKE_ADDR4=10.9.0.7\n", "IKE_ADDR6=2001:db8:9::7\n", "IKE_DNS=10.2.0.53 2001:db8:2::53\n", "IKE_DOMAINS=corp.example.com lab.example.com\n", "IKE_SUBNETS=10.2.0.0/24 2001:db8:2::/64\n"}
	has("hook up", ran("up"), told...)
	a.Do("./ike down peer")
	has("hook down", ran("down"), told...)
	lab.Until(t, 10*time.Second, "the addresses to go", func() (bool, string) {
		got := a.Must("ip", "-o", "addr", "show", "dev", "tun0")
		return !strings.Contains(got, "10.9.0.7") && !strings.Contains(got, "2001:db8:9::7") && a.Run("test", "-e", "/run/missiu/dns").Code != 0, got
	})
}
