package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// backend is an SPD and an SAD in memory, of which only the server's goroutine
// knows. A transaction works on draft.
type backend struct {
	spd, draft []*keysock.PolicyInfo
	sas        []*keysock.SAInfo
	sasBefore  []*keysock.SAInfo // the transaction
	conn       uint64            // of the transaction, 0 none
	nextID     uint32
	nextReq    ipsec.ReqID
	refuse     ipsec.Selector // AddPolicy refuses it
	refuseSPI  ipsec.SPI      // Add refuses it
	calls      []string
}

func (b *backend) list(conn uint64) *[]*keysock.PolicyInfo {
	if conn == b.conn {
		return &b.draft
	}
	return &b.spd
}

func (b *backend) find(conn uint64, ok func(*keysock.PolicyInfo) bool) int {
	return slices.IndexFunc(*b.list(conn), ok)
}

func same(p *ipsec.Policy) func(*keysock.PolicyInfo) bool {
	return func(i *keysock.PolicyInfo) bool { return i.Dir == p.Dir && i.Sel == p.Sel }
}

func (b *backend) AddPolicy(conn uint64, p *ipsec.Policy) (*keysock.PolicyInfo, error) {
	b.calls = append(b.calls, "add")
	if p.Sel == b.refuse {
		return nil, syscall.EINVAL
	}
	if b.find(conn, same(p)) >= 0 {
		return nil, syscall.EEXIST
	}
	b.nextID++
	i := &keysock.PolicyInfo{Policy: *p, Added: time.Unix(1700000000, 0)}
	i.ID = b.nextID
	i.Requests = slices.Clone(p.Requests)
	for k := range i.Requests {
		if r := &i.Requests[k]; r.ReqID == 0 {
			r.ReqID = b.nextReq
			b.nextReq++
		}
	}
	l := b.list(conn)
	*l = append(*l, i)
	return i, nil
}

// UpdatePolicy keeps the reqid of what it replaces, as the engine does.
func (b *backend) UpdatePolicy(conn uint64, p *ipsec.Policy) (*keysock.PolicyInfo, error) {
	k := b.find(conn, same(p))
	if k < 0 {
		return b.AddPolicy(conn, p)
	}
	b.calls = append(b.calls, "update")
	old := (*b.list(conn))[k]
	i := &keysock.PolicyInfo{Policy: *p, Added: old.Added}
	i.ID = old.ID
	i.Requests = slices.Clone(p.Requests)
	for k := range i.Requests {
		if i.Requests[k].ReqID == 0 && k < len(old.Requests) {
			i.Requests[k].ReqID = old.Requests[k].ReqID
		}
	}
	l := slices.Clone(*b.list(conn))
	l[k] = i
	*b.list(conn) = l
	return i, nil
}

func (b *backend) remove(conn uint64, k int) (*keysock.PolicyInfo, error) {
	b.calls = append(b.calls, "delete")
	if k < 0 {
		return nil, syscall.ENOENT
	}
	l := b.list(conn)
	i := (*l)[k]
	*l = slices.Delete(slices.Clone(*l), k, k+1)
	return i, nil
}

func (b *backend) DeletePolicy(conn uint64, dir ipsec.Direction, sel ipsec.Selector) (*keysock.PolicyInfo, error) {
	return b.remove(conn, b.find(conn, same(&ipsec.Policy{Dir: dir, Sel: sel})))
}

func (b *backend) DeletePolicyID(conn uint64, id uint32) (*keysock.PolicyInfo, error) {
	return b.remove(conn, b.find(conn, func(i *keysock.PolicyInfo) bool { return i.ID == id }))
}

func (b *backend) GetPolicy(conn uint64, id uint32) (*keysock.PolicyInfo, error) {
	return nil, syscall.ENOENT
}
func (b *backend) Policies(conn uint64) []*keysock.PolicyInfo { return slices.Clone(*b.list(conn)) }
func (b *backend) FlushPolicies(conn uint64) bool {
	n := len(*b.list(conn))
	*b.list(conn) = nil
	return n > 0
}

func (b *backend) Migrate(*keysock.Migration) error { return syscall.EOPNOTSUPP }

