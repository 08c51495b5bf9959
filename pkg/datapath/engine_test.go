package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/frag"
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

// send lets the kernel of n send one IP packet, and returns what left by the interface.
func (n *node) send(ip []byte) [][]byte {
	n.t.Helper()
	n.wire, n.tap = nil, nil
	w := n.e.out
	f := &w.frames[0]
	f.Off, f.Len = headroom, etherLen+len(ip)
	copy(f.Buf[headroom:], testMAC)
	copy(f.Buf[headroom+6:], testMAC)
	f.Buf[headroom+12], f.Buf[headroom+13] = 0x08, 0
	if ip[0]>>4 == 6 {
		f.Buf[headroom+12], f.Buf[headroom+13] = 0x86, 0xdd
	}
	copy(f.Buf[headroom+etherLen:], ip)
	w.frame(f, time.Now())
	if err := w.flush(); err != nil {
		n.t.Fatal(err)
	}
	return n.wire
}

// sendAllocs is how many allocations it costs that the kernel of n sends an IP packet.
// What leaves is not kept from then on.
func (n *node) sendAllocs(ip []byte) float64 {
	n.t.Helper()
	n.quiet = true
	f, now := frameOf(ip, tap.Offload{}), time.Now()
	return testing.AllocsPerRun(50, func() {
		f.Off, f.Len = headroom, etherLen+len(ip)
		n.e.out.frame(f, now)
		if err := n.e.out.flush(); err != nil {
			n.t.Fatal(err)
		}
	})
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

// TestProtect: every mode, family, encapsulation and suite carries packets of
// awkward lengths unchanged, and shows nothing of them on the wire.
func TestProtect(t *testing.T) {
	for name, p := range pairs() {
		for _, s := range suites {
			t.Run(name+" "+s.String(), func(t *testing.T) {
				p := p
				p.suite = s
				a, b, _, _ := p.nodes(t)
				count := uint64(0)
				for _, n := range []int{0, 1, 2, 3, 13, 14, 15, 16, 17, 100, 1300} {
					ip := udpPacket(p.in, p.out, 1000, 2000, n)
					sent := a.send(ip)
					if len(sent) != 1 {
						t.Fatalf("payload %d: %d packets left", n, len(sent))
					}
					if n >= 13 && s.encr != alg.EncrNULL && bytes.Contains(sent[0], ip[len(ip)-n:]) {
						t.Fatalf("payload %d is in clear", n)
					}
					var i packet.Info
					if !packet.Decode(sent[0], &i) || i.Src != p.src || i.Dst != p.dst || i.Len != len(sent[0]) {
						t.Fatalf("payload %d: outer packet %+v", n, i)
					}
					if want := map[bool]uint8{true: protoUDP, false: protoESP}[p.encap != nil]; i.Proto != want {
						t.Fatalf("protocol %d, want %d", i.Proto, want)
					}
					got := b.receiveAny(&p, sent...)
					if len(got) != 1 {
						t.Fatalf("payload %d: %d packets arrived; %v", n, len(got), b.e.Stats().nonzero())
					}
					if p.encap != nil && p.mode == ipsec.Transport {
						got[0] = got[0][len(got[0])-8-n:] // the IP header is a new one
						ip = ip[len(ip)-8-n:]
					}
					if !bytes.Equal(got[0], ip) {
						t.Fatalf("payload %d:\ngot  %x\nwant %x", n, got[0], ip)
					}
					count++
				}
				a.wantCount(map[Counter]uint64{OutProtected: count})
				b.wantCount(map[Counter]uint64{InProtected: count})
			})
		}
	}
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

func gcm(p pair) pair {
	p.suite = suite{alg.EncrAESGCM16, 128, 0}
	return p
}

// TestHostile: what an attacker on the path can do to a packet is dropped under
// the right name, and the packet itself still arrives afterwards.
func TestHostile(t *testing.T) {
	for name, p := range pairs() {
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, b, _, in := p.nodes(t)
			good := a.send(udpPacket(p.in, p.out, 1, 2, 64))[0]
			mod := func(f func([]byte) []byte) []byte { return f(bytes.Clone(good)) }
			want := map[Counter]uint64{}
			espAt := len(good) - espLen(t, &p, good)

			for at := espAt; at < len(good); at++ {
				bad := mod(func(x []byte) []byte { x[at] ^= 1; return x })
				if got := b.receiveAny(&p, bad); len(got) != 0 {
					t.Fatalf("bit flipped at %d: passed", at)
				}
			}
			s := b.e.Stats()
			if n := s[DropInAuth] + s[DropInNoSA] + s[DropInReplay]; n != uint64(len(good)-espAt) {
				t.Errorf("flipped bits: %d drops counted, want %d: %v", n, len(good)-espAt, s.nonzero())
			}
			for _, k := range []Counter{DropInAuth, DropInNoSA, DropInReplay} {
				want[k] = s[k]
			}
			for n := espAt; n < len(good); n++ {
				bad := mod(func(x []byte) []byte {
					x = x[:n]
					packet.SetLen(x, n)
					packet.FixIPv4Checksum(x)
					if p.encap != nil {
						binary.BigEndian.PutUint16(x[espAt-4:], uint16(n-espAt+8))
					}
					return x
				})
				if got := b.receiveAny(&p, bad); len(got) != 0 {
					t.Fatalf("cut to %d: passed", n)
				}
			}
			s = b.e.Stats()
			want[DropInMalformed], want[DropInAuth] = s[DropInMalformed], s[DropInAuth]
			if n := s[DropInMalformed] + s[DropInAuth]; n < uint64(len(good)-espAt) {
				t.Errorf("cut: only %d drops counted: %v", n, s.nonzero())
			}
			if got := b.receiveAny(&p, good, good); len(got) != 1 {
				t.Fatalf("the packet twice in one batch: %d arrived; %v", len(got), b.e.Stats().nonzero())
			}
			if got := b.receiveAny(&p, good); len(got) != 0 {
				t.Fatal("replayed packet passed")
			}
			want[DropInReplay] += 2
			want[InProtected] = 1
			b.wantCount(want)
			if in.AuthErrors.Load() == 0 || in.ReplayErrors.Load() < 2 {
				t.Errorf("SA counts %d auth and %d replay errors", in.AuthErrors.Load(), in.ReplayErrors.Load())
			}
		})
	}
}

