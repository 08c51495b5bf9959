package cred

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/proto/ikev2"
)

func k(kind string, n int) crypto.Signer { return credtest.Key(kind, n) }

func name(s string) ikev2.ID { return ikev2.ID{Type: ikev2.IDFQDN, Data: []byte(s)} }

func raw(cs ...*credtest.Cert) (out [][]byte) {
	for _, c := range cs {
		out = append(out, c.Raw)
	}
	return out
}

func plain(cs ...*credtest.Cert) (out []*x509.Certificate) {
	for _, c := range cs {
		out = append(out, c.Certificate)
	}
	return out
}

func issuers(t *testing.T, names ...string) (out []dn.Name) {
	t.Helper()
	for _, s := range names {
		n, err := dn.ParseText(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, n)
	}
	return out
}

func crls(t testing.TB, pems ...[]byte) (out []*CRL) {
	t.Helper()
	for _, p := range pems {
		l, err := ParseCRLs(p)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, l...)
	}
	return out
}

func TestTrust(t *testing.T) {
	now := time.Now()
	hour := time.Hour
	root, root2 := credtest.CA("Root", k("p256", 0)), credtest.CA("Root 2", k("p256", 1))
	sub := root.Sub("Sub", k("p256", 2))
	subsub := sub.Sub("Sub Sub", k("p256", 3))
	oldSub := root.Sub("Old Sub", k("p256", 4), credtest.Valid(now.Add(-9*hour), now.Add(-hour)))
	shortSub := root.Sub("Short Sub", k("p256", 4), credtest.Valid(now.Add(-9*hour), now.Add(2*hour)))
	weakSub := root.Sub("Weak Sub", k("rsa1024", 0))
	leaf := root.Issue("x", k("p256", 5), credtest.Names("x.example", "X@Example.com", "192.0.2.1", "2001:db8::1", "*.wild.example"))
	deep := subsub.Issue("x", k("p256", 5), credtest.Names("x.example"))
	uri := func(c *x509.Certificate) { c.CRLDistributionPoints = []string{"http://crl.example/x.crl"} }
	withURI := root.Issue("x", k("p256", 5), credtest.Names("x.example"), uri)
	eku := func(oids ...asn1.ObjectIdentifier) credtest.Change {
		return func(c *x509.Certificate) { c.UnknownExtKeyUsage = oids }
	}
	use := func(u x509.KeyUsage) credtest.Change { return func(c *x509.Certificate) { c.KeyUsage = u } }
	issue := func(cs ...credtest.Change) *credtest.Cert {
		return root.Issue("x", k("p256", 5), append(cs, credtest.Names("x.example"))...)
	}
	fresh := func(ca *credtest.Cert, revoked ...*credtest.Cert) []byte {
		return ca.CRL(now.Add(-hour), now.Add(hour), nil, revoked...)
	}
	stale := func(ca *credtest.Cert, revoked ...*credtest.Cert) []byte {
		return ca.CRL(now.Add(-2*hour), now.Add(-hour), nil, revoked...)
	}
	partial := func(ca *credtest.Cert, revoked ...*credtest.Cert) []byte {
		return ca.CRL(now.Add(-hour), now.Add(hour), []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}}}, revoked...)
	}
	subject := func(c *credtest.Cert) ikev2.ID { return ikev2.ID{Type: ikev2.IDDERASN1DN, Data: c.RawSubject} }
	respelled, err := issuers(t, "C=ch, O=EXAMPLE, CN=X")[0].DER()
	if err != nil {
		t.Fatal(err)
	}
	cas := TrustConfig{CAs: plain(root)}
	with := func(f func(*TrustConfig)) TrustConfig {
		c := cas
		f(&c)
		return c
	}
	lists := func(r Revocation, pems ...[]byte) TrustConfig {
		return TrustConfig{CAs: plain(root), Revocation: r, CRLs: crls(t, pems...)}
	}
	for _, tt := range []struct {
		name  string
		c     TrustConfig
		certs [][]byte
		id    ikev2.ID
		want  string // in the error; "" good
	}{
		{"good", cas, raw(leaf), name("x.example"), ""},
		{"case of a name", cas, raw(leaf), name("X.EXAMPLE"), ""},
		{"mailbox", cas, raw(leaf), ikev2.ID{Type: ikev2.IDRFC822Addr, Data: []byte("x@example.com")}, ""},
		{"address", cas, raw(leaf), ikev2.ID{Type: ikev2.IDIPv4Addr, Data: []byte{192, 0, 2, 1}}, ""},
		{"IPv6", cas, raw(leaf), ikev2.ID{Type: ikev2.IDIPv6Addr, Data: []byte(leaf.IPAddresses[1])}, ""},
		{"another address", cas, raw(leaf), ikev2.ID{Type: ikev2.IDIPv4Addr, Data: []byte{192, 0, 2, 2}}, "identity 192.0.2.2 is not in the certificate, which holds C=CH, O=Example, CN=x; x.example; *.wild.example; X@Example.com; 192.0.2.1; 2001:db8::1"},
		{"subject", cas, raw(leaf), subject(leaf), ""},
		{"subject in other words", cas, raw(leaf), ikev2.ID{Type: ikev2.IDDERASN1DN, Data: respelled}, ""},
		{"another subject", cas, raw(leaf), subject(root), "identity C=CH, O=Example, CN=Root is not in the certificate"},
		{"no DER", cas, raw(leaf), ikev2.ID{Type: ikev2.IDDERASN1DN, Data: []byte("CN=x")}, "is not in the certificate"},
		{"common name is no host name", cas, raw(leaf), name("x"), "identity x is not in"},
		{"wildcard of a certificate", cas, raw(leaf), name("a.wild.example"), "identity a.wild.example is not in"},
		{"mailbox as a name", cas, raw(leaf), name("x@example.com"), "is not in"},
		{"KEY_ID", cas, raw(leaf), ikev2.ID{Type: ikev2.IDKeyID, Data: []byte("x.example")}, "is not in"},
		{"nothing sent", cas, nil, name("x.example"), "no certificate for x.example: the peer sent none"},
		{"garbage", cas, [][]byte{{1, 2, 3}}, name("x.example"), "the peer's certificate is not readable"},
		{"two intermediates", cas, raw(deep, subsub, sub), name("x.example"), ""},
		{"in any order, with others", cas, append(raw(deep, root2, sub, leaf, subsub), []byte{1}), name("x.example"), ""},
		{"one is missing", cas, raw(deep, subsub), name("x.example"), "certificate of C=CH, O=Example, CN=Sub Sub: its issuer C=CH, O=Example, CN=Sub is not a trusted CA"},
		{"an intermediate is trusted", TrustConfig{CAs: plain(sub)}, raw(deep, subsub), name("x.example"), ""},
		{"another root", TrustConfig{CAs: plain(root2)}, raw(leaf), name("x.example"), "CN=x: its issuer C=CH, O=Example, CN=Root is not a trusted CA"},
		{"the peer's own root", cas, raw(root2.Issue("x", k("p256", 5), credtest.Names("x.example")), root2), name("x.example"), "is not a trusted CA"},
		{"no CA above", cas, raw(leaf.Issue("y", k("p256", 6), credtest.Names("y.example")), leaf), name("y.example"), "certificate of C=CH, O=Example, CN=y:"},
		{"intermediate expired", cas, raw(oldSub.Issue("x", k("p256", 5), credtest.Names("x.example")), oldSub), name("x.example"), "certificate of C=CH, O=Example, CN=Old Sub: expired"},
		{"weak intermediate", cas, raw(weakSub.Issue("x", k("p256", 5), credtest.Names("x.example")), weakSub), name("x.example"), "CA C=CH, O=Example, CN=Weak Sub has an RSA key of 1024 bits"},
		{"weak key", cas, raw(root.Issue("x", k("rsa1024", 1), credtest.Names("x.example"))), name("x.example"), "RSA key of 1024 bits: want at least 2048"},
		{"weak key, allowed", with(func(c *TrustConfig) { c.Policy.Weak = true }), raw(root.Issue("x", k("rsa1024", 1), credtest.Names("x.example"))), name("x.example"), ""},
		{"another key type", with(func(c *TrustConfig) { c.Key = RSA }), raw(leaf), name("x.example"), "has an ECDSA key; the rule wants RSA"},

		{"required issuer", with(func(c *TrustConfig) { c.Issuers = issuers(t, "C=CH, O=Example, CN=Other", "CN=sub, O=example, C=ch") }), raw(deep, subsub, sub), name("x.example"), ""},
		{"not the required issuer", with(func(c *TrustConfig) { c.Issuers = issuers(t, "C=CH, O=Example, CN=Sub") }), raw(leaf), name("x.example"), "issuer C=CH, O=Example, CN=Root is not a required_issuer"},
		{"the certificate is not its own issuer", with(func(c *TrustConfig) { c.Issuers = issuers(t, "C=CH, O=Example, CN=x") }), raw(leaf), name("x.example"), "is not a required_issuer"},

		{"pinned", TrustConfig{Pinned: plain(leaf)}, raw(leaf), name("x.example"), ""},
		{"pinned, not sent", TrustConfig{Pinned: plain(root2, leaf)}, nil, name("x.example"), ""},
		{"pinned, another name", TrustConfig{Pinned: plain(leaf)}, nil, name("y.example"), "the peer sent none"},
		{"another of the same CA", with(func(c *TrustConfig) { c.Pinned = plain(leaf) }), raw(issue()), name("x.example"), "is none of peer_cert_file"},
		{"pinned, required issuer", TrustConfig{Pinned: plain(leaf), Issuers: issuers(t, "CN=Else")}, raw(leaf), name("x.example"), "is not a required_issuer"},
		{"pinned, revoked", with(func(c *TrustConfig) { c.Pinned, c.CRLs = plain(leaf), crls(t, fresh(root, leaf)) }), raw(leaf), name("x.example"), "is revoked"},
		{"pinned, strict, good", with(func(c *TrustConfig) {
			c.Pinned, c.Revocation, c.CRLs = plain(leaf), RevocationStrict, crls(t, fresh(root))
		}), raw(leaf), name("x.example"), ""},
		{"pinned, strict, no CA", TrustConfig{Pinned: plain(leaf), Revocation: RevocationStrict, CRLs: crls(t, fresh(root))}, raw(leaf), name("x.example"), "nobody knows whether it is revoked"},

		{"key usage", cas, raw(issue(use(x509.KeyUsageKeyEncipherment))), name("x.example"), "neither digitalSignature nor nonRepudiation"},
		{"nonRepudiation", cas, raw(issue(use(x509.KeyUsageContentCommitment))), name("x.example"), ""},
		{"no key usage", cas, raw(issue(use(0))), name("x.example"), ""},
		{"ipsecIKE", cas, raw(issue(eku(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 17}))), name("x.example"), ""},
		{"serverAuth alone", cas, raw(issue(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })), name("x.example"), "neither ipsecIKE nor any"},
		{"any usage", cas, raw(issue(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageAny}
		})), name("x.example"), ""},
		{"unknown critical extension", cas, raw(issue(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		})), name("x.example"), "unhandled critical extension"},

		{"revoked", lists(RevocationRelaxed, fresh(root, leaf)), raw(leaf), name("x.example"), fmt.Sprintf("serial %x, is revoked since", leaf.SerialNumber)},
		{"revoked, none", lists(RevocationNone, fresh(root, leaf)), raw(leaf), name("x.example"), ""},
		{"revoked by an old CRL", lists(RevocationRelaxed, stale(root, leaf), fresh(root)), raw(leaf), name("x.example"), "is revoked"},
		{"revoked by a partial CRL", lists(RevocationRelaxed, partial(root, leaf)), raw(leaf), name("x.example"), "is revoked"},
		{"intermediate revoked", lists(RevocationRelaxed, fresh(root, sub)), raw(deep, subsub, sub), name("x.example"), "certificate of C=CH, O=Example, CN=Sub, serial"},
		{"revoked by another CA", lists(RevocationRelaxed, fresh(root2, leaf)), raw(leaf), name("x.example"), ""},
		{"CRL by the name of the CA, another key", lists(RevocationRelaxed, fresh(credtest.CA("Root", k("p256", 7)), leaf)), raw(leaf), name("x.example"), ""},
		{"strict, good", lists(RevocationStrict, fresh(root)), raw(leaf), name("x.example"), ""},
		{"strict, chain", lists(RevocationStrict, fresh(root), fresh(sub), fresh(subsub)), raw(deep, subsub, sub), name("x.example"), ""},
		{"strict, one CRL is missing", lists(RevocationStrict, fresh(root), fresh(subsub)), raw(deep, subsub, sub), name("x.example"), "certificate of C=CH, O=Example, CN=Sub Sub: no CRL of C=CH, O=Example, CN=Sub"},
		{"strict, stale", lists(RevocationStrict, stale(root)), raw(leaf), name("x.example"), "the CRL of C=CH, O=Example, CN=Root is out of date since"},
		{"strict, partial", lists(RevocationStrict, partial(root)), raw(leaf), name("x.example"), "no CRL of"},
		{"strict, not yet", lists(RevocationStrict, root.CRL(now.Add(hour), now.Add(2*hour), nil)), raw(leaf), name("x.example"), "no CRL of"},
		{"relaxed, stale", lists(RevocationRelaxed, stale(root)), raw(leaf), name("x.example"), ""},
		{"ifuri, no source", lists(RevocationIfURI), raw(leaf), name("x.example"), ""},
		{"ifuri, source", lists(RevocationIfURI), raw(withURI), name("x.example"), "no CRL of"},
		{"ifuri, known", lists(RevocationIfURI, fresh(root)), raw(withURI), name("x.example"), ""},
	} {
		tt.c.Policy.Hashes = all
		tr, err := NewTrust(tt.c)
		if err != nil {
			t.Fatal(err)
		}
		p, err := tr.Verify(tt.certs, tt.id, now)
		switch {
		case err == nil && tt.want == "":
		case err == nil || tt.want == "" || !strings.Contains(err.Error(), tt.want):
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		case strings.ContainsAny(err.Error(), "\n\r"):
			t.Errorf("%s: more than a line: %v", tt.name, err)
		}
		if err == nil && (p == nil || p.Until.Before(now)) {
			t.Errorf("%s: got %v", tt.name, p)
		}
	}
	// The first of the path that ends.
	tr, err := NewTrust(TrustConfig{CAs: plain(root), Policy: Policy{Hashes: all}})
	if err != nil {
		t.Fatal(err)
	}
	p, err := tr.Verify(raw(shortSub.Issue("x", k("p256", 5), credtest.Names("x.example")), shortSub), name("x.example"), now)
	if err != nil || !p.Until.Equal(shortSub.NotAfter) {
		t.Errorf("until %v, %v; want %v", p.Until, err, shortSub.NotAfter)
	}
	for at, want := range map[time.Time]string{leaf.NotAfter: "", leaf.NotAfter.Add(time.Second): "expired", leaf.NotBefore: "", leaf.NotBefore.Add(-time.Second): "not valid before"} {
		if _, err := tr.Verify(raw(leaf), name("x.example"), at); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("at %v: %v, want %q", at, err, want)
		}
	}
	if _, err := NewTrust(TrustConfig{}); err == nil {
		t.Error("trust in nobody")
	}
}

