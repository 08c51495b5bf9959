package wire

import (
	"errors"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
)

// subscription to changes of links and addresses. Their contents do not
// matter: each makes us look again, so a lost message costs nothing.
type subscription struct {
	links chan netlink.LinkUpdate
	addrs chan netlink.AddrUpdate
	done  chan struct{}
}

func (w *Wire) subscribe() (*subscription, error) {
	s := &subscription{make(chan netlink.LinkUpdate, 64), make(chan netlink.AddrUpdate, 64), make(chan struct{})}
	if err := netlink.LinkSubscribe(s.links, s.done); err != nil {
		return nil, err
	}
	if err := netlink.AddrSubscribe(s.addrs, s.done); err != nil {
		s.end()
		return nil, err
	}
	return s, nil
}

// end stops the library's goroutines, which close the channels last.
func (s *subscription) end() {
	close(s.done)
	for range s.links {
	}
	for range s.addrs {
	}
}

// resubscribeAfter is the pause after the kernel ended a subscription, which it
// does when we were too slow for it.
const resubscribeAfter = 100 * time.Millisecond

// follow keeps what we know of link and addresses true.
func (w *Wire) follow(s *subscription) {
	defer w.following.Done()
	defer close(w.changes)
	defer func() { s.end() }()
	for {
		// First for what changed before we were here.
		local, err := w.look()
		if lost := (*LinkError)(nil); errors.As(err, &lost) {
			w.lost.Store(lost)
			for _, r := range w.readers() {
				r.wake()
			}
			return
		}
		if err == nil {
			w.setLocal(local) // an error comes again with the next change
		}
		ended := false
		select {
		case <-w.stop:
			return
		case _, ok := <-s.links:
			ended = !ok
		case _, ok := <-s.addrs:
			ended = !ok
		}
		if !ended {
			continue
		}
		select {
		case <-w.stop:
			return
		case <-time.After(resubscribeAfter):
		}
		if n, err := w.subscribe(); err == nil {
			s.end()
			s = n
		}
	}
}

// look reads link and addresses and publishes the link.
func (w *Wire) look() (map[netip.Addr]struct{}, error) {
	link, err := w.handle.LinkByIndex(w.index)
	if err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil, &LinkError{w.name, "deleted"}
		}
		return nil, err
	}
	a := link.Attrs()
	if a.Name != w.name {
		return nil, &LinkError{w.name, "renamed to " + a.Name}
	}
	var list []netlink.Addr
	for range 3 { // a dump is cut short when addresses change meanwhile
		if list, err = w.handle.AddrList(nil, netlink.FAMILY_ALL); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	now := Link{Name: w.name, Index: w.index, MAC: a.HardwareAddr, MTU: a.MTU, Up: a.Flags&1 != 0}
	local := map[netip.Addr]struct{}{}
	for _, l := range list {
		addr, ok := netip.AddrFromSlice(l.IP)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		local[addr] = struct{}{}
		if l.LinkIndex == w.index {
			ones, _ := l.Mask.Size()
			now.Addrs = append(now.Addrs, netip.PrefixFrom(addr, ones))
		}
	}
	old := w.link.Swap(&now)
	if old != nil && !old.equal(&now) {
		w.pmtu.forgetKernel()
		w.sender.linkChanged(&now)
		select {
		case <-w.changes: // the older news
		default:
		}
		w.changes <- now // the only sender, so there is room
	}
	return local, nil
}

func (l *Link) equal(m *Link) bool {
	if l.MTU != m.MTU || l.Up != m.Up || string(l.MAC) != string(m.MAC) || len(l.Addrs) != len(m.Addrs) {
		return false
	}
	for i := range l.Addrs {
		if l.Addrs[i] != m.Addrs[i] {
			return false
		}
	}
	return true
}

// Link returns the present state of the interface.
func (w *Wire) Link() Link { return *w.link.Load() }

// Bare reports whether the interface has no address but a link-local one: that of
// a bridge's port is the bridge's. It does not allocate.
func (w *Wire) Bare() bool {
	for _, p := range w.link.Load().Addrs {
		if !p.Addr().IsLinkLocalUnicast() {
			return false
		}
	}
	return true
}

// Changes delivers the state of the interface after each change; of several
// that nobody took only the last. It is closed when the interface is lost
// (Err says why) or w is closed.
func (w *Wire) Changes() <-chan Link { return w.changes }

// Err returns the *LinkError once the interface is lost.
func (w *Wire) Err() error {
	if e := w.lost.Load(); e != nil {
		return e
	}
	return nil
}
