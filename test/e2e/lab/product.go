package lab

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Node is a host that runs the product. Its commands start in a directory bin
// as an operator's do in that of the source tree.
type Node struct {
	*Host
	If   string // the physical interface
	Addr netip.Addr
	Peer netip.Addr
	IKE  *Proc
	// Echo is told of each command before it runs; may be nil.
	Echo func(n *Node, line string)
}

// NewNode puts the product on a host.
func NewNode(h *Host, ifname string, addr, peer netip.Addr) *Node {
	h.t.Helper()
	n := &Node{Host: h, If: ifname, Addr: addr, Peer: peer}
	src, dst := Bin(h.t), filepath.Join(h.Dir, "bin")
	if err := os.MkdirAll(dst, 0o755); err != nil {
		h.t.Fatalf("%v", err)
	}
	progs, err := os.ReadDir(src)
	if err != nil {
		h.t.Fatalf("%v", err)
	}
	for _, p := range progs {
		if err := os.Symlink(filepath.Join(src, p.Name()), filepath.Join(dst, p.Name())); err != nil {
			h.t.Fatalf("%v", err)
		}
	}
	return n
}

// Pair makes two hosts a and b on one Ethernet, of the addresses of the
// documented sequence and of two IPv6 ones, with the product on both.
func Pair(t TB) (a, b *Node) {
	t.Helper()
	return pairOf(t, NewHost(t, "a"), NewHost(t, "b"))
}

func pairOf(t TB, ha, hb *Host) (a, b *Node) {
	t.Helper()
	Link(t, ha, hb, "eth0",
		[]netip.Prefix{netip.MustParsePrefix("192.168.3.118/24"), netip.MustParsePrefix("fd00:3::118/64")},
		[]netip.Prefix{netip.MustParsePrefix("192.168.3.119/24"), netip.MustParsePrefix("fd00:3::119/64")})
	va, vb := netip.MustParseAddr("192.168.3.118"), netip.MustParseAddr("192.168.3.119")
	return NewNode(ha, "eth0", va, vb), NewNode(hb, "eth0", vb, va)
}

// Try runs a line of shell in bin.
func (n *Node) Try(line string) Result {
	n.t.Helper()
	if n.Echo != nil {
		n.Echo(n, line)
	}
	return n.Run("bash", "-c", "cd bin && "+line)
}

// Do is Try for a line that must succeed.
func (n *Node) Do(line string) string {
	n.t.Helper()
	r := n.Try(line)
	if r.Code != 0 {
		n.t.Fatalf("%s: %s\n%v", n.Name, line, r)
	}
	return r.Out
}

// StartMissiu is the first two lines of the documented sequence.
func (n *Node) StartMissiu(options ...string) {
	n.t.Helper()
	n.Do(strings.Join(append([]string{"./missiu -i", n.If, "-l missiu.log"}, append(options, "startRaw")...), " "))
	n.Do("ip link set dev " + n.TAP() + " up")
}

// PSK is the secret of WritePSK.
const PSK = "the secret of the two hosts"

// WritePSK writes the secret to the file ../psk of bin.
func (n *Node) WritePSK() {
	n.t.Helper()
	n.WriteFile("psk", PSK+"\n", 0o600)
}

// StartIKE starts ike in the background and waits until it is ready.
func (n *Node) StartIKE(options ...string) {
	n.t.Helper()
	n.WritePSK()
	n.StartIKEWith(strings.Join(append([]string{"./ike -p @../psk"}, options...), " "))
}

// StartIKEWith starts ike by a command line that lacks the address only.
func (n *Node) StartIKEWith(line string) {
	n.t.Helper()
	line += " " + n.Addr.String()
	if n.Echo != nil {
		n.Echo(n, line+" &")
	}
	n.IKE = n.Start("bash", "-c", "cd bin && exec "+line)
	n.IKE.Says("ready", 20*time.Second)
}

// KillIKE is the documented end of ike; it must come within limit.
func (n *Node) KillIKE(limit time.Duration) {
	n.t.Helper()
	n.Do("killall ike")
	if code := n.IKE.Wait(limit); code != 0 {
		n.t.Errorf("ike ended with status %d, want 0\n%s", code, tail(n.IKE.Output(), 20))
	}
}

