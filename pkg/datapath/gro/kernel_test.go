package gro

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/internal/nstest"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// TestMain runs the tests in a network namespace of their own when it may.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m, "gro")) }

// TestKernel: the kernel forwards super-frames from the TAP to a link without
// segmentation offload, and what arrives there are the packets of before, one
// hop older:
//
//	Coalescer -> TAP -> kernel forwards, segments -> mi-a == mi-b -> packet socket
func TestKernel(t *testing.T) {
	if nstest.Name() == "" {
		t.Skip("needs root and ip(8): makes a TAP in a network namespace")
	}
	if _, err := exec.LookPath("ethtool"); err != nil {
		t.Skip("needs ethtool(8)")
	}
	nstest.OneCPU(t)
	mac := net.HardwareAddr{2, 1, 2, 3, 4, 5}
	nstest.Sh(t, `ip link add mi-a type veth peer name mi-b; ip link set mi-a up; ip link set mi-b up
		ethtool -K mi-a tso off gso off gro off tx-udp-segmentation off tx off >/dev/null
		ethtool -K mi-b gro off >/dev/null
		echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		ip addr add 10.2.0.254/24 dev mi-a; ip -6 addr add 2001:db8:2::fe/64 dev mi-a nodad
		ip neigh add 10.2.0.1 lladdr 02:00:00:00:00:07 dev mi-a; ip -6 neigh add 2001:db8:2::1 lladdr 02:00:00:00:00:07 dev mi-a`)
	defer nstest.Sh(t, "ip link del mi-a")
	nstest.Ready(t, "", "mi-a", "mi-b")
	d, err := tap.Open(tap.Options{MAC: mac, Up: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { d.Persist(false); d.Close() }()
	nstest.Sh(t, "ip addr add 10.1.0.254/24 dev "+d.Name()+"; ip -6 addr add 2001:db8:1::fe/64 dev "+d.Name()+" nodad")

	link, err := net.InterfaceByName("mi-b")
	if err != nil {
		t.Fatal(err)
	}
	htons := func(v uint16) uint16 { return v<<8 | v>>8 }
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Index}); err != nil {
		t.Fatal(err)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	tv := unix.NsecToTimeval(int64(time.Minute))
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	buf := make([]byte, 70000)
	next := func() []byte {
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				t.Fatalf("no packet: %v", err)
			}
			var i packet.Info
			if n > 14 && packet.Decode(buf[14:n], &i) && (i.Src == src4 || i.Src == src6) {
				return bytes.Clone(buf[14 : 14+i.Len])
			}
		}
	}

	stamps := []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	push := func(ps []pkt) []pkt { ps[len(ps)-1].flags = ack | flagPSH; return ps }
	short := func(ps []pkt) []pkt { ps[len(ps)-1].n = 1; return ps }
	for name, ps := range map[string][]pkt{
		"TCP":                         push(train(pkt{id: 65530, seq: 0xffff0000, options: stamps, window: 77}, 45, 1386)),
		"TCP, the last shorter":       short(train(pkt{noDF: true, options: stamps, tos: 2}, 20, 1000)),
		"TCP, CE, short":              train(pkt{tos: 3}, 200, 50),
		"TCP over IPv6":               push(train(pkt{v6: true, label: 9, tos: 1, options: stamps}, 45, 1366)),
		"TCP over IPv6, last shorter": short(train(pkt{v6: true}, 9, 1420)),
		"UDP":                         train(pkt{udp: true, noDF: true, id: 65530}, 46, 1400),
		"UDP, the last shorter":       short(train(pkt{udp: true, noDF: true}, 64, 100)),
		"UDP over IPv6":               short(train(pkt{udp: true, v6: true}, 45, 1400)),
	} {
		t.Run(name, func(t *testing.T) {
			g := New()
			g.Kinds = d.Super()
			if g.Kinds != all {
				t.Skipf("this kernel takes only %+v", g.Kinds)
			}
			in := build(ps)
			for _, b := range in {
				var i packet.Info
				packet.Decode(b, &i)
				if !g.Add(append(make([]byte, room), b...), room, &i, tap.Offload{}) {
					t.Fatal("full")
				}
			}
			fs, joined, _ := g.Frames()
			if int(joined) != len(in) {
				t.Errorf("%d of %d packets joined", joined, len(in))
			}
			for _, f := range fs {
				e := f.Buf[f.Off:]
				copy(e, mac)
				copy(e[6:], []byte{2, 0, 0, 0, 0, 9, 0x08, 0})
				if e[14]>>4 == 6 {
					e[12], e[13] = 0x86, 0xdd
				}
			}
			if n, err := d.WriteBatch(fs); n != len(fs) || err != nil {
				t.Fatalf("wrote %d of %d: %v", n, len(fs), err)
			}
			for k, want := range in {
				got := next()
				if want[0]>>4 == 6 {
					want[7]--
				} else {
					want[8]--
					packet.FixIPv4Checksum(want)
				}
				if !bytes.Equal(got, want) {
					t.Fatalf("packet %d:\ngot  % x\nwant % x", k, got[:min(len(got), 80)], want[:min(len(want), 80)])
				}
			}
		})
	}
	if d.Cut() != 0 {
		t.Errorf("%d super-frames were cut by us, not by the kernel", d.Cut())
	}
}
