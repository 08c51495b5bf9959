package keyengine

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// many is the n-th of a hundred thousand SAs.
func many(n int) *ipsec.SAParams {
	p := outSA(ipsec.SPI(0x1000+n), ipsec.ReqID(n+1))
	p.Dst = netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
	return p
}

// While one client dumps 100,000 SAs another one's requests are answered and the
// data path finds its SAs: neither waits for the dump. Not one SA is lost, and
// none is told of twice.
func TestDumpHoldsUpNobody(t *testing.T) {
	const n = 100_000
	e, _, path := serve(t, Options{})
	e.srv.(*keysock.Server).Do(func() {
		for k := range n {
			if _, err := e.Add(many(k), 0); err != nil {
				t.Errorf("Add: %v", err)
				return
			}
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	dumper, other := dial(t, path), dial(t, path)
	if _, err := other.Get(ctx, many(7).SAID, netip.Addr{}); err != nil {
		t.Fatal(err)
	}

	type result struct {
		l   []*keysock.SAInfo
		err error
	}
	done := make(chan result, 1)
	start := time.Now()
	go func() {
		l, err := dumper.Dump(ctx, 0)
		done <- result{l, err}
	}()
	var requests, worst, lookups, slowest time.Duration
	var count int
	for {
		at := time.Now()
		i, err := other.Get(ctx, many(count%n).SAID, netip.Addr{})
		if err != nil {
			t.Fatalf("Get while dumping: %v", err)
		}
		i.Wipe()
		d := time.Since(at)
		requests, worst = requests+d, max(worst, d)
		at = time.Now()
		if e.o.SAD.Lookup(many(count%n).SAID) == nil {
			t.Fatal("the data path lost an SA")
		}
		d = time.Since(at)
		lookups, slowest = lookups+d, max(slowest, d)
		count++
		select {
		case r := <-done:
			t.Logf("dump of %d took %v; meanwhile %d requests, mean %v, worst %v; lookups mean %v, worst %v", n,
				time.Since(start).Round(time.Millisecond), count, requests/time.Duration(count), worst, lookups/time.Duration(count), slowest)
			if r.err != nil {
				t.Fatal(r.err)
			}
			seen := map[ipsec.SAID]bool{}
			for k, i := range r.l {
				seen[i.SAID] = true
				if i.SAID != many(k).SAID || !i.EncrKey.Equal(key(20)) {
					t.Fatalf("SA %d: got %v with a key of %d octets", k, i.SAID, i.EncrKey.Len())
				}
				i.Wipe()
			}
			if len(r.l) != n || len(seen) != n {
				t.Errorf("got %d SAs, %d different ones, want %d", len(r.l), len(seen), n)
			}
			// One that waits for the dump is answered after it.
			if count < 10 {
				t.Errorf("%d requests were answered during the dump, want 10 at least", count)
			}
			return
		default:
		}
	}
}

func dial(t testing.TB, path string) *keysock.Client {
	t.Helper()
	c, err := keysock.Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// The list behind dumps stays in order whatever is removed.
func TestSAIDs(t *testing.T) {
	testRig(t, func(r *rig) {
		for k := range 5 {
			r.mustAdd(many(k))
		}
		want := []int{0, 1, 2, 3, 4}
		for _, gone := range []int{2, 0, 4, 3, 1} {
			r.do(func() {
				if _, err := r.Delete(many(gone).SAID, netip.Addr{}); err != nil {
					r.Fatal(err)
				}
			})
			for i, k := range want {
				if k == gone {
					want = append(want[:i], want[i+1:]...)
					break
				}
			}
			l := r.SAIDs(0)
			if len(l) != len(want) {
				r.Fatalf("got %v, want %v", l, want)
			}
			for i, k := range want {
				if l[i] != many(k).SAID {
					r.Fatalf("got %v, want %v", l, want)
				}
			}
		}
		if r.first != nil || r.last != nil {
			r.Error("the list is not empty")
		}
	})
}
