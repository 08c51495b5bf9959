package tap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
)

// Flags of virtio_net_hdr and of TUNSETOFFLOAD.
const (
	vnetNeedsCsum = 1

	readTCP = unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	readUDP = unix.TUN_F_USO4 | unix.TUN_F_USO6
)

// readLimit is how many octets ReadBatch takes before it returns though there
// may be more: 16 of the longest super-frames. With 4 or 8 TCP was no faster.
const readLimit = 16 << 16

// standing is how long the kernel's queue may never be empty until ReadBatch sheds
// super-frames of UDP, which is until it is empty. The queue is bounded by frames
// only: such a flood, which nothing slows down, would fill it with 128 MB, and
// everybody behind it would wait for a second. TCP slows itself down, and 2000
// single packets are worth a few milliseconds.
//
// What is shed is not read as a whole: that would take longer than it takes to
// send. The frame behind one that was shed is asked for with room for shortRead
// octets, so that of TCP between such frames the longer ones are lost as well.
const standing = 10 * time.Millisecond

// shortRead is what a TCP sends at a time that the flood has already slowed down.
const shortRead = 16 << 10

// shedLimit bounds the frames shed by one ReadBatch that has others to return.
const shedLimit = 256

// device is a TAP with its queues.
type device struct {
	queues []*queue
	name   string
	index  int
	mac    net.HardwareAddr
	mtu    atomic.Int32
	vnet   bool // frames carry a virtio_net_hdr
	bare   int  // octets of a frame's front that the kernel does not see: of a TUN, etherLen
	reads  Super
	super  [3]atomic.Bool // that the kernel takes, by kind
	cut    atomic.Uint64
	shed   atomic.Uint64
	done   atomic.Bool
}

// queue is one queue of a TAP. The frame loops run inside RawConn callbacks
// that are made once, because a closure per batch would be an allocation. The
// netpoller does not know the file (see linger.Open).
type queue struct {
	d    *device
	file *os.File
	raw  syscall.RawConn

	rmu sync.Mutex // the callback's arguments and results
	r   struct {
		fs   []Frame
		n    int
		size int // octets of fs[:n]
		err  error
		fn   func(uintptr)
		wait *linger.Wait
		// since is when the queue was last empty, as far as we saw; zero:
		// it was when last looked at.
		since time.Time
		shed  bool // the last frame was
		// alone: the last frame came by itself after a silence, so there is
		// hardly another yet.
		alone bool
	}
	writers writers
}

// newDevice takes files over.
func newDevice(files []*os.File, name string, o Options) (*device, error) {
	d := &device{name: name, vnet: o.Offload == OffloadAuto}
	if o.TUN {
		d.bare = etherLen
	}
	for i, f := range files {
		q, err := newQueue(d, f, name, o)
		if err != nil {
			closeAll(files[i+1:])
			d.Close()
			return nil, err
		}
		d.queues = append(d.queues, q)
	}
	if !d.vnet {
		return d, nil
	}
	// An adopted device keeps what its last owner set.
	if err := d.ioctl("TUNSETVNETHDRSZ", func(fd int) error {
		return unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHdrLen)
	}); err != nil {
		return d, err
	}
	return d, d.ioctl("TUNSETOFFLOAD", func(fd int) error { return d.askSuper(fd, o.ReadOffload) })
}

// newQueue takes f over.
func newQueue(d *device, f *os.File, name string, o Options) (*queue, error) {
	fd, err := dup(f)
	if err != nil {
		return nil, err
	}
	q := &queue{d: d}
	if q.file, err = linger.Open(fd, name); err != nil {
		return nil, err
	}
	q.r.fn = q.readLoop
	if q.raw, err = q.file.SyscallConn(); err == nil {
		q.r.wait, err = linger.New(o.Wait, fd)
	}
	if err != nil {
		q.file.Close()
		return nil, err
	}
	return q, nil
}

// dup closes f and returns a descriptor of the same, which the netpoller does not know.
func dup(f *os.File) (int, error) {
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	if e := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		return -1, e
	}
	return fd, os.NewSyscallError("fcntl", err)
}

// setOffload is TUNSETOFFLOAD; tests are kernels that refuse some.
var setOffload = func(fd, flags int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, flags) }

// askSuper asks for as many kinds of super-frames as the kernel knows: USO is
// of Linux 6.2.
func (d *device) askSuper(fd int, want bool) error {
	flags := []int{unix.TUN_F_CSUM | readTCP | readUDP, unix.TUN_F_CSUM | readTCP, unix.TUN_F_CSUM, 0}
	if !want {
		flags = flags[3:]
	}
	var err error
	for _, f := range flags {
		if err = setOffload(fd, f); err != unix.EINVAL {
			d.reads = Super{TCP4: f&unix.TUN_F_TSO4 != 0, TCP6: f&unix.TUN_F_TSO6 != 0, UDP: f&readUDP != 0}
			break
		}
	}
	return err
}

