package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
)

func TestRunExits(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := write("good", "correct horse battery\n", 0o600)
	open := write("open", "correct horse battery\n", 0o644)
	odd := write("odd", "0x123\n", 0o600)
	empty := write("empty", "\n", 0o600)
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
		{[]string{"-p", "@" + good}, 2, "", "no local address"},
		{[]string{"-x", "10.0.0.1"}, 2, "", "-x"},
		{[]string{"-v", "1", "10.0.0.1"}, 2, "", "IKEv1 is not supported; use -v 2"},
		{[]string{"-v", "3", "10.0.0.1"}, 2, "", "want 2"},
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
		{[]string{"-n", "-p", "@" + empty}, 3, "", "empty key"},
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

func TestOwner(t *testing.T) {
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
	if _, err := readPrivate(p); err == nil || !strings.Contains(err.Error(), "owned by uid 1000; want 0") {
		t.Errorf("got %v, want a refusal", err)
	}
}

func TestSecret(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"text", "text"}, {"0x74657874", "text"}, {"0xyz", "0xyz"}, {" 0x00", " 0x00"}, {"a\nb", "a\nb"},
	} {
		k, visible, err := readSecret(tt.in, nil)
		if err != nil || !visible || !k.Equal(ipsec.NewKey([]byte(tt.want))) {
			t.Errorf("%q: got %q, %v, %v; want %q", tt.in, k.Bytes(), visible, err, tt.want)
		}
	}
	for _, tt := range []struct{ in, want string }{
		{"text\n", "text"}, {"text\n\n", "text\n"}, {"text\r\n", "text"}, {"text", "text"}, {"0x74657874\n", "text"},
	} {
		k, visible, err := readSecret("@-", strings.NewReader(tt.in))
		if err != nil || visible || !k.Equal(ipsec.NewKey([]byte(tt.want))) {
			t.Errorf("standard input %q: got %q, %v, %v; want %q", tt.in, k.Bytes(), visible, err, tt.want)
		}
	}
	if _, _, err := readSecret("@-", bytes.NewReader(make([]byte, maxSecret+1))); err == nil {
		t.Error("unbounded key file accepted")
	}
}

func TestCommandLineRule(t *testing.T) {
	o, err := parseArgs([]string{"-p", "@-", "-c", "10.0.0.2", "-c", "2001:db8::2", "-l", "1h", "-L", "600", "-d", "90s", "10.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	l := &loader{o: o, stdin: strings.NewReader("sixteen octets !"), warn: func(s string) { t.Errorf("warning: %s", s) }}
	for range 2 { // HUP does not read standard input again
		c, err := l.load()
		if err != nil {
			t.Fatal(err)
		}
		r := c.rules.Rules()[0]
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
