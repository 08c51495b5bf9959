package keyengine

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

func inbound(src string, a ipsec.Action) *ipsec.Policy {
	return &ipsec.Policy{Dir: ipsec.In, Action: a, Sel: ipsec.Selector{Src: netip.MustParsePrefix(src), Dst: netip.MustParsePrefix("10.1.0.0/16")}}
}

// espOrAH makes a policy of two alternatives that differ in their protocol.
func espOrAH(edit func(p *ipsec.Policy)) func(p *ipsec.Policy) {
	return func(p *ipsec.Policy) {
		p.Requests = append(p.Requests, p.Requests[0])
		p.Requests[1].Proto = ipsec.AH
		p.Proposals = append(p.Proposals, ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA256})
		for i := range p.Requests {
			p.Requests[i].Level = ipsec.LevelUnique
		}
		edit(p)
	}
}

func TestPolicyChecks(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(p *ipsec.Policy)
		want syscall.Errno
	}{
		{"good", func(p *ipsec.Policy) {}, 0},
		{"discard", func(p *ipsec.Policy) { p.Action, p.Requests = ipsec.Discard, nil }, 0},
		{"type", func(p *ipsec.Policy) { p.Action = 3 }, syscall.EINVAL},
		{"direction", func(p *ipsec.Policy) { p.Dir = 0 }, syscall.EINVAL},
		{"families", func(p *ipsec.Policy) { p.Sel.Src = netip.MustParsePrefix("::/0") }, syscall.EINVAL},
		{"no request", func(p *ipsec.Policy) { p.Requests = nil }, syscall.EINVAL},
		{"seven requests", func(p *ipsec.Policy) { p.Requests = make([]ipsec.Request, 7) }, syscall.ELOOP},
		{"two requests", func(p *ipsec.Policy) { p.Requests = append(p.Requests, p.Requests[0]) }, 0},
		{"three requests", func(p *ipsec.Policy) { p.Requests = append(p.Requests, p.Requests[0], p.Requests[0]) }, syscall.EPROTONOSUPPORT},
		{"AH", func(p *ipsec.Policy) {
			p.Requests[0].Proto, p.Proposals = ipsec.AH, []ipsec.Proposal{{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA256}}
		}, 0},
		{"AH with algorithms of ESP", func(p *ipsec.Policy) { p.Requests[0].Proto = ipsec.AH }, syscall.EINVAL},
		{"ESP with algorithms of AH", func(p *ipsec.Policy) { p.Proposals[0] = ipsec.Proposal{Shape: ipsec.ShapeAH} }, syscall.EINVAL},
		{"unknown shape", func(p *ipsec.Policy) { p.Proposals[0].Shape = 3 }, syscall.EINVAL},
		{"ESP in AH", func(p *ipsec.Policy) {
			p.Proposals[0].Shape = ipsec.ShapeAHESP
			p.Requests = append(p.Requests, ipsec.Request{Proto: ipsec.AH, Mode: ipsec.Transport})
		}, 0},
		{"ESP in AH, AH in no alternative", func(p *ipsec.Policy) {
			p.Requests = append(p.Requests, ipsec.Request{Proto: ipsec.AH, Mode: ipsec.Transport})
		}, syscall.EINVAL},
		{"ESP or AH", espOrAH(func(*ipsec.Policy) {}), 0},
		{"ESP or AH of level require", espOrAH(func(p *ipsec.Policy) { p.Requests[1].Level = ipsec.LevelRequire }), syscall.EINVAL},
		{"ESP or AH of two modes", espOrAH(func(p *ipsec.Policy) { p.Requests[1].Mode = ipsec.Transport }), syscall.EINVAL},
		{"ESP or AH with other end points", espOrAH(func(p *ipsec.Policy) { p.Requests[1].Dst = self }), syscall.EINVAL},
		{"IPComp in ESP or AH", espOrAH(func(p *ipsec.Policy) {
			p.Requests = append([]ipsec.Request{{Proto: ipsec.IPComp, Mode: ipsec.Transport}}, p.Requests...)
		}), syscall.EINVAL},
		{"ESP twice, or ESP in AH", espOrAH(func(p *ipsec.Policy) { p.Requests[1].Proto = ipsec.ESP }), syscall.EINVAL},
		{"IPComp in ESP in AH, any algorithms", func(p *ipsec.Policy) {
			p.Proposals = nil
			p.Requests = append(p.Requests, ipsec.Request{Proto: ipsec.AH, Mode: ipsec.Transport})
		}, 0},
		{"IPComp in ESP in AH", func(p *ipsec.Policy) {
			p.Proposals[0].Shape = ipsec.ShapeAHESP
			p.Requests = []ipsec.Request{{Proto: ipsec.IPComp, Mode: ipsec.Transport}, p.Requests[0], {Proto: ipsec.AH, Mode: ipsec.Transport}}
		}, 0},
		{"ESP in IPComp", func(p *ipsec.Policy) {
			p.Requests = append(p.Requests, ipsec.Request{Proto: ipsec.IPComp, Mode: ipsec.Transport})
		}, syscall.EPROTONOSUPPORT},
		{"IPComp", func(p *ipsec.Policy) {
			p.Requests[0].Proto, p.Requests[0].Mode, p.Proposals = ipsec.IPComp, ipsec.Transport, nil
		}, 0},
		{"IPComp tunnel alone", func(p *ipsec.Policy) { p.Requests[0].Proto = ipsec.IPComp }, syscall.EPROTONOSUPPORT},
		{"IPComp tunnel in ESP", func(p *ipsec.Policy) {
			p.Requests[0].Proto = ipsec.IPComp
			p.Requests = append(p.Requests, ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Transport})
		}, 0},
		{"protocol", func(p *ipsec.Policy) { p.Requests[0].Proto = 6 }, syscall.EINVAL},
		{"mode 0", func(p *ipsec.Policy) { p.Requests[0].Mode = 0 }, syscall.EINVAL},
		{"mode 3", func(p *ipsec.Policy) { p.Requests[0].Mode = 3 }, syscall.EINVAL},
		{"level", func(p *ipsec.Policy) { p.Requests[0].Level = 4 }, syscall.EINVAL},
		{"tunnel without addresses", func(p *ipsec.Policy) { p.Requests[0].Src = netip.Addr{} }, syscall.EINVAL},
		{"tunnel of two families", func(p *ipsec.Policy) { p.Requests[0].Src = self6 }, syscall.EINVAL},
		{"outbound tunnel at level use", func(p *ipsec.Policy) { p.Requests[0].Level = ipsec.LevelUse }, syscall.EINVAL},
		{"transport at level use", func(p *ipsec.Policy) { p.Requests[0].Level, p.Requests[0].Mode = ipsec.LevelUse, ipsec.Transport }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			testRig(t, func(r *rig) {
				p := tunnel(ipsec.LevelRequire, 0)
				c.edit(p)
				_, err := r.policyAdd(1, p)
				r.errno(err, c.want)
				if (r.o.SPD.Len() == 1) != (c.want == 0) {
					r.Errorf("%d policies", r.o.SPD.Len())
				}
			})
		})
	}
}