func (d *device) ioctl(op string, f func(fd int) error) error {
	var err error
	if e := d.queues[0].raw.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil {
		return d.failed(e)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

// failed translates an error of a device that is closed or gone.
func (d *device) failed(error) error {
	if d.done.Load() {
		return os.ErrClosed
	}
	return &GoneError{d.name}
}

// fault translates what the kernel says of a device that is gone.
func (d *device) fault(err error) error {
	if err == unix.EBADFD {
		return d.failed(err)
	}
	return err
}

func (d *device) Name() string          { return d.name }
func (d *device) Index() int            { return d.index }
func (d *device) MAC() net.HardwareAddr { return d.mac }
func (d *device) ReadSuper() Super      { return d.reads }
func (d *device) MTU() int              { return int(d.mtu.Load()) }

func (d *device) SetMTU(mtu int) error {
	link, err := netlink.LinkByIndex(d.index)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("mtu %d: %w", mtu, err)
	}
	d.mtu.Store(int32(mtu))
	return nil
}

func (d *device) Persist(on bool) error {
	v := 0
	if on {
		v = 1
	}
	return d.ioctl("TUNSETPERSIST", func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, v) })
}

func (d *device) Close() error {
	d.done.Store(true)
	var err error
	for _, q := range d.queues {
		err = errors.Join(err, q.r.wait.Close(), q.file.Close())
	}
	return err
}

func (d *device) Lost() Lost {
	l := Lost{Shed: d.shed.Load()}
	if link, err := netlink.LinkByIndex(d.index); err == nil && link.Attrs().Statistics != nil {
		l.Full = link.Attrs().Statistics.TxDropped
	}
	return l
}

func (d *device) Queues() []Queue {
	qs := make([]Queue, len(d.queues))
	for i, q := range d.queues {
		qs[i] = q
	}
	return qs
}

func (d *device) ReadBatch(fs []Frame) (int, error)  { return d.queues[0].ReadBatch(fs) }
func (d *device) WriteBatch(fs []Frame) (int, error) { return d.queues[0].WriteBatch(fs) }
func (d *device) TryBatch(fs []Frame) (int, error)   { return d.queues[0].TryBatch(fs) }
func (d *device) Await() error                       { return d.queues[0].Await() }

func (d *device) Join(g *linger.Group, serve func() bool) error { return d.queues[0].Join(g, serve) }

var errHeadroom = errors.New("tap: frame with too little room before it")

func (q *queue) ReadBatch(fs []Frame) (int, error) {
	if len(fs) == 0 {
		return 0, nil
	}
	q.rmu.Lock()
	defer q.rmu.Unlock()
	for {
		if !q.r.alone {
			if n, err := q.read(fs); n > 0 || err != nil {
				return n, err
			}
		}
		if err := q.await(); err != nil {
			return 0, err
		}
	}
}

// TryBatch is ReadBatch that does not wait: with no frame it returns 0, and Await is
// what waits. Neither is called beside ReadBatch, nor by two goroutines at a time.
func (q *queue) TryBatch(fs []Frame) (int, error) {
	if q.r.alone {
		q.r.alone = false
		return 0, nil
	}
	q.rmu.Lock()
	defer q.rmu.Unlock()
	return q.read(fs)
}

// Await returns when TryBatch is worth a call. Its errors are ReadBatch's.
func (q *queue) Await() error { return q.await() }

// Join makes the queue's reader a member of a group, where serve is called when
// TryBatch is worth it while the reader is in Await: see linger.Wait.
func (q *queue) Join(g *linger.Group, serve func() bool) error {
	return q.r.wait.Join(g, func() bool {
		q.r.alone = false
		return serve()
	})
}

func (q *queue) await() error {
	q.r.alone = false
	if err := q.r.wait.Block(); err != nil {
		return q.d.failed(err)
	}
	return nil
}

// read takes the frames that are there.
func (q *queue) read(fs []Frame) (int, error) {
	r := &q.r
	r.fs, r.n, r.size, r.err = fs, 0, 0, nil
	err := q.raw.Control(r.fn)
	r.fs = nil
	switch {
	case r.n > 0:
		return r.n, nil // an error will come again
	case err != nil:
		return 0, q.d.failed(err)
	case r.err != nil:
		return 0, q.d.fault(r.err)
	}
	return 0, nil
}

// take is read, for a Set.
func (q *queue) take(fs []Frame) (int, error) {
	q.rmu.Lock()
	defer q.rmu.Unlock()
	return q.read(fs)
}

