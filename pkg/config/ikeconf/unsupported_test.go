package ikeconf

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestUnsupported(t *testing.T) {
	const secrets = someKey + ` { user "u" password "p" }`
	for _, tt := range []struct{ in, want string }{
		{`{ label "a" auth_method preshared remote_addr any }`, ""},
		{"{ label \"a\" remote_addr any auth_method cert cert_file c\nkey_file k ca_file a remote_id ANY }", ""},
		{`{ label "a" remote_addr any auth_method cert cert_file c key_file k ca_file a remote_id ANY fetch yes ocsp_in_ike both request_http_certs yes
		  cert_url "http://x" ocsp_url "http://x" }`, "1:93: fetch: not implemented\n1:103: ocsp_in_ike: not implemented\n1:120: request_http_certs: not implemented\n" +
			"2:5: cert_url: not implemented\n2:25: ocsp_url: not implemented"},
		{`{ label "a" remote_addr any auth_method pubkey key_file k peer_pubkey_file p }`,
			"1:41: authentication by pubkey is not implemented"},
		{`fetch yes { label "a" auth_method preshared remote_addr any }`, "1:1: warning: fetch: not implemented; no effect"},
		{`auth_method preshared { label "a" remote_addr any local_auth_method eap }`,
			"1:69: authentication by eap is not implemented"},
		{`{ label "a" remote_addr any local_auth_method preshared remote_auth_method preshared then eap }`,
			"1:91: authentication by eap is not implemented"},
		{`{ label "a" ike_version 1 auth_method preshared remote_addr any }`,
			`1:1: rule "a": IKEv1 is not implemented`},
		{`{ label "a" ike_version any auth_method preshared remote_addr any }`,
			`1:1: warning: rule "a": IKEv1 is not implemented; only IKEv2 is spoken`},
		{`{ label "a" auth_method preshared remote_addr any child_addr 10.0.0.0/8 childsa_additional_ke 35 }`,
			"1:95: childsa_additional_ke \"35\": not implemented"},
		{`{ label "a" auth_method preshared remote_addr any childsa_additional_ke 36, 35 }`,
			`1:77: warning: childsa_additional_ke "35": not implemented; not offered`},
		{`{ label "a" auth_method preshared remote_addr any ppk no mobike no fragmentation yes reauth_secs 0 }`, ""},
		{`reauth_secs 1h { label "a" auth_method preshared remote_addr any reauth_secs 0s hook "/usr/libexec/up" }`, ""},
		{`follow_redirect yes { label "a" auth_method preshared remote_addr any redirect_to 10.0.0.1 }`, "1:1: follow_redirect: not implemented\n1:71: redirect_to: not implemented"},
		{`exchange_mode aggressive { label "a" auth_method preshared remote_addr any }`, ""},
		{`proxy "http://x" ca_file x { label "a" auth_method preshared remote_addr any }`,
			"1:1: warning: proxy: not implemented; no effect"},
		{`{ label "a" auth_method preshared remote_addr any local_id "C=US, CN=x" remote_id DN = "CN=*" }`, ""},
		{`{ label "a" auth_method preshared remote_addr any local_id_type fqdn }`,
			"1:65: local_id_type without local_id is not implemented"},
		{`pool "p" { addr 10.0.0.0/24 } { label "a" auth_method preshared remote_addr any }`,
			`1:1: warning: pool "p": no rule has it`},
		{`pool "p" { addr 10.0.0.0/24 } { label "a" auth_method preshared remote_addr any pool "p" }`,
			""},
		{`ikesa_xform { encr_alg aes-ccm, aes-gcm dh_group 31, 35 } { label "a" auth_method preshared remote_addr any }`,
			`1:54: warning: dh_group "35": not implemented; not offered`},
		{`ikesa_xform { encr_alg aes-gcm additional_ke 35 } ikesa_xform { encr_alg gcm } { label "a" auth_method preshared remote_addr any }`,
			"1:1: warning: ikesa_xform: not offered, for lack of what is not implemented\n1:46: warning: additional_ke \"35\": not implemented; not offered"},
		{`{ label "a" auth_method preshared remote_addr any ikesa_xform { encr_alg aes-gcm additional_ke 35 } }`,
			`1:1: rule "a": none of its xforms is implemented`},
		{`{ label "a" auth_method preshared remote_addr any childsa_pfs 35 }`,
			`1:63: childsa_pfs "35": not implemented`},
		{`{ label "a" auth_method preshared remote_addr any childsa_pfs 35, 0 }`,
			`1:63: warning: childsa_pfs "35": not implemented; not offered`},
	} {
		cfg := load(t, tt.in, secrets)
		var got []string
		ds := Unsupported(cfg)
		for _, d := range ds {
			got = append(got, strings.TrimPrefix(d.String(), "ike.conf:"))
		}
		if g := strings.Join(got, "\n"); g != tt.want {
			t.Errorf("%s\ngot  %s\nwant %s", tt.in, g, tt.want)
		}
		if lds := cfg.Load(allFiles(somePEM()), time.Now()); Failed(lds) {
			t.Errorf("%s\n%v", tt.in, lds)
		}
		if n := len(cfg.Rules(nil)); (n == 1) != !Failed(ds) {
			t.Errorf("%s\n%d rules beside %v", tt.in, n, ds)
		}
	}
}

