package sa

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// behind puts a NAT in front of a (10.0.0.1, seen as 203.0.113.1 with other
// ports) and of b (10.0.0.2, reached as 203.0.113.2).
func (l *lab) behind(a, b bool) {
	l.nat = &nat{}
	if a {
		l.a.cfg.Local = ap("10.0.0.1:500")
		l.nat.add(ap("10.0.0.1:500"), ap("203.0.113.1:10500"))
		l.nat.add(ap("10.0.0.1:4500"), ap("203.0.113.1:14500"))
	}
	if b {
		l.a.cfg.Remote = ap("203.0.113.2:500")
		l.nat.add(ap("10.0.0.2:500"), ap("203.0.113.2:500"))
		l.nat.add(ap("10.0.0.2:4500"), ap("203.0.113.2:4500"))
	}
}

func TestNAT(t *testing.T) {
	for _, c := range []struct {
		name           string
		a, b           bool
		inAtB, outAtA  ipsec.Encap // ports only
		keepA, keepB   bool
		srcAtB, dstAtA string
	}{
		{"in front of a", true, false, ipsec.Encap{SPort: 14500, DPort: 4500}, ipsec.Encap{SPort: 4500, DPort: 4500}, true, false, "203.0.113.1", "192.0.2.2"},
		{"in front of b", false, true, ipsec.Encap{SPort: 4500, DPort: 4500}, ipsec.Encap{SPort: 4500, DPort: 4500}, false, true, "192.0.2.1", "203.0.113.2"},
		{"in front of both", true, true, ipsec.Encap{SPort: 14500, DPort: 4500}, ipsec.Encap{SPort: 4500, DPort: 4500}, true, true, "203.0.113.1", "203.0.113.2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			withFaults(t, func(t *testing.T, l *lab) {
				l.behind(c.a, c.b)
				l.establish()
				for _, n := range []*node{l.a, l.b} {
					if n.sa.local.Port() != 4500 {
						t.Errorf("%s: local port %d, want 4500", n.name, n.sa.local.Port())
					}
				}
				in, out := told[InstallChild](l.b)[0].In, told[InstallChild](l.a)[0].Out
				if in.Encap == nil || in.Encap.SPort != c.inAtB.SPort || in.Encap.DPort != c.inAtB.DPort || in.Src != netip.MustParseAddr(c.srcAtB) {
					t.Errorf("b: inbound from %v, %+v; want %s, %+v", in.Src, in.Encap, c.srcAtB, c.inAtB)
				}
				if out.Encap == nil || out.Encap.SPort != c.outAtA.SPort || out.Encap.DPort != c.outAtA.DPort || out.Dst != netip.MustParseAddr(c.dstAtA) {
					t.Errorf("a: outbound to %v, %+v; want %s, %+v", out.Dst, out.Encap, c.dstAtA, c.outAtA)
				}
				l.clearEvents()
				l.step(l.now.Add(25 * time.Second))
				if a, b := len(told[Keepalive](l.a)) > 0, len(told[Keepalive](l.b)) > 0; a != c.keepA || b != c.keepB {
					t.Errorf("keepalives: a %v, b %v; want %v, %v", a, b, c.keepA, c.keepB)
				}
			})
		})
	}
}

func TestNATTraversalSettings(t *testing.T) {
	l := newLab(t)
	l.a.rule.NATT = pad.NATTForce
	l.establish()
	l.want(1)
	if e := told[InstallChild](l.b)[0].In.Encap; e == nil || e.SPort != 4500 || e.DPort != 4500 {
		t.Errorf("forced: %+v, want ports 4500", e)
	}
	l = newLab(t)
	l.a.rule.NATT = pad.NATTNo
	l.behind(true, false)
	l.establish()
	if e := told[InstallChild](l.b)[0].In.Encap; e != nil || l.a.sa.local.Port() != 500 {
		t.Errorf("no: %+v, port %d; want none, 500", e, l.a.sa.local.Port())
	}
}

// The NAT in front of a forgets a and gives it another port: b follows what is
// authentic, and only that.
func TestPeerMoves(t *testing.T) {
	l := newLab(t)
	l.behind(true, false)
	l.establish()
	l.nat = &nat{}
	l.nat.add(ap("10.0.0.1:4500"), ap("203.0.113.1:20000"))
	forged := append([]byte(nil), l.all[len(l.all)-2].data...)
	forged[len(forged)-1] ^= 1
	forged[23]++ // the next message ID
	l.b.do(l.b.sa.Receive(l.now, Datagram{l.b.sa.local, ap("198.51.100.1:1"), forged}))
	if l.b.sa.remote != ap("203.0.113.1:14500") || l.b.sa.counters.Integrity != 1 {
		t.Fatalf("b: follows a forged message to %v", l.b.sa.remote)
	}
	l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
	l.settle()
	if m := told[PeerMoved](l.b); len(m) != 1 || m[0].New != ap("203.0.113.1:20000") {
		t.Errorf("b: PeerMoved %v, want to port 20000", m)
	}
	l.b.do(l.b.sa.Rekey(l.now))
	l.settle()
	l.step(l.now.Add(linger + 1))
	if l.a.sa.cur.local != l.b.sa.cur.remote {
		t.Errorf("b does not reach a any more")
	}
}

