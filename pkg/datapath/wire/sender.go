package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// Values of Options.Native.
const (
	NativeAuto   = "auto"   // the best that works
	NativeXDP    = "xdp"    // AF_XDP
	NativePacket = "packet" // AF_PACKET
	NativeRaw    = "raw"    // raw IP sockets only
)

// sender has up to three ways out of the interface. Raw sockets, one per family
// and bound to the interface, can send everything: the kernel looks routes up
// over this interface only, so those into the TAP do not catch its packets, and
// does the neighbour's part. AF_XDP and AF_PACKET sockets are cheaper, pass by
// the host's packet filter, and take only what needs nothing of the kernel:
// whole packets to a neighbour that is known (hops).
type sender struct {
	w     *Wire
	mode  string
	scope uint32
	hops  *hops // nil: raw sockets only

	mu     sync.Mutex // what follows
	xdp    *xdp       // nil: not in use at present
	packet *packetOut // likewise
	way    way        // of the batch
	watch  watch
	hop    hop
	id     uint16

	file     [2]*os.File // IPv4, IPv6; nil where the host lacks the family
	raw      [2]syscall.RawConn
	fn       func(uintptr)
	m        mmsg
	from, to int // arguments and results of fn
	sent     int
	errno    syscall.Errno

	closed   bool
	kicker   *time.Timer // for what a slow device has left in the ring
	reopener *time.Timer // for ways that the device has closed
	attempts int         // of the latter

	ok, byXDP, byPacket, tooBig, noBufs, denied, other atomic.Uint64
}

func (s *sender) open(w *Wire, mode string) error {
	s.w, s.mode, s.scope = w, mode, uint32(w.index)
	s.fn = s.write
	s.id = uint16(rand.Uint32())
	for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err == unix.EAFNOSUPPORT {
			continue
		}
		if err != nil {
			return privilege("raw socket", "CAP_NET_RAW", err)
		}
		if s.file[i], err = linger.Open(fd, "raw"); err != nil {
			return err
		}
		if err := configureRaw(fd, family, w.name); err != nil {
			return err
		}
		if err := w.mark(fd); err != nil {
			return err
		}
		if s.raw[i], err = s.file[i].SyscallConn(); err != nil {
			return err
		}
	}
	if mode == NativeRaw {
		return nil
	}
	s.kicker, s.reopener = time.AfterFunc(time.Hour, s.kickAgain), time.AfterFunc(time.Hour, s.reopen)
	s.kicker.Stop()
	s.reopener.Stop()
	var err error
	if s.hops, err = openHops(w.index, w.options.Filter); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watch.open(w.index, w.reader.raw)
	for range busyRetries {
		if err = s.openFast(w.link.Load()); err == nil || !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(busyPause)
	}
	if err != nil && mode != NativeAuto {
		return fmt.Errorf("--native %s: %w", mode, err)
	}
	s.giveUp(err)
	return nil
}

// The kernel takes a moment to give back the queue of an AF_XDP socket that was
// closed, and be it with the process that had it.
const (
	busyRetries = 20
	busyPause   = 5 * time.Millisecond
)

// openFast opens what the mode wants, the link allows, and is not open. The
// error is AF_XDP's if that is to be, else AF_PACKET's.
func (s *sender) openFast(l *Link) (err error) {
	s.hops.setLink(l.MAC, l.Up)
	if !l.Up {
		return nil
	}
	if s.packet == nil && s.mode != NativeXDP {
		if err = s.w.options.lack("AF_PACKET"); err == nil {
			s.packet, err = openPacketOut(s.w)
		}
	}
	if s.xdp == nil && s.mode != NativePacket {
		if err = s.w.options.lack("AF_XDP"); err == nil {
			s.xdp, err = openXDP(s.w.index, l.MTU+etherLen)
		}
	}
	return err
}

// giveUp tells of a way that is not to be had at present, and why; nil: it is.
func (s *sender) giveUp(err error) {
	s.attempts = 0
	switch {
	case err == nil:
		return
	case s.packet != nil && s.mode != NativePacket:
		s.w.fellBack("AF_XDP", "AF_PACKET", err)
	default:
		s.w.fellBack(s.mode, "raw sockets", err)
	}
	if errors.Is(err, unix.EBUSY) { // perhaps the other program ends
		s.reopener.Reset(reopenLast)
	}
}

