package bump

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/internal/nstest"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// stamps are the TOS that the pump of these tests writes, by the side that a
// packet comes from: nothing else has them.
var stamps = [2]byte{High: 11 << 2, Low: 12 << 2}

// counters count at the wire and behind the stack's door which IPv4 packets bear the
// stamp of their direction. Chains count exactly, where captures may lose.
type stampCheck struct{ l *lab }

func (l *lab) stamps() *stampCheck {
	c := &stampCheck{l}
	c.atPeer()
	c.here()
	l.t.Cleanup(func() { exec.Command("nft", "delete table ip c").Run() })
	return c
}

func (c *stampCheck) atPeer() {
	c.l.t.Helper()
	c.l.sh(`nft "add table netdev c; add chain netdev c i { type filter hook ingress device e1 priority 0; }; add rule netdev c i ip dscp 11 counter; add rule netdev c i ip dscp != 11 counter"`)
}

func (c *stampCheck) here() {
	c.l.t.Helper()
	sh(c.l.t, `nft "add table ip c; delete table ip c; add table ip c; add chain ip c i { type filter hook prerouting priority -300; }; add rule ip c i iifname != lo ip dscp 12 counter; add rule ip c i iifname != lo ip dscp != 12 counter"`)
}

var counted = regexp.MustCompile(`counter packets (\d+) bytes (\d+)`)

// want fails the test if a packet passed unstamped, or fewer than n octets stamped each way.
func (c *stampCheck) want(what string, n int) {
	c.l.t.Helper()
	for where, out := range map[string]string{"out": c.l.sh("nft list table netdev c"), "in": sh(c.l.t, "nft list table ip c")} {
		var v []int
		for _, m := range counted.FindAllStringSubmatch(out, -1) {
			k, _ := strconv.Atoi(m[2])
			v = append(v, k)
		}
		if len(v) != 2 {
			c.l.t.Fatalf("%s: %s", where, out)
		}
		if v[0] < n || v[1] != 0 {
			c.l.t.Errorf("%s, %s: %d octets stamped, want at least %d; %d without, want 0", what, where, v[0], n, v[1])
		}
	}
}

// flow is numbered UDP datagrams from one end to the other, and their count.
type flow struct {
	sent       atomic.Uint64
	bare       atomic.Uint64 // that arrived without their direction's stamp
	mu         sync.Mutex
	seen       map[uint64]int
	stop, done chan struct{}
	conns      []net.PacketConn
}

// flow sends every pause; out: from here to the peer.
func (l *lab) flow(out bool, pause time.Duration) *flow {
	l.t.Helper()
	f := &flow{seen: map[uint64]int{}, stop: make(chan struct{}), done: make(chan struct{})}
	from, to, port := "10.9.0.1", "10.9.0.2", 7
	if !out {
		from, to, port = to, from, 8
	}
	listen := func(at string) (c net.PacketConn) {
		var err error
		if c, err = net.ListenPacket("udp4", fmt.Sprintf("%s:%d", at, port)); err != nil {
			l.t.Fatal(err)
		}
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err == nil {
			raw.Control(func(fd uintptr) {
				if err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err == nil {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
				}
			})
		}
		if err != nil {
			l.t.Fatal(err)
		}
		f.conns = append(f.conns, c)
		return c
	}
	var a, b net.PacketConn
	if out {
		a = listen(from)
		l.at(func() { b = listen(to) })
	} else {
		b = listen(to)
		l.at(func() { a = listen(from) })
	}
	go func() {
		defer close(f.done)
		m := make([]byte, 64)
		for next := time.Now(); ; next = next.Add(pause) {
			select {
			case <-f.stop:
				return
			default:
			}
			if wait := time.Until(next); wait > 0 {
				time.Sleep(wait)
			} else if wait < -10*time.Millisecond {
				next = time.Now() // a machine that stood still does not make up for it
			}
			binary.BigEndian.PutUint64(m, f.sent.Load())
			if _, err := a.WriteTo(m, &net.UDPAddr{IP: netip.MustParseAddr(to).AsSlice(), Port: port}); err == nil {
				f.sent.Add(1)
			}
		}
	}()
	go func() {
		m, oob := make([]byte, 64), make([]byte, 64)
		stamp := stamps[High]
		if !out {
			stamp = stamps[Low]
		}
		for {
			n, k, _, _, err := b.(*net.UDPConn).ReadMsgUDP(m, oob)
			if err != nil {
				return
			}
			if c, err := unix.ParseSocketControlMessage(oob[:k]); err != nil || len(c) != 1 || c[0].Data[0] != stamp {
				f.bare.Add(1)
			}
			if n == 64 {
				f.mu.Lock()
				f.seen[binary.BigEndian.Uint64(m)]++
				f.mu.Unlock()
			}
		}
	}()
	l.t.Cleanup(f.end)
	return f
}

