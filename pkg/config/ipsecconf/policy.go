package ipsecconf

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Order is the order in which entries are tried.
type Order uint8

// Orders: that of the file; that of Solaris, see solarisClass.
const (
	OrderFile Order = iota
	OrderSolaris
)

// Dialect is one of the two that make up the language.
type Dialect string

// Dialects.
const (
	Union   Dialect = ""
	Solaris Dialect = "solaris"
	NanoSec Dialect = "nanosec"
)

// Options are what the meaning of a text depends on. The zero value resolves no
// names but those built in.
type Options struct {
	Order Order
	// LookupHost gives the addresses of a host, LookupPort the port of a service.
	LookupHost func(name string) ([]netip.Addr, error)
	LookupPort func(name string) (uint16, error)
	// LookupNet gives the network of a name that is no host's.
	LookupNet func(name string) (netip.Prefix, error)
	// LookupTunnel gives the end points of a tunnel interface.
	LookupTunnel func(name string) (Tunnel, error)
	// Dialect, if not empty, refuses what the other one alone has.
	Dialect Dialect
	// Unauthenticated takes manual SAs with encryption and no integrity.
	Unauthenticated bool
}

// SystemNames resolves names as other programs of this host do.
func SystemNames() Options {
	return Options{
		LookupTunnel: systemTunnel,
		LookupNet:    systemNet,
		LookupHost: func(name string) ([]netip.Addr, error) {
			ips, err := net.LookupIP(name)
			var as []netip.Addr
			for _, ip := range ips {
				if a, ok := netip.AddrFromSlice(ip); ok {
					as = append(as, a.Unmap())
				}
			}
			return as, err
		},
		LookupPort: func(name string) (uint16, error) {
			n, err := net.LookupPort("tcp", name)
			if err != nil {
				n, err = net.LookupPort("udp", name)
			}
			return uint16(n), err
		},
	}
}

// Policies are in force between the priorities PriorityBase and PriorityLast,
// in file order. No other program uses them, so these policies can be told from
// those of others.
const (
	PriorityBase = 0x40000000
	PriorityLast = PriorityBase + MaxEntries - 1
)

// Rule is one SPD entry with the place of the entry that it comes from.
// Requests are of level unique and have no reqid. An inbound or forward rule
// goes with an outbound rule that is its mirror, and shares the reqid that
// that one gets; see Mirrors.
type Rule struct {
	Pos    lexer.Pos
	Policy ipsec.Policy
	// Closes: of no entry, but for what matches none of those of a tunnel
	// interface.
	Closes bool
}

// Mirrors reports whether the inbound or forward policy in and the outbound
// policy out are two sides of one: the same traffic, mode and end points.
func Mirrors(in, out *ipsec.Policy) bool {
	if in.Dir == ipsec.Out || out.Dir != ipsec.Out || in.Sel != out.Sel.Reverse() || len(in.Requests) != len(out.Requests) {
		return false
	}
	for k, i := range in.Requests {
		o := out.Requests[k]
		if i.Proto != o.Proto || i.Mode != o.Mode || i.Src != o.Dst || i.Dst != o.Src {
			return false
		}
	}
	return true
}

// Contents is the meaning of a text.
type Contents struct {
	// Rules are in match order, outbound before the inbound and forward ones of
	// the same entry.
	Rules []Rule
	// SAs are those of add commands.
	SAs []ManualSA
	// FlushPolicies: all policies that are there go, those of other programs too.
	// FlushSAs: all SAs that are there go.
	FlushPolicies, FlushSAs bool
}

// Wipe overwrites the keys.
func (c *Contents) Wipe() {
	for i := range c.SAs {
		c.SAs[i].Wipe()
	}
}

// Load reads a text. With errors the Contents are empty. The List has errors and
// warnings, by file.
func Load(file string, r io.Reader, opt Options) (*Contents, *lexer.List) {
	l := &lexer.List{File: file, Max: maxMessages}
	src, err := lexer.ReadAll(r, MaxFile)
	if err != nil {
		l.Errorf(lexer.Pos{}, "%v", cause(err))
		return &Contents{}, l
	}
	return Parse(src, l).Contents(l, opt), l
}

