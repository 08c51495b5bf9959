package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/ipsec"
)

// synPacket opens a connection, or answers that, and tells a segment size.
func synPacket(src, dst netip.Addr, flags byte, mss int) []byte {
	ip := tcpPacket(src, dst, 4321, 7, 1, flags, 4)
	var i packet.Info
	packet.Decode(ip, &i)
	h := ip[i.HdrLen:]
	h[12] = 6 << 4 // the payload becomes the option
	h[20], h[21] = 2, 4
	binary.BigEndian.PutUint16(h[22:], uint16(mss))
	packet.FixTransportChecksum(ip, i.HdrLen, protoTCP)
	return ip
}

// mssOf is what a SYN tells, and whether the packet's checksum is right.
func mssOf(ip []byte) (mss int, sound bool) {
	var i packet.Info
	if !packet.Decode(ip, &i) {
		return 0, false
	}
	h := ip[i.HdrLen:i.Len]
	return int(binary.BigEndian.Uint16(h[22:])), packet.Fold(packet.Sum(h, packet.PseudoSum(ip, protoTCP, len(h)))) == 0xffff
}

// bigTAP has no say in sizes.
type bigTAP struct{ memTAP }

func (bigTAP) MTU() int { return 65535 }

// TestClampSYN: a SYN that leaves by a tunnel, or comes by one, tells no more
// than fits: a segment of the size told, without options, is the largest that is
// not refused. In transport mode, and if it is switched off, it stays.
func TestClampSYN(t *testing.T) {
	for name, p := range pairs() {
		for _, flags := range []byte{0x02, 0x12} {
			t.Run(fmt.Sprintf("%s flags %#x", name, flags), func(t *testing.T) {
				p := gcm(p)
				a, b, _, _ := p.nodes(t)
				for _, n := range []*node{a, b} {
					n.e.c.TAP = bigTAP{memTAP{n}}
				}
				fixed := len(tcpPacket(p.in, p.out, 1, 2, 3, 0x10, 0))
				syn := synPacket(p.in, p.out, flags, 8960)
				// Outbound: b has a wide link and so does not change it again.
				a.mtu, b.mtu = 1500, 9500
				arrive := func(ip []byte) []byte {
					t.Helper()
					got := b.receiveAny(&p, a.send(ip)...)
					if len(got) != 1 {
						t.Fatalf("%d arrived: %v", len(got), b.e.Stats().nonzero())
					}
					return got[0]
				}
				got, sound := mssOf(arrive(bytes.Clone(syn)))
				if !sound {
					t.Error("checksum wrong")
				}
				if p.mode != ipsec.Tunnel {
					if got != 8960 {
						t.Errorf("transport mode: %d told", got)
					}
					return
				}
				fits := func(mss int) bool { return len(a.send(tcpPacket(p.in, p.out, 4321, 8, 2, 0x10, mss))) == 1 }
				if !fits(got) || fits(got+1) {
					t.Errorf("told %d: fits %v, one more %v; headers %d", got, fits(got), fits(got+1), fixed)
				}
				// Inbound, likewise with the links exchanged.
				a.mtu, b.mtu = 9500, 1500
				if in, sound := mssOf(arrive(bytes.Clone(syn))); in != got || !sound {
					t.Errorf("inbound: told %d, want %d; checksum right: %v", in, got, sound)
				}
				// The TAP's MTU is what the host takes.
				b.e.c.TAP = memTAP{b}
				if in, _ := mssOf(arrive(bytes.Clone(syn))); in != min(got, b.MTU()-fixed) {
					t.Errorf("inbound: told %d over a TAP of %d", in, b.MTU())
				}
				a.e.c.KeepMSS, b.e.c.KeepMSS = true, true
				if got := arrive(bytes.Clone(syn)); !bytes.Equal(got, syn) {
					t.Errorf("switched off: got %x, want %x", got, syn)
				}
			})
		}
	}
}

// TestClampSYNBundle: all transforms of a bundle count.
func TestClampSYNBundle(t *testing.T) {
	for _, s := range stacks() {
		t.Run(s.name, func(t *testing.T) {
			a, b := s.nodes(t)
			s.sas(a, b)
			for _, n := range []*node{a, b} {
				n.e.c.TAP = bigTAP{memTAP{n}}
			}
			b.mtu = 9500
			src, dst := s.in, s.out
			tunnel := false
			for _, l := range s.layers {
				tunnel = tunnel || l.mode() == ipsec.Tunnel
			}
			sent := a.send(synPacket(src, dst, 2, 8960))
			var got [][]byte
			if s.udp() {
				got = b.receiveUDP(sent...)
			} else {
				got = b.receive(sent...)
			}
			if len(got) != 1 {
				t.Fatalf("%d arrived: %v", len(got), b.e.Stats().nonzero())
			}
			mss, sound := mssOf(got[0])
			if !sound {
				t.Error("checksum wrong")
			}
			if !tunnel {
				if mss != 8960 {
					t.Errorf("%d told without a tunnel", mss)
				}
				return
			}
			noise := func(mss int) []byte { // nothing that compresses
				ip := tcpPacket(src, dst, 4321, 8, 2, 0x10, mss)
				copy(ip[len(ip)-mss:], text(src, dst, 1500, true)[100:])
				return ip
			}
			if one, more := len(a.send(noise(mss))), len(a.send(noise(mss+1))); one != 1 || more == 1 {
				t.Errorf("told %d: %d packets left; of one octet more %d", mss, one, more)
			}
		})
	}
}