func (f *flow) end() {
	select {
	case <-f.stop:
	default:
		close(f.stop)
		<-f.done
		// What is on the way: all, or until a second has brought nothing.
		for n, since := -1, time.Now(); f.count() < int(f.sent.Load()) && time.Since(since) < time.Second; time.Sleep(time.Millisecond) {
			if k := f.count(); k != n {
				n, since = k, time.Now()
			}
		}
		for _, c := range f.conns {
			c.Close()
		}
	}
}

// count is how many arrived.
func (f *flow) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.seen)
}

// since is how many arrived of those numbered first or above.
func (f *flow) since(first uint64) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k := range f.seen {
		if k >= first {
			n++
		}
	}
	return n
}

// next is the number of a datagram that is not being sent yet.
func (f *flow) next() uint64 { return f.sent.Load() + 1 }

// result is how many were sent, did not arrive, and came twice.
func (f *flow) result() (sent, lost, twice int) {
	f.end()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.seen {
		twice += n - 1
	}
	sent = int(f.sent.Load())
	return sent, sent - len(f.seen), twice
}

// at runs f in the peer's namespace; sockets that f makes stay there.
func (l *lab) at(f func()) { nstest.At(l.t, l.peer, f) }

// copyTCP sends octets from one end to the other.
func (l *lab) copyTCP(out bool, octets int64) {
	l.t.Helper()
	var ln net.Listener
	var err error
	listen := func() { ln, err = net.Listen("tcp", ":5001") }
	got := make(chan int64, 1)
	accept := func() {
		c, err := ln.Accept()
		if err != nil {
			got <- 0
			return
		}
		defer c.Close()
		n, _ := io.Copy(io.Discard, c)
		got <- n
	}
	send := func(to string) {
		c, err := net.DialTimeout("tcp", to+":5001", time.Minute)
		if err != nil {
			l.t.Error(err)
			ln.Close()
			return
		}
		io.CopyN(c, zeros{}, octets)
		c.Close()
	}
	if out {
		l.at(listen)
	} else {
		listen()
	}
	if err != nil {
		l.t.Fatal(err)
	}
	defer ln.Close()
	go accept()
	if out {
		send("10.9.0.2")
	} else {
		l.at(func() { send("10.9.0.1") })
	}
	if n := <-got; n != octets {
		l.t.Errorf("tcp, out %v: %d octets of %d", out, n, octets)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// Every packet of both directions passes the process once: TCP, super-frames or
// cut; fragments; what others send
// by AF_PACKET past the queueing discipline; what the host forwards out of the
// interface that it came by.
func TestStamp(t *testing.T) { bothWays(t, testStamp) }

func testStamp(t *testing.T, o Options) {
	l := newLab(t)
	b := open(t, o)
	startPump(t, b, stamps)
	set(t, b, Active, Active)
	check := l.stamps()
	octets := int64(30 << 20)
	if os.Getenv("MISSIU_LONG") != "" {
		octets = 300 << 20
	}
	l.copyTCP(true, octets)
	l.copyTCP(false, octets)
	if n := answered(t, 5, "-s 8000 10.9.0.2"); n != 5 {
		t.Errorf("fragmented pings: %d of 5", n)
	}
	check.want("TCP", int(octets))
	if s := b.Stats(High); s.Dropped != 0 || s.Refused != 0 {
		t.Errorf("%+v", s)
	}
	// A kernel that takes no super-frames.
	for i := range b.sides {
		b.sides[i].takes(tap.Super{})
	}
	l.copyTCP(true, 4<<20)
	if s := b.Stats(Low); b.Super().TCP4 && (s.Cut == 0 || s.Refused != 0) {
		t.Errorf("%+v, want super-frames cut", s)
	}

	bypass(t, b.Link().Index)
	// A forwarding host.
	sh(t, "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/all/send_redirects; echo 0 >/proc/sys/net/ipv4/conf/e0/send_redirects; ip route add 10.9.8.0/24 via 10.9.0.2")
	l.sh("ip route add 10.9.8.0/24 via 10.9.0.1")
	read := b.Stats(High).Read
	exec.Command("ip", "netns", "exec", l.peer, "ping", "-n", "-c", "20", "-i", "0.01", "-W", "1", "10.9.8.7").Run()
	if n := b.Stats(High).Read - read; n < 20 {
		t.Errorf("%d frames that were forwarded passed the process, want 20", n)
	}
	check.want("bypass and forwarding", int(octets))
	if got := answered(t, 3, "fd09::2"); got != 3 {
		t.Errorf("IPv6: %d of 3 pings", got)
	}
}

// bypass sends IPv4 packets past the queueing discipline of an interface.
func bypass(t *testing.T, index int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
		t.Fatal(err)
	}
	frame := append([]byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 0}, make([]byte, 50)...)
	copy(frame[14:], []byte{0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2})
	for range 50 {
		// ENOBUFS: taken on the way.
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index}); err != nil && err != unix.ENOBUFS {
			t.Fatal(err)
		}
	}
}

