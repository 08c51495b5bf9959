package keysock

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ks")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestListen(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	path := filepath.Join(tempDir(t), "missiu", "eth0.pfkey")
	s, err := NewServer(path, newFake(), ServerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path string
		want os.FileMode
	}{{filepath.Dir(path), 0o755 | os.ModeDir}, {path, 0o600 | os.ModeSocket}} {
		fi, err := os.Stat(tt.path)
		if err != nil || fi.Mode() != tt.want {
			t.Errorf("%s: got %v, %v, want %v", tt.path, fi.Mode(), err, tt.want)
		}
	}
	if _, err := os.Stat(path + "~"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("temporary socket: got %v, want none", err)
	}
	_, err = NewServer(path, newFake(), ServerOptions{})
	wantErr(t, "second server", err, syscall.EADDRINUSE)
	s.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket after Close: got %v, want none", err)
	}

	// Somebody else's live server stays, a dead one's socket goes.
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_, err = NewServer(path, newFake(), ServerOptions{})
	wantErr(t, "over a live server", err, syscall.EADDRINUSE)
	ln.Close()
	if s, err = NewServer(path, newFake(), ServerOptions{}); err != nil {
		t.Fatalf("over a dead server: %v", err)
	}
	s.Close()

	if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if s, err = NewServer(path, newFake(), ServerOptions{}); err == nil {
		s.Close()
		t.Error("in a directory that all can write to: got no error")
	}
}

// Root's processes and our own user's are let in, others closed at once.
func TestPeerCredentials(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to connect as somebody else")
	}
	r := start(t, ServerOptions{})
	for _, p := range []string{filepath.Dir(r.path), r.path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	got := make(chan error, 1)
	go func() {
		// The user ID is this thread's; never unlocked, the thread ends with the goroutine.
		runtime.LockOSThread()
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
			got <- e
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			got <- err
			return
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: r.path}); err != nil {
			got <- err
			return
		}
		tv := unix.Timeval{Sec: 10}
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		n, err := unix.Read(fd, make([]byte, 64))
		if n != 0 || err != nil {
			got <- errors.Join(errors.New("want the end of the connection"), err)
			return
		}
		got <- nil
	}()
	if err := <-got; err != nil {
		t.Errorf("another user: %v", err)
	}
	if n := r.s.Stats().Refused; n != 1 {
		t.Errorf("refused %d, want 1", n)
	}
	r.dial()
}

// Who listens at an abstract name is told no key unless he is root or ourselves.
func TestAbstractNameSquatted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to listen as somebody else")
	}
	name := "@missiu-test-squatted-" + filepath.Base(tempDir(t))
	ready, end := make(chan error), make(chan struct{})
	heard := make(chan int, 1)
	go func() {
		runtime.LockOSThread() // as in TestPeerCredentials
		_, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534)
		if e != 0 {
			ready <- e
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			err = errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: name}), unix.Listen(fd, 1))
		}
		ready <- err
		if err != nil {
			return
		}
		<-end
		c, _, err := unix.Accept(fd)
		if err != nil {
			heard <- -1
			return
		}
		defer unix.Close(c)
		n, _ := unix.Read(c, make([]byte, 64))
		heard <- n
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	r := start(t, ServerOptions{})
	if c, err := Dial(r.ctx(), name); !errors.Is(err, syscall.EACCES) {
		if err == nil {
			c.Close()
		}
		t.Errorf("Dial: got %v, want EACCES", err)
	}
	close(end)
	if n := <-heard; n != 0 {
		t.Errorf("who listens there read %d octets, want none", n)
	}
}

func TestMaxConns(t *testing.T) {
	r := start(t, ServerOptions{MaxConns: 2})
	a := r.dial()
	r.dial()
	if c, err := Dial(r.ctx(), r.path); err == nil {
		c.Close()
		t.Error("third connection: got no error")
	}
	a.Close()
	for end := time.Now().Add(time.Minute); ; {
		c, err := Dial(r.ctx(), r.path)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after one closed: %v", err)
		}
	}
}

func TestFind(t *testing.T) {
	old := Dir
	Dir = tempDir(t)
	defer func() { Dir = old }()
	_, err := Find("")
	wantErr(t, "none", err, ErrNoInstance)
	_, err = Find("eth7")
	wantErr(t, "eth7", err, ErrNoInstance)

	serve := func(name string) *Server {
		s, err := NewServer(Path(name), newFake(), ServerOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		return s
	}
	serve("eth0")
	if got, err := Find(""); err != nil || got != Path("eth0") {
		t.Errorf("one: got %q, %v", got, err)
	}
	serve("eth1")
	_, err = Find("")
	if err == nil || !strings.Contains(err.Error(), "eth0, eth1") {
		t.Errorf("two: got %v, want both named", err)
	}
	if got, err := Find("eth1"); err != nil || got != Path("eth1") {
		t.Errorf("eth1: got %q, %v", got, err)
	}
	// What a killed one left does not count.
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: Path("eth2"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	_, err = Find("eth2")
	wantErr(t, "eth2", err, ErrNoInstance)
}
