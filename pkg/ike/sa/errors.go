package sa

import (
	"errors"
	"fmt"

	"github.com/missiu/missiu/proto/ikev2"
)

// Reasons of Failed, ChildFailed and RemoveChild that callers branch on.
var (
	// ErrTimeout: no answer after all retransmissions.
	ErrTimeout = errors.New("peer does not answer")
	// ErrPeerDeleted: the peer deleted the SA.
	ErrPeerDeleted = errors.New("deleted by peer")
	// ErrClosed: deleted at our owner's wish (Delete, Drop).
	ErrClosed = errors.New("closed")
	// ErrExpired: the hard lifetime is over, or a peer never finished IKE_AUTH.
	ErrExpired = errors.New("lifetime over")
	// ErrRekeyed: replaced by a new SA.
	ErrRekeyed = errors.New("replaced by rekeying")
	// ErrRedundant: one of two that simultaneous rekeying made.
	ErrRedundant = errors.New("redundant after simultaneous rekeying")
)

// PeerError says that the peer refused.
type PeerError struct {
	Exchange ikev2.ExchangeType
	Notify   ikev2.NotifyType
}

func (e *PeerError) Error() string { return fmt.Sprintf("%v: peer says %v", e.Exchange, e.Notify) }

// LocalError says that we refused, and what the peer is told, if anything.
type LocalError struct {
	Exchange ikev2.ExchangeType
	Notify   ikev2.NotifyType // 0: nothing is told
	Err      error
}

func (e *LocalError) Error() string {
	if e.Notify == 0 {
		return fmt.Sprintf("%v: %v", e.Exchange, e.Err)
	}
	return fmt.Sprintf("%v: %v (%v)", e.Exchange, e.Err, e.Notify)
}

// Unwrap gives the cause.
func (e *LocalError) Unwrap() error { return e.Err }
