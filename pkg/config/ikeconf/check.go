package ikeconf

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/pad"
)

// defaults are the rows' default values, read like any other.
var defaults = func() map[string]*param {
	m := map[string]*param{}
	for i := range table {
		kw := &table[i]
		if kw.def == "" {
			continue
		}
		src, l := []byte(kw.def), newList("")
		toks, _ := scan(src, l)
		p := &parser{src: src, toks: toks, l: l, cur: &block{}}
		q := &param{kw: kw, word: kw.name}
		p.value(q)
		if q.bad || p.peek().kind != eof {
			panic("ikeconf: default of " + kw.name) // our own table; a test runs it
		}
		m[kw.key()] = q
	}
	return m
}()

// checker gives a document its meaning.
type checker struct {
	l        *list
	doc      *document
	defaults map[string]*param
	top      []*suite
	pools    map[string]*block
}

func (c *checker) errorf(pos Pos, format string, a ...any) { c.l.errorf(pos, format, a...) }

// rule is a rule with what it inherits.
type rule struct {
	b, top    *block
	defaults  map[string]*param
	label     string
	version   int // 1, 2; 0: any
	own       bool
	suites    []*suite // of its version; of version any those for IKEv2
	allSuites []*suite // of version any those for IKEv1 too
	noSuites  bool     // none was given: the built-in ones count
	local     []item   // methods, one or two rounds
	remote    []item
	remoteIDs []ident

	// Of Load: what certificates of either side come to.
	cert    *cred.Own
	ownName pad.ID
	trust   *cred.Trust
}

// usesCerts reports whether either side proves itself by a certificate.
func (r *rule) usesCerts() bool { return uses(r.local, certs...) || uses(r.remote, certs...) }

// get returns the parameter in force: the rule's own, the top level's, the
// default; nil if there is none.
func (r *rule) get(key string) *param {
	for _, p := range []*param{r.b.one(key), r.top.one(key), r.defaults[key]} {
		if p != nil {
			return p
		}
	}
	return nil
}

// list returns the parameters in force of a key that accumulates.
func (r *rule) list(key string) []*param {
	if ps := r.b.all(key); ps != nil {
		return ps
	}
	return r.top.all(key)
}

func (r *rule) is(key, v string) bool {
	p := r.get(key)
	return p != nil && !p.bad && p.text == v
}

// check checks the whole document and returns its rules.
func (c *checker) check() []*rule {
	top := c.doc.top
	for _, x := range top.xforms {
		c.top = append(c.top, c.suite(x))
	}
	c.checkPools()
	used := map[*suite]bool{}
	labels := map[string]Pos{}
	var rules []*rule
	for _, b := range c.doc.rules {
		if b.label != "" {
			if first, twice := labels[b.label]; twice {
				c.errorf(b.lpos, "label %s used twice; first at %s", shown(b.label), first)
			} else {
				labels[b.label] = b.lpos
			}
		}
		r := c.rule(b)
		for _, s := range r.allSuites {
			used[s] = true
		}
		rules = append(rules, r)
	}
	for _, s := range c.top {
		if allow := top.one("allow_weak"); !used[s] && (allow == nil || allow.text != "yes") {
			c.weak(s)
		}
	}
	c.hidden(rules)
	return rules
}

// weak reports what needs allow_weak.
func (c *checker) weak(s *suite) {
	for _, p := range s.b.params {
		c.weakAlgs(p)
	}
}

func (c *checker) weakAlgs(p *param) {
	for _, a := range p.algs {
		if a.weak() {
			c.errorf(a.pos, "%s %s: weak; needs allow_weak yes", p.word, shown(a.text))
		}
	}
}

