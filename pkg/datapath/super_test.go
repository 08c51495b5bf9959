package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// memUDP is the socket of port 4500 of a node: what it sends appears on the
// node's wire as the kernel would make it.
type memUDP struct {
	wire.UDPConn
	n *node
}

func (m memUDP) WriteBatch(ds []wire.Datagram) (int, error) {
	if m.n.quiet {
		return len(ds), nil
	}
	for _, d := range ds {
		b, k := d.Buf[d.Off:d.Off+d.Len], 0
		for first := true; first || len(b) > 0; first = false {
			n := len(b)
			if d.Segment > 0 {
				n = min(n, d.Segment)
			}
			p := udpPacket(d.Local.Addr(), d.Remote.Addr(), d.Local.Port(), d.Remote.Port(), n)
			copy(p[len(p)-n:], b[:n])
			if d.Local.Addr().Is4() {
				p[1] = d.TOS
			} else {
				p[0], p[1] = 0x60|d.TOS>>4, d.TOS<<4
			}
			if !d.DontFragment {
				packet.ClearDF(p)
			}
			packet.FixIPv4Checksum(p)
			m.n.wire = append(m.n.wire, p)
			b = b[n:]
			k++
		}
		m.n.trains = append(m.n.trains, k)
	}
	return len(ds), nil
}

// frameOf is what the kernel gives for the IP packet ip.
func frameOf(ip []byte, o tap.Offload) *tap.Frame {
	f := &tap.Frame{Buf: make([]byte, bufSize), Off: headroom, Len: etherLen + len(ip), Offload: o}
	putEther(f.Buf[headroom:], testMAC, ip[0]>>4)
	copy(f.Buf[headroom+etherLen:], ip)
	return f
}

// sendFrames gives frames to n as one batch and returns what left.
func (n *node) sendFrames(fs ...*tap.Frame) [][]byte {
	n.t.Helper()
	n.wire, n.tap, n.trains = nil, nil, nil
	now := time.Now()
	for _, f := range fs {
		n.e.out.frame(f, now)
	}
	if err := n.e.out.flush(); err != nil {
		n.t.Fatal(err)
	}
	return n.wire
}

// superSpec describes a super-frame.
type superSpec struct {
	name    string
	udp     bool
	size, n int // of a segment; of all payload
	flags   byte
	options bool // of TCP: timestamps; of IP: router alert, destination options
	ipOpts  bool
	noDF    bool
	tos     uint8
	ttl     uint8
}

// build makes the super-frame, with the pseudo-header's sum in place of the
// checksum, as the kernel does.
func (s *superSpec) build(src, dst netip.Addr) (ip []byte, o tap.Offload) {
	be := binary.BigEndian
	hl, proto, thl := packet.IPv4Len, uint8(protoTCP), 20
	if src.Is6() {
		hl = packet.IPv6Len
	}
	var opts, topts []byte
	if s.ipOpts {
		opts = []byte{0x94, 4, 0, 0}
		if src.Is6() {
			opts = []byte{0, 0, 1, 4, 0, 0, 0, 0}
		}
	}
	if s.udp {
		proto, thl = protoUDP, 8
	} else if s.options {
		topts = []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
		thl += len(topts)
	}
	t := hl + len(opts)
	b := make([]byte, t+thl+s.n)
	ttl := s.ttl
	if ttl == 0 {
		ttl = 64
	}
	packet.PutHeader(b, src, dst, proto, len(b), ttl)
	copy(b[hl:], opts)
	if src.Is4() {
		b[0], b[1] = 0x40|byte(t/4), s.tos
		be.PutUint16(b[4:], 0xfff0)
		if s.noDF {
			packet.ClearDF(b)
		}
		packet.FixIPv4Checksum(b)
	} else {
		b[0], b[1] = 0x60|s.tos>>4, s.tos<<4
		if s.ipOpts {
			b[6], b[hl] = 60, proto
		}
	}
	h := b[t:]
	be.PutUint16(h, 4321)
	be.PutUint16(h[2:], 80)
	at := 16
	if s.udp {
		at = 6
		be.PutUint16(h[4:], uint16(len(h)))
	} else {
		be.PutUint32(h[4:], 0xffff_f000)
		h[12], h[13] = byte(thl/4)<<4, s.flags
		be.PutUint16(h[14:], 501)
		copy(h[20:], topts)
	}
	for i := range h[thl:] {
		h[thl+i] = byte(i*11 + i>>8)
	}
	be.PutUint16(h[at:], 0x1234) // of no use to who makes it anew
	o = tap.Offload{GSOType: tap.GSOTCPv4, GSOSize: uint16(s.size), HdrLen: 7, CsumStart: uint16(etherLen + t), CsumOffset: uint16(at), NeedsCsum: true}
	if src.Is6() {
		o.GSOType = tap.GSOTCPv6
	}
	if s.udp {
		o.GSOType = tap.GSOUDPL4
	}
	return b, o
}

