// Package control is the socket by which an operator's commands reach a running
// ike: who may use it, how a command and its answer look, and which of several
// daemons is meant. What commands do is pkg/ike's business. For cmd/ike.
//
// The socket is a Unix stream socket of mode 0600; processes of root and of
// ike's own user may use it. Client and server take turns, a line of JSON each:
//
//	-> {"do":"status"}
//	<- {"ok":true,"status":{...}}
//	-> {"do":"up","rule":"gate"}
//	<- {"ok":false,"error":"IKE_AUTH: peer says AUTHENTICATION_FAILED"}
//
// A client may send any number of commands on a connection, one after the
// other. To close the connection gives up waiting for the answer, not what was
// begun.
//
// A command has at most MaxRequest octets, there are at most maxConns
// connections, and one on which nothing happens for idleTime is closed. An
// answer may be of any length.
package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/keysock"
)

// Bounds.
const (
	MaxRequest = 4096 // octets of a command, with its newline
	maxConns   = 16
	idleTime   = 30 * time.Second
	writeTime  = 30 * time.Second // for an answer to be taken
	acceptWait = 100 * time.Millisecond
)

// Dir is where the sockets are. Tests change it.
var Dir = "/run/missiu"

const suffix = ".ike"

// Path returns the socket of the daemon whose first address is a.
func Path(a netip.Addr) string { return filepath.Join(Dir, a.String()+suffix) }

// Request is a command.
type Request struct {
	Do   string `json:"do"`             // "status", "up", "down", "rekey"
	Rule string `json:"rule,omitempty"` // label; not with status
}

// Response is the answer: Error is empty if and only if OK.
type Response struct {
	OK     bool            `json:"ok"`
	Error  string          `json:"error,omitempty"`
	Status json.RawMessage `json:"status,omitempty"`
}

// Handler carries out a command. Its context ends when the client goes away or
// the server is closed.
type Handler func(ctx context.Context, r Request) Response

// Server serves a socket.
type Server struct {
	ln     *net.UnixListener
	path   string
	handle Handler
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	conns  map[*net.UnixConn]struct{}
}

// Listen makes the socket of the daemon with first address a and serves it until
// Close. A socket that a dead daemon left is replaced.
func Listen(a netip.Addr, h Handler) (*Server, error) {
	path := Path(a)
	if err := keysock.MakeDir(Dir); err != nil {
		return nil, err
	}
	ln, err := keysock.ListenUnix("unix", path)
	if err != nil {
		return nil, err
	}
	s := &Server{ln: ln, path: path, handle: h, conns: map[*net.UnixConn]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.accept)
	return s, nil
}

// Close removes the socket and ends every connection; nothing is left running.
func (s *Server) Close() {
	os.Remove(s.path)
	s.cancel()
	s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *Server) accept() {
	for {
		c, err := s.ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // of the moment, such as EMFILE
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(acceptWait):
			}
			continue
		}
		s.mu.Lock()
		switch {
		case s.ctx.Err() != nil || !keysock.Entitled(c):
			c.Close()
		case len(s.conns) >= maxConns:
			answer(c, Response{Error: "too many connections"})
			c.Close()
		default:
			s.conns[c] = struct{}{}
			s.wg.Go(func() { s.serve(c) })
		}
		s.mu.Unlock()
	}
}

func (s *Server) serve(c *net.UnixConn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		c.Close()
	}()
	r := bufio.NewReaderSize(c, MaxRequest)
	for {
		if c.SetReadDeadline(time.Now().Add(idleTime)) != nil {
			return
		}
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			answer(c, Response{Error: fmt.Sprintf("command longer than %d octets", MaxRequest)})
			return
		}
		if err != nil {
			return
		}
		if !s.one(c, r, line) {
			return
		}
	}
}

// one serves one command. Meanwhile it looks for the end of the connection: a
// client that goes on sending before it has its answer has lost it.
func (s *Server) one(c *net.UnixConn, r *bufio.Reader, line []byte) bool {
	var q Request
	d := json.NewDecoder(strings.NewReader(string(line)))
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		return answer(c, Response{Error: "no command: " + err.Error()})
	}
	if _, err := d.Token(); err != io.EOF {
		return answer(c, Response{Error: "no command: more than one value on the line"})
	}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	watch := make(chan error, 1)
	if c.SetReadDeadline(time.Time{}) != nil {
		return false
	}
	go func() {
		_, err := r.Peek(1)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			cancel()
		}
		watch <- err
	}()
	resp := s.handle(ctx, q)
	c.SetReadDeadline(time.Unix(1, 0)) // ends the watch
	if err := <-watch; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	return answer(c, resp)
}

func answer(c *net.UnixConn, r Response) bool {
	b, err := json.Marshal(r)
	if err != nil {
		b, _ = json.Marshal(Response{Error: err.Error()})
	}
	if c.SetWriteDeadline(time.Now().Add(writeTime)) != nil {
		return false
	}
	_, err = c.Write(append(b, '\n'))
	return err == nil
}

// Client is a connection to a daemon.
type Client struct {
	c *net.UnixConn
	r *bufio.Reader
}

// Dial connects to the daemon at path.
func Dial(path string) (*Client, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return &Client{c, bufio.NewReader(c)}, nil
}

// Close closes the connection.
func (c *Client) Close() error { return c.c.Close() }

// Do has a command carried out. The error is one of the connection, or ctx's.
func (c *Client) Do(ctx context.Context, q Request) (r Response, err error) {
	stop := context.AfterFunc(ctx, func() { c.c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	b, err := json.Marshal(q)
	if err != nil {
		return r, err
	}
	if _, err = c.c.Write(append(b, '\n')); err == nil {
		b, err = c.r.ReadBytes('\n')
	}
	switch {
	case ctx.Err() != nil:
		return r, ctx.Err()
	case err == io.EOF:
		return r, errors.New("ike has closed the connection")
	case err != nil:
		return r, err
	}
	return r, json.Unmarshal(b, &r)
}

// ErrNone: no daemon runs.
var ErrNone = errors.New("no ike is running")

// Paths lists the sockets that somebody listens at.
func Paths() ([]string, error) {
	l, err := filepath.Glob(filepath.Join(Dir, "*"+suffix))
	return slices.DeleteFunc(l, func(p string) bool { return !keysock.Alive("unix", p) }), err
}
