package sad

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"weak"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

var (
	t0   = time.Unix(1e9, 0)
	src  = netip.MustParseAddr("192.0.2.1")
	dst  = netip.MustParseAddr("198.51.100.2")
	src6 = netip.MustParseAddr("2001:db8::1")
	dst6 = netip.MustParseAddr("2001:db8::2")
)

func params(spi ipsec.SPI, reqid ipsec.ReqID) *ipsec.SAParams {
	return &ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: dst, SPI: spi}, Src: src, Mode: ipsec.Tunnel, ReqID: reqid,
		Encr: alg.EncrAESGCM16, EncrKey: ipsec.NewKey(make([]byte, 20)), ReplayWindow: 64,
	}
}

func mustNew(t testing.TB, p *ipsec.SAParams) *SA {
	t.Helper()
	s, err := New(p, t0)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// An SA whose ports changed does not keep what it replaced in memory.
func TestWithEncapForgets(t *testing.T) {
	old := mustNew(t, params(256, 0))
	was := weak.Make(old)
	is := old.WithEncap(&ipsec.Encap{SPort: 4500, DPort: 1024})
	for end := time.Now().Add(time.Minute); was.Value() != nil; runtime.GC() {
		if time.Now().After(end) {
			t.Fatal("it does")
		}
	}
	if is.Account(1, 100, t0); is.Packets() != 1 { // is lives
		t.Error("a packet was not counted")
	}
}

// fake makes an SA without the cost of a transform of its own.
func fake(like *SA, spi ipsec.SPI, d netip.Addr, reqid ipsec.ReqID) *SA {
	p := like.P
	p.SPI, p.Dst, p.ReqID = spi, d, reqid
	s := newSA(&p, Mature, t0)
	s.T = like.T
	return s
}

func TestNoKeysInSA(t *testing.T) {
	p := params(256, 0)
	s := mustNew(t, p)
	if s.P.EncrKey.Len() != 0 || s.P.AuthKey.Len() != 0 {
		t.Error("the SA holds keys")
	}
	if p.EncrKey.Len() != 20 {
		t.Error("the caller's key is gone")
	}
	p.EncrKey = ipsec.NewKey(make([]byte, 19))
	if _, err := New(p, t0); err == nil {
		t.Error("key of 19 octets: no error")
	}
}

func TestLookup(t *testing.T) {
	d := NewDB()
	a, b := mustNew(t, params(256, 0)), NewLarval(&ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: dst6, SPI: 256}, Src: src6}, t0)
	for _, s := range []*SA{a, b} {
		if !d.Insert(s) || d.Insert(s) {
			t.Fatalf("%v: insert", s.P.SAID)
		}
	}
	for _, c := range []struct {
		id   ipsec.SAID
		want *SA
	}{
		{ipsec.SAID{Proto: ipsec.ESP, Dst: dst, SPI: 256}, a},
		{ipsec.SAID{Proto: ipsec.ESP, Dst: dst6, SPI: 256}, b},
		{ipsec.SAID{Proto: ipsec.AH, Dst: dst, SPI: 256}, nil},
		{ipsec.SAID{Proto: ipsec.ESP, Dst: dst, SPI: 257}, nil},
		{ipsec.SAID{Proto: ipsec.ESP, Dst: src, SPI: 256}, nil},
		{ipsec.SAID{}, nil},
	} {
		if got := d.Lookup(c.id); got != c.want {
			t.Errorf("%v: got %v, want %v", c.id, got, c.want)
		}
	}
	g := d.Generation()
	if !d.Remove(a) || d.Remove(a) || d.Lookup(a.P.SAID) != nil || d.Len() != 1 || a.State() != Dead || d.Generation() == g {
		t.Error("remove")
	}
}

