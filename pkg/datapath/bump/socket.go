package bump

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

const (
	vnetLen  = tap.HeadroomMin
	etherLen = 14
	tagLen   = 4
	copyLen  = 65535 + etherLen + tagLen // of the longest frame

	// maxBatch is how many frames one system call moves.
	maxBatch = 64
	// readAtOnce is how many are received at once, and readLimit how many octets one
	// read takes before it returns though there may be more.
	readAtOnce = 16
	readLimit  = 1 << 20
	// socketBuffer is for bursts: about 4000 full frames.
	socketBuffer = 8 << 20
)

// Room is the least Frame.Off for ReadBatch, in octets: for the kernel's metadata
// and for a VLAN tag, which is put back to where it was in the frame.
const Room = vnetLen + tagLen

var errRoom = errors.New("bump: frame with too little room before it")

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// mmsg is the argument of recvmmsg or sendmmsg, made once.
type mmsg struct {
	hdrs [maxBatch]mmsghdr
	iovs [maxBatch]unix.Iovec
	oobs [maxBatch][64]byte // PACKET_AUXDATA
}

func (m *mmsg) set(i int, b []byte) {
	m.iovs[i].Base = unsafe.SliceData(b)
	m.iovs[i].SetLen(len(b))
	m.hdrs[i] = mmsghdr{}
	h := &m.hdrs[i].hdr
	h.Iov = &m.iovs[i]
	h.SetIovlen(1)
}

func (m *mmsg) release() {
	for i := range m.iovs {
		m.iovs[i].Base = nil
	}
}

// call never blocks, so the scheduler need not know of it.
func (m *mmsg) call(trap, fd uintptr, from, to, flags int) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(&m.hdrs[from])), uintptr(to-from), uintptr(flags), 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// socket is an AF_PACKET socket that reads or writes whole frames with the
// metadata of offloads.
type socket struct {
	index int // of the interface
	file  *os.File
	raw   syscall.RawConn
	fn    func(uintptr)

	mu   sync.Mutex // arguments and results of fn
	m    mmsg
	fs   []tap.Frame
	n    int
	err  syscall.Errno
	bad  bool
	wait *linger.Wait // nil: it writes only
	cut  uint64       // frames that did not fit, or that the kernel cannot give
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// Options of packetSocket.
type socketOptions struct {
	index  int
	filter []bpf.Instruction // nil: it writes only
	mark   uint32            // of what is written
	wait   string
	both   bool // reads what leaves the interface, too

	promisc bool // the interface is to take what is for other MACs, too
}

func packetSocket(o socketOptions) (*socket, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return nil, &tap.PrivilegeError{Op: "AF_PACKET socket", Capability: "CAP_NET_RAW", Err: err}
	}
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	s := &socket{index: o.index}
	if s.file, err = linger.Open(fd, "packet"); err != nil {
		return nil, err
	}
	set := func(level, opt, v int) {
		if err == nil {
			err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, opt, v))
		}
	}
	set(unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
	a := &unix.SockaddrLinklayer{Ifindex: o.index}
	if o.filter == nil {
		s.fn = s.writeLoop
		set(unix.SOL_SOCKET, unix.SO_MARK, int(o.mark))
		buffer(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
	} else {
		s.fn = s.readLoop
		a.Protocol = htons(unix.ETH_P_ALL)
		set(unix.SOL_PACKET, unix.PACKET_AUXDATA, 1)
		if !o.both {
			set(unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
		}
		buffer(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
		if err == nil && o.promisc {
			err = os.NewSyscallError("PACKET_ADD_MEMBERSHIP", unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &unix.PacketMreq{Ifindex: int32(o.index), Type: unix.PACKET_MR_PROMISC}))
		}
		if err == nil {
			err = attach(fd, o.filter)
		}
		if err == nil {
			s.wait, err = linger.New(o.wait, fd)
		}
	}
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, a))
	}
	if err == nil {
		s.raw, err = s.file.SyscallConn()
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// buffer asks for a large one, beyond the limit where we may.
func buffer(fd, force, polite int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, polite, socketBuffer)
	}
}

func attach(fd int, program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return err
	}
	f := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		f[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	p := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	return os.NewSyscallError("SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &p))
}

const whole = 0x40000

// extMark is SKF_AD_MARK, which package bpf does not know.
const extMark = 0xfffff000 + 20

// marked takes frames that carry a mark.
func marked(v uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: extMark, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1},
		bpf.RetConstant{Val: whole}, bpf.RetConstant{},
	}
}

