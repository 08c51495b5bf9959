package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// lossy lets h lose a fifth of the IKE messages that come and go; ESP in UDP
// passes.
func lossy(h *lab.Host) {
	for _, chain := range []string{"input", "output"} {
		h.Must("nft", "add", "table", "inet", "lossy")
		h.Must("nft", fmt.Sprintf("add chain inet lossy %s { type filter hook %s priority 0; }", chain, chain))
		h.Must("nft", "add rule inet lossy "+chain+" udp dport 500 numgen random mod 5 0 counter drop")
		h.Must("nft", "add rule inet lossy "+chain+" udp dport 4500 @th,64,32 0 numgen random mod 5 0 counter drop")
	}
}

// Hybrid key exchange as it is by default, in small fragments over a link that
// loses a fifth of them: IKE_INTERMEDIATE before IKE_AUTH, IKE_FOLLOWUP_KE when
// the IKE SA is rekeyed and for its child, whose packets have an implicit IV.
func TestHybrid(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
		n.WriteFile("/etc/missiu/ike.conf", fmt.Sprintf(`fragment_size 576 retry_timer_init 0.5 retry_timer_max 1 retry_limit 30 dpd_secs 0
childsa_pfs x25519 childsa_additional_ke ml_kem_768
rule "peer" { auth_method preshared remote_addr %v }
`, n.Peer), 0o644)
		n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"peer\" key %q }\n", lab.PSK), 0o600)
		n.StartIKEWith("./ike")
		n.Route()
	}
	for _, n := range []*lab.Node{a, b} {
		n.LoadConfig(fmt.Sprintf("{ laddr %v raddr %v } ipsec { encr_algs gcm-iiv }\n", n.Addr, n.Peer))
	}
	lossy(b.Host)
	c := a.CaptureWhole("eth0", "udp", "port", "500", "or", "udp", "port", "4500")
	a.Do("./ike up peer")
	if got := a.Ping(5, b.Addr.String()); got != 5 {
		t.Errorf("%d of 5 pings answered", got)
	}
	a.Do("./ike rekey peer")
	if got := a.Ping(5, b.Addr.String()); got != 5 {
		t.Errorf("after rekeying: %d of 5 pings answered", got)
	}
	for _, n := range []*lab.Node{a, b} {
		if out := n.IKE.Output(); strings.Count(out, "x25519/ml-kem-768") < 3 {
			t.Errorf("%s: not all of the IKE SA, the one in its place, and the child SA have ML-KEM:\n%s", n.Name, out)
		}
	}
	for _, s := range a.Mature() {
		if s.Encr != "aes-gcm16-iiv" {
			t.Errorf("SA %+v, want one with an implicit IV", s)
		}
	}
	c.Stop()
	out, err := exec.Command("tshark", "-r", c.Path, "-T", "fields", "-e", "isakmp.exchangetype", "-e", "isakmp.nextpayload", "-e", "udp.length").Output()
	if err != nil {
		t.Fatalf("tshark: %v", err)
	}
	fragments := map[string]int{}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		var n int
		if len(f) == 3 {
			fmt.Sscan(f[2], &n)
		}
		if n > 576-20 && f[0] != "34" {
			t.Errorf("exchange %s in %d octets of UDP, want at most %d", f[0], n, 576-20)
		}
		if len(f) == 3 && strings.HasPrefix(f[1], "53") {
			fragments[f[0]]++
		}
	}
	if fragments["43"] < 5 || fragments["44"] < 5 {
		t.Errorf("fragments by exchange %v, want several in 43, IKE_INTERMEDIATE, and 44, IKE_FOLLOWUP_KE", fragments)
	}
}

