package tap

import (
	"encoding/binary"
	"fmt"
	"net"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

// TestReadOffload: which super-frames the kernel gives, with every set of them
// that a kernel may refuse; what it does not give comes as finished or
// unfinished single frames.
func TestReadOffload(t *testing.T) {
	all := setOffload
	for _, tt := range []struct {
		name string
		lack int // flags that the kernel does not know
		want Super
	}{
		{"all", 0, Super{true, true, true}},
		{"no USO", readUDP, Super{true, true, false}},
		{"no TSO", readUDP | readTCP, Super{}},
		{"nothing", readUDP | readTCP | unix.TUN_F_CSUM, Super{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer func() { setOffload = all }()
			setOffload = func(fd, flags int) error {
				if flags&tt.lack != 0 {
					return unix.EINVAL
				}
				return all(fd, flags)
			}
			d := openTest(t, Options{MAC: testMAC, MTU: 1400, ReadOffload: true})
			if got := d.ReadSuper(); got != tt.want {
				t.Fatalf("super-frames %v, want %v", got, tt.want)
			}
			sh(t, fmt.Sprintf("ip addr add 198.51.100.1/24 dev %s && ip neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev %[1]s", d.Name()))
			readUDPTrain(t, d, tt.want.UDP)
			readTCPStream(t, d, tt.want.TCP4)
		})
	}
	t.Run("not asked for", func(t *testing.T) {
		if got := openTest(t, Options{MAC: testMAC}).ReadSuper(); got != (Super{}) {
			t.Errorf("super-frames %v, want none", got)
		}
	})
	t.Run("plain", func(t *testing.T) {
		if got := openTest(t, Options{MAC: testMAC, Offload: OffloadNone, ReadOffload: true}).ReadSuper(); got != (Super{}) {
			t.Errorf("super-frames %v, want none", got)
		}
	})
}

// collect reads frames until done says so, or a minute has passed.
func collect(t *testing.T, d Device, done func(f *Frame, i *packet.Info) bool) {
	t.Helper()
	timer := time.AfterFunc(time.Minute, func() { d.Close() })
	defer timer.Stop()
	fs := frames(16, 64)
	for {
		n, err := d.ReadBatch(fs)
		if err != nil {
			t.Fatalf("no end of it: %v", err)
		}
		for k := range fs[:n] {
			f := &fs[k]
			var i packet.Info
			if packet.Decode(f.Buf[f.Off+etherLen:f.Off+f.Len], &i) && done(f, &i) {
				return
			}
		}
	}
}

// finished asserts that a single frame has a right checksum, once finished.
func finished(t *testing.T, f *Frame, i *packet.Info) {
	t.Helper()
	b := f.Buf[f.Off : f.Off+f.Len]
	if !FinishChecksum(b, f.Offload) {
		t.Fatalf("metadata %+v of a frame of %d octets", f.Offload, f.Len)
	}
	ip := b[etherLen : etherLen+i.Len]
	sum := append([]byte{}, ip[12:20]...)
	sum = append(sum, 0, i.Proto, byte((i.Len-i.HdrLen)>>8), byte(i.Len-i.HdrLen))
	if c := packet.Checksum(append(sum, ip[i.HdrLen:]...)); c != 0 {
		t.Errorf("checksum is off by %#x", c)
	}
}

func readUDPTrain(t *testing.T, d Device, super bool) {
	t.Helper()
	c, err := net.Dial("udp4", "198.51.100.2:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, _ := c.(*net.UDPConn).SyscallConn()
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000) })
	if err != nil {
		t.Skip("no UDP_SEGMENT:", err)
	}
	if _, err := c.Write(make([]byte, 5500)); err != nil {
		t.Fatal(err)
	}
	singles := 0
	collect(t, d, func(f *Frame, i *packet.Info) bool {
		if i.Proto != unix.IPPROTO_UDP {
			return false
		}
		if f.Offload.GSOType != GSONone {
			if !super || f.Offload.GSOType != GSOUDPL4 || f.Offload.GSOSize != 1000 || i.Len != 5528 {
				t.Errorf("super-frame %+v, length %d", f.Offload, i.Len)
			}
			return true
		}
		if super {
			t.Errorf("a single frame of %d octets", i.Len)
		}
		finished(t, f, i)
		singles++
		return singles == 6
	})
}

