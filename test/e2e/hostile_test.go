package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// A recorded packet sent again, altered or cut is dropped and counted, and
// nothing of it has an effect on what comes later.
func TestForgedPackets(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	upAll(a, b)
	pings(t, a, 1)
	c := a.CaptureWhole("eth0", "ip proto 50 and src host 192.168.3.118")
	pings(t, a, 5)
	if n := len(c.Stop()); n != 5 {
		t.Fatalf("recorded %d packets, want 5", n)
	}
	tap := b.Capture("tap0")
	for _, tt := range []struct {
		name, edit string
		counters   []string // any of
	}{
		{"replayed", "e", []string{"drop_in_replay"}},
		{"bit flipped in the payload", "ahead(flip(e, 40))", []string{"drop_in_auth"}},
		{"bit flipped in the ICV", "ahead(flip(e, len(e) - 1))", []string{"drop_in_auth"}},
		{"sequence number changed", "ahead(e)", []string{"drop_in_auth"}},
		{"cut by a block", "ahead(e[:-16])", []string{"drop_in_auth"}},
		{"cut inside a block", "ahead(e[:-3])", []string{"drop_in_auth", "drop_in_malformed"}},
		{"cut in the IV", "ahead(e[:12])", []string{"drop_in_auth", "drop_in_malformed"}},
		{"header alone", "ahead(e[:8])", []string{"drop_in_auth", "drop_in_malformed"}},
		{"cut in the header", "e[:6]", []string{"drop_in_malformed", "drop_in_no_sa"}},
		{"unknown SPI", "bytes([e[0] ^ 1]) + e[1:]", []string{"drop_in_no_sa"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			was := b.Status()
			a.Python(resend, c.Path, tt.edit)
			lab.Until(t, 5*time.Second, "5 drops counted as "+fmt.Sprint(tt.counters), func() (bool, string) {
				now, sum := b.Status(), 0
				for _, k := range tt.counters {
					sum += now.Counters[k] - was.Counters[k]
				}
				return sum == 5 && now.Drops()-was.Drops() == 5, fmt.Sprintf("was %v, now %v", was.Counters, now.Counters)
			})
		})
	}
	if ps := lab.Of(tap.Stop(), lab.Clear); len(ps) != 0 {
		t.Errorf("%d forged packets reached the kernel: %v", len(ps), ps)
	}
	// The window did not follow the forged numbers.
	pings(t, a, 10)
	pings(t, b, 10)
}

// resend sends the recorded ESP packets again; argv[2] is a Python expression
// of e, the ESP packet.
const resend = `
import struct, sys
from scapy.all import *
conf.verb = 0
def flip(e, at): return e[:at] + bytes([e[at] ^ 0x10]) + e[at+1:]
def ahead(e): return e[:4] + struct.pack(">I", struct.unpack(">I", e[4:8])[0] + 1000) + e[8:]
out = []
for p in rdpcap(sys.argv[1]):
    ip = p[IP]
    e = bytes(ip.payload)
    q = IP(src=ip.src, dst=ip.dst, id=ip.id, ttl=ip.ttl, proto=50) / Raw(eval(sys.argv[2]))
    out.append(Ether(src=p.src, dst=p.dst) / q)
sendp(out, iface="eth0")
`

// What policy protects and comes in clear never reaches the kernel, also
// before there is any SA; nor does it in fragments.
func TestClearInbound(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	b.StartMissiu()
	b.LoadConfig(policyFor(b, "", aesSHA1))
	was := b.Status().Counters["drop_in_clear"]
	c := b.Capture("eth0")
	if got := a.Silence(5, "192.168.3.119"); got != 0 {
		t.Errorf("%d of 5 pings in clear answered, want 0", got)
	}
	if got := a.Silence(2, "-s", "4000", "192.168.3.119"); got != 0 {
		t.Errorf("%d of 2 fragmented pings in clear answered, want 0", got)
	}
	for _, p := range lab.Of(c.Stop(), lab.Clear) {
		if p.Src == b.Addr {
			t.Errorf("answered: %v", p)
		}
	}
	if n := b.Status().Counters["drop_in_clear"] - was; n < 5 {
		t.Errorf("drop_in_clear went up by %d, want at least 5", n)
	}
	// The kernel must not say "protocol unreachable" either.
	c = b.Capture("eth0")
	a.Python(`
from scapy.all import *
conf.verb = 0
send([IP(dst="192.168.3.119", proto=50)/Raw(b"\x00\x00\x12\x34" + bytes(60))] * 3)
`)
	lab.Until(t, 5*time.Second, "3 packets without an SA", func() (bool, string) {
		n := b.Status().Counters["drop_in_no_sa"]
		return n == 3, fmt.Sprintf("drop_in_no_sa is %d", n)
	})
	for _, p := range c.Stop() {
		if p.Src == b.Addr && p.Kind == lab.Clear {
			t.Errorf("answered: %v", p)
		}
	}
}

