package wire

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// few makes prefixes that often overlap, touch, and reach either end of the
// addresses.
func few(r *rand.Rand, v6 bool) netip.Prefix {
	high := []byte{0, 255}[r.IntN(2)]
	bits := 28 + r.IntN(5)
	a := []byte{high, high, high, high&0xe0 | byte(r.IntN(32))}
	if v6 {
		a = append(slices.Repeat([]byte{high}, 12), a...)
		bits += 96
	}
	if r.IntN(40) == 0 {
		bits = r.IntN(3)
	}
	at, _ := netip.AddrFromSlice(a)
	return netip.PrefixFrom(at, bits).Masked()
}

// A cover that changes step by step is what it would be if it was made at once;
// undone it is what it was.
func TestCoverSteps(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		r := rand.New(rand.NewPCG(7, 7))
		there := table()
		var c cover
		for i := range 5000 {
			p := few(r, v6)
			if there.Get(p) {
				there.Delete(p)
			} else {
				there.Insert(p)
			}
			inner := cover{spanOf(p)}
			if !there.LookupPrefix(p) {
				inner = coverOf(there.Subnets(p))
			}
			before := slices.Clone(c)
			c.undo(c.set(spanOf(p), inner))
			if !slices.Equal(c, before) {
				t.Fatalf("step %d, %v undone: got %v, want %v", i, p, c, before)
			}
			c.set(spanOf(p), inner)
			if want := coverOf(there.All()); !slices.Equal(c, want) {
				t.Fatalf("step %d, %v: got %v, want %v", i, p, c, want)
			}
		}
	}
}

func TestRanges(t *testing.T) {
	for _, l := range [][]string{{}, {"0.0.0.0/0"}, {"0.0.0.0/8", "10.0.0.0/8"}, {"1.2.3.4/32", "1.2.3.6/32", "255.0.0.0/8"}, {"::/8", "2001:db8::/32", "ff00::/8"}} {
		want := coverOf(slices.Values(prefixes(l...)))
		es := intervals(want)
		slices.Reverse(es)
		zero := nftables.SetElement{Key: make([]byte, 4), IntervalEnd: true} // the kernel's own
		if got := ranges(append(es, zero)); !slices.Equal(got, want) {
			t.Errorf("%v: got %v, want %v", l, got, want)
		}
	}
}

// equal compares the divert sets as the kernel has them with the reader's.
func equal(t *testing.T, w *Wire, step any) {
	t.Helper()
	w.setMu.Lock()
	defer w.setMu.Unlock()
	elements := func(name string) []nftables.SetElement {
		es, err := w.chain.c.GetSetElements(w.chain.set[name])
		if err != nil {
			t.Fatal(err)
		}
		return es
	}
	divert := w.sets.Load().divert
	for family, all := range map[string]iter.Seq[netip.Prefix]{"4": divert.AllSorted4(), "6": divert.AllSorted6()} {
		if got, want := ranges(elements("divert"+family)), coverOf(nets(all)); !slices.Equal(got, want) {
			t.Fatalf("%v: the kernel has %v, want %v", step, got, want)
		}
		var got []netip.Addr
		for _, e := range elements("host" + family) {
			a, _ := netip.AddrFromSlice(e.Key)
			got = append(got, a)
		}
		slices.SortFunc(got, netip.Addr.Compare)
		if want := hosts(all); !slices.Equal(got, want) {
			t.Fatalf("%v: the kernel has %v, want %v", step, got, want)
		}
	}
}

