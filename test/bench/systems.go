package main

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	_ "embed"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/test/bench/report"
	"github.com/missiu/missiu/test/e2e/lab"
)

// wireKind is what a capture has to show while a system carries traffic.
type wireKind int

const (
	readable wireKind = iota
	nativeESP
	espInUDP
	wireguard
	openvpn
)

var kindNames = [...]string{"readable packets", "ESP", "ESP in UDP", "WireGuard", "OpenVPN"}

func (k wireKind) String() string { return kindNames[k] }

// system is a way to carry what goes between the inner addresses.
type system struct {
	report.System
	wire wireKind
	// start makes it carry and returns the daemons, of both ends, a's first.
	// flags are further ones for missiu.
	start func(t lab.TB, e *ends, flags ...string) []*lab.Proc
	// needs is a program that scripts/setup --bench installs.
	needs func() string
	// works are those that goals and tables need of it; nil: all.
	works []string
	bare  bool // measured without offload, too
}

// The ports of the peers.
const (
	wireguardPort = 51820
	openvpnPort   = 1194
)

// wireguardVersion is what scripts/setup --bench builds.
//
//go:embed wireguard-go.version
var wireguardVersion string

// cacheDir is where scripts/setup --bench puts what it builds.
func cacheDir() string {
	if d := os.Getenv("XDG_CACHE_HOME"); d != "" {
		return filepath.Join(d, "missiu-bench")
	}
	return filepath.Join(os.Getenv("HOME"), ".cache", "missiu-bench")
}

func wireguardProgram() string {
	return filepath.Join(cacheDir(), "wireguard-go-"+strings.TrimSpace(wireguardVersion))
}

func program(name string) func() string { return func() string { return name } }

// gcm and its like are what policies say of algorithms.
const (
	gcm     = "encr_algs aes-gcm(128)"
	cbcSHA1 = "encr_algs aes-cbc(128) encr_auth_algs sha1"
	cbcSHA2 = "encr_algs aes-cbc(128) encr_auth_algs sha256"
)

// peerWorks are all but overload: how others bear that is no goal of ours.
var peerWorks = []string{"tcp1", "tcp4", "udp1400", "udp64", "ping"}

// inlineWorks are those of an interface that is severed.
var inlineWorks = []string{"tcp1", "udp1400", "ping"}

// systems are all, in the order of the tables.
var systems = []system{
	{report.System{ID: report.Missiu, Title: "missiu, AES-128-GCM, ESP in UDP"}, espInUDP, missiu(missiuOptions{udp: true, algs: gcm}), nil, nil, true},
	{report.System{ID: report.MissiuNative, Title: "missiu, AES-128-GCM, native ESP"}, nativeESP, missiu(missiuOptions{algs: gcm}), nil, nil, true},
	{report.System{ID: report.MissiuStd, Title: "missiu --crypto std, ESP in UDP"}, espInUDP, missiu(missiuOptions{udp: true, algs: gcm, flags: []string{"--crypto", "std"}}), nil, []string{"tcp1"}, false},
	{report.System{ID: report.MissiuSHA1, Title: "missiu, AES-CBC + SHA-1, ESP in UDP"}, espInUDP, missiu(missiuOptions{udp: true, algs: cbcSHA1}), nil, []string{"tcp1"}, false},
	{report.System{ID: report.MissiuSHA256, Title: "missiu, AES-CBC + SHA-256, ESP in UDP"}, espInUDP, missiu(missiuOptions{udp: true, algs: cbcSHA2}), nil, []string{"tcp1"}, false},
	{report.System{ID: report.Missiu100k, Title: "missiu, 100,000 SAs and policies, ESP in UDP"}, espInUDP, missiu(missiuOptions{udp: true, algs: gcm, others: 50000}), nil, []string{"tcp1", "udp64"}, false},
	{report.System{ID: report.MissiuInline, Title: "missiu startInline, AES-128-GCM, ESP in UDP"}, espInUDP, missiu(missiuOptions{inline: true, udp: true, algs: gcm}), nil, inlineWorks, false},
	{report.System{ID: report.MissiuInlineClear, Title: "missiu startInline, bypassed"}, readable, missiu(missiuOptions{inline: true}), nil, inlineWorks, false},
	{report.System{ID: report.WireGuard, Title: "wireguard-go"}, wireguard, startWireGuard, wireguardProgram, peerWorks, true},
	{report.System{ID: report.OpenVPN, Title: "OpenVPN, AES-128-GCM"}, openvpn, startOpenVPN, program("openvpn"), peerWorks, true},
	{report.System{ID: report.Libipsec, Title: "strongSwan libipsec, AES-128-GCM"}, espInUDP, startLibipsec, program("/usr/lib/ipsec/charon"), []string{"tcp1", "udp1400"}, true},
	{report.System{ID: report.Plain, Title: "plain veth"}, readable, startPlain, nil, []string{"tcp1", "tcp4", "udp1400", "ping"}, true},
}

