package keyengine

import (
	"fmt"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
)

// The longest packet of InnerMTU fits the link to the octet once it is
// protected, and one octet more does not, in every suite, mode, family and
// encapsulation, and within AH.
func TestInnerMTU(t *testing.T) {
	suites := []struct {
		e           alg.Encr
		encr        int // octets of key
		a           alg.Integ
		auth        int
		iv, al, icv int
	}{
		{alg.EncrAESGCM16, 20, 0, 0, 8, 4, 16}, {alg.EncrAESGCM12, 36, 0, 0, 8, 4, 12}, {alg.EncrAESGCM8, 28, 0, 0, 8, 4, 8},
		{alg.EncrChaCha20Poly1305, 36, 0, 0, 8, 4, 16}, {alg.EncrAESCCM8, 19, 0, 0, 8, 4, 8},
		{alg.EncrAESCTR, 20, alg.IntegHMACSHA1, 20, 8, 4, 12}, {alg.EncrNULL, 0, alg.IntegHMACSHA256, 32, 0, 4, 16},
		{alg.EncrAESCBC, 16, alg.IntegHMACSHA1, 20, 16, 16, 12}, {alg.EncrAESCBC, 32, alg.IntegHMACSHA512, 64, 16, 16, 32},
		{alg.Encr3DESCBC, 24, alg.IntegHMACSHA1, 20, 8, 8, 12},
	}
	known := map[string]int{ // AES-GCM with an ICV of 16 octets, over 1500
		"tunnel v4": 1446, "tunnel v4 udp": 1438, "tunnel v6": 1426, "tunnel v6 udp": 1418,
	}
	met := 0
	for _, su := range suites {
		for _, mode := range []ipsec.Mode{ipsec.Tunnel, ipsec.Transport} {
			for _, six := range []bool{false, true} {
				for _, udp := range []bool{false, true} {
					for _, within := range []bool{false, true} {
						if within && udp {
							continue
						}
						ip, name := 20, fmt.Sprintf("%v v4", mode)
						p := outSA(0x1000, 7)
						p.Mode, p.Encr, p.EncrKey, p.Auth, p.AuthKey = mode, su.e, key(su.encr), su.a, key(su.auth)
						if six {
							p.Src, p.Dst = self6, peer6
							ip, name = 40, fmt.Sprintf("%v v6", mode)
						}
						more := 0
						if udp {
							p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500}
							more, name = 8, name+" udp"
						}
						e := New(Options{})
						count := func(p *ipsec.SAParams) {
							sa, err := sad.New(p, e.o.Now())
							if err != nil {
								t.Fatalf("%v %v %s: %v", su.e, su.a, name, err)
							}
							e.addOverhead(overheadOf(sa), 1)
						}
						count(p)
						if within { // of AH in transport mode, RFC 4302, 2.2: a multiple of 8 over IPv6
							a := *p
							a.Proto, a.Mode, a.Encr, a.EncrKey, a.Auth, a.AuthKey = ipsec.AH, ipsec.Transport, 0, ipsec.Key{}, alg.IntegHMACSHA256, key(32)
							count(&a)
							more, name = 28, name+" in AH"
							if six {
								more = 32
							}
						}
						length := func(n int) int {
							out := ip + more + 8 + su.iv + su.icv
							if mode == ipsec.Transport {
								n -= ip
							}
							return out + (n+2+su.al-1)/su.al*su.al
						}
						for link := 1280; link < 1320; link++ {
							if n := e.InnerMTU(link); length(n) > link || length(n+1) <= link {
								t.Errorf("%v %v %s: %d octets make %d, one more %d, the link takes %d", su.e, su.a, name, n, length(n), length(n+1), link)
							}
						}
						if want, ok := known[name]; ok && su.e == alg.EncrAESGCM16 {
							met++
							if got := e.InnerMTU(1500); got != want {
								t.Errorf("%s: %d over 1500 octets, want %d", name, got, want)
							}
						}
					}
				}
			}
		}
	}
	if met != len(known) {
		t.Errorf("%d of %d known figures met", met, len(known))
	}
	if got := New(Options{}).InnerMTU(1500); got != 1500 {
		t.Errorf("no SAs: %d, want 1500", got)
	}
}