// ESP tells where the peer is as well as IKE does; not to whoever is behind a
// NAT itself.
func TestPeerAt(t *testing.T) {
	for _, behind := range []bool{false, true} {
		l := newLab(t)
		l.behind(true, behind)
		l.establish()
		l.clearEvents()
		at := netip.AddrPortFrom(l.b.sa.remote.Addr(), 20000)
		l.b.do(l.b.sa.PeerAt(l.now, at))
		l.b.do(l.b.sa.PeerAt(l.now, at))
		m := told[PeerMoved](l.b)
		if want := !behind; want != (len(m) == 1 && m[0].New == at && l.b.sa.remote == at) {
			t.Errorf("behind a NAT %v: PeerMoved %v, peer at %v", behind, m, l.b.sa.remote)
		}
	}
}

// Transport mode through NATs: each side installs what it sees, the wire keeps
// the addresses that the initiator knows (RFC 7296, 2.23.1).
func TestNATTransport(t *testing.T) {
	for _, c := range []struct{ a, b bool }{{true, false}, {false, true}, {true, true}} {
		l := newLab(t)
		l.behind(c.a, c.b)
		any := netip.MustParsePrefix("0.0.0.0/0")
		sel := ipsec.Selector{Src: any, Dst: any, Proto: 17}
		l.b.policies = []Policy{policy(sel, ipsec.Transport, 2)}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, ChildRequest{Policy: policy(sel, ipsec.Transport, 1)}))
		l.settle()
		a, b := told[InstallChild](l.a), told[InstallChild](l.b)
		if len(a) != 1 || len(b) != 1 {
			t.Fatalf("%+v: no child SA", c)
		}
		for _, x := range []*ipsec.SAParams{a[0].In, a[0].Out, b[0].In, b[0].Out} {
			if x.Mode != ipsec.Transport || len(x.SrcTS) != 1 || x.SrcTS[0].Start != x.Src || x.DstTS[0].Start != x.Dst {
				t.Errorf("%+v: %v mode, %v to %v, selectors %v to %v", c, x.Mode, x.Src, x.Dst, x.SrcTS, x.DstTS)
			}
		}
		if oa := b[0].In.Encap.OA; c.a && oa != netip.MustParseAddr("10.0.0.1") {
			t.Errorf("%+v: original address %v, want 10.0.0.1", c, oa)
		}
		l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
		l.settle()
		if len(l.a.sa.children) != 1 || len(l.b.sa.children) != 1 || len(told[Rekeyed](l.a)) != 1 {
			t.Errorf("%+v: rekeying by b: a %s, b %s", c, l.a.describe(), l.b.describe())
		}
	}
}

// TestPeerMovesFar: behind another address of its NAT the SAs of a peer that the
// policy leaves open go with it as they are; those whose policy names the address
// are replaced.
func TestPeerMovesFar(t *testing.T) {
	for _, open := range []bool{true, false} {
		l := newLab(t)
		l.behind(true, false)
		p := tunnel("10.2.0.0/16", "10.1.0.0/16", 22)
		dst := ap("203.0.113.1:1").Addr()
		if open {
			dst = netip.IPv4Unspecified()
		}
		p.Out.Requests = []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 22, Src: l.b.cfg.Local.Addr(), Dst: dst}}
		l.b.policies = []Policy{p}
		l.establish()
		c := *l.b.sa.children[0]
		l.clearEvents()
		to := ap("203.0.113.9:20000")
		l.nat = &nat{}
		l.nat.add(ap("10.0.0.1:4500"), to)
		l.b.do(l.b.sa.PeerAt(l.now, to))
		m := told[PeerMoved](l.b)
		if len(m) != 1 || m[0].New != to {
			t.Fatalf("open %v: %+v", open, m)
		}
		want := []ipsec.SAID{{Proto: ipsec.ESP, Dst: c.inDst, SPI: c.in}, {Proto: ipsec.ESP, Dst: c.outDst, SPI: c.outSPI}}
		if !open {
			want = nil
		}
		if !slices.Equal(m[0].Moved, want) {
			t.Errorf("open %v: moved %v, want %v", open, m[0].Moved, want)
		}
		l.run()
		if same := l.b.sa.children[0].in == c.in; same != open || len(l.b.sa.children) == 0 {
			t.Errorf("open %v: child SA in place %v", open, same)
		}
		if got := l.b.sa.children[0].outDst; got != to.Addr() {
			t.Errorf("open %v: child SA towards %v, want %v", open, got, to)
		}
		if open { // rekeyed and removed at the new place
			l.b.do(l.b.sa.ChildExpired(l.now, ipsec.SAID{Proto: ipsec.ESP, Dst: to.Addr(), SPI: c.outSPI}, false))
			l.run()
			gone := told[RemoveChild](l.b)
			if len(gone) == 0 || gone[0].Out != (ipsec.SAID{Proto: ipsec.ESP, Dst: to.Addr(), SPI: c.outSPI}) {
				t.Errorf("removed %+v, want %v at %v", gone, c.outSPI, to)
			}
		}
	}
}