func espLen(t *testing.T, p *pair, b []byte) int {
	var i packet.Info
	if !packet.Decode(b, &i) {
		t.Fatal("not IP")
	}
	if p.encap != nil {
		return i.Len - i.HdrLen - 8
	}
	return i.Len - i.HdrLen
}

// TestInboundJudgement: RFC 4301, 5.2: what comes out of an SA must be what SA
// and policy expect, and clear packets must not be what they protect.
func TestInboundJudgement(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	protected := func(a *node) []byte { return a.send(udpPacket(p.in, p.out, 1, 2, 64))[0] }
	for _, tt := range []struct {
		name string
		mod  func(a, b *node) []byte
		want Counter
		pass bool
	}{
		{"as it should be", func(a, b *node) []byte { return protected(a) }, InProtected, true},
		{"clear", func(a, b *node) []byte { return udpPacket(p.in, p.out, 1, 2, 64) }, DropInClear, false},
		{"clear of others", func(a, b *node) []byte { return udpPacket(a4, b4, 1, 2, 64) }, InBypassed, true},
		{"clear IKE", func(a, b *node) []byte { return udpPacket(a4, b4, 500, 500, 64) }, InBypassed, true},
		{"clear from the port of IKE to another", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}, Action: ipsec.Discard})
			return udpPacket(a4, b4, 500, 53, 64)
		}, DropInDiscard, false},
		{"discard policy", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}, Action: ipsec.Discard})
			return udpPacket(a4, b4, 1, 2, 64)
		}, DropInDiscard, false},
		{"IKE under a discard policy", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}, Action: ipsec.Discard})
			return udpPacket(a4, b4, 500, 500, 64)
		}, InBypassed, true},
		{"bypass before protect", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP, DstPort: 53}, Action: ipsec.Bypass, Priority: 0})
			return udpPacket(p.in, p.out, 1, 53, 64)
		}, InBypassed, true},
		{"protected, where policy says bypass", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP}, Action: ipsec.Bypass, Priority: 0})
			return protected(a)
		}, DropInPolicy, false},
		{"another policy's SA", func(a, b *node) []byte {
			r := p.request()
			r.ReqID = 8
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP}, Action: ipsec.Protect, Priority: 0, Requests: []ipsec.Request{r}})
			return protected(a)
		}, DropInPolicy, false},
		{"transport wanted", func(a, b *node) []byte {
			r := p.request()
			r.Mode, r.Src, r.Dst = ipsec.Transport, netip.Addr{}, netip.Addr{}
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP}, Action: ipsec.Protect, Priority: 0, Requests: []ipsec.Request{r}})
			return protected(a)
		}, DropInPolicy, false},
		{"forward policy for others", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.Fwd, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Discard})
			return protected(a)
		}, DropInPolicy, false},
		{"AH", func(a, b *node) []byte {
			x := protected(a)
			x[9] = protoAH
			packet.FixIPv4Checksum(x)
			return x
		}, DropInNoSA, false},
		{"not IP", func(a, b *node) []byte {
			return []byte{0x45, 0, 0, 99, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
		}, DropInMalformed, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := newNode(t, p.src), newNode(t, p.dst)
			sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
			for n, d := range map[*node]ipsec.Direction{a: ipsec.Out, b: ipsec.In} {
				n.policy(ipsec.Policy{Dir: d, Sel: sel, Action: ipsec.Protect, Priority: 10, Requests: []ipsec.Request{p.request()}})
				n.sa(p.params())
			}
			got := b.receive(tt.mod(a, b))
			if (len(got) == 1) != tt.pass {
				t.Errorf("%d packets passed, want pass %v", len(got), tt.pass)
			}
			b.wantCount(map[Counter]uint64{tt.want: 1})
		})
	}
}

