package bump

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// findFace finds FACE and KU, nil: there are none. KU without FACE is that of one that
// was moved to another namespace.
func findFace(h *netlink.Handle, ifname string) (face, ku netlink.Link, err error) {
	kx, name := pairNames(ifname)
	if ku, err = linkIfAny(h.LinkByName(name)); ku == nil || ku.Type() != "veth" {
		return nil, nil, err
	}
	if ku.Attrs().NetNsID >= 0 { // the index is one of that namespace
		return nil, ku, nil
	}
	if face, err = linkIfAny(h.LinkByIndex(ku.Attrs().ParentIndex)); face == nil || face.Attrs().Name == kx {
		return nil, nil, err
	}
	return face, ku, nil
}

// putFace makes FACE, if there is none, and gives it what the interface had.
func (b *Bump) putFace(face netlink.Link) error {
	had := b.away.rec.Had
	_, kuName := pairNames(b.ifname)
	if face == nil {
		if _, ku, err := findFace(b.handle, b.ifname); err != nil {
			return err
		} else if ku != nil {
			if err := b.handle.LinkDel(ku); err != nil {
				return err
			}
		}
		v := netlink.NewVeth(netlink.LinkAttrs{Name: had.Name, Index: had.Index, HardwareAddr: had.MAC, MTU: had.MTU, TxQLen: max(0, had.TxQLen)})
		v.PeerName, v.PeerMTU = kuName, bigMTU
		if err := b.handle.LinkAdd(v); err != nil {
			return vethError(had.Name, err)
		}
		var err error
		if face, err = b.handle.LinkByName(had.Name); err != nil {
			return err
		}
	}
	ku, err := b.handle.LinkByName(kuName)
	if err != nil {
		return err
	}
	if err := b.prepareKU(ku); err != nil { // before the first frame
		return err
	}
	r, err := openRT(0)
	if err != nil {
		return err
	}
	defer r.c.Close()
	b.away.unfinished = false // apply does all that can be had
	return had.applyAgain(b.handle, r, face.Attrs().Index)
}

// prepareKU sets it up, so that FACE has a carrier, and has the stack see nothing of it.
func (b *Bump) prepareKU(ku netlink.Link) error {
	f := filter{device: ku.Attrs().Index}
	if _, err := b.guard.at(spotKU, f); err != nil {
		return fmt.Errorf("tc: %w", kernelLacks("NET_SCH_INGRESS or NET_CLS_BPF", err))
	}
	b.guard.have[spotKU] = f
	if err := prepare(b.handle, ku, b.ifname); err != nil {
		return fmt.Errorf("%s: %w", ku.Attrs().Name, err)
	}
	return nil
}

// prepareFilter makes sure of the filter at KU.
func (b *Bump) prepareFilter() error {
	f := filter{device: b.pair.ku}
	done, err := b.guard.at(spotKU, f)
	if err == nil && done && b.guard.have[spotKU] == f {
		b.tell(Event{What: "second lock repaired"})
	}
	b.guard.have[spotKU] = f
	return err
}

// mirror does to the interface what the host did to FACE, and gives FACE its
// carrier. b.mu is held.
func (b *Bump) mirror() error {
	a := b.away
	face, err := b.handle.LinkByIndex(b.pair.kx)
	if err != nil {
		return err
	}
	ku, err := b.handle.LinkByIndex(b.pair.ku)
	if err != nil {
		return err
	}
	carrier := false
	if a.nic != 0 {
		nic, err := a.there.LinkByIndex(a.nic)
		if err != nil {
			return err
		}
		f, n := face.Attrs(), nic.Attrs()
		if f.MTU != n.MTU {
			err = errors.Join(err, a.there.LinkSetMTU(nic, f.MTU))
		}
		if !bytes.Equal(f.HardwareAddr, n.HardwareAddr) {
			err = errors.Join(err, a.there.LinkSetHardwareAddr(nic, f.HardwareAddr))
		}
		switch up := f.RawFlags&unix.IFF_UP != 0; {
		case up && n.RawFlags&unix.IFF_UP == 0:
			err = errors.Join(err, a.there.LinkSetUp(nic))
			if now, e := a.there.LinkByIndex(a.nic); e == nil {
				n = now.Attrs()
			}
		case !up && n.RawFlags&unix.IFF_UP != 0:
			err = errors.Join(err, a.there.LinkSetDown(nic))
		}
		if err != nil {
			return fmt.Errorf("%s in its namespace: %w", n.Name, err)
		}
		carrier = n.RawFlags&unix.IFF_LOWER_UP != 0
	}
	switch up := ku.Attrs().RawFlags&unix.IFF_UP != 0; {
	case carrier && !up:
		return b.handle.LinkSetUp(ku)
	case !carrier && up:
		return b.handle.LinkSetDown(ku)
	}
	return nil
}
