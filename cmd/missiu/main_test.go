package main

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

func TestCommandLine(t *testing.T) {
	keysock.Dir = t.TempDir()
	for _, tt := range []struct {
		args string
		code int
		out  string // in standard output, or of errors in standard error
	}{
		{"-h", exitOK, "usage: missiu"},
		{"--help startRaw", exitOK, "--foreground"},
		{"--help startRaw", exitOK, "--cpuprofile file"},
		{"-V", exitOK, "missiu "},
		{"", exitUsage, "no verb"},
		{"-i lo", exitUsage, "no verb"},
		{"startRaw", exitUsage, "-i INTERFACE is missing"},
		{"-i", exitUsage, "flag needs an argument"},
		{"-i lo startTwice", exitUsage, `unknown verb "startTwice"`},
		{"-i lo start stop", exitUsage, "more than one verb"},
		{"-i lo --frob start", exitUsage, "unknown flag: --frob"},
		{"-i ../x start", exitUsage, "not a name of an interface"},
		{"-i averyverylongname start", exitUsage, "not a name of an interface"},
		{"-i lo --default maybe start", exitUsage, "want pass or drop"},
		{"-i lo --crypto fast start", exitUsage, "want auto or std"},
		{"-i lo --native fast start", exitUsage, "want auto, xdp, packet or raw"},
		{"-i lo --udp fast start", exitUsage, "want auto or plain"},
		{"-i lo --mss 1200 start", exitUsage, "want clamp or keep"},
		{"-i lo --routes all start", exitUsage, "want auto, sa or none"},
		{"-i lo --routes= start", exitUsage, "want auto, sa or none"},
		{"-i lo --tun=a/b start", exitUsage, "not a name of an interface"},
		{"-i lo --tun --tap tap7 start", exitUsage, "want --tun=tap7"},
		{"-i lo --tap tap7 startTun", exitUsage, "want --tun=tap7"},
		{"-i mi-none --tun=vpn start", exitFailed, "mi-none: no such interface"},
		{"-i mi-none --tun --routes none startRaw", exitFailed, "mi-none: no such interface"},
		{"-i lo --vips each startTun", exitUsage, "want shared or own"},
		{"-i lo --vips own startRaw", exitUsage, "want startTun, or --tun"},
		{"-i lo --vips own startInline", exitUsage, "want startTun, or --tun"},
		{"-i mi-none --vips own startTun", exitFailed, "mi-none: no such interface"},
		{"-i mi-none --routes sa startTun", exitFailed, "mi-none: no such interface"},
		{"-i lo --wait fast start", exitUsage, "want adaptive or poll"},
		{"-i lo --abstract name start", exitUsage, "want @ and a name"},
		{"-i lo --abstract @ start", exitUsage, "want @ and a name"},
		{"-i lo --abstract= start", exitUsage, "want @ and a name"},
		{"-i lo --abstract @\x01 start", exitUsage, "want @ and a name"},
		{"-i lo --abstract @" + strings.Repeat("n", 107) + " start", exitUsage, "want @ and a name"},
		{"-i mi-none --abstract @" + strings.Repeat("n", 106) + " start", exitFailed, "mi-none: no such interface"},
		{"-i lo --offload some start", exitUsage, "want auto or none"},
		{"-i mi-none start", exitFailed, "mi-none: no such interface"},
		{"-i mi-none stop", exitFailed, "no missiu is running"},
		{"-i mi-none status", exitFailed, "no missiu is running"},
		{"status", exitFailed, "no missiu is running"},
		{"-i mi-none monitor", exitFailed, "no missiu is running"},
		{"-i mi-none monitor low -c 3", exitFailed, "no missiu is running"},
		{"-i lo tap", exitUsage, "want high or low"},
		{"-i lo tap up", exitUsage, "want high or low"},
		{"-i lo tap high low", exitUsage, "want high or low"},
		{"tap high", exitUsage, "-i INTERFACE is missing"},
		{"-i mi-none tap high", exitFailed, "no missiu is running"},
		{"monitor", exitUsage, "-i INTERFACE is missing"},
		{"-i lo monitor up", exitUsage, "want high, low or nothing"},
		{"-i lo monitor high low", exitUsage, "want high, low or nothing"},
		{"-i lo monitor -c -1", exitUsage, "want a number of frames"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(strings.Fields(tt.args), &stdout, &stderr)
		text := stdout.String()
		if tt.code != exitOK {
			if text != "" {
				t.Errorf("%q: standard output %q", tt.args, text)
			}
			text = stderr.String()
		}
		if code != tt.code || !strings.Contains(text, tt.out) {
			t.Errorf("%q: exit %d, %q; want %d, %q", tt.args, code, text, tt.code, tt.out)
		}
		if tt.code == exitUsage && !strings.Contains(text, "usage:") {
			t.Errorf("%q: no usage in %q", tt.args, text)
		}
	}
}

func TestTAPMTU(t *testing.T) {
	for _, tt := range []struct{ link, inner, want int }{
		{1500, 1379, 1379}, {1500, 1440, 1440}, {1300, 1179, 1280}, {576, 516, 516}, {100, 40, 68},
	} {
		if got := tapMTU(tt.link, tt.inner); got != tt.want {
			t.Errorf("tapMTU(%d, %d) = %d, want %d", tt.link, tt.inner, got, tt.want)
		}
	}
}

func TestStatusText(t *testing.T) {
	s := Status{Interface: "eth0", Pid: 7, Since: time.Now(), Counters: map[string]uint64{"in_protected": 3, "drop_in_auth": 0}, Paths: map[string]string{"native esp": "x"}}
	var b bytes.Buffer
	s.print(&b)
	if got := b.String(); !strings.Contains(got, "in protected") || strings.Contains(got, "drop in auth") || !strings.Contains(got, "pid 7") {
		t.Errorf("got %s", got)
	}
}

func TestDiverted(t *testing.T) {
	remotes := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	if v4, v6 := diverted(ipsec.Bypass, remotes); len(v4) != 1 || v4[0] != remotes[0] || len(v6) != 1 || v6[0] != remotes[1] {
		t.Errorf("default pass: got %v and %v", v4, v6)
	}
	if v4, v6 := diverted(ipsec.Discard, remotes); len(v4) != 1 || v4[0].Bits() != 0 || len(v6) != 1 || v6[0].Bits() != 0 {
		t.Errorf("default drop: got %v and %v, want everything", v4, v6)
	}
}

// Sockets without a server: of a killed instance, and of none at all.
func TestStatusOfTheDead(t *testing.T) {
	keysock.Dir = t.TempDir()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: keysock.Path("eth7"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for args, want := range map[string]string{
		"status":         "eth7: the instance has died; what its policies protect stays blocked until startRaw or stop",
		"-i eth7 status": "eth7: the instance has died",
		"-i eth8 status": "eth8: no missiu is running",
	} {
		var stdout, stderr bytes.Buffer
		if code := run(strings.Fields(args), &stdout, &stderr); code != exitFailed || !strings.Contains(stderr.String(), want) {
			t.Errorf("%s: exit %d, %q; want %q", args, code, stderr.String(), want)
		}
	}
}

func TestProfileCPU(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cpu")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	stop, err := profileCPU(path)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	b, err := os.ReadFile(path)
	if err != nil || !bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
		t.Errorf("%x %v; want a gzipped profile", b, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v, want 0600", st.Mode(), err)
	}
	if _, err := profileCPU(filepath.Join(path, "below")); err == nil {
		t.Error("a file below a file was made")
	}
}
