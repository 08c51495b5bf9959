package ikeconf

import (
	"fmt"
	"strings"
)

// where says in which blocks a keyword may stand, and whether it may be
// repeated there.
type where uint8

const (
	inTop where = 1 << iota
	inRule
	inXform
	inP1 // in p1_xform only
	inPool
	many // accumulates

	tr = inTop | inRule
)

// form is how a value is read.
type form uint8

const (
	flag form = iota
	text
	choice
	number
	seconds // with units; param.num counts milliseconds
	size
	replay
	address // range, prefix …; param.addr
	ip
	host
	addrOrHost
	addrOrChoice
	numberOrChoice
	identity
	idType
	dnText
	url
	file
	auth
	ciphers
	integs
	groups
	groupsOrNone
	pfs
	poolUse
)

// spec is what a value must be: its form, limits and the words of a choice.
type spec struct {
	form   form
	lo, hi int64
	words  []string
	want   string
	list   bool // of choices: several may be given
	parts  int  // of addresses, see below
}

// What an address may be besides a range or a prefix.
const (
	oneAddr = 1 << iota
	anyAddr
	hostName
	noRange // a prefix only
)

func oneOf(words ...string) spec { return spec{form: choice, words: words, want: or(words)} }
func someOf(words ...string) spec {
	s := oneOf(words...)
	s.list = true
	return s
}
func num(lo, hi int64) spec {
	return spec{form: number, lo: lo, hi: hi, want: fmt.Sprintf("a number from %d to %d", lo, hi)}
}
func secs(lo, hi int64) spec {
	return spec{form: seconds, lo: lo * 1000, hi: hi * 1000, want: fmt.Sprintf("a time from %d to %d seconds", lo, hi)}
}

// tenths is a time with one decimal place allowed.
func tenths(lo, hi int64) spec {
	return spec{form: seconds, lo: lo * 100, hi: hi * 100, list: true,
		want: fmt.Sprintf("a time from %s to %s seconds", decimal(lo), decimal(hi))}
}
func decimal(tenths int64) string {
	if tenths%10 == 0 {
		return fmt.Sprint(tenths / 10)
	}
	return fmt.Sprintf("%d.%d", tenths/10, tenths%10)
}
func name(hi int64) spec {
	return spec{form: text, lo: 1, hi: hi, want: fmt.Sprintf("a name of 1 to %d characters", hi)}
}
func addrs(want string, parts int) spec { return spec{form: address, want: want, parts: parts} }
func of(f form, want string) spec       { return spec{form: f, want: want} }

var (
	yesNo   = oneOf("yes", "no")
	method  = spec{form: auth, words: methods, want: or(methods)}
	methods = []string{"preshared", "cert", "rsa_sig", "ecdsa_sig", "eddsa_sig", "pubkey", "eap", "xauth"}
	aFile   = of(file, "a file name")
	aURL    = of(url, "an http URL")
	aPort   = spec{form: number, lo: 1, hi: 65535, want: "a port from 1 to 65535"}
	life    = secs(10, 604800)
	octets  = of(size, "0 or a size from 64k")
	kb      = spec{form: number, hi: 0xffffffff, want: "a number from 0 to 0xffffffff"}
	nonce   = num(16, 256)
	group   = of(groups, "a group such as 14, ecp256 or x25519")
	hash    = of(integs, "aes-cmac, aes-xcbc, md5, sha1, sha256, sha384 or sha512")
	methodK = of(groupsOrNone, "a key exchange method such as ml_kem_768, or none")
)

// keyword is one row of the language.
type keyword struct {
	name  string
	where where
	spec  spec
	// def is the value in force without any, in our own syntax; empty where the
	// text of the reference or another parameter decides.
	def string
	// slot is the parameter that this is another word for; empty: its own.
	slot string
}

// key is under what a parameter is found, whichever word was written.
func (k *keyword) key() string {
	if k.slot != "" {
		return k.slot
	}
	return k.name
}

