package sa

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// lab is two machines, a and b, a network in memory between them, and a clock
// that only moves when told to.
type lab struct {
	t    testing.TB
	now  time.Time
	a, b *node
	wire []packet // in flight, first in first out
	held []packet // arrive at their time
	sent int      // packets so far
	// fault is what happens to packet number n, counted from 1.
	fault struct {
		n    int
		kind fault
	}
	chance *rand.Rand // if not nil, decides what happens to each packet
	all    []packet   // everything that was sent
	nat    *nat
	stop   func(p packet) bool // holds back packets, for collisions
	kept   []packet
	anew   bool // b forgets an SA at once that has failed
}

type fault string

const (
	lose      fault = "lost"
	duplicate fault = "duplicated"
	delay     fault = "delayed" // past the first retransmission
)

type packet struct {
	src, dst netip.AddrPort
	data     []byte
	from     *node
	at       time.Time
}

// nat rewrites addresses on their way out and back.
type nat struct {
	out, in map[netip.AddrPort]netip.AddrPort
}

func (n *nat) add(private, public netip.AddrPort) {
	if n.out == nil {
		n.out, n.in = map[netip.AddrPort]netip.AddrPort{}, map[netip.AddrPort]netip.AddrPort{}
	}
	n.out[private], n.in[public] = public, private
}

// node is one machine with the part of a daemon that it needs.
type node struct {
	*lab
	name     string
	sa       *SA
	cfg      Config
	rule     *pad.Rule
	policies []Policy
	admit    error
	first    bool
	spi      ipsec.SPI
	holdSPI  bool
	waiting  []NeedSPI
	spiErr   error
	events   []Output
	// sads is what missiu would have.
	sads    map[ipsec.SAID]*ipsec.SAParams
	larval  map[ipsec.SAID]bool
	spis    map[SPI]bool
	queries []Query
	near    []Policy
	lease   func(Wanted) (Lease, error)
	cookie  []byte // secret; nil: none demanded
}

func (n *node) Policies(q Query) []Policy {
	n.queries = append(n.queries, q)
	return n.policies
}

func (n *node) Near(Query) ([]Policy, bool) { return n.near, true }

func (n *node) Lease(_ Peer, w Wanted) (Lease, error) { return n.lease(w) }

func (n *node) Admit(Peer) (bool, error) { return n.first, n.admit }

var (
	addrA = netip.MustParseAddrPort("192.0.2.1:500")
	addrB = netip.MustParseAddrPort("192.0.2.2:500")
)

func testRule(label string) *pad.Rule {
	r := pad.NewRule(label)
	r.Remote = pad.Any()
	r.MOBIKE = false // see mobike_test.go
	r.PSK = pad.Keys{Local: ipsec.NewKey([]byte("a very shared secret")), Remote: ipsec.NewKey([]byte("a very shared secret"))}
	return r
}

func newLab(t testing.TB) *lab {
	l := &lab{t: t, now: time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)}
	l.a = l.node("a", addrA, addrB, 1)
	l.b = l.node("b", addrB, addrA, 2)
	l.b.policies = []Policy{tunnel("10.2.0.0/16", "10.1.0.0/16", 22)}
	return l
}

func (l *lab) node(name string, local, remote netip.AddrPort, seed byte) *node {
	n := &node{lab: l, name: name, rule: testRule(name), sads: map[ipsec.SAID]*ipsec.SAParams{},
		larval: map[ipsec.SAID]bool{}, spis: map[SPI]bool{}, spi: ipsec.SPI(seed) << 28}
	n.cfg = Config{Local: local, Remote: remote, Host: n, Rand: rand.NewChaCha8([32]byte{seed})}
	return n
}

// tunnel makes a pair of tunnel mode policies between networks.
func tunnel(local, remote string, id ipsec.ReqID) Policy {
	return policy(ipsec.Selector{Src: netip.MustParsePrefix(local), Dst: netip.MustParsePrefix(remote)}, ipsec.Tunnel, id)
}

