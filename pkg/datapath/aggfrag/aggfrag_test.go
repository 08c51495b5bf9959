package aggfrag

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// inner makes an IP packet of n octets that is told from others by id.
func inner(id uint32, n int, v6 bool) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(id) + byte(i)*7
	}
	if v6 {
		b[0] = 0x60
		binary.BigEndian.PutUint16(b[4:], uint16(n-40))
		binary.BigEndian.PutUint32(b[8:], id)
		return b
	}
	b[0] = 0x45
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	binary.BigEndian.PutUint32(b[12:], id)
	return b
}

func idOf(b []byte) uint32 {
	if b[0]>>4 == 6 {
		return binary.BigEndian.Uint32(b[8:])
	}
	return binary.BigEndian.Uint32(b[12:])
}

// payload puts a header in front of data; cc makes it sub-type 1.
func payload(offset int, cc bool, data ...[]byte) []byte {
	b := make([]byte, HeaderLen)
	if cc {
		b = make([]byte, ccHeaderLen)
		b[0] = subCC
		for i := 4; i < len(b); i++ {
			b[i] = 0xa5
		}
	}
	binary.BigEndian.PutUint16(b[2:], uint16(offset))
	return append(b, bytes.Join(data, nil)...)
}

// sender makes payloads of at most room octets of data from packets, as a peer
// that fragments wherever a payload is full.
type sender struct {
	room int
	cc   bool
	out  [][]byte
	cur  []byte
	off  int // of cur
}

func (s *sender) add(p []byte) {
	for {
		k := min(len(p), s.room-len(s.cur))
		s.cur = append(s.cur, p[:k]...)
		p = p[k:]
		if len(s.cur) < s.room {
			return
		}
		s.flush(len(p))
		if len(p) == 0 {
			return
		}
	}
}

// flush ends a payload; rest octets of the last block are still to come.
func (s *sender) flush(rest int) {
	if len(s.cur) > 0 {
		s.out = append(s.out, payload(s.off, s.cc, s.cur))
	}
	s.cur, s.off = nil, rest
}

// receiver is what the engine does with an Unpacker and a Reassembler.
type receiver struct {
	u    Unpacker
	r    Reassembler
	buf  []byte
	got  [][]byte
	lost int
	bad  int
}

func newReceiver() *receiver { return &receiver{buf: make([]byte, BufLen)} }

func (r *receiver) take(seq uint64, b []byte) {
	u := &r.u
	if u.Reset(b) != nil {
		r.bad++
	}
	var res Result
	if u.Fragments() {
		res = r.r.Add(seq, u, r.buf)
		r.lost += res.Lost
	}
	r.keep(res.First)
	for p := u.Next(); p != nil; p = u.Next() {
		r.keep(p)
	}
	r.keep(res.Second)
}

func (r *receiver) keep(b []byte) {
	if b != nil {
		r.got = append(r.got, bytes.Clone(b))
	}
}

func ids(ps [][]byte) (l []uint32) {
	for _, p := range ps {
		l = append(l, idOf(p))
	}
	return l
}

