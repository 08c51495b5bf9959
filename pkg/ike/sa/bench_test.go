package sa

import (
	"testing"

	"github.com/missiu/missiu/pkg/ike/proposal"
)

// BenchmarkEstablish is an IKE SA with a child SA, both sides, without a network:
// by the default offer, and with its classic part alone.
func BenchmarkEstablish(b *testing.B) {
	for _, name := range []string{"hybrid", "classic"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				l := newLab(b)
				if name == "classic" {
					l.a.rule.Proposals = proposal.WithoutAddKE(l.a.rule.Proposals)
				}
				l.establish()
			}
		})
	}
}
