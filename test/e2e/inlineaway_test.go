package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// TestInline by a private namespace, the way of kernels without the egress hook, and what
// becomes of it when missiu is killed. The other end is severed by the hook.
func TestInlineAway(t *testing.T) {
	lab.NeedRoot(t)
	a, b, r := routed(t, false)
	before := a.Snapshot()
	a.Sh("ip neigh flush dev eth0")
	startInline(a, "--sever namespace")
	startInline(b)
	if out := a.Do("./missiu -i eth0 status"); !strings.Contains(out, "high active, low active; when missiu dies: closed; by namespace") {
		t.Errorf("status says\n%s", out)
	}
	for _, section := range []string{"addresses", "routes", "rules"} {
		if d := (lab.Snapshot{section: before[section]}).Diff(without(a.Snapshot(), section)); d != "" {
			t.Errorf("changed: %s", d)
		}
	}
	pings(t, a, 5)
	a.Transfer(b, b.Addr, 4<<20)
	b.Transfer(a, a.Addr, 4<<20)

	c := r.Capture("eth0")
	for _, n := range []*lab.Node{a, b} {
		n.StartIKE()
		n.LoadConfig(policyFor(n, "", "encr_algs gcm"))
	}
	works := func(what string) {
		t.Helper()
		lab.Until(t, 20*time.Second, what, func() (bool, string) { return a.Ping(1, "-W", "1", b.Addr.String()) == 1, "no ping" })
	}
	works("the SAs")
	pings(t, a, 10)
	pings(t, b, 10)
	a.Transfer(b, b.Addr, 16<<20)
	b.Transfer(a, a.Addr, 16<<20)
	if got := a.Ping(5, "-s", "4000", b.Addr.String()); got != 5 {
		t.Errorf("long datagrams: %d of 5", got)
	}
	if got := b.Ping(5, "-s", "4000", a.Addr.String()); got != 5 {
		t.Errorf("long datagrams to the one that is away: %d of 5", got)
	}
	s := a.Status()
	if s.Counters["out_protected"] < 5000 || s.Counters["in_protected"] < 5000 {
		t.Errorf("%d packets protected, %d opened, want at least 5000 each", s.Counters["out_protected"], s.Counters["in_protected"])
	}
	a.KillIKE(10 * time.Second)
	a.KillMissiu()
	if n := a.Silence(3, b.Addr.String()); n != 0 {
		t.Errorf("%d of 3 pings answered after a kill", n)
	}
	if r := a.Try("./missiu -i eth0 startRaw"); r.Code != 1 || !strings.Contains(r.Err, "severed by a startInline that was killed") {
		t.Errorf("%v\nwant a refusal", r)
	}
	startInline(a)
	if out := a.Do("./missiu -i eth0 status"); !strings.Contains(out, "by namespace") {
		t.Errorf("not adopted:\n%s", out)
	}
	a.StartIKE()
	works("adopted")
	lab.NoClear(t, c.Stop())
	a.KillIKE(10 * time.Second)
	a.KillMissiu()
	a.StopMissiu()
	restored := func(what string) {
		t.Helper()
		lab.Until(t, 20*time.Second, "the host as before, "+what, func() (bool, string) { // the carrier takes a moment
			d := before.Diff(a.Snapshot())
			return d == "", d
		})
	}
	restored("killed and stopped")

	b.KillIKE(10 * time.Second)
	b.StopMissiu()
	startInline(a, "--sever namespace --fail open")
	a.KillMissiu()
	lab.Until(t, 10*time.Second, "the interface to come back", func() (bool, string) {
		r := a.Run("ping", "-n", "-c", "1", "-W", "1", b.Addr.String()) // without a route it fails
		return r.Code == 0, r.Out + r.Err
	})
	a.StopMissiu()
	restored("killed with --fail open")
}

