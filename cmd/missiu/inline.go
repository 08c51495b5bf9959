package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/daemon"
	"github.com/missiu/missiu/pkg/datapath"
	"github.com/missiu/missiu/pkg/datapath/bump"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/keysock"
)

// physical is the interface as the main uses it: a wire.Wire, or what sends over
// a severed one.
type physical interface {
	datapath.Wire
	Link() wire.Link
	VerifyTooBig(func(wire.TooBig) bool)
	Fallbacks() <-chan wire.Fallback
	Tampered() <-chan error
	Changes() <-chan wire.Link
	Err() error
	Path() (in, out string)
	Stats() wire.Stats
	SetDivert(v4, v6 []netip.Prefix) error
	ChangeDivert(add, remove []netip.Prefix) error
	Close() error
}

// fits: what a killed instance of another mode keeps closed is not for this one.
func (in *instance) fits(adopted string) error {
	switch {
	case in.o.inline && adopted != "":
		return fmt.Errorf("%s: a startRaw or startTun that was killed has left %s; stop first", in.o.ifname, adopted)
	case !in.o.inline && bump.Left(in.o.ifname):
		return fmt.Errorf("%s: severed by a startInline that was killed; startInline takes over, stop opens it", in.o.ifname)
	}
	return nil
}

// openInline severs the interface, as the last step.
func (in *instance) openInline() (err error) {
	o := in.o
	if in.bump, err = bump.Open(o.ifname, bump.Options{FailOpen: o.fail == failOpen, Offload: o.offload, Wait: o.wait, Sever: o.sever}); err != nil {
		return err
	}
	in.log.Info("severed", zap.String("by", in.bump.Severed()))
	native := o.native
	if in.bump.Severed() == bump.SeverNamespace {
		if native == wire.NativeXDP {
			return fmt.Errorf("%s: --native xdp: %w", o.ifname, errXDPAway)
		}
		if native == wire.NativeAuto {
			native = wire.NativePacket
		}
		if !in.bump.Kept() {
			in.log.Warn("this mount namespace may end with the daemon, and the private network namespace with it: after a kill nobody could take over")
		}
		if o.fail == failOpen {
			if in.opener, err = startOpener(o.ifname); err != nil {
				return fmt.Errorf("--fail open: %w", err)
			}
		}
	}
	if lack := in.bump.Guarded(); lack != nil && o.fail != failOpen {
		in.log.Warn("frames may pass for a moment when somebody flushes the packet filter or renames the interface", zap.Error(lack), zap.Bool("owned", in.bump.Owned()))
	}
	plain := o.offload == tap.OffloadNone || o.udp == "plain"
	way, taken, err := bump.OpenWay(in.bump, wire.Options{Native: native, Wait: o.wait}, wire.UDPOptions{GRO: !plain, Plain: plain, Wait: o.wait})
	if err != nil {
		return err
	}
	in.wire, in.tap = way, in.bump.Device()
	if lack := in.missing(); lack != "" {
		in.log.Warn("the kernel lacks an offload of packet sockets; slower", zap.String("lack", lack))
	}
	c := datapath.Config{Low: in.bump.LowSide(), Bridged: way.Bridged, Heard: way.Heard}
	if taken == nil {
		c.UDP, in.port = way.UDP(), way.UDP()
	} else {
		in.log.Warn("ESP in UDP is taken from the interface: port 4500 is another's", zap.Error(taken))
	}
	if err := in.openEngine(c); err != nil {
		return err
	}
	for _, side := range []bump.Side{bump.High, bump.Low} {
		t, err := in.bump.Listen(side, attach.Path(o.ifname, tapPurposes[side.String()]))
		if err != nil {
			return err
		}
		in.taps = append(in.taps, t)
	}
	if in.ctl, err = attach.Listen(attach.Path(o.ifname, statePurpose), maxStateClients, in.serveState); err != nil {
		return err
	}
	if in.bump.Adopted() {
		in.log.Warn("took over an interface that was severed", zap.Stringer("high", in.bump.State(bump.High)), zap.Stringer("low", in.bump.State(bump.Low)))
		return nil
	}
	return in.bump.SetState(bump.Active, bump.Active)
}

