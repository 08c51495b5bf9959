package ikeconf

import (
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/missiu/missiu/pkg/ike/proposal"
)

// Show prints what is in force in the language of the file: the top level, then
// each rule with every default filled in, so that nothing in it depends on the
// top level any more. Read again it means the same. There are no secrets in it.
func (c *Config) Show() string {
	var b strings.Builder
	for i := range table {
		k := &table[i]
		if k.where&inTop == 0 || k.where&inRule != 0 || k.spec.form == flag {
			continue
		}
		for _, p := range c.doc.top.all(k.key()) {
			if p.kw == k {
				fmt.Fprintf(&b, "%s\n", p.show())
			}
		}
		if c.doc.top.one(k.key()) == nil && k.slot == "" && defaults[k.name] != nil {
			fmt.Fprintf(&b, "%s\n", defaults[k.name].show())
		}
	}
	for _, p := range c.doc.pools {
		fmt.Fprintf(&b, "\npool %s {\n", quote(p.label))
		for _, q := range p.params {
			fmt.Fprintf(&b, "    %s\n", q.show())
		}
		b.WriteString("}\n")
	}
	for _, r := range c.rules {
		fmt.Fprintf(&b, "\nrule %s {\n", quote(r.label))
		for i := range table {
			k := &table[i]
			if k.where&inRule == 0 || k.slot != "" || k.name == "label" {
				continue
			}
			ps := []*param{r.get(k.name)}
			if k.where&many != 0 {
				ps = r.list(k.name)
			}
			for _, p := range ps {
				if p != nil {
					fmt.Fprintf(&b, "    %s\n", p.show())
				}
			}
		}
		r.showSuites(&b)
		b.WriteString("}\n")
	}
	return b.String()
}

func (r *rule) showSuites(b *strings.Builder) {
	for _, s := range r.allSuites {
		fmt.Fprintf(b, "    %s {", s.b.word)
		for _, p := range s.b.params {
			fmt.Fprintf(b, " %s", p.show())
		}
		b.WriteString(" }\n")
	}
	if !r.noSuites || len(r.allSuites) > 0 {
		return
	}
	for _, p := range proposal.DefaultIKE() {
		fmt.Fprintf(b, "    ikesa_xform { encr_alg %s", join(p.Ciphers))
		if len(p.Integ) > 0 {
			fmt.Fprintf(b, " auth_alg %s", join(p.Integ))
		}
		fmt.Fprintf(b, " prf %s dh_group %s", join(p.PRF), join(p.KE))
		for _, ke := range p.AddKE {
			fmt.Fprintf(b, " additional_ke %s", join(ke))
		}
		b.WriteString(" }\n")
	}
}

func join[T fmt.Stringer](l []T) string {
	s := make([]string, len(l))
	for i, v := range l {
		s[i] = v.String()
	}
	return strings.Join(s, ", ")
}

// show is the parameter in a form that every place understands that it is for.
func (p *param) show() string {
	name, value := p.kw.name, p.text
	switch p.kw.spec.form {
	case flag:
		name = p.kw.key() // the flag itself may not stand in a rule
	case text, file, url, dnText, host, poolUse:
		value = quote(value)
	case identity:
		value = p.showID()
	case address:
		switch a := p.addr; {
		case a.any:
			value = "any"
		case a.host != "":
			value = quote(a.host)
		case a.from == a.to:
			value = a.from.String()
		default:
			value = a.from.String() + "-" + a.to.String()
		}
		if p.kw.spec.parts&noRange != 0 {
			value = p.text // a prefix
		}
	}
	return name + " " + value
}

func (p *param) showID() string {
	id := p.id
	not := ""
	if id.not {
		not = "! "
	}
	switch id.typ {
	case typeAny:
		return not + "ANY"
	case typeIP:
		if id.from != id.to {
			return fmt.Sprintf("%sIP = %v-%v", not, id.from, id.to)
		}
		return fmt.Sprintf("%sIP = %v", not, id.from)
	case typeKeyID:
		return not + "KEYID = 0x" + hex.EncodeToString([]byte(id.data))
	case typeDN:
		s := strings.TrimPrefix(p.text, "!")
		if t, rest, ok := strings.Cut(s, " = "); ok && strings.EqualFold(t, typeDN) {
			s = rest
		} else if len(s) > 3 && strings.EqualFold(s[:3], typeDN+"=") { // Solaris' shortcut
			s = s[3:]
		}
		return not + "DN = " + quote(s)
	}
	return not + id.typ + " = " + quote(id.data)
}

// quote makes a string of the language: a quote and a backslash are escaped.
func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
