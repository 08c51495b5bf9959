// Ike is the key daemon of missiu: it agrees on keys with peers by IKEv2 and
// gives them to missiu by PF_KEY. The command line is described by ike -h.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"github.com/missiu/missiu/pkg/daemon"
	"github.com/missiu/missiu/pkg/ike"
	"github.com/missiu/missiu/pkg/ike/control"
	"github.com/missiu/missiu/pkg/keysock"
	"github.com/missiu/missiu/pkg/natt"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitConfig = 3
)

// Version is set by the linker.
var Version = ""

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) > 0 && verbs[args[0]] != nil {
		return verbs[args[0]](args, stdout, stderr)
	}
	o, err := parseArgs(args)
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "ike: %v\nike: see ike -h\n", err)
		return exitUsage
	case o.help:
		io.WriteString(stdout, usage)
		return exitOK
	case o.version:
		fmt.Fprintln(stdout, "ike", version())
		return exitOK
	}
	l := &loader{o: o, stdin: stdin, warn: func(s string) { fmt.Fprintln(stderr, s) }}
	conf, err := l.load()
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintln(stderr, strings.TrimRight(line, "\n"))
		}
		return exitConfig
	}
	if o.show {
		io.WriteString(stdout, conf.shown)
	}
	if o.check {
		return exitOK
	}
	if err := serve(o, l, conf, stderr); err != nil {
		fmt.Fprintf(stderr, "ike: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// serve runs the daemon until a signal ends it.
func serve(o *options, l *loader, conf *configuration, stderr io.Writer) error {
	var out zapcore.WriteSyncer = zapcore.Lock(zapcore.AddSync(stderr))
	var file *daemon.LogFile
	if o.logFile != "" {
		f, err := daemon.OpenLog(o.logFile)
		if err != nil {
			return err
		}
		file, out = f, f
	}
	level := zap.NewAtomicLevelAt(conf.level)
	log := daemon.NewLogger(out, level).Named("ike")
	l.warn = func(s string) { log.Warn(s) }

	var keyLog *ike.KeyLog
	if o.keyLog != "" {
		var err error
		if keyLog, err = ike.OpenKeyLog(o.keyLog); err != nil {
			return fmt.Errorf("--keylog: %w", err)
		}
		defer keyLog.Close()
		log.Warn("every key goes to --keylog", zap.String("file", o.keyLog))
	}
	// The directory of the sockets of missiu, which may not be there yet.
	var journal *ike.Journal
	err := keysock.MakeDir(keysock.Dir)
	if err == nil {
		journal, err = ike.OpenJournal(ike.JournalPath(keysock.Dir, o.local[0]))
	}
	if err != nil {
		log.Error("no journal of SAs: what is left after a crash will not be removed", zap.Error(err))
		journal = nil
	} else {
		defer journal.Close()
	}
	inst := &instance{ifname: o.ifname, local: o.local[0]}
	ctx, cancelWatch := context.WithCancel(context.Background())
	defer cancelWatch()
	addrsChange, routesChange, err := ike.WatchHost(ctx, func() int { return ike.HostInterface(inst.name(), o.local) })
	if err != nil {
		log.Warn("changes of addresses are not noticed", zap.Error(err))
	}
	d, err := ike.New(ike.Config{
		Local: o.local, Rules: conf.rules, Connect: o.connect, Limits: conf.limits,
		IKEPort: conf.ikePort, NATTPort: conf.nattPort,
		Listen: ike.ListenUDP, Dial: inst.dial, DialNATT: inst.dialNATT, KeyLog: keyLog, Journal: journal,
		Resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		Addrs:       func() []netip.Addr { return ike.HostAddrs(inst.name(), o.local) },
		AddrsChange: addrsChange, RoutesChange: routesChange,
		Ready: daemon.NewReadiness(false).Ready, Log: log,
	})
	if err != nil {
		return err
	}
	hups := make(chan struct{}, 1)
	ctx, cancel := daemon.Signals(ctx, func() {
		select {
		case hups <- struct{}{}:
		default:
		}
	})
	defer cancel()
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, syscall.SIGUSR1)
	defer signal.Stop(usr1)

	if ctl, err := control.Listen(o.local[0], d.Control); err != nil {
		log.Error("no control socket: ike status, up, down and rekey do not reach this daemon", zap.Error(err))
	} else {
		defer ctl.Close()
	}
	result := make(chan error, 1)
	go func() { result <- d.Run(ctx) }()
	for {
		select {
		case err := <-result:
			return err
		case <-usr1:
			d.LogStatus()
		case <-hups:
			if file != nil {
				if err := file.Reopen(); err != nil {
					log.Error("log file", zap.Error(err))
				}
			}
			// Both files are good and replace the old state, or nothing changes.
			now, err := l.load()
			if err != nil {
				for line := range strings.Lines(err.Error()) {
					log.Error(strings.TrimPrefix(strings.TrimRight(line, "\n"), "ike: "))
				}
				log.Error("configuration unchanged")
				break
			}
			level.SetLevel(now.level)
			if now.ikePort != conf.ikePort || now.nattPort != conf.nattPort {
				log.Warn("ike_port and natt_port change with the next start only")
			}
			d.Reload(ctx, now.rules, now.limits)
			log.Info("configuration read again")
		}
	}
}

// instance finds the missiu that serves us.
type instance struct {
	ifname string // -i
	local  netip.Addr
	mu     sync.Mutex
	found  string
}

// name is the interface of the instance that was found last, "" if none was.
func (i *instance) name() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.found
}

// find returns the interface of the instance: the one asked for, the one that
// has our address, else the only one that runs.
func (i *instance) find() (string, error) {
	if i.ifname != "" {
		_, err := keysock.Find(i.ifname)
		return i.ifname, err
	}
	ifs, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	for _, f := range ifs {
		if hasAddr(f, i.local) {
			if _, err := keysock.Find(f.Name); err == nil {
				return f.Name, nil
			}
		}
	}
	path, err := keysock.Find("")
	if err != nil {
		return "", err
	}
	base := path[strings.LastIndexByte(path, '/')+1:]
	return strings.TrimSuffix(base, ".pfkey"), nil
}

func hasAddr(f net.Interface, a netip.Addr) bool {
	addrs, err := f.Addrs()
	if err != nil {
		return false
	}
	for _, x := range addrs {
		if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().WithZone("") == a.WithZone("") {
			return true
		}
	}
	return false
}

func (i *instance) dial(ctx context.Context) (ike.KeySocket, error) {
	name, err := i.find()
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	i.found = name
	i.mu.Unlock()
	c, err := keysock.Dial(ctx, keysock.Path(name))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// dialNATT comes after dial.
func (i *instance) dialNATT(ctx context.Context) (ike.Conn, error) {
	name := i.name()
	if name == "" {
		return nil, errors.New("no instance of missiu")
	}
	return ike.DialNATT(ctx, natt.Path(name))
}

func version() string {
	if Version != "" {
		return Version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}
