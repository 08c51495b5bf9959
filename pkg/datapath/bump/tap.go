package bump

import (
	"bytes"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	unixsock "github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// Purposes of the sockets of taps, for package attach.
const (
	PurposeHigh = "htap"
	PurposeLow  = "ltap"
)

// MaxFrame is the length of the longest frame that a tap gives or takes, in octets.
const MaxFrame = copyLen

// Bounds of a tap: programs at a time, and what waits for each of them.
const (
	maxPrograms = 8
	tapFrames   = 4096
	tapOctets   = 16 << 20
)

// Tap lets programs attach to a side over a Unix socket (SOCK_SEQPACKET), as the
// x-kernel's /dev/htap and /dev/ltap did. Each message, in both directions, is one
// whole Ethernet frame from the destination address on, without frame check sequence,
// VLAN tags where they were; checksums are finished, and super-frames of the kernel or
// the interface are cut into the frames that they stand for.
//
//	state     messages from the socket              messages to it
//	Closed    none                                  are dropped silently
//	Passive   copies of what comes from the side    are dropped silently
//	Active    the frames that come from the side,   go to the side
//	          which go nowhere else
//
// Of several programs at a side each gets all frames. A program that is too slow
// loses some, as from a device: Stats counts them. When the last one has gone
// ReadBatch gets the frames of an active side again.
type Tap struct {
	b     *Bump
	which Side
	srv   *unixsock.Server

	programs                atomic.Int64
	given, lost, taken, bad atomic.Uint64
}

// TapStats are counters of a Tap since Listen.
type TapStats struct {
	Programs int    // attached now
	Given    uint64 // frames that went to programs
	Lost     uint64 // of those that did not, for want of room
	Taken    uint64 // frames that came from programs
	Bad      uint64 // messages that are no frame, or are that the side refused
}

// Listen makes the socket of a side at path. Close it before the Bump.
func (b *Bump) Listen(which Side, path string) (*Tap, error) {
	t := &Tap{b: b, which: which}
	var err error
	if t.srv, err = unixsock.Listen(path, maxPrograms, t.serve); err != nil {
		return nil, err
	}
	return t, nil
}

// Close removes the socket and sends the programs away.
func (t *Tap) Close() error { return t.srv.Close() }

// Stats returns the counters.
func (t *Tap) Stats() TapStats {
	return TapStats{int(t.programs.Load()), t.given.Load(), t.lost.Load(), t.taken.Load(), t.bad.Load()}
}

// program is what one connection waits for. Buffers of ordinary frames are used
// again; longer ones are rare, and would keep memory.
type program struct {
	frames chan []byte
	free   chan []byte
	octets atomic.Int64

	mu     sync.Mutex // of who puts
	cutter *tap.Segmenter
}

// ordinary is the capacity of the buffers that are used again: for the frames
// of an interface with the MTU that most have.
const ordinary = 2048

// clone copies a frame.
func (p *program) clone(frame []byte) []byte {
	if len(frame) > ordinary {
		return bytes.Clone(frame)
	}
	select {
	case b := <-p.free:
		return append(b[:0], frame...)
	default:
		return append(make([]byte, 0, ordinary), frame...)
	}
}

// release takes a buffer back.
func (p *program) release(b []byte) {
	if cap(b) == ordinary {
		select {
		case p.free <- b:
		default:
		}
	}
}

// serve is the life of one program at the side.
func (t *Tap) serve(c *net.UnixConn) {
	p := &program{frames: make(chan []byte, tapFrames), free: make(chan []byte, tapFrames)}
	detach, err := t.b.Attach(t.which, true, func(fs []tap.Frame) { t.queue(p, fs) })
	if err != nil {
		return
	}
	t.programs.Add(1)
	gone, sent := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(sent)
		t.send(c, p, gone)
	}()
	t.receive(c)
	detach()
	t.programs.Add(-1)
	close(gone)
	c.Close() // ends a write
	<-sent
}

// queue copies frames for a program. It is called by who reads the side, and
// must not wait.
func (t *Tap) queue(p *program, fs []tap.Frame) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range fs {
		f := &fs[k]
		b := f.Buf[f.Off : f.Off+f.Len]
		if f.Offload.GSOType == tap.GSONone {
			t.put(p, b, f.Offload)
			continue
		}
		if p.cutter == nil {
			p.cutter = new(tap.Segmenter)
		}
		if errno := p.cutter.Each(b, f.Offload, func(seg *tap.Frame) syscall.Errno {
			t.put(p, seg.Buf[seg.Off:seg.Off+seg.Len], tap.Offload{})
			return 0
		}); errno != 0 {
			t.lost.Add(1)
		}
	}
}

// put queues a copy of one frame if there is room.
func (t *Tap) put(p *program, b []byte, o tap.Offload) {
	if len(p.frames) == cap(p.frames) || p.octets.Load()+int64(len(b)) > tapOctets {
		t.lost.Add(1)
		return
	}
	b = p.clone(b)
	if !tap.FinishChecksum(b, o) {
		t.lost.Add(1)
		p.release(b)
		return
	}
	p.octets.Add(int64(len(b)))
	p.frames <- b // has room: nobody else puts
}

func (t *Tap) send(c *net.UnixConn, p *program, gone <-chan struct{}) {
	for {
		select {
		case <-gone:
			return
		case b := <-p.frames:
			_, err := c.Write(b)
			p.octets.Add(-int64(len(b)))
			p.release(b)
			if err != nil {
				c.Close() // ends receive
				return
			}
			t.given.Add(1)
		}
	}
}

// receive writes what the program sends, until it goes.
func (t *Tap) receive(c *net.UnixConn) {
	fs := []tap.Frame{{Buf: make([]byte, Room+MaxFrame+1)}}
	for {
		n, err := c.Read(fs[0].Buf[Room:])
		if err != nil {
			return
		}
		if n < etherLen || n > MaxFrame {
			t.bad.Add(1)
			continue
		}
		fs[0].Off, fs[0].Len = Room, n
		_, err = t.b.WriteBatch(t.which, fs)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		t.b.showWritten(t.which, fs, err)
		if err != nil {
			t.bad.Add(1)
			continue
		}
		t.taken.Add(1)
	}
}
