package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/test/e2e/lab"
)

// gateway starts missiu and ike on n, for a tunnel between the networks 10.1.0.0/24
// and 10.2.0.0/24 with the other host; rule is what stands in the only rule.
func gateway(n *lab.Node, own, ca *credtest.Cert, rule string) {
	n.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
	n.WriteFile("/etc/missiu/ca.pem", string(credtest.PEM(ca)), 0o644)
	n.WriteFile("/etc/missiu/own.pem", string(credtest.PEM(own)), 0o644)
	n.WriteFile("/etc/missiu/own.key", string(credtest.KeyPEM(own.Key)), 0o600)
	n.WriteFile("/etc/missiu/ike.conf", `rule "t" { remote_addr 192.168.3.119 `+rule+" }\n", 0o644)
	n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"t\" key %q }\n", lab.PSK), 0o600)
	n.StartMissiu()
	n.Do("ip route add 10.2.0.0/24 dev tap0 src 10.1.0.1")
	n.LoadConfig("{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs aes encr_auth_algs sha512 tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
	n.StartIKEWith("./ike")
}

// ends of the two sides, below one CA.
func ends(kind string) (ca, ours, theirs *credtest.Cert) {
	ca = credtest.CA("CA", credtest.Key("rsa2048", 2))
	return ca, ca.Issue("a", credtest.Key(kind, 0), credtest.Names("a.example.com")), ca.Issue("b", credtest.Key(kind, 1), credtest.Names("b.example.com"))
}

const certWords = `auth_method cert cert_file "own.pem" key_file "own.key" ca_file "ca.pem" local_id a.example.com remote_id b.example.com`

// Libreswan as Debian ships it, in both roles, as far as the IKE SA: its child SAs
// need a kernel with IPsec.
func TestLibreswan(t *testing.T) {
	lab.NeedRoot(t)
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(cache, "missiu-libreswan")
	haveProgram(t, root+"/usr/libexec/ipsec/pluto", "libreswan (scripts/setup)")
	for _, tt := range []struct{ name, kind, rule, authby, more, says string }{
		{"PSK", "rsa2048", "auth_method preshared local_id a.example.com remote_id b.example.com", "secret", "", "authenticated peer using authby=secret"},
		{"RSA", "rsa2048", certWords, "rsasig", "leftcert=own\n  leftsendcert=always\n  rightca=%same", "'2048-bit RSASSA-PSS with SHA2_256' digital signature"},
		{"ECDSA", "p384", certWords, "ecdsa", "leftcert=own\n  leftsendcert=always\n  rightca=%same", "ECDSA with SHA2_384' digital signature"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := lab.Pair(t)
			ca, ours, theirs := ends(tt.kind)
			gateway(a, ours, ca, tt.rule)
			b.WriteFile("/etc/ipsec.conf", `config setup
conn t
  ikev2=insist
  authby=`+tt.authby+`
  left=192.168.3.119
  right=192.168.3.118
  leftid=@b.example.com
  rightid=@a.example.com
  leftsubnet=10.2.0.0/24
  rightsubnet=10.1.0.0/24
  esp=aes-sha2_512
  failureshunt=none
  auto=ignore
  `+tt.more+"\n", 0o644)
			b.WriteFile("/etc/ipsec.secrets", fmt.Sprintf("@a.example.com @b.example.com : PSK %q\n", lab.PSK), 0o600)
			b.WriteFile("own.pem", string(credtest.PEM(theirs))+string(credtest.KeyPEM(theirs.Key)), 0o600)
			b.WriteFile("ca.pem", string(credtest.PEM(ca)), 0o644)
			b.Sh("mount --bind " + root + `/usr/libexec /usr/libexec
mkdir -p /etc/ipsec.d /run/pluto
certutil -N -d sql:/etc/ipsec.d --empty-password
certutil -A -n ca -t CT,, -d sql:/etc/ipsec.d -i ca.pem
openssl pkcs12 -export -in own.pem -name own -out own.p12 -passout pass:x
pk12util -i own.p12 -d sql:/etc/ipsec.d -W x`)
			pluto := b.Start("/usr/libexec/ipsec/pluto", "--nofork", "--stderrlog", "--config", "/etc/ipsec.conf", "--nssdir", "/etc/ipsec.d",
				"--rundir", "/run/pluto", "--secretsfile", "/etc/ipsec.secrets", "--no-dnssec")
			whack := func(args ...string) lab.Result {
				return b.Run(append([]string{"/usr/libexec/ipsec/whack"}, args...)...)
			}
			lab.Until(t, 20*time.Second, "pluto to run", func() (bool, string) { return whack("--status").Code == 0, pluto.Output() })
			whack("--listen")
			// Its child SA fails, and the IKE SA with it, so it is first the responder: what
			// we have then does not keep it from beginning anew.
			for _, role := range []string{"responder", "initiator"} {
				if r := b.Run("/usr/libexec/ipsec/addconn", "--config", "/etc/ipsec.conf", "--ctlsocket", "/run/pluto/pluto.ctl", "t"); r.Code != 0 {
					t.Fatalf("%v", r)
				}
				var r lab.Result
				if role == "initiator" {
					r = whack("--initiate", "--asynchronous", "--name", "t")
				} else {
					a.Run("ping", "-n", "-q", "-c", "1", "-W", "1", "10.2.0.1")
				}
				lab.Until(t, 20*time.Second, "pluto's IKE SA as "+role, func() (bool, string) {
					out := pluto.Output()
					i := strings.Index(out, role+" established IKE SA")
					return i >= 0 && strings.Contains(out[i:], tt.says), r.String() + out
				})
				lab.Until(t, 10*time.Second, "our IKE SA", func() (bool, string) {
					out := a.IKE.Output()
					return strings.Contains(out, fmt.Sprintf(`"initiator": %v`, role == "responder")) && strings.Contains(out, `"id": "b.example.com"`), out
				})
				whack("--name", "t", "--delete")
			}
		})
	}
}