func (b *backend) Begin(conn uint64) error {
	if b.conn != 0 {
		return syscall.EBUSY
	}
	b.conn, b.draft, b.sasBefore = conn, slices.Clone(b.spd), slices.Clone(b.sas)
	return nil
}
func (b *backend) Commit(conn uint64) error { b.spd, b.draft, b.conn = b.draft, nil, 0; return nil }
func (b *backend) Abort(conn uint64) error {
	b.draft, b.conn, b.sas = nil, 0, b.sasBefore
	return nil
}

// StageSA works at once; Abort takes it back.
func (b *backend) StageSA(conn uint64, c keysock.SAChange) (*keysock.SAInfo, error) {
	switch c.Verb {
	case keysock.SAAdd:
		return b.Add(c.P, 0)
	case keysock.SAUpdate:
		return b.Update(c.P, 0)
	}
	return b.Delete(c.P.SAID, netip.Addr{})
}

func (b *backend) Supported() keysock.Supported { return keysock.Supported{} }
func (b *backend) GetSPI(keysock.GetSPI) (*keysock.SAInfo, error) {
	return nil, syscall.ENOSYS
}

func (b *backend) Add(p *ipsec.SAParams, _ uint32) (*keysock.SAInfo, error) {
	if p.SPI == b.refuseSPI {
		return nil, syscall.EINVAL
	}
	if slices.Contains(b.SAIDs(0), p.SAID) {
		return nil, syscall.EEXIST
	}
	b.calls = append(b.calls, "add SA")
	i := &keysock.SAInfo{SAParams: *p, State: keysock.Mature, Added: time.Unix(1700000000, 0)}
	b.sas = append(b.sas, i)
	return i, nil
}

func (b *backend) Update(p *ipsec.SAParams, _ uint32) (*keysock.SAInfo, error) {
	for k, i := range b.sas {
		if i.SAID == p.SAID {
			b.calls = append(b.calls, "update SA")
			n := *i
			n.Hard, n.Soft, n.Idle = p.Hard, p.Soft, p.Idle
			b.sas[k] = &n
			return &n, nil
		}
	}
	return nil, syscall.ESRCH
}

func (b *backend) Delete(id ipsec.SAID, _ netip.Addr) (*keysock.SAInfo, error) {
	k := slices.IndexFunc(b.sas, func(i *keysock.SAInfo) bool { return i.SAID == id })
	if k < 0 {
		return nil, syscall.ESRCH
	}
	i := b.sas[k]
	b.sas = slices.Delete(b.sas, k, k+1)
	return i, nil
}

func (b *backend) Get(id ipsec.SAID, _ netip.Addr) (*keysock.SAInfo, error) {
	k := slices.IndexFunc(b.sas, func(i *keysock.SAInfo) bool { return i.SAID == id })
	if k < 0 {
		return nil, syscall.ESRCH
	}
	c := *b.sas[k]
	c.EncrKey, c.AuthKey = c.EncrKey.Clone(), c.AuthKey.Clone()
	return &c, nil
}

func (b *backend) Flush(ipsec.Protocol) bool {
	n := len(b.sas)
	b.sas = nil
	return n > 0
}

func (b *backend) SAIDs(ipsec.Protocol) []ipsec.SAID {
	var l []ipsec.SAID
	for _, i := range b.sas {
		l = append(l, i.SAID)
	}
	return l
}
func (b *backend) AcquireFailed(uint32, syscall.Errno) {}
func (b *backend) Status() ([]byte, error)             { return []byte("{}"), nil }

// rig is a missiu as loadConfig sees it.
type rig struct {
	t *testing.T
	b *backend
	s *keysock.Server
}

func newRig(t *testing.T) *rig {
	dir, err := os.MkdirTemp("", "lc") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	was := keysock.Dir
	keysock.Dir = dir
	b := &backend{nextReq: 0x4000}
	s, err := keysock.NewServer(keysock.Path("eth0"), b, keysock.ServerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		keysock.Dir = was
	})
	return &rig{t, b, s}
}

// look runs f where the backend may be touched.
func (r *rig) look(f func(b *backend)) {
	done := make(chan struct{})
	r.s.Do(func() {
		defer close(done)
		f(r.b)
	})
	<-done
}

// run runs loadConfig with text as standard input.
func (r *rig) run(text string, args ...string) (code int, out, err string) {
	r.t.Helper()
	var o, e bytes.Buffer
	code = run(context.Background(), args, streams{strings.NewReader(text), &o, &e})
	return code, o.String(), e.String()
}

