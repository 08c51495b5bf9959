package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var testMAC = []byte{2, 0xde, 0xad, 0xbe, 0xef, 1}

// randomPacket makes IP packets about the edges of the test, many malformed.
func randomPacket(r *rand.Rand) []byte {
	pick := func(v ...byte) byte { return v[r.IntN(len(v))] }
	proto := pick(0, 1, 6, 17, 17, 17, 43, 44, 44, 50, 51, 58, 58, 59, 60, 108)
	rest := make([]byte, r.IntN(64))
	for i := range rest {
		rest[i] = pick(0, 0, 0, 1, 6, 17, 50, 51, 58, 60, 108, byte(r.IntN(256)))
	}
	if len(rest) >= 8 {
		switch r.IntN(4) {
		case 0:
			copy(rest[2:], []byte{1, 0xf4}) // 500
		case 1:
			copy(rest[2:], []byte{0x11, 0x94}) // 4500
		case 2:
			rest[0] = pick(132, 133, 134, 135, 136, 137, 138)
		}
	}
	var b []byte
	if r.IntN(2) == 0 {
		src := []string{"10.9.0.2", "10.9.0.3", "172.20.1.1", "8.8.8.8"}[r.IntN(4)]
		dst := []string{"10.9.0.1", "10.9.0.99"}[r.IntN(2)]
		b = ipPacket(src, dst, proto, rest)
		switch r.IntN(6) {
		case 0:
			b[6] = pick(0x20, 0x40, 0x80, 0x3f)
		case 1:
			b[7] = pick(1, 0xff)
		case 2:
			b[0] = 0x40 | pick(0, 4, 6, 8, 15)
		case 3:
			b[0] = pick(0x05, 0x65, 0xf5)
		}
	} else {
		src := []string{"fd09::2", "fd09::3", "2001:db8::7", "2002::1"}[r.IntN(4)]
		dst := []string{"fd09::1", "fd09::99"}[r.IntN(2)]
		b = ipPacket(src, dst, proto, rest)
		b[7] = pick(255, 64, 254)
		if r.IntN(20) == 0 {
			b[0] = pick(0x40, 0x50)
		}
	}
	if r.IntN(8) == 0 {
		b = b[:r.IntN(len(b))]
	}
	return b
}

// The chain in the kernel and the reader, its socket filter included, divide
// all packets between them: none goes both ways, and none is lost.
func TestChainAndReaderAgree(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	divert(t, w)
	mac := w.Link().MAC
	sh(t, `nft add table netdev count; nft add chain netdev count c "{ type filter hook ingress device e0 priority 0; }"
		nft add rule netdev count c ether saddr 02:de:ad:be:ef:01 counter drop`)
	defer exec.Command("nft", "delete", "table", "netdev", "count").Run()
	counted := func() int {
		m := regexp.MustCompile(`packets (\d+)`).FindStringSubmatch(sh(t, "nft list table netdev count"))
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var fd, index int
	l.at(func() {
		fd, _ = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	})
	defer unix.Close(fd)
	out := l.sh("cat /sys/class/net/e1/ifindex")
	if _, err := fmt.Sscan(out, &index); err != nil {
		t.Fatalf("index of e1: %v in %q", err, out)
	}
	send := func(frame []byte) {
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
			t.Fatal(err)
		}
	}
	ether := func(kind int, ip []byte) []byte {
		f := append(append([]byte(nil), mac...), testMAC...)
		switch kind {
		case 1: // for another host
			f[5] ^= 1
		case 2: // tagged
			f = append(f, 0x81, 0, 0, 5)
		}
		if len(ip) > 0 && ip[0]>>4 == 6 {
			f = append(f, 0x86, 0xdd)
		} else {
			f = append(f, 8, 0)
		}
		return append(f, ip...)
	}
	ps := make([]Packet, 64)
	for i := range ps {
		ps[i] = Packet{Buf: make([]byte, 2000), Off: ReadHeadroom}
	}
	fence := ipPacket("8.8.8.8", "10.9.0.1", 50, []byte("the fence"))
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	kept := 0
	rounds, size := 40, 64
	if os.Getenv("MISSIU_TEST_SINGLE") != "" { // to find the packet that they disagree about
		rounds, size = 1500, 1
	}
	for round := range rounds {
		before, sent, got := counted(), 0, 0
		bad := 0 // dropped by the chain and of no use to us
		var frames [][]byte
		for range size {
			kind := 0
			if k := r.IntN(12); k <= 2 {
				kind = k
			}
			f := ether(kind, randomPacket(r))
			if len(f) < 15 || kind == 2 && len(f) < 24 { // the kernel drops a cut tag itself
				continue
			}
			frames = append(frames, f)
			send(f)
			sent++
			if kind == 0 && w.sets.Load().judge(binary.BigEndian.Uint16(f[12:]), f[14:]) == malformed {
				bad++
			}
		}
		send(ether(0, fence))
		for fenced := false; !fenced; {
			n, err := w.ReadBatch(ps)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range ps[:n] {
				switch {
				case bytes.HasSuffix(p.Buf[p.Off:p.Off+p.Len], []byte("the fence")):
					fenced = true
				case bytes.Equal(p.Buf[p.Off-8:p.Off-2], testMAC):
					got++
				}
			}
		}
		if passed := counted() - before; passed+got+bad != sent {
			t.Errorf("seed %d, round %d: sent %d, to the stack %d, kept %d, malformed %d", seed, round, sent, passed, got, bad)
			s := w.sets.Load()
			for _, f := range frames {
				t.Logf("%d % x", s.judge(binary.BigEndian.Uint16(f[12:]), f[14:]), f[12:])
			}
			t.FailNow()
		}
		kept += got
	}
	if kept == 0 {
		t.Error("nothing was kept")
	}
}

