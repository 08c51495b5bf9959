package ipsecconf

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

var update = flag.Bool("update", false, "write the golden files")

// testOptions resolve a few names without the network.
func testOptions() Options {
	return Options{
		LookupHost: func(name string) ([]netip.Addr, error) {
			switch name {
			case "peer.example.com":
				return []netip.Addr{netip.MustParseAddr("192.0.2.9")}, nil
			case "dual.example.com":
				return []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9"), netip.MustParseAddr("192.0.2.9")}, nil
			}
			return nil, errors.New("no such host")
		},
		LookupPort: func(name string) (uint16, error) {
			if name == "finger" {
				return 79, nil
			}
			return 0, errors.New("no such service")
		},
		LookupNet: func(name string) (netip.Prefix, error) {
			if name == "campus" {
				return netip.MustParsePrefix("172.16.0.0/16"), nil
			}
			return netip.Prefix{}, errors.New("no such network")
		},
		LookupTunnel: func(name string) (Tunnel, error) {
			a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
			switch name {
			case "tun0":
				return Tunnel{a, b, []uint8{4, 41}}, nil
			case "gre7":
				return Tunnel{a, b.Next(), []uint8{47}}, nil
			}
			return Tunnel{}, errors.New("no such interface")
		},
	}
}

// render shows rules as the golden files have them.
func render(c *Contents) string {
	var b strings.Builder
	if c.FlushPolicies {
		b.WriteString("spdflush;\n")
	}
	if c.FlushSAs {
		b.WriteString("flush;\n")
	}
	for _, s := range c.SAs {
		fmt.Fprintf(&b, "%v %v -> %v %v %v %v %x %v %x\n", s.Pos, s.Src, s.SAID, s.Mode, s.Encr, s.EncrKey.Len(), s.EncrKey.Bytes(), s.Auth, s.AuthKey.Bytes())
	}
	for _, r := range c.Rules {
		entry, note := Format(&r.Policy)
		if note != "" {
			entry += "  # " + note
		}
		fmt.Fprintf(&b, "%v +%d %v\n", r.Pos, r.Policy.Priority-PriorityBase, entry)
	}
	return b.String()
}

// TestGolden reads testdata/NAME.in. testdata/NAME.ok has the policies, behind
// the warnings, or the errors.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.in")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, in := range files {
		name := strings.TrimSuffix(filepath.Base(in), ".in")
		t.Run(name, func(t *testing.T) {
			f, err := os.Open(in)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			opt := testOptions()
			if strings.HasPrefix(name, "solaris-order") {
				opt.Order = OrderSolaris
			}
			for _, d := range []Dialect{Solaris, NanoSec} {
				if strings.HasSuffix(name, "strict-"+string(d)) {
					opt.Dialect = d
				}
			}
			c, l := Load(filepath.Base(in), f, opt)
			var b strings.Builder
			lexer.Print(&b, l.All())
			if !l.Failed() {
				b.WriteString(render(c))
			} else if !strings.HasPrefix(name, "bad-") {
				t.Errorf("%s has errors", in)
			}
			if s := b.String(); strings.Contains(s, "SECRET") || strings.Contains(s, "deadbeef") {
				t.Errorf("a key is shown:\n%s", s)
			}
			golden := strings.TrimSuffix(in, ".in") + ".ok"
			if *update {
				if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("got\n%s\nwant\n%s", &b, want)
			}
		})
	}
}

func load(t *testing.T, src string) []Rule {
	t.Helper()
	c, l := Load("", strings.NewReader(src), testOptions())
	if err := l.Err(); err != nil {
		t.Fatalf("%s\n%v", src, err)
	}
	return c.Rules
}

