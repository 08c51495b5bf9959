package ipsecconf

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
)

// TestManPage: the tables of ipsecconf(5) have every keyword, and every name of
// an algorithm that they show is one.
func TestManPage(t *testing.T) {
	b, err := os.ReadFile("../../../cmd/loadconfig/ipsecconf.5")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{} // keyword: dialect, or place
	table := false
	for _, line := range strings.Split(string(b), "\n") {
		switch {
		case line == ".TS" || line == ".TE":
			table = line == ".TS"
		case table && strings.Contains(line, "\t"):
			f := strings.Split(line, "\t")
			if len(f) != 3 {
				t.Errorf("%q has %d columns, want 3", line, len(f))
				continue
			}
			for _, k := range strings.Split(f[0], ",") {
				rows[regexp.MustCompile(`[; ].*`).ReplaceAllString(strings.TrimSpace(k), "")] = f[1]
			}
		}
	}
	for _, l := range [][]string{selectorKeys, propertyKeys, actions, commands, {"or"}} {
		for _, k := range l {
			if rows[k] == "" {
				t.Errorf("%s is in no table", k)
			}
		}
	}
	for _, k := range solarisOnlySelectors {
		if rows[k] != "S" {
			t.Errorf("%s is of dialect %q, want S", k, rows[k])
		}
	}
	for _, k := range nanosecOnlyProperties {
		if rows[k] != "N" {
			t.Errorf("%s is of dialect %q, want N", k, rows[k])
		}
	}
	for k := range foreignSelectors {
		if !strings.Contains(string(b), k) {
			t.Errorf("%s is not in the page", k)
		}
	}
	for k, where := range rows {
		switch where {
		case "encr_algs":
			if _, ok := encrs[k]; !ok {
				t.Errorf("%s is no encryption algorithm", k)
			}
		case "encr_auth_algs", "ah":
			if a, ok := auths[strings.TrimPrefix(k, "hmac-")]; !ok || a.Info().AHOnly != (where == "ah") {
				t.Errorf("%s is no integrity algorithm of %s", k, where)
			}
		}
	}
	for _, e := range append(alg.AllEncr(), alg.LegacyEncr()...) {
		if rows[e.String()] != "encr_algs" {
			t.Errorf("%v is in no table", e)
		}
	}
	for _, a := range slices.Concat(alg.AllInteg(), alg.AHInteg(), alg.LegacyInteg()) {
		if rows[a.String()] == "" {
			t.Errorf("%v is in no table", a)
		}
	}
}

// TestManExamples: the examples of the page load without an error.
func TestManExamples(t *testing.T) {
	b, err := os.ReadFile("../../../cmd/loadconfig/ipsecconf.5")
	if err != nil {
		t.Fatal(err)
	}
	_, s, _ := strings.Cut(string(b), ".SH EXAMPLES\n.nf\n")
	s, _, ok := strings.Cut(s, ".fi")
	if !ok || len(load(t, s)) == 0 {
		t.Errorf("no examples in %q", s)
	}
}
