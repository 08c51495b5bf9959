package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// listedSA is what the tests read of an SA in `loadConfig -d --json`.
type listedSA struct {
	Protocol string     `json:"protocol"`
	SPI      uint32     `json:"spi"`
	Src      netip.Addr `json:"src"`
	Dst      netip.Addr `json:"dst"`
	Mode     string     `json:"mode"`
	State    string     `json:"state"`
	Encr     string     `json:"encr"`
	EncrBits int        `json:"encr_bits"`
	Auth     string     `json:"auth"`
}

func listSAs(n *lab.Node) (l []listedSA) {
	var all []listedSA
	if err := json.Unmarshal([]byte(n.Do("./loadConfig -d --json")), &all); err != nil {
		panic(err)
	}
	for _, s := range all {
		if s.State == "mature" || s.State == "dying" {
			l = append(l, s)
		}
	}
	return l
}

// outbound tells the SAs that n sends by: protocol and algorithms, ESP first.
func outbound(n *lab.Node) string {
	var esp, ah []string
	for _, s := range listSAs(n) {
		switch {
		case s.Src != n.Addr:
		case s.Protocol == "ah":
			ah = append(ah, "ah "+s.Auth)
		default:
			w := s.Encr
			if s.EncrBits != 0 {
				w += fmt.Sprintf("(%d)", s.EncrBits)
			}
			if s.Auth != "none" {
				w += " " + s.Auth
			}
			esp = append(esp, w)
		}
	}
	return strings.Join(append(esp, ah...), ", ")
}

// within is the protocol inside the AH of a packet; 0 if there is no AH.
func within(p lab.Packet) uint8 {
	if p.Kind != lab.AH || len(p.Frame) <= p.L4 {
		return 0
	}
	return p.Frame[p.L4]
}

// encrypts finds in what outbound tells an SA that hides its payload.
var encrypts = regexp.MustCompile(`aes-(cbc|ctr|ccm|gcm)`)

// choicePair is two hosts with all of the product running, networks behind them
// and routes, to be loaded with policies one after the other.
type choicePair struct{ a, b *lab.Node }

func newChoicePair(t *testing.T) choicePair {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	a.Must("ip", "addr", "add", "10.1.0.1/32", "dev", "lo")
	b.Must("ip", "addr", "add", "10.2.0.1/32", "dev", "lo")
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
	}
	for _, n := range []*lab.Node{a, b} {
		n.StartIKE()
		n.Do(fmt.Sprintf("ip route add %v dev %s src %v", n.Peer, n.TAP(), n.Addr))
	}
	a.Do("ip route add 10.2.0.0/24 dev " + a.TAP() + " src 10.1.0.1")
	b.Do("ip route add 10.1.0.0/24 dev " + b.TAP() + " src 10.2.0.1")
	return choicePair{a, b}
}

// load puts entries in force, of tunnel mode between the networks or of transport
// mode between the hosts, in the place of what was there with its SAs.
func (c choicePair) load(t *testing.T, tunnel bool, ofA, ofB string) {
	t.Helper()
	for n, actions := range map[*lab.Node]string{c.a: ofA, c.b: ofB} {
		sel := fmt.Sprintf("{ raddr %v }", n.Peer)
		if tunnel {
			nets := "laddr 10.1.0.0/24 raddr 10.2.0.0/24"
			if n == c.b {
				nets = "laddr 10.2.0.0/24 raddr 10.1.0.0/24"
			}
			sel = "{ " + nets + " }"
			actions = strings.ReplaceAll(actions, " }", fmt.Sprintf(" tladdr %v traddr %v }", n.Addr, n.Peer))
		}
		n.LoadConfig(sel + " " + actions + "\n")
	}
	c.a.Do("./loadConfig -F")
	for _, n := range []*lab.Node{c.a, c.b} {
		lab.Until(t, 10*time.Second, "old SAs of "+n.Name+" to go", func() (bool, string) { return len(n.SAs()) == 0, fmt.Sprint(n.SAs()) })
	}
}

