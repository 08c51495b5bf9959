package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

var (
	a4 = netip.MustParseAddr("192.0.2.1")
	b4 = netip.MustParseAddr("192.0.2.2")
	a6 = netip.MustParseAddr("2001:db8::1")
	b6 = netip.MustParseAddr("2001:db8::2")
	// Inner addresses of tunnels.
	ia4 = netip.MustParseAddr("10.1.0.1")
	ib4 = netip.MustParseAddr("10.2.0.1")
	ia6 = netip.MustParseAddr("2001:db8:1::1")
	ib6 = netip.MustParseAddr("2001:db8:2::1")
)

// node is one engine between devices of memory, driven step by step.
type node struct {
	t     testing.TB
	e     *Engine
	local []netip.Addr
	mtu   int
	tap   [][]byte // frames that the kernel got
	offl  []tap.Offload
	wire  [][]byte // packets that the interface got
	udp   []string
	needs []sad.OutKey
	limit []bool // hard, for each report
	quiet bool   // keep nothing: for benchmarks
	wrote int    // frames that the kernel got
	super tap.Super

	trains []int // datagrams of each message of the socket
}

func (n *node) Name() string                         { return "tap0" }
func (n *node) Index() int                           { return 1 }
func (n *node) MAC() net.HardwareAddr                { return testMAC }
func (n *node) MTU() int                             { return 1400 }
func (n *node) SetMTU(int) error                     { return nil }
func (n *node) Persist(bool) error                   { return nil }
func (n *node) ReadSuper() tap.Super                 { return n.super }
func (n *node) Super() tap.Super                     { return n.super }
func (n *node) Cut() uint64                          { return 0 }
func (n *node) Lost() tap.Lost                       { return tap.Lost{} }
func (n *node) Close() error                         { return nil }
func (n *node) PathMTU(netip.Addr) int               { return n.mtu }
func (n *node) ReadBatch([]wire.Packet) (int, error) { panic("not used") }

func (n *node) WriteBatch(ps []wire.Packet) (int, error) {
	for _, p := range ps {
		if !n.quiet {
			n.wire = append(n.wire, bytes.Clone(p.Buf[p.Off:p.Off+p.Len]))
		}
	}
	return len(ps), nil
}

func (n *node) IsLocal(a netip.Addr) bool {
	for _, l := range n.local {
		if l == a {
			return true
		}
	}
	return false
}

var testMAC = net.HardwareAddr{2, 0, 0, 0, 0, 9}

// memTAP gives node the other ReadBatch and WriteBatch.
type memTAP struct{ *node }

func (m memTAP) Queues() []tap.Queue                { return []tap.Queue{m} }
func (m memTAP) ReadBatch([]tap.Frame) (int, error) { panic("not used") }

func (m memTAP) WriteBatch(fs []tap.Frame) (int, error) {
	m.wrote += len(fs)
	for _, f := range fs {
		if m.quiet {
			continue
		}
		frame := f.Buf[f.Off : f.Off+f.Len]
		if f.Off < tap.HeadroomMin {
			m.t.Errorf("frame with %d octets in front", f.Off)
		}
		if f.Offload.GSOType == tap.GSONone || f.Offload.HdrLen == 0 {
			m.tap = append(m.tap, bytes.Clone(frame))
			m.offl = append(m.offl, f.Offload)
			continue
		}
		// What the kernel would make of a super-frame.
		var i packet.Info
		var s packet.Super
		o := f.Offload
		ip := frame[etherLen:]
		if !packet.Decode(ip, &i) || !s.Parse(ip, &i, packet.GSO{Proto: i.Proto, Size: int(o.GSOSize), CsumStart: int(o.CsumStart) - etherLen, CsumOffset: int(o.CsumOffset), NeedsCsum: o.NeedsCsum}) {
			m.t.Errorf("no super-frame: %+v of %d octets", o, len(ip))
			continue
		}
		for k := range s.Segments() {
			seg := append(bytes.Clone(frame[:etherLen]), make([]byte, s.Len(k))...)
			s.Put(seg[etherLen:], k, 0)
			m.tap = append(m.tap, seg)
			m.offl = append(m.offl, tap.Offload{})
		}
	}
	return len(fs), nil
}

func newNode(t testing.TB, local ...netip.Addr) *node {
	n := &node{t: t, local: local, mtu: 1500, super: tap.Super{TCP4: true, TCP6: true, UDP: true}}
	e, err := New(Config{
		TAP: memTAP{n}, Wire: n, SAD: sad.NewDB(), SPD: spd.NewDB(), Default: ipsec.Bypass,
		NeedSA:       func(_ *spd.Entry, k sad.OutKey, _ ipsec.Flow) { n.needs = append(n.needs, k) },
		LimitReached: func(_ *sad.SA, hard bool) { n.limit = append(n.limit, hard) },
		IKE: func(local, remote netip.AddrPort, msg []byte) bool {
			n.udp = append(n.udp, fmt.Sprintf("%v %v %x", local, remote, msg))
			return true
		},
		Log:   zap.NewNop(),
		Flows: 1024,
	})
	if err != nil {
		t.Fatal(err)
	}
	e.in = append(e.in, newInWorker(e, 1024)) // what UDP has
	n.e = e
	return n
}

