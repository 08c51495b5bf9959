package bump

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// drain is how long after it was active a side still writes: what was taken then
// is nowhere else.
const drain = time.Second

// side is one of the two. in is read by one goroutine at a time, out written by any.
type side struct {
	b     *Bump
	which Side
	state atomic.Uint32
	until atomic.Int64 // end of drain, in nanoseconds since started

	in, out  atomic.Pointer[socket]
	mu       sync.Mutex
	replaced chan struct{} // closed when in is another
	stopped  chan struct{}

	attached atomic.Pointer[[]*attachment]
	copies   *reader // of what passes a passive side; of b.mu

	super  atomic.Pointer[tap.Super] // that the kernel takes
	cutter struct {
		mu sync.Mutex
		s  *tap.Segmenter // from the first super-frame on that is cut here
	}

	read, written, silent, refused, cut atomic.Uint64
}

// attachment is a program that gets frames.
type attachment struct {
	take bool
	f    func([]tap.Frame)
}

var started = time.Now()

func (s *side) init(b *Bump, which Side) {
	s.b, s.which = b, which
	s.replaced, s.stopped = make(chan struct{}), make(chan struct{})
	s.attached.Store(new([]*attachment))
	s.super.Store(new(tap.Super))
}

// takes notes which super-frames the kernel takes.
func (s *side) takes(super tap.Super) { s.super.Store(&super) }

// enter notes a new state, and that of the other side: while that is active what is
// taken there goes on to come, and is not for a side that is not.
func (s *side) enter(to, other State) {
	switch {
	case to != Active && other == Active:
		s.until.Store(0)
	case to != Active && State(s.state.Load()) == Active:
		s.until.Store(int64(time.Since(started) + drain))
	}
	s.state.Store(uint32(to))
}

// writes tells whether frames may be written.
func (s *side) writes() bool {
	return State(s.state.Load()) == Active || int64(time.Since(started)) < s.until.Load()
}

// wake has a reader that waits for another socket look.
func (s *side) wake() {
	s.mu.Lock()
	close(s.replaced)
	s.replaced = make(chan struct{})
	s.mu.Unlock()
}

func (s *side) shut() {
	select {
	case <-s.stopped:
		return
	default:
	}
	close(s.stopped)
	s.closeCopies()
	s.in.Swap(nil).close()
	s.out.Swap(nil).close()
}

// ReadBatch waits for frames that were taken at a side, and puts up to 64 of
// them, or a MiB, into the Bufs, each from Off on, which is at least Room and the
// same for all; the Off of a frame with a VLAN tag is lowered by 4. It may exchange
// Bufs within fs. From either side come super-frames of the kinds that Super
// tells, and with Options.Offload unfinished checksums; HdrLen of a super-frame is
// exact. The error of a closed Bump is os.ErrClosed; there is no other that ends.
func (b *Bump) ReadBatch(which Side, fs []tap.Frame) (int, error) {
	s := &b.sides[which]
	off := fs[0].Off
	for {
		s.mu.Lock()
		replaced := s.replaced
		s.mu.Unlock()
		if in := s.in.Load(); in != nil {
			n, err := in.read(fs)
			if n > 0 {
				if s.passes(fs[:n]) {
					// Written to the other side already.
				} else if s.read.Add(uint64(n)); !s.hand(fs[:n]) {
					return n, nil
				}
				for i := range fs {
					fs[i].Off = off
				}
				continue
			}
			if errors.Is(err, errRoom) {
				return 0, err
			}
		}
		select {
		case <-s.stopped:
			return 0, os.ErrClosed
		case <-replaced:
		case <-time.After(10 * time.Millisecond): // an error that is told once: the device was down
		}
	}
}

// passes has frames go on to the other side if this one is not active, where
// there is no other way for them than this process.
func (s *side) passes(fs []tap.Frame) bool {
	if s.b.away == nil {
		return false
	}
	switch State(s.state.Load()) {
	case Active:
		return false
	case Passive:
		if len(*s.attached.Load()) > 0 {
			s.read.Add(uint64(len(fs)))
			s.hand(fs)
		}
	}
	s.b.sides[1-s.which].pass(fs)
	return true
}

// pass writes frames whatever the side's state is. What is refused is lost, as on a wire.
func (s *side) pass(fs []tap.Frame) {
	for out := s.out.Load(); out != nil && len(fs) > 0; {
		n, err := s.write(out, fs)
		if err != nil {
			s.refused.Add(1)
			n++
		}
		fs = fs[min(n, len(fs)):]
	}
}

// hand gives frames to who is attached; true: somebody takes them.
func (s *side) hand(fs []tap.Frame) (taken bool) {
	for _, a := range *s.attached.Load() {
		a.f(fs)
		taken = taken || a.take
	}
	return taken
}

