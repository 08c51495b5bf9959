package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
)

// UDP is port 4500 on the interface. It implements UDPConn and is safe for
// concurrent use.
//
// It is one socket per family, bound to the interface and to no address, with
// the addresses told per datagram: so there is no moment after a change of
// address at which the kernel answers a peer with "port unreachable".
type UDP struct {
	w     *Wire
	port  uint16
	socks [2]udpSocket // IPv4, IPv6
	gro   bool

	mu   sync.Mutex // arguments and results of reading
	ds   []Datagram
	n    int
	err  error
	m    mmsg
	wait *linger.Wait
	// turn is the socket that had something last. alone: a datagram came by
	// itself after a silence, so there is hardly another yet.
	turn  int
	share uint8 // batches read
	alone bool

	out udpOut

	messages, truncated, shed atomic.Uint64

	closeOnce sync.Once
}

type udpSocket struct {
	family int
	file   *os.File // nil: the host lacks the family
	raw    syscall.RawConn
	recv   func(uintptr)
	since  time.Time // since when there has always been more than one batch; zero: there has not
	stood  time.Time // when that was standing last
	small  bool      // and the buffer, therefore
	aged   time.Time // since when all that was read first had become stale; zero: it has not
	send   func(uintptr)
	// segment: the kernel cuts trains into datagrams, from time after.
	segment bool
	after   time.Time
}

// udpShare is after how many batches the other family's socket has its turn.
const udpShare = 8

// A large buffer is for bursts. Once it was not empty for standing it has become a
// queue in which everybody waits, and it shrinks until it has been empty now and
// then for recovery: what the kernel drops meanwhile would have come late. The
// kernel doubles these octets and counts its own overhead.
const (
	burstBuffer    = 4 << 20
	standingBuffer = 1 << 20
	standing       = 20 * time.Millisecond
	// recovery is how long it stays so, or the queue would be long again at once
	// while there is too much.
	recovery = 500 * time.Millisecond
	// stale is how long a message may wait in the buffer. Once what is read first
	// has always been older for staleFor, with more behind it, older ones are shed before they cost more:
	// of small packets even the small buffer holds a tenth of a second's work. What
	// piled up because the process was kept from its processor is read in less, and
	// kept, as RFC 8289 says of a queue that drains: of a TCP stream nothing was shed
	// when the process was stopped for 150 ms. IKE's messages are spared, but
	// for those that the kernel has joined to others.
	//
	// It is for such stops amid a flood of small packets, after which the queue was
	// seen to stay old for 300 ms. While nothing stops the process the small buffer is
	// enough: on two processors with both gateways, both ends and the flood, messages
	// waited for 2 to 10 ms on the average there. The timestamps cost 2.5 ns a packet
	// (BenchmarkUDPRead, joined).
	stale    = 20 * time.Millisecond
	staleFor = 50 * time.Millisecond
)

// hopLimit is that of the headers which the engine writes itself, so that a
// tunnel looks the same whichever way its packets leave.
const hopLimit = 64

// UDPOptions of OpenUDP.
type UDPOptions struct {
	Port uint16 // 0: 4500
	GRO  bool   // the caller understands Datagram.Segment on reading
	// Plain asks the kernel neither to cut nor to join datagrams; WriteBatch
	// cuts by itself then.
	Plain bool
	Wait  string // as in tap.Options

	shared bool // with sockets of ours that have the port
}

