package esp

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// golden is a packet that another implementation made.
type golden struct {
	Name, Mode, Enc, Auth, Inner, Outer, Why string
	Proto                                    uint8
	SPI                                      uint32
	Seq                                      uint32
	ESNHigh                                  *uint32 `json:"esn_high"`
	UDPEncap                                 bool    `json:"udp_encap"`
	EncKey                                   string  `json:"enc_key"`
	AuthKey                                  string  `json:"auth_key"`
	Refuse                                   bool
}

var goldenEncr = map[string]alg.Encr{
	"null": alg.EncrNULL, "aes128-cbc": alg.EncrAESCBC, "aes192-cbc": alg.EncrAESCBC, "aes256-cbc": alg.EncrAESCBC,
	"aes128-gcm16": alg.EncrAESGCM16, "aes256-gcm16": alg.EncrAESGCM16, "chacha20-poly1305": alg.EncrChaCha20Poly1305,
	"aes128-ctr": alg.EncrAESCTR, "aes256-ctr": alg.EncrAESCTR,
	"aes128-ccm8": alg.EncrAESCCM8, "aes192-ccm8": alg.EncrAESCCM8, "aes256-ccm8": alg.EncrAESCCM8,
	"aes128-ccm12": alg.EncrAESCCM12, "aes192-ccm12": alg.EncrAESCCM12, "aes256-ccm12": alg.EncrAESCCM12,
	"aes128-ccm16": alg.EncrAESCCM16, "aes192-ccm16": alg.EncrAESCCM16, "aes256-ccm16": alg.EncrAESCCM16,
	"null-aes128-gmac": alg.EncrNULLAESGMAC, "null-aes192-gmac": alg.EncrNULLAESGMAC, "null-aes256-gmac": alg.EncrNULLAESGMAC,
	"des-cbc": alg.EncrDESCBC, "3des-cbc": alg.Encr3DESCBC,
	"des-iv64": alg.EncrDESIV64, "des-iv32": alg.EncrDESIV32, "3des-iv64": alg.Encr3DESIV64, "3des-iv32": alg.Encr3DESIV32,
}

var goldenInteg = map[string]alg.Integ{
	"": alg.IntegNone, "hmac-sha1-96": alg.IntegHMACSHA1, "hmac-sha256-128": alg.IntegHMACSHA256,
	"hmac-sha384-192": alg.IntegHMACSHA384, "hmac-sha512-256": alg.IntegHMACSHA512, "aes-cmac-96": alg.IntegAESCMAC,
	"hmac-md5-96": alg.IntegHMACMD5,
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func loadGolden(t testing.TB) []golden {
	t.Helper()
	var all []golden
	for _, name := range []string{"esp", "scapy", "plain"} {
		b, err := os.ReadFile("testdata/" + name + "-golden.json")
		if err != nil {
			t.Fatal(err)
		}
		var v struct{ Tests []golden }
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		all = append(all, v.Tests...)
	}
	return all
}

func (g *golden) transform(t testing.TB) *Transform {
	t.Helper()
	e, ok := goldenEncr[g.Enc]
	a, ok2 := goldenInteg[g.Auth]
	if !ok || !ok2 {
		t.Fatalf("%s: unknown suite %q, %q", g.Name, g.Enc, g.Auth)
	}
	tr, err := New(&ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: netip.IPv4Unspecified(), SPI: ipsec.SPI(g.SPI)},
		ESN:  g.ESNHigh != nil,
		Encr: e, EncrKey: ipsec.NewKey(unhex(t, g.EncKey)),
		Auth: a, AuthKey: ipsec.NewKey(unhex(t, g.AuthKey)), Unauthenticated: e.Info().Old,
	})
	if err != nil {
		t.Fatalf("%s: %v", g.Name, err)
	}
	return tr
}

// ipHeader returns the length of b's IP header and the protocol behind it; the
// vectors have no extension headers in front of ESP but hop-by-hop options.
func ipHeader(t testing.TB, b []byte) (n int, proto uint8) {
	t.Helper()
	if b[0]>>4 == 4 {
		return int(b[0]&15) * 4, b[9]
	}
	n, proto = 40, b[6]
	for proto == 0 || proto == 43 || proto == 60 {
		proto, n = b[n], n+8+8*int(b[n+1])
	}
	return n, proto
}

