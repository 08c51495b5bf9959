package ike

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/control"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// ruleTo has a rule "gate" for peers.
func ruleTo(psk string, change func(*pad.Rule), peers ...netip.Addr) option {
	return func(c *Config, _ *missiu) {
		r := pad.NewRule("gate")
		r.PSK = keys(psk)
		for _, p := range peers {
			r.Remote = append(r.Remote, pad.One(p))
		}
		if change != nil {
			change(r)
		}
		db, err := pad.NewDB([]*pad.Rule{r})
		if err != nil {
			panic(err)
		}
		c.Rules = db
	}
}

func spiSet(m *missiu) (l []ipsec.SPI) {
	for _, p := range m.list() {
		l = append(l, p.SPI)
	}
	slices.Sort(l)
	return l
}

// Up makes what policy wants, again does nothing, Rekey replaces all of it, Down
// takes it away; each tells when it is done.
func TestUpRekeyDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", ruleTo("k", nil, addrB))
		b := newNode(t, n, addrB, addrA, "k")
		do := func(verb string) {
			t.Helper()
			start := time.Now()
			if r := a.Control(t.Context(), control.Request{Do: verb, Rule: "gate"}); !r.OK || time.Since(start) > 10*time.Second {
				t.Errorf("%s: %+v after %v", verb, r, time.Since(start))
				a.dump(t)
			}
		}
		if r := a.Control(t.Context(), control.Request{Do: "rekey", Rule: "gate"}); r.OK || !strings.Contains(r.Error, "not up") {
			t.Errorf("rekey of nothing: %+v", r)
		}
		do("up")
		wantPair(t, a, b, 1)
		was, spi := spiSet(a.m), a.Report(t.Context()).IKESAs[0].SPILocal
		do("up")
		wantPair(t, a, b, 1)
		if got := spiSet(a.m); !slices.Equal(got, was) {
			t.Errorf("a second up changes SAs: %v, were %v", got, was)
		}
		do("rekey")
		synctest.Wait()
		wantPair(t, a, b, 1)
		r := a.Report(t.Context())
		if got := spiSet(a.m); slices.Equal(got, was) || len(r.IKESAs) != 1 || r.IKESAs[0].SPILocal == spi {
			t.Errorf("after rekey: SAs %v, were %v; IKE SAs %+v, was %s", got, was, r.IKESAs, spi)
		}
		i := r.IKESAs[0]
		if i.Rule != "gate" || i.State != "established" || !i.Initiator || i.PeerID != "192.0.2.2" || i.RekeyIn == nil || *i.RekeyIn < 12000 ||
			len(i.Children) != 1 || i.Children[0].RekeyIn == nil || *i.Children[0].ExpireIn != 3600 || !r.Rules[0].Up {
			t.Errorf("report: %+v", r)
		}
		do("down")
		synctest.Wait()
		wantPair(t, a, b, 0)
		do("down")
		a.stop(t)
		b.stop(t)
	})
}

// What fails says why, there and in the report.
func TestUpFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", ruleTo("wrong", nil, addrB))
		b := newNode(t, n, addrB, addrA, "k")
		fails := func(q control.Request, want string) {
			t.Helper()
			if r := a.Control(t.Context(), q); r.OK || !strings.Contains(r.Error, want) {
				t.Errorf("%+v: got %+v, want %q", q, r, want)
			}
		}
		fails(control.Request{Do: "up", Rule: "gate"}, "AUTHENTICATION_FAILED")
		if q := a.Report(t.Context()).Rules[0]; q.Up || !strings.Contains(q.Failure, "AUTHENTICATION_FAILED") || q.FailedAt == nil {
			t.Errorf("report: %+v", q)
		}
		fails(control.Request{Do: "up", Rule: "gat"}, `no rule "gat"; there are "gate"`)
		fails(control.Request{Do: "up"}, "no rule given")
		fails(control.Request{Do: "dance", Rule: "gate"}, "want status, up, down or rekey")
		b.stop(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.Up(ctx, "gate"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("silent peer: %v", err)
		}
		fails(control.Request{Do: "up", Rule: "gate"}, "peer does not answer")
		a.m.setDown(true)
		synctest.Wait()
		fails(control.Request{Do: "up", Rule: "gate"}, "no connection to missiu")
		a.stop(t)
	})
}

// A rule with start_action start stays down when an operator says so.
func TestDownHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		b := newNode(t, n, addrB, addrA, "k")
		a := newNode(t, n, addrA, addrB, "k", ruleTo("k", func(r *pad.Rule) { r.StartAction = pad.StartNow }, addrB))
		synctest.Wait()
		wantPair(t, a, b, 1)
		if err := a.Down(t.Context(), "gate"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 0)
		if q := a.Report(t.Context()).Rules[0]; !q.HeldDown || q.Up {
			t.Errorf("report: %+v", q)
		}
		if err := a.Up(t.Context(), "gate"); err != nil {
			t.Error(err)
		}
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
}

// Of the addresses of a peer that no policy names those that are silent are
// passed over, and names are looked up again.
func TestAddressesInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		silent := netip.MustParseAddr("192.0.2.9")
		found := []netip.Addr{silent}
		open := func(c *Config, m *missiu) { m.policies = nil }
		a := newNode(t, n, addrA, addrB, "k", open, ruleTo("k", func(r *pad.Rule) {
			r.RemoteHosts, r.Retransmit.Limit = []string{"Gate.example.com"}, 2
		}), func(c *Config, _ *missiu) {
			c.Resolve = func(_ context.Context, h string) ([]netip.Addr, error) {
				if h != "gate.example.com" {
					t.Errorf("looked up %q", h)
				}
				return slices.Clone(found), nil
			}
		})
		b := newNode(t, n, addrB, addrA, "k", open)
		if err := a.Up(t.Context(), "gate"); err == nil || !strings.Contains(err.Error(), "192.0.2.9: peer does not answer") {
			t.Errorf("up: %v", err)
		}
		found = []netip.Addr{silent, addrB}
		if err := a.Up(t.Context(), "gate"); err != nil {
			t.Errorf("up: %v", err)
			a.dump(t)
		}
		if r := a.Report(t.Context()); len(r.IKESAs) != 1 || r.IKESAs[0].Peer.Addr() != addrB {
			t.Errorf("got %+v", r.IKESAs)
		}
		a.stop(t)
		b.stop(t)
	})
}

// The report has no key in it.
func TestReportHasNoKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		r, err := json.Marshal(a.Report(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(r), "battery") {
			t.Errorf("%s", r)
		}
		a.m.event(keysock.SAsFlushed{})
		a.stop(t)
		b.stop(t)
	})
}