func TestSpans(t *testing.T) {
	for _, k := range []struct {
		in   []string
		want string
	}{
		{nil, "[]"},
		{[]string{"10.0.0.0/8"}, "[{10.0.0.0 10.255.255.255}]"},
		{[]string{"10.1.0.0/16", "10.0.0.0/8", "10.2.3.4/32"}, "[{10.0.0.0 10.255.255.255}]"},
		{[]string{"10.0.1.0/24", "10.0.0.0/24", "10.0.3.0/24"}, "[{10.0.0.0 10.0.1.255} {10.0.3.0 10.0.3.255}]"},
		{[]string{"10.0.0.77/24"}, "[{10.0.0.0 10.0.0.255}]"},
		{[]string{"255.255.255.255/32", "128.0.0.0/1", "0.0.0.0/0"}, "[{0.0.0.0 255.255.255.255}]"},
		{[]string{"2001:db8::/32", "2001:db9::/32"}, "[{2001:db8:: 2001:db9:ffff:ffff:ffff:ffff:ffff:ffff}]"},
	} {
		got := "["
		for i, r := range coverOf(slices.Values(prefixes(k.in...))) {
			if i > 0 {
				got += " "
			}
			got += "{" + r.first.String() + " " + r.last.String() + "}"
		}
		if got += "]"; got != k.want {
			t.Errorf("%v: got %s, want %s", k.in, got, k.want)
		}
	}
}

// TestRoughly: the ranges for a filter hold all prefixes, however many there are,
// and not the rest of the world.
func TestRoughly(t *testing.T) {
	host := func(a, b, c, d int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(a), byte(b), byte(c), byte(d)}), 32)
	}
	r := rand.New(rand.NewPCG(1, 2))
	var near, far, mixed, six []netip.Prefix
	for i := range 20000 {
		near = append(near, host(172, 16, i>>8, i))
		far = append(far, host(r.IntN(100), r.IntN(256), r.IntN(256), r.IntN(256)))
		six = append(six, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0x16, byte(r.IntN(256)), 0, 0, 0, byte(i >> 8), byte(i)}), 64))
	}
	mixed = append(append(mixed, near...), netip.MustParsePrefix("10.0.0.0/8"), host(192, 0, 2, 1))
	all4, all6 := netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")
	for _, tt := range []struct {
		name    string
		all     netip.Prefix
		ps      []netip.Prefix
		outside []string
	}{
		{"one", all4, []netip.Prefix{host(10, 1, 2, 3)}, []string{"10.1.2.2", "10.1.2.4"}},
		{"none", all4, nil, []string{"0.0.0.0", "10.1.2.4"}},
		{"everything", all4, []netip.Prefix{all4}, nil},
		{"near", all4, near, []string{"172.15.0.1", "172.17.0.0", "192.0.2.1", "10.0.0.1"}},
		{"far", all4, far, []string{"192.0.2.1", "172.16.0.1"}},
		{"mixed", all4, mixed, []string{"192.0.3.1", "9.255.255.255", "11.0.0.0", "172.17.0.0"}},
		{"IPv6", all6, six, []string{"fd01::1", "2001:db8::1"}},
	} {
		c := roughly(table(tt.ps), tt.all, maxFilterSpans)
		holds := func(a netip.Addr) bool {
			return slices.ContainsFunc(c, func(s span) bool { return !a.Less(s.first) && !s.last.Less(a) })
		}
		for _, p := range tt.ps {
			if s := spanOf(p); !slices.ContainsFunc(c, func(o span) bool { return !s.first.Less(o.first) && !o.last.Less(s.last) }) {
				t.Fatalf("%s: %v is not in %v", tt.name, p, c)
			}
		}
		for _, a := range tt.outside {
			if holds(netip.MustParseAddr(a)) {
				t.Errorf("%s: %v is in %v", tt.name, a, c)
			}
		}
		if len(c) > maxFilterSpans {
			t.Errorf("%s: %d ranges", tt.name, len(c))
		}
	}
}

func TestTableName(t *testing.T) {
	for in, want := range map[string]string{"eth0": "missiu-eth0", "eth0.5": "missiu-eth0.5", "a_b": "missiu-a_5fb", "a{b": "missiu-a_7bb", "é": "missiu-_c3_a9"} {
		if got := tableName(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

func FuzzJudge(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		f.Add(randomPacket(r))
	}
	s := &sets{divert: table(prefixes("10.9.0.2/32", "fd09::2/128")), local: map[netip.Addr]struct{}{netip.MustParseAddr("10.9.0.1"): {}}}
	none := &sets{divert: table(), local: nil}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, kind := range []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} {
			s.judge(kind, b)
			if v := none.judge(kind, b); v == kept && len(b) >= 40 {
				t.Fatalf("%#x: kept with empty sets", kind)
			}
		}
	})
}