var table = []keyword{
	// Who.
	{"label", inRule, name(64), "", ""},
	{"local_addr", inRule | many, addrs("an address, prefix, range or any", oneAddr|anyAddr), "", ""},
	{"remote_addr", inRule | many, addrs("an address, prefix, range, host name or any", oneAddr|anyAddr|hostName), "", ""},
	{"local_id", tr, of(identity, "an identity"), "", ""},
	{"remote_id", inRule | many, of(identity, "an identity or ANY"), "", ""},
	{"local_id_type", tr, of(idType, "an identity type such as ip, fqdn, mbox or dn"), "", ""},
	{"ike_version", tr, oneOf("1", "2", "any"), "", ""},
	{"exchange_mode", tr, oneOf("main", "aggressive"), "main", ""},
	{"start_action", tr, oneOf("none", "trap", "start"), "trap", ""},
	{"immediate", inRule, of(flag, "start"), "", "start_action"},
	{"remote_port", inRule, aPort, "500", ""},
	{"child_addr", inRule | many, addrs("an address, prefix, range or any", oneAddr|anyAddr), "", ""},

	// Authentication.
	{"auth_method", tr | inP1, method, "", ""},
	{"local_auth_method", tr, method, "", ""},
	{"remote_auth_method", tr, method, "", ""},
	{"cert_file", tr, aFile, "", ""},
	{"key_file", tr, aFile, "", ""},
	{"ca_file", tr | many, aFile, "", ""},
	{"peer_cert_file", inRule | many, aFile, "", ""},
	{"peer_pubkey_file", inRule | many, aFile, "", ""},
	{"required_issuer", tr | many, of(dnText, "a distinguished name"), "", ""},
	{"sig_hash", tr, someOf("identity", "sha1", "sha256", "sha384", "sha512"), "sha256, sha384, sha512, identity", ""},
	{"rsa_pss", tr, oneOf("no", "prefer", "require"), "prefer", ""},
	{"send_cert", tr, oneOf("always", "ifasked", "never"), "ifasked", ""},
	{"send_certreq", tr, yesNo, "yes", ""},
	{"request_http_certs", tr, yesNo, "no", ""},
	{"cert_url", inRule, aURL, "", ""},
	{"revocation", tr, oneOf("none", "relaxed", "ifuri", "strict"), "relaxed", ""},
	{"crl_file", tr | many, aFile, "", ""},
	{"fetch", tr, yesNo, "no", ""},
	{"ocsp_url", tr, aURL, "", ""},
	{"ocsp_in_ike", tr, oneOf("none", "request", "reply", "both"), "none", ""},
	{"ignore_crls", inTop, of(flag, "none"), "", "revocation"},
	{"use_http", inTop, of(flag, "yes"), "", "fetch"},
	{"fetch_timeout_secs", inTop, secs(1, 60), "5", ""},
	{"proxy", inTop, aURL, "", ""},

	// EAP, XAUTH, configuration payload.
	{"eap_method", tr, someOf("gtc", "md5", "mschapv2", "tls", "ttls"), "mschapv2", ""},
	{"eap_inner", tr, oneOf("gtc", "md5", "mschapv2", "pap"), "mschapv2", ""},
	{"eap_id", inRule, name(253), "", ""},
	{"remote_eap_id", inRule | many, spec{form: text, lo: 1, hi: 253, want: "a name or pattern"}, "", ""},
	{"eap_server_name", inRule, of(host, "a host name"), "", ""},
	{"eap_only", tr, yesNo, "no", ""},
	{"xauth_id", inRule, name(253), "", ""},
	{"request_addr", inRule, spec{form: addrOrChoice, words: []string{"no", "ipv4", "ipv6", "both"}, want: "no, ipv4, ipv6, both or an address"}, "no", ""},
	{"request_dns", inRule, yesNo, "yes", ""},
	{"pool", inRule | many, of(poolUse, "a pool name"), "", ""},
	{"mode_cfg", tr, oneOf("pull", "push"), "pull", ""},
	{"hook", tr, aFile, "", ""},
	{"dns_file", tr, aFile, "", ""},
	{"addr", inPool | many, addrs("a prefix or range", 0), "", ""},
	{"dns", inPool | many, of(ip, "an address"), "", ""},
	{"domain", inPool | many, of(host, "a host name"), "", ""},
	{"subnet", inPool | many, addrs("a prefix", noRange), "", ""},

	// Transport and timers.
	{"ike_port", inTop, aPort, "500", ""},
	{"natt_port", inTop, aPort, "4500", ""},
	{"nat_traversal", tr, oneOf("auto", "force", "no"), "auto", ""},
	{"nat_keepalive_secs", tr, secs(0, 3600), "20", ""},
	{"mobike", tr, yesNo, "yes", ""},
	{"mobike_check", tr, yesNo, "yes", ""},
	{"fragmentation", tr, yesNo, "yes", ""},
	{"fragment_size", tr, num(576, 65535), "1280", ""},
	{"retry_limit", tr, num(0, 30), "8", ""},
	{"retry_timer_init", tr, tenths(1, 300), "1", ""},
	{"retry_timer_max", tr, tenths(1, 3000), "30", ""},
	{"expire_timer", inTop, secs(5, 600), "60", ""},
	{"dpd_secs", tr, secs(0, 86400), "60", ""},
	{"dpd_action", tr, oneOf("clear", "restart"), "", ""},
	{"cookie_threshold", inTop, num(0, 100000), "32", ""},
	{"half_open_limit", inTop, num(1, 1000000), "1024", ""},
	{"half_open_per_source", inTop, num(1, 10000), "16", ""},
	{"follow_redirect", tr, yesNo, "no", ""},
	{"redirect_to", inRule, of(addrOrHost, "an address or host name"), "", ""},

	// Lifetimes, children, the rest.
	{"ikesa_lifetime_secs", tr | inXform, life, "14400", ""},
	{"ikesa_softlife_secs", tr, life, "", ""},
	{"childsa_lifetime_secs", tr, life, "3600", ""},
	{"childsa_softlife_secs", tr, life, "", ""},
	{"childsa_idletime_secs", tr, secs(0, 604800), "0", ""},
	{"childsa_lifetime_bytes", tr, octets, "0", ""},
	{"childsa_softlife_bytes", tr, octets, "", ""},
	{"childsa_lifetime_kb", tr, kb, "", "childsa_lifetime_bytes"},
	{"childsa_softlife_kb", tr, kb, "", "childsa_softlife_bytes"},
	{"rekey_fuzz", tr, num(0, 50), "5", ""},
	{"reauth_secs", tr, secs(0, 2592000), "0", ""},
	{"reauth_mode", tr, oneOf("break_before_make", "make_before_break"), "make_before_break", ""},
	{"childsa_pfs", tr, of(pfs, "0, ike or a group such as 14"), "ike, 0", ""},
	{"childsa_additional_ke", tr, methodK, "none", ""},
	{"childsa_esn", tr, oneOf("no", "prefer", "require"), "prefer", ""},
	{"childsa_aggfrag", tr, oneOf("no", "prefer", "require"), "no", ""},
	{"childsa_tfc", tr, spec{form: numberOrChoice, lo: 64, hi: 65000, words: []string{"no", "mtu"}, want: "no, mtu or a number from 64 to 65000"}, "no", ""},
	{"childsa_ipcomp", tr, oneOf("no", "deflate"), "no", ""},
	{"childsa_per_queue", tr, oneOf("no", "prefer", "require"), "prefer", ""},
	{"childsa_limit", tr, num(1, 1000000), "4096", ""},
	{"childsa_replay", tr, of(replay, "0 or a number from 32 to 65536"), "1024", ""},
	{"ppk", tr, oneOf("no", "prefer", "require"), "", ""},
	{"ppk_id", tr, name(253), "", ""},
	{"initial_contact", tr, yesNo, "yes", ""},
	{"unique_ids", tr, oneOf("keep", "never", "no", "replace"), "no", ""},
	{"childless", tr, oneOf("allow", "force", "no"), "allow", ""},
	{"allow_weak", tr, yesNo, "no", ""},
	{"nonce_len", inTop, nonce, "32", ""},
	{"secrets_file", inTop, aFile, "", ""},
	{"log_level", inTop, oneOf("debug", "error", "info", "warn"), "info", ""},

	// Inside an xform.
	{"encr_alg", inXform, of(ciphers, "3des, aes, aes-ccm, aes-ctr, aes-gcm, blowfish, chacha20-poly1305 or des"), "", ""},
	{"auth_alg", inXform, hash, "", ""},
	{"prf", inXform, hash, "", ""},
	{"dh_group", inXform, group, "31, 19, 20, 14, 15, 16", ""},
	{"additional_ke", inXform | many, methodK, "", ""},

	// Older words with a row of their own: those of several that may stand
	// together, since the largest counts.
	{"ikesa_nonce_len", inTop, nonce, "", "nonce_len"},
	{"childsa_nonce_len", inTop, nonce, "", "nonce_len"},
	{"p1_nonce_len", inTop, nonce, "", "nonce_len"},
	{"p2_nonce_len", inTop, nonce, "", "nonce_len"},
}