func (c *checker) rule(b *block) *rule {
	r := &rule{b: b, top: c.doc.top, defaults: c.defaults, label: b.label}
	effective := c.top
	if r.own = len(b.xforms) > 0; r.own {
		effective = nil
		for _, x := range b.xforms {
			effective = append(effective, c.suite(x))
		}
	}
	r.version = version(r, effective)
	c.methods(r, effective)
	// A label that is missing leaves nothing to call the rule by.
	if b.label == "" {
		if !b.bad {
			c.errorf(b.pos, "rule without a label")
		}
		b.bad = true
	}
	c.suites(r, effective)
	if !r.is("allow_weak", "yes") {
		for _, s := range r.allSuites {
			c.weak(s)
		}
		c.weakAlgs(r.get("childsa_pfs"))
		c.weakAlgs(r.get("childsa_additional_ke"))
	}
	if h := r.get("sig_hash"); r.usesCerts() && !r.is("allow_weak", "yes") {
		for _, i := range h.items {
			if i.text == "sha1" {
				c.errorf(i.pos, "%s %s: weak; needs allow_weak yes", h.word, shown(i.text))
			}
		}
	}
	for _, p := range r.list("remote_id") {
		r.remoteIDs = append(r.remoteIDs, p.id)
	}
	for _, p := range b.all("pool") {
		if !p.bad && c.pools[p.text] == nil {
			c.errorf(p.vpos, "pool %s: not defined", shown(p.text))
		}
	}
	c.onePool(b)
	c.lives(r)
	if t, id := r.get("local_id_type"), r.get("local_id"); t != nil && id != nil && !t.bad && !id.bad && exactTypes[t.text] != id.id.typ {
		c.errorf(t.vpos, "local_id_type %s: local_id is of type %s", shown(strings.ToLower(t.text)), id.id.typ)
	}
	if !b.bad && !r.top.bad {
		c.complete(r)
	}
	for _, key := range []string{"hook", "dns_file"} {
		if f := r.get(key); f != nil && !f.bad && !filepath.IsAbs(f.text) {
			c.errorf(f.vpos, "%s %s: want an absolute path", key, shown(f.text))
		}
	}
	return r
}

// version decides which IKE a rule speaks.
func version(r *rule, xs []*suite) int {
	if p := r.get("ike_version"); p != nil {
		switch p.text {
		case "1":
			return 1
		case "any":
			return 0
		}
		return 2
	}
	if len(xs) > 0 && !slices.ContainsFunc(xs, func(s *suite) bool { return s.b.word != "p1_xform" }) {
		return 1
	}
	return 2
}

// methods finds how each side authenticates: what the rule says itself, else
// what its p1_xforms say, else the top level.
func (c *checker) methods(r *rule, xs []*suite) {
	var fromXforms *param
	for _, s := range xs {
		switch {
		case s.method == nil || s.method.bad:
		case fromXforms != nil && fromXforms.text != s.method.text && !r.b.bad:
			c.errorf(r.b.pos, "rule %s: methods of its p1_xforms differ", shown(r.label))
			r.b.bad = true
		default:
			fromXforms = s.method
		}
	}
	side := func(key string) []item {
		for _, p := range []*param{r.b.one(key), r.b.one("auth_method"), fromXforms, r.top.one(key), r.top.one("auth_method")} {
			if p != nil {
				return p.items
			}
		}
		return nil
	}
	r.local, r.remote = side("local_auth_method"), side("remote_auth_method")
}

// suites selects the blocks that the rule's version can express.
func (c *checker) suites(r *rule, xs []*suite) {
	r.noSuites = len(xs) == 0
	failed := false
	for _, s := range xs {
		switch {
		case r.version == 0 && s.b.word == "p1_xform":
			r.allSuites = append(r.allSuites, s)
			continue // serves IKEv1
		case r.version == 1 && s.needs2 != "" && !r.own:
			continue
		case r.version == 1 && s.needs2 != "":
			c.errorf(r.b.pos, "rule %s: %s needs IKEv2", shown(r.label), s.needs2)
			failed = true
		}
		r.suites, r.allSuites = append(r.suites, s), append(r.allSuites, s)
	}
	if len(r.suites) > 0 || r.noSuites || failed {
		return
	}
	if r.version == 0 {
		r.noSuites = true
	} else if r.label != "" {
		c.errorf(r.b.pos, "rule %s: no xform for IKEv1", shown(r.label))
	}
}