func TestOut(t *testing.T) {
	d := NewDB()
	like := mustNew(t, params(256, 0))
	i := &packet.Info{Version: 4, Proto: 6, Src: src, Dst: dst, SrcPort: 1, DstPort: 80, HasPorts: true}
	k := OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Src: src, Dst: dst}
	k7 := k
	k7.ReqID = 7
	want := func(what string, k OutKey, want *SA) {
		t.Helper()
		if got := d.Out(k, i); got != want {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	want("empty", k, nil)
	larval := NewLarval(params(1000, 7), t0)
	d.Insert(larval)
	want("larval", k7, nil)

	a, b := fake(like, 257, dst, 7), fake(like, 258, dst, 0)
	d.Insert(a)
	want("reqid 7 serves any", k, a)
	want("reqid 7", k7, a)
	d.Insert(b)
	want("newest first", k, b)
	want("unique ignores others", k7, a)
	other := k
	other.Mode = ipsec.Transport
	want("other mode", other, nil)

	b.SetState(Dying)
	want("mature before dying", k, a)
	a.SetState(Dying)
	want("newest dying", k, b)
	c := fake(like, 259, dst, 7)
	c.P.DstTS = []ipsec.TrafficSelector{{Proto: 6, Start: dst, End: dst, PortLo: 443, PortHi: 443}}
	d.Insert(c)
	want("selectors do not hold the packet", k, b)
	i.DstPort = 443
	want("selectors hold the packet", k, c)
	i.HasPorts = false
	want("packet without ports", k, b)
	if got := d.Out(k, nil); got != c {
		t.Errorf("no packet: got %v, want %v", got, c)
	}

	// Rekeying: the larval one becomes mature and newest.
	n := fake(like, 1000, dst, 7)
	if !d.Replace(larval, n) {
		t.Fatal("replace")
	}
	want("rekeyed", k7, n)
	// Another encapsulation: same counters, same place.
	e := n.WithEncap(&ipsec.Encap{SPort: 4500, DPort: 4500})
	n.NextSeq(5)
	if !d.Replace(n, e) || d.Lookup(n.P.SAID) != e {
		t.Fatal("replace by another encapsulation")
	}
	want("other encapsulation", k7, e)
	if first, _ := e.NextSeq(1); first != 6 {
		t.Errorf("sequence number after WithEncap: got %d, want 6", first)
	}
	for _, s := range []*SA{c, e, a, b} { // middle, head, tails
		if !d.Remove(s) {
			t.Fatalf("remove %v", s.P.SAID)
		}
	}
	want("all removed", k, nil)
	if d.Len() != 0 || d.out.n != 0 {
		t.Errorf("left: %d SAs, %d lists", d.Len(), d.out.n)
	}
}

// TestAnySource: an SA in transport mode for any source serves whoever has none of
// his own.
func TestAnySource(t *testing.T) {
	for _, f := range []struct{ src, dst, any netip.Addr }{{src, dst, netip.IPv4Unspecified()}, {src6, dst6, netip.IPv6Unspecified()}} {
		d := NewDB()
		make := func(spi ipsec.SPI, src netip.Addr, reqid ipsec.ReqID, mode ipsec.Mode) *SA {
			p := params(spi, reqid)
			p.Src, p.Dst, p.Mode = src, f.dst, mode
			s := mustNew(t, p)
			if !d.Insert(s) {
				t.Fatal("not inserted")
			}
			return s
		}
		k := OutKey{Proto: ipsec.ESP, Mode: ipsec.Transport, Src: f.src, Dst: f.dst}
		want := func(what string, k OutKey, want *SA) {
			t.Helper()
			if got := d.Out(k, nil); got != want {
				t.Errorf("%s: got %v, want %v", what, got, want)
			}
		}
		anyone := make(256, f.any, 0, ipsec.Transport)
		want("only that for any", k, anyone)
		if got := d.OutManual(k, nil, nil); got != anyone {
			t.Errorf("by hand: got %v", got)
		}
		unique := k
		unique.ReqID = 7
		want("reqid 7", unique, nil)
		far := k
		far.Dst = f.src
		want("to elsewhere", far, nil)
		tunnel := k
		tunnel.Mode = ipsec.Tunnel
		want("in tunnel mode", tunnel, nil)

		own := make(257, f.src, 0, ipsec.Transport)
		want("its own first", k, own)
		d.SetState(own, Dying)
		want("its own is dying", k, anyone)
		d.SetState(anyone, Dying)
		want("both are", k, own)
		d.Remove(anyone)
		d.Remove(own)
		want("none left", k, nil)
		if n := d.wild.Load(); n != 0 {
			t.Errorf("%d SAs for any source counted, want 0", n)
		}
	}
}

func TestSelectorsICMPAndFragments(t *testing.T) {
	s := mustNew(t, params(256, 0))
	any := ipsec.TrafficSelector{Start: netip.MustParseAddr("10.0.0.0"), End: netip.MustParseAddr("10.255.255.255"), PortHi: 65535}
	echo := any
	echo.Proto, echo.PortLo, echo.PortHi = 1, 8<<8, 8<<8|255
	opaque := any
	opaque.Proto, opaque.PortLo, opaque.PortHi = 17, 65535, 0
	in := netip.MustParseAddr("10.1.1.1")
	for _, c := range []struct {
		name string
		ts   ipsec.TrafficSelector
		i    packet.Info
		want bool
	}{
		{"any", any, packet.Info{Proto: 6, Src: in, Dst: in}, true},
		{"outside", any, packet.Info{Proto: 6, Src: in, Dst: dst}, false},
		{"echo", echo, packet.Info{Proto: 1, Src: in, Dst: in, SrcPort: 8, DstPort: 0, HasPorts: true}, true},
		{"echo reply", echo, packet.Info{Proto: 1, Src: in, Dst: in, SrcPort: 0, DstPort: 0, HasPorts: true}, false},
		{"opaque, fragment", opaque, packet.Info{Proto: 17, Src: in, Dst: in, FragOff: 8}, true},
		{"opaque, whole", opaque, packet.Info{Proto: 17, Src: in, Dst: in, SrcPort: 7, DstPort: 7, HasPorts: true}, false},
		{"unknown protocol", opaque, packet.Info{Version: 6, Proto: 60, Src: in, Dst: in, FragOff: 8}, false},
	} {
		s.P.SrcTS, s.P.DstTS = []ipsec.TrafficSelector{c.ts}, []ipsec.TrafficSelector{c.ts}
		if got := s.MatchInbound(&c.i); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestNextSeq(t *testing.T) {
	s := mustNew(t, params(256, 0))
	if first, ok := s.NextSeq(3); first != 1 || !ok {
		t.Errorf("got %d, %v, want 1", first, ok)
	}
	if _, ok := s.NextSeq(0); ok {
		t.Error("none: ok")
	}
	s.seq.Store(math.MaxUint32 - 2)
	if _, ok := s.NextSeq(3); ok {
		t.Error("3 of 2: ok")
	}
	if first, ok := s.NextSeq(2); first != math.MaxUint32-1 || !ok {
		t.Errorf("last two: got %d, %v", first, ok)
	}
	if _, ok := s.NextSeq(1); ok || s.Seq() != math.MaxUint32 {
		t.Error("beyond the last: ok")
	}
	p := params(256, 0)
	p.ESN = true
	e := mustNew(t, p)
	e.seq.Store(math.MaxUint32)
	if first, ok := e.NextSeq(1); first != 1<<32 || !ok {
		t.Errorf("ESN: got %d, %v, want 2^32", first, ok)
	}
	e.seq.Store(math.MaxUint64 - math.MaxUint32)
	if _, ok := e.NextSeq(1); ok {
		t.Error("ESN, beyond the last: ok")
	}
	// No number is given out twice.
	c := mustNew(t, params(256, 0))
	c.seq.Store(math.MaxUint32 - 10000)
	var mu sync.Mutex
	var wg sync.WaitGroup
	seen := map[uint64]bool{}
	for range 4 {
		wg.Go(func() {
			for {
				first, ok := c.NextSeq(7)
				if !ok {
					return
				}
				mu.Lock()
				for n := first; n < first+7; n++ {
					if seen[n] || n > math.MaxUint32 {
						t.Errorf("number %d twice or too large", n)
					}
					seen[n] = true
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

func TestAccount(t *testing.T) {
	type ev struct{ soft, hard bool }
	for _, c := range []struct {
		name       string
		soft, hard ipsec.Lifetime
		n          int // octets of each packet
		want       []ev
	}{
		{"none", ipsec.Lifetime{}, ipsec.Lifetime{}, 100, []ev{{}, {}, {}}},
		{"packets", ipsec.Lifetime{Packets: 2}, ipsec.Lifetime{Packets: 4}, 1, []ev{{}, {soft: true}, {}, {}, {hard: true}, {hard: true}}},
		{"octets", ipsec.Lifetime{Bytes: 150}, ipsec.Lifetime{Bytes: 300}, 100, []ev{{}, {soft: true}, {}, {hard: true}}},
		{"hard below soft", ipsec.Lifetime{Packets: 5}, ipsec.Lifetime{Packets: 1}, 1, []ev{{}, {hard: true}}},
	} {
		p := params(256, 0)
		p.Soft, p.Hard = c.soft, c.hard
		s := mustNew(t, p)
		for k, w := range c.want {
			if soft, hard := s.Account(1, c.n, t0.Add(time.Duration(k)*time.Second)); soft != w.soft || hard != w.hard {
				t.Errorf("%s, packet %d: got soft %v hard %v, want %v", c.name, k+1, soft, hard, w)
			}
		}
		if !s.FirstUsed().Equal(t0) || !s.LastUsed().Equal(t0.Add(time.Duration(len(c.want)-1)*time.Second)) {
			t.Errorf("%s: used from %v to %v", c.name, s.FirstUsed(), s.LastUsed())
		}
		if s.Packets() != uint64(len(c.want)) || s.Bytes() != uint64(len(c.want)*c.n) {
			t.Errorf("%s: got %d packets, %d octets", c.name, s.Packets(), s.Bytes())
		}
		if !s.FirstHard() || s.FirstHard() {
			t.Errorf("%s: FirstHard", c.name)
		}
	}
	// Sequence numbers about to end are a soft limit; UPDATE starts it afresh.
	s := mustNew(t, params(256, 0))
	if !s.FirstUsed().IsZero() {
		t.Error("used before the first packet")
	}
	s.packets.Store(seqSoft - 1)
	if soft, _ := s.Account(1, 1, t0); !soft {
		t.Error("at seqSoft: no soft limit")
	}
	s.SetLimits(ipsec.Lifetime{Packets: seqSoft + 10}, ipsec.Lifetime{})
	if soft, _ := s.Account(1, 1, t0); !soft {
		t.Error("after SetLimits: no soft limit")
	}
}

// Random edits against a plain map.
func TestModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	d := NewDB()
	like := mustNew(t, params(256, 0))
	model := map[ipsec.SAID]*SA{}
	var order []*SA
	addr := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}) }
	for step := range 20000 {
		s := fake(like, ipsec.SPI(256+rnd.IntN(300)), addr(rnd.IntN(4)), ipsec.ReqID(rnd.IntN(3)))
		old := model[s.P.SAID]
		switch {
		case old == nil:
			if !d.Insert(s) {
				t.Fatalf("step %d: insert refused", step)
			}
			model[s.P.SAID] = s
			order = append(order, s)
		case d.Insert(s):
			t.Fatalf("step %d: inserted twice", step)
		case rnd.IntN(5) == 0:
			old.SetState(State(1 + rnd.IntN(2)))
		default:
			if !d.Remove(old) {
				t.Fatalf("step %d: remove refused", step)
			}
			delete(model, s.P.SAID)
			for k := range order {
				if order[k] == old {
					order = append(order[:k], order[k+1:]...)
					break
				}
			}
		}
		if step%50 != 0 {
			continue
		}
		for spi := ipsec.SPI(256); spi < 556; spi++ {
			for a := range 4 {
				id := ipsec.SAID{Proto: ipsec.ESP, Dst: addr(a), SPI: spi}
				if d.Lookup(id) != model[id] {
					t.Fatalf("step %d: %v: got %v, want %v", step, id, d.Lookup(id), model[id])
				}
			}
		}
		for a := range 4 {
			for reqid := range ipsec.ReqID(3) {
				var want *SA
				for _, s := range order {
					if s.P.Dst == addr(a) && (reqid == 0 || s.P.ReqID == reqid) && (want == nil || s.State() <= want.State()) {
						want = s
					}
				}
				if got := d.Out(OutKey{ipsec.ESP, ipsec.Tunnel, reqid, src, addr(a), 0}, nil); got != want {
					t.Fatalf("step %d: out to %v reqid %d: got %v, want %v", step, addr(a), reqid, got, want)
				}
			}
		}
		n := 0
		d.Each(func(*SA) bool { n++; return true })
		if n != len(model) || d.Len() != n {
			t.Fatalf("step %d: got %d, %d SAs, want %d", step, n, d.Len(), len(model))
		}
	}
}

// Readers run through edits; what stays is always found.
func TestConcurrent(t *testing.T) {
	d := NewDB()
	like := mustNew(t, params(256, 0))
	stay := fake(like, 300, dst, 7)
	d.Insert(stay)
	k := OutKey{ipsec.ESP, ipsec.Tunnel, 7, src, dst, 0}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if d.Lookup(stay.P.SAID) != stay {
					t.Error("lookup lost the SA that stays")
					return
				}
				if s := d.Out(k, nil); s == nil {
					t.Error("out lost the SA that stays")
					return
				} else {
					s.Account(1, 1, t0)
				}
			}
		})
	}
	for round := range 30 {
		var l []*SA
		for n := range 300 {
			s := fake(like, ipsec.SPI(1000+n), dst, ipsec.ReqID(7+n%2))
			d.Insert(s)
			l = append(l, s)
		}
		rand.Shuffle(len(l), func(a, b int) { l[a], l[b] = l[b], l[a] })
		for _, s := range l {
			if round%2 == 0 {
				n := s.WithEncap(nil)
				d.Replace(s, n)
				s = n
			}
			d.Remove(s)
		}
	}
	close(stop)
	wg.Wait()
}

func fill(b testing.TB, n int) (*DB, []*SA) {
	d := NewDB()
	like := mustNew(b, params(256, 0))
	l := make([]*SA, n)
	for k := range l {
		l[k] = fake(like, ipsec.SPI(rand.Uint32()|1<<31), netip.AddrFrom4([4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)}), ipsec.ReqID(k+1))
		if !d.Insert(l[k]) {
			b.Fatal("insert")
		}
	}
	rand.Shuffle(n, func(i, j int) { l[i], l[j] = l[j], l[i] })
	return d, l
}

