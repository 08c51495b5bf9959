package wire

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// packetOut is an AF_PACKET socket that only transmits frames. It is used by one
// goroutine at a time.
type packetOut struct {
	fd       int
	bypasses bool // the queueing discipline and captures
	hdrs     [maxBatch]mmsghdr
	iovs     [maxBatch][2]unix.Iovec // header and packet of each
	headers  [maxBatch][etherLen]byte
}

func openPacketOut(w *Wire) (*packetOut, error) {
	// Protocol 0: it receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, privilege("AF_PACKET socket", "CAP_NET_RAW", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: w.index}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	if err := w.mark(fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	sendBuffer(fd)
	o := &packetOut{fd: fd}
	for i := range o.hdrs {
		o.iovs[i][0].Base = &o.headers[i][0]
		o.iovs[i][0].SetLen(etherLen)
		o.hdrs[i].hdr.Iov = &o.iovs[i][0]
		o.hdrs[i].hdr.SetIovlen(2)
	}
	return o, nil
}

// set makes frame i of the next send; packet is read then.
func (o *packetOut) set(i int, header *[etherLen]byte, packet []byte) {
	o.headers[i] = *header
	o.iovs[i][1].Base = unsafe.SliceData(packet)
	o.iovs[i][1].SetLen(len(packet))
}

// send sends the first n frames that were set, and returns how many left and
// why not the next. It never waits.
func (o *packetOut) send(n int) (int, syscall.Errno) {
	sent, errno := 0, syscall.Errno(0)
	for sent < n && errno == 0 {
		var k uintptr
		k, _, errno = syscall.RawSyscall6(unix.SYS_SENDMMSG, uintptr(o.fd), uintptr(unsafe.Pointer(&o.hdrs[sent])), uintptr(n-sent), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			sent += int(k)
		case unix.EINTR:
			errno = 0
		case unix.EAGAIN:
			errno = unix.ENOBUFS
		}
	}
	for i := range n {
		o.iovs[i][1].Base = nil
	}
	return sent, errno
}

// bypass chooses between PACKET_QDISC_BYPASS and the way of all packets. Kernels
// before 3.14 know the latter only.
func (o *packetOut) bypass(on bool) {
	if o.bypasses == on {
		return
	}
	v := 0
	if on {
		v = 1
	}
	unix.SetsockoptInt(o.fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, v)
	o.bypasses = on
}

func (o *packetOut) close() { unix.Close(o.fd) }