func TestUnpack(t *testing.T) {
	a, b6, c := inner(1, 20, false), inner(2, 60, true), inner(3, 100, false)
	for _, tt := range []struct {
		name string
		in   []byte
		want []uint32
		bad  bool
		frag bool
	}{
		{"one", payload(0, false, a), []uint32{1}, false, false},
		{"three", payload(0, false, a, b6, c), []uint32{1, 2, 3}, false, false},
		{"congestion information", payload(0, true, a, b6), []uint32{1, 2}, false, false},
		{"padding", payload(0, false, a, make([]byte, 9)), []uint32{1}, false, false},
		{"padding is not looked into", payload(0, false, a, []byte{0x0f, 0x45, 0xff}), []uint32{1}, false, false},
		{"all padding", payload(0, false, make([]byte, 50)), nil, false, true},
		{"no blocks", payload(0, false), nil, false, true},
		{"behind a fragment", payload(7, false, make([]byte, 7), a), []uint32{1}, false, true},
		{"cut at the end", payload(0, false, a, c[:99]), []uint32{1}, false, true},
		{"length cut off", payload(0, false, a, c[:3]), []uint32{1}, false, true},
		{"IPv6 length cut off", payload(0, false, a, b6[:5]), []uint32{1}, false, true},
		{"offset at the end", payload(20, false, a), nil, false, true},
		{"offset beyond the end", payload(1000, false, a), nil, false, true},
		{"no such version", payload(0, false, a, []byte{0x50, 0, 0, 20}), []uint32{1}, true, false},
		{"IPv4 shorter than its header", payload(0, false, a, []byte{0x45, 0, 0, 19}), []uint32{1}, true, false},
		{"empty", nil, nil, true, false},
		{"header cut off", []byte{0, 0, 0}, nil, true, false},
		{"congestion information cut off", make([]byte, 23), nil, true, false},
		{"sub-type 2", append([]byte{2, 0, 0, 0}, a...), nil, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name == "congestion information cut off" {
				tt.in[0] = subCC
			}
			var u Unpacker
			err := u.Reset(tt.in)
			if (err != nil) != tt.bad || u.Fragments() != tt.frag || u.Len() != len(tt.want) {
				t.Errorf("got %v, fragments %v, %d packets; want %v, %v, %d", err, u.Fragments(), u.Len(), tt.bad, tt.frag, len(tt.want))
			}
			var got []uint32
			for p := u.Next(); p != nil; p = u.Next() {
				got = append(got, idOf(p))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got packets %v, want %v", got, tt.want)
			}
		})
	}
}

// A block over three payloads, its length field cut by the first border, with
// padding between, in every order.
func TestReassembleOrders(t *testing.T) {
	a, big, z := inner(1, 30, false), inner(2, 100, false), inner(3, 40, true)
	parts := [][]byte{
		payload(0, false, a, big[:3]),
		payload(97, false, big[3:50]),
		payload(0, false, make([]byte, 30)),
		payload(50, true, big[50:], z),
	}
	var permute func(k int, order []int)
	n := 0
	permute = func(k int, order []int) {
		if k == len(order) {
			n++
			r := newReceiver()
			for _, i := range order {
				r.take(uint64(10+i), parts[i])
			}
			got := ids(r.got)
			slices.Sort(got)
			if !slices.Equal(got, []uint32{1, 2, 3}) || r.lost != 0 || r.bad != 0 {
				t.Errorf("order %v: got %v, lost %d", order, got, r.lost)
			}
			for _, p := range r.got {
				if idOf(p) == 2 && !bytes.Equal(p, big) {
					t.Errorf("order %v: put together wrongly", order)
				}
			}
			if r.r.held != 0 {
				t.Errorf("order %v: %d octets left", order, r.r.held)
			}
			return
		}
		for i := k; i < len(order); i++ {
			order[k], order[i] = order[i], order[k]
			permute(k+1, order)
			order[k], order[i] = order[i], order[k]
		}
	}
	permute(0, []int{0, 1, 2, 3})
	if n != 24 {
		t.Fatalf("%d orders", n)
	}
}

func TestReassembleRefuses(t *testing.T) {
	a, b := inner(1, 100, false), inner(2, 100, false)
	for _, tt := range []struct {
		name string
		in   [][]byte
		lost int
	}{
		{"next begins afresh", [][]byte{payload(0, false, a[:50]), payload(0, false, b, b[:20])}, 1},
		{"too long", [][]byte{payload(0, false, a[:50]), payload(51, false, a[49:])}, 1},
		{"too short", [][]byte{payload(0, false, a[:50]), payload(49, false, a[51:])}, 1},
		{"no packet in the end", [][]byte{payload(0, false, []byte{0x45}), payload(3, false, []byte{0, 0, 4})}, 1},
		{"twice", [][]byte{payload(0, false, a[:50]), nil}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newReceiver()
			for i, p := range tt.in {
				if p != nil {
					r.take(uint64(i+1), p)
				}
			}
			if tt.name == "twice" {
				r.take(1, tt.in[0])
				r.take(2, payload(50, false, a[50:]))
				r.take(2, payload(50, false, a[50:]))
				r.take(1, tt.in[0])
				if got := ids(r.got); !slices.Equal(got, []uint32{1}) {
					t.Errorf("got %v", got)
				}
				return
			}
			for _, p := range r.got {
				if idOf(p) == 1 || !bytes.Equal(p, b) {
					t.Errorf("got packet %d of %d octets", idOf(p), len(p))
				}
			}
			if r.lost != tt.lost {
				t.Errorf("lost %d, want %d", r.lost, tt.lost)
			}
		})
	}
}