// TestEveryKeyword: each parameter of a rule or of the top level is either used
// for the PAD, or Unsupported knows it. Who adds a keyword has to say which.
func TestEveryKeyword(t *testing.T) {
	used := map[string]bool{}
	for _, w := range strings.Fields(`cert_file key_file ca_file peer_cert_file required_issuer sig_hash rsa_pss send_cert send_certreq
		revocation ignore_crls crl_file label local_addr remote_addr local_id remote_id local_id_type ike_version start_action
		remote_port auth_method local_auth_method remote_auth_method ike_port natt_port nat_traversal nat_keepalive_secs mobike mobike_check
		retry_limit retry_timer_init retry_timer_max expire_timer dpd_secs dpd_action cookie_threshold half_open_limit
		half_open_per_source ikesa_lifetime_secs ikesa_softlife_secs childsa_lifetime_secs childsa_softlife_secs
		childsa_lifetime_bytes childsa_softlife_bytes rekey_fuzz childsa_pfs childsa_esn childsa_aggfrag childsa_tfc childsa_ipcomp childsa_per_queue childsa_limit childsa_replay initial_contact
		unique_ids allow_weak nonce_len fragmentation fragment_size ppk ppk_id childsa_additional_ke childless reauth_secs reauth_mode hook dns_file
		childsa_idletime_secs secrets_file log_level child_addr pool request_addr request_dns`) {
		used[w] = true
	}
	for _, k := range table {
		_, not := without[k.key()]
		if k.where&tr != 0 && used[k.key()] == not {
			t.Errorf("%s: used %v, listed as not implemented %v", k.name, used[k.key()], not)
		}
		if k.spec.want == "" {
			t.Errorf("%s: nothing wanted", k.name)
		}
	}
}

// TestLimits: hostile sizes cost a bounded number of messages and little time.
func TestLimits(t *testing.T) {
	for name, in := range map[string]string{
		"unknown":   strings.Repeat("remote_adr }", MaxFile/13),
		"braces":    strings.Repeat("{", MaxFile),
		"rules":     strings.Repeat("{label x}", MaxFile/10),
		"addresses": "{label a remote_addr 1" + strings.Repeat(" -", MaxFile/3),
		"list":      "childsa_pfs 0" + strings.Repeat(",q", MaxFile/3),
		"repeated":  strings.Repeat("ike_port 1 ", MaxFile/12),
	} {
		begin := time.Now()
		cfg, ds := Parse(files(in, "{}"), "ike.conf", "ike.secrets", "")
		t.Logf("%s: %v", name, time.Since(begin))
		if cfg != nil || len(ds) > 44 {
			t.Errorf("%s: %d messages", name, len(ds))
		}
		if name == "unknown" && !strings.Contains(fmt.Sprint(ds), "too many errors") {
			t.Errorf("%s: %v", name, ds)
		}
	}
}
