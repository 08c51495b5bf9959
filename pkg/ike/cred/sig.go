package cred

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // for Policy.Hashes that list it
	_ "crypto/sha256"
	_ "crypto/sha512"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/missiu/missiu/proto/ikev2"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// KeyType is the kind of a public key.
type KeyType uint8

// Key types; 0 stands for any.
const (
	RSA KeyType = 1 + iota
	ECDSA
	EdDSA
)

func (k KeyType) String() string {
	switch k {
	case RSA:
		return "RSA"
	case ECDSA:
		return "ECDSA"
	case EdDSA:
		return "Ed25519"
	}
	return fmt.Sprintf("KeyType(%d)", uint8(k))
}

// PSS says which of RSA's two signature schemes is used.
type PSS uint8

// RSASSA-PSS is sent, both are taken; only PSS; PKCS #1 v1.5 is sent, both are taken.
const (
	PSSPrefer PSS = iota
	PSSRequire
	PSSNo
)

// Policy says which signatures are made and taken.
type Policy struct {
	// Hashes are those that may be used, best first; they are what we announce.
	// SHA-1 is weak (RFC 8247, 4.2), and the caller's choice.
	Hashes []ikev2.HashID
	PSS    PSS
	// Weak lets RSA keys of 1024 to 2047 bits pass (RFC 8247, 4.1.1).
	Weak bool
}

// Sizes of RSA moduli in bits. More than maxRSA would let a stranger choose how
// long we compute.
const (
	minRSA     = 2048
	minRSAWeak = 1024
	maxRSA     = 8192
)

var hashes = map[ikev2.HashID]crypto.Hash{
	ikev2.HashSHA1: crypto.SHA1, ikev2.HashSHA256: crypto.SHA256, ikev2.HashSHA384: crypto.SHA384, ikev2.HashSHA512: crypto.SHA512,
}

func digest(h ikev2.HashID, octets []byte) []byte {
	d := hashes[h].New()
	d.Write(octets)
	return d.Sum(nil)
}

// Object identifiers of RFC 7427, appendix A, and RFC 8420, appendix A.
var (
	oidMGF1    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 8}
	oidPSS     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 10}
	oidEd25519 = asn1.ObjectIdentifier{1, 3, 101, 112}

	rsaOIDs = map[ikev2.HashID]asn1.ObjectIdentifier{
		ikev2.HashSHA1:   {1, 2, 840, 113549, 1, 1, 5},
		ikev2.HashSHA256: {1, 2, 840, 113549, 1, 1, 11},
		ikev2.HashSHA384: {1, 2, 840, 113549, 1, 1, 12},
		ikev2.HashSHA512: {1, 2, 840, 113549, 1, 1, 13},
	}
	ecdsaOIDs = map[ikev2.HashID]asn1.ObjectIdentifier{
		ikev2.HashSHA1:   {1, 2, 840, 10045, 4, 1},
		ikev2.HashSHA256: {1, 2, 840, 10045, 4, 3, 2},
		ikev2.HashSHA384: {1, 2, 840, 10045, 4, 3, 3},
		ikev2.HashSHA512: {1, 2, 840, 10045, 4, 3, 4},
	}
	hashOIDs = map[ikev2.HashID]asn1.ObjectIdentifier{
		ikev2.HashSHA1:   {1, 3, 14, 3, 2, 26},
		ikev2.HashSHA256: {2, 16, 840, 1, 101, 3, 4, 2, 1},
		ikev2.HashSHA384: {2, 16, 840, 1, 101, 3, 4, 2, 2},
		ikev2.HashSHA512: {2, 16, 840, 1, 101, 3, 4, 2, 3},
	}
)

func hashOf(oids map[ikev2.HashID]asn1.ObjectIdentifier, oid asn1.ObjectIdentifier) (ikev2.HashID, bool) {
	for h, o := range oids {
		if o.Equal(oid) {
			return h, true
		}
	}
	return 0, false
}

// scheme is one way to sign.
type scheme struct {
	key  KeyType
	hash ikev2.HashID
	pss  bool
	salt int // of PSS, octets
}

