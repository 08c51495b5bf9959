package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/missiu/missiu/pkg/ike"
	"github.com/missiu/missiu/pkg/ike/control"
	"github.com/spf13/pflag"
)

// verbs are the first words that are no address: commands for a running ike, or
// without one. An address is never one of them.
var verbs map[string]func(args []string, stdout, stderr io.Writer) int

func init() {
	verbs = map[string]func([]string, io.Writer, io.Writer) int{
		"status": status, "up": operate, "down": operate, "rekey": operate, "explain": explainFile,
	}
}

const (
	statusWait  = 10 * time.Second
	operateWait = 60 * time.Second
)

// remote is what the commands for a running daemon have in common.
type remote struct {
	fs     *pflag.FlagSet
	ifname string
	addr   string
	stdout io.Writer
	stderr io.Writer
}

func newRemote(args []string, rest string, stdout, stderr io.Writer) *remote {
	r := &remote{fs: pflag.NewFlagSet("ike "+args[0], pflag.ContinueOnError), stdout: stdout, stderr: stderr}
	r.fs.SortFlags = false
	r.fs.SetOutput(stdout)
	r.fs.StringVarP(&r.ifname, "interface", "i", "", "the ike that has an address of this interface")
	r.fs.StringVarP(&r.addr, "address", "a", "", "the ike that has this local address")
	r.fs.Usage = func() {
		fmt.Fprintf(stdout, "usage: ike %s %s\n\n%s", args[0], rest, r.fs.FlagUsages())
	}
	return r
}

// parse returns an exit status if there is nothing more to do.
func (r *remote) parse(args []string, want int) (exit int, done bool) {
	err := r.fs.Parse(args[1:])
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return exitOK, true
	case err != nil:
	case r.fs.NArg() != want && want == 0:
		err = fmt.Errorf("%q: nothing may follow", r.fs.Arg(0))
	case r.fs.NArg() != want:
		err = errors.New("want the label of one rule")
	case r.addr != "":
		_, err = addr(r.addr)
		if err != nil {
			err = fmt.Errorf("%q: %w", r.addr, err)
		}
	}
	if err != nil {
		fmt.Fprintf(r.stderr, "ike %s: %v\nike %s: see ike %s --help\n", args[0], err, args[0], args[0])
		return exitUsage, true
	}
	return 0, false
}

// running is a running ike and its state.
type running struct {
	c    *control.Client
	raw  json.RawMessage
	what ike.Report
}

func (r *running) close() { r.c.Close() }

// find asks every ike that runs for its state, and returns those that were meant.
func (r *remote) find(ctx context.Context) (all []*running, err error) {
	paths, err := control.Paths()
	if err != nil {
		return nil, err
	}
	if len(paths) == 0 {
		return nil, control.ErrNone
	}
	var own []netip.Addr
	if r.ifname != "" {
		f, err := net.InterfaceByName(r.ifname)
		if err != nil {
			return nil, fmt.Errorf("%s: no such interface", r.ifname)
		}
		own = addrsOf(*f)
	}
	if r.addr != "" {
		own = append(own, netip.MustParseAddr(r.addr).Unmap())
	}
	var errs []error
	for _, p := range paths {
		d, err := ask(ctx, p)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", p, err))
		case own != nil && !slices.ContainsFunc(d.what.Local, func(a netip.Addr) bool { return slices.Contains(own, a.WithZone("")) }):
			d.close()
		default:
			all = append(all, d)
		}
	}
	if len(all) == 0 && len(errs) == 0 {
		errs = append(errs, control.ErrNone)
	}
	return all, errors.Join(errs...)
}

