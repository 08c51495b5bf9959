package ike

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

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
			b.give(a(step.addr))
		} else {
			ok = b.take(a(step.addr))
		}
		if ok != step.ok || b.needCookie() != step.cookie {
			t.Errorf("step %d: got %v, cookie %v; want %v, %v", i, ok, b.needCookie(), step.ok, step.cookie)
		}
	}
	if always := (&budget{limits: Limits{AlwaysCookie: true, CookieThreshold: 9}}); !always.needCookie() {
		t.Error("AlwaysCookie: not demanded")
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
	var s spd
	s.replace([]*ipsec.Policy{
		tunnel(1, ipsec.Out, 5, "10.1.0.0/16", "10.2.0.0/16", addrA, addrB),
		tunnel(2, ipsec.In, 5, "10.2.0.0/16", "10.1.0.0/16", addrB, addrA),
		tunnel(3, ipsec.Out, 1, "10.1.0.0/24", "10.2.0.0/16", addrA, addrB),
		tunnel(4, ipsec.In, 1, "10.2.0.0/16", "10.1.0.0/24", addrA, addrB), // of other end points
		bypass,
	})
	seed := policies(addrA, addrB)
	s.add(&seed[0])
	ts := func(p string) []ipsec.TrafficSelector {
		r := pfx(p)
		return []ipsec.TrafficSelector{{Start: r.Addr(), End: last(r), PortHi: 65535}}
	}
	q := func(mode ipsec.Mode, local, peer string) sa.Query {
		return sa.Query{Mode: mode, LocalTS: ts(local), PeerTS: ts(peer),
			Peer: sa.Peer{Local: netip.AddrPortFrom(addrA, 500), Remote: netip.AddrPortFrom(addrB, 4500)}}
	}
	for _, tt := range []struct {
		name string
		q    sa.Query
		want []uint32 // Out, In; 0 for none
	}{
		{"tunnel, strongest first", q(ipsec.Tunnel, "10.1.0.0/16", "10.2.0.0/16"), []uint32{3, 0, 1, 2}},
		{"selectors of one", q(ipsec.Tunnel, "10.1.5.0/24", "10.2.0.0/16"), []uint32{1, 2}},
		{"wider than policy", q(ipsec.Tunnel, "0.0.0.0/0", "0.0.0.0/0"), []uint32{3, 0, 1, 2}},
		{"elsewhere", q(ipsec.Tunnel, "10.3.0.0/16", "10.2.0.0/16"), nil},
		{"transport", q(ipsec.Transport, "192.0.2.1/32", "192.0.2.2/32"), []uint32{1, 0}},
		{"other family", q(ipsec.Tunnel, "2001:db8::/32", "2001:db8::/32"), nil},
	} {
		if tt.name == "transport" {
			// The seed's policy took the ID of the first one, which is gone.
			s.add(&seed[1])
			tt.want = []uint32{1, 2}
		} else if tt.name != "other family" {
			s.replace([]*ipsec.Policy{
				tunnel(3, ipsec.Out, 1, "10.1.0.0/24", "10.2.0.0/16", addrA, addrB),
				tunnel(4, ipsec.In, 1, "10.2.0.0/16", "10.1.0.0/24", addrA, addrB),
				tunnel(1, ipsec.Out, 5, "10.1.0.0/16", "10.2.0.0/16", addrA, addrB),
				tunnel(2, ipsec.In, 5, "10.2.0.0/16", "10.1.0.0/16", addrB, addrA),
				bypass,
			})
		} else {
			s.replace(nil)
		}
		if tt.name == "transport" {
			s.add(&seed[0])
		}
		var got []uint32
		for _, p := range s.policies(tt.q) {
			in := uint32(0)
			if p.In != nil {
				in = p.In.ID
			}
			got = append(got, p.Out.ID, in)
		}
		if len(got) != len(tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
			continue
		}
		for i := range got {
			if got[i] != tt.want[i] {
				t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
				break
			}
		}
	}
}

func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
