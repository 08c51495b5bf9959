package ipsecconf

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/config/lexer"
)

// repeated repeats a unit up to n octets, in which N is a number that counts, H
// the same in hexadecimal, and @1 and @2 count to 128, the second more slowly.
func repeated(head, unit, tail string, n int) string {
	var b strings.Builder
	b.WriteString(head)
	for k := 0; b.Len()+len(unit)+len(tail) <= n; k++ {
		if !strings.ContainsAny(unit, "NH@") {
			b.WriteString(unit)
			continue
		}
		strings.NewReplacer("N", fmt.Sprint(k), "H", fmt.Sprintf("%x", k), "@1", fmt.Sprint(k%129), "@2", fmt.Sprint(k/129%129)).WriteString(&b, unit)
	}
	b.WriteString(tail)
	return b.String()
}

var costly = []struct{ name, head, unit, tail string }{
	{"plain", "", "{ raddr 10.0.N.1 ulp tcp } ipsec { encr_algs gcm }\n", ""},
	{"plain6", "", "{ raddr 2001:db8::H ulp tcp rport 1 } drop {}\n", ""},
	{"open braces", "", "{", ""},
	{"open brackets", "", "[", ""},
	{"closing", "", "}", ""},
	{"zeros", "", "\x00", ""},
	{"quotes", "", "\"", ""},
	{"backslash", "", "\\\n", ""},
	{"escapes", "add a b esp 0x100 -A sha1 \"", "\\\"", ""},
	{"semicolons", "", ";", ""},
	{"words", "", "x ", ""},
	{"one word", "{ raddr ", "x", ""},
	{"numbers", "{ rport ", "9", " } drop {}"},
	{"hex", "{ rport 0x", "f", " } drop {}"},
	{"colons", "{ raddr ", ":", " } drop {}"},
	{"comment", "{", "#", ""},
	{"comments", "{", "#\n", ""},
	{"unknown selectors", "", "{ radr x } drop {}\n", ""},
	{"unknown selectors of an entry", "{ ", "radr dir ", "} drop {}"},
	{"repeated", "{ ", "dir in ", "} drop {}"},
	{"near misses", "{ ", "encr_auth_alg raddr 1 ", "} drop {}"},
	{"actions", "", "{} dropp {}\n", ""},
	{"many alternatives", "", "{} ipsec { encr_algs gcm }" + strings.Repeat(" or ipsec { encr_algs gcm }", 255) + "\n", ""},
	{"alternatives", "{} ipsec { encr_algs gcm }", " or ipsec { encr_algs gcm }", ""},
	{"constants", "[ ", "cN N ", "]"},
	{"constants again", "[ ", "c 1 ", "]"},
	{"constants differ", "[ ", "c N ", "]"},
	{"arguments", "add ", "x ", ";"},
	{"adds", "", "add 10.0.0.1 10.0.0.2 esp 0x1000 -A sha1 \"12345678901234567890\";", ""},
	{"adds of SAs", "", "add 10.0.0.1 10.0.0.2 ah 0x1H00 -A hmac-sha1 \"12345678901234567890\";\n", ""},
	{"tunnel adds", "{ raddr 10.0.0.0/8 } ipsec { encr_auth_algs sha1 tladdr 10.0.0.1 traddr 10.0.0.2 }\n", "add 10.0.0.1 10.0.0.2 ah 0x1H00 -A hmac-sha1 \"12345678901234567890\";\n", ""},
	{"flushes", "", "flush;", ""},
	{"flushes between adds", "", "add 10.0.0.1 10.0.0.2 esp 0x1000 -A sha1 \"12345678901234567890\";flush;", ""},
	{"spdflushes", "", "{}drop{}spdflush;", ""},
	{"everything", "", "{}drop{}\n", ""},
	{"ports", "", "{rport N}drop{}\n", ""},
	{"all lengths", "", "{raddr ::1/@1 laddr ::1/@2 ulp tcp lport 1 rport N}drop{}\n", ""},
	{"few ranges", strings.Repeat("{raddr ::1-ffff::fffe}drop{}\n", 25), "#\n", ""},
	{"few ranges of ports", strings.Repeat("{raddr ::1-ffff::fffe lport 1 ulp 6 rport 2}drop{}\n", 25), "#\n", ""},
	{"few alternately", strings.Repeat("{raddr 0.0.0.1-0.255.255.254 lport 1}drop{}\n{raddr 0.0.0.1-0.255.255.254 rport 2}ipsec{encr_algs gcm}\n", 40), "#\n", ""},
	{"ranges", "", "{raddr ::1-ffff::fffe}drop{}\n", ""},
	{"ranges crossed", "", "{raddr ::1-7f00:: laddr ::1-7f00::}drop{}\n", ""},
	{"ranges crossed4", "", "{raddr 0.0.0.1-255.255.255.254 laddr 0.0.0.1-255.255.255.254}drop{}\n", ""},
	{"ranges protected", "", "{raddr 0.0.0.1-255.255.255.254 laddr 0.0.0.1-255.255.255.254}ipsec{encr_algs gcm}\n", ""},
	{"ranges differ", "", "{raddr 0.0.0.1-255.25.N.254 laddr 0.0.0.1-255.255.255.254 rport N}ipsec{encr_algs gcm}\n", ""},
	{"types", "", "{ulp icmp type 0-15 code 1-250}drop{}\n", ""},
	{"types alternately", "", "{ulp icmp type 0-15 code 1-250 raddr 10.0.0.N}drop{}\n{ulp icmp type 0-15 code 1-250 raddr 10.0.0.N}ipsec{encr_algs gcm}\n", ""},
	{"alternately", "", "{raddr 10.0.N.1}ipsec{encr_algs gcm}\n{raddr 10.1.N.1}drop{}\n", ""},
	{"alternately by ports", "", "{lport N}ipsec{encr_algs gcm}\n{rport N ulp 6}drop{}\n", ""},
	{"tunnels", "", "{tunnel tun0 negotiate tunnel raddr 10.0.N.1}ipsec{encr_algs gcm}\n", ""},
	{"tunnels repeated", "", "{tunnel tun0 negotiate transport}ipsec{encr_algs gcm}\n", ""},
	{"tunnels unknown", "", "{tunnel tN negotiate transport}ipsec{encr_algs gcm}\n", ""},
	{"names", "", "{raddr dual.example.com laddr dual.example.com rport N}drop{}\n", ""},
	{"names unknown", "", "{raddr hN laddr hN}drop{}\n", ""},
}

