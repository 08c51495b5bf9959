package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// ikeStatus is what the tests need of ike status --json.
type ikeStatus struct {
	IKESAs []struct {
		Rule, State string
		SPILocal    string `json:"spi_local"`
		PeerID      string `json:"peer_id"`
		Children    []struct {
			SPIIn string `json:"spi_in"`
			Suite string
		}
	} `json:"ike_sas"`
	Rules []struct {
		Label, Failure string
		Up             bool
	}
}

func statusOfIKE(t *testing.T, n *lab.Node) (s ikeStatus) {
	t.Helper()
	if err := json.Unmarshal([]byte(n.Do("./ike status --json")), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// ruleIKE starts ike with a rule "peer" for the other host.
func ruleIKE(n *lab.Node, options, conf, secret string) {
	n.WriteFile("/etc/missiu/ike.conf", fmt.Sprintf("rule \"peer\" { auth_method preshared remote_addr %v %s }\n", n.Peer, conf), 0o644)
	n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"peer\" key %q }\n", secret), 0o600)
	n.StartIKEWith("./ike " + options)
}

// An operator brings a rule up, looks at it, rekeys it and takes it down; opens
// a capture with the keys that ike was told to write; and asks of the capture what
// another configuration would have answered.
func TestOperatorOfIKE(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
		n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
		n.Route()
	}
	ruleIKE(a, "--keylog /run/keys", "", lab.PSK)
	ruleIKE(b, "", "", "another secret of the two hosts")

	// It fails, and everybody says why.
	r := a.Try("./ike up peer")
	if r.Code != 1 || !strings.Contains(r.Err, "AUTHENTICATION_FAILED") {
		t.Errorf("up with another secret: %v", r)
	}
	for _, n := range []*lab.Node{a, b} {
		if s := statusOfIKE(t, n); len(s.Rules) != 1 || s.Rules[0].Up || !strings.Contains(s.Rules[0].Failure, "AUTHENTICATION_FAILED") {
			t.Errorf("%s: %+v", n.Name, s)
		}
	}
	b.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"peer\" key %q }\n", lab.PSK), 0o600)
	b.Do("killall -HUP ike")
	b.IKE.Says("configuration read again", 10*time.Second)

	c := a.CaptureWhole("eth0")
	a.Do("./ike up peer")
	s := statusOfIKE(t, a)
	if len(s.IKESAs) != 1 || s.IKESAs[0].State != "established" || s.IKESAs[0].PeerID != b.Addr.String() || len(s.IKESAs[0].Children) != 1 || !s.Rules[0].Up || s.Rules[0].Failure != "" {
		t.Fatalf("after up: %+v", s)
	}
	pings(t, a, 3)
	a.Do("./ike rekey peer")
	pings(t, a, 2)
	if now := statusOfIKE(t, a); len(now.IKESAs) != 1 || now.IKESAs[0].SPILocal == s.IKESAs[0].SPILocal || now.IKESAs[0].Children[0].SPIIn == s.IKESAs[0].Children[0].SPIIn {
		t.Errorf("after rekey: %+v, was %+v", now, s)
	}
	if text := a.Do("./ike status"); !strings.Contains(text, `rule "peer"`) || !strings.Contains(text, "rekeyed in") {
		t.Errorf("status: %s", text)
	}
	a.Do("./ike down peer")
	for _, n := range []*lab.Node{a, b} {
		lab.Until(t, 10*time.Second, "no SA on "+n.Name, func() (bool, string) { l := n.SAs(); return len(l) == 0, fmt.Sprint(l) })
	}
	lab.NoClear(t, c.Stop())

	// The two commands of ike(8).
	a.Do("cp " + c.Path + " /run/capture.pcap; chmod 644 /run/capture.pcap; stat -c %a /run/keys | grep -x 600")
	a.Do(`export HOME=/run/home XDG_CONFIG_HOME=
d=${XDG_CONFIG_HOME:-~/.config}/wireshark; mkdir -p $d; grep -v '^"' /run/keys >$d/ikev2_decryption_table; grep '^"' /run/keys >$d/esp_sa`)
	look := func(display, field string) int {
		t.Helper()
		out := a.Do("HOME=/run/home XDG_CONFIG_HOME= tshark -n -r /run/capture.pcap -o esp.enable_encryption_decode:TRUE -Y '" + display + "' -T fields -e " + field)
		return len(strings.Fields(out))
	}
	if n := look("isakmp.exchangetype == 35 && isakmp.id.data.ipv4_addr", "frame.number"); n != 2 {
		t.Errorf("identities are seen in %d messages of IKE_AUTH, want 2", n)
	}
	if n := look("isakmp.exchangetype == 36 && isakmp.nonce", "frame.number"); n != 4 {
		t.Errorf("nonces are seen in %d messages of CREATE_CHILD_SA, want 4: those of the IKE SA and of the child SA", n)
	}
	if n := look("esp && icmp", "frame.number"); n != 10 {
		t.Errorf("%d pings and answers are seen inside ESP, want 10", n)
	}

	// Without privilege, and of another configuration.
	a.Sh("cp -rL bin /run/bin")
	a.WriteFile("/etc/missiu/other.conf", "rule \"strict\" { auth_method preshared remote_addr any ikesa_xform { encr_alg aes-gcm(256) dh_group 16 } }\n", 0o644)
	explain := "setpriv --reuid 65534 --clear-groups /run/bin/ike explain -a " + b.Addr.String()
	if out := a.Sh(explain + " /run/capture.pcap"); !strings.Contains(out, "no rule is for") || !strings.Contains(out, "answer: N(NO_PROPOSAL_CHOSEN)") {
		t.Errorf("by a's own file, as b: %s", out)
	}
	if out := a.Sh(explain + " -f /etc/missiu/other.conf /run/capture.pcap"); !strings.Contains(out, "INVALID_KE_PAYLOAD: try MODP4096") {
		t.Errorf("by another file: %s", out)
	}
}

