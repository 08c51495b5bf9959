package ikeconf

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/proto/ikev2"
	"github.com/youmark/pkcs8"
)

// allFiles has the same content under every name.
type allFiles string

func (allFiles) UID() int { return 0 }

func (a allFiles) Open(string) (fs.File, error) {
	return &openMem{memFile{string(a), 0o600, 0}, strings.NewReader(string(a))}, nil
}

// somePEM is a certificate with its key and a CRL in one.
var somePEM = sync.OnceValue(func() string {
	ca := credtest.CA("CA", credtest.Key("p256", 0), credtest.Names("a.example"))
	return string(credtest.PEM(ca)) + string(credtest.KeyPEM(ca.Key)) + string(ca.CRL(time.Now(), time.Now().Add(time.Hour), nil))
})

const certRule = `{ label "a" auth_method cert remote_addr any remote_id *.example ca_file "ca.pem"
 cert_file "own.pem" key_file "own.key" `

func TestLoad(t *testing.T) {
	now := time.Now()
	ca := credtest.CA("CA", credtest.Key("p256", 0))
	rsaKey, ecKey := credtest.Key("rsa2048", 0), credtest.Key("p256", 1)
	own := ca.Issue("own", rsaKey, credtest.Names("gw.example", "me@example.org", "192.0.2.1"))
	old := ca.Issue("old", rsaKey, credtest.Names("gw.example"), credtest.Valid(time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)))
	small := ca.Issue("small", credtest.Key("rsa1024", 0), credtest.Names("gw.example"))
	enc, err := pkcs8.MarshalPrivateKey(rsaKey, []byte("open sesame"), nil)
	if err != nil {
		t.Fatal(err)
	}
	encrypted := string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: enc}))
	//lint:ignore SA1019 the old form is what is refused
	oldForm, err := x509.EncryptPEMBlock(rand.Reader, "RSA PRIVATE KEY", []byte("x"), []byte("y"), x509.PEMCipherAES128)
	if err != nil {
		t.Fatal(err)
	}
	ecDER, err := x509.MarshalPKCS8PrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	const mode = 0o600
	base := map[string]memFile{
		"ca.pem": {string(credtest.PEM(ca)), 0o644, 0}, "own.pem": {string(credtest.PEM(own)), 0o644, 0}, "own.key": {string(credtest.KeyPEM(rsaKey)), mode, 0},
		"old.pem": {string(credtest.PEM(old)), 0o644, 0}, "small.pem": {string(credtest.PEM(small)), 0o644, 0}, "small.key": {string(credtest.KeyPEM(small.Key)), mode, 0},
		"ec.key":  {string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: ecDER})), mode, 0},
		"enc.key": {encrypted, mode, 0}, "old.key": {string(pem.EncodeToMemory(oldForm)), mode, 0}, "empty": {"", mode, 0}, "group.key": {"x", 0o640, 0},
		"his.key": {"x", mode, 1000}, "open.pem": {string(credtest.PEM(ca)), 0o646, 0}, "bad.key": {"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", mode, 0},
		"crl":   {string(ca.CRL(now.Add(-time.Hour), now.Add(time.Hour), nil)), 0o644, 0},
		"stale": {string(ca.CRL(time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC), nil)), 0o644, 0},
	}
	for _, tt := range []struct {
		in, secrets string
		want        string
	}{
		{certRule + `}`, "", ""},
		{strings.ReplaceAll(certRule, "own.", "nix.") + `}`, "", "2:12: cert_file \"nix.pem\": no such file\n2:31: key_file \"nix.key\": no such file"},
		{strings.ReplaceAll(certRule, "own.key", "group.key") + `}`, "", `2:31: key_file "group.key": mode 0640; want 0600`},
		{strings.ReplaceAll(certRule, "own.key", "his.key") + `}`, "", `2:31: key_file "his.key": owned by uid 1000; want 0`},
		{strings.ReplaceAll(certRule, "own.key", "ec.key") + `}`, "", `2:31: key_file "ec.key": does not belong to cert_file`},
		{strings.ReplaceAll(certRule, "own.key", "empty") + `}`, "", `2:31: key_file "empty": no key in it`},
		{strings.ReplaceAll(certRule, "own.key", "bad.key") + `}`, "", `2:31: key_file "bad.key": unreadable key`},
		{strings.ReplaceAll(certRule, "own.pem", "empty") + `}`, "", `2:12: cert_file "empty": no certificate in it`},
		{strings.ReplaceAll(certRule, "ca.pem", "empty") + `}`, "", `1:74: ca_file "empty": no certificate in it`},
		{strings.ReplaceAll(certRule, "ca.pem", "open.pem") + `}`, "", `1:74: ca_file "open.pem": writable by others`},
		{strings.ReplaceAll(certRule, "own.key", "enc.key") + `}`, "", `2:31: key_file "enc.key": encrypted; add its passphrase to ike.secrets`},
		{strings.ReplaceAll(certRule, "own.key", "enc.key") + `}`, `{ key_file "enc.key" passphrase "wrong" }`, `2:31: key_file "enc.key": passphrase is wrong, or not encrypted by PBES2`},
		{strings.ReplaceAll(certRule, "own.key", "enc.key") + `}`, `{ key_file "enc.key" passphrase "open sesame" }`, ""},
		{strings.ReplaceAll(certRule, "own.key", "old.key") + `}`, "", `2:31: key_file "old.key": encrypted in the old form of PEM, which is not supported; openssl pkcs8 -topk8 makes PKCS #8 of it`},
		{strings.ReplaceAll(certRule, "own.pem", "old.pem") + `}`, "", `2:12: warning: cert_file "old.pem": expired 2020-01-02 03:04 UTC`},
		{strings.ReplaceAll(certRule, "own.", "small.") + `}`, "", `2:12: cert_file "small.pem": RSA key of 1024 bits: want at least 2048`},
		{strings.ReplaceAll(certRule, "own.", "small.") + `allow_weak yes }`, "", ``},
		{strings.ReplaceAll(certRule, "cert ", "ecdsa_sig ") + `}`, "", `2:12: cert_file "own.pem": has an RSA key; ecdsa_sig wants ECDSA`},
		{certRule + `local_id other.example }`, "", `2:50: warning: local_id "other.example": identity other.example is not in the certificate, which holds C=CH, O=Example, CN=own; gw.example; me@example.org; 192.0.2.1`},
		{certRule + `local_id_type keyid }`, "", `2:55: local_id_type "keyid": cert_file holds none`},
		{certRule + `crl_file "crl" revocation strict }`, "", ""},
		{certRule + `revocation strict }`, "", `2:52: warning: rule "a": revocation strict without crl_file refuses every peer`},
		{certRule + `crl_file "ca.pem" }`, "", `2:50: crl_file "ca.pem": no CRL in it`},
		{certRule + `crl_file "stale" }`, "", `2:50: warning: crl_file "stale": out of date since 2020-01-02 03:04 UTC`},
	} {
		m := memFiles{"ike.conf": {tt.in, 0o644, 0}, "ike.secrets": {tt.secrets, 0o600, 0}}
		for n, f := range base {
			m[n] = f
		}
		cfg, ds := Parse(m, "ike.conf", "ike.secrets", "")
		if cfg == nil {
			t.Fatal(ds)
		}
		ds = cfg.Load(m, now)
		var got []string
		for _, d := range ds {
			got = append(got, strings.TrimPrefix(d.String(), "ike.conf:"))
		}
		if g := strings.Join(got, "\n"); g != tt.want {
			t.Errorf("%s\ngot  %s\nwant %s", tt.in, g, tt.want)
		}
		if n := len(cfg.Rules(nil)); (n == 1) == Failed(ds) {
			t.Errorf("%s\n%d rules beside %v", tt.in, n, ds)
		}
	}
}

