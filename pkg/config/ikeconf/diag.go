package ikeconf

import (
	"fmt"
	"slices"
	"strings"
)

// Pos is a place in a file: line and column from 1; a column counts octets. The
// zero Pos is no place.
type Pos struct{ Line, Col int }

func (p Pos) String() string { return fmt.Sprintf("%d:%d", p.Line, p.Col) }

func (p Pos) compare(q Pos) int {
	if p.Line != q.Line {
		return p.Line - q.Line
	}
	return p.Col - q.Col
}

// Diagnostic is one error or warning about a file. It is an error value too.
type Diagnostic struct {
	File    string // as named to Parse
	Pos     Pos    // zero: the whole file
	Warning bool
	Text    string
}

// String gives FILE:LINE:COL: text; warnings say so before the text.
func (d Diagnostic) String() string {
	s := d.File
	if d.Pos != (Pos{}) {
		s += ":" + d.Pos.String()
	}
	s += ": "
	if d.Warning {
		s += "warning: "
	}
	return s + d.Text
}

func (d Diagnostic) Error() string { return d.String() }

// Failed reports whether there is an error among ds, not only warnings.
func Failed(ds []Diagnostic) bool {
	return slices.ContainsFunc(ds, func(d Diagnostic) bool { return !d.Warning })
}

// maxErrors is how many errors, and how many warnings, are reported of one file.
const maxErrors = 20

// list collects what is said about one file, in any order.
type list struct {
	file       string
	errs, warn []Diagnostic
}

func (l *list) errorf(p Pos, format string, a ...any) {
	l.errs = add(l.errs, Diagnostic{l.file, p, false, fmt.Sprintf(format, a...)})
}

func (l *list) warnf(p Pos, format string, a ...any) {
	l.warn = add(l.warn, Diagnostic{l.file, p, true, fmt.Sprintf(format, a...)})
}

// add bounds what a hostile file can cost: those first in the text are kept.
func add(ds []Diagnostic, d Diagnostic) []Diagnostic {
	if len(ds) >= 8*maxErrors {
		ds = sorted(ds)
		ds = ds[:min(len(ds), 2*maxErrors)]
	}
	return append(ds, d)
}

// sorted orders by place and drops what is said twice, as of a parameter that
// several rules inherit.
func sorted(ds []Diagnostic) []Diagnostic {
	slices.SortStableFunc(ds, func(a, b Diagnostic) int { return a.Pos.compare(b.Pos) })
	var out []Diagnostic
	for i, d := range ds {
		from := i
		for from > 0 && ds[from-1].Pos == d.Pos {
			from--
		}
		if !slices.Contains(ds[from:i], d) {
			out = append(out, d)
		}
	}
	return out
}

// all returns errors, at most maxErrors and then one that says so, and warnings.
func (l *list) all() []Diagnostic {
	var out []Diagnostic
	for _, ds := range [][]Diagnostic{l.errs, l.warn} {
		ds = sorted(ds)
		if len(ds) > maxErrors {
			more := Diagnostic{l.file, ds[maxErrors].Pos, ds[0].Warning, "too many errors"}
			if more.Warning {
				more.Text = "too many warnings"
			}
			ds = append(ds[:maxErrors:maxErrors], more)
		}
		out = append(out, ds...)
	}
	slices.SortStableFunc(out, func(a, b Diagnostic) int { return a.Pos.compare(b.Pos) })
	return out
}

// shown prepares a piece of the configuration for a message: printable, cut to
// a bearable length, in quotes.
func shown(s string) string {
	const most = 100
	if r := []rune(s); len(r) > most {
		s = string(r[:most]) + "..."
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			fmt.Fprintf(&b, `\x%02x`, r)
			continue
		}
		b.WriteRune(r)
	}
	return b.String() + `"`
}

// or joins words as in "a, b or c".
func or(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

// suggest returns the keyword probably meant by w: equal but for case, or the
// only closest one within two edits.
func suggest(w string, known []string) string {
	best, dist, only := "", 3, false
	if len(w) > 64 {
		return ""
	}
	for _, k := range known {
		if strings.EqualFold(k, w) {
			return k
		}
		// A short word is near to everything.
		if d := edits(w, k); d <= dist && d < 3 && d < max(len(w), len(k))-1 {
			best, dist, only = k, d, d < dist
		}
	}
	if !only {
		return ""
	}
	return best
}

// edits is the Levenshtein distance, 3 for anything that is surely more than 2.
func edits(a, b string) int {
	if d := len(a) - len(b); d > 2 || d < -2 {
		return 3
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