func TestPolicyLife(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelDefault, 0)
		i, err := r.policyAdd(1, p)
		r.errno(err, 0)
		if i.ID == 0 || i.ID&7 != 1 || i.Requests[0].Level != ipsec.LevelRequire || i.Requests[0].ReqID != 0 || p.Requests[0].Level != ipsec.LevelDefault {
			r.Errorf("got %+v", i)
		}
		_, err = r.policyAdd(2, p)
		r.errno(err, syscall.EEXIST)
		r.do(func() {
			q := *p
			q.Priority = 5
			u, err := r.UpdatePolicy(2, &q)
			r.errno(err, 0)
			if u.ID != i.ID || u.Priority != 5 {
				r.Errorf("update: got %+v", u)
			}
			g, err := r.GetPolicy(3, i.ID)
			r.errno(err, 0)
			if g.Priority != 5 || g.Added.IsZero() || !g.LastUsed.IsZero() {
				r.Errorf("get: got %+v", g)
			}
			_, err = r.GetPolicy(3, i.ID+8)
			r.errno(err, syscall.ENOENT)
			_, err = r.DeletePolicy(3, ipsec.In, p.Sel)
			r.errno(err, syscall.ENOENT)
			d, err := r.DeletePolicy(3, ipsec.Out, p.Sel)
			r.errno(err, 0)
			if d.ID != i.ID {
				r.Errorf("delete: got %+v", d)
			}
			_, err = r.DeletePolicyID(3, i.ID)
			r.errno(err, syscall.ENOENT)
			if r.FlushPolicies(3) {
				r.Error("flushed nothing, and says something")
			}
		})
		r.want()
	})
}

