package wire

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"testing"

	nl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

type attribute struct {
	kind  uint16
	value []byte
}

// message is a fixed part and attributes.
func message(fixed []byte, as ...attribute) []byte {
	ae := nl.NewAttributeEncoder()
	for _, a := range as {
		ae.Bytes(a.kind, a.value)
	}
	b, _ := ae.Encode()
	return append(fixed, b...)
}

func routeMessage(kind byte, as ...attribute) []byte {
	return message([]byte{unix.AF_INET, 32, 0, 0, 254, 3, 0, kind, 0, 0, 0, 0}, as...)
}

func TestNextHop(t *testing.T) {
	dst := netip.MustParseAddr("10.1.2.3")
	oif := attribute{unix.RTA_OIF, []byte{7, 0, 0, 0}} // tests run on little-endian machines
	six := netip.MustParseAddr("fe80::1").AsSlice()
	for _, k := range []struct {
		name string
		b    []byte
		want string // "": the kernel's business
	}{
		{"on the link", routeMessage(unix.RTN_UNICAST, oif), "10.1.2.3"},
		{"gateway", routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_GATEWAY, []byte{10, 0, 0, 1}}), "10.0.0.1"},
		{"gateway of the other family", routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_VIA, append([]byte{unix.AF_INET6, 0}, six...)}), "fe80::1"},
		{"another interface", routeMessage(unix.RTN_UNICAST, attribute{unix.RTA_OIF, []byte{8, 0, 0, 0}}), ""},
		{"no interface", routeMessage(unix.RTN_UNICAST), ""},
		{"local", routeMessage(unix.RTN_LOCAL, oif), ""},
		{"broadcast", routeMessage(unix.RTN_BROADCAST, oif), ""},
		{"blackhole", routeMessage(unix.RTN_BLACKHOLE, oif), ""},
		{"encapsulation", routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_ENCAP_TYPE, []byte{2, 0}}), ""},
		{"several paths", routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_MULTIPATH, make([]byte, 16)}), ""},
		{"bad gateway", routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_GATEWAY, []byte{1}}), ""},
		{"bad via", routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_VIA, []byte{1}}), ""},
		{"bad attribute", append(routeMessage(unix.RTN_UNICAST, oif), 200, 0, 1, 0), ""},
		{"short", []byte{2, 32}, ""},
	} {
		got := nextHop(k.b, dst, 7)
		if k.want == "" && got.IsValid() || k.want != "" && got.String() != k.want {
			t.Errorf("%s: got %v, want %q", k.name, got, k.want)
		}
	}
}

func TestNeighbourEvents(t *testing.T) {
	mac := []byte{2, 0, 0, 0, 0, 1}
	event := func(kind nl.HeaderType, index byte, state byte, flags byte, mac []byte) nl.Message {
		return nl.Message{Header: nl.Header{Type: kind}, Data: message([]byte{unix.AF_INET, 0, 0, 0, index, 0, 0, 0, state, 0, flags, 0},
			attribute{unix.NDA_DST, []byte{10, 0, 0, 1}}, attribute{unix.NDA_LLADDR, mac})}
	}
	for _, k := range []struct {
		name  string
		m     nl.Message
		known bool
		fresh bool
	}{
		{"reachable", event(unix.RTM_NEWNEIGH, 7, unix.NUD_REACHABLE, 0, mac), true, true},
		{"permanent", event(unix.RTM_NEWNEIGH, 7, unix.NUD_PERMANENT, 0, mac), true, true},
		{"stale", event(unix.RTM_NEWNEIGH, 7, unix.NUD_STALE, 0, mac), true, false},
		{"probed", event(unix.RTM_NEWNEIGH, 7, unix.NUD_PROBE, 0, mac), true, false},
		{"asked for", event(unix.RTM_NEWNEIGH, 7, unix.NUD_INCOMPLETE, 0, mac), false, false},
		{"failed", event(unix.RTM_NEWNEIGH, 7, unix.NUD_FAILED, 0, mac), false, false},
		{"deleted", event(unix.RTM_DELNEIGH, 7, unix.NUD_REACHABLE, 0, mac), false, false},
		{"no address", event(unix.RTM_NEWNEIGH, 7, unix.NUD_REACHABLE, 0, nil), false, false},
		{"null address", event(unix.RTM_NEWNEIGH, 7, unix.NUD_NOARP, 0, make([]byte, 6)), false, false},
		{"group address", event(unix.RTM_NEWNEIGH, 7, unix.NUD_NOARP, 0, []byte{1, 0, 0x5e, 0, 0, 1}), false, false},
		{"another interface", event(unix.RTM_NEWNEIGH, 8, unix.NUD_FAILED, 0, mac), true, true},
		{"proxy", event(unix.RTM_NEWNEIGH, 7, unix.NUD_FAILED, unix.NTF_PROXY, mac), true, true},
		{"short", nl.Message{Header: nl.Header{Type: unix.RTM_DELNEIGH}, Data: []byte{2}}, true, true},
	} {
		h := &hops{index: 7, neighs: map[netip.Addr]*neighbour{}}
		h.neighbour(event(unix.RTM_NEWNEIGH, 7, unix.NUD_REACHABLE, 0, mac)) // before
		h.neighbour(k.m)
		n := h.neighs[netip.MustParseAddr("10.0.0.1")]
		if (n != nil) != k.known || n != nil && n.fresh != k.fresh {
			t.Errorf("%s: got %+v, want known %v, fresh %v", k.name, n, k.known, k.fresh)
		}
	}
}

