package ike

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"github.com/missiu/missiu/proto/ikev2"
	"github.com/missiu/missiu/proto/isakmp"
)

// ACQUIRE on A -> IKE_SA_INIT, IKE_AUTH -> child SAs on both; TERM on A ->
// DELETE -> none on either.
func TestNegotiateAndStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(5, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		if e, failed := a.m.failure(5); failed {
			t.Errorf("ACQUIRE failed: %v", e)
		}
		for _, p := range a.m.list() {
			if p.EncrKey.Len() != 32 || p.Auth.String() != "hmac-sha1" || p.ReqID != 7 || p.Mode != ipsec.Transport || p.ReplayWindow == 0 {
				t.Errorf("SA: got %+v, want AES-CBC-256 with SHA-1 for request 7", p)
			}
		}
		if took := a.stop(t); took > time.Second {
			t.Errorf("stopping with a live peer took %v", took)
		}
		synctest.Wait()
		wantPair(t, a, b, 0)
		if took := b.stop(t); took > time.Second {
			t.Errorf("stopping after the peer's end took %v", took)
		}
	})
}

func TestStopWithSilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t)
		a.acquire(5, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		n.setDrop(func(packet) bool { return true })
		if took := a.stop(t); took > 3*time.Second {
			t.Errorf("stopping took %v, want at most 3s", took)
		}
		if l := a.m.list(); len(l) != 0 {
			t.Errorf("SAs left: %v", ids(l))
		}
		b.stop(t)
	})
}

// What a peer may use is in place before the message that lets it (walk IKE).
func TestInstalledBeforeSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var trace []string
		note := func(s string) {
			mu.Lock()
			defer mu.Unlock()
			trace = append(trace, s)
		}
		n := &network{}
		n.drop = func(p packet) bool {
			if p.from.Addr() == addrB {
				note("send " + ikev2.ExchangeType(p.data[18]).String())
			}
			return false
		}
		a := newNode(t, n, addrA, addrB, "k")
		b := newNode(t, n, addrB, addrA, "k")
		b.m.mu.Lock()
		b.m.trace = note
		b.m.mu.Unlock()
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		mu.Lock()
		got := strings.Join(trace, ", ")
		mu.Unlock()
		if want := "send IKE_SA_INIT, send IKE_INTERMEDIATE, getspi, update, add, send IKE_AUTH"; got != want {
			t.Errorf("got %s; want %s", got, want)
		}
		a.stop(t)
		b.stop(t)
	})
}

func TestWrongKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "one key")
		b := newNode(t, n, addrB, addrA, "another key")
		a.acquire(9, addrA, addrB)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if e, ok := a.m.failure(9); !ok || e != syscall.ECONNREFUSED {
			t.Errorf("ACQUIRE: got %v, %v; want %v", e, ok, syscall.ECONNREFUSED)
			a.dump(t)
			b.dump(t)
		}
		wantPair(t, a, b, 0)
		for _, x := range []*node{a, b} {
			for _, e := range x.logs.All() {
				if s := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(s, "key") && strings.Contains(s, "one key") {
					t.Errorf("secret in the log: %s", s)
				}
			}
			x.stop(t)
		}
	})
}

func TestNoProposalInCommon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k", func(_ *Config, m *missiu) {
			for i := range m.policies {
				m.policies[i].Proposals[0].EncrMaxBits = 128
			}
		})
		b := newNode(t, n, addrB, addrA, "k", func(_ *Config, m *missiu) {
			for i := range m.policies {
				m.policies[i].Proposals[0].EncrMinBits = 256
			}
		})
		a.acquire(9, addrA, addrB)
		time.Sleep(time.Second)
		synctest.Wait()
		if e, ok := a.m.failure(9); !ok || e != syscall.ECONNREFUSED {
			t.Errorf("ACQUIRE: got %v, %v; want %v", e, ok, syscall.ECONNREFUSED)
		}
		found := false
		for _, e := range b.logs.All() {
			s := fmt.Sprint(e.Message, e.ContextMap())
			found = found || strings.Contains(s, "AES_CBC-128") && strings.Contains(s, "AES_CBC-256")
		}
		if !found {
			t.Error("both offers: not in the responder's log")
			b.dump(t)
		}
		a.stop(t)
		b.stop(t)
	})
}

func TestAcquireRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		only := pad.NewRule("only")
		only.Remote, only.PSK = []pad.Range{pad.One(netip.MustParseAddr("203.0.113.1"))}, keys("k")
		db, err := pad.NewDB([]*pad.Rule{only})
		if err != nil {
			t.Fatal(err)
		}
		a := newNode(t, n, addrA, addrB, "k", func(c *Config, _ *missiu) { c.Rules = db })
		a.acquire(1, addrA, addrB)
		a.acquire(2, netip.MustParseAddr("192.0.2.9"), addrB)
		a.m.event(keysock.Acquire{Seq: 3, Proto: ipsec.IPComp, Src: addrA, Dst: addrB, PolicyID: 1})
		a.m.event(keysock.Acquire{Seq: 4, Proto: ipsec.ESP, Src: addrA, Dst: addrB, PolicyID: 99})
		time.Sleep(time.Second) // the SPD is read once more for that
		synctest.Wait()
		for seq, want := range map[uint32]syscall.Errno{1: syscall.EACCES, 2: syscall.EADDRNOTAVAIL, 3: syscall.EPROTONOSUPPORT, 4: syscall.ENOENT} {
			if got, ok := a.m.failure(seq); !ok || got != want {
				t.Errorf("ACQUIRE %d: got %v, %v; want %v", seq, got, ok, want)
			}
		}
		a.stop(t)
	})
}

func TestSilentPeerTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		a := newNode(t, n, addrA, addrB, "k")
		a.acquire(1, addrA, addrB)
		a.acquire(2, addrA, addrB) // the same SA again: one negotiation, both answered
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		for seq := range uint32(2) {
			if got, ok := a.m.failure(seq + 1); !ok || got != syscall.ETIMEDOUT {
				t.Errorf("ACQUIRE %d: got %v, %v; want %v", seq+1, got, ok, syscall.ETIMEDOUT)
			}
		}
		ps := n.packets()
		if len(ps) != 9 {
			t.Errorf("got %d transmissions, want 9", len(ps))
		}
		for _, p := range ps[1:] {
			if !slices.Equal(p.data, ps[0].data) {
				t.Error("sent again, but other octets")
			}
		}
		a.stop(t)
	})
}

// A lost datagram of any place is made good by retransmission.
func TestLoss(t *testing.T) {
	for lost := range 4 {
		synctest.Test(t, func(t *testing.T) {
			n, a, b := pair(t)
			i := 0
			n.setDrop(func(packet) bool { i++; return i == lost+1 })
			a.acquire(1, addrA, addrB)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			wantPair(t, a, b, 1)
			a.stop(t)
			b.stop(t)
		})
	}
}

func TestCookie(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t, func(c *Config, _ *missiu) { c.Limits.AlwaysCookie = true })
		a.acquire(1, addrA, addrB)
		time.Sleep(time.Second) // a cookie waits for a better answer
		synctest.Wait()
		wantPair(t, a, b, 1)
		if got := len(n.packets()); got != 8 {
			t.Errorf("got %d datagrams, want 8: one round more", got)
		}
		a.stop(t)
		b.stop(t)
	})
}

