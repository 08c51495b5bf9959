package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestProtect: every mode, family, encapsulation and suite carries packets of
// awkward lengths unchanged, and shows nothing of them on the wire.
func TestProtect(t *testing.T) {
	for name, p := range pairs() {
		for _, s := range suites {
			t.Run(name+" "+s.String(), func(t *testing.T) {
				p := p
				p.suite = s
				a, b, _, _ := p.nodes(t)
				count := uint64(0)
				for _, n := range []int{0, 1, 2, 3, 13, 14, 15, 16, 17, 100, 1300} {
					ip := udpPacket(p.in, p.out, 1000, 2000, n)
					sent := a.send(ip)
					if len(sent) != 1 {
						t.Fatalf("payload %d: %d packets left", n, len(sent))
					}
					if n >= 13 && s.encr != alg.EncrNULL && bytes.Contains(sent[0], ip[len(ip)-n:]) {
						t.Fatalf("payload %d is in clear", n)
					}
					var i packet.Info
					if !packet.Decode(sent[0], &i) || i.Src != p.src || i.Dst != p.dst || i.Len != len(sent[0]) {
						t.Fatalf("payload %d: outer packet %+v", n, i)
					}
					if want := map[bool]uint8{true: protoUDP, false: protoESP}[p.encap != nil]; i.Proto != want {
						t.Fatalf("protocol %d, want %d", i.Proto, want)
					}
					got := b.receiveAny(&p, sent...)
					if len(got) != 1 {
						t.Fatalf("payload %d: %d packets arrived; %v", n, len(got), b.e.Stats().nonzero())
					}
					if p.encap != nil && p.mode == ipsec.Transport {
						got[0] = got[0][len(got[0])-8-n:] // the IP header is a new one
						ip = ip[len(ip)-8-n:]
					}
					if !bytes.Equal(got[0], ip) {
						t.Fatalf("payload %d:\ngot  %x\nwant %x", n, got[0], ip)
					}
					count++
				}
				a.wantCount(map[Counter]uint64{OutProtected: count})
				b.wantCount(map[Counter]uint64{InProtected: count})
			})
		}
	}
}

// TestHostile: what an attacker on the path can do to a packet is dropped under
// the right name, and the packet itself still arrives afterwards.
func TestHostile(t *testing.T) {
	for name, p := range pairs() {
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, b, _, in := p.nodes(t)
			good := a.send(udpPacket(p.in, p.out, 1, 2, 64))[0]
			mod := func(f func([]byte) []byte) []byte { return f(bytes.Clone(good)) }
			want := map[Counter]uint64{}
			espAt := len(good) - espLen(t, &p, good)

			for at := espAt; at < len(good); at++ {
				bad := mod(func(x []byte) []byte { x[at] ^= 1; return x })
				if got := b.receiveAny(&p, bad); len(got) != 0 {
					t.Fatalf("bit flipped at %d: passed", at)
				}
			}
			s := b.e.Stats()
			if n := s[DropInAuth] + s[DropInNoSA] + s[DropInReplay]; n != uint64(len(good)-espAt) {
				t.Errorf("flipped bits: %d drops counted, want %d: %v", n, len(good)-espAt, s.nonzero())
			}
			for _, k := range []Counter{DropInAuth, DropInNoSA, DropInReplay} {
				want[k] = s[k]
			}
			for n := espAt; n < len(good); n++ {
				bad := mod(func(x []byte) []byte {
					x = x[:n]
					packet.SetLen(x, n)
					packet.FixIPv4Checksum(x)
					if p.encap != nil {
						binary.BigEndian.PutUint16(x[espAt-4:], uint16(n-espAt+8))
					}
					return x
				})
				if got := b.receiveAny(&p, bad); len(got) != 0 {
					t.Fatalf("cut to %d: passed", n)
				}
			}
			s = b.e.Stats()
			want[DropInMalformed], want[DropInAuth] = s[DropInMalformed], s[DropInAuth]
			if n := s[DropInMalformed] + s[DropInAuth]; n < uint64(len(good)-espAt) {
				t.Errorf("cut: only %d drops counted: %v", n, s.nonzero())
			}
			if got := b.receiveAny(&p, good, good); len(got) != 1 {
				t.Fatalf("the packet twice in one batch: %d arrived; %v", len(got), b.e.Stats().nonzero())
			}
			if got := b.receiveAny(&p, good); len(got) != 0 {
				t.Fatal("replayed packet passed")
			}
			want[DropInReplay] += 2
			want[InProtected] = 1
			b.wantCount(want)
			if in.AuthErrors.Load() == 0 || in.ReplayErrors.Load() < 2 {
				t.Errorf("SA counts %d auth and %d replay errors", in.AuthErrors.Load(), in.ReplayErrors.Load())
			}
		})
	}
}

