package lexer

import (
	"fmt"
	"strings"
	"testing"
)

var testSyntax = Syntax{Punct: "{}(),=", Slashes: true, Continue: true}

func dump(src string, s Syntax) string {
	var b strings.Builder
	for l := New(src, s); ; {
		t := l.Next()
		if t.Kind == EOF {
			return strings.TrimSpace(b.String())
		}
		fmt.Fprintf(&b, "%v%s%q ", t.Pos, [...]string{"", "w", "s", "p", "!"}[t.Kind], t.Text)
	}
}

func TestTokens(t *testing.T) {
	for _, tt := range []struct {
		name, src, want string
		s               Syntax
	}{
		{"empty", "", "", testSyntax},
		{"blanks", " \t\r\n\f\v\n", "", testSyntax},
		{"words and signs", "a{b}c", `1:1w"a" 1:2p"{" 1:3w"b" 1:4p"}" 1:5w"c"`, testSyntax},
		{"comments", "a#b\n//c\nd//e\nf", `1:1w"a" 3:1w"d" 4:1w"f"`, testSyntax},
		{"slashes are text", "a//b", `1:1w"a//b"`, Syntax{}},
		{"string", `"a \"b\" \\ c\d"`, `1:1s"a \"b\" \\ c\\d"`, testSyntax},
		{"string next to words", `a"b"c`, `1:1w"a" 1:2s"b" 1:5w"c"`, testSyntax},
		{"unterminated", "x \"a\nb", `1:1w"x" 1:3!"unterminated string" 2:1w"b"`, testSyntax},
		{"unterminated by escape", `"a\"`, `1:1!"unterminated string"`, testSyntax},
		{"tab in string", "\"a\tb\" c", `1:3!"control character in string" 1:7w"c"`, testSyntax},
		{"not UTF-8", "\"\xff\"", `1:1!"string is not UTF-8"`, testSyntax},
		{"control character in word", "a\x00b c", `1:2!"control character" 1:5w"c"`, testSyntax},
		{"continued", "a \\\n b\\\r\nc", `1:1w"a" 2:2w"b" 3:1w"c"`, testSyntax},
		{"not continued", "a \\\nb", `1:1w"a" 1:3!"a line is not continued by a backslash; a newline within braces is a blank" 2:1w"b"`, Syntax{}},
		{"backslash is text", `a\b \`, `1:1w"a\\b" 1:5w"\\"`, testSyntax},
		{"long word", strings.Repeat("x", MaxToken+1), `1:1!"word of more than 4096 octets"`, testSyntax},
		{"long string", `"` + strings.Repeat("x", MaxToken+1) + `"`, `1:1!"string of more than 4096 octets"`, testSyntax},
		{"byte order mark", "\ufeffa b\n\ufeffc", `1:1w"a" 1:3w"b" 2:1w"` + "\\ufeff" + `c"`, testSyntax},
		{"byte order mark alone", "\ufeff", "", testSyntax},
		{"columns are octets", "é x", `1:1w"é" 1:4w"x"`, testSyntax},
	} {
		if got := dump(tt.src, tt.s); got != tt.want {
			t.Errorf("%s: got\n%s\nwant\n%s", tt.name, got, tt.want)
		}
	}
}

func TestFirstGlued(t *testing.T) {
	var got []string
	for l := New("a b\nc{d", testSyntax); ; {
		tk := l.Next()
		if tk.Kind == EOF {
			break
		}
		got = append(got, fmt.Sprint(tk.Text, " ", tk.First, " ", tk.Glued))
	}
	want := "[a true false b false false c true false { false true d false true]"
	if fmt.Sprint(got) != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestListBounded(t *testing.T) {
	l := List{File: "f", Max: 3}
	for i := 100000; i > 0; i-- {
		l.Errorf(Pos{i, 1}, "e%d", i)
		l.Warnf(Pos{i, 1}, "w%d", i)
		if len(l.errors.l) > 64 || len(l.warnings.l) > 64 {
			t.Fatalf("holds %d errors", len(l.errors.l))
		}
	}
	want := "f:1:1: e1\nf:2:1: e2\nf:3:1: e3\nf: too many errors"
	if got := l.Err().Error(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got, want := l.Warnings()[0].String(), "f:1:1: warning: w1"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestReadAll(t *testing.T) {
	if s, err := ReadAll(strings.NewReader("abc"), 3); s != "abc" || err != nil {
		t.Errorf("got %q, %v", s, err)
	}
	if _, err := ReadAll(strings.NewReader("abcd"), 3); err == nil || err.Error() != "larger than 3 octets" {
		t.Errorf("got %v", err)
	}
}

func TestSuggest(t *testing.T) {
	known := []string{"raddr", "laddr", "ulp", "dir", "encr_algs"}
	for _, tt := range []struct{ word, want string }{
		{"radr", "raddr"}, {"Raddr", "raddr"}, {"encr_agls", "encr_algs"}, {"ULP", "ulp"}, {"lp", "ulp"},
		{"frobnicate", ""}, {"x", ""}, {strings.Repeat("x", 1<<16), ""},
	} {
		if got := Suggest(tt.word, known); got != tt.want {
			t.Errorf("Suggest(%.20q) = %q, want %q", tt.word, got, tt.want)
		}
	}
}

func TestShown(t *testing.T) {
	for _, tt := range []struct{ s, want string }{
		{"a b", `"a b"`}, {"é", `"é"`}, {"a\x1b[2J", `"a\x1b[2J"`}, {"\xff", `"\xff"`},
		{strings.Repeat("é", 100), `"` + strings.Repeat("é", 64) + `..."`},
	} {
		if got := Shown(tt.s); got != tt.want {
			t.Errorf("Shown(%q) = %s, want %s", tt.s, got, tt.want)
		}
	}
}

// FuzzLexer: tokens stand in the text where they say, in order, and written
// down again give the same tokens.
func FuzzLexer(f *testing.F) {
	for _, s := range []string{"{ raddr 10.0.0.1 } drop {}", "\"a\\\"b\" // c\n# d\n\\\nx(1..2)", "\"\n\x00", "a\\"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, src string) {
		var toks []Token
		last := Pos{}
		for l := New(src, testSyntax); ; {
			tk := l.Next()
			if tk.Kind == EOF {
				break
			}
			if !last.Before(tk.Pos) {
				t.Fatalf("%v at %v behind %v", tk, tk.Pos, last)
			}
			last = tk.Pos
			if tk.Kind == Bad {
				return
			}
			toks = append(toks, tk)
		}
		var b strings.Builder
		escape := strings.NewReplacer(`"`, `\"`, `\`, `\\`)
		for _, tk := range toks {
			if tk.Kind == String {
				b.WriteString(`"` + escape.Replace(tk.Text) + `" `)
			} else {
				b.WriteString(tk.Text + " ")
			}
		}
		l := New(b.String(), testSyntax)
		for _, want := range toks {
			if got := l.Next(); got.Kind != want.Kind || got.Text != want.Text {
				t.Fatalf("%q: got %v, want %v", b.String(), got, want)
			}
		}
	})
}
