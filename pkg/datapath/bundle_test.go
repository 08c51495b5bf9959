package datapath

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/ipcomp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

// tlayer is one transform of a bundle.
type tlayer struct {
	proto    ipsec.Protocol
	src, dst netip.Addr // of a tunnel; invalid: transport mode
	encap    bool
}

func (l tlayer) mode() ipsec.Mode {
	if l.dst.IsValid() {
		return ipsec.Tunnel
	}
	return ipsec.Transport
}

// stack is a bundle, innermost first, for traffic from in to out.
type stack struct {
	name    string
	in, out netip.Addr
	layers  []tlayer
	integ   alg.Integ
	esn     bool
	old     bool // the headers of RFC 1826 and RFC 1827
}

var (
	tESP  = tlayer{proto: ipsec.ESP}
	tAH   = tlayer{proto: ipsec.AH}
	tComp = tlayer{proto: ipsec.IPComp}
)

func (l tlayer) tunnel(src, dst netip.Addr) tlayer {
	l.src, l.dst = src, dst
	return l
}

func stacks() []stack {
	udp := tESP
	udp.encap = true
	return []stack{
		{name: "AH transport 4", in: a4, out: b4, layers: []tlayer{tAH}},
		{name: "AH transport 6", in: a6, out: b6, layers: []tlayer{tAH}},
		{name: "AH transport 4 ESN", in: a4, out: b4, layers: []tlayer{tAH}, esn: true},
		{name: "AH tunnel 4 in 4", in: ia4, out: ib4, layers: []tlayer{tAH.tunnel(a4, b4)}},
		{name: "AH tunnel 6 in 4", in: ia6, out: ib6, layers: []tlayer{tAH.tunnel(a4, b4)}},
		{name: "AH tunnel 4 in 6", in: ia4, out: ib4, layers: []tlayer{tAH.tunnel(a6, b6)}},
		{name: "AH tunnel 6 in 6", in: ia6, out: ib6, layers: []tlayer{tAH.tunnel(a6, b6)}, esn: true},
		{name: "ESP in AH 4", in: a4, out: b4, layers: []tlayer{tESP, tAH}},
		{name: "ESP in AH 6", in: a6, out: b6, layers: []tlayer{tESP, tAH}},
		{name: "AH in ESP 4", in: a4, out: b4, layers: []tlayer{tAH, tESP}},
		{name: "AH in ESP 6", in: a6, out: b6, layers: []tlayer{tAH, tESP}},
		{name: "ESP tunnel in AH 4 4", in: ia4, out: ib4, layers: []tlayer{tESP.tunnel(a4, b4), tAH}},
		{name: "ESP tunnel in AH 6 4", in: ia6, out: ib6, layers: []tlayer{tESP.tunnel(a4, b4), tAH}},
		{name: "ESP tunnel in AH 4 6", in: ia4, out: ib4, layers: []tlayer{tESP.tunnel(a6, b6), tAH}},
		{name: "ESP in AH tunnel", in: a4, out: b4, layers: []tlayer{tESP, tAH.tunnel(a4, b4)}},
		{name: "ESP tunnel in AH tunnel", in: ia4, out: ib4, layers: []tlayer{tESP.tunnel(a4, b4), tAH.tunnel(a6, b6)}},
		{name: "ESP tunnel in ESP tunnel", in: ia6, out: ib6, layers: []tlayer{tESP.tunnel(a6, b6), tESP.tunnel(a4, b4)}},
		{name: "IPComp 4", in: a4, out: b4, layers: []tlayer{tComp}},
		{name: "IPComp in ESP 4", in: a4, out: b4, layers: []tlayer{tComp, tESP}},
		{name: "IPComp in ESP 6", in: a6, out: b6, layers: []tlayer{tComp, tESP}},
		{name: "IPComp in ESP tunnel", in: ia4, out: ib4, layers: []tlayer{tComp, tESP.tunnel(a6, b6)}},
		{name: "IPComp tunnel in ESP 4 4", in: ia4, out: ib4, layers: []tlayer{tComp.tunnel(a4, b4), tESP}},
		{name: "IPComp tunnel in ESP 6 4", in: ia6, out: ib6, layers: []tlayer{tComp.tunnel(a4, b4), tESP}},
		{name: "IPComp tunnel in ESP 4 6", in: ia4, out: ib4, layers: []tlayer{tComp.tunnel(a6, b6), tESP}},
		{name: "IPComp tunnel in ESP in UDP", in: ia4, out: ib4, layers: []tlayer{tComp.tunnel(a4, b4), udp}},
		{name: "IPComp in ESP in AH 4", in: a4, out: b4, layers: []tlayer{tComp, tESP, tAH}},
		{name: "IPComp tunnel in ESP in AH 6 6", in: ia6, out: ib6, layers: []tlayer{tComp.tunnel(a6, b6), tESP, tAH}},
		{name: "old ESP in old AH 4", in: a4, out: b4, layers: []tlayer{tESP, tAH}, old: true},
		{name: "old ESP in old AH 6", in: a6, out: b6, layers: []tlayer{tESP, tAH}, old: true},
		{name: "old ESP tunnel in old AH 4 4", in: ia4, out: ib4, layers: []tlayer{tESP.tunnel(a4, b4), tAH}, old: true},
		{name: "old AH tunnel 6 in 4", in: ia6, out: ib6, layers: []tlayer{tAH.tunnel(a4, b4)}, old: true},
		{name: "three tunnels 6", in: ia6, out: ib6, layers: []tlayer{tComp.tunnel(a6, b6), tESP.tunnel(a6, b6), tAH.tunnel(a6, b6)}},
	}
}

