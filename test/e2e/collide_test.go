package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// strongSwan and we rekey at the same time: nothing that strongSwan says arrives
// until both have asked, and then none of its answers until its request has, so each
// meets the other's request with its own on its way. From then on a fifth of the IKE
// messages of either side is lost. Data flows all the time.
// Afterwards there is one IKE SA, one child SA and the same on both sides, no more.
func TestStrongSwanCollide(t *testing.T) {
	lab.NeedRoot(t)
	for _, tt := range []struct {
		name      string
		ours, ike bool // what is rekeyed: the IKE SA with its child SA, or the child SA alone
	}{{"child SA", false, false}, {"IKE SA against child SA", true, false}, {"IKE SA", true, true}} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := lab.Pair(t)
			a.Must("ip", "addr", "add", "10.1.0.1/24", "dev", "lo")
			b.Must("ip", "addr", "add", "10.2.0.1/24", "dev", "lo")
			swan := lab.StartStrongSwan(b.Host, lab.SwanConn{
				Local: "192.168.3.119", Remote: "192.168.3.118", LocalTS: "10.2.0.0/24", RemoteTS: "10.1.0.0/24",
				PSK: lab.PSK, ESP: "aes128gcm16", Settings: "retransmit_limit = 2\nretransmit_tries = 30",
			})
			a.StartMissiu()
			ruleIKE(a, "", "retry_limit 30 retry_timer_init 0.5 retry_timer_max 2 childsa_lifetime_bytes 64m childsa_softlife_bytes 1m rekey_fuzz 0", lab.PSK)
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
			pings := a.Start("ping", "-n", "-i", "0.05", "-w", "300", "10.2.0.1")
			from := len(swan.Log())
			swan.Rekey(tt.ike)
			if tt.ours {
				a.Start("bash", "-c", "cd bin && exec ./ike rekey peer")
			} else { // the soft limit
				a.Start("ping", "-n", "-q", "-i", "0.002", "-c", "900", "-s", "1300", "10.2.0.1")
			}
			lab.Until(t, 20*time.Second, "our request to meet strongSwan's", func() (bool, string) {
				log := swan.Log()[from:]
				return strings.Contains(log, "generating CREATE_CHILD_SA request") && strings.Contains(log, "parsed CREATE_CHILD_SA request"), log
			})
			// No answer of theirs before their request: our own is on its way when it comes.
			b.Sh("nft 'flush chain ip hold out; add rule ip hold out udp sport 4500 @th,64,32 0 @th,248,8 & 0x20 == 0x20 drop'")
			lab.Until(t, 20*time.Second, "strongSwan's request to meet ours", func() (bool, string) {
				log := a.IKE.Output()
				return strings.Contains(log, "received CREATE_CHILD_SA request"), log
			})
			lossy(b.Host)
			b.Sh("nft delete table ip hold")
			spis := regexp.MustCompile(`spi-(in|out)=([0-9a-f]+)`)
			lab.Until(t, 200*time.Second, "one pair of SAs that is new", func() (bool, string) {
				s, theirs := a.SAs(), swan.SAs()
				ok := len(s) == 2 && len(statusOfIKE(t, a).IKESAs) == 1 && strings.Count(theirs, " state=") == 2 &&
					strings.Contains(theirs, "state=INSTALLED") && strings.Contains(theirs, "state=ESTABLISHED")
				for _, x := range s {
					ok = ok && x.State == "mature" && !was[x.SPI]
				}
				for _, m := range spis.FindAllStringSubmatch(theirs, -1) {
					n, _ := strconv.ParseUint(m[2], 16, 32)
					ok = ok && slices.ContainsFunc(s, func(x lab.SA) bool { return x.SPI == uint32(n) })
				}
				return ok, fmt.Sprint(s, theirs)
			})
			pings.Signal(syscall.SIGINT)
			pings.Wait(10 * time.Second)
			var sent, got int
			if _, err := fmt.Sscanf(statistics.FindString(pings.Output()), "%d packets transmitted, %d received", &sent, &got); err != nil || sent < 20 || sent-got > 1+sent/50 {
				t.Errorf("while both rekeyed %d of %d pings were answered:\n%s", got, sent, swan.Log())
			}
			if got := a.Ping(20, "10.2.0.1"); got != 20 {
				t.Errorf("%d of 20 pings answered:\n%s", got, swan.Log())
			}
		})
	}
}

// statistics is what ping says at its end.
var statistics = regexp.MustCompile(`\d+ packets transmitted, \d+ received`)