// readTCPStream plays the server of a connection until the client's first window has come.
func readTCPStream(t *testing.T, d Device, super bool) {
	t.Helper()
	const segment, window = 536, 5360
	opened := make(chan net.Conn, 1)
	go func() {
		c, err := net.DialTimeout("tcp4", "198.51.100.2:80", time.Minute)
		if err != nil {
			t.Error(err)
		}
		opened <- c
	}()
	be := binary.BigEndian
	got, supers := 0, 0
	collect(t, d, func(f *Frame, i *packet.Info) bool {
		if i.Proto != unix.IPPROTO_TCP {
			return false
		}
		b := f.Buf[f.Off+etherLen : f.Off+f.Len]
		h := b[i.HdrLen:]
		if h[13] == 2 { // SYN: accept
			a := make([]byte, 64+etherLen+40)
			r := a[64:]
			copy(r, testMAC)
			r[6], r[12] = 2, 8
			packet.PutHeader(r[etherLen:], i.Dst, i.Src, unix.IPPROTO_TCP, 40, 64)
			packet.FixIPv4Checksum(r[etherLen:])
			u := r[etherLen+20:]
			be.PutUint16(u, i.DstPort)
			be.PutUint16(u[2:], i.SrcPort)
			be.PutUint32(u[8:], be.Uint32(h[4:])+1)
			u[12], u[13], u[14] = 0x50, 0x12, 0xf0
			packet.FixTransportChecksum(r[etherLen:], 20, unix.IPPROTO_TCP)
			if _, err := d.WriteBatch([]Frame{{Buf: a, Off: 64, Len: len(r)}}); err != nil {
				t.Error(err)
			}
			go func() {
				c := <-opened
				opened <- c
				if c != nil {
					c.Write(make([]byte, 10*window))
				}
			}()
			return false
		}
		payload := i.Len - i.HdrLen - int(h[12]>>4)*4
		if payload == 0 || i.DstPort != 80 {
			return false
		}
		if f.Offload.GSOType != GSONone {
			supers++
			if f.Offload.GSOType != GSOTCPv4 || f.Offload.GSOSize != segment || !f.Offload.NeedsCsum {
				t.Errorf("super-frame %+v", f.Offload)
			}
		} else {
			finished(t, f, i)
		}
		got += payload
		return got >= window
	})
	if (supers > 0) != super {
		t.Errorf("%d TCP super-frames, want some: %v", supers, super)
	}
	if c := <-opened; c != nil {
		raw, _ := c.(*net.TCPConn).SyscallConn()
		raw.Control(func(fd uintptr) {
			syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
		})
		c.Close()
	}
}

