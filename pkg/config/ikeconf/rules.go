package ikeconf

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Rules makes the entries of the PAD, in the order of the file, with every
// default filled in and keys of their own. local are the addresses of the
// command line, which rules without local_addr are for; none means any. Rules
// that Unsupported reports an error of are left out, and so are rules with
// certificates before Load or where it reports an error.
func (c *Config) Rules(local []netip.Addr) []*pad.Rule {
	var out []*pad.Rule
	for _, r := range c.rules {
		loaded := (r.cert != nil || !uses(r.local, certs...)) && (r.trust != nil || !uses(r.remote, certs...))
		if (loaded || c.bare) && r.unsupported(nil) {
			out = append(out, c.padRule(r, local))
		}
	}
	return out
}

func (c *Config) padRule(r *rule, local []netip.Addr) *pad.Rule {
	p := pad.NewRule(r.label)
	n := func(key string) int { return int(r.get(key).num) }
	dur := func(key string) time.Duration { return time.Duration(r.get(key).num) * time.Millisecond }

	for _, a := range r.list("local_addr") {
		p.Local = append(p.Local, a.addr.ranges()...)
	}
	if len(p.Local) == 0 {
		for _, a := range local {
			p.Local = append(p.Local, pad.One(a))
		}
	}
	for _, a := range r.list("remote_addr") {
		if a.addr.host != "" {
			p.RemoteHosts = append(p.RemoteHosts, strings.ToLower(a.addr.host))
		} else {
			p.Remote = append(p.Remote, a.addr.ranges()...)
		}
	}
	p.RemotePort = uint16(n("remote_port"))
	if id := r.get("local_id"); id != nil {
		p.LocalID = id.id.exact()
	}
	for _, id := range r.remoteIDs {
		p.RemoteIDs = append(p.RemoteIDs, id.padPattern())
	}
	if uses(r.local, certs...) {
		p.LocalAuth = pad.Cert
		if r.cert != nil {
			p.Own, p.LocalID = r.cert, r.ownName
			p.AnyOwnID = r.get("local_id") == nil && r.get("local_id_type") == nil
		}
	}
	if uses(r.remote, certs...) {
		p.RemoteAuth, p.Trust = pad.Cert, r.trust
		if len(p.RemoteIDs) == 0 {
			p.RemoteIDs = pad.Patterns{pad.AnyID} // of those in peer_cert_file
		}
	}
	p.SendCert = map[string]pad.SendCert{"ifasked": pad.SendCertIfAsked, "always": pad.SendCertAlways, "never": pad.SendCertNever}[r.get("send_cert").text]
	p.SendCertReq = r.is("send_certreq", "yes")
	c.padKeys(r, p)

	if !r.noSuites {
		p.Proposals = nil
	}
	for _, s := range r.suites {
		if ike, _, ok := s.proposal(); ok {
			p.Proposals = append(p.Proposals, ike)
		}
	}
	p.IKE = r.ikeLife()
	p.ChildHard.AddTime = dur("childsa_lifetime_secs")
	p.ChildSoft.AddTime = r.soft("childsa_softlife_secs", p.ChildHard.AddTime)
	p.ChildHard.Bytes = uint64(r.get("childsa_lifetime_bytes").num)
	p.ChildSoft.Bytes = p.ChildHard.Bytes / 10 * 9
	if s := r.get("childsa_softlife_bytes"); s != nil {
		p.ChildSoft.Bytes = uint64(s.num)
	}
	p.PFS, _ = r.pfs()
	p.ChildAddKE, _ = r.childAddKE()
	p.ESN = map[string]proposal.ESN{"no": proposal.ESNNo, "prefer": proposal.ESNPrefer, "require": proposal.ESNRequire}[r.get("childsa_esn").text]
	p.ReplayWindow = uint32(n("childsa_replay"))
	p.AggFrag = map[string]pad.AggFrag{"no": pad.AggFragNo, "prefer": pad.AggFragPrefer, "require": pad.AggFragRequire}[r.get("childsa_aggfrag").text]
	switch q := r.get("childsa_tfc"); q.text {
	case "no":
	case "mtu":
		p.TFC = ipsec.TFCPathMTU
	default:
		p.TFC = uint16(q.num)
	}
	p.IPComp = r.get("childsa_ipcomp").text == "deflate"
	p.PerQueue = map[string]pad.PerQueue{"no": pad.PerQueueNo, "prefer": pad.PerQueuePrefer, "require": pad.PerQueueRequire}[r.get("childsa_per_queue").text]
	p.RekeyFuzz = n("rekey_fuzz")
	p.ChildLimit = n("childsa_limit")
	for _, a := range r.list("child_addr") {
		p.ChildAddrs = append(p.ChildAddrs, a.addr.ranges()...)
	}
	for _, name := range r.list("pool") {
		p.Pools = append(p.Pools, c.pool(name.text))
	}
	p.Request = r.request()

	p.Retransmit = pad.Retransmit{Limit: n("retry_limit"), Init: dur("retry_timer_init")}
	p.Retransmit.Max = max(p.Retransmit.Init, dur("retry_timer_max"))
	p.StartAction = map[string]pad.StartAction{"trap": pad.StartTrap, "start": pad.StartNow, "none": pad.StartNone}[r.get("start_action").text]
	if h := r.get("hook"); h != nil {
		p.Hook = h.text
	}
	if f := r.get("dns_file"); f != nil {
		p.DNSFile = f.text
	}
	p.DPD = dur("dpd_secs")
	p.Reauth, p.ReauthBreak = dur("reauth_secs"), r.is("reauth_mode", "break_before_make")
	p.ChildIdle = dur("childsa_idletime_secs")
	p.DPDAction = pad.DPDClear
	if a := r.get("dpd_action"); a != nil && a.text == "restart" || a == nil && p.StartAction == pad.StartNow {
		p.DPDAction = pad.DPDRestart
	}
	p.NATT = map[string]pad.NATT{"auto": pad.NATTAuto, "force": pad.NATTForce, "no": pad.NATTNo}[r.get("nat_traversal").text]
	p.Keepalive = dur("nat_keepalive_secs")
	p.MOBIKE, p.MOBIKECheck = r.is("mobike", "yes"), r.is("mobike_check", "yes")
	p.InitialContact = r.is("initial_contact", "yes")
	p.UniqueIDs = map[string]pad.UniqueIDs{"no": pad.UniqueNo, "replace": pad.UniqueReplace, "keep": pad.UniqueKeep, "never": pad.UniqueNever}[r.get("unique_ids").text]
	p.NonceLen = n("nonce_len")
	for _, q := range r.top.all("nonce_len") {
		p.NonceLen = max(p.NonceLen, int(q.num))
	}
	if p.FragmentSize = n("fragment_size"); r.is("fragmentation", "no") {
		p.FragmentSize = 0
	}
	p.Childless = map[string]pad.Childless{"allow": pad.ChildlessAllow, "force": pad.ChildlessForce, "no": pad.ChildlessNo}[r.get("childless").text]
	c.padPPKs(r, p)
	return p
}

