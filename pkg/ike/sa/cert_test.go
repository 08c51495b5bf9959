package sa

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/proto/ikev2"
)

var labTime = time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)

func labValid(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = labTime.Add(-time.Hour), labTime.Add(365*24*time.Hour)
}

func testCA() *credtest.Cert { return credtest.CA("CA", credtest.Key("p256", 9), labValid) }

func mustOwn(t testing.TB, p cred.Policy, chain ...*credtest.Cert) *cred.Own {
	t.Helper()
	var cs []*x509.Certificate
	for _, c := range chain {
		cs = append(cs, c.Certificate)
	}
	o, err := cred.NewOwn(cs, chain[0].Key, p)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func mustTrust(t testing.TB, c cred.TrustConfig) *cred.Trust {
	t.Helper()
	tr, err := cred.NewTrust(c)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

var allHashes = []ikev2.HashID{ikev2.HashSHA256, ikev2.HashSHA384, ikev2.HashSHA512, ikev2.HashIdentity}

// An initiator hears of it when the IKE SA is about to end with a certificate, of
// either side (RFC 4478), unless it is to prove itself sooner than that anyway.
func TestAuthLifetimeByCertificate(t *testing.T) {
	for _, tt := range []struct {
		a, b, reauth, want time.Duration
	}{
		{365 * 24 * time.Hour, 365 * 24 * time.Hour, 0, 0},
		{5 * time.Hour, 365 * 24 * time.Hour, 0, 5 * time.Hour},
		{24 * time.Hour, 4 * time.Hour, 0, 4 * time.Hour},
		{4 * time.Hour, 24 * time.Hour, time.Hour, time.Hour},
		{4 * time.Hour, 24 * time.Hour, 6 * time.Hour, 4 * time.Hour},
		{2 * time.Hour, 24 * time.Hour, 0, 0},
	} {
		l, ca := certLab(t, "p256", "p256")
		p := cred.Policy{Hashes: allHashes}
		until := func(d time.Duration) credtest.Change { return credtest.Valid(labTime.Add(-time.Hour), labTime.Add(d)) }
		l.a.certify(p, ca.Issue("a", credtest.Key("p256", 0), until(tt.a), credtest.Names("a.example")))
		l.b.certify(p, ca.Issue("b", credtest.Key("p256", 1), until(tt.b), credtest.Names("b.example")))
		l.b.rule.Reauth = tt.reauth
		l.establish()
		l.want(1)
		var got time.Duration
		for _, o := range told[AuthLifetime](l.a) {
			got = o.Within
		}
		if got != tt.want {
			t.Errorf("%v: told %v", tt, got)
		}
	}
}

// certLab is a lab in which both prove themselves by certificates of one CA:
// a.example and b.example.
func certLab(t testing.TB, kindA, kindB string) (*lab, *credtest.Cert) {
	l := newLab(t)
	ca := testCA()
	p := cred.Policy{Hashes: allHashes}
	l.a.certify(p, ca.Issue("a", credtest.Key(kindA, 0), labValid, credtest.Names("a.example")))
	l.b.certify(p, ca.Issue("b", credtest.Key(kindB, 1), labValid, credtest.Names("b.example")))
	l.a.trust(cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: p}, "b.example")
	l.b.trust(cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: p}, "a.example")
	return l, ca
}

func fqdn(s string) pad.ID { return pad.ID{Type: ikev2.IDFQDN, Data: s} }

// certify lets n prove itself by a chain, as its first host name.
func (n *node) certify(p cred.Policy, chain ...*credtest.Cert) {
	n.t.Helper()
	n.rule.LocalAuth, n.rule.Own = pad.Cert, mustOwn(n.t, p, chain...)
	n.rule.LocalID = fqdn(chain[0].DNSNames[0])
}

func (n *node) trust(c cred.TrustConfig, peer string) {
	n.t.Helper()
	n.rule.RemoteAuth, n.rule.Trust = pad.Cert, mustTrust(n.t, c)
	n.rule.RemoteIDs = pad.Patterns{{ID: fqdn(peer)}}
}