// TestShed: once its queue was not empty for long, ReadBatch drops super-frames of
// UDP, and nothing else, until it is.
func TestShed(t *testing.T) {
	d := openTest(t, Options{MAC: testMAC, MTU: 20000, ReadOffload: true})
	if !d.ReadSuper().UDP {
		t.Skip("the kernel has no USO for TAPs")
	}
	sh(t, fmt.Sprintf("ip addr add 198.51.100.1/24 dev %s && ip neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev %[1]s", d.Name()))
	dial := func(segment int) net.Conn {
		c, err := net.Dial("udp4", "198.51.100.2:9")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		raw, _ := c.(*net.UDPConn).SyscallConn()
		raw.Control(func(fd uintptr) {
			if segment != 0 {
				unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
			}
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20)
		})
		return c
	}
	supers, single := dial(8000), dial(0)
	flood := func(n int) {
		for range n {
			if _, err := supers.Write(make([]byte, 64000)); err != nil {
				t.Fatal(err)
			}
		}
	}
	fs := frames(64, 64)
	read := func() (ours []int) { // payload octets of what we sent
		n, err := d.ReadBatch(fs)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fs[:n] {
			var i packet.Info
			if packet.Decode(f.Buf[f.Off+etherLen:f.Off+f.Len], &i) && i.Proto == unix.IPPROTO_UDP && i.DstPort == 9 {
				ours = append(ours, i.Len-28)
			}
		}
		return ours
	}
	flood(40)
	served := len(read())
	if shed := d.Lost().Shed; served == 0 || shed != 0 {
		t.Fatalf("at first %d super-frames, %d packets shed; want all of a MiB", served, shed)
	}
	time.Sleep(standing + 10*time.Millisecond)
	for _, n := range []int{20000 - 28, 100} { // the first is longer than shortRead
		if _, err := single.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		flood(1)
	}
	var late []int
	for len(late) < 2 {
		late = append(late, read()...)
	}
	if !slices.Equal(late, []int{20000 - 28, 100}) {
		t.Fatalf("late: %v, want the single packets alone", late)
	}
	if shed := d.Lost().Shed; shed != uint64(40-served+2)*8 {
		t.Errorf("%d packets shed, want %d super-frames of 8", shed, 40-served+2)
	}
	// Empty: a read would wait now.
	time.AfterFunc(10*time.Millisecond, func() { flood(1) })
	for got := read(); !slices.Equal(got, []int{64000}); got = read() {
		if len(got) > 0 {
			t.Fatalf("afterwards: %v, want the super-frame", got)
		}
	}
}

// BenchmarkShed is what a super-frame of UDP costs that is shed, in processor time
// of the reader.
func BenchmarkShed(b *testing.B) {
	d := openTest(b, Options{MAC: testMAC, MTU: 1500, ReadOffload: true})
	if !d.ReadSuper().UDP {
		b.Skip("the kernel has no USO for TAPs")
	}
	sh(b, fmt.Sprintf("ip addr add 198.51.100.1/24 dev %s && ip neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev %[1]s", d.Name()))
	c, err := net.Dial("udp4", "198.51.100.2:9")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	raw, _ := c.(*net.UDPConn).SyscallConn()
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1400)
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20)
	})
	q, fs, payload := d.(*device).queues[0], frames(64, 64), make([]byte, 45*1400)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	used := func() time.Duration {
		var u unix.Rusage
		unix.Getrusage(unix.RUSAGE_THREAD, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	var spent time.Duration
	n := 0
	for b.Loop() {
		for range 500 {
			if _, err := c.Write(payload); err != nil {
				b.Fatal(err)
			}
		}
		q.r.since = time.Now().Add(-time.Second)
		before, start := d.Lost().Shed, used()
		q.r.fs, q.r.n, q.r.size = fs, 0, 0
		if err := q.raw.Control(q.r.fn); err != nil || q.r.n != 0 {
			b.Fatal(q.r.n, err)
		}
		spent += used() - start
		n += int(d.Lost().Shed-before) / 45
	}
	b.ReportMetric(float64(spent)/float64(n), "ns/frame")
}

// TestReadLimit: a batch ends after a MiB, though there are more super-frames.
func TestReadLimit(t *testing.T) {
	d := openTest(t, Options{MAC: testMAC, MTU: 9000, ReadOffload: true})
	if !d.ReadSuper().UDP {
		t.Skip("the kernel has no USO for TAPs")
	}
	sh(t, fmt.Sprintf("ip addr add 198.51.100.1/24 dev %s && ip neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev %[1]s", d.Name()))
	c, err := net.Dial("udp4", "198.51.100.2:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, _ := c.(*net.UDPConn).SyscallConn()
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 8000)
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20)
	})
	for range 20 {
		if _, err := c.Write(make([]byte, 64000)); err != nil {
			t.Fatal(err)
		}
	}
	fs := frames(64, 64)
	n, err := d.ReadBatch(fs)
	if err != nil || n < 2 {
		t.Fatalf("%d frames; %v", n, err)
	}
	// Small frames of the kernel's own may be among them.
	all := 0
	for _, f := range fs[:n] {
		all += f.Len
	}
	if last := fs[n-1].Len; all < readLimit || all-last >= readLimit {
		t.Errorf("%d frames with %d octets at once, the last with %d: want no more after %d", n, all, last, readLimit)
	}
}
