package datapath

import (
	"bytes"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestHold: packets wait for their SA in order, the oldest fall out, one
// question is asked, and what came of it decides their fate.
func TestHold(t *testing.T) {
	p := gcm(pairs()["transport 4"])
	for _, fate := range []string{"installed", "failed"} {
		t.Run(fate, func(t *testing.T) {
			a, b := newNode(t, p.src), newNode(t, p.dst)
			sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
			a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			for i := range HoldLimit + 3 {
				if got := a.send(udpPacket(p.in, p.out, uint16(i), 2, i)); len(got) != 0 {
					t.Fatal("sent without an SA")
				}
			}
			if len(a.needs) != 1 || a.e.Held() != HoldLimit {
				t.Fatalf("%d questions, %d held; want 1, %d", len(a.needs), a.e.Held(), HoldLimit)
			}
			want := map[Counter]uint64{OutHeld: HoldLimit + 3, DropOutHold: 3}
			if fate == "failed" {
				a.e.Failed(a.needs[0])
				want[DropOutHold] += HoldLimit
				a.wantCount(want)
				if a.e.Held() != 0 {
					t.Errorf("%d still held", a.e.Held())
				}
				a.send(udpPacket(p.in, p.out, 1, 2, 3))
				if len(a.needs) != 2 {
					t.Errorf("%d questions after a failure and a new packet, want 2", len(a.needs))
				}
				return
			}
			a.sa(p.params())
			b.sa(p.params())
			a.e.Installed(a.needs[0])
			a.wire = nil
			if err := a.e.release.sendHeld(make([]byte, bufSize)); err != nil {
				t.Fatal(err)
			}
			got := b.receive(a.wire...)
			if len(got) != HoldLimit {
				t.Fatalf("%d arrived, want %d", len(got), HoldLimit)
			}
			for i, x := range got {
				if w := udpPacket(p.in, p.out, uint16(i+3), 2, i+3); !bytes.Equal(x, w) {
					t.Fatalf("packet %d: got %x, want %x", i, x, w)
				}
			}
			want[OutReleased], want[OutProtected] = HoldLimit, HoldLimit
			a.wantCount(want)
		})
	}
}

// TestEarly: packets that overtake the keys of their SA wait for them, in order,
// for a while and in a bounded number.
func TestEarly(t *testing.T) {
	for name, p := range pairs() {
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, _, _, _ := p.nodes(t)
			b := newNode(t, p.dst)
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			larval := sad.NewLarval(p.params(), time.Now())
			b.e.c.SAD.Insert(larval)
			var want [][]byte
			for n := range earlyLimit + 5 {
				ip := udpPacket(p.in, p.out, 1, 2, n%100)
				if got := b.receiveAny(&p, a.send(ip)...); len(got) != 0 {
					t.Fatal("opened without keys")
				}
				want = append(want, ip)
			}
			sa, err := sad.New(p.params(), time.Now())
			if err != nil || !b.e.c.SAD.Replace(larval, sa) {
				t.Fatal("not replaced", err)
			}
			if err := b.e.late.receiveEarly(time.Now()); err != nil {
				t.Fatal(err)
			}
			got := b.delivered()
			if len(got) != earlyLimit {
				t.Fatalf("%d opened, want %d: %v", len(got), earlyLimit, b.e.Stats().nonzero())
			}
			for i := range got {
				if x := got[i][len(got[i])-i%100:]; !bytes.Equal(x, want[i][len(want[i])-i%100:]) {
					t.Fatalf("packet %d is another", i)
				}
			}
			b.wantCount(map[Counter]uint64{InEarly: earlyLimit, InProtected: earlyLimit, DropInNoSA: 5})

			b.e.early.put(p.params().SAID, inJob{buf: make([]byte, 100)}, make([]byte, 50), time.Now().Add(-2*earlyAge))
			if ps, old := b.e.early.take(func(ipsec.SAID) bool { return true }, time.Now()); len(ps) != 0 || old != 1 {
				t.Errorf("%d packets of long ago, %d forgotten", len(ps), old)
			}
		})
	}
}
