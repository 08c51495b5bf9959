package route

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/internal/nstest"
	"github.com/missiu/missiu/pkg/ipsec"
)

// TestMain runs the tests in a network namespace of their own when it may.
func TestMain(m *testing.M) { os.Exit(nstest.Main(m, "route")) }

var sh = nstest.Sh

// openLab makes e0 (192.0.2.1/24, the default route), e1 (10.1.0.1/24) and the
// device d0, and a Table for e0.
func openLab(t *testing.T) *Table {
	t.Helper()
	if nstest.Name() == "" {
		t.Skip("needs root and ip(8): makes interfaces in a network namespace")
	}
	Dir = t.TempDir()
	t.Cleanup(func() { exec.Command("sh", "-c", "for i in e0 e1 d0; do ip link del $i; done").Run() })
	sh(t, `ip link set lo up
		for i in e0 e1 d0; do ip link add $i type veth peer name p$i; ip link set p$i up; ip link set $i up; done
		sysctl -qw net.ipv4.ip_forward=1; ip addr add 192.0.2.1/24 dev e0; ip addr add 10.1.0.1/24 dev e1; ip route add default via 192.0.2.9
		ip -6 addr add 2001:db8::1/64 dev e0 nodad; ip -6 addr add fd01::1/64 dev e1 nodad; ip -6 route add default via 2001:db8::9`)
	nstest.Ready(t, "", "e0", "e1", "d0")
	tb, err := Open(Options{Interface: "e0", Index: index(t, "e0"), Device: index(t, "d0")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		tb.Close()
		if _, err := Cleanup("e0"); err != nil {
			t.Errorf("Cleanup: %v", err)
		}
	})
	return tb
}

func index(t *testing.T, ifname string) int {
	t.Helper()
	n, err := strconv.Atoi(sh(t, "cat /sys/class/net/"+ifname+"/ifindex"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func apply(t *testing.T, tb *Table, o PlanOptions, ps ...string) {
	t.Helper()
	var l []*ipsec.Policy
	for _, p := range ps {
		l = append(l, policy(p))
	}
	if err := tb.Apply(Plan(l, nil, o)); err != nil {
		t.Fatal(err)
	}
}

// get asks the kernel for the route to dst, given further words for ip(8).
func get(t *testing.T, dst string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "ip route get "+dst).CombinedOutput()
	if err != nil {
		return strings.TrimSpace(strings.TrimPrefix(string(out), "RTNETLINK answers: "))
	}
	dev, src := "", ""
	f := strings.Fields(string(out))
	for i, w := range f {
		switch w {
		case "dev":
			dev = f[i+1]
		case "src":
			src = " " + f[i+1]
		}
	}
	return dev + src
}

// until waits for what follows an event.
func until(t *testing.T, dst, want string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		got := get(t, dst)
		if got == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: got %q, want %q\n%s", dst, got, want, sh(t, "ip rule; ip route show table all; ip -6 route show table all"))
		}
	}
}

func check(t *testing.T, dst, want string) {
	t.Helper()
	if got := get(t, dst); got != want {
		t.Errorf("%s: got %q, want %q", dst, got, want)
	}
}

