// Package traffic makes and counts the traffic of the benchmark. An Agent runs
// in a process of its own on each host (in its network namespace) and is asked
// over a Unix socket, by net/rpc; it sinks TCP and counts UDP on fixed ports,
// and sends either on request. All that it sends shows Marker, so that a
// capture tells whether somebody could read it.
package traffic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Marker is in every datagram, and over and over in TCP.
const Marker = "missiu-bench-readable-by-anybody"

// Ports of every agent.
const (
	TCPPort    = 5001
	UDPPort    = 5002
	besidePort = 5003
)

// headerLen is what a datagram holds: Marker, the run's number and the
// sequence number, both 64 bits big-endian.
const headerLen = len(Marker) + 16

// MinUDP is the smallest payload of a datagram.
const MinUDP = headerLen

// Agent answers the requests. Its methods have the shape that net/rpc wants.
type Agent struct {
	tcp    atomic.Uint64 // octets received
	udp    udpCounter
	beside delays
}

// udpCounter counts the datagrams of the latest run.
type udpCounter struct {
	run, packets, octets atomic.Uint64
}

// Serve answers on a Unix socket until the process ends.
func Serve(path string) error {
	// A sender spins and receivers block in system calls of their own.
	runtime.GOMAXPROCS(max(8, runtime.NumCPU()))
	a := &Agent{}
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", TCPPort))
	if err != nil {
		return err
	}
	fd, err := udpSocket(UDPPort)
	if err != nil {
		return err
	}
	beside, err := udpSocket(besidePort)
	if err != nil {
		return err
	}
	go a.sinkTCP(l)
	go a.countUDP(fd)
	go a.beside.serve(beside)
	s := rpc.NewServer()
	if err := s.Register(a); err != nil {
		return err
	}
	control, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	s.Accept(control)
	return nil
}

// Empty is nothing.
type Empty struct{}

func (a *Agent) sinkTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			b := make([]byte, 1<<20)
			for {
				n, err := c.Read(b)
				a.tcp.Add(uint64(n))
				if err != nil {
					return
				}
			}
		}()
	}
}

// TCPReceived tells how many octets have come by TCP since the start.
func (a *Agent) TCPReceived(_ Empty, octets *uint64) error {
	*octets = a.tcp.Load()
	return nil
}

// TCPSend asks for streams that send as fast as they can.
type TCPSend struct {
	To       netip.Addr
	Streams  int
	Octets   int // of each stream at most; 0: as many as go
	Duration time.Duration
}

// TCPSent tells of a TCPSend.
type TCPSent struct {
	MSS         int           // of the first stream, octets of data in a packet
	Retransmits int           // of all streams
	RTT         time.Duration // the longest of the streams, smoothed, at the end
}

// TCPSend sends by TCP (cubic) for as long as asked.
func (a *Agent) TCPSend(r TCPSend, sent *TCPSent) error {
	type end struct {
		info *unix.TCPInfo
		err  error
	}
	ends := make(chan end, r.Streams)
	for range r.Streams {
		go func() {
			info, err := stream(r.To, r.Octets, time.Now().Add(r.Duration))
			ends <- end{info, err}
		}()
	}
	var errs []error
	for range r.Streams {
		e := <-ends
		if e.err != nil {
			errs = append(errs, e.err)
			continue
		}
		sent.MSS = int(e.info.Snd_mss)
		sent.Retransmits += int(e.info.Total_retrans)
		sent.RTT = max(sent.RTT, time.Duration(e.info.Rtt)*time.Microsecond)
	}
	return errors.Join(errs...)
}

// stream sends most octets (0: without limit) at most, until a time.
func stream(to netip.Addr, most int, until time.Time) (*unix.TCPInfo, error) {
	d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic")
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	conn, err := d.Dial("tcp", netip.AddrPortFrom(to, TCPPort).String())
	if err != nil {
		return nil, err
	}
	c := conn.(*net.TCPConn)
	defer c.Close()
	c.SetLinger(0) // what is queued at the end is not wanted any more
	c.SetWriteDeadline(until)
	b := bytes.Repeat([]byte(Marker), 256<<10/len(Marker))
	for sent := 0; most == 0 || sent < most; {
		n, err := c.Write(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return nil, err
		}
		sent += n
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var info *unix.TCPInfo
	cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	return info, errors.Join(cerr, err)
}

// rcvbuf takes what comes while the receiver waits for a CPU.
const rcvbuf = 16 << 20

// udpSocket is bound for both families.
func udpSocket(port int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, rcvbuf),
		unix.Bind(fd, &unix.SockaddrInet6{Port: port}),
	)
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

