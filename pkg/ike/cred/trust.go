package cred

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/proto/ikev2"
)

// TrustConfig says whose certificates count.
type TrustConfig struct {
	CAs    []*x509.Certificate // trust anchors
	Pinned []*x509.Certificate // if there are any: exactly these end certificates
	CRLs   []*CRL
	// Issuers: one of these CAs must be on the path; none: any.
	Issuers    []dn.Name
	Revocation Revocation
	Key        KeyType // 0: any
	Policy     Policy
}

// Trust is whom we believe.
type Trust struct {
	cas, pinned []*x509.Certificate
	roots       *x509.CertPool
	crls        []*CRL
	issuers     []dn.Name
	revocation  Revocation
	key         KeyType
	policy      Policy
}

// NewTrust makes a Trust; c needs CAs or pinned certificates.
func NewTrust(c TrustConfig) (*Trust, error) {
	if len(c.CAs)+len(c.Pinned) == 0 {
		return nil, ErrNoCertificate
	}
	t := &Trust{cas: c.CAs, pinned: c.Pinned, roots: x509.NewCertPool(), crls: c.CRLs, issuers: c.Issuers,
		revocation: c.Revocation, key: c.Key, policy: c.Policy}
	for _, ca := range c.CAs {
		t.roots.AddCert(ca)
	}
	return t, nil
}

// Hashes are those that the peer may sign with (SIGNATURE_HASH_ALGORITHMS).
func (t *Trust) Hashes() []ikev2.HashID { return t.policy.Hashes }

// Takes reports whether signatures by a key of that type count; 0, which is not
// known yet, may.
func (t *Trust) Takes(k KeyType) bool { return t.key == 0 || k == 0 || t.key == k }

// MaxAuthorities is the number of CAs that a CERTREQ names: of more than that the
// peer is not told, which only makes its choice harder.
const MaxAuthorities = 32

// Authorities is the data of a CERTREQ: what names the trusted CAs.
func (t *Trust) Authorities() []byte {
	var out []byte
	for _, c := range t.cas[:min(len(t.cas), MaxAuthorities)] {
		out = append(out, keyID(c)...)
	}
	return out
}

// Peer is a certificate that a peer has shown and that was found good.
type Peer struct {
	leaf *x509.Certificate
	sent [][]byte
	// Until is when the first certificate of its path expires: no SA by it lives
	// longer (RFC 4301, 4.4.2.1).
	Until time.Time
}

// Certs are the certificates as the peer sent them, for a later Verify.
func (p *Peer) Certs() [][]byte { return p.sent }

// Subject names the certificate.
func (p *Peer) Subject() string { return subject(p.leaf) }

// Format keeps fmt from printing whole certificates.
func (p *Peer) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "cred.Peer(%s)", p.Subject()) }

// maxCerts of a peer are looked at; its own comes first.
const maxCerts = 16

// KeyOf tells the type of the key in a certificate; 0 if it has none of ours.
func KeyOf(cert []byte) KeyType {
	c, err := x509.ParseCertificate(cert)
	if err != nil {
		return 0
	}
	k, _ := Policy{Weak: true}.keyType(c.PublicKey)
	return k
}

