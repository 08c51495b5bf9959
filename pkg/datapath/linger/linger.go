// Package linger is how a reader waits for descriptors that have nothing, so that
// neither many packets nor a single one cost more than they must.
//
// While packets come in quick succession it is interrupt moderation in user
// space: the reader sleeps for a moment before it blocks. What arrives meanwhile
// is read in one go, without waking a thread for each packet, which in a virtual
// machine costs more than the packet's work. In a steady stream the moment is longer.
//
// While they come one by one the thread itself blocks in poll(2), as a C program
// would: the next packet finds it there, with its processor, and not behind the
// scheduler's search for work and the netpoller's descriptor. The scheduler does
// not know of it and thinks the goroutine is running, so it lasts for Quick at
// most; what the collector wants meanwhile it says by a signal, which ends poll.
//
// Otherwise the goroutine waits on the netpoller like any other: an idle process
// costs nothing then, and in busy periods one thread serves several readers. The
// descriptors are armed there only for this and for one event: registered for
// good, as those of package os are, they would wake one of the scheduler's threads
// for every packet.
//
// Readers of one Group do the two latter together: one waits for all, and deals with
// what comes for the others while it is little.
//
// Called by the read loops of datapath/tap, datapath/wire and datapath/bump; package
// datapath makes the groups.
package linger

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Pause is how long a reader sleeps, in a busy period, before it blocks.
	Pause = 30 * time.Microsecond
	// LongPause takes its place in a stream: when steady of them in a row were not in
	// vain, and until one is. Of 120,000 packets of 1400 octets a second each cost both
	// gateways 5.6 us of CPU with pauses of 100 us, 6.2 with 60 and 6.6 with 30. How many
	// pass with at most 1 % lost, and TCP, did not differ beyond the noise; of a flood
	// fewer passed, 164,000 a second against 202,000.
	LongPause = 100 * time.Microsecond
	steady    = 16
	// Busy is the longest wait for a packet that still belongs to a busy period.
	Busy = 250 * time.Microsecond
	// Quick is how long a thread blocks by itself before the netpoller has its turn.
	Quick = 20 * time.Millisecond
	// yieldEvery bounds how long the netpoller may be without a thread should all
	// else fail.
	yieldEvery = 200 * time.Millisecond
	// floodYield is how often a reader yields that is always busy; one that never
	// waits looks at the clock every floodLook reads.
	floodYield = 2 * time.Millisecond
	floodLook  = 4
)

// Modes of a reader.
const (
	Adaptive = "adaptive" // as described above
	Poll     = "poll"     // always wait on the netpoller at once
)

// Wait belongs to one reader, and is used by one goroutine at a time except for
// Interrupt and Close: the reader's, or the leader's of its Group.
type Wait struct {
	off    bool
	busy   bool
	slept  bool  // since asked
	polled bool  // since asked, in vain
	asked  int64 // when the reader first found nothing; 0: it has not
	idled  int64 // the group's idle then

	paid    int   // pauses in a row that were not in vain
	looks   uint  // reads without waiting
	kept    int64 // since when it has its thread
	procs   int32 // of the scheduler
	yielded int64 // when it was last offered this thread's; 0: not since we waited on the netpoller

	membership

	mu          sync.Mutex // held while the thread is in poll, so that Close can wait
	closed      atomic.Bool
	interrupted atomic.Bool
	fds         []unix.PollFd
	ep          *os.File // nil: no descriptors
	raw         syscall.RawConn
	fn          func(uintptr) bool
	armed       bool
	err         error

	now   func() int64 // nanoseconds, monotonic
	sleep func()
	poll  func(time.Duration) bool
	yield func()
}

