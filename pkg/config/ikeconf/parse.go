package ikeconf

import (
	"net/netip"
	"slices"

	"github.com/missiu/missiu/pkg/config/lexer"
)

// param is one parameter as it stands in the file.
type param struct {
	kw   *keyword
	word string // as written
	pos  Pos    // of the word
	vpos Pos    // of the value
	text string // the value as written, strings without quotes
	bad  bool   // was reported

	num    int64  // number, size, milliseconds, flag 1
	items  []item // lists, methods
	addr   addrSpan
	id     ident
	algs   []algorithm
	exists bool // false: a default
}

// item is one value of a list.
type item struct {
	pos  Pos
	text string
}

// addrSpan is an address value: ranges, or a host name.
type addrSpan struct {
	from, to netip.Addr // of any IPv4; any also covers IPv6
	any      bool
	host     string
}

// block is a braced part of the file, or all of it for the top level.
type block struct {
	where  where
	word   string // "rule", "{", "p1_xform" …
	pos    Pos    // first token
	bad    bool   // an error was reported inside
	params []*param
	xforms []*block
	label  string // rule, pool
	lpos   Pos
	by     map[string][]*param // by keyword.key(), in order
}

// one returns the parameter of that key, or nil.
func (b *block) one(key string) *param {
	if ps := b.by[key]; len(ps) > 0 {
		return ps[0]
	}
	return nil
}

// all returns the parameters of that key in order.
func (b *block) all(key string) []*param { return b.by[key] }

// document is a file after the grammar, before meaning.
type document struct {
	top   *block
	rules []*block
	pools []*block
	// unread: a lexical error left nothing
	unread bool
}

type parser struct {
	src  []byte
	toks []token
	i    int
	l    *list
	doc  *document
	cur  *block // where errors belong

	unknowns int
}

// parse reads a file by the grammar. After errors the document holds what was
// good.
func parse(src []byte, l *list) *document {
	p := &parser{src: src, l: l, doc: &document{top: &block{where: inTop, by: map[string][]*param{}}}}
	toks, ok := scan(src, l)
	if !ok {
		p.doc.unread = true
		return p.doc
	}
	p.toks = toks
	for p.cur = p.doc.top; p.peek().kind != eof; {
		p.item(p.cur)
	}
	return p.doc
}

func (p *parser) peek() token { return p.toks[p.i] }

func (p *parser) next() token {
	t := p.toks[p.i]
	if t.kind != eof {
		p.i++
	}
	return t
}

func (p *parser) text(t token) string { return string(t.value(p.src)) }

func (p *parser) errorf(pos Pos, format string, a ...any) {
	p.cur.bad = true
	p.l.errorf(pos, format, a...)
}

// isKeyword reports whether token i is one. "dns =" is not: identity types are
// spelled in any case, and DNS is one of them.
func (p *parser) isKeyword(i int) bool {
	if p.toks[i].kind != word {
		return false
	}
	w := string(p.src[p.toks[i].off:p.toks[i].end])
	_, ok := keywords[w]
	return ok && (w != "dns" || p.toks[i+1].kind != '=')
}

// skip goes on to the next keyword or brace.
func (p *parser) skip() {
	for {
		if k := p.peek().kind; k == eof || k == '{' || k == '}' || p.isKeyword(p.i) {
			return
		}
		p.next()
	}
}

// skipBlock passes over a brace and what it holds.
func (p *parser) skipBlock() {
	for depth := 0; ; {
		switch t := p.next(); t.kind {
		case eof:
			return
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return
			}
		}
	}
}

// item reads one item of block b.
func (p *parser) item(b *block) {
	t := p.peek()
	switch {
	case t.kind == '{' && b.where == inTop:
		p.rule(false)
	case t.kind != word:
		p.errorf(t.pos(), "unexpected %s", shown(string(p.src[t.off:t.end])))
		if t.kind == '{' {
			p.skipBlock()
			return
		}
		p.next()
		p.skip()
	case p.isKeyword(p.i):
		p.keyword(b)
	default:
		p.unknown(b)
	}
}

func (p *parser) unknown(b *block) {
	t := p.next()
	w, s := p.text(t), ""
	// Suggestions cost time, and only the first errors are shown.
	if p.unknowns++; p.unknowns <= lexer.DefaultMax {
		s = lexer.Suggest(w, known)
	}
	if s == "" {
		p.errorf(t.pos(), "unknown keyword %s", shown(w))
	} else {
		p.errorf(t.pos(), "unknown keyword %s; did you mean %q?", shown(w), s)
	}
	p.skip()
	if p.peek().kind != '{' {
		return
	}
	switch {
	case s == "rule" && b.where == inTop:
		p.rule(true)
	case (s == "ikesa_xform" || s == "p1_xform") && b.where&tr != 0:
		p.xform(b, s, t, true)
	default:
		p.skipBlock()
	}
}

