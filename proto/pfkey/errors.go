package pfkey

import (
	"fmt"
	"syscall"
)

// Error is a message that is not well formed, with the errno that answers it.
type Error struct {
	Errno syscall.Errno
	Ext   ExtType // ExtReserved: the header or the chain itself
	What  string
}

func (e *Error) Error() string {
	if e.Ext == ExtReserved {
		return "pf_key message: " + e.What
	}
	return fmt.Sprintf("pf_key %v: %s", e.Ext, e.What)
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }

func invalid(format string, a ...any) *Error {
	return &Error{Errno: syscall.EINVAL, What: fmt.Sprintf(format, a...)}
}

func tooLong(format string, a ...any) *Error {
	return &Error{Errno: syscall.EMSGSIZE, What: fmt.Sprintf(format, a...)}
}
