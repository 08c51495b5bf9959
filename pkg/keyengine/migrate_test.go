package keyengine

import (
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

var elsewhere = netip.MustParseAddr("203.0.113.7")

// move is that of an outbound tunnel to other end points.
func move(reqid ipsec.ReqID, src, dst netip.Addr) keysock.Move {
	return keysock.Move{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: reqid, OldSrc: self, OldDst: peer, NewSrc: src, NewDst: dst}
}

func (r *rig) migrate(moves ...keysock.Move) (err error) {
	p := tunnel(ipsec.LevelUnique, 7)
	r.do(func() { err = r.Migrate(&keysock.Migration{Dir: p.Dir, Sel: p.Sel, Moves: moves}) })
	return err
}

func TestMigrate(t *testing.T) {
	for _, tt := range []struct {
		name     string
		src, dst netip.Addr
		overhead bool // changes
	}{
		{"peer moves", self, elsewhere, false},
		{"we move", elsewhere, peer, false},
		{"both move", elsewhere, netip.MustParseAddr("203.0.113.9"), false},
		{"to IPv6", self6, peer6, true},
		{"nowhere", self, peer, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			testRig(t, func(r *rig) {
				p, err := r.policyAdd(1, tunnel(ipsec.LevelUnique, 7))
				r.errno(err, 0)
				entry := r.o.SPD.Edit().Get(p.ID)
				entry.Hit(time.Now(), 5)
				in := outSA(0x2000, 7)
				in.Src, in.Dst = peer, self
				old, dying := r.mustAdd(outSA(0x1000, 7)), outSA(0x1001, 7)
				dying.Soft.Packets, dying.Hard.AddTime = 1, time.Hour
				r.mustAdd(dying)
				r.mustAdd(in)
				r.mustAdd(outSA(0x1002, 8))
				r.do(func() { r.recs[outSA(0x1001, 7).SAID].sa.SetState(sad.Dying) })
				first, _ := old.NextSeq(10)
				old.Account(10, 1000, time.Now())

				r.errno(r.migrate(move(7, tt.src, tt.dst)), 0)
				key := sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, Src: tt.src, Dst: tt.dst}
				n := r.o.SPD.Edit().Get(p.ID)
				if n == nil || n.P.Requests[0].Src != tt.src || n.P.Requests[0].Dst != tt.dst || n.P.Requests[0].ReqID != 7 {
					t.Fatalf("policy: got %+v", n)
				}
				if !n.Created.Equal(entry.Created) || n.Packets() != 5 || !n.LastUsed().Equal(entry.LastUsed()) {
					t.Errorf("policy: created %v, %d packets, used %v; want %v, 5, %v", n.Created, n.Packets(), n.LastUsed(), entry.Created, entry.LastUsed())
				}
				for _, x := range []struct {
					spi      ipsec.SPI
					src, dst netip.Addr
					state    sad.State
				}{
					{0x1000, tt.src, tt.dst, sad.Mature},
					{0x1001, tt.src, tt.dst, sad.Dying},
					{0x1002, self, peer, sad.Mature}, // another reqid
					{0x2000, peer, self, sad.Mature}, // another direction
				} {
					id := ipsec.SAID{Proto: ipsec.ESP, Dst: x.dst, SPI: x.spi}
					r.do(func() {
						i, err := r.Get(id, x.src)
						if err != nil {
							t.Errorf("%v: %v", id, err)
							return
						}
						if i.Src != x.src || sad.State(i.State) != x.state || i.EncrKey.Len() != 20 {
							t.Errorf("%v: got %+v, want source %v, %v", id, i, x.src, x.state)
						}
						i.Wipe()
					})
					sa := r.o.SAD.Lookup(id)
					if sa == nil || sa.State() != x.state || sa.P.Src != x.src {
						t.Errorf("SAD: %v: got %+v", id, sa)
					}
				}
				if r.o.SAD.Len() != 4 || len(r.recs) != 4 {
					t.Errorf("got %d SAs in the SAD, %d here, want 4", r.o.SAD.Len(), len(r.recs))
				}
				sa := r.o.SAD.Out(key, nil)
				if sa == nil || sa.P.SPI != 0x1000 {
					t.Fatalf("outbound: got %+v", sa)
				}
				if seq, _ := sa.NextSeq(1); seq != first+10 || sa.Packets() != 10 {
					t.Errorf("sequence number %d after %d, %d packets; want %d, 10", seq, first, sa.Packets(), first+10)
				}
				if tt.overhead && r.InnerMTU(1500) > 1460 {
					t.Errorf("MTU %d", r.InnerMTU(1500))
				}
				// The move back finds everything; the SAs still end.
				back := move(7, self, peer)
				back.OldSrc, back.OldDst, back.NewSrc, back.NewDst = tt.src, tt.dst, self, peer
				r.errno(r.migrate(back), 0)
				r.do(func() { r.Flush(0) })
				if r.o.SAD.Len() != 0 || r.first != nil || len(r.spis) != 0 || r.InnerMTU(1500) != 1500 {
					t.Errorf("after FLUSH: %d SAs, %v, MTU %d", r.o.SAD.Len(), r.spis, r.InnerMTU(1500))
				}
			})
		})
	}
}