func (p *parser) keyword(b *block) {
	t := p.peek()
	w := p.text(t)
	switch kw := keywords[w]; {
	case w == "rule" && b.where == inTop:
		p.rule(false)
	case w == "rule":
		p.misplaced(t, w, inTop)
	case w == "ikesa_xform" || w == "p1_xform":
		if b.where&tr == 0 {
			p.misplaced(t, w, inRule)
			return
		}
		p.next()
		p.xform(b, w, t, false)
	case w == "pool" && b.where == inTop:
		p.pool()
	case slices.Contains(ignored, w):
		p.next()
		p.l.warnf(t.pos(), "%s is ignored", w)
		p.skip()
	case keyStore[w] != "":
		p.next()
		p.errorf(t.pos(), "%s: names a certificate in the Solaris key store; use %s", w, keyStore[w])
		p.skip()
	case kw.where&b.where == 0 && !(kw.where&inP1 != 0 && b.word == "p1_xform"):
		p.misplaced(t, w, kw.where)
	default:
		p.next()
		p.param(b, kw, w, t.pos())
	}
}

func (p *parser) misplaced(t token, w string, where where) {
	p.next()
	p.errorf(t.pos(), "%s belongs %s", w, where.place())
	p.skip()
	if w == "rule" || w == "ikesa_xform" || w == "p1_xform" {
		if p.peek().kind == '{' {
			p.skipBlock()
		}
	}
}

func (p *parser) param(b *block, kw *keyword, w string, pos Pos) {
	q := &param{kw: kw, word: w, pos: pos, exists: true}
	p.value(q)
	if q.bad {
		p.cur.bad = true
		p.skip()
	}
	before := b.all(kw.key())
	switch same := func(o *param) bool { return o.word == w }; {
	case len(before) > 0 && kw.where&many == 0 && (kw.key() != "nonce_len" || slices.ContainsFunc(before, same)):
		p.errorf(pos, "%s given twice; first at %s", w, before[0].pos)
	case kw.name == "additional_ke" && len(before) == 7:
		p.errorf(pos, "%s: more than 7", w)
	default:
		b.params = append(b.params, q)
		b.by[kw.key()] = append(before, q)
	}
}

// body reads the items of b up to its closing brace; the next token is the
// opening one.
func (p *parser) body(b *block, bad bool) {
	open := p.next()
	b.bad, b.by = bad, map[string][]*param{}
	outer := p.cur
	p.cur = b
	for p.peek().kind != '}' {
		if p.peek().kind == eof {
			p.errorf(open.pos(), `"{" is not closed`)
			break
		}
		p.item(b)
	}
	p.next()
	p.cur = outer
}

func (p *parser) rule(bad bool) {
	t := p.peek()
	b := &block{where: inRule, word: "rule", pos: t.pos()}
	if t.kind == word {
		p.next()
		if l := p.peek(); l.kind == str {
			p.next()
			b.label, b.lpos = p.text(l), l.pos()
		}
	}
	if p.peek().kind != '{' {
		p.wantBrace(t)
		return
	}
	var label *param
	if b.lpos != (Pos{}) {
		kw := keywords["label"]
		label = &param{kw: kw, word: "label", pos: b.lpos, vpos: b.lpos, text: b.label, exists: true}
		if !kw.spec.length(b.label) {
			p.errorf(b.lpos, "label %s: want %s", shown(b.label), kw.spec.want)
			bad = true
		}
	}
	p.ruleBody(b, label, bad)
	p.doc.rules = append(p.doc.rules, b)
}

func (p *parser) ruleBody(b *block, label *param, bad bool) {
	p.body(b, bad)
	l := b.one("label")
	switch {
	case label == nil && l != nil:
		b.label, b.lpos = l.text, l.vpos
	case label != nil && l != nil:
		p.l.errorf(l.pos, "label given twice; first at %s", label.pos)
		b.bad = true
	}
}

func (p *parser) xform(b *block, w string, t token, bad bool) {
	if p.peek().kind != '{' {
		p.wantBrace(t)
		return
	}
	x := &block{where: inXform, word: w, pos: t.pos()}
	p.body(x, bad)
	p.cur.bad = p.cur.bad || x.bad && p.cur.where == inRule
	b.xforms = append(b.xforms, x)
}

func (p *parser) pool() {
	t := p.next()
	b := &block{where: inPool, word: "pool", pos: t.pos()}
	n := p.peek()
	if n.kind != str && (n.kind != word || p.isKeyword(p.i)) {
		p.errorf(t.pos(), "pool: value missing")
		p.skip()
		if p.peek().kind == '{' {
			p.skipBlock()
		}
		return
	}
	p.next()
	b.label, b.lpos = p.text(n), n.pos()
	if p.peek().kind != '{' {
		p.wantBrace(t)
		return
	}
	p.body(b, false)
	p.doc.pools = append(p.doc.pools, b)
}

// wantBrace reports a block without its brace and passes over what was meant
// to stand in it.
func (p *parser) wantBrace(t token) {
	p.errorf(t.pos(), `%s: want "{"`, p.text(t))
	inner := inXform
	switch p.text(t) {
	case "pool":
		inner = inPool
	case "rule":
		inner = inRule
	}
	for {
		p.skip()
		if !p.isKeyword(p.i) {
			return
		}
		kw := keywords[p.text(p.peek())]
		if kw == nil || kw.where&inner == 0 || kw.where&tr == tr {
			return
		}
		p.next()
	}
}