func espLen(t *testing.T, p *pair, b []byte) int {
	var i packet.Info
	if !packet.Decode(b, &i) {
		t.Fatal("not IP")
	}
	if p.encap != nil {
		return i.Len - i.HdrLen - 8
	}
	return i.Len - i.HdrLen
}

// TestInboundJudgement: RFC 4301, 5.2: what comes out of an SA must be what SA
// and policy expect, and clear packets must not be what they protect.
func TestInboundJudgement(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	protected := func(a *node) []byte { return a.send(udpPacket(p.in, p.out, 1, 2, 64))[0] }
	for _, tt := range []struct {
		name string
		mod  func(a, b *node) []byte
		want Counter
		pass bool
	}{
		{"as it should be", func(a, b *node) []byte { return protected(a) }, InProtected, true},
		{"clear", func(a, b *node) []byte { return udpPacket(p.in, p.out, 1, 2, 64) }, DropInClear, false},
		{"clear of others", func(a, b *node) []byte { return udpPacket(a4, b4, 1, 2, 64) }, InBypassed, true},
		{"clear IKE", func(a, b *node) []byte { return udpPacket(a4, b4, 500, 500, 64) }, InBypassed, true},
		{"clear from the port of IKE to another", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}, Action: ipsec.Discard})
			return udpPacket(a4, b4, 500, 53, 64)
		}, DropInDiscard, false},
		{"discard policy", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}, Action: ipsec.Discard})
			return udpPacket(a4, b4, 1, 2, 64)
		}, DropInDiscard, false},
		{"IKE under a discard policy", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}, Action: ipsec.Discard})
			return udpPacket(a4, b4, 500, 500, 64)
		}, InBypassed, true},
		{"bypass before protect", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP, DstPort: 53}, Action: ipsec.Bypass, Priority: 0})
			return udpPacket(p.in, p.out, 1, 53, 64)
		}, InBypassed, true},
		{"protected, where policy says bypass", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP}, Action: ipsec.Bypass, Priority: 0})
			return protected(a)
		}, DropInPolicy, false},
		{"another policy's SA", func(a, b *node) []byte {
			r := p.request()
			r.ReqID = 8
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP}, Action: ipsec.Protect, Priority: 0, Requests: []ipsec.Request{r}})
			return protected(a)
		}, DropInPolicy, false},
		{"transport wanted", func(a, b *node) []byte {
			r := p.request()
			r.Mode, r.Src, r.Dst = ipsec.Transport, netip.Addr{}, netip.Addr{}
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP}, Action: ipsec.Protect, Priority: 0, Requests: []ipsec.Request{r}})
			return protected(a)
		}, DropInPolicy, false},
		{"forward policy for others", func(a, b *node) []byte {
			b.policy(ipsec.Policy{Dir: ipsec.Fwd, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Discard})
			return protected(a)
		}, DropInPolicy, false},
		{"AH", func(a, b *node) []byte {
			x := protected(a)
			x[9] = protoAH
			packet.FixIPv4Checksum(x)
			return x
		}, DropInNoSA, false},
		{"not IP", func(a, b *node) []byte {
			return []byte{0x45, 0, 0, 99, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
		}, DropInMalformed, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := newNode(t, p.src), newNode(t, p.dst)
			sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
			for n, d := range map[*node]ipsec.Direction{a: ipsec.Out, b: ipsec.In} {
				n.policy(ipsec.Policy{Dir: d, Sel: sel, Action: ipsec.Protect, Priority: 10, Requests: []ipsec.Request{p.request()}})
				n.sa(p.params())
			}
			got := b.receive(tt.mod(a, b))
			if (len(got) == 1) != tt.pass {
				t.Errorf("%d packets passed, want pass %v", len(got), tt.pass)
			}
			b.wantCount(map[Counter]uint64{tt.want: 1})
		})
	}
}