// What is refused changes nothing.
func TestMigrateRefused(t *testing.T) {
	other := outSA(0x1000, 9)
	other.Dst = elsewhere
	for _, tt := range []struct {
		name  string
		sas   []*ipsec.SAParams
		tx    bool
		dir   ipsec.Direction
		moves []keysock.Move
		want  syscall.Errno
	}{
		{"no policy", nil, false, ipsec.In, []keysock.Move{move(7, self, elsewhere)}, syscall.ENOENT},
		{"another reqid", nil, false, ipsec.Out, []keysock.Move{move(8, self, elsewhere)}, syscall.ENODATA},
		{"other end points", nil, false, ipsec.Out, []keysock.Move{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, OldSrc: self, OldDst: elsewhere, NewSrc: self, NewDst: peer}}, syscall.ENODATA},
		{"another mode", nil, false, ipsec.Out, []keysock.Move{{Proto: ipsec.ESP, Mode: ipsec.Transport, OldSrc: self, OldDst: peer, NewSrc: self, NewDst: elsewhere}}, syscall.ENODATA},
		{"place is taken", []*ipsec.SAParams{other}, false, ipsec.Out, []keysock.Move{move(7, self, elsewhere)}, syscall.EEXIST},
		{"transaction", nil, true, ipsec.Out, []keysock.Move{move(7, self, elsewhere)}, syscall.EBUSY},
	} {
		t.Run(tt.name, func(t *testing.T) {
			testRig(t, func(r *rig) {
				p := tunnel(ipsec.LevelUnique, 7)
				_, err := r.policyAdd(1, p)
				r.errno(err, 0)
				r.mustAdd(outSA(0x1000, 7))
				for _, o := range tt.sas {
					q := *o
					q.EncrKey = key(20)
					r.mustAdd(&q)
				}
				gen, polGen := r.o.SAD.Generation(), r.o.SPD.Generation()
				if tt.tx {
					r.do(func() { r.errno(r.Begin(1), 0) })
				}
				r.do(func() { err = r.Migrate(&keysock.Migration{Dir: tt.dir, Sel: p.Sel, Moves: tt.moves}) })
				r.errno(err, tt.want)
				if r.o.SAD.Generation() != gen || r.o.SPD.Generation() != polGen {
					t.Error("something has changed")
				}
			})
		})
	}
}

