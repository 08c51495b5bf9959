// Package bump severs an interface from the kernel's stack, with no address and no
// route changed (the x-kernel's ETHTAP): whole Ethernet frames of all types go
// through this process, or their copies come to it.
//
//	            high: the kernel's side          low: the interface's side
//	stack ----> ReadBatch                        WriteBatch ----> NIC
//	stack <---- WriteBatch                       ReadBatch  <---- NIC
//
// Each side has a state of its own, which says what becomes of frames that come
// from there, and of what is written to it:
//
//	Closed   go on as if we were not there; writing is silent
//	Passive  go on, and who is attached gets copies; writing is silent
//	Active   go to ReadBatch or to who takes them, and nowhere else; writing
//	         sends to the stack or out of the interface
//
// Frames are taken by chains of the packet filter (see table) and come back by
// marked sockets and a redirection (see pair); a second lock of traffic control
// (see guard) holds where the chains do not: under a new name of the interface, or
// flushed by somebody. All of it is set up by netlink. A
// frame is taken or passes, never both, so changes of state neither lose frames nor
// double them: what was taken before a change that leaves neither side active is still
// written within a second after it.
//
// Frames come as the kernel has them, 64 KiB of a flow in one where the stack or
// the interface leave the cutting for later, and go on as they came (Options.Offload;
// see offloads). Programs of a Tap get them cut.
//
// When the process dies the kernel keeps chains and guard, and with them every active
// side cut off, until the next Open adopts them with their states or Cleanup
// opens the way. The chains have an owner while the process lives, so that nobody else
// can take them away; afterwards either lock keeps the interface closed without
// the other. With FailOpen there is no guard, and the kernel removes the chains at
// once.
//
// Not even both stop what programs with CAP_NET_RAW send past the kernel's queueing
// (PACKET_QDISC_BYPASS) after the chains are gone, nor AF_XDP at any time. Where that
// matters there is SeverNamespace.
//
// On a kernel without the egress hook (before Linux 5.16) the interface goes away
// instead, into a private network namespace, and a veth with all that the host had
// given it stands in its place; see away and settings. Traffic control alone, which older
// kernels have, is no replacement, because of PACKET_QDISC_BYPASS. What differs then:
//
//   - Nothing passes without the process, so states are its own doing, and after its
//     death the interface is cut off whatever happens to rules or names. FailOpen is
//     the caller's to carry out, by Cleanup.
//   - Close and Cleanup move the interface back, with what its place has by then. An
//     interface that is deleted meanwhile is lost, with Event "gone from its
//     namespace"; one that is made anew under its name has to wait for Close. An error
//     of Close names the file that keeps what the interface had (LostPath), if it is back
//     without a part of that or under another name. Devices that somebody has made on its
//     place are deleted with it.
//   - Going there and back the interface is down for a moment, so what the kernel ties to
//     it is lost, though connections stay: multicast memberships and packet sockets of
//     programs, entries of masquerading, chains of others at the device, VLANs of a
//     bridge's port, and of temporary addresses (RFC 8981) that they are. Routes
//     of the same prefix by several interfaces may change places.
//   - It takes CAP_SYS_ADMIN, VETH, NET_SCH_INGRESS and NET_CLS_BPF, and a driver that lets
//     the interface go. One with devices on it (VLAN, macvlan, vxlan), in a bond, or with a
//     queueing discipline of the administrator's is refused (ErrCannotLeave).
//   - Frames of the process itself take one more copy. That was not to be seen: one TCP
//     stream over a veth, both ends on two processors, two rounds each, hook and namespace in
//     turn, bypassed 11.3, 8.4 and 10.1, 9.8 Gbit/s outwards, 10.7, 9.3 and 9.4, 10.8 inwards;
//     in ESP of transport mode 1.5, 1.5 and 1.6, 1.7 outwards, 1.4, 1.4 and 1.8, 1.8 inwards.
//
// AF_XDP in the place of packet sockets at the low side was measured and is not built.
// A prototype that only forwards, both ends and it on two processors, over a veth, whose
// driver has no zero copy; medians of what arrives of packets sent one by one without
// pause, and of the process's CPU for each. "Both" is a program at the interface that
// redirects all frames, and a socket that transmits; "out" is one that transmits
// single frames, beside the packet socket for super-frames:
//
//	                      packet sockets   AF_XDP, both   AF_XDP, out
//	UDP 64 B, outwards    143   5.7        175   3.5      200   3.0   1000 packets a second, us
//	          inwards     131   6.1        145   4.9
//	UDP 1400 B, outwards  128   6.0        154   4.3      193   3.3
//	            inwards   122   6.3        154   4.5
//	TCP, one stream       17    0.5        1.9   6.4      18    0.5   Gbit/s, us
//
// Both cost TCP most of what it has, since AF_XDP knows no offloads: super-frames have
// to be cut. It cannot write to the high side, for want of a mark, by which the chains
// know what they are not to take again. Out would have what policy bypasses pass by
// captures, queueing disciplines and others' egress chains, which come after ours: a
// filter there would be open. To pass by queueing alone (PACKET_QDISC_BYPASS) gained
// nothing: 149 and 133 outwards.
//
// What is lost on the way of a frame through the process is what the kernel keeps beside
// frames: marks and priorities of sockets, the pacing of transmit queues, hardware
// timestamps. Loopback, and traffic between addresses of the host, never reaches
// the interface and is not seen.
//
// Callers are cmd/missiu, which gives both sides to the engine of pkg/datapath,
// and programs that attach. It does not log: see Events.
package bump

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/capture"
)

