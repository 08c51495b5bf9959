package bump

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
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

	in, out uint32 // marks: of nobody, of the process
	own     *courier
	fragID  atomic.Uint32 // identifications of fragments
}

// record is what a successor has to know.
type record struct {
	Phase string
	NIC   string // its name in the namespace
	Back  string // what it is called when it is back, if not as before: "" as yet
	Why   string // it is not what it was, in the file of LostPath
	Had   *settings
}

// Phases of the journey.
const (
	leaving   = "leaving"
	outside   = "outside"
	returning = "returning"
)

func awayDir(ifname string) string    { return filepath.Join(Dir, ifname+".ns") }
func pinPath(ifname string) string    { return filepath.Join(awayDir(ifname), "net") }
func recordPath(ifname string) string { return filepath.Join(awayDir(ifname), "record") }

// loadRecord returns nil if there is none.
func loadRecord(ifname string) (*record, error) { return readRecord(recordPath(ifname)) }

func readRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	rec := new(record)
	if err == nil {
		err = json.Unmarshal(data, rec)
	}
	if err == nil && rec.Had == nil {
		err = errors.New("incomplete")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return rec, nil
}

// save replaces the record, which is nobody else's to read: sysctls may hold a secret.
func (r *record) save(ifname, phase string) error {
	r.Phase = phase
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := recordPath(ifname)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// makeNS makes the namespace and binds it to its file.
func makeNS(ifname string) error {
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(awayDir(ifname), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.WriteFile(pinPath(ifname), nil, 0o600); err != nil {
		return err
	}
	err := aside(func() error {
		err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET))
		for _, s := range [][2]string{ // of a kernel without IPv6 there are fewer
			{"ipv4/ip_forward", "0"}, {"ipv4/conf/all/arp_ignore", "8"}, {"ipv6/conf/all/disable_ipv6", "1"}, {"ipv6/conf/default/disable_ipv6", "1"},
		} {
			if err == nil {
				if err = os.WriteFile(filepath.Join("/proc/sys/net", s[0]), []byte(s[1]), 0); errors.Is(err, os.ErrNotExist) {
					err = nil
				}
			}
		}
		if err == nil {
			err = os.NewSyscallError("mount", unix.Mount("/proc/thread-self/ns/net", pinPath(ifname), "", unix.MS_BIND, ""))
		}
		return err
	})
	if errors.Is(err, unix.EPERM) {
		err = &tap.PrivilegeError{Op: "private network namespace", Capability: "CAP_SYS_ADMIN", Err: err}
	}
	if err != nil {
		removeNS(ifname)
	}
	return err
}

// openNS opens the namespace; an error that is os.ErrNotExist: there is none.
func openNS(ifname string) (*os.File, error) {
	f, err := os.Open(pinPath(ifname))
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s: no namespace is bound to it: %w", pinPath(ifname), os.ErrNotExist)
	}
	return f, nil
}

// removeNS gives the namespace up, and all files.
func removeNS(ifname string) error {
	var err error
	for err == nil { // who was killed before there was a record may have left one more
		err = unix.Unmount(pinPath(ifname), unix.MNT_DETACH)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // nothing is bound
		err = nil
	}
	return errors.Join(os.NewSyscallError("umount", err), os.RemoveAll(awayDir(ifname)))
}

