// Bench measures missiu beside other user-mode tunnels and the bare wire, all
// interleaved in one run, and says how the goals are met. It needs root and
// what scripts/setup --bench installs; `make bench` calls it.
//
//	bench [flags]           measure
//	bench profile [flags]   a flame graph of missiu under load
//
// Every system has two gateways of its own, all alike: network namespaces
// joined by a veth (the wire, MTU 1500), with the endpoints in the gateways
// themselves, so that nothing but the system under test lies between them. One
// is at work at a time; the daemons of the others are stopped meanwhile, and
// measured when they have caught up with what they missed. All of them take turns
// in each round, in changing order, and ratios are taken within rounds, since
// machines change their speed from minute to minute.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/missiu/missiu/test/bench/report"
	"github.com/missiu/missiu/test/bench/traffic"
	"github.com/missiu/missiu/test/e2e/lab"
)

// agentVerb has the program be an agent; for itself alone.
const agentVerb = "agent"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		if errors.Is(err, errUsage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == agentVerb:
		return traffic.Serve(args[1])
	case len(args) > 0 && args[0] == "profile":
		return profile(args[1:])
	}
	p, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: makes network namespaces")
	}
	return p.run()
}

var errUsage = errors.New("wrong usage")

// works are what can be measured.
var works = []string{"tcp1", "tcp4", "udp1400", "udp64", "ping", "overload"}

// bareWorks are what is measured on a wire without offload unless flags say
// otherwise: no goal speaks of it, but the figures must not rest on offload.
var bareWorks = []string{"tcp1", "udp1400"}

// pace is how long things take.
type pace struct {
	rounds int
	bare   int           // rounds on a wire without offload
	window time.Duration // of a TCP measurement
	trial  time.Duration // of one rate
	trials int
	step   float64 // precision of the search
	pings  int
	limit  time.Duration // of the whole run: rounds but the first of a setting are left out beyond it
}

var (
	full  = pace{rounds: 3, bare: 2, window: time.Second, trial: 250 * time.Millisecond, trials: 8, step: 1.1, pings: 300, limit: 14 * time.Minute}
	quick = pace{rounds: 2, bare: 2, window: time.Second, trial: 250 * time.Millisecond, trials: 8, step: 1.15, pings: 300, limit: 165 * time.Second}
)

// plan is what to do.
type plan struct {
	pace
	systems  []*system
	works    []string
	settings []report.Setting
	everyone bool   // has all works, because flags name them; else those that goals and tables need
	out      string // name of the files without suffix
	lock     string
	patience time.Duration // for others' work, in all

	mu      sync.Mutex // after an interruption the phase may still be at work
	results report.Results
}

// flags reads the command line, which has nothing but flags.
func flags(f *flag.FlagSet, args []string) error {
	f.SetOutput(io.Discard)
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		f.SetOutput(os.Stdout)
		f.Usage()
		return err
	case err != nil:
		return fmt.Errorf("%w: %v", errUsage, err)
	case f.NArg() > 0:
		return fmt.Errorf("%w: %q", errUsage, f.Arg(0))
	}
	return nil
}

// quickSystems are those that the main figures need.
var quickSystems = []string{report.Missiu, report.MissiuNative, report.WireGuard, report.OpenVPN, report.Libipsec, report.Plain}

