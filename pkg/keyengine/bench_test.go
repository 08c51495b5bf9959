package keyengine

import (
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
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
