package datapath

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// queued is a node with several queues, whose wire keeps sequence numbers by SPI
// in the order of sending.
type queued struct {
	*node
	n    int
	mu   sync.Mutex
	seqs map[ipsec.SPI][]uint32
	asks []sad.OutKey

	policies []*spd.Entry
}

func (q *queued) Queues() []tap.Queue {
	qs := make([]tap.Queue, q.n)
	for k := range qs {
		qs[k] = memTAP{q.node}
	}
	return qs
}

func (q *queued) WriteBatch(ps []wire.Packet) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range ps {
		b := p.Buf[p.Off+20:]
		spi := ipsec.SPI(binary.BigEndian.Uint32(b))
		q.seqs[spi] = append(q.seqs[spi], binary.BigEndian.Uint32(b[4:]))
	}
	return len(ps), nil
}

// queuedTAP gives queued the other ReadBatch and WriteBatch.
type queuedTAP struct {
	memTAP
	q *queued
}

func (t queuedTAP) Queues() []tap.Queue { return t.q.Queues() }

func newQueued(t testing.TB, n int, local netip.Addr) *queued {
	q := &queued{node: newNode(t, local), n: n, seqs: map[ipsec.SPI][]uint32{}}
	e, err := New(Config{
		TAP: queuedTAP{memTAP{q.node}, q}, Wire: q, SAD: sad.NewDB(), SPD: spd.NewDB(), Default: ipsec.Bypass,
		NeedSA: func(_ *spd.Entry, k sad.OutKey, _ ipsec.Flow) {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.asks = append(q.asks, k)
		},
		LimitReached: func(*sad.SA, bool) {}, Log: zap.NewNop(), Flows: 1024,
	})
	if err != nil {
		t.Fatal(err)
	}
	q.e = e
	return q
}

func (q *queued) workers() []*outWorker { return append([]*outWorker{q.e.out}, q.e.more...) }

// put makes frame k of w one with the IP packet ip, or a super-frame.
func (q *queued) put(w *outWorker, k int, ip []byte, o tap.Offload) {
	f := &w.frames[k]
	f.Off, f.Len, f.Offload = headroom, etherLen+len(ip), o
	copy(f.Buf[headroom:], testMAC)
	f.Buf[headroom+12], f.Buf[headroom+13] = 0x08, 0
	copy(f.Buf[headroom+etherLen:], ip)
}

var queuePair = pair{
	mode: ipsec.Tunnel, src: netip.MustParseAddr("192.0.2.1"), dst: netip.MustParseAddr("198.51.100.2"),
	in: netip.MustParseAddr("10.1.0.1"), out: netip.MustParseAddr("10.2.0.1"), suite: suite{alg.EncrAESGCM16, 128, 0},
}

// tunnels makes policies to n destinations, 10.2.0.1 and up, with an SA each.
func (q *queued) tunnels(n int, change func(k int, p *ipsec.SAParams)) (dsts []netip.Addr, sas []*sad.SA) {
	p := queuePair
	for k := range n {
		r := p.request()
		r.ReqID = ipsec.ReqID(7 + k)
		e := q.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{r}})
		q.policies = append(q.policies, e)
		s := p.params()
		s.SPI, s.ReqID = 0x1000+ipsec.SPI(k), r.ReqID
		if change != nil {
			change(k, s)
		}
		sas = append(sas, q.sa(s))
		dsts = append(dsts, p.out)
		p.out = p.out.Next()
	}
	return dsts, sas
}

