// Command missiu is the data path of user-mode IPsec: it owns the TAP, the
// interception of one physical interface, the SPD, the SAD and the PF_KEY
// socket. See missiu(8).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/daemon"
	"github.com/missiu/missiu/pkg/datapath/bump"
	"github.com/missiu/missiu/pkg/datapath/linger"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/datapath/wire/route"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// Exit statuses (DESIGN: 0 done, 1 failed, 2 usage).
const (
	exitOK = iota
	exitFailed
	exitUsage
)

const usage = `usage: missiu -i INTERFACE [options] startRaw|start|startTun|startInline|stop|status|state

  startRaw, start   protect what is routed to a new TAP; returns when ready
  startTun          the same with --tun: a TUN, and routes for what policy covers
  startInline       sever the interface: every frame between it and the kernel
                    goes through missiu, with no route and no address changed
  stop              end the instance and leave the host as it was
  status            what the instance does
  state [high|low] [closed|passive|active]
                    show or change what becomes of the frames of a severed interface,
                    from the kernel (high) or from the interface (low)
  monitor [high|low]
                    print or write the frames on both sides of it, or on one
  tap high|low      exchange the frames of a side, of startInline, with standard
                    input and output

`

// startTimeout is how long startRaw waits for its daemon, stopTimeout how long
// stop waits for the running one.
const (
	startTimeout = 30 * time.Second
	stopTimeout  = 15 * time.Second
)

// Values of --fail.
const (
	failClosed = "closed"
	failOpen   = "open"
)