// ends are the outer addresses.
func (s *stack) ends() (src, dst netip.Addr) {
	src, dst = s.in, s.out
	for _, l := range s.layers {
		if l.dst.IsValid() {
			src, dst = l.src, l.dst
		}
	}
	return src, dst
}

func (s *stack) udp() bool { return s.layers[len(s.layers)-1].encap }

func (s *stack) requests() (rs []ipsec.Request) {
	for _, l := range s.layers {
		rs = append(rs, ipsec.Request{Proto: l.proto, Mode: l.mode(), Level: ipsec.LevelUnique, ReqID: 7, Src: l.src, Dst: l.dst})
	}
	return rs
}

func (s *stack) params() (ps []*ipsec.SAParams) {
	src, dst := s.in, s.out
	integ := s.integ
	if integ == alg.IntegNone {
		integ = alg.IntegHMACSHA256
	}
	for k, l := range s.layers {
		if l.dst.IsValid() {
			src, dst = l.src, l.dst
		}
		p := &ipsec.SAParams{
			SAID: ipsec.SAID{Proto: l.proto, Dst: dst, SPI: ipsec.SPI(0x1000 + k)}, Src: src, Mode: l.mode(), ReqID: 7,
			ReplayWindow: 64, ESN: s.esn,
		}
		switch l.proto {
		case ipsec.ESP:
			p.Encr, p.EncrKey = alg.EncrAESGCM16, ipsec.NewKey(make([]byte, 20))
		case ipsec.AH:
			p.Auth, p.AuthKey = integ, ipsec.NewKey(make([]byte, integ.Info().KeyLen))
		}
		if s.old {
			p.ReplayWindow, p.Unauthenticated = 0, true
			if l.proto == ipsec.ESP {
				p.Encr, p.EncrKey = alg.Encr3DESIV64, ipsec.NewKey([]byte("\x13\x34\x57\x79\x9b\xbc\xdf\xf1\x0e\x32\x92\x32\xea\x6d\x0d\x73"))
			} else {
				p.Auth, p.AuthKey = alg.IntegKeyedMD5, ipsec.NewKey(make([]byte, 16))
			}
		}
		if l.encap {
			p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500}
		}
		ps = append(ps, p)
	}
	return ps
}

func (s *stack) policy(dir ipsec.Direction) ipsec.Policy {
	return ipsec.Policy{Dir: dir, Sel: ipsec.Selector{Src: prefix(s.in), Dst: prefix(s.out)}, Action: ipsec.Protect, Requests: s.requests()}
}

// nodes makes both ends without SAs; local are all addresses of an end.
func (s *stack) nodes(t testing.TB) (a, b *node) {
	a, b = newNode(t, a4, a6, ia4, ia6), newNode(t, b4, b6, ib4, ib6)
	a.policy(s.policy(ipsec.Out))
	b.policy(s.policy(ipsec.In))
	return a, b
}

func (s *stack) sas(a, b *node) (out, in []*sad.SA) {
	for k := range s.layers {
		out = append(out, a.sa(s.params()[k]))
		in = append(in, b.sa(s.params()[k]))
	}
	return out, in
}

// text makes a UDP packet whose payload compresses, or not.
func text(src, dst netip.Addr, n int, noise bool) []byte {
	b := udpPacket(src, dst, 1000, 2000, n)
	u := b[len(b)-n:]
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range u {
		if u[i] = "compress me, "[i%13]; noise {
			u[i] = byte(r.Uint32())
		}
	}
	packet.PutUDPChecksum(b)
	if src.Is4() {
		b[4] = 0x77 // AH sees to it that there is an identification
		packet.FixIPv4Checksum(b)
	}
	return b
}

