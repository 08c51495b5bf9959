package ipsecconf

import (
	"slices"
	"strings"

	"github.com/missiu/missiu/pkg/config/lexer"
)

// Limits of a text. They are no limits of the SPD; they bound what a mistaken
// or hostile file can cost.
const (
	MaxFile    = 64 << 20 // octets
	MaxEntries = 1 << 20  // and constants
	maxParams  = 256      // in a pair of braces
	maxAlts    = 256      // of an entry
	maxArgs    = 64       // of a command
)

var (
	selectorKeys = []string{
		"laddr", "raddr", "lport", "rport", "saddr", "daddr", "sport", "dport", "ulp", "dir", "type", "code", "smask", "dmask",
		"src", "srcaddr", "dst", "dstaddr", "local", "remote", "proto", "tunnel", "negotiate",
	}
	propertyKeys = []string{
		"encr_algs", "encr_auth_algs", "auth_algs", "sa", "dir", "tladdr", "traddr", "tsrc", "tdst",
		"keylength", "tag", "lifetime_secs", "lifetime_bytes",
	}
	// Of some builds of NanoSec, with what says the same in all.
	foreignSelectors = map[string]string{
		"ifid":       "each missiu has one interface: want the entry without it, loaded with -i of that interface",
		"laddr_list": "want an entry for each address, or laddr with a prefix or a range",
		"raddr_list": "want an entry for each address, or raddr with a prefix or a range",
		"laddr_ex":   "want laddr with an address, a prefix or a range",
		"lport_list": "want an entry for each port, with lport",
		"port_list":  "want an entry for each port, with lport or rport",
	}
	actions  = []string{"ipsec", "apply", "permit", "bypass", "pass", "drop"}
	commands = []string{"flush", "spdflush", "add"}
)

// maxMessages is how many errors, and warnings, Load tells of.
const maxMessages = 100

const wantAction = "want ipsec, apply, permit, bypass, pass or drop"

type parser struct {
	lex  *lexer.Lexer
	tok  lexer.Token // the next one
	last lexer.Token // the one before it
	l    *lexer.List

	consts int // so far

	keys bool // an add command was seen: words out of place may be keys
}

// Parse reads a text. It reports what is wrong to l, each mistake once, and
// goes on behind it, so the File then lacks something; it may be given to
// Policies all the same, to hear of the mistakes there.
func Parse(src string, l *lexer.List) *File {
	p := &parser{lex: lexer.New(src, lexer.Syntax{Punct: "{}[];"}), l: l}
	p.next()
	f := &File{long: longLines(src)}
	for p.tok.Kind != lexer.EOF {
		if len(f.Items) == MaxEntries {
			l.Errorf(p.tok.Pos, "more than %d entries", MaxEntries)
			return &File{} // what is wrong with their meaning need not be told
		}
		if i := p.item(); i != nil {
			f.Items = append(f.Items, i)
		}
	}
	return f
}

func (p *parser) next() lexer.Token {
	p.last = p.tok
	p.tok = p.lex.Next()
	return p.last
}

func (p *parser) item() Item {
	switch t := p.tok; {
	case t.Is("{"):
		return p.entry()
	case t.Is("["):
		return p.constants()
	case t.Kind == lexer.Word && slices.Contains(commands, t.Text):
		return p.command()
	default:
		p.unexpected()
		p.recover()
		return nil
	}
}

// unexpected reports the next token.
func (p *parser) unexpected() {
	switch t := p.tok; t.Kind {
	case lexer.EOF:
		p.l.Errorf(t.Pos, "unexpected end of file")
	case lexer.Bad:
		p.l.Errorf(t.Pos, "%s", t.Text)
	case lexer.String:
		p.l.Errorf(t.Pos, "unexpected string") // may be a key
	default:
		p.l.Errorf(t.Pos, "unexpected %s", p.shown(t.Text))
	}
}

// shown is a word for a message, unless it may be a key.
func (p *parser) shown(s string) string {
	if p.keys || mayBeKey(s) {
		return "word"
	}
	return lexer.Shown(s)
}