// TestOverlappingPolicies: of two policies with overlapping selectors, the SA of
// the later one carries what lies in its own selectors, even where the earlier one
// comes first, if that asks for no more than the SA does.
func TestOverlappingPolicies(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	aes := []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA256}}
	same := func(*ipsec.Policy) {}
	within := func(q *ipsec.SAParams) {
		q.SrcTS = []ipsec.TrafficSelector{{Start: p.in, End: p.in, PortHi: 65535}}
		q.DstTS = []ipsec.TrafficSelector{{Start: p.out, End: p.out, PortHi: 65535}}
	}
	for _, tt := range []struct {
		name  string
		first func(*ipsec.Policy)
		sa    func(*ipsec.SAParams)
		want  Counter
	}{
		{"any algorithms", same, within, InProtected},
		{"the same algorithms", func(f *ipsec.Policy) { f.Proposals = append(aes, ipsec.Proposal{Encr: p.params().Encr}) }, within, InProtected},
		{"SA without selectors", same, func(*ipsec.SAParams) {}, DropInPolicy},
		{"SA for other packets", same, func(q *ipsec.SAParams) { within(q); q.SrcTS[0].Proto = 6 }, DropInSelector},
		{"other algorithms", func(f *ipsec.Policy) { f.Proposals = aes }, within, DropInPolicy},
		{"other end points", func(f *ipsec.Policy) { f.Requests[0].Src = p.in }, within, DropInPolicy},
		{"any peer", func(f *ipsec.Policy) { f.Requests[0].Src = netip.IPv4Unspecified() }, within, DropInPolicy},
		{"an SA for each flow", func(f *ipsec.Policy) { f.Flags = ipsec.PolicyPerFlow }, within, DropInPolicy},
		{"NULL", same, func(q *ipsec.SAParams) {
			within(q)
			q.Encr, q.EncrKey, q.Auth, q.AuthKey = alg.EncrNULL, ipsec.Key{}, alg.IntegHMACSHA256, ipsec.NewKey(make([]byte, 32))
		}, DropInPolicy},
		{"SHA-1", same, func(q *ipsec.SAParams) {
			within(q)
			q.Encr, q.EncrKey, q.Auth, q.AuthKey = alg.EncrAESCBC, ipsec.NewKey(make([]byte, 16)), alg.IntegHMACSHA1, ipsec.NewKey(make([]byte, 20))
		}, DropInPolicy},
		{"SHA-1 that is named", func(f *ipsec.Policy) {
			f.Proposals = []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1}}
		}, func(q *ipsec.SAParams) {
			within(q)
			q.Encr, q.EncrKey, q.Auth, q.AuthKey = alg.EncrAESCBC, ipsec.NewKey(make([]byte, 16)), alg.IntegHMACSHA1, ipsec.NewKey(make([]byte, 20))
		}, InProtected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := newNode(t, p.src), newNode(t, p.dst)
			wide := ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: netip.MustParsePrefix("0.0.0.0/0")}
			first := ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Priority: 1, Requests: []ipsec.Request{p.request()}}
			first.Requests[0].ReqID = 8
			tt.first(&first)
			b.policy(first)
			q := p.params()
			tt.sa(q)
			for n, d := range map[*node]ipsec.Direction{a: ipsec.Out, b: ipsec.In} {
				n.policy(ipsec.Policy{Dir: d, Sel: wide, Action: ipsec.Protect, Priority: 10, Requests: []ipsec.Request{p.request()}})
			}
			b.sa(q)
			s := *q
			s.SrcTS, s.DstTS = nil, nil
			a.sa(&s)
			got := b.receive(a.send(udpPacket(p.in, p.out, 1, 2, 64))...)
			if (len(got) == 1) != (tt.want == InProtected) {
				t.Errorf("%d packets passed", len(got))
			}
			b.wantCount(map[Counter]uint64{tt.want: 1})
		})
	}
}

// TestSelectorOfSA: traffic selectors of the SA restrict beyond the policy.
func TestSelectorOfSA(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, b := newNode(t, p.src), newNode(t, p.dst)
	sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	a.sa(p.params())
	q := p.params()
	q.SrcTS = []ipsec.TrafficSelector{{Start: p.in, End: p.in, Proto: protoUDP, PortHi: 1023}}
	q.DstTS = []ipsec.TrafficSelector{{Start: p.out, End: p.out, PortHi: 65535}}
	b.sa(q)
	if got := b.receive(a.send(udpPacket(p.in, p.out, 1000, 2, 9))...); len(got) != 1 {
		t.Errorf("within the selectors: %d arrived", len(got))
	}
	if got := b.receive(a.send(udpPacket(p.in, p.out, 1024, 2, 9))...); len(got) != 0 {
		t.Error("outside the selectors: arrived")
	}
	b.wantCount(map[Counter]uint64{InProtected: 1, DropInSelector: 1})
}

// TestTransportSource: the outer source of a transport-mode packet is not
// covered by the ICV; only the SA's peer may stand there.
func TestTransportSource(t *testing.T) {
	for _, name := range []string{"transport 4", "udp transport 4"} {
		p := gcm(pairs()[name])
		a, b, _, _ := p.nodes(t)
		b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		x := a.send(udpPacket(p.in, p.out, 1, 2, 64))[0]
		copy(x[12:16], netip.MustParseAddr("192.0.2.77").AsSlice())
		packet.FixIPv4Checksum(x)
		if got := b.receiveAny(&p, x); len(got) != 0 {
			t.Errorf("%s: %d packets of a stranger's address arrived", name, len(got))
		}
		b.wantCount(map[Counter]uint64{DropInSelector: 1})
	}
}

// TestEncapMismatch: an SA is either in UDP or not (RFC 3948).
func TestEncapMismatch(t *testing.T) {
	p, q := gcm(pairs()["tunnel 4 in 4"]), gcm(pairs()["udp tunnel 4 in 4"])
	a, _, _, _ := p.nodes(t)
	_, b, _, _ := q.nodes(t)
	if got := b.receive(a.send(udpPacket(p.in, p.out, 1, 2, 64))...); len(got) != 0 {
		t.Error("native ESP passed an SA of ESP in UDP")
	}
	b.wantCount(map[Counter]uint64{DropInEncap: 1})
}

