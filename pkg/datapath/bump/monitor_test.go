package bump

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/capture"
)

// monitored gives b a hub that monitors may attach to at path.
func monitored(t *testing.T, b *Bump) (path string) {
	t.Helper()
	e0 := capture.Interface{Name: "e0", Link: capture.LinkEthernet}
	h := capture.NewHub(e0, e0)
	b.Monitor(h, func(err error) { t.Error(err) })
	path = filepath.Join(t.TempDir(), "m")
	if err := h.Listen(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return path
}

// TestMonitor: while a side is passive a monitor sees what comes from it, and the
// flow goes on; closed sides show nothing, and nothing is copied without a monitor.
func TestMonitor(t *testing.T) {
	newLab(t)
	b := open(t, Options{})
	path := monitored(t, b)
	set(t, b, Passive, Passive)
	until(t, "neighbours", func() bool { return answered(t, 1, "10.9.0.2") == 1 })
	if n := b.Stats(High).Read + b.Stats(Low).Read; n != 0 {
		t.Errorf("%d frames copied for nobody", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	r, err := capture.Dial(ctx, path, capture.Both)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	until(t, "copiers", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.sides[High].copies != nil && b.sides[Low].copies != nil
	})
	if n := answered(t, 3, "10.9.0.2"); n != 3 {
		t.Errorf("passive: %d of 3 pings answered", n)
	}
	// ping sends more than 3 where answers are late, so each has its number here.
	seen := map[string]int{}
	for n := 0; n < 6; {
		f, err := r.Read()
		if err != nil {
			t.Fatalf("%v; seen %v", err, seen)
		}
		at := fmt.Sprint(f.Side, " ", f.Dir)
		for what, where := range map[string]string{"request": "high out", "reply": "low in"} {
			_, id, ok := strings.Cut(f.Line(capture.LinkEthernet), "ICMP echo "+what)
			if !ok {
				continue
			}
			if seen[what+id]++; at != where || seen[what+id] != 1 {
				t.Errorf("%s%s seen at %s, %d times", what, id, at, seen[what+id])
			}
			for k := range 3 {
				if strings.Contains(id, fmt.Sprintf(", seq %d,", k+1)) {
					n++
				}
			}
		}
	}
	r.Close()
	until(t, "no copiers", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.sides[High].copies == nil && b.sides[Low].copies == nil
	})
}
