package e2e

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/test/e2e/lab"
)

// certs gives charon a certificate, key and CA, and us ours; conf are further
// words of our rule. The chains are leaf first; cas are what each side trusts.
type certs struct {
	ours, theirs    []*credtest.Cert
	weTrust, theyDo *credtest.Cert
	conf, conn      string
	crl             []byte // ours
}

// credentials puts them in place; our ike reads its files again.
func (d *duo) credentials(c certs) {
	d.t.Helper()
	d.b.Sh("rm -rf /etc/swanctl/x509 /etc/swanctl/x509ca /etc/swanctl/private; mkdir -p /etc/swanctl/x509 /etc/swanctl/x509ca /etc/swanctl/private")
	d.b.WriteFile("/etc/swanctl/x509ca/ca.pem", string(credtest.PEM(c.theyDo)), 0o644)
	for i, x := range c.theirs[1:] {
		d.b.WriteFile(fmt.Sprintf("/etc/swanctl/x509ca/sub%d.pem", i), string(credtest.PEM(x)), 0o644)
	}
	d.b.WriteFile("/etc/swanctl/x509/own.pem", string(credtest.PEM(c.theirs[0])), 0o644)
	d.b.WriteFile("/etc/swanctl/private/own.pem", string(credtest.KeyPEM(c.theirs[0].Key)), 0o600)
	d.b.Must("swanctl", "--load-creds", "--clear")
	d.peer("local {\nauth = pubkey\ncerts = own.pem\nid = b.example.com\n}\nremote {\nauth = pubkey\nid = a.example.com\n}\n"+c.conn, "")

	d.a.WriteFile("/etc/missiu/ca.pem", string(credtest.PEM(c.weTrust)), 0o644)
	d.a.WriteFile("/etc/missiu/own.pem", string(credtest.PEM(c.ours...)), 0o644)
	d.a.WriteFile("/etc/missiu/own.key", string(credtest.KeyPEM(c.ours[0].Key)), 0o600)
	if c.crl != nil {
		d.a.WriteFile("/etc/missiu/ca.crl", string(c.crl), 0o644)
		c.conf += ` crl_file "ca.crl"`
	}
	d.conf(`rule "t" { auth_method cert remote_addr 192.168.3.119 cert_file "own.pem" key_file "own.key" ca_file "ca.pem"
  local_id a.example.com remote_id b.example.com ` + c.conf + " }\n")
}

// RSA chains in fragments over a link that loses a fifth of the messages: either
// side begins, and both halves of the exchange arrive.
func TestInteropLossyCertificates(t *testing.T) {
	d := newDuo(t, "fragment_size = 576\n retransmit_tries = 20\n retransmit_limit = 1\n")
	key := func(kind string, n int) crypto.Signer { return credtest.Key(kind, n) }
	ra, rb := credtest.CA("Root A", key("rsa2048", 2)), credtest.CA("Root B", key("rsa2048", 3))
	sa, sb := ra.Sub("Sub A", key("rsa2048", 4)), rb.Sub("Sub B", key("rsa2048", 5))
	d.credentials(certs{
		ours:   []*credtest.Cert{sa.Issue("a", key("rsa2048", 0), credtest.Names("a.example.com")), sa},
		theirs: []*credtest.Cert{sb.Issue("b", key("rsa2048", 1), credtest.Names("b.example.com")), sb}, weTrust: rb, theyDo: ra,
		conf: "fragment_size 576 retry_timer_init 0.5 retry_timer_max 1 retry_limit 30 send_cert always",
		conn: "fragmentation = yes\nsend_cert = always\n",
	})
	lossy(d.b)
	for _, side := range []string{"ours", "charon's"} {
		mark := len(d.charon.Output())
		if side == "ours" {
			d.a.Do("./ike up t")
		} else if r := d.b.Run("swanctl", "--initiate", "--child", "t", "--timeout", "60"); r.Code != 0 {
			t.Fatalf("%v", r)
		}
		d.pings(side)
		log := d.charon.Output()[mark:]
		for _, w := range []string{"reassembled fragmented IKE message", "splitting IKE message", "of 'a.example.com' with RSA_EMSA_P"} {
			if !strings.Contains(log, w) {
				t.Errorf("%s: charon does not say %q:\n%s", side, w, log)
			}
		}
		d.b.Must("swanctl", "--terminate", "--ike", "t", "--timeout", "60")
		lab.Until(t, 30*time.Second, "no SAs", func() (bool, string) { l := d.a.SAs(); return len(l) == 0, fmt.Sprint(l) })
	}
}