func (c choicePair) ends(tunnel bool) (a, b netip.Addr) {
	if tunnel {
		return netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.2.0.1")
	}
	return c.a.Addr, c.b.Addr
}

// TestAHByIKE: AH, and ESP inside AH, are negotiated with every algorithm, in both
// modes; packets of all sizes and TCP pass, protected by exactly that. Of
// alternatives the responder's order decides.
func TestAHByIKE(t *testing.T) {
	c := newChoicePair(t)
	const esp, ah = 50, 51
	for _, tt := range []struct {
		name, a, b string // b: "" as a
		want       string
		proto      uint8 // on the wire
		inner      uint8 // inside AH in transport mode
	}{
		{"sha1", "ipsec { auth_algs sha1 }", "", "ah hmac-sha1", ah, 0},
		{"sha256", "ipsec { auth_algs sha256 }", "", "ah hmac-sha256", ah, 0},
		{"sha384", "ipsec { auth_algs sha384 }", "", "ah hmac-sha384", ah, 0},
		{"sha512", "ipsec { auth_algs sha512 }", "", "ah hmac-sha512", ah, 0},
		{"aes-xcbc", "ipsec { auth_algs aes-xcbc }", "", "ah aes-xcbc", ah, 0},
		{"aes-cmac", "ipsec { auth_algs aes-cmac }", "", "ah aes-cmac", ah, 0},
		{"gmac 128", "ipsec { auth_algs aes-gmac-128 }", "", "ah aes-gmac-128", ah, 0},
		{"gmac 192", "ipsec { auth_algs aes-gmac-192 }", "", "ah aes-gmac-192", ah, 0},
		{"gmac 256", "ipsec { auth_algs aes-gmac-256 }", "", "ah aes-gmac-256", ah, 0},
		{"any", "ipsec { auth_algs any }", "ipsec { auth_algs sha512 }", "ah hmac-sha512", ah, 0},
		{"AH and ESP", "ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha1 }", "", "aes-cbc(256) hmac-sha1, ah hmac-sha256", ah, esp},
		{"AH and AEAD", "ipsec { auth_algs sha1 encr_algs gcm(128) }", "", "aes-gcm-16(128), ah hmac-sha1", ah, esp},
		{"AH and ESP without integrity of its own choice", "ipsec { auth_algs sha1 encr_algs aes(192) }", "", "aes-cbc(192) hmac-sha256, ah hmac-sha1", ah, esp},
		{"AH and NULL", "ipsec { auth_algs sha1 encr_auth_algs sha512 }", "", "null hmac-sha512, ah hmac-sha1", ah, esp},
		{"GMAC twice", "ipsec { auth_algs aes-gmac-256 encr_algs gmac(256) }", "", "null-aes-gmac(256), ah aes-gmac-256", ah, esp},
		{"CTR", "ipsec { encr_algs ctr(256) encr_auth_algs sha256 }", "", "aes-ctr(256) hmac-sha256", esp, 0},
		{"CCM", "ipsec { encr_algs ccm }", "", "aes-ccm-16(256)", esp, 0},
		{"CCM 8", "ipsec { encr_algs ccm(128) tag 8 }", "", "aes-ccm-8(128)", esp, 0},
		{"GMAC of ESP", "ipsec { encr_algs gmac }", "", "null-aes-gmac(256)", esp, 0},
		{"the responder's order", "ipsec { encr_algs gcm } or ipsec { auth_algs sha256 }", "ipsec { auth_algs sha256 } or ipsec { encr_algs gcm }", "ah hmac-sha256", ah, 0},
		{"what both have", "ipsec { auth_algs sha1 } or ipsec { encr_algs aes encr_auth_algs sha1 } or ipsec { encr_algs gcm }", "ipsec { auth_algs sha256 } or ipsec { encr_algs gcm }", "aes-gcm-16(256)", esp, 0},
		{"both transforms in one alternative", "ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha256 } or ipsec { encr_algs gcm }", "", "aes-cbc(256) hmac-sha256, ah hmac-sha256", ah, esp},
		{"of several of both", "ipsec { auth_algs sha1 encr_algs gcm } or ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha256 }",
			"ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha256 } or ipsec { auth_algs sha1 encr_algs gcm }", "aes-cbc(256) hmac-sha256, ah hmac-sha256", ah, esp},
		{"or pass", "ipsec { auth_algs sha1 }", "ipsec { auth_algs sha1 } or ipsec { encr_algs gcm } or pass {}", "ah hmac-sha1", ah, 0},
	} {
		for _, tunnel := range []bool{false, true} {
			t.Run(tt.name+map[bool]string{true: " tunnel"}[tunnel], func(t *testing.T) {
				b := tt.b
				if b == "" {
					b = tt.a
				}
				c.load(t, tunnel, tt.a, b)
				before := c.b.Status().Drops() + c.a.Status().Drops()
				atA, atB := c.ends(tunnel)
				w := c.a.CaptureWhole("eth0")
				for _, size := range []string{"20", "1100", "3000"} {
					if got := c.a.Ping(3, "-w", "60", "-s", size, "-p", "7365637265742e2e", atB.String()); got < 3 {
						t.Errorf("%d of 3 pings of %s octets answered\n%s", got, size, c.a.Do("./loadConfig -d; ./loadConfig -l"))
					}
				}
				c.b.Transfer(c.a, atA, 200_000)
				ps := w.Stop()
				lab.NoClear(t, ps)
				if got := outbound(c.a); got != tt.want {
					t.Errorf("SAs: got %q, want %q", got, tt.want)
				}
				if got := outbound(c.b); got != tt.want {
					t.Errorf("SAs of b: got %q, want %q", got, tt.want)
				}
				inner := tt.inner
				if tunnel && inner != 0 {
					inner = 4
				}
				for _, p := range lab.Of(ps, lab.ESP, lab.AH) {
					if p.Proto != tt.proto || inner != 0 && !p.Fragment && within(p) != inner {
						t.Errorf("on the link: %v with %d inside AH, want protocol %d with %d", p, within(p), tt.proto, inner)
						break
					}
					if hidden := encrypts.MatchString(tt.want); hidden && bytes.Contains(p.Frame, []byte("secret..secret..")) {
						t.Error("the payload can be read on the link")
						break
					}
				}
				if n := len(lab.Of(ps, lab.ESP, lab.AH)); n < 18 {
					t.Errorf("%d protected packets on the link: %v", n, lab.Count(ps))
				}
				if after := c.b.Status().Drops() + c.a.Status().Drops(); after != before {
					t.Errorf("%d packets dropped: %v, %v", after-before, nonzero(c.a), nonzero(c.b))
				}
				// The listing is a policy file that says the same.
				list := c.a.Do("./loadConfig -l")
				c.a.WriteFile("bin/again.conf", list, 0o644)
				if out := c.a.Do("./loadConfig -f again.conf"); outbound(c.a) != tt.want {
					t.Errorf("loading what is listed changes it: %s\n%s", out, list)
				}
			})
		}
	}
}