func parse(args []string) (*plan, error) {
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	var (
		isQuick  = f.Bool("quick", false, "the main figures in less than three minutes")
		names    = f.String("systems", "", "`list` of systems, joined by commas (default: all)")
		workList = f.String("works", "", "`list` of works (default: all): "+strings.Join(works, ","))
		families = f.String("families", "", "4, 6 or 4,6 (default: both; quick: 4)")
		offload  = f.String("offload", "", "of the wire: on, off or on,off (default: both; quick: on)")
		rounds   = f.Int("rounds", 0, "how often each system has its turn")
		out      = f.String("o", "", "`file` for the report; .md and .svg are added (default: below results/)")
		lock     = f.String("lock", "", "lock `file` to hold while measuring a system, for machines that several measure on")
		patience = f.Duration("patience", 0, "how long to wait in all for others to leave the machine alone (default 1m; quick: 20s)")
	)
	if err := flags(f, args); err != nil {
		return nil, err
	}
	p := &plan{pace: full, lock: *lock, patience: time.Minute}
	choose := func(s, otherwise string) []string {
		if s == "" {
			s = otherwise
		}
		return strings.Split(s, ",")
	}
	var all []string
	for i := range systems {
		all = append(all, systems[i].ID)
	}
	defSystems, defWorks, defFamilies, defOffload := strings.Join(all, ","), strings.Join(works, ","), "4,6", "on,off"
	if *isQuick {
		p.pace, p.patience = quick, 20*time.Second
		defSystems, defWorks, defFamilies, defOffload = strings.Join(quickSystems, ","), "tcp1,tcp4,udp1400,udp64,ping", "4", "on"
	}
	if *rounds > 0 {
		p.rounds, p.bare, p.limit = *rounds, *rounds, 24*time.Hour
	}
	if *patience > 0 {
		p.patience = *patience
	}
	for _, n := range choose(*names, defSystems) {
		i := slices.Index(all, n)
		if i < 0 {
			return nil, fmt.Errorf("%w: no system %q; there are %s", errUsage, n, strings.Join(all, ", "))
		}
		p.systems = append(p.systems, &systems[i])
	}
	p.everyone = *workList != ""
	for _, n := range choose(*workList, defWorks) {
		if !slices.Contains(works, n) {
			return nil, fmt.Errorf("%w: no work %q; there are %s", errUsage, n, strings.Join(works, ", "))
		}
		p.works = append(p.works, n)
	}
	for _, o := range choose(*offload, defOffload) {
		for _, fam := range choose(*families, defFamilies) {
			i := strings.Index("4 6", fam)
			if len(fam) != 1 || i < 0 || o != "on" && o != "off" {
				return nil, fmt.Errorf("%w: family %q, offload %q; want 4 or 6, on or off", errUsage, fam, o)
			}
			p.settings = append(p.settings, report.Setting{Family: 4 + i, Offload: o == "on"})
		}
	}
	p.results = report.Results{Start: time.Now(), Machine: describe(), Command: strings.Join(append([]string{"bench"}, args...), " "), Settings: p.settings}
	for _, s := range p.systems {
		p.results.Systems = append(p.results.Systems, s.System)
	}
	if p.out = *out; p.out == "" {
		root, err := lab.Root()
		if err != nil {
			return nil, err
		}
		p.out = filepath.Join(root, "results", "bench-"+p.results.Start.Format("20060102-150405"))
	}
	return p, nil
}

func (p *plan) note(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	fmt.Fprintln(os.Stderr, "  ! "+s)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.results.Notes = append(p.results.Notes, s)
}

// check looks at the wire and keeps what it showed.
func (p *plan) check(in *instance, set report.Setting, when string) error {
	said, err := in.checkWire()
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.results.Checks = append(p.results.Checks, fmt.Sprintf("%s, %v%s: %s", in.Title, set, when, said))
	return nil
}

func (p *plan) run() error {
	p.systems = slices.DeleteFunc(p.systems, func(s *system) bool {
		m := s.missing()
		if m != "" {
			p.note("%s left out: no %s; scripts/setup --bench installs it", s.Title, m)
		}
		return m != ""
	})
	err := lab.Stage(func(t lab.TB) {
		lab.Bin(t)
		for _, family := range []int{4, 6} {
			var sets []report.Setting // with offload first
			for _, offload := range []bool{true, false} {
				if set := (report.Setting{Family: family, Offload: offload}); slices.Contains(p.settings, set) {
					sets = append(sets, set)
				}
			}
			if len(sets) > 0 {
				p.family(t, sets)
			}
		}
	})
	// What was measured before an interruption is worth telling.
	return errors.Join(err, p.write())
}

