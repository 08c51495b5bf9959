package ike

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// lineage is an IKE SA and what it becomes by rekeying: one goroutine, there while
// there is something to do, that owns the machine.
type lineage struct {
	d         *Daemon
	sa        *sa.SA // of the goroutine
	log       *zap.Logger
	local     netip.AddrPort
	remote    netip.AddrPort // of the first message
	initiator bool

	inbox    inbox
	timer    *time.Timer // of the goroutine; nil: not needed yet
	killed   chan struct{}
	killOnce sync.Once
	ended    chan struct{}

	rekeys map[rekeyKey][]*ticket // of the goroutine
	upkeep
	known  bool      // of the goroutine: the peer is authenticated
	done   bool      // of the goroutine
	dropAt time.Time // of the goroutine: when to end without the peer; zero: never
	lone   []lone    // of the goroutine, soonest first

	// Of the goroutine: packets counted by inbound child SAs when last asked.
	children map[ipsec.SAID]childCount
	fresh    bool            // of the goroutine: established, and the hook has not been run
	given    sa.Lease        // of the goroutine: to the peer, or by it
	hook     *hook           // of the goroutine
	leased   []*lease        // of the goroutine: addresses that the peer has of us
	inner    []netip.Addr    // of the goroutine: addresses that we have of the peer
	dnsFile  string          // of the goroutine: where its name servers are written; "": nowhere
	gaveUp   <-chan struct{} // of the goroutine: what of the mirror it waited for in vain

	// Behind d.mu.
	spis     []sa.SPI
	sas      map[ipsec.SAID]netip.Addr // child SAs installed, with their sources
	was      map[ipsec.SAID]ipsec.SAID // those that have moved: where they were before
	init     initKey
	halfOpen bool
	origin   origin
	over     bool     // has Failed: takes no new children
	peer     *sa.Peer // once established
	// When it began and when it was established, by d.clock.
	began, proven uint64
	pending       map[acquireKey]*pendingChild // child SAs in work
	has           map[acquireKey]int           // child SAs by policy and protocol
	starter       *starter
	label         string    // of the rule, once there is one for certain
	retiring      bool      // takes no new children: its successor is being made
	then          func()    // follows its end
	ups, ends     []*ticket // wait for it to be established, and to end
}

type childCount struct {
	src     netip.Addr
	packets uint64
	policy  uint32
}

// lone is an SA that is not enough for its policy: at is when the other one, of
// protocol lacks, should have come.
type lone struct {
	at     time.Time
	in     ipsec.SAID
	policy *ipsec.Policy
	lacks  ipsec.Protocol
}

// acquireKey tells wanted child SAs apart: two requests with the same key want
// the same SA.
type acquireKey struct {
	policy uint32
	proto  ipsec.Protocol // the first that is offered
	queue  ipsec.Queue
	flow   ipsec.Flow
}

// pendingChild is a child SA in work: the number it was asked for with, and
// those of ACQUIREs that came for it since.
type pendingChild struct {
	seq     uint32
	later   []uint32
	tickets []*ticket // who waits besides
}

// take removes what is pending for a child SA that came, or failed, and
// returns it; d.mu is held. Of several that nobody asked for by a number, that of
// proto goes before others.
func (l *lineage) take(seq uint32, policy uint32, proto ipsec.Protocol) *pendingChild {
	var key *acquireKey
	for k, p := range l.pending {
		if p.seq == seq && k.policy == policy && (key == nil || k.proto == proto) {
			key = &k
		}
	}
	if key == nil {
		return &pendingChild{seq: seq}
	}
	p := l.pending[*key]
	delete(l.pending, *key)
	return p
}

// fail reports every ACQUIRE of p as failed.
func (p *pendingChild) fail(d *Daemon, err error) {
	endAll(p.tickets, err)
	errno := errnoOf(err)
	for _, seq := range append(p.later, p.seq) {
		if seq != 0 {
			d.acquireFailed(seq, errno)
		}
	}
}

