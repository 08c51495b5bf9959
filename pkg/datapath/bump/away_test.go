package bump

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// furnished gives e0 what an interface of a host may have. e5 is another.
func furnished(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		exec.Command("ip", "link", "del", "e5").Run()
		exec.Command("ip", "rule", "del", "pref", "77").Run()
		exec.Command("ip", "route", "del", "unreachable", "10.26.0.0/16").Run()
	})
	sh(t, `ip link add e5 type veth peer name e6; ip addr add 10.5.0.1/24 dev e5; ip link set e6 up; ip link set e5 up
		ip link set e0 alias "the uplink" txqueuelen 777 mtu 1460; ip link property add dev e0 altname uplink-of-the-host
		ip addr add 10.9.0.11/24 dev e0 label e0:x; ip addr add 10.9.7.1/32 dev e0 valid_lft 5000 preferred_lft 4000
		ip addr add 10.9.6.1 peer 10.9.6.2 dev e0; ip addr add 10.9.4.1/24 dev e0 noprefixroute scope link
		ip -6 addr add fd09::11/64 dev e0 nodad valid_lft 6000 preferred_lft 5000 noprefixroute; ip -6 addr add fd09:7::1/48 dev e0 nodad preferred_lft 0
		sysctl -qw net.ipv4.conf.e0.rp_filter=2 net.ipv4.conf.e0.arp_announce=1 net.ipv6.conf.e0.accept_ra=2 net.ipv6.conf.e0.use_tempaddr=1 net.ipv4.neigh.e0.gc_stale_time=77
		ip route add default via 10.9.0.2 metric 50 mtu 1400; ip route add 10.20.0.0/16 via 10.9.0.2 proto static src 10.9.0.11
		ip route add 10.21.0.0/16 via 10.99.0.1 dev e0 onlink table 77; ip route add 10.22.0.0/16 nexthop via 10.9.0.2 weight 3 nexthop via 10.5.0.2 weight 1
		ip route add 10.23.0.0/16 via 10.5.0.2 src 10.9.0.1; ip route add 10.24.0.0/16 dev e0 scope link; ip route add 10.25.0.0/16 dev e0 via inet6 fd09::2
		ip route add unreachable 10.26.0.0/16; ip route add local 10.27.0.0/16 dev e0
		ip -6 route add default via fd09::2 metric 60 mtu 1300; ip -6 route add fd20::/32 via fd09::2 src fd09::1 proto static; ip -6 route add fd21::/32 via fe80::77 dev e0 table 77 expires 5000
		ip -6 route add fd22::/32 nexthop via fd09::2 nexthop via fd09::3
		ip neigh add 10.9.0.77 lladdr 02:00:00:00:00:77 dev e0; ip neigh add proxy 10.9.0.78 dev e0; ip -6 neigh add fd09::77 lladdr 02:00:00:00:00:78 dev e0
		ip rule add pref 77 iif e0 lookup 77`)
	if exec.Command("ip", "nexthop", "add", "id", "7", "via", "10.9.0.2", "dev", "e0").Run() == nil {
		sh(t, "ip nexthop add id 8 group 7; ip route add 10.28.0.0/16 nhid 8; ip route add 10.29.0.0/16 nhid 7")
	}
}

