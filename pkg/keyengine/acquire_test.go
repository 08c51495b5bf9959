package keyengine

import (
	"net/netip"
	"reflect"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
)

var flow = ipsec.Flow{Src: netip.MustParseAddr("10.1.0.1"), Dst: netip.MustParseAddr("10.2.0.1"), Proto: 6, SrcPort: 1, DstPort: 80}

// policy adds p and returns its entry and the key that the data path asks with.
func (r *rig) policy(p *ipsec.Policy) (*spd.Entry, sad.OutKey) {
	r.Helper()
	i, err := r.policyAdd(1, p)
	if err != nil {
		r.Fatal(err)
	}
	e := r.o.SPD.Edit().Get(i.ID)
	q := e.P.Requests[0]
	k := sad.OutKey{Proto: q.Proto, Mode: q.Mode, Src: q.Src, Dst: q.Dst}
	if q.Level == ipsec.LevelUnique {
		k.ReqID = q.ReqID
	}
	return e, k
}

// packet -> ACQUIRE -> ADD with its seq.
func TestAcquire(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelUnique, 7)
		p.Priority = 0x80000005
		e, k := r.policy(p)
		r.NeedSA(e, k, flow)
		r.NeedSA(e, k, flow)
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 7")
		a := r.acquires[0]
		if a.Seq == 0 || a.PolicyID != e.P.ID || a.Priority != 0x80000005 || a.Proto != ipsec.ESP || a.Mode != ipsec.Tunnel || len(a.Proposals) != 1 || a.Flow == nil || *a.Flow != flow {
			r.Errorf("got %+v", a)
		}
		r.after(29 * time.Second)
		r.NeedSA(e, k, flow)
		r.want()
		if _, err := r.add(outSA(0x1000, 7), a.Seq); err != nil {
			r.Fatal(err)
		}
		r.want("mtu 1446", "installed 192.0.2.1->198.51.100.2 reqid 7", "installed 192.0.2.1->198.51.100.2 reqid 0")
		if r.Stats().Acquires != 0 || len(r.asked) != 0 || len(r.timers) != 0 {
			r.Errorf("left: %+v, %d asked, %d timers", r.Stats(), len(r.asked), len(r.timers))
		}
		// The data path saw none a moment ago: it is told, and nobody asked.
		r.NeedSA(e, k, flow)
		r.want("installed 192.0.2.1->198.51.100.2 reqid 7")
		// When it is gone the next packet asks again, with another seq.
		r.do(func() { r.Flush(0) })
		r.NeedSA(e, k, flow)
		r.want("mtu 1500", "removed 0x00001000", "acquire 192.0.2.1->198.51.100.2 reqid 7")
		if r.acquires[1].Seq == a.Seq || r.acquires[1].Seq == 0 {
			r.Errorf("got seq %d again", a.Seq)
		}
	})
}

// One SA of ESP with a CPI ends the wait for both that a policy of IPComp in ESP
// asks for; one without, and one to elsewhere, do not.
func TestAcquirePacked(t *testing.T) {
	for _, mode := range []ipsec.Mode{ipsec.Tunnel, ipsec.Transport} {
		testRig(t, func(r *rig) {
			p := tunnel(ipsec.LevelUnique, 7)
			comp, esp := p.Requests[0], p.Requests[0]
			comp.Proto, comp.Mode, comp.ReqID = ipsec.IPComp, mode, 8
			esp.Mode, esp.Src, esp.Dst = ipsec.Transport, netip.Addr{}, netip.Addr{}
			if mode == ipsec.Transport {
				comp.Src, comp.Dst = netip.Addr{}, netip.Addr{}
			}
			p.Requests = []ipsec.Request{comp, esp}
			e, _ := r.policy(p)
			r.NeedSA(e, sad.OutKey{Proto: ipsec.IPComp, Mode: mode, ReqID: 8, Src: self, Dst: peer}, flow)
			r.NeedSA(e, sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Transport, ReqID: 7, Src: self, Dst: peer}, flow)
			if n := len(r.acquires); n != 2 {
				r.Fatalf("%d ACQUIREs", n)
			}
			for k, edit := range []func(*ipsec.SAParams){
				func(q *ipsec.SAParams) { q.CPI, q.Mode, q.ReqID = 0, ipsec.Tunnel, 9 },
				func(q *ipsec.SAParams) { q.Dst = netip.MustParseAddr("198.51.100.9") },
				func(q *ipsec.SAParams) {},
			} {
				q := outSA(ipsec.SPI(0x1000+k), 7)
				q.Mode, q.CPI = mode, 300
				edit(q)
				r.mustAdd(q)
				want := 2
				if k == 2 {
					want = 0
				}
				if n := r.Stats().Acquires; n != want {
					r.Errorf("%v, SA %d: %d ACQUIREs, want %d", mode, k, n, want)
				}
			}
		})
	}
}

