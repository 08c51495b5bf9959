package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var natives = []string{NativeXDP, NativePacket, NativeRaw}

func openNative(t testing.TB, native string) *Wire {
	t.Helper()
	w, err := Open("e0", Options{Native: native})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// by is how many packets left the way of the mode.
func by(w *Wire, native string) uint64 {
	s := w.Stats()
	switch native {
	case NativeXDP:
		return s.SentXDP
	case NativePacket:
		return s.SentPacket
	}
	return s.Sent - s.SentXDP - s.SentPacket
}

// What has left one way is part of all that has left, also while packets leave.
func TestStatsMeanwhile(t *testing.T) {
	var w Wire
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 100_000 {
			w.sender.ok.Add(1)
			w.sender.byXDP.Add(1)
		}
	}()
	for {
		select {
		case <-done:
			return
		default:
		}
		if s := w.Stats(); s.SentXDP > s.Sent {
			t.Fatalf("%d by AF_XDP, %d in all", s.SentXDP, s.Sent)
		}
	}
}

func wayOut(w *Wire) string {
	_, out := w.Path()
	return out
}

// listener receives protocol 253 at the peer, whole IP packets.
type listener struct {
	t      testing.TB
	fd     int
	family int
}

func (l *lab) listen(family int) *listener {
	l.t.Helper()
	fd := -1
	var err error
	l.at(func() {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(htons(map[int]uint16{4: unix.ETH_P_IP, 6: unix.ETH_P_IPV6}[family])))
	})
	if err != nil {
		l.t.Fatal(err)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30})
	l.t.Cleanup(func() { unix.Close(fd) })
	return &listener{l.t, fd, family}
}

// next returns the next packet of protocol 253, nil after half a minute without.
func (l *listener) next() []byte {
	l.t.Helper()
	buf := make([]byte, 70000)
	for {
		n, from, err := unix.Recvfrom(l.fd, buf, 0)
		if err == unix.EINTR || err == nil && from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OTHERHOST {
			continue
		}
		if err != nil {
			return nil
		}
		if b := buf[:n]; l.family == 4 && b[9] == 253 || l.family == 6 && (b[6] == 253 || b[6] == protoFragment) {
			return b
		}
	}
}

// numbered is an IP packet of protocol 253 whose payload begins with its number.
func numbered(src, dst string, k, n int) Packet {
	p := make([]byte, n)
	binary.BigEndian.PutUint32(p, uint32(k))
	b := ipPacket(src, dst, 253, p)
	return Packet{Buf: append(make([]byte, 40), b...), Off: 40, Len: len(b)}
}

// warm sends single packets until one takes the way of the mode, and has the
// peer forget what it received.
func warm(t testing.TB, w *Wire, l *listener, native, src, dst string) {
	t.Helper()
	before := by(w, native)
	for deadline := time.Now().Add(time.Minute); by(w, native) == before; {
		if time.Now().After(deadline) {
			select {
			case f := <-w.Fallbacks():
				t.Error(f)
			default:
			}
			t.Fatalf("%s to %s: never, %+v, %s", native, dst, w.Stats(), wayOut(w))
		}
		w.WriteBatch([]Packet{numbered(src, dst, 1<<20, 8)})
		time.Sleep(2 * time.Millisecond)
	}
	w.WriteBatch([]Packet{numbered(src, dst, 1<<21, 8)})
	for {
		b := l.next()
		if b == nil {
			t.Fatalf("%s to %s: nothing arrives", native, dst)
		}
		if binary.BigEndian.Uint32(b[len(b)-8:]) == 1<<21 {
			return
		}
	}
}

