// Package pad is the Peer Authorization Database (RFC 4301, 4.4.3): rules that
// say who a peer may be, how each side proves its identity, and how the IKE SA
// with it behaves. Rules come from pkg/config/ikeconf or the command line, with
// every default filled in; what traffic is protected is not here but in the SPD.
//
// A DB and its rules are not changed once made; they are safe for concurrent
// use. For pkg/ike, what lies in it, and pkg/config/ikeconf.
package pad

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
)

// AuthMethod is how a side proves its identity.
type AuthMethod uint8

// Methods: a pre-shared key; a signature by the key of a certificate.
const (
	Preshared AuthMethod = 1 + iota
	Cert
)

func (m AuthMethod) valid() bool { return m == Preshared || m == Cert }

func (m AuthMethod) String() string {
	switch m {
	case Preshared:
		return "preshared"
	case Cert:
		return "cert"
	}
	return fmt.Sprintf("AuthMethod(%d)", uint8(m))
}

// StartAction says when we initiate.
type StartAction uint8

// Start actions: when a packet needs it; also at load and whenever the SA is
// lost; never.
const (
	StartTrap StartAction = iota
	StartNow
	StartNone
)

func (a StartAction) String() string {
	switch a {
	case StartTrap:
		return "trap"
	case StartNow:
		return "start"
	case StartNone:
		return "none"
	}
	return fmt.Sprintf("StartAction(%d)", uint8(a))
}

// NATT is the handling of NATs (RFC 7296, 2.23).
type NATT uint8

// NAT traversal: by detection; always ESP in UDP; never.
const (
	NATTAuto NATT = iota
	NATTForce
	NATTNo
)

// DPDAction is what follows the death of a peer.
type DPDAction uint8

// Actions: the next packet negotiates again; negotiate at once.
const (
	DPDClear DPDAction = iota
	DPDRestart
)

// UniqueIDs says what a second IKE SA with the same identity means.
type UniqueIDs uint8

// Choices: kept unless INITIAL_CONTACT arrives; the old one goes; the new one
// is refused; kept, and INITIAL_CONTACT is ignored.
const (
	UniqueNo UniqueIDs = iota
	UniqueReplace
	UniqueKeep
	UniqueNever
)

// SendCert says when we send our certificate.
type SendCert uint8

// Choices: when the peer asks for one (CERTREQ); in any case; never, since the
// peer has it.
const (
	SendCertIfAsked SendCert = iota
	SendCertAlways
	SendCertNever
)

// Lifetime is the life of an IKE SA.
type Lifetime struct {
	Hard time.Duration // then it ends
	Soft time.Duration // then it is rekeyed; equal to Hard: never by us
}

// Retransmit says how often and after what waits a request is sent again: 1+Limit
// transmissions, waits from Init doubling up to Max.
type Retransmit struct {
	Limit     int
	Init, Max time.Duration
}

// Keys is a pre-shared key, one for each side's AUTH; mostly they are the same.
type Keys struct {
	Local, Remote ipsec.Key
}

// PairKeys are keys for a pair of identities.
type PairKeys struct {
	LocalID, RemoteID Pattern
	Keys
}

