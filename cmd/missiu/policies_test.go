package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keyengine"
	"github.com/missiu/missiu/pkg/keysock"
)

// recorded is a key engine whose policies are recorded.
type recorded struct {
	*keyengine.Engine
	r *recorder
}

func newRecorded(ifname string) *recorded {
	x := new(recorded)
	x.Engine = keyengine.New(keyengine.Options{SAD: sad.NewDB(), SPD: spd.NewDB(), Policies: func(l []spd.Change, _ bool) { x.r.note(l) }})
	x.r = newRecorder(x.Engine, ifname)
	return x
}

// save is what the recorder does some time after a change. anew: it made a new tape.
func (x *recorded) save(t *testing.T) (anew bool) {
	t.Helper()
	l, ok := x.r.take()
	var err error
	if ok {
		err = x.r.extend(l)
	} else {
		err = x.r.renew(x.r.all())
	}
	if err != nil {
		t.Fatal(err)
	}
	return !ok
}

// rules are the policies in force, without what engines give.
func (x *recorded) rules() (l []ipsec.Policy) {
	for _, p := range x.Rules() {
		q := *p
		q.ID = 0
		l = append(l, q)
	}
	return l
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// allKinds are policies with everything that one may have.
func allKinds() []*ipsec.Policy {
	a, b := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	return []*ipsec.Policy{
		{Dir: ipsec.In, Priority: 7, Action: ipsec.Discard, Sel: ipsec.Selector{Src: pfx("2001:db8::5/64"), Dst: pfx("::/0"), Proto: 58, SrcPort: 129, DstPort: 1}},
		{Dir: ipsec.In, Priority: 7, Action: ipsec.Bypass, Sel: ipsec.Selector{Src: pfx("10.0.0.0/8"), Dst: pfx("0.0.0.0/0"), Proto: 6, DstPort: 22}, Hard: ipsec.Lifetime{AddTime: time.Hour}},
		{
			Dir: ipsec.Out, Priority: 5, Action: ipsec.Protect, Flags: ipsec.PolicyManual | ipsec.PolicyPerFlow,
			Sel:       ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("192.0.2.1/32"), Proto: 1},
			Requests:  []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: ipsec.LevelUnique, ReqID: 0x4000, Src: a, Dst: b}},
			Proposals: []ipsec.Proposal{{Encr: alg.EncrAESCBC, EncrMinBits: 128, EncrMaxBits: 256, Auth: alg.IntegHMACSHA1, Hard: ipsec.Lifetime{AddTime: time.Hour}}, {Encr: alg.EncrAESGCM16, EncrMinBits: 128}},
		},
		{
			Dir: ipsec.Out, Priority: 6, Action: ipsec.Protect,
			Sel:       ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("192.0.2.0/24")},
			Requests:  []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelUnique, ReqID: 9}, {Proto: ipsec.AH, Mode: ipsec.Transport, Level: ipsec.LevelUnique, ReqID: 9}},
			Proposals: []ipsec.Proposal{{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESGCM16, AH: alg.IntegHMACSHA256}, {Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA512}},
		},
	}
}

func (x *recorded) add(t *testing.T, ps ...*ipsec.Policy) {
	t.Helper()
	for _, p := range ps {
		if _, err := x.UpdatePolicy(1, p); err != nil {
			t.Fatalf("%v: %v", p.Sel, err)
		}
	}
}

// restored are the policies of an instance that finds the file.
func restored(t *testing.T) []ipsec.Policy {
	t.Helper()
	y := newRecorded("eth0")
	if err := y.r.restore(); err != nil {
		t.Fatal(err)
	}
	return y.rules()
}