func (r *rig) load(text, want string) {
	r.t.Helper()
	code, out, err := r.run(text, "-f", "-")
	if code != exitOK || strings.TrimSpace(out) != want {
		r.t.Errorf("%s\nexit %d, %q, %s\nwant %q", text, code, out, err, want)
	}
}

// ids shows the policies as ID:dir:reqid.
func (r *rig) ids() string {
	var l []string
	r.look(func(b *backend) {
		for _, i := range b.spd {
			s := fmt.Sprintf("%d:%v", i.ID, i.Dir)
			for _, q := range i.Requests {
				s += fmt.Sprintf(":%d", q.ReqID-0x4000)
			}
			l = append(l, s)
		}
	})
	return strings.Join(l, " ")
}

const (
	entry1 = "{ raddr 192.0.2.1 } ipsec { encr_algs aes encr_auth_algs sha1 }\n"
	entry2 = "{ raddr 192.0.2.2 } ipsec { encr_algs gcm tladdr 192.0.2.9 traddr 192.0.2.2 }\n"
)

func (r *rig) addSA(spi ipsec.SPI, reqid ipsec.ReqID) {
	r.look(func(b *backend) {
		b.sas = append(b.sas, &keysock.SAInfo{
			SAParams: ipsec.SAParams{
				SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: netip.MustParseAddr("192.0.2.1"), SPI: spi}, Src: netip.MustParseAddr("192.0.2.9"),
				Mode: ipsec.Transport, ReqID: reqid, Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1, ReplayWindow: 64,
				EncrKey: ipsec.NewKey(bytes.Repeat([]byte{0xab}, 16)), AuthKey: ipsec.NewKey(bytes.Repeat([]byte{0xcd}, 20)),
				Hard: ipsec.Lifetime{AddTime: time.Hour, Bytes: 1 << 30},
			},
			State: keysock.Mature, Packets: 5, Bytes: 420, Added: time.Unix(1700000000, 0),
		})
	})
}

func (r *rig) spis() string {
	var l []string
	r.look(func(b *backend) {
		for _, i := range b.sas {
			l = append(l, i.SPI.String())
		}
	})
	return strings.Join(l, " ")
}

func (r *rig) wantIDs(want string) {
	r.t.Helper()
	if got := r.ids(); got != want {
		r.t.Errorf("policies %s, want %s", got, want)
	}
}

// The life of a policy file: loaded, loaded again, edited, emptied.
func TestLoad(t *testing.T) {
	r := newRig(t)
	r.load(entry1, "-: 2 policies in force: 2 added, 0 changed, 0 unchanged; 0 removed")
	r.wantIDs("1:out:0 2:in:0")
	r.addSA(0x1000, 0x4000)

	// The same once more: nothing happens, not even on the wire.
	r.look(func(b *backend) { b.calls = nil })
	r.load(entry1, "-: 2 policies in force: 0 added, 0 changed, 2 unchanged; 0 removed")
	r.wantIDs("1:out:0 2:in:0")
	r.look(func(b *backend) {
		if len(b.calls) > 0 {
			t.Errorf("calls %v, want none", b.calls)
		}
	})

	// An entry in front of it moves it, which its SAs survive. Of a tunnel all
	// three policies share a reqid.
	r.load(entry2+entry1, "-: 6 policies in force: 4 added, 2 changed, 0 unchanged; 0 removed")
	r.wantIDs("1:out:0 2:in:0 3:out:1 4:in:1 5:fwd:1 6:fwd:0")
	if got := r.spis(); got != "0x00001000" {
		t.Errorf("SAs %s, want that of the first load", got)
	}
	r.addSA(0x1001, 0x4001)

	// Other algorithms: other SAs.
	r.load(strings.Replace(entry2, "gcm", "aes", 1)+entry1, "-: 6 policies in force: 0 added, 3 changed, 3 unchanged; 0 removed")
	r.wantIDs("1:out:0 2:in:0 6:fwd:0 7:out:2 8:in:2 9:fwd:2")
	if got := r.spis(); got != "0x00001000" {
		t.Errorf("SAs %s, want that of the unchanged entry", got)
	}

	// An empty file takes everything back.
	r.load("", "-: 0 policies in force: 0 added, 0 changed, 0 unchanged; 6 removed")
	r.wantIDs("")
	if got := r.spis(); got != "" {
		t.Errorf("SAs %s, want none", got)
	}
}

