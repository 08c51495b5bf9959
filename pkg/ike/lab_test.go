package ike

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// The laboratory: hosts with a daemon each, a fake missiu each, and a network
// in memory. Time is synctest's.

var (
	addrA = netip.MustParseAddr("192.0.2.1")
	addrB = netip.MustParseAddr("192.0.2.2")
)

type packet struct {
	from, to netip.AddrPort
	data     []byte
}

// network delivers datagrams at once, except those that drop takes.
type network struct {
	mu    sync.Mutex
	conns map[netip.AddrPort]*memConn
	drop  func(packet) bool
	seen  []packet
}

func (n *network) listen(a netip.AddrPort) (Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conns == nil {
		n.conns = map[netip.AddrPort]*memConn{}
	}
	c := &memConn{n: n, addr: a, in: make(chan packet, 1024), closed: make(chan struct{})}
	n.conns[a] = c
	return c, nil
}

func (n *network) send(p packet) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen = append(n.seen, p)
	if n.drop != nil && n.drop(p) {
		return
	}
	n.put(p)
}

// deliver is for what drop has taken.
func (n *network) deliver(p packet) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.put(p)
}

func (n *network) put(p packet) {
	if c := n.conns[p.to]; c != nil {
		select {
		case c.in <- p:
		default:
		}
	}
}

func (n *network) setDrop(f func(packet) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drop = f
}

func (n *network) packets() []packet {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.seen)
}

type memConn struct {
	n      *network
	addr   netip.AddrPort
	in     chan packet
	closed chan struct{}
	once   sync.Once
}

func (c *memConn) Receive(b []byte) (int, netip.AddrPort, netip.AddrPort, error) {
	select {
	case p := <-c.in:
		return copy(b, p.data), p.to, p.from, nil
	case <-c.closed:
		return 0, netip.AddrPort{}, netip.AddrPort{}, net.ErrClosed
	}
}

func (c *memConn) Send(b []byte, local, remote netip.AddrPort) error {
	c.n.send(packet{local, remote, slices.Clone(b)})
	return nil
}

