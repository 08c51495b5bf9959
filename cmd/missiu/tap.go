package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/daemon"
	"github.com/missiu/missiu/pkg/datapath/bump"
)

// tapPurposes are the words for the sides on the command line.
var tapPurposes = map[string]string{"high": bump.PurposeHigh, "low": bump.PurposeLow}

// tapSide attaches standard input and output to a side of an instance: each frame
// is preceded by its length in four octets, big-endian. It goes on when the input
// ends, and ends with the output, a signal, or the instance.
func tapSide(o *options, side string, stdin io.Reader, stdout, stderr io.Writer) error {
	ctx, cancel := daemon.Signals(context.Background(), nil)
	defer cancel()
	c, err := attach.Dial(attach.Path(o.ifname, tapPurposes[side]))
	if gone(err) {
		if err = absent(o.ifname); alive(o.ifname) {
			err = errors.New("the instance has no sides to attach to; startInline makes them")
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.ifname, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	fmt.Fprintf(stderr, "missiu: %s: attached, %s\n", o.ifname, side)
	bad := make(chan error, 1)
	go func() {
		if err := toSide(c, stdin); err != nil {
			bad <- err
			c.SetDeadline(time.Unix(1, 0))
		}
	}()
	err = fromSide(stdout, c)
	select {
	case in := <-bad:
		return in
	default:
	}
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%s: missiu has ended", o.ifname)
	}
	return err
}

// alive: a daemon runs on the interface.
func alive(ifname string) bool {
	pid, err := daemon.Owner(pidPath(ifname))
	return err == nil && pid != 0
}

// fromSide writes what comes from the side, until an error.
func fromSide(w io.Writer, c *net.UnixConn) error {
	b := make([]byte, 4+bump.MaxFrame)
	for {
		n, err := c.Read(b[4:])
		if err != nil {
			return err
		}
		binary.BigEndian.PutUint32(b, uint32(n))
		if _, err := w.Write(b[:4+n]); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}
}

// toSide sends the frames of r to the side; nil at the end of r, or of the side.
func toSide(c *net.UnixConn, r io.Reader) error {
	in := bufio.NewReaderSize(r, 1<<16)
	b := make([]byte, bump.MaxFrame)
	for k := 0; ; k++ {
		var length [4]byte
		if _, err := io.ReadFull(in, length[:]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
				return nil
			}
			return fmt.Errorf("input: frame %d: %w", k, err)
		}
		n := binary.BigEndian.Uint32(length[:])
		if n == 0 || n > bump.MaxFrame {
			return fmt.Errorf("input: frame %d: length %d, want 1 to %d", k, n, bump.MaxFrame)
		}
		if _, err := io.ReadFull(in, b[:n]); err != nil {
			return fmt.Errorf("input: frame %d: %w", k, err)
		}
		if _, err := c.Write(b[:n]); err != nil {
			return nil // fromSide tells why
		}
	}
}
