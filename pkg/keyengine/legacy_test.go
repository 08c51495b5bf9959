package keyengine

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// legacySA is a valid SA with the given algorithms.
func legacySA(e alg.Encr, bits int, a alg.Integ) *ipsec.SAParams {
	key := func(n int) ipsec.Key {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*5 + 3)
		}
		return ipsec.NewKey(b)
	}
	p := &ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: peer, SPI: 0x1000}, Src: self, Mode: ipsec.Transport,
		Encr: e, Auth: a, AuthKey: key(a.Info().KeyLen),
	}
	n, _ := e.KeyLen(bits)
	p.EncrKey = key(n)
	if e == alg.EncrNone {
		p.Proto = ipsec.AH
	}
	return p
}

// Legacy algorithms need the operator's word, and the ESP of RFC 1827, which has
// no integrity, both.
func TestLegacy(t *testing.T) {
	type sa struct {
		e    alg.Encr
		bits int
		a    alg.Integ
	}
	all := []sa{
		{alg.EncrAESCBC, 128, alg.IntegHMACMD5}, {alg.EncrNone, 0, alg.IntegHMACMD5}, {alg.EncrNone, 0, alg.IntegKeyedMD5},
	}
	for _, e := range alg.LegacyEncr() {
		for _, bits := range e.Info().KeyBits {
			a := alg.IntegHMACSHA256
			if e.Info().Old {
				a = alg.IntegNone
			}
			all = append(all, sa{e, bits, a})
		}
	}
	for _, x := range all {
		testRig(t, func(r *rig) {
			told := 0
			r.o.LegacyRefused = func(id ipsec.SAID, e alg.Encr, a alg.Integ) {
				if told++; id.SPI != 0x1000 || e != x.e || a != x.a {
					t.Errorf("told of %v %v %v", id, e, a)
				}
			}
			for _, allowed := range []struct{ legacy, unauthenticated bool }{{false, false}, {false, true}, {true, false}, {true, true}} {
				r.o.AllowLegacy, r.o.AllowUnauthenticated = allowed.legacy, allowed.unauthenticated
				want := error(nil)
				switch {
				case !allowed.legacy:
					want = syscall.ENOSYS
				case x.e.Info().Old && !allowed.unauthenticated:
					want = syscall.EINVAL
				}
				_, err := r.Add(legacySA(x.e, x.bits, x.a), 0)
				if !errors.Is(err, want) {
					t.Errorf("%v %v with %+v: got %v, want %v", x.e, x.a, allowed, err, want)
				}
				if !allowed.legacy && (err == nil || !strings.Contains(err.Error(), "--allow-legacy")) {
					t.Errorf("%v %v: %v does not say what would help", x.e, x.a, err)
				}
				r.Flush(0)
			}
			if told != 2 {
				t.Errorf("%v %v: told of %d refusals, want 2", x.e, x.a, told)
			}
		})
	}
}

// A key daemon that negotiated a legacy algorithm does not get its SA.
func TestLegacyNegotiated(t *testing.T) {
	testRig(t, func(r *rig) {
		r.o.AllowLegacy = true
		i, err := r.GetSPI(keysock.GetSPI{Proto: ipsec.ESP, Src: self, Dst: peer})
		if err != nil {
			t.Fatal(err)
		}
		p := legacySA(alg.Encr3DESCBC, 192, alg.IntegHMACSHA256)
		p.SPI = i.SPI
		if _, err := r.Update(p, 0); !errors.Is(err, syscall.ENOSYS) {
			t.Errorf("got %v, want ENOSYS", err)
		}
	})
}

// What there is no place for in the headers of RFC 1826 and 1827.
func TestOldRefused(t *testing.T) {
	for name, f := range map[string]func(p *ipsec.SAParams){
		"window":    func(p *ipsec.SAParams) { p.ReplayWindow = 32 },
		"ESN":       func(p *ipsec.SAParams) { p.ESN = true },
		"UDP":       func(p *ipsec.SAParams) { p.Encap = &ipsec.Encap{SPort: 4500, DPort: 4500} },
		"integrity": func(p *ipsec.SAParams) { p.Auth, p.AuthKey = alg.IntegHMACMD5, ipsec.NewKey(make([]byte, 16)) },
		"weak key":  func(p *ipsec.SAParams) { p.EncrKey = ipsec.NewKey(make([]byte, 8)) },
	} {
		testRig(t, func(r *rig) {
			r.o.AllowLegacy, r.o.AllowUnauthenticated = true, true
			p := legacySA(alg.EncrDESIV64, 64, alg.IntegNone)
			f(p)
			if _, err := r.Add(p, 0); !errors.Is(err, syscall.EINVAL) {
				t.Errorf("%s: got %v, want EINVAL", name, err)
			}
		})
	}
	testRig(t, func(r *rig) {
		r.o.AllowLegacy = true
		p := legacySA(alg.EncrNone, 0, alg.IntegKeyedMD5)
		p.ReplayWindow = 1
		if _, err := r.Add(p, 0); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("keyed MD5 with a window: got %v, want EINVAL", err)
		}
		for _, a := range append(alg.AHInteg(), alg.IntegKeyedMD5) {
			if _, err := r.Add(legacySA(alg.EncrAESCBC, 128, a), 0); !errors.Is(err, syscall.EINVAL) {
				t.Errorf("ESP with %v: got %v, want EINVAL", a, err)
			}
		}
	})
}

// Clients see legacy algorithms only where they may be used.
func TestSupportedLegacy(t *testing.T) {
	testRig(t, func(r *rig) {
		for _, allowed := range []bool{false, true} {
			r.o.AllowLegacy = allowed
			s := r.Supported()
			if got := slices.ContainsFunc(s.Encr, alg.Encr.Legacy); got != allowed {
				t.Errorf("allowed %v: legacy ciphers listed: %v", allowed, got)
			}
			if got := slices.ContainsFunc(s.Auth, alg.Integ.Legacy); got != allowed {
				t.Errorf("allowed %v: legacy integrity listed: %v", allowed, got)
			}
			if !slices.Contains(s.Auth, alg.IntegAESGMAC256) || !slices.Contains(s.Encr, alg.EncrAESCCM8) {
				t.Errorf("%+v lacks GMAC of AH, or CCM", s)
			}
		}
	})
}
