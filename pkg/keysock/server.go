package keysock

import (
	"context"
	"time"
)

// ServerOptions are the limits of a server; zero fields take the defaults.
type ServerOptions struct {
	QueueLen   int           // events and copies that wait for one client; 4096
	Answers    int           // answers that wait before a client's requests stop being read; 16
	StallLimit time.Duration // how long a client may leave an answer unread; 60 s
	SendBuffer int           // octets of socket buffer per connection; 1 MiB
	MaxConns   int           // connections at a time; 256
}

// Server is the PF_KEY socket of one engine.
type Server struct{}

// NewServer listens at path, whose directory it makes (0755); the socket has
// mode 0600. A socket file that no server answers at is replaced; if one does,
// the error is EADDRINUSE.
func NewServer(path string, b Backend, opt ServerOptions) (*Server, error) { return nil, ErrClosed }

// Serve handles connections and requests until ctx is done, then ends every
// connection, removes the socket and returns when all its goroutines have ended.
func (s *Server) Serve(ctx context.Context) error { return ErrClosed }

// Do has f run in the goroutine of Serve, between requests, in the order of the
// calls. It never blocks and may be called from anywhere, f itself and Backend
// methods included; it does not wait for f. What is still queued when Serve
// returns is forgotten.
func (s *Server) Do(f func()) {}

// Acquire sends an ACQUIRE to registered sockets and reports whether there are
// any. It may be called from anywhere.
func (s *Server) Acquire(a Acquire) bool { return false }

// Expire sends an EXPIRE to registered sockets. i needs no keys.
func (s *Server) Expire(i *SAInfo, hard bool) {}

// NewMapping sends an X_NAT_T_NEW_MAPPING to registered sockets.
func (s *Server) NewMapping(m NewMapping) {}
