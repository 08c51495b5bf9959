package ike

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"github.com/missiu/missiu/proto/ikev2"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// lineage is an IKE SA and what it becomes by rekeying: one goroutine that owns
// the machine and its timer.
type lineage struct {
	d         *Daemon
	sa        *sa.SA // of the goroutine
	log       *zap.Logger
	local     netip.AddrPort
	remote    netip.AddrPort // of the first message
	initiator bool

	packets  chan sa.Datagram
	calls    callQueue
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
	gaveUp   <-chan struct{} // of the goroutine: what of the mirror it waited for in vain

	// Behind d.mu.
	spis     []sa.SPI
	sas      map[ipsec.SAID]netip.Addr // child SAs installed, with their sources
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

// call is an input of the machine other than a datagram.
type call func(l *lineage, now time.Time) []sa.Output

// callQueue holds calls in their order. Unlike a channel of that length it takes
// no memory while it is empty, as those of most lineages are.
type callQueue struct {
	mu    sync.Mutex
	calls []call
	ready chan struct{} // holds one element while there are calls
}

// put adds c, if there is room.
func (q *callQueue) put(c call) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.calls) >= callsLen {
		return false
	}
	q.calls = append(q.calls, c)
	if len(q.calls) == 1 {
		q.ready <- struct{}{}
	}
	return true
}

// take returns the first call; the caller has taken the element out of ready.
func (q *callQueue) take() call {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := q.calls[0]
	q.calls[0] = nil
	if len(q.calls) == 1 {
		q.calls = nil
		return c
	}
	q.calls = q.calls[1:]
	q.ready <- struct{}{}
	return c
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
		log:      d.log.With(zap.Stringer("local", local.Addr())),
		packets:  make(chan sa.Datagram, inboxLen),
		calls:    callQueue{ready: make(chan struct{}, 1)},
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
		Queues: int(l.d.queues.Load()), Had: l.d.assigned.had(l.label),
	}
}

// start registers l and runs it, beginning with first. It returns false when
// the daemon is stopping.
func (d *Daemon) start(l *lineage, first func(time.Time) []sa.Output) bool {
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
	d.wg.Go(func() { l.run(first) })
	return true
}

// deliver puts a datagram into the inbox, if there is room.
func (l *lineage) deliver(dg sa.Datagram) bool {
	select {
	case l.packets <- dg:
		return true
	default:
		return false
	}
}

// post puts a call into the inbox. It fails, without waiting, when the inbox is
// full or the lineage has ended.
func (l *lineage) post(c call) error {
	select {
	case <-l.ended:
		return sa.ErrClosed
	default:
	}
	if !l.calls.put(c) {
		return errFull
	}
	return nil
}

// kill ends the lineage without waiting for the peer.
func (l *lineage) kill() { l.killOnce.Do(func() { close(l.killed) }) }

func (l *lineage) delete(now time.Time) []sa.Output { return l.sa.Delete(now) }

// endSoon ends a lineage that is probably a leftover. The peer is told all the
// same, and has a moment to answer: when both sides begin at once INITIAL_CONTACT
// may be said of an SA that is alive.
func (l *lineage) endSoon(now time.Time) []sa.Output {
	l.dropAt = now.Add(leftoverGrace)
	return l.sa.Delete(now)
}

func (l *lineage) run(first func(time.Time) []sa.Output) {
	defer l.forget()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	l.carryOut(first(time.Now()))
	for !l.done {
		var expired <-chan time.Time
		if t := l.deadline(); !t.IsZero() {
			timer.Reset(max(0, time.Until(t)))
			expired = timer.C
		}
		select {
		case dg := <-l.packets:
			l.carryOut(l.sa.Receive(time.Now(), dg))
		case <-l.calls.ready:
			c := l.calls.take()
			l.carryOut(c(l, time.Now()))
		case <-expired:
			if due(l.dropAt, time.Now()) {
				l.carryOut(l.sa.Drop(time.Now(), sa.ErrClosed))
				return
			}
			if l.missOthers(time.Now()) {
				break
			}
			l.carryOut(l.keepUp(time.Now()))
			if now := time.Now(); due(l.sa.Deadline(), now) {
				l.pollChildren()
				l.carryOut(l.sa.Tick(time.Now()))
			}
		case <-l.made:
			l.carryOut(l.succeeded(time.Now()))
		case <-l.killed:
			l.carryOut(l.sa.Drop(time.Now(), sa.ErrClosed))
			return
		}
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
		case sa.Rekeyed:
			l.rekeyed(rekeyKey(o.Old), nil)
			l.log.Debug("rekeyed", zap.Stringer("old_child", o.Old), zap.Stringer("new_child", o.New), zap.Stringer("old", o.OldIKE), zap.Stringer("new", o.NewIKE))
		case sa.PeerMoved:
			l.log.Info("peer moved", zap.Stringer("old", o.Old), zap.Stringer("new", o.New))
			outs = append(outs, l.moveSAs(o)...)
		case sa.Failed:
			l.failed(o.Err)
		case sa.Done:
			l.done = true
		case sa.Log:
			l.logLine(o)
		}
	}
}

