package tap

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
)

// Set is a TUN with further ones beside it that come and go, each with one address
// of this host. To its readers and writers it is one Device, that of the first:
//
//	ReadBatch    what any of them has
//	WriteBatch   packets to an address of a member into that, all else into the first
//
// so that the engine above has one pair of databases and one set of workers for
// all. Members have as many queues as the first; queue k of the Set is queue k of
// all. A member that somebody else deletes is the end of the Set, as the first is.
//
// All are persistent. Members bear their address in the alias, behind the
// interface's name, by which OpenSet finds those of a killed instance.
type Set struct {
	*device // the first
	o       Options
	queues  []*setQueue
	closed  atomic.Bool

	change  sync.Mutex // held while members come and go
	members atomic.Pointer[members]
	past    atomic.Uint64 // Lost.Full of members that are gone
	shedded atomic.Uint64 // Lost.Shed
	cuts    atomic.Uint64
}

// members are what a reader or writer works with; never changed.
type members struct {
	all []*device // the first, then the others
	of  map[netip.Addr]*device
	at  map[netip.Addr]netip.Prefix
}

// Member is one of a Set's devices but the first.
type Member struct {
	Address netip.Prefix
	Name    string
	Index   int
	MTU     int
}

// setQueue is queue k of all devices.
type setQueue struct {
	s    *Set
	k    int
	mu   sync.Mutex // of readers
	wait *linger.Wait
	any  int // epoll(7) over the files
	next int // whose turn it is
}