// lives checks each soft limit against its hard one.
func (c *checker) lives(r *rule) {
	for _, k := range []string{"ikesa_%slife%s_secs", "childsa_%slife%s_secs", "childsa_%slife%s_bytes"} {
		soft, hard := r.get(fmt.Sprintf(k, "soft", "")), r.get(fmt.Sprintf(k, "", "time"))
		if soft == nil || soft.bad || hard.bad || hard.num == 0 || soft.num <= hard.num {
			continue
		}
		c.errorf(soft.pos, "%s %d: above %s %d", soft.word, soft.shownNum(), hard.word, hard.shownNum())
	}
}

// shownNum is a number in the unit of its keyword.
func (p *param) shownNum() int64 {
	switch {
	case p.kw.spec.form == seconds:
		return p.num / 1000
	case strings.HasSuffix(p.kw.name, "_kb"):
		return p.num >> 10
	}
	return p.num
}

var certs = []string{"cert", "rsa_sig", "ecdsa_sig", "eddsa_sig"}

func uses(rounds []item, ms ...string) bool {
	return slices.ContainsFunc(rounds, func(i item) bool { return slices.Contains(ms, i.text) })
}

// complete checks what a rule needs, and what does not go together.
func (c *checker) complete(r *rule) {
	fail := func(format string, a ...any) {
		c.errorf(r.b.pos, "rule %s: %s", shown(r.label), fmt.Sprintf(format, a...))
	}
	needs := func(keys ...string) {
		for _, k := range keys {
			if len(r.list(k)) == 0 {
				fail("%s missing", k)
			}
		}
	}
	needs("remote_addr")
	if len(r.local) == 0 || len(r.remote) == 0 {
		fail("auth_method missing")
		return
	}
	switch {
	case uses(r.local, certs...):
		needs("cert_file", "key_file")
	case uses(r.local, "pubkey"):
		needs("key_file")
	}
	if uses(r.remote, certs...) {
		pinned := len(r.list("peer_cert_file")) > 0
		switch {
		case len(r.list("ca_file")) == 0 && !pinned:
			fail("ca_file or peer_cert_file missing")
		case !pinned:
			needs("remote_id")
		}
	}
	if uses(r.remote, "pubkey") {
		needs("peer_pubkey_file")
	}
	switch {
	case uses(r.local, "eap") && uses(r.remote, "eap") && !r.is("eap_only", "yes"):
		fail("eap on both sides needs eap_only yes")
	case r.is("eap_only", "yes") && (uses(r.local, "eap") || uses(r.remote, "eap")) && !r.is("eap_method", "tls"):
		fail("eap_only needs eap_method tls")
	}
	both := append(slices.Clone(r.local), r.remote...)
	switch r.version {
	case 1:
		for _, m := range []string{"eap", "pubkey"} {
			if uses(both, m) {
				fail("%s needs IKEv2", m)
			}
		}
		for _, k := range []string{"ppk", "ppk_id", "childsa_additional_ke"} {
			if p := r.b.one(k); p != nil && p.text != "no" && p.text != "none" {
				fail("%s needs IKEv2", k)
			}
		}
		if r.is("exchange_mode", "aggressive") && uses(both, "preshared") && !r.is("allow_weak", "yes") {
			fail("aggressive mode with preshared is weak; needs allow_weak yes")
		}
	case 2:
		if uses(both, "xauth") {
			fail("xauth needs IKEv1")
		}
		for _, kv := range [][2]string{{"exchange_mode", "aggressive"}, {"mode_cfg", "push"}} {
			if p := r.b.one(kv[0]); p != nil && p.text == kv[1] {
				fail("%s %s needs IKEv1", kv[0], kv[1])
			}
		}
	}
	if r.version != 2 {
		c.l.warnf(r.b.pos, "rule %s: IKEv1 is legacy", shown(r.label))
	}
}

