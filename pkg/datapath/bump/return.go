package bump

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrLost: the interface is neither in its namespace nor in the host's.
var ErrLost = errors.New("the interface itself is gone, with its addresses and routes")

// comeBack moves the interface back, with what FACE has, from whatever step on a
// predecessor has left it at, and removes all else. It is done once there is no record.
// What the interface had and does not get back is in the file of LostPath then.
func comeBack(ifname string, h *netlink.Handle) error {
	rec, err := loadRecord(ifname)
	if err != nil {
		return err
	}
	if rec == nil {
		return removeNS(ifname) // one that nobody has left for
	}
	r, err := openRT(0)
	if err != nil {
		return err
	}
	defer r.c.Close()
	face, ku, err := findFace(h, ifname)
	if err != nil {
		return err
	}
	if face == nil && rec.Phase == leaving {
		if l, err := linkIfAny(h.LinkByIndex(rec.Had.Index)); l != nil || err != nil { // it has not left
			return errors.Join(err, removeNS(ifname))
		}
	}
	if face == nil && rec.Phase == outside {
		ns, err := openNS(ifname)
		if errors.Is(err, os.ErrNotExist) { // a record of another life: what there is now is not what has left
			if ku != nil {
				err = h.LinkDel(ku)
			} else {
				err = nil
			}
			return errors.Join(err, removeNS(ifname))
		}
		if err != nil {
			return err
		}
		ns.Close()
	}
	if face != nil && rec.Phase == outside { // else FACE may not have all yet
		if rec.Had, err = readSettings(h, r, face.Attrs().Index); err != nil {
			return err
		}
	}
	if err := rec.save(ifname, returning); err != nil {
		return err
	}
	if ku != nil {
		if err := h.LinkDel(ku); err != nil {
			return err
		}
	}
	if err := fetchNIC(ifname, rec); err != nil {
		return err
	}
	var lack error
	if rec.Back != "" {
		lack = fmt.Errorf("%s: the name is another interface's now; it is back as %s", rec.Had.Name, rec.Back)
		rec.Had.Name = rec.Back
	}
	nic, err := linkIfAny(h.LinkByName(rec.Had.Name))
	if err != nil {
		return err
	}
	if nic == nil {
		lack = ErrLost
	} else {
		lack = errors.Join(lack, rec.Had.applyAgain(h, r, nic.Attrs().Index))
	}
	if lack != nil {
		// It was the only copy.
		rec.Why = lack.Error()
		err := rec.save(ifname, returning)
		if err == nil {
			err = os.Rename(recordPath(ifname), LostPath(ifname))
		}
		if err != nil {
			return errors.Join(lack, err)
		}
		lack = lostError(ifname, lack)
	}
	return errors.Join(lack, removeNS(ifname))
}

// fetchNIC moves the interface to this namespace, if it is in its own: under a name of
// ours where its own is another's by now.
func fetchNIC(ifname string, rec *record) error {
	ns, err := openNS(ifname)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer here.Close()
	err = within(ns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := linkIfAny(h.LinkByName(rec.NIC))
		if l == nil {
			return err
		}
		r, err := openRT(0)
		if err != nil {
			return err
		}
		defer r.c.Close()
		if err := h.LinkSetDown(l); err != nil {
			return err
		}
		move := func(name string, index int) error {
			m := make([]byte, unix.SizeofIfInfomsg)
			binary.NativeEndian.PutUint32(m[4:], uint32(l.Attrs().Index))
			const newIndex = 49 // IFLA_NEW_IFINDEX, of Linux 5.13: others keep the index if it is free
			m = appendAttr(m, unix.IFLA_NET_NS_FD, binary.NativeEndian.AppendUint32(nil, uint32(here.Fd())))
			if index != 0 {
				m = appendAttr(m, newIndex, binary.NativeEndian.AppendUint32(nil, uint32(index)))
			}
			m = appendAttr(m, unix.IFLA_IFNAME, append([]byte(name), 0))
			return r.request(unix.RTM_NEWLINK, nl.HeaderFlags(0), m)
		}
		rec.Back = "" // of one that was killed before it could
		name, index := rec.Had.Name, rec.Had.Index
		for {
			err := move(name, index)
			switch {
			case errors.Is(err, unix.EEXIST) && rec.Back == "":
				name = hashName("mir", ifname)
				rec.Back = name
				if err := rec.save(ifname, returning); err != nil {
					return err
				}
			case errors.Is(err, unix.EBUSY) && index != 0:
				index = 0
			default:
				return err
			}
		}
	})
	if err != nil {
		return fmt.Errorf("%s: back from its namespace: %w", rec.NIC, err)
	}
	return nil
}

// LostPath is the file that tells what an interface had before it was away and did not
// get back, if there was such a return.
func LostPath(ifname string) string { return filepath.Join(Dir, ifname+".lost") }

// Lost is the error of that return, nil: there was none.
func Lost(ifname string) error {
	rec, err := readRecord(LostPath(ifname))
	if rec == nil {
		return err
	}
	return lostError(ifname, errors.New(rec.Why))
}

func lostError(ifname string, why error) error {
	return fmt.Errorf("%w (what it had is kept in %s)", why, LostPath(ifname))
}
