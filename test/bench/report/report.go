// Package report keeps what the benchmark measured and says it: as Markdown,
// with ratios and goals, and as a chart.
package report

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/test/bench/stat"
)

// System is something that carries traffic from one gateway to the other.
type System struct {
	ID    string
	Title string
}

// Names of systems that goals and ratios speak of.
const (
	Missiu       = "missiu"
	MissiuNative = "missiu-native"
	MissiuStd    = "missiu-std"
	MissiuSHA1   = "missiu-sha1"
	MissiuSHA256 = "missiu-sha256"
	Missiu100k   = "missiu-100k"
	MissiuInline = "missiu-inline"
	// MissiuInlineClear is what policy bypasses.
	MissiuInlineClear = "missiu-inline-clear"
	WireGuard         = "wireguard-go"
	Libipsec          = "libipsec"
	OpenVPN           = "openvpn"
	Plain             = "plain"
)

// Metric is one figure of one work. Its unit is in its name's place in metrics.
type Metric string

// Metrics. CPU is in nanoseconds for each packet delivered, of the daemons at
// both ends together; Total likewise of the whole machine, traffic generators
// and interrupts included.
const (
	TCP1          Metric = "tcp1"
	TCP1CPU       Metric = "tcp1-cpu"
	TCP1Total     Metric = "tcp1-total"
	TCP4          Metric = "tcp4"
	TCP4CPU       Metric = "tcp4-cpu"
	TCP4Total     Metric = "tcp4-total"
	UDP1400       Metric = "udp1400"
	UDP1400CPU    Metric = "udp1400-cpu"
	UDP1400Blast  Metric = "udp1400-blast"
	UDP64         Metric = "udp64"
	UDP64CPU      Metric = "udp64-cpu"
	UDP64Blast    Metric = "udp64-blast"
	PingP50       Metric = "ping-p50"
	PingP99       Metric = "ping-p99"
	OverOffered   Metric = "overload-offered" // as a multiple of what fits
	OverPing      Metric = "overload-ping"    // p99
	OverPing64    Metric = "overload-ping-64"
	OverPingSuper Metric = "overload-ping-super"
	OverFlow      Metric = "overload-flow"    // one way, p99
	OverRTT       Metric = "overload-tcp-rtt" // smoothed
	OverTCP       Metric = "overload-tcp"
	OverLost      Metric = "overload-lost"    // of the pings and of the flow, 0 to 1
	OverMemory    Metric = "overload-memory"  // growth of the daemons' resident memory
	OverCounted   Metric = "overload-counted" // losses that a counter names, of all, 0 to 1
)

type metric struct {
	id    Metric
	title string
	unit  string
	scale float64 // from the sample to the unit
	less  bool    // is better
}

var metrics = []metric{
	{TCP1, "TCP, one stream", "Gbit/s", 1e-9, false},
	{TCP1CPU, "TCP, one stream: CPU of the daemons", "ns/packet", 1, true},
	{TCP1Total, "TCP, one stream: CPU of the machine", "ns/packet", 1, true},
	{TCP4, "TCP, four streams", "Gbit/s", 1e-9, false},
	{TCP4CPU, "TCP, four streams: CPU of the daemons", "ns/packet", 1, true},
	{TCP4Total, "TCP, four streams: CPU of the machine", "ns/packet", 1, true},
	{UDP1400, "UDP 1400 B, at most 1 % lost", "kpacket/s", 1e-3, false},
	{UDP1400CPU, "UDP 1400 B: CPU of the daemons at that rate", "ns/packet", 1, true},
	{UDP1400Blast, "UDP 1400 B, sent without pause: delivered", "kpacket/s", 1e-3, false},
	{UDP64, "UDP 64 B, at most 1 % lost", "kpacket/s", 1e-3, false},
	{UDP64CPU, "UDP 64 B: CPU of the daemons at that rate", "ns/packet", 1, true},
	{UDP64Blast, "UDP 64 B, sent without pause: delivered", "kpacket/s", 1e-3, false},
	{PingP50, "ping, idle, median", "µs", 1e6, true},
	{PingP99, "ping, idle, 99th percentile", "µs", 1e6, true},
	{OverOffered, "overload: offered", "× what fits", 1, false},
	{OverPing, "overload of 1400 B: ping, 99th percentile", "ms", 1e3, true},
	{OverPing64, "overload of 64 B: ping, 99th percentile", "ms", 1e3, true},
	{OverPingSuper, "overload of super-frames: ping, 99th percentile", "ms", 1e3, true},
	{OverFlow, "overload: a modest flow of UDP beside it, one way, 99th percentile", "ms", 1e3, true},
	{OverRTT, "overload: TCP beside it, round trip", "ms", 1e3, true},
	{OverTCP, "overload: TCP beside it", "Mbit/s", 1e-6, false},
	{OverLost, "overload: pings and datagrams of the flow lost", "%", 100, true},
	{OverMemory, "overload: memory added", "MiB", 1.0 / (1 << 20), true},
	{OverCounted, "overload: losses counted", "%", 100, false},
}