func TestNoAllocs(t *testing.T) {
	d, l := fill(t, 1000)
	i := &packet.Info{Version: 4, Proto: 6, Src: src, Dst: dst}
	s := l[0]
	if n := testing.AllocsPerRun(100, func() {
		d.Lookup(s.P.SAID)
		d.Out(OutKey{ipsec.ESP, ipsec.Tunnel, s.P.ReqID, src, s.P.Dst, 0}, i)
		s.NextSeq(1)
		s.Account(1, 100, t0)
		s.MatchInbound(i)
	}); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{1, 1000, 100000} {
		d, l := fill(b, n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			k := 0
			for b.Loop() {
				if d.Lookup(l[k].P.SAID) == nil {
					b.Fatal("lost")
				}
				if k++; k == len(l) {
					k = 0
				}
			}
		})
	}
}

func BenchmarkOut(b *testing.B) {
	i := &packet.Info{Version: 4, Proto: 6, Src: src, Dst: dst}
	for _, n := range []int{1, 1000, 100000} {
		d, l := fill(b, n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			k := 0
			for b.Loop() {
				s := l[k]
				if d.Out(OutKey{ipsec.ESP, ipsec.Tunnel, s.P.ReqID, src, s.P.Dst, 0}, i) != s {
					b.Fatal("lost")
				}
				if k++; k == len(l) {
					k = 0
				}
			}
		})
	}
}