// The seed of the language, down to the values that the daemons get.
func TestSeed(t *testing.T) {
	got := load(t, "{ raddr 192.168.3.119 ulp icmp } ipsec { encr_algs aes encr_auth_algs sha1 }\n")
	any4, peer := netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("192.168.3.119/32")
	pol := func(dir ipsec.Direction, src, dst netip.Prefix) Rule {
		return Rule{Pos: lexer.Pos{Line: 1, Col: 1}, Policy: ipsec.Policy{
			Dir: dir, Sel: ipsec.Selector{Src: src, Dst: dst, Proto: 1}, Action: ipsec.Protect, Priority: PriorityBase, Flags: ipsec.PolicyManual,
			Requests:  []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelUnique}},
			Proposals: []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1}},
		}}
	}
	want := []Rule{pol(ipsec.Out, any4, peer), pol(ipsec.In, peer, any4)}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	if !Mirrors(&got[1].Policy, &got[0].Policy) || Mirrors(&got[0].Policy, &got[1].Policy) {
		t.Error("in mirrors out, not the reverse")
	}
}

func TestTunnel(t *testing.T) {
	rules := load(t, "{ laddr 10.1.0.0/16 raddr 10.2.0.0/16 lport 80 ulp tcp } ipsec { encr_algs gcm tladdr 192.0.2.1 traddr 192.0.2.2 lifetime_secs 100 lifetime_bytes 1000 }\n")
	if len(rules) != 3 {
		t.Fatalf("%d rules, want out, in, fwd", len(rules))
	}
	out, in, fwd := rules[0].Policy, rules[1].Policy, rules[2].Policy
	if in.Sel != out.Sel.Reverse() || in.Requests[0].Src != out.Requests[0].Dst || in.Requests[0].Dst != out.Requests[0].Src {
		t.Errorf("in is %+v, out is %+v", in, out)
	}
	if fwd.Dir = ipsec.In; !reflect.DeepEqual(fwd, in) {
		t.Errorf("fwd is %+v, in is %+v", fwd, in)
	}
	p := out.Proposals[0]
	if want := (ipsec.Lifetime{AddTime: 100 * time.Second, Bytes: 1000}); p.Hard != want {
		t.Errorf("hard %+v, want %+v", p.Hard, want)
	}
	if want := (ipsec.Lifetime{AddTime: 90 * time.Second, Bytes: 900}); p.Soft != want {
		t.Errorf("soft %+v, want %+v", p.Soft, want)
	}
}

// Every algorithm that we have has a name here, and Format uses it.
func TestAllAlgorithms(t *testing.T) {
	check := func(p ipsec.Proposal) {
		t.Helper()
		text := "{ raddr 192.0.2.9 dir out } ipsec { " + formatProposal(&p) + " }"
		if got := load(t, text)[0].Policy.Proposals[0]; got != p {
			t.Errorf("%s is %+v, want %+v", text, got, p)
		}
	}
	for _, e := range append(alg.AllEncr(), alg.LegacyEncr()...) {
		if i := e.Info(); i.AEAD || i.Old {
			check(ipsec.Proposal{Encr: e})
			continue
		}
		for _, a := range append(alg.AllInteg(), alg.IntegNone, alg.IntegHMACMD5) {
			check(ipsec.Proposal{Encr: e, Auth: a})
		}
	}
	check(ipsec.Proposal{})
	check(ipsec.Proposal{EncrMinBits: 192})
	check(ipsec.Proposal{Encr: alg.EncrAESCBC, EncrMaxBits: 192})
	check(ipsec.Proposal{Encr: alg.EncrAESCBC, EncrMinBits: 128, EncrMaxBits: 128, Hard: ipsec.Lifetime{Bytes: 77}, Soft: ipsec.Lifetime{Bytes: 70}})
}

func TestNumber(t *testing.T) {
	for _, tt := range []struct {
		s     string
		limit uint64
		n     uint64
		ok    bool
	}{
		{"0", 9, 0, true}, {"9", 9, 9, true}, {"10", 9, 0, false}, {"010", 99, 0, false}, {"0x10", 99, 16, true}, {"0xfF", 255, 255, true},
		{"", 9, 0, false}, {"0x", 9, 0, false}, {"-1", 9, 0, false}, {"+1", 9, 0, false}, {"1a", 99, 0, false}, {"5", 4, 0, false},
		{"18446744073709551615", 1<<64 - 1, 1<<64 - 1, true}, {"18446744073709551616", 1<<64 - 1, 0, false},
	} {
		if n, ok := number(tt.s, tt.limit); ok != tt.ok || ok && n != tt.n {
			t.Errorf("number(%q, %d) = %d, %v, want %d, %v", tt.s, tt.limit, n, ok, tt.n, tt.ok)
		}
	}
}

