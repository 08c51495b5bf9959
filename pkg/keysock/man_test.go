package keysock

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
)

// The tables of missiu(8) have every algorithm with its number, key lengths and
// level.
func TestManPage(t *testing.T) {
	b, err := os.ReadFile("../../cmd/missiu/missiu.8")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	want := func(name string, number int, bits []int, level ...string) {
		t.Helper()
		var keys []string
		for _, n := range bits {
			keys = append(keys, strconv.Itoa(n))
		}
		level = slices.DeleteFunc(level, func(s string) bool { return s == "" })
		row := strings.Join([]string{name, strconv.Itoa(number), strings.Join(keys, ", "), strings.Join(level, ", ")}, "\t")
		if !slices.Contains(lines, row) {
			t.Errorf("missiu(8) lacks the row %q", row)
		}
	}
	word := func(is bool, yes, no string) string {
		if is {
			return yes
		}
		return no
	}
	for _, e := range append(alg.AllEncr(), alg.LegacyEncr()...) {
		i := e.Info()
		bits := []int{0}
		if i.KeyBits != nil {
			bits = slices.Clone(i.KeyBits)
		}
		for k := range bits {
			bits[k] += i.SaltLen * 8
		}
		want(i.Name, int(encrNumbers[e]), bits, word(e.Legacy(), "legacy", "IKE"), word(i.Old, "old", ""))
	}
	for _, a := range slices.Concat(alg.AllInteg(), alg.AHInteg(), alg.LegacyInteg()) {
		i := a.Info()
		want(i.Name, int(integNumbers[a]), []int{i.KeyLen * 8}, word(a.Legacy(), "legacy", "IKE"), word(i.Old, "old", ""), word(i.AHOnly, "AH", ""))
	}
}
