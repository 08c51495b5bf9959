package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/internal/nstest"
	"github.com/missiu/missiu/pkg/datapath/linger"
)

var testMAC = net.HardwareAddr{2, 1, 2, 3, 4, 5}

func openTest(t testing.TB, o Options) Device {
	t.Helper()
	needRoot(t)
	// No chatter of the kernel's own between the frames under test.
	chatter := func(off string) {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte(off), 0); err != nil {
			t.Fatal(err)
		}
	}
	chatter("1")
	o.Up = true
	d, err := Open(o)
	chatter("0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Persist(false)
		d.Close()
	})
	return d
}

func frames(n, off int) []Frame {
	fs := make([]Frame, n)
	for i := range fs {
		fs[i] = Frame{Buf: make([]byte, 70000), Off: off}
	}
	return fs
}

func eachMode(t *testing.T, f func(t *testing.T, mode string)) {
	for _, mode := range []string{OffloadAuto, OffloadNone} {
		t.Run(mode, func(t *testing.T) { f(t, mode) })
	}
}

func TestOpen(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string) {
		d := openTest(t, Options{For: "mi-phys", MAC: testMAC, MTU: 1400, Offload: mode})
		if d.Name() != "tap0" {
			t.Errorf("name: got %q, want tap0", d.Name())
		}
		ifi, err := net.InterfaceByName(d.Name())
		if err != nil {
			t.Fatal(err)
		}
		if got := sh(t, "cat /sys/class/net/tap0/tx_queue_len"); got != "2000" {
			t.Errorf("queue of %s frames, want 2000", got)
		}
		if !bytes.Equal(ifi.HardwareAddr, testMAC) || ifi.MTU != 1400 || ifi.Index != d.Index() || !bytes.Equal(d.MAC(), testMAC) {
			t.Errorf("got %+v, device %v %d", ifi, d.MAC(), d.Index())
		}
		if err := d.SetMTU(1300); err != nil || d.MTU() != 1300 {
			t.Errorf("SetMTU: %v, got %d, want 1300", err, d.MTU())
		}
		for _, k := range []struct{ all, want string }{{"0", "0"}, {"1", "2"}, {"2", "2"}} {
			sh(t, "echo "+k.all+" >/proc/sys/net/ipv4/conf/all/rp_filter")
			if err := loosenReversePath("tap0"); err != nil {
				t.Error(err)
			}
			if got := sh(t, "cat /proc/sys/net/ipv4/conf/tap0/rp_filter"); got != k.want {
				t.Errorf("all %s: got rp_filter %s, want %s", k.all, got, k.want)
			}
		}
		sh(t, "echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter")
		if _, err := Open(Options{Name: "tap0"}); !errors.Is(err, ErrInUse) {
			t.Errorf("second open: got %v, want ErrInUse", err)
		}
		if _, err := Open(Options{Name: "lo"}); !errors.Is(err, ErrNotTAP) {
			t.Errorf("open lo: got %v, want ErrNotTAP", err)
		}
		if _, err := Open(Options{Name: "tap0", For: "other"}); !errors.Is(err, ErrInUse) {
			t.Errorf("open for another interface: got %v, want ErrInUse", err)
		}
	})
	if out, _ := exec.Command("ip", "-br", "link", "show", "tap0").Output(); len(out) != 0 {
		t.Errorf("after Persist(false) and Close: %s", out)
	}
}

