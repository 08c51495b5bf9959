package sa

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// answered starts a, and returns it with the true answer to its IKE_SA_INIT, which
// has not arrived, and a maker of good ones by somebody else, who has no keys.
func answered(t *testing.T, hybrid bool) (l *lab, true1 Datagram, forge func(n int) Datagram) {
	l = newLab(t)
	if !hybrid {
		l.plain()
	}
	l.initRequest()
	l.let()
	l.stop = func(packet) bool { return true }
	l.run()
	if len(l.kept) != 1 {
		t.Fatalf("%d answers", len(l.kept))
	}
	true1 = Datagram{addrA, addrB, l.kept[0].data}
	forge = func(n int) Datagram {
		m, err := ikev2.Parse(slices.Clone(true1.Data))
		if err != nil {
			t.Fatal(err)
		}
		m.ResponderSPI ^= SPI(n) << 8
		ke := ikev2.Find[*ikev2.KE](m.Payloads)
		ke.Data = slices.Clone(ke.Data)
		ke.Data[0] ^= byte(n) // a good public value all the same
		return Datagram{addrA, addrB, encode(t, m)}
	}
	l.stop, l.kept = nil, nil
	return l, true1, forge
}

func (l *lab) hears(d Datagram) { l.a.do(l.a.sa.Receive(l.now, d)) }

// RFC 7296, 2.4: answers to IKE_SA_INIT that come before the true one, and look as
// good, keep nobody from it.
func TestSeveralInitAnswers(t *testing.T) {
	for _, hybrid := range []bool{false, true} {
		for name, order := range map[string]func(l *lab, true1 Datagram, forge func(int) Datagram){
			"true one second": func(l *lab, true1 Datagram, forge func(int) Datagram) {
				l.hears(forge(1))
				l.hears(true1)
			},
			"true one later": func(l *lab, true1 Datagram, forge func(int) Datagram) {
				l.hears(forge(1))
				l.step(l.now.Add(2 * time.Second))
				l.hears(true1)
			},
			"true one last": func(l *lab, true1 Datagram, forge func(int) Datagram) {
				for n := range maxAnswers {
					l.hears(forge(n + 1))
					l.hears(forge(n + 1))
				}
				l.hears(true1)
			},
			"true one first": func(l *lab, true1 Datagram, forge func(int) Datagram) {
				l.hears(true1)
				for n := range 3 * maxAnswers {
					l.hears(forge(n + 1))
				}
			},
			"one of no use between": func(l *lab, true1 Datagram, forge func(int) Datagram) {
				l.hears(forge(1))
				m, err := ikev2.Parse(slices.Clone(true1.Data))
				if err != nil {
					l.t.Fatal(err)
				}
				m.ResponderSPI ^= 77
				ikev2.Find[*ikev2.KE](m.Payloads).Data = make([]byte, 32)
				l.hears(Datagram{addrA, addrB, encode(l.t, m)})
				l.hears(true1)
			},
		} {
			t.Run(fmt.Sprintf("%s/hybrid %v", name, hybrid), func(t *testing.T) {
				l, true1, forge := answered(t, hybrid)
				l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
				order(l, true1, forge)
				if n := len(l.a.sa.cur.hs.others); n > maxAnswers {
					t.Errorf("%d answers are kept", n)
				}
				l.settle()
				l.want(2)
				if f := told[ChildFailed](l.a); len(f) != 0 || len(l.a.larval) != 0 {
					t.Errorf("failed %v, left %v", f, l.a.larval)
				}
			})
		}
	}
}

// Keys that were used are not made once more, since the IVs would be those of before:
// of answers that lead to the same keys one has its turn, once.
func TestAnswerTriedOnce(t *testing.T) {
	for _, hybrid := range []bool{false, true} {
		l, true1, forge := answered(t, hybrid)
		m, err := ikev2.Parse(slices.Clone(true1.Data))
		if err != nil {
			t.Fatal(err)
		}
		m.Payloads = append(m.Payloads, notify(ikev2.NotifyType(40961)))
		changed := Datagram{addrA, addrB, encode(t, m)}
		l.hears(forge(1))
		l.hears(changed) // its AUTH will not do
		l.hears(true1)
		for end := l.now.Add(time.Hour); !l.a.sa.failed && l.now.Before(end); l.step(l.now.Add(250 * time.Millisecond)) {
			l.run()
			l.hears(changed)
			l.hears(forge(1))
		}
		if !l.a.sa.failed {
			t.Fatalf("hybrid %v: no end: %s", hybrid, l.a.describe())
		}
		type number struct {
			spi   SPI
			early bool // by the keys before IKE_INTERMEDIATE
			iv    [8]byte
		}
		sent, tried := map[number][]byte{}, map[SPI]bool{}
		for _, p := range l.all {
			hd, _, err := ikev2.ParseHeader(p.data)
			if err != nil || p.from != l.a || hd.ResponderSPI == 0 {
				continue
			}
			iv := p.data[32:]
			if ikev2.PayloadType(p.data[16]) == ikev2.PayloadSKF {
				iv = iv[4:]
			}
			n := number{hd.ResponderSPI, hd.Exchange == ikev2.IKE_INTERMEDIATE, [8]byte(iv)}
			if b := sent[n]; b != nil && !slices.Equal(b, p.data) {
				t.Fatalf("hybrid %v: two messages by the same keys and IV", hybrid)
			}
			sent[n], tried[hd.ResponderSPI] = p.data, true
		}
		if len(tried) != 2 {
			t.Errorf("hybrid %v: %d answers were tried", hybrid, len(tried))
		}
	}
}