// request is what the rule asks its peer for.
func (r *rule) request() (q pad.Request) {
	switch a := r.get("request_addr"); {
	case a.addr.from.IsValid():
		q = pad.Request{V4: a.addr.from.Is4(), V6: a.addr.from.Is6(), Addr: a.addr.from}
	default:
		q = pad.Request{V4: a.text == "ipv4" || a.text == "both", V6: a.text == "ipv6" || a.text == "both"}
	}
	q.DNS = q.Any() && r.is("request_dns", "yes")
	return q
}

// pool makes the pool of that name, which exists; rules that name it share it.
func (c *Config) pool(name string) *pad.Pool {
	if p := c.pools[name]; p != nil {
		return p
	}
	p := &pad.Pool{Name: name}
	i := slices.IndexFunc(c.doc.pools, func(b *block) bool { return b.label == name })
	b := c.doc.pools[i]
	for _, a := range b.all("addr") {
		p.Addrs = append(p.Addrs, a.leasable())
	}
	for _, a := range b.all("dns") {
		p.DNS = append(p.DNS, a.addr.from.WithZone(""))
	}
	for _, a := range b.all("domain") {
		p.Domains = append(p.Domains, a.text)
	}
	for _, a := range b.all("subnet") {
		p.Subnets = append(p.Subnets, prefixOf(a.addr))
	}
	if c.pools == nil {
		c.pools = map[string]*pad.Pool{}
	}
	c.pools[name] = p
	return p
}

// leasable is what of a range is for peers: of an IPv4 prefix shorter than /31 not
// the addresses of the network and of broadcast.
func (q *param) leasable() pad.Range {
	r := q.addr.ranges()[0]
	if bits := prefixOf(q.addr).Bits(); strings.Contains(q.text, "/") && r.From.Is4() && bits < 31 {
		r.From, r.To = r.From.Next(), r.To.Prev()
	}
	return r
}