// A kernel that truly has no egress hook of the packet filter (6.1 as user-mode Linux,
// without NF_TABLES_NETDEV), at both ends: startInline finds the other way by itself. A
// VLAN on the severed interface, whose tags do not hide its packets from policy.
//
//	one --eth0--[br0 of h]--eth1-- two
func TestInlineNoHook(t *testing.T) {
	lab.NeedRoot(t)
	if !lab.HaveUML() {
		t.Skip("package user-mode-linux is not installed")
	}
	h := lab.NewHost(t, "h")
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	h.Sh("ip link add br0 type bridge mcast_snooping 0; ip link set br0 up; for f in /proc/sys/net/bridge/bridge-nf-call-*tables; do [ ! -e $f ] || echo 0 >$f; done")
	var ends [2]*lab.Linux
	addrs := [2][2]string{{"192.168.3.1", "198.51.100.1"}, {"192.168.3.2", "198.51.100.2"}} // untagged, in the VLAN
	for i := range ends {
		dev := fmt.Sprintf("eth%d", i)
		ends[i] = lab.BootLinux(h, dev, addrs[i][0]+"/24")
		h.Sh("ip link set " + dev + " master br0")
		ends[i].Sh(`cd /usr/lib/uml/modules/$(uname -r)/kernel
for m in drivers/net/veth net/sched/sch_ingress net/sched/cls_bpf net/llc/llc net/802/stp net/802/garp net/802/mrp net/8021q/8021q; do
	insmod $m.ko 2>&1 || grep -q "^$(basename $m) " /proc/modules
done`)
	}
	// One kernel has no packet filter at all, the other one without the family netdev.
	ends[1].Sh("cd /usr/lib/uml/modules/$(uname -r)/kernel; for m in net/netfilter/nfnetlink net/netfilter/nf_tables; do insmod $m.ko; done")
	run := func(i int, line string) string {
		t.Helper()
		return ends[i].Sh("PATH=" + root + "/bin:$PATH\n" + line)
	}
	start := func(i int) {
		t.Helper()
		run(i, "missiu -i vec0 -l missiu.log startInline")
		if out := run(i, "missiu -i vec0 status"); !strings.Contains(out, "high active, low active; when missiu dies: closed; by namespace") {
			t.Errorf("status says\n%s", out)
		}
	}
	for i := range ends {
		start(i)
		run(i, "ip link add link vec0 name vec0.100 type vlan id 100; ip addr add "+addrs[i][1]+"/24 dev vec0.100; ip link set vec0.100 up")
	}
	all := func(what string) {
		t.Helper()
		for k, where := range []string{"untagged", "in the VLAN"} {
			to := addrs[1][k]
			lab.Until(t, time.Minute, what+", "+where, func() (bool, string) {
				return ends[0].Run("ping -n -c 1 -W 1 "+to).Code == 0, run(0, "missiu -i vec0 status; cat /run/missiu.log")
			})
			for _, size := range []string{"", "-s 4000 "} {
				r := ends[0].Run("ping -n -c 5 -i 0.1 -w 30 " + size + to)
				if got := lab.Answered(r.Out, 5); got != 5 {
					t.Errorf("%s, %s: %d of 5 pings answered\n%s%s", what, where, got, r.Out, run(0, "missiu -i vec0 status"))
				}
			}
		}
	}
	all("in clear")

	keys := func(i int) {
		t.Helper()
		us, them := addrs[i], addrs[1-i]
		var policy, sas strings.Builder
		for k := range us {
			fmt.Fprintf(&policy, "{ laddr %s raddr %s } ipsec { encr_algs gcm }\n", us[k], them[k])
			for _, d := range []int{0, 1} {
				fmt.Fprintf(&sas, "add esp spi 0x%d00%d src %s dst %s encr_alg gcm encrkey %s\n", k+1, d+1, addrs[d][k], addrs[1-d][k], key20)
			}
		}
		run(i, fmt.Sprintf("umask 077\ncat >/run/policy <<X\n%sX\ncat >/run/keys <<X\n%sX\nloadConfig -f /run/policy\nloadConfig -k /run/keys", &policy, &sas))
	}
	for i := range ends {
		keys(i)
	}
	c := h.Capture("eth0")
	tagged, clear := h.Capture("eth0", "vlan 100 and ip proto 50"), h.Capture("eth0", "vlan 100 and ip and not ip proto 50")
	all("protected")
	kill := func() {
		t.Helper()
		run(0, "kill -9 $(cat /run/missiu/vec0.pid); while kill -0 $(cat /run/missiu/vec0.pid) 2>/dev/null; do sleep 0.05; done")
	}
	kill()
	for _, to := range addrs[1] {
		if got := lab.Answered(ends[0].Run("ping -n -c 3 -i 0.1 -W 1 "+to).Out, 3); got != 0 {
			t.Errorf("%d of 3 pings of %s answered after a kill", got, to)
		}
	}
	start(0)
	for i := range ends {
		run(i, "loadConfig -F")
		keys(i)
	}
	all("taken over")
	if n := len(tagged.Stop()); n < 30 {
		t.Errorf("%d ESP packets with a tag, want at least 30", n)
	}
	lab.NoClear(t, c.Stop())
	if ps := clear.Stop(); len(ps) > 0 {
		t.Errorf("%d packets in clear with a tag, such as %v", len(ps), ps[0])
	}
	kill()
	for i := range ends {
		run(i, "missiu -i vec0 stop")
	}
	lab.Until(t, time.Minute, "the interface as it was", func() (bool, string) {
		return ends[0].Run("ping -n -c 1 -W 1 "+addrs[1][0]).Code == 0, ends[0].Sh("ip addr; ip route")
	})
	if out := ends[0].Sh("ip -o link; ls /run/missiu; tc qdisc show dev vec0"); strings.Contains(out, "miu") || strings.Contains(out, "vec0.ns") || strings.Contains(out, "clsact") {
		t.Errorf("left:\n%s", out)
	}
	for _, l := range ends {
		l.Stop()
	}
}
