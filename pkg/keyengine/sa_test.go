package keyengine

import (
	"bytes"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

func (r *rig) getSPI(g keysock.GetSPI) (i *keysock.SAInfo, err error) {
	r.do(func() { i, err = r.GetSPI(g) })
	return i, err
}

func TestGetSPI(t *testing.T) {
	testRig(t, func(r *rig) {
		g := keysock.GetSPI{Proto: ipsec.ESP, Src: peer, Dst: self, Mode: ipsec.Tunnel, ReqID: 9, Seq: 77}
		i, err := r.getSPI(g)
		if err != nil || i.SPI < 256 || i.SPI > 0x0fffffff || i.State != keysock.Larval || i.Seq != 77 || i.Hard.AddTime != LarvalLife {
			r.Fatalf("got %+v, %v", i, err)
		}
		// One wanted value; taken for this protocol whatever the destination.
		g.Min, g.Max = 0xc0000001, 0xc0000001
		if i, err = r.getSPI(g); err != nil || i.SPI != 0xc0000001 {
			r.Fatalf("got %v, %v", i, err)
		}
		g.Dst = netip.MustParseAddr("192.0.2.99")
		_, err = r.getSPI(g)
		r.errno(err, syscall.EEXIST)
		// A range runs full exactly.
		g.Min, g.Max = 1, 355
		seen := map[ipsec.SPI]bool{}
		for range 100 {
			i, err := r.getSPI(g)
			if err != nil || i.SPI < 256 || i.SPI > 355 || seen[i.SPI] {
				r.Fatalf("got %v, %v", i, err)
			}
			seen[i.SPI] = true
		}
		_, err = r.getSPI(g)
		r.errno(err, syscall.EEXIST)
		g.Min, g.Max = 0, 0xffffffff
		_, err = r.getSPI(g)
		r.errno(err, 0)
		for _, c := range []struct {
			proto    ipsec.Protocol
			min, max ipsec.SPI
			want     syscall.Errno
		}{{ipsec.ESP, 1, 255, syscall.EINVAL}, {ipsec.ESP, 600, 599, syscall.EINVAL}, {ipsec.AH, 0, 0, 0}, {ipsec.IPComp, 0, 0, 0}, {ipsec.IPComp, 256, 65536, syscall.EINVAL}, {5, 0, 0, syscall.EINVAL}} {
			g.Proto, g.Min, g.Max = c.proto, c.min, c.max
			i, err := r.getSPI(g)
			r.errno(err, c.want)
			if err == nil && (i.SPI < ipsec.MinSPI || c.proto == ipsec.IPComp && i.SPI > 61439) {
				r.Errorf("%v: SPI %v", c.proto, i.SPI)
			}
		}
	})
}

// GETSPI -> larval -- 30 s --> hard EXPIRE; or UPDATE -> mature.
func TestLarval(t *testing.T) {
	testRig(t, func(r *rig) {
		g := keysock.GetSPI{Proto: ipsec.ESP, Src: peer, Dst: self, Min: 300, Max: 300}
		r.getSPI(g)
		r.after(LarvalLife - 1)
		r.want()
		r.after(1)
		r.want("removed 0x0000012c", "hard expire 0x0000012c dead")

		i, _ := r.getSPI(g) // free again
		r.after(20 * time.Second)
		p := outSA(i.SPI, 7)
		p.Src, p.Dst = peer, self
		_, err := r.add(p, 0)
		r.errno(err, syscall.EEXIST) // a larval SA counts
		p.EncrKey = key(20)
		u, err := r.update(p, 5)
		r.errno(err, 0)
		if u.State != keysock.Mature || u.SPI != 300 || u.ReqID != 7 || u.Mode != ipsec.Tunnel || !u.Added.Equal(time.Now()) || u.EncrKey.Len() != 0 {
			r.Errorf("got %+v", u)
		}
		r.want("mtu 1446", "installed 198.51.100.2->192.0.2.1 reqid 7", "installed 198.51.100.2->192.0.2.1 reqid 0")
		r.after(time.Hour)
		r.want()
		sa := r.o.SAD.Lookup(p.SAID)
		if sa == nil || sa.T == nil || sa.State() != sad.Mature {
			r.Errorf("in the SAD: %+v", sa)
		}
	})
}

func TestAddRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(p *ipsec.SAParams)
		want syscall.Errno
	}{
		{"AH with encryption", func(p *ipsec.SAParams) { p.Proto = ipsec.AH }, syscall.EINVAL},
		{"AH without integrity", func(p *ipsec.SAParams) { p.Proto, p.Encr, p.EncrKey = ipsec.AH, 0, ipsec.Key{} }, syscall.EINVAL},
		{"AH with a short key", func(p *ipsec.SAParams) {
			p.Proto, p.Encr, p.EncrKey, p.Auth, p.AuthKey = ipsec.AH, 0, ipsec.Key{}, alg.IntegHMACSHA1, key(19)
		}, syscall.EINVAL},
		{"AH of an unknown algorithm", func(p *ipsec.SAParams) {
			p.Proto, p.Encr, p.EncrKey, p.Auth, p.AuthKey = ipsec.AH, 0, ipsec.Key{}, 200, key(20)
		}, syscall.ENOSYS},
		{"AH in UDP", func(p *ipsec.SAParams) {
			p.Proto, p.Encr, p.EncrKey, p.Auth, p.AuthKey = ipsec.AH, 0, ipsec.Key{}, alg.IntegHMACSHA1, key(20)
			p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500}
		}, syscall.EINVAL},
		{"IPComp with encryption", func(p *ipsec.SAParams) { p.Proto = ipsec.IPComp }, syscall.EINVAL},
		{"IPComp with a CPI of 17 bits", func(p *ipsec.SAParams) { p.Proto, p.SPI, p.Encr, p.EncrKey = ipsec.IPComp, 0x10000, 0, ipsec.Key{} }, syscall.EINVAL},
		{"IPComp with a reserved CPI", func(p *ipsec.SAParams) { p.Proto, p.SPI, p.Encr, p.EncrKey = ipsec.IPComp, 3, 0, ipsec.Key{} }, syscall.EINVAL},
		{"reserved SPI", func(p *ipsec.SAParams) { p.SPI = 255 }, syscall.EINVAL},
		{"families", func(p *ipsec.SAParams) { p.Src = self6 }, syscall.EINVAL},
		{"mode", func(p *ipsec.SAParams) { p.Mode = ipsec.ModeAny }, syscall.EINVAL},
		{"tunnel mode from any source", func(p *ipsec.SAParams) { p.Mode, p.Src = ipsec.Tunnel, netip.IPv4Unspecified() }, syscall.EINVAL},
		{"UDP from any source", func(p *ipsec.SAParams) {
			p.Mode, p.Src, p.Encap = ipsec.Transport, netip.IPv4Unspecified(), &ipsec.Encap{SPort: 4500, DPort: 4500}
		}, syscall.EINVAL},
		{"to anywhere", func(p *ipsec.SAParams) { p.Mode, p.Dst = ipsec.Transport, netip.IPv4Unspecified() }, syscall.EINVAL},
		{"AGGFRAG in transport mode", func(p *ipsec.SAParams) { p.AggFrag, p.Mode = true, ipsec.Transport }, syscall.EINVAL},
		{"AGGFRAG in AH", func(p *ipsec.SAParams) {
			p.AggFrag, p.Proto, p.Encr, p.EncrKey, p.Auth, p.AuthKey = true, ipsec.AH, 0, ipsec.Key{}, alg.IntegHMACSHA1, key(20)
		}, syscall.EINVAL},
		{"no cipher", func(p *ipsec.SAParams) { p.Encr = alg.EncrNone }, syscall.EINVAL},
		{"key length", func(p *ipsec.SAParams) { p.EncrKey = key(21) }, syscall.EINVAL},
		{"no integrity", func(p *ipsec.SAParams) { p.Encr, p.EncrKey = alg.EncrAESCBC, key(16) }, syscall.EINVAL},
		{"nothing", func(p *ipsec.SAParams) { p.Encr, p.EncrKey = alg.EncrNULL, ipsec.Key{} }, syscall.EINVAL},
		{"AEAD with integrity", func(p *ipsec.SAParams) { p.Auth, p.AuthKey = alg.IntegHMACSHA256, key(32) }, syscall.ENOSYS},
		{"unknown cipher", func(p *ipsec.SAParams) { p.Encr, p.Auth = 200, alg.IntegHMACSHA1 }, syscall.ENOSYS},
	} {
		t.Run(c.name, func(t *testing.T) {
			testRig(t, func(r *rig) {
				p := outSA(0x1000, 0)
				c.edit(p)
				secret := p.EncrKey.Bytes()
				_, err := r.add(p, 0)
				r.errno(err, c.want)
				if !bytes.Equal(secret, make([]byte, len(secret))) {
					r.Error("the key of a refused SA lives")
				}
				if r.o.SAD.Len() != 0 || len(r.recs) != 0 || len(r.spis) != 0 {
					r.Error("a refused SA left something")
				}
				r.want()
			})
		})
	}
}