// apply and permit of the same traffic are two sides of one.
func TestApplyPermit(t *testing.T) {
	r := newRig(t)
	r.load("{ daddr 192.0.2.1 } apply { encr_algs aes }\n{ saddr 192.0.2.1 } permit { encr_algs aes }\n"+
		"{ saddr 192.0.2.7 } permit { encr_algs aes }\n", "-: 3 policies in force: 3 added, 0 changed, 0 unchanged; 0 removed")
	r.wantIDs("1:out:0 2:in:0 3:in:1")
}

// Policies of others stay, and are not overwritten.
func TestForeign(t *testing.T) {
	r := newRig(t)
	foreign := func(p string, prio uint32) {
		r.look(func(b *backend) {
			b.AddPolicy(99, &ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Bypass, Priority: prio,
				Sel: ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: netip.MustParsePrefix(p)}})
		})
	}
	foreign("203.0.113.1/32", ipsecconf.PriorityBase-1)
	foreign("203.0.113.2/32", ipsecconf.PriorityLast+1)
	r.load(entry1, "-: 2 policies in force: 2 added, 0 changed, 0 unchanged; 0 removed")
	r.load("", "-: 0 policies in force: 0 added, 0 changed, 0 unchanged; 2 removed")
	r.wantIDs("1:out 2:out")
	code, _, err := r.run(entry1+"{ raddr 203.0.113.2 } drop {}\n", "-f", "-")
	want := "-:2:1: policy 2 of another program (priority 1074790400) has the same selector\nloadConfig: nothing was changed\n"
	if code != exitFailed || !strings.HasSuffix(err, want) {
		t.Errorf("exit %d, %s\nwant %s", code, err, want)
	}
	r.wantIDs("1:out 2:out")
}

// All or nothing: an error in the file, a refusal in the middle.
func TestNothingChanged(t *testing.T) {
	r := newRig(t)
	r.load(entry1, "-: 2 policies in force: 2 added, 0 changed, 0 unchanged; 0 removed")
	for _, tt := range []struct{ name, text, err string }{
		{"error", "{ raddr 192.0.2.5 } drop {}\n{ radr 192.0.2.6 } drop {}\n{ raddr 192.0.2.400 } drop {}\n",
			"-:2:3: unknown selector \"radr\"; did you mean \"raddr\"?\n-:3:9: raddr \"192.0.2.400\": want an address, prefix, range, host or network name\nloadConfig: nothing was changed\n"},
		{"refused", "{ raddr 192.0.2.5 dir out } drop {}\n{ raddr 192.0.2.6 dir out } drop {}\n",
			"-:2:1: missiu refused it: pf_key: X_SPDADD: invalid argument\nloadConfig: nothing was changed\n"},
	} {
		r.look(func(b *backend) {
			b.refuse = ipsec.Selector{Src: netip.MustParsePrefix("0.0.0.0/0"), Dst: netip.MustParsePrefix("192.0.2.6/32")}
		})
		code, out, err := r.run(tt.text, "-f", "-")
		if code != exitFailed || out != "" || err != tt.err {
			t.Errorf("%s: exit %d, %q, got\n%s\nwant\n%s", tt.name, code, out, err, tt.err)
		}
		r.wantIDs("1:out:0 2:in:0")
	}
	r.look(func(b *backend) { b.conn = 77 })
	if code, _, err := r.run(entry1, "-f", "-"); code != exitFailed || !strings.Contains(err, "another program is changing the policies") {
		t.Errorf("exit %d, %s", code, err)
	}
	r.look(func(b *backend) { b.conn = 0 })
}

func TestFlush(t *testing.T) {
	r := newRig(t)
	r.load(entry1, "-: 2 policies in force: 2 added, 0 changed, 0 unchanged; 0 removed")
	r.addSA(0x1000, 0x4000)
	if code, _, err := r.run("", "-F"); code != exitOK || r.spis() != "" || r.ids() == "" {
		t.Errorf("-F: exit %d, %s, SAs %q, policies %q", code, err, r.spis(), r.ids())
	}
	if code, _, err := r.run("", "-FP", "-i", "eth0"); code != exitOK || r.ids() != "" {
		t.Errorf("-FP: exit %d, %s, policies %q", code, err, r.ids())
	}
}

