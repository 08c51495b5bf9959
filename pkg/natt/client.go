package natt

import (
	"context"
	"errors"
	"io"
	"net"
)

// Client is ike's end.
type Client struct{ c *net.UnixConn }

// Dial connects to missiu. Connecting again after an error is the caller's.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, err
	}
	return &Client{c.(*net.UnixConn)}, nil
}

// Receive waits for the next message. The payload lies in buf, which should
// hold MaxMessage octets. io.EOF: missiu has gone. Malformed messages are errors
// of type *FormatError, after which the connection is still good.
func (c *Client) Receive(buf []byte) (Message, error) {
	n, err := c.c.Read(buf)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		if errors.Is(err, net.ErrClosed) {
			err = net.ErrClosed
		}
		return Message{}, err
	}
	return Parse(buf[:n])
}

// Send has missiu send m from m.Local to m.Remote. Callable from any goroutine.
func (c *Client) Send(m Message) error {
	b, err := m.Append(nil)
	if err != nil {
		return err
	}
	_, err = c.c.Write(b)
	return err
}

// Close ends the connection; a blocked Receive returns net.ErrClosed.
func (c *Client) Close() error { return c.c.Close() }
