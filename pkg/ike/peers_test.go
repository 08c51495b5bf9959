package ike

import (
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// A host that died without a word comes back: INITIAL_CONTACT makes the peer
// drop what was left of it.
func TestInitialContact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		n.setDrop(func(packet) bool { return true })
		a.stop(t)
		n.setDrop(nil)
		a = newNode(t, n, addrA, addrB, "correct horse battery")
		a.m.spi += 100 // SPIs are not used twice
		a.acquire(2, addrA, addrB)
		time.Sleep(leftoverGrace)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
}

func rules(f func(*pad.Rule)) option {
	return func(c *Config, _ *missiu) {
		r := pad.NewRule("peers")
		r.Remote, r.PSK = pad.Any(), keys("k")
		f(r)
		db, err := pad.NewDB([]*pad.Rule{r})
		if err != nil {
			panic(err)
		}
		c.Rules = db
	}
}

// unique_ids: a second IKE SA of the same identity, from another address.
func TestUniqueIDs(t *testing.T) {
	addrC := netip.MustParseAddr("192.0.2.3")
	me := pad.ID{Type: 2, Data: "laptop.example"}
	named := rules(func(r *pad.Rule) { r.LocalID, r.InitialContact = me, false })
	for _, tt := range []struct {
		name    string
		u       pad.UniqueIDs
		contact bool
		first   int // SAs left of the first
		second  int
	}{
		{"no", pad.UniqueNo, false, 2, 2},
		{"no, INITIAL_CONTACT", pad.UniqueNo, true, 0, 2},
		{"never, INITIAL_CONTACT", pad.UniqueNever, true, 2, 2},
		{"replace", pad.UniqueReplace, false, 0, 2},
		{"keep", pad.UniqueKeep, false, 2, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := &network{}
			hub := newNode(t, n, addrB, addrA, "k", rules(func(r *pad.Rule) {
				r.UniqueIDs, r.RemoteIDs = tt.u, pad.Patterns{pad.AnyID}
			}), func(_ *Config, m *missiu) {
				more := policies(addrB, addrC)
				more[0].ID, more[1].ID = 3, 4
				m.policies = append(m.policies, more...)
			})
			a := newNode(t, n, addrA, addrB, "k", named)
			a.acquire(1, addrA, addrB)
			synctest.Wait()
			second := named
			if tt.contact {
				second = rules(func(r *pad.Rule) { r.LocalID = me })
			}
			c := newNode(t, n, addrC, addrB, "k", second)
			c.acquire(1, addrC, addrB)
			time.Sleep(leftoverGrace)
			synctest.Wait()
			first, other := 0, 0
			for _, p := range hub.m.list() {
				if p.Src == addrC || p.Dst == addrC {
					other++
				} else {
					first++
				}
			}
			if first != tt.first || other != tt.second {
				t.Errorf("%s: got %d and %d SAs, want %d and %d", tt.name, first, other, tt.first, tt.second)
				hub.dump(t)
			}
			a.stop(t)
			c.stop(t)
			hub.stop(t)
		})
	}
}

// Both ends want the SA at the same moment. Whatever comes of it, both ends
// have the same.
func TestBothBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		b.acquire(1, addrB, addrA)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, len(a.m.list())/2)
		if len(a.m.list()) < 2 {
			t.Error("no SA at all")
		}
		a.stop(t)
		synctest.Wait()
		wantPair(t, a, b, 0)
		b.stop(t)
	})
}

// A second policy with the same peer takes the IKE SA that is there.
func TestSecondChild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		more := func(c *Config, m *missiu) {
			for _, p := range m.policies[:2:2] {
				p.ID += 10
				p.Sel.Proto = 6
				m.policies = append(m.policies, p)
			}
		}
		n, a, b := pair(t, more)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		a.m.event(keysock.Acquire{Seq: 2, Proto: ipsec.ESP, Src: addrA, Dst: addrB, PolicyID: 11, Mode: ipsec.Transport, ReqID: 7})
		synctest.Wait()
		wantPair(t, a, b, 2)
		if got := len(n.packets()); got != 8 {
			t.Errorf("got %d datagrams, want 8: IKE_SA_INIT, IKE_INTERMEDIATE, IKE_AUTH, CREATE_CHILD_SA", got)
		}
		a.stop(t)
		b.stop(t)
	})
}

// A dead peer is noticed, its SAs go, and with dpd_action restart negotiation
// begins again when it is back.
func TestDeadPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t, rules(func(r *pad.Rule) { r.DPD, r.DPDAction = 30*time.Second, pad.DPDRestart }))
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		n.setDrop(func(packet) bool { return true })
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 0)
		n.setDrop(nil)
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		if l := a.m.list(); len(l) < 2 {
			t.Errorf("after the peer came back: got %v, want a pair", ids(l))
			a.dump(t)
		}
		a.stop(t)
		b.stop(t)
	})
}

