package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// cpis are those of the child SAs of n, by which it receives and its peer.
func cpis(t *testing.T, n *lab.Node) (in, out []uint16) {
	t.Helper()
	var s struct {
		IKESAs []struct {
			Children []struct {
				In  uint16 `json:"cpi_in"`
				Out uint16 `json:"cpi_out"`
			}
		} `json:"ike_sas"`
	}
	if err := json.Unmarshal([]byte(n.Do("./ike status --json")), &s); err != nil {
		t.Fatal(err)
	}
	for _, i := range s.IKESAs {
		for _, c := range i.Children {
			if c.In != 0 || c.Out != 0 {
				in, out = append(in, c.In), append(out, c.Out)
			}
		}
	}
	return in, out
}

// TestIPComp: ESP and AH whose payloads are compressed as IKE agreed, in packets and
// in super-frames; what does not compress passes too; each rekeying brings new CPIs;
// with a peer that does not want it everything is as without.
func TestIPComp(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	c := choicePair{a, b}
	a.Must("ip", "addr", "add", "10.1.0.1/32", "dev", "lo")
	b.Must("ip", "addr", "add", "10.2.0.1/32", "dev", "lo")
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
		ruleIKE(n, "", "childsa_ipcomp deflate", lab.PSK)
		n.Do(fmt.Sprintf("ip route add %v dev %s src %v", n.Peer, n.TAP(), n.Addr))
	}
	a.Do("ip route add 10.2.0.0/24 dev " + a.TAP() + " src 10.1.0.1")
	b.Do("ip route add 10.1.0.0/24 dev " + b.TAP() + " src 10.2.0.1")

	// zeros pings with what compresses, and tells how many went and came so.
	zeros := func(t *testing.T, to string) (out, in int) {
		t.Helper()
		was := a.Status().Counters
		if got := a.Ping(3, "-w", "60", "-s", "1000", "-p", "00", to); got != 3 {
			t.Errorf("%d of 3 pings answered: %v, %v", got, nonzero(a), nonzero(b))
		}
		is := a.Status().Counters
		return is["out_compressed"] - was["out_compressed"], is["in_expanded"] - was["in_expanded"]
	}
	for _, tt := range []struct {
		name, policy, sas string
		tunnel            bool
	}{
		{"ESP tunnel, implicit IV", "ipsec { encr_algs gcm-iiv }", "aes-gcm-16-iiv(256)", true},
		{"AH", "ipsec { auth_algs sha256 }", "ah hmac-sha256", false},
		{"ESP in AH", "ipsec { encr_algs gcm auth_algs sha256 }", "aes-gcm-16(256), ah hmac-sha256", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c.load(t, tt.tunnel, tt.policy, tt.policy)
			_, at := c.ends(tt.tunnel)
			drops := a.Status().Drops() + b.Status().Drops()
			if out, in := zeros(t, at.String()); out < 3 || in < 3 {
				t.Errorf("%d packets compressed and %d expanded, want 3", out, in)
			}
			if got := outbound(a); got != tt.sas {
				t.Errorf("SAs %q, want %q", got, tt.sas)
			}
			a.Transfer(b, at, 200_000) // pseudo-random
			was := b.Status().Counters["in_expanded"]
			l := b.Start("bin/transfer", "listen", at.String()+":5002")
			l.Says("listening", 10*time.Second)
			a.Sh("head -c 1000000 /dev/zero >/dev/tcp/" + at.String() + "/5002")
			l.Wait(30 * time.Second)
			if got := b.Status().Counters["in_expanded"] - was; got < 1_000_000/1500 || !strings.Contains(l.Output(), "\n1000000 ") {
				t.Errorf("%d segments of a megabyte expanded; the listener: %s", got, l.Output())
			}

			in, out := cpis(t, a)
			if in2, out2 := cpis(t, b); len(in) != 1 || fmt.Sprint(in, out) != fmt.Sprint(out2, in2) {
				t.Errorf("a has CPIs %v, %v; b %v, %v", in, out, in2, out2)
			}
			if s := a.Do("./ike status; ./loadConfig -d"); !strings.Contains(s, fmt.Sprintf("IPComp with CPIs in %d, out %d", in[0], out[0])) || strings.Count(s, "IPComp with CPI ") != 2 {
				t.Errorf("shown: %s", s)
			}
			a.Do("./ike rekey peer")
			lab.Until(t, 20*time.Second, "new CPIs", func() (bool, string) {
				in2, out2 := cpis(t, a)
				return len(in2) == 1 && in2[0] != in[0] && out2[0] != out[0], fmt.Sprint(in2, out2)
			})
			if out, in := zeros(t, at.String()); out < 3 || in < 3 {
				t.Errorf("rekeyed: %d packets compressed and %d expanded, want 3", out, in)
			}
			if got := a.Status().Drops() + b.Status().Drops() - drops; got != 0 {
				t.Errorf("%d packets dropped: %v, %v", got, nonzero(a), nonzero(b))
			}
		})
	}

	b.WriteFile("/etc/missiu/ike.conf", fmt.Sprintf("rule \"peer\" { auth_method preshared remote_addr %v }\n", b.Peer), 0o644)
	b.Do("killall -HUP ike")
	b.IKE.Says("configuration read again", 10*time.Second)
	a.Do("./ike down peer; ./ike up peer")
	if out, in := zeros(t, b.Addr.String()); out != 0 || in != 0 {
		t.Errorf("peer without: %d packets compressed and %d expanded", out, in)
	}
	if in, out := cpis(t, a); in != nil {
		t.Errorf("peer without: CPIs %v, %v", in, out)
	}
}
