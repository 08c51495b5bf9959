package linger

import (
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipe returns a Wait for the reading end of a pipe, and both ends.
func pipe(t testing.TB, mode string) (w *Wait, r, wr int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	w, err := New(mode, p[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.Close()
		unix.Close(p[0])
		unix.Close(p[1])
	})
	return w, p[0], p[1]
}

// How a reader waits, step by step: s sleep, p poll in vain, P poll that found
// something, n the netpoller.
func TestSteps(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	const us = int64(time.Microsecond)
	w, _, wr := pipe(t, "")
	unix.Write(wr, []byte{0}) // so the netpoller never blocks
	now, did, ready := int64(1), "", false
	w.now = func() int64 { return now }
	w.sleep = func() { did += "s"; now += 30 * us }
	w.poll = func(d time.Duration) bool {
		if ready {
			did += "P"
			return true
		}
		did += "p"
		now += int64(d)
		return false
	}
	park := w.fn
	w.fn = func(fd uintptr) bool { did += "n"; return park(fd) }
	for i, k := range []struct {
		after int64 // µs that pass before
		got   bool  // the reader found something; else nothing
		ready bool  // and poll finds something
		did   string
		alone bool
	}{
		{0, false, false, "pn", false},     // idle
		{1e6, true, false, "", true},       // a packet after a second
		{10, false, true, "P", false},      // still idle
		{249, true, false, "", false},      // the next comes soon: busy
		{500, false, false, "s", false},    // however long it was worked on
		{0, false, false, "n", false},      // only one sleep
		{0, false, false, "n", false},      // spurious wake-up
		{100, true, false, "", false},      // 130 µs after it began to wait: still busy
		{0, false, true, "s", false},       //
		{0, true, false, "", false},        // the sleep paid
		{0, true, false, "", false},        // no wait between
		{0, false, false, "s", false},      //
		{0, false, false, "n", false},      //
		{220, true, false, "", true},       // 250 µs: not busy any more
		{0, false, true, "P", false},       //
		{0, false, true, "P", false},       // somebody else was faster
		{1000, true, false, "", true},      //
		{0, true, false, "", false},        // two reads in succession: busy
		{0, false, false, "s", false},      //
		{5000, true, false, "", true},      //
		{25000, false, false, "pn", false}, //
	} {
		now += k.after * us
		did, ready = "", k.ready
		alone := false
		if k.got {
			alone = w.Got()
		} else if err := w.Block(); err != nil {
			t.Fatal(err)
		}
		if did != k.did || alone != k.alone {
			t.Fatalf("step %d: did %q, alone %v; want %q, %v", i, did, alone, k.did, k.alone)
		}
	}
}

// Pauses become long in a stream in which none is in vain, and short when one is, or
// after a silence.
func TestStreams(t *testing.T) {
	for _, end := range []string{"in vain", "silence"} {
		w, _, wr := pipe(t, "")
		unix.Write(wr, []byte{0}) // so the netpoller never blocks
		now := int64(1)
		w.now = func() int64 { return now }
		w.sleep = func() { now += int64(Pause) }
		packet := func(blocks int, after time.Duration) {
			for range blocks {
				if err := w.Block(); err != nil {
					t.Fatal(err)
				}
			}
			now += int64(after)
			w.Got()
		}
		w.Got()
		for k := range steady {
			if w.streams() {
				t.Fatalf("after %d pauses", k)
			}
			packet(1, 0)
		}
		if !w.streams() {
			t.Fatalf("not after %d pauses", steady)
		}
		if end == "silence" {
			packet(1, Busy)
		} else {
			packet(2, 0)
		}
		if w.streams() {
			t.Errorf("still after %s", end)
		}
	}
}

// A reader that is busy for long yields its thread now and then, whether it has to
// wait a little between packets or never.
func TestYields(t *testing.T) {
	const us = int64(time.Microsecond)
	for _, waits := range []bool{false, true} {
		w, _, _ := pipe(t, "")
		now, yields := int64(1), 0
		w.now = func() int64 { return now }
		w.sleep = func() { now += 30 * us }
		w.yield = func() { yields++ }
		w.Got()
		for now < 21*int64(floodYield) {
			if waits {
				if err := w.Block(); err != nil {
					t.Fatal(err)
				}
			}
			now += 20 * us
			w.Got()
		}
		if yields < 18 || yields > 21 {
			t.Errorf("waits %v: yielded %d times in 21 times %v", waits, yields, floodYield)
		}
	}
}

func TestPollMode(t *testing.T) {
	w, _, wr := pipe(t, Poll)
	unix.Write(wr, []byte{0})
	w.sleep = func() { t.Error("slept") }
	w.poll = func(time.Duration) bool { t.Error("kept the thread"); return false }
	for range 3 {
		w.Got()
		if err := w.Block(); err != nil {
			t.Fatal(err)
		}
	}
}

// Whatever step it waits in, a reader sees what comes, and others of the
// process are not forgotten meanwhile.
func TestWakes(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	other, _, otherWr := pipe(t, Poll)
	for _, gap := range []time.Duration{0, 100 * time.Microsecond, 2 * time.Millisecond, Quick - time.Millisecond, Quick, 2 * Quick} {
		w, r, wr := pipe(t, Adaptive)
		woken := make(chan error)
		go func() {
			for b := []byte{0}; ; {
				if _, err := unix.Read(r, b); err == unix.EAGAIN {
					if err := w.Block(); err != nil {
						woken <- err
						return
					}
					continue
				}
				w.Got()
				woken <- nil
			}
		}()
		wait := func(what string, c chan error) error {
			select {
			case err := <-c:
				return err
			case <-time.After(time.Minute):
				t.Fatalf("gap %v: %s was not woken", gap, what)
				return nil
			}
		}
		for range 5 {
			time.Sleep(gap)
			unix.Write(wr, []byte{0})
			if err := wait("the reader", woken); err != nil {
				t.Fatal(err)
			}
			c := make(chan error)
			go func() { c <- other.Block() }()
			unix.Write(otherWr, []byte{0})
			if err := wait("another", c); err != nil {
				t.Fatal(err)
			}
			runtime.GC() // stops threads in poll
		}
		w.Close()
		if err := wait("the end", woken); !errors.Is(err, os.ErrClosed) {
			t.Errorf("gap %v: after Close: %v", gap, err)
		}
	}
}

func TestInterrupt(t *testing.T) {
	w, _, _ := pipe(t, Adaptive)
	w.Interrupt()
	if err := w.Block(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want a deadline exceeded", err)
	}
}

// With one processor a thread in poll would stop everything else.
func TestOneProcessor(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	w, _, wr := pipe(t, Adaptive)
	unix.Write(wr, []byte{0})
	w.poll = func(time.Duration) bool { t.Error("kept the processor"); return false }
	if err := w.Block(); err != nil {
		t.Fatal(err)
	}
}

func TestNoAlloc(t *testing.T) {
	w, _, wr := pipe(t, Adaptive)
	unix.Write(wr, []byte{0})
	w.poll = func(time.Duration) bool { return false }
	if n := testing.AllocsPerRun(100, func() { w.Got(); w.Block(); w.Block(); w.Block() }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// What the sleep really takes, and what a wait costs that finds something at once.
func BenchmarkPause(b *testing.B) {
	w := new(Wait)
	for range b.N {
		w.pause()
	}
}

func BenchmarkGotBlock(b *testing.B) {
	w, _, wr := pipe(b, Adaptive)
	w.sleep = func() {}
	unix.Write(wr, []byte{0})
	for range b.N {
		w.Got()
		w.Block()
		w.Block()
	}
}