// Pauses between attempts to open a way again that the device has closed.
const (
	reopenFirst = 20 * time.Millisecond
	reopenLast  = 10 * time.Second
)

func (s *sender) reopen() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	err := s.openFast(s.w.link.Load())
	if pause := reopenFirst << s.attempts; err != nil && errors.Is(err, unix.EBUSY) && pause < reopenLast {
		s.attempts++
		s.reopener.Reset(pause)
		return
	}
	s.giveUp(err)
}

// mark puts the mark of the options on a socket.
func (w *Wire) mark(fd int) error {
	if w.options.Mark == 0 {
		return nil
	}
	return privilege("SO_MARK", "CAP_NET_ADMIN", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(w.options.Mark)))
}

func configureRaw(fd, family int, ifname string) error {
	if err := unix.BindToDevice(fd, ifname); err != nil {
		return privilege("SO_BINDTODEVICE", "CAP_NET_RAW", err)
	}
	sendBuffer(fd)
	// Nothing is received on IPPROTO_RAW but errors about what we send, which
	// only RECVERR lets sendmsg report (ENOBUFS); their queue stays short.
	opts := [][3]int{{unix.SOL_SOCKET, unix.SO_RCVBUF, 0}, {unix.SOL_SOCKET, unix.SO_BROADCAST, 1}}
	if family == unix.AF_INET {
		opts = append(opts, [][3]int{
			{unix.IPPROTO_IP, unix.IP_HDRINCL, 1},
			{unix.IPPROTO_IP, unix.IP_RECVERR, 1},
			// The stack has looped multicast back when it sent it to the TAP.
			{unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP, 0},
		}...)
	} else {
		opts = append(opts, [][3]int{
			{unix.IPPROTO_IPV6, unix.IPV6_HDRINCL, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1},
			{unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_LOOP, 0},
		}...)
	}
	for _, o := range opts {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return fmt.Errorf("setsockopt %v: %w", o, err)
		}
	}
	return nil
}

// linkChanged adapts to a new state of the interface. A socket whose device was
// down in between is not trusted with what it had left.
func (s *sender) linkChanged(l *Link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hops == nil || s.closed {
		return
	}
	if s.xdp != nil && (!l.Up || !s.xdp.fits(l.MTU+etherLen)) {
		s.closeXDP()
	}
	s.hops.setLink(l.MAC, l.Up)
	s.attempts = 0
	s.reopener.Reset(0)
}

// closeXDP gives the socket up, with the packets that the device was too slow for.
func (s *sender) closeXDP() {
	s.noBufs.Add(uint64(s.xdp.pending()))
	s.xdp.close()
	s.xdp = nil
}

