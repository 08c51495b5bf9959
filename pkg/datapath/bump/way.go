package bump

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/wire"
)

// Way is how the process itself sends over the interface, and its port 4500: a
// wire.Wire with the bump's mark, made anew when the interface is, under another
// name or index. It has the methods of wire.Wire that the engine and the main
// use. It is safe for concurrent use.
type Way struct {
	b   *Bump
	o   wire.Options
	uo  wire.UDPOptions
	udp bool

	cur   atomic.Pointer[way]
	judge func(wire.TooBig) bool

	changes   chan wire.Link
	fallbacks chan wire.Fallback
	failures  chan error

	mu       sync.Mutex
	replaced chan struct{} // closed when cur is another
	stopped  chan struct{}
	renew    chan struct{}
	running  sync.WaitGroup
}

// way is what there is of one interface.
type way struct {
	w *wire.Wire
	u *wire.UDP // nil: none
}

// OpenWay opens the way over the interface of b. udpErr says why there is no port
// 4500, if it wraps wire.ErrPortTaken; another error of the port is err.
func OpenWay(b *Bump, o wire.Options, uo wire.UDPOptions) (w *Way, udpErr, err error) {
	o.Mark, o.Filter = b.OutMark(), b.guard.handle
	w = &Way{
		b: b, o: o, uo: uo, udp: true,
		changes: make(chan wire.Link, 1), fallbacks: make(chan wire.Fallback, 16), failures: make(chan error, 1),
		replaced: make(chan struct{}), stopped: make(chan struct{}), renew: make(chan struct{}, 1),
	}
	first, err := w.open()
	if errors.Is(err, wire.ErrPortTaken) {
		udpErr, w.udp = err, false
		first, err = w.open()
	}
	if err != nil {
		return nil, nil, err
	}
	w.install(first)
	w.running.Add(1)
	go w.run()
	return w, udpErr, nil
}

func (w *Way) open() (*way, error) {
	n, err := wire.Open(w.b.Link().Name, w.o)
	if err != nil {
		return nil, err
	}
	n.VerifyTooBig(w.judge)
	var u *wire.UDP
	if w.udp {
		if u, err = n.OpenUDP(w.uo); err != nil {
			n.Close()
			return nil, err
		}
	}
	return &way{n, u}, nil
}

// install puts a way in the place of the one before, whose news it takes over.
func (w *Way) install(n *way) {
	old := w.cur.Swap(n)
	w.mu.Lock()
	close(w.replaced)
	w.replaced = make(chan struct{})
	w.mu.Unlock()
	w.running.Add(1)
	go func() {
		defer w.running.Done()
		fallbacks := n.w.Fallbacks()
		for {
			select {
			case l, ok := <-n.w.Changes():
				if !ok {
					return
				}
				w.changed(l)
			case f := <-fallbacks:
				select {
				case w.fallbacks <- f:
				default:
				}
			}
		}
	}()
	if old != nil {
		old.close()
		w.changed(n.w.Link())
	}
}

func (w *Way) changed(l wire.Link) {
	for {
		select {
		case w.changes <- l:
			return
		default:
		}
		select {
		case <-w.changes: // the older news
		default:
		}
	}
}

func (n *way) close() error {
	if n.u != nil {
		n.u.Close()
	}
	return n.w.Close()
}

// Renew has the way opened anew, since the interface has moved. Until that has
// succeeded nothing leaves by it.
func (w *Way) Renew() {
	select {
	case w.renew <- struct{}{}:
	default:
	}
}

func (w *Way) run() {
	defer w.running.Done()
	for {
		select {
		case <-w.stopped:
			return
		case <-w.renew:
		}
		for w.b.Link().Index != 0 {
			if old := w.cur.Load(); old.w.Link().Index == w.b.Link().Index {
				old.close() // another name of the same: it has the port, and the queue of AF_XDP
			}
			n, err := w.open()
			if err == nil {
				w.install(n)
				break
			}
			select {
			case w.failures <- err:
			default:
			}
			select {
			case <-w.stopped:
				return
			case <-time.After(retryEvery):
			}
		}
	}
}

// Failures tells why Renew has not succeeded yet; it is tried again.
func (w *Way) Failures() <-chan error { return w.failures }

// Close ends it.
func (w *Way) Close() error {
	close(w.stopped)
	w.mu.Lock()
	close(w.replaced)
	w.replaced = make(chan struct{})
	w.mu.Unlock()
	err := w.cur.Load().close()
	w.running.Wait()
	return errors.Join(err)
}