func FuzzParseTooBig(f *testing.F) {
	q := ipPacket("10.9.0.1", "10.9.0.9", 50, make([]byte, 30))
	m := append([]byte{3, 4, 0, 0, 0, 0, 0, 40}, q[:28]...)
	s := ^sum16(0, m)
	m[2], m[3] = byte(s>>8), byte(s)
	f.Add(ipPacket("10.9.0.3", "10.9.0.1", 1, m))
	f.Add(tooBig6(44, append([]byte{50, 0, 0, 1, 0, 0, 0, 1}, make([]byte, 20)...), 1400))
	f.Fuzz(func(t *testing.T, b []byte) {
		if q, ok := ParseTooBig(b); ok && (!q.Src.IsValid() || q.MTU < 0 || q.MTU > 65535) {
			t.Fatalf("%+v", q)
		}
	})
}

func tooBig6(next byte, quoted []byte, mtu uint16) []byte {
	m := append([]byte{2, 0, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, ipPacket("fd09::1", "fd09::9", next, quoted)...)
	p := ipPacket("fd09::3", "fd09::1", 58, m)
	s := ^sum16(sum32(p[8:40])+uint64(len(m))+58, m)
	p[42], p[43] = byte(s>>8), byte(s)
	return p
}

func TestParseTooBig(t *testing.T) {
	four := func(mtu uint16, total uint16, proto byte, upper ...byte) []byte {
		q := ipPacket("10.9.0.1", "10.9.0.9", proto, upper)
		q[2], q[3] = byte(total>>8), byte(total)
		m := append([]byte{3, 4, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, q...)
		s := ^sum16(0, m)
		m[2], m[3] = byte(s>>8), byte(s)
		return ipPacket("10.9.0.3", "10.9.0.1", 1, m)
	}
	broken := four(1400, 1500, 50, 0, 0, 1, 2, 0, 0, 0, 1)
	broken[len(broken)-1] ^= 1
	src4, dst4 := netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.9")
	src6, dst6 := netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd09::9")
	for _, k := range []struct {
		name string
		b    []byte
		want TooBig
		ok   bool
	}{
		{"ESP", four(1400, 1500, 50, 0, 0, 1, 2, 0, 0, 0, 1), TooBig{1400, src4, dst4, 50, 0x102, 0, 0}, true},
		{"AH", four(1400, 1500, 51, 4, 4, 0, 0, 0, 0, 1, 3), TooBig{1400, src4, dst4, 51, 0x103, 0, 0}, true},
		{"UDP 4500", four(1400, 1500, 17, 0x11, 0x94, 0x04, 0, 5, 0, 0, 0), TooBig{1400, src4, dst4, 17, 0, 4500, 1024}, true},
		{"UDP 4500 with SPI", four(1400, 1500, 17, 0x11, 0x94, 0x04, 0, 5, 0, 0, 0, 0, 0, 1, 4), TooBig{1400, src4, dst4, 17, 0x104, 4500, 1024}, true},
		{"no MTU, RFC 1191 7.1", four(0, 1500, 50, 0, 0, 1, 2, 0, 0, 0, 1), TooBig{1492, src4, dst4, 50, 0x102, 0, 0}, true},
		{"other UDP", four(1400, 1500, 17, 0, 53, 0x04, 0, 5, 0, 0, 0), TooBig{}, false},
		{"TCP", four(1400, 1500, 6, 0, 0, 0, 0, 0, 0, 0, 0), TooBig{}, false},
		{"MTU not smaller", four(1500, 1500, 50, 0, 0, 1, 2, 0, 0, 0, 1), TooBig{}, false},
		{"checksum", broken, TooBig{}, false},
		{"IPv6 ESP", tooBig6(50, []byte{0, 0, 1, 5, 0, 0, 0, 1}, 1300), TooBig{1300, src6, dst6, 50, 0x105, 0, 0}, true},
		{"IPv6 ESP, first fragment", tooBig6(44, []byte{50, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 6, 0, 0, 0, 1}, 1300), TooBig{1300, src6, dst6, 50, 0x106, 0, 0}, true},
		{"IPv6 ESP, later fragment", tooBig6(44, []byte{50, 0, 0, 9, 0, 0, 0, 1, 0, 0, 1, 6, 0, 0, 0, 1}, 1300), TooBig{}, false},
	} {
		got, ok := ParseTooBig(k.b)
		if ok != k.ok || ok && got != k.want {
			t.Errorf("%s: got %+v, %v, want %+v, %v", k.name, got, ok, k.want, k.ok)
		}
		for n := range k.b {
			if _, ok := ParseTooBig(k.b[:n]); ok {
				t.Errorf("%s: cut to %d octets: accepted", k.name, n)
			}
		}
	}
}