func find(id Metric) metric {
	for _, m := range metrics {
		if m.id == id {
			return m
		}
	}
	return metric{id: id, title: string(id), scale: 1}
}

// Setting is what all systems of a phase share.
type Setting struct {
	Family  int  // 4 or 6, of inner and outer packets
	Offload bool // of the wire: passes segments of 64 KiB whole
}

func (s Setting) String() string {
	off := "wire with offload"
	if !s.Offload {
		off = "wire without offload"
	}
	return fmt.Sprintf("IPv%d, %s", s.Family, off)
}

// Key names a figure.
type Key struct {
	Setting Setting
	System  string
	Metric  Metric
}

type sample struct {
	round     int
	value     float64
	disturbed bool
}

// Results are the figures of a run.
type Results struct {
	Start    time.Time
	Machine  string   // what it ran on
	Command  string   // how it was called
	Systems  []System // in the order of the tables
	Settings []Setting
	Notes    []string // what went wrong, in sentences
	Checks   []string // what captures showed, in sentences

	samples map[Key][]sample
}

// Add adds the figure of a round. A disturbed one counts only where there is no
// other.
func (r *Results) Add(k Key, round int, value float64, disturbed bool) {
	if math.IsNaN(value) || math.IsInf(value, 0) {
		return
	}
	if r.samples == nil {
		r.samples = map[Key][]sample{}
	}
	r.samples[k] = append(r.samples[k], sample{round, value, disturbed})
}

// rounds returns the samples that count, by round; disturbed tells that they
// were measured beside others' work.
func (r *Results) rounds(k Key) (values map[int]float64, disturbed bool) {
	all := r.samples[k]
	disturbed = !slices.ContainsFunc(all, func(s sample) bool { return !s.disturbed })
	values = map[int]float64{}
	for _, s := range all {
		if s.disturbed == disturbed {
			values[s.round] = s.value
		}
	}
	return values, disturbed && len(all) > 0
}

// Summary returns the median and spread of a figure; N is 0 when there is none.
func (r *Results) Summary(k Key) (s stat.Summary, disturbed bool) {
	v, disturbed := r.rounds(k)
	return stat.Summarize(values(v)), disturbed
}

func values(m map[int]float64) []float64 {
	v := make([]float64, 0, len(m))
	for _, x := range m {
		v = append(v, x)
	}
	return v
}

// Ratio returns a's figure as a multiple of b's, round by round.
func (r *Results) Ratio(set Setting, m Metric, a, b string) stat.Summary {
	// Disturbed samples serve here: what disturbs a round mostly disturbs both.
	all := func(system string) map[int]float64 {
		out := map[int]float64{}
		for _, s := range r.samples[Key{set, system, m}] {
			out[s.round] = s.value
		}
		return out
	}
	return stat.Summarize(stat.Ratios(all(a), all(b)))
}

// Markdown writes everything.
func (r *Results) Markdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Benchmark\n\n%s, `%s`\n\n%s\n", r.Start.Format("2006-01-02 15:04"), r.Command, r.Machine)
	fmt.Fprint(&b, "\nMedian of the rounds (smallest to largest). ~: measured while others used the machine.\n")
	for _, set := range r.Settings {
		fmt.Fprintf(&b, "\n## %v\n", set)
		r.tables(&b, set)
		r.ratios(&b, set)
	}
	b.WriteString("\n## Goals\n\n| work | goal | measured | |\n|---|---|---|---|\n")
	for _, g := range Evaluate(r) {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", g.Work, g.Goal, g.Measured, g.Verdict)
	}
	list(&b, "Checks", r.Checks)
	list(&b, "Notes", r.Notes)
	_, err := io.WriteString(w, b.String())
	return err
}

func list(b *strings.Builder, title string, lines []string) {
	if len(lines) == 0 {
		return
	}
	fmt.Fprintf(b, "\n## %s\n\n", title)
	for _, l := range lines {
		fmt.Fprintf(b, "- %s\n", strings.ReplaceAll(strings.TrimSpace(l), "\n", "\n  "))
	}
}

