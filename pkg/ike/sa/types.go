package sa

import (
	"io"
	"log/slog"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// SPI is the SPI of an IKE SA.
type SPI = ikev2.SPI

// Config is what both roles need. The rule or rules are arguments of the
// constructors.
type Config struct {
	// Local and Remote are the addresses and ports of the first message, never
	// wildcards: NAT detection compares them.
	Local, Remote netip.AddrPort
	// IKEPort and NATTPort are our own ports; 0 means 500 and 4500. From the
	// first an initiator changes to the second when it finds a NAT; the peer's
	// port is then 4500.
	IKEPort, NATTPort uint16
	// Host answers the machine's questions. It must not be nil.
	Host Host
	// Queues is how many queues the data path has; 0 means one.
	Queues int
	// Addrs are our addresses that may be used besides Local, which may be among
	// them, best first, for MOBIKE (RFC 4555); SetAddresses changes them.
	Addrs []netip.Addr
	// NoNATT says that there is no NAT traversal port now; nil: there is.
	NoNATT func() bool
	// Had are addresses inside that an initiator had before and asks for again,
	// if its rule has it ask.
	Had []netip.Addr
	// CPI gives numbers of which CPIs are made, each another than those before, for
	// as long as that is possible; nil: Rand does.
	CPI func() uint32
	// InitialContact tells the peer that we have no other IKE SA with it
	// (initiator; a responder asks Host.Admit).
	InitialContact bool
	// HalfOpen is how long a responder waits for IKE_AUTH; 0 means 60 s.
	HalfOpen time.Duration
	// TellKeys has the keys of IKE SAs told by IKEKeys.
	TellKeys bool
	// Rand gives SPIs, nonces, private values and the fuzz of timers; nil
	// means crypto/rand.
	Rand io.Reader
}

// Host answers questions that the machine cannot put off. Its methods only
// look things up; they do not call the machine.
type Host interface {
	// Policies returns the policies by which a peer may have the child SA that
	// it asks for, strongest first. The machine narrows (RFC 7296, 2.9) and
	// takes the first that leaves something, so a superset is fine.
	Policies(q Query) []Policy
	// Admit is asked once the initiator has proven its identity to us as
	// responder. first says that there is no other IKE SA with this peer:
	// INITIAL_CONTACT is then sent. An error refuses the peer with
	// AUTHENTICATION_FAILED (unique_ids keep).
	Admit(p Peer) (first bool, err error)
}

// Query is what a peer asks for. Selectors are in our terms: what it called
// TSi is Remote when it is the initiator. In transport mode through a NAT the
// peer's own addresses are already replaced by those that we see (RFC 7296,
// 2.23.1).
type Query struct {
	Peer            Peer
	Mode            ipsec.Mode
	LocalTS, PeerTS []ipsec.TrafficSelector
}

// Policy is an outbound policy and the inbound one that belongs to it. Both
// have a request of ESP, of AH, or of each, in one mode and with the same end
// points. In may be nil: then Out, reversed, serves for both directions with its
// ReqIDs.
type Policy struct {
	Out, In *ipsec.Policy
}

// perFlow: every flow has SAs of its own.
func (p Policy) perFlow() bool { return p.Out.Flags&ipsec.PolicyPerFlow != 0 }

// Peer is who is at the other end.
type Peer struct {
	Rule              *pad.Rule
	LocalID, RemoteID pad.ID
	Local, Remote     netip.AddrPort
	Cert              *cred.Peer // of its certificate, if that proves it; else nil
}

// ChildRequest asks for a child SA.
type ChildRequest struct {
	Seq    uint32 // of the ACQUIRE; 0: nobody waits
	Policy Policy
	// Proposals are the alternatives to be offered; none: those of the policy.
	// Of one that is ESP inside AH, ESP is offered.
	Proposals []ipsec.Proposal
	Flow      *ipsec.Flow // the packet that wanted it, if any: goes first into TSi and TSr
	// Queue wants an SA of its own beside the one for any (RFC 9611).
	Queue ipsec.Queue
}

// Datagram is one received IKE message, without non-ESP marker. Local is the
// address and port that it came to.
type Datagram struct {
	Local, Remote netip.AddrPort
	Data          []byte
}

// Output is one of the types below.
type Output interface{ output() }

// Send sends an IKE message. If Local's port is the NAT traversal port, the
// non-ESP marker goes in front (RFC 7296, 2.23).
type Send struct {
	Local, Remote netip.AddrPort
	Data          []byte
	Again         bool // the same octets have been sent before
}

// Keepalive sends the single octet 0xff (RFC 3948, 4).
type Keepalive struct {
	Local, Remote netip.AddrPort
}

// NeedSPI asks for an inbound SPI that is free, and kept, for each element of
// For, since it is not known yet which of the protocols the peer will choose:
// ChildSPI with the same Token answers it.
// Src is the peer, Dst we. An answer may come after the exchange was given up;
// then the machine, unless it is Done, tells by ReleaseSPI that the SPI is not
// used.
type NeedSPI struct {
	Token    uint32
	Src, Dst netip.Addr
	Mode     ipsec.Mode
	For      []SPIFor
	Encap    *ipsec.Encap // of ESP
	Seq      uint32       // of the ACQUIRE, or 0
	Queue    ipsec.Queue  // that it is for; 0: any
}

// SPIFor is a protocol with the reqid that an SA of it will have.
type SPIFor struct {
	Proto ipsec.Protocol
	ReqID ipsec.ReqID
}

// ReleaseSPI says that an SPI given by ChildSPI will not be used for these
// protocols: the larval SAs can be deleted.
type ReleaseSPI struct {
	SPI    ipsec.SPI
	Dst    netip.Addr
	Protos []ipsec.Protocol
}

// InstallChild installs the two SAs of a child SA. In is to be completed (its
// SPI came from ChildSPI: UPDATE), Out to be added. In comes first. Rekeys is
// the inbound SPI of the child SA that this one replaces, which goes on
// receiving until RemoveChild; 0 if there is none. From now on Out is to be used
// rather than the old one's. Out is nil when the peer rekeys: InstallOut brings
// it, or, if the new child SA is given up before, nothing does.
//
// What cannot be installed is told by ChildLost.
type InstallChild struct {
	In, Out *ipsec.SAParams
	Seq     uint32 // of the ACQUIRE, or 0
	Policy  Policy
	Rekeys  ipsec.SPI
	// Lacks is what the policy wants besides on each packet: the other parts of
	// those of its alternatives that this SA fits. None: the SA is enough.
	Lacks []ipsec.Proposal
}

// InstallOut adds the outbound SA of the child SA that receives on In, whose
// InstallChild came without. What cannot be installed is told by ChildLost.
type InstallOut struct {
	In  ipsec.SAID
	Out *ipsec.SAParams
}

// RemoveChild removes SAs of a child SA. A SAID with SPI 0 stands for "not this
// one": of a pair that we delete the outbound SA goes at once, the inbound one
// when the peer has confirmed. Src are the SAs' source addresses.
type RemoveChild struct {
	In, Out       ipsec.SAID
	InSrc, OutSrc netip.Addr
	Reason        error
}

// ChildFailed says that a child SA that was asked for by Start or AddChild does
// not come into being; the IKE SA stays. Err is a *PeerError, a *LocalError or
// one of the sentinels. With the IKE SA's own failure it comes before Failed.
type ChildFailed struct {
	Seq    uint32
	Policy Policy
	Err    error
}

// NewIKESA says that messages with SPI Local are for this lineage from now on.
// A responder's, until it is authenticated, is also found by Remote and the
// peer's address, for IKE_SA_INIT requests that are sent again.
type NewIKESA struct {
	Local, Remote SPI // Remote is 0 while unknown
	Initiator     bool
	Rekeys        SPI // our SPI of the IKE SA that it replaces, or 0
}

// GoneIKESA says that no more messages with SPI Local are wanted.
type GoneIKESA struct{ Local SPI }

// Established says that the peer is authenticated; it comes once. OnlyOne
// repeats its INITIAL_CONTACT: other lineages with Peer's identities are stale
// and to be dropped (Drop).
type Established struct {
	Peer          Peer
	Local, Remote SPI
	Initiator     bool
	Suite         proposal.IKESuite
	NATLocal      bool // we are behind a NAT
	NATRemote     bool // the peer is
	OnlyOne       bool
}

// Rekeyed says that a child SA (Old, New: inbound SPIs) or the IKE SA (OldIKE,
// NewIKE: our SPIs) has been replaced.
type Rekeyed struct {
	Old, New       ipsec.SPI
	OldIKE, NewIKE SPI
}

// RekeyFailed says that a child SA (Old: its inbound SPI) or the IKE SA (OldIKE:
// our SPI) that we wanted to replace goes on as it is, and why.
type RekeyFailed struct {
	Old    ipsec.SPI
	OldIKE SPI
	Err    error
}

// PeerMoved says that the peer's address or port, as its NAT shows it, has
// changed (RFC 7296, 2.23). IKE already uses the new one. SAs are to be told of it:
// of a new port all, of a new address those in Moved, at their old places; those
// that are in doubt, since a policy names the old address, the machine replaces.
// What cannot be moved is told by ChildLost, of its new place.
type PeerMoved struct {
	Old, New netip.AddrPort
	Moved    []ipsec.SAID
}

// Moved has SAs go to other places, as they are (RFC 4555). What cannot be moved is
// told by ChildLost, of its new place.
type Moved struct{ SAs []Move }

// Move is one of them: From, FromSrc is where it is. It gets To's destination, Src,
// Encap and Home.
type Move struct {
	From    ipsec.SAID
	FromSrc netip.Addr
	To      ipsec.SAID
	Src     netip.Addr
	Encap   *ipsec.Encap
	Home    *ipsec.Ends
}

// Failed says that the lineage is over. Err is a *PeerError, a *LocalError or
// one of the sentinels.
type Failed struct{ Err error }

// IKEKeys are the keys that protect the messages of an IKE SA, for whoever wants
// to look inside a capture; only with TellKeys. They are the receiver's to wipe.
type IKEKeys struct {
	InitiatorSPI, ResponderSPI SPI
	Suite                      proposal.IKESuite
	EI, ER, AI, AR             ipsec.Key
}

// Wipe overwrites the keys.
func (k IKEKeys) Wipe() {
	for _, x := range []ipsec.Key{k.EI, k.ER, k.AI, k.AR} {
		x.Wipe()
	}
}

// AuthLifetime is the peer's wish that we prove our identity anew, by a new IKE
// SA, within a time from now (RFC 4478). It is for the initiator of the first IKE
// SA.
type AuthLifetime struct{ Within time.Duration }

// Done is the last output of an SA.
type Done struct{}

// Message is told of each message that is sent for the first time or received, for
// the log. It costs nothing to speak of where nobody wants the line.
type Message struct {
	ikev2.Header
	Dir      string // "sent", "received"
	Peer     netip.AddrPort
	Octets   int
	Rule     string // its label; "" while it is not known
	Payloads []ikev2.Payload
}

// Log is another line for the log. Keys are those of slog attributes: spi_i, spi_r,
// peer, exchange, msgid, child, notify, err.
type Log struct {
	Level slog.Level
	Msg   string
	Attrs []slog.Attr
}

func (Send) output()         {}
func (Keepalive) output()    {}
func (NeedSPI) output()      {}
func (ReleaseSPI) output()   {}
func (InstallChild) output() {}
func (InstallOut) output()   {}
func (RemoveChild) output()  {}
func (ChildFailed) output()  {}
func (NewIKESA) output()     {}
func (GoneIKESA) output()    {}
func (Established) output()  {}
func (Rekeyed) output()      {}
func (RekeyFailed) output()  {}
func (PeerMoved) output()    {}
func (Moved) output()        {}
func (Failed) output()       {}
func (IKEKeys) output()      {}
func (AuthLifetime) output() {}
func (Done) output()         {}
func (Message) output()      {}
func (Log) output()          {}

// Counters count dropped messages by reason.
type Counters struct {
	Malformed   uint64 // header or payload chain in front of protection
	Integrity   uint64 // did not verify
	MessageID   uint64 // outside the window of one
	Unexpected  uint64 // no such exchange, direction or SPI in this state
	Retransmits uint64 // requests of the peer answered again, or still in work
	Fragments   uint64 // fragments that came twice, or too late
	Surplus     uint64 // requests for one more child SA than the rule's limit
}

// ChildInfo describes a child SA.
type ChildInfo struct {
	In, Out ipsec.SPI
	Mode    ipsec.Mode
	Suite   proposal.ChildSuite
	ReqID   ipsec.ReqID
	Queue   ipsec.Queue // 0: any
	// CPIIn and CPIOut are those of IPComp inside it; 0: there is none.
	CPIIn, CPIOut uint16
	LocalTS       []ipsec.TrafficSelector
	PeerTS        []ipsec.TrafficSelector
	Policy        Policy
	Created       time.Time
	RekeyAt       time.Time // zero: not by age, or never by us
	ExpireAt      time.Time // zero: not by age
	Deleting      bool
}

// Status describes an SA for people.
type Status struct {
	State         State
	Peer          Peer
	Local, Remote SPI
	Initiator     bool
	Suite         proposal.IKESuite
	Created       time.Time // of the present IKE SA
	RekeyAt       time.Time // zero: never by us
	ExpireAt      time.Time
	// NATLocal: we are behind a NAT; NATRemote: the peer is.
	NATLocal, NATRemote bool
	// MOBIKE: both can move (RFC 4555). PeerAddrs are the peer's additional
	// addresses.
	MOBIKE    bool
	PeerAddrs []netip.Addr
	// Lease is what the initiator was assigned; empty: nothing.
	Lease Lease
	// Resent counts requests of ours that were sent again, Waiting those
	// transmissions of the one that has no answer yet; 0: none is on its way.
	Resent   uint64
	Waiting  int
	Children []ChildInfo
	Counters Counters
}
