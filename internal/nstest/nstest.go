// Package nstest runs a package's tests in a network namespace of their own, so
// that they may make interfaces, routes and rules. Only tests import it.
package nstest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
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
	exec.Command("ip", "netns", "del", ns).Run() // of a process of the same id that was killed
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

// Ready waits until interfaces that were just set up carry packets: the kernel notes
// a new carrier a moment later, and drops without a word what is sent before. netns
// is the name of their namespace, "" this one.
func Ready(t testing.TB, netns string, ifnames ...string) {
	t.Helper()
	ip := func(object, ifname string) string {
		args := []string{"-o", object, "show", "dev", ifname}
		if netns != "" {
			args = append([]string{"-n", netns}, args...)
		}
		out, _ := exec.Command("ip", args...).Output()
		return string(out)
	}
	for _, ifname := range ifnames {
		Until(t, ifname+" to be up", func() bool {
			link, addrs := ip("link", ifname), ip("addr", ifname)
			// The link-local address is the last that the kernel does.
			return strings.Contains(link, "LOWER_UP") && strings.Contains(link, "state UP") &&
				strings.Contains(addrs, " fe80:") && !strings.Contains(addrs, "tentative")
		})
	}
}

// Until waits for done, and fails the test only when even a machine that stands
// still now and then would have come to it.
func Until(t testing.TB, what string, done func() bool) {
	t.Helper()
	const limit = time.Minute
	for end := time.Now().Add(limit); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", limit, what)
		}
	}
}

// Sh runs a line of shell, of which every command has to succeed, and returns what it
// writes, without white space at both ends.
func Sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// At runs f in the namespace of a name; sockets that f makes stay there.
func At(t testing.TB, name string, f func()) {
	t.Helper()
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	there, err := netns.GetFromName(name)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		t.Fatal(err)
	}
	defer func() { // also when f fails the test
		if netns.Set(here) == nil {
			runtime.UnlockOSThread()
		}
	}()
	f()
}

// Without runs f on a thread that lacks a capability.
func Without(t testing.TB, capability int, f func()) {
	t.Helper()
	runtime.LockOSThread()
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if err := unix.Capget(&h, &d[0]); err != nil {
		t.Fatal(err)
	}
	less := d
	less[capability/32].Effective &^= 1 << (capability % 32)
	if err := unix.Capset(&h, &less[0]); err != nil {
		t.Fatal(err)
	}
	defer func() { // also when f fails the test
		if unix.Capset(&h, &d[0]) == nil {
			runtime.UnlockOSThread()
		}
	}()
	f()
}

// OneCPU keeps the calling goroutine, which is that of the test, on one processor for
// the rest of the test. What one processor sends over a veth pair arrives in its
// order; what a thread sends that moves meanwhile may not.
func OneCPU(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // the thread ends with the goroutine
	var may, one unix.CPUSet
	err := unix.SchedGetaffinity(0, &may)
	for cpu := 0; err == nil && one.Count() == 0; cpu++ {
		if may.IsSet(cpu) {
			one.Set(cpu)
			err = unix.SchedSetaffinity(0, &one)
		}
	}
	if err != nil {
		t.Fatalf("sched_setaffinity: %v", err)
	}
}
