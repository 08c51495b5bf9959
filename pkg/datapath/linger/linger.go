// Package linger is interrupt moderation in user space: a reader that finds
// nothing while packets come in quick succession sleeps for a moment before it
// blocks. What arrives meanwhile is read in one go, without waking a thread for
// each packet, which in a virtual machine costs more than the packet's work.
// Sparse traffic never sleeps here, so the latency of an idle link is what it
// would be without.
//
// Called by the read loops of datapath/tap and datapath/wire.
package linger

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Pause is how long a reader sleeps, in a busy period, before it blocks.
	Pause = 30 * time.Microsecond
	// Busy is the longest wait for a packet that still belongs to a busy period.
	Busy = 250 * time.Microsecond
)

// Modes of a reader.
const (
	Adaptive = "adaptive" // sleep as described above
	Poll     = "poll"     // always block at once
)

// Wait belongs to one reader and is used by one goroutine at a time.
type Wait struct {
	off   bool
	busy  bool
	slept bool  // since asked
	asked int64 // when the reader first found nothing; 0: it has not

	now   func() int64 // nanoseconds, monotonic
	sleep func()
}

// New returns a Wait of the given mode; "" means Adaptive.
func New(mode string) Wait {
	return Wait{off: mode == Poll, now: monotonic, sleep: pause}
}

// Got notes that the reader found something.
func (w *Wait) Got() {
	if w.off {
		return
	}
	if w.asked == 0 {
		w.busy = true
		return
	}
	w.busy = w.now()-w.asked < int64(Busy)
	w.asked, w.slept = 0, false
}

// Again is called when the reader found nothing. It reports whether to look
// once more, having slept for Pause then; else the reader is to block.
func (w *Wait) Again() bool {
	if w.off {
		return false
	}
	if w.asked == 0 {
		w.asked = w.now()
	}
	if !w.busy || w.slept {
		return false
	}
	w.slept = true
	w.sleep()
	return true
}

var start = time.Now()

// monotonic is never 0.
func monotonic() int64 { return int64(time.Since(start)) + 1 }

var pauseSpec = unix.NsecToTimespec(int64(Pause))

// pause keeps its P: giving it away and getting it back costs more than the
// sleep. A signal, such as the collector's, ends it early. By default the kernel
// adds 50 µs to every sleep of a thread, and the goroutine may be on any thread.
func pause() {
	syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0, 0)
	syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pauseSpec)), 0, 0)
}
