package walls

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestAgain: scripts/test gives the tests that fail a second try, alone, and only
// what may be bad luck.
func TestAgain(t *testing.T) {
	const (
		pass = "ok  \tm/b\t1.0s\n"
		one  = "--- FAIL: TestA (0.1s)\n    --- FAIL: TestA/sub (0.1s)\n        a_test.go:1: panic: not at the beginning of a line\nFAIL\nFAIL\tm/a\t1.0s\n"
		two  = "--- FAIL: TestC (0.1s)\n--- FAIL: TestD (0.1s)\nFAIL\nFAIL\tm/c\t1.0s\n"
		// What -v says, as the test goes on.
		verbose = "=== RUN   TestB\n    b_test.go:1: passes\n--- PASS: TestB (0.1s)\n=== RUN   TestA\n=== RUN   TestA/sub\n" +
			"    a_test.go:3: got 1\n        want 2\n    host.go:112: --- missiu wrote:\n        much\n=== RUN   TestA/good\n    a_test.go:5: good\n" +
			"--- FAIL: TestA (0.1s)\n    --- FAIL: TestA/sub (0.1s)\n    --- PASS: TestA/good (0.1s)\nFAIL\nFAIL\tm/a\t1.0s\n"
		brief = "--- FAIL: TestA (0.1s)\n    --- FAIL: TestA/sub (0.1s)\n    a_test.go:3: got 1\n        want 2\n=== again, alone: TestA in m/a\n"
		again = " test -count=1 -timeout 15m -v -run ^"
	)
	repeated := regexp.MustCompile(`--- FAIL|panic|RACE|\[build failed`)
	for _, tt := range []struct {
		name, first, second string // what the first run says; which package fails again
		code                int
		calls               string // after the first run
	}{
		{"all pass", pass, "", 0, ""},
		{"one fails once", pass + one, "", 0, again + "(TestA)$ m/a"},
		{"one fails at length", verbose, "", 0, again + "(TestA)$ m/a"},
		{"one fails twice", one + pass, "m/a", 1, again + "(TestA)$ m/a"},
		{"two packages", one + pass + two, "", 0, again + "(TestA)$ m/a" + again + "(TestC|TestD)$ m/c"},
		{"the second of two packages fails twice", one + two, "m/c", 1, again + "(TestA)$ m/a" + again + "(TestC|TestD)$ m/c"},
		{"four fail", one + two + "--- FAIL: TestE (0.1s)\nFAIL\tm/e\t1.0s\n", "", 1, ""},
		{"does not build", one + "FAIL\tm/c [build failed]\n", "", 1, ""},
		{"exits", one + "FAIL\tm/c\t1.0s\n", "", 1, ""},
		{"panics", one + "panic: test timed out after 10m0s\n", "", 1, ""},
		{"races", "WARNING: DATA RACE\n" + one, "", 1, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write := func(name, text string) {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			write("first", tt.first)
			// A go that says what it was told to, and notes how it is called.
			write("go", `#!/bin/bash
cd `+dir+`
if [ ! -e calls ]; then
	>calls
	cat first
	! grep -q -e FAIL -e '^panic' first
	exit
fi
printf ' %s' "$@" >>calls
[ "${!#}" != "`+tt.second+`" ]
`)
			cmd := exec.Command("bash", "../../scripts/test", "-timeout", "10m", "m/...")
			cmd.Env = append(os.Environ(), "GO="+filepath.Join(dir, "go"))
			out, _ := cmd.CombinedOutput()
			calls, err := os.ReadFile(filepath.Join(dir, "calls"))
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if code := cmd.ProcessState.ExitCode(); code != tt.code || string(calls) != tt.calls {
				t.Errorf("exit %d after%s\nwant %d after%s\n%s", code, calls, tt.code, tt.calls, out)
			}
			if told := strings.Contains(string(out), "passed only the second time"); told != (tt.code == 0 && tt.calls != "") {
				t.Errorf("%s", out)
			}
			// What failed is told last, and in brief.
			_, last, _ := strings.Cut(string(out), "=== failed:\n")
			for line := range strings.Lines(tt.first) {
				if repeated.MatchString(line) && !strings.Contains(last, line) {
					t.Errorf("%q is not in\n%s", line, last)
				}
			}
			if tt.first == verbose && last != brief {
				t.Errorf("got\n%s\nwant\n%s", last, brief)
			}
		})
	}
}
