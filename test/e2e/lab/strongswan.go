package lab

import (
	"fmt"
	"strings"
	"time"
)

// StrongSwan is a charon with its own user-mode ESP (kernel-libipsec): only
// tunnel mode, only ESP in UDP, so UDP encapsulation is always forced.
type StrongSwan struct {
	h *Host
	*Proc
}

// SwanConn is one connection with one child, both named "t".
type SwanConn struct {
	Local, Remote     string // addresses, which are the identities too
	LocalTS, RemoteTS string // prefixes
	PSK               string
	Cert              *SwanCert // instead of PSK
	IKE, ESP          string    // proposals in swanctl's words; "" for its defaults
	Trap              bool      // the first packet brings the SA up
	Rekey             string    // of the child, such as "5s"; "" for hours
	IKERekey          string
	DPD               string // "" for none
	OpenSSL           bool   // its algorithms before strongSwan's own, which are slow
	Settings          string // further lines of strongswan.conf's section charon
}

// SwanCert is how the two prove who they are by certificates: PEM, and the names
// in the certificates, which are the identities.
type SwanCert struct {
	Own, Key, CA  string
	Local, Remote string
}

// certPlugins are for certificates.
const certPlugins = "pem pkcs1 pkcs8 x509 constraints pubkey "

// The plugins by name: Debian's default is to load what is installed, and
// kernel-libipsec must come before kernel-netlink to get the SAs.
const charonPlugins = "random nonce aes sha1 sha2 hmac kdf gcm chapoly gmp curve25519 openssl kernel-libipsec kernel-netlink socket-default vici"

// StartStrongSwan configures and starts charon on h, in the foreground, and
// ends it with the test.
func StartStrongSwan(h *Host, c SwanConn) *StrongSwan {
	h.t.Helper()
	plugins := charonPlugins
	if c.OpenSSL {
		// Of several that offer an algorithm the first serves; named twice, the last place counts.
		plugins = "openssl " + strings.Replace(plugins, " openssl", "", 1)
	}
	if x := c.Cert; x != nil {
		plugins = certPlugins + plugins
		h.WriteFile("/etc/swanctl/x509/own.pem", x.Own, 0o644)
		h.WriteFile("/etc/swanctl/x509ca/ca.pem", x.CA, 0o644)
		h.WriteFile("/etc/swanctl/private/own.pem", x.Key, 0o600)
	}
	h.WriteFile("/etc/strongswan.conf", `charon {
  load = `+plugins+`
  install_virtual_ip = no
  retransmit_timeout = 1.0
  filelog {
    stderr {
      default = 1
      cfg = 2
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
`+c.Settings+`
}
swanctl {
  load = random
}
`, 0o644)
	h.WriteFile("/etc/swanctl/swanctl.conf", c.config(), 0o600)
	s := &StrongSwan{h: h, Proc: h.Start("/usr/lib/ipsec/charon")}
	Until(h.t, 20*time.Second, "charon to listen", func() (bool, string) {
		if s.Ended() {
			h.t.Fatalf("charon ended:\n%s", s.Output())
		}
		r := h.Run("test", "-S", "/run/charon.vici")
		return r.Code == 0, s.Output()
	})
	if out := h.Must("swanctl", "--load-all"); !strings.Contains(out, "successfully loaded 1 connections") {
		h.t.Fatalf("swanctl: %s", out)
	}
	return s
}

func (c SwanConn) config() string {
	var b strings.Builder
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "    %s = %s\n", key, value)
		}
	}
	b.WriteString("connections {\n  t {\n")
	line("version", "2")
	line("encap", "yes")
	line("mobike", "no")
	line("local_addrs", c.Local)
	line("remote_addrs", c.Remote)
	line("proposals", c.IKE)
	line("rekey_time", c.IKERekey)
	line("dpd_delay", c.DPD)
	if x := c.Cert; x != nil {
		fmt.Fprintf(&b, "    local {\n      auth = pubkey\n      certs = own.pem\n      id = %s\n    }\n", x.Local)
		fmt.Fprintf(&b, "    remote {\n      auth = pubkey\n      id = %s\n    }\n", x.Remote)
	} else {
		fmt.Fprintf(&b, "    local {\n      auth = psk\n      id = %s\n    }\n", c.Local)
		fmt.Fprintf(&b, "    remote {\n      auth = psk\n      id = %s\n    }\n", c.Remote)
	}
	b.WriteString("    children {\n      t {\n")
	line("local_ts", c.LocalTS)
	line("remote_ts", c.RemoteTS)
	line("esp_proposals", c.ESP)
	line("rekey_time", c.Rekey)
	if c.Trap {
		line("start_action", "trap")
	}
	b.WriteString("      }\n    }\n  }\n}\n")
	if c.Cert != nil {
		return b.String()
	}
	fmt.Fprintf(&b, "secrets {\n  ike-t {\n    id = %s\n    secret = \"%s\"\n  }\n}\n", c.Remote, c.PSK)
	return b.String()
}

// Initiate brings IKE SA and child up; it fails the test if that fails.
func (s *StrongSwan) Initiate() {
	s.h.t.Helper()
	s.h.Must("swanctl", "--initiate", "--child", "t", "--timeout", "30")
}

// Rekey rekeys the child, or with ike the IKE SA.
func (s *StrongSwan) Rekey(ike bool) {
	s.h.t.Helper()
	what := "--child"
	if ike {
		what = "--ike"
	}
	s.h.Must("swanctl", "--rekey", what, "t")
}

// SAs is what swanctl tells of the SAs.
func (s *StrongSwan) SAs() string {
	s.h.t.Helper()
	return s.h.Must("swanctl", "--list-sas", "--raw")
}

// Log is charon's log so far.
func (s *StrongSwan) Log() string { return s.Output() }
