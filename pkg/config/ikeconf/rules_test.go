package ikeconf

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

const someKey = `{ label "a" key "0123456789abcdef" }`

// load parses what must be free of errors.
func load(t testing.TB, conf, secrets string) *Config {
	t.Helper()
	cfg, ds := Parse(files(conf, secrets), "ike.conf", "ike.secrets", "")
	if cfg == nil {
		t.Fatalf("%s\n%v", conf, ds)
	}
	return cfg
}

// one gives the only rule of a configuration, which must be supported.
func one(t testing.TB, conf, secrets string) *pad.Rule {
	t.Helper()
	cfg := load(t, conf, secrets)
	if ds := Unsupported(cfg); Failed(ds) {
		t.Fatalf("%s\n%v", conf, ds)
	}
	rs := cfg.Rules(nil)
	if len(rs) != 1 {
		t.Fatalf("%s\n%d rules", conf, len(rs))
	}
	if _, err := pad.NewDB(rs); err != nil {
		t.Fatalf("%s\n%v", conf, err)
	}
	return rs[0]
}

func psk(s string) pad.Keys {
	return pad.Keys{Local: ipsec.NewKey([]byte(s)), Remote: ipsec.NewKey([]byte(s))}
}

// TestDefaults: the table of keywords and pad.NewRule have the same defaults.
func TestDefaults(t *testing.T) {
	got := one(t, `rule "a" { auth_method preshared remote_addr 10.0.0.2 }`, someKey)
	want := pad.NewRule("a")
	want.Remote = []pad.Range{pad.One(netip.MustParseAddr("10.0.0.2"))}
	want.PSK = psk("0123456789abcdef")
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestRules(t *testing.T) {
	ip := netip.MustParseAddr
	fqdn := func(s string) pad.Pattern { return pad.Pattern{ID: pad.ID{Type: ikev2.IDFQDN, Data: s}} }
	prefix := func(s string) pad.Range { return pad.Prefix(netip.MustParsePrefix(s)) }
	for _, tt := range []struct {
		in   string // in the rule, or "top | rule"
		get  func(r *pad.Rule) any
		want any
	}{
		{"local_addr 10.0.0.1 local_addr any", func(r *pad.Rule) any { return r.Local }, append([]pad.Range{pad.One(ip("10.0.0.1"))}, pad.Any()...)},
		{"remote_addr Gw.Example.com", func(r *pad.Rule) any { return r.RemoteHosts }, []string{"gw.example.com"}},
		{"remote_addr 10.0.0.0/255.255.0.0", func(r *pad.Rule) any { return r.Remote[1] }, prefix("10.0.0.0/16")},
		{"remote_addr 10.0.0.7/16", func(r *pad.Rule) any { return r.Remote[1] }, prefix("10.0.0.0/16")},
		{"remote_addr ::ffff:10.0.0.7", func(r *pad.Rule) any { return r.Remote[1] }, pad.One(ip("10.0.0.7"))},
		{"remote_addr 10.0.0.1 - 10.0.0.9", func(r *pad.Rule) any { return r.Remote[1] }, pad.Range{From: ip("10.0.0.1"), To: ip("10.0.0.9")}},
		{"remote_port 4500", func(r *pad.Rule) any { return r.RemotePort }, uint16(4500)},
		{"local_id a.example", func(r *pad.Rule) any { return r.LocalID }, pad.ID{Type: ikev2.IDFQDN, Data: "a.example"}},
		{"local_id a@example", func(r *pad.Rule) any { return r.LocalID }, pad.ID{Type: ikev2.IDRFC822Addr, Data: "a@example"}},
		{"local_id 10.0.0.1", func(r *pad.Rule) any { return r.LocalID }, pad.AddrID(ip("10.0.0.1"))},
		{"local_id fe80::1", func(r *pad.Rule) any { return r.LocalID }, pad.AddrID(ip("fe80::1"))},
		{"local_id KEYID = 0x6869", func(r *pad.Rule) any { return r.LocalID }, pad.ID{Type: ikev2.IDKeyID, Data: "hi"}},
		{`local_id keyid "0x6869"`, func(r *pad.Rule) any { return r.LocalID }, pad.ID{Type: ikev2.IDKeyID, Data: "0x6869"}},
		{"local_id FQDN = 10.0.0.1", func(r *pad.Rule) any { return r.LocalID }, pad.ID{Type: ikev2.IDFQDN, Data: "10.0.0.1"}},
		{"local_id dns = x.example", func(r *pad.Rule) any { return r.LocalID }, pad.ID{Type: ikev2.IDFQDN, Data: "x.example"}},
		{"local_id IP = ::1 | local_id b.example", func(r *pad.Rule) any { return r.LocalID.Data }, "b.example"},
		{"remote_id *.example.com remote_id !x.example.com", func(r *pad.Rule) any { return r.RemoteIDs },
			pad.Patterns{fqdn("*.example.com"), {Not: true, ID: fqdn("x.example.com").ID}}},
		{"remote_id any", func(r *pad.Rule) any { return r.RemoteIDs }, pad.Patterns{pad.AnyID}},
		{`remote_id "!DNS=x.example"`, func(r *pad.Rule) any { return r.RemoteIDs[0] }, pad.Pattern{Not: true, ID: fqdn("x.example").ID}},
		{"remote_id IPV4_PREFIX = 10.0.0.0 / 8", func(r *pad.Rule) any { return r.RemoteIDs[0] }, pad.AddrPattern(prefix("10.0.0.0/8"))},
		{"ikesa_lifetime_secs 1h", func(r *pad.Rule) any { return r.IKE }, pad.Lifetime{Hard: time.Hour, Soft: 54 * time.Minute}},
		{"p1_lifetime_secs 1h p1_softlife_secs 1h", func(r *pad.Rule) any { return r.IKE }, pad.Lifetime{Hard: time.Hour, Soft: time.Hour}},
		{"ikesa_lifetime_secs 2h ikesa_xform { encr_alg gcm ikesa_lifetime_secs 1h }", func(r *pad.Rule) any { return r.IKE.Hard }, time.Hour},
		{"ikesa_lifetime_secs 2h ikesa_xform { encr_alg gcm ikesa_lifetime_secs 3h }", func(r *pad.Rule) any { return r.IKE.Hard }, 3 * time.Hour},
		{"childsa_lifetime_secs 600 | childsa_softlife_secs 500", func(r *pad.Rule) any { return []time.Duration{r.ChildHard.AddTime, r.ChildSoft.AddTime} }, []time.Duration{600 * time.Second, 500 * time.Second}},
		{"childsa_lifetime_bytes 1g", func(r *pad.Rule) any { return r.ChildHard.Bytes }, uint64(1 << 30)},
		{"p2_lifetime_kb 1000 p2_softlife_kb 900", func(r *pad.Rule) any { return r.ChildSoft.Bytes }, uint64(900 << 10)},
		{"childsa_pfs ike", func(r *pad.Rule) any { return r.PFS }, []alg.KE{proposal.KESame}},
		{"p2_pfs 14, x25519, 0", func(r *pad.Rule) any { return r.PFS }, []alg.KE{alg.KEMODP2048, alg.KEX25519, alg.KENone}},
		{"childsa_esn no", func(r *pad.Rule) any { return r.ESN }, proposal.ESNNo},
		{"childsa_aggfrag prefer", func(r *pad.Rule) any { return r.AggFrag }, pad.AggFragPrefer},
		{"dns_file \"/run/dns\"", func(r *pad.Rule) any { return r.DNSFile }, "/run/dns"},
		{"childsa_tfc mtu", func(r *pad.Rule) any { return r.TFC }, uint16(ipsec.TFCPathMTU)},
		{"p2_tfc 0x200", func(r *pad.Rule) any { return r.TFC }, uint16(512)},
		{"childsa_ipcomp deflate", func(r *pad.Rule) any { return r.IPComp }, true},
		{"childsa_ipcomp deflate | childsa_ipcomp no", func(r *pad.Rule) any { return r.IPComp }, false},
		{"childsa_tfc mtu | childsa_tfc no", func(r *pad.Rule) any { return r.TFC }, uint16(0)},
		{"childsa_esn no", func(r *pad.Rule) any { return r.PerQueue }, pad.PerQueuePrefer},
		{"childsa_per_queue no", func(r *pad.Rule) any { return r.PerQueue }, pad.PerQueueNo},
		{"p2_per_queue require", func(r *pad.Rule) any { return r.PerQueue }, pad.PerQueueRequire},
		{"p2_aggfrag require", func(r *pad.Rule) any { return r.AggFrag }, pad.AggFragRequire},
		{"childsa_esn no | childsa_aggfrag no", func(r *pad.Rule) any { return r.AggFrag }, pad.AggFragNo},
		{"childsa_replay 0", func(r *pad.Rule) any { return r.ReplayWindow }, uint32(0)},
		{"rekey_fuzz 0", func(r *pad.Rule) any { return r.ChildLimit }, 4096},
		{"childsa_limit 1", func(r *pad.Rule) any { return r.ChildLimit }, 1},
		{"rekey_fuzz 0", func(r *pad.Rule) any { return r.RekeyFuzz }, 0},
		{"retry_limit 3 retry_timer_init 0.5 retry_timer_max 0.1", func(r *pad.Rule) any { return r.Retransmit },
			pad.Retransmit{Limit: 3, Init: 500 * time.Millisecond, Max: 500 * time.Millisecond}},
		{"dpd_secs 0", func(r *pad.Rule) any { return r.DPD }, time.Duration(0)},
		{"immediate", func(r *pad.Rule) any { return []any{r.StartAction, r.DPDAction} }, []any{pad.StartNow, pad.DPDRestart}},
		{"start_action start dpd_action clear", func(r *pad.Rule) any { return r.DPDAction }, pad.DPDClear},
		{"start_action start | start_action none", func(r *pad.Rule) any { return r.StartAction }, pad.StartNone},
		{"nat_traversal force nat_keepalive_secs 5", func(r *pad.Rule) any { return []any{r.NATT, r.Keepalive} }, []any{pad.NATTForce, 5 * time.Second}},
		{"initial_contact no unique_ids replace", func(r *pad.Rule) any { return []any{r.InitialContact, r.UniqueIDs} }, []any{false, pad.UniqueReplace}},
		{"nonce_len 16 p1_nonce_len 64 |", func(r *pad.Rule) any { return r.NonceLen }, 64},
		{"ikesa_nonce_len 20 childsa_nonce_len 30 p2_nonce_len 40 |", func(r *pad.Rule) any { return r.NonceLen }, 40},
		{"ikesa_lifetime_secs 2h ikesa_softlife_secs 1h", func(r *pad.Rule) any { return r.IKE.Soft }, time.Hour},
		{"childsa_lifetime_bytes 2m childsa_softlife_bytes 1m", func(r *pad.Rule) any { return r.ChildSoft.Bytes }, uint64(1 << 20)},
		{"childsa_idletime_secs 5m", func(r *pad.Rule) any { return r.ChildIdle }, 5 * time.Minute},
		{"childsa_additional_ke ml_kem_768, none", func(r *pad.Rule) any { return r.ChildAddKE }, [][]alg.KE{{alg.KEMLKEM768, alg.KENone}}},
		{"reauth_secs 1h reauth_mode break_before_make", func(r *pad.Rule) any { return []any{r.Reauth, r.ReauthBreak} }, []any{time.Hour, true}},
		{"reauth_secs 1h", func(r *pad.Rule) any { return r.ReauthBreak }, false},
		{"mobike no", func(r *pad.Rule) any { return r.MOBIKE }, false},
		{"mobike_check no", func(r *pad.Rule) any { return []any{r.MOBIKE, r.MOBIKECheck} }, []any{true, false}},
		{"childless force", func(r *pad.Rule) any { return r.Childless }, pad.ChildlessForce},
		{"hook \"/usr/libexec/up\"", func(r *pad.Rule) any { return r.Hook }, "/usr/libexec/up"},
		{"ikesa_xform { encr_alg aes(128..192) auth_alg sha1, sha256 dh_group 20 }", func(r *pad.Rule) any { return r.Proposals }, []proposal.IKE{{
			Ciphers: []proposal.Cipher{{Encr: alg.EncrAESCBC, Bits: 192}, {Encr: alg.EncrAESCBC, Bits: 128}},
			Integ:   []alg.Integ{alg.IntegHMACSHA1, alg.IntegHMACSHA256},
			PRF:     []alg.PRF{alg.PRFHMACSHA1, alg.PRFHMACSHA256},
			KE:      []alg.KE{alg.KEECP384}}}},
		{"ikesa_xform { encr_alg aes-gcm-8, chacha20-poly1305 prf sha512 additional_ke ml_kem_768, none } |", func(r *pad.Rule) any { return r.Proposals }, []proposal.IKE{{
			Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM8, Bits: 256}, {Encr: alg.EncrAESGCM8, Bits: 192}, {Encr: alg.EncrAESGCM8, Bits: 128}, {Encr: alg.EncrChaCha20Poly1305, Bits: 256}},
			PRF:     []alg.PRF{alg.PRFHMACSHA512},
			KE:      []alg.KE{alg.KEX25519, alg.KEECP256, alg.KEECP384, alg.KEMODP2048, alg.KEMODP3072, alg.KEMODP4096},
			AddKE:   [][]alg.KE{{alg.KEMLKEM768, alg.KENone}}}}},
	} {
		top, in, both := strings.Cut(tt.in, "|")
		if !both {
			top, in = "", tt.in
		}
		r := one(t, top+` { label "a" auth_method preshared remote_addr 192.0.2.1 `+in+"}", someKey)
		if got := tt.get(r); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", tt.in, got, tt.want)
		}
	}
}

