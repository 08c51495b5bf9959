package proposal

import (
	"errors"
	"reflect"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Every algorithm that the daemons have is one that IKE can name, and its
// number leads back to it.
func TestAllAlgorithms(t *testing.T) {
	for _, e := range alg.AllEncr() {
		bits := e.Info().KeyBits
		if bits == nil {
			bits = []int{0}
		}
		for _, b := range bits {
			c := Cipher{e, b}
			tr := EncrTransform(c)
			if got, ok := cipherOf(tr); !ok || got != c {
				t.Errorf("%v: got %v, %v from %v", c, got, ok, tr)
			}
		}
		if _, ok := encrIDs[e]; !ok {
			t.Errorf("%v: no IKE number", e)
		}
		if len(bits) > 1 != sizedByAttribute[e] {
			t.Errorf("%v: key length attribute: got %v, want %v", e, sizedByAttribute[e], len(bits) > 1)
		}
	}
	for _, a := range slices.Concat(alg.AllInteg(), alg.AHInteg()) {
		if got, ok := reverse(integIDs, IntegTransform(a).ID); !ok || got != a {
			t.Errorf("%v: got %v, %v", a, got, ok)
		}
	}
	for _, p := range alg.AllPRF() {
		if got, ok := reverse(prfIDs, PRFTransform(p).ID); !ok || got != p {
			t.Errorf("%v: got %v, %v", p, got, ok)
		}
	}
	for _, k := range alg.AllKE() {
		if name := KETransform(k).String(); name[:2] == "KE" {
			t.Errorf("%v: not in the registry", k)
		}
	}
}

func TestEncrTransformRefused(t *testing.T) {
	for _, tr := range []ikev2.Transform{
		ikev2.NewTransform(ikev2.TransformENCR, ikev2.EncrAES_CBC, 0),
		ikev2.NewTransform(ikev2.TransformENCR, ikev2.EncrAES_CBC, 160),
		ikev2.NewTransform(ikev2.TransformENCR, ikev2.EncrCHACHA20_POLY1305, 256),
		ikev2.NewTransform(ikev2.TransformENCR, ikev2.EncrDES, 0),
		ikev2.NewTransform(ikev2.TransformENCR, ikev2.Encr3DES, 192),
		{Type: ikev2.TransformENCR, ID: uint16(ikev2.EncrAES_CBC), Attributes: []ikev2.Attribute{{Type: 99, Short: true, Value: []byte{1, 0}}}},
	} {
		if c, ok := cipherOf(tr); ok {
			t.Errorf("%v: got %v, want none", tr, c)
		}
	}
}

// wire sends an SA payload through the codec.
func wire(t *testing.T, sa *ikev2.SA) *ikev2.SA {
	t.Helper()
	b, err := (&ikev2.Message{Payloads: []ikev2.Payload{sa}}).Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	m, err := ikev2.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return m.Payloads[0].(*ikev2.SA)
}

func TestIKE(t *testing.T) {
	gcm := IKE{Ciphers: aesGCM16, PRF: sha2PRF, KE: allKE}
	gcm128 := IKE{Ciphers: []Cipher{{alg.EncrAESGCM16, 128}}, PRF: []alg.PRF{alg.PRFHMACSHA384}, KE: []alg.KE{alg.KEECP256}}
	cbc := IKE{Ciphers: []Cipher{{alg.EncrAESCBC, 128}}, Integ: []alg.Integ{alg.IntegHMACSHA1}, PRF: []alg.PRF{alg.PRFHMACSHA1}, KE: []alg.KE{alg.KEMODP2048}}
	des := IKE{Ciphers: []Cipher{{alg.Encr3DESCBC, 192}}, Integ: sha2[:1], PRF: sha2PRF[:1], KE: []alg.KE{alg.KEMODP2048}}
	add := func(kes ...alg.KE) IKE {
		return IKE{Ciphers: aesGCM16, PRF: sha2PRF, KE: allKE, AddKE: [][]alg.KE{kes}}
	}
	for _, tt := range []struct {
		name      string
		offer     []IKE
		responder []IKE
		want      IKESuite
	}{
		{"defaults", DefaultIKE(), DefaultIKE(), IKESuite{Cipher{alg.EncrAESGCM16, 256}, 0, alg.PRFHMACSHA256, alg.KEX25519, AddKEs{alg.KEMLKEM768}}},
		{"peer without additional key exchanges", DefaultIKE(), DefaultIKE()[1:], IKESuite{Cipher{alg.EncrAESGCM16, 256}, 0, alg.PRFHMACSHA256, alg.KEX25519, AddKEs{}}},
		{"a method stands once", []IKE{add(alg.KEMLKEM768, alg.KEX25519), add(alg.KEX25519)}, []IKE{add(alg.KEX25519, alg.KEMLKEM768)},
			IKESuite{Cipher{alg.EncrAESGCM16, 256}, 0, alg.PRFHMACSHA256, alg.KEX25519, AddKEs{alg.KEMLKEM768}}},
		{"the peer can do without", []IKE{add(alg.KEMLKEM1024, alg.KENone)}, []IKE{gcm}, IKESuite{Cipher{alg.EncrAESGCM16, 256}, 0, alg.PRFHMACSHA256, alg.KEX25519, AddKEs{}}},
		{"we can do without", []IKE{gcm}, []IKE{add(alg.KEMLKEM1024, alg.KENone)}, IKESuite{Cipher{alg.EncrAESGCM16, 256}, 0, alg.PRFHMACSHA256, alg.KEX25519, AddKEs{}}},
		{"only one method for two exchanges", []IKE{add(alg.KEX25519)}, []IKE{{Ciphers: aesGCM16, PRF: sha2PRF, KE: allKE[:1], AddKE: [][]alg.KE{{alg.KEX25519}}}}, IKESuite{}},
		{"responder's order of proposals", []IKE{cbc, gcm}, []IKE{gcm, cbc}, IKESuite{Cipher{alg.EncrAESGCM16, 256}, 0, alg.PRFHMACSHA256, alg.KEX25519, AddKEs{}}},
		{"responder's order of alternatives",
			[]IKE{gcm}, []IKE{{Ciphers: []Cipher{{alg.EncrAESGCM16, 128}, {alg.EncrAESGCM16, 256}}, PRF: []alg.PRF{alg.PRFHMACSHA512, alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEMODP4096, alg.KEX25519}}},
			IKESuite{Cipher{alg.EncrAESGCM16, 128}, 0, alg.PRFHMACSHA512, alg.KEMODP4096, AddKEs{}}},
		{"narrow peer", []IKE{gcm128}, DefaultIKE(), IKESuite{Cipher{alg.EncrAESGCM16, 128}, 0, alg.PRFHMACSHA384, alg.KEECP256, AddKEs{}}},
		{"old peer", []IKE{cbc}, DefaultIKE(), IKESuite{}},
		{"old peer that is named", []IKE{cbc}, append(DefaultIKE(), cbc), IKESuite{Cipher{alg.EncrAESCBC, 128}, alg.IntegHMACSHA1, alg.PRFHMACSHA1, alg.KEMODP2048, AddKEs{}}},
		{"triple DES", []IKE{des}, append(DefaultIKE(), des), IKESuite{Cipher{alg.Encr3DESCBC, 192}, alg.IntegHMACSHA256, alg.PRFHMACSHA256, alg.KEMODP2048, AddKEs{}}},
		{"nothing in common", []IKE{cbc}, []IKE{gcm}, IKESuite{}},
	} {
		for _, spi := range [][]byte{nil, {1, 2, 3, 4, 5, 6, 7, 8}} {
			offered := wire(t, OfferIKE(tt.offer, spi))
			got, answer, peer, err := ChooseIKE(tt.responder, offered, len(spi))
			if got != tt.want {
				t.Errorf("%s: got %v, %v; want %v", tt.name, got, err, tt.want)
			}
			if tt.want == (IKESuite{}) {
				var mm *Mismatch
				if !errors.As(err, &mm) || !errors.Is(err, ErrNone) || len(mm.Ours) == 0 || len(mm.Theirs) == 0 {
					t.Errorf("%s: got %v, want a mismatch with both offers", tt.name, err)
				}
				continue
			}
			if !slices.Equal(peer.SPI, spi) {
				t.Errorf("%s: peer's SPI: got %x, want %x", tt.name, peer.SPI, spi)
			}
			if !ContainsIKE(tt.offer, got) || !ContainsIKE(tt.responder, got) {
				t.Errorf("%s: ContainsIKE denies %v", tt.name, got)
			}
			answer.SPI = spi
			checked, err := CheckIKE(tt.offer, wire(t, &ikev2.SA{Proposals: []ikev2.Proposal{answer}}), len(spi))
			if err != nil || checked != got {
				t.Errorf("%s: initiator got %v, %v; want %v", tt.name, checked, err, got)
			}
		}
	}
	if ContainsIKE([]IKE{gcm}, IKESuite{Cipher{alg.EncrAESCBC, 128}, alg.IntegHMACSHA1, alg.PRFHMACSHA1, alg.KEMODP2048, AddKEs{}}) {
		t.Error("ContainsIKE: suite that was never offered")
	}
}

// What a peer may offer that we must pass over, not choke on.
func TestChooseIKEForeign(t *testing.T) {
	good := OfferIKE([]IKE{{Ciphers: aesGCM16[:1], PRF: sha2PRF[:1], KE: allKE[:1]}}, nil).Proposals[0]
	with := func(number uint8, ts ...ikev2.Transform) ikev2.Proposal {
		p := good
		p.Number = number
		p.Transforms = append(slices.Clone(good.Transforms), ts...)
		return p
	}
	esp := with(1)
	esp.Protocol = ikev2.ProtocolESP
	for _, tt := range []struct {
		name   string
		first  ikev2.Proposal
		passed bool
	}{
		{"additional key exchange", with(1, ikev2.NewTransform(ikev2.TransformADDKE1, ikev2.KEML_KEM_512, 0)), true},
		{"one too many", with(1, ikev2.NewTransform(ikev2.TransformADDKE1, ikev2.KEML_KEM_768, 0), ikev2.NewTransform(ikev2.TransformADDKE2, ikev2.KEML_KEM_1024, 0)), true},
		{"unknown transform type", with(1, ikev2.Transform{Type: 200}), true},
		{"ESN in an IKE proposal", with(1, ESNTransform(false)), true},
		{"ESP", esp, true},
		{"unknown cipher beside", with(1, ikev2.NewTransform(ikev2.TransformENCR, ikev2.EncrCAMELLIA_CBC, 256)), false},
		{"integrity NONE", with(1, IntegTransform(alg.IntegNone)), false},
		{"integrity beside AEAD", with(1, IntegTransform(alg.IntegHMACSHA1)), true},
	} {
		want := uint8(1)
		if tt.passed {
			want = 2
		}
		_, answer, _, err := ChooseIKE(DefaultIKE(), &ikev2.SA{Proposals: []ikev2.Proposal{tt.first, with(2)}}, 0)
		if err != nil || answer.Number != want {
			t.Errorf("%s: got proposal %d, %v; want %d", tt.name, answer.Number, err, want)
		}
	}
}

func TestCheckIKERefuses(t *testing.T) {
	ours := DefaultIKE()
	_, good, _, err := ChooseIKE(ours, OfferIKE(ours, nil), 0)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(f func(*ikev2.Proposal)) ikev2.SA {
		p := good
		p.Transforms = slices.Clone(p.Transforms)
		f(&p)
		return ikev2.SA{Proposals: []ikev2.Proposal{p}}
	}
	for name, sa := range map[string]ikev2.SA{
		"no proposal":     {},
		"two proposals":   {Proposals: []ikev2.Proposal{good, good}},
		"number 0":        edit(func(p *ikev2.Proposal) { p.Number = 0 }),
		"number too high": edit(func(p *ikev2.Proposal) { p.Number = 9 }),
		"other number":    edit(func(p *ikev2.Proposal) { p.Number = 2 }),
		"protocol":        edit(func(p *ikev2.Proposal) { p.Protocol = ikev2.ProtocolESP }),
		"SPI":             edit(func(p *ikev2.Proposal) { p.SPI = []byte{1} }),
		"type missing":    edit(func(p *ikev2.Proposal) { p.Transforms = p.Transforms[1:] }),
		"type twice": edit(func(p *ikev2.Proposal) {
			p.Transforms = append(p.Transforms, PRFTransform(alg.PRFHMACSHA512))
		}),
		"not offered": edit(func(p *ikev2.Proposal) {
			p.Transforms[0] = ikev2.NewTransform(ikev2.TransformENCR, ikev2.EncrAES_GCM_8, 256)
		}),
	} {
		if s, err := CheckIKE(ours, &sa, 0); !errors.Is(err, ErrChoice) {
			t.Errorf("%s: got %v, %v; want %v", name, s, err, ErrChoice)
		}
	}
}

func TestForChild(t *testing.T) {
	cbc := func(bits ...int) (cs []Cipher) {
		for _, b := range bits {
			cs = append(cs, Cipher{alg.EncrAESCBC, b})
		}
		return cs
	}
	sha1 := []alg.Integ{alg.IntegHMACSHA1}
	any := sha2
	gcmAll := []Cipher{{alg.EncrAESGCM16, 256}, {alg.EncrAESGCM16, 192}, {alg.EncrAESGCM16, 128}, {alg.EncrChaCha20Poly1305, 256}}
	for _, tt := range []struct {
		name string
		in   ipsec.Proposal
		want []Child
	}{
		{"aes sha1", ipsec.Proposal{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1}, []Child{{Ciphers: cbc(256, 192, 128), Integ: sha1}}},
		{"aes(192..) sha1", ipsec.Proposal{Encr: alg.EncrAESCBC, EncrMinBits: 192, Auth: alg.IntegHMACSHA1}, []Child{{Ciphers: cbc(256, 192), Integ: sha1}}},
		{"aes(128)", ipsec.Proposal{Encr: alg.EncrAESCBC, EncrMinBits: 128, EncrMaxBits: 128}, []Child{{Ciphers: cbc(128), Integ: any}}},
		{"null sha1", ipsec.Proposal{Encr: alg.EncrNULL, Auth: alg.IntegHMACSHA1}, []Child{{Ciphers: []Cipher{{alg.EncrNULL, 0}}, Integ: sha1}}},
		{"gcm", ipsec.Proposal{Encr: alg.EncrAESGCM16, EncrMinBits: 256}, []Child{{Ciphers: []Cipher{{alg.EncrAESGCM16, 256}}}}},
		{"any", ipsec.Proposal{}, []Child{{Ciphers: gcmAll}, {Ciphers: cbc(256, 192, 128), Integ: any}}},
		{"any sha1", ipsec.Proposal{Auth: alg.IntegHMACSHA1}, []Child{{Ciphers: cbc(256, 192, 128), Integ: sha1}}},
		{"AEAD with integrity", ipsec.Proposal{Encr: alg.EncrAESGCM16, Auth: alg.IntegHMACSHA1}, nil},
		{"no such length", ipsec.Proposal{Encr: alg.EncrAESCBC, EncrMinBits: 512}, nil},
		{"no such cipher", ipsec.Proposal{Encr: 200}, nil},
		{"AH", ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACSHA1}, []Child{{AH: true, Integ: sha1}}},
		{"any AH", ipsec.Proposal{Shape: ipsec.ShapeAH}, []Child{{AH: true, Integ: any}}},
		{"GMAC of AH", ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegAESGMAC192}, []Child{{AH: true, Integ: []alg.Integ{alg.IntegAESGMAC192}}}},
		{"GMAC of ESP", ipsec.Proposal{Encr: alg.EncrNULLAESGMAC, EncrMaxBits: 128}, []Child{{Ciphers: []Cipher{{alg.EncrNULLAESGMAC, 128}}}}},
		{"GMAC of AH for ESP", ipsec.Proposal{Encr: alg.EncrNULL, Auth: alg.IntegAESGMAC128}, nil},
		{"ESP inside AH", ipsec.Proposal{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESGCM16, EncrMinBits: 256, AH: alg.IntegHMACSHA1},
			[]Child{{Ciphers: []Cipher{{alg.EncrAESGCM16, 256}}}}},
		{"CTR", ipsec.Proposal{Encr: alg.EncrAESCTR, EncrMinBits: 256, Auth: alg.IntegHMACSHA1}, []Child{{Ciphers: []Cipher{{alg.EncrAESCTR, 256}}, Integ: sha1}}},
		{"CCM", ipsec.Proposal{Encr: alg.EncrAESCCM8, EncrMinBits: 256}, []Child{{Ciphers: []Cipher{{alg.EncrAESCCM8, 256}}}}},
		{"DES", ipsec.Proposal{Encr: alg.EncrDESCBC, Auth: alg.IntegHMACSHA1}, nil},
		{"3DES", ipsec.Proposal{Encr: alg.Encr3DESCBC, Auth: alg.IntegHMACSHA1}, nil},
		{"MD5", ipsec.Proposal{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACMD5}, nil},
		{"MD5 of AH", ipsec.Proposal{Shape: ipsec.ShapeAH, AH: alg.IntegHMACMD5}, nil},
		{"ESP inside MD5 of AH", ipsec.Proposal{Shape: ipsec.ShapeAHESP, Encr: alg.EncrAESGCM16, AH: alg.IntegKeyedMD5}, nil},
	} {
		life := ipsec.Lifetime{Bytes: 1 << 20}
		tt.in.Hard = life
		got := ForChild([]ipsec.Proposal{tt.in}, []alg.KE{alg.KENone}, ESNNo)
		for i := range tt.want {
			tt.want[i].KE, tt.want[i].ESN, tt.want[i].Hard = []alg.KE{alg.KENone}, []bool{false}, life
		}
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
	if got := ForChild(nil, nil, ESNPrefer); len(got) != 2 || !got[0].Ciphers[0].Encr.Info().AEAD || !reflect.DeepEqual(got[0].ESN, []bool{true, false}) {
		t.Errorf("defaults: got %+v", got)
	}
}

