package ikeconf

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/missiu/missiu/pkg/ike/dn"
)

// isValue reports whether the next token can be a value.
func (p *parser) isValue() bool {
	t := p.peek()
	return t.kind == str || t.kind == word && !p.isKeyword(p.i)
}

// fail reports a bad value: K "W": why.
func (p *parser) fail(q *param, pos Pos, w, why string) {
	q.bad = true
	p.errorf(pos, "%s %s: %s", q.word, shown(w), why)
}

func (p *parser) wanted(q *param, pos Pos, w string) { p.fail(q, pos, w, "want "+q.kw.spec.want) }

// length reports whether s has lo to hi characters.
func (s spec) length(t string) bool {
	n := int64(utf8.RuneCountInString(t))
	return n >= s.lo && n <= s.hi
}

// value reads the value of q.
func (p *parser) value(q *param) {
	s := &q.kw.spec
	if s.form == flag {
		q.text, q.vpos, q.num = s.want, q.pos, 1
		return
	}
	if !p.isValue() && !(s.form == ciphers && p.peek().kind == '(') {
		q.bad = true
		p.errorf(q.pos, "%s: value missing", q.word)
		return
	}
	q.vpos = p.peek().pos()
	switch s.form {
	case address:
		p.address(q)
	case identity:
		p.identity(q)
	case auth:
		p.auth(q)
	case ciphers, integs, groups, groupsOrNone, pfs:
		p.algs(q)
	case choice:
		p.choices(q)
	default:
		p.plain(q)
	}
}

// plain reads a value of one token.
func (p *parser) plain(q *param) {
	s := &q.kw.spec
	t := p.next()
	q.text = p.text(t)
	ok := true
	switch s.form {
	case text:
		ok = s.length(q.text)
	case number, seconds, size, replay:
		p.number(q)
		return
	case numberOrChoice:
		if !slices.Contains(s.words, q.text) {
			p.number(q)
		}
		return
	case ip:
		q.addr.from, ok = parseIP(q.text)
		q.addr.to = q.addr.from
	case host:
		ok = isHost(q.text)
	case addrOrHost:
		_, isIP := parseIP(q.text)
		ok = isIP || isHost(q.text)
	case addrOrChoice:
		if !slices.Contains(s.words, q.text) {
			q.addr.from, ok = parseIP(q.text)
		}
	case idType:
		q.text = strings.ToUpper(strings.ReplaceAll(q.text, "-", "_"))
		_, ok = exactTypes[q.text]
		if !ok {
			q.text = p.text(t)
		}
	case dnText:
		_, err := dn.ParseText(q.text)
		ok = err == nil
	case url:
		rest, isHTTP := strings.CutPrefix(q.text, "http://")
		ok = isHTTP && rest != "" && rest[0] != '/' && !strings.ContainsAny(rest, " \"<>")
	case file, poolUse:
		ok = q.text != ""
	}
	if !ok {
		p.wanted(q, q.vpos, q.text)
	}
}

// listOf reads values separated by commas and gives each to f.
func (p *parser) listOf(q *param, f func(t token, s string)) {
	for {
		t := p.next()
		f(t, p.text(t))
		if p.peek().kind != ',' {
			return
		}
		p.next()
		if !p.isValue() {
			q.bad = true
			p.errorf(q.pos, "%s: value missing", q.word)
			return
		}
	}
}

func (p *parser) choices(q *param) {
	one := func(t token, s string) {
		switch {
		case slices.Contains(refused[q.kw.name], s):
			p.fail(q, t.pos(), s, "not supported")
		case !slices.Contains(q.kw.spec.words, s):
			p.wanted(q, t.pos(), s)
		default:
			q.items = append(q.items, item{t.pos(), s})
		}
	}
	if q.kw.spec.list {
		p.listOf(q, one)
	} else {
		t := p.next()
		one(t, p.text(t))
	}
	var ws []string
	for _, i := range q.items {
		ws = append(ws, i.text)
	}
	q.text = strings.Join(ws, ", ")
}

// auth reads one or two rounds.
func (p *parser) auth(q *param) {
	for {
		t := p.next()
		s := p.text(t)
		switch {
		case slices.Contains(refused["auth_method"], s):
			p.fail(q, t.pos(), s, "not supported")
		case !slices.Contains(methods, s):
			p.wanted(q, t.pos(), s)
		default:
			q.items = append(q.items, item{t.pos(), s})
		}
		n := p.peek()
		if q.bad || len(q.items) == 2 || n.kind != word || p.text(n) != "then" {
			break
		}
		p.next()
		if !p.isValue() {
			q.bad = true
			p.errorf(q.pos, "%s: value missing", q.word)
			break
		}
	}
	for i, m := range q.items {
		if i > 0 {
			q.text += " then "
		}
		q.text += m.text
	}
}

// digits reads a number without unit: decimal or 0x. octal reports a leading zero.
func digits(s string) (n int64, ok, octal bool) {
	if h, hex := strings.CutPrefix(s, "0x"); hex {
		u, err := strconv.ParseUint(h, 16, 62)
		return int64(u), err == nil, false
	}
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false, false
	}
	if len(s) > 1 && s[0] == '0' {
		return 0, false, true
	}
	n, err := strconv.ParseInt(s, 10, 62)
	return n, err == nil, false
}