func (s scheme) String() string {
	switch {
	case s.key == EdDSA:
		return "Ed25519"
	case s.pss:
		return "RSASSA-PSS with " + s.hash.String()
	case s.key == RSA:
		return "RSASSA-PKCS1-v1_5 with " + s.hash.String()
	}
	return "ECDSA with " + s.hash.String()
}

// appendIdentifier appends the AlgorithmIdentifier of RFC 7427, 3, in the exact
// octets of its appendix A.
func (s scheme) appendIdentifier(b *cryptobyte.Builder) {
	alg := func(b *cryptobyte.Builder, oid asn1.ObjectIdentifier, params func(*cryptobyte.Builder)) {
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(oid)
			if params != nil {
				params(b)
			}
		})
	}
	null := func(b *cryptobyte.Builder) { b.AddASN1NULL() }
	hash := func(b *cryptobyte.Builder) { alg(b, hashOIDs[s.hash], null) }
	switch {
	case s.key == EdDSA:
		alg(b, oidEd25519, nil)
	case s.key == ECDSA:
		alg(b, ecdsaOIDs[s.hash], nil)
	case !s.pss:
		alg(b, rsaOIDs[s.hash], null)
	default:
		alg(b, oidPSS, func(b *cryptobyte.Builder) {
			b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1(der.Tag(0).ContextSpecific().Constructed(), hash)
				b.AddASN1(der.Tag(1).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { alg(b, oidMGF1, hash) })
				b.AddASN1(der.Tag(2).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Int64(int64(s.salt)) })
			})
		})
	}
}

var errSigForm = errors.New("AUTH is not in the form of RFC 7427")

// parseSignature takes the data of a Digital Signature AUTH apart (RFC 7427, 3).
func parseSignature(data []byte) (s scheme, sig []byte, err error) {
	in := cryptobyte.String(data)
	var id, seq, params cryptobyte.String
	var oid asn1.ObjectIdentifier
	if !in.ReadUint8LengthPrefixed(&id) || !id.ReadASN1(&seq, der.SEQUENCE) || !id.Empty() || !seq.ReadASN1ObjectIdentifier(&oid) {
		return s, nil, errSigForm
	}
	if h, ok := hashOf(rsaOIDs, oid); ok {
		if !nullOrNothing(seq) {
			return s, nil, errSigForm
		}
		return scheme{key: RSA, hash: h}, in, nil
	}
	if h, ok := hashOf(ecdsaOIDs, oid); ok {
		if !nullOrNothing(seq) {
			return s, nil, errSigForm
		}
		return scheme{key: ECDSA, hash: h}, in, nil
	}
	switch {
	case oid.Equal(oidEd25519):
		if !seq.Empty() {
			return s, nil, errSigForm
		}
		return scheme{key: EdDSA, hash: ikev2.HashIdentity}, in, nil
	case !oid.Equal(oidPSS):
		return s, nil, fmt.Errorf("signature algorithm %v is not supported", oid)
	case !seq.ReadASN1(&params, der.SEQUENCE) || !seq.Empty():
		return s, nil, errSigForm
	}
	s, err = parsePSS(params)
	return s, in, err
}

func nullOrNothing(s cryptobyte.String) bool {
	var null cryptobyte.String
	return s.Empty() || s.ReadASN1(&null, der.NULL) && null.Empty() && s.Empty()
}

