package report

import (
	"fmt"
	"html"
	"io"
	"strings"
)

// charted are the figures of the chart, each a block of bars.
var charted = []Metric{TCP1, TCP4, UDP1400, UDP64, TCP1CPU, UDP64CPU, PingP50, PingP99}

// Sizes of the chart in pixels.
const (
	chartWidth = 860
	labelWidth = 270
	barHeight  = 16
	barStep    = 22
	blockGap   = 46
	valueWidth = 150
	topGap     = 40
)

// SVG draws the medians as bars, with lines from the smallest to the largest
// sample; a block for each figure of each setting.
func (r *Results) SVG(w io.Writer) error {
	var b strings.Builder
	y := topGap
	for _, set := range r.Settings {
		for _, id := range charted {
			if systems := r.measured(set, id); len(systems) > 0 {
				r.block(&b, &y, set, find(id), systems)
			}
		}
	}
	_, err := fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="12" y="24" font-size="15" font-weight="bold">missiu and others, %s</text>
%s</svg>
`, chartWidth, y, r.Start.Format("2006-01-02 15:04"), b.String())
	return err
}

func (r *Results) block(b *strings.Builder, y *int, set Setting, m metric, systems []System) {
	most := 0.0
	for _, s := range systems {
		sum, _ := r.Summary(Key{set, s.ID, m.id})
		most = max(most, sum.Max)
	}
	if most == 0 {
		return
	}
	better := "more is better"
	if m.less {
		better = "less is better"
	}
	text(b, 12, *y+14, "#000", ` font-weight="bold"`, fmt.Sprintf("%s, %s (%v; %s)", m.title, m.unit, set, better))
	*y += 24
	scale := float64(chartWidth-labelWidth-valueWidth) / most
	for _, s := range systems {
		k := Key{set, s.ID, m.id}
		sum, _ := r.Summary(k)
		text(b, labelWidth-8, *y+12, "#333", ` text-anchor="end"`, s.Title)
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", labelWidth, *y, sum.Median*scale, barHeight, colour(s.ID))
		if sum.N > 1 {
			fmt.Fprintf(b, `<path d="M%.1f %dH%.1f" stroke="#000"/>`+"\n", labelWidth+sum.Min*scale, *y+barHeight/2, labelWidth+sum.Max*scale)
		}
		text(b, labelWidth+int(sum.Max*scale)+6, *y+12, "#333", "", r.cell(k))
		*y += barStep
	}
	*y += blockGap - 24
}

// colour tells us, the peers and the bare wire apart.
func colour(id string) string {
	switch {
	case id == Plain:
		return "#bbb"
	case strings.HasPrefix(id, Missiu):
		return "#2a7f62"
	}
	return "#7a8fb8"
}

func text(b *strings.Builder, x, y int, fill, attr, s string) {
	fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s"%s>%s</text>`+"\n", x, y, fill, attr, html.EscapeString(s))
}
