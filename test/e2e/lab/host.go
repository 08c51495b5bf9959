package lab

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Host is a machine of its own as far as the product can tell: its network
// namespace, its processes (so killall is safe), its /etc and /run. The rest of
// the file system is that of the machine.
type Host struct {
	t    TB
	Name string // of the network namespace
	Dir  string // its files, at the same path inside and outside; where its commands start
	init *exec.Cmd
	done chan struct{}

	mu    sync.Mutex
	procs []*Proc
}

// initScript is process 1 of a host: bash, because it reaps the daemons that it
// inherits, and with no child of its own that a killall could meet.
const initScript = `
set -e
mount --make-rprivate /
mount -t proc proc /proc
mkdir "$1/.private"
mount -t tmpfs -o mode=755 tmpfs "$1/.private"
cp -a /etc "$1/.private/etc"
mount --bind "$1/.private/etc" /etc
rm -rf /etc/missiu
mkdir /etc/missiu
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/lock
# No address is tentative: duplicate address detection would only cost a second.
for f in default all; do
	echo 0 >/proc/sys/net/ipv6/conf/$f/accept_dad
	echo 0 >/proc/sys/net/ipv6/conf/$f/router_solicitations
done
ip link set lo up
exec 9<> <(:)
echo ready
set +e
exec >/dev/null 2>&1
while :; do read -r -u 9 _; done
`

// NewHost makes a host without interfaces other than lo. It ends with the test.
func NewHost(t TB, name string) *Host {
	t.Helper()
	sweep.Do(removeLeftovers)
	return newHost(t, fmt.Sprintf("%s%d-%s", prefix, os.Getpid(), name), filepath.Join(t.TempDir(), name))
}

func newHost(t TB, ns, dir string) *Host {
	t.Helper()
	h := &Host{t: t, Name: ns, Dir: dir, done: make(chan struct{})}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatalf("%v", err)
	}
	must(t, "ip", "netns", "add", ns)
	t.Cleanup(h.end)

	h.init = exec.Command("ip", "netns", "exec", ns, "bash", "-c", initScript, "init", dir)
	h.init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Setsid:     true,
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer r.Close()
	h.init.Stdout, h.init.Stderr = w, w
	err = h.init.Start()
	w.Close()
	if err != nil {
		close(h.done)
		t.Fatalf("host %s: %v", ns, err)
	}
	go func() {
		h.init.Wait()
		close(h.done)
	}()
	r.SetReadDeadline(time.Now().Add(30 * time.Second * patience))
	msg, _ := io.ReadAll(r)
	if strings.TrimSpace(string(msg)) != "ready" {
		t.Fatalf("host %s: %s", ns, msg)
	}
	return h
}

// end ends all processes of the host (they die with process 1) and removes it.
func (h *Host) end() {
	h.mu.Lock()
	procs := h.procs
	h.mu.Unlock()
	if h.t.Failed() {
		for _, p := range procs {
			h.t.Logf("--- %s on %s wrote:\n%s", p.name, h.Name, tail(p.Output(), 60))
		}
		h.logFiles()
	}
	if h.init != nil && h.init.Process != nil {
		h.init.Process.Kill()
	}
	for _, p := range procs {
		p.reap()
	}
	if h.init != nil && h.init.Process != nil {
		<-h.done
	}
	exec.Command("ip", "netns", "del", h.Name).Run()
}

// logFiles shows the logs that daemons wrote below /run.
func (h *Host) logFiles() {
	logs, _ := filepath.Glob(h.Path("/run/*.log"))
	for _, f := range logs {
		b, _ := os.ReadFile(f)
		h.t.Logf("--- %s on %s:\n%s", filepath.Base(f), h.Name, tail(string(b), 60))
	}
}

func tail(s string, lines int) string {
	l := strings.Split(strings.TrimRight(s, "\n"), "\n")
	if len(l) > lines {
		l = append([]string{"…"}, l[len(l)-lines:]...)
	}
	return strings.Join(l, "\n")
}

// enter is the command line that runs args in the host.
func (h *Host) enter(args []string) []string {
	return append([]string{"nsenter", "--target", strconv.Itoa(h.init.Process.Pid), "--net", "--mount", "--pid", "--root", "--wdns=" + h.Dir, "--"}, args...)
}

// Run runs a command to its end and returns how it went.
func (h *Host) Run(args ...string) Result {
	h.t.Helper()
	return runCmd(h.t, "", "", h.enter(args), args)
}

// RunIn is Run with a standard input.
func (h *Host) RunIn(stdin string, args ...string) Result {
	h.t.Helper()
	return runCmd(h.t, "", stdin, h.enter(args), args)
}

// Must is Run for a command that must succeed; it returns the standard output.
func (h *Host) Must(args ...string) string {
	h.t.Helper()
	r := h.Run(args...)
	if r.Code != 0 {
		h.t.Fatalf("%s: %v", h.Name, r)
	}
	return r.Out
}