// parsePSS reads RSASSA-PSS-params (RFC 8017, A.2.3); what is left out has the
// default.
func parsePSS(in cryptobyte.String) (s scheme, err error) {
	s = scheme{key: RSA, hash: ikev2.HashSHA1, pss: true, salt: 20}
	tag := func(n uint8) der.Tag { return der.Tag(n).ContextSpecific().Constructed() }
	hash := func(in cryptobyte.String) (ikev2.HashID, bool) {
		var seq cryptobyte.String
		var oid asn1.ObjectIdentifier
		if !in.ReadASN1(&seq, der.SEQUENCE) || !in.Empty() || !seq.ReadASN1ObjectIdentifier(&oid) || !nullOrNothing(seq) {
			return 0, false
		}
		return hashOf(hashOIDs, oid)
	}
	var h, mgf, salt, trailer, seq cryptobyte.String
	var hasHash, hasMGF, hasSalt, hasTrailer bool
	if !in.ReadOptionalASN1(&h, &hasHash, tag(0)) || !in.ReadOptionalASN1(&mgf, &hasMGF, tag(1)) ||
		!in.ReadOptionalASN1(&salt, &hasSalt, tag(2)) || !in.ReadOptionalASN1(&trailer, &hasTrailer, tag(3)) || !in.Empty() {
		return s, errSigForm
	}
	ok := true
	if hasHash {
		s.hash, ok = hash(h)
	}
	inner := ikev2.HashSHA1
	if hasMGF && ok {
		var oid asn1.ObjectIdentifier
		if !mgf.ReadASN1(&seq, der.SEQUENCE) || !mgf.Empty() || !seq.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(oidMGF1) {
			return s, errSigForm
		}
		inner, ok = hash(seq)
	}
	if hasSalt && ok {
		ok = salt.ReadASN1Integer(&s.salt) && salt.Empty() && s.salt >= 0 && s.salt <= maxRSA/8
	}
	if t := 1; hasTrailer && ok {
		ok = trailer.ReadASN1Integer(&t) && trailer.Empty() && t == 1
	}
	switch {
	case !ok:
		return s, errSigForm
	case inner != s.hash:
		return s, fmt.Errorf("RSASSA-PSS with %v and MGF1 with %v is not supported", s.hash, inner)
	}
	return s, nil
}

// keyType classifies a public key; the error says what is wrong with it.
func (p Policy) keyType(pub crypto.PublicKey) (KeyType, error) {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		least := minRSA
		if p.Weak {
			least = minRSAWeak
		}
		switch n := k.N.BitLen(); {
		case n < least:
			return RSA, fmt.Errorf("RSA key of %d bits: want at least %d", n, least)
		case n > maxRSA:
			return RSA, fmt.Errorf("RSA key of %d bits: want at most %d", n, maxRSA)
		}
		return RSA, nil
	case *ecdsa.PublicKey:
		if curveHash(k.Curve) == 0 {
			return ECDSA, fmt.Errorf("ECDSA key on %s: want P-256, P-384 or P-521", k.Params().Name)
		}
		return ECDSA, nil
	case ed25519.PublicKey:
		return EdDSA, nil
	}
	return 0, errors.New("key of a kind that is not supported")
}

// curveHash is the hash that RFC 4754 ties to a curve; 0 for other curves.
func curveHash(c elliptic.Curve) ikev2.HashID {
	switch c {
	case elliptic.P256():
		return ikev2.HashSHA256
	case elliptic.P384():
		return ikev2.HashSHA384
	case elliptic.P521():
		return ikev2.HashSHA512
	}
	return 0
}

var oldECDSA = map[ikev2.HashID]ikev2.AuthMethod{
	ikev2.HashSHA256: ikev2.AuthECDSA256, ikev2.HashSHA384: ikev2.AuthECDSA384, ikev2.HashSHA512: ikev2.AuthECDSA521,
}