// Whatever is lost or out of order, each packet comes once or not at all, as it
// was; not at all only if something of it was lost, or came much too late.
func TestLossAndReorder(t *testing.T) {
	for seed := range uint64(400) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		s := sender{room: 60 + rnd.IntN(1400), cc: seed%3 == 0}
		cut := seed%4 != 0
		reorder := int(seed % 5 * 4)
		loss := float64(seed%7) / 20
		var packets [][]byte
		where := map[uint32][2]int{} // the payloads that a packet is in
		for id := range uint32(200) {
			p := inner(id, 40+rnd.IntN(600), id%2 == 1)
			packets = append(packets, p)
			if !cut && len(s.cur)+len(p) > s.room || rnd.IntN(20) == 0 {
				s.flush(0)
			}
			if !cut && len(p) > s.room {
				s.room = len(p)
			}
			from := len(s.out)
			s.add(p)
			to := len(s.out)
			if len(s.cur) == 0 {
				to--
			}
			where[id] = [2]int{from, to}
		}
		s.flush(0)

		type sent struct {
			seq uint64
			at  int
			b   []byte
		}
		lost := make([]bool, len(s.out))
		var ps []sent
		seq := uint64(0)
		for i, b := range s.out {
			for rnd.IntN(15) == 0 {
				seq++
				ps = append(ps, sent{seq, int(seq) + rnd.IntN(reorder+1), payload(0, s.cc, make([]byte, rnd.IntN(50)))})
			}
			seq++
			if lost[i] = rnd.Float64() < loss; !lost[i] {
				ps = append(ps, sent{seq, int(seq) + rnd.IntN(reorder+1), b})
			}
		}
		slices.SortStableFunc(ps, func(a, b sent) int { return a.at - b.at })
		r := newReceiver()
		for _, p := range ps {
			r.take(p.seq, p.b)
		}
		seen := map[uint32]bool{}
		for _, p := range r.got {
			id := idOf(p)
			if seen[id] || id >= 200 || !bytes.Equal(p, packets[id]) {
				t.Fatalf("seed %d: packet %d twice or damaged", seed, id)
			}
			seen[id] = true
		}
		for id, w := range where {
			gone := false
			for k := w[0]; k <= w[1]; k++ {
				gone = gone || lost[k]
			}
			if seen[id] == gone {
				t.Fatalf("seed %d: packet %d delivered %v, lost %v", seed, id, seen[id], gone)
			}
		}
		if got := ids(r.got); reorder == 0 && !slices.IsSorted(got) {
			t.Fatalf("seed %d: out of order: %v", seed, got)
		}
		if r.bad != 0 {
			t.Fatalf("seed %d: %d malformed", seed, r.bad)
		}
	}
}

// A peer that only begins packets, or only continues them, gets no more memory.
func TestBounded(t *testing.T) {
	r := newReceiver()
	most := 0
	for seq := range uint64(5000) {
		n := 1400
		if seq%3 == 0 {
			n = 60000
		}
		p := make([]byte, n)
		p[0], p[2], p[3] = 0x45, 0xff, 0xff
		if seq%2 == 0 {
			r.take(seq+1, payload(0, false, p))
		} else {
			r.take(seq+1, payload(65535, false, p))
		}
		most = max(most, r.r.held)
		sum := 0
		for k := range r.r.ring {
			sum += len(r.r.ring[k].buf)
		}
		if sum != r.r.held {
			t.Fatalf("%d octets held, %d counted", sum, r.r.held)
		}
	}
	if most > maxHeld {
		t.Errorf("%d octets held, at most %d", most, maxHeld)
	}
	if len(r.got) > 0 {
		t.Errorf("%d packets out of nothing", len(r.got))
	}
}

