package keysock

import (
	"bytes"
	"net/netip"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// labels are the security contexts (X_SEC_CTX) of SAs and policies. Nothing here
// acts on them; they are stored and given back, and take no part in what makes
// two policies the same. They belong to the goroutine of Serve.
//
// What makes an SA or a policy sets its label or takes away that of a
// predecessor, so those of what has gone can stay until a sweep.
type labels struct {
	sas      map[ipsec.SAID]*pfkey.SecCtx
	policies map[uint32]*pfkey.SecCtx
	sweepAt  int
}

// minSweep is the number of labels below which there is no sweep.
const minSweep = 1024

func newLabels() labels {
	return labels{sas: map[ipsec.SAID]*pfkey.SecCtx{}, policies: map[uint32]*pfkey.SecCtx{}, sweepAt: minSweep}
}

// setSALabel labels an SA with a copy of l; nil takes its label away.
func (s *Server) setSALabel(id ipsec.SAID, l *pfkey.SecCtx) {
	if l == nil {
		delete(s.labels.sas, id)
		return
	}
	s.labels.sas[id] = cloneLabel(l)
	s.sweepLabels()
}

// setPolicyLabel labels the policy of an ID, within a transaction at its end.
func (s *Server) setPolicyLabel(c *conn, id uint32, l *pfkey.SecCtx) {
	l = cloneLabel(l)
	set := func() {
		if l == nil {
			delete(s.labels.policies, id)
			return
		}
		s.labels.policies[id] = l
		s.sweepLabels()
	}
	if c.tx {
		if l != nil || s.labels.policies[id] != nil {
			c.labels = append(c.labels, set)
		}
		return
	}
	set()
}

func cloneLabel(l *pfkey.SecCtx) *pfkey.SecCtx {
	if l == nil {
		return nil
	}
	return &pfkey.SecCtx{Alg: l.Alg, DOI: l.DOI, Ctx: bytes.Clone(l.Ctx)}
}

// sweepLabels forgets the labels of what has gone, when there are twice as many
// labels as were left by the sweep before.
func (s *Server) sweepLabels() {
	l := &s.labels
	if len(l.sas)+len(l.policies) < l.sweepAt {
		return
	}
	for id := range l.sas {
		if i, err := s.b.Get(id, netip.Addr{}); err != nil {
			delete(l.sas, id)
		} else {
			i.Wipe()
		}
	}
	for id := range l.policies {
		if _, err := s.b.GetPolicy(0, id); err != nil { // no connection has number 0
			delete(l.policies, id)
		}
	}
	l.sweepAt = max(minSweep, 2*(len(l.sas)+len(l.policies)))
}

// moveLabels has the labels of SAs follow them after a migration.
func (s *Server) moveLabels(g *Migration) {
	for id, l := range s.labels.sas {
		for _, v := range g.Moves {
			to := id
			to.Dst = v.NewDst
			if id.Proto != v.Proto || id.Dst != v.OldDst || to == id || s.there(id) || !s.there(to) {
				continue
			}
			delete(s.labels.sas, id)
			s.labels.sas[to] = l
			break
		}
	}
}

func (s *Server) there(id ipsec.SAID) bool {
	i, err := s.b.Get(id, netip.Addr{})
	if err == nil {
		i.Wipe()
	}
	return err == nil
}