// Each way carries batches in order and whole, to neighbours and through
// gateways of either family; and every way refuses what is too long.
func TestNative(t *testing.T) {
	for _, native := range natives {
		t.Run(native, func(t *testing.T) {
			l := newLab(t)
			sh(t, "ip route add 10.77.0.0/16 via 10.9.0.2; ip -6 route add fd77::/64 via fd09::2; ip route add 10.78.0.0/16 via inet6 fd09::3 dev e0")
			w := openNative(t, native)
			for _, k := range []struct {
				family   int
				src, dst string
			}{{4, "10.9.0.1", "10.9.0.2"}, {6, "fd09::1", "fd09::2"}, {4, "10.9.0.1", "10.77.1.1"}, {6, "fd09::1", "fd77::1"}, {4, "10.9.0.1", "10.78.0.1"}} {
				in := l.listen(k.family)
				warm(t, w, in, native, k.src, k.dst)
				before := w.Stats()
				var ps []Packet
				for i := range 1000 { // more than fits rings and messages at once
					ps = append(ps, numbered(k.src, k.dst, i, 8+i))
				}
				for i, p := range ps { // made by the sender
					if b := p.Buf[p.Off:]; k.family == 4 && i%2 == 0 {
						b[10]++
					}
				}
				if n, err := w.WriteBatch(ps); n != len(ps) || err != nil {
					t.Fatalf("%s: got %d, %v, want %d", k.dst, n, err, len(ps))
				}
				zero := 0 // the kernel's counter of identifications comes past 0, once in 65536
				for i, p := range ps {
					b, head := in.next(), 20
					if k.family == 6 {
						head = 40
					}
					want := p.Buf[p.Off : p.Off+p.Len]
					if b == nil || !bytes.Equal(b[head:], want[head:]) || !bytes.Equal(b[head-8:head], want[head-8:head]) {
						t.Fatalf("%s: packet %d: got % x, want % x", k.dst, i, b, want)
					}
					if k.family == 4 && b[4] == 0 && b[5] == 0 {
						zero++
					}
					if k.family == 4 && (sum16(0, b[:20]) != 0xffff || zero > 1) {
						t.Fatalf("%s: packet %d: header % x", k.dst, i, b[:20])
					}
				}
				after := w.Stats()
				if got := after.Sent - before.Sent; got != 1000 {
					t.Errorf("%s: counted %d, want 1000", k.dst, got)
				}
				sent := map[string]uint64{NativeXDP: after.SentXDP - before.SentXDP, NativePacket: after.SentPacket - before.SentPacket}
				sent[NativeRaw] = 1000 - sent[NativeXDP] - sent[NativePacket]
				if sent[native] != 1000 {
					t.Errorf("%s: sent %v, want all by %s", k.dst, sent, native)
				}
				long := numbered(k.src, k.dst, 1, 1481)
				if n, err := w.WriteBatch([]Packet{ps[0], long, ps[1]}); n != 1 || !errors.Is(err, unix.EMSGSIZE) {
					t.Errorf("%s: too long: got %d, %v, want 1, EMSGSIZE", k.dst, n, err)
				}
				in.next()
			}
			// Fragments are packets like others, with their sender's identification.
			in4 := l.listen(4)
			f := numbered("10.9.0.1", "10.9.0.2", 5, 800)
			copy(f.Buf[f.Off+4:], []byte{0xab, 0xcd, 0x20, 0x32}) // MF, offset 400
			w.WriteBatch([]Packet{f})
			if b := in4.next(); b == nil || !bytes.Equal(b[4:8], f.Buf[f.Off+4:f.Off+8]) || len(b) != 820 || sum16(0, b[:20]) != 0xffff {
				t.Errorf("fragment: got % x", b)
			}
			// DF: the identification means nothing and stays 0.
			in := l.listen(4)
			p := numbered("10.9.0.1", "10.9.0.2", 5, 8)
			p.Buf[p.Off+6] = 0x40
			w.WriteBatch([]Packet{p})
			if b := in.next(); b == nil || b[4] != 0 || b[5] != 0 || b[6] != 0x40 || sum16(0, b[:20]) != 0xffff {
				t.Errorf("DF: got % x", b)
			}
		})
	}
}