// Rule is one entry. Zero values mean what the comments say; NewDB checks, and
// NewRule gives one with the built-in defaults.
type Rule struct {
	Label string

	// Local holds the addresses of ours that the rule is for; empty: any.
	// Remote those of the peers; RemoteHosts are names whose addresses
	// WithHosts adds to it.
	Local, Remote []Range
	RemoteHosts   []string
	RemotePort    uint16 // where a negotiation that we start goes

	// LocalID is who we are; the zero ID is our own address. RemoteIDs are who
	// the peer may be; empty: any identity of type address, since with NAT
	// addresses change and the key is the rule's.
	LocalID   ID
	RemoteIDs Patterns

	LocalAuth, RemoteAuth AuthMethod
	// PSK is the rule's key. Without it (no octets) the first of Pairs that
	// matches both identities serves.
	PSK   Keys
	Pairs []PairKeys
	// Own is what LocalAuth Cert signs with, Trust whose certificates RemoteAuth
	// Cert believes.
	Own         *cred.Own
	Trust       *cred.Trust
	SendCert    SendCert
	SendCertReq bool
	// AnyOwnID: LocalID was taken from Own's certificate, not configured, so a peer
	// that asks for another identity of that certificate gets it.
	AnyOwnID bool

	Proposals []proposal.IKE // best first
	IKE       Lifetime

	// Child SAs: methods for PFS in order of preference (proposal.KESame for
	// the IKE SA's, alg.KENone for none), sequence numbers, window, lifetimes
	// where the policy says nothing.
	PFS                  []alg.KE
	ChildAddKE           [][]alg.KE // additional key exchanges where there is one, as of proposal.Child
	ESN                  proposal.ESN
	ReplayWindow         uint32
	AggFrag              AggFrag
	TFC                  uint16 // as ipsec.SAParams has it, for peers that take such padding
	IPComp               bool   // IPComp inside ESP, for peers that want it too
	PerQueue             PerQueue
	ChildHard, ChildSoft ipsec.Lifetime
	RekeyFuzz            int // percent of the lifetime by which soft limits vary
	// ChildLimit is how many child SAs an IKE SA may have for its peer to be granted
	// one more; 0: any number.
	ChildLimit int

	// ChildAddrs and what Pools lease the peer are what it may have of a policy
	// that leaves the peer open; with neither, all of the policy.
	ChildAddrs []Range
	Pools      []*Pool
	Request    Request

	// Reauth is how long an authentication counts, 0 for ever; ReauthBreak has the
	// initiator delete the old IKE SA before it makes a new one.
	Reauth      time.Duration
	ReauthBreak bool
	// ChildIdle: child SAs without traffic for so long are deleted; 0: never.
	ChildIdle time.Duration

	// Hook is a program that is run when an IKE SA comes and goes; "": none.
	Hook string
	// DNSFile takes the name servers that the peer assigns; "": none.
	DNSFile string

	Retransmit     Retransmit
	DPD            time.Duration // idle time before a probe; 0: never
	DPDAction      DPDAction
	NATT           NATT
	Keepalive      time.Duration // NAT keepalive (RFC 3948, 4); 0: never
	MOBIKE         bool          // addresses may change (RFC 4555)
	MOBIKECheck    bool          // and SAs follow a peer only once it answers from there
	InitialContact bool
	UniqueIDs      UniqueIDs
	StartAction    StartAction
	NonceLen       int

	// FragmentSize is the largest IP datagram of a protected IKE message, in
	// octets, before it is sent in fragments (RFC 7383); 0: no fragments.
	FragmentSize int

	Childless Childless

	// PPK says whether post-quantum pre-shared keys are used (RFC 8784). PPKID
	// is the one that we name as initiator, and the only one that a peer may
	// name; empty: none, and any of PPKs, by identity.
	PPK   PPK
	PPKID string
	PPKs  map[string]ipsec.Key
}

// Childless says whether IKE_AUTH may do without a child SA (RFC 6023).
type Childless uint8

// Choices: where there is none to ask for, and as the peer likes; always, child
// SAs come by exchanges of their own; never.
const (
	ChildlessAllow Childless = iota
	ChildlessForce
	ChildlessNo
)

// PPK says whether post-quantum pre-shared keys are used.
type PPK uint8

// PPK choices, the zero value first.
const (
	PPKNo PPK = iota
	PPKPrefer
	PPKRequire
)

// PerQueue says whether there are to be child SAs for single queues (RFC 9611).
type PerQueue uint8

// PerQueue choices, the zero value first.
const (
	PerQueuePrefer PerQueue = iota
	PerQueueNo
	PerQueueRequire
)

// AggFrag says whether ESP in tunnel mode is to be in AGGFRAG mode (RFC 9347).
type AggFrag uint8

// AggFrag choices, the zero value first.
const (
	AggFragNo AggFrag = iota
	AggFragPrefer
	AggFragRequire
)

// NewRule returns a rule with the built-in defaults: pre-shared keys, any local
// address, no remote ones.
func NewRule(label string) *Rule {
	r := &Rule{
		Label: label, RemotePort: 500,
		LocalAuth: Preshared, RemoteAuth: Preshared,
		Proposals:      proposal.DefaultIKE(),
		PFS:            []alg.KE{proposal.KESame, alg.KENone},
		ReplayWindow:   1024,
		RekeyFuzz:      5,
		ChildLimit:     4096,
		Retransmit:     Retransmit{Limit: 8, Init: time.Second, Max: 30 * time.Second},
		DPD:            time.Minute,
		Keepalive:      20 * time.Second,
		MOBIKE:         true,
		MOBIKECheck:    true,
		InitialContact: true,
		SendCertReq:    true,
		NonceLen:       32,
		FragmentSize:   1280,
	}
	r.SetIKELife(4 * time.Hour)
	r.SetChildLife(time.Hour)
	return r
}

