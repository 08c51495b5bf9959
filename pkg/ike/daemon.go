package ike

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"go.uber.org/zap"
)

// Daemon is the key daemon of one host. New makes it, Run runs it.
type Daemon struct {
	cfg     Config
	log     *zap.Logger
	logs    map[netip.Addr]*zap.Logger // by our address; fixed
	rules   atomic.Pointer[pad.DB]     // with the addresses of host names
	names   names
	spd     spd
	mirror  mirror            // how true spd is
	waiting []keysock.Acquire // until it is; of Run
	queues  atomic.Uint32     // of missiu
	cpis    atomic.Uint32     // the last of nextCPI

	since      time.Time
	hooks      sync.WaitGroup
	hookSlots  chan struct{}
	hookCtx    context.Context
	hookCancel context.CancelFunc
	budget     budget
	secrets    secrets
	seed       maphash.Seed // of initKey
	answers    bucket       // unauthenticated ones
	lines      lines        // of the log, that strangers can cause
	peers      lines        // and authenticated peers
	near       bucket       // searches for the log

	keyLogFailed, journalFailed atomic.Bool

	connMu sync.RWMutex
	conns  map[netip.Addr]Conn // IKE port, by our address; of connMu
	// connsClosed, of connMu: no more of them.
	connsClosed bool
	addrs       atomic.Pointer[[]netip.Addr]
	link        atomic.Pointer[link]

	fatal   chan error
	kick    chan struct{} // starters have something to do
	wg      sync.WaitGroup
	workers workers
	ops     context.Context // of PF_KEY requests; ends when stopping takes too long

	mu       sync.Mutex
	stopping bool
	clock    uint64 // counts beginnings and ends of negotiations
	lineages map[*lineage]struct{}
	bySPI    map[sa.SPI]*lineage              // our SPI
	byIDs    map[idPair]map[*lineage]struct{} // authenticated
	byInit   map[initKey]*lineage             // responders
	bySA     map[ipsec.SAID]*lineage          // child SAs, both directions
	moved    map[ipsec.SAID]moved             // by where they were before they moved last
	starters []*starter
	initSeen map[uint32]bool // policies that want SAs at once and were asked for
	toInit   []uint32        // those that are still to be asked for
	stale    []installed     // SAs that could not be removed while missiu was away
	staleIPs []netip.Addr    // addresses likewise
	heldDown map[string]bool // labels of rules that an operator wants down
	failures map[string]failure

	leases   leases
	assigned assigned
	dns      dnsFiles

	counters counters
}

// link is one connection to missiu.
type link struct {
	keys  KeySocket
	mu    sync.Mutex
	natt  Conn // nil: no UDP port 4500 now
	tried bool // to have one
	over  bool
	ended chan struct{} // closed with over
}

// installed names an SA in missiu.
type installed struct {
	id  ipsec.SAID
	src netip.Addr
}

// moved is an SA that has gone to another place: what missiu said of it before
// may still be on its way.
type moved struct {
	l  *lineage
	to ipsec.SAID
}

// counters count what is dropped without a log line of its own.
type counters struct {
	malformed, version, unknownSPI, cookies, refused, full atomic.Uint64
}

// New checks c and makes a daemon.
func New(c Config) (*Daemon, error) {
	c.defaults()
	switch {
	case len(c.Local) == 0:
		return nil, errors.New("ike: no local address")
	case c.Rules == nil || c.Listen == nil || c.Dial == nil:
		return nil, errors.New("ike: incomplete configuration")
	}
	d := &Daemon{
		cfg: c, log: c.Log, logs: map[netip.Addr]*zap.Logger{},
		budget:   budget{limits: c.Limits},
		secrets:  secrets{rand: c.Rand},
		seed:     maphash.MakeSeed(),
		conns:    map[netip.Addr]Conn{},
		fatal:    make(chan error, len(c.Local)),
		kick:     make(chan struct{}, 1),
		workers:  workers{work: make(chan *lineage), ended: make(chan struct{})},
		lineages: map[*lineage]struct{}{},
		bySPI:    map[sa.SPI]*lineage{},
		byIDs:    map[idPair]map[*lineage]struct{}{},
		byInit:   map[initKey]*lineage{},
		bySA:     map[ipsec.SAID]*lineage{},
		moved:    map[ipsec.SAID]moved{},
		initSeen: map[uint32]bool{},
		heldDown: map[string]bool{},
		failures: map[string]failure{},
		since:    time.Now(),
		lines:    lines{allowance: ofStrangers},
		peers:    lines{allowance: ofPeers},
	}
	d.cpis.Store(rand.Uint32()) // peers may still have what an earlier process of ours told them
	for _, a := range c.Local {
		d.logs[a] = d.log.With(zap.Stringer("local", a))
	}
	d.hookCtx, d.hookCancel = context.WithCancel(context.Background())
	d.hookSlots = make(chan struct{}, maxHooks)
	d.rules.Store(c.Rules)
	d.names.base, d.names.inForce = c.Rules, c.Rules
	return d, nil
}