func (s *sender) close() {
	for _, t := range []*time.Timer{s.kicker, s.reopener} {
		if t != nil {
			t.Stop()
		}
	}
	if s.hops != nil {
		s.hops.close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.watch.close()
	if s.xdp != nil {
		s.closeXDP()
	}
	if s.packet != nil {
		s.packet.close()
		s.packet = nil
	}
	for _, f := range s.file {
		if f != nil {
			f.Close()
		}
	}
}

// Path says how native packets come in and leave at present.
func (w *Wire) Path() (in, out string) {
	in = "packet socket"
	if w.reader.ringed {
		in = "packet ring"
	}
	s := &w.sender
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.choose() {
	case wayXDP:
		return in, "AF_XDP"
	case wayPacket:
		if s.packet.bypasses {
			return in, "packet socket"
		}
		return in, "packet socket, through the queueing discipline" // or for a capture
	}
	return in, "raw socket"
}

// way is which of the fast ways a batch may take.
type way uint8

const (
	wayRaw way = iota
	wayXDP
	wayPacket
)

// choose finds the way for a batch. Where the administrator shapes what leaves,
// or somebody captures, packets go through the interface's queueing discipline
// in the sight of captures, unless he asked for AF_XDP.
func (s *sender) choose() way {
	if s.hops == nil {
		return wayRaw
	}
	open := s.mode == NativeXDP || !s.hops.shaped.Load() && !s.watch.look()
	switch {
	case s.xdp != nil && open:
		return wayXDP
	case s.packet != nil:
		s.packet.bypass(open)
		return wayPacket
	}
	return wayRaw
}

// WriteBatch implements Conn. An IPv4 identification of 0 in a packet that may
// be fragmented becomes one of the sender's choice, and the header checksum is
// made. What a driver drops after a fast way has handed it over is counted in
// Stats alone.
func (w *Wire) WriteBatch(ps []Packet) (int, error) {
	s := &w.sender
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.m.release(maxBatch)
	mtu := w.link.Load().MTU
	s.way = s.choose()
	done := 0
	for done < len(ps) {
		if s.fits(&ps[done], mtu) {
			n, errno := s.writeFast(ps[done:], mtu)
			if done += n; errno != 0 {
				return s.refused(ps, done, errno)
			}
			continue
		}
		n := 1
		for n < maxBatch && done+n < len(ps) && !s.fits(&ps[done+n], mtu) {
			n++
		}
		n, errno, err := s.writeRaw(ps[done : done+n])
		if done += n; err != nil {
			return done, err
		}
		if errno != 0 {
			return s.refused(ps, done, errno)
		}
	}
	return done, nil
}

// fits reports whether a packet may go a fast way, and finds its header, s.hop,
// then. Everything odd is the kernel's, which then says what is wrong with it.
func (s *sender) fits(p *Packet, mtu int) bool {
	if s.way == wayRaw || p.Len > mtu || p.Offload.GSOType != tap.GSONone {
		return false
	}
	dst := destination(p)
	if !dst.IsValid() || !unicast(p.Buf[p.Off:p.Off+p.Len], dst) || s.way == wayXDP && !s.xdp.fits(etherLen+p.Len) {
		return false
	}
	return s.hops.find(dst, &s.hop) && p.finish()
}

// finish makes a transport checksum that the sending stack left to the device.
func (p *Packet) finish() bool {
	if !p.Offload.NeedsCsum {
		return true
	}
	if p.Off < etherLen || !tap.FinishChecksum(p.Buf[p.Off-etherLen:p.Off+p.Len], p.Offload) {
		return false
	}
	p.Offload = tap.Offload{}
	return true
}

// finish4 completes an IPv4 header as the kernel does one from a raw socket.
func (s *sender) finish4(b []byte) {
	if b[0]>>4 != 4 {
		return
	}
	const df = 0x40
	if b[4] == 0 && b[5] == 0 && b[6]&df == 0 { // RFC 6864, 4: else it means nothing
		s.id = max(s.id+1, 1)
		binary.BigEndian.PutUint16(b[4:], s.id)
	}
	sum := uint64(^binary.BigEndian.Uint16(b[10:])) // takes away what is there (RFC 1624)
	for h := b[:int(b[0]&15)*4]; len(h) >= 4; h = h[4:] {
		sum += uint64(binary.BigEndian.Uint32(h))
	}
	sum = sum>>32 + sum&0xffffffff
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
}

// writeFast sends ps[0], which fits, and what follows as far as it fits, too.
// It returns how many it handed over, and why not the next one, if it is to be
// given up.
func (s *sender) writeFast(ps []Packet, mtu int) (int, syscall.Errno) {
	if s.way == wayPacket {
		return s.writePacket(ps, mtu)
	}
	n := 0
	for n < len(ps) && (n == 0 || s.fits(&ps[n], mtu)) {
		p := &ps[n]
		b := p.Buf[p.Off : p.Off+p.Len]
		s.finish4(b)
		if !s.xdp.put(&s.hop.header, b) {
			break
		}
		n++
	}
	lost, err := s.kick(n)
	if n -= lost; n > 0 {
		s.ok.Add(uint64(n))
		s.byXDP.Add(uint64(n))
	}
	if n == 0 && err == nil {
		return 0, unix.ENOBUFS
	}
	return n, 0
}

// kick has the AF_XDP socket send. If that is of no use any more, it is closed,
// and the last of n packets, so many as it still had, are to go another way.
func (s *sender) kick(n int) (lost int, err error) {
	x := s.xdp
	if err = x.kick(); err != nil {
		lost = min(n, x.pending())
		s.noBufs.Add(uint64(x.pending() - lost))
	}
	s.noBufs.Add(x.dropped)
	x.dropped = 0
	if err != nil {
		x.close()
		s.xdp, s.way = nil, wayRaw
		s.reopener.Reset(reopenFirst)
	} else if x.pending() > 0 {
		s.kicker.Reset(kickEvery)
	}
	return lost, err
}

// kickEvery is how often a slow device is asked whether it has room again.
const kickEvery = time.Millisecond

func (s *sender) kickAgain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.xdp != nil {
		s.kick(0)
	}
}