func policy(sel ipsec.Selector, m ipsec.Mode, id ipsec.ReqID) Policy {
	req := []ipsec.Request{{Proto: ipsec.ESP, Mode: m, ReqID: id}}
	return Policy{
		Out: &ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: req},
		In:  &ipsec.Policy{Dir: ipsec.In, Sel: sel.Reverse(), Action: ipsec.Protect, Requests: req},
	}
}

func reqA(seq uint32) ChildRequest {
	return ChildRequest{Seq: seq, Policy: tunnel("10.1.0.0/16", "10.2.0.0/16", 11)}
}

// do carries out outputs as the daemon would.
func (n *node) do(outs []Output) {
	n.t.Helper()
	for _, o := range outs {
		n.events = append(n.events, o)
		if traceLab {
			if _, ok := o.(Send); !ok {
				n.t.Logf("%s %s %T %+v", n.now.Format("05.000"), n.name, o, o)
			}
		}
		switch o := o.(type) {
		case Send:
			n.put(packet{src: o.Local, dst: o.Remote, data: slices.Clone(o.Data), from: n})
		case NeedSPI:
			n.waiting = append(n.waiting, o)
		case ReleaseSPI:
			for _, proto := range o.Protos {
				id := ipsec.SAID{Proto: proto, Dst: o.Dst, SPI: o.SPI}
				if !n.larval[id] {
					n.t.Errorf("%s: releases SPI %v, which is not larval", n.name, id)
				}
				delete(n.larval, id)
			}
		case InstallChild:
			if !n.larval[o.In.SAID] {
				n.t.Errorf("%s: installs SPI %v, which it did not get", n.name, o.In.SAID)
			}
			delete(n.larval, o.In.SAID)
			n.install(o.In)
			if o.Out != nil {
				n.install(o.Out)
			}
		case InstallOut:
			if n.sads[o.In] == nil {
				n.t.Errorf("%s: outbound SA for %v, which is not installed", n.name, o.In)
			}
			n.install(o.Out)
		case PeerMoved:
			for _, id := range o.Moved {
				p := n.sads[id]
				if p == nil {
					n.t.Errorf("%s: moves %v, which is not installed", n.name, id)
					continue
				}
				delete(n.sads, id)
				if id.Dst == o.Old.Addr() {
					p.Dst = o.New.Addr()
				} else {
					p.Src = o.New.Addr()
				}
				n.sads[p.SAID] = p
			}
		case Moved:
			for _, m := range o.SAs {
				p := n.sads[m.From]
				if p == nil || p.Src != m.FromSrc {
					n.t.Errorf("%s: moves %v, which is not installed there", n.name, m)
					continue
				}
				delete(n.sads, m.From)
				if n.sads[m.To] != nil {
					n.t.Errorf("%s: moves %v to the place of another", n.name, m)
				}
				p.SAID, p.Src, p.Encap, p.Home = m.To, m.Src, m.Encap, m.Home
				n.sads[m.To] = p
			}
		case RemoveChild:
			for _, id := range []ipsec.SAID{o.In, o.Out} {
				if id.SPI == 0 {
					continue
				}
				if n.sads[id] == nil {
					n.t.Errorf("%s: removes %v, which is not installed", n.name, id)
				}
				delete(n.sads, id)
			}
		case NewIKESA:
			n.spis[o.Local] = true
		case GoneIKESA:
			if !n.spis[o.Local] {
				n.t.Errorf("%s: IKE SPI %v gone, but not known", n.name, o.Local)
			}
			delete(n.spis, o.Local)
		case Done:
			if d := n.sa.Deadline(); !d.IsZero() {
				n.t.Errorf("%s: deadline %v after Done", n.name, d)
			}
		}
	}
	if !n.holdSPI {
		n.giveSPIs()
	}
}

func (n *node) install(p *ipsec.SAParams) {
	n.t.Helper()
	if n.sads[p.SAID] != nil {
		n.t.Errorf("%s: %v installed twice", n.name, p.SAID)
	}
	n.sads[p.SAID] = p
}

