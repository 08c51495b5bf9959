// Package natt carries what belongs to IKE on UDP port 4500 between missiu,
// which owns the port, and ike (RFC 3948, 2.2 and 2.3): IKE messages without
// the non-ESP marker in both directions, and NAT keepalives to be sent. The
// socket is /run/missiu/<if>.natt, AF_UNIX SOCK_SEQPACKET, mode 0600, with the
// peer's credentials checked. missiu is the server, ike the client; both may
// import this package, which imports nothing of ours.
//
// One packet on the socket is one message:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------+---------------+-------------------------------+
//	|  version = 1  |  family 4, 6  |           reserved = 0        |
//	+---------------+---------------+-------------------------------+
//	|   local port, big-endian      |   remote port, big-endian     |
//	+-------------------------------+-------------------------------+
//	|   local address, 16 octets; IPv4 in the first four, then 0    |
//	+---------------------------------------------------------------+
//	|   remote address, likewise                                    |
//	+---------------------------------------------------------------+
//	|   payload: an IKE message of at least 28 octets, or one 0xff  |
//	+---------------------------------------------------------------+
package natt

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
)

// Dir is where the sockets are. Tests change it.
var Dir = "/run/missiu"

// Path returns the socket of the instance on an interface.
func Path(ifname string) string { return filepath.Join(Dir, ifname+".natt") }

// Message is what one packet carries. Payload is an IKE message without the
// non-ESP marker, or the single octet 0xff: a keepalive.
type Message struct {
	Local, Remote netip.AddrPort
	Payload       []byte
}

var errTODO = errors.New("natt: not built yet")

// Server is missiu's end.
type Server struct{}

// Listen makes the socket; a stale one is replaced, a live one is an error.
// send is called for each message of a client, from one goroutine at a time;
// the payload is valid until it returns.
func Listen(path string, send func(Message)) (*Server, error) { return nil, errTODO }

// Deliver hands a message to the key daemon. It never blocks: without a client,
// or when the client is slow, the message is dropped and counted, and Deliver
// returns false. The payload is not kept. Callable from any goroutine.
func (s *Server) Deliver(local, remote netip.AddrPort, payload []byte) bool { return false }

// Stats returns messages delivered, dropped for want of a client, dropped
// because the client was slow, and messages of clients that were malformed.
func (s *Server) Stats() Stats { return Stats{} }

// Stats are counters since Listen.
type Stats struct{ Delivered, NoClient, Slow, Malformed, Received uint64 }

// Close removes the socket and waits for the server's goroutines.
func (s *Server) Close() error { return nil }

// Client is ike's end.
type Client struct{}

// Dial connects to missiu. Connecting again after an error is the caller's.
func Dial(ctx context.Context, path string) (*Client, error) { return nil, errTODO }

// Receive waits for the next message. The payload lies in buf, which should
// hold MaxMessage octets. io.EOF: missiu has gone. Malformed messages are errors
// of type *FormatError, after which the connection is still good.
func (c *Client) Receive(buf []byte) (Message, error) { return Message{}, errTODO }

// Send has missiu send m from m.Local to m.Remote. Callable from any goroutine.
func (c *Client) Send(m Message) error { return errTODO }

// Close ends the connection; a blocked Receive returns net.ErrClosed.
func (c *Client) Close() error { return nil }

// MaxMessage is the length of the longest packet on the socket, in octets.
const MaxMessage = 40 + 65535

// FormatError says what is wrong with a message.
type FormatError struct{ Reason string }

func (e *FormatError) Error() string { return "natt: " + e.Reason }
