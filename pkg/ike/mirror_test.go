package ike

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// slowKeys is a connection whose dumps take as long as slow says, and show what
// there was when they began.
type slowKeys struct {
	*fakeKeys
	slow func() (time.Duration, error)
}

func (k *slowKeys) DumpPolicies(ctx context.Context) ([]*keysock.PolicyInfo, error) {
	l, err := k.fakeKeys.DumpPolicies(ctx)
	d, fail := k.slow()
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return l, errors.Join(err, fail)
}

// slowly has the dumps of a node take a while from now on.
func slowly(dumps *int, took *time.Duration, fail *error) option {
	return func(c *Config, m *missiu) {
		c.Dial = func(ctx context.Context) (KeySocket, error) {
			k, err := m.dial(ctx)
			if err != nil {
				return nil, err
			}
			return &slowKeys{k.(*fakeKeys), func() (time.Duration, error) {
				m.mu.Lock()
				defer m.mu.Unlock()
				*dumps++
				return *took, *fail
			}}, nil
		}
	}
}

// commit changes the policies of a fake missiu and says only that they have
// changed, or that this was lost.
func (m *missiu) commit(e keysock.Event, ps ...ipsec.Policy) {
	m.mu.Lock()
	m.policies = ps
	m.mu.Unlock()
	m.event(e)
}

// TestLargeCommit: a peer asks while the responder still reads its new policies,
// which takes far longer than other requests to missiu may: it waits for them. So
// does an ACQUIRE; and what is gone is not negotiated any more.
func TestLargeCommit(t *testing.T) {
	for _, e := range []keysock.Event{keysock.PoliciesChanged{}, keysock.Lost{N: 1}} {
		synctest.Test(t, func(t *testing.T) {
			n, dumps, took, fail := &network{}, 0, time.Duration(0), error(nil)
			a := newNode(t, n, addrA, addrB, "k")
			b := newNode(t, n, addrB, addrA, "k", slowly(&dumps, &took, &fail))
			ps := slices.Clone(b.m.policies)
			b.m.commit(e)
			time.Sleep(time.Second)
			b.m.mu.Lock()
			took = 15 * time.Second
			b.m.mu.Unlock()
			b.m.commit(e, ps...)
			time.Sleep(10 * time.Millisecond)
			start := time.Now()
			a.acquire(1, addrA, addrB)
			time.Sleep(took - time.Second)
			synctest.Wait()
			if l := b.m.list(); len(l) != 0 {
				t.Errorf("%T: before it is read: %v", e, ids(l))
			}
			for len(b.m.list()) == 0 && time.Since(start) < time.Minute {
				time.Sleep(time.Millisecond)
				synctest.Wait()
			}
			if d := time.Since(start); d > took {
				t.Errorf("%T: answered after %v, reading took %v", e, d, took)
			}
			time.Sleep(time.Second)
			wantPair(t, a, b, 1)
			if dumps != 3 {
				t.Errorf("%T: read %d times, want 3", e, dumps)
			}
			// The other direction, and the other role.
			for _, l := range a.snapshot() {
				l.post((*lineage).delete)
			}
			time.Sleep(time.Second)
			wantPair(t, a, b, 0)
			b.m.commit(e)
			time.Sleep(10 * time.Millisecond)
			b.m.event(keysock.Acquire{Seq: 7, Proto: ipsec.ESP, Src: addrB, Dst: addrA, PolicyID: 1, Mode: ipsec.Transport})
			a.acquire(2, addrA, addrB)
			time.Sleep(2*took + time.Second) // read once more for the ACQUIRE
			wantPair(t, a, b, 0)
			if got, ok := b.m.failure(7); !ok || got != syscall.ENOENT {
				t.Errorf("%T: ACQUIRE of a policy that is gone: %v, %v", e, got, ok)
			}
			// An ACQUIRE that overtakes the news of its policy.
			b.m.commit(e, ps...)
			b.m.event(keysock.Acquire{Seq: 8, Proto: ipsec.ESP, Src: addrB, Dst: addrA, PolicyID: 1, Mode: ipsec.Transport})
			time.Sleep(took + time.Second)
			if got, ok := b.m.failure(8); ok {
				t.Errorf("%T: ACQUIRE: %v", e, got)
			}
			wantPair(t, a, b, 1)
			a.stop(t)
			b.stop(t)
		})
	}
}