// prefixOf is the prefix that a range is.
func prefixOf(a addrSpan) netip.Prefix {
	bits := a.from.BitLen()
	for bits > 0 && pad.Prefix(netip.PrefixFrom(a.from, bits)).To.Less(a.to) {
		bits--
	}
	return netip.PrefixFrom(a.from, bits)
}

// ppkMode is what the rule says of PPKs; one that is named is used.
func (r *rule) ppkMode() pad.PPK {
	switch q := r.get("ppk"); {
	case q != nil:
		return map[string]pad.PPK{"no": pad.PPKNo, "prefer": pad.PPKPrefer, "require": pad.PPKRequire}[q.text]
	case r.get("ppk_id") != nil:
		return pad.PPKPrefer
	}
	return pad.PPKNo
}

// padPPKs gives a rule the post-quantum pre-shared keys: all, or the one that it
// names.
func (c *Config) padPPKs(r *rule, p *pad.Rule) {
	p.PPK = r.ppkMode()
	if p.PPK == pad.PPKNo {
		return
	}
	if q := r.get("ppk_id"); q != nil {
		p.PPKID = q.text
	}
	p.PPKs = map[string]ipsec.Key{}
	for _, s := range c.secrets {
		if s.ppkID != "" && (p.PPKID == "" || s.ppkID == p.PPKID) {
			p.PPKs[s.ppkID] = s.ppk.Clone()
		}
	}
}

// ikeLife is the rule's, shortened by what its xforms say.
func (r *rule) ikeLife() pad.Lifetime {
	ms := r.get("ikesa_lifetime_secs").num
	own := false
	for _, s := range r.suites {
		if s.life > 0 && (!own || s.life < ms) {
			ms, own = s.life, true
		}
	}
	if own { // those without a lifetime of their own have the rule's
		for _, s := range r.suites {
			if s.life == 0 {
				ms = min(ms, r.get("ikesa_lifetime_secs").num)
			}
		}
	}
	hard := time.Duration(ms) * time.Millisecond
	return pad.Lifetime{Hard: hard, Soft: min(hard, r.soft("ikesa_softlife_secs", hard))}
}

// soft is a soft lifetime: 90 % of the hard one unless it is given.
func (r *rule) soft(key string, hard time.Duration) time.Duration {
	if s := r.get(key); s != nil {
		return time.Duration(s.num) * time.Millisecond
	}
	return hard / 10 * 9
}

// pfs returns the methods that we have, and those that we do not.
func (r *rule) pfs() (kes []alg.KE, left []algorithm) {
	for _, a := range r.get("childsa_pfs").algs {
		switch {
		case a.none:
			kes = appendNew(kes, alg.KENone, true)
		case a.same:
			kes = appendNew(kes, proposal.KESame, true)
		case implemented(a.ke):
			kes = appendNew(kes, a.ke, true)
		default:
			left = append(left, a)
		}
	}
	return kes, left
}

// childAddKE returns the additional key exchange of child SAs, and the methods
// of it that we do not have.
func (r *rule) childAddKE() (add [][]alg.KE, left []algorithm) {
	q := r.get("childsa_additional_ke")
	if q == nil {
		return nil, nil
	}
	var kes []alg.KE
	some := false
	for _, a := range q.algs {
		has := a.none || implemented(a.ke)
		some = some || has && !a.none
		if kes = appendNew(kes, a.ke, has); !has {
			left = append(left, a)
		}
	}
	if some {
		add = [][]alg.KE{kes}
	}
	return add, left
}

func (a addrSpan) ranges() []pad.Range {
	if a.any {
		return pad.Any()
	}
	return []pad.Range{{From: a.from, To: a.to}}
}

// exact is an identity of our own as the PAD has it.
func (id ident) exact() pad.ID {
	if id.typ == typeDN {
		n, _ := dn.ParseText(id.data)
		b, err := n.DER()
		if err != nil { // the parser has let nothing through that cannot be written
			return pad.ID{}
		}
		return pad.ID{Type: ikev2.IDDERASN1DN, Data: string(b)}
	}
	x, _ := id.padPattern().Exact()
	return x
}