// Destinations that are not for one neighbour go by raw sockets in every mode.
func TestNativeOdd(t *testing.T) {
	l := newLab(t)
	sh(t, "ip route add blackhole 10.66.0.0/16; ip route add 10.67.0.0/16 dev lo; ip addr add 10.9.0.44/24 dev e0")
	w := openNative(t, NativeXDP)
	warm(t, w, l.listen(4), NativeXDP, "10.9.0.1", "10.9.0.2")
	before := w.Stats().SentXDP
	for _, dst := range []string{"10.9.0.255", "255.255.255.255", "224.0.0.251", "10.9.0.44", "10.66.0.1", "ff02::fb", "::1", "127.0.0.1", "0.0.0.0"} {
		src := "10.9.0.1"
		if netip.MustParseAddr(dst).Is6() {
			src = "fd09::1"
		}
		for range 3 {
			w.WriteBatch([]Packet{numbered(src, dst, 1, 8)})
			time.Sleep(20 * time.Millisecond) // the answer about the route may come
		}
	}
	for _, odd := range []func(b []byte){
		func(b []byte) { clear(b[12:16]) },   // the kernel chooses the source
		func(b []byte) { b[3]++ },            // longer than it is
		func(b []byte) { b[0] = 0x44 },       // too short a header
		func(b []byte) { b[0] = 0x4f },       // longer than the packet
		func(b []byte) { clear(b[16:20]) },   // no destination
		func(b []byte) { b[0] = 0x55 },       // no version
		func(b []byte) { copy(b, b[20:40]) }, // noise
	} {
		p := numbered("10.9.0.1", "10.9.0.2", 1, 20)
		odd(p.Buf[p.Off:])
		w.WriteBatch([]Packet{p})
	}
	if n := w.Stats().SentXDP - before; n != 0 {
		t.Errorf("%d packets by AF_XDP, want 0", n)
	}
}

// An unknown neighbour is asked for, a new address of a known one is used, and
// one that is gone takes no packets.
func TestNativeNeighbour(t *testing.T) {
	for _, native := range natives[:2] {
		t.Run(native, func(t *testing.T) {
			l := newLab(t)
			w := openNative(t, native)
			in := l.listen(4)
			warm(t, w, in, native, "10.9.0.1", "10.9.0.2")
			arrives := func(what string) {
				t.Helper()
				for i, deadline := 0, time.Now().Add(time.Minute); ; i++ {
					w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", i, 8)})
					unix.SetsockoptTimeval(in.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000})
					if b := in.next(); b != nil {
						break
					}
					if time.Now().After(deadline) {
						t.Fatalf("%s: nothing arrives; %+v", what, w.Stats())
					}
				}
				unix.SetsockoptTimeval(in.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30})
				for l.drain(in) > 0 {
				}
				warm(t, w, in, native, "10.9.0.1", "10.9.0.2")
			}
			// The peer gets another address, and says so.
			l.sh("ip link set e1 address 02:00:00:00:00:77; arping -q -U -c1 -I e1 10.9.0.2 || ping -c1 -W1 10.9.0.1 >/dev/null")
			arrives("another address")
			sh(t, "ip neigh flush dev e0")
			arrives("neighbours flushed")
			sh(t, "ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:88 dev e0 nud permanent")
			before := w.Stats()
			if !until(func() bool {
				w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, 8)})
				return l.drain(in) == 0
			}) {
				t.Error("a permanent entry of the administrator does not count")
			}
			sh(t, "ip neigh del 10.9.0.2 dev e0")
			arrives("entry deleted")
			// A peer that has changed without a word is found again, as the
			// kernel learns of our packets: STALE, DELAY, PROBE, FAILED.
			sh(t, "sysctl -qw net.ipv4.neigh.e0.delay_first_probe_time=1 net.ipv4.neigh.e0.retrans_time_ms=100")
			l.sh("nft add table arp f; nft add chain arp f o \"{ type filter hook output priority 0; policy drop; }\"; ip link set e1 address 02:00:00:00:00:99; nft delete table arp f")
			sh(t, "ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:77 dev e0 nud stale")
			arrives("changed without a word")
			if w.Stats().Sent == before.Sent {
				t.Error("nothing sent")
			}
			// Routes: another gateway, then none.
			sh(t, "ip route add 10.77.0.0/16 via 10.9.0.2")
			warm(t, w, in, native, "10.9.0.1", "10.77.0.1")
			sh(t, "ip route replace 10.77.0.0/16 via 10.9.0.250")
			if !until(func() bool {
				w.WriteBatch([]Packet{numbered("10.9.0.1", "10.77.0.1", 1, 8)})
				return l.drain(in) == 0
			}) {
				t.Error("the old gateway is still used")
			}
			sh(t, "ip route replace 10.77.0.0/16 via 10.9.0.3")
			warm(t, w, in, native, "10.9.0.1", "10.77.0.1")
		})
	}
}