// TestBundle: every bundle carries packets of awkward lengths unchanged, whether
// they compress or not.
func TestBundle(t *testing.T) {
	for _, s := range stacks() {
		for _, integ := range []alg.Integ{alg.IntegHMACSHA1, alg.IntegHMACSHA256, alg.IntegHMACSHA384, alg.IntegHMACSHA512, alg.IntegAESXCBC, alg.IntegAESCMAC} {
			s.integ = integ
			if integ != alg.IntegHMACSHA1 && !slices.ContainsFunc(s.layers, func(l tlayer) bool { return l.proto == ipsec.AH }) {
				continue
			}
			t.Run(s.name+" "+integ.String(), func(t *testing.T) {
				a, b := s.nodes(t)
				_, in := s.sas(a, b)
				src, dst := s.ends()
				count, clear := uint64(0), uint64(0)
				for _, n := range []int{0, 1, 2, 3, 13, 100, 101, 1000, 1200} {
					for _, noise := range []bool{false, true} {
						ip := text(s.in, s.out, n, noise)
						sent := a.send(ip)
						if len(sent) != 1 {
							t.Fatalf("payload %d: %d packets left; %v", n, len(sent), a.e.Stats().nonzero())
						}
						var i packet.Info
						if !packet.Decode(sent[0], &i) || i.Src != src || i.Dst != dst || i.Len != len(sent[0]) {
							t.Fatalf("payload %d: outer packet %+v", n, i)
						}
						if s.layers[0].proto == ipsec.IPComp && n >= 1000 && !noise && len(sent[0]) > 500 {
							t.Errorf("payload %d: %d octets left", n, len(sent[0]))
						}
						want := uint8(s.layers[len(s.layers)-1].proto)
						switch {
						case s.udp():
							want = protoUDP
						case want == protoIPComp && (noise || n < 100): // not compressed, and nothing else
							want = protoUDP
							clear++
							count--
						}
						if i.Proto != want {
							t.Fatalf("protocol %d, want %d", i.Proto, want)
						}
						var got [][]byte
						if s.udp() {
							got = b.receiveUDP(sent...)
						} else {
							got = b.receive(sent...)
						}
						if len(got) != 1 || !bytes.Equal(got[0], ip) {
							t.Fatalf("payload %d noise %v: got %x (%v)\nwant %x", n, noise, got, b.e.Stats().nonzero(), ip)
						}
						count++
					}
				}
				a.wantCount(map[Counter]uint64{OutProtected: count, OutBypassed: clear})
				b.wantCount(map[Counter]uint64{InProtected: count, InBypassed: clear})
				for _, sa := range in {
					if sa.P.Proto != ipsec.IPComp && sa.Packets() != count {
						t.Errorf("%v counts %d packets, want %d", sa.P.SAID, sa.Packets(), count)
					}
				}
			})
		}
	}
}

// TestBundleEarly: packets that overtake the keys of any of their SAs wait for
// them, AH and what lies inside another transform too, in order and in a bounded
// number; when the SA goes instead, so do they.
func TestBundleEarly(t *testing.T) {
	for _, s := range stacks() {
		for k := range s.layers {
			t.Run(fmt.Sprintf("%s %d", s.name, k), func(t *testing.T) {
				a, b := s.nodes(t)
				var larval *sad.SA
				for j, p := range s.params() {
					a.sa(p)
					if j != k {
						b.sa(p)
						continue
					}
					larval = sad.NewLarval(p, time.Now())
					b.e.c.SAD.Insert(larval)
				}
				receive := func(ips ...[]byte) [][]byte {
					if s.udp() {
						return b.receiveUDP(ips...)
					}
					return b.receive(ips...)
				}
				var want [][]byte
				for n := range 5 {
					ip := text(s.in, s.out, 1000+n, false)
					p := a.send(ip)
					want = append(want, ip)
					if got := receive(p...); len(got) != 0 {
						t.Fatal("opened without keys")
					}
				}
				b.wantCount(map[Counter]uint64{InEarly: 5})
				sa, err := sad.New(s.params()[k], time.Now())
				if err != nil || !b.e.c.SAD.Replace(larval, sa) {
					t.Fatal("not replaced", err)
				}
				late := func() [][]byte {
					b.tap = nil
					if err := b.e.late.receiveEarly(time.Now()); err != nil {
						t.Fatal(err)
					}
					return b.delivered()
				}
				if got := late(); !slices.EqualFunc(got, want, bytes.Equal) {
					t.Fatalf("%d of %d arrived as they were: %v", len(got), len(want), b.e.Stats().nonzero())
				}
				b.wantCount(map[Counter]uint64{InEarly: 5, InProtected: 5})
				if got := late(); len(got) != 0 {
					t.Errorf("%d packets twice", len(got))
				}

				// Anew, and this time the SA goes before its keys come.
				b.e.c.SAD.Remove(sa)
				b.e.c.SAD.Insert(sad.NewLarval(s.params()[k], time.Now()))
				early := b.e.Stats()[InEarly]
				for range earlyLimit + 5 {
					receive(a.send(text(s.in, s.out, 1000, false))...)
				}
				if n := b.e.Stats()[InEarly] - early; n != earlyLimit {
					t.Errorf("%d packets wait, want %d: %v", n, earlyLimit, b.e.Stats().nonzero())
				}
				b.e.c.SAD.Remove(b.e.c.SAD.Lookup(s.params()[k].SAID))
				if got := late(); len(got) != 0 || b.e.Stats()[DropInNoSA] != earlyLimit+5 {
					t.Errorf("%d packets without an SA: %v", len(got), b.e.Stats().nonzero())
				}
			})
		}
	}
}