// TestReadingFails: it is tried again until it succeeds; who asks meanwhile waits
// for a while and is answered by what there is.
func TestReadingFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, dumps, took, fail := &network{}, 0, time.Duration(0), error(nil)
		a := newNode(t, n, addrA, addrB, "k")
		b := newNode(t, n, addrB, addrA, "k", slowly(&dumps, &took, &fail))
		ps := slices.Clone(b.m.policies)
		b.m.commit(keysock.PoliciesChanged{})
		time.Sleep(time.Second)
		b.m.mu.Lock()
		fail = syscall.EBUSY
		b.m.mu.Unlock()
		b.m.commit(keysock.PoliciesChanged{}, ps...)
		time.Sleep(time.Millisecond) // it has heard of it
		a.acquire(1, addrA, addrB)
		time.Sleep(mirrorWait - time.Second)
		if _, ok := a.m.failure(1); ok {
			t.Error("refused while the policies are being read")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got, ok := a.m.failure(1); !ok || got != syscall.ECONNREFUSED {
			t.Errorf("after the longest wait: %v, %v", got, ok)
			a.dump(t)
		}
		if dumps < 10 || dumps > 30 {
			t.Errorf("read %d times in %v", dumps, mirrorWait)
		}
		b.m.mu.Lock()
		fail = nil
		b.m.mu.Unlock()
		time.Sleep(2 * time.Second)
		a.acquire(2, addrA, addrB)
		time.Sleep(time.Second)
		wantPair(t, a, b, 1)
		a.stop(t)
		// Stopping does not wait for a reading, nor who waits for one.
		b.m.mu.Lock()
		took = time.Hour
		b.m.mu.Unlock()
		b.m.commit(keysock.PoliciesChanged{})
		time.Sleep(time.Second)
		if d := b.stop(t); d > 4*time.Second {
			t.Errorf("stopping took %v", d)
		}
	})
}

// TestChangesWhileReading: events that come while the SPD is read count, in
// their order, and lost ones have it read once more.
func TestChangesWhileReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, dumps, took, fail := &network{}, 0, time.Duration(0), error(nil)
		b := newNode(t, n, addrB, addrA, "k", slowly(&dumps, &took, &fail))
		ps := slices.Clone(b.m.policies)
		has := func(id uint32) bool { _, ok := b.spd.outbound(id); return ok }
		b.m.mu.Lock()
		took = 3 * time.Second
		b.m.mu.Unlock()
		b.m.commit(keysock.PoliciesChanged{}, ps...)
		time.Sleep(time.Second)
		more, gone := ps[0], ps[0]
		more.ID, gone.ID = 11, 12
		b.m.event(keysock.PolicyAdded{Policy: more})
		b.m.event(keysock.PolicyAdded{Policy: gone})
		b.m.event(keysock.PolicyDeleted{Policy: gone})
		b.m.event(keysock.PolicyDeleted{Policy: ps[0]})
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if !has(11) || has(12) || has(1) || dumps != 2 {
			t.Errorf("got %v %v %v after %d readings", has(11), has(12), has(1), dumps)
		}
		// The queue overflows during a dump.
		b.m.commit(keysock.PoliciesChanged{}, ps...)
		time.Sleep(time.Second)
		more.ID = 21
		b.m.commit(keysock.Lost{N: 3}, append(ps, more)...)
		time.Sleep(7 * time.Second)
		synctest.Wait()
		if !has(1) || !has(21) || has(11) || dumps != 4 {
			t.Errorf("got %v %v %v after %d readings", has(1), has(21), has(11), dumps)
		}
		if b.mirror.outdated() {
			t.Error("in doubt for ever")
		}
		b.stop(t)
	})
}