// ends are two gateways a and b on one wire, whose endpoints are in them: each
// has an inner address on lo, and what a system does is to carry packets
// between those.
//
//	10.1.0.1 (lo)  a  192.0.2.1 --eth0-- 192.0.2.2  b  (lo) 10.2.0.1
//	fd0a::1        a   fd01::1  --eth0--  fd01::2   b        fd0b::1
type ends struct {
	a, b end
	v6   bool
}

// end is one of them.
type end struct {
	*lab.Node
	inner, innerPeer netip.Addr
}

func (e *ends) both() [2]*end { return [2]*end{&e.a, &e.b} }

// newEnds makes the hosts and the wire between them, for one family.
func newEnds(t lab.TB, name string, v6 bool) *ends {
	ha, hb := lab.NewHost(t, name+"-a"), lab.NewHost(t, name+"-b")
	outer, inner := [2]string{"192.0.2.1", "192.0.2.2"}, [2]string{"10.1.0.1", "10.2.0.1"}
	bits := 24
	if v6 {
		outer, inner = [2]string{"fd01::1", "fd01::2"}, [2]string{"fd0a::1", "fd0b::1"}
		bits = 64
	}
	oa, ob := netip.MustParseAddr(outer[0]), netip.MustParseAddr(outer[1])
	ia, ib := netip.MustParseAddr(inner[0]), netip.MustParseAddr(inner[1])
	lab.Link(t, ha, hb, "eth0", []netip.Prefix{netip.PrefixFrom(oa, bits)}, []netip.Prefix{netip.PrefixFrom(ob, bits)})
	e := &ends{
		a:  end{lab.NewNode(ha, "eth0", oa, ob), ia, ib},
		b:  end{lab.NewNode(hb, "eth0", ob, oa), ib, ia},
		v6: v6,
	}
	for _, x := range e.both() {
		x.Must("ip", "addr", "add", netip.PrefixFrom(x.inner, x.inner.BitLen()).String(), "dev", "lo")
	}
	return e
}

// route sends what goes to the peer's inner address through a device.
func (x *end) route(dev string, more ...string) {
	x.Must(append([]string{"ip", "route", "add", x.innerPeer.String(), "dev", dev, "src", x.inner.String()}, more...)...)
}

// tunMTU is the largest inner packet of tunnels that add 52 octets to UDP at
// most: their packets fill the wire's 1500.
func (e *ends) tunMTU() string {
	if e.v6 {
		return "1420"
	}
	return "1440"
}

func startPlain(t lab.TB, e *ends, _ ...string) []*lab.Proc {
	for _, x := range e.both() {
		x.route("eth0", "via", x.Peer.String())
	}
	return nil
}

// missiuOptions tell variants of the product apart.
type missiuOptions struct {
	inline bool // the interface is severed instead of a TAP
	udp    bool
	algs   string // "": policy bypasses
	flags  []string
	others int // further pairs of policies and of SAs
}