func payloadsSent(n *node, exchange string) string {
	for _, o := range told[Message](n) {
		if o.Dir == "sent" && strings.HasPrefix(exchange, o.Exchange.String()) {
			return o.Names()
		}
	}
	return ""
}

// Every kind of key, by RFC 7427, and a different one on each side.
func TestCertificates(t *testing.T) {
	for _, k := range [][2]string{{"rsa2048", "p256"}, {"p384", "ed25519"}, {"p521", "rsa2048"}, {"ed25519", "p384"}} {
		t.Run(k[0]+" "+k[1], func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				c, _ := certLab(t, k[0], k[1])
				c.fault = l.fault
				*l = *c
				l.a.lab, l.b.lab = l, l
				l.establish()
				l.want(1)
				p, q := told[Established](l.a)[0].Peer, told[Established](l.b)[0].Peer
				if p.RemoteID != fqdn("b.example") || q.RemoteID != fqdn("a.example") || p.Cert == nil || q.Cert == nil ||
					!strings.Contains(q.Cert.Subject(), "CN=a") {
					t.Errorf("peers %v %v, %v %v", p.RemoteID, p.Cert, q.RemoteID, q.Cert)
				}
			})
		})
	}
	l, _ := certLab(t, "rsa2048", "p256")
	l.establish()
	for _, w := range []struct{ got, want string }{
		{payloadsSent(l.a, "IKE_SA_INIT"), "SIGNATURE_HASH_ALGORITHMS"}, {payloadsSent(l.b, "IKE_SA_INIT"), "CERTREQ, N(SIGNATURE_HASH_ALGORITHMS)"},
		{payloadsSent(l.a, "IKE_AUTH"), "IDi, CERT, CERTREQ, IDr, AUTH"}, {payloadsSent(l.b, "IKE_AUTH"), "IDr, CERT, AUTH"},
	} {
		if !strings.Contains(w.got, w.want) {
			t.Errorf("sent %q, want %q in it", w.got, w.want)
		}
	}
}

// old makes n forget that its peer announced anything.
func old(n *node) { n.sa.cur.hs.hashes = nil }

// The methods of before RFC 7427: a peer that announces nothing.
func TestOldMethods(t *testing.T) {
	withSHA1 := append([]ikev2.HashID{ikev2.HashSHA1}, allHashes...)
	for _, c := range []struct {
		kind   string
		hashes []ikev2.HashID
		pss    cred.PSS
		want   string // of our refusal; "" none
	}{
		{"p256", allHashes, 0, ""}, {"p384", allHashes, 0, ""}, {"p521", allHashes, 0, ""},
		{"rsa2048", withSHA1, 0, ""},
		{"rsa2048", allHashes, 0, "SHA-1, which sig_hash does not allow"},
		{"rsa2048", withSHA1, cred.PSSRequire, "rsa_pss require"},
		{"p384", []ikev2.HashID{ikev2.HashSHA256}, 0, "needs SHA2_384, which sig_hash does not allow"},
		{"ed25519", allHashes, 0, "Ed25519 key cannot be used"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			l, ca := certLab(t, c.kind, c.kind)
			p := cred.Policy{Hashes: c.hashes, PSS: c.pss}
			l.a.certify(p, ca.Issue("a", credtest.Key(c.kind, 0), labValid, credtest.Names("a.example")))
			l.b.certify(p, ca.Issue("b", credtest.Key(c.kind, 1), labValid, credtest.Names("b.example")))
			for _, n := range []*node{l.a, l.b} {
				n.trust(cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: p}, map[*node]string{l.a: "b.example", l.b: "a.example"}[n])
			}
			l.a.holdSPI = true // stands still before IKE_AUTH
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1)))
			l.run()
			old(l.a)
			old(l.b)
			l.a.holdSPI = false
			l.a.giveSPIs()
			l.settle()
			if c.want == "" {
				l.want(1)
				return
			}
			if f := told[Failed](l.a); len(f) != 1 || !strings.Contains(f[0].Err.Error(), c.want) {
				t.Errorf("Failed %v, want %q", f, c.want)
			}
		})
	}
}

