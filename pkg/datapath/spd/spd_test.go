package spd

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

var t0 = time.Unix(1e9, 0)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func policy(dir ipsec.Direction, src, dst string, a ipsec.Action, prio uint32) *ipsec.Policy {
	return &ipsec.Policy{Dir: dir, Sel: ipsec.Selector{Src: pfx(src), Dst: pfx(dst)}, Action: a, Priority: prio}
}

func mustAdd(t testing.TB, d *DB, ps ...*ipsec.Policy) (es []*Entry) {
	t.Helper()
	for _, p := range ps {
		ed := d.Edit()
		e, err := ed.Add(p, t0)
		if err != nil {
			t.Fatal(err)
		}
		if err := ed.Commit(); err != nil {
			t.Fatal(err)
		}
		es = append(es, e)
	}
	return es
}

func info(src, dst string, proto uint8, sp, dp uint16) *packet.Info {
	i := &packet.Info{Version: 4, Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Proto: proto, SrcPort: sp, DstPort: dp, HasPorts: true}
	if i.Src.Is6() {
		i.Version = 6
	}
	return i
}

func TestOrder(t *testing.T) {
	d := NewDB()
	es := mustAdd(t, d,
		policy(ipsec.Out, "0.0.0.0/0", "10.0.0.0/8", ipsec.Discard, 100),
		policy(ipsec.Out, "0.0.0.0/0", "10.1.0.0/16", ipsec.Protect, 100), // longer, but later
		policy(ipsec.Out, "0.0.0.0/0", "10.2.0.0/16", ipsec.Bypass, 99),   // stronger
		policy(ipsec.Out, "::/0", "::/0", ipsec.Bypass, 0),
		policy(ipsec.In, "10.0.0.0/8", "0.0.0.0/0", ipsec.Discard, 0),
	)
	for _, c := range []struct {
		dir  ipsec.Direction
		i    *packet.Info
		want *Entry
	}{
		{ipsec.Out, info("192.0.2.1", "10.1.1.1", 6, 1, 2), es[0]},
		{ipsec.Out, info("192.0.2.1", "10.2.1.1", 6, 1, 2), es[2]},
		{ipsec.Out, info("192.0.2.1", "11.2.1.1", 6, 1, 2), nil},
		{ipsec.Out, info("2001:db8::1", "2001:db8::2", 6, 1, 2), es[3]},
		{ipsec.In, info("10.1.1.1", "192.0.2.1", 6, 1, 2), es[4]},
		{ipsec.In, info("192.0.2.1", "10.1.1.1", 6, 1, 2), nil},
		{ipsec.Fwd, info("10.1.1.1", "192.0.2.1", 6, 1, 2), nil},
		{0, info("10.1.1.1", "192.0.2.1", 6, 1, 2), nil},
		{9, info("10.1.1.1", "192.0.2.1", 6, 1, 2), nil},
		{ipsec.Out, &packet.Info{}, nil},
	} {
		if got, amb := d.Lookup(c.dir, c.i); got != c.want || amb {
			t.Errorf("%v %v -> %v: got %v %v, want %v", c.dir, c.i.Src, c.i.Dst, got, amb, c.want)
		}
	}
}

