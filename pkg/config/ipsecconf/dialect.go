package ipsecconf

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/missiu/missiu/pkg/config/lexer"
)

// What one dialect alone has.
var (
	solarisOnlySelectors = []string{
		"src", "srcaddr", "dst", "dstaddr", "local", "remote", "proto", "smask", "dmask", "type", "code", "tunnel", "negotiate",
	}
	nanosecOnlyProperties = []string{
		"tladdr", "traddr", "tsrc", "tdst", "keylength", "tag", "lifetime_secs", "lifetime_bytes",
	}
	nanosecDirs      = []string{"mirrored", "in_mirrored", "out_mirrored"}
	nanosecProtocols = map[string]bool{
		"icmp": true, "ipip": true, "ipv6": true, "tcp": true, "udp": true, "esp": true, "ah": true, "icmp6": true, "ipv6-icmp": true,
	}
)

// What an entry of Solaris may have.
const (
	solarisActions = 20
	solarisWords   = 20 // in a pair of braces
	solarisLine    = 1024
	solarisEntry   = 8192 // octets from its first brace to its last
)

// A breach is a place where a text is not what Solaris' layout asks for.
type breach struct {
	at   Word
	what string
}

// longLines finds the lines that Solaris does not take, comments or not.
func longLines(src string) (l []breach) {
	for n := 1; src != "" && len(l) <= maxMessages; n++ {
		line, rest, _ := strings.Cut(src, "\n")
		if len(line) > solarisLine {
			l = append(l, breach{Word{Pos: lexer.Pos{Line: n, Col: solarisLine + 1}}, fmt.Sprintf("line of %d octets: Solaris takes %d", len(line), solarisLine)})
		}
		src = rest
	}
	return l
}

// strict reports what another dialect than d alone has.
func (f *File) strict(m *meaning, d Dialect) {
	if d == Solaris {
		for _, b := range f.long {
			m.l.Errorf(b.at.Pos, "%s", b.what)
		}
	}
	for _, i := range f.Items {
		switch i := i.(type) {
		case *Constants:
			if d == Solaris {
				m.l.Errorf(i.Pos, "constants are NanoSec's")
			}
		case *Command:
			if d == Solaris {
				m.l.Errorf(i.Name.Pos, "%s: commands are NanoSec's", i.Name.Text)
			}
		case *Entry:
			if d == Solaris {
				i.strictSolaris(m)
			} else {
				i.strictNanoSec(m)
			}
		}
	}
}

func (e *Entry) strictSolaris(m *meaning) {
	for _, b := range e.layout {
		m.l.Errorf(b.at.Pos, "%s", b.what)
	}
	if e.size > solarisEntry {
		m.l.Errorf(e.Pos, "entry of %d octets: Solaris takes %d", e.size, solarisEntry)
	}
	old := false
	if len(e.Alternatives) > solarisActions {
		m.l.Errorf(e.Alternatives[solarisActions].Action.Pos, "too many actions: Solaris takes %d", solarisActions)
	}
	if len(e.Selectors) > solarisWords/2 {
		m.l.Errorf(e.Selectors[solarisWords/2].Key.Pos, "too many words in braces: Solaris takes %d", solarisWords)
	}
	for _, p := range e.Selectors {
		switch v := p.Value.Text; canonical(p.Key.Text) {
		case "dir":
			if slices.Contains(nanosecDirs, v) {
				m.l.Errorf(p.Value.Pos, "dir %s is NanoSec's; want in, out or both", v)
			}
		case "saddr", "daddr":
			old = true
			strictRange(m, p)
		case "sport", "dport":
			old = true
		case "laddr", "raddr":
			strictRange(m, p)
		}
	}
	for k, a := range e.Alternatives {
		if k > 0 && old {
			m.l.Errorf(a.Action.Pos, "or: only with local and remote, not with source and destination")
		}
		for _, p := range a.Properties {
			switch {
			case slices.Contains(nanosecOnlyProperties, p.Key.Text):
				m.l.Errorf(p.Key.Pos, "%s is NanoSec's", p.Key.Text)
			case p.Key.Text == "sa" && p.Value.Text == "init":
				m.l.Errorf(p.Value.Pos, "sa init is NanoSec's; want shared or unique")
			}
		}
	}
}

func strictRange(m *meaning, p Param) {
	from, _, ok := strings.Cut(p.Value.Text, "-")
	if _, err := netip.ParseAddr(from); ok && err == nil {
		m.l.Errorf(p.Value.Pos, "%s: ranges are NanoSec's; want a prefix", p.Key.Text)
	}
}

func (e *Entry) strictNanoSec(m *meaning) {
	for _, p := range e.Selectors {
		switch {
		case slices.Contains(solarisOnlySelectors, p.Key.Text):
			m.l.Errorf(p.Key.Pos, "%s is Solaris'", p.Key.Text)
		case p.Key.Text == "dir" && p.Value.Text == "both":
			m.l.Errorf(p.Value.Pos, "dir both is Solaris'; want mirrored")
		case p.Key.Text == "ulp":
			v := strings.ToLower(p.Value.Text)
			if _, known := protocols[v]; known && !nanosecProtocols[v] {
				m.l.Errorf(p.Value.Pos, "ulp %s is Solaris'; want a number", v)
			}
		}
	}
	for k, a := range e.Alternatives {
		if k > 0 {
			m.l.Errorf(a.Action.Pos, "or is Solaris'")
			return
		}
		if a.Action.Text == "pass" {
			m.l.Errorf(a.Action.Pos, "pass is Solaris'; want bypass")
		}
		for _, p := range a.Properties {
			v := strings.ToLower(p.Value.Text)
			switch p.Key.Text {
			case "dir":
				m.l.Errorf(p.Key.Pos, "dir among the properties is Solaris'; it belongs in the selectors")
			case "sa":
				if v == "unique" {
					m.l.Errorf(p.Value.Pos, "sa unique is Solaris'; want shared or init")
				}
			case "encr_algs", "encr_auth_algs", "auth_algs":
				_, isNumber := number(v, 255)
				switch {
				case strings.Contains(v, "("):
					m.l.Errorf(p.Value.Pos, "%s: key lengths behind a name are Solaris'; want keylength", p.Key.Text)
				case v == "null" || v == "none" || isNumber:
					m.l.Errorf(p.Value.Pos, "%s %s is Solaris'", p.Key.Text, v)
				}
			}
		}
	}
}
