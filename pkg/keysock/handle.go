package keysock

import (
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/proto/pfkey"
)

// handle does the requests of a datagram, in order.
func (s *Server) handle(r *request) {
	b := r.b
	if r.c.isPacked() && !r.cut {
		for first, rest := pfkey.Split(b); rest != nil; first, rest = pfkey.Split(b) {
			s.one(r.c, first, false)
			b = rest
		}
	}
	s.one(r.c, b, r.cut)
}

// one does one request to the end, answers included. cut: it was longer than b.
func (s *Server) one(c *conn, b []byte, cut bool) {
	s.count(func(st *Stats) { st.Requests++ })
	h, err := pfkey.ParseHeader(b)
	if len(b) < pfkey.HeaderLen {
		return // nothing to answer with
	}
	switch {
	case cut:
		err = refuse(syscall.EMSGSIZE, "request longer than %d octets", maxMessage)
	case err == nil && h.Reserved != 0:
		err = refuse(syscall.EINVAL, "reserved field")
	case err == nil:
		s.promiscuous(b)
		var m *pfkey.Message
		if m, err = pfkey.Decode(b); err == nil {
			err = s.dispatch(c, m, b)
		}
	}
	if err != nil {
		s.count(func(st *Stats) { st.Errors++ })
		h.Errno, h.Reserved = errnoOf(err), 0
		b := h.Append(nil)
		c.answer(b, false)
		s.promiscuous(b)
	}
}

func (s *Server) dispatch(c *conn, m *pfkey.Message, raw []byte) error {
	switch m.Type {
	case pfkey.GetSPI:
		return s.getSPI(c, m)
	case pfkey.Add, pfkey.Update:
		return s.addSA(c, m)
	case pfkey.Delete:
		return s.deleteSA(c, m)
	case pfkey.Get:
		return s.getSA(c, m)
	case pfkey.Acquire:
		return s.acquireFailed(m, len(raw))
	case pfkey.Register:
		return s.register(c, m)
	case pfkey.Flush:
		return s.flushSAs(c, m)
	case pfkey.Dump:
		return s.dumpSAs(c, m)
	case pfkey.XPromisc:
		return s.setPromiscuous(c, m, raw)
	case pfkey.XSPDAdd, pfkey.XSPDUpdate, pfkey.XSPDSetIdx:
		return s.addPolicy(c, m)
	case pfkey.XSPDDelete, pfkey.XSPDDelete2:
		return s.deletePolicy(c, m)
	case pfkey.XSPDGet:
		return s.getPolicy(c, m)
	case pfkey.XSPDDump:
		return s.dumpPolicies(c, m)
	case pfkey.XSPDFlush:
		return s.flushPolicies(c, m)
	case pfkey.XMigrate:
		return s.migrate(c, m)
	case pfkey.XBegin, pfkey.XCommit, pfkey.XAbort:
		return s.transaction(c, m)
	case pfkey.XStatus:
		return s.status(c, m)
	case pfkey.XAddrAdd, pfkey.XAddrDelete:
		return s.address(c, m)
	}
	return refuse(syscall.EOPNOTSUPP, "%v from a client", m.Type)
}

// A message is made at most twice, with and without private extensions, and
// shared by all who get it.
type message struct {
	put           func(m *pfkey.Message, what int) error
	plain, fuller []byte
}

// bytes returns the octets for a socket.
func (g *message) bytes(optedIn bool) ([]byte, error) {
	p, what := &g.plain, 0
	if optedIn {
		p, what = &g.fuller, withPrivate
	}
	if *p == nil {
		var m pfkey.Message
		err := g.put(&m, what)
		if err == nil {
			*p, err = encode(&m)
		}
		if err != nil {
			return nil, err
		}
	}
	return *p, nil
}

// answerHeader copies what answers copy; SA type is set by what follows.
func answerHeader(m, req *pfkey.Message) {
	m.Type, m.SAType, m.Seq, m.Pid = req.Type, req.SAType, req.Seq, req.Pid
}

// reply answers c alone.
func (s *Server) reply(c *conn, g *message, secret bool) error {
	b, err := g.bytes(c.isOptedIn())
	if err != nil {
		return err
	}
	s.promiscuous(b)
	c.answer(b, secret)
	return nil
}

