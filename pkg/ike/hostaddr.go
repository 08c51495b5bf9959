package ike

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// hostAddr is an address of this host and the index of its interface.
type hostAddr struct {
	netip.Addr
	index int
	// settled: it may be used, is not about to go away, and is not one of those
	// that change for the sake of privacy.
	settled bool
}

// HostAddrs are the addresses that a daemon with the addresses local may use now:
// those of them that the host has, in their order, then the others of the interface
// ifname ("": of the one that has the first of them), but for loopback, link-local
// and temporary ones, and those that are tentative or deprecated.
func HostAddrs(ifname string, local []netip.Addr) []netip.Addr {
	has, err := hostAddrs()
	if err != nil {
		return local
	}
	index := interfaceOf(ifname, local, has)
	var l []netip.Addr
	for _, a := range local {
		if slices.ContainsFunc(has, func(h hostAddr) bool { return h.Addr == a.WithZone("") }) {
			l = append(l, a)
		}
	}
	for _, h := range has {
		if h.index == index && h.settled && h.IsGlobalUnicast() && !slices.Contains(l, h.Addr) {
			l = append(l, h.Addr)
		}
	}
	return l
}

func interfaceOf(ifname string, local []netip.Addr, has []hostAddr) int {
	if ifname == "" {
		for _, h := range has {
			if len(local) > 0 && h.Addr == local[0].WithZone("") {
				return h.index
			}
		}
		return 0
	}
	i, err := net.InterfaceByName(ifname)
	if err != nil {
		return 0
	}
	return i.Index
}

// hostAddrs asks the kernel.
func hostAddrs() ([]hostAddr, error) {
	rib, err := syscall.NetlinkRIB(syscall.RTM_GETADDR, syscall.AF_UNSPEC)
	if err != nil {
		return nil, err
	}
	ms, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return nil, err
	}
	var l []hostAddr
	for _, m := range ms {
		if m.Header.Type != syscall.RTM_NEWADDR || len(m.Data) < unix.SizeofIfAddrmsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&m)
		if err != nil {
			continue
		}
		flags := uint32(m.Data[2])
		h := hostAddr{index: int(binary.NativeEndian.Uint32(m.Data[4:]))}
		for _, a := range attrs {
			switch a.Attr.Type {
			case unix.IFA_ADDRESS: // the peer's of a point-to-point link
				if !h.IsValid() {
					h.Addr, _ = netip.AddrFromSlice(a.Value)
				}
			case unix.IFA_LOCAL:
				h.Addr, _ = netip.AddrFromSlice(a.Value)
			case unix.IFA_FLAGS:
				if len(a.Value) >= 4 {
					flags = binary.NativeEndian.Uint32(a.Value)
				}
			}
		}
		h.settled = flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DEPRECATED|unix.IFA_F_DADFAILED) == 0 &&
			(h.Is4() || flags&unix.IFA_F_TEMPORARY == 0) // for IPv4 the bit says "secondary"
		if h.IsValid() {
			l = append(l, h)
		}
	}
	return l, nil
}

// WatchHost tells on the first channel that addresses of this host may have changed,
// and on the second that routes have, which leave by the interface that has index
// of() then (0: none). Both are closed when ctx ends.
func WatchHost(ctx context.Context, of func() int) (addrs, routes <-chan struct{}, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, os.NewSyscallError("netlink", err)
	}
	groups := uint32(unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, nil, os.NewSyscallError("netlink bind", err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	a, r := make(chan struct{}, 1), make(chan struct{}, 1)
	var once sync.Once
	end := func() { once.Do(func() { f.Close() }) }
	context.AfterFunc(ctx, end)
	go func() {
		defer close(a)
		defer close(r)
		defer end()
		buf := make([]byte, 1<<16)
		for {
			n, err := f.Read(buf)
			switch {
			case errors.Is(err, unix.ENOBUFS): // something was missed
				signal(a)
				signal(r)
				continue
			case err != nil:
				return
			}
			ms, err := syscall.ParseNetlinkMessage(buf[:n])
			if err != nil {
				continue
			}
			for _, m := range ms {
				switch m.Header.Type {
				case syscall.RTM_NEWADDR, syscall.RTM_DELADDR:
					signal(a)
				case syscall.RTM_NEWROUTE, syscall.RTM_DELROUTE:
					if i := outInterface(&m); i != 0 && len(r) == 0 && i == of() {
						signal(r)
					}
				}
			}
		}
	}()
	return a, r, nil
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// outInterface is where the route of m leaves, if it is of the main table.
func outInterface(m *syscall.NetlinkMessage) int {
	if len(m.Data) < unix.SizeofRtMsg || m.Data[4] != unix.RT_TABLE_MAIN {
		return 0
	}
	attrs, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return 0
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.RTA_OIF && len(a.Value) >= 4 {
			return int(binary.NativeEndian.Uint32(a.Value))
		}
	}
	return 0
}

// HostInterface is the index of the interface whose addresses HostAddrs gives; 0 if
// there is none.
func HostInterface(ifname string, local []netip.Addr) int {
	has, err := hostAddrs()
	if err != nil {
		return 0
	}
	return interfaceOf(ifname, local, has)
}
