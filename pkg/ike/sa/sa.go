package sa

import (
	"crypto/rand"
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// SA is an IKE SA, its child SAs, and what it becomes by rekeying.
type SA struct {
	cfg       Config
	candidate []*pad.Rule // responder, until authenticated
	rule      *pad.Rule   // nil for a responder that has not chosen yet
	initiator bool
	peer      Peer

	// IKE SAs that still receive, oldest first. cur is the one in use: ours
	// are its requests, its end is the lineage's.
	ikes []*ikeSA
	cur  *ikeSA

	children []*child
	queue    []task    // want cur's window
	delayed  []delayed // will want it later
	first    []ChildRequest
	spiWaits map[uint32]spiWait
	spiFor   map[uint32]spiFor // by token too, until the answer
	token    uint32

	lease Lease // what the initiator was assigned (RFC 7296, 2.19)

	// Path and NATs (RFC 7296, 2.23).
	local, remote       netip.AddrPort
	natLocal, natRemote bool
	natt                bool    // both can do NAT traversal
	mob                 *mobike // nil: no MOBIKE

	now       time.Time // of the present input
	heard     time.Time // last sign of life of the peer
	certEnd   time.Time // when a certificate expires that the lineage rests on; zero: never
	lastSent  time.Time
	closing   bool // Delete was called
	failed    bool // Failed was told
	done      bool // Done was told
	onlyOne   bool // peer sent INITIAL_CONTACT
	childless bool // peer can do without a first child SA
	fragments bool // both can send messages in fragments
	small     bool // large datagrams got no answer
	ppk       bool // both use PPKs
	out       []Output
	counters  Counters
	resent    uint64    // requests sent again
	putOff    time.Time // since when the peer has put off all that we asked for; zero: it does not
	rand      io.Reader
	newNonce  func() []byte // tests choose nonces
}

// A task is one exchange that we initiate, with its repetitions.
type task interface {
	// start takes i's window by setting i.active, and sends or asks for an
	// SPI; or does nothing if there is nothing to do any more.
	start(s *SA, i *ikeSA)
	// answer takes the payloads of the response. The window is free already.
	answer(s *SA, i *ikeSA, ps []ikev2.Payload)
	// shape is what the answer must look like.
	shape() shape
	// cancel says that the task will not be finished because of err.
	cancel(s *SA, err error)
}

type delayed struct {
	at time.Time
	t  task
}

// Numbers without a keyword in the configuration.
const (
	defaultHalfOpen = 60 * time.Second
	// linger is how long a last response is repeated: it covers the peer's
	// first four waits.
	linger = 20 * time.Second
	// staleAfter bounds how long a replaced or redundant IKE SA waits for the
	// peer's Delete.
	staleAfter = 3 * time.Minute
	// retryMin and retrySpread: wait after TEMPORARY_FAILURE, doubled after each
	// of the first of them. Both sides may wait for each other, so it must be
	// random.
	retryMin, retrySpread = 500 * time.Millisecond, 2 * time.Second
	maxDoublings          = 3
	retryFor              = 3 * time.Minute // "several minutes" (RFC 7296, 2.25)
	maxKETries            = 3               // INVALID_KE_PAYLOAD per exchange
	refusedTries          = 3               // transmissions of IKE_SA_INIT that are refused before it counts
	maxDeleted            = 64              // SPIs remembered during one exchange
	maxIKESAs             = 8               // of one lineage at a time
)

// NewInitiator makes an SA that will speak first, by rule. Start begins.
func NewInitiator(c Config, rule *pad.Rule) *SA {
	s := newSA(c)
	s.initiator, s.rule = true, rule
	s.peer.Rule = rule
	s.peer.LocalID = rule.Identity(c.Local.Addr())
	return s
}

// NewResponder makes an SA for an IKE_SA_INIT request, which is then given to
// Receive. candidates are the rules that cover the addresses, in their order
// (pad.DB.Inbound). If the request is refused, the outputs of Receive hold the
// refusal, if there is one to send, Failed and Done.
func NewResponder(c Config, candidates []*pad.Rule) *SA {
	s := newSA(c)
	s.candidate = candidates
	return s
}

func newSA(c Config) *SA {
	if c.IKEPort == 0 {
		c.IKEPort = 500
	}
	if c.NATTPort == 0 {
		c.NATTPort = 4500
	}
	if c.HalfOpen == 0 {
		c.HalfOpen = defaultHalfOpen
	}
	if c.Rand == nil {
		c.Rand = rand.Reader
	}
	c.Local, c.Remote = unmap(c.Local), unmap(c.Remote)
	s := &SA{cfg: c, rand: c.Rand, local: c.Local, remote: c.Remote, spiWaits: map[uint32]spiWait{}, spiFor: map[uint32]spiFor{}}
	s.peer = Peer{Local: c.Local, Remote: c.Remote}
	s.newNonce = func() []byte { return s.random(s.nonceLen()) }
	return s
}

// input runs f, then whatever has become possible, and hands out the outputs.
func (s *SA) input(now time.Time, f func()) []Output {
	if s.done {
		return nil
	}
	s.now = now
	f()
	s.pump()
	if s.failed && len(s.ikes) == 0 && !s.done {
		s.done = true
		s.emit(Done{})
	}
	out := s.out
	s.out = nil
	return out
}

func (s *SA) emit(o Output) { s.out = append(s.out, o) }

// Start begins IKE_SA_INIT. The first request becomes the child SA of
// IKE_AUTH, the others follow. Without any the IKE SA is made childless if the
// peer can (RFC 6023), else it fails.
func (s *SA) Start(now time.Time, reqs ...ChildRequest) []Output {
	return s.input(now, func() {
		if s.initiator && s.cur == nil {
			s.first = append(s.first, reqs...)
			s.startInit()
		}
	})
}

// AddChild asks for one more child SA, in any state before the end.
func (s *SA) AddChild(now time.Time, r ChildRequest) []Output {
	return s.input(now, func() {
		if s.failed || s.closing {
			s.emit(ChildFailed{r.Seq, r.Policy, ErrClosed})
			return
		}
		s.queue = append(s.queue, &createChild{req: r})
	})
}

// ChildSPI answers NeedSPI: an SPI, or the error that prevented one.
func (s *SA) ChildSPI(now time.Time, token uint32, spi ipsec.SPI, err error) []Output {
	return s.input(now, func() {
		if err != nil {
			spi = 0
		}
		w, ok := s.spiWaits[token]
		asked := s.spiFor[token]
		delete(s.spiFor, token)
		s.gotSPI(spi, asked.at)
		if !ok {
			s.release(spi, asked.protos...)
			return
		}
		delete(s.spiWaits, token)
		if !w.ike.hasKeys() {
			s.release(spi, asked.protos...)
			w.forget()
			return
		}
		w.then(spi, err)
	})
}

// ChildExpired says that an SA of a child SA, of either direction, reached a
// limit: soft rekeys it, hard deletes it.
func (s *SA) ChildExpired(now time.Time, id ipsec.SAID, hard bool) []Output {
	return s.input(now, func() {
		c := s.childBy(id)
		switch {
		case c == nil || s.closing:
		case hard:
			s.deleteChild(c, ErrExpired)
		default:
			s.wantRekeyChild(c)
		}
	})
}

// ChildLost says that an SA was not installed or vanished (flushed, deleted by
// hand): the peer is told by a Delete.
func (s *SA) ChildLost(now time.Time, id ipsec.SAID, err error) []Output {
	return s.input(now, func() {
		if c := s.childBy(id); c != nil {
			s.deleteChild(c, err)
		}
	})
}

// Heard says that a child SA received something: the peer lives.
func (s *SA) Heard(now time.Time) {
	if now.After(s.heard) {
		s.heard = now
	}
}

// Rekey rekeys the IKE SA now.
func (s *SA) Rekey(now time.Time) []Output {
	return s.input(now, func() { s.wantRekey() })
}

// RekeyChildren rekeys every child SA now, and returns their inbound SPIs.
func (s *SA) RekeyChildren(now time.Time) (spis []ipsec.SPI, outs []Output) {
	outs = s.input(now, func() {
		for _, c := range s.children {
			if !c.deleting && c.replaced == nil {
				spis = append(spis, c.in)
				s.wantRekeyChild(c)
			}
		}
	})
	return spis, outs
}

// Delete ends the lineage in order: the peer is told. Failed with ErrClosed
// comes with the peer's answer, or when it does not come.
func (s *SA) Delete(now time.Time) []Output {
	return s.input(now, func() {
		if s.failed || s.closing {
			return
		}
		s.closing = true
		if s.cur == nil || s.cur.state < StateEstablished && s.cur.state != StateAuthSent {
			s.fail(ErrClosed, false)
			return
		}
		s.cancelQueued(ErrClosed)
		// What waits for an SPI has not been sent: it need not end first.
		if t := s.cur.waiting(s); t != nil {
			t.cancel(s, ErrClosed)
		}
	})
}

// Drop ends the lineage at once, without telling the peer.
func (s *SA) Drop(now time.Time, reason error) []Output {
	return s.input(now, func() {
		s.fail(reason, false)
		for _, i := range slices.Clone(s.ikes) {
			s.gone(i)
		}
	})
}

// Rule returns the rule: a responder's, until the peer is authenticated, is the
// first that accepts the offer, or nil before that.
func (s *SA) Rule() *pad.Rule { return s.rule }

// SetRule goes on by another rule that permits the same peer: timers hold from now
// on, all else from the next rekeying. Before the peer is authenticated it does
// nothing.
func (s *SA) SetRule(r *pad.Rule) {
	if s.cur != nil && s.cur.state >= StateEstablished && !s.failed {
		s.rule, s.peer.Rule = r, r
	}
}

// Status describes the SA.
func (s *SA) Status() Status {
	st := Status{Peer: s.peer, Counters: s.counters}
	st.Peer.Local, st.Peer.Remote = s.local, s.remote
	if i := s.cur; i != nil {
		st.State, st.Local, st.Remote, st.Initiator, st.Suite = i.state, i.local, i.remote, i.initiator, i.suite
		st.Created, st.RekeyAt, st.ExpireAt = i.created, i.rekeyAt, i.expireAt
		if i.req != nil {
			st.Waiting = i.req.sent
		}
	}
	st.Lease = s.lease
	if st.MOBIKE = s.mob != nil; st.MOBIKE {
		st.PeerAddrs = s.mob.theirs
	}
	st.NATLocal, st.NATRemote, st.Resent = s.natLocal, s.natRemote, s.resent
	for _, c := range s.children {
		st.Children = append(st.Children, ChildInfo{
			In: c.in, Out: c.outSPI, Mode: c.mode, Suite: c.suite, ReqID: c.policy.reqIDs(c.proto).out, Queue: c.queue, CPIIn: c.cpi, CPIOut: c.peerCPI,
			LocalTS: c.local, PeerTS: c.remote, Policy: c.policy, Created: c.created, RekeyAt: c.rekeyAt, ExpireAt: c.expireAt, Deleting: c.deleting,
		})
	}
	return st
}

// pump lets tasks begin whose window is free.
func (s *SA) pump() {
	for _, i := range slices.Clone(s.ikes) {
		if i.active == nil && i.then != nil && i.state != StateDead {
			t := i.then
			i.then = nil
			t.start(s, i)
		}
	}
	for s.cur != nil && s.cur.state == StateEstablished && s.cur.active == nil && s.cur.peerNew == nil && !s.cur.rekeyedByPeer() {
		i := s.cur
		if s.closing {
			(&deleteIKE{}).start(s, i)
			return
		}
		if len(s.queue) == 0 {
			return
		}
		t := s.queue[0]
		s.queue = s.queue[1:]
		t.start(s, i)
	}
}

// retry counts the TEMPORARY_FAILUREs that a task has met.
type retry struct {
	n     int
	since time.Time
}

// retryLater puts t off after TEMPORARY_FAILURE; false if it has met that for too long.
func (s *SA) retryLater(r *retry, t task) bool {
	if r.n == 0 {
		r.since = s.now
	}
	if s.putOff.IsZero() {
		s.putOff = s.now
	}
	if s.now.Sub(r.since) >= retryFor {
		return false
	}
	k := min(r.n, maxDoublings)
	r.n++
	s.delayed = append(s.delayed, delayed{s.now.Add(retryMin<<k + s.jitter(retrySpread<<k)), t})
	return true
}

// outOfSync reports whether TEMPORARY_FAILURE is all that there has been for
// several minutes: then the two sides do not have the same state any more, and the
// IKE SA is to be closed (RFC 7296, 2.25). That is for what has to be rekeyed; a new
// child SA that a peer puts off for so long is no reason to lose those there are.
func (s *SA) outOfSync() bool { return !s.putOff.IsZero() && s.now.Sub(s.putOff) >= retryFor }

func (s *SA) cancelQueued(err error) {
	q := s.queue
	for _, d := range s.delayed {
		q = append(q, d.t)
	}
	s.queue, s.delayed = nil, nil
	for _, t := range q {
		t.cancel(s, err)
	}
	for _, r := range s.first {
		s.emit(ChildFailed{r.Seq, r.Policy, err})
	}
	s.first = nil
}

// fail ends the lineage. If again, the last response is kept for a while, for
// a peer that did not get it.
func (s *SA) fail(err error, again bool) {
	if s.failed {
		return
	}
	s.failed = true
	if s.cur != nil && s.cur.hs != nil {
		s.forgoParked(s.cur.hs)
	}
	for _, i := range s.ikes {
		if i.active != nil {
			t := i.active
			i.active, i.req = nil, nil
			t.cancel(s, err)
		}
	}
	s.cancelQueued(err)
	for _, w := range s.spiWaits {
		w.forget()
	}
	clear(s.spiWaits)
	for _, c := range slices.Clone(s.children) {
		s.removeChild(c, err)
	}
	s.log(levelOf(err), "IKE SA ends", attrErr(err))
	s.emit(Failed{err})
	for _, i := range slices.Clone(s.ikes) {
		if i.state == StateDead { // what replaced it is no more: nobody asks
			s.gone(i)
		} else {
			s.bury(i, again && i == s.cur)
		}
	}
}

// bury ends one IKE SA.
func (s *SA) bury(i *ikeSA, again bool) {
	if i.state == StateDead || i.state == StateGone {
		return
	}
	s.forsake(i)
	s.dropFollow(i)
	s.salvage(i)
	i.active, i.req, i.then, i.peerNew = nil, nil, nil, nil
	i.wipe()
	if !again || i.lastResp == nil {
		s.gone(i)
		return
	}
	i.to(StateDead)
	i.dropAt = s.now.Add(linger)
}

func (s *SA) gone(i *ikeSA) {
	if i.state == StateGone {
		return
	}
	s.forsake(i)
	s.dropFollow(i)
	s.salvage(i)
	i.wipe()
	i.to(StateGone)
	s.ikes = slices.DeleteFunc(s.ikes, func(o *ikeSA) bool { return o == i })
	s.emit(GoneIKESA{i.local})
}

// spiWait is an exchange of ike that stands still for an SPI.
type spiWait struct {
	ike  *ikeSA
	then func(ipsec.SPI, error)
	drop func() // instead of then, when ike has ended; may be nil
}

func (w spiWait) forget() {
	if w.drop != nil {
		w.drop()
	}
}

// spiFor is what an SPI was asked for, and where: the answer may find neither an
// exchange that waits nor us at the same address.
type spiFor struct {
	protos []ipsec.Protocol
	at     path
}

// salvage has what i, which ends, was asking of addresses asked by the IKE SA in use.
func (s *SA) salvage(i *ikeSA) {
	if t := i.active; t != nil && harmless(t) {
		i.active, i.req = nil, nil
		t.cancel(s, ErrRekeyed)
	}
}

// forsake takes i out of the choice between two that rekeying made.
func (s *SA) forsake(i *ikeSA) {
	for _, o := range s.ikes {
		if o.peerNew == i {
			o.peerNew = nil
		}
	}
}

// nonceLen is at least half the key of every PRF on offer (RFC 7296, 2.10).
func (s *SA) nonceLen() int {
	n := s.rule.NonceLen
	for _, p := range s.rule.Proposals {
		for _, f := range p.PRF {
			n = max(n, f.Len()/2)
		}
	}
	return n
}

// needSPI asks for an SPI for each of the protocols. The wait can be taken back by deleting its token.
func (s *SA) needSPI(p Policy, mode ipsec.Mode, protos []ipsec.Protocol, q ipsec.Queue, seq uint32, w spiWait) (token uint32) {
	s.token++
	s.spiWaits[s.token], s.spiFor[s.token] = w, spiFor{protos, s.path()}
	var l []SPIFor
	for _, proto := range protos {
		l = append(l, SPIFor{proto, p.reqIDs(proto).in})
	}
	s.emit(NeedSPI{
		Token: s.token, Src: s.remote.Addr(), Dst: s.local.Addr(), Mode: mode,
		For: l, Encap: s.encap(netip.Addr{}).in, Seq: seq, Queue: q,
	})
	return s.token
}

func (s *SA) release(spi ipsec.SPI, protos ...ipsec.Protocol) {
	if spi != 0 && len(protos) > 0 {
		s.emit(ReleaseSPI{spi, s.placeOf(spi).local.Addr(), protos})
		s.lostSPI(spi)
	}
}

// random returns n octets of the caller's source. Ours does not fail; a test's
// that does is the test's fault.
func (s *SA) random(n int) []byte {
	b := make([]byte, n)
	if _, err := io.ReadFull(s.rand, b); err != nil {
		panic("ike/sa: random source: " + err.Error())
	}
	return b
}

func (s *SA) newSPI() SPI {
	for {
		if v := SPI(binary.BigEndian.Uint64(s.random(8))); v != 0 {
			return v
		}
	}
}

// jitter returns a random duration below d.
func (s *SA) jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return time.Duration(binary.BigEndian.Uint64(s.random(8)) % uint64(d))
}