func (d *Daemon) newLineage(local, remote netip.AddrPort, initiator bool) *lineage {
	return &lineage{
		d: d, local: local, remote: remote, initiator: initiator,
		log:      d.logOf(local.Addr()),
		killed:   make(chan struct{}),
		ended:    make(chan struct{}),
		children: map[ipsec.SAID]childCount{},
		sas:      map[ipsec.SAID]netip.Addr{},
		pending:  map[acquireKey]*pendingChild{},
		has:      map[acquireKey]int{},
		rekeys:   map[rekeyKey][]*ticket{},
	}
}

func (l *lineage) config(initialContact bool) sa.Config {
	return sa.Config{
		Local: l.local, Remote: l.remote, IKEPort: l.d.cfg.IKEPort, NATTPort: l.d.cfg.NATTPort,
		Host: host{l.d, l}, InitialContact: initialContact, HalfOpen: l.d.budget.expire(), TellKeys: l.d.cfg.KeyLog != nil, Rand: l.d.cfg.Rand,
		Addrs: l.d.ours(), NoNATT: l.d.noNATT, CPI: l.d.nextCPI,
		Queues: int(l.d.queues.Load()), Had: l.d.assigned.had(l.label),
	}
}

// nextCPI is sa.Config.CPI: one peer may have several lineages.
func (d *Daemon) nextCPI() uint32 { return d.cpis.Add(1) }

// logOf is the log for lines about the SAs of an address of ours. They share it:
// each logger has a buffer.
func (d *Daemon) logOf(local netip.Addr) *zap.Logger {
	if log := d.logs[local]; log != nil {
		return log
	}
	return d.log.With(zap.Stringer("local", local))
}

// start registers l and runs it, beginning with first. It returns false when
// the daemon is stopping.
func (d *Daemon) start(l *lineage, first call) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopping {
		return false
	}
	d.lineages[l] = struct{}{}
	d.clock++
	l.began = d.clock
	if l.halfOpen {
		d.byInit[l.init] = l
	}
	l.put(func(b *inbox) bool { b.calls = append(b.calls, first); return true })
	return true
}

func (l *lineage) delete(now time.Time) []sa.Output { return l.sa.Delete(now) }

// endSoon ends a lineage that is probably a leftover. The peer is told all the
// same, and has a moment to answer: when both sides begin at once INITIAL_CONTACT
// may be said of an SA that is alive.
func (l *lineage) endSoon(now time.Time) []sa.Output {
	l.dropAt = now.Add(leftoverGrace)
	return l.sa.Delete(now)
}

// serve is the goroutine: it handles inputs until there are no more for now.
func (l *lineage) serve() {
	for {
		in, ok := l.inbox.take()
		if !ok {
			return
		}
		if !l.handle(in) {
			l.forget()
			return
		}
		l.setTimer()
	}
}

// handle gives the machine its inputs. It returns false when the lineage is over.
func (l *lineage) handle(in inputs) bool {
	for _, c := range in.calls {
		if !l.goesOn() {
			break
		}
		l.carryOut(c(l, time.Now()))
	}
	for _, dg := range in.packets {
		if !l.goesOn() {
			break
		}
		l.carryOut(l.sa.Receive(time.Now(), dg))
	}
	if in.expired && l.goesOn() {
		l.onTime()
	}
	if !l.done && !l.goesOn() {
		l.carryOut(l.sa.Drop(time.Now(), sa.ErrClosed))
		return false
	}
	return !l.done
}

// goesOn reports whether there is an end neither by the machine nor by kill.
func (l *lineage) goesOn() bool {
	select {
	case <-l.killed:
		return false
	default:
		return !l.done
	}
}

// setTimer has the timer go off when something is due next.
func (l *lineage) setTimer() {
	t := l.deadline()
	switch {
	case t.IsZero() && l.timer != nil:
		l.timer.Stop()
	case t.IsZero():
	case l.timer == nil:
		l.timer = time.AfterFunc(time.Until(t), func() { l.put(func(b *inbox) bool { b.expired = true; return true }) })
	default:
		l.timer.Reset(time.Until(t))
	}
}

// onTime does what is due.
func (l *lineage) onTime() {
	if due(l.dropAt, time.Now()) {
		l.carryOut(l.sa.Drop(time.Now(), sa.ErrClosed))
		l.done = true
		return
	}
	if l.missOthers(time.Now()) {
		return
	}
	l.carryOut(l.keepUp(time.Now()))
	if due(l.sa.Deadline(), time.Now()) {
		l.pollChildren()
		l.carryOut(l.sa.Tick(time.Now()))
	}
}

