package bump

import (
	"errors"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// pump forwards frames of both sides, as the simplest process does, and stamps
// IPv4 packets with a TOS of its own, another in each direction.
type pump struct {
	stamp [2]byte     // by the side they come from; 0: none
	hold  atomic.Bool // swallows all
	done  [2]chan struct{}
}

func startPump(t testing.TB, b *Bump, stamp [2]byte) *pump {
	p := &pump{stamp: stamp}
	for from := range p.done {
		p.done[from] = make(chan struct{})
		go p.run(t, b, Side(from), Side(1-from), p.done[from])
	}
	return p
}

func (p *pump) run(t testing.TB, b *Bump, from, to Side, done chan struct{}) {
	defer close(done)
	fs := make([]tap.Frame, 64)
	for i := range fs {
		fs[i].Buf = make([]byte, 70000)
	}
	for {
		for i := range fs {
			fs[i].Off = 64
		}
		n, err := b.ReadBatch(from, fs)
		if err != nil {
			return
		}
		for i := range fs[:n] {
			f := &fs[i]
			if ip := f.Buf[f.Off+etherLen:]; p.stamp[from] != 0 && f.Buf[f.Off+12] == 8 && f.Buf[f.Off+13] == 0 {
				old := uint32(ip[0])<<8 | uint32(ip[1])
				ip[1] = p.stamp[from]
				sum := uint32(^(uint16(ip[10])<<8 | uint16(ip[11])))
				sum += ^old&0xffff + uint32(ip[0])<<8 + uint32(ip[1])
				sum = sum>>16 + sum&0xffff
				sum = sum>>16 + sum&0xffff
				ip[10], ip[11] = ^byte(sum>>8), ^byte(sum)
			}
		}
		if p.hold.Load() {
			continue
		}
		for out := fs[:n]; len(out) > 0; {
			k, err := b.WriteBatch(to, out)
			if err != nil {
				t.Logf("%v: %v", to, err)
				k++
			}
			out = out[min(k, len(out)):]
		}
	}
}

func open(t testing.TB, o Options) *Bump {
	t.Helper()
	b, err := Open("e0", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func set(t testing.TB, b *Bump, high, low State) {
	t.Helper()
	if err := b.SetState(high, low); err != nil {
		t.Fatal(err)
	}
}

// bothWays runs a test with an interface that is severed by the hook, and with one
// that is away.
func bothWays(t *testing.T, f func(t *testing.T, o Options)) {
	for _, sever := range []string{SeverHook, SeverNamespace} {
		t.Run(sever, func(t *testing.T) { f(t, Options{Sever: sever}) })
	}
}

func TestStates(t *testing.T) { bothWays(t, testStates) }

func testStates(t *testing.T, o Options) {
	newLab(t)
	b := open(t, o)
	p := startPump(t, b, [2]byte{})
	pings := func(want int) {
		t.Helper()
		for _, to := range []string{"10.9.0.2", "fd09::2", "-s 8000 10.9.0.2"} {
			ping := answered
			if want == 0 {
				ping = silence
			}
			if got := ping(t, 5, to); got != want {
				t.Errorf("high %v, low %v, ping %s: got %d of 5 answers, want %d", b.State(High), b.State(Low), to, got, want)
			}
		}
	}
	pings(5)
	set(t, b, Active, Active)
	pings(5)
	if b.Stats(High).Read < 15 || b.Stats(Low).Read < 15 {
		t.Errorf("%+v, %+v: too few read", b.Stats(High), b.Stats(Low))
	}
	p.hold.Store(true)
	pings(0)
	p.hold.Store(false)
	set(t, b, Passive, Passive)
	pings(5)
	set(t, b, Closed, Closed)
	pings(5)
}

// host is what Open may change, as text.
func host(t testing.TB) string {
	t.Helper()
	return sh(t, "exec 2>/dev/null; ip -d -o link; nft list ruleset; tc qdisc; for p in ingress egress; do tc filter show dev e0 $p; done; find "+Dir)
}

// A kernel without the egress hook: the interface goes away, and comes back as it was.
func TestNoEgress(t *testing.T) {
	newLab(t)
	defer func(was uint32) { egressHook = was }(egressHook)
	egressHook = 7 // no kernel has it, and the answer is the same
	until(t, "the cable", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	before := host(t)
	b := open(t, Options{})
	if by := b.Severed(); by != SeverNamespace {
		t.Errorf("severed by %s", by)
	}
	p := startPump(t, b, [2]byte{})
	set(t, b, Active, Active)
	if got := answered(t, 3, "10.9.0.2"); got != 3 {
		t.Errorf("%d of 3 pings answered", got)
	}
	p.hold.Store(true)
	if got := silence(t, 3, "10.9.0.2"); got != 0 {
		t.Errorf("%d of 3 pings pass by the process", got)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	until(t, "the cable", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	likeBefore(t, before)
}

// likeBefore waits until the host is as it was: the kernel tells of a carrier, and of
// the end of a namespace, some time after.
func likeBefore(t *testing.T, before string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); sorted(host(t)) != sorted(before) && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond)
	}
	differ(t, "back", sorted(before), sorted(host(t)))
}

// Filters of others stay as they are, and so does what they need; where there is
// no room for the second lock, the first one does its work alone.
func TestGuardBeside(t *testing.T) {
	newLab(t)
	defer exec.Command("tc", "qdisc", "del", "dev", "e0", "clsact").Run()
	sh(t, "tc qdisc add dev e0 clsact; tc filter add dev e0 egress prio 1 protocol all u32 match u32 0 0 classid 1:1")
	until(t, "the cable", func() bool { return silence(t, 1, "10.9.0.2") == 1 })
	before := host(t)
	b := open(t, Options{})
	startPump(t, b, [2]byte{})
	set(t, b, Active, Active)
	if err := b.Guarded(); err != nil {
		t.Error(err)
	}
	if got := answered(t, 3, "10.9.0.2"); got != 3 {
		t.Errorf("beside a filter: %d of 3 pings answered", got)
	}
	set(t, b, Closed, Passive)
	if out := sh(t, "tc filter show dev e0 ingress"); out != "" {
		t.Errorf("filters of a side that is not active:\n%s", out)
	}
	b.Close()
	likeBefore(t, before)
	sh(t, "tc qdisc del dev e0 clsact; tc qdisc add dev e0 ingress")
	b = open(t, Options{})
	startPump(t, b, [2]byte{})
	set(t, b, Active, Active)
	if err := b.Guarded(); !errors.Is(err, ErrNoGuard) {
		t.Errorf("Guarded: %v, want %v", err, ErrNoGuard)
	}
	if got := answered(t, 3, "10.9.0.2"); got != 3 {
		t.Errorf("without the second lock: %d of 3 pings answered", got)
	}
	if out := sh(t, "tc qdisc show dev e0"); !strings.Contains(out, "ingress") {
		t.Errorf("the other's discipline is gone: %s", out)
	}
}
