package main

import (
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// row is a line of the table at the end.
type row struct {
	what, result string
	ok           bool
}

// table is what a demonstration ends with.
type table []row

func (t *table) add(ok bool, what, format string, args ...any) {
	*t = append(*t, row{what, fmt.Sprintf(format, args...), ok})
}

// print writes the table, and fails the stage for what did not go as it should.
func (t table) print(s lab.TB) {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 3, ' ', 0)
	for _, r := range t {
		mark := "ok"
		if !r.ok {
			mark = "FAILED"
			s.Errorf("%s: %s", r.what, r.result)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", r.what, r.result, mark)
	}
	w.Flush()
}

// snapshots is the state of hosts before.
type snapshots map[*lab.Node]lab.Snapshot

// stop ends missiu on all of them, and adds whether they are as before.
func (s snapshots) stop(t *table, nodes []*lab.Node) {
	diff := ""
	for _, x := range nodes {
		x.StopMissiu()
		x.Must("rm", "-f", "/run/missiu.log")
		was, now := s[x], x.Snapshot()
		delete(was, "etc")
		delete(now, "etc")
		diff += was.Diff(now)
	}
	if diff == "" {
		t.add(true, "missiu stop", "hosts as before")
	} else {
		t.add(false, "missiu stop", "hosts not as before:\n%s", diff)
	}
}

// demo is the documented sequence on both hosts, with something to look at.
func demo(t lab.TB) {
	a, b := lab.Pair(t)
	a.Echo = func(_ *lab.Node, line string) { fmt.Println("  a# " + line) }
	b.Echo = func(_ *lab.Node, line string) { fmt.Println("  b# " + line) }
	nodes := []*lab.Node{a, b}
	fmt.Printf("Two hosts, a %v and b %v, on one Ethernet. On both:\n\n", a.Addr, b.Addr)

	var rows table
	add := rows.add
	before := snapshots{a: a.Snapshot(), b: b.Snapshot()}
	for _, n := range nodes {
		n.StartMissiu()
	}
	add(true, "missiu startRaw, TAP up", "ready on both hosts, %s", a.TAP())
	for _, n := range nodes {
		n.StartIKE()
	}
	add(true, "ike", "ready on both hosts")
	for _, n := range nodes {
		n.LoadConfig(fmt.Sprintf(policy, n.Peer))
	}
	add(true, "loadConfig -f ipsec.conf", "%d policies on each host", a.Status().Policies)
	for _, n := range nodes {
		n.Route()
	}
	add(true, "route add -host … dev tap0", "done")

	link := a.Capture("eth0")
	start := time.Now()
	fmt.Printf("  a# ping -c 20 %v\n", b.Addr)
	got := a.Ping(20, b.Addr.String())
	add(got == 20, "ping, first packet negotiates", "%d of 20 answered in %v", got, time.Since(start).Round(time.Millisecond))

	const octets = 64 << 20
	fmt.Println("  a# (64 MiB of TCP to b, and back)")
	there := a.Transfer(b, b.Addr, octets)
	back := b.Transfer(a, a.Addr, octets)
	add(!t.Failed(), "64 MiB of TCP each way, SHA-256", "%s; %.2f and %.2f Gbit/s", map[bool]string{true: "differs", false: "the same at both ends"}[t.Failed()], there*8/1e9, back*8/1e9)

	n := lab.Count(link.Stop())
	protected := a.Status().Counters["out_protected"] + a.Status().Counters["in_protected"]
	add(protected > 0 && n[lab.ESP] > 0, "packets protected", "%d by missiu's count, %d ESP on the link", protected, n[lab.ESP])
	add(n[lab.Clear] == 0, "clear packets seen on the link", "%d", n[lab.Clear])

	a.KillIKE(5 * time.Second)
	lab.Until(t, 10*time.Second, "SAs to go", func() (bool, string) {
		left := a.Status().SAs + b.Status().SAs
		return left == 0, fmt.Sprintf("%d SAs left", left)
	})
	b.KillIKE(5 * time.Second)
	add(true, "killall ike", "peer told, no SA left on either host")
	before.stop(&rows, nodes)
	rows.print(t)
}