// taken: a program has the frames in the place of ReadBatch.
func (s *side) taken() bool {
	return slices.ContainsFunc(*s.attached.Load(), func(a *attachment) bool { return a.take })
}

// WriteBatch sends whole frames to a side: to the kernel, which receives them as from
// the interface, or out of the interface. If the side is not active they are
// silently dropped. Super-frames leave as they are; what neither kernel nor
// interface take whole is cut on the way. It stops at the first frame that is
// refused, fs[n], and returns n and why (EMSGSIZE, ENOBUFS, ENETDOWN, EINVAL); the
// caller goes on with fs[n+1:] or not. The 10 octets before a frame are overwritten.
func (b *Bump) WriteBatch(which Side, fs []tap.Frame) (int, error) {
	s := &b.sides[which]
	if !s.writes() {
		s.silent.Add(uint64(len(fs)))
		return len(fs), nil
	}
	out := s.out.Load()
	if out == nil {
		s.refused.Add(1)
		return 0, s.down()
	}
	n, err := s.write(out, fs)
	s.written.Add(uint64(n))
	if err != nil {
		s.refused.Add(1)
		if !errors.Is(err, errRoom) && !errors.Is(err, unix.EMSGSIZE) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINVAL) {
			err = s.down()
		}
	}
	return n, err
}

// write writes frames, and cuts those super-frames that the kernel does not take.
func (s *side) write(out *socket, fs []tap.Frame) (n int, err error) {
	for n < len(fs) {
		super, whole := *s.super.Load(), n
		short := s.b.away == nil || s.which == Low
		for whole < len(fs) && super.Has(fs[whole].Offload) && (short || !s.b.tooLong(&fs[whole])) {
			whole++
		}
		k, err := out.write(fs[n:whole])
		n += k
		if n == len(fs) {
			return n, nil
		}
		f := &fs[n]
		if err == nil && !short && s.b.tooLong(f) {
			if err = s.writeSplit(out, f); err != nil {
				return n, err
			}
			n++
			continue
		}
		if err != nil && (!errors.Is(err, unix.EINVAL) || f.Offload.GSOType == tap.GSONone) {
			return n, err
		}
		if e := s.writeCut(out, f); e != nil {
			return n, e
		}
		if err != nil {
			// Nothing was wrong with it but that the kernel does not cut it.
			s.takes(super.Without(f.Offload))
		}
		n++
	}
	return n, nil
}

// writeCut writes a super-frame as its segments.
func (s *side) writeCut(out *socket, f *tap.Frame) error {
	s.cutter.mu.Lock()
	defer s.cutter.mu.Unlock()
	if s.cutter.s == nil {
		s.cutter.s = new(tap.Segmenter)
	}
	var refused error
	errno := s.cutter.s.Each(f.Buf[f.Off:f.Off+f.Len], f.Offload, func(seg *tap.Frame) syscall.Errno {
		if _, refused = out.write([]tap.Frame{*seg}); refused != nil {
			return unix.EIO // to end it
		}
		return 0
	})
	switch {
	case refused != nil:
		return refused
	case errno != 0:
		return errno
	}
	s.cut.Add(1)
	return nil
}

// tooLong: FACE would drop the frame silently, since it is longer than its MTU allows.
func (b *Bump) tooLong(f *tap.Frame) bool {
	return f.Offload.GSOType == tap.GSONone && f.Len > b.link.Load().MTU+etherLen+tagLen
}

// writeSplit writes an IP packet that is too long as fragments: one that was put together,
// or opened, on the way.
func (s *side) writeSplit(out *socket, f *tap.Frame) error {
	b := f.Buf[f.Off : f.Off+f.Len]
	n := etherLen
	for n+tagLen <= len(b) && tap.IsTag(binary.BigEndian.Uint16(b[n-2:])) {
		n += tagLen
	}
	var i packet.Info
	if !tap.FinishChecksum(b, f.Offload) || !packet.Decode(b[n:], &i) {
		return unix.EMSGSIZE
	}
	id := s.b.away.fragID.Add(1)
	err := frag.Split(b[n:n+i.Len], &i, s.b.link.Load().MTU, id, func(p []byte) error {
		buf := make([]byte, Room+n+len(p))
		copy(buf[Room:], b[:n])
		copy(buf[Room+n:], p)
		_, err := out.write([]tap.Frame{{Buf: buf, Off: Room, Len: n + len(p)}})
		return err
	})
	if errors.Is(err, frag.ErrMTU) || errors.Is(err, frag.ErrNotIP) {
		return unix.EMSGSIZE
	}
	return err
}

