package keysock

import (
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// maxCopies bounds the answers of a transaction that are kept for strangers.
const maxCopies = 4096

// addPolicy is SPDADD, SPDUPDATE, and SPDSETIDX, which is SPDADD and answered as
// such.
func (s *Server) addPolicy(c *conn, m *pfkey.Message) error {
	i, err := takePolicy(m)
	if err != nil {
		return err
	}
	f := s.b.AddPolicy
	switch m.Type {
	case pfkey.XSPDUpdate:
		f = s.b.UpdatePolicy
	case pfkey.XSPDSetIdx:
		m.Type = pfkey.XSPDAdd
	}
	got, err := f(c.id, &i.Policy)
	if err != nil {
		return err
	}
	s.setPolicyLabel(c, got.ID, m.SecCtx)
	return s.changed(c, s.policyMessage(m, got))
}

// deletePolicy is SPDDELETE, by direction and selector, and SPDDELETE2, by ID.
func (s *Server) deletePolicy(c *conn, m *pfkey.Message) error {
	if m.Policy == nil {
		return refuse(syscall.EINVAL, "no X_POLICY extension")
	}
	var i *PolicyInfo
	var err error
	if m.Type == pfkey.XSPDDelete2 {
		i, err = s.b.DeletePolicyID(c.id, m.Policy.ID)
	} else {
		if m.Policy.Dir < pfkey.DirIn || m.Policy.Dir > pfkey.DirFwd {
			return refuse(syscall.EINVAL, "direction %v", m.Policy.Dir)
		}
		var sel ipsec.Selector
		if sel, err = takeSelector(m); err != nil {
			return err
		}
		i, err = s.b.DeletePolicy(c.id, ipsec.Direction(m.Policy.Dir), sel)
	}
	if err != nil {
		return err
	}
	return s.changed(c, s.policyMessage(m, i))
}

// changed tells everybody of a change to the SPD, but of one in a transaction
// only who made it.
func (s *Server) changed(c *conn, g *message) error {
	if !c.tx {
		return s.replyAll(c, g)
	}
	c.keepCopy(g)
	return s.reply(c, g, false)
}

func (c *conn) keepCopy(g *message) {
	if len(c.copies) >= maxCopies {
		return
	}
	if b, err := g.bytes(false); err == nil {
		c.copies = append(c.copies, b)
	}
}

func (s *Server) getPolicy(c *conn, m *pfkey.Message) error {
	if m.Policy == nil {
		return refuse(syscall.EINVAL, "no X_POLICY extension")
	}
	i, err := s.b.GetPolicy(c.id, m.Policy.ID)
	if err != nil {
		return err
	}
	return s.reply(c, s.policyMessage(m, i), false)
}

func (s *Server) flushPolicies(c *conn, m *pfkey.Message) error {
	removed := s.b.FlushPolicies(c.id)
	m.SAType = pfkey.SATypeUnspec
	g := bare(m)
	if err := s.reply(c, g, false); err != nil {
		return err
	}
	switch {
	case removed && c.tx:
		c.keepCopy(g)
	case removed:
		s.copyTo(g, func(*conn) bool { return true })
	}
	return nil
}

func (s *Server) dumpPolicies(c *conn, m *pfkey.Message) error {
	if c.dumping() {
		return refuse(syscall.EBUSY, "a dump is unfinished")
	}
	l := s.b.Policies(c.id)
	if len(l) == 0 {
		return refuse(syscall.ENOENT, "no policy")
	}
	what := withCurrent
	if c.isOptedIn() {
		what |= withPrivate
	}
	return c.startDump(&dump{h: m.Header, fetch: func() (es []entry, done bool) {
		n := min(len(l), dumpBatch)
		for _, i := range l[:n] {
			label := s.labels.policies[i.ID]
			es = append(es, entry{func(a *pfkey.Message) error {
				a.SecCtx = label
				return putPolicy(a, i, what)
			}, func() {}})
		}
		l = l[n:]
		return es, len(l) == 0
	}})
}

// policyMessage is an answer that shows a policy.
func (s *Server) policyMessage(req *pfkey.Message, i *PolicyInfo) *message {
	return &message{put: func(a *pfkey.Message, what int) error {
		answerHeader(a, req)
		if a.SecCtx = s.labels.policies[i.ID]; req.Type == pfkey.XSPDAdd || req.Type == pfkey.XSPDUpdate {
			a.SecCtx = req.SecCtx // the label of one in a transaction is not there yet
		}
		return putPolicy(a, i, withCurrent|what)
	}}
}