// SetIKELife sets the life of IKE SAs, the soft limit at 90 %.
func (r *Rule) SetIKELife(d time.Duration) { r.IKE = Lifetime{Hard: d, Soft: d / 10 * 9} }

// SetChildLife sets the life of child SAs in time, the soft limit at 90 %.
func (r *Rule) SetChildLife(d time.Duration) {
	r.ChildHard.AddTime, r.ChildSoft.AddTime = d, d/10*9
}

// Identity returns who we are to a peer that we speak with from address local.
func (r *Rule) Identity(local netip.Addr) ID {
	if r.LocalID.IsZero() {
		return AddrID(local)
	}
	return r.LocalID
}

// answersTo reports whether a peer that asks for id means us. To a rule
// without identity of its own any address will do: behind a NAT the peer knows
// us by another.
func (r *Rule) answersTo(id ID) bool {
	switch {
	case id.IsZero():
		return true
	case r.LocalID.IsZero():
		return id.IsAddr()
	}
	return Pattern{ID: r.LocalID}.Match(id) || r.alsoOwn(id)
}

func (r *Rule) alsoOwn(id ID) bool { return r.AnyOwnID && r.Own.Holds(id.Wire()) == nil }

// IdentityFor returns who we are to a peer that asks for an identity, or for none.
func (r *Rule) IdentityFor(local netip.Addr, asked ID) ID {
	own := r.Identity(local)
	if !asked.IsZero() && !(Pattern{ID: own}).Match(asked) && r.alsoOwn(asked) {
		return asked
	}
	return own
}

// MayBe reports whether id is one that we can have by this rule.
func (r *Rule) MayBe(local netip.Addr, id ID) bool { return r.Identity(local) == id || r.alsoOwn(id) }

// ExpectedID returns the identity to ask the peer for (IDr in the initiator's
// IKE_AUTH): the only one that the rule permits; false where it permits several.
func (r *Rule) ExpectedID() (ID, bool) {
	if len(r.RemoteIDs) == 1 {
		return r.RemoteIDs[0].Exact()
	}
	return ID{}, false
}

// PermitsPeer reports whether the peer may call itself id.
func (r *Rule) PermitsPeer(id ID) bool {
	if len(r.RemoteIDs) == 0 {
		return id.IsAddr()
	}
	return r.RemoteIDs.Match(id)
}

// Keys returns the pre-shared keys between these identities. The caller does
// not wipe them: they are the rule's.
func (r *Rule) Keys(local, remote ID) (Keys, bool) {
	if r.PSK.Local.Len()+r.PSK.Remote.Len() > 0 {
		return r.PSK, true
	}
	for _, p := range r.Pairs {
		if p.LocalID.Match(local) && p.RemoteID.Match(remote) {
			return p.Keys, true
		}
	}
	return Keys{}, false
}

// Covers reports whether the rule is for this pair of addresses.
func (r *Rule) Covers(local, remote netip.Addr) bool {
	return r.CoversLocal(local) && contains(r.Remote, remote)
}

// CoversLocal reports whether the rule is for an address of ours.
func (r *Rule) CoversLocal(local netip.Addr) bool {
	return len(r.Local) == 0 || contains(r.Local, local)
}

// DB is the database: rules in the order of the file.
type DB struct {
	rules []*Rule
}

// NewDB makes a database. Labels must be unique, and every rule usable.
func NewDB(rules []*Rule) (*DB, error) {
	seen := map[string]bool{}
	for _, r := range rules {
		if r.Label == "" || seen[r.Label] {
			return nil, fmt.Errorf("pad: rule %q: label missing or used twice", r.Label)
		}
		seen[r.Label] = true
		if err := r.check(); err != nil {
			return nil, fmt.Errorf("pad: rule %q: %w", r.Label, err)
		}
	}
	return &DB{slices.Clone(rules)}, nil
}