func TestTable(t *testing.T) {
	tb := openLab(t)
	const main = "(ip route; ip -6 route) | grep -v ^fe80 | sed 's/ linkdown//' | sort" // but for what a carrier brings
	before := sh(t, main)
	apply(t, tb, PlanOptions{}, "protect 10.1.0.0/24 10.2.0.0/16 192.0.2.1 198.51.100.2", "protect fd01::/64 fd02::/64 192.0.2.1 198.51.100.2", "protect 10.9.0.0/24 10.8.0.0/24 192.0.2.1 198.51.100.2")
	check(t, "10.2.0.2", "d0 10.1.0.1")
	check(t, "fd02::2", "d0 fd01::1")
	check(t, "10.2.0.2 oif e0", "e0 192.0.2.1") // what ESP takes
	check(t, "fd02::2 oif e0", "e0 2001:db8::1")
	check(t, "198.51.100.2", "e0 192.0.2.1")
	if got := get(t, "10.8.0.1"); !strings.HasPrefix(got, "d0") || strings.Contains(sh(t, "ip route show table all 10.8.0.0/24 type unicast"), "src") {
		t.Errorf("without an address of ours in the selector: %s", got)
	}
	if n, k := tb.Number(); k != 3 || n <= firstTable {
		t.Errorf("table %d leads %d destinations, want 3", n, k)
	}
	// Addresses come and go.
	sh(t, "ip addr add 10.9.0.1/24 dev e1")
	until(t, "10.8.0.1", "d0 10.9.0.1")
	sh(t, "ip addr del 10.9.0.1/24 dev e1; ip addr add 10.1.0.7/24 dev e1; ip addr del 10.1.0.1/24 dev e1; ip addr add 10.1.0.7/24 dev e1 || true")
	until(t, "10.2.0.2", "d0 10.1.0.7")
	sh(t, "ip addr del 10.1.0.7/24 dev e1; ip addr add 10.1.0.1/24 dev e1")
	until(t, "10.2.0.2", "d0 10.1.0.1")
	// An address on the device is one that was given for this.
	sh(t, "ip addr add 10.1.0.77/32 dev d0")
	until(t, "10.2.0.2", "d0 10.1.0.77")
	sh(t, "ip addr del 10.1.0.77/32 dev d0")
	until(t, "10.2.0.2", "d0 10.1.0.1")
	// Others' more specific routes stay theirs, while they are there.
	sh(t, "ip route add 10.2.5.0/24 via 10.1.0.9")
	until(t, "10.2.5.1", "e1 10.1.0.1")
	check(t, "10.2.6.1", "d0 10.1.0.1")
	sh(t, "ip route del 10.2.5.0/24")
	until(t, "10.2.5.1", "d0 10.1.0.1")
	sh(t, "ip route add 10.2.5.0/24 via 192.0.2.9") // the same way out, so policy's
	time.Sleep(3 * settle)
	check(t, "10.2.5.1", "d0 10.1.0.1")
	sh(t, "ip route del 10.2.5.0/24")
	// A socket that is bound to another interface keeps that one's routes.
	sh(t, "ip route add 10.2.0.0/15 via 10.1.0.9; ip -6 route add fd00::/8 via fd01::9")
	until(t, "10.2.0.2 oif e1 | grep via.10.1.0.9", "e1 10.1.0.1")
	until(t, "fd02::2 oif e1 | grep via.fd01::9", "e1 fd01::1")
	check(t, "10.2.0.2", "d0 10.1.0.1")
	check(t, "fd02::2", "d0 fd01::1")
	sh(t, "ip route del 10.2.0.0/15; ip -6 route del fd00::/8")
	n, _ := tb.Number()
	for end := time.Now().Add(time.Minute); strings.Count(sh(t, fmt.Sprintf("ip route show table %d; ip -6 route show table %[1]d", n)), "unreachable") != 3; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the unreachable routes are not back")
		}
	}
	// Without the device nothing leaves in clear; with it all is back.
	sh(t, "ip link set d0 down")
	check(t, "10.2.0.2", "No route to host")
	check(t, "fd02::2", "No route to host")
	check(t, "10.2.0.2 oif e0", "e0 192.0.2.1")
	sh(t, "ip link set d0 up")
	until(t, "10.2.0.2", "d0 10.1.0.1")
	until(t, "fd02::2", "d0 fd01::1")
	// What somebody takes away comes back.
	sh(t, fmt.Sprintf("ip route flush table %d; ip rule del pref %d; ip -6 rule del pref %d", n, Priority, Priority))
	until(t, "10.2.0.2", "d0 10.1.0.1")
	until(t, "fd02::2", "d0 fd01::1")
	// And goes with its policy.
	apply(t, tb, PlanOptions{}, "protect fd01::/64 fd02::/64 192.0.2.1 198.51.100.2")
	check(t, "10.2.0.2", "e0 192.0.2.1")
	check(t, "fd02::2", "d0 fd01::1")
	apply(t, tb, PlanOptions{})
	if got := sh(t, fmt.Sprintf("ip route show table %d; ip -6 route show table %[1]d", n)); got != "" {
		t.Errorf("left over: %s", got)
	}
	if after := sh(t, main); after != before {
		t.Errorf("main table before:\n%s\nafter:\n%s", before, after)
	}
}

