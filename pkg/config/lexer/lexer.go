// Package lexer splits the texts of our configuration languages into tokens
// with positions, and collects what is wrong with them in lists sorted by
// place. It knows no keyword. For pkg/config/ipsecconf and pkg/config/ikeconf.
package lexer

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// Pos is a place in a text: line and column from 1, a column is an octet, as Go
// counts; a tab is one. The zero Pos is the text as a whole.
type Pos struct{ Line, Col int }

// IsValid reports whether p is a place within the text.
func (p Pos) IsValid() bool { return p.Line > 0 }

// Before reports whether p stands before q.
func (p Pos) Before(q Pos) bool { return p.Line < q.Line || p.Line == q.Line && p.Col < q.Col }

func (p Pos) String() string { return fmt.Sprintf("%d:%d", p.Line, p.Col) }

// Kind is the kind of a token.
type Kind uint8

// Kinds. Of Bad tokens Text is the message.
const (
	EOF Kind = iota
	Word
	String
	Punct
	Bad
)

// Token is a piece of text. Text is what a word or sign is written as, and what
// a string means.
type Token struct {
	Kind  Kind
	First bool // the first of its line
	Glued bool // no blank between it and the token before
	Pos   Pos
	Off   int // of its first octet in the text
	Text  string
}

// Is reports whether t is the sign c.
func (t Token) Is(c string) bool { return t.Kind == Punct && t.Text == c }

// IsWord reports whether t is the bare word w.
func (t Token) IsWord(w string) bool { return t.Kind == Word && t.Text == w }

// IsValue reports whether t is a word or a string.
func (t Token) IsValue() bool { return t.Kind == Word || t.Kind == String }

// MaxToken is the length that a word or a string may have, in octets. A longer
// one is a Bad token.
const MaxToken = 4096

// mark is what some editors put in front of a text in UTF-8. It counts for nothing.
const mark = "\ufeff"

// Syntax is what the languages differ in. In both, blanks separate tokens, "#"
// starts a comment that the line ends, and strings stand in double quotes:
// UTF-8 of one line, in which a backslash escapes a quote and a backslash and
// else stands for itself.
type Syntax struct {
	Punct    string // octets that are tokens by themselves
	Slashes  bool   // "//" starts a comment, too
	Continue bool   // backslash and newline are a blank; else they are Bad
}

// Lexer makes tokens of a text. After the end it returns EOF again and again.
type Lexer struct {
	syntax    Syntax
	src       string
	off       int
	line      int
	lineStart int
}

// New returns a lexer at the start of src.
func New(src string, s Syntax) *Lexer { return &Lexer{syntax: s, src: src, line: 1} }

// ReadAll reads a text of at most limit octets.
func ReadAll(r io.Reader, limit int64) (string, error) {
	var b strings.Builder
	n, err := io.Copy(&b, io.LimitReader(r, limit+1))
	if err != nil {
		return "", err
	}
	if n > limit {
		return "", fmt.Errorf("larger than %d octets", limit)
	}
	return b.String(), nil
}

func (l *Lexer) pos() Pos { return Pos{l.line, l.off - l.lineStart + 1} }

// at reports whether the text goes on with s.
func (l *Lexer) at(s string) bool { return strings.HasPrefix(l.src[l.off:], s) }

func (l *Lexer) newline() {
	l.off++
	l.line++
	l.lineStart = l.off
}

// continuation returns the length of a backslash before a line end, else 0.
func (l *Lexer) continuation() int {
	switch {
	case l.at("\\\n"):
		return 1
	case l.at("\\\r\n"):
		return 2
	}
	return 0
}

// Next returns the next token.
func (l *Lexer) Next() Token {
	t := Token{First: l.off == 0, Glued: l.off > 0}
	if l.off == 0 && l.at(mark) {
		l.off, l.lineStart = len(mark), len(mark)
	}
	for l.off < len(l.src) {
		c := l.src[l.off]
		switch {
		case c == '\n':
			l.newline()
			t.First, t.Glued = true, false
		case c == ' ' || c == '\t' || c == '\r' || c == '\f' || c == '\v':
			l.off++
			t.Glued = false
		case l.comment():
			t.Glued = false
			if i := strings.IndexByte(l.src[l.off:], '\n'); i >= 0 {
				l.off += i
			} else {
				l.off = len(l.src)
			}
		case l.continuation() > 0:
			if !l.syntax.Continue {
				t.Kind, t.Pos, t.Off, t.Text = Bad, l.pos(), l.off, "a line is not continued by a backslash; a newline within braces is a blank"
				l.off++
				return t
			}
			l.off += l.continuation()
			l.newline()
			t.Glued = false
		default:
			t.Pos, t.Off = l.pos(), l.off
			switch {
			case c == '"':
				t.Kind, t.Text, t.Pos = l.quoted()
			case strings.IndexByte(l.syntax.Punct, c) >= 0:
				t.Kind, t.Text = Punct, l.src[l.off:l.off+1]
				l.off++
			default:
				t.Kind, t.Text, t.Pos = l.word()
			}
			return t
		}
	}
	t.Pos, t.Off = l.pos(), l.off
	return t
}

func (l *Lexer) comment() bool {
	return l.src[l.off] == '#' || l.syntax.Slashes && l.at("//")
}

// word takes everything up to a blank, a sign, a quote or a comment.
func (l *Lexer) word() (Kind, string, Pos) {
	start, at := l.off, l.pos()
	bad := Pos{}
	for l.off < len(l.src) {
		c := l.src[l.off]
		if c <= ' ' && strings.IndexByte(" \t\r\n\f\v", c) >= 0 || c == '"' ||
			strings.IndexByte(l.syntax.Punct, c) >= 0 || l.comment() || l.continuation() > 0 {
			break
		}
		if (c < ' ' || c == 0x7f) && !bad.IsValid() {
			bad = l.pos()
		}
		l.off++
	}
	w := l.src[start:l.off]
	switch {
	case bad.IsValid():
		return Bad, "control character", bad
	case len(w) > MaxToken:
		return Bad, fmt.Sprintf("word of more than %d octets", MaxToken), at
	}
	return Word, w, at
}

// quoted takes a string. After an error it stands behind the string, or at the
// end of its line.
func (l *Lexer) quoted() (Kind, string, Pos) {
	at := l.pos()
	l.off++
	start := l.off
	bad, escapes := Pos{}, false
	for ; l.off < len(l.src) && l.src[l.off] != '\n'; l.off++ {
		switch c := l.src[l.off]; {
		case c == '"':
			s := l.src[start:l.off]
			l.off++
			switch {
			case bad.IsValid():
				return Bad, "control character in string", bad
			case len(s) > MaxToken:
				return Bad, fmt.Sprintf("string of more than %d octets", MaxToken), at
			case !utf8.ValidString(s):
				return Bad, "string is not UTF-8", at
			case escapes:
				s = unescape.Replace(s)
			}
			return String, s, at
		case c == '\\' && l.off+1 < len(l.src) && (l.src[l.off+1] == '"' || l.src[l.off+1] == '\\'):
			escapes = true
			l.off++
		case (c < ' ' || c == 0x7f) && !bad.IsValid():
			bad = l.pos()
		}
	}
	return Bad, "unterminated string", at
}

var unescape = strings.NewReplacer(`\"`, `"`, `\\`, `\`)