func TestOwn(t *testing.T) {
	root := credtest.CA("Root", k("p256", 0))
	sub := root.Sub("Sub", k("p256", 1))
	leaf := sub.Issue("x", k("p256", 2), credtest.Names("x.example"))
	o, err := NewOwn(plain(leaf, sub, root), leaf.Key, Policy{Hashes: all})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		asked [][]byte
		want  int
	}{{nil, 2}, {[][]byte{keyID(root.Certificate)}, 2}, {[][]byte{keyID(sub.Certificate)}, 1}, {[][]byte{keyID(leaf.Certificate)}, 2}} {
		if got := o.Certs(tt.asked); len(got) != tt.want || string(got[0]) != string(leaf.Raw) {
			t.Errorf("asked for %x: %d certificates, want %d", tt.asked, len(got), tt.want)
		}
	}
	tr, err := NewTrust(TrustConfig{CAs: plain(root, sub)})
	if err != nil {
		t.Fatal(err)
	}
	if got := SplitAuthorities(append(tr.Authorities(), 1, 2, 3)); len(got) != 2 || string(got[1]) != string(keyID(sub.Certificate)) {
		t.Errorf("authorities %x", got)
	}
	if _, err := NewOwn(plain(leaf), sub.Key, Policy{}); err != ErrMismatch {
		t.Errorf("another key: %v", err)
	}
	if _, err := NewOwn(nil, sub.Key, Policy{}); err != ErrNoCertificate {
		t.Errorf("no certificate: %v", err)
	}
	bare := root.Issue("", k("p256", 2), func(c *x509.Certificate) { c.Subject = pkix.Name{} }, credtest.Names("a@b.example", "b.example"))
	o, err = NewOwn(plain(bare), bare.Key, Policy{})
	if err != nil {
		t.Fatal(err)
	}
	if id, ok := o.Identity(); !ok || id.Type != ikev2.IDFQDN {
		t.Errorf("identity without subject: %v", id)
	}
	if s := fmt.Sprintf("%v %+v %s %#v", o, o, o, struct{ O *Own }{o}); strings.Contains(s, "PrivateKey") || strings.Contains(s, "D:") {
		t.Errorf("prints %s", s)
	}
}