// overrun is how many packets the kernel has dropped because it had no time for them
// (netdev_max_backlog), which a busy machine does.
func overrun(t *testing.T) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var processed, dropped int
		if _, err := fmt.Sscanf(line, "%x %x", &processed, &dropped); err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		n += dropped
	}
	return n
}

// Changes of state under 10,000 packets a second each way lose at most one of a
// thousand, and double none.
func TestSwitching(t *testing.T) { bothWays(t, testSwitching) }

func testSwitching(t *testing.T, o Options) {
	l := newLab(t)
	b := open(t, o)
	startPump(t, b, [2]byte{})
	// What would lose frames at the first change.
	if b.away == nil {
		for _, index := range []int{b.pair.kx, b.pair.ku} {
			if l, err := b.handle.LinkByIndex(index); err != nil || l.Attrs().OperState != netlink.OperUp {
				t.Errorf("a helper interface without its carrier: %v, %v", l, err)
			}
		}
		if kind, err := b.guard.qdisc(b.pair.ku); err != nil || kind == "" {
			t.Errorf("queueing discipline of a helper: %q, %v; it is not to come later", kind, err)
		}
	}
	until(t, "the neighbour", func() bool { return answered(t, 1, "10.9.0.2") == 1 })
	before := overrun(t)
	out, in := l.flow(true, 100*time.Microsecond), l.flow(false, 100*time.Microsecond)
	flips := 0
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end) || min(out.sent.Load(), in.sent.Load()) < 5000; flips++ {
		for _, s := range []State{Active, Closed, Active, Passive} {
			set(t, b, s, s)
			time.Sleep(30 * time.Millisecond)
		}
	}
	for what, f := range map[string]*flow{"out": out, "in": in} {
		sent, lost, twice := f.result()
		t.Logf("%s: %d sent, %d lost, %d twice in %d changes", what, sent, lost, twice, 4*flips)
		most := sent/1000 + overrun(t) - before
		if sent < 5000 || lost > most || twice != 0 {
			t.Errorf("%s: %d sent, want at least 5000; %d lost, want at most %d; %d came twice; high %+v, low %+v", what, sent, lost, most, twice, b.Stats(High), b.Stats(Low))
		}
	}
	if b.Stats(High).Read == 0 || b.Stats(Low).Read == 0 {
		t.Error("nothing passed the process")
	}
}