// TestOverlappingPolicies: of two policies with overlapping selectors, the SA of
// the later one carries what lies in its own selectors, even where the earlier one
// comes first, if that asks for no more than the SA does.
func TestOverlappingPolicies(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	aes := []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA256}}
	same := func(*ipsec.Policy) {}
	within := func(q *ipsec.SAParams) {
		q.SrcTS = []ipsec.TrafficSelector{{Start: p.in, End: p.in, PortHi: 65535}}
		q.DstTS = []ipsec.TrafficSelector{{Start: p.out, End: p.out, PortHi: 65535}}
	}
	for _, tt := range []struct {
		name  string
		first func(*ipsec.Policy)
		sa    func(*ipsec.SAParams)
		want  Counter
	}{
		{"any algorithms", same, within, InProtected},
		{"the same algorithms", func(f *ipsec.Policy) { f.Proposals = append(aes, ipsec.Proposal{Encr: p.params().Encr}) }, within, InProtected},
		{"SA without selectors", same, func(*ipsec.SAParams) {}, DropInPolicy},
		{"SA for other packets", same, func(q *ipsec.SAParams) { within(q); q.SrcTS[0].Proto = 6 }, DropInSelector},
		{"other algorithms", func(f *ipsec.Policy) { f.Proposals = aes }, within, DropInPolicy},
		{"other end points", func(f *ipsec.Policy) { f.Requests[0].Src = p.in }, within, DropInPolicy},
		{"any peer", func(f *ipsec.Policy) { f.Requests[0].Src = netip.IPv4Unspecified() }, within, DropInPolicy},
		{"an SA for each flow", func(f *ipsec.Policy) { f.Flags = ipsec.PolicyPerFlow }, within, DropInPolicy},
		{"NULL", same, func(q *ipsec.SAParams) {
			within(q)
			q.Encr, q.EncrKey, q.Auth, q.AuthKey = alg.EncrNULL, ipsec.Key{}, alg.IntegHMACSHA256, ipsec.NewKey(make([]byte, 32))
		}, DropInPolicy},
		{"SHA-1", same, func(q *ipsec.SAParams) {
			within(q)
			q.Encr, q.EncrKey, q.Auth, q.AuthKey = alg.EncrAESCBC, ipsec.NewKey(make([]byte, 16)), alg.IntegHMACSHA1, ipsec.NewKey(make([]byte, 20))
		}, DropInPolicy},
		{"SHA-1 that is named", func(f *ipsec.Policy) {
			f.Proposals = []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1}}
		}, func(q *ipsec.SAParams) {
			within(q)
			q.Encr, q.EncrKey, q.Auth, q.AuthKey = alg.EncrAESCBC, ipsec.NewKey(make([]byte, 16)), alg.IntegHMACSHA1, ipsec.NewKey(make([]byte, 20))
		}, InProtected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := newNode(t, p.src), newNode(t, p.dst)
			wide := ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: netip.MustParsePrefix("0.0.0.0/0")}
			first := ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Priority: 1, Requests: []ipsec.Request{p.request()}}
			first.Requests[0].ReqID = 8
			tt.first(&first)
			b.policy(first)
			q := p.params()
			tt.sa(q)
			for n, d := range map[*node]ipsec.Direction{a: ipsec.Out, b: ipsec.In} {
				n.policy(ipsec.Policy{Dir: d, Sel: wide, Action: ipsec.Protect, Priority: 10, Requests: []ipsec.Request{p.request()}})
			}
			b.sa(q)
			s := *q
			s.SrcTS, s.DstTS = nil, nil
			a.sa(&s)
			got := b.receive(a.send(udpPacket(p.in, p.out, 1, 2, 64))...)
			if (len(got) == 1) != (tt.want == InProtected) {
				t.Errorf("%d packets passed", len(got))
			}
			b.wantCount(map[Counter]uint64{tt.want: 1})
		})
	}
}