// KillMissiu has missiu die without a word.
func (n *Node) KillMissiu() {
	n.t.Helper()
	pid := fmt.Sprint(n.Status().Pid)
	n.Do("kill -9 " + pid)
	Until(n.t, 10*time.Second, "missiu to die", func() (bool, string) {
		return n.Run("kill", "-0", pid).Code != 0, ""
	})
}

// LoadConfig loads a policy.
func (n *Node) LoadConfig(policy string) {
	n.t.Helper()
	n.WriteFile("bin/ipsec.conf", policy, 0o644)
	n.Do("./loadConfig -f ipsec.conf")
}

// Route sends what goes to the peer through the TAP, IPv4 as documented.
func (n *Node) Route() {
	n.t.Helper()
	n.RouteTo(netip.PrefixFrom(n.Peer, n.Peer.BitLen()))
}

// RouteTo sends what goes to p through the TAP.
func (n *Node) RouteTo(p netip.Prefix) {
	n.t.Helper()
	switch {
	case p.Addr().Is6():
		n.Do(fmt.Sprintf("ip -6 route add %v dev %s", p, n.TAP()))
	case p.IsSingleIP():
		n.Do(fmt.Sprintf("route add -host %v dev %s", p.Addr(), n.TAP()))
	default:
		n.Do(fmt.Sprintf("route add -net %v dev %s", p, n.TAP()))
	}
}

// Status is what the tests read of `missiu status --json`.
type Status struct {
	Pid int `json:"pid"`
	TAP struct {
		Name string `json:"name"`
		MTU  int    `json:"mtu"`
	} `json:"tap"`
	VIPs []struct {
		Address netip.Prefix `json:"address"`
		Name    string       `json:"name"`
	} `json:"vips"`
	SAs      int               `json:"sas"`
	Policies int               `json:"policies"`
	Paths    map[string]string `json:"paths"`
	Counters map[string]int    `json:"counters"`
}

// Status asks missiu.
func (n *Node) Status() Status {
	n.t.Helper()
	r := n.Run("bin/missiu", "-i", n.If, "status", "--json")
	if r.Code != 0 {
		n.t.Fatalf("%s: %v", n.Name, r)
	}
	var s Status
	if err := json.Unmarshal([]byte(r.Out), &s); err != nil {
		n.t.Fatalf("status: %v\n%s", err, r.Out)
	}
	return s
}

// TAP is the name of missiu's TAP.
func (n *Node) TAP() string {
	n.t.Helper()
	name := n.Status().TAP.Name
	if name == "" {
		n.t.Fatalf("%s: status tells no name of the TAP", n.Name)
	}
	return name
}

// Drops adds up the counters of inbound packets that were refused. Those of a queue
// that stood were not: a machine that is slow enough has such queues.
func (s Status) Drops() int {
	sum := 0
	for k, v := range s.Counters {
		if strings.HasPrefix(k, "drop_in_") && k != "drop_in_overload" {
			sum += v
		}
	}
	return sum
}

// SA is an SA with keys, as the SAD holds it.
type SA struct {
	SPI     uint32     `json:"spi"`
	Src     netip.Addr `json:"src"`
	Dst     netip.Addr `json:"dst"`
	Mode    string     `json:"mode"`
	ReqID   uint32     `json:"reqid"`
	State   string     `json:"state,omitempty"`
	Replay  uint8      `json:"replay"`
	Encr    string     `json:"encr"`
	EncrKey string     `json:"encr_key"`
	Auth    string     `json:"auth"`
	AuthKey string     `json:"auth_key"`
	Sport   uint16     `json:"sport,omitempty"`
	Dport   uint16     `json:"dport,omitempty"`
}

// socketPath is that of missiu's PF_KEY socket.
func (n *Node) socketPath() string { return "/run/missiu/" + n.If + ".pfkey" }

// SAs dumps the SAD by PF_KEY.
func (n *Node) SAs() []SA {
	n.t.Helper()
	var out []SA
	for d := json.NewDecoder(strings.NewReader(n.Must("bin/pfkey", n.socketPath(), "dump"))); d.More(); {
		var s SA
		if err := d.Decode(&s); err != nil {
			n.t.Fatalf("%v", err)
		}
		out = append(out, s)
	}
	return out
}