// In transport mode a policy has no end points; its SAs move.
func TestMigrateTransport(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelRequire, 0)
		p.Requests[0].Mode, p.Requests[0].Src, p.Requests[0].Dst = ipsec.Transport, netip.Addr{}, netip.Addr{}
		_, err := r.policyAdd(1, p)
		r.errno(err, 0)
		q := outSA(0x1000, 0)
		q.Mode = ipsec.Transport
		r.mustAdd(q)
		v := move(0, self, elsewhere)
		v.Mode = ipsec.Transport
		r.errno(r.migrate(v), 0)
		if r.o.SAD.Lookup(ipsec.SAID{Proto: ipsec.ESP, Dst: elsewhere, SPI: 0x1000}) == nil || r.o.SAD.Len() != 1 {
			t.Error("the SA has not moved")
		}
	})
}

// A packet that waits for an SA at the new place goes when one has moved there.
func TestMigrateReleasesHeldPackets(t *testing.T) {
	testRig(t, func(r *rig) {
		_, err := r.policyAdd(1, tunnel(ipsec.LevelUnique, 7))
		r.errno(err, 0)
		r.mustAdd(outSA(0x1000, 7))
		r.log = nil
		r.errno(r.migrate(move(7, self, elsewhere)), 0)
		r.want("installed 192.0.2.1->203.0.113.7 reqid 7", "installed 192.0.2.1->203.0.113.7 reqid 0")
	})
}

// One SA of several with the same reqid moves, with its sequence numbers.
func TestMove(t *testing.T) {
	testRig(t, func(r *rig) {
		udp := func(spi ipsec.SPI, port uint16) *ipsec.SAParams {
			p := outSA(spi, 7)
			p.Encap = &ipsec.Encap{SPort: 4500, DPort: port}
			return p
		}
		old := r.mustAdd(udp(0x1000, 1024))
		r.mustAdd(udp(0x1001, 1025))
		first, _ := old.NextSeq(10)
		move := func(id ipsec.SAID, p *ipsec.SAParams) (err error) {
			r.do(func() { _, err = r.Move(id, p) })
			return err
		}
		to := udp(0x1000, 2048)
		to.Dst = elsewhere
		r.errno(move(old.P.SAID, to), 0)
		got := r.o.SAD.Lookup(ipsec.SAID{Proto: ipsec.ESP, Dst: elsewhere, SPI: 0x1000})
		if got == nil || got.P.Encap.DPort != 2048 || got.State() != sad.Mature || r.o.SAD.Lookup(old.P.SAID) != nil {
			t.Fatalf("moved SA: %+v", got)
		}
		if next, _ := got.NextSeq(1); next != first+10 {
			t.Errorf("sequence number %d follows %d and nine more", next, first)
		}
		// Away from home it is known by what policy names, and may leave UDP.
		away := outSA(0x1000, 7)
		away.Src, away.Dst, away.Home = self6, peer6, &ipsec.Ends{Src: self, Dst: elsewhere}
		r.errno(move(got.P.SAID, away), 0)
		key := sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, Src: self, Dst: elsewhere}
		if is := r.o.SAD.Out(key, nil); is == nil || is.P.Dst != peer6 || is.P.Encap != nil || is.Counters != got.Counters {
			t.Errorf("away: %+v", is)
		}
		stays := r.o.SAD.Lookup(outSA(0x1001, 7).SAID)
		if stays == nil || stays.P.Encap.DPort != 1025 {
			t.Errorf("the other: %+v", stays)
		}
		// Its place is taken; it is not there; it is another SA.
		taken := udp(0x1001, 1)
		taken.Dst = elsewhere
		r.mustAdd(taken)
		q := udp(0x1001, 1)
		q.Dst = elsewhere
		r.errno(move(outSA(0x1001, 7).SAID, q), syscall.EEXIST)
		r.errno(move(outSA(0x1009, 7).SAID, udp(0x1009, 1)), syscall.ESRCH)
		other := udp(0x1001, 1)
		other.EncrKey = ipsec.NewKey(make([]byte, 20))
		r.errno(move(outSA(0x1001, 7).SAID, other), syscall.EINVAL)
	})
}