// TestSelectorOfSA: traffic selectors of the SA restrict beyond the policy.
func TestSelectorOfSA(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, b := newNode(t, p.src), newNode(t, p.dst)
	sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	a.sa(p.params())
	q := p.params()
	q.SrcTS = []ipsec.TrafficSelector{{Start: p.in, End: p.in, Proto: protoUDP, PortHi: 1023}}
	q.DstTS = []ipsec.TrafficSelector{{Start: p.out, End: p.out, PortHi: 65535}}
	b.sa(q)
	if got := b.receive(a.send(udpPacket(p.in, p.out, 1000, 2, 9))...); len(got) != 1 {
		t.Errorf("within the selectors: %d arrived", len(got))
	}
	if got := b.receive(a.send(udpPacket(p.in, p.out, 1024, 2, 9))...); len(got) != 0 {
		t.Error("outside the selectors: arrived")
	}
	b.wantCount(map[Counter]uint64{InProtected: 1, DropInSelector: 1})
}

// TestTransportSource: the outer source of a transport-mode packet is not
// covered by the ICV; only the SA's peer may stand there.
func TestTransportSource(t *testing.T) {
	for _, name := range []string{"transport 4", "udp transport 4"} {
		p := gcm(pairs()[name])
		a, b, _, _ := p.nodes(t)
		b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		x := a.send(udpPacket(p.in, p.out, 1, 2, 64))[0]
		copy(x[12:16], netip.MustParseAddr("192.0.2.77").AsSlice())
		packet.FixIPv4Checksum(x)
		if got := b.receiveAny(&p, x); len(got) != 0 {
			t.Errorf("%s: %d packets of a stranger's address arrived", name, len(got))
		}
		b.wantCount(map[Counter]uint64{DropInSelector: 1})
	}
}

// TestEncapMismatch: an SA is either in UDP or not (RFC 3948).
func TestEncapMismatch(t *testing.T) {
	p, q := gcm(pairs()["tunnel 4 in 4"]), gcm(pairs()["udp tunnel 4 in 4"])
	a, _, _, _ := p.nodes(t)
	_, b, _, _ := q.nodes(t)
	if got := b.receive(a.send(udpPacket(p.in, p.out, 1, 2, 64))...); len(got) != 0 {
		t.Error("native ESP passed an SA of ESP in UDP")
	}
	b.wantCount(map[Counter]uint64{DropInEncap: 1})
}

// TestOutboundVerdicts.
func TestOutboundVerdicts(t *testing.T) {
	sel := ipsec.Selector{Src: prefix(a4), Dst: prefix(b4)}
	for _, tt := range []struct {
		name   string
		policy *ipsec.Policy
		def    ipsec.Action
		packet []byte
		want   Counter
		sent   int
	}{
		{"no policy", nil, ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), OutBypassed, 1},
		{"no policy, default drop", nil, ipsec.Discard, udpPacket(a4, b4, 1, 2, 3), DropOutNoPolicy, 0},
		{"IKE under default drop", nil, ipsec.Discard, udpPacket(a4, b4, 500, 500, 30), OutBypassed, 1},
		{"to the port of IKE from another", nil, ipsec.Discard, udpPacket(a4, b4, 5000, 500, 30), DropOutNoPolicy, 0},
		{"others' IKE under default drop", nil, ipsec.Discard, udpPacket(ia4, b4, 500, 500, 30), DropOutNoPolicy, 0},
		{"bypass", &ipsec.Policy{Action: ipsec.Bypass}, ipsec.Discard, udpPacket(a4, b4, 1, 2, 3), OutBypassed, 1},
		{"discard", &ipsec.Policy{Action: ipsec.Discard}, ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), DropOutDiscard, 0},
		{"malformed", nil, ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3)[:25], DropOutMalformed, 0},
		{"protect without SA", &ipsec.Policy{Action: ipsec.Protect, Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelRequire}}},
			ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), OutHeld, 0},
		{"level use without SA", &ipsec.Policy{Action: ipsec.Protect, Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelUse}}},
			ipsec.Bypass, udpPacket(a4, b4, 1, 2, 3), OutBypassed, 1},
		{"IKE under protect", &ipsec.Policy{Action: ipsec.Protect, Requests: []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelRequire}}},
			ipsec.Bypass, udpPacket(a4, b4, 4500, 4500, 30), OutBypassed, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, a4)
			n.e.c.Default = tt.def
			if tt.policy != nil {
				p := *tt.policy
				p.Dir, p.Sel = ipsec.Out, sel
				n.policy(p)
			}
			if got := n.send(tt.packet); len(got) != tt.sent {
				t.Errorf("%d packets left, want %d", len(got), tt.sent)
			}
			n.wantCount(map[Counter]uint64{tt.want: 1})
			if wantAsk := tt.policy != nil && tt.policy.Action == ipsec.Protect && tt.packet[20] != 0x11; (len(n.needs) == 1) != wantAsk {
				t.Errorf("asked for %d SAs, want one: %v", len(n.needs), wantAsk)
			}
		})
	}
}

