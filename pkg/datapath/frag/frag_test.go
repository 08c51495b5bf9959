package frag

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

var (
	src4, dst4 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.2")
	src6, dst6 = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	t0         = time.Unix(1e9, 0)
)

func data(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}

// ip makes an IPv4 packet with id, or an IPv6 packet.
func ip(v int, proto uint8, id uint16, payload []byte) []byte {
	if v == 4 {
		b := make([]byte, 20, 20+len(payload))
		packet.PutHeader(b, src4, dst4, proto, 20+len(payload), 64)
		b[6] = 0
		binary.BigEndian.PutUint16(b[4:], id)
		packet.FixIPv4Checksum(b)
		return append(b, payload...)
	}
	b := make([]byte, 40, 40+len(payload))
	packet.PutHeader(b, src6, dst6, proto, 40+len(payload), 64)
	return append(b, payload...)
}

func decode(t testing.TB, b []byte) *packet.Info {
	t.Helper()
	i := new(packet.Info)
	if !packet.Decode(b, i) {
		t.Fatalf("not a packet: % x", b[:min(len(b), 60)])
	}
	return i
}

func split(t testing.TB, b []byte, mtu int) [][]byte {
	t.Helper()
	var fs [][]byte
	err := Split(b, decode(t, b), mtu, 0x1234, func(f []byte) error {
		if len(f) > mtu {
			t.Fatalf("fragment of %d octets, MTU %d", len(f), mtu)
		}
		fs = append(fs, bytes.Clone(f))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

func TestSplitAndJoin(t *testing.T) {
	r := New(Limits{})
	rnd := rand.New(rand.NewPCG(1, 2))
	hbh := []byte{17, 0, 1, 4, 0, 0, 0, 0}
	opts := ip(4, 17, 9, nil)
	opts = append(opts[:20], 0x07, 7, 4, 0, 0, 0, 0, 0x83, 3, 4, 1, 0) // record route (not copied), loose source route (copied)
	opts[0] = 0x48
	opts = append(opts, data(3000)...)
	packet.SetLen(opts, len(opts))
	packet.FixIPv4Checksum(opts)
	for _, c := range []struct {
		name string
		b    []byte
	}{
		{"v4", ip(4, 17, 7, data(5000))},
		{"v4 largest", ip(4, 17, 7, data(65515))},
		{"v4 options", opts},
		{"v6", ip(6, 17, 0, data(5000))},
		{"v6 hop-by-hop", ip(6, 0, 0, append(bytes.Clone(hbh), data(5000)...))},
		{"v6 destination options", ip(6, 60, 0, append(bytes.Clone(hbh), data(5000)...))},
	} {
		for _, mtu := range []int{576, 1280, 1281, 1499, 1500, 4000} {
			fs := split(t, c.b, mtu)
			if len(fs) == 1 {
				continue
			}
			for _, order := range []string{"in order", "reversed", "shuffled"} {
				switch order {
				case "reversed":
					for a, b := 0, len(fs)-1; a < b; a, b = a+1, b-1 {
						fs[a], fs[b] = fs[b], fs[a]
					}
				case "shuffled":
					rnd.Shuffle(len(fs), func(a, b int) { fs[a], fs[b] = fs[b], fs[a] })
				}
				for k, f := range fs {
					whole, err := r.Add(t0, f, decode(t, f))
					if err != nil {
						t.Fatalf("%s, MTU %d, %s: fragment %d: %v", c.name, mtu, order, k, err)
					}
					if (whole != nil) != (k == len(fs)-1) {
						t.Fatalf("%s, MTU %d, %s: whole after %d of %d", c.name, mtu, order, k+1, len(fs))
					}
					if whole != nil && !bytes.Equal(whole, c.b) {
						t.Fatalf("%s, MTU %d, %s: got %d octets % x, want %d % x", c.name, mtu, order, len(whole), whole[:48], len(c.b), c.b[:48])
					}
				}
			}
		}
	}
	if len(r.all) != 0 || r.mem != 0 {
		t.Errorf("got %d datagrams, %d octets left, want none", len(r.all), r.mem)
	}
}

func TestSplitHeaders(t *testing.T) {
	b := ip(4, 17, 7, data(3000))
	for k, f := range split(t, b, 1500) {
		i := decode(t, f)
		if packet.Checksum(f[:i.HdrLen]) != 0 || i.ID != 7 || i.FragOff != k*1480 || i.MF != (k < 2) {
			t.Errorf("fragment %d: %+v", k, i)
		}
	}
	if i := decode(t, split(t, ip(4, 17, 0, data(3000)), 1500)[1]); i.ID != 0x1234 {
		t.Errorf("packet without identification: got %#x, want 0x1234", i.ID)
	}
	// A fragment is cut further and keeps its place.
	f := split(t, b, 1500)[1]
	for k, g := range split(t, f, 1000) {
		if i := decode(t, g); i.FragOff != 1480+k*976 || !i.MF || i.ID != 7 {
			t.Errorf("fragment %d of a fragment: %+v", k, i)
		}
	}
	six := split(t, ip(6, 17, 0, data(3000)), 1500)
	for k, f := range six {
		if i := decode(t, f); i.ID != 0x1234 || i.FragOff != k*1448 || i.MF != (k < 2) || i.Proto != 17 {
			t.Errorf("v6 fragment %d: %+v", k, i)
		}
	}
	if i := decode(t, split(t, six[1], 1280)[1]); i.FragOff != 1448+1232 || !i.MF {
		t.Errorf("v6 fragment of a fragment: %+v", i)
	}
}

func TestSplitErrors(t *testing.T) {
	none := func([]byte) error { return nil }
	for _, v := range []int{4, 6} {
		b := ip(v, 17, 1, data(100))
		for _, mtu := range []int{-1, 0, 19, 27, 47} {
			if v == 4 && mtu > 27 {
				continue
			}
			if err := Split(b, decode(t, b), mtu, 1, none); !errors.Is(err, ErrMTU) {
				t.Errorf("v%d, MTU %d: got %v, want ErrMTU", v, mtu, err)
			}
		}
	}
	// RFC 7112: 60 octets of destination options must be in the first fragment.
	chain := append([]byte{17, 7, 1, 60}, make([]byte, 60)...)
	b := ip(6, 60, 0, append(chain, data(100)...))
	if err := Split(b, decode(t, b), 100, 1, none); !errors.Is(err, ErrMTU) {
		t.Errorf("chain: got %v, want ErrMTU", err)
	}
	if err := Split(b, &packet.Info{Len: 100}, 50, 1, none); !errors.Is(err, ErrNotIP) {
		t.Errorf("got %v, want ErrNotIP", err)
	}
	stop := errors.New("stop")
	big := ip(4, 17, 1, data(5000))
	if err := Split(big, decode(t, big), 1500, 1, func([]byte) error { return stop }); err != stop {
		t.Errorf("got %v, want that of emit", err)
	}
}

// piece4 is an IPv4 fragment of payload[off:off+n].
func piece4(id uint16, off, n int, more bool) []byte {
	b := ip(4, 17, id, data(off + n)[off:])
	v := uint16(off / 8)
	if more {
		v |= 0x2000
	}
	binary.BigEndian.PutUint16(b[6:], v)
	packet.FixIPv4Checksum(b)
	return b
}

func wantDrop(t *testing.T, r *Reassembler, now time.Time, b []byte, why Reason) {
	t.Helper()
	before := r.Count(why)
	whole, err := r.Add(now, b, decode(t, b))
	d, ok := errors.AsType[*DropError](err)
	if whole != nil || !ok || d.Reason != why || r.Count(why) != before+1 {
		t.Fatalf("got %v, %v, count %d more, want %v", whole != nil, err, r.Count(why)-before, why)
	}
}

func wantMore(t *testing.T, r *Reassembler, now time.Time, b []byte) {
	t.Helper()
	if whole, err := r.Add(now, b, decode(t, b)); whole != nil || err != nil {
		t.Fatalf("got whole %v, %v, want neither", whole != nil, err)
	}
}

func TestOverlaps(t *testing.T) {
	for _, c := range []struct {
		name string
		a, b []byte
	}{
		{"behind", piece4(1, 0, 64, true), piece4(1, 56, 64, true)},
		{"before", piece4(1, 64, 64, true), piece4(1, 0, 72, true)},
		{"within", piece4(1, 0, 64, true), piece4(1, 8, 8, true)},
		{"around", piece4(1, 8, 8, true), piece4(1, 0, 64, true)},
		{"two ends", piece4(1, 64, 10, false), piece4(1, 128, 10, false)},
		{"beyond the end", piece4(1, 64, 10, false), piece4(1, 128, 8, true)},
		{"end before what is there", piece4(1, 64, 64, true), piece4(1, 8, 8, false)},
		{"same place, last or not", piece4(1, 64, 64, true), piece4(1, 64, 64, false)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := New(Limits{})
			wantMore(t, r, t0, c.a)
			wantDrop(t, r, t0, c.b, Overlap)
			// RFC 5722, 3: those to come too.
			wantDrop(t, r, t0, piece4(1, 256, 8, true), Late)
			if r.mem != datagramCost {
				t.Errorf("got %d octets, want %d", r.mem, datagramCost)
			}
			// Another datagram is not concerned; and after its time the identification is free.
			wantMore(t, r, t0, piece4(2, 0, 8, true))
			wantMore(t, r, t0.Add(DefaultLimits.Age), c.a)
		})
	}
	// A fragment that differs in content alone is an overlap, an equal one is not.
	r := New(Limits{})
	wantMore(t, r, t0, piece4(1, 0, 64, true))
	wantDrop(t, r, t0, piece4(1, 0, 64, true), Duplicate)
	other := piece4(1, 0, 64, true)
	other[30]++
	wantDrop(t, r, t0, other, Overlap)
}

func TestMalformed(t *testing.T) {
	r := New(Limits{})
	wantDrop(t, r, t0, piece4(1, 0, 63, true), Malformed)
	wantDrop(t, r, t0, piece4(1, 64, 0, false), Malformed)
	if len(r.all) != 0 {
		t.Errorf("got %d datagrams, want 0", len(r.all))
	}
	b := ip(4, 17, 1, data(10))
	if _, err := r.Add(t0, b, decode(t, b)); err != ErrNotFragment {
		t.Errorf("whole packet: got %v", err)
	}
	// Together with a longer header of the first fragment it would be too long.
	wantMore(t, r, t0, piece4(1, 65504, 11, false))
	first := ip(4, 17, 1, append(make([]byte, 4), data(65504)[:64]...))
	first[0] = 0x46
	first[6] = 0x20
	wantDrop(t, r, t0, first, TooLong)
}

func TestECN(t *testing.T) {
	for _, c := range []struct {
		a, b uint8
		want int // -1: dropped
	}{{0, 0, 0}, {2, 2, 2}, {2, 3, 3}, {3, 1, 3}, {3, 0, -1}, {0, 3, -1}, {3, 3, 3}} {
		r := New(Limits{})
		a, b := piece4(1, 0, 64, true), piece4(1, 64, 8, false)
		packet.SetECN(a, c.a)
		packet.SetECN(b, c.b)
		wantMore(t, r, t0, a)
		if c.want < 0 {
			wantDrop(t, r, t0, b, ECN)
			continue
		}
		whole, err := r.Add(t0, b, decode(t, b))
		if err != nil || int(decode(t, whole).TOS) != c.want || packet.Checksum(whole[:20]) != 0 {
			t.Errorf("%d and %d: got %v, %v, want %d", c.a, c.b, whole[1], err, c.want)
		}
	}
}

func TestLimits(t *testing.T) {
	t.Run("time", func(t *testing.T) {
		r := New(Limits{Age: 10 * time.Second})
		wantMore(t, r, t0, piece4(1, 0, 64, true))
		r.Expire(t0.Add(10*time.Second - 1))
		if len(r.all) != 1 {
			t.Fatal("expired too early")
		}
		r.Expire(t0.Add(10 * time.Second))
		if len(r.all) != 0 || r.mem != 0 || r.Count(Expired) != 1 {
			t.Errorf("got %d datagrams, %d octets, %d expired", len(r.all), r.mem, r.Count(Expired))
		}
	})
	t.Run("datagrams of a source", func(t *testing.T) {
		r := New(Limits{PerSource: 3})
		for id := range uint16(10) {
			wantMore(t, r, t0, piece4(id, 0, 64, true))
		}
		if len(r.all) != 3 || r.Count(Crowded) != 7 {
			t.Errorf("got %d datagrams, %d crowded", len(r.all), r.Count(Crowded))
		}
	})
	t.Run("datagrams", func(t *testing.T) {
		r := New(Limits{Datagrams: 4})
		for k := range uint8(10) {
			f := piece4(1, 0, 64, true)
			f[15] = k
			wantMore(t, r, t0, f)
		}
		if len(r.all) != 4 || r.Count(Evicted) != 6 {
			t.Errorf("got %d datagrams, %d evicted", len(r.all), r.Count(Evicted))
		}
	})
	t.Run("memory", func(t *testing.T) {
		r := New(Limits{Memory: 10000})
		for k := range 200 {
			f := piece4(uint16(k/4), k%4*1024, 1024, true)
			r.Add(t0, f, decode(t, f))
			if r.mem > 10000 {
				t.Fatalf("got %d octets", r.mem)
			}
		}
		if r.Count(Evicted) == 0 {
			t.Error("none evicted")
		}
	})
	t.Run("fragments", func(t *testing.T) {
		r := New(Limits{Fragments: 5})
		for k := range 5 {
			wantMore(t, r, t0, piece4(1, k*16, 8, true))
		}
		wantDrop(t, r, t0, piece4(1, 80, 8, true), TooMany)
	})
}

func FuzzReassembler(f *testing.F) {
	join := func(fs ...[]byte) (b []byte) {
		for _, p := range fs {
			b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
			b = append(b, p...)
		}
		return b
	}
	f.Add(join(piece4(1, 0, 64, true), piece4(1, 64, 8, false)))
	f.Add(join(piece4(1, 0, 64, true), piece4(1, 56, 8, false), piece4(2, 0, 8, true)))
	f.Add(join(split(f, ip(6, 17, 0, data(3000)), 1280)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := New(Limits{Memory: 20000, Datagrams: 8, PerSource: 4, Fragments: 16})
		now := t0
		for len(b) >= 2 {
			n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
			p := b[2 : 2+n]
			b = b[2+n:]
			now = now.Add(time.Second)
			var i packet.Info
			if !packet.Decode(p, &i) {
				continue
			}
			whole, err := r.Add(now, p, &i)
			if whole != nil && (err != nil || !packet.Decode(whole, &i) && i.Version != 0) {
				t.Fatalf("got %v and a packet", err)
			}
			if r.mem < 0 || r.mem > 20000 || len(r.all) > 8 {
				t.Fatalf("%d octets, %d datagrams", r.mem, len(r.all))
			}
		}
		r.Expire(now.Add(time.Hour))
		if r.mem != 0 || len(r.all) != 0 || len(r.sources) != 0 || r.age.Len() != 0 {
			t.Fatalf("left: %d octets, %d datagrams", r.mem, len(r.all))
		}
	})
}

// FuzzSplit: what Split cuts, a Reassembler joins to the same packet.
func FuzzSplit(f *testing.F) {
	f.Add(ip(4, 17, 1, data(3000)), uint16(1500))
	f.Add(ip(6, 17, 1, data(3000)), uint16(1280))
	f.Add(ip(6, 0, 0, append([]byte{17, 0, 1, 4, 0, 0, 0, 0}, data(500)...)), uint16(200))
	f.Fuzz(func(t *testing.T, b []byte, mtu uint16) {
		var i packet.Info
		if !packet.Decode(b, &i) || i.IsFragment() || i.FragHdr != 0 || i.Version == 4 && (i.ID == 0 || b[6]&0x80 != 0) {
			return
		}
		b = bytes.Clone(b[:i.Len])
		packet.FixIPv4Checksum(b)
		r := New(Limits{Fragments: 70000, Memory: 1 << 30})
		var whole []byte
		n := 0
		err := Split(b, &i, int(mtu), 99, func(p []byte) error {
			n++
			var j packet.Info
			if len(p) > int(mtu) || !packet.Decode(p, &j) {
				t.Fatalf("bad fragment % x", p)
			}
			if !j.IsFragment() {
				whole = bytes.Clone(p)
				return nil
			}
			w, err := r.Add(t0, p, &j)
			if err != nil {
				return err
			}
			whole = w
			return nil
		})
		if err == nil && !bytes.Equal(whole, b) {
			t.Fatalf("%d fragments: got % x\nwant % x", n, whole, b)
		}
		if err != nil && !errors.Is(err, ErrMTU) {
			t.Fatal(err)
		}
	})
}
