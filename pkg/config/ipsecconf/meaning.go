package ipsecconf

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

// maxRules is how many policies one entry may become, MaxRules a text.
const (
	maxRules = 4096
	MaxRules = 2 * MaxEntries
)

// meaning turns entries into rules.
type meaning struct {
	l      *lexer.List
	opt    Options
	consts map[string]constant
	hosts  map[string]hostResult
	sas    []ManualSA
	rules  int // so far

	lookups time.Duration // of names

	tunnels     map[string]*tunnelEnds // by name
	tunnelOrder []*tunnelEnds

	flushPolicies, flushSAs bool
}

type constant struct {
	pos   lexer.Pos
	text  string
	addr  netip.Addr // valid: an address
	value uint64
}

// define learns constants. A repeated one must have the same value.
func (m *meaning) define(c *Constants) {
	for _, d := range c.Defs {
		v := constant{pos: d.Key.Pos, text: d.Value.Text}
		var ok bool
		switch a, err := netip.ParseAddr(d.Value.Text); {
		case d.Value.Text == "":
			ok = true
		case err == nil && a.Is4():
			v.addr, ok = a, true
		default:
			v.value, ok = number(d.Value.Text, 1<<32-1)
		}
		old, again := m.consts[d.Key.Text]
		switch {
		case !ok:
			m.l.Errorf(d.Value.Pos, "constant %s %s: want a number or an IPv4 address", d.Key.Text, lexer.Shown(d.Value.Text))
		case again && (old.addr != v.addr || old.value != v.value):
			m.l.Errorf(d.Key.Pos, "constant %s defined twice; first at %v", lexer.Shown(d.Key.Text), old.pos)
		case !again:
			m.consts[d.Key.Text] = v
		}
	}
}

// params are the parameters of one pair of braces by canonical key.
type params map[string]Param

// entryMeaning is one entry while it is looked at.
type entryMeaning struct {
	*meaning
	e    *Entry
	bad  bool
	sel  params
	old  *Word // the first key of the old style
	new  *Word // the first key of the new style
	dirs []ipsec.Direction

	tun          *tunnelEnds // nil: none named
	proto        uint8
	src, dst     []netip.Prefix // as written: laddr, raddr or saddr, daddr; empty: any
	sport, dport uint16
	types, codes [][2]int // ranges; nil: any
}

// missing reports what an entry lacks, unless an error in it may be the cause.
func (m *entryMeaning) missing(w Word, format string, a ...any) {
	if !m.bad {
		m.errorf(w, format, a...)
	}
}

func (m *entryMeaning) errorf(w Word, format string, a ...any) {
	m.bad = true
	m.l.Errorf(w.Pos, format, a...)
}

// badValue reports a value in the form that all have.
func (m *entryMeaning) badValue(p Param, format string, a ...any) {
	m.errorf(p.Value, "%s %s: %s", p.Key.Text, lexer.Shown(p.Value.Text), fmt.Sprintf(format, a...))
}

// collect makes params of a list and reports repetitions and quotes.
func (m *entryMeaning) collect(ps []Param) params {
	all := make(params, len(ps))
	for _, p := range ps {
		key := canonical(p.Key.Text)
		if first, again := all[key]; again {
			m.errorf(p.Key, "%s given twice; first at %v", p.Key.Text, first.Key.Pos)
			continue
		}
		if p.Value.Quoted {
			m.badValue(p, "want it without quotes")
			continue
		}
		all[key] = p
	}
	return all
}

// entry gives the rules of an entry, none after an error in it.
func (m *meaning) entry(e *Entry) []Rule {
	x := &entryMeaning{meaning: m, e: e, bad: e.bad}
	x.sel = x.collect(e.Selectors)
	x.selectors()
	alts := make([]params, len(e.Alternatives))
	for i, a := range e.Alternatives {
		alts[i] = x.collect(a.Properties)
	}
	x.style(alts)
	action, ok := x.actions()
	var ts []transform
	if !ok || len(e.Alternatives) == 0 {
		return nil
	}
	for i, a := range alts {
		t := x.transform(e.Alternatives[i], a)
		if i == 0 || protects(e.Alternatives[i].Action.Text) { // else it is "or pass"
			ts = append(ts, t)
		}
	}
	x.directions(alts)
	x.tunnelTransforms(alts, ts)
	for i := 1; i < len(ts); i++ {
		if ts[i].local != ts[0].local || ts[i].remote != ts[0].remote {
			x.errorf(e.Alternatives[i].Action, "or: all alternatives need the same tunnel end points")
			break
		}
		if ts[i].flags != ts[0].flags {
			x.errorf(e.Alternatives[i].Action, "or: all alternatives need the same sa")
			break
		}
	}
	if x.bad {
		return nil
	}
	if len(ts) < len(alts) {
		ts[0].flags |= ipsec.PolicyClear
	}
	rs := x.makeRules(action, ts)
	m.rules += len(rs)
	return rs
}

