package sa

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Addresses of a and b: on one link, and a second one each.
var (
	a1, a2 = addrA.Addr(), netip.MustParseAddr("198.51.100.1")
	b1, b2 = addrB.Addr(), netip.MustParseAddr("198.51.100.2")
)

func at(a, b netip.Addr) path {
	return path{netip.AddrPortFrom(a, 4500), netip.AddrPortFrom(b, 4500)}
}

// mobikeLab: both can move, and have two addresses each.
func mobikeLab(l *lab) {
	for _, n := range []*node{l.a, l.b} {
		n.rule.MOBIKE = true
	}
	l.a.cfg.Addrs, l.b.cfg.Addrs = []netip.Addr{a1, a2}, []netip.Addr{b1, b2}
	req := []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 22, Src: b1, Dst: a1}}
	l.b.policies[0].Out.Requests = req
}

// lost has packets of or to these addresses vanish.
func (l *lab) lost(gone ...netip.Addr) {
	l.stop = func(p packet) bool {
		return slices.Contains(gone, p.src.Addr()) || slices.Contains(gone, p.dst.Addr())
	}
}

func (n *node) spisOf() (l []ipsec.SPI) {
	for id := range n.sads {
		l = append(l, id.SPI)
	}
	slices.Sort(l)
	return l
}

// wantAt checks that IKE and every SA of both sides are between a and b, the SAs
// being known by where it began.
func (l *lab) wantAt(a, b netip.Addr) {
	l.t.Helper()
	if got, want := l.a.sa.path(), at(a, b); got != want {
		l.t.Errorf("a: IKE %v, want %v", got, want)
	}
	if got, want := l.b.sa.path(), at(b, a); got != want {
		l.t.Errorf("b: IKE %v, want %v", got, want)
	}
	for _, n := range []*node{l.a, l.b} {
		for id, p := range n.sads {
			if p.Src == a && id.Dst == b || p.Src == b && id.Dst == a {
				ends := ipsec.Ends{Src: a1, Dst: b1}
				if p.Src == b {
					ends = ipsec.Ends{Src: b1, Dst: a1}
				}
				if p.Ends() != ends {
					l.t.Errorf("%s: SA %v known by %v, want %v", n.name, id, p.Ends(), ends)
				}
				continue
			}
			l.t.Errorf("%s: SA %v from %v, want between %v and %v", n.name, id, p.Src, a, b)
		}
	}
}

// The initiator's address is gone: everything goes on from the other one, with
// loss, duplication and delay of each message.
func TestMOBIKEAddressGone(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		mobikeLab(l)
		l.establish()
		l.want(1)
		l.wantAt(a1, b1)
		was := l.a.spisOf()
		if told[InstallChild](l.a)[0].In.Encap != nil {
			t.Error("ESP in UDP without a NAT")
		}
		l.lost(a1)
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
		l.settle()
		l.want(1)
		l.wantAt(a2, b1)
		if got := l.b.spisOf(); !slices.Equal(got, was) || !slices.Equal(l.a.spisOf(), was) {
			t.Errorf("SPIs %v and %v, were %v", l.a.spisOf(), got, was)
		}
		if got := l.b.sa.mob.theirs; len(got) != 0 {
			t.Errorf("b: a also at %v", got)
		}
		// What is made from now on is there too, for the policy of before.
		l.b.do(l.b.sa.ChildExpired(l.now, inSPI(t, l.b), false))
		l.settle()
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.settle()
		l.want(2)
		l.wantAt(a2, b1)
		if q := l.b.queries[len(l.b.queries)-1].Peer; q.Local.Addr() != b1 || q.Remote.Addr() != a1 {
			t.Errorf("b asks for policies between %v and %v", q.Local, q.Remote)
		}
		// And back home.
		l.stop = nil
		l.lost(a2)
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a1}))
		l.settle()
		l.want(2)
		l.wantAt(a1, b1)
		for _, p := range l.a.sads {
			if p.Home != nil {
				t.Errorf("at home, and known by %v", p.Home)
			}
		}
	})
}