// An interface that is severed and opened again under traffic does not lose what was taken
// before the end. (Outwards its queue drops for a moment, while clsact comes and goes.)
func TestStartStop(t *testing.T) {
	l := newLab(t)
	before := overrun(t)
	out, in := l.flow(true, 100*time.Microsecond), l.flow(false, 100*time.Microsecond)
	var read uint64
	for range 8 {
		b, err := Open("e0", Options{})
		if err != nil {
			t.Fatal(err)
		}
		p := startPump(t, b, [2]byte{})
		set(t, b, Active, Active)
		time.Sleep(50 * time.Millisecond)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		for _, d := range p.done {
			<-d
		}
		read += min(b.Stats(High).Read, b.Stats(Low).Read)
		time.Sleep(20 * time.Millisecond)
	}
	for what, f := range map[string]*flow{"out": out, "in": in} {
		sent, lost, twice := f.result()
		t.Logf("%s: %d sent, %d lost, %d twice", what, sent, lost, twice)
		if most := sent/20 + overrun(t) - before; f == in && lost > most || twice != 0 {
			t.Errorf("%s: %d of %d lost, want at most %d; %d came twice", what, lost, sent, most, twice)
		}
	}
	if read == 0 {
		t.Error("nothing passed the process")
	}
}

// Sides are independent; what is written to one that is not active is not sent.
func TestOneSide(t *testing.T) {
	l := newLab(t)
	b := open(t, Options{})
	startPump(t, b, [2]byte{})
	out, in := l.flow(true, time.Millisecond), l.flow(false, time.Millisecond)
	for _, k := range []struct {
		high, low State
		out, in   bool
	}{{Active, Passive, false, true}, {Closed, Active, true, false}} {
		set(t, b, Active, Active)
		until(t, "both ways", func() bool { return answered(t, 1, "10.9.0.2") == 1 })
		set(t, b, k.high, k.low)
		passes, stays := out, in
		if k.in {
			passes, stays = in, out
		}
		p, s := passes.next(), stays.next()
		until(t, fmt.Sprintf("high %v, low %v: what passes, out %v, in %v", k.high, k.low, k.out, k.in), func() bool {
			return passes.since(p) >= 50 && stays.sent.Load() >= s+50
		})
		time.Sleep(50 * time.Millisecond)
		if n := stays.since(s); n > 0 {
			t.Errorf("high %v, low %v: %d passed, want only out %v, in %v", k.high, k.low, n, k.out, k.in)
		}
	}
}

