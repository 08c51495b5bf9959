package e2e

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// xform is one transform between us and a Linux kernel, with the same keys on
// both sides.
type xform struct {
	proto, mode string // of ip xfrm
	linux       string // its algorithm
	auth, encr  uint8  // ours, by PF_KEY number
	authKey     string
	encrKey     string
}

var (
	xformProto  = map[string]uint16{"esp": 50, "ah": 51, "comp": 108}
	xformSAType = map[string]uint8{"esp": 3, "ah": 2, "comp": 9}
	xformMode   = map[string]uint8{"transport": 1, "tunnel": 2}
)

func ahOf(mode, hash string, number uint8, keyOctets, trunc int) xform {
	k := rep(keyOctets)
	return xform{proto: "ah", mode: mode, auth: number, authKey: k, linux: fmt.Sprintf("auth-trunc '%s' 0x%s %d", hash, k, trunc)}
}

func espOf(mode string) xform {
	k := rep(16) + salt
	return xform{proto: "esp", mode: mode, encr: 20, encrKey: k, linux: "aead 'rfc4106(gcm(aes))' 0x" + k + " 128"}
}

func compOf(mode string) xform {
	return xform{proto: "comp", mode: mode, encr: 2, linux: "comp deflate"}
}

// pfkeyMessage builds PF_KEY messages of more kinds than cmd/pfkey knows.
type pfkeyMessage []byte

func newPFKEY(typ, satype uint8) pfkeyMessage {
	b := make(pfkeyMessage, 16)
	b[0], b[1], b[3], b[8] = 2, typ, satype, 1
	return b
}

func (m *pfkeyMessage) ext(typ uint16, body []byte) {
	for len(body)%8 != 4 {
		body = append(body, 0)
	}
	b := binary.NativeEndian.AppendUint16(*m, uint16(len(body)+4)/8)
	b = binary.NativeEndian.AppendUint16(b, typ)
	*m = append(b, body...)
	binary.NativeEndian.PutUint16((*m)[4:], uint16(len(*m)/8))
}

func pfkeySockaddr(a netip.Addr) []byte {
	if a.Is4() {
		b := make([]byte, 16)
		binary.NativeEndian.PutUint16(b, 2)
		copy(b[4:], a.AsSlice())
		return b
	}
	b := make([]byte, 28)
	binary.NativeEndian.PutUint16(b, 10)
	copy(b[8:], a.AsSlice())
	return b
}

func (m *pfkeyMessage) addrs(src, dst netip.Prefix, proto uint8) {
	m.ext(5, append([]byte{proto, uint8(src.Bits()), 0, 0}, pfkeySockaddr(src.Addr())...))
	m.ext(6, append([]byte{proto, uint8(dst.Bits()), 0, 0}, pfkeySockaddr(dst.Addr())...))
}

func (m *pfkeyMessage) key(typ uint16, k string) {
	b, err := hex.DecodeString(k)
	if err != nil || len(b) == 0 {
		return
	}
	m.ext(typ, append(binary.NativeEndian.AppendUint16(nil, uint16(len(b)*8)), append([]byte{0, 0}, b...)...))
}

// give sends a message to missiu, which must take it.
func (m pfkeyMessage) give(t *testing.T, n *lab.Node) {
	t.Helper()
	if got := strings.TrimSpace(n.Must("bin/pfkey", "/run/missiu/"+n.If+".pfkey", "raw", hex.EncodeToString(m))); got != "0" {
		t.Fatalf("PF_KEY message of type %d, SA type %d: errno %s", m[1], m[3], got)
	}
}

func (x *xform) sa(src, dst netip.Addr, spi uint32, esn bool) pfkeyMessage {
	m := newPFKEY(3, xformSAType[x.proto])
	sa := binary.BigEndian.AppendUint32(nil, spi)
	sa = append(sa, 64, 1, x.auth, x.encr)
	flags := uint32(0)
	if esn {
		flags = 0x400
	}
	m.ext(1, binary.NativeEndian.AppendUint32(sa, flags))
	m.addrs(netip.PrefixFrom(src, src.BitLen()), netip.PrefixFrom(dst, dst.BitLen()), 0)
	m.key(8, x.authKey)
	m.key(9, x.encrKey)
	sa2 := make([]byte, 12)
	sa2[0] = xformMode[x.mode]
	binary.NativeEndian.PutUint32(sa2[8:], 1)
	m.ext(19, sa2)
	return m
}

