package wire

import (
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxSegments is what every kernel with UDP_SEGMENT cuts one message into.
	maxSegments = 64
	// maxUDPPayload is the largest payload of one message over either family.
	maxUDPPayload = 65535 - 20 - 8
	// segmentRetry is how long a socket whose kernel or device has refused to
	// cut messages is not asked again.
	segmentRetry = time.Minute
)

// udpOut is the sending half of a UDP.
type udpOut struct {
	mu     sync.Mutex
	m      mmsg
	keys   [maxBatch]udpKey // what name and control of each message of m are for
	pieces [maxBatch]piece

	// Arguments and results of transmit.
	from, to int
	frag     bool
	discover int // what sockets do about path MTUs
	sent     int
	errno    syscall.Errno

	trains, singles, fallbacks, refused atomic.Uint64
}

// udpKey is what determines the address and the control messages of a message.
type udpKey struct {
	local, remote netip.AddrPort
	segment       int
	tos           uint8
}

// piece is what one message carries of a batch: n octets of datagram i's payload from off on.
type piece struct {
	i, off, n int
	train     bool // the kernel is to cut it
}

// UDPStats are counters since OpenUDP.
type UDPStats struct {
	Messages    uint64 // read; each of one datagram or several that the kernel joined
	Truncated   uint64 // longer than the caller's buffer
	KernelDrops uint64 // lost for want of socket buffer
	Shed        uint64 // datagrams that had become stale in it
	Trains      uint64 // messages sent that the kernel cut into datagrams
	Singles     uint64 // messages sent of one datagram
	Fallbacks   uint64 // trains that the kernel refused to cut; sent as singles
	Refused     uint64 // messages that did not leave
}

// Stats returns the counters.
func (u *UDP) Stats() UDPStats {
	o := &u.out
	s := UDPStats{
		Messages: u.messages.Load(), Truncated: u.truncated.Load(), Shed: u.shed.Load(),
		Trains: o.trains.Load(), Singles: o.singles.Load(), Fallbacks: o.fallbacks.Load(), Refused: o.refused.Load(),
	}
	for i := range u.socks {
		if u.socks[i].file != nil {
			u.socks[i].raw.Control(func(fd uintptr) { s.KernelDrops += uint64(socketDrops(int(fd))) })
		}
	}
	return s
}

// SumUDP adds the counters of several up.
func SumUDP(us []*UDP) (sum UDPStats) {
	for _, u := range us {
		s := u.Stats()
		sum.Messages += s.Messages
		sum.Truncated += s.Truncated
		sum.KernelDrops += s.KernelDrops
		sum.Shed += s.Shed
		sum.Trains += s.Trains
		sum.Singles += s.Singles
		sum.Fallbacks += s.Fallbacks
		sum.Refused += s.Refused
	}
	return sum
}

// Path says how datagrams are sent and received at present.
func (u *UDP) Path() (in, out string) {
	in, out = "socket", "socket"
	if u.gro {
		in = "socket, UDP_GRO"
	}
	u.out.mu.Lock()
	defer u.out.mu.Unlock()
	for i := range u.socks {
		if s := &u.socks[i]; s.file != nil && s.segment && !time.Now().Before(s.after) {
			out = "socket, UDP_SEGMENT"
		}
	}
	return in, out
}

