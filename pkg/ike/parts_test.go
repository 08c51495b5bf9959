package ike

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
)

func TestBudget(t *testing.T) {
	b := budget{limits: Limits{CookieThreshold: 2, HalfOpen: 3, HalfOpenPerSource: 2}}
	a := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	for i, step := range []struct {
		addr   string
		give   bool
		ok     bool
		cookie bool
	}{
		{"10.0.0.1", false, true, false},
		{"10.0.0.1", false, true, true},
		{"10.0.0.1", false, false, true}, // of this source enough
		{"2001:db8::1", false, true, true},
		{"2001:db8::2", false, false, true}, // in all enough
		{"10.0.0.1", true, true, true},
		{"2001:db8::ffff", false, true, true}, // the same /64
		{"10.0.0.1", true, true, true},
		{"2001:db8::5", false, false, true}, // of this /64 enough
		{"2001:db8:0:1::5", false, true, true},
	} {
		ok := true
		if step.give {
			b.give(originOf(a(step.addr), false))
		} else {
			ok = b.take(originOf(a(step.addr), false))
		}
		if ok != step.ok || b.needCookie(a("10.9.9.9")) != step.cookie {
			t.Errorf("step %d: got %v, cookie %v; want %v, %v", i, ok, b.needCookie(a("10.9.9.9")), step.ok, step.cookie)
		}
	}
	if always := (&budget{limits: Limits{AlwaysCookie: true, CookieThreshold: 9}}); !always.needCookie(a("10.0.0.1")) {
		t.Error("AlwaysCookie: not demanded")
	}
	// Messages in the name of a peer take its share of what needs no cookie.
	b = budget{limits: Limits{CookieThreshold: 9, HalfOpen: 9, HalfOpenPerSource: 1}}
	peer := a("10.0.0.1")
	if !b.take(originOf(peer, false)) || !b.needCookie(peer) || b.needCookie(a("10.0.0.2")) || !b.take(originOf(peer, true)) || b.take(originOf(peer, true)) {
		t.Errorf("a cookie gives no share: %v", b.by)
	}
}

