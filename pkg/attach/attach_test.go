package attach

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// echo serves one packet.
func echo(c *net.UnixConn) {
	b := make([]byte, 100)
	if n, err := c.Read(b); err == nil {
		c.Write(b[:n])
		c.Read(b)
	}
}

func TestServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "eth0.x")
	s, err := Listen(path, 2, echo)
	if err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(path); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", i.Mode(), err)
	}
	if _, err := Listen(path, 1, echo); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("second server: %v", err)
	}
	// The look of the second server was a connection, which takes a moment to end.
	deadline := time.Now().Add(10 * time.Second)
	var conns []*net.UnixConn
	b := make([]byte, 100)
	for len(conns) < 2 {
		c, err := Dial(path)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(deadline)
		c.Write([]byte("hello"))
		if n, err := c.Read(b); err == nil && string(b[:n]) == "hello" {
			conns = append(conns, c)
		} else if time.Now().After(deadline) {
			t.Fatalf("no echo: %v", err)
		}
	}
	third, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	third.SetDeadline(deadline)
	third.Write([]byte("hello"))
	if n, err := third.Read(b); n != 0 {
		t.Errorf("one above the limit got %q, %v", b[:n], err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for _, c := range conns {
		c.SetDeadline(deadline)
		if n, _ := c.Read(b); n != 0 {
			t.Error("served after Close")
		}
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("socket after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestStale: the socket of a killed instance is replaced.
func TestStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	s, err := Listen(path, 1, echo)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}