// WriteBatch implements UDPConn. A train of segments (Datagram.Segment) that
// the kernel will not cut leaves as single datagrams, now and for a minute. If
// some datagrams of a train are refused the rest of it is sent all the same.
func (u *UDP) WriteBatch(ds []Datagram) (int, error) {
	o := &u.out
	o.mu.Lock()
	defer o.mu.Unlock()
	filled := 0
	defer func() { o.m.release(filled) }()
	at, single := piece{}, -1 // where to go on; the train that the kernel must not cut
	badAt, lost, why := len(ds), 0, syscall.Errno(0)
	for at.i < min(len(ds), badAt+1) { // what comes behind ds[badAt] is the caller's
		family, n := u.fill(ds[:min(len(ds), badAt+1)], at, single)
		filled = max(filled, n)
		if n == 0 {
			o.refused.Add(1)
			return at.i, &SendError{Dst: ds[at.i].Remote.Addr(), Err: unix.EINVAL, Lost: 1}
		}
		if err := u.transmitOn(family, 0, n, false); err != nil {
			return at.i, err
		}
		sent := o.sent
		if sent < n {
			p, errno := o.pieces[sent], o.errno
			switch d := &ds[p.i]; {
			case p.train && (errno == unix.EIO || errno == unix.EINVAL):
				// The device or this kernel cannot.
				u.socks[family].after = time.Now().Add(segmentRetry)
				o.fallbacks.Add(1)
				u.w.fellBack("UDP_SEGMENT", "single datagrams", errno)
			case p.train && errno == unix.EMSGSIZE:
				// The path became narrower, for this peer.
				single = p.i
				o.fallbacks.Add(1)
			default:
				if errno == unix.EMSGSIZE && d.DontFragment {
					u.w.pmtu.doubt(d.Remote.Addr(), time.Now())
				} else if errno == unix.EMSGSIZE {
					if err := u.transmitOn(family, sent, sent+1, true); err != nil {
						return p.i, err
					}
					errno = o.errno
				}
				if errno != 0 {
					o.refused.Add(1)
					badAt, why = p.i, errno
					lost += p.datagrams(d)
				}
				sent++
			}
		}
		if sent > 0 {
			at = o.pieces[sent-1].behind(ds)
		}
	}
	if badAt < len(ds) {
		return badAt, &SendError{Dst: ds[badAt].Remote.Addr(), Err: why, Lost: lost}
	}
	return len(ds), nil
}

// behind is where to go on after p.
func (p piece) behind(ds []Datagram) piece {
	if p.off+p.n < ds[p.i].Len {
		return piece{i: p.i, off: p.off + p.n}
	}
	return piece{i: p.i + 1}
}

// datagrams in p.
func (p piece) datagrams(d *Datagram) int {
	if p.train {
		return (p.n + d.Segment - 1) / d.Segment
	}
	return 1
}

// fill puts the datagrams from at on, of one family, into messages. Of train
// number single each datagram becomes a message. n = 0: ds[at.i] is malformed.
func (u *UDP) fill(ds []Datagram, at piece, single int) (family, n int) {
	o := &u.out
	cuts := false
	for i := at.i; i < len(ds); i++ {
		d := &ds[i]
		if !d.valid() {
			return family, n
		}
		f := 0
		if d.Remote.Addr().Is6() {
			f = 1
		}
		if n == 0 {
			family, cuts = f, u.socks[f].cuts()
		} else if f != family {
			return family, n
		}
		step := max(d.Len, 1)
		if d.Segment > 0 && d.Segment < d.Len {
			step = d.Segment
			if cuts && i != single {
				step *= min(maxSegments, max(1, maxUDPPayload/step))
			}
		}
		for off := at.off; n < maxBatch; off += step {
			p := piece{i: i, off: off, n: min(step, d.Len-off)}
			p.train = d.Segment > 0 && p.n > d.Segment
			o.put(n, d, p, uint32(u.w.index))
			n++
			if off+p.n == d.Len {
				break
			}
		}
		if n == maxBatch {
			break
		}
		at.off = 0
	}
	return family, n
}

func (d *Datagram) valid() bool {
	a := d.Local.Addr()
	return d.Remote.IsValid() && d.Off >= 0 && d.Len >= 0 && d.Off+d.Len <= len(d.Buf) && d.Segment >= 0 && d.Segment <= maxUDPPayload &&
		(!a.IsValid() || a.Is4() == d.Remote.Addr().Is4())
}

// cuts reports whether the kernel is to be asked to cut trains.
func (s *udpSocket) cuts() bool {
	return s.segment && (s.after.IsZero() || !time.Now().Before(s.after))
}

