package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Bad input: a clear message, the right status, and nothing half done.
func TestBadInput(t *testing.T) {
	lab.NeedRoot(t)
	a, _ := lab.Pair(t)
	unprivileged(a)
	before := a.Snapshot()
	a.WriteFile("psk644", "x\n", 0o644)
	a.WriteFile("psk", "x\n", 0o600)
	a.WriteFile("bin/bad.conf", "{ raddr 1.2.3.4 } ipsec { encr_algs aes encr_auth_algs sha1 }\n{ radr 1.2.3.4 } ipsec { encr_algs aes }\n{ raddr 1.2.3.400 } drop {}\n", 0o644)
	for _, tt := range []struct {
		line string
		code int
		want string // in what it says, without regard to case
	}{
		{"./missiu", 2, "usage"},
		{"./missiu -h", 0, "startRaw"},
		{"./missiu -i eth0", 2, "usage"},
		{"./missiu -i eth0 frobnicate", 2, "frobnicate"},
		{"./missiu --frobnicate -i eth0 startRaw", 2, "frobnicate"},
		{"./missiu startRaw", 2, "-i"},
		{"./missiu -i", 2, "usage"},
		{"./missiu -i eth0 startRaw stop", 2, "usage"},
		{"./missiu -i eth7 startRaw", 1, "eth7"},
		{"./missiu -i ../../etc startRaw", 2, "../../etc"},
		{"./missiu -i eth0 stop", 1, "eth0"},
		{"./missiu -i eth0 status", 1, "eth0"},
		{"./missiu -i eth0 -l /nowhere/at/all.log startRaw", 1, "/nowhere/at/all.log"},
		{"setpriv --reuid 65534 --clear-groups /run/bin/missiu -i eth0 startRaw", 1, "missiu:"},
		{"unshare -m bash -c 'mount -t tmpfs none /dev/net && ./missiu -i eth0 -l x.log startRaw'", 1, "/dev/net/tun"},
		{"./loadConfig -h", 0, "-f"},
		{"./loadConfig", 2, "usage"},
		{"./loadConfig -X", 2, "usage"},
		{"./loadConfig -f /nowhere.conf", 1, "/nowhere.conf"},
		{"./loadConfig -c bad.conf", 1, "bad.conf:2:3:"},
		{"./loadConfig -f bad.conf", 1, "bad.conf:3:9:"},
		{"./loadConfig -dP", 1, "missiu"},
		{"./ike -h", 0, "-p"},
		{"./ike", 2, "ike -h"},
		{"./ike --frobnicate 192.168.3.118", 2, "frobnicate"},
		{"./ike 192.168.3.118", 3, "ike.conf"},
		{"./ike -p @../nowhere 192.168.3.118", 3, "nowhere"},
		{"./ike -p @../psk644 192.168.3.118", 3, "want 0600"},
		{"./ike -p @../psk 300.1.2.3", 2, "300.1.2.3"},
		{"./ike -p @../psk 192.0.2.77", 1, "192.0.2.77"},
	} {
		t.Run(tt.line, func(t *testing.T) {
			r := a.Try(tt.line)
			if r.Code != tt.code {
				t.Errorf("%v\nwant exit %d", r, tt.code)
			}
			if !strings.Contains(strings.ToLower(r.Out+r.Err), strings.ToLower(tt.want)) {
				t.Errorf("%v\nwant %q in it", r, tt.want)
			}
			if lines := strings.Count(r.Out+r.Err, "\n"); lines == 0 {
				t.Errorf("%v\nwant it to end in a newline", r)
			}
			if strings.Contains(r.Err, "goroutine ") {
				t.Errorf("a stack trace is no message:\n%s", r.Err)
			}
		})
	}
	a.Sh("rm -f /run/x.log /run/missiu.log; rm -rf /run/mount")
	if d := before.Diff(a.Snapshot()); d != "" {
		t.Errorf("something half done:\n%s", d)
	}
}

// unprivileged puts the programs where any user can reach them.
func unprivileged(n *lab.Node) { n.Sh("cp -rL bin /run/bin") }