// One side by a certificate, the other by a pre-shared key.
func TestMixedMethods(t *testing.T) {
	for _, aCert := range []bool{true, false} {
		l, _ := certLab(t, "p256", "p256")
		x, y := l.a, l.b // x proves itself by a certificate
		if !aCert {
			x, y = y, x
		}
		psk := pad.Keys{Local: key("for one side only"), Remote: key("for one side only")}
		x.rule.RemoteAuth, x.rule.PSK, x.rule.Trust = pad.Preshared, psk, nil
		y.rule.LocalAuth, y.rule.PSK, y.rule.Own = pad.Preshared, psk, nil
		l.establish()
		l.want(1)
		if c := told[Established](x)[0].Peer.Cert; c != nil {
			t.Errorf("%s: certificate %v of who has a key", x.name, c)
		}
		if c := told[Established](y)[0].Peer.Cert; c == nil {
			t.Errorf("%s: no certificate", y.name)
		}
	}
}

// What is wrong with a certificate, found by the responder and by the initiator.
func TestBadCertificates(t *testing.T) {
	ca, other := testCA(), credtest.CA("Other CA", credtest.Key("p256", 8), labValid)
	p := cred.Policy{Hashes: allHashes}
	k := credtest.Key("p256", 0)
	day := func(d int) time.Time { return labTime.Add(time.Duration(d) * 24 * time.Hour) }
	revoked := ca.Issue("x", k, labValid, credtest.Names("x.example"))
	crl, err := cred.ParseCRLs(ca.CRL(day(-2), day(2), nil, revoked))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		own   []*credtest.Cert
		trust cred.TrustConfig
		want  string
	}{
		{"unknown CA", []*credtest.Cert{other.Issue("x", k, labValid, credtest.Names("x.example"))}, cred.TrustConfig{},
			"certificate of C=CH, O=Example, CN=x: its issuer C=CH, O=Example, CN=Other CA is not a trusted CA"},
		{"expired", []*credtest.Cert{ca.Issue("x", k, credtest.Valid(day(-9), day(-1)), credtest.Names("x.example"))}, cred.TrustConfig{},
			"certificate of C=CH, O=Example, CN=x: expired 2025-01-01 03:04:05 UTC (valid from 2024-12-24 03:04:05 UTC)"},
		{"not yet", []*credtest.Cert{ca.Issue("x", k, credtest.Valid(day(1), day(9)), credtest.Names("x.example"))}, cred.TrustConfig{},
			"not valid before 2025-01-03 03:04:05 UTC"},
		{"identity", []*credtest.Cert{ca.Issue("x", k, labValid, credtest.Names("y.example", "192.0.2.1"))}, cred.TrustConfig{},
			"identity x.example is not in the certificate, which holds C=CH, O=Example, CN=x; y.example; 192.0.2.1"},
		{"revoked", []*credtest.Cert{revoked}, cred.TrustConfig{CRLs: crl},
			fmt.Sprintf("serial %x, is revoked since 2024-12-31 03:04:05 UTC by the CRL of C=CH, O=Example, CN=CA of 2024-12-31", revoked.SerialNumber)},
		{"strict without CRL", []*credtest.Cert{ca.Issue("x", k, labValid, credtest.Names("x.example"))}, cred.TrustConfig{Revocation: cred.RevocationStrict},
			"no CRL of C=CH, O=Example, CN=CA, so that nobody knows"},
		{"intermediate missing", []*credtest.Cert{ca.Sub("Sub", credtest.Key("p384", 5), labValid).Issue("x", k, labValid, credtest.Names("x.example"))}, cred.TrustConfig{},
			"its issuer C=CH, O=Example, CN=Sub is not a trusted CA"},
	} {
		for _, atInitiator := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, initiator %v", c.name, atInitiator), func(t *testing.T) {
				l, _ := certLab(t, "p256", "p256")
				bad, judge := l.a, l.b
				if atInitiator {
					bad, judge = l.b, l.a
				}
				bad.certify(p, c.own...)
				bad.rule.LocalID = fqdn("x.example")
				c.trust.CAs, c.trust.Policy = []*x509.Certificate{ca.Certificate}, p
				judge.trust(c.trust, "x.example")
				bad.trust(cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: p}, map[bool]string{false: "b.example", true: "a.example"}[atInitiator])
				judge.certify(p, ca.Issue(judge.name, k, labValid, credtest.Names(judge.name+".example")))
				l.establish()
				var le *LocalError
				if f := told[Failed](judge); len(f) != 1 || !errors.As(f[0].Err, &le) || le.Notify != ikev2.AUTHENTICATION_FAILED || !strings.Contains(le.Error(), c.want) {
					t.Errorf("Failed %v\nwant   %s", f, c.want)
				}
				var pe *PeerError
				if f := told[Failed](bad); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != ikev2.AUTHENTICATION_FAILED {
					t.Errorf("the other one: Failed %v", f)
				}
				if len(l.a.sads)+len(l.b.sads) != 0 {
					t.Error("SAs are left")
				}
			})
		}
	}
}

