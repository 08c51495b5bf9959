package datapath

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// As a bump in the stack (Config.Low) the engine is given every frame between the
// kernel and the interface, and nothing else carries them.
//
//	from the kernel   not IP, bypassed: as it came, super-frames whole
//	                  protected: in transport mode, and on a VLAN, behind the frame's own
//	                  link header; in tunnel mode to the next hop that the
//	                  kernel has for the peer
//	                  too big: ICMP back, behind the frame's link header turned round
//	from the NIC      not IP, bypassed: as it came, super-frames and fragments too
//	                  unless only the whole datagram can be judged
//	                  ESP, AH, ESP in UDP for us: the inner packet, behind the link
//	                  header of the outer one
//
// A VLAN tag does not hide a packet from policy. IKE and what else comes to UDP 4500
// goes to the kernel, and by it to our socket.

// Frames is a side of an interface whose frames all come to us.
type Frames interface {
	// ReadBatch and WriteBatch have the contracts of tap.Device's, except that
	// ReadBatch may lower a Frame's Off, to put a VLAN tag back.
	ReadBatch([]tap.Frame) (int, error)
	WriteBatch([]tap.Frame) (int, error)
}

// maxLink is the length of the longest link header: addresses, four tags, type.
const maxLink = etherLen + 4*4

// linkHeader is that of the frame at hand.
type linkHeader struct {
	n int // 0: there is none
	b [maxLink]byte
}

func (l *linkHeader) set(b []byte) { l.n = copy(l.b[:], b) }

// put writes it in front of the packet at b[off:].
func (l *linkHeader) put(b []byte, off int) { copy(b[off-l.n:], l.b[:l.n]) }

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
)

// parseLink returns the length of a frame's link header and the type behind its
// tags; 0: cut, or with more tags than anybody can want.
func parseLink(b []byte) (n int, etype uint16) {
	for n = etherLen; n <= len(b) && n <= maxLink; n += 4 {
		if etype = binary.BigEndian.Uint16(b[n-2:]); !tap.IsTag(etype) {
			return n, etype
		}
	}
	return 0, 0
}

// bumped sorts a frame from the kernel.
func (w *outWorker) bumped(f *tap.Frame, now time.Time) {
	b := f.Buf[f.Off : f.Off+f.Len]
	n, etype := parseLink(b)
	switch {
	case n == 0:
		w.n.inc(DropOutMalformed)
	case etype != etherIPv4 && etype != etherIPv6:
		w.n.inc(OutOther)
		w.low = append(w.low, *f)
	case f.Offload.GSOType != tap.GSONone:
		w.link.set(b[:n])
		w.superFrame(f, n, now)
		w.link.n = 0
	case !tap.FinishChecksum(b, f.Offload):
		w.n.inc(DropOutMalformed)
	default:
		w.link.set(b[:n])
		w.frameLen = f.Len - n
		w.ip(f.Buf, f.Off+n, f.Len-n, now, false)
		w.link.n, w.frameLen = 0, 0
	}
}

// passSuper sends the super-frame f, whose link header is at hand, as it is.
func (w *outWorker) passSuper(f *tap.Frame) {
	w.n.add(OutBypassed, packets(f))
	w.push(outJob{link: w.link.n, pkt: wire.Packet{Buf: f.Buf, Off: f.Off + w.link.n, Len: f.Len - w.link.n, Offload: f.Offload}}, esp.Packet{})
}

// linkRoom is what a packet needs in front for the link header of its frame.
func (w *outWorker) linkRoom() int {
	if w.link.n == 0 {
		return 0
	}
	return tap.HeadroomMin + w.link.n
}

// bound: the result for the packet at hand can only leave behind the link header
// of its frame.
func (w *outWorker) bound() bool {
	return w.link.n > etherLen || w.link.n > 0 && w.e.c.Bridged != nil && w.e.c.Bridged()
}

// keepLink has a result leave behind the link header of its frame, if there is
// one and it is right for it.
func (w *outWorker) keepLink(j *outJob, tunnel bool) {
	if w.link.n > 0 && (!tunnel || w.bound()) {
		w.link.put(j.pkt.Buf, j.pkt.Off)
		j.link = w.link.n
	}
}

// frame is a result with its link header, from which the metadata of one that is
// not finished count.
func (j *outJob) frame() tap.Frame {
	return tap.Frame{Buf: j.pkt.Buf, Off: j.pkt.Off - j.link, Len: j.pkt.Len + j.link, Offload: j.pkt.Offload}
}

// putReply writes the link header of an answer to the frame at hand in front of out[off:].
func (l *linkHeader) putReply(out []byte, off int, version uint8) int {
	at := off - l.n
	l.put(out, off)
	copy(out[at:], l.b[6:12])
	copy(out[at+6:], l.b[:6])
	putType(out, off, version)
	return at
}

// putType writes the type of the packet at b[off:] into its link header.
func putType(b []byte, off int, version uint8) {
	t := uint16(etherIPv4)
	if version == 6 {
		t = etherIPv6
	}
	binary.BigEndian.PutUint16(b[off-2:], t)
}

