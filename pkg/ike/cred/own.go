package cred

import (
	"crypto"
	"crypto/sha1"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/proto/ikev2"
	"github.com/youmark/pkcs8"
)

// Own is what we prove an identity with: a certificate, its chain and its private
// key.
type Own struct {
	chain  []*x509.Certificate // leaf first, no trust anchors
	key    crypto.Signer
	kind   KeyType
	policy Policy
}

// Errors about the content of files.
var (
	ErrNoCertificate = errors.New("no certificate in it")
	ErrNoKey         = errors.New("no key in it")
	// ErrEncrypted: the key is encrypted, and there is no passphrase.
	ErrEncrypted = errors.New("encrypted")
	// ErrMismatch: the key is not that of the certificate.
	ErrMismatch = errors.New("does not belong to cert_file")
)

// ParseCertificates reads every certificate of a PEM file. What stands between
// them is passed over.
func ParseCertificates(file []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var b *pem.Block
		if b, file = pem.Decode(file); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, ErrNoCertificate
	}
	return out, nil
}

// ParseKey reads a private key of a PEM file: PKCS #8, encrypted with a
// passphrase or not, PKCS #1 or SEC 1. No error quotes anything of it.
func ParseKey(file, passphrase []byte) (crypto.Signer, error) {
	for {
		var b *pem.Block
		if b, file = pem.Decode(file); b == nil {
			return nil, ErrNoKey
		}
		var key any
		var err error
		switch _, old := b.Headers["DEK-Info"]; {
		case !strings.HasSuffix(b.Type, "PRIVATE KEY"):
			continue // EC PARAMETERS, a certificate
		case old:
			return nil, errors.New("encrypted in the old form of PEM, which is not supported; openssl pkcs8 -topk8 makes PKCS #8 of it")
		case b.Type == "ENCRYPTED PRIVATE KEY" && len(passphrase) == 0:
			return nil, ErrEncrypted
		case b.Type == "ENCRYPTED PRIVATE KEY":
			// Its errors tell a wrong passphrase from nothing else.
			if key, _, err = pkcs8.ParsePrivateKey(b.Bytes, passphrase); err != nil {
				return nil, errors.New("passphrase is wrong, or not encrypted by PBES2")
			}
		case b.Type == "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(b.Bytes)
		case b.Type == "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(b.Bytes)
		case b.Type == "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(b.Bytes)
		default:
			return nil, fmt.Errorf("%s: not supported", b.Type)
		}
		clear(b.Bytes)
		if err != nil {
			return nil, errors.New("unreadable key")
		}
		s, ok := key.(crypto.Signer)
		if !ok {
			return nil, errors.New("key of a kind that cannot sign")
		}
		return s, nil
	}
}

// NewOwn puts a chain, leaf first, and its key together.
func NewOwn(chain []*x509.Certificate, key crypto.Signer, p Policy) (*Own, error) {
	if len(chain) == 0 {
		return nil, ErrNoCertificate
	}
	kind, err := p.keyType(chain[0].PublicKey)
	if err != nil {
		return nil, err
	}
	if !samePublic(key.Public(), chain[0].PublicKey) {
		return nil, ErrMismatch
	}
	o := &Own{chain: chain[:1:1], key: key, kind: kind, policy: p}
	for _, c := range chain[1:] {
		// Who does not trust a root already gains nothing from having it sent.
		if !selfIssued(c) {
			o.chain = append(o.chain, c)
		}
	}
	return o, nil
}

func selfIssued(c *x509.Certificate) bool { return string(c.RawIssuer) == string(c.RawSubject) }

// Format keeps fmt from printing the key.
func (o *Own) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "cred.Own(%s)", subject(o.chain[0])) }

// Kind is the type of the key.
func (o *Own) Kind() KeyType { return o.kind }

// Hashes are those that the peer may sign with (SIGNATURE_HASH_ALGORITHMS).
func (o *Own) Hashes() []ikev2.HashID { return o.policy.Hashes }

// Equal reports whether both prove the same with the same key.
func (o *Own) Equal(x *Own) bool {
	return o == x || o != nil && x != nil && o.chain[0].Equal(x.chain[0])
}

// Valid says what is wrong with the certificate at the time now: nobody would
// believe it.
func (o *Own) Valid(now time.Time) error {
	if err := inTime(o.chain[0], now); err != nil {
		return fmt.Errorf("our certificate of %s: %w", subject(o.chain[0]), err)
	}
	return nil
}

// Until is when the certificate expires.
func (o *Own) Until() time.Time { return o.chain[0].NotAfter }

// Identity is who we are unless it is configured: the subject, else the first
// subject alternative name.
func (o *Own) Identity() (ikev2.ID, bool) {
	ids := identities(o.chain[0])
	if len(ids) == 0 {
		return ikev2.ID{}, false
	}
	return ids[0], true
}

// IdentityOf is the first identity of a type that the certificate holds.
func (o *Own) IdentityOf(t ikev2.IDType) (ikev2.ID, bool) {
	for _, id := range identities(o.chain[0]) {
		if id.Type == t {
			return id, true
		}
	}
	return ikev2.ID{}, false
}

// Holds returns an error that tells what there is if the certificate does not
// prove id.
func (o *Own) Holds(id ikev2.ID) error { return holds(o.chain[0], id) }

