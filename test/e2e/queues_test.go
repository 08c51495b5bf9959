package e2e

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// flowsReceiver answers each datagram, so that flows have both directions, and
// counts those of a flow that do not follow the one before.
const flowsReceiver = `
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 8 << 20) # SO_RCVBUFFORCE
s.bind((sys.argv[1], 5006))
s.settimeout(30)
print("listening", flush=True)
last, got, wrong = {}, 0, 0
while got < int(sys.argv[2]):
    try: b, who = s.recvfrom(2000)
    except socket.timeout: break
    k, = struct.unpack_from("!I", b)
    if k != last.get(who, -1) + 1: wrong += 1
    last[who], got = k, got + 1
    if k % 64 == 63: s.sendto(b, who)
print("got", got, len(last), wrong, flush=True)
`

// flowsSender sends as many datagrams on each of so many flows by turns, in
// small bursts, with waits for answers so that nothing overflows.
const flowsSender = `
import socket, struct, sys
flows, each = int(sys.argv[2]), int(sys.argv[3])
ss = []
for _ in range(flows):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect((sys.argv[1], 5006))
    s.settimeout(20)
    ss.append(s)
for k in range(0, each, 64):
    for i in range(k, min(k + 64, each)):
        for s in ss: s.send(struct.pack("!I", i) + bytes(400))
    for s in ss: s.recv(2000)
`

// sasOf lists the SAs of a node from it (out) or to it, by queue, with their packets.
func sasOf(n *lab.Node, out bool) map[int]int {
	packets := map[int]int{}
	for d := json.NewDecoder(strings.NewReader(n.Do("./loadConfig -d --json"))); d.More(); {
		var sas []struct {
			Src     string `json:"src"`
			State   string `json:"state"`
			Queue   int    `json:"queue"`
			Packets int    `json:"packets"`
		}
		if d.Decode(&sas) != nil {
			return nil
		}
		for _, sa := range sas {
			if (sa.Src == n.Addr.String()) == out && sa.State != "larval" {
				packets[sa.Queue] += sa.Packets
			}
		}
	}
	return packets
}

// TestQueues: with two queues flows go by two SAs of their own, negotiated when
// their packets come, in order, there and back; with a peer that does not want
// them, or has one queue, by the one for all.
func TestQueues(t *testing.T) {
	lab.NeedRoot(t)
	for _, c := range []struct {
		name, nat string
		queuesB   int
		ofB       string
		own       bool
	}{
		{"UDP", "force", 2, "prefer", true},
		{"native", "no", 2, "prefer", true},
		{"one queue", "force", 1, "prefer", true},
		{"unwilling", "force", 2, "no", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := lab.Pair(t)
			for _, n := range []*lab.Node{a, b} {
				queues, says := 2, "prefer"
				if n == b {
					queues, says = c.queuesB, c.ofB
				}
				n.StartMissiu("--queues", strconv.Itoa(queues))
				n.WriteFile("ike.conf", fmt.Sprintf("rule \"peer\" {\n  auth_method preshared\n  nat_traversal %s\n  childsa_per_queue %s\n  remote_addr %v\n}\n", c.nat, says, n.Peer), 0o600)
				n.WriteFile("/etc/missiu/ike.secrets", fmt.Sprintf("{ label \"peer\" key %q }\n", lab.PSK), 0o600)
				n.StartIKEWith("./ike -f ../ike.conf")
				n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
				n.Route()
			}
			pings(t, a, 1)
			const flows, each = 16, 640
			b.WriteFile("receiver.py", flowsReceiver, 0o644)
			exchange := func() {
				t.Helper()
				r := b.Start("/usr/bin/python3", "receiver.py", b.Addr.String(), strconv.Itoa(flows*each))
				r.Says("listening", 10*time.Second)
				a.Python(flowsSender, b.Addr.String(), strconv.Itoa(flows), strconv.Itoa(each))
				r.Wait(60 * time.Second)
				if got, want := strings.TrimPrefix(r.Output(), "listening\n"), fmt.Sprintf("got %d %d 0\n", flows*each, flows); got != want {
					t.Errorf("receiver: %q, want %q", got, want)
				}
			}
			if !c.own {
				exchange()
				if out := sasOf(a, true); len(out) != 1 || out[0] < flows*each {
					t.Errorf("packets by queue: %v, want all on the SA for any", out)
				}
				return
			}
			// The first packets of a queue ask for its SA.
			lab.Until(t, 30*time.Second, "SAs for both queues of a", func() (bool, string) {
				a.Python(knockSender, b.Addr.String())
				out := sasOf(a, true)
				_, one := out[1]
				_, two := out[2]
				return one && two, fmt.Sprint(out)
			})
			before := sasOf(a, true)
			exchange()
			out, in := sasOf(a, true), sasOf(b, false)
			for q := 1; q <= 2; q++ {
				if out[q]-before[q] < each {
					t.Errorf("queue %d of a sent %d packets on its SA, want %d at least", q, out[q]-before[q], each)
				}
			}
			if got := in[1] + in[2]; got < 2*each { // which is which depends on who asked first
				t.Errorf("b got %d packets on SAs of its queues, want %d at least", got, 2*each)
			}
			if n := out[0] - before[0]; n > flows*each/10 {
				t.Errorf("%d packets on the SA for any, want few", n)
			}
			st := a.Do("./missiu status")
			if !strings.Contains(st, "queue 1") || !strings.Contains(st, "queue 2") {
				t.Errorf("status does not tell of queues:\n%s", st)
			}
			if d := a.Status().Drops() + b.Status().Drops(); d != 0 {
				t.Errorf("%d drops: a %v, b %v", d, a.Status().Counters, b.Status().Counters)
			}
		})
	}
}

// TestQueuesStrangers: a peer that knows nothing of SAs for single queues has the
// one for all, whoever begins; both queues use it.
func TestQueuesStrangers(t *testing.T) {
	d := newDuo(t, "", "--queues", "2")
	d.rule("")
	d.peer("", "")
	d.pings("begun here")
	if !strings.Contains(d.a.IKE.Output(), "SA_RESOURCE_INFO") {
		t.Error("no SA_RESOURCE_INFO was sent")
	}
	for range 3 {
		d.a.Python(knockSender, "10.2.0.1")
	}
	lab.Until(t, 10*time.Second, "packets of both queues", func() (bool, string) {
		var s struct {
			Queues []struct{ Out, SAs int } `json:"queues"`
		}
		out := d.a.Do("./missiu status --json")
		if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Queues) != 2 {
			return false, out
		}
		return s.Queues[0].Out > 0 && s.Queues[1].Out > 0 && s.Queues[0].SAs+s.Queues[1].SAs == 0, out
	})
	if n := len(d.a.Mature()); n != 2 {
		t.Errorf("%d SAs, want 2", n)
	}
	d.down()
	d.up()
	d.pings("begun by the peer")
	if n := len(d.a.Mature()); n != 2 {
		t.Errorf("begun by the peer: %d SAs, want 2", n)
	}
	d.down()
}

// knockSender sends one datagram on each of many flows.
const knockSender = `
import socket, sys
for _ in range(32):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"knock", (sys.argv[1], 5007))
`
