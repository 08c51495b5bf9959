package datapath

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestFlowsModel: whatever happens to policies and SAs between the packets of a
// few flows, each is judged as the databases judge it at that moment.
func TestFlowsModel(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	n := newNode(t, a4, ia4)
	n.quiet = true
	spdb, sadb := n.e.c.SPD, n.e.c.SAD
	out, in := n.e.out, n.e.in[0]
	remotes := []string{"192.0.2.2/32", "192.0.2.0/24", "0.0.0.0/0", "10.9.0.1/32"}
	tunnel := gcm(pairs()["tunnel 4 in 4"])
	const protoICMP = 1
	icmpTypes := [2]uint16{8, 13} // with their code 0 in place of the other port
	// packetFor is UDP for one of two ports, or ICMP of one of two types.
	packetFor := func(src, dst netip.Addr) []byte {
		b := udpPacket(src, dst, 1000, 2000+uint16(r.IntN(2)), 10)
		if r.IntN(3) == 0 {
			b[9], b[20], b[21] = protoICMP, byte(icmpTypes[r.IntN(2)]), 0
			packet.FixIPv4Checksum(b)
		}
		return b
	}
	var ids []uint32
	var sas []*sad.SA
	spi := uint32(0x1000)
	edit := func() {
		switch ed := spdb.Edit(); r.IntN(6) {
		case 0, 1:
			remote := netip.MustParsePrefix(remotes[r.IntN(len(remotes))])
			p := ipsec.Policy{
				Dir: []ipsec.Direction{ipsec.Out, ipsec.In, ipsec.Fwd}[r.IntN(3)], Action: []ipsec.Action{ipsec.Bypass, ipsec.Discard, ipsec.Protect}[r.IntN(3)],
				Sel: ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: remote}, Priority: uint32(r.IntN(4)),
			}
			if p.Action == ipsec.Protect {
				p.Requests = []ipsec.Request{tunnel.request()}
			}
			if p.Dir != ipsec.Out {
				p.Sel.Src, p.Sel.Dst = p.Sel.Dst, p.Sel.Src
			}
			if r.IntN(3) == 0 {
				p.Sel.Proto, p.Sel.DstPort = protoUDP, uint16(2000+r.IntN(2))
			} else if r.IntN(3) == 0 {
				p.Sel.Proto, p.Sel.SrcPort = protoICMP, icmpTypes[r.IntN(2)]+1 // ipsec.Selector: plus one
			}
			e, _, err := ed.Update(&p, time.Now())
			if err != nil || ed.Commit() != nil {
				t.Fatal(err)
			}
			ids = append(ids, e.P.ID)
		case 2:
			if len(ids) > 0 {
				_, _ = ed.DeleteID(ids[r.IntN(len(ids))]) // it may be gone
			}
			if ed.Commit() != nil {
				t.Fatal("no commit")
			}
		case 3:
			ed.Abort()
			p := tunnel.params()
			spi++
			p.SPI = ipsec.SPI(spi)
			if r.IntN(2) == 0 { // for some of the flows only
				p.DstTS = []ipsec.TrafficSelector{{Start: netip.MustParseAddr("192.0.2.2"), End: netip.MustParseAddr("192.0.2.2"), Proto: protoUDP, PortLo: 2000, PortHi: 2000}}
			}
			sas = append(sas, n.sa(p))
		default:
			ed.Abort()
			if len(sas) == 0 {
				return
			}
			k := r.IntN(len(sas))
			if st := []sad.State{sad.Dying, sad.Mature, sad.Dead, sad.Dead, sad.Dead}[r.IntN(5)]; st == sad.Dead {
				sadb.Remove(sas[k])
				sas = append(sas[:k], sas[k+1:]...)
			} else {
				sadb.SetState(sas[k], st)
			}
		}
	}
	seen := map[string]int{}
	for step := range 40_000 {
		if r.IntN(8) == 0 {
			edit()
		}
		src, dst := ia4, netip.MustParseAddr([]string{"192.0.2.2", "192.0.2.3", "10.9.0.1"}[r.IntN(3)])
		b := packetFor(src, dst)
		var i packet.Info
		packet.Decode(b, &i)
		p, _ := spdb.Lookup(ipsec.Out, &i)
		want := "pass"
		switch {
		case p == nil || p.P.Action == ipsec.Bypass:
		case p.P.Action == ipsec.Discard:
			want = "drop"
		default:
			want = "wait"
			if sa := sadb.Out(outKey(&p.P.Requests[0], src, dst), &i); sa != nil {
				want = fmt.Sprint(sa.P.SPI)
				seen["protect"]++
			}
		}
		held := n.e.hold.len()
		buf := make([]byte, headroom+len(b)+tailroom)
		copy(buf[headroom:], b)
		out.ip(buf, headroom, len(b), time.Now(), false)
		got := "drop"
		switch {
		case len(out.jobs) == 1 && out.jobs[0].sa != nil:
			got = fmt.Sprint(out.jobs[0].sa.P.SPI)
		case len(out.jobs) == 1:
			got = "pass"
		case n.e.hold.len() > held || want == "wait" && n.e.Stats()[DropOutHold] > 0:
			got = "wait"
		}
		out.jobs, out.seals = out.jobs[:0], out.seals[:0]
		seen[want]++
		if got != want {
			t.Fatalf("step %d, outbound %v: %s, want %s", step, i.Flow(), got, want)
		}

		// In clear, to us and to be forwarded.
		local := []netip.Addr{ia4, netip.MustParseAddr("10.77.0.1")}[r.IntN(2)]
		b = packetFor(dst, local)
		packet.Decode(b, &i)
		q, amb := spdb.Lookup(ipsec.In, &i)
		if local != ia4 {
			if f, a := spdb.Lookup(ipsec.Fwd, &i); f != nil {
				q, amb = f, a
			}
		}
		if e, a := in.lookup(&i); e != q || a != amb {
			t.Fatalf("step %d, inbound %v: %v, want %v", step, i.Flow(), e, q)
		}
		out.flows.Sweep(n.e.generation())
		in.flows.Sweep(n.e.generation())
	}
	for _, k := range []string{"pass", "drop", "wait", "protect"} {
		if seen[k] < 1000 {
			t.Errorf("%d packets to %s: the test asks too little", seen[k], k)
		}
	}
}