func TestLocal(t *testing.T) {
	cfg := load(t, `{ label "a" auth_method preshared remote_addr any } { label "b" auth_method preshared local_addr 10.0.0.1 remote_addr any }`,
		`{ label "a" label "b" key "0123456789abcdef" }`)
	me := netip.MustParseAddr("192.0.2.1")
	rs := cfg.Rules([]netip.Addr{me})
	if got, want := rs[0].Local, []pad.Range{pad.One(me)}; !reflect.DeepEqual(got, want) {
		t.Errorf("without local_addr: got %v, want %v", got, want)
	}
	if got, want := rs[1].Local[0].From.String(), "10.0.0.1"; got != want {
		t.Errorf("with local_addr: got %v, want %v", got, want)
	}
	// A rule's keys are its own.
	rs[0].PSK.Local.Wipe()
	if got := rs[1].PSK.Local.Bytes(); string(got) != "0123456789abcdef" {
		t.Errorf("key of the other rule: %q", got)
	}
	cfg.Wipe()
	if got := rs[1].PSK.Remote.Bytes(); string(got) != "0123456789abcdef" {
		t.Errorf("key after the Config's Wipe: %q", got)
	}
	if rs[0].Label != "a" || rs[1].Label != "b" {
		t.Errorf("labels %q, %q", rs[0].Label, rs[1].Label)
	}
}