var (
	timeUnits = map[byte]int64{'s': 1000, 'm': 60 * 1000, 'h': 3600 * 1000, 'd': 86400 * 1000}
	sizeUnits = map[byte]int64{'k': 1 << 10, 'm': 1 << 20, 'g': 1 << 30, 't': 1 << 40}
)

// number checks q.text and sets q.num.
func (p *parser) number(q *param) {
	sp := &q.kw.spec
	s, factor := q.text, int64(1)
	tenth := int64(0)
	units := map[byte]int64(nil)
	switch sp.form {
	case seconds:
		units, factor = timeUnits, 1000
	case size:
		units = sizeUnits
	}
	if f := int64(0); s != "" && !strings.HasPrefix(s, "0x") {
		if f = units[s[len(s)-1]]; f > 0 {
			s, factor = s[:len(s)-1], f
		}
	}
	if sp.form == seconds && sp.list {
		if i := len(s) - 2; i > 0 && s[i] == '.' && s[i+1] >= '0' && s[i+1] <= '9' {
			tenth, s = int64(s[i+1]-'0'), s[:i]
		}
	}
	n, ok, octal := digits(s)
	if octal {
		p.fail(q, q.vpos, q.text, "number with a leading zero")
		return
	}
	const most = 1 << 62
	if ok = ok && n <= (most-factor)/factor; ok {
		q.num = n*factor + tenth*factor/10
		switch sp.form {
		case replay:
			ok = q.num == 0 || q.num >= 32 && q.num <= 65536
		case size:
			ok = q.num == 0 || q.num >= 64<<10
		default:
			ok = q.num >= sp.lo && q.num <= sp.hi
		}
	}
	if !ok {
		p.wanted(q, q.vpos, q.text)
		return
	}
	if sp.form == number && strings.HasSuffix(q.kw.name, "_kb") {
		q.num <<= 10
	}
}

func parseIP(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	return a.Unmap(), err == nil
}

// isHost reports whether s is a host name, which no mistyped address is: the
// last label has a letter (RFC 1123, 2.1).
func isHost(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for _, c := range []byte(l) {
			if c != '-' && c != '_' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') {
				return false
			}
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// joined reads a word and what blanks around "/" and "-" cut off from it.
func (p *parser) joined() string {
	t := p.next()
	s := p.text(t)
	if t.kind == str {
		return s
	}
	const most = 128 // no address is longer
	for n := p.peek(); n.kind == word && !p.isKeyword(p.i) && len(s) < most; n = p.peek() {
		w := p.text(n)
		if !strings.HasSuffix(s, "/") && !strings.HasSuffix(s, "-") && w[0] != '/' && w[0] != '-' {
			break
		}
		p.next()
		s += w
	}
	return s
}

func (p *parser) address(q *param) {
	q.text = p.joined()
	a, why := parseSpan(q.text, q.kw.spec.parts)
	q.addr = a
	switch {
	case why == "want":
		p.wanted(q, q.vpos, q.text)
	case why != "":
		p.fail(q, q.vpos, q.text, why)
	}
}

// parseSpan reads an address, prefix, range, name or any. why says what is
// wrong, "want" if it is nothing at all.
func parseSpan(s string, parts int) (a addrSpan, why string) {
	if s == "any" && parts&anyAddr != 0 {
		return addrSpan{any: true}, ""
	}
	if i := strings.IndexByte(s, '/'); i >= 0 {
		return parsePrefix(s[:i], s[i+1:])
	}
	if one, ok := parseIP(s); ok && parts&oneAddr != 0 {
		return addrSpan{from: one, to: one}, ""
	}
	if i := strings.IndexByte(s, '-'); i >= 0 && parts&noRange == 0 {
		from, ok1 := parseIP(s[:i])
		to, ok2 := parseIP(s[i+1:])
		switch {
		case !ok1 || !ok2 || from.Zone() != "" || to.Zone() != "":
		case from.Is4() != to.Is4():
			return a, "mixed address families"
		case to.Less(from):
			return a, "range runs backwards"
		default:
			return addrSpan{from: from, to: to}, ""
		}
	}
	if parts&hostName != 0 && isHost(s) {
		return addrSpan{host: s}, ""
	}
	return a, "want"
}

func parsePrefix(ip, bits string) (a addrSpan, why string) {
	from, ok := parseIP(ip)
	if !ok || from.Zone() != "" {
		return a, "want"
	}
	n, ok, octal := digits(bits)
	switch {
	case octal:
		return a, "number with a leading zero"
	case !ok:
		mask, isMask := parseIP(bits)
		if !isMask || !from.Is4() || !mask.Is4() {
			return a, "want"
		}
		if n, ok = maskBits(mask); !ok {
			return a, "want"
		}
	case n > int64(from.BitLen()):
		return a, "prefix length above " + strconv.Itoa(from.BitLen())
	}
	pre, err := from.Prefix(int(n))
	if err != nil {
		return a, "want"
	}
	return addrSpan{from: pre.Addr(), to: lastOf(pre)}, ""
}

// maskBits counts the bits of a contiguous netmask.
func maskBits(mask netip.Addr) (int64, bool) {
	b := mask.As4()
	m := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	n := int64(0)
	for ; m&(1<<31) != 0; m <<= 1 {
		n++
	}
	return n, m == 0
}
