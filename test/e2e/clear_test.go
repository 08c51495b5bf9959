package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Whatever shape clear text has that policy wants protected, no socket gets it,
// in either family.
func TestClearShapes(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	// The strictest reverse path filter lets these through without missiu.
	b.Sh("echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter; echo 1 >/proc/sys/net/ipv4/conf/eth0/accept_source_route; echo 1 >/proc/sys/net/ipv6/conf/all/accept_source_route")
	ears := b.Start("/usr/bin/python3", "-uc", ears)
	ears.Says("listening", 20*time.Second)
	send := func(also ...string) { a.Python(shapes, append([]string{macOf(b)}, also...)...) }
	heard := func(what string) int { return strings.Count(ears.Output(), what) }
	settle := func() {
		// Unprotected traffic of a third address shows that all before was handled.
		n := heard("witness")
		a.Python(shapes, macOf(b), "witness")
		lab.Until(t, 20*time.Second, "the witness", func() (bool, string) { return heard("witness") > n, ears.Output() })
	}
	send()
	settle()
	for _, shape := range []string{"plain4", "plain6", "sport5004", "sport5006", "fragments4", "fragments6", "vlan0-4", "vlan0-6", "vlan0twice4", "qinq0-6", "options4", "atomic6", "echo", "tcp", "broadcast4"} {
		if heard(shape+"\n") == 0 {
			t.Errorf("without missiu no socket hears %q: the test proves nothing about it\n%s", shape, ears.Output())
		}
	}
	b.StartMissiu()
	b.LoadConfig("{ raddr 192.168.3.118 } ipsec { encr_algs gcm }\n{ raddr fd00:3::118 } ipsec { encr_algs gcm }\n")
	was := len(ears.Output())
	send()
	settle()
	if got := strings.ReplaceAll(ears.Output()[was:], "witness\n", ""); got != "" {
		t.Errorf("clear text reached sockets:\n%s", got)
	}
	if n := b.Status().Counters["drop_in_clear"]; n < 10 {
		t.Errorf("%d counted as clear, want at least 10", n)
	}
}

func macOf(n *lab.Node) string {
	return strings.TrimSpace(n.Must("cat", "/sys/class/net/eth0/address"))
}

// ears prints what comes to UDP and TCP port 7777 and to raw ICMP sockets.
const ears = `
import socket, threading
def bound(f):
    s = socket.socket(f, socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    if f == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind(("", 7777))
    return s
def udp(s):
    while True:
        d, _ = s.recvfrom(65535)
        print(d.split(b"\0")[0].decode())
def raw(s, p):
    while True:
        d = s.recv(65535)
        if p == 6: d = b"tcp" if b"\x1e\x61" in d[:64] else b""
        elif b"echo" in d: d = b"echo"
        else: d = b""
        if d: print(d.decode())
ears = [(udp, bound(f)) for f in (socket.AF_INET, socket.AF_INET6)]
ears += [(raw, socket.socket(f, socket.SOCK_RAW, p), p) for f, p in ((socket.AF_INET, 1), (socket.AF_INET6, 58), (socket.AF_INET, 6), (socket.AF_INET6, 6))]
print("listening")
for a in ears: threading.Thread(target=a[0], args=a[1:]).start()
`

// shapes sends clear packets to the MAC address argv[1]; with argv[2] only the witness.
const shapes = `
import sys
from scapy.all import *
conf.verb = 0
mac = sys.argv[1]
v4, v6 = ("192.168.3.118", "192.168.3.119"), ("fd00:3::118", "fd00:3::119")
e = Ether(src=get_if_hwaddr("eth0"), dst=mac)
def u(name, sport=5555): return UDP(sport=sport, dport=7777)/Raw(name.encode() + b"\0")
if len(sys.argv) > 2:
    sendp([e/IP(src="192.168.3.50", dst=v4[1])/u("witness")]*3, iface="eth0")
    sys.exit()
out = []
for i in (IP(src=v4[0], dst=v4[1]), IPv6(src=v6[0], dst=v6[1])):
    f = "4" if i.version == 4 else "6"
    out += [e/i/u("plain"+f), e/i/u("sport500"+f, 500), e/i/u("sport4500"+f, 4500),
        e/Dot1Q(vlan=0, prio=5)/i/u("vlan0-"+f), e/Dot1Q(vlan=0)/Dot1Q(vlan=0)/i/u("vlan0twice"+f),
        e/Dot1AD(vlan=0)/i/u("qinq0-"+f), e/Dot1AD(vlan=0)/Dot1Q(vlan=0)/i/u("qinq0twice"+f),
        e/Dot1Q(vlan=0)/Dot1Q(vlan=0)/Dot1Q(vlan=0)/i/u("vlan0thrice"+f), e/i/TCP(sport=500, dport=7777, flags="S")]
ip = IP(src=v4[0], dst=v4[1])
out += [e/p for p in fragment(ip/UDP(sport=500, dport=7777)/Raw(b"fragments4\0" + bytes(3000)), 1400)]
out += [e/Dot1Q(vlan=0)/p for p in fragment(IP(src=v4[0], dst=v4[1], id=7)/UDP(sport=500, dport=7777)/Raw(b"vlan0fragments4\0" + bytes(3000)), 1400)]
out += [e/IP(src=v4[0], dst=v4[1], options=[IPOption_NOP()]*4)/u("options4", 500), e/IP(src=v4[0], dst=v4[1], options=[IPOption_RR(routers=["0.0.0.0"])])/u("rr4")]
out += [e/ip/ICMP()/Raw(b"echo"), e/ip/ICMP(type=0)/Raw(b"echo")]
out += [e/IP(src=v4[0], dst="255.255.255.255")/u("broadcast4"), e/IP(src=v4[0], dst="192.168.3.255")/u("netcast4")]
six = IPv6(src=v6[0], dst=v6[1])
out += [e/p for p in fragment6(six/IPv6ExtHdrFragment(id=9)/UDP(sport=500, dport=7777)/Raw(b"fragments6\0" + bytes(3000)), 1400)]
out += [e/six/IPv6ExtHdrFragment(id=10)/u("atomic6", 500)]
out += [e/six/IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0"*4)])/u("hop-by-hop6", 500), e/six/IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0"*4)])/u("dstopts6", 500)]
out += [e/six/ICMPv6EchoRequest(data=b"echo"), e/six/ICMPv6EchoReply(data=b"echo")]
sendp(out * 2, iface="eth0")
`