// drain returns how many packets wait, after those on their way have come.
func (l *lab) drain(in *listener) int {
	time.Sleep(5 * time.Millisecond)
	n, buf := 0, make([]byte, 2000)
	for {
		k, from, err := unix.Recvfrom(in.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			return n
		}
		if from.(*unix.SockaddrLinklayer).Pkttype != unix.PACKET_OTHERHOST && k > 20 && buf[9] == 253 {
			n++
		}
	}
}

func until(f func() bool) bool {
	for deadline := time.Now().Add(time.Minute); !f(); {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// Without carrier the driver drops what it gets: that is counted, holds nobody
// up, and ends with the carrier's return. A sender with a slow device tries
// again by itself.
func TestNativeDrops(t *testing.T) {
	l := newLab(t)
	w := openNative(t, NativeXDP)
	in := l.listen(4)
	warm(t, w, in, NativeXDP, "10.9.0.1", "10.9.0.2")
	sh(t, "ip neigh replace 10.9.0.2 lladdr $(ip neigh show 10.9.0.2 dev e0 | awk '{print $3}') dev e0 nud permanent")
	l.sh("ip link set e1 down")
	var ps []Packet
	for i := range 100 {
		ps = append(ps, numbered("10.9.0.1", "10.9.0.2", i, 8))
	}
	if !until(func() bool {
		before := w.Stats().SendNoBufs
		w.WriteBatch(ps)
		return w.Stats().SendNoBufs-before == 100
	}) {
		t.Errorf("100 packets without carrier: %+v", w.Stats())
	}
	l.sh("ip link set e1 up")
	warm(t, w, in, NativeXDP, "10.9.0.1", "10.9.0.2")

	s := &w.sender
	s.mu.Lock()
	slow := true
	s.xdp.wake = func(fd int) syscall.Errno {
		if slow {
			return unix.EAGAIN
		}
		return wakeXDP(fd)
	}
	s.mu.Unlock()
	if n, err := w.WriteBatch(ps[:7]); n != 7 || err != nil {
		t.Errorf("slow device: got %d, %v, want 7", n, err)
	}
	if got := l.drain(in); got != 0 {
		t.Errorf("%d packets came from a device that has sent none", got)
	}
	s.mu.Lock()
	slow = false
	s.mu.Unlock()
	for i := range 7 {
		if b := in.next(); b == nil || binary.BigEndian.Uint32(b[20:]) != uint32(i) {
			t.Fatalf("packet %d: got % x", i, b)
		}
	}
	// More than the ring holds waits for nobody.
	s.mu.Lock()
	slow = true
	s.mu.Unlock()
	sent := 0
	for range 2 * xdpFrames / len(ps) {
		n, err := w.WriteBatch(ps)
		if sent += n; err != nil && !errors.Is(err, unix.ENOBUFS) {
			t.Errorf("full ring: %v", err)
		}
	}
	if sent != xdpFrames {
		t.Errorf("%d packets taken by a ring of %d", sent, xdpFrames)
	}
}

// Down and up, another address and another MTU of the interface.
func TestNativeLink(t *testing.T) {
	for _, native := range natives[:2] {
		t.Run(native, func(t *testing.T) {
			l := newLab(t)
			w := openNative(t, native)
			in := l.listen(4)
			warm(t, w, in, native, "10.9.0.1", "10.9.0.2")
			sh(t, "ip link set e0 down")
			refused := false
			for range 3 {
				_, err := w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, 8)})
				refused = refused || err != nil
				time.Sleep(5 * time.Millisecond)
			}
			if !refused {
				t.Error("down: no error")
			}
			sh(t, "ip link set e0 up")
			warm(t, w, in, native, "10.9.0.1", "10.9.0.2")
			sh(t, "ip link set e0 address 02:00:00:00:00:55")
			if !until(func() bool { return w.Link().MAC.String() == "02:00:00:00:00:55" }) {
				t.Fatal("the address was not noticed")
			}
			var src []byte
			l.at(func() {
				fd, _ := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(htons(unix.ETH_P_IP)))
				defer unix.Close(fd)
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30})
				w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, 8)})
				buf := make([]byte, 2000)
				if n, _, err := unix.Recvfrom(fd, buf, 0); err == nil && n > 14 {
					src = buf[6:12]
				}
			})
			if want := []byte{2, 0, 0, 0, 0, 0x55}; !bytes.Equal(src, want) {
				t.Errorf("source address % x, want % x", src, want)
			}
			warm(t, w, in, native, "10.9.0.1", "10.9.0.2")
			l.sh("ip link set e1 mtu 3000")
			for _, mtu := range []int{3000, 1300} {
				sh(t, fmt.Sprintf("ip link set e0 mtu %d", mtu))
				if !until(func() bool { return w.Link().MTU == mtu }) {
					t.Fatal("the MTU was not noticed")
				}
				warm(t, w, in, native, "10.9.0.1", "10.9.0.2")
				if n, err := w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, mtu-20)}); n != 1 || err != nil {
					t.Errorf("mtu %d: got %d, %v", mtu, n, err)
				}
				if b := in.next(); len(b) != mtu {
					t.Errorf("mtu %d: %d octets arrive", mtu, len(b))
				}
				if _, err := w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, mtu-19)}); !errors.Is(err, unix.EMSGSIZE) {
					t.Errorf("mtu %d: got %v, want EMSGSIZE", mtu, err)
				}
			}
		})
	}
}

