package cred

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"sync"
	"time"
)

// CRL is a certificate revocation list.
type CRL struct {
	list *x509.RevocationList
	// partial: it has a critical extension that limits what it is about. What it
	// lists is revoked; what it does not list, it says nothing of.
	partial bool
	revoked map[string]*x509.RevocationListEntry // by serial number

	mu     sync.Mutex
	signed map[string]bool // by the signer's public key: whether it verifies
}

// ErrNoCRL: a file without any.
var ErrNoCRL = errors.New("no CRL in it")

// reasonRemove is removeFromCRL of a delta CRL: not revoked any more (RFC 5280, 5.3.1).
const reasonRemove = 8

// ParseCRLs reads every CRL of a file, PEM or DER.
func ParseCRLs(file []byte) ([]*CRL, error) {
	var out []*CRL
	add := func(b []byte) error {
		l, err := x509.ParseRevocationList(b)
		if err != nil {
			return fmt.Errorf("CRL %d: %w", len(out)+1, err)
		}
		c := &CRL{list: l, revoked: make(map[string]*x509.RevocationListEntry, len(l.RevokedCertificateEntries)), signed: map[string]bool{}}
		for _, e := range l.Extensions {
			c.partial = c.partial || e.Critical
		}
		for i := range l.RevokedCertificateEntries {
			e := &l.RevokedCertificateEntries[i]
			for _, x := range e.Extensions {
				if x.Critical { // certificateIssuer: the entry is about another CA's
					return fmt.Errorf("CRL %d: indirect CRLs are not supported", len(out)+1)
				}
			}
			if e.ReasonCode != reasonRemove {
				c.revoked[e.SerialNumber.String()] = e
			}
		}
		out = append(out, c)
		return nil
	}
	if b, _ := pem.Decode(file); b == nil && len(file) > 0 && file[0] == 0x30 {
		return out, add(file)
	}
	for rest := file; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "X509 CRL" {
			continue
		}
		if err := add(b.Bytes); err != nil {
			return nil, err
		}
	}
	if len(out) == 0 {
		return nil, ErrNoCRL
	}
	return out, nil
}

// Stale reports whether the CRL's successor is due.
func (c *CRL) Stale(now time.Time) bool {
	return !c.list.NextUpdate.IsZero() && now.After(c.list.NextUpdate)
}

// NextUpdate is when it becomes stale.
func (c *CRL) NextUpdate() time.Time { return c.list.NextUpdate }

// by reports whether ca has issued the CRL. Only CAs on a path to an anchor are
// asked about, so there are few.
func (c *CRL) by(ca *x509.Certificate) bool {
	if string(c.list.RawIssuer) != string(ca.RawSubject) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	k := string(ca.RawSubjectPublicKeyInfo)
	ok, known := c.signed[k]
	if !known {
		ok = c.list.CheckSignatureFrom(ca) == nil
		c.signed[k] = ok
	}
	return ok
}

// Revocation says what is demanded of a certificate's status.
type Revocation uint8

// Unchecked; revoked is refused, unknown passes; unknown passes only if the
// certificate names no source; must be known good.
const (
	RevocationRelaxed Revocation = iota
	RevocationNone
	RevocationIfURI
	RevocationStrict
)

// notRevoked checks the status of one certificate of a path.
func (t *Trust) notRevoked(c, ca *x509.Certificate, now time.Time) error {
	if t.revocation == RevocationNone {
		return nil
	}
	good := false
	var stale *CRL
	for _, l := range t.crls {
		if !l.by(ca) {
			continue
		}
		// A revocation does not end with the life of the list that tells of it.
		if e := l.revoked[c.SerialNumber.String()]; e != nil {
			return fmt.Errorf("certificate of %s, serial %x, is revoked since %s by the CRL of %s of %s",
				subject(c), c.SerialNumber, date(e.RevocationTime), subject(ca), date(l.list.ThisUpdate))
		}
		switch {
		case l.partial || now.Before(l.list.ThisUpdate):
		case l.Stale(now):
			stale = l
		default:
			good = true
		}
	}
	sources := len(c.CRLDistributionPoints) + len(c.OCSPServer)
	switch {
	case good, t.revocation == RevocationRelaxed, t.revocation == RevocationIfURI && sources == 0:
		return nil
	case stale != nil:
		return fmt.Errorf("certificate of %s: the CRL of %s is out of date since %s", subject(c), subject(ca), date(stale.list.NextUpdate))
	}
	return fmt.Errorf("certificate of %s: no CRL of %s, so that nobody knows whether it is revoked", subject(c), subject(ca))
}

func date(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
