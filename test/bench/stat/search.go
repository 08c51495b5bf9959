package stat

import "math"

// Trial is what became of one offered rate; all rates in packets a second.
type Trial struct {
	Offered   float64 // asked of the sender
	Sent      float64 // by the sender
	Delivered float64 // to the receiver
	Loss      float64 // of what was sent, 0 to 1
}

// Search looks for the highest rate with at most a given loss.
type Search struct {
	Loss   float64 // that a passing trial may have, 0 to 1
	Start  float64 // first rate, > 0
	Floor  float64 // below it the search gives up
	Step   float64 // precision: ends when a failing rate is within this factor (> 1) of a passing one
	Trials int     // at most so many
}

// A sender that stays this far below what was asked, and sends hardly more
// than at a lower rate, is at its own limit. (Falling short alone may be a
// stall of the machine.)
const (
	slack = 0.95
	gain  = 1.15
)

// Run tries rates: it doubles or halves from Start until the limit lies between
// two of them, and then narrows that down by the geometric mean. A failure
// close to the limit is tried once more, because one stall of the machine
// fails any rate. It returns the passing trial that delivered most; ok is false
// when none passed.
func (s Search) Run(try func(rate float64) (Trial, error)) (best Trial, ok bool, err error) {
	lo, hi := 0.0, 0.0 // passing, failing
	sent := 0.0        // most in a passing trial
	again := false
	for rate, n := s.Start, 0; n < s.Trials && rate >= s.Floor; n++ {
		t, err := try(rate)
		if err != nil {
			return best, ok, err
		}
		pass := t.Loss <= s.Loss
		if pass && (!ok || t.Delivered > best.Delivered) {
			best, ok = t, true
		}
		switch {
		case pass:
			lo, again = rate, false
			if t.Sent < slack*rate && t.Sent < gain*sent {
				return best, ok, nil
			}
			sent = max(sent, t.Sent)
		case !again && t.Loss < 5*s.Loss:
			again = true
			continue
		default:
			hi, again = rate, false
		}
		switch {
		case hi == 0:
			rate = lo * 2
		case lo == 0:
			rate = hi / 2
		case hi <= lo*s.Step:
			return best, ok, nil
		default:
			rate = geometric(lo, hi)
		}
	}
	return best, ok, nil
}

func geometric(a, b float64) float64 { return math.Sqrt(a * b) }
