package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

const (
	keyHex = "000102030405060708090a0b0c0d0e0f"
	macHex = "a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3"
)

func addLine(spi int, more string) string {
	return fmt.Sprintf("add esp spi %#x src 192.0.2.9 dst 192.0.2.1 encr_alg aes encrkey %s auth_alg sha1 authkey %s %s\n", spi, keyHex, macHex, more)
}

// file writes a private file.
func file(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// want runs loadConfig and compares the exit status and a part of what it says.
// Nothing it says has a key in it.
func (r *rig) want(code int, part, text string, args ...string) string {
	r.t.Helper()
	got, out, err := r.run(text, args...)
	if got != code || !strings.Contains(out+err, part) {
		r.t.Errorf("%q: exit %d, %s%s\nwant %d, %q", args, got, out, err, code, part)
	}
	for _, key := range []string{keyHex, macHex, strings.ToUpper(keyHex), keyHex[:16], macHex[:16]} {
		if strings.Contains(out+err, key) {
			r.t.Errorf("%q shows a key:\n%s%s", args, out, err)
		}
	}
	return out
}

func (r *rig) calls() (l []string) {
	r.look(func(b *backend) { l, b.calls = b.calls, nil })
	return l
}

// The life of a key file: placed, placed again, changed, refused, flushed.
func TestKeyFile(t *testing.T) {
	r := newRig(t)
	two := file(t, addLine(0x100, "")+addLine(0x101, "hard_addtime 100"))
	r.want(exitOK, "SAs: 2 added, 0 changed, 0 there already, 0 deleted", "", "-k", two)
	r.calls()
	r.want(exitOK, "SAs: 0 added, 0 changed, 2 there already, 0 deleted", "", "-k", two)
	if l := r.calls(); len(l) > 0 {
		t.Errorf("a file placed twice makes %v", l)
	}
	// Also behind a flush what is there stays, with its sequence numbers.
	r.want(exitOK, "SAs: 0 added, 0 changed, 1 there already, 1 deleted", "flush\n"+addLine(0x101, ""), "-k", "-")
	if got := r.spis(); got != "0x00000101" {
		t.Errorf("SAs %s, want the one behind the flush", got)
	}
	if l := r.calls(); len(l) > 0 {
		t.Errorf("calls %v, want no new SA", l)
	}
	// update gives limits, delete and delete-pair take away.
	r.want(exitOK, "1 changed", strings.Replace(addLine(0x101, "hard_bytes 77"), "add", "update", 1), "-k", "-")
	r.want(exitOK, "hard limit 100 s, 77 bytes", "get esp spi 0x101 dst 192.0.2.1\n", "-k", "-")
	r.want(exitOK, "1 changed", "update esp spi 0x101 dst 192.0.2.1 hard_bytes 78\n", "-k", "-") // what is not said stays
	r.want(exitOK, "hard limit 100 s, 78 bytes", "get esp spi 0x101 dst 192.0.2.1\n", "-k", "-")
	back := strings.NewReplacer("192.0.2.9", "192.0.2.1", "192.0.2.1", "192.0.2.9").Replace(addLine(0x102, "pair-spi 0x101"))
	r.want(exitOK, "1 added", back, "-k", "-")
	r.want(exitOK, "2 changed", "update-pair esp spi 0x101 dst 192.0.2.1 hard_bytes 79\n", "-k", "-")
	for _, id := range []string{"0x101 dst 192.0.2.1", "0x102 dst 192.0.2.9"} {
		r.want(exitOK, "79 bytes", "get esp spi "+id+"\n", "-k", "-")
	}
	r.want(exitFailed, "update-pair: 0 SAs go the other way, want one", "delete esp spi 0x102 dst 192.0.2.9\nupdate-pair esp spi 0x101 dst 192.0.2.1 hard_bytes 80\n", "-k", "-")
	r.want(exitOK, "update-pair esp|ah", "help\nexit\nnothing", "-k", "-")
	r.want(exitOK, "2 deleted", "delete-pair esp spi 0x102 dst 192.0.2.9\n", "-k", "-")
	r.want(exitOK, "spi 0x00000100 transport reqid 0 mature", addLine(0x100, "")+"dump\ndelete esp spi 0x100 dst 192.0.2.1\n", "-k", "-")
	if got := r.spis(); got != "" {
		t.Errorf("SAs %s, want none", got)
	}
}

// All or nothing: errors in the file, what cannot be, a refusal in the middle.
func TestKeyFileNothing(t *testing.T) {
	r := newRig(t)
	r.look(func(b *backend) { b.refuseSPI = 0x666 })
	r.want(exitOK, "1 added", addLine(0x100, ""), "-k", "-")
	other := strings.Replace(addLine(0x100, ""), keyHex, "ff"+keyHex[2:], 1)
	for _, tt := range []struct{ name, text, want string }{
		{"error", addLine(0x101, "") + "add esp spi 1\n", "-:2:1: add: dst missing"},
		{"refused", addLine(0x101, "") + addLine(0x102, "") + addLine(0x666, ""), "-:3:1: missiu refused SA esp/192.0.2.1/0x00000666"},
		{"refused behind an update", strings.Replace(addLine(0x100, "hard_bytes 7"), "add", "update", 1) + addLine(0x666, ""), "-:2:1: missiu refused"},
		{"refused behind a flush", "flush\n" + addLine(0x101, "") + addLine(0x666, ""), "-:3:1: missiu refused"},
		{"refused behind a replacement", "flush\n" + other + addLine(0x666, ""), "-:3:1: missiu refused"},
		{"replaced and refused", "delete esp spi 0x100 dst 192.0.2.1\n" + other + addLine(0x101, "") + addLine(0x666, ""), "-:4:1: missiu refused"},
		{"twice", addLine(0x101, "") + addLine(0x101, ""), "-:2:1: add: SA esp/192.0.2.1/0x00000101 is given twice; first at 1:1"},
		{"another key", other, "-:1:1: add: there is another SA"},
		{"no such SA", addLine(0x101, "") + "delete esp spi 0x105 dst 192.0.2.1\n", "-:2:1: delete: there is no SA esp/192.0.2.1/0x00000105"},
		{"from elsewhere", "delete esp spi 0x100 dst 192.0.2.1 src 192.0.2.7\n", "there is no SA"},
		{"update of none", strings.Replace(addLine(0x105, ""), "add", "update", 1), "update: there is no SA"},
		{"update of keys", strings.Replace(other, "add", "update", 1), "cannot change"},
		{"no pair", addLine(0x101, "pair-spi 0x999"), "pair-spi: no SA 0x00000999 goes the other way"},
		{"delete-pair of one", "delete-pair esp spi 0x100 dst 192.0.2.1\n", "0 SAs go the other way, want one"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r.t = t
			r.want(exitFailed, tt.want, tt.text, "-k", "-")
			if got := r.spis(); got != "0x00000100" {
				t.Errorf("SAs %s, want what was there", got)
			}
			r.look(func(b *backend) {
				if b.sas[0].Hard != (ipsec.Lifetime{}) {
					t.Errorf("limits %+v are left", b.sas[0].Hard)
				}
			})
		})
	}
}