// A flood of IKE_SA_INIT from forged addresses costs a bounded number of
// half-open IKE SAs, and an honest peer still gets through.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t, func(c *Config, _ *missiu) { c.Limits.CookieThreshold, c.Limits.HalfOpenPerSource = 4, 2 })
		n.setDrop(func(p packet) bool { return p.to.Addr() != addrA && p.to.Addr() != addrB })
		probe := initRequest(t, a, addrB, n)
		flood := func(count int) {
			for i := range count {
				m := slices.Clone(probe)
				m[0], m[1], m[2] = 0xee, byte(i>>8), byte(i)
				from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 500)
				n.send(packet{from, netip.AddrPortFrom(addrB, 500), m})
				synctest.Wait()
			}
		}
		flood(300)
		if got := b.budget.halfOpen(); got != 4 {
			t.Errorf("half open: got %d, want the threshold, 4", got)
		}
		a.acquire(2, addrA, addrB)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if e, failed := a.m.failure(2); failed {
			t.Errorf("honest peer: %v", e)
		}
		if l := a.m.list(); len(l) != 2 {
			t.Errorf("honest peer: got SAs %v, want a pair", ids(l))
			b.dump(t)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := b.budget.halfOpen(); got != 0 {
			t.Errorf("half open after their time: got %d, want 0", got)
		}
		// One source alone.
		for i := range 10 {
			m := slices.Clone(probe)
			m[0], m[1] = 0xdd, byte(i)
			n.send(packet{netip.MustParseAddrPort("203.0.113.5:500"), netip.AddrPortFrom(addrB, 500), m})
			synctest.Wait()
		}
		if got := b.budget.halfOpen(); got != 2 {
			t.Errorf("half open of one source: got %d, want 2", got)
		}
		// In the name of a peer, which is not shut out by that.
		time.Sleep(2 * time.Minute)
		for _, l := range a.snapshot() {
			l.post((*lineage).delete)
		}
		synctest.Wait()
		time.Sleep(time.Minute)
		for i := range 10 {
			m := slices.Clone(probe)
			m[0], m[1] = 0xcc, byte(i)
			n.send(packet{netip.AddrPortFrom(addrA, 500), netip.AddrPortFrom(addrB, 500), m})
			synctest.Wait()
		}
		a.acquire(3, addrA, addrB)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if l := a.m.list(); len(l) != 2 {
			t.Errorf("peer in whose name others sent: got SAs %v, want a pair", ids(l))
			b.dump(t)
		}
		a.stop(t)
		b.stop(t)
	})
}

// initRequest takes a good IKE_SA_INIT request off the network.
func initRequest(t *testing.T, a *node, to netip.Addr, n *network) []byte {
	t.Helper()
	n.mu.Lock()
	old := n.drop
	n.drop = func(packet) bool { return true }
	start := len(n.seen)
	n.mu.Unlock()
	a.acquire(1, addrA, to)
	synctest.Wait()
	ps := n.packets()[start:]
	if len(ps) == 0 {
		a.dump(t)
		t.Fatal("no IKE_SA_INIT request")
	}
	time.Sleep(5 * time.Minute) // it gives up
	synctest.Wait()
	n.setDrop(old)
	return ps[0].data
}

// Nothing that is not authenticated disturbs an IKE SA.
func TestMalformed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		real := n.packets()
		r := rand.New(rand.NewPCG(1, 2))
		for _, p := range real {
			for range 200 {
				m := slices.Clone(p.data)
				switch r.IntN(4) {
				case 0:
					m = m[:r.IntN(len(m))]
				case 1:
					m[r.IntN(len(m))] ^= byte(1 + r.IntN(255))
				case 2:
					m = append(m[:isakmp.HeaderLen], noise(r, r.IntN(200))...)
					if err := isakmp.Finish(m); err != nil {
						t.Fatal(err)
					}
				case 3:
					m = noise(r, r.IntN(300))
				}
				n.send(packet{p.from, p.to, m})
				n.send(packet{netip.MustParseAddrPort("203.0.113.7:4444"), p.to, m})
				synctest.Wait()
			}
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
		// It still works: liveness, and an orderly end.
		a.stop(t)
		synctest.Wait()
		if l := b.m.list(); len(l) != 0 {
			t.Errorf("after the peer's end: %v", ids(l))
			b.dump(t)
		}
		b.stop(t)
	})
}

func TestUnknownSPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t)
		body := 64
		send := func(h ikev2.Header, major byte) int {
			m := &ikev2.Message{Header: h, Payloads: []ikev2.Payload{&ikev2.Encrypted{Body: make([]byte, body)}}}
			if body == 0 {
				m.Payloads = nil
			}
			buf, err := m.Append(nil)
			if err != nil {
				t.Fatal(err)
			}
			buf[17] = major << 4
			before := len(n.packets())
			n.send(packet{netip.MustParseAddrPort("203.0.113.7:500"), netip.AddrPortFrom(addrB, 500), buf})
			synctest.Wait()
			return len(n.packets()) - before - 1
		}
		req := ikev2.Header{InitiatorSPI: 1, ResponderSPI: 2, Exchange: ikev2.INFORMATIONAL, Flags: ikev2.FlagInitiator, MessageID: 3}
		if got := send(req, 2); got != 1 {
			t.Errorf("request: got %d answers, want 1", got)
		}
		ps := n.packets()
		m, err := ikev2.Parse(ps[len(ps)-1].data)
		if err != nil {
			t.Fatal(err)
		}
		want := req
		want.Flags = ikev2.FlagResponse
		if m.Header != want || ikev2.FindNotify(m.Payloads, ikev2.INVALID_IKE_SPI) == nil {
			t.Errorf("got %+v, want %+v with INVALID_IKE_SPI", m, want)
		}
		if got := len(ps[len(ps)-1].data); got > len(ps[len(ps)-2].data) {
			t.Errorf("answer of %d octets to a request of %d", got, len(ps[len(ps)-2].data))
		}
		req.Flags, req.Minor = 0xff&^ikev2.FlagResponse, 5
		if got := send(req, 2); got != 1 {
			t.Errorf("reserved flags, minor version 5: got %d answers, want 1", got)
		}
		ps = n.packets()
		if m, err = ikev2.Parse(ps[len(ps)-1].data); err != nil || m.Header != want {
			t.Errorf("got %+v, %v; want the same again, %+v", m, err, want)
		}
		req.Flags, req.Minor = ikev2.FlagInitiator, 0
		body = 0
		if got := send(req, 2) + send(req, 3); got != 2 {
			t.Errorf("header alone: got %d answers, want 2", got)
		}
		if ps = n.packets(); len(ps[len(ps)-1].data) > len(ps[len(ps)-2].data)+8 {
			t.Errorf("answer of %d octets to a request of %d", len(ps[len(ps)-1].data), len(ps[len(ps)-2].data))
		}
		body = 64
		resp := req
		resp.Flags = ikev2.FlagResponse
		if got := send(resp, 2); got != 0 {
			t.Errorf("response: got %d answers, want none", got)
		}
		if got := send(req, 1); got != 0 {
			t.Errorf("IKEv1: got %d answers, want none", got)
		}
		if got := send(req, 3); got != 1 {
			t.Errorf("version 3: got %d answers, want 1", got)
		}
		sum := 0
		for range 200 {
			sum += send(req, 2)
		}
		if sum > int(bucketDepth) {
			t.Errorf("got %d answers at once, want a limit of %v", sum, bucketDepth)
		}
		a.stop(t)
		b.stop(t)
	})
}