// choose finds how to sign with a key. announced are the hashes that the peer
// can verify (SIGNATURE_HASH_ALGORITHMS); nil: it did not say so, and gets one of
// the methods of before RFC 7427.
func (p Policy) choose(pub crypto.PublicKey, announced []ikev2.HashID) (m ikev2.AuthMethod, s scheme, err error) {
	kt, err := p.keyType(pub)
	if err != nil {
		return 0, s, err
	}
	both := func(h ikev2.HashID) bool {
		return slices.Contains(p.Hashes, h) && (announced == nil || slices.Contains(announced, h))
	}
	s.key = kt
	if kt == ECDSA {
		s.hash = curveHash(pub.(*ecdsa.PublicKey).Curve)
	}
	if announced == nil {
		switch {
		case kt == ECDSA && both(s.hash):
			return oldECDSA[s.hash], s, nil
		case kt == ECDSA:
			return 0, s, fmt.Errorf("peer announces no signature hashes, so that our ECDSA key needs %v, which sig_hash does not allow", s.hash)
		case kt == RSA && p.PSS == PSSRequire:
			return 0, s, errors.New("peer announces no signature hashes, so that RSASSA-PSS cannot be used (rsa_pss require)")
		case kt == RSA && both(ikev2.HashSHA1):
			s.hash = ikev2.HashSHA1
			return ikev2.AuthRSA, s, nil
		case kt == RSA:
			return 0, s, errors.New("peer announces no signature hashes, so that our RSA key needs SHA-1, which sig_hash does not allow")
		}
		return 0, s, errors.New("peer announces no signature hashes, without which our Ed25519 key cannot be used")
	}
	refused := func() error {
		return fmt.Errorf("peer can verify %v only; our %v key may use %v", announced, kt, p.Hashes)
	}
	switch {
	case kt == EdDSA:
		if s.hash = ikev2.HashIdentity; !both(s.hash) {
			return 0, s, refused()
		}
		return ikev2.AuthSignature, s, nil
	case kt == ECDSA && both(s.hash): // as strong as the curve
		return ikev2.AuthSignature, s, nil
	}
	for _, h := range p.Hashes {
		if h == ikev2.HashIdentity || !both(h) {
			continue
		}
		s.hash = h
		if kt == RSA && p.PSS != PSSNo {
			s.pss, s.salt = true, hashes[h].Size()
		}
		return ikev2.AuthSignature, s, nil
	}
	return 0, s, refused()
}

// sign makes an AUTH payload over octets (RFC 7296, 2.15).
func (p Policy) sign(key crypto.Signer, announced []ikev2.HashID, octets []byte) (*ikev2.Auth, error) {
	m, s, err := p.choose(key.Public(), announced)
	if err != nil {
		return nil, err
	}
	var sig []byte
	switch {
	case s.key == EdDSA:
		sig, err = key.Sign(rand.Reader, octets, crypto.Hash(0))
	case s.pss:
		sig, err = key.Sign(rand.Reader, digest(s.hash, octets), &rsa.PSSOptions{SaltLength: s.salt, Hash: hashes[s.hash]})
	default:
		sig, err = key.Sign(rand.Reader, digest(s.hash, octets), hashes[s.hash])
	}
	if err != nil {
		return nil, fmt.Errorf("signing by %v: %w", s, err)
	}
	switch m {
	case ikev2.AuthRSA:
		return &ikev2.Auth{Method: m, Data: sig}, nil
	case ikev2.AuthSignature:
		var id, b cryptobyte.Builder
		s.appendIdentifier(&id)
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(id.BytesOrPanic()) })
		b.AddBytes(sig)
		data, err := b.Bytes()
		return &ikev2.Auth{Method: m, Data: data}, err
	}
	data, err := concatenated(key.Public().(*ecdsa.PublicKey).Curve, sig)
	return &ikev2.Auth{Method: m, Data: data}, err
}

// concatenated turns an ECDSA signature in DER into r and s side by side, each as
// long as the field (RFC 4754, 7).
func concatenated(c elliptic.Curve, sig []byte) ([]byte, error) {
	in := cryptobyte.String(sig)
	var seq cryptobyte.String
	var r, s big.Int
	if !in.ReadASN1(&seq, der.SEQUENCE) || !seq.ReadASN1Integer(&r) || !seq.ReadASN1Integer(&s) {
		return nil, errors.New("ECDSA signature is not in DER")
	}
	n := (c.Params().BitSize + 7) / 8
	out := make([]byte, 2*n)
	r.FillBytes(out[:n])
	s.FillBytes(out[n:])
	return out, nil
}

// inDER is the opposite of concatenated.
func inDER(c elliptic.Curve, sig []byte) ([]byte, error) {
	n := (c.Params().BitSize + 7) / 8
	if len(sig) != 2*n {
		return nil, fmt.Errorf("ECDSA signature of %d octets: want %d", len(sig), 2*n)
	}
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1BigInt(new(big.Int).SetBytes(sig[:n]))
		b.AddASN1BigInt(new(big.Int).SetBytes(sig[n:]))
	})
	return b.Bytes()
}

var errSignature = errors.New("AUTH does not verify: not signed with the key of the certificate")