// TestTooBig: a sender that can make packets smaller is told to; the size it is
// told fits exactly. Others have the result cut, and it is put together again.
func TestTooBig(t *testing.T) {
	for name, p := range pairs() {
		for _, df := range []bool{true, false} {
			if p.in.Is6() && !df {
				continue
			}
			t.Run(fmt.Sprintf("%s df %v", name, df), func(t *testing.T) {
				p := gcm(p)
				a, b, _, _ := p.nodes(t)
				a.mtu = 1500
				ip := udpPacket(p.in, p.out, 1, 2, 1490-len(udpPacket(p.in, p.out, 1, 2, 0)))
				if p.in.Is4() && !df {
					packet.ClearDF(ip)
					packet.FixIPv4Checksum(ip)
				}
				sent := a.send(ip)
				if !df {
					if len(sent) != 2 {
						t.Fatalf("%d packets left, want 2 fragments", len(sent))
					}
					if p.encap != nil {
						return // the kernel's UDP socket puts these together
					}
					for _, f := range sent {
						if len(f) > a.mtu {
							t.Errorf("fragment of %d octets", len(f))
						}
					}
					got := b.receive(sent[1], sent[0])
					if len(got) == 1 && p.mode == ipsec.Transport { // the result's identification stays
						copy(got[0][4:6], ip[4:6])
						packet.FixIPv4Checksum(got[0])
					}
					if len(got) != 1 || !bytes.Equal(got[0], ip) {
						t.Fatalf("%d packets arrived: %v", len(got), b.e.Stats().nonzero())
					}
					b.wantCount(map[Counter]uint64{InProtected: 1, InFragments: 2})
					return
				}
				if len(sent) != 0 || len(a.tap) != 1 {
					t.Fatalf("%d left, %d answers", len(sent), len(a.tap))
				}
				a.wantCount(map[Counter]uint64{OutTooBig: 1})
				m := a.tap[0][etherLen:]
				var i packet.Info
				if !packet.Decode(m, &i) || i.Dst != p.in {
					t.Fatalf("answer %x", m)
				}
				var mtu int
				if p.in.Is4() {
					mtu = int(binary.BigEndian.Uint16(m[i.HdrLen+6:]))
				} else {
					mtu = int(binary.BigEndian.Uint32(m[i.HdrLen+4:]))
				}
				fit := func(n int) [][]byte {
					return a.send(udpPacket(p.in, p.out, 1, 2, n-len(udpPacket(p.in, p.out, 1, 2, 0))))
				}
				if got := fit(mtu); len(got) != 1 || len(got[0]) > a.mtu {
					t.Errorf("a packet of the mtu %d that was told does not fit", mtu)
				}
				if got := fit(mtu + 1); len(got) != 0 {
					t.Errorf("mtu %d was told, but %d fits", mtu, mtu+1)
				}
			})
		}
	}
}