func xformPolicy(dir uint8, src, dst netip.Prefix, tsrc, tdst netip.Addr, xs []xform) pfkeyMessage {
	m := newPFKEY(14, 0)
	m.addrs(src, dst, 255)
	p := make([]byte, 12)
	binary.NativeEndian.PutUint16(p, 2)
	p[2] = dir
	binary.NativeEndian.PutUint32(p[8:], 1<<31)
	for _, x := range xs {
		r := make([]byte, 16)
		binary.NativeEndian.PutUint16(r[2:], xformProto[x.proto])
		r[4], r[5] = xformMode[x.mode], 3
		if x.proto == "comp" && dir == 1 { // as strongSwan has it
			r[5] = 1
		}
		binary.NativeEndian.PutUint32(r[8:], 1)
		if x.mode == "tunnel" {
			r = append(append(r, pfkeySockaddr(tsrc)...), pfkeySockaddr(tdst)...)
		}
		binary.NativeEndian.PutUint16(r, uint16(len(r)))
		p = append(p, r...)
	}
	m.ext(18, p)
	return m
}

// umlPair is a host and a Linux kernel of its own on one Ethernet, each with a network
// behind it.
func umlPair(t *testing.T) (*lab.Host, *lab.Linux) {
	t.Helper()
	lab.NeedRoot(t)
	h := lab.NewHost(t, "a")
	l := lab.BootLinux(h, "eth0", umlIts+"/24", "fd00:3::119/64", "10.2.0.1/32", "fd00:2::1/128")
	for _, addr := range []string{umlOur + "/24", "fd00:3::118/64"} {
		h.Must("ip", "addr", "add", addr, "dev", "eth0")
	}
	h.Must("ip", "addr", "add", "10.1.0.1/32", "dev", "lo")
	h.Must("ip", "addr", "add", "fd00:1::1/128", "dev", "lo")
	l.Sh("ip route add 10.1.0.0/24 via " + umlOur + " src 10.2.0.1; ip -6 route add fd00:1::/64 via fd00:3::118 src fd00:2::1")
	return h, l
}

// wireLab is umlPair with the product on the host.
func wireLab(t *testing.T) (*lab.Node, *lab.Linux) {
	h, l := umlPair(t)
	l.Sh(`cd /usr/lib/uml/modules/$(uname -r)/kernel
		for m in crypto/xcbc crypto/cmac crypto/deflate net/xfrm/xfrm_ipcomp net/ipv4/ipcomp net/ipv6/ipcomp6; do
			insmod $m.ko 2>&1 || grep -q "^$(basename $m | tr - _) " /proc/modules
		done`)
	return lab.NewNode(h, "eth0", netip.MustParseAddr(umlOur), netip.MustParseAddr(umlIts)), l
}

// shape is who talks to whom: ends of the SAs, and what is protected.
type shape struct {
	our, its         string
	ourNet, itsNet   string
	ourHost, itsHost string
}

var (
	host4  = shape{umlOur, umlIts, umlOur + "/32", umlIts + "/32", umlOur, umlIts}
	host6  = shape{"fd00:3::118", "fd00:3::119", "fd00:3::118/128", "fd00:3::119/128", "fd00:3::118", "fd00:3::119"}
	net4   = shape{umlOur, umlIts, "10.1.0.0/24", "10.2.0.0/24", "10.1.0.1", "10.2.0.1"}
	net6   = shape{"fd00:3::118", "fd00:3::119", "fd00:1::/64", "fd00:2::/64", "fd00:1::1", "fd00:2::1"}
	net6in = shape{umlOur, umlIts, "fd00:1::/64", "fd00:2::/64", "fd00:1::1", "fd00:2::1"}
	net4in = shape{"fd00:3::118", "fd00:3::119", "10.1.0.0/24", "10.2.0.0/24", "10.1.0.1", "10.2.0.1"}
)