// reference cuts a super-frame by hand, field by field.
func reference(t testing.TB, b []byte, size int) (segs [][]byte) {
	var i packet.Info
	if !packet.Decode(b, &i) {
		t.Fatal("not IP")
	}
	be := binary.BigEndian
	h := i.HdrLen + 8
	if i.Proto == protoTCP {
		h = i.HdrLen + int(b[i.HdrLen+12]>>4)*4
	}
	for k, off := 0, h; off < len(b); k, off = k+1, off+size {
		data := b[off:min(off+size, len(b))]
		seg := append(bytes.Clone(b[:h]), data...)
		packet.SetLen(seg, len(seg))
		if i.Version == 4 {
			be.PutUint16(seg[4:], uint16(i.ID)+uint16(k))
			packet.FixIPv4Checksum(seg)
		}
		u := seg[i.HdrLen:]
		if i.Proto == protoTCP {
			be.PutUint32(u[4:], be.Uint32(u[4:])+uint32(k*size))
			if off+size < len(b) {
				u[13] &^= 0x09
			}
			if k > 0 {
				u[13] &^= 0x80
			}
		} else {
			be.PutUint16(u[4:], uint16(len(u)))
		}
		packet.FixTransportChecksum(seg, i.HdrLen, i.Proto)
		segs = append(segs, seg)
	}
	return segs
}

func superSpecs() (ss []superSpec) {
	for _, size := range []int{1300, 1301, 536, 9} {
		for _, n := range []int{1, size, size + 1, 3*size - 1, 4 * size, 11*size + 1} {
			ss = append(ss, superSpec{name: fmt.Sprintf("tcp %d of %d", n, size), size: size, n: n, flags: 0x10})
		}
	}
	for _, flags := range []byte{0x10, 0x18, 0x11, 0x19, 0x90, 0xd8, 0x50, 0x30} {
		ss = append(ss, superSpec{name: fmt.Sprintf("flags %#x", flags), size: 1000, n: 4100, flags: flags, options: true})
	}
	ss = append(ss,
		superSpec{name: "64 KiB", size: 1286, n: 65000, flags: 0x18, options: true},
		superSpec{name: "ip options", size: 1000, n: 4001, flags: 0x10, options: true, ipOpts: true},
		superSpec{name: "may be cut", size: 1000, n: 4001, flags: 0x10, noDF: true},
		superSpec{name: "ect", size: 1000, n: 4001, flags: 0x10, tos: 2},
		superSpec{name: "ce and dscp", size: 1000, n: 4001, flags: 0x10, tos: 0xbb},
		superSpec{name: "ttl 7", size: 1000, n: 4001, flags: 0x10, ttl: 7},
	)
	for _, n := range []int{1, 1200, 1201, 1200*9 - 1, 1200 * 40} {
		ss = append(ss, superSpec{name: fmt.Sprintf("udp %d", n), udp: true, size: 1200, n: n})
	}
	return append(ss, superSpec{name: "udp small", udp: true, size: 64, n: 64*60 + 5}, superSpec{name: "udp options", udp: true, size: 500, n: 2001, ipOpts: true})
}

// fastSuites: one for each way to seal, and a tag length that leaves odd sizes.
var fastSuites = []suite{suites[0], suites[4], suites[5], suites[7], suites[8]}