// The path is dead, and nobody tells: the liveness check finds another one.
func TestMOBIKEPathDies(t *testing.T) {
	for _, gone := range [][]netip.Addr{{a1}, {b1}, {a1, b1}} {
		t.Run(fmt.Sprint(gone), func(t *testing.T) {
			l := newLab(t)
			mobikeLab(l)
			l.establish()
			was := l.a.spisOf()
			l.lost(gone...)
			dead := l.now
			l.step(dead.Add(l.a.rule.DPD + 10*time.Second))
			l.settle()
			l.want(1)
			want := []netip.Addr{a1, b1}
			for _, g := range gone {
				if g == a1 {
					want[0] = a2
				} else {
					want[1] = b2
				}
			}
			l.wantAt(want[0], want[1])
			if !slices.Equal(l.b.spisOf(), was) {
				t.Errorf("SPIs %v, were %v", l.b.spisOf(), was)
			}
		})
	}
}

// The responder's address is gone: it tells from the other one, and the initiator
// moves.
func TestMOBIKEResponderAddressGone(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		mobikeLab(l)
		l.establish()
		l.lost(b1)
		l.b.do(l.b.sa.SetAddresses(l.now, []netip.Addr{b2}))
		l.settle()
		l.step(l.now.Add(5 * time.Second))
		l.settle()
		l.want(1)
		l.wantAt(a1, b2)
	})
}

// What additional addresses there are is told in IKE_AUTH and whenever it changes.
func TestMOBIKEAdditional(t *testing.T) {
	v6 := netip.MustParseAddr("2001:db8::1")
	withFaults(t, func(t *testing.T, l *lab) {
		mobikeLab(l)
		l.a.cfg.Addrs = []netip.Addr{a1, a2, v6}
		l.establish()
		wantThem := func(n *node, want ...netip.Addr) {
			t.Helper()
			if st := n.sa.Status(); !st.MOBIKE || !slices.Equal(st.PeerAddrs, want) {
				t.Errorf("%s: MOBIKE %v, peer also at %v, want %v", n.name, st.MOBIKE, st.PeerAddrs, want)
			}
		}
		wantThem(l.b, a2, v6)
		wantThem(l.a, b2)
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a1}))
		l.b.do(l.b.sa.SetAddresses(l.now, []netip.Addr{b1}))
		l.settle()
		wantThem(l.b)
		wantThem(l.a)
		l.b.do(l.b.sa.SetAddresses(l.now, []netip.Addr{b1, b2}))
		l.settle()
		wantThem(l.a, b2)
		l.wantAt(a1, b1)
	})
}

// Without the word of both there is no MOBIKE, and nothing changes ports.
func TestMOBIKEOfOne(t *testing.T) {
	for _, n := range []bool{true, false} {
		l := newLab(t)
		l.a.rule.MOBIKE, l.b.rule.MOBIKE = n, !n
		l.establish()
		l.want(1)
		if l.a.sa.mob != nil || l.b.sa.mob != nil {
			t.Errorf("MOBIKE at a %v, b %v", l.a.sa.mob != nil, l.b.sa.mob != nil)
		}
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
		l.settle()
		if l.a.sa.local.Addr() != a1 {
			t.Errorf("a has moved to %v", l.a.sa.local)
		}
	}
	// Nor without the port.
	l := newLab(t)
	mobikeLab(l)
	l.a.cfg.NoNATT = func() bool { return true }
	l.establish()
	if l.a.sa.mob != nil || l.a.sa.local.Port() != 500 {
		t.Errorf("without port 4500: MOBIKE %v, at %v", l.a.sa.mob != nil, l.a.sa.local)
	}
}

