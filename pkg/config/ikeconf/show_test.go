package ikeconf

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// What Show prints means the same as what was read, and prints as itself.
func TestShow(t *testing.T) {
	secrets := `{ label "a" key "correct horse battery" } { label "b" key "correct horse battery" }`
	for _, in := range []string{
		`rule "a" { auth_method preshared remote_addr 10.0.0.2 } rule "b" { auth_method preshared remote_addr any }`,
		`use_http p2_lifetime_secs 1h nonce_len 16 p1_nonce_len 64 cookie_threshold 0 dpd_secs 5m childsa_pfs 14, ike, 0 log_level debug
		 ikesa_xform { encr_alg aes(128..256), aes-ctr auth_alg sha256 prf sha384 dh_group ecp256, 31 additional_ke ml_kem_768, none ikesa_lifetime_secs 30m }
		 rule "a" { auth_method preshared remote_addr 10.0.0.0/8 remote_addr 10.0.0.1-10.0.0.9 remote_addr vpn.example.com
			remote_id ! FQDN = *.example.com remote_id a@b.example remote_id IP = 10.0.0.0/8 remote_id KEYID = 0x6869 remote_id "C=US, O=a\"b"
			local_id "x.example.com" childsa_lifetime_kb 100000 retry_timer_init 0.5 immediate reauth_secs 1d childless no }
		 rule "b" { auth_method preshared remote_addr 2001:db8::/32 remote_id ANY unique_ids keep
			ikesa_xform { encr_alg aes-gcm-8(256) } p1_xform { encr_alg aes auth_alg sha256 dh_group 14 } }
		 pool "p" { addr 10.7.0.0/16 dns 10.7.0.1 domain "example.com" subnet 10.0.0.0/8 }`,
	} {
		parsed := func(text string) *Config {
			t.Helper()
			c, ds := Parse(files(text, secrets), "ike.conf", "ike.secrets", "")
			if c == nil {
				t.Fatalf("%v\n%s", ds, text)
			}
			return c
		}
		c := parsed(in)
		out := c.Show()
		d := parsed(out)
		if got := d.Show(); got != out {
			t.Errorf("prints as\n%s\nthen as\n%s", out, got)
		}
		local := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
		if got, want := d.Rules(local), c.Rules(local); !reflect.DeepEqual(got, want) {
			t.Errorf("means %+v, want %+v\n%s", got[0], want[0], out)
		}
		if d.IKEPort != c.IKEPort || d.CookieThreshold != c.CookieThreshold || d.LogLevel != c.LogLevel {
			t.Errorf("got %+v", d)
		}
		if strings.Contains(out, "horse") {
			t.Errorf("shows a secret:\n%s", out)
		}
		if !strings.Contains(out, "    dpd_action") && !strings.Contains(out, "    mobike yes\n") {
			t.Errorf("defaults are missing:\n%s", out)
		}
	}
}

func TestHookPath(t *testing.T) {
	_, ds := Parse(files(`{ label "a" auth_method preshared remote_addr any hook "bin/up" }`, `{ label "a" key "correct horse battery" }`), "ike.conf", "ike.secrets", "")
	if len(ds) == 0 || !strings.HasSuffix(ds[0].String(), `1:56: hook "bin/up": want an absolute path`) {
		t.Errorf("got %v", ds)
	}
}
