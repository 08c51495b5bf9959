package ike

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// A rule's hook is a program of the operator's that runs as "FILE up" when an IKE
// SA is established and as "FILE down" when it has ended, with what it is about in
// the environment. It runs beside everything else; of one IKE SA down comes after
// up is over.

const (
	hookTime  = 10 * time.Second // then it is killed
	hookGrace = 2 * time.Second  // for those that still run when ike ends
	maxHooks  = 16               // at a time
)

// hook is what the program is told about one IKE SA.
type hook struct {
	file string
	env  []string
	done chan struct{} // closed when up is over
}

// checkHook refuses a program that somebody else could have put there.
func checkHook(file string) error {
	fi, err := os.Stat(file)
	if err != nil {
		return errors.Unwrap(err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !filepath.IsAbs(file):
		return errors.New("not an absolute path")
	case !fi.Mode().IsRegular():
		return errors.New("not a regular file")
	case !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return errors.New("owned by somebody else")
	case fi.Mode().Perm()&0o022 != 0:
		return errors.New("writable by others")
	}
	return nil
}

// runHook has the program run once after is closed.
func (d *Daemon) runHook(h *hook, verb string, after <-chan struct{}, done chan struct{}) {
	d.hooks.Go(func() {
		if done != nil {
			defer close(done)
		}
		if after != nil {
			<-after
		}
		d.hookSlots <- struct{}{}
		defer func() { <-d.hookSlots }()
		err := checkHook(h.file)
		if err == nil {
			ctx, cancel := context.WithTimeout(d.hookCtx, hookTime)
			defer cancel()
			c := exec.CommandContext(ctx, h.file, verb)
			c.Env = h.env
			c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) } // and what it has started
			c.WaitDelay = time.Second
			if err = c.Run(); ctx.Err() != nil {
				err = fmt.Errorf("ended after %v", hookTime)
				if d.hookCtx.Err() != nil {
					err = errStopping
				}
			}
		}
		if err != nil {
			d.log.Warn("hook", zap.String("file", h.file), zap.String("verb", verb), zap.Error(err))
		}
	})
}

// hookUp runs the rule's hook, if it has one.
func (l *lineage) hookUp() {
	l.fresh = false
	r := l.sa.Rule()
	if r == nil || r.Hook == "" {
		return
	}
	s := l.sa.Status()
	list := func(v []netip.Addr) string {
		t := make([]string, len(v))
		for i, a := range v {
			t[i] = a.String()
		}
		return strings.Join(t, " ")
	}
	text := func(a netip.Addr) string {
		if !a.IsValid() {
			return ""
		}
		return a.String()
	}
	var nets []string
	for _, p := range l.given.Subnets {
		nets = append(nets, p.String())
	}
	l.hook = &hook{file: r.Hook, done: make(chan struct{}), env: []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"IKE_RULE=" + r.Label, "IKE_PEER=" + s.Peer.Remote.Addr().String(), "IKE_PEER_ID=" + s.Peer.RemoteID.String(),
		"IKE_ADDR4=" + text(l.given.V4), "IKE_ADDR6=" + text(l.given.V6), "IKE_DNS=" + list(l.given.DNS),
		"IKE_DOMAINS=" + strings.Join(l.given.Domains, " "), "IKE_SUBNETS=" + strings.Join(nets, " "),
	}}
	l.d.runHook(l.hook, "up", nil, l.hook.done)
}

// hookDown runs it at the end.
func (l *lineage) hookDown() {
	if h := l.hook; h != nil {
		l.hook = nil
		l.d.runHook(h, "down", h.done, nil)
	}
}

// endHooks waits for those that run, but not for long.
func (d *Daemon) endHooks() {
	timer := time.AfterFunc(hookGrace, d.hookCancel)
	defer timer.Stop()
	d.hooks.Wait()
	d.hookCancel()
}
