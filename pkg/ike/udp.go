package ike

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"context"

	"golang.org/x/sys/unix"
)

// udpConn is a UDP socket bound to one address of ours.
type udpConn struct {
	c     *net.UDPConn
	local netip.AddrPort
}

// ListenUDP opens the IKE port of an address. Large messages are fragmented by
// IP (RFC 7296, 2): path MTU discovery would lose them.
func ListenUDP(local netip.AddrPort) (Conn, error) {
	network := "udp4"
	if local.Addr().Is6() {
		network = "udp6"
	}
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		cerr := rc.Control(func(fd uintptr) {
			if network == "udp4" {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT)
			}
		})
		return errors.Join(cerr, err)
	}}
	pc, err := lc.ListenPacket(context.Background(), network, local.String())
	if err != nil {
		var errno syscall.Errno
		if errors.As(err, &errno) {
			err = errno
		}
		return nil, fmt.Errorf("udp %v: %w", local, err)
	}
	c := pc.(*net.UDPConn)
	if rc, err := c.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer) // without privilege: what may be
			}
		})
	}
	if local.Port() == 0 { // tests
		local = c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	return &udpConn{c, local}, nil
}

func (u *udpConn) Receive(b []byte) (n int, local, remote netip.AddrPort, err error) {
	n, remote, err = u.c.ReadFromUDPAddrPort(b)
	return n, u.local, netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port()), err
}

// Send never waits. Answers to forged neighbours stay in the send buffer for as
// long as nobody answers ARP for them; whoever waited for room could no longer
// serve anybody. What does not fit is lost, and the peer asks again.
func (u *udpConn) Send(b []byte, _, remote netip.AddrPort) error {
	rc, err := u.c.SyscallConn()
	if err != nil {
		return err
	}
	var to unix.Sockaddr
	if a := remote.Addr().Unmap(); u.local.Addr().Is4() {
		if !a.Is4() {
			return fmt.Errorf("udp %v: to %v", u.local, remote)
		}
		to = &unix.SockaddrInet4{Port: int(remote.Port()), Addr: a.As4()}
	} else {
		sa := &unix.SockaddrInet6{Port: int(remote.Port()), Addr: remote.Addr().As16()}
		if z := remote.Addr().Zone(); z != "" {
			i, err := net.InterfaceByName(z)
			if err != nil {
				return err
			}
			sa.ZoneId = uint32(i.Index)
		}
		to = sa
	}
	var serr error
	err = rc.Write(func(fd uintptr) bool {
		serr = unix.Sendto(int(fd), b, unix.MSG_DONTWAIT, to)
		return true
	})
	return errors.Join(err, serr)
}

// sendBuffer is room for the answers to thousands of forged neighbours.
const sendBuffer = 16 << 20

func (u *udpConn) Close() error { return u.c.Close() }
