// Package credtest makes certificates for tests: authorities, end certificates
// with what is wrong with them, CRLs, and the PEM of all. Keys of a kind are made
// once for each process. For tests only.
package credtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"sync"
	"time"
)

// Cert is a certificate with its key.
type Cert struct {
	*x509.Certificate
	Key crypto.Signer
}

var (
	mu     sync.Mutex
	keys   = map[string][]crypto.Signer{}
	serial int64
)

// Key makes the nth key of a kind: rsa1024, rsa2048, p224, p256, p384, p521 or
// ed25519; the same one whenever it is asked for in a process.
func Key(kind string, n int) crypto.Signer {
	mu.Lock()
	defer mu.Unlock()
	for len(keys[kind]) <= n {
		k, err := generate(kind)
		if err != nil {
			panic("credtest: " + err.Error())
		}
		keys[kind] = append(keys[kind], k)
	}
	return keys[kind][n]
}

func generate(kind string) (k crypto.Signer, err error) {
	switch kind {
	case "rsa1024":
		k, err = rsa.GenerateKey(rand.Reader, 1024)
	case "rsa2048":
		k, err = rsa.GenerateKey(rand.Reader, 2048)
	case "p224":
		k, err = ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	case "p256":
		k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "p384":
		k, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "p521":
		k, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "ed25519":
		_, k, err = ed25519.GenerateKey(rand.Reader)
	default:
		err = fmt.Errorf("no kind %q", kind)
	}
	return k, err
}

// Change is what a test wants different in a certificate or CRL.
type Change func(*x509.Certificate)

// Names gives subject alternative names: addresses, mailboxes, else host names.
func Names(names ...string) Change {
	return func(c *x509.Certificate) {
		for _, n := range names {
			switch ip := net.ParseIP(n); {
			case ip != nil:
				c.IPAddresses = append(c.IPAddresses, ip)
			case containsAt(n):
				c.EmailAddresses = append(c.EmailAddresses, n)
			default:
				c.DNSNames = append(c.DNSNames, n)
			}
		}
	}
}

func containsAt(s string) bool {
	for _, c := range s {
		if c == '@' {
			return true
		}
	}
	return false
}

// Valid sets the validity.
func Valid(from, to time.Time) Change {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to }
}

func next() *big.Int {
	mu.Lock()
	defer mu.Unlock()
	serial++
	return big.NewInt(0x1000 + serial)
}

func template(cn string, ca bool, changes []Change) *x509.Certificate {
	c := &x509.Certificate{
		SerialNumber: next(),
		Subject:      pkix.Name{Country: []string{"CH"}, Organization: []string{"Example"}, CommonName: cn},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: ca, IsCA: ca,
	}
	if ca {
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
	for _, f := range changes {
		f(c)
	}
	return c
}

// CA makes a root: C=CH, O=Example and the common name, valid from an hour ago
// for a day.
func CA(cn string, key crypto.Signer, changes ...Change) *Cert {
	t := template(cn, true, changes)
	return sign(t, t, key, key)
}

// Sub makes an intermediate CA below c.
func (c *Cert) Sub(cn string, key crypto.Signer, changes ...Change) *Cert {
	return sign(template(cn, true, changes), c.Certificate, key, c.Key)
}

// Issue makes an end certificate.
func (c *Cert) Issue(cn string, key crypto.Signer, changes ...Change) *Cert {
	return sign(template(cn, false, changes), c.Certificate, key, c.Key)
}

func sign(t, parent *x509.Certificate, key, by crypto.Signer) *Cert {
	b, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), by)
	if err != nil {
		panic("credtest: " + err.Error())
	}
	c, err := x509.ParseCertificate(b)
	if err != nil {
		panic("credtest: " + err.Error())
	}
	return &Cert{c, key}
}

// CRL makes a list in PEM that revokes these certificates, issued at from, with
// its successor due at to.
func (c *Cert) CRL(from, to time.Time, extra []pkix.Extension, revoked ...*Cert) []byte {
	l := &x509.RevocationList{Number: next(), ThisUpdate: from, NextUpdate: to, ExtraExtensions: extra}
	for _, r := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: r.SerialNumber, RevocationTime: from})
	}
	b, err := x509.CreateRevocationList(rand.Reader, l, c.Certificate, c.Key)
	if err != nil {
		panic("credtest: " + err.Error())
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: b})
}

// PEM of certificates, one behind the other.
func PEM(cs ...*Cert) []byte {
	var out []byte
	for _, c := range cs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// KeyPEM is a private key in PKCS #8.
func KeyPEM(key crypto.Signer) []byte {
	b, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic("credtest: " + err.Error())
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b})
}
