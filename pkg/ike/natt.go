package ike

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	"github.com/missiu/missiu/pkg/natt"
)

// nattConn is UDP port 4500, which missiu holds (it keeps the ESP).
type nattConn struct {
	c   *natt.Client
	buf []byte
}

// DialNATT connects to missiu's UDP port 4500 at path (natt.Path).
func DialNATT(ctx context.Context, path string) (Conn, error) {
	c, err := natt.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	return &nattConn{c, make([]byte, natt.MaxMessage)}, nil
}

// Receive is for one goroutine.
func (n *nattConn) Receive(b []byte) (int, netip.AddrPort, netip.AddrPort, error) {
	for {
		m, err := n.c.Receive(n.buf)
		var format *natt.FormatError
		switch {
		case errors.As(err, &format):
			continue // missiu's fault, and the connection is still good
		case errors.Is(err, io.EOF):
			return 0, netip.AddrPort{}, netip.AddrPort{}, fmt.Errorf("%w: missiu has gone", net.ErrClosed)
		case err != nil:
			return 0, netip.AddrPort{}, netip.AddrPort{}, err
		}
		return copy(b, m.Payload), m.Local, m.Remote, nil
	}
}

func (n *nattConn) Send(b []byte, local, remote netip.AddrPort) error {
	return n.c.Send(natt.Message{Local: local, Remote: remote, Payload: b})
}

func (n *nattConn) Close() error { return n.c.Close() }