// What -dP shows can be loaded again, and is then the same.
func TestShowPolicies(t *testing.T) {
	r := newRig(t)
	r.load("{ ulp icmp } bypass {}\n"+entry2+entry1, "-: 9 policies in force: 9 added, 0 changed, 0 unchanged; 0 removed")
	code, out, err := r.run("", "-dP")
	if code != exitOK || err != "" {
		t.Fatalf("exit %d, %s", code, err)
	}
	for _, line := range []string{
		"{ raddr 0.0.0.0/0 ulp icmp dir out } bypass {}",
		"{ raddr 192.0.2.2 dir out } ipsec { encr_algs aes-gcm-16 tladdr 192.0.2.9 traddr 192.0.2.2 }",
		"{ raddr 192.0.2.1 dir in } ipsec { encr_algs aes-cbc encr_auth_algs sha1 }",
		"# forwarded packets:",
		"esp tunnel reqid 16384, packets 0, added 2023-11-14T22:13:20Z, never used",
	} {
		if !strings.Contains(out, line) {
			t.Errorf("-dP shows\n%s\nwant %q in it", out, line)
		}
	}
	file := filepath.Join(t.TempDir(), "dump")
	if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, err := r.run("", "-c", file); code != exitOK || !strings.Contains(out, "no errors; 9 policies") {
		t.Errorf("exit %d, %s, %s", code, out, err)
	}
	if code, out, err := r.run("", "-f", file); code != exitOK || !strings.Contains(out, "0 added") || !strings.Contains(out, "0 removed") {
		t.Errorf("exit %d, %s, %s", code, out, err)
	}
}

func TestShowSAs(t *testing.T) {
	r := newRig(t)
	r.addSA(0xc0ffee01, 0x4000)
	code, out, err := r.run("", "-d")
	if code != exitOK || err != "" {
		t.Fatalf("exit %d, %s", code, err)
	}
	want := `esp 192.0.2.9 -> 192.0.2.1 spi 0xc0ffee01 transport reqid 16384 mature
    aes-cbc(128) hmac-sha1, replay window 64, extended sequence numbers no
    packets 5, bytes 420, added 2023-11-14T22:13:20Z, never used
    hard limit 3600 s, 1073741824 bytes
`
	if out != want {
		t.Errorf("got\n%s\nwant\n%s", out, want)
	}
	for _, key := range []string{"abab", "cdcd"} {
		if strings.Contains(strings.ToLower(out), key) {
			t.Errorf("a key is shown:\n%s", out)
		}
	}
}

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	was := keysock.Dir
	keysock.Dir = dir
	defer func() { keysock.Dir = was }()
	good := filepath.Join(dir, "good")
	if err := os.WriteFile(good, []byte(entry1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{nil, exitUsage, "usage"},
		{[]string{"-h"}, exitOK, "-f"},
		{[]string{"-V"}, exitOK, "loadConfig"},
		{[]string{"-X"}, exitUsage, "usage"},
		{[]string{"-f"}, exitUsage, "usage"},
		{[]string{"-f", ""}, exitUsage, "-f: no file"},
		{[]string{"-c"}, exitUsage, "-c: no file"},
		{[]string{"-P"}, exitUsage, "-P"},
		{[]string{"-d", "-F"}, exitUsage, "want one of"},
		{[]string{"-f", good, "more"}, exitUsage, "more"},
		{[]string{"--order", "random", "-d"}, exitUsage, "random"},
		{[]string{"-f", "/nowhere.conf"}, exitFailed, "/nowhere.conf: no such file"},
		{[]string{"-f", dir}, exitFailed, "is a directory"},
		{[]string{"-c", good}, exitOK, "no errors; 2 policies"},
		{[]string{"-c", "-f", good}, exitOK, "no errors; 2 policies"},
		{[]string{"-c", "--order", "solaris", good}, exitOK, "no errors; 2 policies"},
		{[]string{"-dP"}, exitFailed, "no missiu is running"},
		{[]string{"-i", "eth7", "-F"}, exitFailed, "eth7"},
	} {
		var o, e bytes.Buffer
		code := run(context.Background(), tt.args, streams{strings.NewReader(""), &o, &e})
		if both := o.String() + e.String(); code != tt.code || !strings.Contains(both, tt.want) || !strings.HasSuffix(both, "\n") {
			t.Errorf("%q: exit %d, want %d; got\n%s\nwant %q in it", tt.args, code, tt.code, both, tt.want)
		}
	}
}

func TestReport(t *testing.T) {
	var b bytes.Buffer
	report(&b, errors.New("x"))
	if got, want := b.String(), "loadConfig: x\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