// TestTurn: the sequence numbers of SAs that several workers use are sent in
// their order, each once, single packets, super-frames and AGGFRAG alike.
func TestTurn(t *testing.T) {
	q := newQueued(t, 3, queuePair.src)
	dsts, sas := q.tunnels(3, func(k int, p *ipsec.SAParams) { p.AggFrag = k == 2 })
	const rounds = 300
	var wg sync.WaitGroup
	for n, w := range q.workers() {
		wg.Go(func() {
			big, o := (&superSpec{udp: true, n: 2000, size: 100}).build(queuePair.in, dsts[n%2])
			for round := range rounds {
				now := time.Now()
				for k := range 12 {
					if k%4 == 3 {
						q.put(w, k, big, o)
					} else {
						q.put(w, k, udpPacket(queuePair.in, dsts[(round+k+n)%3], 1, 2, 50), tap.Offload{})
					}
					w.frame(&w.frames[k], now)
				}
				if err := w.flush(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, sa := range sas {
		got := q.seqs[sa.P.SPI]
		if !slices.IsSorted(got) || len(got) == 0 || int(got[0]) != 1 || int(got[len(got)-1]) != len(got) {
			t.Errorf("SPI %v: %d numbers, not in order or not each once", sa.P.SPI, len(got))
		}
		if !sa.Turn.TryLock() {
			t.Errorf("SPI %v: somebody still has the turn", sa.P.SPI)
		}
	}
	if n := q.e.Stats()[OutProtected]; n != 3*rounds*(9+3*20) {
		t.Errorf("%d packets protected, want %d", n, 3*rounds*(9+3*20))
	}
}

// TestOwnSA: a queue sends on its own SA, for which it waits for no turn; while
// it has none it asks for one and uses that for any.
func TestOwnSA(t *testing.T) {
	q := newQueued(t, 2, queuePair.src)
	dsts, sas := q.tunnels(1, func(_ int, p *ipsec.SAParams) { p.PerQueue = true })
	policy := q.policies[0]
	send := func(w *outWorker) ipsec.SPI {
		t.Helper()
		clear(q.seqs)
		q.put(w, 0, udpPacket(queuePair.in, dsts[0], 1, 2, 50), tap.Offload{})
		w.frame(&w.frames[0], time.Now())
		if err := w.flush(); err != nil {
			t.Fatal(err)
		}
		for spi := range q.seqs {
			return spi
		}
		t.Fatal("nothing sent")
		return 0
	}
	ws := q.workers()
	for k, w := range ws {
		for range 2 {
			if spi := send(w); spi != sas[0].P.SPI {
				t.Errorf("queue %d sends on %v, want that for any", k+1, spi)
			}
		}
	}
	if len(q.asks) != 2 || q.asks[0].Queue != 1 || q.asks[1].Queue != 2 || q.asks[0].ReqID != 7 {
		t.Errorf("asked for %+v, want one for each queue", q.asks)
	}
	p := queuePair.params()
	p.SPI, p.Queue = 0x2000, 2
	own := q.sa(p)
	own.Turn.Lock() // nobody asks
	q.asks = nil
	if a, b := send(ws[0]), send(ws[1]); a != sas[0].P.SPI || b != own.P.SPI {
		t.Errorf("queues send on %v, %v, want %v, %v", a, b, sas[0].P.SPI, own.P.SPI)
	}
	if len(q.asks) != 1 || q.asks[0].Queue != 1 {
		t.Errorf("asked for %+v, want one for the first queue", q.asks)
	}
	// What waited for an SA goes on that for any.
	if sa := q.e.release.find(policy, sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, Src: p.Src, Dst: p.Dst}); sa != sas[0] {
		t.Errorf("released on %v", sa)
	}
	if n := len(q.e.Queues()); n != 2 {
		t.Errorf("tells of %d queues", n)
	}
}

// BenchmarkQueues: two workers that share nothing, or one SA. Its figures at
// -cpu 1 and 2 tell what a second processor brings.
func BenchmarkQueues(b *testing.B) {
	for name, own := range map[string]bool{"own SAs": true, "one SA": false} {
		b.Run(name, func(b *testing.B) {
			q := newQueued(b, 2, queuePair.src)
			q.quiet = true
			dsts, _ := q.tunnels(1, nil)
			if own {
				for k := range 2 {
					p := queuePair.params()
					p.SPI, p.Queue = 0x2000+ipsec.SPI(k), ipsec.Queue(k+1)
					q.sa(p)
				}
			}
			e := q.e
			e.c.Wire = q.node // keeps nothing
			big, o := (&superSpec{n: 45 * 1398, size: 1398}).build(queuePair.in, dsts[0])
			b.SetBytes(2 * 45 * 1398)
			b.ReportAllocs()
			var wg sync.WaitGroup
			for k, w := range q.workers() {
				wg.Go(func() {
					big := slices.Clone(big)
					big[21] += byte(k) // a flow of its own
					for range b.N {
						q.put(w, 0, big, o)
						w.frame(&w.frames[0], time.Now())
						if err := w.flush(); err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

// recordingQueue keeps the source ports of what is written on it.
type recordingQueue struct {
	memTAP
	ports *[]uint16
}

func (r recordingQueue) WriteBatch(fs []tap.Frame) (int, error) {
	for _, f := range fs {
		ip := f.Buf[f.Off+etherLen:]
		*r.ports = append(*r.ports, binary.BigEndian.Uint16(ip[20:]))
	}
	return len(fs), nil
}

// TestQueueOfFlow: inbound frames are written on the queue of their flow, in
// order, and flows spread.
func TestQueueOfFlow(t *testing.T) {
	q := newQueued(t, 3, queuePair.src)
	got := make([][]uint16, 3)
	for k := range got {
		q.e.queues[k] = recordingQueue{memTAP{q.node}, &got[k]}
	}
	w := q.e.in[0]
	var fs []tap.Frame
	for n := range 900 {
		b := append(make([]byte, headroom), udpPacket(queuePair.out, queuePair.in, uint16(n%300), 5001, 30)...)
		fs = append(fs, tap.Frame{Buf: b, Off: headroom - etherLen, Len: len(b) - headroom + etherLen})
	}
	if err := w.writeTAP(fs); err != nil {
		t.Fatal(err)
	}
	seen := map[uint16]int{}
	for k, ports := range got {
		if len(ports) < 900/5 {
			t.Errorf("queue %d has %d of 900 frames", k, len(ports))
		}
		for i, p := range ports {
			if at, ok := seen[p]; ok && at != k {
				t.Errorf("flow %d is on queues %d and %d", p, at, k)
			}
			seen[p] = k
			if n := len(ports) / 3; i >= n && p != ports[i-n] {
				t.Fatalf("queue %d: out of order", k)
			}
		}
	}
	// One that the kernel sends by another queue is written there.
	for k, w := range q.workers() {
		q.put(w, 0, udpPacket(queuePair.in, queuePair.out, 5001, 7, 30), tap.Offload{})
		w.frame(&w.frames[0], time.Now())
		got[k] = nil
		if err := q.e.in[0].writeTAP(fs[7:8]); err != nil || len(got[k]) != 1 {
			t.Errorf("written on another queue than %d", k)
		}
	}
	for _, p := range []struct{ src, dst netip.Addr }{{queuePair.in, queuePair.out}, {netip.MustParseAddr("fd01::1"), netip.MustParseAddr("fd02::7")}} {
		a, b := udpPacket(p.src, p.dst, 1000, 80, 9), udpPacket(p.dst, p.src, 80, 1000, 9)
		if flowHash(a) != flowHash(b) {
			t.Errorf("%v: both directions differ", p)
		}
		for n := range a {
			flowHash(a[:n]) // whatever is missing
		}
	}
}
