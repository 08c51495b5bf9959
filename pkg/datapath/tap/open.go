package tap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// aliasPrefix marks our devices in the kernel itself, where the mark lives and
// dies with the device.
const aliasPrefix = "missiu:"

// vnetHdrLen is the length of struct virtio_net_hdr without the buffer count.
const vnetHdrLen = HeadroomMin

// Open makes a TAP or TUN, or adopts the one that a killed instance left: that called
// o.Name, or without a name that of the interface o.For. One queue the kernel
// gives to one process only; with several (IFF_MULTI_QUEUE) a second process
// could attach and take frames away, so a device on which there is already one
// is refused.
func Open(o Options) (Device, error) {
	if o.Name == "" && o.For != "" {
		name, err := Find(o.For)
		if err != nil {
			return nil, err
		}
		o.Name = name
	}
	what := o.Name
	if what == "" {
		what = "new " + kindName(o.TUN)
	}
	d, err := open(o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return d, nil
}

func open(o Options) (*device, error) {
	if o.Offload == "" {
		o.Offload = OffloadAuto
	}
	if o.Offload != OffloadAuto && o.Offload != OffloadNone {
		return nil, fmt.Errorf("offload %q: want %s or %s", o.Offload, OffloadAuto, OffloadNone)
	}
	if len(o.Name) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("name longer than %d octets", unix.IFNAMSIZ-1)
	}
	if o.Queues < 0 || o.Queues > MaxQueues {
		return nil, fmt.Errorf("%d queues: want 1 to %d", o.Queues, MaxQueues)
	}
	adopted, err := adoptable(o)
	if err != nil {
		return nil, err
	}
	files, name, err := attachAny(o)
	if err != nil {
		return nil, explain(err)
	}
	d, err := newDevice(files, name, o)
	if err == nil {
		err = d.configure(o)
	}
	if err != nil {
		if d != nil {
			if !adopted {
				d.Persist(false)
			}
			d.Close()
		}
		return nil, err
	}
	return d, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// adoptable reports whether there is a device called o.Name, and an error if
// it is not one to take.
func adoptable(o Options) (bool, error) {
	if o.Name == "" {
		return false, nil
	}
	link, err := netlink.LinkByName(o.Name)
	if err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return false, nil
		}
		return false, err
	}
	a := link.Attrs().Alias
	if t, ok := link.(*netlink.Tuntap); !ok || t.Mode != o.mode() {
		if ok && o.For != "" && a == aliasPrefix+o.For {
			return false, fmt.Errorf("%w: an instance that was killed left it, a %s; stop, or start as before", ErrNotTAP, kindName(!o.TUN))
		}
		return false, ErrNotTAP
	}
	if link.(*netlink.Tuntap).Queues > 0 {
		return false, ErrInUse
	}
	if o.For != "" && strings.HasPrefix(a, aliasPrefix) && a != aliasPrefix+o.For {
		return false, fmt.Errorf("%w: it belongs to interface %s", ErrInUse, strings.TrimPrefix(a, aliasPrefix))
	}
	return true, nil
}

// attachAny is attach with as many queues as the kernel gives: a device that is
// there keeps the kind that it was made as.
func attachAny(o Options) ([]*os.File, string, error) {
	files, name, err := attach(o, o.Queues > 1)
	if err != nil && o.Queues > 1 {
		// A kernel, or a device of the other kind.
		one := o
		one.Queues = 1
		if f, n, err := attach(one, false); err == nil {
			return f, n, nil
		}
	}
	if isErrno(err, unix.EINVAL) && o.Queues <= 1 {
		return attach(o, true)
	}
	return files, name, err
}

