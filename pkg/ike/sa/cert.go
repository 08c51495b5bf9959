package sa

import (
	"fmt"
	"slices"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/proto/ikev2"
)

// Authentication by certificates (RFC 7296, 2.15, 3.6 and 3.7; RFC 7427):
//
//	HDR, SA, KE, Ni, N(SIGNATURE_HASH_ALGORITHMS)           -->
//	              <--  HDR, SA, KE, Nr, CERTREQ, N(SIGNATURE_HASH_ALGORITHMS)
//	HDR, SK {IDi, CERT..., CERTREQ, [IDr,] AUTH, ...}       -->
//	                               <--  HDR, SK {IDr, CERT..., AUTH, ...}
//
// Each side may prove itself in another way. Who signs looks at what the other
// one announced; who verifies looks at what it announced itself.

// announced is what the peer says of certificates before AUTH.
type announced struct {
	hashes      []ikev2.HashID // that it can verify; nil: it did not say
	asked       bool           // for an X.509 certificate
	authorities [][]byte       // of CAs that it trusts
}

// hear takes it from the payloads of a message.
func (h *announced) hear(ps []ikev2.Payload) error {
	for _, p := range ps {
		switch p := p.(type) {
		case *ikev2.Notify:
			if p.Type != ikev2.SIGNATURE_HASH_ALGORITHMS {
				continue
			}
			hs, err := cred.ParseHashes(p.Data)
			if err != nil {
				return err
			}
			h.hashes = append(h.hashes, hs...)
			if h.hashes == nil {
				h.hashes = []ikev2.HashID{}
			}
		case *ikev2.CertReq:
			if p.Encoding == ikev2.CertX509Signature {
				h.asked = true
				h.authorities = append(h.authorities, cred.SplitAuthorities(p.Authority)...)
			}
		}
	}
	return nil
}

// hashNotify announces the hashes of what the rules verify, or sign, by: a peer
// that hears nothing falls back on what was before RFC 7427.
func hashNotify(rules ...*pad.Rule) []ikev2.Payload {
	var hs []ikev2.HashID
	add := func(l []ikev2.HashID) {
		for _, h := range l {
			if !slices.Contains(hs, h) {
				hs = append(hs, h)
			}
		}
	}
	for _, r := range rules {
		// Rules that are only explained have no certificates.
		if r.RemoteAuth == pad.Cert && r.Trust != nil {
			add(r.Trust.Hashes())
		}
		if r.LocalAuth == pad.Cert && r.Own != nil {
			add(r.Own.Hashes())
		}
	}
	if len(hs) == 0 {
		return nil
	}
	return []ikev2.Payload{&ikev2.Notify{Type: ikev2.SIGNATURE_HASH_ALGORITHMS, Data: cred.AppendHashes(nil, hs)}}
}

// certRequest asks for certificates of the CAs that the rules trust.
func certRequest(rules ...*pad.Rule) []ikev2.Payload {
	var all [][]byte
	ask := false
	for _, r := range rules {
		if r.RemoteAuth != pad.Cert || !r.SendCertReq || r.Trust == nil {
			continue
		}
		ask = true
		for _, a := range cred.SplitAuthorities(r.Trust.Authorities()) {
			if len(all) < cred.MaxAuthorities && !slices.ContainsFunc(all, func(b []byte) bool { return string(a) == string(b) }) {
				all = append(all, a)
			}
		}
	}
	if !ask {
		return nil
	}
	return []ikev2.Payload{&ikev2.CertReq{Encoding: ikev2.CertX509Signature, Authority: slices.Concat(all...)}}
}

// prove makes what proves who we are: our CERT payloads, and AUTH. remote is who
// the peer is, or is thought to be.
func (s *SA) prove(i *ikeSA, remote pad.ID) (certs []ikev2.Payload, auth *ikev2.Auth, err error) {
	local := s.peer.LocalID
	if s.rule.LocalAuth == pad.Preshared {
		keys, ok := s.rule.Keys(local, remote)
		if !ok {
			return nil, nil, errNoKey
		}
		data, err := s.authData(i, keys.Local, i.initiator, idBody(local.Wire()))
		return nil, &ikev2.Auth{Method: ikev2.AuthPSK, Data: data}, err
	}
	// It is the peer's to refuse, by its own clock; who looks for the reason finds
	// it here.
	if err := s.rule.Own.Valid(s.now); err != nil {
		s.log(levelWarn, "certificate of our own is not valid", attrErr(err))
	}
	octets, err := s.authOctets(i, i.initiator, idBody(local.Wire()))
	if err != nil {
		return nil, nil, err
	}
	h := &i.hs.announced
	if s.rule.SendCert == pad.SendCertAlways || s.rule.SendCert == pad.SendCertIfAsked && h.asked {
		for _, c := range s.rule.Own.Certs(h.authorities) {
			certs = append(certs, &ikev2.Cert{Encoding: ikev2.CertX509Signature, Data: c})
		}
	}
	auth, err = s.rule.Own.Sign(h.hashes, octets)
	return certs, auth, err
}

// certsOf returns the peer's certificates, its own first (RFC 7296, 3.6). odd is
// an encoding of certificates that we do not take, if it sent such.
func certsOf(ps []ikev2.Payload) (certs [][]byte, odd ikev2.CertEncoding) {
	for _, p := range ps {
		switch c, ok := p.(*ikev2.Cert); {
		case !ok:
		case c.Encoding == ikev2.CertX509Signature:
			certs = append(certs, c.Data)
		default:
			odd = c.Encoding
		}
	}
	return certs, odd
}

// claimed is how the peer says to prove itself, as far as that can be seen.
func claimed(auth *ikev2.Auth, ps []ikev2.Payload) (m pad.AuthMethod, k cred.KeyType) {
	switch auth.Method {
	case ikev2.AuthPSK:
		return pad.Preshared, 0
	case ikev2.AuthRSA, ikev2.AuthECDSA256, ikev2.AuthECDSA384, ikev2.AuthECDSA521, ikev2.AuthSignature:
		if certs, _ := certsOf(ps); len(certs) > 0 {
			k = cred.KeyOf(certs[0])
		}
		return pad.Cert, k
	}
	return 0, 0
}

// verifyCert checks that the peer's certificate proves id, and that it has the key.
func (s *SA) verifyCert(i *ikeSA, id ikev2.ID, auth *ikev2.Auth, ps []ikev2.Payload) error {
	certs, odd := certsOf(ps)
	p, err := s.rule.Trust.Verify(certs, id, s.now)
	switch {
	case err != nil && len(certs) == 0 && odd != 0:
		return fmt.Errorf("certificate of encoding %v is not supported: want %v", odd, ikev2.CertX509Signature)
	case err != nil:
		return err
	}
	octets, err := s.authOctets(i, !i.initiator, idBody(id))
	if err != nil {
		return err
	}
	if err := s.rule.Trust.CheckAuth(p, auth, octets); err != nil {
		return fmt.Errorf("certificate of %s: %w", p.Subject(), err)
	}
	s.peer.Cert = p
	return nil
}