// Mature returns the SAs that traffic may use.
func (n *Node) Mature() []SA {
	n.t.Helper()
	var out []SA
	for _, s := range n.SAs() {
		if s.State == "mature" || s.State == "dying" {
			out = append(out, s)
		}
	}
	return out
}

// AddSA adds a manual SA by PF_KEY.
func (n *Node) AddSA(s SA) { n.pfkey("add-sa", s) }

// Policy is a manual policy for AddPolicy, with one ESP request.
type Policy struct {
	Dir   string       `json:"dir"`
	Src   netip.Prefix `json:"src"`
	Dst   netip.Prefix `json:"dst"`
	Proto uint8        `json:"proto"`
	Mode  string       `json:"mode"`
	TSrc  netip.Addr   `json:"tun_src"`
	TDst  netip.Addr   `json:"tun_dst"`
	ReqID uint32       `json:"reqid"`
}

// AddPolicy adds a policy by PF_KEY.
func (n *Node) AddPolicy(p Policy) { n.pfkey("add-policy", p) }

func (n *Node) pfkey(verb string, v any) {
	n.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		n.t.Fatalf("%v", err)
	}
	n.Must("bin/pfkey", n.socketPath(), verb, string(b))
}

// Keys returns the keys of all SAs in Wireshark's words.
func (n *Node) Keys() []Key {
	n.t.Helper()
	encr := map[string]string{"null": WiresharkNULL, "3des-cbc": Wireshark3DESCBC, "aes-cbc": WiresharkAESCBC, "aes-gcm8": WiresharkAESGCM8, "aes-gcm12": WiresharkAESGCM12, "aes-gcm16": WiresharkAESGCM16}
	auth := map[string]string{"": WiresharkNULL, "sha1": WiresharkSHA1, "sha256": WiresharkSHA256, "sha384": WiresharkSHA384, "sha512": WiresharkSHA512}
	var out []Key
	for _, s := range n.SAs() {
		if s.State == "larval" {
			continue
		}
		k := Key{Src: s.Src, Dst: s.Dst, SPI: s.SPI, Encr: encr[s.Encr], Auth: auth[s.Auth]}
		var err error
		if k.EncrKey, err = hex.DecodeString(s.EncrKey); err != nil {
			n.t.Fatalf("%v", err)
		}
		if k.AuthKey, err = hex.DecodeString(s.AuthKey); err != nil {
			n.t.Fatalf("%v", err)
		}
		out = append(out, k)
	}
	return out
}

// Transfer sends octets by TCP from n to m's address at, fails the test unless
// both ends saw the same SHA-256, and returns the receiver's octets a second.
func (n *Node) Transfer(m *Node, at netip.Addr, octets int) float64 {
	n.t.Helper()
	where := netip.AddrPortFrom(at, 5001).String()
	l := m.Start("bin/transfer", "listen", where)
	l.Says("listening", 10*time.Second)
	r := n.Run("bin/transfer", "send", where, fmt.Sprint(octets))
	if r.Code != 0 {
		n.t.Fatalf("%v\nthe listener: %s", r, l.Output())
	}
	l.Wait(30 * time.Second)
	var sent, got struct {
		n    int
		hash string
		secs float64
	}
	if _, err := fmt.Sscan(r.Out, &sent.n, &sent.hash, &sent.secs); err != nil {
		n.t.Fatalf("sender says %q: %v", r.Out, err)
	}
	if _, err := fmt.Sscan(strings.TrimPrefix(l.Output(), "listening\n"), &got.n, &got.hash, &got.secs); err != nil {
		n.t.Fatalf("listener says %q: %v", l.Output(), err)
	}
	if sent.n != octets || got.n != octets || sent.hash != got.hash {
		n.t.Errorf("sent %d octets %s, received %d %s", sent.n, sent.hash, got.n, got.hash)
	}
	return float64(got.n) / got.secs
}

// StopMissiu is the documented end.
func (n *Node) StopMissiu() {
	n.t.Helper()
	n.Do("./missiu -i " + n.If + " stop")
}
