package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// clockTick is the unit of times in /proc (USER_HZ, fixed on all of our machines).
const clockTick = time.Second / 100

// cpuOf is the CPU time that a process has used, with that of threads that
// ended, to the nanosecond: clock_getcpuclockid(3) spelled out.
func cpuOf(pid int) (time.Duration, error) {
	const perProcessSched = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|perProcessSched), &ts); err != nil {
		return 0, fmt.Errorf("CPU clock of pid %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// cpuSum adds up what processes have used.
func cpuSum(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, p := range pids {
		d, err := cpuOf(p)
		if err != nil {
			return 0, err
		}
		sum += d
	}
	return sum, nil
}

// statLine is what /proc/PID/stat tells.
type statLine struct {
	parent int
	cpu    time.Duration // own
	reaped time.Duration // of children that ended
}

func parseStat(b []byte) (s statLine, ok bool) {
	// The name, in parentheses, may hold anything.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return s, false
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 15 {
		return s, false
	}
	var n [15]int
	for i := range n {
		n[i], _ = strconv.Atoi(f[i]) // the state is no number
	}
	s.parent = n[1]
	s.cpu = time.Duration(n[11]+n[12]) * clockTick
	s.reaped = time.Duration(n[13]+n[14]) * clockTick
	return s, true
}

// usage is a look at the machine.
type usage struct {
	at    time.Time
	procs map[int]statLine
	machine
}

// machine is the first line of /proc/stat.
type machine struct {
	idle, steal time.Duration
}

func parseMachine(b []byte) (m machine, err error) {
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return m, fmt.Errorf("/proc/stat: %q", line)
	}
	var n [8]int
	for i := range n {
		if n[i], err = strconv.Atoi(f[i+1]); err != nil {
			return m, fmt.Errorf("/proc/stat: %w", err)
		}
	}
	return machine{idle: time.Duration(n[3]+n[4]) * clockTick, steal: time.Duration(n[7]) * clockTick}, nil
}

func look() (*usage, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return nil, err
	}
	u := &usage{at: time.Now(), procs: map[int]statLine{}}
	if u.machine, err = parseMachine(b); err != nil {
		return nil, err
	}
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			continue // it ended
		}
		if s, ok := parseStat(b); ok {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
			u.procs[pid] = s
		}
	}
	return u, nil
}

// busy is the part of the machine that was not idle between two looks.
func (u *usage) busy(later *usage) time.Duration {
	wall := later.at.Sub(u.at) * time.Duration(runtime.NumCPU())
	return max(0, wall-(later.idle-u.idle))
}

// foreign is the share of the machine, 0 to 1, that others took between two
// looks: processes that do not descend from us, and the hypervisor. The
// kernel's own threads work for us.
func (u *usage) foreign(later *usage, self int) float64 {
	const kthreadd = 2
	ours := func(pid int) bool {
		for pid > 1 {
			if pid == self || pid == kthreadd {
				return true
			}
			s, ok := later.procs[pid]
			if !ok {
				return false
			}
			pid = s.parent
		}
		return false
	}
	sum := later.steal - u.steal
	for pid, s := range later.procs {
		was, old := u.procs[pid]
		d := s.cpu - was.cpu
		if old {
			d += s.reaped - was.reaped
		}
		// What was reaped may have run before the first look.
		if d > 0 && !ours(pid) {
			sum += min(d, later.at.Sub(u.at)*time.Duration(runtime.NumCPU()))
		}
	}
	wall := later.at.Sub(u.at) * time.Duration(runtime.NumCPU())
	return min(1, float64(sum)/float64(wall))
}

// resident is the resident memory of processes in octets.
func resident(pids []int) (sum int64, err error) {
	for _, p := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p))
		if err != nil {
			return 0, err
		}
		f := strings.Fields(string(b))
		if len(f) < 2 {
			return 0, fmt.Errorf("statm of pid %d: %q", p, b)
		}
		pages, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += pages * int64(os.Getpagesize())
	}
	return sum, nil
}

// describe tells of the machine in a sentence.
func describe() string {
	var un unix.Utsname
	unix.Uname(&un)
	model := "unknown CPU"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	return fmt.Sprintf("%d CPUs (%s), Linux %s, %s. Both gateways, sender and receiver share them.",
		runtime.NumCPU(), model, unix.ByteSliceToString(un.Release[:]), runtime.Version())
}