// Whoever answers first, and goes on by his own keys to the end, cannot prove who he
// is; then it is the other's turn at once, or when it comes a little later, whatever
// it has to say. If there is none, that is the end.
func TestInitAnswerWithoutProof(t *testing.T) {
	const never = -1
	answer := func(_ *lab, true1 Datagram) Datagram { return true1 }
	// b answers anew.
	demand := func(l *lab, n *ikev2.Notify) Datagram {
		l.b.sa, l.b.spis = nil, map[SPI]bool{}
		return Datagram{addrA, addrB, encode(l.t, &ikev2.Message{
			Header:   ikev2.Header{Exchange: ikev2.IKE_SA_INIT, Flags: ikev2.FlagResponse, InitiatorSPI: l.a.sa.cur.local},
			Payloads: []ikev2.Payload{n},
		})}
	}
	cookie := func(l *lab, _ Datagram) Datagram {
		l.b.cookie = []byte("secret")
		b, _ := Cookie(l.b.cookie, 1, addrA, l.initRequests()[0])
		return demand(l, notify(ikev2.COOKIE, b...))
	}
	group := func(l *lab, _ Datagram) Datagram {
		p := l.b.rule.Proposals[0]
		l.b.rule.Proposals = []proposal.IKE{{Ciphers: p.Ciphers, PRF: p.PRF, KE: []alg.KE{alg.KEECP256}}}
		return demand(l, invalidKE(uint16(alg.KEECP256)))
	}
	for _, tt := range []struct {
		name    string
		forgers int
		comes   time.Duration // after the last of them; 0: before his AUTH
		says    func(*lab, Datagram) Datagram
	}{
		{"meanwhile", 1, 0, answer},
		{"late", 1, 300 * time.Millisecond, answer},
		{"when the request would be sent again", 1, 999 * time.Millisecond, answer},
		{"late, after two", 2, 300 * time.Millisecond, answer},
		{"meanwhile, a cookie", 1, 0, cookie},
		{"late, a cookie", 1, 300 * time.Millisecond, cookie},
		{"meanwhile, a group", 1, 0, group},
		{"late, a group", 2, 300 * time.Millisecond, group},
		{"never", 1, never, answer},
	} {
		for _, says := range []string{"wrong AUTH", "AUTHENTICATION_FAILED"} {
			l, true1, _ := answered(t, false)
			for _, n := range []*node{l.a, l.b} {
				n.rule.Proposals[0].KE = []alg.KE{alg.KEX25519, alg.KEECP256}
			}
			if tt.comes == never {
				l.b.sa = nil
			}
			start := l.now
			for n := range tt.forgers {
				c := l.node("c", addrB, addrA, byte(3+n))
				c.policies = l.b.policies
				*c.rule = *l.b.rule
				c.rule.PSK = pad.Keys{Local: ipsec.NewKey([]byte("a guess")), Remote: l.b.rule.PSK.Remote}
				if says == "AUTHENTICATION_FAILED" {
					c.rule.PSK.Remote = c.rule.PSK.Local
				}
				c.sa = NewResponder(c.cfg, []*pad.Rule{c.rule})
				said := func(data []byte) {
					l.stop, l.kept = func(packet) bool { return true }, nil
					c.do(c.sa.Receive(l.now, Datagram{addrB, addrA, slices.Clone(data)}))
					c.giveSPIs()
					ps := l.kept
					l.kept = nil
					for _, p := range ps {
						l.hears(Datagram{addrA, addrB, p.data})
					}
				}
				request, err := l.initRequests()[0].Append(nil)
				if err != nil {
					t.Fatal(err)
				}
				said(request)
				l.a.giveSPIs()
				if len(l.kept) != 1 {
					t.Fatalf("%s: %d requests of IKE_AUTH", says, len(l.kept))
				}
				auth := l.kept[0].data
				if tt.comes == 0 {
					l.hears(tt.says(l, true1))
				}
				said(auth)
			}
			l.let()
			if tt.comes > 0 {
				l.hears(Datagram{addrA, addrB, encode(t, &ikev2.Message{ // somebody goes on
					Header:   ikev2.Header{Exchange: ikev2.IKE_SA_INIT, Flags: ikev2.FlagResponse, InitiatorSPI: l.a.sa.cur.local},
					Payloads: []ikev2.Payload{notify(ikev2.NO_PROPOSAL_CHOSEN)},
				})})
				l.step(l.now.Add(tt.comes))
				l.hears(tt.says(l, true1))
			}
			l.settle()
			if tt.comes != never {
				l.want(1)
				if d := l.now.Sub(start); d > 2*time.Second {
					t.Errorf("%s, %s: after %v", tt.name, says, d)
				}
				continue
			}
			f := told[Failed](l.a)
			if len(f) != 1 || len(told[ChildFailed](l.a)) != 1 || len(l.a.larval) != 0 || errors.Is(f[0].Err, ErrTimeout) || l.now.Sub(start) > 1250*time.Millisecond {
				t.Errorf("%s, and nobody else: %v after %v, left %v", says, f, l.now.Sub(start), l.a.larval)
			}
		}
	}
}

