package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// loadPrivate runs loadConfig with a private file behind an option.
func loadPrivate(n *lab.Node, option, text string) string {
	n.WriteFile("bin/private", text, 0o600)
	return n.Do("./loadConfig " + option + " private")
}

// Manual keys without any key daemon: by add commands of a policy file, then by
// a key file, saved and read again.
func TestManualKeys(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
		n.Route()
	}
	add := func(src, dst *lab.Node, spi string) string {
		return fmt.Sprintf("add %v %v esp %s -E aes-cbc 0x%s -A hmac-sha256 0x%s;\n", src.Addr, dst.Addr, spi, key16, key32)
	}
	for _, n := range []*lab.Node{a, b} {
		loadPrivate(n, "-f", "flush; spdflush;\n"+add(a, b, "0x1001")+add(b, a, "0x1002")+policyFor(n, "", "encr_algs aes encr_auth_algs sha256"))
	}
	c := a.CaptureWhole("eth0")
	pings(t, a, 10)
	pings(t, b, 10)
	ps := c.Stop()
	lab.NoClear(t, ps)
	if n := lab.Count(ps); n[lab.ESP] != 40 {
		t.Errorf("on the link: %v, want 40 ESP", n)
	}
	if out := a.Do("./loadConfig -l"); strings.Contains(out, "not up") || !strings.Contains(out, "packets 20") {
		t.Errorf("-l shows\n%s\nwant policies that are up, with 20 packets each", out)
	}

	// The same SAs in Solaris' language are there already.
	line := func(src, dst *lab.Node, spi string) string {
		return fmt.Sprintf("add esp spi %s src %v dst %v encr_alg aes encrkey %s auth_alg sha256 authkey %s\n", spi, src.Addr, dst.Addr, key16, key32)
	}
	keys := line(a, b, "0x1001") + line(b, a, "0x1002")
	if out := loadPrivate(a, "-k", keys); !strings.Contains(out, "2 there already") {
		t.Errorf("-k says %s", out)
	}
	// An SA of other algorithms than the policy's does not serve it.
	other := strings.NewReplacer("sha256", "sha1", key32, key20)
	for _, n := range []*lab.Node{a, b} {
		loadPrivate(n, "-k", "flush\n"+other.Replace(keys))
	}
	if got := a.Silence(2, b.Addr.String()); got != 0 {
		t.Errorf("%d pings by SAs that the policy does not ask for", got)
	}
	for _, n := range []*lab.Node{a, b} {
		loadPrivate(n, "-k", "flush\n"+keys)
	}
	pings(t, a, 5)

	// Saved, flushed, read again.
	for _, n := range []*lab.Node{a, b} {
		n.Do("./loadConfig -s saved && ./loadConfig -F && ./loadConfig -k saved")
	}
	pings(t, a, 5)

	// An SA that names no source is for any.
	open := strings.NewReplacer(fmt.Sprintf("src %v ", a.Addr), "", fmt.Sprintf("src %v ", b.Addr), "").Replace(keys)
	for _, n := range []*lab.Node{a, b} {
		loadPrivate(n, "-k", "flush\n"+open)
		n.Do("./loadConfig -s saved && grep -c 'src 0.0.0.0' saved && ./loadConfig -F && ./loadConfig -k saved")
	}
	c = a.CaptureWhole("eth0")
	pings(t, a, 5)
	pings(t, b, 5)
	ps = c.Stop()
	lab.NoClear(t, ps)
	if n := lab.Count(ps); n[lab.ESP] != 20 {
		t.Errorf("on the link by SAs for any source: %v, want 20 ESP", n)
	}
	for _, n := range []*lab.Node{a, b} {
		n.Do("./missiu -i eth0 stop")
	}
}

