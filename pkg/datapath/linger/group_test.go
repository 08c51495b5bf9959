package linger

import (
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// member is a reader of octets in a group whose time stands still unless a test
// moves it.
type member struct {
	*Wait
	g      *Group
	r, wr  int
	own    atomic.Int64 // octets that its goroutine read
	served atomic.Int64 // that the leader read for it
	sum    int          // both; whoever reads changes it
	asking atomic.Int64 // how often it began to wait
	refuse atomic.Bool  // serve fails
	work   atomic.Int64 // how long serve takes, ns
	end    chan error   // what ended its goroutine
}

// read is the reader's batch, of one octet.
func (m *member) read(by *atomic.Int64) bool {
	var b [1]byte
	if n, err := unix.Read(m.r, b[:]); n != 1 || err != nil {
		return false
	}
	m.Got()
	m.sum++
	by.Add(1)
	return true
}

func (m *member) run() {
	for {
		if m.read(&m.own) {
			continue
		}
		if err := m.Block(); err != nil {
			m.end <- err
			return
		}
	}
}

func (m *member) write() { unix.Write(m.wr, []byte{0}) }

// group starts n readers; the clock is theirs.
func group(t *testing.T, n int) (ms []*member, clock *atomic.Int64) {
	t.Helper()
	procs := runtime.GOMAXPROCS(8)
	t.Cleanup(func() { runtime.GOMAXPROCS(procs) })
	return groupOf(t, n)
}

func groupOf(t *testing.T, n int) (ms []*member, clock *atomic.Int64) {
	t.Helper()
	g, clock := new(Group), new(atomic.Int64)
	clock.Store(1)
	for range n {
		m := &member{g: g, end: make(chan error, 1)}
		m.Wait, m.r, m.wr = pipe(t, Adaptive)
		m.sleep = func() {}
		m.now = func() int64 {
			now := clock.Load()
			if m.asked == 0 {
				m.asking.Add(1)
			}
			return now
		}
		if err := m.Join(g, func() bool {
			if m.refuse.Load() {
				return false
			}
			clock.Add(m.work.Load())
			m.read(&m.served)
			return true
		}); err != nil {
			t.Fatal(err)
		}
		ms = append(ms, m)
	}
	for _, m := range ms {
		go m.run()
		m.settle(t, nil)
	}
	return ms, clock
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(50 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("not so after a minute: %s", what)
		}
	}
}

// settle waits until m waits in the group, led by leader if that is not nil.
func (m *member) settle(t *testing.T, leader *member) {
	t.Helper()
	until(t, "the reader waits in the group", func() bool {
		m.g.mu.Lock()
		defer m.g.mu.Unlock()
		return m.waits.Load() && (m.parked || m.g.leader == m.Wait) && (leader == nil || m.g.leader == leader.Wait)
	})
}

// counts waits for what was read of m.
func (m *member) counts(t *testing.T, own, served int64) {
	t.Helper()
	until(t, "all is read", func() bool { return m.own.Load()+m.served.Load() == own+served })
	if o, s := m.own.Load(), m.served.Load(); o != own || s != served {
		t.Fatalf("its goroutine read %d, the leader %d; want %d, %d", o, s, own, served)
	}
}

// returns brings m back to the group, by octets after silences that its goroutine
// reads; it returns how many that has read then.
func (m *member) returns(t *testing.T, clock *atomic.Int64) (own int64) {
	t.Helper()
	own, served := m.own.Load(), m.served.Load()
	for range calm {
		until(t, "the reader waits", func() bool { return m.asking.Load() == own+served+1 })
		if m.waits.Load() {
			t.Fatal("the reader is back too early")
		}
		clock.Add(second)
		m.write()
		own++
		m.counts(t, own, served)
	}
	return own
}

const second = int64(time.Second)

// The leader reads for all, and its goroutine is the only one that runs.
func TestGroup(t *testing.T) {
	ms, clock := group(t, 3)
	for k := range int64(3) {
		for i, m := range ms {
			clock.Add(second)
			m.write()
			if i == 0 {
				m.counts(t, k+1, 0)
			} else {
				m.counts(t, 0, k+1)
			}
			m.settle(t, ms[0])
		}
	}
}

// A reader that is busy goes by itself, and comes back after a silence.
func TestGroupBusy(t *testing.T) {
	ms, clock := group(t, 3)
	m := ms[1]
	for k := range int64(hurry) {
		m.write()
		m.counts(t, 0, k+1)
	}
	until(t, "the reader has left", func() bool { return !m.waits.Load() })
	m.write()
	m.counts(t, 1, hurry)
	own := m.returns(t, clock)
	m.settle(t, ms[0])
	m.write() // soon, but only once
	m.counts(t, own, hurry+1)
	clock.Add(second)
	m.write()
	m.counts(t, own, hurry+2)
	m.settle(t, ms[0])
}

