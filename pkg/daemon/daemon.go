// Package daemon is what every long-running main does: background itself
// until ready, tell systemd, hold a pid file, log, and obey signals. It knows
// nothing of IPsec.
package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// readyFD is where a backgrounded child finds its pipe to the parent: the
// first of ExtraFiles, after the three standard ones.
const readyFD = 3

// Spawn starts this program again with args as a daemon in a session of its
// own, and returns when the child has called Ready: nil and its pid, or the
// error it reported. The child's standard streams are /dev/null, so nothing
// it prints later can disturb the operator's terminal.
func Spawn(args []string, timeout time.Duration) (pid int, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		w.Close()
		return 0, err
	}
	defer null.Close()
	self, err := os.Executable()
	if err != nil {
		w.Close()
		return 0, err
	}
	cmd := exec.Command(self, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, err
	}
	if err := r.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return 0, err
	}
	line, rerr := bufio.NewReader(r).ReadString('\n')
	if rerr == nil && line == "ready\n" {
		pid = cmd.Process.Pid
		return pid, cmd.Process.Release()
	}
	if errors.Is(rerr, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("not ready after %v", timeout)
		cmd.Process.Signal(syscall.SIGTERM)
	} else if line != "" {
		err = errors.New(strings.TrimSuffix(line, "\n"))
	} else {
		err = errors.New("ended before it was ready")
	}
	cmd.Wait()
	return 0, err
}

// Readiness tells whoever started this process how its start went: a Spawn in
// the parent, systemd by NOTIFY_SOCKET, or nobody.
type Readiness struct {
	pipe *os.File
}

// NewReadiness takes the pipe of Spawn when child says that there is one.
func NewReadiness(child bool) *Readiness {
	r := &Readiness{}
	if child {
		syscall.CloseOnExec(readyFD)
		r.pipe = os.NewFile(readyFD, "ready")
	}
	return r
}

// Ready reports success. Only the first of Ready and Fail has an effect on the parent.
func (r *Readiness) Ready() {
	r.send("ready")
	Notify("READY=1")
}

// Fail reports err as one line.
func (r *Readiness) Fail(err error) {
	r.send(strings.ReplaceAll(err.Error(), "\n", "; "))
}

func (r *Readiness) send(line string) {
	if r.pipe == nil {
		return
	}
	// A parent that gave up has closed its end; nothing is left to tell it.
	io.WriteString(r.pipe, line+"\n")
	r.pipe.Close()
	r.pipe = nil
}

// Notify sends state to systemd when it listens (sd_notify(3)); errors are of
// no consequence to the service and are dropped.
func Notify(state string) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	io.WriteString(c, state)
}

// Signals returns a context that ends on the first TERM or INT; a second one
// ends the process at once with status 1. hup is called, if not nil, for each
// HUP. Stop signals of a terminal are ignored, as a background job should.
// INT stays ignored when the shell that started us with & ignored it.
func Signals(parent context.Context, hup func()) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	signal.Ignore(syscall.SIGPIPE, syscall.SIGTTOU, syscall.SIGTTIN, syscall.SIGTSTP)
	ch := make(chan os.Signal, 4)
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGHUP)
	if !signal.Ignored(syscall.SIGINT) {
		signal.Notify(ch, syscall.SIGINT)
	}
	go func() {
		stopping := false
		for {
			select {
			case s := <-ch:
				switch {
				case s == syscall.SIGHUP:
					if hup != nil {
						hup()
					}
				case stopping:
					os.Exit(1)
				default:
					stopping = true
					Notify("STOPPING=1")
					cancel()
				}
			case <-parent.Done():
				return
			}
		}
	}()
	return ctx, cancel
}
