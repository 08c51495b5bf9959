// Command loadConfig checks policy files, brings them into missiu's SPD, places
// SAs with manual keys, and shows and flushes what is in force. See
// loadConfig(8).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/missiu/missiu/pkg/config/lexer"
)

// Exit statuses.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

// timeout bounds a run: a load of a hundred thousand policies takes some time.
const timeout = 5 * time.Minute

const usage = `usage: loadConfig [-i INTERFACE] -f FILE | -a FILE | -r FILE | -c FILE | -k FILE | -s FILE
                  | -d | -dP | -l | -L | -d N | -F | -FP | monitor | -h | -V

  -f FILE    put the policies of FILE in force instead of those loaded before
  -a FILE    append the policies of FILE
  -r FILE    remove the policies that are equal to those of FILE
  -d N       remove entry N
  -c FILE    check FILE, change nothing
  -k FILE    carry out the commands of a file of manual keys
  -s FILE    save the SAs with their keys; with -p an X for each digit of one
  -d, -dP    show SAs, policies
  -l, -L     show policies, what goes out and what comes in apart
  -F, -FP    flush SAs, policies
  monitor    tell of key events as they come

FILE may be -, the standard input or output.

`

// streams are what the outside gives.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

type options struct {
	file, add, remove, keys, save       string
	ifname, order, dialect              string
	check, dump, flush, policies        bool
	list, listAll, numeric, json, quiet bool
	unauthenticated, paranoid           bool
	help, version                       bool

	entry   int // of -d N
	monitor bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr})
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, std streams) int {
	var o options
	f := pflag.NewFlagSet("loadConfig", pflag.ContinueOnError)
	f.SortFlags = false
	f.SetOutput(io.Discard)
	f.StringVarP(&o.file, "file", "f", "", "apply `FILE`")
	f.StringVarP(&o.add, "append", "a", "", "append the entries of `FILE`; -f -a FILE is -f FILE, as with Solaris")
	f.StringVarP(&o.remove, "remove", "r", "", "remove entries equal to those of `FILE`")
	f.BoolVarP(&o.check, "check", "c", false, "check the file behind it (or that of -f or -k) only")
	f.StringVarP(&o.keys, "keys", "k", "", "carry out the commands of the key file `FILE`")
	f.StringVarP(&o.save, "save", "s", "", "save all SAs with their keys in `FILE`")
	f.BoolVarP(&o.dump, "dump", "d", false, "show SAs; with -P policies; with a number remove that entry")
	f.BoolVarP(&o.list, "list", "l", false, "show policies in the order in which they are tried")
	f.BoolVarP(&o.listAll, "list-all", "L", false, "as -l: tunnels are entries like all others")
	f.BoolVarP(&o.numeric, "numeric", "n", false, "with -l and -L: no names of protocols")
	f.BoolVar(&o.json, "json", false, "with -d, -dP, -l, -L and monitor: JSON")
	f.BoolVarP(&o.flush, "flush", "F", false, "flush SAs; with -P policies")
	f.BoolVarP(&o.policies, "policies", "P", false, "-d or -F means policies")
	f.StringVarP(&o.ifname, "interface", "i", "", "missiu's `INTERFACE`, if several run")
	f.StringVar(&o.order, "order", "file", "`ORDER` in which entries are tried: file, or solaris (bypass and drop first)")
	f.StringVar(&o.dialect, "dialect", "", "take no words but those of `DIALECT`: solaris or nanosec")
	f.BoolVar(&o.unauthenticated, "allow-unauthenticated", false, "take manual SAs with encryption and no integrity")
	f.BoolVarP(&o.paranoid, "paranoid", "p", false, "with -s, and save in a key file: an X for each digit of a key")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "no warnings")
	f.BoolVarP(&o.help, "help", "h", false, "this help")
	f.BoolVarP(&o.version, "version", "V", false, "the version")
	bad := func(format string, a ...any) int {
		fmt.Fprintf(std.err, "loadConfig: "+format+"\n", a...)
		fmt.Fprint(std.err, usage)
		return exitUsage
	}
	if err := f.Parse(solarisReplace(args)); err != nil {
		return bad("%v", err)
	}
	switch {
	case o.help:
		fmt.Fprint(std.out, usage+f.FlagUsages())
		return exitOK
	case o.version:
		fmt.Fprintln(std.out, "loadConfig", buildVersion())
		return exitOK
	}
	if err := o.arguments(f.Args()); err != nil {
		return bad("%v", err)
	}
	if err := o.command(f); err != nil {
		return bad("%v", err)
	}
	if err := do(ctx, &o, std); err != nil {
		report(std.err, err)
		return exitFailed
	}
	return exitOK
}

