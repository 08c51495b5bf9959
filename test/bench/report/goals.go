package report

import (
	"fmt"
	"math"
	"strings"
)

// Goal is a line of the goals' table as measured.
type Goal struct {
	Work, Goal, Measured string
	Verdict              string // met, not met, or not measured
}

// part is one figure that a goal asks for.
type part struct {
	text  string // figure and measured value
	value float64
	bound float64
	less  bool // the bound is the most, not the least
}

func (p part) met() bool {
	if p.less {
		return p.value <= p.bound
	}
	return p.value >= p.bound
}

// ratio is the part that a's figure be so many times b's.
func (r *Results) ratio(set Setting, m Metric, a, b string, bound float64, less bool) part {
	s := r.Ratio(set, m, a, b)
	text := ""
	if s.N > 0 {
		text = fmt.Sprintf("%s × %s", times(s), b)
	}
	return part{text: text, value: s.Median, bound: bound, less: less}
}

// figure is the part that a figure be below a bound.
func (r *Results) figure(k Key, what string, bound float64, less bool) part {
	s, _ := r.Summary(k)
	m := find(k.Metric)
	text := ""
	if s.N > 0 {
		text = fmt.Sprintf("%s %s %s", what, Number(s.Median*m.scale), m.unit)
	}
	return part{text: text, value: s.Median, bound: bound, less: less}
}

// memoryBound is what overload may add to the resident memory of both daemons.
const memoryBound = 64 << 20

// Evaluate holds the results against the goals, each by IPv4 and IPv6 as far as
// measured, on a wire with offload.
func Evaluate(r *Results) []Goal {
	var goals []Goal
	for _, set := range r.Settings {
		if !set.Offload {
			continue
		}
		add := func(work, goal string, parts ...part) {
			goals = append(goals, judge(fmt.Sprintf("%s, IPv%d", work, set.Family), goal, parts))
		}
		add("TCP, one stream, ESP in UDP", "≥ 3.3 × wireguard-go, ≥ 25 × libipsec",
			r.ratio(set, TCP1, Missiu, WireGuard, 3.3, false), r.ratio(set, TCP1, Missiu, Libipsec, 25, false))
		add("the same with the standard library's GCM", "≥ 2.5 × wireguard-go",
			r.ratio(set, TCP1, MissiuStd, WireGuard, 2.5, false))
		add("TCP, four streams, ESP in UDP", "≥ 3.5 × wireguard-go",
			r.ratio(set, TCP4, Missiu, WireGuard, 3.5, false))
		add("TCP, one stream, native ESP", "≥ 1.5 × wireguard-go, ≥ 10 × libipsec",
			r.ratio(set, TCP1, MissiuNative, WireGuard, 1.5, false), r.ratio(set, TCP1, MissiuNative, Libipsec, 10, false))
		add("UDP 1400 B, ≤ 1 % loss", "≥ 6 × wireguard-go, ≥ 2.5 × OpenVPN",
			r.ratio(set, UDP1400, Missiu, WireGuard, 6, false), r.ratio(set, UDP1400, Missiu, OpenVPN, 2.5, false))
		add("UDP 64 B, ≤ 1 % loss", "≥ 5 × wireguard-go, ≥ 2.5 × OpenVPN",
			r.ratio(set, UDP64, Missiu, WireGuard, 5, false), r.ratio(set, UDP64, Missiu, OpenVPN, 2.5, false))
		add("daemons' CPU per packet, TCP", "≤ 1/4 of wireguard-go's",
			r.ratio(set, TCP1CPU, Missiu, WireGuard, 0.25, true))
		add("daemons' CPU per packet, UDP 1400 B, 64 B", "≤ 1/5 of wireguard-go's",
			r.ratio(set, UDP1400CPU, Missiu, WireGuard, 0.2, true), r.ratio(set, UDP64CPU, Missiu, WireGuard, 0.2, true))
		add("ping p50, p99, idle", "≤ OpenVPN's",
			r.ratio(set, PingP50, Missiu, OpenVPN, 1, true), r.ratio(set, PingP99, Missiu, OpenVPN, 1, true))
		add("AES-CBC with SHA-1, SHA-256, TCP", "≥ 1 × wireguard-go",
			r.ratio(set, TCP1, MissiuSHA1, WireGuard, 1, false), r.ratio(set, TCP1, MissiuSHA256, WireGuard, 1, false))
		add("100,000 SAs and 100,000 policies: TCP, UDP 64 B", "≥ 0.95 × with one",
			r.ratio(set, TCP1, Missiu100k, Missiu, 0.95, false), r.ratio(set, UDP64, Missiu100k, Missiu, 0.95, false))
		over := func(m Metric, what string, bound float64, less bool) part {
			return r.figure(Key{set, Missiu, m}, what, bound, less)
		}
		add("overload", "ping, flow p99, TCP ≤ 50 ms, memory + ≤ 64 MiB, ≥ 99 % of losses counted",
			over(OverPing, "ping", 0.050, true), over(OverPing64, "beside 64 B", 0.050, true), over(OverPingSuper, "beside super-frames", 0.050, true),
			over(OverFlow, "flow", 0.050, true), over(OverRTT, "TCP", 0.050, true), over(OverMemory, "memory", memoryBound, true), over(OverCounted, "counted", 0.99, false))
	}
	return goals
}

// judge: met if all parts are, not measured if one is missing and none failed.
func judge(work, goal string, parts []part) Goal {
	g := Goal{Work: work, Goal: goal, Verdict: "**met**"}
	var texts []string
	missing := false
	for _, p := range parts {
		if math.IsNaN(p.value) {
			missing = true
			continue
		}
		texts = append(texts, p.text)
		if !p.met() {
			g.Verdict = "not met"
		}
	}
	if missing && g.Verdict != "not met" {
		g.Verdict = "not measured"
	}
	g.Measured = strings.Join(texts, ", ")
	return g
}