// TestBundleHostile: whatever bit of a protected packet is flipped on the way,
// no other packet comes out of it, and afterwards the packet itself arrives,
// once.
func TestBundleHostile(t *testing.T) {
	for _, s := range stacks() {
		if s.udp() || s.layers[len(s.layers)-1].proto == ipsec.IPComp {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			a, b := s.nodes(t)
			_, in := s.sas(a, b)
			ip := text(s.in, s.out, 120, false)
			good := a.send(ip)[0]
			// A packet that was authentic as far as its outermost transform
			// goes is used up; the next needs a receiver that has not seen it.
			fresh := func() {
				if !slices.ContainsFunc(in, func(sa *sad.SA) bool { return sa.Packets() != 0 }) {
					return
				}
				_, b = s.nodes(t)
				in = nil
				for _, p := range s.params() {
					in = append(in, b.sa(p))
				}
			}
			for at := range good {
				for bit := range 8 {
					fresh()
					bad := bytes.Clone(good)
					bad[at] ^= 1 << bit
					before := b.e.Stats()
					got := b.receive(bad)
					if b.e.Stats()[InProtected] == before[InProtected] {
						continue // dropped, or another's now
					}
					// What is mutable on the way may have changed: TOS, TTL, flow label, checksum.
					if g := got[0]; len(g) != len(ip) || !bytes.Equal(g[len(g)-128:], ip[len(ip)-128:]) {
						t.Fatalf("octet %d bit %d: passed as %x", at, bit, g)
					}
				}
			}
			fresh()
			arrive := 1
			if s.old {
				arrive = 2 // there is no number to know it by
			}
			if got := b.receive(good, good); len(got) != arrive || !bytes.Equal(got[0], ip) {
				t.Errorf("the packet twice: %d arrived, want %d; %v", len(got), arrive, b.e.Stats().nonzero())
			}
			for n := range good {
				cut := bytes.Clone(good[:n])
				if n >= 40 {
					packet.SetLen(cut, n)
					packet.FixIPv4Checksum(cut)
				}
				before := b.e.Stats()
				if b.receive(cut); b.e.Stats()[InProtected] != before[InProtected] {
					t.Fatalf("cut to %d: passed", n)
				}
			}
		})
	}
}

// TestBundleExact: RFC 4301, 5.2: what arrives must have been protected by
// exactly the transforms that policy asks for, in its order.
func TestBundleExact(t *testing.T) {
	want := stack{in: a4, out: b4, layers: []tlayer{tESP, tAH}}
	for name, s := range map[string]stack{
		"ESP alone":         {layers: []tlayer{tESP}},
		"AH alone":          {layers: []tlayer{tAH}},
		"AH in ESP":         {layers: []tlayer{tAH, tESP}},
		"ESP in AH in ESP":  {layers: []tlayer{tESP, tAH, tESP}},
		"ESP in AH in AH":   {layers: []tlayer{tESP, tAH, tAH}},
		"IPComp besides":    {layers: []tlayer{tComp, tESP, tAH}},
		"AH tunnel":         {layers: []tlayer{tESP, tAH.tunnel(a4, b4)}},
		"ESP tunnel":        {layers: []tlayer{tESP.tunnel(a4, b4), tAH}},
		"seven times AH":    {layers: []tlayer{tAH, tAH, tAH, tAH, tAH, tAH}},
		"as it is to be":    want,
		"of another reqid":  want,
		"by the wrong peer": want,
	} {
		t.Run(name, func(t *testing.T) {
			s.in, s.out = a4, b4
			a, _ := s.nodes(t)
			_, b := want.nodes(t)
			for _, p := range s.params() {
				p.SPI += ipsec.SPI(len(s.layers)) * 16
				a.sa(p)
			}
			for _, p := range s.params() {
				p.SPI += ipsec.SPI(len(s.layers)) * 16
				if name == "of another reqid" {
					p.ReqID = 8
				}
				if name == "by the wrong peer" {
					p.Src = netip.MustParseAddr("192.0.2.77")
				}
				b.sa(p)
			}
			sent := a.send(text(a4, b4, 200, false))
			if len(sent) != 1 {
				t.Fatalf("%d packets left", len(sent))
			}
			got := b.receive(sent...)
			if ok := name == "as it is to be"; (len(got) == 1) != ok {
				t.Errorf("%d arrived; %v", len(got), b.e.Stats().nonzero())
			} else if !ok && b.e.Stats()[DropInPolicy]+b.e.Stats()[DropInSelector] != 1 {
				t.Errorf("counted as %v", b.e.Stats().nonzero())
			}
		})
	}
	t.Run("clear", func(t *testing.T) {
		_, b := want.nodes(t)
		b.receive(text(a4, b4, 9, false))
		b.wantCount(map[Counter]uint64{DropInClear: 1})
	})
}

