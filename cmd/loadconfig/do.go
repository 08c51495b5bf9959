package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/missiu/missiu/pkg/config/apply"
	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/ipseckey"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/keysock"
)

// do carries out the one command. ctx has no deadline, since monitoring has none.
func do(ctx context.Context, o *options, std streams) error {
	forever := ctx
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	switch {
	case o.keys != "":
		monitor, err := doKeys(ctx, o, std)
		if err != nil || !monitor {
			return err
		}
		o.monitor = true
	case o.file != "" || o.add != "" || o.remove != "":
		return doFile(ctx, o, std)
	}
	c, err := dial(ctx, o)
	if err != nil {
		return err
	}
	defer c.Close()
	switch {
	case o.monitor:
		return apply.Monitor(forever, c, std.out, o.json)
	case o.entry != 0:
		res, err := apply.DeleteEntry(ctx, c, o.entry)
		if err != nil {
			return err
		}
		fmt.Fprintf(std.out, "entry %d: %d removed\n", o.entry, res.Removed)
		return nil
	case o.flush && o.policies:
		return c.FlushPolicies(ctx)
	case o.flush:
		return c.Flush(ctx, 0)
	}
	return show(ctx, c, o, std)
}

func dial(ctx context.Context, o *options) (*keysock.Client, error) {
	path, err := keysock.Find(o.ifname)
	if err != nil {
		return nil, err
	}
	return keysock.Dial(ctx, path)
}

// show shows policies, or SAs.
func show(ctx context.Context, c *keysock.Client, o *options, std streams) error {
	sas, err := c.Dump(ctx, 0)
	defer func() {
		for _, i := range sas {
			i.Wipe()
		}
	}()
	if err != nil {
		return err
	}
	switch {
	case o.save != "":
		return apply.SaveSAs(o.save, std.out, sas, o.paranoid)
	case o.dump && !o.policies && o.json:
		return apply.WriteSAsJSON(std.out, sas)
	case o.dump && !o.policies:
		return apply.WriteSAs(std.out, sas)
	}
	ps, err := c.DumpPolicies(ctx)
	if err != nil {
		return err
	}
	if o.json {
		return apply.WritePoliciesJSON(std.out, ps, sas)
	}
	return apply.WritePolicies(std.out, ps, sas, apply.Listing{Apart: o.list || o.listAll, Numeric: o.numeric})
}

// doFile checks a policy file and brings it into force.
func doFile(ctx context.Context, o *options, std streams) error {
	name, mode := o.file, apply.Replace
	switch {
	case o.add != "":
		name, mode = o.add, apply.Append
	case o.remove != "":
		name, mode = o.remove, apply.Remove
	}
	c, err := read(name, o, std)
	if err != nil {
		return err
	}
	defer c.Wipe()
	if o.check {
		fmt.Fprintf(std.out, "%s: no errors; %d policies", name, len(c.Rules))
		if len(c.SAs) > 0 {
			fmt.Fprintf(std.out, ", %d SAs", len(c.SAs))
		}
		fmt.Fprintln(std.out)
		return nil
	}
	k, err := dial(ctx, o)
	if err != nil {
		return err
	}
	defer k.Close()
	res, err := apply.Load(ctx, k, name, c, mode)
	if !o.quiet {
		lexer.Print(std.err, res.Notes)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(std.out, "%s: %d policies in force: %d added, %d changed, %d unchanged; %d removed\n",
		name, res.Added+res.Changed+res.Kept, res.Added, res.Changed, res.Kept, res.Removed)
	if len(c.SAs) > 0 || c.FlushSAs {
		printSAs(std.out, name, res.Manual)
	}
	return nil
}

func printSAs(w io.Writer, name string, r apply.SAResult) {
	fmt.Fprintf(w, "%s: SAs: %d added, %d changed, %d there already, %d deleted\n", name, r.Added, r.Changed, r.Kept, r.Deleted)
}

// doKeys carries out a key file. The last thing that it asks for may be to
// monitor.
func doKeys(ctx context.Context, o *options, std streams) (monitor bool, err error) {
	in, name, err := open(o.keys, std)
	if err != nil {
		return false, err
	}
	defer in.Close()
	if err := private(in, name); err != nil {
		return false, err
	}
	cs, l := ipseckey.Load(name, in, ipseckey.Options{LookupHost: ipsecconf.SystemNames().LookupHost, Unauthenticated: o.unauthenticated, HideKeys: o.paranoid})
	defer ipseckey.Wipe(cs)
	if err := tell(l, o, name, std); err != nil {
		return false, err
	}
	if o.check {
		fmt.Fprintf(std.out, "%s: no errors; %d commands\n", name, len(cs))
		return false, nil
	}
	c, err := dial(ctx, o)
	if err != nil {
		return false, err
	}
	defer c.Close()
	res, err := apply.SAs(ctx, c, name, cs, std.out)
	if err != nil {
		return false, err
	}
	printSAs(std.out, name, res)
	n := len(cs)
	return n > 0 && cs[n-1].Verb == ipseckey.Monitor, nil
}

// read reads a policy file and prints what there is to say about it.
func read(file string, o *options, std streams) (*ipsecconf.Contents, error) {
	in, name, err := open(file, std)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	opt := ipsecconf.SystemNames()
	opt.Unauthenticated = o.unauthenticated
	if o.order == "solaris" {
		opt.Order = ipsecconf.OrderSolaris
	}
	opt.Dialect = ipsecconf.Dialect(o.dialect)
	c, l := ipsecconf.Load(name, in, opt)
	if err := tell(l, o, name, std); err != nil {
		return nil, err
	}
	if len(c.SAs) > 0 {
		if err := private(in, name); err != nil {
			c.Wipe()
			return nil, err
		}
	}
	return c, nil
}

// tell prints errors and warnings; the error says that there were errors.
func tell(l *lexer.List, o *options, name string, std streams) error {
	if l.Failed() || !o.quiet {
		lexer.Print(std.err, l.All())
	}
	switch {
	case !l.Failed():
		return nil
	case o.check:
		return fmt.Errorf("%s: has errors", name)
	}
	return errInFile
}

// open opens a file, or takes the standard input.
func open(name string, std streams) (io.ReadCloser, string, error) {
	if name == "-" {
		return io.NopCloser(std.in), name, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, name, fmt.Errorf("%s: %w", name, cause(err))
	}
	return f, name, nil
}

// private refuses a file with keys that others could read, or have written.
func private(in io.Reader, name string) error {
	f, ok := in.(*os.File)
	if !ok {
		return nil // the standard input is the caller's care
	}
	i, err := f.Stat()
	if err != nil {
		return fmt.Errorf("%s: %w", name, cause(err))
	}
	st, ok := i.Sys().(*syscall.Stat_t)
	switch {
	case !i.Mode().IsRegular():
		return fmt.Errorf("%s: not a regular file", name)
	case ok && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s: has keys and belongs to another user", name)
	case i.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s: has keys and is open to others (mode %04o); want 0600", name, i.Mode().Perm())
	}
	return nil
}

// cause strips the operation and the name, which the message has already.
func cause(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}