// put makes message k carry the piece p of d. Address and control messages stay
// from the last time if they are for the same.
func (o *udpOut) put(k int, d *Datagram, p piece, scope uint32) {
	b := d.Buf[d.Off+p.off : d.Off+p.off+p.n]
	o.m.iovs[k].Base = unsafe.SliceData(b)
	o.m.iovs[k].SetLen(len(b))
	o.pieces[k] = p
	key := udpKey{local: d.Local, remote: d.Remote, tos: d.TOS}
	if p.train {
		key.segment = d.Segment
	}
	if o.keys[k] == key {
		return
	}
	o.keys[k] = key
	o.m.set(k, b)
	o.m.setName(k, d.Remote, scope)
	o.m.setOOB(k, key.appendControl(o.m.oobs[k][:]))
}

// appendControl writes the control messages of a message to be sent; it
// returns their length.
func (d *udpKey) appendControl(b []byte) int {
	n := 0
	put := func(level, kind int32, size int) []byte {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[n]))
		clear(b[n : n+unix.CmsgSpace(size)])
		h.Level, h.Type = level, kind
		h.SetLen(unix.CmsgLen(size))
		v := b[n+unix.CmsgLen(0) : n+unix.CmsgLen(size)]
		n += unix.CmsgSpace(size)
		return v
	}
	if a := d.local.Addr(); a.Is4() && !a.IsUnspecified() {
		v := a.As4()
		copy(put(unix.IPPROTO_IP, unix.IP_PKTINFO, 12)[4:], v[:])
	} else if a.Is6() && !a.IsUnspecified() {
		v := a.As16()
		copy(put(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, 20), v[:])
	}
	if d.tos != 0 {
		level, kind := int32(unix.IPPROTO_IP), int32(unix.IP_TOS)
		if d.remote.Addr().Is6() {
			level, kind = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
		}
		*(*int32)(unsafe.Pointer(&put(level, kind, 4)[0])) = int32(d.tos)
	}
	if d.segment != 0 {
		*(*uint16)(unsafe.Pointer(&put(unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)[0])) = uint16(d.segment)
	}
	return n
}

func (u *UDP) transmitOn(family, from, to int, frag bool) error {
	o := &u.out
	s := &u.socks[family]
	o.from, o.to, o.frag = from, to, frag
	if s.file == nil {
		o.sent, o.errno = 0, unix.EAFNOSUPPORT
		return nil
	}
	if err := s.raw.Control(s.send); err != nil {
		return os.ErrClosed
	}
	for _, p := range o.pieces[from : from+o.sent] {
		if p.train {
			o.trains.Add(1)
		} else {
			o.singles.Add(1)
		}
	}
	return nil
}

// transmit sends messages [from, to) until one is refused. With frag the kernel
// may fragment, for which there is only a switch on the socket.
func (o *udpOut) transmit(fd uintptr, family int) {
	if o.frag {
		fragmentation(fd, family, unix.IP_PMTUDISC_DONT)
		defer fragmentation(fd, family, o.discover)
	}
	o.sent, o.errno = 0, 0
	for at := o.from; at < o.to; at = o.from + o.sent {
		n, errno := o.m.send(fd, at, o.to)
		if errno != 0 {
			if errno == unix.EAGAIN {
				errno = unix.ENOBUFS
			}
			o.errno = errno
			return
		}
		o.sent += n
	}
}

// fragmentation sets what a socket does about path MTUs; the values are the same
// in IPv6.
func fragmentation(fd uintptr, family, v int) {
	level, opt := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if family == unix.AF_INET6 {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	unix.SetsockoptInt(int(fd), level, opt, v)
}

// socketDrops is how many messages a socket had no room for.
func socketDrops(fd int) uint32 {
	const memDrops = 8 // SK_MEMINFO_DROPS
	var mem [9]uint32
	n := uint32(unsafe.Sizeof(mem))
	_, _, errno := syscall.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&mem)), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 || n < uint32(unsafe.Sizeof(mem)) {
		return 0
	}
	return mem[memDrops]
}
