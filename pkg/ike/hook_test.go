package ike

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/missiu/missiu/pkg/ike/pad"
)

// The hook of a rule is run when the IKE SA comes and, after that is over, when it
// goes; one that others could have written is not.
func TestHook(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	file := filepath.Join(dir, "hook")
	script := "#!/bin/sh\n[ $1 = up ] && sleep 0.2\necho \"$1 $IKE_RULE $IKE_PEER $IKE_PEER_ID [$IKE_ADDR4$IKE_DNS]\" >>" + out + "\n"
	if err := os.WriteFile(file, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	once := func(mode os.FileMode) *node {
		os.Chmod(file, mode)
		var a *node
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			a = newNode(t, n, addrA, addrB, "k", ruleTo("k", func(r *pad.Rule) { r.Hook = file }, addrB))
			b := newNode(t, n, addrB, addrA, "k")
			if err := a.Up(t.Context(), "gate"); err != nil {
				t.Error(err)
			}
			a.stop(t)
			b.stop(t)
		})
		return a
	}
	once(0o755)
	b, _ := os.ReadFile(out)
	if want := "up gate 192.0.2.2 192.0.2.2 []\ndown gate 192.0.2.2 192.0.2.2 []\n"; string(b) != want {
		t.Errorf("got %q, want %q", b, want)
	}
	os.Remove(out)
	a := once(0o777)
	if b, err := os.ReadFile(out); err == nil {
		t.Errorf("a hook that others can write has run: %q", b)
	}
	found := false
	for _, e := range a.logs.FilterMessage("hook").All() {
		found = found || strings.Contains(e.ContextMap()["error"].(string), "writable by others")
	}
	if !found {
		t.Error("nobody is told why")
		a.dump(t)
	}
}