// pollChildren tells the machine whether a child SA has received anything: then
// no probe is needed to know that the peer lives.
func (l *lineage) pollChildren() {
	for id, c := range l.children {
		var n uint64
		err := l.d.keys(func(ctx context.Context, k KeySocket) error {
			i, err := k.Get(ctx, id, c.src)
			if err == nil {
				n = i.Packets
				i.Wipe()
			}
			return err
		})
		if err == nil && n != c.packets {
			c.packets = n
			l.children[id] = c
			l.sa.Heard(time.Now())
			return
		}
	}
}

// carryOut does what the machine says, in order. Answers to its questions go
// back in, and what they bring is done after what is already there.
func (l *lineage) carryOut(outs []sa.Output) {
	defer func() {
		if l.fresh { // with all that came with it, addresses too
			l.hookUp()
		}
	}()
	for len(outs) > 0 {
		o := outs[0]
		outs = outs[1:]
		switch o := o.(type) {
		case sa.Send:
			l.send(o)
		case sa.Keepalive:
			if err := l.d.send([]byte{0xff}, o.Local, o.Remote); err != nil {
				l.log.Debug("keepalive", zap.Error(err))
			}
		case sa.NeedSPI:
			spi, err := l.getSPI(o)
			outs = append(outs, l.sa.ChildSPI(time.Now(), o.Token, spi, err)...)
		case sa.ReleaseSPI:
			for _, proto := range o.Protos {
				l.d.removeSA(installed{ipsec.SAID{Proto: proto, Dst: o.Dst, SPI: o.SPI}, netip.Addr{}})
			}
		case sa.InstallChild:
			asked, err := l.install(o)
			if err != nil {
				l.log.Error("child SA not installed", zap.Stringer("in", o.In.SAID), zap.Error(err))
				outs = append(outs, l.sa.ChildLost(time.Now(), o.In.SAID, err)...)
			} else if r, ok := l.rest(o, asked); ok {
				outs = append(outs, l.sa.AddChild(time.Now(), r)...)
			}
		case sa.InstallOut:
			if err := l.installOut(o.Out, 0); err != nil {
				l.log.Error("child SA not installed", zap.Stringer("in", o.In), zap.Stringer("out", o.Out.SAID), zap.Error(err))
				outs = append(outs, l.sa.ChildLost(time.Now(), o.In, err)...)
			}
		case sa.RemoveChild:
			l.remove(o)
		case sa.ChildFailed:
			l.childFailed(o)
		case sa.NewIKESA:
			l.newIKESA(o)
		case sa.GoneIKESA:
			l.d.mu.Lock()
			delete(l.d.bySPI, o.Local)
			l.d.mu.Unlock()
		case sa.Established:
			l.established(o)
		case sa.Configured:
			l.configured(o.Lease)
		case sa.AuthLifetime:
			l.authLifetime(time.Now(), o.Within)
		case sa.IKEKeys:
			l.d.tellIKE(o)
		case sa.RekeyFailed:
			l.rekeyed(rekeyKey(o.Old), o.Err)
			l.notRekeyed(time.Now(), o.Err)
		case sa.Rekeyed:
			l.rekeyed(rekeyKey(o.Old), nil)
			l.log.Debug("rekeyed", zap.Stringer("old_child", o.Old), zap.Stringer("new_child", o.New), zap.Stringer("old", o.OldIKE), zap.Stringer("new", o.NewIKE))
		case sa.PeerMoved:
			l.log.Info("peer moved", zap.Stringer("old", o.Old), zap.Stringer("new", o.New))
			outs = append(outs, l.moveSAs(o)...)
		case sa.Moved:
			outs = append(outs, l.move(o)...)
		case sa.Failed:
			l.failed(o.Err)
		case sa.Done:
			l.done = true
		case sa.Message:
			if l.log.Core().Enabled(zapcore.InfoLevel) && l.mayLog() {
				logMessage(l.log, o.Dir, o.Header, o.Peer, o.Octets, o.Rule, zap.String("payloads", o.Names()))
			}
		case sa.Log:
			l.logLine(o)
		}
	}
}

