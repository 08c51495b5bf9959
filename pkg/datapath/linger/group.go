package linger

import (
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hurry is after how many reads in quick succession a reader of a Group goes by
// itself. A pair of packets now and then is not worth waking its goroutine for.
//
// calm is after how many that each came after a silence it comes back. In the midst
// of bulk there are silences too, and to come and go each time would wake a
// goroutine each time.
const (
	hurry = 3
	calm  = 8
)

// Group is readers of which one, the leader, waits for the descriptors of all while
// they are idle, and serves them. The kernel's answer to a packet, which lies in
// another reader's descriptor by the time that the packet is written, is so found
// by the thread that has just written, as it is by a program with one thread; to
// wake another for it takes longer than all of the packet's work.
//
//	idle reader     armed in the group's epoll(7); it leads, or its goroutine is
//	                parked and the leader calls its serve
//	other reader    not in the epoll; waits as one without a group does
//
// The leader blocks its thread for Quick at most, then it waits on the netpoller.
// A reader that becomes busy leaves; the leader hands over to another then. How long
// a reader had nothing does not count what the leader spent on others: where all of
// them have much to do, each would look idle to the last.
//
// Measured by test/bench, ping every 5 ms, ESP in UDP, both gateways and both ends on
// two processors, eight rounds in turn with readers that wait for themselves and with
// OpenVPN, medians: p50 368, 453 and 301 us, p99 1215, 1367 and 1001 us. By perf a ping
// costs the wake-ups and system calls that it costs OpenVPN. What is left is the
// kernel's time to send a datagram, 1.7 times that of OpenVPN's if the machine's speed
// is taken out, perhaps because the receiver's chain and packet socket are in it, and
// as much of our own code, which is cold after 5 ms: 134 us between system calls of both
// gateways together, traced, and OpenVPN's 50. BenchmarkLone of package datapath shows
// it: a packet takes an engine 0.6 us, and 26 once others had the caches. Since a lone
// packet touches less, of 2400 pings in turn with the version before and OpenVPN, p50
// 324, 351 and 284 us, p95 515, 539 and 424, p99 1350, 956 and 1110, which of each varies
// between 500 and 2000 from round to round.
//
// What gained nothing that could be told from noise: a leader that spins for 250 us
// when an answer is likely; in BenchmarkLone, to read the code of a packet's way at once
// before it runs, and huge pages below the heap.
//
// State that serve uses belongs to the leader while the reader is parked, else to the
// reader's goroutine. The zero Group has no members; it ends with the last of them.
type Group struct {
	idle atomic.Int64 // how long leaders have waited, ns

	mu      sync.Mutex // the following, and the members' waits and parked
	ep      int
	leader  *Wait
	members []*Wait // all that ever joined, before the first of them waits
	open    int
}

// membership is what a Wait has of its Group.
type membership struct {
	group  *Group // nil: it waits for itself
	number int
	serve  func() bool
	waits  atomic.Bool // in the group: its descriptors are in the epoll
	parked bool        // and the leader serves it
	rush   int         // reads in quick succession since it waits there
	lone   int         // reads after a silence in a row
	wake   chan struct{}
	led    func(uintptr) bool
}

// Lone reports that the reader waits in a group, where what comes is single.
func (w *Wait) Lone() bool { return w.waits.Load() && w.rush == 0 }

// Join makes w a member of g, before any member waits. serve reads what is there
// and deals with it, without waiting; false says that the reader's own goroutine
// has to go on. In mode Poll it does nothing.
func (w *Wait) Join(g *Group, serve func() bool) error {
	if w.off {
		return nil
	}
	var err error
	if g.open == 0 {
		if g.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
			return os.NewSyscallError("epoll_create1", err)
		}
	}
	ev := unix.EpollEvent{Events: unix.EPOLLONESHOT}
	if e := w.raw.Control(func(ep uintptr) { err = unix.EpollCtl(int(ep), unix.EPOLL_CTL_ADD, g.ep, &ev) }); e != nil {
		return e
	}
	if err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	w.group, w.number, w.serve, w.wake = g, len(g.members), serve, make(chan struct{}, 1)
	w.lone = calm
	w.led = func(ep uintptr) bool { return w.parkFor(ep, g.ep) }
	g.members = append(g.members, w)
	g.open++
	return nil
}