// replyAll answers c and copies the answer to everybody else.
func (s *Server) replyAll(c *conn, g *message) error {
	if err := s.reply(c, g, false); err != nil {
		return err
	}
	s.copyTo(g, func(o *conn) bool { return o != c })
	return nil
}

// copyTo sends a message to the sockets that who selects.
func (s *Server) copyTo(g *message, who func(*conn) bool) (heard bool) {
	for _, o := range s.snapshot() {
		if !who(o) {
			continue
		}
		if b, err := g.bytes(o.isOptedIn()); err == nil {
			o.tell(b, false)
			heard = true
		}
	}
	return heard
}

// promiscuous gives promiscuous sockets a copy of their own of what passes.
func (s *Server) promiscuous(b []byte) {
	for _, o := range s.snapshot() {
		if o.isPromiscuous() {
			o.tell(append([]byte(nil), b...), true)
		}
	}
}

func (c *conn) isOptedIn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.optedIn
}

func (c *conn) isPacked() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.packed
}

func (c *conn) isPromiscuous() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.promisc
}

func (c *conn) isRegistered() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.registered != 0
}

// register adds a socket to the audience of events, if only for one SA type:
// Linux has one audience for all types, and so do we. SA type 0 asks for the
// lists alone. The backend is told after the answer, since some programs take what
// comes first for it.
func (s *Server) register(c *conn, m *pfkey.Message) error {
	if m.SAType > pfkey.MaxSAType {
		return refuse(syscall.EINVAL, "SA type %v", m.SAType)
	}
	bit := uint16(1) << m.SAType
	c.mu.Lock()
	var granted *pfkey.OptIn
	if m.OptIn != nil {
		c.optedIn = true
		c.packed = c.packed || m.OptIn.Features&pfkey.FeaturePacks != 0
		granted = &pfkey.OptIn{Features: m.OptIn.Features & (pfkey.FeaturePrivate | pfkey.FeaturePacks)}
	}
	again := m.SAType != 0 && c.registered&bit != 0
	first := m.SAType != 0 && c.registered == 0
	if m.SAType != 0 {
		c.registered |= bit
	}
	c.mu.Unlock()
	if again {
		return syscall.EEXIST
	}
	has := s.b.Supported()
	auth, encr := supportedToWire(has)
	g := &message{put: func(a *pfkey.Message, what int) error {
		answerHeader(a, m)
		a.SupportedAuth, a.SupportedEncr = auth, encr
		if what&withPrivate != 0 {
			a.OptIn = granted
			if has.Queues != 0 {
				a.Queue = &pfkey.Queue{N: uint16(has.Queues)}
			}
		}
		return nil
	}}
	if err := s.reply(c, g, false); err != nil {
		return err
	}
	s.copyTo(g, func(o *conn) bool { return o != c && o.isRegistered() })
	if b, ok := s.b.(Audience); ok && first {
		b.Registered(c.id)
	}
	return nil
}

// setPromiscuous switches the socket's promiscuous bit by a bare header, and
// passes a longer message on to everybody as it is.
func (s *Server) setPromiscuous(c *conn, m *pfkey.Message, raw []byte) error {
	if len(raw) == pfkey.HeaderLen {
		if m.SAType > 1 {
			return refuse(syscall.EINVAL, "promiscuous switch %d", m.SAType)
		}
		c.mu.Lock()
		c.promisc = m.SAType == 1
		c.mu.Unlock()
	}
	b := append([]byte(nil), raw...)
	s.promiscuous(b) // so the sender hears its switching on twice, as on Linux
	c.answer(b, false)
	for _, o := range s.snapshot() {
		if o != c {
			o.tell(b, false)
		}
	}
	return nil
}

// transaction opens and closes the policy transaction of a connection.
func (s *Server) transaction(c *conn, m *pfkey.Message) error {
	switch {
	case m.Type == pfkey.XBegin:
		if c.tx {
			return refuse(syscall.EBUSY, "a transaction is open")
		}
		if err := s.b.Begin(c.id); err != nil {
			return err
		}
		c.tx = true
	case !c.tx:
		return refuse(syscall.EINVAL, "no transaction is open")
	case m.Type == pfkey.XAbort:
		c.tx, c.copies, c.sas, c.labels = false, nil, nil, nil
		if err := s.b.Abort(c.id); err != nil {
			return err
		}
	default:
		copies, sas, labels := c.copies, c.sas, c.labels
		c.tx, c.copies, c.sas, c.labels = false, nil, nil, nil
		if err := s.b.Commit(c.id); err != nil {
			return err
		}
		for _, set := range labels {
			set()
		}
		defer s.committed(c, m, copies, sas)
	}
	return s.reply(c, bare(m), false)
}