func TestAddGetDelete(t *testing.T) {
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 7)
		secret := p.EncrKey.Bytes()
		i, err := r.add(p, 0)
		r.errno(err, 0)
		if i.EncrKey.Len() != 0 {
			r.Error("the answer to ADD has keys")
		}
		_, err = r.add(outSA(0x1000, 7), 0)
		r.errno(err, syscall.EEXIST)
		r.o.SAD.Lookup(p.SAID).Account(3, 300, time.Now())
		r.do(func() {
			i, err = r.Get(p.SAID, netip.Addr{})
			r.errno(err, 0)
			if i.State != keysock.Mature || !i.EncrKey.Equal(key(20)) || i.Packets != 3 || i.Bytes != 300 || i.FirstUsed.IsZero() {
				r.Errorf("got %+v", i)
			}
			i.Wipe() // the caller's copy
			if l := r.SAIDs(0); len(l) != 1 || l[0] != p.SAID {
				r.Errorf("dump: got %v", l)
			}
			if l := r.SAIDs(ipsec.AH); len(l) != 0 {
				r.Errorf("dump of AH: got %v", l)
			}
			i, err = r.Delete(p.SAID, netip.Addr{})
			r.errno(err, 0)
			if i.State != keysock.Dead || i.Packets != 3 {
				r.Errorf("got %+v", i)
			}
			_, err = r.Delete(p.SAID, netip.Addr{})
			r.errno(err, syscall.ESRCH)
			_, err = r.Get(p.SAID, netip.Addr{})
			r.errno(err, syscall.ESRCH)
		})
		if !bytes.Equal(secret, make([]byte, 20)) {
			r.Error("the key of a deleted SA lives")
		}
		_, err = r.update(outSA(0x1000, 7), 0)
		r.errno(err, syscall.ESRCH)
		if r.o.SAD.Len() != 0 {
			r.Error("still in the SAD")
		}
		r.want("mtu 1446", "installed 192.0.2.1->198.51.100.2 reqid 7", "installed 192.0.2.1->198.51.100.2 reqid 0",
			"mtu 1500", "removed 0x00001000")
	})
}

