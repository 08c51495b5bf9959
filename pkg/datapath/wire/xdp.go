package wire

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// xdpFrames is the size of the rings. The socket has no queue behind them,
	// so it bounds how long a packet waits for a slow device.
	xdpFrames = 512
	// xdpQueues is how many queues are tried for one that nobody else uses.
	xdpQueues = 8
	// xdpPatience is how often in a row a wake-up may move nothing: at the
	// least, the 32 packets that a kernel moves at a time, even if it does not
	// show it, empty the rings within it.
	xdpPatience = xdpFrames/32 + 4
)

// xdp is an AF_XDP socket that only transmits, in copy mode: there is no
// program on the interface, and what arrives there does not change. Frames lie
// in memory shared with the kernel; their numbers go round:
//
//	free -> (put) -> tx ring -> kernel, in our system call -> completion ring -> (reap) -> free
//
// Packets go straight to the driver: no queueing discipline, no packet filter,
// no capture sees them. It is used by one goroutine at a time.
type xdp struct {
	fd    int
	maps  [][]byte
	umem  []byte
	chunk int // octets of a frame
	tx    xdpRing
	done  xdpRing
	free  []uint32 // numbers of frames
	ready uint32   // tx producer as of the last put; the kernel knows an older one until kick

	dropped uint64 // by the driver, after it had taken them from the ring

	wake func(fd int) syscall.Errno // has the kernel send; wakeXDP but in tests
}

// xdpRing is one half of struct xdp_ring: indices run freely, slots are index&mask.
type xdpRing struct {
	producer *uint32
	consumer *uint32
	flags    *uint32
	mask     uint32
	slots    unsafe.Pointer
}

// openXDP makes the socket for frames of up to size octets. The error says what
// the kernel or the device lacks.
func openXDP(index, size int) (*xdp, error) {
	x := &xdp{chunk: 2048, wake: wakeXDP}
	if size > x.chunk {
		x.chunk = 4096
	}
	if size > min(x.chunk, os.Getpagesize()) {
		return nil, fmt.Errorf("frames of %d octets: %w", size, unix.EMSGSIZE)
	}
	var err error
	if x.fd, err = unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("AF_XDP socket", err)
	}
	if err := x.setup(index); err != nil {
		x.close()
		return nil, err
	}
	return x, nil
}