// Who shows a certificate that has expired reads it in its own log, whatever the
// peer says.
func TestOwnExpired(t *testing.T) {
	for _, initiator := range []bool{true, false} {
		l, ca := certLab(t, "p256", "p256")
		n := l.b
		if initiator {
			n = l.a
		}
		n.certify(cred.Policy{Hashes: allHashes}, ca.Issue("old", credtest.Key("p256", 0), credtest.Valid(labTime.Add(-2*time.Hour), labTime.Add(-time.Hour)), credtest.Names(n.name+".example")))
		l.establish()
		if s := fmt.Sprint(told[Log](n)); !strings.Contains(s, "our certificate of C=CH, O=Example, CN=old: expired 2025-01-02 02:04:05 UTC") {
			t.Errorf("initiator %v: log %s", initiator, s)
		}
	}
}

// A right certificate does not help who has not its key.
func TestStolenCertificate(t *testing.T) {
	l, ca := certLab(t, "p256", "p256")
	thief := ca.Issue("t", credtest.Key("p256", 3), labValid, credtest.Names("t.example"))
	victim := l.a.rule.Own.Certs(nil)[0]
	l.a.certify(cred.Policy{Hashes: allHashes}, thief)
	l.a.rule.LocalID, l.a.rule.SendCert = fqdn("a.example"), pad.SendCertNever
	pin, err := x509.ParseCertificate(victim)
	if err != nil {
		t.Fatal(err)
	}
	l.b.trust(cred.TrustConfig{Pinned: []*x509.Certificate{pin}, Policy: cred.Policy{Hashes: allHashes}}, "a.example")
	l.establish()
	if f := told[Failed](l.b); len(f) != 1 || !strings.Contains(f[0].Err.Error(), "CN=a: AUTH does not verify") {
		t.Errorf("Failed %v", f)
	}
}

// send_cert, send_certreq, and what is left out of a chain that the peer trusts
// from the middle.
func TestSendingCertificates(t *testing.T) {
	ca := testCA()
	sub := ca.Sub("Sub", credtest.Key("p384", 5), labValid)
	leaf := sub.Issue("a", credtest.Key("p256", 0), labValid, credtest.Names("a.example"))
	p := cred.Policy{Hashes: allHashes}
	for _, c := range []struct {
		name   string
		send   pad.SendCert
		ask    bool
		trust  cred.TrustConfig
		want   string // CERT payloads
		refuse string
	}{
		{"chain", pad.SendCertIfAsked, true, cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}}, "IDi, CERT, CERT, CERTREQ", ""},
		{"peer has the intermediate", pad.SendCertIfAsked, true, cred.TrustConfig{CAs: []*x509.Certificate{sub.Certificate}}, "IDi, CERT, CERTREQ", ""},
		{"not asked", pad.SendCertIfAsked, false, cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}}, "IDi, CERTREQ", "the peer sent none"},
		{"not asked, pinned", pad.SendCertIfAsked, false, cred.TrustConfig{Pinned: []*x509.Certificate{leaf.Certificate}}, "IDi, CERTREQ", ""},
		{"always", pad.SendCertAlways, false, cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}}, "IDi, CERT, CERT, CERTREQ", ""},
		{"never, pinned", pad.SendCertNever, true, cred.TrustConfig{Pinned: []*x509.Certificate{leaf.Certificate}}, "IDi, CERTREQ", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, _ := certLab(t, "p256", "p256")
			l.a.certify(p, leaf, sub, ca)
			l.a.rule.SendCert = c.send
			c.trust.Policy = p
			l.b.trust(c.trust, "a.example")
			l.b.rule.SendCertReq = c.ask
			l.establish()
			if got := payloadsSent(l.a, "IKE_AUTH"); !strings.HasPrefix(got, c.want) {
				t.Errorf("sent %q, want %q", got, c.want)
			}
			if c.refuse == "" {
				l.want(1)
			} else if f := told[Failed](l.b); len(f) != 1 || !strings.Contains(f[0].Err.Error(), c.refuse) {
				t.Errorf("Failed %v, want %q", f, c.refuse)
			}
		})
	}
}

