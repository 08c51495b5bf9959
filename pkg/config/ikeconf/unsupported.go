package ikeconf

import "slices"

// without lists the parameters that ike does not act upon yet: the values that
// ask for nothing it does not do, and whether it would be wrong to go on
// without (the rule would protect less, or let in more, than it says).
var without = map[string]struct {
	fine   []string
	refuse bool
}{
	"exchange_mode": {[]string{"main"}, true},
	"remote_eap_id": {nil, true},
	"mode_cfg":      {[]string{"pull"}, true},
	"redirect_to":   {nil, true},

	"eap_only":           {[]string{"no"}, true},
	"follow_redirect":    {[]string{"no"}, true},
	"peer_pubkey_file":   {nil, false},
	"request_http_certs": {[]string{"no"}, true},
	"cert_url":           {nil, true},
	"fetch":              {[]string{"no"}, true},
	"ocsp_url":           {nil, true},
	"ocsp_in_ike":        {[]string{"none"}, true},
	"fetch_timeout_secs": {nil, false},
	"proxy":              {nil, false},
	"eap_method":         {nil, false},
	"eap_inner":          {nil, false},
	"eap_id":             {nil, false},
	"eap_server_name":    {nil, false},
	"xauth_id":           {nil, false},
}

// ofCerts are those of them that mean nothing to a rule without certificates,
// which is not refused for them.
var ofCerts = []string{"request_http_certs", "cert_url", "fetch", "ocsp_url", "ocsp_in_ike"}

// Unsupported tells what cfg says that ike does not do yet, so that nothing is
// silently ignored: errors where a rule cannot be had without it, warnings
// where it can, as of one algorithm among others. A daemon must not start from
// a configuration with errors here.
func Unsupported(cfg *Config) []Diagnostic {
	l := newList(cfg.Path)
	for _, p := range cfg.doc.top.params {
		if p.kw.where&inRule == 0 {
			unsupportedParam(l, p, false)
		}
	}
	for _, b := range cfg.doc.pools {
		has := func(r *rule) bool {
			return slices.ContainsFunc(r.list("pool"), func(p *param) bool { return p.text == b.label })
		}
		if !slices.ContainsFunc(cfg.rules, has) {
			l.warnf(b.pos, "pool %s: no rule has it", shown(b.label))
		}
	}
	for _, r := range cfg.rules {
		r.unsupported(l)
	}
	return l.All()
}

// unsupportedParam reports p and returns false if it must not be passed over.
// certs says that it is about a rule with certificates.
func unsupportedParam(l *list, p *param, certs bool) bool {
	w, listed := without[p.kw.key()]
	off := p.kw.spec.form == seconds && p.num == 0
	if !listed || !p.exists || off || slices.Contains(w.fine, p.text) {
		return true
	}
	refuse := w.refuse && (certs || !slices.Contains(ofCerts, p.kw.key()))
	switch {
	case refuse:
		l.errorf(p.pos, "%s: not implemented", p.word)
	default:
		l.warnf(p.pos, "%s: not implemented; no effect", p.word)
	}
	return !refuse
}

// unsupported reports what r cannot have, to l if there is one, and returns
// false if that is more than warnings.
func (r *rule) unsupported(l *list) bool {
	if l == nil {
		l = newList("")
	}
	ok := true
	fail := func(pos Pos, format string, a ...any) {
		ok = false
		l.errorf(pos, format, a...)
	}
	switch r.version {
	case 1:
		fail(r.b.pos, "rule %s: IKEv1 is not implemented", shown(r.label))
	case 0:
		l.warnf(r.b.pos, "rule %s: IKEv1 is not implemented; only IKEv2 is spoken", shown(r.label))
	}
	for _, rounds := range [][]item{r.local, r.remote} {
		for i, m := range rounds {
			if m.text != "preshared" && !slices.Contains(certs, m.text) || i > 0 {
				fail(m.pos, "authentication by %s is not implemented", m.text)
			}
		}
	}
	// Of the parameters in force; those that accumulate each.
	for i := range table {
		key := table[i].key()
		inIKEv1 := key == "exchange_mode" || key == "mode_cfg"
		if table[i].where&tr == 0 || table[i].slot != "" || inIKEv1 && r.version == 2 {
			continue
		}
		ps := []*param{r.get(key)}
		if table[i].where&many != 0 {
			ps = r.list(key)
		}
		for _, p := range ps {
			if p != nil && !unsupportedParam(l, p, r.usesCerts()) {
				ok = false
			}
		}
	}
	if t := r.get("local_id_type"); t != nil && r.get("local_id") == nil && exactTypes[t.text] != typeIP && !uses(r.local, certs...) {
		fail(t.vpos, "local_id_type without local_id is not implemented")
	}
	ok = r.unsupportedSuites(l) && ok
	if kes, left := r.childAddKE(); len(left) > 0 {
		for _, a := range left {
			if kes == nil {
				fail(a.pos, "childsa_additional_ke %s: not implemented", shown(a.text))
			} else {
				l.warnf(a.pos, "childsa_additional_ke %s: not implemented; not offered", shown(a.text))
			}
		}
	}
	kes, left := r.pfs()
	for _, a := range left {
		if len(kes) == 0 {
			fail(a.pos, "childsa_pfs %s: not implemented", shown(a.text))
		} else {
			l.warnf(a.pos, "childsa_pfs %s: not implemented; not offered", shown(a.text))
		}
	}
	return ok
}

// unsupportedSuites reports algorithms that are not offered, and the lack of
// any proposal.
func (r *rule) unsupportedSuites(l *list) bool {
	usable := r.noSuites
	for _, s := range r.suites {
		_, left, ok := s.proposal()
		usable = usable || ok
		for _, a := range left {
			l.warnf(a.pos, "%s: not implemented; not offered", a.what)
		}
		if !ok {
			l.warnf(s.b.pos, "%s: not offered, for lack of what is not implemented", s.b.word)
		}
	}
	if !usable {
		l.errorf(r.b.pos, "rule %s: none of its xforms is implemented", shown(r.label))
	}
	return usable
}