// TestOutboundVerdicts.
func TestOutboundVerdicts(t *testing.T) {
	sel := ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}
	for _, tt := range []struct {
		name   string
		policy *ipsec.Policy
		def    ipsec.Action
		packet []byte
		want   Counter
		sent   int
	}{
		{"no policy", nil, ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), OutBypassed, 1},
		{"no policy, default drop", nil, ipsec.Discard, udpPacket(a4, b4, 1, 2, 3), DropOutNoPolicy, 0},
		{"IKE under default drop", nil, ipsec.Discard, udpPacket(a4, b4, 500, 500, 30), OutBypassed, 1},
		{"to the port of IKE from another", nil, ipsec.Discard, udpPacket(a4, b4, 5000, 500, 30), DropOutNoPolicy, 0},
		{"others' IKE under default drop", nil, ipsec.Discard, udpPacket(ia4, b4, 500, 500, 30), DropOutNoPolicy, 0},
		{"bypass", &ipsec.Policy{Action: ipsec.Bypass}, ipsec.Discard, udpPacket(a4, b4, 1, 2, 3), OutBypassed, 1},
		{"discard", &ipsec.Policy{Action: ipsec.Discard}, ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), DropOutDiscard, 0},
		{"malformed", nil, ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3)[:25], DropOutMalformed, 0},
		{"protect without SA", &ipsec.Policy{Action: ipsec.Protect, Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelRequire}}},
			ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), OutHeld, 0},
		{"level use without SA", &ipsec.Policy{Action: ipsec.Protect, Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelUse}}},
			ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), OutBypassed, 1},
		{"IKE under protect", &ipsec.Policy{Action: ipsec.Protect, Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelRequire}}},
			ipsec.Bypass, udpPacket(a4, b4, 4500, 4500, 30), OutBypassed, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, a4)
			n.e.c.Default = tt.def
			if tt.policy != nil {
				p := *tt.policy
				p.Dir, p.Sel = ipsec.Out, sel
				n.policy(p)
			}
			if got := n.send(tt.packet); len(got) != tt.sent {
				t.Errorf("%d packets left, want %d", len(got), tt.sent)
			}
			n.wantCount(map[Counter]uint64{tt.want: 1})
			if wantAsk := tt.policy != nil && tt.policy.Action == ipsec.Protect && tt.packet[20] != 0x11; (len(n.needs) == 1) != wantAsk {
				t.Errorf("asked for %d SAs, want one: %v", len(n.needs), wantAsk)
			}
		})
	}
}

// TestHold: packets wait for their SA in order, the oldest fall out, one
// question is asked, and what came of it decides their fate.
func TestHold(t *testing.T) {
	p := gcm(pairs()["transport 4"])
	for _, fate := range []string{"installed", "failed"} {
		t.Run(fate, func(t *testing.T) {
			a, b := newNode(t, p.src), newNode(t, p.dst)
			sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
			a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			for i := range HoldLimit + 3 {
				if got := a.send(udpPacket(p.in, p.out, uint16(i), 2, i)); len(got) != 0 {
					t.Fatal("sent without an SA")
				}
			}
			if len(a.needs) != 1 || a.e.Held() != HoldLimit {
				t.Fatalf("%d questions, %d held; want 1, %d", len(a.needs), a.e.Held(), HoldLimit)
			}
			want := map[Counter]uint64{OutHeld: HoldLimit + 3, DropOutHold: 3}
			if fate == "failed" {
				a.e.Failed(a.needs[0])
				want[DropOutHold] += HoldLimit
				a.wantCount(want)
				if a.e.Held() != 0 {
					t.Errorf("%d still held", a.e.Held())
				}
				a.send(udpPacket(p.in, p.out, 1, 2, 3))
				if len(a.needs) != 2 {
					t.Errorf("%d questions after a failure and a new packet, want 2", len(a.needs))
				}
				return
			}
			a.sa(p.params())
			b.sa(p.params())
			a.e.Installed(a.needs[0])
			a.wire = nil
			if err := a.e.release.sendHeld(make([]byte, bufSize)); err != nil {
				t.Fatal(err)
			}
			got := b.receive(a.wire...)
			if len(got) != HoldLimit {
				t.Fatalf("%d arrived, want %d", len(got), HoldLimit)
			}
			for i, x := range got {
				if w := udpPacket(p.in, p.out, uint16(i+3), 2, i+3); !bytes.Equal(x, w) {
					t.Fatalf("packet %d: got %x, want %x", i, x, w)
				}
			}
			want[OutReleased], want[OutProtected] = HoldLimit, HoldLimit
			a.wantCount(want)
		})
	}
}

// TestEarly: packets that overtake the keys of their SA wait for them, in order,
// for a while and in a bounded number.
func TestEarly(t *testing.T) {
	for name, p := range pairs() {
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, _, _, _ := p.nodes(t)
			b := newNode(t, p.dst)
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			larval := sad.NewLarval(p.params(), time.Now())
			b.e.c.SAD.Insert(larval)
			var want [][]byte
			for n := range earlyLimit + 5 {
				ip := udpPacket(p.in, p.out, 1, 2, n%100)
				if got := b.receiveAny(&p, a.send(ip)...); len(got) != 0 {
					t.Fatal("opened without keys")
				}
				want = append(want, ip)
			}
			sa, err := sad.New(p.params(), time.Now())
			if err != nil || !b.e.c.SAD.Replace(larval, sa) {
				t.Fatal("not replaced", err)
			}
			if err := b.e.late.receiveEarly(time.Now()); err != nil {
				t.Fatal(err)
			}
			got := b.delivered()
			if len(got) != earlyLimit {
				t.Fatalf("%d opened, want %d: %v", len(got), earlyLimit, b.e.Stats().nonzero())
			}
			for i := range got {
				if x := got[i][len(got[i])-i%100:]; !bytes.Equal(x, want[i][len(want[i])-i%100:]) {
					t.Fatalf("packet %d is another", i)
				}
			}
			b.wantCount(map[Counter]uint64{InEarly: earlyLimit, InProtected: earlyLimit, DropInNoSA: 5})

			b.e.early.put(p.params().SAID, inJob{buf: make([]byte, 100)}, make([]byte, 50), time.Now().Add(-2*earlyAge))
			if ps, old := b.e.early.take(func(ipsec.SAID) bool { return true }, time.Now()); len(ps) != 0 || old != 1 {
				t.Errorf("%d packets of long ago, %d forgotten", len(ps), old)
			}
		})
	}
}