// What the host lacks falls back by itself, told once, unless it was asked for.
func TestNativeFallback(t *testing.T) {
	l := newLab(t)
	other, err := func() (*xdp, error) { // another program has the only queue
		link := openNative(t, NativeRaw)
		defer link.Close()
		return openXDP(link.index, 1514)
	}()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open("e0", Options{Native: NativeXDP}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("xdp: got %v, want EBUSY", err)
	}
	if _, err := Open("e0", Options{Native: "fast"}); err == nil {
		t.Error("fast: no error")
	}
	w := openNative(t, NativeAuto)
	warm(t, w, l.listen(4), NativePacket, "10.9.0.1", "10.9.0.2")
	if _, got := w.Path(); got != "packet socket" {
		t.Errorf("path %q, want packet socket", got)
	}
	if f := <-w.Fallbacks(); f.Path != "AF_XDP" || f.To != "AF_PACKET" || f.Err == nil {
		t.Errorf("told %v", f)
	}
	other.close()
	sh(t, "ip link set e0 down; ip link set e0 up") // tried again then
	warm(t, w, l.listen(4), NativeXDP, "10.9.0.1", "10.9.0.2")
	if _, got := w.Path(); got != "AF_XDP" || len(w.Fallbacks()) != 0 {
		t.Errorf("path %q, %d fallbacks told; want AF_XDP, 0", got, len(w.Fallbacks()))
	}
	// Neither the administrator's queueing discipline nor a capture is passed by.
	through := "packet socket, through the queueing discipline"
	sh(t, "tc qdisc add dev e0 root tbf rate 1gbit burst 1mb latency 50ms")
	if !until(func() bool { return wayOut(w) == through }) {
		t.Errorf("path %q with tbf, want %q", wayOut(w), through)
	}
	if n, err := w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, 1400)}); n != 1 || err != nil {
		t.Errorf("with tbf: got %d, %v, want 1", n, err)
	}
	// The kernel's own of IPv6 may be among what it saw, and are short.
	got, octets := sh(t, "tc -s qdisc show dev e0"), 0
	if _, sent, ok := strings.Cut(got, " Sent "); ok {
		fmt.Sscan(sent, &octets)
	}
	if octets < 1434 {
		t.Errorf("tbf did not see the packet: %s", got)
	}
	sh(t, "tc qdisc del dev e0 root")
	warm(t, w, l.listen(4), NativeXDP, "10.9.0.1", "10.9.0.2")
	time.Sleep(watchEvery)
	c, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		t.Fatal(err)
	}
	w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 77, 8)})
	for buf := make([]byte, 2000); ; {
		n, from, err := unix.Recvfrom(c, buf, unix.MSG_DONTWAIT)
		if err != nil {
			t.Fatalf("the capture did not see the packet; path %q", wayOut(w))
		}
		if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING && n == 42 && buf[23] == 253 && buf[37] == 77 {
			break
		}
	}
	unix.Close(c)
	warm(t, w, l.listen(4), NativeXDP, "10.9.0.1", "10.9.0.2")
	// Frames that do not fit AF_XDP's.
	l.sh("ip link set e1 mtu 9000")
	sh(t, "ip link set e0 mtu 9000")
	if !until(func() bool { return w.Link().MTU == 9000 }) {
		t.Fatal("the MTU was not noticed")
	}
	in := l.listen(4)
	warm(t, w, in, NativePacket, "10.9.0.1", "10.9.0.2")
	w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, 8980)})
	if b := in.next(); len(b) != 9000 {
		t.Errorf("%d octets arrive, want 9000", len(b))
	}
}