// TestSuperEquivalence: what comes out at the other end of the fast path is
// octet for octet what comes out of the slow path for the same packets, cut by
// hand; and so is the outer header, but for the identification and the UDP
// checksum of the socket, whose kernel chooses.
func TestSuperEquivalence(t *testing.T) {
	for name, p := range pairs() {
		if p.aggfrag {
			continue // TestPack
		}
		for _, s := range fastSuites {
			t.Run(name+" "+s.String(), func(t *testing.T) {
				p := p
				p.suite = s
				fast, b, _, _ := p.nodes(t)
				slow, c, _, _ := p.nodes(t)
				for _, socket := range []bool{false, true} {
					if socket && p.encap == nil {
						continue
					}
					if socket {
						fast.e.c.UDP = memUDP{n: fast}
					}
					for _, spec := range superSpecs() {
						equivalent(t, &p, &spec, socket, fast, slow, b, c)
					}
				}
			})
		}
	}
}

// equivalent sends a super-frame from fast to b, and its segments from slow to c.
func equivalent(t *testing.T, p *pair, spec *superSpec, socket bool, fast, slow, b, c *node) {
	t.Helper()
	before := fast.e.Stats()[OutProtected]
	ip, o := spec.build(p.in, p.out)
	want := reference(t, ip, spec.size)
	sent := fast.sendFrames(frameOf(ip, o))
	if len(sent) != len(want) {
		t.Fatalf("%s: %d packets left, want %d; %v", spec.name, len(sent), len(want), fast.e.Stats().nonzero())
	}
	for k, seg := range want {
		ref := slow.send(seg)
		if len(ref) != 1 {
			t.Fatalf("%s: %d packets left the slow path", spec.name, len(ref))
		}
		if !sameOuter(sent[k], ref[0], socket) {
			t.Fatalf("%s: segment %d: outer header\ngot  %x\nwant %x", spec.name, k, sent[k][:60], ref[0][:60])
		}
		// One at a time, so that nobody joins them again.
		got, ref := b.receiveAny(p, sent[k]), c.receiveAny(p, ref...)
		if len(got) != 1 || len(ref) != 1 || !bytes.Equal(got[0], ref[0]) {
			t.Fatalf("%s: segment %d: %v\ngot  %x\nslow %x", spec.name, k, b.e.Stats().nonzero(), got, ref)
		}
		if p.encap == nil || p.mode == ipsec.Tunnel { // else the IP header is a new one
			if !bytes.Equal(got[0], seg) {
				t.Fatalf("%s: segment %d:\ngot  %x\nwant %x", spec.name, k, got[0], seg)
			}
		}
	}
	fast.wantCount(map[Counter]uint64{OutProtected: before + uint64(len(want))})
}

// sameOuter compares what is in front of ESP.
func sameOuter(got, want []byte, socket bool) bool {
	var g, w packet.Info
	if len(got) != len(want) || !packet.Decode(got, &g) || !packet.Decode(want, &w) {
		return false
	}
	if socket && w.Proto == protoUDP {
		g.ID, w.ID = 0, 0
	}
	if g != w {
		return false
	}
	if socket {
		return true
	}
	n := w.TransOff + 8
	if w.Proto == protoUDP {
		n = w.TransOff + 6 // the checksum covers the IV, which may be random
	}
	return bytes.Equal(got[:n], want[:n])
}