func TestChild(t *testing.T) {
	aes := []ipsec.Proposal{{Encr: alg.EncrAESCBC, Auth: alg.IntegHMACSHA1, Hard: ipsec.Lifetime{Bytes: 5}}}
	gcm := []ipsec.Proposal{{Encr: alg.EncrAESGCM16}}
	pfs := []alg.KE{KESame, alg.KENone}
	x := func(ps []ipsec.Proposal, ke []alg.KE, esn ESN) []Child {
		return WithKE(ForChild(ps, ke, esn), alg.KEX25519)
	}
	cbc256 := Cipher{alg.EncrAESCBC, 256}
	gcm256 := Cipher{alg.EncrAESGCM16, 256}
	for _, tt := range []struct {
		name            string
		init, resp      []Child
		initial, rekey  ChildSuite
		noInit, noRekey bool
	}{
		{name: "same policy", init: x(aes, pfs, ESNPrefer), resp: x(aes, pfs, ESNPrefer),
			initial: ChildSuite{Cipher: cbc256, Integ: alg.IntegHMACSHA1, ESN: true},
			rekey:   ChildSuite{Cipher: cbc256, Integ: alg.IntegHMACSHA1, ESN: true, KE: alg.KEX25519}},
		{name: "AEAD, responder without ESN", init: x(gcm, pfs, ESNPrefer), resp: x(gcm, pfs, ESNNo),
			initial: ChildSuite{Cipher: gcm256}, rekey: ChildSuite{Cipher: gcm256, KE: alg.KEX25519}},
		{name: "responder without PFS", init: x(gcm, pfs, ESNNo), resp: x(gcm, []alg.KE{alg.KENone}, ESNNo),
			initial: ChildSuite{Cipher: gcm256}, rekey: ChildSuite{Cipher: gcm256}},
		{name: "initiator without PFS", init: x(gcm, nil, ESNNo), resp: x(gcm, pfs, ESNNo),
			initial: ChildSuite{Cipher: gcm256}, rekey: ChildSuite{Cipher: gcm256}},
		{name: "initiator insists on another group", init: x(gcm, []alg.KE{alg.KEECP384}, ESNNo), resp: x(gcm, pfs, ESNNo),
			initial: ChildSuite{Cipher: gcm256}, rekey: ChildSuite{Cipher: gcm256, KE: alg.KEECP384}},
		{name: "responder insists", init: x(gcm, nil, ESNNo), resp: x(gcm, []alg.KE{alg.KEECP384}, ESNNo),
			initial: ChildSuite{Cipher: gcm256}, noRekey: true},
		{name: "ESN required, not had", init: x(gcm, nil, ESNRequire), resp: x(gcm, nil, ESNNo), noInit: true, noRekey: true},
		{name: "no cipher", init: x(gcm, nil, ESNNo), resp: x(aes, nil, ESNNo), noInit: true, noRekey: true},
	} {
		for _, initial := range []bool{true, false} {
			want, none := tt.rekey, tt.noRekey
			if initial {
				want, none = tt.initial, tt.noInit
			}
			s, answer, peer, err := ChooseChild(tt.resp, wire(t, OfferChild(tt.init, 0x1001, initial)), 0x1002, initial)
			if none {
				if !errors.Is(err, ErrNone) {
					t.Errorf("%s, initial %v: got %v, %v; want %v", tt.name, initial, s, err, ErrNone)
				}
				continue
			}
			got := s
			got.Hard, got.Soft = ipsec.Lifetime{}, ipsec.Lifetime{}
			if err != nil || got != want || peer != 0x1001 {
				t.Errorf("%s, initial %v: got %v, peer %v, %v; want %v", tt.name, initial, s, peer, err, want)
				continue
			}
			if tt.name == "same policy" && s.Hard.Bytes != 5 {
				t.Errorf("%s: lifetime: got %+v, want the policy's", tt.name, s.Hard)
			}
			c, peer, err := CheckChild(tt.init, wire(t, &ikev2.SA{Proposals: []ikev2.Proposal{answer}}), initial)
			c.Hard, c.Soft = ipsec.Lifetime{}, ipsec.Lifetime{}
			if err != nil || c != want || peer != 0x1002 {
				t.Errorf("%s, initial %v: initiator got %v, peer %v, %v; want %v", tt.name, initial, c, peer, err, want)
			}
		}
	}
}