// giveSPIs answers what waits for an SPI.
func (n *node) giveSPIs() {
	n.t.Helper()
	w := n.waiting
	n.waiting = nil
	for _, o := range w {
		if n.sa.done {
			continue
		}
		if n.spiErr != nil {
			n.do(n.sa.ChildSPI(n.now, o.Token, 0, n.spiErr))
			continue
		}
		n.spi++
		for _, f := range o.For {
			n.larval[ipsec.SAID{Proto: f.Proto, Dst: o.Dst, SPI: n.spi}] = true
		}
		n.do(n.sa.ChildSPI(n.now, o.Token, n.spi, nil))
	}
}

func (l *lab) put(p packet) {
	if l.nat != nil {
		if pub, ok := l.nat.out[p.src]; ok {
			p.src = pub
		}
		if priv, ok := l.nat.in[p.dst]; ok {
			p.dst = priv
		}
	}
	if l.stop != nil && l.stop(p) {
		l.kept = append(l.kept, p)
		return
	}
	l.inject(p)
}

// inject puts p on the wire, unless it is the one to which something happens.
func (l *lab) inject(p packet) {
	l.sent++
	l.all = append(l.all, p)
	switch {
	case l.sent == l.fault.n && l.fault.kind == lose:
		return
	case l.chance != nil:
		switch l.chance.IntN(8) {
		case 0:
			return
		case 1:
			l.wire = append(l.wire, p)
		case 2, 3:
			p.at = l.now.Add(time.Duration(l.chance.IntN(3000)) * time.Millisecond)
			l.held = append(l.held, p)
			return
		}
	case l.sent == l.fault.n && l.fault.kind == delay:
		p.at = l.now.Add(1500 * time.Millisecond)
		l.held = append(l.held, p)
		return
	case l.sent == l.fault.n && l.fault.kind == duplicate:
		l.wire = append(l.wire, p)
	}
	l.wire = append(l.wire, p)
}

// deliver hands p to whom it is for. A responder is made for a first request.
func (l *lab) deliver(p packet) {
	l.t.Helper()
	n := l.a
	if p.from == l.a {
		n = l.b
	}
	d := Datagram{Local: p.dst, Remote: p.src, Data: slices.Clone(p.data)}
	h, _, err := ikev2.ParseHeader(p.data)
	if l.anew && err == nil && n == l.b && n.sa != nil && n.sa.failed && h.Exchange == ikev2.IKE_SA_INIT {
		n.sa, n.spis = nil, map[SPI]bool{}
	}
	if n.sa == nil || n.sa.done {
		if err != nil || h.Exchange != ikev2.IKE_SA_INIT || h.IsResponse() || n == l.a {
			return
		}
		if n.cookie != nil {
			m, err := ikev2.Parse(p.data)
			if err != nil {
				return
			}
			if !CheckCookie(n.cookie, 1, p.src, m) {
				c, _ := Cookie(n.cookie, 1, p.src, m)
				b, err := CookieResponse(m, c)
				if err != nil {
					l.t.Fatal(err)
				}
				l.put(packet{src: p.dst, dst: p.src, data: b, from: n})
				return
			}
		}
		n.cfg.Local, n.cfg.Remote = p.dst, p.src
		n.sa = NewResponder(n.cfg, []*pad.Rule{n.rule})
	}
	n.do(n.sa.Receive(l.now, d))
}

// run delivers everything that is in flight.
func (l *lab) run() {
	l.t.Helper()
	for i := 0; len(l.wire) > 0; i++ {
		if i > 1000 {
			l.t.Fatalf("no end of messages")
		}
		p := l.wire[0]
		l.wire = l.wire[1:]
		l.deliver(p)
	}
}

// let releases what stop has held back, in the order of idx or as it came.
func (l *lab) let(idx ...int) {
	l.t.Helper()
	l.stop = nil
	k := l.kept
	l.kept = nil
	if idx == nil {
		for i := range k {
			idx = append(idx, i)
		}
	}
	for _, i := range idx {
		l.inject(k[i])
	}
}