// cause strips the file name, which stands in front already.
func cause(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

// Contents gives the meaning of a text. Errors and warnings go to l.
func (f *File) Contents(l *lexer.List, opt Options) *Contents { return f.contents(l, opt, MaxRules) }

// contents is Contents of a text that may stand for limit policies.
func (f *File) contents(l *lexer.List, opt Options, limit int) *Contents {
	m := &meaning{l: l, opt: opt, consts: map[string]constant{}, hosts: map[string]hostResult{}, tunnels: map[string]*tunnelEnds{}}
	if opt.Dialect != Union {
		f.strict(m, opt.Dialect)
	}
	// Of constants those above an entry count, as in NanoSec.
	var entries [][]Rule
	before := l.Count()
	for _, i := range f.Items {
		if l.Count()-before > maxMessages {
			break // what is wrong behind it is not told
		}
		switch i := i.(type) {
		case *Constants:
			m.define(i)
		case *Command:
			entries = m.command(i, entries)
		case *Entry:
			if rs := m.entry(i); len(rs) > 0 {
				entries = append(entries, rs)
			}
			if m.rules > limit {
				l.Errorf(i.Pos, "the file stands for more than %d policies", limit)
				return &Contents{}
			}
		}
	}
	c := &Contents{SAs: m.sas, FlushPolicies: m.flushPolicies, FlushSAs: m.flushSAs}
	if l.Failed() {
		c.Wipe()
		return &Contents{}
	}
	if opt.Order == OrderSolaris {
		slices.SortStableFunc(entries, func(a, b []Rule) int { return solarisClass(&a[0].Policy) - solarisClass(&b[0].Policy) })
	}
	for k, rs := range entries {
		for i := range rs {
			rs[i].Policy.Priority = PriorityBase + uint32(k)
		}
	}
	c.Rules = WithForward(m.closing(lint(l, opt.Order, entries), PriorityBase+uint32(len(entries))))
	modes(c.SAs, c.Rules)
	return c
}

// command carries out one of NanoSec's, which come from setkey, where it stands:
// what a flush follows has been for nothing.
func (m *meaning) command(c *Command, entries [][]Rule) [][]Rule {
	if c.Name.Text == "add" {
		m.add(c)
		return entries
	}
	if len(c.Args) > 0 {
		m.l.Errorf(c.Args[0].Pos, "%s: want \";\" behind it", c.Name.Text)
	}
	if c.Name.Text == "spdflush" {
		if len(entries) > 0 {
			m.l.Warnf(c.Name.Pos, "spdflush: takes back the entries above it")
		}
		m.flushPolicies, m.tunnelOrder, m.rules = true, nil, 0
		clear(m.tunnels)
		return nil
	}
	if len(m.sas) > 0 {
		m.l.Warnf(c.Name.Pos, "flush: takes back the SAs above it")
	}
	for i := range m.sas {
		m.sas[i].Wipe()
	}
	m.flushSAs, m.sas = true, nil
	return entries
}

// solarisClass is where Solaris tries an entry, smaller numbers first: bypass and
// pass, then AH with ESP, ESP, AH. All alternatives of an entry count together,
// so one with "or pass" comes even before bypass. Oracle's text puts drop with
// bypass, which illumos does not.
func solarisClass(p *ipsec.Policy) int {
	const pass, esp, ah = 4, 2, 1
	bits := 0
	if p.Action != ipsec.Protect {
		bits = pass
	}
	if p.Flags&ipsec.PolicyClear != 0 {
		bits |= pass
	}
	for _, q := range p.Requests {
		switch q.Proto {
		case ipsec.ESP:
			bits |= esp
		case ipsec.AH:
			bits |= ah
		}
	}
	return maxClass - bits
}

const maxClass = 7

// WithForward adds to every inbound rule its twin for packets that are forwarded
// after decapsulation, if there is a tunnel. The other inbound rules get one
// too, since otherwise those of tunnels would come before them.
func WithForward(rules []Rule) []Rule {
	tunnel := false
	n := 0
	for i := range rules {
		if p := &rules[i].Policy; p.Dir == ipsec.In {
			n++
			tunnel = tunnel || len(p.Requests) > 0 && p.Requests[0].Mode == ipsec.Tunnel
		}
	}
	if !tunnel {
		return rules
	}
	out := make([]Rule, 0, len(rules)+n)
	for _, r := range rules {
		out = append(out, r)
		if r.Policy.Dir == ipsec.In {
			r.Policy.Dir = ipsec.Fwd
			r.Policy.Requests = slices.Clone(r.Policy.Requests)
			out = append(out, r)
		}
	}
	return out
}

// WithoutForward leaves out what WithForward adds.
func WithoutForward(rules []Rule) []Rule {
	var out []Rule
	for _, r := range rules {
		if r.Policy.Dir != ipsec.Fwd {
			out = append(out, r)
		}
	}
	return out
}

// soft is the soft limit that goes with a hard one.
func soft(h ipsec.Lifetime) ipsec.Lifetime {
	return ipsec.Lifetime{Bytes: h.Bytes - h.Bytes/10, AddTime: (h.AddTime - h.AddTime/10).Truncate(time.Second)}
}