// padPattern is an identity as the PAD has it.
func (id ident) padPattern() pad.Pattern {
	p := pad.Pattern{Not: id.not}
	switch id.typ {
	case typeIP:
		p = pad.AddrPattern(pad.Range{From: id.from, To: id.to})
		p.Not = id.not
	case typeFQDN:
		p.ID = pad.ID{Type: ikev2.IDFQDN, Data: id.data}
	case typeEmail:
		p.ID = pad.ID{Type: ikev2.IDRFC822Addr, Data: id.data}
	case typeKeyID:
		p.ID = pad.ID{Type: ikev2.IDKeyID, Data: id.data}
	case typeDN:
		n, _ := dn.ParseText(id.data)
		p = pad.DNPattern(n)
		p.Not = id.not
	}
	return p
}

// padKeys gives a rule the keys that are for its label, else those for pairs
// of identities.
func (c *Config) padKeys(r *rule, p *pad.Rule) {
	if k, ok := c.labelKey(r); ok {
		p.PSK = pad.Keys{Local: k.local.Clone(), Remote: k.remote.Clone()}
		return
	}
	for _, s := range c.pairs(r) {
		p.Pairs = append(p.Pairs, pad.PairKeys{
			LocalID: s.localID.padPattern(), RemoteID: s.remoteID.padPattern(),
			Keys: pad.Keys{Local: s.local.Clone(), Remote: s.remote.Clone()},
		})
	}
}

func (c *Config) labelKey(r *rule) (*secret, bool) {
	for _, s := range c.byLabel[r.label] {
		if s.isKeyOf(r) {
			return s, true
		}
	}
	return nil, false
}

// pairs returns the keys for pairs of identities that a rule could use.
func (c *Config) pairs(r *rule) (out []*secret) {
	for _, s := range c.secrets {
		if s.pair && s.isKeyOf(r) && r.mayUse(s) {
			out = append(out, s)
		}
	}
	return out
}

// isKeyOf reports whether s has a pre-shared key for each side of the rule that
// needs one.
func (s *secret) isKeyOf(r *rule) bool {
	local, remote := uses(r.local, "preshared"), uses(r.remote, "preshared")
	return (local || remote) && (!local || s.local.Len() > 0) && (!remote || s.remote.Len() > 0)
}

// mayUse reports whether the identities of s can be those of the rule. Where
// patterns meet patterns it assumes so.
func (r *rule) mayUse(s *secret) bool {
	if id := r.get("local_id"); id != nil {
		if own := id.id.exact(); !own.IsZero() && !s.localID.padPattern().Match(own) {
			return false
		}
	} else if t := s.localID.typ; t != typeIP && t != typeAny {
		return false
	}
	if len(r.remoteIDs) == 0 {
		return s.remoteID.typ == typeIP || s.remoteID.typ == typeAny
	}
	theirs, exact := s.remoteID.padPattern().Exact()
	if !exact {
		return true
	}
	var ps pad.Patterns
	for _, id := range r.remoteIDs {
		ps = append(ps, id.padPattern())
	}
	return ps.Match(theirs)
}

// checkSecrets reports rules without the secrets they need, and keys that many
// peers share.
func (c *Config) checkSecrets(l *list) {
	for _, r := range c.rules {
		if r.ppkMode() != pad.PPKNo {
			id := r.get("ppk_id")
			has := slices.ContainsFunc(c.secrets, func(s *secret) bool { return s.ppkID != "" && (id == nil || s.ppkID == id.text) })
			switch {
			case !has && id != nil:
				l.errorf(id.vpos, "%s %s: not in %s", id.word, shown(id.text), c.SecretsPath)
			case !has:
				l.errorf(r.b.pos, "rule %s: no ppk in %s", shown(r.label), c.SecretsPath)
			}
		}
		local, remote := uses(r.local, "preshared"), uses(r.remote, "preshared")
		if local || remote {
			key, found := c.labelKey(r)
			if !found && len(c.pairs(r)) == 0 {
				l.errorf(r.b.pos, "rule %s: no key in %s", shown(r.label), c.SecretsPath)
			}
			if key != nil && remote && slices.ContainsFunc(r.list("remote_addr"), func(p *param) bool {
				return p.addr.host == "" && (p.addr.any || p.addr.from != p.addr.to)
			}) {
				l.warnf(r.b.pos, "rule %s: one key for many peers", shown(r.label))
			}
		}
		if (uses(r.remote, "eap") && !r.is("eap_method", "tls") || uses(r.remote, "xauth")) &&
			!slices.ContainsFunc(c.secrets, func(s *secret) bool {
				return s.user != "" && (len(s.labels) == 0 || slices.ContainsFunc(s.labels, func(i item) bool { return i.text == r.label }))
			}) {
			l.errorf(r.b.pos, "rule %s: no user in %s", shown(r.label), c.SecretsPath)
		}
	}
}
