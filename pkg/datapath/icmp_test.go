package datapath

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// icmpError makes what the router from says about the packet ip: time exceeded,
// which forwarding hosts send most.
func icmpError(from netip.Addr, ip []byte) []byte {
	var i packet.Info
	packet.Decode(ip, &i)
	hdr, kind, proto := packet.IPv4Len, byte(11), uint8(1)
	if i.Version == 6 {
		hdr, kind, proto = packet.IPv6Len, 3, protoICMPv6
	}
	quote := ip[:min(len(ip), i.HdrLen+8)]
	b := make([]byte, hdr+8+len(quote))
	packet.PutHeader(b, from, i.Src, proto, len(b), 64)
	b[hdr] = kind
	copy(b[hdr+8:], quote)
	packet.FixIPv4Checksum(b)
	if i.Version == 6 {
		packet.FixTransportChecksum(b, hdr, proto)
	} else {
		binary.BigEndian.PutUint16(b[hdr+2:], packet.Checksum(b[hdr:]))
	}
	return b
}

// TestTransitErrors: routers behind a gateway have addresses that no selector
// knows. Their ICMP errors pass in the place of the answer to what they quote,
// and nothing else of theirs does (RFC 4301, 6.2).
func TestTransitErrors(t *testing.T) {
	for name, p := range pairs() {
		if p.mode != ipsec.Tunnel {
			continue
		}
		for _, def := range []ipsec.Action{ipsec.Bypass, ipsec.Discard} {
			t.Run(name+" "+def.String(), func(t *testing.T) {
				p := p
				p.suite = suites[0]
				router := netip.MustParseAddr("203.0.113.9")
				if p.in.Is6() {
					router = netip.MustParseAddr("2001:db8:99::9")
				}
				a, b := newNode(t, p.src), newNode(t, p.dst)
				sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out), Proto: protoUDP, SrcPort: 1000}
				a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
				b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
				q := p.params()
				q.SrcTS = []ipsec.TrafficSelector{{Proto: protoUDP, PortLo: 1000, PortHi: 1000, Start: p.in, End: p.in}}
				q.DstTS = []ipsec.TrafficSelector{{Proto: protoUDP, PortHi: 65535, Start: p.out, End: p.out}}
				a.e.c.Default, b.e.c.Default = def, def

				about := udpPacket(p.out, p.in, 2000, 1000, 40) // came to a's side
				report := icmpError(router, about)
				if got := a.send(bytes.Clone(report)); len(got) != 0 {
					t.Fatalf("without an SA: %d packets left", len(got))
				}
				if len(a.needs) != 0 {
					t.Error("an SA was asked for")
				}
				a.wantCount(map[Counter]uint64{DropOutNoPolicy: 1})
				a.sa(q)
				b.sa(q)
				sent := a.send(bytes.Clone(report))
				if len(sent) != 1 || bytes.Contains(sent[0], report[len(report)-20:]) {
					t.Fatalf("%d packets left, protected or not; %v", len(sent), a.e.Stats().nonzero())
				}
				if got := b.receiveAny(&p, sent...); len(got) != 1 || !bytes.Equal(got[0], report) {
					t.Fatalf("%d arrived: %v", len(got), b.e.Stats().nonzero())
				}
				b.wantCount(map[Counter]uint64{InProtected: 1})
				// A second time, now that flows are remembered.
				if got := b.receiveAny(&p, a.send(bytes.Clone(report))...); len(got) != 1 {
					t.Fatalf("second: %d arrived: %v", len(got), b.e.Stats().nonzero())
				}

				// About something else: goes or not as if this did not exist.
				other := icmpError(router, udpPacket(p.out, p.in, 2000, 1001, 40))
				if got := a.send(bytes.Clone(other)); (len(got) == 1) != (def == ipsec.Bypass) || len(got) == 1 && !bytes.Equal(got[0], other) {
					t.Errorf("about what is not protected: %x", got)
				}
				// A peer that sends such all the same, or other things from there.
				free := newNode(t, p.src)
				free.policy(ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Protect, Sel: ipsec.Selector{Src: netip.PrefixFrom(router, 0), Dst: netip.PrefixFrom(p.out, 0)}, Requests: []ipsec.Request{p.request()}})
				if _, ok := free.sa(p.params()).NextSeq(20); !ok { // those of a
					t.Fatal("no sequence numbers")
				}
				dropped := b.e.Stats()[DropInSelector]
				for what, ip := range map[string][]byte{
					"error about another flow":        other,
					"UDP of the router":               udpPacket(router, p.in, 2000, 1000, 40),
					"error to somebody else's flow":   icmpError(router, udpPacket(p.out, p.out, 2000, 1000, 40)),
					"error about the wrong direction": icmpError(router, udpPacket(p.in, p.out, 1000, 2000, 40)),
				} {
					if got := b.receiveAny(&p, free.send(ip)...); len(got) != 0 {
						t.Errorf("%s was delivered", what)
					}
				}
				if n := b.e.Stats()[DropInSelector] - dropped; n != 4 {
					t.Errorf("%d dropped by selector, want 4: %v", n, b.e.Stats().nonzero())
				}
			})
		}
	}
}