// errXDPAway: packets of AF_XDP bear no mark.
var errXDPAway = errors.New("what it sends would not be known as missiu's own where a private namespace severs the interface")

// An interface that is away comes back by somebody's doing alone: with --fail open
// by that of a second process, which waits for the end of the first. Their pipe tells: the
// kernel closes it when the daemon dies, which writes to it when it ends in order.

// startOpener starts it, and returns the daemon's end.
func startOpener(ifname string) (*os.File, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command(self, "-i", ifname, fmt.Sprintf("--opener=%d", os.Getpid()), "stop")
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	go cmd.Wait() // it may be killed before us
	return w, nil
}

// openWhenDead is the second process; o.opener is the pid of the first.
func openWhenDead(o *options, pipe io.Reader) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	stay := bump.StayOf(o.ifname)
	if word, err := io.ReadAll(pipe); err != nil || len(word) > 0 {
		return err
	}
	for {
		lock, err := daemon.LockPidFile(pidPath(o.ifname))
		if running := (*daemon.RunningError)(nil); errors.As(err, &running) {
			if running.Pid == 0 || running.Pid == o.opener {
				time.Sleep(time.Millisecond) // the kernel takes what it had one by one
				continue
			}
			if stay.Over(o.ifname) {
				return nil // somebody has taken over, or stops
			}
			time.Sleep(20 * time.Millisecond) // or tries to, and may fail
			continue
		}
		if err != nil {
			return err
		}
		defer lock.Close()
		if stay.Over(o.ifname) {
			return nil
		}
		_, err = bump.Cleanup(o.ifname)
		return err
	}
}

// bumpNews are the channels of what happens to a severed interface; nil: it is none.
func (in *instance) bumpNews() (<-chan bump.Event, <-chan error) {
	if in.bump == nil {
		return nil, nil
	}
	return in.bump.Events(), in.wire.(*bump.Way).Failures()
}

func (in *instance) bumpEvent(e bump.Event) {
	fields := []zap.Field{zap.String("what", e.What), zap.String("name", e.Link.Name), zap.Int("index", e.Link.Index), zap.String("mac", e.Link.MAC.String())}
	if e.Err != nil {
		in.log.Error("the severed interface is not as it ought to be; tried again", append(fields, zap.Error(e.Err))...)
	} else {
		in.log.Warn("something happened to the severed interface", fields...)
	}
	if e.Moved {
		in.wire.(*bump.Way).Renew()
	}
}

// BumpStatus describes a severed interface.
type BumpStatus struct {
	High string `json:"high"` // closed, passive, active
	Low  string `json:"low"`
	Fail string `json:"fail"` // closed, open
	By   string `json:"by"`   // hook, namespace
}

func (in *instance) bumpStatus(s *Status) {
	s.Bump = &BumpStatus{in.bump.State(bump.High).String(), in.bump.State(bump.Low).String(), in.o.fail, in.bump.Severed()}
	for _, side := range []bump.Side{bump.High, bump.Low} {
		b := in.bump.Stats(side)
		for what, n := range map[string]uint64{"read": b.Read, "written": b.Written, "silent": b.Silent, "refused": b.Refused, "kernel_drops": b.Dropped, "cut": b.Cut} {
			s.Counters[fmt.Sprintf("bump_%v_%s", side, what)] = n
		}
	}
	for k, t := range in.taps {
		ts := t.Stats()
		for what, n := range map[string]uint64{"programs": uint64(ts.Programs), "given": ts.Given, "lost": ts.Lost, "taken": ts.Taken, "bad": ts.Bad} {
			s.Counters[fmt.Sprintf("tap_%v_%s", bump.Side(k), what)] = n
		}
	}
	if p, ok := in.port.(*bump.Port); ok {
		from, to := p.Path()
		s.Paths["esp in udp"] = "in: bump, " + from + "; out: " + to
		us := p.Stats()
		s.Counters["udp_sent_trains"], s.Counters["udp_sent_singles"] = us.Trains, us.Singles
		s.Counters["udp_trains_refused"], s.Counters["udp_send_refused"] = us.Fallbacks, us.Refused
		s.Counters["udp_messages"], s.Counters["udp_truncated"], s.Counters["udp_kernel_drops"] = us.Messages, us.Truncated, us.KernelDrops
	}
}