func (s *sender) writePacket(ps []Packet, mtu int) (int, syscall.Errno) {
	o, n := s.packet, 0
	for n < min(len(ps), maxBatch) && (n == 0 || s.fits(&ps[n], mtu)) {
		p := &ps[n]
		b := p.Buf[p.Off : p.Off+p.Len]
		s.finish4(b)
		o.set(n, &s.hop.header, b)
		n++
	}
	n, errno := o.send(n)
	s.ok.Add(uint64(n))
	s.byPacket.Add(uint64(n))
	if errno == unix.ENETDOWN || errno == unix.ENXIO {
		// The raw sockets say what is the matter.
		o.close()
		s.packet, s.way, errno = nil, wayRaw, 0
		s.reopener.Reset(reopenFirst)
	}
	return n, errno
}

// writeRaw sends ps, at most maxBatch, as far as they are of one family.
func (s *sender) writeRaw(ps []Packet) (int, syscall.Errno, error) {
	family, n := s.fill(ps)
	if n == 0 {
		return 0, unix.EINVAL, nil
	}
	if s.raw[family] == nil {
		return 0, unix.EAFNOSUPPORT, nil
	}
	s.from, s.to = 0, n
	if err := s.raw[family].Control(s.fn); err != nil {
		return 0, 0, s.w.gone(err)
	}
	s.ok.Add(uint64(s.sent))
	return s.sent, s.errno, nil
}

func (s *sender) refused(ps []Packet, n int, errno syscall.Errno) (int, error) {
	s.count(errno)
	if errno == unix.ENODEV || errno == unix.ENXIO {
		if lost := s.w.Err(); lost != nil {
			return n, lost
		}
	}
	return n, &SendError{Dst: destination(&ps[n]), Err: errno, Lost: 1}
}
func (s *sender) count(errno syscall.Errno) {
	switch errno {
	case unix.EMSGSIZE:
		s.tooBig.Add(1)
	case unix.ENOBUFS, unix.EAGAIN:
		s.noBufs.Add(1)
	case unix.EPERM, unix.EACCES:
		s.denied.Add(1)
	default:
		s.other.Add(1)
	}
}

// fill puts the first packets of one family into messages; n = 0: ps[0] is
// nothing that can be sent.
func (s *sender) fill(ps []Packet) (family, n int) {
	for i := range ps {
		p := &ps[i]
		dst := destination(p)
		if !dst.IsValid() || p.Offload.GSOType != tap.GSONone {
			return family, i
		}
		if !p.finish() {
			return family, i
		}
		f := 0
		if dst.Is6() {
			f = 1
		}
		if i == 0 {
			family = f
		} else if f != family {
			return family, i
		}
		s.m.set(i, p.Buf[p.Off:p.Off+p.Len])
		s.m.setName(i, netip.AddrPortFrom(dst, 0), s.scope)
	}
	return family, len(ps)
}

const etherLen = 14

// destination of an IP packet; invalid if it is none.
func destination(p *Packet) netip.Addr {
	if p.Off < 0 || p.Len < 20 || p.Off+p.Len > len(p.Buf) {
		return netip.Addr{}
	}
	b := p.Buf[p.Off : p.Off+p.Len]
	switch {
	case b[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(b[16:20]))
	case b[0]>>4 == 6 && len(b) >= 40:
		return netip.AddrFrom16([16]byte(b[24:40]))
	}
	return netip.Addr{}
}

// write sends messages [from, to). It never waits: a full socket buffer is
// ENOBUFS, because a stuck neighbour must not hold up the others.
func (s *sender) write(fd uintptr) {
	s.sent, s.errno = 0, 0
	for s.from < s.to {
		n, errno := s.m.send(fd, s.from, s.to)
		if errno != 0 {
			if errno == unix.EAGAIN {
				errno = unix.ENOBUFS
			}
			s.errno = errno
			return
		}
		s.from += n
		s.sent += n
	}
}
