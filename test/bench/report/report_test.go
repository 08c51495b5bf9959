package report

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"time"
)

var set4 = Setting{4, true}

// sampleResults: two rounds in which the machine was twice as fast the second time.
func sampleResults() *Results {
	r := &Results{
		Start:    time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC),
		Systems:  []System{{Missiu, "missiu <UDP>"}, {WireGuard, "wireguard-go"}, {Libipsec, "libipsec"}, {Plain, "plain"}},
		Settings: []Setting{set4},
	}
	for round, speed := range []float64{1, 2} {
		r.Add(Key{set4, Missiu, TCP1}, round, 4e9*speed, false)
		r.Add(Key{set4, WireGuard, TCP1}, round, 1e9*speed, false)
		r.Add(Key{set4, Libipsec, TCP1}, round, 0.2e9*speed, false)
		r.Add(Key{set4, Missiu, TCP1CPU}, round, 500, false)
		r.Add(Key{set4, WireGuard, TCP1CPU}, round, 2500, false)
	}
	r.Add(Key{set4, Missiu, UDP64}, 0, 100e3, false)
	r.Add(Key{set4, WireGuard, UDP64}, 0, 50e3, false)
	r.Add(Key{set4, Missiu, PingP50}, 0, 0.0001, true)
	return r
}

func TestGoals(t *testing.T) {
	r := sampleResults()
	want := map[string]string{
		"TCP, one stream, ESP in UDP, IPv4":              "not met", // 20 x libipsec
		"the same with the standard library's GCM, IPv4": "not measured",
		"UDP 64 B, ≤ 1 % loss, IPv4":                     "not met", // OpenVPN is missing, wireguard-go says no
		"daemons' CPU per packet, TCP, IPv4":             "**met**",
		"overload, IPv4":                                 "not measured",
	}
	goals := Evaluate(r)
	for _, g := range goals {
		if v, ok := want[g.Work]; ok && v != g.Verdict {
			t.Errorf("%s: %s (%s), want %s", g.Work, g.Verdict, g.Measured, v)
		}
		delete(want, g.Work)
	}
	for w := range want {
		t.Errorf("no goal %q", w)
	}
	if m := goals[0].Measured; !strings.HasPrefix(m, "4.00 (4.00–4.00) × wireguard-go, 20.0") {
		t.Errorf("measured %q", m)
	}
}

func TestDisturbed(t *testing.T) {
	r := &Results{}
	k := Key{set4, Missiu, TCP1}
	r.Add(k, 0, 10, true)
	if s, d := r.Summary(k); !d || s.Median != 10 {
		t.Errorf("alone: %+v %v, want 10, disturbed", s, d)
	}
	r.Add(k, 1, 20, false)
	if s, d := r.Summary(k); d || s.Median != 20 || s.N != 1 {
		t.Errorf("beside a good one: %+v %v, want 20", s, d)
	}
	r.Add(k, 2, math.NaN(), false)
	if s, _ := r.Summary(k); s.N != 1 {
		t.Errorf("NaN counted: %+v", s)
	}
}

func TestMarkdown(t *testing.T) {
	var b strings.Builder
	if err := sampleResults().Markdown(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| wireguard-go | 1.50 (1.00–2.00) | 2500 (2500–2500) |\n",
		"| missiu <UDP> | 100 ~ |\n",                                                  // ping, disturbed
		"| missiu <UDP> | TCP, one stream | 4.00 (4.00–4.00) | 20.0 (20.0–20.0) |  |", // by round
		"## IPv4, wire with offload",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "NaN") {
		t.Errorf("NaN in\n%s", b.String())
	}
}

func TestSVG(t *testing.T) {
	var b strings.Builder
	if err := sampleResults().SVG(&b); err != nil {
		t.Fatal(err)
	}
	rects := 0
	for d := xml.NewDecoder(strings.NewReader(b.String())); ; {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, b.String())
		}
		if e, ok := tok.(xml.StartElement); ok && e.Name.Local == "rect" {
			rects++
		}
	}
	// Ground, 3 of TCP, 2 of its CPU, 2 of UDP, 1 of ping.
	if rects != 9 {
		t.Errorf("%d rectangles, want 9\n%s", rects, b.String())
	}
}

func TestNumber(t *testing.T) {
	for x, want := range map[float64]string{0: "0", 0.0123: "0.012", 0.5: "0.50", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 123456: "123456"} {
		if got := Number(x); got != want {
			t.Errorf("Number(%v) = %q, want %q", x, got, want)
		}
	}
}