// Dir is where state lies that outlives a killed instance. Tests change it.
var Dir = "/run/missiu"

// Side of the bump.
type Side uint8

// Sides.
const (
	High Side = iota // the kernel's
	Low              // the interface's
)

func (s Side) String() string {
	if s == High {
		return "high"
	}
	return "low"
}

// State of a side.
type State uint8

// States.
const (
	Closed State = iota
	Passive
	Active
)

var stateNames = [...]string{"closed", "passive", "active"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "State(?)"
}

// ParseState reads the name of a state.
func ParseState(name string) (State, error) {
	for i, n := range stateNames {
		if n == name {
			return State(i), nil
		}
	}
	return 0, fmt.Errorf("state %q: want closed, passive or active", name)
}

// Options of Open.
type Options struct {
	// FailOpen has the kernel open the way when the process dies. With SeverNamespace it
	// cannot: somebody else has to call Cleanup.
	FailOpen bool
	// Offload is as in tap.Options: with tap.OffloadNone ReadBatch returns finished
	// frames alone.
	Offload string
	Wait    string // as in tap.Options
	Sever   string // one of the Sever constants; "" is SeverAuto
}

// How an interface is severed.
const (
	SeverAuto      = "auto"      // by the hook where there is one
	SeverHook      = "hook"      // the egress hook of the packet filter
	SeverNamespace = "namespace" // the interface goes away
)

// Link is the interface at one moment.
type Link struct {
	Name  string
	Index int // 0: there is none at present
	MAC   net.HardwareAddr
	MTU   int
}

// Event is something that happened to the bump and is not its callers' doing.
type Event struct {
	What  string // "renamed", "deleted", "back", "mac changed", "helper interfaces repaired", "rules repaired", "second lock repaired", "gone from its namespace"
	Link  Link
	Moved bool  // the interface has another name or index than before
	Err   error // what keeps a repair from being done; it is tried again
}

// ErrNoEgress: the kernel cannot take what leaves (NETFILTER_EGRESS, Linux 5.16).
// An interface can only be severed by going away then.
var ErrNoEgress = errors.New("the kernel has no egress hook of the packet filter (NETFILTER_EGRESS, since Linux 5.16)")

// errForeign: an instance of another name, which was killed or runs, has severed the interface.
var errForeign = errors.New("severed already, by an instance that knows the interface by another name: stop that")

