package keysock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// A tape is a record of changes to an SPD: the PF_KEY messages that make them,
// one behind the other. missiu keeps one of its own. COMMIT stands behind changes
// that are wholly written; what follows the last one was being written when the
// writer ended, and counts for nothing.

// Taped is one change of a tape: SPDUPDATE of a policy, or SPDDELETE of the one
// with its direction and selector.
type Taped struct {
	Policy  ipsec.Policy
	Removed bool // of the policy direction and selector alone mean something
}

// AppendTaped appends the change to a tape.
func AppendTaped(b []byte, c *Taped) ([]byte, error) {
	m := &pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDUpdate}}
	if c.Removed {
		m.Type, m.Policy = pfkey.XSPDDelete, &pfkey.Policy{Dir: pfkey.Dir(c.Policy.Dir)}
		if err := putSelector(m, c.Policy.Sel); err != nil {
			return b, err
		}
	} else if err := putPolicy(m, &PolicyInfo{Policy: c.Policy}, withPrivate); err != nil {
		return b, err
	}
	return m.Append(b)
}

// AppendTapeEnd appends COMMIT to a tape.
func AppendTapeEnd(b []byte) ([]byte, error) {
	return (&pfkey.Message{Header: pfkey.Header{Type: pfkey.XCommit}}).Append(b)
}

// ReadTape calls f for each change of a tape, in order, as far as COMMIT says
// that they count, and returns how many octets that is. An error is f's, or tells
// of what is no tape.
func ReadTape(b []byte, f func(*Taped) error) (end int, err error) {
	for at := 0; at < len(b); {
		h, n, err := frame(b[at:])
		if errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return 0, fmt.Errorf("octet %d: %w", at, err)
		}
		if at += n; h.Type == pfkey.XCommit {
			end = at
		}
	}
	if end == 0 {
		return 0, refuse(syscall.EINVAL, "no tape of policies")
	}
	for at := 0; at < end; {
		_, n, err := frame(b[at:end])
		var c *Taped
		if err == nil {
			c, err = taped(b[at : at+n])
		}
		if err == nil && c != nil {
			err = f(c)
		}
		if err != nil {
			return 0, fmt.Errorf("octet %d: %w", at, err)
		}
		at += n
	}
	return end, nil
}

// frame is the header of the first message of b, and the message's length;
// io.ErrUnexpectedEOF: not all of it is there.
func frame(b []byte) (h pfkey.Header, n int, err error) {
	if len(b) < pfkey.HeaderLen {
		return h, 0, io.ErrUnexpectedEOF
	}
	n = int(binary.NativeEndian.Uint16(b[4:])) * 8
	switch {
	case n < pfkey.HeaderLen:
		return h, 0, refuse(syscall.EINVAL, "message of %d octets", n)
	case n > len(b):
		return h, 0, io.ErrUnexpectedEOF
	}
	h, err = pfkey.ParseHeader(b[:n])
	return h, n, err
}

// taped reads a message; it is nil for COMMIT.
func taped(b []byte) (*Taped, error) {
	m, err := pfkey.Decode(b)
	if err != nil {
		return nil, err
	}
	switch m.Type {
	case pfkey.XCommit:
		return nil, nil
	case pfkey.XSPDUpdate:
		i, err := takePolicy(m)
		if err != nil {
			return nil, err
		}
		return &Taped{Policy: i.Policy}, nil
	case pfkey.XSPDDelete:
		if m.Policy == nil {
			return nil, refuse(syscall.EINVAL, "no X_POLICY extension")
		}
		sel, err := takeSelector(m)
		if err != nil {
			return nil, err
		}
		return &Taped{Policy: ipsec.Policy{Dir: ipsec.Direction(m.Policy.Dir), Sel: sel}, Removed: true}, nil
	}
	return nil, refuse(syscall.EINVAL, "%v on a tape of policies", m.Type)
}