// measured tells which systems have any of the figures.
func (r *Results) measured(set Setting, ids ...Metric) []System {
	var out []System
	for _, s := range r.Systems {
		if slices.ContainsFunc(ids, func(m Metric) bool { return len(r.samples[Key{set, s.ID, m}]) > 0 }) {
			out = append(out, s)
		}
	}
	return out
}

// groups are the tables: metrics beside each other.
var groups = [][]Metric{
	{TCP1, TCP1CPU, TCP1Total, TCP4, TCP4CPU, TCP4Total},
	{UDP1400, UDP1400CPU, UDP1400Blast, UDP64, UDP64CPU, UDP64Blast},
	{PingP50, PingP99},
	{OverOffered, OverPing, OverPing64, OverPingSuper, OverFlow, OverRTT, OverTCP, OverLost, OverMemory, OverCounted},
}

func (r *Results) tables(b *strings.Builder, set Setting) {
	for _, g := range groups {
		systems := r.measured(set, g...)
		g = slices.DeleteFunc(slices.Clone(g), func(m Metric) bool {
			return !slices.ContainsFunc(systems, func(s System) bool { return len(r.samples[Key{set, s.ID, m}]) > 0 })
		})
		if len(g) == 0 {
			continue
		}
		b.WriteString("\n| |")
		for _, id := range g {
			m := find(id)
			fmt.Fprintf(b, " %s, %s |", m.title, m.unit)
		}
		b.WriteString("\n|---|" + strings.Repeat("---:|", len(g)) + "\n")
		for _, s := range systems {
			fmt.Fprintf(b, "| %s |", s.Title)
			for _, id := range g {
				fmt.Fprintf(b, " %s |", r.cell(Key{set, s.ID, id}))
			}
			b.WriteString("\n")
		}
	}
}

// cell is a figure with its spread, "" when there is none.
func (r *Results) cell(k Key) string {
	s, disturbed := r.Summary(k)
	if s.N == 0 {
		return ""
	}
	m := find(k.Metric)
	text := Number(s.Median * m.scale)
	if s.N > 1 {
		text += fmt.Sprintf(" (%s–%s)", Number(s.Min*m.scale), Number(s.Max*m.scale))
	}
	if disturbed {
		text += " ~"
	}
	return text
}

// Number prints three digits, or all of an integer that has more.
func Number(x float64) string {
	switch a := math.Abs(x); {
	case math.IsNaN(x):
		return "–"
	case a >= 100 || a == 0:
		return fmt.Sprintf("%.0f", x)
	case a >= 10:
		return fmt.Sprintf("%.1f", x)
	case a >= 0.1:
		return fmt.Sprintf("%.2f", x)
	default:
		return fmt.Sprintf("%.2g", x)
	}
}

// peers are what ratios are told against.
var peers = []System{{WireGuard, "wireguard-go"}, {Libipsec, "libipsec"}, {OpenVPN, "OpenVPN"}, {Plain, "plain"}}

func (r *Results) ratios(b *strings.Builder, set Setting) {
	var have []System
	for _, p := range peers {
		if len(r.measured(set, TCP1, TCP4, UDP1400, UDP64, PingP50)) > 0 && slices.ContainsFunc(r.Systems, func(s System) bool { return s.ID == p.ID }) {
			have = append(have, p)
		}
	}
	if len(have) == 0 {
		return
	}
	var lines []string
	for _, s := range r.Systems {
		if !strings.HasPrefix(s.ID, Missiu) {
			continue
		}
		for _, id := range []Metric{TCP1, TCP4, UDP1400, UDP64, UDP64Blast, TCP1CPU, UDP1400CPU, UDP64CPU, PingP50, PingP99} {
			line, some := "", false
			for _, p := range have {
				x := r.Ratio(set, id, s.ID, p.ID)
				some = some || x.N > 0
				line += " " + times(x) + " |"
			}
			if some {
				lines = append(lines, fmt.Sprintf("| %s | %s |%s", s.Title, find(id).title, line))
			}
		}
	}
	if len(lines) == 0 {
		return
	}
	b.WriteString("\nAs a multiple of, in the same round (of CPU and ping, less is better):\n\n| | |")
	for _, p := range have {
		fmt.Fprintf(b, " %s |", p.Title)
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---:|", len(have)) + "\n" + strings.Join(lines, "\n") + "\n")
}

// times prints a ratio with its spread.
func times(s stat.Summary) string {
	switch s.N {
	case 0:
		return ""
	case 1:
		return Number(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", Number(s.Median), Number(s.Min), Number(s.Max))
}
