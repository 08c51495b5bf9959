package keyengine

import (
	"slices"
	"syscall"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// relocation is an SA on its way to other end points.
type relocation struct {
	r       *record
	was, is *sad.SA
}

// Migrate implements keysock.Backend. The policy keeps its ID and place, SAs
// their SPI, keys, counters and limits. SAs whose destination changes are at
// both places until the policy is at the new one; others are out of the SAD for
// a moment, in which a packet that arrives is lost and one that leaves waits.
func (e *Engine) Migrate(m *keysock.Migration) error {
	defer e.arm()
	if e.tx != nil {
		return refuse(syscall.EBUSY, "a transaction is open")
	}
	ed := e.o.SPD.Edit()
	old := ed.Find(m.Dir, m.Sel)
	if old == nil {
		return refuse(syscall.ENOENT, "no such policy")
	}
	p := old.P
	p.Requests = slices.Clone(p.Requests)
	if !moveRequests(p.Requests, m.Moves) {
		return refuse(syscall.ENODATA, "no request of the policy fits")
	}
	l, err := e.relocations(m.Moves)
	if err != nil {
		return err
	}
	n, _, err := ed.Update(&p, old.Created)
	if err != nil {
		ed.Abort()
		return policyError(err)
	}
	for _, v := range l {
		if v.is.P.SAID != v.was.P.SAID {
			e.o.SAD.Insert(v.is) // nothing else has the SAID, as relocations has seen
		}
	}
	if err := e.commit(ed, false); err != nil {
		for _, v := range l {
			if v.is.P.SAID != v.was.P.SAID {
				v.remove(e.o.SAD, v.is)
			}
		}
		return err
	}
	if used := old.LastUsed(); !used.IsZero() {
		n.Hit(used, int(old.Packets()))
	}
	e.watch(n)
	for _, v := range l {
		e.relocate(v)
	}
	return nil
}

// moveRequests gives the requests that fit their new end points.
func moveRequests(l []ipsec.Request, moves []keysock.Move) (any bool) {
	for _, v := range moves {
		for i := range l {
			q := &l[i]
			if q.Proto != v.Proto || q.Mode != v.Mode || v.ReqID != 0 && q.ReqID != v.ReqID {
				continue
			}
			if q.Mode == ipsec.Tunnel {
				if q.Src != v.OldSrc || q.Dst != v.OldDst {
					continue
				}
				q.Src, q.Dst = v.NewSrc, v.NewDst
			}
			any = true
		}
	}
	return any
}

// relocations finds the SAs that move; EEXIST if one would take another's place.
func (e *Engine) relocations(moves []keysock.Move) ([]relocation, error) {
	var l []relocation
	moved, taken := map[*record]bool{}, map[ipsec.SAID]bool{}
	for _, v := range moves {
		if v.OldSrc == v.NewSrc && v.OldDst == v.NewDst {
			continue
		}
		for r := e.first; r != nil; r = r.next {
			p := &r.sa.P
			if moved[r] || p.Proto != v.Proto || p.Mode != v.Mode || v.ReqID != 0 && p.ReqID != v.ReqID || p.Src != v.OldSrc || p.Dst != v.OldDst {
				continue
			}
			id := p.SAID
			id.Dst = v.NewDst
			if taken[id] || id != p.SAID && e.recs[id] != nil {
				return nil, refuse(syscall.EEXIST, "SA exists")
			}
			moved[r], taken[id] = true, true
			is := r.sa.WithEncap(r.sa.P.Encap)
			is.P.Src, is.P.Dst = v.NewSrc, v.NewDst
			l = append(l, relocation{r, r.sa, is})
		}
	}
	return l, nil
}

// remove takes sa, one of the two, out of the SAD without an end of the other,
// with which it shares its state.
func (v *relocation) remove(db *sad.DB, sa *sad.SA) {
	st := sa.State()
	db.Remove(sa)
	sa.SetState(st)
}

// relocate completes a move.
func (e *Engine) relocate(v relocation) {
	r := v.r
	v.remove(e.o.SAD, v.was)
	if v.is.P.SAID == v.was.P.SAID {
		e.o.SAD.Insert(v.is)
	}
	e.mu.Lock()
	delete(e.recs, v.was.P.SAID)
	delete(e.mapped, v.was.P.SAID)
	r.sa = v.is
	e.recs[v.is.P.SAID] = r
	e.mu.Unlock()
	if r.counted {
		e.addOverhead(overheadOf(v.is), 1)
		e.addOverhead(overheadOf(v.was), -1)
	}
	if r.sa.State() == sad.Larval {
		return
	}
	// What the data path told of the SA at its old place may have missed it.
	beyond := func(l ipsec.Lifetime) bool {
		return l.Packets != 0 && r.sa.Packets() > l.Packets || l.Bytes != 0 && r.sa.Bytes() > l.Bytes
	}
	if beyond(r.life.Hard) {
		e.hard(r)
		return
	}
	if beyond(r.life.Soft) {
		e.soft(r)
	}
	e.answered(r, 0)
}

// Move implements keysock.Mover. An SA whose destination stays is out of the SAD
// for a moment, as in Migrate. UDP encapsulation may come or go, as the new path
// has a NAT or has none.
func (e *Engine) Move(id ipsec.SAID, p *ipsec.SAParams) (*keysock.SAInfo, error) {
	defer e.arm()
	defer p.Wipe()
	r := e.recs[id]
	switch {
	case r == nil || r.sa.State() == sad.Larval:
		return nil, refuse(syscall.ESRCH, "no such SA")
	case e.tx != nil:
		return nil, refuse(syscall.EBUSY, "a transaction is open")
	case p.SAID != id && e.recs[p.SAID] != nil:
		return nil, refuse(syscall.EEXIST, "SA exists")
	case p.Dst.BitLen() != id.Dst.BitLen() && p.Mode != ipsec.Tunnel:
		return nil, refuse(syscall.EINVAL, "an SA in transport mode keeps its family")
	}
	q := r.params()
	if err := sameSA(&q, p); err != nil {
		return nil, err
	}
	if err := e.check(p); err != nil {
		return nil, err
	}
	is := r.sa.WithEncap(p.Encap)
	is.P.Src, is.P.Dst, is.P.Home = p.Src, p.Dst, p.Home
	if p.SAID != id {
		e.o.SAD.Insert(is)
	}
	e.relocate(relocation{r, r.sa, is})
	return r.info(), nil
}