// A killed instance leaves its device; the next one takes it over with the
// routes that lead there, whatever the mode it was made in.
func TestAdopt(t *testing.T) {
	needRoot(t)
	for _, first := range []string{OffloadAuto, OffloadNone} {
		for _, second := range []string{OffloadAuto, OffloadNone} {
			d, err := Open(Options{For: "mi-phys", MAC: testMAC, Offload: first, Up: true})
			if err != nil {
				t.Fatal(err)
			}
			sh(t, "ip route add 192.0.2.1/32 dev "+d.Name())
			d.Close()
			if name, err := Find("mi-phys"); err != nil || name != d.Name() {
				t.Fatalf("Find: got %q, %v, want %q", name, err, d.Name())
			}
			e, err := Open(Options{For: "mi-phys", MAC: testMAC, Offload: second})
			if err != nil {
				t.Fatalf("%s then %s: %v", first, second, err)
			}
			if e.Name() != d.Name() {
				t.Errorf("adopted %q, want %q", e.Name(), d.Name())
			}
			if got := sh(t, "ip route show 192.0.2.1"); got == "" {
				t.Error("the route is gone")
			}
			testRead(t, e)
			e.Close()
			if ok, err := Remove("mi-phys"); !ok || err != nil {
				t.Errorf("Remove: got %v, %v", ok, err)
			}
			if ok, err := Remove("mi-phys"); ok || err != nil {
				t.Errorf("second Remove: got %v, %v", ok, err)
			}
		}
	}
}

// testRead sends to the device until it reads a frame: the kernel takes up to
// a second to notice that an adopted device has its carrier back.
func testRead(t *testing.T, d Device) {
	t.Helper()
	gen := generator(t, d)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				gen(1)
			}
		}
	}()
	if _, err := d.ReadBatch(frames(8, 64)); err != nil {
		t.Error(err)
	}
	close(stop)
	<-ended
}

// A persistent TAP without owner swallows what is routed to it although a
// default route leads elsewhere: no way around policy when missiu is dead.
func TestDeadTAPFailsClosed(t *testing.T) {
	needRoot(t)
	sh(t, `ip link add mi-a type veth peer name mi-b; ip link set mi-a up; ip link set mi-b up
		ip addr add 198.51.100.1/24 dev mi-a; ip -6 addr add 2001:db8::1/64 dev mi-a nodad
		ip route add default dev mi-a; ip -6 route add default dev mi-a`)
	defer sh(t, "ip link del mi-a")
	nstest.Ready(t, "", "mi-a", "mi-b")
	d, err := Open(Options{For: "mi-a", MAC: testMAC, Up: true})
	if err != nil {
		t.Fatal(err)
	}
	defer Remove("mi-a")
	sh(t, "ip route add 198.51.100.9/32 dev tap0; ip -6 route add 2001:db8::9/128 dev tap0")
	s := sniff(t, "mi-b")
	send := func(addr string) {
		c, err := net.Dial("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("x"))
		c.Close()
	}
	d.Close() // as by SIGKILL: without Persist(false)
	send("198.51.100.9:9")
	send("[2001:db8::9]:9")
	send("198.51.100.8:9") // the control: leaves by the default route
	send("[2001:db8::8]:9")
	want := map[string]bool{"198.51.100.8": true, "2001:db8::8": true}
	for len(want) > 0 {
		f := s.next(t, func([]byte) bool { return true })
		if bytes.Contains(f, net.ParseIP("198.51.100.9").To4()) || bytes.Contains(f, net.ParseIP("2001:db8::9")) || bytes.HasSuffix(f[:min(len(f), 42)], []byte{198, 51, 100, 9}) {
			t.Fatalf("leaked past the dead TAP: % x", f)
		}
		for a := range want {
			ip := net.ParseIP(a)
			if v4 := ip.To4(); v4 != nil {
				ip = v4
			}
			if bytes.Contains(f, ip) {
				delete(want, a)
			}
		}
	}
	for _, q := range []string{"198.51.100.9", "2001:db8::9"} {
		if got := sh(t, "ip route get "+q); !bytes.Contains([]byte(got), []byte("dev tap0")) {
			t.Errorf("route to %s: got %q, want over tap0", q, got)
		}
	}
}

// ipv4UDP makes a frame for the TAP: Ethernet, IPv4, UDP to 192.0.2.254:port.
func ipv4UDP(payload int) []byte {
	b := make([]byte, 42+payload)
	copy(b, testMAC)
	copy(b[6:], []byte{2, 0, 0, 0, 0, 9})
	b[12], b[13] = 8, 0
	ip := b[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], []byte{192, 0, 2, 7, 192, 0, 2, 254})
	binary.BigEndian.PutUint16(ip[10:], ^fold(add(0, ip[:20])))
	u := ip[20:]
	binary.BigEndian.PutUint16(u, 7777)
	binary.BigEndian.PutUint16(u[2:], 7000)
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	for i := range payload {
		u[8+i] = byte(i)
	}
	return b
}

