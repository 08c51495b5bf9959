package whole

import (
	"bytes"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"
)

// entries is how many the hosts of TestManyPolicies load, each of which is three
// policies.
const entries = 50_001

// behind is the address that is far away by entry i, of one host or the other.
func behind(net byte, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{net, byte(100 + i>>16), byte(i >> 8), byte(i)})
}

// tunnels is a policy file of h with an entry for each i that want takes.
func tunnels(h, peer *host, want func(i int) bool) string {
	local, remote := byte(10), byte(20)
	if h.addr.Compare(peer.addr) > 0 {
		local, remote = remote, local
	}
	var b strings.Builder
	for i := range entries {
		if want(i) {
			fmt.Fprintf(&b, "{ laddr %v raddr %v } ipsec { encr_algs gcm tladdr %v traddr %v }\n", behind(local, i), behind(remote, i), h.addr, peer.addr)
		}
	}
	return b.String()
}

// TestManyPolicies: ike runs before 50,001 entries are loaded, which are more
// than any queue of events holds, and half of which are removed later. The first
// packet by the first, the one in the middle and the last is asked for as soon as
// they are in force, answered rightly and arrives, whoever begins; what was
// removed is not negotiated.
func TestManyPolicies(t *testing.T) {
	if testing.Short() {
		t.Skip("loads 100,000 entries")
	}
	a, b := pair(t)
	all := func(int) bool { return true }
	even := func(i int) bool { return i%2 == 0 }
	for _, h := range [][2]*host{{b, a}, {a, b}} {
		start := time.Now()
		h[0].load(tunnels(h[0], h[1], all))
		t.Logf("loaded in %v", time.Since(start))
	}
	committed := time.Now()
	probe := func(from, to *host, src, dst netip.Addr, wait time.Duration) bool {
		sent := from.send(src, dst, 7, 30)
		for end := time.Now().Add(wait); time.Now().Before(end); {
			if got := to.gets(time.Until(end)); bytes.Equal(got, sent) {
				return true
			}
		}
		return false
	}
	// Each of these is one packet: nothing is asked for twice.
	for k, i := range []int{entries - 1, 0, entries / 2} {
		if !probe(a, b, behind(10, i), behind(20, i), long) {
			t.Fatalf("entry %d: the packet did not arrive; a %v, b %v", i, nonzero(a), nonzero(b))
		}
		if k == 0 {
			t.Logf("first packet after %v", time.Since(committed))
		}
		if !probe(b, a, behind(20, i), behind(10, i), long) {
			t.Errorf("entry %d: no way back", i)
		}
		if j := i ^ 2; !probe(b, a, behind(20, j), behind(10, j), long) {
			t.Errorf("entry %d: the packet did not arrive; a %v, b %v", j, nonzero(a), nonzero(b))
		}
	}
	// b gives up half of them. What a asks for of these is refused, what b sends
	// goes in clear and is dropped by a.
	b.load(tunnels(b, a, even))
	had := a.sas()
	for _, i := range []int{3, entries/2 | 1, entries - 4} {
		if probe(a, b, behind(10, i), behind(20, i), 2*time.Second) || probe(b, a, behind(20, i), behind(10, i), 100*time.Millisecond) {
			t.Errorf("entry %d is gone, and its packet arrived", i)
		}
	}
	if got := a.sas(); got != had {
		t.Errorf("SAs: got %q, had %q", got, had)
	}
	for _, i := range []int{4, entries/2&^1 + 4, entries - 5} {
		if !probe(b, a, behind(20, i), behind(10, i), long) || !probe(a, b, behind(10, i), behind(20, i), long) {
			t.Errorf("entry %d after half was removed: the packet did not arrive; a %v, b %v", i, nonzero(a), nonzero(b))
		}
	}
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	t.Logf("heap of two hosts: %d MiB", m.HeapAlloc>>20)
}
