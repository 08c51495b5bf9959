package main

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/bench/report"
	"github.com/missiu/missiu/test/bench/traffic"
	"github.com/missiu/missiu/test/e2e/lab"
)

func TestParsePing(t *testing.T) {
	out := `PING 10.2.0.1 (10.2.0.1) 56(84) bytes of data.
64 bytes from 10.2.0.1: icmp_seq=1 ttl=64 time=0.095 ms
64 bytes from fd0b::1: icmp_seq=2 ttl=64 time=12 ms
64 bytes from 10.2.0.1: icmp_seq=2 ttl=64 time=0.1 ms (DUP!)

--- 10.2.0.1 ping statistics ---
3 packets transmitted, 2 received, 33% packet loss, time 5ms
rtt min/avg/max/mdev = 0.095/6.047/12.000/5.952 ms
`
	if got, want := parsePing(out), []float64{0.000095, 0.012}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

const netDev = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       1       2    3    4    5     6          7         8        9       10   11   12   13    14      15         16
  eth0:     101     102  103  104  105   106        107       108      109      110  111  112  113   114     115        116
`

func TestParseNetDev(t *testing.T) {
	for name, want := range map[string]int{"rx_bytes": 101, "rx_packets": 102, "rx_dropped": 104, "tx_bytes": 109, "tx_packets": 110, "tx_dropped": 112} {
		if got, err := parseNetDev(netDev, "eth0", name); err != nil || got != want {
			t.Errorf("%s: %d %v, want %d", name, got, err, want)
		}
	}
	if _, err := parseNetDev(netDev, "eth1", "rx_bytes"); err == nil {
		t.Error("eth1 found")
	}
}

func TestParseFull(t *testing.T) {
	for text, want := range map[string]int{
		"Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors\nUdp: 1 2 3 4 5\nUdpLite: RcvbufErrors\nUdpLite: 9\n": 5,
		"Udp6InErrors 3\nUdp6RcvbufErrors                	7\n":                                                             7,
		"": 0,
	} {
		if got := parseFull(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if got := drops(map[string]int{"drop_in_replay": 2, "drop_out_mtu": 3, "in_protected": 100}); got != 5 {
		t.Errorf("drops = %d, want 5", got)
	}
}

// udpPacket is a captured datagram behind 14 + 20 octets of headers.
func udpPacket(kind lab.Kind, port uint16, payload string) lab.Packet {
	f := make([]byte, 42, 42+len(payload))
	binary.BigEndian.PutUint16(f[34:], port)
	binary.BigEndian.PutUint16(f[36:], port)
	return lab.Packet{Kind: kind, Proto: 17, L4: 34, Frame: append(f, payload...), Len: 1042}
}

func TestWire(t *testing.T) {
	secret := strings.Repeat("x", 40)
	clear := udpPacket(lab.Clear, traffic.UDPPort, traffic.Marker)
	good := map[wireKind]lab.Packet{
		readable:  clear,
		nativeESP: {Kind: lab.ESP, Proto: 50, Len: 1042},
		espInUDP:  udpPacket(lab.ESPinUDP, 4500, secret),
		wireguard: udpPacket(lab.Clear, wireguardPort, "\x04\x00\x00\x00"+secret),
		openvpn:   udpPacket(lab.Clear, openvpnPort, "\x48"+secret),
	}
	neighbour := lab.Packet{Kind: lab.Neighbour}
	for k, p := range good {
		if said, err := k.check([]lab.Packet{neighbour, p}, 1); err != nil || said == "" {
			t.Errorf("%v: %q %v", k, said, err)
		}
		if _, err := k.check([]lab.Packet{p}, 2); err == nil {
			t.Errorf("%v: one packet passes for two", k)
		}
		for other, q := range good {
			if _, err := k.check([]lab.Packet{p, p, q}, 1); err == nil && other != k && k != readable {
				t.Errorf("%v passes for %v", other, k)
			}
		}
		if k == readable {
			continue
		}
		leak := p
		leak.Frame = append(slices.Clone(p.Frame), traffic.Marker...)
		if _, err := k.check([]lab.Packet{p, leak}, 1); err == nil || !strings.Contains(err.Error(), "secret") {
			t.Errorf("%v: a marker on the wire: %v", k, err)
		}
	}
}

func TestFlags(t *testing.T) {
	p, err := parse([]string{"--quick", "--systems", "plain,missiu", "--works", "ping", "-o", "x"})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.systems) != 2 || p.systems[0].ID != report.Plain || !slices.Equal(p.works, []string{"ping"}) ||
		!slices.Equal(p.settings, []report.Setting{{Family: 4, Offload: true}}) || p.rounds != quick.rounds || p.out != "x" {
		t.Errorf("plan %+v", p)
	}
	p, err = parse(nil)
	if err != nil || len(p.systems) != len(systems) || len(p.settings) != 4 || !strings.Contains(p.out, "results") {
		t.Errorf("all: %+v %v", p, err)
	}
	for _, bad := range []string{"--systems=none", "--works tcp9", "--families 5", "--families 46", "--offload maybe", "more", "--frob", "--rounds x"} {
		if _, err := parse(strings.Fields(bad)); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestTally(t *testing.T) {
	before := tally{lost: 10, full: 1, messages: 100, packets: 4000}
	after := tally{lost: 10 + 7 + 5, full: 6, messages: 200, packets: 5000} // 5 of them messages of 10
	if got := before.until(&after); got != 7+50 {
		t.Errorf("%v lost, want 57", got)
	}
	if got := before.until(&tally{lost: 13}); got != 3 {
		t.Errorf("%v lost, want 3", got)
	}
}

// A whole run measures what the goals speak of, each system in what it is needed
// for; flags that name works mean them for all.
func TestWorksOf(t *testing.T) {
	with := report.Setting{Family: 4, Offload: true}
	without := report.Setting{Family: 4}
	all, err := parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	named, err := parse([]string{"--works", "udp64,ping"})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct {
		system    string
		on, off   string
		whenNamed string
	}{
		{report.Missiu, strings.Join(works, " "), "tcp1 udp1400", "udp64 ping"},
		{report.WireGuard, "tcp1 tcp4 udp1400 udp64 ping", "tcp1 udp1400", "udp64 ping"},
		{report.Libipsec, "tcp1 udp1400", "tcp1 udp1400", "udp64 ping"},
		{report.MissiuStd, "tcp1", "", "udp64 ping"},
		{report.Missiu100k, "tcp1 udp64", "", "udp64 ping"},
	} {
		i := slices.IndexFunc(systems, func(s system) bool { return s.ID == k.system })
		s := &systems[i]
		for _, c := range []struct {
			p    *plan
			set  report.Setting
			want string
		}{{all, with, k.on}, {all, without, k.off}, {named, with, k.whenNamed}, {named, without, k.whenNamed}} {
			if got := strings.Join(c.p.worksOf(s, c.set), " "); got != c.want {
				t.Errorf("%s, %v: %q, want %q", k.system, c.set, got, c.want)
			}
		}
	}
}

func TestShare(t *testing.T) {
	p, err := parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	last := time.Duration(0)
	for _, set := range []report.Setting{{Family: 4, Offload: true}, {Family: 4}, {Family: 6, Offload: true}, {Family: 6}} {
		if d := p.share(set); d <= last || d > p.limit {
			t.Errorf("%v: until %v of %v, after %v", set, d, p.limit, last)
		} else {
			last = d
		}
	}
	if last != p.limit {
		t.Errorf("all: %v, want %v", last, p.limit)
	}
}

// Each policy has its SAs, in both directions, and none has the addresses of
// the traffic that is measured.
func TestOthers(t *testing.T) {
	for _, addrs := range [][3]string{{"192.0.2.1", "10.1.0.1", "32"}, {"fd01::1", "fd0a::1", "40"}} {
		x := &end{Node: &lab.Node{Addr: netip.MustParseAddr(addrs[0])}, inner: netip.MustParseAddr(addrs[1])}
		policy, keys := others(70000, x)
		p, k := strings.Split(strings.TrimSpace(policy), "\n"), strings.Split(strings.TrimSpace(keys), "\n")
		slices.Sort(p)
		if len(slices.Compact(p)) != 70000 || len(k) != 140000 {
			t.Fatalf("%d policies, %d SAs", len(p), len(k))
		}
		seen := map[string]bool{}
		for _, line := range k {
			f := strings.Fields(line)
			spi, src, dst, key := f[3], f[5], f[7], f[11]
			if (src == addrs[0]) == (dst == addrs[0]) || seen[spi] || len(key) != 40 {
				t.Fatalf("SA %q", line)
			}
			seen[spi] = true
		}
	}
}