// TestSuperSlow: super-frames that the fast path must leave alone arrive all
// the same, or meet the fate of their segments.
func TestSuperSlow(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	spec := superSpec{size: 1000, n: 4500, flags: 0x18, options: true}
	ip, o := spec.build(p.in, p.out)
	want := reference(t, ip, spec.size)
	fresh := func(t *testing.T) (a, b *node) {
		a, b, _, _ = p.nodes(t)
		a.e.c.UDP = memUDP{n: a}
		return a, b
	}
	arrive := func(t *testing.T, b *node, sent [][]byte) {
		t.Helper()
		if len(sent) != len(want) {
			t.Fatalf("%d packets left, want %d", len(sent), len(want))
		}
		for k := range sent {
			if got := b.receiveAny(&p, sent[k]); len(got) != 1 || !bytes.Equal(got[0], want[k]) {
				t.Fatalf("segment %d: %x", k, got)
			}
		}
	}
	t.Run("held", func(t *testing.T) {
		_, b := fresh(t)
		a := newNode(t, p.src)
		a.e.c.UDP = memUDP{n: a}
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		if got := a.sendFrames(frameOf(ip, o)); len(got) != 0 || len(a.needs) != 1 || a.e.Held() != len(want) {
			t.Fatalf("%d left, %d questions, %d held", len(got), len(a.needs), a.e.Held())
		}
		a.sa(p.params())
		a.e.Installed(a.needs[0])
		if err := a.e.release.sendHeld(make([]byte, bufSize)); err != nil {
			t.Fatal(err)
		}
		arrive(t, b, a.wire)
	})
	t.Run("bypass", func(t *testing.T) {
		a := newNode(t, p.src)
		got := a.sendFrames(frameOf(ip, o))
		if len(got) != len(want) {
			t.Fatalf("%d left", len(got))
		}
		for k := range got {
			if !bytes.Equal(got[k], want[k]) {
				t.Errorf("segment %d: got %x, want %x", k, got[k], want[k])
			}
		}
		a.wantCount(map[Counter]uint64{OutBypassed: uint64(len(want))})
	})
	t.Run("IKE", func(t *testing.T) {
		q := p
		q.in, q.out = a4, b4
		a, _, _, _ := q.nodes(t)
		spec := superSpec{udp: true, size: 1000, n: 2500}
		ip, o := spec.build(a4, b4)
		binary.BigEndian.PutUint16(ip[20:], 500)
		if got := a.sendFrames(frameOf(ip, o)); len(got) != 3 || !bytes.Equal(got[2], reference(t, ip, 1000)[2]) {
			t.Errorf("%d left", len(got))
		}
		a.wantCount(map[Counter]uint64{OutBypassed: 3})
	})
	t.Run("discard", func(t *testing.T) {
		a := newNode(t, p.src)
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Discard})
		if got := a.sendFrames(frameOf(ip, o)); len(got) != 0 {
			t.Error("left")
		}
		a.wantCount(map[Counter]uint64{DropOutDiscard: uint64(len(want))})
	})
	t.Run("default drop", func(t *testing.T) {
		a := newNode(t, p.src)
		a.e.c.Default = ipsec.Discard
		if got := a.sendFrames(frameOf(ip, o)); len(got) != 0 {
			t.Error("left")
		}
		a.wantCount(map[Counter]uint64{DropOutNoPolicy: uint64(len(want))})
	})
	t.Run("too big", func(t *testing.T) {
		a, _ := fresh(t)
		a.mtu = 1000
		if got := a.sendFrames(frameOf(ip, o), frameOf(ip, o), frameOf(want[0], tap.Offload{}), frameOf(want[0], tap.Offload{})); len(got) != 2 || len(a.tap) != 4 {
			t.Errorf("%d left, %d answers; want the short last ones, and one answer for each frame", len(got), len(a.tap))
		}
		a.wantCount(map[Counter]uint64{OutTooBig: uint64(2*(len(want)-1) + 2), OutProtected: 2})
	})
	t.Run("IPComp", func(t *testing.T) {
		a, b := newNode(t, p.src), newNode(t, p.dst)
		a.e.c.UDP = memUDP{n: a}
		sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		for _, n := range []*node{a, b} {
			q := p.params()
			q.CPI = 300
			n.sa(q)
		}
		arrive(t, b, a.sendFrames(frameOf(ip, o)))
		if got := a.e.Stats()[OutCompressed]; got != uint64(len(want)) {
			t.Errorf("%d of %d segments compressed", got, len(want))
		}
	})
	t.Run("sequence numbers end", func(t *testing.T) {
		a, b, out, _ := p.nodes(t)
		a.e.c.UDP = memUDP{n: a}
		out.NextSeq(1<<32 - 1 - 3) // three are left
		sent := a.sendFrames(frameOf(ip, o))
		if len(sent) != 3 {
			t.Fatalf("%d left, want 3", len(sent))
		}
		got := b.receiveAny(&p, sent[0])
		if len(got) != 1 || !bytes.Equal(got[0], want[0]) {
			t.Errorf("first: %x", got)
		}
		a.wantCount(map[Counter]uint64{OutProtected: 3, DropOutSequence: uint64(len(want) - 3)})
	})
	t.Run("hard limit", func(t *testing.T) {
		a := newNode(t, p.src)
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		q := p.params()
		q.Soft.Packets, q.Hard.Packets = 3, 7
		sa := a.sa(q)
		a.e.c.UDP = memUDP{n: a}
		first, second := len(a.sendFrames(frameOf(ip, o))), len(a.sendFrames(frameOf(ip, o)))
		if first != len(want) || second != 0 || len(a.limit) != 2 || a.limit[0] || !a.limit[1] {
			t.Errorf("%d and %d left; reports of hard limits %v", first, second, a.limit)
		}
		if sa.Packets() != 10 || sa.Bytes() != uint64(2*(len(ip)+4*(len(ip)-4500))) {
			t.Errorf("account: %d packets, %d octets", sa.Packets(), sa.Bytes())
		}
		a.wantCount(map[Counter]uint64{OutProtected: uint64(len(want)), DropOutLifetime: uint64(len(want))})
	})
	t.Run("seal fails", func(t *testing.T) {
		a, _ := fresh(t)
		a.sendFrames(frameOf(ip, o))
		a.e.out.push(outJob{sa: a.e.c.SAD.LookupSPI(ipsec.ESP, 0x1000, p.dst)}, esp.Packet{})
		if err := a.e.out.flush(); err != nil {
			t.Fatal(err)
		}
		a.wantCount(map[Counter]uint64{OutProtected: uint64(len(want)), DropOutSeal: 1})
	})
}