func TestMatch(t *testing.T) {
	sel := func(proto uint8, sp, dp uint16) *ipsec.Policy {
		p := policy(ipsec.Out, "0.0.0.0/0", "0.0.0.0/0", ipsec.Protect, 0)
		p.Sel.Proto, p.Sel.SrcPort, p.Sel.DstPort = proto, sp, dp
		return p
	}
	p := func(proto uint8, sp, dp uint16) *packet.Info { return info("10.0.0.1", "10.0.0.2", proto, sp, dp) }
	cut := func(proto uint8) *packet.Info {
		i := p(proto, 0, 0)
		i.HasPorts, i.FragOff = false, 8
		return i
	}
	unknown := cut(60)
	unknown.Version = 6 // addresses do not matter here
	for _, c := range []struct {
		name string
		p    *ipsec.Policy
		i    *packet.Info
		want verdict
	}{
		{"any", sel(0, 0, 0), p(6, 1, 2), yes},
		{"any, fragment", sel(0, 0, 0), cut(6), yes},
		{"protocol", sel(6, 0, 0), p(6, 1, 2), yes},
		{"other protocol", sel(6, 0, 0), p(17, 1, 2), no},
		{"protocol, fragment", sel(6, 0, 0), cut(6), yes},
		{"protocol, hidden", sel(6, 0, 0), unknown, maybe},
		{"port", sel(6, 0, 80), p(6, 1, 80), yes},
		{"other port", sel(6, 0, 80), p(6, 80, 1), no},
		{"both ports", sel(6, 1, 80), p(6, 1, 80), yes},
		{"port, fragment", sel(6, 0, 80), cut(6), maybe},
		{"port, fragment of another protocol", sel(6, 0, 80), cut(17), no},
		{"port of any protocol", sel(0, 0, 53), p(17, 9, 53), yes},
		{"port of any protocol, icmp", sel(0, 0, 9), p(1, 8, 8), no},
		{"port of any protocol, esp", sel(0, 0, 9), cut(50), no},
		{"port of any protocol, hidden", sel(0, 0, 9), unknown, maybe},
		{"icmp type 8", sel(1, 9, 0), p(1, 8, 0), yes},
		{"icmp type 0", sel(1, 1, 0), p(1, 0, 0), yes},
		{"icmp type 0 is not 8", sel(1, 1, 0), p(1, 8, 0), no},
		{"icmp type 3 code 4", sel(1, 4, 5), p(1, 3, 4), yes},
		{"icmp type 3 code 0", sel(1, 4, 1), p(1, 3, 4), no},
		{"icmp, fragment", sel(1, 9, 0), cut(1), maybe},
	} {
		e := (&Edit{}).entry(c.p, 1, 1, t0)
		if got := e.match(c.i); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}

func TestAmbiguous(t *testing.T) {
	d := NewDB()
	web := policy(ipsec.Out, "0.0.0.0/0", "10.0.0.0/8", ipsec.Protect, 10)
	web.Sel.Proto, web.Sel.DstPort = 6, 80
	es := mustAdd(t, d, web, policy(ipsec.Out, "0.0.0.0/0", "10.0.0.0/8", ipsec.Bypass, 20), policy(ipsec.Out, "0.0.0.0/0", "10.9.0.0/16", ipsec.Discard, 5))
	frag := info("1.1.1.1", "10.1.1.1", 6, 0, 0)
	frag.HasPorts, frag.FragOff = false, 1480
	if e, amb := d.Lookup(ipsec.Out, frag); e != es[0] || !amb {
		t.Errorf("got %v, %v, want the port policy, ambiguous", e, amb)
	}
	frag.Proto = 17
	if e, amb := d.Lookup(ipsec.Out, frag); e != es[1] || amb {
		t.Errorf("got %v, %v, want the second policy", e, amb)
	}
	frag.Proto, frag.Dst = 6, netip.MustParseAddr("10.9.1.1")
	if e, amb := d.Lookup(ipsec.Out, frag); e != es[2] || amb {
		t.Errorf("got %v, %v, want the policy that stands before", e, amb)
	}
}

func TestIdentity(t *testing.T) {
	d := NewDB()
	p := policy(ipsec.In, "10.0.0.1/8", "10.0.0.0/8", ipsec.Protect, 0)
	e := mustAdd(t, d, p)[0]
	if e.P.ID == 0 || e.P.ID&7 != uint32(ipsec.In)-1 {
		t.Errorf("got id %#x", e.P.ID)
	}
	ed := d.Edit()
	if _, err := ed.Add(p, t0); !errors.Is(err, ErrExists) {
		t.Errorf("again: got %v, want ErrExists", err)
	}
	host := *p // same packets, other host bits: another policy
	host.Sel.Src = pfx("10.0.0.2/8")
	if _, err := ed.Add(&host, t0); err != nil {
		t.Errorf("other host bits: %v", err)
	}
	out := *p
	out.Dir = ipsec.Out
	if o, err := ed.Add(&out, t0); err != nil || o.P.ID&7 != 1 {
		t.Errorf("other direction: %v", err)
	}
	if ed.Len() != 3 || d.Len() != 1 {
		t.Errorf("got %d and %d policies, want 3 and 1", ed.Len(), d.Len())
	}
	ed.Abort()
	if d.Edit().Len() != 1 || d.Edit().Find(ipsec.Out, p.Sel) != nil {
		t.Error("Abort left something")
	}
	// Update keeps ID and place.
	later := mustAdd(t, d, policy(ipsec.In, "10.0.0.0/9", "10.0.0.0/8", ipsec.Discard, 0))[0]
	ed = d.Edit()
	q := *p
	q.Action = ipsec.Bypass
	n, old, err := ed.Update(&q, t0)
	if err != nil || old != e || n.P.ID != e.P.ID || ed.Commit() != nil {
		t.Fatalf("update: %v, %v, %v", n, old, err)
	}
	if got, _ := d.Lookup(ipsec.In, info("10.0.0.9", "10.0.0.1", 6, 1, 1)); got != n {
		t.Errorf("after update: got %v, want %v", got, n)
	}
	if d.Edit().Get(later.P.ID) != later {
		t.Error("Get")
	}
	ed = d.Edit()
	if _, err := ed.Delete(ipsec.Out, p.Sel); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete: got %v, want ErrNotFound", err)
	}
	if _, err := ed.DeleteID(n.P.ID); err != nil || ed.Commit() != nil {
		t.Error(err)
	}
	if got, _ := d.Lookup(ipsec.In, info("10.0.0.9", "10.0.0.1", 6, 1, 1)); got != later {
		t.Errorf("after delete: got %v, want %v", got, later)
	}
	for _, bad := range []ipsec.Policy{
		{Dir: 0, Sel: p.Sel}, {Dir: 4, Sel: p.Sel}, {Dir: ipsec.In},
		{Dir: ipsec.In, Sel: ipsec.Selector{Src: pfx("10.0.0.0/8"), Dst: pfx("::/0")}},
		{Dir: ipsec.In, Sel: ipsec.Selector{Src: pfx("::ffff:10.0.0.0/104"), Dst: pfx("::/0")}},
	} {
		if _, err := d.Edit().Add(&bad, t0); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: got %v, want ErrInvalid", bad, err)
		}
	}
}