// Addresses that the rule does not hold: the responder refuses, the initiator goes
// to the next, and what neither permits is not used at all.
func TestMOBIKEUnacceptable(t *testing.T) {
	a3 := netip.MustParseAddr("203.0.113.1")
	withFaults(t, func(t *testing.T, l *lab) {
		mobikeLab(l)
		l.b.rule.Remote = ranges(a1, a3)
		l.establish()
		l.lost(a1)
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2, a3}))
		l.settle()
		l.want(1)
		l.wantAt(a3, b1)
	})
	l := newLab(t)
	mobikeLab(l)
	l.a.rule.Local = ranges(a1)
	l.establish()
	l.clearEvents()
	l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
	l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
	l.settle()
	if l.a.sa.local.Addr() != a1 || len(told[Moved](l.a)) != 0 {
		t.Errorf("a: at %v, moves %v", l.a.sa.local, told[Moved](l.a))
	}
	if n := logged(l.a, "our address is gone, and there is no other that the rule permits"); n != 1 {
		t.Errorf("told %d times", n)
	}
}

// The responder's SAs follow once the initiator has answered from there, or at once
// if the rule says so.
func TestMOBIKECheck(t *testing.T) {
	for _, check := range []bool{true, false} {
		l := newLab(t)
		mobikeLab(l)
		l.b.rule.MOBIKECheck = check
		l.establish()
		l.clearEvents()
		l.stop = func(p packet) bool { return p.from == l.b }
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
		l.run()
		if l.b.sa.remote.Addr() != a2 {
			t.Errorf("check %v: IKE of b to %v", check, l.b.sa.remote)
		}
		if moved := len(told[Moved](l.b)) > 0; moved == check {
			t.Errorf("check %v: SAs of b have moved: %v", check, moved)
		}
		l.let()
		l.settle()
		l.wantAt(a2, b1)
	}
}

// A wrong COOKIE2 ends the IKE SA, as does none.
func TestMOBIKEWrongCookie(t *testing.T) {
	for name, ps := range map[string][]ikev2.Payload{
		"wrong": {notify(ikev2.COOKIE2, make([]byte, cookie2Len)...)}, "none": {}, "short": {notify(ikev2.COOKIE2, 1)},
	} {
		l := newLab(t)
		mobikeLab(l)
		l.establish()
		l.stop = func(packet) bool { return true }
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
		l.answerTo(ps...)
		if f := told[Failed](l.a); len(f) != 1 {
			t.Errorf("%s: Failed %v", name, f)
		}
		if len(l.a.sads) != 0 {
			t.Errorf("%s: SAs left", name)
		}
	}
}

// Both ask for something when the initiator moves, twice, and the IKE SA is rekeyed
// by either side meanwhile: in the end all is where the initiator is.
func TestMOBIKECrossing(t *testing.T) {
	a3 := netip.MustParseAddr("203.0.113.1")
	for name, also := range map[string]func(l *lab){
		"child of the initiator":    func(l *lab) { l.a.do(l.a.sa.AddChild(l.now, reqA(2))) },
		"child of the responder":    func(l *lab) { l.b.do(l.b.sa.ChildExpired(l.now, inSPI(l.t, l.b), false)) },
		"rekeying by the initiator": func(l *lab) { l.a.do(l.a.sa.Rekey(l.now)) },
		"rekeying by the responder": func(l *lab) { l.b.do(l.b.sa.Rekey(l.now)) },
		"addresses of the responder": func(l *lab) {
			l.b.do(l.b.sa.SetAddresses(l.now, []netip.Addr{b1}))
		},
	} {
		for _, first := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, first %v", name, first), func(t *testing.T) {
				withFaults(t, func(t *testing.T, l *lab) {
					mobikeLab(l)
					l.establish()
					if first {
						also(l)
					}
					l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
					if !first {
						also(l)
					}
					l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a3}))
					l.lost(a1, a2)
					l.settle()
					l.step(l.now.Add(linger + time.Second))
					l.settle()
					l.want(len(l.a.sa.children))
					l.wantAt(a3, b1)
				})
			})
		}
	}
}

// An SPI that was got before the move is completed where it was got, and then
// moves.
func TestMOBIKEWhileChildIsMade(t *testing.T) {
	for _, side := range []string{"a", "b"} {
		l := newLab(t)
		mobikeLab(l)
		l.establish()
		n := l.a
		if side == "b" {
			n = l.b
		}
		n.holdSPI = true
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.run()
		l.lost(a1)
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
		l.run()
		n.holdSPI = false
		n.giveSPIs()
		l.settle()
		l.want(2)
		l.wantAt(a2, b1)
	}
}

