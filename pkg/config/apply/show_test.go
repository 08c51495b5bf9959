package apply

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

func TestWritePolicies(t *testing.T) {
	any4, host := netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("192.0.2.1/32")
	esp := ipsec.Request{Proto: ipsec.ESP, Mode: ipsec.Transport, Level: ipsec.LevelUnique, ReqID: 7}
	shared := esp
	shared.Level, shared.ReqID = ipsec.LevelRequire, 0
	ps := []*keysock.PolicyInfo{
		{Policy: ipsec.Policy{ID: 1, Dir: ipsec.In, Sel: ipsec.Selector{Src: host, Dst: any4, Proto: 17, SrcPort: 53}, Action: ipsec.Protect,
			Priority: ipsecconf.PriorityBase, Requests: []ipsec.Request{esp}, Proposals: []ipsec.Proposal{{Encr: alg.EncrAESGCM16}}},
			Added: time.Unix(1700000000, 0), LastUsed: time.Unix(1700000100, 0), Packets: 12},
		{Policy: ipsec.Policy{ID: 2, Dir: ipsec.Out, Sel: ipsec.Selector{Src: any4, Dst: host}, Action: ipsec.Protect,
			Priority: 5, Requests: []ipsec.Request{shared}}},
		{Policy: ipsec.Policy{ID: 3, Dir: ipsec.Fwd, Sel: ipsec.Selector{Src: host, Dst: any4}, Action: ipsec.Discard, Priority: ipsecconf.PriorityBase}},
	}
	var b strings.Builder
	if err := WritePolicies(&b, ps, []*keysock.SAInfo{{SAParams: ipsec.SAParams{ReqID: 7}, State: keysock.Mature}}, Listing{}); err != nil {
		t.Fatal(err)
	}
	want := `# id 2 out priority 5 esp transport reqid 0, packets 0, never used, configured and not up
# of another program; SAs shared with other policies; algorithms left to the key daemon:
# { raddr 192.0.2.1 dir out } ipsec { encr_algs any }
#INDEX 1
# id 1 in priority 1073741824 esp transport reqid 7, packets 12, added 2023-11-14T22:13:20Z, last used 2023-11-14T22:15:00Z, 1 SA
{ raddr 192.0.2.1 ulp udp rport 53 dir in } ipsec { encr_algs aes-gcm-16 }
#INDEX 1
# id 3 fwd priority 1073741824, packets 0, never used
# forwarded packets:
# { raddr 192.0.2.1 dir in } drop {}
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &b, want)
	}
}

func TestWriteSAs(t *testing.T) {
	a, z := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	key := ipsec.NewKey([]byte("a secret of thirty-six octets, salted"[:36]))
	sas := []*keysock.SAInfo{
		{SAParams: ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: a, SPI: 0x1234}, Src: z, Mode: ipsec.Tunnel, ReqID: 9}},
		{SAParams: ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: z, SPI: 0x1235}, Src: a, Mode: ipsec.Tunnel, ReqID: 9,
			Encr: alg.EncrAESGCM16, EncrKey: key, ESN: true, ReplayWindow: 1024, Encap: &ipsec.Encap{SPort: 4500, DPort: 1024},
			Soft:  ipsec.Lifetime{Packets: 3, UseTime: time.Minute},
			Idle:  ipsec.Idle{AddTime: time.Hour, UseTime: time.Minute},
			SrcTS: []ipsec.TrafficSelector{{Start: a, End: a, PortHi: 65535}}},
			State: keysock.Dying, FirstUsed: time.Unix(1700000000, 0)},
	}
	var b strings.Builder
	if err := WriteSAs(&b, sas); err != nil {
		t.Fatal(err)
	}
	want := `esp 2001:db8::2 -> 2001:db8::1 spi 0x00001234 tunnel reqid 9 larval
esp 2001:db8::1 -> 2001:db8::2 spi 0x00001235 tunnel reqid 9 dying
    aes-gcm-16(256), replay window 1024, extended sequence numbers yes, in UDP 4500 -> 1024
    packets 0, bytes 0, first used 2023-11-14T22:13:20Z
    soft limit 60 s of use, 3 packets
    idle limit 3600 s unused, 60 s behind the last use
    selectors 2001:db8::1 -> any
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &b, want)
	}
}