// TestFragmentsFromKernel: transport mode protects whole datagrams, whatever
// the kernel made of them on the way to the TAP.
func TestFragmentsFromKernel(t *testing.T) {
	p := gcm(pairs()["transport 4"])
	a, b, _, _ := p.nodes(t)
	ip := udpPacket(p.in, p.out, 1, 2, 5000)
	var out [][]byte
	for _, f := range cut(t, ip, 1400) {
		out = append(out, a.send(f)...)
	}
	if len(out) < 4 {
		t.Fatalf("%d packets left", len(out))
	}
	got := b.receive(out...)
	if len(got) != 1 {
		t.Fatalf("%d arrived: %v", len(got), b.e.Stats().nonzero())
	}
	if !bytes.Equal(got[0][20:], ip[20:]) {
		t.Error("payload differs")
	}
}

func TestUDP4500(t *testing.T) {
	b := newNode(t, b4)
	give := func(payload []byte) {
		x := udpPacket(a4, b4, 4500, 4500, len(payload))
		copy(x[28:], payload)
		b.receiveUDP(x)
	}
	give([]byte{0xff})
	give([]byte{0, 0, 0, 0, 1, 2, 3})
	give([]byte{0, 0, 1, 0, 0, 0, 0, 1, 9})
	give([]byte{1})
	if len(b.udp) != 1 || b.udp[0] != "192.0.2.2:4500 192.0.2.1:4500 010203" {
		t.Errorf("key daemon got %q", b.udp)
	}
	b.wantCount(map[Counter]uint64{InKeepalive: 1, InIKE: 1, DropInNoSA: 1, DropInMalformed: 1})
}

// TestUDP4500Fragments: a datagram that came in fragments reaches the same place.
func TestUDP4500Fragments(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, b, _, _ := p.nodes(t)
	b.e.c.UDP = noUDP{}
	ip := udpPacket(p.in, p.out, 1, 2, 1490-28)
	packet.ClearDF(ip)
	packet.FixIPv4Checksum(ip)
	sent := a.send(ip)
	if len(sent) != 2 {
		t.Fatalf("%d packets left, want 2 fragments", len(sent))
	}
	if got := b.receive(sent...); len(got) != 1 || !bytes.Equal(got[0], ip) {
		t.Errorf("%d packets arrived: %v", len(got), b.e.Stats().nonzero())
	}
	ike := udpPacket(a4, b4, 4500, 4500, 2000)
	clear(ike[28:32])
	packet.ClearDF(ike)
	b.receive(cut(t, ike, 1400)...)
	if want := fmt.Sprintf("192.0.2.2:4500 192.0.2.1:4500 %x", ike[32:]); len(b.udp) != 1 || b.udp[0] != want {
		t.Errorf("key daemon got %d messages", len(b.udp))
	}
	b.wantCount(map[Counter]uint64{InFragments: 4, InProtected: 1, InIKE: 1})
}

// noUDP says that there is port 4500; the tests hand over datagrams themselves.
type noUDP struct{ wire.UDPConn }

// TestECN: congestion on the way shows inside, in and out of UDP (RFC 6040).
func TestECN(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "tunnel 6 in 6"} {
		p := gcm(pairs()[name])
		a, b, _, _ := p.nodes(t)
		ip := udpPacket(p.in, p.out, 1, 2, 30)
		packet.SetECN(ip, 2) // ECT(0)
		packet.FixIPv4Checksum(ip)
		sent := a.send(ip)
		packet.SetECN(sent[0], 3) // CE
		packet.FixIPv4Checksum(sent[0])
		got := b.receive(sent...)
		var i packet.Info
		if len(got) != 1 || !packet.Decode(got[0], &i) || i.TOS&3 != 3 {
			t.Errorf("%s: %d packets, inner ECN %d, want 3", name, len(got), i.TOS&3)
		}
	}
}

// TestLimits: soft once, hard stops the SA.
func TestLimits(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a := newNode(t, p.src)
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	q := p.params()
	q.Soft.Packets, q.Hard.Packets = 2, 4
	a.sa(q)
	sent := 0
	for range 6 {
		sent += len(a.send(udpPacket(p.in, p.out, 1, 2, 3)))
	}
	if sent != 4 || len(a.limit) != 2 || a.limit[0] || !a.limit[1] {
		t.Errorf("sent %d, reports of hard limits %v", sent, a.limit)
	}
	a.wantCount(map[Counter]uint64{OutProtected: 4, DropOutLifetime: 2})
}