// With a NAT on one of the paths ESP goes in UDP there and not on the other.
func TestMOBIKEIntoNAT(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		mobikeLab(l)
		l.establish()
		inside, outside := netip.AddrPortFrom(a2, 4500), ap("203.0.113.9:20000")
		l.nat = &nat{}
		l.nat.add(inside, outside)
		l.lost(a1)
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
		l.settle()
		l.want(1)
		if !l.a.sa.natLocal || !l.b.sa.natRemote || l.b.sa.remote != outside {
			t.Errorf("NAT: a %v, b %v, at %v", l.a.sa.natLocal, l.b.sa.natRemote, l.b.sa.remote)
		}
		for _, n := range []*node{l.a, l.b} {
			for id, p := range n.sads {
				if p.Encap == nil {
					t.Errorf("%s: %v is not in UDP", n.name, id)
				}
			}
		}
		if d := l.a.sa.keepaliveAt(); d.IsZero() {
			t.Error("a sends no keepalives")
		}
		l.stop, l.nat = nil, nil
		l.lost(a2)
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a1}))
		l.settle()
		for _, n := range []*node{l.a, l.b} {
			for id, p := range n.sads {
				if p.Encap != nil {
					t.Errorf("%s: %v is in UDP still", n.name, id)
				}
			}
		}
		l.wantAt(a1, b1)
	})
}

// The NAT in front of the initiator gets other mappings. ESP tells the responder,
// who asks there; without ESP the initiator's liveness check tells.
func TestMOBIKENATChanges(t *testing.T) {
	for _, esp := range []bool{true, false} {
		l := newLab(t)
		mobikeLab(l)
		l.nat = &nat{}
		l.nat.add(addrA, ap("203.0.113.1:10500"))
		l.nat.add(at(a1, b1).local, ap("203.0.113.1:14500"))
		l.a.cfg.Addrs = []netip.Addr{a1}
		l.establish()
		l.want(1)
		l.clearEvents()
		l.nat = &nat{}
		now := ap("203.0.113.1:24500")
		l.nat.add(at(a1, b1).local, now)
		l.stop = func(p packet) bool { return p.dst == ap("203.0.113.1:14500") }
		// Nothing but an update moves b.
		l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
		l.run()
		if l.b.sa.remote == now {
			t.Error("b follows without a check")
		}
		if esp {
			l.b.do(l.b.sa.PeerAt(l.now, now))
			l.b.do(l.b.sa.PeerAt(l.now, now))
			l.settle()
		} else {
			l.settle()
			l.step(l.now.Add(l.a.rule.DPD + time.Second))
			l.settle()
		}
		l.want(2)
		if l.b.sa.remote != now {
			t.Errorf("ESP %v: b sends to %v, want %v", esp, l.b.sa.remote, now)
		}
		for id, p := range l.b.sads {
			if e := p.Encap; e == nil || e.SPort != now.Port() && e.DPort != now.Port() {
				t.Errorf("ESP %v: SA %v %+v", esp, id, e)
			}
		}
	}
	// A forged source of ESP moves nothing, and does not end the IKE SA.
	l := newLab(t)
	mobikeLab(l)
	l.nat = &nat{}
	l.nat.add(addrA, ap("203.0.113.1:10500"))
	l.nat.add(at(a1, b1).local, ap("203.0.113.1:14500"))
	l.establish()
	l.lost(netip.MustParseAddr("203.0.113.66"))
	l.b.do(l.b.sa.PeerAt(l.now, ap("203.0.113.66:4500")))
	l.settle()
	l.want(1)
	if l.b.sa.remote != ap("203.0.113.1:14500") {
		t.Errorf("b sends to %v", l.b.sa.remote)
	}
}

