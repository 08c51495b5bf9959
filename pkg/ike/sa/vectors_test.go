package sa

import (
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

func load(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// IKE_SA_INIT and IKE_AUTH as recorded with strongSwan in either role: its AUTH
// verifies, it accepted ours, and the keys of the child SA are those that it
// logged. Our SPI, nonce and private value are the first that the random
// source gives.
func TestStrongSwan(t *testing.T) {
	var v struct {
		Exchanges []struct {
			Role     string
			Received []struct {
				Port uint16
				Hex  string
			}
			Keys map[string]string
		}
	}
	load(t, "strongswan.json", &v)
	for _, x := range v.Exchanges {
		t.Run(x.Role, func(t *testing.T) {
			l := newLab(t)
			n := l.a
			n.cfg.Rand = rand.NewChaCha8([32]byte{7})
			n.cfg.InitialContact = true
			n.rule.Proposals = []proposal.IKE{{Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 256}},
				PRF: []alg.PRF{alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEX25519}}}
			n.rule.ESN = proposal.ESNNo
			k := ipsec.NewKey([]byte("hello interop"))
			n.rule.PSK = pad.Keys{Local: k, Remote: k}
			n.spi = 0x1000
			r := reqA(1)
			r.Policy.Out.Proposals = []ipsec.Proposal{{Encr: alg.EncrAESCBC, EncrMinBits: 128, EncrMaxBits: 128, Auth: alg.IntegHMACSHA256}}
			n.policies = []Policy{r.Policy}
			if x.Role == "initiator" {
				n.sa = NewInitiator(n.cfg, n.rule)
				n.do(n.sa.Start(l.now, r))
			} else {
				n.sa = NewResponder(n.cfg, []*pad.Rule{n.rule})
			}
			for _, m := range x.Received {
				n.do(n.sa.Receive(l.now, Datagram{netip.AddrPortFrom(addrA.Addr(), m.Port), netip.AddrPortFrom(addrB.Addr(), m.Port), unhex(t, m.Hex)}))
			}
			in := told[InstallChild](n)
			if len(in) != 1 || len(told[Established](n)) != 1 {
				t.Fatalf("%d child SAs, %d Established, %s; want one each", len(in), len(told[Established](n)), n.describe())
			}
			mine, theirs := in[0].Out, in[0].In
			if x.Role == "responder" {
				mine, theirs = theirs, mine
			}
			for name, got := range map[string]ipsec.Key{
				"encryption_initiator": mine.EncrKey, "integrity_initiator": mine.AuthKey,
				"encryption_responder": theirs.EncrKey, "integrity_responder": theirs.AuthKey,
			} {
				if want := x.Keys[name]; hex.EncodeToString(got.Bytes()) != want {
					t.Errorf("%s: got %x, want %s", name, got.Bytes(), want)
				}
			}
		})
	}
}

// Messages that strongSwan exchanged with itself have the shapes that we ask
// for, and open under the keys of its table: the initiator's first.
func TestCapture(t *testing.T) {
	var v struct {
		EI       string `json:"sk_ei"`
		ER       string `json:"sk_er"`
		AI       string `json:"sk_ai"`
		AR       string `json:"sk_ar"`
		Messages []string
	}
	load(t, "psk-aes-cbc.json", &v)
	key := func(s string) ipsec.Key { return ipsec.NewKey(unhex(t, s)) }
	i := &ikeSA{suite: proposal.IKESuite{Cipher: proposal.Cipher{Encr: alg.EncrAESCBC, Bits: 256}, Integ: alg.IntegHMACSHA384, PRF: alg.PRFHMACSHA384}}
	if err := i.setKeys(&keymat.IKEKeys{EI: key(v.EI), ER: key(v.ER), AI: key(v.AI), AR: key(v.AR)}); err != nil {
		t.Fatal(err)
	}
	shapes := map[string]shape{
		"IKE_SA_INIT false": shapeInitRequest, "IKE_SA_INIT true": shapeInitResponse,
		"IKE_AUTH false": shapeAuthRequest, "IKE_AUTH true": shapeAuthResponse,
		"INFORMATIONAL false": shapeInformational, "INFORMATIONAL true": shapeInformational,
	}
	seen := map[string]bool{}
	for n, s := range v.Messages {
		b := unhex(t, s)
		m, err := ikev2.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		if m.Exchange != ikev2.IKE_SA_INIT {
			k := i.open // we are the responder
			if !m.FromInitiator() {
				k = i.seal
			}
			if m, err = ikev2.Open(b, k); err != nil {
				t.Fatalf("message %d: %v", n, err)
			}
		}
		name := m.Exchange.String() + map[bool]string{false: " false", true: " true"}[m.IsResponse()]
		seen[name] = true
		if _, err := shapes[name].check(m.Payloads); err != nil {
			t.Errorf("message %d, %s: %v", n, name, err)
		}
	}
	if len(seen) < 4 {
		t.Errorf("only %v", seen)
	}
}
