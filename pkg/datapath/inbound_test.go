package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/replay"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// tcpPacket makes an IP packet, DF set, with n octets of a TCP stream.
func tcpPacket(src, dst netip.Addr, sport uint16, id uint16, seq uint32, flags uint8, n int) []byte {
	hdr := packet.IPv4Len
	if src.Is6() {
		hdr = packet.IPv6Len
	}
	b := make([]byte, hdr+20+n)
	packet.PutHeader(b, src, dst, protoTCP, len(b), 64)
	if src.Is4() {
		binary.BigEndian.PutUint16(b[4:], id)
		packet.FixIPv4Checksum(b)
	}
	t := b[hdr:]
	binary.BigEndian.PutUint16(t, sport)
	binary.BigEndian.PutUint16(t[2:], 80)
	binary.BigEndian.PutUint32(t[4:], seq)
	t[12], t[13] = 5<<4, flags
	for k := range n {
		t[20+k] = byte(int(seq) + k)
	}
	packet.FixTransportChecksum(b, hdr, protoTCP)
	return b
}

// stream is n packets of one TCP connection.
func (p *pair) stream(sport uint16, n, size int) (ips [][]byte) {
	for k := range n {
		ips = append(ips, tcpPacket(p.in, p.out, sport, uint16(k), uint32(k*size), 0x10, size))
	}
	return ips
}

// sealed is what leaves for each of the IP packets.
func (n *node) sealed(ips [][]byte) (out [][]byte) {
	n.t.Helper()
	for _, ip := range ips {
		sent := n.send(ip)
		if len(sent) != 1 {
			n.t.Fatalf("%d packets left for one", len(sent))
		}
		out = append(out, bytes.Clone(sent[0]))
	}
	return out
}

// payload is what UDP carries in ip.
func payload(t testing.TB, ip []byte) []byte {
	var i packet.Info
	if !packet.Decode(ip, &i) || i.Proto != protoUDP {
		t.Fatalf("not UDP: % x", ip)
	}
	return ip[i.HdrLen+packet.UDPLen : i.Len]
}

// train joins UDP payloads as UDP_GRO does: of equal lengths, the last may be shorter.
func train(p *pair, payloads [][]byte) (ds []wire.Datagram) {
	var d *wire.Datagram
	for _, b := range payloads {
		if d == nil || len(b) > d.Segment || d.Len%d.Segment != 0 || d.Len+len(b) > 65000 || d.Len/d.Segment >= 64 {
			ds = append(ds, wire.Datagram{
				Buf: make([]byte, headroom+packet.IPv6Len, bufSize), Off: headroom + packet.IPv6Len, Segment: len(b),
				Local: netip.AddrPortFrom(p.dst, 4500), Remote: netip.AddrPortFrom(p.src, 4500),
			})
			d = &ds[len(ds)-1]
		}
		d.Buf = append(d.Buf, b...)
		d.Len += len(b)
	}
	for k := range ds {
		ds[k].Buf = ds[k].Buf[:bufSize]
		if ds[k].Len == ds[k].Segment {
			ds[k].Segment = 0
		}
	}
	return ds
}

// receiveBatch receives packets as one batch, in trains where they come in UDP.
func (n *node) receiveBatch(p *pair, ips [][]byte) [][]byte {
	n.t.Helper()
	if p.encap == nil {
		return n.receive(ips...)
	}
	n.wire, n.tap, n.offl = nil, nil, nil
	w := n.e.in[1]
	var payloads [][]byte
	for _, ip := range ips {
		payloads = append(payloads, payload(n.t, ip))
	}
	ds := train(p, payloads)
	for k := range ds {
		w.train(&ds[k], time.Now())
	}
	if err := w.flush(time.Now()); err != nil {
		n.t.Fatal(err)
	}
	return n.delivered()
}

