package pad

import (
	"crypto/x509"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/proto/ikev2"
)

func certRule(t *testing.T, label string, k cred.KeyType) *Rule {
	t.Helper()
	ca := credtest.CA("CA", credtest.Key("p256", 0))
	p := cred.Policy{Hashes: []ikev2.HashID{ikev2.HashSHA256}}
	own, err := cred.NewOwn([]*x509.Certificate{ca.Certificate}, ca.Key, p)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := cred.NewTrust(cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: p, Key: k})
	if err != nil {
		t.Fatal(err)
	}
	r := NewRule(label)
	r.Remote, r.RemoteIDs = Any(), Patterns{AnyID}
	r.LocalAuth, r.RemoteAuth, r.Own, r.Trust, r.LocalID = Cert, Cert, own, trust, fqdn("me.example")
	return r
}

func TestNamePatterns(t *testing.T) {
	name := func(s string) dn.Name {
		t.Helper()
		n, err := dn.ParseText(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	id := func(s string) ID {
		t.Helper()
		b, err := name(s).DER()
		if err != nil {
			t.Fatal(err)
		}
		return ID{ikev2.IDDERASN1DN, string(b)}
	}
	staff := DNPattern(name("C=US, O=Example Corp, OU=Staff, CN=*"))
	for _, tt := range []struct {
		p    Pattern
		id   ID
		want bool
	}{
		{staff, id("C=us, O=example  corp, OU=staff, CN=somebody"), true},
		{staff, id("CN=somebody, OU=Staff, O=Example Corp, C=US"), true},
		{staff, id("C=US, O=Example Corp, OU=Guests, CN=somebody"), false},
		{staff, fqdn("C=US, O=Example Corp, OU=Staff, CN=x"), false},
		{staff, ID{ikev2.IDDERASN1DN, "C=US, O=Example Corp, OU=Staff, CN=x"}, false},
		{Pattern{ID: id("CN=a, O=b")}, id("cn=A,o=B"), true},
		{Pattern{ID: id("CN=a, O=b")}, id("O=b, CN=a"), false}, // DER has one order
	} {
		if got := tt.p.Match(tt.id); got != tt.want {
			t.Errorf("%v matches %v: got %v, want %v", tt.p, tt.id, got, tt.want)
		}
	}
	if _, exact := staff.Exact(); exact {
		t.Error("a pattern is exact")
	}
	if got := (Pattern{Not: true, ID: staff.ID, DN: staff.DN}).String(); got != "!C=US, O=Example Corp, OU=Staff, CN=*" {
		t.Errorf("got %s", got)
	}
	if got := id("C=US, CN=x").String(); got != "C=US, CN=x" {
		t.Errorf("got %s", got)
	}
}

func TestAuthorizeByKey(t *testing.T) {
	ec, rsa, psk := certRule(t, "ec", cred.ECDSA), certRule(t, "rsa", cred.RSA), NewRule("psk")
	psk.Remote, psk.RemoteIDs, psk.PSK = Any(), Patterns{AnyID}, key()
	db, err := NewDB([]*Rule{ec, rsa, psk})
	if err != nil {
		t.Fatal(err)
	}
	suite := proposal.IKESuite{Cipher: proposal.Cipher{Encr: alg.EncrAESGCM16, Bits: 256}, PRF: alg.PRFHMACSHA256, KE: alg.KEX25519}
	for _, tt := range []struct {
		m    AuthMethod
		k    cred.KeyType
		want string
	}{{Cert, cred.ECDSA, "ec"}, {Cert, cred.RSA, "rsa"}, {Cert, 0, "ec"}, {Cert, cred.EdDSA, ""}, {Preshared, 0, "psk"}, {0, 0, ""}} {
		c := Claim{IDi: fqdn("x.example"), Method: tt.m, Key: tt.k, Suite: suite}
		got := ""
		if r := Authorize(db.Rules(), c); r != nil {
			got = r.Label
		} else if why := WhyNot(db.Rules(), c); tt.k == cred.EdDSA && !strings.Contains(why, `peer has an Ed25519 key; rule "ec" wants another`) {
			t.Errorf("why not: %s", why)
		}
		if got != tt.want {
			t.Errorf("%v %v: got %q, want %q", tt.m, tt.k, got, tt.want)
		}
	}
}

// What a rule with certificates lacks.
func TestCheckCert(t *testing.T) {
	for want, f := range map[string]func(*Rule){
		"no certificate, or no identity": func(r *Rule) { r.Own = nil },
		"no identity, of our own":        func(r *Rule) { r.LocalID = ID{} },
		"no trusted certificate":         func(r *Rule) { r.Trust = nil },
		"no key":                         func(r *Rule) { r.RemoteAuth = Preshared },
		"not supported":                  func(r *Rule) { r.LocalAuth = 3 },
	} {
		r := certRule(t, "r", 0)
		f(r)
		if _, err := NewDB([]*Rule{r}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if _, err := NewDB([]*Rule{certRule(t, "r", 0)}); err != nil {
		t.Error(err)
	}
}