// What happens to an interface and to what severs it: never a packet past the
// process, and all works again by itself.
func TestMishaps(t *testing.T) {
	l := newLab(t)
	b := open(t, Options{})
	startPump(t, b, stamps)
	set(t, b, Active, Active)
	check := l.stamps()
	flows := []*flow{l.flow(true, 200*time.Microsecond), l.flow(false, 200*time.Microsecond)}
	kx, ku := pairNames("e0")
	works := func(what string) {
		t.Helper()
		until(t, what, func() bool { return answered(t, 5, "10.9.0.2") == 5 })
		check.want(what, 1)
		for i, f := range flows {
			if n := f.bare.Swap(0); n != 0 {
				t.Errorf("%s: %d datagrams of flow %d passed unstamped", what, n, i)
			}
		}
	}
	works("start")
	for _, k := range []struct{ what, line string }{
		{"another MAC", "ip link set e0 address 02:00:00:00:77:77"},
		{"another MTU", "ip link set e0 mtu 1400"},
		{"down and up", "ip link set e0 down; ip link set e0 up"},
		{"helpers deleted", "ip link del " + kx},
		{"a helper down", "ip link set " + ku + " down"},
		{"redirection deleted", "tc qdisc del dev " + kx + " ingress"},
		{"helper renamed", "ip link set " + kx + " name other"},
		{"second lock deleted", "tc qdisc del dev e0 clsact"},
	} {
		sh(t, k.line)
		works(k.what)
	}
	// The kernel takes the chains with the name, until we hear of it.
	followed := func(name string) {
		t.Helper()
		until(t, "the rules to follow to "+name, func() bool {
			out, _ := exec.Command("nft", "list", "table", "netdev", tableName("e0")).Output()
			return strings.Count(string(out), "device \""+name+"\"") == 2
		})
	}
	for _, names := range [][2]string{{"e0", "e9"}, {"e9", "e0"}} {
		sh(t, "ip link set "+names[0]+" name "+names[1])
		followed(names[1])
		works("renamed to " + names[1])
	}
	// The chains are gone, and we, whose doing it seems to be, do not put them back.
	if err := b.table.remove(); err != nil {
		t.Fatal(err)
	}
	n := flows[1].next()
	until(t, "some that come in", func() bool { return flows[1].since(n) > 50 })
	b.check(true)
	works("rules deleted")
	// Another's rules go, ours stay.
	if out, err := exec.Command("nft", "delete", "table", "netdev", tableName("e0")).CombinedOutput(); err == nil {
		t.Errorf("somebody else may delete our table: %s", out)
	}
	sh(t, "nft flush ruleset")
	check.here()
	works("ruleset flushed")

	sh(t, "ip link del e0")
	until(t, "the end of the interface", func() bool { return b.Link().Index == 0 })
	if _, err := b.WriteBatch(Low, []tap.Frame{{Buf: make([]byte, 200), Off: 64, Len: 64}}); err == nil {
		t.Error("no error for a frame to an interface that is not there")
	}
	l.t = t
	sh(t, `ip link add e0 type veth peer name e1 netns `+l.peer)
	l.sh("ip addr add 10.9.0.2/24 dev e1; nft flush ruleset")
	check.atPeer()
	l.sh("ip link set e1 up")
	l.address("e0")
	works("made anew")
	var told []string
	for {
		select {
		case e := <-b.Events():
			if e.Err == nil {
				told = append(told, e.What)
			}
			continue
		default:
		}
		break
	}
	all := strings.Join(told, ", ")
	for _, want := range []string{"renamed", "mac changed", "helper interfaces repaired", "second lock repaired", "rules repaired", "deleted", "back"} {
		if !strings.Contains(all, want) {
			t.Errorf("told: %s; want %q among them", all, want)
		}
	}
	if n, err := exec.Command("sh", "-c", "ip -o link | grep -c 'mi[ku]'").Output(); strings.TrimSpace(string(n)) != "2" {
		t.Errorf("%s helper interfaces, want 2 (%v)", n, err)
	}
}

// A frame keeps its VLAN tag, in both directions, and multicast comes in, with
// offloads and without.
func TestFrames(t *testing.T) {
	for _, offload := range []string{tap.OffloadAuto, tap.OffloadNone} {
		t.Run(offload, func(t *testing.T) { testFrames(t, Options{Offload: offload}) })
	}
	t.Run(SeverNamespace, func(t *testing.T) { testFrames(t, Options{Sever: SeverNamespace}) })
}