// The kernel's way and the fast ways agree about a device that is gone.
func TestNativeLost(t *testing.T) {
	for _, native := range natives {
		t.Run(native, func(t *testing.T) {
			l := newLab(t)
			w := openNative(t, native)
			warm(t, w, l.listen(4), native, "10.9.0.1", "10.9.0.2")
			sh(t, "ip link del e0")
			if !until(func() bool {
				_, err := w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 1, 8)})
				lost := (*LinkError)(nil)
				return errors.As(err, &lost)
			}) {
				t.Errorf("%s: no LinkError", native)
			}
			w.Close()
		})
	}
}

func TestCaptures(t *testing.T) {
	const head = "sk       RefCnt Type Proto  Iface R Rmem   User   Inode\n"
	for _, k := range []struct {
		line string
		want bool
	}{
		{"0000000000000000 3      3    0003   7     1 0      0      4242  ", true},
		{"0000000000000000 3      3    0003   0     1 0      0      4242  ", true},
		{"0000000000000000 3      3    0003   8     1 0      0      4242  ", false}, // another interface
		{"0000000000000000 3      3    0003   7     1 0      0      99    ", false}, // our own
		{"0000000000000000 3      3    0003   7     0 0      0      4242  ", false}, // not bound
		{"0000000000000000 3      2    0800   7     1 0      0      4242  ", false}, // sees arrivals only
		{"0000000000000000 3      3    0003   7", false},
		{"", false},
	} {
		other := "0000000000000000 3      3    0000   7     0 0      0      5  \n"
		if got := captures([]byte(head+other+k.line+"\n"+other), 7, 99); got != k.want {
			t.Errorf("%q: got %v, want %v", k.line, got, k.want)
		}
	}
}

func TestNativeNoAlloc(t *testing.T) {
	for _, native := range natives {
		t.Run(native, func(t *testing.T) {
			l := newLab(t)
			w := openNative(t, native)
			warm(t, w, l.listen(4), native, "10.9.0.1", "10.9.0.2")
			warm(t, w, l.listen(6), native, "fd09::1", "fd09::2")
			var ps []Packet
			for i := range 32 {
				ps = append(ps, numbered("10.9.0.1", "10.9.0.2", i, 1000), numbered("fd09::1", "fd09::2", i, 1000))
			}
			noAllocs(t, native, func() { w.WriteBatch(ps) })
			w.Close()
		})
	}
}

// Cost of a packet sent each way, with the peer's reception, which veth does in
// the sender's system call.
func BenchmarkNativeWrite(b *testing.B) {
	for _, native := range natives {
		for _, size := range []int{88, 1480} {
			b.Run(fmt.Sprintf("%s/%d", native, size), func(b *testing.B) {
				l := newLab(b)
				w := openNative(b, native)
				in := l.listen(4)
				warm(b, w, in, native, "10.9.0.1", "10.9.0.2")
				unix.Close(in.fd)
				// As missiu at the peer: dropped at ingress.
				l.sh("nft add table netdev f; nft add chain netdev f i \"{ type filter hook ingress device e1 priority -500; policy drop; }\"")
				ps := make([]Packet, 64)
				for i := range ps {
					ps[i] = numbered("10.9.0.1", "10.9.0.2", i, size-20)
				}
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; i < b.N; i += len(ps) {
					if n, err := w.WriteBatch(ps); err != nil {
						b.Fatal(n, err)
					}
				}
				b.StopTimer()
				w.Close()
			})
		}
	}
}

