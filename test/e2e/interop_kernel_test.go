package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// missiu and ike against strongSwan on a Linux kernel of its own: native ESP,
// transport mode and extended sequence numbers, which strongSwan's user-mode ESP
// does not have.
func TestInteropKernel(t *testing.T) {
	lab.NeedRoot(t)
	if !lab.HaveUML() {
		t.Skip("package user-mode-linux is not installed")
	}
	h := lab.NewHost(t, "a")
	const comp = "192.168.3.120" // of Linux too, for the rule with IPComp
	l := lab.BootLinux(h, "eth0", umlIts+"/24", comp+"/24", "fd00:3::119/64", "10.2.0.1/32", "fd00:2::1/128")
	for _, addr := range []string{umlOur + "/24", "fd00:3::118/64"} {
		h.Must("ip", "addr", "add", addr, "dev", "eth0")
	}
	h.Must("ip", "addr", "add", "10.1.0.1/32", "dev", "lo")
	h.Must("ip", "addr", "add", "fd00:1::1/128", "dev", "lo")
	l.Sh("ip route add 10.1.0.0/24 via " + umlOur + " src 10.2.0.1; ip -6 route add fd00:1::/64 via fd00:3::118 src fd00:2::1")
	n := lab.NewNode(h, "eth0", netip.MustParseAddr(umlOur), netip.MustParseAddr(umlIts))
	n.StartMissiu()
	// Tunnels with TFC padding, which Linux has to take off.
	n.WriteFile("/etc/missiu/ike.conf", "rule \"c\" { auth_method preshared remote_addr "+comp+" childsa_ipcomp deflate }\nrule \"k\" { auth_method preshared remote_addr any childsa_tfc mtu }\n", 0o644)
	n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"c\" key %q }\n{ label \"k\" key %[1]q }\n", lab.PSK), 0o600)
	n.IKE = n.Start("bash", "-c", "cd bin && exec ./ike 192.168.3.118 fd00:3::118")
	n.IKE.Says("ready", 20*time.Second)
	l.Sh(umlNeighbours)
	l.Sh(`cd /usr/lib/uml/modules/$(uname -r)/kernel
		for m in crypto/xcbc crypto/ctr crypto/ccm crypto/gcm crypto/deflate net/xfrm/xfrm_ipcomp net/ipv4/ipcomp; do
			insmod $m.ko 2>&1 || grep -q "^$(basename $m | tr - _) " /proc/modules || true
		done`)
	l.Sh(`mkdir -p /run/swanctl
cat >/run/strongswan.conf <<X
charon {
  load = random nonce aes sha1 sha2 hmac kdf gcm chapoly gmp curve25519 openssl kernel-netlink socket-default vici
  install_routes = no
  retransmit_timeout = 1.0
  filelog {
    charon {
      path = /run/lab/charon.log
      default = 1
      cfg = 2
      flush_line = yes
    }
  }
}
swanctl {
  load = random
}
X
export STRONGSWAN_CONF=/run/strongswan.conf
nohup /usr/lib/ipsec/charon >/run/lab/charon.out 2>&1 &
i=0
while ! [ -S /run/charon.vici ]; do sleep 0.1; i=$((i+1)); [ $i -lt 600 ]; done
`)
	strong := func(args string) lab.Result {
		return l.Run("export STRONGSWAN_CONF=/run/strongswan.conf SWANCTL_DIR=/run/swanctl; swanctl " + args)
	}
	const v4, v6 = "local_addrs = " + umlIts + "\nremote_addrs = " + umlOur, "local_addrs = fd00:3::119\nremote_addrs = fd00:3::118"
	const nets = "local_ts = 10.2.0.0/24\nremote_ts = 10.1.0.0/24\n"
	for _, c := range []struct {
		name, policy, conn, child, us, it, route string
	}{
		{"transport ESN", "{ raddr " + umlIts + " } ipsec { encr_algs aes encr_auth_algs sha1 }\n", v4, "mode = transport\nesp_proposals = aes256-sha1-esn", umlOur, umlIts, umlIts},
		{"transport ICMP", "{ raddr " + umlIts + " ulp icmp } ipsec { encr_algs aes encr_auth_algs sha256 }\n", v4 + "\nmobike = yes", "mode = transport\nlocal_ts = dynamic[icmp]\nremote_ts = dynamic[icmp]", umlOur, umlIts, umlIts},
		{"transport in UDP", "{ raddr " + umlIts + " } ipsec { encr_algs gcm }\n", v4 + "\nencap = yes", "mode = transport", umlOur, umlIts, umlIts},
		{"tunnel ESN PFS", "{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr " + umlOur + " traddr " + umlIts + " }\n", v4, nets + "esp_proposals = aes256gcm16-x25519-esn", "10.1.0.1", "10.2.0.1", "10.2.0.0/24"},
		{"tunnel IPv6 in IPv4", "{ laddr fd00:1::/64 raddr fd00:2::/64 } ipsec { encr_algs chacha20-poly1305 tladdr " + umlOur + " traddr " + umlIts + " }\n", v4, "local_ts = fd00:2::/64\nremote_ts = fd00:1::/64\nesp_proposals = chacha20poly1305", "fd00:1::1", "fd00:2::1", "fd00:2::/64"},
		{"tunnel IPv4 in IPv6", "{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr fd00:3::118 traddr fd00:3::119 }\n", v6, nets, "10.1.0.1", "10.2.0.1", "10.2.0.0/24"},
		{"AH transport ESN", "{ raddr " + umlIts + " } ipsec { auth_algs sha256 }\n", v4, "mode = transport\nah_proposals = sha256-esn", umlOur, umlIts, umlIts},
		{"AH tunnel PFS", "{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { auth_algs sha1 tladdr " + umlOur + " traddr " + umlIts + " }\n", v4, nets + "ah_proposals = sha1-x25519", "10.1.0.1", "10.2.0.1", "10.2.0.0/24"},
		{"AH tunnel IPv6", "{ laddr fd00:1::/64 raddr fd00:2::/64 } ipsec { auth_algs sha512 tladdr fd00:3::118 traddr fd00:3::119 }\n", v6, "local_ts = fd00:2::/64\nremote_ts = fd00:1::/64\nah_proposals = sha512", "fd00:1::1", "fd00:2::1", "fd00:2::/64"},
		{"AH AES-XCBC", "{ raddr " + umlIts + " } ipsec { auth_algs aes-xcbc }\n", v4, "mode = transport\nah_proposals = aesxcbc", umlOur, umlIts, umlIts},
		{"AH or ESP, they have ESP", "{ raddr " + umlIts + " } ipsec { auth_algs sha256 } or ipsec { encr_algs gcm }\n", v4, "mode = transport\nesp_proposals = aes256gcm16", umlOur, umlIts, umlIts},
		{"ESP or AH, they have AH", "{ raddr " + umlIts + " } ipsec { encr_algs gcm } or ipsec { auth_algs sha384 }\n", v4, "mode = transport\nah_proposals = sha384", umlOur, umlIts, umlIts},
		{"AES-CTR", "{ raddr " + umlIts + " } ipsec { encr_algs ctr(128) encr_auth_algs sha256 }\n", v4, "mode = transport\nesp_proposals = aes128ctr-sha256", umlOur, umlIts, umlIts},
		{"AES-CTR 256", "{ raddr " + umlIts + " } ipsec { encr_algs ctr(256) encr_auth_algs sha1 }\n", v4, "mode = transport\nesp_proposals = aes256ctr-sha1", umlOur, umlIts, umlIts},
		{"AES-CCM-16", "{ raddr " + umlIts + " } ipsec { encr_algs ccm }\n", v4, "mode = transport\nesp_proposals = aes128ccm16", umlOur, umlIts, umlIts},
		{"AES-CCM-8", "{ raddr " + umlIts + " } ipsec { encr_algs aes-ccm-8 }\n", v4, "mode = transport\nesp_proposals = aes256ccm8", umlOur, umlIts, umlIts},
		{"AES-GMAC", "{ raddr " + umlIts + " } ipsec { encr_algs gmac }\n", v4, "mode = transport\nesp_proposals = aes128gmac", umlOur, umlIts, umlIts},
		{"IPComp", "{ raddr " + comp + " } ipsec { encr_algs gcm }\n", "local_addrs = " + comp + "\nremote_addrs = " + umlOur, "mode = transport\nipcomp = yes", umlOur, comp, comp},
		{"IPComp tunnel", "{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr " + umlOur + " traddr " + comp + " }\n", "local_addrs = " + comp + "\nremote_addrs = " + umlOur, nets + "ipcomp = yes", "10.1.0.1", "10.2.0.1", "10.2.0.0/24"},
		{"IPComp in AH", "{ raddr " + comp + " } ipsec { auth_algs sha256 }\n", "local_addrs = " + comp + "\nremote_addrs = " + umlOur, "mode = transport\nah_proposals = sha256\nipcomp = yes", umlOur, comp, comp},
		{"IPComp by PF_KEY", "", v4, nets + "ipcomp = yes", "10.1.0.1", "10.2.0.1", "10.2.0.0/24"},
		{"they want a tunnel", "{ raddr " + umlIts + " } ipsec { encr_algs gcm }\n", v4, "mode = tunnel", umlOur, umlIts, ""},
	} {
		for _, we := range []bool{true, false} {
			t.Run(c.name+map[bool]string{true: ", initiator", false: ", responder"}[we], func(t *testing.T) {
				l.Sh("cat >/run/swanctl/swanctl.conf <<X\nconnections {\nt {\nversion = 2\n" + c.conn + "\nlocal {\nauth = psk\n}\nremote {\nauth = psk\n}\nchildren {\nt {\n" + c.child +
					"\n}\n}\n}\n}\nsecrets {\nike-t {\nsecret = \"" + lab.PSK + "\"\n}\n}\nX\n")
				if r := strong("--load-all"); r.Code != 0 {
					t.Fatalf("%v", r)
				}
				n.Do("./loadConfig -F")
				if c.policy != "" {
					n.LoadConfig(c.policy)
				} else { // IPComp tunnel in ESP, as PF_KEY clients make it
					n.Do("./loadConfig -FP")
					us, it := netip.MustParsePrefix(net4.ourNet), netip.MustParsePrefix(net4.itsNet)
					xs := []xform{compOf("tunnel"), espOf("transport")}
					xformPolicy(2, us, it, n.Addr, n.Peer, xs).give(t, n)
					xformPolicy(1, it, us, n.Peer, n.Addr, xs).give(t, n)
				}
				family, refused := "-4", c.route == ""
				if strings.Contains(c.route, ":") {
					family = "-6"
				}
				route := c.route
				if refused {
					route = c.it
				}
				n.Must("ip", family, "route", "replace", route, "dev", n.TAP(), "src", c.us)
				mark := len(n.IKE.Output())
				defer func() {
					n.Must("ip", family, "route", "del", route, "dev", n.TAP())
					strong("--terminate --ike t --timeout 5")
					lab.Until(t, 10*time.Second, "SAs to go", func() (bool, string) { return len(n.SAs()) == 0, fmt.Sprint(n.SAs()) })
				}()
				if !we {
					if r := strong("--initiate --child t --timeout 10"); (r.Code != 0) != refused {
						t.Errorf("%v", r)
					}
				}
				if refused {
					if r := n.Run("ping", "-n", "-q", "-c", "1", "-W", "1", c.it); r.Code == 0 {
						t.Errorf("ping answered")
					}
					if out := n.IKE.Output()[mark:]; !strings.Contains(out, "peer answers in tunnel mode, policy wants transport") {
						t.Errorf("no reason told: %s", out)
					}
					return
				}
				padded := n.Status().Counters["out_padded"]
				if got := n.Ping(5, c.it); got != 5 {
					t.Errorf("%d of 5 pings answered by Linux\n%s", got, l.Run("tail -30 /run/lab/charon.log; ip xfrm state").Out)
				}
				if r := l.Run(strings.Join(lab.PingArgs(5, 0, 10*time.Second, "-I", c.it, c.us), " ")); lab.Answered(r.Out, 5) != 5 {
					t.Errorf("Linux: %v", r)
				}
				if esn := strings.Contains(l.Sh("ip xfrm state"), "esn"); esn != strings.Contains(c.child, "esn") {
					t.Errorf("extended sequence numbers: %v", esn)
				}
				want := 0
				if strings.HasPrefix(c.name, "tunnel") {
					want = 10
				}
				if got := n.Status().Counters["out_padded"] - padded; got < want || want == 0 && got != 0 {
					t.Errorf("%d packets with TFC padding, want %d", got, want)
				}
				if strings.HasPrefix(c.name, "IPComp") {
					was := n.Status().Counters
					if r := n.Run("ping", "-n", "-q", "-c", "5", "-i", "0.05", "-w", "20", "-s", "1000", "-p", "00", c.it); !strings.Contains(r.Out, " 0% packet loss") {
						t.Errorf("pings that compress: %v\n%s", r, l.Run("tail -30 /run/lab/charon.log; ip -s xfrm state; ip xfrm policy; cat /proc/net/xfrm_stat").Out)
					}
					for _, k := range []string{"out_compressed", "in_expanded"} {
						if got := n.Status().Counters[k] - was[k]; got < 5 {
							t.Errorf("%s: %d, want 5", k, got)
						}
					}
				}
				if d := n.Status().Drops(); d != 0 {
					t.Errorf("we dropped %d: %v", d, n.Status().Counters)
				}
			})
		}
	}
}
