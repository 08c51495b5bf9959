package ikeconf

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// memFiles are files in memory.
type memFiles map[string]memFile

type memFile struct {
	data string
	mode fs.FileMode
	uid  uint32
}

func files(conf, secrets string) memFiles {
	return memFiles{"ike.conf": {conf, 0o644, 0}, "ike.secrets": {secrets, 0o600, 0}}
}

func (m memFiles) UID() int { return 0 }

func (m memFiles) Open(name string) (fs.File, error) {
	f, ok := m[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &openMem{f, strings.NewReader(f.data)}, nil
}

type openMem struct {
	memFile
	*strings.Reader
}

func (f *openMem) Stat() (fs.FileInfo, error) { return f, nil }
func (f *openMem) Close() error               { return nil }
func (f *openMem) Name() string               { return "" }
func (f *openMem) Size() int64                { return int64(len(f.data)) }
func (f *openMem) Mode() fs.FileMode          { return f.mode }
func (f *openMem) ModTime() time.Time         { return time.Time{} }
func (f *openMem) IsDir() bool                { return f.mode.IsDir() }
func (f *openMem) Sys() any                   { return &syscall.Stat_t{Uid: f.uid} }

// TestFiles: what makes files unfit, and what is said of missing secrets.
func TestFiles(t *testing.T) {
	const (
		conf  = `{ label "a" auth_method preshared remote_addr 10.0.0.2 }`
		certs = `{ label "a" auth_method cert cert_file c key_file k ca_file a remote_id ANY remote_addr 10.0.0.2 }`
	)
	good := memFile{someKey, 0o600, 0}
	for _, tt := range []struct {
		name          string
		conf, secrets memFile
		want          string // of the first message; "" none
	}{
		{"good", memFile{conf, 0o644, 0}, good, ""},
		{"stricter", memFile{conf, 0o400, 0}, memFile{someKey, 0o400, 0}, ""},
		{"secrets for the group", memFile{conf, 0o644, 0}, memFile{someKey, 0o640, 0}, "ike.secrets: mode 0640; want 0600"},
		{"secrets for all", memFile{conf, 0o644, 0}, memFile{someKey, 0o604, 0}, "ike.secrets: mode 0604; want 0600"},
		{"secrets of another", memFile{conf, 0o644, 0}, memFile{someKey, 0o600, 1000}, "ike.secrets: owned by uid 1000; want 0"},
		{"secrets a pipe", memFile{conf, 0o644, 0}, memFile{someKey, 0o600 | fs.ModeNamedPipe, 0}, "ike.secrets: not a regular file"},
		{"configuration writable by all", memFile{conf, 0o646, 0}, good, "ike.conf: writable by others"},
		{"configuration writable by the group", memFile{conf, 0o664, 0}, good, "ike.conf: writable by others"},
		{"configuration of another", memFile{conf, 0o644, 1000}, good, "ike.conf: writable by others"},
		{"configuration too large", memFile{strings.Repeat(" ", MaxConf+1), 0o644, 0}, good, "ike.conf: larger than 16 MiB"},
		{"configuration as large as may be", memFile{strings.Repeat(" ", MaxConf), 0o644, 0}, memFile{}, "ike.secrets: mode 0777; want 0600"},
		{"key of nobody", memFile{conf, 0o644, 0}, memFile{`{ label "b" key "0123456789abcdef" }`, 0o600, 0}, `ike.conf:1:1: rule "a": no key in ike.secrets`},
		{"key for one side", memFile{conf, 0o644, 0}, memFile{`{ label "a" local_key "0123456789abcdef" }`, 0o600, 0}, `ike.conf:1:1: rule "a": no key in ike.secrets`},
		{"errors of both", memFile{conf + " }", 0o644, 0}, memFile{"{ }", 0o600, 0}, `ike.conf:1:58: unexpected "}"`},
		{"no errors after errors", memFile{conf, 0o644, 0}, memFile{"{ }", 0o600, 0}, "ike.secrets:1:1: entry without a label, identities, user, ppk_id or key_file"},
		{"users", memFile{strings.Replace(certs, "cert ", "preshared remote_auth_method eap ", 1), 0o644, 0}, good, `ike.conf:1:1: rule "a": no user in ike.secrets`},
	} {
		if tt.name == "configuration as large as may be" {
			tt.secrets.mode = 0o777
		}
		cfg, ds := Parse(memFiles{"ike.conf": tt.conf, "ike.secrets": tt.secrets}, "ike.conf", "ike.secrets", "")
		got := ""
		if len(ds) > 0 {
			got = ds[0].String()
		}
		if got != tt.want || (cfg != nil) != (tt.want == "") {
			t.Errorf("%s:\ngot  %s\nwant %s", tt.name, got, tt.want)
		}
	}
	// Absent.
	m := memFiles{"ike.conf": {certs, 0o644, 0}}
	if cfg, ds := Parse(m, "ike.conf", "ike.secrets", ""); cfg == nil {
		t.Errorf("no secrets, none needed: %v", ds)
	}
	m = memFiles{"ike.conf": {conf, 0o644, 0}}
	if cfg, ds := Parse(m, "ike.conf", "", ""); cfg != nil || ds[0].String() != `ike.conf:1:1: rule "a": no key in `+DefaultSecrets {
		t.Errorf("no secrets: %v", ds)
	}
	if cfg, ds := Parse(memFiles{}, "ike.conf", "", ""); cfg != nil || ds[0].String() != "ike.conf: no such file" {
		t.Errorf("no configuration: %v", ds)
	}
	// As configured, from the directory of the configuration.
	m = memFiles{"/x/ike.conf": {"secrets_file s " + conf, 0o644, 0}, "/x/s": good}
	if cfg, ds := Parse(m, "/x/ike.conf", "", ""); cfg == nil || cfg.SecretsPath != "/x/s" {
		t.Errorf("relative secrets_file: %v", ds)
	}
}

// TestOS: the checks on files of the machine.
func TestOS(t *testing.T) {
	dir := t.TempDir()
	path := func(n string) string { return filepath.Join(dir, n) }
	write := func(n, s string, mode fs.FileMode) {
		t.Helper()
		if err := os.WriteFile(path(n), []byte(s), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("ike.conf", `{ label "a" auth_method preshared remote_addr 10.0.0.2 }`, 0o600)
	write("good", someKey, 0o600)
	write("open", someKey, 0o640)
	if err := os.Chmod(path("open"), 0o640); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{os.Symlink("good", path("link")), os.Mkdir(path("dir"), 0o700), syscall.Mkfifo(path("pipe"), 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"good": "", "link": "", "open": "mode 0640; want 0600", "dir": "not a regular file", "pipe": "not a regular file",
	} {
		_, ds := Parse(OS{}, path("ike.conf"), path(name), "")
		got := ""
		if len(ds) > 0 {
			got = ds[0].Text
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestReadKey(t *testing.T) {
	for in, want := range map[string]string{
		"secret\n": "secret", "secret": "secret", "two\nlines\n\n": "two\nlines\n", "0x6869\n": "hi", "dos\r\n": "dos",
	} {
		if k, err := ReadKey(memFiles{"k": {in, 0o600, 0}}, "k"); err != nil || string(k.Bytes()) != want {
			t.Errorf("%q: got %q, %v; want %q", in, k.Bytes(), err, want)
		}
	}
	for in, want := range map[string]string{
		"": "empty", "\n": "empty", "0x\n": "empty", "0x123": "odd number of hex digits", "0xzz": wantSecret,
	} {
		if _, err := ReadKey(memFiles{"k": {in, 0o600, 0}}, "k"); err == nil || err.Error() != want {
			t.Errorf("%q: got %v, want %s", in, err, want)
		}
	}
	if _, err := ReadKey(memFiles{"k": {"x", 0o644, 0}}, "k"); err == nil || err.Error() != "mode 0644; want 0600" {
		t.Errorf("open file: %v", err)
	}
}

// Ten thousand rules, none of them terse, and as many secrets are no file too large.
func TestManyRules(t *testing.T) {
	var conf, secrets strings.Builder
	const n = 10000
	for i := range n {
		fmt.Fprintf(&conf, `rule "branch office number %d" {
    # who they are, and how they prove it
    auth_method  preshared
    remote_addr  10.%d.%d.1
    local_id     FQDN = hub.example.com
    remote_id    FQDN = branch-%[1]d.example.com
    dpd_secs     30
    start_action none
}
`, i, i>>8, i&255)
		fmt.Fprintf(&secrets, "{ label \"branch office number %d\" key \"the secret of branch office number %[1]d\" }\n", i)
	}
	cfg, ds := Parse(memFiles{"ike.conf": {conf.String(), 0o644, 0}, "ike.secrets": {secrets.String(), 0o600, 0}}, "ike.conf", "ike.secrets", "")
	if cfg == nil {
		t.Fatalf("%d octets: %v", conf.Len(), ds)
	}
	if got := len(cfg.Rules(nil)); got != n || conf.Len() < 2<<20 {
		t.Errorf("%d rules of %d octets", got, conf.Len())
	}
}