// Traffic of a child SA is proof of life: no probe.
func TestTrafficInsteadOfProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t, rules(func(r *pad.Rule) { r.DPD = 30 * time.Second }))
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		busy := func(x *node) {
			x.m.mu.Lock()
			defer x.m.mu.Unlock()
			x.m.packets++
		}
		before := len(n.packets())
		for range 20 {
			time.Sleep(10 * time.Second)
			busy(a)
			busy(b)
		}
		synctest.Wait()
		if got := len(n.packets()) - before; got != 0 {
			t.Errorf("got %d datagrams while packets came in", got)
		}
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if got := len(n.packets()) - before; got == 0 {
			t.Error("no probe though nothing comes in")
		}
		a.stop(t)
		b.stop(t)
	})
}

// An SA that missiu refuses is not left half installed, and the peer is told.
func TestInstallRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		b.m.mu.Lock()
		b.m.refuseAdd = syscall.ENOBUFS
		b.m.mu.Unlock()
		a.acquire(1, addrA, addrB)
		time.Sleep(time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 0)
		b.m.mu.Lock()
		b.m.refuseAdd = 0
		b.m.mu.Unlock()
		a.acquire(2, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
}

// A lineage at rest has no goroutine, and still does what is due: liveness, and
// the answer to it.
func TestRestingLineage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		before := len(n.packets())
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if len(n.packets()) == before {
			t.Error("no probe of a silent peer")
		}
		for _, x := range []*node{a, b} {
			for _, l := range x.snapshot() {
				l.inbox.mu.Lock()
				if l.inbox.busy {
					t.Errorf("%v: goroutine of the lineage with %v is there", x.cfg.Local, l.remote)
				}
				l.inbox.mu.Unlock()
			}
			if got := x.workers.rest.Load(); got > maxRest {
				t.Errorf("%v: %d goroutines wait for work, want %d at most", x.cfg.Local, got, maxRest)
			}
		}
		a.stop(t)
		b.stop(t)
	})
}

// Bounded inboxes: a lineage that is busy loses datagrams, not the daemon.
func TestInboxBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := New(Config{Local: []netip.Addr{addrA}, Rules: ruleFor("k"), Listen: (&network{}).listen, Dial: (&missiu{}).dial})
		if err != nil {
			t.Fatal(err)
		}
		l := d.newLineage(netip.AddrPortFrom(addrA, 500), netip.AddrPortFrom(addrB, 500), true)
		n := 0
		for octets, want := range map[int]int{0: inboxMost, 536: inboxOctets / 536, 1400: inboxOctets / 1400, maxMessage: inboxLen} {
			l.inbox = inbox{busy: true}
			n = 0
			for range 10 * inboxMost {
				if l.deliver(sa.Datagram{Data: make([]byte, octets)}) {
					n++
				}
			}
			if n != want {
				t.Errorf("got %d datagrams of %d octets in, want %d", n, octets, want)
			}
			// And again, once they are out.
			if in, ok := l.inbox.take(); !ok || len(in.packets) != want || !l.deliver(sa.Datagram{Data: make([]byte, octets)}) {
				t.Errorf("%d of %d octets out, and no more in", len(in.packets), octets)
			}
		}
		l.inbox = inbox{busy: true}
		n = 0
		for range 2 * callsLen {
			if l.post(func(*lineage, time.Time) []sa.Output { return nil }) == nil {
				n++
			}
		}
		if n != callsLen {
			t.Errorf("got %d calls in, want %d", n, callsLen)
		}
	})
}

func TestNewRefuses(t *testing.T) {
	good := Config{Local: []netip.Addr{addrA}, Rules: ruleFor("k"), Listen: (&network{}).listen, Dial: (&missiu{}).dial}
	for name, f := range map[string]func(*Config){
		"local":  func(c *Config) { c.Local = nil },
		"rules":  func(c *Config) { c.Rules = nil },
		"listen": func(c *Config) { c.Listen = nil },
		"dial":   func(c *Config) { c.Dial = nil },
	} {
		c := good
		f(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s missing: accepted", name)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		c := good
		c.Listen = func(a netip.AddrPort) (Conn, error) { return nil, fmt.Errorf("udp %v: %w", a, syscall.EADDRINUSE) }
		d, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Run(t.Context()); err == nil {
			t.Error("port in use: Run returned nil")
		}
	})
}