// Subject returns the subject in DER if it is what the name describes.
func (o *Own) Subject(n dn.Name) ([]byte, bool) {
	s, err := dn.Parse(o.chain[0].RawSubject)
	return o.chain[0].RawSubject, err == nil && n.Match(s)
}

// CanSign returns an error that tells why Sign could not, to a peer that announced
// these hashes.
func (o *Own) CanSign(announced []ikev2.HashID) error {
	_, _, err := o.policy.choose(o.key.Public(), announced)
	return err
}

// Sign makes the AUTH payload over octets. announced are the hashes of the
// peer's SIGNATURE_HASH_ALGORITHMS, nil if it sent none.
func (o *Own) Sign(announced []ikev2.HashID, octets []byte) (*ikev2.Auth, error) {
	return o.policy.sign(o.key, announced, octets)
}

// keyIDSize is the size in octets of what CERTREQ names a CA by: SHA-1 over its
// SubjectPublicKeyInfo (RFC 7296, 3.7).
const keyIDSize = sha1.Size

func keyID(c *x509.Certificate) []byte {
	h := sha1.Sum(c.RawSubjectPublicKeyInfo)
	return h[:]
}

// Certs returns the CERT payloads' certificates in DER, the leaf first. asked are
// the keys that the peer's CERTREQs name: from the first CA of ours that it has
// already, nothing is sent (RFC 7296, 3.7).
func (o *Own) Certs(asked [][]byte) [][]byte {
	out := [][]byte{o.chain[0].Raw}
	for _, c := range o.chain[1:] {
		id := keyID(c)
		if slices.ContainsFunc(asked, func(a []byte) bool { return string(a) == string(id) }) {
			break
		}
		out = append(out, c.Raw)
	}
	return out
}

// SplitAuthorities takes the data of a CERTREQ apart.
func SplitAuthorities(b []byte) [][]byte {
	var out [][]byte
	for ; len(b) >= keyIDSize; b = b[keyIDSize:] {
		out = append(out, b[:keyIDSize])
	}
	return out
}

// identities are all that a certificate proves: its subject, then its subject
// alternative names.
func identities(c *x509.Certificate) []ikev2.ID {
	var out []ikev2.ID
	if n, err := dn.Parse(c.RawSubject); err == nil && !n.IsZero() {
		out = append(out, ikev2.ID{Type: ikev2.IDDERASN1DN, Data: c.RawSubject})
	}
	for _, s := range c.DNSNames {
		out = append(out, ikev2.ID{Type: ikev2.IDFQDN, Data: []byte(s)})
	}
	for _, s := range c.EmailAddresses {
		out = append(out, ikev2.ID{Type: ikev2.IDRFC822Addr, Data: []byte(s)})
	}
	for _, ip := range c.IPAddresses {
		a, ok := netip.AddrFromSlice(ip)
		if a = a.Unmap(); !ok {
			continue
		}
		t := ikev2.IDIPv6Addr
		if a.Is4() {
			t = ikev2.IDIPv4Addr
		}
		out = append(out, ikev2.ID{Type: t, Data: a.AsSlice()})
	}
	return out
}

// holds checks that a certificate proves id (RFC 4945, 3.1): a DN is its subject,
// all else a subject alternative name of that type, the whole of it: a wildcard in
// a certificate is nobody's identity.
func holds(c *x509.Certificate, id ikev2.ID) error {
	ids := identities(c)
	for _, h := range ids {
		if h.Type != id.Type {
			continue
		}
		switch id.Type {
		case ikev2.IDDERASN1DN:
			a, err1 := dn.Parse(h.Data)
			b, err2 := dn.Parse(id.Data)
			if err1 == nil && err2 == nil && a.Equal(b) {
				return nil
			}
		case ikev2.IDFQDN, ikev2.IDRFC822Addr:
			if strings.EqualFold(string(h.Data), string(id.Data)) {
				return nil
			}
		default:
			if string(h.Data) == string(id.Data) {
				return nil
			}
		}
	}
	var l []string
	for _, h := range ids {
		l = append(l, IDString(h))
	}
	if len(l) == 0 {
		l = []string{"no identity"}
	}
	return fmt.Errorf("identity %s is not in the certificate, which holds %s", IDString(id), cut(strings.Join(l, "; ")))
}

// IDString gives an identity readably, a distinguished name as ike.conf writes it.
func IDString(id ikev2.ID) string {
	if id.Type == ikev2.IDDERASN1DN {
		if n, err := dn.Parse(id.Data); err == nil {
			return cut(n.String())
		}
	}
	return cut(id.String())
}

// maxText is the length in octets of what a message quotes of a stranger's.
const maxText = 300

func cut(s string) string {
	if len(s) > maxText {
		return strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}

// subject names a certificate for messages.
func subject(c *x509.Certificate) string {
	if n, err := dn.Parse(c.RawSubject); err == nil && !n.IsZero() {
		return cut(n.String())
	}
	for _, id := range identities(c) {
		return IDString(id)
	}
	return fmt.Sprintf("serial %x", c.SerialNumber)
}

func issuer(c *x509.Certificate) string {
	if n, err := dn.Parse(c.RawIssuer); err == nil {
		return cut(n.String())
	}
	return "unreadable"
}
