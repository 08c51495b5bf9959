package ikeconf

import (
	"os"
	"strings"
	"testing"
)

// acceptCase is one case of testdata/cases.txt or secretcases.txt.
type acceptCase struct {
	kind, name, in string
	want           []string
}

func readCases(t testing.TB, file string) (cs []acceptCase) {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b = []byte(strings.NewReplacer("^M", "\r", "^I", "\t").Replace(string(b)))
	inWant := false
	for _, line := range strings.SplitAfter(string(b), "\n")[1:] {
		rest, head := strings.CutPrefix(strings.TrimRight(line, "\n"), "-- ")
		switch {
		case rest == "want" && head:
			inWant = true
		case head:
			kind, name, _ := strings.Cut(rest, " ")
			cs = append(cs, acceptCase{kind: kind, name: name})
			inWant = false
		case inWant && strings.TrimSpace(line) != "":
			c := &cs[len(cs)-1]
			c.want = append(c.want, strings.TrimRight(line, "\n"))
		case !inWant && len(cs) > 0:
			cs[len(cs)-1].in += line
		}
	}
	return cs
}

// compare checks messages against a case, without file names.
func (c acceptCase) compare(t *testing.T, ds []Diagnostic) {
	t.Helper()
	var got []string
	for _, d := range ds {
		if !d.Warning || c.kind == "warn" {
			got = append(got, strings.TrimPrefix(d.String(), d.File+":"))
		}
	}
	if g, w := strings.Join(got, "\n"), strings.Join(c.want, "\n"); g != w {
		t.Errorf("%s %s:\n%s\ngot:\n%s\nwant:\n%s", c.kind, c.name, c.in, g, w)
	}
}

func quoted(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// keysFor writes a secrets file with a key for every label of a configuration.
func keysFor(conf string) string {
	out := `{ user "u" password "p" }`
	seen := map[string]bool{}
	for _, b := range parse([]byte(conf), newList("")).rules {
		if b.label != "" && !seen[b.label] {
			out += "{ label " + quoted(b.label) + ` key "0123456789abcdef" }`
			seen[b.label] = true
		}
	}
	return out
}

func TestAcceptance(t *testing.T) {
	cs := readCases(t, "testdata/cases.txt")
	if len(cs) != 89 {
		t.Fatalf("%d cases", len(cs))
	}
	for _, c := range cs {
		t.Run(c.name, func(t *testing.T) {
			cfg, ds := Parse(files(c.in, keysFor(c.in)), "ike.conf", "ike.secrets", "")
			c.compare(t, ds)
			if (cfg == nil) != (c.kind == "reject") {
				t.Errorf("Config %v", cfg)
			}
			if cfg != nil {
				Unsupported(cfg)
				cfg.Rules(nil)
			}
		})
	}
}

func TestSecretAcceptance(t *testing.T) {
	for _, c := range readCases(t, "testdata/secretcases.txt") {
		t.Run(c.name, func(t *testing.T) {
			l := newList("ike.secrets")
			parseSecrets([]byte(c.in), l, func(s string) bool { return s == "a" || s == "b" })
			c.compare(t, l.All())
		})
	}
}

// TestExamples: part 4 of the reference is without errors.
func TestExamples(t *testing.T) {
	b, err := os.ReadFile("testdata/examples.txt")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, ex := range strings.Split(string(b), "\n-- 4.")[1:] {
		name, in, _ := strings.Cut(ex, "\n")
		conf, secrets, _ := strings.Cut(in, "-- secrets\n")
		n++
		t.Run("4."+name, func(t *testing.T) {
			if cfg, ds := Parse(files(conf, secrets), "ike.conf", "ike.secrets", ""); cfg == nil {
				t.Errorf("%v", ds)
			}
		})
	}
	if n != 10 {
		t.Errorf("%d examples", n)
	}
}