// Of several rules the first serves whose method, key type and identities fit.
func TestRuleByKeyType(t *testing.T) {
	l, ca := certLab(t, "rsa2048", "p256")
	p := cred.Policy{Hashes: allHashes}
	first, second := *l.b.rule, *l.b.rule
	first.Label, second.Label = "ecdsa", "rsa"
	first.Trust = mustTrust(t, cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: p, Key: cred.ECDSA})
	second.Trust = mustTrust(t, cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: p, Key: cred.RSA})
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.b.cfg.Local, l.b.cfg.Remote = addrB, addrA
	l.b.sa = NewResponder(l.b.cfg, []*pad.Rule{&first, &second})
	l.settle()
	if e := told[Established](l.b); len(e) != 1 || e[0].Peer.Rule.Label != "rsa" {
		t.Errorf("established %v, failed %v", e, told[Failed](l.b))
	}
}

// Who has not been told who it is answers to each name of its certificate, and to
// no other.
func TestAnyOwnID(t *testing.T) {
	for asked, want := range map[string]string{"b.example": "b.example", "other.example": "", "": "C=CH, O=Example, CN=b"} {
		l, _ := certLab(t, "p256", "p256")
		id, ok := l.b.rule.Own.Identity()
		if !ok {
			t.Fatal("no identity")
		}
		l.b.rule.LocalID, l.b.rule.AnyOwnID = pad.FromWire(id), true
		l.a.rule.RemoteIDs = pad.Patterns{pad.AnyID}
		if asked != "" {
			l.a.rule.RemoteIDs = pad.Patterns{{ID: fqdn(asked)}}
		}
		l.establish()
		e := told[Established](l.a)
		switch {
		case want == "" && len(e) == 0:
		case want == "" || len(e) != 1 || e[0].Peer.RemoteID.String() != want:
			t.Errorf("asked for %q: established %v, failed %v; want %q", asked, e, told[Failed](l.a), want)
		default:
			l.want(1)
			if p := told[Established](l.b)[0].Peer; p.LocalID != e[0].Peer.RemoteID || !l.b.rule.MayBe(addrB.Addr(), p.LocalID) {
				t.Errorf("responder is %v", p.LocalID)
			}
		}
	}
}

// An encoding that is for later is refused by name.
func TestHashAndURL(t *testing.T) {
	l, _ := certLab(t, "p256", "p256")
	l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_AUTH) }
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.run()
	i := l.a.sa.cur
	auth := &ikev2.Auth{Method: ikev2.AuthSignature, Data: make([]byte, 80)}
	m := &ikev2.Message{Header: i.header(ikev2.IKE_AUTH, i.nextID-1, false), Payloads: []ikev2.Payload{
		&ikev2.IDi{ID: fqdn("a.example").Wire()}, &ikev2.Cert{Encoding: ikev2.CertHashURLX509, Data: []byte("http://x")}, auth}}
	b, err := m.AppendSealed(nil, i.seal)
	if err != nil {
		t.Fatal(err)
	}
	l.b.do(l.b.sa.Receive(l.now, Datagram{addrB, addrA, b}))
	if f := told[Failed](l.b); len(f) != 1 || !strings.Contains(f[0].Err.Error(), "encoding HASH_URL_X509 is not supported") {
		t.Errorf("Failed %v", f)
	}
}

