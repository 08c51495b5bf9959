package wire

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// packetRing is the receive ring of an AF_PACKET socket (TPACKET_V2). The kernel
// puts each packet into the next frame of memory shared with us, at once, and
// wakes the reader: so it costs less than a receive call and delays nothing.
// (TPACKET_V3 keeps packets until a block is full or a millisecond has passed.)
//
//	frame: tpacket2_hdr, sockaddr_ll | virtio_net_hdr | Ethernet header | packet
//
// A packet longer than a frame, which only a sender on the same machine makes,
// is marked in the ring and waits in the socket's queue.
type packetRing struct {
	mem   []byte
	frame int // octets
	mask  int // number of frames, a power of two, less one
	next  int // where the kernel's next packet will be
}

const (
	ringSize  = 8 << 20 // octets; as much as the socket buffer
	ringBlock = 1 << 16 // octets that the kernel allocates in one piece
	// ringOverhead is what the kernel puts before a packet: headers, the
	// metadata, the Ethernet header with a tag, alignment.
	ringOverhead = 160
)

// openRing gives the socket a ring for packets up to mtu octets. It is called
// after PACKET_VNET_HDR and before bind.
func openRing(fd, mtu int) (*packetRing, error) {
	r := &packetRing{frame: 2048}
	for r.frame < mtu+ringOverhead && r.frame < ringBlock {
		r.frame *= 2
	}
	r.mask = ringSize/r.frame - 1
	for _, o := range [][2]int{{unix.PACKET_VERSION, unix.TPACKET_V2}, {unix.PACKET_COPY_THRESH, 1}} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, o[0], o[1]); err != nil {
			return nil, fmt.Errorf("AF_PACKET option %d: %w", o[0], err)
		}
	}
	req := unix.TpacketReq{Block_size: ringBlock, Block_nr: ringSize / ringBlock, Frame_size: uint32(r.frame), Frame_nr: uint32(ringSize / r.frame)}
	if err := unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &req); err != nil {
		return nil, os.NewSyscallError("PACKET_RX_RING", err)
	}
	var err error
	if r.mem, err = unix.Mmap(fd, 0, ringSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		closeRing(fd)
		return nil, os.NewSyscallError("mmap", err)
	}
	return r, nil
}

func closeRing(fd int) {
	unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &unix.TpacketReq{})
}

func (r *packetRing) close() { unix.Munmap(r.mem) }

// header of the next frame; its Status is the kernel's to write, too.
func (r *packetRing) header() *unix.Tpacket2Hdr {
	return (*unix.Tpacket2Hdr)(unsafe.Pointer(&r.mem[r.next*r.frame]))
}

// peek returns the next packet, from its metadata on, without taking it; queued:
// it is in the socket's queue, and the frame holds only its beginning. nil: there is none.
func (r *packetRing) peek() (b []byte, queued, cut bool) {
	h := r.header()
	status := atomic.LoadUint32(&h.Status)
	if status&unix.TP_STATUS_USER == 0 {
		return nil, false, false
	}
	from := r.next*r.frame + int(h.Mac) - vnetLen
	b = r.mem[from : from+vnetLen+int(h.Snaplen)]
	return b, status&unix.TP_STATUS_COPY != 0, h.Snaplen < h.Len
}

// take gives the frame back to the kernel.
func (r *packetRing) take() {
	atomic.StoreUint32(&r.header().Status, unix.TP_STATUS_KERNEL)
	r.next = (r.next + 1) & r.mask
}