type options struct {
	change          stateChange // of state
	ifname          string
	log             string
	tap             string
	tunName         string
	routes          string
	vips            string
	offload         string
	crypto          string
	native          string
	udp             string
	mss             string
	wait            string
	queues          int
	defaultRule     string
	cpuProfile      string
	abstract        string
	fail            string
	sever           string
	opener          int // see openWhenDead
	write           string
	count           int
	tun             bool
	inline          bool
	foreground      bool
	child           bool // started by Spawn
	json            bool
	unauthenticated bool
	legacy          bool
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	var o options
	var help, version bool
	f := pflag.NewFlagSet("missiu", pflag.ContinueOnError)
	f.SortFlags = false
	f.SetOutput(io.Discard)
	f.StringVarP(&o.ifname, "interface", "i", "", "the physical `interface` (required)")
	f.StringVarP(&o.log, "log", "l", "", "log `file`; a plain name lies under "+daemon.LogDir)
	f.StringVar(&o.tap, "tap", "", "`name` of the TAP (default: the kernel's next tapN)")
	f.StringVar(&o.tunName, "tun", "", "a TUN instead of a TAP; --tun=`name` names it (default: the kernel's next tunN)")
	f.Lookup("tun").NoOptDefVal = tunUnnamed
	f.StringVar(&o.routes, "routes", "", "auto, sa or none: routes into the device for what policy covers, or has an SA (default: auto with --tun, else none)")
	f.StringVar(&o.vips, "vips", vipsShared, "shared, or own: addresses that peers assign get a TUN each, beside that of --tun")
	f.StringVar(&o.offload, "offload", "auto", "auto, or none: single packets to and from the kernel everywhere")
	f.StringVar(&o.native, "native", wire.NativeAuto, "how ESP and AH leave: auto, xdp, packet or raw")
	f.StringVar(&o.udp, "udp", "auto", "auto, or plain: the kernel neither cuts nor joins ESP in UDP")
	f.StringVar(&o.mss, "mss", "clamp", "clamp, or keep: what TCP connections through tunnels tell of their segment sizes")
	f.StringVar(&o.wait, "wait", linger.Adaptive, "adaptive, or poll: wake for each packet")
	f.IntVar(&o.queues, "queues", 1, "`number` of queues of the TAP, with a worker each way for every one")
	f.StringVar(&o.crypto, "crypto", "auto", "auto, or std for the standard library's ciphers only")
	f.StringVar(&o.defaultRule, "default", "pass", "what no policy matches: pass or drop")
	f.StringVar(&o.abstract, "abstract", "", "`@NAME`: a second name of the PF_KEY socket, in the abstract namespace")
	f.StringVar(&o.fail, "fail", failClosed, "closed or open: what becomes of a severed interface when missiu dies")
	f.StringVar(&o.sever, "sever", bump.SeverAuto, "auto, hook or namespace: how startInline gets between the interface and the kernel")
	f.BoolVar(&o.legacy, "allow-legacy", false, "accept manual SAs with legacy algorithms: DES, 3DES, MD5, RFC 1828, 1829, 1851")
	f.BoolVar(&o.unauthenticated, "allow-unauthenticated", false, "accept manual ESP SAs without integrity")
	f.StringVar(&o.cpuProfile, "cpuprofile", "", "write a CPU profile to `file` at the end, for go tool pprof")
	f.BoolVar(&o.foreground, "foreground", false, "stay in the foreground (for systemd)")
	f.BoolVar(&o.json, "json", false, "status as JSON")
	f.StringVarP(&o.write, "write", "w", "", "monitor: write pcapng to `file`, - for standard output")
	f.IntVarP(&o.count, "count", "c", 0, "monitor: end after `n` frames")
	f.BoolVarP(&help, "help", "h", false, "this help")
	f.BoolVarP(&version, "version", "V", false, "the version")
	f.BoolVar(&o.child, "child", false, "")
	f.MarkHidden("child")
	f.IntVar(&o.opener, "opener", 0, "")
	f.MarkHidden("opener")
	bad := func(format string, a ...any) int {
		fmt.Fprintf(stderr, "missiu: "+format+"\n", a...)
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	if err := f.Parse(args); err != nil {
		return bad("%v", err)
	}
	switch {
	case help:
		fmt.Fprint(stdout, usage+f.FlagUsages())
		return exitOK
	case version:
		fmt.Fprintln(stdout, "missiu", buildVersion())
		return exitOK
	case f.NArg() == 0:
		return bad("no verb; want startRaw, start, startTun, startInline, stop, status, state, monitor or tap")
	case f.NArg() > 1 && f.Arg(0) != "monitor" && f.Arg(0) != "state" && f.Arg(0) != "tap":
		return bad("more than one verb: %s", strings.Join(f.Args(), " "))
	}
	verb, words := f.Arg(0), f.Args()[1:]
	switch verb {
	case "startRaw", "start", "startTun", "startInline", "stop", "status":
	case "state":
		if err := o.parseState(words); err != nil {
			return bad("state: %v", err)
		}
	case "monitor":
		if len(words) > 1 || len(words) == 1 && sideNames[words[0]] == 0 {
			return bad("monitor %s: want high, low or nothing", strings.Join(words, " "))
		}
	case "tap":
		if len(words) != 1 || tapPurposes[words[0]] == "" {
			return bad("tap %s: want high or low", strings.Join(words, " "))
		}
	default:
		return bad("unknown verb %q; want startRaw, start, startTun, startInline, stop, status, state, monitor or tap", verb)
	}
	o.inline = verb == "startInline"
	o.tun = verb == "startTun" || f.Changed("tun")
	if o.tunName == tunUnnamed {
		o.tunName = ""
	}
	if o.routes == "" && !f.Changed("routes") {
		if o.routes = routesNone; o.tun {
			o.routes = routesAuto
		}
	}
	switch {
	case o.ifname == "" && verb != "status":
		return bad("-i INTERFACE is missing")
	case o.ifname != "" && !validIfname(o.ifname):
		return bad("-i %q: not a name of an interface", o.ifname)
	case o.count < 0:
		return bad("-c %d: want a number of frames", o.count)
	case o.fail != failClosed && o.fail != failOpen:
		return bad("--fail %q: want closed or open", o.fail)
	case f.Changed("fail") && !o.inline:
		return bad("--fail is for startInline: in the other modes what policy protects stays blocked")
	case !slices.Contains([]string{bump.SeverAuto, bump.SeverHook, bump.SeverNamespace}, o.sever):
		return bad("--sever %q: want auto, hook or namespace", o.sever)
	case f.Changed("sever") && !o.inline:
		return bad("--sever is for startInline")
	case o.sever == bump.SeverNamespace && o.native == wire.NativeXDP:
		return bad("--native xdp does not go with --sever namespace: what it sends would not be known as missiu's own")
	case o.inline && (o.tun || o.tap != "" || o.routes != routesNone || o.queues > 1):
		return bad("startInline has no device, routes or queues: --tap, --tun, --routes and --queues do not go with it")
	case o.tap != "" && !validIfname(o.tap):
		return bad("--tap %q: not a name of an interface", o.tap)
	case o.tunName != "" && !validIfname(o.tunName):
		return bad("--tun=%s: not a name of an interface", o.tunName)
	case o.tun && o.tap != "":
		return bad("--tap %s with a TUN; want --tun=%[1]s", o.tap)
	case !slices.Contains([]string{routesAuto, routesSA, routesNone}, o.routes):
		return bad("--routes %q: want auto, sa or none", o.routes)
	case o.vips != vipsShared && o.vips != vipsOwn:
		return bad("--vips %q: want shared or own", o.vips)
	case o.vips == vipsOwn && !o.tun:
		return bad("--vips own is for a TUN: want startTun, or --tun")
	case o.offload != "auto" && o.offload != "none":
		return bad("--offload %q: want auto or none", o.offload)
	case !slices.Contains([]string{wire.NativeAuto, wire.NativeXDP, wire.NativePacket, wire.NativeRaw}, o.native):
		return bad("--native %q: want auto, xdp, packet or raw", o.native)
	case o.udp != "auto" && o.udp != "plain":
		return bad("--udp %q: want auto or plain", o.udp)
	case o.mss != "clamp" && o.mss != "keep":
		return bad("--mss %q: want clamp or keep", o.mss)
	case o.wait != linger.Adaptive && o.wait != linger.Poll:
		return bad("--wait %q: want adaptive or poll", o.wait)
	case o.queues < 1 || o.queues > tap.MaxQueues:
		return bad("--queues %d: want 1 to %d", o.queues, tap.MaxQueues)
	case o.crypto != "auto" && o.crypto != "std":
		return bad("--crypto %q: want auto or std", o.crypto)
	case f.Changed("abstract") && !validAbstract(o.abstract):
		return bad("--abstract %q: want @ and a name of 1 to 106 printable characters without blanks", o.abstract)
	case o.defaultRule != "pass" && o.defaultRule != "drop":
		return bad("--default %q: want pass or drop", o.defaultRule)
	}
	var err error
	switch verb {
	case "stop":
		if o.opener != 0 {
			err = openWhenDead(&o, os.Stdin)
		} else {
			err = stop(&o)
		}
	case "status":
		err = status(&o, stdout)
	case "state":
		err = state(&o, stdout)
	case "monitor":
		err = monitor(&o, words, stdout, stderr)
	case "tap":
		err = tapSide(&o, words[0], os.Stdin, stdout, stderr)
	default:
		err = start(&o, args, stdout)
	}
	if err != nil {
		fmt.Fprintf(stderr, "missiu: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// tunUnnamed is --tun without a name: no name of an interface.
const tunUnnamed = "/"

// Values of --vips.
const (
	vipsShared = "shared" // on the device that there is
	vipsOwn    = "own"    // on a TUN of its own each
)

// Values of Status.Mode.
const (
	modeRaw    = "raw"
	modeTUN    = "tun"
	modeInline = "inline"
)

func (o *options) mode() string {
	switch {
	case o.tun:
		return modeTUN
	case o.inline:
		return modeInline
	}
	return modeRaw
}

// device is the name that was asked for, "" for the kernel's choice.
func (o *options) device() string { return o.tap + o.tunName }

func (o *options) defaultAction() ipsec.Action {
	if o.defaultRule == "drop" {
		return ipsec.Discard
	}
	return ipsec.Bypass
}

// validIfname: what the kernel takes, and what cannot lead out of a directory.
func validIfname(s string) bool {
	return s != "." && s != ".." && len(s) < unix.IFNAMSIZ && !strings.ContainsAny(s, "/: \t\n")
}

// validAbstract: what the environment of pfkey-preload and a kernel's sun_path can hold.
func validAbstract(s string) bool {
	return len(s) > 1 && len(s) <= 107 && s[0] == '@' &&
		!strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

func pidPath(ifname string) string { return filepath.Join(keysock.Dir, ifname+".pid") }

// start runs the daemon in the foreground, or starts itself again as one and
// returns when that is ready.
func start(o *options, args []string, stdout io.Writer) error {
	if o.foreground || o.child {
		return serve(o)
	}
	// The same checks come again in the daemon; here they answer at once.
	if err := precheck(o); err != nil {
		return err
	}
	pid, err := daemon.Spawn(append([]string{"--child"}, args...), startTimeout)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "missiu: %s: ready, pid %d\n", o.ifname, pid)
	return nil
}

func precheck(o *options) error {
	if pid, err := daemon.Owner(pidPath(o.ifname)); err == nil && pid != 0 {
		return fmt.Errorf("%s: %w", o.ifname, &daemon.RunningError{Path: pidPath(o.ifname), Pid: pid})
	}
	if _, err := net.InterfaceByName(o.ifname); err != nil && !(o.inline && bump.Left(o.ifname)) {
		return fmt.Errorf("%s: no such interface", o.ifname)
	}
	return nil
}

// stop ends the daemon and waits until it is gone. What a killed one left is
// removed all the same.
func stop(o *options) error {
	path := pidPath(o.ifname)
	pid, err := daemon.Owner(path)
	if err != nil {
		return err
	}
	if pid == 0 {
		return stopDead(o.ifname, path)
	}
	before, _ := os.Stat(bump.LostPath(o.ifname))
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("pid %d: %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := daemon.Owner(path)
		if err == nil && now != pid {
			if now == 0 && (errors.Is(absent(o.ifname), errDied) || bump.Left(o.ifname)) {
				return stopDead(o.ifname, path) // it failed on the way, or was what opens when it dies
			}
			after, _ := os.Stat(bump.LostPath(o.ifname))
			if why := bump.Lost(o.ifname); why != nil && !os.SameFile(before, after) {
				return fmt.Errorf("%s: stopped, but the interface is not what it was: %w", o.ifname, why)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("pid %d did not stop within %v; if it hangs, kill -9 %[1]d and stop again", pid, stopTimeout)
		case <-tick.C:
		}
	}
}

func stopDead(ifname, path string) error {
	// The lock keeps a startRaw from building while we tear down.
	lock, err := daemon.LockPidFile(path)
	if err != nil {
		return err
	}
	defer lock.Close()
	severed, err := bump.Cleanup(ifname)
	routed, err2 := route.Cleanup(ifname)
	removed, err3 := wire.Cleanup(ifname)
	if err := errors.Join(err, err2, err3); err != nil {
		return err
	}
	if removeState(ifname) || removed || routed || severed {
		return nil
	}
	return fmt.Errorf("%s: %w", ifname, keysock.ErrNoInstance)
}

func buildVersion() string {
	if i, ok := debug.ReadBuildInfo(); ok && i.Main.Version != "" {
		return i.Main.Version
	}
	return "(devel)"
}