// TestSuperBundle: super-frames under more than one transform, or others than
// ESP, arrive segment by segment.
func TestSuperBundle(t *testing.T) {
	for _, s := range stacks() {
		t.Run(s.name, func(t *testing.T) {
			a, b := s.nodes(t)
			s.sas(a, b)
			spec := superSpec{size: 600, n: 2000, flags: 0x18}
			ip, o := spec.build(s.in, s.out)
			want := reference(t, ip, spec.size)
			sent := a.sendFrames(frameOf(ip, o))
			if len(sent) != len(want) {
				t.Fatalf("%d packets left, want %d; %v", len(sent), len(want), a.e.Stats().nonzero())
			}
			for k := range sent {
				receive := b.receive
				if s.udp() {
					receive = b.receiveUDP
				}
				if got := receive(sent[k]); len(got) != 1 || !bytes.Equal(got[0], want[k]) {
					t.Fatalf("segment %d: %v\n%x", k, b.e.Stats().nonzero(), got)
				}
			}
			// The last segment is too short to be compressed, and leaves as it is.
			bare := a.e.Stats()[OutBypassed]
			if only := s.name == "IPComp 4"; only != (bare == 1) {
				t.Errorf("%d segments left unprotected", bare)
			}
			a.wantCount(map[Counter]uint64{OutProtected: uint64(len(want)) - bare})
		})
	}
}

// TestSuperMalformed: metadata that lie are refused and counted.
func TestSuperMalformed(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	spec := superSpec{size: 1000, n: 4500, flags: 0x18}
	for name, f := range map[string]func(ip []byte, o *tap.Offload) []byte{
		"unknown type":     func(ip []byte, o *tap.Offload) []byte { o.GSOType = 3; return ip },
		"ecn alone":        func(ip []byte, o *tap.Offload) []byte { o.GSOType = tap.GSOECN; return ip },
		"other family":     func(ip []byte, o *tap.Offload) []byte { o.GSOType = tap.GSOTCPv6; return ip },
		"other protocol":   func(ip []byte, o *tap.Offload) []byte { o.GSOType = tap.GSOUDPL4; return ip },
		"size 0":           func(ip []byte, o *tap.Offload) []byte { o.GSOSize = 0; return ip },
		"no checksum":      func(ip []byte, o *tap.Offload) []byte { o.NeedsCsum = false; return ip },
		"checksum start":   func(ip []byte, o *tap.Offload) []byte { o.CsumStart = 65535; return ip },
		"checksum start 0": func(ip []byte, o *tap.Offload) []byte { o.CsumStart = 0; return ip },
		"checksum offset":  func(ip []byte, o *tap.Offload) []byte { o.CsumOffset = 65535; return ip },
		"length of IP":     func(ip []byte, o *tap.Offload) []byte { return ip[:len(ip)-1] },
		"not IP":           func(ip []byte, o *tap.Offload) []byte { ip[0] = 0x4f; return ip },
		"headers only":     func(ip []byte, o *tap.Offload) []byte { packet.SetLen(ip, 40); return ip[:40] },
	} {
		t.Run(name, func(t *testing.T) {
			a, _, _, _ := p.nodes(t)
			ip, o := spec.build(p.in, p.out)
			fr := frameOf(ip, o)
			ip = f(fr.Buf[headroom+etherLen:headroom+fr.Len], &fr.Offload)
			fr.Len = etherLen + len(ip)
			if got := a.sendFrames(fr); len(got) != 0 {
				t.Errorf("%d packets left", len(got))
			}
			a.wantCount(map[Counter]uint64{DropOutMalformed: 1})
		})
	}
	t.Run("checksum beyond a single frame", func(t *testing.T) {
		a, _, _, _ := p.nodes(t)
		a.sendFrames(frameOf(udpPacket(p.in, p.out, 1, 2, 30), tap.Offload{NeedsCsum: true, CsumStart: 500}))
		a.wantCount(map[Counter]uint64{DropOutMalformed: 1})
	})
}

