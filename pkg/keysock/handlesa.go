package keysock

import (
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

func (s *Server) getSPI(c *conn, m *pfkey.Message) error {
	g, err := takeGetSPI(m)
	if err != nil {
		return err
	}
	i, err := s.b.GetSPI(g)
	if err != nil {
		return err
	}
	s.setSALabel(i.SAID, nil)
	return s.reply(c, s.saMessage(m, i, withCurrent), false)
}

func takeGetSPI(m *pfkey.Message) (g GetSPI, err error) {
	if g.Proto, err = protoOf(m.SAType); err != nil {
		return g, err
	}
	if g.Proto == 0 {
		return g, refuse(syscall.EINVAL, "no SA type")
	}
	if g.Src, g.Dst, err = takeAddrs(m); err != nil {
		return g, err
	}
	if g.Mode, g.ReqID, err = takeSA2(m); err != nil {
		return g, err
	}
	if g.Encap, err = takeEncap(m); err != nil {
		return g, err
	}
	g.Seq = acquireSeq(m.Seq)
	if m.Queue != nil {
		g.Queue = ipsec.Queue(m.Queue.N)
	}
	if r := m.SPIRange; r != nil {
		// 1-255 are reserved (RFC 4303, 2.1), 0 is no SPI.
		g.Min, g.Max = max(ipsec.SPI(r.Min), ipsec.MinSPI), ipsec.SPI(r.Max)
		if r.Min > r.Max || g.Min > g.Max {
			return g, refuse(syscall.EINVAL, "SPIs from %d to %d", r.Min, r.Max)
		}
	}
	return g, nil
}

// addSA is ADD and UPDATE. The answer goes to all and has no keys.
func (s *Server) addSA(c *conn, m *pfkey.Message) error {
	p, err := takeParams(m)
	if err != nil {
		return err
	}
	if c.tx && m.SADst != nil {
		p.Wipe()
		return refuse(syscall.EBUSY, "a transaction is open")
	}
	if c.tx {
		verb := SAAdd
		if m.Type == pfkey.Update {
			verb = SAUpdate
		}
		return s.stageSA(c, m, SAChange{verb, p})
	}
	f := s.b.Add
	if m.Type == pfkey.Update {
		f = s.b.Update
	}
	was := p.SAID
	if m.Type == pfkey.Update && m.SADst != nil {
		was.Dst = m.SADst.Addr.Addr()
		b, ok := s.b.(Mover)
		if f = func(p *ipsec.SAParams, _ uint32) (*SAInfo, error) { return b.Move(was, p) }; !ok {
			p.Wipe()
			return refuse(syscall.EOPNOTSUPP, "SAs do not move")
		}
	}
	i, err := f(p, acquireSeq(m.Seq))
	if err != nil {
		p.Wipe()
		return err
	}
	if l := s.labels.sas[was]; l != nil && was != i.SAID {
		delete(s.labels.sas, was)
		s.labels.sas[i.SAID] = l
	}
	if m.SecCtx != nil || m.Type == pfkey.Add {
		s.setSALabel(i.SAID, m.SecCtx)
	}
	return s.replyAll(c, s.saMessage(m, i, withCurrent))
}

// stageSA answers the client; the others hear of it when the transaction ends.
func (s *Server) stageSA(c *conn, m *pfkey.Message, ch SAChange) error {
	i, err := s.b.StageSA(c.id, ch)
	if err != nil {
		ch.P.Wipe()
		return err
	}
	if id, label := i.SAID, m.SecCtx; ch.Verb == SAAdd || label != nil {
		c.labels = append(c.labels, func() { s.setSALabel(id, label) })
	}
	shown := *i
	if ch.Verb == SADelete {
		shown.State = Dead
	}
	g := s.saMessage(m, &shown, withCurrent)
	if len(c.sas) < maxCopies {
		c.sas = append(c.sas, g)
	}
	return s.reply(c, g, false)
}

func (s *Server) deleteSA(c *conn, m *pfkey.Message) error {
	id, src, err := takeSAID(m)
	if err != nil {
		return err
	}
	if c.tx {
		return s.stageSA(c, m, SAChange{SADelete, &ipsec.SAParams{SAID: id}})
	}
	i, err := s.b.Delete(id, src)
	if err != nil {
		return err
	}
	dead := *i
	dead.State = Dead
	return s.replyAll(c, s.saMessage(m, &dead, withCurrent))
}

func (s *Server) getSA(c *conn, m *pfkey.Message) error {
	id, src, err := takeSAID(m)
	if err != nil {
		return err
	}
	i, err := s.b.Get(id, src)
	if err != nil {
		return err
	}
	defer i.Wipe()
	return s.reply(c, s.saMessage(m, i, withCurrent|withKeys), true)
}

// saMessage is an answer that shows an SA.
func (s *Server) saMessage(req *pfkey.Message, i *SAInfo, with int) *message {
	return &message{put: func(a *pfkey.Message, what int) error {
		answerHeader(a, req)
		a.SecCtx = s.labels.sas[i.SAID]
		return putSA(a, i, with|what)
	}}
}

// acquireFailed takes a key daemon's report, which is a header with an errno and
// gets no answer. Applications that ask for SAs are not served.
func (s *Server) acquireFailed(m *pfkey.Message, n int) error {
	if n != pfkey.HeaderLen {
		return refuse(syscall.EOPNOTSUPP, "ACQUIRE from a client")
	}
	if m.Errno != 0 && m.Seq != 0 {
		s.b.AcquireFailed(m.Seq, syscall.Errno(m.Errno))
	}
	return nil
}

// flushSAs answers the sender, and if something went all, the sender included
// (which hears it twice, as on Linux).
func (s *Server) flushSAs(c *conn, m *pfkey.Message) error {
	proto, err := protoOf(m.SAType)
	if err != nil {
		return err
	}
	removed := s.b.Flush(proto)
	g := bare(m)
	if err := s.reply(c, g, false); err != nil {
		return err
	}
	if removed {
		s.copyTo(g, func(*conn) bool { return true })
	}
	return nil
}

func (s *Server) dumpSAs(c *conn, m *pfkey.Message) error {
	proto, err := protoOf(m.SAType)
	if err != nil {
		return err
	}
	if c.dumping() {
		return refuse(syscall.EBUSY, "a dump is unfinished")
	}
	ids, f := s.b.SAIDs(proto), m.Filter
	if len(ids) == 0 {
		return refuse(syscall.ENOENT, "no SA")
	}
	what := withKeys | withCurrent
	if c.isOptedIn() {
		what |= withPrivate
	}
	return c.startDump(&dump{h: m.Header, fetch: func() (l []entry, done bool) {
		n := min(len(ids), dumpBatch)
		for _, id := range ids[:n] {
			i, err := s.b.Get(id, netip.Addr{})
			switch {
			case err != nil: // gone meanwhile
			case f != nil && !f.Match(i.Src, i.Dst):
				i.Wipe()
			default:
				label := s.labels.sas[id]
				l = append(l, entry{func(a *pfkey.Message) error {
					a.SecCtx = label
					return putSA(a, i, what)
				}, i.Wipe})
			}
		}
		ids = ids[n:]
		return l, len(ids) == 0
	}})
}