func TestTransaction(t *testing.T) {
	d := NewDB()
	old := mustAdd(t, d, policy(ipsec.In, "10.0.0.0/8", "0.0.0.0/0", ipsec.Protect, 0))[0]
	i := info("10.0.0.9", "10.0.0.1", 6, 1, 1)
	g := d.Generation()
	tx := d.Begin()
	if n := len(tx.Flush()); n != 1 {
		t.Fatalf("flushed %d", n)
	}
	n, err := tx.Add(policy(ipsec.In, "10.0.0.0/8", "0.0.0.0/0", ipsec.Bypass, 0), t0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Add(policy(ipsec.Fwd, "10.3.0.0/16", "0.0.0.0/0", ipsec.Discard, 0), t0); err != nil {
		t.Fatal(err)
	}
	if got, _ := d.Lookup(ipsec.In, i); got != old || d.Generation() != g || d.Edit().Get(old.P.ID) != old || d.Edit().Len() != 1 {
		t.Error("the draft shows outside")
	}
	if a, r := tx.Divert(); !slices.Equal(a, []netip.Prefix{pfx("10.3.0.0/16")}) || !slices.Equal(r, []netip.Prefix{pfx("10.0.0.0/8")}) {
		t.Errorf("divert: got +%v -%v", a, r)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if got, _ := d.Lookup(ipsec.In, i); got != n || d.Generation() != g+1 {
		t.Error("not committed")
	}
	if got := d.Remotes(); !slices.Equal(got, []netip.Prefix{pfx("10.3.0.0/16")}) {
		t.Errorf("remotes: got %v", got)
	}
	if err := tx.Commit(); !errors.Is(err, ErrConflict) {
		t.Errorf("second commit: got %v", err)
	}
	// A change in between makes a draft void.
	tx = d.Begin()
	tx.Flush()
	mustAdd(t, d, policy(ipsec.Out, "10.0.0.0/8", "0.0.0.0/0", ipsec.Protect, 0))
	if err := tx.Commit(); !errors.Is(err, ErrConflict) || d.Len() != 3 {
		t.Errorf("got %v, %d policies", err, d.Len())
	}
}

func TestHit(t *testing.T) {
	e := mustAdd(t, NewDB(), policy(ipsec.In, "10.0.0.0/8", "0.0.0.0/0", ipsec.Protect, 0))[0]
	if !e.LastUsed().IsZero() {
		t.Error("used before use")
	}
	e.Hit(t0.Add(time.Second), 3)
	e.Hit(t0.Add(2*time.Second), 1)
	if e.Packets() != 4 || !e.LastUsed().Equal(t0.Add(2*time.Second)) {
		t.Errorf("got %d packets, last %v", e.Packets(), e.LastUsed())
	}
}

// random picks from few values, so that policies overlap and packets meet them.
type random struct{ *rand.Rand }

func (r random) addr(six bool) netip.Addr {
	a := [4]byte{10, byte(r.IntN(2)), byte(r.IntN(3) * 64), byte(r.IntN(4))}
	if six {
		return netip.AddrFrom16([16]byte{0x20, 1, 12: a[0], 13: a[1], 14: a[2], 15: a[3]})
	}
	return netip.AddrFrom4(a)
}

func (r random) prefix(six bool) netip.Prefix {
	bits := []int{0, 8, 16, 18, 24, 31, 32}[r.IntN(7)]
	if six && bits > 0 {
		bits += 96
	}
	return netip.PrefixFrom(r.addr(six), bits)
}

func (r random) port() uint16 { return []uint16{0, 0, 1, 2, 9}[r.IntN(5)] }

func (r random) policy() *ipsec.Policy {
	six := r.IntN(4) == 0
	return &ipsec.Policy{
		Dir:      ipsec.Direction(1 + r.IntN(3)),
		Sel:      ipsec.Selector{Src: r.prefix(six), Dst: r.prefix(six), Proto: []uint8{0, 0, 6, 17, 1, 58}[r.IntN(6)], SrcPort: r.port(), DstPort: r.port()},
		Action:   ipsec.Action(r.IntN(3)),
		Priority: uint32(r.IntN(4)),
	}
}

func (r random) packet() *packet.Info {
	six := r.IntN(4) == 0
	i := &packet.Info{Version: 4, Src: r.addr(six), Dst: r.addr(six), Proto: []uint8{6, 17, 1, 58, 50, 60}[r.IntN(6)], HasPorts: true, SrcPort: r.port(), DstPort: r.port()}
	if six {
		i.Version = 6
	}
	if r.IntN(4) == 0 {
		i.HasPorts, i.FragOff = false, 8
	}
	return i
}

// naive is the SPD as RFC 4301 describes it: a list in order.
type naive []*Entry

func (l naive) lookup(dir ipsec.Direction, i *packet.Info) (*Entry, bool) {
	var best *Entry
	for _, e := range l {
		if e.P.Dir == dir && e.match(i) != no && (best == nil || e.before(best)) {
			best = e
		}
	}
	return best, best != nil && best.match(i) == maybe
}

func (l naive) find(p *ipsec.Policy) int {
	return slices.IndexFunc(l, func(e *Entry) bool { return e.P.Dir == p.Dir && e.P.Sel == p.Sel })
}

// Random edits and packets against the list: single edits, aborted ones,
// transactions of many.
func TestModel(t *testing.T) {
	for seed := range uint64(4) {
		r := random{rand.New(rand.NewPCG(seed, 1))}
		d := NewDB()
		var model naive
		for step := range 300 {
			draft := r.IntN(3) == 0
			ed := d.Edit()
			n := 1 + r.IntN(3)
			if draft {
				ed = d.Begin()
				n = r.IntN(60)
			}
			next := slices.Clone(model)
			for range n {
				p := r.policy()
				if len(next) > 0 && r.IntN(3) == 0 {
					p.Dir, p.Sel = next[r.IntN(len(next))].P.Dir, next[r.IntN(len(next))].P.Sel
				}
				at := next.find(p)
				switch r.IntN(6) {
				case 0, 1, 2:
					e, err := ed.Add(p, t0)
					if (err == nil) != (at < 0) {
						t.Fatalf("step %d: add: %v", step, err)
					}
					if err == nil {
						next = append(next, e)
					}
				case 3:
					e, old, err := ed.Update(p, t0)
					if err != nil || (old == nil) != (at < 0) {
						t.Fatalf("step %d: update: %v, %v", step, old, err)
					}
					if old != nil {
						next[at] = e
					} else {
						next = append(next, e)
					}
				case 4:
					_, err := ed.Delete(p.Dir, p.Sel)
					if (err == nil) != (at >= 0) {
						t.Fatalf("step %d: delete: %v", step, err)
					}
					if at >= 0 {
						next = slices.Delete(next, at, at+1)
					}
				case 5:
					if len(next) > 0 {
						at := r.IntN(len(next))
						if _, err := ed.DeleteID(next[at].P.ID); err != nil {
							t.Fatal(err)
						}
						next = slices.Delete(next, at, at+1)
					}
				}
			}
			if r.IntN(200) == 0 {
				ed.Flush()
				next = nil
			}
			before, after := d.Remotes(), ed.Remotes()
			add, rem := ed.Divert()
			for _, p := range add {
				if slices.Contains(before, p) || !slices.Contains(after, p) {
					t.Fatalf("step %d: divert adds %v", step, p)
				}
			}
			for _, p := range rem {
				if !slices.Contains(before, p) || slices.Contains(after, p) {
					t.Fatalf("step %d: divert removes %v", step, p)
				}
			}
			if len(before)+len(add)-len(rem) != len(after) {
				t.Fatalf("step %d: divert %v +%v -%v gives %v", step, before, add, rem, after)
			}
			if r.IntN(4) == 0 {
				ed.Abort()
			} else {
				if err := ed.Commit(); err != nil {
					t.Fatal(err)
				}
				model = next
				if !slices.Equal(d.Remotes(), after) {
					t.Fatalf("step %d: remotes %v, want %v", step, d.Remotes(), after)
				}
			}
			if d.Len() != len(model) || d.Edit().Len() != len(model) {
				t.Fatalf("step %d: got %d, %d policies, want %d", step, d.Len(), d.Edit().Len(), len(model))
			}
			for range 100 {
				i, dir := r.packet(), ipsec.Direction(1+r.IntN(3))
				got, amb := d.Lookup(dir, i)
				want, wantAmb := model.lookup(dir, i)
				if got != want || amb != wantAmb {
					t.Fatalf("step %d, %d policies, %v %+v:\ngot  %+v %v\nwant %+v %v", step, len(model), dir, i, got, amb, want, wantAmb)
				}
			}
		}
		if len(model) < 50 && seed == 0 {
			t.Logf("only %d policies in the end", len(model))
		}
		all := d.Edit().All()
		if !slices.IsSortedFunc(all, func(a, b *Entry) int {
			if a.P.Dir != b.P.Dir {
				return int(a.P.Dir) - int(b.P.Dir)
			}
			return byOrder(a, b)
		}) || len(all) != len(model) {
			t.Error("All is not in order")
		}
	}
}

// Readers never see a half-made change: two policies that change places in one
// transaction always give exactly one answer.
func TestConcurrent(t *testing.T) {
	d := NewDB()
	for k := range 40 {
		mustAdd(t, d, policy(ipsec.Out, fmt.Sprintf("10.0.0.%d/32", k), "10.1.0.0/16", ipsec.Protect, 7))
	}
	i := info("10.0.0.5", "10.1.2.3", 6, 1, 1)
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
				if e, _ := d.Lookup(ipsec.Out, i); e == nil {
					t.Error("no policy")
					return
				}
			}
		})
	}
	for k := range 300 {
		ed := d.Edit()
		if k%2 == 0 {
			ed = d.Begin()
		}
		if _, err := ed.Delete(ipsec.Out, ipsec.Selector{Src: pfx("10.0.0.5/32"), Dst: pfx("10.1.0.0/16")}); err != nil {
			t.Fatal(err)
		}
		if _, err := ed.Add(policy(ipsec.Out, "10.0.0.5/32", "10.1.0.0/16", ipsec.Protect, 7), t0); err != nil {
			t.Fatal(err)
		}
		if err := ed.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
}