// checkPools checks the address pools.
func (c *checker) checkPools() {
	c.pools = map[string]*block{}
	type span struct {
		addrSpan
		b *block
	}
	var spans []span
	for _, b := range c.doc.pools {
		if first := c.pools[b.label]; first != nil {
			c.errorf(b.lpos, "pool %s used twice; first at %s", shown(b.label), first.lpos)
			continue
		}
		c.pools[b.label] = b
		if len(b.all("addr")) == 0 && !b.bad {
			c.errorf(b.pos, "pool %s: addr missing", shown(b.label))
		}
		for _, p := range b.all("addr") {
			if !p.bad {
				spans = append(spans, span{p.addr, b})
			}
		}
	}
	slices.SortStableFunc(spans, func(a, b span) int { return a.from.Compare(b.from) })
	said := map[*block]bool{}
	var last span // of those so far, the one that reaches farthest
	for _, s := range spans {
		if last.b != nil && last.b != s.b && s.from.BitLen() == last.to.BitLen() && !last.to.Less(s.from) {
			late, early := s.b, last.b
			if late.pos.Before(early.pos) {
				late, early = early, late
			}
			if !said[late] {
				said[late] = true
				c.errorf(late.pos, "pool %s: overlaps pool %s", shown(late.label), shown(early.label))
			}
		}
		if last.b == nil || s.from.BitLen() != last.to.BitLen() || last.to.Less(s.to) {
			last = s
		}
	}
}

// onePool checks that a rule has one pool of each family at most.
func (c *checker) onePool(b *block) {
	first := map[int]string{}
	for _, p := range b.all("pool") {
		if p.bad || c.pools[p.text] == nil {
			continue
		}
		for _, a := range c.pools[p.text].all("addr") {
			bits := a.addr.from.BitLen()
			if was, ok := first[bits]; ok && was != p.text && !a.bad {
				c.errorf(p.vpos, "pool %s: of the family of pool %s, which the rule has", shown(p.text), shown(was))
				break
			}
			if !a.bad {
				first[bits] = p.text
			}
		}
	}
}

// maxHidden bounds the comparison of each rule with each before it.
const maxHidden = 1000

// hidden warns of rules that an earlier one leaves nothing to.
func (c *checker) hidden(rules []*rule) {
	for i, r := range rules[:min(len(rules), maxHidden)] {
		for _, e := range rules[:i] {
			if e.hides(r) {
				c.l.warnf(r.b.pos, "rule %s is hidden by rule %s at %s", shown(r.label), shown(e.label), e.b.pos)
				break
			}
		}
	}
}

// hides reports whether e takes every negotiation that r could. It errs on the
// side of silence.
func (e *rule) hides(r *rule) bool {
	same := func(key string) bool {
		a, b := e.get(key), r.get(key)
		return a == b || a != nil && b != nil && a.text == b.text
	}
	if e.b.bad || r.b.bad || e.version != 0 && e.version != r.version || e.is("start_action", "none") && !r.is("start_action", "none") {
		return false
	}
	if !covers(e.list("remote_addr"), r.list("remote_addr")) ||
		len(e.list("local_addr")) > 0 && (len(r.list("local_addr")) == 0 || !covers(e.list("local_addr"), r.list("local_addr"))) {
		return false
	}
	if !same("local_id") || !slices.Equal(e.remoteIDs, r.remoteIDs) && !slices.Contains(e.remoteIDs, ident{typ: typeAny, pattern: true}) {
		return false
	}
	text := func(is []item) (s string) {
		for _, i := range is {
			s += i.text + " "
		}
		return s
	}
	if text(e.local) != text(r.local) || text(e.remote) != text(r.remote) || len(e.suites) != len(r.suites) {
		return false
	}
	for i, s := range e.suites {
		if s != r.suites[i] && s.text() != r.suites[i].text() {
			return false
		}
	}
	return true
}

// text is a suite for comparison.
func (s *suite) text() string {
	var b strings.Builder
	for _, p := range s.b.params {
		b.WriteString(p.kw.name + " " + fold(p.text) + "\n")
	}
	return b.String()
}

// covers reports whether each of b lies within one of a; of long lists it does
// not find out.
func covers(a, b []*param) bool {
	if len(a)*len(b) > 1<<12 {
		return false
	}
	for _, q := range b {
		if !slices.ContainsFunc(a, func(p *param) bool {
			switch x, y := p.addr, q.addr; {
			case p.bad || q.bad:
				return false
			case x.any:
				return true
			case y.any || x.host != "" || y.host != "":
				return x.host != "" && strings.EqualFold(x.host, y.host)
			default:
				return x.from.BitLen() == y.from.BitLen() && !y.from.Less(x.from) && !x.to.Less(y.to)
			}
		}) {
			return false
		}
	}
	return len(b) > 0
}