// One instance for an interface; several for several.
func TestSecondInstance(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	lab.Link(t, a.Host, b.Host, "eth1", prefixes("192.168.4.118/24"), prefixes("192.168.4.119/24"))
	a.StartMissiu()
	pid := a.Status().Pid
	for _, verb := range []string{"startRaw", "start"} {
		r := a.Try("./missiu -i eth0 -l missiu.log " + verb)
		if r.Code != 1 || !strings.Contains(r.Err, fmt.Sprint(pid)) {
			t.Errorf("%v\nwant exit 1 and the pid %d of the first", r, pid)
		}
	}
	if now := a.Status().Pid; now != pid {
		t.Errorf("pid %d, was %d", now, pid)
	}
	a.Do("./missiu -i eth1 start")
	if r := a.Try("./loadConfig -dP"); r.Code == 0 || !strings.Contains(r.Err, "eth0") || !strings.Contains(r.Err, "eth1") {
		t.Errorf("%v\nwant a refusal that names both instances", r)
	}
	a.Do("./loadConfig -i eth1 -dP")
	a.Do("./missiu -i eth1 stop")
	a.Do("./loadConfig -dP")
	a.StopMissiu()
}

// All or nothing: a file with an error changes no policy.
func TestLoadConfigAtomic(t *testing.T) {
	lab.NeedRoot(t)
	a, _ := lab.Pair(t)
	a.StartMissiu()
	a.LoadConfig(policyFor(a, "icmp", aesSHA1))
	was := a.Do("./loadConfig -dP")
	a.WriteFile("bin/bad.conf", "{ raddr 10.0.0.1 } drop {}\n{ raddr 10.0.0.2 } drop {\n", 0o644)
	if r := a.Try("./loadConfig -f bad.conf"); r.Code != 1 || !strings.Contains(r.Err, "bad.conf:") {
		t.Errorf("%v\nwant exit 1 and the place", r)
	}
	if now := a.Do("./loadConfig -dP"); now != was {
		t.Errorf("policies are\n%s\nwere\n%s", now, was)
	}
	a.Do("./loadConfig -FP")
	if n := a.Status().Policies; n != 0 {
		t.Errorf("%d policies after -FP, want 0", n)
	}
}

// The PF_KEY socket endures whatever root throws at it.
func TestSocketAbuse(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	upAll(a, b)
	pings(t, a, 3)
	unprivileged(a)
	sock := "/run/missiu/eth0.pfkey"
	if mode := strings.TrimSpace(a.Must("stat", "-c", "%a %u %F", sock)); mode != "600 0 socket" {
		t.Errorf("socket is %q, want 600 0 socket", mode)
	}
	if r := a.Run("setpriv", "--reuid", "65534", "--clear-groups", "/run/bin/pfkey", sock, "dump"); r.Code == 0 {
		t.Errorf("another user may dump keys: %v", r)
	}
	for _, tt := range []struct{ name, hex string }{
		{"one octet", "02"},
		{"header cut", "020a0003020000000100"},
		{"wrong version", "030a0003020000000100000001000000"},
		{"length beyond the message", "020a0003ff0000000100000001000000"},
		{"length 0", "020a0003000000000100000001000000"},
		{"unknown type", "02c80003020000000100000001000000"},
		{"extension of length 0", "02030003030000000100000001000000" + "0000010000000000"},
		{"extension beyond the message", "02030003030000000100000001000000" + "ff00010000000000"},
		{"ADD without anything", "02030003020000000100000001000000"},
	} {
		r := a.Run("bin/pfkey", sock, "raw", tt.hex)
		if r.Code != 0 || strings.TrimSpace(r.Out) == "0" {
			t.Errorf("%s: %v, want an errno, a closed connection or no answer", tt.name, r)
		}
	}
	deaf := a.Start("bash", "-c", "sleep 1000 | bin/pfkey "+sock+" deaf 20000")
	deaf.Says("deaf after", 60*time.Second)
	pings(t, a, 10)
	if n := len(a.Mature()); n != 2 {
		t.Errorf("%d SAs, want 2", n)
	}
	deaf.Signal(syscall.SIGKILL)
}