// attach opens all queues of the device and makes it persistent. multi says of
// which kind it is: also one with IFF_MULTI_QUEUE may be opened once only.
func attach(o Options, multi bool) (files []*os.File, name string, err error) {
	n, fresh := max(o.Queues, 1), o.Name == ""
	defer func() {
		if err == nil {
			return
		}
		if fresh && len(files) > 0 {
			unix.IoctlSetInt(int(files[0].Fd()), unix.TUNSETPERSIST, 0)
		}
		closeAll(files)
		files = nil
	}()
	if o.Offload == OffloadNone {
		for range n {
			c := water.Config{DeviceType: water.TAP, PlatformSpecificParams: water.PlatformSpecificParams{Name: o.Name, Persist: true, MultiQueue: multi}}
			if o.TUN {
				c.DeviceType = water.TUN
			}
			i, err := water.New(c)
			if err != nil {
				return files, "", err
			}
			f, ok := i.ReadWriteCloser.(*os.File)
			if !ok {
				i.Close()
				return files, "", errors.New("water: not a file")
			}
			files = append(files, f)
			o.Name = i.Name()
		}
		return files, o.Name, nil
	}
	for range n { // one by one: the library gives only the first the name that the kernel chose
		t := &netlink.Tuntap{
			LinkAttrs: netlink.LinkAttrs{Name: o.Name},
			Mode:      o.mode(),
			Flags:     netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR,
			Queues:    1,
		}
		if multi {
			t.Flags |= netlink.TUNTAP_MULTI_QUEUE
		}
		if err := addTAP(t); err != nil {
			return files, "", err
		}
		files, o.Name = append(files, t.Fds[0]), t.Name
	}
	return files, o.Name, nil
}

// addTAP is the kernel's; tests are kernels without IFF_MULTI_QUEUE.
var addTAP = func(t *netlink.Tuntap) error { return netlink.LinkAdd(t) }

// isErrno: the libraries give some errno only as text.
func isErrno(err error, e syscall.Errno) bool {
	return err != nil && (errors.Is(err, e) || strings.HasSuffix(err.Error(), e.Error()))
}

func (o *Options) mode() netlink.TuntapMode {
	if o.TUN {
		return netlink.TUNTAP_MODE_TUN
	}
	return netlink.TUNTAP_MODE_TAP
}

func kindName(tun bool) string {
	if tun {
		return "tun"
	}
	return "tap"
}

// explain says what an operator can do about the errors of opening.
func explain(err error) error {
	is := func(e syscall.Errno) bool { return isErrno(err, e) }
	switch {
	case is(unix.ENOENT), is(unix.ENODEV), is(unix.ENXIO):
		return fmt.Errorf("/dev/net/tun: %w (load the kernel module tun)", unix.ENOENT)
	case is(unix.EPERM):
		return &PrivilegeError{Op: "TUNSETIFF", Capability: "CAP_NET_ADMIN", Err: unix.EPERM}
	case is(unix.EACCES):
		return &PrivilegeError{Op: "open /dev/net/tun", Capability: "read and write access, or CAP_DAC_OVERRIDE", Err: unix.EACCES}
	case is(unix.EBUSY):
		return ErrInUse
	case is(unix.EINVAL):
		return fmt.Errorf("%w as such a device", unix.EINVAL)
	}
	return err
}

// readQueue is how many frames wait for ReadBatch before the kernel drops them.
// A TAP does not hold its senders back, and its own 500 are gone within 2 ms of
// small packets, less than the reader may wait for a busy processor. Filled with
// super-frames it is 128 MB, which is why ReadBatch sheds those of UDP. A ping
// beside 4 to 64 streams of TCP waits no longer with 2000 than with 500. A queueing
// discipline as fq_codel could not help: the kernel's TAP drops when it is full,
// and never stops the queue above it.
const readQueue = 2000