// The numbers of ACQUIREs stay below those that clients make up.
func TestAcquireSeqWraps(t *testing.T) {
	testRig(t, func(r *rig) {
		e, k := r.policy(tunnel(ipsec.LevelRequire, 0))
		r.seq = maxSeq - 1
		for n, want := range []uint32{maxSeq, 1, 2} {
			r.NeedSA(e, k, flow)
			if got := r.acquires[n].Seq; got != want {
				r.Errorf("ACQUIRE %d has seq %#x, want %#x", n, got, want)
			}
			r.do(func() { r.AcquireFailed(r.acquires[n].Seq, syscall.ENOENT) })
			r.after(2 * FailureHold)
		}
		r.log = nil
	})
}

func TestAcquireEnds(t *testing.T) {
	for _, c := range []struct {
		name  string
		level ipsec.Level
		sa    *ipsec.SAParams
		seq   bool // answer with the seq of the ACQUIRE
		ends  bool
	}{
		{"by reqid", ipsec.LevelUnique, outSA(0x1000, 7), false, true},
		{"another reqid", ipsec.LevelUnique, outSA(0x1000, 8), false, false},
		{"no reqid", ipsec.LevelUnique, outSA(0x1000, 0), false, false},
		{"another reqid, by seq", ipsec.LevelUnique, outSA(0x1000, 8), true, true},
		{"any reqid serves", ipsec.LevelRequire, outSA(0x1000, 8), false, true},
		{"inbound, by seq", ipsec.LevelRequire, func() *ipsec.SAParams { p := outSA(0x1000, 7); p.Src, p.Dst = peer, self; return p }(), true, false},
		{"transport", ipsec.LevelRequire, func() *ipsec.SAParams { p := outSA(0x1000, 7); p.Mode = ipsec.Transport; return p }(), false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			testRig(t, func(r *rig) {
				e, k := r.policy(tunnel(c.level, 7))
				r.NeedSA(e, k, flow)
				var seq uint32
				if c.seq {
					seq = r.acquires[0].Seq
				}
				p := *c.sa
				p.EncrKey = key(20)
				if _, err := r.add(&p, seq); err != nil {
					r.Fatal(err)
				}
				if got := r.Stats().Acquires == 0; got != c.ends {
					r.Errorf("ended %v, want %v", got, c.ends)
				}
			})
		})
	}
}

func TestAcquireFails(t *testing.T) {
	testRig(t, func(r *rig) {
		e, k := r.policy(tunnel(ipsec.LevelRequire, 0))
		r.NeedSA(e, k, flow)
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 0")
		seq := r.acquires[0].Seq
		r.do(func() {
			r.AcquireFailed(0, syscall.ETIMEDOUT)
			r.AcquireFailed(seq+1, syscall.ETIMEDOUT)
		})
		r.want()
		r.do(func() {
			r.AcquireFailed(seq, syscall.ETIMEDOUT)
			r.AcquireFailed(seq, syscall.ETIMEDOUT)
		})
		r.want("failed 192.0.2.1->198.51.100.2 reqid 0")
		// The brake.
		r.after(FailureHold - 1)
		r.NeedSA(e, k, flow)
		r.want()
		r.after(1)
		r.NeedSA(e, k, flow)
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 0")
		// Nobody answers.
		r.after(LarvalLife - 1)
		r.want()
		r.after(1)
		r.want("failed 192.0.2.1->198.51.100.2 reqid 0", "hard expire 0x00000000 dead")
		// An SA ends the brake too.
		r.NeedSA(e, k, flow)
		r.do(func() { r.AcquireFailed(r.acquires[2].Seq, syscall.ENOENT) })
		r.mustAdd(outSA(0x1000, 0))
		if r.Stats().Acquires != 0 || len(r.asked) != 0 {
			r.Errorf("left: %+v, %d asked", r.Stats(), len(r.asked))
		}
	})
}

