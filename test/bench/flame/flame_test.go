package flame

import (
	"encoding/xml"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"
)

const traces = `File: missiu
Type: cpu
Time: 2026-01-02 03:04:05 UTC
Duration: 2s, Total samples = 40ms ( 2.00%)
-----------+-------------------------------------------------------
      10ms   internal/runtime/syscall.Syscall6
             syscall.RawSyscall6 (inline)
             main.read
             main.main
-----------+-------------------------------------------------------
  bytes:  4kB
      1.50s   example.com/x/y.(*T[go.shape.int]).Seal<>
             main.main
-----------+-------------------------------------------------------
`

func TestParse(t *testing.T) {
	got, err := Parse(strings.NewReader(traces))
	want := []Stack{
		{[]string{"main.main", "main.read", "syscall.RawSyscall6", "internal/runtime/syscall.Syscall6"}, 10 * time.Millisecond},
		{[]string{"main.main", "example.com/x/y.(*T[go.shape.int]).Seal<>"}, 1500 * time.Millisecond},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v %v, want %v", got, err, want)
	}
	if _, err := Parse(strings.NewReader("-----------+----\n  soon main.main\n")); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("no time: %v", err)
	}
}

func TestSVG(t *testing.T) {
	stacks, err := Parse(strings.NewReader(traces))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := SVG(&b, "a <title>", stacks); err != nil {
		t.Fatal(err)
	}
	boxes := map[string]bool{}
	in := false
	for d := xml.NewDecoder(strings.NewReader(b.String())); ; {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, b.String())
		}
		switch x := tok.(type) {
		case xml.StartElement:
			in = x.Name.Local == "title"
		case xml.EndElement:
			in = false
		case xml.CharData:
			if in {
				boxes[string(x)] = true
			}
		}
	}
	for _, want := range []string{"all: 1.51s, 100.0 %", "main.main: 1.51s, 100.0 %", "main.read: 10ms, 0.7 %", "example.com/x/y.(*T[go.shape.int]).Seal<>: 1.5s, 99.3 %"} {
		if !boxes[want] {
			t.Errorf("no box %q in %v", want, boxes)
		}
	}
	if err := SVG(io.Discard, "", nil); err == nil {
		t.Error("a graph of nothing")
	}
}
