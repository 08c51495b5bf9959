package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/internal/nstest"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

func openWire(t testing.TB) *Wire {
	t.Helper()
	w, err := Open("e0", Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func prefixes(ss ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range ss {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func divert(t testing.TB, w *Wire) {
	t.Helper()
	if err := w.SetDivert(prefixes("10.9.0.2/32", "172.16.0.0/12"), prefixes("fd09::2/128", "2001:db8::/32")); err != nil {
		t.Fatal(err)
	}
}

// pump reads into a channel until w is closed.
func pump(w *Wire) <-chan []byte {
	c := make(chan []byte, 1000)
	go func() {
		defer close(c)
		ps := make([]Packet, 16)
		for i := range ps {
			ps[i] = Packet{Buf: make([]byte, 70000), Off: 64}
		}
		for {
			n, err := w.ReadBatch(ps)
			if err != nil {
				return
			}
			for _, p := range ps[:n] {
				c <- bytes.Clone(p.Buf[p.Off : p.Off+p.Len])
			}
		}
	}()
	return c
}

func expect(t *testing.T, c <-chan []byte, what string, want func(b []byte) bool) {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		select {
		case b, ok := <-c:
			if !ok {
				t.Fatalf("%s: the reader ended", what)
			}
			if want(b) {
				return
			}
		case <-limit:
			t.Fatalf("%s: did not reach the reader", what)
		}
	}
}

// none fails if the reader got anything that bad says yes to.
func none(t *testing.T, c <-chan []byte, what string, bad func(b []byte) bool) {
	t.Helper()
	for {
		select {
		case b := <-c:
			if bad(b) {
				t.Fatalf("%s: reached the reader: % x", what, b)
			}
		default:
			return
		}
	}
}

// rawPeer sends IP packets with their own headers from the peer.
func (l *lab) rawPeer() func(b []byte) {
	var fd4, fd6 int
	var err4, err6 error
	l.at(func() {
		fd4, err4 = unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		fd6, err6 = unix.Socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_RAW)
	})
	if err := errors.Join(err4, err6, unix.SetsockoptInt(fd6, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL, 1)); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { unix.Close(fd4); unix.Close(fd6) })
	return func(b []byte) {
		var err error
		if b[0]>>4 == 4 {
			err = unix.Sendto(fd4, b, 0, &unix.SockaddrInet4{Addr: [4]byte(b[16:20])})
		} else {
			err = unix.Sendto(fd6, b, 0, &unix.SockaddrInet6{Addr: [16]byte(b[24:40])})
		}
		if err != nil {
			l.t.Fatal(err)
		}
	}
}

// ipPacket builds an IP packet; the payload begins behind the base header.
func ipPacket(src, dst string, proto uint8, payload []byte) []byte {
	s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	if s.Is4() {
		b := append(make([]byte, 20), payload...)
		b[0], b[8], b[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		copy(b[12:], s.AsSlice())
		copy(b[16:], d.AsSlice())
		binary.BigEndian.PutUint16(b[10:], ^sum16(0, b[:20]))
		return b
	}
	b := append(make([]byte, 40), payload...)
	b[0], b[6], b[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], s.AsSlice())
	copy(b[24:], d.AsSlice())
	return b
}

// udpPayload is a UDP datagram without checksum (IPv6: with).
func udpPayload(src, dst string, sport, dport uint16, data string) []byte {
	u := append(make([]byte, 8), data...)
	binary.BigEndian.PutUint16(u, sport)
	binary.BigEndian.PutUint16(u[2:], dport)
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	if s.Is6() {
		sum := sum32(s.AsSlice()) + sum32(d.AsSlice()) + 17 + uint64(len(u))
		binary.BigEndian.PutUint16(u[6:], ^sum16(sum, u))
	}
	return u
}

// state is all that Close must leave as it was.
func state(t testing.TB) string {
	return sh(t, "nft list ruleset; ip -br addr; ip route show table all; ip -6 route show table all; cat /proc/sys/net/ipv4/conf/*/rp_filter; ls "+Dir)
}

func TestDivert(t *testing.T) {
	l := newLab(t)
	before := state(t)
	w := openWire(t)
	c := pump(w)
	ping := func(line string) bool { return exec.Command("sh", "-c", "ip netns exec "+l.peer+" "+line).Run() == nil }
	if !ping("ping -c1 -W20 -I 10.9.0.2 10.9.0.1") || !ping("ping -c1 -W20 -I fd09::2 fd09::1") {
		t.Fatal("no ping before divert")
	}
	divert(t, w)
	for _, p := range []struct {
		line string
		want bool
	}{
		{"ping -c1 -W1 -I 10.9.0.2 10.9.0.1", false},
		{"ping -c1 -W1 -I fd09::2 fd09::1", false},
		{"ping -c1 -W20 -I 10.9.0.3 10.9.0.1", true},
		{"ping -c1 -W20 -I fd09::3 fd09::1", true},
		{"ping -c1 -W20 -s 4000 -I 10.9.0.3 10.9.0.1", true},
	} {
		if got := ping(p.line); got != p.want {
			t.Errorf("%s: got %v, want %v", p.line, got, p.want)
		}
	}
	expect(t, c, "diverted IPv4 ping", func(b []byte) bool { return b[0]>>4 == 4 && b[9] == 1 && b[15] == 2 })
	expect(t, c, "diverted IPv6 ping", func(b []byte) bool { return b[0]>>4 == 6 && b[6] == 58 && b[23] == 2 && b[40] == 128 })
	none(t, c, "packet of another source", func(b []byte) bool {
		return b[0]>>4 == 4 && b[15] == 3 || b[0]>>4 == 6 && (b[23] == 3 || b[40] == 135 || b[40] == 136)
	})
	// Fragments of a diverted source.
	ping("ping -c1 -W1 -s 4000 -I 10.9.0.2 10.9.0.1")
	for i := range 3 {
		expect(t, c, "fragment", func(b []byte) bool {
			return b[0]>>4 == 4 && int(binary.BigEndian.Uint16(b[6:])&0x1fff) == i*185
		})
	}
	if err := w.SetDivert(nil, nil); err != nil {
		t.Fatal(err)
	}
	if !ping("ping -c1 -W20 -I 10.9.0.2 10.9.0.1") {
		t.Error("no ping after the divert set was emptied")
	}
	if s := w.Stats(); s.Read == 0 || s.KernelDrops != 0 {
		t.Errorf("stats: %+v", s)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if after := state(t); after != before {
		t.Errorf("Close left\n%s\nwant\n%s", after, before)
	}
}

// ESP and AH for us, whole and in fragments, from anybody: the stack would
// answer "protocol unreachable" (IPv4) or "parameter problem" (IPv6).
func TestIPsecIsKeptFromStack(t *testing.T) {
	l := newLab(t)
	send := l.rawPeer()
	var icmp4, icmp6 int
	l.at(func() {
		icmp4, _ = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMP)
		icmp6, _ = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMPV6)
	})
	defer unix.Close(icmp4)
	defer unix.Close(icmp6)
	// complaints counts what came; the last ping is the fence behind them.
	complaints := func() (n int) {
		l.sh("ping -c1 -W20 10.9.0.1 >/dev/null; ping -c1 -W20 fd09::1 >/dev/null")
		buf := make([]byte, 2000)
		for {
			k, _, err := unix.Recvfrom(icmp4, buf, 0)
			if err != nil {
				break
			}
			if k > 20 && buf[20] == 3 {
				n++
			}
		}
		for {
			k, _, err := unix.Recvfrom(icmp6, buf, 0)
			if err != nil {
				break
			}
			if k > 0 && (buf[0] == 1 || buf[0] == 4) {
				n++
			}
		}
		return n
	}
	spi := []byte{0, 0, 1, 2, 0, 0, 0, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9}
	ah := append([]byte{59, 4, 0, 0}, spi...)
	frag := func(next byte, off int, more byte) []byte {
		h := []byte{next, 0, 0, 0, 0, 0, 0, 7}
		binary.BigEndian.PutUint16(h[2:], uint16(off)|uint16(more))
		return append(h, spi...)
	}
	later := ipPacket("10.9.0.3", "10.9.0.1", 50, spi)
	binary.BigEndian.PutUint16(later[4:], 77)
	binary.BigEndian.PutUint16(later[6:], 24/8)
	packets := map[string][]byte{
		"ESP":                       ipPacket("10.9.0.3", "10.9.0.1", 50, spi),
		"AH":                        ipPacket("10.9.0.3", "10.9.0.1", 51, ah),
		"ESP, later fragment":       later,
		"IPComp":                    ipPacket("10.9.0.3", "10.9.0.1", 108, append([]byte{17, 0, 0, 2}, spi...)),
		"IPComp, IPv6":              ipPacket("fd09::3", "fd09::1", 108, append([]byte{17, 0, 0, 2}, spi...)),
		"IPComp, IPv6, options":     ipPacket("fd09::3", "fd09::1", 60, append([]byte{108, 0, 1, 4, 0, 0, 0, 0, 17, 0, 0, 2}, spi...)),
		"IPComp, later fragment":    ipPacket("fd09::3", "fd09::1", 44, frag(108, 24, 0)),
		"ESP, IPv6":                 ipPacket("fd09::3", "fd09::1", 50, spi),
		"AH, IPv6":                  ipPacket("fd09::3", "fd09::1", 51, ah),
		"ESP, IPv6, first fragment": ipPacket("fd09::3", "fd09::1", 44, frag(50, 0, 1)),
		"ESP, IPv6, later fragment": ipPacket("fd09::3", "fd09::1", 44, frag(50, 24, 0)),
		"AH, IPv6, later fragment":  ipPacket("fd09::3", "fd09::1", 44, frag(51, 24, 0)),
		"ESP, IPv6, after options":  ipPacket("fd09::3", "fd09::1", 60, append([]byte{50, 0, 1, 4, 0, 0, 0, 0}, spi...)),
	}
	send(packets["ESP"])
	send(packets["ESP, IPv6"])
	if n := complaints(); n != 2 {
		t.Fatalf("control without missiu: got %d complaints, want 2", n)
	}
	w := openWire(t)
	c := pump(w)
	for name, p := range packets {
		send(p)
		expect(t, c, name, func(b []byte) bool {
			b = b[:min(len(b), len(p))]
			if b[0]>>4 == 4 { // the sending kernel chooses an identification
				return bytes.Equal(b[6:10], p[6:10]) && bytes.Equal(b[12:], p[12:])
			}
			return bytes.Equal(b, p)
		})
	}
	if n := complaints(); n != 0 {
		t.Errorf("got %d complaints, want 0", n)
	}
	w.SetDivert(prefixes("10.9.0.3/32"), nil)
	send(ipPacket("10.9.0.3", "10.9.0.99", 50, spi)) // not for us, but diverted by its source
}

