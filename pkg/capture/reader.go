package capture

import (
	"context"
	"net"
	"time"

	"github.com/missiu/missiu/pkg/attach"
)

// Reader receives frames from a running missiu. One goroutine uses it.
type Reader struct {
	c      *net.UnixConn
	sides  Sides
	ifs    [2]Interface
	buf    []byte
	cancel func() bool
}

// Dial asks the instance whose socket is at path for the frames of sides, and
// waits for the description of these. The end of ctx ends all reading.
func Dial(ctx context.Context, path string, sides Sides) (*Reader, error) {
	c, err := attach.Dial(path)
	if err != nil {
		return nil, err
	}
	r := &Reader{c: c, sides: sides, buf: make([]byte, MaxMessage+1)}
	r.cancel = context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	if _, err := c.Write(appendRequest(nil, sides)); err != nil {
		r.Close()
		return nil, err
	}
	for _, side := range []Side{Low, High} {
		if !sides.Has(side) {
			continue
		}
		m, err := r.read()
		if err == nil && (m.iface == nil || m.side != side) {
			err = &FormatError{"no description of side " + side.String()}
		}
		if err != nil {
			r.Close()
			return nil, err
		}
		r.ifs[side] = *m.iface
	}
	return r, nil
}

// Sides is what was asked for.
func (r *Reader) Sides() Sides { return r.sides }

// Interface describes a side that was asked for.
func (r *Reader) Interface(s Side) Interface { return r.ifs[s] }

// Read waits for the next frame, whose data is valid until the next Read. The
// error is io.EOF when missiu has ended, and os.ErrDeadlineExceeded at the end
// of the context.
func (r *Reader) Read() (Frame, error) {
	m, err := r.read()
	if err == nil && m.iface != nil {
		err = &FormatError{"a second description of side " + m.side.String()}
	}
	return m.frame, err
}

func (r *Reader) read() (message, error) {
	n, err := r.c.Read(r.buf)
	if err != nil {
		return message{}, err
	}
	return parse(r.buf[:n])
}

// Close ends the connection.
func (r *Reader) Close() error {
	r.cancel()
	return r.c.Close()
}