func TestFlushAndOverhead(t *testing.T) {
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 0)
		p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500}
		r.add(p, 0)
		q := outSA(0x1001, 0)
		q.Mode = ipsec.Transport
		r.add(q, 0)
		six := outSA(0x1002, 0)
		six.Src, six.Dst = self6, peer6
		r.add(six, 0)
		r.want("mtu 1438", "installed 192.0.2.1->198.51.100.2 reqid 0", "installed 192.0.2.1->198.51.100.2 reqid 0",
			"mtu 1426", "installed 2001:db8::1->2001:db8::2 reqid 0")
		r.do(func() { r.Delete(six.SAID, netip.Addr{}) })
		r.want("mtu 1438", "removed 0x00001002")
		agg := outSA(0x1003, 0)
		agg.AggFrag, agg.Encap = true, p.Encap
		r.add(agg, 0)
		r.want("mtu 1434", "installed 192.0.2.1->198.51.100.2 reqid 0")
		if i, err := r.Get(agg.SAID, agg.Src); err != nil || !i.AggFrag {
			r.Errorf("GET: %+v, %v", i, err)
		}
		r.do(func() { r.Delete(agg.SAID, netip.Addr{}) })
		r.want("mtu 1438", "removed 0x00001003")
		r.do(func() {
			if r.Flush(ipsec.AH) {
				r.Error("AH: removed something")
			}
			if !r.Flush(0) || r.Flush(0) {
				r.Error("flush")
			}
		})
		if r.o.SAD.Len() != 0 || r.Stats().SAs != 0 || r.InnerMTU(1500) != 1500 {
			r.Errorf("left: %+v", r.Stats())
		}
	})
}

