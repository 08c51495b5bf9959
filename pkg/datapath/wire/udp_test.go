package wire

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/internal/nstest"
	"github.com/missiu/missiu/pkg/datapath/linger"
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
	c.SetReadDeadline(time.Now().Add(time.Minute))
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

// TestUDPShared: each socket has the SPIs that are its, in order; the first also
// what is no ESP. Nobody else may join them.
func TestUDPShared(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	us, err := w.OpenUDPs(3, UDPOptions{GRO: true})
	if err != nil || len(us) != 3 {
		t.Fatalf("%d sockets, %v, want 3", len(us), err)
	}
	for _, u := range us {
		t.Cleanup(func() { u.Close() })
	}
	for _, k := range []struct{ local, remote string }{
		{"10.9.0.1:4500", "10.9.0.2:1111"}, {"[fd09::1]:4500", "[fd09::2]:1111"},
	} {
		local := netip.MustParseAddrPort(k.local)
		c := l.listenUDP(k.remote)
		want := make([][]string, len(us))
		send := func(at int, b ...byte) {
			t.Helper()
			if _, err := c.WriteToUDPAddrPort(b, local); err != nil {
				t.Fatal(err)
			}
			want[at] = append(want[at], string(b))
		}
		for n := range 30 {
			spi := byte(n % 7)
			send(int(spi+3)%3, 0, 0, 0, spi+3, byte(n))
		}
		send(0, 0xff)                // keepalive
		send(0, 0, 0, 0, 0, 1, 2, 3) // IKE
		for k, u := range us {
			var got []string
			for ds := datagrams(8); len(got) < len(want[k]); {
				n, err := u.ReadBatch(ds)
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range ds[:n] {
					got = append(got, string(d.Buf[d.Off:d.Off+d.Len]))
				}
			}
			if !slices.Equal(got, want[k]) {
				t.Errorf("socket %d: got %x, want %x", k, got, want[k])
			}
		}
		c.Close()
	}
	if _, err := net.ListenPacket("udp4", "10.9.0.1:4500"); err == nil {
		t.Error("the port is open to others")
	}
	if _, err := w.OpenUDPs(2, UDPOptions{}); !errors.Is(err, ErrPortTaken) {
		t.Errorf("a second time: got %v, want ErrPortTaken", err)
	}
}