// Whatever its size, a text costs bounded time and messages.
func TestBounds(t *testing.T) {
	for _, tt := range []struct {
		name, src string
		want      string // the last message
	}{
		{"many errors", strings.Repeat("{ radr x } drop {}\n", 100000), "too many errors"},
		{"a long line", "{ " + strings.Repeat("raddr 10.0.0.1 ", 70000) + "} drop {}", "too many errors"},
		{"a long word", "{ raddr " + strings.Repeat("x", 1<<20) + " } drop {}", "1:9: word of more than 4096 octets"},
		{"many braces", strings.Repeat("{", 1<<20), "too many errors"},
		{"too large", strings.Repeat(" ", MaxFile+1), "larger than 67108864 octets"},
	} {
		start := time.Now()
		_, l := Load("", strings.NewReader(tt.src), Options{})
		es := l.Errors()
		if got := es[len(es)-1].String(); got != tt.want && !(tt.name == "many braces" && strings.HasSuffix(got, "closed")) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("%s took %v", tt.name, d)
		}
	}
}

// TestMaxRules: the policies of all entries together have a bound, whatever each
// is; a spdflush begins again.
func TestMaxRules(t *testing.T) {
	const entry = "{ raddr ::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe ulp ipv6-icmp type 0-7 dir out } ipsec { encr_algs gcm }\n"
	one := len(load(t, entry))
	for _, tt := range []struct{ src, want string }{
		{strings.Repeat(entry, 3), ""},
		{strings.Repeat(entry, 4), fmt.Sprintf("4:1: the file stands for more than %d policies", 3*one)},
		{strings.Repeat(entry, 2) + "spdflush;\n" + strings.Repeat(entry, 3), ""},
		{strings.Repeat(entry, 2) + "spdflush;\n" + strings.Repeat(entry, 4), fmt.Sprintf("7:1: the file stands for more than %d policies", 3*one)},
	} {
		var l lexer.List
		c := Parse(tt.src, &l).contents(&l, testOptions(), 3*one)
		var got string
		for _, e := range l.Errors() {
			got += e.String()
		}
		if got != tt.want || (len(c.Rules) == 0) != (tt.want != "") {
			t.Errorf("got %q and %d rules, want %q", got, len(c.Rules), tt.want)
		}
	}
}

// A hundred thousand entries are nothing special.
func TestMany(t *testing.T) {
	var b strings.Builder
	for i := range 100000 {
		fmt.Fprintf(&b, "{ raddr 10.%d.%d.%d ulp tcp } ipsec { encr_algs gcm }\n", i>>16, i>>8&255, i&255)
	}
	if n := len(load(t, b.String())); n != 200000 {
		t.Errorf("%d rules, want 200000", n)
	}
}

// strip forgets positions and order.
func strip(rules []Rule) []ipsec.Policy {
	var ps []ipsec.Policy
	for _, r := range rules {
		if r.Policy.Priority = 0; r.Policy.Dir != ipsec.Fwd {
			ps = append(ps, r.Policy)
		}
	}
	return ps
}