// writeLow writes what leaves behind link headers of its own.
func (w *outWorker) writeLow() error {
	recordFrames(&w.tape, capture.Low, capture.Out, w.low)
	for fs := w.low; len(fs) > 0; {
		n, err := w.e.c.Low.WriteBatch(fs)
		if err != nil {
			if fatal(err) {
				return err
			}
			w.n.inc(DropOutSend)
			n++
		}
		fs = fs[min(n, len(fs)):]
	}
	clear(w.low)
	w.low = w.low[:0]
	return nil
}

// runLow is run for frames.
func (w *inWorker) runLow(ctx context.Context) error {
	w.frames = make([]tap.Frame, batch)
	for i := range w.frames {
		w.frames[i].Buf = make([]byte, bufSize+maxLink)
	}
	for ctx.Err() == nil {
		for i := range w.frames {
			w.frames[i].Off = headroom
		}
		n, err := w.e.c.Low.ReadBatch(w.frames)
		if err != nil {
			return err
		}
		w.flows.Sweep(w.e.generation())
		now := time.Now()
		watched := w.tape.Start()
		for i := range n {
			if watched {
				w.watchFrame(&w.frames[i], now)
			} else {
				w.bumped(&w.frames[i], now)
			}
		}
		if err := w.flush(now); err != nil {
			return err
		}
	}
	return nil
}

// bumped sorts a frame from the interface.
func (w *inWorker) bumped(f *tap.Frame, now time.Time) {
	b := f.Buf[f.Off : f.Off+f.Len]
	n, etype := parseLink(b)
	switch {
	case n == 0:
		w.n.inc(DropInMalformed)
	case etype != etherIPv4 && etype != etherIPv6:
		w.n.inc(InOther)
		w.raw = append(w.raw, *f)
	default:
		if w.e.c.Heard != nil {
			w.e.c.Heard(b[n:])
		}
		w.link, w.whose = b[:n], f
		w.ip(f.Buf, f.Off+n, f.Len-n, f.Offload, now)
		w.link, w.whose = nil, nil
	}
}

// passFragment forwards or drops the fragment decoded in i if that can be decided
// by what all fragments of a datagram show; false: it is to be put together.
func (w *inWorker) passFragment(i *packet.Info, now time.Time) bool {
	if (i.Proto == protoESP || i.Proto == protoAH || i.Proto == protoIPComp) && w.e.c.Wire.IsLocal(i.Dst) {
		return false
	}
	blind := *i
	blind.HasPorts = false
	p, ambiguous := w.lookup(&blind)
	switch {
	case ambiguous || p == nil && w.e.c.Default == ipsec.Discard:
		return false // perhaps it is IKE
	case p == nil:
	case p.P.Action == ipsec.Bypass:
		p.Hit(now, 1)
	default:
		return false
	}
	w.n.inc(InBypassed)
	w.raw = append(w.raw, *w.whose)
	return true
}

// count is how many packets the one at hand stands for.
func (w *inWorker) count() uint {
	if w.whose == nil {
		return 1
	}
	return packets(w.whose)
}

// forward gives a packet that passes to the kernel: the frame as it came, or
// what was put together from several, for the way on cut again.
func (w *inWorker) forward(buf []byte, off int, i *packet.Info) {
	if w.whose != nil && len(buf) > 0 && &buf[0] == &w.whose.Buf[0] {
		w.raw = append(w.raw, *w.whose)
		return
	}
	mtu := w.e.c.TAP.MTU()
	if w.e.c.Wire.IsLocal(i.Dst) {
		mtu = i.Len
	}
	w.fragID++
	err := frag.Split(buf[off:off+i.Len], i, mtu, w.fragID, func(b []byte) error {
		const front = tap.HeadroomMin + maxLink
		f := make([]byte, front+len(b))
		copy(f[front:], b)
		w.rawLink(f, front, len(b), i.Version, w.link)
		return nil
	})
	if err != nil {
		w.n.inc(DropInFragment)
	}
}

// rawLink queues the packet buf[off:off+n] behind a link header, which may lie
// in buf, with the type changed to that of the packet.
func (w *inWorker) rawLink(buf []byte, off, n int, version uint8, link []byte) {
	at := off - len(link)
	copy(buf[at:], link)
	putType(buf, off, version)
	w.raw = append(w.raw, tap.Frame{Buf: buf, Off: at, Len: len(link) + n})
}

// byLink queues a packet for the kernel behind the link header of the frame it
// came in, if that is another than those of most, which deliver writes by itself.
func (w *inWorker) byLink(buf []byte, off int, i *packet.Info) bool {
	l := w.link
	if len(l) == 0 || len(l) == etherLen && string(l[:6]) == string(w.e.c.TAP.MAC()) {
		return false
	}
	if front := tap.HeadroomMin + maxLink; off < front {
		b := w.arena.Take(front + i.Len)
		copy(b[front:], buf[off:off+i.Len])
		buf, off = b, front
	}
	w.rawLink(buf, off, i.Len, i.Version, l)
	return true
}

// ours: a datagram for port 4500 is ESP that we have an SA for, or nobody else
// can be meant.
func (w *inWorker) ours(b []byte, i *packet.Info) bool {
	if !espInUDP(b, i) {
		return false
	}
	spi := binary.BigEndian.Uint32(b[i.HdrLen+packet.UDPLen:])
	return w.e.c.UDP != nil || w.e.c.SAD.Lookup(ipsec.SAID{Proto: ipsec.ESP, Dst: i.Dst, SPI: ipsec.SPI(spi)}) != nil
}