func BenchmarkInsertRemove(b *testing.B) {
	for _, n := range []int{1000, 100000} {
		d, l := fill(b, n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			k := 0
			for b.Loop() {
				s := l[k]
				d.Remove(s)
				n := fake(s, s.P.SPI, s.P.Dst, s.P.ReqID)
				d.Insert(n)
				l[k] = n
				if k++; k == len(l) {
					k = 0
				}
			}
		})
	}
}

func BenchmarkAccount(b *testing.B) {
	s := mustNew(b, params(256, 0))
	for b.Loop() {
		s.NextSeq(1)
		s.Account(1, 100, t0)
	}
}

func flowLike(t testing.TB) *SA {
	return mustNew(t, params(0x1000, 7))
}

// flowSA is an SA for one flow between src and dst, with reqid 7.
func flowSA(t testing.TB, k int) (*SA, *packet.Info) {
	t.Helper()
	i := &packet.Info{Version: 4, Src: src, Dst: dst, Proto: 6, SrcPort: uint16(k), DstPort: 80, HasPorts: true}
	s := fake(flowLike(t), ipsec.SPI(0x1000+k), dst, 7)
	s.P.SrcTS = []ipsec.TrafficSelector{{Proto: 6, Start: src, End: src, PortLo: uint16(k), PortHi: uint16(k)}}
	s.P.DstTS = []ipsec.TrafficSelector{{Proto: 6, Start: dst, End: dst, PortLo: 80, PortHi: 80}}
	return s, i
}