// IKE of a diverted source reaches ordinary sockets; other ports do not.
func TestIKEPasses(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	divert(t, w)
	c := pump(w)
	send := l.rawPeer()
	for _, f := range []struct{ net, src, dst string }{{"udp4", "10.9.0.2", "10.9.0.1"}, {"udp6", "fd09::2", "fd09::1"}} {
		for _, port := range []uint16{500, 4500, 501} {
			s, err := net.ListenUDP(f.net, net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(f.dst), port)))
			if err != nil {
				t.Fatal(err)
			}
			send(ipPacket(f.src, f.dst, 17, udpPayload(f.src, f.dst, 500, port, "hello")))
			if port == 501 {
				expect(t, c, f.net+" 501", func(b []byte) bool { return bytes.Contains(b, []byte("hello")) })
				s.SetReadDeadline(time.Now())
			} else {
				s.SetReadDeadline(time.Now().Add(time.Minute))
			}
			n, _, err := s.ReadFrom(make([]byte, 100))
			if (err == nil && n == 5) != (port != 501) {
				t.Errorf("%s %d: socket got %d octets, %v", f.net, port, n, err)
			}
			s.Close()
		}
	}
	none(t, c, "IKE", func(b []byte) bool { return bytes.Contains(b, []byte("hello")) })
}