// cut makes IPv4 fragments of a packet, as a kernel does for a small MTU.
func cut(t *testing.T, ip []byte, mtu int) (fs [][]byte) {
	var i packet.Info
	if !packet.Decode(ip, &i) {
		t.Fatal("not IP")
	}
	if err := frag.Split(ip, &i, mtu, 77, func(f []byte) error {
		fs = append(fs, bytes.Clone(f))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return fs
}

func espPacket(dst, src []byte, next uint8, seq uint64) esp.Packet {
	return esp.Packet{Dst: dst, Src: src, Next: next, Seq: seq}
}

// TestCountRuns: the packets of a batch share one reservation of sequence
// numbers and one account, and numbers, limits and the end of numbers are as
// exact as for packets one by one.
func TestCountRuns(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 4 in 4"} {
		p := gcm(pairs()[name])
		one := udpPacket(p.in, p.out, 1, 2, 30)
		spec := superSpec{udp: true, size: 100, n: 350}
		many, o := spec.build(p.in, p.out)
		start := func(q *ipsec.SAParams) (*node, *sad.SA) {
			a := newNode(t, p.src)
			a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			sa := a.sa(q)
			if p.encap != nil {
				a.e.c.UDP = memUDP{n: a}
			}
			return a, sa
		}
		frames := func(n int) (fs []*tap.Frame) {
			for range n {
				fs = append(fs, frameOf(one, tap.Offload{}))
			}
			return fs
		}
		numbers := func(sent [][]byte) (seqs []uint32) {
			var i packet.Info
			for _, b := range sent {
				if !packet.Decode(b, &i) {
					t.Fatalf("%s: %x", name, b)
				}
				off := i.HdrLen + 4
				if p.encap != nil {
					off += packet.UDPLen
				}
				seqs = append(seqs, binary.BigEndian.Uint32(b[off:]))
			}
			return seqs
		}
		t.Run(name, func(t *testing.T) {
			a, sa := start(p.params())
			sent := a.sendFrames(slices.Concat(frames(5), []*tap.Frame{frameOf(many, o)}, frames(3))...)
			if got, want := numbers(sent), []uint32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}; !slices.Equal(got, want) {
				t.Errorf("numbers %v, want %v", got, want)
			}
			if want := uint64(8*len(one) + len(many) + 3*28); sa.Packets() != 12 || sa.Bytes() != want || a.e.out.counted != 0 {
				t.Errorf("account of %d packets, %d octets, want 12, %d", sa.Packets(), sa.Bytes(), want)
			}
			var i packet.Info
			packet.Decode(one, &i)
			if e, _ := a.e.c.SPD.Lookup(ipsec.Out, &i); e == nil || e.Packets() != 12 {
				t.Errorf("policy: %+v, want 12 packets", e)
			}

			for _, bytes := range []bool{false, true} {
				q := p.params()
				q.Soft.Packets, q.Hard.Packets = 2, 4
				if bytes {
					q.Soft, q.Hard = ipsec.Lifetime{Bytes: uint64(len(one) + 1)}, ipsec.Lifetime{Bytes: uint64(5*len(one) - 1)}
				}
				a, _ = start(q)
				if sent := a.sendFrames(frames(6)...); !slices.Equal(numbers(sent), []uint32{1, 2, 3, 4}) || len(a.limit) != 2 || a.limit[0] || !a.limit[1] {
					t.Errorf("limits: sent %v, reports of hard ones %v", numbers(sent), a.limit)
				}
				a.wantCount(map[Counter]uint64{OutProtected: 4, DropOutLifetime: 2})
			}

			a, sa = start(p.params())
			sa.NextSeq(1<<32 - 1 - 3) // three are left
			if sent := a.sendFrames(frames(5)...); !slices.Equal(numbers(sent), []uint32{1<<32 - 3, 1<<32 - 2, 1<<32 - 1}) {
				t.Errorf("end of numbers: sent %v", numbers(sent))
			}
			a.wantCount(map[Counter]uint64{OutProtected: 3, DropOutSequence: 2})
		})
	}
}