func (l *lineage) send(o sa.Send) {
	// The machine logs what is in a message once; what it repeats is told here.
	if h, _, err := ikev2.ParseHeader(o.Data); err == nil && o.Again && l.mayLog() {
		l.d.logMessage(l.log, "sent again", h, o.Remote, len(o.Data), l.rule())
	}
	if err := l.d.send(o.Data, o.Local, o.Remote); err != nil && l.mayLog() {
		l.log.Warn("send", zap.Stringer("peer", o.Remote), zap.Error(err))
	}
}

// getSPI gets an SPI for one protocol, and the same one for the others. That is
// there already, in one of four thousand million cases: then another is tried.
func (l *lineage) getSPI(o sa.NeedSPI) (spi ipsec.SPI, err error) {
	get := func(f sa.SPIFor, spi ipsec.SPI) (ipsec.SPI, error) {
		g := keysock.GetSPI{Proto: f.Proto, Src: o.Src, Dst: o.Dst, Mode: o.Mode, ReqID: f.ReqID, Seq: o.Seq, Min: spi, Max: spi, Queue: o.Queue}
		if f.Proto == ipsec.ESP {
			g.Encap = o.Encap
		}
		err := l.d.keys(func(ctx context.Context, k KeySocket) (err error) {
			spi, err = k.GetSPI(ctx, g)
			return err
		})
		return spi, err
	}
	for range spiTries {
		spi, err = 0, nil
		for i, f := range o.For {
			if spi, err = get(f, spi); err == nil {
				continue
			}
			for _, had := range o.For[:i] {
				l.d.removeSA(installed{ipsec.SAID{Proto: had.Proto, Dst: o.Dst, SPI: spi}, netip.Addr{}})
			}
			break
		}
		if !errors.Is(err, syscall.EEXIST) {
			break
		}
	}
	if err != nil {
		l.log.Error("no SPI", zap.Stringer("peer", o.Src), zap.Error(err))
	}
	return spi, err
}

// install puts both SAs of a child SA in force, or neither; the outbound one
// perhaps later. asked: it was asked for here.
func (l *lineage) install(o sa.InstallChild) (asked bool, err error) {
	defer o.In.Wipe()
	l.d.tellESP(o.In)
	in := installed{o.In.SAID, o.In.Src}
	l.register(in)
	l.d.mu.Lock()
	was := len(l.pending)
	waits := l.take(o.Seq, policyID(o.Policy), o.In.Proto)
	asked = len(l.pending) < was
	l.d.mu.Unlock()
	defer func() { endAll(waits.tickets, err) }()
	err = l.d.keys(func(ctx context.Context, k KeySocket) error { return k.Update(ctx, o.In, o.Seq) })
	if err == nil && o.Out != nil {
		err = l.installOut(o.Out, o.Seq)
	}
	if err != nil {
		l.drop(in)
		return asked, err
	}
	l.children[in.id] = childCount{src: in.src, policy: policyID(o.Policy)}
	l.d.mu.Lock()
	l.has[acquireKey{policy: policyID(o.Policy), proto: o.In.Proto}]++
	l.d.mu.Unlock()
	l.log.Debug("child SA installed", zap.Stringer("proto", o.In.Proto), zap.Stringer("spi_in", o.In.SPI), zap.Bool("out", o.Out != nil),
		zap.Stringer("peer", o.In.Src), zap.Stringer("mode", o.In.Mode), zap.String("suite", suiteOf(o.In)),
		zap.Bool("udp", o.In.Encap != nil), zap.Uint32("policy", policyID(o.Policy)), zap.Uint32("seq", o.Seq))
	return asked, nil
}

// serves reports whether there is an SA of a policy and protocol.
func (l *lineage) serves(policy uint32, proto ipsec.Protocol) bool {
	for id, c := range l.children {
		if c.policy == policy && id.Proto == proto {
			return true
		}
	}
	return false
}