// TestMissReads: a request that finds nothing has the SPD read, not always.
func TestMissReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, dumps, took, fail := &network{}, 0, time.Duration(0), error(nil)
		a := newNode(t, n, addrA, addrB, "k")
		b := newNode(t, n, addrB, addrA, "k", slowly(&dumps, &took, &fail))
		ps := slices.Clone(b.m.policies)
		b.m.commit(keysock.PoliciesFlushed{})
		b.m.mu.Lock()
		b.m.policies = ps // and nobody says so
		b.m.mu.Unlock()
		time.Sleep(missEvery)
		a.acquire(1, addrA, addrB)
		time.Sleep(time.Second)
		wantPair(t, a, b, 1)
		b.m.commit(keysock.PoliciesFlushed{})
		was := dumps
		for k := range uint32(20) {
			for _, l := range a.snapshot() {
				l.post((*lineage).delete)
			}
			time.Sleep(time.Second)
			a.acquire(10+k, addrA, addrB)
		}
		if got := dumps - was; got < 1 || got > 3 {
			t.Errorf("read %d times within 20 s", got)
		}
		a.stop(t)
		b.stop(t)
	})
}

// TestInitAfterLoss: "sa init" of what is learnt by reading anew.
func TestInitAfterLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		ps := slices.Clone(a.m.policies)
		ps[0].ID, ps[0].Flags = 9, ipsec.PolicyInit
		for range 3 { // once
			a.m.commit(keysock.Lost{N: 5}, ps...)
			time.Sleep(time.Second)
			wantPair(t, a, b, 1)
		}
		a.stop(t)
		b.stop(t)
	})
}

// TestStartAfterLoss: start_action start, when its policy is learnt so.
func TestStartAfterLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := pad.NewRule("keep")
		r.Remote, r.PSK, r.StartAction = []pad.Range{pad.One(addrB)}, keys("k"), pad.StartNow
		db, err := pad.NewDB([]*pad.Rule{r})
		if err != nil {
			t.Fatal(err)
		}
		n := &network{}
		b := newNode(t, n, addrB, addrA, "k")
		var ps []ipsec.Policy
		a := newNode(t, n, addrA, addrB, "k", func(c *Config, m *missiu) { c.Rules, ps, m.policies = db, m.policies, nil })
		time.Sleep(time.Minute)
		wantPair(t, a, b, 0)
		a.m.commit(keysock.Lost{N: 5}, ps...)
		time.Sleep(time.Second)
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
}

// many makes n outbound policies with their inbound ones: tunnels to addrB of
// nets of any size, transport mode, with ports.
func many(n int, r *rand.Rand) (ps []*ipsec.Policy) {
	prefix := func() netip.Prefix {
		if r.IntN(5) == 0 {
			a := [16]byte{0x20, 1, 0xd, 0xb8, 15: byte(r.IntN(4)), 7: byte(r.IntN(8))}
			return netip.PrefixFrom(netip.AddrFrom16(a), []int{0, 32, 64, 127, 128}[r.IntN(5)]).Masked()
		}
		a := [4]byte{10, byte(r.IntN(4)), byte(r.IntN(8)), byte(r.IntN(256))}
		return netip.PrefixFrom(netip.AddrFrom4(a), []int{0, 8, 15, 16, 24, 31, 32, 32, 32}[r.IntN(9)]).Masked()
	}
	for len(ps) < 2*n {
		sel := ipsec.Selector{Src: prefix(), Dst: prefix(), Proto: []uint8{0, 6, 17}[r.IntN(3)]}
		if sel.Src.Addr().BitLen() != sel.Dst.Addr().BitLen() {
			continue
		}
		req := ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Src: addrA, Dst: addrB}
		if r.IntN(4) == 0 {
			req = ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Transport}
		}
		back := req
		back.Src, back.Dst = req.Dst, req.Src
		id, prio := uint32(len(ps)+1), int32(r.IntN(5))
		ps = append(ps,
			&ipsec.Policy{ID: id, Priority: uint32(prio), Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{req}},
			&ipsec.Policy{ID: id + 1, Priority: uint32(prio), Dir: ipsec.In, Sel: sel.Reverse(), Action: ipsec.Protect, Requests: []ipsec.Request{back}})
	}
	return ps
}