// Keys in every form that is read; no message quotes any of them.
func TestParseKey(t *testing.T) {
	rsaKey, ecKey := k("rsa2048", 0), k("p256", 0)
	p1 := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: marshal(t, "pkcs1", rsaKey)})
	sec1 := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: marshal(t, "sec1", ecKey)})
	params := []byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n")
	for name, tt := range map[string]struct {
		file []byte
		want crypto.Signer
	}{
		"PKCS #1": {p1, rsaKey}, "SEC 1": {append(params, sec1...), ecKey}, "PKCS #8": {credtest.KeyPEM(k("ed25519", 0)), k("ed25519", 0)},
		"behind a certificate": {append(credtest.PEM(credtest.CA("x", ecKey)), sec1...), ecKey},
	} {
		got, err := ParseKey(tt.file, nil)
		if err != nil || !samePublic(got.Public(), tt.want.Public()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, in := range map[string]string{
		"nothing": "", "text": "secret words", "public": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
		"damaged": "-----BEGIN RSA PRIVATE KEY-----\nc2VjcmV0\n-----END RSA PRIVATE KEY-----\n", "DSA": "-----BEGIN DSA PRIVATE KEY-----\nc2VjcmV0\n-----END DSA PRIVATE KEY-----\n",
	} {
		if key, err := ParseKey([]byte(in), nil); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, %v", name, key, err)
		}
	}
}