// Whatever the kernel may say: no panic, and no next hop that is none.
func FuzzKernelMessages(f *testing.F) {
	oif := attribute{unix.RTA_OIF, []byte{7, 0, 0, 0}}
	f.Add(routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_GATEWAY, []byte{10, 0, 0, 1}}))
	f.Add(routeMessage(unix.RTN_UNICAST, oif, attribute{unix.RTA_VIA, []byte{2, 0, 1, 2, 3, 4}}))
	f.Add(message([]byte{unix.AF_INET, 0, 0, 0, 7, 0, 0, 0, unix.NUD_REACHABLE, 0, 0, 0}, attribute{unix.NDA_DST, []byte{10, 0, 0, 1}}, attribute{unix.NDA_LLADDR, []byte{2, 0, 0, 0, 0, 1}}))
	f.Add([]byte("0000000000000000 3      3    0003   7     1 0      0      4242  \n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dst := netip.MustParseAddr("10.1.2.3")
		nextHop(b, dst, 7)
		h := &hops{index: 7, neighs: map[netip.Addr]*neighbour{}}
		for _, kind := range []nl.HeaderType{unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH} {
			h.neighbour(nl.Message{Header: nl.Header{Type: kind}, Data: b})
		}
		if len(h.neighs) != 0 {
			t.Errorf("deleted, but known: %v", h.neighs)
		}
		captures(b, 7, 99)
		if p := (Packet{Buf: b, Len: len(b)}); destination(&p).IsValid() {
			unicast(b, destination(&p))
		}
	})
}

// The checksum is right whatever stood there before.
func TestFinish4(t *testing.T) {
	var s sender
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		b := make([]byte, 20+4*r.IntN(11))
		for i := range b {
			b[i] = byte(r.Uint32() >> (8 * r.IntN(4)))
		}
		b[0] = 0x40 | byte(len(b)/4)
		id := [2]byte(b[4:6])
		s.finish4(b)
		if sum16(0, b) != 0xffff || id != [2]byte{} && id != [2]byte(b[4:6]) {
			t.Fatalf("% x: sum %#x", b, sum16(0, b))
		}
	}
	b := ipPacket("10.9.0.1", "10.9.0.2", 50, nil)
	s.id = 0xffff
	if s.finish4(b); b[4] == 0 && b[5] == 0 || sum16(0, b) != 0xffff {
		t.Errorf("without identification: % x", b)
	}
	six := ipPacket("fd09::1", "fd09::2", 50, nil)
	if s.finish4(six); !bytes.Equal(six, ipPacket("fd09::1", "fd09::2", 50, nil)) {
		t.Errorf("IPv6: % x", six)
	}
}
