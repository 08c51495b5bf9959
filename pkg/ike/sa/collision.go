package sa

import "errors"

// Requests that cross (RFC 7296, 2.8.1, 2.8.2 and 2.25). What the peer's request
// collides with is what we have under way on the same IKE SA; collisions says how
// it is answered then. The peer judges ours by the same table, with the roles
// exchanged, which tells what becomes of our own exchange.

// own is what we have under way: a request on its way, a Delete that is queued, or
// a replacement that is not over.
type own uint8

const (
	ownNothing     own = iota
	ownCreate          // a new child SA
	ownRekey           // a child SA is replaced
	ownReplaced        // the peer has replaced a child SA, and is to close it
	ownClose           // a child SA is closed
	ownRekeyIKE        // the IKE SA is replaced
	ownReplacedIKE     // the peer has replaced the IKE SA, or is closing what lost
	ownCloseIKE        // the IKE SA is closed
	numOwn
)

// ask is what the peer asks for. That it is another child SA than ours, the table
// has to know; who asks (SA.judge) does not.
type ask uint8

const (
	askCreate       ask = iota // a new child SA
	askRekey                   // to replace the child SA that ours is about
	askRekeyOther              // another
	askRekeyUnknown            // one that we do not have
	askClose                   // to close the child SA that ours is about
	askCloseOther              // another
	askCloseUnknown            // one that we do not have
	askRekeyIKE                // to replace the IKE SA
	askCloseIKE                // to close it
	numAsks
)

// verdict is how a request is answered. Of several that hold the greatest counts.
type verdict uint8

const (
	usual    verdict = iota // as if nothing were under way
	both                    // likewise; the lowest nonce decides which SA goes
	unnamed                 // closed, if it is there, and no Delete payload names it
	notFound                // CHILD_SA_NOT_FOUND
	notNow                  // TEMPORARY_FAILURE
)

// collisions is the text of the package doc as data.
var collisions = [numOwn][numAsks]verdict{
	ownNothing:     {usual, usual, usual, notFound, usual, usual, unnamed, usual, usual},
	ownCreate:      {usual, usual, usual, notNow, usual, usual, unnamed, notNow, usual},
	ownRekey:       {usual, both, usual, notNow, usual, usual, unnamed, notNow, usual},
	ownReplaced:    {usual, notNow, usual, notFound, usual, usual, unnamed, usual, usual},
	ownClose:       {usual, notNow, usual, notFound, unnamed, usual, unnamed, notNow, usual},
	ownRekeyIKE:    {notNow, notNow, notNow, notNow, usual, usual, unnamed, both, usual},
	ownReplacedIKE: {notNow, notNow, notNow, notNow, usual, usual, unnamed, notNow, usual},
	ownCloseIKE:    {notNow, notNow, notNow, notNow, usual, usual, unnamed, notNow, usual},
}

// why a request is refused, by what it collides with.
var why = [numOwn]error{
	ownNothing:     errors.New("no such child SA"),
	ownCreate:      errors.New("a child SA is being made"),
	ownRekey:       errors.New("a child SA is being rekeyed"),
	ownReplaced:    errors.New("the child SA has been replaced already"),
	ownClose:       errors.New("a child SA is being closed"),
	ownRekeyIKE:    errors.New("the IKE SA is being rekeyed"),
	ownReplacedIKE: errors.New("the IKE SA has been replaced"),
	ownCloseIKE:    errors.New("the IKE SA is being closed"),
}

// judge says how a request that came by i is answered, and why it is refused. c is
// the child SA that it is about, if that is one of ours.
func (s *SA) judge(i *ikeSA, a ask, c *child) (verdict, error) {
	v, err := collisions[ownNothing][a], why[ownNothing]
	with := func(o own, about *child) {
		x := a
		switch {
		case c == about:
		case a == askRekey:
			x = askRekeyOther
		case a == askClose:
			x = askCloseOther
		}
		if w := collisions[o][x]; w > v {
			v, err = w, why[o]
		}
	}
	if i.req != nil { // else what has the window still waits for an SPI
		switch t := i.active.(type) {
		case *createChild:
			if t.rekeys == nil {
				with(ownCreate, nil)
			} else {
				with(ownRekey, t.rekeys)
			}
		case *deleteChild:
			with(ownClose, t.c)
		case *rekeyIKE:
			with(ownRekeyIKE, nil)
		}
	}
	if c != nil && c.deleting {
		with(ownClose, c)
	}
	if c != nil && (c.replaced != nil || c.peerNew != nil) {
		with(ownReplaced, c)
	}
	if i != s.cur || i.state == StateRekeyed || i.peerNew != nil {
		with(ownReplacedIKE, nil)
	}
	if i == s.cur && s.closing || i.state >= StateDeleting {
		with(ownCloseIKE, nil)
	}
	return v, err
}

// tooLate tells why a request, or the series of exchanges that it began, cannot be
// granted any more; nil: it can. A child SA that it was to replace may be gone.
func (s *SA) tooLate(i *ikeSA, a ask, c *child) error {
	if a == askRekeyIKE && len(s.ikes) >= maxIKESAs {
		return errTooManyIKE
	}
	if c != nil && c.removed {
		return why[ownClose]
	}
	if v, err := s.judge(i, a, c); v == notNow {
		return err
	}
	return nil
}

var errTooManyIKE = errors.New("too many IKE SAs that have been replaced are not closed yet")
