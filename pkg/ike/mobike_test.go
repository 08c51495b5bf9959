package ike

import (
	"context"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// tunnels are policies that name both ends.
func tunnels(local, remote netip.Addr, near, far string) []ipsec.Policy {
	sel := ipsec.Selector{Src: netip.MustParsePrefix(near), Dst: netip.MustParsePrefix(far)}
	req := func(src, dst netip.Addr) []ipsec.Request {
		return []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: ipsec.LevelRequire, ReqID: 7, Src: src, Dst: dst}}
	}
	return []ipsec.Policy{
		{ID: 1, Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: req(local, remote)},
		{ID: 2, Dir: ipsec.In, Sel: sel.Reverse(), Action: ipsec.Protect, Requests: req(remote, local)},
	}
}

// The address of a is taken away and comes back: its IKE SA and SAs go with it, are
// known where they are, and serve what policies with the first address ask for.
func TestAddressGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		second := netip.MustParseAddr("192.0.2.11")
		n := &network{}
		port := func(addrs ...netip.Addr) option {
			return func(c *Config, _ *missiu) {
				c.DialNATT = func(context.Context) (Conn, error) {
					conn, err := n.listen(netip.AddrPortFrom(addrs[0], 4500))
					n.mu.Lock()
					defer n.mu.Unlock()
					for _, a := range addrs[1:] {
						n.conns[netip.AddrPortFrom(a, 4500)] = conn.(*memConn)
					}
					return conn, err
				}
			}
		}
		var has atomic.Pointer[[]netip.Addr]
		has.Store(&[]netip.Addr{addrA, second})
		news := make(chan struct{}, 1)
		a := newNode(t, n, addrA, addrB, "k", port(addrA, second), func(c *Config, m *missiu) {
			m.policies = tunnels(addrA, addrB, "10.1.0.0/24", "10.2.0.0/24")
			c.Addrs = func() []netip.Addr { return *has.Load() }
			c.AddrsChange = news
			c.Rules.Rules()[0].IPComp = true
		})
		b := newNode(t, n, addrB, addrA, "k", port(addrB), func(c *Config, m *missiu) {
			m.policies = tunnels(addrB, addrA, "10.2.0.0/24", "10.1.0.0/24")
			c.Rules.Rules()[0].IPComp = true
		})
		time.Sleep(time.Second)
		ask := func(seq uint32) {
			a.m.event(keysock.Acquire{Seq: seq, Proto: ipsec.ESP, Src: addrA, Dst: addrB, PolicyID: 1, Mode: ipsec.Tunnel, ReqID: 7})
			time.Sleep(time.Second)
			synctest.Wait()
		}
		change := func(l ...netip.Addr) {
			has.Store(&l)
			news <- struct{}{}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		listening := func(at netip.Addr) bool {
			n.mu.Lock()
			defer n.mu.Unlock()
			c := n.conns[netip.AddrPortFrom(at, 500)]
			if c == nil {
				return false
			}
			select {
			case <-c.closed:
				return false
			default:
				return true
			}
		}
		wantAt := func(at netip.Addr) {
			t.Helper()
			for _, x := range []*node{a, b} {
				known := map[ipsec.SAID]bool{}
				for _, s := range x.m.list() {
					known[s.SAID] = true
					if s.Src != at && s.Dst != at {
						t.Errorf("SA %v from %v has not moved to %v", s.SAID, s.Src, at)
					}
					if e := s.Ends(); e.Src != addrA && e.Dst != addrA {
						t.Errorf("SA %v is known by %v", s.SAID, e)
					}
					if s.CPI == 0 {
						t.Errorf("SA %v has lost its IPComp", s.SAID)
					}
				}
				x.mu.Lock()
				if len(x.bySA) != len(known) {
					t.Errorf("%d SAs known, %d there", len(x.bySA), len(known))
				}
				for id := range x.bySA {
					if !known[id] {
						t.Errorf("known: %v, which is not there", id)
					}
				}
				for l := range x.lineages {
					if len(l.sas) != len(known) {
						t.Errorf("%d SAs of the IKE SA, %d there", len(l.sas), len(known))
					}
				}
				x.mu.Unlock()
			}
			r := a.Report(t.Context())
			if len(r.IKESAs) != 1 || !r.IKESAs[0].MOBIKE || r.IKESAs[0].Local.Addr() != at {
				t.Errorf("report: %+v", r.IKESAs)
			}
			for _, c := range r.IKESAs[0].Children {
				if c.CPIIn == 0 || c.CPIOut == 0 {
					t.Errorf("report: %+v", c)
				}
			}
		}
		if listening(second) {
			t.Error("port 500 of the second address is open, and nobody needs it")
		}
		ask(1)
		wantPair(t, a, b, 1)
		wantAt(addrA)
		was := ids(a.m.list())

		change(second)
		wantPair(t, a, b, 1)
		wantAt(second)
		if a.logs.FilterMessage("moved").Len() != 1 || b.logs.FilterMessage("moved").Len() != 1 {
			t.Error("not one line about it")
			a.dump(t)
		}
		ask(2)
		wantPair(t, a, b, 2)
		wantAt(second)

		// A new IKE SA from there has the port opened; it goes with the address.
		if got := a.present(netip.MustParseAddr("192.0.2.99"), addrB); got != second {
			t.Errorf("would begin from %v", got)
		}
		if err := a.send([]byte("x"), netip.AddrPortFrom(second, 500), netip.AddrPortFrom(addrB, 500)); err != nil || !listening(second) {
			t.Errorf("from the second address: %v, port open %v", err, listening(second))
		}
		change(addrA)
		wantAt(addrA)
		if err := a.send([]byte("x"), netip.AddrPortFrom(second, 500), netip.AddrPortFrom(addrB, 500)); err == nil {
			t.Error("sends from an address that is gone")
		}
		if listening(second) || !listening(addrA) {
			t.Error("ports are not those of the addresses")
		}
		for _, s := range was {
			if !slices.Contains(ids(a.m.list()), s) {
				t.Errorf("%s is not there any more", s)
			}
		}
		inits := 0
		for _, p := range n.packets() {
			if len(p.data) > 18 && p.data[18] == 34 {
				inits++
			}
		}
		if inits != 2 {
			t.Errorf("%d messages of IKE_SA_INIT, want 2", inits)
		}

		// What missiu said of an SA before it moved is about where it is now.
		var in ipsec.SAID
		for _, s := range a.m.list() {
			if s.Dst == addrA {
				in = s.SAID
			}
		}
		a.m.event(keysock.Expire{SAID: ipsec.SAID{Proto: in.Proto, Dst: second, SPI: in.SPI}})
		time.Sleep(time.Second)
		synctest.Wait()
		wantPair(t, a, b, 2)
		if slices.ContainsFunc(a.m.list(), func(s *ipsec.SAParams) bool { return s.SAID == in }) {
			t.Errorf("%v is not rekeyed", in)
		}
		a.stop(t)
		b.stop(t)
		if l := append(a.m.list(), b.m.list()...); len(l)+len(a.moved)+len(b.moved) != 0 {
			t.Errorf("left behind: %v, moved %v, %v", ids(l), a.moved, b.moved)
		}
	})
}

func TestHostAddrs(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	if has, err := hostAddrs(); err != nil || !slices.ContainsFunc(has, func(h hostAddr) bool { return h.Addr == local }) {
		t.Skip("no loopback")
	}
	if l := HostAddrs("", []netip.Addr{netip.MustParseAddr("192.0.2.77"), local}); !slices.Contains(l, local) || slices.Contains(l, netip.MustParseAddr("192.0.2.77")) {
		t.Errorf("got %v", l)
	}
	if l := HostAddrs("lo", nil); slices.Contains(l, local) {
		t.Errorf("loopback: got %v", l)
	}
	if i := HostInterface("no-such-if", nil); i != 0 {
		t.Errorf("interface %d", i)
	}
	ctx, cancel := context.WithCancel(t.Context())
	addrs, routes, err := WatchHost(ctx, func() int { return 0 })
	if err != nil {
		t.Skip(err)
	}
	cancel()
	for range addrs {
	}
	for range routes {
	}
}
