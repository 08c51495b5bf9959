package datapath

import (
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// FuzzEngine: no frame of the kernel and no packet of the network makes the
// engine panic, and nothing that policy protects leaves or arrives in clear.
func FuzzEngine(f *testing.F) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, _, _, _ := p.nodes(f)
	ip := udpPacket(p.in, p.out, 1, 2, 40)
	f.Add(append([]byte{2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 9, 8, 0}, ip...))
	f.Add(append(make([]byte, 14), a.send(ip)[0]...))
	f.Add(append([]byte{2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 9, 0x86, 0xdd}, udpPacket(ia6, ib6, 1, 2, 9)...))
	f.Add([]byte{2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 9, 8, 6, 0, 1})
	n, m := newNode(f, p.src), newNode(f, p.dst)
	n.e.c.Default, m.e.c.Default = ipsec.Discard, ipsec.Discard
	m.sa(p.params())
	buf := make([]byte, bufSize)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 65535 {
			return
		}
		n.wire, n.tap, m.tap = nil, nil, nil
		left, arrived := n.e.Stats()[OutBypassed], m.e.Stats()[InBypassed]
		copy(buf[headroom:], b)
		n.e.out.frame(&tap.Frame{Buf: buf, Off: headroom, Len: len(b)}, time.Now())
		if err := n.e.out.flush(); err != nil {
			t.Fatal(err)
		}
		if s := n.e.Stats(); uint64(len(n.wire)) > s[OutBypassed]-left {
			t.Fatalf("left under default drop: %x", n.wire)
		}
		if len(b) < etherLen {
			return
		}
		copy(buf[headroom:], b)
		m.e.in[0].ip(buf, headroom+etherLen, len(b)-etherLen, tap.Offload{}, time.Now())
		copy(buf[headroom:], b)
		m.e.in[1].datagram(&wire.Datagram{Buf: buf, Off: headroom + etherLen, Len: len(b) - etherLen}, time.Now())
		for _, w := range m.e.in {
			if err := w.flush(time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		if s := m.e.Stats(); uint64(len(m.tap)) > s[InBypassed]-arrived {
			t.Fatalf("arrived without policy: %v", s.nonzero())
		}
	})
}