// TestBatch: every mode, family, encapsulation and suite delivers what it would
// deliver packet by packet, in fewer frames.
func TestBatch(t *testing.T) {
	for name, p := range pairs() {
		for _, s := range suites {
			t.Run(name+" "+s.String(), func(t *testing.T) {
				p := p
				p.suite = s
				a, b, _, _ := p.nodes(t)
				c := newNode(t, p.dst)
				c.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
				c.sa(p.params())
				c.super, c.e.in[0].gro.Kinds, c.e.in[1].gro.Kinds = tap.Super{}, tap.Super{}, tap.Super{}

				var ips [][]byte
				one, two := p.stream(1, 30, 1300), p.stream(2, 30, 90)
				for k := range one {
					ips = append(ips, one[k], two[k])
				}
				ips = append(ips, p.stream(3, 40, 1200)...)
				for range 20 {
					ips = append(ips, udpPacket(p.in, p.out, 7, 8, 500))
				}
				sent := a.sealed(ips)
				want := [][]byte{}
				for _, ip := range sent {
					want = append(want, c.receiveAny(&p, bytes.Clone(ip))...)
				}
				got := b.receiveBatch(&p, sent)
				if len(want) != len(ips) {
					t.Fatalf("%d of %d packets arrived one by one: %v", len(want), len(ips), c.e.Stats().nonzero())
				}
				sameFlows(t, got, want)
				if c.wrote != len(ips) || b.wrote > 10 {
					t.Errorf("%d packets in %d frames, want at most 10; and %d without super-frames", len(ips), b.wrote, c.wrote)
				}
				st := b.e.Stats()
				if st[InSuper] == 0 || st[InCoalesced] < uint64(len(ips))-10 {
					t.Errorf("counted %d packets in %d super-frames", st[InCoalesced], st[InSuper])
				}
				b.wantCount(map[Counter]uint64{InProtected: uint64(len(ips))})
			})
		}
	}
}

// sameFlows compares packets in the order of each flow. Where both have DF set,
// identification may count up instead of staying.
func sameFlows(t testing.TB, got, want [][]byte) {
	t.Helper()
	split := func(ips [][]byte) map[ipsec.Flow][][]byte {
		m := map[ipsec.Flow][][]byte{}
		for _, ip := range ips {
			var i packet.Info
			if !packet.Decode(ip, &i) {
				t.Fatalf("not a packet: % x", ip)
			}
			ip = bytes.Clone(ip[:i.Len])
			if i.DF {
				ip[4], ip[5] = 0, 0
				packet.FixIPv4Checksum(ip)
			}
			m[i.Flow()] = append(m[i.Flow()], ip)
		}
		return m
	}
	g, w := split(got), split(want)
	for f := range w {
		for k := range w[f] {
			if k >= len(g[f]) || !bytes.Equal(g[f][k], w[f][k]) {
				t.Fatalf("%v, packet %d of %d (got %d):\ngot  % x\nwant % x", f, k, len(w[f]), len(g[f]), g[f][min(k, max(0, len(g[f])-1)):][:1], w[f][k])
			}
		}
	}
	if len(got) != len(want) {
		t.Fatalf("got %d packets, want %d", len(got), len(want))
	}
}

// TestFollows: a packet that continues the last one's flow by another SA, from another
// peer or marked on its way is judged by itself, in the midst of a train of equal ones.
func TestFollows(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, b, _, _ := p.nodes(t)
	// b knows another SA with a, for other addresses.
	other := p.params()
	other.SPI, other.ReqID = 0x2000, 8
	b.sa(other)
	r := p.request()
	r.ReqID = 8
	b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.src), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{r}})
	forger := newNode(t, p.src)
	forger.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{r}})
	forger.sa(other)
	var moved []netip.AddrPort
	b.e.c.NewMapping = func(_ *sad.SA, from netip.AddrPort) { moved = append(moved, from) }

	ips := p.stream(1, 10, 500)
	for _, ip := range ips[:6] {
		ip[1] |= 2 // ECT(0)
		packet.FixIPv4Checksum(ip)
	}
	sent := a.sealed(ips)
	ds := func(ips ...[]byte) []wire.Datagram {
		var ps [][]byte
		for _, ip := range ips {
			ps = append(ps, payload(t, ip))
		}
		return train(&p, ps)
	}
	forged, marked, elsewhere := ds(forger.sealed([][]byte{ips[3], ips[3]})...), ds(sent[4:6]...), ds(sent[7], sent[8])
	marked[0].TOS = 3 // CE
	elsewhere[0].Remote = netip.AddrPortFrom(p.src, 4501)
	b.tap, b.offl = nil, nil
	for _, d := range slices.Concat(ds(sent[:3]...), forged, ds(sent[3]), marked, ds(sent[6]), elsewhere, ds(sent[9])) {
		b.e.in[1].train(&d, time.Now())
	}
	if err := b.e.in[1].flush(time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, ip := range ips[4:6] {
		ip[1] |= 3
		packet.FixIPv4Checksum(ip)
	}
	sameFlows(t, b.delivered(), ips)
	b.wantCount(map[Counter]uint64{InProtected: 10, DropInPolicy: 2})
	if len(moved) != 2 || moved[0].Port() != 4501 {
		t.Errorf("mappings %v, want one for each of two packets", moved)
	}
	if n := b.e.Stats()[InSuper]; n == 0 {
		t.Error("nothing was joined")
	}
}