// style finds out whether the entry speaks of source and destination (old) or of
// local and remote (new).
func (m *entryMeaning) style(alts []params) {
	note := func(p Param) {
		var side **Word
		switch canonical(p.Key.Text) {
		case "saddr", "daddr", "sport", "dport", "smask", "dmask", "tsrc", "tdst":
			side = &m.old
		case "laddr", "raddr", "lport", "rport", "tladdr", "traddr":
			side = &m.new
		default:
			return
		}
		if *side == nil {
			*side = &p.Key
		}
	}
	all := slices.Clone(m.e.Selectors)
	for _, a := range m.e.Alternatives {
		all = append(all, a.Properties...)
	}
	for _, p := range all {
		note(p)
		if m.old != nil && m.new != nil {
			m.errorf(p.Key, "%s: not with %s at %v; source and destination, or local and remote", p.Key.Text, m.other(p.Key).Text, m.other(p.Key).Pos)
			return
		}
	}
	// A direction among the properties is old style, too.
	for _, a := range alts {
		if p, ok := a["dir"]; ok && m.new != nil {
			m.errorf(p.Key, "dir: belongs in the selectors when there is %s", m.new.Text)
			return
		}
	}
}

func (m *entryMeaning) other(k Word) *Word {
	if m.old.Pos == k.Pos {
		return m.new
	}
	return m.old
}

func protects(action string) bool {
	return action == "ipsec" || action == "apply" || action == "permit"
}

// actions checks that the actions go together: alternatives that protect in the
// same direction, and perhaps "or pass" behind them.
func (m *entryMeaning) actions() (a ipsec.Action, ok bool) {
	alts := m.e.Alternatives
	for i, alt := range alts {
		var act ipsec.Action
		switch w := alt.Action.Text; {
		case w == "bypass" || w == "pass":
			act = ipsec.Bypass
		case w == "drop":
			act = ipsec.Discard
		case protects(w):
			act = ipsec.Protect
		default:
			return 0, false // reported
		}
		switch {
		case i == 0:
			a = act
		case a != ipsec.Protect:
			m.errorf(alt.Action, "or: only behind ipsec, apply or permit")
			return 0, false
		case act == ipsec.Bypass && i < len(alts)-1:
			m.errorf(alt.Action, "or %s: nothing comes behind it, every packet will do", alt.Action.Text)
			return 0, false
		case act == ipsec.Discard, act == ipsec.Protect && alt.Action.Text != alts[0].Action.Text:
			m.errorf(alt.Action, "or %s: want %s or pass", alt.Action.Text, alts[0].Action.Text)
			return 0, false
		}
	}
	return a, true
}

// Directions beyond those of an SPD.
const (
	dirBoth        ipsec.Direction = 100 + iota
	dirInMirrored                  // as written inbound, mirrored outbound
	dirOutMirrored                 // as written outbound, mirrored inbound
)

var dirNames = map[string]ipsec.Direction{
	"in": ipsec.In, "out": ipsec.Out, "both": dirBoth, "mirrored": dirBoth,
	"in_mirrored": dirInMirrored, "out_mirrored": dirOutMirrored,
}

// directions finds the directions in which the entry is meant.
func (m *entryMeaning) directions(alts []params) {
	p, given := m.sel["dir"]
	for _, a := range alts {
		q, ok := a["dir"]
		switch {
		case ok && given && q.Value.Text != p.Value.Text:
			m.errorf(q.Key, "dir given twice; first at %v", p.Key.Pos)
			return
		case ok:
			if q.Value.Text != "in" && q.Value.Text != "out" {
				m.badValue(q, "want in or out")
				return
			}
			p, given = q, true
		}
	}
	action := m.e.Alternatives[0].Action
	dir := dirNames[p.Value.Text]
	if given && dir == 0 {
		m.badValue(p, "want in, out, both, mirrored, in_mirrored or out_mirrored")
		return
	}
	if !given {
		switch action.Text {
		case "apply":
			dir = ipsec.Out
		case "permit":
			dir = ipsec.In
		case "ipsec":
			if m.old != nil {
				m.missing(action, "%s: dir missing; with %s it has to be said", action.Text, m.old.Text)
				return
			}
			dir = dirBoth
		default:
			dir = dirBoth
			m.l.Warnf(action.Pos, "%s without dir: taken as both directions", action.Text)
		}
	} else if m.old != nil && dir == dirBoth {
		m.badValue(p, "not with %s; want in, out, in_mirrored or out_mirrored", m.old.Text)
		return
	}
	switch one := dir == ipsec.In || dir == ipsec.Out; {
	case action.Text == "apply" && dir == ipsec.In:
		m.badValue(p, "apply is for outgoing packets; want out, or permit")
		return
	case action.Text == "permit" && dir == ipsec.Out:
		m.badValue(p, "permit is for incoming packets; want in, or apply")
		return
	case (action.Text == "apply" || action.Text == "permit") && !one:
		want := map[string]ipsec.Direction{"apply": ipsec.Out, "permit": ipsec.In}[action.Text]
		if m.old != nil {
			m.badValue(p, "%s is for one direction; want %v", action.Text, want)
			return
		}
		m.l.Warnf(p.Value.Pos, "dir %s: %s is for one direction, taken as %v; ipsec is for both", p.Value.Text, action.Text, want)
		dir = want
	}
	if m.old == nil && (dir == dirInMirrored || dir == dirOutMirrored) {
		dir = dirBoth
	}
	m.dirs = []ipsec.Direction{dir}
}

