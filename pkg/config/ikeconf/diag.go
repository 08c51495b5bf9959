package ikeconf

import (
	"fmt"
	"slices"

	"github.com/missiu/missiu/pkg/config/lexer"
)

// Pos is a place in a file.
type Pos = lexer.Pos

// Diagnostic is one error or warning about a file, as FILE:LINE:COL: text.
type Diagnostic = lexer.Message

// Failed reports whether there is an error among ds, not only warnings.
func Failed(ds []Diagnostic) bool {
	return slices.ContainsFunc(ds, func(d Diagnostic) bool { return !d.Warning })
}

// list collects what is said about one file, each thing once: of a parameter
// that several rules inherit there is no more to say than of one.
type list struct {
	lexer.List
	said map[Diagnostic]bool
}

func newList(file string) *list {
	return &list{lexer.List{File: file}, map[Diagnostic]bool{}}
}

func (l *list) once(d Diagnostic) bool {
	first := !l.said[d]
	l.said[d] = true
	return first
}

func (l *list) errorf(p Pos, format string, a ...any) {
	if s := fmt.Sprintf(format, a...); l.once(Diagnostic{Pos: p, Text: s}) {
		l.Errorf(p, "%s", s)
	}
}

func (l *list) warnf(p Pos, format string, a ...any) {
	if s := fmt.Sprintf(format, a...); l.once(Diagnostic{Pos: p, Warning: true, Text: s}) {
		l.Warnf(p, "%s", s)
	}
}

func shown(s string) string { return lexer.Shown(s) }

func or(words []string) string { return lexer.Or(words...) }