// Where there is no NAT traversal the addresses are protected (RFC 4555, 3.9).
func TestMOBIKENoNATs(t *testing.T) {
	l := newLab(t)
	mobikeLab(l)
	l.a.rule.NATT, l.b.rule.NATT = pad.NATTNo, pad.NATTNo
	l.establish()
	l.want(1)
	if l.a.sa.mob == nil || l.a.sa.local.Port() != 500 {
		t.Fatalf("MOBIKE %v, at %v", l.a.sa.mob != nil, l.a.sa.local)
	}
	l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
	l.settle()
	if l.b.sa.remote != netip.AddrPortFrom(a2, 500) || l.b.sa.children[0].outDst != a2 {
		t.Errorf("b sends to %v", l.b.sa.remote)
	}
	// Behind a NAT it is refused, and the SAs stay.
	l.nat = &nat{}
	l.nat.add(netip.AddrPortFrom(a1, 500), ap("203.0.113.9:500"))
	l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a1}))
	l.settle()
	if l.b.sa.remote.Addr() != a2 || logged(l.b, "addresses are not the peer's") < 2 {
		t.Errorf("b sends to %v, refused %d times", l.b.sa.remote, logged(l.b, "addresses are not the peer's"))
	}
	// So it is in IKE_AUTH.
	l = newLab(t)
	mobikeLab(l)
	l.a.rule.NATT, l.b.rule.NATT = pad.NATTNo, pad.NATTNo
	l.nat = &nat{}
	l.nat.add(addrA, ap("203.0.113.9:500"))
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, reqA(1)))
	l.settle()
	if f := told[Failed](l.a); len(f) != 1 {
		t.Errorf("a: Failed %v", f)
	}
}

// SAs in transport mode do not move: with nothing else the IKE SA stays.
func TestMOBIKETransport(t *testing.T) {
	any := netip.MustParsePrefix("0.0.0.0/0")
	sel := ipsec.Selector{Src: any, Dst: any}
	for _, both := range []bool{false, true} {
		l := newLab(t)
		mobikeLab(l)
		l.b.policies = append(l.b.policies, policy(sel, ipsec.Transport, 2))
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		reqs := []ChildRequest{{Policy: policy(sel, ipsec.Transport, 1)}}
		if both {
			reqs = append(reqs, reqA(2))
		}
		l.a.do(l.a.sa.Start(l.now, reqs...))
		l.settle()
		l.want(len(reqs))
		l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
		l.settle()
		if !both {
			l.want(1)
			if l.a.sa.local.Addr() != a1 || logged(l.a, "our address is gone; not moved") != 1 {
				t.Errorf("a is at %v", l.a.sa.local)
			}
			continue
		}
		l.want(1)
		l.wantAt(a2, b1)
		if logged(l.a, "child SA does not move") != 1 {
			t.Error("no reason given")
		}
	}
}

// An update of an IKE SA that has been replaced is older than one of the new one.
func TestMOBIKELateUpdate(t *testing.T) {
	l := newLab(t)
	mobikeLab(l)
	l.establish()
	old := l.b.sa.cur
	l.now = l.now.Add(time.Second)
	l.a.do(l.a.sa.Rekey(l.now))
	l.settle()
	l.a.do(l.a.sa.SetAddresses(l.now, []netip.Addr{a2}))
	l.settle()
	l.wantAt(a2, b1)
	s := l.b.sa
	old.from = Datagram{Local: at(b1, a1).local, Remote: at(a1, b1).local}
	s.mobikeRequest(old, []ikev2.Payload{notify(ikev2.UPDATE_SA_ADDRESSES), notify(ikev2.NO_ADDITIONAL_ADDRESSES)})
	l.wantAt(a2, b1)
}