// add commands of a policy file: with the policies, all or nothing.
func TestAddCommand(t *testing.T) {
	r := newRig(t)
	add := func(spi int) string {
		return fmt.Sprintf("add 192.0.2.9 192.0.2.1 esp %#x -E aes-cbc 0x%s -A hmac-sha1 0x%s;\n", spi, keyHex, macHex)
	}
	r.want(exitOK, "SAs: 1 added, 0 changed, 0 there already, 0 deleted", "flush; spdflush;\n"+add(0x100)+entry1, "-f", "-")
	r.wantIDs("1:out:0 2:in:0")
	// flush with the same SA behind it keeps it; policies keep theirs.
	r.want(exitOK, "SAs: 1 added, 0 changed, 1 there already, 0 deleted", "flush;\n"+add(0x100)+add(0x101)+entry1, "-f", "-")
	r.look(func(b *backend) { b.refuseSPI = 0x666 })
	r.want(exitFailed, "-:2:1: missiu refused SA", entry2+add(0x666), "-f", "-")
	r.wantIDs("1:out:0 2:in:0")
	r.look(func(b *backend) {
		b.refuse = ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: netip.MustParsePrefix("192.0.2.6/32")}
	})
	r.want(exitFailed, "-:2:1: missiu refused it", add(0x102)+"{ raddr 192.0.2.6 dir out } drop {}\n", "-f", "-")
	if got := r.spis(); got != "0x00000100 0x00000101" {
		t.Errorf("SAs %s, want those of the load before", got)
	}
	r.want(exitFailed, "want hexadecimal digits", strings.Replace(add(0x103), keyHex, "zz"+keyHex[2:], 1), "-f", "-")
}