// step moves the clock to t, ticking whoever is due on the way, and delivers.
func (l *lab) step(t time.Time) {
	l.t.Helper()
	for range 10000 {
		n, at := (*node)(nil), t
		for _, m := range []*node{l.a, l.b} {
			if m.sa == nil {
				continue
			}
			if d := m.sa.Deadline(); !d.IsZero() && !d.After(at) {
				n, at = m, d
			}
		}
		var due packet
		for _, p := range l.held {
			if !p.at.After(at) && (due.from == nil || p.at.Before(due.at)) {
				due = p
			}
		}
		switch {
		case due.from != nil:
			l.now = later(l.now, due.at)
			l.held = slices.DeleteFunc(l.held, func(p packet) bool { return &p.data[0] == &due.data[0] })
			l.wire = append(l.wire, due)
		case n != nil:
			l.now = later(l.now, at)
			n.do(n.sa.Tick(l.now))
		default:
			l.now = later(l.now, t)
			l.run()
			return
		}
		l.run()
	}
	l.t.Fatalf("no end of deadlines before %v", t)
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// settle delivers, and repeats what was lost, until nobody waits for anything.
func (l *lab) settle() {
	l.t.Helper()
	l.run()
	for range 1000 {
		if !l.a.busy() && !l.b.busy() && len(l.held) == 0 {
			return
		}
		l.step(l.now.Add(250 * time.Millisecond))
	}
	l.t.Fatalf("does not settle: a %s, b %s", l.a.describe(), l.b.describe())
}

// busy reports whether n waits for an answer or means to try again.
func (n *node) busy() bool {
	if n.sa == nil || n.sa.done {
		return false
	}
	if len(n.sa.delayed) > 0 || len(n.sa.queue) > 0 {
		return true
	}
	for _, i := range n.sa.ikes {
		if i.req != nil || i.state == StateHalfOpen {
			return true
		}
	}
	return false
}

func (n *node) describe() string {
	if n.sa == nil {
		return "none"
	}
	var l []string
	for _, i := range n.sa.ikes {
		s := fmt.Sprintf("%v %v", i.local, i.state)
		if i == n.sa.cur {
			s += "*"
		}
		l = append(l, s)
	}
	return fmt.Sprintf("[%s] failed=%v SAs %v", strings.Join(l, ", "), n.sa.failed, len(n.sads))
}

// establish brings up an IKE SA with one child SA.
func (l *lab) establish() {
	l.t.Helper()
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.settle()
}

// addAltered has a ask for another child SA, by ACQUIRE 2, and get b's answer with other
// payloads.
func (l *lab) addAltered(edit func([]ikev2.Payload) []ikev2.Payload) {
	l.t.Helper()
	l.stop = func(p packet) bool { return p.from == l.b }
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.run()
	i := l.b.sa.cur
	m, err := ikev2.Open(l.kept[0].data, &sk{c: i.seal.c})
	if err != nil {
		l.t.Fatal(err)
	}
	m.Payloads = edit(m.Payloads)
	b, err := m.AppendSealed(nil, i.seal)
	if err != nil {
		l.t.Fatal(err)
	}
	l.stop, l.kept = nil, nil
	l.a.do(l.a.sa.Receive(l.now, Datagram{addrA, addrB, b}))
	l.settle()
}

// clearEvents forgets what was told so far.
func (l *lab) clearEvents() { l.a.events, l.b.events = nil, nil }

// told returns the outputs of type T so far.
func told[T Output](n *node) []T {
	var l []T
	for _, o := range n.events {
		if t, ok := o.(T); ok {
			l = append(l, t)
		}
	}
	return l
}

// want checks that both sides agree: one IKE SA in use with the same keys, and
// this many child SAs, each installed on both sides with the same keys.
func (l *lab) want(children int) {
	l.t.Helper()
	if l.a.sa.cur == nil || l.b.sa == nil || l.b.sa.cur == nil {
		l.t.Fatalf("no IKE SA: a %s, b %s", l.a.describe(), l.b.describe())
	}
	x, y := l.a.sa.cur, l.b.sa.cur
	if x.state != StateEstablished || y.state != StateEstablished || l.a.sa.failed || l.b.sa.failed {
		l.t.Fatalf("IKE SAs: a %s, b %s; want both established", l.a.describe(), l.b.describe())
	}
	if x.local != y.remote || x.remote != y.local || x.initiator == y.initiator || !x.keys.D.Equal(y.keys.D) {
		l.t.Errorf("IKE SAs differ: a %v %v, b %v %v", x.local, x.remote, y.local, y.remote)
	}
	for _, n := range []*node{l.a, l.b} {
		if len(n.sa.children) != children || len(n.sads) != 2*children {
			l.t.Errorf("%s: %d child SAs, %d SAs; want %d", n.name, len(n.sa.children), len(n.sads), children)
		}
		if len(n.sa.ikes) != 1 || len(n.spis) != 1 {
			l.t.Errorf("%s: IKE SAs left: %s, SPIs %v", n.name, n.describe(), n.spis)
		}
		if len(n.larval) != 0 {
			l.t.Errorf("%s: larval SAs left: %v", n.name, n.larval)
		}
	}
	type key struct {
		proto ipsec.Protocol
		spi   ipsec.SPI
	}
	other := map[key]*ipsec.SAParams{}
	for id, p := range l.b.sads {
		other[key{id.Proto, id.SPI}] = p
	}
	for _, id := range slices.SortedFunc(maps.Keys(l.a.sads), func(a, b ipsec.SAID) int { return cmp.Compare(a.SPI, b.SPI) }) {
		p, q := l.a.sads[id], other[key{id.Proto, id.SPI}]
		switch {
		case q == nil:
			l.t.Errorf("SA %v only at a", id)
		case !p.EncrKey.Equal(q.EncrKey) || !p.AuthKey.Equal(q.AuthKey) || p.EncrKey.Len() == 0 && p.Proto != ipsec.AH || p.AuthKey.Len() == 0 && p.Proto == ipsec.AH:
			l.t.Errorf("SA %v: keys differ", id)
		case p.Encr != q.Encr || p.Auth != q.Auth || p.ESN != q.ESN || p.Mode != q.Mode:
			l.t.Errorf("SA %v: %v %v %v %v, and %v %v %v %v", id, p.Encr, p.Auth, p.ESN, p.Mode, q.Encr, q.Auth, q.ESN, q.Mode)
		}
	}
}

// wantEnd checks that nothing is left on n, and why.
func (n *node) wantEnd(want error) {
	n.t.Helper()
	f := told[Failed](n)
	if len(f) != 1 || !errors.Is(f[0].Err, want) {
		n.t.Errorf("%s: Failed %v, want once, %v", n.name, f, want)
	}
	if len(n.sads) != 0 || len(n.larval) != 0 {
		n.t.Errorf("%s: left: SAs %v, larval %v", n.name, n.sads, n.larval)
	}
}

// withFaults runs a scenario as it is, and again with each single message lost,
// duplicated, and delayed.
func withFaults(t *testing.T, f func(t *testing.T, l *lab)) {
	t.Helper()
	l := newLab(t)
	f(t, l)
	if t.Failed() {
		return
	}
	for n := 1; n <= l.sent; n++ {
		for _, k := range []fault{lose, duplicate, delay} {
			t.Run(fmt.Sprintf("message %d %s", n, k), func(t *testing.T) {
				l := newLab(t)
				l.fault.n, l.fault.kind = n, k
				f(t, l)
			})
		}
	}
}

// nonces makes n's next nonces begin with these octets.
func (n *node) nonces(first ...byte) {
	f := n.sa.newNonce
	n.sa.newNonce = func() []byte {
		b := f()
		if len(first) > 0 {
			b[0] = first[0]
			first = first[1:]
		}
		return b
	}
}

func inSPI(t testing.TB, n *node) ipsec.SAID {
	t.Helper()
	if len(n.sa.children) == 0 {
		t.Fatalf("%s has no child SA", n.name)
	}
	c := n.sa.children[0]
	return ipsec.SAID{Proto: c.proto, Dst: c.inDst, SPI: c.in}
}

var traceLab = os.Getenv("SA_TRACE") != ""
