package pad

import (
	"fmt"
	"strings"

	"github.com/missiu/missiu/pkg/ike/proposal"
)

// WhyNot tells, of candidates that Authorize has all refused, what each wanted
// that c is not, the nearest ones first in what they say; at most eight.
func WhyNot(candidates []*Rule, c Claim) string {
	var l []string
	for i, r := range candidates {
		if i == 8 {
			l = append(l, "…")
			break
		}
		who := fmt.Sprintf("rule %q", r.Label)
		switch {
		case r.RemoteAuth != c.Method:
			l = append(l, fmt.Sprintf("%s wants proof by %v, not %v", who, r.RemoteAuth, c.Method))
		case c.Method == Cert && !r.Trust.Takes(c.Key):
			l = append(l, fmt.Sprintf("peer has an %v key; %s wants another", c.Key, who))
		case !proposal.ContainsIKE(r.Proposals, c.Suite):
			l = append(l, fmt.Sprintf("%s has no %v", who, c.Suite))
		case !r.PermitsPeer(c.IDi):
			l = append(l, fmt.Sprintf("peer is %v; %s wants %s", c.IDi, who, r.wanted()))
		case !r.answersTo(c.IDr):
			own := "an address"
			if !r.LocalID.IsZero() {
				own = r.LocalID.String()
			}
			l = append(l, fmt.Sprintf("peer asks for %v; by %s we are %s", c.IDr, who, own))
		}
	}
	return strings.Join(l, "; ")
}

// wanted names who the peer may be.
func (r *Rule) wanted() string {
	if len(r.RemoteIDs) == 0 {
		return "any address"
	}
	return fmt.Sprint(r.RemoteIDs)
}