// OpenUDPs is OpenUDP with n times the sockets, between which the kernel shares
// the datagrams out (SO_REUSEPORT): number k, from 0, gets the ESP packets of SPIs
// that leave k when divided by the number of what it returns, the first also what
// is no ESP. So one reader has all packets of an SA, in order; only where packets
// of several SAs arrive joined to one train (UDP_GRO) all go the way of the first.
// A kernel that cannot gives one, and the log's line of Fallbacks.
func (w *Wire) OpenUDPs(n int, o UDPOptions) ([]*UDP, error) {
	first, err := w.OpenUDP(o)
	us := []*UDP{first}
	if err != nil || n <= 1 {
		return us, err
	}
	undo := func(why error) ([]*UDP, error) {
		for _, u := range us {
			u.Close()
		}
		w.fellBack("SO_REUSEPORT", "one socket", why)
		o.shared = false
		one, err := w.OpenUDP(o)
		return []*UDP{one}, err
	}
	// Only now, when the port is known to be ours alone.
	if err := first.each(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); err != nil {
		return undo(os.NewSyscallError("SO_REUSEPORT", err))
	}
	o.shared = true
	for len(us) < n {
		u, err := w.OpenUDP(o)
		if err != nil {
			return undo(err)
		}
		us = append(us, u)
	}
	if err := first.each(func(fd int) error { return shareBySPI(fd, n) }); err != nil {
		return undo(os.NewSyscallError("SO_ATTACH_REUSEPORT_CBPF", err))
	}
	return us, nil
}

// each calls f for the sockets.
func (u *UDP) each(f func(fd int) error) error {
	for i := range u.socks {
		if u.socks[i].file == nil {
			continue
		}
		var err error
		if e := u.socks[i].raw.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil || err != nil {
			return errors.Join(e, err)
		}
	}
	return nil
}

// shareBySPI has the kernel choose among the n sockets of fd's port by the first
// four octets of the payload: the SPI, or the non-ESP marker, 0. What is shorter
// goes to the first.
func shareBySPI(fd, n int) error {
	f := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(n)},
		{Code: unix.BPF_RET | unix.BPF_A},
	}
	p := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &p)
}

// OpenUDP binds the port, for packets that arrive at the interface for any of
// this host's addresses. If another process has it, the error wraps ErrPortTaken.
func (w *Wire) OpenUDP(o UDPOptions) (*UDP, error) {
	if o.Port == 0 {
		o.Port = portNATT
	}
	u := &UDP{w: w, port: o.Port}
	var fds []int
	for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := u.open(i, family, o)
		if err != nil {
			u.Close()
			return nil, fmt.Errorf("%s: udp port %d: %w", w.name, o.Port, err)
		}
		if fd >= 0 {
			fds = append(fds, fd)
		}
	}
	var err error
	if u.wait, err = linger.New(o.Wait, fds...); err != nil {
		u.Close()
		return nil, err
	}
	return u, nil
}