// aliases are other words for a row; every childsa_X is p2_X too.
var aliases = map[string]string{
	"p1_lifetime_secs": "ikesa_lifetime_secs",
	"p1_hardlife_secs": "ikesa_lifetime_secs",
	"p1_softlife_secs": "ikesa_softlife_secs",
	"oakley_group":     "dh_group",
}

// Words of Solaris that are known but not honoured.
var (
	ignored  = []string{"ldap_server", "socks", "pkcs11_path"}
	keyStore = map[string]string{"cert_root": "ca_file", "cert_trust": "peer_cert_file"}
)

// blocks are the words that open one.
var blocks = []string{"rule", "ikesa_xform", "p1_xform"}

// refused are methods that are known by name only.
var refused = map[string][]string{
	"auth_method": {"rsa_encrypt", "dss_sig"},
	"eap_method":  {"aka", "sim", "psk", "srp", "leap", "peap"},
}

// keywords finds the row of every word of the language; nil rows are words
// without a value of their own. known lists the words.
var keywords, known = func() (map[string]*keyword, []string) {
	m := map[string]*keyword{}
	var known []string
	put := func(w string, k *keyword) {
		if _, ok := m[w]; !ok {
			m[w] = k
			known = append(known, w)
		}
	}
	for i := range table {
		put(table[i].name, &table[i])
	}
	for i := range table {
		if x, ok := strings.CutPrefix(table[i].name, "childsa_"); ok {
			put("p2_"+x, &table[i])
		}
	}
	for a, k := range aliases {
		put(a, m[k])
	}
	for _, w := range append(append([]string{"cert_root", "cert_trust"}, ignored...), blocks...) {
		put(w, nil)
	}
	return m, known
}()

// place names where a keyword belongs, for messages.
func (w where) place() string {
	switch {
	case w&inTop != 0 && w&inRule == 0:
		return "at the top level"
	case w&inRule != 0:
		return "in a rule"
	case w&(inXform|inP1) != 0:
		return "in ikesa_xform"
	}
	return "in a pool"
}
