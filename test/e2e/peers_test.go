package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// missiu and ike against strongSwan with its own user-mode ESP, net to net:
// ESP in UDP, as initiator and as responder.
func TestStrongSwan(t *testing.T) {
	lab.NeedRoot(t)
	for _, tt := range []struct {
		name, properties, esp, encr string
		weStart                     bool
	}{
		{"initiator AES-CBC SHA1", aesSHA1, "aes128-sha1", "aes-cbc", true},
		{"responder AES-CBC SHA1", aesSHA1, "aes128-sha1", "aes-cbc", false},
		{"initiator AES-GCM", "encr_algs gcm", "aes128gcm16", "aes-gcm16", true},
		{"responder ChaCha20", "encr_algs chacha20-poly1305", "chacha20poly1305", "chacha20poly1305", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := lab.Pair(t)
			a.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
			b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
			swan := lab.StartStrongSwan(b.Host, lab.SwanConn{
				Local: "192.168.3.119", Remote: "192.168.3.118", LocalTS: "10.2.0.0/24", RemoteTS: "10.1.0.0/24",
				PSK: lab.PSK, ESP: tt.esp,
			})
			a.StartMissiu()
			a.StartIKE()
			a.LoadConfig(fmt.Sprintf("{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { %s tladdr 192.168.3.118 traddr 192.168.3.119 }\n", tt.properties))
			a.Do("ip route add 10.2.0.0/24 dev tap0 src 10.1.0.1")
			c := a.Capture("eth0")
			if !tt.weStart {
				swan.Initiate()
			}
			if got := a.Ping(10, "10.2.0.1"); got != 10 {
				t.Errorf("%d of 10 pings answered", got)
			}
			if got := b.Ping(10, "-I", "10.2.0.1", "10.1.0.1"); got != 10 {
				t.Errorf("%d of 10 pings of strongSwan answered", got)
			}
			a.Transfer(b, netip.MustParseAddr("10.2.0.1"), 4<<20)
			// Either side rekeys, and nothing is lost.
			swan.Rekey(false)
			if got := a.Ping(50, "10.2.0.1"); got != 50 {
				t.Errorf("after rekeying the child: %d of 50 pings answered", got)
			}
			swan.Rekey(true)
			if got := a.Ping(50, "10.2.0.1"); got != 50 {
				t.Errorf("after rekeying the IKE SA: %d of 50 pings answered", got)
			}
			ps := c.Stop()
			lab.NoClear(t, ps)
			if n := lab.Count(ps); n[lab.ESPinUDP] < 100 || n[lab.ESP] != 0 {
				t.Errorf("on the link: %v; want ESP in UDP alone", n)
			}
			for _, s := range a.Mature() {
				if s.Mode != "tunnel" || s.Encr != tt.encr || s.Sport == 0 {
					t.Errorf("SA %+v, want tunnel, %s, in UDP", s, tt.encr)
				}
			}
			// Our end is told to them.
			a.KillIKE(5 * time.Second)
			lab.Until(t, 10*time.Second, "strongSwan to drop its SAs", func() (bool, string) {
				s := swan.SAs()
				return !strings.Contains(s, "INSTALLED"), s
			})
		})
	}
}