func TestUpdateMature(t *testing.T) {
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 7)
		p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500}
		p.Soft, p.Hard = ipsec.Lifetime{AddTime: time.Minute}, ipsec.Lifetime{AddTime: time.Hour}
		sa := r.mustAdd(p)
		sa.NextSeq(100)
		sa.Account(1, 10, time.Now())
		r.after(time.Minute)
		r.want("soft expire 0x00001000 dying")

		// strongSwan: the whole GET answer with other ports.
		var got *keysock.SAInfo
		r.do(func() { got, _ = r.Get(p.SAID, netip.Addr{}) })
		q := got.SAParams
		q.Encap = &ipsec.Encap{SPort: 4500, DPort: 1024}
		q.Soft.AddTime = 2 * time.Minute
		i, err := r.update(&q, 0)
		r.errno(err, 0)
		if i.State != keysock.Mature || i.Encap.DPort != 1024 || i.Packets != 1 {
			r.Errorf("got %+v", i)
		}
		n := r.o.SAD.Lookup(p.SAID)
		if n == sa || n.P.Encap.DPort != 1024 || n.Seq() != 100 || n.State() != sad.Mature {
			r.Errorf("in the SAD: %+v", n)
		}
		r.after(time.Minute)
		r.want("soft expire 0x00001000 dying")

		for name, edit := range map[string]func(*ipsec.SAParams){
			"other key":       func(p *ipsec.SAParams) { p.EncrKey.Bytes()[0]++ },
			"other cipher":    func(p *ipsec.SAParams) { p.Encr = alg.EncrAESGCM8 },
			"with AGGFRAG":    func(p *ipsec.SAParams) { p.AggFrag = true },
			"other mode":      func(p *ipsec.SAParams) { p.Mode = ipsec.Transport },
			"plain for NAT-T": func(p *ipsec.SAParams) { p.Encap = nil },
		} {
			q := outSA(0x1000, 7)
			q.Encap = &ipsec.Encap{SPort: 4500, DPort: 1024}
			edit(q)
			if _, err := r.update(q, 0); err == nil {
				r.Errorf("%s: accepted", name)
			} else {
				r.errno(err, syscall.EINVAL)
			}
		}
		// The soft state stayed, the hard limit too.
		r.after(time.Hour)
		r.want("mtu 1500", "removed 0x00001000", "hard expire 0x00001000 dead")
	})
}

func TestExpireByTime(t *testing.T) {
	const s = time.Second
	for _, c := range []struct {
		name       string
		soft, hard ipsec.Lifetime
		firstUse   time.Duration // 0: never
		softAt     time.Duration // 0: not
		hardAt     time.Duration
	}{
		{"creation", ipsec.Lifetime{AddTime: 10 * s}, ipsec.Lifetime{AddTime: 20 * s}, 0, 10 * s, 20 * s},
		{"hard below soft", ipsec.Lifetime{AddTime: 30 * s}, ipsec.Lifetime{AddTime: 20 * s}, 0, 0, 20 * s},
		{"hard with soft", ipsec.Lifetime{AddTime: 20 * s}, ipsec.Lifetime{AddTime: 20 * s}, 0, 0, 20 * s},
		{"never used", ipsec.Lifetime{UseTime: 10 * s}, ipsec.Lifetime{UseTime: 20 * s}, 0, 0, 0},
		{"used", ipsec.Lifetime{UseTime: 10 * s}, ipsec.Lifetime{UseTime: 20 * s}, 7 * s, 17 * s, 27 * s},
		{"used late", ipsec.Lifetime{UseTime: 10 * s}, ipsec.Lifetime{UseTime: 20 * s}, 55 * s, 65 * s, 75 * s},
		{"first of both", ipsec.Lifetime{AddTime: 30 * s, UseTime: 5 * s}, ipsec.Lifetime{AddTime: 40 * s, UseTime: 100 * s}, 2 * s, 7 * s, 40 * s},
	} {
		t.Run(c.name, func(t *testing.T) {
			testRig(t, func(r *rig) {
				p := outSA(0x1000, 0)
				p.Soft, p.Hard = c.soft, c.hard
				sa := r.mustAdd(p)
				start := time.Now()
				until := func(at time.Duration, want ...string) {
					r.Helper()
					r.after(at - 1 - time.Since(start))
					r.want()
					r.after(1)
					r.want(want...)
				}
				if c.firstUse != 0 {
					r.after(c.firstUse)
					sa.Account(1, 1, time.Now())
				}
				if c.softAt != 0 {
					until(c.softAt, "soft expire 0x00001000 dying")
				}
				if c.hardAt != 0 {
					until(c.hardAt, "mtu 1500", "removed 0x00001000", "hard expire 0x00001000 dead")
				}
				r.after(time.Hour)
				r.want()
				if len(r.timers) != 0 && c.hardAt != 0 {
					r.Errorf("%d timers left", len(r.timers))
				}
			})
		})
	}
}

