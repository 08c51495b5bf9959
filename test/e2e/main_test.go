package e2e

import (
	"encoding/hex"
	"net/netip"
	"os"
	"testing"

	"github.com/missiu/missiu/test/e2e/lab"
)

func TestMain(m *testing.M) {
	code := m.Run()
	lab.RemoveBin()
	os.Exit(code)
}

// prefixes parses addresses with prefix lengths.
func prefixes(s ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, x := range s {
		ps = append(ps, netip.MustParsePrefix(x))
	}
	return ps
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