// worksOf are what a system is measured in.
func (p *plan) worksOf(s *system, set report.Setting) []string {
	if p.everyone {
		return p.works
	}
	return slices.DeleteFunc(slices.Clone(p.works), func(w string) bool {
		if !set.Offload && !(s.bare && slices.Contains(bareWorks, w)) {
			return true
		}
		return s.works != nil && !slices.Contains(s.works, w)
	})
}

// family starts all systems and measures them in one setting after the other,
// which differ in the wire only.
func (p *plan) family(t lab.TB, sets []report.Setting) {
	var ins []*instance
	defer func() {
		for _, in := range ins {
			in.t.End()
		}
	}()
	for _, s := range p.systems {
		if !slices.ContainsFunc(sets, func(set report.Setting) bool { return len(p.worksOf(s, set)) > 0 }) {
			continue
		}
		unlock := p.hold(t)
		in, err := startInstance(s, sets[0])
		ins = append(ins, in)
		t.Cleanup(in.t.End)
		if err == nil {
			err = in.freeze()
		}
		unlock()
		if err != nil {
			p.note("%s, %v: does not work: %v", s.Title, sets[0], err)
			in.t.End()
			for _, l := range in.t.Logs() {
				fmt.Fprintln(os.Stderr, l)
			}
			ins = ins[:len(ins)-1]
			continue
		}
		fmt.Fprintf(os.Stderr, "  %s is up\n", s.ID)
	}
	for i, set := range sets {
		if i > 0 {
			for _, in := range ins {
				if err := in.t.Try(in.noOffload); err != nil {
					p.note("%s, %v: %v", in.Title, set, err)
				}
			}
		}
		p.phase(t, set, ins)
	}
}

// phase measures systems in one setting.
func (p *plan) phase(t lab.TB, set report.Setting, ins []*instance) {
	fmt.Fprintf(os.Stderr, "%v, after %v\n", set, time.Since(p.results.Start).Round(time.Second))
	ins = slices.DeleteFunc(slices.Clone(ins), func(in *instance) bool { return len(p.worksOf(in.system, set)) == 0 })
	rounds := p.rounds
	if !set.Offload {
		rounds = p.bare
	}
	end, took := p.results.Start.Add(p.share(set)), time.Duration(0)
	for round := range rounds {
		start := time.Now()
		if round > 0 && start.Add(took).After(end) {
			p.note("%v: %d rounds instead of %d, for want of time", set, round, rounds)
			break
		}
		for i := range ins {
			in := ins[(i+round)%len(ins)]
			unlock := p.hold(t)
			p.turn(in, set, round)
			unlock()
		}
		took = time.Since(start)
	}
	for _, in := range ins {
		unlock := p.hold(t)
		err := in.thaw()
		if err == nil {
			err = p.check(in, set, ", at the end")
		}
		if err != nil {
			p.note("%s, %v, at the end: %v", in.Title, set, err)
		}
		in.freeze()
		unlock()
	}
}

// share is the part of the limit, from the start, in which the rounds of a
// setting and of those before it are to end.
func (p *plan) share(set report.Setting) time.Duration {
	sum, upTo := 0, 0
	for _, family := range []int{4, 6} {
		for _, offload := range []bool{true, false} {
			s := report.Setting{Family: family, Offload: offload}
			if !slices.Contains(p.settings, s) {
				continue
			}
			if sum++; offload {
				sum += 3 // it has many more works, and starts the systems
			}
			if s == set {
				upTo = sum
			}
		}
	}
	return p.limit * time.Duration(upTo) / time.Duration(sum)
}

// hold takes the lock file, if there is one.
func (p *plan) hold(t lab.TB) (unlock func()) {
	if p.lock == "" {
		return func() {}
	}
	f, err := os.OpenFile(p.lock, os.O_RDONLY|os.O_CREATE, 0o644)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatalf("%s: %v", p.lock, err)
	}
	return func() { f.Close() }
}

