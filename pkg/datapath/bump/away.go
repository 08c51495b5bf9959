package bump

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Without the egress hook the interface goes away, into a network namespace where
// there is nobody but our packet sockets, and a veth takes its place: FACE, with its name,
// index, addresses, routes and what else is in settings.
//
//	      the host's namespace               |   private namespace
//	stack <--> FACE ==== KU <--AF_PACKET--> process <--AF_PACKET--> NIC <--> wire
//
// There is no other way between both than the process: whatever happens to it, to
// rules or to names, nothing passes by itself. So the sides' states are the process's
// own doing: frames of a side that is not active it writes to the other one as they came.
//
// FACE and KU are in one namespace because a frame that changes it loses its mark,
// by which we know what the process itself sends. A filter of tc drops at KU
// what the sockets have seen; two at the interface drop what comes in, and what does not
// bear the mark of the process, of devices that stood on it before.
//
// What the host does with FACE (MAC, MTU, up, down) is done to the interface, whose carrier
// is FACE's. The namespace is bound to a file, next to a record of what the
// host had given the interface and of how far the journey is, so that whoever is
// killed at any moment can be followed by another: see Open and Cleanup.
type away struct {
	ns    *os.File        // the private namespace
	there *netlink.Handle // in it
	guard *guard          // in it
	nic   int             // the interface's index there; 0: it is gone
	rec   *record

	deleted    bool // FACE was, and it has not been told that it is back
	unfinished bool // FACE has not what the interface had

	in, out uint32        // marks: of nobody, of the process
	own     *reader       // carries what the process itself sends
	fragID  atomic.Uint32 // identifications of fragments
}

// ErrCannotLeave: the interface cannot be moved to a private namespace either.
var ErrCannotLeave = errors.New("cannot be moved to a private network namespace")

// movable finds out whether the interface can be away without a loss to the host,
// and whether the kernel has what it takes. It leaves nothing changed.
func (b *Bump) movable(l netlink.Link) error {
	a := l.Attrs()
	if l.Type() == "veth" && a.NetNsID < 0 {
		p, err := linkIfAny(b.handle.LinkByIndex(a.ParentIndex))
		if err != nil {
			return err
		}
		if p != nil && strings.HasPrefix(p.Attrs().Alias, aliasPrefix) { // FACE of another
			return errForeign
		}
	}
	links, err := b.handle.LinkList()
	if err != nil {
		return err
	}
	for _, o := range links {
		oa := o.Attrs()
		v, vxlan := o.(*netlink.Vxlan)
		switch {
		case oa.Index == a.MasterIndex && o.Type() != "bridge" && o.Type() != "vrf":
			return fmt.Errorf("%w: it belongs to %s (%s)", ErrCannotLeave, oa.Name, o.Type())
		case oa.ParentIndex == a.Index && oa.NetNsID < 0 && o.Type() != "veth":
			return fmt.Errorf("%w: %s (%s) stands on it, and would stay on it", ErrCannotLeave, oa.Name, o.Type())
		case vxlan && v.VtepDevIndex == a.Index: // which IFLA_LINK does not tell
			return fmt.Errorf("%w: %s (%s) stands on it, and would be deleted", ErrCannotLeave, oa.Name, o.Type())
		}
	}
	qs, err := b.guard.dump(unix.RTM_GETQDISC, a.Index, 0)
	if err != nil {
		return err
	}
	for _, q := range qs {
		if q.handle != 0 { // the kernel's own have none
			return fmt.Errorf("%w: its queueing discipline %s would be lost", ErrCannotLeave, q.kind)
		}
	}
	// A pair to try.
	if err := removeTrial(b.handle, b.ifname); err != nil { // of one that was killed
		return err
	}
	name := hashName("mip", b.ifname)
	v := netlink.NewVeth(netlink.LinkAttrs{Name: name, TxQLen: 1000})
	v.PeerName = hashName("miq", b.ifname)
	if err := b.handle.LinkAdd(v); err != nil {
		return vethError(name, err)
	}
	defer b.handle.LinkDel(v)
	p, err := b.handle.LinkByName(name)
	if err != nil {
		return err
	}
	if _, err := b.guard.at(spotKU, filter{device: p.Attrs().Index}); err != nil {
		return fmt.Errorf("tc: %w", kernelLacks("NET_SCH_INGRESS or NET_CLS_BPF", err))
	}
	return nil
}