// Whoever answers again and again, each time to the end, comes to one himself.
func TestManyInitAnswersWithoutProof(t *testing.T) {
	l, _, forge := answered(t, false)
	for n := range 100 {
		if l.a.sa.failed {
			break
		}
		l.hears(forge(n + 1))
		if i := l.a.sa.cur; i != nil && i.state == StateAuthSent {
			l.a.do(l.a.sa.input(l.now, func() { l.a.sa.another(i, i.active, errNoKey) })) // as if refused
		}
	}
	if n := len(l.a.sa.cur.hs.tried); n != 1+maxAnswers {
		t.Errorf("%d answers were tried, want %d", n, 1+maxAnswers)
	}
	l.settle()
	l.a.wantEnd(errNoKey)
}

// What an answer that comes to nothing says of NATs and PPKs is not left over for the
// one that has its turn then.
func TestSeveralInitAnswersWithNATAndPPK(t *testing.T) {
	const p = "a post-quantum pre-shared key!!!"
	for _, tt := range []struct {
		name string
		set  func(l *lab)
		drop ikev2.NotifyType // from the first answer
		nat  bool
		ppk  bool
	}{
		{"NAT, and the first says nothing of it", func(l *lab) { l.behind(true, false) }, ikev2.NAT_DETECTION_DESTINATION_IP, true, false},
		{"NAT, and the first sees another", func(l *lab) { l.behind(true, false) }, 0, true, false},
		{"none, and the first sees one", func(*lab) {}, 0, false, false},
		{"PPK, and the first has none", func(l *lab) {
			l.a.ppk(pad.PPKPrefer, "p", "p", p)
			l.b.ppk(pad.PPKPrefer, "p", "p", p)
		}, ikev2.USE_PPK, false, true},
		{"PPK, and the first has it too", func(l *lab) {
			l.a.ppk(pad.PPKPrefer, "p", "p", p)
			l.b.ppk(pad.PPKRequire, "p", "p", p)
		}, 0, false, true},
		{"PPK that the peer has not", func(l *lab) {
			l.a.ppk(pad.PPKPrefer, "p", "p", p)
			l.b.ppk(pad.PPKPrefer, "q", "q", p)
		}, ikev2.USE_PPK, false, false},
	} {
		for _, hybrid := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/hybrid %v", tt.name, hybrid), func(t *testing.T) {
				l := newLab(t)
				if !hybrid {
					l.plain()
				}
				tt.set(l)
				forged := false
				l.stop = func(p packet) bool {
					if p.from != l.b || forged {
						return false
					}
					forged = true
					m, err := ikev2.Parse(slices.Clone(p.data))
					if err != nil {
						t.Fatal(err)
					}
					m.ResponderSPI ^= 1 << 8
					ke := ikev2.Find[*ikev2.KE](m.Payloads)
					ke.Data = slices.Clone(ke.Data)
					ke.Data[0] ^= 1
					m.Payloads = slices.DeleteFunc(m.Payloads, func(x ikev2.Payload) bool {
						n, ok := x.(*ikev2.Notify)
						return ok && n.Type == tt.drop
					})
					l.inject(packet{p.src, p.dst, encode(t, m), l.b, p.at})
					return false // and the true one follows
				}
				l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
				l.a.do(l.a.sa.Start(l.now, reqA(1)))
				l.settle()
				if !forged {
					t.Fatal("no answer")
				}
				l.want(1)
				for _, n := range []*node{l.a, l.b} {
					if n.sa.ppk != tt.ppk || n.sa.nat() != tt.nat || (n.sa.local.Port() == 4500) != tt.nat {
						t.Errorf("%s: PPK %v, NAT %v, at %v; want %v, %v", n.name, n.sa.ppk, n.sa.nat(), n.sa.local, tt.ppk, tt.nat)
					}
				}
				if in := told[InstallChild](l.a)[0].In; (in.Encap != nil) != tt.nat {
					t.Errorf("ESP in UDP: %+v, NAT %v", in.Encap, tt.nat)
				}
			})
		}
	}
}

