package wire

import (
	"bytes"
	"math"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fakeXDP is an xdp without kernel; its rings begin at index.
func fakeXDP(index uint32) *xdp {
	x := &xdp{fd: -1, chunk: 2048, umem: make([]byte, xdpFrames*2048), ready: index}
	ring := func(slot uintptr) xdpRing {
		producer, consumer, flags := index, index, uint32(unix.XDP_RING_NEED_WAKEUP)
		return xdpRing{&producer, &consumer, &flags, xdpFrames - 1, unsafe.Pointer(unsafe.SliceData(make([]byte, xdpFrames*slot)))}
	}
	x.tx, x.done = ring(unsafe.Sizeof(unix.XDPDesc{})), ring(8)
	for i := range uint32(xdpFrames) {
		x.free = append(x.free, i)
	}
	return x
}

// kernel sends n frames and returns them.
func (x *xdp) kernel(n int) (frames [][]byte) {
	for ; n > 0 && *x.tx.consumer != *x.tx.producer; n-- {
		d := (*unix.XDPDesc)(unsafe.Add(x.tx.slots, uintptr(*x.tx.consumer&x.tx.mask)*unsafe.Sizeof(unix.XDPDesc{})))
		frames = append(frames, bytes.Clone(x.umem[d.Addr:d.Addr+uint64(d.Len)]))
		*(*uint64)(unsafe.Add(x.done.slots, uintptr(*x.done.producer&x.done.mask)*8)) = d.Addr
		*x.tx.consumer++
		*x.done.producer++
	}
	return frames
}

// Frames go round and come out in order and whole, however the indices stand,
// and never more than there are.
func TestXDPRing(t *testing.T) {
	for _, index := range []uint32{0, math.MaxUint32 - 700} {
		x := fakeXDP(index)
		header := [etherLen]byte{1, 2, 3}
		put, sent := 0, 0
		for round := range 40 {
			for range 90 + round {
				if !x.put(&header, []byte{byte(put), byte(put >> 8)}) {
					break
				}
				put++
			}
			if put-sent > xdpFrames || x.pending() > xdpFrames {
				t.Fatalf("%d frames in the ring of %d", put-sent, xdpFrames)
			}
			*x.tx.producer = x.ready // as kick does
			for _, f := range x.kernel(37 * round % 180) {
				if want := append(header[:], byte(sent), byte(sent>>8)); !bytes.Equal(f, want) {
					t.Fatalf("frame %d: got % x, want % x", sent, f, want)
				}
				sent++
			}
			x.reap()
			if got := len(x.free); got != xdpFrames-(put-sent) {
				t.Fatalf("%d frames free, want %d", got, xdpFrames-(put-sent))
			}
		}
		if sent < 3*xdpFrames {
			t.Fatalf("only %d frames sent", sent)
		}
		// Full: nothing is overwritten, and room is found again without being told.
		for {
			if !x.put(&header, nil) {
				break
			}
		}
		*x.tx.producer = x.ready
		if x.pending() != xdpFrames {
			t.Errorf("%d pending, want %d", x.pending(), xdpFrames)
		}
		x.kernel(1)
		if !x.put(&header, nil) {
			t.Error("no room after the kernel has sent a frame")
		}
	}
}

// A kernel moves 32 packets at a time, may have no room, may lose one, and may
// lose its device.
func TestXDPKick(t *testing.T) {
	for _, k := range []struct {
		name    string
		put     int
		wake    func(x *xdp, call int) syscall.Errno
		err     error
		pending int
		dropped uint64
		calls   int // at most
	}{
		{"all at once", 20, func(x *xdp, _ int) syscall.Errno { x.kernel(xdpFrames); return 0 }, nil, 0, 0, 1},
		{"32 at a time", 500, func(x *xdp, _ int) syscall.Errno {
			if x.kernel(32); x.pending() > 0 {
				return unix.EAGAIN
			}
			return 0
		}, nil, 0, 0, 16},
		{"no room", 500, func(x *xdp, call int) syscall.Errno {
			if call == 1 {
				x.kernel(100)
			}
			return unix.EAGAIN
		}, nil, 400, 0, 1 + xdpPatience},
		{"no memory for a while", 50, func(x *xdp, call int) syscall.Errno {
			if call < 5 {
				return unix.ENOBUFS
			}
			x.kernel(xdpFrames)
			return 0
		}, nil, 0, 0, 5},
		{"driver drops", 50, func(x *xdp, call int) syscall.Errno { x.kernel(1); return unix.EBUSY }, nil, 0, 50, 50},
		{"device down", 50, func(x *xdp, call int) syscall.Errno {
			if call == 1 {
				x.kernel(32)
				return unix.EAGAIN
			}
			return unix.ENETDOWN
		}, unix.ENETDOWN, 18, 0, 2},
	} {
		x, calls := fakeXDP(math.MaxUint32-10), 0
		x.wake = func(int) syscall.Errno { calls++; return k.wake(x, calls) }
		for i := range k.put {
			x.put(&[etherLen]byte{}, []byte{byte(i)})
		}
		if err := x.kick(); err != k.err || x.pending() != k.pending || x.dropped != k.dropped || calls > k.calls {
			t.Errorf("%s: got %v, %d pending, %d dropped, %d calls; want %v, %d, %d, %d", k.name, err, x.pending(), x.dropped, calls, k.err, k.pending, k.dropped, k.calls)
		}
		if got := len(x.free); got != xdpFrames-k.pending {
			t.Errorf("%s: %d frames free, want %d", k.name, got, xdpFrames-k.pending)
		}
	}
}

func BenchmarkXDPRing(b *testing.B) {
	x := fakeXDP(0)
	header, packet := [etherLen]byte{}, make([]byte, 1480)
	b.SetBytes(int64(len(packet)))
	for i := range b.N {
		if !x.put(&header, packet) {
			b.Fatal("full")
		}
		if i%64 == 63 {
			*x.tx.producer = x.ready
			for *x.tx.consumer != *x.tx.producer { // the kernel's part, without the packet
				*(*uint64)(unsafe.Add(x.done.slots, uintptr(*x.done.producer&x.done.mask)*8)) = (*unix.XDPDesc)(unsafe.Add(x.tx.slots, uintptr(*x.tx.consumer&x.tx.mask)*unsafe.Sizeof(unix.XDPDesc{}))).Addr
				*x.tx.consumer++
				*x.done.producer++
			}
		}
	}
}
