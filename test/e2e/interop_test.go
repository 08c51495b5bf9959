package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// A duo is missiu and ike on a, charon on b, net to net: 10.1.0.0/24 behind a,
// 10.2.0.0/24 behind b. Its tests are about what the two say to each other;
// TestStrongSwan is about the traffic.
type duo struct {
	t      *testing.T
	a      *lab.Node
	b      *lab.Host
	charon *lab.Proc
	// secrets are further entries of charon's.
	secrets string
	plugins string // further ones of charon's
}

const charonPlugins = "random nonce pem pkcs1 pkcs8 x509 revocation constraints pubkey mgf1 aes sha1 sha2 hmac kdf gcm chapoly xcbc gmp curve25519 openssl kernel-libipsec kernel-netlink socket-default vici"

// newDuo makes the hosts; settings are charon's, in words of strongswan.conf,
// options missiu's.
func newDuo(t *testing.T, settings string, options ...string) *duo {
	t.Helper()
	return newDuoWith(t, "", func(*lab.Host) {}, settings, options...)
}

// newDuoWith is newDuo with further plugins, for which prepare does something to
// charon's host.
func newDuoWith(t *testing.T, plugins string, prepare func(b *lab.Host), settings string, options ...string) *duo {
	t.Helper()
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	d := &duo{t: t, a: a, b: b.Host, plugins: plugins}
	prepare(d.b)
	a.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
	d.b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
	d.startCharon(settings)
	a.StartMissiu(options...)
	d.route()
	d.policy("encr_algs gcm")
	return d
}

// writeCharonConf writes strongswan.conf.
func (d *duo) writeCharonConf(settings string) {
	d.t.Helper()
	d.b.WriteFile("/etc/strongswan.conf", "charon {\n load = "+charonPlugins+d.plugins+`
  retransmit_timeout = 0.5
  retransmit_tries = 2
  filelog {
    stderr {
      default = 1
      cfg = 2
      ike = 2
    }
  }
  syslog {
    daemon {
      default = -1
    }
    auth {
      default = -1
    }
  }
`+settings+"\n}\nswanctl {\n  load = random pem pkcs1 pkcs8 x509 openssl\n}\n", 0o644)
}

func (d *duo) startCharon(settings string) {
	d.t.Helper()
	d.writeCharonConf(settings)
	d.charon = d.b.Start("/usr/lib/ipsec/charon")
	lab.Until(d.t, 20*time.Second, "charon to listen", func() (bool, string) {
		return d.b.Run("test", "-S", "/run/charon.vici").Code == 0, d.charon.Output()
	})
}

// peer gives charon one connection "t" with one child "t"; conn and child are
// further settings, which replace the defaults.
func (d *duo) peer(conn, child string) {
	d.t.Helper()
	children := ""
	for key, value := range map[string]string{"local_ts": "10.2.0.0/24", "remote_ts": "10.1.0.0/24"} {
		if before, _, _ := strings.Cut(child, "}"); !strings.Contains(before, key) {
			children += key + " = " + value + "\n"
		}
	}
	children += child
	d.b.WriteFile("/etc/swanctl/swanctl.conf", fmt.Sprintf(`connections {
  t {
    version = 2
    encap = yes
    mobike = no
    local_addrs = 192.168.3.119
    remote_addrs = 192.168.3.118
    local {
      auth = psk
      id = 192.168.3.119
    }
    remote {
      auth = psk
      id = 192.168.3.118
    }
    children {
      t {
%s
      }
    }
    %s
  }
}
secrets {
  ike-t {
    secret = "%s"
  }
%s}
`, children, conn, lab.PSK, d.secrets), 0o600)
	d.load()
}

func (d *duo) load() {
	d.t.Helper()
	if out := d.b.Must("swanctl", "--load-all"); !strings.Contains(out, "successfully loaded") {
		d.t.Fatalf("swanctl: %s", out)
	}
}

// policy replaces our policy by one tunnel between the networks.
func (d *duo) policy(properties string) {
	d.t.Helper()
	d.policies(fmt.Sprintf("{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { %s tladdr 192.168.3.118 traddr 192.168.3.119 }\n", properties))
}

func (d *duo) policies(text string) {
	d.t.Helper()
	d.a.Do("./loadConfig -F")
	d.a.LoadConfig(text)
}

// route sends the network behind b through the TAP.
func (d *duo) route() { d.a.Do("ip route add 10.2.0.0/24 dev tap0 src 10.1.0.1") }

