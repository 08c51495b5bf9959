package keysock

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/missiu/missiu/proto/pfkey"
)

// Error is a request that the server refused. errors.Is(err, syscall.EEXIST)
// and the like look at Errno.
type Error struct {
	Type  pfkey.MsgType
	Errno syscall.Errno
}

func (e *Error) Error() string { return fmt.Sprintf("pf_key: %v: %v", e.Type, e.Errno) }

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }

var (
	// ErrClosed is returned by a client whose connection ended.
	ErrClosed = errors.New("pf_key: connection closed")
	// ErrNoInstance is returned by Find when no missiu runs.
	ErrNoInstance = errors.New("no missiu is running")
)

// refuse is an error with the errno that answers it.
func refuse(errno syscall.Errno, format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errno)
}

// errnoOf returns the errno of a refusal as it goes into a message; EINVAL for
// errors that have none.
func errnoOf(err error) uint8 {
	var e syscall.Errno
	if errors.As(err, &e) && 0 < e && e < 256 {
		return uint8(e)
	}
	return uint8(syscall.EINVAL)
}
