package ike

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// The initiator, or because the responder says so, proves itself anew in time:
// another IKE SA, other child SAs, and no moment without; with break_before_make
// there is one.
func TestReauthentication(t *testing.T) {
	period := func(r *pad.Rule) { r.Reauth = 10 * time.Minute }
	for _, tt := range []struct {
		name   string
		a, b   func(*pad.Rule)
		always bool
	}{
		{"by the initiator", period, nil, true},
		{"by AUTH_LIFETIME", nil, period, true},
		{"break before make", func(r *pad.Rule) { period(r); r.ReauthBreak = true }, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &network{}
				a := newNode(t, n, addrA, addrB, "k", ruleTo("k", tt.a, addrB))
				b := newNode(t, n, addrB, addrA, "k", ruleTo("k", tt.b, addrA))
				if err := a.Up(t.Context(), "gate"); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				ike, was := a.Report(t.Context()).IKESAs[0].SPILocal, spiSet(a.m)
				least := 99
				a.m.mu.Lock()
				a.m.trace = func(string) { least = min(least, len(a.m.sas)) }
				a.m.mu.Unlock()
				time.Sleep(8 * time.Minute)
				synctest.Wait()
				if got := spiSet(a.m); !slices.Equal(got, was) {
					t.Errorf("too early: %v, were %v", got, was)
				}
				time.Sleep(4 * time.Minute)
				synctest.Wait()
				wantPair(t, a, b, 1)
				r := a.Report(t.Context())
				if got := spiSet(a.m); slices.ContainsFunc(got, func(s ipsec.SPI) bool { return slices.Contains(was, s) }) ||
					len(r.IKESAs) != 1 || r.IKESAs[0].SPILocal == ike || len(b.Report(t.Context()).IKESAs) != 1 {
					t.Errorf("SAs %v, were %v; IKE SAs %+v, was %s", got, was, r.IKESAs, ike)
				}
				if tt.always != (least >= 2) {
					t.Errorf("down to %d SAs", least)
				}
				// INITIAL_CONTACT would have it end what still carries traffic.
				if got := b.logs.FilterMessage("replaced by a newer IKE SA of the same identity").Len(); got != 0 && tt.always {
					t.Errorf("the old IKE SA was taken for stale")
				}
				a.stop(t)
				b.stop(t)
			})
		})
	}
}

// With a peer that replaces no SAs there is a new IKE SA, of which the initiator sees
// to; other refusals change nothing.
func TestPeerDoesNotRekey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", ruleTo("k", nil, addrB))
		b := newNode(t, n, addrB, addrA, "k", ruleTo("k", nil, addrA))
		if err := a.Up(t.Context(), "gate"); err != nil {
			t.Fatal(err)
		}
		refuse := func(x *node, typ ikev2.NotifyType) {
			t.Helper()
			for _, l := range x.snapshot() {
				err := l.post(func(l *lineage, _ time.Time) []sa.Output {
					return []sa.Output{sa.RekeyFailed{Old: l.sa.Status().Children[0].In, Err: &sa.PeerError{Exchange: ikev2.CREATE_CHILD_SA, Notify: typ}}}
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(5 * time.Second)
			synctest.Wait()
			wantPair(t, a, b, 1)
		}
		was := spiSet(a.m)
		refuse(a, ikev2.NO_PROPOSAL_CHOSEN)
		refuse(b, ikev2.NO_ADDITIONAL_SAS)
		if got := spiSet(a.m); !slices.Equal(got, was) {
			t.Errorf("SAs %v, were %v", got, was)
		}
		refuse(a, ikev2.NO_ADDITIONAL_SAS)
		if got := spiSet(a.m); slices.ContainsFunc(got, func(s ipsec.SPI) bool { return slices.Contains(was, s) }) {
			t.Errorf("SAs %v, were %v", got, was)
		}
		a.stop(t)
		b.stop(t)
	})
}

// An attempt that fails leaves what there is; the next may succeed.
func TestReauthenticationFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", ruleTo("k", func(r *pad.Rule) { r.Reauth, r.DPD = 10*time.Minute, 0 }, addrB))
		b := newNode(t, n, addrB, addrA, "k", ruleTo("k", nil, addrA))
		if err := a.Up(t.Context(), "gate"); err != nil {
			t.Fatal(err)
		}
		was := spiSet(a.m)
		n.setDrop(func(p packet) bool {
			h, _, err := ikev2.ParseHeader(p.data)
			return err == nil && h.Exchange == ikev2.IKE_SA_INIT
		})
		time.Sleep(13 * time.Minute)
		synctest.Wait()
		if got := spiSet(a.m); !slices.Equal(got, was) {
			t.Errorf("SAs %v, were %v", got, was)
			a.dump(t)
		}
		n.setDrop(nil)
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 1)
		if got := spiSet(a.m); slices.Equal(got, was) {
			t.Errorf("the same SAs: %v", got)
		}
		a.stop(t)
		b.stop(t)
	})
}

// A peer that does not prove itself again is cut off; child SAs without traffic
// go, those with traffic stay.
func TestTooOldAndIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", ruleTo("k", nil, addrB))
		b := newNode(t, n, addrB, addrA, "k", ruleTo("k", func(r *pad.Rule) { r.ChildIdle = time.Minute }, addrA))
		if err := a.Up(t.Context(), "gate"); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			time.Sleep(15 * time.Second)
			b.m.mu.Lock()
			b.m.packets++
			b.m.mu.Unlock()
		}
		wantPair(t, a, b, 1)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 0)
		if r := b.Report(t.Context()); len(r.IKESAs) != 1 {
			t.Errorf("IKE SAs %+v, want one", r.IKESAs)
		}
		b.stop(t)
		b = newNode(t, n, addrB, addrA, "k", ruleTo("k", func(r *pad.Rule) { r.Reauth = 5 * time.Minute }, addrA))
		a.Down(t.Context(), "gate")
		if err := a.Up(t.Context(), "gate"); err != nil {
			t.Fatal(err)
		}
		wantPair(t, a, b, 1)
		for _, l := range a.snapshot() { // as if it did not know RFC 4478
			l.post(func(l *lineage, _ time.Time) []sa.Output { l.reauthAt = time.Time{}; return nil })
		}
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 0)
		a.stop(t)
		b.stop(t)
	})
}
