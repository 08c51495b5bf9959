package control

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/internal/nstest"
)

func start(t *testing.T, h Handler) (*Server, string) {
	t.Helper()
	Dir = t.TempDir()
	os.Chmod(Dir, 0o755)
	a := netip.MustParseAddr("192.0.2.1")
	s, err := Listen(a, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, Path(a)
}

func TestCommands(t *testing.T) {
	s, path := start(t, func(_ context.Context, r Request) Response {
		if r.Do == "status" {
			return Response{OK: true, Status: []byte(`{"n":1}`)}
		}
		return Response{Error: r.Do + " " + r.Rule}
	})
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", fi, err)
	}
	if _, err := Listen(netip.MustParseAddr("192.0.2.1"), nil); err == nil {
		t.Error("a second server listens")
	}
	c, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if r, err := c.Do(t.Context(), Request{Do: "up", Rule: "gate"}); err != nil || r.OK || r.Error != "up gate" {
		t.Errorf("got %+v, %v", r, err)
	}
	if r, err := c.Do(t.Context(), Request{Do: "status"}); err != nil || !r.OK || string(r.Status) != `{"n":1}` {
		t.Errorf("got %+v, %v", r, err)
	}
	if l, err := Paths(); err != nil || len(l) != 1 || l[0] != path {
		t.Errorf("paths: %q, %v", l, err)
	}
	s.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("socket is left: %v", err)
	}
	// What a dead daemon left is replaced.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err = Listen(netip.MustParseAddr("192.0.2.1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// Nonsense gets an answer or the end of the connection, never more room.
func TestHostileClients(t *testing.T) {
	s, path := start(t, func(context.Context, Request) Response { return Response{OK: true} })
	for _, tt := range []struct{ in, want string }{
		{"\n", "no command"},
		{"null and void\n", "no command"},
		{`{"do":"up","rule":1}` + "\n", "no command"},
		{`{"do":"status"}{"do":"status"}` + "\n", "more than one value"},
		{`{"do":"status","password":"x"}` + "\n", "unknown field"},
		{`[` + strings.Repeat(`[`, MaxRequest) + "\n", "longer than 4096"},
		{`{"do":"status"}` + "\n", `{"ok":true}`},
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, tt.in)
		c.SetReadDeadline(time.Now().Add(time.Minute))
		got, err := bufio.NewReader(c).ReadString('\n')
		if err != nil || !strings.Contains(got, tt.want) {
			t.Errorf("%.30q: got %q, %v; want %q", tt.in, got, err, tt.want)
		}
		c.Close()
	}
	nstest.Until(t, "the end of them to be noticed", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.conns) == 0
	})
	var all []net.Conn
	for range maxConns + 1 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		all = append(all, c)
	}
	last := all[maxConns]
	last.SetReadDeadline(time.Now().Add(time.Minute))
	if got, err := bufio.NewReader(last).ReadString('\n'); err != nil || !strings.Contains(got, "too many connections") {
		t.Errorf("connection %d: %q, %v", maxConns+1, got, err)
	}
}

// Whoever goes away is not waited for, nor the daemon held up by it.
func TestClientGoes(t *testing.T) {
	ended := make(chan error, 1)
	begun := make(chan bool, 1)
	_, path := start(t, func(ctx context.Context, _ Request) Response {
		begun <- true
		<-ctx.Done()
		ended <- ctx.Err()
		return Response{Error: "given up"}
	})
	c, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-begun; cancel() }()
	if _, err := c.Do(ctx, Request{Do: "up"}); err != context.Canceled {
		t.Errorf("got %v", err)
	}
	c.Close()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the command is still waited for")
	}
}
