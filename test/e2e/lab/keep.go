package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A lab that is kept outlives the process that made it, so its names carry no
// pid; there is one on a machine.
const (
	keepPrefix = prefix + "lab-"
	keepDir    = "/tmp/missiu-lab"
)

// KeepPair is Pair for hosts that RemoveKept ends, not the end of t.
func KeepPair(t TB) (a, b *Node) {
	t.Helper()
	if err := os.RemoveAll(keepDir); err != nil {
		t.Fatalf("%v", err)
	}
	hosts := make([]*Host, 2)
	for i, name := range []string{"a", "b"} {
		hosts[i] = newHost(t, keepPrefix+name, filepath.Join(keepDir, name))
	}
	a, b = pairOf(t, hosts[0], hosts[1])
	for _, n := range []*Node{a, b} {
		// The kept hosts' programs must not vanish with those of Bin.
		n.Sh("cd bin && for f in *; do cp --remove-destination \"$(readlink -f $f)\" $f; done")
	}
	return a, b
}

// StartIKEKept is StartIKE for a host that is kept: the log goes to a file.
func (n *Node) StartIKEKept() {
	n.t.Helper()
	n.WritePSK()
	n.Sh(fmt.Sprintf("cd bin; ./ike -p @../psk %v >/run/ike.log 2>&1 </dev/null &", n.Addr))
	Until(n.t, 20*time.Second, "ike to be ready", func() (bool, string) {
		b, _ := os.ReadFile(n.Path("/run/ike.log"))
		return strings.Contains(string(b), "ready"), string(b)
	})
}

// RemoveKept ends the hosts of KeepPair.
func RemoveKept() error {
	ents, err := os.ReadDir("/run/netns")
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	for _, e := range ents {
		if strings.HasPrefix(e.Name(), keepPrefix) {
			removeNetns(e.Name())
		}
	}
	return os.RemoveAll(keepDir)
}

// Shell is the command line for a shell on the host.
func (n *Node) Shell() string {
	return fmt.Sprintf("nsenter -t %d -n -m -p -r --wdns=%s bash", n.init.Process.Pid, filepath.Join(n.Dir, "bin"))
}