// OpenSet opens a TUN as Open does, and adopts the members that a killed instance
// left.
func OpenSet(o Options) (*Set, error) {
	o.TUN = true
	left, err := Find(o.For)
	if err != nil {
		return nil, err
	}
	first, err := Open(o)
	if err != nil {
		return nil, err
	}
	s := &Set{device: first.(*device), o: o}
	s.members.Store(&members{all: []*device{s.device}})
	if err := s.open(); err != nil {
		if left == "" {
			s.Persist(false)
		} // else all stay: they keep closed what they did
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Set) open() error {
	for k := range s.device.queues {
		q, err := newSetQueue(s, k)
		if err != nil {
			return err
		}
		s.queues = append(s.queues, q)
		if err := q.watch(s.device); err != nil {
			return err
		}
	}
	left, err := memberLinks(s.o.For)
	if err != nil {
		return err
	}
	for p := range left {
		if _, err := s.Add(p); err != nil {
			return err
		}
	}
	return nil
}

func newSetQueue(s *Set, k int) (*setQueue, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	q := &setQueue{s: s, k: k, any: fd}
	if q.wait, err = linger.New(s.o.Wait, fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return q, nil
}

// watch has the queue woken by d, until that is closed.
func (q *setQueue) watch(d *device) error {
	var err error
	e := d.queues[q.k].raw.Control(func(fd uintptr) {
		err = unix.EpollCtl(q.any, unix.EPOLL_CTL_ADD, int(fd), &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
	})
	return errors.Join(e, os.NewSyscallError("epoll_ctl", err))
}

// Add makes a member for the address of p, with p as its address and up, and
// returns its index. One that is there, or was left by a killed instance, is it.
func (s *Set) Add(p netip.Prefix) (index int, err error) {
	s.change.Lock()
	defer s.change.Unlock()
	m := s.members.Load()
	if d := m.of[p.Addr()]; d != nil {
		return d.index, nil
	}
	if s.closed.Load() {
		return 0, os.ErrClosed
	}
	o := s.o
	o.Name, o.For, o.MTU, o.Queues, o.Up = "", memberOf(s.o.For, p), s.MTU(), len(s.queues), true
	if o.Name, err = Find(o.For); err != nil {
		return 0, err
	}
	fresh := o.Name == ""
	dev, err := Open(o)
	if err != nil {
		return 0, err
	}
	d := dev.(*device)
	defer func() {
		if err != nil {
			if fresh {
				d.Persist(false)
			}
			d.Close()
		}
	}()
	if len(d.queues) != len(s.queues) {
		return 0, fmt.Errorf("%s: %d queues, want %d as %s has", d.name, len(d.queues), len(s.queues), s.name)
	}
	if err := AddAddress(d.index, p); err != nil {
		return 0, fmt.Errorf("%s: address %v: %w", d.name, p, err)
	}
	for _, q := range s.queues {
		if err := q.watch(d); err != nil {
			return 0, err
		}
	}
	n := &members{all: append(slices.Clone(m.all), d), of: map[netip.Addr]*device{p.Addr(): d}, at: map[netip.Addr]netip.Prefix{p.Addr(): p}}
	maps.Copy(n.of, m.of)
	maps.Copy(n.at, m.at)
	s.members.Store(n)
	return d.index, nil
}

// Drop deletes the member for the address; ENOENT if there is none.
func (s *Set) Drop(a netip.Addr) error {
	s.change.Lock()
	defer s.change.Unlock()
	m := s.members.Load()
	d := m.of[a]
	if d == nil {
		return unix.ENOENT
	}
	n := &members{of: maps.Clone(m.of), at: maps.Clone(m.at)}
	n.all = slices.DeleteFunc(slices.Clone(m.all), func(x *device) bool { return x == d })
	delete(n.of, a)
	delete(n.at, a)
	s.members.Store(n)
	lost := d.Lost()
	s.past.Add(lost.Full)
	s.shedded.Add(lost.Shed)
	s.cuts.Add(d.Cut())
	return errors.Join(d.Persist(false), d.Close())
}

// Members are the devices beside the first, by address.
func (s *Set) Members() []Member {
	m := s.members.Load()
	l := make([]Member, 0, len(m.of))
	for a, d := range m.of {
		l = append(l, Member{m.at[a], d.name, d.index, d.MTU()})
	}
	slices.SortFunc(l, func(a, b Member) int { return a.Address.Addr().Compare(b.Address.Addr()) })
	return l
}

// Queues implements Device.
func (s *Set) Queues() []Queue {
	qs := make([]Queue, len(s.queues))
	for i, q := range s.queues {
		qs[i] = q
	}
	return qs
}

// ReadBatch implements Device.
func (s *Set) ReadBatch(fs []Frame) (int, error) { return s.queues[0].ReadBatch(fs) }

// WriteBatch implements Device.
func (s *Set) WriteBatch(fs []Frame) (int, error) { return s.queues[0].WriteBatch(fs) }

// TryBatch, Await and Join are those of the first queue; see the device's.
func (s *Set) TryBatch(fs []Frame) (int, error) { return s.queues[0].TryBatch(fs) }

// Await implements what TryBatch needs.
func (s *Set) Await() error { return s.queues[0].Await() }

// Join does nothing, as in mode linger.Poll: a Set's reader waits for itself.
func (s *Set) Join(g *linger.Group, serve func() bool) error { return s.queues[0].Join(g, serve) }

// ReadBatch implements Queue. A batch is of one device; they take turns.
func (q *setQueue) ReadBatch(fs []Frame) (int, error) {
	if len(fs) == 0 {
		return 0, nil
	}
	for {
		if n, err := q.TryBatch(fs); n > 0 || err != nil {
			return n, err
		}
		if err := q.Await(); err != nil {
			return 0, err
		}
	}
}

// TryBatch is ReadBatch without waiting; 0 and nil if there is nothing.
func (q *setQueue) TryBatch(fs []Frame) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	all := q.s.members.Load().all
	for range all {
		q.next++
		d := all[q.next%len(all)]
		n, err := d.queues[q.k].take(fs)
		switch {
		case n > 0:
			q.wait.Got()
			return n, nil
		case err != nil && !q.s.dropped(d):
			return 0, err
		}
	}
	return 0, nil
}

// Await returns when TryBatch is worth a call.
func (q *setQueue) Await() error {
	if err := q.wait.Block(); err != nil {
		return q.s.failed(err)
	}
	return nil
}

// Join does nothing; see Set's.
func (q *setQueue) Join(*linger.Group, func() bool) error { return nil }

// dropped: d is no member any more, so that what goes wrong with it is nobody's loss.
func (s *Set) dropped(d *device) bool { return d.done.Load() && !s.closed.Load() }

// WriteBatch implements Queue.
func (q *setQueue) WriteBatch(fs []Frame) (int, error) {
	of := q.s.members.Load().of
	for done := 0; done < len(fs); {
		d := q.s.destined(of, &fs[done])
		run := 1
		for done+run < len(fs) && q.s.destined(of, &fs[done+run]) == d {
			run++
		}
		n, err := d.queues[q.k].WriteBatch(fs[done : done+run])
		if err != nil && q.s.dropped(d) {
			n, err = q.s.device.queues[q.k].WriteBatch(fs[done : done+run]) // nobody has the address now
		}
		if done += n; err != nil {
			return done, err
		}
	}
	return len(fs), nil
}

// destined is the device that has the address to which the packet in f goes.
func (s *Set) destined(of map[netip.Addr]*device, f *Frame) *device {
	if len(of) == 0 || f.Len < etherLen+20 || f.Off < 0 || f.Off+f.Len > len(f.Buf) {
		return s.device
	}
	b := f.Buf[f.Off+etherLen : f.Off+f.Len]
	var a netip.Addr
	switch {
	case b[0]>>4 == 4:
		a = netip.AddrFrom4([4]byte(b[16:20]))
	case b[0]>>4 == 6 && len(b) >= 40:
		a = netip.AddrFrom16([16]byte(b[24:40]))
	}
	if d := of[a]; d != nil {
		return d
	}
	return s.device
}

// SetMTU sets that of all.
func (s *Set) SetMTU(mtu int) error {
	s.change.Lock()
	defer s.change.Unlock()
	var errs []error
	for _, d := range s.members.Load().all {
		errs = append(errs, d.SetMTU(mtu))
	}
	return errors.Join(errs...)
}

// Super implements Device.
func (s *Set) Super() Super {
	all := s.members.Load().all
	u := all[0].Super()
	for _, d := range all[1:] {
		o := d.Super()
		u.TCP4, u.TCP6, u.UDP = u.TCP4 && o.TCP4, u.TCP6 && o.TCP6, u.UDP && o.UDP
	}
	return u
}

// Cut implements Device.
func (s *Set) Cut() uint64 {
	n := s.cuts.Load()
	for _, d := range s.members.Load().all {
		n += d.Cut()
	}
	return n
}

// Lost implements Device.
func (s *Set) Lost() Lost {
	l := Lost{s.past.Load(), s.shedded.Load()}
	for _, d := range s.members.Load().all {
		x := d.Lost()
		l.Full, l.Shed = l.Full+x.Full, l.Shed+x.Shed
	}
	return l
}

// Persist is for all.
func (s *Set) Persist(on bool) error {
	var errs []error
	for _, d := range s.members.Load().all {
		errs = append(errs, d.Persist(on))
	}
	return errors.Join(errs...)
}

// Close closes all; those that are persistent stay, with their addresses.
func (s *Set) Close() error {
	s.change.Lock()
	defer s.change.Unlock()
	if s.closed.Swap(true) {
		return nil
	}
	var errs []error
	for _, d := range s.members.Load().all {
		errs = append(errs, d.Close())
	}
	for _, q := range s.queues {
		errs = append(errs, q.wait.Close(), unix.Close(q.any))
	}
	return errors.Join(errs...)
}

// memberOf is what the alias of a member names: the interface and the address.
// Names of interfaces have no blanks.
func memberOf(ifname string, p netip.Prefix) string { return ifname + " " + p.String() }

// memberLinks are the members that there are for an interface.
func memberLinks(ifname string) (map[netip.Prefix]netlink.Link, error) {
	links, err := tuntaps()
	if err != nil {
		return nil, err
	}
	m := map[netip.Prefix]netlink.Link{}
	for _, l := range links {
		rest, ok := strings.CutPrefix(l.Attrs().Alias, aliasPrefix+ifname+" ")
		if p, err := netip.ParsePrefix(rest); ok && err == nil {
			m[p] = l
		}
	}
	return m, nil
}

// RemoveMembers deletes what is left of a killed instance's Set for the interface
// but the first device; it reports whether there was anything.
func RemoveMembers(ifname string) (bool, error) {
	links, err := memberLinks(ifname)
	for _, l := range links {
		if e := netlink.LinkDel(l); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", l.Attrs().Name, e))
		}
	}
	return len(links) > 0, err
}