// What arrives is the same from the ring and from the socket's queue, and a host
// without the one has the other.
func TestReaders(t *testing.T) {
	for _, k := range []struct {
		name    string
		options Options
		told    int
	}{
		{"ring", Options{}, 0},
		{"queue", Options{Native: NativeRaw}, 0},
		{"no ring", Options{refuse: func(path string) error {
			if path == "TPACKET_V2" {
				return unix.ENOMEM
			}
			return nil
		}}, 1},
	} {
		t.Run(k.name, func(t *testing.T) {
			l := newLab(t)
			w, err := Open("e0", k.options)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			if got := len(w.Fallbacks()); got != k.told {
				t.Errorf("told of %d fallbacks, want %d", got, k.told)
			}
			if in, _ := w.Path(); (in == "packet ring") != (k.name == "ring") {
				t.Errorf("path %q", in)
			}
			if err := w.SetDivert(prefixes("10.9.0.2/32"), nil); err != nil {
				t.Fatal(err)
			}
			// More than the ring holds, of many lengths, in turns; among them
			// one longer than a frame and one longer than the caller's buffer.
			send := l.rawPeer()
			l.sh("ip link set e1 mtu 9000")
			sh(t, "ip link set e0 mtu 9000")
			ps := make([]Packet, 7)
			for i := range ps {
				ps[i] = Packet{Buf: make([]byte, 6000), Off: 64 + i}
			}
			next, lost := 0, 0
			take := func(upto int) {
				for next < upto {
					n, err := w.ReadBatch(ps)
					if err != nil {
						t.Fatal(err)
					}
					for _, p := range ps[:n] {
						if next%1000 == 998 { // the buffer was too short for it
							next, lost = next+1, lost+1
						}
						b := p.Buf[p.Off : p.Off+p.Len]
						if got := int(binary.BigEndian.Uint32(b[20:])); got != next || len(b) != length(next) || b[len(b)-1] != byte(next) {
							t.Fatalf("packet %d: got %d, %d octets, want %d", next, got, len(b), length(next))
						}
						next++
					}
				}
			}
			for i := range 6000 {
				p := numbered("10.9.0.3", "10.9.0.1", i, length(i)-20)
				b := p.Buf[p.Off:]
				b[9], b[len(b)-1] = protoESP, byte(i)
				send(b)
				if i%300 == 299 {
					take(i + 1)
				}
			}
			if s := w.Stats(); s.Truncated != 6 || lost != 6 || s.KernelDrops != 0 || s.Read != 5994 {
				t.Errorf("%d lost: %+v", lost, s)
			}
		})
	}
}

// length of test packet number i.
func length(i int) int {
	switch i % 1000 {
	case 998:
		return 7000
	case 500:
		return 3000
	}
	return 60 + i*7%1441
}

// A host without AF_XDP and AF_PACKET for sending has raw sockets.
func TestNativeNothing(t *testing.T) {
	l := newLab(t)
	refuse := func(lacks ...string) Options {
		return Options{refuse: func(path string) error {
			if slices.Contains(lacks, path) {
				return unix.EAFNOSUPPORT
			}
			return nil
		}}
	}
	for _, k := range []struct {
		o    Options
		path string
	}{
		{refuse("AF_XDP"), "packet socket"},
		{refuse("AF_PACKET"), "AF_XDP"},
		{refuse("AF_XDP", "AF_PACKET"), "raw socket"},
	} {
		w, err := Open("e0", k.o)
		if err != nil {
			t.Fatal(err)
		}
		if _, got := w.Path(); got != k.path || (len(w.Fallbacks()) == 1) != (k.path != "AF_XDP") {
			t.Errorf("path %q, %d fallbacks told; want %q", got, len(w.Fallbacks()), k.path)
		}
		in := l.listen(4)
		w.WriteBatch([]Packet{numbered("10.9.0.1", "10.9.0.2", 3, 8)})
		if b := in.next(); len(b) != 28 {
			t.Errorf("%s: got % x", k.path, b)
		}
		w.Close()
	}
	for _, native := range []string{NativeXDP, NativePacket} {
		o := refuse("AF_XDP", "AF_PACKET")
		o.Native = native
		if _, err := Open("e0", o); !errors.Is(err, unix.EAFNOSUPPORT) {
			t.Errorf("%s: got %v, want EAFNOSUPPORT", native, err)
		}
	}
}