func TestReqIDs(t *testing.T) {
	testRig(t, func(r *rig) {
		n := 0
		give := func(level ipsec.Level, reqid ipsec.ReqID) (*ipsec.Policy, ipsec.ReqID) {
			p := tunnel(level, reqid)
			n++
			p.Sel.DstPort, p.Sel.Proto = uint16(n), 6
			i, err := r.policyAdd(1, p)
			r.errno(err, 0)
			return p, i.Requests[0].ReqID
		}
		for _, c := range []struct {
			level       ipsec.Level
			reqid, want ipsec.ReqID
		}{
			{ipsec.LevelUnique, 7, 7}, {ipsec.LevelUnique, 0, 0x4000}, {ipsec.LevelUnique, 0x4001, 0x4001},
			{ipsec.LevelUnique, 0, 0x4002}, {ipsec.LevelRequire, 9, 9}, {ipsec.LevelRequire, 0, 0},
		} {
			if _, got := give(c.level, c.reqid); got != c.want {
				r.Errorf("level %d reqid %#x: got %#x, want %#x", c.level, c.reqid, got, c.want)
			}
		}
		p, got := give(ipsec.LevelUnique, 0)
		r.do(func() {
			if i, err := r.UpdatePolicy(1, p); err != nil || i.Requests[0].ReqID != got {
				r.Errorf("update: got %v, %v, want reqid %#x", i, err, got)
			}
		})
	})
}

func TestTransaction(t *testing.T) {
	testRig(t, func(r *rig) {
		r.policyAdd(1, inbound("10.2.0.0/16", ipsec.Discard))
		r.want("divert +[10.2.0.0/16] -[] = [10.2.0.0/16], 0 policies")
		r.do(func() {
			r.errno(r.Begin(1), 0)
			r.errno(r.Begin(1), syscall.EBUSY)
			r.errno(r.Begin(2), syscall.EBUSY)
			r.errno(r.Commit(2), syscall.EINVAL)
			if !r.FlushPolicies(1) {
				r.Error("flush")
			}
			i, err := r.AddPolicy(1, inbound("10.3.0.0/16", ipsec.Discard))
			r.errno(err, 0)
			if len(r.Policies(1)) != 1 || len(r.Policies(2)) != 1 || r.Policies(2)[0].Sel.Src.String() != "10.2.0.0/16" {
				r.Errorf("got %v and %v", r.Policies(1), r.Policies(2))
			}
			_, err = r.GetPolicy(2, i.ID)
			r.errno(err, syscall.ENOENT)
			_, err = r.GetPolicy(1, i.ID)
			r.errno(err, 0)
			_, err = r.AddPolicy(2, inbound("10.4.0.0/16", ipsec.Discard))
			r.errno(err, syscall.EBUSY)
		})
		r.want()
		r.do(func() { r.errno(r.Commit(1), 0) })
		// Growing before the swap, shrinking after it.
		r.want("divert +[10.3.0.0/16] -[] = [10.2.0.0/16 10.3.0.0/16], 1 policies", "divert +[] -[10.2.0.0/16] = [10.3.0.0/16], 1 policies")
		r.do(func() {
			r.errno(r.Commit(1), syscall.EINVAL)
			r.Begin(1)
			r.FlushPolicies(1)
			r.errno(r.Abort(1), 0)
			r.errno(r.Abort(1), syscall.EINVAL)
			if len(r.Policies(1)) != 1 {
				r.Error("abort left something")
			}
			// Who flushes during a transaction makes it void.
			r.Begin(1)
			r.AddPolicy(1, inbound("10.5.0.0/16", ipsec.Discard))
			if !r.FlushPolicies(2) {
				r.Error("flush during a transaction")
			}
			r.errno(r.Commit(1), syscall.EBUSY)
		})
		r.log = nil
		if r.o.SPD.Len() != 0 {
			r.Errorf("%d policies, want 0", r.o.SPD.Len())
		}
	})
}

func TestDivertFails(t *testing.T) {
	testRig(t, func(r *rig) {
		r.divertErr = errors.New("nft says no")
		_, err := r.policyAdd(1, inbound("10.2.0.0/16", ipsec.Discard))
		r.errno(err, syscall.EIO)
		if r.o.SPD.Len() != 0 || len(r.o.SPD.Edit().All()) != 0 {
			r.Error("the policy is there")
		}
		_, err = r.policyAdd(1, inbound("10.2.0.0/16", ipsec.Bypass)) // diverts nothing
		r.errno(err, 0)
		r.divertErr = nil
		r.do(func() {
			_, err := r.UpdatePolicy(1, inbound("10.2.0.0/16", ipsec.Discard))
			r.errno(err, 0)
		})
		r.log = nil
		r.divertErr = errors.New("nft says no")
		r.do(func() {
			if !r.FlushPolicies(1) {
				r.Error("shrinking failed")
			}
		})
		r.want("divert +[] -[10.2.0.0/16] = [], 0 policies")
	})
}