// A clear TCP stream of a diverted peer comes as super-frames with unfinished
// checksums; written to a TAP with the metadata it reaches the stack whole.
func TestOffloadToTAP(t *testing.T) {
	for _, mode := range []string{tap.OffloadAuto, tap.OffloadNone} {
		t.Run(mode, func(t *testing.T) { testOffloadToTAP(t, mode) })
	}
}

func testOffloadToTAP(t *testing.T, mode string) {
	l := newLab(t)
	w := openWire(t)
	divert(t, w)
	d, err := tap.Open(tap.Options{For: "e0", MAC: w.Link().MAC, Offload: mode, Up: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		d.Persist(false)
		d.Close()
	}()
	go func() { // deliver as the engine does
		ps := make([]Packet, 16)
		for i := range ps {
			ps[i] = Packet{Buf: make([]byte, 70000), Off: 64}
		}
		for {
			n, err := w.ReadBatch(ps)
			if err != nil {
				return
			}
			for _, p := range ps[:n] {
				copy(p.Buf[p.Off-14:], d.MAC())
				d.WriteBatch([]tap.Frame{{Buf: p.Buf, Off: p.Off - 14, Len: p.Len + 14, Offload: p.Offload}})
			}
		}
	}()
	for _, addr := range []string{"10.9.0.1:7000", "[fd09::1]:7000"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		const total = 8 << 20
		go l.at(func() {
			c, err := net.DialTimeout("tcp", addr, time.Minute)
			if err != nil {
				t.Error(err)
				ln.Close()
				return
			}
			c.Write(make([]byte, total))
			c.Close()
		})
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(2 * time.Minute))
		buf, got := make([]byte, 1<<16), 0
		for {
			n, err := c.Read(buf)
			got += n
			if err != nil {
				break
			}
		}
		if got != total {
			t.Errorf("%s: got %d octets, want %d; %+v", addr, got, total, w.Stats())
		}
		c.Close()
	}
}

