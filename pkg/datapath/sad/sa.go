// Package sad is the Security Association Database (RFC 4301, 4.4.2) as the
// data path uses it: SAs with their transform, window, sequence numbers and
// counters, found by SPI for inbound packets and by policy for outbound ones.
// It hides the tables and how they are read without a lock while they change.
//
// pkg/keyengine, in one goroutine, is the only writer; it also keeps what the
// data path has no use for, keys above all. The engine's goroutines read and
// count. Lookups never allocate, and take no lock, but for one that changes have
// overtaken again and again.
package sad

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/ah"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/replay"
	"github.com/missiu/missiu/pkg/ipsec"
)

// State of an SA (RFC 2367, 2.3.1). Numbers are PF_KEY's.
type State uint32

// States: Larval has an SPI and no transform, Dying is past its soft limit and
// still works, Dead is removed.
const (
	Larval State = 0
	Mature State = 1
	Dying  State = 2
	Dead   State = 3
)

func (s State) String() string {
	switch s {
	case Larval:
		return "larval"
	case Mature:
		return "mature"
	case Dying:
		return "dying"
	case Dead:
		return "dead"
	}
	return "State(?)"
}

// SA is one Security Association. P, T, AH, Window and Fragments never change once it is
// in a DB; what changes is in the Counters, which an SA shares with the one
// that replaces it (see WithEncap).
type SA struct {
	P      ipsec.SAParams // without keys; Hard and Soft as it was made, see Limits
	T      *esp.Transform // nil: larval, or no ESP
	AH     *ah.Transform  // nil: larval, or no AH
	Window *replay.Window // never nil
	// Fragments puts fragmented packets of an inbound SA together; nil without
	// P.AggFrag.
	Fragments *aggfrag.Reassembler
	*Counters

	encrBits uint16 // of the cipher key, without salt

	links [3]link // by kind: its elements of the lists in which Out looks
}

// Counters is what changes in an SA. All of it is safe for concurrent use.
type Counters struct {
	// Turn is held by the one worker of several that sends on the SA just now.
	Turn sync.Mutex

	AuthErrors     atomic.Uint64 // ICV wrong
	ReplayErrors   atomic.Uint64 // seen before or left of the window
	SelectorErrors atomic.Uint64 // inner packet outside selectors or policy

	state   atomic.Uint32
	soft    atomic.Bool // the soft limit was reported
	hard    atomic.Bool // the hard limit was reported
	limits  atomic.Pointer[Limits]
	created time.Time
	seq     atomic.Uint64 // last number given out
	maxSeq  uint64
	start   uint64 // seq as the SA was made

	packets atomic.Uint64
	bytes   atomic.Uint64
	first   atomic.Int64 // ns since created, plus 1; 0: never
	last    atomic.Int64
}

// Limits are the packet and octet limits that Account checks; 0 does not limit.
type Limits struct {
	SoftPackets, HardPackets uint64
	SoftBytes, HardBytes     uint64
}

// Sequence number space (RFC 4303, 3.3.3: the counter must not cycle). The
// extended one stops 2^32 short of its end, so that goroutines that reserve
// numbers at the same moment cannot push the counter round.
const (
	maxSeq32 = math.MaxUint32
	maxSeqE  = math.MaxUint64 - math.MaxUint32
)

// seqSoft is where an SA with 32-bit numbers reports its soft limit even if it
// has none, early enough that a successor takes over before numbers end.
const seqSoft = 0xf000_0000

// New makes a mature SA. The transform is made from the keys of p, which stay
// the caller's: the SA holds none of them. The error is a *esp.ParamError or an
// *ah.ParamError. An IPComp SA, which is "Association" by RFC 3173 and has no
// keys, has no transform: what compresses belongs to workers.
func New(p *ipsec.SAParams, now time.Time) (*SA, error) {
	var t *esp.Transform
	var a *ah.Transform
	var err error
	switch p.Proto {
	case ipsec.AH:
		a, err = ah.New(p)
	case ipsec.IPComp:
	default:
		t, err = esp.New(p)
	}
	if err != nil {
		return nil, err
	}
	s := newSA(p, Mature, now)
	s.T, s.AH = t, a
	return s, nil
}

// NewLarval makes an SA that only holds its SPI.
func NewLarval(p *ipsec.SAParams, now time.Time) *SA { return newSA(p, Larval, now) }

func newSA(p *ipsec.SAParams, st State, now time.Time) *SA {
	// In two pieces: there may be hundreds of thousands. Not in one: WithEncap's SA has
	// the second, and would keep its predecessor, with what that was linked to.
	x := new(struct {
		c Counters
		w replay.Window
	})
	s := &SA{P: *p, Window: &x.w, Counters: &x.c}
	s.Window.Init(int(min(p.ReplayWindow, replay.MaxSize)), p.ESN, p.LastSeq)
	s.created, s.maxSeq, s.start = now, maxSeq32, p.LastSeq
	s.seq.Store(p.LastSeq)
	if p.AggFrag {
		s.Fragments = new(aggfrag.Reassembler)
	}
	if n := p.EncrKey.Len() - p.Encr.Info().SaltLen; n > 0 {
		s.encrBits = uint16(n * 8)
	}
	s.P.EncrKey, s.P.AuthKey = ipsec.Key{}, ipsec.Key{}
	if p.ESN || p.Encr.Info().Old || p.Auth.Info().Old {
		s.maxSeq = maxSeqE // old packets carry no number, it only keeps their IVs apart
	}
	s.state.Store(uint32(st))
	s.SetLimits(p.Soft, p.Hard)
	return s
}

