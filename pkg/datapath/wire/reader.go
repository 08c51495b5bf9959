package wire

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// socketBuffer is for bursts: about 4000 full packets.
const socketBuffer = 8 << 20

// emptyLook is after how many empty looks at the ring an error is looked for.
const emptyLook = 8

const vnetLen = tap.HeadroomMin

var errHeadroom = errors.New("wire: packet with too little room before it")

// reader is an AF_PACKET socket. It is bound to ETH_P_ALL because only then
// it sees what the ingress chain drops. Of several each has the ESP packets of
// the SPIs that leave its number when divided by how many there are; the first
// has everything else too.
type reader struct {
	w    *Wire
	file *os.File
	raw  syscall.RawConn
	fn   func(uintptr)

	mu  sync.Mutex // arguments and results of fn
	ps  []Packet
	n   int
	err error
	m   mmsg

	ring   *packetRing // nil: the socket's queue alone
	empty  int         // looks at the ring in a row that were in vain
	ringed bool        // since it was opened
	wait   *linger.Wait

	read, passed, malformed, truncated, drops atomic.Uint64
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// open opens number k of n.
func (r *reader) open(w *Wire, index, k, n int) error {
	r.w = w
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return privilege("AF_PACKET socket", "CAP_NET_RAW", err)
	}
	set := func(opt, v int) {
		if err == nil {
			err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_PACKET, opt, v))
		}
	}
	set(unix.PACKET_VNET_HDR, 1)
	set(unix.PACKET_IGNORE_OUTGOING, 1)
	if err == nil && w.options.Native != NativeRaw {
		lack := w.options.lack("TPACKET_V2")
		if lack == nil {
			r.ring, lack = openRing(fd, w.link.Load().MTU)
		}
		if lack != nil {
			w.fellBack("TPACKET_V2", "recvmmsg", lack)
		}
	}
	if err == nil {
		err = receiveBuffer(fd)
	}
	if err == nil {
		var f []unix.SockFilter
		if k > 0 {
			f, err = spiFilter(k, n)
		} else {
			f, err = socketFilter(nil, nil, n)
		}
		if err == nil {
			err = attachFilter(fd, f)
		}
	}
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}))
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	r.ringed = r.ring != nil
	if r.file, err = linger.Open(fd, "packet"); err != nil {
		return err
	}
	r.fn = r.readLoop
	if r.wait, err = linger.New(w.options.Wait, fd); err != nil {
		return err
	}
	r.raw, err = r.file.SyscallConn()
	return err
}

// receiveBuffer asks for a large buffer, beyond the limit where we may.
func receiveBuffer(fd int) error { return receiveBufferOf(fd, socketBuffer) }

func receiveBufferOf(fd, n int) error {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n) == nil {
		return nil
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, n))
}

func sendBuffer(fd int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	}
}

func privilege(op, capability string, err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return &tap.PrivilegeError{Op: op, Capability: capability, Err: err}
	}
	return os.NewSyscallError(op, err)
}

// attachFilter exchanges the socket's filter.
func attachFilter(fd int, f []unix.SockFilter) error {
	p := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	return os.NewSyscallError("SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &p))
}

// ReadBatch implements Conn. Of several readers it is the first.
func (w *Wire) ReadBatch(ps []Packet) (int, error) { return w.reader.ReadBatch(ps) }

// TryBatch, Await and Join are those of the first reader.
func (w *Wire) TryBatch(ps []Packet) (int, error) { return w.reader.TryBatch(ps) }

// Await is described at TryBatch.
func (w *Wire) Await() error { return w.reader.Await() }

// Join is described at TryBatch.
func (w *Wire) Join(g *linger.Group, serve func() bool) error { return w.reader.Join(g, serve) }

// ReadBatch has the contract of Conn's.
func (r *reader) ReadBatch(ps []Packet) (int, error) {
	if len(ps) == 0 {
		return 0, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if n, err := r.receive(ps); n > 0 || err != nil {
			return n, err
		}
		if err := r.Await(); err != nil {
			return 0, err
		}
	}
}

// TryBatch is ReadBatch that does not wait: with no packet it returns 0, and Await
// is what waits. Neither is called beside ReadBatch, nor by two goroutines at a time.
func (r *reader) TryBatch(ps []Packet) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.receive(ps)
}

// Await returns when TryBatch is worth a call. Its errors are ReadBatch's.
func (r *reader) Await() error {
	if err := r.wait.Block(); err != nil {
		return r.w.gone(err)
	}
	return nil
}

// Join makes the reader a member of a group, where serve is called when TryBatch is
// worth it while the reader is in Await: see linger.Wait.
func (r *reader) Join(g *linger.Group, serve func() bool) error { return r.wait.Join(g, serve) }

// receive takes the packets that are there.
func (r *reader) receive(ps []Packet) (int, error) {
	r.ps, r.n, r.err = ps[:min(len(ps), maxBatch)], 0, nil
	err := r.raw.Control(r.fn)
	r.ps = nil
	if r.ring == nil {
		r.m.release(maxBatch)
	}
	if err != nil {
		return 0, r.w.gone(err)
	}
	return r.n, r.err
}