func (n *node) policy(p ipsec.Policy) *spd.Entry {
	n.t.Helper()
	ed := n.e.c.SPD.Edit()
	e, err := ed.Add(&p, time.Now())
	if err != nil {
		n.t.Fatal(err)
	}
	if err := ed.Commit(); err != nil {
		n.t.Fatal(err)
	}
	return e
}

func (n *node) sa(p *ipsec.SAParams) *sad.SA {
	n.t.Helper()
	s, err := sad.New(p, time.Now())
	if err != nil {
		n.t.Fatal(err)
	}
	if !n.e.c.SAD.Insert(s) {
		n.t.Fatalf("SA %v exists", p.SAID)
	}
	return s
}

// sender returns a function by which the kernel of n sends an IP packet. It allocates
// nothing itself.
func (n *node) sender(ip []byte) func() {
	w, now := n.e.out, time.Now()
	f := &w.frames[0]
	return func() {
		f.Off, f.Len = headroom, etherLen+len(ip)
		copy(f.Buf[headroom:], testMAC)
		copy(f.Buf[headroom+6:], testMAC)
		f.Buf[headroom+12], f.Buf[headroom+13] = 0x08, 0
		if ip[0]>>4 == 6 {
			f.Buf[headroom+12], f.Buf[headroom+13] = 0x86, 0xdd
		}
		copy(f.Buf[headroom+etherLen:], ip)
		w.frame(f, now)
		if err := w.flush(); err != nil {
			n.t.Fatal(err)
		}
	}
}

// send lets the kernel of n send one IP packet, and returns what left by the interface.
func (n *node) send(ip []byte) [][]byte {
	n.t.Helper()
	n.wire, n.tap = nil, nil
	n.sender(ip)()
	return n.wire
}

// sendAllocs is how many allocations it costs that the kernel of n sends an IP packet.
// What leaves is not kept from then on.
func (n *node) sendAllocs(ip []byte) float64 {
	n.quiet = true
	return testing.AllocsPerRun(50, n.sender(ip))
}

// receive lets the interface of n receive packets in one batch, and returns
// the IP packets that the kernel got.
func (n *node) receive(ips ...[]byte) [][]byte {
	n.t.Helper()
	n.wire, n.tap, n.offl = nil, nil, nil
	w := n.e.in[0]
	for _, ip := range ips {
		buf := make([]byte, bufSize)
		copy(buf[headroom+etherLen:], ip)
		w.ip(buf, headroom+etherLen, len(ip), tap.Offload{}, time.Now())
	}
	if err := w.flush(time.Now()); err != nil {
		n.t.Fatal(err)
	}
	return n.delivered()
}

// receiveUDP strips IP and UDP from packets, as the kernel does for a socket.
func (n *node) receiveUDP(ips ...[]byte) [][]byte {
	n.t.Helper()
	n.wire, n.tap, n.offl = nil, nil, nil
	w := n.e.in[1]
	for _, ip := range ips {
		var i packet.Info
		if !packet.Decode(ip, &i) || i.Proto != protoUDP {
			n.t.Fatalf("not UDP: %x", ip)
		}
		buf := make([]byte, bufSize)
		off := headroom + packet.IPv6Len
		k := copy(buf[off:], ip[i.HdrLen+8:i.Len])
		w.train(&wire.Datagram{Buf: buf, Off: off, Len: k, Local: netip.AddrPortFrom(i.Dst, i.DstPort), Remote: netip.AddrPortFrom(i.Src, i.SrcPort)}, time.Now())
	}
	if err := w.flush(time.Now()); err != nil {
		n.t.Fatal(err)
	}
	return n.delivered()
}

func (n *node) delivered() (ips [][]byte) {
	for _, f := range n.tap {
		if !bytes.Equal(f[:6], testMAC) {
			n.t.Errorf("frame for the kernel goes to %x, want the TAP's own %v", f[:6], testMAC)
		}
		ips = append(ips, f[etherLen:])
	}
	return ips
}

// wantCount asserts counters, and that no other drop counter moved.
func (n *node) wantCount(want map[Counter]uint64) {
	n.t.Helper()
	s := n.e.Stats()
	for k, v := range want {
		if s[k] != v {
			n.t.Errorf("%v = %d, want %d", k, s[k], v)
		}
	}
	for c, v := range s {
		if c := Counter(c); v != 0 && want[c] == 0 && len(c.String()) > 5 && c.String()[:5] == "drop_" {
			n.t.Errorf("%v = %d, want 0", c, v)
		}
	}
}