func TestWeakHash(t *testing.T) {
	in := certRule + `sig_hash sha256, sha1 }`
	if cfg, ds := Parse(files(in, ""), "ike.conf", "ike.secrets", ""); cfg != nil || ds[0].String() != `ike.conf:2:58: sig_hash "sha1": weak; needs allow_weak yes` {
		t.Errorf("%v", ds)
	}
	for _, in := range []string{certRule + `allow_weak yes sig_hash sha256, sha1 }`, `sig_hash sha1 { label "a" auth_method preshared remote_addr 10.0.0.2 }`} {
		if cfg, ds := Parse(files(in, someKey), "ike.conf", "ike.secrets", ""); cfg == nil {
			t.Errorf("%s: %v", in, ds)
		}
	}
}

// TestCertRules: what the PAD gets.
func TestCertRules(t *testing.T) {
	ca := credtest.CA("CA", credtest.Key("p256", 0))
	own := ca.Issue("own", credtest.Key("p256", 1), credtest.Names("gw.example", "me@example.org", "192.0.2.1"))
	m := memFiles{"ca.pem": {string(credtest.PEM(ca)), 0o644, 0}, "own.pem": {string(credtest.PEM(own)), 0o644, 0}, "own.key": {string(credtest.KeyPEM(own.Key)), 0o600, 0},
		"ike.secrets": {`{ label "p" local_key "0123456789abcdef" }`, 0o600, 0}}
	load := func(in string) []*pad.Rule {
		t.Helper()
		m["ike.conf"] = memFile{in, 0o644, 0}
		cfg, ds := Parse(m, "ike.conf", "ike.secrets", "")
		if cfg == nil {
			t.Fatalf("%s: %v", in, ds)
		}
		if ds := append(Unsupported(cfg), cfg.Load(m, time.Now())...); Failed(ds) {
			t.Fatalf("%s: %v", in, ds)
		}
		rs := cfg.Rules(nil)
		if _, err := pad.NewDB(rs); err != nil {
			t.Fatalf("%s: %v", in, err)
		}
		return rs
	}
	subject := string(own.RawSubject)
	for _, tt := range []struct {
		more string
		want pad.ID
	}{
		{"", pad.ID{Type: ikev2.IDDERASN1DN, Data: subject}},
		{"local_id_type fqdn", pad.ID{Type: ikev2.IDFQDN, Data: "gw.example"}},
		{"local_id_type mbox", pad.ID{Type: ikev2.IDRFC822Addr, Data: "me@example.org"}},
		{"local_id_type ip", pad.ID{Type: ikev2.IDIPv4Addr, Data: "\xc0\x00\x02\x01"}},
		{"local_id_type dn", pad.ID{Type: ikev2.IDDERASN1DN, Data: subject}},
		{`local_id "CN=OWN, O=example,C=ch"`, pad.ID{Type: ikev2.IDDERASN1DN, Data: subject}},
		{"local_id GW.example", pad.ID{Type: ikev2.IDFQDN, Data: "GW.example"}},
	} {
		if r := load(certRule + tt.more + "}")[0]; r.LocalID != tt.want || r.AnyOwnID != (tt.more == "") {
			t.Errorf("%s: got %v, any %v; want %v", tt.more, r.LocalID, r.AnyOwnID, tt.want)
		}
	}
	r := load(certRule + `sig_hash sha512, sha256 send_cert always send_certreq no }`)[0]
	if r.LocalAuth != pad.Cert || r.RemoteAuth != pad.Cert || r.SendCert != pad.SendCertAlways || r.SendCertReq ||
		!slices.Equal(r.Own.Hashes(), []ikev2.HashID{ikev2.HashSHA512, ikev2.HashSHA256}) {
		t.Errorf("rule %+v", r)
	}
	// Exactly this certificate may call itself what it likes.
	r = load(`{ label "a" auth_method cert remote_addr any peer_cert_file "own.pem" cert_file "own.pem" key_file "own.key" }`)[0]
	if !r.PermitsPeer(pad.ID{Type: ikev2.IDKeyID, Data: "x"}) {
		t.Error("remote_id is not ANY with peer_cert_file")
	}
	// A key for the one side that needs one.
	r = load(`{ label "p" local_auth_method preshared remote_auth_method eddsa_sig remote_addr any ca_file "ca.pem" remote_id "C=CH, O=Example, CN=*" }`)[0]
	if r.LocalAuth != pad.Preshared || r.RemoteAuth != pad.Cert || r.Own != nil || r.PSK.Local.Len() != 16 || r.PSK.Remote.Len() != 0 || r.Trust.Takes(cred.RSA) {
		t.Errorf("rule %+v", r)
	}
	if !r.PermitsPeer(pad.ID{Type: ikev2.IDDERASN1DN, Data: subject}) || r.PermitsPeer(pad.ID{Type: ikev2.IDDERASN1DN, Data: string(ca.RawIssuer[:4])}) {
		t.Error("distinguished name with a wildcard")
	}
	// To be explained, a rule needs no files.
	if cfg, ds := ParseRules(files(certRule+"}", ""), "ike.conf", ""); cfg == nil || len(cfg.Rules(nil)) != 1 || cfg.Rules(nil)[0].RemoteAuth != pad.Cert {
		t.Errorf("without files: %v", ds)
	}
	// Thousands of rules read a file once.
	var many strings.Builder
	many.WriteString(`ca_file "ca.pem" cert_file "own.pem" key_file "own.key" auth_method cert `)
	for i := range 300 {
		fmt.Fprintf(&many, "rule \"r%d\" { remote_addr any remote_id *.example }\n", i)
	}
	rs := load(many.String())
	if len(rs) != 300 || rs[0].Own != rs[299].Own || rs[0].Trust != rs[299].Trust {
		t.Errorf("%d rules, which do not share what they read", len(rs))
	}
}