// pseudo puts the sum of the pseudo header into the checksum field.
func pseudo(b []byte) {
	ip := b[14:]
	s := add(0, ip[12:20]) + uint64(ip[9]) + uint64(len(ip)-20)
	field := 26
	if ip[9] == 6 {
		field = 36
	}
	binary.BigEndian.PutUint16(ip[field:], fold(s))
}

func TestWriteOffload(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string) { testWriteOffload(t, Options{MAC: testMAC, Offload: mode}) })
}

func testWriteOffload(t *testing.T, o Options) {
	d := openTest(t, o)
	sh(t, "ip addr add 192.0.2.254/24 dev "+d.Name())
	c, err := net.ListenPacket("udp4", "192.0.2.254:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	plain := ipv4UDP(100) // UDP checksum zero: none
	csum := ipv4UDP(200)
	pseudo(csum)
	super := ipv4UDP(2500)
	pseudo(super)
	var fs []Frame
	for _, f := range []struct {
		b []byte
		o Offload
	}{
		{plain, Offload{}},
		{csum, Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: 6}},
		{super, Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: 6, GSOType: GSOUDPL4, GSOSize: 1000, HdrLen: 42}},
	} {
		fs = append(fs, Frame{Buf: append(make([]byte, 32), f.b...), Off: 32, Len: len(f.b), Offload: f.o})
	}
	if n, err := d.WriteBatch(fs); n != 3 || err != nil {
		t.Fatalf("got %d, %v, want 3", n, err)
	}
	buf := make([]byte, 4000)
	for _, want := range []int{100, 200, 1000, 1000, 500} {
		n, _, err := c.ReadFrom(buf)
		if err != nil || n != want {
			t.Fatalf("got %d octets, %v, want %d", n, err, want)
		}
	}
	bad := []Frame{fs[0], {Buf: make([]byte, 32), Off: 16, Len: 3}, fs[0]}
	bad[2].Buf = append([]byte(nil), bad[0].Buf...)
	if n, err := d.WriteBatch(bad); n != 1 || !errors.Is(err, unix.EINVAL) {
		t.Errorf("a cut frame: got %d, %v, want 1, EINVAL", n, err)
	}
	sh(t, "ip link set "+d.Name()+" down")
	if n, err := d.WriteBatch(fs[:1]); n != 0 || !errors.Is(err, unix.EIO) {
		t.Errorf("device down: got %d, %v, want 0, EIO", n, err)
	}
}