// An IKE SA does not outlive a certificate, however often it is rekeyed.
func TestCertificateExpires(t *testing.T) {
	for _, own := range []bool{false, true} {
		l, ca := certLab(t, "p256", "p256")
		n := l.a
		if own {
			n = l.b
		}
		n.certify(cred.Policy{Hashes: allHashes}, ca.Issue("short", credtest.Key("p256", 0), credtest.Valid(labTime, labTime.Add(6*time.Hour)), credtest.Names(n.name+".example")))
		l.establish()
		l.step(labTime.Add(5 * time.Hour))
		l.want(1)
		if len(told[Rekeyed](l.a)) == 0 {
			t.Error("not rekeyed")
		}
		l.step(labTime.Add(6*time.Hour + time.Minute))
		f := append(told[Failed](l.a), told[Failed](l.b)...)
		if !slices.ContainsFunc(f, func(f Failed) bool {
			return errors.Is(f.Err, ErrExpired) && strings.Contains(f.Err.Error(), "certificate")
		}) || len(l.a.sads)+len(l.b.sads) != 0 {
			t.Errorf("Failed %v", f)
		}
	}
}

// FuzzAuth feeds arbitrary contents of IKE_AUTH under the right keys, to the
// responder and to the initiator, which expect certificates: a peer that nobody has
// authenticated yet. No panic, and nobody is let in.
func FuzzAuth(f *testing.F) {
	add := func(ps ...ikev2.Payload) {
		b, err := ikev2.AppendPayloads(nil, ps)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(ps[0].PayloadType()), b)
	}
	file, err := os.ReadFile("../cred/testdata/certs.pem")
	if err != nil {
		f.Fatal(err)
	}
	cs, err := cred.ParseCertificates(file)
	if err != nil {
		f.Fatal(err)
	}
	id := fqdn("x.example").Wire()
	auth := &ikev2.Auth{Method: ikev2.AuthSignature, Data: append([]byte{12, 0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}, make([]byte, 70)...)}
	for _, c := range []ikev2.Payload{
		&ikev2.Cert{Encoding: ikev2.CertX509Signature, Data: cs[3].Raw}, &ikev2.Cert{Encoding: ikev2.CertX509Signature, Data: cs[0].Raw},
		&ikev2.Cert{Encoding: ikev2.CertHashURLX509, Data: []byte("x")}, &ikev2.CertReq{Encoding: ikev2.CertX509Signature, Authority: make([]byte, 45)},
		notify(ikev2.SIGNATURE_HASH_ALGORITHMS, 0, 2, 0),
	} {
		add(&ikev2.IDi{ID: id}, c, auth)
		add(&ikev2.IDr{ID: id}, c, auth)
	}
	policy := cred.Policy{Hashes: allHashes}
	own := credtest.CA("own", credtest.Key("p256", 0), labValid, credtest.Names("own.example"))
	chain, err := cred.NewOwn([]*x509.Certificate{own.Certificate}, own.Key, policy)
	if err != nil {
		f.Fatal(err)
	}
	trust, err := cred.NewTrust(cred.TrustConfig{CAs: cs[:1], Policy: policy})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, first byte, inner []byte) {
		if len(inner) > 60000 {
			return
		}
		for _, response := range []bool{false, true} {
			l := newLab(t)
			l.stop = func(p packet) bool { return p.data[18] == byte(ikev2.IKE_AUTH) }
			for _, n := range []*node{l.a, l.b} {
				n.rule.LocalAuth, n.rule.Own, n.rule.LocalID = pad.Cert, chain, fqdn("own.example")
				n.rule.RemoteAuth, n.rule.Trust, n.rule.RemoteIDs = pad.Cert, trust, pad.Patterns{pad.AnyID}
			}
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, reqA(1)))
			l.run()
			from, to := l.a, l.b
			if response {
				from, to = l.b, l.a
			}
			i := from.sa.cur
			to.do(to.sa.Receive(l.now, Datagram{to.sa.local, to.sa.remote, sealRaw(t, i.header(ikev2.IKE_AUTH, 1, response), i.seal, first, inner)}))
			if len(told[Established](to)) != 0 || len(to.sads) != 0 {
				t.Fatalf("let in")
			}
		}
	})
}
