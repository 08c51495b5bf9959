package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// strongSwan and we rekey at the same time: nothing that strongSwan says arrives
// until both have asked, so each meets the other's request with its own on its way.
// Afterwards there is one IKE SA, one child SA on both sides, and data flows.
func TestStrongSwanCollide(t *testing.T) {
	lab.NeedRoot(t)
	for _, ike := range []bool{false, true} {
		t.Run(fmt.Sprintf("ike %v", ike), func(t *testing.T) {
			a, b := lab.Pair(t)
			a.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
			b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
			swan := lab.StartStrongSwan(b.Host, lab.SwanConn{
				Local: "192.168.3.119", Remote: "192.168.3.118", LocalTS: "10.2.0.0/24", RemoteTS: "10.1.0.0/24",
				PSK: lab.PSK, ESP: "aes128gcm16",
			})
			a.StartMissiu()
			ruleIKE(a, "", "", lab.PSK)
			a.LoadConfig("{ laddr 10.1.0.0/24 raddr 10.2.0.0/24 } ipsec { encr_algs gcm tladdr 192.168.3.118 traddr 192.168.3.119 }\n")
			a.Do("ip route add 10.2.0.0/24 dev tap0 src 10.1.0.1")
			if got := a.Ping(3, "10.2.0.1"); got != 3 {
				t.Fatalf("%d of 3 pings answered", got)
			}
			was := map[uint32]bool{}
			for _, s := range a.Mature() {
				was[s.SPI] = true
			}
			// IKE behind its marker, not ESP.
			b.Sh("nft 'add table ip hold; add chain ip hold out { type filter hook output priority 0; }; add rule ip hold out udp sport 4500 @th,64,32 0 drop'")
			from := len(swan.Log())
			swan.Rekey(ike)
			rekey := a.Start("bash", "-c", "cd bin && exec ./ike rekey peer")
			lab.Until(t, 20*time.Second, "our request to meet strongSwan's", func() (bool, string) {
				log := swan.Log()[from:]
				return strings.Contains(log, "generating CREATE_CHILD_SA request") && strings.Contains(log, "parsed CREATE_CHILD_SA request"), log
			})
			b.Sh("nft delete table ip hold")
			lab.Until(t, 90*time.Second, "one pair of SAs that is new", func() (bool, string) {
				s, theirs := a.Mature(), swan.SAs()
				fresh := len(s) == 2
				for _, x := range s {
					fresh = fresh && !was[x.SPI]
				}
				return fresh && len(statusOfIKE(t, a).IKESAs) == 1 && strings.Count(theirs, "state=INSTALLED") == 1 &&
					strings.Count(theirs, "state=ESTABLISHED") == 1 && !strings.Contains(theirs, "REKEY"), fmt.Sprint(s, theirs)
			})
			rekey.Stop()
			if got := a.Ping(20, "10.2.0.1"); got != 20 {
				t.Errorf("%d of 20 pings answered:\n%s", got, swan.Log())
			}
		})
	}
}