// unmarked takes frames that carry neither of two marks.
func unmarked(v, w uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: extMark, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: w, SkipTrue: 1},
		bpf.RetConstant{Val: whole}, bpf.RetConstant{},
	}
}

// passing takes what comes in over the interface, or what leaves, but for frames
// that we inject, which are seen as coming in a second time.
func passing(leaving bool, injected uint32) []bpf.Instruction {
	cond := bpf.JumpNotEqual
	if leaving {
		cond = bpf.JumpEqual
	}
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: extMark, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: injected, SkipTrue: 3},
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: cond, Val: unix.PACKET_OUTGOING, SkipFalse: 1},
		bpf.RetConstant{Val: whole}, bpf.RetConstant{},
	}
}

// read waits for frames and takes what is there.
func (s *socket) read(fs []tap.Frame) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fs, s.n, s.err, s.bad = fs[:min(len(fs), maxBatch)], 0, 0, false
	var err error
	for s.n == 0 && s.err == 0 && !s.bad && err == nil {
		if err = s.raw.Control(s.fn); err == nil && s.n == 0 && s.err == 0 && !s.bad {
			err = s.wait.Block()
		}
	}
	s.fs = nil
	s.m.release()
	switch {
	case err != nil:
		return 0, err
	case s.bad:
		return 0, errRoom
	case s.n == 0 && s.err != 0:
		return 0, s.err
	}
	return s.n, nil
}

// reader gives all that comes at a socket of its own to a function.
type reader struct {
	sock *socket
	done chan struct{}
}

// startReader has f get all that comes at s, from one goroutine, until close, or until
// the socket's interface is gone. The frames are f's until it returns.
func startReader(s *socket, f func([]tap.Frame)) *reader {
	r := &reader{s, make(chan struct{})}
	go func() {
		defer close(r.done)
		s.drain(f)
	}()
	return r
}

// close closes the socket and waits until f has returned for the last time. Of nil it
// does nothing.
func (r *reader) close() {
	if r != nil {
		r.sock.close()
		<-r.done
	}
}

// drain gives f all that comes, until the socket is closed, or its interface gone.
func (s *socket) drain(f func([]tap.Frame)) {
	fs := make([]tap.Frame, maxBatch)
	for i := range fs {
		fs[i].Buf = make([]byte, Room+copyLen)
	}
	for {
		for i := range fs {
			fs[i].Off = Room
		}
		n, err := s.read(fs)
		switch {
		case n > 0:
			f(fs[:n])
		case errors.Is(err, unix.ENETDOWN): // told once
		default:
			return
		}
	}
}

// readLoop receives until there is nothing more, or a MiB. It takes few frames at a
// time, because it cannot tell the kernel to stop when super-frames have become more
// than a cache holds.
func (s *socket) readLoop(fd uintptr) {
	for i := range s.fs {
		f := &s.fs[i]
		if f.Off < Room || f.Off >= len(f.Buf) {
			s.bad = true
			return
		}
		s.m.set(i, f.Buf[f.Off-vnetLen:])
		h := &s.m.hdrs[i].hdr
		h.Control = &s.m.oobs[i][0]
		h.SetControllen(len(s.m.oobs[i]))
	}
	size, odd := 0, 0
	for from := 0; from < len(s.fs) && size < readLimit; {
		to := min(from+readAtOnce, len(s.fs))
		n, errno := s.m.call(unix.SYS_RECVMMSG, fd, from, to, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case errno == unix.EAGAIN:
			return
		case errno == unix.EINVAL && odd < maxBatch: // one that a virtio_net_hdr cannot tell of
			odd++
			s.cut++
			continue
		case errno != 0: // if there is something, it will come again
			s.err = errno
			return
		}
		if from == 0 {
			s.wait.Got()
		}
		for i := from; i < from+n; i++ {
			if s.received(i) {
				f := &s.fs[i]
				size += f.Len
				s.fs[s.n], *f = *f, s.fs[s.n]
				s.n++
			}
		}
		if from += n; from < to {
			return
		}
	}
}