// TestBatchSize: long trains are read a few at a time, also by a worker that has come
// to read many that were short; many again when they are short, not at every pause.
func TestBatchSize(t *testing.T) {
	n := newNode(t)
	w := n.e.in[1]
	room, keepalives := 0, uint64(0)
	for i, k := range []struct{ come, each, room int }{
		{8, 45, 8}, {8, 45, 8}, {8, 8, 8}, {64, 8, 64}, {64, 9, 64}, {8, 45, 8}, {8, 1, 8}, {64, 1, 64}, {20, 30, 64},
		{8, 9, 8}, {8, 2, 8}, {20, 2, 64}, {7, 2, 64}, {1, 1, 8},
	} {
		w.grams.batch = func(ds []wire.Datagram) (int, error) {
			room = len(ds)
			for j := range ds[:min(k.come, room)] {
				d := &ds[j]
				d.Len, d.Segment = k.each, 1
				copy(d.Buf[d.Off:], bytes.Repeat([]byte{0xff}, k.each))
				keepalives += uint64(k.each)
			}
			return min(k.come, room), nil
		}
		if _, err := w.stepUDP(); err != nil {
			t.Fatal(err)
		}
		if room != k.room {
			t.Fatalf("batch %d: room for %d, want %d", i, room, k.room)
		}
	}
	if got := n.e.Stats()[InKeepalive]; got != keepalives {
		t.Errorf("%d keepalives, want %d", got, keepalives)
	}
}

// TestTrain: of the datagrams that the kernel joined each is what it is by
// itself, and does not touch its neighbours.
func TestTrain(t *testing.T) {
	for name, p := range pairs() {
		if p.encap == nil {
			continue
		}
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, b, _, _ := p.nodes(t)
			ips := p.stream(1, 6, 200)
			sent := a.sealed(ips)
			var ds [][]byte
			for _, s := range sent {
				ds = append(ds, payload(t, s))
			}
			ike := append(make([]byte, 4), bytes.Repeat([]byte{7}, len(ds[0])-4)...)
			forged := bytes.Clone(ds[2])
			forged[len(forged)-1] ^= 1
			unknown := bytes.Clone(ds[2])
			unknown[0] ^= 1
			d := train(&p, [][]byte{ds[0], ike, ds[1], forged, ds[2], unknown, ds[3], ds[3], ds[4], ds[5], {0xff}})
			if len(d) != 1 {
				t.Fatalf("%d trains", len(d))
			}
			w := b.e.in[1]
			w.train(&d[0], time.Now())
			if err := w.flush(time.Now()); err != nil {
				t.Fatal(err)
			}
			want := ips
			if p.mode == ipsec.Transport { // the header is a new one
				want = nil
				for _, ip := range ips {
					ip = bytes.Clone(ip)
					packet.FixIPv4Checksum(ip)
					want = append(want, ip)
				}
			}
			sameFlows(t, b.delivered(), want)
			if len(b.udp) != 1 || !bytes.HasSuffix([]byte(b.udp[0]), []byte(fmt.Sprintf("%x", ike[4:]))) {
				t.Errorf("messages for IKE: %v", b.udp)
			}
			b.wantCount(map[Counter]uint64{InProtected: 6, InIKE: 1, InKeepalive: 1, DropInAuth: 1, DropInNoSA: 1, DropInReplay: 1})
		})
	}
}

// Every packet of a train passes the checks itself, also where the one before
// it was of the same flow and passed.
func TestTrainJudgement(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 4 in 4"} {
		t.Run(name, func(t *testing.T) {
			p := gcm(pairs()[name])
			a, b := newNode(t, p.src), newNode(t, p.dst)
			wide := ipsec.Selector{Src: netip.MustParsePrefix("10.1.0.0/16"), Dst: prefix(p.out)}
			a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: wide, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			q := p.params()
			a.sa(q)
			q.Hard.Packets = 6
			b.sa(q)
			q.SPI, q.Hard.Packets = 0x2000, 0
			stranger := p
			stranger.in = netip.MustParseAddr("10.1.0.2")
			good, bad := p.stream(1, 5, 100), stranger.stream(1, 2, 100)
			sent := a.sealed([][]byte{good[0], bad[0], good[1], good[2], bad[1], good[3], good[4]})
			// The seventh is beyond the hard limit.
			sameFlows(t, b.receiveBatch(&p, sent), good[:4])
			b.wantCount(map[Counter]uint64{InProtected: 4, DropInPolicy: 2, DropInLifetime: 1})
		})
	}
}