// TestIndex: the index finds what looking at each policy finds, in the same
// order, after any additions and removals.
func TestIndex(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	all := many(1500, r)
	slices.SortStableFunc(all, func(a, b *ipsec.Policy) int { return int(a.Priority) - int(b.Priority) })
	var s spd
	s.replace(all)
	there := slices.Clone(all)
	check := func(step string) {
		t.Helper()
		for range 300 {
			ts := func(p netip.Prefix) ipsec.TrafficSelector {
				lo := p.Masked().Addr()
				hi := lo
				for range r.IntN(300) {
					hi = hi.Next()
				}
				return ipsec.TrafficSelector{Start: lo, End: hi, Proto: []uint8{0, 6, 17}[r.IntN(3)], PortHi: 65535}
			}
			x, y := all[r.IntN(len(all))], all[r.IntN(len(all))]
			q := sa.Query{Mode: ipsec.Tunnel, LocalTS: []ipsec.TrafficSelector{ts(x.Sel.Src), ts(y.Sel.Src)}, PeerTS: []ipsec.TrafficSelector{ts(x.Sel.Dst)}}
			q.Peer.Local, q.Peer.Remote = netip.AddrPortFrom(addrA, 500), netip.AddrPortFrom(addrB, 500)
			var want []uint32
			for _, p := range there {
				if p.Dir == ipsec.Out && serves(p, q.Mode, addrA, addrB) && meets(p.Sel.Src, p.Sel.Proto, q.LocalTS) && meets(p.Sel.Dst, p.Sel.Proto, q.PeerTS) {
					want = append(want, p.ID)
				}
			}
			var got []uint32
			for _, p := range s.policies(q) {
				got = append(got, p.Out.ID)
				if p.In == nil || p.In.Sel != p.Out.Sel.Reverse() {
					t.Fatalf("%s: policy %d goes with %+v", step, p.Out.ID, p.In)
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("%s: %v: got %v, want %v", step, q, got, want)
			}
		}
	}
	check("replaced")
	for range 600 {
		id := (there[r.IntN(len(there))].ID-1)&^1 + 1 // of the outbound one of two
		there = slices.DeleteFunc(there, func(p *ipsec.Policy) bool { return p.ID == id || p.ID == id+1 })
		s.delete(id)
		s.delete(id + 1)
	}
	check("half removed")
	for i, p := range many(700, r) {
		p.ID += 100_000
		s.add(p)
		at := slices.IndexFunc(there, func(q *ipsec.Policy) bool { return q.Priority > p.Priority })
		if at < 0 {
			at = len(there)
		}
		there = slices.Insert(there, at, p)
		if i == 101 {
			check("some added")
		}
	}
	check("added")
	for _, p := range there {
		s.delete(p.ID)
	}
	if s.src.sorted = nil; len(s.byID)+len(s.in)+len(s.to)+len(s.src.recent)+len(s.dst.sorted) != 0 || s.dst.lengths != [129]int{} {
		t.Errorf("something is left: %d %d %d", len(s.byID), len(s.in), len(s.to))
	}
}

// BenchmarkResponder: what a peer's request costs by the number of policies.
func BenchmarkResponder(b *testing.B) {
	for _, n := range []int{1, 1000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var ps []*ipsec.Policy
			for i := range n {
				d := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
				sel := ipsec.Selector{Src: netip.PrefixFrom(addrA, 32), Dst: d}
				ps = append(ps, &ipsec.Policy{ID: uint32(i + 1), Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect,
					Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Src: addrA, Dst: addrB}}})
			}
			var s spd
			s.replace(ps)
			a := ps[n/2].Sel
			q := sa.Query{Mode: ipsec.Tunnel, LocalTS: []ipsec.TrafficSelector{{Start: addrA, End: addrA, PortHi: 65535}},
				PeerTS: []ipsec.TrafficSelector{{Start: a.Dst.Addr(), End: a.Dst.Addr(), PortHi: 65535}}}
			q.Peer.Local, q.Peer.Remote = netip.AddrPortFrom(addrA, 500), netip.AddrPortFrom(addrB, 500)
			for b.Loop() {
				if len(s.policies(q)) != 1 {
					b.Fatal("not found")
				}
			}
		})
	}
	b.Run("replace 100000", func(b *testing.B) {
		r := rand.New(rand.NewPCG(1, 2))
		ps := many(50_000, r)
		for b.Loop() {
			var s spd
			s.replace(ps)
		}
	})
}