// fill loads n outbound policies for hosts and networks, in one transaction.
func fill(t testing.TB, n int, kind string) (*DB, []*packet.Info) {
	d := NewDB()
	tx := d.Begin()
	is := make([]*packet.Info, 0, n)
	for k := range n {
		a := netip.AddrFrom4([4]byte{byte(20 + k>>14), byte(k >> 6), byte(k << 2), 1})
		p := policy(ipsec.Out, "10.0.0.0/8", "10.0.0.0/8", ipsec.Protect, 0)
		i := info("10.0.0.1", "10.0.0.1", 6, 1, 1)
		switch kind {
		case "remotes":
			p.Sel.Dst, i.Dst = netip.PrefixFrom(a, 30), a
		case "locals":
			p.Sel.Src, i.Src = netip.PrefixFrom(a, 30), a
		}
		if _, err := tx.Add(p, t0); err != nil {
			t.Fatal(err)
		}
		is = append(is, i)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	rand.Shuffle(n, func(i, j int) { is[i], is[j] = is[j], is[i] })
	return d, is
}

func TestNoAllocs(t *testing.T) {
	for _, kind := range []string{"remotes", "locals"} {
		for _, n := range []int{1, 100, 1000} {
			d, is := fill(t, n, kind)
			if a := testing.AllocsPerRun(100, func() {
				e, _ := d.Lookup(ipsec.Out, is[n/2])
				e.Hit(t0, 1)
			}); a != 0 {
				t.Errorf("%d %s: got %v allocations, want 0", n, kind, a)
			}
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, kind := range []string{"remotes", "locals"} {
		for _, n := range []int{1, 1000, 100000} {
			d, is := fill(b, n, kind)
			b.Run(fmt.Sprintf("%s/%d", kind, n), func(b *testing.B) {
				b.ReportAllocs()
				k := 0
				for b.Loop() {
					if e, _ := d.Lookup(ipsec.Out, is[k]); e == nil {
						b.Fatal("no match")
					}
					if k++; k == len(is) {
						k = 0
					}
				}
			})
		}
	}
}

func BenchmarkEdit(b *testing.B) {
	for _, n := range []int{1000, 100000} {
		d, _ := fill(b, n, "remotes")
		b.Run(fmt.Sprintf("single/%d", n), func(b *testing.B) {
			p := policy(ipsec.Out, "10.0.0.0/8", "11.1.1.0/24", ipsec.Protect, 0)
			for b.Loop() {
				ed := d.Edit()
				e, _ := ed.Add(p, t0)
				ed.Commit()
				ed = d.Edit()
				ed.DeleteID(e.P.ID)
				ed.Commit()
			}
		})
	}
	b.Run("load/100000", func(b *testing.B) {
		for b.Loop() {
			fill(b, 100000, "remotes")
		}
	})
}
