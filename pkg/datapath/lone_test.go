package datapath

import (
	"net/netip"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
)

// gramsTo takes what a worker sends by the socket.
type gramsTo struct {
	memUDP
	sent []byte
}

func (g *gramsTo) WriteBatch(ds []wire.Datagram) (int, error) {
	g.sent = append(g.sent[:0], ds[0].Buf[ds[0].Off:ds[0].Off+ds[0].Len]...)
	return len(ds), nil
}

// BenchmarkLone is one echo request after a silence, in which everybody else had
// the caches: what a ping waits for in the engines of both gateways, without
// system calls. It is less to be believed than compared.
func BenchmarkLone(b *testing.B) {
	for _, mib := range []int{0, 2, 64} {
		p := gcm(pairs()["udp tunnel 4 in 4"])
		x, y, _, _ := p.nodes(b)
		x.quiet, y.quiet = true, true
		g := &gramsTo{memUDP: memUDP{n: x}}
		x.e.c.UDP = g
		ip := udpPacket(p.in, p.out, 8<<8, 1, 56)
		ip[9] = 1
		packet.FixIPv4Checksum(ip)
		frame := frameOf(ip, tap.Offload{})
		out, in := x.e.out, y.e.in[1]
		out.reads.batch = func(fs []tap.Frame) (int, error) {
			f := &fs[0]
			f.Len, f.Offload = copy(f.Buf[f.Off:], frame.Buf[headroom:headroom+frame.Len]), tap.Offload{}
			return 1, nil
		}
		in.grams.batch = func(ds []wire.Datagram) (int, error) {
			d := &ds[0]
			d.Len = copy(d.Buf[d.Off:], g.sent)
			d.Local, d.Remote = netip.AddrPortFrom(p.dst, 4500), netip.AddrPortFrom(p.src, 4500)
			return 1, nil
		}
		others := make([]byte, mib<<20)
		b.Run(map[int]string{0: "warm", 2: "L2", 64: "all"}[mib], func(b *testing.B) {
			var outs, ins []time.Duration
			for b.Loop() {
				for k := 0; k < len(others); k += 64 {
					others[k]++
				}
				t0 := time.Now()
				out.step()
				t1 := time.Now()
				for k := 0; k < len(others); k += 64 {
					others[k]++
				}
				t2 := time.Now()
				in.stepUDP()
				t3 := time.Now()
				outs, ins = append(outs, t1.Sub(t0)), append(ins, t3.Sub(t2))
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(median(outs)), "ns/out")
			b.ReportMetric(float64(median(ins)), "ns/in")
			if s := y.e.Stats(); s[InProtected] < uint64(b.N) {
				b.Fatal(s.nonzero())
			}
		})
	}
}