// connect installs the transforms, innermost first, on both sides.
func connect(t *testing.T, n *lab.Node, l *lab.Linux, sh shape, esn bool, xs ...xform) {
	t.Helper()
	l.Sh("ip xfrm state flush; ip xfrm policy flush\n" + umlNeighbours)
	ourNet, itsNet := netip.MustParsePrefix(sh.ourNet), netip.MustParsePrefix(sh.itsNet)
	our, its := netip.MustParseAddr(sh.our), netip.MustParseAddr(sh.its)
	for _, dir := range []struct {
		name     string
		number   uint8
		base     uint32
		src, dst netip.Addr
		from, to netip.Prefix
	}{{"in", 2, 0x2000, our, its, ourNet, itsNet}, {"out", 1, 0x3000, its, our, itsNet, ourNet}} {
		policy := fmt.Sprintf("ip xfrm policy add src %v dst %v dir %s priority 100", dir.from, dir.to, dir.name)
		for k := range xs {
			x, spi := &xs[k], dir.base+uint32(k)
			x.sa(dir.src, dir.dst, spi, esn).give(t, n)
			more := "replay-window 64"
			if x.proto == "ah" && our.Is4() {
				more += " flag align4" // RFC 4302, 2.6, not the 64 bits of older kernels
			}
			if our.Is6() != ourNet.Addr().Is6() {
				more += " flag af-unspec"
			}
			if esn {
				more += " flag esn"
			}
			if x.proto == "comp" {
				more = ""
			}
			l.Sh(fmt.Sprintf("ip xfrm state add src %v dst %v proto %s spi 0x%x mode %s reqid 1 %s %s", dir.src, dir.dst, x.proto, spi, x.mode, x.linux, more))
			policy += fmt.Sprintf(" tmpl src %v dst %v proto %s reqid 1 mode %s", dir.src, dir.dst, x.proto, x.mode)
			if x.proto == "comp" && dir.name == "in" {
				policy += " level use"
			}
		}
		xformPolicy(dir.number, dir.from, dir.to, dir.src, dir.dst, xs).give(t, n)
		l.Sh(policy)
	}
	n.Do(fmt.Sprintf("ip route add %v dev tap0 src %s", itsNet, sh.ourHost))
}

// noneDropped wants no packet refused on either side.
func noneDropped(t *testing.T, n *lab.Node, l *lab.Linux) {
	t.Helper()
	if d := n.Status().Drops(); d != 0 {
		t.Errorf("we dropped %d: %v", d, n.Status().Counters)
	}
	if s := l.Sh("grep -v '[[:space:]]0$' /proc/net/xfrm_stat || true"); strings.TrimSpace(s) != "" {
		t.Errorf("Linux counts errors:\n%s", s)
	}
}