// strongSwan, which knows neither additional key exchanges nor ML-KEM: it takes
// the second proposal in the first exchange. A PPK that both require, an IKE SA
// without child first, and small fragments over a link that loses a fifth of
// them; either side begins.
func TestStrongSwanPPK(t *testing.T) {
	const secret = "0x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	id := strings.Repeat("ppk-", 62) // as long as it may be
	d := newDuo(t, "fragment_size = 576\n retransmit_tries = 20\n retransmit_limit = 1\n")
	d.secrets = fmt.Sprintf("  ppk-t {\n    id = %s\n    secret = %s\n  }\n", id, secret)
	d.peer("ppk_id = "+id+"\nppk_required = yes\nchildless = force\nfragmentation = yes\n", "esp_proposals = aes128gcm16-modp4096")
	d.a.WriteFile("/etc/missiu/ike.conf", fmt.Sprintf(`rule "t" { auth_method preshared remote_addr 192.168.3.119
  ppk require ppk_id %q childless force childsa_pfs 16 fragment_size 576 retry_timer_init 0.5 retry_timer_max 1 retry_limit 30 }
`, id), 0o644)
	d.a.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"t\" key %q } { ppk_id %q ppk %s }\n", lab.PSK, id, secret), 0o600)
	d.a.IKE = d.a.Start("bash", "-c", "cd bin && exec ./ike "+d.a.Addr.String())
	d.a.IKE.Says("ready", 20*time.Second)
	lossy(d.b)
	for _, side := range []string{"ours", "charon's"} {
		mark := len(d.charon.Output())
		ours := len(d.a.IKE.Output())
		if side == "ours" {
			d.a.Do("./ike up t")
		} else if r := d.b.Run("swanctl", "--initiate", "--child", "t", "--timeout", "60"); r.Code != 0 {
			t.Fatalf("%v", r)
		}
		d.pings(side)
		// The hybrid offer once more, with KE payloads of the suite in use.
		d.a.Do("./ike rekey t")
		d.pings(side + ", rekeyed")
		log := d.charon.Output()[mark:]
		want := []string{"using PPK for PPK_ID", "CREATE_CHILD_SA", "/CURVE_25519",
			"reassembled fragmented IKE message", "splitting IKE message"} // which a KE payload of MODP 4096 needs
		for _, w := range want {
			if !strings.Contains(log, w) {
				t.Errorf("%s: charon does not say %q:\n%s", side, w, log)
			}
		}
		for _, no := range []string{"INVAL_KE", "NO_PROP", "N(NO_PPK)"} {
			if strings.Contains(log, no) {
				t.Errorf("%s: charon says %q:\n%s", side, no, log)
			}
		}
		if log := d.a.IKE.Output()[ours:]; !strings.Contains(log, `"ppk": true`) || strings.Contains(log, "ml-kem") {
			t.Errorf("%s: want a PPK and no ML-KEM:\n%s", side, log)
		}
		d.b.Must("swanctl", "--terminate", "--ike", "t", "--timeout", "60")
		lab.Until(t, 30*time.Second, "no SAs", func() (bool, string) { l := d.a.SAs(); return len(l) == 0, fmt.Sprint(l) })
	}
}

// What is not in our default offer and charon has, each asked for by us, and by
// charon when it rekeys: AES-CTR, the long MODP groups, x448 and ECP 521,
// Brainpool, AES-XCBC, and SHA-1 and triple DES for old peers.
func TestInteropMoreSuites(t *testing.T) {
	d := newDuo(t, "")
	suites := []struct{ charon, xform string }{
		{"aes128ctr-sha256-modp6144", "encr_alg aes-ctr(128) auth_alg sha256 dh_group 17"},
		{"aes256ctr-sha384-x448", "encr_alg aes-ctr(256) auth_alg sha384 dh_group x448"},
		{"aes256-sha512-modp8192", "encr_alg aes(256) auth_alg sha512 dh_group modp8192"},
		{"aes128-sha1-prfsha1-ecp521", "encr_alg aes(128) auth_alg sha1 dh_group 21"},
		{"3des-sha1-modp2048", "encr_alg 3des auth_alg sha1 dh_group 14"},
		{"3des-sha256-ecp256bp", "encr_alg 3des auth_alg sha256 dh_group brainpoolp256r1"},
		{"aes128-aesxcbc-prfaesxcbc-ecp384bp", "encr_alg aes(128) auth_alg aes-xcbc dh_group 29"},
		{"aes256gcm16-prfaesxcbc-ecp512bp", "encr_alg aes-gcm(256) prf aes-xcbc dh_group 30"},
		{"aes256gcm8-prfsha512-ecp224bp", "encr_alg aes-gcm-8(256) prf sha512 dh_group 27"},
	}
	var xforms strings.Builder
	for _, s := range suites {
		fmt.Fprintf(&xforms, "ikesa_xform { %s }\n", s.xform)
	}
	d.rule(xforms.String())
	for i, suite := range suites {
		t.Run(suite.charon, func(t *testing.T) {
			d.t = t
			d.peer("proposals = "+suite.charon, "esp_proposals = aes256gcm16")
			if i%2 == 1 {
				d.up()
			}
			d.pings("at first")
			if r := d.b.Run("swanctl", "--rekey", "--ike", "t"); r.Code != 0 {
				t.Fatalf("%v", r)
			}
			d.pings("rekeyed by charon")
			d.a.Do("./ike rekey t")
			d.pings("rekeyed by us")
			d.down()
		})
	}
}