// Sh is Must for a line of shell.
func (h *Host) Sh(line string) string {
	h.t.Helper()
	return h.Must("bash", "-ec", line)
}

// Path returns the path outside of the host of a file inside it.
func (h *Host) Path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", h.init.Process.Pid), name)
}

// WriteFile writes a file in the host, with its directories; a relative name
// lies in Dir.
func (h *Host) WriteFile(name, content string, mode os.FileMode) {
	h.t.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(h.Dir, name)
	}
	p := h.Path(name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		h.t.Fatalf("%v", err)
	}
	if err := os.WriteFile(p, []byte(content), mode); err != nil {
		h.t.Fatalf("%v", err)
	}
	if err := os.Chmod(p, mode); err != nil {
		h.t.Fatalf("%v", err)
	}
}

// Python runs a script by the Python that Debian's scapy belongs to; the
// script gets args in sys.argv[1:].
func (h *Host) Python(script string, args ...string) string {
	h.t.Helper()
	argv := append([]string{"/usr/bin/python3", "-"}, args...)
	r := h.RunIn(script, argv...)
	if r.Code != 0 {
		h.t.Fatalf("%s: python: %v", h.Name, r)
	}
	return r.Out
}

// Proc is a command that goes on in the background.
type Proc struct {
	h    *Host
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error

	mu  sync.Mutex
	out bytes.Buffer
}

// Write collects what the command says; it is called by the os/exec package.
func (p *Proc) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