// TestLinuxAH: AH, AH around ESP, and IPComp, by manual keys against a Linux
// kernel, in both directions, with packets that fit, do not fit and, for
// IPComp, are not worth compressing. ping has a deadline of its own (-w), because
// without one it waits for the last answer no longer than for the others, which
// a loaded machine does not keep, and then sends more; what is lost shows in the counters of both.
func TestLinuxAH(t *testing.T) {
	n, l := wireLab(t)
	sha1 := func(mode string) xform { return ahOf(mode, "hmac(sha1)", 3, 20, 96) }
	sha256 := func(mode string) xform { return ahOf(mode, "hmac(sha256)", 5, 32, 128) }
	sha512 := func(mode string) xform { return ahOf(mode, "hmac(sha512)", 7, 64, 256) }
	const tr, tu = "transport", "tunnel"
	for _, tt := range []struct {
		name string
		sh   shape
		esn  bool
		kind lab.Kind
		xs   []xform
	}{
		{"AH transport SHA1", host4, false, lab.AH, []xform{sha1(tr)}},
		{"AH transport SHA256", host4, false, lab.AH, []xform{sha256(tr)}},
		{"AH transport SHA384", host4, false, lab.AH, []xform{ahOf(tr, "hmac(sha384)", 6, 48, 192)}},
		{"AH transport SHA512", host4, false, lab.AH, []xform{sha512(tr)}},
		{"AH transport AES-XCBC", host4, false, lab.AH, []xform{ahOf(tr, "xcbc(aes)", 9, 16, 96)}},
		{"AH transport AES-CMAC", host4, false, lab.AH, []xform{ahOf(tr, "cmac(aes)", 248, 16, 96)}},
		{"AH transport SHA256 ESN", host4, true, lab.AH, []xform{sha256(tr)}},
		{"AH transport IPv6 SHA1", host6, false, lab.AH, []xform{sha1(tr)}},
		{"AH transport IPv6 SHA256", host6, false, lab.AH, []xform{sha256(tr)}},
		{"AH transport IPv6 SHA512", host6, true, lab.AH, []xform{sha512(tr)}},
		{"AH tunnel SHA1", net4, false, lab.AH, []xform{sha1(tu)}},
		{"AH tunnel SHA256", net4, false, lab.AH, []xform{sha256(tu)}},
		{"AH tunnel SHA512", net4, true, lab.AH, []xform{sha512(tu)}},
		{"AH tunnel SHA384", net4, false, lab.AH, []xform{ahOf(tu, "hmac(sha384)", 6, 48, 192)}},
		{"AH tunnel AES-XCBC", net4, false, lab.AH, []xform{ahOf(tu, "xcbc(aes)", 9, 16, 96)}},
		{"AH tunnel AES-CMAC", net4, false, lab.AH, []xform{ahOf(tu, "cmac(aes)", 248, 16, 96)}},
		{"AH transport IPv6 SHA384", host6, false, lab.AH, []xform{ahOf(tr, "hmac(sha384)", 6, 48, 192)}},
		{"AH transport IPv6 AES-XCBC", host6, false, lab.AH, []xform{ahOf(tr, "xcbc(aes)", 9, 16, 96)}},
		{"AH transport IPv6 AES-CMAC", host6, false, lab.AH, []xform{ahOf(tr, "cmac(aes)", 248, 16, 96)}},
		{"AH tunnel IPv6", net6, false, lab.AH, []xform{sha256(tu)}},
		{"AH tunnel IPv6 in IPv4", net6in, false, lab.AH, []xform{sha512(tu)}},
		{"AH tunnel IPv4 in IPv6", net4in, false, lab.AH, []xform{sha1(tu)}},
		{"ESP in AH", host4, false, lab.AH, []xform{espOf(tr), sha256(tr)}},
		{"ESP in AH IPv6", host6, false, lab.AH, []xform{espOf(tr), sha1(tr)}},
		{"ESP tunnel in AH", net4, false, lab.AH, []xform{espOf(tu), sha256(tr)}},
		{"ESP tunnel IPv6 in AH", net6, false, lab.AH, []xform{espOf(tu), sha512(tr)}},
		{"IPComp in ESP", host4, false, lab.ESP, []xform{compOf(tr), espOf(tr)}},
		{"IPComp in ESP IPv6", host6, false, lab.ESP, []xform{compOf(tr), espOf(tr)}},
		{"IPComp tunnel in ESP", net4, false, lab.ESP, []xform{compOf(tu), espOf(tr)}},
		{"IPComp tunnel in ESP IPv6", net6, false, lab.ESP, []xform{compOf(tu), espOf(tr)}},
		{"IPComp in ESP in AH", host4, false, lab.AH, []xform{compOf(tr), espOf(tr), sha256(tr)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n.StartMissiu()
			defer n.StopMissiu()
			connect(t, n, l, tt.sh, tt.esn, tt.xs...)
			c := n.CaptureWhole("eth0")
			for _, size := range []string{"20", "1000", "4000"} {
				if got := n.Ping(3, "-w", "60", "-s", size, tt.sh.itsHost); got < 3 {
					t.Errorf("%d of 3 pings of %s octets answered by Linux; its counters:\n%s\nours: %v", got, size, l.Sh("cat /proc/net/xfrm_stat"), n.Status().Counters)
				}
				if r := l.Run(fmt.Sprintf("ping -n -q -c 3 -i 0.05 -w 60 -s %s -I %s %s", size, tt.sh.itsHost, tt.sh.ourHost)); r.Code != 0 {
					t.Errorf("Linux, %s octets: %v", size, r)
				}
			}
			ps := c.Stop()
			lab.NoClear(t, ps)
			of := lab.Of(ps, tt.kind)
			if len(of) < 36 {
				t.Errorf("on the link: %v; want at least 36 %v", lab.Count(ps), tt.kind)
			}
			if tt.xs[0].proto == "comp" {
				for _, p := range of {
					if p.Len > 700 {
						t.Errorf("not compressed: %v", p)
						break
					}
				}
			}
			noneDropped(t, n, l)
		})
	}
}