// RFC 7296, 1.2: a key exchange that a peer offers in IKE_AUTH all the same is passed
// over, whatever its method.
func TestInitialOfferWithKE(t *testing.T) {
	for name, theirs := range map[string][]Child{
		"of ours":    WithKE(ForChild(nil, []alg.KE{alg.KEX25519}, ESNNo), alg.KEX25519),
		"of others":  WithKE(ForChild(nil, []alg.KE{alg.KEBrainpoolP512R1}, ESNNo), alg.KEX25519),
		"additional": WithAddKE(WithKE(ForChild(nil, []alg.KE{alg.KEX25519}, ESNNo), alg.KEX25519), [][]alg.KE{{alg.KEMLKEM768}}),
	} {
		s, answer, _, err := ChooseChild(ForChild(nil, []alg.KE{alg.KENone}, ESNNo), wire(t, OfferChild(theirs, 0x1001, false)), 0x1002, true)
		if err != nil || s.KE != alg.KENone || s.AddKE.Methods() != nil || len(answer.Transforms) != 2 {
			t.Errorf("%s: %v, answer %v, %v", name, s, answer, err)
		}
	}
}

func TestChildSPI(t *testing.T) {
	ps := ForChild(nil, nil, ESNNo)
	for _, spi := range [][]byte{nil, {1}, {0, 0, 0, 0}, {0, 0, 0, 255}, {1, 2, 3, 4, 5, 6, 7, 8}} {
		sa := OfferChild(ps, 0x1001, true)
		for i := range sa.Proposals {
			sa.Proposals[i].SPI = spi
		}
		if _, _, _, err := ChooseChild(ps, sa, 0x1002, true); !errors.Is(err, ErrNone) {
			t.Errorf("offer with SPI %x: got %v, want %v", spi, err, ErrNone)
		}
		sa.Proposals = sa.Proposals[:1]
		if _, _, err := CheckChild(ps, sa, true); !errors.Is(err, ErrChoice) {
			t.Errorf("answer with SPI %x: got %v, want %v", spi, err, ErrChoice)
		}
	}
	if got, ok := SPIFromBytes(SPIBytes(0x12345678)); !ok || got != 0x12345678 {
		t.Errorf("got %v, %v", got, ok)
	}
}