// TestUDPNotShared: where the kernel cannot, there is one socket.
func TestUDPNotShared(t *testing.T) {
	newLab(t)
	w, err := Open("e0", Options{refuse: func(path string) error {
		if path == "SO_REUSEPORT" {
			return unix.ENOPROTOOPT
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	us, err := w.OpenUDPs(4, UDPOptions{})
	if err != nil || len(us) != 1 {
		t.Fatalf("%d sockets, %v, want 1", len(us), err)
	}
	defer us[0].Close()
	select {
	case f := <-w.Fallbacks():
		if f.Path != "SO_REUSEPORT" {
			t.Errorf("fell back from %s", f.Path)
		}
	default:
		t.Error("nobody was told")
	}
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
	read := func(n int) {
		for n > 0 {
			k, err := w.ReadBatch(ps)
			if err != nil {
				t.Fatal(err)
			}
			n -= k
		}
	}
	read(51 * 32)
	tries(t, "ReadBatch", gens, func() { gen(32); read(32) })
	out := []Packet{}
	for range 32 {
		b := ipPacket("10.9.0.1", "10.9.0.2", 253, make([]byte, 1000))
		out = append(out, Packet{Buf: b, Len: len(b)})
	}
	noAllocs(t, "WriteBatch", func() { w.WriteBatch(out) })
	ds := []Datagram{}
	for range 32 {
		ds = append(ds, Datagram{Buf: make([]byte, 1000), Len: 1000, Local: netip.MustParseAddrPort("10.9.0.1:4500"), Remote: netip.MustParseAddrPort("10.9.0.2:9"), TOS: 1})
	}
	noAllocs(t, "UDP WriteBatch", func() { u.WriteBatch(ds) })
	ds[3].Segment = 300
	noAllocs(t, "UDP WriteBatch, train", func() { u.WriteBatch(ds) })
	dst := netip.MustParseAddr("10.9.0.2")
	noAllocs(t, "PathMTU", func() { w.PathMTU(dst); w.IsLocal(dst) })
}

func noAllocs(t *testing.T, what string, f func()) {
	t.Helper()
	tries(t, what, 0, f)
}

// tries demands that f allocates no more than so often. Goroutines that follow the
// kernel's events may do so meanwhile, and the count is the program's; so it is
// tried again.
func tries(t *testing.T, what string, want float64, f func()) {
	t.Helper()
	n := want + 1
	for i := 0; n > want && i < 5; i++ {
		n = testing.AllocsPerRun(50, f)
	}
	if n > want {
		t.Errorf("%s: %v allocations, want 0", what, n-want)
	}
}

// Cost of a packet received, from the ring and from the socket's queue, and of
// the same to its sender, in whose system call veth delivers it.
func BenchmarkReadBatch(b *testing.B) {
	for _, k := range []struct{ name, native string }{{"ring", NativeAuto}, {"queue", NativeRaw}} {
		for _, size := range []int{88, 1480} {
			b.Run(fmt.Sprintf("%s/%d", k.name, size), func(b *testing.B) {
				l := newLab(b)
				w := openNative(b, k.native)
				send := l.rawPeer()
				p := ipPacket("10.9.0.3", "10.9.0.1", 50, make([]byte, size-20))
				ps := make([]Packet, 64)
				for i := range ps {
					ps[i] = Packet{Buf: make([]byte, 2000), Off: 64}
				}
				b.ReportAllocs()
				b.ResetTimer()
				var out, in time.Duration
				n := 0
				for ; n < b.N; n += 64 {
					start := time.Now()
					for range 64 {
						send(p)
					}
					sent := time.Now()
					for got := 0; got < 64; {
						k, err := w.ReadBatch(ps)
						if err != nil {
							b.Fatal(err)
						}
						got += k
					}
					out, in = out+sent.Sub(start), in+time.Since(sent)
				}
				b.ReportMetric(float64(in.Nanoseconds())/float64(n), "ns/received")
				b.ReportMetric(float64(out.Nanoseconds())/float64(n), "ns/sent")
				w.Close()
			})
		}
	}
}

// sizes are those of the segments of n octets, of segment octets each but the last.
func sizes(n, segment int) []int {
	var s []int
	for ; n > segment; n -= segment {
		s = append(s, segment)
	}
	return append(s, n)
}

// offload turns what a veth does for the sender on or off: checksums, scatter
// and gather, segmentation.
func offload(t testing.TB, ifname string, on uint32) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, cmd := range []uint32{unix.ETHTOOL_STXCSUM, unix.ETHTOOL_SSG, unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO} {
		v := [2]uint32{cmd, on}
		req := struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&v)}
		copy(req.name[:], ifname)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 && errno != unix.EOPNOTSUPP {
			t.Fatalf("ethtool %#x: %v", cmd, errno)
		}
	}
}

// anyWay: kernels before 6.11 refuse trains for such a device, later ones finish them.
var anyWay = UDPStats{Messages: math.MaxUint64}

// A train that the kernel will not cut, for whatever reason, leaves as single
// datagrams in the same order, and what cannot leave is reported.
func TestUDPTrains(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	refuseToCut := func(u *UDP) { // EINVAL: a train without checksum
		u.socks[0].raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1) })
	}
	port := uint16(4500)
	for _, k := range []struct {
		name    string
		options UDPOptions
		before  func(u *UDP)
		train   []Datagram // Len, Segment, DontFragment
		mtu     int
		want    UDPStats
		sizes   []int
		lost    int
	}{
		{"kernel cuts", UDPOptions{}, nil, []Datagram{{Len: 2500, Segment: 1000}, {Len: 10}}, 0,
			UDPStats{Trains: 1, Singles: 1}, []int{1000, 1000, 500, 10}, 0},
		{"longer than a message", UDPOptions{}, nil, []Datagram{{Len: 69000, Segment: 1000}, {Len: 8000, Segment: 80}}, 0,
			UDPStats{Trains: 4}, append(sizes(69000, 1000), sizes(8000, 80)...), 0},
		{"one segment", UDPOptions{}, nil, []Datagram{{Len: 1000, Segment: 1000}, {Len: 999, Segment: 1000}}, 0,
			UDPStats{Singles: 2}, []int{1000, 999}, 0},
		{"plain", UDPOptions{Plain: true}, nil, []Datagram{{Len: 2500, Segment: 1000}}, 0,
			UDPStats{Singles: 3}, sizes(2500, 1000), 0},
		{"device without offload", UDPOptions{}, func(*UDP) { offload(t, "e0", 0); t.Cleanup(func() { offload(t, "e0", 1) }) },
			[]Datagram{{Len: 2500, Segment: 1000}, {Len: 10}}, 0,
			anyWay, []int{1000, 1000, 500, 10}, 0},
		{"refused", UDPOptions{}, refuseToCut, []Datagram{{Len: 7}, {Len: 69000, Segment: 1000}, {Len: 2500, Segment: 1000}}, 0,
			UDPStats{Singles: 73, Fallbacks: 1}, append(append([]int{7}, sizes(69000, 1000)...), sizes(2500, 1000)...), 0},
		{"narrow path", UDPOptions{}, nil, []Datagram{{Len: 2500, Segment: 1400}, {Len: 1200, Segment: 600}}, 1300,
			UDPStats{Trains: 1, Singles: 2, Fallbacks: 1}, []int{1400, 1100, 600, 600}, 0},
		{"narrow path, whole", UDPOptions{}, nil, []Datagram{{Len: 6700, Segment: 1400, DontFragment: true}, {Len: 5}}, 1300,
			UDPStats{Singles: 1, Fallbacks: 1, Refused: 4}, []int{1100}, 4},
	} {
		t.Run(k.name, func(t *testing.T) {
			c := l.listenUDP("10.9.0.2:1111")
			defer c.Close()
			raw, _ := c.SyscallConn()
			raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) })
			port++
			k.options.Port = port
			u := openUDP(t, w, k.options)
			if k.before != nil {
				k.before(u)
			}
			if k.mtu != 0 {
				sh(t, "ip route add 10.9.0.2/32 dev e0 mtu "+strconv.Itoa(k.mtu))
				defer sh(t, "ip route del 10.9.0.2/32")
			}
			for i := range k.train {
				d := &k.train[i]
				d.Buf, d.Off, d.Remote = make([]byte, 3+d.Len), 3, netip.MustParseAddrPort("10.9.0.2:1111")
				for j := range d.Len {
					d.Buf[3+j] = byte(j>>8 + j)
				}
			}
			n, err := u.WriteBatch(k.train)
			refused := (*SendError)(nil)
			if k.lost == 0 && (n != len(k.train) || err != nil) || k.lost > 0 && (n != 0 || !errors.As(err, &refused) || refused.Lost != k.lost || refused.Err != unix.EMSGSIZE) {
				t.Errorf("got %d, %v, want %d lost", n, err, k.lost)
			}
			if got := u.Stats(); got != k.want && k.want != anyWay {
				t.Errorf("got %+v, want %+v", got, k.want)
			}
			buf := make([]byte, 70000)
			at, off := 0, 0
			for i, want := range k.sizes {
				if k.lost > 0 {
					off = k.train[0].Len - want
				} else if off == k.train[at].Len {
					at, off = at+1, 0
				}
				got, _, err := c.ReadFrom(buf)
				if got != want || err != nil || !bytes.Equal(buf[:got], k.train[at].Buf[3+off:3+off+got]) {
					t.Fatalf("datagram %d: got %d octets, %v, want %d of datagram %d from %d on", i, got, err, want, at, off)
				}
				off += got
			}
		})
	}
	select {
	case f := <-w.Fallbacks():
		if f.Path != "UDP_SEGMENT" || f.Err != unix.EINVAL {
			t.Errorf("told %v", f)
		}
	default:
		t.Error("not told of the fallback")
	}
	if len(w.Fallbacks()) != 0 {
		t.Errorf("told twice: %v", <-w.Fallbacks())
	}
}

