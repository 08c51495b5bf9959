package ipsecconf

import "strings"

var escape = strings.NewReplacer(`"`, `\"`, `\`, `\\`)

// text is what Parse reads f from again, apart from comments, layout and positions.
func text(f *File) string {
	var b strings.Builder
	for _, i := range f.Items {
		i.(interface{ write(*strings.Builder) }).write(&b)
		b.WriteByte('\n')
	}
	return b.String()
}

func (w Word) write(b *strings.Builder) {
	if w.Quoted {
		b.WriteString(`"` + escape.Replace(w.Text) + `"`)
	} else {
		b.WriteString(w.Text)
	}
}

func writeParams(b *strings.Builder, open string, ps []Param, end string) {
	b.WriteString(open)
	for _, p := range ps {
		b.WriteByte(' ')
		p.Key.write(b)
		if p.Value.Text != "" || p.Value.Quoted {
			b.WriteByte(' ')
			p.Value.write(b)
		}
	}
	if len(ps) > 0 {
		b.WriteByte(' ')
	}
	b.WriteString(end)
}

func (e *Entry) write(b *strings.Builder) {
	writeParams(b, "{", e.Selectors, "}")
	for i, a := range e.Alternatives {
		if i > 0 {
			b.WriteString(" or")
		}
		b.WriteByte(' ')
		a.Action.write(b)
		writeParams(b, " {", a.Properties, "}")
	}
}

func (c *Constants) write(b *strings.Builder) { writeParams(b, "[", c.Defs, "]") }

func (c *Command) write(b *strings.Builder) {
	c.Name.write(b)
	for _, a := range c.Args {
		b.WriteByte(' ')
		a.write(b)
	}
	b.WriteByte(';')
}