// TestTooBig: a sender that can make packets smaller is told to; the size it is
// told fits exactly. Others have the result cut, and it is put together again.
func TestTooBig(t *testing.T) {
	for name, p := range pairs() {
		for _, df := range []bool{true, false} {
			if p.in.Is6() && !df {
				continue
			}
			t.Run(fmt.Sprintf("%s df %v", name, df), func(t *testing.T) {
				p := gcm(p)
				a, b, _, _ := p.nodes(t)
				a.mtu = 1500
				ip := udpPacket(p.in, p.out, 1, 2, 1490-len(udpPacket(p.in, p.out, 1, 2, 0)))
				if p.in.Is4() && !df {
					packet.ClearDF(ip)
					packet.FixIPv4Checksum(ip)
				}
				sent := a.send(ip)
				if !df {
					if len(sent) != 2 {
						t.Fatalf("%d packets left, want 2 fragments", len(sent))
					}
					if p.encap != nil {
						return // the kernel's UDP socket puts these together
					}
					for _, f := range sent {
						if len(f) > a.mtu {
							t.Errorf("fragment of %d octets", len(f))
						}
					}
					got := b.receive(sent[1], sent[0])
					if len(got) == 1 && p.mode == ipsec.Transport { // the result's identification stays
						copy(got[0][4:6], ip[4:6])
						packet.FixIPv4Checksum(got[0])
					}
					if len(got) != 1 || !bytes.Equal(got[0], ip) {
						t.Fatalf("%d packets arrived: %v", len(got), b.e.Stats().nonzero())
					}
					b.wantCount(map[Counter]uint64{InProtected: 1, InFragments: 2})
					return
				}
				if len(sent) != 0 || len(a.tap) != 1 {
					t.Fatalf("%d left, %d answers", len(sent), len(a.tap))
				}
				a.wantCount(map[Counter]uint64{OutTooBig: 1})
				m := a.tap[0][etherLen:]
				var i packet.Info
				if !packet.Decode(m, &i) || i.Dst != p.in {
					t.Fatalf("answer %x", m)
				}
				var mtu int
				if p.in.Is4() {
					mtu = int(binary.BigEndian.Uint16(m[i.HdrLen+6:]))
				} else {
					mtu = int(binary.BigEndian.Uint32(m[i.HdrLen+4:]))
				}
				fit := func(n int) [][]byte {
					return a.send(udpPacket(p.in, p.out, 1, 2, n-len(udpPacket(p.in, p.out, 1, 2, 0))))
				}
				if got := fit(mtu); len(got) != 1 || len(got[0]) > a.mtu {
					t.Errorf("a packet of the mtu %d that was told does not fit", mtu)
				}
				if got := fit(mtu + 1); len(got) != 0 {
					t.Errorf("mtu %d was told, but %d fits", mtu, mtu+1)
				}
			})
		}
	}
}

// TestFragmentsFromKernel: transport mode protects whole datagrams, whatever
// the kernel made of them on the way to the TAP.
func TestFragmentsFromKernel(t *testing.T) {
	p := gcm(pairs()["transport 4"])
	a, b, _, _ := p.nodes(t)
	ip := udpPacket(p.in, p.out, 1, 2, 5000)
	var out [][]byte
	for _, f := range cut(t, ip, 1400) {
		out = append(out, a.send(f)...)
	}
	if len(out) < 4 {
		t.Fatalf("%d packets left", len(out))
	}
	got := b.receive(out...)
	if len(got) != 1 {
		t.Fatalf("%d arrived: %v", len(got), b.e.Stats().nonzero())
	}
	if !bytes.Equal(got[0][20:], ip[20:]) {
		t.Error("payload differs")
	}
}

// TestDummyAndTFC: next header 59 is dropped without complaint (RFC 4303,
// 2.6), and what lies behind the inner packet is cut off (2.7).
func TestDummyAndTFC(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, b, out, _ := p.nodes(t)
	seal := func(next uint8, payload []byte) []byte {
		h, n := out.T.HeaderLen(), len(payload)
		buf := make([]byte, 20+h+n+out.T.TrailerLen(n))
		copy(buf[20+h:], payload)
		seq, _ := out.NextSeq(1)
		w := a.e.out
		w.seals = append(w.seals[:0], espPacket(buf[20:], buf[20+h:20+h+n:len(buf)], next, seq))
		out.T.Seal(w.scratch, w.seals)
		if w.seals[0].Err != nil {
			t.Fatal(w.seals[0].Err)
		}
		w.seals = w.seals[:0]
		packet.PutHeader(buf, p.src, p.dst, protoESP, len(buf), 64)
		packet.FixIPv4Checksum(buf)
		return buf
	}
	if got := b.receive(seal(protoNone, make([]byte, 40))); len(got) != 0 {
		t.Error("dummy packet delivered")
	}
	ip := udpPacket(p.in, p.out, 1, 2, 30)
	if got := b.receive(seal(protoIPv4, append(bytes.Clone(ip), make([]byte, 77)...))); len(got) != 1 || !bytes.Equal(got[0], ip) {
		t.Errorf("packet with TFC padding: got %x", got)
	}
	if got := b.receive(seal(protoUDP, ip)); len(got) != 0 {
		t.Error("tunnel SA delivered next header UDP")
	}
	b.wantCount(map[Counter]uint64{InDummy: 1, InProtected: 1, DropInMalformed: 1})
}

