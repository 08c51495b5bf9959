package ikeconf

import (
	"encoding/hex"
	"slices"
	"strings"

	"github.com/missiu/missiu/pkg/ipsec"
)

// secret is one entry of the secrets file.
type secret struct {
	pos    Pos
	labels []item

	local, remote ipsec.Key // a pre-shared key
	localID       ident
	remoteID      ident
	pair          bool // for the pair of identities

	user     string
	password ipsec.Key
	ntHash   ipsec.Key
	ppkID    string
	ppk      ipsec.Key
	keyFile  string
	phrase   ipsec.Key
}

func (s *secret) wipe() {
	for _, k := range []ipsec.Key{s.local, s.remote, s.password, s.ntHash, s.ppk, s.phrase} {
		k.Wipe()
	}
}

// attributes of an entry, with the kind of entry that each makes; "" goes with
// several.
var attributes = map[string]string{
	"label": "", "key": "key", "local_key": "key", "remote_key": "key",
	"localidtype": "key", "remoteidtype": "key", "localid": "key", "remoteid": "key",
	"user": "user", "password": "user", "nt_hash": "user",
	"ppk_id": "ppk", "ppk": "ppk", "key_file": "file", "passphrase": "file",
}

// minKey is the length in octets below which a key draws a warning.
const (
	minKey = 16
	minPPK = 32
)

// secretParser reads a secrets file. No message of it quotes what could be a
// secret, an unknown word included.
type secretParser struct {
	src  []byte
	toks []token
	i    int
	l    *list
}

func (p *secretParser) peek() token { return p.toks[p.i] }

func (p *secretParser) next() token {
	t := p.toks[p.i]
	if t.kind != eof {
		p.i++
	}
	return t
}

func (p *secretParser) attribute() (string, bool) {
	t := p.peek()
	if t.kind != word {
		return "", false
	}
	w := string(p.src[t.off:t.end])
	_, ok := attributes[w]
	return w, ok
}

// skip goes on to the next attribute or brace.
func (p *secretParser) skip() {
	for {
		t := p.peek()
		if _, ok := p.attribute(); ok || t.kind == eof || t.kind == '{' || t.kind == '}' {
			return
		}
		p.next()
	}
}

// parseSecrets reads a secrets file. hasLabel says which rules exist; nil if
// that is not known.
func parseSecrets(src []byte, l *list, hasLabel func(string) bool) []*secret {
	toks, ok := scan(src, l)
	if !ok {
		return nil
	}
	p := &secretParser{src: src, toks: toks, l: l}
	var out []*secret
	first := map[string]Pos{}
	for p.peek().kind != eof {
		t := p.peek()
		if t.kind != '{' {
			if t.kind == word || t.kind == str {
				p.l.errorf(t.pos(), "unknown keyword")
			} else {
				p.l.errorf(t.pos(), "unexpected %q", string(rune(t.kind)))
			}
			p.next()
			for k := p.peek().kind; k != eof && k != '{'; k = p.peek().kind {
				p.next()
			}
			continue
		}
		s, ok := p.entry()
		out = append(out, s)
		if !ok {
			continue
		}
		for _, of := range s.owners() {
			if at, twice := first[of]; twice {
				p.l.errorf(s.pos, "second key for %s; first at %s", of, at)
			} else {
				first[of] = s.pos
			}
		}
		for _, lb := range s.labels {
			if hasLabel != nil && !hasLabel(lb.text) {
				p.l.warnf(lb.pos, "label %s names no rule", shown(lb.text))
			}
		}
	}
	return out
}

// owners names whom a secret is for, of whom there may be only one each.
func (s *secret) owners() (o []string) {
	switch {
	case s.user != "":
		o = append(o, "user "+shown(s.user))
	case s.ppkID != "":
		o = append(o, "ppk_id "+shown(s.ppkID))
	case s.keyFile != "":
		o = append(o, "key_file "+shown(s.keyFile))
	case s.pair:
		o = append(o, "identities "+s.localID.String()+", "+s.remoteID.String())
	default:
		for _, l := range s.labels {
			o = append(o, "label "+shown(l.text))
		}
	}
	return o
}

// seen is an attribute that stood in an entry.
type seen struct {
	word string
	pos  Pos
	tok  token
}

// entry reads one entry; ok is false after an error.
func (p *secretParser) entry() (s *secret, ok bool) {
	open := p.next()
	s = &secret{pos: open.pos()}
	ok = true
	fail := func(pos Pos, text string) {
		ok = false
		p.l.errorf(pos, "%s", text)
	}
	var have []seen
	for p.peek().kind != '}' {
		t := p.peek()
		w, known := p.attribute()
		switch {
		case t.kind == eof || t.kind == '{':
			fail(open.pos(), `"{" is not closed`)
			return s, false
		case !known && (t.kind == word || t.kind == str):
			fail(t.pos(), "unknown keyword")
			p.next()
			p.skip()
			continue
		case !known:
			fail(t.pos(), `unexpected "`+string(rune(t.kind))+`"`)
			p.next()
			p.skip()
			continue
		}
		p.next()
		i := slices.IndexFunc(have, func(h seen) bool { return h.word == w })
		if i >= 0 && w != "label" {
			fail(t.pos(), w+" given twice; first at "+have[i].pos.String())
			p.skip()
			continue
		}
		v := p.peek()
		if _, isWord := p.attribute(); isWord || v.kind != word && v.kind != str {
			fail(t.pos(), w+": value missing")
			p.skip()
			continue
		}
		p.next()
		have = append(have, seen{w, t.pos(), v})
		if w == "label" {
			s.labels = append(s.labels, item{v.pos(), string(v.value(p.src))})
		} else if why := p.set(s, w, v); why != "" {
			fail(v.pos(), w+": "+why)
		}
	}
	p.next()
	if ok {
		ok = p.coherent(s, have)
	}
	return s, ok
}