// removeTrial removes the pair of movable, if there is one.
func removeTrial(h *netlink.Handle, ifname string) error {
	l, err := linkIfAny(h.LinkByName(hashName("mip", ifname)))
	if l == nil || l.Type() != "veth" {
		return err
	}
	return h.LinkDel(l)
}

// openAway has the interface leave, or finds where it is.
func (b *Bump) openAway() error {
	var err error
	if b.guard, err = openGuard(b.ifname, 0, 0, 0); err != nil {
		return err
	}
	rec, err := loadRecord(b.ifname)
	if err != nil {
		return err
	}
	if rec != nil && rec.Phase == returning {
		if err := comeBack(b.ifname, b.handle); err != nil {
			return err
		}
		rec, b.adopted = nil, false
	}
	a := &away{rec: rec}
	for a.in == a.out || a.in == 0 || a.out == 0 {
		a.in, a.out = randomMark(), randomMark()
	}
	high, low := Closed, Closed
	if rec != nil {
		high, low = Active, Active
		if s, err := loadState(b.ifname); err == nil {
			high, low = s.High, s.Low
		}
	} else if a.rec, err = b.departure(); err != nil {
		return err
	}
	b.away = a
	if err := b.depart(); err != nil {
		return err
	}
	if err := b.listen(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.attachAway(); err != nil {
		return err
	}
	if err := a.rec.save(b.ifname, outside); err != nil {
		return err
	}
	if err := b.mirror(); err != nil {
		return err
	}
	return b.set(high, low)
}

// departure is the record of an interface that is still there, with a namespace
// that waits for it.
func (b *Bump) departure() (*record, error) {
	l, err := b.handle.LinkByName(b.ifname)
	if err != nil {
		return nil, err
	}
	if err := b.movable(l); err != nil {
		return nil, err
	}
	r, err := openRT(0)
	if err != nil {
		return nil, err
	}
	defer r.c.Close()
	had, err := readSettings(b.handle, r, l.Attrs().Index)
	if err != nil {
		return nil, err
	}
	if err := makeNS(b.ifname); err != nil {
		return nil, err
	}
	rec := &record{NIC: b.ifname, Had: had}
	if err := rec.save(b.ifname, leaving); err != nil {
		return nil, errors.Join(err, removeNS(b.ifname))
	}
	return rec, nil
}

// depart moves the interface and puts FACE in its place, as far as that is not so yet.
func (b *Bump) depart() error {
	a, err := b.away, error(nil)
	if a.ns, err = openNS(b.ifname); err != nil {
		return err
	}
	if err := within(a.ns, func() (err error) { a.there, err = netlink.NewHandle(unix.NETLINK_ROUTE); return err }); err != nil {
		return err
	}
	face, _, err := findFace(b.handle, b.ifname)
	if err != nil {
		return err
	}
	nic, err := linkIfAny(a.there.LinkByName(a.rec.NIC))
	if err != nil {
		return err
	}
	if nic == nil && face == nil {
		l, err := b.handle.LinkByIndex(a.rec.Had.Index)
		if err != nil {
			return err
		}
		if err := b.handle.LinkSetNsFd(l, int(a.ns.Fd())); errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("%w: its driver ties it to the host's (NETNS_LOCAL): %w", ErrCannotLeave, err)
		} else if err != nil {
			return fmt.Errorf("%w: %w", ErrCannotLeave, err)
		}
		if nic, err = a.there.LinkByName(a.rec.NIC); err != nil {
			return err
		}
	}
	if a.guard, err = openGuard(b.ifname, 0, a.out, int(a.ns.Fd())); err != nil {
		return err
	}
	if nic != nil {
		if err := a.arrived(nic); err != nil {
			return err
		}
	}
	if face == nil || a.rec.Phase == leaving {
		return b.putFace(face)
	}
	return nil
}

// arrived guards the interface in its namespace.
func (a *away) arrived(nic netlink.Link) error {
	a.nic = nic.Attrs().Index
	a.guard.on[0] = 0
	return a.shut()
}

// shut makes sure that the namespace does nothing with frames.
func (a *away) shut() error {
	if a.guard.on[0] != a.nic {
		if err := a.guard.discipline(a.nic, spotIn); err != nil {
			return fmt.Errorf("tc: %w", kernelLacks("NET_SCH_INGRESS", err))
		}
		a.guard.on[0] = a.nic
	}
	for spot, f := range map[int]filter{spotIn: {device: a.nic}, spotOut: {device: a.nic, mark: a.out}} {
		if _, err := a.guard.at(spot, f); err != nil {
			return fmt.Errorf("tc: %w", kernelLacks("NET_CLS_BPF", err))
		}
		a.guard.have[spot] = f
	}
	return nil
}