// TestBatchEquivalence: random traffic of several flows, with loss, replays,
// forgeries, and wrong checksums by the sender, arrives in trains and in batches
// as it does packet by packet.
func TestBatchEquivalence(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 4 in 4", "udp tunnel 6 in 6", "udp transport 6", "transport 4"} {
		p := gcm(pairs()[name])
		for seed := range uint64(20) {
			t.Run(fmt.Sprint(name, " seed ", seed), func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 7))
				a, b, _, _ := p.nodes(t)
				_, c, _, _ := p.nodes(t)
				c.super, c.e.in[0].gro.Kinds, c.e.in[1].gro.Kinds = tap.Super{}, tap.Super{}, tap.Super{}
				var ips [][]byte
				size := []int{40, 1300, 600}[r.IntN(3)]
				seqs := [5]uint32{}
				for range 150 {
					f := r.IntN(5)
					n := size
					if r.IntN(8) == 0 {
						n = r.IntN(size)
					}
					ip := tcpPacket(p.in, p.out, uint16(f), uint16(seqs[f]/uint32(size)), seqs[f], []uint8{0x10, 0x10, 0x10, 0x18, 0x11}[r.IntN(5)], n)
					if f == 4 {
						ip = udpPacket(p.in, p.out, 4, 5, n)
					}
					seqs[f] += uint32(n)
					switch r.IntN(20) {
					case 0:
						ip[len(ip)-1] ^= 0x55 // checksum
					case 1:
						packet.SetECN(ip, 3)
					case 2:
						seqs[f] += uint32(size) // loss
					}
					ips = append(ips, ip)
				}
				sent := a.sealed(ips)
				for range 10 { // replays, reordering and forgeries
					k, j := r.IntN(len(sent)), r.IntN(len(sent))
					sent[k], sent[j] = sent[j], sent[k]
					sent = append(sent, bytes.Clone(sent[j]))
					forged := sent[r.IntN(len(sent))]
					forged[len(forged)-1] ^= uint8(r.IntN(2))
				}
				var want [][]byte
				for _, ip := range sent {
					want = append(want, c.receiveAny(&p, bytes.Clone(ip))...)
				}
				got := [][]byte{}
				for len(sent) > 0 {
					n := min(len(sent), 1+r.IntN(100))
					got = append(got, b.receiveBatch(&p, sent[:n])...)
					sent = sent[n:]
				}
				sameFlows(t, got, want)
				bs, cs := b.e.Stats(), c.e.Stats()
				for _, s := range []*Stats{&bs, &cs} {
					// A forged replay in one batch with the original is opened.
					s[DropInAuth] += s[DropInReplay]
					s[DropInReplay] = 0
				}
				for k := range bs {
					if k := Counter(k); k != InCoalesced && k != InSuper && bs[k] != cs[k] {
						t.Errorf("%v: %d, one by one %d", k, bs[k], cs[k])
					}
				}
			})
		}
	}
}

// refusing is a TAP that is gone after a number of frames, or that refuses some.
type refusing struct {
	memTAP
	err error
}

func (r refusing) WriteBatch([]tap.Frame) (int, error) { return 0, r.err }

// What the TAP refuses is counted by packets; one that is gone ends the worker.
func TestRefused(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, b, _, _ := p.nodes(t)
	sent := a.sealed(p.stream(1, 12, 100))
	b.e.c.TAP = refusing{memTAP{b}, unix.EIO}
	b.receiveBatch(&p, sent[:10])
	if n := b.e.Stats()[DropInTAP]; n != 10 {
		t.Errorf("%v = %d, want 10", DropInTAP, n)
	}
	b.e.c.TAP = refusing{memTAP{b}, unix.EBADFD}
	w := b.e.in[1]
	d := train(&p, [][]byte{payload(t, sent[10]), payload(t, sent[11])})
	w.train(&d[0], time.Now())
	if err := w.flush(time.Now()); !errors.Is(err, unix.EBADFD) {
		t.Errorf("flush: %v, want EBADFD", err)
	}
	b.e.c.TAP = memTAP{b}
	if err := w.flush(time.Now()); err != nil {
		t.Errorf("flush of nothing: %v", err)
	}
}