func TestExpireByTraffic(t *testing.T) {
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 0)
		p.Soft, p.Hard = ipsec.Lifetime{Packets: 2}, ipsec.Lifetime{Packets: 3}
		sa := r.mustAdd(p)
		passed := 0
		for range 10 { // as the data path does
			soft, hard := sa.Account(1, 100, time.Now())
			if soft || hard {
				r.LimitReached(sa, hard)
			}
			if !hard {
				passed++
			}
		}
		r.want("soft expire 0x00001000 dying", "mtu 1500", "removed 0x00001000", "hard expire 0x00001000 dead")
		if passed != 3 {
			r.Errorf("%d packets passed, want 3", passed)
		}
		if r.expires[0].Soft.Packets != 2 || r.expires[1].Hard.Packets != 3 || r.expires[1].EncrKey.Len() != 0 {
			r.Errorf("got %+v", r.expires)
		}
		// A report that comes after another SA took the place is of no account.
		next := r.mustAdd(outSA(0x1000, 0))
		sa.SetState(sad.Mature)
		r.LimitReached(sa, false)
		r.want()
		if next.State() != sad.Mature {
			r.Error("the new SA is dying")
		}
	})
}

func TestNewMapping(t *testing.T) {
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 0)
		p.Src, p.Dst = peer, self
		p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500}
		sa := r.mustAdd(p)
		for range 3 {
			r.Engine.NewMapping(sa, netip.MustParseAddrPort("203.0.113.1:1024"))
		}
		r.want("mapping 198.51.100.2:4500 to 203.0.113.1:1024")
		r.Engine.NewMapping(r.mustAdd(outSA(0x1001, 0)), netip.MustParseAddrPort("203.0.113.1:1024"))
		r.want() // not encapsulated
		// Nor is what was when the packet came, and left UDP before the report.
		r.do(func() {
			still := *p
			still.Encap, still.EncrKey = nil, key(20)
			_, err := r.Move(p.SAID, &still)
			r.errno(err, 0)
			r.log = nil
		})
		r.Engine.NewMapping(sa, netip.MustParseAddrPort("203.0.113.1:1025"))
		r.want()
	})
}

// AH and IPComp SAs are added, told of, asked for by policies of several
// transforms, and gone again; what packets grow by is the sum of the bundle.
func TestBundleSAs(t *testing.T) {
	testRig(t, func(r *rig) {
		esp := outSA(0x1000, 7)
		ah := &ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.AH, Dst: esp.Dst, SPI: 0x1000}, Src: esp.Src, Mode: ipsec.Transport, ReqID: 7,
			Auth: alg.IntegAESCMAC, AuthKey: key(16), ReplayWindow: 64}
		comp := &ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.IPComp, Dst: esp.Dst, SPI: 2}, Src: esp.Src, Mode: ipsec.Transport, ReqID: 7}
		base := 0
		for _, p := range []*ipsec.SAParams{esp, ah, comp} {
			i, err := r.add(p, 0)
			r.errno(err, 0)
			if i == nil || i.State != keysock.Mature || i.Proto != p.Proto {
				r.Errorf("got %+v", i)
			}
			if p == esp {
				base = r.InnerMTU(1500)
			}
		}
		if got := r.InnerMTU(1500); got != base-24 {
			r.Errorf("MTU %d with AH, %d without, want 24 less", got, base)
		}
		i, err := r.Get(ah.SAID, ah.Src)
		r.errno(err, 0)
		if i.Auth != alg.IntegAESCMAC || i.AuthKey.Len() != 16 {
			r.Errorf("got %v with a key of %d octets", i.Auth, i.AuthKey.Len())
		}
		for _, proto := range []ipsec.Protocol{ipsec.AH, ipsec.IPComp, ipsec.ESP} {
			if !r.Flush(proto) {
				r.Errorf("no %v to flush", proto)
			}
		}
		if r.o.SAD.Len() != 0 || r.InnerMTU(1500) != 1500 || len(r.overhead) != 0 {
			r.Errorf("%d SAs, MTU %d are left", r.o.SAD.Len(), r.InnerMTU(1500))
		}
	})
}

