package keysock

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// ServerOptions are the limits of a server; zero fields take the defaults.
type ServerOptions struct {
	QueueLen   int           // events and copies that wait for one client; 4096
	Answers    int           // answers that wait before a client's requests stop being read; 16
	StallLimit time.Duration // how long a client may leave an answer unread; 60 s
	SendBuffer int           // octets of socket buffer per connection, as far as the kernel allows; 1 MiB
	MaxConns   int           // connections at a time, more are closed at once; 256

	// Abstract is a second name in the abstract namespace, "@name", for programs
	// that do not see the file (they run after chroot, or in another mount
	// namespace); "" for none. Only peer credentials guard it: whoever is in the
	// network namespace may connect, and is closed unless entitled.
	Abstract string
}

func (o *ServerOptions) setDefaults() {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.QueueLen, 4096)
	def(&o.Answers, 16)
	def(&o.SendBuffer, 1<<20)
	def(&o.MaxConns, 256)
	if o.StallLimit == 0 {
		o.StallLimit = time.Minute
	}
}

// Server is the PF_KEY socket of one engine. Its methods may be called from
// any goroutine.
type Server struct {
	b    Backend
	opt  ServerOptions
	lns  []*net.UnixListener
	path string
	lock *os.File

	reqs chan *request // from readers, one at a time to Serve
	wake chan struct{} // todo has something
	quit chan struct{} // Serve is ending
	wg   sync.WaitGroup

	labels labels // of the goroutine of Serve

	mu      sync.Mutex
	conns   map[uint64]*conn
	nextID  uint64
	todo    []func()
	closing bool
	stats   Stats
}

// Stats are counters of a server.
type Stats struct {
	Conns    int    // open now
	Accepted uint64 // since the start
	Refused  uint64 // not entitled, or too many
	Stalled  uint64 // closed because they left an answer unread
	Requests uint64
	Errors   uint64 // requests that were refused
	Dropped  uint64 // events and copies that found a full queue
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Conns = len(s.conns)
	return st
}

func (s *Server) count(f func(*Stats)) {
	s.mu.Lock()
	f(&s.stats)
	s.mu.Unlock()
}

// Do has f run in the goroutine of Serve, between requests, in the order of the
// calls. It never blocks and may be called from anywhere, f itself and Backend
// methods included; it does not wait for f. What is still queued when Serve
// returns is forgotten. Nothing bounds the queue: callers that packets drive
// bound themselves.
func (s *Server) Do(f func()) {
	s.mu.Lock()
	s.todo = append(s.todo, f)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Serve handles connections and requests until ctx is done, then ends every
// connection, removes the socket and returns when all its goroutines have ended.
// It is called once; its error says why accepting ended before ctx did.
func (s *Server) Serve(ctx context.Context) error {
	accepted := make(chan error, len(s.lns))
	for _, ln := range s.lns {
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			accepted <- s.accept(ln)
		}()
	}
	err := s.loop(ctx, accepted)
	s.shutdown()
	return err
}

func (s *Server) loop(ctx context.Context, accepted <-chan error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-accepted:
			return err
		case r := <-s.reqs:
			s.handle(r)
			close(r.done)
		case <-s.wake:
			s.mu.Lock()
			todo := s.todo
			s.todo = nil
			s.mu.Unlock()
			for _, f := range todo {
				f()
			}
		}
	}
}

// Close releases the socket of a server whose Serve is never called; Serve does
// it by itself.
func (s *Server) Close() { s.shutdown() }

func (s *Server) shutdown() {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return
	}
	s.closing = true
	conns := make([]*conn, 0, len(s.conns))
	for _, c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	close(s.quit)
	s.removeSocket()
	for _, c := range conns {
		c.nc.Close()
	}
	s.wg.Wait()
	for _, c := range conns {
		if c.tx {
			_ = s.b.Abort(c.id) // the connection is gone, nobody to tell
		}
	}
}

// accept takes connections until the listener is closed.
func (s *Server) accept(ln *net.UnixListener) error {
	for {
		nc, err := ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Out of descriptors or memory: others must go first.
			select {
			case <-s.quit:
				return nil
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if !Entitled(nc) || !s.admit(nc) {
			s.count(func(st *Stats) { st.Refused++ })
			nc.Close()
		}
	}
}

// admit starts a connection's goroutines, unless there are too many or Serve ends.
func (s *Server) admit(nc *net.UnixConn) bool {
	setSendBuffer(nc, s.opt.SendBuffer)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || len(s.conns) >= s.opt.MaxConns {
		return false
	}
	s.nextID++
	c := newConn(s, s.nextID, nc)
	s.conns[c.id] = c
	s.stats.Accepted++
	s.wg.Add(2)
	go func() {
		defer s.wg.Done()
		c.write()
	}()
	go func() {
		defer s.wg.Done()
		c.read()
		c.shut()
		s.Do(func() { s.forget(c) })
	}()
	return true
}

// forget ends what a connection that is gone left open. It runs in the goroutine
// of Serve, behind every request of the connection.
func (s *Server) forget(c *conn) {
	s.mu.Lock()
	delete(s.conns, c.id)
	s.mu.Unlock()
	if c.tx {
		c.tx = false
		_ = s.b.Abort(c.id) // nobody to tell
	}
}

// snapshot returns the connections there are.
func (s *Server) snapshot() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := make([]*conn, 0, len(s.conns))
	for _, c := range s.conns {
		l = append(l, c)
	}
	return l
}