func TestFirstKE(t *testing.T) {
	for _, tt := range []struct {
		ps   []Child
		want alg.KE
	}{
		{nil, alg.KENone}, {[]Child{{}}, alg.KENone},
		{WithKE([]Child{{KE: []alg.KE{KESame, alg.KEX25519, alg.KENone}}}, alg.KEX25519), alg.KEX25519},
	} {
		if got := FirstKE(tt.ps); got != tt.want {
			t.Errorf("%v: got %v, want %v", tt.ps, got, tt.want)
		}
	}
}

func TestOfferLimit(t *testing.T) {
	many := make([]Child, 300)
	for i := range many {
		many[i] = Child{Ciphers: aesGCM16[:1], ESN: []bool{false}}
	}
	sa := OfferChild(many, 0x1000, true)
	if n := len(sa.Proposals); n != 255 || sa.Proposals[n-1].Number != 255 {
		t.Errorf("got %d proposals, want 255", n)
	}
}

// Legacy algorithms are never negotiated, nor ciphers with integrity that IKE
// cannot name: an alternative with one is left out, not offered without it.
func TestLegacyLeftOut(t *testing.T) {
	for _, e := range alg.LegacyEncr() {
		for _, a := range []alg.Integ{alg.IntegNone, alg.IntegHMACSHA256} {
			if got := ForChild([]ipsec.Proposal{{Encr: e, Auth: a}}, nil, ESNPrefer); len(got) != 0 {
				t.Errorf("%v %v: offered as %+v", e, a, got)
			}
		}
	}
	for _, a := range append(alg.AHInteg(), alg.LegacyInteg()...) {
		for _, e := range []alg.Encr{alg.EncrNone, alg.EncrAESCBC, alg.EncrNULL} {
			for _, c := range ForChild([]ipsec.Proposal{{Encr: e, Auth: a}}, nil, ESNPrefer) {
				if !c.AH {
					t.Errorf("%v %v: offered as %+v", e, a, c)
				}
			}
		}
	}
}
