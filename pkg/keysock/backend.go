package keysock

import (
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
)

// Backend is the key engine behind a [Server]. Every call comes from the one
// goroutine that runs Server.Serve; a call returns when its effect is in force.
//
// An error that is or wraps a syscall.Errno goes to the client as that errno,
// any other one as EINVAL. The errnos that clients know: ENOENT (policy not
// there), ESRCH (SA not there), EEXIST (it exists; no SPI free), EINVAL.
//
// Keys: Add and Update give p and its keys to the backend, unless they return an
// error, upon which keysock wipes them. What Get returns belongs to keysock,
// which wipes its keys when they are sent (for a dump that is later, from
// another goroutine): the backend returns a clone, of the keys too
// (ipsec.Key.Clone). Other results need no keys, and theirs are neither read nor
// wiped. Nothing returned may change afterwards.
type Backend interface {
	// Supported returns the algorithms that SAs may have.
	Supported() Supported

	// GetSPI makes a larval SA. Min and Max are both 0 or a valid range.
	GetSPI(GetSPI) (*SAInfo, error)
	// Add makes an SA. Addresses are valid and of one family, mode is Transport
	// or Tunnel, key lengths fit the algorithms, Encr is EncrNone only for AH.
	// seq is that of the Acquire it answers, 0 or unknown otherwise; seqs of
	// 0x80000000 and above, which clients of this package make up, come as 0.
	Add(p *ipsec.SAParams, seq uint32) (*SAInfo, error)
	// Update completes a larval SA or gives new lifetimes and NAT-T ports to a
	// mature one. p is as in Add. The result shows what is, not what was asked.
	Update(p *ipsec.SAParams, seq uint32) (*SAInfo, error)
	// Delete removes an SA; src takes no part in finding it and may be invalid.
	Delete(id ipsec.SAID, src netip.Addr) (*SAInfo, error)
	Get(id ipsec.SAID, src netip.Addr) (*SAInfo, error)
	// Flush removes the SAs of proto, 0 all, and tells if there were any.
	Flush(proto ipsec.Protocol) (removed bool)
	// SAIDs returns the SAs of proto, 0 all, larval ones too, oldest first. A dump
	// shows of these what Get still finds when their turn comes.
	SAIDs(proto ipsec.Protocol) []ipsec.SAID
	// StageSA is Add, Update or Delete within conn's transaction: what can be
	// refused is refused now, and Commit carries it out. The result is the SA as
	// it will be, or as it was. Update is for a mature SA with which nothing else
	// happens in the transaction.
	StageSA(conn uint64, c SAChange) (*SAInfo, error)
	// AcquireFailed is a key daemon's report that it cannot answer an Acquire;
	// an unknown seq is no error.
	AcquireFailed(seq uint32, errno syscall.Errno)

	// Policy calls name the connection, whose transaction, if one is open, they
	// work on. The result is the policy in full, with its ID and the reqids
	// that the SPD chose.
	AddPolicy(conn uint64, p *ipsec.Policy) (*PolicyInfo, error)
	// UpdatePolicy makes the policy or replaces the one with the same selector
	// and direction, keeping its ID.
	UpdatePolicy(conn uint64, p *ipsec.Policy) (*PolicyInfo, error)
	DeletePolicy(conn uint64, dir ipsec.Direction, sel ipsec.Selector) (*PolicyInfo, error)
	DeletePolicyID(conn uint64, id uint32) (*PolicyInfo, error)
	GetPolicy(conn uint64, id uint32) (*PolicyInfo, error)
	// Policies returns a snapshot in the order in which policies are tried.
	Policies(conn uint64) []*PolicyInfo
	FlushPolicies(conn uint64) (removed bool)

	// Migrate carries out m or none of it: ENOENT without such a policy, ENODATA if
	// no request of it fits a move, EEXIST if an SA with a moved one's SPI is at
	// the new place, EBUSY during a transaction.
	Migrate(m *Migration) error

	// Begin opens a transaction of conn; EBUSY if it may not now.
	Begin(conn uint64) error
	// Commit puts it in force. After an error it is closed and had no effect:
	// EEXIST and ESRCH tell of SAs that have come and gone in the meantime.
	Commit(conn uint64) error
	// Abort forgets it. It is called for a connection that ends with one open.
	Abort(conn uint64) error

	// Status returns a JSON document about the daemon.
	Status() ([]byte, error)
}

// Addresser is a Backend with a device. Without it requests for addresses are
// refused with EOPNOTSUPP.
type Addresser interface {
	// AddAddress gives the device an address and DeleteAddress takes it away. That
	// it has it already is no error; that it has it not is ENOENT.
	AddAddress(p netip.Prefix) error
	DeleteAddress(p netip.Prefix) error
}

// Audience is a Backend that is told who hears events.
type Audience interface {
	// Registered: a connection hears events from now on, for whatever SA type it has
	// registered; its answer is on its way. It is called once for each.
	Registered(conn uint64)
}

// Mover is a Backend whose mature SAs can go to other end points one by one.
// Without it the request is refused with EOPNOTSUPP.
type Mover interface {
	// Move gives the SA id the addresses and ports of p, which is as in Add and
	// otherwise the same SA. It keeps its SPI, keys, sequence numbers and limits.
	// ESRCH: it is not there; EEXIST: another one has the place.
	Move(id ipsec.SAID, p *ipsec.SAParams) (*SAInfo, error)
}