// Super-frames of TCP are cut with correct numbers, flags and checksums, behind
// VLAN tags too, and told how long their headers are.
func TestSegmentTCP(t *testing.T) {
	b := ipv4UDP(3012) // 12 octets more make a TCP header out of the UDP header
	b[14+9] = 6
	tcp := b[34:]
	binary.BigEndian.PutUint32(tcp[4:], 1000)
	tcp[12], tcp[13] = 5<<4, 0x80|0x10|0x08|0x01 // CWR ACK PSH FIN
	pseudo(b)
	o := Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: 16, GSOType: GSOTCPv4, GSOSize: 1400}
	var s Segmenter
	cut := func(b []byte, o Offload, link int) {
		t.Helper()
		wantLen, wantSeq, wantFlags := []int{1400, 1400, 200}, []uint32{1000, 2400, 3800}, []byte{0x90, 0x10, 0x19}
		i := 0
		errno := s.Each(b, o, func(f *Frame) (e unix.Errno) {
			seg := f.Buf[f.Off : f.Off+f.Len]
			ip, tcp := seg[link:], seg[link+20:]
			if f.Off < HeadroomMin || f.Offload != (Offload{}) || string(seg[:link]) != string(b[:link]) {
				t.Errorf("segment %d: %d octets in front, %+v, link header %x", i, f.Off, f.Offload, seg[:link])
			}
			if got := len(tcp) - 20; got != wantLen[i] {
				t.Errorf("segment %d: got %d octets, want %d", i, got, wantLen[i])
			}
			if got := binary.BigEndian.Uint32(tcp[4:]); got != wantSeq[i] {
				t.Errorf("segment %d: got number %d, want %d", i, got, wantSeq[i])
			}
			if tcp[13] != wantFlags[i] {
				t.Errorf("segment %d: got flags %#x, want %#x", i, tcp[13], wantFlags[i])
			}
			if fold(add(0, ip[:20])) != 0xffff {
				t.Errorf("segment %d: IP checksum", i)
			}
			if fold(add(add(0, ip[12:20])+6+uint64(len(tcp)), tcp)) != 0xffff {
				t.Errorf("segment %d: TCP checksum", i)
			}
			i++
			return 0
		})
		if errno != 0 || i != 3 {
			t.Fatalf("got %d segments, %v, want 3", i, errno)
		}
		if !o.Measure(b) || int(o.HdrLen) != link+40 {
			t.Errorf("headers of %d octets, want %d", o.HdrLen, link+40)
		}
	}
	cut(b, o, 14)
	tagged := slices.Concat(b[:12], []byte{0x88, 0xa8, 0, 100, 0x81, 0, 0, 101}, b[12:])
	o2 := o
	o2.CsumStart += 8
	cut(tagged, o2, 22)
	for _, bad := range []Offload{{}, {NeedsCsum: true, GSOType: GSOTCPv4, CsumStart: 60000, CsumOffset: 16, GSOSize: 1},
		{NeedsCsum: true, GSOType: GSOTCPv4, CsumStart: 34, CsumOffset: 16}, {NeedsCsum: true, GSOType: 99, CsumStart: 34, CsumOffset: 16, GSOSize: 9}} {
		if errno := s.Each(b, bad, func(*Frame) unix.Errno { return 0 }); errno != unix.EINVAL {
			t.Errorf("%+v: got %v, want EINVAL", bad, errno)
		}
	}
}

// A checksum of 0 is 0 in TCP, and 0xffff in UDP, in a frame and in a segment of one.
func TestZeroChecksum(t *testing.T) {
	for _, k := range []struct {
		proto  byte
		offset uint16
		gso    uint8
		want   uint16
	}{{6, 16, GSOTCPv4, 0}, {17, 6, GSOUDPL4, 0xffff}} {
		b := ipv4UDP(100)
		b[14+9] = k.proto
		b[34+12] = 5 << 4
		o := Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: k.offset}
		at := 34 + int(k.offset)
		word := b[len(b)-2:]
		clear(word)
		finish := func() uint16 {
			pseudo(b)
			seg := bytes.Clone(b)
			if !FinishChecksum(seg, o) {
				t.Fatal("refused")
			}
			return binary.BigEndian.Uint16(seg[at:])
		}
		// What a word of zeros lacks to a sum of all ones is the checksum.
		binary.BigEndian.PutUint16(word, finish())
		if got := finish(); got != k.want {
			t.Errorf("protocol %d: got %#x, want %#x", k.proto, got, k.want)
		}
		o.GSOType, o.GSOSize = k.gso, 1000
		var s Segmenter
		if errno := s.Each(b, o, func(f *Frame) unix.Errno {
			if got := binary.BigEndian.Uint16(f.Buf[f.Off+at:]); got != k.want {
				t.Errorf("protocol %d, segment: got %#x, want %#x", k.proto, got, k.want)
			}
			return 0
		}); errno != 0 {
			t.Error(errno)
		}
	}
}