// v6Options is a Python program that sends a UDP datagram behind hop-by-hop
// options (router alert, and one whose data may change en route) and
// destination options, or waits for such and prints them.
const v6Options = `
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
if sys.argv[1] == "send":
    # next header, length, options
    s.setsockopt(41, 54, bytes([0, 1, 5, 2, 0, 0, 0x3e, 4, 9, 8, 7, 6, 1, 2, 0, 0]))   # IPV6_HOPOPTS
    s.setsockopt(41, 59, bytes([0, 0, 0x1e, 4, 1, 2, 3, 4]))                            # IPV6_DSTOPTS
    for i in range(10):
        s.sendto(b"with options %d" % i, (sys.argv[2], 7777))
else:
    s.bind(("::", 7777))
    s.settimeout(20)
    print("listening", flush=True)
    for i in range(10):
        print(s.recv(100).decode(), flush=True)
`

// odd is a Python program that sends UDP datagrams whose IP headers are made by
// hand: with an IPv4 router alert and a source route that is used up, or with an
// IPv6 routing header whose segments are used up behind hop-by-hop options of
// which one may change on the way.
const odd = `
import socket, struct, sys
src, dst = sys.argv[1], sys.argv[2]
family = socket.AF_INET6 if ":" in src else socket.AF_INET
a, b = socket.inet_pton(family, src), socket.inet_pton(family, dst)
def sum16(x):
    x += b"\0" * (len(x) % 2)
    n = sum(struct.unpack(">%dH" % (len(x) // 2), x))
    while n >> 16:
        n = (n & 0xffff) + (n >> 16)
    return ~n & 0xffff
s = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
for i in range(10):
    data = b"with options %d" % i
    udp = struct.pack(">HHHH", 7778, 7777, 8 + len(data), 0) + data
    pseudo = a + b + (struct.pack(">II", len(udp), 17) if family == socket.AF_INET6 else struct.pack(">HH", 17, len(udp)))
    udp = udp[:6] + struct.pack(">H", sum16(pseudo + udp)) + udp[8:]
    if family == socket.AF_INET6:
        hop = bytes([43, 1, 5, 2, 0, 0, 0x3e, 4, 9, 8, 7, 6, 1, 2, 0, 0])
        rh = bytes([17, 2, 0, 0, 0, 0, 0, 0]) + socket.inet_pton(family, "2001:db8::77")
        p = struct.pack(">IHBB", 6 << 28 | 0x2e << 20 | 0x12345, len(hop + rh + udp), 0, 64) + a + b + hop + rh + udp
    else:
        opts = bytes([148, 4, 0, 0, 1, 131, 7, 8]) + b
        opts += bytes(-len(opts) % 4)
        p = struct.pack(">BBHHHBBH", 0x45 + len(opts) // 4, 0x2e, 20 + len(opts) + len(udp), 4242 + i, 0x4000, 64, 17, 0) + a + b + opts
        p = p[:10] + struct.pack(">H", sum16(p)) + p[12:] + udp
    s.sendto(p, (dst, 0))
`

// receiveOdd waits for ten datagrams of either family and prints them.
const receiveOdd = `
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", 7777))
s.settimeout(20)
print("listening", flush=True)
for i in range(10):
    print(s.recv(100).decode(), flush=True)
`

