package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain is loadConfig itself where a test wants a process of its own.
func TestMain(m *testing.M) {
	if os.Getenv("LOADCONFIG_TEST_RUN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// repeated is n octets of a text over and over, made as they are read; each
// letter N in it is a number that counts.
type repeated struct {
	unit []byte
	n    int
	rest []byte
	at   int
}

func (r *repeated) Read(p []byte) (n int, err error) {
	for n < len(p) && r.n > 0 {
		if len(r.rest) == 0 {
			r.at++
			var digits [10]byte
			d := digits[:0]
			for v := r.at; v > 0; v /= 10 {
				d = append(d, byte('0'+v%10))
			}
			r.rest = bytes.ReplaceAll(r.unit, []byte("N"), d)
		}
		k := copy(p[n:min(len(p), n+r.n)], r.rest)
		r.rest, n, r.n = r.rest[k:], n+k, r.n-k
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// Whatever comes, it costs bounded time and memory, says so in bounded space,
// and comes to nothing.
func TestHostileSizes(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const mib = 1 << 20
	// The race detector's own memory is several times the program's.
	bounded := runtime.GOOS == "linux"
	if bi, ok := debug.ReadBuildInfo(); ok && slices.Contains(bi.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		bounded = false
	}
	for _, tt := range []struct {
		name, head, unit string
		size             int
		option           string
		want             string // in what it says
		rss              int    // MiB
	}{
		{"1 GiB of nothing", "", strings.Repeat(" ", 4096), 1024 * mib, "-f", "larger than 67108864 octets", 300},
		{"1 GiB of entries", "", "{ raddr 10.0.0.1 ulp tcp } drop {}\n", 1024 * mib, "-f", "larger than 67108864 octets", 300},
		{"1 GiB of keys", "", "add esp spi N\n", 1024 * mib, "-k", "larger than 67108864 octets", 300},
		{"a word of 1 MiB", "{ raddr ", "x", mib, "-f", "-:1:9: word of more than 4096 octets", 100},
		{"a string of 1 MiB", "add 10.0.0.1 10.0.0.2 esp 0x100 -A sha1 \"", "x", mib, "-f", "unterminated string", 100},
		{"a line of 1 MiB", "", "{ rport N ulp tcp dir out } drop {} ", mib, "-c", "-:1:", 200},
		{"a line of 1 MiB of keys", "", "add esp spi N ", mib, "-k", "-:1:", 200},
		{"100,000 errors", "", "{ raddr 10.0.0.N0000 frobnicate N } drop {}\n", 100000 * 48, "-f", "too many errors", 200},
		{"100,000 errors in keys", "", "add esp spi N\n", 100000 * 18, "-k", "too many errors", 200},
		{"more entries than there may be", "", "{}drop{}\n", 10 * mib, "-f", "more than 1048576 entries", 500},
		{"a million policies by ranges", "", "{ raddr 2001:db8::N1-2001:db8:ffff:ffff:ffff:ffff:ffff:fffe laddr 10.0.0.1-2001::1 } drop {}\n", mib, "-f", "mixed address families", 200},
		{"cross product of ranges", "", "{ raddr ::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe laddr ::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe } drop {}\n", 4 * mib, "-f", "stands for more than 4096 policies", 200},
		{"cross product of types", "", "{ raddr ::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe ulp ipv6-icmp type 1-200 code 1-200 } drop {}\n", 2 * mib, "-f", "stands for more than 4096 policies", 200},
		{"constants", "[ ", "cN N ", 17 * mib, "-f", "more than 1048576 constants", 600},
		{"selectors", "{ ", "dir in ", 8 * mib, "-f", "more than 256 words", 100},
		{"alternatives", "{} ipsec { encr_algs gcm } ", "or ipsec { encr_algs gcm } ", 8 * mib, "-f", "more than 256 alternatives", 100},
		{"arguments", "add ", "x ", 8 * mib, "-f", "more than 64 words", 100},
		{"extensions", "add esp ", "reqid 1 ", 8 * mib, "-k", "more than 256 words on a line", 100},
		{"braces", "", "{", 2 * mib, "-f", "not closed", 100},
		{"brackets", "", "[", 2 * mib, "-f", "not closed", 100},
		{"prefixes of all lengths", "", "{ raddr N::/N daddr 1 } drop {}\n", mib, "-f", "too many errors", 200},
		{"zeros", "", "\x00", 2 * mib, "-f", "control character", 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(self, tt.option, "-")
			cmd.Env = append(os.Environ(), "LOADCONFIG_TEST_RUN=1")
			cmd.Stdin = io.MultiReader(strings.NewReader(tt.head), &repeated{unit: []byte(tt.unit), n: tt.size})
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			start := time.Now()
			err := cmd.Run()
			took := time.Since(start)
			if code := cmd.ProcessState.ExitCode(); code != exitFailed {
				t.Errorf("exit %d (%v), want %d", code, err, exitFailed)
			}
			s := out.String()
			if !strings.Contains(s, tt.want) {
				t.Errorf("says %.500s, want %q", s, tt.want)
			}
			if lines := strings.Count(s, "\n"); lines > 110 || len(s) > 64<<10 {
				t.Errorf("says %d octets in %d lines", len(s), lines)
			}
			if strings.Contains(s, "goroutine") {
				t.Errorf("a panic: %.2000s", s)
			}
			rss := int(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) >> 10
			t.Logf("%v, %d MiB", took.Round(time.Millisecond), rss)
			if bounded && rss > tt.rss {
				t.Errorf("took %d MiB, want %d at most", rss, tt.rss)
			}
			if took > 2*time.Minute {
				t.Errorf("took %v", took)
			}
		})
	}
}
