package keyengine

import (
	"net/netip"
	"runtime"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestManyAreSmall bounds what SAs and policies take in memory. It is not for want
// of memory alone: of a heap of hundreds of thousands of SAs and policies the
// collector has to follow every pointer, every two minutes at least, with the
// processors that packets want as well.
func TestManyAreSmall(t *testing.T) {
	const many = 10_000
	addr := func(net byte, i int) netip.Addr { return netip.AddrFrom4([4]byte{net, 0, byte(i >> 8), byte(i)}) }
	params := func(i int) *ipsec.SAParams {
		return &ipsec.SAParams{
			SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: addr(10, i), SPI: ipsec.SPI(0x1000 + i)}, Src: addr(11, 0), Mode: ipsec.Tunnel,
			Encr: alg.EncrAESGCM16, EncrKey: ipsec.NewKey(make([]byte, 20)), ReplayWindow: 64,
		}
	}
	// The transform is as large as the machine's implementation wants it.
	ts := make([]*esp.Transform, many)
	before := liveHeap()
	for i := range ts {
		ts[i], _ = esp.New(params(i))
	}
	transforms := liveHeap() - before
	runtime.KeepAlive(ts)

	e := New(Options{SAD: sad.NewDB(), SPD: spd.NewDB()})
	before = liveHeap()
	for i := range many {
		if _, err := e.Add(params(i), 0); err != nil {
			t.Fatal(err)
		}
	}
	if per := (liveHeap() - before - transforms) / many; per > 1300 {
		t.Errorf("an SA takes %d octets beside its transform, want 1300 at most", per)
	} else {
		t.Logf("an SA: %d octets, and %d for its transform", per, transforms/many)
	}

	before = liveHeap()
	if err := e.Begin(1); err != nil {
		t.Fatal(err)
	}
	for i := range many {
		p := tunnel(ipsec.LevelUnique, 0)
		p.Proposals = []ipsec.Proposal{{Encr: alg.EncrAESGCM16}}
		p.Requests[0].Src, p.Requests[0].Dst = addr(11, 0), addr(10, i)
		p.Sel = ipsec.Selector{Src: netip.PrefixFrom(addr(12, 0), 32), Dst: netip.PrefixFrom(addr(13, i/2), 32)}
		if i%2 == 0 {
			p.Dir, p.Sel = ipsec.In, p.Sel.Reverse()
		}
		if _, err := e.AddPolicy(1, p); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Commit(1); err != nil {
		t.Fatal(err)
	}
	if per := (liveHeap() - before) / many; per > 600 {
		t.Errorf("a policy takes %d octets, want 600 at most", per)
	} else {
		t.Logf("a policy: %d octets", per)
	}
	runtime.KeepAlive(e)
}