func TestAcquireNobody(t *testing.T) {
	testRig(t, func(r *rig) {
		r.registered = false
		e, k := r.policy(tunnel(ipsec.LevelRequire, 0))
		for range 5 {
			r.NeedSA(e, k, flow)
		}
		r.want("failed 192.0.2.1->198.51.100.2 reqid 0")
		r.registered = true
		r.after(FailureHold)
		r.NeedSA(e, k, flow)
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 0")
	})
}

func TestAcquirePolicyGone(t *testing.T) {
	testRig(t, func(r *rig) {
		e, k := r.policy(tunnel(ipsec.LevelRequire, 0))
		r.do(func() { r.DeletePolicyID(1, e.P.ID) })
		r.NeedSA(e, k, flow)
		r.want("failed 192.0.2.1->198.51.100.2 reqid 0")
		if len(r.asked) != 0 {
			r.Error("still asked for")
		}
	})
}

// In transport mode every address scanned wants an SA.
func TestAcquireBound(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelRequire, 0)
		p.Requests[0].Mode = ipsec.Transport
		e, k := r.policy(p)
		k.Src = self
		for n := range MaxPending + 10 {
			k.Dst = netip.AddrFrom4([4]byte{10, 2, byte(n >> 8), byte(n)})
			r.NeedSA(e, k, flow)
		}
		if s := r.Stats(); s.Acquires != MaxPending || s.Refused != 10 || len(r.acquires) != MaxPending {
			r.Errorf("got %+v, %d sent", s, len(r.acquires))
		}
		r.after(LarvalLife)
		if s := r.Stats(); s.Acquires != 0 || len(r.asked) != 0 {
			r.Errorf("left: %+v", s)
		}
		r.log = nil
	})
}

// Where every flow has SAs of its own, each has an ACQUIRE of its own, which an
// SA that cannot carry it does not end.
func TestAcquirePerFlow(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelUnique, 7)
		p.Flags = ipsec.PolicyPerFlow
		e, k := r.policy(p)
		other := flow
		other.DstPort = 81
		r.NeedSA(e, k, flow)
		r.NeedSA(e, k, other)
		r.NeedSA(e, k, other)
		if len(r.acquires) != 2 || *r.acquires[0].Flow != flow || *r.acquires[1].Flow != other {
			r.Fatalf("%d ACQUIREs, want one for each flow", len(r.acquires))
		}
		q := outSA(0x1000, 7)
		q.SrcTS = []ipsec.TrafficSelector{{Proto: 6, Start: flow.Src, End: flow.Src, PortHi: 65535}}
		q.DstTS = []ipsec.TrafficSelector{{Proto: 6, Start: flow.Dst, End: flow.Dst, PortLo: 80, PortHi: 80}}
		if _, err := r.add(q, 0); err != nil {
			r.Fatal(err)
		}
		if n := r.Stats().Acquires; n != 1 {
			r.Errorf("%d ACQUIREs outstanding, want that of the other flow", n)
		}
	})
}

// A manual SA ends the ACQUIRE of a policy that takes such.
func TestAcquireManual(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelUnique, 7)
		p.Flags = ipsec.PolicyManual
		e, k := r.policy(p)
		r.NeedSA(e, k, flow)
		if _, err := r.add(outSA(0x1000, 0), 0); err != nil {
			r.Fatal(err)
		}
		if n := r.Stats().Acquires; n != 0 {
			r.Errorf("%d ACQUIREs outstanding, want none", n)
		}
	})
}

