package datapath

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestTunnelTOS: the whole traffic class goes outside on every packet of a
// super-frame, in and out of the socket (RFC 4301, 5.1.2.1; RFC 6040, 4.1); on
// the way back ECN is combined for each, DSCP stays, and what is dropped is
// counted. Packets of different marks are not joined.
func TestTunnelTOS(t *testing.T) {
	for name, p := range pairs() {
		if p.mode != ipsec.Tunnel {
			continue
		}
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			for inner := range uint8(4) {
				a, b, _, _ := p.nodes(t)
				if p.encap != nil {
					a.e.c.UDP = memUDP{n: a}
				}
				spec := superSpec{size: 1000, n: 4000, flags: 0x10, tos: 0xb8 | inner}
				ip, o := spec.build(p.in, p.out)
				sent := a.sendFrames(frameOf(ip, o))
				if len(sent) != 4 {
					t.Fatalf("%d packets left", len(sent))
				}
				for _, x := range sent {
					var i packet.Info
					if !packet.Decode(x, &i) || i.TOS != spec.tos || i.Version == 4 && !i.DF {
						t.Fatalf("outer header: %+v", i)
					}
				}
				if p.encap != nil {
					continue // receiveUDP has no traffic class; the rest is common
				}
				for k, x := range sent { // each is marked in another way
					packet.SetECN(x, uint8(k))
				}
				want := 4
				if inner == 0 {
					want = 3
				}
				got := b.receive(sent...)
				if len(got) != want {
					t.Fatalf("inner ECN %d: %d arrived: %v", inner, len(got), b.e.Stats().nonzero())
				}
				b.wantCount(map[Counter]uint64{InProtected: uint64(want), DropInECN: uint64(4 - want)})
				for k, x := range got {
					ecn := inner
					switch {
					case k == 3, inner == 2 && k == 1:
						ecn = uint8(k)
					}
					var i packet.Info
					if !packet.Decode(x, &i) || i.TOS != 0xb8|ecn {
						t.Errorf("inner ECN %d, outer %d: TOS %#x", inner, k, i.TOS)
					}
				}
			}
		})
	}
}

// TestOuterIdentification: fragments of one result share an identification, and
// two results do not (RFC 6864, 4.3); DF is where they have no meaning.
func TestOuterIdentification(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, _, _, _ := p.nodes(t)
	seen := map[uint32]bool{}
	for range 3 {
		ip := udpPacket(p.in, p.out, 1, 2, 1460)
		packet.ClearDF(ip)
		packet.FixIPv4Checksum(ip)
		sent := a.send(ip)
		if len(sent) != 2 {
			t.Fatalf("%d packets left", len(sent))
		}
		var x, y packet.Info
		packet.Decode(sent[0], &x)
		packet.Decode(sent[1], &y)
		if x.ID != y.ID || x.DF || y.DF || seen[x.ID] {
			t.Errorf("identifications %d and %d, DF %v and %v, seen %v", x.ID, y.ID, x.DF, y.DF, seen)
		}
		seen[x.ID] = true
	}
	var i packet.Info
	if sent := a.send(udpPacket(p.in, p.out, 1, 2, 10)); !packet.Decode(sent[0], &i) || !i.DF {
		t.Error("no DF on what fits")
	}
}

// TestExtensionHeaders: chains of extension headers go
// through every mode; a jumbogram does not.
func TestExtensionHeaders(t *testing.T) {
	chains := map[string][]byte{ // in order; UDP follows
		"hop-by-hop":         {0},
		"routing":            {43},
		"destination":        {60},
		"hop, routing, dest": {0, 43, 60},
		"dest, routing":      {60, 43},
		"long":               {0, 60, 60, 60},
	}
	for name, p := range pairs() {
		if !p.in.Is6() || p.encap != nil && p.mode == ipsec.Transport {
			continue // whose header is a new one (RFC 3948, 3.1.2)
		}
		for chain, kinds := range chains {
			t.Run(fmt.Sprintf("%s %s", name, chain), func(t *testing.T) {
				p := gcm(p)
				a, b, _, _ := p.nodes(t)
				plain := udpPacket(p.in, p.out, 1, 2, 700)
				var ext []byte
				first := uint8(protoUDP)
				for k := len(kinds) - 1; k >= 0; k-- {
					h := []byte{first, 0, 1, 4, 0, 0, 0, 0}
					if kinds[k] == 43 {
						h[2], h[3] = 4, 0 // a segment routing header, nothing left
					}
					ext, first = append(h, ext...), kinds[k]
				}
				ip := append(append(bytes.Clone(plain[:40]), ext...), plain[40:]...)
				ip[6] = first
				packet.SetLen(ip, len(ip))
				got := b.receiveAny(&p, a.sendFrames(frameOf(ip, tap.Offload{}))...)
				if len(got) != 1 || !bytes.Equal(got[0], ip) {
					t.Fatalf("got %x\nwant %x; %v", got, ip, b.e.Stats().nonzero())
				}
			})
		}
	}
	p := gcm(pairs()["tunnel 6 in 6"])
	a, _, _, _ := p.nodes(t)
	ip := udpPacket(p.in, p.out, 1, 2, 100)
	jumbo := append(bytes.Clone(ip[:40]), protoUDP, 0, 0xc2, 4, 0, 1, 0, 0)
	jumbo = append(jumbo, ip[40:]...)
	jumbo[4], jumbo[5], jumbo[6] = 0, 0, 0 // length 0, hop-by-hop
	if sent := a.send(jumbo); len(sent) != 0 {
		t.Error("a jumbogram left")
	}
	a.wantCount(map[Counter]uint64{DropOutMalformed: 1})
}
