package sa

import (
	"encoding/binary"
	"time"

	"github.com/missiu/missiu/proto/ikev2"
	"github.com/missiu/missiu/proto/isakmp"
)

// Fragments of protected messages (RFC 7383), where both sides have said in
// IKE_SA_INIT that they can. A message that does not fit into fragment_size is
// sent in several, each protected and complete in itself; all of them are
// repeated together. Whoever gets no answer to large datagrams tries smaller
// ones once (2.5.2). Received ones are kept only after they have verified.
const (
	// maxFragments and maxInner bound a message that is being reassembled. No
	// honest message of 64 KiB comes in more pieces.
	maxFragments = 256
	maxInner     = 65535
	// fragmentWait is how long an incomplete message is kept after its last
	// fragment: longer than the longest wait between two transmissions.
	fragmentWait = 60 * time.Second
	// smallAfter is the number of transmissions without an answer after which
	// datagrams are made small.
	smallAfter = 2
	// Datagrams that every path passes (RFC 7383, 2.5.1).
	smallIPv4, smallIPv6 = 576, 1280
)

// sealed is a message as it was sent, and what is needed to cut it anew.
type sealed struct {
	data  [][]byte
	m     *ikev2.Message
	inner []byte
	k     *sk
}

func (p *sealed) octets() (n int) {
	for _, b := range p.data {
		n += len(b)
	}
	return n
}

// prefix is what IKE_INTERMEDIATE's authentication needs of the message.
func (p *sealed) prefix() []byte { return p.data[0][:isakmp.HeaderLen+isakmp.PayloadHeaderLen] }

func (p *sealed) intAuth() []byte { return ikev2.IntAuthOctets(p.prefix(), p.inner) }

// protect seals a message, in fragments where it must be and may.
func (s *SA) protect(i *ikeSA, h ikev2.Header, ps []ikev2.Payload, limit int) (*sealed, error) {
	p := &sealed{m: &ikev2.Message{Header: h, Payloads: ps}, k: i.seal}
	var err error
	if p.inner, err = ikev2.AppendPayloads(nil, ps); err != nil {
		return nil, err
	}
	p.data, err = p.m.Seal(p.inner, p.k, s.messageSize(limit))
	return p, err
}

// neverCut is the length in octets of a message that no limit cuts: the smallest
// datagram without the headers of IPv6, UDP, and the non-ESP marker.
const neverCut = smallIPv4 - 40 - 8 - 4

// settle forgets what a message that is kept to be sent again was made from, if it
// will not be cut anew.
func (p *sealed) settle() {
	if p != nil && len(p.data) == 1 && len(p.data[0]) <= neverCut {
		p.m, p.inner, p.k = nil, nil, nil
	}
}

// cut cuts p anew, into smaller pieces; false if that is not possible.
func (s *SA) cut(p *sealed, limit int) bool {
	size := s.messageSize(limit)
	if !s.fragments || p.m == nil || len(p.data[0]) <= size {
		return false
	}
	data, err := p.m.Seal(p.inner, p.k, size)
	if err != nil || len(data) <= len(p.data) {
		return false
	}
	p.data = data
	return true
}

// messageSize is what an IKE message may have in octets: the size of an IP
// datagram as configured, or limit if that is smaller and not 0, without headers.
func (s *SA) messageSize(limit int) int {
	if !s.fragments {
		return isakmp.HeaderLen + 0xffff
	}
	n := s.rule.FragmentSize
	if s.small {
		n = min(n, s.smallest())
	}
	n -= s.headers()
	if limit > 0 {
		n = min(n, max(limit, smallIPv4-s.headers()))
	}
	return n
}

func (s *SA) smallest() int {
	if s.remote.Addr().Is4() {
		return smallIPv4
	}
	return smallIPv6
}

// headers are the octets of IP, UDP and the non-ESP marker.
func (s *SA) headers() int {
	n := 20 + 8
	if !s.remote.Addr().Is4() {
		n = 40 + 8
	}
	if s.local.Port() == s.cfg.NATTPort {
		n += 4
	}
	return n
}

// reassembly collects the fragments of one message.
type reassembly struct {
	id      uint32
	parts   [][]byte // by number, from 0; nil: missing
	got     int
	octets  int
	first   ikev2.PayloadType
	prefix  []byte
	head    []byte // fragment 1 as it came
	largest int    // octets of a message that was not the last fragment
	until   time.Time
}

func (r *reassembly) reset() {
	for _, p := range r.parts {
		clear(p)
	}
	*r = reassembly{}
}

// fragmentNumbers reads them from a datagram whose first payload is an
// Encrypted Fragment, without believing anything.
func fragmentNumbers(b []byte) (number, total int, ok bool) {
	const at = isakmp.HeaderLen + isakmp.PayloadHeaderLen
	if len(b) < at+4 || ikev2.PayloadType(b[16]) != ikev2.PayloadSKF {
		return 0, 0, false
	}
	return int(binary.BigEndian.Uint16(b[at:])), int(binary.BigEndian.Uint16(b[at+2:])), true
}

