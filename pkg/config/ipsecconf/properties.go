package ipsecconf

import (
	"net/netip"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// transform is what the properties of one alternative ask for.
type transform struct {
	proposal      ipsec.Proposal
	local, remote netip.Addr // tunnel end points as written, else invalid
	flags         ipsec.PolicyFlags
}

// transform reads the properties of an alternative.
func (m *entryMeaning) transform(a Alternative, ps params) (t transform) {
	switch a.Action.Text {
	case "ipsec", "apply", "permit":
	default:
		for _, p := range a.Properties {
			if p.Key.Text != "dir" {
				m.errorf(p.Key, "%s: not with %s", p.Key.Text, a.Action.Text)
			}
		}
		return t
	}
	before := m.bad
	m.algorithms(a, ps, &t.proposal, before)
	m.unauthenticated(ps)
	m.endPoints(ps, &t)
	if p, ok := ps["sa"]; ok {
		switch p.Value.Text {
		case "shared":
		case "unique":
			t.flags = ipsec.PolicyPerFlow
		case "init":
			t.flags = ipsec.PolicyInit
			m.initPeer(p, &t)
		default:
			m.badValue(p, "want shared, unique or init")
		}
	}
	if p, ok := ps["lifetime_secs"]; ok {
		n, ok := number(p.Value.Text, 1<<32-1)
		if !ok || n == 0 {
			m.badValue(p, "want a number of seconds from 1 to 4294967295")
		}
		t.proposal.Hard.AddTime = time.Duration(n) * time.Second
	}
	if p, ok := ps["lifetime_bytes"]; ok {
		n, ok := number(p.Value.Text, 1<<63-1)
		if !ok || n == 0 {
			m.badValue(p, "want a number of bytes from 1 to 9223372036854775807")
		}
		t.proposal.Hard.Bytes = n
	}
	t.proposal.Soft = soft(t.proposal.Hard)
	return t
}

// unauthenticated warns of encryption for which no authentication is asked, as
// Solaris does. SAs that are negotiated have it all the same.
func (m *entryMeaning) unauthenticated(ps params) {
	asks := func(key string) bool {
		p, ok := ps[key]
		return ok && !strings.EqualFold(p.Value.Text, "none")
	}
	p, ok := ps["encr_algs"]
	w, valid := splitAlg(p.Value.Text)
	e, known := encrs[w.name]
	if !ok || !valid || asks("encr_auth_algs") || asks("auth_algs") || w.name != "any" && !known || e == alg.EncrNULL || e.Info().AEAD || e.Info().Old {
		return
	}
	m.l.Warnf(p.Value.Pos, "encr_algs %s: encryption without authentication; any is negotiated with it, encr_auth_algs says which", w.name)
}

// initPeer: what is negotiated at load needs to know with whom.
func (m *entryMeaning) initPeer(p Param, t *transform) {
	if t.remote.IsValid() {
		if ipsec.Open(t.remote) {
			m.l.Warnf(p.Value.Pos, "sa init: no peer is named; one that asks gets SAs")
		}
		return
	}
	for _, side := range [][]netip.Prefix{m.src, m.dst} {
		for _, q := range side {
			if q.IsSingleIP() {
				return
			}
		}
	}
	m.l.Warnf(p.Value.Pos, "sa init: no peer is named; negotiated when the first packet comes")
}

// algorithms reads encr_algs, encr_auth_algs, auth_algs and what belongs to them.
func (m *entryMeaning) algorithms(a Alternative, ps params, out *ipsec.Proposal, bad bool) {
	e, hasEncr := m.encryption(ps, out)
	auth, hasAuth := m.integrity(ps, "encr_auth_algs", &out.Auth)
	_, hasAH := m.integrity(ps, "auth_algs", &out.AH)
	esp := hasEncr || hasAuth
	switch {
	case hasAH && esp:
		out.Shape = ipsec.ShapeAHESP
	case hasAH:
		out.Shape = ipsec.ShapeAH
	}
	switch {
	case m.bad && !bad:
	case !esp && !hasAH:
		if !bad {
			m.errorf(a.Action, "%s: no algorithms; want encr_algs, encr_auth_algs or auth_algs", a.Action.Text)
		}
	case !hasEncr:
		if esp {
			out.Encr = alg.EncrNULL
		}
		for _, key := range []string{"keylength", "tag"} {
			if p, ok := ps[key]; ok {
				m.missing(p.Key, "%s: encr_algs missing", key)
			}
		}
	case out.Encr.Info().AEAD && out.Auth != alg.IntegNone:
		m.badValue(auth, "not with %s, which has integrity of its own", e.Value.Text)
	case out.Encr.Info().Old && out.Auth != alg.IntegNone:
		m.badValue(auth, "not with %s, which has no place for integrity", e.Value.Text)
	}
	if w := Legacy(out.Encr, out.Auth, out.AH); w != "" {
		m.l.Warnf(a.Action.Pos, "%s: %s", a.Action.Text, w)
	}
}

// encryption reads encr_algs, keylength and tag.
func (m *entryMeaning) encryption(ps params, out *ipsec.Proposal) (p Param, ok bool) {
	if p, ok = ps["encr_algs"]; !ok {
		return p, false
	}
	w, valid := splitAlg(p.Value.Text)
	e, known := encrs[w.name]
	switch {
	case !valid:
		m.badValue(p, wantEncr)
		return p, false
	case w.name == "none" && !w.ranged:
		return p, false
	case w.name == "any":
		e = alg.EncrNone
	case foreignEncrs[w.name]:
		m.badValue(p, "not supported; %s", wantEncr)
		return p, false
	case !known:
		m.badValue(p, wantEncr)
		return p, false
	}
	sizes := e.Info().KeyBits
	if w.name == "any" {
		sizes = alg.EncrAESCBC.Info().KeyBits
	}
	switch {
	case w.ranged && sizes == nil:
		m.badValue(p, "the algorithm has no key length")
		return p, false
	case w.ranged && !w.fits(sizes):
		m.badValue(p, "key length; want %s bits", bitList(sizes))
		return p, false
	}
	if k, ok := ps["keylength"]; ok {
		n, valid := number(k.Value.Text, 8191)
		one := algWord{min: uint16(n * 8), max: uint16(n * 8)}
		switch {
		case w.ranged:
			m.errorf(k.Key, "keylength: not with the key length in %s", p.Value.Text)
			return p, false
		case sizes == nil:
			m.errorf(k.Key, "keylength: %s has no key length", p.Value.Text)
			return p, false
		case !valid || n == 0 || !one.fits(sizes):
			m.badValue(k, "key length in bytes; want %s", byteList(sizes))
			return p, false
		}
		w.min, w.max = one.min, one.max
	}
	if g, ok := ps["tag"]; ok && !m.tag(g, p, &e) {
		return p, false
	}
	out.Encr, out.EncrMinBits, out.EncrMaxBits = e, w.min, w.max
	return p, true
}

// tag takes the length of an AEAD's ICV in octets.
func (m *entryMeaning) tag(g, p Param, e *alg.Encr) bool {
	if !e.Info().AEAD {
		m.errorf(g.Key, "tag: only with gcm, ccm, gmac or chacha20-poly1305")
		return false
	}
	n, ok := number(g.Value.Text, 255)
	switch {
	case ok && int(n) == e.Info().ICVLen:
		return true
	case *e == alg.EncrChaCha20Poly1305, *e == alg.EncrNULLAESGMAC:
		m.badValue(g, "want 16")
		return false
	}
	name, _, _ := strings.Cut(strings.ToLower(p.Value.Text), "(")
	shorter, ok := map[string]map[uint64]alg.Encr{
		"gcm": {8: alg.EncrAESGCM8, 12: alg.EncrAESGCM12},
		"ccm": {8: alg.EncrAESCCM8, 12: alg.EncrAESCCM12},
	}[strings.TrimPrefix(name, "aes-")]
	if !ok {
		m.badValue(g, "not with %s", p.Value.Text)
		return false
	}
	if *e, ok = shorter[n]; !ok {
		m.badValue(g, "want 8, 12 or 16")
	}
	return ok
}

// integrity reads encr_auth_algs or auth_algs.
func (m *entryMeaning) integrity(ps params, key string, out *alg.Integ) (p Param, ok bool) {
	if p, ok = ps[key]; !ok {
		return p, false
	}
	ah, want := key == "auth_algs", wantAuth
	if ah {
		want = wantAH
	}
	w, valid := splitAlg(p.Value.Text)
	w.name = strings.TrimPrefix(w.name, "hmac-")
	a, known := auths[w.name]
	switch {
	case !valid:
		m.badValue(p, "%s", want)
		return p, false
	case w.name == "none" && !w.ranged:
		return p, false
	case w.name == "any":
		return p, true // what IntegNone means
	case foreignAuths[w.name]:
		m.badValue(p, "not supported; %s", want)
		return p, false
	case !known:
		m.badValue(p, "%s", want)
		return p, false
	case a.Info().AHOnly && !ah:
		m.badValue(p, "of AH alone; %s", wantAuth)
		return p, false
	case w.ranged && !w.holds((a.Info().KeyLen-a.Info().SaltLen)*8):
		m.badValue(p, "key length; want %d bits", (a.Info().KeyLen-a.Info().SaltLen)*8)
		return p, false
	}
	*out = a
	return p, true
}

// endPoints reads the ends of a tunnel, both or none.
func (m *entryMeaning) endPoints(ps params, t *transform) {
	for _, pair := range [][2]string{{"tladdr", "traddr"}, {"tsrc", "tdst"}} {
		l, hasL := ps[pair[0]]
		r, hasR := ps[pair[1]]
		switch {
		case hasL && !hasR:
			m.missing(l.Key, "%s: %s missing", pair[0], pair[1])
		case hasR && !hasL:
			m.missing(r.Key, "%s: %s missing", pair[1], pair[0])
		case hasL:
			t.local, t.remote = m.tunnelEnd(l), m.tunnelEnd(r)
			// The open end is of the family of the other.
			if ipsec.Open(t.local) && t.remote.Is6() {
				t.local = netip.IPv6Unspecified()
			}
			if ipsec.Open(t.remote) && t.local.Is6() {
				t.remote = netip.IPv6Unspecified()
			}
			if t.local.IsValid() && t.remote.IsValid() && t.local.BitLen() != t.remote.BitLen() {
				m.badValue(r, "mixed address families")
			}
		}
	}
}

// tunnelEnd reads an end point of a tunnel, which "any" leaves open.
func (m *entryMeaning) tunnelEnd(p Param) netip.Addr {
	if _, ok := m.consts["any"]; p.Value.Text == "any" && !ok {
		return netip.IPv4Unspecified()
	}
	return m.endPoint(p)
}

func (m *entryMeaning) endPoint(p Param) netip.Addr {
	as := m.hostAddrs(p, p.Value.Text)
	switch {
	case m.hosts[p.Value.Text].net > 0:
		m.badValue(p, "the name is a network's; want the address of a host")
		return netip.Addr{}
	case len(as) == 0: // reported
		return netip.Addr{}
	case len(as) > 1:
		m.badValue(p, "the name has several addresses; want one")
		return netip.Addr{}
	case as[0].IsUnspecified() || as[0].IsMulticast():
		m.badValue(p, "want the address of a host")
		return netip.Addr{}
	}
	return as[0]
}

func byteList(bits []int) string {
	l := make([]int, len(bits))
	for i, b := range bits {
		l[i] = b / 8
	}
	return bitList(l)
}
