package pad

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func fqdn(s string) ID { return ID{ikev2.IDFQDN, s} }
func mail(s string) ID { return ID{ikev2.IDRFC822Addr, s} }

func key() Keys {
	return Keys{ipsec.NewKey([]byte("correct horse battery")), ipsec.NewKey([]byte("correct horse battery"))}
}

func TestPatterns(t *testing.T) {
	ten := AddrPattern(Prefix(netip.MustParsePrefix("10.0.0.0/8")))
	sub := Pattern{ID: fqdn("*.Example.com")}
	not := func(p Pattern) Pattern { p.Not = true; return p }
	for _, tt := range []struct {
		name string
		ps   Patterns
		id   ID
		want bool
	}{
		{"any", Patterns{AnyID}, fqdn("x"), true},
		{"in the prefix", Patterns{ten}, AddrID(addr("10.255.255.255")), true},
		{"beside the prefix", Patterns{ten}, AddrID(addr("11.0.0.0")), false},
		{"IPv6 against IPv4", Patterns{ten}, AddrID(addr("::a00:1")), false},
		{"name against prefix", Patterns{ten}, fqdn("10.0.0.1"), false},
		{"below the domain", Patterns{sub}, fqdn("a.B.example.COM"), true},
		{"bare domain", Patterns{sub}, fqdn("example.com"), false},
		{"empty label", Patterns{sub}, fqdn(".example.com"), false},
		{"suffix of a label", Patterns{sub}, fqdn("badexample.com"), false},
		{"mailbox of the domain", Patterns{{ID: mail("*@example.com")}}, mail("a@example.com"), true},
		{"mailbox elsewhere", Patterns{{ID: mail("*@example.com")}}, mail("a@b@example.org"), false},
		{"no mailbox", Patterns{{ID: mail("*@example.com")}}, mail("@example.com"), false},
		{"exact name, case", Patterns{{ID: fqdn("a.example")}}, fqdn("A.EXAMPLE"), true},
		{"type differs", Patterns{{ID: fqdn("a@example")}}, mail("a@example"), false},
		{"key ID exact", Patterns{{ID: ID{ikev2.IDKeyID, "ab"}}}, ID{ikev2.IDKeyID, "AB"}, false},
		{"star elsewhere is literal", Patterns{{ID: fqdn("a*.example")}}, fqdn("ab.example"), false},
		{"only exclusions", Patterns{not(sub)}, fqdn("x"), true},
		{"excluded", Patterns{sub, not(Pattern{ID: fqdn("old.example.com")})}, fqdn("old.example.com"), false},
		{"not excluded", Patterns{not(Pattern{ID: fqdn("old.example.com")}), sub}, fqdn("new.example.com"), true},
		{"malformed address", Patterns{ten}, ID{ikev2.IDIPv4Addr, "abc"}, false},
	} {
		if got := tt.ps.Match(tt.id); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestExact(t *testing.T) {
	for _, tt := range []struct {
		p  Pattern
		ok bool
	}{
		{AnyID, false}, {Pattern{ID: fqdn("*.a")}, false}, {Pattern{ID: mail("*@a")}, false},
		{Pattern{Not: true, ID: fqdn("a")}, false}, {Pattern{ID: fqdn("a")}, true},
		{AddrPattern(One(addr("10.0.0.1"))), true}, {AddrPattern(Range{addr("10.0.0.1"), addr("10.0.0.2")}), false},
	} {
		if id, ok := tt.p.Exact(); ok != tt.ok {
			t.Errorf("%+v: got %v, %v; want %v", tt.p, id, ok, tt.ok)
		}
	}
}

func TestRanges(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"10.1.2.3/8", "10.0.0.0-10.255.255.255"}, {"10.1.2.3/32", "10.1.2.3"}, {"0.0.0.0/0", "0.0.0.0-255.255.255.255"},
		{"2001:db8::/33", "2001:db8::-2001:db8:7fff:ffff:ffff:ffff:ffff:ffff"},
	} {
		if got := Prefix(netip.MustParsePrefix(tt.in)).String(); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.in, got, tt.want)
		}
	}
	for _, a := range []string{"0.0.0.0", "255.255.255.255", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"} {
		if !contains(Any(), addr(a)) {
			t.Errorf("any does not hold %s", a)
		}
	}
	for _, tt := range []struct {
		r    Range
		a    string
		want bool
	}{
		{One(addr("fe80::2")), "fe80::2%eth0", true}, // as a socket gives it
		{One(addr("fe80::2")), "fe80::3%eth0", false},
		{Prefix(netip.MustParsePrefix("fe80::/10")), "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff%eth0", true},
		{One(addr("fe80::1%eth0")), "fe80::1%eth0", true},
		{One(addr("fe80::1%eth0")), "fe80::1%eth1", false},
	} {
		if got := tt.r.Contains(addr(tt.a)); got != tt.want {
			t.Errorf("%v holds %s: %v", tt.r, tt.a, got)
		}
	}
}