// cpu is what loading takes, in what this process uses of processors: others do
// not count.
func cpu(src string, most int) time.Duration {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			panic(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := used()
	var l lexer.List
	Parse(src, &l).contents(&l, testOptions(), most)
	l.Errors()
	return used() - start
}

// TestCost: whatever a text of 64 KiB says, reading it costs no more than a few
// plain files of as many policies, and four times the text not much more than
// four times as much.
func TestCost(t *testing.T) {
	const size, most = 64 << 10, 8000
	base := repeated("", "{ rport N ulp tcp raddr 2001:db8::H } ipsec { encr_algs gcm }\n", "", most/2*60)
	plain := min(cpu(base, most), cpu(base, most), cpu(base, most))
	t.Logf("%d policies cost %v", most, plain)
	for _, c := range costly {
		src, long := repeated(c.head, c.unit, c.tail, size), repeated(c.head, c.unit, c.tail, 4*size)
		for tries := 1; ; tries++ { // what the runtime does beside it counts too
			once, four := cpu(src, most), cpu(long, most)
			if once <= 4*plain && four <= 8*once+plain {
				break
			}
			if tries == 5 {
				t.Errorf("%s: %v, and of four times the size %v; %d plain policies cost %v", c.name, once, four, most, plain)
				break
			}
			plain = max(plain, cpu(base, most)) // a busy machine may have become slower
		}
	}
}
