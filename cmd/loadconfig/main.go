// Command loadConfig checks policy files, brings them into missiu's SPD, and
// shows and flushes what is in force. See loadConfig(8).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/missiu/missiu/pkg/config/apply"
	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/keysock"
)

// Exit statuses.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

// timeout bounds a run: a load of a hundred thousand policies takes some time.
const timeout = 5 * time.Minute

const usage = `usage: loadConfig [-i INTERFACE] -f FILE | -c FILE | -d | -dP | -F | -FP | -h | -V

  -f FILE   put the policies of FILE in force instead of those loaded before
  -c FILE   check FILE, change nothing
  -d, -dP   show SAs, policies
  -F, -FP   flush SAs, policies

FILE may be -, the standard input.

`

// streams are what the outside gives.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

type options struct {
	file, ifname, order          string
	check, dump, flush, policies bool
	help, version                bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr})
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, std streams) int {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var o options
	f := pflag.NewFlagSet("loadConfig", pflag.ContinueOnError)
	f.SortFlags = false
	f.SetOutput(io.Discard)
	f.StringVarP(&o.file, "file", "f", "", "apply `FILE`")
	f.BoolVarP(&o.check, "check", "c", false, "check the file behind it (or that of -f) only")
	f.BoolVarP(&o.dump, "dump", "d", false, "show SAs; with -P policies")
	f.BoolVarP(&o.flush, "flush", "F", false, "flush SAs; with -P policies")
	f.BoolVarP(&o.policies, "policies", "P", false, "-d or -F means policies")
	f.StringVarP(&o.ifname, "interface", "i", "", "missiu's `INTERFACE`, if several run")
	f.StringVar(&o.order, "order", "file", "`ORDER` in which entries are tried: file, or solaris (bypass and drop first)")
	f.BoolVarP(&o.help, "help", "h", false, "this help")
	f.BoolVarP(&o.version, "version", "V", false, "the version")
	bad := func(format string, a ...any) int {
		fmt.Fprintf(std.err, "loadConfig: "+format+"\n", a...)
		fmt.Fprint(std.err, usage)
		return exitUsage
	}
	if err := f.Parse(args); err != nil {
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
	if o.check && o.file == "" && f.NArg() == 1 {
		o.file = f.Arg(0)
	} else if f.NArg() > 0 {
		return bad("unexpected %q", f.Arg(0))
	}
	commands := 0
	for _, given := range []bool{o.file != "" || o.check, o.dump, o.flush} {
		if given {
			commands++
		}
	}
	switch {
	case commands == 0 && f.Changed("file"):
		return bad("-f: no file")
	case commands == 0 && o.policies:
		return bad("-P: only behind -d or -F")
	case commands == 0:
		return bad("nothing to do; want -f, -c, -d, -dP, -F or -FP")
	case commands > 1:
		return bad("want one of -f, -c, -d and -F at a time")
	case o.check && o.file == "":
		return bad("-c: no file")
	case o.policies && !o.dump && !o.flush:
		return bad("-P: only behind -d or -F")
	case o.order != "file" && o.order != "solaris":
		return bad("--order %q: want file or solaris", o.order)
	}
	if err := do(ctx, &o, std); err != nil {
		report(std.err, err)
		return exitFailed
	}
	return exitOK
}

// report prints an error; one about a place in a file says itself where.
func report(w io.Writer, err error) {
	if m, ok := errors.AsType[lexer.Message](err); ok {
		fmt.Fprintln(w, m)
		fmt.Fprintln(w, "loadConfig: nothing was changed")
		return
	}
	fmt.Fprintf(w, "loadConfig: %v\n", err)
}

var errInFile = errors.New("nothing was changed")

// do carries out the one command.
func do(ctx context.Context, o *options, std streams) error {
	var rules []ipsecconf.Rule
	if o.file != "" {
		var err error
		if rules, err = read(o, std); err != nil {
			return err
		}
		if o.check {
			fmt.Fprintf(std.out, "%s: no errors; %d policies\n", o.file, len(rules))
			return nil
		}
	}
	path, err := keysock.Find(o.ifname)
	if err != nil {
		return err
	}
	c, err := keysock.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	switch {
	case o.file != "":
		res, err := apply.Policies(ctx, c, o.file, rules)
		if err != nil {
			return err
		}
		fmt.Fprintf(std.out, "%s: %d policies in force: %d added, %d changed, %d unchanged; %d removed\n",
			o.file, len(rules), res.Added, res.Changed, res.Kept, res.Removed)
		return nil
	case o.flush && o.policies:
		return c.FlushPolicies(ctx)
	case o.flush:
		return c.Flush(ctx, 0)
	case o.policies:
		ps, err := c.DumpPolicies(ctx)
		if err != nil {
			return err
		}
		return apply.WritePolicies(std.out, ps)
	}
	sas, err := c.Dump(ctx, 0)
	defer func() {
		for _, i := range sas {
			i.Wipe()
		}
	}()
	if err != nil {
		return err
	}
	return apply.WriteSAs(std.out, sas)
}

// read reads the policy file and prints what there is to say about it.
func read(o *options, std streams) ([]ipsecconf.Rule, error) {
	in := std.in
	name := "-"
	if o.file != "-" {
		f, err := os.Open(o.file)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.file, cause(err))
		}
		defer f.Close()
		in, name = f, o.file
	}
	opt := ipsecconf.SystemNames()
	if o.order == "solaris" {
		opt.Order = ipsecconf.OrderSolaris
	}
	rules, l := ipsecconf.Load(name, in, opt)
	lexer.Print(std.err, l.All())
	if l.Failed() {
		if o.check {
			return nil, fmt.Errorf("%s: has errors", name)
		}
		return nil, errInFile
	}
	return rules, nil
}

// cause strips the operation and the name, which the message has already.
func cause(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

func buildVersion() string {
	if i, ok := debug.ReadBuildInfo(); ok && i.Main.Version != "" {
		return i.Main.Version
	}
	return "(devel)"
}
