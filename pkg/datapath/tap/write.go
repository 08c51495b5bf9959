package tap

import (
	"encoding/binary"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/linger"
)

// writer is what one WriteBatch works with. The kernel takes each frame as a
// whole and keeps no lock across them, so callers need none either: each has a
// writer of its own while it writes, and its frames stay in its order.
type writer struct {
	q    *queue
	fs   []Frame
	n    int
	err  error
	full bool // the kernel had no room
	try  func(uintptr)
	seg  *Segmenter // from the first super-frame on that is cut here
}

// writers are those of a queue that nobody uses just now.
type writers struct {
	mu   sync.Mutex
	idle []*writer
}

// Kinds of super-frames.
const (
	kindTCP4 = iota
	kindTCP6
	kindUDP
	noKind
)

func (o *Offload) kind() int {
	switch o.GSOType &^ GSOECN {
	case GSOTCPv4:
		return kindTCP4
	case GSOTCPv6:
		return kindTCP6
	case GSOUDPL4:
		return kindUDP
	}
	return noKind
}

func (d *device) Super() Super {
	s := &d.super
	return Super{s[kindTCP4].Load(), s[kindTCP6].Load(), s[kindUDP].Load()}
}

func (d *device) Cut() uint64 { return d.cut.Load() }

func (q *queue) writer() *writer {
	ws := &q.writers
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if n := len(ws.idle); n > 0 {
		w := ws.idle[n-1]
		ws.idle = ws.idle[:n-1]
		return w
	}
	w := &writer{q: q}
	w.try = w.loop
	return w
}

func (w *writer) release() {
	w.fs = nil
	ws := &w.q.writers
	ws.mu.Lock()
	ws.idle = append(ws.idle, w)
	ws.mu.Unlock()
}

func (q *queue) WriteBatch(fs []Frame) (int, error) {
	if len(fs) == 0 {
		return 0, nil
	}
	w := q.writer()
	defer w.release()
	w.fs, w.n, w.err, w.full = fs, 0, nil, true
	for w.full { // while the kernel has no room: its bound is 2 GiB, so this is rare
		if err := q.raw.Control(w.try); err != nil {
			return w.n, q.d.failed(err)
		}
		if w.full {
			time.Sleep(linger.Busy)
		}
	}
	return w.n, q.d.fault(w.err)
}

// loop writes frames until the kernel has no room.
func (w *writer) loop(fd uintptr) {
	w.full = false
	for w.n < len(w.fs) {
		errno := w.write(fd, &w.fs[w.n])
		switch errno {
		case 0:
			w.n++
		case unix.EAGAIN:
			w.full = true
			return
		case unix.EINTR:
		default:
			w.err = errno
			return
		}
	}
}

func (w *writer) write(fd uintptr, f *Frame) syscall.Errno {
	d := w.q.d
	if f.Off < HeadroomMin || f.Len <= d.bare || f.Off+f.Len > len(f.Buf) {
		return unix.EINVAL
	}
	b := f.Buf[f.Off : f.Off+f.Len]
	kind := f.Offload.kind()
	switch {
	case !d.vnet && kind == noKind:
		if !FinishChecksum(b, f.Offload) {
			return unix.EINVAL
		}
		_, errno := rawIO(unix.SYS_WRITE, fd, b[d.bare:])
		return errno
	case d.vnet && (kind == noKind || d.super[kind].Load()):
		errno := w.whole(fd, f)
		if errno != unix.EINVAL || kind == noKind {
			return errno
		}
	}
	errno := w.cut(fd, b, f.Offload)
	if errno == 0 {
		// Nothing was wrong with it but that the kernel does not cut it.
		d.super[kind].Store(false)
		d.cut.Add(1)
	}
	return errno
}

// whole writes a frame with its metadata.
func (w *writer) whole(fd uintptr, f *Frame) syscall.Errno {
	start, o := f.Off+w.q.d.bare-vnetHdrLen, f.Offload
	if w.q.d.bare != 0 {
		o.CsumStart -= min(o.CsumStart, etherLen)
		o.HdrLen -= min(o.HdrLen, etherLen)
	}
	o.encode(f.Buf[start : start+vnetHdrLen])
	_, errno := rawIO(unix.SYS_WRITE, fd, f.Buf[start:f.Off+f.Len])
	return errno
}