func TestFinishChecksumSCTP(t *testing.T) {
	b := make([]byte, 14+20+12)
	b[34] = 1
	if !FinishChecksum(b, Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: 8}) {
		t.Fatal("refused")
	}
	if got := binary.BigEndian.Uint32(b[42:]); got == 0 {
		t.Error("no CRC")
	}
	for _, o := range []Offload{{NeedsCsum: true, CsumStart: 46}, {NeedsCsum: true, CsumStart: 65535, CsumOffset: 65535}, {NeedsCsum: true, CsumStart: 36, CsumOffset: 8}} {
		if FinishChecksum(b, o) {
			t.Errorf("%+v: accepted", o)
		}
	}
}

func TestCloseEndsRead(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string) {
		d := openTest(t, Options{MAC: testMAC, Offload: mode})
		done := make(chan error)
		go func() {
			for {
				if _, err := d.ReadBatch(frames(1, 10)); err != nil {
					done <- err
					return
				}
			}
		}()
		d.Persist(false)
		d.Close()
		if err := <-done; !errors.Is(err, os.ErrClosed) {
			t.Errorf("got %v, want os.ErrClosed", err)
		}
		if _, err := d.WriteBatch(frames(1, 10)); !errors.Is(err, os.ErrClosed) {
			t.Errorf("write: got %v, want os.ErrClosed", err)
		}
	})
}