// TestUDP4500: keepalives vanish, IKE goes to the key daemon without its
// marker, anything else is ESP.
// TestPadded: packets of an SA with TFC padding all have one length on the wire, as
// far as they are no longer than that, segments of a super-frame too; the receiver
// delivers what was sent, and the way out allocates nothing.
func TestPadded(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "tunnel 6 in 4", "udp tunnel 4 in 4"} {
		for _, tfc := range []uint16{300, ipsec.TFCPathMTU} {
			p := gcm(pairs()[name])
			for _, socket := range []bool{false, true} {
				if socket && p.encap == nil {
					continue
				}
				a, b := newNode(t, p.src), newNode(t, p.dst)
				a.mtu = 1500
				sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
				a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
				b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
				q := p.params()
				b.sa(q)
				padded := *q
				padded.TFC = tfc
				a.sa(&padded)
				if socket {
					a.e.c.UDP = memUDP{n: a}
				}
				wire := func(n int) int {
					t.Helper()
					ip := udpPacket(p.in, p.out, 1, 2, n)
					out := a.send(ip)
					if len(out) != 1 {
						t.Fatalf("%s, %d octets: %d packets left", name, n, len(out))
					}
					if got := b.receiveAny(&p, out...); len(got) != 1 || !bytes.Equal(got[0], ip) {
						t.Fatalf("%s, %d octets: got %x, want %x; %v", name, n, got, ip, b.e.Stats().nonzero())
					}
					return len(out[0])
				}
				lens := []int{wire(0), wire(1), wire(77), wire(250)}
				for _, n := range lens {
					if n != lens[0] {
						t.Errorf("%s, TFC %d: packets of %v octets", name, tfc, lens)
						break
					}
				}
				count := uint64(4)
				long := wire(1200)
				switch {
				case tfc == ipsec.TFCPathMTU:
					count++
					if long != lens[0] || long > a.mtu || long < a.mtu-8 {
						t.Errorf("%s: %d and %d octets, want what fits into %d", name, long, lens[0], a.mtu)
					}
				case long < 1200:
					t.Errorf("%s: %d octets", name, long)
				}
				if got := a.e.Stats()[OutPadded]; got != count {
					t.Errorf("%s, TFC %d: %d counted, want %d", name, tfc, got, count)
				}
				if n := a.sendAllocs(udpPacket(p.in, p.out, 1, 2, 100)); n != 0 {
					t.Errorf("%s: %v allocations a packet", name, n)
				}
			}
		}
	}
}

// TestCompressed: an SA with a CPI carries what compresses behind an IPComp header
// and everything else as one without; the receiver delivers what was sent, and
// drops what has another CPI.
func TestCompressed(t *testing.T) {
	kinds := pairs()
	for name, p := range pairs() {
		if p.encap != nil {
			kinds[name+", socket"] = p
		}
	}
	for name, p := range kinds {
		if p.aggfrag {
			continue
		}
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, b := newNode(t, p.src), newNode(t, p.dst)
			a.mtu = 1500
			sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
			a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			q := p.params()
			q.CPI = 0x1234
			b.sa(q)
			q = p.params()
			q.CPI = 0x1234
			a.sa(q)
			if strings.HasSuffix(name, "socket") {
				a.e.c.UDP = memUDP{n: a}
			}
			pass := func(ip []byte) int {
				t.Helper()
				out := a.send(ip)
				if len(out) != 1 {
					t.Fatalf("%d octets: %d packets left", len(ip), len(out))
				}
				if got := b.receiveAny(&p, out...); len(got) != 1 || !bytes.Equal(got[0], ip) {
					t.Fatalf("%d octets: got %x, want %x; %v", len(ip), got, ip, b.e.Stats().nonzero())
				}
				return len(out[0])
			}
			text := func(n int) []byte {
				ip := udpPacket(p.in, p.out, 1, 2, n)
				clear(ip[len(ip)-n:])
				packet.FixTransportChecksum(ip, len(ip)-n-8, protoUDP)
				return ip
			}
			noise := udpPacket(p.in, p.out, 1, 2, 1000)
			rand.NewChaCha8([32]byte{1}).Read(noise[len(noise)-1000:])
			packet.FixTransportChecksum(noise, len(noise)-1008, protoUDP)
			if n := pass(text(1000)); n > 300 {
				t.Errorf("1000 zeros became %d octets", n)
			}
			if n := pass(text(4000)); n > 400 { // longer than the path takes
				t.Errorf("4000 zeros became %d octets", n)
			}
			if n := pass(noise); n < len(noise) {
				t.Errorf("noise of %d octets became %d", len(noise), n)
			}
			pass(text(10))
			if got := a.e.Stats()[OutCompressed]; got != 2 {
				t.Errorf("%d counted, want 2", got)
			}
			if s := b.e.Stats(); s[InProtected] != 4 || s[InExpanded] != 2 {
				t.Errorf("receiver: %v", s.nonzero())
			}
			if n := a.sendAllocs(text(1000)); n != 0 {
				t.Errorf("%v allocations a packet", n)
			}
		})
	}
	for _, cpi := range []uint16{0, 0x1235} {
		p := gcm(pairs()["tunnel 4 in 4"])
		a, b := newNode(t, p.src), newNode(t, p.dst)
		sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		q := p.params()
		q.CPI = cpi
		b.sa(q)
		q = p.params()
		q.CPI = 0x1234
		a.sa(q)
		ip := udpPacket(p.in, p.out, 1, 2, 1000)
		clear(ip[28:])
		if got := b.receive(a.send(ip)...); len(got) != 0 {
			t.Errorf("CPI %d: a packet with another was delivered", cpi)
		}
		want := DropInIPComp
		if cpi == 0 {
			want = DropInMalformed
		}
		b.wantCount(map[Counter]uint64{want: 1})
	}
}