// initiate is charon's; it returns what swanctl says.
func (d *duo) initiate() lab.Result {
	d.t.Helper()
	return d.b.Run("swanctl", "--initiate", "--child", "t", "--timeout", "60")
}

// down ends the IKE SA from charon's side and waits until we have no SA left. One
// that is just being made, by a rekeying or so, has to end as well.
func (d *duo) down() {
	d.t.Helper()
	lab.Until(d.t, 10*time.Second, "the SAs to go", func() (bool, string) {
		d.b.Run("swanctl", "--terminate", "--ike", "t", "--timeout", "20")
		s := d.a.SAs()
		return len(s) == 0, fmt.Sprint(s)
	})
}

func (d *duo) pings(what string) {
	d.t.Helper()
	if got := d.a.Ping(3, "10.2.0.1"); got != 3 {
		d.t.Fatalf("%s: %d of 3 pings answered", what, got)
	}
	if got := d.b.Ping(3, "-I", "10.2.0.1", "10.1.0.1"); got != 3 {
		d.t.Fatalf("%s: %d of 3 pings of charon answered", what, got)
	}
}

// both brings the SAs up from either side, and has packets pass.
func (d *duo) both(what string) {
	d.t.Helper()
	d.up()
	d.pings(what + ", they initiate")
	d.down()
	d.pings(what + ", we initiate")
	d.down()
}

// runner runs subtests of d's test, to which d reports meanwhile.
func (d *duo) runner() func(name string, f func()) {
	t := d.t
	return func(name string, f func()) {
		t.Run(name, func(t *testing.T) {
			d.t = t
			f()
		})
	}
}

// Every cipher, PRF and key exchange method of our default offer that charon has,
// in both roles.
func TestInteropSuites(t *testing.T) {
	d := newDuo(t, "")
	d.a.StartIKE()
	type suite struct{ ike, esp, properties string }
	var suites []suite
	for _, ke := range []string{"x25519", "ecp256", "ecp384", "modp2048", "modp3072", "modp4096"} {
		suites = append(suites, suite{"aes128gcm16-prfsha256-" + ke, "aes128gcm16-" + ke, "encr_algs gcm"})
	}
	for _, c := range []string{
		"aes128gcm16-prfsha384", "aes256gcm16-prfsha512", "chacha20poly1305-prfsha256", "chacha20poly1305-prfsha384", "chacha20poly1305-prfsha512",
		"aes192-sha256-prfsha256", "aes256-sha384-prfsha384", "aes128-sha512-prfsha512", "aes256-sha256-prfsha512",
	} {
		suites = append(suites, suite{c + "-x25519", "aes256gcm16", "encr_algs gcm"})
	}
	for esp, p := range map[string]string{
		"aes128-sha1": "encr_algs aes(128) encr_auth_algs sha1", "aes192-sha256": "encr_algs aes(192) encr_auth_algs sha256",
		"aes256-sha384": "encr_algs aes(256) encr_auth_algs sha384", "aes256-sha512": "encr_algs aes encr_auth_algs sha512",
		"chacha20poly1305-ecp521":    "encr_algs chacha20-poly1305",
		"aes128gcm16-modp2048-noesn": "encr_algs gcm",
	} {
		suites = append(suites, suite{"aes256gcm16-prfsha384-ecp384", esp, p})
	}
	for _, s := range suites {
		for _, we := range []bool{true, false} {
			name := s.ike + " " + s.esp + map[bool]string{true: " initiator", false: " responder"}[we]
			t.Run(name, func(t *testing.T) {
				d.t = t
				d.peer("proposals = "+s.ike, "esp_proposals = "+s.esp)
				d.policy(s.properties)
				if !we {
					if r := d.initiate(); r.Code != 0 {
						t.Fatalf("%v", r)
					}
				}
				d.pings("at first")
				if r := d.b.Run("swanctl", "--rekey", "--child", "t"); r.Code != 0 {
					t.Fatalf("%v", r)
				}
				d.pings("child rekeyed")
				if r := d.b.Run("swanctl", "--rekey", "--ike", "t"); r.Code != 0 {
					t.Fatalf("%v", r)
				}
				d.pings("IKE SA rekeyed")
				d.down()
			})
		}
	}
}