// Run serves until ctx ends, then tells every peer and removes every SA that it
// made, which takes 3 s at most. It returns nil then, an error if it could not
// start or go on: an address is not there, a port is in use, missiu did not
// answer (ErrNoMissiu).
func (d *Daemon) Run(ctx context.Context) error {
	ops, cancel := context.WithCancel(context.Background())
	defer cancel()
	d.ops = ops

	defer d.closeConns()
	for _, a := range d.cfg.Local {
		if d.conn(a) != nil {
			continue
		}
		c, err := d.cfg.Listen(netip.AddrPortFrom(a, d.cfg.IKEPort))
		if err != nil {
			return err
		}
		d.connMu.Lock()
		d.conns[a] = c
		d.connMu.Unlock()
	}
	d.setRules(ctx, d.cfg.Rules)
	d.inherit()
	d.leftDNSFiles()
	events, err := d.firstConnect(ctx)
	if err != nil || events == nil { // nil: told to stop before missiu was there
		return err
	}
	d.connMu.RLock()
	for _, c := range d.conns {
		d.wg.Go(func() {
			if err := d.read(c); err != nil {
				d.fatal <- fmt.Errorf("ike: receive: %w", err)
			}
		})
	}
	d.connMu.RUnlock()
	d.readAddresses()
	for _, a := range d.cfg.Local {
		d.log.Info("ready on " + a.String())
	}
	if d.cfg.Ready != nil {
		d.cfg.Ready()
	}
	d.connectPeers()
	d.startRules(d.rules.Load())
	err = d.loop(ctx, events)
	d.stop(cancel)
	return err
}

// loop is the part of Run between start and stop.
func (d *Daemon) loop(ctx context.Context, events <-chan event) error {
	redial := time.NewTimer(0)
	redial.Stop()
	reread, due := time.NewTimer(0), false
	reread.Stop()
	again := settleWait
	start := time.NewTimer(0)
	defer redial.Stop()
	defer reread.Stop()
	defer start.Stop()
	addrs, disturb := time.NewTimer(0), time.NewTimer(0)
	addrs.Stop()
	disturb.Stop()
	defer addrs.Stop()
	defer disturb.Stop()
	looking := false
	newAddrs, newRoutes := d.cfg.AddrsChange, d.cfg.RoutesChange
	for {
		select {
		case _, ok := <-newAddrs:
			if !ok {
				newAddrs = nil
				break
			}
			addrs.Reset(addrSettle)
		case <-addrs.C:
			d.readAddresses()
		case _, ok := <-newRoutes:
			if !ok {
				newRoutes = nil
				break
			}
			if !looking {
				looking = true
				d.disturbed()
				disturb.Reset(disturbWait)
			}
		case <-disturb.C:
			looking = false
		case <-ctx.Done():
			return nil
		case err := <-d.fatal:
			return err
		case e, ok := <-events:
			if ok {
				d.handleEvent(e)
				break
			}
			d.lostMissiu()
			events = nil
			redial.Reset(redialWait)
		case <-redial.C:
			var err error
			if events, err = d.connect(ctx, ctx); err != nil {
				d.log.Debug("missiu is not back yet", zap.Error(err))
				events = nil
				redial.Reset(redialWait)
				break
			}
			d.log.Info("connected to missiu again")
		case <-reread.C:
			due, again = false, settleWait
			if err := d.refresh(ctx); err != nil {
				again = rereadWait
			}
		case <-d.kick:
		case <-start.C:
		}
		if !due && d.mirror.outdated() {
			reread.Reset(again)
			due = true
		}
		if wait, ok := d.runStarters(time.Now()); ok {
			start.Reset(wait)
		}
	}
}

// stop ends every lineage: first in order, then, when peers stay silent, without
// them. Nothing is left running when it returns.
func (d *Daemon) stop(cancelOps context.CancelFunc) {
	d.mirror.end()
	d.mu.Lock()
	d.stopping = true
	ls := d.all()
	d.mu.Unlock()
	if len(ls) > 0 {
		d.log.Info("stopping", zap.Int("ike_sas", len(ls)))
	}
	for _, l := range ls {
		// One that is over only waits to repeat its last response.
		if l.isOver() || l.post((*lineage).delete) != nil {
			l.kill()
		}
	}
	ended := make(chan struct{})
	go func() {
		for _, l := range ls {
			<-l.ended
		}
		close(ended)
	}()
	grace := time.NewTimer(peerGrace)
	select {
	case <-ended:
		grace.Stop()
	case <-grace.C:
		d.log.Info("peers do not answer; leaving")
		for _, l := range ls {
			l.kill()
		}
		last := time.AfterFunc(dropGrace, cancelOps)
		<-ended
		last.Stop()
	}
	d.dropStale()
	d.endHooks()
	d.closeConns()
	if k := d.link.Swap(nil); k != nil {
		k.close()
	}
	cancelOps()
	close(d.workers.ended)
	d.wg.Wait()
}

func (d *Daemon) closeConns() {
	d.connMu.Lock()
	defer d.connMu.Unlock()
	d.connsClosed = true
	for _, c := range d.conns {
		c.Close()
	}
}

func (l *lineage) isOver() bool {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	return l.over
}

