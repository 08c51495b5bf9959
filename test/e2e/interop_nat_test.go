package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// a (10.1.0.0/24) -- n, a NAT for all that is behind a -- b (10.2.0.0/24).
func newNAT(t *testing.T, weAreInside bool) (d *duo, n *lab.Host) {
	t.Helper()
	lab.NeedRoot(t)
	a, n, b := lab.NewHost(t, "a"), lab.NewHost(t, "n"), lab.NewHost(t, "b")
	lab.Link(t, a, n, "eth0", prefixes("192.168.3.118/24"), prefixes("192.168.3.1/24"))
	lab.Link(t, n, b, "eth1", prefixes("192.168.4.1/24"), prefixes("192.168.4.119/24"))
	n.Sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
	a.Must("ip", "route", "add", "default", "via", "192.168.3.1")
	a.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
	b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
	inside, outside := netip.MustParseAddr("192.168.3.118"), netip.MustParseAddr("192.168.4.119")
	if weAreInside {
		d = &duo{t: t, a: lab.NewNode(a, "eth0", inside, outside), b: b}
	} else {
		d = &duo{t: t, a: lab.NewNode(b, "eth1", outside, inside), b: a}
	}
	natPorts(n, 20000)
	d.startCharon("  keep_alive = 2s")
	d.a.StartMissiu()
	return d, n
}

// natPorts has the NAT forget what it knows and give out ports from here.
func natPorts(n *lab.Host, from int) {
	n.Sh(fmt.Sprintf(`nft -f - <<X
table ip nat {
}
delete table ip nat
table ip nat {
	chain post {
		type nat hook postrouting priority srcnat
		oifname eth1 ip protocol udp masquerade to :%d-%d
	}
}
X
conntrack -F 2>&1`, from, from+9))
}

// The NAT in front of either side, and what follows when it gives another port.
func TestInteropNAT(t *testing.T) {
	for _, weAreInside := range []bool{true, false} {
		t.Run(map[bool]string{true: "we are inside", false: "they are inside"}[weAreInside], func(t *testing.T) {
			d, n := newNAT(t, weAreInside)
			ours, theirs, charon := "10.1.0", "10.2.0", "local_addrs = 192.168.4.119\nremote_addrs = %any\nlocal {\nauth = psk\nid = 192.168.4.119\n}\nremote {\nauth = psk\nid = 192.168.3.118\n}"
			conf, ends := "remote_addr 192.168.4.119 dpd_secs 2 nat_keepalive_secs 1", "tladdr 192.168.3.118 traddr 192.168.4.119"
			if !weAreInside {
				ours, theirs, charon = theirs, ours, "local_addrs = 192.168.3.118\nremote_addrs = 192.168.4.119\nlocal {\nauth = psk\nid = 192.168.3.118\n}\nremote {\nauth = psk\nid = 192.168.4.119\n}"
				conf, ends = "remote_addr any remote_id IP=192.168.3.118", "tladdr 192.168.4.119 traddr 192.168.4.1"
			}
			us, them := ours+".1", theirs+".1"
			d.startIKE("rule \"t\" { auth_method preshared "+conf+" }\n", lab.PSK)
			d.policies(fmt.Sprintf("{ laddr %s.0/24 raddr %s.0/24 } ipsec { encr_algs gcm %s }\n", ours, theirs, ends))
			d.a.Do(fmt.Sprintf("ip route add %s.0/24 dev tap0 src %s", theirs, us))
			d.peer(charon, fmt.Sprintf("local_ts = %s.0/24\nremote_ts = %s.0/24", theirs, ours))
			if !weAreInside {
				d.up()
			}
			pings := func(what string) {
				t.Helper()
				if got := d.a.Ping(5, them); got != 5 {
					t.Errorf("%s: %d of 5 pings answered", what, got)
				}
				if got := d.b.Ping(5, "-I", them, us); got != 5 {
					t.Errorf("%s: %d of 5 pings of theirs answered", what, got)
				}
			}
			pings("at first")
			for _, what := range []string{"--ike", "--child"} {
				d.b.Must("swanctl", "--rekey", what, "t")
				pings("rekeyed by " + what)
			}
			for _, s := range d.a.Mature() {
				if s.Sport == 0 {
					t.Errorf("SA %+v is not in UDP", s)
				}
			}
			if weAreInside { // we are the ones who keep the mapping
				c := d.a.Capture("eth0")
				lab.Until(t, 10*time.Second, "keepalives", func() (bool, string) {
					got := lab.Count(c.Packets())
					return got[lab.Keepalive] >= 2, fmt.Sprint(got)
				})
				c.Stop()
			}
			natPorts(n, 30000)
			lab.Until(t, 15*time.Second, "traffic through the new port", func() (bool, string) {
				return d.b.Ping(2, "-I", them, us) == 2 && d.a.Ping(2, them) == 2, d.a.IKE.Output()
			})
			pings("with another port")
		})
	}
}