// A peer that takes longer over IKE_AUTH than its turn lasts, since somebody has
// answered beside it, loses nothing: neither when its proof comes, nor when that was
// lost, nor when the other one refuses. If it comes to nothing either, nothing is left.
func TestSlowPeerBesideForger(t *testing.T) {
	for _, hybrid := range []bool{false, true} {
		for _, then := range []string{"comes", "comes, the other began", "was lost", "the other one refuses", "comes too late", "never"} {
			if hybrid && then == "comes, the other began" {
				continue // he would have to answer IKE_INTERMEDIATE
			}
			t.Run(fmt.Sprintf("%s/hybrid %v", then, hybrid), func(t *testing.T) {
				l, true1, forge := answered(t, hybrid)
				l.a.do(l.a.sa.AddChild(l.now, reqA(2)))
				proof := func(p packet) bool { return p.from == l.b && p.data[18] == byte(ikev2.IKE_AUTH) }
				l.stop = proof
				start := l.now
				if then == "comes, the other began" {
					l.hears(forge(1))
					l.hears(true1)
					l.step(l.now.Add(8 * time.Second))
				} else {
					l.hears(true1)
					l.run()
					l.hears(forge(1))
				}
				l.step(l.now.Add(10 * time.Second))
				if n := len(l.a.sa.cur.hs.parked); n != 1 {
					t.Fatalf("%d turns are parked, of %s", n, l.a.describe())
				}
				p := l.a.sa.cur.hs.parked[0]
				for _, b := range [][]byte{l.kept[0].data[:len(l.kept[0].data)-1], append(slices.Clone(l.kept[0].data[:60]), make([]byte, len(l.kept[0].data)-60)...)} {
					l.hears(Datagram{p.local, p.remote, slices.Clone(b)}) // nothing authentic
				}
				switch {
				case then == "was lost":
					l.stop, l.kept = nil, nil
				case then == "the other one refuses":
					l.stop, l.kept = nil, nil
					i := l.a.sa.cur
					l.a.do(l.a.sa.input(l.now, func() {
						if !l.a.sa.another(i, i.active, errNoKey) {
							t.Error("that is the end")
						}
					}))
				case then == "never":
					l.stop = func(p packet) bool { return p.from == l.b }
					l.step(l.now.Add(time.Hour))
					f := told[Failed](l.a)
					if len(f) != 1 || !errors.Is(f[0].Err, ErrTimeout) || len(told[ChildFailed](l.a)) != 2 || len(l.a.larval) != 0 || !l.a.sa.done {
						t.Errorf("Failed %v, ChildFailed %v, left %v", f, told[ChildFailed](l.a), l.a.larval)
					}
					return
				case then == "comes too late":
					l.b.sa = nil
					kept := l.kept
					l.step(l.now.Add(time.Hour))
					l.kept = kept
					l.let()
					l.run()
					if !l.a.sa.done || len(l.a.larval) != 0 {
						t.Errorf("left %v of %s", l.a.larval, l.a.describe())
					}
					return
				default:
					l.let(0)
				}
				l.settle()
				l.want(2)
				if d := l.now.Sub(start); d > time.Minute {
					t.Errorf("after %v", d)
				}
				sent := map[[2]uint64][]byte{} // a request of an answer's keys is the same each time
				for _, p := range l.all {
					hd, _, err := ikev2.ParseHeader(p.data)
					if err != nil || p.from != l.a || hd.Exchange != ikev2.IKE_AUTH {
						continue
					}
					k := [2]uint64{uint64(hd.ResponderSPI), uint64(hd.MessageID)}
					if b := sent[k]; b != nil && !slices.Equal(b, p.data) {
						t.Error("two requests by the same keys")
					}
					sent[k] = p.data
				}
			})
		}
	}
}