// received completes frame i; false: it did not fit.
func (s *socket) received(i int) bool {
	f, h := &s.fs[i], &s.m.hdrs[i]
	if h.hdr.Flags&unix.MSG_TRUNC != 0 || int(h.n) < vnetLen+etherLen {
		s.cut++
		return false
	}
	f.Len = int(h.n) - vnetLen
	f.Offload = tap.DecodeOffload(f.Buf[f.Off-vnetLen:])
	if tag := auxTag(s.m.oobs[i][:h.hdr.Controllen]); tag != 0 {
		putTag(f, tag)
	}
	if f.Offload.GSOType != tap.GSONone {
		f.Offload.Measure(f.Buf[f.Off : f.Off+f.Len])
	}
	return true
}

// auxTag is the VLAN tag that the kernel keeps beside a frame: its type and its
// control information; 0: none.
func auxTag(b []byte) uint32 {
	if len(b) < unix.CmsgLen(int(unsafe.Sizeof(unix.TpacketAuxdata{}))) {
		return 0
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	if h.Level != unix.SOL_PACKET || h.Type != unix.PACKET_AUXDATA {
		return 0
	}
	a := (*unix.TpacketAuxdata)(unsafe.Pointer(&b[unix.CmsgLen(0)]))
	switch {
	case a.Status&unix.TP_STATUS_VLAN_VALID == 0:
		return 0
	case a.Status&unix.TP_STATUS_VLAN_TPID_VALID == 0:
		return unix.ETH_P_8021Q<<16 | uint32(a.Vlan_tci)
	}
	return uint32(a.Vlan_tpid)<<16 | uint32(a.Vlan_tci)
}

// putTag puts a tag behind the addresses.
func putTag(f *tap.Frame, tag uint32) {
	to := f.Off - tagLen
	copy(f.Buf[to:], f.Buf[f.Off:f.Off+12])
	binary.BigEndian.PutUint32(f.Buf[to+12:], tag)
	f.Off, f.Len = to, f.Len+tagLen
	if f.Offload.NeedsCsum {
		f.Offload.CsumStart += tagLen
	}
	if f.Offload.HdrLen != 0 {
		f.Offload.HdrLen += tagLen
	}
}

// write sends frames in order until one is refused, fs[n], and says why.
func (s *socket) write(fs []tap.Frame) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	done := 0
	for done < len(fs) {
		s.fs, s.n, s.err, s.bad = fs[done:min(len(fs), done+maxBatch)], 0, 0, false
		err := s.raw.Control(s.fn)
		s.fs = nil
		s.m.release()
		done += s.n
		switch {
		case err != nil:
			return done, err
		case s.bad:
			return done, errRoom
		case s.err == unix.EAGAIN:
			return done, unix.ENOBUFS
		case s.err != 0:
			return done, s.err
		}
	}
	return done, nil
}

func (s *socket) writeLoop(fd uintptr) {
	n := 0
	for n < len(s.fs) {
		f := &s.fs[n]
		if f.Off < vnetLen || f.Len < etherLen || f.Off+f.Len > len(f.Buf) {
			s.bad = true
			break
		}
		b := f.Buf[f.Off-vnetLen : f.Off+f.Len]
		tap.EncodeOffload(b, &f.Offload)
		s.m.set(n, b)
		n++
	}
	for s.n < n {
		k, errno := s.m.call(unix.SYS_SENDMMSG, fd, s.n, n, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errno != 0 {
			s.err, s.bad = errno, false
			return
		}
		s.n += k
	}
}

func (s *socket) close() {
	if s == nil {
		return
	}
	if s.wait != nil {
		s.wait.Close()
	}
	s.file.Close()
}

// waiting tells whether there are frames to be read.
func (s *socket) waiting() (is bool) {
	if s != nil {
		s.raw.Control(func(fd uintptr) {
			n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
			is = err == nil && n > 0
		})
	}
	return is
}

// kernelDrops is how many frames the socket had no room for.
func (s *socket) kernelDrops() uint64 {
	const memDrops = 8 // SK_MEMINFO_DROPS
	var mem [9]uint32
	if s == nil {
		return 0
	}
	s.raw.Control(func(fd uintptr) {
		n := uint32(unsafe.Sizeof(mem))
		syscall.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&mem)), uintptr(unsafe.Pointer(&n)), 0)
	})
	return uint64(mem[memDrops])
}