// TestFlows: SAs for single flows are found by their packets and by no others,
// beside one for all; they come and go.
func TestFlows(t *testing.T) {
	d := NewDB()
	k := OutKey{ipsec.ESP, ipsec.Tunnel, 7, src, dst, 0}
	const n = 500
	var sas [n]*SA
	var is [n]*packet.Info
	for j := range n {
		sas[j], is[j] = flowSA(t, j+1)
		if !d.Insert(sas[j]) {
			t.Fatal("exists")
		}
	}
	other := *is[0]
	other.DstPort = 81
	hidden := *is[0]
	hidden.HasPorts = false
	for j := range n {
		if got := d.Out(k, is[j]); got != sas[j] {
			t.Fatalf("flow %d: got %v", j, got)
		}
	}
	for _, i := range []*packet.Info{&other, &hidden} {
		if got := d.Out(k, i); got != nil {
			t.Errorf("got %v, want no SA for a packet of no flow", got.P.SAID)
		}
	}
	all := fake(flowLike(t), 0x10000, dst, 7)
	d.Insert(all)
	if d.Out(k, &other) != all || d.Out(k, is[3]) != sas[3] {
		t.Error("want the SA for all where there is no other")
	}
	sas[3].SetState(Dying)
	if d.Out(k, is[3]) != all {
		t.Error("want a mature SA rather than a dying one")
	}
	d.Remove(all)
	if d.Out(k, is[3]) != sas[3] {
		t.Error("want a dying SA rather than none")
	}
	for j := range n {
		d.Remove(sas[j])
		if d.Out(k, is[j]) != nil {
			t.Fatal("an SA that is gone")
		}
	}
	if d.flows.Load() != 0 {
		t.Errorf("%d flows left", d.flows.Load())
	}
}