// countUDP reads a batch a system call, so that the receiver costs as little
// as it can.
func (a *Agent) countUDP(fd int) {
	runtime.LockOSThread()
	const batch, size = 64, 2048
	var msgs [batch]mmsghdr
	var iovs [batch]unix.Iovec
	bufs := make([]byte, batch*size)
	for i := range msgs {
		iovs[i].Base = &bufs[i*size]
		iovs[i].SetLen(size)
		msgs[i].hdr.Iov = &iovs[i]
		msgs[i].hdr.SetIovlen(1)
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&msgs[0])), batch, unix.MSG_WAITFORONE, 0, 0)
		if errno == unix.EINTR || errno == unix.EAGAIN || errno == unix.ECONNREFUSED {
			continue
		}
		if errno != 0 {
			return
		}
		for i := range int(n) {
			a.udp.add(bufs[i*size : i*size+int(msgs[i].len)])
		}
	}
}

// add counts a datagram if it is one of ours. Only one goroutine calls it.
func (c *udpCounter) add(b []byte) {
	if len(b) < headerLen || string(b[:len(Marker)]) != Marker {
		return
	}
	run := binary.BigEndian.Uint64(b[len(Marker):])
	switch now := c.run.Load(); {
	case run < now: // a straggler of an earlier run
		return
	case run > now:
		c.packets.Store(0)
		c.octets.Store(0)
		c.run.Store(run)
	}
	c.packets.Add(1)
	c.octets.Add(uint64(len(b)))
}

// UDPCount tells of the datagrams of a run.
type UDPCount struct {
	Packets, Octets uint64
}

// Stragglers of a run have settle time after the last one came, all together at
// most settleMax.
const (
	settle    = 60 * time.Millisecond
	settleMax = 600 * time.Millisecond
)

// UDPCount waits until nothing comes any more and tells what came of a run.
func (a *Agent) UDPCount(run uint64, r *UDPCount) error {
	last, since := a.udp.packets.Load(), time.Now()
	for end := since.Add(settleMax); time.Now().Before(end) && time.Since(since) < settle; {
		time.Sleep(5 * time.Millisecond)
		if now := a.udp.packets.Load(); now != last {
			last, since = now, time.Now()
		}
	}
	if a.udp.run.Load() == run {
		r.Packets, r.Octets = a.udp.packets.Load(), a.udp.octets.Load()
	}
	return nil
}

// UDPSend asks for datagrams, each sent by a system call of its own.
type UDPSend struct {
	To       netip.Addr
	Run      uint64  // its number; larger than those before
	Size     int     // of the payload in octets, MinUDP at least
	Rate     float64 // datagrams a second; 0: as many as go
	CatchUp  bool    // after a stall too, however large the burst
	Super    bool    // as many datagrams a system call as the kernel takes (UDP_SEGMENT)
	Duration time.Duration
}

// UDPSent tells of a UDPSend.
type UDPSent struct {
	Packets uint64
	Elapsed time.Duration
}

// pause is how long a sender that has nothing due sleeps; with that a rate is
// made of bursts of rate x pause datagrams. maxBehind is how much it catches up
// after the machine stood still: more would be a burst that no path takes.
const (
	pause     = 50 * time.Microsecond
	maxBehind = 2 * time.Millisecond
)

// SuperSegments is how many datagrams of a payload every kernel with UDP_SEGMENT
// takes in one call.
func SuperSegments(size int) int { return min((65535-40-8)/size, 64) }

