package keysock

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// NewServer listens at path. It makes the directory (0755), which must belong to
// root or to the caller and be writable by its owner alone; the socket has mode
// 0600. A socket file that no server answers at is replaced; if one does, or
// another server holds path + ".lock", the error is EADDRINUSE.
func NewServer(path string, b Backend, opt ServerOptions) (*Server, error) {
	opt.setDefaults()
	if err := MakeDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	lock, err := takeLock(path + ".lock")
	if err != nil {
		return nil, err
	}
	ln, err := ListenUnix(seqpacket, path)
	if err != nil {
		lock.Close()
		return nil, err
	}
	lns := []*net.UnixListener{ln}
	if opt.Abstract != "" {
		second, err := listenAbstract(opt.Abstract)
		if err != nil {
			os.Remove(path)
			ln.Close()
			lock.Close()
			return nil, err
		}
		lns = append(lns, second)
	}
	return &Server{
		b: b, opt: opt, lns: lns, path: path, lock: lock, labels: newLabels(),
		reqs: make(chan *request), wake: make(chan struct{}, 1), quit: make(chan struct{}),
		conns: make(map[uint64]*conn),
	}, nil
}

// MakeDir makes the directory of sockets if it is not there, and checks that only
// its owner, root or the caller, can write to it.
func MakeDir(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if err == nil {
		return os.Chmod(dir, 0o755) // whatever the umask is
	}
	if !errors.Is(err, os.ErrExist) {
		return err
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.IsDir() || st.Uid != 0 && int(st.Uid) != os.Geteuid() || fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s: not a directory that only its owner, root, can write to", dir)
	}
	return nil
}

func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = syscall.EADDRINUSE
		}
		return nil, &os.PathError{Op: "lock", Path: path, Err: err}
	}
	return f, nil
}

// ListenUnix makes a socket of mode 0600; network is "unix" or "unixpacket". A file that
// no server answers at is replaced; if one does, the error is EADDRINUSE. The caller
// removes the file. There may be one caller for path at a time.
func ListenUnix(network, path string) (*net.UnixListener, error) {
	if Alive(network, path) {
		return nil, &os.PathError{Op: "listen", Path: path, Err: syscall.EADDRINUSE}
	}
	// Under another name first, so that it never stands under its own with the
	// permissions of the umask.
	tmp := path + "~"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix(network, &net.UnixAddr{Name: tmp, Net: network})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		ln.Close()
		os.Remove(tmp)
		return nil, err
	}
	return ln, nil
}

// listenAbstract listens at "@name".
func listenAbstract(name string) (*net.UnixListener, error) {
	if len(name) < 2 || name[0] != '@' {
		return nil, fmt.Errorf("%q is no abstract name, want @ and a name", name)
	}
	return net.ListenUnix(seqpacket, &net.UnixAddr{Name: name, Net: seqpacket})
}

// removeSocket stops listening. The lock file stays: to remove it would let two
// servers hold different files of one name.
func (s *Server) removeSocket() {
	os.Remove(s.path)
	for _, ln := range s.lns {
		ln.Close()
	}
	s.lock.Close()
}

// Entitled reports whether the process at the other end, which connected or
// listens, is root's or our own user's.
func Entitled(nc *net.UnixConn) bool {
	ok := false
	control(nc, func(fd int) {
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
	})
	return ok
}

// setSendBuffer is an optimisation: what waits at a reader is charged to the
// writer, and the default holds few messages.
func setSendBuffer(nc *net.UnixConn, n int) {
	control(nc, func(fd int) {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, n) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, n)
		}
	})
}

// hungUp reports whether the other end is closed. An empty datagram reads like
// the end of the connection.
func hungUp(nc *net.UnixConn) bool {
	gone := true
	control(nc, func(fd int) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err != nil || n > 0
	})
	return gone
}

func control(nc *net.UnixConn, f func(fd int)) {
	rc, err := nc.SyscallConn()
	if err == nil {
		_ = rc.Control(func(fd uintptr) { f(int(fd)) })
	}
}
