package linger

import (
	"testing"
	"time"
)

func TestWait(t *testing.T) {
	const us = int64(time.Microsecond)
	now, slept := int64(1), 0
	w := New("")
	w.now = func() int64 { return now }
	w.sleep = func() { slept++; now += 30 * us }
	for i, k := range []struct {
		after int64 // µs that pass before
		got   bool  // the reader found something; else nothing
		again bool  // what it is told then
		slept int   // in all
	}{
		{0, false, false, 0},    // idle: block at once
		{1e6, true, false, 0},   // a packet after a second
		{10, false, false, 0},   // still idle
		{249, true, false, 0},   // the next comes soon: busy
		{500, false, true, 1},   // however long it was worked on
		{0, false, false, 1},    // only one sleep, then block
		{0, false, false, 1},    // spurious wake-up
		{100, true, false, 1},   // 130 µs after it began to wait: still busy
		{0, false, true, 2},     //
		{0, true, false, 2},     // the sleep paid
		{0, true, false, 2},     // no wait between
		{0, false, true, 3},     //
		{0, false, false, 3},    //
		{220, true, false, 3},   // 250 µs: not busy any more
		{0, false, false, 3},    //
		{1000, true, false, 3},  //
		{0, true, false, 3},     // two reads in succession: busy
		{0, false, true, 4},     //
		{0, false, false, 4},    //
		{5000, true, false, 4},  //
		{5000, false, false, 4}, //
	} {
		now += k.after * us
		again := false
		if k.got {
			w.Got()
		} else {
			again = w.Again()
		}
		if again != k.again || slept != k.slept {
			t.Fatalf("step %d: got again %v, %d sleeps; want %v, %d", i, again, slept, k.again, k.slept)
		}
	}
}

func TestPoll(t *testing.T) {
	w := New(Poll)
	w.sleep = func() { t.Error("slept") }
	for range 3 {
		w.Got()
		if w.Again() {
			t.Error("got again, want block")
		}
	}
}

func TestNoAlloc(t *testing.T) {
	w := New(Adaptive)
	if n := testing.AllocsPerRun(100, func() { w.Got(); w.Again(); w.Again() }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// What the sleep really takes, and what a wait costs that does not sleep.
func BenchmarkPause(b *testing.B) {
	for range b.N {
		pause()
	}
}

func BenchmarkGotAgain(b *testing.B) {
	w := New(Adaptive)
	w.sleep = func() {}
	for range b.N {
		w.Got()
		w.Again()
	}
}