// The socket by which states are asked for and changed: one request, one answer,
// as JSON.
const (
	statePurpose    = "state"
	maxStateClients = 16
	stateTimeout    = 10 * time.Second
)

// stateChange is the request: names of states, "" for no change.
type stateChange struct {
	High string `json:"high,omitempty"`
	Low  string `json:"low,omitempty"`
}

// stateAnswer tells the states, or why they were not changed.
type stateAnswer struct {
	stateChange
	Error string `json:"error,omitempty"`
}

// parseState reads the words behind the verb.
func (o *options) parseState(words []string) error {
	switch len(words) {
	case 0:
		return nil
	case 1, 2:
	default:
		return fmt.Errorf("%q is one word too many", words[2])
	}
	name := words[len(words)-1]
	if _, err := bump.ParseState(name); err != nil {
		return fmt.Errorf("%q: want closed, passive or active", name)
	}
	switch {
	case len(words) == 1:
		o.change = stateChange{name, name}
	case words[0] == bump.High.String():
		o.change.High = name
	case words[0] == bump.Low.String():
		o.change.Low = name
	default:
		return fmt.Errorf("%q: want high or low", words[0])
	}
	return nil
}

// state asks a running instance, and has it change the states first.
func state(o *options, w io.Writer) error {
	a, err := askState(o)
	if gone(err) {
		if err = absent(o.ifname); !errors.Is(err, errDied) {
			if _, e := ask(keysock.Path(o.ifname)); e == nil {
				err = errNotInline
			}
		}
	}
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.ifname, err)
	}
	_, err = fmt.Fprintf(w, "%s: high %s, low %s\n", o.ifname, a.High, a.Low)
	return err
}

var errNotInline = errors.New("not severed: the instance was not started by startInline")

func askState(o *options) (a stateAnswer, err error) {
	c, err := attach.Dial(attach.Path(o.ifname, statePurpose))
	if err != nil {
		return a, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(stateTimeout))
	b, err := json.Marshal(o.change)
	if err != nil {
		return a, err
	}
	if _, err := c.Write(b); err != nil {
		return a, err
	}
	answer := make([]byte, 4096)
	n, err := c.Read(answer)
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(answer[:n], &a)
}

// stating serialises changes of one side, which keep the other's state.
var stating sync.Mutex

// serveState answers one request.
func (in *instance) serveState(c *net.UnixConn) {
	c.SetDeadline(time.Now().Add(stateTimeout))
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err != nil {
		return
	}
	var a stateAnswer
	if err := in.changeState(b[:n]); err != nil {
		a.Error = err.Error()
	}
	a.High, a.Low = in.bump.State(bump.High).String(), in.bump.State(bump.Low).String()
	if b, err = json.Marshal(a); err == nil {
		c.Write(b)
	}
}

func (in *instance) changeState(request []byte) error {
	var r stateChange
	if err := json.Unmarshal(request, &r); err != nil {
		return err
	}
	stating.Lock()
	defer stating.Unlock()
	to := [2]bump.State{in.bump.State(bump.High), in.bump.State(bump.Low)}
	for i, name := range []string{r.High, r.Low} {
		if name == "" {
			continue
		}
		var err error
		if to[i], err = bump.ParseState(name); err != nil {
			return err
		}
	}
	if r == (stateChange{}) {
		return nil
	}
	if err := in.bump.SetState(to[bump.High], to[bump.Low]); err != nil {
		return err
	}
	in.log.Info("states changed", zap.Stringer("high", to[bump.High]), zap.Stringer("low", to[bump.Low]))
	return nil
}