// TestFinishChecksum: a single frame whose checksum was left to us.
func TestFinishChecksum(t *testing.T) {
	p := gcm(pairs()["tunnel 6 in 4"])
	a, b, _, _ := p.nodes(t)
	ip := udpPacket(p.in, p.out, 1, 2, 301)
	bare := bytes.Clone(ip)
	// The pseudo-header's sum: what is missing is the complement of the rest.
	binary.BigEndian.PutUint16(bare[46:], 0)
	rest := packet.Checksum(bare[40:])
	full := binary.BigEndian.Uint16(ip[46:])
	sum := uint32(^full) + uint32(rest)
	binary.BigEndian.PutUint16(bare[46:], uint16(sum>>16+sum&0xffff))
	sent := a.sendFrames(frameOf(bare, tap.Offload{NeedsCsum: true, CsumStart: etherLen + 40, CsumOffset: 6}))
	got := b.receive(sent...)
	if len(got) != 1 || !bytes.Equal(got[0], ip) {
		t.Errorf("got %x\nwant %x", got, ip)
	}
}

// TestTrains: which packets share a message.
func TestTrains(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	single := func(n int, tos uint8) *tap.Frame {
		ip := udpPacket(p.in, p.out, 1, 2, n)
		ip[1] = tos
		packet.FixIPv4Checksum(ip)
		return frameOf(ip, tap.Offload{})
	}
	super := func(size, n int) *tap.Frame {
		s := superSpec{size: size, n: n, flags: 0x10}
		ip, o := s.build(p.in, p.out)
		return frameOf(ip, o)
	}
	for _, tt := range []struct {
		name   string
		frames []*tap.Frame
		want   []int
	}{
		{"equal", []*tap.Frame{single(64, 0), single(64, 0), single(64, 0)}, []int{3}},
		{"a shorter one ends it", []*tap.Frame{single(64, 0), single(64, 0), single(40, 0), single(40, 0)}, []int{3, 1}},
		{"a longer one starts anew", []*tap.Frame{single(64, 0), single(70, 0), single(70, 0)}, []int{1, 2}},
		{"traffic class", []*tap.Frame{single(64, 0), single(64, 2), single(64, 2), single(64, 3)}, []int{1, 2, 1}},
		{"super-frame", []*tap.Frame{super(1000, 5000)}, []int{5}},
		{"super-frames", []*tap.Frame{super(1000, 5000), super(1000, 2500), super(1000, 3000)}, []int{8, 3}},
		{"many", []*tap.Frame{super(1000, 60000), super(1000, 60000)}, []int{120}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b, _, _ := p.nodes(t)
			a.e.c.UDP = memUDP{n: a}
			sent := a.sendFrames(tt.frames...)
			if fmt.Sprint(a.trains) != fmt.Sprint(tt.want) {
				t.Errorf("datagrams per message %v, want %v", a.trains, tt.want)
			}
			for k, x := range sent {
				if got := b.receiveAny(&p, x); len(got) != 1 {
					t.Fatalf("packet %d did not arrive: %v", k, b.e.Stats().nonzero())
				}
			}
		})
	}
	t.Run("two SAs", func(t *testing.T) {
		a, _, _, _ := p.nodes(t)
		a.e.c.UDP = memUDP{n: a}
		q := p
		q.out = netip.MustParseAddr("10.2.0.2")
		r := q.request()
		r.ReqID = 8
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(q.in), Dst: prefix(q.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{r}})
		sp := q.params()
		sp.SPI, sp.ReqID = 0x2000, 8
		a.sa(sp)
		other := frameOf(udpPacket(q.in, q.out, 1, 2, 64), tap.Offload{})
		a.sendFrames(single(64, 0), other, other, single(64, 0))
		if fmt.Sprint(a.trains) != "[1 2 1]" {
			t.Errorf("datagrams per message %v, want [1 2 1]", a.trains)
		}
	})
}

