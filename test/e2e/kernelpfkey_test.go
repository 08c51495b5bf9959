package e2e

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

const charonPlugin = "libstrongswan-kernel-pfkey.so"

// kernelPFKEY finds strongSwan's plugin kernel-pfkey, which Debian does not
// build: MISSIU_KERNEL_PFKEY names one made for Debian's charon.
func kernelPFKEY(t *testing.T) string {
	t.Helper()
	for _, path := range []string{os.Getenv("MISSIU_KERNEL_PFKEY"), "/usr/lib/ipsec/plugins/" + charonPlugin} {
		if _, err := os.Stat(path); path != "" && err == nil {
			return path
		}
	}
	t.Skip("no plugin kernel-pfkey of strongSwan, which Debian does not build: set MISSIU_KERNEL_PFKEY to one")
	return ""
}

// startPFKEYCharon starts charon on n with missiu as its kernel.
func startPFKEYCharon(n *lab.Node, so, plugin, local, remote, rekey string) *lab.Proc {
	// The plugins and one more, seen by this host alone.
	n.Sh("cp -a /usr/lib/ipsec/plugins plugins; cp " + plugin + " plugins/" + charonPlugin + "; mount --bind plugins /usr/lib/ipsec/plugins")
	n.WriteFile("/etc/strongswan.conf", `charon {
  load = random nonce aes sha1 sha2 hmac kdf gcm gmp curve25519 openssl kernel-pfkey kernel-netlink socket-default vici
  install_routes = no
  port_nat_t = 0
  filelog {
    stderr {
      default = 1
      knl = 2
    }
  }
  syslog {
    daemon {
      default = -1
    }
    auth {
      default = -1
    }
  }
}
swanctl {
  load = random
}
`, 0o644)
	n.WriteFile("/etc/swanctl/swanctl.conf", `connections {
  t {
    version = 2
    mobike = no
    local_addrs = `+n.Addr.String()+`
    remote_addrs = `+n.Peer.String()+`
    local {
      auth = psk
      id = `+n.Addr.String()+`
    }
    remote {
      auth = psk
      id = `+n.Peer.String()+`
    }
    children {
      t {
        local_ts = `+local+`
        remote_ts = `+remote+`
        esp_proposals = aes128-sha1
        rekey_time = `+rekey+`
        rand_time = 0s
        life_time = 2h
      }
    }
  }
}
secrets {
  ike-t {
    id = `+n.Peer.String()+`
    secret = "`+lab.PSK+`"
  }
}
`, 0o600)
	p := n.Start("env", "LD_PRELOAD="+so, "/usr/lib/ipsec/charon")
	p.Says("spawning", 20*time.Second)
	n.Must("swanctl", "--load-all")
	return p
}

// strongSwan's charon by its plugin kernel-pfkey, which waits for answers without
// a limit and believes what is in them, keys our data path on both hosts.
func TestStrongSwanKernelPFKEY(t *testing.T) {
	lab.NeedRoot(t)
	plugin := kernelPFKEY(t)
	so := preload(t)
	a, b := lab.Pair(t)
	const hostA, hostB = "10.1.0.1", "10.2.0.1"
	c := a.Capture("eth0")
	up := func(n *lab.Node, here, there, local, remote, rekey string) *lab.Proc {
		n.Must("ip", "addr", "add", here+"/24", "dev", "lo")
		n.StartMissiu()
		n.Must("ip", "route", "add", remote, "dev", n.TAP(), "src", here)
		return startPFKEYCharon(n, so, plugin, local, remote, rekey)
	}
	up(b, hostB, hostA, "10.2.0.0/24", "10.1.0.0/24", "1h")
	log := up(a, hostA, hostB, "10.1.0.0/24", "10.2.0.0/24", "4s")
	a.Must("swanctl", "--initiate", "--child", "t", "--timeout", "30")
	if x, y := len(a.Mature()), len(b.Mature()); x != 2 || y != 2 {
		t.Fatalf("%d and %d SAs, want 2 on both\n%s", x, y, log.Output())
	}
	seen := spis(a)
	if got := a.Ping(10, hostB); got != 10 {
		t.Errorf("ping a to b: %d of 10", got)
	}
	if got := b.Ping(10, hostA); got != 10 {
		t.Errorf("ping b to a: %d of 10", got)
	}
	a.Transfer(b, netip.MustParseAddr(hostB), 1<<20)

	// charon reads its traffic counters from GET.
	if s := a.Must("swanctl", "--list-sas"); !strings.Contains(s, "INSTALLED, TUNNEL") || strings.Contains(s, "in  ") && strings.Contains(s, " 0 bytes") {
		t.Errorf("swanctl: %s", s)
	}
	// The soft limit by time, an EXPIRE, makes it rekey. The hard one is far off:
	// where both fall into one second there is only a hard EXPIRE, upon which
	// charon takes its policies away before it begins anew.
	lab.Until(t, 60*time.Second, "all SAs to be new ones", func() (bool, string) {
		if got := a.Ping(10, hostB); got != 10 {
			t.Errorf("ping while rekeying: %d of 10", got)
		}
		now, old := spis(a), 0
		for spi := range now {
			if seen[spi] {
				old++
			}
		}
		return len(now) >= 2 && old == 0, log.Output()
	})
	ps := c.Packets()
	lab.NoClear(t, ps)
	from := map[netip.Addr]int{}
	for _, p := range lab.Of(ps, lab.ESP) {
		from[p.Src]++
	}
	if from[a.Addr] < 20 || from[b.Addr] < 20 {
		t.Errorf("ESP packets by sender %v, want many of both", from)
	}
	a.Must("swanctl", "--terminate", "--ike", "t")
	lab.Until(t, 20*time.Second, "SAs and policies to be gone", func() (bool, string) {
		x, y := a.Status(), b.Status()
		return x.SAs+y.SAs+x.Policies+y.Policies == 0, log.Output()
	})
}