func rules(t *testing.T) *DB {
	t.Helper()
	hub := NewRule("hub")
	hub.Remote, hub.PSK, hub.StartAction = []Range{One(addr("192.0.2.7"))}, key(), StartNone
	here := NewRule("here")
	here.Local, here.Remote, here.PSK = []Range{One(addr("192.0.2.1"))}, []Range{Prefix(netip.MustParsePrefix("192.0.2.0/24"))}, key()
	named := NewRule("named")
	named.Remote, named.PSK, named.LocalID = Any(), key(), fqdn("me.example")
	named.RemoteIDs = Patterns{{ID: fqdn("*.example")}}
	db, err := NewDB([]*Rule{hub, here, named})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func TestOutboundInbound(t *testing.T) {
	db := rules(t)
	for _, tt := range []struct{ local, remote, out, in string }{
		{"192.0.2.1", "192.0.2.7", "here", "[hub here named]"},
		{"192.0.2.2", "192.0.2.7", "named", "[hub named]"},
		{"192.0.2.1", "192.0.2.8", "here", "[here named]"},
		{"2001:db8::1", "2001:db8::2", "named", "[named]"},
	} {
		if got := db.Outbound(addr(tt.local), addr(tt.remote)); got == nil || got.Label != tt.out {
			t.Errorf("outbound %s %s: got %v, want %s", tt.local, tt.remote, got, tt.out)
		}
		var labels []string
		for _, r := range db.Inbound(addr(tt.local), addr(tt.remote)) {
			labels = append(labels, r.Label)
		}
		if got := fmt.Sprint(labels); got != tt.in {
			t.Errorf("inbound %s %s: got %s, want %s", tt.local, tt.remote, got, tt.in)
		}
	}
}

func TestAuthorize(t *testing.T) {
	db := rules(t)
	suite := proposal.IKESuite{Cipher: proposal.Cipher{Encr: alg.EncrAESGCM16, Bits: 256}, PRF: alg.PRFHMACSHA256, KE: alg.KEX25519}
	odd := suite
	odd.Bits = 192
	ip := AddrID(addr("10.9.9.9"))
	for _, tt := range []struct {
		name string
		c    Claim
		want string
	}{
		{"address, behind a NAT", Claim{IDi: ip, Method: Preshared, Suite: suite}, "hub"},
		{"asks for an address of ours", Claim{IDi: ip, IDr: AddrID(addr("203.0.113.1")), Method: Preshared, Suite: suite}, "hub"},
		{"name", Claim{IDi: fqdn("a.example"), Method: Preshared, Suite: suite}, "named"},
		{"asks for our name", Claim{IDi: fqdn("a.example"), IDr: fqdn("ME.example"), Method: Preshared, Suite: suite}, "named"},
		{"asks for another", Claim{IDi: fqdn("a.example"), IDr: fqdn("you.example"), Method: Preshared, Suite: suite}, ""},
		{"unknown name", Claim{IDi: fqdn("a.other"), Method: Preshared, Suite: suite}, ""},
		{"other suite", Claim{IDi: ip, Method: Preshared, Suite: odd}, ""},
		{"other method", Claim{IDi: ip, Method: 9, Suite: suite}, ""},
	} {
		got := ""
		if r := Authorize(db.Inbound(addr("192.0.2.1"), addr("192.0.2.7")), tt.c); r != nil {
			got = r.Label
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestKeys(t *testing.T) {
	r := NewRule("a")
	one, two := key(), Keys{ipsec.NewKey([]byte{1}), ipsec.NewKey([]byte{2})}
	r.Pairs = []PairKeys{{LocalID: Pattern{ID: fqdn("me")}, RemoteID: Pattern{ID: fqdn("*.example")}, Keys: two}}
	if k, ok := r.Keys(fqdn("me"), fqdn("a.example")); !ok || !k.Remote.Equal(two.Remote) {
		t.Errorf("pair: got %v, %v", k, ok)
	}
	if k, ok := r.Keys(fqdn("me"), fqdn("other")); ok {
		t.Errorf("no pair: got %v", k)
	}
	r.PSK = one
	if k, ok := r.Keys(fqdn("me"), fqdn("a.example")); !ok || !k.Local.Equal(one.Local) {
		t.Errorf("rule's own: got %v, %v", k, ok)
	}
	if s := fmt.Sprintf("%v %+v %#v", r, r, *r); strings.Contains(s, "horse") {
		t.Errorf("a key is printed: %s", s)
	}
	r.Remote = Any()
	db, err := NewDB([]*Rule{r})
	if err != nil {
		t.Fatal(err)
	}
	db.Wipe()
	if one.Local.Bytes()[0] != 0 || two.Remote.Bytes()[0] != 0 {
		t.Error("keys outlive Wipe")
	}
}

func TestNewDBRefuses(t *testing.T) {
	good := func(label string) *Rule {
		r := NewRule(label)
		r.Remote, r.PSK = Any(), key()
		return r
	}
	for name, f := range map[string]func(*Rule){
		"label":      func(r *Rule) { r.Label = "" },
		"label used": func(r *Rule) { r.Label = "a" },
		"remote":     func(r *Rule) { r.Remote = nil },
		"range":      func(r *Rule) { r.Remote = []Range{{addr("10.0.0.2"), addr("10.0.0.1")}} },
		"families":   func(r *Rule) { r.Local = []Range{{addr("10.0.0.2"), addr("fe80::1")}} },
		"method":     func(r *Rule) { r.RemoteAuth = 0 },
		"no key":     func(r *Rule) { r.PSK = Keys{} },
		"half a key": func(r *Rule) { r.PSK.Remote = ipsec.Key{} },
		"proposals":  func(r *Rule) { r.Proposals = nil },
		"nonce":      func(r *Rule) { r.NonceLen = 8 },
		"soft life":  func(r *Rule) { r.IKE.Soft = r.IKE.Hard + 1 },
	} {
		b := good("b")
		f(b)
		if _, err := NewDB([]*Rule{good("a"), b}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestWithHosts(t *testing.T) {
	r := NewRule("a")
	r.RemoteHosts, r.PSK = []string{"VPN.example"}, key()
	db, err := NewDB([]*Rule{r})
	if err != nil {
		t.Fatal(err)
	}
	if db.Outbound(addr("10.0.0.1"), addr("192.0.2.9")) != nil {
		t.Error("covers an address before the name is resolved")
	}
	with := db.WithHosts(map[string][]netip.Addr{"vpn.example": {addr("::ffff:192.0.2.9")}})
	if got := with.Outbound(addr("10.0.0.1"), addr("192.0.2.9")); got == nil || got.Label != "a" {
		t.Errorf("got %v, want rule a", got)
	}
	if len(r.Remote) != 0 {
		t.Error("WithHosts changed the rule itself")
	}
}

func TestRuleDefaults(t *testing.T) {
	r := NewRule("a")
	if got := r.Identity(addr("10.0.0.1")); got != AddrID(addr("10.0.0.1")) || got.String() != "10.0.0.1" {
		t.Errorf("identity: got %v", got)
	}
	if _, ok := r.ExpectedID(); ok {
		t.Error("expects an identity without being told one")
	}
	r.RemoteIDs = Patterns{{ID: fqdn("peer")}}
	if id, ok := r.ExpectedID(); !ok || id != fqdn("peer") {
		t.Errorf("expected: got %v, %v", id, ok)
	}
	if FromWire(fqdn("x").Wire()) != fqdn("x") {
		t.Error("wire form does not lead back")
	}
}

func TestPatternString(t *testing.T) {
	r := Prefix(netip.MustParsePrefix("10.0.0.0/30"))
	ps := Patterns{AnyID, AddrPattern(r), {Not: true, ID: AddrID(addr("10.0.0.1"))}, {ID: ID{Type: ikev2.IDFQDN, Data: "*.example.com"}}}
	if got, want := fmt.Sprint(ps), "[ANY 10.0.0.0-10.0.0.3 !10.0.0.1 *.example.com]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