func TestNoAlloc(t *testing.T) {
	r := newReceiver()
	a, b := inner(1, 64, false), inner(2, 1000, false)
	whole := payload(0, false, a, a, a)
	first, second := payload(0, false, a, b[:500]), payload(500, false, b[500:], a)
	seq := uint64(0)
	run := func() {
		for _, p := range [][]byte{whole, first, second} {
			seq++
			_ = r.u.Reset(p)
			if r.u.Fragments() {
				r.r.Add(seq, &r.u, r.buf)
			}
			for r.u.Next() != nil {
			}
		}
	}
	for range 3 * Window {
		run()
	}
	if n := testing.AllocsPerRun(100, run); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzUnpack(f *testing.F) {
	a, b := inner(1, 40, false), inner(2, 90, true)
	f.Add(payload(0, false, a, b))
	f.Add(payload(0, true, a, b, make([]byte, 5)))
	f.Add(payload(7, false, make([]byte, 7), a, b[:50]))
	f.Add(payload(999, false, a))
	f.Add(payload(0, false, []byte{0x45, 0, 0, 3}))
	f.Fuzz(func(t *testing.T, p []byte) {
		was := bytes.Clone(p)
		var u Unpacker
		err := u.Reset(p)
		total, n := len(u.head)+len(u.tail), 0
		for b := u.Next(); b != nil; b = u.Next() {
			if k, known := blockLen(b); !known || k != len(b) || cap(b) != len(b) {
				t.Fatalf("packet of %d octets says %d", len(b), k)
			}
			total += len(b)
			n++
		}
		if n != u.Len() {
			t.Fatalf("%d packets, said %d", n, u.Len())
		}
		if total > len(p) || err == nil && total > len(p)-HeaderLen {
			t.Fatalf("%d octets out of %d", total, len(p))
		}
		if !bytes.Equal(was, p) {
			t.Fatal("payload changed")
		}
	})
}

// Any payloads with any numbers: no panic, bounded, and only IP packets come out.
func FuzzReassemble(f *testing.F) {
	a := inner(1, 40, false)
	rec := func(seq byte, p []byte) []byte { return append([]byte{seq, byte(len(p))}, p...) }
	f.Add(slices.Concat(rec(1, payload(0, false, a[:20])), rec(2, payload(20, false, a[20:]))))
	f.Add(slices.Concat(rec(3, payload(20, false, a[20:])), rec(2, payload(0, false)), rec(1, payload(0, false, a[:20]))))
	f.Add(slices.Concat(rec(1, payload(0, false, a[:2])), rec(2, payload(38, false, a[2:9])), rec(3, payload(31, false, a[9:], a[:5]))))
	buf := make([]byte, BufLen)
	f.Fuzz(func(t *testing.T, in []byte) {
		var r Reassembler
		var u Unpacker
		for len(in) >= 2 {
			seq, n := uint64(in[0]), min(int(in[1]), len(in)-2)
			if u.Reset(in[2:2+n]) == nil && u.Fragments() {
				res := r.Add(seq, &u, buf)
				for _, b := range [][]byte{res.First, res.Second} {
					if b == nil {
						continue
					}
					if k, known := blockLen(b); !known || k != len(b) {
						t.Fatalf("packet of %d octets says %d", len(b), k)
					}
				}
			}
			sum := 0
			for k := range r.ring {
				sum += len(r.ring[k].buf)
			}
			if sum != r.held || sum > maxHeld {
				t.Fatalf("%d octets held, %d counted", sum, r.held)
			}
			in = in[2+n:]
		}
	})
}

func BenchmarkUnpack(b *testing.B) {
	for _, n := range []int{64, 1400} {
		var data [][]byte
		for id := range uint32(1400 / n) {
			data = append(data, inner(id, n, false))
		}
		p := payload(0, false, data...)
		b.Run(fmt.Sprintf("%dx%d", len(data), n), func(b *testing.B) {
			b.ReportAllocs()
			var u Unpacker
			for b.Loop() {
				_ = u.Reset(p)
				for u.Next() != nil {
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(data)), "ns/packet")
		})
	}
}

func BenchmarkReassemble(b *testing.B) {
	p := inner(1, 2000, false)
	first, second := payload(0, false, p[:1400]), payload(600, false, p[1400:])
	b.ReportAllocs()
	r := newReceiver()
	seq := uint64(0)
	for b.Loop() {
		for _, x := range [][]byte{first, second} {
			seq++
			_ = r.u.Reset(x)
			r.r.Add(seq, &r.u, r.buf)
		}
	}
}