// verify checks an AUTH payload over octets, and that its method is one that we
// take.
func (p Policy) verify(pub crypto.PublicKey, a *ikev2.Auth, octets []byte) error {
	kt, err := p.keyType(pub)
	if err != nil {
		return err
	}
	s, sig := scheme{key: kt}, a.Data
	switch a.Method {
	case ikev2.AuthRSA:
		if kt != RSA {
			return fmt.Errorf("method %v with an %v key", a.Method, kt)
		}
		return p.verifyOldRSA(pub.(*rsa.PublicKey), octets, sig)
	case ikev2.AuthECDSA256, ikev2.AuthECDSA384, ikev2.AuthECDSA521:
		k, ok := pub.(*ecdsa.PublicKey)
		if !ok || oldECDSA[curveHash(k.Curve)] != a.Method {
			return fmt.Errorf("method %v with another key", a.Method)
		}
		s.hash = curveHash(k.Curve)
		if sig, err = inDER(k.Curve, sig); err != nil {
			return err
		}
	case ikev2.AuthSignature:
		if s, sig, err = parseSignature(a.Data); err != nil {
			return err
		}
		if s.key != kt {
			return fmt.Errorf("signed by %v, but the certificate has an %v key", s, kt)
		}
	default:
		return fmt.Errorf("authentication method %v: want a signature", a.Method)
	}
	switch {
	case !slices.Contains(p.Hashes, s.hash):
		return fmt.Errorf("signed by %v: sig_hash allows %v", s, p.Hashes)
	case kt == RSA && !s.pss && p.PSS == PSSRequire:
		return fmt.Errorf("signed by %v: rsa_pss is require", s)
	}
	ok := false
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if s.pss {
			// To crypto/rsa a salt of 0 octets stands for one of any length.
			ok = rsa.VerifyPSS(k, hashes[s.hash], digest(s.hash, octets), sig, &rsa.PSSOptions{SaltLength: s.salt}) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(k, hashes[s.hash], digest(s.hash, octets), sig) == nil
		}
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, digest(s.hash, octets), sig)
	case ed25519.PublicKey:
		ok = len(sig) == ed25519.SignatureSize && ed25519.Verify(k, octets, sig)
	}
	if !ok {
		return errSignature
	}
	return nil
}

// verifyOldRSA checks method 1, which does not tell its hash: mostly SHA-1, but a
// peer may choose another (RFC 7296, 3.8).
func (p Policy) verifyOldRSA(k *rsa.PublicKey, octets, sig []byte) error {
	if p.PSS == PSSRequire {
		return fmt.Errorf("method %v: rsa_pss is require", ikev2.AuthRSA)
	}
	for _, h := range []ikev2.HashID{ikev2.HashSHA1, ikev2.HashSHA256, ikev2.HashSHA384, ikev2.HashSHA512} {
		if rsa.VerifyPKCS1v15(k, hashes[h], digest(h, octets), sig) != nil {
			continue
		}
		if !slices.Contains(p.Hashes, h) {
			return fmt.Errorf("method %v with %v: sig_hash allows %v", ikev2.AuthRSA, h, p.Hashes)
		}
		return nil
	}
	return errSignature
}

// ParseHashes reads the data of SIGNATURE_HASH_ALGORITHMS (RFC 7427, 4): two
// octets for each; unknown ones are kept. The result is not nil.
func ParseHashes(data []byte) ([]ikev2.HashID, error) {
	if len(data)%2 != 0 {
		return nil, fmt.Errorf("SIGNATURE_HASH_ALGORITHMS of %d octets", len(data))
	}
	out := make([]ikev2.HashID, 0, len(data)/2)
	for d := data; len(d) > 0; d = d[2:] {
		out = append(out, ikev2.HashID(d[0])<<8|ikev2.HashID(d[1]))
	}
	return out, nil
}

// AppendHashes is the opposite of ParseHashes.
func AppendHashes(b []byte, hs []ikev2.HashID) []byte {
	for _, h := range hs {
		b = append(b, byte(h>>8), byte(h))
	}
	return b
}

// samePublic reports whether two public keys are the same.
func samePublic(a, b crypto.PublicKey) bool {
	if e, ok := a.(ed25519.PublicKey); ok {
		f, ok := b.(ed25519.PublicKey)
		return ok && bytes.Equal(e, f)
	}
	e, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && e.Equal(b)
}