// rest is what to ask for behind an SA that is not enough for its policy. What
// an ACQUIRE asked for is followed by another one, and where it is clear from the
// beginning what the policy needs all was asked for at once.
func (l *lineage) rest(o sa.InstallChild, asked bool) (sa.ChildRequest, bool) {
	if len(o.Lacks) == 0 || o.Rekeys != 0 {
		return sa.ChildRequest{}, false
	}
	other := ipsec.AH + ipsec.ESP - o.In.Proto
	if l.serves(o.Policy.Out.ID, other) {
		return sa.ChildRequest{}, false
	}
	l.lone = append(l.lone, lone{time.Now().Add(restWait), o.In.SAID, o.Policy.Out, other})
	r := sa.ChildRequest{Policy: o.Policy, Proposals: o.Lacks}
	if !asked || o.Seq != 0 || !o.Policy.Out.Choice() {
		return r, false
	}
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	if l.pending[keyOf(r)] != nil {
		return r, false
	}
	l.pending[keyOf(r)] = &pendingChild{}
	return r, true
}

// missOthers tells of SAs without the other one that their policy wants, which
// should have come by now; false: there was none to look at.
func (l *lineage) missOthers(now time.Time) (looked bool) {
	for len(l.lone) > 0 && !l.lone[0].at.After(now) {
		x := l.lone[0]
		l.lone = l.lone[1:]
		looked = true
		if _, up := l.children[x.in]; !up || l.serves(x.policy.ID, x.lacks) {
			continue
		}
		l.log.Warn("the peer has made one SA of two that the policy wants: nothing passes", zap.Stringer("peer", l.remote), zap.String("rule", l.rule()),
			zap.Uint32("policy", x.policy.ID), zap.Stringer("src", x.policy.Sel.Src), zap.Stringer("dst", x.policy.Sel.Dst),
			zap.Stringer("has", x.in), zap.Stringer("lacks", x.lacks))
	}
	return looked
}

// installOut puts an outbound SA in force.
func (l *lineage) installOut(p *ipsec.SAParams, seq uint32) error {
	defer p.Wipe()
	l.d.tellESP(p)
	out := installed{p.SAID, p.Src}
	l.register(out)
	err := l.d.keys(func(ctx context.Context, k KeySocket) error { return k.Add(ctx, p, seq) })
	if err != nil {
		l.drop(out)
		return err
	}
	l.log.Debug("outbound SA installed", zap.Stringer("sa", p.SAID))
	return nil
}

// register says that an SA is of this lineage; before it is installed, since an
// EXPIRE may follow at once.
func (l *lineage) register(i installed) {
	if err := l.d.cfg.Journal.add(i); err != nil && l.d.journalFailed.CompareAndSwap(false, true) {
		l.log.Error("journal of SAs not written: what is left after a crash will not be removed", zap.Error(err))
	}
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	l.d.bySA[i.id] = l
	l.sas[i.id] = i.src
}

func suiteOf(p *ipsec.SAParams) string {
	s := p.Encr.String()
	if p.Proto == ipsec.AH {
		s = "ah"
	}
	if bits := (p.EncrKey.Len() - p.Encr.Info().SaltLen) * 8; bits > 0 {
		s += "-" + strconv.Itoa(bits)
	}
	if p.Auth != 0 {
		s += "/" + p.Auth.String()
	}
	if p.ESN {
		s += "/esn"
	}
	return s
}

// drop removes an SA from the tables and from missiu.
func (l *lineage) drop(i installed) {
	l.d.mu.Lock()
	if l.d.bySA[i.id] == l {
		delete(l.d.bySA, i.id)
	}
	delete(l.sas, i.id)
	if c, ok := l.children[i.id]; ok {
		l.has[acquireKey{policy: c.policy, proto: i.id.Proto}]--
	}
	l.d.mu.Unlock()
	delete(l.children, i.id)
	l.d.removeSA(i)
}

func (l *lineage) remove(o sa.RemoveChild) {
	if o.In.SPI != 0 {
		l.rekeyed(rekeyKey(o.In.SPI), o.Reason)
	}
	for _, i := range []installed{{o.Out, o.OutSrc}, {o.In, o.InSrc}} {
		if i.id.SPI != 0 {
			l.drop(i)
			l.log.Debug("SA removed", zap.Stringer("sa", i.id), zap.NamedError("reason", o.Reason))
		}
	}
}

// moveSAs gives SAs the port, and those that go with it the address, that the
// peer's NAT has now.
func (l *lineage) moveSAs(o sa.PeerMoved) (outs []sa.Output) {
	l.d.mu.Lock()
	sas := make([]installed, 0, len(l.sas))
	for id, src := range l.sas {
		switch {
		case o.Old.Addr() == o.New.Addr() && (id.Dst == o.Old.Addr() || src == o.Old.Addr()), slices.Contains(o.Moved, id):
			sas = append(sas, installed{id, src})
		}
	}
	l.d.mu.Unlock()
	for _, i := range sas {
		to, err := l.moveSA(i, o)
		if err != nil {
			l.log.Warn("SA did not follow the peer", zap.Stringer("sa", i.id), zap.Error(err))
			if len(o.Moved) > 0 {
				outs = append(outs, l.sa.ChildLost(time.Now(), to, err)...)
			}
		}
	}
	return outs
}