// Packets leave by the interface although routes for their destinations lead
// into a TAP; our own reader does not see them.
func TestWriteBatch(t *testing.T) {
	l := newLab(t)
	w := openNative(t, NativeRaw) // the only way that the host's packet filter sees
	divert(t, w)
	c := pump(w)
	sh(t, `ip tuntap add mi-tap mode tap; ip link set mi-tap up
		ip route add 10.9.0.2/32 dev mi-tap; ip -6 route add fd09::2/128 dev mi-tap`)
	defer sh(t, "ip link del mi-tap")
	ll := l.sh("ip -6 -o addr show dev e1 scope link | awk \"{print \\$4}\" | cut -d/ -f1")
	var conns []net.PacketConn
	l.at(func() {
		for _, a := range []string{"10.9.0.2:9", "[fd09::2]:9", "[" + ll + "%e1]:9", "[ff02::fb%e1]:10", "224.0.0.251:10"} {
			ap, err := net.ResolveUDPAddr("udp", a)
			if err != nil {
				t.Fatal(err)
			}
			var s net.PacketConn
			if ap.IP.IsMulticast() {
				ifi, err := net.InterfaceByName("e1")
				if err != nil {
					t.Fatal(err)
				}
				s, err = net.ListenMulticastUDP("udp", ifi, ap)
				if err != nil {
					t.Fatal(err)
				}
			} else if s, err = net.ListenUDP("udp", ap); err != nil {
				t.Fatal(err)
			}
			conns = append(conns, s)
		}
	})
	from6 := w.Link().Addrs
	var mine string
	for _, p := range from6 {
		if p.Addr().IsLinkLocalUnicast() {
			mine = p.Addr().String()
		}
	}
	if mine == "" {
		mine = "fd09::1"
	}
	pk := func(b []byte) Packet { return Packet{Buf: append(make([]byte, 32), b...), Off: 32, Len: len(b)} }
	ps := []Packet{
		pk(ipPacket("10.9.0.1", "10.9.0.2", 17, udpPayload("10.9.0.1", "10.9.0.2", 1, 9, "one"))),
		pk(ipPacket("fd09::1", "fd09::2", 17, udpPayload("fd09::1", "fd09::2", 1, 9, "two"))),
		pk(ipPacket(mine, ll, 17, udpPayload(mine, ll, 1, 9, "three"))),
		pk(ipPacket(mine, "ff02::fb", 17, udpPayload(mine, "ff02::fb", 1, 10, "four"))),
		pk(ipPacket("10.9.0.1", "224.0.0.251", 17, udpPayload("10.9.0.1", "224.0.0.251", 1, 10, "five"))),
	}
	if n, err := w.WriteBatch(ps); n != len(ps) || err != nil {
		t.Fatalf("got %d, %v, want %d", n, err, len(ps))
	}
	for i, want := range []string{"one", "two", "three", "four", "five"} {
		buf := make([]byte, 100)
		conns[i].SetReadDeadline(time.Now().Add(time.Minute))
		n, _, err := conns[i].ReadFrom(buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("%v: got %q, %v, want %q", conns[i].LocalAddr(), buf[:n], err, want)
		}
		conns[i].Close()
	}
	none(t, c, "our own packet", func(b []byte) bool { return bytes.Contains(b, []byte("one")) || bytes.Contains(b, []byte("two")) })

	// One packet refused does not touch its neighbours.
	ps = []Packet{ps[0], pk(ipPacket("10.9.0.1", "10.9.0.2", 17, make([]byte, 2000))), ps[0], pk([]byte("junk that is no packet")), ps[0]}
	n, err := w.WriteBatch(ps)
	if n != 1 || !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("long packet: got %d, %v, want 1, EMSGSIZE", n, err)
	}
	n, err = w.WriteBatch(ps[2:])
	if n != 1 || !errors.Is(err, unix.EINVAL) {
		t.Errorf("junk: got %d, %v, want 1, EINVAL", n, err)
	}
	sh(t, "nft add table ip f; nft add chain ip f o \"{ type filter hook output priority 0; }\"; nft add rule ip f o ip daddr 10.9.0.2 drop")
	n, err = w.WriteBatch(ps[:1])
	if n != 0 || !errors.Is(err, unix.EPERM) {
		t.Errorf("firewall: got %d, %v, want 0, EPERM", n, err)
	}
	sh(t, "nft delete table ip f")
	if s := w.Stats(); s.Sent != 7 || s.SendTooBig != 1 || s.SendDenied != 1 || s.SendOther != 1 {
		t.Errorf("stats: %+v", s)
	}
}

