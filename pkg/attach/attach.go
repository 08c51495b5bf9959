// Package attach is how programs attach to a running missiu: Unix sockets in
// /run/missiu, SOCK_SEQPACKET, mode 0600, for root and the user that runs the
// daemon, whom the kernel names (SO_PEERCRED). What is said over a socket is the
// business of its server. The package knows nothing of packets, and may be
// imported from anywhere.
package attach

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Dir is where the sockets are. Tests change it.
var Dir = "/run/missiu"

// Path returns the socket for a purpose of the instance on an interface.
func Path(ifname, purpose string) string { return filepath.Join(Dir, ifname+"."+purpose) }

// acceptPause follows an error of accept that is not the end.
const acceptPause = 100 * time.Millisecond

// Server serves one socket.
type Server struct {
	ln    *net.UnixListener
	limit int
	serve func(*net.UnixConn)
	quit  chan struct{}
	wg    sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[*net.UnixConn]struct{}
}

// Listen makes the socket; a stale one is replaced, a live one is an error.
// serve is called for each connection of somebody entitled, in a goroutine of
// its own; the connection is closed when it returns. Others, and those beyond
// limit at a time, are closed at once.
func Listen(path string, limit int, serve func(*net.UnixConn)) (*Server, error) {
	ln, err := ListenUnix(path)
	if err != nil {
		return nil, err
	}
	s := &Server{ln: ln, limit: limit, serve: serve, quit: make(chan struct{}), conns: map[*net.UnixConn]struct{}{}}
	s.wg.Add(1)
	go s.accept()
	return s, nil
}

func (s *Server) accept() {
	defer s.wg.Done()
	Accept(s.ln, s.quit, func(c *net.UnixConn) {
		if !s.enter(c) {
			c.Close()
			return
		}
		go func() {
			defer s.leave(c)
			s.serve(c)
		}()
	})
}

// Accept gives f the connections of those entitled, and closes the others, until ln is
// closed. It pauses after an error of the moment, such as EMFILE, but not once quit is
// closed.
func Accept(ln *net.UnixListener, quit <-chan struct{}, f func(*net.UnixConn)) {
	for {
		c, err := ln.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			select {
			case <-quit:
			case <-time.After(acceptPause):
			}
		case !Entitled(c):
			c.Close()
		default:
			f(c)
		}
	}
}

func (s *Server) enter(c *net.UnixConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= s.limit {
		return false
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	return true
}

func (s *Server) leave(c *net.UnixConn) {
	c.Close()
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.wg.Done()
}

// ListenUnix makes a socket for those entitled alone. A stale one is replaced, a
// live one is an error.
func ListenUnix(path string) (*net.UnixListener, error) {
	if c, err := Dial(path); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s: another process listens there", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// The mode has to be right from the first moment on: bind makes the file.
	old := unix.Umask(0o177)
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	unix.Umask(old)
	return ln, err
}

// Entitled checks the credentials of the process that connected.
func Entitled(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	if err := raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
	}); err != nil {
		return false
	}
	return ok
}

// Close removes the socket, closes the connections and waits until serve has
// returned for each.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	close(s.quit)
	err := s.ln.Close()
	s.wg.Wait()
	return err
}

// Dial connects to the socket of a running instance.
func Dial(path string) (*net.UnixConn, error) {
	return net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
}