func marshal(t *testing.T, form string, key crypto.Signer) []byte {
	t.Helper()
	p8, _ := pem.Decode(credtest.KeyPEM(key))
	var inner struct {
		Version int
		Alg     pkix.AlgorithmIdentifier
		Key     []byte
	}
	if _, err := asn1.Unmarshal(p8.Bytes, &inner); err != nil {
		t.Fatal(err)
	}
	if form == "pkcs1" {
		return inner.Key
	}
	// SEC 1 names the curve, which stands outside in PKCS #8.
	var sec struct {
		Version    int
		PrivateKey []byte
		Curve      asn1.ObjectIdentifier `asn1:"optional,explicit,tag:0"`
		Public     asn1.BitString        `asn1:"optional,explicit,tag:1"`
	}
	if _, err := asn1.Unmarshal(inner.Key, &sec); err != nil {
		t.Fatal(err)
	}
	sec.Curve = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	b, err := asn1.Marshal(sec)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseCRLs(t *testing.T) {
	root := credtest.CA("Root", k("p256", 0))
	now := time.Now()
	one := root.CRL(now, now.Add(time.Hour), nil)
	b, _ := pem.Decode(one)
	for name, tt := range map[string]struct {
		in   []byte
		n    int
		want string
	}{
		"PEM": {one, 1, ""}, "two": {append(append([]byte("text\n"), one...), one...), 2, ""}, "DER": {b.Bytes, 1, ""},
		"none": {credtest.PEM(root), 0, "no CRL in it"}, "empty": {nil, 0, "no CRL in it"}, "cut": {b.Bytes[:40], 0, "CRL 1: "},
	} {
		got, err := ParseCRLs(tt.in)
		if len(got) != tt.n || (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %d, %v; want %d, %q", name, len(got), err, tt.n, tt.want)
		}
	}
}

// FuzzVerify: certificates and identities of a stranger. Nothing panics, each
// error is one line of bounded length, and nobody is let in. testdata/certs.pem is
// a root that is trusted, another one, and an intermediate and an end certificate
// below that: fixed, so that the coverage of an input is always the same.
func FuzzVerify(f *testing.F) {
	file, err := os.ReadFile("testdata/certs.pem")
	if err != nil {
		f.Fatal(err)
	}
	cs, err := ParseCertificates(file)
	if err != nil {
		f.Fatal(err)
	}
	root, sub, leaf, now := cs[0], cs[2], cs[3], cs[0].NotBefore.Add(time.Hour)
	f.Add(leaf.Raw, sub.Raw, uint8(ikev2.IDFQDN), []byte("x.example"))
	f.Add(leaf.Raw, sub.Raw, uint8(ikev2.IDIPv4Addr), []byte{192, 0, 2, 1})
	f.Add(root.Raw, root.Raw, uint8(ikev2.IDDERASN1DN), root.RawSubject)
	tr, err := NewTrust(TrustConfig{CAs: cs[:1], Policy: Policy{Hashes: all}})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := tr.Verify([][]byte{leaf.Raw, sub.Raw}, name("x.example"), now); err == nil || !strings.Contains(err.Error(), "not a trusted CA") {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, a, b []byte, typ uint8, id []byte) {
		i := ikev2.ID{Type: ikev2.IDType(typ), Data: id}
		_ = KeyOf(a)
		p, err := tr.Verify([][]byte{a, b}, i, now)
		if err == nil && string(a) != string(root.Raw) { // the anchor itself is trusted
			t.Fatalf("let in: %v", p)
		}
		if err != nil && (strings.ContainsAny(err.Error(), "\n\r") || len(err.Error()) > 3000) {
			t.Errorf("message %q", err)
		}
	})
}