// New returns a Wait of the given mode, "" meaning Adaptive, for fds, which are
// not to be registered with the netpoller otherwise (see Open).
func New(mode string, fds ...int) (*Wait, error) {
	w := &Wait{off: mode == Poll, procs: int32(runtime.GOMAXPROCS(0)), now: monotonic, yield: runtime.Gosched}
	w.fn, w.poll, w.sleep = w.park, w.pollOnce, w.pause
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	unix.SetNonblock(fd, true)
	w.ep = os.NewFile(uintptr(fd), "epoll")
	if w.raw, err = w.ep.SyscallConn(); err != nil {
		w.ep.Close()
		return nil, err
	}
	for i, f := range fds {
		w.fds = append(w.fds, unix.PollFd{Fd: int32(f), Events: unix.POLLIN})
		ev := unix.EpollEvent{Events: unix.EPOLLONESHOT, Fd: int32(i)}
		if err := unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, f, &ev); err != nil {
			w.ep.Close()
			return nil, os.NewSyscallError("epoll_ctl", err)
		}
	}
	return w, nil
}

// Open makes a file of fd that does not block and that the netpoller knows
// nothing of. Only the methods of its RawConn serve, and of those Control only.
func Open(fd int, name string) (*os.File, error) {
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := unix.SetNonblock(fd, true); err != nil {
		f.Close()
		return nil, os.NewSyscallError("fcntl", err)
	}
	return f, nil
}

// Got notes that the reader found something. It reports whether that came after
// a silence: more is unlikely to be there already, and what came had better be
// dealt with before anything else.
func (w *Wait) Got() (alone bool) {
	alone = w.got()
	switch {
	case !w.waits.Load() && alone:
		w.lone++
	case !w.waits.Load():
		w.lone = 0
	case alone:
		w.rush = 0
	case w.rush+1 < hurry:
		w.rush++
		w.busy = false
	default:
		w.group.leave(w)
		w.lone = 0
	}
	return alone
}

func (w *Wait) got() (alone bool) {
	if w.asked == 0 {
		w.busy = true
		if w.looks++; w.looks%floodLook == 0 {
			w.share(w.now())
		}
		return false
	}
	now := w.now()
	silence := now - w.asked
	if w.waits.Load() {
		silence = min(silence, w.group.idle.Load()-w.idled)
	}
	w.busy = silence < int64(Busy)
	switch {
	case !w.busy:
		w.paid = 0
	case w.slept:
		w.paid++
	}
	w.asked, w.slept, w.polled = 0, false, false
	if w.busy {
		w.share(now)
	}
	return !w.busy
}

// share is for a reader that is busy for long. The thread that waited on the
// netpoller may be its own, for it is how readers are woken, and the scheduler
// puts no other in its place: then nobody else of the process hears of what comes,
// such as the readers of the other direction. Yielding starts one.
func (w *Wait) share(now int64) {
	if now-w.kept > int64(floodYield) {
		w.kept = now
		w.yield()
	}
}

// Block is called when the reader found nothing, and returns when it is to look
// again. The error is that of a Wait that was closed, or interrupted
// (os.ErrDeadlineExceeded).
func (w *Wait) Block() error {
	w.ask()
	if !w.off {
		if w.busy && !w.slept {
			w.slept = true
			w.sleep()
			return nil
		}
		w.paid = 0
		if !w.busy && w.group != nil && w.lone >= calm {
			return w.blockGroup()
		}
		if !w.busy && !w.polled && w.pollQuick() {
			return nil
		}
	}
	w.yielded = 0
	w.armed = false
	err := w.raw.Read(w.fn)
	w.kept = w.now()
	if err == nil {
		err = w.err
	}
	if w.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// ask notes when the reader found nothing.
func (w *Wait) ask() {
	if w.asked != 0 {
		return
	}
	w.asked = w.now()
	if w.group != nil {
		w.idled = w.group.idle.Load()
	}
}

// pollQuick blocks the thread in poll, and reports whether there is something.
func (w *Wait) pollQuick() (found bool) {
	w.polled = true
	// Each of us keeps a processor of the scheduler's, and one has to be left.
	if polling.Add(1) >= w.procs {
		polling.Add(-1)
		return false
	}
	defer polling.Add(-1)
	now := w.now()
	w.offer(now)
	for end := w.asked + int64(Quick); now < end && !w.closed.Load(); now = w.now() {
		// A signal ends poll early; this is Go code in which it is heard.
		if w.poll(time.Duration(end - now)) {
			w.polled = false
			return true
		}
	}
	return false
}

// offer yields now and then: the thread that waited on the netpoller may be this
// one, for it is how we were woken. Yielding starts another in its place.
func (w *Wait) offer(now int64) {
	if w.yielded == 0 || now-w.yielded > int64(yieldEvery) {
		w.yielded = now
		w.yield()
	}
}

// polling is how many threads are in poll.
var polling atomic.Int32

// pollOnce blocks the thread until there is something, for d at most, or until
// there is a signal; it reports whether there is something. The scheduler is not
// told: giving the processor away and getting it back is what costs.
func (w *Wait) pollOnce(d time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed.Load() {
		return false
	}
	ts := unix.NsecToTimespec(int64(d))
	n, _, errno := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(unsafe.SliceData(w.fds))), uintptr(len(w.fds)), uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	return errno == 0 && n > 0
}