// cut writes the super-frame b as its segments.
func (w *writer) cut(fd uintptr, b []byte, o Offload) syscall.Errno {
	if w.seg == nil {
		w.seg = new(Segmenter)
	}
	return w.seg.Each(b, o, func(f *Frame) syscall.Errno {
		start := f.Off + w.q.d.bare
		if w.q.d.vnet {
			start -= vnetHdrLen
			clear(f.Buf[start : start+vnetHdrLen]) // nothing is left to do
		}
		_, errno := rawIO(unix.SYS_WRITE, fd, f.Buf[start:f.Off+f.Len])
		return errno
	})
}

// probe finds out which super-frames the kernel takes. A device that is down takes
// none, but says EIO only after it has looked at the metadata.
func (d *device) probe() {
	if !d.vnet {
		return
	}
	w := d.queues[0].writer()
	defer w.release()
	s := probeSuper(d.bare != 0, func(f *Frame) syscall.Errno {
		errno := unix.EINVAL
		w.q.raw.Control(func(fd uintptr) { errno = w.whole(fd, f) })
		if errno == unix.EIO {
			return 0
		}
		return errno
	})
	for kind, ok := range []bool{kindTCP4: s.TCP4, kindTCP6: s.TCP6, kindUDP: s.UDP} {
		d.super[kind].Store(ok)
	}
}

// ProbeSuper finds out which super-frames the kernel takes by write. Linux 6.6.44
// and its contemporaries refuse some valid ones by their lengths, and before 6.2
// there are none of UDP. The frames go to a MAC address that nobody has, from and to
// addresses for documentation.
func ProbeSuper(write func(*Frame) syscall.Errno) Super { return probeSuper(false, write) }

// probeSuper is ProbeSuper; if martian is set, frames are from and to loopback
// addresses, which the stack drops where there is no MAC address.
func probeSuper(martian bool, write func(*Frame) syscall.Errno) Super {
	var takes [noKind]bool
	for kind := range takes {
		takes[kind] = true
		for _, n := range []int{2 * probeSize, 3*probeSize - 1, probeSize + 1, 45 * probeSize} {
			f := probeFrame(kind, n, martian)
			takes[kind] = takes[kind] && write(&f) == 0
		}
	}
	return Super{takes[kindTCP4], takes[kindTCP6], takes[kindUDP]}
}

// probeSize is the segment size of probe's frames.
const probeSize = 1398

// probeFrame makes a super-frame with n octets of payload.
func probeFrame(kind, n int, martian bool) Frame {
	be := binary.BigEndian
	ip, l4, proto, field := 20, 20, byte(6), 16
	o := Offload{NeedsCsum: true, GSOSize: probeSize, GSOType: GSOTCPv4}
	switch kind {
	case kindTCP6:
		ip, o.GSOType = 40, GSOTCPv6
	case kindUDP:
		l4, proto, field, o.GSOType = 8, 17, 6, GSOUDPL4
	}
	b := make([]byte, vnetHdrLen+etherLen+ip+l4+n)
	f := Frame{Buf: b, Off: vnetHdrLen, Len: len(b) - vnetHdrLen}
	e := b[vnetHdrLen:]
	copy(e, []byte{2, 0, 0x5e, 0, 0x53, 0, 2, 0, 0x5e, 0, 0x53, 1, 0x08, 0})
	h := e[etherLen:]
	if ip == 20 {
		h[0], h[6], h[8], h[9] = 0x45, 0x40, 1, proto
		be.PutUint16(h[2:], uint16(len(h)))
		copy(h[12:], []byte{192, 0, 2, 1, 192, 0, 2, 2})
		if martian {
			h[12], h[16] = 127, 127
		}
		be.PutUint16(h[10:], ^fold(add(0, h[:20])))
	} else {
		e[12], e[13] = 0x86, 0xdd
		h[0], h[6], h[7] = 0x60, proto, 1
		be.PutUint16(h[4:], uint16(len(h)-ip))
		copy(h[8:], []byte{0x20, 1, 0xd, 0xb8, 15: 1, 16: 0x20, 1, 0xd, 0xb8, 31: 2})
		if martian { // ::1
			clear(h[8:20])
			clear(h[24:39])
			h[39] = 1
		}
	}
	t := h[ip:]
	be.PutUint16(t, 9) // discard
	be.PutUint16(t[2:], 9)
	if proto == 6 {
		t[12], t[13] = 5<<4, 0x10
	} else {
		be.PutUint16(t[4:], uint16(len(t)))
	}
	o.CsumStart, o.CsumOffset = uint16(etherLen+ip), uint16(field)
	o.HdrLen = uint16(etherLen + ip + l4)
	f.Offload = o
	return f
}
