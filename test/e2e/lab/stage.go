package lab

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
)

// Test plays the part of a *testing.T for programs that use the lab. The first
// Fatalf unwinds the function that Try runs.
type Test struct {
	mu       sync.Mutex
	ended    bool
	cleanups []func()
	dirs     []string
	errs     []error
	told     int // of errs, by Try
	logs     []string
}

// NewTest returns a Test that nothing has been made for.
func NewTest() *Test { return &Test{} }

// fatal is what Fatalf throws.
type fatal struct{ error }

// Helper does nothing.
func (t *Test) Helper() {}

// Logf keeps a line for Logs.
func (t *Test) Logf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logs = append(t.logs, fmt.Sprintf(format, args...))
}

// Errorf keeps an error for Try to return.
func (t *Test) Errorf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.errs = append(t.errs, fmt.Errorf(format, args...))
}

// Fatalf is Errorf, and ends Try.
func (t *Test) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	panic(fatal{fmt.Errorf(format, args...)})
}

// Failed tells whether there has been an error.
func (t *Test) Failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.errs) > 0
}

// Cleanup has End call f.
func (t *Test) Cleanup(f func()) {
	t.mu.Lock()
	ended := t.ended
	if !ended {
		t.cleanups = append(t.cleanups, f)
	}
	t.mu.Unlock()
	if ended {
		f()
	}
}

// TempDir makes a directory that End removes.
func (t *Test) TempDir() string {
	d, err := os.MkdirTemp("", "missiu-lab-")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirs = append(t.dirs, d)
	return d
}

// Logs returns what Logf was told.
func (t *Test) Logs() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.logs
}

// Try runs f and returns its errors. What f made stays until End. It may be
// called again; errors of the past are not told again.
func (t *Test) Try(f func(t TB)) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil, fatal:
			t.mu.Lock()
			err = errors.Join(t.errs[t.told:]...)
			t.told = len(t.errs)
			t.mu.Unlock()
		default:
			err = fmt.Errorf("%v\n%s", r, debug.Stack())
		}
	}()
	f(t)
	return nil
}

// End undoes everything, last made first; what is made later is undone at once.
func (t *Test) End() {
	t.mu.Lock()
	t.ended = true
	cleanups, dirs := t.cleanups, t.dirs
	t.cleanups, t.dirs = nil, nil
	t.mu.Unlock()
	for i := len(cleanups) - 1; i >= 0; i-- {
		cleanups[i]()
	}
	for _, d := range dirs {
		os.RemoveAll(d)
	}
}

// Stage runs f and cleans up after it, also when it fails or the program is
// interrupted.
func Stage(f func(t TB)) error {
	t := NewTest()
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(sig)
	done := make(chan error, 1)
	go func() { done <- t.Try(f) }()
	var err error
	select {
	case err = <-done:
	case s := <-sig:
		err = fmt.Errorf("ended by %v", s)
	}
	t.End()
	RemoveBin()
	if err != nil {
		for _, l := range t.Logs() {
			fmt.Fprintln(os.Stderr, l)
		}
	}
	return err
}