// all lists the lineages; d.mu is held.
func (d *Daemon) all() []*lineage {
	ls := make([]*lineage, 0, len(d.lineages))
	for l := range d.lineages {
		ls = append(ls, l)
	}
	return ls
}

func (d *Daemon) snapshot() []*lineage {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.all()
}

// read takes messages from c until it is closed.
func (d *Daemon) read(c Conn) error {
	buf := make([]byte, maxMessage)
	for {
		n, local, remote, err := c.Receive(buf)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		d.demux(sa.Datagram{Local: local, Remote: remote, Data: slices.Clone(buf[:n])})
	}
}

// send sends an IKE message or keepalive.
func (d *Daemon) send(b []byte, local, remote netip.AddrPort) error {
	if local.Port() == d.cfg.NATTPort {
		if c := d.link.Load().port(); c != nil {
			return c.Send(b, local, remote)
		}
		return fmt.Errorf("no NAT traversal port: %w", errDown)
	}
	c, err := d.ikePort(local.Addr())
	if err != nil {
		return err
	}
	return c.Send(b, local, remote)
}

// Reload puts a new rule database and new limits in force. IKE SAs whose rule is
// gone, or no longer permits their peer or its key, are deleted. All others go on
// without anything being sent; what their rule says of timers holds from now on,
// the rest from their next rekeying.
func (d *Daemon) Reload(ctx context.Context, db *pad.DB, limits Limits) {
	limits.defaults()
	d.budget.setLimits(limits)
	d.setRules(ctx, db)
	db = d.rules.Load()
	d.mu.Lock()
	clear(d.heldDown)
	for label := range d.failures {
		if db.Rule(label) == nil {
			delete(d.failures, label)
		}
	}
	peers := make(map[*lineage]*sa.Peer, len(d.lineages))
	var gone []*lineage
	for l := range d.lineages {
		switch {
		case l.over:
		case l.peer != nil:
			peers[l] = l.peer
		case l.label != "" && db.Rule(l.label) == nil:
			gone = append(gone, l)
		}
		// The others, which are not authenticated yet, established looks at.
	}
	d.mu.Unlock()
	for _, l := range gone {
		l.log.Info("rule is gone", zap.Stringer("peer", l.remote))
		l.end()
	}
	d.assigned.keep(func(label string) bool { return db.Rule(label) != nil })
	// Certificates take a while: nobody is kept waiting for d.mu.
	for l, p := range peers {
		l.goOnBy(db.Rule(p.Rule.Label), p)
	}
	d.startRules(db)
	d.wake()
}

// end deletes an IKE SA in order, if its inbox takes that.
func (l *lineage) end() {
	if l.post((*lineage).delete) != nil {
		l.kill()
	}
}

// goOnBy has an IKE SA with peer p go on by another rule, if that permits it.
func (l *lineage) goOnBy(r *pad.Rule, p *sa.Peer) {
	if err := stillPermits(r, p, time.Now()); err != nil {
		l.log.Info("rule no longer permits this peer", zap.Stringer("peer", p.Remote), zap.String("rule", p.Rule.Label), zap.Stringer("id", p.RemoteID), zap.Error(err))
		l.end()
		return
	}
	err := l.post(func(l *lineage, _ time.Time) []sa.Output {
		l.sa.SetRule(r)
		l.d.mu.Lock()
		defer l.d.mu.Unlock()
		peer := *l.peer
		peer.Rule = r
		l.peer = &peer
		return nil
	})
	if err != nil {
		l.log.Warn("rule as before", zap.Error(err))
	}
}

// stillPermits says why a rule that was read anew would not have let an IKE SA
// with this peer come about: identities, key, own certificate, or the peer's, which
// may be revoked by now.
func stillPermits(r *pad.Rule, p *sa.Peer, now time.Time) error {
	was := p.Rule
	switch {
	case r == nil:
		return errors.New("rule is gone")
	case !r.PermitsPeer(p.RemoteID):
		return fmt.Errorf("identity %v is not permitted any more", p.RemoteID)
	case !r.MayBe(p.Local.Addr(), p.LocalID):
		return errors.New("our identity has changed")
	case r.LocalAuth != was.LocalAuth || r.RemoteAuth != was.RemoteAuth || r.LocalAuth == pad.Cert && !r.Own.Equal(was.Own):
		return errors.New("authentication has changed")
	}
	if r.RemoteAuth == pad.Cert {
		if _, err := r.Trust.Verify(p.Cert.Certs(), p.RemoteID.Wire(), now); err != nil {
			return err
		}
	}
	if r.LocalAuth == pad.Cert && r.RemoteAuth == pad.Cert {
		return nil
	}
	keys, ok := r.Keys(p.LocalID, p.RemoteID)
	old, _ := was.Keys(p.LocalID, p.RemoteID)
	if !ok || r.LocalAuth == pad.Preshared && !keys.Local.Equal(old.Local) || r.RemoteAuth == pad.Preshared && !keys.Remote.Equal(old.Remote) {
		return errors.New("pre-shared key has changed")
	}
	return nil
}

// wake makes Run look at the starters.
func (d *Daemon) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}
