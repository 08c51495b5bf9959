package apply

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// A listing, in each of its forms, is a file that means the same, in the same
// order.
func TestListingLoads(t *testing.T) {
	opt := ipsecconf.Options{
		LookupHost: func(string) ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("192.0.2.9")}, nil },
		LookupPort: func(string) (uint16, error) { return 79, nil },
		LookupTunnel: func(string) (ipsecconf.Tunnel, error) {
			return ipsecconf.Tunnel{Local: netip.MustParseAddr("192.0.2.1"), Remote: netip.MustParseAddr("192.0.2.2"), Protos: []uint8{4, 41}}, nil
		},
	}
	files, err := filepath.Glob("../ipsecconf/testdata/*.in")
	if err != nil {
		t.Fatal(err)
	}
	read := func(name, text string) (ps []ipsec.Policy, ok bool) {
		c, l := ipsecconf.Load(name, strings.NewReader(text), opt)
		for _, r := range ipsecconf.WithoutForward(c.Rules) {
			ps = append(ps, r.Policy)
		}
		return ps, !l.Failed()
	}
	byDir := func(ps []ipsec.Policy, d ipsec.Direction) (l []ipsec.Policy) {
		for _, p := range ps {
			if p.Dir == d {
				p.Priority = 0
				l = append(l, p)
			}
		}
		return l
	}
	n := 0
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		want, ok := read(name, string(b))
		if !ok {
			continue
		}
		n++
		var infos []*keysock.PolicyInfo
		for _, p := range want {
			infos = append(infos, &keysock.PolicyInfo{Policy: p})
		}
		for _, how := range []Listing{{}, {Apart: true}, {Apart: true, Numeric: true}} {
			var b strings.Builder
			if err := WritePolicies(&b, infos, nil, how); err != nil {
				t.Fatal(err)
			}
			got, ok := read("listing", b.String())
			if !ok {
				t.Fatalf("%s, %+v: the listing has errors:\n%s", name, how, &b)
			}
			for _, d := range []ipsec.Direction{ipsec.Out, ipsec.In} {
				if !reflect.DeepEqual(byDir(got, d), byDir(want, d)) {
					t.Errorf("%s, %+v, %v: the listing means\n%+v\nwant\n%+v", name, how, d, byDir(got, d), byDir(want, d))
				}
			}
		}
	}
	if n < 15 {
		t.Errorf("%d files, want 15 and more", n)
	}
}