// TestSocketOrder: what has to be cut keeps its place between datagrams.
func TestSocketOrder(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, _, _, _ := p.nodes(t)
	a.e.c.UDP = memUDP{n: a}
	small := frameOf(udpPacket(p.in, p.out, 1, 2, 64), tap.Offload{})
	big := udpPacket(p.in, p.out, 1, 2, 1460)
	packet.ClearDF(big)
	packet.FixIPv4Checksum(big)
	sent := a.sendFrames(small, frameOf(big, tap.Offload{}), small)
	if len(sent) != 4 {
		t.Fatalf("%d packets left, want one, two fragments, one", len(sent))
	}
	for k, want := range []bool{false, true, true, false} {
		var i packet.Info
		if !packet.Decode(sent[k], &i) || i.IsFragment() != want {
			t.Errorf("packet %d is a fragment: %v, want %v", k, i.IsFragment(), want)
		}
	}
}

// TestArenaFull: batches larger than the arena leave in pieces, in order.
func TestArenaFull(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	for _, tt := range []struct{ size, n, frames int }{{1300, 65000, 16}, {8, 40000, 2}} {
		for _, bundle := range []bool{false, true} {
			a, b, _, _ := p.nodes(t)
			a.e.c.UDP = memUDP{n: a}
			if bundle { // the ordinary path
				a.e.c.UDP = nil
				a.mtu = 1330
			}
			var fs []*tap.Frame
			var want [][]byte
			spec := superSpec{size: tt.size, n: tt.n, flags: 0x10, noDF: true}
			ip, o := spec.build(p.in, p.out)
			for range tt.frames {
				fs = append(fs, frameOf(ip, o))
				want = append(want, reference(t, ip, tt.size)...)
			}
			sent := a.sendFrames(fs...)
			if bundle && tt.size == 1300 {
				if len(sent) != 2*len(want) {
					t.Errorf("%d fragments of %d packets", len(sent), len(want))
				}
				continue
			}
			if len(sent) != len(want) {
				t.Fatalf("%d packets left, want %d", len(sent), len(want))
			}
			for k := range sent {
				if got := b.receiveAny(&p, sent[k]); len(got) != 1 || !bytes.Equal(got[0], want[k]) {
					t.Fatalf("packet %d of %d differs: %v", k, len(sent), b.e.Stats().nonzero())
				}
			}
		}
	}
}

// superPath returns a function that sends one super-frame of n segments.
func superPath(t testing.TB, p pair, socket bool, spec superSpec) (out func(), segments int) {
	a, _, _, _ := p.nodes(t)
	a.quiet = true
	if socket {
		a.e.c.UDP = memUDP{n: a}
	}
	ip, o := spec.build(p.in, p.out)
	f := frameOf(ip, o)
	now := time.Now()
	out = func() {
		a.e.out.frame(f, now)
		if err := a.e.out.flush(); err != nil {
			t.Fatal(err)
		}
	}
	out()
	n := a.e.Stats()[OutProtected]
	if n == 0 {
		t.Fatalf("not sent: %v", a.e.Stats().nonzero())
	}
	return out, int(n)
}

// TestSuperNoAlloc: super-frames, and single packets by the socket, allocate
// nothing in any suite, mode or family.
func TestSuperNoAlloc(t *testing.T) {
	suites := frugal(t)
	for name, p := range pairs() {
		for _, s := range suites {
			p.suite = s
			for _, socket := range []bool{false, true} {
				if socket && p.encap == nil {
					continue
				}
				for _, spec := range []superSpec{
					{name: "tcp", size: 1200, n: 12001, flags: 0x18, options: true}, {name: "udp", udp: true, size: 64, n: 6001},
				} {
					out, _ := superPath(t, p, socket, spec)
					if n := testing.AllocsPerRun(20, out); n != 0 {
						t.Errorf("%s %v %s socket %v: %v allocations", name, s, spec.name, socket, n)
					}
				}
			}
			if p.encap == nil {
				continue
			}
			a, _, _, _ := p.nodes(t)
			a.quiet, a.e.c.UDP = true, memUDP{n: a}
			f := frameOf(udpPacket(p.in, p.out, 1, 2, 64), tap.Offload{})
			now := time.Now()
			if n := testing.AllocsPerRun(20, func() {
				a.e.out.frame(f, now)
				a.e.out.flush()
			}); n != 0 {
				t.Errorf("%s %v single: %v allocations", name, s, n)
			}
		}
	}
}