func TestPathMTU(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	peer4, peer6 := netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd09::2")
	check := func(what string, a netip.Addr, want int) {
		t.Helper()
		if got := w.PathMTU(a); got != want {
			t.Errorf("%s: got %d, want %d", what, got, want)
		}
	}
	check("link", peer4, 1500)
	check("link", peer6, 1500)
	sh(t, "ip route add 10.9.7.0/24 dev e0 mtu 1400; ip -6 route add fd09:7::/64 dev e0 mtu 1410")
	check("route", netip.MustParseAddr("10.9.7.1"), 1400)
	check("route", netip.MustParseAddr("fd09:7::1"), 1410)
	w.SetPathMTU(peer4, 1300)
	check("learnt", peer4, 1300)
	w.SetPathMTU(peer4, 68)
	check("floor", peer4, 576)
	w.SetPathMTU(peer6, 68)
	check("floor", peer6, 1280)
	if got := w.pathMTU(peer4, time.Now().Add(pathMTUAge+time.Second)); got != 1500 {
		t.Errorf("after ten minutes: got %d, want 1500", got)
	}
	// A router's complaint, heard by the reader on its way to the stack.
	w.VerifyTooBig(func(q TooBig) bool { return q.SPI == 0x102 })
	c := pump(w)
	send := l.rawPeer()
	quote := func(spi byte) []byte {
		q := ipPacket("10.9.0.1", "10.9.0.9", 50, append([]byte{0, 0, 1, spi, 0, 0, 0, 9}, make([]byte, 20)...))
		binary.BigEndian.PutUint16(q[2:], 1500)
		m := append([]byte{3, 4, 0, 0, 0, 0, 0x05, 0x00}, q[:28]...)
		binary.BigEndian.PutUint16(m[2:], ^sum16(0, m))
		return ipPacket("10.9.0.3", "10.9.0.1", 1, m)
	}
	send(quote(3))
	send(quote(2))
	send(ipPacket("10.9.0.3", "10.9.0.1", 50, make([]byte, 24))) // the fence
	expect(t, c, "fence", func(b []byte) bool { return b[9] == 50 })
	check("ICMP", netip.MustParseAddr("10.9.0.9"), 0x500)
	if s := w.Stats(); s.TooBig != 1 || s.TooBigOdd != 1 {
		t.Errorf("stats: %+v", s)
	}
	sh(t, "ip link set e0 mtu 1200")
	for l := range w.Changes() {
		if l.MTU == 1200 {
			break
		}
	}
	check("link", netip.MustParseAddr("10.9.0.77"), 1200)
}

