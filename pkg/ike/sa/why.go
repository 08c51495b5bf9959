package sa

import (
	"errors"
	"fmt"
	"strings"

	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Refusals tell both sides: what the peer asks for, what our policies have, and
// first where the two part.

// maxShown bounds what a peer can put into a line of the log, and how many
// policies stand there.
const maxShown = 8

// Explainer is what a Host may be besides: it lists policies that are for this
// peer whatever the peer asks for, strongest first, a few of them, for the
// log. looked is false when it has been asked too often of late.
type Explainer interface {
	Near(q Query) (ps []Policy, looked bool)
}

// noPolicy is why the peer gets nothing for its selectors.
func (s *SA) noPolicy(q Query) error {
	asked := fmt.Sprintf("no policy for %v mode, local %v, remote %v", q.Mode, showTS(q.LocalTS), showTS(q.PeerTS))
	e, ok := s.cfg.Host.(Explainer)
	if !ok {
		return errors.New(asked)
	}
	near, looked := e.Near(q)
	switch {
	case !looked:
		return errors.New(asked)
	case len(near) == 0:
		return fmt.Errorf("%s; no policy at all is for this peer", asked)
	}
	var have []string
	best, least := "", 99
	for k, p := range near {
		l, r := selectorTS(p.Out.Sel)
		mode, _ := p.mode()
		if k < maxShown {
			have = append(have, fmt.Sprintf("%v: %v to %v", mode, l, r))
		}
		if n, why := tsDifference(q, mode, l, r); n < least {
			best, least = why, n
		}
	}
	return fmt.Errorf("%s; %s; policies [%s]", asked, best, strings.Join(have, ", "))
}

// tsDifference counts in how much a policy differs from what the peer asks for,
// and tells the first.
func tsDifference(q Query, mode ipsec.Mode, l, r ipsec.TrafficSelector) (n int, why string) {
	differs := func(format string, a ...any) {
		if n++; why == "" {
			why = fmt.Sprintf(format, a...)
		}
	}
	if mode != q.Mode {
		differs("peer wants %v mode, policy has %v", q.Mode, mode)
	}
	if len(narrow(q.LocalTS, []ipsec.TrafficSelector{l})) == 0 {
		differs("peer asks for %v on our side, policy has %v", showTS(q.LocalTS), l)
	}
	if len(narrow(q.PeerTS, []ipsec.TrafficSelector{r})) == 0 {
		differs("peer asks for %v on its side, policy has %v", showTS(q.PeerTS), r)
	}
	if n == 0 {
		why = "in transport mode a policy must hold the addresses of the IKE SA itself"
	}
	return n, why
}

func showTS(l []ipsec.TrafficSelector) string {
	more := ""
	if len(l) > maxShown {
		l, more = l[:maxShown], " …"
	}
	return strings.TrimSuffix(fmt.Sprint(l), "]") + more + "]"
}

// ofPolicy lets an error say that what our side wants is the policy's.
func ofPolicy(err error) error {
	var m *proposal.Mismatch
	if errors.As(err, &m) {
		m.Who = "policy"
	}
	return err
}
