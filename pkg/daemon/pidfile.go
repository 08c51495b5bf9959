package daemon

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// RunningError says that another process holds the pid file.
type RunningError struct {
	Path string
	Pid  int // 0 if the file does not tell
}

func (e *RunningError) Error() string {
	if e.Pid == 0 {
		return fmt.Sprintf("already running (%s is locked)", e.Path)
	}
	return fmt.Sprintf("already running with pid %d (%s is locked)", e.Pid, e.Path)
}

// PidFile is a locked file that holds our process id. The lock, not the
// content, says whether its owner lives; the kernel drops it on death.
type PidFile struct {
	f    *os.File
	path string
}

// LockPidFile makes and locks path, and writes our pid into it. If another
// process holds the lock the error is a *RunningError.
func LockPidFile(path string) (*PidFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, err
		}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, writeLock()); err != nil {
			f.Close()
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
				pid, _ := Owner(path)
				return nil, &RunningError{path, pid}
			}
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// The former owner may have removed the file between open and lock;
		// then we hold a lock that nobody can see.
		if !samePath(f, path) {
			f.Close()
			continue
		}
		p := &PidFile{f, path}
		if err := p.write(); err != nil {
			p.Close()
			return nil, err
		}
		return p, nil
	}
}

func (p *PidFile) write() error {
	if err := p.f.Truncate(0); err != nil {
		return err
	}
	_, err := p.f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// Close removes the file and releases the lock, in this order.
func (p *PidFile) Close() error {
	err := os.Remove(p.path)
	return errors.Join(err, p.f.Close())
}

// writeLock covers the whole file. It belongs to the open file, like that of
// flock, but whether it is held can be asked without holding it for a moment.
func writeLock() *unix.Flock_t { return &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart} }

// pidWait is how long a process that holds the lock may take to write its pid.
const pidWait = time.Second

// Owner returns the pid of the process that holds path locked, or 0 if none does.
func Owner(path string) (int, error) {
	for deadline := time.Now().Add(pidWait); ; time.Sleep(time.Millisecond) {
		held, err := locked(path)
		if !held || err != nil {
			return 0, err
		}
		pid, err := readPid(path)
		if err == nil || time.Now().After(deadline) {
			return pid, err
		}
	}
}

func locked(path string) (bool, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	l := writeLock()
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, l); err != nil {
		return false, fmt.Errorf("lock %s: %w", path, err)
	}
	return l.Type != unix.F_UNLCK, nil
}

func readPid(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return 0, fmt.Errorf("%s: no process id in it", path)
	}
	return pid, nil
}

func samePath(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}