// RFC 7296, 2.1: what tells an IKE_SA_INIT request from another is all of it. One with
// the SPI and the address of an honest initiator does not have the honest one taken
// for a repetition; a repetition gets the same answer, and, once the IKE SA stands,
// none.
func TestSameInitiatorSPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t)
		honest, forged := false, []byte(nil)
		n.setDrop(func(p packet) bool {
			if p.from.Addr() == addrA && forged == nil {
				forged = slices.Clone(p.data)
			}
			return !honest
		})
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		first := slices.Clone(forged)
		m, err := ikev2.Parse(forged)
		if err != nil {
			t.Fatal(err)
		}
		ikev2.Find[*ikev2.Nonce](m.Payloads).Data[0] ^= 1
		if forged, err = m.Append(nil); err != nil {
			t.Fatal(err)
		}
		to := netip.AddrPortFrom(addrB, 500)
		put := func(data []byte) (answers [][]byte) {
			before := len(n.packets())
			b.demux(sa.Datagram{Local: to, Remote: netip.AddrPortFrom(addrA, 500), Data: slices.Clone(data)})
			synctest.Wait()
			for _, p := range n.packets()[before:] {
				answers = append(answers, p.data)
			}
			return answers
		}
		one := put(forged)
		if again := put(forged); len(one) != 1 || len(again) != 1 || !slices.Equal(one[0], again[0]) || b.budget.halfOpen() != 1 {
			t.Errorf("%d answers, then %d, %d half open; want the same one twice", len(one), len(again), b.budget.halfOpen())
		}
		honest = true
		time.Sleep(2 * time.Second) // a sends it again
		synctest.Wait()
		wantPair(t, a, b, 1)
		time.Sleep(time.Minute) // what was forged is forgotten
		if got := put(first); len(got) != 0 || b.budget.halfOpen() != 0 {
			t.Errorf("of an IKE SA that stands: %d answers, %d half open", len(got), b.budget.halfOpen())
		}
		a.stop(t)
		b.stop(t)
		if len(b.byInit) != 0 {
			t.Errorf("%d IKE_SA_INIT requests are remembered", len(b.byInit))
		}
	})
}

func TestMissiuLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.m.setDown(true)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if l := b.m.list(); len(l) != 0 {
			t.Errorf("peer still has %v", ids(l))
		}
		a.m.setDown(false)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		a.acquire(2, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
}

func TestNoMissiu(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		a := newNode(t, &network{}, addrA, addrB, "k", func(_ *Config, m *missiu) { m.down = true })
		if err := <-a.result; !errors.Is(err, ErrNoMissiu) {
			t.Errorf("got %v, want %v", err, ErrNoMissiu)
		}
		if took := time.Since(start); took != 10*time.Second {
			t.Errorf("took %v, want 10s", took)
		}
		b := newNode(t, &network{}, addrB, addrA, "k", func(_ *Config, m *missiu) { m.down = true })
		if took := b.stop(t); took > time.Second {
			t.Errorf("stopped while waiting: took %v", took)
		}
	})
}

// Policies and lifetimes: EXPIRE rekeys, a vanished SA is told to the peer.
func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		old := a.m.list()
		a.m.event(keysock.Expire{SAID: old[0].SAID, Src: old[0].Src})
		time.Sleep(time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 1)
		rekeyed := a.m.list()
		if rekeyed[0].SPI == old[0].SPI || rekeyed[1].SPI == old[1].SPI {
			t.Errorf("soft expiry: got %v, want SAs other than %v", ids(rekeyed), ids(old))
		}
		// Deleted by hand on B.
		b.m.mu.Lock()
		delete(b.m.sas, rekeyed[0].SAID)
		b.m.mu.Unlock()
		b.m.event(keysock.SADeleted{SAID: rekeyed[0].SAID, Src: rekeyed[0].Src})
		time.Sleep(time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 0)
		// The IKE SA lives on and gives new ones.
		a.acquire(2, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		// Flushed on A.
		a.m.mu.Lock()
		clear(a.m.sas)
		a.m.mu.Unlock()
		a.m.event(keysock.SAsFlushed{})
		time.Sleep(time.Minute)
		synctest.Wait()
		wantPair(t, a, b, 0)
		a.stop(t)
		b.stop(t)
	})
}

func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		a.Reload(t.Context(), ruleFor("correct horse battery"), Limits{})
		time.Sleep(time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.Reload(t.Context(), ruleFor("another key"), Limits{})
		time.Sleep(time.Second)
		synctest.Wait()
		wantPair(t, a, b, 0)
		a.stop(t)
		b.stop(t)
	})
}