// committed tells everybody else of a transaction: who opted in by one message,
// strangers by the answers in it; everybody of SAs.
func (s *Server) committed(c *conn, m *pfkey.Message, copies [][]byte, sas []*message) {
	for _, g := range sas {
		s.copyTo(g, func(o *conn) bool { return o != c })
	}
	s.copyTo(bare(m), func(o *conn) bool { return o != c && o.isOptedIn() })
	for _, o := range s.snapshot() {
		if o == c || o.isOptedIn() {
			continue
		}
		for _, b := range copies {
			o.tell(b, false)
		}
	}
}

// bare is an answer of a header alone.
func bare(m *pfkey.Message) *message {
	return &message{put: func(a *pfkey.Message, _ int) error {
		answerHeader(a, m)
		return nil
	}}
}

// address gives the device an address, or takes one.
func (s *Server) address(c *conn, m *pfkey.Message) error {
	if m.Src == nil {
		return refuse(syscall.EINVAL, "no source address")
	}
	p := netip.PrefixFrom(m.Src.Addr.Addr(), int(m.Src.PrefixLen))
	if a := p.Addr(); a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Is4In6() || p.Bits() == 0 {
		return refuse(syscall.EINVAL, "address %v", p)
	}
	b, ok := s.b.(Addresser)
	if !ok {
		return refuse(syscall.EOPNOTSUPP, "no device for addresses")
	}
	var err error
	if m.Type == pfkey.XAddrAdd {
		err = b.AddAddress(p)
	} else {
		err = b.DeleteAddress(p)
	}
	if err != nil {
		return err
	}
	return s.reply(c, &message{put: func(a *pfkey.Message, _ int) error {
		answerHeader(a, m)
		a.Src = m.Src
		return nil
	}}, false)
}

// statusPart is how much of a status document one message holds.
const statusPart = 32 << 10

func (s *Server) status(c *conn, m *pfkey.Message) error {
	doc, err := s.b.Status()
	if err != nil {
		return err
	}
	for at := 0; ; at += statusPart {
		part := doc[at:min(at+statusPart, len(doc))]
		g := &message{put: func(a *pfkey.Message, _ int) error {
			answerHeader(a, m)
			a.Blob = &pfkey.Blob{Total: uint32(len(doc)), Offset: uint32(at), Data: part}
			return nil
		}}
		if err := s.reply(c, g, false); err != nil {
			return err
		}
		if at+len(part) == len(doc) {
			return nil
		}
	}
}

// Acquire sends an ACQUIRE to registered sockets, or to that of connection to alone
// if it is not 0, and reports whether any of them has it. Like the other events it
// may be sent from anywhere.
func (s *Server) Acquire(a Acquire, to uint64) bool {
	return s.event(func(o *conn) bool { return to == 0 || o.id == to },
		func(m *pfkey.Message, what int) error { return putAcquire(m, &a, what) })
}

// Expire sends an EXPIRE to registered sockets. i needs no keys.
func (s *Server) Expire(i *SAInfo, hard bool) {
	s.event(everybody, func(m *pfkey.Message, _ int) error { return putExpire(m, i, hard) })
}

// NewMapping sends an X_NAT_T_NEW_MAPPING to registered sockets.
func (s *Server) NewMapping(n NewMapping) {
	s.event(everybody, func(m *pfkey.Message, what int) error { return putNewMapping(m, &n, what) })
}

// PolicyExpired tells that a policy is gone since its life has ended. Linux has a
// number for that and never sends it: opted-in sockets alone hear of it.
func (s *Server) PolicyExpired(i *PolicyInfo) {
	s.copyTo(s.policyMessage(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDExpire}}, i), (*conn).isOptedIn)
}

func everybody(*conn) bool { return true }

// event sends what the engine says by itself to the registered sockets that who
// selects: pid 0, since clients drop events with another one.
func (s *Server) event(who func(*conn) bool, put func(m *pfkey.Message, what int) error) bool {
	g := &message{put: put}
	heard := s.copyTo(g, func(o *conn) bool { return o.isRegistered() && who(o) })
	if b, err := g.bytes(false); err == nil {
		s.promiscuous(b)
	}
	return heard
}