// mayBeKey: 64 bits or more in hexadecimal, which nothing else is.
func mayBeKey(s string) bool {
	s = strings.TrimPrefix(strings.TrimPrefix(s, "0x"), "0X")
	return len(s) >= 16 && strings.Trim(s, "0123456789abcdefABCDEF") == ""
}

// recover goes to where the next entry seems to begin: behind a semicolon, or
// at a brace or bracket that begins a line.
func (p *parser) recover() {
	for p.tok.Kind != lexer.EOF && (!p.tok.First || !p.tok.Is("{") && !p.tok.Is("[")) {
		if p.next().Is(";") {
			return
		}
	}
}

func (p *parser) entry() Item {
	e := &Entry{Pos: p.tok.Pos}
	start := p.tok.Off
	p.breach(e, !p.tok.First, "an entry of Solaris begins a line")
	var ok bool
	if e.Selectors, ok = p.params(e, "selector", selectorKeys, "properties", propertyKeys); !ok {
		return nil
	}
	for {
		a := Alternative{Action: Word{Pos: p.tok.Pos, Text: p.tok.Text}}
		switch {
		case p.tok.Kind == lexer.Bad:
			p.unexpected()
			p.recover()
			return nil
		case p.tok.Kind != lexer.Word || p.tok.First && slices.Contains(commands, p.tok.Text):
			p.l.Errorf(p.tok.Pos, "action missing: %s", wantAction)
			p.recover()
			return nil
		case !slices.Contains(actions, p.tok.Text):
			p.l.Errorf(p.tok.Pos, "action %s: %s", p.shown(p.tok.Text), wantAction)
			e.bad = true
		}
		p.breach(e, p.tok.First, "an action of Solaris stands behind what is before it, on its line")
		p.next()
		if !p.tok.Is("{") {
			if !e.bad {
				p.l.Errorf(a.Action.Pos, `%s: want "{" and properties behind it`, a.Action.Text)
			}
			p.recover()
			return nil
		}
		if a.Properties, ok = p.params(e, "property", propertyKeys, "selectors", selectorKeys); !ok {
			return nil
		}
		e.Alternatives = append(e.Alternatives, a)
		if !p.tok.IsWord("or") {
			break
		}
		if len(e.Alternatives) == maxAlts {
			p.l.Errorf(p.tok.Pos, "more than %d alternatives", maxAlts)
			p.recover()
			return nil
		}
		p.breach(e, p.tok.First, "or stands on the line of the brace before it, with Solaris")
		p.next()
	}
	e.size = p.last.Off + 1 - start
	if p.tok.Is(";") {
		p.breach(e, true, "a semicolon is NanoSec's")
		p.next()
	}
	return e
}

// breach notes what only a strict reading minds about the next token.
func (p *parser) breach(e *Entry, is bool, what string) {
	if is && len(e.layout) < maxMessages {
		e.layout = append(e.layout, breach{Word{Pos: p.tok.Pos}, what})
	}
}

// params reads { key value ... }. It returns false when the end of it could not
// be found; p then stands where the next entry begins.
func (p *parser) params(e *Entry, noun string, keys []string, elsewhere string, others []string) (ps []Param, ok bool) {
	open := p.next().Pos
	known := func() bool { return p.tok.Kind == lexer.Word && slices.Contains(keys, p.tok.Text) }
	skip := func() {
		e.bad = true
		for !known() && !p.tok.Is("}") && !p.tok.Is("{") && p.tok.Kind != lexer.EOF {
			p.next()
		}
	}
	for {
		switch t := p.tok; {
		case t.Is("}"):
			p.next()
			return ps, true
		case t.Is("{") || t.Kind == lexer.EOF:
			p.l.Errorf(open, `"{" is not closed`)
			p.recover()
			return nil, false
		case known():
			p.next()
			switch {
			case p.tok.Kind == lexer.Bad:
				p.unexpected()
				skip()
			case !p.tok.IsValue() || known() && t.Text != "negotiate": // its value is a key
				p.l.Errorf(t.Pos, "%s: value missing", t.Text)
				skip()
			case len(ps) == maxParams:
				p.l.Errorf(t.Pos, "more than %d words with their values in a pair of braces", maxParams)
				e.bad = true
				for !p.tok.Is("}") && !p.tok.Is("{") && p.tok.Kind != lexer.EOF {
					p.next()
				}
			default:
				v := p.next()
				ps = append(ps, Param{Word{Pos: t.Pos, Text: t.Text}, Word{v.Pos, v.Text, v.Kind == lexer.String}})
			}
		case t.Kind == lexer.Word:
			k := lexer.Suggest(t.Text, keys)
			switch {
			case slices.Contains(others, t.Text):
				p.l.Errorf(t.Pos, "%s belongs in the %s", t.Text, elsewhere)
			case noun == "selector" && foreignSelectors[t.Text] != "":
				p.l.Errorf(t.Pos, "%s: only some builds of NanoSec know it; %s", t.Text, foreignSelectors[t.Text])
			case k != "":
				p.l.Errorf(t.Pos, "unknown %s %s; did you mean %q?", noun, p.shown(t.Text), k)
			default:
				p.l.Errorf(t.Pos, "unknown %s %s: want %s", noun, p.shown(t.Text), lexer.Or(keys...))
			}
			p.next()
			skip()
		default:
			p.unexpected()
			p.next()
			skip()
		}
	}
}