// TestBundleHold: a packet waits for all SAs of its bundle, each is asked for
// once, and if one cannot be had the packet goes.
func TestBundleHold(t *testing.T) {
	s := stack{in: ia4, out: ib4, layers: []tlayer{tComp, tESP.tunnel(a4, b4), tAH}}
	for _, fate := range []string{"installed", "failed"} {
		t.Run(fate, func(t *testing.T) {
			a, b := s.nodes(t)
			for range 3 {
				a.send(text(s.in, s.out, 300, false))
			}
			want := []sad.OutKey{
				{Proto: ipsec.IPComp, Mode: ipsec.Transport, ReqID: 7, Src: ia4, Dst: ib4},
				{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, Src: a4, Dst: b4},
				{Proto: ipsec.AH, Mode: ipsec.Transport, ReqID: 7, Src: a4, Dst: b4},
			}
			if !slices.Equal(a.needs, want) {
				t.Fatalf("asked for %v, want %v", a.needs, want)
			}
			ps, qs := s.params(), s.params()
			release := func() int {
				a.wire = nil
				if err := a.e.release.sendHeld(make([]byte, bufSize)); err != nil {
					t.Fatal(err)
				}
				return len(a.wire)
			}
			for k := range ps {
				b.sa(qs[k])
				if k == 2 && fate == "failed" {
					a.e.Failed(want[k])
					if a.e.Held() != 0 || release() != 0 {
						t.Error("packets are left")
					}
					a.wantCount(map[Counter]uint64{OutHeld: 3, DropOutHold: 3})
					return
				}
				a.sa(ps[k])
				a.e.Installed(want[k])
				if n := release(); n != map[bool]int{true: 3}[k == 2] {
					t.Fatalf("after %d of 3 SAs %d packets left", k+1, n)
				}
			}
			if got := b.receive(a.wire...); len(got) != 3 {
				t.Errorf("%d arrived: %v", len(got), b.e.Stats().nonzero())
			}
		})
	}
}

// TestPackedBundle: one SA of ESP or AH with a CPI stands for those of IPComp and of
// ESP or AH around it, both ways; one without does not.
func TestPackedBundle(t *testing.T) {
	for name, s := range map[string]stack{
		"transport":    {in: a4, out: b4, layers: []tlayer{tComp, tESP}},
		"tunnel":       {in: ia4, out: ib4, layers: []tlayer{tComp.tunnel(a4, b4), tESP}},
		"AH transport": {in: a4, out: b4, layers: []tlayer{tComp, tAH}},
		"AH tunnel":    {in: ia4, out: ib4, layers: []tlayer{tComp.tunnel(a4, b4), tAH}},
	} {
		for _, cpi := range []uint16{0, 300} {
			t.Run(fmt.Sprint(name, cpi), func(t *testing.T) {
				a, b := s.nodes(t)
				r := ipsec.Packed(s.policy(ipsec.Out).Requests)
				if r == nil {
					t.Fatal("not one request")
				}
				for _, n := range []*node{a, b} {
					p := *s.params()[1]
					p.Mode, p.CPI, p.ReqID, p.Src, p.Dst = r.Mode, cpi, r.ReqID, a4, b4
					n.sa(&p)
				}
				var sent [][]byte
				for _, noise := range []bool{false, true} {
					ip := text(s.in, s.out, 500, noise)
					out := a.send(ip)
					if cpi == 0 {
						if len(out) != 0 {
							t.Error("sent without IPComp")
						}
						continue
					}
					if got := b.receive(out...); len(got) != 1 || !bytes.Equal(got[0], ip) {
						t.Fatalf("%d arrived: %v", len(got), b.e.Stats().nonzero())
					}
					sent = append(sent, out...)
				}
				if cpi != 0 && len(sent[0]) >= len(sent[1]) {
					t.Errorf("text became %d octets, noise %d", len(sent[0]), len(sent[1]))
				}
			})
		}
	}
}

// TestCompressedBundle: the innermost SA of a bundle compresses if it has a CPI, and
// no other.
func TestCompressedBundle(t *testing.T) {
	for _, s := range stacks() {
		if s.old || s.udp() || slices.ContainsFunc(s.layers, func(l tlayer) bool { return l.proto == ipsec.IPComp }) {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			a, b := s.nodes(t)
			for _, n := range []*node{a, b} {
				for k, p := range s.params() {
					p.CPI = uint16(300 + k)
					n.sa(p)
				}
			}
			for _, noise := range []bool{false, true} {
				ip := text(s.in, s.out, 1000, noise)
				out := a.send(ip)
				if len(out) != 1 || (len(out[0]) < 500) == noise {
					t.Fatalf("noise %v: %d packets left: %x", noise, len(out), out)
				}
				if got := b.receive(out...); len(got) != 1 || !bytes.Equal(got[0], ip) {
					t.Fatalf("noise %v: got %x, want %x: %v", noise, got, ip, b.e.Stats().nonzero())
				}
			}
			a.wantCount(map[Counter]uint64{OutProtected: 2, OutCompressed: 1})
			b.wantCount(map[Counter]uint64{InProtected: 2, InExpanded: 1})
		})
	}
}