// FuzzSuperFrame: no metadata make the engine panic, read beyond the frame, or
// let anything out in clear.
func FuzzSuperFrame(f *testing.F) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	for _, spec := range []superSpec{{size: 100, n: 350, flags: 0x18, options: true}, {udp: true, size: 64, n: 300}} {
		for _, q := range []pair{p, gcm(pairs()["tunnel 6 in 6"])} {
			ip, o := spec.build(q.in, q.out)
			f.Add(ip, o.GSOType, o.GSOSize, o.HdrLen, o.CsumStart, o.CsumOffset, o.NeedsCsum)
		}
	}
	n := newNode(f, p.src)
	n.e.c.Default, n.e.c.UDP = ipsec.Discard, memUDP{n: n}
	for _, any := range []string{"0.0.0.0/0", "::/0"} {
		a := netip.MustParsePrefix(any)
		n.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: a, Dst: a}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	}
	n.sa(p.params())
	f.Fuzz(func(t *testing.T, ip []byte, kind uint8, size, hdr, start, offset uint16, needs bool) {
		if len(ip) == 0 || len(ip) > 65535 {
			return
		}
		n.t = t
		before := n.e.Stats()
		sent := n.sendFrames(frameOf(ip, tap.Offload{GSOType: kind, GSOSize: size, HdrLen: hdr, CsumStart: start, CsumOffset: offset, NeedsCsum: needs}))
		s := n.e.Stats()
		if out := s[OutBypassed] - before[OutBypassed]; out != 0 && s[OutProtected] != before[OutProtected] {
			t.Fatalf("%d packets bypassed, others protected", out)
		}
		for _, x := range sent {
			var i packet.Info
			if !packet.Decode(x, &i) {
				t.Fatalf("left: %x", x)
			}
			if s[OutBypassed] == before[OutBypassed] && (i.Src != p.src || i.Dst != p.dst) {
				t.Fatalf("left in clear: %x", x)
			}
		}
	})
}

// BenchmarkSuper is the whole user-space way of a super-frame, from the frame
// to the messages: judge, cut, checksum, seal.
func BenchmarkSuper(b *testing.B) {
	tcp := superSpec{size: 1386, n: 45 * 1386, flags: 0x10, options: true}
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 4 in 4", "udp tunnel 6 in 6", "udp transport 4"} {
		for _, s := range []suite{suites[0], suites[4], {alg.EncrAESGCM16, 256, 0}, suites[7]} {
			p := pairs()[name]
			p.suite = s
			spec := tcp
			if p.in.Is6() || p.src.Is6() {
				spec.size, spec.n = 1346, 45*1346
			}
			if s.auth != 0 {
				spec.size, spec.n = spec.size-40, 45*(spec.size-40)
			}
			out, n := superPath(b, p, p.encap != nil, spec)
			b.Run(name+"/"+s.String(), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					out()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/packet")
			})
		}
	}
}

// BenchmarkSingles is a batch of single frames of one flow.
func BenchmarkSingles(b *testing.B) {
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 4 in 4", "aggfrag 4 in 4", "udp aggfrag 4 in 4"} {
		for _, size := range []int{64, 1372} {
			p := gcm(pairs()[name])
			a, _, _, _ := p.nodes(b)
			a.quiet, a.e.c.UDP = true, memUDP{n: a}
			var fs []*tap.Frame
			ip := udpPacket(p.in, p.out, 1, 2, size)
			for range batch {
				fs = append(fs, frameOf(ip, tap.Offload{}))
			}
			frame := bytes.Clone(fs[0].Buf[headroom : headroom+fs[0].Len])
			now := time.Now()
			b.Run(fmt.Sprintf("%s/%d", name, size), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					for _, f := range fs {
						copy(f.Buf[headroom:], frame) // sealed in place the last time
						a.e.out.frame(f, now)
					}
					if err := a.e.out.flush(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
				if s := a.e.Stats(); s[OutProtected] < uint64(b.N*batch) {
					b.Fatalf("not sent: %v", s.nonzero())
				}
			})
		}
	}
}
