// Package nstest runs a package's tests in a network namespace of their own, so
// that they may make interfaces, routes and rules. Only tests import it.
package nstest

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

const env = "MISSIU_TEST_NETNS"

// Name is the namespace of this process; "" where there is none, since that takes
// root and ip(8): a test that needs one skips itself then, and says why.
func Name() string { return os.Getenv(env) }

// Main is for TestMain: it runs the tests in a namespace mi-NAME-PID if it may,
// else where it is, and returns the exit status.
func Main(m *testing.M, name string) int {
	if Name() != "" || os.Geteuid() != 0 || exec.Command("ip", "netns", "list").Run() != nil {
		return m.Run()
	}
	ns := fmt.Sprintf("mi-%s-%d", name, os.Getpid())
	exe, err := os.Executable()
	if err == nil {
		err = exec.Command("ip", "netns", "add", ns).Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer exec.Command("ip", "netns", "del", ns).Run()
	c := exec.Command("ip", append([]string{"netns", "exec", ns, exe}, os.Args[1:]...)...)
	c.Env = append(os.Environ(), env+"="+ns)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	if c.Run() != nil {
		return 1
	}
	return 0
}
