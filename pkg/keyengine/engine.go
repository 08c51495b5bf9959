// Package keyengine is the key engine behind missiu's PF_KEY socket: it
// implements keysock.Backend on the SAD and the SPD (RFC 2367; Linux's meaning
// where programs see it), and turns what happens in them into ACQUIRE and
// EXPIRE. It hides SA lifetimes, larval SAs, outstanding ACQUIREs, policy ids,
// reqids and transactions. cmd/missiu makes one and wires it between
// keysock.Server and the data path, which it reaches through functions only.
//
// One goroutine, that of keysock.Server.Serve, makes all changes; keyengine is
// the only writer of both databases. The data path calls NeedSA, LimitReached
// and NewMapping from its own goroutines; these never block and queue what
// there is to do with Server.Do. Time is watched by Run, which only decides
// when to queue a look at the deadlines.
//
// SAs and policies belong to nobody: they survive the client that made them.
// Keys live here, for GET and DUMP, until their SA goes, and are wiped then;
// the data path has transforms only.
//
// A policy protects with up to two transforms of ESP and AH, and IPComp inside
// them. Everything else is refused (EPROTONOSUPPORT), since a policy that is
// accepted but carried out in part would send less protection than it says.
package keyengine

import (
	"context"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// Server is what the engine needs of keysock.Server.
type Server interface {
	Do(f func())
	Acquire(a keysock.Acquire, conn uint64) bool
	Expire(i *keysock.SAInfo, hard bool)
	NewMapping(m keysock.NewMapping)
	PolicyExpired(i *keysock.PolicyInfo)
}

// Timing and bounds.
const (
	// LarvalLife is how long an SPI waits for its keys, and an ACQUIRE for an
	// answer (Linux: xfrm_acq_expires).
	LarvalLife = 30 * time.Second
	// FailureHold is how long after a failure, or with nobody registered, no
	// further ACQUIRE goes out for the same SA: packets keep coming faster
	// than a key daemon can say no.
	FailureHold = time.Second
	// MaxPending bounds outstanding ACQUIREs: in transport mode every address
	// that somebody scans wants an SA of its own.
	MaxPending = 4096
)

// DivertChange is a change of the divert set, see spd.DB.Remotes.
type DivertChange struct {
	Add, Remove []netip.Prefix // one of them is empty
	// Set makes the whole set after the change, sorted.
	Set func() []netip.Prefix
}

// Options are what an Engine works with. SAD and SPD are required; functions
// may be nil. They are called from the request goroutine and must not block.
type Options struct {
	SAD *sad.DB
	SPD *spd.DB
	Now func() time.Time // nil: time.Now
	// AllowUnauthenticated takes SAs with a CBC cipher and without integrity;
	// without it they are refused with EINVAL.
	AllowUnauthenticated bool
	// AllowLegacy takes ADD of SAs with legacy algorithms (alg.Encr.Legacy);
	// without it, and in an UPDATE of what GETSPI made, they are refused with
	// ENOSYS. Without it they are not listed as supported either.
	AllowLegacy bool
	// LegacyRefused is told of an SA that AllowLegacy would have taken.
	LegacyRefused func(id ipsec.SAID, e alg.Encr, a alg.Integ)

	// Queues is how many the TAP has; 0 means one. SPIs for one of them leave its
	// number, less 1, when divided by it, which is how the data path shares
	// inbound packets out.
	Queues int

	// Installed: there is an SA for key; packets that wait for it can go.
	Installed func(key sad.OutKey)
	// Failed: there will be none; packets that wait are to be dropped.
	Failed func(key sad.OutKey)
	// Removed: sa is out of the SAD.
	Removed func(sa *sad.SA)
	// Overhead: InnerMTU may have another answer now.
	Overhead func()
	// Divert is told what joins the divert set before the policies that want
	// it are in force, and what leaves it after they are gone, so that no
	// packet passes by them in between. An error of the former refuses the
	// change with EIO; after one of the latter the set is merely too large.
	Divert func(c DivertChange) error
	// Policies: those in force have changed, by l in order, many at once if batch.
	Policies func(l []spd.Change, batch bool)
	// AddAddress gives the device an address, DeleteAddress takes it away (see
	// keysock.Addresser).
	AddAddress, DeleteAddress func(p netip.Prefix) error
	// Status returns the JSON document for keysock's Status.
	Status func() ([]byte, error)
}

// Engine is the key engine. Its methods are for the goroutine of
// keysock.Server.Serve, except where they say otherwise.
type Engine struct {
	o   Options
	srv Server

	// SAs
	recs     map[ipsec.SAID]*record
	first    *record // of a list in the order of making
	last     *record
	life     *lives           // of the last SA that was made or changed
	spis     map[protoSPI]int // SAs with this SPI, whatever the destination
	overhead map[overhead]int // SAs by what they add to a packet

	// ACQUIREs
	pending map[wanted]*pending
	bySeq   map[uint32]*pending
	seq     uint32

	// policies
	tx       *transaction
	reqid    ipsec.ReqID
	explicit map[ipsec.ReqID]bool // reqids from freshReqID up that clients chose
	polTimer map[uint32]*timer

	proposals []ipsec.Proposal // of the last policy

	timers timers
	rearm  chan struct{}

	mu      sync.Mutex
	asked   map[wanted]bool // NeedSA has queued it, or it is pending
	mapped  map[ipsec.SAID]netip.AddrPort
	next    time.Time // earliest deadline; zero: none
	armed   time.Time // what Run was told
	refused uint64
}

var (
	_ keysock.Backend   = (*Engine)(nil)
	_ keysock.Addresser = (*Engine)(nil)
	_ keysock.Audience  = (*Engine)(nil)
)

// New makes an Engine. Attach has to follow before anything else.
func New(o Options) *Engine {
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Engine{
		o:        o,
		recs:     map[ipsec.SAID]*record{},
		spis:     map[protoSPI]int{},
		overhead: map[overhead]int{},
		pending:  map[wanted]*pending{},
		bySeq:    map[uint32]*pending{},
		reqid:    freshReqID,
		explicit: map[ipsec.ReqID]bool{},
		polTimer: map[uint32]*timer{},
		rearm:    make(chan struct{}, 1),
		asked:    map[wanted]bool{},
		mapped:   map[ipsec.SAID]netip.AddrPort{},
	}
}

// Attach gives the engine its server, which needs the engine to be made.
func (e *Engine) Attach(s Server) { e.srv = s }

// Run watches the clock until ctx is done. Any goroutine.
func (e *Engine) Run(ctx context.Context) error {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			e.srv.Do(e.tick)
		case <-e.rearm:
			e.mu.Lock()
			next := e.next
			e.mu.Unlock()
			if next.IsZero() {
				t.Stop()
				continue
			}
			t.Reset(max(next.Sub(e.o.Now()), 0))
		}
	}
}