func ask(ctx context.Context, path string) (*running, error) {
	c, err := control.Dial(path)
	if err != nil {
		return nil, err
	}
	d := &running{c: c}
	resp, err := c.Do(ctx, control.Request{Do: "status"})
	if err == nil && !resp.OK {
		err = errors.New(resp.Error)
	}
	if err == nil {
		d.raw = resp.Status
		err = json.Unmarshal(resp.Status, &d.what)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return d, nil
}

func addrsOf(f net.Interface) (l []netip.Addr) {
	as, err := f.Addrs()
	if err != nil {
		return nil
	}
	for _, x := range as {
		if p, err := netip.ParsePrefix(x.String()); err == nil {
			l = append(l, p.Addr().WithZone(""))
		}
	}
	return l
}

// status shows what every ike that was meant does.
func status(args []string, stdout, stderr io.Writer) int {
	r := newRemote(args, "[options]", stdout, stderr)
	asJSON := r.fs.Bool("json", false, "the whole state as JSON, one document for each ike")
	if exit, done := r.parse(args, 0); done {
		return exit
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusWait)
	defer cancel()
	all, err := r.find(ctx)
	for _, d := range all {
		defer d.close()
		if *asJSON {
			var b strings.Builder
			e := json.NewEncoder(&b)
			e.SetIndent("", "  ")
			e.Encode(d.raw)
			io.WriteString(stdout, b.String())
		} else {
			show(stdout, &d.what)
		}
	}
	if err != nil {
		fmt.Fprintf(stderr, "ike status: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// operate carries out up, down and rekey.
func operate(args []string, stdout, stderr io.Writer) int {
	r := newRemote(args, "[options] RULE", stdout, stderr)
	wait := timeout(operateWait)
	r.fs.Var(&wait, "timeout", "wait so long for the result, in seconds or with a unit s, m, h or d")
	if exit, done := r.parse(args, 1); done {
		return exit
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(wait))
	defer cancel()
	err := r.do(ctx, args[0], r.fs.Arg(0))
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no result within %v; ike goes on", time.Duration(wait))
	}
	if err != nil {
		fmt.Fprintf(stderr, "ike %s: %v\n", args[0], err)
		return exitFailed
	}
	return exitOK
}

// timeout is a time of the command line, above 0.
type timeout time.Duration

func (t *timeout) String() string { return time.Duration(*t).String() }

// Type is what the help calls it.
func (t *timeout) Type() string { return "TIME" }

// Set reads it as all other times are written, and as Go writes them.
func (t *timeout) Set(s string) error {
	d, err := duration(s, time.Second)
	if err != nil {
		if g, gerr := time.ParseDuration(s); gerr == nil {
			d, err = g, nil
		}
	}
	if err == nil && d <= 0 {
		err = errors.New("want a time above 0")
	}
	*t = timeout(d)
	return err
}

// do finds the one daemon that has the rule.
func (r *remote) do(ctx context.Context, verb, label string) error {
	all, err := r.find(ctx)
	for _, d := range all {
		defer d.close()
	}
	if err != nil {
		return err
	}
	has := func(d *running) bool {
		return slices.ContainsFunc(d.what.Rules, func(q ike.RuleReport) bool { return q.Label == label })
	}
	if len(all) > 1 {
		if with := slices.DeleteFunc(slices.Clone(all), func(d *running) bool { return !has(d) }); len(with) > 0 {
			all = with
		}
	}
	if len(all) > 1 {
		var names []string
		for _, d := range all {
			names = append(names, fmt.Sprint(d.what.Local[0]))
		}
		return fmt.Errorf("several ike are running, choose by -a one of %s", strings.Join(names, ", "))
	}
	resp, err := all[0].c.Do(ctx, control.Request{Do: verb, Rule: label})
	if err == nil && !resp.OK {
		err = errors.New(resp.Error)
	}
	return err
}

func show(w io.Writer, r *ike.Report) {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	missiu := "connected"
	if !r.Missiu {
		missiu = "gone"
	}
	var local []string
	for _, a := range r.Local {
		local = append(local, a.String())
	}
	fmt.Fprintf(t, "%s\tpid %d, up %v, missiu %s, %d IKE SAs, %d half open\n", strings.Join(local, " "), r.Pid, time.Since(r.Since).Truncate(time.Second), missiu, len(r.IKESAs), r.HalfOpen)
	for _, k := range sorted(r.Counters) {
		if n := r.Counters[k]; n > 0 {
			fmt.Fprintf(t, "  %s\t%d\n", strings.ReplaceAll(k, "_", " "), n)
		}
	}
	for _, i := range r.IKESAs {
		role := "responder"
		if i.Initiator {
			role = "initiator"
		}
		fmt.Fprintf(t, "%s\t%s, %s, %v to %v%s\n", ruleName(i.Rule), i.State, role, i.Local, i.Peer, nat(i))
		if i.PeerID != "" {
			fmt.Fprintf(t, "  ids\t%s, peer %s\n", i.LocalID, i.PeerID)
		}
		if len(i.Assigned) > 0 {
			fmt.Fprintf(t, "  assigned\t%s\n", strings.Trim(fmt.Sprint(i.Assigned), "[]"))
		}
		if i.MOBIKE {
			fmt.Fprintf(t, "  mobike\tpeer also at %s\n", cmp.Or(strings.Trim(fmt.Sprint(i.PeerAddrs), "[]"), "no other address"))
		}
		fmt.Fprintf(t, "  spis\t%s, peer %s\n", i.SPILocal, i.SPIPeer)
		if i.Suite != "" {
			fmt.Fprintf(t, "  suite\t%s\n", i.Suite)
		}
		fmt.Fprintf(t, "  age\t%s\n", ages(i.Age, i.RekeyIn, i.ExpireIn))
		if i.Resent > 0 || i.Waiting > 1 {
			fmt.Fprintf(t, "  retransmissions\t%d; %d transmissions of the present request\n", i.Resent, i.Waiting)
		}
		for _, c := range i.Children {
			gone := ""
			if c.Queue != 0 {
				gone = fmt.Sprintf(", queue %d", c.Queue)
			}
			if c.CPIIn != 0 {
				gone += fmt.Sprintf(", IPComp with CPIs in %d, out %d", c.CPIIn, c.CPIOut)
			}
			if c.Deleting {
				gone += ", being deleted"
			}
			fmt.Fprintf(t, "  %s\tin %s, out %s, %s, %s%s\n", c.Proto, c.SPIIn, c.SPIOut, c.Mode, c.Suite, gone)
			fmt.Fprintf(t, "    selectors\t%s to %s\n", strings.Join(c.LocalTS, " "), strings.Join(c.PeerTS, " "))
			fmt.Fprintf(t, "    age\t%s\n", ages(c.Age, c.RekeyIn, c.ExpireIn))
		}
	}
	for _, q := range r.Rules {
		switch {
		case q.Up && q.Failure == "":
			continue
		case q.Up:
			fmt.Fprintf(t, "%s\tup, but: %s\n", ruleName(q.Label), failed(q))
		case q.Failure != "":
			fmt.Fprintf(t, "%s\tnot up%s: %s\n", ruleName(q.Label), held(q), failed(q))
		default:
			fmt.Fprintf(t, "%s\tnot up%s (start_action %s)\n", ruleName(q.Label), held(q), q.Start)
		}
	}
	t.Flush()
}

func failed(q ike.RuleReport) string {
	return fmt.Sprintf("%s (%v ago)", q.Failure, time.Since(*q.FailedAt).Truncate(time.Second))
}

func held(q ike.RuleReport) string {
	if q.HeldDown {
		return " by ike down"
	}
	return ""
}

func ruleName(label string) string {
	if label == "" {
		return "no rule yet"
	}
	return fmt.Sprintf("rule %q", label)
}

func nat(i ike.IKEReport) string {
	switch {
	case i.NATLocal && i.NATPeer:
		return ", both behind NAT"
	case i.NATLocal:
		return ", we are behind NAT"
	case i.NATPeer:
		return ", peer behind NAT"
	}
	return ""
}

func ages(age int64, rekey, expire *int64) string {
	secs := func(n int64) time.Duration { return time.Duration(n) * time.Second }
	s := secs(age).String()
	if rekey != nil {
		s += ", rekeyed in " + secs(*rekey).String()
	}
	if expire != nil {
		s += ", ends in " + secs(*expire).String()
	}
	return s
}

func sorted[V any](m map[string]V) []string {
	l := make([]string, 0, len(m))
	for k := range m {
		l = append(l, k)
	}
	slices.Sort(l)
	return l
}
