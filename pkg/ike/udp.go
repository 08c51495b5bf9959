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
	if local.Port() == 0 { // tests
		local = c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	return &udpConn{c, local}, nil
}

func (u *udpConn) Receive(b []byte) (n int, local, remote netip.AddrPort, err error) {
	n, remote, err = u.c.ReadFromUDPAddrPort(b)
	return n, u.local, netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port()), err
}

func (u *udpConn) Send(b []byte, _, remote netip.AddrPort) error {
	_, err := u.c.WriteToUDPAddrPort(b, remote)
	return err
}

func (u *udpConn) Close() error { return u.c.Close() }