// Output returns what the command has written to both of its outputs so far.
func (p *Proc) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// Start starts a command in the background. It ends with the host at the latest.
func (h *Host) Start(args ...string) *Proc {
	h.t.Helper()
	argv := h.enter(args)
	p := &Proc{h: h, name: strings.Join(args, " "), cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.WaitDelay = 5 * time.Second * patience
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.cmd.Start(); err != nil {
		h.t.Fatalf("%s: %v", p.name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	h.mu.Lock()
	h.procs = append(h.procs, p)
	h.mu.Unlock()
	return p
}

// Pid is the process's id outside of the host; 0 when it has ended. (nsenter
// stays as its parent, because only a child can be in another pid namespace.)
func (p *Proc) Pid() int {
	parent := p.cmd.Process.Pid
	var pid int
	Until(p.h.t, 10*time.Second, p.name+" to start", func() (bool, string) {
		if p.Ended() {
			return true, ""
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", parent, parent))
		f := strings.Fields(string(b))
		if len(f) == 0 {
			return false, "no child yet"
		}
		pid, _ = strconv.Atoi(f[0])
		return pid != 0, ""
	})
	return pid
}

// Ended tells whether the process has ended.
func (p *Proc) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Signal sends a signal to the process itself.
func (p *Proc) Signal(s syscall.Signal) {
	p.h.t.Helper()
	pid := p.Pid()
	if pid == 0 {
		p.h.t.Fatalf("%s has ended already:\n%s", p.name, p.Output())
	}
	if err := syscall.Kill(pid, s); err != nil {
		p.h.t.Fatalf("%s: %v", p.name, err)
	}
}

// Pause stops the process (SIGSTOP) until Resume. nsenter stops itself when its
// child is.
func (p *Proc) Pause() {
	p.h.t.Helper()
	p.Signal(syscall.SIGSTOP)
	Until(p.h.t, 10*time.Second, p.name+" to stop", func() (bool, string) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		_, rest, _ := strings.Cut(string(b), ") ")
		return strings.HasPrefix(rest, "T") || p.Ended(), string(b)
	})
}

// reap waits for the end of a process that was killed. A paused nsenter, or one
// that is about to pause, would not see its child's end.
func (p *Proc) reap() {
	for {
		p.cmd.Process.Signal(syscall.SIGCONT)
		select {
		case <-p.done:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Resume has a paused process go on.
func (p *Proc) Resume() {
	p.h.t.Helper()
	if !p.Ended() {
		p.cmd.Process.Signal(syscall.SIGCONT)
		p.Signal(syscall.SIGCONT)
	}
}

// Wait waits for the end and returns the exit status, -1 for death by a signal.
func (p *Proc) Wait(limit time.Duration) int {
	p.h.t.Helper()
	limit *= patience
	select {
	case <-p.done:
	case <-time.After(limit):
		p.h.t.Fatalf("%s: still running after %v\n%s", p.name, limit, p.Output())
	}
	return p.cmd.ProcessState.ExitCode()
}

// Stop ends the process by TERM and waits for it.
func (p *Proc) Stop() int {
	p.h.t.Helper()
	if !p.Ended() {
		p.Signal(syscall.SIGTERM)
	}
	return p.Wait(30 * time.Second)
}

// Says waits until the process has written text, with all of the line: many write
// one in pieces, Python where PYTHONUNBUFFERED is set.
func (p *Proc) Says(text string, limit time.Duration) {
	p.h.t.Helper()
	Until(p.h.t, limit, fmt.Sprintf("%s to say %q", p.name, text), func() (bool, string) {
		ended := p.Ended() // before its last words are looked for
		out := p.Output()
		lines := out
		if !ended {
			lines = out[:strings.LastIndexByte(out, '\n')+1]
		}
		if strings.Contains(lines, text) {
			return true, ""
		}
		if ended {
			p.h.t.Fatalf("%s ended without saying %q:\n%s", p.name, text, out)
		}
		return false, "it says:\n" + tail(out, 20)
	})
}

// Link joins two hosts by an Ethernet cable: the interface ifname of both,
// up, with the given addresses (of either family).
func Link(t TB, a, b *Host, ifname string, aAddrs, bAddrs []netip.Prefix) {
	t.Helper()
	must(t, "ip", "link", "add", ifname, "netns", a.Name, "type", "veth", "peer", "name", ifname, "netns", b.Name)
	a.up(ifname, aAddrs)
	b.up(ifname, bAddrs)
	for _, h := range []*Host{a, b} {
		// The kernel notes a new carrier a moment later; until then it drops what is
		// sent. The link-local address is the last that comes of it.
		Until(t, 10*time.Second, "carrier of "+ifname, func() (bool, string) {
			s := h.Must("ip", "-o", "link", "show", "dev", ifname) + h.Must("ip", "-o", "addr", "show", "dev", ifname)
			return strings.Contains(s, "LOWER_UP") && strings.Contains(s, "state UP") && strings.Contains(s, " fe80:"), s
		})
	}
}

func (h *Host) up(ifname string, addrs []netip.Prefix) {
	h.t.Helper()
	for _, a := range addrs {
		h.Must("ip", "addr", "add", a.String(), "dev", ifname)
	}
	h.Must("ip", "link", "set", ifname, "up")
}

// Ping sends n echo requests and returns how many of them were answered within
// 20 s, which only a loaded machine needs; "-W" among args says otherwise.
func (h *Host) Ping(n int, args ...string) int {
	h.t.Helper()
	wait := 20
	for i, a := range args {
		if a == "-W" {
			wait, _ = strconv.Atoi(args[i+1])
		}
	}
	cmd := PingArgs(n, 20*time.Millisecond, time.Duration(wait)*time.Second, args...)
	r := h.Run(cmd...)
	if !strings.Contains(r.Out, " received") {
		h.t.Fatalf("%s: %v", h.Name, r)
	}
	got := Answered(r.Out, n)
	if got < n && strings.Contains(r.Out, " errors, ") {
		// An ICMP error counts as an answer that is waited for.
		h.t.Logf("%s: %v", h.Name, r)
		got = Answered(h.Run(cmd...).Out, n)
	}
	return got
}

// Silence sends exactly n echo requests, to which no answer is expected, and
// returns how many of them were answered within a second.
func (h *Host) Silence(n int, args ...string) int {
	h.t.Helper()
	return Answered(h.Run(append([]string{"ping", "-n", "-i", "0.02", "-W", "1", "-c", strconv.Itoa(n)}, args...)...).Out, n)
}

// atOnce is how many packets may go without a pause. Of 20, ping was seen to send 12 so,
// and the others at the interval, which is long here.
const atOnce = 10

// PingArgs is the command line of a ping that sends n echo requests and gives each
// of them time to be answered. Its output is for Answered. Up to atOnce requests
// go together, and no further one. ping would wait for the last answers of a
// longer row, interval apart, no longer than twice what the others took, so it has a
// deadline, until which it sends more while it has not n answers.
func PingArgs(n int, interval, wait time.Duration, args ...string) []string {
	cmd := []string{"ping", "-n", "-c", strconv.Itoa(n)}
	if n <= atOnce {
		w := fmt.Sprint(wait.Seconds())
		return append(append(cmd, "-l", strconv.Itoa(n), "-i", w, "-W", w), args...)
	}
	deadline := (time.Duration(n)*interval + wait + time.Second - 1) / time.Second
	return append(append(cmd, "-i", fmt.Sprint(interval.Seconds()), "-w", fmt.Sprint(int(deadline))), args...)
}

var answer = regexp.MustCompile(`(?m)^\d+ bytes from .* icmp_seq=(\d+) (.*)$`)

// Answered counts which of the first n echo requests of a ping were answered;
// an answer that came twice, or altered, is none.
func Answered(out string, n int) int {
	seen := map[string]bool{}
	for _, m := range answer.FindAllStringSubmatch(out, -1) {
		if seq, _ := strconv.Atoi(m[1]); seq <= n && !strings.Contains(m[2], "!)") && !strings.Contains(m[2], "(truncated)") {
			seen[m[1]] = true
		}
	}
	return len(seen)
}
