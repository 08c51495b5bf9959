package sa

import (
	"fmt"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Whoever looks for the reason of a refusal finds on one line what both sides
// want, on the side that refuses and on the side that is refused as far as it
// can know.
func TestRefusalsTellBothSides(t *testing.T) {
	other := []proposal.IKE{{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESCBC, Bits: 192}}, Integ: []alg.Integ{alg.IntegHMACSHA384},
		PRF: []alg.PRF{alg.PRFHMACSHA384}, KE: []alg.KE{alg.KEECP521}}}
	for _, c := range []struct {
		name   string
		change func(l *lab)
		a, b   []string // stand together on a line of each
	}{
		{"IKE proposals", func(l *lab) { l.b.rule.Proposals, l.a.rule.Proposals = other, l.a.rule.Proposals[:1] },
			[]string{"NO_PROPOSAL_CHOSEN", "AES_GCM_16-256"}, []string{"AES_CBC-192", "AES_GCM_16-256"}},
		{"ESP proposals", func(l *lab) {
			l.b.policies[0].Out.Proposals = []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1}}
		}, []string{"NO_PROPOSAL_CHOSEN", "AES_GCM_16-256"}, []string{"HMAC_SHA1_96", "AES_GCM_16-256"}},
		{"selectors", func(l *lab) { l.b.policies = nil },
			[]string{"TS_UNACCEPTABLE", "10.1.0.0-10.1.255.255"}, []string{"no policy", "10.1.0.0-10.1.255.255"}},
		{"identity", func(l *lab) { l.b.rule.RemoteIDs = pad.Patterns{{ID: pad.AddrID(addrB.Addr())}} },
			[]string{"AUTHENTICATION_FAILED", "local_id", "192.0.2.1"}, []string{"no rule for identity 192.0.2.1", "[192.0.2.2]"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			c.change(l)
			l.establish()
			for _, x := range []struct {
				n    *node
				want []string
			}{{l.a, c.a}, {l.b, c.b}} {
				found, all := false, ""
				for _, o := range told[Log](x.n) {
					line := fmt.Sprint(o.Msg, " ", o.Attrs)
					all += line + "\n"
					has := true
					for _, w := range x.want {
						has = has && strings.Contains(line, w)
					}
					found = found || has
				}
				if !found {
					t.Errorf("%s: no line with %q:\n%s", x.n.name, x.want, all)
				}
			}
		})
	}
}
