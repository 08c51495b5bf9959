package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/control"
	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ipsec"
)

func TestRunExits(t *testing.T) {
	dir := t.TempDir()
	control.Dir = t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(p, []byte(text), mode), os.Chmod(p, mode)); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return p
	}
	good := write("good", "correct horse battery\n", 0o600)
	open := write("open", "correct horse battery\n", 0o644)
	odd := write("odd", "0x123\n", 0o600)
	empty := write("empty", "\n", 0o600)
	// Without the key of its rule: explain does not ask for it.
	conf := write("ike.conf", `rule "a" { auth_method preshared remote_addr 10.0.0.2 }`, 0o644)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(good, link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args     []string
		exit     int
		out, err string // must occur
	}{
		{[]string{"-h"}, 0, "usage: ike", ""},
		{[]string{"?"}, 0, "usage: ike", ""},
		{[]string{"-V"}, 0, "ike ", ""},
		{nil, 2, "", "no local address"},
		{[]string{"status", "--help"}, 0, "usage: ike status", ""},
		{[]string{"status", "10.0.0.1"}, 2, "", `ike status: "10.0.0.1": nothing may follow`},
		{[]string{"status", "-a", "here"}, 2, "", "want an IP address"},
		{[]string{"up"}, 2, "", "ike up: want the label of one rule"},
		{[]string{"down", "a", "b"}, 2, "", "ike down: want the label of one rule"},
		{[]string{"rekey", "--timeout", "-1s", "a"}, 2, "", "want a time above 0"},
		{[]string{"rekey", "--tmieout", "1s", "a"}, 2, "", "unknown flag"},
		{[]string{"-n", "-p", "@" + good, "-g", "14,ecp256"}, 0, "", ""},
		{[]string{"-n", "-p", "@" + good, "-g", "2"}, 2, "", `"2": weak; needs allow_weak yes in a rule of ike.conf`},
		{[]string{"-n", "-p", "@" + good, "-g", "x25518"}, 2, "", "want a group such as 14, ecp256 or x25519"},
		{[]string{"-n", "-g", "14"}, 2, "", "-g: for the rule of -p or -P"},
		{[]string{"-show", "-p", "@" + good, "-c", "10.0.0.7"}, 0, "# and the rule of the command line, with its key for any identity, for [10.0.0.7]", ""},
		{[]string{"explain"}, 2, "", "ike explain: want one capture"},
		{[]string{"explain", "-a", "me", "x"}, 2, "", "want an IP address"},
		{[]string{"explain", "-f", filepath.Join(dir, "none.conf"), "x"}, 3, "", "none.conf"},
		{[]string{"explain", "-f", conf, filepath.Join(dir, "none.pcap")}, 1, "", "no such file"},
		{[]string{"explain", "-f", conf, good}, 1, "", "ike explain: " + good + ": neither pcap nor pcapng"},
		{[]string{"status"}, 1, "", "ike status: no ike is running"},
		{[]string{"up", "a"}, 1, "", "ike up: no ike is running"},
		{[]string{"-p", "@" + good}, 2, "", "no local address"},
		{[]string{"-x", "10.0.0.1"}, 2, "", "-x"},
		{[]string{"-v", "1", "10.0.0.1"}, 2, "", "IKEv1 is not supported; use -v 2"},
		{[]string{"-v", "3", "10.0.0.1"}, 2, "", "want 2"},
		{[]string{"-m", "a", "10.0.0.1"}, 2, "", "a mode of IKEv1, which is not supported"},
		{[]string{"-m", "quick", "10.0.0.1"}, 2, "", "want main or aggressive"},
		{[]string{"-p", "@" + good, "10.0.0.300"}, 2, "", "want an IP address"},
		{[]string{"-p", "@" + good, "-c", "peer", "10.0.0.1"}, 2, "", "want an IP address"},
		{[]string{"-l", "5", "10.0.0.1"}, 2, "", "want a time from 10"},
		{[]string{"-p", "top secret", "-P", "hunter2", "10.0.0.1"}, 2, "", "-P: given twice; first as -p"},
		{[]string{"-n", "-p", "@" + good}, 0, "", ""},
		{[]string{"-n", "-p", "@" + link}, 0, "", ""},
		{[]string{"-n", "-p=@" + good, "-v=2", "-c=10.0.0.2", "-l=8h", "-L", "90m", "-d", "2"}, 0, "", ""},
		{[]string{"-n", "-p", "@" + open}, 3, "", "ike: -p: " + open + ": mode 0644; want 0600"},
		{[]string{"-n", "-P", "@" + dir}, 3, "", "not a regular file"},
		{[]string{"-n", "-p", "@" + filepath.Join(dir, "none")}, 3, "", "no such file"},
		{[]string{"-n", "-p", "@" + odd}, 3, "", "odd number of hex digits"},
		{[]string{"-n", "-p", "@" + empty}, 3, "", ": empty"},
		{[]string{"-p", "@" + good, "--keylog", open, "127.0.0.1"}, 1, "", "--keylog: " + open + ": mode 0644; want 0600"},
		{[]string{"-p", "@" + good, "--keylog", link, "127.0.0.1"}, 1, "", "is a symbolic link"},
		{[]string{"-p", "@" + good, "--keylog", dir, "127.0.0.1"}, 1, "", "is a directory"},
		{[]string{"-n", "-p", "a key of sixteen+"}, 0, "", "ike: warning: -p: key is visible to every user; use -p @FILE"},
		{[]string{"-n", "-p", "@-"}, 0, "", ""},
		{[]string{"-n", "-f", filepath.Join(dir, "none.conf")}, 3, "", "none.conf"},
	} {
		var out, errs bytes.Buffer
		got := run(tt.args, strings.NewReader("from standard input\n"), &out, &errs)
		if got != tt.exit || !strings.Contains(out.String(), tt.out) || !strings.Contains(errs.String(), tt.err) {
			t.Errorf("ike %q: got %d, %q, %q; want %d, %q, %q", tt.args, got, out.String(), errs.String(), tt.exit, tt.out, tt.err)
		}
		for _, secret := range []string{"horse", "hunter2", "top secret", "sixteen+"} {
			if strings.Contains(out.String()+errs.String(), secret) {
				t.Errorf("ike %q: shows a secret: %q", tt.args, errs.String())
			}
		}
	}
}

func TestKeyOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	p := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(p, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(p, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if got := run([]string{"-n", "-p", "@" + p}, nil, &out, &errs); got != exitConfig || !strings.Contains(errs.String(), "owned by uid 1000; want 0") {
		t.Errorf("got %d, %q; want a refusal", got, errs.String())
	}
}

func TestKey(t *testing.T) {
	for _, tt := range []struct {
		arg, stdin, want string
	}{
		{"text", "", "text"}, {"0x74657874", "", "text"}, {" 0x00", "", " 0x00"},
		{"@-", "text\n", "text"}, {"@-", "text\n\n", "text\n"}, {"@-", "0x74657874\n", "text"},
	} {
		l := &loader{o: &options{secret: tt.arg, secretOpt: "-p"}, stdin: strings.NewReader(tt.stdin), warn: func(string) {}}
		k, err := l.readKey()
		if err != nil || !k.Equal(ipsec.NewKey([]byte(tt.want))) {
			t.Errorf("%q, %q: got %q, %v; want %q", tt.arg, tt.stdin, k.Bytes(), err, tt.want)
		}
	}
	l := &loader{o: &options{secret: "@-"}, stdin: bytes.NewReader(make([]byte, 2<<20))}
	if _, err := l.readKey(); err == nil {
		t.Error("unbounded key accepted")
	}
}

func TestConfigurationFile(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(p, []byte(text), mode), os.Chmod(p, mode)); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return p
	}
	write("s", `{ label "a" key "correct horse battery" }`, 0o600)
	good := write("good.conf", "secrets_file s cookie_threshold 0 log_level debug\n"+`rule "a" { auth_method preshared remote_addr 10.0.0.2 dpd_secs 30 }`, 0o644)
	bad := write("bad.conf", `rule "a" { auth_method preshared remote_adr 10.0.0.2 }`, 0o644)
	ca := credtest.CA("CA", credtest.Key("p256", 0))
	write("ca.pem", string(credtest.PEM(ca)), 0o644)
	write("own.key", string(credtest.KeyPEM(ca.Key)), 0o600)
	write("open.key", string(credtest.KeyPEM(ca.Key)), 0o644)
	certs := `secrets_file s rule "a" { auth_method cert remote_addr any remote_id ANY ca_file ca.pem cert_file ca.pem dpd_secs 30 key_file `
	withCert := write("cert.conf", certs+"own.key }", 0o644)
	openCert := write("opencert.conf", certs+"open.key }", 0o644)
	old := write("old.conf", "secrets_file s\n"+`rule "a" { ike_version 1 auth_method preshared remote_addr 10.0.0.2 }`, 0o644)
	write("open", `{ label "a" key "correct horse battery" }`, 0o644)
	open := write("open.conf", "secrets_file open\n"+`rule "a" { auth_method preshared remote_addr 10.0.0.2 }`, 0o644)
	key := write("key", "another battery staple", 0o600)
	for _, tt := range []struct {
		conf string
		exit int
		err  string
	}{
		{good, 0, ""},
		{bad, 3, bad + `:1:34: unknown keyword "remote_adr"; did you mean "remote_addr"?`},
		{old, 3, "IKEv1 is not implemented"},
		{withCert, 0, ""},
		{openCert, 3, openCert + `:1:127: key_file "open.key": mode 0644; want 0600`},
		{open, 3, "mode 0644; want 0600"},
	} {
		var out, errs bytes.Buffer
		if got := run([]string{"-show", "-f", tt.conf}, nil, &out, &errs); got != tt.exit || strings.Contains(out.String(), "\n    dpd_secs 30\n") != (got == 0) {
			t.Errorf("%s: -show: got %d, %q", tt.conf, got, out.String())
		}
		if got := run([]string{"-n", "-f", tt.conf}, nil, &out, &errs); got != tt.exit || !strings.Contains(errs.String(), tt.err) {
			t.Errorf("%s: got %d, %q; want %d, %q", tt.conf, got, errs.String(), tt.exit, tt.err)
		}
		if strings.Contains(errs.String(), "horse") {
			t.Errorf("%s: shows a secret: %q", tt.conf, errs.String())
		}
	}
	o, err := parseArgs([]string{"-f", good, "-p", "@" + key, "-l", "2h", "-L", "600", "-d", "5", "10.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	l := &loader{o: o, warn: func(s string) { t.Errorf("warning: %s", s) }}
	c, err := l.load()
	if err != nil {
		t.Fatal(err)
	}
	rs := c.rules.Rules()
	if len(rs) != 2 || rs[0].Label != "a" || rs[0].DPD != 30*time.Second || rs[1].Label != "command line" || rs[0].PSK.Local.Len() != 21 {
		t.Errorf("got %+v", rs)
	}
	// Values of the command line replace those of the top level, not a rule's own.
	for _, r := range rs {
		if r.IKE.Hard != 2*time.Hour || r.ChildHard.AddTime != 10*time.Minute {
			t.Errorf("rule %q: got %v, %v; want the command line's", r.Label, r.IKE, r.ChildHard)
		}
	}
	if !c.limits.AlwaysCookie || c.level.String() != "debug" || c.ikePort != 500 || c.nattPort != 4500 {
		t.Errorf("got %+v", c)
	}
}

func TestCommandLineRule(t *testing.T) {
	o, err := parseArgs([]string{"-p", "@-", "-c", "10.0.0.2", "-c", "2001:db8::2", "-l", "1h", "-L", "600", "-d", "90s", "10.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	o.groups = []alg.KE{alg.KEMODP2048}
	l := &loader{o: o, stdin: strings.NewReader("sixteen octets !"), warn: func(s string) { t.Errorf("warning: %s", s) }}
	for range 2 { // HUP does not read standard input again
		c, err := l.load()
		if err != nil {
			t.Fatal(err)
		}
		r := c.rules.Rules()[0]
		for _, p := range r.Proposals {
			if len(p.KE) != 1 || p.KE[0] != alg.KEMODP2048 || p.AddKE != nil {
				t.Errorf("-g 14: %+v", p)
			}
		}
		if len(c.rules.Rules()) != 1 || r.Label != "command line" || len(r.Remote) != 2 || r.IKE.Hard != time.Hour ||
			r.ChildHard.AddTime != 10*time.Minute || r.ChildSoft.AddTime != 9*time.Minute || r.DPD != 90*time.Second || r.PSK.Local.Len() != 16 {
			t.Errorf("got %+v", r)
		}
	}
}

func TestDuration(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want time.Duration
		ok   bool
	}{
		{"5", 5 * time.Minute, true}, {"90s", 90 * time.Second, true}, {"2h", 2 * time.Hour, true}, {"1d", 24 * time.Hour, true}, {"0", 0, true},
		{"", 0, false}, {"s", 0, false}, {"5w", 0, false}, {"010", 0, false}, {"-5", 0, false}, {"1.5", 0, false}, {"1m5s", 0, false},
	} {
		if got, err := duration(tt.in, time.Minute); (err == nil) != tt.ok || tt.ok && got != tt.want {
			t.Errorf("%q: got %v, %v; want %v, %v", tt.in, got, err, tt.want, tt.ok)
		}
	}
}

// Of --timeout a number is seconds, as of every other time.
func TestTimeout(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"90": 90 * time.Second, "90s": 90 * time.Second, "2m": 2 * time.Minute, "1d": 24 * time.Hour, "1m30s": 90 * time.Second, "500ms": 500 * time.Millisecond,
		"0": 0, "-5s": 0, "x": 0, "": 0, "5w": 0,
	} {
		var d timeout
		if err := d.Set(in); (err == nil) != (want > 0) || err == nil && time.Duration(d) != want {
			t.Errorf("%q: got %v, %v; want %v", in, time.Duration(d), err, want)
		}
	}
}