// Step by step the kernel's sets are what all prefixes together make, and the
// kernel refuses no step.
func TestChangeDivert(t *testing.T) {
	newLab(t)
	w := openWire(t)
	if err := w.ChangeDivert(nil, nil); err != nil || !w.chain.known {
		t.Fatal(w.chain.known, err)
	}
	r := rand.New(rand.NewPCG(8, 8))
	there := map[netip.Prefix]bool{}
	for i := range 1000 {
		var add, remove []netip.Prefix
		for range 1 + r.IntN(3) {
			p := few(r, r.IntN(2) == 0)
			switch {
			case slices.Contains(add, p) || slices.Contains(remove, p):
			case there[p]:
				remove = append(remove, p)
				delete(there, p)
			default:
				add = append(add, p)
				there[p] = true
			}
		}
		next := w.sets.Load().divert
		for _, p := range add {
			next = next.InsertPersist(p)
		}
		for _, p := range remove {
			next = next.DeletePersist(p)
		}
		if err := w.chain.patch(next, slices.Concat(add, remove)); err != nil {
			t.Fatalf("step %d, +%v -%v: %v", i, add, remove, err)
		}
		w.sets.Store(&sets{divert: next, local: w.sets.Load().local})
		equal(t, w, fmt.Sprintf("step %d, +%v -%v", i, add, remove))
		if n := w.sets.Load().divert.Size(); n != len(there) {
			t.Fatalf("step %d: %d prefixes, want %d", i, n, len(there))
		}
	}
	for _, bad := range []netip.Prefix{{}, netip.MustParsePrefix("::ffff:1.2.3.4/128")} {
		if err := w.ChangeDivert([]netip.Prefix{bad}, nil); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
	// More than can go by single elements.
	if err := w.ChangeDivert(many(maxIncrement+1, 32), nil); err != nil {
		t.Fatal(err)
	}
	equal(t, w, "many")
}

// many makes prefixes of 25 bits or more that do not touch.
func many(n, bits int) []netip.Prefix {
	l := make([]netip.Prefix, n)
	for i := range l {
		l[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{20 + byte(i>>16), byte(i >> 8), byte(i), 0}), bits)
	}
	return l
}

// One prefix more in a large set is told the kernel by its two elements.
func TestChangeDivertIsSmall(t *testing.T) {
	newLab(t)
	w := openWire(t)
	if err := w.SetDivert(many(2000, 25), nil); err != nil {
		t.Fatal(err)
	}
	events, err := listenNft()
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	told := func() (n int) { // until the table that is the fence goes
		t.Helper()
		sh(t, "nft add table inet fence; nft delete table inet fence")
		for {
			msgs, err := events.Receive()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range msgs {
				switch m.Header.Type & 0xff {
				case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
					n++
				case unix.NFT_MSG_DELTABLE:
					return n
				}
			}
		}
	}
	for _, k := range []struct {
		add, remove []netip.Prefix
		want        int
	}{
		{prefixes("9.0.0.0/8"), nil, 2},
		{prefixes("9.1.0.0/16"), nil, 0},
		{nil, prefixes("9.0.0.0/8"), 4},
		{prefixes("20.0.0.128/25"), nil, 6}, // two ranges become one
		{nil, prefixes("20.0.0.128/25", "1.2.3.4/32"), 6},
		{prefixes("20.0.0.128/32", "20.0.1.128/32", "2001:db8::1/128"), nil, 3},
		{prefixes("20.0.0.128/32"), prefixes("20.0.1.128/32"), 1},
		{prefixes("2001:db8::/32"), prefixes("9.1.0.0/16"), 4},
	} {
		if err := w.ChangeDivert(k.add, k.remove); err != nil {
			t.Fatal(err)
		}
		if got := told(); got != k.want {
			t.Errorf("+%v -%v: %d elements changed, want %d", k.add, k.remove, got, k.want)
		}
		equal(t, w, k)
	}
}

// A set that somebody else has changed is put right: at once where the kernel
// tells of it, and where it refuses a change because of it.
func TestChangeDivertTampered(t *testing.T) {
	newLab(t)
	w := openWire(t)
	if err := w.ChangeDivert(prefixes("10.9.0.2/32", "172.16.0.0/12", "fd09::2/128", "2001:db8::/32"), nil); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"nft flush set netdev missiu-e0 divert4",
		"nft delete element netdev missiu-e0 divert6 { 2001:db8::/32 }",
		"nft add element netdev missiu-e0 divert4 { 8.8.8.8 }",
		"nft flush set netdev missiu-e0 host4",
		"nft delete element netdev missiu-e0 host6 { fd09::2 }",
		"nft flush set netdev missiu-e0 local4",
	} {
		want := sh(t, "nft list table netdev missiu-e0")
		tamper(t, w, line, want)
		equal(t, w, line)
	}
	behind := func(f func(*nftables.Set, []nftables.SetElement) error, p string) {
		t.Helper()
		w.setMu.Lock()
		defer w.setMu.Unlock()
		if err := f(w.chain.set["divert4"], intervals(coverOf(slices.Values(prefixes(p))))); err != nil {
			t.Fatal(err)
		}
		if err := w.chain.c.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	behind(w.chain.c.SetDeleteElements, "172.16.0.0/12")
	if err := w.ChangeDivert(nil, prefixes("172.16.0.0/12")); err != nil {
		t.Fatal(err)
	}
	equal(t, w, "a range that was gone")
	behind(w.chain.c.SetAddElements, "8.8.0.0/16")
	if err := w.ChangeDivert(prefixes("8.0.0.0/8"), nil); err != nil {
		t.Fatal(err)
	}
	equal(t, w, "a range in the way")
	if err := w.ChangeDivert(prefixes("7.0.0.0/8"), nil); err != nil {
		t.Fatal(err)
	}
	equal(t, w, "afterwards")
}

