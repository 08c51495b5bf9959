package wire

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// Wire is an open interface. It implements Conn. It is safe for concurrent use.
type Wire struct {
	reader reader
	more   []*reader // beside it
	sender sender
	pmtu   pmtu
	chain  *chain
	sets   atomic.Pointer[sets]

	setMu   sync.Mutex // serialises changes of sets and chain
	options Options
	name    string
	index   int
	handle  *netlink.Handle
	link    atomic.Pointer[Link]
	changes chan Link
	lost    atomic.Pointer[LinkError]

	events   *nl.Conn // of the packet filter
	tampered chan error

	fallbacks fallbacks

	closing   atomic.Bool
	closeOnce sync.Once
	closeErr  error
	stop      chan struct{}
	following sync.WaitGroup
}

// Options of Open.
type Options struct {
	// Native chooses how native packets leave: NativeAuto, which "" means too,
	// falls back by itself; for another the host must have what it needs.
	Native string
	Wait   string // as in tap.Options
	// Readers is how many goroutines are to read packets side by side: see
	// MoreReaders. 0 means one.
	Readers int
	// Mark, if not 0, is for an interface that package bump severs: sockets bear it
	// (SO_MARK), so that what they send passes, and nothing is read or kept from
	// the stack here, since the bump brings all there is.
	Mark uint32
	// Filter is the handle of the filters of tc by which a bump guards the interface.
	// They do not shape: what leaves need not go through them.
	Filter uint32

	// refuse, of tests, is the host's lack of a path; nil: it has what it has.
	refuse func(path string) error
}

func (o *Options) lack(path string) error {
	if o.refuse == nil {
		return nil
	}
	return o.refuse(path)
}

// Open takes the interface over: chain, reader, senders. A chain that a killed
// instance left is replaced in one step, with its divert set kept until the
// first SetDivert.
func Open(ifname string, o Options) (*Wire, error) {
	switch o.Native {
	case "":
		o.Native = NativeAuto
	case NativeAuto, NativeXDP, NativePacket, NativeRaw:
	default:
		return nil, fmt.Errorf("native %q: want %s, %s, %s or %s", o.Native, NativeAuto, NativeXDP, NativePacket, NativeRaw)
	}
	w := &Wire{options: o, name: ifname, changes: make(chan Link, 1), tampered: make(chan error, 1), stop: make(chan struct{})}
	w.fallbacks.told, w.fallbacks.news = map[string]bool{}, make(chan Fallback, maxFallbacks)
	if err := w.open(); err != nil {
		w.Close()
		return nil, fmt.Errorf("%s: %w", ifname, err)
	}
	return w, nil
}

func (w *Wire) open() error {
	var err error
	if w.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	link, err := w.handle.LinkByName(w.name)
	if err != nil {
		return err
	}
	if t := link.Attrs().EncapType; t != "ether" {
		return fmt.Errorf("link type %q, want ether", t)
	}
	w.index = link.Attrs().Index
	subscribed, err := w.subscribe()
	if err != nil {
		return err
	}
	if err := w.take(); err != nil {
		subscribed.end()
		return err
	}
	w.following.Add(1)
	go w.follow(subscribed)
	if w.events != nil {
		w.following.Add(1)
		go w.guard(w.events)
	}
	return nil
}

// readers are all.
func (w *Wire) readers() []*reader { return append([]*reader{&w.reader}, w.more...) }

// PacketReader reads packets as Conn does. One goroutine at a time may.
type PacketReader interface {
	ReadBatch(ps []Packet) (int, error)
}

// MoreReaders are the others of Options.Readers, or of as many as the kernel
// gives: number k, from 1, has the unfragmented ESP packets of SPIs that leave k
// when divided by the number of readers, and ReadBatch of Wire the rest.
func (w *Wire) MoreReaders() []PacketReader {
	rs := make([]PacketReader, len(w.more))
	for k, r := range w.more {
		rs[k] = r
	}
	return rs
}

// openReaders opens n, or one where that fails.
func (w *Wire) openReaders(n int) error {
	for k := 1; k < n; k++ {
		r := new(reader)
		err := w.options.lack("AF_PACKET")
		if err == nil {
			err = r.open(w, w.index, k, n)
		}
		if err != nil {
			for _, o := range w.more {
				o.close()
			}
			w.more = nil
			w.fellBack("AF_PACKET", "one reader", err)
			break
		}
		w.more = append(w.more, r)
	}
	return w.reader.open(w, w.index, 0, 1+len(w.more))
}

