package natt

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/missiu/missiu/pkg/attach"
)

// queueLen is how many messages wait for the key daemon. IKE repeats what is lost.
const queueLen = 256

// Server is missiu's end. It serves one client at a time; a new one takes the
// place of the old, since a key daemon that was restarted is the one that lives.
type Server struct {
	ln    *net.UnixListener
	send  func(Message)
	queue chan []byte
	wg    sync.WaitGroup
	quit  chan struct{}
	once  sync.Once

	mu     sync.Mutex
	conn   *net.UnixConn
	closed bool

	sendMu sync.Mutex // an old client's reader may still be in send when the new one's begins

	delivered, noClient, slow, malformed, received atomic.Uint64
}

// Stats are counters since Listen: messages delivered, dropped for want of a
// client, dropped because the client was slow; messages of clients that were
// malformed, and all that were received from clients.
type Stats struct{ Delivered, NoClient, Slow, Malformed, Received uint64 }

// Listen makes the socket; a stale one is replaced, a live one is an error.
// send is called for each message of a client, from one goroutine at a time;
// the payload is valid until it returns.
func Listen(path string, send func(Message)) (*Server, error) {
	ln, err := attach.ListenUnix(path)
	if err != nil {
		return nil, err
	}
	s := &Server{ln: ln, send: send, queue: make(chan []byte, queueLen), quit: make(chan struct{})}
	s.wg.Add(2)
	go s.accept()
	go s.write()
	return s, nil
}

func (s *Server) accept() {
	defer s.wg.Done()
	attach.Accept(s.ln, s.quit, func(c *net.UnixConn) {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			c.Close()
			return
		}
		old := s.conn
		s.conn = c
		s.wg.Add(1)
		s.mu.Unlock()
		if old != nil {
			old.Close()
		}
		go s.read(c)
	})
}

func (s *Server) read(c *net.UnixConn) {
	defer s.wg.Done()
	defer func() {
		s.mu.Lock()
		if s.conn == c {
			s.conn = nil
		}
		s.mu.Unlock()
		c.Close()
	}()
	buf := make([]byte, MaxMessage+1)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		s.received.Add(1)
		m, err := Parse(buf[:n])
		if err != nil {
			s.malformed.Add(1)
			continue
		}
		s.sendMu.Lock()
		s.send(m)
		s.sendMu.Unlock()
	}
}

// write is the only writer to clients, so that a slow one holds up nobody else.
func (s *Server) write() {
	defer s.wg.Done()
	for {
		select {
		case <-s.quit:
			return
		case b := <-s.queue:
			s.mu.Lock()
			c := s.conn
			s.mu.Unlock()
			if c == nil {
				s.noClient.Add(1)
				continue
			}
			if _, err := c.Write(b); err != nil {
				s.noClient.Add(1)
				continue
			}
			s.delivered.Add(1)
		}
	}
}

// Deliver hands a message to the key daemon; a nil server has none. It never blocks: without a client,
// or when the client is slow, the message is dropped and counted, and Deliver
// returns false. The payload is not kept. Callable from any goroutine.
func (s *Server) Deliver(local, remote netip.AddrPort, payload []byte) bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	none := s.conn == nil
	s.mu.Unlock()
	if none {
		s.noClient.Add(1)
		return false
	}
	m := Message{local, remote, payload}
	b, err := m.Append(nil)
	if err != nil {
		s.malformed.Add(1)
		return false
	}
	select {
	case s.queue <- b:
		return true
	default:
		s.slow.Add(1)
		return false
	}
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	if s == nil {
		return Stats{}
	}
	return Stats{s.delivered.Load(), s.noClient.Load(), s.slow.Load(), s.malformed.Load(), s.received.Load()}
}

// Close removes the socket and waits for the server's goroutines.
func (s *Server) Close() error {
	if s == nil {
		return nil
	}
	var err error
	s.once.Do(func() {
		err = s.ln.Close()
		close(s.quit)
		s.mu.Lock()
		s.closed = true
		c := s.conn
		s.mu.Unlock()
		if c != nil {
			c.Close()
		}
		s.wg.Wait()
	})
	return err
}