// A policy that leaves our own end open asks for an SA to its peer, and takes
// the one that comes, whatever address of ours it has.
func TestAcquireOpenEnd(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelUnique, 7)
		p.Requests[0].Src = netip.IPv4Unspecified()
		e, k := r.policy(p)
		r.NeedSA(e, k, flow)
		r.want("acquire 0.0.0.0->198.51.100.2 reqid 7")
		sa := outSA(0x1000, 7)
		sa.SrcTS = []ipsec.TrafficSelector{{Start: flow.Src, End: flow.Src, PortHi: 65535}}
		sa.DstTS = []ipsec.TrafficSelector{{Start: flow.Dst, End: flow.Dst, PortHi: 65535}}
		if _, err := r.add(sa, 0); err != nil {
			r.Fatal(err)
		}
		r.want("mtu 1446", "installed 192.0.2.1->198.51.100.2 reqid 7", "installed 192.0.2.1->198.51.100.2 reqid 0", "installed 0.0.0.0->198.51.100.2 reqid 7")
		if r.Stats().Acquires != 0 || len(r.asked) != 0 {
			r.Errorf("left: %+v, %d asked", r.Stats(), len(r.asked))
		}
	})
}

// A key daemon that comes hears what others have been asked for, and perhaps left
// behind; time runs on.
func TestAcquireHeardLater(t *testing.T) {
	testRig(t, func(r *rig) {
		e, k := r.policy(tunnel(ipsec.LevelUnique, 7))
		other, k2 := r.policy(&ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Protect, Sel: ipsec.Selector{Src: netip.MustParsePrefix("10.3.0.0/16"), Dst: netip.MustParsePrefix("10.2.0.0/16")},
			Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: ipsec.LevelUnique, ReqID: 8, Src: self, Dst: peer}}})
		r.NeedSA(e, k, flow)
		r.after(time.Second)
		r.NeedSA(other, k2, flow)
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 7", "acquire 192.0.2.1->198.51.100.2 reqid 8")
		r.after(LarvalLife/2 - time.Second)
		r.do(func() { r.Registered(2) })
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 7 of 2", "acquire 192.0.2.1->198.51.100.2 reqid 8 of 2")
		if !reflect.DeepEqual(r.acquires[:2], r.acquires[2:]) {
			r.Errorf("got %+v, was %+v", r.acquires[2:], r.acquires[:2])
		}
		r.NeedSA(e, k, flow)
		r.want()
		if _, err := r.add(outSA(0x1000, 8), r.acquires[3].Seq); err != nil {
			r.Fatal(err)
		}
		r.want("mtu 1446", "installed 192.0.2.1->198.51.100.2 reqid 8", "installed 192.0.2.1->198.51.100.2 reqid 0")
		r.do(func() { r.Registered(3) })
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 7 of 3")
		r.after(LarvalLife / 2)
		r.want("failed 192.0.2.1->198.51.100.2 reqid 7", "hard expire 0x00000000 dead")
		if r.Stats().Acquires != 0 || len(r.asked) != 0 || len(r.timers) != 0 || len(r.bySeq) != 0 {
			r.Errorf("left: %+v, %d asked, %d timers, %d numbers", r.Stats(), len(r.asked), len(r.timers), len(r.bySeq))
		}
	})
}

// What failed, or found nobody, is asked for again when somebody comes, if it is
// still wanted.
func TestAcquireAfterFailure(t *testing.T) {
	testRig(t, func(r *rig) {
		r.registered = false
		e, k := r.policy(tunnel(ipsec.LevelUnique, 7))
		r.NeedSA(e, k, flow)
		r.want("failed 192.0.2.1->198.51.100.2 reqid 7")
		r.registered = true
		r.do(func() { r.Registered(1) })
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 7")
		seq := r.acquires[0].Seq
		r.do(func() { r.AcquireFailed(seq, syscall.ESHUTDOWN) })
		r.do(func() { r.Registered(2) })
		r.want("failed 192.0.2.1->198.51.100.2 reqid 7", "acquire 192.0.2.1->198.51.100.2 reqid 7")
		r.do(func() { r.AcquireFailed(seq, syscall.ESHUTDOWN) }) // late
		r.after(FailureHold)
		r.NeedSA(e, k, flow)
		r.want()
		r.do(func() { r.DeletePolicyID(1, e.P.ID) })
		r.do(func() { r.Registered(3) })
		r.want("failed 192.0.2.1->198.51.100.2 reqid 7")
		if r.Stats().Acquires != 0 || len(r.asked) != 0 || len(r.timers) != 0 || len(r.bySeq) != 0 {
			r.Errorf("left: %+v, %d asked, %d timers, %d numbers", r.Stats(), len(r.asked), len(r.timers), len(r.bySeq))
		}
	})
}