// park waits on the netpoller: false means that it has to wait.
func (w *Wait) park(ep uintptr) bool {
	w.err = nil
	for i := range w.fds {
		if w.armed {
			break
		}
		ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(i)}
		if errno := epoll(unix.SYS_EPOLL_CTL, ep, unix.EPOLL_CTL_MOD, uintptr(w.fds[i].Fd), unsafe.Pointer(&ev)); errno != 0 {
			w.err = os.NewSyscallError("epoll_ctl", errno)
			return true
		}
	}
	w.armed = true
	return w.ready(ep)
}

// parkFor is park for the group's descriptor.
func (w *Wait) parkFor(ep uintptr, group int) bool {
	w.err = nil
	if !w.armed {
		ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT}
		if errno := epoll(unix.SYS_EPOLL_CTL, ep, unix.EPOLL_CTL_MOD, uintptr(group), unsafe.Pointer(&ev)); errno != 0 {
			w.err = os.NewSyscallError("epoll_ctl", errno)
			return true
		}
	}
	w.armed = true
	return w.ready(ep)
}

// ready reports whether something is there, or an error that Block is to find.
func (w *Wait) ready(ep uintptr) bool {
	var events [4]unix.EpollEvent
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, ep, uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		return errno != 0 || n > 0
	}
}

func epoll(trap, ep, op, fd uintptr, ev unsafe.Pointer) syscall.Errno {
	_, _, errno := syscall.RawSyscall6(trap, ep, op, fd, uintptr(ev), 0, 0)
	return errno
}

// Interrupt makes Block return an error from now on, within Quick.
func (w *Wait) Interrupt() {
	w.interrupted.Store(true)
	w.ep.SetReadDeadline(time.Unix(1, 0))
	if w.group != nil {
		w.group.call(w)
	}
}

// Close makes Block return os.ErrClosed. The descriptors may be closed afterwards.
func (w *Wait) Close() error {
	if w.closed.Swap(true) {
		return os.ErrClosed
	}
	if w.group != nil {
		w.group.call(w)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.group != nil {
		w.group.quit(w)
	}
	return w.ep.Close()
}

var start = time.Now()

// monotonic is never 0.
func monotonic() int64 { return int64(time.Since(start)) + 1 }

var pauseSpec, longSpec = unix.NsecToTimespec(int64(Pause)), unix.NsecToTimespec(int64(LongPause))

// pause keeps its P: giving it away and getting it back costs more than the
// sleep. A signal, such as the collector's, ends it early. By default the kernel
// adds 50 µs to every sleep of a thread, and the goroutine may be on any thread.
func (w *Wait) pause() {
	spec := &pauseSpec
	if w.streams() {
		spec = &longSpec
	}
	syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0, 0)
	syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(spec)), 0, 0)
}

// streams: packets come so steadily that a long pause is none too long.
func (w *Wait) streams() bool { return w.paid >= steady }
