// Package lab makes hosts on one machine for end-to-end tests and for playing:
// network namespaces joined by Ethernet, each with its own processes, /etc and
// /run; captures and their decryption; and the two independent IPsec peers,
// strongSwan and a Linux kernel in user mode. It knows the product only by its
// command lines, never by its packages. It needs root and what scripts/setup
// installs; everything it makes is named mi-<pid>-… after the process that
// made it, so that the next run can remove what a killed one left.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TB is what the lab wants of a test; *testing.T is one. Fatalf does not return.
type TB interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
	TempDir() string
	Failed() bool
}

// NeedRoot skips a test that is not run by root.
func NeedRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// prefix begins the names of all namespaces of the lab.
const prefix = "mi-"

var sweep sync.Once

// removeLeftovers ends and removes what runs that were killed left behind:
// namespaces whose name carries the pid of a process that is gone.
func removeLeftovers() {
	ents, _ := os.ReadDir("/run/netns")
	for _, e := range ents {
		rest, ok := strings.CutPrefix(e.Name(), prefix)
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(strings.SplitN(rest, "-", 2)[0])
		if err != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		removeNetns(e.Name())
	}
}

// removeNetns kills the processes in a namespace, whose first is the init of
// its own pid namespace, and removes it.
func removeNetns(name string) {
	out, _ := exec.Command("ip", "netns", "pids", name).Output()
	for _, f := range strings.Fields(string(out)) {
		if pid, err := strconv.Atoi(f); err == nil {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	exec.Command("ip", "netns", "del", name).Run()
}

// Result is what a command that ended left.
type Result struct {
	Cmd      string
	Out, Err string
	Code     int // exit status; -1 when it did not end by itself
}

func (r Result) String() string {
	s := fmt.Sprintf("%s: exit %d", r.Cmd, r.Code)
	if r.Out != "" {
		s += "\n" + strings.TrimRight(r.Out, "\n")
	}
	if r.Err != "" {
		s += "\n" + strings.TrimRight(r.Err, "\n")
	}
	return s
}

// timeLimit ends a command that hangs, so that a test fails with its output
// instead of with a time-out of the whole run.
const timeLimit = 5 * time.Minute

// run runs a command on the machine itself, outside of any host.
func run(t TB, args ...string) Result {
	t.Helper()
	return runCmd(t, "", "", args, args)
}

func runCmd(t TB, dir, stdin string, argv, show []string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	cmd.Dir = dir
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	// A daemon that keeps our pipe open must not hold us.
	cmd.WaitDelay = 5 * time.Second * patience
	err := cmd.Run()
	r := Result{Cmd: strings.Join(show, " "), Out: out.String(), Err: errb.String()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%v did not end in %v\n%s%s", r.Cmd, timeLimit, r.Out, r.Err)
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case errors.Is(err, exec.ErrWaitDelay):
		t.Fatalf("%v: a process that it left behind holds its output open", r.Cmd)
	case err != nil:
		t.Fatalf("%v: %v", r.Cmd, err)
	}
	return r
}

// must runs a command of the machine and fails the test if it fails.
func must(t TB, args ...string) string {
	t.Helper()
	r := run(t, args...)
	if r.Code != 0 {
		t.Fatalf("%v", r)
	}
	return r.Out
}

// patience is by what limits are multiplied, which are those of a machine that is
// not busy: one that is stands still for seconds now and then.
const patience = 6

// Until waits until f says true and fails the test at the deadline, with what
// was waited for and the last state that f told of.
func Until(t TB, limit time.Duration, what string, f func() (ok bool, state string)) {
	t.Helper()
	limit *= patience
	deadline := time.Now().Add(limit)
	for {
		ok, state := f()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in %v; %s", what, limit, state)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

var binaries struct {
	sync.Mutex
	dir string
	err error
}

// Root is the directory of go.mod.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = up
	}
}

// Bin returns a directory with the programs of the product as `make missiu`
// builds them and the tests' own ones (test/e2e/cmd). They are built once for
// all tests of the process.
func Bin(t TB) string {
	t.Helper()
	b := &binaries
	b.Lock()
	defer b.Unlock()
	if b.dir == "" && b.err == nil {
		b.dir, b.err = buildAll()
	}
	if b.err != nil {
		t.Fatalf("%v", b.err)
	}
	return b.dir
}

// RemoveBin removes what Bin built; for TestMain.
func RemoveBin() {
	b := &binaries
	b.Lock()
	defer b.Unlock()
	if b.dir != "" {
		os.RemoveAll(b.dir)
		b.dir = ""
	}
}

func buildAll() (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "missiu-bin-")
	if err != nil {
		return "", err
	}
	for out, pkg := range map[string]string{
		"missiu":     "./cmd/missiu",
		"ike":        "./cmd/ike",
		"loadConfig": "./cmd/loadconfig",
		"transfer":   "./test/e2e/cmd/transfer",
		"pfkey":      "./test/e2e/cmd/pfkey",
		"ikeload":    "./test/e2e/cmd/ikeload",
	} {
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, out), pkg)
		cmd.Dir = root
		if msg, err := cmd.CombinedOutput(); err != nil {
			os.RemoveAll(dir)
			return "", fmt.Errorf("go build %s: %v\n%s", pkg, err, msg)
		}
	}
	return dir, os.Chmod(dir, 0o755)
}