func TestKeys(t *testing.T) {
	id := func(s string) pad.ID { return pad.ID{Type: ikev2.IDFQDN, Data: s} }
	const pairs = `
{ localidtype FQDN localid me.example remoteidtype FQDN remoteid *.peers.example local_key 0x6c6c remote_key 7272 }
{ localidtype IP localid 10.0.0.1 remoteidtype IP remoteid 10.0.0.2 key "ipip" }`
	conf := `{ label "a" auth_method preshared remote_addr any local_id me.example remote_id ANY }`
	r := one(t, conf, pairs)
	k, ok := r.Keys(id("me.example"), id("x.peers.example"))
	if !ok || string(k.Local.Bytes()) != "ll" || string(k.Remote.Bytes()) != "rr" {
		t.Errorf("pair: %q %q, %v", k.Local.Bytes(), k.Remote.Bytes(), ok)
	}
	if _, ok := r.Keys(id("me.example"), id("x.example")); ok {
		t.Error("a key for an identity outside the pattern")
	}
	if len(r.Pairs) != 1 {
		t.Errorf("%d pairs; the one of addresses cannot serve this rule", len(r.Pairs))
	}
	r = one(t, `{ label "a" auth_method preshared remote_addr any }`, pairs)
	if k, ok = r.Keys(pad.AddrID(netip.MustParseAddr("10.0.0.1")), pad.AddrID(netip.MustParseAddr("10.0.0.2"))); !ok || string(k.Local.Bytes()) != "ipip" {
		t.Errorf("pair of addresses: %q, %v", k.Local.Bytes(), ok)
	}
	// By label first.
	if r = one(t, conf, pairs+someKey); len(r.Pairs) != 0 || r.PSK.Local.Len() != 16 {
		t.Errorf("label beside pairs: %v, %d pairs", r.PSK.Local, len(r.Pairs))
	}
}