// tick carries out what is due.
func (e *Engine) tick() {
	e.mu.Lock()
	e.armed = time.Time{} // the timer has fired
	e.mu.Unlock()
	now := e.o.Now()
	for t := e.timers.due(now); t != nil; t = e.timers.due(now) {
		t.fire(now)
	}
	e.arm()
}

// arm tells Run of the earliest deadline if it has changed. Every entry point
// that may change one ends with it.
func (e *Engine) arm() {
	next := e.timers.earliest()
	e.mu.Lock()
	changed := !next.Equal(e.armed)
	e.next, e.armed = next, next
	e.mu.Unlock()
	if changed {
		select {
		case e.rearm <- struct{}{}:
		default:
		}
	}
}

// Close removes all SAs without telling anybody and wipes their keys. To be
// called when Serve and Run have returned.
func (e *Engine) Close() {
	for _, r := range e.recs {
		e.remove(r)
	}
	e.timers = nil
}

// Supported implements keysock.Backend.
func (e *Engine) Supported() keysock.Supported {
	s := keysock.Supported{Encr: alg.AllEncr(), Auth: append(alg.AllInteg(), alg.AHInteg()...)}
	s.Queues = ipsec.Queue(max(1, e.o.Queues))
	if e.o.AllowLegacy {
		s.Encr, s.Auth = append(s.Encr, alg.LegacyEncr()...), append(s.Auth, alg.LegacyInteg()...)
	}
	return s
}

// AddAddress implements keysock.Addresser.
func (e *Engine) AddAddress(p netip.Prefix) error { return onDevice(e.o.AddAddress, p) }

// DeleteAddress implements keysock.Addresser.
func (e *Engine) DeleteAddress(p netip.Prefix) error { return onDevice(e.o.DeleteAddress, p) }

func onDevice(f func(netip.Prefix) error, p netip.Prefix) error {
	if f == nil {
		return refuse(syscall.EOPNOTSUPP, "no device for addresses")
	}
	return f(p)
}

// Status implements keysock.Backend.
func (e *Engine) Status() ([]byte, error) {
	if e.o.Status == nil {
		return []byte("{}"), nil
	}
	return e.o.Status()
}

// Stats are numbers for the status document.
type Stats struct {
	SAs, Policies int
	Acquires      int    // outstanding
	Refused       uint64 // wanted SAs that were not asked for, too many being outstanding
}

// Stats returns the numbers.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return Stats{len(e.recs), e.o.SPD.Len(), len(e.pending), e.refused}
}

// refusal is an error with the errno that goes to the client.
type refusal struct {
	errno syscall.Errno
	text  string
	err   error
}

func (r *refusal) Error() string {
	if r.err != nil {
		return r.text + ": " + r.err.Error()
	}
	return r.text
}

func (r *refusal) Unwrap() []error {
	if r.err == nil {
		return []error{r.errno}
	}
	return []error{r.errno, r.err}
}

func refuse(errno syscall.Errno, text string) error { return &refusal{errno, text, nil} }

func wrap(errno syscall.Errno, text string, err error) error { return &refusal{errno, text, err} }