func (x *xdp) setup(index int) error {
	var err error
	if x.umem, err = x.mmap(-1, 0, xdpFrames*x.chunk, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err != nil {
		return err
	}
	for i := range uint32(xdpFrames) {
		x.free = append(x.free, i)
	}
	reg := unix.XDPUmemReg{Addr: uint64(uintptr(unsafe.Pointer(&x.umem[0]))), Len: uint64(len(x.umem)), Size: uint32(x.chunk)}
	// The metadata length is of newer kernels; older ones take the shorter structure.
	if err := x.setsockopt(unix.XDP_UMEM_REG, unsafe.Pointer(&reg), unsafe.Offsetof(reg.Flags)+4); err != nil {
		return err
	}
	for _, r := range []struct {
		opt int
		n   uint32
	}{
		{unix.XDP_UMEM_FILL_RING, 1}, // asked for, though nothing is received
		{unix.XDP_UMEM_COMPLETION_RING, xdpFrames},
		{unix.XDP_TX_RING, xdpFrames},
	} {
		if err := x.setsockopt(r.opt, unsafe.Pointer(&r.n), unsafe.Sizeof(r.n)); err != nil {
			return err
		}
	}
	var off unix.XDPMmapOffsets
	n := uint32(unsafe.Sizeof(off))
	if _, _, errno := syscall.Syscall6(unix.SYS_GETSOCKOPT, uintptr(x.fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS, uintptr(unsafe.Pointer(&off)), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return os.NewSyscallError("XDP_MMAP_OFFSETS", errno)
	}
	if n != uint32(unsafe.Sizeof(off)) { // before Linux 5.4
		return fmt.Errorf("XDP_MMAP_OFFSETS of %d octets: %w", n, unix.EOPNOTSUPP)
	}
	if x.tx, err = x.ring(&off.Tx, unix.XDP_PGOFF_TX_RING, int(unsafe.Sizeof(unix.XDPDesc{}))); err != nil {
		return err
	}
	if x.done, err = x.ring(&off.Cr, unix.XDP_UMEM_PGOFF_COMPLETION_RING, 8); err != nil {
		return err
	}
	sendBuffer(x.fd)
	budget := uint32(xdpFrames) // for one call; kernels before 6.17 know only 32
	x.setsockopt(unix.XDP_MAX_TX_SKB_BUDGET, unsafe.Pointer(&budget), unsafe.Sizeof(budget))
	for q := range uint32(xdpQueues) {
		err = unix.Bind(x.fd, &unix.SockaddrXDP{Flags: unix.XDP_COPY | unix.XDP_USE_NEED_WAKEUP, Ifindex: uint32(index), QueueID: q})
		if q > 0 && err == unix.EINVAL { // there are no more queues
			err = unix.EBUSY
		}
		if err != unix.EBUSY {
			break
		}
	}
	return os.NewSyscallError("bind", err)
}

func (x *xdp) setsockopt(opt int, v unsafe.Pointer, n uintptr) error {
	_, _, errno := syscall.Syscall6(unix.SYS_SETSOCKOPT, uintptr(x.fd), unix.SOL_XDP, uintptr(opt), uintptr(v), n, 0)
	if errno != 0 {
		return fmt.Errorf("AF_XDP option %d: %w", opt, errno)
	}
	return nil
}

func (x *xdp) mmap(fd int, off int64, n, flags int) ([]byte, error) {
	b, err := unix.Mmap(fd, off, n, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	x.maps = append(x.maps, b)
	return b, nil
}

func (x *xdp) ring(o *unix.XDPRingOffset, page int64, slot int) (r xdpRing, err error) {
	b, err := x.mmap(x.fd, page, int(o.Desc)+xdpFrames*slot, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return r, err
	}
	at := func(off uint64) *uint32 { return (*uint32)(unsafe.Pointer(&b[off])) }
	return xdpRing{at(o.Producer), at(o.Consumer), at(o.Flags), xdpFrames - 1, unsafe.Pointer(&b[o.Desc])}, nil
}

func (x *xdp) close() {
	unix.Close(x.fd)
	for _, m := range x.maps {
		unix.Munmap(m)
	}
	x.maps = nil
}

// fits reports whether a frame of n octets can be put.
func (x *xdp) fits(n int) bool { return n <= x.chunk }

// put copies a frame, header and packet, into the tx ring. It reports whether
// there was room.
func (x *xdp) put(header *[etherLen]byte, packet []byte) bool {
	if len(x.free) == 0 {
		if x.reap(); len(x.free) == 0 {
			return false
		}
	}
	f := x.free[len(x.free)-1]
	x.free = x.free[:len(x.free)-1]
	b := x.umem[int(f)*x.chunk:][:etherLen+len(packet)]
	copy(b, header[:])
	copy(b[etherLen:], packet)
	// There are as many slots as frames, so a frame implies a slot.
	d := (*unix.XDPDesc)(unsafe.Add(x.tx.slots, uintptr(x.ready&x.tx.mask)*unsafe.Sizeof(unix.XDPDesc{})))
	*d = unix.XDPDesc{Addr: uint64(f) * uint64(x.chunk), Len: uint32(len(b))}
	x.ready++
	return true
}

// pending is how many frames the kernel has not taken yet.
func (x *xdp) pending() int { return int(x.ready - atomic.LoadUint32(x.tx.consumer)) }

// kick has the kernel send what was put. nil: it has, or (pending) the device
// is slow and kick is to be called again a little later; else the socket is of
// no use any more.
func (x *xdp) kick() error {
	atomic.StoreUint32(x.tx.producer, x.ready)
	for idle := 0; x.pending() > 0 && idle < xdpPatience; {
		if atomic.LoadUint32(x.tx.flags)&unix.XDP_RING_NEED_WAKEUP == 0 {
			return nil // the kernel is at it by itself
		}
		before, free := x.pending(), len(x.free)
		errno := x.wake(x.fd)
		x.reap()
		switch errno {
		case 0, unix.EINTR:
		case unix.EBUSY: // one packet lost; the rest goes on
			x.dropped++
		case unix.EAGAIN, unix.ENOBUFS:
		default:
			return errno
		}
		if x.pending() == before && len(x.free) == free {
			// The device has no room. The peer of a virtual one may need
			// this very processor.
			idle++
			runtime.Gosched()
		} else {
			idle = 0
		}
	}
	return nil
}

func wakeXDP(fd int) syscall.Errno {
	_, _, errno := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return errno
}

// reap takes back the frames that have been sent.
func (x *xdp) reap() {
	c, p := *x.done.consumer, atomic.LoadUint32(x.done.producer) // only we write the former
	if c == p {
		return
	}
	for ; c != p; c++ {
		addr := *(*uint64)(unsafe.Add(x.done.slots, uintptr(c&x.done.mask)*8))
		x.free = append(x.free, uint32(addr/uint64(x.chunk)))
	}
	atomic.StoreUint32(x.done.consumer, c)
}