// missiu with manual keys against a Linux kernel: native ESP and ESP in UDP,
// both modes, both IP versions. The keys and numbers are the same on both
// sides; nothing else is shared.
func TestLinuxKernel(t *testing.T) {
	h, l := umlPair(t)
	n := lab.NewNode(h, "eth0", netip.MustParseAddr(umlOur), netip.MustParseAddr(umlIts))

	cbc := func(bits int, hash string, keyOctets, trunc int) (string, lab.SA) {
		k, ak := rep(bits/8), rep(keyOctets)
		return fmt.Sprintf("enc 'cbc(aes)' 0x%s auth-trunc 'hmac(%s)' 0x%s %d", k, hash, ak, trunc),
			lab.SA{Encr: "aes-cbc", EncrKey: k, Auth: hash, AuthKey: ak}
	}
	gcm := func(bits, icv int, name string) (string, lab.SA) {
		k := rep(bits/8) + salt
		return fmt.Sprintf("aead 'rfc4106(gcm(aes))' 0x%s %d", k, icv), lab.SA{Encr: name, EncrKey: k}
	}
	type algo struct {
		name  string
		linux string
		sa    lab.SA
	}
	var algos []algo
	addAlgo := func(name, linux string, sa lab.SA) { algos = append(algos, algo{name, linux, sa}) }
	x, s := cbc(128, "sha1", 20, 96)
	addAlgo("AES-128-CBC SHA1", x, s)
	x, s = cbc(192, "sha384", 48, 192)
	addAlgo("AES-192-CBC SHA384", x, s)
	x, s = cbc(256, "sha512", 64, 256)
	addAlgo("AES-256-CBC SHA512", x, s)
	x, s = gcm(128, 128, "aes-gcm16")
	addAlgo("AES-128-GCM-16", x, s)
	x, s = gcm(256, 96, "aes-gcm12")
	addAlgo("AES-256-GCM-12", x, s)
	x, s = gcm(256, 64, "aes-gcm8")
	addAlgo("AES-256-GCM-8", x, s)
	chacha := rep(32) + salt
	addAlgo("ChaCha20-Poly1305", fmt.Sprintf("aead 'rfc7539esp(chacha20,poly1305)' 0x%s 128", chacha), lab.SA{Encr: "chacha20poly1305", EncrKey: chacha})
	sha256 := rep(32)
	addAlgo("NULL SHA256", fmt.Sprintf("enc 'ecb(cipher_null)' '' auth-trunc 'hmac(sha256)' 0x%s 128", sha256), lab.SA{Encr: "null", Auth: "sha256", AuthKey: sha256})

	shapes := []struct {
		name             string
		mode             string
		our, its         string // ends of the SA
		ourNet, itsNet   string // what is protected
		ourHost, itsHost string
		udp              bool
		tun              bool // a TUN, with the routes that it makes
	}{
		{name: "transport", mode: "transport", our: umlOur, its: umlIts, ourNet: umlOur + "/32", itsNet: umlIts + "/32", ourHost: umlOur, itsHost: umlIts},
		{name: "tunnel", mode: "tunnel", our: umlOur, its: umlIts, ourNet: "10.1.0.0/24", itsNet: "10.2.0.0/24", ourHost: "10.1.0.1", itsHost: "10.2.0.1"},
		{name: "transport IPv6", mode: "transport", our: "fd00:3::118", its: "fd00:3::119", ourNet: "fd00:3::118/128", itsNet: "fd00:3::119/128", ourHost: "fd00:3::118", itsHost: "fd00:3::119"},
		{name: "tunnel IPv6", mode: "tunnel", our: "fd00:3::118", its: "fd00:3::119", ourNet: "fd00:1::/64", itsNet: "fd00:2::/64", ourHost: "fd00:1::1", itsHost: "fd00:2::1"},
		{name: "tunnel IPv6 in IPv4", mode: "tunnel", our: umlOur, its: umlIts, ourNet: "fd00:1::/64", itsNet: "fd00:2::/64", ourHost: "fd00:1::1", itsHost: "fd00:2::1"},
		{name: "tunnel IPv4 in IPv6", mode: "tunnel", our: "fd00:3::118", its: "fd00:3::119", ourNet: "10.1.0.0/24", itsNet: "10.2.0.0/24", ourHost: "10.1.0.1", itsHost: "10.2.0.1"},
		{name: "tunnel in UDP", mode: "tunnel", our: umlOur, its: umlIts, ourNet: "10.1.0.0/24", itsNet: "10.2.0.0/24", ourHost: "10.1.0.1", itsHost: "10.2.0.1", udp: true},
		// What of libipsec's scenarios a stock strongSwan cannot play.
		{name: "libipsec's net2net-raw", mode: "tunnel", our: umlOur, its: umlIts, ourNet: "10.1.0.0/24", itsNet: "10.2.0.0/24", ourHost: "10.1.0.1", itsHost: "10.2.0.1", tun: true},
		{name: "libipsec's ip6-in-ip6-raw", mode: "tunnel", our: "fd00:3::118", its: "fd00:3::119", ourNet: "fd00:1::/64", itsNet: "fd00:2::/64", ourHost: "fd00:1::1", itsHost: "fd00:2::1", tun: true},
		{name: "libipsec's host2host-raw", mode: "tunnel", our: umlOur, its: umlIts, ourNet: umlOur + "/32", itsNet: umlIts + "/32", ourHost: umlOur, itsHost: umlIts, tun: true},
		{name: "libipsec's net2net-3des", mode: "tunnel", our: umlOur, its: umlIts, ourNet: "10.1.0.0/24", itsNet: "10.2.0.0/24", ourHost: "10.1.0.1", itsHost: "10.2.0.1", udp: true, tun: true},
	}

	try := func(t *testing.T, al algo, i int) {
		sh := shapes[i]
		if sh.tun {
			n.StartMissiu("--tun --allow-legacy")
		} else {
			n.StartMissiu()
		}
		defer n.StopMissiu()
		l.Sh("ip xfrm state flush; ip xfrm policy flush\n" + umlNeighbours)
		ourNet, itsNet := netip.MustParsePrefix(sh.ourNet), netip.MustParsePrefix(sh.itsNet)
		our, its := netip.MustParseAddr(sh.our), netip.MustParseAddr(sh.its)
		more, kind := "replay-window 64", lab.ESP
		sa := al.sa
		sa.Mode, sa.ReqID, sa.Replay = sh.mode, 1, 64
		if sh.udp {
			// The kernel takes ESP in UDP only from a socket that asked for it.
			l.Sh("nohup python3 -c '" + umlEncap + "' >/dev/null 2>&1 & while ! ss -Hlun 'sport = :4500' | grep -q 4500; do sleep 0.05; done")
			more += " encap espinudp 4500 4500 0.0.0.0"
			kind, sa.Sport, sa.Dport = lab.ESPinUDP, 4500, 4500
		}
		if our.Is6() != ourNet.Addr().Is6() {
			more += " flag af-unspec" // else XFRM takes packets of the outer family only
		}
		out, in := sa, sa
		out.SPI, out.Src, out.Dst = 0x2001, our, its
		in.SPI, in.Src, in.Dst = 0x2002, its, our
		n.AddSA(out)
		n.AddSA(in)
		n.AddPolicy(lab.Policy{Dir: "out", Src: ourNet, Dst: itsNet, Mode: sh.mode, TSrc: our, TDst: its, ReqID: 1})
		n.AddPolicy(lab.Policy{Dir: "in", Src: itsNet, Dst: ourNet, Mode: sh.mode, TSrc: its, TDst: our, ReqID: 1})
		l.AddSA(lab.XfrmSA{Src: sh.our, Dst: sh.its, SPI: 0x2001, Mode: sh.mode, Algo: al.linux, More: more})
		l.AddSA(lab.XfrmSA{Src: sh.its, Dst: sh.our, SPI: 0x2002, Mode: sh.mode, Algo: al.linux, More: more})
		l.AddPolicy("in", sh.ourNet, sh.itsNet, "", sh.mode, sh.our, sh.its)
		l.AddPolicy("out", sh.itsNet, sh.ourNet, "", sh.mode, sh.its, sh.our)
		if sh.tun {
			if got := routeTo(h, sh.itsHost); got != "tun0 "+sh.ourHost {
				t.Errorf("route to %s: %s, want tun0 %s", sh.itsHost, got, sh.ourHost)
			}
		} else {
			n.Do(fmt.Sprintf("ip route add %v dev tap0 src %s", itsNet, sh.ourHost))
		}

		c := h.CaptureWhole("eth0")
		if got := n.Ping(10, sh.itsHost); got != 10 {
			t.Errorf("%d of 10 pings answered by Linux; its counters:\n%s\nours: %v", got, l.Sh("cat /proc/net/xfrm_stat"), n.Status().Counters)
		}
		if r := l.Run(strings.Join(lab.PingArgs(10, 0, 10*time.Second, "-I", sh.itsHost, sh.ourHost), " ")); lab.Answered(r.Out, 10) != 10 {
			t.Errorf("Linux: %v", r)
		}
		if got := n.Ping(3, "-s", "4000", sh.itsHost); got != 3 {
			t.Errorf("%d of 3 large pings answered by Linux", got)
		}
		ps := c.Stop()
		lab.NoClear(t, ps)
		if k := lab.Count(ps)[kind]; k < 40 {
			t.Errorf("on the link: %v; want at least 40 %v", lab.Count(ps), kind)
		}
		if d := n.Status().Drops(); d != 0 {
			t.Errorf("we dropped %d: %v", d, n.Status().Counters)
		}
		if sa.Auth != "" {
			rows := lab.Decrypt(t, c.Path, n.Keys(), "esp.icv_good == 1 && icmp", "icmp.type")
			if len(rows) < 40 {
				t.Errorf("tshark opened %d pings with a good ICV, want at least 40", len(rows))
			}
		}
	}
	// Every algorithm in both modes over IPv4, and one algorithm in every shape.
	for _, al := range algos {
		for i := range 2 {
			t.Run(al.name+" "+shapes[i].name, func(t *testing.T) { try(t, al, i) })
		}
	}
	// The kernel's package has these as modules.
	l.Run("cd /usr/lib/uml/modules/$(uname -r)/kernel && for m in lib/crypto/libdes crypto/des_generic; do insmod $m.ko; done")
	k3, ak3 := rep(24), rep(20)
	des3 := algo{"3DES SHA1", fmt.Sprintf("enc 'cbc(des3_ede)' 0x%s auth-trunc 'hmac(sha1)' 0x%s 96", k3, ak3), lab.SA{Encr: "3des-cbc", EncrKey: k3, Auth: "sha1", AuthKey: ak3}}
	for i := 2; i < len(shapes); i++ {
		al := algos[3]
		if strings.HasSuffix(shapes[i].name, "3des") {
			al = des3
		}
		t.Run(al.name+" "+shapes[i].name, func(t *testing.T) { try(t, al, i) })
	}
}

// umlEncap holds a UDP socket of type ESP in UDP (RFC 3948).
const umlEncap = `import socket,time; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(17, 100, 2); s.bind(("", 4500)); time.sleep(3600)`

// umlNeighbours exempts neighbour discovery, which XFRM would protect like any
// other packet and so never find the neighbour.
const umlNeighbours = `for type in 135 136; do for dir in in out; do
	ip xfrm policy add src ::/0 dst ::/0 proto ipv6-icmp type $type dir $dir priority 1 action allow
done; done`

// rep is a key of n octets in hex, no two of them alike.
func rep(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%02x", (i*37+n)&0xff)
	}
	return b.String()
}
