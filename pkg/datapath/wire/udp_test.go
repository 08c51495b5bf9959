package wire

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func openUDP(t testing.TB, w *Wire, o UDPOptions) *UDP {
	t.Helper()
	u, err := w.OpenUDP(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	return u
}

func datagrams(n int) []Datagram {
	ds := make([]Datagram, n)
	for i := range ds {
		ds[i] = Datagram{Buf: make([]byte, 70000), Off: 100}
	}
	return ds
}

func (l *lab) listenUDP(addr string) *net.UDPConn {
	l.t.Helper()
	var c *net.UDPConn
	var err error
	l.at(func() { c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr))) })
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	return c
}

func TestUDP(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	u := openUDP(t, w, UDPOptions{})
	// Routes into a TAP do not catch what it sends.
	sh(t, `ip tuntap add mi-tap mode tap; ip link set mi-tap up
		ip route add 10.9.0.2/32 dev mi-tap; ip -6 route add fd09::2/128 dev mi-tap; ip addr add 10.9.0.60/24 dev e0`)
	defer exec.Command("ip", "link", "del", "mi-tap").Run()
	ds := datagrams(8)
	for _, k := range []struct{ local, remote string }{
		{"10.9.0.1:4500", "10.9.0.2:1111"}, {"10.9.0.60:4500", "10.9.0.2:1111"}, {"[fd09::1]:4500", "[fd09::2]:1111"},
	} {
		local, remote := netip.MustParseAddrPort(k.local), netip.MustParseAddrPort(k.remote)
		c := l.listenUDP(k.remote)
		if remote.Addr().Is4() {
			raw, _ := c.SyscallConn()
			raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, 0xb9) })
		}
		if _, err := c.WriteToUDPAddrPort([]byte("hello"), local); err != nil {
			t.Fatal(err)
		}
		n, err := u.ReadBatch(ds)
		if n != 1 || err != nil {
			t.Fatalf("got %d, %v, want 1", n, err)
		}
		d := &ds[0]
		if d.Local != local || d.Remote != remote || string(d.Buf[d.Off:d.Off+d.Len]) != "hello" || d.Segment != 0 {
			t.Errorf("got %v <- %v, %d octets; want %v <- %v", d.Local, d.Remote, d.Len, local, remote)
		}
		if want := uint8(0xb9); remote.Addr().Is4() && d.TOS != want {
			t.Errorf("got TOS %#x, want %#x", d.TOS, want)
		}
		buf := make([]byte, 5000)
		for _, size := range []int{1, 1000, 4000} { // the last in fragments: IKE may
			out := Datagram{Buf: bytes.Repeat([]byte{7}, size), Len: size, Local: local, Remote: remote, TOS: 0x10}
			if n, err := u.WriteBatch([]Datagram{out}); n != 1 || err != nil {
				t.Fatalf("%d octets: got %d, %v, want 1", size, n, err)
			}
			k, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil || k != size || from != local {
				t.Errorf("peer got %d octets from %v, %v; want %d from %v", k, from, err, size, local)
			}
		}
		big := Datagram{Buf: make([]byte, 4000), Len: 4000, Local: local, Remote: remote, DontFragment: true}
		small := Datagram{Buf: make([]byte, 10), Len: 10, Local: local, Remote: remote}
		if n, err := u.WriteBatch([]Datagram{small, big, small}); n != 1 || !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("whole: got %d, %v, want 1, EMSGSIZE", n, err)
		}
		c.Close()
	}
	if n, err := u.WriteBatch([]Datagram{{Buf: []byte{1}, Len: 1, Local: netip.MustParseAddrPort("10.9.0.1:4500"), Remote: netip.MustParseAddrPort("[fd09::2]:1")}}); n != 0 || !errors.Is(err, unix.EINVAL) {
		t.Errorf("two families: got %d, %v, want 0, EINVAL", n, err)
	}
}

// Several datagrams in one message, out and in.
func TestUDPSegments(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	u := openUDP(t, w, UDPOptions{GRO: true})
	c := l.listenUDP("10.9.0.2:1111")
	local, remote := netip.MustParseAddrPort("10.9.0.1:4500"), netip.MustParseAddrPort("10.9.0.2:1111")
	d := Datagram{Buf: make([]byte, 2500), Len: 2500, Local: local, Remote: remote, Segment: 1000}
	if n, err := u.WriteBatch([]Datagram{d}); n != 1 || err != nil {
		t.Fatalf("got %d, %v, want 1", n, err)
	}
	buf := make([]byte, 5000)
	for _, want := range []int{1000, 1000, 500} {
		if n, _, err := c.ReadFrom(buf); n != want || err != nil {
			t.Errorf("got %d, %v, want %d", n, err, want)
		}
	}
	raw, _ := c.SyscallConn()
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000) })
	if _, err := c.WriteToUDPAddrPort(make([]byte, 2500), local); err != nil {
		t.Fatal(err)
	}
	ds := datagrams(4)
	n, err := u.ReadBatch(ds)
	if n != 1 || err != nil || ds[0].Len != 2500 || ds[0].Segment != 1000 {
		t.Errorf("got %d messages, %v, the first of %d octets in segments of %d; want 1 of 2500 in 1000", n, err, ds[0].Len, ds[0].Segment)
	}
}