// The death of ike does not stop traffic.
func TestKillIKE(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	upAll(a, b)
	pings(t, a, 3)
	a.Do("killall -9 ike")
	a.IKE.Wait(10 * time.Second)
	c := a.Capture("eth0")
	pings(t, a, 20)
	pings(t, b, 20)
	lab.NoClear(t, c.Stop())
	if n := len(a.Mature()); n != 2 {
		t.Errorf("%d SAs, want the 2 of before", n)
	}
	// A new ike takes up the work.
	a.StartIKE()
	pings(t, a, 10)
}

// An ike that dies in the middle of a negotiation leaves it to the next one, and the
// packet that asked for it is not lost.
func TestKillIKENegotiating(t *testing.T) {
	lab.NeedRoot(t)
	a, b := lab.Pair(t)
	for _, n := range []*lab.Node{a, b} {
		n.StartMissiu()
		n.LoadConfig(policyFor(n, "", aesSHA1))
		n.Route()
	}
	a.StartIKE()
	// missiu would give the packet up after 30 s.
	p := a.Start(lab.PingArgs(1, time.Second, 60*time.Second, b.Addr.String())...)
	a.IKE.Says("sent IKE_SA_INIT request", 20*time.Second) // to nobody
	a.Do("killall -9 ike")
	a.IKE.Wait(10 * time.Second)
	b.StartIKE()
	a.StartIKE()
	if p.Wait(70 * time.Second); lab.Answered(p.Output(), 1) != 1 {
		t.Errorf("the packet that waited: %s", p.Output())
	}
}

// The death of missiu leaks nothing: what is routed to the dead TAP goes
// nowhere, what arrives in clear is not taken, and stop or a new start clean up.
func TestKillMissiu(t *testing.T) {
	lab.NeedRoot(t)
	for _, then := range []string{"stop", "startRaw"} {
		t.Run(then, func(t *testing.T) {
			a, b := lab.Pair(t)
			before := a.Snapshot()
			upAll(a, b)
			pings(t, a, 3)

			c := a.Capture("eth0")
			traffic := []*lab.Proc{
				a.Start("ping", "-n", "-q", "-i", "0.02", b.Addr.String()),
				b.Start("ping", "-n", "-q", "-i", "0.02", a.Addr.String()),
			}
			lab.Until(t, 10*time.Second, "traffic", func() (bool, string) {
				n := len(lab.Of(c.Packets(), lab.ESP))
				return n > 40, fmt.Sprintf("%d ESP packets", n)
			})
			policies := a.Status().Policies
			a.KillMissiu()
			if got := b.Silence(50, a.Addr.String()); got != 0 {
				t.Errorf("%d of 50 pings of the other side answered without missiu, want 0", got)
			}
			if got := a.Silence(3, b.Addr.String()); got != 0 {
				t.Errorf("%d of 3 pings answered without missiu, want 0", got)
			}
			lab.NoClear(t, c.Packets())

			if then == "startRaw" {
				a.IKE.Signal(syscall.SIGTERM)
				a.IKE.Wait(10 * time.Second)
				a.StartMissiu()
				a.StartIKE()
				// The policies are those of before; the route may have outlived the TAP or not.
				if now := a.Status().Policies; now != policies {
					t.Errorf("%d policies after the new start, want the %d of before", now, policies)
				}
				if !strings.Contains(a.Must("ip", "route", "get", b.Addr.String()), a.TAP()) {
					a.Route()
				}
				lab.Until(t, 30*time.Second, "traffic to flow again", func() (bool, string) {
					return a.Ping(3, "-W", "1", b.Addr.String()) == 3, "no ping"
				})
				for _, p := range traffic {
					p.Signal(syscall.SIGTERM)
				}
				lab.NoClear(t, c.Stop())
				return
			}
			for _, p := range traffic {
				p.Signal(syscall.SIGTERM)
			}
			lab.NoClear(t, c.Stop())
			a.IKE.Signal(syscall.SIGTERM)
			a.IKE.Wait(10 * time.Second)
			a.StopMissiu()
			a.Must("rm", "-f", "/run/missiu.log")
			if d := before.Diff(a.Snapshot()); d != "" {
				t.Errorf("not as before:\n%s", d)
			}
		})
	}
}