// Reading and waiting by two calls, as a member of a group.
func TestTryBatch(t *testing.T) {
	d := openTest(t, Options{MAC: testMAC})
	gen := generator(t, d)
	r := d.Queues()[0].(interface {
		TryBatch([]Frame) (int, error)
		Await() error
		Join(*linger.Group, func() bool) error
	})
	if err := r.Join(new(linger.Group), func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	fs := frames(8, 64)
	for empty := false; !empty; { // what the kernel sends by itself
		n, err := r.TryBatch(fs)
		if err != nil {
			t.Fatal(err)
		}
		empty = n == 0
	}
	gen(3)
	for got := 0; got < 3; {
		if err := r.Await(); err != nil {
			t.Fatal(err)
		}
		n, err := r.TryBatch(fs)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fs[:n] {
			if bytes.Equal(f.Buf[f.Off:f.Off+f.Len], ipv4UDP(1000)) {
				got++
			}
		}
	}
	d.Persist(false)
	d.Close()
	if err := r.Await(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Await: %v, want %v", err, os.ErrClosed)
	}
	if _, err := r.TryBatch(fs); !errors.Is(err, os.ErrClosed) {
		t.Errorf("TryBatch: %v, want %v", err, os.ErrClosed)
	}
}

// The kernel answers read and write of a deleted device with EBADFD.
func TestDeleted(t *testing.T) {
	d := openTest(t, Options{MAC: testMAC})
	sh(t, "ip link del "+d.Name())
	var err error
	for err == nil {
		_, err = d.ReadBatch(frames(1, 10))
	}
	if gone := (*GoneError)(nil); !errors.Is(err, unix.EBADFD) || !errors.As(err, &gone) {
		t.Errorf("read: got %v, want a GoneError, which is EBADFD", err)
	}
	f := Frame{Buf: append(make([]byte, 10), ipv4UDP(1)...), Off: 10, Len: 43}
	if _, err := d.WriteBatch([]Frame{f}); !errors.Is(err, unix.EBADFD) {
		t.Errorf("write: got %v, want EBADFD", err)
	}
}

// generator sends UDP datagrams into the device from a raw packet socket, as
// the stack would.
func generator(t testing.TB, d Device) func(n int) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	to := &unix.SockaddrLinklayer{Ifindex: d.Index()}
	b := ipv4UDP(1000)
	return func(n int) {
		for range n {
			if err := unix.Sendto(fd, b, 0, to); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestNoAllocs(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string) {
		d := openTest(t, Options{MAC: testMAC, Offload: mode})
		gen := generator(t, d)
		fs := frames(64, 64)
		read := func() {
			gen(32)
			for got := 0; got < 32; {
				n, err := d.ReadBatch(fs)
				if err != nil {
					t.Fatal(err)
				}
				got += n
			}
		}
		base := testing.AllocsPerRun(100, func() {
			gen(32)
			read()
		})
		out := []Frame{}
		for range 32 {
			b := ipv4UDP(1000)
			out = append(out, Frame{Buf: append(make([]byte, 64), b...), Off: 64, Len: len(b)})
		}
		gens := testing.AllocsPerRun(100, func() { gen(32); gen(32) })
		if base > gens {
			t.Errorf("ReadBatch: %v allocations, want 0", base-gens)
		}
		out = append(out, superFrame(40))
		d.WriteBatch(out[32:])
		if n := testing.AllocsPerRun(100, func() { d.WriteBatch(out) }); n != 0 {
			t.Errorf("WriteBatch: %v allocations, want 0", n)
		}
	})
}

func BenchmarkReadBatch(b *testing.B) {
	d := openTest(b, Options{MAC: testMAC})
	gen := generator(b, d)
	fs := frames(64, 64)
	b.SetBytes(1042)
	b.ReportAllocs()
	for i := 0; i < b.N; {
		b.StopTimer()
		gen(64)
		b.StartTimer()
		n, err := d.ReadBatch(fs)
		if err != nil {
			b.Fatal(err)
		}
		i += n
	}
}

func BenchmarkWriteBatch(b *testing.B) {
	d := openTest(b, Options{MAC: testMAC})
	var out []Frame
	for range 64 {
		p := ipv4UDP(1000)
		out = append(out, Frame{Buf: append(make([]byte, 64), p...), Off: 64, Len: len(p)})
	}
	b.SetBytes(1042)
	b.ReportAllocs()
	for i := 0; i < b.N; i += 64 {
		if n, err := d.WriteBatch(out); n != 64 || err != nil {
			b.Fatal(n, err)
		}
	}
}

func TestPrivilege(t *testing.T) {
	needRoot(t)
	nstest.Without(t, unix.CAP_NET_ADMIN, func() {
		for _, mode := range []string{OffloadAuto, OffloadNone} {
			d, err := Open(Options{Offload: mode})
			if p := (*PrivilegeError)(nil); !errors.As(err, &p) || p.Capability != "CAP_NET_ADMIN" {
				t.Errorf("%s: got %v, want a *PrivilegeError", mode, err)
			}
			if d != nil {
				d.Close()
			}
		}
	})
}

// superFrame makes a super-frame of UDP datagrams of 1000 octets.
func superFrame(datagrams int) Frame {
	b := ipv4UDP(1000 * datagrams)
	pseudo(b)
	return Frame{Buf: append(make([]byte, 64), b...), Off: 64, Len: len(b),
		Offload: Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: 6, GSOType: GSOUDPL4, GSOSize: 1000, HdrLen: 42}}
}

