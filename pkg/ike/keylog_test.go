package ike

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
)

// Both sides write the same lines: one for the IKE SA, one for each SA of ESP.
func TestKeyLog(t *testing.T) {
	dir := t.TempDir()
	logTo := func(name string) option {
		return func(c *Config, _ *missiu) {
			k, err := OpenKeyLog(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			c.KeyLog = k
		}
	}
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", logTo("a"))
		b := newNode(t, n, addrB, addrA, "k", logTo("b"))
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
	read := func(name string) map[string]bool {
		p := filepath.Join(dir, name)
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(p); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v; want mode 0600", fi.Mode(), err)
		}
		l := map[string]bool{}
		for line := range strings.Lines(string(text)) {
			l[line] = true
		}
		return l
	}
	la, lb := read("a"), read("b")
	ike := regexp.MustCompile(`^[0-9a-f]{16},[0-9a-f]{16},[0-9a-f]{72},[0-9a-f]{72},"AES-GCM-256 with 16 octet ICV \[RFC5282\]",,,"NONE \[RFC4306\]"\n$`)
	esp := regexp.MustCompile(`^"IPv4","192\.0\.2\.\d","192\.0\.2\.\d","0x[0-9a-f]{8}","AES-CBC \[RFC3602\]","0x[0-9a-f]{64}","HMAC-SHA-1-96 \[RFC2404\]","0x[0-9a-f]{40}"\n$`)
	for line := range la {
		if !lb[line] || !ike.MatchString(line) && !esp.MatchString(line) {
			t.Errorf("line %q: with the peer %v", line, lb[line])
		}
	}
	if len(la) != 4 || len(lb) != 4 { // of the IKE SA those before and after the additional key exchange
		t.Errorf("%d and %d lines, want 4", len(la), len(lb))
	}
}

func TestKeyLogFile(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(in("good"), []byte("# kept\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(in("open"), nil, 0o640)
	os.Chmod(in("open"), 0o640) // whatever the umask
	os.WriteFile(in("two"), nil, 0o600)
	os.Link(in("two"), in("names"))
	os.Symlink(in("good"), in("link"))
	unix.Mkfifo(in("pipe"), 0o600)
	for name, want := range map[string]string{
		"open": "mode 0640; want 0600", "two": "has 2 names", "link": "is a symbolic link", "pipe": "", ".": "is a directory", "no/file": "no such file",
	} {
		if k, err := OpenKeyLog(in(name)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want %q", name, k, err, want)
		}
	}
	k, err := OpenKeyLog(in("good"))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.line(false, "x"); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(in("good")); string(b) != "# kept\n# unknown to Wireshark: x\n" {
		t.Errorf("got %q", b)
	}
}