// TestFlowsConcurrent: once an edit is in force, no packet is judged by what was
// before it, while others edit.
func TestFlowsConcurrent(t *testing.T) {
	n := newNode(t, a4, ia4)
	tunnel := gcm(pairs()["tunnel 4 in 4"])
	// Policy number k has priority k of those in force and SPI k the newest of the
	// SAs: the larger, the later.
	var policies, sas atomic.Uint32
	add := func(k uint32) {
		p := ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: netip.MustParsePrefix("0.0.0.0/0")},
			Action: ipsec.Protect, Priority: k, Requests: []ipsec.Request{tunnel.request()}}
		ed := n.e.c.SPD.Edit()
		if _, _, err := ed.Update(&p, time.Now()); err != nil || ed.Commit() != nil {
			t.Error(err)
		}
		policies.Store(k)
	}
	renew := func(k uint32) *sad.SA {
		p := tunnel.params()
		p.SPI = ipsec.SPI(0x1000 + k)
		s, err := sad.New(p, time.Now())
		if err != nil || !n.e.c.SAD.Insert(s) {
			t.Error(err)
		}
		sas.Store(k)
		return s
	}
	add(1)
	old := renew(1)
	var stop atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop.Store(true)
	wg.Add(1)
	go func() {
		defer wg.Done()
		for k := uint32(2); !stop.Load(); k++ {
			if k%2 == 0 {
				add(k)
				continue
			}
			s := renew(k)
			n.e.c.SAD.Remove(old)
			old = s
		}
	}()
	w := n.e.out
	b := udpPacket(tunnel.in, tunnel.out, 1, 2, 10)
	buf := make([]byte, headroom+len(b)+tailroom)
	for packets := 0; packets < 5000 || policies.Load() < 500; packets++ {
		minPolicy, minSA := policies.Load(), sas.Load()
		copy(buf[headroom:], b)
		w.ip(buf, headroom, len(b), time.Now(), false)
		if len(w.jobs) != 1 || w.jobs[0].sa == nil {
			t.Fatalf("packet %d is not protected: %v", packets, n.e.Stats().nonzero())
		}
		var i packet.Info
		packet.Decode(b, &i)
		p, _ := w.policy(&i) // of this moment, perhaps later
		if got := uint32(w.jobs[0].sa.P.SPI) - 0x1000; got < minSA || p.P.Priority < minPolicy {
			t.Fatalf("packet %d: SA %d, policy %d, after SA %d and policy %d", packets, got, p.P.Priority, minSA, minPolicy)
		}
		w.jobs, w.seals = w.jobs[:0], w.seals[:0]
	}
}