// set stores an attribute; identities wait for their types.
func (p *secretParser) set(s *secret, w string, v token) (why string) {
	switch w {
	case "key", "local_key", "remote_key", "ppk":
		k, why := secretValue(p.src, v)
		if why != "" {
			return why
		}
		least := minKey
		switch w {
		case "key":
			s.local, s.remote = k, k.Clone()
		case "local_key":
			s.local = k
		case "remote_key":
			s.remote = k
		case "ppk":
			s.ppk, least = k, minPPK
		}
		if k.Len() < least {
			p.l.warnf(v.pos(), "%s: fewer than %d octets", w, least)
		}
	case "nt_hash":
		if v.end-v.off != 32 {
			return "want 32 hex digits"
		}
		k, why := hexKey(p.src[v.off:v.end])
		if why != "" {
			return "want 32 hex digits"
		}
		s.ntHash = k
	case "password":
		s.password = ipsec.NewKey(v.value(p.src))
	case "passphrase":
		s.phrase = ipsec.NewKey(v.value(p.src))
	case "user", "ppk_id", "key_file":
		t := string(v.value(p.src))
		if t == "" {
			return "empty"
		}
		switch w {
		case "user":
			s.user = t
		case "ppk_id":
			s.ppkID = t
		default:
			s.keyFile = t
		}
	}
	return ""
}

const wantSecret = "want hex digits, 0x and hex digits, or a quoted string"

// secretValue reads a key as octets of its own.
func secretValue(src []byte, v token) (ipsec.Key, string) {
	if v.kind == str {
		b := v.value(src)
		if len(b) == 0 {
			return ipsec.Key{}, "empty"
		}
		return ipsec.NewKey(b), ""
	}
	raw := src[v.off:v.end]
	if len(raw) >= 2 && raw[0] == '0' && (raw[1] == 'x' || raw[1] == 'X') {
		raw = raw[2:]
	}
	if len(raw) == 0 {
		return ipsec.Key{}, "empty"
	}
	return hexKey(raw)
}

func hexKey(raw []byte) (ipsec.Key, string) {
	for _, c := range raw {
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'f') {
			return ipsec.Key{}, wantSecret
		}
	}
	b := make([]byte, hex.DecodedLen(len(raw)))
	if _, err := hex.Decode(b, raw); err != nil {
		return ipsec.Key{}, "odd number of hex digits"
	}
	return ipsec.NewKey(b), ""
}

// coherent checks that an entry is one thing, and whole.
func (p *secretParser) coherent(s *secret, have []seen) bool {
	fail := func(text string) bool {
		p.l.errorf(s.pos, "%s", text)
		return false
	}
	at := func(w string) token {
		if i := slices.IndexFunc(have, func(h seen) bool { return h.word == w }); i >= 0 {
			return have[i].tok
		}
		return token{}
	}
	has := func(w string) bool { return at(w).kind != eof }
	var kind, by string
	for _, h := range have {
		k := attributes[h.word]
		switch {
		case k == "":
		case kind == "":
			kind, by = k, h.word
		case k != kind:
			return fail("entry mixes " + by + " and " + h.word)
		}
	}
	for _, pair := range [][2]string{{"key", "local_key"}, {"key", "remote_key"}, {"password", "nt_hash"}, {"label", "ppk_id"}, {"label", "key_file"}, {"label", "localid"}, {"label", "remoteid"}} {
		if has(pair[0]) && has(pair[1]) {
			return fail("entry mixes " + pair[0] + " and " + pair[1])
		}
	}
	s.pair = has("localid") && has("remoteid")
	if len(s.labels) == 0 && !s.pair && s.user == "" && s.ppkID == "" && s.keyFile == "" {
		return fail("entry without a label, identities, user, ppk_id or key_file")
	}
	if s.local.Len() == 0 && s.remote.Len() == 0 && !has("password") && !has("nt_hash") && s.ppk.Len() == 0 && !has("passphrase") {
		return fail("entry without a secret")
	}
	if kind == "user" && s.user == "" || kind == "ppk" && s.ppkID == "" || kind == "file" && s.keyFile == "" {
		return fail("entry without a label, identities, user, ppk_id or key_file")
	}
	if s.pair {
		var ok1, ok2 bool
		s.localID, ok1 = p.entryID(at("localidtype"), "localid", at("localid"))
		s.remoteID, ok2 = p.entryID(at("remoteidtype"), "remoteid", at("remoteid"))
		return ok1 && ok2
	}
	return true
}

// entryID reads localid or remoteid with its type.
func (p *secretParser) entryID(typ token, w string, v token) (ident, bool) {
	name := ""
	if typ.kind != eof {
		var ok bool
		if name, ok = idTypeOf(string(typ.value(p.src))); !ok {
			p.l.errorf(typ.pos(), "%stype: want an identity type such as ip, fqdn, mbox or dn", w)
			return ident{}, false
		}
	}
	s := string(v.value(p.src))
	id, why := parseIdent(name, s, v.kind == str)
	if name == "" && strings.EqualFold(s, "ANY") && v.kind == word {
		id, why = ident{typ: typeAny, pattern: true}, ""
	}
	if why != "" {
		p.l.errorf(v.pos(), "%s: want an identity or ANY", w)
		return ident{}, false
	}
	return id, true
}
