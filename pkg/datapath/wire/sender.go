package wire

import (
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// sender is one raw socket per family, bound to the interface: the kernel
// looks routes up over this interface only, so those into the TAP do not catch
// its packets, and does the neighbour's part.
type sender struct {
	file  [2]*os.File // IPv4, IPv6; nil where the host lacks the family
	raw   [2]syscall.RawConn
	scope uint32
	fn    func(uintptr) bool

	mu       sync.Mutex // arguments and results of fn
	m        mmsg
	from, to int
	sent     int
	errno    syscall.Errno

	ok, tooBig, noBufs, denied, other atomic.Uint64
}

func (s *sender) open(ifname string, index int) error {
	s.scope = uint32(index)
	s.fn = s.write
	for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
		if err == unix.EAFNOSUPPORT {
			continue
		}
		if err != nil {
			return privilege("raw socket", "CAP_NET_RAW", err)
		}
		s.file[i] = os.NewFile(uintptr(fd), "raw")
		if err := configureRaw(fd, family, ifname); err != nil {
			return err
		}
		if s.raw[i], err = s.file[i].SyscallConn(); err != nil {
			return err
		}
	}
	return nil
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

func (s *sender) close() {
	for _, f := range s.file {
		if f != nil {
			f.Close()
		}
	}
}

// WriteBatch implements Conn. An IPv4 identification of 0 becomes one of the
// kernel's choice, and the header checksum is made by the kernel.
func (w *Wire) WriteBatch(ps []Packet) (int, error) {
	s := &w.sender
	s.mu.Lock()
	defer s.mu.Unlock()
	done := 0
	for done < len(ps) {
		family, n := s.fill(ps[done:min(len(ps), done+maxBatch)])
		var errno syscall.Errno
		sent := 0
		if n > 0 {
			s.from, s.to = 0, n
			if s.raw[family] == nil {
				errno = unix.EAFNOSUPPORT
			} else if err := s.raw[family].Write(s.fn); err != nil {
				s.m.release(maxBatch)
				return done, w.gone(err)
			} else {
				sent, errno = s.sent, s.errno
			}
		} else {
			errno = unix.EINVAL
		}
		s.ok.Add(uint64(sent))
		done += sent
		if errno != 0 {
			s.m.release(maxBatch)
			s.count(errno)
			if errno == unix.ENODEV || errno == unix.ENXIO {
				if lost := w.Err(); lost != nil {
					return done, lost
				}
			}
			return done, &SendError{Dst: destination(&ps[done]), Err: errno, Lost: 1}
		}
	}
	s.m.release(maxBatch)
	return done, nil
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
		if p.Offload.NeedsCsum {
			if p.Off < etherLen || !tap.FinishChecksum(p.Buf[p.Off-etherLen:p.Off+p.Len], p.Offload) {
				return family, i
			}
			p.Offload = tap.Offload{}
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
func (s *sender) write(fd uintptr) bool {
	s.sent, s.errno = 0, 0
	for s.from < s.to {
		n, errno := s.m.send(fd, s.from, s.to)
		if errno != 0 {
			if errno == unix.EAGAIN {
				errno = unix.ENOBUFS
			}
			s.errno = errno
			return true
		}
		s.from += n
		s.sent += n
	}
	return true
}
