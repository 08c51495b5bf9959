package lexer

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Message is one error or warning about a text.
type Message struct {
	File    string // as the user named it; may be empty
	Pos     Pos
	Warning bool
	Text    string
}

// String gives FILE:LINE:COL: text, of which missing parts are left out.
func (m Message) String() string {
	var b strings.Builder
	if m.File != "" {
		b.WriteString(m.File + ":")
	}
	if m.Pos.IsValid() {
		b.WriteString(m.Pos.String() + ":")
	}
	if b.Len() > 0 {
		b.WriteByte(' ')
	}
	if m.Warning {
		b.WriteString("warning: ")
	}
	return b.String() + m.Text
}

// Error makes a Message an error.
func (m Message) Error() string { return m.String() }

// DefaultMax is how many errors, and how many warnings, a List reports.
const DefaultMax = 20

// List collects messages about one text in any order. However many come, it
// holds a bounded number: those that stand first in the text. The zero List is
// ready; it is not safe for concurrent use.
type List struct {
	File             string
	Max              int // of errors, and of warnings; 0: DefaultMax
	errors, warnings bounded
}

// bounded keeps the first max messages by place, and up to as many more before
// it drops them.
type bounded struct {
	l    []Message
	n    int // ever
	more bool
}

func (b *bounded) add(m Message, limit int) {
	b.n++
	b.l = append(b.l, m)
	if len(b.l) >= 2*limit+16 {
		b.cut(limit)
	}
}

func (b *bounded) cut(limit int) {
	slices.SortStableFunc(b.l, func(x, y Message) int {
		switch {
		case x.Pos.Before(y.Pos):
			return -1
		case y.Pos.Before(x.Pos):
			return 1
		}
		return 0
	})
	if len(b.l) > limit {
		clear(b.l[limit:])
		b.l, b.more = b.l[:limit], true
	}
}

func (l *List) max() int {
	if l.Max > 0 {
		return l.Max
	}
	return DefaultMax
}

// Errorf adds an error.
func (l *List) Errorf(p Pos, format string, a ...any) {
	l.errors.add(Message{File: l.File, Pos: p, Text: fmt.Sprintf(format, a...)}, l.max())
}

// Warnf adds a warning.
func (l *List) Warnf(p Pos, format string, a ...any) {
	l.warnings.add(Message{File: l.File, Pos: p, Warning: true, Text: fmt.Sprintf(format, a...)}, l.max())
}

// Failed reports whether there are errors.
func (l *List) Failed() bool { return len(l.errors.l) > 0 }

// Count is how many errors were added.
func (l *List) Count() int { return l.errors.n }

// Errors returns the errors sorted by place, at most Max, then if there were
// more a last one that says so.
func (l *List) Errors() []Message { return l.errors.all(l, "too many errors", false) }

// Warnings returns the warnings likewise.
func (l *List) Warnings() []Message { return l.warnings.all(l, "too many warnings", true) }

func (b *bounded) all(l *List, more string, warning bool) []Message {
	b.cut(l.max())
	out := slices.Clone(b.l)
	if b.more {
		out = append(out, Message{File: l.File, Warning: warning, Text: more})
	}
	return out
}

// All returns errors and warnings, sorted by place together; warnings only
// while there are no errors, which may be their cause.
func (l *List) All() []Message {
	if l.Failed() {
		return l.Errors()
	}
	return l.Warnings()
}

// Err returns nil without errors, else an error that is all of them: its text
// has a line for each, and errors.As finds the first Message.
func (l *List) Err() error {
	if !l.Failed() {
		return nil
	}
	var errs []error
	for _, m := range l.Errors() {
		errs = append(errs, m)
	}
	return errors.Join(errs...)
}

// Print writes messages, one a line.
func Print(w io.Writer, ms []Message) {
	for _, m := range ms {
		fmt.Fprintln(w, m)
	}
}

// Shown prepares a piece of the text for a message: in quotes, printable, cut
// to a bearable length.
func Shown(s string) string {
	const most = 128
	if len(s) > most {
		cut := most
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut] + "..."
	}
	for _, r := range s {
		if !strconv.IsPrint(r) || r == utf8.RuneError {
			return strconv.Quote(s)
		}
	}
	return `"` + s + `"`
}

// Or joins words as in "a, b or c".
func Or(words ...string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}
