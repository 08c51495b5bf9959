package attach

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	deadline := time.Now().Add(time.Minute)
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

// TestStranger: a process of another user is sent away unread, even if the mode
// of the socket lets it connect.
func TestStranger(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: becomes another user")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	s, err := Listen(path, 1, echo)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, p := range []string{filepath.Dir(dir), dir, path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	type answer struct {
		n   int
		err error
	}
	done := make(chan answer)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its user
		const nobody = 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), nobody, ^uintptr(0)); errno != 0 {
			done <- answer{0, errno}
			return
		}
		c, err := Dial(path)
		if err != nil {
			done <- answer{0, err}
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		c.Write([]byte("hello"))
		n, err := c.Read(make([]byte, 100))
		done <- answer{n, err}
	}()
	a := <-done
	if errors.Is(a.err, unix.EACCES) {
		t.Skipf("others cannot reach %s", dir)
	}
	if a.n != 0 || !errors.Is(a.err, io.EOF) && !errors.Is(a.err, unix.ECONNRESET) {
		t.Errorf("a stranger got %d octets, %v", a.n, a.err)
	}
}