// readLoop reads frames until there are none. The calls do not block, so the
// scheduler need not know of them.
func (q *queue) readLoop(fd uintptr) {
	r := &q.r
	now := time.Now()
	if r.since.IsZero() {
		r.since = now
	}
	late := now.Sub(r.since) > standing
	shed := 0
	for r.n < len(r.fs) && r.size < readLimit && (r.n == 0 || shed < shedLimit) {
		f := &r.fs[r.n]
		if f.Off < HeadroomMin || f.Off+q.d.bare >= len(f.Buf) {
			r.err = errHeadroom
			return
		}
		start := f.Off + q.d.bare
		if q.d.vnet {
			start -= vnetHdrLen
		}
		b := f.Buf[start:]
		// What is likely to be shed is not worth a copy.
		room := max(shortRead, q.d.single())
		short := late && r.shed && room < len(b)
		if short {
			b = b[:room]
		}
		n, errno := rawIO(unix.SYS_READ, fd, b)
		switch errno {
		case 0:
		case unix.EAGAIN:
			r.since = time.Time{}
			return
		case unix.EINTR:
			continue
		default:
			r.err = errno
			return
		}
		cut := short && n == len(b)
		f.Offload = Offload{}
		if q.d.vnet {
			if n -= vnetHdrLen; n < 0 {
				continue
			}
			f.Offload.decode(f.Buf[start : start+vnetHdrLen])
		}
		if q.d.bare != 0 && !dress(f, n) {
			continue
		}
		if udp := f.Offload.GSOType == GSOUDPL4; late && (udp || cut && f.Offload.GSOType != GSONone) {
			q.d.shed.Add(f.Offload.packets(f.Buf[f.Off : f.Off+n+q.d.bare]))
			shed++
			r.shed = udp // the next of TCP is not lost
			continue
		}
		r.shed = false
		f.Len = n + q.d.bare
		r.size += n
		r.n++
		if r.n == 1 {
			// TCP and bulk follow a super-frame up.
			if r.alone = r.wait.Got() && f.Offload.GSOType == GSONone; r.alone {
				r.since = time.Time{}
				return
			}
		}
	}
}

// single is how many octets the kernel gives for the longest frame that is none
// of a super-frame's kind, with its metadata and a tag.
func (d *device) single() int { return vnetHdrLen + etherLen + 4 + d.MTU() }

// packets is how many a super-frame stands for, of which b may be the beginning
// only.
func (o *Offload) packets(b []byte) uint64 {
	be := binary.BigEndian
	start := int(o.CsumStart)
	if len(b) < etherLen+20 || start+13 > len(b) {
		return 1
	}
	n := len(b)
	switch be.Uint16(b[12:]) {
	case unix.ETH_P_IP:
		n = etherLen + int(be.Uint16(b[etherLen+2:]))
	case unix.ETH_P_IPV6:
		n = etherLen + 40 + int(be.Uint16(b[etherLen+4:]))
	}
	n -= start + 8
	if o.GSOType != GSOUDPL4 {
		n -= int(b[start+12]>>4)*4 - 8
	}
	size := max(1, int(o.GSOSize))
	return uint64(max(1, (n+size-1)/size))
}

// dress puts the Ethernet header in front of the n octets from a TUN, to the
// kernel from itself. What has no such header is no packet.
func dress(f *Frame, n int) bool {
	b := f.Buf[f.Off:]
	clear(b[:etherLen-2])
	b[12], b[13] = 0x08, 0x00
	switch {
	case n < 20:
		return false
	case b[etherLen]>>4 == 6:
		b[12], b[13] = 0x86, 0xdd
	}
	if f.Offload.NeedsCsum {
		f.Offload.CsumStart += etherLen
	}
	if f.Offload.HdrLen != 0 {
		f.Offload.HdrLen += etherLen
	}
	return true
}

func rawIO(trap, fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), errno
}

// decode and encode: struct virtio_net_hdr, in the byte order of the machine.
func (o *Offload) decode(b []byte) {
	e := binary.NativeEndian
	*o = Offload{
		NeedsCsum:  b[0]&vnetNeedsCsum != 0,
		GSOType:    b[1],
		HdrLen:     e.Uint16(b[2:]),
		GSOSize:    e.Uint16(b[4:]),
		CsumStart:  e.Uint16(b[6:]),
		CsumOffset: e.Uint16(b[8:]),
	}
}

func (o *Offload) encode(b []byte) {
	e := binary.NativeEndian
	b[0] = 0
	if o.NeedsCsum {
		b[0] = vnetNeedsCsum
	}
	b[1] = o.GSOType
	e.PutUint16(b[2:], o.HdrLen)
	e.PutUint16(b[4:], o.GSOSize)
	e.PutUint16(b[6:], o.CsumStart)
	e.PutUint16(b[8:], o.CsumOffset)
}

// DecodeOffload reads the kernel's header for the metadata of a frame, b[:HeadroomMin].
func DecodeOffload(b []byte) Offload {
	var o Offload
	o.decode(b[:vnetHdrLen])
	return o
}

// EncodeOffload writes the metadata of a frame as the kernel's header: b[:HeadroomMin].
func EncodeOffload(b []byte, o *Offload) { o.encode(b[:vnetHdrLen]) }