func TestUDP4500(t *testing.T) {
	b := newNode(t, b4)
	give := func(payload []byte) {
		x := udpPacket(a4, b4, 4500, 4500, len(payload))
		copy(x[28:], payload)
		b.receiveUDP(x)
	}
	give([]byte{0xff})
	give([]byte{0, 0, 0, 0, 1, 2, 3})
	give([]byte{0, 0, 1, 0, 0, 0, 0, 1, 9})
	give([]byte{1})
	if len(b.udp) != 1 || b.udp[0] != "192.0.2.2:4500 192.0.2.1:4500 010203" {
		t.Errorf("key daemon got %q", b.udp)
	}
	b.wantCount(map[Counter]uint64{InKeepalive: 1, InIKE: 1, DropInNoSA: 1, DropInMalformed: 1})
}

// TestUDP4500Fragments: a datagram that came in fragments reaches the same place.
func TestUDP4500Fragments(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, b, _, _ := p.nodes(t)
	b.e.c.UDP = noUDP{}
	ip := udpPacket(p.in, p.out, 1, 2, 1490-28)
	packet.ClearDF(ip)
	packet.FixIPv4Checksum(ip)
	sent := a.send(ip)
	if len(sent) != 2 {
		t.Fatalf("%d packets left, want 2 fragments", len(sent))
	}
	if got := b.receive(sent...); len(got) != 1 || !bytes.Equal(got[0], ip) {
		t.Errorf("%d packets arrived: %v", len(got), b.e.Stats().nonzero())
	}
	ike := udpPacket(a4, b4, 4500, 4500, 2000)
	clear(ike[28:32])
	packet.ClearDF(ike)
	b.receive(cut(t, ike, 1400)...)
	if want := fmt.Sprintf("192.0.2.2:4500 192.0.2.1:4500 %x", ike[32:]); len(b.udp) != 1 || b.udp[0] != want {
		t.Errorf("key daemon got %d messages", len(b.udp))
	}
	b.wantCount(map[Counter]uint64{InFragments: 4, InProtected: 1, InIKE: 1})
}

// noUDP says that there is port 4500; the tests hand over datagrams themselves.
type noUDP struct{ wire.UDPConn }

// TestECN: congestion on the way shows inside, in and out of UDP (RFC 6040).
func TestECN(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "tunnel 6 in 6"} {
		p := gcm(pairs()[name])
		a, b, _, _ := p.nodes(t)
		ip := udpPacket(p.in, p.out, 1, 2, 30)
		packet.SetECN(ip, 2) // ECT(0)
		packet.FixIPv4Checksum(ip)
		sent := a.send(ip)
		packet.SetECN(sent[0], 3) // CE
		packet.FixIPv4Checksum(sent[0])
		got := b.receive(sent...)
		var i packet.Info
		if len(got) != 1 || !packet.Decode(got[0], &i) || i.TOS&3 != 3 {
			t.Errorf("%s: %d packets, inner ECN %d, want 3", name, len(got), i.TOS&3)
		}
	}
}

// TestLimits: soft once, hard stops the SA.
func TestLimits(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a := newNode(t, p.src)
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	q := p.params()
	q.Soft.Packets, q.Hard.Packets = 2, 4
	a.sa(q)
	sent := 0
	for range 6 {
		sent += len(a.send(udpPacket(p.in, p.out, 1, 2, 3)))
	}
	if sent != 4 || len(a.limit) != 2 || a.limit[0] || !a.limit[1] {
		t.Errorf("sent %d, reports of hard limits %v", sent, a.limit)
	}
	a.wantCount(map[Counter]uint64{OutProtected: 4, DropOutLifetime: 2})
}

// frugal are the suites of which a packet may not cost an allocation.
func frugal(t *testing.T) []suite {
	if !purego {
		return suites
	}
	t.Log("ChaCha20-Poly1305 is left out: the portable code of x/crypto allocates")
	return slices.DeleteFunc(slices.Clone(suites), func(s suite) bool { return s.encr == alg.EncrChaCha20Poly1305 })
}

// TestNoAlloc: the paths of ordinary packets allocate nothing.
func TestNoAlloc(t *testing.T) {
	suites := frugal(t)
	for name, p := range pairs() {
		for _, s := range suites {
			p.suite = s
			out, in := hotPath(t, p)
			if n := testing.AllocsPerRun(100, out); n != 0 {
				t.Errorf("%s %v outbound: %v allocations a packet", name, s, n)
			}
			if n := testing.AllocsPerRun(100, in); n != 0 {
				t.Errorf("%s %v inbound: %v allocations a packet", name, s, n)
			}
		}
	}
}