// Nothing that a peer may write into these notifies does harm.
func TestMOBIKEHostileNotifies(t *testing.T) {
	l := newLab(t)
	mobikeLab(l)
	l.establish()
	l.b.sa.cur.from = Datagram{Local: l.b.sa.local, Remote: l.b.sa.remote}
	for _, data := range [][]byte{nil, {1}, make([]byte, 4), make([]byte, 16), make([]byte, 300), netip.MustParseAddr("::ffff:1.2.3.4").AsSlice(), {224, 0, 0, 1}, {127, 0, 0, 1}} {
		for _, typ := range []ikev2.NotifyType{ikev2.ADDITIONAL_IP4_ADDRESS, ikev2.ADDITIONAL_IP6_ADDRESS, ikev2.COOKIE2,
			ikev2.NO_NATS_ALLOWED, ikev2.NAT_DETECTION_SOURCE_IP, ikev2.NAT_DETECTION_DESTINATION_IP, ikev2.MOBIKE_SUPPORTED} {
			l.b.sa.mobikeRequest(l.b.sa.cur, []ikev2.Payload{notify(typ, data...)})
			l.b.sa.mobikeRequest(l.b.sa.cur, []ikev2.Payload{notify(ikev2.UPDATE_SA_ADDRESSES), notify(typ, data...)})
		}
	}
	for _, a := range l.b.sa.mob.theirs {
		t.Errorf("takes %v for an address", a)
	}
	var many []ikev2.Payload
	for i := range 100 {
		many = append(many, notify(ikev2.ADDITIONAL_IP4_ADDRESS, 10, 0, 0, byte(i)))
	}
	l.b.sa.mobikeRequest(l.b.sa.cur, many)
	if n := len(l.b.sa.mob.theirs); n != maxTheirs {
		t.Errorf("keeps %d addresses", n)
	}
}

// logged counts lines.
func logged(n *node, msg string) (count int) {
	for _, o := range told[Log](n) {
		if o.Msg == msg {
			count++
		}
	}
	return count
}

func ranges(l ...netip.Addr) (rs []pad.Range) {
	for _, a := range l {
		rs = append(rs, pad.One(a))
	}
	return rs
}

// FuzzMOBIKE gives a responder, and an initiator, INFORMATIONAL requests with any
// notifies about addresses, by any path: nothing but UPDATE_SA_ADDRESSES moves it, and
// only to where the rule permits.
func FuzzMOBIKE(f *testing.F) {
	f.Add(true, []byte{0, 0, 1, 4, 198, 51, 100, 1})
	f.Add(false, []byte{4, 8, 1, 2, 3, 4, 5, 6, 7, 8, 3, 0})
	f.Add(true, []byte{0, 0, 5, 12, 192, 0, 2, 1, 192, 0, 2, 2, 17, 148, 17, 148, 6, 20})
	types := []ikev2.NotifyType{ikev2.UPDATE_SA_ADDRESSES, ikev2.ADDITIONAL_IP4_ADDRESS, ikev2.ADDITIONAL_IP6_ADDRESS, ikev2.NO_ADDITIONAL_ADDRESSES,
		ikev2.COOKIE2, ikev2.NO_NATS_ALLOWED, ikev2.NAT_DETECTION_SOURCE_IP, ikev2.NAT_DETECTION_DESTINATION_IP, ikev2.UNACCEPTABLE_ADDRESSES}
	f.Fuzz(func(t *testing.T, responder bool, data []byte) {
		l := newLab(t)
		mobikeLab(l)
		l.b.rule.Remote = ranges(a1, a2)
		l.establish()
		n, from := l.b, at(b1, a1)
		if !responder {
			n, from = l.a, at(a1, b1)
		}
		s, moves := n.sa, false
		var ps []ikev2.Payload
		for len(data) >= 2 {
			typ, size := types[int(data[0])%len(types)], min(int(data[1]), len(data)-2)
			moves = moves || typ == ikev2.UPDATE_SA_ADDRESSES
			ps = append(ps, notify(typ, data[2:2+size]...))
			data = data[2+size:]
		}
		if len(data) == 1 {
			from.remote = netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, data[0]}), 4500)
		}
		was, i := s.path(), s.cur
		i.from = Datagram{Local: from.local, Remote: from.remote}
		s.input(l.now, func() { s.mobikeRequest(i, ps) })
		switch p := s.path(); {
		case p == was:
		case !moves || !responder || p != from || !s.rule.Covers(p.addrs()):
			t.Errorf("moved to %v", p)
		}
		for _, a := range s.mob.theirs {
			if !a.IsGlobalUnicast() || a.Is4In6() || len(s.mob.theirs) > maxTheirs {
				t.Errorf("takes %v for addresses", s.mob.theirs)
			}
		}
	})
}