// Bump is a severed interface. It is safe for concurrent use.
type Bump struct {
	o      Options
	ifname string // as Open was given it
	handle *netlink.Handle

	mu     sync.Mutex // serialises changes of what follows
	table  *table
	guard  *guard
	lack   error // why there is no guard; nil: there is one
	pair   *pair
	away   *away  // nil: severed by the hook
	lro    string // the interface whose LRO is to be switched on again; "": none
	failed error  // of the last repair
	closed atomic.Bool

	link   atomic.Pointer[Link]
	hub    atomic.Pointer[capture.Hub] // see Monitor; nil: none
	sides  [2]side
	events chan Event

	adopted bool
	watches []*nl.Conn
	retry   *time.Timer
	watched sync.WaitGroup
}

// Open makes what severing needs. Both sides are closed then, or as a killed
// instance left them, which goes on without a gap. It fails if the kernel lacks
// something, and leaves nothing behind then.
func Open(ifname string, o Options) (*Bump, error) {
	b := &Bump{o: o, ifname: ifname, events: make(chan Event, 16)}
	for i := range b.sides {
		b.sides[i].init(b, Side(i))
	}
	if err := b.open(); err != nil {
		b.end()
		if !b.adopted {
			err = errors.Join(err, b.undo())
		}
		b.hangUp()
		return nil, fmt.Errorf("%s: %w", ifname, err)
	}
	return b, nil
}

func (b *Bump) open() error {
	var err error
	if b.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	if _, err := os.Stat(recordPath(b.ifname)); err == nil {
		b.adopted = true // or at least not ours to open
		if b.o.Sever == SeverHook {
			return errors.New("severed already, by a private namespace: stop first")
		}
		return b.openAway()
	}
	l, err := b.handle.LinkByName(b.ifname)
	if err != nil {
		return err
	}
	if t := l.Attrs().EncapType; t != "ether" {
		return fmt.Errorf("link type %q, want ether", t)
	}
	b.link.Store(linkOf(l))
	if b.o.Sever == SeverNamespace {
		if Left(b.ifname) {
			b.adopted = true
			return errors.New("severed already, by the egress hook: stop first")
		}
		return b.openAway()
	}
	if err := b.openHook(); b.o.Sever == SeverHook || !errors.Is(err, ErrNoEgress) {
		return err
	} else if err2 := b.openAway(); err2 != nil {
		return fmt.Errorf("%w; %w", err, err2)
	}
	return nil
}

