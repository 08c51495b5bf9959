package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/missiu/missiu/test/e2e/lab"
)

// tunnelEnds are the inner addresses of a and b, by family.
var tunnelEnds = map[bool][2]netip.Addr{
	false: {netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.2.0.1")},
	true:  {netip.MustParseAddr("fd0a::1"), netip.MustParseAddr("fd0b::1")},
}

// newTunnel makes two hosts with a manual AES-GCM tunnel for both inner
// families between them, in UDP or not, over IPv4 or IPv6.
func newTunnel(t *testing.T, outer6, udp bool, options ...string) (a, b *lab.Node) {
	t.Helper()
	a, b = lab.Pair(t)
	wa, wb := a.Addr, b.Addr
	if outer6 {
		wa, wb = netip.MustParseAddr("fd00:3::118"), netip.MustParseAddr("fd00:3::119")
	}
	tunnel(a, b, wa, wb, udp, options...)
	return a, b
}

// tunnel starts missiu on two hosts and makes the tunnel between wa and wb.
func tunnel(a, b *lab.Node, wa, wb netip.Addr, udp bool, options ...string) {
	port := uint16(0)
	if udp {
		port = 4500
	}
	for i, n := range []*lab.Node{a, b} {
		n.StartMissiu(options...)
		for k, x := range [][2]netip.Addr{{wa, wb}, {wb, wa}} {
			n.AddSA(lab.SA{
				SPI: uint32(0x1001 + k), Src: x[0], Dst: x[1], Mode: "tunnel", ReqID: 7, Replay: 255,
				Encr: "aes-gcm16", EncrKey: fmt.Sprintf("%040x", 0xabcdef+k), Sport: port, Dport: port,
			})
		}
		for _, inner := range tunnelEnds {
			here, there := inner[i], inner[1-i]
			host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
			tun := [2]netip.Addr{wa, wb}
			n.AddPolicy(lab.Policy{Dir: "out", Src: host(here), Dst: host(there), Mode: "tunnel", TSrc: tun[i], TDst: tun[1-i], ReqID: 7})
			n.AddPolicy(lab.Policy{Dir: "in", Src: host(there), Dst: host(here), Mode: "tunnel", TSrc: tun[1-i], TDst: tun[i], ReqID: 7})
			n.Sh(fmt.Sprintf("ip addr add %v dev lo", host(here)))
			n.Sh(fmt.Sprintf("ip link set %[1]s up; ip route add %[2]v dev %[1]s src %[3]v", n.TAP(), host(there), here))
		}
	}
}

// TestSegmentsOnTheLink: an independent implementation opens every segment and
// finds all checksums right, inside and outside. Interfaces that do not cut
// messages, or do no checksums, change nothing; nor does --offload none.
func TestSegmentsOnTheLink(t *testing.T) {
	lab.NeedRoot(t)
	for _, c := range []struct{ features, offload string }{
		{"tx-udp-segmentation off", "auto"}, {"tx off tx-udp-segmentation off", "auto"}, {"tx-udp-segmentation off", "none"},
	} {
		for _, udp := range []bool{true, false} {
			for _, v6 := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, offload %s, UDP %v, IPv6 %v", c.features, c.offload, udp, v6), func(t *testing.T) {
					a, b := newTunnel(t, v6, udp, "--offload", c.offload)
					for _, n := range []*lab.Node{a, b} {
						n.Sh("ethtool -K eth0 " + c.features + " >/dev/null")
					}
					cap := b.CaptureWhole("eth0")
					a.Transfer(b, tunnelEnds[v6][1], 2_000_000)
					ps := cap.Stop()
					lab.NoClear(t, ps)
					esp := lab.Of(ps, lab.ESP, lab.ESPinUDP)
					seq := map[[2]uint32]bool{}
					for _, p := range esp {
						if p.Len > 1514 {
							t.Fatalf("%d octets on the link: %v", p.Len, p)
						}
						id := [2]uint32{p.SPI, p.Seq}
						if seq[id] {
							t.Errorf("sequence number twice: %v", p)
						}
						seq[id] = true
					}
					rows := lab.Decrypt(t, cap.Path, a.Keys(), "tcp", "tcp.checksum.status", "ip.checksum.status", "tcp.checksum")
					if len(rows) != len(esp) {
						t.Errorf("tshark opened %d packets of %d", len(rows), len(esp))
					}
					for k, r := range rows {
						// tshark takes 0xffff for bad where it would calculate 0. Linux gives
						// that where it sums up a frame without offload.
						tcp := r[0] == "1" || c.offload == "none" && r[2] == "0xffff"
						if !tcp || strings.ContainsAny(r[1], "02") {
							t.Fatalf("packet %d, %v: checksums of TCP and IP %q, want 1 (good); counters %v and %v", k, esp[k], r, nonzero(a), nonzero(b))
						}
					}
				})
			}
		}
	}
}

// TestOuterHeader: the header in front of ESP is the same by a socket as by our
// own hand: DSCP and ECN of the inner one (RFC 6040), hop limit 64, DF.
func TestOuterHeader(t *testing.T) {
	lab.NeedRoot(t)
	for _, udp := range []bool{true, false} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("UDP %v, IPv6 %v", udp, v6), func(t *testing.T) {
				a, b := newTunnel(t, v6, udp)
				c := b.Capture("eth0")
				for _, tos := range []string{"0x00", "0xbb", "0x02"} {
					if n := a.Ping(1, "-Q", tos, "-t", "17", tunnelEnds[v6][1].String()); n != 1 {
						t.Errorf("traffic class %s: no answer", tos)
					}
				}
				var got []string
				for _, p := range lab.Of(c.Stop(), lab.ESP, lab.ESPinUDP) {
					if p.Src != a.Addr && p.Src != netip.MustParseAddr("fd00:3::118") {
						continue
					}
					ip := p.Frame[14:]
					if v6 {
						got = append(got, fmt.Sprintf("%02x %d", ip[0]<<4|ip[1]>>4, ip[7]))
					} else {
						got = append(got, fmt.Sprintf("%02x %d df %v", ip[1], ip[8], ip[6] == 0x40))
					}
				}
				want := "00 64 df true, bb 64 df true, 02 64 df true"
				if v6 {
					want = strings.ReplaceAll(want, " df true", "")
				}
				if s := strings.Join(got, ", "); s != want {
					t.Errorf("outer headers %q, want %q", s, want)
				}
			})
		}
	}
}