// FuzzParse: no input panics; what parses, prints and parses to the same; what
// has a meaning, formats and means the same.
func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.in")
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Fuzz(func(t *testing.T, src string) {
		var l lexer.List
		file := Parse(src, &l)
		bad := l.Failed()
		// A text of a hundred octets may stand for thousands of policies: TestCost
		// has that what they cost is bounded.
		rules := file.contents(&l, testOptions(), 1<<14).Rules
		l.Errors()
		if bad {
			return
		}
		var l2 lexer.List
		printed := text(file)
		again := Parse(printed, &l2)
		if err := l2.Err(); err != nil {
			t.Fatalf("%q printed as %q: %v", src, printed, err)
		}
		if twice := text(again); twice != printed {
			t.Fatalf("%q printed as %q, then as %q", src, printed, twice)
		}
		if l.Failed() || len(rules) > 1000 {
			return
		}
		var b strings.Builder
		for _, r := range rules {
			if r.Policy.Dir != ipsec.Fwd {
				entry, note := Format(&r.Policy)
				if note != "" {
					t.Fatalf("%q has note %q", entry, note)
				}
				b.WriteString(entry + "\n")
			}
		}
		c, l3 := Load("", strings.NewReader(b.String()), testOptions())
		if err := l3.Err(); err != nil {
			t.Fatalf("%q: %q: %v", src, b.String(), err)
		}
		if want := strip(rules); !reflect.DeepEqual(strip(c.Rules), want) {
			t.Fatalf("%q is\n%+v\nof %q\n%+v", b.String(), strip(c.Rules), src, want)
		}
	})
}

// Names of many addresses, and names that take long, have their bounds.
func TestNameBounds(t *testing.T) {
	many := Options{LookupHost: func(string) ([]netip.Addr, error) {
		var l []netip.Addr
		for k := range 100000 {
			l = append(l, netip.AddrFrom4([4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)}))
		}
		return l, nil
	}}
	for text, want := range map[string]string{
		"{ raddr many laddr more } drop {}": "1:1: the entry stands for more than 4096 policies",
		"{ raddr many } drop {}":            "1:1: the entry stands for more than 4096 policies",
	} {
		if _, l := Load("", strings.NewReader(text), many); len(l.Errors()) != 1 || l.Errors()[0].String() != want {
			t.Errorf("%s: %v", text, l.Err())
		}
	}
	synctest.Test(t, func(t *testing.T) {
		n := 0
		slow := Options{LookupHost: func(string) ([]netip.Addr, error) {
			n++
			time.Sleep(25 * time.Second)
			return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
		}}
		_, l := Load("", strings.NewReader("{ raddr a } drop {}\n{ raddr b } drop {}\n{ raddr c } drop {}\n{ raddr d } drop {}\n{ raddr a ulp tcp } drop {}\n"), slow)
		if es := l.Errors(); len(es) != 1 || es[0].String() != `4:9: raddr "d": not looked up: the names before it have taken more than 1m0s` || n != 3 {
			t.Errorf("%d lookups, %v", n, es)
		}
	})
}

func TestFindNet(t *testing.T) {
	const file = "# networks\ndefault 0.0.0.0\nloopback 127.0.0.0 # local\nlink-local 169.254.0.0\ncampus 172.16 site Main\nten 10\none 192.0.2.1\nbad 300\nshort\n"
	for name, want := range map[string]string{
		"loopback": "127.0.0.0/8", "link-local": "169.254.0.0/16", "campus": "172.16.0.0/16", "main": "172.16.0.0/16", "site": "172.16.0.0/16",
		"ten": "10.0.0.0/8", "one": "192.0.2.1/32", "default": "0.0.0.0/0", "bad": "", "short": "", "none": "", "local": "",
	} {
		if p, err := findNet(strings.NewReader(file), name); (err == nil) != (want != "") || err == nil && p.String() != want {
			t.Errorf("%s: got %v, %v, want %q", name, p, err, want)
		}
	}
}

// Manual SAs of encryption alone are refused, and where they are taken, not in
// silence.
func TestUnauthenticatedSA(t *testing.T) {
	const text = "add 192.0.2.1 192.0.2.2 esp 0x100 -E aes-cbc \"0123456789abcdef\";"
	opt := testOptions()
	if _, l := Load("", strings.NewReader(text), opt); !l.Failed() {
		t.Error("taken without a word")
	}
	opt.Unauthenticated = true
	c, l := Load("", strings.NewReader(text), opt)
	if w := l.Warnings(); l.Failed() || len(c.SAs) != 1 || len(w) != 1 || !strings.Contains(w[0].Text, "encryption without authentication") {
		t.Errorf("%v, %d SAs, warnings %v", l.Err(), len(c.SAs), w)
	}
}