// TestAHESPLife: of ESP inside AH each pair of SAs is rekeyed by itself without a
// loss, and one that is deleted is negotiated anew while the other stays.
func TestAHESPLife(t *testing.T) {
	c := newChoicePair(t)
	const both = "ipsec { auth_algs sha256 encr_algs gcm }"
	c.load(t, false, "ipsec { auth_algs sha256 encr_algs gcm lifetime_secs 4 }", both)
	of := func(n *lab.Node, proto string) map[uint32]bool {
		m := map[uint32]bool{}
		for _, s := range listSAs(n) {
			if s.Protocol == proto && s.Dst == n.Addr {
				m[s.SPI] = true
			}
		}
		return m
	}
	pings(t, c.a, 3)
	first := map[string]map[uint32]bool{"esp": of(c.a, "esp"), "ah": of(c.a, "ah")}
	w := c.a.CaptureWhole("eth0")
	if got := c.a.Ping(100, "-i", "0.1", c.b.Addr.String()); got != 100 {
		t.Errorf("%d of 100 pings answered while SAs were rekeyed", got)
	}
	ps := w.Stop()
	lab.NoClear(t, ps)
	if n := lab.Count(ps); n[lab.AH] < 200 || n[lab.ESP] != 0 {
		t.Errorf("on the link: %v, want 200 AH at least", n)
	}
	for proto, old := range first {
		for spi := range of(c.a, proto) {
			if old[spi] {
				t.Errorf("%v 0x%08x was not rekeyed", proto, spi)
			}
		}
	}

	c.load(t, false, both, both)
	pings(t, c.a, 3)
	for _, proto := range []string{"ah", "esp"} {
		other := map[string]string{"ah": "esp", "esp": "ah"}[proto]
		kept, gone := of(c.b, other), of(c.b, proto)
		for spi := range gone {
			loadPrivate(c.b, "-k", fmt.Sprintf("delete %s spi 0x%x dst %v\n", proto, spi, c.b.Addr))
		}
		lab.Until(t, 10*time.Second, "the peer to hear of it", func() (bool, string) { return len(of(c.a, proto)) == 0, outbound(c.a) })
		pings(t, c.a, 3)
		if got := of(c.b, other); fmt.Sprint(got) != fmt.Sprint(kept) {
			t.Errorf("%s was negotiated anew with %s: %v, had %v", other, proto, got, kept)
		}
		for spi := range of(c.b, proto) {
			if gone[spi] || len(of(c.b, proto)) != 1 {
				t.Errorf("%s was not negotiated anew: %v", proto, of(c.b, proto))
			}
		}
	}
}