// solarisReplace reads "-f -a FILE" and "-F -a FILE", by which Solaris replaces
// all entries, as "-f FILE".
func solarisReplace(args []string) []string {
	if len(args) > 1 && (args[0] == "-f" || args[0] == "-F") && args[1] == "-a" {
		return append([]string{"-f"}, args[2:]...)
	}
	return args
}

// arguments are what is no option: the file of -c, the number of -d, monitor.
func (o *options) arguments(args []string) error {
	if len(args) == 0 {
		return nil
	}
	switch arg := args[0]; {
	case arg == "add" || arg == "update" || arg == "update-pair":
		return errors.New("keys are not for the command line, where others see them; want a file behind -k")
	case len(args) > 1:
		return fmt.Errorf("unexpected %q", args[1])
	case o.check && o.file == "" && o.keys == "":
		o.file = arg
	case o.dump && !o.policies:
		n, err := strconv.ParseUint(arg, 10, 31)
		if err != nil || n == 0 {
			return fmt.Errorf("-d %q: want the number of an entry, as -l shows it", arg)
		}
		o.entry, o.dump = int(n), false
	case arg == "monitor":
		o.monitor = true
	default:
		return fmt.Errorf("unexpected %q", arg)
	}
	return nil
}

// command checks that there is one thing to do.
func (o *options) command(f *pflag.FlagSet) error {
	n := 0
	for _, given := range []bool{
		o.file != "", o.add != "", o.remove != "", o.keys != "", o.save != "", o.dump, o.entry != 0, o.list, o.listAll, o.flush, o.monitor,
	} {
		if given {
			n++
		}
	}
	for _, name := range []string{"file", "append", "remove", "keys", "save"} {
		if v := f.Lookup(name); v.Changed && v.Value.String() == "" {
			return fmt.Errorf("-%s: no file", v.Shorthand)
		}
	}
	listing := o.dump || o.list || o.listAll
	switch {
	case o.policies && !o.dump && !o.flush:
		return errors.New("-P: only behind -d or -F")
	case n == 0 && o.check:
		return errors.New("-c: no file")
	case n == 0:
		return errors.New("nothing to do; want -f, -a, -r, -c, -k, -s, -d, -dP, -l, -F, -FP or monitor")
	case n > 1:
		return errors.New("want one of -f, -a, -r, -c, -k, -s, -d, -l and -F at a time")
	case o.check && o.file == "" && o.keys == "":
		return errors.New("-c: only with a file")
	case o.order != "file" && o.order != "solaris":
		return fmt.Errorf("--order %q: want file or solaris", o.order)
	case o.dialect != "" && o.dialect != "solaris" && o.dialect != "nanosec":
		return fmt.Errorf("--dialect %q: want solaris or nanosec", o.dialect)
	case o.numeric && !o.list && !o.listAll:
		return errors.New("-n: only with -l or -L")
	case o.json && !listing && !o.monitor:
		return errors.New("--json: only with -d, -dP, -l, -L or monitor")
	}
	return nil
}

// report prints an error; one about a place in a file says itself where.
func report(w io.Writer, err error) {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range j.Unwrap() {
			if m, ok := errors.AsType[lexer.Message](e); ok {
				fmt.Fprintln(w, m)
			} else {
				fmt.Fprintf(w, "loadConfig: %v\n", e)
			}
		}
		return
	}
	if m, ok := errors.AsType[lexer.Message](err); ok {
		fmt.Fprintln(w, m)
		fmt.Fprintln(w, "loadConfig: nothing was changed")
		return
	}
	fmt.Fprintf(w, "loadConfig: %v\n", err)
}

var errInFile = errors.New("nothing was changed")

func buildVersion() string {
	if i, ok := debug.ReadBuildInfo(); ok && i.Main.Version != "" {
		return i.Main.Version
	}
	return "(devel)"
}