// Each SA of a bundle that is missing is asked for, with its own protocol,
// addresses and, where they are its, algorithms.
func TestBundleAcquire(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelUnique, 9)
		p.Requests = append(p.Requests, ipsec.Request{Proto: ipsec.AH, Mode: ipsec.Transport, Level: ipsec.LevelUnique, ReqID: 9})
		p.Proposals = []ipsec.Proposal{{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA256, AH: alg.IntegHMACSHA1}}
		i, err := r.policyAdd(1, p)
		r.errno(err, 0)
		e := r.o.SPD.Edit().Get(i.ID)
		q := p.Requests[0]
		for _, proto := range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
			k := sad.OutKey{Proto: proto, Mode: ipsec.Tunnel, ReqID: 9, Src: q.Src, Dst: q.Dst}
			if proto == ipsec.AH {
				k.Mode = ipsec.Transport
			}
			r.NeedSA(e, k, ipsec.Flow{})
		}
		if len(r.pending) != 2 {
			r.Errorf("%d pending, want 2", len(r.pending))
		}
		if got := r.offer(e, &e.P.Requests[0], sad.OutKey{}, ipsec.Flow{}); len(got) != 1 || got[0] != (ipsec.Proposal{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA256}) {
			r.Errorf("ESP asked for with %v", got)
		}
		if got := r.offer(e, &e.P.Requests[1], sad.OutKey{}, ipsec.Flow{}); len(got) != 1 || got[0] != (ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA1}) {
			r.Errorf("AH asked for with %v", got)
		}
	})
}

// TestChoiceAcquire: where alternatives differ in their transforms all of them
// are offered, until the SA that came tells which one it is; then what that one
// lacks. An SA of another protocol answers, if it was offered.
func TestChoiceAcquire(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelUnique, 9)
		espOrAH(func(p *ipsec.Policy) {
			p.Proposals = append([]ipsec.Proposal{{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESGCM16, AH: alg.IntegHMACSHA1}}, p.Proposals...)
			p.Proposals[1].Encr, p.Proposals[1].Auth = alg.EncrAESCBC, alg.IntegHMACSHA256
			p.Requests[1].ReqID = 10
		})(p)
		i, err := r.policyAdd(1, p)
		r.errno(err, 0)
		e := r.o.SPD.Edit().Get(i.ID)
		q := p.Requests[0]
		esp := sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 9, Src: q.Src, Dst: q.Dst}
		ah := esp
		ah.Proto, ah.ReqID = ipsec.AH, 10
		if got := r.offer(e, &e.P.Requests[0], esp, ipsec.Flow{}); !slices.Equal(got, p.Proposals) {
			r.Errorf("offered first: %v", got)
		}
		r.NeedSA(e, esp, ipsec.Flow{})
		seq := r.pending[wanted{OutKey: esp}].seq
		sa := outSA(0x1001, 10)
		sa.Proto, sa.Encr, sa.EncrKey, sa.Auth, sa.AuthKey = ipsec.AH, alg.EncrNone, ipsec.Key{}, alg.IntegHMACSHA256, key(32)
		_, err = r.add(sa, seq)
		r.errno(err, 0)
		if len(r.pending) != 0 {
			r.Error("AH, which was offered, does not answer")
		}
		r.mustAdd(outSA(0x1002, 9))
		if got, want := r.offer(e, &e.P.Requests[1], ah, ipsec.Flow{}), []ipsec.Proposal{{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA1}}; !slices.Equal(got, want) {
			r.Errorf("with ESP in place: offered %v, want %v", got, want)
		}
	})
}