// packet returns the ESP packet and what must come out of it.
func (g *golden) packet(t testing.TB) (pkt, payload []byte, next uint8, seq uint64) {
	t.Helper()
	outer := unhex(t, g.Outer)
	n, _ := ipHeader(t, outer)
	if g.UDPEncap {
		n += 8
	}
	pkt = outer[n:]
	payload = unhex(t, g.Inner)
	if len(payload) == 0 {
		t.Fatalf("%s: no inner packet", g.Name)
	}
	next = 4
	if payload[0]>>4 == 6 {
		next = 41
	}
	if g.Mode == "transport" {
		var n int
		n, next = ipHeader(t, payload)
		payload = payload[n:]
	}
	// What the replay window would infer: the low half as it stands in the
	// packet, which a spoilt one may have altered.
	seq = uint64(binary.BigEndian.Uint32(pkt[4:]))
	if g.ESNHigh != nil {
		seq |= uint64(*g.ESNHigh) << 32
	}
	return pkt, payload, next, seq
}

func TestGolden(t *testing.T) {
	s := NewScratch()
	used := map[string]int{}
	for _, g := range loadGolden(t) {
		t.Run(g.Name, func(t *testing.T) {
			tr := g.transform(t)
			pkt, payload, next, seq := g.packet(t)
			p := openOne(tr, s, pkt, seq)
			if g.Refuse {
				used["refuse"]++
				if !errors.Is(p.Err, ErrAuth) || p.N != 0 {
					t.Errorf("%s: got %d octets, %v; want %v", g.Why, p.N, p.Err, ErrAuth)
				}
				return
			}
			used[g.Mode]++
			if g.ESNHigh != nil {
				used["esn"]++
			}
			if p.Err != nil || p.Next != next || !bytes.Equal(p.Dst[:p.N], payload) {
				t.Fatalf("got %x, next %d, %v; want %x, next %d", p.Dst[:p.N], p.Next, p.Err, payload, next)
			}
			// Our own has another IV; with the same it is the same packet.
			mine := sealOne(t, tr, s, payload, next, seq)
			if len(mine) != len(pkt) {
				t.Fatalf("sealed %d octets, want %d", len(mine), len(pkt))
			}
			if p := openOne(tr, s, mine, seq); p.Err != nil {
				t.Errorf("own packet: %v", p.Err)
			}
			n := len(mine) - tr.hdr - tr.icv
			plain := make([]byte, n)
			aad, tail := tr.cover(s, seq)
			if err := tr.c.Open(&s.a, plain, aad, mine[tr.head:tr.hdr], mine[tr.hdr:], tail); err != nil {
				t.Fatal(err)
			}
			copy(mine, pkt[:tr.hdr])
			if tr.old { // padding of any content
				copy(plain[len(payload):], p.Dst[len(payload):n])
			}
			if err := tr.c.Seal(&s.a, mine[tr.hdr:], aad, mine[tr.head:tr.hdr], plain, tail); err != nil || !bytes.Equal(mine, pkt) {
				t.Errorf("sealed %x, %v; want %x", mine, err, pkt)
			}
			if tr.old {
				used["old"]++
				return // what is altered opens to something else
			}
			for n := range pkt {
				if p := openOne(tr, s, pkt[:n], seq); p.Err == nil {
					t.Errorf("cut to %d of %d octets: opened", n, len(pkt))
				}
			}
			// One bit of each octet of all, every bit of the short ones.
			for i := range pkt {
				for bit := range 8 {
					if len(pkt) > 200 && bit != i%8 {
						continue
					}
					bad := bytes.Clone(pkt)
					bad[i] ^= 1 << bit
					badSeq := seq&^0xffffffff | uint64(binary.BigEndian.Uint32(bad[4:]))
					refused(t, fmt.Sprintf("octet %d bit %d", i, bit), openOne(tr, s, bad, badSeq), nil)
				}
			}
			wrong := g
			wrong.EncKey, wrong.AuthKey = flip(g.EncKey), flip(g.AuthKey)
			refused(t, "wrong keys", openOne(wrong.transform(t), s, pkt, seq), payload)
			if tr.esn {
				refused(t, "wrong high half", openOne(tr, s, pkt, seq^1<<32), payload)
			}
		})
	}
	if used["refuse"] < 20 || used["tunnel"] < 40 || used["transport"] < 10 || used["esn"] < 40 || used["old"] < 24 {
		t.Errorf("vectors used: %v", used)
	}
}

// flip alters the first digit of a key.
func flip(key string) string {
	if key == "" {
		return ""
	}
	if strings.HasPrefix(key, "0") {
		return "1" + key[1:]
	}
	return "0" + key[1:]
}
