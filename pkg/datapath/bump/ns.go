package bump

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// makeNS makes the namespace and binds it to its file.
func makeNS(ifname string) error {
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(awayDir(ifname), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.WriteFile(pinPath(ifname), nil, 0o600); err != nil {
		return err
	}
	err := aside(func() error {
		err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET))
		for _, s := range [][2]string{ // of a kernel without IPv6 there are fewer
			{"ipv4/ip_forward", "0"}, {"ipv4/conf/all/arp_ignore", "8"}, {"ipv6/conf/all/disable_ipv6", "1"}, {"ipv6/conf/default/disable_ipv6", "1"},
		} {
			if err == nil {
				if err = os.WriteFile(filepath.Join("/proc/sys/net", s[0]), []byte(s[1]), 0); errors.Is(err, os.ErrNotExist) {
					err = nil
				}
			}
		}
		if err == nil {
			err = os.NewSyscallError("mount", unix.Mount("/proc/thread-self/ns/net", pinPath(ifname), "", unix.MS_BIND, ""))
		}
		return err
	})
	if errors.Is(err, unix.EPERM) {
		err = &tap.PrivilegeError{Op: "private network namespace", Capability: "CAP_SYS_ADMIN", Err: err}
	}
	if err != nil {
		removeNS(ifname)
	}
	return err
}

// openNS opens the namespace; an error that is os.ErrNotExist: there is none.
func openNS(ifname string) (*os.File, error) {
	f, err := os.Open(pinPath(ifname))
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s: no namespace is bound to it: %w", pinPath(ifname), os.ErrNotExist)
	}
	return f, nil
}

// removeNS gives the namespace up, and all files.
func removeNS(ifname string) error {
	var err error
	for err == nil { // who was killed before there was a record may have left one more
		err = unix.Unmount(pinPath(ifname), unix.MNT_DETACH)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // nothing is bound
		err = nil
	}
	return errors.Join(os.NewSyscallError("umount", err), os.RemoveAll(awayDir(ifname)))
}

// within runs f in a namespace, nil: the process's own. Sockets that f makes stay there.
func within(ns *os.File, f func() error) error {
	if ns == nil {
		return f()
	}
	return aside(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// aside runs f on a thread that ends with it. The process's first thread does not:
// its namespace is the one that /proc/self tells, and it would keep it.
func aside(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- aside(f) // on another one, for this is taken
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}