// WithEncap returns an SA that differs from s in its UDP encapsulation and
// shares everything else, counters and sequence numbers included. It is to
// replace s in the DB.
func (s *SA) WithEncap(e *ipsec.Encap) *SA {
	n := &SA{P: s.P, T: s.T, AH: s.AH, Window: s.Window, Fragments: s.Fragments, Counters: s.Counters, encrBits: s.encrBits}
	n.P.Encap = e
	return n
}

// State returns the state.
func (s *SA) State() State { return State(s.state.Load()) }

// SetState changes the state of an SA that is not in a DB; see DB.SetState.
func (s *SA) SetState(st State) { s.state.Store(uint32(st)) }

// SetLimits sets the packet and octet limits of soft and hard. The soft check
// starts afresh (PF_KEY's UPDATE).
func (s *SA) SetLimits(soft, hard ipsec.Lifetime) {
	l := Limits{soft.Packets, hard.Packets, soft.Bytes, hard.Bytes}
	if left := max(seqSoft, s.start+1) - s.start; s.maxSeq == maxSeq32 && (l.SoftPackets == 0 || l.SoftPackets > left) {
		l.SoftPackets = left
	}
	p := lastLimits.Load()
	if p == nil || *p != l {
		p = new(Limits)
		*p = l
		lastLimits.Store(p)
	}
	s.limits.Store(p)
	s.soft.Store(false)
}

// lastLimits are those of the SA that got its own last: most SAs share theirs.
var lastLimits atomic.Pointer[Limits]

// NextSeq reserves n sequence numbers and returns the first; the first of all
// is 1. It returns false when fewer than n are left: they never cycle, since a
// number used twice gives away the key stream of a counter mode. A batch that
// does not fit takes nothing.
func (s *SA) NextSeq(n int) (first uint64, ok bool) {
	if n <= 0 || s.seq.Load() > s.maxSeq-uint64(n) {
		return 0, false
	}
	last := s.seq.Add(uint64(n))
	if last > s.maxSeq {
		return 0, false
	}
	return last - uint64(n) + 1, true
}

// Seq returns the last sequence number that was given out, 0 if none was.
func (s *SA) Seq() uint64 { return min(s.seq.Load(), s.maxSeq) }

// LastSeq returns the last sequence number that is used up: that was given out,
// or the highest that came and verified. It is 0 where headers have none.
func (s *SA) LastSeq() uint64 {
	if s.P.Encr.Info().Old || s.P.Auth.Info().Old {
		return 0
	}
	return max(s.Seq(), s.Window.Top())
}

// CheckLastSeq reports whether an SA of p has a sequence number left.
func CheckLastSeq(p *ipsec.SAParams) bool {
	switch {
	case p.LastSeq == 0:
		return true
	case p.Proto == ipsec.IPComp || p.Encr.Info().Old || p.Auth.Info().Old:
		return false // there are none
	case p.ESN:
		return p.LastSeq < maxSeqE
	}
	return p.LastSeq < maxSeq32
}

// Account counts packets of n octets in all at now (octets of the IP packet as
// it enters the transform outbound, as it arrives inbound). soft is true once,
// for the packet that reaches a soft limit. hard is true for every packet
// beyond a hard limit: it must be dropped whether or not the writer has
// removed the SA yet; tell the writer each time, it reports once.
func (s *SA) Account(packets, n int, now time.Time) (soft, hard bool) {
	p := s.packets.Add(uint64(packets))
	b := s.bytes.Add(uint64(n))
	t := max(int64(now.Sub(s.created)), 0) + 1
	if s.first.Load() == 0 {
		s.first.CompareAndSwap(0, t)
	}
	s.last.Store(t)
	l := s.limits.Load()
	if l.HardPackets != 0 && p > l.HardPackets || l.HardBytes != 0 && b > l.HardBytes {
		return false, true
	}
	if (l.SoftPackets != 0 && p >= l.SoftPackets || l.SoftBytes != 0 && b >= l.SoftBytes) &&
		!s.soft.Load() && s.soft.CompareAndSwap(false, true) {
		return true, false
	}
	return false, false
}