// A default route into the device: the peer, other interfaces' networks and
// multicast stay out of it.
func TestTableDefault(t *testing.T) {
	tb := openLab(t)
	apply(t, tb, PlanOptions{}, "protect 10.1.0.0/24 0.0.0.0/0 192.0.2.1 198.51.100.2", "protect fd01::/64 ::/0 2001:db8::1 2001:db8:9::2")
	for dst, want := range map[string]string{
		"203.0.113.5": "d0 10.1.0.1", "192.0.2.77": "d0 10.1.0.1", "10.1.0.5": "e1 10.1.0.1", "198.51.100.2": "e0 192.0.2.1", "198.51.100.3": "d0 10.1.0.1",
		"224.0.0.251": "e0 192.0.2.1", "2001:db8:7::1": "d0 fd01::1", "fd01::5": "e1 fd01::1", "2001:db8:9::2": "e0 2001:db8::1",
		"10.1.0.5 from 203.0.113.5 iif d0": "e1", // what was decapsulated goes on
	} {
		check(t, dst, want)
	}
	// What policy protects of the traffic with the peer is not excluded.
	for dst, want := range map[string]string{
		"198.51.100.2 from 10.1.0.1": "d0", "198.51.100.2 from 10.1.0.5 iif e1": "d0", "198.51.100.2 from 192.0.2.1": "e0",
		"2001:db8:9::2 from fd01::1": "d0", "2001:db8:9::2 from 2001:db8::1": "e0",
	} {
		if got, _, _ := strings.Cut(get(t, dst), " "); got != want {
			t.Errorf("%s: got %s, want %s", dst, got, want)
		}
	}
	// The peer's way follows the main table.
	sh(t, "ip route add 198.51.100.0/24 via 10.1.0.9")
	check(t, "198.51.100.2", "e1 10.1.0.1")
	sh(t, "ip route del 198.51.100.0/24")
	check(t, "198.51.100.2", "e0 192.0.2.1")
	// The peer itself as the selector.
	apply(t, tb, PlanOptions{}, "protect 192.0.2.1/32 192.0.2.2/32 192.0.2.1 192.0.2.2")
	check(t, "198.51.100.2 from 10.1.0.1", "e0")
	check(t, "192.0.2.2", "d0 192.0.2.1")
	check(t, "192.0.2.2 oif e0", "e0 192.0.2.1")
	check(t, "192.0.2.3", "e0 192.0.2.1")
}

// Further devices, with an address each: a route goes into the device of its
// source, and sockets that are bound to another one have a route as well.
func TestTableMore(t *testing.T) {
	tb := openLab(t)
	t.Cleanup(func() { exec.Command("sh", "-c", "ip link del d1; ip link del d2").Run() })
	sh(t, "for i in d1 d2; do ip link add $i type veth peer name p$i; ip link set p$i up; ip link set $i up; done")
	nstest.Ready(t, "", "d1", "d2")
	more := []int{index(t, "d1"), index(t, "d2")}
	tb.o.More = func() []int { return more }
	policies := []string{"protect 10.9.0.0/24 10.2.0.0/16 192.0.2.1 198.51.100.2", "protect fd09::/64 fd02::/64 192.0.2.1 198.51.100.2"}
	apply(t, tb, PlanOptions{}, policies...)
	if got := get(t, "10.2.0.2"); !strings.HasPrefix(got, "d0") {
		t.Errorf("without their addresses: %s", got)
	}
	sh(t, "ip addr add 10.9.0.2/32 dev d1; ip addr add fd09::2/128 dev d1 nodad")
	until(t, "10.2.0.2", "d1 10.9.0.2")
	until(t, "fd02::2", "d1 fd09::2")
	sh(t, "ip addr add 10.9.0.1/32 dev d2; ip addr add fd09::1/128 dev d2 nodad")
	until(t, "10.2.0.2", "d2 10.9.0.1")
	until(t, "fd02::2", "d2 fd09::1")
	until(t, "10.2.0.2 oif d1", "d1 10.9.0.2")
	until(t, "fd02::2 oif d1", "d1 fd09::2")
	// One that is about to go is nowhere named before it goes.
	err := tb.Without(adr("10.9.0.1"), func() error {
		check(t, "10.2.0.2", "d1 10.9.0.2")
		return os.ErrPermission
	})
	if err != os.ErrPermission {
		t.Errorf("Without: got %v", err)
	}
	check(t, "10.2.0.2", "d2 10.9.0.1") // it did not go
	if err := tb.Without(adr("10.9.0.1"), func() error { return exec.Command("ip", "link", "del", "d2").Run() }); err != nil {
		t.Error(err)
	}
	check(t, "10.2.0.2", "d1 10.9.0.2")
	until(t, "fd02::2", "d1 fd09::2")
	apply(t, tb, PlanOptions{})
	n, _ := tb.Number()
	if got := sh(t, fmt.Sprintf("ip route show table %d; ip -6 route show table %[1]d", n)); got != "" {
		t.Errorf("left over: %s", got)
	}
}