// udpPacket makes an IP packet, DF set, with a UDP datagram of n octets of payload.
func udpPacket(src, dst netip.Addr, sport, dport uint16, n int) []byte {
	hdr := packet.IPv4Len
	if src.Is6() {
		hdr = packet.IPv6Len
	}
	b := make([]byte, hdr+8+n)
	packet.PutHeader(b, src, dst, protoUDP, len(b), 64)
	u := b[hdr:]
	binary.BigEndian.PutUint16(u[0:], sport)
	binary.BigEndian.PutUint16(u[2:], dport)
	binary.BigEndian.PutUint16(u[4:], uint16(8+n))
	for i := range u[8:] {
		u[8+i] = byte(i * 7)
	}
	packet.PutUDPChecksum(b)
	packet.FixIPv4Checksum(b)
	return b
}

type suite struct {
	encr alg.Encr
	bits int
	auth alg.Integ
}

var suites = []suite{
	{alg.EncrAESCBC, 128, alg.IntegHMACSHA1}, {alg.EncrAESCBC, 192, alg.IntegHMACSHA384},
	{alg.EncrAESCBC, 256, alg.IntegHMACSHA256}, {alg.EncrAESCBC, 256, alg.IntegHMACSHA512},
	{alg.EncrAESGCM16, 128, 0}, {alg.EncrAESGCM12, 192, 0}, {alg.EncrAESGCM8, 256, 0},
	{alg.EncrChaCha20Poly1305, 256, 0}, {alg.EncrNULL, 0, alg.IntegHMACSHA256},
}

func (s suite) String() string { return fmt.Sprintf("%v-%d/%v", s.encr, s.bits, s.auth) }

// pair describes two nodes and what protects the traffic from a to b.
type pair struct {
	mode     ipsec.Mode
	src, dst netip.Addr // outer
	in, out  netip.Addr // inner: source and destination
	encap    *ipsec.Encap
	esn      bool
	aggfrag  bool
	suite    suite
}

func prefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func (p *pair) request() ipsec.Request {
	r := ipsec.Request{Proto: ipsec.ESP, Mode: p.mode, Level: ipsec.LevelUnique, ReqID: 7}
	if p.mode == ipsec.Tunnel {
		r.Src, r.Dst = p.src, p.dst
	}
	return r
}

func (p *pair) params() *ipsec.SAParams {
	kl, _ := p.suite.encr.KeyLen(p.suite.bits)
	key := func(n int) ipsec.Key {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i + 3)
		}
		return ipsec.NewKey(b)
	}
	return &ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: p.dst, SPI: 0x1000}, Src: p.src, Mode: p.mode, ReqID: 7,
		Encr: p.suite.encr, EncrKey: key(kl), Auth: p.suite.auth, AuthKey: key(p.suite.auth.Info().KeyLen),
		ReplayWindow: 1024, ESN: p.esn, AggFrag: p.aggfrag, Encap: p.encap,
	}
}

// nodes makes both ends. Policies protect everything between the inner addresses.
func (p *pair) nodes(t testing.TB) (a, b *node, out, in *sad.SA) {
	t.Helper()
	a, b = newNode(t, p.src), newNode(t, p.dst)
	sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	return a, b, a.sa(p.params()), b.sa(p.params())
}

func pairs() map[string]pair {
	natt := &ipsec.Encap{SPort: 4500, DPort: 4500}
	m := map[string]pair{
		"transport 4":    {mode: ipsec.Transport, src: a4, dst: b4, in: a4, out: b4},
		"transport 6":    {mode: ipsec.Transport, src: a6, dst: b6, in: a6, out: b6},
		"tunnel 4 in 4":  {mode: ipsec.Tunnel, src: a4, dst: b4, in: ia4, out: ib4},
		"tunnel 6 in 4":  {mode: ipsec.Tunnel, src: a4, dst: b4, in: ia6, out: ib6},
		"tunnel 4 in 6":  {mode: ipsec.Tunnel, src: a6, dst: b6, in: ia4, out: ib4},
		"tunnel 6 in 6":  {mode: ipsec.Tunnel, src: a6, dst: b6, in: ia6, out: ib6},
		"esn tunnel 4 4": {mode: ipsec.Tunnel, src: a4, dst: b4, in: ia4, out: ib4, esn: true},
		"aggfrag 4 in 4": {mode: ipsec.Tunnel, src: a4, dst: b4, in: ia4, out: ib4, aggfrag: true},
		"aggfrag 6 in 6": {mode: ipsec.Tunnel, src: a6, dst: b6, in: ia6, out: ib6, aggfrag: true, esn: true},
	}
	for k, p := range maps.Clone(m) {
		p.encap = natt
		m["udp "+k] = p
	}
	return m
}

func (n *node) receiveAny(p *pair, ips ...[]byte) [][]byte {
	if p.encap != nil {
		return n.receiveUDP(ips...)
	}
	return n.receive(ips...)
}

func gcm(p pair) pair {
	p.suite = suite{alg.EncrAESGCM16, 128, 0}
	return p
}

func (s Stats) nonzero() map[string]uint64 {
	m := s.Map()
	for k, v := range m {
		if v == 0 {
			delete(m, k)
		}
	}
	return m
}
