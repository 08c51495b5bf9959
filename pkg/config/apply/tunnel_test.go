package apply

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/ipsec"
)

// What closes a tunnel interface comes with its first entry, once, and goes with
// the last.
func TestClosing(t *testing.T) {
	read := func(text string) []ipsecconf.Rule {
		t.Helper()
		c, l := ipsecconf.Load("", strings.NewReader(text), ipsecconf.Options{LookupTunnel: func(name string) (ipsecconf.Tunnel, error) {
			if name != "tun0" {
				return ipsecconf.Tunnel{}, errors.New("no such interface")
			}
			return ipsecconf.Tunnel{Local: netip.MustParseAddr("192.0.2.1"), Remote: netip.MustParseAddr("192.0.2.2"), Protos: []uint8{4, 41}}, nil
		}})
		if err := l.Err(); err != nil {
			t.Fatal(err)
		}
		return c.Rules
	}
	one := read("{ tunnel tun0 negotiate tunnel raddr 10.1.0.0/16 } ipsec { encr_algs gcm }\n")
	two := read("{ tunnel tun0 negotiate tunnel raddr 10.2.0.0/16 } ipsec { encr_algs gcm }\n")
	check := func(what string, rules []ipsecconf.Rule, err error, protect, drop int) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		var p, d int
		for _, r := range rules {
			switch {
			case r.Policy.Dir == ipsec.Fwd:
			case r.Policy.Action == ipsec.Protect:
				p++
			case r.Policy.Action == ipsec.Discard:
				d++
			}
		}
		if p != protect || d != drop {
			t.Errorf("%s: %d protect, %d drop, want %d and %d", what, p, d, protect, drop)
		}
	}
	check("one", one, nil, 2, 4)
	l := &load{}
	both, err := l.appended(one, two)
	check("appended", both, err, 4, 4)
	if len(l.res.Notes) != 0 {
		t.Errorf("notes %v", l.res.Notes)
	}
	rest, err := l.without(both, one)
	check("without the first", rest, err, 2, 4)
	rest, err = l.without(rest, two)
	check("without both", rest, err, 0, 0)
}
