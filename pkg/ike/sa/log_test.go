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
			[]string{"NO_PROPOSAL_CHOSEN", "AES_GCM_16-256"}, []string{"peer offers", `rule "b" wants aes-cbc-192`, "AES_CBC-192", "AES_GCM_16-256"}},
		{"ESP proposals", func(l *lab) {
			l.b.policies[0].Out.Proposals = []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1}}
		}, []string{"NO_PROPOSAL_CHOSEN", "AES_GCM_16-256"}, []string{"peer offers", "policy wants", "HMAC_SHA1_96", "AES_GCM_16-256"}},
		{"selectors", func(l *lab) {
			l.b.near, l.b.policies = []Policy{tunnel("10.9.0.0/16", "10.7.0.0/16", 1), tunnel("10.2.0.0/16", "10.3.0.0/16", 1)}, nil
		},
			[]string{"TS_UNACCEPTABLE", "10.1.0.0-10.1.255.255"},
			[]string{"no policy", "peer asks for [10.1.0.0-10.1.255.255] on its side, policy has 10.3.0.0-10.3.255.255", "10.9.0.0"}},
		{"mode", func(l *lab) {
			l.b.near, l.b.policies = []Policy{policy(tunnel("10.2.0.0/16", "10.1.0.0/16", 1).Out.Sel, ipsec.Transport, 1)}, nil
		},
			[]string{"TS_UNACCEPTABLE", "tunnel mode"}, []string{"peer wants tunnel mode, policy has transport"}},
		{"identity", func(l *lab) { l.b.rule.RemoteIDs = pad.Patterns{{ID: pad.AddrID(addrB.Addr())}} },
			[]string{"AUTHENTICATION_FAILED", "local_id", "192.0.2.1"}, []string{"no rule for identity 192.0.2.1", `peer is 192.0.2.1; rule "b" wants [192.0.2.2]`}},
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