// way is one direction with what is its source in the SPD's sense.
type way struct {
	dir  ipsec.Direction
	swap bool // source and destination against m.src, m.dst and transform's local, remote
}

// ways: new style has ours first, so inbound it is turned round; old style says
// source and destination of the packet itself.
func (m *entryMeaning) ways() []way {
	switch d := m.dirs[0]; {
	case d == ipsec.Out:
		return []way{{ipsec.Out, false}}
	case d == ipsec.In:
		return []way{{ipsec.In, m.old == nil}}
	case d == dirInMirrored:
		return []way{{ipsec.Out, true}, {ipsec.In, false}}
	case m.old != nil && d == dirBoth:
		// Only bypass and drop without direction: whichever way such a packet goes.
		return []way{{ipsec.Out, false}, {ipsec.In, false}}
	}
	return []way{{ipsec.Out, false}, {ipsec.In, true}}
}

// makeRules makes the SPD entries: every pair of addresses, type and code, in every
// direction.
func (m *entryMeaning) makeRules(action ipsec.Action, ts []transform) []Rule {
	sels := m.selectorList()
	if m.bad {
		return nil
	}
	if action == ipsec.Protect && ipsec.Open(ts[0].local) && ipsec.Open(ts[0].remote) {
		for _, s := range sels {
			if s.Src.Overlaps(s.Dst) {
				m.errorf(Word{Pos: m.e.Pos}, "both ends of the tunnel are any: want local and remote addresses that do not overlap, which tell SAs of one direction from those of the other")
				return nil
			}
		}
	}
	ways := m.ways()
	// One for each direction, whatever the number of selectors.
	made := make([]ipsec.Policy, len(ways))
	for k, w := range ways {
		if action == ipsec.Protect {
			made[k] = protection(ts, w.swap)
		}
	}
	seen := make(map[selKey]bool, len(sels)*len(ways)) // what names stand for may be the same
	rules := make([]Rule, 0, len(sels)*len(ways))
	for _, s := range sels {
		for k, w := range ways {
			p := ipsec.Policy{Dir: w.dir, Sel: s, Action: action}
			if w.swap {
				p.Sel = s.Reverse()
			}
			if id := (selKey{p.Dir, p.Sel}); seen[id] {
				continue
			} else {
				seen[id] = true
			}
			if action == ipsec.Protect {
				q := &made[k]
				p.Requests, p.Proposals, p.Flags = q.Requests, q.Proposals, q.Flags
			}
			rules = append(rules, Rule{Pos: m.e.Pos, Policy: p})
		}
	}
	return rules
}

// protection is what the rules of an entry have in common in one direction.
func protection(ts []transform, swap bool) (p ipsec.Policy) {
	r := ipsec.Request{Mode: ipsec.Transport, Level: ipsec.LevelUnique}
	if ts[0].local.IsValid() {
		r.Mode, r.Src, r.Dst = ipsec.Tunnel, ts[0].local, ts[0].remote
		if swap {
			r.Src, r.Dst = r.Dst, r.Src
		}
	}
	p.Flags = ipsec.PolicyManual | ts[0].flags
	for _, t := range ts {
		p.Proposals = append(p.Proposals, t.proposal)
	}
	// Those of all alternatives; AH is outside.
	for _, r.Proto = range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
		if slices.ContainsFunc(p.Proposals, func(a ipsec.Proposal) bool { return a.Shape.Has(r.Proto) }) {
			p.Requests = append(p.Requests, r)
		}
	}
	return p
}
