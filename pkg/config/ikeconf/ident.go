package ikeconf

import (
	"encoding/hex"
	"net/netip"
	"strings"

	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/pkg/ike/pad"
)

// Identity types as messages name them.
const (
	typeAny   = "ANY"
	typeIP    = "IP"
	typeFQDN  = "FQDN"
	typeEmail = "EMAIL"
	typeDN    = "DN"
	typeKeyID = "KEYID"
)

// ident is an identity or a pattern of identities.
type ident struct {
	not      bool
	typ      string // one of the type constants
	data     string
	from, to netip.Addr // typeIP
	pattern  bool       // may match more than one identity
}

// exactTypes are the identity types that a single identity can have.
var exactTypes = map[string]string{
	"IP": typeIP, "IPV4": typeIP, "IPV6": typeIP,
	"FQDN": typeFQDN, "DNS": typeFQDN,
	"EMAIL": typeEmail, "MBOX": typeEmail, "USER_FQDN": typeEmail,
	"DN": typeDN, "KEYID": typeKeyID,
}

// idTypes are all of them.
var idTypes = func() map[string]string {
	m := map[string]string{"IPV4_PREFIX": typeIP, "IPV4_RANGE": typeIP, "IPV6_PREFIX": typeIP, "IPV6_RANGE": typeIP}
	for k, v := range exactTypes {
		m[k] = v
	}
	return m
}()

func idTypeOf(s string) (name string, ok bool) {
	name = strings.ToUpper(strings.ReplaceAll(s, "-", "_"))
	_, ok = idTypes[name]
	return name, ok
}

// identity reads an id: an optional "!", an optional type, a value.
func (p *parser) identity(q *param) {
	t := p.next()
	s := p.text(t)
	var not bool
	if t.kind == word && s[0] == '!' {
		not, s = true, s[1:]
		q.text = "!"
		if s == "" {
			if !p.isValue() {
				q.bad = true
				p.errorf(q.pos, "%s: value missing", q.word)
				return
			}
			t = p.next()
			s = p.text(t)
		}
	}
	typ, typed := "", false
	if t.kind == word {
		if n, ok := idTypeOf(s); ok && (p.peek().kind == '=' || p.peek().kind == str) {
			typ, typed = n, true
			q.text += s + " = "
			if p.peek().kind == '=' {
				p.next()
			}
			if !p.isValue() {
				q.bad = true
				p.errorf(q.pos, "%s: value missing", q.word)
				return
			}
			t = p.next()
			s = p.text(t)
			if t.kind == word && idTypes[typ] == typeIP { // a prefix or range with blanks
				p.i--
				s = p.joined()
			}
		} else if p.peek().kind == '=' { // C=US unquoted, or no type at all
			q.text += s
			p.next()
			p.wanted(q, q.vpos, q.text+"=")
			return
		}
	}
	q.text += s
	id, why := parseIdent(typ, s, t.kind == str && typed)
	if t.kind == str && !typed {
		id, why = parseShortcut(s)
	}
	if t.kind == word && !typed && strings.EqualFold(s, "ANY") {
		id, why = ident{typ: typeAny, pattern: true}, ""
	}
	id.not = id.not != not
	own := q.kw.name == "local_id"
	switch {
	case why == "want", own && (id.pattern || id.not):
		p.wanted(q, q.vpos, q.text)
	case why != "":
		p.fail(q, q.vpos, q.text, why)
	}
	q.id = id
}

// parseShortcut reads a string without a type in front, in which the shortcuts
// of Solaris certificate selectors are understood.
func parseShortcut(s string) (id ident, why string) {
	rest, not := strings.CutPrefix(s, "!")
	if i := strings.IndexByte(rest, '='); i > 0 {
		switch n, ok := idTypeOf(rest[:i]); {
		case strings.EqualFold(rest[:i], "ISSUER"):
			return id, "use required_issuer"
		case strings.EqualFold(rest[:i], "SLOT"):
			return id, "not supported"
		case ok:
			id, why = parseIdent(n, rest[i+1:], true)
			id.not = not
			return id, why
		}
	}
	id, why = parseIdent("", rest, true)
	id.not = not
	return id, why
}

// parseIdent reads the value of an identity of that type; "" lets the text
// decide. quoted text is never hex.
func parseIdent(typ, s string, quoted bool) (id ident, why string) {
	if typ == "" {
		if s == "" {
			return ident{typ: typeAny, pattern: true}, ""
		}
		typ = guess(s)
	}
	id = ident{typ: idTypes[typ], data: s}
	switch id.typ {
	case typeIP:
		span, why := parseSpan(s, oneAddr)
		if why != "" {
			return id, why
		}
		if v4 := span.from.Is4(); strings.HasPrefix(typ, "IPV4") && !v4 || strings.HasPrefix(typ, "IPV6") && v4 || span.from.Zone() != "" {
			return id, "want"
		}
		id.from, id.to = span.from, span.to
		id.pattern = id.from != id.to
	case typeFQDN:
		name, star := strings.CutPrefix(s, "*.")
		id.pattern = star
		if name == "" || len(s) > 255 || strings.ContainsAny(name, " \t") {
			return id, "want"
		}
	case typeEmail:
		user, domain, ok := strings.Cut(s, "@")
		id.pattern = user == "*"
		if !ok || user == "" || domain == "" {
			return id, "want"
		}
	case typeDN:
		name, err := dn.ParseText(s)
		if err != nil {
			return id, "want"
		}
		id.pattern = name.IsPattern()
	case typeKeyID:
		if h, ok := strings.CutPrefix(s, "0x"); ok && !quoted {
			b, err := hex.DecodeString(h)
			if err != nil {
				return id, "want"
			}
			id.data = string(b)
		}
		if id.data == "" {
			return id, "want"
		}
	}
	return id, ""
}

// guess returns the type that a text without one has.
func guess(s string) string {
	if _, why := parseSpan(s, oneAddr); why == "" {
		return "IP"
	}
	if _, err := dn.ParseText(s); err == nil {
		return "DN"
	}
	if strings.Contains(s, "@") {
		return "EMAIL"
	}
	if strings.Trim(s, "0123456789./:") == "" { // a mistyped address is no name
		return "IP"
	}
	return "FQDN"
}

func lastOf(p netip.Prefix) netip.Addr { return pad.Prefix(p).To }

// String gives an identity for messages.
func (id ident) String() string {
	switch id.typ {
	case typeAny:
		return "ANY"
	case typeIP:
		return pad.Range{From: id.from, To: id.to}.String()
	}
	return id.typ + " = " + shown(id.data)
}
