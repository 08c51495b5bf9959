package wire

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxBatch is how many messages one system call moves.
const maxBatch = 64

// oobLen holds the control messages of a datagram: address, traffic class, segment size.
const oobLen = 128

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// mmsg is the argument of recvmmsg and sendmmsg, made once.
type mmsg struct {
	hdrs  [maxBatch]mmsghdr
	iovs  [maxBatch]unix.Iovec
	names [maxBatch]unix.RawSockaddrInet6 // or the shorter Inet4
	oobs  [maxBatch][oobLen]byte
}

// set makes message i carry b.
func (m *mmsg) set(i int, b []byte) {
	m.iovs[i].Base = unsafe.SliceData(b)
	m.iovs[i].SetLen(len(b))
	m.hdrs[i] = mmsghdr{}
	m.hdrs[i].hdr.Iov = &m.iovs[i]
	m.hdrs[i].hdr.SetIovlen(1)
}

// release forgets the caller's buffers.
func (m *mmsg) release(n int) {
	for i := range n {
		m.iovs[i].Base = nil
	}
}

// wantName and wantOOB make room for what recvmmsg tells about message i.
func (m *mmsg) wantName(i int) {
	m.hdrs[i].hdr.Name = (*byte)(unsafe.Pointer(&m.names[i]))
	m.hdrs[i].hdr.Namelen = unix.SizeofSockaddrInet6
}

func (m *mmsg) wantOOB(i int) {
	m.hdrs[i].hdr.Control = &m.oobs[i][0]
	m.hdrs[i].hdr.SetControllen(oobLen)
}

// setOOB gives message i the control messages m.oobs[i][:n].
func (m *mmsg) setOOB(i, n int) {
	if n == 0 {
		return
	}
	m.hdrs[i].hdr.Control = &m.oobs[i][0]
	m.hdrs[i].hdr.SetControllen(n)
}

// setName addresses message i. scope is the interface of link-local addresses.
func (m *mmsg) setName(i int, to netip.AddrPort, scope uint32) {
	h := &m.hdrs[i].hdr
	a := to.Addr()
	if a.Is4() {
		n := (*unix.RawSockaddrInet4)(unsafe.Pointer(&m.names[i]))
		*n = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.As4()}
		putPort(&n.Port, to.Port())
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(n)), unix.SizeofSockaddrInet4
		return
	}
	n := &m.names[i]
	*n = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: a.As16()}
	if a.IsLinkLocalUnicast() || a.IsMulticast() {
		n.Scope_id = scope
	}
	putPort(&n.Port, to.Port())
	h.Name, h.Namelen = (*byte)(unsafe.Pointer(n)), unix.SizeofSockaddrInet6
}

// name returns the sender of message i, without zone.
func (m *mmsg) name(i int) netip.AddrPort {
	n := &m.names[i]
	if n.Family == unix.AF_INET {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(n))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), getPort(&v4.Port))
	}
	return netip.AddrPortFrom(netip.AddrFrom16(n.Addr), getPort(&n.Port))
}

func putPort(p *uint16, v uint16) { binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(p))[:], v) }
func getPort(p *uint16) uint16    { return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(p))[:]) }

// recv and send move messages [from, to). Neither blocks, so the scheduler need
// not know of them.
func (m *mmsg) recv(fd uintptr, from, to int) (int, syscall.Errno) {
	return m.call(unix.SYS_RECVMMSG, fd, from, to, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
}

func (m *mmsg) send(fd uintptr, from, to int) (int, syscall.Errno) {
	return m.call(unix.SYS_SENDMMSG, fd, from, to, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

func (m *mmsg) call(trap, fd uintptr, from, to, flags int) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(&m.hdrs[from])), uintptr(to-from), uintptr(flags), 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// truncated reports whether message i did not fit its buffer.
func (m *mmsg) truncated(i int) bool { return m.hdrs[i].hdr.Flags&unix.MSG_TRUNC != 0 }