// enter has w wait in the group, as its leader or parked.
func (g *Group) enter(w *Wait) (leads bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := w.ended(); err != nil {
		g.remove(w)
		return false, err
	}
	if !w.waits.Load() {
		for i := range w.fds {
			ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(w.number)}
			if errno := epoll(unix.SYS_EPOLL_CTL, uintptr(g.ep), unix.EPOLL_CTL_ADD, uintptr(w.fds[i].Fd), unsafe.Pointer(&ev)); errno != 0 && errno != unix.EEXIST {
				return false, os.NewSyscallError("epoll_ctl", errno)
			}
		}
		w.waits.Store(true)
		w.rush = 0
	}
	if g.leader == nil {
		g.leader = w
	}
	w.parked = g.leader != w
	return !w.parked, nil
}

// leave takes w, which is awake or served, out. Somebody else leads then.
func (g *Group) leave(w *Wait) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.remove(w)
}

func (g *Group) remove(w *Wait) {
	if w.waits.Load() {
		for i := range w.fds {
			epoll(unix.SYS_EPOLL_CTL, uintptr(g.ep), unix.EPOLL_CTL_DEL, uintptr(w.fds[i].Fd), nil)
		}
		w.waits.Store(false)
	}
	if g.leader != w {
		return
	}
	g.leader = nil
	for _, m := range g.members {
		if m.parked {
			g.leader = m // nobody else becomes it before m is awake
			m.unpark()
			return
		}
	}
}

// unpark has the reader's goroutine go on.
func (w *Wait) unpark() {
	w.parked = false
	w.wake <- struct{}{}
}

// ended is the error of Block that was closed or interrupted. After it the reader's
// goroutine must not read on, as the leader may be serving it still.
func (w *Wait) ended() error {
	switch {
	case w.closed.Load():
		return os.ErrClosed
	case w.interrupted.Load():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// blockGroup waits in the group until w has something, or may have.
func (w *Wait) blockGroup() error {
	g := w.group
	for {
		leads, err := g.enter(w)
		if err != nil {
			return err
		}
		if !leads {
			<-w.wake
			if err := w.ended(); err != nil {
				g.leave(w)
				return err
			}
			return nil
		}
		if w.lead() {
			return nil
		}
		w.yielded, w.armed = 0, false
		from := w.now()
		err = w.raw.Read(w.led)
		w.kept = w.now()
		g.idle.Add(w.kept - from)
		if err == nil {
			err = w.err
		}
		if err != nil {
			g.leave(w)
			if w.closed.Load() {
				return os.ErrClosed
			}
			return err
		}
	}
}

// lead blocks the thread and serves the others until w itself has something, which
// it reports, or none had for Quick.
func (w *Wait) lead() (own bool) {
	g := w.group
	w.mu.Lock() // Close waits for us
	defer w.mu.Unlock()
	quick := polling.Add(1) < w.procs
	defer polling.Add(-1)
	now := w.now()
	if quick {
		w.offer(now)
	}
	var events [8]unix.EpollEvent
	for end := now + int64(Quick); w.ended() == nil; now = w.now() {
		wait := 0
		if quick {
			wait = int(max(0, end-now+int64(time.Millisecond)-1) / int64(time.Millisecond))
		}
		n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(g.ep), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), uintptr(wait), 0, 0)
		g.idle.Add(w.now() - now)
		if errno != 0 {
			continue // a signal; this is Go code in which it is heard
		}
		if n == 0 && (!quick || now >= end) {
			return false
		}
		for _, ev := range events[:n] {
			if m := g.members[ev.Fd]; m == w {
				own = true
			} else {
				g.look(m)
			}
		}
		if own {
			return true
		}
		if n > 0 {
			end = w.now() + int64(Quick)
		}
	}
	return false
}

// look serves the parked member m.
func (g *Group) look(m *Wait) {
	g.mu.Lock()
	parked := m.parked && m.ended() == nil
	g.mu.Unlock()
	if !parked {
		return
	}
	ok := m.serve()
	m.ask()
	if !ok || !m.waits.Load() {
		g.call(m)
	}
}

// call has a parked member's goroutine go on.
func (g *Group) call(w *Wait) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.parked {
		g.remove(w)
		w.unpark()
	}
}

// quit is the end of a member, whose thread is not in lead.
func (g *Group) quit(w *Wait) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.remove(w)
	if g.open--; g.open == 0 {
		unix.Close(g.ep)
	}
}