// gone says why there is no waiting any more.
func (w *Wire) gone(err error) error {
	if w.closing.Load() {
		return os.ErrClosed
	}
	if lost := w.Err(); lost != nil {
		return lost
	}
	return err
}

// wake makes a blocked ReadBatch return.
func (r *reader) wake() {
	if r.wait != nil {
		r.wait.Interrupt()
	}
}

// readLoop reads until there is nothing or something is kept.
func (r *reader) readLoop(fd uintptr) {
	for i := range r.ps {
		if p := &r.ps[i]; p.Off < ReadHeadroom || p.Off >= len(p.Buf) {
			r.err = errHeadroom
			return
		}
	}
	for r.n == 0 {
		errno := unix.EAGAIN
		if r.ring != nil {
			errno = r.readRing(fd)
		} else {
			errno = r.readQueue(fd)
		}
		switch errno {
		case 0:
			r.wait.Got()
		case unix.EAGAIN:
			return
		case unix.ENETDOWN:
			// told once; if the interface is lost, follow wakes us
		default:
			r.err = errno
			return
		}
	}
	r.read.Add(uint64(r.n))
}

// readQueue receives from the socket. EAGAIN: there was nothing.
func (r *reader) readQueue(fd uintptr) syscall.Errno {
	for i := range r.ps {
		p := &r.ps[i]
		r.m.set(i, p.Buf[p.Off-ReadHeadroom:])
	}
	n, errno := r.m.recv(fd, 0, len(r.ps))
	if errno != 0 {
		return errno
	}
	for i := range n {
		p := &r.ps[i]
		if r.m.truncated(i) {
			r.truncated.Add(1)
			continue
		}
		p.Len = int(r.m.hdrs[i].n) - ReadHeadroom
		if p.Len <= 0 || !r.keeps(p.Buf[p.Off-etherLen:p.Off+p.Len]) {
			continue
		}
		p.Offload = tap.DecodeOffload(p.Buf[p.Off-ReadHeadroom:])
		r.ps[r.n], *p = *p, r.ps[r.n]
		r.n++
	}
	return 0
}

// readRing takes packets from the ring, as many as there are and ps holds. It
// copies only what is kept. EAGAIN: there was nothing.
func (r *reader) readRing(fd uintptr) syscall.Errno {
	errno := unix.EAGAIN
	for r.n < len(r.ps) {
		b, queued, cut := r.ring.peek()
		if b == nil {
			break
		}
		errno = 0
		p := &r.ps[r.n]
		switch {
		case queued:
			r.ring.take()
			r.readQueued(fd, p)
			continue
		case cut || len(b) > len(p.Buf)-p.Off+ReadHeadroom:
			r.truncated.Add(1)
		case len(b) > ReadHeadroom && r.keeps(b[vnetLen:]):
			copy(p.Buf[p.Off-ReadHeadroom:], b)
			p.Len = len(b) - ReadHeadroom
			p.Offload = tap.DecodeOffload(b)
			r.n++
		}
		r.ring.take()
	}
	if errno == 0 {
		r.empty = 0
	} else if r.empty++; r.empty%emptyLook == 0 {
		// That the interface is down ends poll until somebody has asked for it.
		unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	}
	return errno
}

// readQueued receives the packet that was too long for the ring.
func (r *reader) readQueued(fd uintptr, p *Packet) {
	r.m.set(0, p.Buf[p.Off-ReadHeadroom:])
	n, errno := r.m.recv(fd, 0, 1)
	if errno == unix.ENETDOWN { // told once, before packets
		n, errno = r.m.recv(fd, 0, 1)
	}
	switch {
	case errno != 0 || n == 0:
	case r.m.truncated(0):
		r.truncated.Add(1)
	default:
		p.Len = int(r.m.hdrs[0].n) - ReadHeadroom
		if p.Len > 0 && r.keeps(p.Buf[p.Off-etherLen:p.Off+p.Len]) {
			p.Offload = tap.DecodeOffload(p.Buf[p.Off-ReadHeadroom:])
			r.n++
		}
	}
}

// keeps applies the chain's test to a frame, and listens for errors about the path.
func (r *reader) keeps(frame []byte) bool {
	b := frame[etherLen:]
	r.w.Heard(b)
	switch r.w.sets.Load().judge(binary.BigEndian.Uint16(frame[12:]), b) {
	case passes:
		r.passed.Add(1)
		return false
	case malformed:
		r.malformed.Add(1)
		return false
	}
	return true
}

// kernelDrops adds up what the kernel counts and forgets at each question.
func (r *reader) kernelDrops() uint64 {
	if r.raw == nil {
		return 0
	}
	r.raw.Control(func(fd uintptr) {
		if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			r.drops.Add(uint64(s.Drops))
		}
	})
	return r.drops.Load()
}

// close ends ReadBatch, and the ring when nobody reads it any more.
func (r *reader) close() {
	r.wait.Close()
	r.file.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ring != nil {
		r.ring.close()
		r.ring = nil
	}
}