func (p *parser) constants() Item {
	c := &Constants{Pos: p.next().Pos}
	for {
		switch t := p.tok; {
		case t.Is("]"):
			p.next()
			return c
		case t.Is("{") || t.Is("[") || t.Kind == lexer.EOF:
			p.l.Errorf(c.Pos, `"[" is not closed`)
			p.recover()
			return nil
		case t.Kind != lexer.Word:
			p.unexpected()
			p.next()
			for p.tok.Kind != lexer.EOF && !p.tok.Is("]") && !p.tok.Is("{") {
				p.next()
			}
		default:
			p.next()
			d := Param{Key: Word{Pos: t.Pos, Text: t.Text}}
			if p.tok.Kind == lexer.Word {
				v := p.next()
				d.Value = Word{Pos: v.Pos, Text: v.Text}
			}
			if p.consts++; p.consts > MaxEntries {
				if p.consts == MaxEntries+1 {
					p.l.Errorf(t.Pos, "more than %d constants", MaxEntries)
				}
				continue
			}
			c.Defs = append(c.Defs, d)
		}
	}
}

// command reads words up to a semicolon.
func (p *parser) command() Item {
	t := p.next()
	c := &Command{Name: Word{Pos: t.Pos, Text: t.Text}}
	p.keys = p.keys || t.Text == "add"
	for {
		switch t := p.tok; {
		case t.Is(";"):
			p.next()
			return c
		case t.IsValue():
			p.next()
			if len(c.Args) == maxArgs {
				p.l.Errorf(t.Pos, "%s: more than %d words", c.Name.Text, maxArgs)
				p.recover()
				return nil
			}
			c.Args = append(c.Args, Word{t.Pos, t.Text, t.Kind == lexer.String})
		case t.Kind == lexer.Bad:
			p.unexpected()
			p.recover()
			return nil
		default:
			p.l.Errorf(c.Name.Pos, `%s: want ";" at its end`, c.Name.Text)
			p.recover()
			return nil
		}
	}
}

// canonical gives the one name of a key that has several.
func canonical(key string) string {
	switch key {
	case "src", "srcaddr":
		return "saddr"
	case "dst", "dstaddr":
		return "daddr"
	case "local":
		return "laddr"
	case "remote":
		return "raddr"
	case "proto":
		return "ulp"
	}
	return key
}

// number reads a decimal or, with 0x, a hexadecimal number of at most limit.
// Leading zeros are refused: they mean octal to some.
func number(s string, limit uint64) (n uint64, ok bool) {
	base := uint64(10)
	switch {
	case len(s) > 2 && (strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X")):
		base, s = 16, s[2:]
	case len(s) > 1 && s[0] == '0':
		return 0, false
	}
	if s == "" {
		return 0, false
	}
	for i := range len(s) {
		var d uint64
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			d = uint64(c - '0')
		case base == 16 && 'a' <= c|0x20 && c|0x20 <= 'f':
			d = uint64(c|0x20-'a') + 10
		default:
			return 0, false
		}
		if d > limit || n > (limit-d)/base {
			return 0, false
		}
		n = n*base + d
	}
	return n, true
}