func missiu(o missiuOptions) func(lab.TB, *ends, ...string) []*lab.Proc {
	return func(t lab.TB, e *ends, flags ...string) []*lab.Proc {
		var procs []*lab.Proc
		verb := "startRaw"
		if o.inline {
			verb = "startInline"
		}
		for _, x := range e.both() {
			args := append([]string{"bin/missiu", "-i", "eth0", "-l", "missiu.log", "--foreground"}, slices.Concat(o.flags, flags, []string{verb})...)
			procs = append(procs, x.Start(args...))
		}
		for i, x := range e.both() {
			lab.Until(t, 20*time.Second, "missiu to answer", func() (bool, string) {
				if procs[i].Ended() {
					t.Fatalf("missiu ended:\n%s", procs[i].Output())
				}
				r := x.Run("bin/missiu", "-i", "eth0", "status", "--json")
				return r.Code == 0, r.String()
			})
			if o.inline {
				x.route("eth0", "via", x.Peer.String())
			} else {
				tap := x.TAP()
				x.Must("ip", "link", "set", tap, "up")
				x.route(tap)
			}
			if o.algs == "" {
				continue
			}
			nat := "no"
			if o.udp {
				nat = "force"
			}
			// Nothing is negotiated again while others are measured.
			x.WriteFile("/etc/missiu/ike.conf", fmt.Sprintf(`rule "bench" {
	auth_method preshared
	remote_addr %v
	nat_traversal %s
	ikesa_lifetime_secs 24h
	childsa_lifetime_secs 24h
}
`, x.Peer, nat), 0o600)
			x.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"bench\" key %q }\n", lab.PSK), 0o600)
			policy, keys := others(o.others, x)
			policy += fmt.Sprintf("{ laddr %v raddr %v } ipsec { %s tladdr %v traddr %v }\n", x.inner, x.innerPeer, o.algs, x.Addr, x.Peer)
			x.LoadConfig(policy)
			if keys != "" {
				x.WriteFile("keys", keys, 0o600)
				x.Must("bin/loadConfig", "-k", "keys")
			}
		}
		for _, x := range e.both() {
			if o.algs == "" {
				break
			}
			x.StartIKEWith("./ike")
			procs = append(procs, x.IKE)
		}
		return procs
	}
}

// others returns n entries of policy, each for a peer of its own and of both
// directions, and n pairs of SAs for them.
func others(n int, x *end) (policy, keys string) {
	var p, k strings.Builder
	for i := range n {
		// Addresses for tests of networks, and private ones.
		peer, net := netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)}), netip.AddrFrom4([4]byte{172, 16 + byte(i>>16), byte(i >> 8), byte(i)})
		if x.Addr.Is6() {
			tail := fmt.Sprintf("::%x:%x", 1+i>>8, i&255)
			peer, net = netip.MustParseAddr("fd18"+tail), netip.MustParseAddr("fd16"+tail)
		}
		fmt.Fprintf(&p, "{ laddr %v raddr %v } ipsec { %s tladdr %v traddr %v }\n", x.inner, net, gcm, x.Addr, peer)
		spi := 0x100000 + 2*i
		for d, from := range []netip.Addr{x.Addr, peer} {
			to := peer
			if d == 1 {
				to = x.Addr
			}
			fmt.Fprintf(&k, "add esp spi 0x%x src %v dst %v encr_alg aes-gcm encrkey %032x%08x mode tunnel\n", spi+d, from, to, spi+d, spi)
		}
	}
	return p.String(), k.String()
}

// startWireGuard configures by the socket that every user-space WireGuard has.
func startWireGuard(t lab.TB, e *ends, _ ...string) []*lab.Proc {
	var private [2]*ecdh.PrivateKey
	for i := range private {
		k, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatalf("%v", err)
		}
		private[i] = k
	}
	var procs []*lab.Proc
	for i, x := range e.both() {
		p := x.Start("env", "LOG_LEVEL=error", wireguardProgram(), "-f", "wg0")
		procs = append(procs, p)
		sock := x.Path("/run/wireguard/wg0.sock")
		var c net.Conn
		lab.Until(t, 20*time.Second, "wireguard-go to listen", func() (ok bool, state string) {
			if p.Ended() {
				t.Fatalf("wireguard-go ended:\n%s", p.Output())
			}
			var err error
			c, err = net.Dial("unix", sock)
			return err == nil, fmt.Sprint(err)
		})
		c.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintf(c, "set=1\nprivate_key=%x\nlisten_port=%d\nreplace_peers=true\npublic_key=%x\nendpoint=%v\nallowed_ip=%v/%d\n\n",
			private[i].Bytes(), wireguardPort, private[1-i].PublicKey().Bytes(),
			netip.AddrPortFrom(x.Peer, wireguardPort), x.innerPeer, x.innerPeer.BitLen())
		answer := make([]byte, 256)
		n, err := c.Read(answer)
		c.Close()
		if err != nil || !strings.Contains(string(answer[:n]), "errno=0\n") {
			t.Fatalf("wireguard-go answers %q: %v", answer[:n], err)
		}
		x.Must("ip", "link", "set", "wg0", "up", "mtu", e.tunMTU())
		x.route("wg0")
	}
	return procs
}