// After its minute the kernel is asked again.
func TestUDPSegmentRetry(t *testing.T) {
	s := udpSocket{segment: true}
	for _, k := range []struct {
		after time.Duration
		want  bool
	}{{segmentRetry, false}, {-time.Second, true}} {
		if s.after = time.Now().Add(k.after); s.cuts() != k.want {
			t.Errorf("%v: got %v, want %v", k.after, !k.want, k.want)
		}
	}
}

// RFC 6935: a datagram over IPv6 may come without checksum, too.
func TestUDPZeroChecksum(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	u := openUDP(t, w, UDPOptions{})
	send := l.rawPeer()
	for _, k := range [][2]string{{"10.9.0.3", "10.9.0.1"}, {"fd09::3", "fd09::1"}} {
		p := udpPayload(k[0], k[1], 7, 4500, "bare")
		p[6], p[7] = 0, 0
		send(ipPacket(k[0], k[1], 17, p))
		ds := datagrams(4)
		if n, err := u.ReadBatch(ds); n != 1 || err != nil || string(ds[0].Buf[ds[0].Off:ds[0].Off+ds[0].Len]) != "bare" {
			t.Errorf("%s: got %d, %v, want 1", k[0], n, err)
		}
	}
}

// Cost of a datagram sent, alone and in trains of 45, over a veth pair.
func BenchmarkUDPWrite(b *testing.B) {
	newLab(b)
	w := openWire(b)
	sh(b, "ip netns exec "+nstest.Name()+"p"+strconv.Itoa(labs)+" nft 'add table ip f; add chain ip f i { type filter hook input priority 0; policy drop; }'")
	port := uint16(4500)
	for _, k := range []struct {
		name          string
		len, segment  int
		plain, family bool
	}{
		{"single", 1444, 0, false, false},
		{"train", 45 * 1444, 1444, false, false},
		{"cut", 45 * 1444, 1444, true, false},
		{"small", 108, 0, false, false},
	} {
		b.Run(k.name, func(b *testing.B) {
			port++
			u := openUDP(b, w, UDPOptions{Port: port, Plain: k.plain})
			per := 1
			if k.segment != 0 {
				per = k.len / k.segment
			}
			ds := make([]Datagram, max(1, 64/per))
			for i := range ds {
				ds[i] = Datagram{Buf: make([]byte, k.len), Len: k.len, Segment: k.segment, Local: netip.MustParseAddrPort("10.9.0.1:4500"), Remote: netip.MustParseAddrPort("10.9.0.2:9")}
			}
			b.ReportAllocs()
			b.SetBytes(int64(k.len / per))
			for i := 0; i < b.N; i += per * len(ds) {
				if n, err := u.WriteBatch(ds); err != nil {
					b.Fatal(n, err)
				}
			}
		})
	}
}