func TestPolicyLifetime(t *testing.T) {
	testRig(t, func(r *rig) {
		p := tunnel(ipsec.LevelRequire, 0)
		p.Hard = ipsec.Lifetime{AddTime: time.Minute, UseTime: 20 * time.Second}
		i, err := r.policyAdd(1, p)
		r.errno(err, 0)
		e := r.o.SPD.Edit().Get(i.ID)
		r.after(15 * time.Second)
		e.Hit(time.Now(), 1)
		r.after(15 * time.Second) // 30 s
		e.Hit(time.Now(), 1)
		r.after(20*time.Second - 1)
		if r.o.SPD.Len() != 1 {
			r.Error("gone too early")
		}
		r.after(1)
		if r.o.SPD.Len() != 0 || len(r.polTimer) != 0 {
			r.Error("unused for 20 s and still there")
		}
		r.do(func() {
			if want := fmt.Sprintf("policy %d expired", i.ID); !slices.Contains(r.log, want) {
				r.Errorf("%q is not in %q", want, r.log)
			}
		})
		// During a transaction it waits for the end.
		r.do(func() {
			r.Begin(1)
			p.Hard = ipsec.Lifetime{AddTime: 10 * time.Second}
			r.AddPolicy(1, p)
			r.errno(r.Commit(1), 0)
			r.Begin(1)
		})
		r.after(12 * time.Second)
		if r.o.SPD.Len() != 1 {
			r.Error("removed during a transaction")
		}
		r.do(func() { r.Abort(1) })
		r.after(time.Second)
		if r.o.SPD.Len() != 0 {
			r.Error("still there after the transaction")
		}
	})
}

func TestPoliciesOrder(t *testing.T) {
	testRig(t, func(r *rig) {
		for k, prio := range []uint32{5, 1, 5, 0} {
			p := inbound(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(k), 0, 0}), 16).String(), ipsec.Discard)
			p.Priority = prio
			r.policyAdd(1, p)
		}
		var got []string
		r.do(func() {
			for _, p := range r.Policies(1) {
				got = append(got, p.Sel.Src.String())
			}
		})
		want := []string{"10.3.0.0/16", "10.1.0.0/16", "10.0.0.0/16", "10.2.0.0/16"}
		for k := range want {
			if k >= len(got) || got[k] != want[k] {
				r.Fatalf("got %v, want %v", got, want)
			}
		}
	})
}

// Flags are for policies that protect.
func TestPolicyFlags(t *testing.T) {
	testRig(t, func(r *rig) {
		p := inbound("10.2.0.0/16", ipsec.Bypass)
		p.Flags = ipsec.PolicyClear
		if _, err := r.policyAdd(1, p); !errors.Is(err, syscall.EINVAL) {
			r.Errorf("got %v, want EINVAL", err)
		}
		q := tunnel(ipsec.LevelUnique, 0)
		q.Flags = ipsec.PolicyClear | ipsec.PolicyManual
		if i, err := r.policyAdd(1, q); err != nil || i.Flags != q.Flags {
			r.Errorf("got %v, flags %d, want %d", err, i.Flags, q.Flags)
		}
	})
}

// Whatever changes the policies in force is told of once, and nothing else.
func TestPoliciesHook(t *testing.T) {
	testRig(t, func(r *rig) {
		var told []bool
		r.do(func() { r.o.Policies = func(_ []spd.Change, batch bool) { told = append(told, batch) } })
		want := func(what string, l ...bool) {
			r.Helper()
			r.do(func() {
				if !slices.Equal(told, l) {
					r.Errorf("%s: told %v, want %v", what, told, l)
				}
				told = nil
			})
		}
		p := inbound("10.2.0.0/16", ipsec.Discard)
		r.policyAdd(1, p)
		want("add", false)
		r.policyAdd(1, p)
		want("add what is there")
		q := tunnel(ipsec.LevelUnique, 9)
		r.do(func() {
			r.Begin(1)
			r.AddPolicy(1, q)
			r.DeletePolicy(1, p.Dir, p.Sel)
		})
		want("within a transaction")
		r.do(func() { r.Abort(1) })
		want("aborted")
		r.do(func() {
			r.Begin(1)
			r.AddPolicy(1, q)
			r.errno(r.Commit(1), 0)
		})
		want("commit", true)
		r.do(func() {
			r.errno(r.Migrate(&keysock.Migration{Dir: q.Dir, Sel: q.Sel, Moves: []keysock.Move{{
				Proto: ipsec.ESP, Mode: ipsec.Tunnel, OldSrc: q.Requests[0].Src, OldDst: q.Requests[0].Dst, NewSrc: self6, NewDst: peer6,
			}}}), 0)
		})
		want("migrate", false)
		p.Hard = ipsec.Lifetime{AddTime: 10 * time.Second}
		r.do(func() { r.UpdatePolicy(1, p) })
		want("update", false)
		r.after(11 * time.Second)
		want("expiry", false)
		r.do(func() { r.FlushPolicies(1) })
		want("flush", true)
		r.do(func() { r.FlushPolicies(1) })
		want("flush of nothing")
	})
}