// A socket filter that the kernel has no memory for gives its place to one that lets
// more pass. That is told once, and the reader takes what it took.
func TestFilterMemory(t *testing.T) {
	const limit = "/proc/sys/net/core/optmem_max"
	l := newLab(t)
	was, err := os.ReadFile(limit)
	if err == nil {
		err = os.WriteFile(limit, []byte("20480"), 0)
	}
	if err != nil {
		t.Skipf("needs a limit of the namespace's own (Linux 6.9): %v", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(limit, was, 0); err != nil {
			t.Error(err)
		}
	})
	// As many ranges as a filter has at most, in words that take the most instructions.
	v4, v6 := prefixes("10.9.0.2/32"), prefixes("fd09::2/128")
	for i := range byte(maxFilterSpans - 1) {
		v4 = append(v4, netip.PrefixFrom(netip.AddrFrom4([4]byte{200, i}), 24))
		v6 = append(v6, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0xaa, i}), 32))
	}
	w := openWire(t)
	for range 2 {
		if err := w.SetDivert(v4, v6); err != nil {
			t.Fatal(err)
		}
	}
	if len(w.Fallbacks()) != 1 {
		t.Fatalf("%d fallbacks told, want 1", len(w.Fallbacks()))
	}
	if f := <-w.Fallbacks(); f.Path != "socket filter" || !errors.Is(f.Err, unix.ENOMEM) {
		t.Errorf("told %v", f)
	}
	c, send := pump(w), l.rawPeer()
	const from4, from6 = "10.9.0.2", "fd09::2"
	send(ipPacket("10.9.0.3", "10.9.0.1", 17, udpPayload("10.9.0.3", "10.9.0.1", 9, 9, "other")))
	send(ipPacket(from4, "10.9.0.1", 17, udpPayload(from4, "10.9.0.1", 9, 9, "four")))
	send(ipPacket(from6, "fd09::1", 17, udpPayload(from6, "fd09::1", 9, 9, "six")))
	for _, p := range []string{"four", "six"} {
		expect(t, c, p, func(b []byte) bool {
			if bytes.Contains(b, []byte("other")) {
				t.Error("a packet of another source was taken")
			}
			return bytes.Contains(b, []byte(p))
		})
	}
	if s := w.Stats(); s.Passed == 0 {
		t.Errorf("stats: %+v: packets of other sources do not pass the filter", s)
	}
}

// One policy more, and one less, where there are others.
func BenchmarkChangeDivert(b *testing.B) {
	for _, bm := range []struct{ n, bits int }{{1000, 25}, {10000, 25}, {100000, 25}, {1000, 32}, {100000, 32}} {
		b.Run(fmt.Sprintf("%d of %d bits", bm.n, bm.bits), func(b *testing.B) {
			n := bm.n
			newLab(b)
			w, err := Open("e0", Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer w.Close()
			if err := w.SetDivert(many(n, bm.bits), nil); err != nil {
				b.Fatal(err)
			}
			r := rand.New(rand.NewPCG(9, 9))
			for b.Loop() {
				i := r.IntN(n)
				p := []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{20 + byte(i>>16), byte(i >> 8), byte(i), 128}), bm.bits)}
				if err := errors.Join(w.ChangeDivert(p, nil), w.ChangeDivert(nil, p)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// All at once: what a transaction of policies does.
func BenchmarkSetDivert100000(b *testing.B) {
	for _, bits := range []int{25, 32} {
		b.Run(fmt.Sprintf("%d bits", bits), func(b *testing.B) {
			newLab(b)
			w, err := Open("e0", Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer w.Close()
			l := many(100000, bits)
			for b.Loop() {
				if err := w.SetDivert(l, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
