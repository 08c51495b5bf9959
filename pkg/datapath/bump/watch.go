package bump

import (
	"bytes"
	"errors"
	"time"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The interface may be renamed, deleted, made anew, or get another MAC; the
// helper interfaces and their redirection may be deleted. An interface made
// anew has its chains from the beginning, one that is renamed keeps its guard, and
// without the helpers nothing passes. Each event makes us compare what is with what
// ought to be; a lost event costs nothing.

// retryEvery is the pause after a repair failed.
const retryEvery = 200 * time.Millisecond

// listen subscribes to the kernel's events.
func (b *Bump) listen() error {
	subscribe := func(netns, family int, groups ...uint32) error {
		c, err := nl.Dial(family, &nl.Config{NetNS: netns})
		if err != nil {
			return err
		}
		for _, g := range groups {
			if err := c.JoinGroup(g); err != nil {
				c.Close()
				return err
			}
		}
		b.watches = append(b.watches, c)
		return nil
	}
	if err := subscribe(0, unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_TC); err != nil {
		return err
	}
	if b.away != nil {
		if err := subscribe(int(b.away.ns.Fd()), unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_TC); err != nil {
			return err
		}
	} else if err := subscribe(0, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES); err != nil {
		return err
	}
	for _, c := range b.watches {
		b.watched.Add(1)
		go b.watch(c)
	}
	return nil
}

func (b *Bump) watch(c *nl.Conn) {
	defer b.watched.Done()
	for {
		msgs, err := c.Receive()
		if b.closed.Load() {
			return
		}
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil || b.concerns(msgs) {
			b.check(err != nil || harmsRules(msgs))
		}
	}
}

// concerns tells whether events are not our own doing.
func (b *Bump) concerns(msgs []nl.Message) bool {
	for _, m := range msgs {
		ours := m.Header.PID == b.guard.pid
		if b.away != nil {
			ours = ours || m.Header.PID == b.away.guard.pid
		} else {
			ours = ours || m.Header.PID == b.table.pid
		}
		if m.Header.PID == 0 || !ours {
			return true
		}
	}
	return false
}

// harmsRules: something was deleted that may have been ours.
func harmsRules(msgs []nl.Message) bool {
	for _, m := range msgs {
		if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_NETDEV && m.Data[0] != unix.NFPROTO_INET {
			continue
		}
		switch m.Header.Type & 0xff {
		case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE:
			return true
		}
	}
	return false
}

// check repairs what is not as it ought to be; rules tells that the table may be harmed.
func (b *Bump) check(rules bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed.Load() || b.pair == nil {
		return
	}
	if b.away != nil {
		b.note(b.repairAway())
		return
	}
	b.note(b.repair(rules))
}

// note tells of an error of a repair, and has it tried again. b.mu is held.
func (b *Bump) note(err error) {
	if err != nil && (b.failed == nil || b.failed.Error() != err.Error()) {
		b.tell(Event{What: "repair", Err: err})
	}
	b.failed = err
	if err != nil {
		b.retry = time.AfterFunc(retryEvery, func() { b.check(true) })
	}
}

func (b *Bump) repair(rules bool) error {
	was := b.link.Load()
	now, err := b.find(was)
	if err != nil {
		return err
	}
	if now == nil {
		if was.Index != 0 {
			gone := *was
			gone.Index = 0
			b.link.Store(&gone)
			b.copiers()
			b.tell(Event{What: "deleted", Moved: true})
		}
		return nil
	}
	b.link.Store(now)
	moved := now.Index != was.Index || now.Name != was.Name
	if now.Index != was.Index && !b.o.FailOpen {
		if err := b.guardable(now); err != nil {
			return err
		}
	}
	kxName, kuName := pairNames(b.ifname)
	kx, errX := b.handle.LinkByName(kxName)
	ku, errU := b.handle.LinkByName(kuName)
	broken := errX != nil || errU != nil || kx.Attrs().Index != b.pair.kx || ku.Attrs().Index != b.pair.ku
	if broken || b.failed != nil || kx.Attrs().Flags&ku.Attrs().Flags&1 == 0 || kx.Attrs().MTU != bigMTU || ku.Attrs().MTU != bigMTU ||
		!bytes.Equal(kx.Attrs().HardwareAddr, now.MAC) {
		if b.pair, err = b.repaired(now); err != nil {
			return err
		}
	}
	if moved {
		// First the rules: each moment counts.
		if err := b.set(b.State(High), b.State(Low)); err != nil {
			return err
		}
	}
	if moved || broken || b.failed != nil {
		if err := b.attachLink(); err != nil {
			return err
		}
		b.closeCopiers()
		if err := b.set(b.State(High), b.State(Low)); err != nil {
			return err
		}
	} else if err := b.pair.redirect(b.handle, now.Index); err != nil {
		return err
	} else if rules {
		_, all, err := b.table.exists()
		if err != nil {
			return err
		}
		if !all || !b.table.owned() {
			if err := b.set(b.State(High), b.State(Low)); err != nil {
				return err
			}
			if !all {
				b.tell(Event{What: "rules repaired"})
			}
		}
	}
	if err := b.keep(); err != nil {
		return err
	}
	switch {
	case was.Index == 0:
		b.tell(Event{What: "back", Moved: true})
	case now.Index != was.Index:
		b.tell(Event{What: "made anew", Moved: true})
	case moved:
		b.tell(Event{What: "renamed", Moved: true})
	case broken:
		b.tell(Event{What: "helper interfaces repaired"})
	case b.failed != nil:
		b.tell(Event{What: "repaired"})
	case !bytes.Equal(was.MAC, now.MAC):
		b.tell(Event{What: "mac changed"})
	}
	return nil
}

// repaired returns the pair made whole. A half that is there is worth nothing.
func (b *Bump) repaired(now *Link) (*pair, error) {
	p, err := openPair(b.handle, b.ifname, now.MAC, b.o.Offload, b.table.out)
	if err != nil {
		return b.pair, err
	}
	return p, nil
}

// find returns the interface: the one that was, or one of its name; nil: there is none.
func (b *Bump) find(was *Link) (*Link, error) {
	var missing netlink.LinkNotFoundError
	if was.Index != 0 {
		l, err := b.handle.LinkByIndex(was.Index)
		if err == nil {
			return linkOf(l), nil
		}
		if !errors.As(err, &missing) {
			return nil, err
		}
	}
	for _, name := range []string{was.Name, b.ifname} {
		l, err := b.handle.LinkByName(name)
		if err == nil && l.Attrs().EncapType == "ether" {
			return linkOf(l), nil
		}
		if err != nil && !errors.As(err, &missing) {
			return nil, err
		}
	}
	return nil, nil
}

func (b *Bump) closeCopiers() {
	for i := range b.sides {
		b.sides[i].closeCopies()
	}
}