// down is the error of an interface that is not there at the moment.
func (s *side) down() error {
	if s.b.closed.Load() {
		return os.ErrClosed
	}
	return unix.ENETDOWN
}

// Attach calls f with the frames that come from a side, from one goroutine at
// a time: copies while it is passive; while it is active the frames themselves,
// before ReadBatch returns them, or instead if take is set. The frames are f's
// until it returns; it must not block, and without take not change them. detach
// may be called from f.
func (b *Bump) Attach(which Side, take bool, f func(fs []tap.Frame)) (detach func(), err error) {
	s := &b.sides[which]
	a := &attachment{take, f}
	change := func(next func([]*attachment) []*attachment) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		l := next(slices.Clone(*s.attached.Load()))
		s.attached.Store(&l)
		if b.closed.Load() {
			return os.ErrClosed
		}
		return b.copiers()
	}
	remove := func(l []*attachment) []*attachment {
		return slices.DeleteFunc(l, func(x *attachment) bool { return x == a })
	}
	if err := change(func(l []*attachment) []*attachment { return append(l, a) }); err != nil {
		change(remove)
		return nil, err
	}
	return func() { go change(remove) }, nil
}

// copiers starts and ends the copies that are wanted. b.mu is held.
func (b *Bump) copiers() error {
	var errs []error
	link := b.link.Load()
	for i := range b.sides {
		s := &b.sides[i]
		want := b.away == nil && link.Index != 0 && b.State(s.which) == Passive && len(*s.attached.Load()) > 0
		switch {
		case want && s.copies == nil:
			sock, err := packetSocket(socketOptions{index: link.Index, filter: passing(s.which == High, b.table.in), both: s.which == High, wait: b.o.Wait})
			if err != nil {
				errs = append(errs, err)
				continue
			}
			s.copies = startReader(sock, func(fs []tap.Frame) {
				s.read.Add(uint64(len(fs)))
				s.hand(fs)
			})
		case !want && s.copies != nil:
			s.closeCopies()
		}
	}
	return errors.Join(errs...)
}

func (s *side) closeCopies() {
	s.copies.close()
	s.copies = nil
}

// Stats are counters of a side since Open.
type Stats struct {
	Read    uint64 // frames taken or copied
	Written uint64
	Silent  uint64 // not written because the side was not active
	Refused uint64 // by the kernel
	Dropped uint64 // for want of room in the socket
	Cut     uint64 // super-frames of Written that had to be cut here
}

// Stats returns the counters of a side.
func (b *Bump) Stats(which Side) Stats {
	s := &b.sides[which]
	return Stats{s.read.Load(), s.written.Load(), s.silent.Load(), s.refused.Load(), s.in.Load().kernelDrops(), s.cut.Load()}
}

// Super tells which super-frames come from both sides.
func (b *Bump) Super() tap.Super {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pair.super
}

// Device is the high side as the engine wants its TAP: frames go to and come
// from the kernel.
func (b *Bump) Device() tap.Device { return device{b} }

type device struct{ b *Bump }

func (d device) Name() string                           { return d.b.ifname }
func (d device) Index() int                             { return d.b.Link().Index }
func (d device) MAC() net.HardwareAddr                  { return d.b.link.Load().MAC }
func (d device) MTU() int                               { return d.b.link.Load().MTU }
func (d device) Queues() []tap.Queue                    { return []tap.Queue{d} }
func (d device) ReadBatch(fs []tap.Frame) (int, error)  { return d.b.ReadBatch(High, fs) }
func (d device) WriteBatch(fs []tap.Frame) (int, error) { return d.b.WriteBatch(High, fs) }
func (d device) ReadSuper() tap.Super                   { return d.b.Super() }
func (d device) Super() tap.Super                       { return *d.b.sides[High].super.Load() }
func (d device) Cut() uint64                            { return d.b.sides[High].cut.Load() }
func (d device) Lost() tap.Lost                         { return tap.Lost{} }
func (d device) SetMTU(int) error                       { return nil }
func (d device) Persist(bool) error                     { return nil }
func (d device) Close() error                           { return nil }

// LowSide is the low side for the engine.
type LowSide struct{ b *Bump }

// LowSide returns the low side for the engine: frames come from and go to the interface.
func (b *Bump) LowSide() *LowSide { return &LowSide{b} }

// ReadBatch is Bump.ReadBatch.
func (l *LowSide) ReadBatch(fs []tap.Frame) (int, error) { return l.b.ReadBatch(Low, fs) }

// WriteBatch is Bump.WriteBatch.
func (l *LowSide) WriteBatch(fs []tap.Frame) (int, error) { return l.b.WriteBatch(Low, fs) }