// An error is told once and tried again; so is the end of it.
func TestTableErrors(t *testing.T) {
	tb := openLab(t)
	apply(t, tb, PlanOptions{}, "protect 10.1.0.0/24 10.2.0.0/16 192.0.2.1 198.51.100.2")
	tell := func(want bool) {
		t.Helper()
		select {
		case err := <-tb.Errors():
			if (err != nil) != want {
				t.Fatalf("got %v, want an error: %v", err, want)
			}
		case <-time.After(time.Minute):
			t.Fatal("nothing told")
		}
	}
	sh(t, "ip link set d0 down")
	tell(true)
	select {
	case err := <-tb.Errors():
		t.Errorf("told again: %v", err)
	case <-time.After(again + 5*settle):
	}
	sh(t, "ip link set d0 up")
	tell(false)
}

// What a killed instance leaves is in force until the next one's first Apply,
// or Cleanup.
func TestTableOfAKilledOne(t *testing.T) {
	tb := openLab(t)
	apply(t, tb, PlanOptions{}, "protect 10.1.0.0/24 10.2.0.0/24 192.0.2.1 198.51.100.2", "protect 10.1.0.0/24 10.3.0.0/24 192.0.2.1 198.51.100.2")
	tb.Close()
	apply(t, tb, PlanOptions{}) // too late
	next, err := Open(tb.o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(next.Close)
	check(t, "10.2.0.2", "d0 10.1.0.1")
	apply(t, next, PlanOptions{}, "protect 10.1.0.0/24 10.2.0.0/24 192.0.2.1 198.51.100.2")
	check(t, "10.2.0.2", "d0 10.1.0.1")
	check(t, "10.3.0.2", "e0 192.0.2.1")
	if got := sh(t, "ip rule | grep -c ^200:"); got != "1" {
		t.Errorf("%s rules, want 1", got)
	}
	next.Close()
	sh(t, "ip link del d0")
	check(t, "10.2.0.2", "No route to host") // closed without a device, too
	sh(t, "ip link del e0")                  // and all is to go
	if ok, err := Cleanup("e0"); !ok || err != nil {
		t.Errorf("Cleanup: got %v, %v", ok, err)
	}
	n, _ := next.Number()
	if got := sh(t, fmt.Sprintf("ip rule | grep ^200: || true; ip -6 rule | grep ^200: || true; ip route show table %d; ip -6 route show table %[1]d", n)); got != "" {
		t.Errorf("left over: %s", got)
	}
	if ok, err := Cleanup("e0"); ok || err != nil {
		t.Errorf("second Cleanup: got %v, %v", ok, err)
	}
}

// A reconciliation of many routes takes no time that a request would notice.
func BenchmarkWant(b *testing.B) {
	tb := &Table{}
	for i := range 10000 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0})
		tb.wants = append(tb.wants, Want{Dst: netip.PrefixFrom(a, 24), Local: []netip.Prefix{pfx("10.1.0.0/24")}})
	}
	h := &host{owned: map[netip.Addr]int{adr("10.1.0.1"): 0, adr("192.0.2.1"): 0}}
	for b.Loop() {
		tb.want(h)
	}
}