func TestUDPPortTaken(t *testing.T) {
	newLab(t)
	w := openWire(t)
	for _, addr := range []string{"0.0.0.0:4500", "[::]:4500", "10.9.0.1:4500"} {
		c, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.OpenUDP(UDPOptions{}); !errors.Is(err, ErrPortTaken) {
			t.Errorf("%s: got %v, want ErrPortTaken", addr, err)
		}
		c.Close()
	}
	u := openUDP(t, w, UDPOptions{})
	done := make(chan error)
	go func() {
		_, err := u.ReadBatch(datagrams(1))
		done <- err
	}()
	u.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v, want os.ErrClosed", err)
	}
	openUDP(t, w, UDPOptions{}) // the port is free again
}

// flood returns a function that sends n ESP packets of 1000 octets from the peer.
func (l *lab) flood() func(n int) {
	send := l.rawPeer()
	p := ipPacket("10.9.0.3", "10.9.0.1", 50, make([]byte, 1000))
	return func(n int) {
		for range n {
			send(p)
		}
	}
}

func TestNoAllocs(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	u := openUDP(t, w, UDPOptions{})
	gen := l.flood()
	ps := make([]Packet, 64)
	for i := range ps {
		ps[i] = Packet{Buf: make([]byte, 2000), Off: 64}
	}
	gens := testing.AllocsPerRun(50, func() { gen(32) })
	for drained := 0; drained < 51*32; {
		n, err := w.ReadBatch(ps)
		if err != nil {
			t.Fatal(err)
		}
		drained += n
	}
	if n := testing.AllocsPerRun(50, func() {
		gen(32)
		for got := 0; got < 32; {
			k, err := w.ReadBatch(ps)
			if err != nil {
				t.Fatal(err)
			}
			got += k
		}
	}); n > gens {
		t.Errorf("ReadBatch: %v allocations, want 0", n-gens)
	}
	out := []Packet{}
	for range 32 {
		b := ipPacket("10.9.0.1", "10.9.0.2", 253, make([]byte, 1000))
		out = append(out, Packet{Buf: b, Len: len(b)})
	}
	if n := testing.AllocsPerRun(50, func() { w.WriteBatch(out) }); n != 0 {
		t.Errorf("WriteBatch: %v allocations, want 0", n)
	}
	ds := []Datagram{}
	for range 32 {
		ds = append(ds, Datagram{Buf: make([]byte, 1000), Len: 1000, Local: netip.MustParseAddrPort("10.9.0.1:4500"), Remote: netip.MustParseAddrPort("10.9.0.2:9"), TOS: 1})
	}
	if n := testing.AllocsPerRun(50, func() { u.WriteBatch(ds) }); n != 0 {
		t.Errorf("UDP WriteBatch: %v allocations, want 0", n)
	}
	dst := netip.MustParseAddr("10.9.0.2")
	if n := testing.AllocsPerRun(50, func() { w.PathMTU(dst); w.IsLocal(dst) }); n != 0 {
		t.Errorf("PathMTU: %v allocations, want 0", n)
	}
}

func BenchmarkReadBatch(b *testing.B) {
	l := newLab(b)
	w := openWire(b)
	gen := l.flood()
	ps := make([]Packet, 64)
	for i := range ps {
		ps[i] = Packet{Buf: make([]byte, 2000), Off: 64}
	}
	b.SetBytes(1020)
	b.ReportAllocs()
	for i := 0; i < b.N; {
		b.StopTimer()
		gen(64)
		b.StartTimer()
		for got := 0; got < 64; {
			n, err := w.ReadBatch(ps)
			if err != nil {
				b.Fatal(err)
			}
			got += n
		}
		i += 64
	}
}

func BenchmarkWriteBatch(b *testing.B) {
	newLab(b)
	w := openWire(b)
	out := []Packet{}
	for range 64 {
		p := ipPacket("10.9.0.1", "10.9.0.2", 253, make([]byte, 1000))
		out = append(out, Packet{Buf: p, Len: len(p)})
	}
	b.SetBytes(1020)
	b.ReportAllocs()
	for i := 0; i < b.N; i += 64 {
		for ps := out; len(ps) > 0; {
			n, err := w.WriteBatch(ps)
			if err != nil {
				n++
			}
			ps = ps[n:]
		}
	}
}
