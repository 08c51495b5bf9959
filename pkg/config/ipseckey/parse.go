package ipseckey

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

type parser struct {
	lex   *lexer.Lexer
	tok   lexer.Token // the next one
	l     *lexer.List
	opt   Options
	hosts map[string][]netip.Addr
	exit  bool // the file ends here
}

// maxWords on a line: all extensions with their values are far less.
const maxWords = 256

const (
	wantVerb = "want add, update, update-pair, delete, delete-pair, get, flush, dump, save, monitor, help or exit"
	wantType = "want esp, ah or all"
)

var verbs = []string{
	"add", "update", "update-pair", "delete", "delete-pair", "get", "flush", "dump", "save",
	"monitor", "passive_monitor", "pmonitor", "help", "exit", "quit",
}

// line takes the words up to the end of the line. A word that is none is reported.
func (p *parser) line() (ws []lexer.Token, ok bool) {
	ok = true
	for first := true; p.tok.Kind != lexer.EOF && (first || !p.tok.First); first = false {
		switch p.tok.Kind {
		case lexer.Bad:
			p.l.Errorf(p.tok.Pos, "%s", p.tok.Text) // has none of the word
			ok = false
		case lexer.String:
			p.l.Errorf(p.tok.Pos, "want it without quotes")
			ok = false
		}
		if len(ws) == maxWords {
			p.l.Errorf(p.tok.Pos, "more than %d words on a line", maxWords)
			ok = false
		}
		if len(ws) <= maxWords {
			ws = append(ws, p.tok)
		}
		p.tok = p.lex.Next()
	}
	return ws, ok
}

func (p *parser) command() []Command {
	ws, ok := p.line()
	if !ok {
		return nil
	}
	verb := ws[0]
	if !slices.Contains(verbs, verb.Text) {
		if k := lexer.Suggest(verb.Text, verbs); k != "" {
			p.l.Errorf(verb.Pos, "unknown command; did you mean %q?", k)
		} else {
			p.l.Errorf(verb.Pos, "unknown command; %s", wantVerb)
		}
		return nil
	}
	switch verb.Text {
	case "exit", "quit", "help", "monitor", "passive_monitor", "pmonitor":
		return p.simple(verb, ws[1:])
	}
	c := Command{Pos: verb.Pos, Verb: Verb(verb.Text)}
	ws = ws[1:]
	typed := true
	switch {
	case len(ws) == 0:
		typed = false
	case ws[0].Text == "esp":
		c.Proto = ipsec.ESP
	case ws[0].Text == "ah":
		c.Proto = ipsec.AH
	case ws[0].Text != "all":
		typed = false
	}
	one := c.Verb != Flush && c.Verb != Dump && c.Verb != Save
	switch {
	case !typed && (one || c.Verb == Save || len(ws) > 0):
		p.l.Errorf(c.Pos, "%s: %s behind it", c.Verb, wantType)
		return nil
	case one && c.Proto == 0:
		p.l.Errorf(ws[0].Pos, "%s: want esp or ah", c.Verb)
		return nil
	}
	if typed {
		ws = ws[1:]
	}
	if !one {
		switch {
		case c.Verb == Save && len(ws) <= 1:
			if c.HideKeys = p.opt.HideKeys; len(ws) == 1 {
				c.File = ws[0].Text
			}
		case len(ws) > 0:
			p.l.Errorf(ws[0].Pos, "%s: too many words", c.Verb)
			return nil
		}
		return []Command{c}
	}
	return p.sa(c, ws)
}

// simple is a command about no SA.
func (p *parser) simple(verb lexer.Token, ws []lexer.Token) []Command {
	if len(ws) > 0 {
		p.l.Errorf(ws[0].Pos, "%s: too many words", verb.Text)
		return nil
	}
	switch verb.Text {
	case "exit", "quit":
		p.exit = true
		return nil
	case "help":
		return []Command{{Pos: verb.Pos, Verb: Help}}
	}
	if t := p.tok; t.Kind != lexer.EOF && !t.IsWord("exit") && !t.IsWord("quit") {
		p.l.Errorf(t.Pos, "%s goes on until it is interrupted; nothing comes behind it", verb.Text)
	}
	return []Command{{Pos: verb.Pos, Verb: Monitor}}
}

// sa reads the extensions of an SA.
func (p *parser) sa(c Command, ws []lexer.Token) []Command {
	x := &extensions{p: p, c: c, given: map[string]lexer.Pos{}}
	for len(ws) > 0 && !x.bad {
		key := ws[0]
		name := canonical(key.Text)
		e, ok := table[name]
		switch {
		case !ok:
			// Whatever stands here may be a key out of place.
			if k := lexer.Suggest(key.Text, keywords); k != "" {
				x.errorf(key, "unknown extension; did you mean %q?", k)
			} else {
				x.errorf(key, "unknown extension")
			}
		case x.given[name] != lexer.Pos{}:
			x.errorf(key, "%s given twice; first at %v", name, x.given[name])
		case len(ws) <= e.values:
			x.errorf(key, "%s: value missing", key.Text)
		default:
			x.given[name] = key.Pos
			v := key
			if e.values > 0 {
				v = ws[1]
			}
			x.key = key
			if e.values > 1 {
				x.value = ws[2]
			}
			e.take(x, v)
			ws = ws[1+e.values:]
			continue
		}
		break
	}
	if x.bad {
		x.c.SA.Wipe()
		return nil
	}
	return x.finish()
}

// canonical gives the one name of an extension that has several.
func canonical(s string) string {
	switch s {
	case "authalg":
		return "auth_alg"
	case "encralg":
		return "encr_alg"
	case "saddr", "srcaddr", "src6", "saddr6", "srcaddr6":
		return "src"
	case "daddr", "dstaddr", "dst6", "daddr6", "dstaddr6":
		return "dst"
	case "ulp":
		return "proto"
	case "innersrc", "proxy", "proxyaddr", "isrc6", "innersrc6", "proxy6", "proxyaddr6":
		return "isrc"
	case "innerdst", "idst6", "innerdst6":
		return "idst"
	case "innersport":
		return "isport"
	case "innerdport":
		return "idport"
	case "iulp":
		return "iproto"
	}
	return s
}

// number reads a decimal, octal or hexadecimal number, as ipseckey does.
func number(s string, limit uint64) (uint64, bool) {
	base := 10
	switch {
	case strings.HasPrefix(s, "0x"), strings.HasPrefix(s, "0X"):
		base, s = 16, s[2:]
	case len(s) > 1 && s[0] == '0':
		base, s = 8, s[1:]
	}
	n, err := strconv.ParseUint(s, base, 64)
	return n, err == nil && n <= limit && s[0] != '+'
}

// addrs reads an address or a name.
func (p *parser) addrs(s string) ([]netip.Addr, bool) {
	if a, err := netip.ParseAddr(s); err == nil {
		return []netip.Addr{a}, a.Zone() == "" && !a.Is4In6() && !a.IsMulticast()
	}
	if !ipsecconf.HostName(s) {
		return nil, false
	}
	as, ok := p.hosts[s]
	if !ok && p.opt.LookupHost != nil {
		as, _ = p.opt.LookupHost(s)
		slices.SortFunc(as, netip.Addr.Compare)
		as = slices.Compact(as)
		p.hosts[s] = as
	}
	return as, len(as) > 0
}