func (w *Way) closed() bool {
	select {
	case <-w.stopped:
		return true
	default:
		return false
	}
}

// lost makes of the errors of an interface that is gone those of one that is down.
func (w *Way) lost(err error, dst netip.Addr) error {
	var s *wire.SendError
	switch {
	case err == nil || w.closed():
		return err
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO), errors.Is(err, os.ErrClosed):
		if errors.As(err, &s) {
			return &wire.SendError{Dst: s.Dst, Err: unix.ENETDOWN, Lost: s.Lost}
		}
		return &wire.SendError{Dst: dst, Err: unix.ENETDOWN, Lost: 1}
	}
	return err
}

// ReadBatch blocks until Close: all that comes comes by the bump.
func (w *Way) ReadBatch([]wire.Packet) (int, error) {
	<-w.stopped
	return 0, os.ErrClosed
}

// WriteBatch is that of wire.Wire; an interface that is not there is down.
func (w *Way) WriteBatch(ps []wire.Packet) (int, error) {
	n, err := w.cur.Load().w.WriteBatch(ps)
	return n, w.lost(err, netip.Addr{})
}

// PathMTU is that of wire.Wire.
func (w *Way) PathMTU(dst netip.Addr) int { return w.cur.Load().w.PathMTU(dst) }

// IsLocal is that of wire.Wire.
func (w *Way) IsLocal(a netip.Addr) bool { return w.cur.Load().w.IsLocal(a) }

// Heard is that of wire.Wire.
func (w *Way) Heard(packet []byte) { w.cur.Load().w.Heard(packet) }

// Bridged: the interface has no addresses, so no route leads over it.
func (w *Way) Bridged() bool { return w.cur.Load().w.Bare() }

// VerifyTooBig is that of wire.Wire. It is called before Renew can be.
func (w *Way) VerifyTooBig(judge func(wire.TooBig) bool) {
	w.judge = judge
	w.cur.Load().w.VerifyTooBig(judge)
}

// Link is that of wire.Wire.
func (w *Way) Link() wire.Link { return w.cur.Load().w.Link() }

// Changes is that of wire.Wire, but never closed.
func (w *Way) Changes() <-chan wire.Link { return w.changes }

// Err is nil: an interface that is lost may come back.
func (w *Way) Err() error { return nil }

// Fallbacks is that of wire.Wire.
func (w *Way) Fallbacks() <-chan wire.Fallback { return w.fallbacks }

// Tampered delivers nothing: the rules are the bump's.
func (w *Way) Tampered() <-chan error { return nil }

// SetDivert and ChangeDivert have nothing to do: all frames are diverted.
func (w *Way) SetDivert(v4, v6 []netip.Prefix) error { return nil }

// ChangeDivert has nothing to do.
func (w *Way) ChangeDivert(add, remove []netip.Prefix) error { return nil }

// Path tells how packets of our own leave.
func (w *Way) Path() (in, out string) {
	_, out = w.cur.Load().w.Path()
	return "bump", out
}

// Stats are those of the way that is open.
func (w *Way) Stats() wire.Stats { return w.cur.Load().w.Stats() }

// UDP is port 4500; it stays when the interface does not.
func (w *Way) UDP() *Port { return &Port{w} }

// Port is port 4500 of a Way.
type Port struct{ w *Way }

// ReadBatch implements wire.UDPConn.
func (p *Port) ReadBatch(ds []wire.Datagram) (int, error) {
	for {
		p.w.mu.Lock()
		replaced := p.w.replaced
		p.w.mu.Unlock()
		if p.w.closed() {
			return 0, os.ErrClosed
		}
		n, err := p.w.cur.Load().u.ReadBatch(ds)
		if err == nil || p.w.closed() {
			return n, err
		}
		select {
		case <-replaced:
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// WriteBatch implements wire.UDPConn.
func (p *Port) WriteBatch(ds []wire.Datagram) (int, error) {
	n, err := p.w.cur.Load().u.WriteBatch(ds)
	return n, p.w.lost(err, netip.Addr{})
}

// Close ends nothing: the port is the Way's.
func (p *Port) Close() error { return nil }

// Path is that of wire.UDP.
func (p *Port) Path() (in, out string) { return p.w.cur.Load().u.Path() }

// Stats are those of the port that is open.
func (p *Port) Stats() wire.UDPStats { return p.w.cur.Load().u.Stats() }
