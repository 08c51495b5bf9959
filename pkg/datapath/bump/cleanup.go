package bump

import (
	"errors"
	"net"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Cleanup opens the way that a killed instance keeps closed, and removes what it
// left. It reports whether there was anything. The interface need not exist.
func Cleanup(ifname string) (bool, error) {
	b, any, err := remains(ifname)
	if err != nil {
		return any, err
	}
	defer b.hangUp()
	if b.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		if b.table != nil {
			err = errors.Join(err, b.table.remove())
		}
		return any, err
	}
	s, err := loadState(ifname)
	if err == nil {
		any, b.lro = true, s.LRO
	}
	kx, _ := pairNames(ifname)
	if _, err := b.handle.LinkByName(kx); err == nil {
		any = true
	}
	return any, b.undo()
}

// remains looks what a killed instance has left: a table, a guard, a namespace.
func remains(ifname string) (b *Bump, any bool, err error) {
	b = &Bump{ifname: ifname}
	if b.table, err = openTable(ifname, false); err != nil && !errors.Is(err, ErrNoEgress) {
		return nil, false, err
	}
	if b.guard, err = openGuard(ifname, 0, 0, 0); err != nil {
		b.hangUp()
		return nil, false, err
	}
	if b.table != nil {
		any, _, err = b.table.exists()
	}
	for _, nic := range b.guarded() {
		ours, _, e := b.guard.of(nic)
		any, err = any || ours, errors.Join(err, e)
	}
	if _, e := os.Stat(awayDir(ifname)); e == nil {
		any = true
	}
	if err != nil {
		b.hangUp()
		return nil, any, err
	}
	return b, any, nil
}

// Left reports whether a killed instance keeps an interface severed.
func Left(ifname string) bool {
	b, any, err := remains(ifname)
	if err != nil {
		return false
	}
	b.hangUp()
	return any
}

// undo opens the way, first of all.
func (b *Bump) undo() error {
	var err error
	if _, e := os.Stat(awayDir(b.ifname)); e == nil && b.handle != nil {
		err = comeBack(b.ifname, b.handle)
	}
	if b.guard != nil {
		for _, nic := range b.guarded() {
			err = errors.Join(err, b.guard.leave(nic))
		}
	}
	if b.table != nil {
		err = errors.Join(err, b.table.remove())
	}
	if b.handle != nil {
		_, err2 := removePair(b.handle, b.ifname)
		err = errors.Join(err, err2, removeTrial(b.handle, b.ifname))
	}
	if b.lro != "" {
		err = errors.Join(err, lroOn(b.lro))
	}
	os.Remove(statePath(b.ifname))
	return err
}

// guarded are the indexes of interfaces that may have our guard.
func (b *Bump) guarded() (is []int) {
	if l := b.link.Load(); l != nil && l.Index != 0 {
		is = append(is, l.Index)
	}
	if s, err := loadState(b.ifname); err == nil && s.Guarded != 0 {
		is = append(is, s.Guarded)
		if b.guard.made == 0 {
			b.guard.made = s.Clsact
		}
	}
	if i, err := net.InterfaceByName(b.ifname); err == nil {
		is = append(is, i.Index)
	}
	slices.Sort(is)
	return slices.Compact(is)
}

func (b *Bump) hangUp() {
	b.away.hangUp()
	if b.guard != nil {
		b.guard.c.Close()
	}
	if b.table != nil {
		b.table.c.Close()
	}
	if b.handle != nil {
		b.handle.Close()
	}
}