// moveSA moves one SA and returns its name at the new place.
func (l *lineage) moveSA(i installed, o sa.PeerMoved) (to ipsec.SAID, err error) {
	to, src := i.id, i.src
	if out := i.id.Dst == o.Old.Addr(); out {
		to.Dst = o.New.Addr()
	} else {
		src = o.New.Addr()
	}
	if to != i.id || src != i.src {
		l.register(installed{to, src}) // before it is there: an EXPIRE may follow at once
	}
	err = l.d.keys(func(ctx context.Context, k KeySocket) error {
		info, err := k.Get(ctx, i.id, i.src)
		if err != nil {
			return err
		}
		defer info.Wipe()
		if info.Encap != nil {
			e := *info.Encap
			if i.src == o.Old.Addr() {
				e.SPort = o.New.Port()
			} else {
				e.DPort = o.New.Port()
			}
			info.Encap = &e
		}
		if to == i.id && src == i.src {
			if info.Encap == nil {
				return nil
			}
			return k.Update(ctx, &info.SAParams, 0)
		}
		info.SAID, info.Src = to, src
		return k.Move(ctx, i.id, &info.SAParams)
	})
	if to == i.id {
		if c, ok := l.children[to]; ok {
			c.src = src
			l.children[to] = c
		}
		return to, err
	}
	if err != nil {
		l.drop(i) // nobody would find it any more
		return to, err
	}
	l.d.mu.Lock()
	if l.d.bySA[i.id] == l {
		delete(l.d.bySA, i.id)
	}
	delete(l.sas, i.id)
	l.d.mu.Unlock()
	l.d.cfg.Journal.remove(i.id)
	return to, nil
}

func (l *lineage) childFailed(o sa.ChildFailed) {
	l.log.Debug("child SA failed", zap.Stringer("peer", l.remote), zap.Uint32("policy", policyID(o.Policy)), zap.Uint32("seq", o.Seq), zap.Error(o.Err))
	l.d.mu.Lock()
	p := l.take(o.Seq, policyID(o.Policy), ipsec.ESP)
	l.d.noteFailure(l.label, o.Err)
	l.d.mu.Unlock()
	p.fail(l.d, o.Err)
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
	if l.d.byInit[l.init] == l {
		delete(l.d.byInit, l.init)
	}
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
	l.hookDown()
	d := l.d
	d.mu.Lock()
	for _, spi := range l.spis {
		if d.bySPI[spi] == l {
			delete(d.bySPI, spi)
		}
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

// host answers a machine's questions.
type host struct {
	d *Daemon
	l *lineage
}

// Policies waits while the mirror is known not to be true. Where nothing is
// found there may be something that we have not heard of yet.
func (h host) Policies(q sa.Query) []sa.Policy {
	h.awaitMirror()
	ps := h.d.spd.policies(q)
	if len(ps) == 0 && h.d.mirror.missed(time.Now()) {
		h.d.wake()
		h.awaitMirror()
		ps = h.d.spd.policies(q)
	}
	return ps
}

// awaitMirror waits until the mirror is true, but not for ever: the peer is
// answered by what there is then.
func (h host) awaitMirror() {
	current := h.d.mirror.current()
	if current == nil || current == h.l.gaveUp {
		return
	}
	h.l.log.Debug("request waits for the policies", zap.Stringer("peer", h.l.remote))
	limit := time.NewTimer(mirrorWait)
	defer limit.Stop()
	select {
	case <-current:
	case <-limit.C:
		h.l.gaveUp = current
		h.l.log.Warn("request answered by old policies", zap.Stringer("peer", h.l.remote))
	case <-h.l.killed:
	case <-h.d.ops.Done():
	}
}

// Near is sa.Explainer's. It looks through the whole mirror, so it is not to be
// had as often as a peer likes.
func (h host) Near(q sa.Query) (ps []sa.Policy, looked bool) {
	if !h.d.near.allow(time.Now()) {
		return nil, false
	}
	return h.d.spd.near(q.Peer.Local.Addr(), q.Peer.Remote.Addr()), true
}

func (h host) Admit(p sa.Peer) (first bool, err error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	same := h.d.sameIDs(h.l, p)
	alone := len(same) == 0
	if p.Rule.UniqueIDs == pad.UniqueKeep && len(older(h.l, same)) > 0 {
		return false, errors.New("an IKE SA with this identity exists (unique_ids keep)")
	}
	return alone && p.Rule.InitialContact, nil
}
