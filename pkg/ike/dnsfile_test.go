package ike

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/missiu/missiu/pkg/ike/sa"
)

// The file has the name servers of all IKE SAs that have some for it, and is gone
// with the last; what is not ours is left alone then.
func TestDNSFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "resolv.conf")
	var f dnsFiles
	a, b, c := new(lineage), new(lineage), new(lineage)
	lease := func(domain string, dns ...string) (l sa.Lease) {
		for _, s := range dns {
			l.DNS = append(l.DNS, netip.MustParseAddr(s))
		}
		if domain != "" {
			l.Domains = []string{domain}
		}
		return l
	}
	peer := netip.MustParseAddr("192.0.2.2")
	check := func(what string, err error, want string) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		got, err := os.ReadFile(file)
		if want == "" {
			if !os.IsNotExist(err) {
				t.Errorf("%s: still there: %s", what, got)
			}
		} else if string(got) != want {
			t.Errorf("%s: got\n%s\nwant\n%s", what, got, want)
		}
		if l, _ := filepath.Glob(filepath.Join(dir, ".*")); len(l) > 0 {
			t.Errorf("%s: left behind: %v", what, l)
		}
	}
	const first = dnsMark + "# rule \"work\", peer 192.0.2.2: 10.0.0.53 fd00::53 for corp.example.com\n"
	check("first", f.add(file, dnsUser{a, "work", peer, lease("corp.example.com", "10.0.0.53", "fd00::53")}),
		first+"nameserver 10.0.0.53\nnameserver fd00::53\nsearch corp.example.com\n")
	if fi, err := os.Stat(file); err != nil || fi.Mode() != 0o644 {
		t.Errorf("mode %v, %v; a resolver of another user reads it", fi.Mode(), err)
	}
	check("its successor", f.add(file, dnsUser{b, "work", peer, lease("corp.example.com", "10.0.0.53", "fd00::53")}),
		first+"nameserver 10.0.0.53\nnameserver fd00::53\nsearch corp.example.com\n")
	check("another rule", f.add(file, dnsUser{c, "a\nnameserver 6.6.6.6", peer, lease("", "10.9.0.53")}),
		first+"# rule \"a\\nnameserver 6.6.6.6\", peer 192.0.2.2: 10.9.0.53\nnameserver 10.0.0.53\nnameserver fd00::53\nnameserver 10.9.0.53\nsearch corp.example.com\n")
	check("first gone", f.remove(file, a), first+"# rule \"a\\nnameserver 6.6.6.6\", peer 192.0.2.2: 10.9.0.53\nnameserver 10.0.0.53\nnameserver fd00::53\nnameserver 10.9.0.53\nsearch corp.example.com\n")
	check("second gone", f.remove(file, b), dnsMark+"# rule \"a\\nnameserver 6.6.6.6\", peer 192.0.2.2: 10.9.0.53\nnameserver 10.9.0.53\n")
	check("all gone", f.remove(file, c), "")
	check("twice", removeDNSFile(file), "")

	const theirs = "nameserver 192.0.2.53\n"
	if err := os.WriteFile(file, []byte(theirs), 0o644); err != nil {
		t.Fatal(err)
	}
	check("somebody else's", removeDNSFile(file), theirs)
	if err := f.add(filepath.Join(dir, "none", "x"), dnsUser{a, "work", peer, lease("", "10.0.0.53")}); err == nil {
		t.Error("written to a directory that is not there")
	}
}