// What Solaris' key files say of sequence numbers and idle SAs: they begin behind
// a number, go on where they were saved when one host alone loads them again,
// which begun anew would be a replay, and die while nobody uses them.
func TestManualKeysResumed(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	line := func(src, dst *lab.Node, spi, more string) string {
		return fmt.Sprintf("add esp spi %s src %v dst %v encr_alg aes encrkey %s auth_alg sha256 authkey %s replay 64 %s\n", spi, src.Addr, dst.Addr, key16, key32, more)
	}
	keys := func(more string) string { return line(a, b, "0x1001", more) + line(b, a, "0x1002", more) }
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
		n.Route()
		loadPrivate(n, "-k", keys("replay_value 1000 idle_addtime 600 idle_usetime 2"))
		n.LoadConfig(policyFor(n, "", "encr_algs aes encr_auth_algs sha256"))
	}
	c := a.CaptureWhole("eth0")
	pings(t, a, 5)
	ps := c.Stop()
	lab.NoClear(t, ps)
	next := map[uint32]uint32{0x1001: 1001, 0x1002: 1001}
	for _, p := range ps {
		if p.Kind != lab.ESP {
			continue
		}
		if p.Seq != next[p.SPI] {
			t.Errorf("SPI %#x: number %d, want %d", p.SPI, p.Seq, next[p.SPI])
		}
		next[p.SPI]++
	}
	if next[0x1001] != 1006 || next[0x1002] != 1006 {
		t.Errorf("on the link %v, want 5 packets each way", next)
	}

	a.Do("./loadConfig -s saved && ./loadConfig -F && ./loadConfig -k saved")
	pings(t, a, 5)
	if out := a.Do("./loadConfig -d --json"); strings.Count(out, `"last_sequence":1010`) != 2 {
		t.Errorf("behind the second pings\n%s\nwant the numbers 1010", out)
	}

	lab.Until(t, 15*time.Second, "SAs that are dying", func() (bool, string) {
		sas := a.Mature()
		return len(sas) == 2 && sas[0].State == "dying" && sas[1].State == "dying", fmt.Sprintf("%+v", sas)
	})
	lab.Until(t, 15*time.Second, "SAs that are mature", func() (bool, string) { // for two seconds each time
		pings(t, a, 5)
		sas := a.Mature()
		return len(sas) == 2 && sas[0].State == "mature" && sas[1].State == "mature", fmt.Sprintf("%+v", sas)
	})

	// Begun anew, what a sends is behind b's window.
	a.Do("./loadConfig -F")
	loadPrivate(a, "-k", keys(""))
	if got := a.Silence(2, b.Addr.String()); got != 0 {
		t.Errorf("%d pings with numbers that b has seen", got)
	}
	for _, n := range []*lab.Node{a, b} {
		n.Do("./missiu -i eth0 stop")
	}
}

// A server with "or pass" serves a client without IPsec, and one that has it in
// ESP as soon as it negotiates.
func TestOrPass(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	b.StartMissiu()
	b.StartIKE()
	b.LoadConfig(fmt.Sprintf("{ raddr %v ulp icmp dir both } ipsec { %s } or pass {}\n", b.Peer, aesSHA1))
	b.Route()
	c := a.CaptureWhole("eth0")
	pings(t, a, 5)
	if n := lab.Count(c.Stop()); n[lab.ESP] != 0 {
		t.Errorf("on the link: %v, want no ESP to a client without", n)
	}
	a.StartMissiu()
	a.StartIKE()
	a.LoadConfig(policyFor(a, "icmp", aesSHA1))
	a.Route()
	// The first ones bring the SAs up.
	a.Ping(3, b.Addr.String())
	c = a.CaptureWhole("eth0")
	pings(t, a, 5)
	ps := c.Stop()
	lab.NoClear(t, ps)
	if n := lab.Count(ps); n[lab.ESP] != 10 {
		t.Errorf("on the link: %v, want 10 ESP", n)
	}
}