func testFrames(t *testing.T, o Options) {
	l := newLab(t)
	b := open(t, o)
	if super := b.Super(); o.Offload == tap.OffloadNone && super != (tap.Super{}) {
		t.Errorf("super-frames: %v", super)
	}
	startPump(t, b, [2]byte{})
	set(t, b, Active, Active)
	tagged := append([]byte{2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x81, 0, 0x60, 0x64, 0x88, 0xb5}, []byte("tagged frame, forty-two octets of experiments")...)
	for _, side := range []Side{High, Low} {
		got := make(chan string, 64)
		detach, err := b.Attach(side, false, func(fs []tap.Frame) {
			for i := range fs {
				f := &fs[i]
				if s := string(f.Buf[f.Off : f.Off+f.Len]); strings.Contains(s, "tagged frame") {
					got <- s
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		var there *socket
		send := func(ifname string) {
			i, err := net.InterfaceByName(ifname)
			if err != nil {
				t.Fatal(err)
			}
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := unix.Sendto(fd, tagged, 0, &unix.SockaddrLinklayer{Ifindex: i.Index}); err != nil {
				t.Fatal(err)
			}
		}
		l.at(func() {
			i, err := net.InterfaceByName("e1")
			if err == nil {
				there, err = packetSocket(socketOptions{index: i.Index, filter: passing(false, 0xffffffff)})
			}
			if err != nil {
				t.Fatal(err)
			}
		})
		if side == High {
			send("e0")
		} else {
			l.at(func() { send("e1") })
		}
		select {
		case s := <-got:
			if s != string(tagged) {
				t.Errorf("%v: %x, want %x", side, s, tagged)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%v: no frame", side)
		}
		if side == High {
			fs := []tap.Frame{{Buf: make([]byte, 70000), Off: Room}}
			there.file.SetReadDeadline(time.Now().Add(time.Minute))
			for {
				fs[0].Off = Room
				n, err := there.read(fs)
				if err != nil {
					t.Fatalf("the peer got no tagged frame: %v", err)
				}
				if s := string(fs[0].Buf[fs[0].Off : fs[0].Off+fs[0].Len]); n == 1 && strings.Contains(s, "tagged frame") {
					if s != string(tagged) {
						t.Errorf("the peer got %x, want %x", s, tagged)
					}
					break
				}
			}
		}
		there.close()
		detach()
	}

	e0, err := net.InterfaceByName("e0")
	if err != nil {
		t.Fatal(err)
	}
	group := &net.UDPAddr{IP: net.IPv4(239, 1, 2, 3), Port: 5007}
	c, err := net.ListenMulticastUDP("udp4", e0, group)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	l.sh("ip route add 239.0.0.0/8 dev e1")
	l.at(func() {
		s, err := net.DialUDP("udp4", nil, group)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.Write([]byte("to the group"))
	})
	m := make([]byte, 100)
	if n, _, err := c.ReadFrom(m); err != nil || string(m[:n]) != "to the group" {
		t.Errorf("multicast: %q, %v", m[:n], err)
	}
}

const childEnv = "MISSIU_TEST_BUMP_CHILD"

// TestChild is no test: it is the process that others kill.
func TestChild(t *testing.T) {
	dir, how, ok := strings.Cut(os.Getenv(childEnv), " ")
	if !ok {
		t.Skip("a helper of TestFate")
	}
	Dir = dir
	o := Options{FailOpen: how == "open"}
	if how == SeverNamespace {
		o.Sever = how
	}
	b, err := Open("e0", o)
	if err != nil {
		fmt.Println("failed:", err)
		return
	}
	startPump(t, b, stamps)
	if !b.Adopted() {
		if err := b.SetState(Active, Active); err != nil {
			fmt.Println("failed:", err)
			return
		}
	}
	fmt.Println("severed, adopted", b.Adopted())
	select {}
}

// What opens the way first when it stops tells a successor nothing: killed before the
// end, it is found active.
func TestKilledInClose(t *testing.T) {
	newLab(t)
	b, err := Open("e0", Options{})
	if err != nil {
		t.Fatal(err)
	}
	set(t, b, Active, Active)
	looking, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			s, err := loadState("e0")
			if n == 0 {
				close(looking)
			}
			if err != nil { // gone
				return
			}
			if s.High != Active || s.Low != Active {
				t.Errorf("a successor finds %v, %v", s.High, s.Low)
				return
			}
		}
	}()
	<-looking
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	<-done
}

// breakOff starts one, and kills it somewhere on its way.
func breakOff(t *testing.T, how string) {
	t.Helper()
	c := exec.Command(os.Args[0], "-test.run=^TestChild$")
	c.Env = append(os.Environ(), childEnv+"="+Dir+" "+how)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
	c.Process.Kill()
	c.Wait()
}

// child starts one, and waits until the interface is severed.
func child(t *testing.T, how string) (kill func(), said string) {
	t.Helper()
	c := exec.Command(os.Args[0], "-test.run=^TestChild$")
	c.Env = append(os.Environ(), childEnv+"="+Dir+" "+how)
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if !strings.HasPrefix(line, "severed") {
		c.Process.Kill()
		c.Wait()
		t.Fatalf("child: %q", line)
	}
	var once sync.Once
	kill = func() {
		once.Do(func() {
			c.Process.Signal(syscall.SIGKILL)
			c.Wait()
		})
	}
	t.Cleanup(kill)
	return kill, strings.TrimSpace(line)
}

// A process that is killed leaves the interface cut off until the next adopts
// it, or with FailOpen as if it had never been.
func TestFate(t *testing.T) {
	l := newLab(t)
	check := l.stamps()
	kills := 5
	if n, err := strconv.Atoi(os.Getenv("MISSIU_KILLS")); err == nil {
		kills = n
	}
	kill, said := child(t, "closed")
	flows := []*flow{l.flow(true, 200*time.Microsecond), l.flow(false, 200*time.Microsecond)}
	for k := range kills {
		if want := fmt.Sprint("severed, adopted ", k > 0); said != want {
			t.Errorf("child says %q, want %q", said, want)
		}
		if k%10 == 0 {
			if got := answered(t, 5, "10.9.0.2"); got != 5 {
				t.Errorf("kill %d: %d of 5 pings before", k, got)
			}
		}
		time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond)
		kill()
		if k%10 == 0 {
			if got := silence(t, 3, "10.9.0.2"); got != 0 {
				t.Errorf("kill %d: %d of 3 pings answered after", k, got)
			}
		}
		breakOff(t, "closed")
		kill, said = child(t, "closed")
	}
	check.want("kills", kills)
	kill()
	// Each lock is opened while nobody is there to close it again: the chains by a
	// new name, then for good; the second one while the chains are there.
	closed := func(what string) {
		t.Helper()
		if got := silence(t, 2, "10.9.0.2"); got != 0 {
			t.Errorf("%s: %d of 2 pings answered", what, got)
		}
		for i, f := range flows {
			if n := f.bare.Swap(0); n != 0 {
				t.Errorf("%s: %d datagrams of flow %d passed unstamped", what, n, i)
			}
		}
	}
	sh(t, "ip link set e0 name e8")
	closed("renamed when dead")
	sh(t, "ip link set e8 name e0; nft flush ruleset")
	closed("flushed when dead")
	if !Left("e0") {
		t.Error("nothing left after a flush")
	}
	if _, err := Open("e0", Options{Sever: SeverNamespace}); err == nil || !strings.Contains(err.Error(), "by the egress hook") {
		t.Errorf("by a namespace after a kill: %v", err)
	}
	closed("refused when dead")
	kill, said = child(t, "closed")
	if said != "severed, adopted true" {
		t.Errorf("child says %q after a flush", said)
	}
	check.here()
	until(t, "pings after a flush", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	kill()
	sh(t, "tc qdisc del dev e0 clsact")
	closed("second lock deleted when dead")
	check.want("opened when dead", 1)
	if !Left("e0") {
		t.Error("nothing left by the last")
	}
	any, err := Cleanup("e0")
	if err != nil || !any {
		t.Errorf("Cleanup: %v, %v", any, err)
	}
	until(t, "pings after Cleanup", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	if any, err := Cleanup("e0"); any || err != nil {
		t.Errorf("second Cleanup: %v, %v", any, err)
	}

	kill, _ = child(t, "open")
	kill()
	if out := sh(t, "nft list tables"); strings.Contains(out, "missiu") { // the kernel's doing, before the process is gone
		t.Errorf("killed with FailOpen: %s", out)
	}
	until(t, "the way to open", func() bool { return exec.Command("ping", "-n", "-c", "1", "-W", "1", "10.9.0.2").Run() == nil })
	if _, err := Cleanup("e0"); err != nil {
		t.Error(err)
	}
	if out := sh(t, "ip -o link; nft list tables; tc qdisc"); strings.Contains(out, "mik") || strings.Contains(out, "missiu") || strings.Contains(out, "clsact") {
		t.Errorf("left: %s", out)
	}
}

// An interface that is made anew has no chains before Linux 6.16, and no filters: IP does
// not pass it all the same until a process knows it.
func TestAnew(t *testing.T) {
	l := newLab(t)
	kill, _ := child(t, "closed")
	kill()
	// What the kernel took with the interface then; this one's would have come back.
	sh(t, "nft flush table netdev "+tableName("e0")+"; for c in rx tx; do nft delete chain netdev "+tableName("e0")+" $c; done; ip link del e0")
	sh(t, "ip link add e0 type veth peer name e1 netns "+l.peer)
	l.sh("ip addr add 10.9.0.2/24 dev e1; ip -6 addr add fd09::2/64 dev e1 nodad; ip link set e1 up")
	l.address("e0")
	nstest.Ready(t, "", "e0")
	nstest.Ready(t, l.peer, "e1")
	l.sh(`nft "add table inet c; add chain inet c i { type filter hook prerouting priority -300; }; add rule inet c i iifname e1 meta protocol {ip, ip6} counter"`)
	flow := l.flow(false, time.Millisecond)
	for _, to := range []string{"10.9.0.2", "fd09::2"} {
		if got := silence(t, 2, to); got != 0 {
			t.Errorf("%s: %d of 2 pings answered", to, got)
		}
	}
	if n := flow.count(); n != 0 || flow.sent.Load() == 0 {
		t.Errorf("%d datagrams of %d came in", n, flow.sent.Load())
	}
	if out := l.sh("nft list table inet c"); !strings.Contains(out, "counter packets 0 ") {
		t.Errorf("at the peer: %s", out)
	}
	kill, _ = child(t, "closed")
	until(t, "pings", func() bool { return silence(t, 1, "10.9.0.2") == 1 && silence(t, 1, "fd09::2") == 1 })
	kill()
	if _, err := Cleanup("e0"); err != nil {
		t.Error(err)
	}
	if out := sh(t, "nft list tables"); strings.Contains(out, "missiu") {
		t.Errorf("left: %s", out)
	}
}

// A bridge's port: what comes for a guest behind the bridge reaches it.
func TestBridge(t *testing.T) { bothWays(t, testBridge) }

func testBridge(t *testing.T, o Options) {
	l := newLab(t)
	guest := l.peer + "g"
	sh(t, "ip netns add "+guest)
	t.Cleanup(func() {
		exec.Command("ip", "netns", "del", guest).Run()
		exec.Command("ip", "link", "del", "br0").Run()
	})
	sh(t, `ip addr flush dev e0; ip link add br0 type bridge forward_delay 0; ip link set e0 master br0; ip link set br0 up; ip addr add 10.9.0.1/24 dev br0
		ip link add g0 type veth peer name g1 netns `+guest+`; ip link set g0 master br0 up
		ip netns exec `+guest+` sh -ec 'ip addr add 10.9.0.7/24 dev g1; ip link set g1 up'`)
	b := open(t, o)
	startPump(t, b, [2]byte{})
	set(t, b, Active, Active)
	until(t, "the bridge", func() bool { return exec.Command("ping", "-n", "-c", "1", "-W", "1", "10.9.0.2").Run() == nil })
	guestAnswers := "ip netns exec " + l.peer + " ping -n -c 1 -W 1 10.9.0.7"
	until(t, "the guest", func() bool { return exec.Command("sh", "-c", guestAnswers).Run() == nil })
	was := b.Stats(Low).Read
	out := l.sh("ping -n -c 5 -i 0.3 -l 5 -w 30 10.9.0.7")
	if !strings.Contains(out, " 5 received") || b.Stats(Low).Read-was < 5 {
		t.Errorf("%d frames came through the process\n%s", b.Stats(Low).Read-was, out)
	}
}