// From a packet's being sent until an idle reader has it: ring and queue,
// readers that linger and those that do not.
func BenchmarkLatency(b *testing.B) {
	for _, native := range []string{NativeAuto, NativeRaw} {
		for _, wait := range []string{linger.Adaptive, linger.Poll} {
			b.Run(native+"/"+wait, func(b *testing.B) {
				l := newLab(b)
				w, err := Open("e0", Options{Native: native, Wait: wait})
				if err != nil {
					b.Fatal(err)
				}
				defer w.Close()
				send := l.rawPeer()
				p := ipPacket("10.9.0.3", "10.9.0.1", 50, make([]byte, 100))
				came := make(chan time.Time)
				go func() {
					ps := []Packet{{Buf: make([]byte, 2000), Off: 64}}
					for {
						if _, err := w.ReadBatch(ps); err != nil {
							close(came)
							return
						}
						came <- time.Now()
					}
				}()
				var took []time.Duration
				for range b.N {
					time.Sleep(2 * time.Millisecond)
					start := time.Now()
					send(p)
					took = append(took, (<-came).Sub(start))
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "p50-ns")
				b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
			})
		}
	}
}

// Cost of a datagram received: alone, and as the peer's trains joined by the kernel.
func BenchmarkUDPRead(b *testing.B) {
	for _, k := range []struct {
		name    string
		segment int
		plain   bool
	}{{"joined", 1444, false}, {"train, plain", 1444, true}, {"single", 0, false}} {
		b.Run(k.name, func(b *testing.B) {
			l := newLab(b)
			w := openWire(b)
			u := openUDP(b, w, UDPOptions{GRO: true, Plain: k.plain})
			c := l.listenUDP("10.9.0.2:1111")
			n, per := 1444, 1
			if k.segment != 0 {
				per, n = 45, 45*1444
				raw, _ := c.SyscallConn()
				raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, k.segment) })
			}
			p, to := make([]byte, n), netip.MustParseAddrPort("10.9.0.1:4500")
			ds := datagrams(8)
			var in, out time.Duration
			count := 0
			for count < b.N {
				start := time.Now()
				for range max(1, 45/per) {
					if _, err := c.WriteToUDPAddrPort(p, to); err != nil {
						b.Fatal(err)
					}
				}
				sent := time.Now()
				for got := 0; got < 45*1444; {
					n, err := u.ReadBatch(ds)
					if err != nil {
						b.Fatal(err)
					}
					for _, d := range ds[:n] {
						got += d.Len
					}
				}
				out, in = out+sent.Sub(start), in+time.Since(sent)
				count += 45
			}
			b.ReportMetric(float64(in.Nanoseconds())/float64(count), "ns/received")
			b.ReportMetric(float64(out.Nanoseconds())/float64(count), "ns/sent")
		})
	}
}