// startIKE starts ike with an ike.conf and a secret for its rule "t".
func (d *duo) startIKE(conf, secret string) {
	d.t.Helper()
	if d.a.IKE != nil {
		d.a.KillIKE(5 * time.Second)
	}
	d.a.WriteFile("/etc/missiu/ike.conf", conf, 0o644)
	d.a.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"t\" key %q }\n", secret), 0o600)
	d.a.IKE = d.a.Start("bash", "-c", "cd bin && exec ./ike "+d.a.Addr.String())
	d.a.IKE.Says("ready", 20*time.Second)
}

// rule is startIKE with one rule for charon.
func (d *duo) rule(more string) {
	d.t.Helper()
	d.startIKE(`rule "t" { auth_method preshared remote_addr 192.168.3.119 `+more+" }\n", lab.PSK)
}

func (d *duo) up() {
	d.t.Helper()
	if r := d.initiate(); r.Code != 0 {
		d.t.Fatalf("%v", r)
	}
}

// refused has either side try and fail; each list stands together on a line of ike's log.
// A packet may come while ike is still about the one before, so it is sent again.
func (d *duo) refused(lines ...[]string) {
	d.t.Helper()
	mark := len(d.a.IKE.Output())
	if r := d.initiate(); r.Code == 0 {
		d.t.Errorf("charon succeeds: %v", r)
	}
	ping := func() {
		if r := d.a.Run("ping", "-n", "-q", "-c", "1", "-W", "1", "10.2.0.1"); r.Code == 0 {
			d.t.Errorf("ping answered")
		}
	}
	ping()
	for _, want := range lines {
		lab.Until(d.t, 5*time.Second, fmt.Sprintf("a line with %q", want), func() (bool, string) {
			out := d.a.IKE.Output()[mark:]
			for l := range strings.Lines(out) {
				has := true
				for _, w := range want {
					has = has && strings.Contains(l, w)
				}
				if has {
					return true, ""
				}
			}
			ping()
			return false, out
		})
	}
}