func TestFollowsAddresses(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	c := pump(w)
	added := netip.MustParseAddr("10.9.0.50")
	sh(t, "ip addr add 10.9.0.50/24 dev e0")
	nstest.Until(t, "the address to be noticed", func() bool { return w.IsLocal(added) })
	l.rawPeer()(ipPacket("10.9.0.3", "10.9.0.50", 50, make([]byte, 24)))
	expect(t, c, "ESP to a new address", func(b []byte) bool { return b[9] == 50 && b[19] == 50 })
	if got := sh(t, "nft list set netdev "+tableName("e0")+" local4"); !strings.Contains(got, "10.9.0.50") {
		t.Errorf("set: %s", got)
	}
}

func TestLostInterface(t *testing.T) {
	for _, k := range []struct{ line, want string }{
		{"ip link del e0", "interface e0: deleted"},
		{"ip link set e0 down; ip link set e0 name e9", "interface e0: renamed to e9"},
	} {
		t.Run(k.want, func(t *testing.T) { testLost(t, k.line, k.want) })
	}
}

func testLost(t *testing.T, line, want string) {
	newLab(t)
	w := openWire(t)
	done := make(chan error)
	go func() {
		_, err := w.ReadBatch([]Packet{{Buf: make([]byte, 2000), Off: 64}})
		done <- err
	}()
	sh(t, line)
	err := <-done
	if lost := (*LinkError)(nil); !errors.As(err, &lost) || err.Error() != want || !errors.Is(err, unix.ENODEV) {
		t.Errorf("%s: got %v, want %s", line, err, want)
	}
	if err := w.Close(); err != nil {
		t.Errorf("%s: Close: %v", line, err)
	}
}

// Down and up again is no loss, and the reader does not spin meanwhile: it takes
// note of the error that would end each of its waits.
func TestDownUp(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	c := pump(w)
	sh(t, "ip link set e0 down")
	quiet := func() bool {
		var fds []unix.PollFd
		w.reader.raw.Control(func(fd uintptr) {
			fds = []unix.PollFd{{Fd: int32(fd)}}
			unix.Poll(fds, 0)
		})
		return fds[0].Revents == 0
	}
	if !until(func() bool { time.Sleep(time.Millisecond); return quiet() }) {
		t.Error("the reader does not take note of the interface being down")
	}
	sh(t, "ip link set e0 up")
	l.sh("ping -c1 -w30 -i0.2 10.9.0.1 >/dev/null")
	l.rawPeer()(ipPacket("10.9.0.3", "10.9.0.1", 50, make([]byte, 24)))
	expect(t, c, "ESP after down and up", func(b []byte) bool { return b[9] == 50 })
}
