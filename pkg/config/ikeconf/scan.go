package ikeconf

import "unicode/utf8"

// kind of a token; punctuation is its own character.
type kind byte

const (
	eof  kind = 0
	word kind = 'w'
	str  kind = 's'
)

// token is a piece of a file: src[off:end], of a string without its quotes.
type token struct {
	kind     kind
	off, end int32
	line     int32
	col      int32
}

// The scanner of pkg/config/lexer makes strings, which cannot be wiped; here
// tokens point into the file, since it may hold secrets.

func (t token) pos() Pos { return Pos{Line: int(t.line), Col: int(t.col)} }

func blank(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// ends reports whether a word ends before src[i:].
func ends(src []byte, i int) bool {
	switch c := src[i]; c {
	case '"', '{', '}', '(', ')', ',', '=', '#':
		return true
	case '/':
		return i+1 < len(src) && src[i+1] == '/'
	case '\\':
		return continues(src, i) > 0
	default:
		return blank(c)
	}
}

// continues returns the length of a backslash-newline at src[i:], 0 if none.
func continues(src []byte, i int) int {
	for n := 1; i+n < len(src) && n < 3; n++ {
		if src[i+n] == '\n' {
			return n + 1
		}
		if src[i+n] != '\r' {
			break
		}
	}
	return 0
}

func control(c byte) bool { return c < ' ' || c == 0x7f }

// scan cuts src into tokens, the last of which is eof. It stops at the first
// lexical error: what follows would be noise.
func scan(src []byte, l *list) (toks []token, ok bool) {
	line, start := 1, 0 // start: offset of the line
	at := func(i int) Pos { return Pos{Line: line, Col: i - start + 1} }
	add := func(k kind, i, off, end int) {
		toks = append(toks, token{k, int32(off), int32(end), int32(line), int32(i - start + 1)})
	}
	for i := 0; i < len(src); {
		switch c := src[i]; {
		case c == '\n':
			i++
			line, start = line+1, i
		case blank(c):
			i++
		case c == '\\' && continues(src, i) > 0:
			i += continues(src, i)
			line, start = line+1, i
		case c == '#', c == '/' && ends(src, i):
			for i < len(src) && src[i] != '\n' {
				i++
			}
		case c == '"':
			j := i + 1
			for j < len(src) && src[j] != '"' && src[j] != '\n' {
				if src[j] == '\\' && j+1 < len(src) && (src[j+1] == '"' || src[j+1] == '\\') {
					j++
				}
				j++
			}
			if j >= len(src) || src[j] != '"' {
				l.errorf(at(i), "unterminated string")
				return nil, false
			}
			for k := i + 1; k < j; k++ {
				if control(src[k]) {
					l.errorf(at(k), "control character in string")
					return nil, false
				}
			}
			if !utf8.Valid(src[i+1 : j]) {
				l.errorf(at(i), "string is not UTF-8")
				return nil, false
			}
			add(str, i, i+1, j)
			i = j + 1
		case ends(src, i): // punctuation
			add(kind(c), i, i, i+1)
			i++
		default:
			j := i
			for j < len(src) && !ends(src, j) {
				if control(src[j]) {
					l.errorf(at(j), "control character")
					return nil, false
				}
				j++
			}
			if !utf8.Valid(src[i:j]) {
				l.errorf(at(i), "word is not UTF-8")
				return nil, false
			}
			add(word, i, i, j)
			i = j
		}
	}
	add(eof, len(src), len(src), len(src))
	return toks, true
}

// value returns the octets of a token, of a string with its escapes resolved,
// as a slice of its own.
func (t token) value(src []byte) []byte {
	raw := src[t.off:t.end]
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		if t.kind == str && raw[i] == '\\' && i+1 < len(raw) && (raw[i+1] == '"' || raw[i+1] == '\\') {
			i++
		}
		out = append(out, raw[i])
	}
	return out
}