func TestSecrets(t *testing.T) {
	var s secrets
	now := time.Unix(1, 0)
	get := func() [2]cookieSecret {
		v, err := s.get(now)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	one := get()
	if one[0].key == nil || one[1].key != nil {
		t.Errorf("first: got %v", one)
	}
	now = now.Add(rotateEvery - 1)
	if again := get(); !bytes.Equal(again[0].key, one[0].key) {
		t.Error("rotated too early")
	}
	now = now.Add(1)
	two := get()
	if bytes.Equal(two[0].key, one[0].key) || !bytes.Equal(two[1].key, one[0].key) || two[0].version == one[0].version {
		t.Errorf("second: got %v after %v", two, one)
	}
	now = now.Add(3 * rotateEvery)
	if three := get(); three[1].key != nil {
		t.Error("a secret of long ago still serves")
	}
}

func TestBucket(t *testing.T) {
	var b bucket
	now := time.Unix(1, 0)
	count := func() (n int) {
		for range 100 {
			if b.allow(now) {
				n++
			}
		}
		return n
	}
	if got := count(); got != bucketDepth {
		t.Errorf("at once: got %d, want %v", got, bucketDepth)
	}
	now = now.Add(time.Second)
	if got := count(); got != bucketRate {
		t.Errorf("a second later: got %d, want %v", got, bucketRate)
	}
}

func TestSPD(t *testing.T) {
	pfx := netip.MustParsePrefix
	tunnel := func(id uint32, dir ipsec.Direction, prio uint32, src, dst string, tsrc, tdst netip.Addr) *ipsec.Policy {
		return &ipsec.Policy{ID: id, Dir: dir, Priority: prio, Action: ipsec.Protect, Sel: ipsec.Selector{Src: pfx(src), Dst: pfx(dst)},
			Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Src: tsrc, Dst: tdst}}}
	}
	bypass := tunnel(9, ipsec.Out, 0, "0.0.0.0/0", "0.0.0.0/0", addrA, addrB)
	bypass.Action = ipsec.Bypass
	seed := policies(addrA, addrB)
	seed[0].ID, seed[1].ID = 5, 6
	var s spd
	s.add(tunnel(1, ipsec.Out, 5, "10.1.0.0/16", "10.2.0.0/16", addrA, addrB)) // before the first dump
	s.replace([]*ipsec.Policy{
		tunnel(3, ipsec.Out, 1, "10.1.0.0/24", "10.2.0.0/16", addrA, addrB),
		tunnel(4, ipsec.In, 1, "10.2.0.0/16", "10.1.0.0/24", addrA, addrB), // of other end points
		tunnel(1, ipsec.Out, 5, "10.1.0.0/16", "10.2.0.0/16", addrA, addrB),
		bypass, &seed[0], &seed[1],
	})
	s.add(tunnel(2, ipsec.In, 5, "10.2.0.0/16", "10.1.0.0/16", addrB, addrA))
	ts := func(p string) []ipsec.TrafficSelector {
		r := pad.Prefix(pfx(p))
		return []ipsec.TrafficSelector{{Start: r.From, End: r.To, PortHi: 65535}}
	}
	q := func(mode ipsec.Mode, local, peer string) sa.Query {
		return sa.Query{Mode: mode, LocalTS: ts(local), PeerTS: ts(peer),
			Peer: sa.Peer{Local: netip.AddrPortFrom(addrA, 500), Remote: netip.AddrPortFrom(addrB, 4500)}}
	}
	check := func(name string, ps []sa.Policy, want ...uint32) {
		t.Helper()
		var got []uint32 // Out, In; 0 for none
		for _, p := range ps {
			in := uint32(0)
			if p.In != nil {
				in = p.In.ID
			}
			got = append(got, p.Out.ID, in)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	check("strongest first", s.policies(q(ipsec.Tunnel, "10.1.0.0/16", "10.2.0.0/16")), 3, 0, 1, 2)
	check("selectors of one", s.policies(q(ipsec.Tunnel, "10.1.5.0/24", "10.2.0.0/16")), 1, 2)
	check("wider than policy", s.policies(q(ipsec.Tunnel, "0.0.0.0/0", "0.0.0.0/0")), 3, 0, 1, 2)
	check("elsewhere", s.policies(q(ipsec.Tunnel, "10.3.0.0/16", "10.2.0.0/16")))
	check("transport", s.policies(q(ipsec.Transport, "192.0.2.1/32", "192.0.2.2/32")), 5, 6)
	check("other family", s.policies(q(ipsec.Tunnel, "2001:db8::/32", "2001:db8::/32")))
	check("at start", s.towards(addrA, addrB), 5, 6, 3, 0, 1, 2)
	check("at start, other peer", s.towards(addrA, addrA))
	if p, ok := s.outbound(1); !ok || p.In == nil || p.In.ID != 2 {
		t.Errorf("outbound 1: got %+v, %v", p, ok)
	}
	for _, id := range []uint32{2, 9, 77} { // inbound, bypass, none
		if p, ok := s.outbound(id); ok {
			t.Errorf("outbound %d: got %+v, want none", id, p)
		}
	}
	// Templates serve any peer, and ask none; our own end may be open as well.
	open := netip.IPv4Unspecified()
	s.add(tunnel(20, ipsec.Out, 7, "10.7.0.0/16", "0.0.0.0/0", addrA, open))
	s.add(tunnel(21, ipsec.In, 7, "0.0.0.0/0", "10.7.0.0/16", open, addrA))
	s.add(tunnel(22, ipsec.Out, 8, "10.8.0.0/16", "10.9.0.0/16", open, addrB))
	s.add(tunnel(23, ipsec.Out, 9, "10.7.0.0/16", "0.0.0.0/0", addrB, open)) // another address of ours
	check("any peer", s.policies(q(ipsec.Tunnel, "10.7.0.0/16", "10.66.0.1/32")), 20, 21)
	check("any end of ours", s.policies(q(ipsec.Tunnel, "10.8.0.0/16", "10.9.0.0/16")), 22, 0)
	check("at start, with templates", s.towards(addrA, addrB), 5, 6, 3, 0, 1, 2, 22, 0)
	s.delete(2)
	s.delete(3)
	s.delete(77)
	check("after deletion", s.policies(q(ipsec.Tunnel, "10.1.0.0/16", "10.2.0.0/16")), 1, 0)
	s.replace(nil)
	check("emptied", s.policies(q(ipsec.Tunnel, "10.1.0.0/16", "10.2.0.0/16")))
}