// UDPSend sends by UDP for as long as asked.
func (a *Agent) UDPSend(r UDPSend, sent *UDPSent) error {
	if r.Size < MinUDP {
		return fmt.Errorf("datagrams of %d octets; want %d at least", r.Size, MinUDP)
	}
	runtime.LockOSThread() // the timer slack is the thread's
	defer runtime.UnlockOSThread()
	unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	fd, err := connectUDP(r.To, UDPPort)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	each := 1 // datagrams in a call
	if r.Super {
		each = SuperSegments(r.Size)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, r.Size); err != nil {
			return fmt.Errorf("UDP_SEGMENT: %w", err)
		}
	}
	b := make([]byte, each*r.Size)
	for i := copy(b, Marker); i < len(b); {
		i += copy(b[i:], Marker)
	}
	for d := b; len(d) > 0; d = d[r.Size:] {
		copy(d, Marker)
		binary.BigEndian.PutUint64(d[len(Marker):], r.Run)
	}
	seq := b[len(Marker)+8 : headerLen]
	perNano := r.Rate / 1e9
	start := time.Now()
	var forgiven time.Duration
	for {
		now := time.Since(start)
		if now >= r.Duration {
			sent.Elapsed = now
			return nil
		}
		due := uint64(64) + sent.Packets
		if r.Rate > 0 {
			due = uint64(perNano * float64(now-forgiven))
			if behind := time.Duration(float64(due-min(due, sent.Packets)) / perNano); behind > maxBehind && !r.CatchUp {
				forgiven += behind - maxBehind
				due = uint64(perNano * float64(now-forgiven))
			}
		}
		if sent.Packets >= due {
			ts := unix.NsecToTimespec(int64(pause))
			unix.Nanosleep(&ts, nil)
			continue
		}
		for due = min(due, sent.Packets+64); sent.Packets < due; {
			binary.BigEndian.PutUint64(seq, sent.Packets)
			_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
			switch errno {
			case 0:
				sent.Packets += uint64(each)
			case unix.EAGAIN, unix.ENOBUFS:
				ts := unix.NsecToTimespec(int64(pause))
				unix.Nanosleep(&ts, nil)
				if time.Since(start) >= r.Duration {
					due = sent.Packets
				}
			case unix.EINTR, unix.ECONNREFUSED:
			default:
				return fmt.Errorf("send to %v: %w", r.To, errno)
			}
		}
	}
}

// BesideSend asks for a modest flow, datagrams that show when they were sent.
type BesideSend struct {
	To       netip.Addr
	Run      uint64 // its number; larger than those before
	Every    time.Duration
	Duration time.Duration
}

// besideSize is the payload of its datagrams.
const besideSize = 200

// BesideSend sends the flow and tells how many datagrams there were.
func (a *Agent) BesideSend(r BesideSend, sent *int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	fd, err := connectUDP(r.To, besidePort)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := make([]byte, besideSize)
	copy(b, Marker)
	binary.BigEndian.PutUint64(b[len(Marker):], r.Run)
	for start := time.Now(); time.Since(start) < r.Duration; {
		binary.BigEndian.PutUint64(b[len(Marker)+8:], uint64(monotonic()))
		*sent++
		unix.Write(fd, b) // what does not leave is lost
		ts := unix.NsecToTimespec(int64(r.Every))
		unix.Nanosleep(&ts, nil)
	}
	return nil
}

// monotonic is a clock that all processes of a machine share.
func monotonic() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

// delays are those of the datagrams of the latest flow.
type delays struct {
	mu  sync.Mutex
	run uint64
	all []float64
}

func (d *delays) serve(fd int) {
	b := make([]byte, 2048)
	for {
		n, err := unix.Read(fd, b)
		if err != nil && err != unix.EINTR {
			return
		}
		if n >= headerLen && string(b[:len(Marker)]) == Marker {
			d.add(binary.BigEndian.Uint64(b[len(Marker):]), monotonic()-time.Duration(binary.BigEndian.Uint64(b[len(Marker)+8:])))
		}
	}
}

func (d *delays) add(run uint64, delay time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if run > d.run {
		d.run, d.all = run, nil
	}
	if run == d.run {
		d.all = append(d.all, delay.Seconds())
	}
}

// Beside tells how long the datagrams of a flow were on the way, in seconds, those
// that have come.
func (a *Agent) Beside(run uint64, all *[]float64) error {
	d := &a.beside
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.run == run {
		*all = slices.Clone(d.all)
	}
	return nil
}

// connectUDP returns a non-blocking socket.
func connectUDP(to netip.Addr, port int) (int, error) {
	family, sa := unix.AF_INET, unix.Sockaddr(nil)
	if to.Is4() {
		sa = &unix.SockaddrInet4{Port: port, Addr: to.As4()}
	} else {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: port, Addr: to.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20), unix.Connect(fd, sa)); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("UDP to %v: %w", to, err)
	}
	return fd, nil
}
