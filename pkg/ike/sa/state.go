package sa

import "fmt"

// State of an IKE SA.
type State uint8

// States. The initiator's path is down the left, the responder's down the right.
//
//	         Idle
//	       /      \
//	InitSent      HalfOpen
//	Intermediate     |
//	AuthWait      AuthWork
//	AuthSent         |
//	       \       /
//	      Established  <-- Idle, when made by rekeying
//	       /       \
//	  Rekeyed --> Deleting
//	       \       /
//	         Dead --> Gone
const (
	StateIdle         State = iota
	StateInitSent           // IKE_SA_INIT request sent
	StateIntermediate       // IKE_INTERMEDIATE request sent
	StateAuthWait           // keys made; waits for the SPI of the first child SA
	StateAuthSent           // IKE_AUTH request sent
	StateHalfOpen           // IKE_SA_INIT answered
	StateAuthWork           // peer authenticated; waits for the SPI of the first child SA
	StateEstablished        // in use, or about to be
	StateRekeyed            // replaced or redundant; waits for its deletion
	StateDeleting           // Delete sent
	StateDead               // without keys; repeats its last response
	StateGone               // forgotten
	numStates
)

var stateNames = [numStates]string{
	"idle", "init-sent", "intermediate", "auth-wait", "auth-sent", "half-open", "auth-work",
	"established", "rekeyed", "deleting", "dead", "gone",
}

func (s State) String() string {
	if s >= numStates {
		return fmt.Sprintf("State(%d)", uint8(s))
	}
	return stateNames[s]
}

// next lists the states that may follow each state. Every one may end.
var next = [numStates][]State{
	StateIdle:         {StateInitSent, StateHalfOpen, StateEstablished, StateDead, StateGone},
	StateInitSent:     {StateIntermediate, StateAuthWait, StateDead, StateGone},
	StateIntermediate: {StateAuthWait, StateDead, StateGone},
	StateAuthWait:     {StateAuthSent, StateDead, StateGone},
	StateAuthSent:     {StateEstablished, StateDead, StateGone},
	StateHalfOpen:     {StateAuthWork, StateEstablished, StateDead, StateGone},
	StateAuthWork:     {StateEstablished, StateDead, StateGone},
	StateEstablished:  {StateRekeyed, StateDeleting, StateDead, StateGone},
	StateRekeyed:      {StateDeleting, StateDead, StateGone},
	StateDeleting:     {StateDead, StateGone},
	StateDead:         {StateGone},
}

// allowed reports whether an IKE SA in state from may become to.
func allowed(from, to State) bool {
	if from >= numStates {
		return false
	}
	for _, n := range next[from] {
		if n == to {
			return true
		}
	}
	return false
}

// to changes the state of i. It is the only place that does; a change that
// next does not list is our own bug, which no input may reach.
func (i *ikeSA) to(st State) {
	if !allowed(i.state, st) {
		panic(fmt.Sprintf("ike/sa: from %v to %v", i.state, st))
	}
	i.state = st
}

// hasKeys reports whether i can protect messages.
func (i *ikeSA) hasKeys() bool { return i.seal != nil }
