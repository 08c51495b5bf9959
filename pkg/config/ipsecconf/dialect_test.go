package ipsecconf

import (
	"fmt"
	"strings"
	"testing"
)

// TestSolarisSizes: a line of Solaris has 1024 octets at most, an entry 8192;
// all else takes longer ones.
func TestSolarisSizes(t *testing.T) {
	entry := "{ raddr 192.0.2.1 dir out } drop {}"
	line := func(n int) string { return entry + " #" + strings.Repeat("x", n-len(entry)-2) + "\n" }
	// Of n octets, the last brace included, on lines that are short.
	long := func(n int) string {
		s := "{ raddr 192.0.2.1\n"
		const end = "dir out } drop {}"
		for n-len(s)-len(end) > 100 {
			s += "#" + strings.Repeat("x", 98) + "\n"
		}
		s += strings.Repeat(" ", n-len(s)-len(end)) + end
		if len(s) != n {
			t.Fatalf("made %d octets, want %d", len(s), n)
		}
		return s
	}
	for _, tt := range []struct{ name, src, want string }{
		{"line", line(1024), ""},
		{"line too long", entry + "\n" + line(1025), "2:1025: line of 1025 octets: Solaris takes 1024"},
		{"comment too long", "#" + strings.Repeat("x", 1024), "1:1025: line of 1025 octets: Solaris takes 1024"},
		{"last line too long", strings.TrimSpace(line(2000)), "1:1025: line of 2000 octets: Solaris takes 1024"},
		{"entry", long(8192), ""},
		{"entry too long", "\n" + long(8193), "2:1: entry of 8193 octets: Solaris takes 8192"},
		{"two entries", long(8192) + "\n" + long(8192), ""},
		{"behind it", long(8192) + strings.Repeat(" ", 100) + "# and more", ""},
	} {
		for _, d := range []Dialect{Union, NanoSec, Solaris} {
			opt := testOptions()
			opt.Dialect = d
			_, l := Load("", strings.NewReader(tt.src), opt)
			var got string
			for _, e := range l.Errors() {
				got += e.String()
			}
			want := tt.want
			if d != Solaris {
				want = ""
			}
			if got != want {
				t.Errorf("%s, dialect %q: got %q, want %q", tt.name, d, got, want)
			}
		}
	}
	// Of many, the first are told of.
	opt := testOptions()
	opt.Dialect = Solaris
	_, l := Load("", strings.NewReader(strings.Repeat(line(1025), 1000)), opt)
	if n := len(l.Errors()); n < 100 || n > maxMessages+1 {
		t.Errorf("%d errors of a thousand long lines", n)
	}
}

// TestBuildDependent: selectors that only some builds of NanoSec have are
// errors in every dialect, which say what would be right, and no other.
func TestBuildDependent(t *testing.T) {
	for key, want := range foreignSelectors {
		opt := testOptions()
		for _, opt.Dialect = range []Dialect{Union, NanoSec, Solaris} {
			for _, value := range []string{"1", "10.0.0.1", "10.0.0.1,10.0.0.2", "10.0.0.1 , 10.0.0.2"} {
				_, l := Load("", strings.NewReader("{ "+key+" "+value+" rport 80 ulp tcp } drop {}"), opt)
				es := l.Errors()
				if w := fmt.Sprintf("1:3: %s: only some builds of NanoSec know it; %s", key, want); len(es) != 1 || es[0].String() != w {
					t.Errorf("%s %s: got %v, want %q", key, value, es, w)
				}
			}
		}
	}
	if _, l := Load("", strings.NewReader("{ ifid 1 } drop { ifid 2 }"), testOptions()); len(l.Errors()) != 2 || !strings.Contains(l.Errors()[1].Text, "unknown property") {
		t.Errorf("among the properties: %v", l.Errors())
	}
}
