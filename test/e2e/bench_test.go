package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// A tiny round of the benchmark, so that it does not rot.
func TestBench(t *testing.T) {
	lab.NeedRoot(t)
	dir := t.TempDir()
	bench := filepath.Join(dir, "bench")
	for _, args := range [][]string{
		{"go", "build", "-o", bench, "../bench"},
		{bench, "--quick", "--rounds", "1", "--systems", "missiu,plain", "--works", "tcp1,udp64,ping", "--patience", "1ms", "-o", filepath.Join(dir, "r")},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it cleans up
		cmd.WaitDelay = 20 * time.Second
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	md, err := os.ReadFile(filepath.Join(dir, "r.md"))
	if err != nil {
		t.Fatal(err)
	}
	number := `[0-9.]+( \([^)]*\))?( ~)?`
	for _, want := range []string{
		`(?m)^\| missiu, AES-128-GCM, ESP in UDP \| ` + number + ` \| ` + number + ` \| ` + number + ` \|$`,
		`(?m)^\| plain veth \| ` + number + ` \|  \| ` + number + ` \|$`,
		`(?m)^- missiu, .* all ESP in UDP; the marker .* is nowhere to be read$`,
		`(?m)^- plain veth, .*, readable, as it should be$`,
	} {
		if !regexp.MustCompile(want).Match(md) {
			t.Errorf("no %s in\n%s", want, md)
		}
	}
	if regexp.MustCompile(`## Notes`).Match(md) {
		t.Errorf("something went wrong:\n%s", md)
	}
	if svg, err := os.ReadFile(filepath.Join(dir, "r.svg")); err != nil || !regexp.MustCompile(`(?s)^<svg .*</svg>\n$`).Match(svg) {
		t.Errorf("chart %v:\n%s", err, svg)
	}
}
