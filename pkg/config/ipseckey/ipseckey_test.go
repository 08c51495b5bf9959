package ipseckey

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

var update = flag.Bool("update", false, "write the golden files")

var testOptions = Options{LookupHost: func(name string) ([]netip.Addr, error) {
	switch name {
	case "peer.example.com":
		return []netip.Addr{netip.MustParseAddr("192.0.2.9")}, nil
	case "dual.example.com":
		return []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9"), netip.MustParseAddr("2001:db8::a")}, nil
	}
	return nil, errors.New("no such host")
}}

func render(cs []Command) string {
	var b strings.Builder
	for _, c := range cs {
		fmt.Fprintf(&b, "%v %v", c.Pos, c.Verb)
		switch c.Verb {
		case Flush, Dump, Save:
			fmt.Fprintf(&b, " %d %s\n", c.Proto, c.File)
		case Help, Monitor:
			b.WriteString("\n")
		case Update, UpdatePair:
			keys := slices.Sorted(maps.Keys(c.given))
			fmt.Fprintf(&b, " %v from %v pair %d: %v\n", c.SA.SAID, c.SA.Src, c.Pair, keys)
		case Add:
			line, note := Format(&c.SA, true)
			fmt.Fprintf(&b, " pair %d: %s [%s]\n", c.Pair, line, note)
		default:
			fmt.Fprintf(&b, " %v from %v\n", c.SA.SAID, c.SA.Src)
		}
	}
	return b.String()
}

// TestGolden reads testdata/NAME.in; testdata/NAME.ok has the commands, or the
// errors, which show nothing of what could be a key.
func TestGolden(t *testing.T) {
	for _, name := range []string{"good", "bad"} {
		f, err := os.Open(filepath.Join("testdata", name+".in"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cs, l := Load(name+".in", f, testOptions)
		var b strings.Builder
		lexer.Print(&b, l.All())
		b.WriteString(render(cs))
		if name == "bad" && (strings.Contains(b.String(), "SECRET") || strings.Contains(b.String(), "0001020304")) {
			t.Errorf("a key is shown:\n%s", &b)
		}
		golden := filepath.Join("testdata", name+".ok")
		if *update {
			if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if b.String() != string(want) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, &b, want)
		}
	}
}

// every SA that there can be is written so that it is read again.
func TestFormat(t *testing.T) {
	key := func(n int) ipsec.Key {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i + 1)
		}
		return ipsec.NewKey(b)
	}
	a4, b4 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	a6, b6 := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	host := func(a netip.Addr, proto uint8, port uint16) []ipsec.TrafficSelector {
		return []ipsec.TrafficSelector{{Proto: proto, Start: a, End: a, PortLo: port, PortHi: port}}
	}
	var all []ipsec.SAParams
	for _, e := range append(alg.AllEncr(), alg.LegacyEncr()...) {
		i := e.Info()
		bits := i.KeyBits
		if bits == nil {
			bits = []int{0}
		}
		for _, n := range bits {
			kl, _ := e.KeyLen(n)
			p := ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: b4, SPI: 0x100}, Src: a4, Mode: ipsec.Tunnel, Encr: e, EncrKey: key(kl), AggFrag: i.AEAD}
			if !i.AEAD && !i.Old {
				p.Auth, p.AuthKey = alg.IntegHMACSHA256, key(32)
			}
			all = append(all, p)
		}
	}
	for _, a := range slices.Concat(alg.AllInteg(), alg.AHInteg(), alg.LegacyInteg()) {
		window, esn := uint32(1024), true
		if a.Info().Old {
			window, esn = 0, false
		}
		all = append(all, ipsec.SAParams{
			SAID: ipsec.SAID{Proto: ipsec.AH, Dst: b6, SPI: 0xffffffff}, Src: a6, Mode: ipsec.Transport, ReqID: 7,
			Auth: a, AuthKey: key(a.Info().KeyLen), ReplayWindow: window, ESN: esn,
			Hard: ipsec.Lifetime{Packets: 1, Bytes: 2, AddTime: 3 * time.Second, UseTime: 4 * time.Second}, Soft: ipsec.Lifetime{Bytes: 1},
		})
	}
	ts := all[0]
	ts.SrcTS = []ipsec.TrafficSelector{{Proto: 17, Start: netip.MustParseAddr("10.1.0.0"), End: netip.MustParseAddr("10.1.255.255"), PortHi: 65535}}
	ts.DstTS = host(netip.MustParseAddr("10.2.0.1"), 17, 53)
	udp := all[0]
	udp.Encap = &ipsec.Encap{SPort: 4500, DPort: 1024}
	one := all[0]
	one.Mode, one.SrcTS, one.DstTS = ipsec.Transport, host(a4, 6, 80), host(b4, 6, 81)
	behind := udp
	behind.Encap = &ipsec.Encap{SPort: 4500, DPort: 1024, OA: netip.MustParseAddr("10.9.9.9")}
	old := one
	old.LastSeq, old.Idle = 1<<32-2, ipsec.Idle{AddTime: time.Minute, UseTime: time.Second}
	older := old
	older.LastSeq, older.ESN, older.ReplayWindow = 1<<62, true, 64
	all = append(all, ts, udp, one, behind, old, older)
	opt := testOptions
	opt.Unauthenticated = true
	for _, p := range all {
		line, note := Format(&p, true)
		cs, l := Load("", strings.NewReader(line+"\n"), opt)
		if err := l.Err(); err != nil || note != "" {
			t.Errorf("%s: %v, note %q", line, err, note)
			continue
		}
		if got := cs[0].SA; !got.EncrKey.Equal(p.EncrKey) || !got.AuthKey.Equal(p.AuthKey) {
			t.Errorf("%s: other keys", line)
		} else {
			got.EncrKey, got.AuthKey = p.EncrKey, p.AuthKey
			if !reflect.DeepEqual(got, p) {
				t.Errorf("%s is %+v, want %+v", line, got, p)
			}
		}
		hidden, _ := Format(&p, false)
		if strings.Contains(hidden, "0102") {
			t.Errorf("a key is shown: %s", hidden)
		}
		if _, l := Load("", strings.NewReader(hidden), testOptions); !l.Failed() && strings.Contains(hidden, "XX") {
			t.Errorf("%s is read as if it had keys", hidden)
		}
	}
	for note, mod := range map[string]func(p *ipsec.SAParams){
		"traffic selectors": func(p *ipsec.SAParams) {
			p.SrcTS = []ipsec.TrafficSelector{{Start: a4, End: netip.MustParseAddr("10.0.0.9"), PortHi: 65535}}
			p.DstTS = host(b4, 0, 0)
		},
	} {
		p := all[0]
		mod(&p)
		if _, got := Format(&p, true); got != note {
			t.Errorf("got note %q, want %q", got, note)
		}
	}
}

