package ikeconf

import (
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// maxCRL is the size in octets above which a crl_file is refused.
const maxCRL = 64 << 20

// loader reads the files that rules name, each once: thousands of rules may
// share them.
type loader struct {
	c      *Config
	fsys   Files
	l      *list
	now    time.Time
	owns   map[string]*cred.Own
	trusts map[string]*cred.Trust
	certs  map[string]parsed[[]*x509.Certificate]
	crls   map[string]parsed[[]*cred.CRL]
}

type parsed[T any] struct {
	v   T
	err error
}

// Load reads the keys, certificates and CRLs of the rules that Unsupported has
// nothing against, and checks that they fit: paths start at the directory of the
// configuration. now is the time by which they may have expired, which is a
// warning. With errors the old configuration has to stay. Call it before Wipe,
// which takes the passphrases away.
func (c *Config) Load(fsys Files, now time.Time) []Diagnostic {
	ld := &loader{c: c, fsys: fsys, l: newList(c.Path), now: now, owns: map[string]*cred.Own{}, trusts: map[string]*cred.Trust{},
		certs: map[string]parsed[[]*x509.Certificate]{}, crls: map[string]parsed[[]*cred.CRL]{}}
	for _, r := range c.rules {
		if !r.usesCerts() || !r.unsupported(nil) {
			continue
		}
		if uses(r.local, certs...) {
			ld.own(r)
		}
		if uses(r.remote, certs...) {
			ld.trust(r)
		}
	}
	return ld.l.All()
}

// fail reports what is wrong with the file of p.
func (ld *loader) fail(p *param, format string, a ...any) {
	ld.l.errorf(p.vpos, "%s %s: %s", p.word, shown(p.text), fmt.Sprintf(format, a...))
}

func (ld *loader) warn(p *param, format string, a ...any) {
	ld.l.warnf(p.vpos, "%s %s: %s", p.word, shown(p.text), fmt.Sprintf(format, a...))
}

// path of a file that the configuration, or with its directory another file, names.
func path(dir, name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(dir, name)
}

func (ld *loader) path(p *param) string { return path(filepath.Dir(ld.c.Path), p.text) }

func (ld *loader) certificates(p *param) ([]*x509.Certificate, bool) {
	name := ld.path(p)
	f, seen := ld.certs[name]
	if !seen {
		var b []byte
		if b, f.err = read(ld.fsys, name, public, MaxFile); f.err == nil {
			f.v, f.err = cred.ParseCertificates(b)
		}
		ld.certs[name] = f
	}
	if f.err != nil {
		ld.fail(p, "%v", f.err)
	}
	return f.v, f.err == nil
}

func (ld *loader) revocations(p *param) ([]*cred.CRL, bool) {
	name := ld.path(p)
	f, seen := ld.crls[name]
	if !seen {
		var b []byte
		if b, f.err = read(ld.fsys, name, public, maxCRL); f.err == nil {
			f.v, f.err = cred.ParseCRLs(b)
		}
		ld.crls[name] = f
	}
	if f.err != nil {
		ld.fail(p, "%v", f.err)
		return nil, false
	}
	for _, l := range f.v {
		if l.Stale(ld.now) {
			ld.warn(p, "out of date since %s", day(l.NextUpdate()))
		}
	}
	return f.v, true
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

// passphrase of a key file, from the secrets.
func (ld *loader) passphrase(name string) ipsec.Key {
	for _, s := range ld.c.secrets {
		if s.keyFile != "" && path(filepath.Dir(ld.c.SecretsPath), s.keyFile) == name {
			return s.phrase
		}
	}
	return ipsec.Key{}
}

// kinds of keys that the methods want.
var kinds = map[string]cred.KeyType{"rsa_sig": cred.RSA, "ecdsa_sig": cred.ECDSA, "eddsa_sig": cred.EdDSA}

var hashIDs = map[string]ikev2.HashID{
	"sha1": ikev2.HashSHA1, "sha256": ikev2.HashSHA256, "sha384": ikev2.HashSHA384, "sha512": ikev2.HashSHA512, "identity": ikev2.HashIdentity,
}

func (r *rule) signatures() cred.Policy {
	p := cred.Policy{
		PSS:  map[string]cred.PSS{"prefer": cred.PSSPrefer, "require": cred.PSSRequire, "no": cred.PSSNo}[r.get("rsa_pss").text],
		Weak: r.is("allow_weak", "yes"),
	}
	for _, i := range r.get("sig_hash").items {
		p.Hashes = append(p.Hashes, hashIDs[i.text])
	}
	return p
}

// own loads what the rule proves our identity by.
func (ld *loader) own(r *rule) {
	cert, key, policy := r.get("cert_file"), r.get("key_file"), r.signatures()
	id := fmt.Sprint(ld.path(cert), "\n", ld.path(key), "\n", policy)
	o, seen := ld.owns[id]
	if !seen {
		o = ld.readOwn(cert, key, policy)
		ld.owns[id] = o
	}
	if o == nil {
		return
	}
	if want := kinds[r.local[0].text]; want != 0 && o.Kind() != want {
		ld.fail(cert, "has an %v key; %s wants %v", o.Kind(), r.local[0].text, want)
		return
	}
	if r.ownName = ld.name(r, o, cert); !r.ownName.IsZero() {
		r.cert = o
	}
}

func (ld *loader) readOwn(cert, key *param, policy cred.Policy) *cred.Own {
	chain, ok := ld.certificates(cert)
	name := ld.path(key)
	b, err := read(ld.fsys, name, private, MaxFile)
	defer clear(b)
	if err != nil {
		ld.fail(key, "%v", err)
		return nil
	}
	k, err := cred.ParseKey(b, ld.passphrase(name).Bytes())
	switch {
	case errors.Is(err, cred.ErrEncrypted):
		ld.fail(key, "encrypted; add its passphrase to %s", ld.c.SecretsPath)
		return nil
	case err != nil:
		ld.fail(key, "%v", err)
		return nil
	case !ok:
		return nil
	}
	o, err := cred.NewOwn(chain, k, policy)
	switch {
	case errors.Is(err, cred.ErrMismatch):
		ld.fail(key, "%v", err)
		return nil
	case err != nil:
		ld.fail(cert, "%v", err)
		return nil
	}
	ld.expiry(cert, chain)
	return o
}

// expiry warns of certificates that are not valid now.
func (ld *loader) expiry(p *param, certs []*x509.Certificate) {
	for _, c := range certs {
		switch {
		case ld.now.After(c.NotAfter):
			ld.warn(p, "expired %s", day(c.NotAfter))
		case ld.now.Before(c.NotBefore):
			ld.warn(p, "not valid before %s", day(c.NotBefore))
		}
	}
}

// wireTypes of identities that a certificate can hold.
var wireTypes = map[string]ikev2.IDType{typeFQDN: ikev2.IDFQDN, typeEmail: ikev2.IDRFC822Addr, typeDN: ikev2.IDDERASN1DN, typeIP: ikev2.IDIPv4Addr}

// name finds who we are: as configured, else what the certificate says.
func (ld *loader) name(r *rule, o *cred.Own, cert *param) pad.ID {
	if p := r.get("local_id"); p != nil {
		id := p.id.exact()
		if n, err := dn.ParseText(p.id.data); p.id.typ == typeDN && err == nil {
			if subject, ok := o.Subject(n); ok { // in the encoding and order of the certificate
				id.Data = string(subject)
			}
		}
		if err := o.Holds(id.Wire()); err != nil {
			ld.warn(p, "%v", err)
		}
		return id
	}
	if p := r.get("local_id_type"); p != nil {
		t := exactTypes[p.text]
		id, ok := o.IdentityOf(wireTypes[t])
		if !ok && t == typeIP {
			id, ok = o.IdentityOf(ikev2.IDIPv6Addr)
		}
		if !ok {
			ld.l.errorf(p.vpos, "%s %s: cert_file holds none", p.word, shown(strings.ToLower(p.text)))
		}
		return pad.FromWire(id)
	}
	id, ok := o.Identity()
	if !ok {
		ld.fail(cert, "holds no identity")
	}
	return pad.FromWire(id)
}

// trust loads whom the rule believes.
func (ld *loader) trust(r *rule) {
	policy := r.signatures()
	var id strings.Builder
	for _, key := range []string{"ca_file", "peer_cert_file", "crl_file", "required_issuer"} {
		for _, p := range r.list(key) {
			fmt.Fprintln(&id, key, p.text)
		}
	}
	fmt.Fprintln(&id, r.get("revocation").text, r.remote[0].text, policy)
	t, seen := ld.trusts[id.String()]
	if !seen {
		t = ld.readTrust(r, policy)
		ld.trusts[id.String()] = t
	}
	r.trust = t
}

func (ld *loader) readTrust(r *rule, policy cred.Policy) *cred.Trust {
	c := cred.TrustConfig{
		Key: kinds[r.remote[0].text], Policy: policy,
		Revocation: map[string]cred.Revocation{
			"none": cred.RevocationNone, "relaxed": cred.RevocationRelaxed, "ifuri": cred.RevocationIfURI, "strict": cred.RevocationStrict,
		}[r.get("revocation").text],
	}
	good := true
	for _, p := range r.list("ca_file") {
		cs, ok := ld.certificates(p)
		good = good && ok
		ld.expiry(p, cs)
		c.CAs = append(c.CAs, cs...)
	}
	for _, p := range r.list("peer_cert_file") {
		cs, ok := ld.certificates(p)
		good = good && ok
		ld.expiry(p, cs)
		c.Pinned = append(c.Pinned, cs...)
	}
	for _, p := range r.list("crl_file") {
		ls, ok := ld.revocations(p)
		good = good && ok
		c.CRLs = append(c.CRLs, ls...)
	}
	for _, p := range r.list("required_issuer") {
		n, err := dn.ParseText(p.text)
		if err != nil {
			ld.fail(p, "%v", err)
			good = false
		}
		c.Issuers = append(c.Issuers, n)
	}
	if rev := r.get("revocation"); c.Revocation == cred.RevocationStrict && len(c.CRLs) == 0 && good {
		ld.l.warnf(rev.vpos, "rule %s: revocation strict without crl_file refuses every peer", shown(r.label))
	}
	if !good {
		return nil
	}
	t, err := cred.NewTrust(c)
	if err != nil { // complete() wants one or the other
		ld.l.errorf(r.b.pos, "rule %s: %v", shown(r.label), err)
		return nil
	}
	return t
}
