package keysock

import (
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// State of an SA (RFC 2367, 2.3.1). Numbers are PF_KEY's.
type State uint8

// States: Larval has an SPI and nothing else, Dying is past its soft limit and
// still works, Dead is gone.
const (
	Larval State = 0
	Mature State = 1
	Dying  State = 2
	Dead   State = 3
)

// SAInfo is an SA as the SAD has it. Whoever holds one with keys calls Wipe
// when done with it.
type SAInfo struct {
	ipsec.SAParams
	State          State
	Seq            uint32 // of the ACQUIRE that it answers, 0 none
	Packets, Bytes uint64
	Added          time.Time // whole seconds on the wire; zero: unknown
	FirstUsed      time.Time // zero: never
}

// PolicyInfo is a policy as the SPD has it.
type PolicyInfo struct {
	ipsec.Policy
	Added    time.Time // whole seconds on the wire; zero: unknown
	LastUsed time.Time // zero: never
	Packets  uint64    // that it decided about
}

// GetSPI asks for a larval SA.
type GetSPI struct {
	Proto    ipsec.Protocol
	Src, Dst netip.Addr
	Mode     ipsec.Mode
	ReqID    ipsec.ReqID
	Seq      uint32    // of an ACQUIRE; 0 none
	Min, Max ipsec.SPI // both included; both 0 leaves the choice to the engine
	Encap    *ipsec.Encap
	Queue    ipsec.Queue // whose worker is to have what comes with the SPI; 0: any
}

// Migration moves the end points of a policy and of its SAs (MOBIKE, Mobile IPv6).
type Migration struct {
	Dir   ipsec.Direction
	Sel   ipsec.Selector // of the policy
	Moves []Move         // one at least, no two from the same place
}

// Move is one pair of end points. It concerns the policy's requests of Proto,
// Mode and ReqID (0: any) and, in tunnel mode, with the old end points; and the
// SAs of all of these.
type Move struct {
	Proto          ipsec.Protocol
	Mode           ipsec.Mode
	ReqID          ipsec.ReqID
	OldSrc, OldDst netip.Addr
	NewSrc, NewDst netip.Addr // perhaps of another family
}

// Supported lists what an engine has.
type Supported struct {
	Encr   []alg.Encr
	Auth   []alg.Integ
	Queues ipsec.Queue // how many the engine has; 0: it does not say
}

// Event is what a client hears without having asked: one of Acquire, Expire,
// NewMapping, PolicyAdded, PolicyDeleted, PoliciesFlushed, PoliciesChanged,
// SAAdded, SADeleted, SAsFlushed, Lost. The requests of this client itself make
// no events.
type Event interface{ event() }

// Acquire asks the key daemons for an SA. It goes to registered sockets. Proto is
// the protocol of the packet's missing SA; where Proposals allow, one of another
// protocol answers it too.
type Acquire struct {
	Seq       uint32 // 1 to 0x7fffffff; goes into the requests that answer it
	Proto     ipsec.Protocol
	Src, Dst  netip.Addr // end points of the wanted SA
	PolicyID  uint32
	Priority  uint32 // of the policy
	Mode      ipsec.Mode
	ReqID     ipsec.ReqID
	Proposals []ipsec.Proposal // to be offered, best first; none: any
	Flow      *ipsec.Flow      // the packet that wants it; nil unknown
	Queue     ipsec.Queue      // that wants an SA of its own; 0: any SA is lacking
}

// Expire tells that an SA reached a limit. Soft: it is dying and works on; Hard:
// it is gone. It goes to registered sockets. A hard one with SPI 0 is an Acquire
// that nobody answered.
type Expire struct {
	SAID  ipsec.SAID
	Src   netip.Addr
	Mode  ipsec.Mode
	ReqID ipsec.ReqID
	Hard  bool
}

// NewMapping tells that authenticated ESP in UDP of an inbound SA comes from
// another address or port than the SA has (RFC 3948). The SA is not changed.
type NewMapping struct {
	SAID     ipsec.SAID // Dst is invalid when the server did not tell it
	Seq      uint32     // of the SA
	Mode     ipsec.Mode
	ReqID    ipsec.ReqID
	Old, New netip.AddrPort // of the peer
}

// PolicyAdded tells that a policy is new or replaced.
type PolicyAdded struct{ Policy ipsec.Policy }

// PolicyDeleted tells that a policy is gone.
type PolicyDeleted struct{ Policy ipsec.Policy }

// PoliciesFlushed tells that all policies are gone.
type PoliciesFlushed struct{}

// PoliciesChanged tells that a transaction was committed, or that a policy has
// migrated and its SAs with it: read the SPD again.
type PoliciesChanged struct{}

// SAAdded tells that an SA was added or updated by another client.
type SAAdded struct {
	SAID  ipsec.SAID
	Src   netip.Addr
	Mode  ipsec.Mode
	ReqID ipsec.ReqID
}

// SADeleted tells that an SA was deleted by another client.
type SADeleted struct {
	SAID ipsec.SAID
	Src  netip.Addr
}

// SAsFlushed tells that all SAs of a protocol (0: all) are gone.
type SAsFlushed struct{ Proto ipsec.Protocol }

// Lost tells that N events were dropped at this place because they were not
// read in time: read what matters again.
type Lost struct{ N uint64 }

func (Acquire) event()         {}
func (Expire) event()          {}
func (NewMapping) event()      {}
func (PolicyAdded) event()     {}
func (PolicyDeleted) event()   {}
func (PoliciesFlushed) event() {}
func (PoliciesChanged) event() {}
func (SAAdded) event()         {}
func (SADeleted) event()       {}
func (SAsFlushed) event()      {}
func (Lost) event()            {}

// SAVerb is what an SAChange does.
type SAVerb uint8

// Verbs.
const (
	SAAdd SAVerb = 1 + iota
	SAUpdate
	SADelete
)

// SAChange is a change of an SA in a transaction. P is as in Add and Update; of
// a deletion it has the SAID alone.
type SAChange struct {
	Verb SAVerb
	P    *ipsec.SAParams
}