// -c PEER waits for policy, then negotiates; start_action start comes again.
func TestStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		b := newNode(t, n, addrB, addrA, "k")
		a := newNode(t, n, addrA, addrB, "k", func(c *Config, m *missiu) {
			m.policies = nil
			c.Connect = []netip.Addr{addrB}
		})
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := len(n.packets()); got != 0 {
			t.Errorf("got %d datagrams without policy", got)
		}
		for _, p := range policies(addrA, addrB) {
			a.m.event(keysock.PolicyAdded{Policy: p})
		}
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.stop(t)
		synctest.Wait()

		r := pad.NewRule("keep")
		r.Remote, r.PSK, r.StartAction = []pad.Range{pad.One(addrB)}, keys("k"), pad.StartNow
		db, err := pad.NewDB([]*pad.Rule{r})
		if err != nil {
			t.Fatal(err)
		}
		a = newNode(t, n, addrA, addrB, "k", func(c *Config, _ *missiu) { c.Rules = db })
		synctest.Wait()
		wantPair(t, a, b, 1)
		b.stop(t)
		b = newNode(t, n, addrB, addrA, "k")
		time.Sleep(3 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.stop(t)
		b.stop(t)
	})
}

func TestLogLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		var got []string
		for _, e := range a.logs.All() {
			if strings.HasPrefix(e.Message, "sent ") || strings.HasPrefix(e.Message, "received ") {
				got = append(got, e.Message)
				for _, k := range []string{"msgid", "spi_i", "spi_r", "peer", "bytes", "rule"} {
					if _, ok := e.ContextMap()[k]; !ok {
						t.Errorf("%s: no %s", e.Message, k)
					}
				}
			}
		}
		want := []string{"sent IKE_SA_INIT request", "received IKE_SA_INIT response",
			"sent IKE_INTERMEDIATE request", "received IKE_INTERMEDIATE response", "sent IKE_AUTH request", "received IKE_AUTH response"}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		a.LogStatus()
		synctest.Wait()
		if a.logs.FilterMessage("child SA").Len() != 1 || a.logs.FilterMessage("IKE SA").Len() != 1 {
			t.Error("status lines missing")
			a.dump(t)
		}
		a.stop(t)
		b.stop(t)
	})
}

// nat_traversal force: IKE moves to UDP port 4500, ESP goes in UDP; and the
// port may be lost and come back.
func TestNATTraversal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		force := func(c *Config, _ *missiu) {
			r := pad.NewRule("force")
			r.Remote, r.PSK, r.NATT = pad.Any(), keys("k"), pad.NATTForce
			db, err := pad.NewDB([]*pad.Rule{r})
			if err != nil {
				t.Fatal(err)
			}
			c.Rules = db
			local := netip.AddrPortFrom(c.Local[0], 4500)
			c.DialNATT = func(context.Context) (Conn, error) { return n.listen(local) }
		}
		a := newNode(t, n, addrA, addrB, "k", force)
		b := newNode(t, n, addrB, addrA, "k", force)
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		for _, p := range a.m.list() {
			if p.Encap == nil || p.Encap.SPort != 4500 || p.Encap.DPort != 4500 {
				t.Errorf("SA %v: encapsulation %+v, want ports 4500", p.SAID, p.Encap)
			}
		}
		for _, p := range n.packets()[2:] {
			if p.from.Port() != 4500 || p.to.Port() != 4500 {
				t.Errorf("IKE_AUTH from %v to %v, want ports 4500", p.from, p.to)
			}
		}
		// Each believes to be behind a NAT, and keeps its mapping (RFC 3948, 4).
		time.Sleep(time.Minute)
		synctest.Wait()
		kept := map[netip.AddrPort]int{}
		for _, p := range n.packets() {
			if string(p.data) == "\xff" {
				kept[p.from]++
			}
		}
		for _, at := range []netip.Addr{addrA, addrB} {
			if k := kept[netip.AddrPortFrom(at, 4500)]; k < 2 {
				t.Errorf("%d keepalives of %v in a minute", k, at)
			}
		}
		n.mu.Lock()
		lost := n.conns[netip.AddrPortFrom(addrB, 4500)]
		n.mu.Unlock()
		lost.Close()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		a.stop(t)
		synctest.Wait()
		wantPair(t, a, b, 0)
		b.stop(t)
	})
}