// open returns the socket's descriptor, -1 if the host lacks the family.
func (u *UDP) open(i, family int, o UDPOptions) (int, error) {
	if lack := u.w.options.lack("SO_REUSEPORT"); o.shared && lack != nil {
		return -1, lack
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == unix.EAFNOSUPPORT {
		return -1, nil
	}
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	s := &u.socks[i]
	s.family = family
	if s.file, err = linger.Open(fd, "udp"); err != nil {
		return -1, err
	}
	if err := u.w.mark(fd); err != nil {
		return -1, err
	}
	// The kernel's path MTU is what we have told it, of packets before they are protected.
	discover := unix.IP_PMTUDISC_DO // the same number in IPv6
	if u.w.options.Mark != 0 {
		discover = unix.IP_PMTUDISC_PROBE
	}
	u.out.discover = discover
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return -1, err
	}
	s.recv = func(fd uintptr) {
		for u.receive(fd, s) {
		}
	}
	s.send = func(fd uintptr) { u.out.transmit(fd, family) }
	if _, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT); err == nil && !o.Plain {
		s.segment = true
	}
	opts := [][3]int{
		{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1},
		{unix.IPPROTO_IP, unix.IP_PKTINFO, 1},
		{unix.IPPROTO_IP, unix.IP_RECVTOS, 1},
		{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, discover},
		{unix.IPPROTO_IP, unix.IP_TTL, hopLimit},
	}
	var any unix.Sockaddr = &unix.SockaddrInet4{Port: int(o.Port)}
	if family == unix.AF_INET6 {
		opts = [][3]int{
			{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, discover},
			{unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, hopLimit},
			// RFC 6935: zero is allowed in a tunnel; the ICV decides.
			{unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX, 1},
		}
		any = &unix.SockaddrInet6{Port: int(o.Port)}
	}
	if o.shared {
		opts = append(opts, [3]int{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1})
	}
	if o.GRO && !o.Plain && unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil {
		u.gro = true
	}
	for _, p := range opts {
		if err := unix.SetsockoptInt(fd, p[0], p[1], p[2]); err != nil {
			return -1, fmt.Errorf("setsockopt %v: %w", p, err)
		}
	}
	if err := unix.BindToDevice(fd, u.w.name); err != nil {
		return -1, privilege("SO_BINDTODEVICE", "CAP_NET_RAW", err)
	}
	if err := receiveBufferOf(fd, burstBuffer); err != nil {
		return -1, err
	}
	sendBuffer(fd)
	if err := unix.Bind(fd, any); err != nil {
		if err == unix.EADDRINUSE {
			return -1, ErrPortTaken
		}
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

// Close ends ReadBatch with os.ErrClosed.
func (u *UDP) Close() error {
	u.closeOnce.Do(func() {
		if u.wait != nil {
			u.wait.Close()
		}
		for i := range u.socks {
			if f := u.socks[i].file; f != nil {
				f.Close()
			}
		}
	})
	return nil
}

// ReadBatch implements UDPConn.
func (u *UDP) ReadBatch(ds []Datagram) (int, error) {
	if len(ds) == 0 {
		return 0, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for {
		if !u.alone {
			if n, err := u.read(ds); n > 0 || err != nil {
				return n, err
			}
		}
		if err := u.Await(); err != nil {
			return 0, err
		}
	}
}

// TryBatch is ReadBatch that does not wait: with no datagram it returns 0, and
// Await is what waits. Neither is called beside ReadBatch, nor by two goroutines at
// a time.
func (u *UDP) TryBatch(ds []Datagram) (int, error) {
	if u.alone {
		u.alone = false
		return 0, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.read(ds)
}

// Await returns when TryBatch is worth a call. Its errors are ReadBatch's.
func (u *UDP) Await() error {
	u.alone = false
	if u.wait.Block() != nil {
		return os.ErrClosed
	}
	return nil
}

// Join makes the reader a member of a group, where serve is called when TryBatch is
// worth it while the reader is in Await: see linger.Wait.
func (u *UDP) Join(g *linger.Group, serve func() bool) error {
	return u.wait.Join(g, func() bool {
		u.alone = false
		return serve()
	})
}

// read takes the datagrams that are there.
func (u *UDP) read(ds []Datagram) (int, error) {
	limit := maxBatch
	if u.wait.Lone() {
		limit = 1 // to prepare for more takes longer than to receive one
	}
	u.ds, u.n, u.err = ds[:min(len(ds), limit)], 0, nil
	u.receiveAny()
	u.alone = u.n > 0 && u.alone
	u.m.release(len(u.ds))
	u.ds = nil
	if u.n > 0 {
		return u.n, nil // an error will come again
	}
	return 0, u.err
}

// receiveAny reads from the socket that had something last, and if that is none
// or has had its share, from the other.
func (u *UDP) receiveAny() {
	for range u.socks {
		if s := &u.socks[u.turn]; s.file != nil {
			if s.raw.Control(s.recv) != nil {
				u.err = os.ErrClosed
			}
			if u.n > 0 {
				if u.share++; u.share%udpShare == 0 {
					u.turn = 1 - u.turn
				}
				u.alone = u.wait.Got()
				return
			}
		}
		u.turn = 1 - u.turn
	}
}

// receive reads one batch; it reports whether all of that was shed.
func (u *UDP) receive(fd uintptr, s *udpSocket) (again bool) {
	for i := u.n; i < len(u.ds); i++ {
		d := &u.ds[i]
		if d.Off < 0 || d.Off >= len(d.Buf) {
			u.err = errHeadroom
			return false
		}
		u.m.set(i, d.Buf[d.Off:])
		u.m.wantName(i)
		u.m.wantOOB(i)
	}
	from := u.n
	n, errno := u.m.recv(fd, from, len(u.ds))
	more := errno == 0 && from+n == len(u.ds) && n > 1
	s.stands(int(fd), more)
	if errno != 0 {
		s.aged = time.Time{}
		// ICMP errors about what we sent come here; the next call goes on.
		return false
	}
	now, late := time.Now(), false
	for i := from; i < from+n; i++ {
		if u.m.truncated(i) {
			u.truncated.Add(1)
			continue
		}
		d := &u.ds[i]
		d.Len = int(u.m.hdrs[i].n)
		d.Remote = u.m.name(i)
		d.Local, d.TOS, d.Segment = netip.AddrPort{}, 0, 0
		age := d.control(u.m.oobs[i][:u.m.hdrs[i].hdr.Controllen], now)
		if i == from {
			late = s.waited(now, age)
		}
		if late && age > stale && !d.isIKE() {
			u.shed.Add(uint64(d.count()))
			continue
		}
		d.Local = netip.AddrPortFrom(d.Local.Addr(), u.port)
		u.ds[u.n], *d = *d, u.ds[u.n]
		u.n++
	}
	if !more { // that was all: no queue stands
		s.aged = time.Time{}
	}
	u.messages.Add(uint64(n))
	return late && u.n == from
}

// waited notes how old the first message of a batch is, and reports whether older
// ones than stale are to be shed.
func (s *udpSocket) waited(now time.Time, age time.Duration) bool {
	switch {
	case age <= stale:
		s.aged = time.Time{}
	case s.aged.IsZero():
		s.aged = now
	default:
		return now.Sub(s.aged) > staleFor
	}
	return false
}

// isIKE: it has the non-ESP marker (RFC 3948, 2.2).
func (d *Datagram) isIKE() bool {
	return d.Len >= 4 && binary.BigEndian.Uint32(d.Buf[d.Off:]) == 0
}

// count is how many datagrams d is.
func (d *Datagram) count() int {
	if d.Segment == 0 {
		return 1
	}
	return (d.Len + d.Segment - 1) / d.Segment
}

// stands notes whether more is waiting, and shrinks or restores the buffer.
func (s *udpSocket) stands(fd int, more bool) {
	switch {
	case !more:
		s.since = time.Time{}
		if s.small && time.Since(s.stood) > recovery {
			s.small = receiveBufferOf(fd, burstBuffer) != nil
		}
	case s.since.IsZero():
		s.since = time.Now()
	case time.Since(s.since) > standing:
		s.stood = time.Now()
		if !s.small {
			s.small = receiveBufferOf(fd, standingBuffer) == nil
		}
	}
}

// control reads the control messages of a datagram received, and returns how long
// ago that was.
func (d *Datagram) control(b []byte, now time.Time) (age time.Duration) {
	for len(b) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(b) {
			return age
		}
		v := b[unix.CmsgLen(0):n]
		switch {
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SCM_TIMESTAMPNS && len(v) >= int(unsafe.Sizeof(unix.Timespec{})):
			age = time.Duration(now.UnixNano() - (*unix.Timespec)(unsafe.Pointer(&v[0])).Nano())
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(v) >= 12:
			d.Local = netip.AddrPortFrom(netip.AddrFrom4([4]byte(v[8:12])), 0)
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TOS && len(v) >= 1:
			d.TOS = v[0]
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(v) >= 20:
			d.Local = netip.AddrPortFrom(netip.AddrFrom16([16]byte(v[:16])), 0)
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_TCLASS && len(v) >= 4:
			d.TOS = uint8(*(*int32)(unsafe.Pointer(&v[0])))
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(v) >= 4:
			if s := int(*(*int32)(unsafe.Pointer(&v[0]))); s < d.Len {
				d.Segment = s
			}
		}
		b = b[min(len(b), unix.CmsgSpace(n-unix.CmsgLen(0))):]
	}
	return age
}