// attachAway opens the sockets for the present interfaces, as far as there are none. b.mu is held.
func (b *Bump) attachAway() error {
	a := b.away
	face, ku, err := findFace(b.handle, b.ifname)
	if err != nil {
		return err
	}
	if face == nil {
		return fmt.Errorf("%s: %w", a.rec.Had.Name, unix.ENODEV)
	}
	b.link.Store(linkOf(face))
	fa, ka := face.Attrs(), ku.Attrs()
	if b.pair == nil || b.pair.kx != fa.Index || b.pair.ku != ka.Index {
		if err := b.prepareKU(ku); err != nil {
			return err
		}
		// What is sent to try comes to nobody: FACE is down, or the readers do not want it.
		at := fa.Index
		if fa.RawFlags&unix.IFF_UP == 0 {
			at = ka.Index
		}
		super, err := offloads(fa.Name, at, b.o.Offload, a.in)
		if err != nil {
			return err
		}
		b.pair = &pair{kx: fa.Index, ku: ka.Index, super: super}
	}
	high, low := &b.sides[High], &b.sides[Low]
	if err := b.exchange([]socketAt{
		{&high.in, socketOptions{index: ka.Index, filter: unmarked(a.in, a.out), wait: b.o.Wait}, nil},
		{&high.out, socketOptions{index: ka.Index}, nil},
		{&low.in, socketOptions{index: a.nic, filter: []bpf.Instruction{bpf.RetConstant{Val: whole}}, wait: b.o.Wait, promisc: true}, a.ns},
		{&low.out, socketOptions{index: a.nic, mark: a.out}, a.ns},
	}); err != nil {
		return err
	}
	if a.own != nil && a.own.sock.index == ka.Index {
		return nil
	}
	a.own.close()
	a.own = nil
	s, err := packetSocket(socketOptions{index: ka.Index, filter: marked(a.out), wait: b.o.Wait})
	if err != nil {
		return err
	}
	a.own = startReader(s, low.pass)
	return nil
}

// repairAway is repair for an interface that is away.
func (b *Bump) repairAway() error {
	a, was := b.away, b.link.Load()
	face, ku, err := findFace(b.handle, b.ifname)
	if err != nil {
		return err
	}
	if face == nil {
		a.deleted, a.unfinished = true, true
		if was.Index != 0 {
			none := *was
			none.Index = 0
			b.link.Store(&none)
			b.tell(Event{What: "deleted", Moved: true})
		}
	}
	anew := a.unfinished
	var lack error
	if anew {
		if lack = b.putFace(face); a.unfinished {
			return lack
		}
	} else if ku.Attrs().MTU != bigMTU {
		if err := b.handle.LinkSetMTU(ku, bigMTU); err != nil {
			return err
		}
	}
	nic, err := linkIfAny(a.there.LinkByName(a.rec.NIC))
	if err != nil {
		return err
	}
	lost, back := nic == nil && a.nic != 0, nic != nil && nic.Attrs().Index != a.nic
	switch {
	case lost:
		a.nic = 0
	case back:
		if err := a.arrived(nic); err != nil {
			return err
		}
	case nic != nil:
		if err := a.shut(); err != nil {
			return err
		}
	}
	if !anew {
		if err := b.prepareFilter(); err != nil {
			return err
		}
	}
	if err := b.attachAway(); err != nil {
		return errors.Join(lack, err)
	}
	if err := b.mirror(); err != nil {
		return errors.Join(lack, err)
	}
	now := b.link.Load()
	switch {
	case a.deleted:
		a.deleted = false
		b.tell(Event{What: "back", Moved: true})
	case lost:
		b.tell(Event{What: "gone from its namespace"})
	case back:
		b.tell(Event{What: "back in its namespace"})
	case now.Name != was.Name:
		b.tell(Event{What: "renamed", Moved: true})
	case b.failed != nil:
		b.tell(Event{What: "repaired"})
	case !bytes.Equal(was.MAC, now.MAC):
		b.tell(Event{What: "mac changed"})
	}
	return lack
}

// hangUp closes what leads to the namespace.
func (a *away) hangUp() {
	if a == nil {
		return
	}
	if a.guard != nil {
		a.guard.c.Close()
	}
	if a.there != nil {
		a.there.Close()
	}
	if a.ns != nil {
		a.ns.Close()
	}
}