// TestIdle: an SA that goes unused is dying, which is told each time, works on,
// and is mature again once it is used.
func TestIdle(t *testing.T) {
	const s = time.Second
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 0)
		p.Idle = ipsec.Idle{AddTime: 20 * s, UseTime: 8 * s}
		sa := r.mustAdd(p)
		state := func(want sad.State) {
			r.Helper()
			if got := sa.State(); got != want {
				r.Errorf("state %v, want %v", got, want)
			}
		}
		r.after(20*s - 1)
		state(sad.Mature)
		r.want()
		r.after(1)
		r.want("soft expire 0x00001000 dying")
		r.after(time.Minute)
		state(sad.Dying)
		r.want() // once
		// Used again, it is mature soon, and idle so long after the last use.
		sa.Account(1, 1, time.Now())
		r.after(3 * s)
		state(sad.Mature)
		sa.Account(1, 1, time.Now())
		r.after(8*s - 1)
		state(sad.Mature)
		r.want()
		r.after(1)
		state(sad.Dying)
		r.want("soft expire 0x00001000 dying")
		// A soft limit that it meets while it is idle counts, and stays.
		q := outSA(0x1000, 0)
		q.Idle, q.Soft = p.Idle, ipsec.Lifetime{AddTime: time.Since(sa.Created()) + 10*s}
		if _, err := r.update(q, 0); err != nil {
			r.Fatal(err)
		}
		state(sad.Mature)
		r.after(0)
		state(sad.Dying) // idle still
		r.want("soft expire 0x00001000 dying")
		r.after(10 * s)
		r.want("soft expire 0x00001000 dying")
		sa.Account(1, 1, time.Now())
		r.after(time.Minute)
		state(sad.Dying)
		r.want()
		// Of limits alone the last counts.
		q = outSA(0x1000, 0)
		if _, err := r.update(q, 0); err != nil {
			r.Fatal(err)
		}
		r.after(time.Hour)
		state(sad.Mature)
		r.want()
		if len(r.timers) != 0 {
			r.Errorf("%d timers left", len(r.timers))
		}
	})
	// The first use begins the time for use, long before the time without.
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 0)
		p.Idle = ipsec.Idle{AddTime: time.Hour, UseTime: 2 * s}
		sa := r.mustAdd(p)
		r.after(5 * s)
		sa.Account(1, 1, time.Now())
		r.after(2*s - 1)
		r.want()
		r.after(1)
		r.want("soft expire 0x00001000 dying")
		// One use in the middle of a long silence is seen.
		r.after(time.Minute + s/2)
		sa.Account(1, 1, time.Now())
		r.after(s)
		if sa.State() != sad.Mature {
			r.Errorf("used, and %v", sa.State())
		}
		r.after(s)
		r.want("soft expire 0x00001000 dying")
	})
	// Without a limit for use, one packet is enough for ever.
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 0)
		p.Idle = ipsec.Idle{AddTime: 20 * s}
		sa := r.mustAdd(p)
		sa.Account(1, 1, time.Now())
		r.after(time.Hour)
		if sa.State() != sad.Mature {
			r.Errorf("state %v", sa.State())
		}
		r.want()
	})
}

// TestLastSeq: an SA begins behind the number that it is given, and tells the one
// it has come to.
func TestLastSeq(t *testing.T) {
	testRig(t, func(r *rig) {
		p := outSA(0x1000, 0)
		p.LastSeq = 1 << 20
		sa := r.mustAdd(p)
		if n, ok := sa.NextSeq(3); n != 1<<20+1 || !ok {
			r.Errorf("first number %d, %v", n, ok)
		}
		i, err := r.Get(p.SAID, netip.Addr{})
		if err != nil || i.LastSeq != 1<<20+3 {
			r.Errorf("last number %d, %v", i.LastSeq, err)
		}
		if _, ok := sa.Window.Check(1 << 20); ok {
			r.Error("a number that counts as used is taken")
		}
		for spi, bad := range map[ipsec.SPI]func(p *ipsec.SAParams){
			0x2000: func(p *ipsec.SAParams) { p.LastSeq = 1<<32 - 1 },
			0x2001: func(p *ipsec.SAParams) { p.LastSeq = 1 << 40 },
			0x2002: func(p *ipsec.SAParams) { p.LastSeq, p.ESN = 1<<64-1, true },
		} {
			p := outSA(spi, 0)
			bad(p)
			_, err := r.add(p, 0)
			r.errno(err, syscall.EINVAL)
		}
		p = outSA(0x2003, 0)
		p.LastSeq, p.ESN = 1<<40, true
		if n, ok := r.mustAdd(p).NextSeq(1); n != 1<<40+1 || !ok {
			r.Errorf("first number of 64 bits %d, %v", n, ok)
		}
		p = outSA(0x2004, 0)
		p.LastSeq = 1<<32 - 2
		last := r.mustAdd(p)
		if n, ok := last.NextSeq(1); n != 1<<32-1 || !ok {
			r.Errorf("last number %d, %v", n, ok)
		}
		if soft, _ := last.Account(1, 1, time.Now()); !soft {
			r.Error("no soft limit at the end of the numbers")
		}
		if _, ok := last.NextSeq(1); ok {
			r.Error("the counter cycles")
		}
	})
}