func (l *lineage) send(o sa.Send) {
	// The machine logs what is in a message once; what it repeats is told here.
	if h, _, err := ikev2.ParseHeader(o.Data); err == nil && o.Again && l.mayLog() {
		logMessage(l.log, "sent again", h, o.Remote, len(o.Data), l.rule())
	}
	if err := l.d.send(o.Data, o.Local, o.Remote); err != nil && l.mayLog() {
		l.log.Warn("send", zap.Stringer("peer", o.Remote), zap.Error(err))
	}
}

func (l *lineage) newIKESA(o sa.NewIKESA) {
	l.d.mu.Lock()
	l.d.bySPI[o.Local] = l
	l.spis = append(l.spis, o.Local)
	l.d.mu.Unlock()
}

func (l *lineage) established(o sa.Established) {
	d := l.d
	l.known, l.fresh = true, true
	l.authenticated(time.Now(), o.Peer.Rule, o.Initiator)
	if l.mayLog() {
		l.log.Info("peer authenticated", zap.Stringer("peer", o.Peer.Remote), zap.Stringer("id", o.Peer.RemoteID), zap.Stringer("local_id", o.Peer.LocalID),
			zap.String("rule", o.Peer.Rule.Label), zap.Stringer("spi_local", o.Local), zap.Stringer("spi_remote", o.Remote),
			zap.Bool("initiator", o.Initiator), zap.Bool("nat_local", o.NATLocal), zap.Bool("nat_remote", o.NATRemote))
	}
	d.mu.Lock()
	peer := o.Peer
	l.peer = &peer
	ids := idsOf(peer)
	if d.byIDs[ids] == nil {
		d.byIDs[ids] = map[*lineage]struct{}{}
	}
	d.byIDs[ids][l] = struct{}{}
	d.clock++
	l.proven = d.clock
	l.label = peer.Rule.Label
	delete(d.failures, l.label)
	endAll(l.ups, nil)
	l.ups = nil
	wasHalfOpen := l.settle()
	if l.starter != nil {
		l.starter.wait = 0
	}
	var old []*lineage
	if replace := peer.Rule.UniqueIDs == pad.UniqueReplace && !o.Initiator; replace || o.OnlyOne && peer.Rule.UniqueIDs != pad.UniqueNever {
		old = older(l, d.sameIDs(l, peer))
	}
	d.mu.Unlock()
	if wasHalfOpen {
		d.budget.give(l.origin)
	}
	// The configuration may have changed since this began.
	if r := d.rules.Load().Rule(peer.Rule.Label); r != peer.Rule {
		l.goOnBy(r, &peer)
	}
	for _, x := range old {
		x.log.Info("replaced by a newer IKE SA of the same identity", zap.Stringer("id", peer.RemoteID))
		if x.post((*lineage).endSoon) != nil {
			x.kill()
		}
	}
}

// settle takes l out of what is half open; d.mu is held. It reports whether it was.
func (l *lineage) settle() bool {
	if !l.halfOpen {
		return false
	}
	l.halfOpen = false
	return true
}

// sameIDs lists the other lineages between these identities; d.mu is held.
func (d *Daemon) sameIDs(l *lineage, p sa.Peer) []*lineage {
	var ls []*lineage
	for x := range d.byIDs[idsOf(p)] {
		if x != l && !x.over {
			ls = append(ls, x)
		}
	}
	return ls
}

// idPair is between whom an authenticated lineage is.
type idPair struct{ local, remote pad.ID }

func idsOf(p sa.Peer) idPair { return idPair{p.LocalID, p.RemoteID} }

// older leaves of ls those that were established before l began. One whose
// negotiation overlapped with l's is no leftover: when both sides begin at once
// each would end what the other has just made.
func older(l *lineage, ls []*lineage) []*lineage {
	return slices.DeleteFunc(ls, func(x *lineage) bool { return x.proven > l.began })
}

