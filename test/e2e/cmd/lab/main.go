// Lab shows the product on two hosts of one machine, in network namespaces. It
// needs root; `make demo` and `make lab` call it.
//
//	lab demo       runs the documented sequence, measures, prints a table, cleans up
//	lab demo-tun   the same with a TUN on two gateways, a host behind each
//	lab demo-inline  two hosts whose interfaces are severed from their stacks
//	lab up         leaves the two hosts with the product running
//	lab down       ends what up left
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/missiu/missiu/test/e2e/lab"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("want demo, demo-tun, demo-inline, up or down")
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: makes network namespaces")
	}
	switch args[0] {
	case "demo":
		return lab.Stage(demo)
	case "demo-tun":
		return lab.Stage(demoTun)
	case "demo-inline":
		return lab.Stage(demoInline)
	case "up":
		return up()
	case "down":
		return lab.RemoveKept()
	}
	return fmt.Errorf("unknown verb %q; want demo, demo-tun, demo-inline, up or down", args[0])
}

const policy = "{ raddr %v } ipsec { encr_algs aes encr_auth_algs sha1 }\n"

// up leaves two hosts behind.
func up() error {
	if err := lab.RemoveKept(); err != nil {
		return err
	}
	t := lab.NewTest()
	err := t.Try(func(t lab.TB) {
		a, b := lab.KeepPair(t)
		for _, n := range []*lab.Node{a, b} {
			n.StartMissiu()
		}
		for _, n := range []*lab.Node{a, b} {
			n.StartIKEKept()
			n.LoadConfig(fmt.Sprintf(policy, n.Peer))
			n.Route()
		}
		fmt.Println("Two hosts are up, each with missiu and ike running. For a shell on either:")
		fmt.Println()
		for _, n := range []*lab.Node{a, b} {
			fmt.Printf("  %v   %s\n", n.Addr, n.Shell())
		}
		fmt.Println("\nThere: ping the other one, ./missiu -i eth0 status, ./loadConfig -dP, tcpdump -ni eth0; logs in /run/*.log.")
		fmt.Println("scripts/lab down ends it.")
	})
	lab.RemoveBin() // the hosts have their own copies
	if err != nil {
		t.End()
		return errors.Join(err, lab.RemoveKept())
	}
	return nil
}