func TestGlobals(t *testing.T) {
	cfg := load(t, `ike_port 1500 natt_port 0x1f4 cookie_threshold 0 half_open_limit 9 half_open_per_source 3 expire_timer 2m log_level debug`, "")
	got := []any{cfg.IKEPort, cfg.NATTPort, cfg.CookieThreshold, cfg.HalfOpen, cfg.HalfOpenPerSource, cfg.Expire, cfg.LogLevel}
	want := []any{uint16(1500), uint16(500), 0, 9, 3, 2 * time.Minute, "debug"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestOverride(t *testing.T) {
	conf := `dpd_secs 10 childsa_lifetime_secs 1h { label "a" auth_method preshared remote_addr any childsa_lifetime_secs 2h }`
	cfg, ds := Parse(files(conf, someKey), "ike.conf", "ike.secrets", "dpd_secs 5m p2_lifetime_secs 100")
	if cfg == nil {
		t.Fatal(ds)
	}
	r := cfg.Rules(nil)[0]
	if r.DPD != 5*time.Minute || r.ChildHard.AddTime != 2*time.Hour {
		t.Errorf("DPD %v, life %v", r.DPD, r.ChildHard.AddTime)
	}
	for in, want := range map[string]string{
		"dpd_secs 5w":            `command line:1:10: dpd_secs "5w": want a time from 0 to 86400 seconds`,
		"ikesa_xform { encr_alg": `command line: want parameters of the top level`,
	} {
		if cfg, ds := Parse(files(conf, someKey), "ike.conf", "ike.secrets", in); cfg != nil || len(ds) == 0 || ds[0].String() != want {
			t.Errorf("%s: got %v, want %s", in, ds, want)
		}
	}
}

// Fragments, post-quantum pre-shared keys and additional key exchanges.
func TestPostQuantum(t *testing.T) {
	const k = "0x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	cfg := load(t, `fragment_size 600
ikesa_xform { encr_alg aes-gcm additional_ke ml_kem_768 additional_ke 37, none }
ikesa_xform { encr_alg aes-ccm-8(128) prf aes-cmac dh_group 36 }
{ label "a" auth_method preshared remote_addr 10.0.0.1 ppk_id "p" }
{ label "b" auth_method preshared remote_addr 10.0.0.2 ppk require fragmentation no }
{ label "c" auth_method preshared remote_addr 10.0.0.3 }`,
		someKey+` { label "b" label "c" key "sixteen octets !!" } { ppk_id "p" ppk `+k+` } { ppk_id "q" ppk `+k+` }`)
	rules := cfg.Rules(nil)
	if len(rules) != 3 {
		t.Fatalf("%d rules, %v", len(rules), Unsupported(cfg))
	}
	a, b, c := rules[0], rules[1], rules[2]
	if a.FragmentSize != 600 || b.FragmentSize != 0 {
		t.Errorf("fragments of %d and %d octets, want 600 and none", a.FragmentSize, b.FragmentSize)
	}
	if a.PPK != pad.PPKPrefer || a.PPKID != "p" || len(a.PPKs) != 1 || a.PPKs["p"].Len() != 32 {
		t.Errorf("a: PPK %v %q, %d keys; want prefer, p, 1", a.PPK, a.PPKID, len(a.PPKs))
	}
	if b.PPK != pad.PPKRequire || b.PPKID != "" || len(b.PPKs) != 2 || c.PPK != pad.PPKNo || len(c.PPKs) != 0 {
		t.Errorf("b: PPK %v, %d keys; c: %v, %d; want require, 2; no, 0", b.PPK, len(b.PPKs), c.PPK, len(c.PPKs))
	}
	want := [][]alg.KE{{alg.KEMLKEM768}, {alg.KEMLKEM1024, alg.KENone}}
	if got := a.Proposals[0].AddKE; !reflect.DeepEqual(got, want) {
		t.Errorf("additional key exchanges %v, want %v", got, want)
	}
	p := a.Proposals[1]
	if p.AddKE != nil || !reflect.DeepEqual(p.KE, []alg.KE{alg.KEMLKEM768}) || !reflect.DeepEqual(p.PRF, []alg.PRF{alg.PRFAESCMAC}) ||
		!reflect.DeepEqual(p.Ciphers, []proposal.Cipher{{Encr: alg.EncrAESCCM8, Bits: 128}}) {
		t.Errorf("second proposal %+v", p)
	}
}

func TestPPKMissing(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{`{ label "a" auth_method preshared remote_addr 10.0.0.1 ppk_id "p" }`, `1:63: ppk_id "p": not in ike.secrets`},
		{`{ label "a" auth_method preshared remote_addr 10.0.0.1 ppk require }`, `1:1: rule "a": no ppk in ike.secrets`},
		{`{ label "a" auth_method preshared remote_addr 10.0.0.1 ppk_id "p" ppk no }`, ""},
	} {
		_, ds := Parse(files(tt.in, someKey), "ike.conf", "ike.secrets", "")
		var got []string
		for _, d := range ds {
			got = append(got, strings.TrimPrefix(d.String(), "ike.conf:"))
		}
		if g := strings.Join(got, "\n"); g != tt.want {
			t.Errorf("%s\ngot  %s\nwant %s", tt.in, g, tt.want)
		}
	}
}

// TestPools: what a rule leases and asks for.
func TestPools(t *testing.T) {
	cfg := load(t, `pool "v4" { addr 10.9.0.0/24 addr 10.8.0.10-10.8.0.20 addr 10.7.0.0/31 dns 10.0.0.53 domain corp.example.com subnet 10.0.0.0/8 }
		pool "v6" { addr 2001:db8:9::/64 dns 2001:db8::53 }
		{ label "a" auth_method preshared remote_addr any pool "v4" pool "v6" child_addr 10.1.0.0/16 }
		{ label "b" auth_method preshared remote_addr 10.0.0.1 pool "v4" request_addr both request_dns no }
		{ label "c" auth_method preshared remote_addr 10.0.0.2 request_addr 10.9.0.5 }`, someKey+` { label "b" label "c" key "0123456789abcdef0" }`)
	a, prefix := netip.MustParseAddr, netip.MustParsePrefix
	v4 := &pad.Pool{
		Name: "v4", Addrs: []pad.Range{{From: a("10.9.0.1"), To: a("10.9.0.254")}, {From: a("10.8.0.10"), To: a("10.8.0.20")}, pad.Prefix(prefix("10.7.0.0/31"))},
		DNS: []netip.Addr{a("10.0.0.53")}, Domains: []string{"corp.example.com"}, Subnets: []netip.Prefix{prefix("10.0.0.0/8")},
	}
	v6 := &pad.Pool{Name: "v6", Addrs: []pad.Range{pad.Prefix(prefix("2001:db8:9::/64"))}, DNS: []netip.Addr{a("2001:db8::53")}}
	rs := cfg.Rules(nil)
	if len(rs) != 3 {
		t.Fatalf("%d rules", len(rs))
	}
	for i, want := range []struct {
		pools   []*pad.Pool
		child   []pad.Range
		request pad.Request
	}{
		{[]*pad.Pool{v4, v6}, []pad.Range{pad.Prefix(prefix("10.1.0.0/16"))}, pad.Request{}},
		{[]*pad.Pool{v4}, nil, pad.Request{V4: true, V6: true}},
		{nil, nil, pad.Request{V4: true, Addr: a("10.9.0.5"), DNS: true}},
	} {
		if r := rs[i]; !reflect.DeepEqual(r.Pools, want.pools) || !reflect.DeepEqual(r.ChildAddrs, want.child) || r.Request != want.request {
			t.Errorf("%s: pools %+v, child %v, request %+v", r.Label, r.Pools, r.ChildAddrs, r.Request)
		}
	}
	if rs[0].Pools[0] != rs[1].Pools[0] {
		t.Error("two rules have each their own of one pool")
	}
}