// arrived is an authentic message, or what is known of it so far.
type arrived struct {
	whole  bool // else a fragment that leaves others missing
	ps     []ikev2.Payload
	err    error // about the contents
	prefix []byte
	plain  []byte
	octets int    // of all its datagrams
	head   []byte // the datagram by which a repetition is known: fragment 1
	limit  int    // octets of the largest fragment; 0 for a single datagram
}

// take opens a datagram that belongs to the message with ID id, of which r has
// the fragments so far. nil: it is not authentic, or brings nothing new.
func (s *SA) take(i *ikeSA, r *reassembly, d Datagram, id uint32) *arrived {
	number, total, isFragment := fragmentNumbers(d.Data)
	if !isFragment {
		o := s.openOuter(i.open, d.Data)
		if o == nil {
			return nil
		}
		r.reset()
		a := &arrived{whole: true, prefix: o.o.Prefix, plain: o.o.Plain, err: o.err, octets: len(d.Data), head: d.Data}
		a.parse(o.o.First)
		// What is critical is so in front of the Encrypted payload, too
		// (RFC 7296, 2.5).
		for _, p := range o.o.Front {
			if u, ok := p.(*ikev2.Unknown); ok && u.Critical {
				a.ps = append(a.ps, u)
			}
		}
		return a
	}
	switch {
	case !s.fragments:
		s.counters.Unexpected++
		return nil
	case number == 0 || number > total || total > maxFragments:
		s.counters.Malformed++
		return nil
	case r.id == id && r.got > 0 && (total < len(r.parts) || total == len(r.parts) && r.parts[number-1] != nil):
		// Of an earlier, coarser cut, or the same again (RFC 7383, 2.6).
		s.counters.Fragments++
		return nil
	}
	o := s.openOuter(i.open, d.Data)
	if o == nil {
		return nil
	}
	if r.id != id || total > len(r.parts) {
		r.reset()
		r.id, r.parts = id, make([][]byte, total)
	}
	if o.err != nil || r.octets+len(o.o.Plain) > maxInner {
		s.counters.Malformed++
		r.reset()
		return nil
	}
	r.parts[number-1] = append(make([]byte, 0, len(o.o.Plain)), o.o.Plain...)
	r.got++
	r.octets += len(o.o.Plain)
	r.until = s.now.Add(fragmentWait)
	if number == 1 {
		r.first, r.prefix, r.head = o.o.First, o.o.Prefix, d.Data
	}
	if number < total || total == 1 {
		r.largest = max(r.largest, len(d.Data))
	}
	if r.got < total {
		return &arrived{}
	}
	a := &arrived{whole: true, prefix: r.prefix, octets: r.octets, head: r.head, limit: r.largest}
	for _, p := range r.parts {
		a.plain = append(a.plain, p...)
	}
	first := r.first
	r.reset()
	a.parse(first)
	return a
}

func (a *arrived) parse(first ikev2.PayloadType) {
	if a.err == nil {
		a.ps, a.err = ikev2.ParseInner(first, a.plain)
	}
}

type outer struct {
	o   *ikev2.Opened
	err error // authentic, but wrong inside
}

// openOuter verifies and opens one datagram, and counts what is not authentic.
func (s *SA) openOuter(k *sk, data []byte) *outer {
	k.verified = false
	o, err := ikev2.OpenOuter(data, k)
	switch {
	case k.verified && o != nil:
		return &outer{o, err}
	case isIntegrity(err):
		s.counters.Integrity++
	default:
		s.counters.Malformed++
	}
	return nil
}

// again answers a repetition of the request that was answered last, or is in
// work: the same octets, or a finer cut of the same message; of fragments only
// the first (RFC 7383, 2.6.1). It reports whether d is one.
func (s *SA) again(i *ikeSA, d Datagram) bool {
	number, total, isFragment := fragmentNumbers(d.Data)
	switch {
	case i.isLast(d.Data):
		// The same octets need no second look: whoever repeats them learns
		// nothing but what it has seen, and changes nothing.
	case isFragment && s.fragments && number > 1 && total <= i.lastTotal:
		s.counters.Fragments++
		return true
	case isFragment && s.fragments && number == 1 && total > i.lastTotal && total <= maxFragments && i.lastOpen != nil:
		if s.openOuter(i.lastOpen, d.Data) == nil {
			return true
		}
		// Large datagrams do not get through to us, and perhaps ours do not
		// to the peer.
		i.setLast(d.Data)
		if i.lastResp != nil {
			s.cut(i.lastResp, len(d.Data))
		}
	default:
		return false
	}
	s.counters.Retransmits++
	s.answered(i, true)
	if i.lastResp != nil {
		for _, b := range i.lastResp.data {
			s.send(d.Local, d.Remote, b, true)
		}
	}
	return true
}
