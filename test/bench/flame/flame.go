// Package flame draws flame graphs: who called whom, from left to right in the
// order of names, as wide as the time spent there and below.
package flame

import (
	"bufio"
	"fmt"
	"hash/fnv"
	"html"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// Stack is a sample: functions from the outermost to the one that ran.
type Stack struct {
	Funcs []string
	Time  time.Duration
}

// Parse reads what `go tool pprof -traces` prints: samples between lines of
// dashes, the time before the innermost function, callers below it.
func Parse(r io.Reader) ([]Stack, error) {
	var stacks []Stack
	var now Stack
	end := func() {
		if len(now.Funcs) > 0 {
			slices.Reverse(now.Funcs)
			stacks = append(stacks, now)
		}
		now = Stack{}
	}
	begun := false
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		if strings.HasPrefix(line, "-----------+") {
			begun = true
			end()
			continue
		}
		if !begun || strings.TrimSpace(line) == "" {
			continue
		}
		name := strings.TrimSpace(line)
		if len(now.Funcs) == 0 {
			first, rest, ok := strings.Cut(name, " ")
			d, err := time.ParseDuration(first)
			if err != nil && strings.HasSuffix(name, ":") || ok && strings.HasSuffix(first, ":") {
				continue // a label of the sample
			}
			if !ok || err != nil {
				return nil, fmt.Errorf("line %d: %q: want a time and a function", n, line)
			}
			now.Time, name = d, strings.TrimSpace(rest)
		}
		now.Funcs = append(now.Funcs, strings.TrimSuffix(name, " (inline)"))
	}
	end()
	return stacks, sc.Err()
}

// node is a function below its callers.
type node struct {
	total    time.Duration // here and below
	children map[string]*node
}

func (n *node) child(name string) *node {
	if n.children == nil {
		n.children = map[string]*node{}
	}
	c := n.children[name]
	if c == nil {
		c = &node{}
		n.children[name] = c
	}
	return c
}

// tree merges stacks; depth is that of the deepest.
func tree(stacks []Stack) (root *node, depth int) {
	root = &node{}
	for _, s := range stacks {
		n := root
		n.total += s.Time
		for _, f := range s.Funcs {
			n = n.child(f)
			n.total += s.Time
		}
		depth = max(depth, len(s.Funcs))
	}
	return root, depth
}

// Sizes in pixels. What is narrower than thin is left out.
const (
	width  = 1400
	row    = 17
	thin   = 0.4
	letter = 6.6
	top    = 34
)

// SVG draws stacks, the outermost functions at the bottom. Each box tells its
// function, time and share when it is pointed at.
func SVG(w io.Writer, title string, stacks []Stack) error {
	root, depth := tree(stacks)
	if root.total == 0 {
		return fmt.Errorf("no samples")
	}
	var b strings.Builder
	height := top + (depth+1)*row + 8
	draw(&b, "all", root, root.total, 0, height-row-8)
	_, err := fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="monospace" font-size="11">
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="8" y="20" font-size="14">%s</text>
%s</svg>
`, width, height, html.EscapeString(title), b.String())
	return err
}

func draw(b *strings.Builder, name string, n *node, all time.Duration, x float64, y int) {
	wide := width * float64(n.total) / float64(all)
	if wide < thin {
		return
	}
	share := 100 * float64(n.total) / float64(all)
	fmt.Fprintf(b, `<g><title>%s: %v, %.1f %%</title><rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s" stroke="#fff" stroke-width="0.5"/>`,
		html.EscapeString(name), n.total, share, x, y, wide, row-1, colour(name))
	if room := int((wide - 4) / letter); room >= 3 {
		short := name[strings.LastIndexByte(name, '/')+1:]
		if len(short) > room {
			short = short[:room-1] + "…"
		}
		fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`, x+2, y+row-5, html.EscapeString(short))
	}
	b.WriteString("</g>\n")
	for _, c := range slices.Sorted(maps.Keys(n.children)) {
		draw(b, c, n.children[c], all, x, y-row)
		x += width * float64(n.children[c].total) / float64(all)
	}
}

// colour is warm, and the same for the functions of a package.
func colour(name string) string {
	pkg := name
	slash := strings.LastIndexByte(name, '/')
	if dot := strings.IndexByte(name[slash+1:], '.'); dot >= 0 {
		pkg = name[:slash+1+dot]
	}
	h := fnv.New32a()
	io.WriteString(h, pkg)
	v := h.Sum32()
	return fmt.Sprintf("#%02x%02x%02x", 200+v%56, 110+v/56%110, 60+v/6160%60)
}