// Whatever its size, a file costs bounded time and messages.
func TestBounds(t *testing.T) {
	for _, src := range []string{
		strings.Repeat("add esp\n", 200000), "add esp " + strings.Repeat("spi 300 ", 200000), strings.Repeat("x", 1<<20),
		strings.Repeat(" ", MaxFile+1), strings.Repeat("add esp spi 300 \\\n", 100000),
	} {
		start := time.Now()
		cs, l := Load("", strings.NewReader(src), Options{})
		if n := len(l.Errors()); n == 0 || n > maxMessages+1 || len(cs) > 0 {
			t.Errorf("%.20q: %d errors, %d commands", src, n, len(cs))
		}
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("%.20q took %v", src, d)
		}
	}
}

// FuzzLoad: no input panics; what is read, written and read again is the same.
func FuzzLoad(f *testing.F) {
	for _, name := range []string{"good", "bad"} {
		b, err := os.ReadFile(filepath.Join("testdata", name+".in"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
		for _, line := range strings.Split(string(b), "\n") {
			f.Add(line)
		}
	}
	f.Fuzz(func(t *testing.T, src string) {
		cs, l := Load("", strings.NewReader(src), testOptions)
		if l.Failed() != (l.Err() != nil) || l.Failed() && len(cs) > 0 {
			t.Fatal("commands in spite of errors")
		}
		for _, c := range cs {
			if c.Verb != Add {
				continue
			}
			line, note := Format(&c.SA, true)
			if note != "" {
				continue
			}
			again, l := Load("", strings.NewReader(line), testOptions)
			if err := l.Err(); err != nil || len(again) != 1 {
				t.Fatalf("%q of %q: %v", line, src, err)
			}
			if line2, _ := Format(&again[0].SA, true); line2 != line {
				t.Fatalf("%q is written as %q", line, line2)
			}
		}
	})
}

// TestManPage: loadConfig(8) names every command and extension.
func TestManPage(t *testing.T) {
	b, err := os.ReadFile("../../../cmd/loadconfig/loadConfig.8")
	if err != nil {
		t.Fatal(err)
	}
	page := strings.ReplaceAll(string(b), "\\-", "-")
	for _, k := range append(verbs, keywords...) {
		for _, kind := range []string{"hard_", "soft_"} {
			k = strings.TrimPrefix(k, kind)
		}
		if !strings.Contains(page, k) {
			t.Errorf("%s is not in the page", k)
		}
	}
}

// TestMerge: an update changes what it says and leaves the rest; what no SA
// takes is named.
func TestMerge(t *testing.T) {
	read := func(text string) *Command {
		t.Helper()
		cs, l := Load("", strings.NewReader(text), testOptions)
		if err := l.Err(); err != nil || len(cs) != 1 {
			t.Fatalf("%s: %v", text, err)
		}
		return &cs[0]
	}
	const keys = " encr_alg aes encrkey 000102030405060708090a0b0c0d0e0f auth_alg sha1 authkey a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3"
	old := read("add esp spi 0x100 src 192.0.2.1 dst 192.0.2.2 replay 64 hard_addtime 100 soft_addtime 90 hard_bytes 5 proto 6 dport 80 encap udp nat_rem 10.9.9.8 idle_addtime 20 idle_usetime 10 replay_value 77" + keys).SA
	head := "update esp spi 0x100 dst 192.0.2.2 "
	for more, want := range map[string]func(p *ipsec.SAParams){
		"":                            func(*ipsec.SAParams) {},
		"hard_addtime 7":              func(p *ipsec.SAParams) { p.Hard.AddTime = 7 * time.Second },
		"hard_bytes 0 soft_packets 9": func(p *ipsec.SAParams) { p.Hard.Bytes, p.Soft.Packets = 0, 9 },
		"hard_usetime 1 soft_bytes 2 hard_packets 3 soft_addtime 4 soft_usetime 5": func(p *ipsec.SAParams) {
			p.Hard.UseTime, p.Soft.Bytes, p.Hard.Packets, p.Soft.AddTime, p.Soft.UseTime = time.Second, 2, 3, 4*time.Second, 5*time.Second
		},
		"encap udp nat_rem 10.9.9.9": func(p *ipsec.SAParams) {
			p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500, OA: netip.MustParseAddr("10.9.9.9")}
		},
		"encap udp":                      func(*ipsec.SAParams) {},
		"idle_addtime 9":                 func(p *ipsec.SAParams) { p.Idle.AddTime = 9 * time.Second },
		"idle_usetime 0":                 func(p *ipsec.SAParams) { p.Idle.UseTime = 0 },
		"replay_value 77":                func(*ipsec.SAParams) {},
		"encap udp outbound nat_rport 9": func(p *ipsec.SAParams) { p.Encap = &ipsec.Encap{SPort: 4500, DPort: 9, OA: old.Encap.OA} },
		"src 192.0.2.1 proto 6 dport 80 replay 64 mode transport" + keys: func(*ipsec.SAParams) {},
	} {
		got, differs := read(head + more).Merge(&old)
		wanted := old
		want(&wanted)
		if differs != "" || !reflect.DeepEqual(got, wanted) {
			t.Errorf("%q: got %+v, differs %q, want %+v", more, got, differs, wanted)
		}
	}
	plain := old
	plain.Encap = nil
	if _, differs := read(head + "encap udp").Merge(&plain); differs != "encap" {
		t.Errorf("encap: differs %q", differs)
	}
	for more, want := range map[string]string{
		"mode tunnel": "mode", "replay_value 76": "replay_value", "replay 32": "replay", "replay 64 esn": "esn", "reqid 1": "reqid", "encr_alg null": "encr_alg", "auth_alg sha256": "auth_alg",
		"authkey 00": "authkey", "encrkey 00": "encrkey", "src 192.0.2.1 proto 17": "the selector", "src 192.0.2.1 proto 6 dport 81": "the selector",
	} {
		if _, differs := read(head + more).Merge(&old); differs != want {
			t.Errorf("%q: differs %q, want %q", more, differs, want)
		}
	}
}
