package datapath

import (
	"encoding/binary"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
)

// Monitors. A worker looks once a batch whether somebody does (Config.Monitor).
// Then it handles packets one by one instead of together: what became of each is
// known then, and frames stand behind those that they were made of. Packets are
// whole at high and low: ESP in UDP, which a socket takes and gives without its
// headers, gets some of the same kind.

// outcome is what a monitor tells of a packet that did not go on, given what
// was counted last for it.
func outcome(last Counter) string {
	switch last {
	case numCounters, OutProtected, OutBypassed, OutFragments, OutAggregated, OutAggregates, OutReleased, OutOther,
		InProtected, InBypassed, InCoalesced, InSuper, InAggregated, InAggregates, InRejoined, InOther:
		return ""
	}
	return last.String()
}

// watch is frame and flush for a monitor.
func (w *outWorker) watch(f *tap.Frame, now time.Time) {
	w.tape.Record(capture.High, capture.Out, nil, f.Buf[f.Off:f.Off+f.Len], "")
	w.n.last = numCounters
	w.frame(f, now)
	w.failed(w.flush())
	w.tape.Explain(outcome(w.n.last))
	w.tape.Publish()
}

// watch is ip and flush for a monitor.
func (w *inWorker) watch(p *wire.Packet, now time.Time) {
	w.tape.Record(capture.Low, capture.In, nil, p.Buf[p.Off:p.Off+p.Len], "")
	w.n.last = numCounters
	w.ip(p.Buf, p.Off, p.Len, p.Offload, now)
	w.watched(now)
}

// watchDatagram is datagram and flush for a monitor.
func (w *inWorker) watchDatagram(d *wire.Datagram, now time.Time) {
	if w.e.c.Low == nil { // else it came in a frame
		w.e.recordDatagrams(&w.tape, capture.In, d)
	}
	w.n.last = numCounters
	w.datagram(d, now)
	w.watched(now)
}

func (w *inWorker) watched(now time.Time) {
	if err := w.flush(now); w.err == nil {
		w.err = err
	}
	w.tape.Explain(outcome(w.n.last))
	w.tape.Publish()
}

// watchFrame is bumped and flush for a monitor.
func (w *inWorker) watchFrame(f *tap.Frame, now time.Time) {
	w.tape.Record(capture.Low, capture.In, nil, f.Buf[f.Off:f.Off+f.Len], "")
	w.n.last = numCounters
	w.bumped(f, now)
	w.watched(now)
}

// recordFrames records what is written to a side.
func recordFrames(t *capture.Tape, side capture.Side, dir capture.Direction, fs []tap.Frame) {
	if t.On() {
		for k := range fs {
			t.Record(side, dir, nil, fs[k].Buf[fs[k].Off:fs[k].Off+fs[k].Len], "")
		}
	}
}

// recordPackets records what leaves by the interface.
func (e *Engine) recordPackets(t *capture.Tape, ps []wire.Packet) {
	if t.On() {
		for k := range ps {
			b := ps[k].Buf[ps[k].Off : ps[k].Off+ps[k].Len]
			e.recordIP(t, capture.Out, b, nil)
		}
	}
}

// recordIP records the IP packet of head and data at low. Where frames of that side
// have link headers it gets one of the kind that the kernel will put there; the
// address of the next hop is zero.
func (e *Engine) recordIP(t *capture.Tape, dir capture.Direction, head, data []byte) {
	if e.c.Low == nil {
		t.Record(capture.Low, dir, head, data, "")
		return
	}
	b := make([]byte, etherLen, etherLen+len(head))
	copy(b[6:], e.c.TAP.MAC())
	putType(b, etherLen, head[0]>>4)
	t.Record(capture.Low, dir, append(b, head...), data, "")
}

// Sent shows monitors a datagram that its caller has sent from port 4500, past the
// workers: the key daemon's. err says that the socket refused it.
func (e *Engine) Sent(d *wire.Datagram, err error) {
	t := capture.Tape{Hub: e.c.Monitor}
	if !t.Start() {
		return
	}
	e.recordDatagrams(&t, capture.Out, d)
	if err != nil {
		t.Explain("udp_send_refused")
	}
	t.Publish()
}

// recordDatagrams records what a socket gets or gives as IP packets.
func (e *Engine) recordDatagrams(t *capture.Tape, dir capture.Direction, d *wire.Datagram) {
	if !t.On() {
		return
	}
	src, dst := d.Local, d.Remote
	if dir == capture.In {
		src, dst = dst, src
	}
	if src.Addr().Is4() != dst.Addr().Is4() {
		return // the kernel chooses the source; IKE alone leaves it to it
	}
	size := d.Segment
	if size <= 0 {
		size = max(d.Len, 1)
	}
	var head [packet.IPv6Len + packet.UDPLen]byte
	n := packet.IPv4Len
	if src.Addr().Is6() {
		n = packet.IPv6Len
	}
	for off, end := d.Off, d.Off+d.Len; off < end; off += size {
		p := d.Buf[off:min(off+size, end)]
		ip, udp := head[:n], head[n:n+packet.UDPLen]
		packet.PutHeader(ip, src.Addr(), dst.Addr(), protoUDP, n+packet.UDPLen+len(p), packet.DefaultTTL)
		binary.BigEndian.PutUint16(udp[0:], src.Port())
		binary.BigEndian.PutUint16(udp[2:], dst.Port())
		binary.BigEndian.PutUint16(udp[4:], uint16(packet.UDPLen+len(p)))
		packet.SetECN(ip, d.TOS&3)
		packet.FixIPv4Checksum(ip)
		e.recordIP(t, dir, head[:n+packet.UDPLen], p)
	}
}
