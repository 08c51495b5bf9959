package datapath

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestDummyAndTFC: next header 59 is dropped without complaint (RFC 4303,
// 2.6), and what lies behind the inner packet is cut off (2.7).
func TestDummyAndTFC(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, b, out, _ := p.nodes(t)
	seal := func(next uint8, payload []byte) []byte {
		h, n := out.T.HeaderLen(), len(payload)
		buf := make([]byte, 20+h+n+out.T.TrailerLen(n))
		copy(buf[20+h:], payload)
		seq, _ := out.NextSeq(1)
		w := a.e.out
		w.seals = append(w.seals[:0], espPacket(buf[20:], buf[20+h:20+h+n:len(buf)], next, seq))
		out.T.Seal(w.scratch, w.seals)
		if w.seals[0].Err != nil {
			t.Fatal(w.seals[0].Err)
		}
		w.seals = w.seals[:0]
		packet.PutHeader(buf, p.src, p.dst, protoESP, len(buf), 64)
		packet.FixIPv4Checksum(buf)
		return buf
	}
	if got := b.receive(seal(protoNone, make([]byte, 40))); len(got) != 0 {
		t.Error("dummy packet delivered")
	}
	ip := udpPacket(p.in, p.out, 1, 2, 30)
	if got := b.receive(seal(protoIPv4, append(bytes.Clone(ip), make([]byte, 77)...))); len(got) != 1 || !bytes.Equal(got[0], ip) {
		t.Errorf("packet with TFC padding: got %x", got)
	}
	if got := b.receive(seal(protoUDP, ip)); len(got) != 0 {
		t.Error("tunnel SA delivered next header UDP")
	}
	b.wantCount(map[Counter]uint64{InDummy: 1, InProtected: 1, DropInMalformed: 1})
}

// TestUDP4500: keepalives vanish, IKE goes to the key daemon without its
// marker, anything else is ESP.
// TestPadded: packets of an SA with TFC padding all have one length on the wire, as
// far as they are no longer than that, segments of a super-frame too; the receiver
// delivers what was sent, and the way out allocates nothing.
func TestPadded(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "tunnel 6 in 4", "udp tunnel 4 in 4"} {
		for _, tfc := range []uint16{300, ipsec.TFCPathMTU} {
			p := gcm(pairs()[name])
			for _, socket := range []bool{false, true} {
				if socket && p.encap == nil {
					continue
				}
				a, b := newNode(t, p.src), newNode(t, p.dst)
				a.mtu = 1500
				sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
				a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
				b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
				q := p.params()
				b.sa(q)
				padded := *q
				padded.TFC = tfc
				a.sa(&padded)
				if socket {
					a.e.c.UDP = memUDP{n: a}
				}
				wire := func(n int) int {
					t.Helper()
					ip := udpPacket(p.in, p.out, 1, 2, n)
					out := a.send(ip)
					if len(out) != 1 {
						t.Fatalf("%s, %d octets: %d packets left", name, n, len(out))
					}
					if got := b.receiveAny(&p, out...); len(got) != 1 || !bytes.Equal(got[0], ip) {
						t.Fatalf("%s, %d octets: got %x, want %x; %v", name, n, got, ip, b.e.Stats().nonzero())
					}
					return len(out[0])
				}
				lens := []int{wire(0), wire(1), wire(77), wire(250)}
				for _, n := range lens {
					if n != lens[0] {
						t.Errorf("%s, TFC %d: packets of %v octets", name, tfc, lens)
						break
					}
				}
				count := uint64(4)
				long := wire(1200)
				switch {
				case tfc == ipsec.TFCPathMTU:
					count++
					if long != lens[0] || long > a.mtu || long < a.mtu-8 {
						t.Errorf("%s: %d and %d octets, want what fits into %d", name, long, lens[0], a.mtu)
					}
				case long < 1200:
					t.Errorf("%s: %d octets", name, long)
				}
				if got := a.e.Stats()[OutPadded]; got != count {
					t.Errorf("%s, TFC %d: %d counted, want %d", name, tfc, got, count)
				}
				if n := a.sendAllocs(udpPacket(p.in, p.out, 1, 2, 100)); n != 0 {
					t.Errorf("%s: %v allocations a packet", name, n)
				}
			}
		}
	}
}

// TestCompressed: an SA with a CPI carries what compresses behind an IPComp header
// and everything else as one without; the receiver delivers what was sent, and
// drops what has another CPI.
func TestCompressed(t *testing.T) {
	kinds := pairs()
	for name, p := range pairs() {
		if p.encap != nil {
			kinds[name+", socket"] = p
		}
	}
	for name, p := range kinds {
		if p.aggfrag {
			continue
		}
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, b := newNode(t, p.src), newNode(t, p.dst)
			a.mtu = 1500
			sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
			a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
			q := p.params()
			q.CPI = 0x1234
			b.sa(q)
			q = p.params()
			q.CPI = 0x1234
			a.sa(q)
			if strings.HasSuffix(name, "socket") {
				a.e.c.UDP = memUDP{n: a}
			}
			pass := func(ip []byte) int {
				t.Helper()
				out := a.send(ip)
				if len(out) != 1 {
					t.Fatalf("%d octets: %d packets left", len(ip), len(out))
				}
				if got := b.receiveAny(&p, out...); len(got) != 1 || !bytes.Equal(got[0], ip) {
					t.Fatalf("%d octets: got %x, want %x; %v", len(ip), got, ip, b.e.Stats().nonzero())
				}
				return len(out[0])
			}
			text := func(n int) []byte {
				ip := udpPacket(p.in, p.out, 1, 2, n)
				clear(ip[len(ip)-n:])
				packet.FixTransportChecksum(ip, len(ip)-n-8, protoUDP)
				return ip
			}
			noise := udpPacket(p.in, p.out, 1, 2, 1000)
			rand.NewChaCha8([32]byte{1}).Read(noise[len(noise)-1000:])
			packet.FixTransportChecksum(noise, len(noise)-1008, protoUDP)
			if n := pass(text(1000)); n > 300 {
				t.Errorf("1000 zeros became %d octets", n)
			}
			if n := pass(text(4000)); n > 400 { // longer than the path takes
				t.Errorf("4000 zeros became %d octets", n)
			}
			if n := pass(noise); n < len(noise) {
				t.Errorf("noise of %d octets became %d", len(noise), n)
			}
			pass(text(10))
			if got := a.e.Stats()[OutCompressed]; got != 2 {
				t.Errorf("%d counted, want 2", got)
			}
			if s := b.e.Stats(); s[InProtected] != 4 || s[InExpanded] != 2 {
				t.Errorf("receiver: %v", s.nonzero())
			}
			if n := a.sendAllocs(text(1000)); n != 0 {
				t.Errorf("%v allocations a packet", n)
			}
		})
	}
	for _, cpi := range []uint16{0, 0x1235} {
		p := gcm(pairs()["tunnel 4 in 4"])
		a, b := newNode(t, p.src), newNode(t, p.dst)
		sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
		a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		q := p.params()
		q.CPI = cpi
		b.sa(q)
		q = p.params()
		q.CPI = 0x1234
		a.sa(q)
		ip := udpPacket(p.in, p.out, 1, 2, 1000)
		clear(ip[28:])
		if got := b.receive(a.send(ip)...); len(got) != 0 {
			t.Errorf("CPI %d: a packet with another was delivered", cpi)
		}
		want := DropInIPComp
		if cpi == 0 {
			want = DropInMalformed
		}
		b.wantCount(map[Counter]uint64{want: 1})
	}
}