func (d *device) configure(o Options) error {
	link, err := netlink.LinkByName(d.name)
	if err != nil {
		return err
	}
	d.index = link.Attrs().Index
	if t, ok := link.(*netlink.Tuntap); ok && t.Queues > len(d.queues) {
		return ErrInUse
	}
	if o.For != "" {
		if err := netlink.LinkSetAlias(link, aliasPrefix+o.For); err != nil {
			return fmt.Errorf("alias: %w", err)
		}
	}
	if o.TUN {
		d.mac = append(d.mac, o.MAC...)
		if err := noLinkLocal(d.name); err != nil {
			return err
		}
	} else if len(o.MAC) != 0 {
		if err := netlink.LinkSetHardwareAddr(link, o.MAC); err != nil {
			return fmt.Errorf("address %v: %w", o.MAC, err)
		}
		d.mac = append(d.mac, o.MAC...)
	} else {
		d.mac = append(d.mac, link.Attrs().HardwareAddr...)
	}
	d.mtu.Store(int32(link.Attrs().MTU))
	if o.MTU != 0 {
		if err := d.SetMTU(o.MTU); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetTxQLen(link, readQueue); err != nil {
		return fmt.Errorf("length of the queue: %w", err)
	}
	if err := loosenReversePath(d.name); err != nil {
		return err
	}
	d.probe()
	if o.Up {
		return netlink.LinkSetUp(link)
	}
	return nil
}

// loosenReversePath keeps reverse path filtering from dropping what missiu
// delivers: its source may be routed over the interface. missiu has judged the
// source already, so 0 is right. It counts only if "all" is 0 too, else 2 is
// the least strict; then a TAP without IPv4 address takes only packets whose
// source is routed to it.
func loosenReversePath(name string) error {
	const dir = "/proc/sys/net/ipv4/conf"
	all, err := os.ReadFile(filepath.Join(dir, "all/rp_filter"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	v := "0"
	if strings.TrimSpace(string(all)) != "0" {
		v = "2"
	}
	return errors.Join(err, os.WriteFile(filepath.Join(dir, name, "rp_filter"), []byte(v), 0))
}

// noLinkLocal keeps the kernel from making an IPv6 address for the TUN, and from
// looking for routers with it: there is no link on which it could mean anything.
func noLinkLocal(name string) error {
	err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, "addr_gen_mode"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // no IPv6
	}
	return err
}

// AddAddress gives the device with this index an address, which goes with the
// device, by DeleteAddress, or by hand. It makes no route to the prefix. One that
// is there is no error.
func AddAddress(index int, p netip.Prefix) error {
	a := address(index, p)
	a.Flags = unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_NODAD
	err := netlink.AddrAdd(link(index), a)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// DeleteAddress takes it away; ENOENT if it is not there.
func DeleteAddress(index int, p netip.Prefix) error {
	err := netlink.AddrDel(link(index), address(index, p))
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return unix.ENOENT
	}
	return err
}

func address(index int, p netip.Prefix) *netlink.Addr {
	n := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	return &netlink.Addr{IPNet: n, LinkIndex: index}
}

func link(index int) netlink.Link {
	return &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

// tuntaps returns the TAPs and TUNs that there are.
func tuntaps() ([]netlink.Link, error) {
	var links []netlink.Link
	var err error
	for range 3 { // a dump is cut short when the list changes meanwhile
		if links, err = netlink.LinkList(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(links, func(l netlink.Link) bool {
		t, ok := l.(*netlink.Tuntap)
		return !ok || t.Mode != netlink.TUNTAP_MODE_TAP && t.Mode != netlink.TUNTAP_MODE_TUN
	}), nil
}

// ours returns the devices that were made for the interface ifname, or the member of a Set.
func ours(ifname string) ([]netlink.Link, error) {
	links, err := tuntaps()
	return slices.DeleteFunc(links, func(l netlink.Link) bool { return l.Attrs().Alias != aliasPrefix+ifname }), err
}

// Find returns the name of the device that an earlier instance made for the
// interface ifname, "" if there is none.
func Find(ifname string) (string, error) {
	links, err := ours(ifname)
	if err != nil || len(links) == 0 {
		return "", err
	}
	return links[0].Attrs().Name, nil
}

// Remove deletes the devices that an earlier instance made for the interface
// ifname; it reports whether there was one.
func Remove(ifname string) (bool, error) {
	members, err := RemoveMembers(ifname)
	links, err2 := ours(ifname)
	err = errors.Join(err, err2)
	for _, l := range links {
		if e := netlink.LinkDel(l); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", l.Attrs().Name, e))
		}
	}
	return members || len(links) > 0, err
}
