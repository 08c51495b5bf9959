// Lab shows the product on two hosts of one machine, in network namespaces. It
// needs root; `make demo` and `make lab` call it.
//
//	lab demo   runs the documented sequence, measures, prints a table, cleans up
//	lab up     leaves the two hosts with the product running
//	lab down   ends what up left
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/missiu/missiu/test/e2e/lab"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("want demo, up or down")
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: makes network namespaces")
	}
	switch args[0] {
	case "demo":
		return stage(demo)
	case "up":
		return up()
	case "down":
		return lab.RemoveKept()
	}
	return fmt.Errorf("unknown verb %q; want demo, up or down", args[0])
}

// tb plays the part of a test: the first failure unwinds the stage.
type tb struct {
	cleanups []func()
	dirs     []string
	errs     []error
	logs     []string
}

type failure struct{ error }

func (t *tb) Helper() {}
func (t *tb) Logf(format string, args ...any) {
	t.logs = append(t.logs, fmt.Sprintf(format, args...))
}
func (t *tb) Errorf(format string, args ...any) { t.errs = append(t.errs, fmt.Errorf(format, args...)) }
func (t *tb) Fatalf(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	t.errs = append(t.errs, err)
	panic(failure{err})
}
func (t *tb) Failed() bool     { return len(t.errs) > 0 }
func (t *tb) Cleanup(f func()) { t.cleanups = append(t.cleanups, f) }
func (t *tb) TempDir() string {
	d, err := os.MkdirTemp("", "missiu-lab-")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.dirs = append(t.dirs, d)
	return d
}

// end undoes everything, last made first.
func (t *tb) end() {
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
	for _, d := range t.dirs {
		os.RemoveAll(d)
	}
}

// stage runs f and cleans up after it, also when it fails or is interrupted.
func stage(f func(t *tb)) error {
	t := &tb{}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan error, 1)
	go func() { done <- try(t, f) }()
	var err error
	select {
	case err = <-done:
	case s := <-sig:
		err = fmt.Errorf("ended by %v", s)
	}
	t.end()
	lab.RemoveBin()
	if err != nil {
		for _, l := range t.logs {
			fmt.Fprintln(os.Stderr, l)
		}
	}
	return err
}

func try(t *tb, f func(t *tb)) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
			err = errors.Join(t.errs...)
		case failure:
			err = errors.Join(t.errs...)
		default:
			err = fmt.Errorf("%v\n%s", r, debug.Stack())
		}
	}()
	f(t)
	return nil
}

const policy = "{ raddr %v } ipsec { encr_algs aes encr_auth_algs sha1 }\n"

// up leaves two hosts behind.
func up() error {
	if err := lab.RemoveKept(); err != nil {
		return err
	}
	t := &tb{}
	err := try(t, func(t *tb) {
		a, b := lab.KeepPair(t)
		for _, n := range []*lab.Node{a, b} {
			n.StartMissiu()
		}
		for _, n := range []*lab.Node{a, b} {
			n.StartIKEKept()
			n.LoadConfig(fmt.Sprintf(policy, n.Peer))
			n.Route()
		}
		fmt.Println("Two hosts are up, each with missiu and ike running. For a shell on either:")
		fmt.Println()
		for _, n := range []*lab.Node{a, b} {
			fmt.Printf("  %v   %s\n", n.Addr, n.Shell())
		}
		fmt.Println("\nThere: ping the other one, ./missiu -i eth0 status, ./loadConfig -dP, tcpdump -ni eth0; logs in /run/*.log.")
		fmt.Println("scripts/lab down ends it.")
	})
	lab.RemoveBin() // the hosts have their own copies
	if err != nil {
		t.end()
		return errors.Join(err, lab.RemoveKept())
	}
	return nil
}