// What is negotiated besides algorithms, and how it fails.
func TestInteropNegotiation(t *testing.T) {
	d := newDuo(t, "")
	run := d.runner()
	d.rule("")
	run("another group", func() {
		d.peer("proposals = aes128gcm16-prfsha256-modp2048-ecp256-x25519", "esp_proposals = aes128gcm16-modp2048-x25519-ecp256")
		d.up()
		d.pings("at first")
		for _, what := range []string{"--child", "--ike"} {
			d.b.Must("swanctl", "--rekey", what, "t")
			d.pings("rekeyed by " + what)
		}
		d.down()
	})
	run("extensions of theirs", func() {
		d.peer("mobike = yes\nfragmentation = force\nchildless = allow\nsend_cert = always", "")
		d.both("extensions")
	})
	run("no common algorithm", func() {
		d.peer("proposals = aes256ctr-sha256-modp2048, camellia256-sha256-x25519", "")
		d.refused([]string{"NO_PROPOSAL_CHOSEN", "ours", "AES_GCM_16-256", "theirs", "CAMELLIA_CBC-256"}, []string{"refused", "NO_PROPOSAL_CHOSEN", "offered", "AES_GCM_16-256"})
		d.peer("", "esp_proposals = aes256-sha256")
		d.refused([]string{"NO_PROPOSAL_CHOSEN", "ours [ESP:AES_GCM_16-256", "theirs [ESP:AES_CBC-256"}, []string{"child SA refused", "NO_PROPOSAL_CHOSEN"})
		d.down()
	})
	run("selectors have nothing in common", func() {
		d.b.Must("ip", "addr", "add", "10.3.0.1/24", "dev", "lo")
		d.peer("", "local_ts = 10.3.0.0/24")
		d.refused([]string{"TS_UNACCEPTABLE", "10.3.0.0-10.3.0.255"}, []string{"peer says TS_UNACCEPTABLE", "10.2.0.0-10.2.0.255"})
		d.down()
	})
	// Each packet for what the peer leaves out must not bring an SA.
	run("narrowed away", func() {
		d.b.Must("ip", "addr", "add", "10.2.0.65/32", "dev", "lo")
		d.peer("", "local_ts = 10.2.0.64/28")
		if got := d.a.Silence(20, "10.2.0.1"); got != 0 {
			d.t.Errorf("%d pings answered", got)
		}
		if got := d.a.Ping(10, "10.2.0.65"); got != 10 {
			d.t.Errorf("%d of 10 pings answered", got)
		}
		if n := len(d.a.Mature()); n != 2 {
			d.t.Errorf("%d SAs, want 2", n)
		}
		d.down()
	})
	run("peer wants more", func() {
		d.peer("", "local_ts = 10.9.0.0/16,10.2.0.0/16\nremote_ts = 10.0.0.0/8,10.1.0.0/24")
		d.both("wider")
	})
	// Of two policies the second holds what the first does and more. Their SA is
	// for all of it; what we send of the first has its own, and what comes by
	// theirs is as good.
	run("overlapping policies", func() {
		d.b.Must("ip", "addr", "add", "10.2.0.129/32", "dev", "lo")
		d.policies("{ laddr 10.1.0.0/24 raddr 10.2.0.0/25 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n" +
			"{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
		d.peer("", "")
		before := d.a.Status().Counters["drop_in_policy"]
		d.up()
		for _, from := range []string{"10.2.0.129", "10.2.0.1"} {
			if got := d.b.Ping(3, "-I", from, "10.1.0.1"); got != 3 {
				d.t.Errorf("%d of 3 pings from %s answered", got, from)
			}
			if got := d.a.Ping(3, from); got != 3 {
				d.t.Errorf("%d of 3 pings to %s answered", got, from)
			}
		}
		if n := d.a.Status().Counters["drop_in_policy"]; n != before {
			d.t.Errorf("%d packets dropped by policy", n-before)
		}
		d.down()
		d.policy("encr_algs gcm")
	})
	run("padding against traffic analysis", func() {
		d.rule("childsa_tfc 600")
		d.peer("", "")
		d.both("padded")
		if n := d.a.Status().Counters["out_padded"]; n < 6 {
			d.t.Errorf("%d packets padded, want 6 and more", n)
		}
		d.rule("")
	})
	run("our protocol", func() {
		d.policies("{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 ulp icmp } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
		d.peer("", "")
		d.both("icmp")
		d.policy("encr_algs gcm")
	})
	run("PFS by a group that is not the IKE SA's", func() {
		d.peer("proposals = aes128gcm16-prfsha256-x25519", "esp_proposals = aes128gcm16-modp2048")
		d.up()
		d.b.Must("swanctl", "--terminate", "--child", "t")
		d.pings("by CREATE_CHILD_SA of ours")
		d.down()
	})
	run("our cookies", func() {
		d.startIKE("cookie_threshold 0\nrule \"t\" { auth_method preshared remote_addr 192.168.3.119 }\n", lab.PSK)
		d.peer("", "")
		d.up()
		d.pings("cookie")
		d.down()
	})
	for us, them := range map[string]string{
		"FQDN=gw.example.com": "gw.example.com", "EMAIL=u@example.com": "u@example.com", `KEYID="key one"`: "@#6b6579206f6e65", "10.9.9.9": "10.9.9.9",
	} {
		run("identity "+us, func() {
			d.rule("local_id " + us + " remote_id FQDN=peer.example.com")
			d.peer(fmt.Sprintf("remote {\nauth = psk\nid = \"%s\"\n}\nlocal {\nauth = psk\nid = peer.example.com\n}", them), "")
			d.both(us)
		})
	}
	run("wrong identity", func() {
		d.peer("", "")
		d.rule("remote_id other.example.com")
		d.refused([]string{"AUTHENTICATION_FAILED", "no rule for identity 192.168.3.119", "[other.example.com]"}, []string{"refused by the peer", "AUTHENTICATION_FAILED", "other.example.com"})
	})
	run("wrong secret", func() {
		d.startIKE("rule \"t\" { auth_method preshared remote_addr 192.168.3.119 }\n", "quite another secret")
		d.refused([]string{"AUTHENTICATION_FAILED", "not the same pre-shared key"}, []string{"refused by the peer", "AUTHENTICATION_FAILED"})
		if !strings.Contains(d.charon.Output(), "received AUTHENTICATION_FAILED") {
			t.Errorf("charon was not told")
		}
	})
}

// Whoever rekeys, and whatever dies, traffic goes on or comes back.
func TestInteropLife(t *testing.T) {
	d := newDuo(t, "")
	run := d.runner()
	gone := func(what string) {
		d.t.Helper()
		lab.Until(d.t, 20*time.Second, what, func() (bool, string) { return len(d.a.SAs()) == 0, fmt.Sprint(d.a.SAs()) })
	}
	// A slow key exchange keeps them from receiving on the new SA for a while.
	run("they rekey under traffic", func() {
		d.rule("")
		d.peer("rekey_time = 2s\nrand_time = 0\nover_time = 20s", "rekey_time = 1s\nrand_time = 0\nlife_time = 20s\nesp_proposals = aes128gcm16-modp4096")
		d.up()
		p := d.b.Start(lab.PingArgs(800, 5*time.Millisecond, 5*time.Second, "-I", "10.2.0.1", "10.1.0.1")...)
		r := d.a.Run(lab.PingArgs(800, 5*time.Millisecond, 5*time.Second, "10.2.0.1")...)
		p.Wait(30 * time.Second)
		for _, out := range []string{r.Out, p.Output()} {
			if got := lab.Answered(out, 800); got != 800 {
				d.t.Errorf("%d of 800 pings answered while they rekey", got)
			}
		}
		if n := strings.Count(d.a.IKE.Output(), "child SA established"); n < 3 {
			d.t.Errorf("%d child SAs, want at least 3", n)
		}
		d.down()
	})
	run("they die", func() {
		d.rule("dpd_secs 1 retry_limit 2 retry_timer_init 0.3")
		d.peer("", "")
		d.up()
		d.pings("before")
		d.charon.Signal(syscall.SIGKILL)
		gone("SAs of a dead peer to go")
		d.restart()
		d.pings("back")
		d.down()
	})
	run("they die and return at once", func() {
		d.up()
		d.pings("before")
		d.charon.Signal(syscall.SIGKILL)
		d.restart()
		d.up()
		d.pings("back")
		lab.Until(d.t, 10*time.Second, "the old SAs to go", func() (bool, string) { return len(d.a.SAs()) == 2, fmt.Sprint(d.a.SAs()) })
		d.down()
	})
	run("we are silent", func() {
		d.peer("dpd_delay = 1s", "")
		d.up()
		d.a.IKE.Signal(syscall.SIGKILL)
		d.a.IKE.Wait(5 * time.Second)
		d.a.IKE = nil
		lab.Until(d.t, 20*time.Second, "their SAs to go", func() (bool, string) {
			s := d.b.Must("swanctl", "--list-sas")
			return !strings.Contains(s, "ESTABLISHED"), s
		})
		d.rule("")
		// The new ike asks for what the dead one had.
		lab.Until(d.t, 20*time.Second, "new SAs", func() (bool, string) {
			s := d.b.Must("swanctl", "--list-sas")
			return strings.Contains(s, "INSTALLED") && len(d.a.SAs()) == 2, s
		})
		d.pings("we are back")
		d.b.Must("swanctl", "--terminate", "--ike", "t")
	})
	run("they close the child", func() {
		d.peer("", "")
		d.up()
		d.pings("before")
		d.b.Must("swanctl", "--terminate", "--child", "t")
		d.pings("again")
		d.down()
	})
	run("two children", func() {
		d.b.Must("ip", "addr", "add", "10.2.0.129/32", "dev", "lo")
		d.peer("", "local_ts = 10.2.0.0/25\n}\nu {\nlocal_ts = 10.2.0.128/25\nremote_ts = 10.1.0.0/24\nesp_proposals = aes256-sha256-modp2048")
		pol := func(raddr, alg string) string {
			return "{ laddr 10.1.0.0/24 raddr " + raddr + " } ipsec { " + alg + " tladdr 192.168.3.118 traddr 192.168.3.119 }\n"
		}
		d.policies(pol("10.2.0.0/25", "encr_algs gcm") + pol("10.2.0.128/25", "encr_algs aes encr_auth_algs sha256"))
		all := func(what string) {
			d.t.Helper()
			for _, at := range []string{"10.2.0.1", "10.2.0.129"} {
				if got := d.a.Ping(5, at); got != 5 {
					d.t.Errorf("%s: %d of 5 pings to %s answered", what, got, at)
				}
			}
			if n := len(d.a.Mature()); n != 4 {
				d.t.Errorf("%s: %d SAs, want 4", what, n)
			}
		}
		all("at first")
		d.b.Must("swanctl", "--rekey", "--ike", "t")
		d.b.Must("swanctl", "--terminate", "--child", "u")
		all("one closed")
		d.down()
	})
}

// restart starts charon again after its sudden death.
func (d *duo) restart() {
	d.t.Helper()
	d.charon.Wait(5 * time.Second)
	d.b.Run("rm", "-f", "/run/charon.vici", "/run/charon.pid")
	d.startCharon("")
	d.load()
}
