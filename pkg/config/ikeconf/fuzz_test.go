package ikeconf

import (
	"bytes"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
)

// reencode writes the tokens of a file, one a line.
func reencode(src []byte) string {
	toks, _ := scan(src, newList(""))
	var b strings.Builder
	for _, t := range toks {
		if t.kind == str {
			b.WriteString(quoted(string(t.value(src))) + "\n")
		} else {
			b.WriteString(string(src[t.off:t.end]) + "\n")
		}
	}
	return b.String()
}

// FuzzParse: nothing panics; what is accepted re-encodes and means the same;
// what is supported makes a PAD.
func FuzzParse(f *testing.F) {
	for _, c := range readCases(f, "testdata/cases.txt") {
		f.Add(c.in, keysFor(c.in))
	}
	b, err := os.ReadFile("testdata/examples.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, ex := range strings.Split(string(b), "\n-- 4.")[1:] {
		_, in, _ := strings.Cut(ex, "\n")
		conf, secrets, _ := strings.Cut(in, "-- secrets\n")
		f.Add(conf, secrets)
	}
	pem := allFiles(somePEM())
	f.Fuzz(func(t *testing.T, conf, secrets string) {
		cfg, ds := Parse(files(conf, secrets), "ike.conf", "ike.secrets", "")
		if (cfg == nil) != Failed(ds) {
			t.Fatalf("Config %v, messages %v", cfg, ds)
		}
		if cfg == nil {
			return
		}
		bad := Failed(append(Unsupported(cfg), cfg.Load(pem, time.Now())...))
		rules := cfg.Rules(nil)
		if !bad && len(rules) != len(cfg.rules) {
			t.Fatalf("%d of %d rules", len(rules), len(cfg.rules))
		}
		if _, err := pad.NewDB(rules); err != nil {
			t.Fatal(err)
		}
		again, ds := Parse(files(reencode([]byte(conf)), reencode([]byte(secrets))), "ike.conf", "ike.secrets", "")
		if again == nil {
			t.Fatalf("re-encoded: %v", ds)
		}
		again.Load(pem, time.Now())
		got := again.Rules(nil)
		for _, r := range append(got, rules...) { // they hold functions, which are not equal
			r.Trust = nil
		}
		if !reflect.DeepEqual(got, rules) {
			t.Fatalf("re-encoded:\ngot  %+v\nwant %+v", got, rules)
		}
	})
}

// FuzzSecrets: nothing panics, and the file stays as it is.
func FuzzSecrets(f *testing.F) {
	for _, c := range readCases(f, "testdata/secretcases.txt") {
		f.Add([]byte(c.in))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		before := bytes.Clone(src)
		l := newList("")
		for _, s := range parseSecrets(src, l, nil) {
			s.wipe()
		}
		if !bytes.Equal(src, before) {
			t.Fatal("the file was changed")
		}
	})
}

// TestSecretsStaySecret: no message quotes what could be a secret, wherever it
// was put.
func TestSecretsStaySecret(t *testing.T) {
	const marker = "hunter2hunter2"
	for _, in := range []string{
		"M", `"M"`, `{ M }`, `{ "M" }`, `{ label "a" key M }`, `{ label "a" key 0xM }`, `{ label "a" kee M }`, `{ label "a" kee "M" }`,
		`{ label "a" key "M`, `{ label "a" "M" }`, `{ label "a" key "x" M }`, `{ label "a" key = M }`, `{ label "a" key "M" key "M" }`,
		`{ user "a" nt_hash M }`, `{ user "a" password "M" M }`, `{ user "a" password "M" label "M2`, `{ localid M localidtype M remoteid M key "M" }`,
		`{ localid DN localidtype DN remoteid M key "M" }`, `{ ppk_id "a" ppk M }`, `{ key_file "a" passphrase "M" } { key_file "a" passphrase "M" }`,
		"{ label \"a\" key \"M\x01\" }", "{ label \"a\" key M\x01 }", `{ label "a" key "M" } { label "a" key "M" }`, `} M`, `, M {`,
	} {
		in = strings.ReplaceAll(in, "M", marker)
		_, ds := Parse(files(`{ label "a" auth_method preshared remote_addr any }`, in), "ike.conf", "ike.secrets", "")
		if !Failed(ds) {
			t.Errorf("%s: no error", in)
		}
		for _, d := range ds {
			if strings.Contains(d.String(), "hunter") {
				t.Errorf("%s: %v", in, d)
			}
		}
	}
}

func TestFormat(t *testing.T) {
	cfg := load(t, `{ label "a" auth_method preshared remote_addr 10.0.0.2 }`, someKey)
	want := "ikeconf.Config(ike.conf: 1 rules, ike.secrets: 1 entries)"
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if got := fmt.Sprintf(verb, cfg); got != want {
			t.Errorf("%s: got %s, want %s", verb, got, want)
		}
	}
}