// TestLinuxAHRoutes: router alert, source route and routing header under the ICV
// of ours are what Linux computes, too.
func TestLinuxAHRoutes(t *testing.T) {
	n, l := wireLab(t)
	n.WriteFile("odd.py", odd, 0o644)
	l.Sh("cat >/run/odd.py <<'EOF'\n" + receiveOdd + "\nEOF\nfor f in /proc/sys/net/ipv4/conf/*/accept_source_route; do echo 1 >$f; done")
	for _, tt := range []struct {
		name string
		sh   shape
		hdr  int // octets of the IP headers in front of AH
	}{{"IPv4", host4, 20 + 12}, {"IPv6", host6, 40 + 16 + 24}} {
		t.Run(tt.name, func(t *testing.T) {
			n.StartMissiu()
			defer n.StopMissiu()
			connect(t, n, l, tt.sh, false, ahOf("transport", "hmac(sha256)", 5, 32, 128))
			c := n.CaptureWhole("eth0")
			l.Sh("rm -f /run/got; nohup python3 /run/odd.py >/run/got 2>&1 & for i in $(seq 200); do grep -q listening /run/got && break; sleep 0.05; done")
			n.Must("/usr/bin/python3", "odd.py", tt.sh.ourHost, tt.sh.itsHost)
			if got := l.Sh("for i in $(seq 1200); do grep -q 'options 9' /run/got && break; sleep 0.05; done; cat /run/got"); strings.Count(got, "with options") != 10 {
				t.Errorf("Linux received %q; its counters:\n%s\nours: %v", got, l.Sh("cat /proc/net/xfrm_stat"), n.Status().Counters)
			}
			with := 0
			for _, p := range lab.Of(c.Stop(), lab.AH) {
				if p.L4 == 14+tt.hdr {
					with++
				}
			}
			if with != 10 {
				t.Errorf("%d packets with AH behind %d octets on the link, want 10", with, tt.hdr)
			}
			noneDropped(t, n, l)
		})
	}
}

// TestLinuxAHOptions: IPv4 options and IPv6 extension headers under the ICV,
// made by either side and verified by the other.
func TestLinuxAHOptions(t *testing.T) {
	n, l := wireLab(t)
	for _, tt := range []struct {
		name string
		xs   []xform
	}{
		{"AH", []xform{ahOf("transport", "hmac(sha256)", 5, 32, 128)}},
		{"ESP in AH", []xform{espOf("transport"), ahOf("transport", "hmac(sha1)", 3, 20, 96)}},
	} {
		t.Run(tt.name+" record route, timestamp", func(t *testing.T) {
			n.StartMissiu()
			defer n.StopMissiu()
			connect(t, n, l, host4, false, tt.xs...)
			c := n.CaptureWhole("eth0")
			for _, opt := range [][]string{{"-R"}, {"-T", "tsonly"}, {"-T", "tsandaddr"}} {
				if got := n.Ping(3, append(opt, "-w", "60", umlIts)...); got < 3 {
					t.Errorf("ping %v: %d of 3 answered; Linux:\n%s\nours: %v", opt, got, l.Sh("cat /proc/net/xfrm_stat"), n.Status().Counters)
				}
				if r := l.Run("ping -n -q -c 3 -i 0.05 -w 60 " + strings.Join(opt, " ") + " " + umlOur); r.Code != 0 {
					t.Errorf("Linux: %v", r)
				}
			}
			options := 0
			for _, p := range lab.Of(c.Stop(), lab.AH) {
				if p.L4 > 14+20 {
					options++
				}
			}
			if options < 36 {
				t.Errorf("%d packets with options on the link, want 36", options)
			}
			noneDropped(t, n, l)
		})
		t.Run(tt.name+" IPv6 extension headers", func(t *testing.T) {
			n.StartMissiu()
			defer n.StopMissiu()
			connect(t, n, l, host6, false, tt.xs...)
			n.WriteFile("options.py", v6Options, 0o644)
			l.Sh("cat >/run/options.py <<'EOF'\n" + v6Options + "\nEOF")
			c := n.CaptureWhole("eth0")
			l.Sh("rm -f /run/got; nohup python3 /run/options.py receive >/run/got 2>&1 & for i in $(seq 200); do grep -q listening /run/got && break; sleep 0.05; done")
			n.Must("/usr/bin/python3", "options.py", "send", host6.itsHost)
			if got := l.Sh("for i in $(seq 1200); do grep -q 'options 9' /run/got && break; sleep 0.05; done; cat /run/got"); strings.Count(got, "with options") != 10 {
				t.Errorf("Linux received %q; its counters:\n%s", got, l.Sh("cat /proc/net/xfrm_stat"))
			}
			p := n.Start("/usr/bin/python3", "options.py", "receive")
			p.Says("listening", 20*time.Second)
			l.Sh("python3 /run/options.py send " + host6.ourHost)
			p.Says("with options 9", 20*time.Second)
			options := 0
			for _, p := range lab.Of(c.Stop(), lab.AH) {
				if p.L4 > 14+40 {
					options++
				}
			}
			if options < 20 {
				t.Errorf("%d packets with extension headers on the link, want 20", options)
			}
			noneDropped(t, n, l)
		})
	}
}
