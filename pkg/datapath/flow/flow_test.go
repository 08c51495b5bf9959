package flow

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
)

const size = 1 << 14

func udp(src, dst string, sp, dp uint16) *packet.Info {
	i := &packet.Info{Version: 4, Proto: 17, Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), SrcPort: sp, DstPort: dp, HasPorts: true}
	if i.Src.Is6() {
		i.Version = 6
	}
	return i
}

func TestCache(t *testing.T) {
	for _, a := range [][2]string{{"192.0.2.1", "192.0.2.2"}, {"2001:db8::1", "2001:db8::2"}} {
		c, g := New(size), Generation{1, 1}
		i := udp(a[0], a[1], 1, 2)
		d := Decision{new(spd.Entry), new(sad.SA)}
		want := func(what string, i *packet.Info, class uint8, g Generation, d Decision, ok bool) {
			t.Helper()
			if got, found := c.Get(i, class, g); found != ok || got != d {
				t.Errorf("%s: got %v, %v, want %v, %v", what, got, found, d, ok)
			}
		}
		want("empty", i, 0, g, Decision{}, false)
		want("empty, at the start of all", i, 0, Generation{}, Decision{}, false)
		c.Put(i, 0, g, d)
		want("put", i, 0, g, d, true)
		for name, f := range map[string]func(*packet.Info){
			"source":           func(i *packet.Info) { i.Src = i.Src.Next() },
			"destination":      func(i *packet.Info) { i.Dst = i.Dst.Next() },
			"back":             func(i *packet.Info) { i.Src, i.Dst = i.Dst, i.Src },
			"source port":      func(i *packet.Info) { i.SrcPort++ },
			"destination port": func(i *packet.Info) { i.DstPort++ },
			"ports swapped":    func(i *packet.Info) { i.SrcPort, i.DstPort = i.DstPort, i.SrcPort },
			"protocol":         func(i *packet.Info) { i.Proto = 6 },
			"ICMP":             func(i *packet.Info) { i.Proto = 1 },
			"AH":               func(i *packet.Info) { i.Proto = 51 },
			"no ports":         func(i *packet.Info) { i.HasPorts = false },
			"first fragment":   func(i *packet.Info) { i.MF = true },
			"later fragment":   func(i *packet.Info) { i.FragOff = 8 },
		} {
			j := *i
			f(&j)
			want(name, &j, 0, g, Decision{}, false)
			if !Whole(&j) {
				c.Put(&j, 0, g, d)
				want(name+", after Put", &j, 0, g, Decision{}, false)
			}
		}
		want("another class", i, 1, g, Decision{}, false)
		want("SPD changed", i, 0, Generation{2, 1}, Decision{}, false)
		want("SAD changed", i, 0, Generation{1, 2}, Decision{}, false)
		want("all the same", i, 0, g, d, true)
		c.Put(i, 0, Generation{1, 2}, Decision{})
		want("decided anew", i, 0, Generation{1, 2}, Decision{}, true)
		want("the old one", i, 0, g, Decision{}, false)
	}
}

// Whatever flows share a place, a decision is only ever told of its own flow.
func TestCrowded(t *testing.T) {
	c, g := New(size), Generation{1, 1}
	all := make([]*spd.Entry, 3*size)
	flow := func(k int) *packet.Info {
		return udp("192.0.2.1", "198.51.100.1", uint16(k), uint16(k>>16))
	}
	for k := range all {
		all[k] = new(spd.Entry)
		c.Put(flow(k), 0, g, Decision{Policy: all[k]})
	}
	found := 0
	for k := range all {
		if d, ok := c.Get(flow(k), 0, g); ok {
			if found++; d.Policy != all[k] {
				t.Fatalf("flow %d has another's policy", k)
			}
		}
	}
	if found < size/2 || found > size {
		t.Errorf("%d flows remembered, want most of %d", found, size)
	}
}

// What is void is let go after as many calls of Sweep as there are steps, what
// holds stays.
func TestSweep(t *testing.T) {
	c, g := New(size), Generation{1, 1}
	for k := range uint16(1000) {
		c.Put(udp("192.0.2.1", "192.0.2.2", k, k), 0, g, Decision{Policy: new(spd.Entry), SA: new(sad.SA)})
	}
	used := func() (n int) {
		for k := range c.slots {
			if c.slots[k].d != (Decision{}) {
				n++
			}
		}
		return n
	}
	for range size / sweepStep {
		c.Sweep(g)
	}
	before := used()
	g.SAD++
	i := udp("192.0.2.1", "192.0.2.3", 1, 1)
	c.Put(i, 0, g, Decision{Policy: new(spd.Entry)})
	for range size / sweepStep {
		c.Sweep(g)
	}
	if before < 900 || used() != 1 {
		t.Errorf("%d decisions before, %d after, want most of 1000 and 1", before, used())
	}
	if _, ok := c.Get(i, 0, g); !ok {
		t.Error("what holds was forgotten")
	}
}

func TestNoAllocs(t *testing.T) {
	c, g, i := New(size), Generation{1, 1}, udp("2001:db8::1", "2001:db8::2", 1, 2)
	if n := testing.AllocsPerRun(100, func() {
		c.Sweep(g)
		c.Put(i, 0, g, Decision{})
		c.Get(i, 0, g)
		g.SPD++
	}); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}

func BenchmarkGet(b *testing.B) {
	for _, n := range []int{1, 1000, 100_000} {
		c, g := New(DefaultSize), Generation{1, 1}
		is := make([]packet.Info, n)
		for k := range is {
			is[k] = *udp("192.0.2.1", "198.51.100.1", uint16(k), uint16(k>>16))
			c.Put(&is[k], 0, g, Decision{})
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			k, hits := 0, 0
			for b.Loop() {
				if _, ok := c.Get(&is[k], 0, g); ok {
					hits++
				}
				if k++; k == n {
					k = 0
				}
			}
			b.ReportMetric(float64(hits)/float64(b.N), "hits/op")
		})
	}
}
