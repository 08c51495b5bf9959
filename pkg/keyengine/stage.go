package keyengine

import (
	"syscall"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// staged are the changes of SAs in a transaction, checked as far as others do
// not interfere.
type staged struct {
	by    map[ipsec.SAID]*stagedSA
	order []*stagedSA
}

// stagedSA is what happens to the SA of one SAID: the old one goes, a new one
// comes, both, or limits change.
type stagedSA struct {
	id     ipsec.SAID
	old    *record         // goes
	p      *ipsec.SAParams // comes, or, without sa, changes limits and ports
	sa     *sad.SA
	change *record // whose limits change
}

func (s *staged) wipe() {
	for _, c := range s.order {
		if c.p != nil {
			c.p.Wipe()
		}
	}
}

func (s *staged) at(id ipsec.SAID) *stagedSA {
	c := s.by[id]
	if c == nil {
		if s.by == nil {
			s.by = map[ipsec.SAID]*stagedSA{}
		}
		c = &stagedSA{id: id}
		s.by[id], s.order = c, append(s.order, c)
	}
	return c
}

// StageSA implements keysock.Backend.
func (e *Engine) StageSA(conn uint64, c keysock.SAChange) (*keysock.SAInfo, error) {
	if e.tx == nil || e.tx.conn != conn {
		return nil, refuse(syscall.EINVAL, "no transaction is open")
	}
	id, tx := c.P.SAID, &e.tx.sas
	r, cur := e.recs[id], tx.by[id]
	there := r != nil
	if cur != nil {
		there = cur.sa != nil || cur.change != nil
	}
	switch c.Verb {
	case keysock.SAAdd:
		if err := e.check(c.P); err != nil {
			return nil, err
		}
		if there {
			return nil, refuse(syscall.EEXIST, "SA exists")
		}
		sa, err := e.make(c.P)
		if err != nil {
			return nil, err
		}
		s := tx.at(id)
		s.p, s.sa = c.P, sa
		n := record{sa: sa, life: livesOf(c.P)}
		return n.info(), nil
	case keysock.SAUpdate:
		switch {
		case !there:
			return nil, refuse(syscall.ESRCH, "no such SA")
		case cur != nil || r.sa.State() == sad.Larval:
			return nil, refuse(syscall.EINVAL, "an SA that is larval, or changed before in the transaction")
		}
		q := r.params()
		if err := sameSA(&q, c.P); err != nil {
			return nil, err
		}
		if err := sameEncap(&q, c.P); err != nil {
			return nil, err
		}
		s := tx.at(id)
		s.change, s.p = r, c.P
		i := r.info()
		i.Hard, i.Soft, i.Idle, i.Encap = c.P.Hard, c.P.Soft, c.P.Idle, c.P.Encap
		return i, nil
	case keysock.SADelete:
		if !there {
			return nil, refuse(syscall.ESRCH, "no such SA")
		}
		s := tx.at(id)
		var was record
		switch {
		case s.sa != nil: // it never was
			was = record{sa: s.sa, life: livesOf(s.p)}
			s.p.Wipe()
		default:
			s.old = r
			was = *r
			if s.p != nil {
				s.p.Wipe()
			}
		}
		s.p, s.sa, s.change = nil, nil, nil
		return was.info(), nil
	}
	return nil, refuse(syscall.EINVAL, "verb")
}

// stillFits refuses a transaction whose SAs others have made impossible since.
func (e *Engine) stillFits(s *staged) error {
	for _, c := range s.order {
		r := e.recs[c.id]
		switch {
		case c.sa != nil && r != nil && r != c.old:
			return refuse(syscall.EEXIST, "SA exists")
		case c.change != nil && r != c.change:
			return refuse(syscall.ESRCH, "no such SA")
		}
	}
	return nil
}

// commitSAs carries out what was staged; stillFits has said that it can be.
func (e *Engine) commitSAs(s *staged) {
	for _, c := range s.order {
		if c.old != nil && e.recs[c.id] == c.old {
			e.remove(c.old)
		}
		switch {
		case c.sa != nil:
			_, _ = e.put(c.p, c.sa, 0, nil) // the place is free
		case c.change != nil:
			_, _ = e.change(c.change, c.p) // the SA is there
			c.p.Wipe()
		}
	}
}