// Kinds that the TAP has come to refuse are no longer made, and the log says so
// once.
func TestLessSuper(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, b, _, _ := p.nodes(t)
	core, logs := observer.New(zap.WarnLevel)
	b.e.c.Log = zap.New(core)
	ips := p.stream(1, 20, 100)
	sent := a.sealed(ips)
	got := b.receiveBatch(&p, sent[:10])
	b.super.TCP4 = false
	got = append(got, b.receiveBatch(&p, sent[10:12])...)
	frames := b.wrote
	got = append(got, b.receiveBatch(&p, sent[12:])...)
	if n := b.wrote - frames; n != 8 {
		t.Errorf("8 packets in %d frames", n)
	}
	if logs.Len() != 1 {
		t.Errorf("log: %v, want one line", logs.All())
	}
	sameFlows(t, got, ips)
}

// batchPath prepares a batch of n packets of a TCP stream, and returns what
// receives it.
func batchPath(t testing.TB, p pair, n, size int) func() {
	a, b, _, in := p.nodes(t)
	in.Window = replay.New(0, false)
	return replayPath(t, p, b, a.sealed(p.stream(1, n, size)))
}

// replayPath returns a function that lets b, which has no window, receive sent
// as one batch.
func replayPath(t testing.TB, p pair, b *node, sent [][]byte) func() {
	b.quiet = true
	now := time.Now()
	flush := func(w *inWorker) {
		if err := w.flush(now); err != nil {
			t.Fatal(err)
		}
		if w.n.v[InSuper].Load() == 0 {
			t.Fatal(b.e.Stats().nonzero())
		}
	}
	if p.encap != nil {
		var payloads [][]byte
		for _, ip := range sent {
			payloads = append(payloads, payload(t, ip))
		}
		ds := train(&p, payloads)
		keep := make([][]byte, len(ds))
		for k := range ds {
			keep[k] = bytes.Clone(ds[k].Buf[ds[k].Off : ds[k].Off+ds[k].Len])
		}
		return func() {
			for k := range ds {
				copy(ds[k].Buf[ds[k].Off:], keep[k])
				b.e.in[1].train(&ds[k], now)
			}
			flush(b.e.in[1])
		}
	}
	bufs := make([][]byte, len(sent))
	for k := range bufs {
		bufs[k] = make([]byte, headroom+etherLen+len(sent[k])+tailroom)
	}
	return func() {
		for k, ip := range sent {
			copy(bufs[k][headroom+etherLen:], ip)
			b.e.in[0].ip(bufs[k], headroom+etherLen, len(ip), tap.Offload{}, now)
		}
		flush(b.e.in[0])
	}
}

// TestBatchNoAlloc: nor does a batch.
func TestBatchNoAlloc(t *testing.T) {
	suites := frugal(t)
	for name, p := range pairs() {
		if p.esn {
			continue // the window that replays need would not be one
		}
		for _, s := range suites {
			p.suite = s
			run := batchPath(t, p, 60, 1000)
			run()
			if n := testing.AllocsPerRun(20, run); n != 0 {
				t.Errorf("%s %v: %v allocations a batch", name, s, n)
			}
		}
	}
}

// BenchmarkBatch: ns per packet of a TCP stream, from the datagrams as they are
// received to the super-frames as they are written.
func BenchmarkBatch(b *testing.B) {
	for _, c := range []struct {
		name string
		size int
	}{{"udp tunnel 4 in 4", 1398}, {"udp tunnel 6 in 6", 1338}, {"tunnel 4 in 4", 1398}, {"udp transport 4", 1398}, {"udp tunnel 4 in 4", 24}} {
		for _, s := range []suite{{alg.EncrAESGCM16, 128, 0}, {alg.EncrNULL, 0, alg.IntegHMACSHA256}} {
			if s.encr == alg.EncrNULL && c.size == 24 {
				continue
			}
			b.Run(fmt.Sprintf("%s/%d/%v", c.name, c.size, s), func(b *testing.B) {
				p := pairs()[c.name]
				p.suite = s
				const n = 44
				run := batchPath(b, p, n, c.size)
				b.SetBytes(int64(c.size))
				b.ReportAllocs()
				for i := 0; i < b.N; i += n {
					run()
				}
			})
		}
	}
}