// TestNeverLess: a packet with one of the two transforms that policy wants is
// dropped, though its SA is one that was negotiated for the policy; and nothing
// that lacks one leaves.
func TestNeverLess(t *testing.T) {
	c := newChoicePair(t)
	for name, tt := range map[string][2]string{
		"ESP for both":                {"ipsec { encr_algs gcm }", "ipsec { auth_algs sha256 encr_algs gcm }"},
		"ESP for both, or another":    {"ipsec { encr_algs gcm }", "ipsec { auth_algs sha256 encr_algs gcm } or ipsec { encr_algs aes encr_auth_algs sha512 }"},
		"AH for both, or another ESP": {"ipsec { auth_algs sha256 }", "ipsec { auth_algs sha256 encr_algs gcm } or ipsec { encr_algs aes encr_auth_algs sha512 }"},
	} {
		t.Run(name, func(t *testing.T) {
			c.load(t, false, tt[0], tt[1])
			before := c.b.Status().Counters["drop_in_policy"]
			w := c.b.CaptureWhole("eth0")
			if r := c.a.Run("ping", "-n", "-q", "-c", "5", "-i", "0.2", "-W", "1", c.b.Addr.String()); r.Code == 0 {
				t.Error("answered")
			}
			// Those that waited for the SA may come late.
			lab.Until(t, 10*time.Second, "the ping to be dropped by policy", func() (bool, string) {
				return c.b.Status().Counters["drop_in_policy"]-before >= 4, fmt.Sprint(nonzero(c.b))
			})
			if r := c.b.Run("ping", "-n", "-q", "-c", "2", "-i", "0.2", "-W", "1", c.a.Addr.String()); r.Code == 0 {
				t.Error("answered the other way")
			}
			ps := w.Stop()
			lab.NoClear(t, ps)
			for _, p := range lab.Of(ps, lab.ESP, lab.AH) {
				if p.Src == c.b.Addr {
					t.Errorf("left b: %v", p)
				}
			}
		})
	}
}