// Verify finds out whether certificates, in DER and the end certificate first,
// prove that their holder may call itself id at the time now. They do not prove
// that the peer is the holder: CheckAuth does. Each error is one line.
func (t *Trust) Verify(certs [][]byte, id ikev2.ID, now time.Time) (*Peer, error) {
	if len(certs) == 0 {
		if p := t.pinnedFor(id); p != nil { // the peer knows that we have it
			certs = [][]byte{p.Raw}
		} else {
			return nil, fmt.Errorf("no certificate for %s: the peer sent none", IDString(id))
		}
	}
	leaf, err := x509.ParseCertificate(certs[0])
	if err != nil {
		return nil, fmt.Errorf("the peer's certificate is not readable: %w", err)
	}
	refuse := func(err error) (*Peer, error) {
		return nil, fmt.Errorf("certificate of %s: %w", subject(leaf), err)
	}
	kind, err := t.policy.keyType(leaf.PublicKey)
	switch {
	case err != nil:
		return refuse(err)
	case t.key != 0 && kind != t.key:
		return refuse(fmt.Errorf("has an %v key; the rule wants %v", kind, t.key))
	}
	for _, check := range []error{inTime(leaf, now), usage(leaf), holds(leaf, id)} {
		if check != nil {
			return refuse(check)
		}
	}
	p := &Peer{leaf: leaf, sent: certs, Until: leaf.NotAfter}
	if len(t.pinned) > 0 {
		return t.verifyPinned(p, now)
	}
	paths, err := t.paths(leaf, certs[1:], now)
	if err != nil {
		return nil, err
	}
	var first error
	for _, path := range paths {
		if err = t.checkPath(path, now); err == nil {
			for _, c := range path {
				if c.NotAfter.Before(p.Until) {
					p.Until = c.NotAfter
				}
			}
			return p, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// pinnedFor finds the pinned certificate that holds id.
func (t *Trust) pinnedFor(id ikev2.ID) *x509.Certificate {
	for _, c := range t.pinned {
		if holds(c, id) == nil {
			return c
		}
	}
	return nil
}

// verifyPinned: who is listed needs no CA, but may be revoked by one.
func (t *Trust) verifyPinned(p *Peer, now time.Time) (*Peer, error) {
	if !slices.ContainsFunc(t.pinned, p.leaf.Equal) {
		return nil, fmt.Errorf("certificate of %s, serial %x, is none of peer_cert_file", subject(p.leaf), p.leaf.SerialNumber)
	}
	if n, err := dn.Parse(p.leaf.RawIssuer); len(t.issuers) > 0 && (err != nil || !t.mayIssue(n)) {
		return nil, fmt.Errorf("certificate of %s: issuer %s is not a required_issuer", subject(p.leaf), issuer(p.leaf))
	}
	known := false
	for _, ca := range t.cas {
		if p.leaf.CheckSignatureFrom(ca) != nil {
			continue
		}
		known = true
		if err := t.notRevoked(p.leaf, ca, now); err != nil {
			return nil, err
		}
	}
	if !known && (t.revocation == RevocationStrict || t.revocation == RevocationIfURI && len(p.leaf.CRLDistributionPoints)+len(p.leaf.OCSPServer) > 0) {
		return nil, fmt.Errorf("certificate of %s: no ca_file of %s, so that nobody knows whether it is revoked", subject(p.leaf), issuer(p.leaf))
	}
	return p, nil
}

// paths finds the ways from leaf to an anchor by the certificates that the peer
// sent besides.
func (t *Trust) paths(leaf *x509.Certificate, more [][]byte, now time.Time) ([][]*x509.Certificate, error) {
	pool := x509.NewCertPool()
	for _, b := range more[:min(len(more), maxCerts-1)] {
		c, err := x509.ParseCertificate(b)
		if err != nil {
			continue // perhaps it is not needed
		}
		if k, isRSA := c.PublicKey.(*rsa.PublicKey); isRSA && k.N.BitLen() > maxRSA {
			continue
		}
		pool.AddCert(c)
	}
	paths, err := leaf.Verify(x509.VerifyOptions{
		Roots: t.roots, Intermediates: pool, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // usage looks at them
	})
	if err == nil {
		return paths, nil
	}
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		if why := inTime(invalid.Cert, now); why != nil {
			return nil, fmt.Errorf("certificate of %s: %w", subject(invalid.Cert), why)
		}
	case errors.As(err, &unknown):
		last := unknown.Cert
		if last == nil {
			last = leaf
		}
		return nil, fmt.Errorf("certificate of %s: its issuer %s is not a trusted CA, nor is there a path to one", subject(last), issuer(last))
	}
	return nil, fmt.Errorf("certificate of %s: %s", subject(leaf), cut(strings.TrimPrefix(err.Error(), "x509: ")))
}

func (t *Trust) mayIssue(n dn.Name) bool {
	return slices.ContainsFunc(t.issuers, func(i dn.Name) bool { return i.Match(n) })
}

// checkPath checks what x509 does not: the demanded issuer and revocation.
func (t *Trust) checkPath(path []*x509.Certificate, now time.Time) error {
	if len(t.issuers) > 0 && !slices.ContainsFunc(path[1:], func(c *x509.Certificate) bool {
		n, err := dn.Parse(c.RawSubject)
		return err == nil && t.mayIssue(n)
	}) {
		return fmt.Errorf("certificate of %s: issuer %s is not a required_issuer, nor is any CA above it", subject(path[0]), issuer(path[0]))
	}
	for _, c := range path[1:] {
		if _, err := t.policy.keyType(c.PublicKey); err != nil {
			return fmt.Errorf("certificate of %s: CA %s has an %w", subject(path[0]), subject(c), err)
		}
	}
	for i, c := range path[:len(path)-1] {
		if err := t.notRevoked(c, path[i+1], now); err != nil {
			return err
		}
	}
	return nil
}

func inTime(c *x509.Certificate, now time.Time) error {
	switch {
	case now.After(c.NotAfter):
		return fmt.Errorf("expired %s (valid from %s)", date(c.NotAfter), date(c.NotBefore))
	case now.Before(c.NotBefore):
		return fmt.Errorf("not valid before %s (until %s)", date(c.NotBefore), date(c.NotAfter))
	}
	return nil
}

// oidIPsecIKE is id-kp-ipsecIKE (RFC 4945, 5.1.3.12).
var oidIPsecIKE = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 17}

// usage checks what the key of an end certificate is for (RFC 4945, 5.1.3.2 and
// 5.1.3.12).
func usage(c *x509.Certificate) error {
	if c.KeyUsage != 0 && c.KeyUsage&(x509.KeyUsageDigitalSignature|x509.KeyUsageContentCommitment) == 0 {
		return errors.New("its key usage has neither digitalSignature nor nonRepudiation")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) ||
		slices.ContainsFunc(c.UnknownExtKeyUsage, oidIPsecIKE.Equal) {
		return nil
	}
	return errors.New("its extended key usage has neither ipsecIKE nor any")
}

// CheckAuth checks that an AUTH payload over octets was made with the key of the
// certificate, by a method that the policy takes.
func (t *Trust) CheckAuth(p *Peer, a *ikev2.Auth, octets []byte) error {
	return t.policy.verify(p.leaf.PublicKey, a, octets)
}