// A socket whose buffer has become a standing queue gets a small one, until it
// was empty.
func TestStandingBuffer(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := receiveBufferOf(fd, burstBuffer); err != nil {
		t.Fatal(err)
	}
	size := func() int {
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	large, s := size(), udpSocket{}
	for _, k := range []struct {
		more, late, small bool
	}{
		{true, false, false}, {true, false, false}, {true, true, true}, {true, false, true},
		{false, false, true}, {false, true, false}, // not yet, and after recovery
		{true, false, false}, {false, false, false}, {true, true, false}, {true, true, true},
		{false, false, true}, {true, false, true}, {true, true, true}, {false, false, true}, // it stands again
	} {
		if k.late {
			s.stood = s.stood.Add(-2 * recovery)
			if !s.since.IsZero() {
				s.since = s.since.Add(-2 * standing)
			}
		}
		s.stands(fd, k.more)
		if got := size() < large; got != k.small || s.small != k.small {
			t.Fatalf("%+v: %d octets of %d", k, size(), large)
		}
	}
}

// What is read first has to be stale for a while before anything is shed, and fresh
// once for that to end.
func TestWaited(t *testing.T) {
	var s udpSocket
	at := time.Now()
	for i, k := range []struct {
		after time.Duration
		age   time.Duration
		late  bool
	}{
		{0, stale, false}, {time.Hour, stale + 1, false}, {staleFor, stale + 1, false}, {1, stale + 1, true}, {time.Hour, time.Hour, true},
		{1, stale, false}, {1, time.Hour, false}, {staleFor, time.Hour, false}, {1, time.Hour, true}, {1, -time.Hour, false}, {1, time.Hour, false},
	} {
		at = at.Add(k.after)
		if late := s.waited(at, k.age); late != k.late {
			t.Fatalf("step %d, %+v: late %v", i, k, late)
		}
	}
}

// A queue that has been stale for long is shed but for IKE; one that has only piled
// up is read.
func TestShed(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	u := openUDP(t, w, UDPOptions{})
	ds := datagrams(8)
	shed := uint64(0)
	for i, k := range []struct{ local, remote string }{{"10.9.0.1:4500", "10.9.0.2:1111"}, {"[fd09::1]:4500", "[fd09::2]:1111"}} {
		c := l.listenUDP(k.remote)
		for _, long := range []bool{false, true, false} {
			for _, p := range []string{"one", "two", "three", "\x00\x00\x00\x00IKE"} {
				if _, err := c.WriteToUDPAddrPort([]byte(p), netip.MustParseAddrPort(k.local)); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(stale + time.Millisecond) // that is what it waits for
			want := 4
			if long {
				want, shed = 1, shed+3
			}
			got := 0
			for ike := false; !ike; ike = ds[got-1].isIKE() {
				u.socks[i].aged = time.Time{}
				if long {
					u.socks[i].aged = time.Now().Add(-time.Hour)
				}
				n, err := u.ReadBatch(ds[got:])
				if got += n; err != nil {
					t.Fatal(err)
				}
			}
			if got != want || u.Stats().Shed != shed {
				t.Errorf("%s, long %v: got %d, and %d shed; want %d, %d", k.local, long, got, u.Stats().Shed, want, shed)
			}
		}
		c.Close()
	}
}

// Messages that come alone and are read late each time are no queue.
func TestLateAlone(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	u := openUDP(t, w, UDPOptions{})
	ds := datagrams(8)
	c := l.listenUDP("10.9.0.2:1111")
	for range 3 {
		if _, err := c.WriteToUDPAddrPort([]byte("one"), netip.MustParseAddrPort("10.9.0.1:4500")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(stale + staleFor) // that is what it waits for
		if n, err := u.ReadBatch(ds); n != 1 || err != nil {
			t.Fatalf("read %d, %v; want 1", n, err)
		}
	}
	if n := u.Stats().Shed; n != 0 {
		t.Errorf("%d shed", n)
	}
}
