package ikeconf

import "testing"

// TestMore: messages that the acceptance list does not show.
func TestMore(t *testing.T) {
	const ok = `{ label "a" auth_method preshared remote_addr 10.0.0.2 `
	for _, c := range []acceptCase{
		{"reject", "misspelt block, its inside still checked", `rul "a" { auth_methd preshared }`,
			[]string{`1:1: unknown keyword "rul"; did you mean "rule"?`, `1:11: unknown keyword "auth_methd"; did you mean "auth_method"?`}},
		{"reject", "unknown block passed over", `frobnicate { x { y } z } } `, []string{`1:1: unknown keyword "frobnicate"`, `1:26: unexpected "}"`}},
		{"reject", "rule in a rule", ok + `rule "b" { x } }`, []string{`1:56: rule belongs at the top level`}},
		{"reject", "xform in an xform", `ikesa_xform { encr_alg gcm ikesa_xform { y } }`, []string{`1:28: ikesa_xform belongs in a rule`}},
		{"reject", "method in ikesa_xform", `ikesa_xform { encr_alg gcm auth_method preshared }`, []string{`1:28: auth_method belongs in a rule`}},
		{"reject", "two labels", `rule "a" { label "b" auth_method preshared remote_addr any }`, []string{`1:12: label given twice; first at 1:6`}},
		{"reject", "empty label", `rule "" { auth_method preshared remote_addr any }`, []string{`1:6: label "": want a name of 1 to 64 characters`}},
		{"reject", "weak block that nobody uses", `ikesa_xform { encr_alg des auth_alg sha256 }`, []string{`1:24: encr_alg "des": weak; needs allow_weak yes`}},
		{"accept", "weak block for a rule that allows it", `ikesa_xform { encr_alg des auth_alg sha256 }` + ok + `allow_weak yes }`, nil},
		{"reject", "weak block for one that does not, once", `ikesa_xform { encr_alg des auth_alg sha256 }` + ok + `allow_weak yes } rule "b" { remote_addr any auth_method preshared } rule "c" { remote_addr any auth_method preshared }`,
			[]string{`1:24: encr_alg "des": weak; needs allow_weak yes`}},
		{"reject", "weak block for IKEv1 of version any", ok + `ike_version any p1_xform { encr_alg des auth_alg sha256 } }`, []string{`1:92: encr_alg "des": weak; needs allow_weak yes`}},
		{"reject", "own AEAD in IKEv1", ok + `ike_version 1 ikesa_xform { encr_alg gcm } }`, []string{`1:1: rule "a": gcm needs IKEv2`}},
		{"reject", "two pools of a family", "pool \"p\" { addr 10.0.0.0/24 } pool \"q\" { addr 10.0.1.0/24 }\n{ label \"a\" auth_method preshared remote_addr any pool \"p\" pool \"q\" }", []string{`2:65: pool "q": of the family of pool "p", which the rule has`}},
		{"reject", "pool used twice", "pool \"p\" { addr 10.0.0.0/24 }\npool \"p\" { addr 10.0.1.0/24 }", []string{`2:6: pool "p" used twice; first at 1:6`}},
		{"reject", "soft life inherited", "childsa_softlife_secs 2h\n" + ok + "childsa_lifetime_secs 1h }", []string{`1:1: childsa_softlife_secs 7200: above childsa_lifetime_secs 3600`}},
		{"reject", "soft kilobytes", "childsa_softlife_kb 1000 childsa_lifetime_kb 900" + ok + "}", []string{`1:1: childsa_softlife_kb 1000: above childsa_lifetime_kb 900`}},
		{"reject", "issuer as identity", ok + `remote_id "ISSUER=C=US" }`, []string{`1:66: remote_id "ISSUER=C=US": use required_issuer`}},
		{"reject", "noncontiguous mask", ok + `local_addr 10.0.0.0/255.0.255.0 }`, []string{`1:67: local_addr "10.0.0.0/255.0.255.0": want an address, prefix, range or any`}},
		{"reject", "address as host name", `{ label "a" auth_method preshared remote_addr 10.0.0.300 }`, []string{`1:47: remote_addr "10.0.0.300": want an address, prefix, range, host name or any`}},
		{"reject", "mistyped address as identity", ok + `remote_id 10.0.0.300 }`, []string{`1:66: remote_id "10.0.0.300": want an identity or ANY`}},
		{"reject", "key length not closed", `ikesa_xform { encr_alg aes(128 auth_alg sha256 }`, []string{`1:32: encr_alg "aes(128": want ")"`}},
		{"reject", "list ends in a comma", `childsa_pfs 14, }`, []string{`1:1: childsa_pfs: value missing`, `1:17: unexpected "}"`}},
		{"reject", "control character outside strings", "a\x01", []string{`1:2: control character`}},
		{"reject", "not UTF-8", "a \"\xff\"", []string{`1:3: string is not UTF-8`}},
		{"accept", "continued line, CR LF", "{ label \"a\" \\\r\n auth_method \\\n preshared remote_addr 10.0.0.2 }", nil},
		{"warn", "group that cannot be fragmented", `ikesa_xform { encr_alg gcm dh_group ml_kem_1024 }`, []string{`1:37: warning: dh_group "ml_kem_1024": IKE_SA_INIT cannot be fragmented`}},
		{"warn", "not hidden by a rule that only answers", ok + "start_action none }\nrule \"b\" { auth_method preshared remote_addr 10.0.0.2 }", nil},
		{"warn", "not hidden by other identities", ok + "remote_id x }\nrule \"b\" { auth_method preshared remote_addr 10.0.0.2 }", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, ds := Parse(files(c.in, keysFor(c.in)), "ike.conf", "ike.secrets", "")
			c.compare(t, ds)
		})
	}
}