// conf lets our ike read another configuration by HUP.
func (d *duo) conf(text string) {
	d.t.Helper()
	if d.a.IKE == nil {
		d.startIKE(text, lab.PSK)
		return
	}
	d.a.WriteFile("/etc/missiu/ike.conf", text, 0o644)
	mark := len(d.a.IKE.Output())
	d.a.IKE.Signal(syscall.SIGHUP)
	lab.Until(d.t, 10*time.Second, "the configuration to be read", func() (bool, string) {
		out := d.a.IKE.Output()[mark:]
		return strings.Contains(out, "configuration read again"), out
	})
}

// settings changes charon's, in words of strongswan.conf.
func (d *duo) settings(words string) {
	d.t.Helper()
	d.writeCharonConf(words)
	d.b.Must("swanctl", "--reload-settings")
}

// Certificates of every kind, from either side, and everything that can be wrong
// with one.
func TestInteropCertificates(t *testing.T) {
	d := newDuo(t, "")
	run := d.runner()
	key := func(kind string, n int) crypto.Signer { return credtest.Key(kind, n) }
	ca := credtest.CA("CA", key("rsa2048", 2))
	pair := func(ca *credtest.Cert, kind string) certs {
		return certs{
			ours:    []*credtest.Cert{ca.Issue("a", key(kind, 0), credtest.Names("a.example.com"))},
			theirs:  []*credtest.Cert{ca.Issue("b", key(kind, 1), credtest.Names("b.example.com"))},
			weTrust: ca, theyDo: ca,
		}
	}
	// signed checks by what charon says how each side has proven itself.
	signed := func(ours, theirs string) {
		d.t.Helper()
		out := d.charon.Output()
		for _, want := range []string{"of 'a.example.com' with " + ours + " successful", "of 'b.example.com' (myself) with " + theirs + " successful"} {
			if !strings.Contains(out, want) {
				d.t.Errorf("charon has no authentication %s", want)
			}
		}
	}
	for _, k := range []struct{ name, kind, conf, conn, scheme string }{
		{"RSA, PKCS #1", "rsa2048", "rsa_pss no", "", "RSA_EMSA_PKCS1_SHA2_256"},
		{"RSA, PSS", "rsa2048", "rsa_pss require sig_hash sha384", "local {\nauth = ike:rsa/pss-sha384\n}", "RSA_EMSA_PSS_SHA2_384_SALT_48"},
		{"ECDSA P-256", "p256", "local_auth_method ecdsa_sig remote_auth_method ecdsa_sig", "", "ECDSA_WITH_SHA256_DER"},
		{"ECDSA P-384", "p384", "", "", "ECDSA_WITH_SHA384_DER"},
		{"ECDSA P-521", "p521", "", "", "ECDSA_WITH_SHA512_DER"},
		{"Ed25519", "ed25519", "", "", "ED25519"},
	} {
		run(k.name, func() {
			c := pair(ca, k.kind)
			c.conf, c.conn = k.conf, k.conn
			d.credentials(c)
			d.both(k.name)
			signed(k.scheme, k.scheme)
		})
	}
	run("the old methods", func() {
		d.settings("signature_authentication = no")
		d.credentials(pair(ca, "p384"))
		d.both("ECDSA")
		signed("ECDSA-384 signature", "ECDSA-384 signature")
		c := pair(ca, "rsa2048")
		c.conf = "allow_weak yes sig_hash sha256, sha1"
		d.credentials(c)
		d.both("RSA with SHA-1")
		signed("RSA signature", "RSA signature")
		c.conf = ""
		d.credentials(c)
		d.refused([]string{"SHA-1, which sig_hash does not allow"}, []string{"RSA with SHA1: sig_hash allows"})
		d.settings("")
	})
	run("intermediate CAs, names of the subject", func() {
		ra, rb := credtest.CA("Root A", key("p256", 5)), credtest.CA("Root B", key("p384", 5))
		sa, sb := ra.Sub("Sub A", key("p256", 6)), rb.Sub("Sub B", key("p256", 7))
		c := certs{
			ours:   []*credtest.Cert{sa.Issue("a", key("p256", 0)), sa},
			theirs: []*credtest.Cert{sb.Issue("b", key("p256", 1)), sb}, weTrust: rb, theyDo: ra,
			conn: "local {\nid = \"C=CH, O=Example, CN=b\"\n}\nremote {\nid = \"C=CH, O=Example, CN=a\"\n}",
		}
		d.credentials(c)
		d.conf(`rule "t" { auth_method cert remote_addr 192.168.3.119 cert_file "own.pem" key_file "own.key" ca_file "ca.pem"
  remote_id "CN=*, O=example, C=CH" required_issuer "C=CH, O=Example, CN=Sub B" }` + "\n")
		d.both("chain")
	})
	run("a certificate here, a key there", func() {
		c := pair(ca, "p256")
		c.conn = fmt.Sprintf("remote {\nauth = psk\n}\n}\n}\nsecrets {\nike-u {\nid = a.example.com\nsecret = %q\n}\n}\nconnections {\nt {", lab.PSK)
		d.credentials(c)
		d.conf(`rule "t" { local_auth_method preshared remote_auth_method cert remote_addr 192.168.3.119 ca_file "ca.pem"
  local_id a.example.com remote_id b.example.com }` + "\n")
		d.both("mixed")
	})
	hour := time.Hour
	good := pair(ca, "p256")
	theirs := func(x *credtest.Cert) certs {
		c := good
		c.theirs = []*credtest.Cert{x}
		return c
	}
	other := credtest.CA("Other CA", key("p256", 8))
	for _, k := range []struct {
		name string
		c    certs
		want []string
	}{
		{"revoked", func() certs {
			c := good
			c.crl = ca.CRL(time.Now().Add(-hour), time.Now().Add(hour), nil, good.theirs[0])
			return c
		}(), []string{"AUTHENTICATION_FAILED", fmt.Sprintf("CN=b, serial %x, is revoked since", good.theirs[0].SerialNumber)}},
		{"expired", theirs(ca.Issue("b", key("p256", 1), credtest.Names("b.example.com"), credtest.Valid(time.Now().Add(-9*hour), time.Now().Add(-hour)))),
			[]string{"AUTHENTICATION_FAILED", "CN=b: expired "}},
		{"unknown CA", theirs(other.Issue("b", key("p256", 1), credtest.Names("b.example.com"))),
			[]string{"AUTHENTICATION_FAILED", "its issuer C=CH, O=Example, CN=Other CA is not a trusted CA"}},
		{"another's name", func() certs {
			c := theirs(ca.Issue("c", key("p256", 1), credtest.Names("c.example.com")))
			c.conn = "local {\nid = c.example.com\n}"
			return c
		}(), []string{"AUTHENTICATION_FAILED", "c.example.com", "[b.example.com]"}},
		{"key usage", theirs(ca.Issue("b", key("p256", 1), credtest.Names("b.example.com"), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })),
			[]string{"AUTHENTICATION_FAILED", "neither digitalSignature nor nonRepudiation"}},
	} {
		run(k.name, func() {
			d.credentials(k.c)
			d.refused(k.want)
		})
	}
	run("good again", func() {
		c := good
		c.crl = ca.CRL(time.Now().Add(-hour), time.Now().Add(hour), nil)
		c.conf = "revocation strict"
		d.credentials(c)
		d.up()
		d.pings("known good")
		// A new CRL takes the SA down.
		d.a.WriteFile("/etc/missiu/ca.crl", string(ca.CRL(time.Now().Add(-hour), time.Now().Add(hour), nil, c.theirs[0])), 0o644)
		d.a.IKE.Signal(syscall.SIGHUP)
		lab.Until(t, 10*time.Second, "the SAs to go", func() (bool, string) { return len(d.a.SAs()) == 0, fmt.Sprint(d.a.SAs()) })
	})
}