// TestRecord: an instance that finds the record of another has its policies, in
// the same order, however it was killed while it wrote; single changes are
// appended.
func TestRecord(t *testing.T) {
	keysock.Dir = t.TempDir()
	if got := restored(t); got != nil {
		t.Fatalf("without a file: %v", got)
	}
	x := newRecorded("eth0")
	x.add(t, allKinds()...)
	if !x.save(t) {
		t.Error("the first tape is no new one")
	}
	first := x.rules()
	if len(first) != 4 {
		t.Fatalf("%d policies", len(first))
	}
	if got := restored(t); !reflect.DeepEqual(got, first) {
		t.Errorf("got %+v\nwant %+v", got, first)
	}
	path := statePath("eth0")
	s, err := os.Stat(path)
	if err != nil || s.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", s.Mode(), err)
	}

	// One goes, one comes, one changes and keeps its place before its equal.
	p := *allKinds()[0]
	p.Action = ipsec.Bypass
	x.add(t, &p, &ipsec.Policy{Dir: ipsec.In, Priority: 7, Action: ipsec.Discard, Sel: ipsec.Selector{Src: pfx("10.1.0.0/16"), Dst: pfx("0.0.0.0/0")}})
	if _, err := x.DeletePolicy(1, ipsec.Out, allKinds()[3].Sel); err != nil {
		t.Fatal(err)
	}
	if x.save(t) {
		t.Error("a few changes make a new tape")
	}
	second := x.rules()
	if got := restored(t); !reflect.DeepEqual(got, second) || reflect.DeepEqual(first, second) {
		t.Errorf("got %+v\nwant %+v", got, second)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := int(s.Size()); n < len(whole); n++ {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		y := newRecorded("eth0")
		if err := y.r.restore(); err != nil || !reflect.DeepEqual(y.rules(), first) {
			t.Fatalf("%d octets of %d: got %+v, %v\nwant %+v", n, len(whole), y.rules(), err, first)
		}
		// It goes on where the other was.
		y.add(t, &p)
		if y.save(t) {
			t.Fatal("a successor makes a new tape")
		}
		if got := restored(t); !reflect.DeepEqual(got, y.rules()) {
			t.Fatalf("%d octets of %d, and one policy: got %+v\nwant %+v", n, len(whole), got, y.rules())
		}
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}

	// What came later goes behind its equals, though it had a better priority when the
	// tape was made new.
	b := ipsec.Policy{Dir: ipsec.Out, Priority: 20, Action: ipsec.Discard, Sel: ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: pfx("10.9.0.0/16")}}
	c := b
	c.Action, c.Priority, c.Sel.Dst = ipsec.Bypass, 10, pfx("10.9.9.0/24")
	x.add(t, &b, &c)
	if err := x.r.renew(x.r.all()); err != nil {
		t.Fatal(err)
	}
	c.Priority = 20
	x.add(t, &c)
	if x.save(t) {
		t.Error("a changed priority makes a new tape")
	}
	if got := restored(t); !reflect.DeepEqual(got, x.rules()) {
		t.Errorf("got %+v\nwant %+v", got, x.rules())
	}

	// Many changes, and many small ones.
	x.Begin(1)
	many := func(i int) *ipsec.Policy {
		return &ipsec.Policy{Dir: ipsec.Out, Action: ipsec.Bypass, Sel: ipsec.Selector{Src: pfx("0.0.0.0/0"), Dst: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)}), 32)}}
	}
	for i := range manyChanges + 1 {
		x.add(t, many(i))
	}
	if err := x.Commit(1); err != nil {
		t.Fatal(err)
	}
	if !x.save(t) {
		t.Error("many changes are appended")
	}
	if got := restored(t); !reflect.DeepEqual(got, x.rules()) {
		t.Errorf("%d policies, want %d", len(got), len(x.rules()))
	}
	n := 0
	for changes := 0; ; changes += manyChanges {
		for i := range manyChanges {
			x.add(t, many(i))
		}
		if x.save(t) {
			break
		}
		if n++; n > 100 {
			t.Fatal("the tape grows for ever")
		}
	}
	if n == 0 {
		t.Error("a thousand changes make a new tape")
	}
	x.FlushPolicies(1)
	x.save(t)
	if got := restored(t); len(got) != 0 {
		t.Errorf("after a flush: %v", got)
	}
	if !removeState("eth0") || removeState("eth0") {
		t.Error("state not removed, or twice")
	}
}

// TestRecordBroken: an instance does not start with fewer policies than there
// were; a record of an earlier version is read.
func TestRecordBroken(t *testing.T) {
	keysock.Dir = t.TempDir()
	x := newRecorded("eth0")
	x.add(t, allKinds()...)
	x.save(t)
	good, err := os.ReadFile(statePath("eth0"))
	if err != nil {
		t.Fatal(err)
	}
	old, err := json.Marshal(x.Rules())
	if err != nil {
		t.Fatal(err)
	}
	version := slices.Clone(good)
	version[0]++
	for _, tt := range []struct {
		name string
		b    []byte
		err  string // "": none
	}{
		{"earlier version", old, ""},
		{"earlier version, cut", old[:len(old)-1], "unexpected end of JSON input"},
		{"empty", nil, "no tape"},
		{"{", []byte("{"), "no tape"},
		{"without the end", good[:len(good)-1], "no tape"},
		{"of another version", version, "version"},
		{"twice the same tape", bytes.Repeat(good, 2), ""},
	} {
		if err := os.WriteFile(statePath("eth0"), tt.b, 0o600); err != nil {
			t.Fatal(err)
		}
		y := newRecorded("eth0")
		err := y.r.restore()
		if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.err)
		}
		if got := y.rules(); tt.err != "" && got != nil || tt.err == "" && !reflect.DeepEqual(got, x.rules()) {
			t.Errorf("%s: %+v", tt.name, got)
		}
	}
}

// TestRecordAgain: what could not be saved is saved when it can be, without a further
// change.
func TestRecordAgain(t *testing.T) {
	keysock.Dir = filepath.Join(t.TempDir(), "not there yet")
	synctest.Test(t, func(t *testing.T) {
		x := newRecorded("eth0")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { x.r.save(ctx, func(f func()) { f() }, zap.NewNop()) })
		defer wg.Wait()
		defer cancel()
		x.add(t, allKinds()...)
		time.Sleep(3 * settle) // until none of the changes makes it try
		synctest.Wait()
		if err := os.Mkdir(keysock.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if got := restored(t); got != nil {
			t.Fatalf("saved where nothing was: %v", got)
		}
		time.Sleep(retry + 3*settle)
		synctest.Wait()
		if got := restored(t); !reflect.DeepEqual(got, x.rules()) {
			t.Errorf("got %+v\nwant %+v", got, x.rules())
		}
	})
}

// BenchmarkRestore takes over the record of 100,000 policies, and makes it.
func BenchmarkRestore(b *testing.B) {
	keysock.Dir = b.TempDir()
	x := newRecorded("eth0")
	x.Begin(1)
	for i := range 100_000 {
		p := *allKinds()[2]
		p.Dir, p.Sel.Dst = ipsec.Direction(1+i%2), netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
		p.Requests[0].Dst = p.Sel.Dst.Addr()
		p.Requests[0].Src = netip.MustParseAddr("192.0.2.1")
		if _, err := x.AddPolicy(1, &p); err != nil {
			b.Fatal(err)
		}
	}
	if err := x.Commit(1); err != nil {
		b.Fatal(err)
	}
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			if err := x.r.renew(x.r.all()); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(x.r.size)/100_000, "octets/policy")
	})
	b.Run("restore", func(b *testing.B) {
		for b.Loop() {
			if err := newRecorded("eth0").r.restore(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