// TestBundleUse: transforms of level use are left out while they have no SA;
// the others are not.
func TestBundleUse(t *testing.T) {
	s := stack{in: a4, out: b4, layers: []tlayer{tComp, tESP}}
	use := func(p ipsec.Policy) ipsec.Policy {
		p.Requests[0].Level = ipsec.LevelUse
		return p
	}
	a, b := newNode(t, a4), newNode(t, b4)
	a.policy(use(s.policy(ipsec.Out)))
	b.policy(use(s.policy(ipsec.In)))
	ip := text(a4, b4, 500, false)
	if sent := a.send(ip); len(sent) != 0 {
		t.Fatal("sent without ESP")
	}
	a.sa(s.params()[1])
	b.sa(s.params()[1])
	sent := a.send(ip)
	if len(sent) != 1 || len(sent[0]) < len(ip) {
		t.Fatalf("without an IPComp SA: %d packets", len(sent))
	}
	if got := b.receive(sent...); len(got) != 1 || !bytes.Equal(got[0], ip) {
		t.Errorf("%d arrived: %v", len(got), b.e.Stats().nonzero())
	}
	if len(a.needs) != 3 || a.needs[2].Proto != ipsec.IPComp {
		t.Errorf("asked for %v", a.needs)
	}
}

// TestBundleTooBig: the size that a sender is told fits exactly; packets of
// those who need not be told are cut, and put together again.
func TestBundleTooBig(t *testing.T) {
	for _, s := range stacks() {
		t.Run(s.name, func(t *testing.T) {
			a, b := s.nodes(t)
			s.sas(a, b)
			empty := len(text(s.in, s.out, 0, true))
			if s.layers[0].proto == ipsec.IPComp && len(s.layers) == 1 {
				return // adds nothing
			}
			ip := text(s.in, s.out, 1490-empty, true)
			if sent := a.send(ip); len(sent) != 0 || len(a.tap) != 1 {
				t.Fatalf("%d left, %d answers", len(sent), len(a.tap))
			}
			m := a.tap[0][etherLen:]
			var i packet.Info
			if !packet.Decode(m, &i) || i.Dst != s.in {
				t.Fatalf("answer %x", m)
			}
			mtu := int(binary.BigEndian.Uint16(m[i.HdrLen+6:]))
			if sent := a.send(text(s.in, s.out, mtu-empty, true)); len(sent) != 1 || len(sent[0]) > a.mtu {
				t.Errorf("a packet of the mtu %d that was told does not fit", mtu)
			}
			if sent := a.send(text(s.in, s.out, mtu+1-empty, true)); len(sent) != 0 {
				t.Errorf("mtu %d was told, but %d fits", mtu, mtu+1)
			}
			if s.in.Is6() || s.udp() {
				return
			}
			packet.ClearDF(ip)
			ip[4], ip[5] = 0, 0 // which is another thing to go wrong with AH
			packet.FixIPv4Checksum(ip)
			sent := a.send(ip)
			if len(sent) != 2 {
				t.Fatalf("%d packets left, want 2 fragments", len(sent))
			}
			got := b.receive(sent[1], sent[0])
			if len(got) == 1 && s.layers[0].mode() == ipsec.Transport { // DF and identification are the result's
				copy(got[0][4:8], ip[4:8])
				packet.FixIPv4Checksum(got[0])
			}
			if len(got) != 1 || !bytes.Equal(got[0], ip) {
				t.Fatalf("%d arrived: %v", len(got), b.e.Stats().nonzero())
			}
		})
	}
}

// TestBundleOptions: IPv4 options and IPv6 extension headers go through AH,
// and routers may do to them what routers do.
func TestBundleOptions(t *testing.T) {
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	udp := udpPacket(a4, b4, 1, 2, 100)[20:]
	t.Run("IPv4", func(t *testing.T) {
		ip := append(unhex("4900000000004000401100000000000000000000"+"0707040000000000"+"94040000"+"01010100"), udp...)
		copy(ip[12:], a4.AsSlice())
		copy(ip[16:], b4.AsSlice())
		packet.SetLen(ip, len(ip))
		packet.FixIPv4Checksum(ip)
		for _, s := range []stack{{in: a4, out: b4, layers: []tlayer{tAH}}, {in: a4, out: b4, layers: []tlayer{tESP, tAH}}} {
			a, b := s.nodes(t)
			s.sas(a, b)
			x := a.send(ip)[0]
			if x[4] == 0 && x[5] == 0 {
				t.Error("identification 0, which kernels replace")
			}
			// A router: TTL, and its address in the recorded route.
			x[8]--
			x[22] = 8
			copy(x[23:], unhex("0a000001"))
			packet.FixIPv4Checksum(x)
			got := b.receive(x)
			if len(got) != 1 || !bytes.Equal(got[0][36:], udp) || !bytes.Equal(got[0][20:28], x[20:28]) {
				t.Fatalf("got %x: %v", got, b.e.Stats().nonzero())
			}
			x = a.send(ip)[0]
			x[29] ^= 1 // router alert is immutable
			if got := b.receive(x); len(got) != 0 {
				t.Error("changed option passed")
			}
		}
	})
	t.Run("IPv6", func(t *testing.T) {
		ip := append(unhex("60000000"+"0000"+"0040"), append(a6.AsSlice(), b6.AsSlice()...)...)
		ip = append(ip, unhex("3c00"+"050200000000")...)                       // hop-by-hop: router alert, Pad1s
		ip = append(ip, unhex("1101"+"3e040a0b0c0d"+"010600000000"+"0000")...) // destination options
		ip = append(ip, udp...)
		packet.SetLen(ip, len(ip))
		packet.PutUDPChecksum(ip)
		for _, s := range []stack{{in: a6, out: b6, layers: []tlayer{tAH}}, {in: a6, out: b6, layers: []tlayer{tESP, tAH}}} {
			a, b := s.nodes(t)
			s.sas(a, b)
			x := a.send(ip)[0]
			if x[40] != protoAH {
				t.Fatalf("behind the hop-by-hop options: %d, want AH", x[40])
			}
			x[7]--
			x[1] ^= 0x35
			if got := b.receive(x); len(got) != 1 || !bytes.Equal(got[0][40:], ip[40:]) {
				t.Fatalf("got %x: %v", got, b.e.Stats().nonzero())
			}
		}
	})
}