// If it is the leader another becomes it.
func TestGroupLeaderBusy(t *testing.T) {
	ms, clock := group(t, 3)
	for k := range int64(hurry) {
		ms[0].write()
		ms[0].counts(t, k+1, 0)
	}
	for _, m := range ms[1:] {
		m.settle(t, ms[1])
	}
	clock.Add(second)
	ms[2].write()
	ms[2].counts(t, 0, 1)
	own := ms[0].returns(t, clock)
	ms[0].settle(t, ms[1])
	clock.Add(second)
	ms[0].write()
	ms[0].counts(t, own, 1)
}

// Two that are busy do not look idle to each other because their leader has much to
// do for both.
func TestGroupBusyTogether(t *testing.T) {
	ms, _ := group(t, 3)
	const octets = 4 * hurry
	for _, m := range ms[1:] {
		m.work.Store(2 * int64(Busy))
	}
	for range octets {
		ms[1].write()
		ms[2].write()
	}
	for _, m := range ms[1:] {
		m.counts(t, octets-hurry, hurry)
	}
}

// After Quick the leader waits on the netpoller, for all.
func TestGroupNetpoller(t *testing.T) {
	ms, clock := group(t, 2)
	for k := range int64(5) {
		clock.Add(second) // so the leader, which looks every Quick, is on its way there
		if k%2 == 0 {
			time.Sleep(2 * Quick) // and mostly there
		}
		ms[1].write()
		ms[1].counts(t, 0, k+1)
		clock.Add(second)
		ms[0].write()
		ms[0].counts(t, k+1, 0)
	}
}

// A batch that failed brings the reader's own goroutine back.
func TestGroupFails(t *testing.T) {
	ms, _ := group(t, 2)
	ms[1].refuse.Store(true)
	ms[1].write()
	ms[1].counts(t, 1, 0)
}

// Whoever ends, the others go on.
func TestGroupEnd(t *testing.T) {
	ends := map[string]struct {
		end  func(*member)
		want error
	}{
		"closed":      {func(m *member) { m.Close() }, os.ErrClosed},
		"interrupted": {func(m *member) { m.Interrupt() }, os.ErrDeadlineExceeded},
	}
	for name, k := range ends {
		for _, first := range []int{0, 1} {
			for _, poller := range []bool{false, true} {
				ms, clock := group(t, 3)
				if poller {
					clock.Add(second)
					time.Sleep(2 * Quick)
				}
				m := ms[first]
				// Time passes, or the leader would not look up.
				stop := make(chan bool)
				go func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Millisecond):
							clock.Add(int64(Quick))
						}
					}
				}()
				k.end(m)
				select {
				case err := <-m.end:
					if !errors.Is(err, k.want) {
						t.Errorf("%s: %v, want %v", name, err, k.want)
					}
				case <-time.After(time.Minute):
					t.Fatalf("%s: reader %d goes on", name, first)
				}
				close(stop)
				for i, o := range ms {
					if i == first {
						continue
					}
					o.write()
					until(t, "another is read", func() bool { return o.own.Load()+o.served.Load() == 1 })
				}
				for _, o := range ms {
					o.Close()
				}
			}
		}
	}
}

// Whatever comes when, each octet is read once, and nobody reads beside another:
// the race detector looks at sum.
func TestGroupRandom(t *testing.T) {
	g := new(Group)
	var ms []*member
	procs := runtime.GOMAXPROCS(4)
	defer runtime.GOMAXPROCS(procs)
	for range 3 {
		m := &member{g: g, end: make(chan error, 1)}
		m.Wait, m.r, m.wr = pipe(t, Adaptive)
		if err := m.Join(g, func() bool { m.read(&m.served); return true }); err != nil {
			t.Fatal(err)
		}
		ms = append(ms, m)
	}
	for _, m := range ms {
		go m.run()
	}
	var wrote [3]int64
	for range 2000 {
		i := rand.N(3)
		for range 1 + rand.N(4) {
			ms[i].write()
			wrote[i]++
		}
		if d := rand.N(20); d < 4 {
			time.Sleep(time.Duration(d) * 300 * time.Microsecond)
		}
	}
	for i, m := range ms {
		until(t, "all is read", func() bool { return m.own.Load()+m.served.Load() == wrote[i] })
	}
	for i, m := range ms {
		m.Close()
		if <-m.end; m.sum != int(wrote[i]) {
			t.Errorf("reader %d: %d octets, want %d", i, m.sum, wrote[i])
		}
	}
}

func TestGroupOneProcessor(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	ms, clock := groupOf(t, 2)
	for k := range int64(3) {
		clock.Add(second)
		ms[1].write()
		ms[1].counts(t, 0, k+1)
	}
}

func TestGroupNoAlloc(t *testing.T) {
	w, r, wr := pipe(t, Adaptive)
	if err := w.Join(new(Group), func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	now := int64(1)
	w.now = func() int64 { now += second; return now }
	b := []byte{0}
	if n := testing.AllocsPerRun(100, func() {
		unix.Write(wr, b)
		w.Block()
		unix.Read(r, b)
		w.Got()
		w.group.leave(w)
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}