func (c *memConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// missiu is a fake engine; conns of it come and go.
type missiu struct {
	mu        sync.Mutex
	t         *testing.T
	spi       ipsec.SPI
	sas       map[ipsec.SAID]*ipsec.SAParams
	larval    map[ipsec.SAID]bool
	policies  []ipsec.Policy
	failed    map[uint32]syscall.Errno
	conn      *fakeKeys
	down      bool
	packets   uint64 // that every SA counts
	refuseAdd syscall.Errno
	trace     func(string)
	queues    ipsec.Queue
	addrs     []netip.Prefix
	forQueues []ipsec.Queue // of GETSPIs
}

type fakeKeys struct {
	m      *missiu
	events chan keysock.Event
	closed bool
}

func (m *missiu) dial(context.Context) (KeySocket, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down {
		return nil, syscall.ECONNREFUSED
	}
	m.conn = &fakeKeys{m: m, events: make(chan keysock.Event, 64)}
	return m.conn, nil
}

func (m *missiu) event(e keysock.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conn.events <- e
}

// restart loses every SA and the connection.
func (m *missiu) setDown(down bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = down
	if down {
		m.sas, m.larval = map[ipsec.SAID]*ipsec.SAParams{}, map[ipsec.SAID]bool{}
		m.conn.close()
	}
}

func (m *missiu) list() []*ipsec.SAParams {
	m.mu.Lock()
	defer m.mu.Unlock()
	var l []*ipsec.SAParams
	for _, s := range m.sas {
		l = append(l, s)
	}
	slices.SortFunc(l, func(a, b *ipsec.SAParams) int { return cmp.Or(a.Dst.Compare(b.Dst), cmp.Compare(a.Proto, b.Proto)) })
	return l
}

func (m *missiu) failure(seq uint32) (syscall.Errno, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.failed[seq]
	return e, ok
}

func (k *fakeKeys) do(what string, f func(m *missiu) error) error {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	if k.closed {
		return keysock.ErrClosed
	}
	if k.m.trace != nil {
		k.m.trace(what)
	}
	return f(k.m)
}

// close with m.mu held.
func (k *fakeKeys) close() {
	if !k.closed {
		k.closed = true
		close(k.events)
	}
}

func (k *fakeKeys) Close() error {
	k.m.mu.Lock()
	defer k.m.mu.Unlock()
	k.close()
	return nil
}

func (k *fakeKeys) Register(context.Context, ...ipsec.Protocol) (keysock.Supported, error) {
	return keysock.Supported{Queues: k.m.queues}, k.do("register", func(*missiu) error { return nil })
}
func (k *fakeKeys) Events() <-chan keysock.Event { return k.events }
func (k *fakeKeys) GetSPI(_ context.Context, g keysock.GetSPI) (spi ipsec.SPI, err error) {
	return spi, k.do("getspi", func(m *missiu) error {
		m.forQueues = append(m.forQueues, g.Queue)
		if spi = g.Min; spi == 0 {
			m.spi++
			spi = m.spi
		}
		if id := (ipsec.SAID{Proto: g.Proto, Dst: g.Dst, SPI: spi}); m.larval[id] || m.sas[id] != nil {
			return syscall.EEXIST
		}
		m.larval[ipsec.SAID{Proto: g.Proto, Dst: g.Dst, SPI: spi}] = true
		return nil
	})
}

func clone(p *ipsec.SAParams) *ipsec.SAParams {
	c := *p
	c.EncrKey, c.AuthKey = p.EncrKey.Clone(), p.AuthKey.Clone()
	return &c
}

func (k *fakeKeys) Add(_ context.Context, p *ipsec.SAParams, seq uint32) error {
	return k.do("add", func(m *missiu) error {
		if m.refuseAdd != 0 {
			return m.refuseAdd
		}
		if m.sas[p.SAID] != nil || m.larval[p.SAID] {
			return syscall.EEXIST
		}
		m.sas[p.SAID] = clone(p)
		return nil
	})
}
func (k *fakeKeys) Update(_ context.Context, p *ipsec.SAParams, seq uint32) error {
	return k.do("update", func(m *missiu) error {
		if !m.larval[p.SAID] {
			return syscall.ESRCH
		}
		delete(m.larval, p.SAID)
		m.sas[p.SAID] = clone(p)
		return nil
	})
}
func (k *fakeKeys) Move(_ context.Context, id ipsec.SAID, p *ipsec.SAParams) error {
	return k.do("move", func(m *missiu) error {
		switch {
		case m.sas[id] == nil:
			return syscall.ESRCH
		case p.SAID != id && m.sas[p.SAID] != nil:
			return syscall.EEXIST
		}
		delete(m.sas, id)
		m.sas[p.SAID] = clone(p)
		return nil
	})
}
func (k *fakeKeys) Delete(_ context.Context, id ipsec.SAID, _ netip.Addr) error {
	return k.do("delete", func(m *missiu) error {
		if m.sas[id] == nil && !m.larval[id] {
			return syscall.ESRCH
		}
		delete(m.sas, id)
		delete(m.larval, id)
		return nil
	})
}
func (k *fakeKeys) Get(_ context.Context, id ipsec.SAID, _ netip.Addr) (i *keysock.SAInfo, err error) {
	return i, k.do("get", func(m *missiu) error {
		p := m.sas[id]
		if p == nil {
			return syscall.ESRCH
		}
		i = &keysock.SAInfo{SAParams: *clone(p), Packets: m.packets}
		return nil
	})
}
func (k *fakeKeys) AcquireFailed(_ context.Context, seq uint32, errno syscall.Errno) error {
	return k.do("acquire failed", func(m *missiu) error { m.failed[seq] = errno; return nil })
}
func (k *fakeKeys) AddAddress(_ context.Context, p netip.Prefix) error {
	return k.do("address add", func(m *missiu) error {
		if !slices.Contains(m.addrs, p) {
			m.addrs = append(m.addrs, p)
		}
		return nil
	})
}
func (k *fakeKeys) DeleteAddress(_ context.Context, p netip.Prefix) error {
	return k.do("address delete", func(m *missiu) error {
		i := slices.Index(m.addrs, p)
		if i < 0 {
			return syscall.ENOENT
		}
		m.addrs = slices.Delete(m.addrs, i, i+1)
		return nil
	})
}
func (k *fakeKeys) DumpPolicies(context.Context) (l []*keysock.PolicyInfo, err error) {
	return l, k.do("dump", func(m *missiu) error {
		for _, p := range m.policies {
			l = append(l, &keysock.PolicyInfo{Policy: p})
		}
		return nil
	})
}

// policies protects all between two hosts in transport mode: the seed's policy.
func policies(local, remote netip.Addr) []ipsec.Policy {
	host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	sel := ipsec.Selector{Src: host(local), Dst: host(remote)}
	req := []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelRequire, ReqID: 7}}
	ps := []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1}}
	return []ipsec.Policy{
		{ID: 1, Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: req, Proposals: ps},
		{ID: 2, Dir: ipsec.In, Sel: sel.Reverse(), Action: ipsec.Protect, Requests: req, Proposals: ps},
	}
}