// TestIPCompHostile: bombs, garbage, CPIs and senders that nobody knows.
func TestIPCompHostile(t *testing.T) {
	s := stack{in: a4, out: b4, layers: []tlayer{tComp}}
	_, b := s.nodes(t)
	b.sa(s.params()[0])
	b.sa(&ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.IPComp, Dst: b4, SPI: ipcomp.CPIDeflate}, Src: a4, Mode: ipsec.Transport, ReqID: 7})
	pkt := func(cpi uint16, payload []byte) []byte {
		ip := make([]byte, 24, 24+len(payload))
		ip = append(ip, payload...)
		packet.PutHeader(ip, a4, b4, protoIPComp, len(ip), 64)
		packet.FixIPv4Checksum(ip)
		ipcomp.Put(ip[20:], protoUDP, cpi)
		return ip
	}
	deflate := func(b []byte) []byte {
		var w bytes.Buffer
		f, _ := flate.NewWriter(&w, 9)
		f.Write(b)
		f.Close()
		return w.Bytes()
	}
	udp := udpPacket(a4, b4, 1, 2, 65535-28)[20:]
	for _, tt := range []struct {
		name string
		ip   []byte
		want Counter
	}{
		{"well-known CPI", pkt(2, deflate(udp[:100])), InProtected},
		{"negotiated CPI", pkt(0x1000, deflate(udp[:100])), InProtected},
		{"largest packet", pkt(2, deflate(udp)), InProtected},
		{"one octet more", pkt(2, deflate(append(bytes.Clone(udp), 0))), DropInIPComp},
		{"bomb", pkt(2, deflate(make([]byte, 60<<20))[:60000]), DropInIPComp},
		{"garbage", pkt(2, []byte("not deflate at all")), DropInIPComp},
		{"nothing", pkt(2, nil), DropInIPComp},
		{"unknown CPI", pkt(3, deflate(udp[:100])), DropInNoSA},
		{"cut", pkt(2, deflate(udp[:100]))[:22], DropInMalformed},
		{"IPComp in IPComp in IPComp", func() []byte {
			x, next := deflate(udp[:200]), uint8(protoUDP)
			for range 9 {
				h := make([]byte, 4)
				ipcomp.Put(h, next, 2)
				x, next = deflate(append(h, x...)), protoIPComp
			}
			y := pkt(2, x)
			y[20] = protoIPComp
			return y
		}(), DropInProtocol},
	} {
		before := b.e.Stats()
		if tt.name == "cut" {
			packet.SetLen(tt.ip, 22)
			packet.FixIPv4Checksum(tt.ip)
		}
		b.receive(tt.ip)
		after := b.e.Stats()
		if after[tt.want] != before[tt.want]+1 {
			t.Errorf("%s: %v, want one more %v than %v", tt.name, after.nonzero(), tt.want, before.nonzero())
		}
	}
}