// take does what Close undoes.
func (w *Wire) take() error {
	local, err := w.look()
	if err != nil {
		return err
	}
	w.sets.Store(&sets{divert: table(), local: local})
	if w.options.Mark != 0 {
		return w.sender.open(w, w.options.Native)
	}
	if err := w.openReaders(max(1, w.options.Readers)); err != nil {
		return err
	}
	if err := w.sender.open(w, w.options.Native); err != nil {
		return err
	}
	if err := loosenReversePath(w.name); err != nil {
		return err
	}
	if w.events, err = listenNft(); err != nil {
		return err
	}
	w.setMu.Lock()
	defer w.setMu.Unlock()
	w.chain, err = newChain(w.name, keys(w.sets.Load().local))
	return err
}

func keys(m map[netip.Addr]struct{}) []netip.Addr {
	as := make([]netip.Addr, 0, len(m))
	for a := range m {
		as = append(as, a)
	}
	return as
}

// LocalAddrs returns all addresses of this host.
func (w *Wire) LocalAddrs() []netip.Addr { return keys(w.sets.Load().local) }

// IsLocal reports whether a is an address of this host. It does not allocate.
func (w *Wire) IsLocal(a netip.Addr) bool { return w.sets.Load().isLocal(a) }

// setLocal publishes the addresses of this host: the reader stops taking what
// goes to an address that is gone before the chain lets it pass, and begins
// with a new one after the chain drops it.
func (w *Wire) setLocal(local map[netip.Addr]struct{}) error {
	w.setMu.Lock()
	defer w.setMu.Unlock()
	old := w.sets.Load()
	if same(old.local, local) {
		return nil
	}
	if w.chain == nil {
		if w.options.Mark != 0 {
			w.sets.Store(&sets{divert: old.divert, local: local})
		}
		return nil
	}
	both := map[netip.Addr]struct{}{}
	for a := range local {
		if old.isLocal(a) {
			both[a] = struct{}{}
		}
	}
	publish := func(m map[netip.Addr]struct{}) { w.sets.Store(&sets{divert: old.divert, local: m}) }
	publish(both)
	if err := w.chain.setLocal(keys(local)); err != nil {
		return err
	}
	publish(local)
	return nil
}

func same(a, b map[netip.Addr]struct{}) bool {
	if len(a) != len(b) {
		return false
	}
	for k := range a {
		if _, ok := b[k]; !ok {
			return false
		}
	}
	return true
}

// Stats returns the counters.
func (w *Wire) Stats() Stats {
	s := &w.sender
	st := Stats{
		// In this order, so that the parts are not more than the whole, which is counted first.
		SentXDP: s.byXDP.Load(), SentPacket: s.byPacket.Load(), Sent: s.ok.Load(), SendTooBig: s.tooBig.Load(), SendNoBufs: s.noBufs.Load(), SendDenied: s.denied.Load(), SendOther: s.other.Load(),
		TooBig: w.pmtu.believed.Load(), TooBigOdd: w.pmtu.odd.Load(),
	}
	for _, r := range w.readers() {
		st.Read += r.read.Load()
		st.Passed += r.passed.Load()
		st.Malformed += r.malformed.Load()
		st.Truncated += r.truncated.Load()
		st.KernelDrops += r.kernelDrops()
	}
	return st
}

// Close gives the interface back: chain deleted, sysctls as before.
func (w *Wire) Close() error {
	w.closeOnce.Do(func() {
		w.closing.Store(true)
		close(w.stop)
		if w.events != nil {
			w.events.Close()
		}
		w.following.Wait()
		for _, r := range w.readers() {
			if r.file != nil {
				r.close()
			}
		}
		w.sender.close()
		if w.chain != nil {
			w.closeErr = w.chain.close()
		}
		if w.options.Mark == 0 {
			w.closeErr = errors.Join(w.closeErr, restoreReversePath(w.name))
		}
		if w.handle != nil {
			w.handle.Close()
		}
	})
	return w.closeErr
}

// Cleanup removes what a killed instance for ifname left: chain, TAP, sysctls,
// files. It reports whether there was anything. The interface need not exist.
func Cleanup(ifname string) (bool, error) {
	chain, err := removeTable(ifname)
	device, err2 := tap.Remove(ifname)
	sysctl := savedReversePath(ifname) != ""
	return chain || device || sysctl, errors.Join(err, err2, restoreReversePath(ifname))
}
