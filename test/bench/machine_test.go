package main

import (
	"os"
	"runtime"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	line := "42 (a ) b) S 7 42 42 0 -1 4194560 1 2 3 4 100 50 30 20 20 0 1 0 5 6 7\n"
	got, ok := parseStat([]byte(line))
	if want := (statLine{7, 1500 * time.Millisecond, 500 * time.Millisecond}); !ok || got != want {
		t.Errorf("got %+v %v, want %+v", got, ok, want)
	}
	for _, bad := range []string{"", "42 (a", "42 (a) S 7 8"} {
		if _, ok := parseStat([]byte(bad)); ok {
			t.Errorf("%q parsed", bad)
		}
	}
}

func TestParseMachine(t *testing.T) {
	m, err := parseMachine([]byte("cpu  10 0 20 300 5 0 1 7 0 0\ncpu0 1 2 3\n"))
	if want := (machine{3050 * time.Millisecond, 70 * time.Millisecond}); err != nil || m != want {
		t.Errorf("got %+v %v, want %+v", m, err, want)
	}
	for _, bad := range []string{"", "cpu 1 2 3\n", "cpu  10 0 20 x 5 0 1 7\n"} {
		if _, err := parseMachine([]byte(bad)); err == nil {
			t.Errorf("%q parsed", bad)
		}
	}
}

func TestForeign(t *testing.T) {
	sec := func(f float64) time.Duration { return time.Duration(f * float64(time.Second)) }
	before := &usage{at: time.Unix(0, 0), procs: map[int]statLine{
		1: {}, 2: {}, 10: {parent: 1, cpu: sec(5)}, 11: {parent: 10}, 20: {parent: 1, cpu: sec(1)}, 30: {parent: 2},
	}}
	after := &usage{at: time.Unix(1, 0), machine: machine{steal: sec(0.1)}, procs: map[int]statLine{
		1: {}, 2: {}, 10: {parent: 1, cpu: sec(5.5)}, 11: {parent: 10, cpu: sec(0.5)}, // ours
		20: {parent: 1, cpu: sec(1.1), reaped: sec(0.1)}, 21: {parent: 20, cpu: sec(0.2)}, // others
		30: {parent: 2, cpu: sec(0.9)}, // the kernel
	}}
	wall := float64(sec(1)) * float64(runtime.NumCPU())
	want := float64(sec(0.1+0.1+0.1+0.2)) / wall
	if got := before.foreign(after, 10); got < want-1e-9 || got > want+1e-9 {
		t.Errorf("got %v, want %v", got, want)
	}
}

// What the process burns shows on its clock.
func TestCPU(t *testing.T) {
	was, err := cpuOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for {
		now, err := cpuSum([]int{os.Getpid()})
		if err != nil {
			t.Fatal(err)
		}
		if now-was > time.Millisecond {
			break
		}
	}
	if _, err := cpuOf(1 << 22); err == nil {
		t.Error("a process that is not has a clock")
	}
	if n, err := resident([]int{os.Getpid()}); err != nil || n < 1<<20 {
		t.Errorf("resident memory %d, %v", n, err)
	}
}