// within runs f in a namespace. Sockets that f makes stay there.
func within(ns *os.File, f func() error) error {
	return aside(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// aside runs f on a thread that ends with it. The process's first thread does not:
// its namespace is the one that /proc/self tells, and it would keep it.
func aside(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- aside(f) // on another one, for this is taken
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
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
	a.guard.on = 0
	return a.shut()
}

// shut makes sure that the namespace does nothing with frames.
func (a *away) shut() error {
	if a.guard.on != a.nic {
		if err := a.guard.discipline(a.nic, spotIn); err != nil {
			return fmt.Errorf("tc: %w", kernelLacks("NET_SCH_INGRESS", err))
		}
		a.guard.on = a.nic
	}
	for spot, f := range map[int]filter{spotIn: {device: a.nic}, spotOut: {device: a.nic, mark: a.out}} {
		if _, err := a.guard.at(spot, f); err != nil {
			return fmt.Errorf("tc: %w", kernelLacks("NET_CLS_BPF", err))
		}
		a.guard.have[spot] = f
	}
	return nil
}

// linkIfAny makes nil of a link that there is not.
func linkIfAny(l netlink.Link, err error) (netlink.Link, error) {
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return l, nil
}

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

func vethError(name string, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("veth: %w (load the kernel module veth)", err)
	}
	return fmt.Errorf("%s: %w", name, err)
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
	for _, k := range []struct {
		at *atomic.Pointer[socket]
		o  socketOptions
		ns *os.File
	}{
		{&high.in, socketOptions{index: ka.Index, filter: unmarked(a.in, a.out), wait: b.o.Wait}, nil},
		{&high.out, socketOptions{index: ka.Index}, nil},
		{&low.in, socketOptions{index: a.nic, filter: []bpf.Instruction{bpf.RetConstant{Val: whole}}, wait: b.o.Wait, promisc: true}, a.ns},
		{&low.out, socketOptions{index: a.nic, mark: a.out}, a.ns},
	} {
		if old := k.at.Load(); old != nil && old.index == k.o.index {
			continue
		}
		k.at.Swap(nil).close()
		if k.o.index == 0 {
			continue
		}
		var s *socket
		open := func() (err error) { s, err = packetSocket(k.o); return err }
		if k.ns != nil {
			err = within(k.ns, open)
		} else {
			err = open()
		}
		if err != nil {
			return err
		}
		k.at.Store(s)
	}
	if a.own == nil || a.own.sock.index != ka.Index {
		a.own.close()
		a.own = nil
		s, err := packetSocket(socketOptions{index: ka.Index, filter: marked(a.out), wait: b.o.Wait})
		if err != nil {
			return err
		}
		a.own = &courier{low, s, make(chan struct{})}
		go a.own.run()
	}
	high.takes(b.pair.super)
	low.takes(b.pair.super)
	high.wake()
	low.wake()
	return nil
}

// courier carries what the process itself sends.
type courier struct {
	to   *side
	sock *socket
	done chan struct{}
}

func (c *courier) run() {
	defer close(c.done)
	c.sock.drain(c.to.pass)
}

func (c *courier) close() {
	if c != nil {
		c.sock.close()
		<-c.done
	}
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

// Stay is the stay of an interface in its private namespace, under one process.
type Stay struct{ record os.FileInfo }

// StayOf returns the present one.
func StayOf(ifname string) Stay {
	s, _ := os.Stat(recordPath(ifname))
	return Stay{s}
}

// Over reports whether another process has taken over since, or the interface is back. It is
// not where the process has died on the way back.
func (s Stay) Over(ifname string) bool {
	now, err := os.Stat(recordPath(ifname))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	if s.record != nil && os.SameFile(s.record, now) && s.record.ModTime().Equal(now.ModTime()) {
		return false
	}
	rec, err := loadRecord(ifname)
	return err == nil && rec != nil && rec.Phase != returning
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

// tooLong: FACE would drop the frame silently, since it is longer than its MTU allows.
func (b *Bump) tooLong(f *tap.Frame) bool {
	return f.Offload.GSOType == tap.GSONone && f.Len > b.link.Load().MTU+etherLen+tagLen
}

// writeSplit writes an IP packet that is too long as fragments: one that was put together,
// or opened, on the way.
func (s *side) writeSplit(out *socket, f *tap.Frame) error {
	b := f.Buf[f.Off : f.Off+f.Len]
	n := etherLen
	for n+tagLen <= len(b) && tap.IsTag(binary.BigEndian.Uint16(b[n-2:])) {
		n += tagLen
	}
	var i packet.Info
	if !tap.FinishChecksum(b, f.Offload) || !packet.Decode(b[n:], &i) {
		return unix.EMSGSIZE
	}
	id := s.b.away.fragID.Add(1)
	err := frag.Split(b[n:n+i.Len], &i, s.b.link.Load().MTU, id, func(p []byte) error {
		buf := make([]byte, Room+n+len(p))
		copy(buf[Room:], b[:n])
		copy(buf[Room+n:], p)
		_, err := out.write([]tap.Frame{{Buf: buf, Off: Room, Len: n + len(p)}})
		return err
	})
	if errors.Is(err, frag.ErrMTU) || errors.Is(err, frag.ErrNotIP) {
		return unix.EMSGSIZE
	}
	return err
}