// had is all that an interface has, as text to be compared, but what runs off.
func had(t *testing.T) string {
	t.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	r, err := openRT(0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.c.Close()
	i, err := net.InterfaceByName("e0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := readSettings(h, r, i.Index)
	if err != nil {
		t.Fatal(err)
	}
	s.Taken = 0
	s.Flags &^= unix.IFF_RUNNING | 1<<16
	ends := ""
	left := func(v uint32) { ends += fmt.Sprint((v+60)/500, " ") } // within a minute the same
	for k, m := range s.Routes {
		left(attrU32(m, routeLen, unix.RTA_EXPIRES))
		s.Routes[k] = []byte(routeKey(m))
	}
	for k, m := range s.Addrs {
		c := attr(m, addrLen, unix.IFA_CACHEINFO)
		left(binary.NativeEndian.Uint32(c))
		left(binary.NativeEndian.Uint32(c[4:]))
		s.Addrs[k] = without(m, addrLen, unix.IFA_CACHEINFO)
	}
	s.Neighs = slices.DeleteFunc(s.Neighs, func(m []byte) bool { return m[8] == nudStale }) // learned
	b, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b) + ends + "\n" + sh(t, `exec 2>/dev/null
		ip -d addr show dev e0 | grep -v -e ' link/' -e '^[0-9]' -e veth -e valid_lft -e altname; ip addr show dev e0 | grep -o 'link/.* brd [0-9a-f:]*'
		for t in main local 77; do ip route show table $t; ip -6 route show table $t | sed 's/ expires [^ ]*//' | sort; done; ip rule; ip neigh show dev e0 nud permanent; ip neigh show proxy; ip nexthop; sysctl -a | grep '[.]e0[.]'`)
}

// differ tells the lines that are not the same.
func differ(t *testing.T, what, was, is string) {
	t.Helper()
	if was == is {
		return
	}
	a, b := strings.Split(was, "\n"), strings.Split(is, "\n")
	for _, l := range a {
		if !slices.Contains(b, l) {
			t.Errorf("%s: gone: %s", what, l)
		}
	}
	for _, l := range b {
		if !slices.Contains(a, l) {
			t.Errorf("%s: new: %s", what, l)
		}
	}
	for k := range min(len(a), len(b)) {
		if a[k] != b[k] {
			t.Errorf("%s: line %d was %q, is %q", what, k, a[k], b[k])
			break
		}
	}
}

func sorted(s string) string {
	l := strings.Split(s, "\n")
	slices.Sort(l)
	return strings.Join(l, "\n")
}

// What stands in the place of an interface that is away has all that the
// interface had, and so has the interface when it is back, with what changed meanwhile.
func TestAway(t *testing.T) {
	newLab(t)
	furnished(t)
	before, hosts := had(t), host(t)
	b := open(t, Options{Sever: SeverNamespace})
	if by := b.Severed(); by != SeverNamespace {
		t.Errorf("severed by %s", by)
	}
	differ(t, "away", before, had(t))
	sh(t, "ip addr add 10.9.3.1/24 dev e0; ip route del 10.24.0.0/16 dev e0; ip route add 10.30.0.0/16 via 10.9.3.2; ip link set e0 mtu 1440; sysctl -qw net.ipv4.conf.e0.rp_filter=0")
	changed := had(t)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	differ(t, "back", changed, had(t))
	sh(t, "ip addr del 10.9.3.1/24 dev e0; ip route add 10.24.0.0/16 dev e0 scope link; ip link set e0 mtu 1460; sysctl -qw net.ipv4.conf.e0.rp_filter=2")
	until(t, "the cable", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	likeBefore(t, hosts)
}

// An interface that cannot leave is refused, and nothing has changed.
func TestNoWay(t *testing.T) {
	newLab(t)
	defer func(was uint32) { egressHook = was }(egressHook)
	egressHook = 7 // no kernel has it, and the answer is the same
	until(t, "the cable", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	refused := func(what string, o Options, want error) {
		t.Helper()
		before := host(t) + had(t)
		b, err := Open("e0", o)
		if !errors.Is(err, want) {
			if err == nil {
				b.Close()
			}
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		differ(t, what, before, host(t)+had(t))
	}
	refused("no egress hook", Options{Sever: SeverHook}, ErrNoEgress)
	sh(t, "ip link add mv0 link e0 type macvlan")
	refused("a device on it", Options{}, ErrCannotLeave)
	sh(t, "ip link del mv0; ip link add vx0 type vxlan id 7 dev e0 dstport 4789 remote 10.9.0.2")
	refused("a vxlan on it", Options{}, ErrCannotLeave)
	sh(t, "ip link del vx0; ip link add "+hashName("mip", "e0")+" type veth peer name "+hashName("miq", "e0"))
	b, err := Open("e0", Options{})
	if err != nil {
		t.Fatalf("with the trial pair of one that was killed: %v", err)
	}
	kx, ku := pairNames("e0")
	sh(t, "ip link set "+ku+" alias missiu:e0; ip link set e0 name lan0")
	if b, err := Open("lan0", Options{}); !errors.Is(err, errForeign) {
		if err == nil {
			b.Close()
		}
		t.Errorf("what stands in the place of another: %v, want %v", err, errForeign)
	}
	sh(t, "ip link set lan0 name e0")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if out := sh(t, "ip -o link"); strings.Contains(out, kx) || strings.Contains(out, hashName("mip", "e0")) {
		t.Errorf("left:\n%s", out)
	}
	until(t, "the cable", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	sh(t, "tc qdisc add dev e0 root handle 5: pfifo limit 7")
	refused("a queueing discipline", Options{}, ErrCannotLeave)
	refused("a queueing discipline", Options{}, ErrNoEgress)
	sh(t, "tc qdisc del dev e0 root")
}

// What happens to an interface that is away, and to what stands in its place: never
// a packet past the process, and all works again by itself.
func TestAwayMishaps(t *testing.T) {
	l := newLab(t)
	b, err := Open("e0", Options{Sever: SeverNamespace})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	startPump(t, b, stamps)
	set(t, b, Active, Active)
	check := l.stamps()
	works := func(what string) {
		t.Helper()
		until(t, what, func() bool { return answered(t, 3, "10.9.0.2") == 3 })
		check.want(what, 1)
	}
	flags := func() string { return sh(t, "ip -o link show dev e0") }
	works("start")
	_, ku := pairNames("e0")
	for _, k := range []struct{ what, line string }{
		{"another MAC", "ip link set e0 address 02:00:00:00:77:77"},
		{"another MTU", "ip link set e0 mtu 1400"},
		{"down and up", "ip link set e0 down; ip link set e0 up"},
		{"a helper down", "ip link set " + ku + " down"},
		{"filter deleted", "tc qdisc del dev " + ku + " ingress"},
		{"renamed", "ip link set e0 name e9"},
		{"renamed back", "ip link set e9 name e0"},
		{"deleted", "ip link del " + ku},
		{"moved to another namespace", "ip link set e0 netns " + l.peer},
		{"flushed", "nft flush ruleset"},
	} {
		sh(t, k.line)
		if k.what == "flushed" {
			check.here()
		}
		until(t, k.what+": a route", func() bool { return exec.Command("ip", "route", "get", "10.9.0.2", "from", "10.9.0.1").Run() == nil })
		works(k.what)
	}
	l.sh("ip link set e1 down")
	until(t, "no carrier", func() bool { return strings.Contains(flags(), "NO-CARRIER") })
	l.sh("ip link set e1 up")
	until(t, "the carrier", func() bool { return strings.Contains(flags(), "LOWER_UP") })
	works("carrier")
	sh(t, "ip link set e0 down")
	until(t, "the peer without carrier", func() bool { return strings.Contains(l.sh("ip -o link show dev e1"), "NO-CARRIER") })
	sh(t, "ip link set e0 up")
	works("up")

	// In its namespace nothing passes but what the process sends.
	if err := within(b.away.ns, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := make([]byte, 60)
		copy(frame, []byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2})
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: b.away.nic}); err != unix.ENOBUFS {
			return err
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	works("a stranger in its namespace")

	l.sh("ip link del e1")
	until(t, "the end of the interface", func() bool {
		for {
			select {
			case e := <-b.Events():
				if e.What == "gone from its namespace" {
					return true
				}
				continue
			default:
				return false
			}
		}
	})
	until(t, "no carrier", func() bool { return strings.Contains(flags(), "NO-CARRIER") })
	if err := b.Close(); !errors.Is(err, ErrLost) {
		t.Errorf("Close: %v, want %v", err, ErrLost)
	}
	if lost, err := os.ReadFile(LostPath("e0")); err != nil || !strings.Contains(string(lost), "arp_announce") {
		t.Errorf("what it had: %q, %v", lost, err)
	}
	if out := sh(t, "ip -o link; find "+Dir+" -mindepth 1 ! -name e0.lost"); strings.Contains(out, "e0") || strings.Contains(out, "miu") {
		t.Errorf("left:\n%s", out)
	}
}

// A process that is killed leaves the interface away until the next one adopts it,
// or Cleanup has it come back: at whatever step it was.
func TestAwayFate(t *testing.T) {
	l := newLab(t)
	furnished(t)
	before := had(t)
	check := l.stamps()
	kill, said := child(t, SeverNamespace)
	for k := range 3 {
		if want := fmt.Sprint("severed, adopted ", k > 0); said != want {
			t.Errorf("child says %q, want %q", said, want)
		}
		until(t, "pings", func() bool { return answered(t, 3, "10.9.0.2") == 3 })
		kill()
		if got := silence(t, 3, "10.9.0.2"); got != 0 {
			t.Errorf("kill %d: %d of 3 pings answered after", k, got)
		}
		if k == 0 { // what the egress hook alone holds does not get far here, whatever is flushed
			i, err := net.InterfaceByName("e0")
			if err != nil {
				t.Fatal(err)
			}
			sh(t, "nft flush ruleset")
			bypass(t, i.Index)
			check.here()
		}
		breakOff(t, SeverNamespace)
		kill, said = child(t, SeverNamespace)
	}
	check.want("kills", 1)
	kill()
	if !Left("e0") {
		t.Error("nothing left")
	}
	if _, err := Open("e0", Options{Sever: SeverHook}); err == nil || !strings.Contains(err.Error(), "private namespace") {
		t.Errorf("by the hook after a kill: %v", err)
	}
	if got := silence(t, 2, "10.9.0.2"); got != 0 {
		t.Errorf("after a refusal: %d of 2 pings answered", got)
	}
	back := func(what string) {
		t.Helper()
		if any, err := Cleanup("e0"); err != nil || !any {
			t.Fatalf("%s: Cleanup: %v, %v", what, any, err)
		}
		differ(t, what, before, had(t))
	}
	back("killed")
	if any, err := Cleanup("e0"); any || err != nil {
		t.Errorf("second Cleanup: %v, %v", any, err)
	}
	until(t, "pings after Cleanup", func() bool { return silence(t, 1, "10.9.0.2") == 1 })

	// What stands in its place is deleted while nobody is there.
	kill, _ = child(t, SeverNamespace)
	kill()
	sh(t, "ip link del e0")
	back("deleted when dead")
	// Killed on the way there, and on the way back.
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, k := range []struct {
		what string
		step func(b *Bump) error
	}{
		{"before it has left", func(b *Bump) error { return nil }},
		{"when it has left", func(b *Bump) error {
			ns, err := openNS("e0")
			if err != nil {
				return err
			}
			defer ns.Close()
			l, err := h.LinkByName("e0")
			if err != nil {
				return err
			}
			return h.LinkSetNsFd(l, int(ns.Fd()))
		}},
		{"with half of the settings", func(b *Bump) error {
			if err := b.depart(); err != nil {
				return err
			}
			sh(t, "ip addr del 10.9.0.1/24 dev e0")
			return nil
		}},
		{"when it is back", func(b *Bump) error {
			if err := b.depart(); err != nil {
				return err
			}
			if err := b.away.rec.save("e0", returning); err != nil {
				return err
			}
			sh(t, "ip link del e0")
			return fetchNIC("e0", b.away.rec)
		}},
	} {
		departed(t, h, k.what, k.step)
		back(k.what)
	}
}

// departed is a process that dies after step, for which e0 was about to leave.
func departed(t *testing.T, h *netlink.Handle, what string, step func(b *Bump) error) {
	t.Helper()
	g, err := openGuard("e0", 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer g.c.Close()
	b := &Bump{ifname: "e0", handle: h, guard: g}
	rec, err := b.departure()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	b.away = &away{rec: rec, out: 1}
	if err := step(b); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	b.away.hangUp()
}

// What does not come back as it was is told, and what it had is kept.
func TestAwayLoss(t *testing.T) {
	newLab(t)
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	other := hashName("mir", "e0")
	for _, k := range []struct {
		what, name string
		step       func(b *Bump) error
	}{
		{"settings that are refused", "e0", func(b *Bump) error {
			b.away.rec.Had.MTU = 1 << 20
			return b.away.rec.save("e0", leaving)
		}},
		{"the name is another's", other, func(b *Bump) error {
			err := b.away.rec.save("e0", outside)
			sh(t, "ip link del e0; ip link add e0 type veth peer name e7")
			return err
		}},
	} {
		departed(t, h, k.what, func(b *Bump) error {
			if err := b.depart(); err != nil {
				return err
			}
			return k.step(b)
		})
		if any, err := Cleanup("e0"); !any || err == nil || !strings.Contains(err.Error(), LostPath("e0")) {
			t.Errorf("%s: Cleanup: %v, %v", k.what, any, err)
		} else if why := Lost("e0"); why == nil || why.Error() != err.Error() {
			t.Errorf("%s: kept: %v, want %v", k.what, why, err)
		}
		if lost, err := os.ReadFile(LostPath("e0")); err != nil || !strings.Contains(string(lost), "arp_announce") {
			t.Errorf("%s: what it had: %q, %v", k.what, lost, err)
		}
		if err := os.Remove(LostPath("e0")); err != nil {
			t.Error(err)
		}
		if Left("e0") {
			t.Errorf("%s: left", k.what)
		}
		if out := sh(t, "ip addr show dev "+k.name); !strings.Contains(out, "10.9.0.1/24") || !strings.Contains(out, "veth") && !strings.Contains(out, "@") {
			t.Errorf("%s: %s", k.what, out)
		}
	}
	sh(t, "ip link del "+other)
}

// A record outlives its namespace where /run does; what there is under the name then
// is not what has left.
func TestAwayStale(t *testing.T) {
	newLab(t)
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	departed(t, h, "stale", func(b *Bump) error {
		if err := unix.Unmount(pinPath("e0"), unix.MNT_DETACH); err != nil {
			return err
		}
		b.away.rec.Had.MTU = 1300
		return b.away.rec.save("e0", outside)
	})
	before := had(t)
	if any, err := Cleanup("e0"); !any || err != nil {
		t.Errorf("Cleanup: %v, %v", any, err)
	}
	differ(t, "stale", before, had(t))
	if Left("e0") {
		t.Error("left")
	}
}

// A stay ends with another process's, or the interface's return, but not with a return
// that is broken off, nor with one who looks and goes.
func TestStay(t *testing.T) {
	defer func(was string) { Dir = was }(Dir)
	Dir = t.TempDir()
	if !StayOf("x0").Over("x0") {
		t.Error("without a record it goes on")
	}
	if err := os.Mkdir(awayDir("x0"), 0o700); err != nil {
		t.Fatal(err)
	}
	rec := &record{NIC: "x0", Had: &settings{}}
	save := func(phase string) {
		t.Helper()
		if err := rec.save("x0", phase); err != nil {
			t.Fatal(err)
		}
	}
	save(outside)
	stay := StayOf("x0")
	if stay.Over("x0") {
		t.Error("over at once")
	}
	save(returning)
	if stay.Over("x0") {
		t.Error("over on the way back")
	}
	// A file system may give the new file the old one's number, in the same tick.
	until(t, "a takeover", func() bool { save(outside); return stay.Over("x0") })
	if err := os.RemoveAll(awayDir("x0")); err != nil {
		t.Fatal(err)
	}
	if !stay.Over("x0") {
		t.Error("goes on without a record")
	}
}