func (l *lineage) failed(err error) {
	l.fresh = false
	l.hookDown()
	d := l.d
	l.unconfigure()
	d.mu.Lock()
	l.over = true
	var refused *sa.LocalError
	if r := l.rule(); l.label == "" && errors.As(err, &refused) && refused.Notify == ikev2.AUTHENTICATION_FAILED {
		d.noteFailure(r, err) // a peer's own doing, but worth to be seen
	}
	d.noteFailure(l.label, err)
	endAll(l.ups, err)
	endAll(l.ends, nil)
	l.ups, l.ends = nil, nil
	peer, s := l.peer, l.starter
	d.starterEnded(l)
	if d.stopping {
		l.kill() // nobody is left to repeat the last response for
	}
	then := l.then
	l.then = nil
	d.mu.Unlock()
	if then != nil {
		then()
	}
	d.wake()
	if errors.Is(err, sa.ErrTimeout) && peer != nil && peer.Rule.DPDAction == pad.DPDRestart && s == nil {
		d.addStarter(l.local.Addr(), l.remote.Addr(), false)
	}
}

// forget takes the lineage out of every table; SAs that are left are removed.
func (l *lineage) forget() {
	l.inbox.close()
	if l.timer != nil {
		l.timer.Stop()
	}
	l.hookDown()
	d := l.d
	d.mu.Lock()
	for _, spi := range l.spis {
		if d.bySPI[spi] == l {
			delete(d.bySPI, spi)
		}
	}
	if d.byInit[l.init] == l {
		delete(d.byInit, l.init)
	}
	wasHalfOpen := l.settle()
	var left []installed
	for id, src := range l.sas {
		left = append(left, installed{id, src})
	}
	delete(d.lineages, l)
	if l.peer != nil {
		ids := idsOf(*l.peer)
		delete(d.byIDs[ids], l)
		if len(d.byIDs[ids]) == 0 {
			delete(d.byIDs, ids)
		}
	}
	d.mu.Unlock()
	if wasHalfOpen {
		d.budget.give(l.origin)
	}
	for _, i := range left {
		l.drop(i)
	}
	d.mu.Lock()
	pending, waits := l.pending, append(l.ups, l.ends...)
	l.pending, l.ups, l.ends = nil, nil, nil
	d.starterEnded(l)
	d.mu.Unlock()
	endAll(waits, sa.ErrClosed)
	for _, p := range pending {
		p.fail(d, sa.ErrClosed)
	}
	for k := range l.rekeys {
		l.rekeyed(k, sa.ErrClosed)
	}
	close(l.ended)
	d.wake()
}

// mayLog asks whether there may be one more line that this peer has caused.
func (l *lineage) mayLog() bool {
	if !l.initiator && !l.known {
		return l.d.about(l.remote.Addr()) != nil
	}
	return l.d.limited(&l.d.peers, l.remote.Addr()) != nil
}

// rule is the label of the rule, as far as it is known.
func (l *lineage) rule() string {
	if r := l.sa.Rule(); r != nil {
		return r.Label
	}
	return ""
}

func (l *lineage) logLine(o sa.Log) {
	level := zapcore.DebugLevel
	switch {
	case o.Level >= slog.LevelError:
		level = zapcore.ErrorLevel
	case o.Level >= slog.LevelWarn:
		level = zapcore.WarnLevel
	case o.Level >= slog.LevelInfo:
		level = zapcore.InfoLevel
	}
	c := l.log.Check(level, o.Msg)
	if c == nil {
		return
	}
	if !l.mayLog() {
		return
	}
	fields := make([]zap.Field, len(o.Attrs))
	for i, a := range o.Attrs {
		switch v := a.Value.Resolve().Any().(type) {
		case error:
			fields[i] = zap.Error(v)
		case []ipsec.TrafficSelector:
			fields[i] = zap.Stringers(a.Key, v)
		default:
			fields[i] = zap.Any(a.Key, v)
		}
	}
	c.Write(fields...)
}

// errnoOf is what missiu is told about a failed ACQUIRE.
func errnoOf(err error) syscall.Errno {
	var peer *sa.PeerError
	var local *sa.LocalError
	switch {
	case errors.Is(err, sa.ErrTimeout):
		return syscall.ETIMEDOUT
	case errors.Is(err, errStopping):
		return syscall.ESHUTDOWN
	case errors.As(err, &peer):
		return syscall.ECONNREFUSED
	case errors.As(err, &local):
		return syscall.EPROTO
	}
	return syscall.ECANCELED
}

func policyID(p sa.Policy) uint32 {
	if p.Out == nil {
		return 0
	}
	return p.Out.ID
}