// OpenIKED as Debian ships it, on a missiu of its own, with certificates: the whole
// way to the traffic, in both roles.
func TestOpenIKEDCertificates(t *testing.T) {
	lab.NeedRoot(t)
	haveProgram(t, "/usr/sbin/iked", "openiked")
	so := preload(t)
	for _, tt := range []struct {
		name, kind, rule, auth string
		weStart                bool
	}{
		{"RSA, they initiate", "rsa2048", certWords, "", false},
		{"RSA, we initiate", "rsa2048", certWords, "", true},
		{"ECDSA, the old method", "p256", certWords, "ecdsa256", true},
		{"PSK", "p256", "auth_method preshared local_id a.example.com remote_id b.example.com", fmt.Sprintf("psk %q", lab.PSK), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := lab.Pair(t)
			ca, ours, theirs := ends(tt.kind)
			gateway(a, ours, ca, tt.rule)
			b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
			b.StartMissiu()
			b.Do("ip route add 10.1.0.0/24 dev tap0 src 10.2.0.1")
			for _, d := range []string{"ca", "certs", "crls", "private", "pubkeys/fqdn"} {
				b.Sh("mkdir -p /etc/iked/" + d)
			}
			b.WriteFile("/etc/iked/ca/ca.crt", string(credtest.PEM(ca)), 0o644)
			b.WriteFile("/etc/iked/certs/own.crt", string(credtest.PEM(theirs)), 0o644)
			b.WriteFile("/etc/iked/private/local.key", string(credtest.KeyPEM(theirs.Key)), 0o600)
			mode := "active"
			if tt.weStart {
				mode = "passive"
			}
			b.WriteFile("iked.conf", fmt.Sprintf("ikev2 \"t\" %s esp from 10.2.0.0/24 to 10.1.0.0/24 local %v peer %v childsa enc aes-256 auth hmac-sha2-512 srcid b.example.com dstid a.example.com %s\n", mode, b.Addr, a.Addr, tt.auth), 0o600)
			iked := b.Start("env", "LD_PRELOAD="+so, "/usr/sbin/iked", "-d", "-vv", "-T", "-f", "iked.conf")
			lab.Until(t, 20*time.Second, "OpenIKED to listen", func() (bool, string) {
				// Its CA process reads the files meanwhile; before, it refuses everybody.
				return strings.Contains(b.Must("ss", "-Hlnu"), ":500") && strings.Contains(iked.Output(), "ca_reload: loaded cert file"), iked.Output()
			})
			if !tt.weStart {
				lab.Until(t, 30*time.Second, "SAs", func() (bool, string) { return len(a.Mature()) >= 2, a.IKE.Output() + iked.Output() })
			}
			// It installs its SAs after ours are there.
			lab.Until(t, 20*time.Second, "the first answer", func() (bool, string) { return a.Ping(1, "-W", "2", "10.2.0.1") == 1, a.IKE.Output() + iked.Output() })
			if got := a.Ping(5, "10.2.0.1"); got != 5 {
				t.Errorf("ping: %d of 5\n%s", got, iked.Output())
			}
			if got := b.Ping(5, "-I", "10.2.0.1", "10.1.0.1"); got != 5 {
				t.Errorf("ping back: %d of 5", got)
			}
		})
	}
}
