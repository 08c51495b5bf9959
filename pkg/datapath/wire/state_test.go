package wire

import (
	"errors"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/internal/nstest"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

func TestReversePath(t *testing.T) {
	for _, k := range []struct{ all, own, during string }{
		{"0", "0", "0"}, {"0", "1", "2"}, {"1", "0", "2"}, {"1", "1", "2"}, {"2", "1", "1"}, {"0", "2", "2"},
	} {
		t.Run(k.all+k.own, func(t *testing.T) {
			newLab(t)
			sh(t, "echo "+k.all+" >/proc/sys/net/ipv4/conf/all/rp_filter; echo "+k.own+" >/proc/sys/net/ipv4/conf/e0/rp_filter")
			get := func() string { return sh(t, "cat /proc/sys/net/ipv4/conf/e0/rp_filter") }
			w := openWire(t)
			if got := get(); got != k.during {
				t.Errorf("%+v: got %s while open", k, got)
			}
			w.Close()
			if got := get(); got != k.own {
				t.Errorf("%+v: got %s after Close", k, got)
			}
		})
	}
	sh(t, "echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter")
}

// abandon closes what SIGKILL would close, and nothing else.
func abandon(w *Wire) {
	w.closing.Store(true)
	close(w.stop)
	w.events.Close()
	w.following.Wait()
	w.reader.file.Close()
	w.sender.close()
	w.chain.c.CloseLasting()
	w.handle.Close()
	w.closeOnce.Do(func() {})
}

func TestKilled(t *testing.T) {
	l := newLab(t)
	sh(t, "echo 1 >/proc/sys/net/ipv4/conf/e0/rp_filter")
	before := state(t)
	w := openWire(t)
	divert(t, w)
	d, err := tap.Open(tap.Options{For: "e0"})
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	abandon(w)
	blocked := func() bool {
		return exec.Command("ip", "netns", "exec", l.peer, "ping", "-c1", "-W1", "-I", "10.9.0.2", "10.9.0.1").Run() != nil
	}
	if !blocked() {
		t.Error("a killed instance lets clear packets in")
	}
	// The next one keeps the divert set until it is told another.
	v := openWire(t)
	if !blocked() {
		t.Error("the next instance lets clear packets in")
	}
	if got := sh(t, "nft list ruleset"); !strings.Contains(got, "172.16.0.0/12") || !strings.Contains(got, "2001:db8::/32") {
		t.Errorf("divert set not kept:\n%s", got)
	}
	abandon(v)
	if ok, err := Cleanup("e0"); !ok || err != nil {
		t.Errorf("Cleanup: got %v, %v", ok, err)
	}
	if after := state(t); after != before {
		t.Errorf("Cleanup left\n%s\nwant\n%s", after, before)
	}
	if ok, err := Cleanup("e0"); ok || err != nil {
		t.Errorf("second Cleanup: got %v, %v, want nothing to do", ok, err)
	}
	if m, _ := filepath.Glob(Dir + "/*"); len(m) != 0 {
		t.Errorf("files left: %v", m)
	}
}

// Odd names, which the kernel allows, and many prefixes.
func TestOddNameManyPrefixes(t *testing.T) {
	newLab(t)
	name := `é_"{$@\`
	if out, err := exec.Command("ip", "link", "add", name, "type", "veth", "peer", "name", "mi-odd").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer exec.Command("ip", "link", "del", name).Run()
	w, err := Open(name, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var v4, v6 []netip.Prefix
	for i := range 30000 {
		v4 = append(v4, netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0}), 25))
		v6 = append(v6, netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0, byte(i >> 8), byte(i)}), 41))
	}
	v4 = append(v4, prefixes("255.255.255.255/32", "0.0.0.0/8", "20.0.0.0/16")...)
	start := time.Now()
	if err := w.SetDivert(v4, v6); err != nil {
		t.Fatal(err)
	}
	t.Logf("60,000 prefixes in %v", time.Since(start))
	if err := w.SetDivert(prefixes("0.0.0.0/0"), prefixes("::/0")); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, "nft list ruleset"); !strings.Contains(got, "0.0.0.0/0") {
		t.Errorf("set: %s", got)
	}
}

func TestPrivileges(t *testing.T) {
	newLab(t)
	before := state(t)
	for _, k := range []struct {
		capability int
		name       string
	}{{unix.CAP_NET_RAW, "CAP_NET_RAW"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}} {
		nstest.Without(t, k.capability, func() {
			w, err := Open("e0", Options{})
			if p := (*tap.PrivilegeError)(nil); !errors.As(err, &p) || p.Capability != k.name {
				t.Errorf("got %v, want a *PrivilegeError for %s", err, k.name)
			}
			if w != nil {
				w.Close()
			}
		})
	}
	if after := state(t); after != before {
		t.Errorf("left\n%s\nwant\n%s", after, before)
	}
}