// hotPath returns functions that send one packet of 1300 octets, and receive one.
func hotPath(t testing.TB, p pair) (out, in func()) {
	a, b, _, _ := p.nodes(t)
	q := p.params()
	q.ReplayWindow, q.SPI = 0, 0x2000
	b.sa(q)
	c := newNode(t, p.src)
	c.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	c.sa(q)
	ip := udpPacket(p.in, p.out, 1, 2, 1300)
	sealed := c.send(ip)[0]
	a.quiet, b.quiet = true, true
	now := time.Now()
	f := &a.e.out.frames[0]
	out = func() {
		f.Off, f.Len = headroom, etherLen+len(ip)
		f.Buf[headroom+12], f.Buf[headroom+13] = 0x08, 0
		if p.in.Is6() {
			f.Buf[headroom+12], f.Buf[headroom+13] = 0x86, 0xdd
		}
		copy(f.Buf[headroom+etherLen:], ip)
		a.e.out.frame(f, now)
		if err := a.e.out.flush(); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, bufSize)
	var i packet.Info
	packet.Decode(sealed, &i)
	d := wire.Datagram{Buf: buf, Local: netip.AddrPortFrom(p.dst, 4500), Remote: netip.AddrPortFrom(p.src, 4500)}
	in = func() {
		if p.encap != nil {
			d.Off = headroom + packet.IPv6Len
			d.Len = copy(buf[d.Off:], sealed[i.HdrLen+8:])
			b.e.in[1].datagram(&d, now)
			b.e.in[1].flush(now)
			return
		}
		copy(buf[headroom+etherLen:], sealed)
		b.e.in[0].ip(buf, headroom+etherLen, len(sealed), tap.Offload{}, now)
		b.e.in[0].flush(now)
	}
	out()
	in()
	if s := a.e.Stats(); s[OutProtected] != 1 {
		t.Fatalf("not sent: %v", s.nonzero())
	}
	if s := b.e.Stats(); s[InProtected] != 1 {
		t.Fatalf("not received: %v", s.nonzero())
	}
	return out, in
}

func BenchmarkPacket(b *testing.B) {
	for _, name := range []string{"transport 4", "tunnel 4 in 4", "udp tunnel 6 in 4"} {
		for _, s := range []suite{suites[0], suites[4], suites[7]} {
			p := pairs()[name]
			p.suite = s
			out, in := hotPath(b, p)
			b.Run(name+"/"+s.String()+"/out", func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(1300)
				for b.Loop() {
					out()
				}
			})
			b.Run(name+"/"+s.String()+"/in", func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(1300)
				for b.Loop() {
					in()
				}
			})
		}
	}
}

// cut makes IPv4 fragments of a packet, as a kernel does for a small MTU.
func cut(t *testing.T, ip []byte, mtu int) (fs [][]byte) {
	var i packet.Info
	if !packet.Decode(ip, &i) {
		t.Fatal("not IP")
	}
	if err := frag.Split(ip, &i, mtu, 77, func(f []byte) error {
		fs = append(fs, bytes.Clone(f))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return fs
}

func espPacket(dst, src []byte, next uint8, seq uint64) esp.Packet {
	return esp.Packet{Dst: dst, Src: src, Next: next, Seq: seq}
}

// TestCountRuns: the packets of a batch share one reservation of sequence
// numbers and one account, and numbers, limits and the end of numbers are as
// exact as for packets one by one.
func TestCountRuns(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 4 in 4"} {
		p := gcm(pairs()[name])
		one := udpPacket(p.in, p.out, 1, 2, 30)
		spec := superSpec{udp: true, size: 100, n: 350}
		many, o := spec.build(p.in, p.out)
		start := func(q *ipsec.SAParams) (*node, *sad.SA) {
			a := newNode(t, p.src)
			a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			sa := a.sa(q)
			if p.encap != nil {
				a.e.c.UDP = memUDP{n: a}
			}
			return a, sa
		}
		frames := func(n int) (fs []*tap.Frame) {
			for range n {
				fs = append(fs, frameOf(one, tap.Offload{}))
			}
			return fs
		}
		numbers := func(sent [][]byte) (seqs []uint32) {
			var i packet.Info
			for _, b := range sent {
				if !packet.Decode(b, &i) {
					t.Fatalf("%s: %x", name, b)
				}
				off := i.HdrLen + 4
				if p.encap != nil {
					off += packet.UDPLen
				}
				seqs = append(seqs, binary.BigEndian.Uint32(b[off:]))
			}
			return seqs
		}
		t.Run(name, func(t *testing.T) {
			a, sa := start(p.params())
			sent := a.sendFrames(slices.Concat(frames(5), []*tap.Frame{frameOf(many, o)}, frames(3))...)
			if got, want := numbers(sent), []uint32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}; !slices.Equal(got, want) {
				t.Errorf("numbers %v, want %v", got, want)
			}
			if want := uint64(8*len(one) + len(many) + 3*28); sa.Packets() != 12 || sa.Bytes() != want || a.e.out.counted != 0 {
				t.Errorf("account of %d packets, %d octets, want 12, %d", sa.Packets(), sa.Bytes(), want)
			}
			var i packet.Info
			packet.Decode(one, &i)
			if e, _ := a.e.c.SPD.Lookup(ipsec.Out, &i); e == nil || e.Packets() != 12 {
				t.Errorf("policy: %+v, want 12 packets", e)
			}

			for _, bytes := range []bool{false, true} {
				q := p.params()
				q.Soft.Packets, q.Hard.Packets = 2, 4
				if bytes {
					q.Soft, q.Hard = ipsec.Lifetime{Bytes: uint64(len(one) + 1)}, ipsec.Lifetime{Bytes: uint64(5*len(one) - 1)}
				}
				a, _ = start(q)
				if sent := a.sendFrames(frames(6)...); !slices.Equal(numbers(sent), []uint32{1, 2, 3, 4}) || len(a.limit) != 2 || a.limit[0] || !a.limit[1] {
					t.Errorf("limits: sent %v, reports of hard ones %v", numbers(sent), a.limit)
				}
				a.wantCount(map[Counter]uint64{OutProtected: 4, DropOutLifetime: 2})
			}

			a, sa = start(p.params())
			sa.NextSeq(1<<32 - 1 - 3) // three are left
			if sent := a.sendFrames(frames(5)...); !slices.Equal(numbers(sent), []uint32{1<<32 - 3, 1<<32 - 2, 1<<32 - 1}) {
				t.Errorf("end of numbers: sent %v", numbers(sent))
			}
			a.wantCount(map[Counter]uint64{OutProtected: 3, DropOutSequence: 2})
		})
	}
}
