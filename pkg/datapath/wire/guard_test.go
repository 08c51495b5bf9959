package wire

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMissing(t *testing.T) {
	if err := missing(nftError(unix.EINVAL)); !errors.Is(err, unix.EINVAL) || err.Error() != "nftables: invalid argument (load the kernel module nf_tables)" {
		t.Errorf("got %v", err)
	}
	if err := missing(nftError(unix.ENOMEM)); err.Error() != "nftables: cannot allocate memory" {
		t.Errorf("got %v", err)
	}
}

// tamper runs a line of shell that changes w's table, and waits until that is noticed and
// the table's listing is want again.
func tamper(t *testing.T, w *Wire, line, want string) {
	t.Helper()
	sh(t, line)
	select {
	case err := <-w.Tampered():
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
	case <-time.After(time.Minute):
		t.Fatalf("%s: not noticed", line)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		got, _ := exec.Command("nft", "list", "table", "netdev", "missiu-e0").Output()
		if strings.TrimSpace(string(got)) == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: got\n%s\nwant\n%s", line, got, want)
		}
	}
}

// What other administrators of the packet filter take away comes back, with the
// contents of the sets.
func TestTableComesBack(t *testing.T) {
	l := newLab(t)
	before := state(t)
	sh(t, "nft add table netdev other; nft add table inet other")
	w := openWire(t)
	divert(t, w)
	want := sh(t, "nft list table netdev missiu-e0")
	for _, line := range []string{
		"nft flush ruleset",
		"nft delete table netdev missiu-e0",
		"nft flush chain netdev missiu-e0 v6",
		"nft delete chain netdev missiu-e0 ingress",
		"nft flush ruleset; nft flush ruleset",
	} {
		tamper(t, w, line, want)
	}
	if exec.Command("ip", "netns", "exec", l.peer, "ping", "-c1", "-W1", "-I", "10.9.0.2", "10.9.0.1").Run() == nil {
		t.Error("clear packets pass a table that was put back")
	}
	// Our own changes, and those of other tables, are none of this.
	w.setMu.Lock() // so the last is told
	select {
	case <-w.Tampered():
	default:
	}
	w.setMu.Unlock()
	sh(t, "nft add table netdev other; nft add table inet other; nft delete table netdev other; nft add table netdev other")
	divert(t, w)
	sh(t, "ip addr add 10.9.0.77/24 dev e0; ip addr del 10.9.0.77/24 dev e0")
	if err := w.SetDivert(nil, nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-w.Tampered():
		t.Errorf("foreign changes count as ours: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	sh(t, "nft delete table netdev other; nft delete table inet other")
	if after := state(t); after != before {
		t.Errorf("Close left\n%s\nwant\n%s", after, before)
	}
}