func keys(s string) pad.Keys {
	return pad.Keys{Local: ipsec.NewKey([]byte(s)), Remote: ipsec.NewKey([]byte(s))}
}

func ruleFor(psk string) *pad.DB {
	r := pad.NewRule("any")
	r.Remote, r.PSK = pad.Any(), keys(psk)
	db, err := pad.NewDB([]*pad.Rule{r})
	if err != nil {
		panic(err)
	}
	return db
}

// node is a host of the laboratory.
type node struct {
	*Daemon
	m      *missiu
	logs   *observer.ObservedLogs
	cancel context.CancelFunc
	result chan error
}

type option func(*Config, *missiu)

func newNode(t *testing.T, n *network, local, remote netip.Addr, psk string, opts ...option) *node {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	m := &missiu{t: t, spi: ipsec.SPI(local.As4()[3]) << 16, sas: map[ipsec.SAID]*ipsec.SAParams{}, larval: map[ipsec.SAID]bool{},
		policies: policies(local, remote), failed: map[uint32]syscall.Errno{}}
	cfg := Config{
		Local: []netip.Addr{local}, Rules: ruleFor(psk), Listen: n.listen, Dial: m.dial, Log: zap.New(core),
	}
	for _, o := range opts {
		o(&cfg, m)
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &node{Daemon: d, m: m, logs: logs, cancel: cancel, result: make(chan error, 1)}
	go func() { x.result <- d.Run(ctx) }()
	synctest.Wait()
	return x
}

// stop ends the daemon and reports how long it took.
func (x *node) stop(t *testing.T) time.Duration {
	t.Helper()
	start := time.Now()
	x.cancel()
	if err := <-x.result; err != nil {
		t.Errorf("Run: %v", err)
	}
	return time.Since(start)
}

func (x *node) acquire(seq uint32, src, dst netip.Addr) {
	x.m.event(keysock.Acquire{Seq: seq, Proto: ipsec.ESP, Src: src, Dst: dst, PolicyID: 1, Mode: ipsec.Transport, ReqID: 7,
		Flow: &ipsec.Flow{Src: src, Dst: dst, Proto: 1}})
}

// dump shows a node's log when a test fails.
func (x *node) dump(t *testing.T) {
	t.Helper()
	for _, e := range x.logs.All() {
		t.Logf("%v %s %v", x.cfg.Local[0], e.Message, e.ContextMap())
	}
}

// pair is two hosts that share a key.
func pair(t *testing.T, opts ...option) (*network, *node, *node) {
	t.Helper()
	n := &network{}
	return n, newNode(t, n, addrA, addrB, "correct horse battery", opts...), newNode(t, n, addrB, addrA, "correct horse battery", opts...)
}

// wantPair checks that both hosts have exactly the SAs of count child SAs, the
// same keys at both ends.
func wantPair(t *testing.T, a, b *node, count int) {
	t.Helper()
	la, lb := a.m.list(), b.m.list()
	ok := len(la) == 2*count && len(lb) == 2*count
	for _, p := range la {
		b.m.mu.Lock()
		q := b.m.sas[p.SAID]
		b.m.mu.Unlock()
		ok = ok && q != nil && q.EncrKey.Equal(p.EncrKey) && q.AuthKey.Equal(p.AuthKey) && q.Encr == p.Encr && q.Auth == p.Auth && q.Src == p.Src && q.ESN == p.ESN
	}
	if !ok {
		t.Errorf("got SAs %v and %v, want %d pairs that match", ids(la), ids(lb), count)
		a.dump(t)
		b.dump(t)
	}
}

func ids(l []*ipsec.SAParams) (s []string) {
	for _, p := range l {
		s = append(s, fmt.Sprintf("%v(%v %d bits)", p.SAID, p.Encr, p.EncrKey.Len()*8))
	}
	return s
}

func noise(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}