// A super-frame arrives as its datagrams: whole, cut because the kernel
// refuses it, and cut from then on.
func TestSuperFallback(t *testing.T) {
	d := openTest(t, Options{MAC: testMAC})
	sh(t, "ip addr add 192.0.2.254/24 dev "+d.Name())
	c, err := net.ListenPacket("udp4", "192.0.2.254:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	roomy(t, c)
	c.SetReadDeadline(time.Now().Add(time.Minute))
	if got := d.Super(); got != (Super{true, true, true}) {
		t.Errorf("Super: got %+v; this kernel takes all", got)
	}
	buf := make([]byte, 4000)
	expect := func(n, size int) {
		t.Helper()
		for k := range n {
			got, _, err := c.ReadFrom(buf)
			if err != nil || got != size || buf[0] != byte(size*k) {
				t.Fatalf("datagram %d: got %d octets % x, %v", k, got, buf[:2], err)
			}
		}
	}
	if n, err := d.WriteBatch([]Frame{superFrame(40), superFrame(3)}); n != 2 || err != nil {
		t.Fatalf("got %d, %v, want 2", n, err)
	}
	expect(40, 1000)
	expect(3, 1000)
	if n := d.Cut(); n != 0 {
		t.Errorf("%d super-frames cut, want none", n)
	}
	// No kernel takes more than 128 datagrams of UDP_L4.
	many := Frame{Buf: append(make([]byte, 10), ipv4UDP(200)...), Off: 10, Len: 242}
	many.Offload = Offload{NeedsCsum: true, CsumStart: 34, CsumOffset: 6, GSOType: GSOUDPL4, GSOSize: 1, HdrLen: 42}
	pseudo(many.Buf[10:])
	for k := range 2 {
		if n, err := d.WriteBatch([]Frame{many, superFrame(2)}); n != 2 || err != nil {
			t.Fatalf("refused: got %d, %v, want 2", n, err)
		}
		expect(200, 1)
		expect(2, 1000)
		if got := d.Super(); got != (Super{true, true, false}) {
			t.Errorf("Super after a refusal: got %+v", got)
		}
		if n := d.Cut(); n != uint64(2*k+2) {
			t.Errorf("%d super-frames cut, want %d", n, 2*k+2)
		}
	}
	bad := superFrame(2)
	bad.Offload.CsumStart = 60000
	bad.Offload.GSOType = GSOTCPv4
	if n, err := d.WriteBatch([]Frame{bad}); n != 0 || !errors.Is(err, unix.EINVAL) {
		t.Errorf("metadata beyond the frame: got %d, %v, want EINVAL", n, err)
	}
	if got := d.Super(); got != (Super{true, true, false}) {
		t.Errorf("Super after a malformed frame: got %+v", got)
	}
}

// roomy gives a socket room for all that a test sends, however late it reads.
func roomy(t *testing.T, c net.PacketConn) {
	t.Helper()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Frames of callers side by side arrive whole and each caller's in its order.
func TestWriteSideBySide(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string) {
		d := openTest(t, Options{MAC: testMAC, Offload: mode})
		sh(t, "ip addr add 192.0.2.254/24 dev "+d.Name())
		c, err := net.ListenPacket("udp4", "192.0.2.254:7000")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		roomy(t, c)
		c.SetReadDeadline(time.Now().Add(time.Minute))
		const each = 50
		for who := range byte(4) {
			go func() {
				for k := range byte(each) {
					f := superFrame(2)
					p := f.Buf[f.Off+42:]
					p[0], p[1] = who, 2*k
					p[1000], p[1001] = who, 2*k+1
					if n, err := d.WriteBatch([]Frame{f}); n != 1 || err != nil {
						t.Errorf("got %d, %v", n, err)
					}
				}
			}()
		}
		var next [4]byte
		buf := make([]byte, 4000)
		for range 4 * 2 * each {
			n, _, err := c.ReadFrom(buf)
			if err != nil || n != 1000 || buf[0] > 3 || buf[1] != next[buf[0]] {
				t.Fatalf("got %d octets % x, %v; next %v", n, buf[:2], err, next)
			}
			next[buf[0]]++
		}
	})
}

func BenchmarkWriteSuper(b *testing.B) {
	d := openTest(b, Options{MAC: testMAC})
	fs := []Frame{superFrame(45)}
	b.SetBytes(45000)
	b.ReportAllocs()
	for b.Loop() {
		if n, err := d.WriteBatch(fs); n != 1 || err != nil {
			b.Fatal(n, err)
		}
	}
}