// turn measures all works of one system once; in the first round it looks at
// the wire, too.
func (p *plan) turn(in *instance, set report.Setting, round int) {
	err := in.thaw()
	if err == nil && round == 0 {
		err = p.check(in, set, "")
	}
	if err != nil {
		p.note("%s, %v, round %d: %v", in.Title, set, round+1, err)
		in.freeze()
		return
	}
	defer in.freeze()
	for _, w := range p.worksOf(in.system, set) {
		if w == "overload" && round > 0 {
			continue
		}
		f, disturbed, err := p.calmly(func() (figures, error) { return p.work(in, w) })
		if err != nil {
			p.note("%s, %v, round %d, %s: %v", in.Title, set, round+1, w, err)
		}
		p.mu.Lock()
		for m, v := range f {
			p.results.Add(report.Key{Setting: set, System: in.ID, Metric: m}, round, v, disturbed)
		}
		p.mu.Unlock()
		fmt.Fprintf(os.Stderr, "  round %d %-14s %-8s %s\n", round+1, in.ID, w, line(f, disturbed))
	}
}

func (p *plan) work(in *instance, w string) (figures, error) {
	switch w {
	case "tcp1":
		return in.tcp(1, p.window, report.TCP1, report.TCP1CPU, report.TCP1Total)
	case "tcp4":
		return in.tcp(4, p.window, report.TCP4, report.TCP4CPU, report.TCP4Total)
	case "udp1400":
		return in.udpSearch(1400, &p.pace, report.UDP1400, report.UDP1400CPU, report.UDP1400Blast)
	case "udp64":
		return in.udpSearch(64, &p.pace, report.UDP64, report.UDP64CPU, report.UDP64Blast)
	case "ping":
		return in.ping(p.pings)
	default:
		return in.overload(&p.pace)
	}
}

// line prints figures for whoever watches.
func line(f figures, disturbed bool) string {
	var parts []string
	for m, v := range f {
		parts = append(parts, fmt.Sprintf("%s %s", m, report.Number(v)))
	}
	slices.Sort(parts)
	if disturbed {
		parts = append(parts, "(disturbed)")
	}
	return strings.Join(parts, ", ")
}

// Others may have this share of the machine; calmSample is how long a look at
// them takes, attempts how often a work is measured until they are that quiet.
const (
	tolerated  = 0.05
	calmSample = 100 * time.Millisecond
	attempts   = 3
)

// calmly measures while others leave the machine alone, as long as patience
// lasts, and tells whether they disturbed the measurement all the same. Of
// several attempts the least disturbed counts.
func (p *plan) calmly(measure func() (figures, error)) (best figures, disturbed bool, err error) {
	least := 2.0
	for n := 1; ; n++ {
		p.waitForCalm()
		before, err := look()
		if err != nil {
			return nil, false, err
		}
		f, err := measure()
		if err != nil {
			return f, false, err
		}
		after, err := look()
		if err != nil {
			return nil, false, err
		}
		others := before.foreign(after, os.Getpid())
		if others < least {
			best, least = f, others
		}
		if others > tolerated {
			p.patience -= after.at.Sub(before.at)
		}
		if least <= tolerated || n == attempts || p.patience <= 0 {
			return best, least > tolerated, nil
		}
	}
}

func (p *plan) waitForCalm() {
	for p.patience > 0 {
		before, err := look()
		if err != nil {
			return
		}
		time.Sleep(calmSample)
		after, err := look()
		if err != nil || before.foreign(after, os.Getpid()) <= tolerated {
			return
		}
		p.patience -= calmSample
	}
}

// write makes the report's files and shows the table.
func (p *plan) write() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := os.MkdirAll(filepath.Dir(p.out), 0o755); err != nil {
		return err
	}
	md, err := os.Create(p.out + ".md")
	if err != nil {
		return err
	}
	svg, err := os.Create(p.out + ".svg")
	if err != nil {
		md.Close()
		return err
	}
	err = errors.Join(p.results.Markdown(md), md.Close(), p.results.SVG(svg), svg.Close(), p.results.Markdown(os.Stdout))
	fmt.Fprintf(os.Stderr, "bench: wrote %s.md and .svg\n", p.out)
	return err
}
