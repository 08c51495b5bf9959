package sa

import (
	"runtime"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
)

// benchHost is the daemon of one side that has a policy, or none.
type benchHost []Policy

func (h benchHost) Policies(Query) []Policy         { return h }
func (benchHost) Admit(Peer) (bool, error)          { return true, nil }
func (benchHost) Lease(Peer, Wanted) (Lease, error) { return Lease{}, nil }

// benchSide is one side, and the time that it has taken.
type benchSide struct {
	cfg  Config
	rule *pad.Rule
	sa   *SA
	took time.Duration
	out  []Send
}

// do counts the time of one input, with what follows from it.
func (x *benchSide) do(f func(now time.Time) []Output) {
	start := time.Now()
	outs := f(labTime)
	for k := 0; k < len(outs); k++ {
		switch o := outs[k].(type) {
		case Send:
			x.out = append(x.out, o)
		case NeedSPI:
			outs = append(outs, x.sa.ChildSPI(labTime, o.Token, 0x10000000+ipsec.SPI(o.Token), nil)...)
		}
	}
	x.took += time.Since(start)
}

// setUp makes an IKE SA between two sides, x speaking first.
func setUp(x, y *benchSide, reqs ...ChildRequest) {
	x.sa, y.sa = NewInitiator(x.cfg, x.rule), nil
	x.do(func(now time.Time) []Output { return x.sa.Start(now, reqs...) })
	from, to := x, y
	for len(from.out) > 0 {
		for _, m := range from.out {
			to.do(func(now time.Time) []Output {
				if to.sa == nil {
					to.sa = NewResponder(to.cfg, []*pad.Rule{to.rule})
				}
				return to.sa.Receive(now, Datagram{Local: m.Remote, Remote: m.Local, Data: m.Data})
			})
		}
		from.out = from.out[:0]
		from, to = to, from
	}
}

// BenchmarkSetUp is IKE_SA_INIT and IKE_AUTH, both sides, without a network: what
// the two cost together, and each of them.
func BenchmarkSetUp(b *testing.B) {
	gcm := []proposal.IKE{{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 128}}, PRF: []alg.PRF{alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEX25519}}}
	for _, c := range []struct {
		name      string
		cert      bool
		child     bool
		proposals []proposal.IKE // nil: the default
	}{
		{"childless", false, false, gcm},
		{"psk", false, true, gcm},
		{"ecdsa", true, true, gcm},
		{"default", false, true, nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			l := newLab(b)
			if c.cert {
				l, _ = certLab(b, "p256", "p256")
			}
			x := benchSide{cfg: Config{Local: addrA, Remote: addrB, Host: benchHost(nil)}, rule: l.a.rule}
			y := benchSide{cfg: Config{Local: addrB, Remote: addrA, Host: benchHost(l.b.policies)}, rule: l.b.rule}
			if c.proposals != nil {
				x.rule.Proposals, y.rule.Proposals = c.proposals, c.proposals
			}
			var reqs []ChildRequest
			if c.child {
				reqs = append(reqs, reqA(1))
			}
			b.ReportAllocs()
			for b.Loop() {
				setUp(&x, &y, reqs...)
				if s, t := x.sa.Status(), y.sa.Status(); s.State != StateEstablished || t.State != StateEstablished || len(t.Children) != len(reqs) {
					b.Fatalf("%v with %v, %d child SAs", s.State, t.State, len(t.Children))
				}
			}
			b.ReportMetric(float64(x.took.Nanoseconds())/float64(b.N), "initiator-ns/op")
			b.ReportMetric(float64(y.took.Nanoseconds())/float64(b.N), "responder-ns/op")
		})
	}
}

// What an IKE SA at rest keeps: ten thousand of them must not be a burden. Two
// key schedules of AES-GCM are 1 KiB of it, the machine 2.
func TestMemory(t *testing.T) {
	const n, most = 300, 5 << 10
	l := newLab(t)
	x := benchSide{cfg: Config{Local: addrA, Remote: addrB, Host: benchHost(nil)}, rule: l.a.rule}
	y := benchSide{cfg: Config{Local: addrB, Remote: addrA, Host: benchHost(nil)}, rule: l.b.rule}
	x.rule.Proposals = proposal.WithoutAddKE(x.rule.Proposals)
	var sas [n]*SA
	live := func() uint64 {
		runtime.GC()
		runtime.GC() // what the pools held
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	setUp(&x, &y)
	was := live()
	for i := range sas {
		setUp(&x, &y)
		sas[i] = y.sa
		if s := y.sa.Status().State; s != StateEstablished {
			t.Fatal(s)
		}
	}
	if got := (int64(live()) - int64(was)) / n; got > most {
		t.Errorf("a responder's IKE SA keeps %d octets, want %d at most", got, most)
	} else {
		t.Logf("%d octets for each", got)
	}
	runtime.KeepAlive(sas)
}
