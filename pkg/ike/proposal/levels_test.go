package proposal

import (
	"fmt"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestLevels: what RFC 8221 says of an algorithm of ESP and AH is what a child SA can
// have of it: by default, where the policy names it, or never. Who adds an algorithm
// has to say which.
func TestLevels(t *testing.T) {
	type level uint8
	const (
		never     level = iota // MUST NOT, SHOULD NOT: by manual key at most
		named                  // for policies that name it
		byDefault              // MUST, SHOULD: of the default offer
	)
	ciphers := map[alg.Encr]level{
		alg.EncrNULL: named, alg.EncrAESCBC: byDefault, alg.EncrAESGCM16: byDefault, // MUST
		alg.EncrChaCha20Poly1305: byDefault, alg.EncrAESCCM8: named, // SHOULD, the latter for small devices
		alg.EncrAESGCM8: named, alg.EncrAESGCM12: named, alg.EncrAESCTR: named, alg.EncrAESCCM12: named, alg.EncrAESCCM16: named,
		alg.EncrNULLAESGMAC: named, alg.EncrAESGCM16IIV: named, alg.EncrAESCCM8IIV: named, alg.EncrChaCha20Poly1305IIV: named,
	}
	integ := map[alg.Integ]level{
		alg.IntegHMACSHA256: byDefault, alg.IntegHMACSHA512: byDefault, alg.IntegHMACSHA384: byDefault, // MUST, SHOULD, not listed
		alg.IntegHMACSHA1: named, // MUST-
		alg.IntegAESXCBC:  named, alg.IntegAESCMAC: named,
	}
	var e []alg.Encr
	var a []alg.Integ
	for _, c := range ForChild(nil, nil, ESNNo) {
		a = append(a, c.Integ...)
		for _, x := range c.Ciphers {
			e = append(e, x.Encr)
		}
	}
	of := func(def, can bool) level {
		switch {
		case def:
			return byDefault
		case can:
			return named
		}
		return never
	}
	for _, x := range append(alg.AllEncr(), alg.LegacyEncr()...) { // of the latter DES is MUST NOT, 3DES SHOULD NOT
		auth := alg.IntegHMACSHA256
		if x.Info().AEAD {
			auth = alg.IntegNone
		}
		if got := of(slices.Contains(e, x), len(ForChild([]ipsec.Proposal{{Encr: x, Auth: auth}}, nil, ESNNo)) > 0); got != ciphers[x] {
			t.Errorf("%v: level %d, want %d", x, got, ciphers[x])
		}
	}
	for _, x := range append(alg.AllInteg(), alg.LegacyInteg()...) { // of the latter MD5 is MUST NOT
		for _, p := range []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: x}, {Shape: ipsec.ShapeAH, AH: x}} {
			if got := of(slices.Contains(a, x), len(ForChild([]ipsec.Proposal{p}, nil, ESNNo)) > 0); got != integ[x] {
				t.Errorf("%v %v: level %d, want %d", p.Shape, x, got, integ[x])
			}
		}
	}
	// MUST NOT: encryption without integrity.
	for _, x := range alg.AllEncr() {
		for _, c := range ForChild([]ipsec.Proposal{{Encr: x}}, nil, ESNNo) {
			if !x.Info().AEAD && (len(c.Integ) == 0 || slices.Contains(c.Integ, alg.IntegNone)) {
				t.Errorf("%v alone: %s", x, fmt.Sprint(c))
			}
		}
	}
}