func (r *Rule) check() error {
	switch {
	case len(r.Remote) == 0 && len(r.RemoteHosts) == 0:
		return fmt.Errorf("no remote address")
	case !r.LocalAuth.valid() || !r.RemoteAuth.valid():
		return fmt.Errorf("authentication %v, %v: not supported", r.LocalAuth, r.RemoteAuth)
	case r.LocalAuth == Cert && (r.Own == nil || r.LocalID.IsZero()):
		return fmt.Errorf("no certificate, or no identity, of our own")
	case r.RemoteAuth == Cert && r.Trust == nil:
		return fmt.Errorf("no trusted certificate")
	case len(r.Pairs) > 0:
	case r.LocalAuth == Preshared && r.PSK.Local.Len() == 0, r.RemoteAuth == Preshared && r.PSK.Remote.Len() == 0:
		return fmt.Errorf("no key")
	case len(r.Proposals) == 0:
		return fmt.Errorf("no proposals")
	case r.NonceLen < 16 || r.NonceLen > 256:
		return fmt.Errorf("nonce of %d octets", r.NonceLen)
	case r.FragmentSize != 0 && (r.FragmentSize < 576 || r.FragmentSize > 65535):
		return fmt.Errorf("fragments of %d octets", r.FragmentSize)
	case r.PPK == PPKRequire && len(r.PPKs) == 0:
		return fmt.Errorf("PPK required, and none there")
	case r.PPK == PPKRequire && r.PPKID != "" && r.PPKs[r.PPKID].Len() == 0:
		return fmt.Errorf("PPK %q required, and not there", r.PPKID)
	case r.IKE.Soft > r.IKE.Hard:
		return fmt.Errorf("soft life above the lifetime")
	}
	for _, l := range [][]Range{r.Local, r.Remote} {
		for _, a := range l {
			if !a.valid() {
				return fmt.Errorf("address range %v", a)
			}
		}
	}
	return nil
}

// Rules returns the rules in order. The slice is the DB's.
func (d *DB) Rules() []*Rule { return d.rules }

// Rule returns the rule of that label, or nil.
func (d *DB) Rule(label string) *Rule {
	for _, r := range d.rules {
		if r.Label == label {
			return r
		}
	}
	return nil
}

// Outbound returns the rule by which we initiate to remote: the first that
// covers both addresses and may start; nil if there is none.
func (d *DB) Outbound(local, remote netip.Addr) *Rule {
	for _, r := range d.rules {
		if r.StartAction != StartNone && r.Covers(local, remote) {
			return r
		}
	}
	return nil
}

// Inbound returns the candidates for a peer that initiates, in order: the
// rules that cover both addresses. Before IKE_AUTH nothing else is known.
func (d *DB) Inbound(local, remote netip.Addr) []*Rule {
	var c []*Rule
	for _, r := range d.rules {
		if r.Covers(local, remote) {
			c = append(c, r)
		}
	}
	return c
}

// Claim is what is known of an initiator in IKE_AUTH.
type Claim struct {
	IDi    ID
	IDr    ID // whom the peer asked for; zero: nobody
	Method AuthMethod
	Key    cred.KeyType // of its certificate; 0: not known
	Suite  proposal.IKESuite
}

// Authorize returns the first candidate that contains the suite and permits
// the identities and the method. The peer still has to prove them.
func Authorize(candidates []*Rule, c Claim) *Rule {
	for _, r := range candidates {
		if r.RemoteAuth == c.Method && (c.Method != Cert || r.Trust.Takes(c.Key)) && proposal.ContainsIKE(r.Proposals, c.Suite) &&
			r.PermitsPeer(c.IDi) && r.answersTo(c.IDr) {
			return r
		}
	}
	return nil
}

// WithHosts returns a database in which the addresses of host names count as
// remote ones. addrs gives those of each name; a name without any is left out.
func (d *DB) WithHosts(addrs map[string][]netip.Addr) *DB {
	out := &DB{}
	for _, r := range d.rules {
		if len(r.RemoteHosts) > 0 {
			c := *r
			c.Remote = slices.Clone(r.Remote)
			for _, h := range r.RemoteHosts {
				for _, a := range addrs[strings.ToLower(h)] {
					c.Remote = append(c.Remote, Range{a.Unmap(), a.Unmap()})
				}
			}
			r = &c
		}
		out.rules = append(out.rules, r)
	}
	return out
}

// Wipe overwrites every key. No IKE SA may use the database any more.
func (d *DB) Wipe() {
	for _, r := range d.rules {
		r.PSK.wipe()
		for _, p := range r.Pairs {
			p.Keys.wipe()
		}
		for _, k := range r.PPKs {
			k.Wipe()
		}
	}
}

func (k Keys) wipe() {
	k.Local.Wipe()
	k.Remote.Wipe()
}
