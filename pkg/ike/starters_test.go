package ike

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/keysock"
)

// start_action start with several addresses and no policy that names one: in
// turn until one answers, the next when that one dies. The IKE SA is there
// before any policy, and when one comes that names it, so is the child SA.
func TestStartInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		addrC := netip.MustParseAddr("192.0.2.3")
		none := func(c *Config, m *missiu) { m.policies = nil }
		a := newNode(t, n, addrA, addrB, "k", none, ruleTo("k", func(r *pad.Rule) {
			r.StartAction, r.Retransmit.Limit = pad.StartNow, 2
		}, netip.MustParseAddr("192.0.2.9"), addrB, addrC))
		b := newNode(t, n, addrB, addrA, "k", none)
		c := newNode(t, n, addrC, addrA, "k", none)
		up := func(peer netip.Addr) {
			t.Helper()
			r := a.Report(t.Context())
			if len(r.IKESAs) != 1 || r.IKESAs[0].Peer.Addr() != peer || r.IKESAs[0].State != "established" {
				t.Errorf("IKE SAs %+v, want one with %v", r.IKESAs, peer)
				a.dump(t)
			}
		}
		time.Sleep(15 * time.Second)
		synctest.Wait()
		up(addrB)
		for _, x := range []*node{a, b} {
			for _, p := range policies(x.cfg.Local[0], map[*node]netip.Addr{a: addrB, b: addrA}[x]) {
				x.m.mu.Lock()
				x.m.policies = append(x.m.policies, p)
				x.m.mu.Unlock()
				x.m.event(keysock.PolicyAdded{Policy: p})
			}
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
		for _, x := range []*node{a, b} {
			x.m.mu.Lock()
			x.m.policies = nil
			x.m.mu.Unlock()
			x.m.event(keysock.PoliciesFlushed{})
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, 0)
		b.stop(t)
		time.Sleep(15 * time.Second)
		synctest.Wait()
		up(addrC)
		a.stop(t)
		c.stop(t)
	})
}

// Where a peer grants no child SA it is asked again ever more seldom.
func TestStartRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		b := newNode(t, n, addrB, addrA, "k", func(c *Config, m *missiu) { m.policies = nil })
		a := newNode(t, n, addrA, addrB, "k", ruleTo("k", func(r *pad.Rule) { r.StartAction, r.DPD = pad.StartNow, 0 }, addrB))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := len(n.packets()); got < 20 || got > 60 {
			t.Errorf("%d messages in ten minutes, want some twenty exchanges", got)
		}
		a.stop(t)
		b.stop(t)
	})
}