// openHook severs by the egress hook. An error that is ErrNoEgress leaves nothing behind.
func (b *Bump) openHook() error {
	var err error
	if b.table, err = openTable(b.ifname, b.o.FailOpen); err != nil {
		return err
	}
	high, low := Closed, Closed
	if err := b.table.probe(b.ifname); err != nil {
		b.table.c.Close()
		b.table = nil
		return err
	}
	if b.guard, err = openGuard(b.ifname, b.table.in, b.table.out, 0); err != nil {
		return err
	}
	guarded, foreign, err := b.guard.of(b.link.Load().Index)
	if err != nil {
		return err
	}
	if foreign {
		return errForeign
	}
	if b.adopted, _, err = b.table.exists(); err != nil {
		return err
	}
	b.adopted = b.adopted || guarded
	if b.adopted {
		// A predecessor that has not saved them cannot have been less than active.
		high, low = Active, Active
		if s, err := loadState(b.ifname); err == nil {
			high, low, b.lro, b.guard.made = s.High, s.Low, s.LRO, s.Clsact
		}
	}
	switch {
	case b.o.FailOpen: // the kernel does not take the guard away when we die
		if err := b.guard.leave(b.link.Load().Index); err != nil {
			return err
		}
		b.lack = ErrNoGuard
	default:
		if err := b.guardable(b.link.Load()); err != nil {
			return err
		}
	}
	// Listening comes first, so that no change is missed.
	if err := b.listen(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pair, err = openPair(b.handle, b.ifname, b.link.Load().MAC, b.o.Offload, b.table.out); err != nil {
		return err
	}
	if err := b.attachLink(); err != nil {
		return err
	}
	if err := b.set(high, low); err != nil {
		return err
	}
	return b.keep()
}

// Adopted reports whether Open took over from an instance that was killed.
func (b *Bump) Adopted() bool { return b.adopted }

func linkOf(l netlink.Link) *Link {
	a := l.Attrs()
	return &Link{Name: a.Name, Index: a.Index, MAC: a.HardwareAddr, MTU: a.MTU}
}

// attachLink opens the sockets and the redirection for the present interface and
// pair, as far as there are none. Readers are never opened beside others that
// still read: both would get each frame.
func (b *Bump) attachLink() error {
	link := b.link.Load()
	if err := b.pair.redirect(b.handle, link.Index); err != nil {
		return err
	}
	if was, err := lroOff(link.Name); err != nil {
		return fmt.Errorf("large receive offload: %w", err)
	} else if was {
		b.lro = link.Name
	}
	high, low := &b.sides[High], &b.sides[Low]
	return b.exchange([]socketAt{
		{&high.in, socketOptions{index: b.pair.ku, filter: marked(b.table.stack), wait: b.o.Wait}, nil},
		{&low.in, socketOptions{index: b.pair.ku, filter: unmarked(b.table.stack, b.table.out), wait: b.o.Wait}, nil},
		{&high.out, socketOptions{index: b.pair.ku, mark: b.table.in}, nil},
		{&low.out, socketOptions{index: link.Index, mark: b.table.out}, nil},
	})
}

// socketAt is a socket that a side has to have.
type socketAt struct {
	at *atomic.Pointer[socket]
	o  socketOptions
	ns *os.File // as for within
}

// exchange opens the sockets whose interface is not what it was, as far as there is one,
// and closes the old ones first. Both sides know then what the pair takes.
func (b *Bump) exchange(sockets []socketAt) error {
	for _, k := range sockets {
		if old := k.at.Load(); old != nil && old.index == k.o.index {
			continue
		}
		k.at.Swap(nil).close()
		if k.o.index == 0 {
			continue
		}
		var s *socket
		err := within(k.ns, func() (err error) { s, err = packetSocket(k.o); return err })
		if err != nil {
			return err
		}
		k.at.Store(s)
	}
	for i := range b.sides {
		b.sides[i].takes(b.pair.super)
		b.sides[i].wake()
	}
	return nil
}

// set puts states in force, all but the guard of what is active now, which keep
// adds: it comes after the chains, and goes before them, so that no frame is lost between.
func (b *Bump) set(high, low State) error {
	if err := b.save(high, low); err != nil {
		return err
	}
	return b.change(high, low)
}

// change is set without a note for a successor.
func (b *Bump) change(high, low State) error {
	link := b.link.Load()
	if b.away != nil {
		b.sides[High].enter(high, low)
		b.sides[Low].enter(low, high)
		return nil
	}
	if link.Index != 0 {
		for which, to := range [...]State{High: high, Low: low} {
			if to != Active {
				if err := b.guard.remove(link.Index, Side(which)); err != nil {
					return err
				}
			}
		}
	}
	was := [...]State{High: b.State(High), Low: b.State(Low)}
	// Active begins before the kernel gives us the first frame, or what is read of
	// it at once could not be written yet; and ends when it gives no more.
	for which, to := range [...]State{High: high, Low: low} {
		if to == Active {
			b.sides[which].enter(to, to)
		}
	}
	if link.Index != 0 { // else the chains stay as they are, and check makes them
		kx, ku := pairNames(b.ifname)
		if err := b.table.apply(&plan{device: link.Name, index: link.Index, kx: kx, ku: ku, kxIndex: b.pair.kx, high: high, low: low}); err != nil {
			for which, to := range was {
				b.sides[which].enter(to, was[1-which])
			}
			return err
		}
	}
	b.sides[High].enter(high, low)
	b.sides[Low].enter(low, high)
	return b.copiers()
}

// guardable finds out whether the interface can have the guard.
func (b *Bump) guardable(link *Link) error {
	err := b.guard.prepare(link.Index)
	if b.lack = nil; errors.Is(err, ErrNoGuard) {
		b.lack, err = err, nil
	}
	return err
}

// keep makes sure of the guard.
func (b *Bump) keep() error {
	link := b.link.Load()
	if b.lack != nil || link.Index == 0 || b.away != nil {
		return nil
	}
	repaired, err := b.guard.put(link.Index, b.pair, [2]bool{High: b.State(High) == Active, Low: b.State(Low) == Active})
	if repaired {
		b.tell(Event{What: "second lock repaired"})
	}
	return err
}

// Guarded tells why there is not the second lock, if there is none. With FailOpen
// there never is.
func (b *Bump) Guarded() error { return b.lack }

// save notes what a successor has to know.
func (b *Bump) save(high, low State) error {
	return saveState(b.ifname, saved{high, low, b.lro, b.link.Load().Index, b.guard.made})
}

// SetState puts both sides into states at once.
func (b *Bump) SetState(high, low State) error {
	if high > Active || low > Active {
		return fmt.Errorf("state %v, %v: want closed, passive or active", high, low)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed.Load() {
		return os.ErrClosed
	}
	oldHigh, oldLow := b.State(High), b.State(Low)
	if err := b.set(high, low); err != nil {
		return errors.Join(err, b.save(oldHigh, oldLow), b.keep())
	}
	if err := b.keep(); err != nil {
		b.note(err) // the chains hold, and it is tried again
	}
	return nil
}

// State returns the state of a side.
func (b *Bump) State(s Side) State { return State(b.sides[s].state.Load()) }

// Link returns the interface as it is at present.
func (b *Bump) Link() Link { return *b.link.Load() }

// OutMark is what sockets set (SO_MARK) whose packets leave by the interface
// though the high side is active: those of the process itself.
func (b *Bump) OutMark() uint32 {
	if b.away != nil {
		return b.away.out
	}
	return b.table.out
}

// Kept reports whether a private namespace outlives the process: it is bound to a
// file in the process's mount namespace, and goes with that if nobody else is in it.
func (b *Bump) Kept() bool {
	own, err := os.Readlink("/proc/self/ns/mnt")
	first, err2 := os.Readlink("/proc/1/ns/mnt")
	return err == nil && err2 == nil && own == first
}

// Severed tells how: SeverHook or SeverNamespace.
func (b *Bump) Severed() string {
	if b.away != nil {
		return SeverNamespace
	}
	return SeverHook
}

// Owned reports whether the kernel keeps others from our rules while we live. On
// kernels before 6.9 it does not where what is active is to stay so after our death;
// what somebody flushes is then put back at once, and the guard holds meanwhile.
func (b *Bump) Owned() bool { return b.away != nil || b.table.owned() }

// Events tells what happened. Of events that nobody takes the oldest are forgotten.
func (b *Bump) Events() <-chan Event { return b.events }

func (b *Bump) tell(e Event) {
	e.Link = *b.link.Load()
	for {
		select {
		case b.events <- e:
			return
		default:
		}
		select {
		case <-b.events:
		default:
		}
	}
}

// Close opens the way and removes all that Open made. What was taken before is written
// still, by who reads: ReadBatch ends after that.
func (b *Bump) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	b.mu.Lock()
	// A successor of one that is killed from here on severs it again.
	if b.away == nil && b.change(Closed, Closed) == nil { // else undo opens it
		b.drain()
	}
	b.mu.Unlock()
	b.end()
	err := b.undo()
	b.hangUp()
	return err
}

// drain waits until the frames that were taken have been read, and somewhat longer, for
// they are to be written too.
func (b *Bump) drain() {
	rests := 0
	for end := time.Now().Add(drainLimit); rests < 3 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		rests++
		for i := range b.sides {
			if b.sides[i].in.Load().waiting() {
				rests = 0
			}
		}
	}
}

// drainLimit is for readers that are gone, or do not keep up.
const drainLimit = 100 * time.Millisecond

// end stops everything that runs.
func (b *Bump) end() {
	b.closed.Store(true)
	for _, w := range b.watches {
		w.Close()
	}
	b.mu.Lock()
	if b.retry != nil {
		b.retry.Stop()
	}
	b.mu.Unlock()
	b.watched.Wait()
	b.mu.Lock()
	for i := range b.sides {
		b.sides[i].shut()
	}
	if b.away != nil {
		b.away.own.close()
		b.away.own = nil
	}
	b.mu.Unlock()
}
