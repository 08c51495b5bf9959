package capture

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

// Line describes the frame in one line, in the manner of tcpdump; link is that
// of its side.
//
//	12:00:00.000000001 low  In  IP 192.0.2.1 > 192.0.2.2: ESP(spi=0x00001000,seq=0x7), length 132 [drop_in_replay]
func (f *Frame) Line(link uint16) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %-4s %-3s ", f.Time.Format("15:04:05.000000000"), f.Side, map[Direction]string{In: "In", Out: "Out"}[f.Dir])
	if link == LinkEthernet {
		ether(&b, f.Data)
	} else {
		ip(&b, f.Data)
	}
	if f.Comment != "" {
		fmt.Fprintf(&b, " [%s]", f.Comment)
	}
	return b.String()
}

// Ethertypes that are told apart.
const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherVLAN = 0x8100
	etherQinQ = 0x88a8
	etherIPv6 = 0x86dd
)

func ether(b *strings.Builder, f []byte) {
	if len(f) < 14 {
		fmt.Fprintf(b, "short frame, length %d", len(f))
		return
	}
	kind, at := binary.BigEndian.Uint16(f[12:]), 14
	for (kind == etherVLAN || kind == etherQinQ) && len(f) >= at+4 {
		fmt.Fprintf(b, "vlan %d, ", binary.BigEndian.Uint16(f[at:])&0xfff)
		kind = binary.BigEndian.Uint16(f[at+2:])
		at += 4
	}
	switch kind {
	case etherIPv4, etherIPv6:
		ip(b, f[at:])
	case etherARP:
		arp(b, f[at:])
	default:
		fmt.Fprintf(b, "%v > %v, ethertype 0x%04x, length %d", net.HardwareAddr(f[6:12]), net.HardwareAddr(f[:6]), kind, len(f)-at)
	}
}

// arp describes RFC 826 for IPv4 on Ethernet.
func arp(b *strings.Builder, a []byte) {
	if len(a) < 28 {
		fmt.Fprintf(b, "ARP, length %d", len(a))
		return
	}
	from, to := netip.AddrFrom4([4]byte(a[14:18])), netip.AddrFrom4([4]byte(a[24:28]))
	switch op := binary.BigEndian.Uint16(a[6:]); op {
	case 1:
		fmt.Fprintf(b, "ARP who-has %v tell %v", to, from)
	case 2:
		fmt.Fprintf(b, "ARP reply %v is-at %v", from, net.HardwareAddr(a[8:14]))
	default:
		fmt.Fprintf(b, "ARP operation %d", op)
	}
}

// Protocols and ports that are told apart.
const (
	protoICMP   = 1
	protoIPv4   = 4
	protoTCP    = 6
	protoUDP    = 17
	protoIPv6   = 41
	protoESP    = 50
	protoAH     = 51
	protoICMPv6 = 58
	protoIPComp = 108

	portIKE  = 500
	portNATT = 4500
)

func ip(b *strings.Builder, p []byte) {
	var i packet.Info
	if !packet.Decode(p, &i) {
		fmt.Fprintf(b, "malformed IP, length %d", len(p))
		return
	}
	name := "IP"
	if i.Version == 6 {
		name = "IP6"
	}
	src, dst := i.Src.String(), i.Dst.String()
	if i.HasPorts && packet.HasPortNumbers(i.Proto) {
		src, dst = fmt.Sprintf("%s.%d", src, i.SrcPort), fmt.Sprintf("%s.%d", dst, i.DstPort)
	}
	fmt.Fprintf(b, "%s %s > %s: ", name, src, dst)
	if i.IsFragment() {
		more := ""
		if i.MF {
			more = "+"
		}
		fmt.Fprintf(b, "frag %d:%d@%d%s, ", i.ID, i.Len-i.HdrLen, i.FragOff, more)
	}
	u := p[i.HdrLen:i.Len]
	if i.FragOff != 0 {
		fmt.Fprintf(b, "protocol %d", i.Proto)
	} else {
		upper(b, &i, u)
	}
	fmt.Fprintf(b, ", length %d", len(u))
}

// upper describes what the IP packet carries.
func upper(b *strings.Builder, i *packet.Info, u []byte) {
	switch {
	case i.Proto == protoTCP && len(u) >= 20:
		tcp(b, u)
	case i.Proto == protoUDP && len(u) >= packet.UDPLen:
		udp(b, i, u[packet.UDPLen:])
	case i.Proto == protoICMP && len(u) >= 8:
		icmp(b, "ICMP", u, 8, 0)
	case i.Proto == protoICMPv6 && len(u) >= 8:
		icmp(b, "ICMP6", u, 128, 129)
	case i.Proto == protoESP && len(u) >= 8:
		esp(b, u)
	case i.Proto == protoAH && len(u) >= 12:
		fmt.Fprintf(b, "AH(spi=0x%08x,seq=0x%x)", binary.BigEndian.Uint32(u[4:]), binary.BigEndian.Uint32(u[8:]))
	case i.Proto == protoIPComp && len(u) >= 4:
		fmt.Fprintf(b, "IPComp(cpi=0x%04x)", binary.BigEndian.Uint16(u[2:]))
	case i.Proto == protoIPv4 || i.Proto == protoIPv6:
		ip(b, u)
	default:
		fmt.Fprintf(b, "protocol %d", i.Proto)
	}
}

func tcp(b *strings.Builder, u []byte) {
	b.WriteString("Flags [")
	for k, c := range "FSRP.UEW" {
		if u[13]>>k&1 != 0 {
			b.WriteRune(c)
		}
	}
	fmt.Fprintf(b, "], seq %d", binary.BigEndian.Uint32(u[4:]))
	if u[13]&0x10 != 0 {
		fmt.Fprintf(b, ", ack %d", binary.BigEndian.Uint32(u[8:]))
	}
}

// udp tells the ways in which ESP and IKE use a datagram (RFC 3948, 2).
func udp(b *strings.Builder, i *packet.Info, p []byte) {
	ports := func(port uint16) bool { return i.HasPorts && (i.SrcPort == port || i.DstPort == port) }
	switch {
	case ports(portNATT) && len(p) == 1 && p[0] == 0xff:
		b.WriteString("UDP NAT keepalive")
	case ports(portNATT) && len(p) >= 4+28 && binary.BigEndian.Uint32(p) == 0:
		ike(b, p[4:])
	case ports(portNATT) && len(p) >= 8:
		b.WriteString("UDP ")
		esp(b, p)
	case ports(portIKE) && len(p) >= 28:
		ike(b, p)
	default:
		b.WriteString("UDP")
	}
}

// ike tells version and exchange of the header (RFC 7296, 3.1).
func ike(b *strings.Builder, p []byte) {
	fmt.Fprintf(b, "UDP IKEv%d exchange %d, id %d", p[17]>>4, p[18], binary.BigEndian.Uint32(p[20:]))
}

func esp(b *strings.Builder, p []byte) {
	fmt.Fprintf(b, "ESP(spi=0x%08x,seq=0x%x)", binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:]))
}

func icmp(b *strings.Builder, name string, u []byte, request, reply byte) {
	what := ""
	switch u[0] {
	case request:
		what = "request"
	case reply:
		what = "reply"
	default:
		fmt.Fprintf(b, "%s type %d code %d", name, u[0], u[1])
		return
	}
	fmt.Fprintf(b, "%s echo %s, id %d, seq %d", name, what, binary.BigEndian.Uint16(u[4:]), binary.BigEndian.Uint16(u[6:]))
}
