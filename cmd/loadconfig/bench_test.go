package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/keyengine"
	"github.com/missiu/missiu/pkg/keysock"
)

// benchEngine runs a key engine that loadConfig finds.
func benchEngine(t testing.TB) *spd.DB {
	dir, err := os.MkdirTemp("", "lc")
	if err != nil {
		t.Fatal(err)
	}
	was := keysock.Dir
	keysock.Dir = dir
	db := spd.NewDB()
	e := keyengine.New(keyengine.Options{SAD: sad.NewDB(), SPD: db, Divert: func(c keyengine.DivertChange) error {
		c.Set()
		return nil
	}})
	s, err := keysock.NewServer(keysock.Path("eth0"), e, keysock.ServerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	e.Attach(s)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		e.Close()
		keysock.Dir = was
		os.RemoveAll(dir)
	})
	return db
}

// entries is a file of n entries, each of which is an outbound and an inbound policy.
func entries(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "{ raddr 10.%d.%d.%d ulp tcp } ipsec { encr_algs gcm }\n", i>>16, i>>8&255, i&255)
	}
	return b.String()
}

func loadText(t testing.TB, text, want string) {
	t.Helper()
	var o, e bytes.Buffer
	if code := run(context.Background(), []string{"-f", "-"}, streams{strings.NewReader(text), &o, &e}); code != exitOK || !strings.Contains(o.String(), want) {
		t.Fatalf("exit %d, %s%s, want %s", code, &o, &e, want)
	}
}

// Benchmark100000 loads 100,000 policies through the socket into the key engine,
// loads them again, and takes them back.
func Benchmark100000(b *testing.B) {
	benchEngine(b)
	text := entries(50000)
	for _, bm := range []struct{ name, before, text, want string }{
		{"new", "", text, "100000 added"},
		{"unchanged", text, text, "100000 unchanged"},
		{"one in front", text, "{ raddr 192.0.2.1 dir out } drop {}\n" + text, "1 added, 100000 changed"},
		{"gone", text, "", "100000 removed"},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				loadText(b, "", "")
				loadText(b, bm.before, "")
				b.StartTimer()
				loadText(b, bm.text, bm.want)
			}
		})
	}
}