// "sa unique": a pair of SAs for each flow.
func TestSAUnique(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	up(a, b, func(n *lab.Node) string { return policyFor(n, "tcp", aesSHA1+" sa unique") })
	b.Start("python3", "-uc", "import socket\ns=socket.create_server(('0.0.0.0',7000))\nprint('listening')\nwhile 1:\n c,_=s.accept(); c.sendall(b'hello'); c.close()").Says("listening", 10*time.Second)
	for k := range 3 {
		for try := range 20 {
			r := a.Run("python3", "-c", fmt.Sprintf("import socket\nprint(socket.create_connection(('%v',7000),10,('%v',%d)).recv(9))", b.Addr, a.Addr, 5001+k))
			if r.Code == 0 && strings.Contains(r.Out, "hello") {
				break
			}
			if try == 19 {
				t.Fatalf("flow %d: %v", k, r)
			}
			time.Sleep(200 * time.Millisecond)
		}
		if n := len(a.Mature()); n != 2*(k+1) {
			t.Errorf("%d SAs for %d flows, want a pair for each", n, k+1)
		}
	}
}

// "sa init": SAs are there without a packet.
func TestSAInit(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, n := range []*lab.Node{b, a} {
		n.StartMissiu()
		n.StartIKE()
		properties := aesSHA1
		if n == a {
			properties += " sa init"
		}
		n.LoadConfig(policyFor(n, "", properties))
	}
	lab.Until(t, 20*time.Second, "two SAs", func() (bool, string) { return len(a.Mature()) == 2, a.IKE.Output() })
}

// The end points of a Solaris tunnel entry are those of the interface.
func TestTunnelInterface(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for line, want := range map[string]string{
		"tunnel eth0": "want an interface that is a tunnel", "tunnel nothere": "want an interface that is a tunnel",
	} {
		a.WriteFile("bin/bad", "{ "+line+" negotiate tunnel } ipsec { encr_algs aes }\n", 0o644)
		if r := a.Try("./loadConfig -c bad"); r.Code == 0 || !strings.Contains(r.Err, want) {
			t.Errorf("%s: %v", line, r)
		}
	}
	r := a.Run("ip", "link", "add", "tun7", "type", "ipip", "local", a.Addr.String(), "remote", b.Addr.String())
	if r.Code != 0 {
		t.Skipf("this kernel has no tunnel interfaces: %s", r.Err)
	}
	for _, n := range []*lab.Node{a, b} {
		n.Must("ip", "addr", "add", map[*lab.Node]string{a: "10.1.0.1/16", b: "10.2.0.1/16"}[n], "dev", "lo")
		n.StartMissiu()
		n.StartIKE()
	}
	a.LoadConfig("{ tunnel tun7 negotiate tunnel laddr 10.1.0.0/16 raddr 10.2.0.0/16 } ipsec { encr_algs aes encr_auth_algs sha256 }\n")
	b.LoadConfig(fmt.Sprintf("{ laddr 10.2.0.0/16 raddr 10.1.0.0/16 } ipsec { encr_algs aes encr_auth_algs sha256 tladdr %v traddr %v }\n", b.Addr, a.Addr))
	if out := a.Do("./loadConfig -dP"); !strings.Contains(out, fmt.Sprintf("tladdr %v traddr %v", a.Addr, b.Addr)) {
		t.Errorf("-dP shows\n%s", out)
	}
	a.RouteTo(prefixes("10.2.0.0/16")[0])
	b.RouteTo(prefixes("10.1.0.0/16")[0])
	if got := a.Ping(5, "-I", "10.1.0.1", "10.2.0.1"); got != 5 {
		t.Errorf("%d of 5 pings answered", got)
	}
	// What goes through the interface and matches no entry is dropped.
	a.Sh("ip link set tun7 up; ip route add 10.3.0.0/16 dev tun7")
	c := a.CaptureWhole("eth0", "ip proto 4")
	was := a.Status().Counters["drop_out_discard"]
	a.Silence(2, "-I", "10.1.0.1", "10.3.0.1")
	if ps := c.Stop(); len(ps) != 0 {
		t.Errorf("on the link: %v, want nothing in clear through the tunnel", ps)
	}
	if n := a.Status().Counters["drop_out_discard"] - was; n != 2 {
		t.Errorf("%d packets dropped, want 2", n)
	}
}