// spdflush takes the policies of other programs, too.
func TestSPDFlush(t *testing.T) {
	r := newRig(t)
	r.look(func(b *backend) {
		b.AddPolicy(99, &ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Bypass, Priority: 5,
			Sel: ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: netip.MustParsePrefix("192.0.2.1/32")}})
	})
	r.want(exitFailed, "of another program", entry1, "-f", "-")
	r.load("spdflush;\n"+entry1, "-: 2 policies in force: 2 added, 0 changed, 0 unchanged; 1 removed")
	r.wantIDs("2:out:0 3:in:0")
}

// What -s saves is private, has the keys, and can be read again.
func TestSave(t *testing.T) {
	r := newRig(t)
	gcm := "add esp spi 0x200 src 192.0.2.9 dst 192.0.2.1 encr_alg aes-gcm-16 encrkey " + keyHex + "00112233\n"
	r.want(exitOK, "2 added", addLine(0x100, "replay 64")+gcm, "-k", "-", "-q")
	name := filepath.Join(t.TempDir(), "saved")
	if err := os.WriteFile(name, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.want(exitOK, "", "", "-s", name)
	i, err := os.Stat(name)
	if err != nil || i.Mode().Perm() != 0o600 {
		t.Fatalf("%v, mode %v, want 0600", err, i.Mode())
	}
	b, _ := os.ReadFile(name)
	if !strings.Contains(string(b), keyHex) || !strings.Contains(string(b), macHex) {
		t.Errorf("saved\n%s\nwant the keys in it", b)
	}
	r.want(exitOK, "0 added, 0 changed, 2 there already", "", "-k", name, "-q")
	r.want(exitOK, "", "", "-F")
	r.want(exitOK, "2 added", "", "-k", name, "-q")
	if l, err := filepath.Glob(filepath.Join(filepath.Dir(name), ".*")); err != nil || len(l) > 0 {
		t.Errorf("left behind: %v", l)
	}
	// A counter-mode key that was used is not saved: its nonces would come again.
	r.look(func(b *backend) {
		for _, i := range b.sas {
			i.Packets = 1
		}
	})
	code, out, _ := r.run("", "-s", "-")
	if code != exitOK || !strings.Contains(out, "\nadd esp spi 0x00000100") || !strings.Contains(out, "\n# add esp spi 0x00000200") || strings.Contains(out, "00112233") {
		t.Errorf("exit %d, saved\n%s", code, out)
	}
	r.want(exitFailed, "not a regular file", "", "-s", "/dev/null")
}

// TestParanoid: with -p nothing that is saved has a digit of a key in it.
func TestParanoid(t *testing.T) {
	r := newRig(t)
	name := filepath.Join(t.TempDir(), "saved")
	r.want(exitOK, "1 added", addLine(0x100, "replay 64")+"save esp "+name+"\n", "-p", "-k", "-")
	r.want(exitOK, "", "", "-p", "-s", name+"2")
	r.want(exitOK, "", "", "-p", "-d")
	for _, f := range []string{name, name + "2"} {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if s := string(b); strings.Contains(s, keyHex) || strings.Contains(s, macHex) || !strings.Contains(s, " encrkey "+strings.Repeat("X", len(keyHex))+" ") || strings.Contains(s, "read by") {
			t.Errorf("saved\n%s", s)
		}
	}
	r.want(exitFailed, "hexadecimal", "", "-k", name)
}

// TestCourse: what a file says of sequence numbers and idle limits gets to the
// SA, changes by update, and comes back when it is saved.
func TestCourse(t *testing.T) {
	r := newRig(t)
	r.want(exitOK, "1 added", addLine(0x100, "replay 64 replay_value 1000 idle_addtime 60 idle_usetime 30 encap udp nat_rem 10.9.9.9 nat_loc 10.8.8.8 srcidtype fqdn a.example"), "-k", "-")
	check := func(seq uint64, want ipsec.Idle) {
		t.Helper()
		r.look(func(b *backend) {
			for _, i := range b.sas {
				if i.LastSeq != seq || i.Idle != want || i.Encap == nil || i.Encap.OA != netip.MustParseAddr("10.9.9.9") {
					t.Errorf("the SA is %+v", i.SAParams)
				}
			}
			if len(b.sas) != 1 {
				t.Errorf("%d SAs", len(b.sas))
			}
		})
	}
	check(1000, ipsec.Idle{AddTime: time.Minute, UseTime: 30 * time.Second})
	r.want(exitOK, "1 changed", "update esp spi 0x100 dst 192.0.2.1 idle_usetime 5\n", "-k", "-")
	check(1000, ipsec.Idle{AddTime: time.Minute, UseTime: 5 * time.Second})
	r.want(exitFailed, "replay_value of SA esp/192.0.2.1/0x00000100 cannot change", "update esp spi 0x100 dst 192.0.2.1 replay_value 5\n", "-k", "-")
	name := filepath.Join(t.TempDir(), "saved")
	r.want(exitOK, "", "", "-s", name)
	r.want(exitOK, "", "", "-F")
	r.want(exitOK, "1 added", "", "-k", name)
	check(1000, ipsec.Idle{AddTime: time.Minute, UseTime: 5 * time.Second})
}

func TestPrivateFiles(t *testing.T) {
	r := newRig(t)
	name := file(t, addLine(0x100, ""))
	for _, mode := range []os.FileMode{0o640, 0o604, 0o644, 0o620} {
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
		r.want(exitFailed, "open to others", "", "-k", name)
	}
	policy := file(t, "add 192.0.2.9 192.0.2.1 esp 0x100 -A sha1 0x"+macHex+";\n")
	os.Chmod(policy, 0o644)
	r.want(exitFailed, "open to others", "", "-f", policy)
	r.want(exitFailed, "open to others", "", "-c", policy)
	plain := file(t, entry1)
	os.Chmod(plain, 0o644)
	r.want(exitOK, "2 added", "", "-f", plain)
	if os.Geteuid() == 0 {
		os.Chmod(name, 0o600)
		if err := os.Chown(name, 12345, 0); err != nil {
			t.Skip(err)
		}
		r.want(exitFailed, "belongs to another user", "", "-k", name)
	}
	if got := r.spis(); got != "" {
		t.Errorf("SAs %s, want none", got)
	}
	r.want(exitUsage, "keys are not for the command line", "", "add", "esp")
}

// Append, remove, delete by index.
func TestEntries(t *testing.T) {
	r := newRig(t)
	r.load(entry1, "-: 2 policies in force: 2 added, 0 changed, 0 unchanged; 0 removed")
	// A tunnel behind it brings twins for forwarded packets to both.
	r.want(exitOK, "-: 6 policies in force: 4 added, 0 changed, 2 unchanged; 0 removed", entry2, "-a", "-")
	out := r.want(exitOK, "#INDEX 2\n", "", "-l")
	if a, b := strings.Index(out, "192.0.2.2 dir out"), strings.Index(out, "192.0.2.1 dir in"); a < 0 || b < a {
		t.Errorf("-l shows\n%s\nwant what goes out first", out)
	}
	// What is there already is passed over, and said.
	r.want(exitOK, "passed over", entry1+"{ raddr 192.0.2.3 dir out } drop {}\n", "-a", "-")
	r.want(exitOK, "{ raddr 192.0.2.3 dir out } drop {}", "", "-dP")
	// Equal entries go, others do not.
	r.want(exitFailed, "-:1:1: no entry in force is equal to this one", "{ raddr 192.0.2.1 } ipsec { encr_algs gcm }\n", "-r", "-")
	r.want(exitFailed, "no entry in force is equal", "{ raddr 192.0.2.3 dir out } drop {}\n{ raddr 192.0.2.4 dir out } drop {}\n", "-r", "-")
	r.want(exitOK, "1 removed", "{ raddr 192.0.2.3 dir out } drop {}\n", "-r", "-")
	r.want(exitFailed, "there is no entry 7", "", "-d", "7")
	r.want(exitOK, "entry 1: 3 removed", "", "-d", "1")
	r.want(exitOK, "entry 2: 3 removed", "", "-d", "2")
	r.wantIDs("")
	r.want(exitUsage, "want the number of an entry", "", "-d", "x")
	// As Solaris replaces all.
	r.want(exitOK, "2 added", entry1, "-f", "-a", "-")
	r.want(exitOK, "2 unchanged", entry1, "-F", "-a", "-")
}

// Hit counters, and policies that have no SA.
func TestListing(t *testing.T) {
	r := newRig(t)
	r.load(entry1+"{ raddr 192.0.2.7 ulp tcp } ipsec { encr_algs gcm }\n{ raddr 192.0.2.8 dir in } drop {}\n",
		"-: 5 policies in force: 5 added, 0 changed, 0 unchanged; 0 removed")
	r.addSA(0x1000, 0x4000)
	r.look(func(b *backend) { b.spd[0].Packets = 42 })
	out := r.want(exitOK, "packets 42, added 2023-11-14T22:13:20Z, never used, 1 SA\n", "", "-L")
	if n := strings.Count(out, "configured and not up"); n != 2 {
		t.Errorf("%d policies not up, want those of one entry:\n%s", n, out)
	}
	r.want(exitOK, "ulp 6 dir", "", "-l", "-n")
	// The listing is a file that means the same.
	r.want(exitOK, "0 added, 3 changed, 2 unchanged; 0 removed", out, "-f", "-") // only their numbers changed

	var ps []struct {
		Index              int
		Direction, Entry   string
		Packets            uint64
		SAs                *int
		Action, Note       string
		ReqIDs             []uint32
		Added              time.Time
		LastUsed           *time.Time
		ID, Priority       uint32
		NotThere, Anything string
	}
	if err := json.Unmarshal([]byte(r.want(exitOK, "", "", "-dP", "--json")), &ps); err != nil || len(ps) != 5 {
		t.Fatalf("%v, %d policies", err, len(ps))
	}
	if p := ps[0]; p.Index != 1 || p.Direction != "out" || p.Packets != 42 || *p.SAs != 1 || p.Action != "protect" || !strings.HasPrefix(p.Entry, "{ raddr 192.0.2.1") {
		t.Errorf("got %+v", p)
	}
	if p := ps[4]; p.SAs != nil || p.Action != "discard" {
		t.Errorf("got %+v", p)
	}
	var sas []map[string]any
	if err := json.Unmarshal([]byte(r.want(exitOK, "", "", "-d", "--json")), &sas); err != nil || len(sas) != 1 || sas[0]["encr"] != "aes-cbc" || sas[0]["encr_bits"] != 128.0 {
		t.Errorf("%v, got %v", err, sas)
	}
	r.want(exitOK, "", "", "-F")
	if out := r.want(exitOK, "", "", "-d", "--json"); out != "[]\n" {
		t.Errorf("no SAs are %q", out)
	}
}

// monitor tells of what others do, and never of keys.
func TestMonitor(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(context.Background())
	pr, pw := io.Pipe()
	var e bytes.Buffer
	done := make(chan int, 1)
	go func() {
		done <- run(ctx, []string{"monitor"}, streams{strings.NewReader(""), pw, &e})
		pw.Close()
	}()
	lines := make(chan string, 100)
	go func() {
		defer close(lines)
		var b []byte
		for buf := make([]byte, 4096); ; {
			n, err := pr.Read(buf)
			b = append(b, buf[:n]...)
			for i := bytes.IndexByte(b, '\n'); i >= 0; i = bytes.IndexByte(b, '\n') {
				lines <- string(b[:i])
				b = b[i+1:]
			}
			if err != nil {
				return
			}
		}
	}()
	// Until it is registered nothing is told, so the flush is asked for again.
	next := func(want string, cause func()) {
		t.Helper()
		cause()
		again := time.NewTicker(20 * time.Millisecond)
		defer again.Stop()
		deadline := time.After(time.Minute)
		for {
			select {
			case l := <-lines:
				if strings.Contains(l, keyHex) || strings.Contains(l, macHex) {
					t.Errorf("a key is shown: %s", l)
				}
				if strings.Contains(l, want) {
					return
				}
			case <-again.C:
				if want == "sas-flushed all" {
					cause()
				}
			case <-deadline:
				t.Fatalf("no %q", want)
			}
		}
	}
	next("sas-flushed all", func() {
		r.addSA(0x1000, 0)
		r.want(exitOK, "", "", "-F")
	})
	next("sa-added esp 192.0.2.9 -> 192.0.2.1 spi 0x00000100 transport reqid 0", func() { r.want(exitOK, "", addLine(0x100, ""), "-k", "-") })
	next("sa-deleted esp 192.0.2.9 -> 192.0.2.1 spi 0x00000100", func() {
		r.want(exitOK, "", "delete esp spi 0x100 dst 192.0.2.1\n", "-k", "-")
	})
	next("policies-changed", func() { r.want(exitOK, "", entry1, "-f", "-") })
	next("acquire esp 192.0.2.9 -> 192.0.2.1 transport policy 5 reqid 7 seq 1 for 192.0.2.9[5] -> 192.0.2.1[80] proto 6", func() {
		a, b := netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("192.0.2.1")
		r.s.Acquire(keysock.Acquire{Seq: 1, Proto: ipsec.ESP, Src: a, Dst: b, PolicyID: 5, Mode: ipsec.Transport, ReqID: 7,
			Flow: &ipsec.Flow{Src: a, Dst: b, Proto: 6, SrcPort: 5, DstPort: 80}}, 0)
	})
	cancel()
	if code := <-done; code != exitOK {
		t.Errorf("exit %d, %s", code, &e)
	}
}