// startOpenVPN: two peers with certificates of an authority that lives for this
// run. Buffers and queue are as large as ours; Debian's defaults lose more.
func startOpenVPN(t lab.TB, e *ends, _ ...string) []*lab.Proc {
	ca, certs := authority(t)
	var procs []*lab.Proc
	for i, x := range e.both() {
		x.WriteFile("openvpn/ca.pem", ca, 0o600)
		x.WriteFile("openvpn/cert.pem", certs[i], 0o600)
		proto := "udp4"
		if e.v6 {
			proto = "udp6"
		}
		args := []string{"openvpn", "--dev", "ovpn0", "--dev-type", "tun", "--proto", proto,
			"--local", x.Addr.String(), "--lport", fmt.Sprint(openvpnPort), "--remote", x.Peer.String(), fmt.Sprint(openvpnPort),
			"--ca", "openvpn/ca.pem", "--cert", "openvpn/cert.pem", "--key", "openvpn/cert.pem",
			"--data-ciphers", "AES-128-GCM", "--cipher", "AES-128-GCM", "--disable-dco", "--reneg-sec", "0",
			"--tun-mtu", e.tunMTU(), "--mssfix", "0", "--fast-io", "--sndbuf", "4194304", "--rcvbuf", "4194304", "--txqueuelen", "1000",
			"--verb", "3"}
		if i == 0 {
			args = append(args, "--tls-client")
		} else {
			args = append(args, "--tls-server", "--dh", "none")
		}
		procs = append(procs, x.Start(args...))
	}
	for i, x := range e.both() {
		procs[i].Says("Initialization Sequence Completed", 30*time.Second)
		if !strings.Contains(procs[i].Output(), "Data Channel: cipher 'AES-128-GCM'") {
			t.Fatalf("OpenVPN does not use AES-128-GCM:\n%s", procs[i].Output())
		}
		x.Must("ip", "link", "set", "ovpn0", "up", "mtu", e.tunMTU(), "txqueuelen", "1000")
		x.route("ovpn0")
	}
	return procs
}

// authority returns the certificate of a new authority, and two certificates
// of its with their keys, in PEM.
func authority(t lab.TB) (ca string, certs [2]string) {
	now := time.Now()
	issue := func(serial int64, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, []byte) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatalf("%v", err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: fmt.Sprintf("bench %d", serial)},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		}
		if parent == nil {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
			parent, signer = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatalf("%v", err)
		}
		return c, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	root, rootKey, rootPEM := issue(1, nil, nil)
	for i := range certs {
		_, key, cert := issue(int64(2+i), root, rootKey)
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatalf("%v", err)
		}
		certs[i] = string(cert) + string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	return string(rootPEM), certs
}

func startLibipsec(t lab.TB, e *ends, _ ...string) []*lab.Proc {
	var swans [2]*lab.StrongSwan
	for i, x := range e.both() {
		bits := x.inner.BitLen()
		swans[i] = lab.StartStrongSwan(x.Host, lab.SwanConn{
			Local: x.Addr.String(), Remote: x.Peer.String(), PSK: lab.PSK,
			LocalTS: netip.PrefixFrom(x.inner, bits).String(), RemoteTS: netip.PrefixFrom(x.innerPeer, bits).String(),
			ESP: "aes128gcm16", Rekey: "24h", IKERekey: "24h", OpenSSL: true,
		})
	}
	swans[0].Initiate()
	return []*lab.Proc{swans[0].Proc, swans[1].Proc}
}

// shows tells whether a packet is what a system of this kind sends.
func (k wireKind) shows(p lab.Packet) bool {
	u := p.Frame[min(p.L4, len(p.Frame)):]
	udpPort := func(port uint16) bool {
		return p.Proto == 17 && len(u) >= 9 && binary.BigEndian.Uint16(u) == port && binary.BigEndian.Uint16(u[2:]) == port
	}
	switch k {
	case nativeESP:
		return p.Kind == lab.ESP || p.Kind == lab.IKE
	case espInUDP:
		return p.Kind == lab.ESPinUDP || p.Kind == lab.IKE || p.Kind == lab.Keepalive
	case wireguard: // message types 1 to 4, little-endian
		return udpPort(wireguardPort) && len(u) >= 12 && u[8] >= 1 && u[8] <= 4 && u[9] == 0 && u[10] == 0 && u[11] == 0
	case openvpn: // the opcode: 9 is data, 3 to 8 and 10 are the handshake
		return udpPort(openvpnPort) && u[8]>>3 >= 3 && u[8]>>3 <= 10
	}
	return p.Kind == lab.Clear
}

// missing returns what a system needs and the machine has not.
func (s *system) missing() string {
	if s.needs == nil {
		return ""
	}
	p := s.needs()
	if _, err := exec.LookPath(p); err != nil {
		return p
	}
	return ""
}
