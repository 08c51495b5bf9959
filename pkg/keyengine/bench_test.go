package keyengine

import (
	"net/netip"
	"runtime"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// BenchmarkAddFlush adds 100,000 SAs and removes them.
func BenchmarkAddFlush(b *testing.B) {
	const n = 100000
	for b.Loop() {
		e := New(Options{SAD: sad.NewDB(), SPD: spd.NewDB()})
		for k := range n {
			p := outSA(ipsec.SPI(1000+k), ipsec.ReqID(k+1))
			p.Dst = netip.AddrFrom4([4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)})
			p.Hard.AddTime = 3600e9
			if _, err := e.Add(p, 0); err != nil {
				b.Fatal(err)
			}
		}
		e.Flush(0)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/SA")
}

// BenchmarkPolicies adds 20,000 inbound policies one by one, outside of a
// transaction.
func BenchmarkPolicies(b *testing.B) {
	const n = 20000
	for b.Loop() {
		e := New(Options{SAD: sad.NewDB(), SPD: spd.NewDB(), Divert: func(DivertChange) error { return nil }})
		for k := range n {
			p := inbound("10.2.0.0/16", ipsec.Discard)
			p.Sel.Src = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)}), 32)
			if _, err := e.AddPolicy(1, p); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/policy")
}

// BenchmarkIdleSA reports what an SA costs in memory that carries no traffic: its
// entry here, in the SAD, its transform with the key schedule and its window.
func BenchmarkIdleSA(b *testing.B) {
	const many = 20_000
	key := func(n int) ipsec.Key { return ipsec.NewKey(make([]byte, n)) }
	for _, bm := range []struct {
		name   string
		params func() ipsec.SAParams
	}{
		{"ESP AES-128-GCM, window 64", func() ipsec.SAParams {
			return ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP}, Encr: alg.EncrAESGCM16, EncrKey: key(20), ReplayWindow: 64}
		}},
		{"ESP AES-128-GCM, window 4096", func() ipsec.SAParams {
			return ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP}, Encr: alg.EncrAESGCM16, EncrKey: key(20), ReplayWindow: 4096}
		}},
		{"ESP ChaCha20-Poly1305, window 64", func() ipsec.SAParams {
			return ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP}, Encr: alg.EncrChaCha20Poly1305, EncrKey: key(36), ReplayWindow: 64}
		}},
		{"ESP AES-128-CBC, HMAC-SHA1, window 64", func() ipsec.SAParams {
			return ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP}, Encr: alg.EncrAESCBC, EncrKey: key(16), Auth: alg.IntegHMACSHA1, AuthKey: key(20), ReplayWindow: 64}
		}},
		{"AH HMAC-SHA2-256, window 64", func() ipsec.SAParams {
			return ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.AH}, Auth: alg.IntegHMACSHA256, AuthKey: key(32), ReplayWindow: 64}
		}},
		{"larval", nil},
	} {
		b.Run(bm.name, func(b *testing.B) {
			var per float64
			for b.Loop() {
				e := New(Options{SAD: sad.NewDB(), SPD: spd.NewDB()})
				before := liveHeap()
				for k := range many {
					dst := netip.AddrFrom4([4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)})
					src := netip.AddrFrom4([4]byte{192, 0, 2, 1})
					var err error
					if bm.params == nil {
						_, err = e.GetSPI(keysock.GetSPI{Proto: ipsec.ESP, Src: src, Dst: dst})
					} else {
						p := bm.params()
						p.Mode, p.Dst, p.Src, p.SPI = ipsec.Tunnel, dst, src, ipsec.SPI(0x1000+k)
						_, err = e.Add(&p, 0)
					}
					if err != nil {
						b.Fatal(err)
					}
				}
				per = float64(liveHeap()-before) / many
				runtime.KeepAlive(e)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(per, "octets/SA")
		})
	}
}

// liveHeap is what lives there.
func liveHeap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