// A killed ike leaves SAs behind: the next one replaces them, on both hosts,
// without being asked. SAs of a policy that is taken away go, on both hosts.
func TestSAsAreNotOrphaned(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	upAll(a, b)
	pings(t, a, 1)
	spis := func(n *lab.Node) map[uint32]bool {
		m := map[uint32]bool{}
		for _, s := range n.Mature() {
			m[s.SPI] = true
		}
		return m
	}
	old := spis(a)
	a.Do("killall -9 ike")
	a.IKE.Wait(10 * time.Second)
	if got := spis(a); fmt.Sprint(got) != fmt.Sprint(old) {
		t.Fatalf("SAs %v after ike was killed, were %v", got, old)
	}
	a.StartIKE()
	for _, n := range []*lab.Node{a, b} {
		lab.Until(t, 20*time.Second, "two new SAs on "+n.Name, func() (bool, string) {
			got := spis(n)
			ok := len(got) == 2
			for s := range got {
				ok = ok && !old[s]
			}
			return ok, fmt.Sprint(got)
		})
	}
	pings(t, b, 2)

	a.LoadConfig("{ raddr 10.9.9.9 } ipsec { encr_algs gcm }\n")
	for _, n := range []*lab.Node{a, b} {
		lab.Until(t, 20*time.Second, "no SA on "+n.Name, func() (bool, string) { got := n.SAs(); return len(got) == 0, fmt.Sprint(got) })
	}
	a.KillIKE(5 * time.Second)
	if out := a.Sh("ls /run/missiu"); strings.Contains(out, ".ike") || strings.Contains(out, ".sas") {
		t.Errorf("ike leaves behind: %s", out)
	}
}

// Reauthentication against charon, make before break, begun by either: pings go
// on through it and none is lost.
func TestInteropReauthentication(t *testing.T) {
	d := newDuo(t, "make_before_break = yes")
	for _, tt := range []struct{ name, conf, conn string }{
		{"ours", "reauth_secs 4 rekey_fuzz 0", ""},
		{"theirs", "", "reauth_time = 4s\nover_time = 20s\nrand_time = 0s\nrekey_time = 0"},
		{"ours, by AUTH_LIFETIME of theirs", "", "reauth_time = 5s\nover_time = 10s\nrand_time = 0s\nrekey_time = 0"},
		{"theirs, by AUTH_LIFETIME of ours", "reauth_secs 25", "over_time = 20s"},
	} {
		d.peer(tt.conn, "")
		d.rule(tt.conf)
		oursBegins := strings.HasPrefix(tt.name, "ours")
		if oursBegins {
			d.a.Do("./ike up t")
		} else {
			d.up()
		}
		spi := func() string {
			s := statusOfIKE(t, d.a)
			if len(s.IKESAs) == 0 {
				return ""
			}
			return s.IKESAs[len(s.IKESAs)-1].SPILocal
		}
		was := spi()
		traffic := d.a.Start(lab.PingArgs(600, 10*time.Millisecond, 10*time.Second, "10.2.0.1")...)
		lab.Until(t, 60*time.Second, tt.name+": another IKE SA alone", func() (bool, string) {
			s := statusOfIKE(t, d.a)
			return len(s.IKESAs) == 1 && s.IKESAs[0].SPILocal != was && len(s.IKESAs[0].Children) == 1, fmt.Sprintf("%+v", s)
		})
		traffic.Wait(60 * time.Second)
		if got := lab.Answered(traffic.Output(), 600); got != 600 {
			t.Errorf("%s: %d of 600 pings answered", tt.name, got)
		}
		d.down()
	}
}