// TestCompressedHostile: what a peer sends inside an SA with a CPI is no more
// trusted, expands to no more than a packet, and to no more memory than the TAP
// was given nothing of.
func TestCompressedHostile(t *testing.T) {
	deflate := func(b []byte) []byte {
		var w bytes.Buffer
		f, _ := flate.NewWriter(&w, 9)
		f.Write(b)
		f.Close()
		return w.Bytes()
	}
	for _, l := range []tlayer{tESP, tAH} {
		s := stack{in: a4, out: b4, layers: []tlayer{l}}
		a, b := s.nodes(t)
		p := s.params()[0]
		a.sa(p) // the sender compresses nothing
		p = s.params()[0]
		p.CPI, p.ReplayWindow = 300, 0
		b.sa(p)
		sealed := func(payload ...byte) []byte {
			ip := append(make([]byte, 20, 20+len(payload)), payload...)
			packet.PutHeader(ip, a4, b4, protoIPComp, len(ip), 64)
			packet.FixIPv4Checksum(ip)
			a.mtu = 65535
			out := a.send(ip)
			if len(out) != 1 {
				t.Fatalf("%d packets left: %v", len(out), a.e.Stats().nonzero())
			}
			return out[0]
		}
		comp := func(cpi uint16, next uint8, payload []byte) []byte {
			h := make([]byte, 4)
			ipcomp.Put(h, next, cpi)
			return sealed(append(h, payload...)...)
		}
		udp := udpPacket(a4, b4, 1, 2, 65535-28)[20:]
		largest := comp(300, protoUDP, deflate(udp))
		for _, tt := range []struct {
			name string
			ip   []byte
			want Counter
		}{
			{"good", comp(300, protoUDP, deflate(udp[:100])), InProtected},
			{"largest packet", largest, InProtected},
			{"one octet more", comp(300, protoUDP, deflate(append(bytes.Clone(udp), 0))), DropInIPComp},
			{"bomb", comp(300, protoUDP, deflate(make([]byte, 60<<20))[:60000]), DropInIPComp},
			{"garbage", comp(300, protoUDP, []byte("not deflate at all")), DropInIPComp},
			{"nothing", comp(300, protoUDP, nil), DropInIPComp},
			{"other CPI", comp(301, protoUDP, deflate(udp[:100])), DropInIPComp},
			{"well-known CPI", comp(2, protoUDP, deflate(udp[:100])), DropInIPComp},
			{"cut", sealed(protoUDP, 0, 1), DropInIPComp},
			{"IPComp in it", comp(300, protoIPComp, deflate(append([]byte{protoUDP, 0, 1, 44}, deflate(udp[:100])...))), DropInNoSA},
		} {
			before := b.e.Stats()[tt.want]
			b.receive(tt.ip)
			if got := b.e.Stats(); got[tt.want] != before+1 {
				t.Errorf("%v, %s: %v, want one more than %d of %v", l.proto, tt.name, got.nonzero(), before, tt.want)
			}
		}

		// Many of them in one batch.
		b.tap, b.quiet = nil, true
		w, now := b.e.in[0], time.Now()
		for range 200 {
			w.ip(append(make([]byte, headroom), largest...), headroom, len(largest), tap.Offload{}, now)
			if got := w.big.Taken(); got > bigEnough+1<<17 {
				t.Fatalf("%v: %d octets of a batch", l.proto, got)
			}
		}
		if err := w.flush(now); err != nil {
			t.Fatal(err)
		}
		if got := b.e.Stats()[InProtected]; got != 202 {
			t.Errorf("%v: %d packets arrived, want 202", l.proto, got)
		}
	}
}

// TestBundleNoAlloc: AH, and ESP in AH, cost no allocation either.
func TestBundleNoAlloc(t *testing.T) {
	for _, s := range stacks() {
		out, in := s.hotPath(t)
		if n := testing.AllocsPerRun(100, out); n != 0 {
			t.Errorf("%s outbound: %v allocations a packet", s.name, n)
		}
		if slices.ContainsFunc(s.layers, func(l tlayer) bool { return l.proto == ipsec.IPComp }) {
			continue // compress/flate makes tables for some packets
		}
		if n := testing.AllocsPerRun(100, in); n != 0 {
			t.Errorf("%s inbound: %v allocations a packet", s.name, n)
		}
	}
}

// hotPath is that of pair, for bundles.
func (s *stack) hotPath(t testing.TB) (out, in func()) {
	a, b := s.nodes(t)
	c, _ := s.nodes(t)
	for k := range s.layers {
		a.sa(s.params()[k])
		c.sa(s.params()[k])
		p := s.params()[k]
		p.ReplayWindow = 0
		b.sa(p)
	}
	ip := text(s.in, s.out, 1200, true)
	sealed := c.send(ip)[0]
	a.quiet, b.quiet = true, true
	now := time.Now()
	out = a.sender(ip)
	buf := make([]byte, bufSize)
	in = func() {
		copy(buf[headroom+etherLen:], sealed)
		b.e.in[0].ip(buf, headroom+etherLen, len(sealed), tap.Offload{}, now)
		b.e.in[0].flush(now)
	}
	out()
	in()
	if n := a.e.Stats(); n[OutProtected]+n[OutBypassed] != 1 {
		t.Fatalf("%s: not sent: %v", s.name, n.nonzero())
	}
	if n := b.e.Stats(); n[InProtected]+n[InBypassed] != 1 && !s.udp() {
		t.Fatalf("%s: not received: %v", s.name, n.nonzero())
	}
	return out, in
}

func BenchmarkBundle(b *testing.B) {
	for _, s := range stacks() {
		out, in := s.hotPath(b)
		for name, f := range map[string]func(){"out": out, "in": in} {
			b.Run(fmt.Sprintf("%s/%s", s.name, name), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(1200)
				for b.Loop() {
					f()
				}
			})
		}
	}
}