// TestHandOver: there is an SA for the flow at each moment, now one for it alone and
// now one for all, in places of their own; whoever looks finds it.
func TestHandOver(t *testing.T) {
	d := NewDB()
	k := OutKey{ipsec.ESP, ipsec.Tunnel, 7, src, dst, 0}
	other, _ := flowSA(t, 2) // so that places of flows are looked at
	d.Insert(other)
	one, i := flowSA(t, 1)
	d.Insert(one)
	like := flowLike(t)
	var wg sync.WaitGroup
	var stop, lost atomic.Bool
	for range 2 {
		wg.Go(func() {
			for !stop.Load() {
				if d.Out(k, i) == nil {
					lost.Store(true)
				}
			}
		})
	}
	for range 20000 {
		all := fake(like, 0x10000, dst, 7)
		d.Insert(all)
		d.Remove(one)
		n := fake(one, one.P.SPI, dst, 7)
		d.Insert(n)
		d.Remove(all)
		one = n
	}
	stop.Store(true)
	if wg.Wait(); lost.Load() {
		t.Error("an SA was not found that was there")
	}
}

// BenchmarkOutFlows looks one of 10,000 flows between two hosts up.
func BenchmarkOutFlows(b *testing.B) {
	d := NewDB()
	k := OutKey{ipsec.ESP, ipsec.Tunnel, 7, src, dst, 0}
	var i *packet.Info
	for j := range 10000 {
		var s *SA
		s, i = flowSA(b, j+1)
		d.Insert(s)
		if j == 5000 {
			defer func(want *SA, i *packet.Info) {
				if d.Out(k, i) != want {
					b.Error("another SA")
				}
			}(s, i)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		d.Out(k, i)
	}
}

// Old packets carry no sequence number, so 2^32 of them are not the end.
func TestOldNumbers(t *testing.T) {
	p := params(0x1000, 1)
	p.Encr, p.EncrKey, p.ReplayWindow, p.Unauthenticated = alg.EncrDESIV64, ipsec.NewKey([]byte("\x13\x34\x57\x79\x9b\xbc\xdf\xf1")), 0, true
	s := mustNew(t, p)
	s.seq.Store(maxSeq32)
	if n, ok := s.NextSeq(1); !ok || n != maxSeq32+1 {
		t.Errorf("after 2^32-1 packets: number %d, %v", n, ok)
	}
	s.packets.Store(seqSoft)
	if soft, hard := s.Account(1, 100, t0); soft || hard {
		t.Errorf("soft %v, hard %v without limits", soft, hard)
	}
	for range 3 { // nothing tells a packet from one that is sent again
		if seq, ok := s.Window.Check(7); !ok || !s.Window.Mark(seq) {
			t.Error("a packet that is sent again is refused")
		}
	}
}
