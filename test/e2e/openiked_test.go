package e2e

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// preload compiles the library that is preloaded into key daemons of others.
func preload(t *testing.T) string {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("cc"); err != nil {
		t.Skip("no C compiler")
	}
	so := filepath.Join(t.TempDir(), "pfkey-preload.so")
	cmd := exec.Command("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-shared",
		"-o", so, filepath.Join(root, "scripts/pfkey-preload/pfkey-preload.c"), "-ldl")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	return so
}

// startIKED starts OpenIKED on n with missiu as its kernel; conf is the policy
// as far as the secret.
func startIKED(n *lab.Node, so, conf string) *lab.Proc {
	n.WriteFile("iked.conf", conf+" psk \""+lab.PSK+"\"\n", 0o600)
	return n.Start("env", "LD_PRELOAD="+so, "/usr/sbin/iked", "-d", "-v", "-T", "-f", "iked.conf")
}

// spis of the SAs that traffic may use.
func spis(n *lab.Node) map[uint32]bool {
	m := map[uint32]bool{}
	for _, s := range n.Mature() {
		m[s.SPI] = true
	}
	return m
}

// OpenIKED as Debian ships it negotiates a tunnel between the networks behind
// two hosts, rekeys it when missiu says that it expires, and takes it down, and
// missiu carries the traffic in all of this.
func TestOpenIKED(t *testing.T) {
	lab.NeedRoot(t)
	haveProgram(t, "/usr/sbin/iked", "openiked")
	so := preload(t)
	for _, tt := range []struct {
		name, childsa string
		encr, auth    string
		life          time.Duration // 0: no rekeying
	}{
		{name: "defaults", encr: "aes-cbc", auth: "sha384"},
		// Debian's build has no SADB number for HMAC-SHA2-256.
		{name: "AES-CBC SHA2-512", childsa: "childsa enc aes-256 auth hmac-sha2-512", encr: "aes-cbc", auth: "sha512"},
		{name: "rekeying", childsa: "childsa enc aes-128 auth hmac-sha1", encr: "aes-cbc", auth: "sha1", life: 4 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := lab.Pair(t)
			type site struct{ name, host, net string }
			sa, sb := site{"a", "10.1.0.1", "10.1.0.0/24"}, site{"b", "10.2.0.1", "10.2.0.0/24"}
			daemons := map[*lab.Node]*lab.Proc{}
			c := a.CaptureWhole("eth0")
			up := func(n *lab.Node, mode string, here, there site) {
				n.Must("ip", "addr", "add", here.host+"/24", "dev", "lo")
				n.StartMissiu()
				n.Must("ip", "route", "add", there.net, "dev", n.TAP(), "src", here.host)
				conf := fmt.Sprintf("ikev2 \"t\" %s esp from %s to %s local %v peer %v %s srcid %s.test dstid %s.test", mode, here.net, there.net, n.Addr, n.Peer, tt.childsa, here.name, there.name)
				if tt.life > 0 && n == a {
					// Of one side alone: OpenIKED forgets SAs when both begin at once.
					conf += fmt.Sprintf(" lifetime %d", int(tt.life.Seconds()))
				}
				daemons[n] = startIKED(n, so, conf)
			}
			up(b, "passive", sb, sa)
			// The responder is there when it has registered.
			lab.Until(t, 20*time.Second, "OpenIKED to listen", func() (bool, string) {
				return strings.Contains(b.Must("ss", "-Hlnu"), ":500"), daemons[b].Output()
			})
			up(a, "active", sa, sb)
			lab.Until(t, 30*time.Second, "SAs on both hosts", func() (bool, string) {
				return len(a.Mature()) >= 2 && len(b.Mature()) >= 2, daemons[a].Output()
			})
			for _, s := range a.Mature() {
				if s.Encr != tt.encr || s.Auth != tt.auth || s.Mode != "tunnel" {
					t.Errorf("SA 0x%08x: %s %s %s, want %s %s tunnel", s.SPI, s.Encr, s.Auth, s.Mode, tt.encr, tt.auth)
				}
			}
			seen, keys := spis(a), a.Keys()

			if got := a.Ping(10, "10.2.0.1"); got != 10 {
				t.Errorf("ping a to b: %d of 10", got)
			}
			if got := b.Ping(10, "-s", "3000", "10.1.0.1"); got != 10 {
				t.Errorf("ping b to a, larger than a packet: %d of 10", got)
			}
			a.Transfer(b, netip.MustParseAddr(sb.host), 1<<20)
			b.Transfer(a, netip.MustParseAddr(sa.host), 1<<20)

			if tt.life > 0 {
				// Traffic goes on while both SAs are replaced.
				lab.Until(t, 60*time.Second, "all SAs to be new ones", func() (bool, string) {
					if got := a.Ping(10, sb.host); got != 10 {
						t.Errorf("ping while rekeying: %d of 10", got)
					}
					now := spis(a)
					old := 0
					for spi := range now {
						if seen[spi] {
							old++
						}
					}
					return len(now) >= 2 && old == 0, daemons[a].Output()
				})
				for spi := range spis(a) {
					seen[spi] = true
				}
			}

			ps := c.Packets()
			lab.NoClear(t, ps)
			from := map[netip.Addr]int{}
			for _, p := range lab.Of(ps, lab.ESP) {
				if tt.life == 0 && !seen[p.SPI] {
					t.Fatalf("ESP of an SA that a does not know: %v", p)
				}
				from[p.Src]++
			}
			if from[a.Addr] < 20 || from[b.Addr] < 20 {
				t.Errorf("ESP packets by sender %v, want many of both", from)
			}
			if tt.life == 0 {
				rows := lab.Decrypt(t, c.Path, keys, "icmp.type == 8 && ip.src == 10.1.0.1", "ip.src", "ip.dst")
				if len(rows) != 10 || rows[0][0] != a.Addr.String()+",10.1.0.1" || rows[0][1] != b.Addr.String()+",10.2.0.1" {
					t.Errorf("tshark opened %d echo requests, want 10: %q", len(rows), rows)
				}
			}
			for _, n := range []*lab.Node{a, b} {
				if d := n.Status().Drops(); d != 0 {
					t.Errorf("%s dropped %d packets", n.Name, d)
				}
			}

			// The initiator takes it down: SAs and policies go on both hosts.
			a.Must("ikectl", "reset", "id", "FQDN/b.test")
			lab.Until(t, 20*time.Second, "SAs and policies to be gone", func() (bool, string) {
				x, y := a.Status(), b.Status()
				return x.SAs+y.SAs+x.Policies+y.Policies == 0, fmt.Sprintf("%+v, %+v\n%s", x, y, daemons[b].Output())
			})
		})
	}
}