// Far reports that n packets more, of up to 64 KiB, meet no limit, also if a few
// goroutines ask at the same moment: one call of Account for all of them then
// says no more than one for each.
func (s *SA) Far(n int) bool {
	l := s.limits.Load()
	p, b := s.packets.Load()+16*uint64(n), s.bytes.Load()+16*uint64(n)<<16
	return (l.SoftPackets == 0 || p < l.SoftPackets) && (l.HardPackets == 0 || p < l.HardPackets) &&
		(l.SoftBytes == 0 || b < l.SoftBytes) && (l.HardBytes == 0 || b < l.HardBytes)
}

// FirstHard returns true the first time it is called: of many callers that saw
// a hard limit, one reports it.
func (s *SA) FirstHard() bool { return !s.hard.Load() && s.hard.CompareAndSwap(false, true) }

// Created returns when the SA was made or became mature.
func (s *SA) Created() time.Time { return s.created }

// Packets returns how many packets were counted.
func (s *SA) Packets() uint64 { return s.packets.Load() }

// Bytes returns how many octets were counted.
func (s *SA) Bytes() uint64 { return s.bytes.Load() }

// FirstUsed returns when the first packet was counted, zero if none was.
func (s *SA) FirstUsed() time.Time { return s.at(s.first.Load()) }

// LastUsed returns when the last packet was counted, zero if none was.
func (s *SA) LastUsed() time.Time { return s.at(s.last.Load()) }

func (s *SA) at(t int64) time.Time {
	if t == 0 {
		return time.Time{}
	}
	return s.created.Add(time.Duration(t - 1))
}

// Fits reports whether the algorithms of s are those that one of alts has for
// the protocol. No alternatives at all leave the choice to whoever made s.
func (s *SA) Fits(alts []ipsec.Proposal) bool {
	for k := range alts {
		if s.fits(&alts[k]) {
			return true
		}
	}
	return len(alts) == 0
}

// Satisfies is stricter than Fits: what alts leave open means what IKE proposes
// for it, a cipher with integrity that is its own or of SHA-2.
func (s *SA) Satisfies(alts []ipsec.Proposal) bool {
	usual := s.P.Proto != ipsec.AH && s.P.Encr.Info().AEAD || s.P.Auth >= alg.IntegHMACSHA256 && s.P.Auth <= alg.IntegHMACSHA512
	for k := range alts {
		a := &alts[k]
		named := a.Auth != alg.IntegNone
		if s.P.Proto == ipsec.AH {
			named = a.AH != alg.IntegNone
		}
		if (named || usual) && s.fits(a) {
			return true
		}
	}
	return len(alts) == 0 && usual && s.fits(&ipsec.Proposal{})
}

func (s *SA) fits(a *ipsec.Proposal) bool {
	switch {
	case s.P.Proto == ipsec.IPComp:
		return true
	case !a.Shape.Has(s.P.Proto):
		return false
	case s.P.Proto == ipsec.AH:
		return a.AH == alg.IntegNone || a.AH == s.P.Auth
	case a.Encr == alg.EncrNone && (s.P.Encr == alg.EncrNULL || s.P.Encr == alg.EncrNULLAESGMAC): // any cipher, but a cipher
		return false
	case a.Encr != alg.EncrNone && a.Encr != s.P.Encr, a.Auth != alg.IntegNone && a.Auth != s.P.Auth:
		return false
	}
	return s.encrBits >= a.EncrMinBits && (a.EncrMaxBits == 0 || s.encrBits <= a.EncrMaxBits)
}

// AnySource reports whether s is for packets of any source: transport mode, with
// the unspecified address in the place of the source. Such an SA is keyed by hand
// for several senders, or for a host with several addresses; whatever shows the
// source is up to its selectors and to policy.
func (s *SA) AnySource() bool { return s.P.Mode == ipsec.Transport && ipsec.Open(s.P.Src) }

// MatchInbound reports whether a packet that came out of s lies within its
// traffic selectors (RFC 4301, 5.2, step 4).
func (s *SA) MatchInbound(i *packet.Info) bool { return s.match(i) }

// match: source and destination each lie in one selector of their list; empty
// lists do not restrict. Fragments without ports only match selectors of any
// port, or of OPAQUE (RFC 4301, 4.4.1.1).
func (s *SA) match(i *packet.Info) bool {
	if len(s.P.SrcTS) == 0 && len(s.P.DstTS) == 0 {
		return true
	}
	src, dst := i.SrcPort, i.DstPort
	if packet.IsICMP(i.Proto) {
		src = i.SrcPort<<8 | i.DstPort
		dst = src
	}
	proto := i.Proto
	if !i.ProtoKnown() {
		proto = 255 // reserved: in no selector, so only "any" matches
	}
	return in(s.P.SrcTS, i, true, proto, src) && in(s.P.DstTS, i, false, proto, dst)
}

func in(ts []ipsec.TrafficSelector, i *packet.Info, srcSide bool, proto uint8, port uint16) bool {
	if len(ts) == 0 {
		return true
	}
	a := i.Dst
	if srcSide {
		a = i.Src
	}
	for k := range ts {
		if ts[k].Contains(a, proto, port, i.HasPorts) {
			return true
		}
	}
	return false
}
